"""Goal: the loop of all interfaces serves whoever has frames, sleeps when nobody has, wakes for deadlines however busy it
is, leaves alone who has no room, and never touches a descriptor after its driver was removed.
Method: pipes stand for interfaces, and drivers that remember what they were asked."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator

import pytest
import trio

from netdev.link import BLOCKED, IDLE, MORE
from xenfs import frames
from xenfs.frames import Frames

SOON_S = 0.05


class Pipes:
    """A driver with `lanes` pipes: poll() takes one byte, or answers BLOCKED while `full`."""

    def __init__(self, lanes: int = 1) -> None:
        self.pipes = [os.pipe() for _ in range(lanes)]
        self.node = f"device/vif/{self.pipes[0][0]}"
        self.on_room: Callable[[], None] = lambda: None
        self.polled: list[int] = []
        self.full = False
        self.then: Callable[[], None] = lambda: None

    @property
    def descriptors(self) -> list[int]:
        return [read for read, _ in self.pipes]

    def send(self, count: int = 1, lane: int = 0) -> None:
        os.write(self.pipes[lane][1], bytes(count))

    def poll(self, lane: int) -> int:
        self.polled.append(lane)
        if self.full:
            return BLOCKED
        os.read(self.pipes[lane][0], 1)
        self.then()
        return IDLE

    def interface_lost(self) -> None:
        raise AssertionError("its pipe is there")

    def close(self) -> None:
        for pair in self.pipes:
            for fd in pair:
                os.close(fd)


class Endless(Pipes):
    """It always has more."""

    def poll(self, lane: int) -> int:
        self.polled.append(lane)
        return MORE


class Deadline:
    def __init__(self) -> None:
        self.deadline: float | None = None
        self.ticks = 0

    def tick(self) -> None:
        """Called for others' deadlines, too, and early by what the clock cannot tell apart."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            self.ticks += 1
            self.deadline = None


class Loop:
    """Frames with what a test needs; `turns` counts kicks, of which `busy` more are said to be due."""

    def __init__(self) -> None:
        self.turns = 0
        self.busy = 0
        self.waiting: list[Deadline] = []
        self.frames = Frames(self.kick, lambda: self.waiting)
        self.drivers: list[Pipes] = []

    def kick(self) -> bool:
        self.turns += 1
        self.busy -= self.busy > 0
        return self.busy > 0

    def add(self, driver: Pipes) -> Pipes:
        self.drivers.append(driver)
        self.frames.add(driver, driver.descriptors)
        return driver

    def run(self, script: Callable[[], object] | None = None, seconds: float = SOON_S) -> None:
        """The task, for a while, with `script` run after its first turns."""

        async def main() -> None:
            with trio.move_on_after(seconds):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.frames.run)
                    await trio.sleep(seconds / 2)
                    if script is not None:
                        script()

        trio.run(main)

    def close(self) -> None:
        self.frames.close()
        for driver in self.drivers:
            driver.close()


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


def test_who_has_frames_is_polled(loop):
    """Goal: each lane that is readable is polled with its number, the others are not.  Method: three lanes, two drivers."""
    one, two = loop.add(Pipes(3)), loop.add(Pipes(1))
    one.send(2, lane=1)
    loop.run(lambda: (one.send(lane=2), two.send()))
    assert (sorted(one.polled), two.polled) == ([1, 1, 2], [0])


def test_it_sleeps(loop):
    """Goal: without frames there are no turns, however long.  Method: kicks are counted at half time and at the end."""
    driver = loop.add(Pipes())
    counts = []
    loop.run(lambda: counts.append(loop.turns), seconds=0.4)
    assert counts == [loop.turns], "it has looked once, at the beginning"
    driver.send()
    loop.run(lambda: counts.append(loop.turns), seconds=0.4)
    assert driver.polled == [0] and counts[1] == loop.turns > counts[0]


def test_more_to_deliver_goes_on(loop):
    """Goal: while kick() says that more is due, it is called again, without a frame.  Method: 5000 times."""
    driver = loop.add(Pipes())
    driver.then = lambda: setattr(loop, "busy", 5000)
    driver.send()
    loop.run(seconds=0.5)
    assert loop.busy == 0 and loop.turns >= 5000


def test_others_run_while_it_is_busy(loop):
    """Goal: endless frames keep no other task from running.  Method: a task that counts its own turns beside the loop."""
    loop.add(Endless()).send()
    turns = 0

    async def main() -> None:
        nonlocal turns
        with trio.move_on_after(0.3):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(loop.frames.run)
                while True:
                    await trio.lowlevel.checkpoint()
                    turns += 1

    trio.run(main)
    assert turns > 10


def test_no_room(loop):
    """Goal: a driver that is BLOCKED is asked no more until it says that there is room; then what waited is taken.
    Method: poll counts while its pipe is readable all the time; on_room() of two lanes at once."""
    driver = loop.add(Pipes(2))
    driver.full = True
    driver.send(lane=0)
    driver.send(lane=1)
    loop.run(seconds=0.1)
    assert sorted(driver.polled) == [0, 1] and loop.turns < 1_000_000
    driver.full = False
    loop.run(lambda: (driver.on_room(), driver.on_room()))
    assert sorted(driver.polled) == [0, 0, 1, 1]


def test_removed(loop):
    """Goal: after remove() a driver is not polled, neither by what epoll said before nor by on_room(), and its number may
    belong to another.  Method: one of two ready drivers removes the other from within its poll; a new one gets its
    descriptors."""
    one, two = loop.add(Pipes()), loop.add(Pipes())
    one.then = lambda: loop.frames.remove(two)
    two.then = lambda: loop.frames.remove(one)
    one.send()
    two.send()
    loop.run()
    assert len(one.polled) + len(two.polled) == 1
    gone = two if one.polled else one
    gone.on_room()
    loop.frames.remove(gone)
    heir = Pipes()
    heir.close()
    heir.pipes = gone.pipes
    gone.pipes = []
    loop.add(heir)
    before = len(gone.polled)
    loop.run()
    assert (len(gone.polled), heir.polled) == (before, [0])


def test_hang_up(loop, caplog):
    """Goal: a descriptor that is ready without being readable is let go at once, with all of its driver, which is told, and
    a word that names it; the rest go on.
    Method: the writer's end of one of two pipes is closed, as the kernel does when an interface is deleted."""
    driver, other = loop.add(Pipes(2)), loop.add(Pipes())
    closing = []
    driver.interface_lost = lambda: closing.append([fd for fd, (of, _) in loop.frames.lanes.items() if of is driver])
    _, writer = driver.pipes[0]
    os.close(writer)
    loop.run(lambda: other.send(), seconds=0.1)
    driver.on_room()
    loop.run()
    driver.pipes[0] = (driver.pipes[0][0], os.dup(driver.pipes[1][1]))  # for close()
    assert (driver.polled, other.polled, closing) == ([], [0], [[]])
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage() == f"{driver.node}: its interface was deleted by somebody else; the device is closed"
    assert loop.frames.lanes.keys() == set(other.descriptors)


# ---- turns ----


class Clock:
    """What frames.py takes for `time`: each look costs a microsecond, and slow drivers much more."""

    def __init__(self) -> None:
        self.now = 0.0
        self.monotonic = time.monotonic

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now


class Slow(Pipes):
    """A poll() takes `cost_s` of that clock; what it did is noted with the deliveries, in order. `more`: it never ends."""

    def __init__(self, name: str, notes: list[str], clock: Clock, cost_s: float, more: bool = False) -> None:
        super().__init__()
        self.name, self.notes, self.clock, self.cost_s, self.more = name, notes, clock, cost_s, more

    def poll(self, lane: int) -> int:
        self.notes.append(self.name)
        self.clock.now += self.cost_s
        return MORE if self.more else super().poll(lane)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(frames, "time", made)
    return made


def noted_loop(loop: Loop, notes: list[str]) -> None:
    kick = loop.kick

    def noted() -> bool:
        if notes and notes[-1] != "|":
            notes.append("|")
        return kick()

    loop.frames.kick = noted


@pytest.mark.parametrize(("share", "most"), [(0.01, 20), (0.4, 3), (0.6, 2), (1.1, 1), (20, 1)])
def test_delivery_does_not_wait_for_all(loop, clock, share, most):
    """Goal: after SERVE_S the host delivers, though lanes are left; they are served next, each once.
    Method: twenty drivers with a frame each, which takes a share of that time, on a clock that only they move."""
    notes: list[str] = []
    for number in range(20):
        loop.add(Slow(str(number), notes, clock, share * frames.SERVE_S)).send()
    noted_loop(loop, notes)
    loop.run(seconds=0.1)
    rounds = [each.split() for each in " ".join(notes).split("|") if each.strip()]
    assert max(len(each) for each in rounds) == most and len(rounds) == -(-20 // most)
    assert sorted(int(name) for each in rounds for name in each) == list(range(20))


@pytest.mark.parametrize("others", [1, 3, 10])
def test_a_slow_driver_does_not_keep_others_waiting(loop, clock, others):
    """Goal: who always has more, and takes long, is served once and then whoever was left over.
    Method: one that never ends and costs more than SERVE_S, and others that never end and cost little or as much."""
    notes: list[str] = []
    drivers = [Slow("slow", notes, clock, 3 * frames.SERVE_S, more=True)]
    drivers += [Slow(str(i), notes, clock, (0.01, 3)[i & 1] * frames.SERVE_S, more=True) for i in range(others)]
    for driver in drivers:
        loop.add(driver).send()
    noted_loop(loop, notes)
    loop.run(seconds=0.1)
    polled = [note for note in notes if note != "|"]
    assert len(polled) > 20 * len(drivers)
    for name in {driver.name for driver in drivers}:
        at = [i for i, note in enumerate(polled) if note == name]
        gaps = [after - before for before, after in itertools.pairwise([-1, *at, len(polled)])]
        assert max(gaps) <= len(drivers), f"{name} waited for {max(gaps)} polls of {len(drivers) - 1} others"


# ---- deadlines ----


def test_deadline_while_it_sleeps(loop):
    """Goal: a deadline wakes it in time, once; so does one that comes up meanwhile, also an earlier one; then it sleeps.
    Method: one when it goes to sleep, and two that it is told of later; nobody has a frame."""
    early, late, never = Deadline(), Deadline(), Deadline()
    loop.waiting = [early, late, never]
    never.deadline = time.monotonic() + 3600
    late.deadline = time.monotonic() + 0.2

    def sooner() -> None:
        early.deadline = time.monotonic() + 0.01
        loop.frames.deadline_changed()

    loop.run(sooner, seconds=0.1)
    assert (early.ticks, late.ticks, never.ticks) == (1, 0, 0)
    loop.run(seconds=0.2)
    assert (early.ticks, late.ticks, never.ticks) == (1, 1, 0)


def test_deadline_while_others_are_busy(loop):
    """Goal: a deadline comes in time though frames never end.  Method: a lane that always has more; one deadline."""
    loop.add(Endless()).send()
    late = Deadline()
    loop.waiting = [late]

    def script() -> None:
        late.deadline = time.monotonic() + 0.01
        loop.frames.deadline_changed()

    loop.run(script, seconds=0.6)  # a machine may be busy, too
    assert late.ticks == 1


def test_deadline_changed_before_it_runs(loop):
    """Goal: deadline_changed() is harmless at any time.  Method: before run(), and from within a poll."""
    loop.frames.deadline_changed()
    driver = loop.add(Pipes())
    driver.then = loop.frames.deadline_changed
    driver.send()
    loop.run()
    assert driver.polled == [0]
