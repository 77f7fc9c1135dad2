"""Goal: mount.py makes, keeps and takes away real mounts, as root and as an ordinary user; others' stay.
Method: a small server written with kernel.py's structures runs in a child; stat, ls, dd are other processes.

Everything happens in a private mount namespace per test, where /dev/fuse has udev's mode 0666: when its
processes are gone so are all mounts, whatever happened. No process touches a mount that it serves itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from tests.descriptors import open_files
from xenfs.fuse import kernel
from xenfs.fuse.mount import MountError, mount, set_io_flusher

pytestmark = pytest.mark.host

REPOSITORY = Path(__file__).resolve().parents[2]
NOBODY = 65534
MIB = 1 << 20
FLAGS = ("ASYNC_READ", "BIG_WRITES", "ASYNC_DIO", "MAX_PAGES", "INIT_EXT")

CONSTANT_REPLIES = {
    kernel.FUSE_OPEN: kernel.OPEN_OUT.pack(0, 0, 0),
    kernel.FUSE_OPENDIR: kernel.OPEN_OUT.pack(0, 0, 0),
    kernel.FUSE_STATFS: kernel.STATFS_OUT.pack(777, 55, 44, 3, 2, 4096, 255, 4096, 0),
    **dict.fromkeys((kernel.FUSE_RELEASE, kernel.FUSE_RELEASEDIR, kernel.FUSE_FLUSH), b""),
    **dict.fromkeys((kernel.FUSE_FORGET, kernel.FUSE_BATCH_FORGET, kernel.FUSE_INTERRUPT), None),
}

SETUP = """
mount -t tmpfs none "$1" && chmod 755 "$1" && cd "$1"
mknod -m 666 fuse c 10 229 && mount --bind fuse /dev/fuse
mkdir mnt full other roots control dead b c && mkdir -m 700 private && ln -s mnt link
touch full/file plain && chown "$2:$2" mnt
mount -t tmpfs none other && mount -t fusectl none control
echo ready && read end
"""


class Files:
    """A root directory with one file, `big`: enough for stat, ls, df and dd.  Remembers what it saw."""

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.silent = False
        self.seen: dict[str, int] = {}

    def attributes(self, node: int) -> tuple[int, ...]:
        mode = stat.S_IFDIR | 0o755 if node == kernel.FUSE_ROOT_ID else stat.S_IFREG | 0o400
        return (node, 4 * MIB, 0, 0, 0, 0, 0, 0, 0, mode, 1, self.uid, self.uid, 0, 4096, 0)

    def answer(self, opcode: int, node: int, body: bytes) -> bytes | int | None:
        """The reply's body, a negative errno, or None where there is no reply."""
        match opcode:
            case kernel.FUSE_INIT:
                self.seen["major"], _, readahead, low = kernel.INIT_IN_SHORT.unpack_from(body)
                wanted = sum(getattr(kernel, f"FUSE_{name}") for name in FLAGS)
                assert low & wanted == wanted
                return kernel.INIT_OUT.pack(7, 31, readahead, wanted, 16, 12, MIB, 1, 256, 0, 0, 0, 0)
            case kernel.FUSE_LOOKUP:
                entry = kernel.ENTRY_OUT.pack(2, 0, 0, 0, 0, 0, *self.attributes(2))
                return entry if body == b"big\0" else -errno.ENOENT
            case kernel.FUSE_GETATTR:
                return kernel.ATTR_OUT.pack(0, 0, 0, *self.attributes(node))
            case kernel.FUSE_READDIR:
                first = kernel.READ_IN.unpack(body)[1]
                names = [b".", b"..", b"big"][first:]
                return b"".join(kernel.pack_dirent(1, i, 0, name) for i, name in enumerate(names, first + 1))
            case kernel.FUSE_READ:
                size = kernel.READ_IN.unpack(body)[2]
                self.seen["longest_read"] = max(size, self.seen.get("longest_read", 0))
                return bytes(size)
        return CONSTANT_REPLIES.get(opcode, -errno.ENOSYS)

    def serve_one(self, fd: int) -> None:
        try:
            request = os.read(fd, kernel.IN_HEADER.size + kernel.WRITE_IN.size + MIB)
        except (BlockingIOError, FileNotFoundError):  # another reader was faster; the request was taken back
            return
        length, opcode, unique, node, *_ = kernel.IN_HEADER.unpack_from(request)
        assert length == len(request)
        reply = None if self.silent else self.answer(opcode, node, request[kernel.IN_HEADER.size :])
        if reply is not None:
            error, body = (reply, b"") if isinstance(reply, int) else (0, reply)
            header = kernel.OUT_HEADER.pack(kernel.OUT_HEADER.size + len(body), error, unique)
            os.writev(fd, [header, body])


def report(**values: object) -> None:
    print(json.dumps(values), flush=True)


def child(path: str, uid: int, arguments: dict[str, Any]) -> None:
    """Mount as `uid`, report, then serve; one report per command line on stdin, until there is no more."""
    with contextlib.suppress(ImportError, OSError):
        import fuse  # noqa: F401  (while the interpreter's own files are still readable)
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    before = len(open_files())
    try:
        mounted = mount(path, fsname="domain 0", **arguments)
    except MountError as error:
        report(leaked=len(open_files()) - before, errno=error.errno, error=str(error))
        return
    fd, files = mounted.fd, Files(uid)
    report(blocking=os.get_blocking(fd), inheritable=os.get_inheritable(fd), device=mounted.device)
    waiter = select.poll()
    waiter.register(fd, select.POLLIN)
    waiter.register(0, select.POLLIN)
    while command := wait_for_command(waiter, fd, files):
        if command == "again":
            try:
                mount(path, fsname="again")
            except MountError as error:
                report(errno=error.errno, error=str(error))
        elif command == "unmount":
            mounted.unmount()
            mounted.unmount()
            report(fd=mounted.fd, leaked=len(open_files()) - before)
            return
        else:
            files.silent = command == "silent"
            report(**files.seen)


def wait_for_command(waiter: select.poll, fd: int, files: Files) -> str:
    while True:
        ready = dict(waiter.poll())
        if ready.get(fd, 0) & select.POLLERR:
            waiter.unregister(fd)  # unmounted or aborted by someone else
        elif fd in ready:
            files.serve_one(fd)
        if 0 in ready:
            return sys.stdin.readline().strip()


class Server:
    def __init__(self, command: list[str], environ: dict[str, str]) -> None:
        self.process = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, env=environ)
        self.first: dict[str, Any] = {}

    def read_report(self) -> dict[str, Any]:
        waiter = select.poll()
        waiter.register(self.process.stdout, select.POLLIN)
        assert waiter.poll(10_000), "no report within 10 s"
        return json.loads(self.process.stdout.readline())

    def tell(self, command: str) -> dict[str, Any]:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.read_report()

    def kill(self) -> None:
        self.process.kill()  # ends a stopped one too
        self.process.communicate(timeout=10)


class Place:
    """A private mount namespace; `mnt` in it belongs to an ordinary user."""

    def __init__(self, root: str, stack: contextlib.ExitStack) -> None:
        self.root, self.stack = root, stack
        words = ["unshare", "--mount", "--propagation=private", "sh", "-ec", SETUP, "sh", root, str(NOBODY)]
        self.holder = subprocess.Popen(words, stdin=PIPE, stdout=PIPE, text=True)
        stack.callback(self.holder.communicate, "end\n", timeout=10)
        self.prefix = ["nsenter", "--mount", "--target", str(self.holder.pid), "--"]
        assert self.holder.stdout.readline() == "ready\n"

    def path(self, name: str = "mnt") -> str:
        return f"{self.root}/{name}"

    def run(self, *command: str, uid: int = 0) -> subprocess.CompletedProcess[str]:
        user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        environ = os.environ | {"LC_ALL": "C"}
        words = [*self.prefix, *user, *command]
        return subprocess.run(words, capture_output=True, text=True, timeout=10, env=environ)

    def serve(self, name: str = "mnt", uid: int = 0, library: str = "", **arguments: Any) -> Server:
        code = "import sys, json; from tests.host.test_mount import child; child(*json.loads(sys.argv[1]))"
        words = [sys.executable, "-c", code, json.dumps([self.path(name), uid, arguments])]
        environ = os.environ | {"PYTHONPATH": str(REPOSITORY), "FUSE_LIBRARY_PATH": library}
        server = Server([*self.prefix, *words], environ)
        self.stack.callback(server.kill)
        server.first = server.read_report()
        return server

    def mounts(self, name: str = "mnt") -> list[str]:
        """Type, source and options of what is mounted there, bottom first."""
        lines = self.run("cat", "/proc/self/mountinfo").stdout.splitlines()
        return [line.partition(" - ")[2] for line in lines if line.split()[4] == self.path(name)]


@pytest.fixture
def place() -> Iterator[Place]:
    with contextlib.ExitStack() as stack:
        root = tempfile.mkdtemp(prefix="xenfs-mount-", dir="/tmp")  # not tmp_path: others may not enter that
        stack.callback(os.rmdir, root)  # empty again: the mounts on it are the namespace's
        os.chmod(root, 0o755)
        yield Place(root, stack)


@pytest.fixture(params=[0, NOBODY], ids=["root", "user"])
def uid(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def test_mount_use_unmount(place, uid):
    """Goal: a mount works for its user from FUSE_INIT to unmount, with requests of 1 MiB, and leaves nothing.
    Method: the mount table, stat -f, ls and dd from other processes; descriptors counted in the server."""
    server = place.serve(uid=uid)
    device = server.first.pop("device")
    assert server.first == {"blocking": False, "inheritable": False}
    owner = f"user_id={uid},group_id={uid}"
    assert place.mounts() == [rf"fuse.xenfs domain\0400 rw,{owner},default_permissions"]
    assert place.run("mountpoint", "-d", place.path(), uid=uid).stdout.strip() == device
    assert place.run("stat", "-f", "-c", "%b %f %S", place.path(), uid=uid).stdout == "777 55 4096\n"
    assert place.run("ls", "-a", place.path(), uid=uid).stdout.split() == [".", "..", "big"]
    copied = place.run("dd", f"if={place.path('mnt/big')}", "of=/dev/null", "bs=1M", "iflag=direct", uid=uid)
    assert copied.returncode == 0 and "4+0 records in" in copied.stderr
    assert server.tell("seen") == {"major": 7, "longest_read": MIB}

    assert server.tell("unmount") == {"fd": -1, "leaked": 0}
    assert place.mounts() == []
    assert server.process.wait(timeout=10) == 0


@pytest.mark.parametrize(("allow_other", "listing"), [(False, ""), (True, "big\n")])
def test_other_users(place, allow_other, listing):
    """Goal: others see nothing, or with allow_other what the mode bits let them see.
    Method: root mounts, an ordinary user lists the directory (0755) and reads a file (0400)."""
    place.serve(allow_other=allow_other)
    assert place.run("ls", place.path(), uid=NOBODY).stdout == listing
    read = place.run("cat", place.path("mnt/big"), uid=NOBODY)
    assert read.returncode == 1 and "Permission denied" in read.stderr


def test_options_reach_the_kernel(place, uid):
    """Goal: subtype and further options are the mount's.  Method: the mount table, and a refused write."""
    place.serve(uid=uid, subtype="xenstore", options=["ro", "max_read=65536"])
    (found,) = place.mounts()
    assert found.startswith("fuse.xenstore domain") and "max_read=65536" in found
    assert "Read-only file system" in place.run("touch", place.path("mnt/new"), uid=uid).stderr


def crash(place: Place, name: str = "mnt", uid: int = 0) -> None:
    place.serve(name, uid).kill()
    dead = place.run("ls", place.path(name), uid=uid)
    assert "Transport endpoint is not connected" in dead.stderr


@pytest.mark.parametrize("name", ["mnt", "link"])
@pytest.mark.parametrize(("first", "second"), [(0, 0), (NOBODY, NOBODY), (NOBODY, 0)])
def test_dead_mount_is_replaced(place, first, second, name):
    """Goal: after a crash the next start just works, also root's after a user's crash, also through a link.
    Method: SIGKILL the server, see that the directory is dead, mount there again and list it."""
    crash(place, uid=first)
    place.serve(name, uid=second)
    assert len(place.mounts()) == 1
    assert place.run("ls", place.path(), uid=second).stdout == "big\n"


def test_dead_mounts_in_layers(place):
    """Goal: several crashes do no harm.  Method: stack dead mounts by moving them over one another."""
    crash(place)
    for name in ("b", "c"):
        crash(place, name)
        assert place.run("mount", "--move", place.path(name), place.path()).returncode == 0
    assert len(place.mounts()) == 3
    place.serve()
    assert len(place.mounts()) == 1


@pytest.mark.parametrize(
    ("state", "number", "words"),
    [
        ("serving", errno.EBUSY, "is a mount point already (fuse.xenfs from domain 0)"),
        ("stopped", errno.ETIMEDOUT, "did not answer within 2 s"),
        ("silent", errno.ETIMEDOUT, "did not answer within 2 s"),
        ("own", errno.ETIMEDOUT, "it is this process itself"),
    ],
)
def test_live_mount_is_left_alone(place, state, number, words):
    """Goal: a live mount is never replaced, and neither a hung one nor our own hangs us.
    Method: a second server wants the place while the first serves, is stopped, or reads without answering
    (no signal ends its clients then); or it is the first server itself. 10 s for the refusal."""
    server = place.serve()
    if state == "stopped":
        server.process.send_signal(signal.SIGSTOP)
    elif state == "silent":
        server.tell("silent")
    refused = server.tell("again") if state == "own" else place.serve().first
    assert refused["errno"] == number
    assert place.path() in refused["error"] and words in refused["error"]
    assert len(place.mounts()) == 1
    if state != "silent":
        server.process.send_signal(signal.SIGCONT)
        assert place.run("ls", place.path()).stdout == "big\n"


REFUSALS = [
    ("missing", 0, {}, errno.ENOENT, "missing does not exist"),
    ("plain", 0, {}, errno.ENOTDIR, "plain is not a directory"),
    ("full", 0, {}, errno.ENOTEMPTY, "full is not empty"),
    ("other", 0, {}, errno.EBUSY, "other is a mount point already (tmpfs from none)"),
    ("private", NOBODY, {}, errno.EACCES, "private may not be read by this user"),
    ("dead/deeper", 0, {}, errno.ENOTCONN, "deeper lies inside a dead mount"),
    ("dead", NOBODY, {}, errno.EBUSY, "dead is a mount point already (fuse.xenfs from domain 0)"),
    ("mnt", NOBODY, {"allow_other": True}, errno.EIO, "user_allow_other"),
    ("mnt", 0, {"options": ["ro,suid"]}, errno.EINVAL, "not a mount option: 'ro,suid'"),
    ("mnt", 0, {"options": [""]}, errno.EINVAL, "not a mount option: ''"),
    ("mnt", 0, {"subtype": "a\\b"}, errno.EINVAL, "not a mount option"),
    ("mnt", 0, {"options": ["ro", "no_such"]}, errno.EINVAL, "not a mount option: 'no_such'"),
    ("mnt", 0, {"options": ["allow_root"]}, errno.EINVAL, "not a mount option: 'allow_root'"),
    ("mnt", 0, {"library": "/no/libfuse.so.2"}, errno.ENOSYS, "libfuse2, on newer releases libfuse2t64"),
    ("roots", NOBODY, {}, errno.EIO, "user has no write access to mountpoint"),
]


@pytest.mark.parametrize(("name", "uid", "arguments", "number", "words"), REFUSALS)
def test_refusals(place, name, uid, arguments, number, words):
    """Goal: what cannot be mounted says why, and nothing is mounted, unmounted or left open.
    Method: one case per reason, beside a mount of root's whose server died."""
    crash(place, "dead")
    before = place.mounts(name)
    refused = place.serve(name, uid, **arguments).first
    assert (refused["errno"], refused["leaked"]) == (number, 0)
    assert words in refused["error"] and "\n" not in refused["error"]
    assert place.mounts(name) == before


@pytest.mark.parametrize("taken", [False, True])
def test_unmount_while_in_use(place, uid, taken):
    """Goal: programs that stand in the mount do not keep it, and a stranger's mount that took its place stays.
    Method: a process with its cwd there; if taken, a lazy umount (the connection lives on) and a tmpfs."""
    server = place.serve(uid=uid)
    user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    stand = ["sh", "-c", 'cd "$1" && echo in && exec sleep 60', "sh", place.path()]
    standing = subprocess.Popen([*place.prefix, *user, *stand], stdout=PIPE, text=True)
    place.stack.callback(standing.communicate, timeout=10)
    place.stack.callback(standing.kill)  # before that: callbacks run backwards
    assert standing.stdout.readline() == "in\n"
    if taken:
        assert place.run("umount", "-l", place.path()).returncode == 0
        assert place.run("mount", "-t", "tmpfs", "none", place.path()).returncode == 0
    assert server.tell("unmount") == {"fd": -1, "leaked": 0}
    assert [found.split()[0] for found in place.mounts()] == ["tmpfs"] * taken


def test_unmount_spares_our_successor(place):
    """Goal: what came after our mount is not ours to remove.
    Method: umount behind the server's back and start another: a quiet host hands out our device number again."""
    first = place.serve()
    assert place.run("umount", place.path()).returncode == 0
    place.serve()
    assert first.tell("unmount")["fd"] == -1
    assert place.run("ls", place.path()).stdout == "big\n"


def test_unmount_after_abort(place):
    """Goal: a connection that root aborted leaves no dead mount.  Method: fusectl's abort file."""
    server = place.serve()
    number = server.first["device"].partition(":")[2]
    assert place.run("sh", "-c", f"echo 1 > {place.path('control')}/{number}/abort").returncode == 0
    assert len(place.mounts()) == 1
    assert server.tell("unmount") == {"fd": -1, "leaked": 0}
    assert place.mounts() == []


def test_io_flusher():
    """Goal: True means that the kernel agreed.  Method: CAP_SYS_RESOURCE (bit 24) decides; prctl tells."""
    capable = int(Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0], 16) >> 24 & 1
    prctl, zeros = ctypes.CDLL(None).prctl, [ctypes.c_ulong(0)] * 4
    try:
        assert set_io_flusher() == bool(capable)
        assert prctl(58, *zeros) == (1 if capable else -1)  # PR_GET_IO_FLUSHER; needs the same right
    finally:
        prctl(57, *zeros)
