"""gntdev.py: /dev/xen/gntdev, drivers/xen/gntdev.c: grants of other domains, mapped for programs of this one.

Gntdev is a domain's device, GntdevUser one open of it. The node in xenfs/nodes decodes ioctls and calls these; where a frame
becomes visible to a process is behind a port, the Arena. Requests that may be long, or must wait for a disk, are jobs of
steps.py.

As in Linux: MAP gives an index, UNMAP wants the index and count of one MAP, a notification is sent before the unmapping and
its port is held until then. Unlike Linux, grants are mapped by the ioctl already (nobody tells us of the mmap), writable
wherever the grant allows it, and unmapped by UNMAP even if the process still has an mmap of them: that then shows nothing.

Invariant: every Mapping of a user is in one of its maps, and each frame of it counts as one use of the arena's slot.
Left out: DMABUF_*; write protection (docs/devxen.md).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

from sysdev.evtchn import EvtchnDevice
from sysdev.steps import Job, Pause
from xenmodel.domain import Domain
from xenmodel.grant_table import Mapping
from xenmodel.memory import Frame, OutOfMemory
from xenmodel.public.grant_table import GNTMAP_host_map, GNTMAP_readonly, GNTST_no_device_space
from xenmodel.types import PAGE_SIZE

REFS_MOST = 64 * 1024  # in one MAP_GRANT_REF: Linux's limit
SLICE = 256  # grants that are mapped or unmapped before others have their turn
UNMAP_NOTIFY_CLEAR_BYTE, UNMAP_NOTIFY_SEND_EVENT = 1, 2


class Arena(Protocol):
    """Where frames are put so that processes can map them: xenfs/arena.py."""

    def reserve(self, count: int, domid: int) -> Any: ...
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

    def fire(self, view: memoryview | None) -> None:
        """It is unmapped now; `view` is the page `at` is in, None if it may not be written."""
        if self.action & UNMAP_NOTIFY_CLEAR_BYTE and view is not None:
            view[self.at % PAGE_SIZE] = 0
        if self.action & UNMAP_NOTIFY_SEND_EVENT:
            self.evtchn.send(self.port)
        self.drop()

    def drop(self) -> None:
        """Another one takes its place."""
        if self.action & UNMAP_NOTIFY_SEND_EVENT:
            self.evtchn.put(self.port)
        self.action = 0


class GrantMap:
    """What one MAP_GRANT_REF mapped."""

    __slots__ = ("index", "mappings", "notify")

    def __init__(self, index: int, mappings: list[Mapping]) -> None:
        self.index = index
        self.mappings = mappings
        self.notify: Notify | None = None

    def covers(self, offset: int) -> bool:
        return self.index <= offset < self.index + len(self.mappings) * PAGE_SIZE


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


class GntdevUser:
    """One open of it."""

    def __init__(self, device: Gntdev) -> None:
        self.device = device
        self.maps: list[GrantMap] = []
        self.closed = False

    # --- mapping -----------------------------------------------------------------------------------------------------

    def map(self, refs: Sequence[tuple[int, int]], owner: str) -> Job[int]:
        """MAP_GRANT_REF of (domid, ref)s: the index, or a negative errno.

        EINVAL: none or too many, or a grant that is not there for us. ENOSPC: this domain has too much mapped. EBUSY: a
        frame is mapped by another process, in another order. ENOMEM: the host cannot map so many pieces."""
        if not 0 < len(refs) <= REFS_MOST:
            return -errno.EINVAL
        pinned: list[Mapping] = []
        shown: list[Mapping] = []
        status = yield from self._pin(refs, owner, pinned)
        try:
            if status == 0 and not self.closed:
                index = yield from self._show(pinned, shown)
                if not self.closed:
                    self.maps.append(GrantMap(index, pinned))
                    return index
        except OutOfMemory:
            status = -errno.ENOMEM
        except OSError as error:
            status = -(error.errno or errno.EIO)
        yield from self._unpin(pinned, len(shown))
        return status or -errno.EIO

    def _pin(self, refs: Sequence[tuple[int, int]], owner: str, mappings: list[Mapping]) -> Job[int]:
        track = self.device.domain.maptrack
        for done, (domid, ref) in enumerate(refs, 1):
            status, mapping = track.map(domid, ref, GNTMAP_host_map)
            if mapping is None and status != GNTST_no_device_space:
                status, mapping = track.map(domid, ref, GNTMAP_host_map | GNTMAP_readonly)
            if mapping is None:
                return -errno.ENOSPC if status == GNTST_no_device_space else -errno.EINVAL
            mapping.owner = owner
            mappings.append(mapping)
            if done % SLICE == 0:
                yield Pause.TURN
        return 0

    def _show(self, mappings: list[Mapping], shown: list[Mapping]) -> Job[int]:
        """Make them visible; the offset at which they are. What was done is in `shown`, also after an exception."""
        arena, domid = self.device.arena, self.device.domain.domid
        offset = arena.where(mappings[0].frame)
        run = arena.reserve(len(mappings), domid) if offset is None else None
        try:
            while len(shown) < len(mappings):
                part = mappings[len(shown) : len(shown) + SLICE]
                frames = [mapping.frame for mapping in part]
                if offset is not None:
                    arena.join(frames, offset + len(shown) * PAGE_SIZE, domid)
                elif not arena.show(frames, run, len(shown)):
                    yield Pause.EVENT
                    continue
                shown += part
                if len(shown) < len(mappings):
                    yield Pause.TURN
        finally:
            if run is not None:
                arena.give_up(run, len(mappings) - len(shown))
        return int(run.offset) if run is not None else offset or 0

    # --- unmapping ---------------------------------------------------------------------------------------------------

    def unmap(self, index: int, count: int) -> Job[int]:
        """UNMAP_GRANT_REF: ENOENT if no MAP gave that index and count."""
        for grant_map in self.maps:
            if grant_map.index == index and len(grant_map.mappings) == count:
                return (yield from self._unmap(grant_map))
        return -errno.ENOENT

    def close(self) -> Job[int]:
        """The descriptor is gone: all of it."""
        self.closed = True
        self.device.users.discard(self)
        for grant_map in list(self.maps):
            yield from self._unmap(grant_map)
        return 0

    def _unmap(self, grant_map: GrantMap) -> Job[int]:
        if grant_map not in self.maps:
            return 0  # it is being unmapped
        self.maps.remove(grant_map)
        if grant_map.notify is not None:
            mapping = grant_map.mappings[(grant_map.notify.at - grant_map.index) // PAGE_SIZE]
            grant_map.notify.fire(None if mapping.readonly else mapping.view)
        return (yield from self._unpin(grant_map.mappings, len(grant_map.mappings)))

    def _unpin(self, mappings: list[Mapping], shown: int) -> Job[int]:
        """Undo mappings, of which the first `shown` can be seen: once a frame is where its owner expects it to be."""
        unmap, leave = self.device.domain.maptrack.unmap, self.device.arena.leave
        for first in range(0, shown, SLICE):
            part = mappings[first : min(first + SLICE, shown)]
            leave([(mapping.frame, partial(unmap, mapping.handle)) for mapping in part])
            if first + SLICE < shown:
                yield Pause.TURN
        for mapping in mappings[shown:]:
            unmap(mapping.handle)
        return 0

    # --- the others ----------------------------------------------------------------------------------------------------

    def find(self, offset: int) -> tuple[int, int] | None:
        """GET_OFFSET_FOR_VADDR, once the offset behind the address is known: index and count of that map."""
        for grant_map in self.maps:
            if grant_map.covers(offset):
                return grant_map.index, len(grant_map.mappings)
        return None

    def set_unmap_notify(self, at: int, action: int, port: int) -> int:
        """SET_UNMAP_NOTIFY: `at` is an index plus the place of a byte. ENOENT: not in a map of ours; EINVAL: see Notify, or
        a byte of a grant that is read-only."""
        for grant_map in self.maps:
            if grant_map.covers(at):
                break
        else:
            return -errno.ENOENT
        mapping = grant_map.mappings[(at - grant_map.index) // PAGE_SIZE]
        if action & UNMAP_NOTIFY_CLEAR_BYTE and mapping.readonly:
            return -errno.EINVAL
        try:
            notify = Notify(self.device.evtchn, action, at, port)
        except OSError:
            return -errno.EINVAL
        if grant_map.notify is not None:
            grant_map.notify.drop()
        grant_map.notify = notify
        return 0
