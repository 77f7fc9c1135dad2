"""Goal: what a consumer submits comes back once, with the right bytes, whatever the backend is like.
Method: real pairs; reconnects with other offers, short tables of references, splitting, wiping."""

from __future__ import annotations

import pytest

from blockdev.blkback import Offer
from blockdev.blkfront import Want
from blockdev.storage import DelayedStorage, MemoryStorage
from tests.blockdev.scripted import ScriptedBack
from tests.blockdev.world import KIB, MIB, SECTORS, World
from xenmodel.public.io.blkif import BLKIF_OP_READ, BLKIF_OP_WRITE
from xenmodel.testing import Footprint

READ, WRITE = BLKIF_OP_READ, BLKIF_OP_WRITE
LENGTHS = [512, 1024, 4096, 4608, 44 * KIB, 44 * KIB + 512, 45 * KIB, 64 * KIB, 64 * KIB + 512, 500 * KIB, MIB - 512, MIB]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("indirect", [None, 12, 256])
def test_lengths(world: World, length: int, indirect: int | None) -> None:
    """Goal: one, several or indirect requests carry exactly `length` bytes.  Method: lengths at each border, both ways."""
    storage = MemoryStorage(SECTORS)
    disk = world.attach(storage=storage, offer=Offer(max_indirect_segments=indirect))
    data = bytes(i * 7 % 251 for i in range(1024)) * (length // 1024 + 1)
    assert disk.write(5, data[:length]) == 0
    assert storage.data[5 * 512 : 5 * 512 + length] == data[:length]
    assert not any(storage.data[: 5 * 512]) and not any(storage.data[5 * 512 + length :])
    assert disk.read(5, length) == data[:length]
    pages = -(-length // 4096)
    limit = max(11, indirect or 0)
    count = 1 if pages <= limit else -(-pages // 11)
    assert disk.back.queues[0].statistics.wr_req == count


def test_a_full_ring_makes_commands_wait(world: World) -> None:
    """Goal: nothing is refused, all complete, in the order of the ring.  Method: 32 small and 3 large that need 24 slots."""
    disk = world.attach(offer=Offer(max_indirect_segments=None))
    commands = [disk.start(WRITE, i * 8, 4096) for i in range(32)] + [disk.start(READ, 0, MIB) for _ in range(3)]
    assert disk.front.take(1) is None, "every command is out"
    world.settle()
    assert disk.done == commands and not disk.front.waiting
    assert [c.status for c in commands] == [0] * 35


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (Offer(), Offer(max_ring_page_order=None, max_queues=None)),
        (Offer(max_ring_page_order=None, max_queues=None), Offer()),
        (Offer(max_queues=4, max_ring_page_order=0), Offer(max_queues=2, max_ring_page_order=2)),
        (Offer(), Offer(max_indirect_segments=None, persistent=False, flush=False, barrier=False, discard=False)),
    ],
)
def test_a_backend_that_comes_back_offers_something_else(world: World, first: Offer, then: Offer) -> None:
    """Goal: no key of the old connection misleads the new one.  Method: driver domain restarts with another offer."""
    disk = world.attach(offer=first, want=Want(ring_page_order=2, queues=4))
    assert disk.works()
    disk.restart(then)
    queues = min(then.max_queues or 1, 4)
    assert disk.connected and len(disk.back.queues) == queues
    assert disk.back.queues[0].ring.size == 32 << min(then.max_ring_page_order or 0, 2)
    assert disk.works() and disk.flush() == 0
    names = set(world.client.directory(disk.front_node))
    assert ("multi-queue-num-queues" in names) is (queues > 1)
    assert ("ring-page-order" in names) is bool(then.max_ring_page_order)


@pytest.mark.parametrize("trusted", [True, False])
def test_pages_are_wiped_for_a_backend_that_is_not_trusted(trusted: bool) -> None:
    """Goal: with trusted=0 a backend sees zeroes, not what the buffer held before (XSA-403).
    Method: a scripted backend maps the pages of a read and of the last, half used page of a write."""
    world = World(backs=False)
    disk = world.attach(trusted=trusted)
    back = ScriptedBack(world, disk).connect()
    for command in disk.front.small.commands:
        command.view[:] = b"s" * len(command.view)
    disk.start(READ, 0, 6 * KIB)
    disk.start(WRITE, 0, 4 * KIB + 512, b"w" * (4 * KIB + 512))
    world.settle()
    pages = []
    for _, count, _, _, slot in back.take():
        at = back.abi.segments_at
        grefs = [int.from_bytes(slot[at + 8 * i : at + 8 * i + 4], "little") for i in range(count)]
        pages.append(b"".join(bytes(back.map(gref).view) for gref in grefs))
    blank = b"s" if trusted else b"\0"
    assert pages[0] == blank * 8192
    assert pages[1] == b"w" * (4 * KIB + 512) + blank * 3584
    world.close()


@pytest.mark.parametrize("frames", range(1, 12))
def test_few_grant_references(frames: int) -> None:
    """Goal: fewer commands or a device that says why, and never a leak.
    Method: grant tables of 1 to 11 frames, two disks, some with rings of 16 pages; take everything, detach."""
    world = World(max_grant_frames=frames)
    footprint = Footprint(world.hypervisor)
    for vdev, want in (("xvda", Want()), ("xvdb", Want(ring_page_order=4, queues=4))):
        disk = world.attach(vdev, want=want)
        front = disk.front
        if not disk.connected:
            assert "grant" in (disk.errors()[0] or "")
        for length in (1, MIB):
            while (command := front.take(length)) is not None:
                front.submit(command, READ, 0, 512)
        world.settle()
        assert {c.status for c in disk.done} == {0 if disk.connected else -1}
        for command in disk.done:
            front.give(command)
    for disk in list(world.disks.values()):
        world.detach(disk)
    assert footprint.grown() == []
    world.close()


def test_no_port_is_free() -> None:
    """Goal: a guest without event channels loses the disk and nothing else.  Method: take them all, attach, free them."""
    world = World()
    ports = []
    while (port := world.guest.events.alloc_unbound(world.dom0.domid)) > 0:
        ports.append(port)
    footprint = Footprint(world.hypervisor)
    disk = world.attach()
    assert "event channel" in (disk.errors()[0] or "")
    world.detach(disk)
    assert footprint.grown() == []
    for port in ports:
        world.guest.events.close(port)
    assert world.attach("xvdb").works()
    world.close()


def test_a_small_guest(world: World) -> None:
    """Goal: memory bounds the number of commands, and a guest too small for one is told.  Method: 4, 2 and 1 MiB."""
    for mib, connects in ((8, True), (4, True), (1, False)):
        small = World(guest_mib=mib)
        disk = small.attach()
        if connects:
            assert disk.works()
            command = disk.front.take(MIB)
            assert command is not None and command.capacity == MIB
        else:
            assert small.fronts.devices == {} and "frames" in (disk.errors()[0] or "")
        small.close()


def test_statuses_reach_the_right_command(world: World) -> None:
    """Goal: completions in any order.  Method: a storage releases the last first; every second request is out of range."""
    storage = DelayedStorage(MemoryStorage(SECTORS))
    disk = world.attach(storage=storage)
    commands = [disk.start(READ, i * 8 if i % 2 else SECTORS + i, 4096) for i in range(10)]
    world.settle()
    while storage.release(lambda n: n - 1):
        world.settle()
    assert [c.status for c in commands] == [-1, 0] * 5
    assert disk.done == commands[::2] + commands[1::2][::-1]
