"""Goal: who is told, when, and how often: only 0->1 of an unmasked bit notifies, handlers run later and never nested.
Method: scripts of sends, masks and deliveries, with what the handlers saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random

import pytest

from xenmodel.domain import Domain
from xenmodel.hypervisor import TURN_BUDGET, Hypervisor
from xenmodel.public.xen import SHARED_INFO, VIRQ_CONSOLE, VIRQ_DOM_EXC
from xenmodel.types import Domid, Pfn, Port

A, B = Domid(1), Domid(2)


class Pair:
    """Domain 1 listens on a port, domain 2 sends to it."""

    def __init__(self, handler: Callable[[Port], None] | None = None) -> None:
        self.hypervisor = Hypervisor()
        self.a, self.b = (self.hypervisor.create_domain(4, f"domain {domid}", domid) for domid in (A, B))
        self.ran = 0
        self.port = self.a.events.alloc_unbound(B, handler or self.count)
        self.sender = self.b.events.bind_interdomain(A, self.port)
        self.hypervisor.settle()

    def count(self, port: Port) -> None:
        assert port == self.port
        self.ran += 1

    def do(self, words: str) -> str:
        """Run a script, one letter a step; the number of handler runs after each delivery."""
        events, result = self.a.events, ""
        steps: dict[str, Callable[[], object]] = {
            "s": lambda: self.b.events.send(self.sender),
            "m": lambda: events.mask(self.port),
            "u": lambda: events.unmask(self.port),
            "r": lambda: events.raise_again(self.port),
            "c": lambda: events.close(self.port),
        }
        for word in words:
            if word == "d":
                self.hypervisor.settle()
                result, self.ran = result + str(self.ran), 0
            else:
                steps[word]()
        return result


SCRIPTS = [  # s send, m mask, u unmask, r raise again, c close, d deliver; runs of the handler at each d
    ("d", "0"),
    ("sd", "1"),
    ("sssd", "1"),
    ("sdsd", "11"),
    ("sdd", "10"),
    ("msd", "0"),
    ("msdud", "01"),
    ("msssdud", "01"),
    ("smd", "0"),
    ("smdud", "01"),
    ("muud", "0"),
    ("msuud", "1"),
    ("smud", "1"),
    ("uud", "0"),
    ("rd", "1"),
    ("mrdud", "01"),
    ("srd", "1"),
    ("scd", "0"),
    ("mscd", "0"),
]


@pytest.mark.parametrize(("script", "runs"), SCRIPTS)
def test_only_a_rising_unmasked_bit_notifies(script: str, runs: str):
    """Goal: Xen's 2-level rules.  Method: one port, one letter per step."""
    assert Pair().do(script) == runs


QUEUED = [("s", 1), ("ss", 1), ("ms", 0), ("msu", 1), ("sm", 1), ("uu", 0), ("mru", 1)]


@pytest.mark.parametrize(("script", "queued"), QUEUED)
def test_a_domain_is_queued_once(script: str, queued: int):
    """Goal: a flood of events is one entry in the run queue.  Method: count calls of `queue`."""
    pair, calls = Pair(), []
    pair.a.events._queue = calls.append
    pair.do(script)
    assert len(calls) == queued


def test_a_guest_that_unmasks_by_itself_looks_by_itself():
    """Goal: a bit that is pending already notifies nobody (xen.h: "edge-triggered").  Method: pending while masked; the
    guest clears its mask bit in shared_info without telling Xen; one more send; then the operation that does tell."""
    pair = Pair()
    pair.do("ms")
    pair.a.memory.run(Pfn(0))[SHARED_INFO["evtchn_mask"] + pair.port // 8] &= ~(1 << pair.port % 8)
    assert pair.do("sd") == "0"
    assert pair.do("muud") == "1"


def test_send_marks_and_deliver_runs():
    """Goal: a driver is never entered half way through something.  Method: nothing has run when send() returns."""
    pair = Pair()
    pair.b.events.send(pair.sender)
    assert (pair.ran, pair.a.events.is_pending(pair.port), pair.hypervisor.idle) == (0, True, False)
    pair.hypervisor.deliver()
    assert (pair.ran, pair.a.events.is_pending(pair.port), pair.hypervisor.idle) == (1, False, True)


@contextmanager
def entered(depth: list[int]) -> Iterator[None]:
    depth[0] += 1
    assert depth[0] == 1, "a handler was entered while one was running"
    yield
    depth[0] -= 1


def test_handlers_are_never_entered_twice():
    """Goal: no re-entry through any operation a handler may use.  Method: two domains whose handlers send to each other,
    to themselves, mask, unmask and raise again, in random order."""
    random, depth, ran = Random(7), [0], [0]
    hypervisor = Hypervisor(order=random.randrange)
    a, b = (hypervisor.create_domain(4, f"domain {domid}", domid) for domid in (A, B))
    ports: dict[Domain, list[Port]] = {a: [], b: []}

    def handler(domain: Domain) -> Callable[[Port], None]:
        def run(port: Port) -> None:
            with entered(depth):
                ran[0] += 1
                if ran[0] < 5000:
                    for other in random.sample(ports[domain], 2):
                        domain.events.send(other)
                    domain.events.mask(port)
                    domain.events.send(port)
                    domain.events.unmask(port)
                    domain.events.raise_again(port)
                with pytest.raises(AssertionError, match="from a handler"):
                    hypervisor.deliver()

        return run

    for _ in range(8):
        ports[a].append(a.events.alloc_unbound(B, handler(a)))
        ports[b].append(b.events.bind_interdomain(A, ports[a][-1], handler(b)))
        ports[a].append(a.events.bind_ipi(handler(a)))
        ports[b].append(b.events.bind_ipi(handler(b)))
    hypervisor.settle()
    assert ran[0] >= 5000 and hypervisor.idle


def test_raise_again_gives_the_others_their_turn():
    """Goal: a handler with more work than it may do at once comes back, after the others.  Method: two ports, the lower
    one raising itself three times; the order of runs."""
    hypervisor = Hypervisor()
    domain = hypervisor.create_domain(4, "a", A)
    ran: list[str] = []

    def busy(port: Port) -> None:
        ran.append("busy")
        if ran.count("busy") < 4:
            domain.events.raise_again(port)

    first = domain.events.bind_ipi(busy)
    second = domain.events.bind_ipi(lambda _: ran.append("other"))
    domain.events.send(first)
    domain.events.send(second)
    hypervisor.settle()
    assert ran == ["busy", "other", "busy", "busy", "busy"]


def many_ports(count: int, handler: Callable[[Port], None]) -> tuple[Domain, list[Port]]:
    domain = Hypervisor().create_domain(4, "many", A)
    return domain, [domain.events.bind_ipi(handler) for _ in range(count)]


@pytest.mark.parametrize("count", [1, TURN_BUDGET, TURN_BUDGET + 1, 200])
def test_a_turn_is_bounded_and_the_rest_follows(count: int):
    """Goal: the budget.  Method: many ports pending at once; runs per deliver(turns=1)."""
    ran: list[Port] = []
    domain, ports = many_ports(count, ran.append)
    for port in ports:
        domain.events.send(port)
    turns = 0
    while not domain.hypervisor.idle:
        before = len(ran)
        domain.hypervisor.deliver(turns=1)
        turns += 1
        assert 0 < len(ran) - before <= TURN_BUDGET
    assert ran == ports and turns == -(-count // TURN_BUDGET)


@pytest.mark.parametrize("act", ["close", "mask"])
def test_what_a_handler_closed_or_masked_does_not_run(act: str):
    """Goal: no call after unbind (XSA-331).  Method: the first handler stops the second, which is pending; then unmask."""
    ran: list[Port] = []
    domain = Hypervisor().create_domain(4, "a", A)

    def first(port: Port) -> None:
        ran.append(port)
        getattr(domain.events, act)(2)

    assert [domain.events.bind_ipi(first), domain.events.bind_ipi(ran.append)] == [1, 2]
    domain.events.send(1)
    domain.events.send(2)
    domain.hypervisor.settle()
    assert ran == [1]
    domain.events.unmask(2)
    domain.hypervisor.settle()
    assert ran == ([1, 2] if act == "mask" else [1]), "masked is delayed, closed is gone"


def test_a_handler_that_raises_costs_nobody_else_an_event():
    """Goal: a bug in one driver is that driver's.  Method: three pending ports, the first raises; deliver again."""
    ran: list[int] = []
    domain = Hypervisor().create_domain(4, "a", A)

    def broken(_port: Port) -> None:
        raise RuntimeError("a bug")

    ports = [domain.events.bind_ipi(broken), domain.events.bind_ipi(ran.append), domain.events.bind_ipi(ran.append)]
    for port in ports:
        domain.events.send(port)
    with pytest.raises(RuntimeError, match="a bug"):
        domain.hypervisor.settle()
    domain.hypervisor.settle()
    assert ran == ports[1:]


def test_virqs_reach_who_bound_them():
    """Goal: one virq, one domain.  Method: bind in two domains, raise in one."""
    hypervisor, ran = Hypervisor(), []
    a, b = (hypervisor.create_domain(4, f"domain {domid}", domid) for domid in (A, B))
    for domain in (a, b):
        domain.events.bind_virq(VIRQ_CONSOLE, lambda port, domain=domain: ran.append((domain.domid, port)))  # type: ignore[misc]
        domain.events.bind_virq(VIRQ_DOM_EXC, lambda _: ran.append((0, 0)))
    b.events.raise_virq(VIRQ_CONSOLE)
    hypervisor.settle()
    assert ran == [(B, 1)]


def test_counts_for_inspection():
    """Goal: sent and notified per port.  Method: three sends, one delivery; one send, one delivery."""
    pair = Pair()
    pair.do("sssdsd")
    assert pair.b.events.channels[pair.sender].sent == 4
    assert pair.a.events.channels[pair.port].notified == 2
