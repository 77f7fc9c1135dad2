"""What cannot be compared here is not collected; and two fresh stores, for what can."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench import realstore
from tests.xenstored.differences import EXCUSES, UNORDERED
from tests.xenstored.rig import HOMES, Twins, twins

# differences.py says how C xenstored 4.17 answers; other versions answer otherwise in places, and each would be a failure.
REFERENCE = "xen-4.17"
daemon = realstore.find("xenstored")
collect_ignore_glob = ["test_*.py"] if daemon and REFERENCE not in daemon.parts else []


@pytest.fixture
def pair() -> Iterator[Twins]:
    """With two guests that have a home and a `data` of their own in it."""
    if reason := realstore.missing():
        pytest.skip(reason)
    with twins(excuses=EXCUSES, unordered=UNORDERED) as pair:
        yield pair.run(HOMES)
