"""Goal: peek() finds for every reference what a copy would find by pin() and unpin(), and leaves no trace.
Method: one named table with an entry of each kind, written as a guest may write them; then whole tables, pins and lists of
references from hypothesis, each peek compared with pin/unpin of every reference by itself.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenmodel.grant_table import ENTRIES_PER_FRAME, MAX_PINS, GrantTable
from xenmodel.memory import GuestMemory
from xenmodel.public import grant_table as g
from xenmodel.types import Domid, Gref, Pfn

PAGES = 64
PEER, OTHER = Domid(2), Domid(3)
ENTRY = g.GRANT_ENTRY_V1


class Table:
    """A grant table of two frames, and its bytes."""

    def __init__(self) -> None:
        self.memory = GuestMemory(PAGES)
        self.first = self.memory.allocate(2)
        self.memory.release(self.first, 2)
        self.grants = GrantTable(self.memory, max_frames=2)
        self.grants.set_entry(Gref(2 * ENTRIES_PER_FRAME - 1), PEER, Pfn(0))  # makes both frames exist
        self.bytes = self.memory.run(self.first, 2)

    def write(self, ref: int, flags: int, domid: int = PEER, pfn: int = 9) -> None:
        """What a guest may do at any time."""
        ENTRY.pack_into(self.bytes, ref * ENTRY.size, flags, domid, pfn)

    def state(self) -> tuple[bytes, dict[int, tuple[int, int, int, int]]]:
        active = self.grants.active.items()
        return bytes(self.bytes), {ref: (a.domid, a.pfn, a.readers, a.writers) for ref, a in active}

    def one_by_one(self, refs: list[int], by: Domid, readonly: bool) -> list[int]:
        """By pinning each for a copy, as gnttab_copy does."""
        found = []
        for ref in refs:
            status, active = self.grants.pin(ref, by, readonly, mapping=False)
            found.append(status if active is None else active.pfn)
            if active is not None:
                self.grants.unpin(ref, readonly)
        return found

    def check(self, refs: list[int], by: Domid, readonly: bool) -> list[int]:
        """The two ways agree, also as a tuple, and nothing is left behind."""
        before = self.state()
        found = self.grants.peek(refs, by, readonly)
        assert self.grants.peek(tuple(refs), by, readonly) == found
        assert self.state() == before
        assert found == self.one_by_one(refs, by, readonly), (refs, by, readonly)
        return found

    def close(self) -> None:
        del self.bytes
        self.memory.close()


@pytest.fixture
def table():
    table = Table()
    yield table
    table.close()


GRANT = g.GTF_permit_access
KINDS = {  # name: (flags, domid, pfn), what a reader finds, what a writer finds
    "granted": ((GRANT, PEER, 9), 9, 9),
    "readonly": ((GRANT | g.GTF_readonly, PEER, 9), 9, g.GNTST_general_error),
    "sub_page": ((GRANT | g.GTF_sub_page, PEER, 9), 9, 9),
    "to another": ((GRANT, OTHER, 9), g.GNTST_general_error, g.GNTST_general_error),
    "unused": ((0, 0, 0), g.GNTST_general_error, g.GNTST_general_error),
    "accept_transfer": ((g.GTF_accept_transfer, PEER, 9), g.GNTST_general_error, g.GNTST_general_error),
    "transitive": ((g.GTF_transitive, PEER, 9), g.GNTST_general_error, g.GNTST_general_error),
    "last frame": ((GRANT, PEER, PAGES - 1), PAGES - 1, PAGES - 1),
    "beyond memory": ((GRANT, PEER, PAGES), g.GNTST_bad_page, g.GNTST_bad_page),
    "far beyond": ((GRANT, PEER, 2**32 - 1), g.GNTST_bad_page, g.GNTST_bad_page),
    "flags of a pin that is none": ((GRANT | g.GTF_reading | g.GTF_writing, PEER, 9), 9, 9),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_entry(table: Table, kind: str):
    """Alone, in a row of the same (neighbours, all at once), and in a row of good ones."""
    entry, reader, writer = KINDS[kind]
    for ref in range(20, 24):
        table.write(ref, *entry)
    table.write(24, GRANT)
    for readonly, wanted in ((True, reader), (False, writer)):
        assert table.check([20], PEER, readonly) == [wanted]
        assert table.check([20, 21, 22, 23], PEER, readonly) == [wanted] * 4
        assert table.check([22, 23, 24], PEER, readonly) == [wanted, wanted, 9]
        assert table.check([24, 20, 24], PEER, readonly) == [9, wanted, 9]


@pytest.mark.parametrize("refs", [[1024], [1023, 1024], [2**31], [2**32 - 1], [5000, 8, 6000]])
def test_beyond_the_table(table: Table, refs: list[int]):
    table.write(8, GRANT)
    found = table.check(refs, PEER, False)
    assert [status for ref, status in zip(refs, found, strict=True) if ref >= 1024] == [g.GNTST_bad_gntref] * sum(
        ref >= 1024 for ref in refs
    )


def test_none_at_all(table: Table):
    assert table.check([], PEER, True) == []


@pytest.mark.parametrize("order", ["up", "down", "mixed", "twice"])
def test_across_the_frames_of_the_table(table: Table, order: str):
    """Goal: entries 508 to 515 are in two frames of the table.  Method: each with a pfn of its own, in several orders."""
    refs = list(range(508, 516))
    for ref in refs:
        table.write(ref, GRANT, pfn=ref - 500)
    asked = {"up": refs, "down": refs[::-1], "mixed": refs[::2] + refs[1::2], "twice": refs[:4] * 2}[order]
    assert table.check(asked, PEER, False) == [ref - 500 for ref in asked]


@pytest.mark.parametrize("readonly", [False, True])
def test_an_entry_in_use_is_what_it_was(table: Table, readonly: bool):
    """Goal: XSA-500: Xen's active copy decides.  Method: pin for reading; then the guest points the entry elsewhere, gives
    it to another, ends it: a reader finds the old frame, a writer is checked against the entry again."""
    table.write(30, GRANT, pfn=7)
    table.grants.pin(30, PEER, readonly=True)
    for flags, domid in ((GRANT, PEER), (GRANT, OTHER), (0, 0)):
        table.write(30, flags | g.GTF_reading, domid, pfn=8)
        wanted = 7 if readonly or (flags, domid) == (GRANT, PEER) else g.GNTST_general_error
        assert table.check([30], PEER, readonly) == [wanted]
        assert table.check([29, 30, 31], PEER, readonly)[1] == wanted
        assert table.check([30], OTHER, readonly) == [g.GNTST_general_error]


def test_an_entry_in_use_among_neighbours_that_look_the_same(table: Table):
    """Goal: the same where the guest took the marks of the pin away, too.  Method: five entries alike, the third pinned."""
    for ref in range(30, 35):
        table.write(ref, GRANT, pfn=ref - 20)
    table.grants.pin(32, PEER, readonly=True)
    table.write(32, GRANT, pfn=9)
    assert table.grants.peek(range(30, 35), PEER, True) == [10, 11, 12, 13, 14]
    table.write(32, GRANT, pfn=9)
    assert table.grants.peek(range(30, 35), OTHER, True) == [g.GNTST_general_error] * 5


@pytest.mark.parametrize("readonly", [False, True])
def test_as_many_pins_as_xen_counts(table: Table, readonly: bool):
    """Goal: an entry that can be pinned no more can be copied no more.  Method: one pin below the limit, and at it."""
    table.write(30, GRANT, pfn=7)
    for _ in range(MAX_PINS - 1):
        table.grants.pin(30, PEER, readonly)
    assert table.check([30], PEER, readonly) == [7]
    table.grants.pin(30, PEER, readonly)
    assert table.check([30], PEER, readonly) == [g.GNTST_general_error]


FLAGS = st.sampled_from([entry[0] for entry, _, _ in KINDS.values()] * 2 + [GRANT] * 8)
REFS = st.one_of(
    st.lists(st.sampled_from([8, 9, 10, 11, 510, 511, 512, 513, 1023, 1024, 2**32 - 1]), max_size=8),
    st.tuples(st.integers(500, 520), st.integers(1, 12)).map(lambda t: list(range(t[0], t[0] + t[1]))),
    st.tuples(st.integers(1018, 1026), st.integers(1, 8)).map(lambda t: list(range(t[0], t[0] + t[1]))),
)
ENTRIES = st.lists(
    st.tuples(
        st.one_of(st.sampled_from([8, 9, 10, 11, 1023]), st.integers(500, 532)),
        FLAGS,
        st.sampled_from([PEER] * 5 + [OTHER]),
        st.sampled_from([1, 9, PAGES - 1, PAGES, 2**32 - 1]),
    ),
    max_size=40,
)
PINS = st.lists(st.tuples(st.one_of(st.sampled_from([8, 9]), st.integers(505, 520)), st.booleans()), max_size=6)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.booleans(), ENTRIES, PINS, ENTRIES, st.lists(st.tuples(REFS, st.booleans()), min_size=1, max_size=4))
def test_peek_is_pin_and_unpin(
    granted: bool,
    before: list[tuple[int, int, Domid, int]],
    pins: list[tuple[int, bool]],
    after: list[tuple[int, int, Domid, int]],
    asked: list[tuple[list[int], bool]],
):
    """Entries, some of them pinned, some changed by the guest since; then references in rows and in no order."""
    table = Table()
    try:
        for ref in range(500, 532) if granted else ():
            table.write(ref, GRANT, pfn=ref - 490)
        for entry in before:
            table.write(*entry)
        for ref, readonly in pins:
            table.grants.pin(ref, PEER, readonly)
        for entry in after:
            table.write(*entry)
        for refs, readonly in asked:
            for by in (PEER, OTHER):
                table.one_by_one(refs, by, readonly)  # settles the flags of entries in use that the guest wrote over
                table.check(refs, by, readonly)
    finally:
        table.close()
