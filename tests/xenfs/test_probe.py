"""Goal: drivers come and go with the directories of their devices, whatever order those are written in.
Method: a store, a Probe over one tree with drivers that only tell; directories are made and removed by hand."""

from __future__ import annotations

import pytest

import xenfs.probe
from blockdev.storage import MemoryStorage
from tests.xenfs.machine import Machine
from xenfs.diskspec import parse_disk
from xenfs.probe import Probe
from xenmodel.hypervisor import Hypervisor
from xenmodel.public.io.xenbus import XenbusState
from xenmodel.types import PeerFault
from xenmodel.xenbus import XenbusDevice
from xenmodel.xenstore.client import Client

TREES = ["device", "backend"]


class Told(XenbusDevice):
    """A driver that notes what happens to it in `log`, and does nothing."""

    log: list[tuple[str, str]]

    def start(self) -> None:
        self.log.append(("start", self.node))

    def stop(self) -> None:
        self.log.append(("stop", self.node))
        super().stop()


class Bus:
    """Domain 0 with one Probe, and a client of its own that plays the toolstack."""

    def __init__(self, tree: str) -> None:
        self.hypervisor = Hypervisor()
        domain = self.hypervisor.create_domain(64, "Domain-0", 0)
        self.client = Client(self.hypervisor.store.connect(domain.domid))
        self.log: list[tuple[str, str]] = []
        self.peers: list[tuple[str, int]] = []
        self.fault: str | None = None
        self.probe = Probe(domain, Client(self.hypervisor.store.connect(domain.domid)), tree, {"vbd": self._make})
        self.probe.added = lambda device: self.log.append(("added", device.node))
        self.probe.dropped = lambda device: self.log.append(("dropped", device.node))
        self.home = f"/local/domain/0/{tree}"
        self.peer = "backend" if tree == "device" else "frontend"
        self.below = "" if tree == "device" else "/1"

    def _make(self, domain, client, node, peer, domid):
        if self.fault:
            raise PeerFault(self.fault)
        device = Told(domain, client, node, peer, domid)
        device.log = self.log
        self.peers.append((peer, domid))
        return device

    def node(self, ident: int, kind: str = "vbd") -> str:
        return f"{self.home}/{kind}{self.below}/{ident}"

    def write(self, node: str, **keys: object) -> None:
        for key, value in keys.items():
            self.client.write(f"{node}/{key.replace('_', '-')}", str(value))

    def make(self, ident: int, kind: str = "vbd") -> str:
        node = self.node(ident, kind)
        self.write(node, **{self.peer: f"/peer/{ident}", f"{self.peer}_id": 7, "state": 1})
        return node

    def settle(self) -> list[tuple[str, str]]:
        """What happened since the last time."""
        self.hypervisor.settle()
        happened, self.log[:] = self.log[:], []
        return happened


@pytest.fixture(params=TREES)
def bus(request: pytest.FixtureRequest) -> Bus:
    return Bus(request.param)


@pytest.mark.parametrize("early", [True, False])
def test_devices_are_found(bus, early):
    """Goal: directories that are there at the start and such that come later are found, with their peer's name and domain.
    Method: start before or after two are made."""
    if early:
        bus.probe.start()
        bus.hypervisor.settle()
    nodes = [bus.make(1), bus.make(2)]
    if not early:
        bus.probe.start()
    assert bus.settle() == [(what, node) for node in nodes for what in ("added", "start")]
    assert bus.peers == [("/peer/1", 7), ("/peer/2", 7)]
    assert list(bus.probe.devices) == nodes


def test_half_a_directory(bus):
    """Goal: a directory is a device only when it is whole.  Method: write its keys one by one, `state` and peer last."""
    bus.probe.start()
    node = bus.node(5)
    for key, value in ((f"{bus.peer}_id", 7), ("other", "x"), ("state", 1)):
        bus.write(node, **{key: value})
        assert bus.settle() == []
    bus.write(node, **{bus.peer: "/peer/5"})
    assert bus.settle() == [("added", node), ("start", node)]
    bus.write(node, state=2, more="y")
    assert bus.settle() == [], "one driver for one directory"


def test_other_kinds(bus):
    """Goal: devices without a driver are left alone.  Method: a vif beside a vbd, coming and going."""
    bus.probe.start()
    bus.make(0, "vif")
    node = bus.make(1)
    assert bus.settle() == [("added", node), ("start", node)]
    bus.client.rm(bus.node(0, "vif"))
    bus.client.rm(f"{bus.home}/vif")
    assert bus.settle() == []


@pytest.mark.parametrize("what", ["the node", "the kind", "the tree"])
def test_directories_that_vanish(bus, what):
    """Goal: a driver stops when its directory goes, by whatever removal.  Method: remove it, its parent, everything."""
    bus.probe.start()
    node, other = bus.make(1), bus.make(2)
    bus.settle()
    bus.client.rm({"the node": node, "the kind": f"{bus.home}/vbd", "the tree": bus.home}[what])
    gone = [node] if what == "the node" else [node, other]
    assert sorted(bus.settle()) == sorted((word, which) for which in gone for word in ("stop", "dropped"))
    assert list(bus.probe.devices) == [n for n in (node, other) if n not in gone]
    bus.make(1)
    assert bus.settle() == [("added", node), ("start", node)], "and it may come again"


def test_a_driver_that_refuses(bus):
    """Goal: a device that cannot be made is reported and does no harm; when its directory changes it is tried again.
    Method: a fault at first, and a peer's domain that is no number."""
    bus.probe.start()
    bus.fault = "no room"
    node, bad = bus.make(1), bus.make(2)
    assert bus.settle() == []
    relative = node.removeprefix("/local/domain/0/")
    assert "no room" in (bus.client.read(f"/local/domain/0/error/{relative}/error") or "")
    bus.fault = None
    bus.write(bad, **{f"{bus.peer}_id": "seven"})
    assert bus.settle() == []
    bus.write(node, state=1)
    assert bus.settle() == [("added", node), ("start", node)]


def test_too_many(bus, monkeypatch):
    """Goal: a store that lists devices without end is not believed.  Method: a limit of 3, five devices, then one less."""
    monkeypatch.setattr(xenfs.probe, "MOST_DEVICES", 3)
    bus.probe.start()
    nodes = [bus.make(i) for i in range(5)]
    bus.settle()
    assert list(bus.probe.devices) == nodes[:3]
    bus.client.rm(nodes[0])
    bus.write(nodes[4], state=1)
    bus.settle()
    assert list(bus.probe.devices) == [nodes[1], nodes[2], nodes[4]]


def test_stop(bus):
    """Goal: a stopped bus has no drivers and hears nothing more.  Method: stop, then change and add directories."""
    bus.probe.start()
    node = bus.make(1)
    bus.settle()
    bus.probe.stop()
    assert bus.settle() == [("stop", node), ("dropped", node)]
    bus.make(2)
    bus.write(node, state=1)
    assert bus.settle() == [] and bus.probe.devices == {}


@pytest.mark.parametrize("seed", [None, *range(20)])
def test_another_device_in_the_place_of_one_that_just_went(seed: int | None) -> None:
    """Goal: a device that takes the place of one which has just gone connects, though its bus saw no moment without one.
    Method: the toolstack plugs it in as soon as the old one's directories are gone, in any order of delivery."""
    with Machine({"g": {"xvda": MemoryStorage(1024)}}, seed=seed) as machine:
        world = machine.world
        plugged = []

        def again() -> None:
            plugged.append(world.toolstack.attach_disk(1, parse_disk("/g/xvda,raw,xvda,w")))

        for round_ in range(3):
            world.toolstack.detach_disk(1, 51712, again)
            world.settle()
            assert len(plugged) == round_ + 1
            assert machine.front("g", "xvda").state is XenbusState.Connected
