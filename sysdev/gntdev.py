"""gntdev.py: /dev/xen/gntdev, drivers/xen/gntdev.c: grants of other domains, mapped for programs of this one.

Gntdev is a domain's device, GntdevUser one open of it. The node in xenfs/nodes decodes ioctls and calls these; where a frame
becomes visible to a process is behind a port, the Arena. Requests that may be long, or must wait for a disk, are jobs of
steps.py.

As in Linux: MAP gives an index, UNMAP wants the index and count of one MAP, a notification's byte is cleared before the
unmapping, its event sent after it, and its port held until then. Unlike Linux, grants are mapped by the ioctl already, for
nobody tells us of the mmap, writable wherever the grant allows it, and unmapped by UNMAP even if the process still has an
mmap of them: that then shows nothing.

Invariant: every Mapping of a user is in one of its maps, and each frame of it counts as one use of the arena's slot.
Left out: DMABUF_*; write protection (docs/devxen.md).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

from sysdev.evtchn import EvtchnDevice
from sysdev.steps import Job, Pause
from xenmodel.domain import Domain
from xenmodel.grant_table import Mapping
from xenmodel.memory import Frame, OutOfMemory
from xenmodel.public.grant_table import GNTST_TEXTS, GNTMAP_host_map, GNTMAP_readonly, GNTST_no_device_space
from xenmodel.types import PAGE_SIZE

log = logging.getLogger("xenfs.gntdev")

REFS_MOST = 64 * 1024  # in one MAP_GRANT_REF: Linux's limit
SLICE = 256  # grants that are mapped or unmapped before others have their turn
UNMAP_NOTIFY_CLEAR_BYTE, UNMAP_NOTIFY_SEND_EVENT = 1, 2


class Arena(Protocol):
    """Where frames are put so that processes can map them: xenfs/arena.py."""

    def reserve(self, count: int, domid: int, by: int, owner: object) -> Any: ...
    def disown(self, owner: object) -> None: ...
    def give_up(self, run: Any, count: int) -> None: ...
    def where(self, frame: Frame) -> int | None: ...
    def join(self, frames: Sequence[Frame], offset: int, domid: int) -> None: ...
    def show(self, frames: Sequence[Frame], run: Any, index: int) -> bool: ...
    def leave(self, users: Iterable[tuple[Frame, Callable[[], object]]]) -> None: ...


class Notify:
    """What shall happen when a page is unmapped, by whatever way: a byte cleared, an event sent."""

    def __init__(self, evtchn: EvtchnDevice, action: int, at: int, port: int) -> None:
        """`at` counts from the beginning of what is mapped. OSError EINVAL: no such action, or not a port of a program."""
        if action & ~(UNMAP_NOTIFY_CLEAR_BYTE | UNMAP_NOTIFY_SEND_EVENT):
            raise OSError(errno.EINVAL, f"no unmap notification has action {action:#x}")
        self.evtchn, self.action, self.at, self.port = evtchn, action, at, port
        if action & UNMAP_NOTIFY_SEND_EVENT and (status := evtchn.get(port)) < 0:
            raise OSError(-status, f"port {port} is not bound through dev/xen/evtchn")

    def clear(self, view: memoryview | None) -> None:
        """It is about to be unmapped; `view` is the page `at` is in, None if it may not be written."""
        if self.action & UNMAP_NOTIFY_CLEAR_BYTE and view is not None:
            view[self.at % PAGE_SIZE] = 0

    def send(self) -> None:
        """It is unmapped."""
        if self.action & UNMAP_NOTIFY_SEND_EVENT:
            self.evtchn.send(self.port)
        self.drop()

    def drop(self) -> None:
        """Another one takes its place."""
        if self.action & UNMAP_NOTIFY_SEND_EVENT:
            self.evtchn.put(self.port)
        self.action = 0


class GrantMap:
    """What one MAP_GRANT_REF mapped: the first `shown` of the mappings can be seen."""

    __slots__ = ("index", "mappings", "notify", "shown")

    def __init__(self) -> None:
        self.index = 0
        self.mappings: list[Mapping] = []
        self.shown = 0
        self.notify: Notify | None = None

    def pages(self) -> range:
        """The offsets of its pages."""
        return range(self.index, self.index + len(self.mappings) * PAGE_SIZE, PAGE_SIZE)

    def at(self, offset: int) -> Mapping:
        return self.mappings[(offset - self.index) // PAGE_SIZE]


class Gntdev:
    """One domain's device."""

    def __init__(self, domain: Domain, evtchn: EvtchnDevice, arena: Arena) -> None:
        self.domain = domain
        self.evtchn = evtchn
        self.arena = arena
        self.users: set[GntdevUser] = set()

    def open(self) -> GntdevUser:
        user = GntdevUser(self)
        self.users.add(user)
        return user

    def stop(self) -> None:
        """The domain is going: nothing of others is mapped any more when this returns, but what a disk worker writes to."""
        for user in list(self.users):
            for _ in user.close():
                pass


class GntdevUser:
    """One open of it."""

    def __init__(self, device: Gntdev) -> None:
        self.device = device
        self.maps: dict[GrantMap, None] = {}  # what programs can refer to
        self.closed = False
        self._changing: dict[GrantMap, None] = {}  # others: being mapped or unmapped
        self._at: dict[int, list[GrantMap]] = {}  # the maps that have the page at an offset, the newest last

    # --- mapping -----------------------------------------------------------------------------------------------------

    def map(self, refs: Sequence[tuple[int, int]], owner: str) -> Job[int]:
        """MAP_GRANT_REF of (domid, ref)s: the index, or a negative errno.

        EINVAL: none or too many, or a grant that is not there for us. ENOSPC: this domain has too much mapped. EBUSY: a
        frame is mapped by another process, in another order. ENOMEM: the host cannot map so many pieces."""
        if not 0 < len(refs) <= REFS_MOST:
            return -errno.EINVAL
        grant_map = GrantMap()
        self._changing[grant_map] = None
        try:
            status = yield from self._pin(refs, owner, grant_map)
            if not status:
                status = yield from self._show(grant_map)
        except OutOfMemory:
            status = -errno.ENOMEM
        except OSError as error:
            status = -(error.errno or errno.EIO)
        if not status:
            del self._changing[grant_map]
            self.maps[grant_map] = None
            for page in grant_map.pages():
                self._at.setdefault(page, []).append(grant_map)
            return grant_map.index
        yield from self._undo(grant_map)
        return status

    def _pin(self, refs: Sequence[tuple[int, int]], owner: str, grant_map: GrantMap) -> Job[int]:
        track, mappings = self.device.domain.maptrack, grant_map.mappings
        for done, (domid, ref) in enumerate(refs):
            if done and done % SLICE == 0:
                yield Pause.TURN
            if self.closed:
                return -errno.EIO
            status, mapping = track.map(domid, ref, GNTMAP_host_map)
            if mapping is None and status != GNTST_no_device_space:
                status, mapping = track.map(domid, ref, GNTMAP_host_map | GNTMAP_readonly)
            if mapping is None:
                log.info("%s: MAP_GRANT_REF %d:%d is refused: %s", owner, domid, ref, GNTST_TEXTS.get(status, status))
                return -errno.ENOSPC if status == GNTST_no_device_space else -errno.EINVAL
            mapping.owner = owner
            mappings.append(mapping)
        return 0

    def _show(self, grant_map: GrantMap) -> Job[int]:
        """Make them visible. What was done is in `shown`, also after an exception."""
        arena, domid, count = self.device.arena, self.device.domain.domid, len(grant_map.mappings)
        offset = arena.where(grant_map.mappings[0].frame)
        run = arena.reserve(count, domid, domid, self) if offset is None else None
        grant_map.index = int(run.offset) if run is not None else offset or 0
        done = 0
        try:
            while True:
                frames = [mapping.frame for mapping in grant_map.mappings[done : done + SLICE]]
                if run is None:
                    arena.join(frames, grant_map.index + done * PAGE_SIZE, domid)
                elif not arena.show(frames, run, done):
                    frames = []
                done += len(frames)
                grant_map.shown = done
                if done == count:
                    return 0
                yield Pause.TURN if frames else Pause.EVENT
                if self.closed:
                    return -errno.EIO  # and undone
        finally:
            if run is not None:
                arena.give_up(run, count - done)

    # --- unmapping ---------------------------------------------------------------------------------------------------

    def unmap(self, index: int, count: int) -> Job[int]:
        """UNMAP_GRANT_REF: ENOENT if no MAP gave that index and count."""
        for grant_map in reversed(self._at.get(index, ())):
            if grant_map.index == index and len(grant_map.mappings) == count:
                self._forget(grant_map)
                yield from self._undo(grant_map)
                return 0
        return -errno.ENOENT

    def close(self) -> Job[int]:
        """The descriptor is gone: all of it, also what other jobs have begun. These find nothing left to do."""
        self.closed = True
        done = 0
        while self.maps:
            grant_map = next(iter(self.maps))
            done += len(grant_map.mappings)
            self._forget(grant_map)
            yield from self._undo(grant_map)
            if done >= SLICE:
                done = 0
                yield Pause.TURN
        for grant_map in list(self._changing):
            yield from self._undo(grant_map)
        self.device.users.discard(self)
        self.device.arena.disown(self)
        return 0

    def _forget(self, grant_map: GrantMap) -> None:
        """No program can refer to it any more."""
        del self.maps[grant_map]
        self._changing[grant_map] = None
        for page in grant_map.pages():
            self._at[page].remove(grant_map)
            if not self._at[page]:
                del self._at[page]
        if grant_map.notify is not None:
            mapping = grant_map.at(grant_map.notify.at)
            grant_map.notify.clear(None if mapping.readonly else mapping.view)

    def _undo(self, grant_map: GrantMap) -> Job[None]:
        """Unmap what is left of it: what can be seen, once a frame is where its owner expects it to be."""
        unmap, leave, mappings = self.device.domain.maptrack.unmap, self.device.arena.leave, grant_map.mappings
        while mappings:
            first = max(0, len(mappings) - SLICE)
            part, shown = mappings[first:], max(0, grant_map.shown - first)
            del mappings[first:]
            grant_map.shown = min(grant_map.shown, first)
            leave([(mapping.frame, partial(unmap, mapping.handle)) for mapping in part[:shown]])
            for mapping in part[shown:]:
                unmap(mapping.handle)
            if mappings:
                yield Pause.TURN
        if grant_map in self._changing:  # nobody else has undone the rest of it
            del self._changing[grant_map]
            if grant_map.notify is not None:
                grant_map.notify.send()

    # --- the others ----------------------------------------------------------------------------------------------------

    def find(self, offset: int) -> list[tuple[int, int]]:
        """Index and count of each map that has the page at an offset, the newest last: all of them show the same there."""
        return [(grant_map.index, len(grant_map.mappings)) for grant_map in self._at.get(offset & -PAGE_SIZE, ())]

    def set_unmap_notify(self, at: int, action: int, port: int) -> int:
        """SET_UNMAP_NOTIFY: `at` is an index plus the place of a byte. ENOENT: not in a map of ours; EINVAL: see Notify, or
        a byte of a grant that is read-only. Of several maps with that page it is for the newest."""
        maps = self._at.get(at & -PAGE_SIZE)
        if maps is None:
            return -errno.ENOENT
        grant_map = maps[-1]
        if action & UNMAP_NOTIFY_CLEAR_BYTE and grant_map.at(at).readonly:
            return -errno.EINVAL
        try:
            notify = Notify(self.device.evtchn, action, at, port)
        except OSError:
            return -errno.EINVAL
        if grant_map.notify is not None:
            grant_map.notify.drop()
        grant_map.notify = notify
        return 0
