"""The fixture of the host tests: a directory that everybody may enter, and a Host in it that is always closed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.served import Host


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
