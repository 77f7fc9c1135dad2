"""session.py: the FUSE protocol on bytes: request in, node asked, reply out. No descriptor, no waiting.

serve.py reads a request into `buffers()` and calls receive(); replies leave through `send`, a list of buffers at a time.
READ and WRITE are taken first and by the shortest way; everything else goes through OPCODES. A WRITE's data lands where
the node that was last written wants it, so that it is in the guest's pages before anyone looked at it; if the guess was
wrong the node copies it.

Invariant: each request that wants a reply gets exactly one. Errors are negative errnos, from OSError of the nodes.
"""

from __future__ import annotations

import errno
import logging
import stat
from collections.abc import Callable
from struct import Struct
from struct import error as StructError
from typing import Generic, TypeVar

from xenfs.fuse import kernel as k
from xenfs.fuse.tree import Node

log = logging.getLogger("xenfs.fuse")

MAX_WRITE = 1 << 20
HEADER_BYTES = 80  # fuse_in_header and fuse_read_in or fuse_write_in, which have the same shape
SMALL_LANDING = 64 * 1024
READDIR_MOST = 64 * 1024
NAME_MAX = 255
# fuse_in_header followed by fuse_read_in / fuse_write_in
_TRANSFER = Struct("<IIQQIIIHHQQIIQII")
_NEGATIVE_TIMEOUT_S = 0
_READ, _WRITE = k.FUSE_READ, k.FUSE_WRITE  # compared with every request
_ZEROES = memoryview(bytes(MAX_WRITE))
_NO_REPLY = frozenset({k.FUSE_FORGET, k.FUSE_BATCH_FORGET, k.FUSE_INTERRUPT})

Buffers = list[bytes | bytearray | memoryview]
T = TypeVar("T")


class _Opened(dict[int, T], Generic[T]):
    """What the kernel holds open. A handle that was never given out, or was released, is EBADF."""

    def __missing__(self, handle: int) -> T:
        raise OSError(errno.EBADF, "no such handle")


class Session:
    """One mounted tree. `send(buffers)` writes one reply; `root` is the node of the mount point."""

    def __init__(self, root: Node, send: Callable[[Buffers], None], uid: int = 0, gid: int = 0) -> None:
        self.root = root
        self.send = send
        self.uid, self.gid = uid, gid
        self.nodes: dict[int, Node] = {k.FUSE_ROOT_ID: root}
        root.ino, root.links = k.FUSE_ROOT_ID, 1
        self.handles: _Opened[Node] = _Opened()
        self.directories: _Opened[list[bytes]] = _Opened()
        self._next_ino = k.FUSE_ROOT_ID + 1
        self._next_handle = 1
        self.header = bytearray(HEADER_BYTES)
        scratch = memoryview(bytearray(MAX_WRITE))
        self._scratch = (scratch[:SMALL_LANDING], scratch[SMALL_LANDING:])
        self.landing = self._scratch
        self.writer: Node | None = None  # the node that was written last
        self.batch_written = 0  # bytes, since serve.py began the batch

    # --- in ----------------------------------------------------------------------------------------------------------

    def buffers(self) -> Buffers:
        """Where the next request goes: the header, and room for a WRITE's data."""
        if self.writer is not None:
            self.landing = self.writer.landing() or self._scratch
        return [self.header, *self.landing]

    def receive(self, length: int) -> None:
        """One request of `length` bytes is in buffers()."""
        (_, opcode, unique, ino, _, _, _, _, _, fh, offset, size, _, _, flags, _) = _TRANSFER.unpack_from(self.header)
        try:
            if opcode == _READ:
                if length < HEADER_BYTES:
                    raise OSError(errno.EINVAL, "short request")
                self.handles[fh].read(self, unique, offset, size)
            elif opcode == _WRITE:
                node = self.handles[fh]
                self.batch_written += size
                if length != HEADER_BYTES + size:
                    raise OSError(errno.EIO, "a write of another length than it says")
                if node is self.writer:
                    node.write(self, unique, offset, size, flags)
                else:
                    self._write_elsewhere(node, unique, offset, size, flags)
            else:
                self._dispatch(opcode, unique, ino, self._body(length))
        except OSError as error:
            if opcode not in _NO_REPLY:
                self.send_error(unique, error.errno or errno.EIO)

    def _write_elsewhere(self, node: Node, unique: int, offset: int, size: int, flags: int) -> None:
        """The guess was wrong: what landed in the pages of one guest's disk was meant for another's."""
        try:
            node.write(self, unique, offset, size, flags)
        finally:
            self._wipe(size)
            self.writer = node

    def _wipe(self, length: int) -> None:
        """Take back what landed in a guest's pages and is none of its business."""
        if self.landing is not self._scratch:
            small, large = self.landing
            first = min(length, SMALL_LANDING)
            small[:first] = _ZEROES[:first]
            large[: length - first] = _ZEROES[: length - first]

    def _body(self, length: int) -> bytes:
        """What follows fuse_in_header."""
        rest = max(0, length - HEADER_BYTES)
        small, large = self.landing
        body = bytes(self.header[k.IN_HEADER.size : min(length, HEADER_BYTES)])
        if rest:
            body += bytes(small[:rest]) + bytes(large[: max(0, rest - SMALL_LANDING)])
            self._wipe(rest)
        return body

    def _dispatch(self, opcode: int, unique: int, ino: int, body: bytes) -> None:
        handler = OPCODES.get(opcode)
        if handler is None:
            raise OSError(errno.ENOSYS, "not implemented")
        try:
            handler(self, unique, ino, body)
        except StructError as error:
            raise OSError(errno.EINVAL, "short request") from error

    # --- out ---------------------------------------------------------------------------------------------------------

    def send_data(self, unique: int, buffers: Buffers) -> None:
        length = k.OUT_HEADER.size
        for buffer in buffers:
            length += len(buffer)
        self.send([k.OUT_HEADER.pack(length, 0, unique), *buffers])

    def send_written(self, unique: int, size: int) -> None:
        self.send([k.OUT_HEADER.pack(24, 0, unique) + k.WRITE_OUT.pack(size, 0)])

    def send_ok(self, unique: int) -> None:
        self.send([k.OUT_HEADER.pack(16, 0, unique)])

    def send_error(self, unique: int, number: int) -> None:
        self.send([k.OUT_HEADER.pack(16, -number, unique)])

    def has_open(self, kind: type[Node]) -> bool:
        """Does somebody hold a file of that kind open?"""
        return any(isinstance(node, kind) for node in self.handles.values())

    def notify_size(self, node: Node) -> None:
        """A node's size changed: the kernel shall ask again. Attributes only (offset -1), which cannot wait for us."""
        if node.links:
            body = k.NOTIFY_INVAL_INODE_OUT.pack(node.ino, -1, 0)
            self.send([k.OUT_HEADER.pack(16 + len(body), k.FUSE_NOTIFY_INVAL_INODE, 0), body])

    # --- operations ----------------------------------------------------------------------------------------------------

    def _init(self, unique: int, ino: int, body: bytes) -> None:
        major, minor, readahead, flags = k.INIT_IN_SHORT.unpack_from(body)
        if major < 7:
            raise OSError(errno.EPROTO, "FUSE older than 7")
        wanted = (
            k.FUSE_ASYNC_READ | k.FUSE_BIG_WRITES | k.FUSE_ASYNC_DIO | k.FUSE_MAX_PAGES | k.FUSE_PARALLEL_DIROPS
        )
        reply = k.INIT_OUT.pack(
            7, min(minor, k.FUSE_KERNEL_MINOR_VERSION), readahead, flags & wanted,
            128, 96,  # max_background, congestion_threshold: asynchronous direct I/O counts as background
            MAX_WRITE, 1, MAX_WRITE // 4096, 0, 0, 0, 0,
        )  # fmt: skip
        self.send_data(unique, [reply])

    def _node(self, ino: int) -> Node:
        try:
            return self.nodes[ino]
        except KeyError:
            raise OSError(errno.ESTALE, "unknown node") from None

    def _attributes(self, node: Node) -> tuple[int, ...]:
        size = node.size
        blksize = 4096
        times = (0, 0, 0, 0, 0, 0)
        return (node.ino, size, -(-size // 512), *times, node.mode, node.nlink, self.uid, self.gid, 0, blksize, 0)

    def _remember(self, node: Node) -> None:
        if not node.ino:
            node.ino = self._next_ino
            self._next_ino += 1
        self.nodes[node.ino] = node
        node.links += 1

    def _lookup(self, unique: int, ino: int, body: bytes) -> None:
        name = body.rstrip(b"\0")
        if len(name) > NAME_MAX:
            raise OSError(errno.ENAMETOOLONG, "name too long")
        child = self._node(ino).lookup(name)
        if child is None:
            raise OSError(errno.ENOENT, "no such node")
        self._remember(child)
        timeout = child.attr_timeout_s
        entry = k.ENTRY_OUT.pack(child.ino, 0, _NEGATIVE_TIMEOUT_S, timeout, 0, 0, *self._attributes(child))
        self.send_data(unique, [entry])

    def _forget(self, unique: int, ino: int, body: bytes) -> None:
        self._forget_one(ino, k.FORGET_IN.unpack_from(body)[0])

    def _batch_forget(self, unique: int, ino: int, body: bytes) -> None:
        count, _ = k.BATCH_FORGET_IN.unpack_from(body)
        data = body[k.BATCH_FORGET_IN.size : k.BATCH_FORGET_IN.size + count * k.FORGET_ONE.size]
        for one, times in k.FORGET_ONE.iter_unpack(data):
            self._forget_one(one, times)

    def _forget_one(self, ino: int, times: int) -> None:
        node = self.nodes.get(ino)
        if node is not None and node is not self.root:
            node.links = max(0, node.links - times)
            if not node.links:
                del self.nodes[ino]

    def _getattr(self, unique: int, ino: int, body: bytes) -> None:
        node = self._node(ino)
        self.send_data(unique, [k.ATTR_OUT.pack(node.attr_timeout_s, 0, 0, *self._attributes(node))])

    def _setattr(self, unique: int, ino: int, body: bytes) -> None:
        valid, _, _, size, *_ = k.SETATTR_IN.unpack_from(body)
        self._node(ino).setattr(valid, size)
        self._getattr(unique, ino, body)

    def _readlink(self, unique: int, ino: int, body: bytes) -> None:
        self.send_data(unique, [self._node(ino).readlink()])

    def _open(self, unique: int, ino: int, body: bytes) -> None:
        flags, _ = k.OPEN_IN.unpack_from(body)
        opened = self._node(ino).open(flags)
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self.handles[handle] = opened.handle
        self.send_data(unique, [k.OPEN_OUT.pack(handle, opened.flags, 0)])

    def _release(self, unique: int, ino: int, body: bytes) -> None:
        fh = k.RELEASE_IN.unpack_from(body)[0]
        node = self.handles[fh]
        del self.handles[fh]
        if node is self.writer:
            self.writer, self.landing = None, self._scratch
        node.release()
        self.send_ok(unique)

    def _fsync(self, unique: int, ino: int, body: bytes) -> None:
        self.handles[k.FSYNC_IN.unpack_from(body)[0]].fsync(self, unique)

    def _fallocate(self, unique: int, ino: int, body: bytes) -> None:
        fh, offset, length, mode, _ = k.FALLOCATE_IN.unpack_from(body)
        self.handles[fh].fallocate(self, unique, offset, length, mode)

    def _statfs(self, unique: int, ino: int, body: bytes) -> None:
        self.send_data(unique, [k.KSTATFS.pack(0, 0, 0, 0, 0, 4096, NAME_MAX, 4096, 0)])

    def _opendir(self, unique: int, ino: int, body: bytes) -> None:
        """The listing is taken here, so that a reader sees one moment and offsets stay true."""
        node = self._node(ino)
        listing = [(b".", ino, stat.S_IFDIR), (b"..", ino, stat.S_IFDIR)]
        # a child's number is only known once it was looked up; readdir may show any that is not 0
        listing += [(name, child.ino or 0xFFFFFFFF, child.mode) for name, child in node.entries()]
        packed = [k.pack_dirent(number, i + 1, mode >> 12, name) for i, (name, number, mode) in enumerate(listing)]
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self.directories[handle] = packed
        self.send_data(unique, [k.OPEN_OUT.pack(handle, 0, 0)])

    def _readdir(self, unique: int, ino: int, body: bytes) -> None:
        fh, offset, size, *_ = k.READ_IN.unpack_from(body)
        packed, room, part = self.directories[fh], min(size, READDIR_MOST), []
        for entry in packed[offset:]:
            room -= len(entry)
            if room < 0:
                break
            part.append(entry)
        self.send_data(unique, [b"".join(part)])

    def _releasedir(self, unique: int, ino: int, body: bytes) -> None:
        self.directories.pop(k.RELEASE_IN.unpack_from(body)[0], None)
        self.send_ok(unique)

    def _interrupt(self, unique: int, ino: int, body: bytes) -> None:
        """Disk I/O on its way is not given up, as on any Linux block device; what only waits may be. No reply."""
        target = k.INTERRUPT_IN.unpack_from(body)[0]
        for node in set(self.handles.values()):
            if node.interrupt(target):
                return

    def _change_tree(self, unique: int, ino: int, body: bytes) -> None:
        """Files come and go with devices, not by request."""
        raise OSError(errno.EPERM, "the tree is made by the host")

    def _destroy(self, unique: int, ino: int, body: bytes) -> None:
        self.send_ok(unique)


OPCODES: dict[int, Callable[[Session, int, int, bytes], None]] = {
    k.FUSE_INIT: Session._init,
    k.FUSE_LOOKUP: Session._lookup,
    k.FUSE_FORGET: Session._forget,
    k.FUSE_BATCH_FORGET: Session._batch_forget,
    k.FUSE_GETATTR: Session._getattr,
    k.FUSE_SETATTR: Session._setattr,
    k.FUSE_READLINK: Session._readlink,
    k.FUSE_OPEN: Session._open,
    k.FUSE_RELEASE: Session._release,
    k.FUSE_FSYNC: Session._fsync,
    k.FUSE_FALLOCATE: Session._fallocate,
    k.FUSE_STATFS: Session._statfs,
    k.FUSE_OPENDIR: Session._opendir,
    k.FUSE_READDIR: Session._readdir,
    k.FUSE_RELEASEDIR: Session._releasedir,
    k.FUSE_INTERRUPT: Session._interrupt,
    k.FUSE_DESTROY: Session._destroy,
}
OPCODES.update(
    dict.fromkeys(
        (k.FUSE_CREATE, k.FUSE_MKNOD, k.FUSE_MKDIR, k.FUSE_SYMLINK, k.FUSE_LINK, k.FUSE_UNLINK, k.FUSE_RMDIR,
         k.FUSE_RENAME, k.FUSE_RENAME2),
        Session._change_tree,
    )
)  # fmt: skip
