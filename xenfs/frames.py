"""frames.py: the loop of all interfaces: one trio task waits for every TAP of every vif, and hands in what they have.

One task, not one per descriptor: a frame usually comes back, and a task switch costs more than the frame. It waits on one
epoll that holds all descriptors, polls the drivers that have something (bounded batches), lets the host deliver, and
looks again for a moment before it sleeps. A driver that has no room is taken out of the epoll until it says it has.
An idle network never wakes; a deadline (rate limit, a guest that does not receive) does, once.
"""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import trio

from netdev.link import BLOCKED

log = logging.getLogger("xenfs.frames")

TURN_S = 0.002  # how long other tasks may have to wait for us
SERVE_S = 0.0005  # for how long frames are taken in before the host delivers: that takes longer still
LOOK_S = 50e-6  # how long to look for the next frame after the last one
MOST_EVENTS = 64


class Driver(Protocol):
    """Netfront or Netback."""

    node: str
    on_room: Callable[[], None]

    def poll(self, lane: int) -> int: ...
    def interface_lost(self) -> None: ...


class Waiting(Protocol):
    """What has deadlines: Netback."""

    @property
    def deadline(self) -> float | None: ...

    def tick(self) -> None: ...


class Frames:
    """`kick` delivers what a batch caused; `waiting()` lists who may have a deadline, in seconds of `clock`."""

    def __init__(
        self, kick: Callable[[], bool], waiting: Callable[[], Iterable[Waiting]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.kick = kick
        self.waiting = waiting
        self.clock = clock
        self.epoll = select.epoll()
        self.lanes: dict[int, tuple[Driver, int]] = {}  # by descriptor
        self._armed: set[int] = set()
        self._order: list[int] = []  # descriptors, once there was no time for all: who waits longest comes first
        self._until: trio.CancelScope | None = None  # its deadline is the drivers' next one

    def add(self, driver: Driver, descriptors: Iterable[int]) -> None:
        """Serve these lanes of a driver from now on."""
        mine = list(descriptors)
        for lane, fd in enumerate(mine):
            self.lanes[fd] = (driver, lane)
        driver.on_room = lambda: self._arm(mine, driver)
        self._arm(mine, driver)

    def remove(self, driver: Driver) -> None:
        """Before its descriptors are closed: a number that is used again must not lead to it."""
        driver.on_room = lambda: None
        for fd in [fd for fd, (owner, _) in self.lanes.items() if owner is driver]:
            self._disarm(fd)
            del self.lanes[fd]

    def deadline_changed(self) -> None:
        """A driver has a deadline that it had not: wake in time. (One that has gone wakes us once, in vain.)"""
        times = [time for waiting in self.waiting() if (time := waiting.deadline) is not None]
        if times and self._until is not None:
            self._until.deadline = trio.current_time() + max(0.0, min(times) - self.clock())

    def _arm(self, descriptors: list[int], driver: Driver) -> None:
        for fd in descriptors:
            if fd not in self._armed and self.lanes.get(fd, (None,))[0] is driver:
                self.epoll.register(fd, select.EPOLLIN)
                self._armed.add(fd)

    def _disarm(self, fd: int) -> None:
        if fd in self._armed:
            self._armed.remove(fd)
            self.epoll.unregister(fd)

    async def run(self) -> None:
        """The task."""
        while True:
            with trio.CancelScope() as self._until:
                self.deadline_changed()
                await self._move()
            for waiting in list(self.waiting()):
                waiting.tick()

    async def _move(self) -> None:
        """Until a deadline is over."""
        more = True  # what came with the deadline
        while True:
            if more:
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.wait_readable(self.epoll.fileno())
            more = self._turn()

    def _turn(self) -> bool:
        """Poll, deliver, look again; until there is nothing for a while, or others want to run. True: more is due."""
        clock, poll, kick = time.perf_counter, self.epoll.poll, self.kick
        now = quiet_since = clock()
        turn_ends = now + TURN_S
        more = False
        while now < turn_ends:
            got = poll(0, MOST_EVENTS)
            if got:
                self._serve(got, now + SERVE_S)
            more = kick()
            now = clock()
            if got:
                quiet_since = now
            elif not more and now - quiet_since >= LOOK_S:
                return False
        return True

    def _serve(self, ready: list[tuple[int, int]], until: float) -> None:
        """Poll one lane after another. Those there was no time for come first next time: as long as all that is ready fits
        into one answer, epoll has the same order each time."""
        if self._order:
            now = dict(ready)
            ready = [*[(fd, now.pop(fd)) for fd in self._order if fd in now], *now.items()]
            self._order = []
        for served, (fd, events) in enumerate(ready, 1):
            entry = self.lanes.get(fd)
            if entry is None:
                continue  # removed by what came before it
            driver, lane = entry
            if not events & select.EPOLLIN:
                log.error("%s: its interface was deleted by somebody else; the device is closed", driver.node)
                self.remove(driver)
                driver.interface_lost()
            elif driver.poll(lane) == BLOCKED:
                self._disarm(fd)
            if time.perf_counter() > until:
                self._order = [fd for fd, _ in ready[served:] + ready[:served]]
                break

    def close(self) -> None:
        self.epoll.close()
