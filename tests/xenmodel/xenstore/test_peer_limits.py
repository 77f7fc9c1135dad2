"""Goal: no client makes others wait, or the server grow: who has too much outstanding, in memory, unread or written waits.
Method: clients over rings and streams with a clock that the test moves; each limit reached, what waits counted, and that
it goes on when it may. Expected numbers are the daemon's (domain.c, core.c)."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from tests.xenmodel.xenstore.wireworld import Client, Guest, World, requests
from xenmodel.public.io.xs_wire import XsType
from xenmodel.ring import BytePipe
from xenmodel.types import Domid
from xenmodel.xenstore.peer import EVENTS_MOST, OUT_MOST, TURN
from xenmodel.xenstore.quota import Quota
from xenmodel.xenstore.store import EVENT_TIMEOUT_S
from xenmodel.xenstore.upkeep import problems
from xenmodel.xenstore.wire import MESSAGE_MAX, join

HOME = "/local/domain/1/data"
READ = (XsType.READ, join(HOME))


def replies(client: Client) -> int:
    return sum(message.type != XsType.WATCH_EVENT for message in client.log)


def times(world: World, quota: str, domid: int = 1) -> int:
    """How often a limit was in a domain's way."""
    refusal = world.daemon.domains.record(Domid(domid)).refused.get(quota)
    return refusal.times if refusal else 0


def watched(world: World, who: str, path: str = HOME) -> None:
    """`who` may read what domain 1 writes, and watches it; every write of another value is another event."""
    world.run(f"0 SET_PERMS {path}|n1|r2|\n{who} WATCH {path}|t|\n{who} events -> {path}:t")


def writes(count: int, first: int = 0) -> bytes:
    return requests(*((XsType.WRITE, join(f"{HOME}/{n}")) for n in range(first, first + count)), first=1000 + first)


def rewrites(count: int) -> bytes:
    """Of a node that is there: each costs one credit."""
    return requests(*[(XsType.WRITE, join(HOME) + b"%d" % number) for number in range(count)], first=1000)


# --- outstanding requests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["1", "1b"])
@pytest.mark.parametrize("reader", ["0b", "2", "2b"])
def test_who_causes_events_that_nobody_reads_waits(who: str, reader: str) -> None:
    """Goal: 20 requests may be outstanding, the next is served when the other has read.
    Method: a reader that stops; what fits between the two is served, then no more; then it reads again."""
    world = World()
    watched(world, reader)
    victim, writer = world.client(reader), world.client(who)
    victim.read_on(False)  # type: ignore[attr-defined]
    writer.log.clear()
    writer.send(writes(300))
    world.wait(1)
    served = replies(writer)
    usage = world.store.usage(Domid(1))
    assert usage.outstanding == 20 and 20 <= served <= 20 + (1024 + EVENTS_MOST) // 30 + 2
    waited = times(world, "outstanding")
    assert 1 <= waited <= served
    for _ in range(5):
        world.client("1").push()
        world.guest("1").kick()
        assert world.ask("0", XsType.READ, join(HOME)).body == b""
    assert (replies(writer), times(world, "outstanding")) == (served, waited), "it is the same wait"
    victim.read_on()  # type: ignore[attr-defined]
    world.wait(1)
    assert replies(writer) == 300 and len(victim.events) == 301 and world.store.usage(Domid(1)).outstanding == 0
    assert problems(world.store) == [] and not world.daemon._stalled


def test_other_requests_of_a_domain_that_waits_wait_too_but_not_those_of_others() -> None:
    """Goal: the domain is not read from, whatever it asks and over which connection.  Method: one stops reading; all ask."""
    world = World()
    watched(world, "2b")
    world.stream("2b").read_on(False)
    world.client("1").send(writes(300))
    world.wait(0.1)
    waiting = [world.client("1b").post(*READ), world.client("1c").post(*READ)]
    assert world.ask("2", XsType.READ, join("data")).body == b"" and world.ask("0", *READ).body == b""
    world.wait(1)
    assert [world.client(name).reply(req_id) for name, req_id in zip(("1b", "1c"), waiting, strict=True)] == [None, None]
    world.stream("2b").read_on()
    world.wait(1)
    assert all(world.client(name).reply(req_id) for name, req_id in zip(("1b", "1c"), waiting, strict=True))


@pytest.mark.parametrize("reader", ["2", "2b"])
def test_events_that_a_domain_leaves_unread_are_dropped(reader: str) -> None:
    """Goal: after 20 seconds the writer goes on, and the reader has lost events, not order.  Method: by the clock."""
    world = World()
    watched(world, reader)
    victim, writer = world.client(reader), world.client("1")
    victim.read_on(False)  # type: ignore[attr-defined]
    writer.log.clear()
    writer.send(writes(300))
    world.wait(1)
    served = replies(writer)
    world.wait(EVENT_TIMEOUT_S - 1.5)
    assert replies(writer) == served
    world.wait(1)
    assert replies(writer) > served
    world.wait(20 * EVENT_TIMEOUT_S)
    assert replies(writer) == 300
    victim.read_on()  # type: ignore[attr-defined]
    world.wait(1)
    numbers = [int(event.split(":")[0].removeprefix(f"{HOME}/")) for event in victim.events[1:]]
    assert numbers == sorted(numbers) and len(numbers) < 300
    assert world.ask(reader, XsType.READ, join(HOME)).type == XsType.READ


def test_domain_0_keeps_its_events() -> None:
    """Goal: they have no timeout, as in the daemon; the writer goes on when domain 0's client reads, or goes away."""
    world = World()
    watched(world, "0b")
    world.stream("0b").read_on(False)
    writer = world.client("1")
    writer.log.clear()
    writer.send(writes(300))
    world.wait(10 * EVENT_TIMEOUT_S)
    assert 20 <= replies(writer) < 300
    world.stream("0b").peer.close()
    world.wait(1)
    assert replies(writer) == 300


@pytest.mark.parametrize("who", ["1", "1b"])
def test_unread_replies_are_outstanding(who: str) -> None:
    """Goal: who does not read his replies is not read from.  Method: many reads unread, then read: all answered in order."""
    world = World()
    client = world.client(who)
    client.read_on(False)  # type: ignore[attr-defined]
    ids = [client.post(*READ) for _ in range(500)]
    world.wait(1)
    assert world.store.usage(Domid(1)).outstanding == 20
    client.read_on()  # type: ignore[attr-defined]
    world.wait(1)
    assert [message.req_id for message in client.log[-500:]] == ids


def test_who_dies_pays_no_more() -> None:
    """Goal: what a dead domain caused is forgotten with its watchers or when they read; its number starts from nothing."""
    world = World()
    watched(world, "0b")
    world.stream("0b").read_on(False)
    for life in range(3):
        world.client("1").send(writes(300, first=life * 300))
        world.wait(1)
        assert world.store.usage(Domid(1)).outstanding == 20
        world.hypervisor.destroy_domain(1)
        world.run("create 1\n0 INTRODUCE 1|1|1|")
        assert world.store.usage(Domid(1)).outstanding == 0
        world.run(f"0 MKDIR {HOME}|\n0 SET_PERMS {HOME}|n1|r2|\n1 WRITE data/x|1")
    world.stream("0b").read_on()
    world.wait(1)
    assert world.store.usage(Domid(1)).outstanding == 0 and not world.daemon._stalled


# --- bytes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outstanding", [0, 20])
@pytest.mark.parametrize("who", ["0b", "1b"])
def test_replies_that_are_not_read_are_bounded(who: str, outstanding: int) -> None:
    """Goal: some 64 KiB wait for a client that does not read, also of domain 0, or where the quota is switched off.
    Method: reads of 2000 bytes and own events, far more than that; then everything comes, in order."""
    world = World(Quota(outstanding=outstanding))
    world.ask("1", XsType.WRITE, join(f"{HOME}/big") + bytes(2000))
    client = world.stream(who)
    world.ask(who, XsType.WATCH, join("/local", "t"))
    client.read_on(False)
    most = 0
    ids = []
    for number in range(200):
        ids.append(client.post(XsType.READ, join(f"{HOME}/big")))
        ids.append(client.post(XsType.WRITE, join(f"/local/domain/{who[0]}/data/{number}")))
        world.settle()
        most = max(most, len(client.peer.out))
    assert most < OUT_MOST + EVENTS_MOST + 2 * MESSAGE_MAX and client.peer.backlog < 2 * MESSAGE_MAX
    if not outstanding or who == "0b":
        assert most >= OUT_MOST
    assert world.ask("2", XsType.READ, join("data")).body == b""
    client.read_on()
    world.wait(1)
    assert [m.req_id for m in client.log if m.type != XsType.WATCH_EVENT][-400:] == ids
    assert len(client.events) >= 200 and client.peer.out == b""


def test_too_much_memory_makes_a_domain_wait() -> None:
    """Goal: beyond its quota a domain is not read from, looks again now and then, and costs no more while it waits.
    Method: domain 0 gives it nodes, it asks and kicks; the timers stay few; domain 0 takes them away again."""
    world = World(Quota(memory=20_000, outstanding=0))
    for number in range(15):
        world.run(f"0 WRITE /pile/{number}|{'x' * 1900}\n0 SET_PERMS /pile/{number}|n1|")
    guest = world.guest("1")
    guest.log.clear()
    for _ in range(30):
        guest.post(*READ)
    other = world.client("1b")
    other.post(*READ)
    for _ in range(50):
        guest.kick()
        world.wait(0.01)
    assert replies(guest) == replies(other) == 0 and times(world, "memory") <= 2
    assert len(world.store.timers._heap) < 10
    turns, notify = [0], world.store.notify

    def counting(connection: object) -> None:
        turns[0] += 1
        notify(connection)  # type: ignore[arg-type]

    world.store.notify = counting  # type: ignore[method-assign]
    world.wait(100)
    assert turns[0] < 5000 and len(world.store.timers._heap) < 10, "ten times a second for each connection, and no more"
    world.run("0 RM /pile|")
    world.wait(1)
    assert replies(guest) == 30 and replies(other) == 1


# --- write credit ---------------------------------------------------------------------------------------------------------


def contended(world: World) -> World:
    """Domain 0 has a transaction open, so each write of a guest may make it fail."""
    return world.run("0 TRANSACTION_START | -> $held")


@pytest.mark.parametrize("who", ["1", "1b"])
def test_writes_that_disturb_others_are_paced(who: str) -> None:
    """Goal: XSA-206: 10 saved up and one on credit at once, then 200 a second, shared by three domains.
    Method: 111 writes under a transaction of domain 0's, looked at from time to time."""
    world = contended(World())
    client = world.client(who)
    world.run(f"{who} READ data| -> \"\"")
    client.log.clear()
    client.send(rewrites(111))
    world.settle()
    assert replies(client) == 11
    for seconds, served in ((0.1, 17.7), (0.1, 24.3), (0.3, 44.3), (0.5, 77.7), (0.5, 111)):
        world.wait(seconds)
        assert abs(replies(client) - served) <= 1, seconds
    world.wait(0.03)
    assert replies(client) == 111 and times(world, "write-rate") <= 101 and len(world.store.timers._heap) < 10


def test_who_disturbs_nobody_is_not_paced() -> None:
    """Goal: writes without an open transaction, reads, and a domain's own single transaction are free."""
    world = World()
    client = world.guest("1")
    client.log.clear()
    client.send(writes(200))
    world.settle()
    assert replies(client) == 200
    contended(world)
    client.send(requests(*[READ] * 200, first=3000))
    world.settle()
    assert replies(client) == 400
    world.run("0.$held TRANSACTION_END F|")
    for _ in range(50):
        world.run("1 TRANSACTION_START | -> $t\n1.$t WRITE data/x|1\n1.$t TRANSACTION_END T|")
    contended(world)
    for _ in range(11):
        world.run("1 TRANSACTION_START | -> $t\n1.$t WRITE data/x|1\n1.$t TRANSACTION_END T|")
    late = client.post(*READ)
    world.settle()
    assert client.reply(late) is None, "commits beside another transaction cost a credit"
    world.wait(0.02)
    assert client.reply(late)


def test_a_debt_is_the_domain_s() -> None:
    """Goal: no other connection, reconnection or second INTRODUCE makes up for it; others do not pay.
    Method: one in debt, then each way out, without the clock moving."""
    world = contended(World())
    guest = world.guest("1")
    guest.send(rewrites(11))
    world.settle()
    other = world.stream("1b")
    other.post(*READ)
    guest["connection"] = 1
    guest.forget()
    guest.kick()
    world.settle()
    asked = guest.post(*READ)
    world.settle()
    assert guest["connection"] == 0 and guest.reply(asked) is None and replies(other) == 0
    guest.forget()
    world.run("0 INTRODUCE 1|1|1|")
    asked = guest.post(*READ)
    world.run("2 WRITE data/x|1\n0 WRITE /x|1")
    assert guest.reply(asked) is None
    world.wait(0.02)
    assert guest.reply(asked) and replies(other) == 1


def test_waiting_costs_nothing() -> None:
    """Goal: however often a domain in debt asks to be looked at, one timer waits for it.
    Method: thousands of kicks and writes; the timers and the turns that they bring."""
    world = contended(World())
    guest = world.guest("1")
    guest.send(rewrites(60))
    world.settle()
    for _ in range(2000):
        guest.kick()
        world.settle()
    assert len(world.store.timers._heap) <= 3
    world.wait(0.2)
    assert len(world.store.timers._heap) <= 3
    world.wait(1)
    assert replies(guest) >= 60


# --- turns ----------------------------------------------------------------------------------------------------------------


def reads(world: World, flooder: str) -> None:
    world.client(flooder).send(requests(*[(XsType.READ, join(HOME))] * 5000))


def own_events(world: World, flooder: str) -> None:
    """Each write is an event for the writer himself."""
    for token in "abc":
        world.ask(flooder, XsType.WATCH, join(HOME, token))
    world.client(flooder).send(requests(*[(XsType.WRITE, join(HOME) + b"%d" % (n % 2)) for n in range(3000)], first=100))


def events_for_one_another(world: World, flooder: str) -> None:
    """Domain 2 writes, the flooder watches that and asks; neither leaves anything unread."""
    world.run("0 MKDIR /shared|\n0 SET_PERMS /shared|b0|")
    for token in range(40):
        world.ask(flooder, XsType.WATCH, join("/shared", str(token)))
    writing = [(int(XsType.WRITE), join(f"/shared/{n % 50}") + b"%d" % n) for n in range(3000)]
    world.client("2d").send(requests(*writing, first=100))
    world.client(flooder).send(requests(*[(XsType.READ, join(HOME))] * 3000, first=100))


@pytest.mark.parametrize("seed", [None, *range(3)])
@pytest.mark.parametrize("flood", [reads, own_events, events_for_one_another])
@pytest.mark.parametrize("flooder", ["0b", "1b", "1"])
def test_a_flood_does_not_keep_others_from_their_turn(
    flooder: str, flood: Callable[[World, str], None], seed: int | None
) -> None:
    """Goal: a client has one turn at a time, however much it has to do: others wait a few turns for theirs.
    Method: thousands of requests are on their way; again and again others ask one and the turns are counted."""
    world = World(Quota(outstanding=0), Random(seed).randrange if seed is not None else None)
    flood(world, flooder)
    most = 0
    for _ in range(8):
        world.hypervisor.deliver(turns=6)
        quiet = [world.client("2"), world.client("2b"), world.client("0c")]
        asked = [client.post(XsType.READ, join("/local/domain/2/data")) for client in quiet]
        before, turns = replies(world.client(flooder)), 0
        while not all(client.reply(req_id) for client, req_id in zip(quiet, asked, strict=True)):
            assert world.hypervisor.deliver(turns=1)
            turns += 1
        most = max(most, turns)
        assert replies(world.client(flooder)) - before <= (turns + 1) * 5 * TURN
    assert most <= (6 if seed is None else 40)
    assert len(world.hypervisor._due) <= 8, "nobody is in the queue twice"


@pytest.mark.parametrize("size", [0, 200])
@pytest.mark.parametrize("seed", range(5))
def test_a_ring_that_is_always_full_is_read_no_faster_than_it_is_served(seed: int, size: int) -> None:
    """Goal: what is read and not served stays below two messages, and a turn ends.  Method: a guest refills its ring
    whenever anything happens, with the smallest requests and with larger ones; the order of turns is drawn from a seed."""
    world = World(Quota(outstanding=0), Random(seed).randrange)
    guest, random = world.guest("1"), Random(seed)
    guest.waiting += requests(*[(XsType.READ, bytes(size))] * 20_000)
    ring, most = world.daemon.rings[Domid(1)].ring, 0
    ring.requests = _Refilled(ring.requests, guest)  # type: ignore[assignment]
    for _ in range(300):
        guest.push() if random.random() < 0.7 else None
        before = world.daemon.counts[XsType.READ]
        world.hypervisor.deliver(turns=1)
        assert world.daemon.counts[XsType.READ] - before <= 10 * TURN
        most = max(most, ring.peer.backlog)
    assert 0 < most < 2 * MESSAGE_MAX


class _Refilled:
    """The requests of a guest on another processor, which fills its ring again as soon as it was read."""

    def __init__(self, pipe: BytePipe, guest: Guest) -> None:
        self.pipe, self.guest = pipe, guest
        self.waiting = pipe.waiting

    def read(self) -> bytes:
        data = self.pipe.read()
        self.guest.push()
        return data
