"""Goal: every frame arrives once, whole and in its flow's order, or somebody has counted why not, under any interleaving.
Method: seeds of random traffic both ways at once (see networld.py), with faults of the network, reconnects, restarts of the
backend and detaches drawn from the seed."""

from __future__ import annotations

import pytest

from tests.sim.networld import FAULTS, NetTraffic
from xenmodel.testing import SeededOrder

STEPS = 160


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", range(12))
def test_every_frame_is_accounted_for(seed: int, fault: str) -> None:
    """Goal: sent = received + dropped by reason, in order per flow and on one queue per flow.  Method: one fault each."""
    traffic = NetTraffic(seed, fault)
    for _ in range(STEPS):
        traffic.step()
    traffic.finish()
    assert min(traffic.received) > STEPS // 4


@pytest.mark.parametrize("seed", range(1000, 1024))
def test_with_reconnects_and_restarts(seed: int) -> None:
    """Goal: nothing comes twice, out of order or damaged when either end goes and comes back with other features.
    Method: both kinds in turn; what was on the rings then is lost, and nothing else is asked of it."""
    traffic = NetTraffic(seed)
    for round_ in range(4):
        for _ in range(STEPS // 6):
            traffic.step()
        if (seed + round_) & 1:
            traffic.reconnect()
        else:
            traffic.restart()
    traffic.drain()
    before = list(traffic.received)
    for way in range(2):
        for _ in range(10):
            traffic.send(way)
    traffic.drain()
    assert [now - then for now, then in zip(traffic.received, before, strict=True)] == [10, 10]
    traffic.finish()


@pytest.mark.parametrize("seed", range(2000, 2030))
def test_detach_under_load(seed: int) -> None:
    """Goal: pulled at any moment nothing stays behind.  Method: frames in the interfaces, on the rings, held by the network;
    half of the time in the middle of a reconnect or a restart."""
    traffic = NetTraffic(seed, FAULTS[seed % len(FAULTS)])
    for _ in range(seed % 70):
        traffic.step()
    if seed % 4 == 1:
        traffic.vif.front.reconnect()
    if seed % 4 == 2:
        traffic.world.write(f"{traffic.vif.back_node}/state", 5, settle=False)
    for _ in range(seed % 7):
        traffic.step()
    traffic.pull()


def test_a_seed_is_a_run() -> None:
    """Goal: the same seed makes the same choices and the same counts.  Method: one seed twice."""
    runs = []
    for _ in range(2):
        traffic = NetTraffic(7, "drop")
        for _ in range(60):
            traffic.step()
        order = traffic.world.hypervisor.order
        assert isinstance(order, SeededOrder)
        runs.append((order.choices, traffic.received, traffic.accepted))
        traffic.drain()
        traffic.pull()
    assert runs[0] == runs[1] and runs[0][0]
