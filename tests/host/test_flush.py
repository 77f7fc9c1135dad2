"""Goal: what asks for stable storage gets it: each such request is a flush at the backend before it returns; an idle
server sleeps.
Method: inspect/rings counts what the backend did (f=); processes that write with every flag; context switches in /proc."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

import pytest

from tests.host.served import MIB

pytestmark = pytest.mark.host

CLIENT = """if 1:
    import mmap, os, sys
    disk, rings, flags, way = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    def flushes():
        with open(rings) as file:
            return int(file.read().partition(" f=")[2].split()[0])
    fd = os.open(disk, os.O_RDWR | flags)
    room = mmap.mmap(-1, 4096)
    shared = mmap.mmap(fd, 4096 * 16)
    for i in range(10):
        before = flushes()
        os.pwrite(fd, room, 4096 * i)
        if way == "fsync":
            os.fsync(fd)
        elif way == "fdatasync":
            os.fdatasync(fd)
        elif way == "msync":
            shared[i] = i
            shared.flush()
        print(flushes() - before)
"""
WAYS = [
    ("fsync", 0, "1"), ("fdatasync", 0, "1"), ("fsync", os.O_DIRECT, "1"), ("none", 0, "0"), ("none", os.O_DIRECT, "0"),
    ("none", os.O_SYNC, "1"), ("none", os.O_DSYNC, "1"), ("none", os.O_DIRECT | os.O_DSYNC, "1"), ("msync", 0, "1"),
]  # fmt: skip


@pytest.mark.parametrize(("way", "flags", "flushes"), WAYS)
def test_flushes(host, way, flags, flushes):
    """Goal: one flush for each fsync or synchronous write, none for others: as on a block device, O_DIRECT is not durable.
    Method: ten writes, the count before and after each; the disk's request must have been answered in between."""
    server = host.disk()
    words = [sys.executable, "-c", CLIENT, server.disk(), server.mnt / "domains/0/inspect/rings", flags, way]
    assert host.check(*words).split() == [flushes] * 10
    server.stop()


def test_tools_that_sync(host):
    """Goal: dd's conv=fsync and oflag=sync, and sync(1) of the file, are flushes.  Method: the count around each."""
    server = host.disk()
    rings = server.mnt / "domains/0/inspect/rings"

    def flushes() -> int:
        (count,) = re.findall(r" f=(\d+) ", host.read(rings))
        return int(count)

    dd = ["dd", "if=/dev/zero", f"of={server.disk()}", "bs=64k", "count=4"]
    for words, expected in (([*dd, "conv=notrunc,fsync"], 1), ([*dd, "oflag=sync", "conv=notrunc"], 4),
                            ([*dd, "conv=notrunc"], 0), (["sync", server.disk()], 1)):  # fmt: skip
        before = flushes()
        host.check(*words)
        assert flushes() - before == expected, words
    server.stop()


def test_read_only_disk_can_be_synced(host):
    """Goal: fsync of what nobody can write is fine.  Method: sync(1) of a read-only disk."""
    server = host.disk(options="r")
    host.check("sync", server.disk())
    server.stop()


def switches(pid: int) -> dict[str, int]:
    """How often each thread went to sleep by itself: it was woken as often."""
    return {
        task.name: int(re.findall(r"^voluntary_ctxt_switches:\s+(\d+)$", (task / "status").read_text(), re.M)[0])
        for task in Path(f"/proc/{pid}/task").iterdir()
    }


def test_idle(host):
    """Goal: a server that has nothing to do does not wake up, whatever it did before.
    Method: reads, writes and flushes through a loop device and the store; then three seconds of all threads' switches."""
    server = host.disk(32 * MIB)
    device = host.loop(server.disk(), "--direct-io=on")
    host.check("mkfs.ext4", "-q", device)
    host.detach(device)
    host.check("find", server.mnt, timeout_s=20)
    pid = server.process.pid
    deadline = time.monotonic() + 30
    before = switches(pid)
    while time.monotonic() < deadline:  # Linux may still write back or forget inodes
        time.sleep(3)
        now, before = before, switches(pid)
        if now == before:
            break
    assert now == before
    assert len(before) > 1, "the workers are there"
    assert host.check("head", "-c", "0", server.disk()) == ""
    server.stop()
