"""Goal: a granted frame is in the file that processes map exactly while somebody may look at it, once, where nobody guesses.
Method: real memory; the file as another mapping of it shows it; what the host holds (st_blocks, /proc/self/maps) before and
after; a worker that writes for as long as the test says."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.descriptors import open_files
from tests.xenfs.arenabench import Bench, error_of, stamp
from xenfs import places as module
from xenfs.arena import LOOKS_MOST, SIZE, Arena
from xenmodel.memory import Frame, GuestMemory
from xenmodel.types import PAGE_SIZE, Pfn


@pytest.fixture
def bench() -> Iterator[Bench]:
    it = Bench()
    yield it
    it.close()


# --- places --------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 8), st.booleans()), max_size=40))
def test_runs_keep_apart(steps: list[tuple[int, bool]]):
    """Goal: no page is in two runs, and none is next to another's: the search works where the dice fall badly, too.
    Method: a file of 1024 pages only, up to half of it reserved; some runs given up at random."""
    whole, module.SIZE = module.SIZE, 1024 * PAGE_SIZE
    arena, runs = Arena(), []
    try:
        for count, drop in steps:
            if runs and drop:
                run = runs.pop(count % len(runs))
                arena.give_up(run, run.count)
            else:
                runs.append(arena.reserve(count, 1, 1))
                assert runs[-1].end - runs[-1].first >= count == runs[-1].left
            ordered = sorted(runs, key=lambda run: run.first)
            assert [run for run in arena.places.runs if run.left] == ordered
            assert all(run.first >= 0 and run.end <= 1024 for run in runs)
            assert all(one.end < other.first for one, other in pairwise(arena.places.runs))
        for run in runs:
            for _ in range(run.count):
                arena.give_up(run, 1)
        assert not any(run.left for run in arena.places.runs)
    finally:
        module.SIZE = whole
        arena.close()


def test_places_are_spread():
    """Goal: who knows a thousand places knows nothing of the next.  Method: all differ in their upper bits, none twice."""
    arena = Arena()
    offsets = [arena.reserve(2, 1, 1).offset for _ in range(1000)]
    assert len(set(offsets)) == 1000 and all(0 <= one < SIZE and one % PAGE_SIZE == 0 for one in offsets)
    for bit in range(12, 62):
        assert 350 < sum(one >> bit & 1 for one in offsets) < 650, f"bit {bit}"  # 9 sigma
    arena.close()


def test_more_given_up_than_there_is(bench: Bench):
    run = bench.arena.reserve(3, 1, 1)
    bench.arena.give_up(run, 2)
    with pytest.raises(AssertionError, match="pages left"):
        bench.arena.give_up(run, 2)


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


# --- the file ------------------------------------------------------------------------------------------------------------


def test_what_is_touched(bench: Bench):
    """Goal: pages that processes made by touching holes go when no frame is here any more, and harm no run until then.
    Method: st_blocks; touched pages at every edge of runs and far from them."""
    frames = bench.frames(1, 2, 3)
    runs = [bench.shown([frame]) for frame in frames]
    hollow = bench.arena.reserve(4, 1, 1)
    for run in [*runs, hollow]:
        bench.touch(run.offset - PAGE_SIZE)
        bench.touch(run.end * PAGE_SIZE)
    for offset in (0, SIZE - PAGE_SIZE, hollow.offset + PAGE_SIZE, *(PAGE_SIZE * 10**9 * i for i in range(1, 50))):
        bench.touch(offset)
    bench.arena.tidy()
    assert bench.pages == 3 + 8 + 3 + 49
    assert [bench.seen(run.offset) for run in runs] == [stamp(1), stamp(2), stamp(3)]
    bench.leave(frames)
    assert bench.pages == 0
    assert bench.arena.show(frames, hollow, 0) and bench.seen(hollow.offset, 3) == stamp(1) + stamp(2) + stamp(3)
    bench.arena.give_up(hollow, 1)
    bench.leave(frames)
    bench.nothing_left()


def test_nobody_is_shown_anything_while_it_is_emptied():
    """Goal: what is shown is not torn out by the emptying.  Method: an emptying that is done by hand; show() in between."""
    steps: list[Callable[[], None]] = []
    with closing(Arena(later=lambda work, then: steps.extend([work, then]))) as arena, closing(GuestMemory(8)) as memory:
        arena.keep = 0
        frame = Frame(memory, 1)
        assert arena.show([frame], arena.reserve(1, 1, 1), 0)
        arena.leave([(frame, lambda: None)])
        run = arena.reserve(1, 1, 1)
        assert len(steps) == 2 and not arena.show([frame], run, 0)
        steps[0]()
        assert not arena.show([frame], run, 0)
        steps[1]()
        assert arena.show([frame], run, 0) and len(steps) == 2


def test_an_owner_has_its_places_alone(bench: Bench):
    """Goal: what somebody still maps by mistake shows nothing of others: an open's places are its own until it is closed.
    Method: two owners in turn; the first is closed with a run in use."""
    bench.shown(bench.frames(40))
    frames = bench.frames(1, 2)

    def place(owner: str, frame: int = 0) -> int:
        run = bench.arena.reserve(1, 1, 1, owner)
        assert bench.arena.show(frames[frame : frame + 1], run, 0)
        return run.offset

    first = place("a")
    bench.leave(frames[:1])
    second = place("b")
    bench.leave(frames[:1])
    assert place("a") == first and place("b", 1) == second != first
    bench.arena.disown("a")
    bench.leave(frames)
    assert place("c") == first and place("b", 1) == second


def test_places_are_used_again_for_the_same(bench: Bench):
    """Goal: a run's place, which two domains know, is used again for these two and that size, empty, and for nobody else.
    Method: runs one after the other, while another frame keeps the file from being emptied; then very many."""
    bench.shown(bench.frames(40))
    frames = bench.frames(1, 2, 3)

    def place(domid: int, by: int, count: int = 3) -> int:
        run = bench.arena.reserve(count, domid, by)
        assert bench.seen(run.offset, count) == bytes(count * PAGE_SIZE)
        assert bench.arena.show(frames[:count], run, 0)
        bench.leave(frames[:count])
        return run.offset

    wanted = [(1, 1, 3), (2, 1, 3), (1, 2, 3), (2, 2, 3), (1, 1, 1)]
    first = [place(*one) for one in wanted]
    assert len(set(first)) == len(wanted)
    for _ in range(50):
        assert [place(*one) for one in wanted] == first
    assert bench.pages < 20


TEAR = """
import ctypes, mmap, select, sys
libc = ctypes.CDLL(None, use_errno=True)
window = mmap.mmap(int(sys.argv[1]), 3 * 4096, offset=int(sys.argv[2]))
address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(window)))
MADV_REMOVE = 9
tries = torn = 0
print("trying", flush=True)
while tries % 64 or not select.select([0], [], [], 0)[0]:
    tries += 1
    torn += libc.madvise(address, ctypes.c_size_t(3 * 4096), MADV_REMOVE) == 0
print(tries, torn)
"""


@pytest.mark.host
def test_nobody_can_punch(bench: Bench):
    """Goal: MADV_REMOVE over unknown ranges tears nothing out of runs, at no moment.  Method: a process that tries without
    a pause while frames come and go; we are root, so the flag can be set."""
    frames = bench.frames(*range(1, 40))
    run = bench.shown(frames[:1])
    command = [sys.executable, "-c", TEAR, str(bench.arena.fd), str(run.offset - PAGE_SIZE)]
    with subprocess.Popen(command, pass_fds=[bench.arena.fd], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"trying\n"
        for _ in range(300):
            bench.shown(frames[1:])
            bench.leave(frames[1:])
        assert bench.seen(run.offset) == stamp(1)
        process.stdin.close()
        tries, torn = map(int, process.stdout.read().split())
    assert tries > 100 and not torn


def test_a_descriptor_that_is_no_mount(bench: Bench, caplog: pytest.LogCaptureFixture):
    """Goal: where Linux refuses a backing file, that is said, and nothing can be mapped.  Method: a pipe as /dev/fuse."""
    end, other = os.pipe()
    assert not bench.arena.register(end) and bench.arena.backing_id == 0
    assert [record.levelno for record in caplog.records] == [logging.WARNING] and "passthrough is refused" in caplog.text
    os.close(end)
    os.close(other)


def test_close_is_final():
    """Goal: closing twice closes nobody else's file.  Method: the descriptor's number is used again in between."""
    before = open_files()
    arena = Arena()
    number = arena.fd
    arena.close()
    assert open_files() == before
    assert os.open("/dev/null", os.O_RDONLY) == number
    arena.close()
    os.close(number)
