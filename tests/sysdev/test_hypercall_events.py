"""Goal: event_channel_op answers what Xen 4.17 answers a domain with one vCPU and the 2-level ABI.
Method: tables of calls with the bytes of their arguments before and after, in a memory with holes and a read-only part.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct

import pytest

from sysdev import hypercall
from tests.sysdev.hypercaller import AT, NOBODY, NOWHERE, READONLY, SIZE, U64, Caller, World, make_world
from xenmodel.event_channel import NR_PORTS
from xenmodel.public import event_channel as ec
from xenmodel.public.errno import (
    XEN_EBUSY,
    XEN_EEXIST,
    XEN_EFAULT,
    XEN_EINVAL,
    XEN_ENOENT,
    XEN_ENOSPC,
    XEN_ENOSYS,
    XEN_EOPNOTSUPP,
    XEN_EPERM,
    XEN_ESRCH,
)
from xenmodel.public.xen import DOMID_SELF, VIRQ_CONSOLE, VIRQ_DEBUG, VIRQ_DOM_EXC, Hypercall
from xenmodel.types import Domid


@pytest.fixture
def world() -> Iterator[World]:
    made = make_world()
    yield made
    made.hypervisor.close()


def test_a_channel_from_end_to_end(world: World):
    """Goal: two programs can make a channel, send, and take it down with hypercalls alone, and its state is told right.
    Method: each step, with EVTCHNOP_status of both ends in between; the u of a state that has none stays as it was."""
    a, b = world.a, world.b
    assert a.event(ec.EVTCHNOP_alloc_unbound, ec.ALLOC_UNBOUND, DOMID_SELF, 2, 77) == 0
    assert a.out(ec.ALLOC_UNBOUND) == (DOMID_SELF, 2, 1)
    assert a.status(DOMID_SELF, 1) == (0, ec.EVTCHNSTAT_unbound, 0, b"\2\x00345678")
    assert b.event(ec.EVTCHNOP_bind_interdomain, ec.BIND_INTERDOMAIN, 1, 1, 77) == 0
    assert b.out(ec.BIND_INTERDOMAIN) == (1, 1, 1)
    assert b.domain.events.is_pending(1), "an event may have been lost"
    for caller, other in ((a, 2), (b, 1)):
        u = ec.STATUS_INTERDOMAIN.pack(other, 1)
        assert caller.status(DOMID_SELF, 1) == (0, ec.EVTCHNSTAT_interdomain, 0, u)
        assert caller.domain.events.channels[1].owner == "prog[7]"
    assert a.event(ec.EVTCHNOP_bind_vcpu, ec.BIND_VCPU, 1, 0) == 0
    assert not a.domain.events.is_pending(1)
    assert b.event(ec.EVTCHNOP_send, ec.PORT, 1) == 0
    assert a.domain.events.is_pending(1) and a.domain.events.is_masked(1)
    assert a.event(ec.EVTCHNOP_unmask, ec.PORT, 1) == 0
    assert not a.domain.events.is_masked(1) and not world.hypervisor.idle, "the upcall is due"
    assert a.event(ec.EVTCHNOP_close, ec.PORT, 1) == 0
    assert a.status(DOMID_SELF, 1) == (0, ec.EVTCHNSTAT_closed, 0, b"12345678")
    assert b.status(DOMID_SELF, 1) == (0, ec.EVTCHNSTAT_unbound, 0, b"\1\x00345678")
    assert b.event(ec.EVTCHNOP_reset, ec.RESET, DOMID_SELF) == 0
    assert not b.domain.events.channels
    world.hypervisor.settle()


def test_virqs_and_ipis(world: World):
    """Goal: the other two ways to get a port.  Method: bind, look at the status, bind again."""
    a = world.a
    assert a.event(ec.EVTCHNOP_bind_virq, ec.BIND_VIRQ, VIRQ_DOM_EXC, 0, 77) == 0
    assert a.out(ec.BIND_VIRQ) == (VIRQ_DOM_EXC, 0, 1)
    assert a.event(ec.EVTCHNOP_bind_ipi, ec.BIND_IPI, 0, 77) == 0
    assert a.out(ec.BIND_IPI) == (0, 2)
    assert a.event(ec.EVTCHNOP_bind_virq, ec.BIND_VIRQ, VIRQ_DEBUG, 0, 77) == 0
    assert a.status(1, 1) == (0, ec.EVTCHNSTAT_virq, 0, b"\3\0\0\x005678")
    assert a.status(1, 2) == (0, ec.EVTCHNSTAT_ipi, 0, b"12345678")
    assert [a.event(ec.EVTCHNOP_bind_vcpu, ec.BIND_VCPU, port, 0) for port in (1, 2, 3)] == [0, -XEN_EINVAL, -XEN_EINVAL]
    assert a.event(ec.EVTCHNOP_send, ec.PORT, 2) == 0 and a.domain.events.is_pending(2)
    assert a.event(ec.EVTCHNOP_bind_virq, ec.BIND_VIRQ, VIRQ_DOM_EXC, 0, 77) == -XEN_EEXIST
    assert a.out(ec.BIND_VIRQ) == (VIRQ_DOM_EXC, 0, 77), "nothing is copied out with an error"


def test_ports_of_drivers(world: World):
    """Goal: a program cannot close what a driver of its domain's kernel uses, but all else; the driver still gets events.
    Method: ports with and without a handler, of the kernel and of programs, one of them closed and bound again; close each,
    then reset, then the same without a driver's."""
    a, b, got = world.a, world.b, list[int]()
    events = a.domain.events
    driver, spare = events.alloc_unbound(Domid(2), got.append), events.alloc_unbound(Domid(2))
    handled = events.alloc_unbound(Domid(2), lambda _port: None)
    events.channels[handled].owner = "other[8]"
    assert b.event(ec.EVTCHNOP_bind_interdomain, ec.BIND_INTERDOMAIN, 1, driver, 0) == 0
    for port, expected in ((driver, -XEN_EBUSY), (spare, 0), (spare, -XEN_EINVAL), (handled, 0), (driver, -XEN_EBUSY)):
        assert a.event(ec.EVTCHNOP_close, ec.PORT, port) == expected
    assert [a.event(ec.EVTCHNOP_bind_ipi, ec.BIND_IPI, 0, 0) for _ in range(3)] == [0] * 3
    events.alloc_unbound(Domid(2))
    assert len(events.channels) == 5
    assert a.event(ec.EVTCHNOP_reset, ec.RESET, DOMID_SELF) == 0 and list(events.channels) == [driver]
    assert a.event(ec.EVTCHNOP_unmask, ec.PORT, driver) == a.event(ec.EVTCHNOP_send, ec.PORT, driver) == 0
    assert b.event(ec.EVTCHNOP_send, ec.PORT, 1) == 0
    world.hypervisor.settle()
    assert got == [driver]
    assert events.close(driver) == 0 == a.event(ec.EVTCHNOP_reset, ec.RESET, DOMID_SELF) and not events.channels


def zero(layout: Struct) -> tuple[int | bytes, ...]:
    return layout.unpack(bytes(layout.size))


# Domain 1 has port 1 unbound for domain 2. Who, command, layout, fields, result.
EVENT_ERRORS = [
    ("a", ec.EVTCHNOP_alloc_unbound, ec.ALLOC_UNBOUND, (NOBODY, 1, 0), -XEN_ESRCH),
    ("a", ec.EVTCHNOP_alloc_unbound, ec.ALLOC_UNBOUND, (2, 1, 0), -XEN_EPERM),
    ("a", ec.EVTCHNOP_alloc_unbound, ec.ALLOC_UNBOUND, (0, 1, 0), -XEN_EPERM),
    ("a", ec.EVTCHNOP_alloc_unbound, ec.ALLOC_UNBOUND, (1, NOBODY, 0), 0),
    ("a", ec.EVTCHNOP_bind_interdomain, ec.BIND_INTERDOMAIN, (NOBODY, 1, 0), -XEN_ESRCH),
    ("a", ec.EVTCHNOP_bind_interdomain, ec.BIND_INTERDOMAIN, (1, 1, 0), -XEN_EINVAL),
    ("dom0", ec.EVTCHNOP_bind_interdomain, ec.BIND_INTERDOMAIN, (1, 1, 0), -XEN_EINVAL),
    ("b", ec.EVTCHNOP_bind_interdomain, ec.BIND_INTERDOMAIN, (1, 0, 0), -XEN_EINVAL),
    ("b", ec.EVTCHNOP_bind_interdomain, ec.BIND_INTERDOMAIN, (1, 2**32 - 1, 0), -XEN_EINVAL),
    ("a", ec.EVTCHNOP_bind_virq, ec.BIND_VIRQ, (24, 0, 0), -XEN_EINVAL),
    ("a", ec.EVTCHNOP_bind_virq, ec.BIND_VIRQ, (2**32 - 1, 0, 0), -XEN_EINVAL),
    ("a", ec.EVTCHNOP_bind_virq, ec.BIND_VIRQ, (VIRQ_CONSOLE, 1, 0), -XEN_EINVAL),
    ("a", ec.EVTCHNOP_bind_virq, ec.BIND_VIRQ, (VIRQ_DEBUG, 1, 0), -XEN_ENOENT),
    ("a", ec.EVTCHNOP_bind_virq, ec.BIND_VIRQ, (24, 1, 0), -XEN_EINVAL),
    ("a", ec.EVTCHNOP_bind_ipi, ec.BIND_IPI, (1, 0), -XEN_ENOENT),
    ("dom0", ec.EVTCHNOP_bind_pirq, ec.BIND_PIRQ, (1, 0, 0), -XEN_EINVAL),
    ("a", ec.EVTCHNOP_close, ec.PORT, (0,), -XEN_EINVAL),
    ("a", ec.EVTCHNOP_close, ec.PORT, (2,), -XEN_EINVAL),
    ("a", ec.EVTCHNOP_close, ec.PORT, (2**32 - 1,), -XEN_EINVAL),
    ("a", ec.EVTCHNOP_send, ec.PORT, (0,), -XEN_EINVAL),
    ("a", ec.EVTCHNOP_send, ec.PORT, (NR_PORTS,), -XEN_EINVAL),
    ("a", ec.EVTCHNOP_send, ec.PORT, (1,), 0),
    ("a", ec.EVTCHNOP_unmask, ec.PORT, (0,), 0),
    ("a", ec.EVTCHNOP_unmask, ec.PORT, (NR_PORTS - 1,), 0),
    ("a", ec.EVTCHNOP_unmask, ec.PORT, (NR_PORTS,), -XEN_EINVAL),
    ("a", ec.EVTCHNOP_bind_vcpu, ec.BIND_VCPU, (1, 1), -XEN_ENOENT),
    ("a", ec.EVTCHNOP_bind_vcpu, ec.BIND_VCPU, (2, 0), -XEN_EINVAL),
    ("a", ec.EVTCHNOP_bind_vcpu, ec.BIND_VCPU, (NR_PORTS, 0), -XEN_EINVAL),
    ("a", ec.EVTCHNOP_status, ec.STATUS, (NOBODY, 1, 0, 0, b""), -XEN_ESRCH),
    ("a", ec.EVTCHNOP_status, ec.STATUS, (2, NR_PORTS, 0, 0, b""), -XEN_EINVAL),
    ("a", ec.EVTCHNOP_status, ec.STATUS, (2, 1, 0, 0, b""), -XEN_EPERM),
    ("a", ec.EVTCHNOP_status, ec.STATUS, (1, 0, 0, 0, b""), 0),
    ("dom0", ec.EVTCHNOP_status, ec.STATUS, (1, 1, 0, 0, b""), 0),
    ("a", ec.EVTCHNOP_reset, ec.RESET, (NOBODY,), -XEN_ESRCH),
    ("a", ec.EVTCHNOP_reset, ec.RESET, (2,), -XEN_EPERM),
    ("dom0", ec.EVTCHNOP_reset, ec.RESET, (1,), -XEN_EINVAL),
    ("a", ec.EVTCHNOP_init_control, ec.INIT_CONTROL, zero(ec.INIT_CONTROL), -XEN_ENOSYS),
    ("a", ec.EVTCHNOP_expand_array, ec.EXPAND_ARRAY, (0,), -XEN_EOPNOTSUPP),
    ("a", ec.EVTCHNOP_set_priority, ec.SET_PRIORITY, (1, 0), -XEN_ENOSYS),
    ("a", ec.EVTCHNOP_set_priority, ec.SET_PRIORITY, (NR_PORTS, 0), -XEN_EINVAL),
    ("a", 14, ec.PORT, (1,), -XEN_ENOSYS),
    ("a", 2**32 - 1, ec.PORT, (1,), -XEN_ENOSYS),
]


@pytest.mark.parametrize(("who", "cmd", "layout", "fields", "expected"), EVENT_ERRORS)
def test_event_results(world: World, who: str, cmd: int, layout: Struct, fields: tuple[int | bytes, ...], expected: int):
    """Goal: whom each operation refuses, and with what.  Method: one call; with an error, all ports are as they were."""
    assert world.a.domain.events.alloc_unbound(Domid(2)) == 1
    caller: Caller = getattr(world, who)

    def ports() -> list[tuple[int, int]]:
        return [(port, int(c.state)) for each in world[1:] for port, c in each.domain.events.channels.items()]

    before = ports()
    assert caller.event(cmd, layout, *fields) == expected
    assert expected == 0 or ports() == before


LAYOUTS = {cmd: layout for cmd, (layout, _) in hypercall._EVENT_OPS.items()}


def test_all_operations_are_there():
    """Goal: the table of the next test is complete.  Method: the numbers of event_channel.h."""
    named = {value for name, value in vars(ec).items() if name.startswith("EVTCHNOP_")}
    assert set(LAYOUTS) == named and len(named) == 14


@pytest.mark.parametrize("cmd", sorted(LAYOUTS))
def test_bad_pointers(world: World, cmd: int):
    """Goal: an argument that cannot be read is EFAULT and nothing happens.
    Method: no address, a hole, one byte short of the end, the end of the address space."""
    size = LAYOUTS[cmd].size
    for caller in (world.a, world.dom0):
        for address in (0, NOWHERE, AT + SIZE - size + 1, AT - 1, U64, U64 - size + 1):
            assert caller.call(Hypercall.event_channel_op, cmd, address) == -XEN_EFAULT
        assert not caller.domain.events.channels


def test_copy_out_fails(world: World):
    """Goal: as in Xen, what was done stays done when only the answer cannot be written.  Method: a read-only argument."""
    a = world.a
    assert a.event(ec.EVTCHNOP_alloc_unbound, ec.ALLOC_UNBOUND, DOMID_SELF, 0, 0, at=READONLY) == -XEN_EFAULT
    assert a.event(ec.EVTCHNOP_bind_virq, ec.BIND_VIRQ, VIRQ_CONSOLE, 0, 0, at=READONLY) == -XEN_EFAULT
    assert a.event(ec.EVTCHNOP_bind_ipi, ec.BIND_IPI, 0, 0, at=READONLY) == -XEN_EFAULT
    assert a.event(ec.EVTCHNOP_status, ec.STATUS, 1, 1, 0, 0, b"", at=READONLY) == -XEN_EFAULT
    assert [int(channel.state) for channel in a.domain.events.channels.values()] == [1, 4, 5]
    assert a.event(ec.EVTCHNOP_close, ec.PORT, 1, at=READONLY) == 0, "this one has nothing to write"


def test_domain_0_acts_for_others(world: World):
    """Goal: a toolstack makes a guest's channel, as libxl does for console and store.
    Method: alloc_unbound in domain 1 for whom it says; DOMID_SELF there means the caller."""
    for remote, expected in ((2, 2), (DOMID_SELF, 0), (0, 0)):
        assert world.dom0.event(ec.EVTCHNOP_alloc_unbound, ec.ALLOC_UNBOUND, 1, remote, 0) == 0
        port = world.dom0.out(ec.ALLOC_UNBOUND)[2]
        assert world.a.domain.events.channels[port].remote_domid == expected
        assert world.dom0.status(1, port)[:2] == (0, ec.EVTCHNSTAT_unbound)
    assert not world.dom0.domain.events.channels


def test_no_port_left(world: World):
    """Goal: ENOSPC at each way to get a port.  Method: take all."""
    a = world.a
    while a.domain.events.alloc_unbound(Domid(2)) > 0:
        pass
    assert a.event(ec.EVTCHNOP_alloc_unbound, ec.ALLOC_UNBOUND, DOMID_SELF, 2, 0) == -XEN_ENOSPC
    assert a.event(ec.EVTCHNOP_bind_virq, ec.BIND_VIRQ, VIRQ_CONSOLE, 0, 0) == -XEN_ENOSPC
    assert a.event(ec.EVTCHNOP_bind_ipi, ec.BIND_IPI, 0, 0) == -XEN_ENOSPC
    assert a.event(ec.EVTCHNOP_bind_interdomain, ec.BIND_INTERDOMAIN, 2, 1, 0) == -XEN_ENOSPC
    assert a.event(ec.EVTCHNOP_reset, ec.RESET, 1) == 0
    assert a.event(ec.EVTCHNOP_bind_ipi, ec.BIND_IPI, 0, 0) == 0
