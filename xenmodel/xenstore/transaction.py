"""transaction.py: nodes and their versions: the committed tree and the views through which it is changed.

After tools/xenstored/transaction.c, with its rule for conflicts: a commit fails if any node the transaction
looked at has another generation by then. Unlike the C daemon, whose transactions see a node as it is when
first touched, a transaction here sees the whole tree as it was at its start, which is what
docs/misc/xenstore.txt promises.

Starting one copies nothing. Whoever replaces a committed node first hands the old version to those open
transactions that can still see it (started after the version was written and before it was replaced); a
path nobody replaced is read from the tree. So versions are kept only while somebody can see them, at most
one per path and transaction.

Used by store.py, which checks permissions and quotas before it calls put() here; nothing in put() can fail.
Invariants: every node but the root and the specials is in its parent's `children`; `owned` lists every node
under its owner; a `children` dict reachable from two versions is never changed in place (`shared`). The
first child added to or removed from a directory that a transaction still sees copies the names in that one
directory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from xenmodel.types import Domid
from xenmodel.xenstore import path as paths
from xenmodel.xenstore.errors import XsErrno, XsError
from xenmodel.xenstore.perms import CONTROL_DOMAIN, Access, Perm
from xenmodel.xenstore.quota import exceeds

PERM_BYTES = 8  # sizeof(struct xs_permissions), for the quota on a node's size
ABSENT = 0  # the generation of a node that does not exist; real ones start at 1


@dataclass(slots=True, eq=False)
class Node:
    """One version of a node: replaced, not changed, but for an unshared `children` and its own commit."""

    value: bytes
    perms: tuple[Perm, ...]
    generation: int
    children: dict[str, None] = field(default_factory=dict)  # leaf names in the order of their creation
    children_bytes: int = 0  # of the names with their NULs, as DIRECTORY sends them
    shared: bool = False

    def size(self) -> int:
        return len(self.perms) * PERM_BYTES + len(self.value) + self.children_bytes


class Tree:
    """The committed nodes, and what open transactions need to go on seeing older ones."""

    def __init__(self) -> None:
        self.generation = 0
        self.nodes: dict[str, Node] = {}
        self.owned: dict[Domid, dict[str, None]] = {}
        self._open: dict[int, Transaction] = {}  # by the generation of their start, oldest first
        self._released: dict[Domid, int] = {}  # domid -> generation at which its last bearer died
        private = (Perm(CONTROL_DOMAIN, Access.NONE),)
        for path in (paths.ROOT, paths.INTRODUCE_DOMAIN, paths.RELEASE_DOMAIN):
            self.replace(path, Node(b"", private, self.tick()))

    def tick(self) -> int:
        self.generation += 1
        return self.generation

    def get_generation(self, path: str) -> int:
        node = self.nodes.get(path)
        return ABSENT if node is None else node.generation

    def replace(self, path: str, node: Node | None) -> None:
        """Make `node` (None: nothing) the committed version."""
        old = self.nodes.pop(path, None) if node is None else self.nodes.get(path)
        if old is not None:
            for start, transaction in reversed(self._open.items()):
                if start < old.generation:
                    break  # it and all older ones started before this version existed
                transaction.saved[path] = old
            owner = old.perms[0].domid
            self.owned[owner].pop(path)
            if not self.owned[owner]:
                del self.owned[owner]
        if node is not None:
            # A transaction may have written it before a domain it names died.
            node.perms = self.live_perms(node)
            node.generation = self.tick()
            self.nodes[path] = node
            self.owned.setdefault(node.perms[0].domid, {})[path] = None

    def is_seen(self, node: Node) -> bool:
        """Would an open transaction still see this committed version once it is replaced?"""
        return next(reversed(self._open), ABSENT) >= node.generation

    def live_perms(self, node: Node) -> tuple[Perm, ...]:
        """The node's permissions without those given to a domain that has died since (XSA-322, XSA-417).

        Its domid may belong to somebody else by now. A dead owner leaves the node to the control domain.
        """
        released = self._released
        if not released or all(released.get(perm.domid, ABSENT) < node.generation for perm in node.perms):
            return node.perms
        owner, *others = node.perms
        if released.get(owner.domid, ABSENT) >= node.generation:
            owner = Perm(CONTROL_DOMAIN, owner.access)
        return (owner, *(perm for perm in others if released.get(perm.domid, ABSENT) < node.generation))

    def forget_domain(self, domid: Domid) -> None:
        """From now on, permissions given to `domid` earlier mean nobody."""
        self._released[domid] = self.tick()

    def begin(self, node_limit: int) -> Transaction:
        start = self.tick()
        self._open[start] = transaction = Transaction(self, start, node_limit)
        return transaction

    def end(self, transaction: Transaction) -> None:
        del self._open[transaction.start]


class View:
    """The tree as one request sees and changes it. `before` and `events` say what watchers are to be told."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.before: dict[str, Node | None] = {}  # the committed version of every node put here
        self.events: dict[str, bool] = {}  # path -> only watches of exactly this path
        self.failed = False  # a change was refused half way; a transaction must not commit

    def get(self, path: str) -> Node | None:
        raise NotImplementedError

    def put(self, path: str, node: Node | None) -> None:
        raise NotImplementedError

    def growth(self, domid: Domid) -> int:
        """Nodes owned by `domid` in this view beyond those in the tree."""
        raise NotImplementedError

    def _is_seen(self, path: str, node: Node) -> bool:
        """May somebody else go on seeing this version of `path`?"""
        raise NotImplementedError

    def note(self, path: str, exact: bool = False) -> None:
        self.events[path] = exact and self.events.get(path, True)

    def live_perms(self, node: Node) -> tuple[Perm, ...]:
        return self.tree.live_perms(node)

    def create(self, path: str, value: bytes, perms: tuple[Perm, ...], child: str = "") -> None:
        """A new node, with its first child if it is made for the sake of one."""
        children: dict[str, None] = {child: None} if child else {}
        self.put(path, Node(value, perms, self.tree.tick(), children, len(child) + 1 if child else 0))

    def change(self, path: str, node: Node, value: bytes | None = None, perms: tuple[Perm, ...] | None = None) -> None:
        self.put(
            path,
            Node(
                value=node.value if value is None else value,
                perms=self.live_perms(node) if perms is None else perms,
                generation=self.tree.tick(),
                children=node.children,
                children_bytes=node.children_bytes,
                shared=node.shared or self._is_seen(path, node),
            ),
        )

    def change_children(self, path: str, node: Node, add: str = "", remove: str = "") -> None:
        copied = node.shared or self._is_seen(path, node)
        children = dict(node.children) if copied else node.children
        children_bytes = node.children_bytes
        if add:
            children[add] = None
            children_bytes += len(add) + 1
        if remove:
            del children[remove]
            children_bytes -= len(remove) + 1
        self.put(path, Node(node.value, self.live_perms(node), self.tree.tick(), children, children_bytes))


class Direct(View):
    """A request outside any transaction: what it puts is committed at once."""

    def get(self, path: str) -> Node | None:
        return self.tree.nodes.get(path)

    def put(self, path: str, node: Node | None) -> None:
        self.before.setdefault(path, self.tree.nodes.get(path))
        self.tree.replace(path, node)

    def growth(self, domid: Domid) -> int:
        return 0

    def _is_seen(self, path: str, node: Node) -> bool:
        return self.tree.is_seen(node)


class Transaction(View):
    """The tree as it was at `start`, with changes of its own on top until commit()."""

    def __init__(self, tree: Tree, start: int, node_limit: int) -> None:
        super().__init__(tree)
        self.start = start
        self.saved: dict[str, Node] = {}  # versions replaced in the tree since the start
        self._node_limit = node_limit
        self._touched: dict[str, int] = {}  # path -> generation it was seen with
        self._changes: dict[str, Node | None] = {}
        self._growth: dict[Domid, int] = {}

    def get(self, path: str) -> Node | None:
        if path in self._changes:
            return self._changes[path]
        node = self._snapshot(path)
        if path not in self._touched:
            if exceeds(len(self._touched) + 1, self._node_limit):
                self.failed = True
                raise XsError(XsErrno.ENOSPC, f"more than {self._node_limit} nodes in one transaction")
            self._touched[path] = ABSENT if node is None else node.generation
        return node

    def put(self, path: str, node: Node | None) -> None:
        if path not in self.before:
            self.before[path] = self._changes[path] = self._snapshot(path)
        for version, step in ((self._changes[path], -1), (node, 1)):
            if version is not None:
                owner = version.perms[0].domid
                self._growth[owner] = self._growth.get(owner, 0) + step
        self._changes[path] = node

    def growth(self, domid: Domid) -> int:
        return self._growth.get(domid, 0)

    def check_conflicts(self) -> None:
        """EAGAIN if a node this transaction looked at was changed, created or removed since its start."""
        for path, generation in self._touched.items():
            if self.tree.get_generation(path) != generation:
                raise XsError(XsErrno.EAGAIN, f"{path} was changed since the transaction started")

    def commit(self) -> None:
        """Put the changes into the tree. Call end() and check_conflicts() first."""
        for path, node in self._changes.items():
            if node is not None or path in self.tree.nodes:
                self.tree.replace(path, node)

    def _snapshot(self, path: str) -> Node | None:
        node = self.saved.get(path) or self.tree.nodes.get(path)
        # A version younger than the start with no older one saved: the node did not exist then.
        return node if node is not None and node.generation < self.start else None

    def _is_seen(self, path: str, node: Node) -> bool:
        return path not in self._changes  # a version of the tree; versions of our own nobody else sees
