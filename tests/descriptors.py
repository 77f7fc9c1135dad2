"""descriptors.py: which files this process has open, for the tests that something leaves none behind.

Invariant: what nobody refers to any more is closed before anything is looked at. Otherwise what earlier tests left to the
garbage collector would close its files whenever that runs, perhaps between two looks.
"""

from __future__ import annotations

import contextlib
import gc
import os

OWN = "/proc/self/fd"


def open_files() -> set[str]:
    """Each descriptor with what it refers to, as "3 /dev/null"; without the one that looks."""
    gc.collect()
    found = set()
    for number in os.listdir(OWN):
        with contextlib.suppress(FileNotFoundError):  # the one that listed them
            found.add(f"{number} {os.readlink(f'{OWN}/{number}')}")
    return found
