"""Goal: an ordinary user can serve and use disks of his own, and nobody else sees them.
Method: `xenfs up` as uid 65534 in a mount namespace where /dev/fuse has udev's mode 0666; clients of several users."""

from __future__ import annotations

import os
import re
import signal

import pytest

from tests.host.served import MIB, Host, Served

pytestmark = pytest.mark.host

NOBODY = 65534
USER = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
# this machine's /dev/fuse may be root's alone; the tmpfs and the bind mount go with the namespace
NAMESPACE = """
mkdir "$1/dev" && mount -t tmpfs none "$1/dev" && mknod -m 666 "$1/dev/fuse" c 10 229
mount --bind "$1/dev/fuse" /dev/fuse && shift && exec "$@"
"""


class User:
    """The server of an ordinary user, in a namespace of its own, and clients there."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.image = host.image("a.img", 8 * MIB)
        config = host.config("g", f"{self.image},raw,xvda,w")
        (host.root / "mnt").mkdir()
        for path in (self.image, host.root / "mnt"):
            os.chown(path, NOBODY, NOBODY)
        namespace = ["unshare", "--mount", "--propagation=private", "sh", "-ec", NAMESPACE, "sh", str(host.root)]
        self.server: Served = host.start(config, prefix=[*namespace, *USER, "setpriv", "--pdeathsig", "KILL"]).wait_ready()
        self.enter = ["nsenter", "--mount", "--target", str(self.server.process.pid), "--"]

    def check(self, *words: object) -> str:
        return self.host.check(*self.enter, *USER, *words)


@pytest.fixture
def user(host: Host) -> User:
    return User(host)


def test_own_disk(user):
    """Goal: he reads, writes, maps and formats his disk, and finds everything in the image.
    Method: dd, mkfs and e2fsck as that user; SIGTERM; the image."""
    disk = user.server.disk()
    assert user.check("stat", "-c", "%u %a %s", disk) == f"{NOBODY} 600 {8 * MIB}\n"
    data = os.urandom(MIB + 333)
    (user.host.root / "data").write_bytes(data)
    user.check("dd", f"if={user.host.root}/data", f"of={disk}", "bs=100k", "conv=notrunc,fsync")
    user.check("cmp", "-n", len(data), user.host.root / "data", disk)
    user.check("dd", "if=/dev/zero", f"of={disk}", "bs=4k", "count=2", "oflag=direct", "conv=notrunc")
    user.check("mkfs.ext4", "-q", "-F", disk)
    user.check("e2fsck", "-fn", disk)
    user.server.process.send_signal(signal.SIGTERM)
    assert user.server.wait() == 0
    socket, passthrough = user.server.stderr().splitlines()
    assert socket.startswith("xenfs.up: WARNING: no socket of xenstored: cannot listen at ")  # not his directory
    assert passthrough.startswith("xenfs.arena: WARNING: dev/xen/gntdev and gntalloc cannot map memory: ")
    user.host.check("e2fsck", "-fn", user.image)


def test_others_see_nothing(user):
    """Goal: without --allow-other not even root enters his mount.  Method: ls, stat and cat as root and another user."""
    disk = user.server.disk()
    for who in ([], ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups"]):
        for words in (["ls", user.server.mnt], ["stat", disk], ["cat", disk]):
            done = user.host.run(*user.enter, *who, *words)
            assert done.returncode != 0 and "Permission denied" in done.stdout


def test_unmounted_at_the_end(user):
    """Goal: he can take his own mount away.  Method: a process that stays in the namespace looks at the mount table."""
    own = f"{user.server.mnt} .* - fuse.xenfs xenfs .*user_id={NOBODY},group_id={NOBODY}"
    assert re.search(own, user.check("cat", "/proc/self/mountinfo"))
    watcher = user.host.client(*user.enter, "sh", "-c", "echo in; read end; cat /proc/self/mountinfo")
    assert watcher.stdout is not None and watcher.stdout.readline() == "in\n"
    user.server.process.send_signal(signal.SIGTERM)
    assert user.server.wait() == 0
    table = user.host.finish(watcher).stdout
    assert " - tmpfs none" in table and not re.search(own, table)
