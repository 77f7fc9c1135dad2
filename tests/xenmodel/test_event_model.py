"""Goal: any sequence of event channel operations agrees with Xen's rules.
Method: a hypothesis state machine over three domains that die and come back; the oracle is a dict of ports, two sets of
bits and who has been told: a domain is, when a bit becomes pending that is not masked, or is unmasked while pending.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from xenmodel.event_channel import State
from xenmodel.hypervisor import Hypervisor
from xenmodel.public.errno import XEN_EEXIST, XEN_EINVAL, XEN_ENOENT, XEN_EPERM, XEN_ESRCH
from xenmodel.public.xen import DOMID_SELF, NR_VIRQS, VCPU_INFO
from xenmodel.types import Domid, Port

DOMIDS = (1, 2, 3)
NOBODY = 9
End = tuple[int, int]  # domid, port


@dataclass
class Known:
    """The oracle's record of a port; `remote` is the other end, or (domid, 0) of who may bind."""

    state: State
    remote: End = (0, 0)
    virq: int = -1
    handler: bool = True


domids = st.sampled_from(DOMIDS)
remotes = st.sampled_from((*DOMIDS, NOBODY, DOMID_SELF))
ports = st.integers(0, 9)
virqs = st.sampled_from((0, 1, NR_VIRQS - 1, NR_VIRQS))


class EventMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.hypervisor = Hypervisor()
        self.domains = {domid: self.hypervisor.create_domain(4, str(domid), domid) for domid in DOMIDS}
        self.known: dict[End, Known] = {}
        self.pending: set[End] = set()
        self.unmasked: set[End] = set()
        self.told: set[int] = set()  # whose upcall is due
        self.ran: list[End] = []

    def handler(self, domid: int):  # type: ignore[no-untyped-def]
        return lambda port: self.ran.append((domid, port))

    def new(self, domid: int, port: Port, known: Known) -> None:
        """A port was handed out: the lowest that was free, and unmasked if somebody handles it."""
        assert port == min(number for number in range(1, len(self.known) + 2) if (domid, number) not in self.known)
        self.known[domid, port] = known
        if known.handler:
            self.unmasked.add((domid, port))

    def raise_(self, end: End) -> None:
        """An event: it is announced if its bit was not pending before and is not masked."""
        if end not in self.pending and end in self.unmasked:
            self.told.add(end[0])
        self.pending.add(end)

    def unmask(self, end: End) -> None:
        if end in self.pending and end not in self.unmasked:
            self.told.add(end[0])
        self.unmasked.add(end)

    @rule(domid=domids, remote=remotes, handled=st.booleans())
    def alloc_unbound(self, domid: int, remote: int, handled: bool) -> None:
        """For whom is not asked before somebody binds."""
        handler = self.handler(domid) if handled else None
        port = self.domains[domid].events.alloc_unbound(Domid(remote), handler)
        self.new(domid, port, Known(State.UNBOUND, (domid if remote == DOMID_SELF else remote, 0), handler=handled))

    @rule(domid=domids, remote=remotes, port=ports, handled=st.booleans())
    def bind_interdomain(self, domid: int, remote: int, port: int, handled: bool) -> None:
        handler = self.handler(domid) if handled else None
        result = self.domains[domid].events.bind_interdomain(Domid(remote), port, handler)
        remote = domid if remote == DOMID_SELF else remote
        there = self.known.get((remote, port))
        if there is None or there.state is not State.UNBOUND or there.remote[0] != domid:
            assert result == (-XEN_ESRCH if remote == NOBODY else -XEN_EINVAL)
            return
        self.new(domid, result, Known(State.INTERDOMAIN, (remote, port), handler=handled))
        there.state, there.remote = State.INTERDOMAIN, (domid, result)
        self.raise_((domid, result))

    @rule(domid=domids, virq=virqs)
    def bind_virq(self, domid: int, virq: int) -> None:
        port = self.domains[domid].events.bind_virq(virq, self.handler(domid))
        if virq == NR_VIRQS:
            assert port == -XEN_EINVAL
        elif any(end[0] == domid and known.virq == virq for end, known in self.known.items()):
            assert port == -XEN_EEXIST
        else:
            self.new(domid, port, Known(State.VIRQ, virq=virq))

    @rule(domid=domids)
    def bind_ipi(self, domid: int) -> None:
        self.new(domid, self.domains[domid].events.bind_ipi(self.handler(domid)), Known(State.IPI))

    @rule(domid=domids, port=ports)
    def set_handler(self, domid: int, port: int) -> None:
        """A driver takes over a port that was made for it; what came before is announced."""
        known = self.known.get((domid, port))
        result = self.domains[domid].events.set_handler(port, self.handler(domid))
        if known is None or known.handler:
            assert result == (-XEN_EINVAL if known is None else -XEN_EPERM)
            return
        assert result == 0
        known.handler = True
        self.unmask((domid, port))

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

    @rule(domid=domids, reborn=st.booleans())
    def reset(self, domid: int, reborn: bool) -> None:
        """EVTCHNOP_reset, or the domain's end and another one in its place."""
        if reborn:
            self.hypervisor.destroy_domain(domid)
            self.domains[domid] = self.hypervisor.create_domain(4, str(domid), domid)
            self.told.discard(domid)
            self.unmasked = {end for end in self.unmasked if end[0] != domid}
        else:
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
            self.raise_(known.remote)
        elif known.state is State.IPI:
            self.raise_((domid, port))

    @rule(domid=domids, virq=virqs)
    def raise_virq(self, domid: int, virq: int) -> None:
        bound = [end for end, known in self.known.items() if end[0] == domid and known.virq == virq]
        assert self.domains[domid].events.raise_virq(virq) == (0 if bound else -XEN_ENOENT)
        for end in bound:
            self.raise_(end)

    @rule(domid=domids, port=ports, masked=st.booleans())
    def mask_or_unmask(self, domid: int, port: int, masked: bool) -> None:
        events = self.domains[domid].events
        assert (events.mask if masked else events.unmask)(port) == (-XEN_EINVAL if port == 0 else 0)
        if port and masked:
            self.unmasked.discard((domid, port))
        elif port:
            self.unmask((domid, port))

    @rule()
    def deliver(self) -> None:
        self.ran.clear()
        self.hypervisor.settle()
        due = {end for end in self.pending & self.unmasked if end[0] in self.told}
        assert sorted(self.ran) == sorted(end for end in due if self.known[end].handler), "each once, and no other"
        self.pending -= due
        self.told.clear()

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
    def who_is_told(self) -> None:
        """The guest's upcall flag follows what was announced, and nobody with an event that is due waits in vain."""
        flag = VCPU_INFO.offsets["evtchn_upcall_pending"]
        assert {domid for domid, domain in self.domains.items() if domain.events.bytes[flag]} == self.told
        assert self.hypervisor.idle == (not self.told)
        assert {end[0] for end in self.pending & self.unmasked} <= self.told, "an event is due and nobody was queued"

    def teardown(self) -> None:
        self.hypervisor.close()


EventMachine.TestCase.settings = settings(max_examples=250, stateful_step_count=50, deadline=None, derandomize=True)
TestEventMachine = EventMachine.TestCase
