"""Goal: both halves of a device together: they always meet, always let go, and one broken device costs no other anything.
Method: Front and Back of bus.py, upcalls and watch events in orders drawn from a seed, a toolstack that takes things away.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from tests.xenmodel.bus import Back, Bus, Front
from xenmodel.public.io.xenbus import XenbusState
from xenmodel.types import PeerFault
from xenmodel.xenbus import XenbusDevice
from xenmodel.xenstore.perms import Access, Perm
from xenmodel.xenstore.quota import Quota

S = XenbusState
NOTHING = {"mappings": 0, "ports": 0, "grants": 0, "watches": 0}
CONNECTED = {"mappings": 1, "ports": 2, "grants": 1, "watches": 1}


# --- any order -----------------------------------------------------------------------------------------------------------


def some_turns(bus: Bus, random: Random) -> None:
    for _ in range(random.randrange(12)):
        bus.hypervisor.deliver(turns=1)


def close_somehow(bus: Bus, front: Front, back: Back, random: Random) -> None:
    """One or several parties want the device closed, at moments of their own."""
    closers: list[Callable[[], None]] = [
        front.close,
        lambda: back.switch_state(S.Closing) if back.state is S.Connected else None,
        bus.ask_to_close,
    ]
    for closer in random.sample(closers, random.randint(1, 3)):
        closer()
        some_turns(bus, random)
    bus.settle()


def open_again(bus: Bus, front: Front, back: Back, random: Random) -> tuple[Front, Back]:
    """The driver of one end is loaded anew."""
    if random.random() < 0.5:
        front.stop()
        bus.guest_client.write(f"{front.node}/state", int(S.Initialising))
        front = Front(bus, 0)
        front.start()
    else:
        back.stop()
        back = Back(bus, 0)
        back.start()
    return front, back


@pytest.mark.parametrize("seed", range(200))
def test_three_cycles_in_any_order(seed: int):
    """Goal: they always converge, the hooks come in order, and each close leaves nothing.
    Method: connect and close three times; who closes, and every turn, drawn from the seed."""
    random = Random(seed)
    bus = Bus(order=random.randrange)
    bus.attach()
    drivers = [Front(bus, 0), Back(bus, 0)]
    for driver in random.sample(drivers, 2):
        driver.start()
        some_turns(bus, random)
    front, back = drivers
    assert isinstance(front, Front) and isinstance(back, Back)
    for cycle in range(3):
        bus.settle()
        assert bus.states(front, back) == (S.Connected, S.Connected), f"cycle {cycle}"
        assert bus.held() == CONNECTED
        made = [entry for entry in bus.trace if entry.split(".")[1] in ("offer", "negotiate", "connect")]
        assert made == ["B.offer", "F.negotiate", "B.connect", "F.connect"], f"cycle {cycle}"
        bus.trace.clear()
        close_somehow(bus, front, back, random)
        assert bus.states(front, back) == (S.Closed, S.Closed), f"cycle {cycle}"
        assert bus.held() == NOTHING
        assert set(bus.trace) == {"F.disconnect", "B.disconnect"}
        bus.trace.clear()
        front, back = open_again(bus, front, back, random)


@pytest.mark.parametrize("seed", range(50))
def test_a_frontend_that_flaps(seed: int):
    """Goal: no order of states and turns jams a backend or makes it leak (XSA-350).  Method: 30 random states, with
    random numbers of turns between; then a proper frontend comes, and connects."""
    random = Random(seed)
    bus = Bus(order=random.randrange)
    bus.attach()
    back = Back(bus, 0)
    back.start()
    for _ in range(30):
        bus.toolstack.write(f"{back.peer_node}/state", random.choice("12345678"))
        some_turns(bus, random)
    for said in ("5", "6"):
        bus.say(back, said)
    assert bus.held() == NOTHING
    bus.say(back, "1")
    front = Front(bus, 0)
    front.start()
    bus.settle()
    assert bus.states(front, back) == (S.Connected, S.Connected)
    assert bus.held() == CONNECTED


# --- going away ----------------------------------------------------------------------------------------------------------


def stage(name: str) -> tuple[Bus, Front, Back]:
    """A device at some stage of its life."""
    bus = Bus()
    front, back = bus.pair()
    if name == "frontend asleep":
        front.stop()
    elif name == "backing device missing":
        back.there = False
    if name != "just made":
        bus.settle()
    if name == "closed":
        front.close()
        bus.settle()
    return bus, front, back


STAGES = ["just made", "backing device missing", "connected", "closed"]


@pytest.mark.parametrize("name", STAGES)
def test_hot_detach(name: str):
    """Goal: libxl's detach (online 0, backend Closing) ends in Closed at every stage, also before the device ever
    connected: the toolstack waits for it.  Method: the two writes; then the directories go, frontend first."""
    bus, front, back = stage(name)
    bus.ask_to_close(online=False)
    bus.settle()
    assert bus.states(front, back) == (S.Closed, S.Closed) and bus.held() == NOTHING
    bus.toolstack.rm(front.node)
    bus.settle()
    bus.toolstack.rm(back.node)
    bus.settle()
    assert {"F.removed", "B.removed"} <= set(bus.trace)
    assert not bus.toolstack.exists(front.node) and not bus.toolstack.exists(back.node)


@pytest.mark.parametrize("which", ["frontend first", "both at once"])
@pytest.mark.parametrize("name", [*STAGES, "frontend asleep"])
def test_directories_vanish(name: str, which: str):
    """Goal: xl destroy removes directories under the drivers' feet.  Method: rm, at every stage; both are removed, nothing
    is held, and no directory comes back."""
    bus, front, back = stage(name)
    bus.toolstack.rm(front.node)
    if which == "frontend first":
        bus.settle()
    bus.toolstack.rm(back.node)
    bus.settle()
    assert back.state is S.Closed and "B.removed" in bus.trace
    if name != "frontend asleep":
        assert front.state is S.Closed and "F.removed" in bus.trace
    assert bus.held() == NOTHING
    assert not bus.toolstack.exists(front.node) and not bus.toolstack.exists(back.node)


def test_a_backend_that_is_still_to_come():
    """Goal: a frontend may be there first.  Method: its directory alone; then the backend's."""
    bus = Bus()
    bus.attach()
    bus.toolstack.rm(bus.back_node(0))
    front = Front(bus, 0)
    front.start()
    bus.settle()
    assert bus.states(front) == (S.Initialising,) and bus.trace == []
    bus.attach()
    Back(bus, 0).start()
    bus.settle()
    assert bus.states(front) == (S.Connected,)


BUSY = [  # what happens while the backend's I/O is under way
    ("the frontend closes", [lambda b, f: f.close()], False),
    ("the frontend vanishes", [lambda b, f: b.toolstack.rm(f.node)], True),
    ("it closes, then vanishes", [lambda b, f: f.close(), lambda b, f: b.toolstack.rm(f.node)], True),
    (
        "it says Closing, then vanishes",
        [lambda b, f: b.toolstack.write(f"{f.node}/state", 5), lambda b, f: b.toolstack.rm(f.node)],
        True,
    ),
    ("it talks nonsense", [lambda b, f: b.toolstack.write(f"{f.node}/state", "junk")], False),
    (
        "it talks nonsense, then vanishes",
        [lambda b, f: b.toolstack.write(f"{f.node}/state", "junk"), lambda b, f: b.toolstack.rm(f.node)],
        True,
    ),
]


@pytest.mark.parametrize(("acts", "removed"), [case[1:] for case in BUSY], ids=[case[0] for case in BUSY])
def test_a_busy_backend_lets_go_when_its_io_is_done(acts: list[Callable[[Bus, Front], None]], removed: bool):
    """Goal: no mapping is dropped under I/O, and none is forgotten after.  Method: disconnect() says busy; things happen;
    then drained()."""
    bus = Bus()
    front, back = bus.connected()
    back.busy = True
    for act in acts:
        act(bus, front)
        bus.settle()
    assert back.state is not S.Closed and bus.held()["mappings"] == 1 and "B.removed" not in bus.trace
    back.busy = False
    back.drained()
    bus.settle()
    assert back.state is S.Closed and bus.held()["mappings"] == 0
    assert ("B.removed" in bus.trace) == removed


def test_a_busy_frontend_closes_when_its_requests_are_answered():
    """Goal: a backend that is Closing still answers.  Method: the frontend is busy when it hears; then drained()."""
    bus = Bus()
    front, back = bus.connected()
    front.busy = True
    back.switch_state(S.Closing)
    bus.settle()
    assert bus.states(front, back) == (S.Connected, S.Closing)
    front.busy = False
    front.drained()
    bus.settle()
    assert bus.states(front, back) == (S.Closed, S.Closed) and bus.held() == NOTHING


def test_io_that_ends_after_its_domain_is_harmless():
    """Goal: a late completion finds no store connection and no directory, and that is all right.
    Method: stop() while busy, destroy the domain, then drained()."""
    bus = Bus(backend_domid=5)
    _, back = bus.connected()
    back.busy = True
    back.stop()
    bus.back_client.close()
    bus.hypervisor.destroy_domain(5)
    bus.settle()
    back.busy = False
    back.drained()
    assert back.state is S.Closed and not back.domain.maptrack.mappings


def test_stop_leaves_no_watch():
    """Goal: a driver that is unloaded hears nothing more.  Method: stop both; then the states change."""
    bus = Bus()
    front, back = bus.connected()
    front.stop()
    back.stop()
    assert not bus.guest_client.connection.watches and not bus.back_client.connection.watches
    assert bus.held() == NOTHING
    bus.trace.clear()
    bus.say(front, 5)
    bus.say(back, 5)
    assert bus.trace == []
    front.stop()
    back.stop()


LATE: dict[str, Callable[[XenbusDevice], None]] = {
    "fail": lambda device: device.fail(PeerFault("said too late")),
    "finish_closing": lambda device: device.finish_closing(),
    "drained": lambda device: device.drained(),
    "peer_changed": lambda device: device.peer_changed(),
    "switch_state": lambda device: device.switch_state(S.Closing),
}


@pytest.mark.parametrize("word", LATE)
@pytest.mark.parametrize("side", ["front", "back"])
def test_a_late_word_to_a_driver_that_was_stopped(side: str, word: str):
    """Goal: a result that comes when its device is gone does nothing to the next one in the same directory.
    Method: a closed device's driver is stopped, another takes its place and connects; then the old one is told."""
    bus = Bus()
    front, back = bus.connected()
    front.close()
    bus.settle()
    old = front if side == "front" else back
    old.stop()
    if side == "front":
        bus.guest_client.write(f"{front.node}/state", int(S.Initialising))
        front = Front(bus, 0)
        front.start()
    else:
        back = Back(bus, 0)
        back.start()
    bus.settle()
    assert bus.states(front, back) == (S.Connected, S.Connected)
    bus.trace.clear()
    LATE[word](old)
    bus.settle()
    assert bus.states(front, back) == (S.Connected, S.Connected)
    assert bus.held() == CONNECTED and not [entry for entry in bus.trace if "disconnect" not in entry]
    for domid in (0, 7):
        assert bus.toolstack.directory(f"/local/domain/{domid}/error") == []


# --- peers at fault ------------------------------------------------------------------------------------------------------

JUNK = ["abc", "99", "", "-1", "4 ", "0x4", "9", "4\n", "٤", "1" * 100]


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("victim", ["front", "back"])
def test_junk_in_state_costs_that_device_only(victim: str, junk: str):
    """Goal: blame where it belongs: an `error` node, Closed, and nothing held; the other device of the same domains goes on.
    Method: two devices; junk in one `state`."""
    bus = Bus()
    pairs = [bus.connected(ident) for ident in (0, 1)]
    device = pairs[0][0] if victim == "front" else pairs[0][1]
    bus.say(device, junk)
    home = f"/local/domain/{device.domain.domid}"
    error = bus.toolstack.read(f"{home}/error/{device.node.removeprefix(home + '/')}/error")
    assert error is not None and error.startswith("22 ") and f"{device.peer_node}/state" in error
    assert device.state is S.Closed and device.broken
    assert bus.states(*pairs[1]) == (S.Connected, S.Connected)
    bus.say(device, 6)
    assert bus.held() == CONNECTED, "what is left is the other device's"
    errors = bus.toolstack.directory("/local/domain/0/error") + bus.toolstack.directory("/local/domain/7/error")
    assert errors == ["device" if victim == "front" else "backend"]


def test_a_frontend_given_up_stays_down_and_a_backend_tries_again():
    """Goal: a lying backend gets no second chance from the guest; a guest that boots anew gets one from its backend.
    Method: junk, then a proper handshake from the other end."""
    bus = Bus()
    front, back = bus.connected()
    bus.say(front, "junk")
    for said in (2, 4, 5, 6, 2):
        bus.say(front, said)
        assert front.state is S.Closed
    bus = Bus()
    front, back = bus.connected()
    bus.say(back, "junk")
    front.stop()
    bus.say(back, 1)
    again = Front(bus, 0)
    again.start()
    bus.settle()
    assert bus.states(again, back) == (S.Connected, S.Connected) and back.broken is None


HOOKS = [(Front, "negotiate"), (Front, "connect"), (Front, "reconfigured"), (Back, "connect"), (Back, "ready")]


@pytest.mark.parametrize(("side", "hook"), HOOKS)
def test_a_fault_found_in_a_hook(monkeypatch: pytest.MonkeyPatch, side: type[Front] | type[Back], hook: str):
    """Goal: whatever a hook had acquired before it found the fault is given back, and both ends close.
    Method: each hook in turn does its work, then raises."""
    original = getattr(side, hook)

    def faulty(self: Front | Back) -> None:
        original(self)
        raise PeerFault(f"found in {hook}")

    monkeypatch.setattr(side, hook, faulty)
    bus = Bus()
    front, back = bus.pair()
    bus.settle()
    if hook == "reconfigured":
        bus.say(front, 4)
    device = front if side is Front else back
    assert device.broken == f"found in {hook}" and device.state is S.Closed
    other = back if side is Front else front
    assert other.broken is None
    assert bus.states(front, back) == (S.Closed, S.Closed) and bus.held() == NOTHING


def test_a_domain_without_quota_loses_the_device_and_no_more():
    """Goal: the store's refusal in a hook is this device's end, not the program's.  Method: a guest with no nodes left."""
    bus = Bus(quota=Quota(nodes=4))
    front, back = bus.pair()
    bus.settle()
    assert front.broken is not None and "ENOSPC" in front.broken
    assert bus.held()["grants"] == bus.held()["ports"] == 0
    assert back.broken is None


def test_a_driver_domain_that_may_not_read_the_frontend():
    """Goal: a guest that hides its `state` closes its own device.  Method: a backend in domain 5, permissions removed."""
    bus = Bus(backend_domid=5)
    pairs = [bus.connected(ident) for ident in (0, 1)]
    bus.guest_client.set_perms(f"{pairs[0][0].node}/state", [Perm(bus.guest.domid, Access.NONE)])
    pairs[0][1].peer_changed()
    bus.settle()
    assert pairs[0][1].state is S.Closed
    assert bus.states(*pairs[1]) == (S.Connected, S.Connected)
