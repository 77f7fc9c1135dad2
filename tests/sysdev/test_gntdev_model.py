"""Goal: whatever programs do with gntdev and gntalloc, in any order and with jobs in the middle of others, no mapping, pin,
slot or page is lost, counted twice or kept.
Method: a hypothesis state machine over opens in two domains that map each other's pages, and jobs that are advanced a step
at a time; after each step every mapping is in one map, slots have as many users as there are maps of them, granters' pins
are those mappings (Grants.violations); at the end everything is closed and as it was."""

from __future__ import annotations

import errno
from typing import Any
from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sysdev import gntdev
from sysdev.gntalloc import GntallocUser
from sysdev.steps import Job
from tests.sysdev.granting import Grants, Maps, Ref, finish
from xenmodel.types import PAGE_SIZE

DOMAIN_OF = (1, 1, 2)  # of each open
LIMIT = 8  # pages of gntalloc
JOBS_MOST = 6
ANSWERS = {0, -errno.EINVAL, -errno.ENOENT, -errno.EBUSY, -errno.EIO, -errno.ENOSPC}

opens = st.integers(0, len(DOMAIN_OF) - 1)
few = st.integers(1, 5)


class GrantDevices(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.slices = patch.object(gntdev, "SLICE", 2)  # many turns
        self.slices.start()
        self.grants = Grants(limit=LIMIT)
        self.refs: dict[int, list[Ref]] = {}  # what a domain may map
        for domid, peer in ((1, 2), (2, 1)):
            self.refs[domid] = self.grants.grant(peer, domid, 4) + self.grants.grant(3, domid, 3)
            self.refs[domid] += self.grants.grant(peer, domid, 1, readonly=True)
        self.ends = {1: self.grants.pair(1, 2)[:2], 2: self.grants.pair(2, 1)[:2]}
        self.before = self.grants.held()
        self.maps = Maps()
        self.users = [self.grants.gntdev[domid].open() for domid in DOMAIN_OF]
        self.sharers = [self.grants.gntalloc[domid].open(self.maps.look) for domid in DOMAIN_OF]
        self.jobs: list[Job[Any]] = []
        self.windows: list[int] = []  # what is in `maps`, in an order that does not depend on where the arena puts things

    # --- jobs -----------------------------------------------------------------------------------------------------

    def start(self, job: Job[Any]) -> None:
        self.jobs.append(job)
        self.step(len(self.jobs) - 1)

    def step(self, number: int) -> None:
        try:
            next(self.jobs[number])
        except StopIteration as stop:
            del self.jobs[number]
            assert stop.value is None or stop.value in ANSWERS or stop.value > 0, stop.value
        except OSError as error:
            del self.jobs[number]
            assert error.errno in (errno.ENOSPC, errno.ENODEV)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def advance(self, data: st.DataObject) -> None:
        self.step(data.draw(st.integers(0, len(self.jobs) - 1)))

    # --- what programs do -----------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.jobs) < JOBS_MOST)
    @rule(user=opens, data=st.data(), bad=st.booleans())
    def map(self, user: int, data: st.DataObject, bad: bool) -> None:
        refs = self.refs[DOMAIN_OF[user]]
        wanted = data.draw(st.lists(st.sampled_from(refs), min_size=1, max_size=6, unique=data.draw(st.booleans())))
        if data.draw(st.booleans()):
            wanted = sorted(wanted)  # as a program has them that maps what another has mapped
        if bad:
            wanted.insert(data.draw(st.integers(0, len(wanted))), (3, 4000))
        self.start(self.users[user].map(wanted, "prog[1]"))

    def some_map(self, user: int, data: st.DataObject) -> tuple[int, int]:
        mine = [(one.index, len(one.mappings)) for one in self.users[user].maps] or [(PAGE_SIZE, 1)]
        return data.draw(st.sampled_from(mine))

    @precondition(lambda self: len(self.jobs) < JOBS_MOST)
    @rule(user=opens, data=st.data(), wrong=st.sampled_from((0, 0, 0, 1)))
    def unmap(self, user: int, data: st.DataObject, wrong: int) -> None:
        index, count = self.some_map(user, data)
        self.start(self.users[user].unmap(index, count + wrong))

    @rule(user=opens, data=st.data(), page=st.integers(0, 6), action=st.integers(0, 4), port=st.booleans())
    def notify(self, user: int, data: st.DataObject, page: int, action: int, port: bool) -> None:
        index, _ = self.some_map(user, data)
        number = self.ends[DOMAIN_OF[user]][1] if port else 4000
        assert self.users[user].set_unmap_notify(index + page * PAGE_SIZE, action, number) in ANSWERS

    @rule(user=opens)
    def close(self, user: int) -> None:
        """And open again."""
        self.start(self.users[user].close())
        self.users[user] = self.grants.gntdev[DOMAIN_OF[user]].open()

    # --- of pages that they share ------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.jobs) < JOBS_MOST)
    @rule(user=opens, count=few, data=st.data())
    def alloc(self, user: int, count: int, data: st.DataObject) -> None:
        domid, sharer = DOMAIN_OF[user], self.sharers[user]
        mapped = data.draw(st.booleans())
        self.start(self.allocating(sharer, domid, count, mapped))

    def allocating(self, sharer: GntallocUser, domid: int, count: int, mapped: bool) -> Job[None]:
        index, refs = yield from sharer.alloc(3 - domid, 1, count)
        self.refs[3 - domid] += [(domid, ref) for ref in refs]
        if mapped:
            self.windows += range(index, index + count * PAGE_SIZE, PAGE_SIZE)
            self.maps.mapped.update(self.windows)

    @precondition(lambda self: len(self.jobs) < JOBS_MOST)
    @rule(user=opens, count=few, data=st.data())
    def dealloc(self, user: int, count: int, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(list(self.sharers[user].pages) or [PAGE_SIZE]))
        self.start(self.sharers[user].dealloc(index, count))

    @rule(user=opens, data=st.data(), action=st.integers(0, 4))
    def notify_of_page(self, user: int, data: st.DataObject, action: int) -> None:
        index = data.draw(st.sampled_from(list(self.sharers[user].pages) or [PAGE_SIZE]))
        assert self.sharers[user].set_unmap_notify(index + 3, action, self.ends[DOMAIN_OF[user]][1]) in ANSWERS

    @rule(data=st.data())
    def munmap(self, data: st.DataObject) -> None:
        if self.windows:
            self.maps.mapped.discard(self.windows.pop(data.draw(st.integers(0, len(self.windows) - 1))))

    @precondition(lambda self: len(self.jobs) < JOBS_MOST)
    @rule(domid=st.sampled_from((1, 2)))
    def sweep(self, domid: int) -> None:
        self.start(self.grants.gntalloc[domid].sweep())

    @rule(user=opens)
    def close_pages(self, user: int) -> None:
        self.start(self.sharers[user].close())
        self.sharers[user] = self.grants.gntalloc[DOMAIN_OF[user]].open(self.maps.look)

    @rule(domid=st.sampled_from((1, 2)))
    def stop(self, domid: int) -> None:
        """At once. Then a device as of a new domain, so that it goes on."""
        self.grants.gntdev[domid].stop()
        device = self.grants.gntalloc[domid]
        device.stop()
        assert not self.grants.domains[domid].maptrack.mappings and not device.lingering
        device.stopped = False
        for user, its in enumerate(DOMAIN_OF):
            if its == domid:
                self.users[user] = self.grants.gntdev[domid].open()

    @invariant()
    def holds(self) -> None:
        assert self.grants.violations() == []

    def teardown(self) -> None:
        self.slices.stop()
        self.maps.mapped.clear()
        for job in [*(user.close() for user in self.users), *(sharer.close() for sharer in self.sharers), *self.jobs]:
            try:
                finish(job)
            except OSError as error:
                assert error.errno in (errno.ENOSPC, errno.ENODEV)
        self.maps.mapped.clear()
        for sharer in self.sharers:  # what a job allocated that ended just now
            finish(sharer.close())
        for domid in (1, 2):
            finish(self.grants.gntalloc[domid].sweep())
        after = self.grants.held()
        assert self.grants.violations() == [] and after == self.before
        self.grants.close()


TestGrantDevices = GrantDevices.TestCase
TestGrantDevices.settings = settings(max_examples=60, stateful_step_count=40)
