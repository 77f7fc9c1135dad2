"""fronttx.py: one transmit ring of a Netfront: frames of the guest's interface out to the backend.

Entered by poll() (the host has seen that the interface has something to send) and by the backend's events (responses).
A frame is read from the interface straight into granted pages, at most 64 KiB with GSO, and described by slots; nothing
is allocated, granted or copied per frame. There are as many pages as slots. They are used in turn: `tail` is the oldest
that is still out, `head` the next; the id of a slot is the number of its page, so a response says which page is back.

Invariants: a page is on the ring at most once; a response for a page that is not out is a PeerFault (XSA-391); what is
published is whole packets.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct

from netdev.checksum import complete
from netdev.headers import HEAD_BYTES, transport
from netdev.link import BLOCKED, IDLE, MORE, VNET_SIZE, Batch, Lane, Takes
from netdev.packet import SMALLEST_FRAME, build_tx, gso_extra, tx_template
from netdev.pages import Pages
from netdev.statistics import Statistics
from netdev.vnet import F_DATA_VALID, F_NEEDS_CSUM, GSO_ECN, GSO_TCPV4, GSO_TCPV6, VNET
from xenmodel.domain import Domain
from xenmodel.public.io.netif import (
    NETIF_RSP_NULL,
    TX_REQUEST,
    TX_SLOT_SIZE,
    XEN_NETIF_GSO_TYPE_TCPV4,
    XEN_NETIF_GSO_TYPE_TCPV6,
    XEN_NETIF_MAX_TX_SIZE,
    NETTXF_csum_blank,
    NETTXF_data_validated,
    NETTXF_extra_info,
)
from xenmodel.ring import FrontRing
from xenmodel.types import PAGE_SHIFT, PAGE_SIZE, Domid, PeerFault

READ_PAGES = 16  # what one frame may take: XEN_NETIF_MAX_TX_SIZE
MOST_PER_FRAME = READ_PAGES + 1  # slots: with a GSO extra
_ONES = bytes([1]) * READ_PAGES
RESPONSE = Struct(f"<Hh{TX_SLOT_SIZE - 4}x")


class FrontTx:
    """`takes` is what the backend can receive. OutOfResources if the guest has too little memory."""

    def __init__(self, domain: Domain, peer: Domid, takes: Takes, wipe: bool) -> None:
        self.events = domain.events
        self.takes, self.wipe = takes, wipe
        self.most_bytes = XEN_NETIF_MAX_TX_SIZE if takes.sg else PAGE_SIZE
        self.statistics = Statistics()
        self.port = 0
        self.batch = Batch()
        self.blocked = False  # a poll() found no room
        self.on_room: Callable[[], None] = lambda: None
        self.ring_page = Pages(domain, peer)
        try:
            self.ring = FrontRing(self.ring_page.view, TX_SLOT_SIZE)
            self.size = self.ring.size
            self.pages = Pages(domain, peer, self.size, readonly=True, overlap=READ_PAGES)
        except BaseException:
            self.ring_page.release()
            raise
        self.view, self.grefs = self.pages.view, self.pages.grefs
        self.template = tx_template(self.grefs)
        blank = NETTXF_csum_blank | NETTXF_data_validated
        # netif's flags by those of virtio_net; -1: look closer
        self.plain = (0, blank if takes.csum6 else -1, NETTXF_data_validated, blank if takes.csum6 else -1)
        self.head = self.tail = 0  # free-running; head - tail pages are out
        self.out = bytearray(self.size)
        self.idents = [*range(self.size)]
        headers = memoryview(bytearray(self.size * VNET_SIZE))
        self.headers = headers
        self.buffers = [
            [
                headers[i * VNET_SIZE : (i + 1) * VNET_SIZE],
                self.view[i << PAGE_SHIFT : (i + READ_PAGES) << PAGE_SHIFT],
            ]
            for i in range(self.size)
        ]

    def poll(self, lane: Lane) -> int:
        """Take what the interface has to send: IDLE, MORE or BLOCKED (then on_room() is called). PeerFault as on_event()."""
        if self.ring.free < self.size // 4 and self.ring.responses():
            self._reap()  # otherwise on_event() does, many at a time
        read, unpack, pack = lane.read, VNET.unpack_from, TX_REQUEST.pack
        buffers, headers, grefs, out, plain = self.buffers, self.headers, self.grefs, self.out, self.plain
        size, mask, head, free = self.size, self.size - 1, self.head, self.ring.free
        most_out = self.tail + size - READ_PAGES
        parts: list[bytes] = []
        total, outcome = 0, MORE
        for _ in range(self.batch.limit):
            if head > most_out or free < MOST_PER_FRAME:
                outcome = BLOCKED
                break
            page = head & mask
            length = read(buffers[page]) - VNET_SIZE
            if length < SMALLEST_FRAME:
                if length < 0:
                    outcome = IDLE
                    break
                self.statistics.drop("shorter than an Ethernet header")
                continue
            flags, gso_type, _, gso_size, start, offset = unpack(headers, page * VNET_SIZE)
            if self.wipe:
                self._wipe(page, length)
            if gso_type or length > PAGE_SIZE or (tx_flags := plain[flags & 3]) < 0:
                slots = self._describe(page, length, flags, gso_type, gso_size, start, offset)
                if not slots:
                    continue
                free -= len(slots) // TX_SLOT_SIZE
                pages = (length + PAGE_SIZE - 1) >> PAGE_SHIFT
                self._mark_out(page, pages)
                head += pages
                parts.append(slots)
            else:
                free -= 1
                out[page] = 1
                head += 1
                parts.append(pack(grefs[page], 0, tx_flags, page, length))
            total += length
        self.head = head
        self.batch.took(len(parts), outcome == IDLE)
        if parts:
            self.statistics.packets += len(parts)
            self.statistics.bytes += total
            self._publish(b"".join(parts))
        if outcome == BLOCKED:
            self.blocked = True
            if self.ring.final_check_for_responses():
                self.events.raise_again(self.port)
        return outcome

    def _mark_out(self, page: int, pages: int) -> None:
        here = min(pages, self.size - page)
        self.out[page : page + here] = _ONES[:here]
        self.out[: pages - here] = _ONES[here:pages]

    def _publish(self, slots: bytes) -> None:
        self.ring.put_requests(slots)
        if self.ring.push_requests():
            self.events.send(self.port)

    def _describe(
        self, page: int, length: int, flags: int, gso_type: int, gso_size: int, start: int, offset: int
    ) -> bytes:
        """The slots of a frame that is large or unfinished; b"" if the backend cannot take it."""
        if length > self.most_bytes:
            self.statistics.drop("too large for this backend")
            return b""
        tx_flags, extra = 0, b""
        if flags & F_NEEDS_CSUM:
            tx_flags = NETTXF_csum_blank | NETTXF_data_validated
            if not self.takes.csum6:
                tx_flags = self._finish(page, length, start, offset) or tx_flags
        elif flags & F_DATA_VALID:
            tx_flags = NETTXF_data_validated
        if gso_type:
            kind = gso_type & ~GSO_ECN
            if kind == GSO_TCPV4 and self.takes.gso4:
                extra = gso_extra(XEN_NETIF_GSO_TYPE_TCPV4, gso_size, TX_SLOT_SIZE)
            elif kind == GSO_TCPV6 and self.takes.gso6:
                extra = gso_extra(XEN_NETIF_GSO_TYPE_TCPV6, gso_size, TX_SLOT_SIZE)
            else:
                self.statistics.drop("segmentation that this backend does not offer")  # queued before it said so
                return b""
        return build_tx(self.template, self.grefs, page, length, tx_flags, extra)

    def _finish(self, page: int, length: int, start: int, offset: int) -> int:
        """The backend takes no unfinished IPv6 checksums: finish this one. 0 if it is not IPv6."""
        at = page << PAGE_SHIFT
        place = transport(self.view[at : at + min(length, HEAD_BYTES)])
        if place is not None and place.version == 4:
            return 0
        if start + offset + 2 > length:
            return 0
        complete(self.view[at : at + length], start, offset)
        return NETTXF_data_validated

    def _wipe(self, page: int, length: int) -> None:
        """trusted=0: what earlier frames left behind this one in its last page is not for the backend (XSA-403)."""
        at = page << PAGE_SHIFT
        end = (length + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)
        self.view[at + length : at + end] = bytes(end - length)

    def transmit(self, frame: bytes, extra: bytes = b"") -> bool:
        """Send a frame of our own (an announcement), or with `extra` slots a request to the backend. False: no room."""
        pages = max(1, (len(frame) + PAGE_SIZE - 1) >> PAGE_SHIFT)
        if self.head + pages > self.tail + self.size or self.ring.free < pages + len(extra) // TX_SLOT_SIZE:
            return False
        page = self.head & (self.size - 1)
        at = page << PAGE_SHIFT
        self.view[at : at + len(frame)] = frame
        if self.wipe:
            self._wipe(page, len(frame))
        self._mark_out(page, pages)
        self.head += pages
        flags = NETTXF_extra_info if extra else 0
        if frame:
            self.statistics.packets += 1
            self.statistics.bytes += len(frame)
        self._publish(build_tx(self.template, self.grefs, page, len(frame), flags, extra))
        return True

    # --- responses -------------------------------------------------------------------------------------------------

    def on_event(self) -> None:
        """Pages come back. PeerFault if the backend claims what is not so."""
        if self.ring.final_check_for_responses():
            self._reap()
        self.ring.ask_for_responses(self.size // 2)  # they are taken by the next poll(): no need to be told of each
        if self.blocked and self.head <= self.tail + self.size - READ_PAGES and self.ring.free >= MOST_PER_FRAME:
            self.blocked = False
            self.on_room()
        elif self.blocked and self.ring.final_check_for_responses():
            self.events.raise_again(self.port)

    def _reap(self) -> None:
        ring, out, size = self.ring, self.out, self.size
        waiting = ring.responses()
        data = ring.copy_responses(waiting)
        ring.skip_responses(waiting)
        answers = list(RESPONSE.iter_unpack(data))
        tail = self.tail
        # all went well and in order, as nearly always: then the pages are those from the tail on
        page = tail & (size - 1)
        idents = [ident for ident, status in answers if status != NETIF_RSP_NULL]  # an extra slot has no page
        count = len(idents)
        if idents == self.idents[page : page + count] and page + count <= size and out.count(1, page, page + count) == count:
            out[page : page + count] = bytes(count)
            tail += count
        else:
            for ident in idents:
                if ident >= size or not out[ident]:
                    raise PeerFault(f"tx response for id {ident}, which is not out")
                out[ident] = 0
        while tail < self.head and not out[tail & (size - 1)]:
            tail += 1  # also over what was answered before its turn
        self.tail = tail
        lost = sum(1 for _, status in answers if status < 0)
        if lost:
            self.statistics.drop("refused by the backend", lost)

    def release(self) -> bool:
        """Take ring and pages back. False: the backend still has some of them mapped."""
        ring = self.ring_page.release()
        return self.pages.release() and ring
