"""xenstore.py: the store as directories and files, for the shell's tools. Domain 0 reads and writes here.

A store node with children is a directory; its own value, if it has one, is the file `.value` in it (no store name can have
a dot). A node without children is a file with the value, unless mkdir(2) made it, or Linux still knows it as a directory
and it has no value. A node that changes its kind changes its inode. Everything is looked up at the moment it is asked for.

Values are bytes, and reading adds nothing. Writing drops one final newline, as sysfs does, so that `echo 4 > state` means 4;
who wants it kept uses xenstore-write or `xenfs store load`. Each write(2) sets the value, and watches fire: to all that this
open file has written, or, if it has not written yet or with O_APPEND, to the present value with the change. `>` alone and a
new file are no changes of their own: if no write follows, the empty value is set at the last close (openvalue.py).

Mode bits: the owner may all; `others` are the store's default access, n r w b, and chmod sets it. New nodes inherit their
permissions. The whole list is the xattr user.xenstore.perms, "n0,r1". Only the root's mode keeps other users out.

Invariants: no XsError leaves; it becomes the errno of its name. What is remembered is what Linux knows, what is open, and
what mkdir(2) made and is still there.
Left out: rename (mv copies, then removes), links, times, children with names longer than a file's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from typing import ClassVar

from xenfs.fuse.kernel import FATTR_GID, FATTR_MODE, FATTR_SIZE, FATTR_UID, FOPEN_DIRECT_IO
from xenfs.fuse.tree import NAME_MAX, Change, Node, Opened, Snapshot, refuse
from xenfs.nodes.openvalue import OpenValue
from xenmodel.public.io.xs_wire import XENSTORE_PAYLOAD_MAX
from xenmodel.xenstore import path as paths
from xenmodel.xenstore.connection import Connection
from xenmodel.xenstore.errors import XsErrno, XsError
from xenmodel.xenstore.perms import MAY_READ, MAY_WRITE, Access, Perm

VALUE_NAME = b".value"
PERMS_XATTR = b"user.xenstore.perms"
_FORGOTTEN_AT = 4096  # cached nodes nobody looks at are dropped beyond this many


@contextlib.contextmanager
def _errnos() -> Iterator[None]:
    """The store's refusals as the caller's errno."""
    try:
        yield
    except XsError as error:
        raise OSError(getattr(errno, error.errno.value), error.what) from error


class StoreTree:
    """Hands out one Node per (path, kind) for as long as the kernel remembers it, so that inodes are stable."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._nodes: dict[tuple[str, bool], Node] = {}
        self._purge_at = _FORGOTTEN_AT
        self._unborn: dict[str, None] = {}  # see is_unborn()
        self._made: dict[str, None] = {}  # by mkdir(2)
        self._purge_made_at = _FORGOTTEN_AT

    # --- what is there ---------------------------------------------------------------------------------------------------

    def node(self, path: str) -> Node | None:
        """The node at a store path, or None."""
        try:
            return self.remember(path, self.is_directory(path))
        except XsError:
            return self.remember(path, False) if self.is_unborn(path) else None

    def is_directory(self, path: str) -> bool:
        """How the node is shown. XsError if there is none."""
        try:
            if path == paths.ROOT or self.connection.names(path) or path in self._made:
                return True
        except XsError:
            self._made.pop(path, None)
            raise
        known = self._nodes.get((path, True))
        return known is not None and known.links > 0 and not self.connection.read(path)

    def is_there(self, path: str) -> bool:
        """XsError for what no path can be."""
        try:
            self.connection.read(path)
        except XsError as error:
            if error.errno is not XsErrno.ENOENT:
                raise
            return path in self._unborn
        return True

    def is_unborn(self, path: str) -> bool:
        """Was it created here and is open, but nothing was written yet, nor did somebody else make it?"""
        if path in self._unborn:
            with contextlib.suppress(XsError):
                self.connection.read(path)
                del self._unborn[path]
        return path in self._unborn

    def unborn_in(self, path: str) -> list[str]:
        return [each for each in list(self._unborn) if paths.parent(each) == path and self.is_unborn(each)]

    def remember(self, path: str, is_directory: bool) -> Node:
        key = (path, is_directory)
        if key not in self._nodes:
            if len(self._nodes) >= self._purge_at:
                self._nodes = {k: node for k, node in self._nodes.items() if node.links}
                self._purge_at = max(_FORGOTTEN_AT, 2 * len(self._nodes))  # so that purging costs little per node
            self._nodes[key] = StoreDirectory(self, path) if is_directory else StoreValue(self, path)
        return self._nodes[key]

    def value(self, path: str) -> StoreValue:
        node = self.remember(path, False)
        assert isinstance(node, StoreValue), f"{node} is not a value"
        return node

    def remember_made(self, path: str) -> None:
        if len(self._made) >= self._purge_made_at:
            self._made = {made: None for made in self._made if self.is_there(made)}
            self._purge_made_at = max(_FORGOTTEN_AT, 2 * len(self._made))
        self._made[path] = None

    # --- requests: OSError -----------------------------------------------------------------------------------------------

    def conceive(self, path: str) -> None:
        """A file is created, but the store shall see it with its value: not yet."""
        self._unborn[path] = None

    def abandon(self, path: str) -> None:
        self._unborn.pop(path, None)

    def read(self, path: str) -> bytes:
        if self.is_unborn(path):
            return b""
        with _errnos():
            return self.connection.read(path)

    def write(self, path: str, value: bytes) -> None:
        """Sets the value of a node that is there or unborn; one that was removed does not come back."""
        with _errnos():
            self.connection.read(self._bearer(path))
            self.connection.write(path, value)
        self.abandon(path)

    def get_perms(self, path: str) -> list[Perm]:
        with _errnos():
            return self.connection.get_perms(self._bearer(path))

    def set_perms(self, path: str, perms: list[Perm]) -> None:
        if self.is_unborn(path):
            self.write(path, b"")
        with _errnos():
            self.connection.set_perms(path, perms)

    def remove(self, path: str) -> None:
        with _errnos():
            self.connection.rm(path)
        self._made.pop(path, None)
        for is_directory in (True, False):  # what comes here next is not it
            self._nodes.pop((path, is_directory), None)

    def _bearer(self, path: str) -> str:
        """What must exist: the node, or the one above that an unborn one inherits from."""
        return paths.parent(path) if self.is_unborn(path) else path


class StoreNode(Node):
    """What files and directories of the store have in common: permissions."""

    _ACCESS: ClassVar[dict[int, Access]] = {access.bits: access for access in Access}

    def __init__(self, tree: StoreTree, path: str) -> None:
        self.tree = tree
        self.path = path

    def get_mode(self) -> int:
        try:
            bits = self.tree.get_perms(self.path)[0].access.bits
        except OSError:
            return self.mode  # removed since it was looked up
        return self.mode | (stat.S_IROTH if bits & MAY_READ else 0) | (stat.S_IWOTH if bits & MAY_WRITE else 0)

    def setattr(self, change: Change) -> None:
        """Of a mode only what others may is ours to change; times are taken and ignored."""
        if change.valid & (FATTR_UID | FATTR_GID) and not change.same_owner:
            raise refuse(errno.EPERM)
        if change.valid & FATTR_MODE:
            if self.path == "/":  # its bits are for users of the host, but this would be for all guests
                raise refuse(errno.EPERM)
            wanted = (MAY_READ if change.mode & stat.S_IROTH else 0) | (MAY_WRITE if change.mode & stat.S_IWOTH else 0)
            owner, *others = self.tree.get_perms(self.path)
            if owner.access.bits != wanted:
                self.tree.set_perms(self.path, [owner._replace(access=self._ACCESS[wanted]), *others])

    def getxattr(self, name: bytes) -> bytes:
        if name != PERMS_XATTR:
            raise refuse(errno.ENODATA)
        return ",".join(map(str, self.tree.get_perms(self.path))).encode()

    def setxattr(self, name: bytes, value: bytes, flags: int) -> None:
        if name != PERMS_XATTR:
            raise refuse(errno.EOPNOTSUPP)
        if flags & os.XATTR_CREATE:
            raise refuse(errno.EEXIST)
        if len(self.path) + len(value) + 2 > XENSTORE_PAYLOAD_MAX:  # SET_PERMS has a NUL where we have commas
            raise refuse(errno.E2BIG)
        with _errnos():
            perms = [Perm.parse(text) for text in value.decode("latin-1").split(",")]
        if perms != self.tree.get_perms(self.path):  # mv sets what is so already
            self.tree.set_perms(self.path, perms)

    def listxattr(self) -> list[bytes]:
        return [PERMS_XATTR]

    def removexattr(self, name: bytes) -> None:
        raise refuse(errno.EPERM if name == PERMS_XATTR else errno.ENODATA)


class StoreValue(StoreNode):
    """One value. `fresh` are its open files that may write and have not yet changed anything, newest last."""

    mode = stat.S_IFREG | 0o600

    def __init__(self, tree: StoreTree, path: str) -> None:
        super().__init__(tree, path)
        self.fresh: dict[OpenValue, None] = {}

    @property
    def size(self) -> int:
        return len(self.text())

    def text(self) -> bytes:
        try:
            return self.tree.read(self.path)
        except OSError:
            return b""  # removed since it was looked up

    def open(self, flags: int) -> Opened:
        if flags & (os.O_ACCMODE | os.O_TRUNC) == os.O_RDONLY:
            return Opened(Snapshot(self.text()), FOPEN_DIRECT_IO)
        handle = OpenValue(self)
        self.fresh[handle] = None
        if flags & os.O_TRUNC:  # a create() that came second
            handle.resize(0)
        return Opened(handle, FOPEN_DIRECT_IO)

    def setattr(self, change: Change) -> None:
        """O_TRUNC is an OPEN followed by a size of 0: of the open file that was made last. truncate(2) looks the same."""
        super().setattr(change)
        if change.valid & FATTR_SIZE:
            if not change.size and self.fresh:
                next(reversed(self.fresh)).resize(0)
            else:
                handle = OpenValue(self)
                handle.resize(change.size)
                handle.settle()


class StoreDirectory(StoreNode):
    """A store node with children, or one that may get some."""

    mode = stat.S_IFDIR | 0o701  # a path of the store may be walked by all
    nlink = 2

    def __init__(self, tree: StoreTree, path: str) -> None:
        super().__init__(tree, path)
        if path == paths.ROOT:  # only for who serves the mount
            self.mode = stat.S_IFDIR | 0o700

    def get_mode(self) -> int:
        return self.mode if self.path == paths.ROOT else super().get_mode()

    def lookup(self, name: bytes) -> Node | None:
        if name == VALUE_NAME:
            try:
                value = self.tree.connection.read(self.path)
            except XsError:
                return None  # removed since it was looked up
            return self.tree.remember(self.path, False) if value else None
        return self.tree.node(self._child(name))

    def entries(self) -> Iterable[tuple[bytes, Node]]:
        try:
            names = self.tree.connection.directory(self.path)
            value = self.tree.connection.read(self.path)
        except XsError:
            return []
        found = [each for each in names if len(each) <= NAME_MAX]  # a store name may be longer than a file's
        return self._entries(bool(value), found + [paths.name_of(path) for path in self.tree.unborn_in(self.path)])

    def _entries(self, has_value: bool, names: list[str]) -> Iterator[tuple[bytes, Node]]:
        if has_value:
            yield VALUE_NAME, self.tree.remember(self.path, False)
        for name in names:
            node = self.tree.node(paths.child(self.path, name))
            if node is not None:
                yield name.encode(), node

    def create(self, name: bytes, mode: int, flags: int) -> tuple[Node, Opened]:
        """Permissions are the store's to inherit: `mode` says nothing about domains."""
        path = self.path if name == VALUE_NAME else self._child(name)
        with _errnos():
            is_there = bool(self.tree.read(path)) if name == VALUE_NAME else self.tree.is_there(path)
            if is_there and flags & os.O_EXCL:
                raise refuse(errno.EEXIST)
            if not is_there and name != VALUE_NAME:
                self.tree.connection.read(self.path)  # a directory that was removed gets no files
                self.tree.conceive(path)
                node = self.tree.value(path)
                return node, Opened(OpenValue(node, creates=True), FOPEN_DIRECT_IO)
            if name != VALUE_NAME and not self.tree.is_unborn(path) and self.tree.is_directory(path):
                raise refuse(errno.EISDIR)
        node = self.tree.value(path)
        return node, node.open(flags)

    def mkdir(self, name: bytes, mode: int) -> Node:
        path = self._child(name)
        with _errnos():
            if self.tree.is_there(path):
                raise refuse(errno.EEXIST)
            self.tree.connection.read(self.path)
            self.tree.connection.mkdir(path)
        self.tree.remember_made(path)
        return self.tree.remember(path, True)

    def unlink(self, name: bytes) -> None:
        if name == VALUE_NAME:
            self.tree.write(self.path, b"")
            return
        path = self._child(name)
        if self.tree.is_unborn(path):
            self.tree.abandon(path)
            return
        with _errnos():
            if self.tree.is_directory(path):
                raise refuse(errno.EISDIR)
        self.tree.remove(path)

    def rmdir(self, name: bytes) -> None:
        path = self._child(name)
        with _errnos():
            if not self.tree.is_directory(path):
                raise refuse(errno.ENOTDIR)
            children = self.tree.connection.directory(path)
        if any(len(child) <= NAME_MAX for child in children):  # the others no `rm -r` could remove before
            raise refuse(errno.ENOTEMPTY)
        self.tree.remove(path)

    def rename(self, name: bytes, target: Node, new_name: bytes) -> None:
        raise refuse(errno.EXDEV)

    def _child(self, name: bytes) -> str:
        """EINVAL is the store's to say, but not of a path that would mean something else."""
        if not name:
            raise refuse(errno.EINVAL)
        return paths.child(self.path, name.decode("latin-1"))
