"""Goal: whatever programs hold when a domain ends, or all of it, nothing of it is left, and nobody else's is touched.
Method: a World without a mount; programs' opens of the devices are made directly, with more pages than one turn undoes."""

from __future__ import annotations

import errno

import pytest

from sysdev.gntdev import SLICE
from tests.sysdev.granting import finish
from tests.xenfs.strangers import Site
from xenmodel.testing import check_world

PAGES = 2 * SLICE + 88


@pytest.mark.parametrize("ends", [[1], [2], [1, 2], [2, 1], []])
def test_a_domain_ends_with_many_pages(ends: list[int]):
    """Goal: a domain that ends gives back what it mapped, and what it granted goes when its peers let go; the end of all
    ends all.  Method: guest 2 shares 600 pages, guest 1 maps them; each order of their ends."""
    with Site("name='a'; memory=64", "name='b'; memory=64") as site:
        devices = site.world.devices
        sharer = devices.domains[2].gntalloc.open(lambda indices: iter(()))
        index, refs = finish(sharer.alloc(1, 1, PAGES))
        mapper = devices.domains[1].gntdev.open()
        assert finish(mapper.map([(2, ref) for ref in refs], "test")) == index
        for domid in ends:
            site.world.destroy(domid)
            site.world.settle()
            assert check_world(site.world.hypervisor) == []
        if 1 in ends:
            assert finish(mapper.unmap(index, PAGES)) == -errno.ENOENT
        if 2 not in ends:
            mapped = [ref for ref in site.world.hypervisor.domains[2].grants.active if ref in refs]
            assert sorted(mapped) == ([] if 1 in ends else sorted(refs))
