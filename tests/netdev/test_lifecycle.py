"""Goal: a vif can be plugged, closed, reopened, restarted, pulled and destroyed at any moment, and nothing stays behind.
Method: real drivers and the toolstack's own detach; every write to the store is logged and compared with what Linux and
libxl wrote on a real Xen 4.17; footprints before and after."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

import pytest

from netdev.announce import gratuitous_arp, unsolicited_na
from netdev.netback import Offer
from netdev.netfront import Want
from tests.netdev.scripted import FRAME, ScriptedFront
from tests.netdev.world import NetWorld, Vif
from xenfs.probe import Probe
from xenmodel.testing import Footprint
from xenmodel.types import PeerFault, Pfn


@pytest.fixture
def world() -> Iterator[NetWorld]:
    world = NetWorld()
    yield world
    assert world.problems() == []
    world.close()


class Log:
    """Every write and removal below the two directories of a vif, as "F key=value" and "B key=value"."""

    def __init__(self, world: NetWorld, vif: Vif) -> None:
        self.lines: list[str] = []
        self.sides = {vif.front_node: "F", vif.back_node: "B"}
        store = world.hypervisor.store
        write, remove = store.write, store.remove

        def logged_write(view, domid, path: str, value: bytes) -> None:
            write(view, domid, path, value)
            self.note(path, "=" + value.decode())

        def logged_remove(view, domid, path: str) -> None:
            remove(view, domid, path)
            self.note(path, " removed")

        store.write, store.remove = logged_write, logged_remove  # type: ignore[method-assign]

    def note(self, path: str, what: str) -> None:
        for node, side in self.sides.items():
            if path.startswith(node):
                self.lines.append(f"{side} {path[len(node) + 1 :]}{what}".replace("  ", " "))

    def take(self) -> list[str]:
        taken, self.lines[:] = list(self.lines), []
        return taken

    def states(self) -> list[str]:
        """F2, B4, ...: the states alone."""
        return [line.replace(" state=", "") for line in self.take() if " state=" in line]


def restart_backend(world: NetWorld) -> None:
    """The module xen-netback is unloaded and loaded: its devices say nothing, then are probed anew."""
    world.backs.stop()
    world.settle()
    world.backs = Probe(world.dom0, world._kernel(world.dom0), "backend", {"vif": world._make_back})
    for vif in world.vifs.values():
        vif.host_port.closed = False  # a new interface of the same name  # type: ignore[attr-defined]
    world.backs.start()
    world.settle()


@pytest.mark.parametrize("queues", [1, 4])
@pytest.mark.parametrize("used", [True, False])
def test_plug_and_pull(world: NetWorld, queues: int, used: bool) -> None:
    """Goal: after a detach both domains and the store hold what they held before, 100 times in a row."""
    footprint, nodes = Footprint(world.hypervisor), [path for path, _, _ in world.hypervisor.store.dump()]
    for _ in range(100 if queues == 1 else 15):
        vif = world.attach(queues=queues)
        assert vif.works() if used else vif.connected
        world.detach(vif)
        assert footprint.grown() == []
        assert [path for path, _, _ in world.hypervisor.store.dump()] == nodes
        assert vif.host_port.closed and vif.guest_port.closed  # type: ignore[attr-defined]
    assert world.fronts.devices == world.backs.devices == {}


def test_what_is_written_from_attach_to_detach(world: NetWorld) -> None:
    """Goal: the states and the keys around them in Linux's and libxl's order.  Method: the log of a whole life.
    Linux's netback says 5 once more at the detach; ours is 5 already, and writes what differs."""
    vif = world.attach(settle=False)
    log = Log(world, vif)
    world.settle()
    lines = log.take()
    at = [lines.index(line) for line in (
        "B feature-sg=1", "B feature-split-event-channels=1", "B multi-queue-max-queues=1", "B feature-ctrl-ring=1",
        "B state=2", "F mtu=1500", "B hotplug-status=connected", "B state=4",
    )]  # fmt: skip
    assert at == sorted(at)
    order = ("B state=2", "F xdp-headroom=0", "F multi-queue-num-queues=1", "F state=4", "B state=4")
    at = [lines.index(line) for line in order]
    assert at == sorted(at) and "F state=3" not in lines and lines[-1] == "B state=4"
    world.detach(vif)
    assert log.take() == [
        "B online=0", "B state=5", "F state=6", "B state=6", "B hotplug-status removed", "F removed", "B removed",
    ]  # fmt: skip


def test_the_gate_of_the_hotplug_script() -> None:
    """Goal: netback stays InitWait until the script has put the interface on its bridge, whatever the guest says.
    Method: a script that takes its time."""
    world = NetWorld(hotplug=False)
    vif = world.attach()
    assert vif.states() == ("4", "2") and not vif.front.link_up and len(world.hotplugs) == 1
    vif.kernel.send(FRAME)
    vif.bridge.send(FRAME)
    world.run()
    assert vif.kernel.receive() == vif.bridge.receive() == []
    watches = world.hypervisor.store.usage(0).watches
    world.hotplugs[0][1](None)
    world.run()
    assert vif.connected and world.hypervisor.store.usage(0).watches == watches - 1 + 2, "that of the status has gone"
    assert [frame for _, frame in vif.kernel.receive() + vif.bridge.receive()] == [FRAME] * 2, "what waited comes now"
    assert vif.works()
    world.close()


def test_a_hotplug_script_that_fails() -> None:
    """Goal: the reason is in the store, the vif waits, and can be pulled; a new one works.  Method: a script that fails."""
    world = NetWorld(hotplug=False)
    footprint = Footprint(world.hypervisor)
    vif = world.attach()
    world.hotplugs[0][1]("bridge xenbr0 does not exist")
    world.settle()
    assert vif.states() == ("4", "2")
    assert world.client.read(f"{vif.back_node}/hotplug-status") == "error"
    assert world.client.read(f"{vif.back_node}/hotplug-error") == "bridge xenbr0 does not exist"
    world.detach(vif)
    assert footprint.grown() == [] and world.backs.devices == {}
    again = world.attach()
    world.hotplugs[-1][1](None)
    world.settle()
    assert again.connected and again.works()
    world.close()


def test_an_interface_that_cannot_be_had(world: NetWorld) -> None:
    """Goal: a text in the error node, no driver, and the others go on.  Method: an open_port that raises."""
    other = world.attach()
    vif = world.attach(vifname="broken")
    assert vif.back_node not in world.backs.devices
    assert "interface broken cannot be made" in (vif.errors()[1] or "")
    assert vif.states() == ("1", "1") and other.works()


def test_the_guest_closes_and_opens_its_interface(world: NetWorld) -> None:
    """Goal: 5, 5, 6, 6 and back, with other features, behind the same interface.  Method: reconnect, the log, frames."""
    vif = world.attach()
    log = Log(world, vif)
    ports = vif.front.port, vif.back.port
    footprint = Footprint(world.hypervisor)
    for want in (Want(gso4=False), Want(sg=False, csum=False, split=False), Want()):
        vif.front.reconnect(want)
        world.settle()
        assert vif.connected and vif.works()
        assert log.states() == ["F5", "B5", "F6", "B6", "F1", "B2", "F4", "B4"]
        assert (vif.front.port, vif.back.port) == ports and vif.front.quarantined == 0
    assert footprint.grown() == []


def test_the_guest_closes_for_good(world: NetWorld) -> None:
    """Goal: both Closed, no carrier on either side, nothing mapped; it can still be pulled.  Method: close()."""
    footprint = Footprint(world.hypervisor)
    vif = world.attach()
    log = Log(world, vif)
    vif.front.close()
    world.settle()
    assert log.states() == ["F5", "B5", "F6", "B6"]
    assert not vif.front.link_up and world.for_devices.mappings() == []
    assert not vif.guest_port.up and not vif.host_port.up  # type: ignore[attr-defined]
    world.run()
    world.detach(vif)
    assert footprint.grown() == []


@pytest.mark.parametrize("waiting", [0, 1, 300, 1000])
def test_detach_while_frames_wait(world: NetWorld, waiting: int) -> None:
    """Goal: pulled with frames in the interfaces and on the rings; nothing stays behind and the other vif does not notice.
    Method: frames both ways, the detach after a few turns only."""
    other = world.attach()
    footprint = Footprint(world.hypervisor)
    for turns in range(4):
        vif = world.attach()
        for _ in range(waiting):
            vif.kernel.send(FRAME)
            vif.bridge.send(FRAME * 8)
        world.poll()
        world.hypervisor.deliver(turns=turns)
        world.toolstack.detach_vif(world.guest.domid, vif.devid)
        world.run()
        assert vif.front_node not in world.fronts.devices and vif.back_node not in world.backs.devices
        assert footprint.grown() == [] and other.works()


def test_a_backend_that_restarts(world: NetWorld) -> None:
    """Goal: the guest's interface loses its carrier and gets it back; frames flow, nothing leaks, five times over.
    Method: the backend's drivers stop without a word and are probed anew, then one that says Closing first."""
    vif, other = world.attach(), world.attach(queues=4)
    footprint = None
    for _ in range(5):
        port, carriers = vif.front.port, []
        vif.front.on_change = lambda carriers=carriers: carriers.append(vif.front.link_up)  # type: ignore[misc]
        for each in (vif, other):
            world.write(f"{each.back_node}/state", 5)
            assert each.states() == ("6", "6")
        restart_backend(world)
        for each in (vif, other):
            assert each.connected, (each.states(), each.errors())
            assert each.works()
        assert carriers == [False, True] and vif.front.port is port and vif.front.quarantined == 0
        footprint = footprint or Footprint(world.hypervisor)
    assert footprint is not None and footprint.grown() == []


WINDOWS = [[1, 5, 6, 1], [5, 6, 5, 6, 1], [6, 1, 6, 1], [5, 5, 6, 6, 1, 1]]


@pytest.mark.parametrize("states", WINDOWS)
def test_the_close_cycle_of_windows(world: NetWorld, states: list[int]) -> None:
    """Goal: a frontend that walks Closing, Closed before it ever connects is served when it begins.
    Method: a scripted frontend with xenvif's states, then a good connection, twice."""
    vif = world.attach(settle=False)
    for _ in range(2):
        front = ScriptedFront(world, vif)
        for state in states:
            front.set("state", state)
        assert vif.states() == ("1", "2"), vif.errors()
        front.connect()
        assert vif.states() == ("4", "4")
        assert front.send(front.slot()) == [(0, 0)]
        assert len(vif.bridge.receive()) == 1
    world.toolstack.detach_vif(world.guest.domid, vif.devid)
    world.settle()
    front.set("state", 6)
    assert world.backs.devices == {} and world.for_devices.mappings() == []


@pytest.mark.parametrize("turns", [None, 0, 1, 2, 3, 5, 8])
def test_the_guest_is_destroyed(turns: int | None) -> None:
    """Goal: with frames anywhere, at any moment of its life, domain 0 lets go of everything.
    Method: the destroy of `xl destroy`, after so many turns of an attach and its traffic."""
    world = NetWorld()
    footprint = Footprint(world.hypervisor)
    vif = world.attach(settle=False, queues=2)
    if turns is None:
        world.settle()
    for i in range(turns or 3):
        vif.kernel.send(FRAME, lane=i & 1)
        vif.bridge.send(FRAME)
        world.poll()
        world.hypervisor.deliver(turns=turns or 1)
    world.destroy_guest()
    vif.bridge.send(FRAME)
    world.run()
    assert world.backs.devices == {}
    assert [what for what in footprint.grown() if "of domain 0" in what] == []
    assert "backend" not in world.client.directory("/local/domain/0")
    assert world.for_others.mappings() == [] and world.for_others.ports() == []
    world.close()


def test_the_guest_dies_before_anybody_looks(world: NetWorld) -> None:
    """Goal: a poll between the death of a domain and the store's word of it costs that vif only.
    Method: the hypervisor's part of a destroy alone, then polls and a tick."""
    vif = world.attach()
    back = vif.back
    world.fronts.stop()
    world.hypervisor.destroy_domain(world.guest.domid)
    vif.bridge.send(FRAME)
    for _ in range(3):
        back.poll(0)
        back.tick()
    world.hypervisor.settle()
    assert back.broken and "gone" in back.broken and not back.queues
    assert world.dom0.maptrack.mappings == {}


def test_announcements(world: NetWorld) -> None:
    """Goal: the frames that tell the neighbours where we are reach the bridge as they are; not connected, they are lost
    without harm.  Method: an ARP and an NA, before, while and after the vif is connected."""
    vif = world.attach()
    frames = [gratuitous_arp(vif.front.mac, IPv4Address("10.0.0.5")), unsolicited_na(vif.front.mac, IPv6Address("fe80::5"))]
    vif.front.announce(frames)
    world.run()
    assert [frame for _, frame in vif.bridge.receive()] == frames
    front = vif.front
    front.close()
    world.settle()
    front.announce(frames * 1000)
    world.run()
    assert vif.bridge.receive() == []
    front.reconnect()
    world.settle()


def test_more_announcements_than_a_ring_holds(world: NetWorld) -> None:
    vif = world.attach()
    vif.front.announce([FRAME] * 1000)
    world.run()
    assert 0 < len(vif.bridge.receive()) <= 256 and vif.works()


def test_a_guest_without_memory(world: NetWorld) -> None:
    """Goal: a clear text, nothing half taken, and a vif that works once there is memory again.
    Method: a guest whose last free run is a bit too short."""
    memory = world.guest.memory
    taken: list[Pfn] = []
    while memory.free_pages > 300:
        taken.append(memory.allocate())
    footprint = Footprint(world.hypervisor)
    vif = world.attach(offer=Offer())
    assert "give the domain more memory" in (vif.errors()[0] or "")
    assert [what for what in footprint.grown() if "frames" in what or "grants" in what] == []
    world.detach(vif)
    assert footprint.grown() == []
    for pfn in taken:
        memory.release(pfn)
    assert world.attach().works()


def test_a_guest_without_grants() -> None:
    """Goal: the same when grant references run out.  Method: a guest with one frame of grant table, for two vifs."""
    world = NetWorld()
    world.guest.grants.max_frames = 2
    entries = list(world.guest.grants.entries())
    first = world.attach()
    second = world.attach()
    assert first.connected and "max_grant_frames" in (second.errors()[0] or "")
    assert first.works()
    world.detach(second)
    world.detach(first)
    assert list(world.guest.grants.entries()) == entries
    world.close()


def test_reopening_what_was_closed_or_given_up(world: NetWorld) -> None:
    """Goal: reconnect() opens an interface that the guest had closed, and one that was given up for its backend's lies;
    not one that is gone.  Method: each of them, then frames."""
    vif = world.attach()
    front, footprint = vif.front, Footprint(world.hypervisor)
    front.close()
    world.settle()
    assert vif.states() == ("6", "6")
    front.reconnect()
    world.settle()
    assert vif.connected and vif.works()
    front.fail(PeerFault("a lie"))
    world.settle()
    assert vif.states() == ("6", "6") and not front.link_up
    front.reconnect(Want(sg=False))
    world.settle()
    assert vif.connected and vif.works() and front.broken is None
    front.fail(PeerFault("another"))
    front.reconnect()
    world.settle()
    assert vif.connected and vif.works()
    assert footprint.grown() == []
    world.write(f"{vif.back_node}/state", 5)
    assert vif.states() == ("6", "6"), "the guest has opened it once, not for good"
    world.detach(vif)
    front.reconnect()
    world.settle()
    assert world.fronts.devices == {} and not front.queues
