"""gntalloc.py: /dev/xen/gntalloc, drivers/xen/gntalloc.c: pages of this domain, granted to others by programs of it.

Gntalloc is a domain's device, GntallocUser one open of it. ALLOC_GREF takes frames of the domain's memory, grants each, and
puts them where the process can map them (the Arena of gntdev.py). Programs DEALLOC right after mmap(2), and later only
munmap(2), of which nobody tells us: a page that was deallocated, or whose descriptor was closed, lives on while a look at
the process's maps (`Look`, a job of steps.py, for it may take time) still finds it there. Then its notification is sent
and the grant revoked; and when no peer has the grant mapped any more, the frame is the domain's again.

Invariant: each page is in exactly one of: its user's `pages`, the device's `lingering`, the grant table's deferred list.
Left out: nothing of the ABI; the limit is per domain, as the module parameter of Linux is.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from functools import partial

from sysdev.evtchn import EvtchnDevice
from sysdev.gntdev import Arena, Notify
from sysdev.steps import Job, Pause
from xenmodel.domain import Domain
from xenmodel.grant_table import GrantTableFull
from xenmodel.memory import Frame, OutOfMemory
from xenmodel.public.xen import DOMID_FIRST_RESERVED
from xenmodel.types import PAGE_SIZE, Domid, Gref, Pfn

LIMIT = 1024  # pages of a domain, Linux's default
SLICE = 256  # pages that go home before others have their turn
GNTALLOC_FLAG_WRITABLE = 1

Look = Callable[[Sequence[int]], Job[set[int]]]  # which of these indices, ascending, the processes of an open map now


class Page:
    """One granted page, and where in the arena it is."""

    __slots__ = ("index", "notify", "pfn", "ref")

    def __init__(self, index: int, pfn: Pfn, ref: Gref) -> None:
        self.index = index
        self.pfn = pfn
        self.ref = ref
        self.notify: Notify | None = None


class Gntalloc:
    """One domain's device."""

    def __init__(self, domain: Domain, evtchn: EvtchnDevice, arena: Arena, limit: int = LIMIT) -> None:
        self.domain = domain
        self.evtchn = evtchn
        self.arena = arena
        self.limit = limit
        self.used = 0  # pages, until their frames are the domain's again
        self.stopped = False
        self.users: set[GntallocUser] = set()
        self.lingering: dict[Page, Look] = {}  # nobody can refer to them, but somebody may map them
        self.on_linger: Callable[[], None] = lambda: None  # there is something to sweep()

    def open(self, look: Look) -> GntallocUser:
        """`look` is asked about the pages of this open."""
        user = GntallocUser(self, look)
        self.users.add(user)
        return user

    def linger(self, pages: Sequence[Page], look: Look) -> Job[None]:
        """Pages that nobody will refer to again: free those that no process maps."""
        self.lingering.update((page, look) for page in pages)
        yield from self._free_unmapped(pages, look)

    def sweep(self) -> Job[None]:
        """Look again at what lingers. The host does it now and then while something does."""
        by_open: dict[Look, list[Page]] = {}
        for page, look in self.lingering.items():
            by_open.setdefault(look, []).append(page)
        for look, pages in by_open.items():
            yield from self._free_unmapped(pages, look)

    def _free_unmapped(self, pages: Sequence[Page], look: Look) -> Job[None]:
        """While we look, or between slices, others do, too: what no longer lingers has been freed."""
        try:
            still = yield from look(sorted(page.index for page in pages))
        except OSError:  # who asked was killed
            self.on_linger()
            raise
        unmapped = [page for page in pages if page.index not in still]
        for first in range(0, len(unmapped), SLICE):
            if first:
                yield Pause.TURN
            part = [page for page in unmapped[first : first + SLICE] if page in self.lingering]
            for page in part:
                del self.lingering[page]
            self._free(part)
        if self.lingering:
            self.on_linger()

    def stop(self) -> None:
        """The domain is going, and all of it with it."""
        self.stopped = True
        pages, self.lingering = list(self.lingering), {}
        for user in self.users:
            pages += user.pages.values()
            user.pages = {}
        self._free(pages)

    def _free(self, pages: Sequence[Page]) -> None:
        """Those that no peer has mapped go home together: neighbours are one piece of memory."""
        memory, grants = self.domain.memory, self.domain.grants
        home: list[tuple[Frame, Callable[[], object]]] = []
        for page in pages:
            if page.notify is not None:
                page.notify.clear(memory.run(page.pfn))
                page.notify.send()
            user = Frame(memory, page.pfn), partial(self._released, page.pfn)
            if grants.end_access(page.ref):
                home.append(user)
            else:
                grants.end_access_later(page.ref, partial(self.arena.leave, [user]))
        self.arena.leave(home)

    def _released(self, pfn: Pfn) -> None:
        self.domain.memory.release(pfn)
        self.used -= 1


class GntallocUser:
    """One open of it."""

    def __init__(self, device: Gntalloc, look: Look) -> None:
        self.device = device
        self.look = look
        self.pages: dict[int, Page] = {}  # by index
        self.closed = False

    def alloc(self, domid: int, flags: int, count: int) -> Job[tuple[int, list[Gref]]]:
        """ALLOC_GREF: `count` pages for `domid`: their index, for they are neighbours in the file, and references.

        OSError EINVAL: no domain has that number; ENOSPC: more than the limit, or than the grant table has left; ENOMEM: the
        domain or the host has no more memory; ENODEV: the domain has ended."""
        device = self.device
        if domid >= DOMID_FIRST_RESERVED:
            raise OSError(errno.EINVAL, f"{domid:#x} is no domain")
        if count > device.limit - device.used:
            yield from device.sweep()
        if device.stopped or self.closed:
            raise OSError(errno.ENODEV, f"domain {device.domain.domid} has ended")
        if count > device.limit - device.used:
            raise OSError(errno.ENOSPC, f"domain {device.domain.domid} may grant {device.limit} pages through gntalloc")
        if not count:
            return 0, []
        try:
            while not (pages := self._make(Domid(domid), bool(flags & GNTALLOC_FLAG_WRITABLE), count)):
                yield Pause.EVENT
                if device.stopped or self.closed:
                    raise OSError(errno.ENODEV, f"domain {device.domain.domid} has ended")
        except OutOfMemory as error:
            raise OSError(errno.ENOMEM, str(error)) from error
        except GrantTableFull as error:
            raise OSError(errno.ENOSPC, str(error)) from error
        self.pages.update((page.index, page) for page in pages)
        return pages[0].index, [page.ref for page in pages]

    def _make(self, domid: Domid, writable: bool, count: int) -> list[Page]:
        """Empty if the arena takes none just now."""
        device, memory, grants = self.device, self.device.domain.memory, self.device.domain.grants
        if grants.available < count:
            raise GrantTableFull(f"{count} grants for dev/xen/gntalloc, but only {grants.available} are left")
        first = memory.allocate(count)
        refs: list[Gref] = []
        run, shown = None, False
        try:
            for i in range(count):  # the grant table may need memory, too
                refs.append(grants.grant_access(domid, Pfn(first + i), readonly=not writable))
            run = device.arena.reserve(count, domid, device.domain.domid, self)
            shown = device.arena.show([Frame(memory, first + i) for i in range(count)], run, 0)
        finally:
            if not shown:
                for ref in reversed(refs):
                    grants.end_access(ref)
                if run is not None:
                    device.arena.give_up(run, count)
                memory.release(first, count)
        if run is None or not shown:
            return []
        device.used += count
        index: int = run.offset
        return [Page(index + i * PAGE_SIZE, Pfn(first + i), ref) for i, ref in enumerate(refs)]

    def dealloc(self, index: int, count: int) -> Job[int]:
        """DEALLOC_GREF of pages that follow one another: EINVAL if they are not all ours."""
        indices = range(index, index + count * PAGE_SIZE, PAGE_SIZE)
        if not 0 < count <= len(self.pages) or not all(one in self.pages for one in indices):
            return -errno.EINVAL
        yield from self.device.linger([self.pages.pop(one) for one in indices], self.look)
        return 0

    def set_unmap_notify(self, at: int, action: int, port: int) -> int:
        """SET_UNMAP_NOTIFY: ENOENT if `at` is in no page of ours, EINVAL as Notify says."""
        page = self.pages.get(at & -PAGE_SIZE)
        if page is None:
            return -errno.ENOENT
        try:
            notify = Notify(self.device.evtchn, action, at, port)
        except OSError:
            return -errno.EINVAL
        if page.notify is not None:
            page.notify.drop()
        page.notify = notify if action else None
        return 0

    def close(self) -> Job[None]:
        """The descriptor is gone. Its pages go, too, but those that a process still maps."""
        self.closed = True
        self.device.users.discard(self)
        self.device.arena.disown(self)
        pages, self.pages = list(self.pages.values()), {}
        if pages:
            yield from self.device.linger(pages, self.look)
