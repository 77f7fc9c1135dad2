"""Goal: the arena takes no more mappings of ours than it may, undoes what it could not finish, and whatever is called in
whatever order, each frame is in one place, each call is made once, and at the end nothing is left.
Method: small limits; real ones in processes of their own; random calls against a model and /proc/self/maps."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.xenfs.arenabench import Bench, stamp
from xenfs.arena import Run
from xenmodel.memory import Frame, OutOfMemory
from xenmodel.types import PAGE_SIZE, Pfn

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench() -> Iterator[Bench]:
    it = Bench()
    yield it
    it.close()


# --- pieces --------------------------------------------------------------------------------------------------------------


def test_limits_of_pieces(bench: Bench):
    """Goal: a guest may have a quarter of all pieces, domain 0 what is left; then OutOfMemory, and nothing has happened;
    what leaves makes room again.  Method: a limit of 16; strays are a piece each, neighbours one together."""
    bench.arena._most_pieces = 16
    strays = bench.frames(*range(0, 50, 2))
    for domid in (1, 2):
        bench.shown(strays[4 * domid : 4 * domid + 4], domid)
        run = bench.arena.reserve(1, domid, domid)
        with pytest.raises(OutOfMemory, match="max_map_count"):
            bench.arena.show(strays[:1], run, 0)
        assert bench.at_home(strays[:1]) and run.left == 1
        bench.arena.give_up(run, 1)
    run = bench.arena.reserve(9, 0, 0)
    with pytest.raises(OutOfMemory):
        bench.arena.show([*strays[12:20], strays[0]], run, 0)
    assert bench.arena.show(strays[12:20], run, 0) and bench.mappings() == 16
    bench.arena.give_up(run, 1)
    third = bench.arena.reserve(20, 3, 3)
    neighbours = bench.frames(*range(20, 40), memory=1)
    with pytest.raises(OutOfMemory):
        bench.arena.show(neighbours, third, 0)
    bench.leave(strays[5:6])
    assert bench.arena.show(neighbours, third, 0), "20 frames, but one piece"
    bench.leave([*strays[4:5], *strays[6:20], *neighbours])
    bench.nothing_left()


def cut(bench: Bench, pfns: range, domid: int = 1) -> tuple[Run, list[Frame], list[Frame]]:
    """Neighbours of which every second one has another user: the run; those, and those that only the first user had."""
    frames = bench.frames(*pfns)
    run = bench.shown(frames, domid)
    for i in range(0, len(frames), 2):
        bench.arena.join([frames[i]], run.offset + i * PAGE_SIZE, domid)
    bench.leave(frames, "first")
    return run, frames[::2], frames[1::2]


def test_a_mapping_is_not_cut_to_pieces(bench: Bench):
    """Goal: processes that keep every second frame of many cannot make us take more mappings than they may: frames between
    them wait, and go home once they are no longer between, whoever of the two goes first.
    Method: a quarter of 16 is 4; 31 frames, 16 of them kept; they leave from the left, from the right, and inside."""
    bench.arena._most_pieces = 16
    run, held, between = cut(bench, range(10, 41))
    assert bench.mappings() == bench.arena._pieces[1] == 4
    gone = [frame for frame in between if bench.left[("first", frame)]]
    assert len(gone) == 3 and all(bench.left[("first", frame)] for frame in held)
    for frame in bench.frames(*[frame.pfn for frame in between]):
        frame.memory.run(Pfn(frame.pfn))[:] = stamp(frame.pfn + 100)
    for i in (0, 15, 7, 1, 14, *range(2, 7), *range(8, 14)):
        bench.leave([held[i]])
        assert bench.mappings() == bench.arena._pieces[1] <= 4
    assert bench.left == {**{("first", frame): 1 for frame in [*held, *between]}, **dict.fromkeys(held, 1)}
    for frame in between:
        assert frame.memory.run(Pfn(frame.pfn)) == stamp(frame.pfn + 100)
    assert run.left == 0
    bench.nothing_left()


def test_kept_frames_go_when_there_is_room(bench: Bench):
    """Goal: what only waits for room goes home at the next step() after there is some, as many as fit; others' limits are
    their own.  Method: strays of the same domain leave meanwhile; and of another one."""
    bench.arena._most_pieces = 16
    strays, foreign = bench.frames(1, 3, memory=1), bench.frames(5, 7, memory=1)
    bench.shown(strays)
    bench.shown(foreign, 2)
    _, held, between = cut(bench, range(10, 21))
    assert [bench.left[("first", frame)] for frame in between].count(1) == 1
    bench.leave(foreign)
    bench.arena.step()
    assert [bench.left[("first", frame)] for frame in between].count(1) == 1
    bench.leave(strays)
    assert [bench.left[("first", frame)] for frame in between].count(1) == 1
    bench.arena.step()
    assert [bench.left[("first", frame)] for frame in between].count(1) == 3
    assert bench.mappings() == 4
    bench.leave(held)
    assert set(bench.left.values()) == {1}
    bench.nothing_left()


@pytest.mark.parametrize("stepped", [False, True])
def test_kept_and_joined(bench: Bench, stepped: bool):
    """Goal: a frame that was kept can be joined, and then it is its new user's alone, and is kept for nobody when it leaves.
    Method: join, room, leave; step() looks in between, or does not."""
    bench.arena._most_pieces = 16
    run, held, between = cut(bench, range(10, 21))
    kept = next(frame for frame in between if not bench.left[("first", frame)])
    where = run.offset + (kept.pfn - 10) * PAGE_SIZE
    bench.arena.join([kept], where, 1)
    assert bench.left[("first", kept)] == 1
    bench.leave(held)
    if stepped:
        bench.arena.step()
    assert bench.arena.where(kept) == where and bench.mappings() == 1
    bench.leave([kept], "second")
    assert set(bench.left.values()) == {1}
    bench.nothing_left()


# --- the host's limits ---------------------------------------------------------------------------------------------------

CHILD = """
import ctypes, logging, mmap, os, resource, sys
from tests.xenfs.arenabench import Bench, stamp
from xenmodel.memory import OutOfMemory
from xenmodel.types import PAGE_SIZE
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
bench = Bench(4096, 1)
"""


def child(rest: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD + rest], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_an_error_in_the_middle_of_show():
    """Goal: if the third piece cannot be mapped the first two come home, the run has as many pages left as before, and
    nothing is called.  Method: RLIMIT_AS with room for a few pages; a run of which a part is shown already."""
    assert child("""
frames = bench.frames(1, 2, 10, 20, 21, *range(1000, 3000))
run = bench.arena.reserve(len(frames), 1, 1)
assert bench.arena.show(frames[:2], run, 0)
for line in open("/proc/self/status"):
    if line.startswith("VmSize"):
        resource.setrlimit(resource.RLIMIT_AS, (int(line.split()[1]) * 1024 + (2 << 20), resource.RLIM_INFINITY))
for _ in range(3):
    try:
        bench.arena.show(frames[2:], run, 2)
    except OutOfMemory as error:
        print(error)
assert bench.at_home(frames[2:]) and run.left == len(frames) and bench.pages <= 5 and bench.arena._pieces[1] == 1
assert all(frame.memory.view[frame.pfn * PAGE_SIZE:][:4] == stamp(frame.pfn)[:4] for frame in frames)
assert bench.arena.show(frames[2:5], run, 2)
bench.arena.give_up(run, 2000)
bench.leave(frames[:5])
assert bench.left == dict.fromkeys(frames[:5], 1)
bench.nothing_left()
""") == ["a guest frame cannot be mapped: Cannot allocate memory"] * 3


def test_a_frame_that_cannot_go_home():
    """Goal: it stays where it does no harm, that is said once, others go, and it follows as soon as the host can.
    Method: vm.max_map_count reached by other mappings, so that nothing can be cut; then those are given back."""
    assert child("""
frames = bench.frames(*range(100, 110), 500)
run = bench.shown(frames, 0)
most = int(open("/proc/sys/vm/max_map_count").read())
libc = ctypes.CDLL(None)
filler = mmap.mmap(-1, (most + 100) * PAGE_SIZE)
base, at = ctypes.addressof(ctypes.c_char.from_buffer(filler)), 1
while libc.mprotect(ctypes.c_void_p(base + at * PAGE_SIZE), PAGE_SIZE, 1) == 0:
    at += 2
bench.leave(frames[5:6])
bench.leave(frames[7:8])
bench.arena.step()
assert not bench.left and bench.arena.where(frames[5]) is not None
bench.leave(frames[10:])
assert bench.left == {frames[10]: 1}
libc.mprotect(ctypes.c_void_p(base), len(filler), 1)
bench.arena.step()
assert bench.left == dict.fromkeys([frames[5], frames[7], frames[10]], 1)
bench.leave([*frames[:5], frames[6], *frames[8:10]])
bench.nothing_left()
assert set(bench.left.values()) == {1}
""") == ["ERROR a guest frame cannot be mapped: Cannot allocate memory"]


@pytest.mark.host
def test_without_the_right_to_protect():
    """Goal: who may not set the flag works all the same, and that is said.  Method: user 65534; show, touch, leave."""
    said = child("""
bench.close()
logging.getLogger().setLevel(logging.INFO)
os.setresuid(65534, 65534, 65534)
bench = Bench(64, 1)
frames = bench.frames(3, 4)
bench.shown(frames)
bench.touch(0)
bench.arena.tidy()
assert bench.pages == 3
bench.leave(frames)
bench.nothing_left()
""")
    assert said == ["INFO the shared pages of dev/xen cannot be protected against MADV_REMOVE: Operation not permitted"]


# --- against a model -----------------------------------------------------------------------------------------------------

DOMAINS, PAGES = (0, 1, 2), 10


class User(NamedTuple):
    """One process' look at frames."""

    run: Run
    index: int
    frames: list[Frame]


class Model:
    """Processes that show and join at random; a worker that writes here and there."""

    def __init__(self, most: int) -> None:
        self.bench = Bench(PAGES)
        self.bench.arena._most_pieces = most
        self.users: list[User] = []
        self.expected: Counter[object] = Counter()
        self.serial = 0
        self.content = {frame: stamp(0) for m in self.bench.memories for frame in (Frame(m, pfn) for pfn in range(PAGES))}

    def show(self, pfn: int, step: int, count: int, domid: int) -> None:
        """In one go, or in two; what the arena refuses is given up, as gntdev does."""
        memory, arena = self.bench.memories[pfn & 1], self.bench.arena
        frames = [Frame(memory, (pfn + i * step) % PAGES) for i in range(count)]
        run, done = arena.reserve(count, domid, domid), 0
        try:
            for part in (frames[: count // 2], frames[count // 2 :]):
                if not arena.show(part, run, done):
                    break
                done += len(part)
        except (OSError, OutOfMemory):
            pass
        arena.give_up(run, count - done)
        if done:
            self.users.append(User(run, 0, frames[:done]))

    def join(self, number: int, start: int, count: int) -> None:
        if self.users:
            run, index, frames = self.users[number % len(self.users)]
            start %= len(frames)
            part = frames[start : start + count]
            self.bench.arena.join(part, (run.first + index + start) * PAGE_SIZE, run.domid)
            self.users.append(User(run, index + start, part))

    def leave(self, number: int) -> None:
        if self.users:
            _, _, frames = self.users.pop(number % len(self.users))
            self.serial += 1
            self.expected.update((self.serial, frame) for frame in frames)
            self.bench.leave(frames, self.serial)

    def fill(self, pfn: int, count: int) -> None:
        """The worker is done with what it wrote, and begins elsewhere."""
        memory = self.bench.memories[pfn & 1]
        self.bench.filled = {Frame(memory, (pfn + i) % PAGES) for i in range(count - 1)}

    def write(self, pfn: int) -> None:
        self.serial += 1
        frame = Frame(self.bench.memories[pfn & 1], pfn)
        frame.memory.run(Pfn(pfn))[:] = self.content[frame] = stamp(self.serial)

    def check(self) -> None:
        bench, seen = self.bench, Counter[Frame]()
        for run, index, frames in self.users:
            assert bench.seen((run.first + index) * PAGE_SIZE, len(frames)) == b"".join(self.content[f] for f in frames)
            seen.update(frames)
        for frame, content in self.content.items():
            slot = bench.arena._slots.get(frame)
            assert frame.memory.run(Pfn(frame.pfn)) == content
            assert seen[frame] == (slot.users if slot is not None else 0)
            assert frame.memory.is_away(frame.pfn) == (slot is not None)
        assert not bench.left - self.expected, "called twice, or too early"
        waiting = {frame for _, frame in self.expected - bench.left}  # type: ignore[misc]
        assert all(frame in bench.arena._slots and not seen[frame] for frame in waiting)
        assert bench.mappings() == sum(bench.arena._pieces.values()) <= bench.arena._most_pieces

    def end(self) -> None:
        while self.users:
            self.leave(0)
        self.bench.filled = set()
        self.bench.arena.step()
        self.bench.arena.tidy()
        assert self.bench.left == self.expected
        self.bench.nothing_left()


small = st.integers(0, 9)
CALLS = st.one_of(
    st.tuples(st.just("show"), small, st.sampled_from([1, 1, 1, 3, 9]), st.integers(1, 8), st.sampled_from(DOMAINS)),
    st.tuples(st.just("join"), small, small, st.integers(1, 6)),
    st.tuples(st.just("leave"), small),
    st.tuples(st.just("fill"), small, st.integers(1, 4)),
    st.tuples(st.just("write"), small),
    st.tuples(st.just("step")),
)


@settings(max_examples=200, derandomize=True)
@given(st.sampled_from([8, 12, 40]), st.lists(CALLS, max_size=30))
def test_random_calls(most: int, calls: list[tuple[str, int]]):
    """Goal: no sequence of calls shows wrong bytes, counts wrong, calls twice or leaves something.
    Method: after each call all of it is compared: users, content, what was called, mappings in /proc/self/maps."""
    model = Model(most)
    try:
        for name, *numbers in calls:
            (partial(model.bench.arena.step) if name == "step" else getattr(model, name))(*numbers)
            model.check()
        model.end()
    finally:
        model.bench.close()
