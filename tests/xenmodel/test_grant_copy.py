"""Goal: gnttab_copy as Xen 4.17 does it: one page on each side, every status in Xen's order, nothing held afterwards.
Method: three domains, a table of segments, and the bytes on both sides before and after.
"""

from __future__ import annotations

import pytest

from xenmodel.domain import Domain
from xenmodel.grant_table import MAX_PINS, CopyPtr
from xenmodel.hypervisor import Hypervisor
from xenmodel.public import grant_table as g
from xenmodel.public.xen import DOMID_SELF
from xenmodel.types import PAGE_SIZE, Domid, Gref, Pfn

A, B, ME, NOBODY = Domid(1), Domid(2), Domid(3), Domid(9)
OWN, FRAME = 4, 6  # the caller's frame, the granters' frame
# references in the tables of A and B
WRITABLE, READONLY, STRANGERS, SUB_PAGE, NO_FRAME, UNUSED = range(10, 16)
NO_REF = 512


class World:
    def __init__(self) -> None:
        self.hypervisor = Hypervisor()
        self.a, self.b, self.me = (self.hypervisor.create_domain(16, f"domain {i}", i) for i in (1, 2, 3))
        for granter in (self.a, self.b):
            grants = granter.grants
            for ref, pfn, readonly in ((WRITABLE, FRAME, False), (READONLY, FRAME, True), (NO_FRAME, 99, False)):
                grants.set_entry(Gref(ref), ME, Pfn(pfn), readonly=readonly)
            grants.set_entry(Gref(STRANGERS), A, Pfn(FRAME))
            grants.set_entry(Gref(SUB_PAGE), ME, Pfn(FRAME))
            table = granter.memory.run(Pfn(1))
            entry = (g.GTF_permit_access | g.GTF_sub_page, ME, FRAME)
            g.GRANT_ENTRY_V1.pack_into(table, SUB_PAGE * g.GRANT_ENTRY_V1.size, *entry)
            granter.memory.run(Pfn(FRAME))[:] = bytes([granter.domid]) * PAGE_SIZE
        self.me.memory.run(Pfn(OWN))[:] = bytes([ME]) * PAGE_SIZE

    def copy(self, source: CopyPtr, dest: CopyPtr, length: int) -> int:
        return self.me.maptrack.copy(source, dest, length)

    def frame(self, domain: Domain, pfn: int) -> memoryview:
        return domain.memory.run(Pfn(pfn))

    def check_nothing_held(self) -> None:
        for granter in (self.a, self.b):
            assert not granter.grants.active
            in_use = g.GTF_reading | g.GTF_writing
            assert not any(entry.flags & in_use for entry in granter.grants.entries())


def own(offset: int = 0, pfn: int = OWN, domid: int = DOMID_SELF) -> CopyPtr:
    return CopyPtr(offset, Domid(domid), pfn=pfn)


def granted(ref: int, domid: int = A, offset: int = 0) -> CopyPtr:
    return CopyPtr(offset, Domid(domid), ref)


CASES: list[tuple[str, CopyPtr, CopyPtr, int, int]] = [
    ("grant to own", granted(WRITABLE), own(), 100, g.GNTST_okay),
    ("own to grant", own(), granted(WRITABLE), 100, g.GNTST_okay),
    ("grant to grant", granted(WRITABLE), granted(WRITABLE, B), 100, g.GNTST_okay),
    ("read-only grant to own", granted(READONLY), own(), 100, g.GNTST_okay),
    ("own to own", own(), own(pfn=OWN + 1), 100, g.GNTST_okay),
    ("own, by number", own(domid=ME), granted(WRITABLE), 100, g.GNTST_okay),
    ("sub-page grant: only a map minds", granted(SUB_PAGE), own(), 100, g.GNTST_okay),
    ("a whole page", granted(WRITABLE), own(), PAGE_SIZE, g.GNTST_okay),
    ("the last byte", granted(WRITABLE, A, PAGE_SIZE - 1), own(PAGE_SIZE - 1), 1, g.GNTST_okay),
    ("own to read-only grant", own(), granted(READONLY), 100, g.GNTST_general_error),
    ("source not ours", granted(STRANGERS), own(), 100, g.GNTST_general_error),
    ("destination not ours", own(), granted(STRANGERS), 100, g.GNTST_general_error),
    ("source unused", granted(UNUSED), own(), 100, g.GNTST_general_error),
    ("source without a frame", granted(NO_FRAME), own(), 100, g.GNTST_bad_page),
    ("destination without a frame", own(), granted(NO_FRAME), 100, g.GNTST_bad_page),
    ("no such source", granted(NO_REF), own(), 100, g.GNTST_bad_gntref),
    ("no such destination", own(), granted(NO_REF), 100, g.GNTST_bad_gntref),
    ("no such source domain", granted(WRITABLE, NOBODY), own(), 100, g.GNTST_bad_domain),
    ("no such destination domain", own(), granted(WRITABLE, NOBODY), 100, g.GNTST_bad_domain),
    ("own source beyond our memory", own(pfn=16), granted(WRITABLE), 100, g.GNTST_bad_page),
    ("own destination beyond our memory", granted(WRITABLE), own(pfn=-1), 100, g.GNTST_bad_page),
    ("another's frame by number", own(domid=A), granted(WRITABLE, B), 100, g.GNTST_permission_denied),
    ("into another's frame by number", granted(WRITABLE), own(domid=B), 100, g.GNTST_permission_denied),
    ("source crosses its page", granted(WRITABLE, A, PAGE_SIZE - 99), own(), 100, g.GNTST_bad_copy_arg),
    ("destination crosses its page", granted(WRITABLE), own(PAGE_SIZE - 99), 100, g.GNTST_bad_copy_arg),
    ("grant crosses its page", own(), granted(WRITABLE, A, PAGE_SIZE), 1, g.GNTST_bad_copy_arg),
    ("more than a page", granted(WRITABLE), own(), PAGE_SIZE + 1, g.GNTST_bad_copy_arg),
    ("negative offset", granted(WRITABLE, A, -1), own(), 10, g.GNTST_bad_copy_arg),
    ("negative length", granted(WRITABLE), own(), -1, g.GNTST_bad_copy_arg),
    # of two faults, Xen names: domains, then source, then destination, then the page boundary
    ("domain before source", granted(NO_REF), granted(WRITABLE, NOBODY), 100, g.GNTST_bad_domain),
    ("source before destination", granted(NO_REF), granted(READONLY), 100, g.GNTST_bad_gntref),
    ("source before boundary", granted(NO_REF), own(), PAGE_SIZE + 1, g.GNTST_bad_gntref),
    ("destination before boundary", own(PAGE_SIZE), granted(READONLY), 1, g.GNTST_general_error),
]


@pytest.mark.parametrize(("source", "dest", "length", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_status_of_a_copy(source: CopyPtr, dest: CopyPtr, length: int, expected: int):
    """Goal: the status, the bytes, and no pin left.  Method: one segment; all of every frame compared."""
    world = World()
    frames = [(d, pfn) for d in (world.a, world.b, world.me) for pfn in (OWN, OWN + 1, FRAME)]
    before = {(d.domid, pfn): bytes(world.frame(d, pfn)) for d, pfn in frames}
    status = world.copy(source, dest, length)
    assert g.GNTST_TEXTS[status] == g.GNTST_TEXTS[expected]
    world.check_nothing_held()
    if status == g.GNTST_okay:
        keys = [(ME if side.ref is None else side.domid, side.pfn if side.ref is None else FRAME) for side in (source, dest)]
        data = before[keys[0]][source.offset : source.offset + length]
        old = before[keys[1]]
        before[keys[1]] = old[: dest.offset] + data + old[dest.offset + length :]
    assert {(d.domid, pfn): bytes(world.frame(d, pfn)) for d, pfn in frames} == before


@pytest.mark.parametrize(
    ("source", "dest"),
    [
        (granted(NO_REF), own()),
        (granted(WRITABLE, NOBODY), own(pfn=99)),
        (granted(WRITABLE, A, PAGE_SIZE), own(PAGE_SIZE + 7)),
    ],
)
def test_a_length_of_zero_is_ignored_entirely(source: CopyPtr, dest: CopyPtr):
    """Goal: an empty fragment is no error (XSA-448's rule).  Method: arguments that are wrong in every other way."""
    world = World()
    assert world.copy(source, dest, 0) == g.GNTST_okay
    world.check_nothing_held()


def test_a_grant_to_oneself_by_domid_self():
    """Goal: DOMID_SELF names the caller also beside a reference.  Method: the caller grants to itself, and copies."""
    world = World()
    ref = world.me.grants.grant_access(ME, Pfn(OWN))
    assert world.copy(granted(ref, DOMID_SELF), granted(WRITABLE), 4) == g.GNTST_okay
    assert world.frame(world.a, FRAME)[:5] == bytes([ME, ME, ME, ME, A])


@pytest.mark.parametrize("distance", [-5, 0, 5])
def test_source_and_destination_may_overlap(distance: int):
    """Goal: a copy within one granted frame moves the old bytes.  Method: both sides the same reference."""
    world = World()
    frame = world.frame(world.a, FRAME)
    frame[:256] = bytes(range(256))
    assert world.copy(granted(WRITABLE, A, 50), granted(WRITABLE, A, 50 + distance), 20) == g.GNTST_okay
    assert frame[50 + distance : 70 + distance] == bytes(range(50, 70))
    world.check_nothing_held()


def test_a_copy_needs_a_pin_of_its_own_kind():
    """Goal: copies count like mappings (128 of a kind).  Method: 128 read-only mappings; copy from and to."""
    world = World()
    for _ in range(MAX_PINS):
        assert world.me.maptrack.map(A, WRITABLE, g.GNTMAP_host_map | g.GNTMAP_readonly)[0] == g.GNTST_okay
    assert world.copy(granted(WRITABLE), own(), 10) == g.GNTST_general_error
    assert world.copy(own(), granted(WRITABLE), 10) == g.GNTST_okay
    assert world.a.grants.active[WRITABLE].readers == MAX_PINS


@pytest.mark.parametrize(
    ("entry", "into"),
    [
        ((g.GTF_permit_access, ME, FRAME + 1), g.GNTST_okay),
        ((g.GTF_permit_access | g.GTF_readonly, ME, FRAME), g.GNTST_general_error),
        ((0, 0, 0), g.GNTST_general_error),
    ],
)
def test_copies_of_a_pinned_entry_use_the_active_frame(entry: tuple[int, int, int], into: int):
    """Goal: a granter that rewrites an entry in use gains nothing (XSA-500).
    Method: pinned for reading, rewritten; a copy from it reads the old frame, and one into it never writes another."""
    world = World()
    world.frame(world.a, FRAME + 1)[:] = b"\xee" * PAGE_SIZE
    assert world.me.maptrack.map(A, WRITABLE, g.GNTMAP_host_map | g.GNTMAP_readonly)[0] == g.GNTST_okay
    g.GRANT_ENTRY_V1.pack_into(world.a.memory.run(Pfn(1)), WRITABLE * g.GRANT_ENTRY_V1.size, *entry)
    assert world.copy(granted(WRITABLE), own(), 8) == g.GNTST_okay
    assert world.frame(world.me, OWN)[:9] == bytes([A] * 8 + [ME])
    assert world.copy(own(100), granted(WRITABLE, A, 100), 8) == into
    assert world.frame(world.a, FRAME + 1) == b"\xee" * PAGE_SIZE
    expected = bytes([ME if into == g.GNTST_okay else A]) * 8
    assert world.frame(world.a, FRAME)[100:108] == expected
