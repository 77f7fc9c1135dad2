"""Goal: whatever a backend writes into rings and nodes, netfront loses that vif at most, and the guest's memory is safe.
Method: a scripted backend beside a second vif with real drivers that must go on working. Tables name the responses, indices
and nodes that have hurt real frontends (XSA-376, 391, 396, 403); hypothesis makes arbitrary ones. After each case the text
in the error node, the guest's footprint and the model's invariants are looked at."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netdev.faulty import Dropping
from netdev.netfront import Hash, Want
from tests.netdev.hostile import HUGE, BackCase
from tests.netdev.scripted import FRAME
from xenmodel.memory import GuestMemory
from xenmodel.public.io.netif import RX_RESPONSE, NETRXF_csum_blank, NETRXF_extra_info, NETRXF_more_data
from xenmodel.public.io.ring import RSP_PROD
from xenmodel.types import PAGE_SIZE

EXTRA, MORE, BLANK = NETRXF_extra_info, NETRXF_more_data, NETRXF_csum_blank


@pytest.fixture
def case() -> Iterator[BackCase]:
    it = BackCase()
    it.back.connect()
    assert it.vif.states() == ("4", "4") and it.front.link_up, it.vif.errors()
    yield it
    it.check_harmless()
    it.check_nothing_left()


Slots = list[tuple[int, int, int, int] | bytes]


def extra(kind: int, more: int = 0, rest: bytes = b"") -> bytes:
    return bytes([kind, more]) + rest.ljust(6, b"\0")


# responses of the receive ring that no working backend gives, from slot 0 on
FATAL: dict[str, tuple[Slots, str]] = {
    "another slot's id": ([(1, 0, 0, 100)], "in the slot of request 0"),
    "no id": ([(65535, 0, 0, 100)], "in the slot of request 0"),
    "an id twice": ([(0, 0, 0, 100), (0, 0, 0, 100)], "id 0"),
    "an id twice in a packet": ([(0, 0, MORE, 100), (0, 0, 0, 100)], "id 0"),
    "leaves its page": ([(0, 1, 0, 4096)], "bytes at 1"),
    "offset beyond": ([(0, 65535, 0, 100)], "at 65535"),
    "size beyond": ([(0, 0, 0, 4097)], "4097 bytes at 0"),
    "size 32767": ([(0, 0, 0, 32767)], "32767 bytes"),
    "a later fragment leaves its page": ([(0, 0, MORE, 100), (1, 4000, 0, 97)], "leaves its page"),
    "endless more data": ([(i, 0, MORE, 4096) for i in range(256)], "more than 20 slots"),
    "endless empty fragments": ([(i, 0, MORE, 0) for i in range(256)], "more than 20 slots"),
    "endless errors": ([(i, 0, MORE, -1) for i in range(256)], "more than 20 slots"),
    "endless extras": ([(0, 0, EXTRA, 100)] + [extra(1, 1, b"\1\0\1")] * 255, "more than 4 extra"),
    "extra of type 0": ([(0, 0, EXTRA, 100), extra(0)], "extra slot of type 0"),
    "extra of type 9": ([(0, 0, EXTRA, 100), extra(9)], "extra slot of type 9"),
    "GSO of size 0": ([(0, 0, EXTRA, 100), extra(1, 0, b"\0\0\1")], "segments of 0 bytes"),
    "GSO of type 7": ([(0, 0, EXTRA, 100), extra(1, 0, b"\1\0\7")], "GSO of type 7"),
}


@pytest.mark.parametrize("before", [0, 250])
@pytest.mark.parametrize("name", FATAL)
def test_what_no_working_backend_answers(case: BackCase, name: str, before: int) -> None:
    """Goal: given up with a reason, no frame delivered.  Method: the table, at the start of the ring and where it wraps."""
    slots, reason = FATAL[name]
    case.give(*((i, 0, 0, 100) for i in range(before)))
    if before:
        slots = [slot if isinstance(slot, bytes) else ((slot[0] + before) & 255, *slot[1:]) for slot in slots]
        reason = reason.replace("request 0", f"request {before}").replace("id 0", f"id {before}")
    case.give(*slots)
    case.check_closed(reason)


WRONG: dict[str, Slots] = {
    "an error": [(0, 0, 0, -1)],
    "dropped": [(0, 0, 0, -2)],
    "nothing": [(0, 0, 0, 0)],
    "13 bytes": [(0, 0, 0, 13)],
    "an error in the middle": [(0, 0, MORE, 100), (1, 0, MORE, -1), (2, 0, 0, 100)],
    "blank checksum of nothing": [(0, 0, BLANK, 100)],
    "GSO of nothing": [(0, 0, EXTRA | BLANK, 100), extra(1, 0, b"\xa8\5\1")],
    "hash, and blank": [(0, 0, EXTRA | BLANK, 100), extra(4, 0, bytes(6))],
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_dropped_and_counted(case: BackCase, name: str) -> None:
    """Goal: no frame, one drop, the pages posted again, and the vif goes on.  Method: the table."""
    assert case.give(*WRONG[name]) == []
    assert sum(case.front.queues[0].rx.statistics.drops.values()) == 1
    count = len(WRONG[name])
    assert [ident for ident, _ in case.back.take_pages()] == list(range(count))
    case.back.give([RX_RESPONSE.pack(i, 0, 0, 64) for i in range(count, 20)])
    assert case.arrived() == [bytes(64)] * (20 - count) and case.front.connected


def test_a_packet_in_two_parts(case: BackCase) -> None:
    """Goal: a packet that is not published as a whole waits for its rest.  Method: a slot at a time, an extra among them."""
    case.back.take_pages()
    for slot in [RX_RESPONSE.pack(0, 0, MORE | EXTRA, 100), extra(4), RX_RESPONSE.pack(2, 0, MORE, 50)]:
        case.back.give([slot])
        assert case.arrived() == []
    case.back.give([RX_RESPONSE.pack(3, 0, 0, 7)])
    assert case.arrived() == [bytes(157)]


TX_LIES: dict[str, tuple[list[tuple[int, int]], str]] = {
    "id that is not out": ([(3, 0)], "id 3, which is not out"),
    "id beyond the ring": ([(256, 0)], "id 256"),
    "id 65535": ([(65535, -1)], "id 65535"),
    "an id twice": ([(0, 0), (0, 0)], "id 0, which is not out"),
}


@pytest.mark.parametrize("name", TX_LIES)
def test_lies_about_what_was_sent(case: BackCase, name: str) -> None:
    """Goal: an id comes back once, and only if it is out (XSA-391).  Method: three frames out, the table."""
    answers, reason = TX_LIES[name]
    for _ in range(3):
        case.vif.to_bridge(FRAME)
    assert [slot[3] for slot in case.back.take()] == [0, 1, 2]
    case.back.answer(*answers)
    case.vif.to_bridge(FRAME)  # responses may wait until something is sent
    case.check_closed(reason)


def test_a_lie_and_a_frame_in_one_event(case: BackCase) -> None:
    """Goal: who was given up delivers nothing more.  Method: both rings of one event channel, the lie is seen first."""
    case.back.take_pages()
    case.back.rx.put_responses(RX_RESPONSE.pack(0, 0, 0, 100))
    case.back.rx.push_responses()
    case.back.tx.words[RSP_PROD] = 1000
    case.back.notify()
    assert case.arrived() == []
    case.check_closed("rsp_prod is")


def test_null_for_everything_stops_that_queue_only(case: BackCase) -> None:
    """Goal: pages that are never given back are never sent again.  Method: NULL as the answer to real frames."""
    for _ in range(10):
        for _ in range(100):
            case.vif.kernel.send(FRAME)
        case.world.run()
        case.back.answer(*((slot[3], 1) for slot in case.back.take()))
    sent = case.front.queues[0].tx.statistics.packets
    assert sent <= 256 and case.front.connected


INDICES = {"a ring and one": 257, "half the numbers": 1 << 31, "one back": HUGE, "a lot": 1000}


@pytest.mark.parametrize("told", ["event", "poll"])
@pytest.mark.parametrize("which", ["tx", "rx"])
@pytest.mark.parametrize("name", INDICES)
def test_rsp_prod_jumps(case: BackCase, which: str, name: str, told: str) -> None:
    """Goal: an index that cannot be ends the vif, also if it is found by a poll of the host, without any event.
    Method: the table, on each ring."""
    ring = getattr(case.back, which)
    ring.words[RSP_PROD] = (ring.words[RSP_PROD] + INDICES[name]) & HUGE
    if told == "event" or which == "rx":
        case.back.notify()
    for _ in range(250):  # it looks when it needs room
        case.vif.kernel.send(FRAME)
    case.world.run()
    case.check_closed("rsp_prod is")


def test_a_full_ring_and_a_jump(case: BackCase) -> None:
    """Goal: the last look before a poll gives up finds a lie too.  Method: no answers until BLOCKED, then an index."""
    for _ in range(300):
        case.vif.kernel.send(FRAME)
    case.world.run()
    case.back.tx.words[RSP_PROD] = 5000
    case.vif.kernel.send(FRAME)
    case.world.run()
    case.check_closed("rsp_prod is")


def test_an_event_storm(case: BackCase) -> None:
    """Goal: events without responses cost one look each, merged while one is pending; after a lie, none at all.
    Method: 10000 events in 10 bursts, counted at the guest's port (XSA-391)."""
    port = case.front.queues[0].ports[0]
    channel = case.world.guest.events.channels[port]
    before = channel.notified
    for _ in range(10):
        for _ in range(1000):
            case.back.notify(settle=False)
        case.world.settle()
    assert channel.notified - before == 10
    case.give((7, 0, 0, 100))
    case.check_closed("id 7")
    assert port not in case.world.guest.events.channels


def test_a_backend_that_never_stops_answering() -> None:
    """Goal: a bounded number of frames per turn.  Method: each frame delivered makes the backend answer another page."""
    cases: list[BackCase] = []
    in_turn = [0, 0]

    def answer_more(n: int) -> bool:
        back = cases[0].back
        back.take_pages()
        if n < 5000 and back.rx.rsp_prod_pvt != back.rx.req_cons:
            at = back.rx.rsp_prod_pvt & 255
            back.rx.put_responses(RX_RESPONSE.pack(at, 0, 0, 64))
            back.rx.push_responses()
        in_turn[0] += 1
        in_turn[1] = max(in_turn)
        return True

    cases.append(BackCase(guest_side=lambda port: Dropping(port, answer_more)))
    case = cases[0]
    case.back.connect()
    case.back.take_pages()
    case.back.rx.put_responses(b"".join(RX_RESPONSE.pack(i, 0, 0, 64) for i in range(100)))
    case.back.rx.push_responses()
    case.back.notify(settle=False)
    while case.world.hypervisor.deliver(turns=1):
        in_turn[0] = 0
    assert 100 < in_turn[1] <= 3 * 256 and case.front.connected, case.error
    case.check_harmless()
    case.check_nothing_left()


def test_a_backend_that_never_unmaps() -> None:
    """Goal: pages that a backend keeps are not used again and not given to anybody (XSA-396).
    Method: rings and all pages mapped and kept over a detach; then the guest takes all the memory it can get."""
    case = BackCase()
    others = set(case.world.guest.grants.active)
    assert len(others) == 1 + 2, "the store's page, and the other vif's rings"
    case.back.connect()
    queue = case.front.queues[0]
    pages = [queue.tx.ring_page, queue.rx.ring_page, queue.tx.pages, queue.rx.pages]
    kept = {pages[0].pfn, pages[1].pfn, queue.tx.pages.pfn + 5, queue.rx.pages.pfn + 9}
    grefs = {pages[0].grefs[0], pages[1].grefs[0], queue.tx.pages.grefs[5], queue.rx.pages.grefs[9]}
    case.back.map(queue.rx.pages.grefs[9])
    case.back.map(queue.tx.pages.grefs[5], readonly=True)
    front = case.front
    case.world.toolstack.detach_vif(case.world.guest.domid, case.vif.devid)
    case.world.settle()
    case.back.set("state", 6)
    assert front.quarantined == 1 and case.vif.front_node not in case.world.fronts.devices
    assert set(case.world.guest.grants.active) == grefs | others
    memory: GuestMemory = case.world.guest.memory
    taken = set()
    while memory.free_pages:
        taken.add(memory.allocate())
    assert not taken & kept
    for pfn in taken:
        memory.release(pfn)
    case.check_harmless()
    case.back.close()
    assert set(case.world.guest.grants.active) == others
    case.world.close()


def test_reconnects_to_a_backend_that_never_unmaps() -> None:
    """Goal: each reconnect costs the guest what the backend keeps, until memory is short: then this vif ends, with a text.
    Method: a backend that says the right states and unmaps nothing, in a guest of 64 MiB."""
    case = BackCase()
    front = case.front
    case.back.connect()
    for _ in range(40):
        front.reconnect()
        case.world.settle()
        case.back.set("state", 5)
        case.back.set("state", 6)
        case.back.offer()
        if front.broken:
            break
        case.back.map_rings()
        case.back.map(front.queues[0].tx.pages.grefs[0], readonly=True)
        case.back.map(front.queues[0].rx.pages.grefs[0])
        case.back.set("state", 4)
    else:
        raise AssertionError("where does it take the memory from?")
    assert front.quarantined > 10
    assert "contiguous free frames" in case.error or "grant references" in case.error, case.error
    assert case.other.works()
    case.world.close()


def test_an_untrusted_backend_sees_nothing_else() -> None:
    """Goal: with trusted=0, a granted page shows the frame that is in it, and zeroes (XSA-403).
    Method: large secret frames first, then small ones in the same pages; the backend looks at whole pages."""
    case = BackCase(trusted=False)
    case.back.connect(feature_sg=1)
    for i in range(64):
        case.vif.kernel.send(b"secret" * 200)
        case.world.run()
        case.back.answer(*((slot[3], 0) for slot in case.back.take()))
        assert len(case.arrived()) == 0, i
    for _ in range(260):
        case.vif.kernel.send(FRAME[:60])
        case.world.run()
        for gref, offset, _, ident, size in case.back.take():
            assert (offset, size) == (0, 60)
            assert case.back.look(gref) == FRAME[:60].ljust(PAGE_SIZE, b"\0")
            case.back.answer((ident, 0))
    pages = case.back.take_pages()
    for gref in (gref for _, gref in pages[:5]):
        case.back.fill(gref, b"from outside" * 300)
    case.back.give([RX_RESPONSE.pack(i, 0, 0, 60) for i in range(5)])
    for _, gref in pages[:5]:
        assert not any(case.back.look(gref)), "posted again, and clean"
    assert len(case.arrived()) == 5
    case.check_harmless()
    case.check_nothing_left()


def test_a_control_ring_that_is_never_answered() -> None:
    """Goal: frames flow all the same, and closing tells what was asked that nothing came of it.
    Method: a backend that offers feature-ctrl-ring and does not look at it."""
    case = BackCase(want=Want(hash=Hash(15, bytes(40), (0,))))
    case.back.connect(feature_ctrl_ring=1)
    front = case.front
    assert front.ctrl is not None and front.hash_status is None and front.link_up
    assert case.give((0, 0, 0, 64)) == [bytes(64)]
    case.check_harmless()
    case.check_nothing_left()
    assert front.ctrl is None


RESPONSE = st.one_of(
    st.binary(min_size=8, max_size=8),
    st.tuples(
        st.sampled_from([0, 1, 4095, 4096]), st.integers(0, 31), st.sampled_from([-1, 0, 13, 14, 64, 4000, 4096, 5000])
    ),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(RESPONSE, min_size=1, max_size=30), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 12), st.integers(-3, 3)), max_size=8),
)
def test_arbitrary_responses(batches: list[list[bytes | tuple[int, int, int]]], answers: list[tuple[int, int]]) -> None:
    """Goal: no responses whatever raise anything, or leave something behind.  Method: hypothesis; ids are mostly right, so
    that what follows is looked at too."""
    case = BackCase()
    case.back.connect()
    for _ in range(5):
        case.vif.kernel.send(FRAME)
    case.world.run()
    case.back.take()
    case.back.take_pages()
    if len(answers) <= 5:
        case.back.answer(*answers)
    for batch in batches:
        at = case.back.rx.rsp_prod_pvt
        case.back.give(
            slot if isinstance(slot, bytes) else RX_RESPONSE.pack((at + i) & 255, *slot) for i, slot in enumerate(batch)
        )
        case.vif.to_bridge(FRAME)
    if case.front.broken:
        assert case.error
    else:
        assert case.front.connected
    case.check_harmless()
    case.check_nothing_left()


