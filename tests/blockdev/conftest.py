"""Fixtures: a world per test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.blockdev.world import World


@pytest.fixture
def world() -> Iterator[World]:
    """Domain 0 and a guest, with real drivers on both sides, and no disk yet."""
    it = World()
    yield it
    it.close()
