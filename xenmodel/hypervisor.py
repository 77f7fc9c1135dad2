"""hypervisor.py: the domains of one small Xen, its xenstore, and deliver(), the only place where handlers run.

The run queue holds what is due: a domain with pending events, or a store connection with watch events. Each gets a
bounded turn and goes to the back of the queue if it has more, so one flooding device cannot starve the others.
Everything is synchronous, so each step is atomic; the order of turns and of ports within a turn is an argument, so a
failing run is a seed. No global state: two hypervisors fit in one process.
Left out: vCPUs, scheduling, hypercall pages; a domain is its memory and its interrupts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from xenmodel.domain import Domain, DomainState
from xenmodel.event_channel import EventChannels
from xenmodel.grant_table import DEFAULT_MAX_FRAMES, GrantTable
from xenmodel.public.sched import SHUTDOWN_poweroff
from xenmodel.public.xen import DOMID_FIRST_RESERVED, VIRQ_DOM_EXC
from xenmodel.types import Domid
from xenmodel.xenstore.connection import Connection
from xenmodel.xenstore.daemon import Xenstored
from xenmodel.xenstore.quota import Quota
from xenmodel.xenstore.store import Store

DELIVER_S = 0.002  # and then the host's other work has its turn
TURN_BUDGET = 16  # handlers or watch events one queue entry may run before the others have their turn

Choose = Callable[[int], int]


class Hypervisor:
    """`order(n)` picks which of n candidates runs next; None is first come, first served. `clock` is xenstored's."""

    def __init__(
        self, order: Choose | None = None, quota: Quota | None = None, clock: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.order = order
        self.domains: dict[int, Domain] = {}
        exists = self.domains.__contains__
        self.store = Store(quota or Quota(), self._queue_connection, clock, lambda domid: domid == 0 or exists(domid))
        self.xenstored = Xenstored(self, self.store)
        self._due: deque[EventChannels | Connection] = deque()
        self._deferred: deque[Callable[[], None]] = deque()
        self._next_domid = 0
        self._delivering = False

    # --- domains ---------------------------------------------------------------------------------------------------

    def create_domain(
        self, pages: int, name: str, domid: int | None = None, max_grant_frames: int = DEFAULT_MAX_FRAMES
    ) -> Domain:
        """A new running domain. Domids count up and are not reused before 0x7fef was reached, as on Xen."""
        if domid is None:
            domid = self._next_domid
            while domid in self.domains:
                domid = (domid + 1) % DOMID_FIRST_RESERVED
        if not 0 <= domid < DOMID_FIRST_RESERVED or domid in self.domains:
            raise ValueError(f"domid {domid} is in use or out of range")
        self._next_domid = (domid + 1) % DOMID_FIRST_RESERVED
        domain = Domain(self, Domid(domid), pages, name, max_grant_frames)
        self.domains[domid] = domain
        self.store.created(domain.domid)
        return domain

    def shutdown_domain(self, domid: int, reason: int = SHUTDOWN_poweroff) -> None:
        """The domain stops running; the toolstack learns it through VIRQ_DOM_EXC and destroys it."""
        domain = self.domains[domid]
        domain.state, domain.shutdown_reason = DomainState.SHUTDOWN, reason
        self.store.shutdown(domain.domid)
        self._tell_dom0()

    def destroy_domain(self, domid: int) -> None:
        """Undo everything the domain holds of others. Frames it granted live on while a peer maps them."""
        domain = self.domains[domid]
        domain.state = DomainState.DYING
        domain.events.reset()
        domain.maptrack.unmap_all()
        del self.domains[domid]
        if domain.events in self._due:
            self._due.remove(domain.events)
        self.xenstored.release(Domid(domid))
        domain.memory.close()
        self._tell_dom0()

    def close(self) -> None:
        for domid in sorted(self.domains, reverse=True):
            self.destroy_domain(domid)

    def grants_of(self, domid: int) -> GrantTable | None:
        domain = self.domains.get(domid)
        return domain.grants if domain else None

    def events_of(self, domid: int) -> EventChannels | None:
        domain = self.domains.get(domid)
        return domain.events if domain else None

    def _tell_dom0(self) -> None:
        if 0 in self.domains:
            self.domains[0].events.raise_virq(VIRQ_DOM_EXC)

    # --- delivery --------------------------------------------------------------------------------------------------

    def queue_upcall(self, events: EventChannels) -> None:
        self._due.append(events)

    def _queue_connection(self, connection: Connection) -> None:
        self._due.append(connection)

    def defer(self, action: Callable[[], None]) -> None:
        """Run `action` once when the batch ends, at the start of deliver(): one push and one event for many requests."""
        self._deferred.append(action)

    @property
    def idle(self) -> bool:
        return not self._due and not self._deferred

    def deliver(self, turns: int = 64) -> bool:
        """Give at most `turns` turns to what is due; True if more is due. Handlers must not call it (never re-entered)."""
        assert not self._delivering, "deliver() was called from a handler"
        self._delivering = True
        due, order, clock = self._due, self.order, self.store.clock
        until = clock() + DELIVER_S
        try:
            while turns > 0 and clock() <= until:
                while self._deferred:
                    self._deferred.popleft()()
                if not due:
                    break
                turns -= 1
                if order is not None:
                    due.rotate(-order(len(due)))
                item = due.popleft()
                if isinstance(item, EventChannels):
                    item.run_upcalls(TURN_BUDGET, order)
                elif item.dispatch(TURN_BUDGET if order is None else 1):
                    due.append(item)
        finally:
            self._delivering = False
        return not self.idle

    def settle(self, limit: int = 10_000) -> None:
        """Deliver until nothing is due (tests, start-up). RuntimeError if it does not come to rest."""
        for _ in range(limit):
            if not self.deliver():
                return
        raise RuntimeError(f"still busy after {limit} rounds")
