"""Goal: a frame that lives in another file for a while is the same frame to everybody: no view goes stale, no byte is lost.
Method: a second memfd as the other place; views of every kind made before and after; a bytes model; real processes.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.descriptors import open_files
from xenmodel.memory import Frame, GuestMemory, vmap
from xenmodel.types import PAGE_SIZE, Pfn

FRAMES, PLACES = 8, 64


def stamp(value: int) -> bytes:
    return value.to_bytes(4, "little") * (PAGE_SIZE // 4)


class Place:
    """Another file, as one that processes of the host map."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("elsewhere")
        os.ftruncate(self.fd, PLACES * PAGE_SIZE)

    def page(self, number: int) -> bytes:
        return os.pread(self.fd, PAGE_SIZE, number * PAGE_SIZE)

    def put(self, number: int, data: bytes) -> None:
        os.pwrite(self.fd, data, number * PAGE_SIZE)


@pytest.fixture
def place() -> Iterator[Place]:
    it = Place()
    yield it
    with suppress(OSError):
        os.close(it.fd)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    it = GuestMemory(FRAMES, "moves")
    for pfn in range(FRAMES):
        it.run(Pfn(pfn))[:] = stamp(pfn + 1)
    yield it
    it.close()


def mappings(name: str) -> int:
    with open("/proc/self/maps") as maps:
        return sum(name in line for line in maps)


# --- there and back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, FRAMES])
def test_content_goes_along(memory: GuestMemory, place: Place, count: int):
    """Goal: what was written before is there, what is written meanwhile comes home, neighbours are left alone.
    Method: the other file, and the domain's own, read with pread(2)."""
    first = (FRAMES - count) // 2
    memory.move(first, count, place.fd, 5 * PAGE_SIZE)
    assert [pfn for pfn in range(FRAMES) if memory.is_away(pfn)] == list(range(first, first + count))
    for i in range(count):
        assert place.page(5 + i) == stamp(first + i + 1)
        place.put(5 + i, stamp(100 + i))
        assert memory.run(Pfn(first + i)) == stamp(100 + i)
        memory.run(Pfn(first + i))[:] = stamp(200 + i)
        assert place.page(5 + i) == stamp(200 + i)
    assert not any(place.page(4)) and not any(place.page(5 + count))
    memory.bring_home(first, count)
    assert not any(memory.is_away(pfn) for pfn in range(FRAMES))
    for pfn in range(FRAMES):
        expected = stamp(200 + pfn - first) if first <= pfn < first + count else stamp(pfn + 1)
        assert memory.run(Pfn(pfn)) == os.pread(memory.fd, PAGE_SIZE, pfn * PAGE_SIZE) == expected
    place.put(5, stamp(9))
    memory.run(Pfn(first))[:4] = b"here"
    assert place.page(5) == stamp(9) and memory.run(Pfn(first))[:8] == b"here" + stamp(200)[:4]


def test_addresses_stay(memory: GuestMemory, place: Place):
    """Goal: what a worker or the kernel was told (an address) goes on meaning the frame.  Method: /proc/self/mem."""
    at = memory.address(3)
    memory.move(3, 1, place.fd, 0)
    assert memory.address(3) == at
    with open("/proc/self/mem", "r+b", buffering=0) as own:
        assert os.pread(own.fileno(), PAGE_SIZE, at) == stamp(4)
        os.pwrite(own.fileno(), stamp(44), at)
        assert place.page(0) == stamp(44)
        memory.bring_home(3, 1)
        assert os.pread(own.fileno(), PAGE_SIZE, at) == stamp(44)


def views_of(memory: GuestMemory, pfn: int) -> dict[str, memoryview]:
    """A frame by every way that drivers have to look at it."""
    return {
        "run": memory.run(Pfn(pfn)),
        "longer run": memory.run(Pfn(pfn - 1), 3)[PAGE_SIZE : 2 * PAGE_SIZE],
        "slice": memory.view[pfn * PAGE_SIZE :][:PAGE_SIZE],
        "cast": memory.run(Pfn(pfn)).cast("I").cast("B"),
        "read-only": memory.run(Pfn(pfn)).toreadonly(),
        "neighbours": vmap([Frame(memory, pfn), Frame(memory, pfn + 1)])[:PAGE_SIZE],
        "window": vmap([Frame(memory, pfn), Frame(memory, 0)])[:PAGE_SIZE],
        "end of a window": vmap([Frame(memory, 0), Frame(memory, pfn)])[PAGE_SIZE:],
        "twice in a window": vmap([Frame(memory, pfn), Frame(memory, pfn)])[PAGE_SIZE:],
    }


def test_every_view_shows_the_truth(memory: GuestMemory, place: Place):
    """Goal: no view made before, during or after shows old bytes.  Method: write through each in turn, read all others."""
    views, serial = views_of(memory, 4), 1000

    def agree() -> None:
        nonlocal serial
        for name, view in views.items():
            if not view.readonly:
                serial += 1
                view[:] = stamp(serial)
            for other, seen in views.items():
                assert seen == stamp(serial), f"{other} after a write to {name}"

    agree()
    memory.move(4, 1, place.fd, 7 * PAGE_SIZE)
    agree()
    assert place.page(7) == stamp(serial)
    views |= {f"{name}, made away": view for name, view in views_of(memory, 4).items()}
    agree()
    memory.bring_home(4, 1)
    agree()
    views |= {f"{name}, made after": view for name, view in views_of(memory, 4).items()}
    memory.move(3, 3, place.fd, 20 * PAGE_SIZE)
    agree()
    assert place.page(21) == stamp(serial)
    memory.bring_home(3, 3)
    agree()


def test_partly_home(memory: GuestMemory, place: Place):
    """Goal: neighbours that left together can come home apart, and go elsewhere again.  Method: the middle one of three."""
    window = vmap([Frame(memory, pfn) for pfn in (5, 4, 3)])
    memory.move(3, 3, place.fd, 0)
    memory.bring_home(4, 1)
    assert [memory.is_away(pfn) for pfn in (3, 4, 5)] == [True, False, True]
    memory.move(4, 1, place.fd, 9 * PAGE_SIZE)
    for page, value in (0, 30), (9, 40), (2, 50):
        place.put(page, stamp(value))
    assert memory.run(Pfn(3), 3) == stamp(30) + stamp(40) + stamp(50)
    assert window == stamp(50) + stamp(40) + stamp(30)
    for pfn in (5, 3, 4):
        memory.bring_home(pfn, 1)
    place.put(0, stamp(1))
    assert memory.run(Pfn(3), 3) == stamp(30) + stamp(40) + stamp(50)


def test_frames_that_are_away_are_nobodys_to_release(memory: GuestMemory, place: Place):
    """Goal: a frame that a process still sees is not given to the next owner.  Method: release at both edges of three."""
    first = memory.allocate(6)
    memory.move(2, 3, place.fd, 0)
    for pfn, count in (2, 1), (4, 1), (0, 3), (4, 2), (0, 6):
        with pytest.raises(AssertionError, match="away"):
            memory.release(Pfn(pfn), count)
    assert memory.free_pages == FRAMES - 6
    memory.release(Pfn(0), 2)
    memory.release(Pfn(5))
    memory.bring_home(2, 3)
    memory.release(Pfn(2), 3)
    assert memory.free_pages == FRAMES
    again = memory.allocate(6)
    assert again == first and memory.run(again, 6) == bytes(6 * PAGE_SIZE)


def test_it_leaves_nothing_behind(place: Place):
    """Goal: moving all day costs neither mappings nor descriptors, and dead windows are forgotten.  Method: count both."""
    memory, before = GuestMemory(FRAMES, "nothing-left"), open_files()
    memory.view[:] = bytes(FRAMES * PAGE_SIZE)
    for round_ in range(100):
        window = vmap([Frame(memory, 6), Frame(memory, 2)])
        memory.move(1, 3, place.fd, round_ % 8 * PAGE_SIZE)
        window[:] = stamp(round_) * 2
        memory.bring_home(1, 3)
        del window
    assert mappings("memfd:xen-nothing-left") == 1 and mappings("memfd:elsewhere") == 0
    assert open_files() == before
    memory.move(2, 1, place.fd, 0)
    memory.bring_home(2, 1)
    assert 2 not in memory._windows and memory._away == {}
    memory.close()


# --- a domain that ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [False, True])
def test_a_domain_that_ends_while_frames_are_away(place: Place, windows: bool):
    """Goal: who has a view of a dead domain's frame sees the truth before and after it came home, where there is no file
    any more.  Method: close(), then write on each side; the descriptor's number is somebody else's by then."""
    memory = GuestMemory(FRAMES, "ends")
    memory.view[:] = stamp(3) * FRAMES
    kept = [memory.run(Pfn(2)), memory.run(Pfn(4)).toreadonly()]
    if windows:
        kept += [vmap([Frame(memory, 5), Frame(memory, 2)])[PAGE_SIZE:], vmap([Frame(memory, 2), Frame(memory, 0)])]
    memory.move(2, 1, place.fd, 0)
    memory.move(4, 2, place.fd, 10 * PAGE_SIZE)
    number = memory.fd
    memory.close()
    assert os.dup(place.fd) == number, "to be written to by mistake"
    place.put(0, stamp(7))
    place.put(10, stamp(8))
    assert kept[0] == stamp(7) and kept[1] == stamp(8)
    memory.bring_home(2, 1)
    memory.bring_home(4, 2)
    place.put(0, stamp(1))
    assert kept[1] == stamp(8)
    for view in kept:
        if not view.readonly:
            assert view[:PAGE_SIZE] == stamp(7)
            view[:PAGE_SIZE] = stamp(99)
            assert all(other[:PAGE_SIZE] in (stamp(99), stamp(8)) for other in kept), "they are one frame still"
            kept[0][:] = stamp(7)
    assert place.page(0) == stamp(1)
    del view, kept, memory
    gc.collect()
    os.close(number)
    assert mappings("memfd:xen-ends") == 0


def test_a_dead_domains_frame_can_go_away(place: Place):
    """Goal: closing first and moving then is no different.  Method: move() after close(), and home again."""
    memory = GuestMemory(2)
    view = memory.run(Pfn(1))
    window = vmap([Frame(memory, 1), Frame(memory, 0)])
    view[:] = stamp(5)
    memory.close()
    memory.move(1, 1, place.fd, 0)
    assert place.page(0) == stamp(5) == window[:PAGE_SIZE]
    place.put(0, stamp(6))
    memory.bring_home(1, 1)
    assert view == stamp(6) == window[:PAGE_SIZE]
    window[0] = 1
    assert view[0] == 1
    memory.allocate(2)
    memory.release(Pfn(1))
    assert view == bytes(PAGE_SIZE) == window[:PAGE_SIZE]


# --- others --------------------------------------------------------------------------------------------------------------

OTHER = """
import mmap, sys
page = mmap.mmap(int(sys.argv[1]), 4096, offset=int(sys.argv[2]))
for line in sys.stdin:
    if line.startswith("="):
        page[: len(line) - 2] = line[1:-1].encode()
    print(page[:8].decode(), flush=True)
"""


def test_another_process_sees_the_same_bytes(memory: GuestMemory, place: Place):
    """Goal: that is what it is for: one memory, two processes, coherent both ways, through windows, too.
    Method: a process that maps the page of the other file, before the frame comes and after it has gone."""
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(place.fd), str(6 * PAGE_SIZE)], stdin=-1, stdout=-1, text=True, pass_fds=[place.fd]
    )
    assert other.stdin is not None and other.stdout is not None

    def say(line: str) -> str:
        assert other.stdin is not None and other.stdout is not None
        print(line, file=other.stdin, flush=True)
        return other.stdout.readline().rstrip("\n")

    try:
        view, window = memory.run(Pfn(4)), vmap([Frame(memory, 4), Frame(memory, 1)])
        view[:8] = b"at home."
        assert say("?") == "\0" * 8
        memory.move(4, 1, place.fd, 6 * PAGE_SIZE)
        assert say("?") == "at home."
        window[:8] = b"from us."
        assert say("?") == "from us."
        assert say("=from him") == "from him"
        assert view[:8] == window[:8] == b"from him"
        memory.bring_home(4, 1)
        assert say("=too late") == "too late"
        assert view[:8] == window[:8] == b"from him"
    finally:
        other.kill()
        other.communicate()


# --- against a model -----------------------------------------------------------------------------------------------------

pfns, counts, pages = st.integers(0, FRAMES - 1), st.integers(1, 4), st.integers(0, PLACES - 5)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("move"), pfns, counts, pages),
        st.tuples(st.just("home"), pfns, counts, pages),
        st.tuples(st.just("window"), pfns, counts, pages),
        st.tuples(st.just("forget"), pfns, counts, pages),
        st.tuples(st.just("write"), pfns, counts, pages),
        st.tuples(st.just("write there"), pfns, counts, pages),
        st.tuples(st.just("write in a window"), pfns, counts, pages),
    ),
    max_size=40,
)


class Model:
    """Frames as bytes, where each is, and windows as lists of frames."""

    def __init__(self) -> None:
        self.memory, self.place = GuestMemory(FRAMES), Place()
        self.frames = [bytes(PAGE_SIZE)] * FRAMES
        self.where: dict[int, int] = {}
        self.windows: list[tuple[list[int], memoryview]] = []
        self.serial = 0

    def stretch(self, pfn: int, count: int, away: bool) -> range:
        """As many frames from `pfn` on, at most `count`, as are away, or not."""
        end = pfn
        while end < min(pfn + count, FRAMES) and (end in self.where) == away:
            end += 1
        return range(pfn, end)

    def do(self, what: str, pfn: int, count: int, page: int) -> None:
        self.serial += 1
        match what:
            case "move" if run := self.stretch(pfn, count, away=False):
                if not set(range(page, page + len(run))) & set(self.where.values()):
                    self.memory.move(pfn, len(run), self.place.fd, page * PAGE_SIZE)
                    self.where.update(zip(run, range(page, page + len(run)), strict=True))
            case "home" if run := self.stretch(pfn, count, away=True):
                self.memory.bring_home(pfn, len(run))
                for one in run:
                    del self.where[one]
            case "window":
                shown = [(pfn + page * i) % FRAMES for i in range(count)]
                self.windows.append((shown, vmap([Frame(self.memory, one) for one in shown])))
            case "forget" if self.windows:
                del self.windows[page % len(self.windows)]
            case "write":
                self.memory.run(Pfn(pfn))[:] = self.frames[pfn] = stamp(self.serial)
            case "write there" if pfn in self.where:
                self.frames[pfn] = stamp(self.serial)
                self.place.put(self.where[pfn], stamp(self.serial))
            case "write in a window" if self.windows:
                shown, view = self.windows[page % len(self.windows)]
                at = pfn % len(shown)
                view[at * PAGE_SIZE : (at + 1) * PAGE_SIZE] = self.frames[shown[at]] = stamp(self.serial)

    def check(self) -> None:
        assert self.memory.view == b"".join(self.frames)
        for shown, view in self.windows:
            assert view == b"".join(self.frames[pfn] for pfn in shown), f"window of {shown}"
        for pfn in range(FRAMES):
            assert self.memory.is_away(pfn) == (pfn in self.where)
            if pfn in self.where:
                assert self.place.page(self.where[pfn]) == self.frames[pfn]


@settings(max_examples=150, derandomize=True)
@given(STEPS)
def test_random_moves_against_bytes(steps: list[tuple[str, int, int, int]]):
    """Goal: whatever comes and goes, all views of a frame are one frame.  Method: random steps, all compared."""
    model = Model()
    try:
        for step in steps:
            model.do(*step)
            model.check()
    finally:
        os.close(model.place.fd)
        model.memory.close()
