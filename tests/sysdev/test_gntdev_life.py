"""Goal: whenever a job of gntdev is cut short, by a close, a domain's end or a disk worker that is in the way, nothing is
left pinned, shown or held.
Method: as in test_gntdev.py, but jobs are run step by step."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from sysdev.gntdev import SLICE, GntdevUser
from sysdev.steps import Job, Pause
from tests.sysdev.granting import Grants, Maps, Ref, finish

EIO = -errno.EIO


@pytest.fixture
def grants() -> Iterator[Grants]:
    made = Grants(1024)
    yield made
    assert made.violations() == []
    made.close()


@pytest.fixture
def user(grants: Grants) -> GntdevUser:
    return grants.gntdev[1].open()


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


JOBS: dict[str, Callable[[GntdevUser, list[Ref], int], Job[Any]]] = {
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
    assert results == [EIO if kind == "map" else 0] and not grants.gntdev[1].users
    assert not any(run.left for run in grants.arena.places.runs)
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
