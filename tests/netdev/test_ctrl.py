"""Goal: over the control ring a guest gets the hashing it asks for, and frames are steered by it.
Method: CtrlFront and CtrlBack over two real domains, in any order of events; the published vectors of the hash; guests that
are short of something. Ends that lie are in test_ctrl_hostile.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import pack

import pytest

from netdev.ctrl import HASH_TYPES, MAX_WAITING, NO_ANSWER, HashState
from tests.netdev.ctrlworld import (
    ARP,
    GET_SIZE,
    INVALID,
    IPV4,
    IPV4_TCP,
    IPV6,
    IPV6_TCP,
    KEY,
    NONE,
    OKAY,
    OVERFLOW,
    QUEUES,
    SLOTS,
    TCP4,
    TCP6,
    TOEPLITZ,
    UDP4,
    Backend,
    Case,
)
from xenmodel.testing import Footprint, check_rings, check_world
from xenmodel.types import OutOfResources


@pytest.fixture
def case() -> Iterator[Case]:
    it = Case()
    yield it
    assert check_world(it.pair.hypervisor) == []
    it.pair.close()


# --- both ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_hashing_is_set_used_and_turned_off(seed: int) -> None:
    """Goal: what set_hash() asked for steers frames, in every order of events; afterwards no page, grant or port is left."""
    case = Case(seed)
    front = case.front()
    assert front.set_hash(HASH_TYPES, KEY, [3, 1, 2, 0, 3], case.done), "asked before the backend is there"
    assert not front.set_hash(0, b"", [], case.done), "one at a time"
    back = Backend(case.pair, front)
    case.pair.settle()
    assert case.told == [(OKAY, 0)] and case.faults == back.faults == []
    state = back.state
    assert (state.algorithm, state.flags, state.key, state.mapping) == (TOEPLITZ, HASH_TYPES, KEY, (3, 1, 2, 0, 3))
    mapping = (3, 1, 2, 0, 3)
    assert state.choose(TCP4) == (mapping[0x51CCC178 % 5], (1, 0x51CCC178))
    assert front.request(GET_SIZE, 0, 0, 0, case.done) and front.set_hash(0, KEY, [9], case.done)
    case.pair.settle()
    assert case.told[1:] == [(OKAY, 128), (OKAY, 0)] and state.choose(TCP4) == (None, None)
    assert check_rings(front.ring, back.ring) == [] and check_world(case.pair.hypervisor) == []
    back.close()
    front.stop()
    front.release()
    assert case.footprint.grown() == [] and len(case.told) == 3
    case.pair.close()


@pytest.mark.parametrize(
    ("types", "key", "mapping", "status"),
    [
        (16, KEY, [0], INVALID),
        (1 << 31 | IPV4, KEY, [0], INVALID),
        (IPV4, bytes(41), [0], OVERFLOW),
        (IPV4, bytes(4096), [0], OVERFLOW),
        (IPV4, KEY, [0] * 129, INVALID),
        (IPV4, KEY, [0] * 1024, INVALID),
        (IPV4, KEY, [0, QUEUES], INVALID),
        (IPV4, KEY, [2**32 - 1], INVALID),
        (IPV4, b"", [], OKAY),
        (IPV4, KEY, [QUEUES - 1] * 128, OKAY),
    ],
)
def test_what_is_refused(case: Case, types: int, key: bytes, mapping: list[int], status: int) -> None:
    """Goal: the first step that is refused ends the sequence with its status; the pages come back; another can follow."""
    front = case.front()
    back = Backend(case.pair, front)
    resting = Footprint(case.pair.hypervisor)
    assert front.set_hash(types, key, mapping, case.done)
    case.pair.settle()
    assert case.told == [(status, 0)] and resting.grown() == []
    assert front.set_hash(IPV6, KEY, [1], case.done)
    case.pair.settle()
    assert case.told[1:] == [(OKAY, 0)] and (back.state.flags, back.state.mapping) == (IPV6, (1,))


@pytest.mark.parametrize(("key", "mapping"), [(bytes(4097), []), (b"", [0] * 1025)])
def test_more_than_a_page(case: Case, key: bytes, mapping: list[int]) -> None:
    with pytest.raises(ValueError, match="more than a page"):
        case.front().set_hash(IPV4, key, mapping, case.done)
    assert case.told == []


def test_a_full_ring(case: Case) -> None:
    """Goal: requests beyond the ring wait, those beyond the bound are refused, all are answered in order, also one that a
    callback sends when everything is full."""
    front = case.front()
    order: list[int] = []
    for i in range(SLOTS + MAX_WAITING):
        assert front.request(GET_SIZE, 0, 0, 0, lambda status, data, i=i: order.append(i))  # type: ignore[misc]
    assert not front.request(GET_SIZE, 0, 0, 0, case.done)
    assert not front.set_hash(IPV4, KEY, [1], case.done)
    assert front.out[0] is not None
    kind, first = front.out[0]  # ids are handed out from 0 on

    def again(status: int, data: int) -> None:
        first(status, data)
        assert front.request(GET_SIZE, 0, 0, 0, case.done)

    front.out[0] = kind, again
    Backend(case.pair, front)
    case.pair.settle()
    assert order == list(range(SLOTS + MAX_WAITING)) and case.told == [(OKAY, 128)]
    assert not front.waiting and len(front.ids) == SLOTS


# --- the state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "types", "expected"),
    [
        (TCP4, IPV4_TCP | IPV4, (1, 0x51CCC178)),
        (TCP4, IPV4, (0, 0x323E8FC2)),
        (UDP4, IPV4_TCP | IPV4, (0, 0x323E8FC2)),
        (UDP4, IPV4_TCP, None),
        (TCP6, IPV6_TCP | IPV6, (3, 0x40207D3D)),
        (TCP6, IPV6, (2, 0x2CC18CD5)),
        (TCP6, IPV4 | IPV4_TCP, None),
        (TCP4, 0, None),
        (ARP, HASH_TYPES, None),
        (b"", HASH_TYPES, None),
    ],
)
@pytest.mark.parametrize("mapping", [(), (2,), (0, 3, 1)])
def test_steering(head: bytes, types: int, expected: tuple[int, int] | None, mapping: Sequence[int]) -> None:
    """Goal: the maximal type that applies, its hash, and the queue by table or by modulus; nothing when none applies."""
    state = HashState(QUEUES)
    assert state.choose(head) == (None, None)
    assert state.set_algorithm(TOEPLITZ) == state.set_flags(types) == OKAY
    assert state.set_key(len(KEY), lambda length: KEY[:length]) == state.set_mapping_size(len(mapping)) == OKAY
    assert state.set_mapping(0, len(mapping), lambda length: pack(f"<{length // 4}I", *mapping)) == OKAY
    queue = (mapping[expected[1] % len(mapping)] if mapping else expected[1] % QUEUES) if expected else None
    assert state.choose(head) == (queue, expected)
    assert state.set_algorithm(NONE) == OKAY and state.choose(head) == (None, None)


def test_without_a_key_every_hash_is_zero() -> None:
    state = HashState(QUEUES)
    state.set_algorithm(TOEPLITZ)
    state.set_flags(HASH_TYPES)
    assert state.choose(TCP4) == (0, (1, 0))
    state.set_key(2, lambda length: KEY[:length])
    assert state.key == KEY[:2] + bytes(38) and state.choose(TCP4) != (0, (1, 0))
    state.set_key(0, lambda length: pytest.fail("no page is named"))
    assert state.choose(TCP4) == (0, (1, 0))


# --- short of something ------------------------------------------------------------------------------------------------


def test_closing_before_an_answer(case: Case) -> None:
    """Goal: stop() tells everybody once and takes back the pages of a set_hash() that is under way."""
    front = case.front()
    for _ in range(SLOTS + 2):
        assert front.request(GET_SIZE, 0, 0, 0, case.done)
    assert front.set_hash(IPV4, KEY, [1], case.done)
    front.stop()
    assert not front.waiting and case.told == [(NO_ANSWER, 0)] * (SLOTS + 3)
    another = front.domain.events.alloc_unbound(case.pair.back.domid)
    assert another == front.port, "the number is free again"
    front.stop()
    assert front.domain.events.close(another) == 0, "and is not ours any more"
    front.release()
    assert len(case.told) == SLOTS + 3 and case.footprint.grown() == []
    assert not front.set_hash(IPV4, KEY, [1], case.done) and case.footprint.grown() == []


@pytest.mark.parametrize("what", ["frames", "grants", "ports"])
def test_a_guest_without(what: str) -> None:
    """Goal: a guest short of something gets OutOfResources, and nothing is left of the attempt."""
    case = Case(pages=64)
    guest = case.pair.front
    if what == "frames":
        while guest.memory.free_pages:
            guest.memory.allocate()
    elif what == "grants":
        guest.grants.max_frames = 1
        pfn = guest.memory.allocate()
        while guest.grants.available:
            guest.grants.grant_access(case.pair.back.domid, pfn)
    else:
        while guest.events.alloc_unbound(case.pair.back.domid) > 0:
            pass
    before = Footprint(case.pair.hypervisor)
    with pytest.raises(OutOfResources):
        case.front()
    assert before.grown() == []
    case.pair.close()


def test_a_guest_with_one_page_left(case: Case) -> None:
    """Goal: set_hash() takes all its pages or none, and the control ring works on."""
    front = case.front()
    Backend(case.pair, front)
    while front.domain.memory.free_pages > 1:
        front.domain.memory.allocate()
    before = Footprint(case.pair.hypervisor)
    with pytest.raises(OutOfResources):
        front.set_hash(IPV4, KEY, [1], case.done)
    assert before.grown() == [] and case.told == [] and not front.stopped
    assert front.set_hash(IPV4, KEY, [], case.done), "one page is enough for a key"
    case.pair.settle()
    assert case.told == [(OKAY, 0)] and before.grown() == []
