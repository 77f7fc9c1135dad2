"""Goal: whatever a frontend writes into its rings and nodes, netback answers it or closes that vif; nothing else is harmed.
Method: a scripted frontend beside a second vif with real drivers that must go on working. Tables name the slots and indices
that have hurt real backends (XSA-39, 155, 423, 448); hypothesis makes arbitrary ones. After each case the text in the error
node, the footprint of domain 0 and the model's invariants are looked at."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netdev.cable import MemoryPort
from netdev.faulty import Dropping
from netdev.link import FramePort
from tests.netdev.hostile import ERROR, HUGE, NULL, OKAY, Case, connected_case
from tests.netdev.scripted import FRAME, ScriptedFront
from tests.netdev.test_headers import Frame
from xenmodel.public.io.netif import (
    TX_REQUEST,
    XEN_NETIF_EXTRA_TYPE_GSO,
    NETTXF_csum_blank,
    NETTXF_extra_info,
    NETTXF_more_data,
)
from xenmodel.public.io.ring import REQ_PROD, RSP_PROD
from xenmodel.types import PAGE_SIZE

EXTRA, MORE, BLANK = NETTXF_extra_info, NETTXF_more_data, NETTXF_csum_blank
GSO = XEN_NETIF_EXTRA_TYPE_GSO
case = connected_case


def gso(front: ScriptedFront, kind: int = 1, size: int = 1448, more: int = 0) -> bytes:
    return front.extra(GSO, more, size.to_bytes(2, "little") + bytes([kind, 0, 0, 0]))


Slots = Callable[[ScriptedFront], list[bytes]]

# what no working driver does: the vif is disabled (XSA-39)
FATAL: dict[str, tuple[Slots, str]] = {
    "one slot leaves its page": (lambda f: [f.slot(4000, offset=97)], "leaves its page"),
    "size 65535 in one slot": (lambda f: [f.slot(65535)], "leaves its page"),
    "offset 65535": (lambda f: [f.slot(64, offset=65535)], "leaves its page"),
    "offset + size wraps at 16 bits": (lambda f: [f.slot(100, offset=65500)], "leaves its page"),
    "a later fragment leaves its page": (
        lambda f: [f.slot(4200, MORE), f.slot(4000, offset=200)], "leaves its page",
    ),
    "the first fragment leaves its page": (
        lambda f: [f.slot(5000, MORE), f.slot(100)], "leaves its page",
    ),
    "more data, no slot": (lambda f: [f.slot(1000, MORE)], "more data"),
    "more data for 20 slots": (lambda f: [f.slot(1000, MORE)] + [f.slot(10, MORE)] * 20, "more than 20 slots"),
    "more data for a ring": (lambda f: [f.slot(1000, MORE)] + [f.slot(10, MORE)] * 255, "more than 20 slots"),
    "whole pages, endless": (lambda f: [f.slot(65535, MORE)] + [f.slot(4096, MORE)] * 30, "more than 20 slots"),
    "extra, no slot": (lambda f: [f.slot(1000, EXTRA)], "an extra slot is announced"),
    "extra of type 0": (lambda f: [f.slot(1000, EXTRA), f.extra(0)], "extra slot of type 0"),
    "extra of type 5": (lambda f: [f.slot(1000, EXTRA), f.extra(5)], "extra slot of type 5"),
    "extra of type 255": (lambda f: [f.slot(1000, EXTRA), f.extra(255)], "extra slot of type 255"),
    "endless extras": (lambda f: [f.slot(1000, EXTRA)] + [gso(f, more=1)] * 255, "more than 4 extra slots"),
    "five extras": (lambda f: [f.slot(1000, EXTRA)] + [gso(f, more=1)] * 4 + [gso(f)], "more than 4 extra slots"),
    "GSO of size 0": (lambda f: [f.slot(1000, EXTRA), gso(f, size=0)], "segments of 0 bytes"),
    "GSO of type 0": (lambda f: [f.slot(1000, EXTRA), gso(f, 0)], "GSO of type 0"),
    "GSO of type 3": (lambda f: [f.slot(1000, EXTRA), gso(f, 3)], "GSO of type 3"),
    "announced extra after more extras": (lambda f: [f.slot(1000, EXTRA), gso(f, more=1)], "an extra slot is announced"),
}  # fmt: skip


@pytest.mark.parametrize("name", FATAL)
def test_what_only_an_attacker_does_disables_the_vif(case: Case, name: str) -> None:
    """Goal: Closed with a reason, no frame of it on the bridge.  Method: the table, behind a good frame and alone."""
    make, reason = FATAL[name]
    case.front.send(*make(case.front))
    assert case.arrived() == []
    case.check_closed(reason)


# what cannot be used, and is answered: (slots, statuses)
WRONG: dict[str, tuple[Slots, list[int]]] = {
    "gref 0": (lambda f: [f.slot(gref=0)], [ERROR]),
    "unused gref": (lambda f: [f.slot(gref=100000)], [ERROR]),
    "huge gref": (lambda f: [f.slot(gref=HUGE)], [ERROR]),
    "somebody else's": (lambda f: [f.slot(gref=f.domain.grants.grant_access(f.domain.domid, f.tx.pfn))], [ERROR]),
    "frame that is not there": (lambda f: [f.slot(gref=f.grant(f.domain.memory.pages))], [ERROR]),
    "size 0": (lambda f: [f.slot(0)], [ERROR]),
    "size 13": (lambda f: [f.slot(13)], [ERROR]),
    "fragments larger than the packet": (lambda f: [f.slot(100, MORE), f.slot(101)], [ERROR] * 2),
    "sizes that wrap": (lambda f: [f.slot(100, MORE)] + [f.slot(4096, MORE)] * 15 + [f.slot(4095)], [ERROR] * 17),
    "19 slots": (lambda f: [f.slot(1900, MORE)] + [f.slot(10, MORE)] * 17 + [f.slot(10)], [ERROR] * 19),
    "20 slots": (lambda f: [f.slot(1900, MORE)] + [f.slot(10, MORE)] * 18 + [f.slot(10)], [ERROR] * 20),
    "one fragment not granted": (lambda f: [f.slot(1000, MORE), f.slot(100, gref=0)], [ERROR] * 2),
    "first fragment not granted": (lambda f: [f.slot(1000, MORE, gref=0), f.slot(100)], [ERROR] * 2),
    "blank checksum of what has none": (lambda f: [f.slot(flags=BLANK)], [ERROR]),
    "GSO of what is not TCP": (lambda f: [f.slot(flags=EXTRA | BLANK), gso(f)], [ERROR, NULL]),
    "GSO with bad grant": (lambda f: [f.slot(flags=EXTRA | BLANK, gref=0), gso(f)], [ERROR, NULL]),
    "four extras": (
        lambda f: [f.slot(flags=EXTRA | BLANK)] + [gso(f, more=1)] * 3 + [gso(f, 2)], [ERROR] + [NULL] * 4,
    ),
    "a ring of nonsense grefs": (lambda f: [f.slot(gref=HUGE - i) for i in range(256)], [ERROR] * 256),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_used_is_answered(case: Case, name: str) -> None:
    """Goal: an answer for each slot in its place, no frame, and the vif goes on.  Method: the table."""
    make, statuses = WRONG[name]
    assert [status for _, status in case.front.send(*make(case.front))] == statuses
    assert case.arrived() == [] and case.vif.states() == ("4", "4")
    assert sum(case.vif.back.queues[0].tx.statistics.drops.values()) > 0
    assert case.works()


def test_headers_over_many_slots(case: Case) -> None:
    """Goal: headers scattered over one-byte slots are looked at in one piece (XSA-423); empty slots need no grant (XSA-448).
    Method: a UDP frame to be completed in 17 slots of a byte and the rest; then with empty fragments among them."""
    front, frame = case.front, Frame(4, 17, b"x" * 60).packed
    front.page[: len(frame)] = frame
    rest = len(frame) - 17
    slots = [front.slot(len(frame), MORE | BLANK, 0, offset=rest)]
    slots[0] = front.slot(len(frame), MORE | BLANK, 0, offset=0)
    slots += [front.slot(1, MORE, i, offset=i) for i in range(1, 17)] + [front.slot(rest, 0, 17, offset=17)]
    assert front.send(*slots) == [(i, OKAY) for i in range(18)]
    assert case.arrived() == [frame]
    slots = [front.slot(len(frame), MORE | BLANK, 0, gref=HUGE), front.slot(0, MORE, 1, gref=0)]
    slots += [front.slot(len(frame), MORE, 2), front.slot(0, 0, 3, gref=HUGE, offset=4096)]
    assert front.send(*slots) == [(i, OKAY) for i in range(4)]
    assert case.arrived() == [frame]


INDICES = {
    "a ring and one": 257, "half the numbers": 1 << 31, "just over half": (1 << 31) + 1, "one back": HUGE, "a lot": 1000,
}  # fmt: skip


@pytest.mark.parametrize("which", ["tx", "rx"])
@pytest.mark.parametrize("name", INDICES)
def test_req_prod_jumps(case: Case, which: str, name: str) -> None:
    """Goal: an index that cannot be closes the vif, noticed by event or by a poll.  Method: the table, on each ring."""
    ring = getattr(case.front, which)
    ring.words[REQ_PROD] = (ring.words[REQ_PROD] + INDICES[name]) & HUGE
    case.vif.bridge.send(FRAME)
    case.world.run()
    case.front.notify()
    case.world.run()
    case.check_closed("req_prod is")


@pytest.mark.parametrize("start", [0, 1, 255, HUGE, HUGE - 100, 1 << 31])
def test_rings_that_begin_anywhere(start: int) -> None:
    """Goal: a ring need not begin at 0, and indices wrap.  Method: 700 frames from each start, answered in order."""
    case = Case(start=start)
    case.front.connect()
    for i in range(7):
        idents = [i * 100 + j for j in range(100)]
        assert case.front.send(*[case.front.slot(ident=ident) for ident in idents]) == [(ident, OKAY) for ident in idents]
    assert case.arrived() == [FRAME] * 700
    case.front.tx.words[RSP_PROD] = 12345  # the backend reads it only once, when it attaches
    assert case.front.domain.events.send(case.front.port) == 0
    case.world.settle()
    case.check_harmless()
    case.check_nothing_left()


class Producing(Dropping):
    """A frontend on another CPU: while a frame is being written, the next one appears on the ring."""

    def __init__(self, inner: MemoryPort) -> None:
        super().__init__(inner, self.more)
        self.front: ScriptedFront | None = None
        self.left = 5000
        self.in_turn = self.most_in_turn = 0

    def more(self, n: int) -> bool:
        if self.front is not None and self.left:
            self.left -= 1
            self.in_turn += 1
            self.most_in_turn = max(self.most_in_turn, self.in_turn)
            self.front.tx.put(self.front.slot())
        return True


def test_a_frontend_that_never_stops_producing() -> None:
    """Goal: a bounded number of frames per turn, so others get theirs.  Method: each write puts another request."""
    ports: list[Producing] = []

    def wrap(port: MemoryPort) -> FramePort:
        ports.append(Producing(port))
        return ports[0]

    case = Case(host_side=wrap)
    case.front.connect()
    ports[0].front = case.front
    case.front.tx.put(*[case.front.slot()] * 100)
    case.front.notify(settle=False)
    turns = 0
    while case.world.hypervisor.deliver(turns=1):
        ports[0].in_turn = 0
        turns += 1
        assert turns < 1000
        if turns == 5:
            assert ports[0].left, "one turn is all it got"
    assert not ports[0].left and ports[0].most_in_turn <= 3 * 256
    case.check_harmless()
    case.check_nothing_left()


def test_an_event_storm(case: Case) -> None:
    """Goal: events without work cost one look each, merged while one is pending.  Method: 10000 events in 10 bursts."""
    channel = case.world.dom0.events.channels[case.vif.back.queues[0].tx.port]
    before = channel.notified
    for _ in range(10):
        for _ in range(1000):
            case.front.notify(settle=False)
        case.world.settle()
    assert channel.notified - before == 10
    assert case.works()


def test_other_vifs_get_their_turn_in_a_storm(case: Case) -> None:
    """Goal: a full ring and a storm of events delay others by turns, not for good.  Method: frames of both at once."""
    for i in range(256):
        case.front.tx.put(case.front.slot(ident=i))
    case.front.notify(settle=False)
    case.other.kernel.send(FRAME)
    case.world.poll()
    for _ in range(10):
        case.front.notify(settle=False)
        case.world.hypervisor.deliver(turns=1)
        if case.other.bridge.receive():
            break
    else:
        raise AssertionError("starved")
    case.world.settle()
    assert len(case.arrived()) == 256


def test_a_grant_that_is_taken_back(case: Case) -> None:
    """Goal: what was granted a moment ago and is not now is an error, in both directions; no frame is written there.
    Method: revoke before the event; receive pages revoked between two frames of a batch's lookups."""
    front = case.front
    gref, view = front.data_page(FRAME)
    assert front.send(front.slot(gref=gref)) == [(0, OKAY)]
    assert front.domain.grants.end_access(gref), "nothing stays mapped"
    assert front.send(front.slot(gref=gref)) == [(0, ERROR)]
    pages = [front.data_page() for _ in range(60)]
    front.post(*(gref for gref, _ in pages))
    case.vif.to_guest(FRAME)
    assert front.received() == [(0, 0, 0, len(FRAME))] and bytes(pages[0][1][: len(FRAME)]) == FRAME
    for gref, _ in pages[1:4]:
        assert front.domain.grants.end_access(gref)
    case.vif.to_guest(FRAME)
    assert front.received() == [(1, 0, 0, -1), (2, 0, 0, -1), (3, 0, 0, -1), (4, 0, 0, len(FRAME))]
    assert not any(bytes(view) != bytes(PAGE_SIZE) for _, view in pages[1:4]) and view[0] == FRAME[0]
    case.arrived()


@pytest.mark.parametrize("kind", ["readonly", "other domain", "nonsense"])
def test_receive_pages_that_are_none(case: Case, kind: str) -> None:
    """Goal: each is answered with an error and nothing is written anywhere.  Method: a ring full of them, then good ones."""
    front = case.front
    grefs = {
        "readonly": lambda: front.data_page(readonly=True)[0],
        "other domain": lambda: front.domain.grants.grant_access(front.domain.domid, front.tx.pfn),
        "nonsense": lambda: HUGE,
    }[kind]
    front.post(*(grefs() for _ in range(200)))
    before = bytes(front.tx.page)
    for _ in range(5):
        case.vif.to_guest(FRAME)
    assert {status for *_, status in front.received()} == {-1}
    assert bytes(front.tx.page) == before
    good = [front.data_page() for _ in range(60)]
    front.post(*(gref for gref, _ in good))
    case.vif.to_guest(FRAME)
    assert (len(FRAME)) in {status for *_, status in front.received()}
    case.arrived()


def test_slots_that_change_after_they_were_taken() -> None:
    """Goal: a slot is copied once; what the ring says later does not matter (XSA-155).
    Method: the interface rewrites every slot of the ring while the first frame is written to it."""
    fronts: list[ScriptedFront] = []

    def rewrite(n: int) -> bool:
        for index in range(256):
            fronts[0].tx.place(index, TX_REQUEST.pack(HUGE, 0xFFFF, MORE | EXTRA, 99, 0xFFFF))
        return False

    case = Case(host_side=lambda port: Dropping(port, rewrite))
    fronts.append(case.front.connect())
    assert case.front.send(*[case.front.slot(ident=i) for i in range(10)]) == [(i, OKAY) for i in range(10)]
    assert case.arrived() == [FRAME] * 10
    case.check_harmless()
    case.check_nothing_left()


SLOT = st.one_of(
    st.binary(min_size=12, max_size=12),
    st.builds(
        TX_REQUEST.pack,
        st.sampled_from([0, 9, 522, 524, 524, 524, HUGE]),
        st.sampled_from([0, 1, 96, 4095, 4096, 65535]),
        st.integers(0, 15),
        st.integers(0, 65535),
        st.sampled_from([0, 1, 13, 14, 512, 4000, 4096, 8192, 65535]),
    ),
    st.builds(
        lambda kind, more, size, gso_type: bytes([kind, more]) + size.to_bytes(2, "little") + bytes([gso_type]) + bytes(7),
        st.integers(0, 6), st.integers(0, 1), st.sampled_from([0, 1, 1448, 65535]), st.integers(0, 3),
    ),
)  # fmt: skip


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.lists(SLOT, min_size=1, max_size=40), min_size=1, max_size=4), st.integers(0, 3))
def test_arbitrary_slots(batches: list[list[bytes]], heads: int) -> None:
    """Goal: no slots whatever raise anything, answer more than was asked, or leave something behind.
    Method: hypothesis, over pages that hold TCP and UDP frames, so that flags can be true."""
    case = Case()
    front = case.front
    frame = Frame(6 if heads & 1 else 4, 17 if heads & 2 else 6, bytes(400)).packed
    front.page[: len(frame)] = frame
    front.connect()
    for batch in batches:
        answers = front.send(*batch)
        if case.vif.states()[1] == "6":
            assert case.error
            break
        assert len(answers) == len(batch)
        assert {status for _, status in answers} <= {OKAY, ERROR, NULL}
    case.check_harmless()
    case.check_nothing_left()
