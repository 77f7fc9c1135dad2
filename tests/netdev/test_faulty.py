"""Goal: each wrapper does its one fault to the frames it is told to, and nothing to anything else.
Method: numbered frames through a wrapped end of a cable; what arrives at the other end is compared with a table."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netdev.cable import COMPLETE, Cable
from netdev.faulty import Delaying, Dropping, Duplicating, Refusing, Reordering
from netdev.link import FramePort


def frame(number: int) -> bytes:
    return bytes(12) + b"\x88\xb5" + bytes([number])


def write(port: FramePort, number: int, lane: int = 0) -> bool:
    return port.lanes[lane].write([COMPLETE, frame(number)])


def numbers(cable: Cable) -> list[int]:
    """The frames that arrived, by number, and each must be whole."""
    got = cable.b.receive()
    assert all(whole == frame(whole[-1]) and vnet == COMPLETE for vnet, whole in got)
    return [whole[-1] for _, whole in got]


def third(n: int) -> bool:
    return n % 3 == 2


def nothing(n: int) -> bool:
    return False


@pytest.mark.parametrize(
    ("wrap", "arrived", "answers"),
    [
        (Dropping, [0, 1, 3, 4, 6], [True] * 7),
        (Refusing, [0, 1, 3, 4, 6], [True, True, False, True, True, False, True]),
        (Duplicating, [0, 1, 2, 2, 3, 4, 5, 5, 6], [True] * 7),
    ],
)
def test_every_third(
    wrap: Callable[[FramePort, Callable[[int], bool]], Dropping], arrived: list[int], answers: list[bool]
) -> None:
    """Goal: exactly the frames that were named.  Method: every third of seven, then a wrapper that names none."""
    cable = Cable()
    faulty, harmless = wrap(cable.a, third), wrap(cable.a, nothing)
    assert [write(faulty, number) for number in range(7)] == answers
    assert numbers(cable) == arrived and (faulty.seen, faulty.count) == (7, 2)
    assert all(write(harmless, number) for number in range(7))
    assert numbers(cable) == list(range(7)) and harmless.count == 0


def test_frames_are_counted_over_all_lanes() -> None:
    """Goal: n counts what was written to the port.  Method: two lanes in turn."""
    cable = Cable(lanes_a=2)
    asked: list[int] = []
    faulty = Dropping(cable.a, lambda n: asked.append(n) or False)  # type: ignore[func-returns-value]
    for number in range(4):
        assert write(faulty, number, number % 2)
    assert asked == [0, 1, 2, 3] and len(faulty.lanes) == 2


def test_what_the_inner_port_refuses_stays_refused() -> None:
    """Goal: a wrapper does not hide a refusal it did not make.  Method: frames that are too short."""
    cable = Cable()
    for wrapper in (Dropping(cable.a, nothing), Refusing(cable.a, nothing), Duplicating(cable.a, lambda n: True)):
        assert wrapper.lanes[0].write([COMPLETE, bytes(13)]) is False
    delaying = Delaying(cable.a)
    assert delaying.lanes[0].write([COMPLETE, bytes(13)]), "nobody knows yet"
    assert delaying.release() and delaying.refused == 1 and numbers(cable) == []


def test_delaying() -> None:
    """Goal: nothing arrives before it is released, then what was chosen.  Method: by choice, the oldest, all the rest."""
    cable = Cable()
    delaying = Delaying(cable.a)
    assert delaying.release() is False
    for number in range(6):
        assert write(delaying, number)
    assert numbers(cable) == []
    assert delaying.release(lambda n: n - 1) and delaying.release() and delaying.release(lambda n: n // 2)
    assert numbers(cable) == [5, 0, 3]
    delaying.flush()
    assert numbers(cable) == [1, 2, 4] and delaying.release() is False and delaying.refused == 0


def test_what_is_held_is_a_copy() -> None:
    """Goal: the guest may use its page again.  Method: overwrite the buffer while the frame is held; also after a
    duplicate's first copy set off such a rewriting."""
    cable = Cable()
    delaying = Delaying(cable.a)
    page = bytearray(frame(1))
    assert delaying.lanes[0].write([COMPLETE, memoryview(page)])
    page[:] = frame(2)
    delaying.flush()
    assert numbers(cable) == [1]

    def rewrite() -> None:
        page[:] = frame(3)

    cable.b.on_readable = rewrite
    assert Duplicating(cable.a, lambda n: True).lanes[0].write([COMPLETE, memoryview(page)])
    assert numbers(cable) == [2, 2]


def test_what_is_held_is_bounded() -> None:
    """Goal: a frontend cannot fill our memory.  Method: room for 3; the fourth is refused until one is let go."""
    cable = Cable()
    delaying = Delaying(cable.a, most=3)
    assert [write(delaying, number) for number in range(4)] == [True, True, True, False]
    assert delaying.release() and write(delaying, 4)
    delaying.flush()
    assert numbers(cable) == [0, 1, 2, 4]


def test_close_loses_what_is_held() -> None:
    """Goal: nothing is written to a port that was closed.  Method: close through the wrapper, then try to release."""
    cable = Cable()
    delaying = Delaying(cable.a)
    assert write(delaying, 0)
    delaying.close()
    assert delaying.release() is False and cable.a.closed and delaying.refused == 0
    delaying.close()


@pytest.mark.parametrize(
    ("depth", "pick", "arrived"),
    [
        (0, lambda n: 0, [0, 1, 2, 3, 4]),
        (2, lambda n: 0, [0, 1, 2, 3, 4]),
        (1, lambda n: n - 1, [1, 2, 3, 4, 0]),
        (2, lambda n: 1, [1, 2, 3, 0, 4]),
    ],
)
def test_reordering(depth: int, pick: Callable[[int], int], arrived: list[int]) -> None:
    """Goal: the order is the picker's.  Method: five frames past a few that are kept, then the rest."""
    cable = Cable()
    reordering = Reordering(cable.a, depth, pick)
    assert all(write(reordering, number) for number in range(5))
    assert len(reordering.held) == depth
    reordering.flush()
    assert numbers(cable) == arrived


@given(st.integers(0, 9), st.integers(0, 60), st.data())
def test_reordering_loses_nothing(depth: int, count: int, data: st.DataObject) -> None:
    """Goal: every frame once, and none overtakes more than it may.  Method: any picks; a frame that goes was among the
    oldest depth + 1 that had not gone, so none is earlier than by `depth`."""
    cable = Cable()
    reordering = Reordering(cable.a, depth, lambda n: data.draw(st.integers(0, n - 1)))
    assert all(write(reordering, number) for number in range(count))
    reordering.flush()
    got = numbers(cable)
    assert sorted(got) == list(range(count))
    assert all(number - place <= depth for place, number in enumerate(got))


def test_the_rest_passes_through_a_stack() -> None:
    """Goal: reads, settings and carrier are the inner port's, through any number of wrappers.  Method: one of each."""
    cable = Cable(lanes_a=2)
    stack = Dropping(Refusing(Duplicating(Reordering(Delaying(cable.a), 1, lambda n: 0), nothing), nothing), nothing)
    stack.offload(True, True, False)
    assert (cable.a.csum, cable.a.tso4, cable.a.tso6) == (True, True, False)
    stack.carrier(False)
    assert not cable.a.up
    stack.carrier(True)
    assert cable.b.send(frame(9))
    lane = 0 if cable.a.waiting[0] else 1
    memory = memoryview(bytearray(40))
    assert stack.lanes[1 - lane].read([memory]) == 0
    assert stack.lanes[lane].read([memory]) == 25 and bytes(memory[10:25]) == frame(9)
    stack.close()
    assert cable.a.closed
