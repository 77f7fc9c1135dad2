"""disk.py: a blkfront disk as a file: FUSE requests to commands, completions to replies.

Aligned reads and writes are one command each, by the short way at the top. What does not fit (unaligned ends, zeroing,
hole punching) is a generator that owns one command and yields the steps it wants done. Both wait in `backlog` when
commands run out or when a range is being read, modified and written back.

As of a Linux block device: reads past the end are short, writes at or past it ENOSPC; O_TRUNC and times are accepted and
ignored; fsync is a flush. Punching a hole is a discard of the whole blocks inside and zeroes at the ragged ends; that a
discarded block reads as zeroes is the backend's doing (ours does it).
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Callable, Generator
from typing import NamedTuple

from blockdev.blkfront import Blkfront
from blockdev.command import LARGE_BYTES, SMALL_BYTES, Command
from xenfs.fuse.kernel import FATTR_GID, FATTR_MODE, FATTR_SIZE, FATTR_UID
from xenfs.fuse.session import Session
from xenfs.fuse.tree import Change, Node, Opened, refuse
from xenmodel.public.io.blkif import (
    BLKIF_OP_DISCARD,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_RSP_EOPNOTSUPP,
    SECTOR_SIZE,
)
from xenmodel.public.io.xenbus import XenbusState

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 0x01, 0x02, 0x10

Steps = Generator[tuple[int, int, int], None, None]  # (operation, byte offset, length)


class Waiting(NamedTuple):
    """A request that cannot start yet: it needs a command for `length` bytes, and nobody modifying `span` (if any).

    `alone`: it modifies, so nobody may be writing there either.
    """

    unique: int
    length: int
    span: tuple[int, int] | None
    start: Callable[[Command], None]
    alone: bool = False


class Disk(Node):
    """dev/xvda of one guest."""

    attr_timeout_s = 1

    def __init__(self, front: Blkfront) -> None:
        self.front = front
        self.session: Session | None = None
        self.bytes = 0
        self.block_mask = SECTOR_SIZE - 1
        self.backlog: deque[Waiting] = deque()
        self.stepping: dict[int, bool] = {}  # requests of many steps: was it interrupted?
        self.locked: list[tuple[int, int]] = []  # spans that a read-modify-write has for itself
        # bound once: looking a method up makes an object, and these are used by every request
        self._read_done, self._write_done, self._flush_done = self._reply_read, self._reply_written, self._reply_ok
        front.on_complete = lambda command: command.context(command)
        self.refresh()

    def refresh(self) -> None:
        """The device connected, or its size changed."""
        self.bytes = self.front.sectors * SECTOR_SIZE
        self.block_mask = self.front.sector_size - 1
        self.mode = stat.S_IFREG | (0o400 if self.front.readonly else 0o600)
        if self.session is not None:
            self.session.notify_size(self)

    @property
    def size(self) -> int:
        return self.bytes

    def setattr(self, change: Change) -> None:
        """As a block device takes O_TRUNC and times: without effect. It cannot grow, or change hands, from this side."""
        if change.valid & (FATTR_MODE | FATTR_UID | FATTR_GID):
            raise refuse(errno.EPERM)
        if change.valid & FATTR_SIZE and change.size > self.bytes:
            raise refuse(errno.EINVAL)

    def open(self, flags: int) -> Opened:
        if flags & os.O_ACCMODE != os.O_RDONLY and self.front.readonly:
            raise refuse(errno.EROFS)
        return Opened(self, 0)

    # --- reads and writes of whole blocks: the short way ---------------------------------------------------------------

    def read(self, session: Session, unique: int, offset: int, size: int, flags: int) -> None:
        self.session = session
        if offset + size > self.bytes:
            size = max(0, self.bytes - offset)
        if (offset | size) & self.block_mask or not size:
            self._slow_read(session, unique, offset, size)
            return
        command = self.front.take(size)
        if command is None:
            self._wait(Waiting(unique, size, None, lambda c: self._start_read(c, unique, offset, size)))
        else:
            self._start_read(command, unique, offset, size)

    def _start_read(self, command: Command, unique: int, offset: int, size: int) -> None:
        command.unique, command.size = unique, size
        command.context = self._read_done
        self.front.submit(command, BLKIF_OP_READ, offset // SECTOR_SIZE, size)

    def _reply_read(self, command: Command) -> None:
        session = self.session
        assert session is not None, "a request came through a session"
        if command.status:
            session.send_error(command.unique, errno.EIO)
        else:
            session.send_data(command.unique, [command.view[: command.size]])
        self._give(command)

    def write(self, session: Session, unique: int, offset: int, size: int, flags: int) -> None:
        self.session = session
        front, end = self.front, offset + size
        if front.readonly:
            raise refuse(errno.EROFS)
        if end > self.bytes:
            if offset >= self.bytes and size:
                raise refuse(errno.ENOSPC)
            end, size = self.bytes, max(0, self.bytes - offset)
        if (offset | size) & self.block_mask or not size:
            self._slow_write(session, unique, offset, size)
            return
        command = front.take(size)
        if command is None or (self.locked and self._is_locked(offset, end)):
            if command is not None:
                front.give(command)
            data = _landed(session, size)
            self._wait(Waiting(unique, size, (offset, end), lambda c: self._write_copy(c, unique, offset, data)))
            return
        small, large = session.landing
        if size <= SMALL_BYTES:
            if command.view is not small:
                command.view[:size] = small[:size]
        else:
            command.view[:SMALL_BYTES] = small
            if command.tail is not large:
                command.tail[: size - SMALL_BYTES] = large[: size - SMALL_BYTES]
        self._start_write(command, unique, offset, size)

    def _write_copy(self, command: Command, unique: int, offset: int, data: bytes) -> None:
        command.view[: len(data)] = data
        self._start_write(command, unique, offset, len(data))

    def _start_write(self, command: Command, unique: int, offset: int, size: int) -> None:
        command.unique, command.size = unique, size
        command.context = self._write_done
        self.front.submit(command, BLKIF_OP_WRITE, offset // SECTOR_SIZE, size)

    def _reply_written(self, command: Command) -> None:
        session = self.session
        assert session is not None, "a request came through a session"
        if command.status:
            session.send_error(command.unique, errno.EIO)
        else:
            session.send_written(command.unique, command.size)
        self._give(command)

    def landing(self) -> tuple[memoryview, memoryview] | None:
        """The pages of the commands that the next write will take. Not if their backend may be a stranger, who has them
        mapped: what lands there by a wrong guess is somebody else's."""
        front = self.front
        small, large = front.small.free, front.large.free
        if small and large and front.trusted and front.peer_domid == 0 and front.state is XenbusState.Connected:
            return small[-1].view, large[-1].tail
        return None

    # --- flush -----------------------------------------------------------------------------------------------------------

    def fsync(self, session: Session, unique: int) -> None:
        self.session = session
        command = None if self.backlog else self.front.take(0)
        if command is None:
            self._wait(Waiting(unique, 0, None, lambda command: self._start_flush(command, unique)))
        else:
            self._start_flush(command, unique)

    def _start_flush(self, command: Command, unique: int) -> None:
        command.unique, command.context = unique, self._flush_done
        self.front.flush(command)

    def _reply_ok(self, command: Command) -> None:
        assert self.session is not None, "a request came through a session"
        if command.status:
            self.session.send_error(command.unique, errno.EIO)
        else:
            self.session.send_ok(command.unique)
        self._give(command)

    # --- waiting ---------------------------------------------------------------------------------------------------------

    def _give(self, command: Command) -> None:
        command.context = None
        self.front.give(command)
        if self.backlog:
            self._retry()

    def _wait(self, waiting: Waiting) -> None:
        self.backlog.append(waiting)
        self._retry()

    def _retry(self) -> None:
        """Start what can start, first come first served."""
        while self.backlog:
            _, length, span, start, alone = self.backlog[0]
            if span is not None and (self._is_locked(*span) or (alone and self._is_written(*span))):
                return  # whoever is there retries when it is done
            command = self.front.take(length)
            if command is None:
                return
            self.backlog.popleft()
            start(command)

    def interrupt(self, unique: int) -> bool:
        for waiting in self.backlog:
            if waiting.unique == unique and self.session is not None:
                self.backlog.remove(waiting)
                self.session.send_error(unique, errno.EINTR)
                return True
        for command in list(self.front.waiting):  # the backend is away, or the ring full
            if command.unique == unique and self.front.cancel(command):
                assert self.session is not None, "a request came through a session"
                if unique in self.stepping:
                    self.stepping[unique] = True
                    command.context(command)
                else:
                    self.session.send_error(unique, errno.EINTR)
                    self._give(command)
                return True
        if unique in self.stepping:  # zeroing a large range, say: it ends after the step that is under way
            self.stepping[unique] = True
            return True
        return False

    def _is_locked(self, start: int, end: int) -> bool:
        return any(start < other_end and other_start < end for other_start, other_end in self.locked)

    def _is_written(self, start: int, end: int) -> bool:
        """Is a write under way that touches start..end? Looked at only before a read-modify-write begins."""
        return any(
            command.context is self._write_done
            and command.sector * SECTOR_SIZE < end
            and start < command.sector * SECTOR_SIZE + command.length
            for pool in (self.front.small, self.front.large)
            for command in pool.commands
        )

    # --- everything else: steps with one command ---------------------------------------------------------------------------

    def _slow(self, unique: int, span: tuple[int, int] | None, length: int, reply: Callable[[], None],
              steps: Callable[[Command], Steps]) -> None:  # fmt: skip
        """Run `steps` with a command for `length` bytes, holding `span`; then reply, or EIO if a step failed."""

        def start(command: Command) -> None:
            if span is not None:
                self.locked.append(span)
            self.stepping[unique] = False
            todo = steps(command)

            def step(_: Command) -> None:
                status = command.status
                try:
                    if self.stepping[unique]:
                        raise refuse(errno.EINTR)
                    if status:
                        raise refuse(errno.EOPNOTSUPP if status == BLKIF_RSP_EOPNOTSUPP else errno.EIO)
                    op, offset, size = next(todo)
                except StopIteration:
                    reply()
                except OSError as error:
                    assert self.session is not None, "a request came through a session"
                    self.session.send_error(unique, error.errno or errno.EIO)
                else:
                    command.unique, command.context = unique, step
                    self.front.submit(command, op, offset // SECTOR_SIZE, size)
                    return
                del self.stepping[unique]
                if span is not None:
                    self.locked.remove(span)
                self._give(command)

            command.status = 0
            step(command)

        self._wait(Waiting(unique, length, span, start, alone=span is not None))

    def _slow_read(self, session: Session, unique: int, offset: int, size: int) -> None:
        """Not whole blocks: read those around, answer with the middle."""
        if not size:
            session.send_data(unique, [])
            return
        data = bytearray()

        def steps(command: Command) -> Steps:
            while len(data) < size:
                start, end = self._around(offset + len(data), offset + size, command)
                yield BLKIF_OP_READ, start, end - start
                skip = offset + len(data) - start
                data.extend(command.view[skip : min(end - start, skip + size - len(data))])

        self._slow(unique, None, size, lambda: session.send_data(unique, [data]), steps)

    def _slow_write(self, session: Session, unique: int, offset: int, size: int) -> None:
        if not size:
            session.send_written(unique, 0)
            return
        data = _landed(session, size)
        self._modify(unique, offset, size, data, lambda: session.send_written(unique, size))

    def _modify(self, unique: int, offset: int, size: int, data: bytes | None, reply: Callable[[], None]) -> None:
        span = (offset & ~self.block_mask, offset + size + self.block_mask & ~self.block_mask)
        self._slow(unique, span, min(size, LARGE_BYTES), reply, lambda c: self._modify_steps(c, offset, size, data))

    def _modify_steps(self, command: Command, offset: int, size: int, data: bytes | None) -> Steps:
        """Read-modify-write of the blocks around; `data` None writes zeroes."""
        done = 0
        while done < size:
            start, end = self._around(offset + done, offset + size, command)
            skip = offset + done - start
            count = min(end - start - skip, size - done)
            if count != end - start:
                yield BLKIF_OP_READ, start, end - start
            command.view[skip : skip + count] = bytes(count) if data is None else data[done : done + count]
            yield BLKIF_OP_WRITE, start, end - start
            done += count

    def _around(self, offset: int, end: int, command: Command) -> tuple[int, int]:
        """The whole blocks around offset..end, as far as they fit into the command."""
        start = offset & ~self.block_mask
        return start, min(end + self.block_mask & ~self.block_mask, start + command.capacity)

    # --- fallocate -------------------------------------------------------------------------------------------------------

    def fallocate(self, session: Session, unique: int, offset: int, length: int, mode: int) -> None:
        self.session = session
        if self.front.readonly:
            raise refuse(errno.EROFS)
        if offset >= self.bytes or (offset + length > self.bytes and not mode & FALLOC_FL_KEEP_SIZE):
            raise refuse(errno.EINVAL)  # as blkdev_fallocate() says
        length = min(length, self.bytes - offset)

        def reply() -> None:
            session.send_ok(unique)

        if mode & ~FALLOC_FL_KEEP_SIZE == FALLOC_FL_ZERO_RANGE:
            self._modify(unique, offset, length, None, reply)
        elif mode == FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE and self.front.discard_granularity:
            self._punch(unique, offset, length, reply)
        else:
            raise refuse(errno.EOPNOTSUPP)

    def _punch(self, unique: int, offset: int, length: int, reply: Callable[[], None]) -> None:
        """Zero the ragged ends, discard the whole granules between."""
        grain = max(self.front.discard_granularity, self.front.sector_size)
        end = offset + length
        start = self.front.discard_alignment % grain
        first, last = start - (start - offset) // grain * grain, start + (end - start) // grain * grain
        if first >= last:
            self._modify(unique, offset, length, None, reply)
            return

        def steps(command: Command) -> Steps:
            yield from self._modify_steps(command, offset, first - offset, None)
            yield BLKIF_OP_DISCARD, first, last - first
            yield from self._modify_steps(command, last, end - last, None)

        span = (offset & ~self.block_mask, end + self.block_mask & ~self.block_mask)
        self._slow(unique, span, SMALL_BYTES, reply, steps)


def _landed(session: Session, size: int) -> bytes:
    """A copy of a write's data, for a request that has to wait."""
    small, large = session.landing
    return bytes(small[:size]) + bytes(large[: max(0, size - SMALL_BYTES)])
