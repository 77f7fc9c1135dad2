"""Goal: a granted frame is in the file that processes map exactly while somebody may look at it, once, where nobody guesses.
Method: real memory; the file as another mapping of it shows it; what the host holds (st_blocks, /proc/self/maps) before and
after; a worker that writes for as long as the test says."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from tests.xenfs.arenabench import Bench, error_of, stamp
from xenfs.arena import LOOKS_MOST
from xenmodel.memory import GuestMemory
from xenmodel.types import PAGE_SIZE, Pfn


@pytest.fixture
def bench() -> Iterator[Bench]:
    it = Bench()
    yield it
    it.close()


# --- show, join, leave ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pfns", [[5], [5, 6, 7], [7, 6, 5], [9, 2, 3, 40, 41, 42, 1]])
def test_shown_in_that_order(bench: Bench, pfns: list[int]):
    """Goal: page i of the run is the i-th frame, coherent both ways, and all is as before when it was left.
    Method: neighbours and strays; another mapping of the file; leave them in another order."""
    frames = bench.frames(*pfns)
    run = bench.shown(frames)
    assert bench.seen(run.offset, len(pfns)) == b"".join(map(stamp, pfns))
    assert [bench.arena.where(frame) for frame in frames] == [run.offset + i * PAGE_SIZE for i in range(len(pfns))]
    assert bench.pages == len(pfns) and bench.mappings() == bench.arena._pieces[1]
    for frame in frames:
        frame.memory.run(Pfn(frame.pfn))[:] = stamp(frame.pfn + 500)
    assert bench.seen(run.offset, len(pfns)) == b"".join(stamp(pfn + 500) for pfn in pfns)
    bench.leave(sorted(frames, key=lambda frame: frame.pfn % 3))
    assert bench.at_home(frames) and bench.left == dict.fromkeys(frames, 1)
    assert bench.memories[0].run(Pfn(pfns[0])) == stamp(pfns[0] + 500)
    bench.nothing_left()


def test_frames_of_two_domains_in_one_run(bench: Bench):
    """Goal: one MAP of grants of several domains works.  Method: alternately; pfns that would be neighbours in one."""
    frames = [frame for pfn in (3, 4) for memory in (0, 1) for frame in bench.frames(pfn, memory=memory)]
    run = bench.shown(frames)
    assert bench.seen(run.offset, 4) == stamp(3) + stamp(1003) + stamp(4) + stamp(1004)
    bench.leave(frames)
    assert bench.at_home(frames)
    bench.nothing_left()


def test_users_are_counted(bench: Bench):
    """Goal: a frame goes home with its last user, and the others' calls come at once.  Method: three users of a part."""
    frames = bench.frames(10, 11, 12, 13)
    run = bench.shown(frames)
    bench.arena.join(frames[1:3], run.offset + PAGE_SIZE, 1)
    bench.arena.join(frames[1:2], run.offset + PAGE_SIZE, 1)
    bench.leave(frames, "first")
    assert bench.left == {("first", frame): 1 for frame in frames}
    assert bench.at_home([frames[0], frames[3]]) and run.left == 2
    assert bench.seen(run.offset, 4) == bytes(PAGE_SIZE) + stamp(11) + stamp(12) + bytes(PAGE_SIZE)
    bench.leave(frames[1:3], "second")
    assert bench.arena.where(frames[2]) is None and bench.arena.where(frames[1]) == run.offset + PAGE_SIZE
    bench.leave(frames[1:2], "third")
    assert bench.left.total() == 7 and set(bench.left.values()) == {1}
    bench.arena.tidy()  # after a look at holes
    bench.nothing_left()
    with pytest.raises(KeyError):
        bench.leave(frames[:1])


def test_what_is_busy(bench: Bench):
    """Goal: a page is in one place: another order, another domain's processes, a frame twice, a part elsewhere are EBUSY,
    and then nothing has happened.  Method: each of them by show() and join(); users, pieces and places as before."""
    frames, other = bench.frames(1, 2, 3), bench.frames(2, memory=1)
    run = bench.shown(frames)
    second = bench.shown(other)
    at, spare = run.offset, bench.arena.reserve(4, 1, 1)
    before = (dict(bench.arena._pieces), bench.pages, bench.mappings(), run.left)
    new = bench.frames(20, 21)
    join, show = bench.arena.join, bench.arena.show
    refused = {
        "other order": lambda: join(frames[::-1], at, 1),
        "one page on": lambda: join(frames, at + PAGE_SIZE, 1),
        "other domain": lambda: join(frames, at, 2),
        "domain 0": lambda: join(frames, at, 0),
        "one twice": lambda: join([frames[0], frames[0]], at, 1),
        "one more": lambda: join([*frames, new[0]], at, 1),
        "another's frame": lambda: join([*frames[:2], *other], at, 1),
        "elsewhere": lambda: join(frames, second.offset, 1),
        "shown again": lambda: show(frames, spare, 0),
        "one of them": lambda: show([new[0], frames[2], new[1]], spare, 0),
        "twice in one call": lambda: show([new[0], new[1], new[0]], spare, 0),
    }
    assert {name: error_of(call) for name, call in refused.items()} == dict.fromkeys(refused, errno.EBUSY)
    assert (dict(bench.arena._pieces), bench.pages, bench.mappings(), run.left) == before
    assert bench.at_home(new)
    bench.arena.give_up(spare, 4)
    bench.leave([*frames, *other])
    bench.nothing_left()


def test_a_run_that_is_shown_in_parts(bench: Bench):
    """Goal: a long MAP is shown slice by slice; if it fails the rest is given up, and what was shown leaves: then the run is
    gone, in whatever order.  Method: `left` after each; pieces that grow together count once."""
    frames = bench.frames(*range(10, 20))
    for given_up_first in True, False:
        run = bench.arena.reserve(10, 3, 3)
        assert bench.arena.show(frames[:3], run, 0) and bench.arena.show(frames[3:6], run, 3)
        assert bench.arena._pieces[3] == bench.mappings() == 1
        if given_up_first:
            bench.arena.give_up(run, 4)
            assert run.left == 6
        bench.leave(frames[:6])
        if not given_up_first:
            assert run.left == 4 and bench.arena.places.runs == [run]
            bench.arena.give_up(run, 4)
        bench.nothing_left()


def test_a_domain_that_ended(bench: Bench):
    """Goal: a frame of a dead domain stays visible for who shows it, and leaves like any.  Method: close its memory."""
    frames = bench.frames(4, 5, 30)
    view = frames[0].memory.run(Pfn(4), 2)
    run = bench.shown(frames)
    frames[0].memory.close()
    assert bench.seen(run.offset, 3) == stamp(4) + stamp(5) + stamp(30)
    view[:4] = b"dead"
    assert bench.seen(run.offset)[:4] == b"dead"
    bench.filled = {frames[1]}
    bench.leave(frames)
    assert bench.left == {frames[2]: 1}
    bench.filled = set()
    bench.arena.step()
    assert bench.left == dict.fromkeys(frames, 1) and view[:8] == b"dead" + stamp(4)[:4]
    bench.nothing_left()


# --- disk workers --------------------------------------------------------------------------------------------------------


def test_a_worker_holds_back_show(bench: Bench):
    """Goal: a frame is not moved while a worker writes to it.  Method: the last of scattered frames; then it is done."""
    frames = bench.frames(8, 3, 4, 5)
    bench.filled = {frames[3]}
    run = bench.arena.reserve(4, 1, 1)
    assert not bench.arena.show(frames, run, 0)
    assert bench.at_home(frames) and run.left == 4 and bench.pages == 0 and not +bench.arena._pieces
    bench.filled = set(bench.frames(6, 2))  # its neighbours
    assert bench.arena.show(frames, run, 0)
    bench.leave(frames)
    bench.nothing_left()


def test_a_worker_holds_back_leave(bench: Bench):
    """Goal: who leaves does not wait for others' workers; a held frame goes home when step() finds its worker done, and is
    called for then, once.  Method: one of three strays, step() before and after."""
    frames = bench.frames(8, 20, 30)
    run = bench.shown(frames)
    bench.filled = {frames[1]}
    bench.leave(frames)
    assert bench.left == {frames[0]: 1, frames[2]: 1} and run.left == 1
    bench.arena.step()
    assert bench.left.total() == 2 and bench.seen(run.offset + PAGE_SIZE) == stamp(20)
    bench.filled = set()
    assert bench.left.total() == 2, "only step() looks"
    bench.arena.step()
    bench.arena.step()
    assert bench.left == dict.fromkeys(frames, 1)
    bench.nothing_left()


def test_shown_again_before_it_went_home(bench: Bench):
    """Goal: a frame that waits for a worker can be joined: who left is called, it stays; and it leaves once more.
    Method: leave, join, leave while a worker writes, with the order of calls."""
    frames = bench.frames(8, 9)
    run = bench.shown(frames)
    bench.filled = set(frames)
    bench.leave(frames, "first")
    assert not bench.left
    bench.arena.join(frames, run.offset, 1)
    assert bench.left == {("first", frame): 1 for frame in frames}
    bench.leave(frames[:1], "second")
    bench.arena.join(frames[:1], run.offset, 1)
    assert bench.left[("second", frames[0])] == 1
    bench.filled = set()
    bench.arena.step()
    assert bench.arena.where(frames[0]) == run.offset, "it is in use"
    bench.leave(frames, "third")
    bench.arena.step()
    assert set(bench.left.values()) == {1} and bench.left.total() == 5
    bench.nothing_left()


def test_a_frame_on_its_way_home_can_be_shown_elsewhere(bench: Bench):
    """Goal: nobody looks at a frame that waits for a worker: another order is no EBUSY, but has to wait, too.
    Method: False until step() has brought it home, then True."""
    frames = bench.frames(8, 9)
    bench.shown(frames)
    bench.filled = {frames[0]}
    bench.leave(frames)
    elsewhere = bench.arena.reserve(3, 2, 2)
    mixed = [*bench.frames(20), frames[1], frames[0]]
    assert not bench.arena.show(mixed, elsewhere, 0)
    bench.filled = set()
    assert not bench.arena.show(mixed, elsewhere, 0), "it is still where it was"
    bench.arena.step()
    assert bench.arena.show(mixed, elsewhere, 0) and bench.left == dict.fromkeys(frames, 1)
    assert bench.seen(elsewhere.offset, 3) == stamp(20) + stamp(9) + stamp(8)
    bench.leave(mixed)
    bench.nothing_left()


def test_a_stuck_disk_costs_little(bench: Bench):
    """Goal: frames that wait for a disk that hangs do not slow each step, and those behind them get their turn.
    Method: three times LOOKS_MOST strays held, and one that is not; a step asks who writes where twice at most."""
    bench.memories.append(GuestMemory(8 * LOOKS_MOST))
    stuck = bench.frames(*range(0, 6 * LOOKS_MOST, 2), memory=2)
    free = bench.frames(5)
    bench.shown([*stuck, *free])
    bench.filled = {*stuck, *free}
    bench.leave([*stuck, *free])
    bench.filled.remove(free[0])
    for _ in range(4):
        bench.looked = 0
        bench.arena.step()
        assert bench.looked <= 2
    assert bench.left == {free[0]: 1}
    bench.filled = set()
    bench.arena.step()
    assert bench.left == dict.fromkeys([*stuck, *free], 1)
    bench.nothing_left()


def test_calls_that_come_back(bench: Bench):
    """Goal: what is called when a frame is home may leave others, as ending a grant does.  Method: a chain through three."""
    frames = bench.frames(8, 9, 30)
    run = bench.shown(frames)
    bench.arena.join(frames[2:], run.offset + 2 * PAGE_SIZE, 1)
    done: list[str] = []

    def second() -> None:
        done.append("8")
        bench.arena.leave([(frames[2], lambda: done.append("30"))])

    bench.arena.leave([(frames[2], lambda: done.append("30, not the last")), (frames[0], second)])
    assert done == ["30, not the last", "8", "30"]
    bench.leave(frames[1:2])
    bench.nothing_left()
