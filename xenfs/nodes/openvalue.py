"""openvalue.py: a value of the store that is open for writing: what write(2), ftruncate(2) and the last close make of it.

Made by xenstore.py, whose docstring says what a user sees. Each write sets the store's value at once, so that its errno is
the writer's; a write that is refused changes nothing, and takes back the `>` before it.

O_TRUNC and a new file are not done but due: with the first write, or else at fsync(2) or when the last descriptor is closed.
Not at the first close: a shell opens the file, duplicates the descriptor and closes it, and only then the command writes.

Invariant: what is kept is no longer than one message of the store.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from xenfs.fuse.kernel import FATTR_SIZE
from xenfs.fuse.session import Session
from xenfs.fuse.tree import Change, Node, refuse
from xenmodel.public.io.xs_wire import XENSTORE_PAYLOAD_MAX

if TYPE_CHECKING:
    from xenfs.nodes.xenstore import StoreValue

_WRITTEN_MAX = XENSTORE_PAYLOAD_MAX + 1  # with the newline that is dropped


class OpenValue(Node):
    """A value that is open for writing. `written` is what it is to be, with the newline that the store does not get."""

    def __init__(self, node: StoreValue, *, creates: bool = False) -> None:
        self.node, self.tree, self.path = node, node.tree, node.path
        self.creates = creates
        self.due = creates  # there is something to do even if nothing is written: make the node,
        self.found: bytes | None = None  # or empty it, if it still has the value that was found
        self.written: bytes | None = b"" if creates else None
        self.sent: bytes | None = None  # what we have set the store's value to
        self.ends_here = False  # the last byte was written by this open file

    def read(self, session: Session, unique: int, offset: int, size: int, flags: int) -> None:
        value = self.tree.read(self.path) if self.written is None else self.written
        session.send_data(unique, [value[offset : offset + size]])

    def write(self, session: Session, unique: int, offset: int, size: int, flags: int) -> None:
        before, ends_here = self._before(bool(flags & os.O_APPEND))
        if flags & os.O_APPEND:
            offset = len(before)
        end = offset + size
        if end > _WRITTEN_MAX:
            self.due = False  # a write that is refused leaves the value alone, and so does the `>` before it
            raise refuse(errno.EFBIG)
        data = bytes(session.landing[0][:size])
        self._set(before[:offset].ljust(offset, b"\0") + data + before[end:], ends_here or end >= len(before))
        session.send_written(unique, size)

    def setattr(self, change: Change) -> None:
        """ftruncate(2)."""
        self.node.setattr(change._replace(valid=change.valid & ~FATTR_SIZE))
        if change.valid & FATTR_SIZE:
            self.resize(change.size)

    def resize(self, size: int) -> None:
        before, ends_here = self._before(False)
        if size > _WRITTEN_MAX:
            raise refuse(errno.EFBIG)
        if not size and self.sent is None:
            if not self.due:
                self.found, self.written, self.due = before, b"", True
                self._changed()
        elif size != len(before):
            self._set(before[:size].ljust(size, b"\0"), ends_here)

    def settle(self) -> None:
        """What is due although no write came. Not if somebody else wrote: that was later than our `>`."""
        if self.due and (self.tree.is_unborn(self.path) if self.creates else self.tree.read(self.path) == self.found):
            self._set(b"", False)
        self.due = False

    def fsync(self, session: Session, unique: int) -> None:
        self.settle()
        session.send_ok(unique)

    def release(self) -> None:
        with contextlib.suppress(OSError):  # the node, or the one above it, was removed: then that is all
            self.settle()
        self._changed()
        if self.creates:
            self.tree.abandon(self.path)

    def _before(self, append: bool) -> tuple[bytes, bool]:
        """What a write is a change of. Others' writes count until our first one, and for O_APPEND always."""
        if self.written is not None and not append:
            return self.written, self.ends_here
        value = self.tree.read(self.path)
        if self.written is not None and value == (self.found if self.sent is None else self.sent):
            return self.written, self.ends_here  # nobody else wrote
        return value, False

    def _set(self, written: bytes, ends_here: bool) -> None:
        value = written[:-1] if ends_here and written.endswith(b"\n") else written
        self.due = False
        self._changed()
        self.tree.write(self.path, value)
        self.written, self.sent, self.ends_here = written, value, ends_here

    def _changed(self) -> None:
        self.node.fresh.pop(self, None)
