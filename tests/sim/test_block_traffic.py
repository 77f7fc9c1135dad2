"""Goal: data integrity under any legal interleaving of guest, backend, storage and toolstack.
Method: 200 seeds of random traffic (see world.py), with restarts, resizes, failures and detaches drawn from the seed."""

from __future__ import annotations

import pytest

from tests.sim.world import Traffic
from xenmodel.testing import SeededOrder

STEPS = 120


@pytest.mark.parametrize("seed", range(60))
def test_reads_see_writes(seed: int) -> None:
    """Goal: no failure, no restart: every request succeeds and every byte is right."""
    traffic = Traffic(seed)
    for _ in range(STEPS * 2):
        traffic.step()
    traffic.finish()
    assert traffic.failed == 0 and traffic.completed > STEPS // 2


@pytest.mark.parametrize("seed", range(1000, 1040))
def test_with_a_failing_disk(seed: int) -> None:
    """Goal: a failure reaches the command that it belongs to, and no other sector changes."""
    traffic = Traffic(seed, failures=0.2)
    for _ in range(STEPS * 2):
        traffic.step()
    traffic.finish()
    assert traffic.failed > 0


@pytest.mark.parametrize("seed", range(2000, 2060))
def test_with_backend_restarts(seed: int) -> None:
    """Goal: nothing is lost and nothing is completed twice when the backend goes and comes back with another offer."""
    traffic = Traffic(seed, failures=0.05 if seed % 3 == 0 else 0.0)
    for round_ in range(4):
        for _ in range(STEPS // 3):
            traffic.step()
        traffic.restart()
        if round_ & 1:
            traffic.resize()
    traffic.finish()
    assert traffic.completed > STEPS // 4


@pytest.mark.parametrize("seed", range(3000, 3040))
def test_detach_under_load(seed: int) -> None:
    """Goal: pulled at any moment, every request is answered once and nothing stays behind.  Method: with requests
    waiting, on the ring and in the storage; a resize or a restart may be under way."""
    traffic = Traffic(seed)
    for _ in range(STEPS // 2):
        traffic.step()
    if seed % 4 == 1:
        traffic.resize()
    if seed % 4 == 2:
        traffic.world.write(f"{traffic.disk.back_node}/state", 5, settle=False)
    for _ in range(seed % 7):
        traffic.submit()
    traffic.pull()


def test_a_seed_is_a_run() -> None:
    """Goal: the same seed makes the same choices, and its choices replay without the seed."""
    runs = []
    for _ in range(2):
        traffic = Traffic(7, failures=0.1)
        for _ in range(60):
            traffic.step()
        order = traffic.world.hypervisor.order
        assert isinstance(order, SeededOrder)
        runs.append((order.choices, bytes(traffic.memory.data), traffic.completed))
        traffic.drain()
        traffic.pull()
    assert runs[0] == runs[1] and runs[0][0]
    replay = SeededOrder.replay([3, 1, 9])
    assert [replay(5), replay(5), replay(5), replay(5)] == [3, 1, 4, 0]
