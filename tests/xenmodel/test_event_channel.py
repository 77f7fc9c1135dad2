"""Goal: event channels as xen/common/event_channel.c has them, with their bits where xen.h puts them.
Method: tables of calls and their results, small scripts, and the bytes of shared_info.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from xenmodel.domain import Domain
from xenmodel.event_channel import NR_PORTS, State
from xenmodel.hypervisor import Hypervisor
from xenmodel.public.errno import XEN_EEXIST, XEN_EINVAL, XEN_ENOENT, XEN_ENOSPC, XEN_EPERM, XEN_ESRCH
from xenmodel.public.event_channel import EVTCHN_2L_NR_CHANNELS
from xenmodel.public.xen import DOMID_SELF, NR_VIRQS, SHARED_INFO, VCPU_INFO, VIRQ_CONSOLE, VIRQ_DOM_EXC
from xenmodel.types import Domid, Pfn, Port

A, B, C, NOBODY = Domid(1), Domid(2), Domid(3), Domid(9)


class Trio(NamedTuple):
    hypervisor: Hypervisor
    a: Domain
    b: Domain
    c: Domain

    def connect(self, on_a: Callable[[Port], None] | None, on_b: Callable[[Port], None] | None) -> tuple[Port, Port]:
        """A bound pair, at rest: the event that binding raises has been delivered."""
        port_a = self.a.events.alloc_unbound(B, on_a)
        port_b = self.b.events.bind_interdomain(A, port_a, on_b)
        assert min(port_a, port_b) > 0
        self.hypervisor.settle()
        return port_a, port_b


@pytest.fixture
def trio() -> Trio:
    hypervisor = Hypervisor()
    return Trio(hypervisor, *(hypervisor.create_domain(4, f"domain {domid}", domid) for domid in (A, B, C)))


def bit(domain: Domain, field: str, port: int) -> int:
    """A port's bit in shared_info, read as a C program would: byte by byte from the header's offset."""
    page = domain.memory.run(Pfn(0))
    return page[SHARED_INFO[field] + port // 8] >> port % 8 & 1


# --- results -------------------------------------------------------------------------------------------------------------

# Before each case: domain 1 has port 1 unbound for domain 2, port 2 bound to itself by port 3, port 4 an IPI,
# port 5 VIRQ_DOM_EXC, port 6 unbound for itself.
RESULTS: list[tuple[str, Callable[[Trio], int], int]] = [
    ("bind an unbound port", lambda t: t.b.events.bind_interdomain(A, 1), 1),
    ("bind one's own, DOMID_SELF", lambda t: t.a.events.bind_interdomain(Domid(DOMID_SELF), 6), 7),
    ("bind a port that waits for another", lambda t: t.c.events.bind_interdomain(A, 1), -XEN_EINVAL),
    ("bind a port that is bound", lambda t: t.a.events.bind_interdomain(A, 2), -XEN_EINVAL),
    ("bind an IPI", lambda t: t.a.events.bind_interdomain(A, 4), -XEN_EINVAL),
    ("bind a virq", lambda t: t.a.events.bind_interdomain(A, 5), -XEN_EINVAL),
    ("bind a closed port", lambda t: t.b.events.bind_interdomain(A, 99), -XEN_EINVAL),
    ("bind port 0", lambda t: t.b.events.bind_interdomain(A, 0), -XEN_EINVAL),
    ("bind no port", lambda t: t.b.events.bind_interdomain(A, NR_PORTS), -XEN_EINVAL),
    ("bind of no domain", lambda t: t.b.events.bind_interdomain(NOBODY, 1), -XEN_ESRCH),
    ("wait for a domain that is not there yet", lambda t: t.b.events.alloc_unbound(NOBODY), 1),
    ("virq twice", lambda t: t.a.events.bind_virq(VIRQ_DOM_EXC), -XEN_EEXIST),
    ("another virq", lambda t: t.a.events.bind_virq(VIRQ_CONSOLE), 7),
    ("the virq of another domain is another", lambda t: t.b.events.bind_virq(VIRQ_DOM_EXC), 1),
    ("virq beyond the last", lambda t: t.a.events.bind_virq(NR_VIRQS), -XEN_EINVAL),
    ("virq below the first", lambda t: t.a.events.bind_virq(-1), -XEN_EINVAL),
    ("send on a bound port", lambda t: t.a.events.send(2), 0),
    ("send on an unbound port", lambda t: t.a.events.send(1), 0),
    ("send on an IPI", lambda t: t.a.events.send(4), 0),
    ("send on a virq", lambda t: t.a.events.send(5), -XEN_EINVAL),
    ("send on a closed port", lambda t: t.a.events.send(99), -XEN_EINVAL),
    ("send on no port", lambda t: t.a.events.send(-1), -XEN_EINVAL),
    ("raise a virq", lambda t: t.a.events.raise_virq(VIRQ_DOM_EXC), 0),
    ("raise a virq nobody bound", lambda t: t.a.events.raise_virq(VIRQ_CONSOLE), -XEN_ENOENT),
    ("close", lambda t: t.a.events.close(1), 0),
    ("close twice", lambda t: t.a.events.close(1) or t.a.events.close(1), -XEN_EINVAL),
    ("close port 0", lambda t: t.a.events.close(0), -XEN_EINVAL),
    ("close a virq and bind it again", lambda t: t.a.events.close(5) or min(t.a.events.bind_virq(VIRQ_DOM_EXC), 1), 1),
    ("mask port 0", lambda t: t.a.events.mask(0), -XEN_EINVAL),
    ("mask no port", lambda t: t.a.events.mask(NR_PORTS), -XEN_EINVAL),
    ("unmask port 0", lambda t: t.a.events.unmask(0), -XEN_EINVAL),
    ("unmask no port", lambda t: t.a.events.unmask(NR_PORTS), -XEN_EINVAL),
    ("mask a closed port", lambda t: t.a.events.mask(99), 0),
    ("handler for a closed port", lambda t: t.a.events.set_handler(99, print), -XEN_EINVAL),
    ("second handler", lambda t: t.a.events.set_handler(1, id) or t.a.events.set_handler(1, print), -XEN_EPERM),
]


@pytest.mark.parametrize(("act", "expected"), [case[1:] for case in RESULTS], ids=[case[0] for case in RESULTS])
def test_results(trio: Trio, act: Callable[[Trio], int], expected: int):
    """Goal: the result of each operation, as the hypercall returns it.  Method: one call on prepared ports."""
    events = trio.a.events
    prepared = [events.alloc_unbound(B), events.alloc_unbound(Domid(DOMID_SELF)), events.bind_interdomain(A, 2)]
    prepared += [events.bind_ipi(), events.bind_virq(VIRQ_DOM_EXC), events.alloc_unbound(A)]
    assert prepared == [1, 2, 3, 4, 5, 6]
    assert act(trio) == expected
    trio.hypervisor.settle()


STATUS = [(0, None), (-1, None), (NR_PORTS, None), (99, State.CLOSED), (1, State.UNBOUND), (2, State.IPI), (3, State.VIRQ)]


@pytest.mark.parametrize(("port", "state"), STATUS)
def test_status(trio: Trio, port: int, state: State | None):
    """Goal: EVTCHNOP_status.  Method: one port of each kind, and numbers that are no ports."""
    events = trio.a.events
    assert [events.alloc_unbound(B), events.bind_ipi(), events.bind_virq(VIRQ_CONSOLE)] == [1, 2, 3]
    status = events.status(port)
    if isinstance(status, int):
        assert (status, state) == (-XEN_EINVAL, None)
    else:
        assert status.state is state
        assert status.virq == (VIRQ_CONSOLE if port == 3 else 0)
        assert port != 1 or status.remote_domid == B


def test_4095_ports(trio: Trio):
    """Goal: every port but 0, then ENOSPC at each way to get one, before the peer's port is looked at.
    Method: take all; close one in the middle; it is the next."""
    events = trio.a.events
    waiting = trio.b.events.alloc_unbound(A)
    ports = [events.alloc_unbound(B) for _ in range(NR_PORTS - 1)]
    assert sorted(ports) == list(range(1, EVTCHN_2L_NR_CHANNELS))
    for full in (
        events.alloc_unbound(B),
        events.bind_interdomain(B, waiting),
        events.bind_interdomain(B, 77),
        events.bind_virq(VIRQ_CONSOLE),
        events.bind_ipi(),
    ):
        assert full == -XEN_ENOSPC
    peer = trio.b.events.status(waiting)
    assert not isinstance(peer, int) and peer.state is State.UNBOUND, "a refused bind leaves the peer's port waiting"
    assert events.close(2000) == 0
    assert events.bind_interdomain(B, waiting) == 2000


# --- bits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", [1, 7, 8, 63, 64, 65, 1000, 4095])
def test_bits_lie_where_the_header_says(trio: Trio, port: int):
    """Goal: another program that maps shared_info sees Xen's bits.  Method: a port at word or byte edges; its peer sends."""
    events, page = trio.a.events, trio.a.memory.run(Pfn(0))
    for _ in range(port):
        last = events.alloc_unbound(B)
    assert last == port
    assert bit(trio.a, "evtchn_mask", port) == 1, "a kernel boots with every port masked"
    seen: list[tuple[int, int]] = []
    events.set_handler(port, lambda p: seen.append((p, page[VCPU_INFO["evtchn_upcall_pending"]])))
    assert bit(trio.a, "evtchn_mask", port) == 0
    sender = trio.b.events.bind_interdomain(A, port)
    assert bit(trio.b, "evtchn_pending", sender) == 1 and bit(trio.a, "evtchn_pending", port) == 0
    trio.b.events.send(sender)
    assert bit(trio.a, "evtchn_pending", port) == 1
    assert page[VCPU_INFO["evtchn_upcall_pending"]] == 1
    assert int.from_bytes(page[VCPU_INFO["evtchn_pending_sel"] :][:8], "little") == 1 << port // 64
    pending = bytes(page[SHARED_INFO["evtchn_pending"] : SHARED_INFO["evtchn_mask"]])
    assert int.from_bytes(pending, "little") == 1 << port, "and no other bit"
    trio.hypervisor.settle()
    assert seen == [(port, 0)], "the upcall flag is cleared before the ports are looked at"
    assert bytes(page[SHARED_INFO["evtchn_pending"] : SHARED_INFO["evtchn_mask"]]) == bytes(512)


def test_close_leaves_no_bit(trio: Trio):
    """Goal: a port number that is used again starts clean.  Method: close it pending and unmasked; look; bind again."""
    seen: list[Port] = []
    port_a, port_b = trio.connect(seen.append, None)
    trio.b.events.send(port_b)
    trio.a.events.close(port_a)
    assert (bit(trio.a, "evtchn_pending", port_a), bit(trio.a, "evtchn_mask", port_a)) == (0, 1)
    trio.hypervisor.settle()
    assert seen == []


# --- life of a pair ------------------------------------------------------------------------------------------------------


def test_binding_raises_an_event_on_the_new_side_only(trio: Trio):
    """Goal: what was sent to an unbound port is not missed.  Method: send into the void, bind, deliver."""
    seen: list[str] = []
    port_a = trio.a.events.alloc_unbound(B, lambda _: seen.append("a"))
    trio.a.events.send(port_a)
    trio.hypervisor.settle()
    assert seen == []
    trio.b.events.bind_interdomain(A, port_a, lambda _: seen.append("b"))
    trio.hypervisor.settle()
    assert seen == ["b"]


@pytest.mark.parametrize("closer", ["a", "b"])
def test_close_leaves_the_peer_waiting_for_the_same_domain(trio: Trio, closer: str):
    """Goal: either end may go and come back.  Method: close one, look at the other, send from it, bind again."""
    seen: list[str] = []
    ports = dict(zip("ab", trio.connect(lambda _: seen.append("a"), lambda _: seen.append("b")), strict=True))
    seen.clear()
    stays = "b" if closer == "a" else "a"
    gone, kept = getattr(trio, closer), getattr(trio, stays)
    assert gone.events.close(ports[closer]) == 0
    status = kept.events.status(ports[stays])
    assert (status.state, status.remote_domid, status.remote_port) == (State.UNBOUND, gone.domid, 0)
    assert kept.events.send(ports[stays]) == 0, "dropped in silence"
    assert trio.c.events.bind_interdomain(kept.domid, ports[stays]) == -XEN_EINVAL
    again = gone.events.bind_interdomain(kept.domid, ports[stays])
    assert again > 0
    gone.events.send(again)
    trio.hypervisor.settle()
    assert seen == [stays], "its handler is still in place"


def test_reset_closes_everything(trio: Trio):
    """Goal: EVTCHNOP_reset, as a kernel that starts anew does.  Method: ports of every kind, one of them to itself."""
    port_a, port_b = trio.connect(None, None)
    own = trio.a.events.alloc_unbound(A)
    assert min(trio.a.events.bind_interdomain(A, own), trio.a.events.bind_ipi(), trio.a.events.bind_virq(VIRQ_CONSOLE)) > 0
    assert trio.a.events.reset() == 0
    assert trio.a.events.channels == {}
    assert trio.b.events.channels[port_b].state is State.UNBOUND
    assert trio.a.events.status(port_a).state is State.CLOSED  # type: ignore[union-attr]
    page = trio.a.memory.run(Pfn(0))
    assert bytes(page[SHARED_INFO["evtchn_pending"] :][:1024]) == bytes(512) + b"\xff" * 512


def test_a_dead_domain_leaves_its_peers_unbound(trio: Trio):
    """Goal: nobody sends to a ghost.  Method: destroy one end; send; a new domain of that number may bind again."""
    port_a, _ = trio.connect(None, None)
    trio.hypervisor.destroy_domain(B)
    assert trio.a.events.send(port_a) == 0
    assert trio.a.events.channels[port_a].state is State.UNBOUND
    reborn = trio.hypervisor.create_domain(4, "reborn", B)
    assert reborn.events.bind_interdomain(A, port_a) > 0
