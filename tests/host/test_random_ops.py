"""Goal: a disk behaves as one array of bytes, whichever way it is written and read.
Method: seeded random operations by a client process, buffered, direct, mapped, with holes, against a bytearray."""

from __future__ import annotations

import sys

import pytest

from tests.host.served import MIB

pytestmark = pytest.mark.host

SIZES = [("w", 2 * MIB), ("w", 2 * MIB + 3 * 512), ("w,sector-size=4096", 2 * MIB + 4096), ("w,direct-io", 2 * MIB)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("options", "size"), SIZES)
def test_random_operations(host, options, size, seed):
    """Goal: no operation changes or shows other bytes than it should.
    Method: random_ops.py; then the image against what it expected, byte for byte."""
    server = host.disk(size, options)
    expected = host.root / "expected"
    words = [sys.executable, "-m", "tests.host.random_ops", server.disk(), seed, 1000, expected]
    assert host.check(*words).endswith("1000 operations\n")
    server.stop()
    assert (host.root / "a.img").read_bytes() == expected.read_bytes()


def test_two_clients_in_one_disk(host):
    """Goal: clients that work at once in neighbouring ranges that share sectors do not disturb one another.
    Method: four writers of 100-byte records, each every fourth record, unaligned and direct; the image."""
    server = host.disk(MIB)
    code = """if 1:
        import os, sys
        path, which = sys.argv[1], int(sys.argv[2])
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        for i in range(which, 4000, 4):
            os.pwrite(fd, b"%4d" % i * 25, i * 100)
    """
    clients = [host.client(sys.executable, "-c", code, server.disk(), which) for which in range(4)]
    for client in clients:
        done = host.finish(client)
        assert (done.returncode, done.stdout) == (0, "")
    server.stop()
    assert (host.root / "a.img").read_bytes()[:400_000] == b"".join(b"%4d" % i * 25 for i in range(4000))
