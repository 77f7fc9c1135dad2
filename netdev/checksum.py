"""checksum.py: the Internet checksum (RFC 1071) of TCP and UDP: to complete a blank one, and to tell if one is right.

Called where a frame must leave with its checksum: towards a frontend with feature-no-csum-offload, to a port that was not
asked to offload, and by netdev/segment.py.
The ones' complement sum of 16-bit words is their big-endian number modulo 65535, for 65536 is 1 modulo 65535; so one
division replaces a loop (2 us for 1500 bytes, half of what adding the words costs). Only zero is ambiguous: the sum is 0
if all words are 0, and 0xffff if they add up to a multiple of 0xffff.
"""

from __future__ import annotations

from struct import Struct

from netdev.headers import IPV4_HEADER, IPV6_HEADER, TCP, TCP_HEADER, UDP, UDP_HEADER, Octets, Transport, transport

MODULUS = 0xFFFF
WORD = Struct(">H")


def complete(frame: bytearray | memoryview, start: int, offset: int) -> None:
    """Finish the checksum at `start` + `offset`, which holds the pseudo-header's sum: add all from `start` to the end of
    the frame. As Linux's skb_checksum_help: a result of 0 is written as 0xffff, its equal, which UDP needs.

    ValueError if the field is not inside the frame.
    """
    size = len(frame)
    if start < 0 or offset < 0 or start + offset + 2 > size:
        raise ValueError(f"a checksum at {start} + {offset} is not inside a frame of {size} bytes")
    # A field of 0 with nothing but 0 to add gives 0xffff either way, so here the two zeros need no care.
    left = MODULUS - _residue(memoryview(frame)[start:])
    WORD.pack_into(frame, start + offset, left)


def pseudo(frame: Octets, place: Transport, length: int) -> int:
    """The sum (1 to 0xffff, not complemented) of the pseudo-header, for `length` bytes of TCP or UDP header and payload."""
    version, at, _, protocol, _ = place
    first, last = (at + 12, at + IPV4_HEADER) if version == 4 else (at + 8, at + IPV6_HEADER)
    # Never all zeros, as the protocol is not.
    return (int.from_bytes(frame[first:last], "big") + protocol + length) % MODULUS or MODULUS


def verify(frame: Octets) -> bool | None:
    """Is the TCP or UDP checksum right? False also if the frame is shorter than its headers say. None: there is nothing
    to check, because it is neither (or a fragment), or UDP over IPv4 without a checksum."""
    place = transport(frame)
    if place is None:
        return None
    version, at, start, protocol, checksum = place
    if protocol == UDP and frame[start + checksum] == 0 and frame[start + checksum + 1] == 0:
        return None if version == 4 else False  # RFC 8200: over IPv6 it is not optional
    end = at + _word(frame, at + 2) if version == 4 else at + IPV6_HEADER + _word(frame, at + 4)
    if end > len(frame) or end < start + (TCP_HEADER if protocol == TCP else UDP_HEADER):
        return False
    if protocol == UDP:  # has a length of its own, and may be followed by something else
        length = _word(frame, start + 4)
        if not UDP_HEADER <= length <= end - start:
            return False
        end = start + length
    return (_residue(memoryview(frame)[start:end]) + pseudo(frame, place, end - start)) % MODULUS == 0


def ones_sum(data: Octets) -> int:
    """The ones' complement sum (0 to 0xffff) of big-endian words; an odd last byte is the upper half of one."""
    residue = _residue(data)
    if residue == 0 and any(data):
        return MODULUS
    return residue


def _residue(data: Octets) -> int:
    """The sum modulo 65535."""
    residue = int.from_bytes(data, "big") % MODULUS
    return residue * 256 % MODULUS if len(data) & 1 else residue


def _word(frame: Octets, at: int) -> int:
    return frame[at] << 8 | frame[at + 1]
