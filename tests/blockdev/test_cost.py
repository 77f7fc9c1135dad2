"""Goal: no task, thread or object of a class of ours per request: what a request costs is bounded and known.
Method: thousands of requests through a connected pair under sys.setprofile, which sees every __init__ and __new__ of ours,
and the collector's census of our classes before and after; in the persistent state that every long-lived disk is in."""

from __future__ import annotations

import gc
import sys
import threading
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from blockdev.blkfront import Want
from blockdev.command import Command
from blockdev.storage import PENDING, MemoryStorage, Request
from tests.blockdev.world import KIB, SECTORS, Disk, World
from xenmodel.public.io.blkif import BLKIF_OP_READ, BLKIF_OP_WRITE

OURS = ("xenmodel", "blockdev")
ROUNDS = 60


class Later(MemoryStorage):
    """Answers PENDING and completes when told, without wrapping requests in anything."""

    def __init__(self) -> None:
        super().__init__(SECTORS)
        self.requests: list[Request] = []

    def read(self, offset: int, views: list[memoryview], length: int, request: Request) -> int:
        self.requests.append(request)
        super().read(offset, views, length, request)
        return PENDING

    def write(self, offset: int, views: list[memoryview], length: int, request: Request) -> int:
        self.requests.append(request)
        super().write(offset, views, length, request)
        return PENDING

    def complete(self) -> None:
        while self.requests:
            self.requests.pop().complete(0)


class Made:
    """Counts objects of our classes that are made while it is entered, by class or, for tuples, by what was called."""

    def __init__(self) -> None:
        self.made: Counter[str] = Counter()

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        name, local = frame.f_code.co_name, frame.f_locals  # a NamedTuple's __new__ is a lambda of _cls
        if event != "call" or (name not in ("__init__", "__new__") and not (name == "<lambda>" and "_cls" in local)):
            return
        first = local.get("self", local.get("_cls"))
        kind = first if isinstance(first, type) else type(first)
        if kind.__module__.partition(".")[0] in OURS:
            self.made[kind.__qualname__] += 1

    def __enter__(self) -> Made:
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


def census() -> Counter[str]:
    """Living objects of our classes."""
    gc.collect()
    kinds = (type(thing) for thing in gc.get_objects())
    return Counter(kind.__qualname__ for kind in kinds if kind.__module__.partition(".")[0] in OURS)


def traffic(disk: Disk, kick: Callable[[], None]) -> int:
    """Rounds of 32 requests of every shape, submitted together as a batch is; how many there were."""
    front, deliver, count = disk.front, disk.world.hypervisor.deliver, 0
    for i in range(ROUNDS):
        for j in range(32):
            length = (512, 4096, 40 * KIB, 64 * KIB)[(i + j) & 3]
            command = front.take(length)
            assert command is not None
            front.submit(command, BLKIF_OP_WRITE if i & 1 else BLKIF_OP_READ, j * 8, length)
            count += 1
        while deliver():
            pass
        kick()
        while deliver():
            pass
    return count


@pytest.mark.parametrize("want", [Want(), Want(ring_page_order=2, queues=4)])
@pytest.mark.parametrize("pending", [False, True])
def test_nothing_of_ours_is_made_per_request(world: World, want: Want, pending: bool) -> None:
    """Goal: as above.  Method: one round of traffic to warm up (grants are mapped, translations remembered), then count."""
    storage = Later() if pending else MemoryStorage(SECTORS)
    disk = world.attach(storage=storage, want=want)
    kick = storage.complete if isinstance(storage, Later) else (lambda: None)
    answered = [0]

    def done(command: Command) -> None:
        answered[0] += 1
        disk.front.give(command)

    disk.front.on_complete = done
    traffic(disk, kick)
    threads, before = threading.active_count(), census()
    answered[0] = 0
    with Made() as counter:
        asked = traffic(disk, kick)
    assert asked == answered[0] == 32 * ROUNDS
    assert counter.made == Counter()
    assert census() == before and threading.active_count() == threads
    assert disk.back.queues[0].statistics.rd_req >= 16 * ROUNDS // len(disk.back.queues)


def test_the_counter_counts(world: World) -> None:
    """Goal: the test above can fail.  Method: a connection without persistent grants makes a mapping per page."""
    disk = world.attach(want=Want(persistent=False))
    disk.front.on_complete = disk.front.give
    traffic(disk, lambda: None)
    with Made() as counter:
        traffic(disk, lambda: None)
    assert counter.made["Mapping"] >= 32 * ROUNDS and counter.made["Translation"] == 32 * ROUNDS
    assert counter.made["Frame"] >= 32 * ROUNDS


def test_a_batch_is_announced_once(world: World) -> None:
    """Goal: one event in each direction for 32 requests.  Method: the channel's own counts."""
    disk = world.attach()
    port = disk.front.queues[0].port
    back_port = disk.back.queues[0].port
    assert disk.works()
    sent = world.guest.events.channels[port].sent, world.dom0.events.channels[back_port].sent
    for i in range(32):
        disk.start(BLKIF_OP_READ, i, 512)
    world.settle()
    assert len(disk.done) == 32
    assert world.guest.events.channels[port].sent == sent[0] + 1
    assert world.dom0.events.channels[back_port].sent == sent[1] + 1
