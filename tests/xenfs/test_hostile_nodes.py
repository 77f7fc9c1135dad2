"""Goal: whatever lies in a device's nodes, or does not, costs that device at most: no exception leaves the loop, the device
can be taken away, its domain destroyed, the world closed, and another guest's disk works all the while.
Method: a running World over a real image (and, with the host's network, vifs in a namespace of their own); domain 0, which
may do anything in the store, writes odd values everywhere: into each node before any driver looks, and at random."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from netdev.netlink import remove_namespace
from netdev.tap import inside
from tests.descriptors import open_files
from tests.host.test_netlink import Space
from xenfs.config import GuestConfig, parse_config
from xenfs.diskspec import parse_disk
from xenfs.host import World
from xenfs.network import Bridge
from xenfs.toolstack import Toolstack
from xenfs.up import say
from xenfs.vifspec import parse_vif
from xenmodel.hypervisor import Hypervisor
from xenmodel.public.io.xenbus import XenbusState
from xenmodel.types import Domid
from xenmodel.xenstore.client import Client
from xenmodel.xenstore.connection import Connection
from xenmodel.xenstore.errors import XsErrno, XsError
from xenmodel.xenstore.perms import Access, Perm

NAME = f"odd{os.getpid()}"
MOST = 4096  # of a write, with the path and its NUL
IDENT = 51728
FRONT, BACK, LIBXL = (f"/local/domain/1/device/vbd/{IDENT}", f"/local/domain/0/backend/vbd/1/{IDENT}",
                      f"/libxl/1/device/vbd/{IDENT}")  # fmt: skip
VIF_BACK = "/local/domain/0/backend/vif/1/0"

ODD = [
    b"", b"\0", b"/x\0y", b"a b", b"\xff\xfe", b"\x1b[31m\n", b"-1", b"0", b"1", b"2", b"3", b"7", b"00", b"9" * 400,
    b"4294967295", b"4294967296", b"65535", b"\xd9\xa3", b"x" * MOST, b"\xff" * MOST, b"9" * MOST, b"/" + b"x" * MOST,
    b"@releaseDomain", b"/", b"//", b"..", b"/local/domain/1", FRONT.encode(), BACK.encode(), b"%s%n{}", b"1,0", b"0,0",
]  # fmt: skip

READ_ONLY_IF_THERE = [
    "F/ring-page-order", "F/num-ring-pages", "F/multi-queue-num-queues", "F/ring-ref0", "F/queue-0/ring-ref",
    "B/xenfs-sector-size", "B/xenfs-physical-sector-size", "B/xenfs-direct-io", "B/hotplug-error", "B/physical-device",
    "B/state/x", "F/state/x",
]  # fmt: skip


class Site:
    """`world` has guest 1, the victim, and guest 2, whose disk has to work; `dom0` is a connection of xenstore-write."""

    def __init__(self, folder: Path, *vifs: str) -> None:
        self.folder = folder
        for name in ("one", "two", "other"):
            (folder / name).write_bytes(bytes(1 << 20))
        self.world = World()
        self.world.announce = say  # as for a user
        if vifs:
            self.world.vifs.network.make_bridges([Bridge("xenbr0", ("10.88.0.1/24",))])
        listed = ", ".join(f"'{vif}'" for vif in vifs)
        self.world.create(self.config(NAME, "one", f"vif = [ {listed} ]"))
        self.world.create(self.config("other", "other"))
        self.world.settle()
        self.world.check_connected()
        self.dom0: Connection = self.world.hypervisor.store.connect(Domid(0))

    def config(self, name: str, image: str, more: str = "") -> GuestConfig:
        line = f"name = '{name}'\nmemory = 16\ndisk = [ '{self.folder}/{image},raw,xvda,w' ]\n{more}\n"
        return parse_config(line, "g.cfg")

    def put(self, path: str, value: bytes) -> None:
        self.dom0.write(path, value[: MOST - len(path) - 1])

    def attach(self) -> None:
        self.world.toolstack.attach_disk(1, parse_disk(f"{self.folder}/two,raw,xvdb,w"))

    def under(self, *roots: str) -> list[str]:
        dump = self.world.hypervisor.store.dump()
        return [path for path, *_ in dump if any(path == root or path.startswith(f"{root}/") for root in roots)]

    def others_disk_works(self) -> bool:
        (front,) = (front for guest, front in self.world.fronts() if guest.config.name == "other")
        return front.connected and front.sectors == 2048


@contextmanager
def site(folder: Path, *vifs: str) -> Iterator[Site]:
    made = Site(folder, *vifs)
    try:
        yield made
    finally:
        assert made.world.close(), "nothing hangs"


def new_toolstack(hypervisor: Hypervisor) -> Toolstack:
    """With a domain 1 that has no drivers."""
    toolstack = Toolstack(hypervisor)
    toolstack.create_dom0(8)
    toolstack.create(GuestConfig("g.cfg", "g", "17e8ff97-f89e-404d-ad0a-eec3136a3f82", 8, 8))
    return toolstack


def keys() -> list[str]:
    """Each node of a disk, also those that drivers only look for; "F/state" is the frontend's."""
    hypervisor = Hypervisor()
    toolstack = new_toolstack(hypervisor)
    toolstack.attach_disk(1, parse_disk("/none,raw,xvdb,w"))
    found = [path for path, *_ in hypervisor.store.dump()]
    hypervisor.close()
    letters = {"F": FRONT, "B": BACK, "L": LIBXL}
    known = [letter + path.removeprefix(root) for letter, root in letters.items() for path in found if path.startswith(root)]
    later = ["F/ring-ref", "F/event-channel", "F/feature-persistent", "B/physical-device-path", "B/hotplug-status",
             "B/sectors", "B/sector-size", "B/physical-sector-size", "B/info", "B/feature-max-indirect-segments",
             "B/max-ring-page-order", "B/max-ring-pages", "B/multi-queue-max-queues", "B/feature-barrier",
             "B/discard-granularity", "B/discard-alignment", "B/feature-discard"]  # fmt: skip
    return known + later + READ_ONLY_IF_THERE


def path_of(key: str) -> str:
    return {"F": FRONT, "B": BACK, "L": LIBXL}[key[0]] + key[1:]


@pytest.mark.parametrize("key", keys())
def test_a_node_that_is_odd(tmp_path: Path, key: str) -> None:
    """Goal: as above, for each node of a disk.  Method: a disk is plugged in; before the drivers see it, and again when they
    are done, one node gets the value; the script is made to run once more. Then it is unplugged, and rooted out."""
    path = path_of(key)
    with site(tmp_path) as it:
        world, bare = it.world, set(it.under("/local/domain/1/device", "/local/domain/0/backend", "/libxl"))
        for value in ODD:
            it.attach()
            it.put(path, value)
            if key == "B/physical-device-path":  # for the script would write another
                it.put(f"{BACK}/hotplug-status", b"connected")
            world.settle()
            it.put(path, value)
            world.settle()
            it.dom0.write(f"{BACK}/state", b"2")
            with suppress(XsError):
                it.dom0.rm(f"{BACK}/hotplug-status")
            it.dom0.write(f"{BACK}/state", b"2")
            world.settle()
            it.put(path, value)
            world.toolstack.detach_disk(1, IDENT)
            world.settle()
            for directory in (FRONT, BACK, LIBXL):
                with suppress(XsError):
                    it.dom0.rm(directory)
            world.settle()
            left = set(it.under("/local/domain/1/device", "/local/domain/0/backend", "/libxl")) - bare
            assert not left and len(world.backs()) == 2, f"{value[:20]!r}: {left}"
        assert it.others_disk_works()
        world.destroy(1)
        assert it.others_disk_works()


@pytest.mark.parametrize(("key", "value"), [
    ("frontend", b"a b"), ("frontend", b"\0"), ("frontend", b"@releaseDomain"), ("mtu", b"9" * 4040),
])  # fmt: skip
def test_a_script_of_a_vif(key: str, value: bytes) -> None:
    """Goal: a `frontend` that is no path, and an `mtu` too long to pass on, end the script with an error, nothing else.
    Method: a toolstack whose host is quick; netback's state is written by hand."""
    hypervisor = Hypervisor()
    toolstack = new_toolstack(hypervisor)
    toolstack.attach_vif(1, 0, parse_vif("mac=00:16:3e:00:00:01"))
    hypervisor.settle()
    dom0 = Client(hypervisor.store.connect(Domid(0)))
    if key == "mtu":  # its copy for the guest has a longer name
        front = "/local/domain/1/device/vif/" + "0" * 30
        dom0.write(f"{front}/mtu", "")
        dom0.write(f"{VIF_BACK}/frontend", front)
    dom0.connection.write(f"{VIF_BACK}/{key}", value)
    dom0.write(f"{VIF_BACK}/state", int(XenbusState.InitWait))
    hypervisor.settle()
    assert dom0.read(f"{VIF_BACK}/hotplug-status") == "error"
    assert (dom0.read(f"{VIF_BACK}/hotplug-error") or "").startswith("E2BIG" if key == "mtu" else "EINVAL")
    hypervisor.close()


def test_a_backend_whose_frontend_is_no_path(tmp_path: Path) -> None:
    """Goal: it gets no driver, and is not tried again and again: nothing it wrote looks like a change.
    Method: settling ends, the reason is in the store; with a good path it is a disk like any other."""
    with site(tmp_path) as it:
        it.attach()
        it.put(f"{BACK}/frontend", b"\0")
        it.world.hypervisor.settle(100)
        assert BACK not in it.world.backends.devices
        assert b"is not a path" in it.dom0.read(f"/local/domain/0/error/backend/vbd/1/{IDENT}/error")
        it.put(f"{BACK}/frontend", FRONT.encode())
        it.world.settle()
        assert it.dom0.read(f"{FRONT}/state") == it.dom0.read(f"{BACK}/state") == b"4"


@pytest.mark.host
def test_a_bridge_that_is_no_text(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """Goal: `bridge`, which is shown to the user, may be bytes that are no text, or commands of a terminal.
    Method: a vif's link comes when the node is such; the line on standard output."""
    with Space(NAME) as host, inside(host.name):
        try:
            with site(tmp_path, "mac=00:16:3e:00:00:01") as it:
                ((guest, front),) = it.world.netfronts()
                for value, shown in ((b"\xff", b"'\\udcff'"), (b"\x1b[31m\n", b"'\\x1b[31m\\n'"), (b"br0", b"br0")):
                    it.put(f"{VIF_BACK}/bridge", value)
                    it.world.vifs.changed(guest.config.name, front)
                    it.world.settle()
                    assert b", bridge " + shown + b", connected\n" in capsysbinary.readouterr().out
        finally:
            remove_namespace(f"xenfs-{NAME}")


class Vandal:
    """Domain 0's root, who does anything to `roots`."""

    def __init__(self, it: Site, seed: int, roots: tuple[str, ...]) -> None:
        self.it, self.roots, self.random = it, roots, random.Random(seed)
        self.first = {path: it.dom0.read(path) for path in it.under(*roots)}  # what to come back to
        self.did: list[str] = []

    def value(self) -> bytes:
        pick = self.random
        match pick.randrange(5):
            case 0:
                return pick.randbytes(pick.choice((1, 3, 100, MOST)))
            case 1:
                return str(pick.randrange(8)).encode()
            case 2:
                return pick.choice(sorted(self.first)).encode()
            case _:
                return pick.choice(ODD)

    def act(self) -> None:
        pick, dom0 = self.random, self.it.dom0
        path = pick.choice(sorted(self.first))
        if pick.random() < 0.3:  # the nodes that move things
            path = pick.choice([each for each in sorted(self.first) if each.endswith(("state", "status", "online"))])
        what: dict[Callable[[], None], int] = {
            lambda: self.it.put(path, self.value()): 12,
            lambda: self.it.put(path, self.first[path]): 8,
            lambda: dom0.rm(path): 2,
            lambda: dom0.set_perms(path, [Perm(Domid(pick.randrange(3)), pick.choice(list(Access)))]): 2,
            lambda: self.it.put(f"{path}/{pick.choice(('x', '-', '@', '007', 'x' * 2000))}", self.value()): 2,
        }
        (action,) = pick.choices(list(what), list(what.values()))
        self.did.append(path)
        try:
            action()
        except XsError as error:  # the store said no to us: a path that is too long, a node that is not there
            assert error.errno in (XsErrno.ENOENT, XsErrno.EINVAL)

    def settle(self) -> None:
        try:
            self.it.world.settle()
        except Exception as error:
            raise AssertionError(f"after {self.did[-8:]}: {error!r}") from error


def rampage(it: Site, seed: int, rounds: int) -> None:
    vandal = Vandal(it, seed, ("/local/domain/0/backend/vbd/1", "/local/domain/0/backend/vif/1", "/local/domain/1",
                               "/libxl/1", "/vm"))  # fmt: skip
    for _ in range(rounds):
        for _ in range(vandal.random.randrange(1, 5)):
            vandal.act()
        vandal.settle()
    assert it.others_disk_works()
    if seed % 2:
        it.world.destroy(1)
        vandal.settle()
        assert it.others_disk_works()


@pytest.mark.parametrize("seed", range(12))
def test_at_random(tmp_path: Path, seed: int) -> None:
    """Goal: as above.  Method: values, removals, permissions and strange names, with all the world settling in between; then
    the domain is destroyed (or not), and the world closed."""
    with site(tmp_path) as it:
        it.attach()
        it.world.settle()
        rampage(it, seed, 120)


@pytest.mark.host
@pytest.mark.parametrize("seed", range(4))
def test_a_vif_at_random(tmp_path: Path, seed: int) -> None:
    """Goal: as above, of interfaces; and no descriptor is left.  Method: the same with two vifs and the host's network."""
    before = {each for each in open_files() if " /memfd:" not in each}
    with Space(NAME) as host, inside(host.name):
        try:
            with site(tmp_path, "mac=00:16:3e:00:00:01,ip=10.88.0.11/24,rate=10Mb/s", "queues=2") as it:
                rampage(it, seed, 60)
        finally:
            remove_namespace(f"xenfs-{NAME}")
        assert host.names() == {"lo"}
    assert {each for each in open_files() if " /memfd:" not in each} == before
