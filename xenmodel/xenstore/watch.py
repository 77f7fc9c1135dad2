"""watch.py: who is to be told about which path, and the events not yet delivered; tools/xenstored/watch.c.

store.py asks the table which watches a changed path concerns; connection.py owns one queue and delivers
from it.
Invariants: an event that is queued already is not queued again; a watch has at most EVENTS_PER_WATCH + 1
events queued, however fast somebody changes nodes under it: beyond that one event with the watch's own path
stands for all that follow, which every client must understand anyway as "look at everything" (it is the
first event any watch gets). Events of a removed watch are gone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xenmodel.public.io.xs_wire import XENSTORE_PAYLOAD_MAX
from xenmodel.xenstore import path as paths

if TYPE_CHECKING:
    from xenmodel.xenstore.connection import Connection

EVENTS_PER_WATCH = 128


@dataclass(slots=True, eq=False)
class Watch:
    """One client's interest in a path and what lies at most `depth` levels below it (None: any number)."""

    connection: Connection
    path: str  # canonical
    token: str
    depth: int | None
    prefix_length: int  # what event paths lose at the front: the home, if the watch was relative
    pending: set[str] = field(default_factory=set)

    def reaches(self, path: str) -> bool:
        """Is `path`, which is at or below ours, near enough?"""
        if self.depth is None:
            return True
        below = path if self.path == paths.ROOT else path[len(self.path) :]
        return (0 if path == self.path else below.count("/")) <= self.depth

    def event_path(self, path: str) -> str:
        return path[self.prefix_length :]

    def fits(self, path: str) -> bool:
        """An event is path and token, each with its NUL, in one message (XSA-324)."""
        token_bytes = len(self.token.encode("utf-8", "surrogateescape"))
        return len(path) - self.prefix_length + token_bytes + 2 <= XENSTORE_PAYLOAD_MAX


class WatchTable:
    """All watches by their path: a change costs one look-up per level of its path."""

    def __init__(self) -> None:
        self._by_path: dict[str, dict[Watch, None]] = {}

    def add(self, watch: Watch) -> None:
        self._by_path.setdefault(watch.path, {})[watch] = None

    def remove(self, watch: Watch) -> None:
        watches = self._by_path[watch.path]
        del watches[watch]
        if not watches:
            del self._by_path[watch.path]

    def at(self, path: str) -> Iterator[Watch]:
        """Watches of exactly this path."""
        return iter(self._by_path.get(path, ()))

    def concerned(self, path: str) -> Iterator[Watch]:
        """Watches of this path or of a node above it."""
        for ancestor in paths.lineage(path):
            for watch in self._by_path.get(ancestor, ()):
                if watch.reaches(path):
                    yield watch


class EventQueue:
    """One connection's undelivered events, in order."""

    def __init__(self) -> None:
        self._events: OrderedDict[tuple[Watch, str], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._events)

    def push(self, watch: Watch, path: str) -> None:
        if path not in watch.pending and (len(watch.pending) >= EVENTS_PER_WATCH or not watch.fits(path)):
            path = watch.path
        watch.pending.add(path)
        self._events[watch, path] = None  # keeps its place if it is there

    def pop(self) -> tuple[Watch, str] | None:
        if not self._events:
            return None
        (watch, path), _ = self._events.popitem(last=False)
        watch.pending.discard(path)
        return watch, path

    def forget(self, watch: Watch) -> None:
        for path in watch.pending:
            del self._events[watch, path]
        watch.pending.clear()
