"""Goal: whatever a backend writes into its nodes, and in whatever order its states come, netfront loses that vif at most.
Method: a scripted backend beside a second vif with real drivers that must go on working. Every key that netfront reads is
wrong once; carrier and states flap, each value seen or only the last."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.netdev.hostile import HUGE, BackCase
from tests.netdev.scripted import FRAME


@pytest.fixture
def case() -> Iterator[BackCase]:
    it = BackCase()
    it.back.connect()
    assert it.vif.states() == ("4", "4") and it.front.link_up, it.vif.errors()
    yield it
    it.check_harmless()
    it.check_nothing_left()


def test_carrier_flaps(case: BackCase) -> None:
    """Goal: the link follows what was said last; frames are not sent without it.  Method: 0, 1, nonsense, missing."""
    changes: list[bool] = []
    case.front.on_change = lambda: changes.append(case.front.link_up)
    for value, up in (("0", False), ("1", True), ("x", False), ("4294967296", False), ("1", True), ("", False), ("2", True)):
        case.back.set("carrier", value)
        assert case.front.link_up is up, value
        case.vif.kernel.send(FRAME)
        case.world.run()
        assert len(case.back.take()) == (1 if up else 0)
        for _ in case.vif.kernel.receive():
            raise AssertionError("nothing was sent to the guest")
        while case.vif.guest_port.lanes[0].read([memoryview(bytearray(600))]):
            pass
    case.world.client.rm(f"{case.vif.back_node}/carrier")
    case.world.settle()
    assert case.front.link_up and changes == [False, True, False, True, False, True]
    for i in range(500):
        case.back.set("carrier", i & 1, settle=False)
    case.world.settle()
    assert case.front.link_up and case.front.connected


def test_carrier_beside_a_state_that_is_none(case: BackCase) -> None:
    """Goal: the carrier's watch fires while `state` is nonsense, and that ends this vif only.
    Method: both written before either is looked at, the carrier first."""
    case.back.set("carrier", 0, settle=False)
    case.back.set("state", "up", settle=False)
    case.world.settle()
    case.check_closed("state is 'up'")


NODES: dict[str, tuple[dict[str, str | int], str]] = {
    "no rx-copy": ({"feature_rx_copy": 0}, "feature-rx-copy is not 1"),
    "rx-copy is text": ({"feature_rx_copy": "y"}, "not a number"),
    "sg is text": ({"feature_sg": "y"}, "not a number"),
    "gso4 is text": ({"feature_gso_tcpv4": "y"}, "not a number"),
    "gso6 is text": ({"feature_gso_tcpv6": ""}, "not a number"),
    "csum6 is text": ({"feature_ipv6_csum_offload": "-1"}, "not a number"),
    "split is text": ({"feature_split_event_channels": "\xff"}, "not a number"),
    "queues is text": ({"multi_queue_max_queues": "many"}, "not a number"),
    "too many digits": ({"multi_queue_max_queues": "9" * 1000}, "not a number"),
    "queues beyond u32": ({"multi_queue_max_queues": 2**32}, "outside"),
    "ctrl is text": ({"feature_ctrl_ring": "y"}, "not a number"),
    "xdp is text": ({"feature_xdp_headroom": "y"}, "not a number"),
}


@pytest.mark.parametrize("name", NODES)
def test_nodes_that_make_no_sense(name: str) -> None:
    """Goal: every key that netfront reads of its backend is checked.  Method: one wrong key at a time."""
    nodes, reason = NODES[name]
    case = BackCase(queues=2)
    case.back.offer(**nodes)
    assert reason in case.error, case.error
    assert not case.front.queues and not case.front.link_up
    case.check_harmless()
    case.check_nothing_left()


@pytest.mark.parametrize("state", ["", "99", "-1", "four", "\xff"])
def test_a_state_that_is_none(case: BackCase, state: str) -> None:
    case.back.set("state", state)
    case.check_closed("state is")


@pytest.mark.parametrize(("said", "count"), [(0, 1), (1, 1), (2, 2), (3, 3), (4, 4), (HUGE, 4)])
def test_how_many_queues_a_backend_may_say(said: int, count: int) -> None:
    """Goal: never more queues than were wanted, whatever is offered.  Method: a frontend that wants four."""
    case = BackCase(queues=4)
    case.back.offer(multi_queue_max_queues=said)
    assert len(case.front.queues) == count and case.vif.states()[0] == "4"
    case.check_harmless()
    case.check_nothing_left()


@pytest.mark.parametrize("states", [[5, 6, 2], [6, 5, 2, 4], [4, 5, 4, 6, 2], [1, 0, 3, 7, 8, 4], [6, 6, 5, 5, 2, 2, 4, 4]])
@pytest.mark.parametrize("settle", [True, False])
def test_flapping_states(states: list[int], settle: bool) -> None:
    """Goal: states in any order leave one device in one state, twice over.  Method: each seen, or only the last."""
    case = BackCase()
    case.back.connect().close()
    for state in states * 3:
        case.back.set("state", state, settle=settle)
        case.vif.kernel.send(FRAME)
        case.world.run()
    assert len(case.front.queues) <= 1
    case.check_harmless()
    case.check_nothing_left()
