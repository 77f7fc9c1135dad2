"""Goal: a server that is killed loses nothing that was flushed, and what it leaves behind starts again.
Method: SIGKILL in the middle of writes by other processes; images, file systems and a new `xenfs up` are looked at."""

from __future__ import annotations

import random
import sys

import pytest

from tests.host.served import MIB, mounts_at

pytestmark = pytest.mark.host

BLOCK = 4096
WRITER = """if 1:
    import os, sys
    path, flags, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    fd = os.open(path, os.O_RDWR | flags)
    for i in range(10**6):
        os.pwrite(fd, b"%08d" % i * (size // 8), i % 1500 * size)
        if not flags:
            os.fsync(fd)
        print(i, flush=True)
"""
WAYS = [("fsync", 0, 4096), ("O_DSYNC", 0o10000, 4096), ("O_SYNC", 0o4010000, 5000), ("O_DIRECT", 0o50000, 4096)]


@pytest.mark.parametrize(("way", "flags", "size"), WAYS)
def test_flushed_blocks_survive(host, way, flags, size):
    """Goal: every block whose flush returned is in the image, and the disk can be served again.
    Method: a client says which blocks it has flushed; SIGKILL after some hundred; image, then a new server."""
    server = host.disk(16 * MIB)
    client = host.client(sys.executable, "-c", WRITER, server.disk(), flags, size)
    assert client.stdout is not None
    enough = random.Random(way).randrange(200, 500)
    said = [int(client.stdout.readline()) for _ in range(enough)]
    server.kill()
    done = host.finish(client)
    said += [int(line) for line in done.stdout.splitlines() if line.isdigit()]
    assert done.returncode == 1 and len(said) >= enough
    data = (host.root / "a.img").read_bytes()
    for i in said:
        assert data[i * size : (i + 1) * size] == b"%08d" % i * (size // 8), i
    again = host.up(host.root / "g.cfg")
    assert host.check("head", "-c", 8, again.disk()) == "00000000"
    again.stop()


def test_file_system_survives(host):
    """Goal: an ext4 whose disk died is clean after its journal was replayed, and has every file that was synced.
    Method: files with fsync in a loop device's file system, SIGKILL, umount, `e2fsck -p`, a new server, mount, read."""
    server = host.disk(64 * MIB)
    device = host.loop(server.disk(), "--direct-io=on")
    host.check("mkfs.ext4", "-q", device)
    place = host.mount(device)
    code = """if 1:
        import os, sys
        for i in range(10**6):
            with open(f"{sys.argv[1]}/file-{i % 300}-{i}", "wb") as file:
                file.write(b"%08d" % i * 1000)
                file.flush()
                os.fsync(file.fileno())
            print(i, flush=True)
    """
    client = host.client(sys.executable, "-c", code, place)
    assert client.stdout is not None
    for _ in range(60):
        last = int(client.stdout.readline())
    server.kill()
    assert host.finish(client).returncode == 1
    host.run("umount", place)
    if not mounts_at(place):
        host.mounts.remove(place)
    host.detach(device)

    again = host.up(host.root / "g.cfg")
    device = host.loop(again.disk(), "--direct-io=on")
    checked = host.run("e2fsck", "-p", device)
    assert checked.returncode in (0, 1), f"e2fsck -p: {checked.returncode}: {checked.stdout}"
    host.check("e2fsck", "-fn", device)
    place = host.mount(device, "again")
    host.check(sys.executable, "-c", CHECK, place, last)
    host.unmount(place)
    host.detach(device)
    again.stop()


CHECK = """if 1:
    import sys
    for i in range(int(sys.argv[2]) + 1):
        with open(f"{sys.argv[1]}/file-{i % 300}-{i}", "rb") as file:
            assert file.read() == b"%08d" % i * 1000, i
"""


def test_clients_are_released(host):
    """Goal: clients that wait for a killed server get an error instead of hanging.  Method: readers and writers at once."""
    server = host.disk(16 * MIB)
    loops = [
        "import os,sys\nfd=os.open(sys.argv[1],os.O_RDWR|os.O_DIRECT)\nb=bytearray(4096)\nprint('go',flush=True)\n" + body
        for body in ("while 1: os.preadv(fd,[b],0)", "while 1: os.pwrite(fd,b,0)", "while 1: os.fsync(fd)")
    ]
    clients = [host.client(sys.executable, "-c", code, server.disk()) for code in loops]
    for client in clients:
        assert client.stdout is not None and client.stdout.readline() == "go\n"
    server.kill()
    for client in clients:
        done = host.finish(client, 20)
        assert done.returncode == 1 and "[Errno " in done.stdout, done.stdout
