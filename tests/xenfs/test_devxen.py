"""Goal: whatever programs hold when a domain ends, or all of it, nothing of it is left, and nobody else's is touched.
Method: a World without a mount; programs' opens of the devices are made directly, with more pages than one turn undoes."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest
import trio
import trio.testing

from sysdev.gntdev import SLICE
from sysdev.steps import Job, Pause
from tests.sysdev.granting import finish
from tests.xenfs.strangers import Site
from xenfs.devxen import CHORES_S
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


def test_one_sweep_at_a_time():
    """Goal: while a sweep waits for its threads no second one begins; when it is done, the next does; other domains' go on.
    Method: looks that wait until they are let go, and others that do not; time that passes at once; the chores are asked for
    each second, as a caller with a signal does."""
    with Site("name='a'; memory=64", "name='b'; memory=64") as site:
        devices, looks, stuck = site.world.devices, {1: 0, 2: 0}, True

        def linger(domid: int) -> None:
            def look(indices: Sequence[int]) -> Job[set[int]]:
                looks[domid] += 1
                while stuck and domid == 1 and looks[1] > 1:
                    yield Pause.EVENT
                return set(indices) if stuck else set()

            user = devices.domains[domid].gntalloc.open(look)
            index, _ = finish(user.alloc(0, 1, 2))
            assert finish(user.dealloc(index, 2)) == 0

        async def main() -> None:
            nonlocal stuck
            async with trio.open_nursery() as nursery:
                nursery.start_soon(devices.do_chores)
                for _ in range(5):
                    devices._chores.set()
                    await trio.sleep(1.5 * CHORES_S)
                assert looks[1] == 2 and looks[2] > 4 and devices.domains[1].calls.under_way == 1
                stuck = False
                await trio.sleep(3.5 * CHORES_S)
                assert looks[1] in (2, 3) and not devices.domains[1].gntalloc.lingering
                assert not devices.domains[2].gntalloc.lingering and devices.domains[1].calls.under_way == 0
                nursery.cancel_scope.cancel()

        for domid in looks:
            linger(domid)
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
