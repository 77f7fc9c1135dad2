"""Goal: a domain's ring carries any stream of messages, and whatever is in its page harms nobody but the domain itself.
Method: real pages, grants and event channels; a guest's own end of the ring (wireworld.py); indices anywhere in 2**32, and
pages that change between any two looks at them. The rules are docs/misc/xenstore-ring.txt."""

from __future__ import annotations

from random import Random

import pytest

from tests.xenmodel.xenstore.wireworld import WORD, Guest, World
from xenmodel.public.io.xs_wire import (
    SOCKMSG,
    XENSTORE_CONNECTED,
    XENSTORE_ERROR_NONE,
    XENSTORE_ERROR_PROTO,
    XENSTORE_ERROR_RINGIDX,
    XENSTORE_PAYLOAD_MAX,
    XENSTORE_RECONNECT,
    XENSTORE_RING_SIZE,
    XENSTORE_SERVER_FEATURE_RECONNECTION,
    XsType,
)
from xenmodel.ring import U32
from xenmodel.types import Domid
from xenmodel.xenstore.domain import FEATURES
from xenmodel.xenstore.ring import StoreRing
from xenmodel.xenstore.upkeep import problems
from xenmodel.xenstore.wire import join, pack

STARTS = [0, 1, 1000, 2**31 - 5, 2**32 - 3000, 2**32 - 1]
INDICES = ("req_cons", "req_prod", "rsp_cons", "rsp_prod")


def ring_of(world: World, domid: int = 1) -> StoreRing:
    return world.daemon.rings[Domid(domid)].ring


def others_are_served(world: World) -> None:
    world.run("2 READ data| -> \"\"\n0 READ /tool| -> \"\"\n2 WATCH data|t|\n2 UNWATCH data|t|")
    assert problems(world.store) == []


def reconnect(world: World, guest: Guest) -> None:
    guest["connection"] = XENSTORE_RECONNECT
    guest.forget()
    guest.kick()
    world.settle()


# --- the stream -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", STARTS)
def test_messages_larger_than_the_ring(start: int) -> None:
    """Goal: length and place do not matter.  Method: values of up to 1900 bytes there and back, names of thousands, from
    indices that wrap; each message in full before the next, and several on their way."""
    world = World()
    guest = world.guest("1")
    guest.start_at(start)
    for size in (0, 1, 999, 1000, 1008, 1024, 1025, 1900):
        value = Random(size).randbytes(size)
        assert world.ask("1", XsType.WRITE, join(f"data/{size}") + value).body == b"OK\0"
        assert world.ask("1", XsType.READ, join(f"data/{size}")).body == value
    assert world.ask("1", 99, bytes(XENSTORE_PAYLOAD_MAX)).body == b"ENOSYS\0"
    ids = [guest.post(XsType.READ, join("data/1900")) for _ in range(30)]
    world.settle()
    assert [message.req_id for message in guest.log[-30:]] == ids
    assert {len(message.body) for message in guest.log[-30:]} == {1900}
    assert (guest["rsp_prod"] - start) & U32 > 60_000 and guest["error"] == XENSTORE_ERROR_NONE
    others_are_served(world)


@pytest.mark.parametrize("seed", range(20))
def test_any_stream_in_any_pieces(seed: int) -> None:
    """Goal: a ring is a stream.  Method: two guests whose requests reach the ring byte by byte or in lumps, that read now
    and then, turns in an order drawn from the seed; every reply comes once, in order, with the right bytes."""
    random = Random(seed)
    world = World(order=random.randrange)
    guests = {name: world.guest(name) for name in ("1", "2")}
    expected: dict[str, list[tuple[int, bytes]]] = {"1": [], "2": []}
    stream = {}
    for name, guest in guests.items():
        guest.start_at(random.choice(STARTS))
        guest.log.clear()
        pieces = []
        for number in range(60):
            value = random.randbytes(random.choice((0, 1, 30, 900)))
            pieces.append(pack(XsType.WRITE, 2 * number, 0, join(f"data/{number % 3}") + value))
            pieces.append(pack(XsType.READ, 2 * number + 1, 0, join(f"data/{number % 3}")))
            expected[name] += [(2 * number, b"OK\0"), (2 * number + 1, value)]
        stream[name] = b"".join(pieces)
    while any(stream.values()):
        name = random.choice([name for name, rest in stream.items() if rest])
        count = random.choice((1, 7, 16, 500, 3000))
        guests[name].send(stream[name][:count])
        stream[name] = stream[name][count:]
        if random.random() < 0.3:
            guests[name].read_on(random.random() < 0.5)
        world.hypervisor.deliver(turns=random.randrange(4))
    for name, guest in guests.items():
        guest.read_on()
        world.settle()
        assert [(message.req_id, message.body) for message in guest.log] == expected[name]
        guest.log.clear()
    others_are_served(world)


def test_events_and_replies_share_the_ring() -> None:
    """Goal: events of others wait for room and come in order, between whole messages.  Method: a guest that does not read
    while domain 0 writes; what it gets afterwards."""
    world = World().run("1 WATCH data|t|\n1 events -> data:t")
    guest = world.guest("1")
    guest.log.clear()
    guest.read_on(False)
    for number in range(100):
        world.run(f"0 WRITE /local/domain/1/data/{number}|x")
    asked = guest.post(XsType.READ, join("data/99"))
    world.settle()
    assert guest["rsp_prod"] - guest["rsp_cons"] == XENSTORE_RING_SIZE and guest.log == []
    guest.read_on()
    world.settle()
    assert guest.events == [f"data/{number}:t" for number in range(100)]
    reply = guest.reply(asked)
    assert reply is not None and reply.body == b"x"


# --- what cannot be -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    ("index", "by"), [("req_prod", 1025), ("req_prod", -1), ("req_prod", 2**31), ("req_cons", 1), ("req_cons", -1025)]
)
def test_indices_that_cannot_be_end_the_connection(index: str, by: int, start: int) -> None:
    """Goal: `error` says so, all the connection had is dropped, and the page is left alone until the guest asks for a
    reconnection, which brings it back.  Method: each index; then more kicks, events and requests."""
    world = World()
    guest = world.guest("1")
    guest.start_at(start)
    world.run("1 WATCH data|t|\n1 TRANSACTION_START | -> $t")
    guest[index] = (guest[index] + by) & U32
    told = guest.notified
    guest.kick()
    world.settle()
    assert guest["error"] == XENSTORE_ERROR_RINGIDX and guest.notified > told
    assert len(world.lines) == 1 and "domain 1" in world.lines[0]
    assert world.store.open_transactions == 0 and world.store.usage(Domid(1))[1:3] == (0, 0)
    guest.start_at(start)
    guest["req_prod"] = (start + 1024) & U32
    page, told = bytes(guest.page), guest.notified
    for _ in range(3):
        guest.kick()
        world.run("0 WRITE /local/domain/1/data|1")
    assert bytes(guest.page) == page and guest.notified == told and len(world.lines) == 1, "it is left alone"
    others_are_served(world)
    reconnect(world, guest)
    assert [guest[index] for index in INDICES] == [0] * 4
    assert (guest["connection"], guest["error"]) == (XENSTORE_CONNECTED, XENSTORE_ERROR_NONE)
    world.run("1.$t READ data| -> ENOENT\n1 UNWATCH data|t| -> ENOENT\n1 READ data| -> 1")


@pytest.mark.parametrize("index", ["rsp_prod", "rsp_cons"])
def test_response_indices_that_cannot_be(index: str) -> None:
    """Goal: the same in the other direction, when there is something to say.  Method: each of its indices."""
    world = World()
    guest = world.guest("1")
    guest[index] = (guest[index] + (1025 if index == "rsp_prod" else 1)) & U32
    guest.post(XsType.READ, join("data"))
    world.settle()
    assert guest["error"] == XENSTORE_ERROR_RINGIDX and guest.log == []
    others_are_served(world)
    reconnect(world, guest)
    world.run("1 READ data| -> \"\"")


@pytest.mark.parametrize("length", [XENSTORE_PAYLOAD_MAX + 1, U32])
def test_a_message_that_is_too_long(length: int) -> None:
    """Goal: XENSTORE_ERROR_PROTO as soon as its header is there; what came before it is done.  Method: then reconnect."""
    world = World()
    guest = world.guest("1")
    guest.send(pack(XsType.WRITE, 1, 0, join("data") + b"before") + SOCKMSG.pack(XsType.READ, 2, 0, length))
    world.settle()
    assert guest["error"] == XENSTORE_ERROR_PROTO and len(world.lines) == 1
    world.run("0 READ /local/domain/1/data| -> before")
    others_are_served(world)
    reconnect(world, guest)
    world.run("1 READ data| -> before")


# --- reconnection ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", STARTS)
def test_a_reconnection_is_a_new_connection(start: int) -> None:
    """Goal: watches, transactions, half messages and what is on its way end; the ring is empty and the guest told.
    Method: all of these, then a reconnection; the store's own data stay, others notice nothing."""
    world = World().run("1 WATCH data|t|\n1 TRANSACTION_START | -> $t\n1.$t WRITE data/x|1\n1 WRITE data/y|1")
    guest = world.guest("1")
    guest.start_at(start)
    guest.read_on(False)
    for _ in range(100):
        guest.post(XsType.READ, join("data/y"))
    world.settle()
    guest.send(pack(XsType.WRITE, 1, 0, join("data/z") + b"half a message")[:-3])
    told = guest.notified
    reconnect(world, guest)
    assert [guest[index] for index in INDICES] == [0] * 4 and guest.notified > told
    guest.log.clear()
    guest.read_on()
    world.run("""
        1.$t READ data| -> ENOENT
        1 UNWATCH data|t| -> ENOENT
        1 READ data/x| -> ENOENT
        1 READ data/y| -> 1
        1 READ data/z| -> ENOENT
        1 WATCH data|t|
        1 IS_DOMAIN_INTRODUCED 1| -> EACCES
        0 IS_DOMAIN_INTRODUCED 1| -> T|
    """)
    assert guest.events == ["data:t"] and len(guest.log) == 8
    assert world.store.usage(Domid(1))[1:5] == (1, 0, 1, 0)


def test_reconnecting_all_the_time() -> None:
    """Goal: it costs its domain its turns and nothing else.  Method: a thousand times, with a watch and a transaction."""
    world = World()
    guest = world.guest("1")
    before = len(world.dom0.events.channels), len(world.daemon.domains.all())
    for _ in range(1000):
        guest.post(XsType.WATCH, join("data", "t"))
        guest.post(XsType.TRANSACTION_START)
        reconnect(world, guest)
    usage = world.store.usage(Domid(1))
    assert usage[1:5] == (0, 0, 1, 0) and world.store.open_transactions == 0
    assert (len(world.dom0.events.channels), len(world.daemon.domains.all())) == before and not world.lines
    others_are_served(world)


def test_who_was_not_offered_it_cannot_reconnect() -> None:
    """Goal: `connection` has no meaning without the feature.  Method: SET_FEATURE takes it away before INTRODUCE."""
    world = World()
    guest = world.create(3, introduce=False)
    world.run(f"0 SET_FEATURE 3|{FEATURES & ~XENSTORE_SERVER_FEATURE_RECONNECTION}|\n0 INTRODUCE 3|1|1|\n3 WATCH x|t|")
    guest["connection"] = XENSTORE_RECONNECT
    guest.kick()
    world.settle()
    assert guest["connection"] == XENSTORE_RECONNECT
    world.run("3 WATCH x|t| -> EEXIST")


def test_domain_0_has_a_ring_too() -> None:
    """Goal: the kernel of domain 0 speaks through a ring with domain 0's rights.  Method: requests only it may send."""
    world = World()
    guest = world.clients["0r"] = Guest(world.hypervisor, world.dom0)
    world.daemon.serve_own_domain(guest.page, guest.port)
    world.run("""
        0r WRITE /a|1
        0r CONTROL check| -> OK|
        0r WATCH domid|t|
        0 WRITE domid|0
        0r events -> domid:t domid:t
        0r IS_DOMAIN_INTRODUCED 1| -> T|
    """)
    guest["req_prod"] = guest["req_cons"] - 1
    guest.kick()
    world.settle()
    assert guest["error"] and world.daemon.own_port == guest.port
    world.run("0 READ /a| -> 1\n1 READ data| -> \"\"")


# --- pages that change meanwhile ------------------------------------------------------------------------------------------


class Scribbled:
    """The words of a page that another processor writes into between any two looks of ours."""

    def __init__(self, words: memoryview, random: Random, often: float) -> None:
        self.words, self.random, self.often = words, random, often
        self.looks = 0

    def __getitem__(self, index: int) -> int:
        self.looks += 1
        random = self.random
        if random.random() < self.often:
            victim = random.choice([WORD[name] for name in (*INDICES, "connection", "error", "server_features")])
            near = (self.words[victim] + random.randrange(-1100, 1100)) & U32
            self.words[victim] = random.choice((near, near, near, random.randrange(2**32), random.randrange(2)))
        return int(self.words[index])

    def __setitem__(self, index: int, value: int) -> None:
        self.words[index] = value


@pytest.mark.parametrize("seed", range(40))
def test_a_page_that_changes_while_it_is_served(seed: int) -> None:
    """Goal: no value at any moment raises, hangs or reaches anybody else; memory outside the ring is not touched.
    Method: words that change as they are looked at, more or less often, and garbage in the rings; the page's rest and the
    page after it stay as they are, others are served, and each kick costs a bounded number of looks."""
    random = Random(seed)
    world = World(order=random.randrange)
    guest, ring = world.guest("1"), ring_of(world)
    guest.deaf = True
    after = guest.domain.memory.run(guest.domain.memory.allocate())
    scribbled = Scribbled(guest.words, random, random.choice((0.01, 0.1, 0.5)))
    ring.words = scribbled  # type: ignore[assignment]
    ring.requests.words = ring.responses.words = scribbled  # type: ignore[assignment]
    for _ in range(150):
        if random.random() < 0.5:
            guest.page[:1024] = pack(XsType.READ, 1, 0, join("data"))[:21] * 48 + bytes(16)
        elif random.random() < 0.3:
            guest.page[:1024] = random.randbytes(1024)
        guest["req_prod"] = (guest["req_cons"] + random.randrange(1025)) & U32
        before = scribbled.looks
        guest.domain.events.send(guest.port)
        world.hypervisor.deliver(turns=8)
        assert scribbled.looks - before < 5000
        if random.random() < 0.2:
            guest["connection"] = XENSTORE_RECONNECT
    ring.words = ring.requests.words = ring.responses.words = guest.words
    world.settle()
    assert not any(guest.page[2076:]) and not any(after)
    assert len(ring.peer.out) < 80_000 and world.store.usage(Domid(1)).connections <= 1
    guest.deaf = False
    reconnect(world, guest)
    world.run("1 READ data| -> \"\"")
    others_are_served(world)


def test_a_broken_ring_is_complained_of_once() -> None:
    """Goal: a guest cannot fill the log.  Method: wrong indices, many kicks, and reconnections that do it again."""
    world, said = World(), []  # type: tuple[World, list[str]]
    world.daemon.log = said.append
    guest = world.guest("1")
    for _ in range(20):
        guest["req_prod"] = guest["req_cons"] + 5000
        for _ in range(50):
            guest.kick()
            world.settle()
        assert guest["error"] and len(said) == 1
        guest["connection"] = 1
        guest.kick()
        world.settle()
    assert world.hypervisor.idle, "and nothing is done for it any more"
