"""timers.py: what is due later, by a clock that is an argument. The host sleeps until `next` and calls run()."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Timers:
    """`on_earlier` is called when something is due before everything else that waits."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.on_earlier: Callable[[], None] = lambda: None
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._added = 0

    @property
    def next(self) -> float | None:
        """When the first is due, by the clock."""
        return self._heap[0][0] if self._heap else None

    def add(self, when: float, action: Callable[[], None]) -> None:
        earlier = not self._heap or when < self._heap[0][0]
        self._added += 1  # of two that are due at the same time the first comes first
        heapq.heappush(self._heap, (when, self._added, action))
        if earlier:
            self.on_earlier()

    def run(self) -> None:
        """Do what is due by now, but not what that adds."""
        now, last, later = self.clock(), self._added, []
        try:
            while self._heap and self._heap[0][0] <= now:
                entry = heapq.heappop(self._heap)
                if entry[1] > last:
                    later.append(entry)
                else:
                    entry[2]()
        finally:
            for entry in later:
                heapq.heappush(self._heap, entry)
