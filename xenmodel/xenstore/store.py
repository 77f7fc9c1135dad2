"""store.py: the rules of xenstored: permissions, quotas, who is told, what a dead domain leaves behind.

After tools/xenstored/core.c and domain.c. Requests arrive from connection.py with a view (transaction.py)
and a canonical path; the hypervisor and the toolstack call connect(), introduce(), shutdown() and
release(). Every change is decided before it is made: a request that raises has changed nothing (but within
a transaction, one that hits a quota spoils the transaction, as in the daemon). Nothing recurses; no cost
depends on the tree's size, only on depth, on a directory's width where it is listed, and on what is
removed.
`wake` is called with a connection that got its first queued event; it may only take note of it.
Left out: CONTROL, SET_TARGET, RESUME, quotas per domain, write credits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NoReturn

from xenmodel.public.xen import DOMID_FIRST_RESERVED
from xenmodel.types import Domid
from xenmodel.xenstore import path as paths
from xenmodel.xenstore.connection import Connection
from xenmodel.xenstore.errors import XsErrno, XsError
from xenmodel.xenstore.perms import (
    CONTROL_DOMAIN,
    MAY_READ,
    MAY_WRITE,
    OWNS,
    Access,
    Perm,
    check_perms,
    granted,
)
from xenmodel.xenstore.quota import DEFAULT_QUOTA, Quota, Usage, exceeds
from xenmodel.xenstore.transaction import PERM_BYTES, Direct, Node, Transaction, Tree, View
from xenmodel.xenstore.watch import WatchTable

Wake = Callable[[Connection], None]


class Store:
    """The tree, its watches and the domains that use it. A new one holds /tool/xenstored, as in Xen."""

    def __init__(self, quota: Quota = DEFAULT_QUOTA, wake: Wake | None = None) -> None:
        self.quota = quota
        self.tree = Tree()
        self.watches = WatchTable()
        self._connections: dict[Domid, dict[Connection, None]] = {}
        self._introduced: set[Domid] = {CONTROL_DOMAIN}
        self._wake = wake
        self.make_directory(Direct(self.tree), CONTROL_DOMAIN, "/tool/xenstored")

    # --- domains --------------------------------------------------------------------------------------------

    @property
    def wake(self) -> Wake | None:
        return self._wake

    @wake.setter
    def wake(self, wake: Wake | None) -> None:
        """Connections that have events already are reported at once: no event waits for the next one."""
        self._wake = wake
        for connections in list(self._connections.values()):
            for connection in list(connections):
                if connection.pending_events:
                    self.notify(connection)

    def notify(self, connection: Connection) -> None:
        if self._wake is not None:
            self._wake(connection)

    def connect(self, domid: Domid) -> Connection:
        """A new connection of a domain, introduced or not. Domain 0 is the control domain."""
        connection = Connection(self, _real_domid(domid))
        self._connections.setdefault(domid, {})[connection] = None
        return connection

    def disconnect(self, connection: Connection) -> None:
        """Called by Connection.close()."""
        connections = self._connections[connection.domid]
        del connections[connection]
        if not connections:
            del self._connections[connection.domid]

    def introduce(self, domid: Domid) -> None:
        """INTRODUCE: the domain is there and may talk. A second time, or for domain 0, it is no news."""
        if _real_domid(domid) not in self._introduced:
            self._introduced.add(domid)
            self._fire_special(paths.INTRODUCE_DOMAIN, domid)

    def is_introduced(self, domid: Domid) -> bool:
        return domid in self._introduced

    def shutdown(self, domid: Domid) -> None:
        """The domain shut down or crashed but is not destroyed yet: watchers are told, its nodes stay."""
        self._fire_special(paths.RELEASE_DOMAIN, _real_domid(domid))

    def release(self, domid: Domid) -> None:
        """The domain is destroyed: its connections close, its nodes go, its permissions die with it."""
        for connection in list(self._connections.get(_real_domid(domid), ())):
            connection.close()
        if domid != CONTROL_DOMAIN:
            self._remove_orphans(domid)
            self.tree.forget_domain(domid)
            self._introduced.discard(domid)
        self._fire_special(paths.RELEASE_DOMAIN, domid)

    def connections(self, domid: Domid) -> list[Connection]:
        return list(self._connections.get(domid, ()))

    def usage(self, domid: Domid) -> Usage:
        """What a domain holds now, all its connections together."""
        connections = self._connections.get(domid, {})
        return Usage(
            nodes=len(self.tree.owned.get(domid, ())),
            watches=sum(len(connection.watches) for connection in connections),
            transactions=sum(len(connection.transactions) for connection in connections),
            connections=len(connections),
        )

    def dump(self) -> Iterator[tuple[str, bytes, list[Perm]]]:
        """Path, value and permissions of every node: parents first, children as they were created."""
        waiting = [paths.ROOT]
        while waiting:
            path = waiting.pop()
            node = self.tree.nodes.get(path)
            if node is None:
                continue  # removed while the caller was looking at an earlier one
            children = [paths.child(path, name) for name in reversed(node.children)]
            yield path, node.value, list(self.tree.live_perms(node))
            waiting.extend(children)

    # --- requests -------------------------------------------------------------------------------------------

    def get_node(self, view: View, domid: Domid, path: str, wanted: int = MAY_READ) -> Node:
        """The node; ENOENT, or EACCES if `domid` lacks a `wanted` bit or may not know that it is missing."""
        node = self._find(view, domid, path, wanted)
        if node is None:
            raise XsError(XsErrno.ENOENT, f"{path} does not exist")
        return node

    def write(self, view: View, domid: Domid, path: str, value: bytes) -> None:
        """WRITE: set the value, making the node and those above it as needed."""
        node = self._find(view, domid, path, MAY_WRITE)
        if node is None:
            self._create(view, domid, path, value)
        else:
            self._check_size(view, domid, path, node.size() - len(node.value) + len(value))
            view.change(path, node, value=value)
        view.note(path)
        self._publish(view)

    def make_directory(self, view: View, domid: Domid, path: str) -> None:
        """MKDIR: make sure that the node exists. Nobody is told if it did."""
        if self._find(view, domid, path, MAY_WRITE) is None:
            self._create(view, domid, path, b"")
            view.note(path)
            self._publish(view)

    def remove(self, view: View, domid: Domid, path: str) -> None:
        """RM: the node and everything below it. That it is missing is fine if its parent exists."""
        if self._find(view, domid, path, MAY_WRITE) is None:
            if view.get(paths.parent(path)) is None:
                raise XsError(XsErrno.ENOENT, f"{path} does not exist, nor the node above it")
            return
        if path == paths.ROOT:
            raise XsError(XsErrno.EINVAL, "the root cannot be removed")
        self._remove_subtree(view, path)
        self._publish(view)

    def set_perms(self, view: View, domid: Domid, path: str, wanted: list[Perm]) -> None:
        """SET_PERMS: the owner and the control domain may; only the control domain may name another owner."""
        perms = check_perms(wanted)
        if domid != CONTROL_DOMAIN and exceeds(len(perms), self.quota.node_permissions):
            self._refuse(view, f"{path} would have more than {self.quota.node_permissions} permissions")
        node = self.get_node(view, domid, path, MAY_WRITE | OWNS)
        if domid not in (CONTROL_DOMAIN, perms[0].domid):
            raise XsError(XsErrno.EPERM, f"domain {domid} may not give {path} to domain {perms[0].domid}")
        size = node.size() + (len(perms) - len(node.perms)) * PERM_BYTES
        self._check_size(view, domid, path, size)
        view.change(path, node, perms=perms)
        view.note(path)
        self._publish(view)

    def commit(self, transaction: Transaction, domid: Domid) -> None:
        """TRANSACTION_END T: all of it, or EAGAIN (conflict), ENOSPC (quota), ENOMEM (spoilt earlier)."""
        self.tree.end(transaction)
        if transaction.failed:
            raise XsError(XsErrno.ENOMEM, "a request in the transaction was refused for want of quota")
        transaction.check_conflicts()
        if transaction.growth(domid) > 0:
            self._check_nodes(transaction, domid, 0)
        transaction.commit()
        self._fire(transaction)

    # --- permissions and quotas -----------------------------------------------------------------------------

    def _find(self, view: View, domid: Domid, path: str, wanted: int) -> Node | None:
        """The node if `domid` has all `wanted` bits on it; None if it is missing and `domid` may know.

        errno_from_parents() in core.c: the nearest node above that exists decides whether ENOENT or EACCES
        is the answer, and so also who may create: one needs MAY_WRITE there.
        """
        node = view.get(path)
        if node is not None and granted(view.live_perms(node), domid) & wanted == wanted:
            return node
        above = path
        closest = None
        while closest is None and above != paths.ROOT:
            above = paths.parent(above)
            closest = view.get(above)
        if node is not None or closest is None or not granted(view.live_perms(closest), domid) & wanted:
            raise XsError(XsErrno.EACCES, f"domain {domid} has not the permission {path} asks for")
        return None

    def _create(self, view: View, domid: Domid, path: str, value: bytes) -> None:
        """Make the node and those above it; new ones inherit permissions and belong to whoever made them."""
        missing = [path]
        above = paths.parent(path)
        while (closest := view.get(above)) is None:
            missing.append(above)
            above = paths.parent(above)
        perms = view.live_perms(closest)
        if domid != CONTROL_DOMAIN:
            perms = (Perm(domid, perms[0].access), *perms[1:])
        self._check_nodes(view, domid, len(missing))
        size, name = len(value), ""
        for new in missing:
            self._check_size(view, domid, new, len(perms) * PERM_BYTES + size)
            name = paths.name_of(new)
            size = len(name) + 1
        self._check_size(view, domid, above, closest.size() + size)
        view.change_children(above, closest, add=name)
        name = ""
        for new in missing:
            view.create(new, value if new == path else b"", perms, child=name)
            name = paths.name_of(new)

    def _check_nodes(self, view: View, domid: Domid, more: int) -> None:
        count = len(self.tree.owned.get(domid, ())) + view.growth(domid) + more
        if domid != CONTROL_DOMAIN and exceeds(count, self.quota.nodes):
            self._refuse(view, f"domain {domid} would own more than {self.quota.nodes} nodes")

    def _check_size(self, view: View, domid: Domid, path: str, size: int) -> None:
        if domid != CONTROL_DOMAIN and exceeds(size, self.quota.node_size):
            self._refuse(view, f"{path} would be larger than {self.quota.node_size} bytes")

    def _refuse(self, view: View, what: str) -> NoReturn:
        view.failed = True
        raise XsError(XsErrno.ENOSPC, what)

    # --- removal --------------------------------------------------------------------------------------------

    def _remove_subtree(self, view: View, path: str) -> None:
        """Everything is looked at first (a transaction may refuse that), then removed, children first."""
        above = paths.parent(path)
        parent = view.get(above)
        doomed: list[str] = []
        waiting = [path]
        while waiting:
            doomed.append(waiting.pop())
            node = view.get(doomed[-1])
            if node is not None:
                waiting.extend(paths.child(doomed[-1], name) for name in node.children)
        for gone in reversed(doomed):
            view.put(gone, None)
            # Watches of a node below hear of it under their own path, those above only of the topmost one.
            view.note(gone, exact=gone != path)
        if parent is not None:
            view.change_children(above, parent, remove=paths.name_of(path))

    def _remove_orphans(self, domid: Domid) -> None:
        """XSA-417: what the dead domain owned, with everything below it, whoever owns that."""
        view = Direct(self.tree)
        for path in sorted(self.tree.owned.get(domid, ())):  # a parent sorts before its children
            node = self.tree.nodes.get(path)
            if node is None or node.perms[0].domid != domid:
                continue
            if path == paths.ROOT or paths.is_special(path):
                view.change(path, node, perms=(Perm(CONTROL_DOMAIN, Access.NONE),))
                view.note(path)
            else:
                self._remove_subtree(view, path)
        self._fire(view)

    # --- events ---------------------------------------------------------------------------------------------

    def _publish(self, view: View) -> None:
        """Tell the watchers now; within a transaction the commit does."""
        if not isinstance(view, Transaction):
            self._fire(view)

    def _fire(self, view: View) -> None:
        """Queue an event on every watch that a change concerns and whose domain may know of it.

        That is who could see the node before the change or can see it after (XSA-115): by reading it, or by
        listing the node above. So the last event of a node that becomes unreadable still arrives.
        """
        nodes = self.tree.nodes
        for path, exact in view.events.items():
            above = paths.parent(path)
            then = (view.before.get(path), view.before[above] if above in view.before else nodes.get(above))
            now = (nodes.get(path), nodes.get(above))
            for watch in list(self.watches.at(path) if exact else self.watches.concerned(path)):
                domid = watch.connection.domid
                if self._may_know(domid, *then) or self._may_know(domid, *now):
                    watch.connection.queue_event(watch, path)

    def _may_know(self, domid: Domid, node: Node | None, above: Node | None) -> bool:
        """False for a node that is not there: one that came and went in one transaction is no event."""
        return node is not None and any(
            each is not None and granted(self.tree.live_perms(each), domid) & MAY_READ for each in (node, above)
        )

    def _fire_special(self, name: str, domid: Domid) -> None:
        """@introduceDomain and @releaseDomain: told to who may read the special node.

        A watch with a depth gets the domid too (Xen 4.22), and one may watch for a single domain.
        """
        node = self.tree.nodes[name]
        detailed = f"{name}/{domid}"
        found = [(watch, detailed if watch.depth else name) for watch in self.watches.at(name)]
        found += [(watch, detailed) for watch in self.watches.at(detailed)]
        for watch, path in found:
            if granted(self.tree.live_perms(node), watch.connection.domid) & MAY_READ:
                watch.connection.queue_event(watch, path)


def _real_domid(domid: Domid) -> Domid:
    if not 0 <= domid < DOMID_FIRST_RESERVED:
        raise XsError(XsErrno.EINVAL, f"{domid} is not the domid of a domain")
    return domid
