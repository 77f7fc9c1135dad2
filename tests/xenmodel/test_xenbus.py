"""Goal: the two tables of the handshake: what each end does in each of its states when the other says each of its own.
Method: one driver against a peer that is only a number in the store; the whole table is written out below.
"""

from __future__ import annotations

import pytest

from tests.xenmodel.bus import Back, Bus, Front
from xenmodel.public.io.xenbus import XenbusState
from xenmodel.xenbus import XenbusDevice

S = XenbusState
Answer = tuple[XenbusState, str]  # the state afterwards, and the hooks that ran

CLOSED: Answer = (S.Closed, "disconnect")
REMOVED: Answer = (S.Closed, "disconnect removed")
TALKED: Answer = (S.Initialised, "negotiate")
LIVE: Answer = (S.Connected, "negotiate connect")

# Frontend: own state -> peer's state -> answer; what is not listed asks for nothing.
FRONTEND: dict[XenbusState, dict[XenbusState, Answer]] = {
    S.Initialising: {S.InitWait: TALKED, S.Initialised: TALKED, S.Connected: LIVE},
    S.InitWait: {S.Unknown: CLOSED, S.Closing: CLOSED, S.Closed: CLOSED},
    S.Initialised: {
        S.Unknown: CLOSED,
        S.Connected: (S.Connected, "connect"),
        S.Closing: CLOSED,
        S.Closed: CLOSED,
    },
    S.Connected: {
        S.Unknown: CLOSED,
        S.Connected: (S.Connected, "reconfigured"),
        S.Closing: CLOSED,
        S.Closed: CLOSED,
    },
    S.Closing: {S.Unknown: CLOSED, S.Closing: CLOSED, S.Closed: CLOSED},
    S.Closed: {S.InitWait: TALKED, S.Initialised: TALKED, S.Connected: LIVE},
}
# The same when the toolstack takes the device away (`online` 0): Closing, Closed and Unknown end it in every state, but a
# backend that was never seen may still come.
GOING = {S.Unknown: REMOVED, S.Closing: REMOVED, S.Closed: REMOVED}
FRONTEND_GOING = {own: {**row, **GOING} for own, row in FRONTEND.items()}
del FRONTEND_GOING[S.Initialising][S.Unknown]

AGAIN: Answer = (S.InitWait, "disconnect offer")
BACKEND: dict[XenbusState, dict[XenbusState, Answer]] = {
    S.InitWait: {
        S.Unknown: REMOVED,
        S.Initialised: (S.Connected, "connect"),
        S.Connected: (S.Connected, "connect"),  # netfront never says Initialised
        S.Closing: (S.Closing, ""),
        S.Closed: CLOSED,
    },
    # Initialising here: the frontend closed and began again before we looked
    S.Connected: {S.Unknown: REMOVED, S.Initialising: AGAIN, S.Closing: (S.Closing, ""), S.Closed: CLOSED},
    S.Closing: {S.Unknown: REMOVED, S.Initialising: AGAIN, S.Closed: CLOSED},
    S.Closed: {S.Unknown: REMOVED, S.Initialising: (S.InitWait, "offer"), S.Closed: CLOSED},
}
BACKEND_GOING = {own: {**row, S.Closed: REMOVED} for own, row in BACKEND.items()}


def put_in_state(bus: Bus, device: XenbusDevice, own: XenbusState) -> None:
    """A started device with a silent peer, moved to `own`, in memory and in the store."""
    bus.toolstack.write(f"{device.peer_node}/state", int(S.Reconfiguring))  # a state that asks nothing of anybody
    device.start()
    bus.settle()
    device.switch_state(own)
    bus.trace.clear()


def hooks(bus: Bus) -> str:
    return " ".join(entry.split(".")[1] for entry in bus.trace)


@pytest.mark.parametrize("peer", S)
@pytest.mark.parametrize("online", [True, False], ids=["online", "going"])
@pytest.mark.parametrize("own", FRONTEND)
def test_frontend_table(own: XenbusState, peer: XenbusState, online: bool):
    """Goal: every pair of states.  Method: put the frontend there, let the peer speak, compare state, node and hooks."""
    bus = Bus()
    bus.attach()
    front = Front(bus, 0)
    put_in_state(bus, front, own)
    bus.toolstack.write(f"{front.peer_node}/online", int(online))
    bus.say(front, int(peer))
    expected = (FRONTEND if online else FRONTEND_GOING)[own].get(peer, (own, ""))
    assert (bus.states(front)[0], hooks(bus)) == expected
    assert front.broken is None


@pytest.mark.parametrize("peer", S)
@pytest.mark.parametrize("online", [True, False], ids=["online", "going"])
@pytest.mark.parametrize("own", BACKEND)
def test_backend_table(own: XenbusState, peer: XenbusState, online: bool):
    """Goal: every pair of states.  Method: as above; the frontend's keys are there but nobody stands behind them."""
    bus = Bus()
    bus.attach()
    back = Back(bus, 0)
    put_in_state(bus, back, own)
    gref = bus.guest.grants.grant_access(bus.backend.domid, bus.guest.memory.allocate())
    bus.toolstack.write(f"{back.peer_node}/ring-ref", gref)
    bus.toolstack.write(f"{back.peer_node}/event-channel", bus.guest.events.alloc_unbound(bus.backend.domid))
    bus.toolstack.write(f"{back.node}/online", int(online))
    bus.say(back, int(peer))
    expected = (BACKEND if online else BACKEND_GOING)[own].get(peer, (own, ""))
    assert (bus.states(back)[0], hooks(bus)) == expected
    assert back.broken is None


# --- whole conversations with a scripted peer ----------------------------------------------------------------------------

FRONT_TALKS = [  # what the backend says, one by one; the frontend's state after each
    ("the usual", "2 4 5 6", "3 4 6 6"),
    ("no InitWait", "3 4 6", "3 4 6"),
    ("Connected at once", "4 5", "4 6"),
    ("Closed before Closing", "2 4 6 5", "3 4 6 6"),
    ("gives up before it connects", "2 5 6", "3 6 6"),
    ("closes and comes back three times", "2 4 5 6 2 4 6 2 4 5 2 4", "3 4 6 6 3 4 6 3 4 6 3 4"),
    ("resizes twice", "2 4 4 4 5", "3 4 4 4 6"),
    ("says the same again", "2 2 2 4 5 5 6 6", "3 3 3 4 6 6 6 6"),
    ("reconfigures", "2 4 7 8 4", "3 4 4 4 4"),
]


@pytest.mark.parametrize(("says", "states"), [t[1:] for t in FRONT_TALKS], ids=[t[0] for t in FRONT_TALKS])
def test_frontend_talks_to(says: str, states: str):
    """Goal: backends as they are in the field.  Method: a list of what it says; every answer; nothing held when closed."""
    bus = Bus()
    bus.attach()
    front = Front(bus, 0)
    front.start()
    answers = []
    for said in says.split():
        bus.say(front, said)
        answers.append(str(int(bus.states(front)[0])))
        assert any(bus.held().values()) == (front.state in (S.Initialised, S.Connected))
    assert " ".join(answers) == states


BACK_TALKS = [  # what the frontend says, one by one; the backend's state after each. Before: Initialising and InitWait
    ("the usual", "3 4 5 6", "4 4 5 6"),
    ("no Initialised (netfront)", "4 5 6", "4 5 6"),
    ("Closed without Closing (hot detach)", "3 4 6", "4 4 6"),
    ("Closed before Closing", "3 4 6 5", "4 4 6 6"),
    ("Windows: closes before it ever connects", "5 6 1 3 4", "5 6 2 4 4"),
    ("Windows, twice", "5 6 1 5 6 1 3 4", "5 6 2 5 6 2 4 4"),
    ("Windows, in too much of a hurry", "5 1 3 4", "5 2 4 4"),
    ("reconnects three times", "3 4 5 6 1 3 4 5 6 1 3 4 6 1 3 4", "4 4 5 6 2 4 4 5 6 2 4 4 6 2 4 4"),
    ("reboots without a word", "3 4 1 3 4", "4 4 2 4 4"),
    ("flaps", "3 1 3 1 3 1 3", "4 2 4 2 4 2 4"),
    ("says the same again", "3 3 4 4 5 5 6 6", "4 4 4 4 5 5 6 6"),
    ("reconfigures", "3 4 7 8 4", "4 4 4 4 4"),
]


@pytest.mark.parametrize(("says", "states"), [t[1:] for t in BACK_TALKS], ids=[t[0] for t in BACK_TALKS])
def test_backend_talks_to(says: str, states: str):
    """Goal: frontends as they are in the field.  Method: a list of what it says, with a new ring before each Initialised
    or Connected after a close; every answer; one mapping while connected and none when not."""
    bus = Bus()
    bus.attach()
    back = Back(bus, 0)
    back.start()
    bus.settle()
    assert bus.states(back) == (S.InitWait,)
    answers = []
    for said in says.split():
        if said in "34" and back.state is S.InitWait:
            gref = bus.guest.grants.grant_access(bus.backend.domid, bus.guest.memory.allocate())
            bus.toolstack.write(f"{back.peer_node}/ring-ref", gref)
            bus.toolstack.write(f"{back.peer_node}/event-channel", bus.guest.events.alloc_unbound(bus.backend.domid))
        connected = len(bus.backend.maptrack.mappings)
        bus.say(back, said)
        answers.append(str(int(bus.states(back)[0])))
        expected = 1 if back.state is S.Connected else connected if back.state is S.Closing else 0
        assert len(bus.backend.maptrack.mappings) == len(bus.backend.events.channels) == expected
    assert " ".join(answers) == states


@pytest.mark.parametrize("skipped", ["3 4 5 6 1", "5 6 1", "6 1", "4 5", "3 4"])
def test_a_backend_that_looks_late_still_gets_there(skipped: str):
    """Goal: watch events may be merged.  Method: several states are written before the backend looks; then it is led to
    Connected by the rest of a normal handshake."""
    bus = Bus()
    front, back = bus.connected()
    front.stop()
    for said in skipped.split():
        bus.toolstack.write(f"{back.peer_node}/state", said)
    bus.settle()
    for said in ("5", "6", "1") if skipped[-1] != "1" else ():
        bus.say(back, said)
    again = Front(bus, 0)
    again.start()
    bus.settle()
    assert bus.states(again, back) == (S.Connected, S.Connected)


def test_a_backing_device_that_comes_late():
    """Goal: blkback without `physical-device` waits in InitWait.  Method: ready() is False until the script has run."""
    bus = Bus()
    front, back = bus.pair()
    back.there = False
    bus.settle()
    assert bus.states(front, back) == (S.Initialised, S.InitWait)
    back.there = True
    back.peer_changed()
    bus.settle()
    assert bus.states(front, back) == (S.Connected, S.Connected)


# --- how a state is written ----------------------------------------------------------------------------------------------


def test_a_switch_writes_only_changes():
    """Goal: no event for no change, as with Linux's READ before WRITE.  Method: a watch on the node; what it saw."""
    bus = Bus()
    bus.attach()
    front = Front(bus, 0)
    put_in_state(bus, front, S.Initialising)
    seen: list[str | None] = []
    bus.toolstack.watch(f"{front.node}/state", lambda path: seen.append(bus.toolstack.read(path)))
    bus.settle()
    for state in (S.Initialising, S.Initialised, S.Initialised, S.Connected, S.Connected, S.Closing, S.Closed, S.Closed):
        front.switch_state(state)
        bus.settle()
    assert seen == ["1", "3", "4", "5", "6"]
    assert not bus.guest_client.connection.transactions


@pytest.mark.parametrize("side", ["front", "back"])
def test_a_directory_that_the_toolstack_removed_is_not_made_again(side: str):
    """Goal: no ghost directories, also where the driver's domain might make one.  Method: remove, then switch state."""
    bus = Bus()
    front, back = bus.connected()
    device: XenbusDevice = front if side == "front" else back
    bus.toolstack.rm(device.node)
    device.switch_state(S.Closed)
    assert not bus.toolstack.exists(device.node)
    assert device.state is S.Closed and device.broken is None
