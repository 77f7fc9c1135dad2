"""backqueue.py: one ring of a Blkback: requests in, storage, responses out. The backend's data path.

Entered by events (on_event) and by storage that finished later (Request.complete). No object is made per request: a
request that is answered at once never exists outside local variables, one that has to wait sits in a pooled record.

Invariants: every request taken from the ring is answered exactly once; a slot is copied once and only the copy is
believed (XSA-155); after `stopped` nothing more is taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockdev.grants import GrantCache, Translation
from blockdev.storage import PENDING, Storage
from xenmodel.public.io.blkif import (
    BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST,
    BLKIF_MAX_SEGMENTS_PER_REQUEST,
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_INDIRECT,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
    BLKIF_RSP_EOPNOTSUPP,
    BLKIF_RSP_ERROR,
    BLKIF_RSP_OKAY,
    SECTOR_SIZE,
    SEGMENT_SIZE,
    SEGMENTS_PER_INDIRECT_PAGE,
)
from xenmodel.ring import BackRing
from xenmodel.types import PeerFault, Port

if TYPE_CHECKING:
    from blockdev.blkback import Blkback


class Request:
    """A request that waits for the storage. `op` is what the frontend asked for (READ, also in an indirect request)."""

    __slots__ = ("ident", "op", "queue", "slot_op", "step", "translation", "where")

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.op = self.slot_op = 0
        self.ident = 0
        self.translation: Translation | None = None
        self.step = 0  # of a barrier: 0 flush before, 1 write, 2 flush after
        self.where = 0  # byte offset on the medium

    def complete(self, status: int) -> None:
        self.queue.completed(self, status)


class Statistics:
    """Counts as in Linux's sysfs directory of a vbd; `errors` are requests answered with an error."""

    __slots__ = ("ds_req", "errors", "f_req", "last_error", "rd_req", "rd_sect", "wr_req", "wr_sect")

    def __init__(self) -> None:
        self.rd_req = self.wr_req = self.f_req = self.ds_req = self.rd_sect = self.wr_sect = 0
        self.errors = 0
        self.last_error = ""


class Queue:
    """`ring` and `port` of one queue of `back`; `grants` are the device's."""

    def __init__(self, back: Blkback, ring: BackRing, port: Port, grants: GrantCache, storage: Storage) -> None:
        self.back = back
        self.ring = ring
        self.port = port
        self.grants = grants
        self.storage = storage
        self.abi = back.abi
        self.events = back.domain.events
        self.free = [Request(self) for _ in range(ring.size)]
        self.running = 0  # requests that wait for the storage
        self.barrier: Request | None = None  # nothing is taken from the ring while one is under way
        self.stopped = False
        self._push_deferred = False
        self.statistics = Statistics()
        self.most_segments = max(back.offered.max_indirect_segments or 0, 0)

    def on_event(self, port: Port) -> None:
        """Take what is on the ring. A frontend that keeps producing gets a bounded turn, then an event of its own."""
        if self.stopped:
            return
        ring = self.ring
        budget = 2 * ring.size
        try:
            waiting = ring.final_check_for_requests()
            while waiting and budget > 0 and self.barrier is None:
                budget -= 1
                at = ring.next_request()
                self._take(bytes(ring.view[at : at + ring.slot_size]))
                waiting -= 1
                if not waiting:
                    waiting = ring.final_check_for_requests()
            if waiting and self.barrier is None:
                self.events.raise_again(port)
        except PeerFault as fault:
            self._push()
            self.back.fail(fault)
            return
        self._push()

    def _push(self) -> None:
        if self.ring.push_responses():
            self.events.send(self.port)

    def _take(self, slot: bytes) -> None:
        """One request: check, translate, start. Whatever is wrong with it, it is answered."""
        op, count, _, ident, sector = self.abi.request.unpack_from(slot)
        slot_op = op
        try:
            if op <= BLKIF_OP_WRITE_BARRIER:
                if count > BLKIF_MAX_SEGMENTS_PER_REQUEST:
                    raise ValueError(f"{count} segments; a direct request has at most {BLKIF_MAX_SEGMENTS_PER_REQUEST}")
                data = slot[self.abi.segments_at : self.abi.segments_at + count * SEGMENT_SIZE]
            elif op == BLKIF_OP_INDIRECT:
                op, ident, sector, data = self._indirect(slot)
            else:
                self._take_other(op, ident, slot)
                return
            if not data:
                if op != BLKIF_OP_WRITE_BARRIER:
                    raise ValueError("a request without segments")
                self._start_barrier(ident, None, 0)
                return
            grants = self.grants
            translation = grants.translations.get(data) or grants.translate(data, op == BLKIF_OP_READ)
            grants.tick += 1
            translation.tick = grants.tick
        except ValueError as error:
            self._refuse(ident, slot_op, error)
            return
        status = self._start(op, ident, sector, translation)
        if status == PENDING:
            self._remember(op, slot_op, ident, translation)
        elif status != _TAKEN:
            if translation.mappings:
                grants.done(translation)
            self._respond(ident, slot_op, status)

    def _start(self, op: int, ident: int, sector: int, translation: Translation) -> int:
        """Hand a read or write to the storage, if it lies on the medium."""
        storage, sectors, statistics = self.storage, translation.sectors, self.statistics
        if not 0 <= sector <= storage.sectors - sectors:
            statistics.last_error = f"sectors {sector}..{sector + sectors} of {storage.sectors}"
            return BLKIF_RSP_ERROR
        if (sector | sectors) * SECTOR_SIZE % storage.sector_size:
            statistics.last_error = f"sectors {sector}..{sector + sectors} in blocks of {storage.sector_size} bytes"
            return BLKIF_RSP_ERROR
        if op == BLKIF_OP_READ:
            statistics.rd_req += 1
            statistics.rd_sect += sectors
            request = self.free[-1]
            return storage.read(sector * SECTOR_SIZE, translation.views, sectors * SECTOR_SIZE, request)
        if storage.readonly:
            statistics.last_error = "a write to a read-only device"
            return BLKIF_RSP_ERROR
        statistics.wr_req += 1
        statistics.wr_sect += sectors
        if op == BLKIF_OP_WRITE:
            request = self.free[-1]
            return storage.write(sector * SECTOR_SIZE, translation.views, sectors * SECTOR_SIZE, request)
        self._start_barrier(ident, translation, sector * SECTOR_SIZE)
        return _TAKEN

    def _indirect(self, slot: bytes) -> tuple[int, int, int, bytes]:
        """An indirect request: its pages are copied once, then believed (XSA-155)."""
        _, op, count, ident, sector, _, *grefs = self.abi.indirect.unpack_from(slot)
        if op not in (BLKIF_OP_READ, BLKIF_OP_WRITE):
            raise ValueError(f"indirect operation {op}; only read and write can be indirect")
        most = min(self.most_segments, BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST * SEGMENTS_PER_INDIRECT_PAGE)
        if not 0 < count <= most:
            raise ValueError(f"{count} indirect segments; 1..{most} are offered")
        kept = self.grants.kept.get(grefs[0])
        if kept is not None and count <= SEGMENTS_PER_INDIRECT_PAGE:
            self.grants.used[grefs[0]] = self.grants.tick
            return op, ident, sector, bytes(kept.view[: count * SEGMENT_SIZE])
        data = b""
        for gref in grefs[: -(-count // SEGMENTS_PER_INDIRECT_PAGE)]:
            here = min(count, SEGMENTS_PER_INDIRECT_PAGE)
            data += self.grants.page(gref, here * SEGMENT_SIZE)
            count -= here
        return op, ident, sector, data

    def _take_other(self, op: int, ident: int, slot: bytes) -> None:
        """Flush, discard, and what nobody knows."""
        request = self.free[-1]
        if op == BLKIF_OP_FLUSH_DISKCACHE and self.back.offered.flush:
            self.statistics.f_req += 1
            status = self.storage.flush(request)
        elif op == BLKIF_OP_DISCARD and self.back.discard_enabled:
            self.statistics.ds_req += 1
            # BLKIF_DISCARD_SECURE is ignored: discard-secure is 0 (blkif.h)
            _, _, _, ident, sector, count = self.abi.discard.unpack_from(slot)
            if sector + count > self.storage.sectors:
                raise ValueError(f"discard of sectors {sector}..{sector + count} of {self.storage.sectors}")
            if (sector | count) * SECTOR_SIZE % self.storage.sector_size:
                raise ValueError(f"discard of part of a block of {self.storage.sector_size} bytes")
            status = self.storage.discard(sector * SECTOR_SIZE, count * SECTOR_SIZE, request)
        else:
            self.statistics.last_error = f"operation {op} is not offered"
            status = BLKIF_RSP_EOPNOTSUPP
        if status == PENDING:
            self._remember(op, op, ident, None)
        else:
            self._respond(ident, op, status)

    def _refuse(self, ident: int, op: int, error: ValueError) -> None:
        self.statistics.last_error = str(error)
        self._respond(ident, op, BLKIF_RSP_ERROR)

    def _remember(self, op: int, slot_op: int, ident: int, translation: Translation | None) -> Request:
        """The storage answered PENDING: it keeps the record that was on top of the pool."""
        request = self.free.pop()
        request.op, request.slot_op, request.ident, request.translation = op, slot_op, ident, translation
        self.running += 1
        if translation is not None:
            translation.busy += 1
            self.grants.running.add(translation)
        return request

    def _respond(self, ident: int, op: int, status: int) -> None:
        if status:
            self.statistics.errors += 1
        ring = self.ring
        self.abi.response.pack_into(ring.view, ring.next_response(), ident, op, status)

    def completed(self, request: Request, status: int) -> None:
        """The storage is done with a request that had to wait."""
        if request is self.barrier:
            self._barrier_step(request, status)
            return
        self._answer(request, status)
        if not self._push_deferred:  # one push for all that the workers have done
            self._push_deferred = True
            self.back.domain.hypervisor.defer(self._late_push)
        self._after_completion()

    def _late_push(self) -> None:
        self._push_deferred = False
        if not self.stopped:
            self._push()

    def _answer(self, request: Request, status: int) -> None:
        translation, request.translation = request.translation, None
        self.running -= 1
        if translation is not None:
            translation.busy -= 1
            if not translation.busy:
                self.grants.running.discard(translation)
            self.grants.done(translation)
        self.free.append(request)
        self._respond(request.ident, request.slot_op, status)

    def _after_completion(self) -> None:
        barrier = self.barrier
        if barrier is not None and self.running == 1 and barrier.step == 0:
            self._barrier_step(barrier, BLKIF_RSP_OKAY)
        if self.stopped and not self.running:
            self.back.drained()

    # --- write barriers: all before, then this, then all after -------------------------------------------------------

    def _start_barrier(self, ident: int, translation: Translation | None, where: int) -> None:
        """Take nothing more from the ring; when what runs is done: flush, write, flush."""
        if not self.back.offered.barrier:
            if translation is not None:
                self.grants.done(translation)
            self._respond(ident, BLKIF_OP_WRITE_BARRIER, BLKIF_RSP_EOPNOTSUPP)
            return
        request = self._remember(BLKIF_OP_WRITE_BARRIER, BLKIF_OP_WRITE_BARRIER, ident, translation)
        request.step, request.where = 0, where
        self.barrier = request
        if self.running == 1:
            self._barrier_step(request, BLKIF_RSP_OKAY)

    def _barrier_step(self, request: Request, status: int) -> None:
        """Go as far as the storage lets us; it calls back when a step that waited is done."""
        while status == BLKIF_RSP_OKAY and request.step < 3:
            step, request.step = request.step, request.step + 1
            translation = request.translation
            if step == 1 and translation is not None:
                length = translation.sectors * SECTOR_SIZE
                status = self.storage.write(request.where, translation.views, length, request)
            elif step != 1 and not (step == 2 and translation is None):
                status = self.storage.flush(request)
        if status == PENDING:
            return
        self.barrier = None
        self._answer(request, status)
        self._push()
        self.events.raise_again(self.port)  # go on with the ring, not from inside the storage's completion
        self._after_completion()


_TAKEN = 2  # the request is a barrier now and will be answered by it
