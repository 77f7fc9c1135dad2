"""Goal: `xenfs up` starts, says so, ends cleanly on a signal, and says in one line why it cannot start.
Method: the real command as a child with real images and mounts; the mount table and the exit status are looked at."""

from __future__ import annotations

import os
import signal

import pytest

from tests.host.served import MIB, mounts_at

pytestmark = pytest.mark.host


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_start_and_stop(host, number):
    """Goal: a line per disk, then `ready`; a signal ends it with 0, nothing on stderr, nothing mounted.
    Method: three disks of two guests, both signals."""
    for name in ("a", "b", "c"):
        host.image(f"{name}.img", 3 * MIB + 512)
    g = host.config("g", f"{host.root}/a.img,raw,xvda,w", f"{host.root}/b.img,raw,xvdb,r")
    server = host.up(g, host.config("h", f"{host.root}/c.img,raw,sda,w"))
    assert server.lines == [
        "g xvda: 3.00049 MiB, read-write, connected",
        "g xvdb: 3.00049 MiB, read-only, connected",
        "h sda: 3.00049 MiB, read-write, connected",
    ]
    assert mounts_at(server.mnt) == ["fuse.xenfs"]
    assert host.check("stat", "-c", "%s %F", server.disk("h", "sda")) == f"{3 * MIB + 512} regular file\n"
    server.stop(number)


def test_what_was_written_is_kept(host):
    """Goal: SIGTERM loses nothing that a client wrote, flushed or not.  Method: dd without fsync, stop, the image."""
    server = host.disk()
    data = os.urandom(3 * MIB + 777)
    (host.root / "data").write_bytes(data)
    host.check("dd", f"if={host.root}/data", f"of={server.disk()}", "bs=70000", "conv=notrunc")
    server.stop()
    assert (host.root / "a.img").read_bytes() == data + bytes(8 * MIB - len(data))


def test_stop_while_in_use(host):
    """Goal: clients that have a disk open do not keep the server; what they write until then is kept or refused.
    Method: a client that writes all the time and stands in the directory; SIGTERM; an error for it, 0 for the server."""
    server = host.disk()
    code = (
        "import os, sys\nos.chdir(os.path.dirname(sys.argv[1]))\nfd = os.open(sys.argv[1], os.O_RDWR)\n"
        "print('go', flush=True)\nwhile True:\n    os.pwrite(fd, b'w' * 4096, 0)\n"
    )
    client = host.client(os.sys.executable, "-c", code, server.disk())
    assert client.stdout is not None and client.stdout.readline() == "go\n"
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    assert host.finish(client).returncode == 1
    assert mounts_at(server.mnt) == []
    assert server.stderr() == "xenfs.up: WARNING: a disk is still open: syncing, then its users are cut off\n"


def test_stop_under_a_mounted_file_system(host):
    """Goal: what programs wrote to a file system on a disk before SIGTERM is on the disk, though nobody unmounted it.
    Method: ext4 through a loop device, a file written and not synced; SIGTERM; the file is read from the image."""
    server = host.disk()
    host.check("mkfs.ext4", "-q", server.disk())
    loop = host.loop(server.disk())
    folder = host.mount(loop)
    host.check("sh", "-c", 'echo precious > "$1"/file', "sh", folder)
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    host.check("umount", "--lazy", folder)
    assert "precious" in host.check("debugfs", "-R", "cat /file", host.root / "a.img")


def test_unmounted_by_somebody(host):
    """Goal: `umount` ends the server too, with everything flushed.  Method: write, umount, wait; the image."""
    server = host.disk()
    host.check("dd", "if=/dev/zero", f"of={server.disk()}", "bs=4096", "count=1", "conv=notrunc")
    host.check("sh", "-c", 'printf written > "$1"', "sh", server.disk())
    host.check("umount", server.mnt)
    assert (server.wait(), server.stderr()) == (0, "")
    assert (host.root / "a.img").read_bytes()[:7] == b"written"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_dead_mount_is_replaced(host, number):
    """Goal: after a crash the next start just works.  Method: kill, see that the mount is dead, start again, read."""
    server = host.disk()
    host.check("sh", "-c", 'printf before > "$1"', "sh", server.disk())
    server.process.send_signal(number)
    server.process.wait(10)
    assert "not connected" in host.run("ls", server.mnt).stdout
    again = host.up(host.root / "g.cfg")
    assert mounts_at(again.mnt) == ["fuse.xenfs"]
    assert host.check("head", "-c", "6", again.disk()) == "before"
    again.stop()


REFUSED = [
    ("missing image", "xenfs: g: xvda: cannot open disk image {root}/no.img: No such file or directory"),
    ("image in use", "xenfs: g: xvda: disk image {root}/a.img is in use by another writer"),
    ("bad line", "xenfs: {root}/g.cfg:2: "),
    ("missing mount point", "xenfs: {root}/none does not exist"),
    ("full mount point", "xenfs: {root}/full is not empty"),
    ("mount point in use", "xenfs: {root}/other is a mount point already"),
]


@pytest.mark.parametrize(("reason", "says"), REFUSED, ids=[reason for reason, _ in REFUSED])
def test_refused(host, reason, says):
    """Goal: status 1, one line that names the thing, no traceback, nothing mounted; a running server is not disturbed.
    Method: one case per reason, beside a server that has an image."""
    a, b = host.image("a.img"), host.image("b.img")
    other = host.up(host.config("other", f"{a},raw,xvda,w"), mnt="other")
    config = host.config("g", f"{b},raw,xvda,w")
    mnt = {"missing mount point": "none", "full mount point": "full", "mount point in use": "other"}.get(reason, "mnt")
    if reason == "missing image":
        host.config("g", f"{host.root}/no.img,raw,xvda,w")
    elif reason == "image in use":
        host.config("g", f"{a},raw,xvda,w")
    elif reason == "bad line":
        config.write_text('name = "g"\ndisk = [ "x" ]\n')
    elif reason == "full mount point":
        (host.root / "full").mkdir()
        (host.root / "full" / "file").touch()
    refused = host.start(config, mnt=mnt, make=mnt != "none")
    assert refused.wait() == 1
    assert "Traceback" not in refused.stderr()
    (line,) = refused.stderr().splitlines()
    assert line.startswith(says.format(root=host.root))
    assert mounts_at(host.root / "mnt") == mounts_at(host.root / "full") == []
    assert host.check("head", "-c", "2", other.disk("other")) == "\0\0"
    other.stop()


def test_readers_share_an_image(host):
    """Goal: an image that is only read may be served twice, but not beside a writer.  Method: two readers, then a writer."""
    image = host.image("a.img")
    first = host.up(host.config("g", f"{image},raw,xvda,r"), mnt="one")
    second = host.up(host.config("h", f"{image},raw,xvda,r"), mnt="two")
    writer = host.start(host.config("w", f"{image},raw,xvda,w"), mnt="three")
    assert writer.wait() == 1 and "in use" in writer.stderr()
    second.stop()
    first.stop()
