"""backrx.py: one receive ring of a Netback: frames of the host's interface to the guest.

Entered by poll() (the host has seen that the interface has something) and by the frontend's events (pages were posted). A
frame is read from the interface straight into pages the guest has posted. How large it is shows only then, so a read waits
until there is room for the largest. A frame with an extra slot skips the page of that slot, and whether there will be one
shows only then, too: with GSO negotiated a frame of more than a page is expected to have one, and what is not as expected
is moved.

A guest that posts nothing leaves the frames in the interface's own bounded queue, where the kernel drops and counts. After
DRAIN_S they are taken out and dropped here; after STALL_S the interface loses its carrier until pages are posted (XSA-392).
A frontend without feature-rx-notify would never tell us about new pages, so for it nothing waits.
Invariants: only the latest copy of a slot is believed; its grant is looked up within the batch that
writes to it; a response is put into the slot of its request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from netdev.checksum import complete
from netdev.headers import HEAD_BYTES, transport
from netdev.link import BLOCKED, IDLE, MORE, VNET_SIZE, Batch, Lane, Takes
from netdev.packet import SMALLEST_FRAME, build_rx, gso_extra
from netdev.statistics import Statistics
from netdev.vnet import F_DATA_VALID, F_NEEDS_CSUM, GSO_ECN, GSO_TCPV4, VNET
from xenmodel.public.io.netif import (
    EXTRA_HASH,
    NETIF_RSP_ERROR,
    RX_REQUEST,
    RX_RESPONSE,
    RX_SLOT_SIZE,
    XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ,
    XEN_NETIF_EXTRA_FLAG_MORE,
    XEN_NETIF_EXTRA_TYPE_HASH,
    XEN_NETIF_GSO_TYPE_TCPV4,
    XEN_NETIF_GSO_TYPE_TCPV6,
    NETRXF_csum_blank,
    NETRXF_data_validated,
)
from xenmodel.ring import BackRing
from xenmodel.types import PAGE_SHIFT, PAGE_SIZE, Port

if TYPE_CHECKING:
    from netdev.netback import Netback

LARGEST_FRAME = 65535 + 18  # an IP packet with GSO, and an Ethernet header with a VLAN tag
DATA_PAGES = -(-LARGEST_FRAME // PAGE_SIZE)
DRAIN_S = 10.0  # Linux: rx_drain_timeout_msecs
STALL_S = 60.0  # Linux: rx_stall_timeout_msecs
DISCARD_BATCH = 256
MOST_FRAMES = 16  # for which requests are looked up together

Hashed = tuple[int, int]  # number of the hash type's bit, value


class BackRx:
    """The queue's receive half."""

    def __init__(self, back: Netback, ring: BackRing, takes: Takes) -> None:
        self.back = back
        self.ring = ring
        self.events = back.domain.events
        self.takes = takes
        self.csums = takes.csum4 and takes.csum6
        self.pages = DATA_PAGES if takes.sg else 1
        self.skip = 1 if takes.gso4 or takes.gso6 else 0  # extra slots that a frame of several pages is expected to have
        self.hashing = 0  # 1 if frames get a hash, and `need`: slots that the largest frame may take. As of the last poll()
        self.need = self._slots()
        self.port = Port(0)
        self.statistics = Statistics()
        self.stopped = False
        self.batch = Batch()
        self.large = False  # did frames of several pages come lately? Then their pages are looked up before the read
        self._saw_large = False
        self.blocked_at: float | None = None  # a frame waits and the guest posts no pages since then
        self.deadline: float | None = None  # when expire() wants to be called
        self.stalled = False
        self._header = memoryview(bytearray(VNET_SIZE))
        self._bounce = memoryview(bytearray(VNET_SIZE + DATA_PAGES * PAGE_SIZE))
        self._rest = self._bounce[VNET_SIZE + PAGE_SIZE :] if takes.sg else self._bounce[:0]
        self._ids: Sequence[int] = ()  # of the requests copied in this batch, and where their pages are
        self._pfns: list[int] = []
        self._straight = False  # are those pages neighbours, in order?
        self._next = 0  # of those: the first that is not used
        self._posted = 0  # requests that wait, when last looked at
        self._frames = 1  # for how many the next look at the requests shall be enough

    def _slots(self) -> int:
        """That the largest frame may take."""
        return (self.pages if self.pages == 1 else self.pages + self.skip) + self.back.hashing

    # --- requests ------------------------------------------------------------------------------------------------------

    def on_event(self) -> None:
        """Pages were posted, or we are told what we know."""
        if self.stopped or self.blocked_at is None:
            return
        need = self._slots()
        if self.ring.ask_for_requests(need) >= need:
            self._unblock()
            self.back.on_room()

    def _unblock(self) -> None:
        self.blocked_at = self.deadline = None
        if self.stalled:
            self.stalled = False
            self.back.stall_changed()

    def _copy_requests(self, count: int) -> None:
        """Copy `count` requests, or what there is, and look up their grants."""
        self._posted = self.ring.requests()
        requests = self.ring.copy_requests(min(self._posted, count))
        self._ids, grefs = zip(*RX_REQUEST.iter_unpack(requests), strict=True) if requests else ((), ())
        pfns = self.back.peer_grants().peek(grefs, self.back.domain.domid, False)
        self._straight = len(pfns) > 1 and pfns == list(range(pfns[0], pfns[0] + len(pfns)))
        self._pfns = pfns
        self._next = 0

    def _room(self) -> bool:
        """Is room posted for the largest frame, and does the part of it that is wanted now lead somewhere? A page that is
        not granted to us is answered, and what is before it."""
        need = self.need
        ahead = need if self.large or self.hashing else 1
        while True:
            if self._posted < need:
                self._posted = self.ring.requests()
                if self._posted < need:
                    return False
            if len(self._pfns) - self._next < ahead:
                self._copy_requests(ahead * self._frames)
                self._frames = min(2 * self._frames, MOST_FRAMES)
            if self._straight and self._pfns[0] >= 0:
                return True
            window = self._pfns[self._next : self._next + ahead]
            if min(window) >= 0:
                return True
            bad = next(i for i, pfn in enumerate(window) if pfn < 0) + 1
            self.statistics.bad_pages += 1
            pack = RX_RESPONSE.pack
            ids = self._ids[self._next : self._next + bad]
            self._respond(b"".join(pack(ident, 0, 0, NETIF_RSP_ERROR) for ident in ids), bad)

    def _respond(self, responses: bytes, slots: int) -> None:
        self.ring.put_responses(responses)
        self.ring.skip_requests(slots)
        self._next += slots
        self._posted -= slots

    def _push(self) -> None:
        if self.ring.push_responses():
            self.events.send(self.port)

    # --- frames --------------------------------------------------------------------------------------------------------

    def poll(self, lane: Lane) -> int:
        """Take what the interface has for the guest: IDLE, MORE or BLOCKED (then back.on_room() is called)."""
        if self.stopped:
            return BLOCKED
        self.hashing = self.back.hashing
        need = self.need = self._slots()
        if self.blocked_at is not None:
            if self.ring.requests() < need:
                return self._wait(lane)
            self._unblock()
        self._pfns = []  # stale: the guest may have taken grants back
        self._next = self._posted = 0
        self._saw_large, self._frames = False, 1
        outcome, step = MORE, self._steer if self.hashing else self._direct
        count = 0
        for _ in range(self.batch.limit):
            if not self._room():
                outcome = BLOCKED
                break
            if not step(lane):
                outcome = IDLE
                break
            count += 1
        self.batch.took(count, outcome == IDLE)
        if self._next or self._saw_large:
            self.large = self._saw_large
        self._push()
        if outcome == BLOCKED and not count and self.ring.ask_for_requests(need) < need:
            return self._wait(lane)
        return MORE if outcome == BLOCKED else outcome

    def _direct(self, lane: Lane) -> bool:
        """One frame from the interface into the guest's pages. False: none waits."""
        first, header, memory = self._next, self._header, self.back.memory
        at = self._pfns[first] << PAGE_SHIFT
        buffers = [header, memory[at : at + PAGE_SIZE]]
        if self.large:
            buffers += self._runs(first + 1 + self.skip, self.pages - 1)
        else:
            buffers.append(self._rest)
        size = lane.read(buffers) - VNET_SIZE
        if size < SMALLEST_FRAME:
            if size < 0:
                return False
            self.statistics.drop("shorter than an Ethernet header")
            return True
        flags, gso_type, _, gso_size, start, offset = VNET.unpack(header)
        if not flags | gso_type and size < PAGE_SIZE and not self.back.multicast.enabled:  # the plain case
            self._respond(RX_RESPONSE.pack(self._ids[first], 0, 0, size), 1)
        elif not self._describe(first, size, flags, gso_type, gso_size, start, offset):
            return True
        self.statistics.packets += 1
        self.statistics.bytes += size
        return True

    def _runs(self, first: int, count: int) -> list[memoryview]:
        """The pages of `count` requests, neighbours joined."""
        memory, pfns = self.back.memory, self._pfns
        start = pfns[first]
        if self._straight:
            return [memory[start << PAGE_SHIFT : (start + count) << PAGE_SHIFT]]
        views = []
        end = start
        for pfn in pfns[first : first + count]:
            if pfn != end:
                views.append(memory[start << PAGE_SHIFT : end << PAGE_SHIFT])
                start = end = pfn
            end += 1
        views.append(memory[start << PAGE_SHIFT : end << PAGE_SHIFT])
        return views

    def _describe(
        self, first: int, size: int, flags: int, gso_type: int, gso_size: int, start: int, offset: int
    ) -> bool:
        """Respond for a frame that is in the guest's pages, the first at once and the others after `skip` slots. False:
        it is not for the guest, and its pages stay posted."""
        data = self._pfns[first] << PAGE_SHIFT
        head = self.back.memory[data : data + min(size, HEAD_BYTES)]
        if not self._acceptable(head, size, gso_type):
            return False
        extra = self._gso_slot(gso_type, gso_size)
        rx_flags, finish = self._checksum(flags, head)
        extras, pages = len(extra) // RX_SLOT_SIZE, (size + PAGE_SIZE - 1) >> PAGE_SHIFT
        self._saw_large |= pages > 1
        if not finish and (pages == 1 or (self.large and extras == self.skip)):
            ids = self._ids
            if pages == 1:
                self._respond(build_rx(ids[first : first + 1], size, rx_flags, extra), 1 + extras)
            else:
                data_ids = [ids[first], *ids[first + 1 + extras : first + extras + pages]]
                self._respond(build_rx(data_ids, size, rx_flags, extra), pages + extras)
            return True
        views = [self.back.memory[data : data + PAGE_SIZE]]
        if pages > 1:
            views += self._runs(first + 1 + self.skip, self.pages - 1) if self.large else [self._rest]
        frame = bytearray(b"".join(views)[:size])
        if finish and start + offset + 2 <= size:
            complete(frame, start, offset)
        if pages > 1 and not self.large:
            self._saw_large = self.large = True  # and the next such frame is read into the guest's pages at once
            if not self._room():
                self.statistics.drop("not granted")
                return False
        self._scatter(frame, rx_flags, extra)
        return True

    def _acceptable(self, head: memoryview, size: int, gso_type: int) -> bool:
        """May the guest have this frame? What it may not is counted."""
        takes, reason = self.takes, ""
        if not self.back.multicast.wants(head[:6]):
            reason = "multicast that the guest has not asked for"
        elif self.pages == 1 and size >= PAGE_SIZE:
            reason = "too large for a guest without feature-sg"
        elif gso_type and not (takes.gso4 if gso_type & ~GSO_ECN == GSO_TCPV4 else takes.gso6):
            reason = "segmentation that the guest does not offer"  # it was queued before the guest said so
        if reason:
            self.statistics.drop(reason)
        return not reason

    def _checksum(self, flags: int, head: memoryview) -> tuple[int, bool]:
        """The flags of the response, and whether the checksum is to be finished here because the guest will not."""
        if not flags & F_NEEDS_CSUM:
            return NETRXF_data_validated if flags & F_DATA_VALID else 0, False
        if not self.csums:
            place = transport(head)
            if place is None or not (self.takes.csum4 if place.version == 4 else self.takes.csum6):
                return NETRXF_data_validated, True
        return NETRXF_csum_blank | NETRXF_data_validated, False

    def _gso_slot(self, gso_type: int, gso_size: int) -> bytes:
        if not gso_type:
            return b""
        kind = XEN_NETIF_GSO_TYPE_TCPV4 if gso_type & ~GSO_ECN == GSO_TCPV4 else XEN_NETIF_GSO_TYPE_TCPV6
        return gso_extra(kind, gso_size, RX_SLOT_SIZE)

    def _scatter(self, frame: bytearray | memoryview, flags: int, extra: bytes) -> None:
        """Copy a frame into the next posted pages, behind its extra slots, and respond. There is room for it."""
        first, size, extras = self._next, len(frame), len(extra) // RX_SLOT_SIZE
        pages = max(1, (size + PAGE_SIZE - 1) >> PAGE_SHIFT)
        slots = [first, *range(first + 1 + extras, first + extras + pages)]
        for i, slot in enumerate(slots):
            part = frame[i << PAGE_SHIFT : (i + 1) << PAGE_SHIFT]
            at = self._pfns[slot] << PAGE_SHIFT
            self.back.memory[at : at + len(part)] = part
        self._respond(build_rx([self._ids[slot] for slot in slots], size, flags, extra), pages + extras)

    # --- steering: the guest has set up a hash (control ring) ------------------------------------------------------------

    def _steer(self, lane: Lane) -> bool:
        """One frame to the queue that its hash says, which may be another one than ours. False: none waits."""
        bounce = self._bounce
        size = lane.read([bounce]) - VNET_SIZE
        if size < 0:
            return False
        frame = bounce[VNET_SIZE : VNET_SIZE + size]
        if size < SMALLEST_FRAME:
            self.statistics.drop("shorter than an Ethernet header")
            return True
        queue, hashed = self.back.steer(frame[:HEAD_BYTES])
        target = self if queue is None else self.back.queues[queue].rx
        target.deliver(frame, VNET.unpack_from(bounce), hashed)
        return True

    def deliver(self, frame: memoryview, vnet: tuple[int, ...], hashed: Hashed | None) -> None:
        """Copy one frame in; dropped if the guest has not posted enough pages on this ring."""
        flags, gso_type, _, gso_size, start, offset = vnet
        head = frame[:HEAD_BYTES]
        if not self._acceptable(head, len(frame), gso_type):
            return
        self.hashing, self.need = self.back.hashing, self._slots()
        self._copy_requests(self.need)
        if not self._room():
            self.statistics.drop("no pages posted on the queue of its hash")
            self._push()
            return
        extra = self._gso_slot(gso_type, gso_size)
        if hashed is not None:
            kind, value = hashed
            extra = extra[:1] + bytes([XEN_NETIF_EXTRA_FLAG_MORE]) + extra[2:] if extra else b""
            toeplitz = XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ
            extra += EXTRA_HASH.pack(XEN_NETIF_EXTRA_TYPE_HASH, 0, kind, toeplitz, value.to_bytes(4, "little"))
        rx_flags, finish = self._checksum(flags, head)
        if finish and start + offset + 2 <= len(frame):
            complete(frame, start, offset)
        self._scatter(frame, rx_flags, extra)
        self.statistics.packets += 1
        self.statistics.bytes += len(frame)
        self._push()

    # --- a guest that does not receive ---------------------------------------------------------------------------------

    def _wait(self, lane: Lane) -> int:
        """No pages: remember since when, and for a frontend that will not tell us about new ones drop what waits."""
        now = self.back.clock()
        if self.blocked_at is None:
            self.blocked_at = now
            self.deadline = now + DRAIN_S if self.takes.notify else None
            self.back.on_deadline()
        if self.takes.notify and now - self.blocked_at < DRAIN_S:
            return BLOCKED
        size, count = len(self._bounce), 0
        while count < DISCARD_BATCH and (size := lane.read([self._bounce])):
            count += 1
        if count:
            self.statistics.drop("the guest posts no pages", count)
            # a frontend that never tells us about pages could not end a stall: no frame would make us look
            if self.takes.notify and now - self.blocked_at >= STALL_S and not self.stalled:
                self.stalled = True
                self.back.stall_changed()
        return MORE if size else IDLE

    def expire(self, now: float) -> None:
        """DRAIN_S may be over: what waits is then dropped by the next poll()."""
        if self.deadline is not None and now >= self.deadline:
            self.deadline = None
            self.back.on_room()
