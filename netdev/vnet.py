"""vnet.py: struct virtio_net_hdr (linux/virtio_net.h), the header before each frame of a FramePort (netdev/link.py).

It says what a frame still lacks. In netif's words: F_NEEDS_CSUM is csum_blank, F_DATA_VALID is data_validated, and a
GSO type with its segment size is an extra of type GSO. A TAP takes and gives it in the host's byte order.
Left out: GSO of UDP and the ECN bit, which netif has no names for.
"""

from __future__ import annotations

from struct import Struct

from netdev.headers import HEAD_BYTES, TCP, TCP_CHECKSUM, TCP_HEADER, UDP_CHECKSUM, Octets, Transport, transport

VNET = Struct("<BBHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset

F_NEEDS_CSUM = 1  # the checksum field at csum_start + csum_offset holds the sum of the pseudo-header only
F_DATA_VALID = 2  # the checksum was found right, or need not be looked at

GSO_NONE = 0
GSO_TCPV4 = 1
GSO_TCPV6 = 4
GSO_ECN = 0x80  # with one of the others: the frame has CWR set

NOTHING = VNET.pack(0, GSO_NONE, 0, 0, 0, 0)  # of a frame that lacks nothing
VALID = VNET.pack(F_DATA_VALID, GSO_NONE, 0, 0, 0, 0)

# By the offset of the transport header; a frame's head holds no others.
_PARTIAL_TCP = tuple(VNET.pack(F_NEEDS_CSUM, GSO_NONE, 0, 0, start, TCP_CHECKSUM) for start in range(HEAD_BYTES))
_PARTIAL_UDP = tuple(VNET.pack(F_NEEDS_CSUM, GSO_NONE, 0, 0, start, UDP_CHECKSUM) for start in range(HEAD_BYTES))


def partial(place: Transport) -> bytes:
    """The header of a frame whose transport checksum is still to be computed."""
    _, _, start, protocol, checksum = place
    if start < HEAD_BYTES:
        return (_PARTIAL_TCP if protocol == TCP else _PARTIAL_UDP)[start]
    return VNET.pack(F_NEEDS_CSUM, GSO_NONE, 0, 0, start, checksum)


def gso(place: Transport, head: Octets, gso_size: int, version: int) -> bytes | None:
    """The header of a frame to be cut into segments of `gso_size` bytes of payload (1 to 65535), each with a checksum.

    None if the frame is not TCP over IP of that version, its headers are not all in `head`, or gso_size is 0.
    """
    _, _, start, protocol, checksum = place
    if protocol != TCP or place.version != version or gso_size == 0 or len(head) < start + TCP_HEADER:
        return None
    header = (head[start + 12] >> 4) * 4
    if header < TCP_HEADER or len(head) < start + header:
        return None
    kind = GSO_TCPV4 if version == 4 else GSO_TCPV6
    return VNET.pack(F_NEEDS_CSUM, kind, start + header, gso_size, start, checksum)


def header(blank: bool, valid: bool, head: Octets) -> bytes | None:
    """Of a frame that begins with `head`, from netif's flags csum_blank and data_validated. None: it has no checksum that
    could be blank."""
    if blank:
        place = transport(head)
        return None if place is None else partial(place)
    return VALID if valid else NOTHING
