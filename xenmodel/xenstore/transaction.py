"""transaction.py: nodes and their versions: the committed tree and the views through which it is changed.

After tools/xenstored/transaction.c: a transaction sees a node as it was when it first looked at it, and a commit fails if
any node it looked at has another generation by then. (docs/misc/xenstore.txt speaks of a copy of the whole tree at the
start. What a transaction that commits has seen is the tree of one moment in both: there the start, here the commit.)

Starting one copies nothing. Nodes are replaced, not changed, so a version that a transaction looked at stays as it was for
as long as the transaction refers to it.

Used by store.py, which checks permissions and quotas before it calls put() here; nothing in put() can fail.
Invariants: every node but the root and the specials is in its parent's `children`; `owned` lists every node under its
owner, `memory` what its nodes cost; a `children` dict that two versions refer to is never changed in place (`shared`), so
the first child added to or removed from a directory that a transaction looked at copies the names in that one directory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xenmodel.types import Domid
from xenmodel.xenstore import path as paths
from xenmodel.xenstore.errors import XsErrno, XsError
from xenmodel.xenstore.perms import CONTROL_DOMAIN, Access, Perm

if TYPE_CHECKING:
    from xenmodel.xenstore.domain import DomainRecord

PERM_BYTES = 8  # sizeof(struct xs_permissions), for the quota on a node's size
HEADER_BYTES = 24  # of a node's record, for the quota on memory
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
    listing: bytes | None = None  # the names as DIRECTORY sends them, once somebody asked

    def size(self) -> int:
        return len(self.perms) * PERM_BYTES + len(self.value) + self.children_bytes

    def names(self) -> bytes:
        """The names of the children, each with its NUL."""
        if self.listing is None:
            self.listing = "\0".join([*self.children, ""]).encode("ascii")
        return self.listing


def cost(path: str, node: Node) -> int:
    """Bytes that a node counts for with its owner's quota on memory."""
    return HEADER_BYTES + len(path) + node.size()


class Tree:
    """The committed nodes."""

    def __init__(self) -> None:
        self.generation = 0
        self.nodes: dict[str, Node] = {}
        self.owned: dict[Domid, dict[str, None]] = {}
        self.memory: dict[Domid, int] = {}  # domid -> cost of its nodes
        self._born: dict[Domid, int] = {}  # domid -> generation when its present bearer began, or its last one died
        self._last_born = 0
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
            owner = old.perms[0].domid
            self.owned[owner].pop(path)
            self.memory[owner] -= cost(path, old)
            if not self.owned[owner]:
                del self.owned[owner], self.memory[owner]
        if node is not None:
            # A transaction may have written it before a domain it names died.
            node.perms = self.live_perms(node)
            node.generation = self.tick()
            self.nodes[path] = node
            owner = node.perms[0].domid
            self.owned.setdefault(owner, {})[path] = None
            self.memory[owner] = self.memory.get(owner, 0) + cost(path, node)

    def topmost(self, domid: Domid) -> list[str]:
        """The nodes a domain owns, without those below one of them, as a walk through the tree meets them; specials last."""
        owned = self.owned.get(domid, {})
        on_the_way: set[str] = set()
        for path in owned:
            while path not in on_the_way and not paths.is_special(path):
                on_the_way.add(path)
                path = paths.parent(path)
        found, waiting = [], [paths.ROOT]
        while waiting:
            path = waiting.pop()
            if path in owned:
                found.append(path)
            if path not in owned or path == paths.ROOT:  # the root stays, whoever owned it
                names = (paths.child(path, name) for name in reversed(self.nodes[path].children))
                waiting += [name for name in names if name in on_the_way]
        return found + [path for path in owned if paths.is_special(path)]

    def live_perms(self, node: Node) -> tuple[Perm, ...]:
        """The node's permissions without those given to a domain that has died since (XSA-322, XSA-417).

        Its domid may belong to somebody else by now. A dead owner leaves the node to the control domain.
        """
        if node.generation > self._last_born:
            return node.perms
        born = self._born
        owner, *others = node.perms
        if born.get(owner.domid, ABSENT) >= node.generation:
            owner = Perm(CONTROL_DOMAIN, owner.access)
        return (owner, *(perm for perm in others if born.get(perm.domid, ABSENT) < node.generation))

    def forget_domain(self, domid: Domid) -> None:
        """From now on, permissions given to `domid` earlier mean nobody: a domain began, or ended."""
        self._born[domid] = self._last_born = self.tick()


class View:
    """The tree as one request sees and changes it. `before` and `events` say what watchers are to be told."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.before: dict[str, Node | None] = {}  # the committed version of every node put here
        self.events: dict[str, bool] = {}  # path -> only watches of exactly this path
        self.owners: set[Domid] = set()  # who got or lost a node
        self.failed = False  # a change was refused half way; a transaction must not commit

    def get(self, path: str) -> Node | None:
        raise NotImplementedError

    def put(self, path: str, node: Node | None) -> None:
        raise NotImplementedError

    def growth(self, domid: Domid) -> int:
        """Nodes owned by `domid` in this view beyond those in the tree."""
        raise NotImplementedError

    def note(self, path: str, exact: bool = False) -> None:
        self.events[path] = exact and self.events.get(path, True)

    def live_perms(self, node: Node) -> tuple[Perm, ...]:
        return self.tree.live_perms(node)

    def create(self, path: str, value: bytes, perms: tuple[Perm, ...], child: str = "") -> None:
        """A new node, with its first child if it is made for the sake of one."""
        children: dict[str, None] = {child: None} if child else {}
        self.owners.add(perms[0].domid)
        self.put(path, Node(value, perms, self.tree.tick(), children, len(child) + 1 if child else 0))

    def change(self, path: str, node: Node, value: bytes | None = None, perms: tuple[Perm, ...] | None = None) -> None:
        if perms is not None:
            self.owners |= {node.perms[0].domid, perms[0].domid}
        new = Node(
            node.value if value is None else value,
            self.live_perms(node) if perms is None else perms,
            self.tree.tick(),
            node.children,
            node.children_bytes,
            node.shared,
            node.listing,
        )
        self.put(path, new)

    def change_children(self, path: str, node: Node, add: str = "", remove: str = "") -> None:
        """A transaction may have looked at a node and its parent at different moments: then they need not agree."""
        children = dict(node.children) if node.shared else node.children
        children_bytes = node.children_bytes
        if add and add not in children:
            children[add] = None
            children_bytes += len(add) + 1
        if remove in children:
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


class Transaction(View):
    """Nodes as they were when first looked at, with changes of its own on top until commit()."""

    def __init__(
        self, tree: Tree, node_limit: int, record: DomainRecord, check_memory: Callable[[Domid, int, str], None]
    ) -> None:
        super().__init__(tree)
        self.memory = 0  # what its copies of nodes count for, of the domain's
        self.node_limit = node_limit  # 0: none
        self._record = record
        self._check_memory = check_memory
        self.seen: dict[str, int] = {}  # path -> generation it was first seen with, in that order
        self._nodes: dict[str, Node | None] = {}  # as the transaction sees them: every path in `seen`
        self._growth: dict[Domid, int] = {}

    def get(self, path: str) -> Node | None:
        if path in self._nodes:
            return self._nodes[path]
        if self.node_limit and len(self.seen) >= self.node_limit:
            self.failed = True
            what = f"more than {self.node_limit} nodes in one transaction"
            self._record.refuse("transaction-nodes", what)
            raise XsError(XsErrno.ENOSPC, what, "transaction-nodes")
        node = self.tree.nodes.get(path)
        size = HEADER_BYTES + len(path) if node is None else cost(path, node)
        if node is None and self._record.domid != CONTROL_DOMAIN:  # the daemon counts no copies of what is not there
            try:
                self._check_memory(self._record.domid, size, path)
            except XsError:
                self.failed = True
                raise
        self._count(size)
        self._nodes[path] = node
        if node is None:
            self.seen[path] = ABSENT
        else:
            self.seen[path] = node.generation
            node.shared = True
        return node

    def put(self, path: str, node: Node | None) -> None:
        old = self.get(path)
        if node is None and old is not None:
            self.owners.add(old.perms[0].domid)
        if path not in self.before:
            self.before[path] = old
        for version, step in ((old, -1), (node, 1)):
            if version is not None:
                owner = version.perms[0].domid
                self._growth[owner] = self._growth.get(owner, 0) + step
                self._count(step * cost(path, version))
        self._nodes[path] = node

    def _count(self, size: int) -> None:
        self.memory += size
        self._record.memory += size

    def growth(self, domid: Domid) -> int:
        return self._growth.get(domid, 0)

    def check_conflicts(self) -> None:
        """EAGAIN if a node this transaction looked at was changed, created or removed since."""
        for path, generation in self.seen.items():
            if self.tree.get_generation(path) != generation:
                raise XsError(XsErrno.EAGAIN, f"{path} was changed since the transaction looked at it")

    def commit(self) -> Iterator[str]:
        """Put the changes into the tree, one node after the other. Call check_conflicts() first, and take all that comes.

        As from the daemon, watchers hear of the nodes in the order in which the transaction met them, each when it is
        there and those behind it are not yet: that is what is yielded.
        """
        for path in self.seen:
            if path in self.before:
                node = self._nodes[path]
                if node is not None or path in self.tree.nodes:
                    self.tree.replace(path, node)
            if path in self.events:
                yield path
