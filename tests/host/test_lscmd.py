"""Goal: `xenfs lsevtchn` and `xenfs lsgrants` work with a real mount, found or named, alive, stopped or dead.
Method: `xenfs up` in a child, in a mount namespace of its own where only it is found; the commands in others."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from tests.host.served import REPOSITORY, Host, Served
from tests.xenfs.test_ledger import columns

pytestmark = pytest.mark.host


def xenfs(host: Host, *words: object, alone: Served | None = None) -> tuple[int, str]:
    """Status and output. With `alone`, where its mount is the only one of any xenfs (other tests may have theirs)."""
    command = [sys.executable, "-m", "xenfs", *words]
    if alone is not None:
        others = "awk '/ - fuse.xenfs / && $5 != keep {print $5}' keep=\"$0\" /proc/self/mountinfo"
        script = f'{others} | xargs -r -n1 umount -l; exec "$@"'  # private to this namespace, as unshare(1) makes it
        command = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, str(alone.mnt), *map(str, command)]
    done = host.run(*command)
    return done.returncode, done.stdout


@pytest.fixture
def server(host: Host) -> Served:
    image = host.image("a.img")
    return host.up(host.config("g", f"{image},raw,xvda,w"))


def test_tables(host, server):
    """Goal: both tables, whole and live: counts go up with traffic.  Method: before and after writes to the disk."""
    status, before = xenfs(host, "lsevtchn", "--mount", server.mnt, "g")
    assert status == 0, before
    host.check("dd", "if=/dev/zero", f"of={server.disk()}", "bs=64k", "count=64", "oflag=direct", "conv=notrunc")
    status, after = xenfs(host, "lsevtchn", "--mount", "mnt", 1)
    assert status == 0, after

    def sent(text: str) -> int:
        (row,) = [row for row in columns(text, "port") if row["bound-by"] == "kernel: vbd/51712"]
        return int(row["sent"])

    assert sent(after) >= sent(before) + 64
    status, dom0 = xenfs(host, "lsevtchn", "--mount", server.mnt, "Domain-0")
    assert status == 0 and "kernel: vbd/1/51712" in dom0
    status, grants = xenfs(host, "lsgrants", "--mount", server.mnt, "g")
    rows = columns(grants, "ref")
    assert status == 0 and grants.startswith(f"{len(rows)} of 32768 references, "), "more than fits into one READ"
    assert host.read(server.mnt / "domains/g/inspect/grants").splitlines()[1] == grants.splitlines()[1]
    used = {row["ref"] for row in rows if row["mapped-by"] == "0:kernel"}
    status, mapped = xenfs(host, "lsgrants", "--mount", server.mnt, 0)
    assert status == 0 and {row["ref"] for row in columns(mapped, "handle")} == used


def test_found(host, server):
    """Goal: the only mount need not be named, nor is its device bound elsewhere another one; with two, one must be.
    Method: without --mount where nothing else is, beside a second server, and without any."""
    status, text = xenfs(host, "lsevtchn", "g", alone=server)
    assert status == 0 and "kernel: vbd/51712" in text, text
    second = host.up(host.config("h"), mnt="second")
    status, text = xenfs(host, "lsevtchn", "g")
    assert status == 2 and repr(str(server.mnt)) in text and repr(str(second.mnt)) in text
    status, text = xenfs(host, "lsevtchn", "--mount", "second", "h")
    assert status == 0 and "kernel: xenstore" in text
    second.stop()
    server.stop()
    status, text = xenfs(host, "lsevtchn", "g", alone=server)
    assert status == 1 and text.startswith("xenfs: no `xenfs up`") and text.count("\n") == 1


def test_not_ours(host, server):
    """Goal: other users see nothing, and are told so.  Method: as nobody."""
    script = f"import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534); sys.path.insert(0, {str(REPOSITORY)!r})"
    code = f"{script}; from xenfs.cli import main; sys.exit(main(sys.argv[1:]))"
    done = host.run("/usr/bin/python3", "-c", code, "lsgrants", "--mount", server.mnt, "g")
    assert done.returncode == 1 and "Permission denied; only the user of its `xenfs up` may look" in done.stdout


def test_stopped_and_dead(host, server):
    """Goal: a server that is stopped costs some seconds, a dead one none; both are one line and status 1.
    Method: SIGSTOP, SIGCONT, SIGKILL."""
    os.kill(server.process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    status, text = xenfs(host, "lsevtchn", "--mount", server.mnt, "g")
    took_s = time.monotonic() - begin
    os.kill(server.process.pid, signal.SIGCONT)
    assert (status, text) == (1, f"xenfs: {str(server.mnt)!r}: no answer within 5 s: its xenfs hangs, or is stopped\n")
    assert 5 <= took_s < 15
    assert xenfs(host, "lsevtchn", "--mount", server.mnt, "g")[0] == 0
    server.kill()
    status, text = xenfs(host, "lsevtchn", "--mount", server.mnt, "g")
    assert (status, text) == (1, f"xenfs: {str(server.mnt)!r}: its xenfs has ended without unmounting\n")
