"""Goal: the header before a frame says in the kernel's own numbers what the frame lacks.
Method: sizes, offsets and constants from linux/virtio_net.h by a C compiler; then `partial` and `gso` over known frames.
"""

from __future__ import annotations

from struct import Struct

import pytest

from netdev import vnet
from netdev.headers import HEAD_BYTES, Transport, transport
from netdev.link import VNET_SIZE
from tests.abi.headers import run_c
from tests.netdev.test_headers import FRAMES, TCP, UDP, Frame

FIELDS = ("flags", "gso_type", "hdr_len", "gso_size", "csum_start", "csum_offset")
NUMBERS = {
    "VIRTIO_NET_HDR_F_NEEDS_CSUM": vnet.F_NEEDS_CSUM,
    "VIRTIO_NET_HDR_F_DATA_VALID": vnet.F_DATA_VALID,
    "VIRTIO_NET_HDR_GSO_NONE": vnet.GSO_NONE,
    "VIRTIO_NET_HDR_GSO_TCPV4": vnet.GSO_TCPV4,
    "VIRTIO_NET_HDR_GSO_TCPV6": vnet.GSO_TCPV6,
    "VIRTIO_NET_HDR_GSO_ECN": vnet.GSO_ECN,
}


def test_as_in_the_header():
    # "<" packs without padding: a field begins where the format before it ends.
    ours = NUMBERS | {name: Struct(vnet.VNET.format[: n + 1]).size for n, name in enumerate(FIELDS)}
    expressions = {name: name for name in NUMBERS} | {f: f"offsetof(struct virtio_net_hdr, {f})" for f in FIELDS}
    ours["sizeof"], expressions["sizeof"] = vnet.VNET.size, "sizeof(struct virtio_net_hdr)"
    theirs = run_c("linux/virtio_net.h", [f'printf("{key}\\t%d\\n", (int)({c}));' for key, c in expressions.items()])
    assert {key: int(value) for key, value in theirs.items()} == ours
    assert vnet.VNET.size == VNET_SIZE


def test_partial():
    for frame in FRAMES:
        place = transport(frame.packed)
        assert place is not None
        fields = vnet.VNET.unpack(vnet.partial(place))
        assert fields == (1, 0, 0, 0, frame.start, 16 if frame.protocol == TCP else 6), frame


def test_partial_beyond_the_head():
    place = Transport(6, 14, HEAD_BYTES + 4, UDP, 6)
    assert vnet.VNET.unpack(vnet.partial(place)) == (1, 0, 0, 0, HEAD_BYTES + 4, 6)


@pytest.mark.parametrize("options", [b"", bytes(12), bytes(40)])
def test_gso(options: bytes):
    for frame in FRAMES:
        if frame.protocol == TCP:
            frame = frame._replace(tcp_options=options)
            header = vnet.gso(place_of(frame), frame.packed[:HEAD_BYTES], 1448, frame.version)
            assert header is not None
            expected = (1, 1 if frame.version == 4 else 4, frame.start + 20 + len(options), 1448, frame.start, 16)
            assert vnet.VNET.unpack(header) == expected, frame


def test_gso_refuses():
    """Goal: no header promises a segmentation that cannot be done.  Method: one thing wrong at a time, and one good."""
    frame = Frame(payload=bytes(3000), tcp_options=bytes(12))
    place, head = place_of(frame), frame.packed
    whole = frame.start + 32
    assert vnet.gso(place, head[:whole], 1448, 4) is not None
    assert vnet.gso(place, head[: whole - 1], 1448, 4) is None, "options cut short"
    assert vnet.gso(place, head[: frame.start + 12], 1448, 4) is None, "header cut short"
    assert vnet.gso(place, head, 0, 4) is None, "no size"
    assert vnet.gso(place, head, 1448, 6) is None, "other version"
    tiny = bytearray(head)
    tiny[frame.start + 12] = 0x40
    assert vnet.gso(place, tiny, 1448, 4) is None, "TCP header of 16 bytes"
    datagram = Frame(protocol=UDP, payload=bytes(3000))
    assert vnet.gso(place_of(datagram), datagram.packed, 1448, 4) is None, "UDP"


def place_of(frame: Frame) -> Transport:
    place = transport(frame.packed)
    assert place is not None
    return place
