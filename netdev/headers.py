"""headers.py: where a frame's network and transport headers are. Pure: bytes in, numbers out.

Called by netback and netfront for frames with a blank checksum or to be segmented, by netdev/checksum.py, segment.py and
toeplitz.py for any, and by the in-memory ports to choose a queue (`flow_hash`; a TAP's kernel has a hash of its own).
Callers pass the first HEAD_BYTES of a frame, or all of it.
Nothing here raises, whatever the bytes are; what cannot be told is None.
Left out: tunnels (the outer headers count), AH and ESP, fragments (no fragment has a checksum of its own), and IPv6
routing headers with segments left (the pseudo-header then has an address that is not in the fixed header).
"""

from __future__ import annotations

from typing import NamedTuple
from zlib import crc32

Octets = bytes | bytearray | memoryview

HEAD_BYTES = 256  # how much of a frame's beginning callers pass
ETHERNET = 14  # an untagged Ethernet header
TAG = 4  # one VLAN tag
MAX_TAGS = 2
MAX_EXTENSIONS = 8  # IPv6 extension headers; Linux sends at most one of each of four kinds

ETH_P_IP = 0x0800
ETH_P_IPV6 = 0x86DD
ETH_P_8021Q = 0x8100
ETH_P_8021AD = 0x88A8

IPV4_HEADER = 20  # without options
IPV6_HEADER = 40
TCP = 6
UDP = 17
TCP_HEADER = 20  # without options
UDP_HEADER = 8
TCP_CHECKSUM = 16  # where the field is within its header
UDP_CHECKSUM = 6

_HOPOPTS, _ROUTING, _DSTOPTS = 0, 43, 60  # IPv6 extension headers
_NOT_WHOLE = 0x3F  # of an IPv4 header's byte 6: more fragments, and the upper bits of the offset


class Transport(NamedTuple):
    """Where a TCP or UDP header is. Offsets count from the beginning of the frame, but for `checksum`."""

    version: int  # of IP: 4 or 6
    network: int  # the IP header
    start: int  # the TCP or UDP header
    protocol: int  # TCP or UDP
    checksum: int  # the checksum field, from `start`


# Of frames without tags, options and extension headers: nearly all frames are one of these four.
_TCP4 = Transport(4, ETHERNET, ETHERNET + IPV4_HEADER, TCP, TCP_CHECKSUM)
_UDP4 = Transport(4, ETHERNET, ETHERNET + IPV4_HEADER, UDP, UDP_CHECKSUM)
_TCP6 = Transport(6, ETHERNET, ETHERNET + IPV6_HEADER, TCP, TCP_CHECKSUM)
_UDP6 = Transport(6, ETHERNET, ETHERNET + IPV6_HEADER, UDP, UDP_CHECKSUM)
_PLAIN4 = ETHERNET + IPV4_HEADER + TCP_HEADER
_PLAIN6 = ETHERNET + IPV6_HEADER + TCP_HEADER


def transport(head: Octets) -> Transport | None:
    """The TCP or UDP header of a frame; None if it has none, or if its fixed part is not all in `head`."""
    size = len(head)
    if size >= _PLAIN4 and head[12] == 0x08 and head[13] == 0x00 and head[14] == 0x45:
        if head[20] & _NOT_WHOLE or head[21]:
            return None
        protocol = head[23]
        return _TCP4 if protocol == TCP else _UDP4 if protocol == UDP else None
    if size >= _PLAIN6 and head[12] == 0x86 and head[13] == 0xDD and head[14] & 0xF0 == 0x60:
        protocol = head[20]
        if protocol == TCP:
            return _TCP6
        if protocol == UDP:
            return _UDP6
    found = network(head)
    if found is None:
        return None
    return _transport4(head, found[1]) if found[0] == 4 else _transport6(head, found[1])


def network(head: Octets) -> tuple[int, int] | None:
    """(version of IP, offset of its header) behind up to two VLAN tags; None if it is not IP, or the fixed part of the
    header is not all in `head`."""
    size, at = len(head), ETHERNET
    if size < ETHERNET:
        return None
    kind = head[12] << 8 | head[13]
    for _ in range(MAX_TAGS):
        if kind not in (ETH_P_8021Q, ETH_P_8021AD):
            break
        at += TAG
        if size < at:
            return None
        kind = head[at - 2] << 8 | head[at - 1]
    if kind == ETH_P_IP and size >= at + IPV4_HEADER and head[at] >> 4 == 4 and head[at] & 15 >= 5:
        return 4, at
    if kind == ETH_P_IPV6 and size >= at + IPV6_HEADER and head[at] >> 4 == 6:
        return 6, at
    return None


def flow_hash(head: Octets) -> int:
    """32 bits that are the same for every frame of a flow, in every run: of addresses, protocol and ports; without the
    ports if there are none; of the Ethernet addresses if it is not IP. The two directions of a flow differ."""
    place = transport(head)
    if place is not None:
        version, at, start, protocol, _ = place
        first = at + 12 if version == 4 else at + 8
        last = at + IPV4_HEADER if version == 4 else at + IPV6_HEADER
        if start == last:
            return crc32(head[first : start + 4], protocol)
        return crc32(head[start : start + 4], crc32(head[first:last], protocol))
    found = network(head)
    if found is None:
        return crc32(head[:12])
    version, at = found
    if version == 4:
        return crc32(head[at + 12 : at + IPV4_HEADER], head[at + 9])
    return crc32(head[at + 8 : at + IPV6_HEADER], head[at + 6])


def _transport4(head: Octets, at: int) -> Transport | None:
    if head[at + 6] & _NOT_WHOLE or head[at + 7]:
        return None
    return _place(head, 4, at, at + (head[at] & 15) * 4, head[at + 9])


def _transport6(head: Octets, at: int) -> Transport | None:
    protocol, start = head[at + 6], at + IPV6_HEADER
    for _ in range(MAX_EXTENSIONS):
        if protocol not in (_HOPOPTS, _ROUTING, _DSTOPTS):
            break
        if len(head) < start + 8 or (protocol == _ROUTING and head[start + 3]):
            return None
        protocol, start = head[start], start + (head[start + 1] + 1) * 8
    return _place(head, 6, at, start, protocol)


def _place(head: Octets, version: int, at: int, start: int, protocol: int) -> Transport | None:
    if protocol == TCP and len(head) >= start + TCP_HEADER:
        return Transport(version, at, start, TCP, TCP_CHECKSUM)
    if protocol == UDP and len(head) >= start + UDP_HEADER:
        return Transport(version, at, start, UDP, UDP_CHECKSUM)
    return None
