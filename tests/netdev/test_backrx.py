"""Goal: every frame for the guest is in pages that it posted, whole, each response in the slot of its request; what it
cannot take is finished, dropped by reason, or waits; a guest that takes nothing costs neither memory nor anybody's network.
Method: a real BackRx on real domains; the guest is played by hand: which pages it posts, when, and whether it grants them.
The clock is a number.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from netdev.link import BATCH, BLOCKED, IDLE, MORE
from netdev.vnet import F_DATA_VALID, GSO_ECN, VNET
from tests.netdev.halves import STARTS, RxBack, finished, needs_csum, needs_gso, numbered, unfinished
from tests.netdev.test_headers import UDP, Frame
from xenmodel.public.io.netif import RX_RESPONSE
from xenmodel.types import PAGE_SIZE, PeerFault, Pfn

VALID, BLANK = 1, 2
NEED = 18  # slots for the largest frame with its extra
SIZES = [14, 60, 1514, 4095, 4096, 4097, 8192, 9014, 61440, 65535, 65536, 65553]
NO_PAGES = {"the guest posts no pages": 1}


@pytest.fixture
def make() -> Iterator[Any]:
    backs: list[RxBack] = []

    def make(post: int = 256, **options: Any) -> RxBack:
        backs.append(RxBack(**options))
        backs[-1].post(post)
        return backs[-1]

    yield make
    for back in backs:
        back.close()


def through(back: RxBack, *frames: bytes, vnet: bytes = bytes(10)) -> list[tuple[int, Any, bytes, int]]:
    """Frames to the guest, which takes them as fast as they come."""
    for frame in frames:
        back.lane.push(frame, vnet)
    got = []
    while back.poll() != IDLE:
        got += back.packets()
        back.post(256 - len(back.posted))
    got += back.packets()
    back.post(256 - len(back.posted))
    return got


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("gso", [True, False])
def test_frames_of_any_size(make: Any, size: int, start: int, gso: bool):
    """Goal: as many slots as pages, whether a GSO extra was to be expected or not (then the frames are moved), also
    around the end of the ring.  Method: enough of them for two rounds."""
    back = make(start=start, gso4=gso, gso6=gso)
    frames = [numbered(size, i) for i in range(520 // -(-size // PAGE_SIZE) if size > PAGE_SIZE else 40)]
    got = through(back, *frames)
    assert [packet[2] for packet in got] == frames
    assert {(packet[0] & 3, packet[1], packet[3]) for packet in got} == {(0, None, -(-size // PAGE_SIZE))}
    assert (back.rx.statistics.packets, back.rx.statistics.bytes) == (len(frames), size * len(frames))
    assert back.rx.statistics.drops == {}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("seed", range(3))
def test_many_rounds(make: Any, start: int, seed: int):
    """Goal: nothing lost, doubled or out of order, however large frames, small ones, GSO and none follow each other.
    Method: 600 frames in random bursts; the guest posts random numbers of pages, which lie all over its memory."""
    back, random = make(post=30, start=start), Random(seed)
    kinds = [Frame(4, payload=numbered(size, size)) for size in (10, 3000, 9000, 60000)]
    expected: list[bytes] = []
    got: list[bytes] = []
    while len(expected) < 600 or len(got) < len(expected):
        for _ in range(random.randrange(12) if len(expected) < 600 else 0):
            frame = random.choice(kinds)
            if random.random() < 0.5:
                back.lane.push(unfinished(frame), needs_gso(frame))
                expected.append(unfinished(frame))
            else:
                expected.append(numbered(random.choice([60, 1514, 4096, 4097, 9014, 65535]), len(expected)))
                back.lane.push(expected[-1])
        back.poll()
        got += back.frames()
        random.shuffle(back.pool)
        back.post(random.randrange(257 - len(back.posted)))
    assert got == expected and back.statuses == []
    assert back.rx.statistics.drops.get("the guest posts no pages") is None


def test_a_batch_is_bounded_and_one_event(make: Any):
    """Goal: the host has its turn after at most BATCH frames; the guest is told once for each batch."""
    back = make()
    for i in range(200):
        back.lane.push(numbered(60, i))
    polls, most = 0, 0
    while True:
        left, outcome = len(back.lane.waiting), back.rx.poll(back.lane)
        back.settle()
        polls, most = polls + 1, max(most, left - len(back.lane.waiting))
        back.packets()
        if outcome == IDLE:
            break
        assert outcome == MORE
    assert most <= BATCH and polls < 40 and back.told <= polls


# --- what a guest takes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "sg", "reason"),
    [
        (0, True, "shorter than an Ethernet header"),
        (13, False, "shorter than an Ethernet header"),
        (4096, False, "too large for a guest without feature-sg"),
        (4097, False, "too large for a guest without feature-sg"),
        (65535, False, "too large for a guest without feature-sg"),
    ],
)
def test_dropped(make: Any, size: int, sg: bool, reason: str):
    """Goal: it costs itself and takes no page.  Method: between frames of one page, of which 4095 bytes are the most that
    can be told from more."""
    back = make(sg=sg, gso4=False, gso6=False)
    good = numbered(4095, 1), numbered(60, 2)
    assert [packet[2] for packet in through(back, good[0], numbered(size), good[1])] == [*good]
    assert back.rx.statistics.drops == {reason: 1}
    assert back.rx.statistics.packets == 2


TCP4, TCP6, UDP6 = Frame(4, payload=b"odd"), Frame(6, payload=bytes(9000)), Frame(6, UDP, b"x" * 4050, (0x8100,))


@pytest.mark.parametrize("frame", [TCP4, TCP6, UDP6, Frame(4, payload=bytes(9000))])
@pytest.mark.parametrize("csum4", [True, False])
@pytest.mark.parametrize("csum6", [True, False])
def test_unfinished_checksums(make: Any, frame: Frame, csum4: bool, csum6: bool):
    """Goal: left to a guest that takes it, finished here for one with feature-no-csum-offload (IPv4) or without
    feature-ipv6-csum-offload.  Method: two of each, as the second large one is read in another way."""
    back = make(csum4=csum4, csum6=csum6, gso4=csum4, gso6=csum6)
    got = through(back, unfinished(frame), unfinished(frame), vnet=needs_csum(frame))
    left = csum4 if frame.version == 4 else csum6
    wanted = (BLANK | VALID, unfinished(frame)) if left else (VALID, finished(frame))
    assert [(flags & 3, data) for flags, _, data, _ in got] == [wanted] * 2


def test_a_checksum_that_is_nowhere(make: Any):
    """Goal: no exception for a header of the interface that makes no sense.  Method: csum_start behind the end."""
    back = make(csum4=False, gso4=False)
    assert through(back, unfinished(TCP4), vnet=VNET.pack(1, 0, 0, 0, 1000, 16))[0][2] == unfinished(TCP4)


@pytest.mark.parametrize("frame", [TCP4, TCP6])
def test_valid(make: Any, frame: Frame):
    got = through(make(), finished(frame), vnet=VNET.pack(F_DATA_VALID, 0, 0, 0, 0, 0))
    assert [(flags & 3, data) for flags, _, data, _ in got] == [(VALID, finished(frame))]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [100, 4030, 5000, 65000])
@pytest.mark.parametrize("ecn", [0, GSO_ECN])
def test_segmentation_is_left_to_the_guest(make: Any, version: int, size: int, ecn: int):
    """Goal: an extra slot behind the first.  Method: three of them, as the first is moved and the others are not."""
    frame = Frame(version, payload=numbered(size))
    vnet = bytearray(needs_gso(frame, 1400))
    vnet[1] |= ecn
    got = through(make(), *[unfinished(frame)] * 3, vnet=bytes(vnet))
    slots = 1 + -(-len(frame.packed) // PAGE_SIZE)
    kind = 1 if version == 4 else 2
    assert [(p[0] & 3, p[1], p[2], p[3]) for p in got] == [(BLANK | VALID, (kind, 1400), unfinished(frame), slots)] * 3


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [100, 9000])
def test_segmentation_that_the_guest_does_not_offer(make: Any, version: int, size: int):
    """Goal: what was queued before the interface was told is dropped and counted.  Method: it, and a plain frame."""
    back, frame = make(gso4=version != 4, gso6=version != 6), Frame(version, payload=bytes(size))
    back.send(unfinished(frame), vnet=needs_gso(frame))
    assert [p[2] for p in through(back, numbered(60))] == [numbered(60)]
    assert back.rx.statistics.drops == {"segmentation that the guest does not offer": 1}


def test_multicast(make: Any):
    """Goal: with the filter on only what was asked for.  Method: a station, two groups, broadcast; small and large."""
    back = make()
    asked, other = b"\x01\x00\x5e\0\0\1", b"\x01\x00\x5e\0\0\2"
    back.stub.multicast.enabled = True
    back.stub.multicast.add(asked)
    frames = [to + numbered(size)[6:] for to in (bytes(6), asked, other, b"\xff" * 6) for size in (60, 9000)]
    assert [p[2] for p in through(back, *frames)] == frames[:4] + frames[6:]
    assert back.rx.statistics.drops == {"multicast that the guest has not asked for": 2}


# --- pages that are not granted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["never granted", "none", "readonly", "beyond memory"])
@pytest.mark.parametrize("size", [60, 9000, 65535])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_not_granted(make: Any, kind: str, size: int, at: int):
    """Goal: an error in its slot, and the frames go where they can; none is lost while there are pages.  Method: a bad
    reference among good ones, thrice."""
    back = make(post=0)
    away = back.grant(readonly=False)
    back.guest.grants.set_entry(away, back.dom0.domid, Pfn(back.guest.memory.pages))
    bad = {"never granted": 400, "none": 2**32 - 1, "readonly": back.grant(), "beyond memory": away}[kind]
    for _ in range(3):
        back.post(at)
        back.post(1, bad)
        back.post(40 - at)
    frames = [numbered(size, i) for i in range(8)]
    back.send(*frames)
    got = back.frames()
    back.post(256 - len(back.posted))
    assert got + [p[2] for p in through(back)] == frames
    assert 1 <= back.rx.statistics.bad_pages <= 3 and back.statuses.count(-1) >= back.rx.statistics.bad_pages
    assert back.rx.statistics.drops == {}, "a page is no frame"


def test_a_grant_that_ends_between_two_polls(make: Any):
    """Goal: a page is looked up in the batch that writes to it.  Method: end the grants of what was looked up before."""
    back = make(post=40)
    back.send(numbered(60, 1))
    assert back.frames() == [numbered(60, 1)]
    for _, gref in list(back.posted)[:4]:
        assert back.guest.grants.end_access(gref), "nothing stays mapped"
    back.send(numbered(60, 2))
    assert back.frames() == [numbered(60, 2)]
    assert back.statuses == [-1] * 4 and back.rx.statistics.bad_pages == 4


def test_an_error_before_frame_0(make: Any):
    """Goal: -1 is an error also where frames 0, 1, 2... follow it.  Method: such references, looked up all together as they
    are for a frame with a hash."""
    back = make(post=0)
    back.stub.hashing, back.stub.target = 1, (0, None)
    back.post(1, 400)  # never granted
    for pfn in range(30):
        back.post(1, back.guest.grants.grant_access(back.dom0.domid, Pfn(pfn)))
    back.send(numbered(60))
    assert [len(frame) for frame in back.frames()] == [60] and back.statuses == [-1]


# --- no pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sg", "gso", "need"), [(True, True, 18), (True, False, 17), (False, False, 1)])
def test_no_room_until_pages_are_posted(make: Any, sg: bool, gso: bool, need: int):
    """Goal: BLOCKED with the frames left in the interface's queue, until the largest fits; then on_room(), once."""
    back = make(post=0, sg=sg, gso4=gso, gso6=gso)
    back.send(numbered(60, 1), numbered(60, 2))
    for _ in range(need - 1):
        back.post(1)
        back.guest.events.send(back.port)  # not asked for
        back.settle()
        assert back.poll() == BLOCKED
    assert back.frames() == [] and len(back.lane.waiting) == 2 and "room" not in back.stub.calls
    back.post(1)
    assert back.stub.calls.count("room") == 1
    back.poll()
    assert back.frames() == [numbered(60, 1)]
    back.post(40)
    back.poll()
    assert back.frames() == [numbered(60, 2)]


def test_pages_that_are_posted_while_it_reads(make: Any):
    """Goal: the batch goes on with them.  Method: the guest posts, without an event, while what seems the last is read."""
    back = make(post=NEED)
    read = back.lane.read

    def post_and_read(buffers: Any) -> int:
        back.lane.read = read
        back.post(40, tell=False)
        return read(buffers)

    back.lane.read = post_and_read
    assert back.send(numbered(60, 1), numbered(60, 2)) == IDLE
    assert back.frames() == [numbered(60, 1), numbered(60, 2)]


def test_drained_then_stalled_then_back(make: Any):
    """Goal: XSA-392: frames of a guest that posts nothing wait for 10 seconds, are dropped from then on, and after 60
    seconds the interface has no carrier until pages are posted.  Method: the clock, second by second."""
    back = make(post=3)
    assert back.send(numbered(60)) == BLOCKED
    assert back.rx.deadline == 1010.0 and back.stub.calls == ["deadline"]
    back.rx.expire(1009.9)
    assert back.stub.calls == ["deadline"]
    back.now = 1009.9
    assert back.poll() == BLOCKED and back.rx.statistics.drops == {}
    back.now = 1010.0
    back.rx.expire(back.now)
    assert back.stub.calls == ["deadline", "room"] and back.rx.deadline is None
    assert back.poll() == IDLE and back.rx.statistics.drops == NO_PAGES
    assert not back.rx.stalled
    back.now = 1059.9
    assert back.send(numbered(60)) == IDLE and not back.rx.stalled
    back.now = 1060.0
    assert back.send() == IDLE and not back.rx.stalled, "nobody wanted to send"
    assert back.send(*[numbered(60)] * 600) == IDLE
    assert back.rx.stalled and back.stub.calls.count("stall") == 1
    assert back.rx.statistics.drops == {"the guest posts no pages": 602}
    back.post(NEED - 4)
    assert back.rx.stalled
    back.post(1)
    assert not back.rx.stalled and back.stub.calls[-2:] == ["stall", "room"]
    assert back.rx.blocked_at is None
    back.send(numbered(60, 5))
    assert back.frames() == [numbered(60, 5)]


def test_a_drop_of_many_is_bounded(make: Any):
    """Goal: dropping is work, too, and has its turns.  Method: 1000 frames, poll by poll."""
    back = make(post=0, notify=False)
    for _ in range(1000):
        back.lane.push(numbered(60))
    outcomes = []
    while not outcomes or outcomes[-1] == MORE:
        left = len(back.lane.waiting)
        outcomes.append(back.rx.poll(back.lane))
        assert left - len(back.lane.waiting) <= 256
    assert outcomes[-1] == IDLE and back.rx.statistics.drops == {"the guest posts no pages": 1000}


def test_a_guest_that_will_not_tell(make: Any):
    """Goal: without feature-rx-notify nothing waits: what finds no room is dropped at once, and the next looks again."""
    back = make(post=NEED - 1, notify=False)
    assert back.send(numbered(60, 1)) == IDLE
    assert back.rx.statistics.drops == NO_PAGES and back.rx.deadline is None
    back.post(2, tell=False)
    assert back.send(numbered(60, 2)) == IDLE
    assert back.frames() == [numbered(60, 2)]


def test_more_requests_than_slots(make: Any):
    back = make(post=0)
    back.ring.words[0] = 257
    with pytest.raises(PeerFault, match="the ring has 256 slots"):
        back.send(numbered(60))


# --- hashes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [60, 4097, 65535])
@pytest.mark.parametrize("gso", [True, False])
def test_a_hash(make: Any, size: int, gso: bool):
    """Goal: its extra slot comes last, behind that of GSO.  Method: read the raw responses."""
    back = make()
    back.stub.hashing, back.stub.target = 1, (0, (2, 0x01020304))
    frame = Frame(4, payload=numbered(size - 54))
    back.send(unfinished(frame), vnet=needs_gso(frame) if gso else needs_csum(frame))
    data = back.theirs.copy_out(0, 3)
    extras = [data[8:16], data[16:24]] if gso else [data[8:16]]
    assert extras[-1] == bytes([4, 0, 2, 1, 4, 3, 2, 1])
    assert not gso or extras[0] == bytes([1, 1]) + (1448).to_bytes(2, "little") + bytes([1, 0, 0, 0])
    assert RX_RESPONSE.unpack(data[:8])[2] & 8
    ((_, got, data, slots),) = back.packets()
    assert (got is not None, data, slots) == (gso, unfinished(frame), -(-size // PAGE_SIZE) + len(extras))


def test_a_frame_for_another_queue(make: Any):
    """Goal: the queue that the hash names gets it; without pages there it is dropped, and this queue goes on."""
    back, other = make(), make(post=NEED + 1)
    other.rx.back = back.stub
    other.stub.hashing = back.stub.hashing = 1
    back.stub.queues, back.stub.target = [back.stub.queues[0], other.stub.queues[0]], (1, None)
    back.stub.memory = other.guest.memory.view
    back.stub.peer_grants = lambda: other.guest.grants
    back.send(numbered(60, 1))
    assert other.frames() == [numbered(60, 1)] and back.frames() == []
    assert back.send(numbered(9000, 2)) == IDLE
    assert other.rx.statistics.drops == {"no pages posted on the queue of its hash": 1}


def test_stopped(make: Any):
    back = make()
    back.rx.stopped = True
    assert back.send(numbered(60)) == BLOCKED and back.frames() == []
