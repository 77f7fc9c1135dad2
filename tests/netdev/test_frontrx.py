"""Goal: what the backend puts into the guest's pages reaches the guest's interface, whole and with what it lacks said; what
it lies about ends the device, and the pages are always posted again.
Method: a real FrontRx on real domains; the backend is played by hand, page by page and response by response.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from netdev.frontrx import FrontRx
from netdev.vnet import F_DATA_VALID, VNET
from tests.netdev.halves import PLAIN, STARTS, RxFront, finished, needs_csum, needs_gso, numbered, unfinished
from tests.netdev.test_headers import UDP, Frame
from xenmodel.public.io.netif import EXTRA, EXTRA_GSO, EXTRA_HASH, RX_RESPONSE
from xenmodel.types import PAGE_SIZE, OutOfResources, PeerFault

VALID, BLANK, MORE, EXTRAS = 1, 2, 4, 8
SIZES = [14, 60, 1514, 4095, 4096, 4097, 8192, 9014, 65535, 65536, 18 * PAGE_SIZE]
HASH = EXTRA_HASH.pack(4, 0, 0, 1, b"\1\2\3\4")


@pytest.fixture
def make() -> Iterator[Any]:
    fronts: list[RxFront] = []

    def make(**options: Any) -> RxFront:
        fronts.append(RxFront(**options))
        return fronts[-1]

    yield make
    for front in fronts:
        front.close()


def gso(size: int = 1448, kind: int = 1, more: int = 0) -> bytes:
    return EXTRA_GSO.pack(1, more, size, kind, 0)


def test_all_pages_are_posted(make: Any):
    """Goal: one request in each slot, with the id of the slot and a page of its own.  Method: take them all."""
    front = make()
    assert [ident for ident, _ in front.requests] == list(range(256))
    assert len({gref for _, gref in front.requests}) == 256


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("extras", [0, 1])
def test_frames_of_any_size(make: Any, size: int, start: int, extras: int):
    """Goal: any frame, anywhere on the ring, also around its end.  Method: as many as fill the ring twice and a half."""
    front = make(start=start)
    count = 600 // (-(-size // PAGE_SIZE) + extras) + 1
    for number in range(count if size > 60000 else 40):
        frame = numbered(size, number)
        assert front.give(frame, extras=[HASH] * extras) == [(PLAIN, frame)]
        assert len(front.requests) == 256, "all its pages are posted again, and that of the extra slot"
    stats = front.rx.statistics
    assert (stats.bytes, stats.drops) == (stats.packets * size, {})


@pytest.mark.parametrize("chunk", [15, 100, 4095])
def test_frames_that_do_not_fill_their_pages(make: Any, chunk: int):
    front = make()
    for size in (20, 225, chunk * 18):
        frame = numbered(min(size, chunk * 18), size)
        assert front.give(frame, chunk=chunk) == [(PLAIN, frame)]


@pytest.mark.parametrize("start", STARTS)
def test_in_batches_and_in_pieces(make: Any, start: int):
    """Goal: whatever the backend publishes at once: half a packet waits for its end, and nothing else waits for it.
    Method: 500 frames as one stream of responses, published in random pieces, with and without being asked."""
    front, random = make(start=start), Random(3)
    frames = [numbered(random.choice([60, 1514, 4097, 9000, 65535]), i) for i in range(500)]
    stream, got, at = b"", [], 0
    while at < len(frames) or stream:
        while at < len(frames) and len(front.requests) > 20 and random.random() < 0.8:
            stream += front.write(frames[at], extras=[HASH] if at % 3 == 0 else [])
            at += 1
        cut = min(random.randrange(1, 40) * 8, len(stream))
        front.respond(stream[:cut])
        stream = stream[cut:]
        front.collect()
        got += [frame for _, frame in front.lane.take()]
    assert got == frames
    assert len(front.requests) == 256


def test_one_event_is_enough(make: Any):
    """Goal: no response is left lying.  Method: more are published while the first are taken, without an event."""
    front = make()
    first, second = front.write(numbered(60, 1)), front.write(numbered(60, 2))
    write = front.lane.write

    def answer_and_write(buffers: Any) -> bool:
        if front.ring.rsp_prod_pvt % 256 == 1:
            front.respond(second, tell=False)
        return write(buffers)

    front.lane.write = answer_and_write
    front.respond(first)
    assert [frame for _, frame in front.lane.take()] == [numbered(60, 1), numbered(60, 2)]


def test_a_backend_that_never_ends_has_its_turn(make: Any):
    """Goal: one event handler does not run for ever.  Method: every write makes another response, also to requests that
    were not published; the handler ends after a bounded number and asks for another turn."""
    front, turns = make(), []
    write = front.lane.write

    def answer() -> None:
        front.ring.put_responses(RX_RESPONSE.pack(front.ring.rsp_prod_pvt & 0xFF, 0, 0, 60))
        front.ring.push_responses()

    def endless(buffers: Any) -> bool:
        turns.append(len(turns))
        if len(turns) < 5000:
            answer()
        return write(buffers)

    front.lane.write = endless
    answer()
    front.rx.on_event()
    assert 256 <= len(turns) < 2000
    front.settle()
    assert len(turns) == 5000


# --- what the frame lacks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", [Frame(4), Frame(6), Frame(4, UDP, b"x"), Frame(6, UDP, bytes(9000), (0x8100,))])
@pytest.mark.parametrize("chunk", [PAGE_SIZE, 20, 600])
def test_a_blank_checksum_is_passed_on(make: Any, frame: Frame, chunk: int):
    """Goal: csum_blank becomes NEEDS_CSUM with the places.  Method: in one page, and headers over several."""
    if len(frame.packed) > 18 * chunk:
        chunk = 1000
    assert make().give(unfinished(frame), flags=BLANK | VALID, chunk=chunk) == [(needs_csum(frame), unfinished(frame))]


def test_valid_and_plain(make: Any):
    front, valid = make(), VNET.pack(F_DATA_VALID, 0, 0, 0, 0, 0)
    large = finished(Frame(payload=bytes(9000)))
    assert front.give(finished(Frame()), large, flags=VALID) == [(valid, finished(Frame())), (valid, large)]
    assert front.give(finished(Frame()), large) == [(PLAIN, finished(Frame())), (PLAIN, large)]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [100, 30000, 60000])
@pytest.mark.parametrize("extras", ["gso", "hash too"])
def test_segmentation_is_passed_on(make: Any, version: int, size: int, extras: str):
    frame = Frame(version, payload=numbered(size))
    slots = [gso(1400, 1 if version == 4 else 2)] if extras == "gso" else [gso(1400, 1 if version == 4 else 2, 1), HASH]
    got = make().give(unfinished(frame), flags=BLANK | VALID, extras=slots)
    assert got == [(needs_gso(frame, 1400), unfinished(frame))]


ARP = numbered(60)
DROPPED = {
    "blank, and no transport": (ARP, BLANK, [], "a checksum is to be finished in no TCP or UDP frame"),
    "blank, large, and no transport": (numbered(9000), BLANK, [], "a checksum is to be finished in no TCP or UDP frame"),
    "GSO of UDP": (Frame(4, UDP, bytes(200)).packed, BLANK, [gso()], "a checksum is to be finished in no TCP or UDP frame"),
    "GSO of the other IP": (Frame(6).packed, BLANK, [gso()], "a checksum is to be finished in no TCP or UDP frame"),
    "a runt": (bytes(13), 0, [], "malformed"),
    "empty": (b"", 0, [], "malformed"),
    "a runt with an extra": (bytes(13), 0, [HASH], "malformed"),
}


@pytest.mark.parametrize("name", DROPPED)
def test_dropped(make: Any, name: str):
    """Goal: it costs itself, is counted by its reason, and its pages are posted again.  Method: between good frames."""
    frame, flags, extras, reason = DROPPED[name]
    front = make()
    assert front.give(numbered(60, 1)) == [(PLAIN, numbered(60, 1))]
    assert front.give(frame, flags=flags, extras=extras) == []
    assert front.give(numbered(60, 2)) == [(PLAIN, numbered(60, 2))]
    assert front.rx.statistics.drops == {reason: 1}
    assert len(front.requests) == 256


def test_errors_of_the_backend(make: Any):
    """Goal: an error is no frame; its page is posted again.  Method: errors alone, and in the middle of a packet."""
    front = make()
    idents = [front.requests.popleft()[0] for _ in range(4)]
    pack = RX_RESPONSE.pack
    front.respond(pack(idents[0], 0, 0, -1) + pack(idents[1], 0, MORE, 60) + pack(idents[2], 0, MORE, -2))
    front.respond(pack(idents[3], 0, 0, 60) + front.write(ARP))
    assert front.lane.take() == [(PLAIN, ARP)]
    assert front.rx.statistics.drops == {"refused by the backend": 2}
    assert front.collect() == 5


@pytest.mark.parametrize("size", [60, 9000])
def test_an_interface_that_refuses(make: Any, size: int):
    front = make()
    front.lane.accepts = False
    assert front.give(numbered(size)) == []
    front.lane.accepts = True
    assert front.give(numbered(size)) == [(PLAIN, numbered(size))]
    assert front.rx.statistics.drops == {"refused by the interface": 1}


# --- lies ----------------------------------------------------------------------------------------------------------------

pack = RX_RESPONSE.pack
LIES = {
    "another id": (pack(1, 0, 0, 60), "in the slot of request 0"),
    "an id beyond all": (pack(256, 0, 0, 60), "in the slot of request 0"),
    "another id in the first of two": (pack(1, 0, MORE, PAGE_SIZE) + pack(1, 0, 0, 60), "in the slot of request 0"),
    "another id in the last of two": (pack(0, 0, MORE, PAGE_SIZE) + pack(2, 0, 0, 60), "in the slot of request 1"),
    "another id in the last of three": (
        pack(0, 0, MORE, PAGE_SIZE) + pack(1, 0, MORE, PAGE_SIZE) + pack(3, 0, 0, 60), "in the slot of request 2",
    ),
    "behind an extra slot, as if there were none": (
        pack(0, 0, MORE | EXTRAS, PAGE_SIZE) + gso() + pack(1, 0, 0, 60), "in the slot of request 2",
    ),
    "beyond its page": (pack(0, 4037, 0, 60), "60 bytes at 4037"),
    "too large": (pack(0, 0, 0, 4097), "4097 bytes at 0"),
    "the last beyond its page": (pack(0, 0, MORE, PAGE_SIZE) + pack(1, 0, 0, 4097), "4097 bytes at 0 leaves its page"),
    "the last far beyond": (pack(0, 0, MORE, PAGE_SIZE) + pack(1, 0, 0, 32767), "32767 bytes at 0 leaves its page"),
    "a packet without end": (pack(0, 0, MORE, 1) * 40, "more than 20 slots"),
    "extras without end": (pack(0, 0, EXTRAS, 60) + gso(more=1) * 9, "more than 4 extra slots"),
    "an extra that is none": (pack(0, 0, EXTRAS, 60) + EXTRA.pack(7, 0, bytes(6)), "extra slot of type 7"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("start", [0, 2**32 - 256])
def test_lies(make: Any, name: str, start: int):
    """Goal: XSA-376 and what else a backend could claim: a PeerFault, and nothing of it reaches the interface."""
    responses, text = LIES[name]
    front = make(start=start)
    with pytest.raises(PeerFault, match=text):
        front.respond(responses)
    assert front.lane.take() == []


@pytest.mark.parametrize("ahead", [257, 2**31, 2**32 - 1])
def test_more_responses_than_requests(make: Any, ahead: int):
    front = make()
    front.ring.words[2] = ahead
    with pytest.raises(PeerFault, match="ahead of rsp_cons"):
        front.nudge()


# --- an untrusted backend, and the end -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wipe", [True, False])
def test_what_was_received_is_gone(make: Any, wipe: bool):
    """Goal: XSA-403: with trusted=0 a page that is posted again is empty.  Method: look at all through their grants."""
    front = make(wipe=wipe)
    for size in (60, 4096, 65535, 9000):
        front.give(b"\xaa" * size)
    left = any(any(front.page(gref)) for _, gref in front.requests)
    assert left != wipe


def test_release(make: Any):
    """Goal: XSA-396: nothing that the backend maps is used again.  Method: with one page mapped, and then without."""
    front = make()
    front.dom0.maptrack.unmap(front.ring_mapping.handle)
    _, mapping = front.dom0.maptrack.map(front.guest.domid, front.requests[0][1])
    free = front.guest.memory.free_pages
    assert not front.rx.release()
    assert front.guest.memory.free_pages == free + 1, "the ring, and no more"
    front.dom0.maptrack.unmap(mapping.handle)
    assert front.rx.pages.release()
    assert front.guest.memory.free_pages == free + 257


def test_too_little_memory(make: Any):
    """Goal: OutOfResources, and nothing kept.  Method: all but some pages of the guest are taken."""
    front = make()
    domain = front.guest
    for left in (0, 1, 200):
        taken = domain.memory.allocate(domain.memory.free_pages - left)
        before, grants = domain.memory.free_pages, sum(1 for _ in domain.grants.entries())
        with pytest.raises(OutOfResources):
            FrontRx(domain, front.dom0.domid, front.lane, False)
        assert (domain.memory.free_pages, sum(1 for _ in domain.grants.entries())) == (before, grants)
        domain.memory.release(taken, domain.memory.pages - taken - left)
