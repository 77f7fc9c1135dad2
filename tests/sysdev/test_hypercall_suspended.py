"""Goal: a hypercall may wait for its caller's memory at any time, for as long as that takes, and what happens meanwhile to
ports and domains is neither overlooked nor undone.
Method: jobs step by step, with other calls, the end of the domain, or its successor in between.
"""

from __future__ import annotations

import errno
from struct import Struct

import pytest

from sysdev import hypercall
from sysdev.steps import Job, Read, Step, Write
from tests.sysdev.hypercaller import AT, Caller, World, make_world, run
from xenmodel.public import event_channel as ec
from xenmodel.public import grant_table as gt
from xenmodel.public import version as ver
from xenmodel.public.errno import XEN_EEXIST, XEN_EFAULT, XEN_EINVAL, XEN_ESRCH
from xenmodel.public.xen import DOMID_SELF, MULTICALL_ENTRY, VIRQ_CONSOLE, Hypercall
from xenmodel.types import Domid

BOUND = Domid(2)


@pytest.fixture
def world() -> World:
    """Domain 1 has port 1, for domain 2."""
    world = make_world()
    assert world.a.domain.events.alloc_unbound(BOUND) == 1
    return world


def ports(caller: Caller) -> list[tuple[int, int, str]]:
    return [(port, int(one.state), one.owner) for port, one in caller.domain.events.channels.items()]


def end(job: Job[int], value: object = None) -> int:
    """Its result; it may not ask for anything more."""
    with pytest.raises(StopIteration) as stop:
        job.send(value)
    return int(stop.value.value)


def begun(caller: Caller, cmd: int, layout: Struct, *fields: int | bytes) -> tuple[Job[int], bytes]:
    """An event channel operation that waits for its structure, and what will be found there."""
    job = caller.begin(Hypercall.event_channel_op, cmd, AT)
    assert next(job) == Read(AT, layout.size)
    return job, layout.pack(*fields)


MAKING = [  # what makes a port, and with what
    (ec.EVTCHNOP_alloc_unbound, ec.ALLOC_UNBOUND, (DOMID_SELF, 2, 0)),
    (ec.EVTCHNOP_bind_virq, ec.BIND_VIRQ, (VIRQ_CONSOLE, 0, 0)),
    (ec.EVTCHNOP_bind_ipi, ec.BIND_IPI, (0, 0)),
    (ec.EVTCHNOP_bind_interdomain, ec.BIND_INTERDOMAIN, (2, 1, 0)),
]


@pytest.mark.parametrize(("cmd", "layout", "fields"), MAKING)
def test_one_moment(world: World, cmd: int, layout: Struct, fields: tuple[int, ...]):
    """Goal: nothing has changed until the structure is there, all of it has before its answer is written, its owner's name
    too, and it stays when that cannot be.  Method: look between the two steps; the second fails."""
    assert world.b.domain.events.alloc_unbound(Domid(1)) == 1
    before = ports(world.a)
    job, data = begun(world.a, cmd, layout, *fields)
    assert ports(world.a) == before
    step = job.send(data)
    (new,) = set(ports(world.a)) - set(before)
    assert step == Write(AT, layout.pack(*fields[:-1], new[0]))
    assert new[2] == "prog[7]"
    with pytest.raises(StopIteration) as stop:
        job.throw(OSError(errno.EFAULT, "nothing there any more"))
    assert stop.value.value == -XEN_EFAULT
    assert new in ports(world.a)


def test_what_others_did_meanwhile(world: World):
    """Goal: an operation finds things as they are when its structure is there, not as they were when it was called.
    Method: two that want the same virq, or to close the same port, begun before either gets its structure."""
    a = world.a
    first, data = begun(a, ec.EVTCHNOP_bind_virq, ec.BIND_VIRQ, VIRQ_CONSOLE, 0, 0)
    second, _ = begun(a, ec.EVTCHNOP_bind_virq, ec.BIND_VIRQ, VIRQ_CONSOLE, 0, 0)
    assert isinstance(second.send(data), Write)
    assert end(first, data) == -XEN_EEXIST
    assert end(second) == 0
    first, data = begun(a, ec.EVTCHNOP_close, ec.PORT, 1)
    second, _ = begun(a, ec.EVTCHNOP_close, ec.PORT, 1)
    assert (end(second, data), end(first, data)) == (0, -XEN_EINVAL)


def test_the_other_domain_is_gone(world: World):
    """Goal: a domain that ends while somebody's question about it is read is not there, in a structure or as a result.
    Method: domain 0 asks about domain 1, which goes between the steps."""
    zero = world.dom0
    event, data = begun(zero, ec.EVTCHNOP_alloc_unbound, ec.ALLOC_UNBOUND, 1, 0, 0)
    grants = zero.begin(Hypercall.grant_table_op, gt.GNTTABOP_query_size, AT, 1)
    assert next(grants) == Read(AT, gt.QUERY_SIZE.size)
    world.hypervisor.destroy_domain(Domid(1))
    assert end(event, data) == -XEN_ESRCH
    answer = gt.QUERY_SIZE.pack(1, 7, 7, gt.GNTST_bad_domain)
    assert grants.send(gt.QUERY_SIZE.pack(1, 7, 7, 0)) == Write(AT, answer)
    assert end(grants) == 0


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("cmd", sorted(hypercall._EVENT_OPS))
def test_the_domain_is_gone(world: World, cmd: int, again: bool):
    """Goal: a domain that is gone does nothing, not to others and not to the one that has its number now.
    Method: its end while an operation's structure is read, with bytes that would be a port of its successor or peer."""
    job = world.a.begin(Hypercall.event_channel_op, cmd, AT)
    layout = hypercall._EVENT_OPS[cmd][0]
    assert next(job) == Read(AT, layout.size)
    world.hypervisor.destroy_domain(Domid(1))
    if again:
        after = world.hypervisor.create_domain(4, "again", 1)
        assert after.events.alloc_unbound(BOUND) == 1
    assert world.b.domain.events.alloc_unbound(Domid(1)) == 1
    before = [*ports(world.b), *ports(world.dom0)]
    assert end(job, (b"\2\0\0\0" * 2 + b"\1\0\0\0" * 8)[: layout.size]) == -XEN_ESRCH
    assert [*ports(world.b), *ports(world.dom0)] == before
    if again:
        assert [port for port, _ in after.events.channels.items()] == [1]


BEHIND = AT + 0x1000
LIST = MULTICALL_ENTRY.pack(Hypercall.xen_version, 0, ver.XENVER_get_features, BEHIND, 0, 0, 0, 0) * 3
OTHER_STEPS = [  # a call, what is at AT, and how many steps it has
    (Hypercall.xen_version, (ver.XENVER_extraversion, AT), b"", 1),
    (Hypercall.xen_version, (ver.XENVER_get_features, AT), bytes(8), 2),
    (Hypercall.grant_table_op, (gt.GNTTABOP_query_size, AT, 1), gt.QUERY_SIZE.pack(DOMID_SELF, 0, 0, 0), 2),
    (Hypercall.grant_table_op, (gt.GNTTABOP_get_version, AT, 1), gt.GET_VERSION.pack(DOMID_SELF, 0, 0), 2),
    (Hypercall.multicall, (AT, 3), LIST, 12),
]


@pytest.mark.parametrize(("op", "args", "data", "steps"), OTHER_STEPS)
def test_gone_at_any_step(op: int, args: tuple[int, ...], data: bytes, steps: int):
    """Goal: whichever copy the domain's end comes in, it is the last one, of a list as well.
    Method: let it go with each of the steps in turn; there are as many as we think."""
    for last in range(1, steps + 1):
        world = make_world()
        world.a.ram.fill(data)
        world.a.ram.fill(bytes(8), BEHIND)
        job = world.a.begin(op, *args)
        step: Step = next(job)
        for _ in range(1, last):
            step = job.send(world.a.ram.do(step))
        world.hypervisor.destroy_domain(Domid(1))
        assert end(job, world.a.ram.do(step)) == -XEN_ESRCH, last
    world = make_world()
    world.a.ram.fill(data)
    world.a.ram.fill(bytes(8), BEHIND)
    before = world.a.ram.transfers
    assert run(world.a.begin(op, *args), world.a.ram) == 0
    assert world.a.ram.transfers - before == steps


def test_nothing_to_wait_for(world: World):
    """Goal: what needs no memory waits for none.  Method: such calls, to their end."""
    for op, args in ((Hypercall.xen_version, (ver.XENVER_version,)), (Hypercall.multicall, (AT, 0)), (63, (AT,))):
        assert isinstance(end(world.a.begin(op, *args)), int)
