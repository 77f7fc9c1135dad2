"""Goal: the clock of a guest that posts no pages runs while a frame waits for them, and not otherwise; and what was answered
is published, whatever becomes of the frame, for a guest that does not see its pages come back posts no others.
Method: a real BackRx, a guest played by hand, a clock that is a number; polls only when the interface has a frame, as in
the host's loop."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from netdev.backrx import DRAIN_S, STALL_S
from netdev.link import BLOCKED, IDLE, MORE
from netdev.vnet import VNET
from tests.netdev.halves import RxBack, numbered

NEED = 18  # slots for the largest frame with its extra
NEVER_GRANTED = 999_999
PLAIN = VNET.unpack(bytes(10))


@pytest.fixture
def back() -> Iterator[RxBack]:
    made = RxBack()
    yield made
    made.close()


def loop(back: RxBack, *frames: bytes) -> int | None:
    """What the host's loop does with frames that come: poll while the interface has some and there is room."""
    for frame in frames:
        back.lane.push(frame)
    outcome = None
    while back.lane.waiting and outcome != BLOCKED:
        outcome = back.rx.poll(back.lane)
        back.settle()
    return outcome


def test_no_frame_waits_and_no_clock_runs(back: RxBack) -> None:
    """Goal: a guest that is short of pages is not late before somebody wants to send.  Method: the last frame of a batch
    takes the room for the next, which comes 70 s later and is to wait, not to be dropped."""
    back.post(2 * NEED)
    back.rx.batch.limit = 32
    assert loop(back, *[numbered(100, i) for i in range(NEED + 1)]) == MORE
    assert (back.rx.statistics.packets, back.rx.blocked_at, back.rx.deadline) == (NEED + 1, None, None)
    assert back.frames() == [numbered(100, i) for i in range(NEED + 1)] and back.stub.calls == []
    back.now += STALL_S + DRAIN_S
    back.rx.expire(back.now)
    assert loop(back, numbered(60, 1)) == BLOCKED
    assert (back.rx.blocked_at, back.rx.deadline) == (back.now, back.now + DRAIN_S)
    assert back.rx.statistics.drops == {} and not back.rx.stalled and back.stub.calls == ["deadline"]
    back.now += DRAIN_S - 0.1
    back.post(NEED)
    assert back.stub.calls == ["deadline", "room"]
    assert loop(back) in (IDLE, MORE) and back.frames() == [numbered(60, 1)]
    assert back.rx.blocked_at is None and back.rx.statistics.drops == {}


def test_a_frame_that_is_left_starts_the_clock(back: RxBack) -> None:
    """Goal: out of room in the middle of a batch, the next poll finds a frame waiting: it is since then that the guest is
    late, and pages that come are noticed.  Method: as above with one frame more."""
    back.post(2 * NEED)
    back.rx.batch.limit = 32
    for i in range(NEED + 2):
        back.lane.push(numbered(100, i))
    assert back.rx.poll(back.lane) == MORE and back.rx.blocked_at is None
    back.now += 1
    assert back.rx.poll(back.lane) == BLOCKED and back.rx.blocked_at == back.now
    back.settle()
    assert len(back.frames()) == NEED + 1 and len(back.lane.waiting) == 1
    back.post(1)
    assert back.stub.calls == ["deadline", "room"]
    loop(back)
    assert back.frames() == [numbered(100, NEED + 1)]


def test_pages_that_come_between_the_two_polls(back: RxBack) -> None:
    """Goal: then nobody is late.  Method: the guest posts, without an event, after the poll that ran out of room."""
    back.post(NEED)
    back.rx.batch.limit = 32
    back.lane.push(numbered(60, 1))
    back.lane.push(numbered(60, 2))
    assert back.rx.poll(back.lane) == MORE
    back.post(1, tell=False)
    loop(back)
    assert back.frames() == [numbered(60, 1), numbered(60, 2)]
    assert back.rx.blocked_at is None and back.stub.calls == []


@pytest.mark.parametrize("good", [0, 1, NEED])
def test_bad_pages_are_answered_though_the_frame_is_dropped(back: RxBack, good: int) -> None:
    """Goal: a frame that its hash brings here finds too few good pages; the guest is told of the bad ones and posts others.
    Method: pages that were never granted behind good ones, seen before their event is; a poll that found no room."""
    back.stub.hashing, back.stub.target = 1, (0, (0, 1))
    back.post(good)
    assert loop(back, numbered(60, 1)) == BLOCKED
    bad = NEED + 2
    back.post(bad, NEVER_GRANTED, tell=False)
    frame = bytearray(numbered(100))
    back.rx.deliver(memoryview(frame), PLAIN, (0, 1))
    back.settle()
    answered = back.theirs.rsp_prod_pvt
    assert back.rx.statistics.drops == {"no pages posted on the queue of its hash": 1}
    assert back.rx.statistics.bad_pages and answered >= good
    assert (back.ring.responses(), back.told) == (answered, 1)
    assert back.frames() == [] and len(back.statuses) == answered
    back.guest.events.send(back.port)  # that of the bad pages, which was still on its way
    back.settle()
    back.post(3 * NEED)
    assert back.stub.calls[-1] == "room"
    loop(back, numbered(60, 2))
    assert back.frames() == [numbered(60, 1), numbered(60, 2)]
    assert back.rx.statistics.bad_pages == bad


def test_a_guest_that_never_tells_is_never_stalled() -> None:
    """Goal: without feature-rx-notify the carrier stays: no frame would come, nothing would look at the ring again, and the
    guest says nothing when it posts pages.  Method: two frames a stall apart are lost, then pages, untold; one arrives."""
    back = RxBack(notify=False)
    assert loop(back, numbered(100)) == IDLE
    back.now += STALL_S + 1
    assert loop(back, numbered(100)) == IDLE
    assert not back.rx.stalled and back.rx.deadline is None
    back.post(2 * NEED, tell=False)
    loop(back, numbered(100, 1))
    assert back.rx.statistics.packets == 1
    back.close()
