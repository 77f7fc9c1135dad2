"""connection.py: one client of the store and its requests, named as in io/xs_wire.h (enum xsd_sockmsg_type).

Made by Store.connect(); used by client.py in process and by the wire layer for guests and foreign programs.
Turns what the caller sent (a path of his own, a transaction's number) into what store.py works on, and
keeps what belongs to one caller: transactions, watches and undelivered events. Paths are str, values bytes;
`tx` 0 is no transaction.
Every request raises XsError, and EIO once the connection is closed.
Invariants: on_event is only called from dispatch(), which is never entered twice; after close() or
unwatch() no event of that watch is delivered. The 4096-byte limit on a reply is the wire layer's, except
for directory_part(), which exists because of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from xenmodel.public.io.xs_wire import XENSTORE_PAYLOAD_MAX
from xenmodel.types import Domid
from xenmodel.xenstore import path as paths
from xenmodel.xenstore.domain import Cause, DomainRecord
from xenmodel.xenstore.errors import XsErrno, XsError, shown
from xenmodel.xenstore.perms import CONTROL_DOMAIN, MAY_READ, Perm, check_perms
from xenmodel.xenstore.quota import Quota
from xenmodel.xenstore.transaction import Direct, Transaction, View
from xenmodel.xenstore.watch import EventQueue, Watch

if TYPE_CHECKING:
    from xenmodel.xenstore.store import Store

_TX_MAX = 0xFFFFFFFF  # transaction numbers are uint32_t


class Connection:
    """`on_event(path, token)` is the client's; without it events stay queued. `on_turn` is called when dispatch() begins."""

    def __init__(self, store: Store, record: DomainRecord) -> None:
        self.domid = record.domid
        self.record = record
        self.closed = False
        self.on_event: Callable[[str, str], None] | None = None
        self.on_turn: Callable[[], None] | None = None
        self.watches: dict[tuple[str, str], Watch] = {}  # by canonical path and token
        self.transactions: dict[int, Transaction] = {}
        self._store = store
        self._domains = store.domains
        self._events = EventQueue(record)
        self._next_tx = 1
        self._dispatching = False

    @property
    def limits(self) -> Quota:
        return self._domains.limits(self.domid)

    def refusal(self, quota: str, what: str) -> XsError:
        """The error for a limit that is in the way, counted."""
        self.record.refuse(quota, what)
        return XsError(XsErrno.ENOSPC, what, quota)

    # --- nodes ----------------------------------------------------------------------------------------------

    def read(self, path: str, tx: int = 0) -> bytes:
        return self._store.get_node(self._view(tx), self.domid, self._path(path)).value

    def write(self, path: str, value: bytes, tx: int = 0) -> None:
        """E2BIG for what no request could carry, and so no reader could be sent."""
        view, name = self._view(tx), self._path(path)
        if len(path) + 1 + len(value) > XENSTORE_PAYLOAD_MAX:
            raise XsError(XsErrno.E2BIG, f"{len(value)} bytes are too many for {name}")
        self._store.write(view, self.domid, name, bytes(value))

    def mkdir(self, path: str, tx: int = 0) -> None:
        self._store.make_directory(self._view(tx), self.domid, self._path(path))

    def rm(self, path: str, tx: int = 0) -> None:
        self._store.remove(self._view(tx), self.domid, self._path(path))

    def directory(self, path: str, tx: int = 0) -> list[str]:
        """Names of the children in the order of their creation."""
        return list(self._store.get_node(self._view(tx), self.domid, self._path(path)).children)

    def names(self, path: str, tx: int = 0) -> bytes:
        """The same as DIRECTORY sends it: each with a NUL."""
        return self._store.get_node(self._view(tx), self.domid, self._path(path)).names()

    def directory_part(self, path: str, offset: int, tx: int = 0) -> tuple[int, bytes]:
        """The node's generation and what follows it in the reply.

        That is whole names from byte `offset` of the list of children, each with its NUL, as many as one
        message holds, and one more NUL if the list ends with them.
        """
        node = self._store.get_node(self._view(tx), self.domid, self._path(path))
        if offset < 0:
            raise XsError(XsErrno.EINVAL, f"{offset} is not an offset into a list of names")
        rest = node.names()[offset:]
        room = XENSTORE_PAYLOAD_MAX - len(str(node.generation)) - 1
        if len(rest) < room:
            return node.generation, rest + b"\0"
        return node.generation, rest[: rest.rfind(b"\0", 0, room - 1) + 1]

    def get_perms(self, path: str, tx: int = 0) -> list[Perm]:
        view = self._view(tx)
        node = self._store.get_node(view, self.domid, self._path(path, special=True), MAY_READ)
        return list(view.live_perms(node))

    def set_perms(self, path: str, perms: Sequence[Perm], tx: int = 0) -> None:
        view, wanted = self._view(tx), check_perms(perms)
        self._store.check_permissions(self.domid, len(wanted))
        self._store.check_owner(wanted[0].domid)
        self._store.set_perms(view, self.domid, self._path(path, special=True), wanted)

    # --- transactions ---------------------------------------------------------------------------------------

    def transaction_start(self) -> int:
        self._check_open()
        limits = self.limits
        if limits.transactions and self.record.transactions >= limits.transactions:
            raise self.refusal("transactions", f"domain {self.domid} has {limits.transactions} transactions open")
        tx = self._next_tx
        while tx in self.transactions:
            tx = tx % _TX_MAX + 1
        self._next_tx = tx % _TX_MAX + 1
        self.transactions[tx] = Transaction(
            self._store.tree, limits.transaction_nodes, self.record, self._domains.check_memory
        )
        self._store.open_transactions += 1
        self.record.transactions += 1
        return tx

    def transaction_end(self, tx: int, commit: bool) -> None:
        """Whatever the answer, the transaction is over: EAGAIN means start again from the beginning."""
        self._check_open()
        transaction = self.transactions.pop(tx, None)
        if transaction is None:
            raise _no_transaction(tx)
        try:
            if commit:
                self._store.commit(transaction, self.domid)
        finally:
            self._ended(transaction)

    def abort_all(self) -> None:
        """Every open transaction ends, uncommitted."""
        while self.transactions:
            self._ended(self.transactions.popitem()[1])

    def _ended(self, transaction: Transaction) -> None:
        self._store.open_transactions -= 1
        self.record.transactions -= 1
        self.record.memory -= transaction.memory

    # --- watches --------------------------------------------------------------------------------------------

    def watch(self, path: str, token: str, depth: int | None = None) -> None:
        """Events for `path` and at most `depth` levels below it, and one at once whether or not it exists."""
        self._check_open()
        name = self._path(path, special=True)
        if "\0" in token or (depth is not None and depth < 0):
            raise XsError(XsErrno.EINVAL, f"token {shown(token)} or depth {depth} makes no watch")
        prefix_length = len(paths.home(self.domid)) + 1 if paths.is_relative(path) else 0
        watch = Watch(self, name, token, depth, prefix_length, self._store.next_order())
        if not watch.fits(name):
            raise XsError(XsErrno.E2BIG, f"no event has room for a token of {len(token)} characters on {name}")
        if (name, token) in self.watches:
            raise XsError(XsErrno.EEXIST, f"{name} is watched with token {shown(token)} already")
        limit = self.limits.watches
        if limit and self.record.watches >= limit:
            # Older daemons answered E2BIG here.
            raise self.refusal("watches", f"domain {self.domid} has {limit} watches")
        self._domains.check_memory(self.domid, len(name) + len(token), f"a watch of {name}")
        self.record.watches += 1
        self.record.memory += len(name) + len(token)
        self.watches[name, token] = watch
        self._store.watches.add(watch)
        self.queue_event(watch, name)  # which the daemon does not count with the request

    def unwatch(self, path: str, token: str) -> None:
        """ENOENT also for what could not be the path of a watch."""
        self._check_open()
        name = f"{paths.home(self.domid)}/{path}" if paths.is_relative(path) else path
        watch = self.watches.pop((name, token), None)
        if watch is None:
            raise XsError(XsErrno.ENOENT, f"{shown(name)} is not watched with token {shown(token)}")
        self._forget(watch)

    def reset_watches(self) -> None:
        """RESET_WATCHES: a kernel that starts anew in an old domain also drops the transactions (XSA-484)."""
        self._check_open()
        self._drop_everything()

    # --- domains --------------------------------------------------------------------------------------------

    def get_domain_path(self, domid: Domid) -> str:
        self._check_open()
        return paths.home(domid)

    def is_introduced(self, domid: Domid) -> bool:
        self._check_open()
        if self.domid != CONTROL_DOMAIN:
            raise XsError(XsErrno.EACCES, f"domain {self.domid} may not ask about domain {domid}")
        return self._store.is_introduced(domid)

    # --- events ---------------------------------------------------------------------------------------------

    @property
    def pending_events(self) -> int:
        return len(self._events)

    def queue_event(self, watch: Watch, path: str, cause: Cause | None = None) -> None:
        """Called by the store. While dispatch() runs its result tells the loop, otherwise `wake` does."""
        was_idle = not self._events
        self._events.push(watch, path, self._store.clock(), cause)
        if was_idle:
            if self.domid != CONTROL_DOMAIN and not self.record.expiring:  # nobody pays for its events for ever
                self.record.expiring = True
                self._store.expire_events(self.record)
            if not self._dispatching:
                self._store.notify(self)

    def expire(self, before: float) -> float | None:
        """Drop the events nobody has taken since `before`; since when the oldest of the others waits."""
        self._events.expire(before)
        return self._events.oldest()

    def event_memory(self) -> int:
        """Bytes of the queued events, counted anew (upkeep.problems)."""
        return self._events.memory()

    def dispatch(self, budget: int = 1) -> bool:
        """Deliver at most `budget` events; True if more are queued. on_event may call anything, also close().

        A nested call does nothing and says so: the outer one goes on. If on_event raises, the event counts as
        delivered, the rest is announced again and the exception is the caller's.
        """
        if self._dispatching:
            return False
        self._dispatching = True
        try:
            if self.on_turn is not None:
                self.on_turn()
            for _ in range(budget):
                event = None if self.on_event is None else self._events.pop()
                if event is None or self.on_event is None:
                    break
                self.on_event(*event)
        except BaseException:
            if self._events:
                self._store.notify(self)
            raise
        finally:
            self._dispatching = False
        return self.on_event is not None and len(self._events) > 0

    def close(self) -> None:
        """Transactions are aborted, watches and their events dropped. Closing twice is fine."""
        if not self.closed:
            self.closed = True
            self._drop_everything()
            self._store.disconnect(self)

    # --- helpers --------------------------------------------------------------------------------------------

    def _view(self, tx: int) -> View:
        self._check_open()
        if tx == 0:
            return Direct(self._store.tree)
        transaction = self.transactions.get(tx)
        if transaction is None:
            raise _no_transaction(tx)
        transaction.node_limit = self.limits.transaction_nodes  # which may have been changed since it began
        return transaction

    def _path(self, path: str, special: bool = False) -> str:
        return paths.canonical(path, self.domid, self.limits.path_max, special)

    def _check_open(self) -> None:
        if self.closed:
            raise XsError(XsErrno.EIO, f"this connection of domain {self.domid} is closed")

    def _drop_everything(self) -> None:
        for watch in self.watches.values():
            self._forget(watch)
        self.watches.clear()
        self.abort_all()

    def _forget(self, watch: Watch) -> None:
        self.record.watches -= 1
        self.record.memory -= len(watch.path) + len(watch.token)
        self._store.watches.remove(watch)
        self._events.forget(watch)


def _no_transaction(tx: int) -> XsError:
    return XsError(XsErrno.ENOENT, f"there is no transaction {tx}")
