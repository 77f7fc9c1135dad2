"""What tests ask of who may be writing to guests' memory (Workers.filling, Calls.filling)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence


def touched(filling: Callable[[], Iterable[tuple[int, int]]], ranges: Sequence[range]) -> bool:
    """Is anything written to in one of these ranges of addresses?"""
    return any(start < one.stop and one.start < end for start, end in filling() for one in ranges)
