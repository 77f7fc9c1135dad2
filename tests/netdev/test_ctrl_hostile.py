"""Goal: neither end of the control ring can harm or confuse the other, whatever it writes, grants or keeps mapped.
Method: CtrlBack against a guest, and CtrlFront against a backend, that the test plays by hand: requests that are arbitrary,
grants that are none, indices and responses that are lies."""

from __future__ import annotations

from collections.abc import Iterator
from struct import pack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netdev.ctrl import HASH_TYPES, NO_ANSWER, HashState
from tests.netdev.ctrlworld import (
    GET_FLAGS,
    GET_SIZE,
    INVALID,
    IPV4,
    KEY,
    NOT_SUPPORTED,
    OKAY,
    OVERFLOW,
    QUEUES,
    SET_ALGORITHM,
    SET_FLAGS,
    SET_KEY,
    SET_MAPPING,
    SET_SIZE,
    SLOTS,
    TCP4,
    TCP6,
    TOEPLITZ,
    Backend,
    ByHand,
    Case,
    Guest,
)
from xenmodel.public.grant_table import GNTMAP_host_map, GNTMAP_readonly
from xenmodel.public.io.ring import REQ_PROD, RSP_PROD
from xenmodel.testing import Footprint, check_world
from xenmodel.types import Gref


@pytest.fixture
def case() -> Iterator[Case]:
    it = Case()
    yield it
    assert check_world(it.pair.hypervisor) == []
    it.pair.close()


# --- a hostile guest ---------------------------------------------------------------------------------------------------


def test_statuses(case: Case) -> None:
    """Goal: every kind of request has the status netif.h gives it, in one run: what is refused changes nothing."""
    guest = Guest(case.pair)
    back = Backend(case.pair, guest)
    key, table = guest.page(KEY), guest.page(pack("<4I", 1, 2, 3, QUEUES), readonly=False)
    other, revoked = guest.page(KEY, to=guest.domain.domid), guest.page(KEY)
    assert guest.domain.grants.end_access(Gref(revoked))
    steps = [
        ((0,), NOT_SUPPORTED), ((8,), NOT_SUPPORTED), ((9, 0, table, 1), NOT_SUPPORTED), ((10, 0, table, 1), NOT_SUPPORTED),
        ((11,), NOT_SUPPORTED), ((65535, 1, 2, 3), NOT_SUPPORTED), ((GET_FLAGS,), NOT_SUPPORTED),
        ((SET_FLAGS, IPV4), NOT_SUPPORTED), ((SET_ALGORITHM, 2), INVALID), ((SET_ALGORITHM, 2**32 - 1), INVALID),
        ((SET_ALGORITHM, TOEPLITZ), OKAY), ((SET_FLAGS, IPV4), OKAY), ((SET_FLAGS, 16), INVALID),
        ((SET_KEY, key, 40), OKAY), ((SET_KEY, key, 41), OVERFLOW), ((SET_KEY, key, 2**32 - 1), OVERFLOW),
        ((SET_KEY, revoked, 40), INVALID), ((SET_KEY, other, 40), INVALID), ((SET_KEY, 2**32 - 1, 40), INVALID),
        ((SET_SIZE, 129), INVALID), ((SET_SIZE, 2**32 - 1), INVALID), ((SET_SIZE, 4), OKAY),
        ((SET_MAPPING, table, 3, 1), OKAY), ((SET_MAPPING, table, 4, 0), INVALID), ((SET_MAPPING, table, 2, 3), INVALID),
        ((SET_MAPPING, table, 1, 5), INVALID), ((SET_MAPPING, table, 0, 5), INVALID), ((SET_MAPPING, table, 0, 4), OKAY),
        ((SET_MAPPING, table, 1, 128), OVERFLOW), ((SET_MAPPING, table, 129, 0), OVERFLOW),
        ((SET_MAPPING, table, 2, 2**32 - 1), OVERFLOW), ((SET_MAPPING, table, 2**32 - 1, 2), OVERFLOW),
        ((SET_MAPPING, revoked, 1, 0), INVALID), ((SET_MAPPING, other, 1, 0), INVALID),
    ]  # fmt: skip
    for i, (request, status) in enumerate(steps):
        before = snapshot(back.state)
        kind, d0, d1, d2 = (*request, 0, 0, 0)[:4]
        guest.put(kind, d0, d1, d2, 65535 - i)
        case.pair.settle()
        assert guest.answers() == [(65535 - i, kind, status, 0)], request
        assert status == OKAY or snapshot(back.state) == before, request
    assert (back.state.flags, back.state.key, back.state.mapping) == (IPV4, KEY, (0, 1, 2, 3))
    guest.put(GET_FLAGS)
    guest.put(SET_SIZE, 2)
    case.pair.settle()
    assert guest.answers() == [(7, GET_FLAGS, OKAY, HASH_TYPES), (7, SET_SIZE, OKAY, 0)] and back.state.mapping == (0, 0)
    assert len(case.pair.back.maptrack.mappings) == 1, "only the ring stays mapped"


def snapshot(state: HashState) -> tuple[object, ...]:
    return state.algorithm, state.flags, state.key, state.mapping


words = st.sampled_from([0, 1, 2, 3, 4, 8, 15, 16, 39, 40, 41, 127, 128, 129, 1024, 4095, 4096, 2**31, 2**32 - 1])
halves = st.integers(0, 65535)
slots = st.tuples(st.integers(0, 12) | halves, st.integers(0, 13) | words, words, words, halves)


@settings(deadline=None)
@given(st.lists(slots, max_size=100), st.integers(1, 8))
def test_any_requests(requests: list[tuple[int, int, int, int, int]], queues: int) -> None:
    """Goal: each request is answered once, what is refused changes nothing, and the state stays within its bounds.
    Method: references 8 to 13 are the ring, a key, tables good and bad, a page for another domain, a revoked one."""
    case = Case()
    guest = Guest(case.pair)
    for content, to in ((KEY, 0), (bytes(4096), 0), (bytes(range(256)) * 16, 0), (KEY, 1), (KEY, 0)):
        last = guest.page(content, to=to)
    guest.domain.grants.end_access(Gref(last))
    back = Backend(case.pair, guest, HashState(queues))
    before, state = Footprint(case.pair.hypervisor), back.state
    for kind, d0, d1, d2, ident in requests:
        old = snapshot(state)
        guest.put(kind, d0, d1, d2, ident)
        case.pair.settle()
        ((answered, of, status, data),) = guest.answers()
        assert (answered, of) == (ident, kind) and OKAY <= status <= OVERFLOW
        assert status == OKAY or (snapshot(state) == old and data == 0)
        assert len(state.key) == 40 and len(state.mapping) <= 128 and not state.flags & ~HASH_TYPES
        assert all(queue < queues for queue in state.mapping)
        for head in (TCP4, TCP6):
            assert (state.choose(head)[0] or 0) < queues
    assert back.faults == [] and before.grown() == [] and check_world(case.pair.hypervisor) == []
    case.pair.close()


@pytest.mark.parametrize("jump", [SLOTS + 2, 2**31, 2**32 - 1])
def test_a_request_index_that_jumps(case: Case, jump: int) -> None:
    """Goal: the fault is reported once and nothing is taken any more, but what was asked before is answered."""
    guest = Guest(case.pair)
    back = Backend(case.pair, guest)
    guest.put(GET_SIZE)
    case.pair.settle()
    guest.ring.words[REQ_PROD] = (1 + jump) & 0xFFFFFFFF
    for _ in range(2):
        guest.domain.events.send(guest.port)
        case.pair.settle()
    assert len(back.faults) == 1 and "req_prod" in back.faults[0]
    assert guest.answers() == [(7, GET_SIZE, OKAY, 128)] and back.ctrl.stopped


def test_a_guest_that_never_stops_asking(case: Case) -> None:
    """Goal: one turn is bounded, then the others have theirs; a guest that stops gets all its answers.
    Method: the state writes the next request whenever it is asked, as a guest on another processor would."""
    guest = Guest(case.pair)
    left = 3 * SLOTS

    class Endless(HashState):
        def get_flags(self) -> tuple[int, int]:
            nonlocal left
            if left:
                left -= 1
                guest.ring.words[REQ_PROD] += 1  # the slot says the same as a ring's length before
            return super().get_flags()

    back = Backend(case.pair, guest, Endless(QUEUES))
    case.pair.settle()
    for _ in range(SLOTS):
        guest.put(GET_FLAGS, tell=False)
    back.ctrl.on_event(back.port)
    assert back.ring.req_cons == 2 * SLOTS and case.pair.back.events.is_pending(back.port)
    case.pair.settle()
    assert left == 0 and back.ring.req_cons == guest.ring.words[RSP_PROD] == 4 * SLOTS and back.faults == []


# --- a hostile backend -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ident", "kind", "reason"),
    [
        (SLOTS, GET_SIZE, "id 128"),
        (65535, GET_SIZE, "id 65535"),
        (2, GET_SIZE, "not out"),
        (0, SET_SIZE, "type 5"),
        (1, 0, "type 0"),
    ],
)
def test_a_response_that_is_a_lie(case: Case, ident: int, kind: int, reason: str) -> None:
    """Goal: the device ends with a reason; each callback is told once; nothing is sent any more."""
    front = case.front()
    back = ByHand(case, front)
    assert front.request(GET_SIZE, 0, 0, 0, case.done) and front.set_hash(IPV4, KEY, [1], case.done)
    assert [kind for _, kind, *_ in back.take()] == [GET_SIZE, SET_ALGORITHM]
    back.answer(ident, kind)
    assert len(case.faults) == 1 and reason in case.faults[0]
    assert case.told == [(NO_ANSWER, 0)] * 2 and not front.request(GET_SIZE, 0, 0, 0, case.done)
    back.answer(0, GET_SIZE)
    front.stop()
    assert len(case.faults) == 1 and len(case.told) == 2


def test_any_order_any_status_but_once(case: Case) -> None:
    """Goal: responses may come in any order (netif.h) and with any status; the second one for an id ends the device."""
    front = case.front()
    back = ByHand(case, front)
    told: dict[str, tuple[int, int]] = {}
    for name in "abc":
        assert front.request(GET_SIZE, 0, 0, 0, lambda *answer, name=name: told.update({name: answer}))
    a, b, c = (ident for ident, *_ in back.take())
    back.answer(c, GET_SIZE, 0xFFFFFFFF, 5)
    back.answer(a, GET_SIZE, NOT_SUPPORTED)
    assert told == {"c": (0xFFFFFFFF, 5), "a": (NOT_SUPPORTED, 0)} and case.faults == []
    back.answer(c, GET_SIZE)
    assert "not out" in case.faults[0] and told["b"] == (NO_ANSWER, 0) and b != c


@pytest.mark.parametrize("jump", [2, SLOTS, SLOTS + 1, 2**31, 2**32 - 1])
def test_a_response_index_that_jumps(case: Case, jump: int) -> None:
    front = case.front()
    back = ByHand(case, front)
    assert front.request(GET_SIZE, 0, 0, 0, case.done)
    back.ring.words[RSP_PROD] = jump
    case.pair.back.events.send(back.port)
    case.pair.settle()
    assert "rsp_prod" in case.faults[0] and case.told == [(NO_ANSWER, 0)]


def test_a_backend_that_keeps_pages(case: Case) -> None:
    """Goal: a page that is still mapped when its request is answered ends the device, and is never used again; nor is the
    ring's (XSA-396). What the backend could map of key and table, it could not write."""
    front = case.front()
    back = ByHand(case, front)
    assert front.set_hash(IPV4, KEY, [], case.done)
    for kind, data in ((SET_ALGORITHM, TOEPLITZ), (SET_FLAGS, IPV4), (SET_KEY, 0)):
        ((ident, asked, gref, length, _),) = back.take()
        assert asked == kind and (kind == SET_KEY or gref == data)
        if kind == SET_KEY:
            assert case.pair.back.maptrack.map(front.domain.domid, gref, GNTMAP_host_map)[1] is None, "not writable"
            _, kept = case.pair.back.maptrack.map(front.domain.domid, gref, GNTMAP_host_map | GNTMAP_readonly)
            assert kept is not None and bytes(kept.view[:length]) == KEY
        back.answer(ident, kind)
    assert kept is not None
    ((ident, asked, *_),) = back.take()
    assert asked == SET_SIZE
    back.answer(ident, asked)
    assert case.told == [(OKAY, 0)] and "still mapped" in case.faults[0]
    front.release()
    memory, free = front.domain.memory, front.domain.memory.free_pages
    taken = {memory.allocate() for _ in range(free)}
    assert not {kept.frame.pfn, back.mapping.frame.pfn} & taken
    assert bytes(kept.view[:40]) == KEY


def test_a_backend_that_never_stops_answering(case: Case) -> None:
    """Goal: the frontend's turn is bounded too.
    Method: each callback asks again, and the backend answers at once, as one on another processor would."""
    front = case.front()
    back = ByHand(case, front)
    case.pair.settle()

    def again(status: int, data: int) -> None:
        case.done(status, data)
        if len(case.told) < 3 * SLOTS and front.request(GET_SIZE, 0, 0, 0, again):
            back.answer_all()

    assert front.request(GET_SIZE, 0, 0, 0, again)
    back.answer_all()
    front.on_event(front.port)
    assert len(case.told) == SLOTS and front.domain.events.is_pending(front.port)
    case.pair.settle()
    assert len(case.told) == 3 * SLOTS and case.faults == []


@pytest.mark.parametrize("keeps", [False, True])
def test_an_owner_that_stops_in_a_callback(case: Case, keeps: bool) -> None:
    """Goal: after that the ring is not looked at, and no fault is reported of a device that is closed already."""
    front = case.front()
    back = ByHand(case, front)

    def stop(status: int, data: int) -> None:
        case.done(status, data)
        front.stop()

    assert front.set_hash(IPV4, KEY, [], stop)
    assert front.request(GET_SIZE, 0, 0, 0, case.done)
    ((ident, kind, *_), (other, *_)) = back.take()
    for expected in (SET_ALGORITHM, SET_FLAGS, SET_KEY):
        assert kind == expected
        back.answer(ident, kind)
        ((ident, kind, gref, *_),) = back.take()
        if kind == SET_KEY and keeps:
            assert case.pair.back.maptrack.map(front.domain.domid, gref, GNTMAP_host_map | GNTMAP_readonly)[1] is not None
    back.answer(ident, kind, tell=False)
    before = front.ring.rsp_cons
    back.answer(other, GET_SIZE)
    assert case.told == [(OKAY, 0), (NO_ANSWER, 0)] and case.faults == []
    assert front.ring.rsp_cons == before + 1
