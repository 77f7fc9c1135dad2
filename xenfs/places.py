"""places.py: where in the arena's file runs of pages are: at random, so that nobody finds what he was not told of.

Arena asks. A place is known to two domains: the one that made the run, and the one that it is for. So it is only ever used
again for these two, and while the open that made it (its owner) lives, for that one.

Invariant: no page is in two runs, and none is next to another run's.
"""

from __future__ import annotations

import os
from bisect import bisect
from collections import Counter, defaultdict

from xenmodel.memory import OutOfMemory
from xenmodel.types import PAGE_SIZE

SIZE = 1 << 62  # bytes
GUEST_PAGES = 1 << 17  # of runs that a guest has made, in use or waiting to be


class Run:
    """A stretch of the file, in pages: `count` of `size`. Domain `by` has made it, for `owner`; `domid` may map what is
    there. `left` of them have a frame, or may still get one."""

    __slots__ = ("by", "count", "domid", "first", "left", "owner", "size")

    def __init__(self, first: int, size: int, domid: int, by: int) -> None:
        self.owner: object = None
        self.first, self.size = first, size
        self.domid, self.by = domid, by
        self.count = self.left = 0

    @property
    def end(self) -> int:
        return self.first + self.size

    @property
    def offset(self) -> int:
        return self.first * PAGE_SIZE


class Places:
    """All runs, `unused` ones too: by owner (None: of nobody any more), then makers, domains and sizes."""

    def __init__(self) -> None:
        self.runs: list[Run] = []  # ascending
        self._unused: dict[object, defaultdict[tuple[int, int, int], list[Run]]] = {None: defaultdict(list)}
        self._pages: Counter[int] = Counter()  # of runs, by their makers

    def reserve(self, count: int, domid: int, by: int, owner: object = None) -> Run:
        """A run of `count` pages, where nobody can guess it, made by domain `by`, to be shown to processes of `domid`.
        `owner` has it alone until disown(). OutOfMemory if that guest has too many."""
        size = 1 << (count - 1).bit_length()  # few sizes, so that runs fit again
        mine = self._unused.setdefault(owner, defaultdict(list))
        unused = mine.get((by, domid, size)) or self._unused[None].get((by, domid, size))
        if unused:
            run = unused.pop()
        else:
            if by and self._pages[by] + size > GUEST_PAGES:
                raise OutOfMemory(f"domain {by} has {self._pages[by]} of {GUEST_PAGES} pages of memory for processes")
            run = self._new_run(size, domid, by)
            self._pages[by] += size
        run.count = run.left = count
        run.owner = owner
        return run

    def disown(self, owner: object) -> None:
        """Others may have its places."""
        for key, runs in self._unused.pop(owner, {}).items():
            self._unused[None][key] += runs

    def _new_run(self, size: int, domid: int, by: int) -> Run:
        while True:
            first = int.from_bytes(os.urandom(8), "little") % (SIZE // PAGE_SIZE - size)
            at = self._after(first)
            clear_below = not at or self.runs[at - 1].end < first
            if clear_below and (at == len(self.runs) or first + size < self.runs[at].first):
                run = Run(first, size, domid, by)
                self.runs.insert(at, run)
                return run

    def give_up(self, run: Run, count: int) -> None:
        """So many pages of a run have, or will have, no frame."""
        run.left -= count
        assert run.left >= 0, f"run {run.first:#x} has {run.left} pages left"
        if not run.left:
            self._unused.get(run.owner, self._unused[None])[run.by, run.domid, run.size].append(run)

    def _after(self, page: int) -> int:
        """Which of the runs is the first that begins after `page`."""
        return bisect(self.runs, page, key=lambda run: run.first)

    def forget_unused(self) -> None:
        """Nothing is there any more, and nobody need know where it was."""
        self._unused = {owner: defaultdict(list) for owner in self._unused}
        self.runs = [run for run in self.runs if run.left]
        self._pages = Counter()
        for run in self.runs:
            self._pages[run.by] += run.size
