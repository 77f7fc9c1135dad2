"""Goal: no program can close the ports of its domain's network drivers. If they are closed all the same, by whomever, that
stops their traffic, nothing else: no driver crashes, and the vif can be unplugged, or its guest destroyed, without a trace.
Method: real drivers and real hypercalls; frames before and after, with the other end still sending into its port.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.netdev.scripted import FRAME
from tests.netdev.world import NetWorld
from tests.sysdev.hypercaller import Caller
from xenmodel.public import event_channel as ec
from xenmodel.public.errno import XEN_EBUSY
from xenmodel.public.xen import DOMID_SELF


@pytest.fixture
def world() -> Iterator[NetWorld]:
    world = NetWorld()
    yield world
    assert world.problems() == []
    world.close()


@pytest.mark.parametrize("who", ["guest", "dom0"])
def test_no_hypercall_takes_them(world: NetWorld, who: str):
    """Goal: traffic goes on whatever a program tries with the drivers' ports.
    Method: close each, reset all, bind what is free, send, unmask, close and reset again."""
    vif = world.attach(queues=3)
    domain = world.guest if who == "guest" else world.dom0
    caller, ports = Caller(domain), sorted(port for port, c in domain.events.channels.items() if c.handler is not None)
    assert len(ports) > 3
    for _ in range(2):
        assert [caller.event(ec.EVTCHNOP_close, ec.PORT, port) for port in ports] == [-XEN_EBUSY] * len(ports)
        assert caller.event(ec.EVTCHNOP_reset, ec.RESET, DOMID_SELF) == 0 and sorted(domain.events.channels) == ports
        assert caller.event(ec.EVTCHNOP_bind_ipi, ec.BIND_IPI, 0, 0) == 0 and caller.out(ec.BIND_IPI)[1] not in ports
        for port in ports:
            assert caller.event(ec.EVTCHNOP_send, ec.PORT, port) == caller.event(ec.EVTCHNOP_unmask, ec.PORT, port) == 0
        assert vif.works()


@pytest.mark.parametrize("end", ["detach", "destroy"])
@pytest.mark.parametrize("how", ["close", "reset", "garble"])
@pytest.mark.parametrize("who", ["guest", "dom0"])
@pytest.mark.parametrize("queues", [1, 3])
def test_lost_ports(world: NetWorld, who: str, how: str, queues: int, end: str):
    """Goal and method as above; garble: others get the numbers, and drivers then close ports that are not theirs."""
    vif = world.attach(queues=queues)
    assert vif.works()
    domain = world.guest if who == "guest" else world.dom0
    caller, ports = Caller(domain), sorted(domain.events.channels)
    assert len(ports) > queues
    if how == "reset":
        assert domain.events.reset() == 0
    else:
        assert [domain.events.close(port) for port in ports] == [0] * len(ports)
    if how == "garble":
        for port in ports:
            assert caller.event(ec.EVTCHNOP_bind_ipi, ec.BIND_IPI, 0, 0) == 0
            assert caller.event(ec.EVTCHNOP_send, ec.PORT, port) == 0
            assert caller.event(ec.EVTCHNOP_unmask, ec.PORT, port) == 0
    for _ in range(300):  # more than a ring takes
        vif.kernel.send(FRAME)
        vif.bridge.send(FRAME)
        world.run()
    assert vif.states() == ("4", "4"), "to the handshake nothing has happened"
    assert not vif.works()
    if end == "detach":
        world.detach(vif)
    else:
        world.destroy_guest()
    world.settle()
    assert not world.client.exists(vif.back_node), "the backend let go"
