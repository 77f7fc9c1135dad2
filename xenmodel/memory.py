"""memory.py: a domain's RAM, one memfd; frames are slices of one shared mapping.

Called by the domain's own drivers (allocate, release), by the grant table (which frames may be seen from outside) and by
backends, which read and write the frames they were granted. The memfd is the only descriptor in xenmodel: it makes guest
memory real shared memory that another process can map. It is sparse: a frame nobody touched costs nothing.

A frame can live in another file for a while (`move`, `bring_home`), so that a process of the host may map just that frame.
Its address here stays the same, so every view of it goes on showing the truth.

Invariant: a frame is either free or allocated, never both; a frame that is given out reads as zeroes; a free one is at home.
Left out: machine frame numbers, populate-on-demand, paging. A guest's pfn is its offset in the memfd.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from xenmodel.types import PAGE_SIZE, OutOfResources, Pfn


class OutOfMemory(OutOfResources):
    """The guest has no run of free frames of that length."""


class GuestMemory:
    """`pages` frames of 4096 bytes. `view` is all of them; slices of it are the frames (DESIGN: memory is the truth)."""

    def __init__(self, pages: int, name: str = "guest") -> None:
        if pages <= 0:
            raise ValueError(f"a domain needs at least one page of memory, not {pages}")
        self.pages = pages
        label = f"xen-{name}".encode(errors="replace")[:240].decode(errors="ignore")  # 249 bytes are allowed
        self.fd = os.memfd_create(label, os.MFD_CLOEXEC)
        os.ftruncate(self.fd, pages * PAGE_SIZE)
        self._map = mmap.mmap(self.fd, pages * PAGE_SIZE, mmap.MAP_SHARED)
        self.view = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._free: list[tuple[int, int]] = [(0, pages)]  # (first, count), ascending, never adjacent
        self._away: dict[int, tuple[int, int]] = {}  # frames that live elsewhere: descriptor, offset
        self._windows: dict[int, list[tuple[weakref.ref[mmap.mmap], int]]] = {}  # frame -> where vmap() shows it, too

    def run(self, pfn: Pfn, count: int = 1) -> memoryview:
        """`count` frames from `pfn` on, writable. IndexError outside the domain's memory."""
        if pfn < 0 or count < 0 or pfn + count > self.pages:
            raise IndexError(f"frames {pfn}..{pfn + count} are outside 0..{self.pages}")
        return self.view[pfn * PAGE_SIZE : (pfn + count) * PAGE_SIZE]

    def allocate(self, count: int = 1) -> Pfn:
        """First-fit: a run of `count` free frames, all zero. OutOfMemory if there is none."""
        assert count > 0, f"{count} frames are no run"
        for i, (first, length) in enumerate(self._free):
            if length >= count:
                if length == count:
                    del self._free[i]
                else:
                    self._free[i] = (first + count, length - count)
                return Pfn(first)
        free = f"{self.free_pages} of {self.pages} are free"
        raise OutOfMemory(f"no {count} contiguous free frames ({free}): give the domain more memory")

    def release(self, pfn: Pfn, count: int = 1) -> None:
        """Give frames back; the host gets the memory, and the next owner reads zeroes."""
        assert count > 0, f"{count} frames are no run"
        assert 0 <= pfn <= self.pages - count, f"frames {pfn}..{pfn + count} are outside 0..{self.pages}"
        assert not self._away or self._away.keys().isdisjoint(range(pfn, pfn + count)), f"frames {pfn}+{count} are away"
        first, end = int(pfn), pfn + count
        at = next((i for i, (start, _) in enumerate(self._free) if start >= first), len(self._free))
        if at < len(self._free):
            assert end <= self._free[at][0], f"frames {first}..{end} overlap free ones at {self._free[at]}"
        if at and sum(self._free[at - 1]) >= first:
            assert sum(self._free[at - 1]) == first, f"frame {first} is free already: {self._free[at - 1]}"
            at -= 1
            first = self._free.pop(at)[0]
        if at < len(self._free) and self._free[at][0] == end:
            end += self._free.pop(at)[1]
        self._free.insert(at, (first, end - first))
        self._map.madvise(mmap.MADV_REMOVE, pfn * PAGE_SIZE, count * PAGE_SIZE)

    def populate(self, pfn: Pfn, count: int) -> None:
        """Touch frames now, so that the first to use them need not wait for a page fault. Only a help: never fails."""
        MADV_POPULATE_WRITE = 23  # Linux 5.14
        with suppress(OSError):
            self._map.madvise(MADV_POPULATE_WRITE, pfn * PAGE_SIZE, count * PAGE_SIZE)

    # --- frames that live elsewhere --------------------------------------------------------------------------------

    def address(self, pfn: int) -> int:
        """Where frame `pfn` is in our address space, for as long as the domain lives or somebody has a view of it."""
        return self._address + pfn * PAGE_SIZE

    def is_away(self, pfn: int) -> bool:
        return pfn in self._away

    def move(self, pfn: int, count: int, fd: int, offset: int) -> None:
        """From now on these frames are the pages at `offset` of `fd`, with their content. Nothing may be writing to them
        but through an address here: a read(2) under way would go to the old page. OutOfMemory, and nothing changed, if
        the host cannot map it."""
        self._move(pfn, count, fd, offset)
        self._away.update((pfn + i, (fd, offset + i * PAGE_SIZE)) for i in range(count))
        self._follow(pfn, count)

    def bring_home(self, pfn: int, count: int) -> None:
        """Undo move(). What is left at the other place is its owner's business."""
        if self.fd >= 0:
            self._return(pfn, count)
        else:  # the domain is gone, but somebody may have a view of the frame
            self._move(pfn, count, -1, 0)
        for i in range(count):
            del self._away[pfn + i]
        self._follow(pfn, count)

    def _move(self, pfn: int, count: int, fd: int, offset: int) -> None:
        """Copy, and take the place of the old mapping in one step."""
        size, address = count * PAGE_SIZE, self.address(pfn)
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | (mmap.MAP_ANONYMOUS if fd < 0 else 0)
        new = _libc.mmap(None, size, protection, flags, fd, offset)
        if new == _MAP_FAILED:
            raise _unmappable()
        ctypes.memmove(new, address, size)
        if _libc.mremap(new, size, size, _MREMAP_MAYMOVE_FIXED, ctypes.c_void_p(address)) != address:
            error = _unmappable()
            _libc.munmap(new, size)
            raise error

    def _return(self, pfn: int, count: int) -> None:
        """The same, to our own file, without a mapping more at any time: it must work where move() just failed."""
        size, address, offset = count * PAGE_SIZE, self.address(pfn), pfn * PAGE_SIZE
        done = 0
        while done < size:
            if (written := _libc.pwrite(self.fd, address + done, size - done, offset + done)) <= 0:
                raise _unmappable()
            done += written
        _map_over(address, size, self.fd, offset)

    def _follow(self, pfn: int, count: int) -> None:
        """Windows of vmap() show these frames where they are now."""
        for frame in range(pfn, pfn + count) if self._windows else ():
            live = [(window, at) for window, at in self._windows.pop(frame, ()) if window() is not None]
            if live:
                self._windows[frame] = live
            for _, at in live:
                self._show(frame, at)

    def _show(self, pfn: int, at: int) -> None:
        """Map one frame at an address of ours, inside a window."""
        fd, offset = self._away.get(pfn, (self.fd, pfn * PAGE_SIZE))
        if fd >= 0:
            _map_over(at, PAGE_SIZE, fd, offset)
        # the file is gone: an old size of 0 makes a second mapping of the same pages
        elif _libc.mremap(self.address(pfn), 0, PAGE_SIZE, _MREMAP_MAYMOVE_FIXED, ctypes.c_void_p(at)) != at:
            raise _unmappable()

    def show(self, pfn: int, window: mmap.mmap, at: int) -> None:
        """Map one frame at an address inside `window`, too, for as long as that lives."""
        self.run(Pfn(pfn))
        if self.fd < 0:
            raise OutOfMemory("a guest frame cannot be mapped: its domain is gone")
        self._show(pfn, at)
        self._windows.setdefault(pfn, []).append((weakref.ref(window), at))

    @property
    def free_pages(self) -> int:
        return sum(count for _, count in self._free)

    @property
    def populated_pages(self) -> int:
        """Frames the host really holds for this domain."""
        return os.fstat(self.fd).st_blocks * 512 // PAGE_SIZE

    def close(self) -> None:
        """Drop the memfd. The mapping goes with the last view of it, for a peer may still be reading."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Frame(NamedTuple):
    """One frame of one domain: what a grant refers to."""

    memory: GuestMemory
    pfn: int


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.pwrite.restype = ctypes.c_ssize_t
_libc.pwrite.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
_MAP_FAILED = ctypes.c_void_p(-1).value
_MREMAP_MAYMOVE_FIXED = 3


def _map_over(address: int, size: int, fd: int, offset: int) -> None:
    """Map part of a file in place of what is at an address of ours. OutOfMemory, and nothing changed, if that fails."""
    MAP_FIXED, MAP_POPULATE = 0x10, 0x8000
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | MAP_FIXED | MAP_POPULATE
    if _libc.mmap(address, size, protection, flags, fd, offset) != address:
        raise _unmappable()


def _unmappable() -> OutOfMemory:
    return OutOfMemory(f"a guest frame cannot be mapped: {os.strerror(ctypes.get_errno())}")


def vmap(frames: Sequence[Frame]) -> memoryview:
    """One contiguous writable view of frames that need not be contiguous (a multi-page ring), as Linux's vmap() gives.

    Neighbours in one domain are a plain slice; scattered ones are mapped side by side for as long as the view lives.
    IndexError if a frame is outside its domain's memory, for touching what lies beyond the memfd would be SIGBUS.
    """
    first = frames[0]
    if all(f.memory is first.memory and f.pfn == first.pfn + i for i, f in enumerate(frames)):
        return first.memory.run(Pfn(first.pfn), len(frames))
    window = mmap.mmap(-1, len(frames) * PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = ctypes.addressof(ctypes.c_char.from_buffer(window))
    for i, frame in enumerate(frames):
        frame.memory.show(frame.pfn, window, base + i * PAGE_SIZE)
    return memoryview(window)
