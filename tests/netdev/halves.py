"""halves.py: one ring of a vif with one real end. The other end is played by hand, and the interface is a list of frames.

Goal: each half of the data path meets every slot, response and index that its peer could write.
Method: two real domains, a real ring in granted memory, real event channels and grants; a PeerFault of the real half comes
out of settle() or poll(). Indices of the rings may start anywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from netdev.backrx import BackRx
from netdev.backtx import BackTx
from netdev.frontrx import FrontRx
from netdev.fronttx import FrontTx
from netdev.link import BLOCKED, IDLE, MORE, VNET_SIZE, Buffers, Lane, Takes
from netdev.multicast import MulticastFilter
from netdev.packet import parse_rx, parse_tx
from netdev.vnet import F_NEEDS_CSUM, GSO_TCPV4, GSO_TCPV6, VNET
from tests.netdev.test_checksum import expected, pseudo_header
from tests.netdev.test_headers import Frame, rfc1071
from xenmodel.public.grant_table import GNTMAP_host_map, GNTMAP_readonly
from xenmodel.public.io.netif import NETIF_RSP_NULL, RX_REQUEST, RX_RESPONSE, TX_REQUEST, TX_RESPONSE
from xenmodel.public.io.ring import REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD
from xenmodel.ring import U32, BackRing, FrontRing
from xenmodel.testing import TwoDomains
from xenmodel.types import PAGE_SIZE, Gref

PLAIN = bytes(VNET_SIZE)
_PATTERN = bytes(range(256)) * 17
STARTS = [0, 2**32 - 256, 2**32 - 5]


class ListLane(Lane):
    """An interface's queue: `waiting` to be read, `written` as (virtio_net header, frame)."""

    def __init__(self) -> None:
        self.waiting: deque[bytes] = deque()
        self.written: list[tuple[bytes, bytes]] = []
        self.accepts = True

    def push(self, frame: bytes, vnet: bytes = PLAIN) -> None:
        self.waiting.append(vnet + frame)

    def read(self, buffers: Sequence[memoryview]) -> int:
        at, data = 0, self.waiting.popleft() if self.waiting else b""
        for buffer in buffers:
            piece = data[at : at + len(buffer)]
            buffer[: len(piece)] = piece
            at += len(piece)
        return at

    def write(self, buffers: Buffers) -> bool:
        data = b"".join(buffers)
        if self.accepts:
            self.written.append((data[:VNET_SIZE], data[VNET_SIZE:]))
        return self.accepts

    def take(self) -> list[tuple[bytes, bytes]]:
        written, self.written = self.written, []
        return written


def unfinished(frame: Frame) -> bytes:
    """With the sum of its pseudo-header for a checksum, as a kernel leaves it to its device."""
    return frame._replace(check=rfc1071(pseudo_header(frame))).packed


def finished(frame: Frame) -> bytes:
    return frame._replace(check=expected(frame)).packed


def needs_csum(frame: Frame) -> bytes:
    return VNET.pack(F_NEEDS_CSUM, 0, 0, 0, frame.start, 16 if frame.protocol == 6 else 6)


def needs_gso(frame: Frame, size: int = 1448) -> bytes:
    kind = GSO_TCPV4 if frame.version == 4 else GSO_TCPV6
    return VNET.pack(F_NEEDS_CSUM, kind, frame.start + 20 + len(frame.tcp_options), size, frame.start, 16)


def numbered(size: int, seed: int = 0) -> bytes:
    """A frame of `size` bytes (to a station) that looks like no other, and whose pages differ."""
    starts = [(seed * 2 + page * 26) & 0xFE for page in range(-(-size // PAGE_SIZE))]
    data = b"".join([_PATTERN[start : start + PAGE_SIZE] for start in starts])
    return (data[:12] + (seed & 0xFFFF).to_bytes(2, "little") + data[14:])[:size]


class Half:
    """What the four have in common: the domains, the event channel, and how often the hand's end was told."""

    def __init__(self) -> None:
        self.pair = TwoDomains()
        self.guest, self.dom0 = self.pair.front, self.pair.back
        self.lane = ListLane()
        self.told = 0

    def _tell(self, _port: int) -> None:
        self.told += 1

    def settle(self) -> None:
        self.pair.settle()

    def page(self, gref: int, data: bytes | None = None, offset: int = 0) -> bytes:
        """What domain 0 sees in a granted page; with `data`, after writing it there."""
        flags = GNTMAP_host_map | (0 if data is not None else GNTMAP_readonly)
        status, mapping = self.dom0.maptrack.map(self.guest.domid, gref, flags)
        assert mapping is not None, f"grant {gref}: {status}"
        if data is not None:
            mapping.view[offset : offset + len(data)] = data
        seen = bytes(mapping.view)
        self.dom0.maptrack.unmap(mapping.handle)
        return seen

    def close(self) -> None:
        self.pair.close()


class _Front(Half):
    def _attach(self, half: Any, slot_size: int, start: int) -> None:
        """The backend's end, once the indices of the fresh ring were moved on."""
        ring = half.ring
        for word in (REQ_PROD, REQ_EVENT, RSP_PROD, RSP_EVENT):
            ring.words[word] = (ring.words[word] + start) & U32
        ring.req_prod_pvt, ring.rsp_cons = (ring.req_prod_pvt + start) & U32, (ring.rsp_cons + start) & U32
        _, mapping = self.dom0.maptrack.map(self.guest.domid, half.ring_page.grefs[0])
        assert mapping is not None
        self.ring_mapping = mapping
        self.ring = BackRing(mapping.view, slot_size)
        half.port, self.port = self.pair.connect(lambda _: half.on_event(), self._tell)
        self.settle()
        self.told = 0

    def respond(self, data: bytes, tell: bool = True) -> None:
        """Raw responses, published; with an event if the frontend asked for one."""
        self.ring.put_responses(data)
        if self.ring.push_responses() and tell:
            self.dom0.events.send(self.port)
            self.settle()

    def nudge(self) -> None:
        """An event, asked for or not."""
        self.dom0.events.send(self.port)
        self.settle()


class Sent(NamedTuple):
    """A packet on the tx ring, as the backend sees it."""

    flags: int
    gso: tuple[int, int] | None
    frame: bytes
    slots: list[tuple[int, int, int, int, int]]  # its data slots
    extras: int


class TxFront(_Front):
    """A FrontTx; send() is what the kernel does, take() and answer() are the backend."""

    def __init__(self, *, wipe: bool = False, start: int = 0, **features: bool) -> None:
        super().__init__()
        given = dict.fromkeys(("sg", "gso4", "gso6", "csum4", "csum6"), True) | features
        self.tx = FrontTx(self.guest, self.dom0.domid, Takes(**given), wipe)
        self.room = 0
        self.tx.on_room = lambda: setattr(self, "room", self.room + 1)
        self._attach(self.tx, 12, start)

    def send(self, *frames: bytes, vnet: bytes = PLAIN) -> int:
        """The kernel sends, the host polls until there is no more, or no room: IDLE or BLOCKED."""
        for frame in frames:
            self.lane.push(frame, vnet)
        while True:
            room, outcome = self.room, self.tx.poll(self.lane)
            self.settle()
            if outcome == IDLE or (outcome == BLOCKED and room == self.room):
                return outcome

    def take(self) -> list[Sent]:
        """All packets on the ring, read through the grants."""
        count = self.ring.requests()
        data = self.ring.copy_requests(count)
        self.ring.skip_requests(count)
        self.ring.ask_for_requests(1)
        slots, at, found = list(TX_REQUEST.iter_unpack(data)), 0, []
        while at < count:
            packet = parse_tx(slots, data, at)
            parts = [self.page(slots[i][0])[where : where + size] for i, where, size in packet.fragments]
            mine = [slots[i] for i, _, _ in packet.fragments]
            found.append(Sent(packet.flags, packet.gso, b"".join(parts), mine, packet.extras))
            at += packet.slots
        return found

    def frames(self) -> list[bytes]:
        return [sent.frame for sent in self.take()]

    def answer(self, idents: Sequence[int | None], status: int = 0, tell: bool = True) -> None:
        """Responses for these ids; None stands for an extra slot."""
        pack, null = TX_RESPONSE.pack, TX_RESPONSE.pack(0, NETIF_RSP_NULL)
        self.respond(b"".join((null if i is None else pack(i, status)).ljust(12, b"\xdd") for i in idents), tell)

    def answer_all(self, sent: Sequence[Sent], status: int = 0, tell: bool = True) -> None:
        idents: list[int | None] = []
        for packet in sent:
            ids = [slot[3] for slot in packet.slots]
            idents += [ids[0], *[None] * packet.extras, *ids[1:]]
        self.answer(idents, status, tell)


class RxFront(_Front):
    """A FrontRx; give() and respond() are the backend. `requests` are (id, gref) taken from the ring and not answered."""

    def __init__(self, *, wipe: bool = False, start: int = 0) -> None:
        super().__init__()
        self.rx = FrontRx(self.guest, self.dom0.domid, self.lane, wipe)
        self.requests: deque[tuple[int, int]] = deque()
        self._attach(self.rx, 8, start - start % 256)
        self.collect()

    def collect(self) -> int:
        count = self.ring.requests()
        self.requests += RX_REQUEST.iter_unpack(self.ring.copy_requests(count))
        self.ring.skip_requests(count)
        self.ring.ask_for_requests(1)
        return count

    def write(self, frame: bytes, flags: int = 0, extras: Sequence[bytes] = (), chunk: int = PAGE_SIZE) -> bytes:
        """A frame into the next pages, `chunk` bytes in each; its responses, not yet published."""
        pieces = [frame[at : at + chunk] for at in range(0, len(frame), chunk)] or [b""]
        parts = []
        for number, piece in enumerate(pieces):
            ident, gref = self.requests.popleft()
            if piece:
                self.page(gref, piece)
            more = (4 if number + 1 < len(pieces) else 0) | (0 if number else flags | (8 if extras else 0))
            parts.append(RX_RESPONSE.pack(ident, 0, more, len(piece)))
            for extra in () if number else extras:
                self.requests.popleft()
                parts.append(extra)
        return b"".join(parts)

    def give(self, *frames: bytes, flags: int = 0, extras: Sequence[bytes] = (), chunk: int = PAGE_SIZE) -> list[Any]:
        """Frames arrive from the backend; what the interface got."""
        self.respond(b"".join([self.write(frame, flags, extras, chunk) for frame in frames]))
        self.collect()
        return self.lane.take()


class BackStub(SimpleNamespace):
    """What BackTx and BackRx ask of their Netback."""

    def __init__(self, half: _Back) -> None:
        super().__init__(domain=half.dom0, multicast=MulticastFilter(), memory=half.guest.memory.view)
        self.half = half
        self.credit: Any = None
        self.hashing = 0
        self.queues: list[Any] = []
        self.calls: list[str] = []
        self.requested: list[list[tuple[int, bytes]]] = []
        self.target: tuple[Any, Any] = (None, None)

    def peer_grants(self) -> Any:
        return self.half.guest.grants

    def clock(self) -> float:
        return self.half.now

    def steer(self, head: memoryview) -> tuple[Any, Any]:
        return self.target

    def on_room(self) -> None:
        self.calls.append("room")

    def on_deadline(self) -> None:
        self.calls.append("deadline")

    def stall_changed(self) -> None:
        self.calls.append("stall")

    def multicast_change(self, changes: list[tuple[int, bytes]]) -> bool:
        self.requested.append(changes)
        return len(self.requested) == 1


class _Back(Half):
    def __init__(self, slot_size: int, start: int) -> None:
        super().__init__()
        self.now = 1000.0
        self.stub = BackStub(self)
        pfn = self.guest.memory.allocate()
        self.ring = FrontRing(self.guest.memory.run(pfn), slot_size, start)
        gref = self.guest.grants.grant_access(self.dom0.domid, pfn)
        _, mapping = self.dom0.maptrack.map(self.guest.domid, gref)
        assert mapping is not None
        self.theirs = BackRing(mapping.view, slot_size)

    def _attach(self, half: Any) -> None:
        self.port, half.port = self.pair.connect(self._tell, lambda _: half.on_event())
        self.settle()
        self.told = 0

    def grant(self, data: bytes = b"", readonly: bool = True) -> Gref:
        """A page of the guest with `data` at its start, granted."""
        pfn = self.guest.memory.allocate()
        self.guest.memory.run(pfn)[: len(data)] = data
        return self.guest.grants.grant_access(self.dom0.domid, pfn, readonly=readonly)

    def publish(self, data: bytes, tell: bool = True) -> None:
        """Raw slots, published, and the event that was asked for."""
        self.ring.put_requests(data)
        if self.ring.push_requests() and tell:
            self.guest.events.send(self.port)
        self.settle()

    def reap(self) -> bytes:
        count = self.ring.responses()
        data = self.ring.copy_responses(count)
        self.ring.skip_responses(count)
        self.ring.ask_for_responses(1)
        return data


class TxBack(_Back):
    """A BackTx; ask() is a frontend that puts raw slots on the ring and reads what was answered: (id, status)."""

    def __init__(self, start: int = 0) -> None:
        super().__init__(12, start)
        self.tx = BackTx(self.stub, self.theirs, self.lane)  # type: ignore[arg-type]
        self._attach(self.tx)

    def ask(self, *slots: bytes) -> list[tuple[int, int]]:
        self.publish(b"".join(slot.ljust(12, b"\0") for slot in slots))
        data = self.reap()
        return [TX_RESPONSE.unpack_from(data, at) for at in range(0, len(data), 12)]


class RxBack(_Back):
    """A BackRx; post() is the guest, send() the bridge. `pages`: reference by id of what was posted and not answered."""

    def __init__(self, start: int = 0, notify: bool = True, **takes: bool) -> None:
        super().__init__(8, start)
        given = dict.fromkeys(("sg", "gso4", "gso6", "csum4", "csum6"), True) | takes
        self.rx = BackRx(self.stub, self.theirs, Takes(notify=notify, **given))  # type: ignore[arg-type]
        self.stub.queues = [SimpleNamespace(rx=self.rx)]
        self._attach(self.rx)
        self.pool: list[Gref] = []
        self.posted: deque[tuple[int, Gref]] = deque()
        self.ident = start & 0xFFFF
        self.statuses: list[int] = []

    def post(self, count: int, gref: int | None = None, tell: bool = True) -> None:
        """`count` pages, or that reference; a page that was answered is used again."""
        parts = []
        for _ in range(count):
            page = Gref(gref) if gref is not None else self.pool.pop() if self.pool else self.grant(readonly=False)
            self.posted.append((self.ident, page))
            parts.append(RX_REQUEST.pack(self.ident, page))
            self.ident = (self.ident + 1) & 0xFFFF
        self.publish(b"".join(parts), tell)

    def poll(self) -> int:
        while (outcome := self.rx.poll(self.lane)) == MORE:
            pass
        self.settle()
        return outcome

    def send(self, *frames: bytes, vnet: bytes = PLAIN) -> int:
        for frame in frames:
            self.lane.push(frame, vnet)
        return self.poll()

    def packets(self) -> list[tuple[int, Any, bytes, int]]:
        """(flags, GSO, frame, slots) of what came, each response in the slot of its request; errors go to `statuses`."""
        data = self.reap()
        slots, at, found = list(RX_RESPONSE.iter_unpack(data)), 0, []
        while at < len(slots):
            packet = parse_rx(slots, data, at)
            assert packet is not None, "half a packet was published"
            asked = [self.posted.popleft() for _ in range(packet.slots)]
            if packet.problem:
                self.statuses.append(slots[at][3])
                assert slots[at][0] == asked[0][0], "an error in another slot than its request's"
            else:
                parts = []
                for i, where, size in packet.fragments:
                    ident, gref = asked[i - at]
                    assert slots[i][0] == ident, "a response in another slot than its request's"
                    parts.append(self.page(gref)[where : where + size])
                found.append((packet.flags, packet.gso, b"".join(parts), packet.slots))
                self.pool += [gref for _, gref in asked]
            at += packet.slots
        return found

    def frames(self) -> list[bytes]:
        return [packet[2] for packet in self.packets()]
