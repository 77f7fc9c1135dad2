"""Goal: a guest that dies leaves no word behind that nobody would take away; an interface that somebody deletes costs its
own vif, with the reason where a user looks, and no other.
Method: real drivers; the hypervisor's part of a destroy alone, then whatever could wake netback in the moment before the
store's word of it; and what the host's loop calls when an interface is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.netdev.scripted import FRAME
from tests.netdev.world import NetWorld, Vif
from xenmodel.public.io.ring import REQ_PROD
from xenmodel.testing import Footprint
from xenmodel.types import PeerFault, Port


@pytest.fixture
def world() -> Iterator[NetWorld]:
    world = NetWorld()
    yield world
    assert world.problems() == []
    world.close()


def errors(world: NetWorld) -> list[str]:
    """What is below domain 0's `error`."""
    return world.client.directory("/local/domain/0/error")


# --- the guest dies ------------------------------------------------------------------------------------------------------


def poll(vif: Vif) -> None:
    vif.bridge.send(FRAME)
    vif.back.poll(0)


def tx_event(vif: Vif) -> None:
    """Of frames that it sent while it lived."""
    vif.back.queues[0].tx_event(Port(0))


def rx_event(vif: Vif) -> None:
    """With an index that it left behind for netback to find."""
    rx = vif.back.queues[0].rx
    rx.blocked_at = vif.world.now
    rx.ring.words[REQ_PROD] += 5000
    vif.back.queues[0].rx_event(Port(0))


def junk(key: str) -> Callable[[Vif], None]:
    return lambda vif: vif.world.write(f"{vif.front_node}/{key}", "junk")


NOTICED: dict[str, Callable[[Vif], None]] = {
    "poll": poll,
    "tx event": tx_event,
    "rx event": rx_event,
    "watch of the state": junk("state"),
    "watch of multicast": junk("request-multicast-control"),
    "a lie on the control ring": lambda vif: vif.back.fail(PeerFault("found on the control ring")),
}


@pytest.mark.parametrize("notice", NOTICED)
def test_no_error_node_for_a_guest_that_is_gone(world: NetWorld, notice: str) -> None:
    """Goal: /local/domain/0/error is for devices that somebody will look at.  Method: frames on the ring, the domain's end,
    then one thing that netback could stumble over; the node's parent was never made."""
    vif = world.attach()
    back = vif.back
    vif.kernel.send(FRAME)
    vif.front.poll(0)
    world.fronts.stop()
    world.hypervisor.destroy_domain(world.guest.domid)
    world.vifs.clear()  # its frontend is no more
    NOTICED[notice](vif)
    assert back.broken and not back.queues and world.dom0.maptrack.mappings == {}
    assert errors(world) == [] and not world.client.exists("/local/domain/0/error/backend")
    world.hypervisor.settle()
    back.tick()
    assert errors(world) == []


@pytest.mark.parametrize("notice", sorted(NOTICED.keys() - {"poll", "tx event"}))
def test_an_error_node_for_a_guest_that_lives(world: NetWorld, notice: str) -> None:
    """Goal: the other side of it: a guest that breaks the rules reads why.  Method: the same without the end."""
    vif = world.attach()
    NOTICED[notice](vif)
    world.settle()
    assert vif.errors()[1] and vif.states()[1] == "6"


# --- an interface is deleted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queues", [1, 4])
@pytest.mark.parametrize("side", ["guest", "host"])
def test_an_interface_that_somebody_deleted(world: NetWorld, side: str, queues: int) -> None:
    """Goal: both ends close, the owner's error node says why, events and polls change nothing, the other vif goes on, and a
    detach leaves nothing.  Method: interface_lost() with frames on the way, several times as from several lanes."""
    other = world.attach()
    footprint = Footprint(world.hypervisor)
    vif = world.attach(queues=queues, vifname="web0")
    front, back = vif.front, vif.back
    vif.kernel.send(FRAME)
    vif.bridge.send(FRAME)
    world.poll()
    device = front if side == "guest" else back
    for _ in range(queues):
        device.interface_lost()
    world.run()
    assert vif.states() == ("6", "6")
    expected = "its interface was deleted" if side == "guest" else "interface web0 was deleted"
    ours, theirs = vif.errors() if side == "guest" else vif.errors()[::-1]
    assert ours == f"22 {expected}" and theirs is None
    assert device.broken == expected and not front.queues and not back.queues and not front.link_up
    for _ in range(3):
        assert other.works() and other.connected
    world.detach(vif)
    assert vif.front_node not in world.fronts.devices and vif.back_node not in world.backs.devices
    assert footprint.grown() == [] and other.works()


def test_deleted_before_it_was_connected() -> None:
    """Goal: the same while netback waits for its script.  Method: a script that takes its time, and ends too late."""
    world = NetWorld(hotplug=False)
    vif = world.attach()
    assert vif.states() == ("4", "2")
    vif.back.interface_lost()
    world.settle()
    assert vif.states() == ("6", "6") and "was deleted" in (vif.errors()[1] or "")
    world.hotplugs[0][1](None)
    world.settle()
    assert vif.states() == ("6", "6")
    world.detach(vif)
    assert world.backs.devices == {} and world.fronts.devices == {}
    world.close()
