"""ring.py: io/ring.h. The only file that computes modulo 2**32.

FrontRing produces requests and consumes responses; BackRing does the opposite. Both work on bytes that the two ends
share: a view of the ring's pages, whose first 16 bytes are the indices. Names are ring.h's.

Invariant, modulo 2**32:  rsp_cons <= rsp_prod <= req_cons <= req_prod  and  req_prod - rsp_cons <= size.
The other end may write anything into the shared indices at any time: each is read once and checked before use
(RING_REQUEST_PROD_OVERFLOW, RING_RESPONSE_PROD_OVERFLOW), and what breaks the invariant is a PeerFault.
The other end may be a process of its own: between publishing an index and looking whether it wants to be told (and the
other way round) stands a fence, or both could miss what the other just wrote (xen_mb() in ring.h; x86, too, needs it there).
Waiting is not here: a caller that finds the ring full comes back when it is told.
"""

from __future__ import annotations

import _thread

from xenmodel.public.io.ring import REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD, SRING_HEADER_SIZE, ring_entries
from xenmodel.types import PeerFault

U32 = 0xFFFFFFFF
_fence = _thread.allocate_lock()  # taking a lock that is free is a full fence


class _Ring:
    """What both ends keep: the shared words, the slots, and the sizes they never read from shared memory again."""

    __slots__ = ("mask", "size", "slot_size", "view", "words")

    def __init__(self, view: memoryview, slot_size: int) -> None:
        self.view = view
        self.words = view[:SRING_HEADER_SIZE].cast("I")
        self.slot_size = slot_size
        self.size = ring_entries(len(view), slot_size)
        if not self.size:
            raise ValueError(f"a ring of {len(view)} bytes holds no slot of {slot_size}")
        self.mask = self.size - 1

    def offset(self, index: int) -> int:
        """Where the slot of a (free-running) index begins in `view`."""
        return SRING_HEADER_SIZE + (index & self.mask) * self.slot_size

    def copy_out(self, index: int, count: int) -> bytes:
        """A copy of `count` slots from a (free-running) index on, in one piece (XSA-155: look at the copy only)."""
        view, size, first = self.view, self.slot_size, index & self.mask
        at = SRING_HEADER_SIZE + first * size
        if first + count <= self.size:
            return bytes(view[at : at + count * size])
        end, rest = SRING_HEADER_SIZE + self.size * size, first + count - self.size
        return bytes(view[at:end]) + bytes(view[SRING_HEADER_SIZE : SRING_HEADER_SIZE + rest * size])

    def copy_in(self, index: int, data: bytes) -> int:
        """Write whole slots from a (free-running) index on; how many."""
        view, size, first = self.view, self.slot_size, index & self.mask
        at, count = SRING_HEADER_SIZE + first * size, len(data) // size
        if first + count <= self.size:
            view[at : at + len(data)] = data
        else:
            here = (self.size - first) * size
            view[at : at + here] = data[:here]
            view[SRING_HEADER_SIZE : SRING_HEADER_SIZE + len(data) - here] = data[here:]
        return count


class FrontRing(_Ring):
    """The frontend's end. `start` places the indices (any u32) when the ring is initialised."""

    __slots__ = ("req_prod_pvt", "rsp_cons")

    def __init__(self, view: memoryview, slot_size: int, start: int = 0) -> None:
        super().__init__(view, slot_size)
        view[:SRING_HEADER_SIZE] = bytes(SRING_HEADER_SIZE)
        words, start = self.words, start & U32
        words[REQ_PROD] = words[RSP_PROD] = start
        words[REQ_EVENT] = words[RSP_EVENT] = (start + 1) & U32
        self.req_prod_pvt = self.rsp_cons = start

    @property
    def free(self) -> int:
        """Slots that can still be filled."""
        return self.size - ((self.req_prod_pvt - self.rsp_cons) & U32)

    def next_request(self) -> int:
        """Offset of the next free slot; the caller has seen that `free` is not 0."""
        offset = SRING_HEADER_SIZE + (self.req_prod_pvt & self.mask) * self.slot_size
        self.req_prod_pvt = (self.req_prod_pvt + 1) & U32
        return offset

    def put_requests(self, data: bytes) -> None:
        """Fill the next free slots with `data`, whole slots; the caller has seen that so many are `free`."""
        self.req_prod_pvt = (self.req_prod_pvt + self.copy_in(self.req_prod_pvt, data)) & U32

    def push_requests(self) -> bool:
        """Publish what was written; True when the backend asked to be told (hold-off: its event index was passed)."""
        words, new = self.words, self.req_prod_pvt
        old, words[REQ_PROD] = words[REQ_PROD], new
        with _fence:
            pass
        return ((new - words[REQ_EVENT]) & U32) < ((new - old) & U32)

    def responses(self) -> int:
        """How many responses wait. PeerFault if the backend claims more than was asked (XSA: never trust rsp_prod)."""
        waiting = (self.words[RSP_PROD] - self.rsp_cons) & U32
        if waiting > ((self.req_prod_pvt - self.rsp_cons) & U32):
            raise PeerFault(f"rsp_prod is {waiting} ahead of rsp_cons, but only {self.size - self.free} requests are out")
        return waiting

    def next_response(self) -> int:
        """Offset of the next response; the caller has seen that there is one."""
        offset = SRING_HEADER_SIZE + (self.rsp_cons & self.mask) * self.slot_size
        self.rsp_cons = (self.rsp_cons + 1) & U32
        return offset

    def copy_responses(self, count: int) -> bytes:
        """A copy of the next `count` responses, none of them taken; the caller has seen that there are so many."""
        return self.copy_out(self.rsp_cons, count)

    def skip_responses(self, count: int) -> None:
        """Responses that were copied are taken."""
        self.rsp_cons = (self.rsp_cons + count) & U32

    def final_check_for_responses(self) -> int:
        """Ask to be told of the next response, then look once more: what came in between would never be announced."""
        if waiting := self.responses():
            return waiting
        return self.ask_for_responses(1)

    def ask_for_responses(self, count: int) -> int:
        """Ask to be told when `count` responses wait; then look once more."""
        self.words[RSP_EVENT] = (self.rsp_cons + count) & U32
        with _fence:
            pass
        return self.responses()


class BackRing(_Ring):
    """The backend's end. Attaches to a ring that the frontend initialised; its indices need not be 0."""

    __slots__ = ("req_cons", "rsp_prod_pvt")

    def __init__(self, view: memoryview, slot_size: int) -> None:
        super().__init__(view, slot_size)
        # RING_ATTACH: go on after the last response that was published (0 on a new ring)
        self.req_cons = self.rsp_prod_pvt = self.words[RSP_PROD]

    def requests(self) -> int:
        """How many requests wait. PeerFault if req_prod overran the ring, or fell behind what was taken already."""
        waiting = (self.words[REQ_PROD] - self.req_cons) & U32
        if waiting > self.size - ((self.req_cons - self.rsp_prod_pvt) & U32):
            ahead = (self.req_cons + waiting - self.rsp_prod_pvt) & U32
            raise PeerFault(f"req_prod is {ahead} ahead of the last response; the ring has {self.size} slots")
        return waiting

    def next_request(self) -> int:
        """Offset of the next request; the caller has seen that there is one, and copies it before looking at it."""
        offset = SRING_HEADER_SIZE + (self.req_cons & self.mask) * self.slot_size
        self.req_cons = (self.req_cons + 1) & U32
        return offset

    def copy_requests(self, count: int) -> bytes:
        """A copy of the next `count` requests, none of them taken; the caller has seen that there are so many."""
        return self.copy_out(self.req_cons, count)

    def skip_requests(self, count: int) -> None:
        """Requests that were copied are taken."""
        self.req_cons = (self.req_cons + count) & U32

    def next_response(self) -> int:
        """Offset of the next response slot. There is always one: a response answers a request that was taken."""
        offset = SRING_HEADER_SIZE + (self.rsp_prod_pvt & self.mask) * self.slot_size
        self.rsp_prod_pvt = (self.rsp_prod_pvt + 1) & U32
        return offset

    def put_responses(self, data: bytes) -> None:
        """Fill the next response slots with `data`, whole slots."""
        self.rsp_prod_pvt = (self.rsp_prod_pvt + self.copy_in(self.rsp_prod_pvt, data)) & U32

    def push_responses(self) -> bool:
        """Publish responses; True when the frontend asked to be told."""
        words, new = self.words, self.rsp_prod_pvt
        old, words[RSP_PROD] = words[RSP_PROD], new
        with _fence:
            pass
        return ((new - words[RSP_EVENT]) & U32) < ((new - old) & U32)

    def final_check_for_requests(self) -> int:
        """Ask to be told of the next request, then look once more."""
        if waiting := self.requests():
            return waiting
        return self.ask_for_requests(1)

    def ask_for_requests(self, count: int) -> int:
        """Ask to be told when `count` requests wait, for less is of no use; then look once more."""
        self.words[REQ_EVENT] = (self.req_cons + count) & U32
        with _fence:
            pass
        return self.requests()


class BytePipe:
    """One direction of a ring of bytes: io/console.h, io/xs_wire.h. Which end we are, our caller knows.

    `data` is the ring, its size a power of two; `words[cons]` and `words[prod]` are the shared indices.
    """

    __slots__ = ("_cons", "_prod", "data", "size", "words")

    def __init__(self, data: memoryview, words: memoryview, cons: int, prod: int) -> None:
        self.data, self.words = data, words
        self.size = len(data)
        self._cons, self._prod = cons, prod

    def waiting(self) -> int:
        """Bytes to read. PeerFault if the indices are further apart than the ring is long."""
        return self._indices()[2]

    def _indices(self) -> tuple[int, int, int]:
        """Consumer, producer, and how many bytes lie between them. Each index is looked at once."""
        cons, prod = self.words[self._cons], self.words[self._prod]
        waiting = (prod - cons) & U32
        if waiting > self.size:
            raise PeerFault(f"the producer is {waiting} bytes ahead of the consumer in a ring of {self.size}")
        return cons, prod, waiting

    def read(self) -> bytes:
        """Take all that waits."""
        cons, _, count = self._indices()
        at = cons & (self.size - 1)
        data = bytes(self.data[at : at + count])
        if len(data) < count:
            data += bytes(self.data[: count - len(data)])
        self.words[self._cons] = (cons + count) & U32
        return data

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Put as much of `data` as fits; how much that was."""
        _, prod, waiting = self._indices()
        count = min(len(data), self.size - waiting)
        at = prod & (self.size - 1)
        here = min(count, self.size - at)
        self.data[at : at + here] = data[:here]
        self.data[: count - here] = data[here:count]
        self.words[self._prod] = (prod + count) & U32
        return count

    def reset(self) -> None:
        self.words[self._cons] = self.words[self._prod] = 0
