"""Goal: the ports of /dev/xen/evtchn belong to who bound them, and go when they should: at close, at the last put(), with
the domain; what the kernel or another open has is out of reach.  Method: opens in three domains of a real Hypervisor.
"""

from __future__ import annotations

import errno

import pytest

from sysdev.evtchn import HOLDS_MOST, EvtchnDevice, EvtchnUser
from tests.sysdev.opens import EINVAL, EIO, ENOTCONN, A, B, C, Machine, ports, u32
from xenmodel.event_channel import NR_PORTS, State
from xenmodel.public.xen import VIRQ_CONSOLE
from xenmodel.types import Domid


@pytest.fixture
def machine() -> Machine:
    return Machine()


# --- who has what -----------------------------------------------------------------------------------------------------


def test_owners(machine):
    """Goal: tables can say who bound a port; the kernel's have no owner.  Method: two opens, a static port too."""
    one, two, events = machine.open(A, "one[1]"), machine.open(A, "two[2]"), machine.domains[A].events
    static = events.alloc_unbound(Domid(B))
    mine = [one.bind_virq(VIRQ_CONSOLE), two.bind_unbound_port(B)]
    assert two.bind_static(static) == 0
    assert [events.channels[port].owner for port in (*mine, static)] == ["one[1]", "two[2]", "two[2]"]
    assert list(one.ports) == mine[:1] and sorted(two.ports) == [static, mine[1]]
    two.close()
    assert events.channels[static].owner == "" and mine[1] not in events.channels
    assert list(one.ports) == mine[:1] and list(one.device.users) == [one]


def test_close(machine):
    """Goal: close unbinds everything of this open and nothing else; a peer's end waits again; nothing is left in the driver.
    Method: ports of each kind in two opens; what the domain has afterwards; a pending event."""
    user, other, peer = machine.open(A), machine.open(A), machine.open(B)
    port, remote = machine.pair(peer, user)
    user.bind_virq(VIRQ_CONSOLE), user.bind_unbound_port(C)
    kept = other.bind_unbound_port(C)
    machine.notify(peer, port)
    peer.notify(port)
    user.close()
    machine.hypervisor.settle()
    events = machine.domains[A].events
    assert list(events.channels) == [kept] and not user.ports and list(user.device.bound) == [kept]
    assert machine.domains[B].events.channels[port].state is State.UNBOUND
    assert not events.is_pending(remote) and events.is_masked(remote)
    user.close()
    assert list(events.channels) == [kept]


def test_static_port(machine):
    """Goal: a port that the toolstack made can be bound, used, left and bound again, and stays.
    Method: a port without a handler, an event that came before; two opens after one another; unbind and close."""
    peer, events = machine.open(B), machine.domains[A].events
    static = events.alloc_unbound(Domid(B))
    remote = peer.bind_interdomain(A, static)
    machine.notify(peer, remote)
    for leave in (lambda user: user.unbind(static), EvtchnUser.close):
        user = machine.open(A)
        assert user.bind_static(static) == 0
        machine.hypervisor.settle()
        assert ports(user) == [static], "what came while nobody listened"
        user.write(u32(static))
        machine.notify(user, static)
        peer.write(u32(remote))
        leave(user)
        assert events.channels[static].state is State.INTERDOMAIN and events.is_masked(static)
        assert events.channels[static].handler is None
        machine.notify(peer, remote)
        assert not user.readable


# --- get and put ------------------------------------------------------------------------------------------------------


def test_a_held_port_outlives_its_open(machine):
    """Goal: a port that is held for an unmap notification can be sent to after its descriptor was closed, tells its open
    nothing any more, and is closed with the last put().  Method: two holds; close; send; events from the peer; puts."""
    device, user, peer = machine.devices[A], machine.open(A, "a"), machine.open(B)
    port, remote = machine.pair(user, peer)
    assert device.get(port) == 0 and device.get(port) == 0
    user.close()
    machine.wakes.clear()
    channel = machine.domains[A].events.channels[port]
    assert channel.state is State.INTERDOMAIN and channel.owner == "a"
    device.send(port)
    machine.hypervisor.settle()
    assert ports(peer) == [remote]
    machine.notify(peer, remote)
    assert "a" not in machine.wakes and machine.domains[A].events.is_pending(port)
    again = machine.open(A)
    assert again.notify(port) == ENOTCONN and again.bind_static(port) == -errno.EBUSY
    device.put(port)
    assert port in machine.domains[A].events.channels and device.get(port) == 0
    device.put(port)
    device.put(port)
    assert port not in machine.domains[A].events.channels and not device.bound
    assert machine.domains[B].events.channels[remote].state is State.UNBOUND
    device.put(port)
    device.send(port)
    assert device.get(port) == -errno.ENOENT


def test_put_before_close(machine):
    """Goal: holds that end first change nothing for the open.  Method: get, put and one put too many; then use it."""
    device, user, peer = machine.devices[A], machine.open(A), machine.open(B)
    port, remote = machine.pair(user, peer)
    assert device.get(port) == 0
    device.put(port)
    device.put(port)
    machine.notify(peer, remote)
    assert ports(user) == [port] and device.get(port) == 0
    assert user.unbind(port) == 0 and user.notify(port) == ENOTCONN and port in machine.domains[A].events.channels
    device.put(port)
    assert port not in machine.domains[A].events.channels


def test_what_cannot_be_held(machine):
    """Goal: only a program's port can be held, and not without end.  Method: the kernel's, closed, impossible; a static one
    once it is bound; as many holds as there may be."""
    device, user, events = machine.devices[A], machine.open(A), machine.domains[A].events
    kernel = events.alloc_unbound(Domid(B))
    before = events.channels[kernel].sent
    assert [device.get(port) for port in (kernel, NR_PORTS, -1)] == [EINVAL] * 3
    assert [device.get(port) for port in (0, 2, NR_PORTS - 1)] == [-errno.ENOENT] * 3
    device.put(kernel)
    device.send(kernel)
    assert events.channels[kernel].sent == before
    assert user.bind_static(kernel) == 0
    assert [device.get(kernel) for _ in range(HOLDS_MOST)] == [0] * HOLDS_MOST and device.get(kernel) == EINVAL
    user.close()
    for _ in range(HOLDS_MOST):
        assert kernel in device.bound
        device.put(kernel)
    assert not device.bound and events.channels[kernel].owner == ""


# --- the end of a domain ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["stop", "destroy"])
def test_the_domain_ends(machine, first):
    """Goal: whatever an open does when its domain is gone is EIO, who waits is woken, others are unharmed, nothing is
    touched that is not there any more.  Method: opens with ports, events and holds; stop() before and after the end."""
    device, user, idle, peer = machine.devices[A], machine.open(A, "a"), machine.open(A, "idle"), machine.open(B, "b")
    port, remote = machine.pair(user, peer)
    held = user.bind_unbound_port(B)
    device.get(held), device.get(port)
    user.unbind(held)
    machine.notify(peer, remote)
    machine.wakes.clear()
    if first == "stop":
        device.stop()
        assert not machine.domains[A].events.channels
        machine.hypervisor.destroy_domain(A)
    else:
        machine.hypervisor.destroy_domain(A)
        device.stop()
    assert machine.wakes == ["a", "idle"]
    for one in (user, idle, device.open("late", lambda: None)):
        assert one.readable and one.read(4) == EIO and one.write(u32(port)) == EIO and one.notify(port) == EIO
    device.put(port)
    device.send(port)
    device.put(held)
    user.close(), idle.close()
    assert peer.notify(remote) == 0 and machine.domains[B].events.channels[remote].state is State.UNBOUND
    assert not device.bound


def test_ports_closed_underneath(machine):
    """Goal: after an EVTCHNOP_reset what an open had is not there, and what got its numbers is not its.
    Method: reset; the numbers again, by the kernel and by another open; then everything the old owners could try."""
    device, user, events = machine.devices[A], machine.open(A), machine.domains[A].events
    first, second, third = (user.bind_unbound_port(B) for _ in range(3))
    device.get(first)
    events.reset()
    other = machine.open(A)
    assert (events.alloc_unbound(Domid(B)), other.bind_unbound_port(B)) == (first, second)
    for port in (first, second, third):
        assert user.notify(port) == user.unbind(port) == ENOTCONN
    assert user.write(u32(first, second, third)) == 12 and events.is_masked(first)
    device.send(first)
    assert events.channels[first].sent == 0 and device.get(first) == EINVAL
    device.put(first)
    user.close()
    assert sorted(events.channels) == [first, second] and list(device.bound) == [second]
    assert other.notify(second) == 0


def test_peer_goes(machine):
    """Goal: a peer's death leaves the port unbound, for a successor, and is no event.  Method: destroy it; bind anew."""
    user, peer = machine.open(A), machine.open(B)
    port, _ = machine.pair(user, peer)
    machine.hypervisor.destroy_domain(B)
    machine.hypervisor.settle()
    assert ports(user) == [] and user.notify(port) == 0
    machine.domains[B] = machine.hypervisor.create_domain(4, "again", B)
    machine.devices[B] = EvtchnDevice(machine.domains[B].events)
    successor = machine.open(B)
    remote = successor.bind_interdomain(A, port)
    machine.hypervisor.settle()
    machine.notify(user, port)
    assert ports(successor) == [remote]
