"""Goal: several guests with several disks are served at once, each with its own data, and the tree shows them all.
Method: three guests, disks of every kind; fio in all of them at the same time; find, stat and cat of the whole mount."""

from __future__ import annotations

import os
import random
import signal

import pytest

from blockdev.vdev import parse_vdev
from tests.host.served import MIB, Host, Served

pytestmark = pytest.mark.host

GUESTS = ("one", "two", "three")


def kinds(host: Host, guest: str) -> list[str]:
    """xvda: an ordinary disk; xvdb: sectors of 4096."""
    for letter in "ab":
        host.image(f"{guest}-{letter}.img", 8 * MIB)
    return [f"{host.root}/{guest}-a.img,raw,xvda,w", f"{host.root}/{guest}-b.img,raw,xvdb,w,sector-size=4096"]


def start(host: Host) -> Served:
    configs = [host.config(guest, *kinds(host, guest)) for guest in GUESTS]
    media = random.Random(5).randbytes(2 * MIB)
    host.image("cd.iso", 2 * MIB, media)
    extra = [f"{host.root}/cd.iso,raw,xvdc,cdrom", f"{host.root}/cd.iso,raw,xvdd,r"]
    configs[0] = host.config("one", *kinds(host, "one"), *extra)
    return host.up(*configs)


def test_all_at_once(host):
    """Goal: no disk's data ends up on another, whoever writes when.
    Method: fio with checksums and a seed per disk in six disks at once, while readers walk the tree; then the images:
    each holds only its own job's blocks."""
    server = start(host)
    disks = [(guest, vdev) for guest in GUESTS for vdev in ("xvda", "xvdb")]
    jobs = {}
    for i, (guest, vdev) in enumerate(disks):
        jobs[guest, vdev] = host.client(
            "fio", "--name=all", f"--filename={server.disk(guest, vdev)}", "--bsrange=4k-256k", "--size=8m",
            "--rw=randwrite", "--ioengine=io_uring", "--iodepth=8", f"--direct={i % 2}", "--verify=pattern",
            f"--verify_pattern=0x{i + 1:02x}", "--do_verify=1", "--verify_fatal=1", "--allow_file_create=0",
        )  # fmt: skip
    host.check("find", server.mnt)
    for disk, client in jobs.items():
        done = host.finish(client, 120)
        assert done.returncode == 0, f"{disk}: {done.stdout}"
    server.stop()
    for i, (guest, vdev) in enumerate(disks):
        data = (host.root / f"{guest}-{vdev[-1]}.img").read_bytes()
        assert data == bytes([i + 1]) * 8 * MIB, (guest, vdev)


def test_tree(host):
    """Goal: everything that is served can be found, listed and read with ordinary tools.
    Method: find over the mount, cat of every small file, links, modes, statfs."""
    server = start(host)
    mnt = server.mnt
    assert sorted(host.check("ls", mnt).split()) == ["dev", "domains", "xenstore"]
    assert sorted(host.check("ls", mnt / "domains").split()) == ["0", "1", "2", "3", *sorted(GUESTS)]
    for domid, guest in enumerate(GUESTS, 1):
        assert host.check("readlink", mnt / "domains" / guest) == f"{domid}\n"
        assert host.read(mnt / "domains" / guest / "name") == f"{guest}\n"
        assert host.read(mnt / f"xenstore/local/domain/{domid}/name") == guest
        assert host.read(mnt / f"domains/{domid}/state") == "running\n"
    assert host.check("ls", mnt / "domains/one/dev").split() == ["xen", "xvda", "xvdb", "xvdc", "xvdd"]
    found = host.check("find", mnt).splitlines()
    for path in ("domains/0/inspect/rings", "domains/1/inspect/vbd/xvdb", "domains/3/inspect/grants",
                 "xenstore/local/domain/0/backend/vbd/3/51728/sector-size"):  # fmt: skip
        assert str(mnt / path) in found
    host.check("find", mnt, "-type", "f", "-not", "-path", "*/dev/*", "-not", "-name", "xenbus", "-exec", "cat", "{}", "+")
    assert host.read(mnt / "xenstore/local/domain/0/backend/vbd/3/51728/sector-size") == "4096"
    assert "sector-size 4096" in host.read(mnt / "domains/three/inspect/vbd/xvdb")
    assert host.check("stat", "-f", "-c", "%T %S %l", mnt) == "fuseblk 4096 255\n"
    assert host.check("df", "--output=fstype", mnt).split()[-1] == "fuse.xenfs"
    server.stop()


def test_read_only(host):
    """Goal: a read-only disk and a cdrom can be read by all and opened for writing by none, not even root.
    Method: their content, stat, dd and a shell's redirection; info in the store."""
    server = start(host)
    for vdev, info in (("xvdc", "5"), ("xvdd", "4")):
        disk = server.disk("one", vdev)
        host.check("cmp", disk, host.root / "cd.iso")
        assert host.check("stat", "-c", "%a", disk) == "400\n"
        assert host.read(server.mnt / f"xenstore/local/domain/0/backend/vbd/1/{parse_vdev(vdev)}/info") == info
        for words in (["dd", "if=/dev/zero", f"of={disk}", "count=1", "conv=notrunc"], ["sh", "-c", ': > "$1"', "sh", disk]):
            done = host.run(*words)
            assert done.returncode != 0 and "Read-only file system" in done.stdout, done.stdout
    server.stop()
    assert (host.root / "cd.iso").read_bytes() == random.Random(5).randbytes(2 * MIB)


def test_nothing_can_be_made(host):
    """Goal: the tree is not a place for files, and says so.  Method: touch, mkdir, rm, mv, ln, chmod of a text."""
    server = host.disk()
    guest = server.mnt / "domains/1"
    name = guest / "name"
    for words in (
        ["touch", guest / "new"], ["mkdir", guest / "new"], ["rm", name], ["mv", name, guest / "x"],
        ["ln", "-s", "x", guest / "l"], ["chmod", "600", name], ["sh", "-c", 'echo > "$1"', "sh", name],
    ):  # fmt: skip
        assert host.run(*words).returncode != 0, words
    assert host.read(guest / "name") == "g\n"
    assert sorted(host.check("ls", guest).split()) == ["dev", "inspect", "name", "proc", "state"]
    server.stop()


SIZES = [16 * MIB, 12 * MIB + 512, 4 * MIB]


@pytest.mark.parametrize("size", SIZES)
def test_resize(host, size):
    """Goal: an image that was cut or made longer is a disk of that size, for clients that have it open too.
    Method: truncate and SIGHUP; a line on stdout, stat, the size an open descriptor sees, data at the new end."""
    server = host.disk(8 * MIB)
    image = host.root / "a.img"
    code = """if 1:
        import os, sys
        fd = os.open(sys.argv[1], os.O_RDWR)
        os.pwrite(fd, b"old end", min(8 << 20, int(sys.argv[2])) - 7)
        print(os.fstat(fd).st_size, flush=True)
        sys.stdin.readline()
        size = os.lseek(fd, 0, os.SEEK_END)
        print(size, os.pwrite(fd, b"new end", size - 7), os.pread(fd, 99, size - 7), flush=True)
        try:
            os.pwrite(fd, b"x", size)
        except OSError as error:
            print(error.errno)
    """
    client = host.client(os.sys.executable, "-c", code, server.disk(), size)
    assert client.stdout is not None and client.stdout.readline() == f"{8 * MIB}\n"
    os.truncate(image, size)
    server.process.send_signal(signal.SIGHUP)
    assert server.line() == f"g xvda: {size / MIB:g} MiB, read-write, connected"
    assert host.check("stat", "-c", "%s", server.disk()) == f"{size}\n"
    assert host.read(server.mnt / "xenstore/local/domain/0/backend/vbd/1/51712/sectors") == str(size // 512)
    done = host.finish(client)
    assert done.stdout.splitlines() == [f"{size} 7 b'new end'", "28"], done.stdout
    server.stop()
    assert image.stat().st_size == size and image.read_bytes()[-7:] == b"new end"
