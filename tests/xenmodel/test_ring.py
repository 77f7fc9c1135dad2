"""Goal: the rings of io/ring.h: nothing lost, nothing doubled, no wake-up missed, and no index of the peer's believed.
Method: tables of indices around 0, 2**31 and 2**32, and two ends run in orders drawn from a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from struct import pack_into, unpack_from

import pytest

from xenmodel.memory import Frame, GuestMemory, vmap
from xenmodel.public.io.blkif import ABIS
from xenmodel.public.io.ring import REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD
from xenmodel.ring import U32, BackRing, FrontRing
from xenmodel.types import PAGE_SIZE, PeerFault

BLKIF_64, BLKIF_32 = ABIS["x86_64-abi"].slot_size, ABIS["x86_32-abi"].slot_size
STARTS = [0, 2**31 - 3, 2**31, 2**32 - 3, 2**32 - 1]
SIZES = [  # slot size, pages, slots
    (BLKIF_64, 1, 32),
    (BLKIF_64, 2, 64),
    (BLKIF_64, 4, 128),
    (BLKIF_64, 16, 512),
    (BLKIF_32, 1, 32),
    (BLKIF_32, 4, 128),
    (12, 1, 256),  # netif tx
    (8, 1, 256),  # netif rx
    (8, 2, 512),
]


def pair(start: int = 0, slot_size: int = BLKIF_64, pages: int = 1) -> tuple[FrontRing, BackRing]:
    """Both ends of a fresh ring."""
    view = memoryview(bytearray(pages * PAGE_SIZE))
    front = FrontRing(view, slot_size, start)
    return front, BackRing(view, slot_size)


def ask(front: FrontRing, count: int) -> bool:
    for _ in range(count):
        front.next_request()
    return front.push_requests()


def answer(back: BackRing, count: int) -> bool:
    for _ in range(count):
        back.next_request()
        back.next_response()
    return back.push_responses()


# --- layout --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slot_size", "pages", "slots"), SIZES)
def test_sizes_and_offsets(slot_size: int, pages: int, slots: int):
    """Goal: a power of two slots behind 64 bytes.  Method: known sizes; the offsets of one round never overlap."""
    front, back = pair(0, slot_size, pages)
    assert front.size == back.size == front.free == slots
    offsets = [front.next_request() for _ in range(slots)]
    assert offsets == list(range(64, 64 + slots * slot_size, slot_size)) == [front.offset(i) for i in range(slots)]
    assert offsets[-1] + slot_size <= pages * PAGE_SIZE
    assert front.free == 0


@pytest.mark.parametrize("start", STARTS)
def test_a_new_ring_is_empty_wherever_its_indices_start(start: int):
    """Goal: producers at the start, events one ahead, rest of the header zero.  Method: dirty bytes, then initialise."""
    view = memoryview(bytearray(b"\xff" * PAGE_SIZE))
    front = FrontRing(view, BLKIF_64, start)
    words = view[:64].cast("I").tolist()
    assert words[REQ_PROD] == words[RSP_PROD] == start
    assert words[REQ_EVENT] == words[RSP_EVENT] == (start + 1) % 2**32
    assert words[4:] == [0] * 12
    back = BackRing(view, BLKIF_64)
    assert (back.req_cons, back.rsp_prod_pvt, back.requests(), front.responses()) == (start, start, 0, 0)


def test_a_ring_without_a_slot_is_refused():
    """Goal: our own mistake is loud.  Method: a slot larger than the page."""
    with pytest.raises(ValueError, match="holds no slot"):
        FrontRing(memoryview(bytearray(PAGE_SIZE)), PAGE_SIZE)


@pytest.mark.parametrize("start", STARTS)
def test_attach_goes_on_after_the_last_response(start: int):
    """Goal: a backend that restarts takes what is unanswered again.  Method: 5 asked, 2 answered, a second BackRing."""
    front, back = pair(start)
    ask(front, 5)
    answer(back, 2)
    second = BackRing(back.view, BLKIF_64)
    assert second.requests() == 3
    assert second.next_request() == front.offset(start + 2)


@pytest.mark.parametrize("start", STARTS)
def test_full_and_empty_through_two_rounds(start: int):
    """Goal: free, requests and responses count right across the wrap.  Method: fill and drain the ring twice."""
    front, back = pair(start)
    for _ in range(2):
        ask(front, 32)
        assert (front.free, back.requests(), front.responses()) == (0, 32, 0)
        answer(back, 32)
        assert (front.free, back.requests(), front.responses()) == (0, 0, 32)
        slots = [front.next_response() for _ in range(32)]
        assert len(set(slots)) == 32 and (front.free, front.responses()) == (32, 0)


# --- what the peer may not say -------------------------------------------------------------------------------------------

BACK_CASES = [  # taken, answered, req_prod relative to the last response; requests waiting, or None for a fault
    (0, 0, 0, 0),
    (0, 0, 1, 1),
    (0, 0, 32, 32),
    (0, 0, 33, None),
    (0, 0, 2**31, None),
    (0, 0, 2**31 - 1, None),
    (0, 0, -1, None),
    (5, 0, 5, 0),
    (5, 0, 32, 27),
    (5, 0, 33, None),
    (5, 0, 37, None),  # 32 ahead of what was taken, but five slots are still unanswered
    (5, 0, 4, None),  # back behind what was taken
    (5, 0, 0, None),
    (5, 0, 5 + 2**31, None),
    (5, 3, 2, 0),
    (5, 3, 32, 30),
    (5, 3, 33, None),
    (5, 3, 1, None),
    (32, 0, 32, 0),
    (32, 0, 33, None),
    (32, 0, 31, None),
    (32, 32, 32, 32),
]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("taken", "answered", "jump", "waiting"), BACK_CASES)
@pytest.mark.parametrize("look", [BackRing.requests, BackRing.final_check_for_requests])
def test_what_a_backend_believes(
    look: Callable[[BackRing], int], taken: int, answered: int, jump: int, waiting: int | None, start: int
):
    """Goal: RING_REQUEST_PROD_OVERFLOW, and a producer that goes back.  Method: write req_prod over the frontend's head."""
    _, back = pair(start)
    for _ in range(taken):
        back.next_request()
    for _ in range(answered):
        back.next_response()
    back.push_responses()
    back.words[REQ_PROD] = (start + answered + jump) & U32
    if waiting is None:
        with pytest.raises(PeerFault, match="req_prod"):
            look(back)
    else:
        assert look(back) == waiting


FRONT_CASES = [  # asked, consumed, rsp_prod relative to what was consumed; responses waiting, or None for a fault
    (0, 0, 0, 0),
    (0, 0, 1, None),
    (0, 0, -1, None),
    (0, 0, 2**31, None),
    (7, 0, 7, 7),
    (7, 0, 8, None),
    (7, 0, 32, None),
    (7, 3, 4, 4),
    (7, 3, 5, None),
    (7, 3, -1, None),
    (7, 3, -3, None),
    (7, 3, 2**31, None),
    (7, 7, 0, 0),
    (7, 7, 1, None),
    (32, 0, 32, 32),
    (32, 0, 33, None),
    (32, 0, 2**32 - 1, None),
]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("asked", "consumed", "jump", "waiting"), FRONT_CASES)
@pytest.mark.parametrize("look", [FrontRing.responses, FrontRing.final_check_for_responses])
def test_what_a_frontend_believes(
    look: Callable[[FrontRing], int], asked: int, consumed: int, jump: int, waiting: int | None, start: int
):
    """Goal: RING_RESPONSE_PROD_OVERFLOW: no more answers than questions.  Method: write rsp_prod over the backend's head."""
    front, back = pair(start)
    ask(front, asked)
    answer(back, consumed)
    for _ in range(consumed):
        front.next_response()
    front.words[RSP_PROD] = (start + consumed + jump) & U32
    if waiting is None:
        with pytest.raises(PeerFault, match="rsp_prod"):
            look(front)
    else:
        assert look(front) == waiting


def test_a_fault_moves_nothing():
    """Goal: a faulty index leaves our own indices as they were.  Method: fault, repair the word, go on."""
    front, back = pair(2**32 - 2)
    ask(front, 3)
    honest, back.words[REQ_PROD] = back.words[REQ_PROD], 2**31
    with pytest.raises(PeerFault):
        back.requests()
    back.words[REQ_PROD] = honest
    assert back.requests() == 3
    answer(back, 3)
    honest, front.words[RSP_PROD] = front.words[RSP_PROD], 99
    with pytest.raises(PeerFault):
        front.responses()
    front.words[RSP_PROD] = honest
    assert front.responses() == 3


# --- hold-off ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", STARTS)
def test_only_the_first_of_a_batch_is_announced(start: int):
    """Goal: one event until the other end asks again.  Method: pushes before and after a final check, both directions."""
    front, back = pair(start)
    assert ask(front, 1), "a new backend wants to hear of the first request"
    assert not ask(front, 3), "and of no other before it has asked"
    answer(back, 4)
    assert back.final_check_for_requests() == 0
    assert ask(front, 1)
    assert back.final_check_for_requests() == 1, "work that is there is returned and not announced"
    assert not ask(front, 1)
    assert answer(back, 2) is False, "the frontend heard of the first response and has not asked since"
    for _ in range(front.responses()):
        front.next_response()
    assert front.final_check_for_responses() == 0
    ask(front, 1)
    assert answer(back, 1)


class Intruder:
    """The shared words, with a peer on another processor that acts just before or just after one of them is written."""

    def __init__(self, words: memoryview, index: int, before: bool, act: Callable[[], None]) -> None:
        self.words, self.index, self.before, self.act = words, index, before, act

    def __getitem__(self, index: int) -> int:
        value: int = self.words[index]
        return value

    def __setitem__(self, index: int, value: int) -> None:
        if index == self.index and self.before:
            self.act()
        self.words[index] = value
        if index == self.index and not self.before:
            self.act()


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("side", ["front", "back"])
def test_the_second_look_sees_what_came_during_the_first(side: str, before: bool, start: int):
    """Goal: RING_FINAL_CHECK looks again after it asked, or this work is never announced.
    Method: the peer publishes around the very write of the event index."""
    front, back = pair(start)
    told: list[bool] = []
    if side == "back":
        ask(front, 1)
        answer(back, 1)
        index, look = REQ_EVENT, back.final_check_for_requests
        intruder = Intruder(back.words, index, before, lambda: told.append(ask(front, 1)))
        back.words = intruder  # type: ignore[assignment]
    else:
        ask(front, 2)
        answer(back, 1)
        front.next_response()
        index, look = RSP_EVENT, front.final_check_for_responses
        intruder = Intruder(front.words, index, before, lambda: told.append(answer(back, 1)))
        front.words = intruder  # type: ignore[assignment]
    assert look() == 1
    assert told == [not before], "before the write nobody was asking, so only the second look can find it"


class Traffic:
    """Two drivers that sleep until they are told, run step by step in an order drawn from a seed."""

    def __init__(self, seed: int, total: int) -> None:
        self.random = Random(seed)
        slot_size, pages, _ = SIZES[seed % len(SIZES)]
        self.memory = GuestMemory(pages * 2)
        frames = [Frame(self.memory, pfn) for pfn in self.random.sample(range(pages * 2), pages)]
        start = (0, 2**31 - total // 2, 2**32 - total // 2, self.random.randrange(2**32))[seed % 4]
        self.front = FrontRing(vmap(frames), slot_size, start)
        self.back = BackRing(vmap(frames), slot_size)  # its own mapping of the same frames, as in another domain
        self.left, self.next_id = total, 0
        self.out: set[int] = set()
        self.taken: list[int] = []
        self.events = {"front": 0, "back": 0}
        self.pending = {"front": False, "back": False}
        self.awake: dict[str, Iterator[None]] = {}

    def tell(self, who: str) -> None:
        self.events[who] += 1
        self.pending[who] = True

    def submit(self) -> None:
        """The frontend's user: some requests, one push; also while the frontend's handler is half way through."""
        for _ in range(self.random.randint(1, min(self.left, self.front.free))):
            pack_into("<I", self.front.view, self.front.next_request(), self.next_id)
            self.out.add(self.next_id)
            self.next_id, self.left = self.next_id + 1, self.left - 1
        if self.front.push_requests():
            self.tell("back")

    def complete(self) -> None:
        """The backend's disk: some answers in any order, one push."""
        for _ in range(self.random.randint(1, len(self.taken))):
            ident = self.taken.pop(self.random.randrange(len(self.taken)))
            pack_into("<I", self.back.view, self.back.next_response(), ident ^ U32)
        if self.back.push_responses():
            self.tell("front")

    def back_handler(self) -> Iterator[None]:
        waiting = self.back.requests()
        while waiting:
            for _ in range(waiting):
                self.taken.append(unpack_from("<I", self.back.view, self.back.next_request())[0])
            yield
            waiting = self.back.final_check_for_requests()
            yield

    def front_handler(self) -> Iterator[None]:
        waiting = self.front.responses()
        while waiting:
            for _ in range(waiting):
                ident = unpack_from("<I", self.front.view, self.front.next_response())[0] ^ U32
                assert ident in self.out, f"response to {ident}, which is not out"
                self.out.remove(ident)
            yield
            waiting = self.front.final_check_for_responses()
            yield

    def step(self) -> bool:
        """One step of whoever can do something; False if nobody can."""
        actions: list[str] = [who for who in ("front", "back") if who in self.awake or self.pending[who]]
        if self.left and self.front.free:
            actions.append("submit")
        if self.taken:
            actions.append("complete")
        if not actions:
            return False
        action = self.random.choice(actions)
        if action in ("submit", "complete"):
            getattr(self, action)()
            return True
        if action not in self.awake:
            self.pending[action] = False
            self.awake[action] = self.front_handler() if action == "front" else self.back_handler()
        if next(self.awake[action], "asleep") == "asleep":
            del self.awake[action]
        return True


@pytest.mark.parametrize("seed", range(200))
def test_no_wake_up_is_lost_whatever_the_order(seed: int):
    """Goal: every request is answered once though both ends sleep until told.
    Method: 3000 requests in bursts, answered in any order, all steps interleaved by the seed; multi-page rings of scattered
    frames, all slot sizes, indices that cross 2**31 and 2**32. A lost wake-up ends the run with requests still out."""
    total = 3000
    traffic = Traffic(seed, total)
    while traffic.step():
        pass
    assert (traffic.left, traffic.taken, traffic.out) == (0, [], set())
    assert traffic.front.free == traffic.front.size
    assert all(told < total / 2 for told in traffic.events.values()), f"hold-off saved too little: {traffic.events}"
