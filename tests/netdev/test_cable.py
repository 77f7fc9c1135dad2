"""Goal: two ports in memory behave as two TAPs on a wire do: nobody gets what he cannot take, and queues are bounded.
Method: tables of frames against the reading end's settings, with checksums computed straight from RFC 1071; hypothesis for
buffers and headers that nobody should send."""

from __future__ import annotations

import struct
from itertools import pairwise, product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from netdev.cable import COMPLETE, MAX_FRAME, QUEUE_FRAMES, Cable, MemoryPort
from netdev.link import VNET_SIZE
from netdev.vnet import F_DATA_VALID, F_NEEDS_CSUM, GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, VNET

TCP, UDP = 6, 17
MACS = bytes.fromhex("00163e000002 00163e000001")
ADDRESSES = {4: (bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])), 6: (bytes(15) + b"\1", bytes(15) + b"\2")}
NETWORK = 14
TRANSPORT = {4: 34, 6: 54}
FIELD = {TCP: 16, UDP: 6}
MSS = 1000


def ones(data: bytes) -> int:
    """RFC 1071, word by word."""
    total = sum(int.from_bytes(data[i : i + 2].ljust(2, b"\0"), "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo(version: int, protocol: int, length: int) -> bytes:
    return b"".join(ADDRESSES[version]) + struct.pack(">II", length, protocol)


def packet(version: int, protocol: int, payload: bytes, sport: int = 1024, flags: int = 0x10) -> bytes:
    """A frame whose checksum is still that of the pseudo-header (CHECKSUM_PARTIAL)."""
    size = (20 if protocol == TCP else 8) + len(payload)
    blank = ones(pseudo(version, protocol, size))
    if protocol == TCP:
        header = struct.pack(">HHIIBBHHH", sport, 80, 7, 9, 0x50, flags, 500, blank, 0)
    else:
        header = struct.pack(">HHHH", sport, 53, size, blank)
    if version == 4:
        network = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + size, 1, 0, 64, protocol, 0, *ADDRESSES[4])
        network = network[:10] + struct.pack(">H", 0xFFFF - ones(network)) + network[12:]
    else:
        network = struct.pack(">IHBB16s16s", 0x60000000, size, protocol, 64, *ADDRESSES[6])
    return MACS + (b"\x08\x00" if version == 4 else b"\x86\xdd") + network + header + payload


def header(version: int, protocol: int, gso_type: int = GSO_NONE, size: int = 0, flags: int = F_NEEDS_CSUM) -> bytes:
    start = TRANSPORT[version]
    return VNET.pack(flags, gso_type, start + 20 if gso_type else 0, size, start, FIELD[protocol])


def right(frame: bytes) -> bool:
    """Are the lengths and checksums of a frame of packet() those of a whole frame?"""
    version = frame[NETWORK] >> 4
    protocol, length = frame[23 if version == 4 else 20], len(frame) - TRANSPORT[version]
    named = int.from_bytes(frame[16:18], "big") - 20 if version == 4 else int.from_bytes(frame[18:20], "big")
    network = version == 6 or ones(frame[NETWORK : TRANSPORT[4]]) == 0xFFFF
    return network and named == length and ones(pseudo(version, protocol, length) + frame[TRANSPORT[version] :]) == 0xFFFF


PAYLOAD = bytes(i * 7 % 251 for i in range(3500))
PLAIN = packet(4, UDP, b"x" * 30)
KINDS: dict[str, tuple[bytes, bytes]] = {
    "udp4": (header(4, UDP), packet(4, UDP, PAYLOAD[:1000])),
    "udp6 odd": (header(6, UDP), packet(6, UDP, PAYLOAD[:1001])),
    "tcp4": (header(4, TCP), packet(4, TCP, PAYLOAD[:1000])),
    "tcp6 odd": (header(6, TCP), packet(6, TCP, PAYLOAD[:7])),
    "tso4": (header(4, TCP, GSO_TCPV4, MSS), packet(4, TCP, PAYLOAD)),
    "tso6": (header(6, TCP, GSO_TCPV6, MSS), packet(6, TCP, PAYLOAD)),
    "tso4 ecn": (header(4, TCP, GSO_TCPV4 | GSO_ECN, MSS), packet(4, TCP, PAYLOAD, flags=0x90)),
}


def test_a_fresh_port() -> None:
    """Goal: as a fresh TAP: carrier, no offload, room for 1000.  Method: look, and write one too many."""
    cable = Cable()
    assert cable.a.up and not (cable.a.csum or cable.a.tso4 or cable.a.tso6)
    assert all(cable.a.send(PLAIN) for _ in range(QUEUE_FRAMES + 1))
    assert (cable.b.drops.full, cable.b.dropped) == (1, 1)
    assert cable.b.receive() == [(COMPLETE, PLAIN)] * QUEUE_FRAMES
    assert cable.a.receive() == [] and cable.a.dropped == 0


@pytest.mark.parametrize("offload", list(product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_reader_cannot_take_is_done_for_it(kind: str, offload: tuple[bool, bool, bool]) -> None:
    """Goal: a frame arrives undone exactly if the *reading* end allows it; TSO needs csum, as in TUNSETOFFLOAD.
    Method: every kind of frame against every setting; the writer's own setting is the opposite."""
    vnet, frame = KINDS[kind]
    csum, tso4, tso6 = offload
    cable = Cable()
    cable.b.offload(*offload)
    cable.a.offload(*(not allowed for allowed in offload))
    assert cable.a.send(frame, vnet)
    got = cable.b.receive()
    allowed = csum and {"tso4": tso4, "tso6": tso6}.get(kind[:4], True)
    if allowed:
        assert got == [(vnet, frame)]
    else:
        assert [head for head, _ in got] == [COMPLETE] * (4 if "tso" in kind else 1)
        assert all(right(whole) for _, whole in got)
        start = TRANSPORT[frame[NETWORK] >> 4] + (8 if "udp" in kind else 20)
        assert b"".join(whole[start:] for _, whole in got) == frame[start:]
    assert cable.b.dropped == 0


def test_a_checksum_of_zero_of_udp_is_written_as_ffff() -> None:
    """Goal: 0 would mean that there is none.  Method: the payload that makes the sum come out as 0."""
    frame = packet(4, UDP, bytes(2))
    rest = 0xFFFF - ones(pseudo(4, UDP, 10) + frame[TRANSPORT[4] : TRANSPORT[4] + 6])
    frame = frame[:-2] + rest.to_bytes(2, "big")
    cable = Cable()
    assert cable.a.send(frame, header(4, UDP))
    ((_, got),) = cable.b.receive()
    assert got[40:42] == b"\xff\xff" and right(got)


def test_offload_holds_for_what_comes_after() -> None:
    """Goal: what was queued stays as it was.  Method: change the setting between two frames."""
    vnet, frame = KINDS["tcp4"]
    cable = Cable()
    cable.b.offload(True, False, False)
    assert cable.a.send(frame, vnet)
    cable.b.offload(False, False, False)
    assert cable.a.send(frame, vnet)
    assert [head for head, _ in cable.b.receive()] == [vnet, COMPLETE]


TSO4, TSO_FRAME = KINDS["tso4"]
BLANK_LENGTH = TSO_FRAME[:16] + bytes(2) + TSO_FRAME[18:54]  # headers only; as much follows as is put there
SUM4, SUM_FRAME = KINDS["tcp4"]
MALFORMED: dict[str, tuple[bytes, bytes]] = {
    "nothing": (b"", b""),
    "half a header": (bytes(9), b""),
    "no frame": (COMPLETE, b""),
    "13 bytes": (COMPLETE, bytes(13)),
    "too long": (COMPLETE, bytes(MAX_FRAME + 1)),
    "hdr_len beyond the frame": (VNET.pack(0, 0, len(PLAIN) + 1, 0, 0, 0), PLAIN),
    "checksum beyond the frame": (VNET.pack(1, 0, 0, 0, 34, len(PLAIN) - 35), PLAIN),
    "checksum at 65535 + 65535": (VNET.pack(1, 0, 0, 0, 65535, 65535), PLAIN),
    "checksum in the Ethernet header": (VNET.pack(1, 0, 0, 0, 0, 0), PLAIN),
    "GSO without checksum": (header(4, TCP, GSO_TCPV4, MSS, flags=0), TSO_FRAME),
    "GSO of size 0": (header(4, TCP, GSO_TCPV4, 0), TSO_FRAME),
    "GSO unknown": (header(4, TCP, 7, MSS), TSO_FRAME),
    "GSO of UDP": (header(4, UDP, 3, MSS), packet(4, UDP, PAYLOAD)),
    "ECN alone": (header(4, TCP, GSO_ECN, MSS), TSO_FRAME),
    "ECN alone, no checksum": (VNET.pack(0, GSO_ECN, 0, 0, 0, 0), PLAIN),
    "GSO of the other version": (header(4, TCP, GSO_TCPV6, MSS), TSO_FRAME),
    "GSO with UDP inside": (header(4, TCP, GSO_TCPV4, MSS), packet(4, UDP, PAYLOAD)),
    "GSO of what is no IP": (header(4, TCP, GSO_TCPV4, MSS), MACS + b"\x88\xb5" + PAYLOAD),
    "GSO with its checksum elsewhere": (VNET.pack(1, GSO_TCPV4, 54, MSS, 36, 16), TSO_FRAME),
    "GSO with headers cut short": (VNET.pack(1, GSO_TCPV4, 40, MSS, 34, 16), TSO_FRAME[:53]),
    "GSO with a TCP header of 16": (TSO4, TSO_FRAME[:46] + b"\x40" + TSO_FRAME[47:]),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_frame_is_refused(case: str) -> None:
    """Goal: False, and the other end never hears of it, whatever it could take.  Method: the table; a good frame follows."""
    vnet, frame = MALFORMED[case]
    for offload in (False, True):
        cable = Cable()
        cable.b.offload(offload, offload, offload)
        assert cable.a.send(frame, vnet) is False
        assert cable.b.dropped == 0 and cable.b.receive() == []
        assert cable.a.send(PLAIN) and cable.b.receive() == [(COMPLETE, PLAIN)]


@pytest.mark.parametrize(
    ("vnet", "want"),
    [
        (VNET.pack(F_DATA_VALID, 0, 0, 0, 0, 0), COMPLETE),  # the writer's word for it is not passed on
        (VNET.pack(0xFE, 0, 20, 999, 99, 9999), COMPLETE),
        (VNET.pack(0xFF, 0, 20, 999, 34, 16), SUM4),
    ],
)
def test_only_what_is_understood_is_passed_on(vnet: bytes, want: bytes) -> None:
    """Goal: bits and fields that say nothing reach nobody.  Method: a reader that takes everything."""
    cable = Cable()
    cable.b.offload(True, True, True)
    assert cable.a.send(SUM_FRAME, vnet)
    assert cable.b.receive() == [(want, SUM_FRAME)]


def test_a_checksum_in_the_last_two_bytes() -> None:
    """Goal: the field may be the end of the frame.  Method: the smallest frame with room for one."""
    cable = Cable()
    assert cable.a.send(bytes(14) + b"\x12\x34", VNET.pack(1, 0, 0, 0, 14, 0))
    assert cable.b.receive() == [(COMPLETE, bytes(14) + b"\xed\xcb")]
    assert cable.a.send(bytes(15), VNET.pack(1, 0, 0, 0, 14, 0)) is False


def test_hdr_len_is_computed_and_not_believed() -> None:
    """Goal: a reader gets the length of the headers.  Method: a GSO frame that claims 0, one that claims all of it."""
    cable = Cable()
    cable.b.offload(True, True, True)
    for lie in (0, len(TSO_FRAME)):
        assert cable.a.send(TSO_FRAME, VNET.pack(1, GSO_TCPV4, lie, MSS, 34, 16))
    assert cable.b.receive() == [(TSO4, TSO_FRAME)] * 2


def test_carrier_and_close() -> None:
    """Goal: who is not there gets nothing and each loss has its reason; the writer is not told, as on a TAP.
    Method: carrier down, up again, then closed twice; the end without carrier may still write."""
    cable = Cable()
    cable.b.carrier(False)
    assert cable.a.send(PLAIN) and cable.b.send(PLAIN)
    assert cable.b.receive() == [] and len(cable.a.receive()) == 1
    cable.b.carrier(True)
    assert cable.a.send(PLAIN) and len(cable.b.receive()) == 1
    assert cable.a.send(PLAIN)
    cable.b.close()
    cable.b.close()
    assert cable.a.send(PLAIN)
    assert cable.b.receive() == [] and cable.b.lanes[0].read([memoryview(bytearray(99))]) == 0
    assert cable.b.send(PLAIN) is False and cable.a.receive() == []
    drops = cable.b.drops
    assert (drops.carrier, drops.closed, drops.full, drops.malformed, cable.b.dropped) == (1, 1, 0, 0, 2)


def test_what_cannot_be_segmented_is_dropped() -> None:
    """Goal: a frame that no segments can be made of costs itself only.  Method: a segment that would be one byte longer than
    IP can say, beside one that just fits; a reader that takes GSO frames whole gets it as it is."""
    vnet = header(4, TCP, GSO_TCPV4, 65535)
    for payload, fits in ((65495, 1), (65496, 0)):
        frame = BLANK_LENGTH + bytes(payload)
        cable = Cable()
        assert cable.a.send(frame, vnet)
        assert (len(cable.b.receive()), cable.b.drops.malformed, cable.b.dropped) == (fits, 1 - fits, 1 - fits)
        cable.b.offload(True, True, False)
        assert cable.a.send(frame, vnet) and cable.b.receive() == [(vnet, frame)]


def test_a_queue_takes_as_many_segments_as_it_has_room() -> None:
    """Goal: segmentation cannot overfill a queue.  Method: room for 10; segments of one byte, then whole frames."""
    cable = Cable(queue=10)
    assert cable.a.send(TSO_FRAME, VNET.pack(1, GSO_TCPV4, 54, 1, 34, 16))
    assert len(cable.b.waiting[0]) == 10 and (cable.b.drops.full, cable.b.dropped) == (1, 1)
    assert cable.a.send(PLAIN) and cable.b.drops.full == 2
    got = cable.b.receive()
    assert [frame[54:] for _, frame in got] == [PAYLOAD[i : i + 1] for i in range(10)] and all(right(f) for _, f in got)


def test_a_flow_keeps_its_lane() -> None:
    """Goal: the frames of a flow stay in order on one lane, segmented or not, wherever they were written; flows spread.
    Method: 64 flows over 4 lanes from 3 lanes, three frames each."""
    cable = Cable(lanes_a=3, lanes_b=4)
    used = set()
    for flow in range(64):
        for lane in range(3):
            frame = packet(4, TCP, PAYLOAD[: 1000 + 1000 * lane], sport=flow)
            vnet = header(4, TCP, GSO_TCPV4, MSS) if lane else header(4, TCP)
            assert cable.a.send(frame, vnet, lane)
        (lane_used,) = [number for number in range(4) if cable.b.waiting[number]]
        assert [len(frame) - 54 for _, frame in cable.b.receive(lane_used)] == [1000] * 6
        used.add(lane_used)
    assert used == {0, 1, 2, 3}


def test_a_full_lane_leaves_the_others_alone() -> None:
    """Goal: room is per lane.  Method: fill one lane with one flow, then send many flows."""
    cable = Cable(lanes_b=2, queue=5)
    for _ in range(6):
        assert cable.a.send(packet(4, UDP, b""))
    assert sorted(len(queue) for queue in cable.b.waiting) == [0, 5] and cable.b.drops.full == 1
    for flow in range(50):
        assert cable.a.send(packet(4, UDP, b"", sport=flow))
    assert [len(queue) for queue in cable.b.waiting] == [5, 5]


def test_on_readable() -> None:
    """Goal: told once when a lane becomes readable, and only then.  Method: count over what does and does not wake."""
    cable = Cable(lanes_b=2, queue=2)
    calls: list[int] = []
    cable.b.on_readable = lambda: calls.append(sum(map(len, cable.b.waiting)))
    first = next(s for s in range(50) if _lane(s) == 0)
    second = next(s for s in range(50) if _lane(s) == 1)
    steps: list[tuple[bytes, int, list[int]]] = [
        (COMPLETE, first, [1]),
        (COMPLETE, first, []),  # not empty
        (COMPLETE, first, []),  # full
        (COMPLETE, second, [3]),  # another lane
    ]
    for vnet, sport, want in steps:
        calls.clear()
        assert cable.a.send(packet(4, TCP, b"x", sport=sport), vnet)
        assert calls == want
    cable.b.receive()
    calls.clear()
    assert cable.a.send(TSO_FRAME, TSO4)
    assert calls == [2], "called when all segments are there"
    cable.b.receive()
    calls.clear()
    assert cable.a.send(BLANK_LENGTH + bytes(65496), header(4, TCP, GSO_TCPV4, 65535)) and cable.b.drops.malformed == 1
    cable.b.carrier(False)
    assert cable.a.send(PLAIN) and calls == [], "nothing came of either"


def _lane(sport: int) -> int:
    cable = Cable(lanes_b=2)
    cable.a.send(packet(4, TCP, b"x", sport=sport))
    return 0 if cable.b.waiting[0] else 1


@pytest.mark.parametrize(("lanes", "queue"), [(0, 1), (-1, 1), (1, 0)])
def test_a_port_has_a_lane_with_room(lanes: int, queue: int) -> None:
    """Goal: a clear error.  Method: too few of each."""
    with pytest.raises(ValueError, match=f"{lanes} lanes with room for {queue} "):
        MemoryPort(Cable(), lanes, queue)


def _pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@given(st.binary(min_size=14, max_size=80), st.lists(st.integers(0, 90)), st.lists(st.integers(0, 40), max_size=8))
@example(bytes(range(20)), [10], [10, 20])
@example(bytes(range(20)), [10], [10])
@example(bytes(range(20)), [], [])
def test_any_buffers(frame: bytes, cuts: list[int], sizes: list[int]) -> None:
    """Goal: gathered and scattered byte for byte; what does not fit is cut off; what is not reached stays as it was.
    Method: any cut of header and frame into buffers, any buffers to read into."""
    cable = Cable()
    data = COMPLETE + frame
    assert cable.a.lanes[0].write(list(map(memoryview, _pieces(data, cuts))))
    memory = bytearray(b"\xee" * sum(sizes))
    view, buffers, at = memoryview(memory), [], 0
    for size in sizes:
        buffers.append(view[at : at + size])
        at += size
    length = cable.b.lanes[0].read(buffers)
    assert length == min(len(memory), len(data))
    assert memory == (data + b"\xee" * len(memory))[:length] + b"\xee" * (len(memory) - length)
    assert cable.b.lanes[0].read(buffers) == 0, "one frame, read once"


def test_a_written_buffer_may_change_afterwards() -> None:
    """Goal: what was written is what is read.  Method: overwrite the buffers while the frame waits."""
    cable = Cable()
    head, body = bytearray(COMPLETE), bytearray(PLAIN)
    assert cable.a.lanes[0].write([memoryview(head), memoryview(body)])
    head[:], body[:] = b"\xff" * len(head), b"\xff" * len(body)
    assert cable.b.receive() == [(COMPLETE, PLAIN)]


SEEDS = [*KINDS.values(), *MALFORMED.values()]


@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 140), st.integers(0, 255)), max_size=6), st.booleans())
def test_nothing_that_is_written_hurts(seed: tuple[bytes, bytes], changes: list[tuple[int, int]], offload: bool) -> None:
    """Goal: no header or frame raises, and no reader gets what it did not allow or cannot find in the frame.
    Method: good and bad frames with bytes changed anywhere in header and headers."""
    data = bytearray(b"".join(seed)[:4000])
    for where, value in changes:
        if where < len(data):
            data[where] = value
    cable = Cable(lanes_b=2, queue=20)
    cable.b.offload(offload, offload, offload)
    written = cable.a.lanes[0].write([data])
    got = cable.b.receive()
    assert bool(got) <= written and len(got) <= 20
    if written:
        assert got or cable.b.dropped == 1
    for vnet, frame in got:
        assert len(vnet) == VNET_SIZE and len(frame) >= 14
        flags, gso_type, hdr_len, gso_size, start, offset = VNET.unpack(vnet)
        if not offload:
            assert vnet == COMPLETE
        elif flags:
            assert flags == F_NEEDS_CSUM and start >= 14 and start + offset + 2 <= len(frame)
            assert (gso_size > 0) == (gso_type != GSO_NONE) and hdr_len <= len(frame)
