"""ours.py: our xenstored as the differential test sees it: a Hypervisor in this process, with its domains and their rings.

The same calls as RealXenstored's (bench/realstore.py), so that a rig can drive one beside the other. Guests speak over
real ring pages and event channels, domain 0 over Peers, and over its own ring as its kernel would. Time stands still until
somebody waits: then it jumps to whatever the store has to do next, or to the end of the wait.
"""

from __future__ import annotations

from bench.realstore import STORE_PORT, WireClient
from xenmodel.domain import Domain
from xenmodel.hypervisor import Hypervisor
from xenmodel.public.grant_table import GNTTAB_RESERVED_XENSTORE
from xenmodel.public.io.xs_wire import XENSTORE_DOMAIN_INTERFACE, XENSTORE_RING_SIZE
from xenmodel.ring import BytePipe
from xenmodel.types import Domid, Gref, Port

PAGES = 8  # of a domain: shared_info, the grant table, the store's page
_WORD = {name: offset // 4 for name, offset in XENSTORE_DOMAIN_INTERFACE.offsets.items()}


class OurStore:
    """A hypervisor with domain 0 and a store."""

    def __init__(self) -> None:
        self.now = 0.0
        self.hypervisor = Hypervisor(clock=lambda: self.now)
        self.daemon = self.hypervisor.xenstored
        self.daemon.log = lambda line: None
        self.rings: dict[int, OurRing] = {}
        self.create_domain(0)
        self.hypervisor.settle()

    def close(self) -> None:
        self.hypervisor.close()

    def client(self) -> WireClient:
        """A connection of domain 0, as over the socket."""
        stream = OurSocket(self)
        client = WireClient(stream)
        client.close = stream.close
        return client

    def create_domain(self, domid: int) -> OurRing:
        """A domain as the domain builder leaves it, with the store's page and event channel; only 0 is introduced."""
        domain = self.hypervisor.create_domain(PAGES, f"d{domid}", domid)
        page, port = domain.memory.allocate(), domain.events.alloc_unbound(Domid(0))
        if domid:
            assert port == STORE_PORT, f"the store's port is {port}"
            domain.grants.set_entry(Gref(GNTTAB_RESERVED_XENSTORE), Domid(0), page)
        self.rings[domid] = OurRing(self, domain, domain.memory.run(page), port)
        if not domid:
            self.daemon.serve_own_domain(domain.memory.run(page), port)
        return self.rings[domid]

    def shutdown_domain(self, domid: int) -> None:
        self.hypervisor.shutdown_domain(domid)
        self.hypervisor.settle()

    def destroy_domain(self, domid: int) -> None:
        del self.rings[domid]
        self.hypervisor.destroy_domain(domid)
        self.hypervisor.settle()

    def wait(self, until: float) -> None:
        """Let time pass until the store has done something. TimeoutError if it does nothing before then."""
        timers = self.hypervisor.store.timers
        if timers.next is None or timers.next > until:
            self.now = max(self.now, until)
            raise TimeoutError("our store does nothing")
        self.now = max(self.now, timers.next)
        timers.run()
        self.hypervisor.settle()


class OurSocket:
    """What storesocket.py is to a client, without a socket."""

    def __init__(self, store: OurStore) -> None:
        self._store = store
        self._peer = store.daemon.peer(Domid(0), lambda: None)
        self.close = self._peer.close

    def send(self, data: bytes, timeout_s: float) -> None:
        self._peer.receive(data)
        self._store.hypervisor.settle()

    def receive(self, timeout_s: float) -> bytes:
        peer, until = self._peer, self._store.now + timeout_s
        while True:
            if peer.failed:
                raise ConnectionResetError("our store has closed the connection")
            if peer.out:
                data = bytes(peer.out)
                peer.sent(len(data))
                self._store.hypervisor.settle()
                return data
            self._store.wait(until)


class OurRing:
    """A guest's side of its ring page in the domain's memory."""

    def __init__(self, store: OurStore, domain: Domain, page: memoryview, port: Port) -> None:
        self._store, self._domain, self._port = store, domain, port
        size = XENSTORE_RING_SIZE
        self.page, self.words = page, page.cast("I")
        self.requests = BytePipe(page[:size], self.words, _WORD["req_cons"], _WORD["req_prod"])
        self.responses = BytePipe(page[size : 2 * size], self.words, _WORD["rsp_cons"], _WORD["rsp_prod"])

    def word(self, field: str) -> int:
        return self.words[_WORD[field]]

    def set_word(self, field: str, value: int) -> None:
        self.words[_WORD[field]] = value

    def kick(self) -> None:
        """An event for the store, and time to deal with it."""
        self._domain.events.send(self._port)
        self._store.hypervisor.settle()

    def send(self, data: bytes, timeout_s: float) -> None:
        until = self._store.now + timeout_s
        while data:
            count = self.requests.write(data)
            data = data[count:]
            if count:
                self.kick()
            else:
                self._store.wait(until)

    def receive(self, timeout_s: float) -> bytes:
        until = self._store.now + timeout_s
        while not (data := self.responses.read()):
            self._store.wait(until)
        self.kick()
        return data
