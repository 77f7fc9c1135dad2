"""testing.py: tools for tests of drivers: two domains, an order that is an argument, and invariant checkers.

Shipped because whoever writes a driver needs them. Used by tests only; calls everything else in xenmodel. No randomness of
its own: SeededOrder is given a function like random.Random(seed).randrange.

A checker returns the violations it found, as texts, and changes nothing; `[]` is what a test wants to see. Footprint
compares what the domains hold before and after: grants, mappings, ports, watches, frames. Left out: mocks. Everything here
looks at, or plays a part in, a real Hypervisor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise

from xenmodel.domain import Domain
from xenmodel.event_channel import Handler, State
from xenmodel.hypervisor import Hypervisor
from xenmodel.public.grant_table import GTF_reading, GTF_type_mask, GTF_writing
from xenmodel.public.io.ring import REQ_PROD, RSP_PROD
from xenmodel.ring import U32, BackRing, FrontRing
from xenmodel.types import Port
from xenmodel.xenstore.client import Client

MOST_CHOICES = 1_000_000  # of one order; a test that needs more does not come to rest


class SeededOrder:
    """Which of n candidates runs next, drawn from `pick(n)` and remembered: `choices` replays a run without its seed."""

    def __init__(self, pick: Callable[[int], int]) -> None:
        self.pick = pick
        self.choices: list[int] = []

    def __call__(self, n: int) -> int:
        choice = self.pick(n)
        assert 0 <= choice < n, f"{choice} is none of {n} candidates"
        assert len(self.choices) < MOST_CHOICES, f"{MOST_CHOICES} choices and no end"
        self.choices.append(choice)
        return choice

    @classmethod
    def replay(cls, choices: Iterable[int]) -> SeededOrder:
        """The same choices again; the first candidate when they are used up."""
        rest = iter(choices)
        return cls(lambda n: min(next(rest, 0), n - 1))


class TwoDomains:
    """Domain 0 (`back`) and a guest (`front`), each with a client of the store. The shape of every split driver."""

    def __init__(
        self, order: Callable[[int], int] | None = None, back_pages: int = 1024, front_pages: int = 4096
    ) -> None:
        self.hypervisor = Hypervisor(order)
        self.back = self.hypervisor.create_domain(back_pages, "Domain-0", 0)
        self.front = self.hypervisor.create_domain(front_pages, "guest")
        self.hypervisor.store.introduce(self.front.domid)
        self.back_client = Client(self.hypervisor.store.connect(self.back.domid))
        self.front_client = Client(self.hypervisor.store.connect(self.front.domid))

    def connect(self, front_handler: Handler | None = None, back_handler: Handler | None = None) -> tuple[Port, Port]:
        """An event channel between the two: the guest's port and domain 0's."""
        front = self.front.events.alloc_unbound(self.back.domid, front_handler)
        back = self.back.events.bind_interdomain(self.front.domid, front, back_handler)
        assert front > 0 and back > 0, f"no event channel: {front}, {back}"
        return front, back

    def settle(self) -> None:
        self.hypervisor.settle()

    def close(self) -> None:
        self.hypervisor.close()


# --- rings -------------------------------------------------------------------------------------------------------------


def check_rings(front: FrontRing, back: BackRing) -> list[str]:
    """rsp_cons <= rsp_prod <= rsp_prod_pvt <= req_cons <= req_prod <= req_prod_pvt, all within one ring's size."""
    start = front.rsp_cons
    indices = (
        ("rsp_cons", front.rsp_cons),
        ("rsp_prod", front.words[RSP_PROD]),
        ("rsp_prod_pvt", back.rsp_prod_pvt),
        ("req_cons", back.req_cons),
        ("req_prod", front.words[REQ_PROD]),
        ("req_prod_pvt", front.req_prod_pvt),
    )
    distances = [((index - start) & U32, name) for name, index in indices]
    problems = [
        f"{later} is behind {name}: {dict(indices)}"
        for (distance, name), (further, later) in pairwise(distances)
        if further < distance
    ]
    if distances[-1][0] > front.size:
        problems.append(f"{distances[-1][0]} slots are in use on a ring of {front.size}: {dict(indices)}")
    if front.size != back.size:
        problems.append(f"the ends disagree on the size: {front.size} and {back.size}")
    return problems


# --- grants and ports --------------------------------------------------------------------------------------------------


def check_grants(domains: Iterable[Domain]) -> list[str]:
    """Pin counts are exactly the mappings that exist, and the flags in the guest's entry say the same.

    `domains` are all that live; mappings of a dead domain's frames are held to nothing but their own counts.
    """
    domains = list(domains)
    readers: Counter[tuple[int, int]] = Counter()
    writers: Counter[tuple[int, int]] = Counter()
    for domain in domains:
        for mapping in domain.maptrack.mappings.values():
            (readers if mapping.readonly else writers)[id(mapping.table), mapping.ref] += 1
    problems = []
    for domain in domains:
        table, name = domain.grants, f"domain {domain.domid}"
        flags = {entry.ref: entry.flags for entry in table.entries()}
        for ref, active in table.active.items():
            want = readers[id(table), ref], writers[id(table), ref]
            if (active.readers, active.writers) != want:
                problems.append(f"{name} grant {ref}: pins {active.readers}, {active.writers} but mapped {want}")
        for key in set(readers) | set(writers):
            if key[0] == id(table) and key[1] not in table.active:
                problems.append(f"{name} grant {key[1]} is mapped and not pinned")
        for ref, bits in flags.items():
            pins = table.active.get(ref)
            said = bool(bits & GTF_reading), bool(bits & GTF_writing)
            if said != (pins is not None, bool(pins and pins.writers)):
                problems.append(f"{name} grant {ref}: flags {bits:#x} with pins {pins and (pins.readers, pins.writers)}")
            if not bits & GTF_type_mask and pins is None:
                problems.append(f"{name} grant {ref}: flags {bits:#x} of an entry that grants nothing")
    return problems


def check_ports(hypervisor: Hypervisor) -> list[str]:
    """Every interdomain port has a peer that points back, in a domain that lives."""
    problems = []
    for domain in hypervisor.domains.values():
        for port, channel in domain.events.channels.items():
            if channel.state is not State.INTERDOMAIN:
                continue
            peer = hypervisor.events_of(channel.remote_domid)
            other = peer.channels.get(channel.remote_port) if peer else None
            if other is None or other.state is not State.INTERDOMAIN or other.remote_port != port:
                problems.append(f"port {port} of domain {domain.domid} is bound to one that is not bound to it")
    return problems


def check_world(hypervisor: Hypervisor) -> list[str]:
    return check_grants(hypervisor.domains.values()) + check_ports(hypervisor)


class Footprint:
    """What every domain holds at one moment. `grown()` names what has been acquired since and not let go of.

    The grant table's own frames do not count: a table grows and never shrinks.
    """

    def __init__(self, hypervisor: Hypervisor) -> None:
        self.hypervisor = hypervisor
        self.before = self._measure()

    def _measure(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for domid, domain in self.hypervisor.domains.items():
            usage = self.hypervisor.store.usage(domain.domid)
            counts |= {
                f"grants of domain {domid}": sum(1 for _ in domain.grants.entries()),
                f"mappings of domain {domid}": len(domain.maptrack.mappings),
                f"ports of domain {domid}": len(domain.events.channels),
                f"watches of domain {domid}": usage.watches,
                f"transactions of domain {domid}": usage.transactions,
                f"frames of domain {domid}": domain.memory.pages - domain.memory.free_pages - domain.grants.frames,
            }
        return counts

    def grown(self) -> list[str]:
        """Empty if nothing leaked; domains that are gone are forgotten, new ones start from nothing."""
        now = self._measure()
        before = self.before
        return [f"{what}: {before.get(what, 0)} before, {n} now" for what, n in now.items() if n > before.get(what, 0)]
