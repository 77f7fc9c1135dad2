"""Goal: gntdev maps grants as Linux's does: all of a call or nothing, and notifications whichever way a map goes.
Method: real domains, grant tables and the real arena; jobs are run by the test, to their end."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import closing

import pytest

from sysdev.gntdev import REFS_MOST, SLICE, UNMAP_NOTIFY_CLEAR_BYTE, UNMAP_NOTIFY_SEND_EVENT, GntdevUser
from sysdev.steps import Pause
from tests.sysdev.granting import Grants, Ref, finish
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


def test_notification_when_it_is_unmapped(grants, user):
    """Goal: when the peer learns of it, the byte is cleared and the page free.  Method: send() looks at the pins."""
    (ref,) = grants.grant(2, 1, 1)
    _, port, _, _ = grants.pair(1, 2)
    index = grants.map(user, [ref])
    page, seen = grants.page(ref), []
    page[0] = 1
    send = grants.evtchn[1].send
    grants.evtchn[1].send = lambda port: (seen.append((page[0], grants.entry(ref).pins)), send(port))
    assert user.set_unmap_notify(index, CLEAR | SEND, port) == 0
    assert finish(user.unmap(index, 1)) == 0 and seen == [(0, 0)]


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
