"""Goal: completed checksums are those of RFC 1071, and a right one is told from a wrong one.
Method: the naive sum of the RFC's own words over a pseudo-header put together here, against ours; lengths, alignments and
contents from hypothesis, and the two zeros by hand, for they are where the arithmetic could go wrong. Last, Linux is the
judge: a TAP in a network namespace that ends with the one process in it; `linux_receives` serves the neighbouring tests too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from struct import pack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netdev.checksum import complete, ones_sum, pseudo, verify
from netdev.headers import transport
from tests.netdev.test_headers import EXTENSIONS, FRAMES, OPTIONS, TAGS, TCP, UDP, Frame, rfc1071


def pseudo_header(frame: Frame) -> bytes:
    length = len(frame.transport)
    if frame.version == 4:
        return frame.addresses + pack(">BBH", 0, frame.protocol, length)
    return frame.addresses + pack(">IHBB", length, 0, 0, frame.protocol)


def expected(frame: Frame) -> int:
    """The finished checksum, as a sender without offload computes it; 0 is sent as 0xffff."""
    return 0xFFFF - rfc1071(pseudo_header(frame) + frame._replace(check=0).transport) or 0xFFFF


def completed(frame: Frame) -> bytearray:
    """As a guest leaves it (the sum of the pseudo-header in the field), then completed by us."""
    packed = bytearray(frame._replace(check=rfc1071(pseudo_header(frame)), padding=b"").packed)
    place = transport(packed)
    assert place is not None
    assert pseudo(packed, place, len(frame.transport)) == rfc1071(pseudo_header(frame))
    complete(packed, place.start, place.checksum)
    return packed


CONTENT = {
    "protocol": st.sampled_from([TCP, UDP]),
    "payload": st.binary(max_size=1600),
    "tags": st.sampled_from(TAGS),
    "ports": st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF)),
}
ANY_FRAME = st.one_of(
    st.builds(
        lambda **parts: Frame(4, **parts), options=st.sampled_from(OPTIONS), source=st.ip_addresses(v=4).map(str), **CONTENT
    ),
    st.builds(
        lambda **parts: Frame(6, **parts),
        extensions=st.sampled_from(EXTENSIONS),
        source=st.ip_addresses(v=6).map(str),
        **CONTENT,
    ),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(ANY_FRAME)
def test_completes_and_verifies(frame: Frame):
    packed = completed(frame)
    assert packed == frame._replace(check=expected(frame)).packed
    assert verify(packed) is True
    assert verify(packed + b"padding") is True, "bytes behind the IP packet count for nothing"
    packed[frame.start + 1] ^= 0x40
    assert verify(packed) is False


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=200), st.integers(0, 40))
def test_the_sum(data: bytes, skip: int):
    """Goal: any length and any alignment.  Method: against the naive sum; also all zeros and all ones."""
    for content in (data, bytes(len(data)), b"\xff" * len(data)):
        assert ones_sum(memoryview(bytes(skip) + content)[skip:]) == rfc1071(content)


def test_the_largest_frame():
    for size in (65_493, 65_494):
        frame = Frame(payload=bytes(range(251)) * 261)
        frame = frame._replace(payload=frame.payload[:size])
        assert verify(completed(frame)) is True


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_zero_is_sent_as_ones(version: int, protocol: int):
    """Goal: a sum of 0xffff becomes a checksum of 0xffff, never 0.  Method: a payload word which makes the sum just that."""
    frame = Frame(version, protocol, b"\0\0")
    missing = 0xFFFF - rfc1071(pseudo_header(frame) + frame.transport)
    frame = frame._replace(payload=pack(">H", missing))
    assert rfc1071(pseudo_header(frame) + frame.transport) == 0xFFFF
    packed = completed(frame)
    at = frame.start + (16 if protocol == TCP else 6)
    assert packed[at : at + 2] == b"\xff\xff"
    assert verify(packed) is True


def test_tcp_may_also_send_zero():
    """Goal: the other zero, which senders of TCP do use, is right too."""
    frame = Frame(payload=b"\0\0")
    frame = frame._replace(payload=pack(">H", 0xFFFF - rfc1071(pseudo_header(frame) + frame.transport)))
    assert verify(frame.packed) is True
    assert verify(frame._replace(check=0xFFFF).packed) is True
    assert verify(frame._replace(check=1).packed) is False


@pytest.mark.parametrize("version", [4, 6])
def test_pseudo_header_of_ones(version: int):
    """Goal: a pseudo-header that adds up to 0xffff has that sum, not 0.  Method: an address with the missing word."""
    packed = bytearray(Frame(version).packed)
    place = transport(packed)
    assert place is not None
    missing = 0xFFFF - pseudo(packed, place, 20)
    last = packed[place.start - 2] << 8 | packed[place.start - 1]
    packed[place.start - 2 : place.start] = pack(">H", last + missing)
    assert pseudo(packed, place, 20) == 0xFFFF


def test_a_header_is_at_least_its_size():
    """Goal: a sum that is right over too few bytes is not right.  Method: an IP length that ends behind the ports, and
    a port which makes the sum over them what it should be."""
    frame = Frame(ports=(0, 0), payload=bytes(20))
    port = 0xFFFF - rfc1071(frame.addresses + pack(">HH", TCP, 4))
    packed = frame._replace(ports=(port, 0)).packed
    assert verify(packed[:16] + pack(">H", 24) + packed[18:]) is False


def test_nothing_to_check():
    assert verify(b"") is None
    assert verify(Frame(protocol=1, payload=bytes(40)).packed) is None
    assert verify(Frame(payload=bytes(40), fragment=0x2000).packed) is None
    assert verify(Frame(protocol=UDP, check=0).packed) is None, "UDP over IPv4 without a checksum"
    assert verify(Frame(6, UDP, check=0).packed) is False, "over IPv6 there must be one"


def test_lengths_that_cannot_be():
    """Goal: a frame shorter than it says, or headers longer than the frame, are not right.  Method: spoil each length."""
    for frame in FRAMES:
        good = completed(frame)
        assert verify(good[:-1]) is False, frame
        at = frame.network + (2 if frame.version == 4 else 4)
        for value in (0, 1, len(good) - frame.network + 1, 0xFFFF):
            spoiled = good[:at] + pack(">H", value) + good[at + 2 :]
            assert verify(spoiled) is False, (frame, value)
        if frame.protocol == UDP:
            for value in (0, 7, len(frame.transport) + 1, 0xFFFF):
                spoiled = good[: frame.start + 4] + pack(">H", value) + good[frame.start + 6 :]
                assert verify(spoiled) is False, (frame, value)


def test_datagram_with_a_tail():
    """Goal: UDP's own length decides, as in Linux.  Method: a right datagram inside a longer IP packet."""
    frame = Frame(protocol=UDP, payload=b"abc")
    good = completed(frame)
    longer = good[:16] + pack(">H", len(good) - 14 + 5) + good[18:] + b"extra"
    assert verify(longer) is True


@pytest.mark.parametrize(("start", "offset"), [(34, 19), (35, 18), (52, 0), (60, 6), (-1, 0), (0, -1), (65535, 65535)])
def test_field_outside_the_frame(start: int, offset: int):
    """Goal: it is refused and nothing is written or grown.  Method: places of a virtio header that the frame has not."""
    for frame in (bytearray(range(53)), memoryview(bytearray(range(53)))):
        with pytest.raises(ValueError, match=f"a checksum at {start} \\+ {offset} is not inside a frame of 53 bytes"):
            complete(frame, start, offset)
        assert bytes(frame) == bytes(range(53))


def test_last_place_inside():
    frame = bytearray(range(1, 54))
    complete(frame, 35, 16)
    assert frame == bytes(range(1, 52)) + pack(">H", 0xFFFF - rfc1071(bytes(range(36, 54))))


# Runs alone in a namespace: makes the TAP, writes the frames into it, the last of which is for its own socket, and tells
# the counters and the neighbours. No virtio header, no offloads: the kernel looks at every checksum.
JUDGE = """
import fcntl, json, os, socket, struct, subprocess, sys, time
job = json.load(sys.stdin)
tap = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", b"judge", 0x1002))  # TUNSETIFF, IFF_TAP | IFF_NO_PI
for line in job["setup"]:
    subprocess.run(["ip", *line.split()], check=True)
until = time.monotonic() + 20
# The kernel adds the route to an IPv6 address of its own later, from a work queue; without it, frames are no one's.
while "fd00" + "2".rjust(28, "0") + " 80 " not in open("/proc/net/ipv6_route").read() and time.monotonic() < until:
    time.sleep(0.02)
sinks = [socket.socket(family, socket.SOCK_DGRAM) for family in (socket.AF_INET, socket.AF_INET6)]
sinks[0].bind(("10.0.0.2", 80))
sinks[1].bind(("fd00::2", 80))
last = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
last.bind(("10.0.0.2", 81))
last.settimeout(20)
for frame in job["frames"]:
    os.write(tap, bytes.fromhex(frame))
last.recv(100)
for sink in sinks:
    sink.setblocking(False)
    for _ in job["frames"]:  # a checksum is looked at when the datagram is received, and a wrong one may give EAGAIN
        try:
            sink.recv(2000)
        except BlockingIOError:
            pass
said = {}
lines = open("/proc/net/snmp").read().splitlines()
for names, values in zip(lines[::2], lines[1::2]):
    kind = names.split()[0]
    said.update((kind + n, int(v)) for n, v in zip(names.split()[1:], values.split()[1:]))
said.update((n, int(v)) for n, v in map(str.split, open("/proc/net/snmp6")))
listed = subprocess.run(["ip", "-j", "neigh"], check=True, capture_output=True).stdout
said.update((entry["dst"], entry.get("lladdr")) for entry in json.loads(listed))
print(json.dumps(said))
"""
SETUP = [
    "link set lo up",
    "link set judge address 02:00:00:00:00:01",
    "link set judge up",
    "addr add 10.0.0.2/24 dev judge",
    "addr add fd00::2/64 dev judge nodad",
]


def linux_receives(frames: Iterable[bytes | bytearray], setup: Iterable[str] = ()) -> dict[str, Any]:
    """Counters of /proc/net/snmp ("Udp:InErrors") and snmp6, and neighbours (address: MAC), after Linux, being 10.0.0.2 and
    fd00::2, received `frames`. What `frames` needs besides is in `setup`, arguments of ip."""
    end = bytes(completed(Frame(protocol=UDP, payload=b"end", ports=(1025, 81))))
    job = {"frames": [bytes(frame).hex() for frame in (*frames, end)], "setup": [*SETUP, *setup]}
    command = ["unshare", "--net", sys.executable, "-c", JUDGE]
    ran = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    said: dict[str, Any] = json.loads(ran.stdout)
    return said


@pytest.mark.host
def test_linux_finds_them_right():
    """Goal: the kernel takes what we completed, and drops it with one bit changed.  Method: its own counters."""
    sizes = [*range(40), 1399, 1400]
    frames = [completed(Frame(v, UDP, bytes(range(256))[:size] * (1 + size // 256))) for v in (4, 6) for size in sizes]
    wrong = [frame[:-1] + bytes([frame[-1] ^ 0x10]) for frame in frames]
    said = linux_receives(frames + wrong)
    assert said["Udp:InDatagrams"] == len(sizes) + 1, "one more to end the run"
    assert said["Udp:InCsumErrors"] == len(sizes)
    assert said["Udp6InDatagrams"] == said["Udp6InCsumErrors"] == len(sizes)
