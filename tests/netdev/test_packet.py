"""Goal: slots become the packets that netif.h says they are, and packets the slots; nonsense is told from what is too large.
Method: one named packet per case; then arbitrary slots from hypothesis against a reader written here from the text of
netif.h, slot by slot and with no fast path; what build_* makes is read by parse_* again.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netdev.packet import Gso, RxPacket, TxPacket, build_rx, build_tx, gso_extra, parse_rx, parse_tx, tx_template
from xenmodel.public.io.netif import EXTRA, EXTRA_GSO, EXTRA_HASH, RX_RESPONSE, TX_REQUEST
from xenmodel.types import PAGE_SIZE, PeerFault

BLANK, VALID, MORE, EXTRAS = 1, 2, 4, 8  # of the tx ring; the rx ring has the first two the other way round
MAC = b"\x01\x00\x5e\0\0\1"
P = PAGE_SIZE


def tx(size: int, flags: int = 0, offset: int = 0, ident: int = 7) -> bytes:
    return TX_REQUEST.pack(99, offset, flags, ident, size)


def rx(status: int, flags: int = 0, offset: int = 0, ident: int = 7) -> bytes:
    return RX_RESPONSE.pack(ident, offset, flags, status)


def gso(size: int = 1448, kind: int = 1, more: int = 0) -> bytes:
    return EXTRA_GSO.pack(1, more, size, kind, 0)


def mcast(kind: int = 2, more: int = 0) -> bytes:
    return EXTRA.pack(kind, more, MAC)


HASH = EXTRA_HASH.pack(4, 0, 0, 1, b"\1\2\3\4")


def tx_packet(slots: tuple[bytes, ...], at: int = 0) -> TxPacket:
    data = b"".join(slot.ljust(12, b"\xee") for slot in slots)
    return parse_tx(list(TX_REQUEST.iter_unpack(data)), data, at)


def rx_packet(slots: tuple[bytes, ...], at: int = 0) -> RxPacket | None:
    data = b"".join(slot.ljust(8, b"\xee") for slot in slots)
    return parse_rx(list(RX_RESPONSE.iter_unpack(data)), data, at)


def scattered(count: int, each: int = 1) -> tuple[bytes, ...]:
    """A tx packet of 100 bytes whose `count` slots but the first hold `each` bytes."""
    return tx(100, MORE, 50), *[tx(each, MORE, i) for i in range(count - 2)], tx(each, 0, 9)


# slots, and what the packet is: slots, extras, size, fragments (slot, offset, size); then by name
GOOD: dict[str, tuple[tuple[bytes, ...], int, int, int, list[tuple[int, int, int]], dict[str, Any]]] = {
    "one slot": ((tx(60, 0, 100),), 1, 0, 60, [(0, 100, 60)], {}),
    "to the end of its page": ((tx(60, 0, P - 60),), 1, 0, 60, [(0, P - 60, 60)], {}),
    "a whole page": ((tx(P),), 1, 0, P, [(0, 0, P)], {}),
    "flags": ((tx(60, BLANK | VALID),), 1, 0, 60, [(0, 0, 60)], {"flags": 3}),
    "two slots": ((tx(P + 1, MORE), tx(1)), 2, 0, P + 1, [(0, 0, P), (1, 0, 1)], {"whole": True}),
    "two that do not fill their pages": ((tx(100, MORE, 5), tx(40, 0, 9)), 2, 0, 100, [(0, 5, 60), (1, 9, 40)], {}),
    "the largest": (
        (tx(65535, MORE), *[tx(P, MORE)] * 14, tx(P - 1)), 16, 0, 65535,
        [*((i, 0, P) for i in range(15)), (15, 0, P - 1)], {"whole": True},
    ),
    "flags on its last slot": ((tx(P + 1, MORE), tx(1, 0x10)), 2, 0, P + 1, [(0, 0, P), (1, 0, 1)], {"whole": False}),
    "more than its size says follows": ((tx(100, MORE, 5), tx(40), tx(60)), 2, 0, 100, [(0, 5, 60), (1, 0, 40)], {}),
    "an extra": ((tx(60, EXTRAS), gso()), 2, 1, 60, [(0, 0, 60)], {"gso": Gso(1, 1448)}),
    "an extra and more": (
        (tx(2 * P, EXTRAS | MORE), gso(kind=2), tx(P)), 3, 1, 2 * P, [(0, 0, P), (2, 0, P)],
        {"gso": Gso(2, 1448), "whole": True},
    ),
    "two GSO extras": ((tx(60, EXTRAS), gso(9, 1, 1), gso(12, 2)), 3, 2, 60, [(0, 0, 60)], {"gso": Gso(2, 12)}),
    "a multicast request": ((tx(0, EXTRAS), mcast()), 2, 1, 0, [(0, 0, 0)], {"multicast": [(2, MAC)]}),
    "two of them": ((tx(0, EXTRAS), mcast(3, 1), mcast()), 3, 2, 0, [(0, 0, 0)], {"multicast": [(3, MAC), (2, MAC)]}),
    "a hash": ((tx(60, EXTRAS), HASH), 2, 1, 60, [(0, 0, 60)], {}),
    "four extras": ((tx(60, EXTRAS), *[gso(more=1)] * 3, HASH), 5, 4, 60, [(0, 0, 60)], {"gso": Gso(1, 1448)}),
    "an empty fragment": ((tx(60, MORE), tx(0, MORE), tx(20)), 3, 0, 60, [(0, 0, 40), (1, 0, 0), (2, 0, 20)], {}),
    "an empty fragment at the end of a page": ((tx(60, MORE), tx(0, 0, P)), 2, 0, 60, [(0, 0, 60), (1, P, 0)], {}),
    "an empty first fragment": ((tx(60, MORE), tx(60)), 2, 0, 60, [(0, 0, 0), (1, 0, 60)], {}),
    "a first slot smaller than the others": ((tx(P, MORE), tx(P - 1)), 2, 0, P, [(0, 0, 1), (1, 0, P - 1)], {}),
    "a header over seventeen slots": (
        scattered(18), 18, 0, 100, [(0, 50, 83), *((i + 1, i, 1) for i in range(16)), (17, 9, 1)], {},
    ),
}  # fmt: skip
PROBLEMS = {
    "empty": ((tx(0),), 1, "0 bytes are less than an Ethernet header"),
    "a runt": ((tx(13),), 1, "13 bytes are less"),
    "a runt in two slots": ((tx(13, MORE), tx(6)), 2, "13 bytes are less"),
    "19 slots": (scattered(19), 19, "19 slots; 18 are allowed"),
    "20 slots": (scattered(20), 20, "20 slots; 18 are allowed"),
    "a fragment larger than the packet": ((tx(60, MORE), tx(61)), 2, "larger than the packet of 60"),
    "fragments larger than the packet": ((tx(60, MORE), tx(40, MORE), tx(40)), 3, "larger than the packet of 60"),
    "64 KiB and more, modulo 2**16": ((tx(4, MORE), *[tx(P, MORE)] * 15, tx(P)), 17, "larger than the packet of 4"),
}
FAULTS = {
    "21 slots": (scattered(21), "more than 20 slots"),
    "300 slots": (scattered(300), "more than 20 slots"),
    "more, and nothing": ((tx(60, MORE),), "no slot follows"),
    "more of many, and nothing": ((tx(65535, MORE), *[tx(P, MORE)] * 3), "no slot follows"),
    "an extra, and nothing": ((tx(60, EXTRAS),), "an extra slot is announced"),
    "another extra, and nothing": ((tx(60, EXTRAS), gso(more=1)), "an extra slot is announced"),
    "an extra, and more, and nothing": ((tx(60, EXTRAS | MORE), gso()), "no slot follows"),
    "five extras": ((tx(60, EXTRAS), *[gso(more=1)] * 4, gso()), "more than 4 extra slots"),
    "extras without end": ((tx(60, EXTRAS), *[gso(more=1)] * 255), "more than 4 extra slots"),
    "extra 0": ((tx(60, EXTRAS), EXTRA.pack(0, 0, MAC)), "extra slot of type 0"),
    "extra 5": ((tx(60, EXTRAS), EXTRA.pack(5, 0, MAC)), "extra slot of type 5"),
    "extra 255": ((tx(60, EXTRAS), gso(more=1), EXTRA.pack(255, 0, MAC)), "extra slot of type 255"),
    "GSO of 0 bytes": ((tx(60, EXTRAS), gso(0)), "segments of 0 bytes"),
    "GSO of type 0": ((tx(60, EXTRAS), gso(kind=0)), "GSO of type 0"),
    "GSO of type 3": ((tx(60, EXTRAS), gso(kind=3)), "GSO of type 3"),
    "beyond its page": ((tx(60, 0, P - 59),), "60 bytes at 4037, leaves its page"),
    "too large for one page": ((tx(P + 1),), "leaves its page"),
    "far beyond its page": ((tx(65535, 0, 65535),), "leaves its page"),
    "a fragment beyond its page": ((tx(P + 60, MORE), tx(60, 0, P - 59)), "60 bytes at 4037 leaves its page"),
    "what remains for the first slot leaves its page": ((tx(P + 60, MORE, 1), tx(60)), "leaves its page"),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("before", [0, 3])
def test_tx(name: str, before: int):
    """Each packet, at the start of the slots and behind others, and with others behind it."""
    slots, count, extras, size, fragments, more = GOOD[name]
    padding = (tx(1, MORE),) * before
    packet = tx_packet((*padding, *slots, tx(1234)), before)
    assert (packet.slots, packet.extras, packet.size, packet.problem) == (count, extras, size, "")
    assert packet.fragments == [(at + before, offset, length) for at, offset, length in fragments]
    assert packet.flags == TX_REQUEST.unpack(slots[0])[2]
    assert (packet.gso, packet.multicast) == (more.get("gso"), more.get("multicast", []))
    assert packet.whole == more.get("whole", False)


@pytest.mark.parametrize("name", PROBLEMS)
def test_tx_that_cannot_be_sent(name: str):
    """Goal: it is answered, so how many slots it has must be right."""
    slots, count, problem = PROBLEMS[name]
    packet = tx_packet((*slots, tx(60)))
    assert packet.slots == count and problem in packet.problem and not packet.whole


@pytest.mark.parametrize("name", FAULTS)
def test_tx_that_no_driver_sends(name: str):
    slots, text = FAULTS[name]
    with pytest.raises(PeerFault, match=text):
        tx_packet(slots)


# --- receive -------------------------------------------------------------------------------------------------------------


RX_GOOD: dict[str, tuple[tuple[bytes, ...], RxPacket]] = {
    "one slot": ((rx(60, 3, 100),), RxPacket(1, 0, 60, 3, [(0, 100, 60)], None, "")),
    "two slots": ((rx(P, MORE), rx(1)), RxPacket(2, 0, P + 1, MORE, [(0, 0, P), (1, 0, 1)], None, "", True)),
    "with an offset": ((rx(P - 9, MORE, 9), rx(1, 0, 7)), RxPacket(2, 0, P - 8, MORE, [(0, 9, P - 9), (1, 7, 1)], None, "")),
    "an extra": ((rx(60, EXTRAS), gso()), RxPacket(2, 1, 60, EXTRAS, [(0, 0, 60)], Gso(1, 1448), "")),
    "an extra and more": (
        (rx(P, EXTRAS | MORE), gso(kind=2), rx(P)),
        RxPacket(3, 1, 2 * P, EXTRAS | MORE, [(0, 0, P), (2, 0, P)], Gso(2, 1448), "", True),
    ),
    "GSO and hash": ((rx(60, EXTRAS), gso(more=1), HASH), RxPacket(3, 2, 60, EXTRAS, [(0, 0, 60)], Gso(1, 1448), "")),
    "an empty fragment": ((rx(60, MORE), rx(0)), RxPacket(2, 0, 60, MORE, [(0, 0, 60), (1, 0, 0)], None, "")),
    "the largest of whole pages": (
        (*[rx(P, MORE)] * 17, rx(P)), RxPacket(18, 0, 18 * P, MORE, [(i, 0, P) for i in range(18)], None, "", True),
    ),
}  # fmt: skip
RX_PROBLEMS = {
    "an error": ((rx(-1),), 1, "the backend answered -1"),
    "dropped": ((rx(-2),), 1, "the backend answered -2"),
    "an error in the middle": ((rx(P, MORE), rx(-1, MORE), rx(5)), 3, "the backend answered -1"),
    "an error at the end": ((rx(P, MORE), rx(-1)), 2, "the backend answered -1"),
    "empty": ((rx(0),), 1, "0 bytes are less"),
    "a runt": ((rx(6, MORE), rx(7)), 2, "13 bytes are less"),
}
RX_FAULTS = {
    "beyond its page": ((rx(60, 0, P - 59),), "leaves its page"),
    "as large as can be said": ((rx(32767),), "32767 bytes at 0 leaves its page"),
    "a last fragment beyond its page": ((rx(P, MORE), rx(P + 1)), "4097 bytes at 0 leaves its page"),
    "a large last fragment": ((rx(P, MORE), rx(P, MORE), rx(32767)), "32767 bytes at 0 leaves its page"),
    "an offset": ((rx(P, MORE), rx(P, 0, 1)), "leaves its page"),
    "22 slots": ((*[rx(9, MORE)] * 21, rx(9)), "more than 20 slots"),
    "five extras": ((rx(60, EXTRAS), *[gso(more=1)] * 5), "more than 4 extra slots"),
    "an unknown extra": ((rx(60, EXTRAS), EXTRA.pack(9, 0, MAC)), "extra slot of type 9"),
    "GSO of 0 bytes": ((rx(60, EXTRAS), gso(0)), "segments of 0 bytes"),
    "GSO of type 3": ((rx(60, EXTRAS), gso(kind=3)), "GSO of type 3"),
}


@pytest.mark.parametrize("name", RX_GOOD)
def test_rx(name: str):
    """Each packet with others around it; and cut anywhere it is one of which the rest is to come."""
    slots, wanted = RX_GOOD[name]
    assert rx_packet((*slots, rx(60), rx(-1))) == wanted
    moved = [(at + 2, offset, length) for at, offset, length in wanted.fragments]
    assert rx_packet((rx(-1), rx(3), *slots, rx(60)), 2) == wanted._replace(fragments=moved)
    assert [rx_packet(slots[:cut]) for cut in range(1, len(slots))] == [None] * (len(slots) - 1)


@pytest.mark.parametrize("name", RX_PROBLEMS)
def test_rx_that_cannot_be_delivered(name: str):
    slots, count, problem = RX_PROBLEMS[name]
    packet = rx_packet((*slots, rx(60)))
    assert packet is not None and packet.slots == count and problem in packet.problem


@pytest.mark.parametrize("name", RX_FAULTS)
def test_rx_that_no_driver_sends(name: str):
    slots, text = RX_FAULTS[name]
    with pytest.raises(PeerFault, match=text):
        rx_packet(slots)


# --- against a reader of netif.h's text ----------------------------------------------------------------------------------


class Incomplete(Exception):
    """The slots end before the packet does."""


def reference_extras(slots: list[bytes]) -> tuple[int, Gso | None, list[tuple[int, bytes]]]:
    """netif.h: "extra info" follows the first slot for as long as XEN_NETIF_EXTRA_FLAG_MORE is set."""
    found, multicast, count = None, [], 0
    while True:
        if count == 4:
            raise PeerFault
        if count >= len(slots):
            raise Incomplete
        kind, flags, rest = slots[count][0], slots[count][1], slots[count][2:8]
        if kind not in (1, 2, 3, 4):
            raise PeerFault
        if kind == 1:
            size, what = rest[0] + 256 * rest[1], rest[2]
            if what not in (1, 2) or size == 0:
                raise PeerFault
            found = Gso(what, size)
        elif kind in (2, 3):
            multicast.append((kind, rest))
        count += 1
        if not flags & 1:
            return count, found, multicast


def reference_tx(slots: list[bytes]) -> TxPacket | str:
    """netif.h: the first slot has the size of the whole packet, the following ones their own, the first slot's share is
    what remains."""
    _, offset, flags, _, total = TX_REQUEST.unpack(slots[0])
    extras, found, multicast = reference_extras(slots[1:]) if flags & EXTRAS else (0, None, [])
    rest, more, at = [], flags & MORE, 1 + extras
    while more:
        if len(rest) == 19:
            raise PeerFault
        if at == len(slots):
            raise Incomplete
        _, where, more, _, size = TX_REQUEST.unpack(slots[at])
        if where + size > P:
            raise PeerFault
        more &= MORE
        rest.append((at, where, size))
        at += 1
    mine = total - sum(size for _, _, size in rest)
    if mine < 0 or len(rest) >= 18:
        return "problem"
    if offset + mine > P:
        raise PeerFault
    if total < 14 and not multicast:
        return "problem"
    return TxPacket(at, extras, total, flags, [(0, offset, mine), *rest], found, multicast, "")


def reference_rx(slots: list[bytes]) -> RxPacket | str:
    """netif.h: each response has the size of its own fragment, or an error below 0."""
    flags = RX_RESPONSE.unpack(slots[0])[2]
    extras, found, _ = reference_extras(slots[1:]) if flags & EXTRAS else (0, None, [])
    fragments, at, more, bad = [], 0, MORE, False
    while more:
        if len(fragments) == 21:
            raise PeerFault
        if at >= len(slots):
            raise Incomplete
        _, where, more, size = RX_RESPONSE.unpack(slots[at])
        if size >= 0 and where + size > P:
            raise PeerFault
        bad |= size < 0
        more &= MORE
        fragments.append((at, where, size))
        at += 1 if at else 1 + extras
    total = sum(size for _, _, size in fragments)
    return "problem" if bad or total < 14 else RxPacket(at, extras, total, flags, fragments, found, "")


FLAGS = st.sampled_from([0, 0, MORE, MORE, MORE, EXTRAS, EXTRAS | MORE, 3, 16 | MORE])
OFFSETS = st.sampled_from([0, 0, 0, 0, 0, 1, 100, P - 1, P, 65535])
EXTRA_SLOTS = st.sampled_from([gso(), gso(kind=2), gso(more=1), gso(0), gso(kind=3), mcast(), mcast(3, 1), HASH, bytes(8)])
TX_SLOTS = st.one_of(
    st.builds(tx, st.sampled_from([P, P, P, P, 0, 1, 13, 14, 60, P - 1, P + 1, 2 * P, 9000, 65535]), FLAGS, OFFSETS),
    EXTRA_SLOTS,
)
RX_SLOTS = st.one_of(
    st.builds(rx, st.sampled_from([P, P, P, P, 0, 1, 14, 60, P - 1, P + 1, 32767, -1, -2]), FLAGS, OFFSETS), EXTRA_SLOTS
)


@st.composite
def bent(draw: Any, receive: bool) -> tuple[bytes, ...]:
    """A packet of whole pages with some of its slots replaced or lost: near what is quick to read, and not quite."""
    size, extra = draw(st.integers(1, 73728 if receive else 65535)), draw(st.booleans())
    pages = -(-size // P)
    last = size - (pages - 1) * P
    make, total = (rx, min(size, P)) if receive else (tx, size)
    flags = (MORE if pages > 1 else 0) | (EXTRAS if extra else 0) | draw(st.sampled_from([0, 3]))
    middle = [make(P, MORE)] * (pages - 2) + ([make(last)] if pages > 1 else [])
    slots = [make(total, flags), *([gso()] if extra else []), *middle, make(60)]
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.sampled_from([0, *range(len(slots)), *[max(0, len(slots) - 2)] * 4]))
        slots[at : at + 1] = draw(st.lists(RX_SLOTS if receive else TX_SLOTS, max_size=2))
        slots = slots or [make(60)]
    return tuple(slots)


def check(read: Any, reference: Any, slots: tuple[bytes, ...], slot_size: int) -> None:
    """`read` and `reference` agree about the packet at the start of `slots`."""
    padded = [slot.ljust(slot_size, b"\xee") for slot in slots]
    try:
        wanted = reference(padded)
    except (PeerFault, Incomplete) as error:
        if isinstance(error, Incomplete) and reference is reference_rx:
            assert read(slots) is None
        else:
            with pytest.raises(PeerFault, match="no slot follows" if isinstance(error, Incomplete) else None):
                read(slots)
        return
    packet = read(slots)
    if wanted == "problem":
        assert packet.problem
        return
    assert packet._replace(whole=False) == wanted
    parts = [(offset, size) for _, offset, size in packet.fragments]
    filled = all(part == (0, P) for part in parts[:-1]) and parts[-1][0] == 0 and 0 < parts[-1][1] <= P
    assert not packet.whole or (filled and len(parts) > 1), "whole, and does not fill its pages"


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.one_of(st.lists(TX_SLOTS, min_size=1, max_size=24).map(tuple), bent(False)))
def test_any_tx(slots: tuple[bytes, ...]):
    check(tx_packet, reference_tx, slots, 12)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.one_of(st.lists(RX_SLOTS, min_size=1, max_size=24).map(tuple), bent(True)))
def test_any_rx(slots: tuple[bytes, ...]):
    check(rx_packet, reference_rx, slots, 8)


# --- building ------------------------------------------------------------------------------------------------------------

SIZES = st.one_of(st.integers(1, 65535), st.sampled_from([1, 14, P - 1, P, P + 1, 2 * P, 15 * P + 1, 65535]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from([32, 256]), st.integers(0, 255), SIZES, st.sampled_from([0, 1, 2, 3]), st.booleans())
def test_build_tx(count: int, page: int, size: int, flags: int, extra: bool):
    """Goal: what a frontend puts on the ring is one packet of whole pages, from `page` on around the end, each slot with
    the reference and id of its page."""
    page %= count
    grefs = [1000 + 3 * i for i in range(count)]
    added = gso_extra(1, 1448, 12) if extra else b""
    data = build_tx(tx_template(grefs), grefs, page, size, flags, added)
    slots = list(TX_REQUEST.iter_unpack(data))
    pages = -(-size // P)
    assert len(slots) == pages + extra
    del slots[1 : 1 + extra]
    used = [(page + i) % count for i in range(pages)]
    assert [(slot[0], slot[3]) for slot in slots] == [(grefs[at], at) for at in used]
    whole = parse_tx(list(TX_REQUEST.iter_unpack(data)), data, 0)
    assert whole.flags & 3 == flags and whole.gso == (Gso(1, 1448) if extra else None)
    if size >= 14:
        assert (whole.slots, whole.extras, whole.size, whole.problem) == (pages + extra, extra, size, "")
        assert whole.whole == (pages > 1)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(0, 65535), SIZES, st.sampled_from([0, 1, 2, 3]), st.booleans(), st.sampled_from([256, 65536]), st.booleans()
)
def test_build_rx(first: int, size: int, flags: int, extra: bool, around: int, in_order: bool):
    """Goal: the responses name the ids of their requests: counted around the ring, around 2**16, or in no order."""
    pages = -(-size // P)
    idents = [(first + i * (1 if in_order else 7)) % around for i in range(pages)]
    if extra and pages > 1 and in_order:
        idents[1:] = [(ident + 1) % around for ident in idents[1:]]  # the extra slot had one, too
    data = build_rx(idents, size, flags, gso_extra(2, 1448, 8) if extra else b"")
    slots = list(RX_RESPONSE.iter_unpack(data))
    packet = parse_rx(slots, data, 0)
    assert packet is not None and packet.flags & 3 == flags and packet.gso == (Gso(2, 1448) if extra else None)
    assert (packet.slots, packet.extras, packet.size) == (len(slots), extra, size) == (pages + extra, extra, size)
    assert packet.whole == (pages > 1)
    assert [slots[at][0] for at, _, _ in packet.fragments] == idents
