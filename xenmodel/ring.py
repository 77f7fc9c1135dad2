"""ring.py: io/ring.h. The only file that computes modulo 2**32.

FrontRing produces requests and consumes responses; BackRing does the opposite. Both work on bytes that the two ends
share: a view of the ring's pages, whose first 16 bytes are the indices. Names are ring.h's.

Invariant, modulo 2**32:  rsp_cons <= rsp_prod <= req_cons <= req_prod  and  req_prod - rsp_cons <= size.
The other end may write anything into the shared indices at any time: each is read once and checked before use
(RING_REQUEST_PROD_OVERFLOW, RING_RESPONSE_PROD_OVERFLOW), and what breaks the invariant is a PeerFault.
Waiting is not here: a caller that finds the ring full comes back when it is told.
"""

from __future__ import annotations

from xenmodel.public.io.ring import REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD, SRING_HEADER_SIZE, ring_entries
from xenmodel.types import PeerFault

U32 = 0xFFFFFFFF


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

    def push_requests(self) -> bool:
        """Publish what was written; True when the backend asked to be told (hold-off: its event index was passed)."""
        words, new = self.words, self.req_prod_pvt
        old, words[REQ_PROD] = words[REQ_PROD], new
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

    def final_check_for_responses(self) -> int:
        """Ask to be told of the next response, then look once more: what came in between would never be announced."""
        if waiting := self.responses():
            return waiting
        self.words[RSP_EVENT] = (self.rsp_cons + 1) & U32
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

    def next_response(self) -> int:
        """Offset of the next response slot. There is always one: a response answers a request that was taken."""
        offset = SRING_HEADER_SIZE + (self.rsp_prod_pvt & self.mask) * self.slot_size
        self.rsp_prod_pvt = (self.rsp_prod_pvt + 1) & U32
        return offset

    def push_responses(self) -> bool:
        """Publish responses; True when the frontend asked to be told."""
        words, new = self.words, self.rsp_prod_pvt
        old, words[RSP_PROD] = words[RSP_PROD], new
        return ((new - words[RSP_EVENT]) & U32) < ((new - old) & U32)

    def final_check_for_requests(self) -> int:
        """Ask to be told of the next request, then look once more."""
        if waiting := self.requests():
            return waiting
        self.words[REQ_EVENT] = (self.req_cons + 1) & U32
        return self.requests()
