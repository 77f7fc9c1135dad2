"""The fixture of the host tests: a directory that everybody may enter, and a Host in it that is always closed."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.served import Host


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Children inherit an ignored SIGINT, which is how shells start what runs in the background (a CI job, say)."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def host() -> Iterator[Host]:
    root = Path(tempfile.mkdtemp(prefix="xenfs-host-", dir="/tmp"))  # not tmp_path: other users may not enter that
    os.chmod(root, 0o755)
    built = Host(root)
    try:
        yield built
    finally:
        built.close()
        shutil.rmtree(root)
