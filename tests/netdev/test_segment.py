"""Goal: a TCP frame cut into segments arrives as the same bytes, in frames a receiver takes for a sender's own.
Method: a receiver written here takes the segments apart by the headers' own fields and puts the stream together again; each
segment must equal a frame put together from parts with the values that RFC 9293 and Linux's tcp_gso_segment give it.
Linux itself, as receiver, must find nothing wrong with them.
"""

from __future__ import annotations

from itertools import pairwise
from struct import pack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netdev.checksum import verify
from netdev.segment import segment
from tests.netdev.test_checksum import expected, linux_receives
from tests.netdev.test_headers import EXTENSIONS, OPTIONS, TAGS, TCP, UDP, Frame

FIN, SYN, PSH, ACK, CWR = 0x01, 0x02, 0x08, 0x10, 0x80
TIMESTAMPS = b"\x01\x01\x08\x0a" + bytes(range(8))

PARTS = {
    "payload": st.binary(max_size=700),
    "tags": st.sampled_from(TAGS),
    "ident": st.integers(0, 0xFFFF),
    "sequence": st.one_of(st.integers(0, 2**32 - 1), st.integers(2**32 - 700, 2**32 - 1)),
    "flags": st.integers(0, 0xFF),
    "tcp_options": st.sampled_from([b"", TIMESTAMPS, bytes(40)]),
    "check": st.integers(0, 0xFFFF),
}
ANY_FRAME = st.one_of(
    st.builds(lambda **parts: Frame(4, **parts), options=st.sampled_from(OPTIONS), **PARTS),
    st.builds(lambda **parts: Frame(6, **parts), extensions=st.sampled_from(EXTENSIONS), **PARTS),
)


def by_hand(frame: Frame, mss: int) -> list[bytes]:
    """The segments, each put together as a frame of its own."""
    count = max(1, -(-len(frame.payload) // mss))
    pieces = []
    for n in range(count):
        flags = frame.flags
        if n > 0:
            flags &= 0xFF - CWR
        if n < count - 1:
            flags &= 0xFF - PSH - FIN
        piece = frame._replace(
            payload=frame.payload[n * mss : (n + 1) * mss],
            ident=(frame.ident + n) % 2**16,
            sequence=(frame.sequence + n * mss) % 2**32,
            flags=flags,
            padding=b"",
        )
        pieces.append(piece._replace(check=expected(piece)).packed)
    return pieces


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ANY_FRAME, st.integers(1, 800))
def test_each_segment(frame: Frame, mss: int):
    assert [bytes(piece) for piece in segment(frame.packed, mss)] == by_hand(frame, mss)


@pytest.mark.parametrize("version", [4, 6])
def test_a_full_size_frame(version: int):
    """Goal: 64 KiB over an MTU of 1500.  Method: 46 frames, none above the MTU, right sums, the payload whole."""
    payload = bytes(range(256)) * 254
    frame = Frame(version, TCP, payload, tcp_options=TIMESTAMPS, flags=CWR | PSH | ACK | FIN)
    mss = 1500 - (frame.start - 14) - 32
    pieces = list(segment(memoryview(frame.packed), mss))
    assert max(len(piece) for piece in pieces) == 1514
    assert all(verify(piece) is True for piece in pieces)
    body = frame.start + 32
    assert b"".join(piece[body:] for piece in pieces) == payload
    flags = [piece[frame.start + 13] for piece in pieces]
    assert flags == [CWR | ACK, *[ACK] * (len(pieces) - 2), PSH | ACK | FIN]
    numbers = [int.from_bytes(piece[frame.start + 4 : frame.start + 8], "big") for piece in pieces]
    assert {after - before for before, after in pairwise(numbers)} == {mss}


@pytest.mark.parametrize("version", [4, 6])
def test_lengths_that_sender_left_blank(version: int):
    """Goal: the frame's size decides when the IP length cannot be right, as with senders that leave it 0.
    Method: wrong lengths of every kind give the segments of the right one."""
    frame = Frame(version, TCP, bytes(range(200)))
    right = by_hand(frame, 64)
    at = frame.network + (2 if version == 4 else 4)
    for length in (0, 1, 19, len(frame.packed), 0xFFFF):
        packed = frame.packed[:at] + pack(">H", length) + frame.packed[at + 2 :]
        assert [bytes(piece) for piece in segment(packed, 64)] == right, length


@pytest.mark.parametrize("version", [4, 6])
def test_numbers_wrap(version: int):
    """Goal: sequence number and IPv4 id go on at 0.  Method: both just below their end."""
    frame = Frame(version, payload=bytes(700), sequence=2**32 - 250, ident=0xFFFE)
    assert [bytes(piece) for piece in segment(frame.packed, 100)] == by_hand(frame, 100)


def test_padding_is_not_payload():
    for frame in (Frame(payload=b"x"), Frame(), Frame(payload=bytes(300))):
        padded = frame._replace(padding=b"\xee" * 6).packed
        assert [bytes(piece) for piece in segment(padded, 100)] == by_hand(frame, 100)


def test_the_frame_itself_stays():
    packed = bytearray(Frame(payload=bytes(100)).packed)
    before = bytes(packed)
    list(segment(packed, 30))
    assert packed == before


GOOD = Frame(payload=bytes(100), tcp_options=TIMESTAMPS)
BAD = {
    "empty": (b"", 100, "not TCP"),
    "UDP": (Frame(protocol=UDP, payload=bytes(100)).packed, 100, "not TCP"),
    "fragment": (GOOD._replace(fragment=0x2000).packed, 100, "not TCP"),
    "TCP header cut short": (GOOD.packed[: GOOD.start + 19], 100, "not TCP"),
    "TCP options cut short": (GOOD.packed[: GOOD.start + 31], 100, "headers of 66 bytes in a frame of 65"),
    "TCP header of 16": (
        GOOD.packed[: GOOD.start + 12] + b"\x40" + GOOD.packed[GOOD.start + 13 :],
        100,
        "a TCP header of 16 bytes",
    ),
    "mss 0": (GOOD.packed, 0, "a segment size of 0 bytes"),
    "mss -1": (GOOD.packed, -1, "a segment size of -1 bytes"),
    "mss 65536": (GOOD.packed, 65536, "a segment size of 65536 bytes"),
    "segment of 65536": (GOOD.packed + bytes(65400), 65535 - 20 - 31, "a segment of 65536 bytes does not fit"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_at_once(name: str):
    """Goal: the call itself raises, before anything is asked of the iterator."""
    packed, mss, reason = BAD[name]
    if name == "segment of 65536":
        packed = packed[:16] + b"\0\0" + packed[18:]
    with pytest.raises(ValueError, match=reason):
        segment(packed, mss)


def test_largest_segment():
    """Goal: the refusal of too long a segment begins exactly where the length field ends."""
    packed = (GOOD.packed + bytes(65400))[:16] + b"\0\0" + (GOOD.packed + bytes(65400))[18:]
    first = next(segment(packed, 65535 - 20 - 32))
    assert first[16:18] == b"\xff\xff"
    assert verify(first) is True


@settings(max_examples=300, deadline=None, derandomize=True)
@given(ANY_FRAME, st.integers(0, 200), st.binary(max_size=8), st.integers(0, 300))
def test_spoiled_frames(frame: Frame, at: int, noise: bytes, cut: int):
    """Goal: whatever the bytes, frames with right checksums come out, or a ValueError.  Method: overwrite and cut."""
    packed = bytearray(frame.packed)
    packed[at : at + len(noise)] = noise
    packed = packed[: max(0, len(packed) - cut)]
    try:
        pieces = list(segment(packed, 100))
    except ValueError:
        return
    assert all(verify(piece) is True for piece in pieces)


@pytest.mark.host
def test_linux_takes_them():
    """Goal: the kernel finds lengths and checksums right.  Method: to a port without a listener: a reset for each segment,
    which it sends only after it found the checksum right; and a control that it does look."""
    frames = [Frame(version, TCP, bytes(range(250)) * 40, ports=(1025, 9), tcp_options=TIMESTAMPS) for version in (4, 6)]
    pieces = [piece for frame in frames for piece in segment(frame.packed, 700)]
    said = linux_receives(pieces)
    assert (said["Tcp:InSegs"], said["Tcp:OutRsts"]) == (len(pieces), len(pieces))
    assert said["Tcp:InErrs"] == said["Tcp:InCsumErrors"] == said["Ip:InHdrErrors"] == said["Ip6InHdrErrors"] == 0
    spoiled = [piece[:-1] + bytes([piece[-1] ^ 1]) for piece in pieces]
    said = linux_receives(spoiled)
    assert (said["Tcp:InCsumErrors"], said["Tcp:OutRsts"]) == (len(pieces), 0)
