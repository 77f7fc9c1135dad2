"""For all tests: an example of hypothesis may take as long as it needs (what measures time says so itself), and no module
leaves its garbage, with the descriptors in it, to the next."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from hypothesis import settings

# By default more than 200 ms are a failure, which on a busy machine any example can be. Else it stays as it is, for CI too.
settings.register_profile("patient", settings(), deadline=None)
settings.load_profile("patient")


@pytest.fixture(autouse=True, scope="module")
def nothing_piles_up() -> Iterator[None]:
    """Domains refer to their hypervisor and it to them: their memory's descriptors stay until the collector comes."""
    yield
    gc.collect()
