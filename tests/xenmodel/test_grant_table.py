"""Goal: grant tables as grant_table.h and Xen 4.17's grant_table.c have them: entries, pins, maps and their limits.
Method: tables of cases with the status Xen returns, and the real entry bytes in the owner's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from xenmodel.domain import Domain
from xenmodel.grant_table import ENTRIES_PER_FRAME, MAX_PINS, GrantTable, GrantTableFull, Mapping, MapTrack
from xenmodel.hypervisor import Hypervisor
from xenmodel.memory import GuestMemory
from xenmodel.public import grant_table as g
from xenmodel.types import PAGE_SIZE, Domid, Gref, OutOfResources, Pfn

GRANTED = 5  # the frame the tests grant
RW, RO = g.GNTMAP_host_map, g.GNTMAP_host_map | g.GNTMAP_readonly


class Trio(NamedTuple):
    owner: Domain
    peer: Domain
    stranger: Domain

    def entry(self, ref: int) -> tuple[int, int, int]:
        """flags, domid, frame of an entry, as bytes in the owner's memory: the first frame after shared_info."""
        return g.GRANT_ENTRY_V1.unpack_from(self.owner.memory.run(Pfn(1)), ref * g.GRANT_ENTRY_V1.size)

    def write(self, ref: int, flags: int, domid: int, pfn: int) -> None:
        """What a guest may do at any time: write over its own entry."""
        g.GRANT_ENTRY_V1.pack_into(self.owner.memory.run(Pfn(1)), ref * g.GRANT_ENTRY_V1.size, flags, domid, pfn)

    def map(self, ref: int, flags: int = RW) -> Mapping:
        status, mapping = self.peer.maptrack.map(self.owner.domid, ref, flags)
        assert status == g.GNTST_okay and mapping is not None, g.GNTST_TEXTS[status]
        return mapping


@pytest.fixture
def trio() -> Trio:
    """Domain 1 grants, domain 2 is granted to, domain 3 is not. Domain 1's table is frame 1."""
    hypervisor = Hypervisor()
    domains = [hypervisor.create_domain(16, f"domain {domid}", domid) for domid in (1, 2, 3)]
    for domain in domains:
        ref = domain.grants.grant_access(Domid(0), Pfn(0))  # makes the table exist
        assert domain.grants.end_access(ref)
        domain.memory.allocate(8)
    return Trio(*domains)


# --- the owner's half ----------------------------------------------------------------------------------------------------


def test_references_start_at_eight_and_stay_low(trio: Trio):
    """Goal: 0-7 are the toolstack's; what was ended is reused first.  Method: grant, end one, grant again."""
    refs = [trio.owner.grants.grant_access(trio.peer.domid, Pfn(GRANTED)) for _ in range(4)]
    assert refs == [8, 9, 10, 11]
    assert trio.owner.grants.end_access(Gref(9))
    assert trio.owner.grants.grant_access(trio.peer.domid, Pfn(GRANTED)) == 9


@pytest.mark.parametrize("readonly", [False, True])
def test_entries_are_real_bytes(trio: Trio, readonly: bool):
    """Goal: another program that maps the table sees grant_entry_v1.  Method: unpack it from guest memory."""
    ref = trio.owner.grants.grant_access(trio.peer.domid, Pfn(GRANTED), readonly=readonly)
    flags = g.GTF_permit_access | (g.GTF_readonly if readonly else 0)
    assert trio.entry(ref) == (flags, 2, GRANTED)
    assert [tuple(e) for e in trio.owner.grants.entries()] == [(ref, flags, 2, GRANTED, 0)]
    assert trio.owner.grants.end_access(ref)
    assert trio.entry(ref)[0] == 0
    assert list(trio.owner.grants.entries()) == []


def test_reserved_entries_are_set_and_never_handed_out(trio: Trio):
    """Goal: console 0 and xenstore 1 as the toolstack grants them.  Method: set, map, end; then take every reference."""
    for ref in (g.GNTTAB_RESERVED_CONSOLE, g.GNTTAB_RESERVED_XENSTORE):
        trio.owner.grants.set_entry(Gref(ref), trio.peer.domid, Pfn(GRANTED))
        trio.peer.maptrack.unmap(trio.map(ref).handle)
        assert trio.owner.grants.end_access(Gref(ref))
    taken = [trio.owner.grants.grant_access(trio.peer.domid, Pfn(0)) for _ in range(ENTRIES_PER_FRAME - 8)]
    assert sorted(taken) == list(range(8, ENTRIES_PER_FRAME))


@pytest.mark.parametrize("flags", [RW, RO])
def test_end_access_is_refused_while_mapped(trio: Trio, flags: int):
    """Goal: a frame the peer still sees is not reused (XSA-396).  Method: end before, between and after two mappings."""
    ref = trio.owner.grants.grant_access(trio.peer.domid, Pfn(GRANTED))
    mappings = [trio.map(ref, flags), trio.map(ref, flags)]
    for mapping in mappings:
        before = trio.entry(ref)
        assert not trio.owner.grants.end_access(ref)
        assert trio.entry(ref) == before, "a refusal changes nothing"
        trio.peer.maptrack.unmap(mapping.handle)
    assert trio.owner.grants.end_access(ref)
    with pytest.raises(AssertionError, match="ended twice"):
        trio.owner.grants.end_access(ref)


@pytest.mark.parametrize("flags", [0, g.GTF_readonly, g.GTF_accept_transfer, g.GTF_type_mask])
def test_an_entry_another_program_of_the_guest_wrote_over(trio: Trio, flags: int):
    """Goal: the entry is guest memory, so what it says is no proof of our mistake; ending it twice still is.
    Method: write over a granted entry, end it, take the reference again, end that twice."""
    grants = trio.owner.grants
    ref = grants.grant_access(trio.peer.domid, Pfn(GRANTED))
    free = grants.available
    trio.write(ref, flags, 0, 0)
    assert grants.end_access(ref) and grants.available == free + 1
    assert grants.grant_access(trio.peer.domid, Pfn(GRANTED)) == ref
    assert trio.entry(ref) == (g.GTF_permit_access, 2, GRANTED)
    assert grants.end_access(ref)
    trio.write(ref, g.GTF_permit_access, 2, GRANTED)  # looks granted, and is not
    with pytest.raises(AssertionError, match="ended twice"):
        grants.end_access(ref)


def test_the_table_grows_to_its_limit_and_no_further():
    """Goal: max_grant_frames; and OutOfResources, so that one device fails and not the domain.
    Method: two frames' worth of grants, counting `available` down; then one given back."""
    grants = GrantTable(GuestMemory(8), max_frames=2)
    assert (grants.available, len(grants), grants.frames) == (2 * ENTRIES_PER_FRAME - 8, 0, 0)
    for expected in range(8, 2 * ENTRIES_PER_FRAME):
        assert grants.grant_access(Domid(2), Pfn(0)) == expected
        assert grants.available == 2 * ENTRIES_PER_FRAME - 1 - expected
    with pytest.raises(GrantTableFull, match="max_grant_frames = 2") as full:
        grants.grant_access(Domid(2), Pfn(0))
    assert isinstance(full.value, OutOfResources)
    assert (len(grants), grants.frames) == (2 * ENTRIES_PER_FRAME, 2)
    assert grants.end_access(Gref(600))
    assert grants.grant_access(Domid(2), Pfn(0)) == 600


def test_a_guest_without_memory_cannot_grow_its_table():
    """Goal: the table's frames are the guest's own.  Method: one frame, used by the table; the next needs another."""
    grants = GrantTable(GuestMemory(1))
    for _ in range(ENTRIES_PER_FRAME - 8):
        grants.grant_access(Domid(2), Pfn(0))
    with pytest.raises(OutOfResources):
        grants.grant_access(Domid(2), Pfn(0))
    assert grants.frames == 1


# --- what Xen answers ----------------------------------------------------------------------------------------------------

P = g.GTF_permit_access
MAP_CASES = [  # what, (flags, domid, frame) of the entry, map flags, status; without an entry: (domid, ref) to map
    ("read-write", (P, 2, GRANTED), RW, g.GNTST_okay),
    ("read-only", (P, 2, GRANTED), RO, g.GNTST_okay),
    ("read-only of a read-only entry", (P | g.GTF_readonly, 2, GRANTED), RO, g.GNTST_okay),
    ("read-write of a read-only entry", (P | g.GTF_readonly, 2, GRANTED), RW, g.GNTST_general_error),
    ("cache attributes are not looked at", (P | g.GTF_PWT | g.GTF_PCD, 2, GRANTED), RW, g.GNTST_okay),
    ("to a device only", (P, 2, GRANTED), g.GNTMAP_device_map, g.GNTST_okay),
    ("to nothing", (P, 2, GRANTED), 0, g.GNTST_bad_gntref),
    ("to nothing, read-only", (P, 2, GRANTED), g.GNTMAP_readonly, g.GNTST_bad_gntref),
    ("unused entry", (g.GTF_invalid, 2, GRANTED), RW, g.GNTST_general_error),
    ("transfer entry", (g.GTF_accept_transfer, 2, GRANTED), RW, g.GNTST_general_error),
    ("transitive entry", (g.GTF_transitive, 2, GRANTED), RW, g.GNTST_general_error),
    ("sub-page entry", (P | g.GTF_sub_page, 2, GRANTED), RW, g.GNTST_general_error),
    ("another domain's", (P, 3, GRANTED), RW, g.GNTST_general_error),
    ("last frame", (P, 2, 15), RW, g.GNTST_okay),
    ("frame beyond the memory", (P, 2, 16), RW, g.GNTST_bad_page),
    ("frame far beyond", (P, 2, 2**32 - 1), RO, g.GNTST_bad_page),
]


@pytest.mark.parametrize(("entry", "flags", "expected"), [c[1:] for c in MAP_CASES], ids=[c[0] for c in MAP_CASES])
def test_status_of_a_map(trio: Trio, entry: tuple[int, int, int], flags: int, expected: int):
    """Goal: GNTST_* of gnttab_map_grant_ref.  Method: the entry as bytes, one map; a refusal marks and keeps nothing."""
    trio.write(20, *entry)
    status, mapping = trio.peer.maptrack.map(1, 20, flags)
    assert g.GNTST_TEXTS[status] == g.GNTST_TEXTS[expected]
    assert (mapping is not None) == (status == g.GNTST_okay) == (20 in trio.owner.grants.active)
    if mapping is None:
        assert trio.entry(20) == entry and not trio.peer.maptrack.mappings
    else:
        assert trio.entry(20)[0] & g.GTF_reading
        trio.peer.maptrack.unmap(mapping.handle)
        assert trio.entry(20) == entry


@pytest.mark.parametrize(
    ("domid", "ref", "flags", "expected"),
    [
        (9, 8, RW, g.GNTST_bad_domain),
        (9, 8, 0, g.GNTST_bad_gntref),  # the flags are looked at first
        (1, ENTRIES_PER_FRAME, RW, g.GNTST_bad_gntref),
        (1, 2**32 - 1, RW, g.GNTST_bad_gntref),
        (1, -1, RW, g.GNTST_bad_gntref),
        (1, ENTRIES_PER_FRAME - 1, RW, g.GNTST_general_error),
    ],
)
def test_status_of_a_map_of_nothing(trio: Trio, domid: int, ref: int, flags: int, expected: int):
    """Goal: which check comes first.  Method: numbers that name no entry."""
    assert trio.peer.maptrack.map(domid, ref, flags) == (expected, None)


def test_status_of_an_unmap(trio: Trio):
    """Goal: a handle works once.  Method: unmap twice, unmap what never was, unmap another domain's handle."""
    ref = trio.owner.grants.grant_access(trio.peer.domid, Pfn(GRANTED))
    mapping = trio.map(ref)
    assert trio.stranger.maptrack.unmap(mapping.handle) == g.GNTST_bad_handle
    assert trio.peer.maptrack.unmap(mapping.handle) == g.GNTST_okay
    for handle in (mapping.handle, -1, 2**32):
        assert trio.peer.maptrack.unmap(handle) == g.GNTST_bad_handle


def test_a_domain_may_map_its_own_grant(trio: Trio):
    """Goal: loop-back devices.  Method: domain 1 grants to itself."""
    ref = trio.owner.grants.grant_access(trio.owner.domid, Pfn(GRANTED))
    status, mapping = trio.owner.maptrack.map(1, ref)
    assert status == g.GNTST_okay and mapping is not None
    mapping.view[:3] = b"abc"
    assert trio.owner.memory.run(Pfn(GRANTED))[:3] == b"abc"


def test_a_mapping_is_the_frame(trio: Trio):
    """Goal: shared memory, and read-only really is.  Method: write on each side; a write through a read-only view fails."""
    ref = trio.owner.grants.grant_access(trio.peer.domid, Pfn(GRANTED))
    writable, readonly = trio.map(ref), trio.map(ref, RO)
    assert len(writable.view) == len(readonly.view) == PAGE_SIZE
    trio.owner.memory.run(Pfn(GRANTED))[100:103] = b"one"
    assert bytes(writable.view[100:103]) == bytes(readonly.view[100:103]) == b"one"
    writable.view[100:103] = b"two"
    assert trio.owner.memory.run(Pfn(GRANTED))[100:103] == b"two"
    with pytest.raises(TypeError):
        readonly.view[0] = 1


# --- pins ----------------------------------------------------------------------------------------------------------------

R, W = g.GTF_reading, g.GTF_reading | g.GTF_writing


def test_flags_follow_the_pin_counts(trio: Trio):
    """Goal: GTF_reading while anybody maps, GTF_writing while anybody may write.  Method: a script of maps and unmaps."""
    ref = trio.owner.grants.grant_access(trio.peer.domid, Pfn(GRANTED))
    held: dict[str, Mapping] = {}
    script = [("+r1", R), ("+w1", W), ("-r1", W), ("+w2", W), ("+r2", W), ("-w1", W), ("-w2", R), ("-r2", 0), ("+w3", W)]
    for step, flags in script:
        if step[0] == "+":
            held[step[1:]] = trio.map(ref, RW if step[1] == "w" else RO)
        else:
            trio.peer.maptrack.unmap(held.pop(step[1:]).handle)
        assert trio.entry(ref)[0] == P | flags, step
        pins = [entry.pins for entry in trio.owner.grants.entries()]
        assert pins == [len(held)], step


@pytest.mark.parametrize(("flags", "other"), [(RO, RW), (RW, RO)])
def test_128_pins_of_a_kind(trio: Trio, flags: int, other: int):
    """Goal: the 8-bit counts never overflow, and each kind has its own.  Method: map until refused; the other kind."""
    ref = trio.owner.grants.grant_access(trio.peer.domid, Pfn(GRANTED))
    mappings = [trio.map(ref, flags) for _ in range(MAX_PINS)]
    assert trio.peer.maptrack.map(1, ref, flags) == (g.GNTST_general_error, None)
    assert len(trio.peer.maptrack.mappings) == MAX_PINS == 128
    mappings.append(trio.map(ref, other))
    trio.peer.maptrack.unmap(mappings.pop(0).handle)
    mappings.append(trio.map(ref, flags))
    trio.peer.maptrack.unmap_all()
    assert trio.entry(ref)[0] == P and not trio.owner.grants.active


def test_maptrack_limit(trio: Trio):
    """Goal: max_maptrack_frames bounds what a domain maps; the domain is looked up before, the entry after.
    Method: one frame of 256 handles; then handles are reused and stay few."""
    maptrack = MapTrack(Domid(2), trio.peer.memory, trio.peer.hypervisor.grants_of, max_frames=1)
    refs = [trio.owner.grants.grant_access(trio.peer.domid, Pfn(GRANTED)) for _ in range(256)]
    for ref in refs:
        assert maptrack.map(1, ref)[0] == g.GNTST_okay
    assert maptrack.map(1, refs[0]) == (g.GNTST_no_device_space, None)
    assert maptrack.map(9, refs[0]) == (g.GNTST_bad_domain, None)
    assert maptrack.map(1, 10**6) == (g.GNTST_no_device_space, None)
    assert maptrack.unmap(77) == g.GNTST_okay
    status, mapping = maptrack.map(1, refs[0])
    assert status == g.GNTST_okay and mapping is not None and mapping.handle == 77


# --- a guest that rewrites an entry in use (XSA-500) --------------------------------------------------------------------

REWRITES = [  # what the owner writes over a pinned entry: flags, domid, frame; what a first writer is told
    ("another frame", (P | W, 2, 7), g.GNTST_okay),
    ("a frame that is none", (P, 2, 2**32 - 1), g.GNTST_okay),
    ("read-only", (P | g.GTF_readonly, 2, GRANTED), g.GNTST_general_error),
    ("another domain", (P, 3, GRANTED), g.GNTST_general_error),
    ("sub-page", (P | g.GTF_sub_page, 2, GRANTED), g.GNTST_general_error),
    ("nothing", (0, 0, 0), g.GNTST_general_error),
]


@pytest.mark.parametrize("pinned", [RW, RO])
@pytest.mark.parametrize(("rewritten", "upgrade"), [c[1:] for c in REWRITES], ids=[c[0] for c in REWRITES])
def test_while_pinned_the_active_copy_decides(trio: Trio, rewritten: tuple[int, int, int], upgrade: int, pinned: int):
    """Goal: what is mapped stays, and mapped again it is the same frame. Only the step from reading to writing asks the
    entry again, whether and not which frame.  Method: map, rewrite the entry, map once more each way."""
    ref = trio.owner.grants.grant_access(trio.peer.domid, Pfn(GRANTED))
    first = trio.map(ref, pinned)
    trio.write(ref, *rewritten)
    for flags in (RO, RW):
        status, again = trio.peer.maptrack.map(1, ref, flags)
        expected = upgrade if (pinned, flags) == (RO, RW) else g.GNTST_okay
        assert g.GNTST_TEXTS[status] == g.GNTST_TEXTS[expected]
        assert again is None or again.frame == first.frame == (trio.owner.memory, GRANTED)
        if (pinned, flags) != (RO, RW):
            assert trio.entry(ref) == rewritten, "Xen writes into an entry for the first reader and the first writer only"
    assert trio.stranger.maptrack.map(1, ref)[0] == g.GNTST_general_error, "one domain at a time"
    trio.peer.maptrack.unmap_all()
    assert not trio.owner.grants.active
    assert not trio.entry(ref)[0] & W, "the last one to let go clears the flags, whatever is in the entry"


@pytest.mark.parametrize("act", [lambda t: t.owner.hypervisor.destroy_domain(1), lambda t: t.write(8, 0, 0, 0)])
def test_a_mapping_holds_its_frame_whatever_the_granter_does(trio: Trio, act: Callable[[Trio], None]):
    """Goal: no use after free.  Method: the granter dies or wipes the entry; the view still works and unmaps once."""
    ref = trio.owner.grants.grant_access(trio.peer.domid, Pfn(GRANTED))
    mapping = trio.map(ref)
    act(trio)
    mapping.view[:] = b"\x77" * PAGE_SIZE
    assert trio.peer.maptrack.unmap(mapping.handle) == g.GNTST_okay
    assert not trio.owner.grants.active
