"""Goal: every frame that a guest transmits leaves once, whole, with what it lacks said; every slot is answered in its place;
and a guest that lies hurts only itself.
Method: a real BackTx on real domains, and a frontend played by hand, slot by slot, in pages it grants or does not grant.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from random import Random
from typing import Any

import pytest

from netdev.credit import Credit
from netdev.vnet import F_DATA_VALID, VNET
from tests.netdev.halves import PLAIN, STARTS, TxBack, finished, needs_csum, needs_gso, numbered, unfinished
from tests.netdev.test_headers import UDP, Frame
from xenmodel.public.io.netif import EXTRA, EXTRA_GSO, EXTRA_HASH, TX_REQUEST
from xenmodel.types import PAGE_SIZE, Gref, PeerFault, Pfn

BLANK, VALID, MORE, EXTRAS = 1, 2, 4, 8
OKAY, ERROR, NULL = 0, -1, 1
MAC = b"\x01\x00\x5e\0\0\1"
P = PAGE_SIZE


@pytest.fixture
def make() -> Iterator[Any]:
    backs: list[TxBack] = []

    def make(**options: Any) -> TxBack:
        backs.append(TxBack(**options))
        return backs[-1]

    yield make
    for back in backs:
        back.close()


@pytest.fixture
def back(make: Any) -> TxBack:
    return make()


def slot(gref: int, size: int, flags: int = 0, ident: int = 0, offset: int = 0) -> bytes:
    return TX_REQUEST.pack(gref, offset, flags, ident, size)


def gso(size: int = 1448, kind: int = 1, more: int = 0) -> bytes:
    return EXTRA_GSO.pack(1, more, size, kind, 0)


def slots(
    back: TxBack, frame: bytes, flags: int = 0, extras: tuple[bytes, ...] = (), chunk: int = P, ident: int = 0,
    offset: int = 0,
) -> list[bytes]:  # fmt: skip
    """A frame in fresh pages, `chunk` bytes in each at `offset`; ids count up from `ident`."""
    pieces = [frame[at : at + chunk] for at in range(0, len(frame), chunk)]
    made = []
    for number, piece in enumerate(pieces):
        more = (MORE if number + 1 < len(pieces) else 0) | (0 if number else flags | (EXTRAS if extras else 0))
        gref = back.grant(bytes(offset) + piece)
        made.append(slot(gref, len(piece) if number else len(frame), more, ident + number, offset))
    return [made[0], *extras, *made[1:]]


@pytest.mark.parametrize("size", [14, 60, 1514, 4095, 4096, 4097, 8192, 9014, 65535])
@pytest.mark.parametrize("start", STARTS)
def test_frames_of_any_size(make: Any, size: int, start: int):
    """Goal: whole, and answered for each slot with its id.  Method: alone and in a batch; neighbouring pages and others."""
    back = make(start=start)
    count = -(-size // P)
    first = slots(back, numbered(size, 1), ident=100)
    assert back.ask(*first) == [(100 + i, OKAY) for i in range(count)]
    back.grant()  # a gap between the pages
    two = [*slots(back, numbered(size, 2), ident=200), *slots(back, numbered(size, 3), ident=300)]
    assert back.ask(*two) == [(base + i, OKAY) for base in (200, 300) for i in range(count)]
    assert back.lane.take() == [(PLAIN, numbered(size, seed)) for seed in (1, 2, 3)]
    statistics = back.tx.statistics
    assert (statistics.packets, statistics.bytes, statistics.drops) == (3, 3 * size, {})


@pytest.mark.parametrize("start", STARTS)
def test_many_rounds(make: Any, start: int):
    """Goal: nothing lost, doubled or out of order.  Method: 400 frames of all kinds in random batches around the ring."""
    back, random = make(start=start), Random(5)
    frames, ident = [], 0
    for _ in range(60):
        batch: list[bytes] = []
        answers = []
        while len(batch) < random.randrange(1, 200):
            size = random.choice([60, 60, 60, 1514, 4096, 9000])
            extras = (EXTRA_HASH.pack(4, 0, 0, 1, bytes(4)),) if random.random() < 0.2 else ()
            chunk = random.choice([P, P, 700])
            frame = numbered(size, ident)
            offset = random.randrange(P - chunk + 1)
            made = slots(back, frame, 0, extras, chunk, ident & 0x7FFF, offset)
            count = len(made) - len(extras)
            answers += [(ident & 0x7FFF, OKAY), *[(0, NULL)] * len(extras)]
            answers += [((ident & 0x7FFF) + i, OKAY) for i in range(1, count)]
            frames.append(frame)
            batch += made
            ident += count
        assert back.ask(*batch) == answers
        for gref in {TX_REQUEST.unpack(part)[0] for part in batch if len(part) == 12}:
            pfn = next(e.pfn for e in back.guest.grants.entries() if e.ref == gref)
            assert back.guest.grants.end_access(Gref(gref)), "nothing stays mapped"
            back.guest.memory.release(Pfn(pfn))
    assert [frame for _, frame in back.lane.take()] == frames


def test_pages_that_are_no_neighbours(back: TxBack):
    """Goal: a large frame is gathered from wherever its pages are.  Method: whole pages, in every order of three."""
    grefs = [back.grant() for _ in range(3)]
    pages = {e.ref: back.guest.memory.run(Pfn(e.pfn)) for e in back.guest.grants.entries() if e.ref in grefs}
    frame = numbered(3 * P)
    for order in permutations(grefs):
        for i, gref in enumerate(order):
            pages[gref][:] = frame[i * P : (i + 1) * P]
        back.ask(slot(order[0], 3 * P, MORE), slot(order[1], P, MORE), slot(order[2], P))
        assert back.lane.take() == [(PLAIN, frame)]


def test_pages_are_read_only_grants(back: TxBack):
    """Goal: a frontend grants its frames for reading (netfront does).  Method: a read-only grant and a writable one."""
    for readonly in (True, False):
        gref = back.grant(numbered(60), readonly)
        assert back.ask(slot(gref, 60)) == [(0, OKAY)]
    assert len(back.lane.take()) == 2


# --- what the frame lacks ------------------------------------------------------------------------------------------------

KINDS = [Frame(4), Frame(6), Frame(4, UDP, b"x"), Frame(6, UDP, bytes(9000), (0x8100,)), Frame(4, payload=bytes(60000))]


@pytest.mark.parametrize("frame", KINDS)
@pytest.mark.parametrize("chunk", [P, 600, 20])
def test_a_blank_checksum_is_passed_on(back: TxBack, frame: Frame, chunk: int):
    """Goal: XSA-423: the headers count wherever they are.  Method: in one page, and scattered over several slots."""
    if len(frame.packed) > 18 * chunk:
        chunk = P
    back.ask(*slots(back, unfinished(frame), BLANK | VALID, chunk=chunk))
    assert back.lane.take() == [(needs_csum(frame), unfinished(frame))]


@pytest.mark.parametrize("gso_too", [False, True])
def test_headers_over_seventeen_slots_of_one_byte(back: TxBack, gso_too: bool):
    """Goal: XSA-423.  Method: a frame whose first 17 slots hold one byte each, and the last the rest."""
    frame = Frame(4, payload=bytes(2000))
    data = unfinished(frame)
    first, *rest = slots(back, data[:17], BLANK | VALID | (EXTRAS if gso_too else 0), chunk=1)
    gref, offset, flags, ident, _ = TX_REQUEST.unpack(first)
    more = [TX_REQUEST.pack(*TX_REQUEST.unpack(part)[:2], MORE, *TX_REQUEST.unpack(part)[3:]) for part in rest]
    last = slot(back.grant(data[17:]), len(data) - 17, ident=17)
    extra = [gso()] if gso_too else []
    answers = back.ask(slot(gref, len(data), flags | MORE, ident, offset), *extra, *more, last)
    assert answers == [(0, OKAY), *[(0, NULL)] * len(extra), *[(i, OKAY) for i in range(1, 18)]]
    assert back.lane.take() == [((needs_gso if gso_too else needs_csum)(frame), data)]


@pytest.mark.parametrize("frame", [Frame(4), Frame(6, payload=bytes(9000))])
def test_valid_and_plain(back: TxBack, frame: Frame):
    back.ask(*slots(back, finished(frame), VALID))
    back.ask(*slots(back, finished(frame)))
    valid = VNET.pack(F_DATA_VALID, 0, 0, 0, 0, 0)
    assert back.lane.take() == [(valid, finished(frame)), (PLAIN, finished(frame))]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [100, 5000, 60000])
@pytest.mark.parametrize("chunk", [P, 3500])
def test_segmentation_is_passed_on(back: TxBack, version: int, size: int, chunk: int):
    """Goal: an extra slot says so, and is answered NULL.  Method: in whole pages, and not."""
    frame = Frame(version, payload=numbered(size))
    chunk = max(chunk, -(-len(frame.packed) // 18))
    made = slots(back, unfinished(frame), BLANK | VALID, (gso(1400, 1 if version == 4 else 2),), chunk, 7)
    answers = back.ask(*made)
    assert answers == [(7, OKAY), (0, NULL), *[(7 + i, OKAY) for i in range(1, len(made) - 1)]]
    assert back.lane.take() == [(needs_gso(frame, 1400), unfinished(frame))]
    assert back.tx.statistics.fixups == 0


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("chunk", [P, 500])
@pytest.mark.parametrize("flags", [0, VALID])
def test_a_finished_checksum_is_undone_for_segmentation(back: TxBack, version: int, chunk: int, flags: int):
    """Goal: Linux's tx_gso_checksum_fixup: GSO without csum_blank.  Method: the checksum of the whole, as some frontends
    leave it; what leaves has the pseudo-header's sum, and the guest's page is as it was."""
    frame = Frame(version, payload=numbered(5000))
    made = slots(back, finished(frame), flags, (gso(kind=1 if version == 4 else 2),), chunk)
    back.ask(*made)
    assert back.lane.take() == [(needs_gso(frame), unfinished(frame))]
    assert back.tx.statistics.fixups == 1
    assert back.page(TX_REQUEST.unpack(made[0])[0])[: min(chunk, P)] == finished(frame)[:chunk]


NO_TRANSPORT = "a checksum is to be finished in no TCP or UDP frame"
REFUSED: dict[str, tuple[bytes, int, tuple[bytes, ...], str]] = {
    "a runt": (bytes(13), 0, (), "malformed"),
    "a runt in two slots": (bytes(13), 0, (), "malformed"),
    "blank, and no transport": (numbered(60), BLANK, (), NO_TRANSPORT),
    "blank, large, and no transport": (numbered(9000), BLANK, (), NO_TRANSPORT),
    "blank, and cut short": (Frame().packed[:53], BLANK, (), NO_TRANSPORT),
    "GSO of UDP": (Frame(4, UDP, bytes(90)).packed, BLANK, (gso(),), NO_TRANSPORT),
    "GSO of the other IP": (Frame(6).packed, BLANK, (gso(),), NO_TRANSPORT),
    "GSO of no IP": (numbered(9000), 0, (gso(),), NO_TRANSPORT),
    "GSO of half a header": (Frame(tcp_options=bytes(40)).packed[:60], BLANK, (gso(),), NO_TRANSPORT),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(back: TxBack, name: str):
    """Goal: an error for each of its slots, counted by its reason.  Method: in one batch with good frames around it."""
    frame, flags, extras, reason = REFUSED[name]
    made = slots(back, frame, flags, extras, 7 if "two slots" in name else P, 10)
    good = slots(back, numbered(60, 1), ident=1), slots(back, numbered(60, 2), ident=2)
    answers = back.ask(*good[0], *made, *good[1])
    count = len(made) - len(extras)
    bad = [(10, ERROR), *[(0, NULL)] * len(extras), *[(10 + i, ERROR) for i in range(1, count)]]
    assert answers == [(1, OKAY), *bad, (2, OKAY)]
    assert back.lane.take() == [(PLAIN, numbered(60, 1)), (PLAIN, numbered(60, 2))]
    assert back.tx.statistics.drops == {reason: 1}


@pytest.mark.parametrize("count", [19, 20])
def test_too_many_slots(back: TxBack, count: int):
    """Goal: answered, all of them, and the next packet is found.  Method: 19 and 20 slots; 21 are an attack, below."""
    made = slots(back, numbered(100 * count), chunk=100)
    answers = back.ask(*made, *slots(back, numbered(60), ident=99))
    assert answers == [*[(i, ERROR) for i in range(count)], (99, OKAY)]
    assert back.tx.statistics.drops == {"malformed": 1}


# --- grants --------------------------------------------------------------------------------------------------------------


def bad_grants(back: TxBack) -> dict[str, int]:
    ended, away = back.grant(), back.grant()
    back.guest.grants.end_access(ended)
    back.guest.grants.set_entry(away, back.dom0.domid, Pfn(back.guest.memory.pages))
    other = back.guest.grants.grant_access(back.guest.domid, Pfn(5))
    return {"never granted": 400, "none": 2**32 - 1, "ended": ended, "beyond memory": away, "to another": other}


@pytest.mark.parametrize("name", ["never granted", "none", "ended", "beyond memory", "to another"])
@pytest.mark.parametrize("size", [60, 9000])
@pytest.mark.parametrize("company", ["alone", "among plain ones", "among large ones"])
def test_not_granted(back: TxBack, name: str, size: int, company: str):
    """Goal: an error, and nothing of the guest's memory is sent.  Method: one bad reference in the last slot."""
    bad = bad_grants(back)[name]
    made = slots(back, numbered(size), ident=10)
    _, offset, flags, ident, length = TX_REQUEST.unpack(made[-1])
    made[-1] = TX_REQUEST.pack(bad, offset, flags, ident, length)
    beside = [] if company == "alone" else slots(back, numbered(60 if "plain" in company else 9000), ident=50)
    good = [(50 + i, OKAY) for i in range(len(beside))]
    assert back.ask(*beside, *made, *beside) == [*good, *[(10 + i, ERROR) for i in range(len(made))], *good]
    assert len(back.lane.take()) == (2 if beside else 0)
    assert back.tx.statistics.drops == {"not granted": 1}


def test_an_empty_fragment_needs_no_grant(back: TxBack):
    """Goal: XSA-448.  Method: empty slots, without a grant, in the middle and at the end; also before all the bytes."""
    gref = back.grant(numbered(60))
    assert back.ask(slot(gref, 60, MORE), slot(9999, 0, MORE), slot(9999, 0)) == [(0, OKAY)] * 3
    assert back.ask(slot(9999, 60, MORE), slot(gref, 60)) == [(0, OKAY)] * 2
    assert back.lane.take() == [(PLAIN, numbered(60))] * 2


def test_an_interface_that_refuses(back: TxBack):
    """Goal: from the interface on it is the host's affair: OKAY, and counted.  Method: one page, and several."""
    back.lane.accepts = False
    assert [status for _, status in back.ask(*slots(back, numbered(60)), *slots(back, numbered(9000)))] == [OKAY] * 4
    assert back.tx.statistics.drops == {"refused by the interface": 2}
    assert back.tx.statistics.packets == 0


# --- attacks, multicast, the rate, and turns -----------------------------------------------------------------------------

ATTACKS = {
    "beyond its page": ([slot(8, 60, 0, 0, P - 59)], "leaves its page"),
    "beyond, among large ones": ([slot(8, 60, MORE), slot(8, 30), slot(8, 60, 0, 0, P - 59)], "leaves its page"),
    "too large for its page": ([slot(8, 4097)], "leaves its page"),
    "a fragment beyond its page": ([slot(8, 60, MORE), slot(8, 2, 0, 0, P - 1)], "leaves its page"),
    "21 slots": ([slot(8, 100, MORE)] + [slot(8, 1, MORE)] * 19 + [slot(8, 1)], "more than 20 slots"),
    "more, and nothing": ([slot(8, 60, MORE)], "no slot follows"),
    "an extra, and nothing": ([slot(8, 60, EXTRAS)], "no slot follows"),
    "an extra that is none": ([slot(8, 60, EXTRAS), EXTRA.pack(5, 0, MAC)], "extra slot of type 5"),
    "GSO of 0 bytes": ([slot(8, 60, EXTRAS), gso(0)], "segments of 0 bytes"),
    "GSO of type 3": ([slot(8, 60, EXTRAS), gso(1, 3)], "GSO of type 3"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(back: TxBack, name: str):
    """Goal: XSA-39: what no driver does is a PeerFault.  Method: behind a frame that is good."""
    made, text = ATTACKS[name]
    with pytest.raises(PeerFault, match=text):
        back.ask(*slots(back, numbered(60)), *made)


def test_more_requests_than_slots(back: TxBack):
    back.ring.words[0] = 257
    with pytest.raises(PeerFault, match="the ring has 256 slots"):
        back.guest.events.send(back.port)
        back.settle()


def test_multicast_requests(back: TxBack):
    """Goal: a request in an empty frame is answered, and is no frame.  Method: one the backend likes, one it does not."""
    add = EXTRA.pack(2, 0, MAC)
    assert back.ask(slot(0, 0, EXTRAS, 5), add) == [(5, OKAY), (0, NULL)]
    assert back.ask(slot(0, 0, EXTRAS, 6), EXTRA.pack(3, 1, MAC), add) == [(6, ERROR), (0, NULL), (0, NULL)]
    assert back.stub.requested == [[(2, MAC)], [(3, MAC), (2, MAC)]]
    assert back.lane.take() == [] and back.tx.statistics.drops == {}


def test_the_rate(back: TxBack):
    """Goal: what the limit stops waits on the ring, in order, and goes on at the time it says.  Method: two frames' worth of
    credit a second; large and small frames, the clock in our hand."""
    back.stub.credit = Credit(131072, 1_000_000, back.now)
    made = [slots(back, numbered(65535 if i % 2 else 60000, i), ident=20 * i) for i in range(4)]
    assert len(back.ask(*[part for frame in made for part in frame])) == len(made[0] + made[1])
    assert back.stub.calls == ["deadline"] and back.tx.resume_at == 1001.0
    assert back.ask() == [] and back.tx.resume_at == 1001.0
    back.tx.resume(1000.9)
    back.settle()
    assert len(back.lane.written) == 2
    back.now = 1001.0
    back.tx.resume(back.now)
    assert len(back.ask()) == len(made[2] + made[3])
    assert back.lane.take() == [(PLAIN, numbered(65535 if i % 2 else 60000, i)) for i in range(4)]
    back.ask(*slots(back, numbered(60000)))
    assert back.tx.resume_at == 1002.0
    back.stub.credit = None
    back.tx.limit_changed()
    assert len(back.ask()) == 15 and back.tx.resume_at is None


def test_a_guest_that_never_ends_has_its_turn(back: TxBack):
    """Goal: one event handler does not run for ever.  Method: each write makes another request; the handler ends after a
    bounded number, and asks for another turn."""
    request, count, write = slot(back.grant(numbered(60)), 60), [0], back.lane.write

    def endless(buffers: Any) -> bool:
        count[0] += 1
        if count[0] < 5000:
            back.ring.skip_responses(back.ring.responses())
            back.ring.put_requests(request)
            back.ring.push_requests()
        return write(buffers)

    back.lane.write = endless
    back.ring.put_requests(request)
    back.ring.push_requests()
    back.tx.on_event()
    assert 256 <= count[0] < 2000
    back.settle()
    assert count[0] == 5000


def test_stopped(back: TxBack):
    back.tx.stopped = True
    assert back.ask(*slots(back, numbered(60))) == [] and back.lane.take() == []
