"""storeshell.py: a shell at xenstore/, for tests without a mount: its system calls as Linux passes them on."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from tests.xenfs.machine import Kernel, Machine, Reply
from xenfs.fuse import kernel as k
from xenfs.nodes.openvalue import OpenValue
from xenfs.nodes.xenstore import StoreDirectory
from xenmodel.types import Domid
from xenmodel.xenstore.client import Client
from xenmodel.xenstore.connection import Connection
from xenmodel.xenstore.errors import XsErrno, XsError

WHERE = "/local/domain/1/data"


class File(NamedTuple):
    ino: int
    fh: int


class Shell:
    """A shell at the mount, in the guest's directory `data`. What can fail returns an errno, or 0."""

    def __init__(self, machine: Machine) -> None:
        self.kernel: Kernel = machine.kernel
        root = machine.world.root.children[b"xenstore"]
        assert isinstance(root, StoreDirectory)
        self.tree = root.tree
        self.store = machine.world.hypervisor.store.connect(Domid(0))
        self.guest = machine.world.hypervisor.store.connect(Domid(1))
        self.watcher = Client(machine.world.hypervisor.store.connect(Domid(0)))
        self.seen: list[bytes | None] = []  # what whom the watch told read, each time
        home = self.kernel.walk("xenstore/local/domain/1")
        assert self.kernel.call(k.FUSE_UNLINK, home, b"data\0") == Reply(0, b"")
        self.here = k.ENTRY_OUT.unpack(self.kernel.call(k.FUSE_MKDIR, home, k.MKDIR_IN.pack(0o755, 0) + b"data\0").data)[0]
        assert self.setxattr("", b"n1") == 0

    def find(self, name: str) -> int:
        return self.kernel.walk(f"xenstore{WHERE}/{name}".rstrip("/"))

    def split(self, name: str) -> tuple[int, bytes]:
        """The inode of the directory that a path below `data` ends in, and its last name with a NUL."""
        above, _, last = name.rpartition("/")
        return self.find(above), last.encode("latin-1") + b"\0"

    def lookup(self, name: str) -> int:
        ino, last = self.split(name)
        return self.kernel.call(k.FUSE_LOOKUP, ino, last).error

    def names(self, name: str = "") -> list[str]:
        return self.kernel.names(f"xenstore{WHERE}/{name}".rstrip("/"))

    def mode(self, name: str) -> int:
        return int(k.ATTR_OUT.unpack(self.kernel.call(k.FUSE_GETATTR, self.find(name), bytes(16)).data)[12])

    def is_directory(self, name: str) -> bool:
        return stat.S_ISDIR(self.mode(name))

    # --- files ---------------------------------------------------------------------------------------------------------

    def open(self, name: str, flags: int) -> File:
        """OPEN, or CREATE if Linux finds nothing."""
        if flags & os.O_CREAT and self.lookup(name):
            ino, last = self.split(name)
            reply = self.kernel.call(k.FUSE_CREATE, ino, k.CREATE_IN.pack(flags, 0o100644, 0o022, 0) + last)
            assert not reply.error, os.strerror(reply.error)
            return File(k.ENTRY_OUT.unpack_from(reply.data)[0], k.OPEN_OUT.unpack_from(reply.data, k.ENTRY_OUT.size)[0])
        assert not (error := self.lookup(name)), os.strerror(error)
        ino = self.find(name)
        reply = self.kernel.open(ino, flags & ~(os.O_CREAT | os.O_TRUNC))
        assert not reply.error, os.strerror(reply.error)
        if flags & os.O_TRUNC:
            assert self.setattr(name, k.FATTR_SIZE) == 0
        return File(ino, k.OPEN_OUT.unpack(reply.data)[0])

    @contextlib.contextmanager
    def redirect(self, name: str) -> Iterator[File]:
        """`command > name`: the command has a duplicate, the first descriptor is closed before it starts."""
        file = self.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.flush(file)
        yield file
        self.close(file)

    def flush(self, file: File) -> None:
        assert self.kernel.call(k.FUSE_FLUSH, file.ino, k.FLUSH_IN.pack(file.fh, 0, 0, 0)) == Reply(0, b"")

    def close(self, file: File) -> None:
        self.flush(file)
        assert self.kernel.call(k.FUSE_RELEASE, file.ino, k.RELEASE_IN.pack(file.fh, 0, 0, 0)) == Reply(0, b"")

    def write(self, file: File, offset: int, data: bytes, flags: int = 0) -> int:
        body = k.WRITE_IN.pack(file.fh, offset, len(data), 0, 0, flags, 0)
        reply = self.kernel.call(k.FUSE_WRITE, file.ino, body, data)
        assert reply.error or reply.data == k.WRITE_OUT.pack(len(data), 0)
        return reply.error

    def read(self, file: File) -> bytes:
        return self.kernel.read(file.fh, 0, 65536).data

    def handle(self, file: File) -> OpenValue:
        handle = self.kernel.session.handles[file.fh]
        assert isinstance(handle, OpenValue)
        return handle

    def setattr(self, name: str, valid: int, size: int = 0, fh: int = 0, mode: int = 0, uid: int = 0) -> int:
        body = k.SETATTR_IN.pack(valid, 0, fh, size, *[0] * 7, mode, 0, uid, 0, 0)
        return self.kernel.call(k.FUSE_SETATTR, self.find(name), body).error

    # --- names ---------------------------------------------------------------------------------------------------------

    def create(self, name: str, flags: int) -> int:
        """CREATE alone, of what Linux may know, and closed at once."""
        ino, last = self.split(name)
        reply = self.kernel.call(k.FUSE_CREATE, ino, k.CREATE_IN.pack(flags, 0o100644, 0, 0) + last)
        if not reply.error:
            self.close(File(ino, k.OPEN_OUT.unpack_from(reply.data, k.ENTRY_OUT.size)[0]))
        return reply.error

    def put(self, name: str, data: bytes) -> int:
        """`printf data > name`"""
        with self.redirect(name) as file:
            return self.write(file, 0, data)

    def mkdir(self, name: str) -> int:
        ino, last = self.split(name)
        return self.kernel.call(k.FUSE_MKDIR, ino, k.MKDIR_IN.pack(0o755, 0o022) + last).error

    def rmdir(self, name: str) -> int:
        return self.kernel.call(k.FUSE_RMDIR, *self.split(name)).error

    def unlink(self, name: str) -> int:
        return self.kernel.call(k.FUSE_UNLINK, *self.split(name)).error

    def chmod(self, name: str, mode: int) -> int:
        return self.setattr(name, k.FATTR_MODE, mode=mode)

    def setxattr(self, name: str, value: bytes, xattr: bytes = b"user.xenstore.perms", flags: int = 0) -> int:
        body = k.GETXATTR_IN.pack(len(value), flags) + xattr + b"\0" + value
        return self.kernel.call(k.FUSE_SETXATTR, self.find(name) if name else self.here, body).error

    def getxattr(self, name: str, xattr: bytes = b"user.xenstore.perms") -> bytes | int:
        reply = self.kernel.call(k.FUSE_GETXATTR, self.find(name), k.GETXATTR_IN.pack(4096, 0) + xattr + b"\0")
        return reply.error or reply.data

    # --- the store -----------------------------------------------------------------------------------------------------

    def store_value(self, name: str) -> bytes | None:
        return read(self.store, f"{WHERE}/{name}")

    def watch(self, name: str) -> None:
        """From now on `seen` gets the value with every event."""
        path = f"{WHERE}/{name}"
        self.watcher.watch(path, lambda _: self.seen.append(read(self.watcher.connection, path)))
        self.kernel.settle()
        self.seen.clear()


def read(connection: Connection, path: str) -> bytes | None:
    """The value, None if there is no node."""
    try:
        return connection.read(path)
    except XsError as error:
        assert error.errno is XsErrno.ENOENT
        return None
