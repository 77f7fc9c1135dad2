"""Goal: memory the guest changes, and requests it never stops sending, cost only the guest.
Method: storages that rewrite guest memory during the call, or that hold requests while the guest does something else."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from blockdev.storage import DelayedStorage, FaultyStorage, MemoryStorage, Request
from tests.blockdev.scripted import ScriptedFront
from tests.blockdev.world import SECTORS, World
from xenmodel.public.io.blkif import BLKIF_RSP_ERROR, BLKIF_RSP_OKAY, SEGMENT
from xenmodel.public.io.ring import REQ_PROD
from xenmodel.testing import Footprint
from xenmodel.types import PAGE_SIZE

READ, WRITE, BARRIER, FLUSH = range(4)


class Rewriting(MemoryStorage):
    """Calls `meanwhile` in the middle of every operation: what another CPU of the guest would do."""

    def __init__(self) -> None:
        super().__init__(SECTORS)
        self.meanwhile: Callable[[], None] = lambda: None

    def read(self, offset: int, views: list[memoryview], length: int, request: Request) -> int:
        self.meanwhile()
        return super().read(offset, views, length, request)


class Recording(MemoryStorage):
    """Notes the order of operations."""

    def __init__(self) -> None:
        super().__init__(SECTORS)
        self.log: list[str] = []

    def read(self, offset: int, views: list[memoryview], length: int, request: Request) -> int:
        self.log.append(f"read {offset // 512}")
        return super().read(offset, views, length, request)

    def write(self, offset: int, views: list[memoryview], length: int, request: Request) -> int:
        self.log.append(f"write {offset // 512}")
        return super().write(offset, views, length, request)

    def flush(self, request: Request) -> int:
        self.log.append("flush")
        return super().flush(request)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("what", ["slot", "indirect page"])
def test_double_fetch(what: str, persistent: bool) -> None:
    """Goal: a slot or descriptor page rewritten after the copy changes nothing (XSA-155).
    Method: the storage overwrites it in the middle of the request, with a bad grant, id and operation."""
    storage = Rewriting()
    storage.data[:4096] = b"d" * 4096
    world = World(fronts=False)
    front = ScriptedFront(world, world.attach("xvda", storage)).connect(persistent=persistent)
    gref, page = front.data_page()
    descriptors, view = front.data_page(SEGMENT.pack(gref, 0, 7))
    slot = front.slot(READ, [(gref, 0, 7)], 5) if what == "slot" else front.indirect_slot(READ, [descriptors], 1, 5)

    def rewrite() -> None:
        front.page[64:] = b"\xff" * (PAGE_SIZE - 64)
        view[:] = b"\xff" * PAGE_SIZE

    storage.meanwhile = rewrite
    assert front.ask(slot) == (5, slot[0], BLKIF_RSP_OKAY)
    assert bytes(page) == b"d" * 4096
    world.close()


def test_a_grant_taken_away_while_it_is_used() -> None:
    """Goal: a pinned grant's active copy decides (XSA-500).  Method: the entry is zeroed while the read is held."""
    storage = DelayedStorage(MemoryStorage(SECTORS))
    world = World(fronts=False)
    front = ScriptedFront(world, world.attach("xvda", storage)).connect()
    gref, page = front.data_page(b"\x11" * PAGE_SIZE)
    front.put(front.slot(READ, [(gref, 0, 7)]))
    front.push()
    entries = world.guest.grants.entries()
    assert next(entry for entry in entries if entry.ref == gref).pins == 1
    world.guest.grants._frames[0][2 * gref] = 0  # what a guest kernel can always do: it is its own memory
    assert storage.release(lambda n: 0)
    world.settle()
    assert [a.status for a in front.answers()] == [BLKIF_RSP_OKAY] and not any(page)
    assert front.ask(front.slot(READ, [(gref, 0, 7)])).status == BLKIF_RSP_ERROR
    world.close()


def test_a_producer_that_never_ends_gets_bounded_turns() -> None:
    """Goal: a guest that produces while it is served does not keep the loop (and another disk gets its turn).
    Method: the storage itself publishes one more request per request, as a second CPU would; count per turn."""
    storage = Rewriting()
    world = World(fronts=False)
    front = ScriptedFront(world, world.attach("xvda", storage)).connect()
    gref, _ = front.data_page()
    slot = front.slot(READ, [(gref, 0, 7)])
    for index in range(16):
        front.put(slot, index=index)
    served = [0]

    def produce() -> None:
        served[0] += 1
        if served[0] > 1000:
            return  # or a backend without a bound would never come back
        front.put(slot)
        front.words[REQ_PROD] = (front.words[REQ_PROD] + 1) & 0xFFFFFFFF

    storage.meanwhile = produce
    front.push(16, settle=False)
    turns = []
    for _ in range(5):
        before = served[0]
        world.hypervisor.deliver(turns=1)
        turns.append(served[0] - before)
    assert turns == [64] * 5, "two rings full per turn, and an event of its own for the rest"
    storage.meanwhile = lambda: None
    world.settle()
    world.close()


def test_a_barrier_waits_and_makes_wait() -> None:
    """Goal: flush, write, flush between what came before and what comes after.
    Method: write, barrier, write published at once; a storage that completes in the worst order."""
    recording = Recording()
    storage = DelayedStorage(recording)
    world = World(fronts=False)
    front = ScriptedFront(world, world.attach("xvda", storage)).connect()
    gref, _ = front.data_page(b"b" * PAGE_SIZE)
    for index, (op, sector) in enumerate([(WRITE, 0), (READ, 8), (BARRIER, 16), (WRITE, 24)]):
        front.put(front.slot(op, [(gref, 0, 7)], index, sector), index=index)
    front.push(4)
    while storage.release(lambda n: n - 1):
        world.settle()
    assert recording.log == ["read 8", "write 0", "flush", "write 16", "flush", "write 24"]
    assert [a.ident for a in front.answers()] == [1, 0, 2, 3]
    world.close()


@pytest.mark.parametrize(
    ("fails_at", "log"),
    [("flush", []), ("write", ["flush"])],
)
def test_a_barrier_that_fails_is_an_error_and_no_end(fails_at: str, log: list[str]) -> None:
    """Goal: a step that fails ends the barrier with ERROR, and the ring goes on.  Method: one kind of step fails."""
    recording = Recording()
    world = World(fronts=False)
    storage = FaultyStorage(recording, lambda what: what == fails_at)
    front = ScriptedFront(world, world.attach("xvda", storage)).connect()
    gref, _ = front.data_page()
    front.put(front.slot(BARRIER, [(gref, 0, 7)], 1), index=0)
    front.put(front.slot(READ, [(gref, 0, 7)], 2), index=1)
    front.push(2)
    assert [tuple(a) for a in front.answers()] == [(1, BARRIER, BLKIF_RSP_ERROR), (2, READ, BLKIF_RSP_OKAY)]
    assert recording.log == [*log, "read 0"]
    world.close()


def test_an_empty_barrier_is_a_flush() -> None:
    recording = Recording()
    world = World(fronts=False)
    front = ScriptedFront(world, world.attach("xvda", recording)).connect()
    assert front.ask(front.slot(BARRIER, [])) == (1, BARRIER, BLKIF_RSP_OKAY)
    assert recording.log == ["flush"]
    world.close()


@pytest.mark.parametrize("reads", [0, 1, 32])
def test_the_domain_dies_with_requests_in_flight(reads: int) -> None:
    """Goal: frames live on while the disk still writes into them; then everything is let go.
    Method: destroy the guest, complete what was held, compare domain 0 with what it was before the disk."""
    storage = DelayedStorage(MemoryStorage(SECTORS))
    world = World(fronts=False)
    footprint = Footprint(world.hypervisor)
    front = ScriptedFront(world, world.attach("xvda", storage)).connect()
    gref, _ = front.data_page()
    for index in range(reads):
        front.put(front.slot(READ, [(gref, 0, 7)], index), index=index)
    front.push(reads)
    world.destroy_guest()
    world.settle()
    while storage.release(lambda n: 0):
        world.settle()
    assert footprint.grown() == [] and world.for_others.mappings() == [] and world.for_others.ports() == []
    assert world.backs.devices == {} and world.client.directory("/local/domain/0") == ["domid", "name"]
    world.hypervisor.close()


def test_its_directory_vanishes_and_the_frontend_does_not_care() -> None:
    """Goal: a backend that nobody tells anything any more still lets go when its last request is answered.
    Method: a frontend that never reacts, reads held by the storage, xenstore-rm of the backend's directory."""

    class Counting(DelayedStorage):
        closed = 0

        def close(self) -> None:
            self.closed += 1

    storage = Counting(MemoryStorage(SECTORS))
    world = World(fronts=False)
    disk = world.attach("xvda", storage)
    front = ScriptedFront(world, disk).connect()
    gref, _ = front.data_page()
    for index in range(3):
        front.put(front.slot(READ, [(gref, 0, 7)], index), index=index)
    front.push(3)
    world.client.rm(disk.back_node)
    world.settle()
    assert storage.closed == 0 and len(world.for_devices.mappings()) == 4
    while storage.release(lambda n: 0):
        world.settle()
    assert world.for_devices.mappings() == [] and world.for_devices.ports() == []
    assert storage.closed == 1, "an image that stays open keeps its lock"
    world.close()


@pytest.mark.parametrize("states", [(3, 6, 1), (6, 1), (4, 5, 6, 1), (3, 3, 1, 6), (5, 6, 5, 6, 1)])
@pytest.mark.parametrize("settled", [True, False])
def test_a_frontend_that_flaps(states: tuple[int, ...], settled: bool) -> None:
    """Goal: quick connects and disconnects leave no thread, mapping, port or watch (XSA-350, XSA-349).
    Method: 100 rounds, events delivered after each write or only after each round; the disk still connects at the end."""
    world = World(fronts=False)
    disk = world.attach("xvda")
    front = ScriptedFront(world, disk)
    footprint = Footprint(world.hypervisor)
    for key, value in (("ring-ref", front.gref), ("event-channel", front.port)):
        front.set(key, value)
    for _ in range(100):
        for state in states:
            front.set("state", state, settle=settled)
        world.settle()
    front.set("state", 6)
    assert disk.states() == ("6", "6")
    assert footprint.grown() == []
    front.set("state", 1)
    assert disk.states() == ("1", "2")
    front.words[REQ_PROD] = 0
    front.set("state", 3)
    assert disk.states() == ("3", "4")
    world.close()
