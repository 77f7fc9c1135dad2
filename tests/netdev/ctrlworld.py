"""Goal: the two ends of a control ring for tests: the real ones over two domains, and each played by hand.
Method: CtrlFront and Backend are connected as netfront and netback would; Guest and ByHand do what they like."""

from __future__ import annotations

import random
from struct import pack

from netdev.ctrl import CtrlBack, CtrlFront, HashState
from xenmodel.memory import vmap
from xenmodel.public.io.netif import CTRL_REQUEST, CTRL_RESPONSE, CTRL_SLOT_SIZE
from xenmodel.ring import BackRing, FrontRing
from xenmodel.testing import Footprint, SeededOrder, TwoDomains
from xenmodel.types import Domid, Gref

GET_FLAGS, SET_FLAGS, SET_KEY, GET_SIZE, SET_SIZE, SET_MAPPING, SET_ALGORITHM = range(1, 8)
OKAY, NOT_SUPPORTED, INVALID, OVERFLOW = range(4)
NONE, TOEPLITZ = range(2)
IPV4, IPV4_TCP, IPV6, IPV6_TCP = 1, 2, 4, 8
QUEUES = 4
SLOTS = 128

# The published verification suite of receive side scaling: its key, and the first IPv4 and IPv6 flows with their hashes.
KEY = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")
PORTS = pack(">HH", 2794, 1766)
FLOW4 = bytes((66, 9, 149, 187, 161, 142, 100, 80))
FLOW6 = bytes.fromhex("3ffe250102001fff0000000000000007" "3ffe2501020000030000000000000001")


def frame(flow: bytes, protocol: int = 6) -> bytes:
    v4 = len(flow) == 8
    ip = pack(">BBHHHBBH", 0x45, 0, 40, 0, 0, 64, protocol, 0) if v4 else pack(">IHBB", 6 << 28, 20, protocol, 64)
    return bytes(12) + (b"\x08\x00" if v4 else b"\x86\xdd") + ip + flow + PORTS + bytes(8) + b"\x50" + bytes(7)


TCP4, UDP4, TCP6, ARP = frame(FLOW4), frame(FLOW4, 17), frame(FLOW6), bytes(12) + b"\x08\x06" + bytes(46)


class Guest:
    """The guest's end by hand: requests of any kind on a ring of its own."""

    def __init__(self, pair: TwoDomains) -> None:
        self.domain = pair.front
        self.pfn = self.domain.memory.allocate()
        self.ring = FrontRing(self.domain.memory.run(self.pfn), CTRL_SLOT_SIZE)
        self.gref = self.domain.grants.grant_access(pair.back.domid, self.pfn)
        self.port = self.domain.events.alloc_unbound(pair.back.domid, lambda port: None)

    def put(self, kind: int, d0: int = 0, d1: int = 0, d2: int = 0, ident: int = 7, tell: bool = True) -> None:
        CTRL_REQUEST.pack_into(self.ring.view, self.ring.next_request(), ident, kind, d0, d1, d2)
        if self.ring.push_requests() and tell:
            self.domain.events.send(self.port)

    def answers(self) -> list[tuple[int, int, int, int]]:
        return [CTRL_RESPONSE.unpack_from(self.ring.view, self.ring.next_response()) for _ in range(self.ring.responses())]

    def page(self, content: bytes, readonly: bool = True, to: int = 0) -> Gref:
        pfn = self.domain.memory.allocate()
        self.domain.memory.run(pfn)[: len(content)] = content
        return self.domain.grants.grant_access(Domid(to), pfn, readonly=readonly)


class Backend:
    """A CtrlBack on the ring of `front`, as netback makes one."""

    def __init__(self, pair: TwoDomains, front: CtrlFront | Guest, state: HashState | None = None) -> None:
        self.pair = pair
        self.faults: list[str] = []
        _, mapping = pair.back.maptrack.map(pair.front.domid, front.gref)
        assert mapping is not None
        self.mapping = mapping
        self.ring = BackRing(vmap([mapping.frame]), CTRL_SLOT_SIZE)
        self.port = pair.back.events.bind_interdomain(pair.front.domid, front.port)
        self.state = state or HashState(QUEUES)
        fail = lambda fault: self.faults.append(str(fault))  # noqa: E731
        self.ctrl = CtrlBack(pair.back, pair.front.domid, self.ring, self.port, self.state, fail)
        pair.back.events.set_handler(self.port, self.ctrl.on_event)

    def close(self) -> None:
        self.ctrl.stopped = True
        self.pair.back.events.close(self.port)
        self.pair.back.maptrack.unmap(self.mapping.handle)


class Case:
    """Two domains, and what has been said to a CtrlFront's owner."""

    def __init__(self, seed: int | None = None, pages: int = 64) -> None:
        self.pair = TwoDomains(SeededOrder(random.Random(seed).randrange) if seed is not None else None, front_pages=pages)
        self.footprint = Footprint(self.pair.hypervisor)
        self.faults: list[str] = []
        self.told: list[tuple[int, int]] = []

    def done(self, status: int, data: int) -> None:
        self.told.append((status, data))

    def front(self) -> CtrlFront:
        return CtrlFront(self.pair.front, self.pair.back.domid, lambda fault: self.faults.append(str(fault)))


class ByHand:
    """The backend's end by hand."""

    def __init__(self, case: Case, front: CtrlFront) -> None:
        self.case = case
        _, mapping = case.pair.back.maptrack.map(case.pair.front.domid, front.gref)
        assert mapping is not None
        self.mapping = mapping
        self.ring = BackRing(mapping.view, CTRL_SLOT_SIZE)
        self.port = case.pair.back.events.bind_interdomain(case.pair.front.domid, front.port, lambda port: None)

    def take(self) -> list[tuple[int, int, int, int, int]]:
        self.case.pair.settle()
        return [CTRL_REQUEST.unpack_from(self.ring.view, self.ring.next_request()) for _ in range(self.ring.requests())]

    def answer_all(self) -> None:
        """At once, and without an event."""
        for _ in range(self.ring.requests()):
            ident, kind, *_ = CTRL_REQUEST.unpack_from(self.ring.view, self.ring.next_request())
            self.answer(ident, kind, tell=False)

    def answer(self, ident: int, kind: int, status: int = OKAY, data: int = 0, tell: bool = True) -> None:
        CTRL_RESPONSE.pack_into(self.ring.view, self.ring.next_response(), ident, kind, status, data)
        self.ring.push_responses()
        if tell:
            self.case.pair.back.events.send(self.port)
            self.case.pair.settle()
