"""scripted.py: a frontend and a backend of a vif that do exactly what a test tells them, also what no driver would do.

Goal: the real driver on the other side meets every slot, index, state and node that a hostile peer could make.
Method: raw bytes in granted ring pages and plain writes to the store; nothing here checks anything.
"""

from __future__ import annotations

from collections.abc import Iterable

from tests.netdev.world import NetWorld, Vif
from xenmodel.domain import Domain
from xenmodel.grant_table import Mapping
from xenmodel.memory import Frame, vmap
from xenmodel.public.grant_table import GNTMAP_host_map, GNTMAP_readonly
from xenmodel.public.io.netif import EXTRA, RX_REQUEST, RX_RESPONSE, RX_SLOT_SIZE, TX_REQUEST, TX_RESPONSE, TX_SLOT_SIZE
from xenmodel.public.io.ring import REQ_PROD, RSP_EVENT, RSP_PROD, SRING_HEADER_SIZE
from xenmodel.ring import U32, BackRing
from xenmodel.types import Domid, Gref, Pfn

FRAME = bytes(range(256)) * 2


class RawRing:
    """One ring page of a guest, its words and slots."""

    def __init__(self, domain: Domain, peer: Domid, slot_size: int, size: int = 256, start: int = 0) -> None:
        self.slot_size, self.size = slot_size, size
        self.pfn = domain.memory.allocate()
        self.page = domain.memory.run(self.pfn)
        self.words = self.page[:SRING_HEADER_SIZE].cast("I")
        self.seen = start & U32
        for word, value in enumerate((start, start + 1, start, start + 1)):
            self.words[word] = value & U32
        self.gref = domain.grants.grant_access(peer, self.pfn)

    def put(self, *slots: bytes) -> None:
        """Into the slots from req_prod on, and publish them."""
        for slot in slots:
            self.place(self.words[REQ_PROD], slot)
            self.words[REQ_PROD] = (self.words[REQ_PROD] + 1) & U32

    def place(self, index: int, slot: bytes) -> None:
        at = SRING_HEADER_SIZE + (index % self.size) * self.slot_size
        self.page[at : at + len(slot)] = slot

    def answers(self) -> list[bytes]:
        found = []
        while self.seen != self.words[RSP_PROD]:
            at = SRING_HEADER_SIZE + (self.seen % self.size) * self.slot_size
            found.append(bytes(self.page[at : at + self.slot_size]))
            self.seen = (self.seen + 1) & U32
        self.words[RSP_EVENT] = (self.seen + 1) & U32
        return found


class ScriptedFront:
    """A guest's end of a vif with one pair of rings, by hand. Takes the place of the driver: attach(settle=False)."""

    stopped = False  # as a driver that still has its directory

    def __init__(self, world: NetWorld, vif: Vif, start: int = 0) -> None:
        self.world, self.vif, self.domain = world, vif, world.guest
        self.peer = world.dom0.domid
        self.tx = RawRing(self.domain, self.peer, TX_SLOT_SIZE, start=start)
        self.rx = RawRing(self.domain, self.peer, RX_SLOT_SIZE, start=start)
        self.port = self.domain.events.alloc_unbound(self.peer)
        self.gref, self.page = self.data_page(FRAME)
        world.fronts.devices[vif.front_node] = self  # type: ignore[assignment]
        world.settle()

    def stop(self) -> None:
        """The Probe has seen the directory vanish."""

    def grant(self, pfn: int, readonly: bool = False) -> Gref:
        return self.domain.grants.grant_access(self.peer, Pfn(pfn), readonly=readonly)

    def data_page(self, data: bytes = b"", readonly: bool = False) -> tuple[Gref, memoryview]:
        pfn = self.domain.memory.allocate()
        view = self.domain.memory.run(pfn)
        view[: len(data)] = data
        return self.grant(pfn, readonly), view

    def nodes(self) -> dict[str, str | int]:
        """What a good frontend would write, everything that a backend reads, in order."""
        return {
            "multi-queue-num-queues": 1, "tx-ring-ref": self.tx.gref, "rx-ring-ref": self.rx.gref,
            "event-channel": self.port, "request-rx-copy": 1, "feature-rx-notify": 1, "feature-sg": 1,
            "feature-gso-tcpv4": 1, "feature-gso-tcpv6": 1, "feature-ipv6-csum-offload": 1,
            "feature-no-csum-offload": 0, "request-multicast-control": 0,
        }  # fmt: skip

    def set(self, key: str, value: str | int, settle: bool = True) -> None:
        self.world.guest_client.write(f"{self.vif.front_node}/{key}", value)
        if settle:
            self.world.settle()

    def connect(self, **changes: str | int | None) -> ScriptedFront:
        """Publish nodes() with these changes (`_` stands for `-`; None leaves a key out), then say Connected."""
        nodes = self.nodes() | {key.replace("_", "-"): value for key, value in changes.items()}  # type: ignore[operator]
        for key, value in nodes.items():
            if value is not None:
                self.set(key, value, settle=False)
        self.set("state", 4)
        return self

    def notify(self, settle: bool = True) -> None:
        self.domain.events.send(self.port)
        if settle:
            self.world.settle()

    def slot(
        self, size: int = len(FRAME), flags: int = 0, ident: int = 0, gref: int | None = None, offset: int = 0
    ) -> bytes:
        return TX_REQUEST.pack(self.gref if gref is None else gref, offset, flags, ident, size)

    def extra(self, kind: int, flags: int = 0, rest: bytes = b"") -> bytes:
        return EXTRA.pack(kind, flags, rest.ljust(6, b"\0")).ljust(TX_SLOT_SIZE, b"\0")

    def send(self, *slots: bytes) -> list[tuple[int, int]]:
        """Transmit slots; the answers, as (id, status)."""
        self.tx.put(*slots)
        self.notify()
        return [TX_RESPONSE.unpack_from(answer) for answer in self.tx.answers()]

    def post(self, *grefs: int, first: int = 0) -> None:
        self.rx.put(*(RX_REQUEST.pack(first + i, gref) for i, gref in enumerate(grefs)))
        self.notify()

    def received(self) -> list[tuple[int, int, int, int]]:
        """Responses of the rx ring: (id, offset, flags, status)."""
        return [RX_RESPONSE.unpack_from(answer) for answer in self.rx.answers()]


class ScriptedBack:
    """A backend's end by hand. Takes the place of the driver: attach(settle=False), then connect()."""

    stopped = False  # as a driver that still has its directory

    def __init__(self, world: NetWorld, vif: Vif) -> None:
        self.world, self.vif, self.domain = world, vif, world.dom0
        self.tx: BackRing
        self.rx: BackRing
        self.ports: list[int] = []
        self.mappings: list[Mapping] = []
        world.backs.devices[vif.back_node] = self  # type: ignore[assignment]
        world.settle()

    def stop(self) -> None:
        """The Probe has seen the directory vanish."""

    def set(self, key: str, value: str | int, settle: bool = True) -> None:
        self.world.write(f"{self.vif.back_node}/{key}", value, settle)

    def offer(self, **nodes: str | int) -> ScriptedBack:
        """InitWait with these nodes (`_` stands for `-`) beside feature-rx-copy."""
        for key, value in ({"feature-rx-copy": 1} | nodes).items():
            self.set(key.replace("_", "-"), value, settle=False)
        self.set("state", 2)
        return self

    def connect(self, **nodes: str | int) -> ScriptedBack:
        self.offer(**nodes)
        self.map_rings()
        self.set("state", 4)
        return self

    def map_rings(self) -> None:
        number = self.world.client.read_int
        front = self.vif.front_node
        self.tx = BackRing(self.map(number(f"{front}/tx-ring-ref", -1)), TX_SLOT_SIZE)
        self.rx = BackRing(self.map(number(f"{front}/rx-ring-ref", -1)), RX_SLOT_SIZE)
        for key in ("event-channel", "event-channel-tx", "event-channel-rx"):
            remote = number(f"{front}/{key}", 0)
            if remote:
                self.ports.append(self.domain.events.bind_interdomain(self.world.guest.domid, remote))
        assert self.ports and min(self.ports) > 0, f"cannot bind: {self.ports}"

    def map(self, gref: int, readonly: bool = False) -> memoryview:
        flags = GNTMAP_host_map | (GNTMAP_readonly if readonly else 0)
        status, mapping = self.domain.maptrack.map(self.world.guest.domid, gref, flags)
        assert mapping is not None, f"cannot map grant {gref}: {status}"
        self.mappings.append(mapping)
        return vmap([Frame(mapping.frame.memory, mapping.frame.pfn)])

    def look(self, gref: int) -> bytes:
        """What a page of the guest shows."""
        view = bytes(self.map(gref, readonly=True))
        self.domain.maptrack.unmap(self.mappings.pop().handle)
        return view

    def close(self) -> None:
        """Let go as a good backend does when the frontend is Closed."""
        for mapping in self.mappings:
            self.domain.maptrack.unmap(mapping.handle)
        for port in self.ports:
            self.domain.events.close(port)
        self.mappings.clear()
        self.ports.clear()

    def notify(self, settle: bool = True) -> None:
        for port in self.ports:
            self.domain.events.send(port)
        if settle:
            self.world.settle()

    def take(self) -> list[tuple[int, int, int, int, int]]:
        """The transmit requests that wait: (gref, offset, flags, id, size)."""
        count = self.tx.requests()
        data = self.tx.copy_requests(count)
        self.tx.skip_requests(count)
        return list(TX_REQUEST.iter_unpack(data))

    def answer(self, *answers: tuple[int, int], settle: bool = True) -> None:
        """Transmit responses (id, status)."""
        for ident, status in answers:
            self.tx.put_responses(TX_RESPONSE.pack(ident, status).ljust(TX_SLOT_SIZE, b"\0"))
        self.tx.push_responses()
        self.notify(settle)

    def take_pages(self) -> list[tuple[int, int]]:
        """The receive requests that wait: (id, gref)."""
        count = self.rx.requests()
        data = self.rx.copy_requests(count)
        self.rx.skip_requests(count)
        return list(RX_REQUEST.iter_unpack(data))

    def give(self, slots: Iterable[bytes], settle: bool = True) -> None:
        """Receive responses, raw."""
        for slot in slots:
            self.rx.put_responses(slot.ljust(RX_SLOT_SIZE, b"\0"))
        self.rx.push_responses()
        self.notify(settle)

    def fill(self, gref: int, data: bytes) -> None:
        """Write into a page that the guest posted."""
        self.map(gref)[: len(data)] = data
        self.domain.maptrack.unmap(self.mappings.pop().handle)
