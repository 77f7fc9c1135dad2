"""packet.py: slots of the netif rings <-> packets, as pure functions. netif.h "Guest transmit" and "Guest receive".

Called by both ends with a private copy of the slots, so nothing here can change under it. The two rings differ: the first
TX slot of a packet says the size of the whole packet, a RX response that of its own fragment. An extra slot carries no id.
A nonsense that no working driver produces is a PeerFault and ends the device (XSA-39); what merely cannot be used is a
packet with a `problem`, answered with an error: the line that Linux's netback draws, too, one slot further out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from xenmodel.public.io.netif import (
    EXTRA,
    EXTRA_GSO,
    RX_RESPONSE,
    RX_SLOT_SIZE,
    TX_REQUEST,
    TX_SLOT_SIZE,
    XEN_NETIF_EXTRA_FLAG_MORE,
    XEN_NETIF_EXTRA_TYPE_GSO,
    XEN_NETIF_EXTRA_TYPE_MAX,
    XEN_NETIF_EXTRA_TYPE_MCAST_ADD,
    XEN_NETIF_EXTRA_TYPE_MCAST_DEL,
    XEN_NETIF_GSO_TYPE_TCPV4,
    XEN_NETIF_GSO_TYPE_TCPV6,
    XEN_NETIF_NR_SLOTS_MIN,
    NETRXF_extra_info,
    NETRXF_more_data,
    NETTXF_extra_info,
    NETTXF_more_data,
)
from xenmodel.types import PAGE_SHIFT, PAGE_SIZE, PeerFault

MOST_SLOTS = XEN_NETIF_NR_SLOTS_MIN
FATAL_SLOTS = 20  # as Linux's fatal_skb_slots: beyond it is an attack, not a packet that is too large
MOST_EXTRAS = XEN_NETIF_EXTRA_TYPE_MAX - 1
SMALLEST_FRAME = 14  # an Ethernet header

TxSlot = tuple[int, int, int, int, int]  # gref, offset, flags, id, size
RxSlot = tuple[int, int, int, int]  # id, offset, flags, status


class Gso(NamedTuple):
    type: int  # XEN_NETIF_GSO_TYPE_*
    size: int  # payload bytes per segment


class TxPacket(NamedTuple):
    """`slots` of the ring, `extras` of them extra slots right after the first. Fragments are (slot, offset, size); `whole`
    if they fill their pages from the start, all but the last to the end."""

    slots: int
    extras: int
    size: int
    flags: int
    fragments: list[tuple[int, int, int]]
    gso: Gso | None
    multicast: list[tuple[int, bytes]]  # (XEN_NETIF_EXTRA_TYPE_MCAST_*, address)
    problem: str
    whole: bool = False


class RxPacket(NamedTuple):
    """`extras` of the `slots` are right after the first. Fragments and `whole` as in TxPacket."""

    slots: int
    extras: int
    size: int
    flags: int
    fragments: list[tuple[int, int, int]]
    gso: Gso | None
    problem: str
    whole: bool = False


# RX responses of whole pages with more to come, for ids that count up as the slots of a ring of one page do
_IDENTS = [*range(256)] * 2
_FULL = b"".join(RX_RESPONSE.pack(ident, 0, NETRXF_more_data, PAGE_SIZE) for ident in _IDENTS)


def _extras(data: bytes, slot_size: int, at: int, most: int) -> tuple[int, Gso | None, list[tuple[int, bytes]]]:
    """The extra slots from slot `at` on, `most` slots at hand: how many, and what they say. IndexError: one is missing."""
    gso, multicast, first = None, [], at
    more = True
    while more:
        if at - first == MOST_EXTRAS:
            raise PeerFault(f"more than {MOST_EXTRAS} extra slots")
        if at >= most:
            raise IndexError
        kind, flags, rest = EXTRA.unpack_from(data, at * slot_size)
        if not 0 < kind < XEN_NETIF_EXTRA_TYPE_MAX:
            raise PeerFault(f"extra slot of type {kind}; 1..{MOST_EXTRAS} exist")
        if kind == XEN_NETIF_EXTRA_TYPE_GSO:
            _, _, size, gso_type, _ = EXTRA_GSO.unpack_from(data, at * slot_size)
            if gso_type not in (XEN_NETIF_GSO_TYPE_TCPV4, XEN_NETIF_GSO_TYPE_TCPV6):
                raise PeerFault(f"GSO of type {gso_type}; 1 (TCPv4) and 2 (TCPv6) exist")
            if not size:
                raise PeerFault("GSO with segments of 0 bytes")
            gso = Gso(gso_type, size)
        elif kind in (XEN_NETIF_EXTRA_TYPE_MCAST_ADD, XEN_NETIF_EXTRA_TYPE_MCAST_DEL):
            multicast.append((kind, rest))
        more = bool(flags & XEN_NETIF_EXTRA_FLAG_MORE)
        at += 1
    return at - first, gso, multicast


def parse_tx(slots: Sequence[TxSlot], data: bytes, at: int) -> TxPacket:
    """The packet that begins in slots[at]. `data` are the bytes of the same slots. PeerFault if it does not end in them:
    a frontend publishes a packet as a whole."""
    _, offset, flags, _, size = slots[at]
    total, problem = size, ""
    extras, gso = 0, None
    multicast: list[tuple[int, bytes]] = []
    if flags & NETTXF_extra_info:
        try:
            extras, gso, multicast = _extras(data, TX_SLOT_SIZE, at + 1, len(slots))
        except IndexError:
            raise PeerFault("an extra slot is announced, and no slot follows") from None
    i, more = at + 1 + extras, flags & NETTXF_more_data
    pages = (size + PAGE_SIZE - 1) >> PAGE_SHIFT
    if more and not offset and 1 < pages <= MOST_SLOTS and i + pages - 1 <= len(slots):
        last = size - ((pages - 1) << PAGE_SHIFT)
        _, offsets, all_flags, _, sizes = zip(*slots[i : i + pages - 1], strict=True)
        if (offsets, all_flags, sizes) == _whole(pages - 2, NETTXF_more_data, last):
            fragments = [(at, 0, PAGE_SIZE), *zip(range(i, i + pages - 1), offsets, sizes, strict=True)]
            return TxPacket(pages + extras, extras, size, flags, fragments, gso, multicast, problem, True)
    fragments = [(at, offset, 0)]
    while more:
        if len(fragments) >= FATAL_SLOTS:
            raise PeerFault(f"a packet of more than {FATAL_SLOTS} slots; {MOST_SLOTS} are allowed")
        if i >= len(slots):
            raise PeerFault("more data is announced, and no slot follows")
        _, here, more, _, length = slots[i]
        more &= NETTXF_more_data
        if here + length > PAGE_SIZE:
            raise PeerFault(f"a fragment of {length} bytes at {here} leaves its page")
        if length > size and not problem:
            problem = f"fragments are larger than the packet of {total} bytes"
        size -= length
        fragments.append((i, here, length))
        i += 1
    if len(fragments) > MOST_SLOTS:
        problem = problem or f"{len(fragments)} slots; {MOST_SLOTS} are allowed"
    elif not problem:
        if offset + size > PAGE_SIZE:
            raise PeerFault(f"the first fragment, {size} bytes at {offset}, leaves its page")
        if total < SMALLEST_FRAME and not multicast:
            problem = f"{total} bytes are less than an Ethernet header"
        fragments[0] = (at, offset, size)
    return TxPacket(i - at, extras, total, flags, fragments, gso, multicast, problem)


def _whole(full: int, more: int, last: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Offsets, flags and sizes of the slots of a packet after its first, if the packet fills its pages: `full` whole pages
    with `more` to come, and `last` bytes."""
    return (0,) * (full + 1), (more,) * full + (0,), (PAGE_SIZE,) * full + (last,)


def parse_rx(slots: Sequence[RxSlot], data: bytes, at: int) -> RxPacket | None:
    """The packet whose first response is slots[at]; None if it does not end in these slots (the rest is to come)."""
    _, offset, flags, status = slots[at]
    first_flags, extras, gso, i = flags, 0, None, at + 1
    if flags & NETRXF_extra_info:
        try:
            extras, gso, _ = _extras(data, RX_SLOT_SIZE, i, len(slots))
        except IndexError:
            return None
        i += extras
    if flags & NETRXF_more_data and status == PAGE_SIZE and not offset:
        rest = slots[i : i + MOST_SLOTS - 1]
        more = [slot[2] for slot in rest]
        full = more.index(0) if 0 in more else 0
        _, offsets, all_flags, sizes = zip(*rest[: full + 1], strict=True) if rest else ((),) * 4
        if sizes and 0 < sizes[-1] <= PAGE_SIZE and (offsets, all_flags, sizes) == _whole(full, NETRXF_more_data, sizes[-1]):
            fragments = [(at, 0, PAGE_SIZE), *zip(range(i, i + full + 1), offsets, sizes, strict=True)]
            total = ((full + 1) << PAGE_SHIFT) + sizes[-1]
            return RxPacket(full + 2 + extras, extras, total, flags, fragments, gso, "", True)
    fragments = []
    size, problem, slot = 0, "", at
    while True:
        if status < 0:
            problem = f"the backend answered {status}"
        elif offset + status > PAGE_SIZE:
            raise PeerFault(f"a fragment of {status} bytes at {offset} leaves its page")
        else:
            fragments.append((slot, offset, status))
            size += status
        if not flags & NETRXF_more_data:
            break
        if i - at - extras >= FATAL_SLOTS:
            raise PeerFault(f"a packet of more than {FATAL_SLOTS} slots")
        if i >= len(slots):
            return None
        _, offset, flags, status = slots[i]
        slot, i = i, i + 1
    if size < SMALLEST_FRAME:
        problem = problem or f"{size} bytes are less than an Ethernet header"
    return RxPacket(i - at, extras, size, first_flags, fragments, gso, problem)


def tx_template(grefs: Sequence[int]) -> bytes:
    """A whole-page slot with more data to come for each page; the id of a slot is the number of its page."""
    return b"".join(TX_REQUEST.pack(gref, 0, NETTXF_more_data, page, PAGE_SIZE) for page, gref in enumerate(grefs))


def build_tx(template: bytes, grefs: Sequence[int], page: int, size: int, flags: int, extra: bytes) -> bytes:
    """The slots of a packet of `size` bytes in pages from `page` on, wrapping around; `extra` is b"" or whole TX slots."""
    pages = (size + PAGE_SIZE - 1) >> PAGE_SHIFT
    if extra:
        flags |= NETTXF_extra_info
    if pages <= 1:
        return TX_REQUEST.pack(grefs[page], 0, flags, page, size) + extra
    first = TX_REQUEST.pack(grefs[page], 0, flags | NETTXF_more_data, page, size)
    last = page + pages - 1
    count = len(grefs)
    start, stop = (page + 1) * TX_SLOT_SIZE, last * TX_SLOT_SIZE
    if last < count:
        middle = template[start:stop]
    else:
        last -= count
        middle = (template + template[: last * TX_SLOT_SIZE])[start : start + (pages - 2) * TX_SLOT_SIZE]
    rest = size - ((pages - 1) << PAGE_SHIFT)
    return first + extra + middle + TX_REQUEST.pack(grefs[last], 0, 0, last, rest)


def build_rx(idents: Sequence[int], size: int, flags: int, extra: bytes) -> bytes:
    """The responses of a packet that fills pages from their start. `idents` are those of its data slots only."""
    pack = RX_RESPONSE.pack
    if extra:
        flags |= NETRXF_extra_info
    if size <= PAGE_SIZE:
        return pack(idents[0], 0, flags, size) + extra
    last = len(idents) - 1
    parts = [pack(idents[0], 0, flags | NETRXF_more_data, PAGE_SIZE), extra]
    ident = idents[1] & 0xFF
    if list(idents[1:last]) == _IDENTS[ident : ident + last - 1]:  # as all known frontends count them
        parts.append(_FULL[ident * RX_SLOT_SIZE : (ident + last - 1) * RX_SLOT_SIZE])
    else:
        parts += [pack(idents[i], 0, NETRXF_more_data, PAGE_SIZE) for i in range(1, last)]
    parts.append(pack(idents[last], 0, 0, size - (last << PAGE_SHIFT)))
    return b"".join(parts)


def gso_extra(gso_type: int, size: int, slot_size: int) -> bytes:
    """One GSO extra slot."""
    slot = EXTRA_GSO.pack(XEN_NETIF_EXTRA_TYPE_GSO, 0, size, gso_type, 0)
    return slot.ljust(slot_size, b"\0")


def join(memory: memoryview, ranges: Iterable[tuple[int, int]]) -> list[memoryview]:
    """Slices of `memory` for (begin, length) after (begin, length), neighbours joined, empty ones left out."""
    pieces: list[memoryview] = []
    begin = end = 0
    for at, length in ranges:
        if at == end:
            end += length
        elif length:
            if end > begin:
                pieces.append(memory[begin:end])
            begin, end = at, at + length
    if end > begin:
        pieces.append(memory[begin:end])
    return pieces
