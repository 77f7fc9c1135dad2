"""tree.py: what a file under the mount is, for the session: one Node class whose operations refuse by default.

A node raises OSError with the errno that the caller shall see. Operations that may finish later (a disk's) answer through
the session themselves; all others return what the session then sends. The tree holds its nodes; the session only numbers
them. read, write, fsync, fallocate, flush, poll, ioctl, interrupt and release are asked of what open() or create() returned
as the handle, which may be the node itself or an object of its own; so is a setattr that came with the handle (ftruncate,
fchmod).
"""

from __future__ import annotations

import errno
import os
import select
import stat
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from xenfs.fuse.kernel import FOPEN_DIRECT_IO

POLL_ALWAYS = select.POLLIN | select.POLLRDNORM | select.POLLOUT | select.POLLWRNORM  # the kernel's DEFAULT_POLLMASK
NAME_MAX = 255  # no file has a longer name

if TYPE_CHECKING:
    from xenfs.fuse.session import Session


class Opened(NamedTuple):
    """What open() made: the object that serves the handle, FOPEN_* flags, and with FOPEN_PASSTHROUGH the backing id of the
    file that mmap(2) of the handle maps."""

    handle: Node
    flags: int
    backing_id: int = 0


class Ioctl(NamedTuple):
    """An ioctl(2) that waits for its answer: session.send_ioctl(), or an OSError.

    `data` is what the kernel read at `arg` because the number says so (_IOC_WRITE), and at most `out_size` bytes go back
    there (_IOC_READ). `pid` is the caller's thread, 0 if it is in no pid namespace of ours; it exists until the answer.
    `uid` is its user.
    """

    session: Session
    unique: int
    pid: int
    uid: int
    command: int
    arg: int
    data: bytes
    out_size: int


class Change(NamedTuple):
    """What SETATTR asks for: `valid` (FATTR_*) says which of them, times are left out."""

    valid: int
    size: int
    mode: int
    same_owner: bool  # what FATTR_UID and FATTR_GID ask for is so already


def refuse(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Node:
    """One file, directory or link. `mode` has the type; `size` is asked for at every GETATTR."""

    mode = stat.S_IFREG | 0o400
    gid: int | None = None  # None: that of the mount
    nlink = 1
    attr_timeout_s = 0
    links = 0  # how many LOOKUPs the kernel remembers; kept by the session
    ino = 0  # given by the session at the first LOOKUP

    @property
    def size(self) -> int:
        return 0

    @property
    def blocks(self) -> int:
        """Of 512 bytes, as du(1) counts them."""
        return -(-self.size // 512)

    def get_mode(self) -> int:
        """For attributes: `mode`, or with permission bits that can change."""
        return self.mode

    def setattr(self, change: Change) -> None:
        raise refuse(errno.EPERM)

    # --- directories -----------------------------------------------------------------------------------------------------

    def lookup(self, name: bytes) -> Node | None:
        """The child of that name, or None."""
        raise refuse(errno.ENOTDIR)

    def entries(self) -> Iterable[tuple[bytes, Node]]:
        """The children of this moment, though it may look at each when it is asked for."""
        raise refuse(errno.ENOTDIR)

    def create(self, name: bytes, mode: int, flags: int) -> tuple[Node, Opened]:
        """The file of that name, open. Linux knew of none; with O_EXCL in `flags` one that is there is EEXIST."""
        raise refuse(errno.EPERM)

    def mkdir(self, name: bytes, mode: int) -> Node:
        raise refuse(errno.EPERM)

    def unlink(self, name: bytes) -> None:
        raise refuse(errno.EPERM)

    def rmdir(self, name: bytes) -> None:
        raise refuse(errno.EPERM)

    def rename(self, name: bytes, target: Node, new_name: bytes) -> None:
        """EXDEV makes mv(1) copy and remove."""
        raise refuse(errno.EPERM)

    # --- links, extended attributes --------------------------------------------------------------------------------------

    def readlink(self) -> bytes:
        raise refuse(errno.EINVAL)

    def getxattr(self, name: bytes) -> bytes:
        """Not ENOSYS, here and below: Linux would ask no node of the mount again."""
        raise refuse(errno.ENODATA)

    def setxattr(self, name: bytes, value: bytes, flags: int) -> None:
        """`flags`: os.XATTR_CREATE, os.XATTR_REPLACE."""
        raise refuse(errno.EOPNOTSUPP)

    def listxattr(self) -> list[bytes]:
        return []

    def removexattr(self, name: bytes) -> None:
        raise refuse(errno.ENODATA)

    # --- open files ------------------------------------------------------------------------------------------------------

    def open(self, flags: int) -> Opened:
        """O_TRUNC is a setattr() of the size that follows at once, of the node."""
        return Opened(self, 0)

    def read(self, session: Session, unique: int, offset: int, size: int, flags: int) -> None:
        """Answer with session.send_data() now or later. `flags` are the file's at this moment: O_NONBLOCK, say."""
        raise refuse(errno.EINVAL)

    def write(self, session: Session, unique: int, offset: int, size: int, flags: int) -> None:
        """The data is in session.landing. Answer with session.send_written() now or later."""
        raise refuse(errno.EACCES)

    def fsync(self, session: Session, unique: int) -> None:
        session.send_ok(unique)

    def fallocate(self, session: Session, unique: int, offset: int, length: int, mode: int) -> None:
        raise refuse(errno.EOPNOTSUPP)

    def flush(self, session: Session, unique: int) -> None:
        """A descriptor was closed, and close(2) waits for the answer. Others may remain: `echo > file` closes one first."""
        session.send_ok(unique)

    def poll(self, session: Session, kh: int, schedule: bool) -> int:
        """POLL* that hold now. If `schedule`, the node calls session.notify_poll(kh) once when they have changed."""
        return POLL_ALWAYS

    def ioctl(self, request: Ioctl) -> None:
        """Answer with session.send_ioctl() now or later."""
        raise refuse(errno.ENOTTY)

    def interrupt(self, unique: int) -> bool:
        """The caller of a request that is not answered yet wants out; True if it is given up (answered EINTR, or soon)."""
        return False

    def release(self) -> None:
        """What open() or create() made is gone, with all its descriptors. Nobody waits for this, or hears of errors."""

    def landing(self) -> tuple[memoryview, memoryview] | None:
        """Where the data of the next WRITE shall land: 64 KiB, and what follows it. None: anywhere."""
        return None


class Directory(Node):
    """A directory with a fixed, or slowly changing, set of children."""

    mode = stat.S_IFDIR | 0o555
    nlink = 2

    def __init__(self, children: dict[str, Node] | None = None, *, private: bool = False) -> None:
        if private:  # only for who serves the mount
            self.mode = stat.S_IFDIR | 0o500
        self.children = {name.encode(): node for name, node in (children or {}).items()}

    def lookup(self, name: bytes) -> Node | None:
        return self.children.get(name)

    def entries(self) -> Iterable[tuple[bytes, Node]]:
        return list(self.children.items())

    def add(self, name: str, node: Node) -> Node:
        self.children[name.encode()] = node
        return node

    def remove(self, name: str) -> None:
        self.children.pop(name.encode(), None)


class Link(Node):
    """A symbolic link."""

    mode = stat.S_IFLNK | 0o777

    def __init__(self, target: str) -> None:
        self.target = target.encode()

    @property
    def size(self) -> int:
        return len(self.target)

    def readlink(self) -> bytes:
        return self.target


class Snapshot(Node):
    """An open text file: what it said when it was opened."""

    def __init__(self, text: bytes) -> None:
        self.text = text

    def read(self, session: Session, unique: int, offset: int, size: int, flags: int) -> None:
        session.send_data(unique, [self.text[offset : offset + size]])


class Bytes(Node):
    """A small computed file. Like a file of procfs it has no size: asking for it must not cost what reading it costs."""

    def text(self) -> bytes:
        raise NotImplementedError

    def open(self, flags: int) -> Opened:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise refuse(errno.EACCES)
        return Opened(Snapshot(self.text()), FOPEN_DIRECT_IO)
