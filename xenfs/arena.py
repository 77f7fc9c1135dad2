"""arena.py (edge): the one file that processes of the host map, and where the frames they were granted live meanwhile.

What mmap(2) of gntdev and gntalloc maps is, through FUSE_PASSTHROUGH, this memfd; index in an ioctl's structure is an offset
in it. Showing a frame of a domain means to make a page here the frame (GuestMemory.move), so that the process, the domain's
own drivers and every other process that may see it look at the same memory.

A page belongs to one file, and a descriptor maps one file: so processes can only share a frame if they map the same file.
All therefore map this one, and are kept apart by where things are: it is 2**62 bytes long, nearly all of it holes, and each
run of frames is at a random place in it. Who does not know a place finds a hole there, and a page of nothing. A run holds
only frames that one domain may map, for who knows one page knows its neighbours, and its place is only ever used again for
the same two domains: who it is for, and who made it, and while the open that made it lives, for that one. docs/adr/0018 says
what was weighed.

A page that is not needed any more is zeroed, but stays: to punch a hole the file must not be immutable, and while it is not,
anybody's MADV_REMOVE could tear pages out of runs that he knows nothing of. When no frame is here, the file is emptied.

Invariants: a frame is away from home exactly while it has a slot; a slot has users, or waits to go home: in `_leaving` for
who writes to it, in `_kept` because it lies between others in one mapping of ours, and we may not have more.
Left out: write protection of read-only grants: all pages of one file are writable to who opened it for writing.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from bisect import bisect
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from struct import Struct

from xenfs.places import SIZE, Places, Run
from xenmodel.memory import Frame, OutOfMemory
from xenmodel.types import PAGE_SIZE

log = logging.getLogger("xenfs.arena")

MAPS_OF_OURS = 8192  # mappings this process may need for everything else
LOOKS_MOST = 64  # at frames that somebody still writes to, in one step
_FUSE_DEV_IOC_BACKING_OPEN = 0x4010E501  # <linux/fuse.h>
_BACKING_MAP = Struct("<iIQ")  # fd flags padding
_FS_IOC_SETFLAGS, _FS_IMMUTABLE_FL = 0x40086602, 0x10  # <linux/fs.h>
KEEP_BYTES = 16 << 20  # that an empty arena may have of pages
_ZEROES = memoryview(bytes(1 << 20))

Filling = Callable[[], Iterable[tuple[int, int]]]
Later = Callable[[Callable[[], None], Callable[[], None]], None]  # do the first in a thread, then the second in the loop


class Slot:
    """Where a frame is."""

    __slots__ = ("page", "run", "then", "users")

    def __init__(self, run: Run, page: int) -> None:
        self.run = run
        self.page = page
        self.users = 1
        self.then: list[Callable[[], object]] = []  # when it is at home


class Arena:
    """`filling()`: where somebody else, a disk worker, may be writing to our memory just now: from address to address.
    `later`: see Later."""

    def __init__(self, filling: Filling = lambda: (), later: Later | None = None) -> None:
        self.filling = filling
        self._later = later or _at_once
        self.backing_id = 0  # 0: nobody can map it
        self.device = 0  # st_dev of the mount through which processes map it
        self.fd = os.memfd_create("xenfs-arena", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, SIZE)
        os.fchmod(self.fd, 0o600)  # mincore(2) tells others nothing
        self._slots: dict[Frame, Slot] = {}
        self.places = Places()
        self.reserve, self.give_up, self.disown = self.places.reserve, self.places.give_up, self.places.disown
        self.keep = KEEP_BYTES
        self._emptying = False
        self._pieces: Counter[int] = Counter()  # mappings of ours that it takes, by the makers of the runs
        self._all_pieces = 0
        with open("/proc/sys/vm/max_map_count") as file:
            self._most_pieces = max(int(file.read()) - MAPS_OF_OURS, 0) // 2  # each can cut another mapping in two
        self._leaving: deque[tuple[Frame, int]] = deque()  # neighbours
        self._kept: defaultdict[int, set[Frame]] = defaultdict(set)  # by the makers of the runs
        self._failing = False  # the host could not map a frame at home; that is said once
        self._protect()

    def register(self, fuse_fd: int) -> bool:
        """Make it a backing file of that mount. False if we may not: Linux wants CAP_SYS_ADMIN."""
        try:
            self.backing_id = fcntl.ioctl(fuse_fd, _FUSE_DEV_IOC_BACKING_OPEN, bytearray(_BACKING_MAP.pack(self.fd, 0, 0)))
        except OSError as error:
            log.warning("dev/xen/gntdev and gntalloc cannot map memory: FUSE passthrough is refused: %s", error.strerror)
        return bool(self.backing_id)

    # --- showing -----------------------------------------------------------------------------------------------------

    def where(self, frame: Frame) -> int | None:
        """The offset at which a frame can be seen already."""
        slot = self._slots.get(frame)
        return None if slot is None else slot.page * PAGE_SIZE

    def join(self, frames: Sequence[Frame], offset: int, domid: int) -> None:
        """One more user of frames that can be seen from `offset` on, side by side. OSError EBUSY, and nothing happened, if
        they are not all there, or not to be shown to that domain's processes: a page can be in one place only."""
        slots = [self._slots.get(frame) for frame in frames]
        for page, slot in enumerate(slots, offset // PAGE_SIZE):
            if slot is None or slot.page != page or slot.run.domid != domid:
                raise _busy()
        joined = [slot for slot in slots if slot is not None]
        for slot in joined:
            slot.users += 1
        for slot in joined:
            _call(slot)  # if it was leaving, it does not

    def show(self, frames: Sequence[Frame], run: Run, index: int) -> bool:
        """Put frames there, from page `index` of `run` on. False, and nothing happens, while a disk worker writes to one, or
        one has yet to go home from where it was.

        Nor does anything if it fails: OSError EBUSY if one is somewhere here already; OutOfMemory if the host cannot map so
        many pieces."""
        there = [slot for frame in frames if (slot := self._slots.get(frame)) is not None]
        if any(slot.users for slot in there) or len(set(frames)) < len(frames):
            raise _busy()
        if there or self._emptying:  # they are leaving, or so are all
            return False
        pieces = _neighbours(frames)
        if self._room(run.by) < len(pieces):
            raise OutOfMemory("too many pieces of memory for processes: the host's vm.max_map_count sets a limit")
        busy = _Busy(self.filling())
        if any(busy.touches(frame, count) for frame, count in pieces):
            return False
        page = run.first + index
        for frame, count in pieces:
            try:
                frame.memory.move(frame.pfn, count, self.fd, page * PAGE_SIZE)
            except OutOfMemory:
                shown = page - run.first - index
                run.left += shown  # for leaving takes them off
                self.leave([(one, _nothing) for one in frames[:shown]])
                raise
            for i in range(count):
                self._slots[Frame(frame.memory, frame.pfn + i)] = Slot(run, page + i)
            self._count(run.by, 1 - len(self._around(frame, count, page)))
            page += count
        return True

    def _room(self, by: int) -> int:
        """How many more pieces there may be for that domain: a guest a quarter of all, domain 0 what is left."""
        left = self._most_pieces - self._all_pieces
        return min(left, self._most_pieces // 4 - self._pieces.get(by, 0)) if by else left

    def _count(self, by: int, pieces: int) -> None:
        self._all_pieces += pieces
        self._pieces[by] += pieces
        if not self._pieces[by]:
            del self._pieces[by]

    def _around(self, frame: Frame, count: int, page: int) -> list[Frame]:
        """The frames before and after `count` of them, from `frame` at `page` on, if they are part of the same mapping."""
        beside = ((Frame(frame.memory, frame.pfn - 1), page - 1), (Frame(frame.memory, frame.pfn + count), page + count))
        return [one for one, at in beside if (slot := self._slots.get(one)) is not None and slot.page == at]

    def leave(self, users: Iterable[tuple[Frame, Callable[[], object]]]) -> None:
        """One user less of each frame. A frame that nobody looks at any more goes home, now or as soon as no disk worker
        writes to it; then, or at once if somebody does, the function beside it is called."""
        homeward = []
        for frame, then in users:
            slot = self._slots[frame]
            slot.users -= 1
            assert slot.users >= 0, f"frame {frame.pfn} was left too often"
            if slot.users:
                then()
            else:
                slot.then.append(then)
                homeward.append(frame)
        self._bring_home(homeward)

    def step(self) -> None:
        """Try again what could not go home. Called when disk workers have done something."""
        looks, busy = LOOKS_MOST, _Busy(self.filling() if self._leaving else ())
        free: list[Frame] = []
        for _ in range(len(self._leaving)):
            first, count = self._leaving.popleft()
            if busy.touches(first, count):
                self._leaving.append((first, count))
                looks -= 1
                if not looks:
                    break
            else:
                free += [Frame(first.memory, first.pfn + i) for i in range(count)]
        if free:
            self._bring_home(free)
        for by, kept in list(self._kept.items()):
            if (room := self._room(by)) > 0:
                frames = set(islice(kept, room))
                kept -= frames
                self._bring_home(frames)
            if not kept:
                self._kept.pop(by, None)

    def _bring_home(self, frames: Iterable[Frame]) -> None:
        """Those of them that are here and have no users."""
        unused = [frame for frame in frames if (slot := self._slots.get(frame)) is not None and not slot.users]
        stretches, busy = self._stretches(sorted(unused, key=_place)), _Busy(self.filling())
        for first, count in stretches:  # which grow
            slot = self._slots[first]
            around, by = self._around(first, count, slot.page), slot.run.by
            run = [Frame(first.memory, first.pfn + i) for i in range(count)]
            if busy.touches(first, count):
                self._leaving.append((first, count))
                continue
            if len(around) == 2 and self._room(by) < 1:
                self._kept[by].update(run)
                continue
            try:
                first.memory.bring_home(first.pfn, count)
            except OutOfMemory as error:
                if not self._failing:
                    log.error("%s", error)
                self._failing = True
                self._leaving.append((first, count))  # meanwhile they do no harm here
                continue
            self._failing = False
            slots, kept = [self._slots.pop(frame) for frame in run], self._kept.get(by, set())
            kept.difference_update(run)
            self._count(by, len(around) - 1)
            self._wipe(slot.page * PAGE_SIZE, count * PAGE_SIZE)
            for one in around:
                if one in kept and not self._slots[one].users:  # it is no longer between others
                    kept.remove(one)
                    stretches.append((one, 1))
            for slot in slots:
                self.give_up(slot.run, 1)
                _call(slot)
        self.tidy()

    def _stretches(self, frames: Sequence[Frame]) -> list[tuple[Frame, int]]:
        """Ascending frames as runs of those that are neighbours here, too: the first, and how many."""
        found: list[tuple[Frame, int]] = []
        for first, count in _neighbours(frames):
            start = 0
            for i in range(1, count + 1):
                before, here = Frame(first.memory, first.pfn + i - 1), Frame(first.memory, first.pfn + i)
                if i == count or self._slots[here].page != self._slots[before].page + 1:
                    found.append((Frame(first.memory, first.pfn + start), i - start))
                    start = i
        return found

    def tidy(self) -> None:
        """If no frame is here, give back what there is of pages: those of earlier runs, and those that processes made by
        touching holes. In a thread, for there may be many; meanwhile show() says no."""
        if self._slots or self._emptying or self.fd < 0 or os.fstat(self.fd).st_blocks * 512 <= self.keep:
            return
        self._emptying = True
        self._later(self._truncate, self._emptied)

    def _truncate(self) -> None:
        os.ftruncate(self.fd, 0)
        os.ftruncate(self.fd, SIZE)

    def _emptied(self) -> None:
        self._emptying = False
        self.places.forget_unused()

    def _wipe(self, offset: int, length: int) -> None:
        for start in range(0, length, len(_ZEROES)):
            os.pwrite(self.fd, _ZEROES[: length - start], offset + start)

    def _protect(self) -> None:
        """An immutable file can be mapped and written, but not punched: madvise(MADV_REMOVE) of a process over a range that
        it knows nothing of could otherwise tear pages out of others' runs. Linux wants CAP_LINUX_IMMUTABLE."""
        try:
            fcntl.ioctl(self.fd, _FS_IOC_SETFLAGS, _FS_IMMUTABLE_FL.to_bytes(8, "little"))
        except OSError as error:
            log.info("the shared pages of dev/xen cannot be protected against MADV_REMOVE: %s", error.strerror)

    def close(self) -> None:
        self.backing_id = 0
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _busy() -> OSError:
    return OSError(errno.EBUSY, "a frame is mapped by a process already, in another place")


def _neighbours(frames: Sequence[Frame]) -> list[tuple[Frame, int]]:
    """The same frames as runs of neighbours: the first, and how many."""
    runs: list[tuple[Frame, int]] = []
    for frame in frames:
        if runs and runs[-1][0].memory is frame.memory and runs[-1][0].pfn + runs[-1][1] == frame.pfn:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((frame, 1))
    return runs


def _call(slot: Slot) -> None:
    waiting, slot.then = slot.then, []
    for then in waiting:
        then()


def _at_once(work: Callable[[], None], then: Callable[[], None]) -> None:
    work()
    then()


def _nothing() -> None:
    """Nobody waits."""


def _place(frame: Frame) -> tuple[int, int]:
    return id(frame.memory), frame.pfn


class _Busy:
    """Memory that others are writing to."""

    def __init__(self, places: Iterable[tuple[int, int]]) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        for start, end in sorted(places):
            if self.ends and start <= self.ends[-1]:
                self.ends[-1] = max(end, self.ends[-1])
            else:
                self.starts.append(start)
                self.ends.append(end)

    def touches(self, frame: Frame, count: int) -> bool:
        """Any of `count` frames from that one on?"""
        start = frame.memory.address(frame.pfn)
        before = bisect(self.starts, start + count * PAGE_SIZE - 1)
        return bool(before) and self.ends[before - 1] > start
