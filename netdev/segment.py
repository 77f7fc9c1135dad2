"""segment.py: TCP segmentation in software, for a frame with a GSO extra whose receiver did not offer to take it whole.

Called by netback and netfront before a frame is written to what cannot segment. As Linux's tcp_gso_segment: every
segment has all headers of the frame, its own lengths, IPv4 id, sequence number and checksums; CWR stays on the first
only, PSH and FIN on the last only. The IPv4 id counts up also with DF set.
The caller limits `mss` from below: an mss of 1 makes a frame of every byte.
Left out: the urgent pointer, GSO of UDP, and frames inside tunnels.
"""

from __future__ import annotations

from collections.abc import Iterator

from netdev.checksum import MODULUS, WORD, complete, ones_sum, pseudo
from netdev.headers import IPV6_HEADER, TCP, TCP_HEADER, Octets, Transport, transport

_FIN_PSH = 0x09
_CWR = 0x80
_U32 = 0xFFFFFFFF


def segment(frame: Octets, mss: int) -> Iterator[bytearray]:
    """`frame` (TCP over IPv4 or IPv6, tags allowed) as frames of at most `mss` bytes of payload, at least one frame, each
    with finished checksums; those of `frame` do not matter.

    ValueError, at once, if it is not such a frame, a header is cut short, mss is not 1 to 65535, or a segment would be
    longer than its length field can say.
    """
    if not 0 < mss <= 0xFFFF:
        raise ValueError(f"a segment size of {mss} bytes, not 1 to 65535")
    place = transport(frame)
    if place is None or place.protocol != TCP:
        raise ValueError("to segment: the frame is not TCP over IPv4 or IPv6, or its headers are cut short")
    header = (frame[place.start + 12] >> 4) * 4
    if header < TCP_HEADER:
        raise ValueError(f"to segment: a TCP header of {header} bytes, less than {TCP_HEADER}")
    payload = place.start + header
    end = _end(frame, place, payload)
    if payload > end:
        raise ValueError(f"to segment: headers of {payload} bytes in a frame of {end}")
    largest = payload + min(mss, end - payload) - _length_counts_from(place)
    if largest > 0xFFFF:
        raise ValueError(f"to segment: a segment of {largest} bytes does not fit in the length of its IP header")
    return _segments(frame, place, payload, end, mss)


def _segments(frame: Octets, place: Transport, payload: int, end: int, mss: int) -> Iterator[bytearray]:
    version, network, start, _, checksum = place
    view = memoryview(frame)
    headers = bytes(view[:payload])
    addresses = pseudo(headers, place, 0)
    counts_from = _length_counts_from(place)
    sequence = int.from_bytes(headers[start + 4 : start + 8], "big")
    ident = int.from_bytes(headers[network + 4 : network + 6], "big")
    flags = headers[start + 13]
    for at in range(payload, max(end, payload + 1), mss):
        stop = min(at + mss, end)
        out = bytearray(headers)
        out += view[at:stop]
        size = len(out)
        if version == 4:
            WORD.pack_into(out, network + 2, size - counts_from)
            WORD.pack_into(out, network + 4, ident)
            ident = (ident + 1) & 0xFFFF
            WORD.pack_into(out, network + 10, 0)
            WORD.pack_into(out, network + 10, MODULUS - ones_sum(out[network:start]))
        else:
            WORD.pack_into(out, network + 4, size - counts_from)
        out[start + 4 : start + 8] = sequence.to_bytes(4, "big")
        sequence = (sequence + mss) & _U32
        out[start + 13] = flags if stop == end else flags & ~_FIN_PSH
        flags &= ~_CWR
        WORD.pack_into(out, start + checksum, (addresses + size - start) % MODULUS)
        complete(out, start, checksum)
        yield out


def _length_counts_from(place: Transport) -> int:
    """IPv4's total length counts its header, IPv6's payload length begins after the fixed header."""
    return place.network if place.version == 4 else place.network + IPV6_HEADER


def _end(frame: Octets, place: Transport, payload: int) -> int:
    """Where the payload ends: where IP says, for a small frame may be padded; at the end of the frame if that cannot be,
    for there are drivers that leave the length of a frame to be segmented blank."""
    at = place.network + (2 if place.version == 4 else 4)
    end = _length_counts_from(place) + (frame[at] << 8 | frame[at + 1])
    return end if payload <= end <= len(frame) else len(frame)
