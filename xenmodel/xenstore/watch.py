"""watch.py: who is to be told about which path, and the events not yet delivered; tools/xenstored/watch.c.

store.py asks the table which watches a changed path concerns; connection.py owns one queue and delivers
from it.
Invariants: an event that is queued already, for whichever watch of its connection, is not queued again; a watch has at most
EVENTS_PER_WATCH + 1 events queued, however fast somebody changes nodes under it: beyond that one event with the watch's own
path stands for all that follow, which every client must understand anyway as "look at everything" (it is the first event any
watch gets). Events of a removed watch are gone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xenmodel.public.io.xs_wire import XENSTORE_PAYLOAD_MAX
from xenmodel.xenstore import path as paths
from xenmodel.xenstore.domain import Cause, DomainRecord
from xenmodel.xenstore.perms import CONTROL_DOMAIN

if TYPE_CHECKING:
    from xenmodel.xenstore.connection import Connection

EVENTS_PER_WATCH = 128
EVENTS_PER_DOMAIN = 1024  # but for domain 0: beyond, one event stands for all further ones of each watch
EVENT_BYTES = 16  # of an event's header, for the quota on memory


@dataclass(slots=True, eq=False)
class Watch:
    """One client's interest in a path and what lies at most `depth` levels below it (None: any number)."""

    connection: Connection
    path: str  # canonical
    token: str
    depth: int | None
    prefix_length: int  # what event paths lose at the front: the home, if the watch was relative
    order: int = 0  # watches of one connection hear of a change in the order in which they were made
    pending: set[str] = field(default_factory=set)

    def reaches(self, path: str) -> bool:
        """Is `path`, which is at or below ours, near enough?"""
        if self.depth is None:
            return True
        below = path if self.path == paths.ROOT else path[len(self.path) :]
        return (0 if path == self.path else below.count("/")) <= self.depth

    def full(self) -> bool:
        """Would one more event change nothing? The one that stands for all is queued already."""
        most = len(self.pending) > EVENTS_PER_WATCH or self.connection.record.events >= EVENTS_PER_DOMAIN
        return most and self.path in self.pending

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

    def concerned(self, path: str, known: dict[str, list[Watch]]) -> list[Watch]:
        """Watches of this path or of a node above it, oldest first, without those that can take no more events.

        `known` is kept by the caller for all paths of one change: what is above several of them is looked up once.
        """
        if not self._by_path:
            return []
        unknown = []
        while path not in known:
            unknown.append(path)
            if path == paths.ROOT or paths.is_special(path):
                break
            path = paths.parent(path)
        found = known.get(path, [])
        for path in reversed(unknown):
            own = self._by_path.get(path)
            if own:
                found = sorted([*(watch for watch in found if not watch.full()), *own], key=_order)
            known[path] = found
        if found:
            found[:] = [watch for watch in found if not watch.full()]
        return [watch for watch in found if watch.depth is None or watch.reaches(path)]


def _order(watch: Watch) -> int:
    return watch.order


class _Event:
    """One message to be: since when it waits, the request it is counted with, and the watches it stands for."""

    __slots__ = ("cause", "path", "since", "watches")

    def __init__(self, path: str, since: float, cause: Cause | None) -> None:
        self.path = path  # canonical
        self.since = since
        self.cause = cause
        self.watches: dict[Watch, None] = {}


class EventQueue:
    """One connection's undelivered events, in order, by what the client will read: path and token."""

    def __init__(self, record: DomainRecord) -> None:
        self._events: OrderedDict[tuple[str, str], _Event] = OrderedDict()
        self._record = record  # whose memory they count for

    def __len__(self) -> int:
        return len(self._events)

    def memory(self) -> int:
        """Bytes, counted anew."""
        return sum(EVENT_BYTES + len(event.path) + len(token) for (_, token), event in self._events.items())

    def push(self, watch: Watch, path: str, now: float = 0.0, cause: Cause | None = None) -> None:
        if path in watch.pending:
            return  # and keeps its place
        crowded = len(watch.pending) >= EVENTS_PER_WATCH
        if self._record.domid != CONTROL_DOMAIN:
            crowded = crowded or self._record.events >= EVENTS_PER_DOMAIN
        if crowded or not watch.fits(path):
            path = watch.path
            if path in watch.pending:
                return
        watch.pending.add(path)
        key = watch.event_path(path), watch.token
        event = self._events.get(key)
        if event is None:  # otherwise another watch with this token has it queued already
            event = self._events[key] = _Event(path, now, cause)
            if cause is not None:
                cause.waiting += 1
            self._record.events += 1
            self._record.memory += EVENT_BYTES + len(path) + len(watch.token)
        event.watches[watch] = None

    def pop(self) -> tuple[str, str] | None:
        """What the client is to be told next: path and token."""
        if not self._events:
            return None
        key, event = self._events.popitem(last=False)
        for watch in event.watches:
            watch.pending.discard(event.path)
        self._gone(key[1], event)
        return key

    def oldest(self) -> float | None:
        """Since when the first of them waits."""
        return next(iter(self._events.values())).since if self._events else None

    def expire(self, before: float) -> int:
        """Drop those that have waited since before then; how many."""
        count = 0
        while (since := self.oldest()) is not None and since <= before:
            self.pop()
            count += 1
        return count

    def forget(self, watch: Watch) -> None:
        for path in watch.pending:
            key = watch.event_path(path), watch.token
            event = self._events[key]
            del event.watches[watch]
            if not event.watches:
                del self._events[key]
                self._gone(watch.token, event)
        watch.pending.clear()

    def _gone(self, token: str, event: _Event) -> None:
        self._record.events -= 1
        self._record.memory -= EVENT_BYTES + len(event.path) + len(token)
        if event.cause is not None:
            event.cause.done()
