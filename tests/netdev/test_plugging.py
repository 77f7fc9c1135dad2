"""Goal: what the host's network answers, and what lies in a vif's nodes, reaches the one vif it is about, while it is there.
Method: the real Vifs over drivers in memory; in the place of netlink's worker stands a list of what was asked, which the
test answers when and as it likes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from netdev.cable import MemoryPort
from netdev.link import Lane, Plug
from netdev.netback import Netback
from netdev.netfront import Netfront
from netdev.netlink import NetlinkError
from netdev.tap import Tap
from tests.netdev.scripted import FRAME, ScriptedBack
from tests.netdev.world import NetWorld, Vif
from xenfs import vifs
from xenfs.config import GuestConfig
from xenfs.network import Network
from xenfs.vifs import Vifs
from xenmodel.domain import Domain
from xenmodel.testing import Footprint
from xenmodel.xenstore.client import Client

CONFIG = GuestConfig("", "guest", "uuid")


class Queue(Lane):
    """A lane of a cable, with a descriptor to wait for."""

    def __init__(self, lane: Lane) -> None:
        self.fd = os.eventfd(0)
        self.read, self.write = lane.read, lane.write  # type: ignore[method-assign]


class Wire(Tap):
    """An end of a cable where a TAP is expected."""

    def __init__(self, name: str, port: MemoryPort, mac: bytes) -> None:
        self.name, self.namespace, self.port, self.mac = name, None, port, mac
        self.lanes = [Queue(lane) for lane in port.lanes]  # type: ignore[misc]
        self.before_close = lambda: None
        self.offload, self.carrier = port.offload, port.carrier  # type: ignore[method-assign]

    @property
    def closed(self) -> bool:
        return self.port.closed

    def close(self) -> None:
        if not self.closed:
            self.before_close()
            for lane in self.lanes:
                os.close(lane.fd)
        self.port.close()


class Wires(Network):
    """What was asked waits in `asked`, as (what, name, ...), the callback last; only the script is quick, and content."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Any, ...]] = []
        self.world: PlugWorld

    def open_front(self, config: GuestConfig, plug: Plug) -> Tap:
        return Wire(f"xn{plug.handle}", self.world.of(plug).guest_port, plug.mac)  # type: ignore[arg-type]

    def open_back(self, plug: Plug) -> Tap:
        return Wire(plug.name or "", self.world.of(plug).host_port, plug.mac)  # type: ignore[arg-type]

    def set_up_front(self, tap: Tap, mtu: int, addresses: Any, done: Any) -> None:
        self.asked.append(("set up", tap.name, done))

    def set_mtu(self, tap: Tap, mtu: int) -> None:
        self.asked.append(("mtu", tap.name, mtu))

    def online(self, tap: Tap, bridge: str, mtu: int | None, done: Any) -> None:
        self.asked.append(("online", tap.name, mtu))
        done(mtu or 1500)

    def announcements(self, tap: Tap, done: Any) -> None:
        self.asked.append(("announce", tap.name, done))

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [asked for asked in self.asked if asked[0] == kind]


class PlugWorld(NetWorld):
    """NetWorld whose drivers are made by Vifs; a backend that a test plays itself stays out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self.plugs = Vifs(self.toolstack, self.hypervisor.deliver, self.said.append)
        assert isinstance(self.plugs.network, Wires)
        self.network = self.plugs.network
        self.network.world = self
        self.make_front = self.plugs.maker(CONFIG)
        self.fronts.added = self._added

    def of(self, plug: Plug) -> Vif:
        return next(vif for vif in self.vifs.values() if plug.node in (vif.front_node, vif.back_node))

    def _added(self, device: Any) -> None:
        device.on_change = lambda: self.plugs.changed("guest", device)

    def _make_front(self, domain: Domain, client: Client, node: str, peer: str, domid: int) -> Netfront:
        front = self.make_front(domain, client, node, peer, domid)
        assert isinstance(front, Netfront)
        return front

    def _make_back(self, domain: Domain, client: Client, node: str, peer: str, domid: int) -> Netback:
        return self.plugs.make_back(domain, client, node, peer, domid)

    def close(self) -> None:
        self.fronts.stop()
        self.backs.stop()
        self.plugs.close()
        super().close()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlugWorld]:
    monkeypatch.setattr(vifs, "Network", Wires)
    world = PlugWorld()
    yield world
    assert world.problems() == []
    world.close()


# --- the MTU of the backend's directory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1500x", "", "-1", " 1500", "0x5dc", "65536", "9" * 100, "\udcff"])
def test_an_mtu_that_makes_no_sense(world: PlugWorld, text: str) -> None:
    """Goal: the script of that vif has failed, with the key and its value; the vif waits, can be pulled; the other works.
    Method: the node is overwritten before netback is ready for its script."""
    other = world.attach()
    footprint = Footprint(world.hypervisor)
    vif = world.attach(settle=False)
    world.write(f"{vif.back_node}/mtu", text)
    assert vif.states() == ("4", "2") and not vif.front.link_up
    assert world.client.read(f"{vif.back_node}/hotplug-status") == "error"
    reason = world.client.read(f"{vif.back_node}/hotplug-error") or ""
    assert reason.startswith(f"{vif.back_node}/mtu is ") and ("not a number" in reason or "outside 0..65535" in reason)
    assert [name for _, name, _ in world.network.of("online")] == [other.back.name]
    assert other.works()
    world.detach(vif)
    assert footprint.grown() == [] and other.works()


@pytest.mark.parametrize(("text", "mtu"), [(None, None), ("0", None), ("9000", 9000), ("65535", 65535)])
def test_an_mtu(world: PlugWorld, text: str | None, mtu: int | None) -> None:
    """Goal: the script gets the number, or none if the bridge's is to be taken; the guest hears what came of it.
    Method: what was asked for, and the frontend's node."""
    vif = world.attach(settle=False)
    if text is not None:
        world.client.write(f"{vif.back_node}/mtu", text)
    world.settle()
    assert world.network.of("online") == [("online", vif.back.name, mtu)]
    assert vif.connected and vif.front.mtu == (mtu or 1500)
    assert world.network.of("mtu") == ([] if mtu is None else [("mtu", "xn0", mtu)])


# --- announcements -------------------------------------------------------------------------------------------------------


def test_a_link_that_flaps(world: PlugWorld) -> None:
    """Goal: a backend that says 0 and 1 in a loop costs the worker one job at a time, and the user one line; once that is
    answered, however it is, the next change costs one again.  Method: a scripted backend, 100 times down and up."""
    vif = world.attach(settle=False)
    back = ScriptedBack(world, vif).connect()
    asked = world.network.of
    assert len(asked("announce")) == len(world.said) == 1
    ups: list[bool] = []
    front, changed = vif.front, vif.front.on_change

    def noted() -> None:
        ups.append(front.link_up)
        changed()

    front.on_change = noted
    for answer in ([FRAME], NetlinkError("there is no interface 'xn0'"), [FRAME, FRAME]):
        for i in range(200):
            back.set("carrier", i & 1)
        assert ups == [False, True] * 100
        assert len(asked("announce")) == len(world.said) == 1
        ups.clear()
        back.take()
        world.network.asked.pop()[-1](answer)
        assert len(back.take()) == (len(answer) if isinstance(answer, list) else 0)
        world.said.clear()
        back.set("carrier", 0)
        back.set("carrier", 1)
        assert len(asked("announce")) == len(world.said) == 1
        ups.clear()


# --- answers that come late ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [NetlinkError("there is no interface 'xn0'"), None])
@pytest.mark.parametrize("again", [True, False])
def test_an_answer_for_a_vif_that_is_gone(world: PlugWorld, late: Exception | None, again: bool) -> None:
    """Goal: it does nothing to the next vif of the same number, and leaves no error where there is none.
    Method: the kernel's word on the first one's interface comes when that was pulled, and another plugged in, or none."""
    other = world.attach()
    vif = world.attach()
    old, done = vif.front, world.network.of("set up")[1][-1]
    announced = world.network.of("announce")[1][-1]
    world.detach(vif)
    del world.vifs[vif.back_node]
    if again:
        vif = world.attach()
        assert vif.front is not old and vif.front.node == old.node and vif.connected
    done(late)
    announced([FRAME] if late is None else late)
    world.run()
    for node in ("/local/domain/0/error", f"/local/domain/{world.guest.domid}/error"):
        assert world.client.directory(node) == []
    if again:
        assert vif.connected and vif.front.broken is None and vif.works()
    assert other.works()


def test_an_answer_in_time(world: PlugWorld) -> None:
    """Goal: the other side of it: what could not be set up is that vif's end.  Method: the same word while it is there."""
    other, vif = world.attach(), world.attach()
    world.network.of("set up")[1][-1](NetlinkError("there is no interface 'xn1'"))
    world.settle()
    assert vif.states() == ("6", "6") and "no interface 'xn1'" in (vif.errors()[0] or "")
    assert other.works()
