"""grant_table.py: grant_table.h version 1. Who may see which frame, in real entries in the guest's own memory.

GrantTable is one domain's table. Its upper half is what the guest kernel does (grant_access, end_access: plain writes to
its own memory); the lower half is what Xen does when a peer asks (pin, unpin). MapTrack is what one domain has mapped
from others: gnttab_map_grant_ref, gnttab_unmap_grant_ref and gnttab_copy.

Invariants: GTF_reading/GTF_writing in an entry follow its pin counts, set and cleared in pin() and unpin() only; while an
entry is pinned its *active* copy decides, never the guest's bytes (XSA-500); a mapping holds its frame until it is undone,
whatever the granter does. Statuses are the GNTST_* that Xen 4.17 returns at that place.
Left out: version 2, transitive grants and transfer (refused like on a host that forbids them), device maps, cache flags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from xenmodel.memory import Frame, GuestMemory
from xenmodel.public.grant_table import (
    GNTMAP_device_map,
    GNTMAP_host_map,
    GNTMAP_readonly,
    GNTST_bad_copy_arg,
    GNTST_bad_domain,
    GNTST_bad_gntref,
    GNTST_bad_handle,
    GNTST_bad_page,
    GNTST_general_error,
    GNTST_no_device_space,
    GNTST_okay,
    GNTST_permission_denied,
    GTF_permit_access,
    GTF_reading,
    GTF_readonly,
    GTF_sub_page,
    GTF_type_mask,
    GTF_writing,
)
from xenmodel.public.xen import DOMID_SELF
from xenmodel.types import PAGE_SIZE, Domid, Gref, OutOfResources, Pfn

ENTRIES_PER_FRAME = 512  # 8-byte entries
RESERVED_REFS = 8  # GNTTAB_NR_RESERVED_ENTRIES: 0 console, 1 xenstore
MAX_PINS = 0x80  # Xen refuses a pin when bit 7 of the 8-bit count is set
DEFAULT_MAX_FRAMES = 64  # gnttab_max_frames
DEFAULT_MAX_MAPTRACK_FRAMES = 1024  # gnttab_max_maptrack_frames
MAPTRACK_PER_FRAME = 256  # 16-byte struct grant_mapping


class GrantTableFull(OutOfResources):
    """No free reference is left and the table may not grow: raise max_grant_frames."""


class Active:
    """Xen's own record of an entry in use (struct active_grant_entry)."""

    __slots__ = ("domid", "pfn", "readers", "writers")

    def __init__(self, domid: int, pfn: int) -> None:
        self.domid = domid
        self.pfn = pfn
        self.readers = 0
        self.writers = 0


class Entry(NamedTuple):
    """One used entry, for inspection."""

    ref: int
    flags: int
    domid: int
    pfn: int
    pins: int


class GrantTable:
    """One domain's table, at most `max_frames` frames of it, grown one frame at a time."""

    def __init__(self, memory: GuestMemory, max_frames: int = DEFAULT_MAX_FRAMES) -> None:
        self.memory = memory
        self.max_frames = max_frames
        self.active: dict[int, Active] = {}
        self._frames: list[memoryview] = []  # each frame as 1024 u32 words: flags | domid << 16, pfn
        self._granted: set[int] = set()
        self._free: list[int] = []  # LIFO, so that the references in use stay few and low
        self._ending: dict[int, Callable[[], None]] = {}  # to be revoked as soon as no peer has them mapped

    # --- the guest's half ------------------------------------------------------------------------------------------

    def grant_access(self, domid: Domid, pfn: Pfn, *, readonly: bool = False) -> Gref:
        """Let `domid` map or copy frame `pfn`. GrantTableFull when no reference is left."""
        if not self._free:
            self._grow()
        ref = self._free.pop()
        self.set_entry(Gref(ref), domid, pfn, readonly=readonly)
        return Gref(ref)

    def set_entry(self, ref: Gref, domid: Domid, pfn: Pfn, *, readonly: bool = False) -> None:
        """Fill a particular entry (the reserved ones: 0 console, 1 xenstore), in the order grant_table.h asks for."""
        while ref >= len(self._frames) * ENTRIES_PER_FRAME:
            self._grow()
        words, i = self._frames[ref >> 9], (ref & 511) << 1
        self._granted.add(ref)
        words[i + 1] = pfn
        words[i] = GTF_permit_access | (GTF_readonly if readonly else 0) | domid << 16

    def end_access(self, ref: Gref) -> bool:
        """Revoke; False, and nothing happens, while a peer has it mapped: the frame must then not be reused (XSA-396)."""
        words, i = self._frames[ref >> 9], (ref & 511) << 1
        if words[i] & (GTF_reading | GTF_writing):
            return False
        assert ref in self._granted, f"grant {ref} ended twice"
        self._granted.remove(ref)  # the entry itself is guest memory: another program there may have zeroed it
        words[i] = 0
        if ref >= RESERVED_REFS:
            self._free.append(ref)
        return True

    def end_access_later(self, ref: Gref, then: Callable[[], None]) -> None:
        """Revoke, now or as soon as no peer has it mapped (Linux's deferred list); `then` is called when the frame is free
        for other use."""
        if self.end_access(ref):
            then()
        else:
            self._ending[ref] = then

    def _grow(self) -> None:
        if len(self._frames) >= self.max_frames:
            raise GrantTableFull(f"all {len(self)} grant references are in use (max_grant_frames = {self.max_frames})")
        first = len(self._frames) * ENTRIES_PER_FRAME
        self._frames.append(self.memory.run(self.memory.allocate()).cast("I"))
        self._free[:0] = range(first + ENTRIES_PER_FRAME - 1, max(first, RESERVED_REFS) - 1, -1)

    def __len__(self) -> int:
        """nr_grant_entries: how many entries the table has now."""
        return len(self._frames) * ENTRIES_PER_FRAME

    @property
    def available(self) -> int:
        """References that can still be handed out, growth included."""
        ungrown = (self.max_frames - len(self._frames)) * ENTRIES_PER_FRAME
        return len(self._free) + ungrown - (0 if self._frames else RESERVED_REFS)

    @property
    def frames(self) -> int:
        return len(self._frames)

    def entries(self) -> Iterator[Entry]:
        """Every used entry, as the guest's memory has it now."""
        for ref in range(len(self)):
            words, i = self._frames[ref >> 9], (ref & 511) << 1
            if words[i]:
                pins = self.active.get(ref)
                count = pins.readers + pins.writers if pins else 0
                yield Entry(ref, words[i] & 0xFFFF, words[i] >> 16, words[i + 1], count)

    # --- Xen's half ------------------------------------------------------------------------------------------------

    def pin(self, ref: int, by: Domid, readonly: bool, mapping: bool = True) -> tuple[int, Active | None]:
        """Check an entry for `by` and count one more use of it; (GNTST_okay, active) or (an error status, None).

        `mapping` is False for a copy, which may use an entry that says sub_page."""
        if not 0 <= ref < len(self):
            return GNTST_bad_gntref, None
        words, i = self._frames[ref >> 9], (ref & 511) << 1
        active = self.active.get(ref)
        if active is not None:
            pins = active.readers if readonly else active.writers
            if active.domid != by or pins >= MAX_PINS:
                return GNTST_general_error, None
        if fresh := active is None or (not readonly and not active.writers):
            header = words[i]  # read once: the guest may be changing it
            flags = header & 0xFFFF
            mask = GTF_type_mask | GTF_sub_page if mapping else GTF_type_mask
            if flags & mask != GTF_permit_access or header >> 16 != by:
                return GNTST_general_error, None
            if not readonly and flags & GTF_readonly:
                return GNTST_general_error, None
        if active is None:
            active = Active(by, words[i + 1])
            if active.pfn >= self.memory.pages:
                return GNTST_bad_page, None
            self.active[ref] = active
        if readonly:
            active.readers += 1
        else:
            active.writers += 1
        if fresh:
            words[i] |= GTF_reading if readonly else GTF_reading | GTF_writing
        return GNTST_okay, active

    def peek(self, refs: Sequence[int], by: Domid, readonly: bool) -> list[int]:
        """Where each of `refs` leads for `by` at this moment, as gnttab_copy would find: a pfn, or a GNTST_* below 0.

        For a caller that is done with the frames before anything else can run: what a copy pins and unpins within one
        call nobody can see, so it is not written down."""
        if len(refs) > 2 and refs[-1] - refs[0] == len(refs) - 1 and refs[-1] < len(self):
            found = self._peek_neighbours(refs, by, readonly)  # as drivers' buffers are
            if found is not None:
                return found
        frames, active, pages = self._frames, self.active, self.memory.pages
        mask = 0xFFFF0000 | GTF_type_mask | (0 if readonly else GTF_readonly)
        want, nr_entries = GTF_permit_access | by << 16, len(self)
        found = []
        for ref in refs:
            if ref in active:
                status, record = self.pin(ref, by, readonly, mapping=False)
                if record is not None:
                    status = record.pfn
                    self.unpin(ref, readonly)
                found.append(status)
            elif ref >= nr_entries:
                found.append(GNTST_bad_gntref)
            else:
                words, i = frames[ref >> 9], (ref & 511) << 1
                if words[i] & mask != want:
                    found.append(GNTST_general_error)
                elif (pfn := words[i + 1]) < pages:
                    found.append(pfn)
                else:
                    found.append(GNTST_bad_page)
        return found

    def _peek_neighbours(self, refs: Sequence[int], by: Domid, readonly: bool) -> list[int] | None:
        """peek() of references in a row, all at once; None if anything about them is not simple."""
        first, count = refs[0], len(refs)
        if list(refs) != list(range(first, first + count)) or not self.active.keys().isdisjoint(refs):
            return None
        words: list[int] = []
        for number in range(first >> 9, ((first + count - 1) >> 9) + 1):
            start, end = max(first - (number << 9), 0), min(first + count - (number << 9), ENTRIES_PER_FRAME)
            words += self._frames[number][start << 1 : end << 1].tolist()
        headers, pfns = words[::2], words[1::2]
        header = headers[0]
        mask = 0xFFFF0000 | GTF_type_mask | (0 if readonly else GTF_readonly)
        granted = header & mask == GTF_permit_access | by << 16 and headers.count(header) == count
        return pfns if granted and max(pfns) < self.memory.pages else None

    def unpin(self, ref: int, readonly: bool) -> None:
        """Undo one pin(); the last one lets go of the entry's flags."""
        active = self.active[ref]
        if readonly:
            active.readers -= 1
        else:
            active.writers -= 1
        assert active.readers >= 0 and active.writers >= 0, f"grant {ref} unpinned too often"
        words, i = self._frames[ref >> 9], (ref & 511) << 1
        if not active.writers:
            words[i] &= ~GTF_writing & 0xFFFFFFFF
            if not active.readers:
                words[i] &= ~GTF_reading & 0xFFFFFFFF
                del self.active[ref]
                if self._ending and ref in self._ending:
                    self.end_access_later(Gref(ref), self._ending.pop(ref))


class Mapping:
    """A granted frame as its mapper sees it: `view` is the frame, read-only if that was asked for.

    For inspection: whose frame it is, who in the mapping domain holds it ("" is its kernel), and since when."""

    __slots__ = ("domid", "frame", "handle", "owner", "readonly", "ref", "since", "table", "view")

    def __init__(
        self, handle: int, domid: int, table: GrantTable, ref: int, frame: Frame, readonly: bool, since: float
    ) -> None:
        self.handle = handle
        self.domid = domid
        self.since = since
        self.owner = ""
        self.table = table
        self.ref = ref
        self.frame = frame
        self.readonly = readonly
        view = frame.memory.run(Pfn(frame.pfn))
        self.view = view.toreadonly() if readonly else view


class CopyPtr(NamedTuple):
    """One side of a gnttab_copy: a granted frame (`ref` of `domid`), or with ref None the caller's own frame `pfn`.

    As in Xen, `domid` may be DOMID_SELF, and must be the caller where there is no ref."""

    offset: int
    domid: Domid
    ref: int | None = None
    pfn: int = 0


class MapTrack:
    """What domain `domid` has mapped from others. `lookup` finds a living domain's table, or None; `clock` dates them."""

    def __init__(
        self,
        domid: Domid,
        memory: GuestMemory,
        lookup: Callable[[int], GrantTable | None],
        max_frames: int = DEFAULT_MAX_MAPTRACK_FRAMES,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.domid = domid
        self.clock = clock
        self.memory = memory
        self.lookup = lookup
        self.limit = max_frames * MAPTRACK_PER_FRAME
        self.mappings: dict[int, Mapping] = {}
        self._next_handle = 0
        self._free_handles: list[int] = []

    def map(self, domid: int, ref: int, flags: int = GNTMAP_host_map) -> tuple[int, Mapping | None]:
        """gnttab_map_grant_ref: (GNTST_okay, mapping) or (an error status, None)."""
        if not flags & (GNTMAP_host_map | GNTMAP_device_map):
            return GNTST_bad_gntref, None
        table = self.lookup(domid)
        if table is None:
            return GNTST_bad_domain, None
        if len(self.mappings) >= self.limit:
            return GNTST_no_device_space, None
        readonly = bool(flags & GNTMAP_readonly)
        status, active = table.pin(ref, self.domid, readonly)
        if active is None:
            return status, None
        if self._free_handles:
            handle = self._free_handles.pop()
        else:
            handle, self._next_handle = self._next_handle, self._next_handle + 1
        frame = Frame(table.memory, active.pfn)
        mapping = Mapping(handle, domid, table, ref, frame, readonly, self.clock())
        self.mappings[handle] = mapping
        return GNTST_okay, mapping

    def unmap(self, handle: int) -> int:
        """gnttab_unmap_grant_ref. A handle that is not mapped (any more) is GNTST_bad_handle."""
        mapping = self.mappings.pop(handle, None)
        if mapping is None:
            return GNTST_bad_handle
        self._free_handles.append(handle)
        mapping.table.unpin(mapping.ref, mapping.readonly)
        return GNTST_okay

    def unmap_all(self) -> None:
        for handle in list(self.mappings):
            self.unmap(handle)

    def copy(self, source: CopyPtr, dest: CopyPtr, length: int) -> int:
        """gnttab_copy of one segment: within one page on each side. A length of 0 asks for nothing and gets GNTST_okay.

        What is wrong is found in Xen's order: domains, source, destination, and the page boundary last."""
        if length == 0:
            return GNTST_okay
        tables: list[GrantTable] = []
        for side in (source, dest):
            domid = self.domid if side.domid == DOMID_SELF else side.domid
            if side.ref is None and domid != self.domid:
                return GNTST_permission_denied
            table = self.lookup(domid)
            if table is None:
                return GNTST_bad_domain
            tables.append(table)
        status, data = self._copy_side(tables[0], source, readonly=True)
        if data is None:
            return status
        status, target = self._copy_side(tables[1], dest, readonly=False)
        if target is not None:
            if min(length, source.offset, dest.offset) < 0 or max(source.offset, dest.offset) + length > PAGE_SIZE:
                status = GNTST_bad_copy_arg
            else:
                target[dest.offset : dest.offset + length] = data[source.offset : source.offset + length]
            if dest.ref is not None:
                tables[1].unpin(dest.ref, readonly=False)
        if source.ref is not None:
            tables[0].unpin(source.ref, readonly=True)
        return status

    def _copy_side(self, table: GrantTable, side: CopyPtr, readonly: bool) -> tuple[int, memoryview | None]:
        if side.ref is None:
            if not 0 <= side.pfn < self.memory.pages:
                return GNTST_bad_page, None
            return GNTST_okay, self.memory.run(Pfn(side.pfn))
        status, active = table.pin(side.ref, self.domid, readonly, mapping=False)
        return status, None if active is None else table.memory.run(Pfn(active.pfn))
