"""Goal: the transport header of a frame is found where it is, and nowhere else; a flow keeps its hash, whatever bytes come.
Method: frames put together from parts, each part's offset known from the putting together, in all combinations of a table;
then every frame cut at every length, and arbitrary bytes from hypothesis. `Frame` here also serves the neighbouring tests.
"""

from __future__ import annotations

from collections import Counter
from ipaddress import ip_address
from itertools import product
from struct import pack
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netdev.headers import HEAD_BYTES, Transport, flow_hash, network, transport

TCP, UDP, ICMP = 6, 17, 1
TAGS: list[tuple[int, ...]] = [(), (0x8100,), (0x88A8,), (0x88A8, 0x8100), (0x8100, 0x8100)]
OPTIONS = [b"", bytes(4), b"\x94\x04\0\0" + b"\x01" * 36]
# (number of the extension header, its bytes after "next header")
EXTENSIONS: list[tuple[tuple[int, bytes], ...]] = [
    (),
    ((0, b"\0" + bytes(6)),),
    ((60, b"\2" + bytes(22)),),
    ((43, b"\0\2\0" + bytes(4)),),  # routing, no segments left
    ((0, b"\0" + bytes(6)), (60, b"\0" + bytes(6)), (43, b"\1\0\0" + bytes(12)), (60, b"\0" + bytes(6))),
]


class Frame(NamedTuple):
    """A frame in parts. `packed` has right lengths and a right IPv4 header checksum; the transport checksum is `check`."""

    version: int = 4
    protocol: int = TCP
    payload: bytes = b""
    tags: tuple[int, ...] = ()
    options: bytes = b""
    extensions: tuple[tuple[int, bytes], ...] = ()
    fragment: int = 0x4000
    ident: int = 0x1234
    source: str = ""
    target: str = ""
    ports: tuple[int, int] = (1025, 80)
    sequence: int = 0x01020304
    flags: int = 0x10
    tcp_options: bytes = b""
    check: int = 0
    padding: bytes = b""

    @property
    def addresses(self) -> bytes:
        plain = ("10.0.0.1", "10.0.0.2") if self.version == 4 else ("fd00::1", "fd00::2")
        chosen = (self.source or plain[0], self.target or plain[1])
        return b"".join(ip_address(text).packed for text in chosen)

    @property
    def network(self) -> int:
        return 14 + 4 * len(self.tags)

    @property
    def start(self) -> int:
        between = self.options if self.version == 4 else b"".join(body + b"?" for _, body in self.extensions)
        return self.network + (20 if self.version == 4 else 40) + len(between)

    @property
    def transport(self) -> bytes:
        if self.protocol == TCP:
            words = ((20 + len(self.tcp_options)) // 4 << 12) | self.flags
            head = pack(">HHIIHHHH", *self.ports, self.sequence, 77, words, 512, self.check, 0)
            return head + self.tcp_options + self.payload
        if self.protocol == UDP:
            return pack(">HHHH", *self.ports, 8 + len(self.payload), self.check) + self.payload
        return self.payload

    @property
    def packed(self) -> bytes:
        kinds = [*self.tags, 0x0800 if self.version == 4 else 0x86DD]
        ethernet = b"\2\0\0\0\0\1\2\0\0\0\0\2" + b"\0\5".join(pack(">H", kind) for kind in kinds)
        return ethernet + self._ip(self.transport) + self.padding

    def _ip(self, inside: bytes) -> bytes:
        if self.version == 4:
            size = 20 + len(self.options)
            fields = (0x40 | size // 4, 0, size + len(inside), self.ident, self.fragment, 64, self.protocol)
            head = pack(">BBHHHBB", *fields), self.addresses + self.options
            return head[0] + pack(">H", 0xFFFF - rfc1071(b"".join(head))) + head[1] + inside
        following = self.protocol
        for number, body in reversed(self.extensions):
            inside, following = bytes([following]) + body + inside, number
        return pack(">IHBB", 0x60012345, len(inside), following, 64) + self.addresses + inside


def rfc1071(data: bytes) -> int:
    """RFC 1071, section 4.1, word by word: the sum, folded, not complemented."""
    total = 0
    padded = data + b"\0" * (len(data) % 2)
    for at in range(0, len(padded), 2):
        total += padded[at] * 256 + padded[at + 1]
        if total > 0xFFFF:
            total -= 0xFFFF
    return total


FRAMES = [
    *(Frame(4, proto, b"payload", tags, options) for proto, tags, options in product((TCP, UDP), TAGS, OPTIONS)),
    *(Frame(6, proto, b"payload", tags, extensions=ext) for proto, tags, ext in product((TCP, UDP), TAGS, EXTENSIONS)),
]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_finds_the_header(kind: type):
    for frame in FRAMES:
        field = 16 if frame.protocol == TCP else 6
        expected = Transport(frame.version, frame.network, frame.start, frame.protocol, field)
        assert transport(kind(frame.packed)) == expected, frame
        assert network(kind(frame.packed)) == (frame.version, frame.network), frame


def test_cut_short_is_nothing():
    """Goal: a header which is not all there is not found, and one which just is.  Method: cut all frames everywhere."""
    for frame in FRAMES:
        needed = frame.start + (20 if frame.protocol == TCP else 8)
        packed = frame.packed
        found = [size for size in range(len(packed) + 1) if transport(packed[:size]) is not None]
        assert found == list(range(needed, len(packed) + 1)), frame


NEITHER = {
    "ICMP": Frame(protocol=ICMP, payload=bytes(40)),
    "first fragment": Frame(payload=bytes(40), fragment=0x2000),
    "middle fragment": Frame(payload=bytes(40), fragment=0x2001),
    "last fragment": Frame(payload=bytes(40), fragment=0x00FF),
    "fragment far away": Frame(payload=bytes(40), fragment=0x1F00),
    "fragment with options": Frame(payload=bytes(40), fragment=0x2000, options=bytes(4)),
    "last fragment with options": Frame(payload=bytes(40), fragment=0x00FF, options=bytes(4)),
    "three tags": Frame(payload=bytes(40), tags=(0x88A8, 0x8100, 0x8100)),
    "unknown tag": Frame(payload=bytes(40), tags=(0x9100,)),
    "IPv6 fragment": Frame(6, payload=bytes(40), extensions=((44, bytes(7)),)),
    "IPv6 routing under way": Frame(6, payload=bytes(40), extensions=((43, b"\2\4\1" + bytes(20)),)),
    "IPv6 authenticated": Frame(6, payload=bytes(40), extensions=((51, bytes(7)),)),
    "IPv6 with nothing": Frame(6, protocol=59, payload=bytes(40)),
    "IPv6 with nine extensions": Frame(6, payload=bytes(40), extensions=((60, bytes(7)),) * 9),
    "IPv6 extension beyond the frame": Frame(6, payload=bytes(40), extensions=((60, b"\xff" + bytes(6)),)),
}


@pytest.mark.parametrize("name", NEITHER)
def test_neither_tcp_nor_udp(name: str):
    assert transport(NEITHER[name].packed) is None


@pytest.mark.parametrize(
    ("at", "byte"),
    [(14, 0x44), (14, 0x40), (14, 0x55), (14, 0x65), (12, 0x86), (13, 0x06)],
    ids=["short header", "no header", "version 5", "version 6 in IPv4", "other ethertype", "ARP"],
)
def test_not_ip(at: int, byte: int):
    frame = bytearray(Frame(payload=bytes(60)).packed)
    frame[at] = byte
    assert transport(frame) is None
    assert network(frame) is None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.binary(max_size=HEAD_BYTES), st.sampled_from([b"", b"\x08\0", b"\x86\xdd", b"\x81\0", b"\x08\0\x45", b"\x86\xdd\x60"])
)
def test_no_bytes_raise(noise: bytes, kind: bytes):
    """Goal: hostile bytes find nothing outside of themselves, and never raise.  Method: noise behind a plausible type."""
    for head in (noise, noise[:12] + kind + noise[12:]):
        place = transport(head)
        if place is not None:
            assert place.start + (20 if place.protocol == TCP else 8) <= len(head)
            assert network(head) == (place.version, place.network)
        assert 0 <= flow_hash(head) < 2**32


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP, ICMP])
def test_a_flow_keeps_its_hash(version: int, protocol: int):
    """Goal: what differs between frames of one flow does not matter.  Method: frames that differ in all of it."""
    first = Frame(version, protocol, bytes(60))
    same = [
        first,
        first._replace(payload=b"\xff" * 900),
        first._replace(ident=7, sequence=9, flags=0x18, check=0xBEEF, tcp_options=bytes(12) * (protocol == TCP)),
        first._replace(tags=(0x8100,)),
        first._replace(options=bytes(8)),
        first._replace(padding=bytes(6)),
    ]
    assert len({flow_hash(frame.packed[:HEAD_BYTES]) for frame in same}) == 1


def test_fragments_of_a_datagram_stay_together():
    frames = [Frame(protocol=UDP, payload=b"x" * size, fragment=place) for size, place in ((80, 0x2000), (40, 0x000B))]
    assert flow_hash(frames[0].packed) == flow_hash(frames[1].packed)


def test_flow_hash_never_changes():
    """Goal: the same in every run and every process.  Method: the values themselves, CRC-32 of what the docstring names."""
    assert flow_hash(Frame().packed) == 0x676F7C91
    assert flow_hash(Frame(6, UDP).packed) == 0x7D2E7650
    assert flow_hash(Frame(protocol=ICMP).packed) == 0x849B6BC7
    assert flow_hash(Frame(6, protocol=58).packed) == 0xDD483D0F
    assert flow_hash(b"\xff" * 6 + b"\2\0\0\0\0\1" + b"\x08\x06" + bytes(28)) == 0x714D22B4


def test_flows_spread():
    """Goal: flows that differ a little use all of four queues about alike.  Method: 256 neighbouring ports, addresses."""
    for version, other in ((4, "10.0.1.{}"), (6, "fd00::1:{}")):
        for flows in (
            [Frame(version, ports=(40000 + n, 80)) for n in range(256)],
            [Frame(version, source=other.format(n)) for n in range(256)],
        ):
            hashes = [flow_hash(frame.packed) for frame in flows]
            assert len(set(hashes)) == len(hashes)
            assert min(Counter(value % 4 for value in hashes).values()) >= 32
    assert flow_hash(Frame(protocol=TCP).packed) != flow_hash(Frame(protocol=UDP).packed)
