"""Goal: any sequence of event channel operations agrees with Xen's rules.
Method: a hypothesis state machine over two domains; the oracle is a dict of ports and two sets of bits, in which
"who is to be told" is what is pending and not masked.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from xenmodel.event_channel import State
from xenmodel.hypervisor import Hypervisor
from xenmodel.public.errno import XEN_EEXIST, XEN_EINVAL, XEN_ENOENT
from xenmodel.types import Domid, Port

DOMIDS = (1, 2)
End = tuple[int, int]  # domid, port


@dataclass
class Known:
    """The oracle's record of a port; `remote` is the other end, or (domid, 0) of who may bind."""

    state: State
    remote: End = (0, 0)
    virq: int = -1
    handler: bool = True


domids = st.sampled_from(DOMIDS)
ports = st.integers(0, 9)
virqs = st.integers(0, 1)


class EventMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.hypervisor = Hypervisor()
        self.domains = {domid: self.hypervisor.create_domain(4, str(domid), domid) for domid in DOMIDS}
        self.known: dict[End, Known] = {}
        self.pending: set[End] = set()
        self.unmasked: set[End] = set()
        self.ran: list[End] = []

    def handler(self, domid: int):  # type: ignore[no-untyped-def]
        return lambda port: self.ran.append((domid, port))

    def new(self, domid: int, port: Port, known: Known) -> None:
        """A port was handed out: it was free, and unmasked if somebody handles it."""
        assert port > 0 and (domid, port) not in self.known
        self.known[domid, port] = known
        if known.handler:
            self.unmasked.add((domid, port))

    @rule(domid=domids, remote=domids, handled=st.booleans())
    def alloc_unbound(self, domid: int, remote: int, handled: bool) -> None:
        handler = self.handler(domid) if handled else None
        port = self.domains[domid].events.alloc_unbound(Domid(remote), handler)
        self.new(domid, port, Known(State.UNBOUND, (remote, 0), handler=handled))

    @rule(domid=domids, remote=domids, port=ports)
    def bind_interdomain(self, domid: int, remote: int, port: int) -> None:
        result = self.domains[domid].events.bind_interdomain(Domid(remote), port, self.handler(domid))
        there = self.known.get((remote, port))
        if there is None or there.state is not State.UNBOUND or there.remote[0] != domid:
            assert result == -XEN_EINVAL
            return
        self.new(domid, result, Known(State.INTERDOMAIN, (remote, port)))
        there.state, there.remote = State.INTERDOMAIN, (domid, result)
        self.pending.add((domid, result))

    @rule(domid=domids, virq=virqs)
    def bind_virq(self, domid: int, virq: int) -> None:
        port = self.domains[domid].events.bind_virq(virq, self.handler(domid))
        if any(end[0] == domid and known.virq == virq for end, known in self.known.items()):
            assert port == -XEN_EEXIST
        else:
            self.new(domid, port, Known(State.VIRQ, virq=virq))

    @rule(domid=domids)
    def bind_ipi(self, domid: int) -> None:
        self.new(domid, self.domains[domid].events.bind_ipi(self.handler(domid)), Known(State.IPI))

    @rule(domid=domids, port=ports)
    def close(self, domid: int, port: int) -> None:
        known = self.known.pop((domid, port), None)
        assert self.domains[domid].events.close(port) == (-XEN_EINVAL if known is None else 0)
        if known is None:
            return
        if known.state is State.INTERDOMAIN:
            there = self.known[known.remote]
            there.state, there.remote = State.UNBOUND, (domid, 0)
        self.pending.discard((domid, port))
        self.unmasked.discard((domid, port))

    @rule(domid=domids)
    def reset(self, domid: int) -> None:
        self.domains[domid].events.reset()
        mine = {end for end in self.known if end[0] == domid}
        for end in mine:
            known = self.known[end]
            if known.state is State.INTERDOMAIN and known.remote not in mine:
                there = self.known[known.remote]
                there.state, there.remote = State.UNBOUND, (domid, 0)
        for end in mine:
            del self.known[end]
        self.pending -= mine
        self.unmasked -= mine

    @rule(domid=domids, port=ports)
    def send(self, domid: int, port: int) -> None:
        result = self.domains[domid].events.send(port)
        known = self.known.get((domid, port))
        if known is None or known.state is State.VIRQ:
            assert result == -XEN_EINVAL
            return
        assert result == 0
        if known.state is State.INTERDOMAIN:
            self.pending.add(known.remote)
        elif known.state is State.IPI:
            self.pending.add((domid, port))

    @rule(domid=domids, virq=virqs)
    def raise_virq(self, domid: int, virq: int) -> None:
        bound = [end for end, known in self.known.items() if end[0] == domid and known.virq == virq]
        assert self.domains[domid].events.raise_virq(virq) == (0 if bound else -XEN_ENOENT)
        self.pending.update(bound)

    @rule(domid=domids, port=ports, masked=st.booleans())
    def mask_or_unmask(self, domid: int, port: int, masked: bool) -> None:
        events = self.domains[domid].events
        assert (events.mask if masked else events.unmask)(port) == (-XEN_EINVAL if port == 0 else 0)
        if port:
            (self.unmasked.discard if masked else self.unmasked.add)((domid, port))

    @rule()
    def deliver(self) -> None:
        self.ran.clear()
        self.hypervisor.settle()
        due = self.pending & self.unmasked
        assert sorted(self.ran) == sorted(end for end in due if self.known[end].handler), "each once, and no other"
        self.pending -= due

    @invariant()
    def bits_and_records_agree(self) -> None:
        for domid, domain in self.domains.items():
            events = domain.events
            mine = {port: known for (owner, port), known in self.known.items() if owner == domid}
            assert events.channels.keys() == mine.keys()
            for port in range(1, 20):
                assert events.is_pending(port) == ((domid, port) in self.pending), f"pending {domid}:{port}"
                assert events.is_masked(port) == ((domid, port) not in self.unmasked), f"mask {domid}:{port}"
            for port, known in mine.items():
                channel = events.channels[port]
                assert channel.state is known.state
                if known.state in (State.UNBOUND, State.INTERDOMAIN):
                    assert (channel.remote_domid, channel.remote_port) == known.remote

    @invariant()
    def nobody_waits_in_vain(self) -> None:
        if self.pending & self.unmasked:
            assert not self.hypervisor.idle, "an event is due and nobody was queued"


EventMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None, derandomize=True)
TestEventMachine = EventMachine.TestCase
