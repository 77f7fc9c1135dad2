"""Goal: every FUSE request gets the reply that Linux expects, and only one, from bytes alone.
Method: raw requests of fuse.h into a Session over a small tree of known nodes; no descriptor, no world."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

import pytest

from tests.xenfs.machine import KIB, MIB, Kernel, Reply
from xenfs.fuse import kernel as k
from xenfs.fuse.operations import MAX_WRITE, OPCODES
from xenfs.fuse.session import Session
from xenfs.fuse.tree import Bytes, Change, Directory, Link, Node, Opened, refuse

ROOT = k.FUSE_ROOT_ID


class Paper(Node):
    """Remembers what was done to it; `error` makes everything fail. Its landing pages stand for a guest's."""

    mode = stat.S_IFREG | 0o640

    def __init__(self, pages: bool = False) -> None:
        self.written: list[tuple[int, bytes]] = []
        self.done: list[object] = []
        self.error: Exception | None = None
        self.pages = (memoryview(bytearray(64 * KIB)), memoryview(bytearray(MIB - 64 * KIB))) if pages else None

    @property
    def size(self) -> int:
        return 1000

    def _note(self, *what: object) -> None:
        if self.error is not None:
            raise self.error
        self.done.append(what)

    def open(self, flags: int) -> Opened:
        self._note("open", flags)
        return Opened(self, k.FOPEN_KEEP_CACHE)

    def read(self, session: Session, unique: int, offset: int, size: int, flags: int) -> None:
        self._note("read", offset, size)
        session.send_data(unique, [b"ab", memoryview(b"cd")])

    def write(self, session: Session, unique: int, offset: int, size: int, flags: int) -> None:
        self._note("write", flags)
        small, large = session.landing
        self.written.append((offset, bytes(small[:size]) + bytes(large[: max(0, size - 64 * KIB)])))
        session.send_written(unique, size)

    def fallocate(self, session: Session, unique: int, offset: int, length: int, mode: int) -> None:
        self._note("fallocate", offset, length, mode)
        session.send_ok(unique)

    def setattr(self, change: Change) -> None:
        self._note("setattr")

    def release(self) -> None:
        self._note("release")

    def landing(self) -> tuple[memoryview, memoryview] | None:
        return self.pages


class Clock(Bytes):
    """A text that is another one each time it is asked for."""

    def __init__(self) -> None:
        self.count = 0

    def text(self) -> bytes:
        self.count += 1
        return b"tick %d\n" % self.count


class Desk:
    """The tree of these tests and the kernel that looks at it."""

    def __init__(self) -> None:
        self.paper, self.other = Paper(), Paper()
        self.drawer = Directory({"clock": Clock()})
        root = Directory({"paper": self.paper, "other": self.other, "link": Link("drawer/clock"), "drawer": self.drawer})
        self.kernel = Kernel(root)


@pytest.fixture
def desk() -> Desk:
    return Desk()


INIT = [
    (7, 45, 0xFFFFFFFF, 45),
    (7, 31, 0xFFFFFFFF, 31),
    (7, 99, k.FUSE_ASYNC_READ, 45),
    (7, 45, 0, 45),
]


@pytest.mark.parametrize(("major", "minor", "flags", "answered"), INIT)
@pytest.mark.parametrize("form", ["short", "long"])
def test_init(desk, major, minor, flags, answered, form):
    """Goal: the smaller minor, a subset of the offered flags, requests of 1 MiB.
    Method: INIT of kernels old and new, in both lengths the header knows."""
    body = k.INIT_IN_SHORT.pack(major, minor, 131072, flags)
    reply = desk.kernel.call(k.FUSE_INIT, 0, body + bytes(48) * (form == "long"))
    version, got_minor, readahead, got, _, _, most, _, pages, *_ = k.INIT_OUT.unpack(reply.data)
    assert (version, got_minor, readahead, most, pages) == (7, answered, 131072, MAX_WRITE, MAX_WRITE // 4096)
    assert not got & ~flags
    wanted = k.FUSE_ASYNC_READ | k.FUSE_BIG_WRITES | k.FUSE_ASYNC_DIO | k.FUSE_MAX_PAGES | k.FUSE_HANDLE_KILLPRIV_V2
    assert got & wanted == flags & wanted
    assert not got & k.FUSE_ATOMIC_O_TRUNC, "Linux would throw away what was written to a disk through a mapping"


def test_init_of_another_age(desk):
    """Goal: FUSE before 7 is refused, not misunderstood.  Method: major 6."""
    assert desk.kernel.call(k.FUSE_INIT, 0, k.INIT_IN_SHORT.pack(6, 1, 0, 0)).error == errno.EPROTO


KINDS = [
    ("paper", stat.S_IFREG | 0o640, 1000, 1),
    ("link", stat.S_IFLNK | 0o777, len("drawer/clock"), 1),
    ("drawer", stat.S_IFDIR | 0o555, 0, 2),
]


@pytest.mark.parametrize(("name", "mode", "size", "nlink"), KINDS)
def test_attributes(desk, name, mode, size, nlink):
    """Goal: LOOKUP and GETATTR agree, with type, size in bytes and blocks, owner.  Method: one node of each kind."""
    desk.kernel.session.uid, desk.kernel.session.gid = 1001, 1002
    entry = k.ENTRY_OUT.unpack(desk.kernel.lookup(ROOT, name).data)
    ino, attributes = entry[0], entry[6:]
    assert k.ATTR_OUT.unpack(desk.kernel.call(k.FUSE_GETATTR, ino, k.GETATTR_IN.pack(0, 0, 0)).data)[3:] == attributes
    assert attributes[:3] == (ino, size, -(-size // 512))
    assert attributes[9:13] == (mode, nlink, 1001, 1002)


NAMES = [
    ("nothing", errno.ENOENT),
    ("", errno.ENOENT),
    ("n" * 255, errno.ENOENT),
    ("n" * 256, errno.ENAMETOOLONG),
    ("é" * 200, errno.ENAMETOOLONG),
]


@pytest.mark.parametrize(("name", "error"), NAMES, ids=lambda value: str(value)[:8])
def test_lookup_of_what_is_not_there(desk, name, error):
    """Goal: the errno says what is wrong with the name.  Method: one name per reason."""
    assert desk.kernel.lookup(ROOT, name) == Reply(error, b"")


def test_lookup_in_the_wrong_place(desk):
    """Goal: a file has no children, an unknown inode is stale.  Method: LOOKUP below both."""
    paper = desk.kernel.walk("paper")
    assert desk.kernel.lookup(paper, "x").error == errno.ENOTDIR
    for opcode in (k.FUSE_LOOKUP, k.FUSE_GETATTR, k.FUSE_READLINK, k.FUSE_OPEN, k.FUSE_OPENDIR):
        assert desk.kernel.call(opcode, 4711, bytes(16)).error == errno.ESTALE


def alive(kernel: Kernel, ino: int) -> bool:
    return not kernel.call(k.FUSE_GETATTR, ino, k.GETATTR_IN.pack(0, 0, 0)).error


def forget(*pairs: tuple[int, int]) -> bytes:
    return k.BATCH_FORGET_IN.pack(len(pairs), 0) + b"".join(k.FORGET_ONE.pack(*pair) for pair in pairs)


def test_forget_counts(desk):
    """Goal: an inode lives exactly as long as lookups outnumber forgets, and keeps its number.
    Method: FORGET and BATCH_FORGET in parts, too many, unknown, of the root; none is answered."""
    kernel = desk.kernel
    inodes = {name: [kernel.walk(name) for _ in range(3)] for name in ("paper", "other")}
    (paper,), (other,) = (set(numbers) for numbers in inodes.values())
    replies = len(kernel.order)
    kernel.send(k.FUSE_FORGET, paper, k.FORGET_IN.pack(2))
    kernel.send(k.FUSE_BATCH_FORGET, 0, forget((other, 1), (other, 1), (999, 1), (ROOT, 50)))
    assert len(kernel.order) == replies
    assert alive(kernel, paper) and alive(kernel, other) and alive(kernel, ROOT)
    kernel.send(k.FUSE_BATCH_FORGET, 0, forget((paper, 1), (other, 2**40)))
    assert not alive(kernel, paper) and not alive(kernel, other)
    assert kernel.walk("paper") == paper and kernel.walk("other") == other
    assert alive(kernel, paper)


def test_plain_requests(desk):
    """Goal: SETATTR, READLINK, STATFS, OPEN, READ, FSYNC, FALLOCATE, RELEASE, DESTROY do what they say.
    Method: each once; the node tells what reached it."""
    kernel, paper = desk.kernel, desk.kernel.walk("paper")
    after = k.ATTR_OUT.unpack(kernel.call(k.FUSE_SETATTR, paper, k.SETATTR_IN.pack(*[0] * 16)).data)
    assert after[4] == 1000, "SETATTR answers with the attributes as they are now"
    assert kernel.call(k.FUSE_READLINK, kernel.walk("link")) == Reply(0, b"drawer/clock")
    assert k.KSTATFS.unpack(kernel.call(k.FUSE_STATFS, ROOT).data)[5:8] == (4096, 255, 4096)
    fh, flags, _ = k.OPEN_OUT.unpack(kernel.open(paper, os.O_RDWR).data)
    assert flags == k.FOPEN_KEEP_CACHE
    assert kernel.read(fh, 5, 4) == Reply(0, b"abcd")
    assert kernel.fsync(fh) == Reply(0, b"")
    assert kernel.fallocate(fh, 1, 2, 3) == Reply(0, b"")
    assert kernel.call(k.FUSE_RELEASE, paper, k.RELEASE_IN.pack(fh, 0, 0, 0)) == Reply(0, b"")
    assert kernel.call(k.FUSE_DESTROY, 0) == Reply(0, b"")
    assert desk.paper.done == [("setattr",), ("open", os.O_RDWR), ("read", 5, 4), ("fallocate", 1, 2, 3), ("release",)]


SERVED = {*OPCODES, k.FUSE_READ, k.FUSE_WRITE}
NOT_SERVED = [*sorted(set(k.OPCODE_NAMES) - SERVED), 0, 4096, 2**32 - 1]


@pytest.mark.parametrize("opcode", NOT_SERVED)
def test_unknown_opcode(desk, opcode):
    """Goal: what is not implemented says so, so that Linux stops asking.  Method: all other opcodes, and nonsense."""
    assert desk.kernel.call(opcode, ROOT, bytes(100)) == Reply(errno.ENOSYS, b"")


SHORT = [
    (k.FUSE_INIT, k.INIT_IN_SHORT), (k.FUSE_OPEN, k.OPEN_IN), (k.FUSE_RELEASE, k.RELEASE_IN), (k.FUSE_READ, k.READ_IN),
    (k.FUSE_FSYNC, k.FSYNC_IN), (k.FUSE_FALLOCATE, k.FALLOCATE_IN), (k.FUSE_READDIR, k.READ_IN),
    (k.FUSE_RELEASEDIR, k.RELEASE_IN), (k.FUSE_SETATTR, k.SETATTR_IN), (k.FUSE_CREATE, k.CREATE_IN),
    (k.FUSE_MKNOD, k.MKNOD_IN), (k.FUSE_MKDIR, k.MKDIR_IN), (k.FUSE_RENAME, k.RENAME_IN), (k.FUSE_RENAME2, k.RENAME2_IN),
    (k.FUSE_GETXATTR, k.GETXATTR_IN), (k.FUSE_LISTXATTR, k.GETXATTR_IN), (k.FUSE_SETXATTR, k.GETXATTR_IN),
    (k.FUSE_FLUSH, k.FLUSH_IN), (k.FUSE_POLL, k.POLL_IN),
]  # fmt: skip


@pytest.mark.parametrize(("opcode", "layout"), SHORT)
def test_short_body(desk, opcode, layout):
    """Goal: a body that is too short is refused, whatever an earlier request left in the buffer.
    Method: each structure without its last byte, and without any, after a good READ."""
    kernel = desk.kernel
    fh = kernel.handle("paper")
    for length in (layout.size - 1, 0):
        assert not kernel.read(fh, 0, 4).error
        assert kernel.call(opcode, ROOT, bytes(length)) == Reply(errno.EINVAL, b"")
    assert len(kernel.order) == len(set(kernel.order))


@pytest.mark.parametrize("opcode", [k.FUSE_FORGET, k.FUSE_BATCH_FORGET, k.FUSE_INTERRUPT])
@pytest.mark.parametrize("length", [0, 7, 8, 13])
def test_no_reply_whatever_happens(desk, opcode, length):
    """Goal: requests that want no reply get none, not even an error: Linux knows no such unique.
    Method: bodies too short, of odd length, and of zeroes."""
    desk.kernel.send(opcode, ROOT, bytes(length) if length != 13 else k.BATCH_FORGET_IN.pack(1, 0) + bytes(5))
    assert desk.kernel.order == []


BAD_HANDLE: dict[str, Callable[[Kernel, int], int]] = {
    "read": lambda kernel, fh: kernel.send_read(fh, 0, 8),
    "write": lambda kernel, fh: kernel.send_write(fh, 0, b"x"),
    "fsync": lambda kernel, fh: kernel.send_fsync(fh),
    "fallocate": lambda kernel, fh: kernel.send_fallocate(fh, 0, 1, 0),
    "flush": lambda kernel, fh: kernel.send(k.FUSE_FLUSH, 0, k.FLUSH_IN.pack(fh, 0, 0, 0)),
    "poll": lambda kernel, fh: kernel.send(k.FUSE_POLL, 0, k.POLL_IN.pack(fh, 1, 1, 0)),
    "release": lambda kernel, fh: kernel.send(k.FUSE_RELEASE, 0, k.RELEASE_IN.pack(fh, 0, 0, 0)),
    "readdir": lambda kernel, fh: kernel.send(k.FUSE_READDIR, 0, k.READ_IN.pack(fh, 0, 99, 0, 0, 0, 0)),
}


@pytest.mark.parametrize("what", BAD_HANDLE)
def test_bad_handle(desk, what):
    """Goal: EBADF for handles nobody opened, or that were released; numbers are not used again.
    Method: each request with both."""
    kernel, send = desk.kernel, BAD_HANDLE[what]
    fh = kernel.handle("paper")
    kernel.call(k.FUSE_RELEASE, 0, k.RELEASE_IN.pack(fh, 0, 0, 0))
    assert kernel.handle("paper") != fh
    for number in (fh, 0, 2**64 - 1):
        assert kernel.wait(send(kernel, number)) == Reply(errno.EBADF, b"")


@pytest.mark.parametrize("error", [errno.EROFS, errno.ENOSPC, None])
def test_errors_of_a_node(desk, error):
    """Goal: a node's OSError becomes the caller's errno.  Method: raise with and without a number, at each entry."""
    kernel, ino, fh = desk.kernel, desk.kernel.walk("paper"), desk.kernel.handle("paper")
    desk.paper.error = refuse(error) if error else OSError("nothing to say")
    replies = [kernel.read(fh, 0, 1), kernel.write(fh, 0, b"1"), kernel.fallocate(fh, 0, 1, 0), kernel.open(ino)]
    assert replies == [Reply(error or errno.EIO, b"")] * 4


def test_a_bug_of_a_node_is_not_an_errno(desk):
    """Goal: our own mistakes are not passed to the caller as EBADF.  Method: a node that raises KeyError."""
    fh = desk.kernel.handle("paper")
    desk.paper.error = KeyError("a bug")
    with pytest.raises(KeyError, match="a bug"):
        desk.kernel.read(fh, 0, 1)


def test_notify_size(desk):
    """Goal: only a node that Linux knows is announced, and only its attributes (offset -1).  Method: before and after."""
    kernel = desk.kernel
    kernel.session.notify_size(desk.paper)
    assert kernel.notices == []
    ino = kernel.walk("paper")
    kernel.session.notify_size(desk.paper)
    assert kernel.notices == [(k.FUSE_NOTIFY_INVAL_INODE, k.NOTIFY_INVAL_INODE_OUT.pack(ino, -1, 0))]


CHANGES = [
    (k.FUSE_CREATE, k.CREATE_IN.pack(os.O_WRONLY, 0o644, 0, 0) + b"new\0"),
    (k.FUSE_MKNOD, k.MKNOD_IN.pack(stat.S_IFREG | 0o644, 0, 0, 0) + b"new\0"),
    (k.FUSE_MKDIR, k.MKDIR_IN.pack(0o755, 0) + b"new\0"),
    (k.FUSE_SYMLINK, b"new\0paper\0"),
    (k.FUSE_LINK, k.LINK_IN.pack(ROOT) + b"new\0"),
    (k.FUSE_UNLINK, b"paper\0"),
    (k.FUSE_RMDIR, b"drawer\0"),
    (k.FUSE_RENAME, k.RENAME_IN.pack(ROOT) + b"paper\0new\0"),
    (k.FUSE_RENAME2, k.RENAME2_IN.pack(ROOT, 1, 0) + b"paper\0new\0"),
]


@pytest.mark.parametrize(("opcode", "body"), CHANGES)
def test_the_tree_is_not_changed_by_request(desk, opcode, body):
    """Goal: touch, mkdir, rm and mv say "Operation not permitted" where no node says otherwise.
    Method: their requests on the root; its names after them."""
    assert desk.kernel.call(opcode, ROOT, body) == Reply(errno.EPERM, b"")
    assert desk.kernel.names("") == [".", "..", "paper", "other", "link", "drawer"]


def test_text_is_of_one_moment(desk):
    """Goal: an open text file does not change while it is read; a new open sees the new one; nobody writes it.
    Method: a text that changes at each look."""
    kernel = desk.kernel
    fh = kernel.handle("drawer/clock")
    text = kernel.read(fh, 0, 100).data
    assert kernel.read(fh, 0, 3).data + kernel.read(fh, 3, 100).data == text
    assert kernel.read(fh, 100, 100).data == b""
    assert kernel.text("drawer/clock").encode() != text
    for flags in (os.O_WRONLY, os.O_RDWR):
        assert kernel.open(kernel.walk("drawer/clock"), flags).error == errno.EACCES
