"""Goal: places in the arena's file are found by nobody who was not told, used again for the same only, and given back empty.
Method: real memory; the file as another mapping of it shows it; what the host holds (st_blocks); a process that tears."""

from __future__ import annotations

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
from tests.xenfs.arenabench import Bench, stamp
from xenfs import places as module
from xenfs.arena import SIZE, Arena
from xenmodel.memory import Frame, GuestMemory
from xenmodel.types import PAGE_SIZE


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
