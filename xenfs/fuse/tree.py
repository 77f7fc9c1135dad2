"""tree.py: what a file under the mount is, for the session: one Node class whose operations refuse by default.

A node raises OSError with the errno that the caller shall see. Operations that finish later (a disk's) answer through the
session themselves; all others return what the session then sends. The tree holds its nodes; the session only numbers them.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from xenfs.fuse.kernel import FOPEN_DIRECT_IO

if TYPE_CHECKING:
    from xenfs.fuse.session import Session


class Opened(NamedTuple):
    """What open() made: the object that serves the handle, and FOPEN_* flags."""

    handle: Node
    flags: int


def refuse(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Node:
    """One file, directory or link. `mode` has the type; `size` is asked for at every GETATTR."""

    mode = stat.S_IFREG | 0o400
    nlink = 1
    attr_timeout_s = 0
    links = 0  # how many LOOKUPs the kernel remembers; kept by the session
    ino = 0  # given by the session at the first LOOKUP

    @property
    def size(self) -> int:
        return 0

    def lookup(self, name: bytes) -> Node | None:
        """The child of that name, or None."""
        raise refuse(errno.ENOTDIR)

    def entries(self) -> Iterable[tuple[bytes, Node]]:
        raise refuse(errno.ENOTDIR)

    def readlink(self) -> bytes:
        raise refuse(errno.EINVAL)

    def open(self, flags: int) -> Opened:
        return Opened(self, 0)

    def read(self, session: Session, unique: int, offset: int, size: int) -> None:
        """Answer with session.send_data() now or later."""
        raise refuse(errno.EINVAL)

    def write(self, session: Session, unique: int, offset: int, size: int, flags: int) -> None:
        """The data is in session.landing. Answer with session.send_written() now or later."""
        raise refuse(errno.EACCES)

    def fsync(self, session: Session, unique: int) -> None:
        session.send_ok(unique)

    def fallocate(self, session: Session, unique: int, offset: int, length: int, mode: int) -> None:
        raise refuse(errno.EOPNOTSUPP)

    def setattr(self, valid: int, size: int) -> None:
        """A change of the attributes in `valid` (FATTR_*)."""
        raise refuse(errno.EPERM)

    def interrupt(self, unique: int) -> bool:
        """The caller of a request that is not answered yet wants out; True if it is given up (answered EINTR, or soon)."""
        return False

    def release(self) -> None:
        """A handle that open() made is gone."""

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

    def read(self, session: Session, unique: int, offset: int, size: int) -> None:
        session.send_data(unique, [self.text[offset : offset + size]])


class Bytes(Node):
    """A small computed file. Like a file of procfs it has no size: asking for it must not cost what reading it costs."""

    def text(self) -> bytes:
        raise NotImplementedError

    def open(self, flags: int) -> Opened:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise refuse(errno.EACCES)
        return Opened(Snapshot(self.text()), FOPEN_DIRECT_IO)
