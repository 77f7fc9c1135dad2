"""backtx.py: one transmit ring of a Netback: the guest's frames to the host's interface.

Entered by the frontend's events. Slots are copied before they are looked at; grants are looked up for the moment of one
write, as by a grant copy whose destination is the interface, so nothing is ever left mapped. Frames leave straight from
the guest's pages. The frontend is hostile: what it may get wrong is answered with NETIF_RSP_ERROR, what only an attacker
gets wrong is a PeerFault and disables this vif (XSA-39).

Invariants: every slot taken is answered once, in its place, extra slots with NETIF_RSP_NULL; headers are looked at in one
piece, however many slots they are scattered over (XSA-423); an empty fragment needs no grant (XSA-448).
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

from netdev.checksum import pseudo
from netdev.headers import HEAD_BYTES, transport
from netdev.link import Lane
from netdev.packet import SMALLEST_FRAME, TxPacket, TxSlot, join, parse_tx
from netdev.statistics import Statistics
from netdev.vnet import NOTHING, gso, header
from xenmodel.grant_table import GrantTable
from xenmodel.public.io.netif import (
    NETIF_RSP_ERROR,
    NETIF_RSP_NULL,
    NETIF_RSP_OKAY,
    TX_REQUEST,
    TX_SLOT_SIZE,
    XEN_NETIF_GSO_TYPE_TCPV4,
    NETTXF_csum_blank,
    NETTXF_data_validated,
    NETTXF_extra_info,
    NETTXF_more_data,
)
from xenmodel.ring import BackRing
from xenmodel.types import PAGE_SHIFT, PAGE_SIZE, Port

if TYPE_CHECKING:
    from netdev.netback import Netback

_MANY_SLOTS = NETTXF_more_data | NETTXF_extra_info
_CHECKSUM = NETTXF_csum_blank | NETTXF_data_validated


class BackTx:
    """`lane` is where frames go."""

    def __init__(self, back: Netback, ring: BackRing, lane: Lane) -> None:
        self.back = back
        self.ring = ring
        self.lane = lane
        self.events = back.domain.events
        self.port = Port(0)
        self.statistics = Statistics()
        self.stopped = False
        self.resume_at: float | None = None  # the rate limit holds us until then
        self._responses: list[Struct] = []  # of one, two, ... slots

    def on_event(self) -> None:
        """Take what is on the ring. A frontend that keeps producing gets a bounded turn, then an event of its own."""
        if self.stopped or self.resume_at is not None:
            return
        ring = self.ring
        budget = 2 * ring.size
        waiting = ring.final_check_for_requests()
        while waiting and self.resume_at is None:
            data = ring.copy_requests(waiting)
            answers: list[int] = []
            ring.skip_requests(self._take(list(TX_REQUEST.iter_unpack(data)), data, answers))
            self._answer(answers)
            budget -= waiting
            if budget <= 0:
                self.events.raise_again(self.port)
                break
            waiting = ring.final_check_for_requests()

    def _answer(self, answers: list[int]) -> None:
        """Publish responses: [id, status, ...]."""
        count, responses = len(answers) // 2, self._responses
        if not count:
            return
        while len(responses) < count:
            responses.append(Struct("<" + f"Hh{TX_SLOT_SIZE - 4}x" * (len(responses) + 1)))
        self.ring.put_responses(responses[count - 1].pack(*answers))
        if self.ring.push_responses():
            self.events.send(self.port)

    def _take(self, slots: list[TxSlot], data: bytes, answers: list[int]) -> int:
        """Send the frames in `slots`; how many slots were taken (all, unless the rate limit says stop)."""
        back, statistics, write = self.back, self.statistics, self.lane.write
        table = back.peer_grants()
        plain = not any(flags & _MANY_SLOTS for _, _, flags, _, _ in slots)
        pfns = table.peek([slot[0] for slot in slots], back.domain.domid, True) if plain else []
        memory = table.memory.view
        i, count, packets, total = 0, len(slots), 0, 0
        while i < count:
            _, offset, flags, ident, size = slots[i]
            if back.credit is not None and not self._may_go(size):
                break
            if flags & _MANY_SLOTS or size < SMALLEST_FRAME:
                packet = parse_tx(slots, data, i)
                status = self._send(packet, slots, table)
                answers += (ident, status)
                answers += (0, NETIF_RSP_NULL) * packet.extras
                for slot in slots[i + 1 + packet.extras : i + packet.slots]:
                    answers += (slot[3], status)
                i += packet.slots
                continue
            pfn = pfns[i] if plain else table.peek(slots[i][:1], back.domain.domid, True)[0]
            status = NETIF_RSP_ERROR
            if offset + size > PAGE_SIZE:
                parse_tx(slots, data, i)  # says what is wrong
            i += 1
            if pfn < 0:
                statistics.drop("not granted")
            else:
                at = (pfn << PAGE_SHIFT) + offset
                frame = memory[at : at + size]
                vnet: bytes | None = NOTHING
                if flags & _CHECKSUM:
                    vnet = header(bool(flags & NETTXF_csum_blank), True, frame)
                if vnet is None:
                    statistics.drop("a checksum is to be finished in no TCP or UDP frame")
                else:
                    status = NETIF_RSP_OKAY  # from here on it is the host's affair
                    if write((vnet, frame)):
                        packets += 1
                        total += size
                    else:
                        statistics.drop("refused by the interface")
            answers += (ident, status)
        statistics.packets += packets
        statistics.bytes += total
        return i

    def _send(self, packet: TxPacket, slots: list[TxSlot], table: GrantTable) -> int:
        """A packet of several slots, or one with something special about it. Its status."""
        if packet.multicast:
            return NETIF_RSP_OKAY if self.back.multicast_change(packet.multicast) else NETIF_RSP_ERROR
        if packet.problem:
            self.statistics.drop("malformed")
            return NETIF_RSP_ERROR
        fragments = packet.fragments if packet.whole else [part for part in packet.fragments if part[2]]
        pfns = table.peek([slots[slot][0] for slot, _, _ in fragments], self.back.domain.domid, True)
        if min(pfns) < 0:
            self.statistics.drop("not granted")
            return NETIF_RSP_ERROR
        pieces = _gather(packet, fragments, pfns, table.memory.view)
        vnet = self._describe(packet, pieces)
        if vnet is None:
            self.statistics.drop("a checksum is to be finished in no TCP or UDP frame")
            return NETIF_RSP_ERROR
        if self.lane.write((vnet, *pieces)):
            self.statistics.packets += 1
            self.statistics.bytes += packet.size
        else:
            self.statistics.drop("refused by the interface")
        return NETIF_RSP_OKAY

    def _describe(self, packet: TxPacket, pieces: list[memoryview | bytes]) -> bytes | None:
        """What the frame lacks, as the interface wants to hear it. None if it is not what the flags say."""
        if packet.gso is None and not packet.flags & _CHECKSUM:
            return NOTHING
        head: memoryview | bytes = pieces[0]
        if len(head) < HEAD_BYTES:
            head = b"".join(pieces)[:HEAD_BYTES]
        if packet.gso is None:
            return header(bool(packet.flags & NETTXF_csum_blank), True, head)
        place = transport(head)
        version = 4 if packet.gso.type == XEN_NETIF_GSO_TYPE_TCPV4 else 6
        vnet = None if place is None else gso(place, head, packet.gso.size, version)
        if vnet is not None and place is not None and not packet.flags & NETTXF_csum_blank:
            # a frontend that finished the checksum of the whole: undo that, each segment gets its own (Linux's fixup)
            at = place.start + place.checksum
            frame = bytearray(b"".join(pieces))
            frame[at : at + 2] = pseudo(frame, place, len(frame) - place.start).to_bytes(2, "big")
            pieces[:] = [bytes(frame)]
            self.statistics.fixups += 1
        return vnet

    def _may_go(self, size: int) -> bool:
        """The rate limit. False: nothing more before `resume_at`."""
        credit = self.back.credit
        assert credit is not None, "asked for a limit that is not there"
        wait = credit.take(size, self.back.clock())
        if wait:
            self.resume_at = wait
            self.back.on_deadline()
        return not wait

    def limit_changed(self) -> None:
        """Another rate, or none: what waited for the old one asks again."""
        if self.resume_at is not None:
            self.resume_at = None
            self.events.raise_again(self.port)

    def resume(self, now: float) -> None:
        """The time that the rate limit asked for may have come."""
        if self.resume_at is not None and now >= self.resume_at:
            self.resume_at = None
            self.events.raise_again(self.port)


def _gather(
    packet: TxPacket, fragments: list[tuple[int, int, int]], pfns: list[int], memory: memoryview
) -> list[memoryview | bytes]:
    """Where the packet's bytes are in the guest's memory, neighbours joined."""
    if packet.whole and pfns == list(range(pfns[0], pfns[0] + len(pfns))):
        return [memory[pfns[0] << PAGE_SHIFT : (pfns[0] << PAGE_SHIFT) + packet.size]]
    places = ((pfn << PAGE_SHIFT) + offset for pfn, (_, offset, _) in zip(pfns, fragments, strict=True))
    return [*join(memory, zip(places, (length for _, _, length in fragments), strict=True))]
