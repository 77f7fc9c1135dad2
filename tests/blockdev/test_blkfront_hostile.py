"""Goal: whatever a backend answers, writes or keeps, blkfront loses at most this device and never a byte of another's.
Method: a scripted backend that answers by hand; commands in flight fail with ERROR and are given back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.blockdev.scripted import ScriptedBack
from tests.blockdev.world import KIB, Disk, World
from xenmodel.public.io.blkif import (
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_INDIRECT,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
    BLKIF_RSP_EOPNOTSUPP,
    BLKIF_RSP_ERROR,
    SEGMENT,
)
from xenmodel.public.io.ring import RSP_PROD
from xenmodel.testing import Footprint, check_grants, check_world
from xenmodel.types import PAGE_SIZE

READ, WRITE, FLUSH = BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_OP_FLUSH_DISKCACHE
FEATURES: dict[str, str | int] = {"feature_max_indirect_segments": 256, "feature_flush_cache": 1, "feature_discard": 1}


class Case:
    def __init__(self) -> None:
        self.world = World(backs=False)
        self.disk: Disk = self.world.attach()
        self.back = ScriptedBack(self.world, self.disk)
        self.other = ScriptedBack(self.world, self.world.attach("xvdb"))

    def connect(self, **nodes: str | int) -> Case:
        self.back.connect(**(FEATURES | nodes))
        self.other.connect()
        assert self.disk.connected
        return self


@pytest.fixture
def case() -> Iterator[Case]:
    """Connected; at the end the other disk must still work."""
    it = Case().connect()
    yield it
    assert check_world(it.world.hypervisor) == []
    command = it.other.disk.start(READ, 0, 512)
    it.world.settle()
    ((op, _, ident, _, _),) = it.other.take()
    it.other.answer(ident, op)
    assert it.other.disk.finish(command) == 0 and it.other.disk.connected
    it.world.close()


LIES: dict[str, tuple[Callable[[int], tuple[int, int]], str]] = {
    "id out of range": (lambda ident: (32, READ), "id 32"),
    "id huge": (lambda ident: (2**64 - 1, READ), "not out"),
    "id that is not out": (lambda ident: (ident ^ 16, READ), "not out"),
    "wrong operation": (lambda ident: (ident, WRITE), "operation 1"),
    "operation 255": (lambda ident: (ident, 255), "operation 255"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_response_that_is_a_lie(case: Case, name: str) -> None:
    """Goal: the device is given up with a reason, everything in flight or waiting fails once (XSA-391).
    Method: three reads out; the table's response to the first."""
    make, reason = LIES[name]
    commands = [case.disk.start(READ, i * 8, 4096) for i in range(3)]
    case.world.settle()
    taken = case.back.take()
    case.back.answer(*make(taken[0][2]))
    assert reason in (case.disk.errors()[0] or "") and case.disk.states()[0] == "6"
    assert [c.status for c in case.disk.done] == [BLKIF_RSP_ERROR] * 3
    assert sorted(map(id, case.disk.done)) == sorted(map(id, commands))
    late = case.disk.start(WRITE, 0, 512)
    case.world.settle()
    assert case.disk.done[-1] is late and late.status == BLKIF_RSP_ERROR


def test_a_response_twice(case: Case) -> None:
    first = case.disk.start(READ, 0, 4096)
    second = case.disk.start(READ, 8, 4096)
    case.world.settle()
    ident = case.back.take()[0][2]
    case.back.answer(ident, READ, settle=False)
    case.back.answer(ident, READ)
    assert "not out" in (case.disk.errors()[0] or "")
    assert [(c is first, c.status) for c in case.disk.done] == [(True, 0), (False, BLKIF_RSP_ERROR)]
    assert second in case.disk.done


@pytest.mark.parametrize("jump", [2, 32, 33, 2**31, 0xFFFFFFFF])
def test_a_response_index_that_jumps(case: Case, jump: int) -> None:
    """Goal: rsp_prod beyond what was asked, or going backwards, ends the device before a slot is read.
    Method: one read out, the shared index is set, then an event."""
    command = case.disk.start(READ, 0, 4096)
    case.world.settle()
    case.back.ring.words[RSP_PROD] = jump
    case.back.domain.events.send(case.back.port)
    assert case.disk.finish(command) == BLKIF_RSP_ERROR
    assert "rsp_prod" in (case.disk.errors()[0] or "")


@pytest.mark.parametrize(("status", "seen"), [(1, -1), (32767, -1), (-32768, -1), (-3, -1), (-1, -1), (-2, -2), (0, 0)])
def test_weird_statuses(case: Case, status: int, seen: int) -> None:
    """Goal: what is no BLKIF_RSP_* is an error, and the device lives on."""
    command = case.disk.start(READ, 0, 4096)
    case.world.settle()
    ((_, _, ident, _, _),) = case.back.take()
    case.back.answer(ident, READ, status)
    assert case.disk.finish(command) == seen and case.disk.connected


@pytest.mark.parametrize(
    ("features", "op"),
    [({"feature_flush_cache": 1}, FLUSH), ({"feature_flush_cache": 0, "feature_barrier": 1}, BLKIF_OP_WRITE_BARRIER)],
)
def test_a_flush_that_is_not_supported_after_all(features: dict[str, str | int], op: int) -> None:
    """Goal: EOPNOTSUPP drops the feature and succeeds, as Linux reads it; the next flush asks nobody.
    Method: two flushes on the ring at once, a third later."""
    case = Case().connect(**features)
    commands = []
    for _ in range(2):
        command = case.disk.front.take(0)
        assert command is not None
        case.disk.front.flush(command)
        commands.append(command)
    case.world.settle()
    for taken, _, ident, _, _ in case.back.take():
        assert taken == op
        case.back.answer(ident, op, BLKIF_RSP_EOPNOTSUPP)
    assert [case.disk.finish(c) for c in commands] == [0, 0]
    assert case.disk.front.flush_op == 0 and case.disk.flush() == 0 and case.back.take() == []
    case.world.close()


def test_a_discard_that_is_not_supported_after_all(case: Case) -> None:
    command = case.disk.start(BLKIF_OP_DISCARD, 0, 4096)
    case.world.settle()
    ((op, _, ident, _, _),) = case.back.take()
    case.back.answer(ident, op, BLKIF_RSP_EOPNOTSUPP)
    assert case.disk.finish(command) == BLKIF_RSP_EOPNOTSUPP
    assert case.disk.front.discard_granularity == 0 and case.disk.connected


@pytest.mark.parametrize("sectors", [0, 8, 1 << 40])
def test_sectors_change_while_requests_are_out(case: Case, sectors: int) -> None:
    """Goal: shrinking or growing in mid-I/O loses no request and no state.  Method: resize with a read out, answer it."""
    changes: list[int] = []
    case.disk.front.on_change = lambda: changes.append(case.disk.front.sectors)
    command = case.disk.start(READ, 4000, 4096)
    case.world.settle()
    case.back.set("sectors", sectors, settle=False)
    case.back.set("state", 4)
    assert changes == [sectors] and case.disk.front.sectors == sectors
    ((op, _, ident, _, _),) = case.back.take()
    case.back.answer(ident, op)
    assert case.disk.finish(command) == 0 and case.disk.connected


@pytest.mark.parametrize("key", ["sectors", "sector-size", "physical-sector-size"])
@pytest.mark.parametrize("value", ["x", "513", str(2**64)])
def test_garbage_in_mid_io(case: Case, key: str, value: str) -> None:
    """Goal: nonsense said later counts as much as nonsense said first.  Method: a resize to garbage, a read out."""
    if (key, value) == ("sectors", "513"):
        value = "-513"
    command = case.disk.start(READ, 0, 4096)
    case.world.settle()
    case.back.set(key, value, settle=False)
    case.back.set("state", 4)
    assert case.disk.finish(command) == BLKIF_RSP_ERROR
    assert key in (case.disk.errors()[0] or "") and case.disk.states()[0] == "6"


def test_garbage_in_the_indirect_page_and_the_ring_is_never_read_back(case: Case) -> None:
    """Goal: the frontend keeps its own record of what it asked.  Method: the backend overwrites slots and pages."""
    command = case.disk.start(READ, 0, 128 * KIB)
    case.world.settle()
    ((op, _, ident, _, _),) = case.back.take()
    assert op == BLKIF_OP_INDIRECT
    case.back.ring.view[64:] = b"\xff" * (PAGE_SIZE - 64)
    case.back.ring.view[:4] = b"\xff" * 4  # req_prod
    case.back.answer(ident, op)
    assert case.disk.finish(command) == 0
    assert command.length == 128 * KIB and command.segments[:8] == SEGMENT.pack(command.grefs[0], 0, 7)


def test_a_backend_that_never_unmaps(case: Case) -> None:
    """Goal: pages that it still maps are never used again, and the device still reconnects (XSA-396).
    Method: map pages of a command, close, come back; the old mapping must see nothing of what follows."""
    command = case.disk.start(WRITE, 0, 4096, b"old data" * 512)
    case.world.settle()
    ((_, _, _, _, slot),) = case.back.take()
    gref, _, _ = SEGMENT.unpack_from(slot, case.back.abi.segments_at)
    kept = case.back.map(gref).view
    case.back.set("state", 6)
    assert case.disk.states()[0] == "6"
    case.back.set("state", 2)  # and it is back, with everything still mapped
    assert case.disk.states()[0] == "3"
    assert case.disk.front.quarantined == 1
    old_ring = case.back.ring.view
    again = ScriptedBack(case.world, case.disk)
    again.connect(**FEATURES)
    ((op, _, ident, sector, slot),) = again.take()
    new_gref, _, _ = SEGMENT.unpack_from(slot, again.abi.segments_at)
    assert (op, sector) == (WRITE, 0) and new_gref != gref
    assert bytes(again.map(new_gref).view) == b"old data" * 512
    kept[:] = b"\0" * PAGE_SIZE
    old_ring[:] = b"\xff" * PAGE_SIZE
    assert bytes(command.view[:4096]) == b"old data" * 512
    again.answer(ident, op)
    assert case.disk.finish(command) == 0
    assert check_grants(case.world.hypervisor.domains.values()) == []


def test_a_backend_that_never_unmaps_and_a_guest_without_memory() -> None:
    """Goal: when there are no fresh pages the device is given up, and quarantined pages stay so even when it is removed.
    Method: a guest whose free frames are taken before the backend comes back."""
    case = Case().connect()
    command = case.disk.start(WRITE, 0, 4096, b"x" * 4096)
    case.world.settle()
    ((_, _, _, _, slot),) = case.back.take()
    mapping = case.back.map(SEGMENT.unpack_from(slot, case.back.abi.segments_at)[0])
    memory = case.world.guest.memory
    hoard = memory.free_pages
    while memory.free_pages:
        memory.allocate()
    case.back.set("state", 6)
    case.back.set("state", 2)
    assert "frames" in (case.disk.errors()[0] or "") and case.disk.finish(command) == BLKIF_RSP_ERROR
    case.world.toolstack.client.rm(case.disk.front_node)
    case.world.settle()
    assert memory.free_pages > 0 and hoard > 0
    taken = set[int]()
    while memory.free_pages:
        taken.add(int(memory.allocate()))
    assert mapping.frame.pfn not in taken, "a page that the backend maps was handed out again"
    case.world.close()


def test_commands_of_a_lost_device_do_not_keep_its_frames(case: Case) -> None:
    """Goal: after removal the guest has its frames back, and the consumer still gets an answer to whatever it asks.
    Method: detach; take, submit and give on the frontend that is gone."""
    front = case.disk.front
    before = Footprint(case.world.hypervisor)
    used = front.small.commands[0].pfn
    case.back.close()
    case.world.client.rm(case.disk.front_node)
    case.world.settle()
    assert front.gone and before.grown() == []
    assert case.world.guest.memory.allocate() <= used
    command = front.take(4096)
    assert command is not None
    command.view[:4096] = b"?" * 4096
    front.submit(command, WRITE, 0, 4096)
    case.world.settle()
    assert case.disk.done == [command] and command.status == BLKIF_RSP_ERROR
    front.give(command)
