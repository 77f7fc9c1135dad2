"""Goal: the arithmetic of segments is right at its borders.
Method: properties against a slow and obvious description; a table of what a peer must not ask."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockdev.geometry import join_runs, pack_segments, parse_segments, split
from xenmodel.memory import Frame, GuestMemory
from xenmodel.public.io.blkif import SEGMENT
from xenmodel.types import PAGE_SIZE, Pfn

SECTOR = 512


@given(pages=st.integers(1, 256), cut=st.integers(0, 7))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_pack_and_parse(pages: int, cut: int) -> None:
    """Goal: packed segments cover exactly the bytes asked for.  Method: parse them again and add up."""
    length = pages * PAGE_SIZE - cut * SECTOR
    grefs = list(range(100, 100 + pages))
    segments = parse_segments(pack_segments(grefs, length))
    assert [gref for gref, _, _ in segments] == grefs and len(segments) == -(-length // 4096)
    assert all(first == 0 for _, first, _ in segments)
    assert sum(last - first + 1 for _, first, last in segments) * SECTOR == length
    assert all(last == 7 for _, _, last in segments[:-1])


@pytest.mark.parametrize(("first", "last"), [(1, 0), (7, 6), (0, 8), (8, 8), (0, 255), (255, 255), (255, 0)])
def test_segments_that_leave_their_page(first: int, last: int) -> None:
    good = SEGMENT.pack(1, 0, 7)
    with pytest.raises(ValueError, match=f"segment 1 covers sectors {first}..{last}"):
        parse_segments(good + SEGMENT.pack(2, first, last))


def test_padding_of_a_segment_is_ignored() -> None:
    assert parse_segments(SEGMENT.pack(3, 2, 5)[:6] + b"\xff\xff") == [(3, 2, 5)]


PIECE = st.tuples(st.integers(0, 1), st.integers(0, 7), st.integers(0, 7), st.integers(0, 7))


@given(st.lists(PIECE, min_size=1, max_size=12))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_join_runs(pieces: list[tuple[int, int, int, int]]) -> None:
    """Goal: views are the pieces' bytes in their order, and no two of them could be one.
    Method: two domains of 8 frames of distinct bytes; compare with slicing piece by piece."""
    memories = [GuestMemory(8), GuestMemory(8)]
    for which, memory in enumerate(memories):
        for sector in range(64):
            memory.view[sector * SECTOR : (sector + 1) * SECTOR] = bytes([which * 64 + sector]) * SECTOR
    parts = [(Frame(memories[m], pfn), min(a, b), max(a, b)) for m, pfn, a, b in pieces]
    expected = b"".join(
        bytes(frame.memory.run(Pfn(frame.pfn))[first * SECTOR : (last + 1) * SECTOR]) for frame, first, last in parts
    )
    views = join_runs(parts)
    assert b"".join(map(bytes, views)) == expected
    borders = sum(
        a[0].memory is not b[0].memory or a[0].pfn * 8 + a[2] + 1 != b[0].pfn * 8 + b[1]
        for a, b in pairwise(parts)
    )
    assert len(views) == borders + 1
    for memory in memories:
        memory.close()


@given(length=st.integers(1, 300).map(lambda n: n * SECTOR), most=st.integers(1, 32))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_split(length: int, most: int) -> None:
    pieces = split(length, most)
    assert [at for at, _ in pieces] == [sum(n for _, n in pieces[:i]) for i in range(len(pieces))]
    assert sum(n for _, n in pieces) == length
    assert all(0 < n <= most * PAGE_SIZE for _, n in pieces)
    assert all(at % PAGE_SIZE == 0 for at, _ in pieces)
