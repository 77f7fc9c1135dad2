"""Goal: a batch on a ring is the same as its slots one by one: same bytes in the same places, same indices, same wake-ups.
Method: two rings side by side, one driven slot by slot (next_*, test_ring.py), one in batches drawn by hypothesis; starts
and counts around the end of the ring and around 2**32.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenmodel.public.io.ring import REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD, SRING_HEADER_SIZE
from xenmodel.ring import BackRing, FrontRing
from xenmodel.types import PAGE_SIZE, PeerFault

SIZES = {12: 256, 8: 256, 112: 32}  # slot size: slots
STARTS = [0, 1, 255, 2**31 - 2, 2**32 - 256, 2**32 - 5, 2**32 - 1]
CASES = [(size, start) for size in SIZES for start in STARTS]


class Pair:
    """Both ends of a ring, and its bytes."""

    def __init__(self, slot_size: int, start: int) -> None:
        self.view = memoryview(bytearray(PAGE_SIZE))
        self.slot_size = slot_size
        self.front = FrontRing(self.view, slot_size, start)
        self.back = BackRing(self.view, slot_size)

    def slot(self, index: int) -> bytes:
        at = SRING_HEADER_SIZE + index % SIZES[self.slot_size] * self.slot_size
        return bytes(self.view[at : at + self.slot_size])

    def state(self) -> tuple[bytes, list[int]]:
        front, back = self.front, self.back
        return bytes(self.view), [front.req_prod_pvt, front.rsp_cons, back.req_cons, back.rsp_prod_pvt]


def numbered(count: int, slot_size: int, first: int = 1) -> bytes:
    """Slots that differ from each other in all places."""
    return b"".join(bytes([(first + i) % 255 + 1]) * slot_size for i in range(count))


@pytest.mark.parametrize(("slot_size", "start"), CASES)
@pytest.mark.parametrize("whole", [False, True])
def test_copy_in_and_out(slot_size: int, start: int, whole: bool):
    """Goal: slots are where their index says.  Method: write at an index, look at the bytes, read the same back."""
    pair, slots = Pair(slot_size, 0), SIZES[slot_size]
    count = slots if whole else 7
    data = numbered(count, slot_size)
    assert pair.front.copy_in(start, data) == count
    assert [pair.slot(start + i) for i in range(count)] == [data[i * slot_size :][:slot_size] for i in range(count)]
    assert pair.back.copy_out(start, count) == data
    assert pair.front.copy_out(start + 2, count - 2) == data[2 * slot_size :]
    untouched = [pair.slot(start + count + i) for i in range(slots - count)]
    assert untouched == [bytes(slot_size)] * (slots - count)
    assert bytes(pair.view[16:SRING_HEADER_SIZE]) == bytes(48)


@pytest.mark.parametrize("slot_size", SIZES)
def test_nothing_is_nothing(slot_size: int):
    """Goal: an empty batch changes nothing.  Method: all calls with none, at both ends of the ring."""
    for start in (0, 2**32 - 1):
        pair = Pair(slot_size, start)
        before = pair.state()
        assert pair.front.copy_in(start, b"") == 0
        assert pair.front.copy_out(start, 0) == pair.back.copy_requests(0) == pair.front.copy_responses(0) == b""
        pair.front.put_requests(b"")
        pair.back.put_responses(b"")
        pair.back.skip_requests(0)
        pair.front.skip_responses(0)
        assert not pair.front.push_requests() and not pair.back.push_responses()
        assert pair.state() == before


def test_a_copy_is_a_copy():
    """Goal: XSA-155: what was copied does not change with the ring.  Method: copy, scribble, look; also across the end."""
    for index in (0, 250):
        pair = Pair(8, 0)
        pair.front.copy_in(index, numbered(12, 8))
        copied = pair.back.copy_out(index, 12)
        pair.view[SRING_HEADER_SIZE:] = bytes(PAGE_SIZE - SRING_HEADER_SIZE)
        assert copied == numbered(12, 8)


class OneByOne(Pair):
    """The same calls, slot by slot."""

    def put_requests(self, data: bytes) -> None:
        for at in range(0, len(data), self.slot_size):
            offset = self.front.next_request()
            self.view[offset : offset + self.slot_size] = data[at : at + self.slot_size]

    def take_requests(self, count: int) -> bytes:
        offsets = [self.back.next_request() for _ in range(count)]
        return b"".join(bytes(self.view[at : at + self.slot_size]) for at in offsets)

    def put_responses(self, data: bytes) -> None:
        for at in range(0, len(data), self.slot_size):
            offset = self.back.next_response()
            self.view[offset : offset + self.slot_size] = data[at : at + self.slot_size]

    def take_responses(self, count: int) -> bytes:
        offsets = [self.front.next_response() for _ in range(count)]
        return b"".join(bytes(self.view[at : at + self.slot_size]) for at in offsets)


STEPS = st.lists(st.tuples(st.sampled_from(["put", "take", "answer", "reap", "ask"]), st.integers(0, 300)), max_size=30)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(SIZES)), st.sampled_from(STARTS), STEPS)
def test_batches_and_single_slots_agree(slot_size: int, start: int, steps: list[tuple[str, int]]):
    """Goal: the same after every step.  Method: the same steps on two rings; counts are cut to what is possible."""
    many, one = Pair(slot_size, start), OneByOne(slot_size, start)
    for step, number in steps:
        front, back = many.front, many.back
        if step == "put":
            data = numbered(min(number, front.free), slot_size, number)
            front.put_requests(data)
            one.put_requests(data)
            assert front.push_requests() == one.front.push_requests()
        elif step == "take":
            count = min(number, back.requests())
            taken = back.copy_requests(count)
            back.skip_requests(count)
            assert taken == one.take_requests(count)
        elif step == "answer":
            data = numbered(min(number, (back.req_cons - back.rsp_prod_pvt) % 2**32), slot_size, number + 7)
            back.put_responses(data)
            one.put_responses(data)
            assert back.push_responses() == one.back.push_responses()
        elif step == "reap":
            count = min(number, front.responses())
            taken = front.copy_responses(count)
            front.skip_responses(count)
            assert taken == one.take_responses(count)
        elif step == "ask":
            assert front.ask_for_responses(number) == one.front.ask_for_responses(number)
            assert back.ask_for_requests(number) == one.back.ask_for_requests(number)
        assert many.state() == one.state()


@pytest.mark.parametrize("start", STARTS)
def test_copying_takes_nothing(start: int):
    """Goal: copy_* may be repeated; skip_* takes.  Method: copy twice, skip a part, copy the rest."""
    pair = Pair(12, start)
    data = numbered(9, 12)
    pair.front.put_requests(data)
    assert pair.back.requests() == 0, "not published yet"
    pair.front.push_requests()
    assert pair.back.copy_requests(9) == pair.back.copy_requests(9) == data
    pair.back.skip_requests(4)
    assert (pair.back.requests(), pair.back.copy_requests(5)) == (5, data[48:])
    pair.back.put_responses(data[:48])
    pair.back.push_responses()
    assert pair.front.copy_responses(4) == pair.front.copy_responses(4) == data[:48]
    pair.front.skip_responses(3)
    assert (pair.front.responses(), pair.front.copy_responses(1), pair.front.free) == (1, data[36:48], 250)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("count", [1, 2, 19, 128, 256])
def test_asked_for_many_told_once(start: int, count: int):
    """Goal: ask_for_*(n) is told at the n-th and at no other.  Method: publish one by one, and note who is told."""
    pair = Pair(8, start)
    assert pair.back.ask_for_requests(count) == 0
    told = []
    for _ in range(256):
        pair.front.put_requests(bytes(8))
        told.append(pair.front.push_requests())
    assert told == [i + 1 == count for i in range(256)]
    pair.back.skip_requests(256)
    assert pair.front.ask_for_responses(count) == 0
    told = []
    for _ in range(256):
        pair.back.put_responses(bytes(8))
        told.append(pair.back.push_responses())
    assert told == [i + 1 == count for i in range(256)]


@pytest.mark.parametrize("start", STARTS)
def test_one_push_passes_what_was_asked_for(start: int):
    """Goal: a batch that steps over the event index tells.  Method: asked for 5; pushes of 4, 3, 3."""
    pair = Pair(8, start)
    pair.back.ask_for_requests(5)
    told = []
    for count in (4, 3, 3):
        pair.front.put_requests(bytes(8 * count))
        told.append(pair.front.push_requests())
    assert told == [False, True, False]


def test_asking_looks_again():
    """Goal: what came before the question counts.  Method: publish, then ask for more, as many, and fewer."""
    pair = Pair(8, 2**32 - 2)
    pair.front.put_requests(bytes(24))
    pair.front.push_requests()
    assert [pair.back.ask_for_requests(count) for count in (4, 3, 1)] == [3, 3, 3]
    assert pair.front.words[REQ_EVENT] == 2**32 - 1
    pair.back.skip_requests(3)
    pair.back.put_responses(bytes(16))
    pair.back.push_responses()
    assert [pair.front.ask_for_responses(count) for count in (4, 2)] == [2, 2]
    assert pair.front.words[RSP_EVENT] == 0


def test_asking_believes_no_index():
    """Goal: the other end's producer is checked there, too.  Method: one more than can be, then ask."""
    pair = Pair(8, 2**32 - 2)
    pair.front.words[REQ_PROD] = (2**32 - 2 + 257) % 2**32
    with pytest.raises(PeerFault, match="257 ahead"):
        pair.back.ask_for_requests(1)
    pair.front.words[RSP_PROD] = 2**32 - 1
    with pytest.raises(PeerFault, match="1 ahead"):
        pair.front.ask_for_responses(3)
