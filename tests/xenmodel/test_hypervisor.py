"""Goal: the hypervisor is fair, deterministic and tidy: turns are bounded, a seed is a run, a dead domain leaves nothing.
Method: small worlds of domains and store watchers, delivered with budgets and orders that the test chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from tests.descriptors import open_files
from xenmodel.domain import DomainState
from xenmodel.event_channel import State
from xenmodel.hypervisor import TURN_BUDGET, Hypervisor
from xenmodel.public.grant_table import GNTST_okay
from xenmodel.public.sched import SHUTDOWN_crash, SHUTDOWN_poweroff
from xenmodel.public.xen import DOMID_FIRST_RESERVED, VIRQ_DOM_EXC
from xenmodel.types import Domid, Pfn, Port
from xenmodel.xenstore.client import Client
from xenmodel.xenstore.errors import XsErrno, XsError
from xenmodel.xenstore.perms import Access, Perm

# --- domains -------------------------------------------------------------------------------------------------------------


def test_domids_count_up_and_are_not_reused():
    """Goal: a domid names one domain for a long time.  Method: create, destroy, create; then from the end of the range."""
    hypervisor = Hypervisor()
    assert [hypervisor.create_domain(1, str(n)).domid for n in range(3)] == [0, 1, 2]
    hypervisor.destroy_domain(1)
    assert hypervisor.create_domain(1, "next").domid == 3
    last = hypervisor.create_domain(1, "last", DOMID_FIRST_RESERVED - 1)
    assert last.domid == 0x7FEF
    assert [hypervisor.create_domain(1, str(n)).domid for n in range(2)] == [1, 4], "0, 2 and 3 are in use"


@pytest.mark.parametrize("domid", [0, -1, DOMID_FIRST_RESERVED, 0x7FFF, 2**16])
def test_a_domid_in_use_or_reserved_is_refused(domid: int):
    """Goal: no special domid is ever a domain.  Method: ask for it; nothing was created."""
    hypervisor = Hypervisor()
    hypervisor.create_domain(1, "Domain-0")
    with pytest.raises(ValueError, match="in use or out of range"):
        hypervisor.create_domain(1, "other", domid)
    assert list(hypervisor.domains) == [0]


def test_frame_0_is_shared_info():
    """Goal: real bytes at a known frame.  Method: the mask words of a new domain, seen through its memory."""
    domain = Hypervisor().create_domain(2, "guest")
    assert domain.memory.run(Pfn(0))[2560:3072] == b"\xff" * 512
    assert domain.memory.allocate() == 1
    assert repr(domain) == "<Domain 0 guest running>"


@pytest.mark.parametrize("reason", [SHUTDOWN_poweroff, SHUTDOWN_crash])
def test_dom0_hears_of_shutdown_and_destruction(reason: int):
    """Goal: the toolstack learns through VIRQ_DOM_EXC.  Method: one handler in domain 0, two steps."""
    hypervisor = Hypervisor()
    dom0, guest = (hypervisor.create_domain(2, name) for name in ("Domain-0", "guest"))
    seen: list[tuple[DomainState, int | None]] = []
    dom0.events.bind_virq(VIRQ_DOM_EXC, lambda _: seen.append((guest.state, guest.shutdown_reason)))
    hypervisor.shutdown_domain(guest.domid, reason)
    hypervisor.settle()
    hypervisor.destroy_domain(guest.domid)
    hypervisor.settle()
    assert seen == [(DomainState.SHUTDOWN, reason), (DomainState.DYING, reason)]


def test_destroy_gives_back_what_the_domain_held():
    """Goal: nothing of a dead domain is left.  Method: grants, mappings, ports, store connection, watch, node and a queued
    event, in both directions; then look at the survivor, the store and our descriptors."""
    hypervisor = Hypervisor()
    survivor = hypervisor.create_domain(8, "survivor")
    files = open_files()
    guest = hypervisor.create_domain(8, "guest")
    theirs = survivor.grants.grant_access(guest.domid, Pfn(3))
    ours = guest.grants.grant_access(survivor.domid, Pfn(3))
    assert guest.maptrack.map(survivor.domid, theirs)[0] == GNTST_okay
    status, mapping = survivor.maptrack.map(guest.domid, ours)
    assert status == GNTST_okay and mapping is not None
    waiting = survivor.events.alloc_unbound(guest.domid)
    port = guest.events.bind_interdomain(survivor.domid, waiting, lambda _: pytest.fail("the domain is dead"))
    client = Client(hypervisor.store.connect(guest.domid))
    client.watch("data", lambda _: pytest.fail("the domain is dead"))
    assert (port, hypervisor.idle) == (1, False)

    hypervisor.destroy_domain(guest.domid)
    hypervisor.settle()
    assert guest.domid not in hypervisor.domains and guest.state is DomainState.DYING
    assert survivor.grants.end_access(theirs), "what the guest had mapped is free"
    assert survivor.events.channels[waiting].state is State.UNBOUND
    assert set(hypervisor.store.usage(guest.domid)) == {0} and client.connection.closed
    mapping.view[:4] = b"mine"
    assert survivor.maptrack.unmap(mapping.handle) == GNTST_okay, "a frame lives on while a peer maps it"
    assert survivor.maptrack.map(guest.domid, ours)[1] is None
    del mapping, guest, client
    assert open_files() <= files


def test_close_destroys_every_domain():
    """Goal: one call at the end of a program.  Method: three domains mapping each other's frames in a ring."""
    hypervisor = Hypervisor()
    domains = [hypervisor.create_domain(4, str(n)) for n in range(3)]
    for domain, peer in zip(domains, domains[1:] + domains[:1], strict=True):
        assert peer.maptrack.map(domain.domid, domain.grants.grant_access(peer.domid, Pfn(2)))[0] == GNTST_okay
    hypervisor.close()
    assert hypervisor.domains == {} and hypervisor.idle
    assert [domain.memory.fd for domain in domains] == [-1] * 3


def test_two_hypervisors_know_nothing_of_each_other():
    """Goal: no global state.  Method: the same domid, ref, port and path in both; act in one, look at the other."""
    worlds = [Hypervisor(), Hypervisor()]
    domains = [world.create_domain(4, "same") for world in worlds]
    ran: list[int] = []
    for i, (world, domain) in enumerate(zip(worlds, domains, strict=True)):
        assert (domain.domid, domain.events.bind_ipi(lambda _, i=i: ran.append(i))) == (0, 1)  # type: ignore[misc]
        assert domain.grants.grant_access(Domid(0), Pfn(i)) == 8
        Client(world.store.connect(Domid(0))).write("/which", i)
    domains[0].events.send(1)
    assert [world.idle for world in worlds] == [False, True]
    for world in worlds:
        world.settle()
    assert ran == [0]
    assert [Client(world.store.connect(Domid(0))).read("/which") for world in worlds] == ["0", "1"]
    assert [domain.maptrack.map(0, 8)[1].frame.pfn for domain in domains] == [0, 1]  # type: ignore[union-attr]
    worlds[0].close()
    assert list(worlds[1].domains) == [0]


# --- its xenstore --------------------------------------------------------------------------------------------------------


def test_the_store_knows_which_domains_exist():
    """Goal: no node is given to a domain that is not there.  Method: SET_PERMS for a domain before, in and after its life,
    and for domain 0, which the store serves whether it was built or not."""
    hypervisor = Hypervisor()
    control = hypervisor.store.connect(Domid(0))
    control.mkdir("/x")

    def give(domid: int) -> None:
        control.set_perms("/x", [Perm(Domid(domid), Access.NONE)])

    give(0)
    for alive in (False, True, False):
        if alive:
            hypervisor.create_domain(1, "guest", 5)
            give(5)
            hypervisor.destroy_domain(5)
            assert control.directory("/") == ["tool"], "what it owned goes with it"
            control.mkdir("/x")
        else:
            with pytest.raises(XsError) as caught:
                give(5)
            assert caught.value.errno is XsErrno.ENOENT
    assert control.get_perms("/x") == [Perm(Domid(0), Access.NONE)]


def test_a_new_domain_has_no_permissions_from_before():
    """Goal: a permission is a domain's, not a number's.  Method: permit something to a number; create that domain."""
    hypervisor = Hypervisor()
    control = hypervisor.store.connect(Domid(0))
    perms = [Perm(Domid(0), Access.NONE), Perm(Domid(5), Access.READ)]
    control.set_perms("/tool", perms)
    hypervisor.create_domain(1, "guest", 5)
    guest = hypervisor.store.connect(Domid(5))
    with pytest.raises(XsError, match="has not the permission"):
        guest.read("/tool")
    assert control.get_perms("/tool") == perms[:1]
    control.set_perms("/tool", perms)
    assert guest.read("/tool") == b""


def test_watchers_hear_of_shutdown_and_destruction_once_each():
    """Goal: @releaseDomain for what the store was told to serve.  Method: one domain that is introduced and one that is
    not shut down twice and are destroyed."""
    hypervisor = Hypervisor()
    for domid in range(3):
        hypervisor.create_domain(1, str(domid))
    seen: list[str] = []
    connection = hypervisor.store.connect(Domid(0))
    connection.on_event = lambda path, token: seen.append(path)
    connection.watch("@releaseDomain", "t", 1)
    hypervisor.settle()
    hypervisor.store.introduce(Domid(1))
    heard = []
    for step in (hypervisor.shutdown_domain, hypervisor.shutdown_domain, hypervisor.destroy_domain):
        seen.clear()
        for domid in (1, 2):
            step(domid)
        hypervisor.settle()
        heard.append(list(seen))
    assert heard == [["@releaseDomain/1"], [], ["@releaseDomain/1"]]


def test_the_clock_is_the_stores():
    """Goal: one clock for all that xenstored times.  Method: an event that a guest leaves unread for 20 s is lost."""
    now = 100.0
    hypervisor = Hypervisor(clock=lambda: now)
    hypervisor.create_domain(1, "Domain-0")
    guest = hypervisor.store.connect(hypervisor.create_domain(1, "guest").domid)
    guest.watch("data", "t")
    assert hypervisor.store.timers.next == 120.0
    now = 119.9
    hypervisor.store.timers.run()
    assert guest.pending_events == 1
    now = 120.0
    hypervisor.store.timers.run()
    assert guest.pending_events == 0 and hypervisor.store.timers.next is None


# --- delivery ------------------------------------------------------------------------------------------------------------


class Flood:
    """Domain 1 raises all its ports again each time it runs; domain 2 and a store client want something once."""

    def __init__(self, order: Callable[[int], int] | None = None) -> None:
        self.hypervisor = Hypervisor(order)
        self.trace: list[str] = []
        flooder, quiet = (self.hypervisor.create_domain(2, name, domid) for name, domid in (("flooder", 1), ("quiet", 2)))
        self.left = 10_000

        def flood(port: Port) -> None:
            self.trace.append(f"flood{port}")
            self.left -= 1
            if self.left > 0:
                flooder.events.raise_again(port)

        for port in [flooder.events.bind_ipi(flood) for _ in range(3 * TURN_BUDGET)]:
            flooder.events.send(port)
        self.hypervisor.deliver(turns=2)
        quiet.events.send(quiet.events.bind_ipi(lambda _: self.trace.append("event")))
        client = Client(self.hypervisor.store.connect(Domid(0)))
        client.watch("/", lambda _: self.trace.append("watch"))
        self.trace.clear()


def test_a_flood_does_not_starve_the_others():
    """Goal: one domain's flood costs another at most a turn's wait.  Method: what runs before the quiet ones do."""
    flood = Flood()
    flood.hypervisor.deliver(turns=3)
    assert set(flood.trace[TURN_BUDGET:]) == {"event", "watch"}
    assert len(flood.trace) == TURN_BUDGET + 2


@pytest.mark.parametrize("seed", range(20))
def test_nobody_starves_in_any_order(seed: int):
    """Goal: the same under a random order.  Method: within 200 turns of a fair choice the quiet ones have run."""
    flood = Flood(Random(seed).randrange)
    flood.hypervisor.deliver(turns=200)
    assert {"event", "watch"} <= set(flood.trace)


def test_a_seed_is_a_run():
    """Goal: a failing order can be run again.  Method: traces of equal and of different seeds, and without an order."""

    def trace(order: Callable[[int], int] | None) -> list[str]:
        flood = Flood(order)
        flood.left = 500
        flood.hypervisor.settle()
        return flood.trace

    traces = {seed: trace(Random(seed).randrange) for seed in range(5)}
    assert all(trace(Random(seed).randrange) == again for seed, again in traces.items())
    assert len({tuple(one) for one in traces.values()}) == 5
    assert trace(None) == trace(None)


@pytest.mark.parametrize(("order", "expected"), [(None, "0123"), (lambda n: 0, "0123"), (lambda n: n - 1, "3210")])
def test_order_picks_whose_turn_it_is(order: Callable[[int], int] | None, expected: str):
    """Goal: the order of turns is the caller's.  Method: four domains due at once."""
    hypervisor, ran = Hypervisor(order), []
    for domid in range(4):
        events = hypervisor.create_domain(2, str(domid)).events
        events.send(events.bind_ipi(lambda _, domid=domid: ran.append(str(domid))))  # type: ignore[misc]
    hypervisor.settle()
    assert "".join(ran) == expected


def test_deliver_says_whether_there_is_more():
    """Goal: the edge's loop can trust the result.  Method: three due domains, one turn at a time; and no turns at all."""
    hypervisor, ran = Hypervisor(), []
    for domid in range(3):
        events = hypervisor.create_domain(2, str(domid)).events
        events.send(events.bind_ipi(lambda _, domid=domid: ran.append(domid)))  # type: ignore[misc]
    assert hypervisor.deliver(turns=0) is True
    assert [hypervisor.deliver(turns=1) for _ in range(3)] == [True, True, False]
    assert ran == [0, 1, 2]
    assert hypervisor.deliver() is False


def test_settle_gives_up_on_what_never_rests():
    """Goal: a test that livelocks fails instead of hanging.  Method: a port that raises itself for ever."""
    hypervisor = Hypervisor()
    events = hypervisor.create_domain(2, "busy").events
    events.send(events.bind_ipi(events.raise_again))
    with pytest.raises(RuntimeError, match="still busy"):
        hypervisor.settle(limit=3)


def test_a_failed_delivery_can_be_followed_by_another():
    """Goal: an exception does not jam the loop.  Method: a handler that raises once; deliver again."""
    hypervisor, ran = Hypervisor(), []
    events = hypervisor.create_domain(2, "a").events

    def handler(port: Port) -> None:
        ran.append(port)
        assert len(ran) > 1, "the first run fails"

    port = events.bind_ipi(handler)
    for _ in range(2):
        events.send(port)
        try:
            hypervisor.settle()
        except AssertionError as error:
            assert str(error).startswith("the first run fails")
    assert ran == [port, port] and hypervisor.idle


# --- defer ---------------------------------------------------------------------------------------------------------------


def test_deferred_actions_run_once_before_the_next_turn():
    """Goal: one push and one event for many requests.  Method: a handler per request that defers one push."""
    hypervisor = Hypervisor()
    events = hypervisor.create_domain(2, "a").events
    trace: list[str] = []
    waiting: list[Port] = []

    def push() -> None:
        trace.append(f"push{len(waiting)}")
        waiting.clear()

    def request(port: Port) -> None:
        if not waiting:
            hypervisor.defer(push)
        waiting.append(port)
        trace.append("request")

    for port in [events.bind_ipi(request) for _ in range(5)]:
        events.send(port)
    hypervisor.deliver()
    assert trace == ["request"] * 5 + ["push5"]
    assert hypervisor.idle and not hypervisor.deliver()


def test_defer_outside_a_delivery_waits_for_it():
    """Goal: never re-entered.  Method: defer from plain code, and from a deferred action; order is kept."""
    hypervisor, trace = Hypervisor(), []
    hypervisor.defer(lambda: hypervisor.defer(lambda: trace.append("third")))
    hypervisor.defer(lambda: trace.append("first"))
    hypervisor.defer(lambda: trace.append("second"))
    assert trace == [] and not hypervisor.idle
    assert hypervisor.deliver() is False
    assert trace == ["first", "second", "third"]


def test_what_the_last_turn_deferred_is_not_forgotten():
    """Goal: deliver() with its turns used up says that there is more.  Method: one turn whose handler defers."""
    hypervisor, trace = Hypervisor(), []
    events = hypervisor.create_domain(2, "a").events
    events.send(events.bind_ipi(lambda _: hypervisor.defer(lambda: trace.append("pushed"))))
    assert hypervisor.deliver(turns=1) is True and trace == []
    assert hypervisor.deliver(turns=1) is False and trace == ["pushed"]


def test_a_deferred_action_that_fails_takes_no_other_with_it():
    """Goal: our mistake in one push does not leave the other devices' requests unpublished.
    Method: the second of four raises; the exception is seen once, the others run once, in order."""
    hypervisor, trace = Hypervisor(), []

    def failing() -> None:
        trace.append("failing")
        raise ZeroDivisionError

    for action in (lambda: trace.append("a"), failing, lambda: trace.append("b"), lambda: trace.append("c")):
        hypervisor.defer(action)
    with pytest.raises(ZeroDivisionError):
        hypervisor.deliver()
    assert trace == ["a", "failing"] and not hypervisor.idle
    assert hypervisor.deliver() is False
    assert trace == ["a", "failing", "b", "c"]
