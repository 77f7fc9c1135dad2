"""gntcopy.py: GRANT_COPY of /dev/xen/gntdev: between granted frames, or a granted frame and the memory of the caller.

A job of steps.py. Each segment has a status of its own, a
GNTST_*; what is wrong with the request itself is an errno, and then no status is told. As in Linux: a part that is granted
lies in one page, a part that is not may cross pages, one of the two must be granted, a length of 0 is nothing.

Invariant: a frame is pinned only from before its data moves until after.
"""

from __future__ import annotations

import errno
from struct import Struct
from typing import NamedTuple

from sysdev.steps import Job, Pause, TransferIn, TransferOut
from xenmodel.domain import Domain
from xenmodel.grant_table import CopyPtr, GrantTable
from xenmodel.public.grant_table import GNTCOPY_dest_gref, GNTCOPY_source_gref, GNTST_bad_domain, GNTST_okay
from xenmodel.public.xen import DOMID_SELF
from xenmodel.types import PAGE_SIZE, Domid, Pfn

SEGMENT = Struct("<QQHHhxx")  # source dest len flags status; a side is an address, or ref offset domid
STATUS = Struct("<h")
STATUS_AT = 20
_FOREIGN = Struct("<IHH")  # ref offset domid
SLICE = 128  # segments before others have their turn


class Pinned(NamedTuple):
    """A granted frame in use."""

    table: GrantTable
    ref: int
    readonly: bool


def copy(domain: Domain, segments: bytes) -> Job[list[int]]:
    """What became of each segment. OSError EINVAL, EFAULT: the request is bad, ENODEV: the domain has
    ended; some of it may have been done."""
    statuses: list[int] = []
    for first in range(0, len(segments), SLICE * SEGMENT.size):
        if first:
            yield Pause.TURN
        if domain.hypervisor.domains.get(domain.domid) is not domain:
            raise OSError(errno.ENODEV, f"domain {domain.domid} has ended")
        batch = _Batch(domain)
        try:
            for fields in SEGMENT.iter_unpack(segments[first : first + SLICE * SEGMENT.size]):
                statuses.append((yield from batch.add(*fields)))
            yield from batch.flush()
        finally:
            batch.unpin()
    return statuses


class _Batch:
    """Segments whose data moves together, as long as it moves in one direction."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.into: list[tuple[int, memoryview]] = []
        self.out: list[tuple[memoryview, int]] = []
        self.pinned: dict[Pinned, memoryview] = {}

    def add(self, source: int, dest: int, length: int, flags: int, _status: int) -> Job[int]:
        """The status of one segment, whose data has moved, or will with flush()."""
        from_grant, to_grant = bool(flags & GNTCOPY_source_gref), bool(flags & GNTCOPY_dest_gref)
        if not from_grant and not to_grant:
            raise OSError(errno.EINVAL, "neither side of a grant copy is a grant")
        for side, granted in ((source, from_grant), (dest, to_grant)):
            if granted and _foreign(side)[1] + length > PAGE_SIZE:
                raise OSError(errno.EINVAL, "a granted part of a grant copy crosses its page")
        if not length:
            return GNTST_okay
        if from_grant and to_grant:
            yield from self.flush()
            (ref, offset, domid), (dest_ref, dest_offset, dest_domid) = _foreign(source), _foreign(dest)
            there = CopyPtr(dest_offset, self._who(dest_domid), dest_ref)
            return self.domain.maptrack.copy(CopyPtr(offset, self._who(domid), ref), there, length)
        ref, offset, domid = _foreign(source if from_grant else dest)
        status, frame = self._pin(ref, domid, readonly=from_grant)
        if frame is None:
            return status
        if self.into if from_grant else self.out:
            yield from self.flush()
        piece = frame[offset : offset + length]
        if from_grant:
            self.out.append((piece, dest))
        else:
            self.into.append((source, piece))
        return GNTST_okay

    def _who(self, domid: int) -> Domid:
        return self.domain.domid if domid == DOMID_SELF else Domid(domid)

    def _pin(self, ref: int, domid: int, readonly: bool) -> tuple[int, memoryview | None]:
        table = self.domain.maptrack.lookup(self._who(domid))
        if table is None:
            return GNTST_bad_domain, None
        wanted = Pinned(table, ref, readonly)
        if wanted not in self.pinned:  # one pin is enough for many segments, and there are not so many
            status, active = table.pin(ref, self.domain.domid, readonly, mapping=False)
            if active is None:
                return status, None
            self.pinned[wanted] = table.memory.run(Pfn(active.pfn))
        return GNTST_okay, self.pinned[wanted]

    def flush(self) -> Job[None]:
        into, self.into = self.into, []
        out, self.out = self.out, []
        if into:
            yield TransferIn(into)
        if out:
            yield TransferOut(out)

    def unpin(self) -> None:
        for table, ref, readonly in self.pinned:
            table.unpin(ref, readonly)
        self.pinned.clear()


def _foreign(side: int) -> tuple[int, int, int]:
    """A granted side: ref, offset, domid."""
    ref, offset, domid = _FOREIGN.unpack(side.to_bytes(8, "little"))
    return ref, offset, domid
