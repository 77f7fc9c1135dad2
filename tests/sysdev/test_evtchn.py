"""Goal: /dev/xen/evtchn's driver keeps Linux's rules, for its users and against them.
Method: opens in three domains of a real Hypervisor, in tables of calls with their results, and in small scripts.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from sysdev.evtchn import MOST_BYTES, RING_PORTS, EvtchnUser
from tests.sysdev.opens import EACCES, EAGAIN, EFBIG, EINVAL, EIO, ENOTCONN, NOBODY, A, B, C, Machine, ports, u32
from xenmodel.event_channel import NR_PORTS, State
from xenmodel.hypervisor import TURN_BUDGET
from xenmodel.public.xen import DOMID_FIRST_RESERVED, DOMID_SELF, NR_VIRQS, VIRQ_CONSOLE, VIRQ_DOM_EXC
from xenmodel.types import Domid


@pytest.fixture
def machine() -> Machine:
    return Machine()


# --- results -------------------------------------------------------------------------------------------------------------

# Before each case: of domain 1 the open `u` has port 1 (unbound, for 2) and port 2 (VIRQ_DOM_EXC), another open has port 3
# (unbound, for 2), the kernel has ports 4 (handled) and 5 (not handled, for 2); domain 2's open has port 1 for 1.
RESULTS: list[tuple[str, Callable[[EvtchnUser], int], int]] = [
    ("interdomain", lambda u: u.bind_interdomain(B, 1), 6),
    ("interdomain, a port that waits for another", lambda u: u.bind_interdomain(A, 1), EINVAL),
    ("interdomain, a closed port", lambda u: u.bind_interdomain(B, 2), EINVAL),
    ("interdomain, port 0", lambda u: u.bind_interdomain(B, 0), EINVAL),
    ("interdomain, no port", lambda u: u.bind_interdomain(B, 2**32 - 1), EINVAL),
    ("interdomain, no domain", lambda u: u.bind_interdomain(NOBODY, 1), -errno.ESRCH),
    ("interdomain, a domid_t is 16 bits", lambda u: u.bind_interdomain(0x10000 + B, 1), 6),
    ("unbound", lambda u: u.bind_unbound_port(B), 6),
    ("unbound for a domain to come", lambda u: u.bind_unbound_port(NOBODY), 6),
    ("to itself", lambda u: u.bind_interdomain(DOMID_SELF, u.bind_unbound_port(DOMID_SELF)), 7),
    ("virq", lambda u: u.bind_virq(VIRQ_CONSOLE), 6),
    ("virq that this open has", lambda u: u.bind_virq(VIRQ_DOM_EXC), -errno.EEXIST),
    ("no virq", lambda u: u.bind_virq(NR_VIRQS), EINVAL),
    ("no virq by far", lambda u: u.bind_virq(2**32 - 1), EINVAL),
    ("static", lambda u: u.bind_static(5), 0),
    ("static, twice", lambda u: u.bind_static(5) or u.bind_static(5), -errno.EISCONN),
    ("static, bound here", lambda u: u.bind_static(1), -errno.EISCONN),
    ("static, bound by another open", lambda u: u.bind_static(3), -errno.EBUSY),
    ("static, a driver's", lambda u: u.bind_static(4), -errno.EBUSY),
    ("static, a closed port", lambda u: u.bind_static(6), EINVAL),
    ("static, port 0", lambda u: u.bind_static(0), EINVAL),
    ("static, no port", lambda u: u.bind_static(NR_PORTS), EINVAL),
    ("notify an unbound port", lambda u: u.notify(1), 0),
    ("notify a virq", lambda u: u.notify(2), 0),
    ("notify another open's", lambda u: u.notify(3), ENOTCONN),
    ("notify the kernel's", lambda u: u.notify(4), ENOTCONN),
    ("notify a closed port", lambda u: u.notify(6), ENOTCONN),
    ("notify port 0", lambda u: u.notify(0), ENOTCONN),
    ("notify the last that could be", lambda u: u.notify(NR_PORTS - 1), ENOTCONN),
    ("notify no port", lambda u: u.notify(NR_PORTS), EINVAL),
    ("unbind", lambda u: u.unbind(1), 0),
    ("unbind twice", lambda u: u.unbind(1) or u.unbind(1), ENOTCONN),
    ("unbind another open's", lambda u: u.unbind(3), ENOTCONN),
    ("unbind the kernel's", lambda u: u.unbind(5), ENOTCONN),
    ("unbind no port", lambda u: u.unbind(2**32 - 1), EINVAL),
    ("unbound where one was unbound", lambda u: u.unbind(1) or u.bind_unbound_port(B), 1),
    ("reset", lambda u: u.reset(), 0),
    ("restrict", lambda u: u.restrict(B), 0),
    ("restrict to domain 0", lambda u: u.restrict(0), EINVAL),
    ("restrict to the last", lambda u: u.restrict(DOMID_FIRST_RESERVED - 1), 0),
    ("restrict to no domain", lambda u: u.restrict(DOMID_FIRST_RESERVED), EINVAL),
    ("restrict after a failure", lambda u: u.restrict(0) and u.restrict(B), 0),
    ("restrict twice", lambda u: u.restrict(B) or u.restrict(B), EACCES),
    ("restricted: interdomain", lambda u: u.restrict(B) or u.bind_interdomain(B, 1), 6),
    ("restricted: interdomain with another", lambda u: u.restrict(C) or u.bind_interdomain(B, 1), EACCES),
    ("restricted: more than a domid_t", lambda u: u.restrict(B) or u.bind_interdomain(0x10000 + B, 1), EACCES),
    ("restricted: oneself", lambda u: u.restrict(B) or u.bind_interdomain(DOMID_SELF, 1), EACCES),
    ("restricted: unbound", lambda u: u.restrict(B) or u.bind_unbound_port(B), EACCES),
    ("restricted: virq", lambda u: u.restrict(B) or u.bind_virq(VIRQ_CONSOLE), EACCES),
    ("restricted: static", lambda u: u.restrict(B) or u.bind_static(5), EACCES),
    ("restricted: notify what was bound", lambda u: u.restrict(C) or u.notify(1), 0),
    ("restricted: unbind what was bound", lambda u: u.restrict(C) or u.unbind(1), 0),
    ("stopped: interdomain", lambda u: u.device.stop() or u.bind_interdomain(B, 1), EIO),
    ("stopped: unbound", lambda u: u.device.stop() or u.bind_unbound_port(B), EIO),
    ("stopped: virq", lambda u: u.device.stop() or u.bind_virq(VIRQ_CONSOLE), EIO),
    ("stopped: static", lambda u: u.device.stop() or u.bind_static(5), EIO),
    ("stopped: notify", lambda u: u.device.stop() or u.notify(1), EIO),
    ("stopped: unbind", lambda u: u.device.stop() or u.unbind(1), EIO),
    ("stopped: reset", lambda u: u.device.stop() or u.reset(), EIO),
    ("stopped: restrict", lambda u: u.device.stop() or u.restrict(B), EIO),
    ("stopped: write", lambda u: u.device.stop() or u.write(u32(1)), EIO),
]


@pytest.mark.parametrize(("call", "expected"), [case[1:] for case in RESULTS], ids=[case[0] for case in RESULTS])
def test_results(machine, call, expected):
    """Goal: each ioctl's result.  Method: one call with ports of every kind around, in a table."""
    user, events = machine.open(A), machine.domains[A].events
    assert user.bind_unbound_port(B) == 1 and user.bind_virq(VIRQ_DOM_EXC) == 2
    assert machine.open(A).bind_unbound_port(B) == 3
    assert events.alloc_unbound(Domid(B), lambda port: None) == 4 and events.alloc_unbound(Domid(B)) == 5
    assert machine.open(B).bind_unbound_port(A) == 1
    assert call(user) == expected


@pytest.mark.parametrize("bind", ["bind_unbound_port", "bind_interdomain"])
def test_no_port_is_left(machine, bind):
    """Goal: a domain without a free port is ENOSPC, and the peer's port is as it was.  Method: the kernel takes them all."""
    user, peer = machine.open(A), machine.open(B)
    port = peer.bind_unbound_port(A)
    while machine.domains[A].events.alloc_unbound(Domid(B)) > 0:
        pass
    result = user.bind_unbound_port(B) if bind == "bind_unbound_port" else user.bind_interdomain(B, port)
    assert result == -errno.ENOSPC and not user.ports
    assert machine.domains[B].events.channels[port].state is State.UNBOUND


# --- events --------------------------------------------------------------------------------------------------------------


def test_an_event_and_its_answer(machine):
    """Goal: an event wakes, is read once, masks its port until that is written, and is then delivered again if another came
    meanwhile.  Method: a pair of opens in two domains; each step with what is read."""
    a, b = machine.open(A, "a"), machine.open(B, "b")
    port, peer = machine.pair(a, b)
    events = machine.domains[B].events
    assert not b.readable and b.read(4) == EAGAIN
    machine.notify(a, port)
    assert machine.wakes == ["b"] and b.readable and events.is_masked(peer) and not events.is_pending(peer)
    assert ports(b) == [peer] and not b.readable
    machine.notify(a, port)
    machine.notify(a, port)
    assert machine.wakes == ["b"] and events.is_pending(peer) and ports(b) == []
    assert b.write(u32(peer)) == 4
    machine.hypervisor.settle()
    assert machine.wakes == ["b", "b"] and ports(b) == [peer]
    assert b.write(u32(peer)) == 4
    machine.hypervisor.settle()
    assert ports(b) == [] and not events.is_masked(peer)
    machine.notify(b, peer)
    assert ports(a) == [port]


def test_bind_interdomain_is_an_event(machine):
    """Goal: the binder learns at once of what may have been sent before; the other side of nothing.
    Method: an event to an unbound port, which is lost, then the bind; both ends after a delivery."""
    a, b = machine.open(A), machine.open(B)
    port = a.bind_unbound_port(B)
    machine.notify(a, port)
    peer = b.bind_interdomain(A, port)
    assert b.readable, "as if the interrupt had come within the ioctl"
    machine.hypervisor.settle()
    assert ports(b) == [peer] and ports(a) == []


def test_who_looks_first_wakes_who_waits(machine):
    """Goal: an event that somebody's look finds before it was delivered also wakes a reader that waits already.
    Method: notify without a delivery, look, deliver: woken once, and it can be read once."""
    a, b = machine.open(A), machine.open(B)
    port, peer = machine.pair(a, b)
    assert a.notify(port) == 0 and machine.wakes == []
    assert b.readable and len(machine.wakes) == 1
    machine.hypervisor.settle()
    assert len(machine.wakes) == 1 and ports(b) == [peer] and ports(b) == []


def test_virq(machine):
    """Goal: a virq is an event like others.  Method: raise it, thrice, around read and write."""
    user = machine.open(A)
    port = user.bind_virq(VIRQ_DOM_EXC)
    for _ in range(2):
        machine.domains[A].events.raise_virq(VIRQ_DOM_EXC)
        machine.domains[A].events.raise_virq(VIRQ_DOM_EXC)
        machine.hypervisor.settle()
        assert ports(user) == [port]
        user.write(u32(port))


def test_one_wake_for_many(machine):
    """Goal: who is awake is not woken; the ring keeps the order; a read takes what fits, whole ports only.
    Method: five ports, notified in another order than that of their numbers; reads of odd sizes."""
    a, b = machine.open(A, "a"), machine.open(B, "b")
    pairs = dict(machine.pair(a, b) for _ in range(5))
    order = [4, 1, 5, 2, 3]
    for port in order:
        machine.notify(a, port)
    assert machine.wakes == ["b"]
    assert b.read(0) == b.read(3) == b"" and len(b.read(7)) == 4 and ports(b, 11) == [pairs[1], pairs[5]]
    assert ports(b) == [pairs[2], pairs[3]]
    machine.notify(a, 1)
    assert machine.wakes == ["b"], "its port is masked"


def test_written_ports(machine):
    """Goal: a write unmasks only what this open has bound and an event has masked; it counts whole ports, a page at most.
    Method: ports of this open, another's, the kernel's, none; lengths around the limits."""
    a, b, other = machine.open(A), machine.open(B), machine.open(B)
    events = machine.domains[B].events
    ours, theirs = machine.pair(a, b), machine.pair(a, other)
    kernel = events.alloc_unbound(Domid(A))
    machine.notify(a, ours[0])
    machine.notify(a, theirs[0])
    everything = u32(0, kernel, theirs[1], NR_PORTS, 2**32 - 1, 77)
    assert b.write(everything) == len(everything)
    assert events.is_masked(kernel) and events.is_masked(theirs[1]) and events.is_masked(ours[1]) and events.is_masked(77)
    assert b.write(u32(ours[1])[:3]) == 0 and b.write(b"") == 0
    assert b.write(bytes(MOST_BYTES) + u32(ours[1])) == MOST_BYTES and events.is_masked(ours[1])
    assert b.write(u32(ours[1]) + b"\xff\xff\xff") == 4 and not events.is_masked(ours[1])
    events.mask(ours[1])
    assert b.write(u32(ours[1])) == 4 and events.is_masked(ours[1]), "not masked by an event"


def test_overflow(machine):
    """Goal: with more ports than the ring has room an event may be lost: then all reads are EFBIG, until a reset empties the
    ring; ports stay bound, and written they work again.  Method: two ports more than fit, all notified by a peer."""
    a, b = machine.open(A, "a"), machine.open(B, "b")
    pairs = [machine.pair(a, b) for _ in range(RING_PORTS + 2)]
    for port, _ in pairs[:-2]:
        assert a.notify(port) == 0
    machine.hypervisor.settle()
    assert not b.overflow and machine.wakes == ["b"]
    for port, _ in pairs[-2:]:
        machine.notify(a, port)
        assert b.overflow and b.readable and machine.wakes == ["b", "b"]
    assert [b.read(size) for size in (4, MOST_BYTES, 4)] == [EFBIG] * 3 and b.read(3) == b""
    assert b.write(u32(*(peer for _, peer in pairs[: RING_PORTS // 2]))) == MOST_BYTES // 2
    assert b.read(4) == EFBIG and b.notify(pairs[0][1]) == 0
    assert b.reset() == 0 and not b.overflow and not b.readable and b.read(4) == EAGAIN
    assert len(b.ports) == RING_PORTS + 2
    machine.notify(a, pairs[-1][0])
    assert ports(b) == [], "masked, for nobody wrote it"
    b.write(u32(pairs[-1][1]))
    machine.hypervisor.settle()
    assert ports(b) == [pairs[-1][1]]


def test_a_full_ring(machine):
    """Goal: exactly RING_PORTS events fit and one read takes them all.  Method: as many ports."""
    a, b = machine.open(A), machine.open(B)
    pairs = [machine.pair(a, b) for _ in range(RING_PORTS)]
    for port, _ in pairs:
        a.notify(port)
    machine.hypervisor.settle()
    assert sorted(ports(b, 1 << 20)) == sorted(peer for _, peer in pairs) and not b.overflow


def test_unbound_while_in_the_ring(machine):
    """Goal: what was read late may be unbound: it is still read, its number can be bound again and works.
    Method: an event, unbind, bind; the stale event is read and written, then a new one comes."""
    a, b = machine.open(A), machine.open(B)
    port, peer = machine.pair(a, b)
    machine.notify(a, port)
    assert b.unbind(peer) == 0
    assert machine.domains[A].events.channels[port].state is State.UNBOUND
    assert b.bind_interdomain(A, port) == peer
    assert ports(b) == [peer] and b.write(u32(peer)) == 4
    machine.hypervisor.settle()
    assert ports(b) == [peer], "the bind's own"
    b.write(u32(peer))
    machine.notify(a, port)
    assert ports(b) == [peer]


@pytest.mark.parametrize("how", ["peer", "itself"])
def test_a_flood_costs_one_handler(machine, how):
    """Goal: a port whose open does not write costs its domain one handler whatever is sent; others get their turn.
    Method: a thousand events from the peer, or from the same open to itself; how often the handler ran."""
    b = machine.open(B)
    a = b if how == "itself" else machine.open(A)
    port, peer = machine.pair(a, b)
    channel = machine.domains[B].events.channels[peer]
    before = channel.notified
    for _ in range(1000):
        machine.notify(a, port)
        assert machine.hypervisor.idle
    assert channel.notified == before + 1 and ports(b) == [peer]
    assert b.write(u32(*[peer] * RING_PORTS)) == MOST_BYTES
    machine.hypervisor.settle()
    assert channel.notified == before + 2, "pending again, once"


def test_turns_are_bounded(machine):
    """Goal: an open with very many events does not keep the domain's turn.  Method: more than a turn's budget at once."""
    a, b = machine.open(A), machine.open(B)
    pairs = [machine.pair(a, b) for _ in range(3 * TURN_BUDGET)]
    for port, _ in pairs:
        a.notify(port)
    machine.hypervisor.deliver(turns=1)
    assert len(ports(b)) == TURN_BUDGET
    machine.hypervisor.settle()
    assert len(ports(b)) == 2 * TURN_BUDGET
