"""geometry.py: the arithmetic of segments, pure functions.

A segment is sectors first..last (inclusive, 512 bytes each) of one granted frame. Callers: blkback (what a request asks
for), blkfront (how to ask for it). ValueError names what is wrong with a peer's segments; blkback answers it with
BLKIF_RSP_ERROR.
"""

from __future__ import annotations

from collections.abc import Sequence

from xenmodel.memory import Frame
from xenmodel.public.io.blkif import SECTOR_SIZE, SECTORS_PER_PAGE, SEGMENT
from xenmodel.types import PAGE_SHIFT, PAGE_SIZE

Segment = tuple[int, int, int]  # gref, first_sect, last_sect


def parse_segments(data: bytes) -> list[Segment]:
    """The segments of a request, checked: first <= last <= 7 (XSA-155: `data` is the caller's own copy)."""
    segments = list(SEGMENT.iter_unpack(data))
    for i, (_, first, last) in enumerate(segments):
        if first > last or last >= SECTORS_PER_PAGE:
            raise ValueError(f"segment {i} covers sectors {first}..{last}; a page has 0..7 and first <= last")
    return segments


def join_runs(parts: Sequence[tuple[Frame, int, int]]) -> list[memoryview]:
    """(frame, first, last) pieces as few views: neighbours in one domain's memory become one."""
    views: list[memoryview] = []
    memory, start, end = parts[0][0].memory, -1, -1
    for frame, first, last in parts:
        begin = (frame.pfn << PAGE_SHIFT) + first * SECTOR_SIZE
        if begin == end and frame.memory is memory:
            end = (frame.pfn << PAGE_SHIFT) + (last + 1) * SECTOR_SIZE
            continue
        if end >= 0:
            views.append(memory.view[start:end])
        memory, start, end = frame.memory, begin, (frame.pfn << PAGE_SHIFT) + (last + 1) * SECTOR_SIZE
    views.append(memory.view[start:end])
    return views


def pack_segments(grefs: Sequence[int], length: int) -> bytes:
    """Segments that cover `length` bytes (a multiple of 512) from the start of the frames behind `grefs`."""
    full, rest = divmod(length, PAGE_SIZE)
    packed = b"".join(SEGMENT.pack(gref, 0, SECTORS_PER_PAGE - 1) for gref in grefs[:full])
    return packed + SEGMENT.pack(grefs[full], 0, rest // SECTOR_SIZE - 1) if rest else packed


def split(length: int, most_segments: int) -> list[tuple[int, int]]:
    """(offset, length) pieces of a request that is longer than `most_segments` pages."""
    step = most_segments * PAGE_SIZE
    return [(at, min(step, length - at)) for at in range(0, length, step)]


