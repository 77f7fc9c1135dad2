"""Goal: the checkers that the simulations rely on do find what they look for.
Method: a sound pair of domains, then one thing made wrong at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.sim.holdings import HeldSince
from xenmodel.public.io.ring import REQ_PROD, RSP_PROD
from xenmodel.ring import BackRing, FrontRing
from xenmodel.testing import Footprint, TwoDomains, check_grants, check_ports, check_rings, check_world


@pytest.fixture
def pair() -> Iterator[TwoDomains]:
    it = TwoDomains()
    yield it
    it.close()


@pytest.mark.parametrize("start", [0, 5, 0xFFFFFFFF, 0xFFFFFFE0, 0x7FFFFFFF])
def test_rings(start: int) -> None:
    """Goal: legal at any index, also around 2**32; every index out of its order is named."""
    page = memoryview(bytearray(4096))
    front, back = FrontRing(page, 112, start), BackRing(page, 112)
    assert check_rings(front, back) == []
    for _ in range(7):
        front.next_request()
    front.push_requests()
    for _ in range(3):
        back.next_request()
    back.next_response()
    assert check_rings(front, back) == []
    for name, ring, step in (("req_cons", back, 5), ("rsp_prod_pvt", back, 3), ("rsp_cons", front, 1)):
        right = getattr(ring, name)
        setattr(ring, name, right + step & 0xFFFFFFFF)
        assert check_rings(front, back) != [], name
        setattr(ring, name, right)
    for word in (REQ_PROD, RSP_PROD):
        right = front.words[word]
        front.words[word] = right + 2**31 & 0xFFFFFFFF
        assert check_rings(front, back) != []
        front.words[word] = right
    assert check_rings(front, BackRing(memoryview(bytearray(8192)), 112)) != [], "not the same ring"


def test_grants(pair: TwoDomains) -> None:
    domains = [pair.back, pair.front]
    pfn = pair.front.memory.allocate()
    gref = pair.front.grants.grant_access(pair.back.domid, pfn)
    _, mapping = pair.back.maptrack.map(pair.front.domid, gref)
    assert mapping is not None and check_grants(domains) == []
    active = pair.front.grants.active[gref]
    active.readers += 1
    assert check_grants(domains) == [f"domain 1 grant {gref}: pins 1, 1 but mapped (0, 1)"]
    active.readers -= 1
    del pair.front.grants.active[gref]
    assert any("mapped and not pinned" in problem for problem in check_grants(domains))
    pair.front.grants.active[gref] = active
    pair.back.maptrack.unmap(mapping.handle)
    assert check_grants(domains) == []


def test_ports(pair: TwoDomains) -> None:
    front, back = pair.connect()
    assert check_ports(pair.hypervisor) == check_world(pair.hypervisor) == []
    pair.back.events.channels[back].remote_port = front + 1
    assert len(check_ports(pair.hypervisor)) == 2
    pair.back.events.channels[back].remote_port = front


def test_footprint(pair: TwoDomains) -> None:
    """Goal: each kind of thing that can be kept is noticed, and letting go of it too."""
    footprint = Footprint(pair.hypervisor)
    pfn = pair.front.memory.allocate()
    gref = pair.front.grants.grant_access(pair.back.domid, pfn)
    _, mapping = pair.back.maptrack.map(pair.front.domid, gref)
    watch = pair.back_client.watch("/tool", lambda _path: None)
    front, back = pair.connect()
    tx = pair.front_client.connection.transaction_start()
    assert mapping is not None
    kinds = {line.split(" of ")[0] for line in footprint.grown()}
    assert kinds == {"grants", "mappings", "ports", "watches", "transactions", "frames"}
    pair.front_client.connection.transaction_end(tx, False)
    pair.back.maptrack.unmap(mapping.handle)
    assert pair.front.grants.end_access(gref)
    pair.front.memory.release(pfn)
    pair.back_client.unwatch(watch)
    pair.back.events.close(back)
    pair.front.events.close(front)
    assert footprint.grown() == []


def test_held_since(pair: TwoDomains) -> None:
    """Goal: what came since is told from what was there, and a holding that another has taken the place of is missed.
    Method: one mapping and one port before and one after; then the earlier ones are given up and their numbers reused."""
    domain, others = pair.back, pair.front
    grefs = [others.grants.grant_access(domain.domid, others.memory.allocate()) for _ in range(3)]
    _, mapping = domain.maptrack.map(others.domid, grefs[0])
    _, port = pair.connect()
    held = HeldSince(domain)
    assert mapping is not None and held.mappings() == [] and held.ports() == []
    _, later = domain.maptrack.map(others.domid, grefs[1])
    _, later_port = pair.connect()
    assert held.mappings() == [later] and held.ports() == [later_port]
    domain.maptrack.unmap(mapping.handle)
    domain.events.close(port)
    missed = f"mappings [{mapping.handle}] were others'", f"ports [{port}] were others'"
    for reused in (False, True):
        if reused:
            _, again = domain.maptrack.map(others.domid, grefs[2])
            assert again is not None and (again.handle, pair.connect()[1]) == (mapping.handle, port)
        for ask, text in zip((held.mappings, held.ports), missed, strict=True):
            with pytest.raises(AssertionError, match=re.escape(text)):
                ask()
