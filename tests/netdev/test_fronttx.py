"""Goal: every frame of the guest's kernel is on the ring once, whole, as its backend takes it; and its pages come back.
Method: a real FrontTx on real domains; the kernel is a list of frames, and the backend is played by hand: it reads the
frames through their grants, and answers in order, out of order, late, or with lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from netdev.fronttx import FrontTx
from netdev.link import BATCH, BLOCKED, IDLE, MORE, Takes
from netdev.vnet import GSO_ECN, VNET
from tests.netdev.halves import STARTS, Sent, TxFront, finished, needs_csum, needs_gso, numbered, unfinished
from tests.netdev.test_headers import UDP, Frame
from xenmodel.domain import Domain
from xenmodel.public.grant_table import GNTMAP_host_map
from xenmodel.public.io.netif import EXTRA, TX_RESPONSE
from xenmodel.types import PAGE_SIZE, OutOfResources, PeerFault

BLANK, VALID = 1, 2
SIZES = [14, 60, 1514, 4095, 4096, 4097, 8192, 9014, 65535]


@pytest.fixture
def made() -> Iterator[list[TxFront]]:
    """What a test makes with make()."""
    fronts: list[TxFront] = []
    yield fronts
    for front in fronts:
        front.close()


@pytest.fixture
def make(made: list[TxFront]) -> Any:
    def make(**options: Any) -> TxFront:
        made.append(TxFront(**options))
        return made[-1]

    return make


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("start", STARTS)
def test_frames_of_any_size(make: Any, size: int, start: int):
    """Goal: as many slots as pages, each filled from its start.  Method: the same size thrice, for three places."""
    front = make(start=start)
    frames = [numbered(size, seed) for seed in range(3)]
    assert front.send(*frames) == IDLE
    sent = front.take()
    assert [packet.frame for packet in sent] == frames
    assert [len(packet.slots) for packet in sent] == [-(-size // PAGE_SIZE)] * 3
    assert all(slot[1] == 0 for packet in sent for slot in packet.slots)
    assert (front.tx.statistics.packets, front.tx.statistics.bytes) == (3, 3 * size)
    front.answer_all(sent)
    assert front.send() == IDLE and front.tx.statistics.drops == {}


@pytest.mark.parametrize(
    ("size", "sg", "reason"),
    [
        (0, True, "shorter than an Ethernet header"),
        (13, True, "shorter than an Ethernet header"),
        (4097, False, "too large for this backend"),
        (65536, False, "too large for this backend"),
        (65536, True, "too large for this backend"),
        (70000, True, "too large for this backend"),
    ],
)
def test_frames_that_are_dropped(make: Any, size: int, sg: bool, reason: str):
    """Goal: it costs itself, and is counted.  Method: between two good ones."""
    front = make(sg=sg)
    good = numbered(100, 1), numbered(PAGE_SIZE, 2)
    assert front.send(good[0], numbered(size), good[1]) == IDLE
    assert front.frames() == [*good]
    assert front.tx.statistics.drops == {reason: 1}


@pytest.mark.parametrize("start", STARTS)
def test_many_rounds(make: Any, start: int):
    """Goal: nothing lost or doubled when pages and slots wrap, at different times.  Method: 600 frames of 1 to 16 pages,
    half with an extra slot, taken and answered by a backend that lags; the pages of what is out are left alone."""
    front, random = make(start=start), Random(7)
    frames = [numbered(random.choice([60, 1514, 4096, 4097, 9014, 65535]), i) for i in range(300)]
    gso = Frame(payload=bytes(9000))
    expected, out, pushed = [], [], 0
    got: list[bytes] = []
    while len(got) < len(frames) * 2:
        for _ in range(random.randrange(40)):
            if pushed < len(frames):
                front.lane.push(frames[pushed])
                front.lane.push(unfinished(gso), needs_gso(gso))
                expected += [frames[pushed], unfinished(gso)]
                pushed += 1
        front.send()
        taken: list[Sent] = front.take()
        out += taken
        got += [sent.frame for sent in taken]
        some = random.randrange(len(out) + 1)
        for sent in out:  # also long after it was taken
            assert front.page(sent.slots[0][0])[:60] == sent.frame[:60]
        front.answer_all(out[:some])
        del out[:some]
    assert got == expected
    front.answer_all(out)
    front.nudge()
    assert (front.tx.head, front.tx.out.count(1)) == (front.tx.tail, 0)


# --- batches, and no room ------------------------------------------------------------------------------------------------


def test_frames_that_come_singly_cost_one_read(make: Any):
    """Goal: a poll never takes more than BATCH, and does not look for a second frame where they come one by one."""
    front = make()
    for _ in range(3):
        front.lane.push(numbered(60))
        assert front.tx.poll(front.lane) == MORE and front.frames() == [numbered(60)]
        assert front.tx.poll(front.lane) == IDLE and front.frames() == []
    for _ in range(200):
        front.lane.push(numbered(60))
    taken = []
    while front.tx.poll(front.lane) == MORE:
        taken.append(len(front.take()))
    taken.append(len(front.take()))
    assert sum(taken) == 200 and max(taken) <= BATCH and len(taken) < 40


def test_one_event_for_a_batch(make: Any):
    front = make()
    front.send(numbered(60))
    front.take()
    told = front.told
    front.send(*[numbered(60)] * 20)
    assert front.told == told + 1


@pytest.mark.parametrize("size", [60, 65535])
@pytest.mark.parametrize("in_order", [True, False])
def test_no_room_until_pages_come_back(make: Any, size: int, in_order: bool):
    """Goal: BLOCKED with the frames left in the kernel's queue, and on_room() once, as soon as the largest frame fits.
    Method: a backend that sends an event only where it was asked to; the oldest page comes first, or last."""
    front = make()
    frames = [numbered(size, i) for i in range(300)]
    assert front.send(*frames) == BLOCKED
    sent = front.take()
    assert len(sent) == (240 if size == 60 else 15) and len(front.lane.waiting) == 300 - len(sent)
    assert front.tx.poll(front.lane) == BLOCKED, "and again, without harm"
    assert front.room == 0
    front.answer_all(sent[:1] if in_order else sent[1:2])
    assert front.room == 1
    front.send()
    if not in_order:  # the oldest is still out, and pages are used in turn
        front.answer_all(sent[:1:-1])
        assert front.room == 1
        front.answer_all(sent[:1])
        assert front.room == 2
        front.send()
    got = [packet.frame for packet in sent] + front.frames()
    assert got == frames[: len(got)] and len(got) > len(sent) + (not in_order)


def test_answers_that_came_meanwhile_are_noticed(make: Any):
    """Goal: no wake-up is missed between finding no room and asking for an event.  Method: the backend answers, without an
    event, while a poll that will find no room is reading."""
    front = make()
    frames = [numbered(60, i) for i in range(300)]
    assert front.send(*frames[:200]) == IDLE
    sent, read = front.take(), front.lane.read

    def answer_and_read(buffers: Any) -> int:
        if front.ring.rsp_prod_pvt == 0:
            front.answer_all(sent, tell=False)
        return read(buffers)

    front.lane.read = answer_and_read
    assert front.send(*frames[200:]) == IDLE
    assert front.frames() == frames[200:]


@pytest.mark.parametrize("seed", range(4))
def test_answers_out_of_order(make: Any, seed: int):
    """Goal: netif.h promises no order of responses.  Method: shuffled, over several rounds; then all pages are there."""
    front, random = make(start=2**32 - 256), Random(seed)
    for _ in range(8):
        assert front.send(*[numbered(random.choice([60, 9000]), i) for i in range(60)]) == IDLE
        ids = [slot[3] for packet in front.take() for slot in packet.slots]
        assert len(set(ids)) == len(ids)
        random.shuffle(ids)
        front.answer(ids)
    front.nudge()
    assert front.tx.out == bytes(256) and front.tx.head == front.tx.tail


def test_refused_by_the_backend(make: Any):
    """Goal: an error is a drop, and its page is free like any other.  Method: errors and a drop among good answers."""
    front = make()
    front.send(*[numbered(60, i) for i in range(4)])
    a, b, c, d = front.take()
    front.answer_all([a])
    front.answer_all([b, c], -1)
    front.answer_all([d], -2)
    front.nudge()
    assert front.tx.statistics.drops == {"refused by the backend": 3}
    assert front.tx.head == front.tx.tail


LIES = {
    "an id that is not out": [4],
    "an id twice": [0, 0],
    "one that was answered before": [3, 11],
    "no id at all": [256],
    "65535": [65535],
}


@pytest.mark.parametrize("ids", LIES.values(), ids=LIES)
def test_answers_nobody_asked_for(make: Any, ids: list[int]):
    """Goal: XSA-391.  Method: of twelve pages four are out still, so that the indices allow up to four answers."""
    front = make()
    front.send(*[numbered(9000, i) for i in range(4)])
    for packet in front.take():
        assert len(packet.slots) == 3
    front.answer([*range(4, 12)])
    front.nudge()
    with pytest.raises(PeerFault, match="which is not out"):
        front.answer(ids)
        front.nudge()


def test_an_answer_twice_in_good_order(make: Any):
    """Goal: the same where the ids are just those that were to be expected."""
    front = make()
    front.send(*[numbered(60, i) for i in range(4)])
    front.take()
    front.answer([1])
    front.nudge()
    with pytest.raises(PeerFault, match="id 1, which is not out"):
        front.answer([0, 1, 2])
        front.nudge()


def test_more_answers_than_requests(make: Any):
    front = make()
    front.send(numbered(60))
    front.take()
    front.ring.put_responses(TX_RESPONSE.pack(0, 0).ljust(12) * 2)
    front.ring.push_responses()
    with pytest.raises(PeerFault, match="2 ahead"):
        front.nudge()


# --- what is left to the backend -----------------------------------------------------------------------------------------

TCP4, TCP6 = Frame(4, payload=bytes(range(100))), Frame(6, payload=bytes(range(100)))
UDP6, TAGGED = Frame(6, UDP, b"payload"), Frame(6, tags=(0x8100,), payload=b"x" * 9000)


@pytest.mark.parametrize("frame", [TCP4, TCP6, UDP6, TAGGED])
@pytest.mark.parametrize("csum6", [True, False])
def test_unfinished_checksums(make: Any, frame: Frame, csum6: bool):
    """Goal: IPv4 always and IPv6 where it is offered are left to the backend; otherwise the checksum is finished here."""
    front = make(csum6=csum6, gso6=csum6)
    front.send(unfinished(frame), vnet=needs_csum(frame))
    (sent,) = front.take()
    if csum6 or frame.version == 4:
        assert (sent.flags & 3, sent.frame) == (BLANK | VALID, unfinished(frame))
    else:
        assert (sent.flags & 3, sent.frame) == (VALID, finished(frame))


def test_a_checksum_outside_its_frame_is_not_ours_to_finish(make: Any):
    """Goal: no exception; the backend says what it thinks of it.  Method: IPv6, csum_start behind the end."""
    front = make(csum6=False)
    front.send(unfinished(UDP6), vnet=VNET.pack(1, 0, 0, 0, 62, 6))
    assert front.take()[0].flags & 3 == BLANK | VALID


def test_valid_and_plain(make: Any):
    front = make()
    front.send(finished(TCP4), vnet=VNET.pack(2, 0, 0, 0, 0, 0))
    front.send(finished(TCP4) * 60, vnet=VNET.pack(2, 0, 0, 0, 0, 0))
    front.send(finished(TCP4))
    assert [packet.flags & 3 for packet in front.take()] == [VALID, VALID, 0]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [100, 4000, 30000])
@pytest.mark.parametrize("ecn", [0, GSO_ECN])
def test_segmentation_is_left_to_the_backend(make: Any, version: int, size: int, ecn: int):
    """Goal: one extra slot behind the first, and its answer is NULL.  Method: two of them, and the answers."""
    front, frame = make(), Frame(version, payload=numbered(size))
    vnet = bytearray(needs_gso(frame, 1400))
    vnet[1] |= ecn
    front.send(unfinished(frame), unfinished(frame), vnet=bytes(vnet))
    sent = front.take()
    kind = 1 if version == 4 else 2
    assert [(p.gso, p.extras, p.flags & 3, p.frame) for p in sent] == [((kind, 1400), 1, 3, unfinished(frame))] * 2
    front.answer_all(sent)
    front.nudge()
    assert front.tx.head == front.tx.tail and front.tx.ring.free == 256


@pytest.mark.parametrize(("version", "gso4", "gso6"), [(4, False, True), (6, True, False)])
def test_segmentation_that_is_not_offered(make: Any, version: int, gso4: bool, gso6: bool):
    """Goal: what the kernel queued before it was told is dropped and counted.  Method: it, and a plain frame behind it."""
    front, frame = make(gso4=gso4, gso6=gso6), Frame(version, payload=bytes(9000))
    front.send(unfinished(frame), vnet=needs_gso(frame))
    front.send(numbered(60))
    assert front.frames() == [numbered(60)]
    assert front.tx.statistics.drops == {"segmentation that this backend does not offer": 1}


# --- an untrusted backend ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trusted", [True, False])
def test_nothing_of_earlier_frames(make: Any, trusted: bool):
    """Goal: XSA-403: with trusted=0 a page holds its frame and zeros.  Method: fill every page, then small frames and ones
    that end within a page; `trusted` shows that the rest would be there."""
    front = make(wipe=not trusted)
    for _ in range(2):
        front.send(*[b"\xaa" * 65535] * 8)
        front.send(*[b"\xaa" * 65535] * 7)
        front.answer_all(front.take())
    front.send(*[numbered(size, size) for size in (60, 4096, 4097, 9000, 65000, 60)])
    ends = []
    for sent in front.take():
        whole = b"".join(front.page(slot[0]) for slot in sent.slots)
        assert whole[: len(sent.frame)] == sent.frame
        ends.append(not any(whole[len(sent.frame) :]))
    assert all(ends) != trusted


def test_pages_are_readonly_for_the_backend(make: Any):
    front = make()
    front.send(numbered(60))
    (sent,) = front.take()
    status, mapping = front.dom0.maptrack.map(front.guest.domid, sent.slots[0][0], GNTMAP_host_map)
    assert mapping is None and status < 0


# --- frames of our own ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wipe", [False, True])
def test_transmit(make: Any, wipe: bool):
    """Goal: announcements and requests go between the kernel's frames.  Method: one of each kind, then fill the ring."""
    front = make(wipe=wipe)
    extra = EXTRA.pack(2, 0, b"\x01\x00\x5e\0\0\1").ljust(12, b"\0")
    front.send(numbered(60, 1))
    assert front.tx.transmit(numbered(42)) and front.tx.transmit(numbered(9000)) and front.tx.transmit(b"", extra)
    front.send(numbered(60, 2))
    front.settle()
    sent = front.take()
    assert [packet.frame for packet in sent] == [numbered(60, 1), numbered(42), numbered(9000), b"", numbered(60, 2)]
    assert [packet.extras for packet in sent] == [0, 0, 0, 1, 0]
    front.answer_all(sent)
    count = 0
    while front.tx.transmit(numbered(60)):
        count += 1
    assert count >= 200
    front.settle()
    front.answer_all(front.take())
    front.nudge()
    assert front.tx.transmit(numbered(60))


def test_release(make: Any):
    """Goal: XSA-396: pages that the backend maps are not used again, and all others are.  Method: with one mapped."""
    front = make()
    front.send(numbered(60))
    (sent,) = front.take()
    front.dom0.maptrack.unmap(front.ring_mapping.handle)
    status, mapping = front.dom0.maptrack.map(front.guest.domid, sent.slots[0][0], 6)
    assert mapping is not None, status
    free = front.guest.memory.free_pages
    assert not front.tx.release()
    assert front.guest.memory.free_pages == free + 1, "the ring, and no more"
    front.dom0.maptrack.unmap(mapping.handle)
    assert front.tx.pages.release()
    assert front.guest.memory.free_pages == free + 257


def test_too_little_memory(make: Any):
    """Goal: OutOfResources, and nothing kept.  Method: all but some pages of the guest are taken."""
    front = make()
    domain: Domain = front.guest
    for left in (0, 1, 200):
        taken = domain.memory.allocate(domain.memory.free_pages - left)
        before, grants = domain.memory.free_pages, sum(1 for _ in domain.grants.entries())
        with pytest.raises(OutOfResources):
            FrontTx(domain, front.dom0.domid, Takes(True, True, True, True, True), False)
        assert (domain.memory.free_pages, sum(1 for _ in domain.grants.entries())) == (before, grants)
        domain.memory.release(taken, domain.memory.pages - taken - left)
