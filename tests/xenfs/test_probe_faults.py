"""Goal: whatever a guest writes in its device's directory, or uses up of its quotas, costs that device and no other.
Method: a whole world with one disk that works; nodes are changed, or quotas used up, before a second disk is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from blockdev.storage import MemoryStorage
from blockdev.vdev import vdev_name
from tests.xenfs.machine import Machine, config
from xenfs.diskspec import parse_disk
from xenfs.host import HostError
from xenmodel.types import Domid
from xenmodel.xenstore.connection import Connection
from xenmodel.xenstore.errors import XsError

IDENT = 51728  # xvdb
HOME = "/local/domain/1"
FRONT, ERROR = f"{HOME}/device/vbd/{IDENT}", f"{HOME}/error/device/vbd/{IDENT}/error"


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine({"g": {"xvda": MemoryStorage(64)}}) as built:
        for vdev in ("xvdb", "xvdc"):
            built.storages[f"/g/{vdev}"] = MemoryStorage(64)
        yield built


def attach(machine: Machine, vdev: str = "xvdb") -> None:
    """Plug it in; nobody has looked at it yet."""
    machine.world.toolstack.attach_disk(1, parse_disk(f"/g/{vdev},raw,{vdev},w"))


def works(machine: Machine, vdev: str) -> bool:
    """Write to it and read it back through its file."""
    fh = machine.kernel.handle(f"domains/1/dev/{vdev}", 2)
    data = vdev.encode() * 128
    return not machine.kernel.write(fh, 512, data).error and machine.kernel.read(fh, 512, len(data)).data == data


NODES = [
    ("backend-id", "70000", "backend-id is 70000, outside 0.."),
    ("backend-id", "32752", "backend-id is 32752, outside 0.."),  # DOMID_FIRST_RESERVED
    ("backend-id", "seven", "not a number"),
    ("virtual-device", "5", "virtual-device: device number 5 is no xvd, sd or hd disk"),
    ("virtual-device", "4294967295", "virtual-device: device number"),
    ("virtual-device", "99999999999", "outside 0.."),
    ("virtual-device", "51712", "virtual-device: there is another xvda"),
    ("virtual-device", "x" * 1900, "not a number"),
    ("backend", "a b//", "is not a path"),
    ("backend", "/a/b/", "is not a path"),
    ("backend", "caf\u00e9", "is not a path"),
    ("trusted", "-1", "not a number"),
]


@pytest.mark.parametrize(("key", "value", "reason"), NODES, ids=lambda text: text[:16])
def test_bad_nodes(machine, key, value, reason):
    """Goal: no driver, the reason in `error` and in failures; set right, the device comes; others never notice.
    Method: the guest writes over one node of a new disk before its own kernel looks; then the right value."""
    guest = machine.world.hypervisor.store.connect(Domid(1))
    attach(machine)
    good = guest.read(f"{FRONT}/{key}")
    guest.write(f"{FRONT}/{key}", value.encode())
    machine.world.settle()
    probe = machine.guests["g"].probe
    assert list(probe.devices) == [f"{HOME}/device/vbd/51712"] and list(probe.failures) == [FRONT]
    assert reason in probe.failures[FRONT]
    assert guest.read(ERROR).decode() == f"22 {probe.failures[FRONT]}"
    assert machine.kernel.names("domains/1/dev") == [".", "..", "xen", "xvda"]
    assert machine.kernel.names("domains/1/inspect/vbd") == [".", "..", "xvda"]
    attach(machine, "xvdc")
    machine.world.settle()
    assert works(machine, "xvda") and works(machine, "xvdc")
    guest.write(f"{FRONT}/{key}", good)
    machine.world.settle()
    assert works(machine, "xvdb") and probe.failures == {}


@pytest.mark.parametrize("where", ["", "x" * 1900, "/", "/nowhere", "data", "@releaseDomain"], ids=lambda text: text[:8])
def test_a_backend_that_is_nowhere(machine, where):
    """Goal: a path that could be a backend's is waited for, or refused, and harms nobody; the right one is never late.
    Method: the guest writes it before its own kernel looks; another disk is plugged in; the device is unplugged by hand."""
    guest = machine.world.hypervisor.store.connect(Domid(1))
    attach(machine)
    guest.write(f"{FRONT}/backend", where.encode())
    machine.world.settle()
    attach(machine, "xvdc")
    machine.world.settle()
    assert machine.kernel.names("domains/1/dev") == [".", "..", "xen", "xvda", "xvdc"]
    assert works(machine, "xvda") and works(machine, "xvdc")
    machine.world.toolstack.client.rm(FRONT)
    machine.world.settle()
    assert FRONT not in machine.guests["g"].probe.devices and machine.guests["g"].probe.failures == {}


def use_up_watches(guest: Connection) -> None:
    for i in range(1000):
        guest.watch("data", f"greedy{i}")


def use_up_nodes(guest: Connection) -> None:
    for i in range(2000):
        guest.write(f"data/{i // 50}/{i % 50}", b"")


def use_up_transactions(guest: Connection) -> None:
    for _ in range(100):
        guest.transaction_start()


QUOTAS = [
    (use_up_watches, "domain 1 has 128 watches", True),
    (use_up_nodes, "nodes, more than 1000", False),
    (use_up_transactions, "domain 1 has 10 transactions open", True),
]


@pytest.mark.parametrize(("use_up", "reason", "has_error_node"), QUOTAS, ids=[row[0].__name__ for row in QUOTAS])
def test_a_guest_at_its_quota(machine, use_up: Callable[[Connection], None], reason: str, has_error_node: bool):
    """Goal: a device that its domain is too poor for does not connect and says why; the host and other disks go on.
    Method: a program of the guest uses a quota up, then a disk is plugged in; then the program lets go, another disk."""
    guest = machine.world.hypervisor.store.connect(Domid(1))
    with pytest.raises(XsError, match="ENOSPC"):
        use_up(guest)
    attach(machine)
    machine.world.settle()
    assert reason in machine.world._why(machine.guests["g"], f"vbd/{IDENT}")
    said = machine.world.toolstack.client.read(ERROR)
    assert reason in said if has_error_node else said is None
    assert machine.kernel.names("domains/1/dev") == [".", "..", "xen", "xvda"]
    assert works(machine, "xvda")
    guest.rm("data")
    guest.close()
    attach(machine, "xvdc")
    machine.world.settle()
    assert works(machine, "xvdc")


def many_disks(count: int) -> list[str]:
    numbers = [202 << 8 | i << 4 if i < 16 else 1 << 28 | i << 8 for i in range(count)]
    return [vdev_name(number) for number in numbers]


@pytest.mark.parametrize(("count", "memory_mib", "reason"), [(75, 64, "give the domain more memory"), (140, 8192, "g: xvd")])
def test_more_disks_than_a_guest_can_hold(count, memory_mib, reason):
    """Goal: a configuration with too many disks is refused with a reason somebody can act on.
    Method: more than memory, or quotas, are enough for; check_connected()."""
    vdevs = many_disks(count)
    with Machine({}) as machine:
        machine.storages |= {f"/g/{vdev}": MemoryStorage(64) for vdev in vdevs}
        machine.world.create(config("g", dict.fromkeys(vdevs, "w"), memory_mib))
        machine.world.settle()
        with pytest.raises(HostError, match=reason) as caught:
            machine.world.check_connected()
        assert "did not connect" not in str(caught.value)
