"""Goal: a guest and its disks look in the store as under a real Xen, node for node.
Method: the tree of the same guest is compared with `xenstore-ls -fp` of Xen 4.17.7 (Linux 6.1 in dom0 and guest)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blockdev.storage import Backing, MemoryStorage, Storage
from xenfs.config import GuestConfig
from xenfs.diskspec import parse_disk
from xenfs.host import World

UUID = "17e8ff97-f89e-404d-ad0a-eec3136a3f82"

# What was there when the guest was up, without vif and console. A line is a directory with its permissions, or `key=value
# (permissions)` in it; without permissions a key has its directory's. `*` marks a difference, see below.
REAL = f"""
/local/domain/0/backend/vbd/1/51712 (n0,r1)
frontend=/local/domain/1/device/vbd/51712
params=/dev/vdb
script=/etc/xen/scripts/block
frontend-id=1
online=1
removable=0
bootable=1
state=4
dev=xvda
type=phy
mode=w
device-type=disk
discard-enable=1
specification=xen
feature-max-indirect-segments=256
*multi-queue-max-queues=1
max-ring-page-order=4
*physical-device=fe:10
physical-device-path=/dev/vdb
hotplug-status=connected
feature-flush-cache=1
discard-granularity=512
discard-alignment=0
discard-secure=0
feature-discard=1
feature-barrier=1
feature-persistent=1
sectors=131072
info=0
sector-size=512
physical-sector-size=512

/local/domain/0/backend/vbd/1/51760 (n0,r1)
frontend=/local/domain/1/device/vbd/51760
params=/dev/vdc
script=/etc/xen/scripts/block
frontend-id=1
online=1
removable=1
bootable=1
state=4
dev=xvdd
type=phy
mode=r
device-type=cdrom
discard-enable=0
specification=xen
feature-max-indirect-segments=256
*multi-queue-max-queues=1
max-ring-page-order=4
*physical-device=fe:20
physical-device-path=/dev/vdc
hotplug-status=connected
feature-flush-cache=1
feature-barrier=1
feature-persistent=1
sectors=736
info=5
sector-size=512
physical-sector-size=512

/local/domain/1 (n0,r1)
vm=/vm/{UUID}
name=truth
cpu=
memory=
device=
control=
data= (n1)
drivers= (n1)
feature= (n1)
attr= (n1)
error= (n1)
domid=1
store=

/local/domain/1/store (n0,r1)
port=1
*ring-ref=764417

/local/domain/1/cpu (n0,r1)
0=
*1=

/local/domain/1/cpu/0 (n0,r1)
availability=online

/local/domain/1/memory (n0,r1)
static-max=393216
target=262144
videoram=0

/local/domain/1/device (n0,r1)
suspend=
vbd=

/local/domain/1/device/suspend (n0,r1)
event-channel= (n1)

/local/domain/1/device/vbd/51712 (n1,r0)
backend=/local/domain/0/backend/vbd/1/51712
backend-id=0
state=4
virtual-device=51712
device-type=disk
trusted=1
protocol=x86_64-abi
*ring-ref=8
*event-channel=9
feature-persistent=1

/local/domain/1/device/vbd/51760 (n1,r0)
backend=/local/domain/0/backend/vbd/1/51760
backend-id=0
state=4
virtual-device=51760
device-type=cdrom
trusted=1
protocol=x86_64-abi
*ring-ref=9
*event-channel=10
feature-persistent=1

/local/domain/1/control (n0,r1)
shutdown= (n1)
*feature-poweroff=1 (n1)
*feature-reboot=1 (n1)
*feature-suspend=1 (n1)
sysrq= (n1)
platform-feature-multiprocessor-suspend=1
platform-feature-xs_reset_watches=1

/vm/{UUID} (n0,r1)
name=truth
uuid={UUID}
*image=
*start_time=1795329149.80

/libxl/1 (n0)
device=
type=pv
*dm-version=qemu_xen

/libxl/1/device/vbd/51712 (n0)
frontend=/local/domain/1/device/vbd/51712
backend=/local/domain/0/backend/vbd/1/51712
params=/dev/vdb
script=/etc/xen/scripts/block
frontend-id=1
online=1
removable=0
bootable=1
state=1
dev=xvda
type=phy
mode=w
device-type=disk
discard-enable=1
specification=xen

/libxl/1/device/vbd/51760 (n0)
frontend=/local/domain/1/device/vbd/51760
backend=/local/domain/0/backend/vbd/1/51760
params=/dev/vdc
script=/etc/xen/scripts/block
frontend-id=1
online=1
removable=1
bootable=1
state=1
dev=xvdd
type=phy
mode=r
device-type=cdrom
discard-enable=0
specification=xen
"""

# Deliberate differences: key -> (value here, or None if it is absent here; why).
DIFFERENT: dict[str, tuple[str | None, str]] = {
    "multi-queue-max-queues": ("4", "Linux offers one per vCPU of dom0; here queues cost no vCPU"),
    "physical-device": (None, "only for block devices (see below); these targets are stand-ins"),
    "ring-ref": ("NUMBER", "a disk's data pages are granted before its ring; of the store it is a frame number"),
    "event-channel": ("NUMBER", "no ports of a console, timer and IPIs come first"),
    "1": (None, "one virtual CPU"),
    "feature-poweroff": ("", "written by the guest's control driver, which is not here yet"),
    "feature-reboot": ("", "the same"),
    "feature-suspend": ("", "the same"),
    "image": (None, "no kernel is booted"),
    "start_time": (None, "read by xl only"),
    "dm-version": (None, "no device model"),
}
# Keys that a real Xen lacks, by the key they stand behind.
ADDED = {"max-ring-page-order": ("max-ring-pages", "16", "the older scheme's name for it, as FreeBSD offers")}

Entry = tuple[str, str, str]  # key, value, permissions


def real_tree() -> dict[str, list[Entry]]:
    """REAL by directory, with the differences applied."""
    tree: dict[str, list[Entry]] = {}
    for block in REAL.strip().split("\n\n"):
        head, *lines = block.splitlines()
        directory, perms = head.removesuffix(")").split(" (")
        entries = tree[directory] = []
        for line in lines:
            key, _, rest = line.lstrip("*").partition("=")
            value, _, own = rest.partition(" (")
            wanted = DIFFERENT[key][0] if line.startswith("*") else value
            if wanted is not None:
                entries.append((key, wanted, own.removesuffix(")") or perms))
            if key in ADDED:
                entries.append((*ADDED[key][:2], perms))
    return tree


def our_tree(world: World, directories: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
    tree: dict[str, list[Entry]] = {directory: [] for directory in directories}
    for path, value, perms in world.hypervisor.store.dump():
        directory, _, key = path.rpartition("/")
        if directory in tree:
            text = value.decode()
            if DIFFERENT.get(key, ("",))[0] == "NUMBER":
                text = "NUMBER" if text.isdigit() else text
            tree[directory].append((key, text, ",".join(map(str, perms))))
    return tree


def build(open_storage, *disks: str) -> World:
    world = World(open_storage)
    world.announce = lambda _line: None
    specs = tuple(parse_disk(disk) for disk in disks)
    world.create(GuestConfig("truth.cfg", "truth", UUID, 256, 384, disks=specs))
    world.settle()
    return world


def test_tree():
    """Goal: every key with its value, permissions and place among its siblings.
    Method: all directories of REAL; the differences are those listed, each with its reason."""
    storages: dict[str, Storage] = {"/dev/vdb": MemoryStorage(131072), "/dev/vdc": MemoryStorage(736, readonly=True)}
    world = build(lambda backing: storages[backing.path], "phy:/dev/vdb,xvda,w", "phy:/dev/vdc,xvdd:cdrom,r")
    try:
        expected = real_tree()
        ours = our_tree(world, expected)
        for directory, entries in expected.items():
            assert ours[directory] == entries, directory
    finally:
        world.close()


def test_every_difference_is_one():
    """Goal: the list of differences names nothing that is the same.  Method: each is marked in REAL, and differs."""
    marked = {line.lstrip("*").partition("=")[::2] for line in REAL.splitlines() if line.startswith("*")}
    assert {key for key, _ in marked} == set(DIFFERENT)
    assert all(DIFFERENT[key][0] != value for key, value in marked)


def test_dom0():
    """Goal: before any guest the store is as small as a real one.  Method: the whole dump, and what is missing."""
    world = World()
    try:
        paths = {path: value for path, value, _ in world.hypervisor.store.dump()}
    finally:
        world.close()
    # a real one also has control/feature-* (dom0's kernel listens) and /local/pool (no CPU pools here)
    assert paths == {
        "/": b"", "/tool": b"", "/tool/xenstored": b"", "/local": b"", "/local/domain": b"", "/local/domain/0": b"",
        "/local/domain/0/domid": b"0", "/local/domain/0/name": b"Domain-0",
    }  # fmt: skip


SPECS = [
    (",w", {"mode": "w", "discard-enable": "1", "feature-discard": "1", "info": "0"}, {"trusted": "1"}),
    (",r", {"mode": "r", "discard-enable": "0", "feature-discard": None, "info": "4"}, {}),
    (",w,no-discard", {"mode": "w", "discard-enable": "0", "feature-discard": None}, {}),
    (",w,untrusted", {"xenfs-sector-size": None, "xenfs-direct-io": None}, {"trusted": "0"}),
    (",w,sector-size=4096", {"xenfs-sector-size": "4096"}, {}),
    (",w,physical-sector-size=4096,direct-io", {"xenfs-physical-sector-size": "4096", "xenfs-direct-io": "1"}, {}),
    (",w,direct-io-safe", {"xenfs-direct-io": None}, {}),
]


@pytest.mark.parametrize(("options", "backend", "frontend"), SPECS)
def test_options(options, backend, frontend):
    """Goal: what a disk specification says is in the store, and from there at whoever opens the image.
    Method: one option at a time; the keys, and what the storage was opened with."""
    opened: list[Backing] = []

    def open_storage(backing: Backing) -> Storage:
        opened.append(backing)
        return MemoryStorage(1024, backing.sector_size or 512, backing.readonly)

    world = build(open_storage, f"images/a.img,raw,xvda{options}")
    try:
        read = world.toolstack.client.read
        back, front = "/local/domain/0/backend/vbd/1/51712", "/local/domain/1/device/vbd/51712"
        assert {key: read(f"{back}/{key}") for key in backend} == backend
        assert {key: read(f"{front}/{key}") for key in frontend} == frontend
        path = os.path.abspath("images/a.img")
        assert read(f"{back}/params") == path, "a relative target is relative to the current directory"
        physical = 4096 if "physical" in options else None
        sector_size = 4096 if ",sector-size" in options else None
        assert opened == [Backing(path, options == ",r", sector_size, physical, options.endswith(",direct-io"))]
    finally:
        world.close()


@pytest.mark.host
def test_physical_device():
    """Goal: a block device's numbers are in the store, in hexadecimal.  Method: the first loop device as a disk."""
    device = Path("/dev/loop0")
    number = device.stat().st_rdev
    world = build(lambda backing: MemoryStorage(1024), f"{device},raw,xvda,w")
    try:
        back = "/local/domain/0/backend/vbd/1/51712"
        expected = f"{os.major(number):x}:{os.minor(number):x}"
        assert world.toolstack.client.read(f"{back}/physical-device") == expected
        keys = world.toolstack.client.directory(back)
        assert keys[keys.index("physical-device") :][:3] == ["physical-device", "physical-device-path", "hotplug-status"]
    finally:
        world.close()
