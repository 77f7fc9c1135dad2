"""Goal: every pair of offer and wish that blkif.h allows comes to an agreement, and the disk works under it.
Method: real drivers on both sides; tables of what one of them offers or asks; the store and the queues are looked at."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from blockdev.blkback import Offer
from blockdev.blkfront import Want
from blockdev.storage import MemoryStorage
from tests.blockdev.scripted import ScriptedBack, ScriptedFront
from tests.blockdev.world import MIB, SECTORS, Broken, Disk, World
from xenmodel.public.io.blkif import (
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_WRITE_BARRIER,
    BLKIF_RSP_EOPNOTSUPP,
    BLKIF_RSP_OKAY,
    VDISK_CDROM,
    VDISK_READONLY,
    VDISK_REMOVABLE,
)

NOTHING = Offer(
    max_indirect_segments=None,
    max_ring_page_order=None,
    max_queues=None,
    persistent=False,
    flush=False,
    barrier=False,
    discard=False,
)
GREEDY = Want(ring_page_order=4, queues=4)


def _full_size_io(disk: Disk) -> bool:
    """A megabyte, in whatever pieces it takes, and its last half page."""
    data = bytes(range(256)) * 4096
    return (
        disk.write(0, data) == 0
        and disk.read(0, MIB) == data
        and disk.write(3, data[: MIB - 512]) == 0
        and disk.read(3, MIB - 512) == data[: MIB - 512]
    )


def test_a_backend_that_offers_nothing(world: World) -> None:
    """Goal: 11 segments, one page, one queue, no flush, and every byte arrives.  Method: the greediest frontend."""
    disk = world.attach(offer=NOTHING, want=GREEDY)
    assert disk.connected
    front = disk.front
    assert (front.most_segments, len(front.queues), front.queues[0].ring.size) == (11, 1, 32)
    assert (front.persistent, front.flush_op, front.discard_granularity) == (False, 0, 0)
    for absent in ("ring-page-order", "num-ring-pages", "multi-queue-num-queues", "ring-ref0", "queue-0"):
        assert not world.client.exists(f"{disk.front_node}/{absent}"), absent
    for absent in ("feature-discard", "max-ring-pages", "max-ring-page-order", "feature-max-indirect-segments"):
        assert not world.client.exists(f"{disk.back_node}/{absent}"), absent
    assert _full_size_io(disk)
    assert disk.flush() == BLKIF_RSP_OKAY, "a flush that is not offered is one that is not needed"
    assert disk.discard(0, 4096) == BLKIF_RSP_EOPNOTSUPP
    assert disk.back.queues[0].statistics.rd_req == 2 * 24, "a megabyte is 24 requests of 11 pages"
    ring = world.client.read_int(f"{disk.front_node}/ring-ref", -1)
    assert [mapping.ref for mapping in world.for_devices.mappings()] == [ring], "only the ring stays mapped"


FEATURES = list(itertools.product([True, False], repeat=4))


@pytest.mark.parametrize(("persistent", "flush", "barrier", "discard"), FEATURES)
@pytest.mark.parametrize("indirect", [None, 8, 32, 256, 4096])
def test_every_combination_of_features(
    world: World, persistent: bool, flush: bool, barrier: bool, discard: bool, indirect: int | None
) -> None:
    """Goal: each feature is used exactly if it is offered.  Method: all combinations, the frontend's view, some I/O."""
    offer = Offer(
        max_indirect_segments=indirect, persistent=persistent, flush=flush, barrier=barrier, discard=discard
    )
    storage = MemoryStorage(SECTORS)
    disk = world.attach(storage=storage, offer=offer)
    front = disk.front
    want_op = BLKIF_OP_FLUSH_DISKCACHE if flush else BLKIF_OP_WRITE_BARRIER if barrier else 0
    assert (front.persistent, front.flush_op) == (persistent, want_op)
    assert bool(front.discard_granularity) is discard
    assert front.most_segments == max(11, min(indirect or 0, 256))
    assert disk.works() and _full_size_io(disk)
    assert disk.flush() == BLKIF_RSP_OKAY
    assert storage.flushes == (1 if want_op else 0)
    assert disk.discard(0, 4096) == (BLKIF_RSP_OKAY if discard else BLKIF_RSP_EOPNOTSUPP)
    assert (storage.data[:4096] == bytes(4096)) is discard


@pytest.mark.parametrize("offered", [None, 0, 1, 2, 3, 4])
@pytest.mark.parametrize("wanted", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("protocol", ["x86_64-abi", "x86_32-abi", "arm-abi"])
def test_ring_orders(world: World, offered: int | None, wanted: int, protocol: str) -> None:
    """Goal: the smaller order wins, both ends have the same ring, 108-byte slots work to the end.
    Method: every pair of orders; fill the ring with requests at once."""
    want = Want(ring_page_order=wanted, protocol=protocol)
    disk = world.attach(offer=Offer(max_ring_page_order=offered), want=want)
    order = min(offered or 0, wanted)
    front_ring, back_ring = disk.front.queues[0].ring, disk.back.queues[0].ring
    slot = 108 if protocol == "x86_32-abi" else 112
    assert front_ring.size == back_ring.size == 1 << (((4096 << order) - 64) // slot).bit_length() - 1
    assert front_ring.slot_size == back_ring.slot_size == slot
    read = world.client.read
    assert read(f"{disk.front_node}/ring-page-order") == (str(order) if order else None)
    assert read(f"{disk.front_node}/num-ring-pages") == (str(1 << order) if order else None)
    assert disk.works() and _full_size_io(disk) and disk.flush() == 0 and disk.discard(0, 4096) == 0


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_older_ring_scheme_alone(order: int) -> None:
    """Goal: num-ring-pages without ring-page-order is understood (FreeBSD, RedHat).
    Method: a frontend that writes only the old keys, one slot in the last page of its ring."""
    world = World(fronts=False)
    disk = world.attach()
    front = ScriptedFront(world, disk)
    pages = 1 << order
    pfn = world.guest.memory.allocate(pages)
    for i in range(pages):
        front.set(f"ring-ref{i}", front.grant(pfn + i))  # type: ignore[arg-type]
    front.page = world.guest.memory.run(pfn, pages)
    front.words = front.page[:64].cast("I")
    front.words[1] = front.words[3] = 1
    front.size = 32 << order
    front.set("num-ring-pages", pages)
    front.set("event-channel", front.port)
    front.set("state", 3)
    assert disk.states() == ("3", "4") and disk.back.queues[0].ring.size == front.size
    gref, _ = front.data_page()
    slot = front.slot(0, [(gref, 0, 7)])
    for _ in range(3):
        for index in range(front.size):
            front.put(slot, index)
        front.push(front.size)
        assert front.answers() == [(1, 0, 0)] * front.size
    world.close()


@pytest.mark.parametrize("offered", [None, 1, 2, 4])
@pytest.mark.parametrize("wanted", [1, 2, 4])
@pytest.mark.parametrize("order", [0, 2])
def test_queues(world: World, offered: int | None, wanted: int, order: int) -> None:
    """Goal: the smaller number of queues; one queue has flat keys; all of them carry requests.
    Method: every pair; 16 writes at once are spread evenly."""
    want = Want(queues=wanted, ring_page_order=order)
    disk = world.attach(offer=Offer(max_queues=offered), want=want)
    count = min(offered or 1, wanted)
    assert len(disk.front.queues) == len(disk.back.queues) == count
    read = world.client.read
    assert read(f"{disk.front_node}/multi-queue-num-queues") == (str(count) if count > 1 else None)
    assert world.client.exists(f"{disk.front_node}/event-channel") is (count == 1)
    assert world.client.exists(f"{disk.front_node}/queue-{count - 1}/event-channel") is (count > 1)
    commands = [disk.start(1, i * 8, 4096, bytes([i]) * 4096) for i in range(16)]
    world.settle()
    assert len(disk.done) == 16
    assert {queue.statistics.wr_req for queue in disk.back.queues} == {16 // count}
    for command in commands:
        disk.front.give(command)
    assert disk.read(0, 65536) == b"".join(bytes([i]) * 4096 for i in range(16))


@pytest.mark.parametrize("size", [512, 4096])
@pytest.mark.parametrize("physical", [None, 4096, 65536])
def test_sector_sizes(world: World, size: int, physical: int | None) -> None:
    """Goal: `sectors` counts 512 bytes whatever sector-size says; parts of blocks are refused by the backend.
    Method: the nodes, whole blocks, and half a block."""
    storage = MemoryStorage(SECTORS, size)
    storage.physical_sector_size = physical or size
    disk = world.attach(storage=storage)
    front = disk.front
    assert world.client.read(f"{disk.back_node}/sectors") == str(SECTORS)
    assert (front.sectors, front.sector_size, front.physical_sector_size) == (SECTORS, size, physical or size)
    assert disk.works() and _full_size_io_aligned(disk)
    assert isinstance(disk.read(1, 512), bytes) is (size == 512)
    assert isinstance(disk.read(0, 512), bytes) is (size == 512)
    assert (disk.discard(8, 512) == 0) is (size == 512)
    last = disk.read(SECTORS - 8, 4096)
    assert isinstance(last, bytes) and disk.read(SECTORS - 8, 8192) == -1


def _full_size_io_aligned(disk: Disk) -> bool:
    data = bytes(range(256)) * 4096
    return disk.write(8, data) == 0 and disk.read(8, MIB) == data


@pytest.mark.parametrize(
    ("spec", "readonly", "info"),
    [
        ({}, False, 0),
        ({"readonly": True}, True, VDISK_READONLY),
        ({"removable": True}, False, VDISK_REMOVABLE),
        ({"removable": True, "readonly": True}, True, VDISK_REMOVABLE | VDISK_READONLY),
        ({"cdrom": True, "readonly": True, "removable": True}, True, VDISK_CDROM | VDISK_READONLY),
    ],
)
def test_info(world: World, spec: dict[str, Any], readonly: bool, info: int) -> None:
    """As Linux's blkback wrote it on real Xen: 0, 4, and 5 for a cdrom."""
    disk = world.attach(storage=MemoryStorage(SECTORS, readonly=readonly), **spec)
    assert world.client.read(f"{disk.back_node}/info") == str(info)
    assert disk.front.readonly is readonly
    assert disk.write(0, bytes(512)) == (-1 if readonly else 0)
    assert isinstance(disk.read(0, 512), bytes)
    assert not readonly or not world.client.exists(f"{disk.back_node}/feature-discard")


def test_discard_can_be_switched_off(world: World) -> None:
    disk = world.attach(discard=False)
    assert not world.client.exists(f"{disk.back_node}/feature-discard")
    assert disk.discard(0, 4096) == BLKIF_RSP_EOPNOTSUPP and disk.works()


def test_a_frontend_that_skips_initialised() -> None:
    """netfront and Mirage write Connected directly; so may a disk."""
    world = World(fronts=False)
    disk = world.attach()
    front = ScriptedFront(world, disk).connect(state=4)
    assert disk.states() == ("4", "4")
    gref, _ = front.data_page()
    assert front.ask(front.slot(0, [(gref, 0, 7)])).status == 0
    world.close()


def test_a_backend_that_skips_initwait() -> None:
    """Goal: a backend that says Initialised is talked to all the same.  Method: state 3 first, then the usual."""
    world = World(backs=False)
    disk = world.attach()
    back = ScriptedBack(world, disk)
    back.set("state", 3)
    assert disk.states() == ("3", "3")
    back.map_ring()
    back.set("sectors", 8)
    back.set("state", 4)
    assert disk.states() == ("4", "4") and disk.front.sectors == 8
    world.close()


def test_an_image_that_cannot_be_opened(world: World) -> None:
    """Goal: the reason is in the store, the device closes, and the next one is not affected."""
    disk = world.attach(storage=Broken(8))
    assert disk.states() == ("6", "6")
    assert disk.errors() == (None, "22 cannot open disk image /disk/xvda: it is broken")
    assert world.attach("xvdb").works()
