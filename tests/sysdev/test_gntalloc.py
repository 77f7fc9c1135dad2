"""Goal: gntalloc's pages live exactly as long as somebody may see them: programs that hold or map them, then peers that have
them mapped; then they are the domain's again, and all limits count them until then.
Method: real domains and the real arena; what a program maps is a set that the test changes (Maps)."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import closing

import pytest

from sysdev.gntalloc import Gntalloc, GntallocUser
from sysdev.gntdev import UNMAP_NOTIFY_CLEAR_BYTE, UNMAP_NOTIFY_SEND_EVENT
from tests.sysdev.granting import Grants, Maps, finish
from xenmodel.public.grant_table import GTF_permit_access, GTF_readonly
from xenmodel.public.xen import DOMID_FIRST_RESERVED, DOMID_SELF
from xenmodel.types import PAGE_SIZE, Pfn

CLEAR, SEND = UNMAP_NOTIFY_CLEAR_BYTE, UNMAP_NOTIFY_SEND_EVENT
EINVAL, ENOENT = -errno.EINVAL, -errno.ENOENT
LIMIT = 16


@pytest.fixture
def grants() -> Iterator[Grants]:
    made = Grants(limit=LIMIT)
    for domain in made.domains.values():  # tables that need not grow
        domain.grants.end_access(domain.grants.grant_access(2, Pfn(0)))
    yield made
    assert made.violations() == []
    made.close()


@pytest.fixture
def device(grants: Grants) -> Gntalloc:
    return grants.gntalloc[1]


@pytest.fixture
def maps() -> Maps:
    return Maps()


@pytest.fixture
def user(device: Gntalloc, maps: Maps) -> GntallocUser:
    return device.open(maps.look)


def indices(index: int, count: int) -> list[int]:
    return [index + page * PAGE_SIZE for page in range(count)]


def refused(job: object) -> int:
    with pytest.raises(OSError) as caught:
        finish(job)  # type: ignore[arg-type]
    return caught.value.errno or 0


def test_alloc(grants, device, user):
    """Goal: pages of zeroes, neighbours in the file, each granted to that domain as asked; the peer sees what is written.
    Method: writable and not; entries; a view of the file and the peer's mapping; dealloc of all."""
    before = grants.held()
    for flags, readonly in ((1, 0), (0, GTF_readonly), (0xFFFE, GTF_readonly)):
        index, refs = finish(user.alloc(2, flags, 3))
        assert index > 0 and index % PAGE_SIZE == 0 and sorted(user.pages) == indices(index, 3)
        assert [user.pages[one].ref for one in indices(index, 3)] == refs and device.used == 3
        for place, ref in enumerate(refs):
            entry = grants.entry((1, ref))
            assert (entry.flags, entry.domid) == (GTF_permit_access | readonly, 2)
            with closing(grants.see(index + place * PAGE_SIZE)) as seen:
                assert not any(seen[:])
                seen[5:10] = b"hello"
                assert grants.page((1, ref))[5:10] == b"hello"
                status, mapping = grants.domains[2].maptrack.map(1, ref, 2 | 4)
                assert status == 0 and mapping.view[5:10] == b"hello"
                assert grants.domains[2].maptrack.unmap(mapping.handle) == 0
        assert finish(user.dealloc(index, 3)) == 0
        assert grants.held() == before


def test_domains_that_cannot_be(grants, user):
    """Goal: what is no number of a domain is granted nothing; one that does not exist yet may.  Method: edges."""
    before = grants.held()
    for domid in (DOMID_FIRST_RESERVED, DOMID_SELF, DOMID_FIRST_RESERVED + 2, 0xFFFF):
        for count in (0, 1, LIMIT + 1):
            assert refused(user.alloc(domid, 1, count)) == errno.EINVAL and grants.held() == before
    index, refs = finish(user.alloc(DOMID_FIRST_RESERVED - 1, 1, 1))
    assert grants.entry((1, refs[0])).domid == DOMID_FIRST_RESERVED - 1 and finish(user.dealloc(index, 1)) == 0


def test_dealloc_wants_pages_of_ours(grants, device, user, maps):
    """Goal: pages that follow one another and are all this open's, or EINVAL, and nothing happened; parts of an ALLOC are
    fine.  Method: near misses, another open's, counts; twice."""
    index, _ = finish(user.alloc(2, 1, 5))
    other = device.open(maps.look)
    held = grants.held()
    for at, count in ((index, 0), (index, 6), (index + 1, 1), (index - PAGE_SIZE, 1), (index, 2**32 - 1), (0, 1)):
        assert finish(user.dealloc(at, count)) == EINVAL
    assert finish(other.dealloc(index, 5)) == EINVAL and grants.held() == held
    assert finish(user.dealloc(index + PAGE_SIZE, 2)) == 0 and device.used == 3
    assert finish(user.dealloc(index, 5)) == EINVAL and finish(user.dealloc(index + PAGE_SIZE, 1)) == EINVAL
    assert finish(user.dealloc(index + 3 * PAGE_SIZE, 2)) == finish(user.dealloc(index, 1)) == 0
    assert device.used == 0


def test_limits(grants, device, user, maps):
    """Goal: more than the limit is ENOSPC, more than there is ENOMEM: of memory, references, memory for references; and then
    nothing has changed. What lingers unmapped is no obstacle.
    Method: each of them exhausted to the page; a page that was let go of and is unmapped only now."""
    before = grants.held()
    assert finish(user.alloc(2, 1, 0)) == (0, []) and grants.held() == before
    for count in (LIMIT + 1, 2**32 - 1):
        assert refused(user.alloc(2, 1, count)) == errno.ENOSPC and grants.held() == before
    index, _ = finish(user.alloc(2, 1, LIMIT))
    assert refused(user.alloc(2, 1, 1)) == errno.ENOSPC
    maps.mapped = set(indices(index, LIMIT))
    assert finish(user.dealloc(index, LIMIT)) == 0 and device.used == LIMIT
    maps.mapped.clear()
    index, _ = finish(user.alloc(2, 1, 1))
    assert device.used == 1 and finish(user.dealloc(index, 1)) == 0 and grants.held() == before
    memory, table = grants.domains[1].memory, grants.domains[1].grants
    pfn = memory.allocate(memory.free_pages - 3)
    full = grants.held()
    assert refused(user.alloc(2, 1, 4)) == errno.ENOMEM and grants.held() == full
    table.max_frames = 1
    refs = [table.grant_access(3, pfn) for _ in range(table.available - 2)]
    full = grants.held()
    assert refused(user.alloc(2, 1, 3)) == errno.ENOSPC and grants.held() == full
    refs += [table.grant_access(3, pfn)]
    table.max_frames = 2
    full = grants.held()
    assert refused(user.alloc(2, 1, 3)) == errno.ENOMEM and grants.held() == full, "a frame for the second reference"
    assert len(finish(user.alloc(2, 1, 2))[1]) == 2
    grants.arena._most_pieces = 0
    full = grants.held()
    finish(user.close())
    assert refused(device.open(maps.look).alloc(2, 1, 1)) == errno.ENOMEM and full["slots"] == 2


def test_lingers_while_it_is_mapped(grants, device, user, maps):
    """Goal: a page that was given up stays, granted and with its content, while a process maps it; somebody is told to
    sweep, which frees what is mapped no more.  Method: as the library does: ALLOC, mmap, DEALLOC; then munmap of parts."""
    told: list[int] = []
    device.on_linger = lambda: told.append(len(device.lingering))
    index, refs = finish(user.alloc(2, 1, 4))
    mapped = indices(index, 4)
    maps.mapped = {mapped[0], mapped[2], mapped[3]}
    held = grants.held()
    assert finish(user.dealloc(index, 4)) == 0
    assert maps.looks == [mapped] and told == [3] and device.used == 3
    assert grants.entry((1, refs[0])).domid == 2 and len(list(grants.domains[1].grants.entries())) == 3
    assert user.set_unmap_notify(index, CLEAR, 0) == ENOENT, "nobody can refer to it"
    finish(device.sweep())
    assert device.used == 3 and told == [3, 3]
    maps.mapped = {mapped[3]}
    finish(device.sweep())
    assert device.used == 1 and [page.index for page in device.lingering] == [mapped[3]]
    maps.mapped.clear()
    finish(device.sweep())
    assert not device.lingering and device.used == 0 and told == [3, 3, 1] and held["1 gntalloc"] == 4
    finish(device.sweep())
    assert len(maps.looks) == 4, "nothing to look for"


def test_a_look_that_is_given_up(grants, device, user, maps):
    """Goal: if the caller is killed while we look, the pages linger, and somebody is told to look again.
    Method: an error thrown into the look of a DEALLOC, and of an ALLOC for which there is no room; then a sweep."""
    told: list[int] = []
    device.on_linger = lambda: told.append(len(device.lingering))
    index, _ = finish(user.alloc(2, 1, LIMIT))
    for job in (user.dealloc(index, LIMIT), user.alloc(2, 1, 1)):
        next(job)
        with pytest.raises(InterruptedError):
            job.throw(InterruptedError(errno.EINTR, "the caller was killed"))
    assert told == [LIMIT, LIMIT] and device.used == LIMIT and grants.violations() == []
    finish(device.sweep())
    assert device.used == 0 and told == [LIMIT, LIMIT]


def test_close(grants, device, user, maps):
    """Goal: with the descriptor its pages go, but those that a process still maps; others' do not.
    Method: two opens; one mapped page of the one that closes."""
    before = grants.held()
    index, _ = finish(user.alloc(2, 1, 3))
    other_maps = Maps()
    other = device.open(other_maps.look)
    other_index, _ = finish(other.alloc(3, 0, 2))
    maps.mapped = {index + PAGE_SIZE}
    finish(user.close())
    assert device.used == 3 and device.users == {other} and sorted(other.pages) == indices(other_index, 2)
    maps.mapped.clear()
    finish(device.sweep())
    assert device.used == 2 and other_maps.looks == []
    finish(other.close())
    assert grants.held() == before
    assert refused(user.alloc(2, 1, 1)) == errno.ENODEV


@pytest.mark.parametrize("how", ["dealloc", "close", "sweep", "stop"])
def test_notification(grants, device, user, maps, how):
    """Goal: whichever way a page goes, its byte is cleared and its event sent, once and only then, though who bound the port
    is gone; the peer still sees the page.  Method: one page of three, mapped by a peer; events, ports and bytes."""
    one, port, other, peer = grants.pair(1, 2)
    index, refs = finish(user.alloc(2, 1, 3))
    status, mapping = grants.domains[2].maptrack.map(1, refs[1])
    assert status == 0 and mapping is not None
    mapping.view[:] = b"\xff" * PAGE_SIZE
    assert user.set_unmap_notify(index + PAGE_SIZE + 4095, CLEAR | SEND, port) == 0
    one.close()
    if how == "sweep":
        maps.mapped = {index + PAGE_SIZE}
        finish(user.dealloc(index, 3))
        assert grants.events(other) == [] and mapping.view[4095] == 0xFF and port in grants.domains[1].events.channels
        maps.mapped.clear()
    if how == "stop":
        device.stop()
    else:
        finish({"dealloc": lambda: user.dealloc(index, 3), "close": user.close, "sweep": device.sweep}[how]())
    assert mapping.view.tobytes() == b"\xff" * 4095 + b"\0"
    assert grants.events(other) == [peer] and port not in grants.domains[1].events.channels
    assert device.used == 1 and grants.domains[2].maptrack.unmap(mapping.handle) == 0 and device.used == 0
    finish(user.close())
    finish(device.sweep())
    assert grants.events(other) == []


def test_notifications_are_each_page_s(grants, user):
    """Goal: every page has its own, the last one set; bad ones are ENOENT or EINVAL and replace nothing.
    Method: two pages; ports that are none, actions, offsets."""
    one, first, other, first_peer = grants.pair(1, 2)
    second = one.bind_unbound_port(2)
    second_peer = other.bind_interdomain(1, second)
    grants.events(other)
    index, _ = finish(user.alloc(2, 1, 2))
    bound = grants.evtchn[1].bound
    assert user.set_unmap_notify(index, SEND, first) == 0 == user.set_unmap_notify(index + PAGE_SIZE + 9, SEND, first)
    assert bound[first].holds == 2
    assert user.set_unmap_notify(index + PAGE_SIZE, SEND, second) == 0
    assert (bound[first].holds, bound[second].holds) == (1, 1)
    for at in (0, index - 1, index + 2 * PAGE_SIZE, 2**64 - 1):
        assert user.set_unmap_notify(at, SEND, first) == ENOENT
    for action, port in ((SEND, 4000), (4, first), (SEND, 2**32 - 1), (2**32 - 1, first)):
        assert user.set_unmap_notify(index, action, port) == EINVAL
    assert (bound[first].holds, bound[second].holds) == (1, 1)
    finish(user.dealloc(index, 1))
    assert grants.events(other) == [first_peer]
    finish(user.dealloc(index + PAGE_SIZE, 1))
    assert grants.events(other) == [second_peer]
    index, _ = finish(user.alloc(2, 1, 1))
    assert user.set_unmap_notify(index, CLEAR | SEND, first) == user.set_unmap_notify(index, 0, 4000) == 0
    finish(user.close())
    assert grants.events(other) == [] and bound[first].holds == 0


@pytest.mark.parametrize("through_gntdev", [False, True])
def test_a_peer_has_it_mapped(grants, device, user, through_gntdev):
    """Goal: after the page was freed, what the peer has mapped stays the same memory until it unmaps it; only then the frame
    is the domain's again, at home and zero, and the limit has room.
    Method: a driver's mapping, and a program's through gntdev, in the same place."""
    domain, peer = grants.domains[1], grants.gntdev[2].open()
    free = domain.memory.free_pages
    index, refs = finish(user.alloc(2, 1, LIMIT))
    pfn = grants.entry((1, refs[0])).pfn
    if through_gntdev:
        assert grants.map(peer, [(1, ref) for ref in refs]) == index
        view = next(iter(peer.maps)).mappings[0].view
    else:
        mappings = [grants.domains[2].maptrack.map(1, ref)[1] for ref in refs]
        view = mappings[0].view
    view[:4] = b"data"
    finish(user.close())
    assert bytes(view[:4]) == b"data" and device.used == LIMIT and domain.memory.free_pages == free - LIMIT
    assert len(grants.arena._slots) == LIMIT and grants.violations() == []
    assert refused(device.open(Maps().look).alloc(2, 1, 1)) == errno.ENOSPC
    assert grants.domains[2].maptrack.map(1, refs[0])[1] is not None, "as in Xen: it is still granted"
    grants.domains[2].maptrack.unmap(max(grants.domains[2].maptrack.mappings))
    if through_gntdev:
        finish(peer.close())
    else:
        for mapping in mappings:
            grants.domains[2].maptrack.unmap(mapping.handle)
    assert device.used == 0 and domain.memory.free_pages == free and not grants.arena._slots
    assert not domain.memory.is_away(pfn) and not any(domain.memory.run(pfn))


def test_looks_at_the_same_time(grants, device, user, maps):
    """Goal: a page is freed once, though several look at it, or the domain ends, while somebody looks.
    Method: sweeps of two opens, stopped at each look, with other sweeps, an end, and new pages in between."""
    for at in range(4):
        for ends in (False, True):
            others = [device.open(maps.look), device.open(Maps().look)]
            for other in others:
                index, _ = finish(other.alloc(2, 1, 2))
                device.lingering.update(dict.fromkeys(other.pages.values(), other.look))
                other.pages = {}
            sweep = device.sweep()
            for _ in range(at):
                if next(sweep, None) is None:
                    break
            if ends:
                device.stop()
                device.stopped = False
            else:
                finish(device.sweep())
            assert device.used == 0 and not device.lingering
            index, refs = finish(user.alloc(2, 1, 4))
            finish(sweep)
            assert device.used == 4 and grants.violations() == []
            assert [grants.entry((1, ref)).domid for ref in refs] == [2] * 4
            assert finish(user.dealloc(index, 4)) == 0 and device.used == 0
            for other in others:
                finish(other.close())


def test_the_domain_ends(grants, device, user, maps):
    """Goal: all pages go with the domain, mapped or not; those that a peer has mapped live on with it; nothing is allocated
    any more, not even by who waited for a sweep.  Method: pages held, lingering and mapped by a peer; an alloc cut short."""
    index, _ = finish(user.alloc(2, 1, 4))
    maps.mapped = {index}
    finish(user.dealloc(index, 2))
    last, refs = finish(user.alloc(2, 1, LIMIT - 3))
    peer = grants.gntdev[2].open()
    assert grants.map(peer, [(1, refs[0])]) == last
    job = user.alloc(2, 1, 1)
    next(job)
    device.stop()
    assert device.used == 1 and not device.lingering and not user.pages
    assert refused(job) == errno.ENODEV
    page = next(iter(peer.maps)).mappings[0].view
    page[:3] = b"yes"
    grants.hypervisor.destroy_domain(1)
    with closing(grants.see(last)) as seen:
        assert seen[:3] == b"yes"
    finish(peer.close())
    assert device.used == 0 and not grants.arena._slots and not any(run.left for run in grants.arena.places.runs)
    finish(user.close())
    del grants.domains[1]
