"""xenstore.py: the store as directories and files, read-only.

A store node with children is a directory; its own value, if it has one, is the file `.value` in it (no store name can have
a dot). A node without children is a file with the value. A node that gains or loses its first child changes its kind,
and with it its inode. Everything is looked up at the moment it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable

from xenfs.fuse.session import NAME_MAX
from xenfs.fuse.tree import Bytes, Directory, Node
from xenmodel.xenstore.connection import Connection
from xenmodel.xenstore.errors import XsError

VALUE_NAME = b".value"
_FORGOTTEN_AT = 4096  # cached nodes nobody looks at are dropped beyond this many


class StoreTree:
    """Hands out one Node per (path, kind) for as long as the kernel remembers it, so that inodes are stable."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._nodes: dict[tuple[str, bool], Node] = {}
        self._purge_at = _FORGOTTEN_AT

    def node(self, path: str) -> Node | None:
        """The node at a store path, or None."""
        try:
            is_directory = path == "/" or bool(self.connection.directory(path))
        except XsError:
            return None
        return self.remember(path, is_directory)

    def remember(self, path: str, is_directory: bool) -> Node:
        key = (path, is_directory)
        if key not in self._nodes:
            if len(self._nodes) >= self._purge_at:
                self._nodes = {k: node for k, node in self._nodes.items() if node.links}
                self._purge_at = max(_FORGOTTEN_AT, 2 * len(self._nodes))  # so that purging costs little per node
            self._nodes[key] = StoreDirectory(self, path) if is_directory else StoreValue(self, path)
        return self._nodes[key]


class StoreValue(Bytes):
    """One value. The bytes as they are: no newline is added."""

    def __init__(self, tree: StoreTree, path: str) -> None:
        self.tree = tree
        self.path = path

    def text(self) -> bytes:
        try:
            return self.tree.connection.read(self.path)
        except XsError:
            return b""  # removed since it was looked up


class StoreDirectory(Directory):
    """A store node with children."""

    def __init__(self, tree: StoreTree, path: str) -> None:
        super().__init__(private=path == "/")
        self.tree = tree
        self.path = path

    def _child(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}"

    def lookup(self, name: bytes) -> Node | None:
        if name == VALUE_NAME:
            try:
                value = self.tree.connection.read(self.path)
            except XsError:
                return None  # removed since it was looked up
            return self.tree.remember(self.path, False) if value else None
        return self.tree.node(self._child(name.decode("latin-1")))

    def entries(self) -> Iterable[tuple[bytes, Node]]:
        try:
            names = self.tree.connection.directory(self.path)
            value = self.tree.connection.read(self.path)
        except XsError:
            return
        if value:
            yield VALUE_NAME, self.tree.remember(self.path, False)
        for name in names:
            node = self.tree.node(self._child(name))
            if node is not None and len(name) <= NAME_MAX:  # a store name may be longer than a file's
                yield name.encode(), node
