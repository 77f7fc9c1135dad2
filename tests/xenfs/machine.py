"""What the tests of this folder share: a world without a mount, and Linux's part of the FUSE protocol.

`Kernel` puts the bytes of requests where a Session wants them and keeps its replies; there is no descriptor.
`Machine` is a World over storages that a test made itself, with a Kernel that talks to its tree.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple

from blockdev.blkfront import Blkfront
from blockdev.storage import Backing, DelayedStorage, Storage, StorageError
from xenfs.config import GuestConfig
from xenfs.diskspec import parse_disk
from xenfs.fuse import kernel as k
from xenfs.fuse.session import Buffers, Session
from xenfs.fuse.tree import Node
from xenfs.host import Guest, World

KIB, MIB = 1 << 10, 1 << 20
O_RDWR = os.O_RDWR


class Reply(NamedTuple):
    """A reply's `error` (0 or an errno, positive) and what followed the header."""

    error: int
    data: bytes


class Kernel:
    """One mount's kernel side. `replies` by unique, `order` of their arrival, `notices` for what has no unique."""

    def __init__(self, root: Node, world: World | None = None) -> None:
        self.session = Session(root, self._reply)
        self.world = world
        self.replies: dict[int, Reply] = {}
        self.order: list[int] = []
        self.notices: list[tuple[int, bytes]] = []
        self.unique = 0

    def _reply(self, buffers: Buffers) -> None:
        data = b"".join(bytes(buffer) for buffer in buffers)
        length, error, unique = k.OUT_HEADER.unpack_from(data)
        assert length == len(data), f"the header says {length} bytes, {len(data)} were sent"
        body = data[k.OUT_HEADER.size :]
        if not unique:
            self.notices.append((error, body))
            return
        assert unique not in self.replies, f"a second reply to {unique}"
        assert error <= 0, f"error {error} is not negative"
        assert not (error and body), "an error with a body"
        self.replies[unique] = Reply(-error, body)
        self.order.append(unique)

    # --- requests ------------------------------------------------------------------------------------------------------

    def put(self, request: bytes) -> None:
        """What readv() of /dev/fuse does with one request."""
        rest = memoryview(request)
        for buffer in self.session.buffers():
            count = min(len(rest), len(buffer))
            memoryview(buffer)[:count] = rest[:count]
            rest = rest[count:]
        assert not rest, f"{len(rest)} bytes too many for the buffers"
        self.session.receive(len(request))

    def send(self, opcode: int, ino: int, body: bytes = b"", data: bytes = b"") -> int:
        """Send a request and do not wait; its unique."""
        self.unique += 2  # the low bit is INTERRUPT's, as in Linux
        length = k.IN_HEADER.size + len(body) + len(data)
        self.put(k.IN_HEADER.pack(length, opcode, self.unique, ino, 0, 0, 1, 0, 0) + body + data)
        return self.unique

    def settle(self) -> None:
        while self.world is not None and self.world.kick():
            pass

    def wait(self, unique: int) -> Reply:
        self.settle()
        return self.replies.pop(unique)

    def call(self, opcode: int, ino: int, body: bytes = b"", data: bytes = b"") -> Reply:
        return self.wait(self.send(opcode, ino, body, data))

    # --- the usual ones ------------------------------------------------------------------------------------------------

    def lookup(self, ino: int, name: str) -> Reply:
        return self.call(k.FUSE_LOOKUP, ino, name.encode() + b"\0")

    def walk(self, path: str) -> int:
        """The inode of a path, looked up name by name."""
        ino = k.FUSE_ROOT_ID
        for name in path.split("/"):
            reply = self.lookup(ino, name)
            assert not reply.error, f"{path}: {os.strerror(reply.error)}"
            ino = k.ENTRY_OUT.unpack(reply.data)[0]
        return ino

    def open(self, ino: int, flags: int = os.O_RDONLY) -> Reply:
        return self.call(k.FUSE_OPEN, ino, k.OPEN_IN.pack(flags, 0))

    def handle(self, path: str, flags: int = os.O_RDONLY) -> int:
        reply = self.open(self.walk(path), flags)
        assert not reply.error, f"{path}: {os.strerror(reply.error)}"
        return int(k.OPEN_OUT.unpack(reply.data)[0])

    def send_read(self, fh: int, offset: int, size: int) -> int:
        return self.send(k.FUSE_READ, 0, k.READ_IN.pack(fh, offset, size, 0, 0, 0, 0))

    def send_write(self, fh: int, offset: int, data: bytes) -> int:
        return self.send(k.FUSE_WRITE, 0, k.WRITE_IN.pack(fh, offset, len(data), 0, 0, 0, 0), data)

    def send_fallocate(self, fh: int, offset: int, length: int, mode: int) -> int:
        return self.send(k.FUSE_FALLOCATE, 0, k.FALLOCATE_IN.pack(fh, offset, length, mode, 0))

    def send_fsync(self, fh: int) -> int:
        return self.send(k.FUSE_FSYNC, 0, k.FSYNC_IN.pack(fh, 0, 0))

    def read(self, fh: int, offset: int, size: int) -> Reply:
        return self.wait(self.send_read(fh, offset, size))

    def write(self, fh: int, offset: int, data: bytes) -> Reply:
        return self.wait(self.send_write(fh, offset, data))

    def fallocate(self, fh: int, offset: int, length: int, mode: int) -> Reply:
        return self.wait(self.send_fallocate(fh, offset, length, mode))

    def fsync(self, fh: int) -> Reply:
        return self.wait(self.send_fsync(fh))

    def text(self, path: str) -> str:
        """A small file, whole: what read(2) says until it says nothing."""
        fh, text = self.handle(path), b""
        while part := self.read(fh, len(text), MIB).data:
            text += part
        return text.decode()

    def names(self, path: str, room: int = 64 * KIB) -> list[str]:
        """A directory listing, asked for in pieces of `room` bytes."""
        ino = self.walk(path) if path else k.FUSE_ROOT_ID
        fh = k.OPEN_OUT.unpack(self.call(k.FUSE_OPENDIR, ino, k.OPEN_IN.pack(0, 0)).data)[0]
        names, offset = [], 0
        while part := self.call(k.FUSE_READDIR, ino, k.READ_IN.pack(fh, offset, room, 0, 0, 0, 0)).data:
            at = 0
            while at < len(part):
                _, offset, length, _ = k.DIRENT.unpack_from(part, at)
                names.append(part[at + k.DIRENT.size :][:length].decode())
                at += k.DIRENT.size + (length + 7 & ~7)
        assert self.call(k.FUSE_RELEASEDIR, ino, k.RELEASE_IN.pack(fh, 0, 0, 0)) == Reply(0, b"")
        return names


def config(name: str, disks: Mapping[str, str], memory_mib: int = 64) -> GuestConfig:
    """A guest with a disk per (vdev, rest of its specification); the targets are /NAME/VDEV."""
    specs = tuple(parse_disk(f"/{name}/{vdev},raw,{vdev},{rest}") for vdev, rest in disks.items())
    uuid = f"00000000-0000-4000-8000-{sum(name.encode()):012d}"
    return GuestConfig(f"{name}.cfg", name, uuid, memory_mib, memory_mib, disks=specs)


class Machine:
    """Guests with disks: {guest: {vdev: storage}}. Leave it by `with`: it must come down cleanly too."""

    def __init__(self, guests: Mapping[str, Mapping[str, Storage]], extra: str = "", seed: int | None = None) -> None:
        self.storages = {f"/{name}/{vdev}": s for name, disks in guests.items() for vdev, s in disks.items()}
        self.world = World(self._open)
        self.world.announce = lambda _line: None
        if seed is not None:
            self.world.hypervisor.order = random.Random(seed).randrange
        self.guests: dict[str, Guest] = {}
        for name, disks in guests.items():
            modes = {vdev: ("r" if storage.readonly else "w") + extra for vdev, storage in disks.items()}
            self.guests[name] = self.world.create(config(name, modes))
            self.world.settle()
        self.kernel = Kernel(self.world.root, self.world)

    def _open(self, backing: Backing) -> Storage:
        if backing.path not in self.storages:
            raise StorageError(f"cannot open disk image {backing.path}: there is none")
        return self.storages[backing.path]

    def front(self, guest: str, vdev: str) -> Blkfront:
        for owner, front in self.world.fronts():
            if owner.config.name == guest and front.handle == parse_disk(f"/x,raw,{vdev},w").vdev_number:
                return front
        raise LookupError(f"{guest} has no {vdev}")

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for storage in self.storages.values():
            while isinstance(storage, DelayedStorage) and storage.release(lambda _count: 0):
                self.kernel.settle()
        self.world.close()
