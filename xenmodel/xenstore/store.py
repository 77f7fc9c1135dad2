"""store.py: the rules of xenstored: permissions, quotas, who is told, what a dead domain leaves behind.

After tools/xenstored/core.c and domain.c. Requests arrive from connection.py with a view (transaction.py) and a canonical
path; daemon.py, for the hypervisor and the toolstack, calls connect(), introduce(), shutdown() and release(). Every change
is decided before it is made: a request that raises has changed nothing (but within a transaction, one that hits a quota
spoils the transaction, as in the daemon). Nothing recurses; no cost depends on the tree's size, only on depth, on a
directory's width where it is listed, and on what is removed.
`wake` is called with a connection that got its first queued event, or that may go on; it may only take note of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

from xenmodel.public.xen import DOMID_ANY
from xenmodel.timers import Timers
from xenmodel.types import Domid
from xenmodel.xenstore import path as paths
from xenmodel.xenstore.connection import Connection
from xenmodel.xenstore.domain import Cause, DomainRecord, Domains
from xenmodel.xenstore.errors import XsErrno, XsError
from xenmodel.xenstore.perms import (
    CONTROL_DOMAIN,
    MAY_READ,
    MAY_WRITE,
    OWNS,
    Access,
    Perm,
)
from xenmodel.xenstore.quota import DEFAULT_QUOTA, Quota, exceeds
from xenmodel.xenstore.transaction import HEADER_BYTES, PERM_BYTES, Direct, Node, Transaction, Tree, View
from xenmodel.xenstore.watch import Watch, WatchTable

Wake = Callable[[Connection], None]
EVENT_TIMEOUT_S = 20.0  # a domain that leaves an event unread for so long loses it


class Store:
    """The tree, its watches and the domains that use it. A new one holds /tool/xenstored, as in Xen."""

    def __init__(
        self,
        quota: Quota = DEFAULT_QUOTA,
        wake: Wake | None = None,
        clock: Callable[[], float] = lambda: 0.0,
        exists: Callable[[Domid], bool] = lambda domid: True,
    ) -> None:
        self.tree = Tree()
        self.domains = Domains(self.tree, quota, clock)
        self.watches = WatchTable()
        self.clock = clock
        self.timers = Timers(clock)
        self.open_transactions = 0
        self.cause: Cause | None = None  # the request of a domain that is being served
        self._exists = exists
        self.usage = self.domains.usage
        self._watches_made = 0
        self._wake = wake
        own = self.domains.record(CONTROL_DOMAIN)
        own.introduced = True
        self.domains.credit.open(own)  # never charged, but one of those among whom the rate is divided
        self.make_directory(Direct(self.tree), CONTROL_DOMAIN, "/tool/xenstored")

    # --- domains --------------------------------------------------------------------------------------------

    @property
    def wake(self) -> Wake | None:
        return self._wake

    @wake.setter
    def wake(self, wake: Wake | None) -> None:
        """Connections that have events already are reported at once: no event waits for the next one."""
        self._wake = wake
        for record in self.domains.all():
            for connection in list(record.connections):
                if connection.pending_events:
                    self.notify(connection)

    def notify(self, connection: Connection) -> None:
        if self._wake is not None:
            self._wake(connection)

    def next_order(self) -> int:
        self._watches_made += 1
        return self._watches_made

    def connect(self, domid: Domid) -> Connection:
        """A new connection of a domain, introduced or not. Domain 0 is the control domain."""
        record = self.domains.record(domid)
        connection = Connection(self, record)
        record.connections[connection] = None
        return connection

    def disconnect(self, connection: Connection) -> None:
        """Called by Connection.close()."""
        connection.record.connections.pop(connection, None)

    def created(self, domid: Domid) -> None:
        """A new domain exists: what was permitted to its number before is nothing to it."""
        self.tree.forget_domain(domid)

    def introduce(self, domid: Domid) -> None:
        """INTRODUCE: the domain is there and may talk. A second time, or for domain 0, it is no news."""
        record = self.domains.record(domid)
        if not record.introduced:
            record.introduced = True
            self.domains.credit.open(record)
            self._fire_special(paths.INTRODUCE_DOMAIN, domid)

    def is_introduced(self, domid: Domid) -> bool:
        record = self.domains.find(domid)
        return record is not None and record.introduced

    def shutdown(self, domid: Domid) -> None:
        """The domain shut down or crashed, but is not destroyed: watchers are told, once until RESUME; its nodes stay."""
        record = self.domains.record(domid)
        if record.introduced and not record.shutdown:
            record.shutdown = True
            self._fire_special(paths.RELEASE_DOMAIN, domid)

    def release(self, domid: Domid) -> None:
        """The domain is destroyed, or RELEASEd: its connections close, its nodes go, its permissions die with it."""
        record = self.domains.record(domid)
        for connection in list(record.connections):
            connection.close()
        if domid != CONTROL_DOMAIN:
            self._remove_orphans(domid)
            self.tree.forget_domain(domid)
            self.domains.forget(record)
        if record.introduced:
            self._fire_special(paths.RELEASE_DOMAIN, domid)

    def adopt(self, tree: Tree, watches: WatchTable) -> None:
        """Go on with another tree and table of the same watches (upkeep.reload)."""
        self.tree = self.domains.tree = tree
        self.watches = watches

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
            grown = len(value) - len(node.value)
            self._check_size(view, domid, path, node.size() + grown)
            self._check_grown(view, domid, path, node, grown)
            view.change(path, node, value=value)
        view.note(path)
        self._publish(view, domid)

    def make_directory(self, view: View, domid: Domid, path: str) -> None:
        """MKDIR: make sure that the node exists. Nobody is told if it did."""
        if self._find(view, domid, path, MAY_WRITE) is None:
            self._create(view, domid, path, b"")
            view.note(path)
            self._publish(view, domid)

    def remove(self, view: View, domid: Domid, path: str) -> None:
        """RM: the node and everything below it. That it is missing is fine if its parent exists."""
        if self._find(view, domid, path, MAY_WRITE) is None:
            if view.get(paths.parent(path)) is None:
                raise XsError(XsErrno.ENOENT, f"{path} does not exist, nor the node above it")
            return
        if path == paths.ROOT:
            raise XsError(XsErrno.EINVAL, "the root cannot be removed")
        self._remove_subtree(view, path)
        self._publish(view, domid)

    def check_permissions(self, domid: Domid, count: int) -> None:
        """May `domid` give a node so many? This and the next spoil no transaction: nothing was looked at yet."""
        limit = self.domains.limits(domid).node_permissions
        if domid != CONTROL_DOMAIN and exceeds(count, limit):
            what = f"a node would have {count} permissions, more than {limit}"
            self.domains.record(domid).refuse("permissions", what)
            raise XsError(XsErrno.ENOSPC, what, "permissions")

    def check_owner(self, owner: Domid) -> None:
        if owner != DOMID_ANY and not self._exists(owner):
            raise XsError(XsErrno.ENOENT, f"there is no domain {owner} to own a node")

    def set_perms(self, view: View, domid: Domid, path: str, perms: tuple[Perm, ...]) -> None:
        """SET_PERMS: the owner and the control domain may; only the control domain may name another owner."""
        node = self.get_node(view, domid, path, MAY_WRITE | OWNS)
        if domid != CONTROL_DOMAIN and perms[0].domid != view.live_perms(node)[0].domid:
            raise XsError(XsErrno.EPERM, f"domain {domid} may not give {path} to domain {perms[0].domid}")
        grown = (len(perms) - len(node.perms)) * PERM_BYTES
        self._check_size(view, domid, path, node.size() + grown)
        self._check_grown(view, domid, path, node, grown)
        view.change(path, node, perms=perms)
        view.note(path)
        self._publish(view, domid)

    def commit(self, transaction: Transaction, domid: Domid) -> None:
        """TRANSACTION_END T: all of it, or EAGAIN (conflict), ENOSPC (quota), ENOMEM (spoilt earlier)."""
        if transaction.failed:
            raise XsError(XsErrno.ENOMEM, "a request in the transaction was refused for want of quota")
        if transaction.growth(domid) > 0:
            self._check_nodes(transaction, domid, 0)
        if not all(owner == DOMID_ANY or self._exists(owner) for owner in transaction.owners):
            raise XsError(XsErrno.ENOMEM, "a domain that would own a node has died")
        transaction.check_conflicts()
        if self.open_transactions > 1:  # the first is this one
            self.domains.charge(domid, 1)
        self._fire(transaction, transaction.commit())

    # --- permissions and quotas -----------------------------------------------------------------------------

    def _find(self, view: View, domid: Domid, path: str, wanted: int) -> Node | None:
        """The node if `domid` has all `wanted` bits on it; None if it is missing and `domid` may know.

        errno_from_parents() in core.c: the nearest node above that exists decides whether ENOENT or EACCES
        is the answer, and so also who may create: one needs MAY_WRITE there.
        """
        node = view.get(path)
        if node is not None and (
            domid == CONTROL_DOMAIN or self.domains.granted(view.live_perms(node), domid) & wanted == wanted
        ):
            return node
        above = path
        closest = None
        while closest is None and above != paths.ROOT:
            above = paths.parent(above)
            closest = view.get(above)
        if node is not None or closest is None or not self.domains.granted(view.live_perms(closest), domid) & wanted:
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
        grown = sum(HEADER_BYTES + len(new) + len(perms) * PERM_BYTES for new in missing) + len(value)
        self._check_memory(view, perms[0].domid, grown, path)
        view.change_children(above, closest, add=name)
        name = ""
        for new in missing:
            view.create(new, value if new == path else b"", perms, child=name)
            name = paths.name_of(new)

    def _check_nodes(self, view: View, domid: Domid, more: int) -> None:
        count, limit = len(self.tree.owned.get(domid, ())) + view.growth(domid) + more, self.domains.limits(domid).nodes
        if domid != CONTROL_DOMAIN and exceeds(count, limit):
            self._refuse(view, domid, "nodes", f"domain {domid} would own {count} nodes, more than {limit}")

    def _check_size(self, view: View, domid: Domid, path: str, size: int) -> None:
        if domid != CONTROL_DOMAIN:
            limit = self.domains.limits(domid).node_size
            if exceeds(size, limit):
                self._refuse(view, domid, "node-size", f"{path} would have {size} bytes, more than {limit}")

    def _check_grown(self, view: View, domid: Domid, path: str, node: Node, grown: int) -> None:
        """The bytes are the owner's, whoever writes; within a transaction, its copies are the writer's."""
        if grown > 0:
            self._check_memory(view, domid if isinstance(view, Transaction) else node.perms[0].domid, grown, path)

    def _check_memory(self, view: View, domid: Domid, grown: int, path: str) -> None:
        try:
            self.domains.check_memory(domid, grown, path)
        except XsError:
            view.failed = True
            raise

    def _refuse(self, view: View, domid: Domid, quota: str, what: str) -> NoReturn:
        view.failed = True
        self.domains.record(domid).refuse(quota, what)
        raise XsError(XsErrno.ENOSPC, what, quota)

    def expire_events(self, record: DomainRecord) -> None:
        """Called once when a domain has an event: see in a while whether it was taken, until none is left."""

        def look() -> None:
            before = self.clock() - EVENT_TIMEOUT_S
            waiting = [since for each in record.connections if (since := each.expire(before)) is not None]
            record.expiring = bool(waiting)
            if waiting:
                self.timers.add(min(waiting) + EVENT_TIMEOUT_S, look)

        self.timers.add(self.clock() + EVENT_TIMEOUT_S, look)

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
                waiting.extend([paths.child(doomed[-1], name) for name in reversed(node.children)])
        for gone in paths.children_first(doomed):
            view.put(gone, None)
            # Watches of a node below hear of it under their own path, those above only of the topmost one.
            view.note(gone, exact=gone != path)
        if parent is not None:
            view.change_children(above, parent, remove=paths.name_of(path))

    def _remove_orphans(self, domid: Domid) -> None:
        """XSA-417: what the dead domain owned, with everything below it, whoever owns that."""
        view = Direct(self.tree)
        for path in self.tree.topmost(domid):
            if path == paths.ROOT or paths.is_special(path):
                view.change(path, self.tree.nodes[path], perms=(Perm(CONTROL_DOMAIN, Access.NONE),))
                view.note(path)
            else:
                self._remove_subtree(view, path)
        self._fire(view, view.events)

    # --- events ---------------------------------------------------------------------------------------------

    def _publish(self, view: View, domid: Domid) -> None:
        """Tell the watchers, and charge for what may make somebody's transaction fail. Of a transaction, the commit does."""
        if not isinstance(view, Transaction):
            if self.open_transactions:
                self.domains.charge(domid, len(view.before))
            self._fire(view, view.events)

    def _fire(self, view: View, changed: Iterable[str]) -> None:
        """Queue an event on every watch that a change concerns and whose domain may know of it.

        That is who could read the node before the change, or can read it or the node above it after (XSA-115); of a node
        that is removed outside of a transaction also who could list the node above. So the last event of a node that
        becomes unreadable still arrives.
        """
        nodes, direct = self.tree.nodes, not isinstance(view, Transaction)
        known: dict[str, list[Watch]] = {}
        for path in changed:
            exact = view.events[path]
            watches = list(self.watches.at(path)) if exact else self.watches.concerned(path, known)
            if not watches:
                continue
            above = paths.parent(path)
            then, parent = view.before.get(path), view.before[above] if above in view.before else nodes.get(above)
            now, now_parent = nodes.get(path), nodes.get(above)
            for watch in watches:
                domid = watch.connection.domid
                if (
                    self._may_read(domid, then)
                    or (now is not None and (self._may_read(domid, now) or self._may_read(domid, now_parent)))
                    or (direct and then is not None and self._may_read(domid, parent))
                ):
                    watch.connection.queue_event(watch, path, self.cause)

    def _may_read(self, domid: Domid, node: Node | None) -> bool:
        if node is None:
            return False
        return domid == CONTROL_DOMAIN or bool(self.domains.granted(self.tree.live_perms(node), domid) & MAY_READ)

    def _fire_special(self, name: str, domid: Domid) -> None:
        """@introduceDomain and @releaseDomain: told to who may read the special node.

        A watch with a depth gets the domid too (Xen 4.22), and one may watch for a single domain.
        """
        node = self.tree.nodes[name]
        detailed = f"{name}/{domid}"
        found = [(watch, detailed if watch.depth else name) for watch in self.watches.at(name)]
        found += [(watch, detailed) for watch in self.watches.at(detailed)]
        for watch, path in found:
            if self.domains.granted(self.tree.live_perms(node), watch.connection.domid) & MAY_READ:
                watch.connection.queue_event(watch, path, self.cause)
