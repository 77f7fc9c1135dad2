"""Goal: guest memory costs what it holds, hands out zeroes, and is the same bytes wherever it is mapped.
Method: the host's own count of pages, a naive allocator as oracle, and writes through one view read through another.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.descriptors import open_files
from xenmodel.memory import Frame, GuestMemory, OutOfMemory, vmap
from xenmodel.types import PAGE_SIZE, OutOfResources, Pfn

GIB_PAGES = 2**30 // PAGE_SIZE
MIB_PAGES = 2**20 // PAGE_SIZE


def stamp(value: int) -> bytes:
    return value.to_bytes(4, "little") * (PAGE_SIZE // 4)


# --- what it costs -------------------------------------------------------------------------------------------------------


def test_a_gibibyte_that_touched_four_mebibytes_costs_four():
    """Goal: guests can be large.  Method: write one byte in each of 1024 pages, scattered; ask the memfd."""
    memory = GuestMemory(GIB_PAGES)
    assert (memory.populated_pages, memory.free_pages) == (0, GIB_PAGES)
    step = GIB_PAGES // (4 * MIB_PAGES)
    for pfn in range(0, GIB_PAGES, step):
        memory.view[pfn * PAGE_SIZE + 17] = 1
    assert memory.populated_pages == 4 * MIB_PAGES
    memory.close()


def test_release_gives_the_memory_back_and_the_next_owner_reads_zeroes():
    """Goal: ballooning is real and leaks nothing.  Method: fill, release the middle, count, allocate the same frames."""
    memory = GuestMemory(MIB_PAGES)
    first = memory.allocate(64)
    memory.run(first, 64)[:] = b"\xaa" * (64 * PAGE_SIZE)
    assert memory.populated_pages == 64
    memory.release(Pfn(first + 16), 32)
    assert memory.populated_pages == 32
    assert memory.free_pages == MIB_PAGES - 32
    assert memory.run(first, 16) == b"\xaa" * (16 * PAGE_SIZE), "the frames before were not given back"
    assert memory.run(Pfn(first + 48), 16) == b"\xaa" * (16 * PAGE_SIZE), "nor the ones behind"
    again = memory.allocate(32)
    assert again == first + 16, "first fit finds the hole"
    assert memory.run(again, 32) == bytes(32 * PAGE_SIZE)


def test_released_frames_are_zero_for_who_still_has_a_view():
    """Goal: no stale data behind an old view.  Method: keep the memoryview over a release."""
    memory = GuestMemory(4)
    pfn = memory.allocate()
    view = memory.run(pfn)
    view[:] = stamp(7)
    memory.release(pfn)
    assert view == bytes(PAGE_SIZE)
    view[0] = 1
    assert memory.run(pfn)[0] == 1, "it is still the same frame"


def test_close_ends_the_descriptor_and_not_the_views():
    """Goal: a domain dies while a peer reads.  Method: close twice, then use a view that was taken before."""
    before = open_files()
    memory = GuestMemory(2)
    view = memory.run(Pfn(0), 2)
    view[:] = stamp(5) * 2
    memory.close()
    memory.close()
    assert memory.fd == -1
    assert view == stamp(5) * 2
    del view, memory
    assert open_files() <= before, "the mapping's own descriptor goes with the last view"


@pytest.mark.parametrize("name", ["", "guest", "x" * 1000, "ä" * 240, "名" * 90, "\udcff"])
def test_any_name_will_do(name: str):
    """Goal: the memfd's name (at most 249 bytes) never stops a domain.  Method: names by length in bytes."""
    memory = GuestMemory(1, name)
    assert os.readlink(f"/proc/self/fd/{memory.fd}").startswith("/memfd:xen-")
    memory.close()


# --- errors --------------------------------------------------------------------------------------------------------------

ERRORS: list[tuple[str, Callable[[GuestMemory], Any], type[Exception]]] = [
    ("run before the first", lambda m: m.run(Pfn(-1)), IndexError),
    ("run behind the last", lambda m: m.run(Pfn(8)), IndexError),
    ("run across the end", lambda m: m.run(Pfn(7), 2), IndexError),
    ("run of less than nothing", lambda m: m.run(Pfn(4), -1), IndexError),
    ("allocate more than there is", lambda m: m.allocate(9), OutOfMemory),
    ("allocate nothing", lambda m: m.allocate(0), AssertionError),
    ("allocate less than nothing", lambda m: m.allocate(-1), AssertionError),
    ("release what is free", lambda m: m.release(Pfn(6)), AssertionError),
    ("release into what is free", lambda m: m.release(Pfn(3), 2), AssertionError),
    ("release nothing", lambda m: m.release(Pfn(0), 0), AssertionError),
    ("release before the first", lambda m: m.release(Pfn(-1)), AssertionError),
    ("release across the end", lambda m: m.release(Pfn(7), 2), AssertionError),
]


@pytest.mark.parametrize(("act", "error"), [case[1:] for case in ERRORS], ids=[case[0] for case in ERRORS])
def test_what_is_refused_changes_nothing(act: Callable[[GuestMemory], Any], error: type[Exception]):
    """Goal: no call can corrupt the allocator.  Method: eight frames, four in use and stamped; compare before and after."""
    memory = GuestMemory(8)
    first = memory.allocate(4)
    memory.run(first, 4)[:] = stamp(9) * 4
    with pytest.raises(error):
        act(memory)
    assert memory.free_pages == 4
    assert memory.run(first, 4) == stamp(9) * 4
    assert [memory.allocate() for _ in range(4)] == [4, 5, 6, 7]


def test_a_fragmented_guest_says_what_it_has():
    """Goal: the message tells fragmentation from exhaustion.  Method: free every second frame, ask for two."""
    memory = GuestMemory(8)
    memory.allocate(8)
    for pfn in range(0, 8, 2):
        memory.release(Pfn(pfn))
    with pytest.raises(OutOfMemory, match=r"no 2 contiguous free frames \(4 of 8 are free\)") as caught:
        memory.allocate(2)
    assert isinstance(caught.value, OutOfResources), "what wanted the frames fails, nothing else"


@pytest.mark.parametrize("pages", [0, -1])
def test_no_domain_without_memory(pages: int):
    """Goal: nonsense sizes are refused before a descriptor exists.  Method: the constructor."""
    with pytest.raises(ValueError, match="at least one page"):
        GuestMemory(pages)


# --- against a naive allocator -----------------------------------------------------------------------------------------

PAGES = 24
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), st.integers(1, 9)),
        st.tuples(st.just("release"), st.integers(0, 10**6)),
        st.tuples(st.just("release part"), st.integers(0, 10**6)),
    ),
    max_size=60,
)


def naive_first_fit(owner: list[int], count: int) -> int | None:
    """The lowest run of `count` frames that nobody owns."""
    for pfn in range(PAGES - count + 1):
        if not any(owner[pfn : pfn + count]):
            return pfn
    return None


@settings(max_examples=150, deadline=None, derandomize=True)
@given(STEPS)
def test_allocator_against_a_list_of_owners(steps: list[tuple[str, int]]):
    """Goal: first fit, zeroed, nothing given twice, and the host holds only what is owned.
    Method: random allocate/release against a list with one owner per frame; every frame stamped with its owner."""
    memory, owner = GuestMemory(PAGES), [0] * PAGES
    for serial, (what, number) in enumerate(steps, start=1):
        if what == "allocate":
            expected = naive_first_fit(owner, number)
            if expected is None:
                with pytest.raises(OutOfMemory):
                    memory.allocate(number)
                continue
            pfn = memory.allocate(number)
            assert pfn == expected
            assert memory.run(pfn, number) == bytes(number * PAGE_SIZE)
            memory.run(pfn, number)[:] = stamp(serial) * number
            owner[pfn : pfn + number] = [serial] * number
        elif owned := [pfn for pfn in range(PAGES) if owner[pfn]]:
            pfn = Pfn(owned[number % len(owned)])
            count = 1
            while what == "release" and pfn + count < PAGES and owner[pfn + count] == owner[pfn]:
                count += 1
            memory.release(pfn, count)
            owner[pfn : pfn + count] = [0] * count
        assert memory.free_pages == owner.count(0)
        assert memory.populated_pages == PAGES - owner.count(0)
    for pfn, who in enumerate(owner):
        assert memory.run(Pfn(pfn)) == (stamp(who) if who else bytes(PAGE_SIZE)), f"frame {pfn} of owner {who}"
    memory.close()


# --- vmap ----------------------------------------------------------------------------------------------------------------

MEMORIES, FRAMES = 2, 8
LAYOUTS = {
    "one frame": [(0, 3)],
    "neighbours": [(0, 2), (0, 3), (0, 4)],
    "backwards": [(0, 4), (0, 3)],
    "scattered": [(0, 7), (0, 0), (0, 5), (0, 2)],
    "two domains": [(0, 1), (1, 1), (0, 2), (1, 0)],
    "neighbours but of two domains": [(0, 3), (1, 4)],
    "one frame twice": [(0, 6), (0, 6)],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_vmap_is_the_frames_themselves(layout: list[tuple[int, int]]):
    """Goal: a multi-page ring is one view, coherent both ways.  Method: write on each side, read on the other."""
    memories = [GuestMemory(FRAMES) for _ in range(MEMORIES)]
    frames = [Frame(memories[which], pfn) for which, pfn in layout]
    view = vmap(frames)
    assert len(view) == len(frames) * PAGE_SIZE and not view.readonly
    for i, frame in enumerate(frames):
        frame.memory.run(Pfn(frame.pfn))[:] = stamp(100 + i)
        assert view[i * PAGE_SIZE : (i + 1) * PAGE_SIZE] == stamp(100 + i), "domain to view"
    for i, frame in enumerate(frames):
        view[i * PAGE_SIZE : (i + 1) * PAGE_SIZE] = stamp(200 + i)
        assert frame.memory.run(Pfn(frame.pfn)) == stamp(200 + i), "view to domain"
    touched = {which: {pfn for w, pfn in layout if w == which} for which in range(MEMORIES)}
    for which, pfns in touched.items():
        assert memories[which].populated_pages == len(pfns), "no other frame was touched"


def test_a_view_spans_page_boundaries():
    """Goal: slots that lie across two scattered pages.  Method: cast the view and write a word run over the seam."""
    memory = GuestMemory(8)
    view = vmap([Frame(memory, 5), Frame(memory, 1)])
    view[PAGE_SIZE - 56 : PAGE_SIZE + 56] = bytes(range(112))
    assert memory.run(Pfn(5))[-56:] == bytes(range(56))
    assert memory.run(Pfn(1))[:56] == bytes(range(56, 112))


def test_a_view_outlives_the_domain():
    """Goal: a backend still holds the ring of a domain that is gone.  Method: close both memories, collect, write on."""
    memories = [GuestMemory(4), GuestMemory(4)]
    view = vmap([Frame(memories[0], 2), Frame(memories[1], 2)])
    for memory in memories:
        memory.close()
    kept = memories[1].run(Pfn(2))
    del memory, memories
    gc.collect()
    view[:] = stamp(3) * 2
    assert kept == stamp(3)


def test_views_leave_nothing_behind():
    """Goal: connecting again and again does not eat address space.  Method: count our mappings over 300 views."""

    def mappings() -> int:
        with open("/proc/self/maps") as maps:
            return sum("memfd:xen-vmap-test" in line for line in maps)

    memory = GuestMemory(4, "vmap-test")
    before = mappings()
    for _ in range(300):
        view = vmap([Frame(memory, 3), Frame(memory, 0)])
        view[0] = 1
        del view
    assert mappings() == before


@pytest.mark.parametrize("pfn", [-1, 4, 2**32 - 1])
def test_vmap_refuses_a_frame_outside(pfn: int):
    """Goal: IndexError at once and no SIGBUS later.  Method: one good frame, one beyond the memory, scattered and not."""
    memory = GuestMemory(4)
    with pytest.raises(IndexError):
        vmap([Frame(memory, pfn)])
    with pytest.raises(IndexError):
        vmap([Frame(memory, 0), Frame(memory, pfn)])


def test_vmap_of_a_dead_domain_is_an_error():
    """Goal: no window that silently shows other memory.  Method: scattered frames after the memfd was closed."""
    memory = GuestMemory(4)
    memory.close()
    with pytest.raises(OutOfMemory, match="guest frame"):
        vmap([Frame(memory, 3), Frame(memory, 0)])
