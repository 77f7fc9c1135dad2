"""Goal: whatever a frontend writes into its nodes, and in whatever order its states come, netback closes that vif at most.
Method: a scripted frontend beside a second vif with real drivers that must go on working. Every key that netback reads is
wrong once, in each way that a number can be; states flap, each of them seen or only the last (XSA-350)."""

from __future__ import annotations

import pytest

from netdev.netback import Offer
from tests.netdev.hostile import HUGE, OKAY, Case, connected_case
from tests.netdev.scripted import FRAME, ScriptedFront
from xenmodel.types import PAGE_SIZE

case = connected_case

# key -> (value, what the error says; "" if it is none of our business)
NODES: dict[str, tuple[dict[str, str | int | None], str]] = {
    "no tx ring": ({"tx_ring_ref": None}, "tx-ring-ref is missing"),
    "no rx ring": ({"rx_ring_ref": None}, "rx-ring-ref is missing"),
    "tx ring of nothing": ({"tx_ring_ref": 100000}, "tx-ring-ref: grant 100000"),
    "rx ring of nothing": ({"rx_ring_ref": HUGE}, f"rx-ring-ref: grant {HUGE}"),
    "the console's page": ({"tx_ring_ref": 0}, "tx-ring-ref: grant 0"),
    "tx ring is text": ({"tx_ring_ref": "ring"}, "not a number"),
    "tx ring is empty": ({"tx_ring_ref": ""}, "not a number"),
    "rx ring is negative": ({"rx_ring_ref": "-1"}, "not a number"),
    "rx ring is too large": ({"rx_ring_ref": 2**32}, "outside"),
    "rx ring of many digits": ({"rx_ring_ref": "9" * 1000}, "not a number"),
    "no event channel": ({"event_channel": None}, "event-channel: port 0"),
    "event channel of nothing": ({"event_channel": 4000}, "event-channel: port 4000"),
    "event channel is text": ({"event_channel": "0x10"}, "not a number"),
    "event channel beyond": ({"event_channel": HUGE}, f"port {HUGE}"),
    "split, and only tx": ({"event_channel_tx": 4000}, "event-channel-tx: port 4000"),
    "flips pages": ({"request_rx_copy": 0}, "request-rx-copy is not 1"),
    "rx-copy is missing": ({"request_rx_copy": None}, "request-rx-copy is not 1"),
    "rx-copy is text": ({"request_rx_copy": "yes"}, "not a number"),
    "no queues": ({"multi_queue_num_queues": 0}, "multi-queue-num-queues is 0"),
    "too many queues": ({"multi_queue_num_queues": 2}, "multi-queue-num-queues is 2"),
    "a lot of queues": ({"multi_queue_num_queues": HUGE}, "1..1 are offered"),
    "queues is text": ({"multi_queue_num_queues": "\xff\xfe"}, "not a number"),
    "rx-notify is text": ({"feature_rx_notify": "x"}, "not a number"),
    "sg is text": ({"feature_sg": "x"}, "not a number"),
    "gso4 is text": ({"feature_gso_tcpv4": "x"}, "not a number"),
    "gso6 is text": ({"feature_gso_tcpv6": "-"}, "not a number"),
    "csum6 is text": ({"feature_ipv6_csum_offload": " 1"}, "not a number"),
    "no-csum is text": ({"feature_no_csum_offload": "1 "}, "not a number"),
    "multicast is text": ({"request_multicast_control": "?"}, "not a number"),
    "control ring of nothing": ({"ctrl_ring_ref": 77}, "ctrl-ring-ref: grant 77"),
    "control ring is text": ({"ctrl_ring_ref": "x"}, "not a number"),
    "control ring without port": ({"ctrl_ring_ref": "="}, "event-channel-ctrl: port 0"),
}


@pytest.mark.parametrize("name", NODES)
def test_nodes_that_make_no_sense(name: str) -> None:
    """Goal: every key that netback reads is checked; nothing stays mapped or bound.  Method: one wrong key at a time."""
    changes, reason = NODES[name]
    case = Case()
    if changes.get("ctrl_ring_ref") == "=":
        changes = {"ctrl_ring_ref": case.front.gref}
    case.front.connect(**changes)
    assert reason in case.error, case.error
    assert case.vif.states()[1] == "6"
    assert not [m for m in case.world.for_devices.mappings() if m.ref in (case.front.tx.gref, case.front.rx.gref)]
    case.check_harmless()
    case.check_nothing_left()


def test_split_event_channels_that_were_not_offered() -> None:
    """Goal: only what was offered.  Method: good channels, an offer without them."""
    case = Case(offer=Offer(split=False))
    rx = case.front.domain.events.alloc_unbound(case.front.peer)
    case.front.connect(event_channel=None, event_channel_tx=case.front.port, event_channel_rx=rx)
    assert "split event channels are not offered" in case.error
    case.check_harmless()
    case.check_nothing_left()


def test_queues_of_nonsense() -> None:
    """Goal: the third of four queues is wrong, and the first two are undone.  Method: four queues with the same rings are
    fine to look at, only their port is not."""
    case = Case(queues=4)
    front = case.front
    for i in range(4):
        port = front.domain.events.alloc_unbound(front.peer)
        for key, value in (("tx-ring-ref", front.tx.gref), ("rx-ring-ref", front.rx.gref),
                           ("event-channel", port if i < 2 else 4000)):  # fmt: skip
            front.set(f"queue-{i}/{key}", value, settle=False)
    front.connect(multi_queue_num_queues=4)
    assert "queue-2/event-channel: port 4000" in case.error
    rings = {front.tx.gref, front.rx.gref}
    assert not [m for m in case.world.for_devices.mappings() if m.ref in rings], "the first two are still mapped"
    case.check_harmless()
    case.check_nothing_left()


@pytest.mark.parametrize("both", [("tx_ring_ref", "rx"), ("rx_ring_ref", "tx")])
def test_both_rings_in_one_page(both: tuple[str, str]) -> None:
    """Goal: rings that overlap are the guest's own loss.  Method: one page for both, frames and events."""
    case = Case()
    case.front.connect(**{both[0]: getattr(case.front, both[1]).gref})
    for _ in range(5):
        case.front.send(case.front.slot(ident=1), case.front.slot(ident=2))
        case.vif.to_guest(FRAME)
    case.check_harmless()
    case.check_nothing_left()


def test_a_ring_that_is_its_own_data(case: Case) -> None:
    """Goal: a guest that has the ring itself overwritten by frames harms itself.  Method: ring pages posted for frames."""
    front = case.front
    front.post(*[front.grant(front.rx.pfn), front.grant(front.tx.pfn)] * 40)
    for _ in range(20):
        case.vif.to_guest(b"\xff" * 1000, b"\xff" * PAGE_SIZE)
        front.notify()
    case.arrived()


STATES = [4, 5, 6, 1, 4, 6, 4, 1, 3, 4, 5, 4, 2, 7, 8, 0, 6, 5, 1, 4]


@pytest.mark.parametrize("settle", [True, False])
@pytest.mark.parametrize("first", range(0, len(STATES), 3))
def test_flapping_states(settle: bool, first: int) -> None:
    """Goal: states in any order leave one device in one state (XSA-350).  Method: each seen, or only the last of many."""
    case = Case()
    case.front.connect()
    for state in STATES[first:] + STATES[:first]:
        case.front.set("state", state, settle=settle)
        if settle:
            case.front.tx.put(case.front.slot())
            case.front.notify()
            case.vif.to_guest(FRAME)
    case.world.run()
    assert len(case.world.for_devices.mappings()) <= 4, "at most two pairs of rings are mapped"
    case.check_harmless()
    case.check_nothing_left()


@pytest.mark.parametrize("state", ["", "99", "-1", "four", "4\0", "\xff"])
def test_a_state_that_is_none(case: Case, state: str) -> None:
    case.front.set("state", state)
    assert "state is" in case.error and case.vif.states()[1] == "6"


def test_the_same_nodes_again_after_a_failure(case: Case) -> None:
    """Goal: a frontend that was closed for its nonsense may begin anew.  Method: Initialising, new rings, Connected."""
    case.front.send(case.front.slot(65535))
    assert case.vif.states()[1] == "6"
    case.front.set("state", 6)
    case.front.set("state", 1)
    assert case.vif.states()[1] == "2"
    again = ScriptedFront(case.world, case.vif)
    again.connect()
    assert case.vif.states() == ("4", "4")
    assert again.send(again.slot()) == [(0, OKAY)] and case.arrived() == [FRAME]
