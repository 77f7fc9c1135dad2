"""Goal: the requests that change a tree, ask for extended attributes or wait reach the node whole, and its answer Linux.
Method: raw requests of fuse.h into a Session over a shelf of boxes in memory; no store, no descriptor."""

from __future__ import annotations

import errno
import os
import select
import stat

import pytest

from tests.xenfs.machine import MIB, Kernel, Reply
from xenfs.fuse import kernel as k
from xenfs.fuse.operations import READDIR_MOST
from xenfs.fuse.session import Session
from xenfs.fuse.tree import POLL_ALWAYS, Change, Directory, Node, Opened, refuse

ROOT = k.FUSE_ROOT_ID
LONG = b"n" * 256


class Box(Node):
    """A file that tells what reached it."""

    mode = stat.S_IFREG | 0o600

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.bits = 0
        self.xattrs: dict[bytes, bytes] = {}

    def get_mode(self) -> int:
        return self.mode | self.bits

    def setattr(self, change: Change) -> None:
        self.shelf.done.append(("setattr", *change))
        self.bits = change.mode & 0o077

    def getxattr(self, name: bytes) -> bytes:
        return self.xattrs[name] if name in self.xattrs else super().getxattr(name)

    def setxattr(self, name: bytes, value: bytes, flags: int) -> None:
        self.shelf.done.append(("setxattr", name, len(value), flags))
        self.xattrs[name] = value

    def listxattr(self) -> list[bytes]:
        return list(self.xattrs)

    def removexattr(self, name: bytes) -> None:
        if self.xattrs.pop(name, None) is None:
            super().removexattr(name)

    def open(self, flags: int) -> Opened:
        return Opened(Lid(self), k.FOPEN_DIRECT_IO)


class Lid(Node):
    """An open box."""

    def __init__(self, box: Box) -> None:
        self.done = box.shelf.done
        self.ready = False
        self.waiting: list[int] = []
        self.error = 0

    def read(self, session: Session, unique: int, offset: int, size: int, flags: int) -> None:
        self.done.append(("read", flags))
        session.send_data(unique, [])

    def setattr(self, change: Change) -> None:
        self.done.append(("ftruncate", change.size))

    def flush(self, session: Session, unique: int) -> None:
        if self.error:
            raise refuse(self.error)
        self.done.append(("flush",))
        super().flush(session, unique)

    def poll(self, session: Session, kh: int, schedule: bool) -> int:
        if schedule:
            self.waiting.append(kh)
        return select.POLLIN if self.ready else 0

    def release(self) -> None:
        self.done.append(("release",))


class Shelf(Directory):
    """A directory in which boxes and shelves are made."""

    mode = stat.S_IFDIR | 0o700

    def __init__(self) -> None:
        super().__init__()
        self.mode = stat.S_IFDIR | 0o700
        self.done: list[object] = []

    def create(self, name: bytes, mode: int, flags: int) -> tuple[Node, Opened]:
        self.done.append(("create", name, mode, flags))
        if name in self.children:
            raise refuse(errno.EEXIST)
        box = Box(self)
        self.children[name] = box
        return box, box.open(flags)

    def mkdir(self, name: bytes, mode: int) -> Node:
        self.done.append(("mkdir", name, mode))
        return self.add(name.decode(), Shelf())

    def unlink(self, name: bytes) -> None:
        self.done.append(("unlink", name))
        self.remove(name.decode())

    def rmdir(self, name: bytes) -> None:
        self.done.append(("rmdir", name))
        self.remove(name.decode())

    def rename(self, name: bytes, target: Node, new_name: bytes) -> None:
        self.done.append(("rename", name, target, new_name))
        raise refuse(errno.EXDEV)


class Room:
    def __init__(self) -> None:
        self.shelf = Shelf()
        self.kernel = Kernel(self.shelf)

    def create(self, name: bytes, flags: int = os.O_RDWR) -> Reply:
        return self.kernel.call(k.FUSE_CREATE, ROOT, k.CREATE_IN.pack(flags, stat.S_IFREG | 0o644, 0o022, 0) + name + b"\0")

    def box(self) -> tuple[int, int, Lid]:
        """A new box: its inode, its handle, what the handle is."""
        data = self.create(b"box").data
        ino, fh = k.ENTRY_OUT.unpack_from(data)[0], k.OPEN_OUT.unpack_from(data, k.ENTRY_OUT.size)[0]
        lid = self.kernel.session.handles[fh]
        assert isinstance(lid, Lid)
        self.shelf.done.clear()
        return ino, fh, lid

    def setxattr(self, ino: int, name: bytes, value: bytes, flags: int = 0) -> Reply:
        return self.kernel.call(k.FUSE_SETXATTR, ino, k.GETXATTR_IN.pack(len(value), flags) + name + b"\0" + value)

    def getxattr(self, ino: int, name: bytes, room: int) -> Reply:
        return self.kernel.call(k.FUSE_GETXATTR, ino, k.GETXATTR_IN.pack(room, 0) + name + b"\0")

    def listxattr(self, ino: int, room: int) -> Reply:
        return self.kernel.call(k.FUSE_LISTXATTR, ino, k.GETXATTR_IN.pack(room, 0))


@pytest.fixture
def room() -> Room:
    return Room()


def test_create(room):
    """Goal: CREATE answers with an inode that counts as looked up, and a handle that works; both are let go again.
    Method: create, read, release, forget; the same name again."""
    kernel, flags = room.kernel, os.O_RDWR | os.O_CREAT | os.O_EXCL
    reply = room.create(b"box", flags)
    entry, opened = reply.data[: k.ENTRY_OUT.size], reply.data[k.ENTRY_OUT.size :]
    ino = k.ENTRY_OUT.unpack(entry)[0]
    fh, open_flags, _ = k.OPEN_OUT.unpack(opened)
    assert room.shelf.done == [("create", b"box", stat.S_IFREG | 0o644, flags)]
    assert entry[8:] == kernel.lookup(ROOT, "box").data[8:] and open_flags == k.FOPEN_DIRECT_IO
    assert room.shelf.children[b"box"].links == 2
    assert kernel.read(fh, 0, 1) == Reply(0, b"")
    assert kernel.call(k.FUSE_RELEASE, ino, k.RELEASE_IN.pack(fh, 0, 0, 0)) == Reply(0, b"")
    assert kernel.read(fh, 0, 1).error == errno.EBADF
    assert room.create(b"box") == Reply(errno.EEXIST, b"")
    kernel.send(k.FUSE_FORGET, ino, k.FORGET_IN.pack(2))
    assert kernel.call(k.FUSE_GETATTR, ino, bytes(16)).error == errno.ESTALE
    assert len(kernel.session.handles) == 0


def test_mknod(room):
    """Goal: mknod(2) of a regular file makes one and leaves nothing open; of anything else is refused.
    Method: each type of file."""
    kernel = room.kernel
    reply = kernel.call(k.FUSE_MKNOD, ROOT, k.MKNOD_IN.pack(stat.S_IFREG | 0o600, 0, 0, 0) + b"box\0")
    assert k.ENTRY_OUT.unpack(reply.data)[0] == kernel.walk("box")
    assert room.shelf.done == [("create", b"box", stat.S_IFREG | 0o600, os.O_WRONLY | os.O_EXCL), ("release",)]
    for kind in (stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK):
        assert kernel.call(k.FUSE_MKNOD, ROOT, k.MKNOD_IN.pack(kind, 0, 0, 0) + b"other\0").error == errno.EPERM
    assert len(kernel.session.handles) == 0 and list(room.shelf.children) == [b"box"]


def test_directories(room):
    """Goal: MKDIR, UNLINK and RMDIR name what they change; RENAME both names and both directories.
    Method: each once, RENAME with and without flags, and into a directory that nobody knows."""
    kernel, shelf = room.kernel, room.shelf
    ino = k.ENTRY_OUT.unpack(kernel.call(k.FUSE_MKDIR, ROOT, k.MKDIR_IN.pack(0o750, 0o022) + b"sub\0").data)[0]
    assert ino == kernel.walk("sub") and kernel.names("sub") == [".", ".."]
    sub = shelf.children[b"sub"]
    for opcode, start in ((k.FUSE_RENAME, k.RENAME_IN.pack(ino)), (k.FUSE_RENAME2, k.RENAME2_IN.pack(ino, 1, 0))):
        assert kernel.call(opcode, ROOT, start + b"old\0new\0") == Reply(errno.EXDEV, b"")
    assert kernel.call(k.FUSE_RENAME, ROOT, k.RENAME_IN.pack(4711) + b"old\0new\0").error == errno.ESTALE
    assert kernel.call(k.FUSE_RMDIR, ROOT, b"sub\0") == Reply(0, b"")
    assert kernel.call(k.FUSE_UNLINK, ROOT, b"box\0") == Reply(0, b"")
    moved = ("rename", b"old", sub, b"new")
    assert shelf.done == [("mkdir", b"sub", 0o750), moved, moved, ("rmdir", b"sub"), ("unlink", b"box")]


NAMED = [
    (k.FUSE_CREATE, k.CREATE_IN.pack(0, 0, 0, 0)),
    (k.FUSE_MKNOD, k.MKNOD_IN.pack(stat.S_IFREG, 0, 0, 0)),
    (k.FUSE_MKDIR, k.MKDIR_IN.pack(0, 0)),
    (k.FUSE_UNLINK, b""),
    (k.FUSE_RMDIR, b""),
    (k.FUSE_RENAME, k.RENAME_IN.pack(ROOT)),
    (k.FUSE_RENAME, k.RENAME_IN.pack(ROOT) + b"old\0"),
    (k.FUSE_GETXATTR, k.GETXATTR_IN.pack(0, 0)),
    (k.FUSE_SETXATTR, k.GETXATTR_IN.pack(0, 0)),
    (k.FUSE_REMOVEXATTR, b""),
]


@pytest.mark.parametrize(("opcode", "start"), NAMED)
def test_names_that_are_too_long(room, opcode, start):
    """Goal: no node is bothered with a name that no file can have.  Method: 256 bytes in each request with a name."""
    assert room.kernel.call(opcode, ROOT, start + LONG + b"\0") == Reply(errno.ENAMETOOLONG, b"")
    assert room.shelf.done == []


def test_setattr(room):
    """Goal: the node is told size and mode, and whether an owner is asked for whom it has; ftruncate goes to the handle.
    Method: SETATTR of each, with the session's uid and gid and with others; the mode is the new one afterwards."""
    kernel = room.kernel
    kernel.session.uid, kernel.session.gid = 1001, 1002
    ino, fh, _ = room.box()

    def change(valid: int, handle: int = 0, uid: int = 1001, gid: int = 1002) -> Reply:
        times = [7, 8, 9, 1, 2, 3]
        body = k.SETATTR_IN.pack(valid, 0, handle, 123, 5, *times, 0o100654, 0, uid, gid, 0)
        return kernel.call(k.FUSE_SETATTR, ino, body)

    owner = k.FATTR_UID | k.FATTR_GID
    assert k.ATTR_OUT.unpack(change(k.FATTR_MODE).data)[12] == stat.S_IFREG | 0o654
    change(owner)
    change(owner, uid=0)
    change(owner, gid=0)
    change(k.FATTR_UID, gid=0)
    change(k.FATTR_SIZE | k.FATTR_FH, handle=fh)
    change(k.FATTR_SIZE | k.FATTR_FH, handle=4711)
    told = [(*what[:3], what[4]) if what[0] == "setattr" else what for what in room.shelf.done]
    assert told == [
        ("setattr", k.FATTR_MODE, 123, True), ("setattr", owner, 123, True), ("setattr", owner, 123, False),
        ("setattr", owner, 123, False), ("setattr", k.FATTR_UID, 123, True), ("ftruncate", 123),
        ("setattr", k.FATTR_SIZE | k.FATTR_FH, 123, True),
    ]  # fmt: skip


def test_xattrs(room):
    """Goal: a value is set, asked for by length and read, listed and removed, also the empty and the longest one.
    Method: SETXATTR in the short form, GETXATTR and LISTXATTR with no room, exactly enough and one byte less."""
    ino, _, _ = room.box()
    values = {b"user.a": b"", b"user.b": bytes(range(256)), b"user.c": b"x" * 65536}
    for flags, (name, value) in enumerate(values.items()):
        assert room.setxattr(ino, name, value, flags) == Reply(0, b"")
        assert room.getxattr(ino, name, 0).data == k.GETXATTR_OUT.pack(len(value), 0)
        for more in (0, 1):
            if len(value) + more:
                assert room.getxattr(ino, name, len(value) + more) == Reply(0, value)
        if len(value) > 1:
            assert room.getxattr(ino, name, len(value) - 1) == Reply(errno.ERANGE, b"")
    assert room.shelf.done == [("setxattr", name, len(v), i) for i, (name, v) in enumerate(values.items())]
    listed = b"user.a\0user.b\0user.c\0"
    assert room.listxattr(ino, 0).data == k.GETXATTR_OUT.pack(len(listed), 0)
    assert room.listxattr(ino, len(listed)).data == listed
    assert room.listxattr(ino, len(listed) - 1).error == errno.ERANGE
    assert room.kernel.call(k.FUSE_REMOVEXATTR, ino, b"user.b\0") == Reply(0, b"")
    assert room.kernel.call(k.FUSE_REMOVEXATTR, ino, b"user.b\0").error == errno.ENODATA
    assert room.getxattr(ino, b"user.b", 0).error == errno.ENODATA


@pytest.mark.parametrize(("claims", "sent"), [(3, b"ab"), (3, b"abcd"), (0, b"a"), (2**32 - 1, b"")])
def test_xattr_of_another_length(room, claims, sent):
    """Goal: a value of another length than the request says is refused.  Method: one byte less, one more, and nonsense."""
    ino, _, _ = room.box()
    body = k.GETXATTR_IN.pack(claims, 0) + b"user.a\0" + sent
    assert room.kernel.call(k.FUSE_SETXATTR, ino, body) == Reply(errno.EINVAL, b"")
    assert room.shelf.done == []


def test_a_node_without_xattrs(room):
    """Goal: where there are none the answers are those of a file without; never ENOSYS, after which Linux would not ask
    any node of the mount again.  Method: all four on the root."""
    assert room.getxattr(ROOT, b"security.capability", 0).error == errno.ENODATA
    assert room.listxattr(ROOT, 0).data == k.GETXATTR_OUT.pack(0, 0)
    assert room.listxattr(ROOT, 100) == Reply(0, b"")
    assert room.setxattr(ROOT, b"user.a", b"x").error == errno.EOPNOTSUPP
    assert room.kernel.call(k.FUSE_REMOVEXATTR, ROOT, b"user.a\0").error == errno.ENODATA


def test_flush(room):
    """Goal: close(2) gets the handle's answer, also its error; a node that has none says yes.
    Method: FLUSH of a box, with and without error, and of a plain node."""
    ino, fh, lid = room.box()
    body = k.FLUSH_IN.pack(fh, 0, 0, 0)
    assert room.kernel.call(k.FUSE_FLUSH, ino, body) == Reply(0, b"")
    lid.error = errno.ENOSPC
    assert room.kernel.call(k.FUSE_FLUSH, ino, body) == Reply(errno.ENOSPC, b"")
    room.shelf.add("plain", Node())
    plain = room.kernel.handle("plain")
    assert room.kernel.call(k.FUSE_FLUSH, ino, k.FLUSH_IN.pack(plain, 0, 0, 0)) == Reply(0, b"")
    assert room.shelf.done == [("flush",)]


def test_poll(room):
    """Goal: poll answers with what holds now, and is announced under its own number when the node says so.
    Method: not ready, with and without a wish to be told; ready; a node that knows no poll is always ready."""
    kernel = room.kernel
    ino, fh, lid = room.box()

    def poll(kh: int, flags: int, handle: int = fh) -> int:
        return int(k.POLL_OUT.unpack(kernel.call(k.FUSE_POLL, ino, k.POLL_IN.pack(handle, kh, flags, 0xFFFF)).data)[0])

    assert poll(7, 0) == 0 and lid.waiting == []
    assert poll(2**64 - 1, k.FUSE_POLL_SCHEDULE_NOTIFY) == 0 and lid.waiting == [2**64 - 1]
    assert kernel.notices == []
    lid.ready = True
    kernel.session.notify_poll(lid.waiting.pop())
    assert kernel.notices == [(k.FUSE_NOTIFY_POLL, k.NOTIFY_POLL_WAKEUP_OUT.pack(2**64 - 1))]
    assert poll(7, 0) == select.POLLIN
    room.shelf.add("plain", Node())
    assert poll(8, k.FUSE_POLL_SCHEDULE_NOTIFY, kernel.handle("plain")) == POLL_ALWAYS == 0x145


@pytest.mark.parametrize("flags", [0, os.O_RDWR, os.O_NONBLOCK | os.O_RDWR, 2**32 - 1])
def test_read_knows_the_flags(room, flags):
    """Goal: a node sees the flags that the file has at that moment, as fcntl set them.  Method: READ with each."""
    _, fh, _ = room.box()
    assert not room.kernel.call(k.FUSE_READ, 0, k.READ_IN.pack(fh, 0, 10, 0, 0, flags, 0)).error
    assert room.shelf.done == [("read", flags)]


def test_listing_looks_as_late_as_it_can(room):
    """Goal: a long directory costs as much as is read of it, at most READDIR_MOST at a time, and vanished ones are left out.
    Method: entries that count how far they were asked for; requests of 64 bytes and of a megabyte."""
    asked = []

    class Long(Directory):
        def entries(self):
            for i in range(5000):
                asked.append(i)
                yield b"%08d" % i, Node()

    room.shelf.children[b"long"] = Long()
    kernel, ino = room.kernel, room.kernel.walk("long")
    fh = k.OPEN_OUT.unpack(kernel.call(k.FUSE_OPENDIR, ino, bytes(8)).data)[0]
    assert asked == []

    def readdir(offset: int, size: int) -> bytes:
        return kernel.call(k.FUSE_READDIR, ino, k.READ_IN.pack(fh, offset, size, 0, 0, 0, 0)).data

    assert len(readdir(0, 64)) == 64 and len(asked) <= 1
    assert len(readdir(2, MIB)) <= READDIR_MOST and len(asked) <= READDIR_MOST // 32 + 1
    assert readdir(2**63, MIB) == b"" and len(asked) == 5000, "a place that only lseek(2) can ask for"
    assert readdir(5001, MIB) == k.pack_dirent(0xFFFFFFFF, 5002, k.DT_REG, b"00004999")
    assert len(asked) == 5000
