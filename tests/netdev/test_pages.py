"""Goal: a frontend's pages are one piece, granted each by itself, and go back only when nobody holds them (XSA-396).
Method: two real domains; the backend maps what it was granted, holds on to some, and what is left of the guest's memory and
grants is counted.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from netdev.pages import Pages
from xenmodel.public.grant_table import GNTMAP_host_map, GNTMAP_readonly, GNTST_general_error
from xenmodel.testing import Footprint, TwoDomains
from xenmodel.types import PAGE_SIZE, OutOfResources


@pytest.fixture
def pair() -> Iterator[TwoDomains]:
    pair = TwoDomains(front_pages=64)
    yield pair
    pair.close()


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("count", [1, 5])
def test_the_backend_sees_them_in_order(pair: TwoDomains, count: int, readonly: bool):
    """Goal: page i of `view` is grant i.  Method: number the pages, map each; a readonly one cannot be mapped otherwise."""
    pages = Pages(pair.front, pair.back.domid, count, readonly=readonly)
    assert len(pages.view) == count * PAGE_SIZE and not any(pages.view)
    for i in range(count):
        pages.view[i * PAGE_SIZE] = i + 1
    for i, gref in enumerate(pages.grefs):
        _, mapping = pair.back.maptrack.map(pair.front.domid, gref, GNTMAP_host_map | GNTMAP_readonly)
        assert mapping is not None and mapping.view[0] == i + 1
        pair.back.maptrack.unmap(mapping.handle)
        status, mapping = pair.back.maptrack.map(pair.front.domid, gref)
        assert (mapping is None, status == GNTST_general_error) == (readonly, readonly)
        if mapping is not None:
            mapping.view[1] = 99
            assert pages.view[i * PAGE_SIZE + 1] == 99
            pair.back.maptrack.unmap(mapping.handle)


def test_what_wraps_around_is_one_piece(pair: TwoDomains):
    """Goal: `overlap` pages are there twice.  Method: write over the end, read at the start, and the other way round."""
    pages = Pages(pair.front, pair.back.domid, 4, overlap=3)
    view = pages.view
    assert len(view) == 7 * PAGE_SIZE
    end = 4 * PAGE_SIZE
    view[end - 2 : end + 2] = b"abcd"
    assert bytes(view[:2]) == b"cd" and bytes(view[end - 2 : end]) == b"ab"
    view[PAGE_SIZE : PAGE_SIZE + 3] = b"xyz"
    assert bytes(view[end + PAGE_SIZE : end + PAGE_SIZE + 3]) == b"xyz"
    assert len(pages.grefs) == 4


def test_release(pair: TwoDomains):
    footprint = Footprint(pair.hypervisor)
    pages = Pages(pair.front, pair.back.domid, 4, overlap=2)
    assert footprint.grown() != []
    assert pages.release()
    assert footprint.grown() == []


def test_held_pages_stay(pair: TwoDomains):
    """Goal: all frames stay as long as one of them is mapped.  Method: map the third, release, unmap, release again."""
    footprint = Footprint(pair.hypervisor)
    pages = Pages(pair.front, pair.back.domid, 4)
    _, mapping = pair.back.maptrack.map(pair.front.domid, pages.grefs[2])
    assert mapping is not None
    held, free = pages.grefs[2], pair.front.memory.free_pages
    assert not pages.release() and not pages.release()
    assert pages.grefs == [held] and pair.front.memory.free_pages == free
    mapping.view[0] = 7
    assert pages.view[2 * PAGE_SIZE] == 7, "nobody else has got that frame"
    pair.back.maptrack.unmap(mapping.handle)
    assert pages.release()
    assert footprint.grown() == []


def test_too_little_memory(pair: TwoDomains):
    """Goal: OutOfResources, nothing taken.  Method: one more than is free."""
    Pages(pair.front, pair.back.domid).release()  # makes the grant table exist
    footprint = Footprint(pair.hypervisor)
    with pytest.raises(OutOfResources):
        Pages(pair.front, pair.back.domid, pair.front.memory.free_pages + 1)
    assert footprint.grown() == []


def test_too_few_grants(pair: TwoDomains):
    """Goal: OutOfResources, nothing taken.  Method: a guest with one frame of grants, of which three are left."""
    domain = pair.hypervisor.create_domain(64, "small", max_grant_frames=1)
    first = domain.memory.allocate()
    while domain.grants.available > 3:
        domain.grants.grant_access(pair.back.domid, first)
    footprint = Footprint(pair.hypervisor)
    with pytest.raises(OutOfResources):
        Pages(domain, pair.back.domid, 4)
    assert footprint.grown() == [] and domain.grants.available == 3
    assert Pages(domain, pair.back.domid, 3).release()
