"""Goal: what a ring has dropped is counted by reason, and in all.
Method: count some; that the reasons are the right ones is for the tests of the rings.
"""

from __future__ import annotations

import pytest

from netdev.statistics import Statistics


def test_a_new_one_is_empty():
    statistics = Statistics()
    assert (statistics.packets, statistics.bytes, statistics.fixups) == (0, 0, 0)
    assert (statistics.drops, statistics.dropped) == ({}, 0)


def test_by_reason_and_in_all():
    statistics, other = Statistics(), Statistics()
    for reason, count in (("large", 1), ("small", 3), ("large", 1), ("small", 40)):
        statistics.drop(reason, count)
    statistics.drop("small")
    assert statistics.drops == {"large": 2, "small": 44} and statistics.dropped == 46
    assert other.drops == {}, "each ring has its own"


def test_nothing_else_can_be_counted():
    """Goal: a misspelt counter is an error, not a number nobody sees."""
    with pytest.raises(AttributeError):
        Statistics().packet = 1  # type: ignore[attr-defined]
