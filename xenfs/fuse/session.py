"""session.py: the FUSE protocol on bytes: request in, node asked, reply out. No descriptor, no waiting.

serve.py reads a request into `buffers()` and calls receive(); replies leave through `send`, a list of buffers at a time.
READ and WRITE are taken first and by the shortest way; everything else goes through OPCODES of operations.py. A WRITE's
data lands where the node that was last written wants it, so that it is in the guest's pages before anyone looked at it; if
the guess was wrong the node copies it.

Invariant: each request that wants a reply gets exactly one. Errors are negative errnos, from OSError of the nodes.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from struct import Struct
from struct import error as StructError
from typing import Generic, TypeVar

from xenfs.fuse import kernel as k
from xenfs.fuse.operations import MAX_WRITE, OPCODES, Listing
from xenfs.fuse.tree import Node, Opened

log = logging.getLogger("xenfs.fuse")

HEADER_BYTES = 80  # fuse_in_header and fuse_read_in or fuse_write_in, which have the same shape
SMALL_LANDING = 64 * 1024
# fuse_in_header followed by fuse_read_in / fuse_write_in
_TRANSFER = Struct("<IIQQIIIHHQQIIQII")
_ENTRY_TIMEOUT_S = 0
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
        self.directories: _Opened[Listing] = _Opened()
        self.waiting: dict[int, Node] = {}  # requests without an answer, and the open file that was asked
        self._next_ino = k.FUSE_ROOT_ID + 1
        self._next_handle = 1
        self.header = bytearray(HEADER_BYTES)
        scratch = memoryview(bytearray(MAX_WRITE))
        self._scratch = (scratch[:SMALL_LANDING], scratch[SMALL_LANDING:])
        self.landing = self._scratch
        self.writer: Node | None = None  # the node that was written last
        self.on_passthrough: Callable[[], None] = lambda: None  # from now on files can have a backing id
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
                node = self.waiting[unique] = self.handles[fh]
                node.read(self, unique, offset, size, flags)
            elif opcode == _WRITE:
                node = self.waiting[unique] = self.handles[fh]
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
        self.waiting.pop(unique, None)
        length = k.OUT_HEADER.size
        for buffer in buffers:
            length += len(buffer)
        self.send([k.OUT_HEADER.pack(length, 0, unique), *buffers])

    def send_written(self, unique: int, size: int) -> None:
        self.waiting.pop(unique, None)
        self.send([k.OUT_HEADER.pack(24, 0, unique) + k.WRITE_OUT.pack(size, 0)])

    def send_ok(self, unique: int) -> None:
        self.waiting.pop(unique, None)
        self.send([k.OUT_HEADER.pack(16, 0, unique)])

    def send_ioctl(self, unique: int, result: int = 0, data: bytes = b"") -> None:
        """What ioctl(2) returns, an int32 (a negative errno makes it -1), and the bytes for the caller's structure."""
        self.waiting.pop(unique, None)
        body = k.IOCTL_OUT.pack(result, 0, 0, 0)
        self.send([k.OUT_HEADER.pack(16 + len(body) + len(data), 0, unique) + body, data])

    def send_error(self, unique: int, number: int) -> None:
        self.waiting.pop(unique, None)
        self.send([k.OUT_HEADER.pack(16, -number, unique)])

    def has_open(self, kind: type[Node]) -> bool:
        """Does somebody hold a file of that kind open?"""
        return any(isinstance(node, kind) for node in self.handles.values())

    def notify_size(self, node: Node) -> None:
        """A node's size changed: the kernel shall ask again. Attributes only (offset -1), which cannot wait for us."""
        if node.links:
            body = k.NOTIFY_INVAL_INODE_OUT.pack(node.ino, -1, 0)
            self.send([k.OUT_HEADER.pack(16 + len(body), k.FUSE_NOTIFY_INVAL_INODE, 0), body])

    def notify_poll(self, kh: int) -> None:
        """What poll() with `schedule` promised: the kernel shall ask again. One that it no longer knows is no error."""
        body = k.NOTIFY_POLL_WAKEUP_OUT.pack(kh)
        self.send([k.OUT_HEADER.pack(16 + len(body), k.FUSE_NOTIFY_POLL, 0), body])

    # --- what the kernel knows -----------------------------------------------------------------------------------------

    def node(self, ino: int) -> Node:
        try:
            return self.nodes[ino]
        except KeyError:
            raise OSError(errno.ESTALE, "unknown node") from None

    def attributes(self, node: Node) -> tuple[int, ...]:
        """An ATTR. No node has times."""
        blksize = 4096
        times = (0, 0, 0, 0, 0, 0)
        owner = (self.uid, self.gid if node.gid is None else node.gid)
        return (node.ino, node.size, node.blocks, *times, node.get_mode(), node.nlink, *owner, 0, blksize, 0)

    def entry(self, node: Node) -> bytes:
        """The ENTRY_OUT of a node, which the kernel knows once more from now on."""
        if not node.ino:
            node.ino = self._next_ino
            self._next_ino += 1
        self.nodes[node.ino] = node
        node.links += 1
        return k.ENTRY_OUT.pack(node.ino, 0, _ENTRY_TIMEOUT_S, node.attr_timeout_s, 0, 0, *self.attributes(node))

    def forget(self, ino: int, times: int) -> None:
        node = self.nodes.get(ino)
        if node is not None and node is not self.root:
            node.links = max(0, node.links - times)
            if not node.links:
                del self.nodes[ino]

    def opened(self, opened: Opened) -> bytes:
        """The OPEN_OUT of a new handle."""
        handle = self._number()
        self.handles[handle] = opened.handle
        return k.OPEN_OUT.pack(handle, opened.flags, opened.backing_id)

    def opened_directory(self, listing: Listing) -> bytes:
        """The same for a directory."""
        handle = self._number()
        self.directories[handle] = listing
        return k.OPEN_OUT.pack(handle, 0, 0)

    def asked(self, unique: int, handle: int) -> Node:
        """The open file that has to answer, which INTERRUPT asks until it has."""
        node = self.waiting[unique] = self.handles[handle]
        return node

    def released(self, handle: int) -> None:
        node = self.handles[handle]
        del self.handles[handle]
        if node is self.writer:
            self.writer, self.landing = None, self._scratch
        node.release()

    def _number(self) -> int:
        number, self._next_handle = self._next_handle, self._next_handle + 1
        return number
