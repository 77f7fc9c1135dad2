"""Goal: the grant cache keeps what pays, never more than its cap, and never unmaps what a request uses.
Method: a GrantCache of domain 0 over a guest's real grants; busy translations as blkback marks them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from blockdev.blkback import Offer
from blockdev.grants import MOST_REMEMBERED_SEGMENTS, GrantCache, Translation
from blockdev.storage import DelayedStorage, MemoryStorage
from tests.blockdev.scripted import ScriptedFront
from tests.blockdev.world import SECTORS, World
from xenmodel.public.io.blkif import SEGMENT
from xenmodel.testing import TwoDomains, check_grants
from xenmodel.types import Gref


class Guest:
    """`grefs` of 64 pages, page i filled with i; `cache(...)` makes domain 0's cache."""

    def __init__(self) -> None:
        self.pair = TwoDomains()
        guest = self.pair.front
        self.pfns = [guest.memory.allocate() for _ in range(64)]
        for i, pfn in enumerate(self.pfns):
            guest.memory.run(pfn)[:] = bytes([i]) * 4096
        self.grefs = [guest.grants.grant_access(self.pair.back.domid, pfn) for pfn in self.pfns]
        self.maptrack = self.pair.back.maptrack

    def cache(self, persistent: bool, cap: int = 8) -> GrantCache:
        return GrantCache(self.maptrack, self.pair.front.domid, persistent, cap)

    def data(self, *pages: int, last: int = 7) -> bytes:
        return b"".join(SEGMENT.pack(self.grefs[i], 0, last) for i in pages)

    def mapped(self) -> list[int]:
        return sorted(self.grefs.index(Gref(m.ref)) for m in self.maptrack.mappings.values())

    def check(self) -> None:
        assert check_grants([self.pair.back, self.pair.front]) == []


@pytest.fixture
def guest() -> Iterator[Guest]:
    it = Guest()
    yield it
    it.check()
    it.pair.close()


def content(translation: Translation) -> bytes:
    return b"".join(bytes(view) for view in translation.views)


def start(cache: GrantCache, translation: Translation) -> None:
    """As blkback does when the storage answers PENDING."""
    cache.tick += 1
    translation.tick = cache.tick
    translation.busy += 1
    cache.running.add(translation)


def finish(cache: GrantCache, translation: Translation) -> None:
    translation.busy -= 1
    cache.running.discard(translation)
    cache.done(translation)


def test_persistent_grants_are_mapped_once(guest: Guest) -> None:
    """Goal: the second request for the same bytes is one look-up; another view of the same page maps nothing."""
    cache = guest.cache(persistent=True)
    first = cache.translate(guest.data(0, 1), guest_is_written=True)
    assert content(first) == b"\0" * 4096 + b"\1" * 4096 and len(first.views) == 1, "neighbours are one view"
    assert cache.translations[guest.data(0, 1)] is first
    cache.translate(guest.data(1, 0, last=3), guest_is_written=False)
    assert guest.mapped() == [0, 1]
    assert all(not m.readonly for m in guest.maptrack.mappings.values()), "kept grants serve reads and writes"
    cache.close()
    assert guest.mapped() == [] and not cache.translations


@pytest.mark.parametrize("written", [True, False])
def test_without_persistence_nothing_outlives_a_request(guest: Guest, written: bool) -> None:
    """Goal: mapped for the request only, read-only when the guest's page is only read."""
    cache = guest.cache(persistent=False)
    translation = cache.translate(guest.data(0, 5), guest_is_written=written)
    assert guest.mapped() == [0, 5] and not cache.translations
    assert {m.readonly for m in guest.maptrack.mappings.values()} == {not written}
    cache.done(translation)
    assert guest.mapped() == []


def test_a_readonly_grant(guest: Guest) -> None:
    """Goal: enough for the source of a write, not for the target of a read, and not for keeping."""
    gref = guest.pair.front.grants.grant_access(guest.pair.back.domid, guest.pfns[0], readonly=True)
    data = SEGMENT.pack(gref, 0, 7)
    once = guest.cache(persistent=False)
    once.done(once.translate(data, guest_is_written=False))
    with pytest.raises(ValueError, match=f"grant {gref}"):
        once.translate(data, guest_is_written=True)
    with pytest.raises(ValueError, match=f"grant {gref}"):
        guest.cache(persistent=True).translate(data, guest_is_written=False)


def test_the_least_recently_used_go_first(guest: Guest) -> None:
    """Goal: the cap holds, and what is used often stays.  Method: cap 8; page 0 is used before each newcomer."""
    cache = guest.cache(persistent=True, cap=8)
    for page in range(1, 40):
        for data in (guest.data(0), guest.data(page)):
            translation = cache.translations.get(data) or cache.translate(data, True)
            cache.tick += 1
            translation.tick = cache.tick
        assert len(cache.kept) <= 8 and 0 in guest.mapped() and page in guest.mapped()
    guest.check()
    cache.close()


def test_a_page_of_descriptors_counts_as_used(guest: Guest) -> None:
    """Goal: a grant used for descriptors only is not evicted before older data.  Method: cap 8; it is the newest but one."""
    cache = guest.cache(persistent=True, cap=8)
    cache.page(guest.grefs[0], 8)
    for page in range(1, 8):
        cache.tick += 1
        cache.translate(guest.data(page), True).tick = cache.tick
    cache.tick += 1
    cache.page(guest.grefs[0], 8)
    cache.tick += 1
    cache.translate(guest.data(20), True)
    assert 0 in guest.mapped() and 1 not in guest.mapped()
    cache.close()


def test_an_eviction_forgets_translations(guest: Guest) -> None:
    """Goal: no translation points at a page that was unmapped.  Method: cap 2, three pages, the first again."""
    cache = guest.cache(persistent=True, cap=2)
    first = cache.translate(guest.data(0), True)
    cache.translate(guest.data(1), True)
    cache.translate(guest.data(2), True)
    assert len(guest.mapped()) == 2
    again = cache.translations.get(guest.data(0))
    assert again is None or again is not first or 0 in guest.mapped()
    for data in cache.translations:
        assert all(gref in cache.kept for gref in cache.translations[data].grefs)
    assert content(cache.translate(guest.data(0), True)) == bytes(4096)
    cache.close()


def test_busy_grants_are_never_unmapped(guest: Guest) -> None:
    """Goal: a newcomer that finds everything in use is mapped for once.  Method: cap 4, four pages busy, two more."""
    cache = guest.cache(persistent=True, cap=4)
    busy = [cache.translate(guest.data(i), True) for i in range(4)]
    for translation in busy:
        start(cache, translation)
    extra = cache.translate(guest.data(10, 11), True)
    start(cache, extra)
    assert guest.mapped() == [0, 1, 2, 3, 10, 11] and len(extra.mappings) == 2
    finish(cache, extra)
    assert guest.mapped() == [0, 1, 2, 3]
    finish(cache, busy[2])
    cache.translate(guest.data(12), True)
    assert guest.mapped() == [0, 1, 3, 12]
    with pytest.raises(AssertionError, match="3 requests still use"):
        cache.close()
    for i in (0, 1, 3):
        finish(cache, busy[i])
    cache.close()
    assert guest.mapped() == []


def test_one_request_larger_than_the_cap(guest: Guest) -> None:
    """Goal: a request's own pages do not evict each other.  Method: cap 1 and 3, requests of 16 pages."""
    for cap in (1, 3):
        cache = guest.cache(persistent=True, cap=cap)
        for _ in range(3):
            translation = cache.translate(guest.data(*range(16)), True)
            start(cache, translation)
            assert guest.mapped() == list(range(16)) and len(cache.kept) == cap
            assert content(translation) == b"".join(bytes([i]) * 4096 for i in range(16))
            finish(cache, translation)
            assert len(guest.mapped()) == cap
        cache.close()


def test_a_full_busy_cache_is_searched_once_per_request(guest: Guest) -> None:
    """Goal: requests cannot buy a search of the whole cache for each of their segments.
    Method: everything busy, a request of 32 segments; count the searches."""
    cache = guest.cache(persistent=True, cap=4)
    start(cache, cache.translate(guest.data(0, 1, 2, 3), True))
    searches = cache.searches
    cache.translate(guest.data(*range(10, 42)), True)
    assert cache.searches == searches + 1
    cache.running.clear()
    for handle in list(guest.maptrack.mappings):
        guest.maptrack.unmap(handle)


def test_a_bad_segment_unmaps_its_neighbours(guest: Guest) -> None:
    for persistent in (True, False):
        cache = guest.cache(persistent)
        with pytest.raises(ValueError, match="grant 3000"):
            cache.translate(guest.data(0, 1) + SEGMENT.pack(3000, 0, 7), True)
        cache.close()
        assert guest.mapped() == []


def test_what_is_remembered_is_bounded(guest: Guest) -> None:
    """Goal: a guest that asks for ever new pieces of one page cannot make domain 0 remember all of them.
    Method: requests of 250 segments that differ in one; the sum of remembered segments."""
    cache = guest.cache(persistent=True)
    for i in range(MOST_REMEMBERED_SEGMENTS // 250 + 20):
        first, last = i & 3, 4 + (i >> 2 & 3)
        body = SEGMENT.pack(guest.grefs[0], first, last) * 250
        cache.translate(body[: -8 * (1 + i % 100)] + guest.data(i % 8) * (1 + i % 100), True)
        assert sum(len(t.grefs) for t in cache.translations.values()) <= MOST_REMEMBERED_SEGMENTS
    cache.close()


@pytest.mark.parametrize("persistent", [True, False])
def test_a_page_of_descriptors(guest: Guest, persistent: bool) -> None:
    """Goal: a copy, so that later changes by the guest do not count; mapped afterwards only if it is kept."""
    cache = guest.cache(persistent)
    data = cache.page(guest.grefs[7], 16)
    guest.pair.front.memory.run(guest.pfns[7])[:] = bytes(4096)
    assert data == b"\7" * 16
    assert guest.mapped() == ([7] if persistent else [])
    cache.close()


@pytest.mark.parametrize("cap", [0, 1, 5, 300])
@pytest.mark.parametrize("delayed", [True, False])
def test_a_device_with_a_small_cap(cap: int, delayed: bool) -> None:
    """Goal: the cap costs speed and never correctness.  Method: 64 pages through the ring, six requests at once."""
    world = World(fronts=False)
    inner = MemoryStorage(SECTORS)
    inner.data[:] = b"".join(bytes([i % 251]) * 512 for i in range(SECTORS))
    storage = DelayedStorage(inner)
    front = ScriptedFront(world, world.attach(storage=storage, offer=Offer(persistent_cap=cap)))
    front.connect(persistent=True)
    pages = [front.data_page() for _ in range(64)]
    for round_ in range(0, 60, 6):
        for i in range(6):
            picked = [pages[(round_ + i + j * 7) % 64][0] for j in range(3)]
            front.put(front.slot(0, [(gref, 0, 0) for gref in picked], i, 3 * (round_ + i)), front.words[0] + i)
        front.push(6)
        while storage.release(lambda n: n // 2):
            if not delayed:
                continue
            world.settle()
        world.settle()
        assert sorted(front.answers()) == [(i, 0, 0) for i in range(6)]
        i = 5
        for j in range(3):
            assert bytes(pages[(round_ + i + j * 7) % 64][1][:512]) == bytes([(3 * (round_ + i) + j) % 251]) * 512
        assert len(world.for_devices.mappings()) <= cap + 1
        assert check_grants(world.hypervisor.domains.values()) == []
    world.close()
