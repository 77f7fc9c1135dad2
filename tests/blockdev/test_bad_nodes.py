"""Goal: a node with a value that cannot be closes that device, with the node's name in `error`, and no other.
Method: one table per side; a scripted peer writes the bad value, another disk of the same guest must go on working."""

from __future__ import annotations

import pytest

from tests.blockdev.scripted import ScriptedBack, ScriptedFront
from tests.blockdev.world import World
from xenmodel.public.event_channel import EVTCHNSTAT_interdomain
from xenmodel.testing import Footprint

GARBAGE = ["", "x", "-1", "1.5", " 1", "0x10", "4294967296", "9" * 400, "\udcff", "1\n"]

FRONT = [
    *(("ring-ref", value) for value in GARBAGE),
    *(("event-channel", value) for value in GARBAGE),
    *(("feature-persistent", value) for value in GARBAGE[:5]),
    *(("multi-queue-num-queues", value) for value in (*GARBAGE, "0", "5", "65535")),
    *(("ring-page-order", value) for value in (*GARBAGE, "5", "16", "17", "32", "64")),
    *(("num-ring-pages", value) for value in (*GARBAGE, "0", "3", "5", "32", "4294967295")),
    *(("protocol", value) for value in ("x86-abi", "\udcff", "x" * 1000)),
    ("ring-ref", "0"),
    ("ring-ref", "511"),
    ("ring-ref", "4000000"),
    ("event-channel", "0"),
    ("event-channel", "4095"),
    ("event-channel", "4096"),
    ("event-channel", "4000000000"),
    ("ring-page-order", "1"),  # and there is no ring-ref1
    ("multi-queue-num-queues", "2"),  # and there is no queue-1
    ("state", "9"),
    ("state", "x"),
]


def _id(case: tuple[str, str]) -> str:
    return f"{case[0]}={case[1][:12]!a}"


@pytest.mark.parametrize("case", FRONT, ids=_id)
def test_a_frontend_writes_nonsense(case: tuple[str, str]) -> None:
    """Goal: as above, and everything that was mapped or bound on the way is let go.  Method: connect with the bad key."""
    key, value = case
    world = World(fronts=False)
    disk, other = world.attach("xvda"), world.attach("xvdb")
    good = ScriptedFront(world, other).connect()
    front = ScriptedFront(world, disk)
    footprint = Footprint(world.hypervisor)
    nodes = {"ring-ref": str(front.gref), "event-channel": str(front.port), key: value}
    for name, text in nodes.items():
        if name != "state":
            front.set(name, text)
    front.set("state", nodes.get("state", "3"))
    assert disk.states()[1] == "6"
    assert key.split("-")[0] in (disk.errors()[1] or "") or "ring" in (disk.errors()[1] or "")
    # the nodes of the scripted frontend and the error are new; nothing else may be
    assert footprint.grown() == []
    gref, _ = good.data_page()
    assert other.states() == ("3", "4") and good.ask(good.slot(0, [(gref, 0, 7)])).status == 0
    world.close()


@pytest.mark.parametrize("key", ["ring-ref", "event-channel", "protocol", "feature-persistent"])
def test_a_frontend_leaves_a_key_out(key: str) -> None:
    """Goal: what has a default is assumed, what has none is missed.  Method: all keys but one."""
    world = World(fronts=False)
    disk = world.attach()
    front = ScriptedFront(world, disk)
    for name, value in (("ring-ref", front.gref), ("event-channel", front.port)):
        if name != key:
            front.set(name, value)
    front.set("state", 3)
    assert disk.states()[1] == ("4" if key in ("protocol", "feature-persistent") else "6")
    world.close()


def test_two_disks_cannot_share_an_event_channel() -> None:
    world = World(fronts=False)
    first, second = world.attach("xvda"), world.attach("xvdb")
    front = ScriptedFront(world, first).connect()
    thief = ScriptedFront(world, second)
    thief.port = front.port
    thief.connect()
    assert second.states()[1] == "6" and "event-channel" in (second.errors()[1] or "")
    channel = world.guest.events.channels[front.port]
    assert channel.state == EVTCHNSTAT_interdomain
    gref, _ = front.data_page()
    assert front.ask(front.slot(0, [(gref, 0, 7)])).status == 0
    world.close()


BEFORE = [
    *(("max-ring-page-order", value) for value in GARBAGE),
    *(("max-ring-pages", value) for value in GARBAGE),
    *(("multi-queue-max-queues", value) for value in GARBAGE),
]
AFTER = [
    *(("sectors", value) for value in ("x", "-8", "9" * 30, str(2**63), "")),
    *(("sector-size", value) for value in (*GARBAGE, "0", "1", "511", "513", "768", "8192", "2147483648")),
    *(("physical-sector-size", value) for value in (*GARBAGE, "0", "256", "768")),
    *(("info", value) for value in GARBAGE),
    *(("feature-max-indirect-segments", value) for value in GARBAGE),
    *(("feature-flush-cache", value) for value in GARBAGE),
    *(("feature-barrier", value) for value in GARBAGE),
    *(("feature-persistent", value) for value in GARBAGE),
    *(("feature-discard", value) for value in GARBAGE),
]


def _other_disk_works(world: World) -> None:
    back = ScriptedBack(world, world.attach("xvdb"))
    back.connect()
    command = back.disk.start(0, 0, 512)
    world.settle()
    ((op, _, ident, _, _),) = back.take()
    back.answer(ident, op)
    assert back.disk.finish(command) == 0


@pytest.mark.parametrize("case", BEFORE, ids=_id)
def test_a_backend_offers_nonsense(case: tuple[str, str]) -> None:
    key, value = case
    world = World(backs=False)
    disk = world.attach()
    footprint = Footprint(world.hypervisor)
    ScriptedBack(world, disk).set(key, value)
    ScriptedBack(world, disk).set("state", 2)
    assert disk.states()[0] == "6" and key in (disk.errors()[0] or "")
    assert footprint.grown() == []
    _other_disk_works(world)
    world.close()


@pytest.mark.parametrize("case", AFTER, ids=_id)
def test_a_backend_connects_with_nonsense(case: tuple[str, str]) -> None:
    """Goal: as above, and what was submitted meanwhile fails instead of waiting for ever.  Method: a read before it."""
    key, value = case
    world = World(backs=False)
    disk = world.attach()
    back = ScriptedBack(world, disk)
    command = disk.start(0, 0, 4096)
    back.connect(**{key.replace("-", "_"): value})
    assert disk.states()[0] == "6" and key in (disk.errors()[0] or "")
    assert disk.finish(command) == -1
    _other_disk_works(world)
    world.close()
