"""What the tests of arena.py share: an arena, domains' memories, a disk worker that writes where the test says, and the
other side: what a process that maps the file sees."""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from xenfs.arena import Arena, Run
from xenmodel.memory import Frame, GuestMemory
from xenmodel.types import PAGE_SIZE, Pfn


def stamp(value: int) -> bytes:
    return value.to_bytes(4, "little") * (PAGE_SIZE // 4)


class Bench:
    """`left` counts what leave() was to call, by label; `filled` has the frames that a worker writes to."""

    def __init__(self, pages: int = 64, memories: int = 2) -> None:
        self.filled: set[Frame] = set()
        self.looked = 0
        self.arena = Arena(self.places)
        self.arena.keep = 0
        self.memories = [GuestMemory(pages, f"bench{i}") for i in range(memories)]
        self.left: Counter[object] = Counter()

    def places(self) -> list[tuple[int, int]]:
        """Where somebody writes."""
        self.looked += 1
        return [(at, at + PAGE_SIZE) for at in (frame.memory.address(frame.pfn) for frame in self.filled)]

    def frames(self, *pfns: int, memory: int = 0) -> list[Frame]:
        """Frames with known content: a number of the domain and the frame."""
        found = [Frame(self.memories[memory], pfn) for pfn in pfns]
        for frame in found:
            frame.memory.run(Pfn(frame.pfn))[:] = stamp(1000 * memory + frame.pfn)
        return found

    def shown(self, frames: Sequence[Frame], domid: int = 1) -> Run:
        run = self.arena.reserve(len(frames), domid, domid)
        assert self.arena.show(frames, run, 0)
        return run

    def leave(self, frames: Sequence[Frame], label: object = "") -> None:
        self.arena.leave([(frame, partial(self.left.update, [(label, frame) if label else frame])) for frame in frames])

    def seen(self, offset: int, count: int = 1) -> bytes:
        """What a process sees there."""
        with mmap.mmap(self.arena.fd, count * PAGE_SIZE, offset=offset) as window:
            return window[:]

    def touch(self, offset: int) -> None:
        """What a process can do by chance, or on purpose."""
        with mmap.mmap(self.arena.fd, PAGE_SIZE, offset=offset) as window:
            window[0] = 1

    @property
    def pages(self) -> int:
        """That the host holds for the file."""
        return os.fstat(self.arena.fd).st_blocks * 512 // PAGE_SIZE

    def mappings(self) -> int:
        """Of ours, of that file."""
        inode = str(os.fstat(self.arena.fd).st_ino)
        with open("/proc/self/maps") as maps:
            return sum(line.split()[4] == inode for line in maps if "xenfs-arena" in line)

    def at_home(self, frames: Sequence[Frame]) -> bool:
        return not any(frame.memory.is_away(frame.pfn) or self.arena.where(frame) is not None for frame in frames)

    def nothing_left(self) -> None:
        """No slot, no run in use, no page, no mapping, and nothing that waits."""
        arena = self.arena
        arena.tidy()
        used = [run for run in arena.places.runs if run.left]
        assert (arena._slots, used, self.pages, self.mappings()) == ({}, [], 0, 0)
        assert not +arena._pieces and not any(arena._kept.values())
        arena.step()
        assert not arena._leaving

    def close(self) -> None:
        self.arena.close()
        for memory in self.memories:
            memory.close()


def error_of(call: Callable[[], object]) -> int | None:
    try:
        call()
    except OSError as error:
        return error.errno
    return None
