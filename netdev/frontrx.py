"""frontrx.py: one receive ring of a Netfront: frames from the backend to the guest's interface.

Entered by the backend's events. Each slot of the ring has a page of its own, so the response in a slot is about the page
of that slot (netif.h asks backends for this), and posting a page again is copying the same eight bytes. A frame is written
to the interface straight from the granted pages, and then they are posted again.

Invariants: every slot of the ring is posted except while it is looked at; responses are copied before they are believed.
"""

from __future__ import annotations

from netdev.headers import HEAD_BYTES, transport
from netdev.link import Lane
from netdev.packet import MOST_SLOTS, SMALLEST_FRAME, RxPacket, RxSlot, join, parse_rx
from netdev.pages import Pages
from netdev.statistics import Statistics
from netdev.vnet import NOTHING, gso, header
from xenmodel.domain import Domain
from xenmodel.public.io.netif import (
    RX_REQUEST,
    RX_RESPONSE,
    RX_SLOT_SIZE,
    XEN_NETIF_GSO_TYPE_TCPV4,
    NETRXF_csum_blank,
    NETRXF_data_validated,
    NETRXF_extra_info,
    NETRXF_more_data,
)
from xenmodel.ring import FrontRing
from xenmodel.types import PAGE_SHIFT, PAGE_SIZE, Domid, PeerFault

_MANY_SLOTS = NETRXF_more_data | NETRXF_extra_info


class FrontRx:
    """Posts all its pages at once; `lane` is where frames go. OutOfResources if the guest has too little memory."""

    def __init__(self, domain: Domain, peer: Domid, lane: Lane, wipe: bool) -> None:
        self.events = domain.events
        self.lane = lane
        self.wipe = wipe
        self.statistics = Statistics()
        self.port = 0
        self.ring_page = Pages(domain, peer)
        try:
            self.ring = FrontRing(self.ring_page.view, RX_SLOT_SIZE)
            size = self.size = self.ring.size
            self.pages = Pages(domain, peer, size, overlap=MOST_SLOTS)
        except BaseException:
            self.ring_page.release()
            raise
        self.view = self.pages.view
        self.idents = [*range(size)] * 2
        self.requests = b"".join(RX_REQUEST.pack(page, gref) for page, gref in enumerate(self.pages.grefs)) * 2
        self.ring.put_requests(self.requests[: size * RX_SLOT_SIZE])
        self.ring.push_requests()

    def on_event(self) -> None:
        """Hand what came to the interface, and post its pages again. PeerFault if the backend claims what is not so."""
        ring = self.ring
        budget = 2 * ring.size
        waiting = ring.final_check_for_responses()
        while waiting:
            taken = self._take(ring.rsp_cons, ring.copy_responses(waiting), waiting)
            self._repost(taken)
            rest = waiting - taken  # of a packet that is not whole yet
            if rest and ring.ask_for_responses(rest + 1) == rest:
                break
            budget -= taken
            if budget <= 0:
                self.events.raise_again(self.port)
                break
            waiting = ring.final_check_for_responses()
        if ring.push_requests():
            self.events.send(self.port)

    def _take(self, first: int, data: bytes, count: int) -> int:
        """Deliver the packets in `data`, `count` responses from ring index `first` on. How many responses they are."""
        slots = list(RX_RESPONSE.iter_unpack(data))
        write, view, mask, statistics = self.lane.write, self.view, self.size - 1, self.statistics
        i = packets = total = 0
        while i < count:
            ident, offset, flags, status = slots[i]
            page = (first + i) & mask
            if flags & _MANY_SLOTS or status < SMALLEST_FRAME:
                packet = parse_rx(slots, data, i)
                if packet is None:
                    break
                self._deliver(packet, slots, first)
                i += packet.slots
                continue
            i += 1
            if ident != page or offset + status > PAGE_SIZE:
                raise PeerFault(f"rx response for id {ident}, {status} bytes at {offset}, in the slot of request {page}")
            at = (page << PAGE_SHIFT) + offset
            frame = view[at : at + status]
            vnet: bytes | None = NOTHING
            if flags:
                vnet = header(bool(flags & NETRXF_csum_blank), bool(flags & NETRXF_data_validated), frame)
            if vnet is None:
                statistics.drop("a checksum is to be finished in no TCP or UDP frame")
            elif write((vnet, frame)):
                packets += 1
                total += status
            else:
                statistics.drop("refused by the interface")
        statistics.packets += packets
        statistics.bytes += total
        return i

    def _deliver(self, packet: RxPacket, slots: list[RxSlot], first: int) -> None:
        """A packet of several slots, or one with something special about it."""
        pieces = self._gather(packet, slots, first)
        if packet.problem:
            self.statistics.drop("refused by the backend" if packet.problem.startswith("the backend") else "malformed")
            return
        head: memoryview | bytes = pieces[0]
        if len(head) < HEAD_BYTES:
            head = b"".join(pieces)[:HEAD_BYTES]
        if packet.gso is not None:
            place = transport(head)
            version = 4 if packet.gso.type == XEN_NETIF_GSO_TYPE_TCPV4 else 6
            vnet = None if place is None else gso(place, head, packet.gso.size, version)
        else:
            blank, valid = packet.flags & NETRXF_csum_blank, packet.flags & NETRXF_data_validated
            vnet = header(bool(blank), bool(valid), head)
        if vnet is None:
            self.statistics.drop("a checksum is to be finished in no TCP or UDP frame")
        elif self.lane.write((vnet, *pieces)):
            self.statistics.packets += 1
            self.statistics.bytes += packet.size
        else:
            self.statistics.drop("refused by the interface")

    def _gather(self, packet: RxPacket, slots: list[RxSlot], first: int) -> list[memoryview]:
        """Where the packet's bytes are, neighbours joined. PeerFault if a response is not in the slot of its request."""
        mask, view, fragments = self.size - 1, self.view, packet.fragments
        if packet.whole:
            start, slot = (first + fragments[0][0]) & mask, fragments[1][0]
            rest = (first + slot) & mask
            count = len(fragments) - 1
            idents = [ident for ident, _, _, _ in slots[slot : slot + count]]
            if slots[fragments[0][0]][0] == start and idents == self.idents[rest : rest + count]:
                size = packet.size - PAGE_SIZE
                begin, end = start << PAGE_SHIFT, rest << PAGE_SHIFT
                if rest == start + 1:
                    return [view[begin : begin + packet.size]]
                return [view[begin : begin + PAGE_SIZE], view[end : end + size]]
        ranges = []
        for slot, offset, length in fragments:
            page = (first + slot) & mask
            if slots[slot][0] != page:
                raise PeerFault(f"rx response for id {slots[slot][0]} in the slot of request {page}")
            ranges.append(((page << PAGE_SHIFT) + offset, length))
        return join(view, ranges)

    def _repost(self, count: int) -> None:
        """The next `count` slots, responses that were taken, become requests for the same pages."""
        ring, mask = self.ring, self.size - 1
        if self.wipe:
            for i in range(ring.rsp_cons, ring.rsp_cons + count):
                at = (i & mask) << PAGE_SHIFT
                self.view[at : at + PAGE_SIZE] = bytes(PAGE_SIZE)
        first = (ring.rsp_cons & mask) * RX_SLOT_SIZE
        ring.skip_responses(count)
        ring.put_requests(self.requests[first : first + count * RX_SLOT_SIZE])

    def release(self) -> bool:
        """Take ring and pages back. False: the backend still has some of them mapped."""
        ring = self.ring_page.release()
        return self.pages.release() and ring
