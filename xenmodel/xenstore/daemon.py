"""daemon.py: xenstored as a server: its clients, the domains it talks to, and what the hypervisor and CONTROL ask of it.

One per hypervisor, in domain 0, as on a real host: it maps a domain's page by the grant that is reserved for it
(GNTTAB_RESERVED_XENSTORE), binds the domain's event channel, and learns of a domain's end from the hypervisor. The store's
rules are in store.py; carriers of bytes other than the rings come from the host: peer().
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from xenmodel.public.grant_table import GNTTAB_RESERVED_XENSTORE, GNTST_okay
from xenmodel.public.io.xs_wire import XsType
from xenmodel.types import Domid, Port
from xenmodel.xenstore.connection import Connection
from xenmodel.xenstore.domain import FEATURES, WARN_PAUSE_S, DomainRecord
from xenmodel.xenstore.errors import XsErrno, XsError, shown
from xenmodel.xenstore.peer import Peer
from xenmodel.xenstore.perms import CONTROL_DOMAIN
from xenmodel.xenstore.ring import StoreRing
from xenmodel.xenstore.store import Store
from xenmodel.xenstore.upkeep import reload

if TYPE_CHECKING:
    from xenmodel.hypervisor import Hypervisor

logger = logging.getLogger("xenstored")


class _Served:
    """One domain's ring, its event channel at our end, and what gives the page back."""

    def __init__(self, ring: StoreRing, port: Port, unmap: Callable[[], object]) -> None:
        self.ring, self.port, self.unmap = ring, port, unmap


class Xenstored:
    """`log` takes a line for the administrator; `tracing` makes it all requests and replies."""

    def __init__(self, hypervisor: Hypervisor, store: Store) -> None:
        self.hypervisor = hypervisor
        self.store = store
        self.domains = store.domains
        self.defer = hypervisor.defer
        self.log: Callable[[str], None] = logger.warning
        self.on_release: Callable[[Domid], None] = lambda domid: None  # its connections have ended
        self.tracing = False
        self.counts: Counter[int] = Counter()  # requests by type
        self.rings: dict[Domid, _Served] = {}
        self.own_port = 0  # domain 0's end of its channel
        self._stalled: dict[DomainRecord, dict[Peer, None]] = {}
        self._due: set[Connection] = set()  # peers' that are in the hypervisor's queue
        self._queue, store.wake = store.wake, self._wake

    def peer(self, domid: Domid, flush: Callable[[], None]) -> Peer:
        """A new client of a domain behind a stream of bytes."""
        return Peer(self, domid, flush)

    def _wake(self, connection: Connection) -> None:
        """Into the queue, once: or each event that was told before its turn came would buy a client another turn."""
        if self._queue is not None and connection not in self._due:
            if connection.on_turn is not None:
                self._due.add(connection)
            self._queue(connection)

    def turned(self, peer: Peer) -> None:
        """Its turn has come."""
        self._due.discard(peer.connection)

    # --- domains ------------------------------------------------------------------------------------------------------

    def existing(self, domid: Domid) -> DomainRecord:
        """ENOENT for a domain that does not exist."""
        if domid not in self.hypervisor.domains:
            raise XsError(XsErrno.ENOENT, f"there is no domain {domid}")
        return self.domains.record(domid)

    def introduced(self, domid: Domid) -> DomainRecord:
        """ENOENT for a domain that was not introduced."""
        record = self.domains.find(domid)
        if record is None or not record.introduced:
            raise XsError(XsErrno.ENOENT, f"domain {domid} was not introduced")
        return record

    def introduce(self, domid: Domid, gfn: int, port: int) -> None:
        """INTRODUCE: talk to a domain through its page and event channel; again: with a new event channel (after a restore).

        `gfn` is the page's frame, which Xen's daemon ignores in favour of the grant, and so do we. EINVAL if there is no
        such page or event channel.
        """
        if port <= 0:
            raise XsError(XsErrno.EINVAL, f"{port} is not an event channel")
        dom0 = self.hypervisor.domains.get(CONTROL_DOMAIN)
        served = self.rings.get(domid)
        if dom0 is None or (domid == CONTROL_DOMAIN and served is None):
            raise XsError(XsErrno.EINVAL, f"domain {domid} cannot be introduced")
        if served is not None:
            dom0.events.close(served.port)
            served.port = Port(max(0, self._bind(domid, port)))
            if not served.port:  # the daemon, too, says OK and waits for another INTRODUCE
                self.log(f"domain {domid} has no event channel {port} for us: its xenstore ring is deaf")
            if domid == CONTROL_DOMAIN:
                self.own_port = port
            served.ring.introduce()
            return
        status, mapping = dom0.maptrack.map(domid, GNTTAB_RESERVED_XENSTORE)
        if mapping is None or status != GNTST_okay:
            raise XsError(XsErrno.EINVAL, f"domain {domid} does not grant its xenstore page (status {status})")
        handle = mapping.handle
        self._serve(domid, mapping.view, port, lambda: dom0.maptrack.unmap(handle))
        self.store.introduce(domid)

    def serve_own_domain(self, page: memoryview, port: int) -> None:
        """The ring of domain 0's kernel, for a program that maps its page (/proc/xen/xsd_kva) and knows its port."""
        self._serve(CONTROL_DOMAIN, page, port, lambda: None)
        self.own_port = port

    def _serve(self, domid: Domid, page: memoryview, port: int, unmap: Callable[[], object]) -> None:
        bound = self._bind(domid, port)
        if bound < 0:
            unmap()
            raise XsError(XsErrno.EINVAL, f"domain {domid} has no event channel {port} for us")

        def notify() -> None:
            if domid in self.rings and self.rings[domid].port > 0:
                self.hypervisor.domains[CONTROL_DOMAIN].events.send(self.rings[domid].port)

        ring = StoreRing(domid, page, notify, lambda flush: self.peer(domid, flush))
        self.rings[domid] = _Served(ring, bound, unmap)
        ring.introduce()

    def _bind(self, domid: Domid, port: int) -> Port:
        def kicked(_port: Port) -> None:
            if domid in self.rings:
                self.rings[domid].ring.kicked()

        return self.hypervisor.domains[CONTROL_DOMAIN].events.bind_interdomain(domid, port, kicked)

    def release(self, domid: Domid) -> None:
        """RELEASE, or the domain has died: give back its page and channel, and forget it."""
        served = self.rings.pop(domid, None)
        dom0 = self.hypervisor.domains.get(CONTROL_DOMAIN)
        if served is not None:
            served.ring.close()
            if dom0 is not None:
                dom0.events.close(served.port)
                served.unmap()
        self.store.release(domid)
        self.on_release(domid)

    def set_features(self, domid: Domid, features: int) -> None:
        """SET_FEATURE: before the domain is introduced."""
        record = self.existing(domid)
        if record.introduced:
            raise XsError(XsErrno.EBUSY, f"domain {domid} was introduced with features {record.features} already")
        if features & ~FEATURES or features < 0:
            raise XsError(XsErrno.EINVAL, f"features {features}: only the bits of {FEATURES} are there")
        record.features = features

    # --- the server itself --------------------------------------------------------------------------------------------

    def stall(self, peer: Peer) -> None:
        """A domain has to wait until others have read what it caused."""
        record = peer.connection.record
        self._stalled.setdefault(record, {})[peer] = None
        record.relieved = lambda: self._relieve(record)

    def complain(self, domid: Domid, what: str) -> None:
        """A line about a client that breaks the protocol; of one domain one now and then, however often it does it."""
        record, now = self.domains.record(domid), self.store.clock()
        if now - record.complained_at >= WARN_PAUSE_S:
            record.complained_at = now
            self.log(f"domain {domid}: {what}")

    def limits_changed(self) -> None:
        """Whoever waits may go on now."""
        for record in list(self._stalled):
            self._relieve(record)

    def _relieve(self, record: DomainRecord) -> None:
        """Something outstanding is not any more: let its connections look again."""
        for peer in self._stalled.pop(record, ()):
            self.store.notify(peer.connection)

    def reload(self, force: bool) -> str:
        """Live update: the tree is written down and read into a new one, to which all clients move with their watches.

        "BUSY" while transactions are open; with `force` they end (their next request is answered ENOENT).
        """
        if self.store.open_transactions:
            if not force:
                return "BUSY"
            for record in self.domains.all():
                for connection in record.connections:
                    connection.abort_all()
        reload(self.store)
        return "OK"

    def trace(self, way: str, peer: Peer, kind: int, body: bytes) -> None:
        name = XsType(kind).name if kind in XsType.__members__.values() else str(kind)
        words = body.replace(b"\0", b" ").decode("utf-8", "backslashreplace").rstrip()
        logger.warning("%s domain %d %s (%s)", way, peer.connection.domid, name, shown(words, 400)[1:-1])
