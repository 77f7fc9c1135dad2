"""Goal: gntdev maps grants as Linux's does: all of a call or nothing, notifications whichever way a map goes, and nothing is
left pinned, shown or held, whenever a job is cut short.
Method: real domains, grant tables and the real arena; jobs are run by the test, to their end or step by step."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from sysdev.gntdev import REFS_MOST, SLICE, UNMAP_NOTIFY_CLEAR_BYTE, UNMAP_NOTIFY_SEND_EVENT, GntdevUser
from sysdev.steps import Pause
from tests.sysdev.granting import Grants, Maps, Ref, finish
from xenmodel.public.grant_table import GTF_reading, GTF_writing
from xenmodel.types import PAGE_SIZE, Gref

CLEAR, SEND = UNMAP_NOTIFY_CLEAR_BYTE, UNMAP_NOTIFY_SEND_EVENT
EINVAL, ENOENT, EBUSY, EIO, ENOSPC, ENOMEM = (
    -errno.EINVAL, -errno.ENOENT, -errno.EBUSY, -errno.EIO, -errno.ENOSPC, -errno.ENOMEM
)  # fmt: skip


@pytest.fixture
def grants() -> Iterator[Grants]:
    made = Grants(1024)
    yield made
    assert made.violations() == []
    made.close()


@pytest.fixture
def user(grants: Grants) -> GntdevUser:
    return grants.gntdev[1].open()


# --- mapping ---------------------------------------------------------------------------------------------------------


def test_map_and_unmap(grants, user):
    """Goal: pages of several domains, in any order, are the owners' pages as long as they are mapped; then they are at home
    with what was written.
    Method: a process's view of the file at the index; both sides write; what is held, before and after."""
    refs = grants.grant(2, 1, 3) + grants.grant(3, 1, 2) + grants.grant(2, 1, 1)
    refs = [refs[place] for place in (4, 0, 2, 5, 1, 3)]
    before = grants.held()
    index = grants.map(user, refs)
    assert index > 0 and index % PAGE_SIZE == 0 and grants.violations() == []
    with closing(grants.see(index, len(refs))) as seen:
        for place, ref in enumerate(refs):
            page = grants.page(ref)
            at = place * PAGE_SIZE
            assert seen[at : at + 4] == bytes(page[:4]) and grants.entry(ref).flags & GTF_writing
            seen[at + 8 : at + 13] = b"there"
            page[100:104] = b"here"
            assert bytes(page[8:13]) == b"there" and seen[at + 100 : at + 104] == b"here"
        mapping = next(iter(user.maps)).mappings[0]
        assert (mapping.owner, mapping.domid) == ("prog[1]", refs[0][0])
        assert finish(user.unmap(index, len(refs))) == 0
        assert not any(seen[:]), "what is still mapped shows nothing"
    assert grants.held() == before
    assert all(bytes(grants.page(ref)[8:13]) == b"there" for ref in refs)
    assert finish(user.unmap(index, len(refs))) == ENOENT


def bad_refs(grants: Grants) -> dict[str, tuple[Ref, int]]:
    """References that cannot be mapped by domain 1, and the errno."""
    (for_other,) = grants.grant(2, 3, 1)
    (ended,) = grants.grant(2, 1, 1)
    grants.domains[2].grants.end_access(Gref(ended[1]))
    return {
        "for another": (for_other, EINVAL), "ended": (ended, EINVAL), "beyond the table": ((2, 10**6), EINVAL),
        "the largest": ((2, 2**32 - 1), EINVAL), "no such domain": ((9, 8), EINVAL), "no domid": ((2**32 - 1, 8), EINVAL),
    }  # fmt: skip


def test_all_or_nothing(grants, user):
    """Goal: one bad reference anywhere, and nothing is mapped.
    Method: each kind of bad one in each place of five, and around the places where others have their turn."""
    good = grants.grant(2, 1, 2 * SLICE + 3)
    for bad, status in bad_refs(grants).values():
        before = grants.held()
        for refs in (good[:4], good):
            places = range(5) if len(refs) == 4 else (0, SLICE - 1, SLICE, 2 * SLICE - 1, 2 * SLICE, len(refs))
            for place in places:
                assert grants.map(user, [*refs[:place], bad, *refs[place:]]) == status
                assert grants.held() == before and grants.violations() == []
    assert grants.map(user, good) > 0


def test_a_frame_is_in_one_place(grants, user):
    """Goal: a frame twice in a call, in another order than it is seen in, or for another domain, is EBUSY, and changes
    nothing; the same order is the same place.  Method: each of them, in each place, within and across slices."""
    refs = grants.grant(2, 1, 2 * SLICE)
    before = grants.held()
    for one, other in ((0, 1), (0, SLICE - 1), (0, SLICE), (SLICE - 1, SLICE), (SLICE, SLICE + 1), (3, 2 * SLICE - 1)):
        twice = list(refs)
        twice[other] = twice[one]
        assert grants.map(user, twice) == EBUSY
        assert grants.held() == before
    index = grants.map(user, refs[:-1])
    shown = grants.held()
    second = grants.gntdev[1].open()
    for place in (1, 5, SLICE, SLICE + 1, 2 * SLICE - 2):
        other_order = list(refs[:-1])
        other_order[place], other_order[place - 1] = other_order[place - 1], other_order[place]
        assert grants.map(second, other_order) == EBUSY and grants.held() == shown
    assert grants.map(second, refs) == EBUSY, "the last one is not seen yet"
    assert grants.map(second, [refs[-1], refs[0]]) == EBUSY
    memory = grants.frame(refs[0])
    (to_three,) = [(2, grants.domains[2].grants.grant_access(3, memory.pfn))]
    shown = grants.held()
    assert grants.map(grants.gntdev[3].open(), [to_three]) == EBUSY and grants.held() == shown
    for first, count in ((0, len(refs) - 1), (0, 1), (7, SLICE), (SLICE + 2, 1)):
        at = index + first * PAGE_SIZE
        assert grants.map(second, refs[first : first + count]) == at and grants.violations() == []
        assert finish(second.unmap(at, count)) == 0 and grants.held() == shown


def test_read_only(grants, user):
    """Goal: what is granted to be read is pinned to be read, beside what is writable.  Method: a mixture; flags and pins."""
    refs = [*grants.grant(2, 1, 1, readonly=True), *grants.grant(2, 1, 1), *grants.grant(3, 1, 1, readonly=True)]
    index = grants.map(user, refs)
    flags = [grants.entry(ref).flags & (GTF_reading | GTF_writing) for ref in refs]
    assert flags == [GTF_reading, GTF_reading | GTF_writing, GTF_reading]
    port = grants.pair(1, 2)[1]
    for place, readonly in enumerate((True, False, True)):
        at = index + place * PAGE_SIZE + 5
        assert user.set_unmap_notify(at, CLEAR, 0) == (EINVAL if readonly else 0)
        assert user.set_unmap_notify(at, CLEAR | SEND, port) == (EINVAL if readonly else 0)
        assert user.set_unmap_notify(at, SEND, port) == 0
    assert finish(user.unmap(index, 3)) == 0


def test_limits(grants, user):
    """Goal: no reference or too many is EINVAL; a full maptrack ENOSPC, no more pieces of memory ENOMEM; nothing is left.
    Method: the limits made small, met and passed."""
    refs = grants.grant(2, 1, 600)
    before = grants.held()
    assert grants.map(user, []) == EINVAL
    assert grants.map(user, [(2, 2**32 - 1)] * (REFS_MOST + 1)) == EINVAL
    grants.domains[1].maptrack.limit = 590
    assert grants.map(user, refs) == ENOSPC and grants.held() == before
    assert finish(user.unmap(grants.map(user, refs[:590]), 590)) == 0
    grants.domains[1].maptrack.limit = 10**6
    grants.arena._most_pieces = 4 * 299
    scattered = refs[::2]
    assert grants.map(user, scattered) == ENOMEM and grants.held() == before
    assert grants.map(user, scattered[:299]) > 0
    assert grants.map(user, refs[1:2]) == ENOMEM and grants.violations() == []


def test_a_very_long_map():
    """Goal: as many references as Linux takes, and others have their turn all the time.
    Method: 64 Ki; pauses counted, of the map and of closing it."""
    grants = Grants(REFS_MOST + 200, max_grant_frames=130)
    user = grants.gntdev[1].open()
    refs = grants.grant(2, 1, REFS_MOST)
    before, pauses = grants.held(), []
    index = finish(user.map(refs, "prog[1]"), pause=pauses.append)
    assert index > 0 and set(pauses) == {Pause.TURN} and len(pauses) == 2 * (REFS_MOST // SLICE - 1)
    with closing(grants.see(index + (REFS_MOST - 1) * PAGE_SIZE)) as seen:
        assert seen[:4] == bytes(grants.page(refs[-1])[:4])
    pauses.clear()
    finish(user.close(), pause=pauses.append)
    assert len(pauses) >= REFS_MOST // SLICE - 1 and grants.held() == before
    grants.close()


def test_closing_many_maps_takes_turns(grants, user):
    """Goal: a thousand maps of a page cost others no longer wait than one of a thousand.  Method: pauses of close()."""
    refs = grants.grant(2, 1, 4 * SLICE - 100)
    before, pauses = grants.held(), []
    assert all(grants.map(user, [ref]) > 0 for ref in refs)
    finish(user.close(), pause=pauses.append)
    assert len(pauses) == 3 and grants.held() == before and not grants.gntdev[1].users


# --- unmapping, finding ----------------------------------------------------------------------------------------------


def test_unmap_wants_what_map_gave(grants, user):
    """Goal: UNMAP is for the index and count of one MAP of this open, or ENOENT.  Method: near misses; another open."""
    index = grants.map(user, grants.grant(2, 1, 4))
    other = grants.gntdev[1].open()
    for at, count in ((index, 3), (index, 5), (index, 0), (index + PAGE_SIZE, 3), (index + 1, 4), (0, 4), (2**64 - 1, 4)):
        assert finish(user.unmap(at, count)) == ENOENT, (at, count)
    assert finish(other.unmap(index, 4)) == ENOENT and other.find(index) == []
    assert finish(user.unmap(index, 4)) == 0


def test_find(grants, user):
    """Goal: every offset in a map finds it, every map that has it; none beside it does.
    Method: neighbours in memory, and maps that share a place; offsets in, at the edges of and beside them."""
    refs = grants.grant(2, 1, 4)
    index = grants.map(user, refs)
    assert grants.map(user, refs[1:3]) == index + PAGE_SIZE and grants.map(user, refs[:2]) == index
    whole, middle, front = (index, 4), (index + PAGE_SIZE, 2), (index, 2)
    for page, expected in enumerate(([whole, front], [whole, middle, front], [whole, middle], [whole])):
        for more in (0, 1, PAGE_SIZE - 1):
            assert user.find(index + page * PAGE_SIZE + more) == expected
    assert user.find(index - 1) == user.find(index + 4 * PAGE_SIZE) == []
    assert finish(user.unmap(*whole)) == 0
    assert user.find(index) == [front] and user.find(index + 3 * PAGE_SIZE) == []
    assert finish(user.close()) == 0 and user.find(index) == []


# --- notifications ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["unmap", "close", "stop"])
def test_notification(grants, user, how):
    """Goal: whichever way a map goes, its byte is cleared and its event sent, once, though who bound the port is gone; then
    the port is gone, too.  Method: a map of three pages; the peer's page, events and the domain's ports."""
    refs = grants.grant(2, 1, 3)
    one, port, other, peer = grants.pair(1, 2)
    index = grants.map(user, refs)
    grants.page(refs[1])[:PAGE_SIZE] = b"\xff" * PAGE_SIZE
    assert user.set_unmap_notify(index + PAGE_SIZE + 77, CLEAR | SEND, port) == 0
    one.close()
    assert port in grants.domains[1].events.channels and grants.events(other) == []
    if how == "stop":
        grants.gntdev[1].stop()
    else:
        assert finish(user.unmap(index, 3) if how == "unmap" else user.close()) == 0
    assert grants.page(refs[1]).tobytes() == b"\xff" * 77 + b"\0" + b"\xff" * (PAGE_SIZE - 78)
    assert grants.events(other) == [peer] and port not in grants.domains[1].events.channels
    finish(user.close())
    assert grants.events(other) == [] and grants.violations() == []


def test_notification_while_it_is_mapped(grants, user):
    """Goal: the peer learns of it before the page is unmapped: it is not free yet.  Method: send() looks at the pins."""
    (ref,) = grants.grant(2, 1, 1)
    _, port, _, _ = grants.pair(1, 2)
    index = grants.map(user, [ref])
    page, seen = grants.page(ref), []
    page[0] = 1
    send = grants.evtchn[1].send
    grants.evtchn[1].send = lambda port: (seen.append((page[0], grants.entry(ref).pins)), send(port))
    assert user.set_unmap_notify(index, CLEAR | SEND, port) == 0
    assert finish(user.unmap(index, 1)) == 0 and seen == [(0, 1)]


def test_notifications_are_replaced(grants, user):
    """Goal: only the last one survives, and the port of another is not held any longer; action 0 is none.
    Method: two ports, the same one again, none; holds, events and bytes."""
    (ref,) = grants.grant(2, 1, 1)
    one, first, other, first_peer = grants.pair(1, 2)
    second = one.bind_unbound_port(2)
    second_peer = other.bind_interdomain(1, second)
    assert grants.events(other) == [second_peer]
    page = grants.page(ref)

    def holds() -> list[int]:
        return [grants.evtchn[1].bound[port].holds for port in (first, second)]

    for actions, expected, cleared in (
        ([(1, CLEAR | SEND, first), (2, SEND, second)], [second_peer], []),
        ([(1, SEND, first), (1, SEND, first)], [first_peer], []),
        ([(1, SEND, first), (3, CLEAR, 0)], [], [3]),
        ([(1, CLEAR | SEND, first), (2, 0, 0)], [], []),
        ([(1, 0, first), (9, CLEAR | SEND, first), (10, CLEAR | SEND, 4000), (11, 4, 0)], [first_peer], [9]),
    ):
        index = grants.map(user, [ref])
        page[:16] = b"\xff" * 16
        for at, action, port in actions:
            good = action < 4 and port < 4000
            assert user.set_unmap_notify(index + at, action, port) == (0 if good else EINVAL)
        assert sum(holds()) == len(expected)
        assert finish(user.unmap(index, 1)) == 0 and holds() == [0, 0]
        assert grants.events(other) == expected
        assert [at for at in range(16) if not page[at]] == cleared


def test_bad_notifications(grants, user):
    """Goal: no such byte is ENOENT; no such action, or a port that no program of the domain has, EINVAL; nothing is held.
    Method: offsets around a map, actions, ports: free, the kernel's, another domain's, of numbers that are none."""
    index = grants.map(user, grants.grant(2, 1, 2))
    one, port, _, peer = grants.pair(1, 2)
    kernels = grants.domains[1].events.alloc_unbound(2)
    before = grants.held()
    for at in (0, index - 1, index + 2 * PAGE_SIZE, 2**64 - 1):
        assert user.set_unmap_notify(at, SEND, port) == ENOENT
    for action in (4, 7, 0x80000000, 2**32 - 1):
        assert user.set_unmap_notify(index, action, port) == EINVAL
    for bad in (0, kernels, kernels + 1, 4095, 4096, 2**32 - 1):
        assert user.set_unmap_notify(index, SEND, bad) == EINVAL
        assert user.set_unmap_notify(index, CLEAR, bad) == 0, "nobody asks for it"
    one.close()
    assert user.set_unmap_notify(index, SEND, port) == EINVAL, "closed"
    assert grants.held()["1 ports"] == {} != before["1 ports"] and peer
    for at in (index, index + 2 * PAGE_SIZE - 1):
        assert user.set_unmap_notify(at, CLEAR, 0) == 0


def test_notifications_of_maps_in_one_place(grants, user):
    """Goal: each of several maps of a page has its own, and who sets one means the map that he has just made.
    Method: the same reference mapped twice, a notification after each; both unmapped."""
    (ref,) = grants.grant(2, 1, 1)
    one, first, other, first_peer = grants.pair(1, 2)
    second = one.bind_unbound_port(2)
    second_peer = other.bind_interdomain(1, second)
    grants.events(other)
    index = grants.map(user, [ref])
    assert user.set_unmap_notify(index, SEND, first) == 0
    assert grants.map(user, [ref]) == index and user.set_unmap_notify(index, SEND, second) == 0
    assert finish(user.unmap(index, 1)) == 0 and grants.events(other) == [second_peer]
    assert finish(user.unmap(index, 1)) == 0 and grants.events(other) == [first_peer]


# --- jobs that are cut short -----------------------------------------------------------------------------------------


def test_waits_for_a_disk_worker(grants, user):
    """Goal: a frame that is written to cannot be mapped, or go home, until that is done: the job waits for an event, and the
    pin stays.  Method: a frame in the second slice."""
    refs = grants.grant(2, 1, SLICE + 2)
    before = grants.held()
    grants.filling = [grants.frame(refs[SLICE])]
    pauses: list[Pause] = []

    def done(pause: Pause) -> None:
        pauses.append(pause)
        if len(pauses) == 5:
            grants.filling = []

    index = finish(user.map(refs, "prog[1]"), pause=done)
    assert index > 0 and pauses == [Pause.TURN, Pause.TURN, *[Pause.EVENT] * 3] and grants.violations() == []
    grants.filling = [grants.frame(refs[0])]
    assert finish(user.unmap(index, len(refs))) == 0
    assert 0 < grants.held()["slots"] <= SLICE and grants.entry(refs[0]).pins == 1
    grants.filling = []
    grants.arena.step()
    assert grants.held() == before


JOBS: dict[str, Callable[[GntdevUser, list[Ref], int], object]] = {
    "map": lambda user, refs, index: user.map(refs[600:], "prog[1]"),
    "unmap": lambda user, refs, index: user.unmap(index, 600),
    "close": lambda user, refs, index: user.close(),
}


@pytest.mark.parametrize("step", range(6))
@pytest.mark.parametrize("kind", JOBS)
@pytest.mark.parametrize("end", ["stop", "close"])
def test_ended_in_the_middle(grants, user, kind, step, end):
    """Goal: when a domain stops, at that moment nothing is pinned or shown any more, whatever its programs were about; the
    job finds nothing left to do. The same when an open is closed.
    Method: a job of some slices, cut at each of its pauses; another open with a map of its own."""
    refs = grants.grant(2, 1, 1000)
    before = grants.held()
    index = grants.map(user, refs[:600])
    grants.filling = [grants.frame(refs[-1])]  # so that the map waits, too
    job = JOBS[kind](user, refs, index)
    results = []
    try:
        for _ in range(step + 1):
            next(job)
        assert grants.violations() == []
    except StopIteration as stop:
        results.append(stop.value)
    if end == "stop":
        grants.gntdev[1].stop()
    else:
        finish(user.close())
    now = grants.held()
    del before["runs"], now["runs"]  # one that was not filled goes with the job
    assert now == before and grants.violations() == []
    if not results:
        results.append(finish(job))
    assert results == [EIO if kind == "map" else 0] and not grants.gntdev[1].users and not grants.arena._runs
    assert finish(user.map(refs[:1], "prog[1]")) == EIO and grants.violations() == []


def test_domains_end(grants, user):
    """Goal: a granter's end leaves its pages to who has them mapped; a mapper's end leaves nothing, and a page that its
    owner had given up becomes free only when it is at home.
    Method: destroy the one and look at the page; pages of gntalloc, more than a slice, freed while mapped, and the mapper
    destroyed in the middle of a close."""
    (ref,) = grants.grant(2, 1, 1)
    index, page = grants.map(user, [ref]), grants.page(ref)
    maps = Maps()
    owner = grants.gntalloc[3].open(maps.look)
    at, refs = finish(owner.alloc(1, 1, 600))
    free = grants.domains[3].memory.free_pages
    assert grants.map(user, [(3, one) for one in refs]) == at
    finish(owner.close())
    assert grants.gntalloc[3].used == 600 and grants.domains[3].memory.free_pages == free
    grants.gntdev[2].stop()
    grants.hypervisor.destroy_domain(2)
    with closing(grants.see(index)) as seen:
        page[:5] = b"still"
        assert seen[:5] == b"still"
    job = user.close()
    next(job)
    grants.gntdev[1].stop()
    assert grants.gntalloc[3].used == 0 and grants.domains[3].memory.free_pages == free + 600
    grants.hypervisor.destroy_domain(1)
    assert finish(job) == 0 and not grants.arena._slots and bytes(page[:5]) == b"still"
    del grants.domains[1], grants.domains[2]
