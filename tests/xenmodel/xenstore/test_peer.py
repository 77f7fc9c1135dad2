"""Goal: one client of xenstored: in which order replies and events leave, and that no message whatever harms the server.
Method: clients over streams and rings (wireworld.py) and what came in which order; hypothesis sends plausible and arbitrary
messages as domain 0 and as guests."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.xenmodel.xenstore.wireworld import Client, World, requests, text_of
from xenmodel.public.io.xs_wire import SOCKMSG, XENSTORE_ERROR_PROTO, XENSTORE_PAYLOAD_MAX, XsType
from xenmodel.xenstore.peer import TURN
from xenmodel.xenstore.upkeep import problems
from xenmodel.xenstore.wire import join, pack


def order(client: Client) -> list[str]:
    """What came since the last time: a reply as its type, an event as its path."""
    found = [
        text_of(m.body).partition("|")[0] if m.type == XsType.WATCH_EVENT else XsType(m.type).name for m in client.log
    ]
    client.log.clear()
    return found


# --- order ----------------------------------------------------------------------------------------------------------------

OWN = {  # who watches home does the request: its event leaves before the reply
    "WRITE": (XsType.WRITE, "{home}/new|1", ["{home}/new"]),
    "WRITE again": (XsType.WRITE, "{home}/old|2", ["{home}/old"]),
    "MKDIR": (XsType.MKDIR, "{home}/new|", ["{home}/new"]),
    "MKDIR of what is there": (XsType.MKDIR, "{home}/old|", []),
    "RM": (XsType.RM, "{home}/old|", ["{home}/old"]),
    "SET_PERMS": (XsType.SET_PERMS, "{home}/old|n{domid}|r2|", ["{home}/old"]),
    "READ": (XsType.READ, "{home}/old|", []),
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("who", ["0", "1", "1b"])
def test_own_events_come_before_the_reply(who: str, name: str) -> None:
    """Goal: a client knows what its request caused once it has the reply, as with the daemon.  Method: a table."""
    world, domid = World(), who[0]
    home = f"/local/domain/{domid}/data"
    world.ask(who, XsType.WRITE, join(f"{home}/old"))
    world.ask(who, XsType.WATCH, join(home, "t"))
    client = world.client(who)
    assert order(client)[-2:] == ["WATCH", home], "the first event comes after WATCH's reply"
    kind, body, events = OWN[name]
    world.ask(who, kind, body.format(home=home, domid=domid).encode().replace(b"|", b"\0"))
    assert order(client) == [*(event.format(home=home) for event in events), kind.name]


def test_own_events_of_other_requests_come_before_the_reply() -> None:
    """Goal: the same for commits and for domains that come and go.  Method: watches of what they change."""
    world = World().run("0 WATCH @introduceDomain|t|\n0 WATCH @releaseDomain|t|\n0 WATCH /a|t|\n0 TRANSACTION_START | -> $t")
    client = world.client("0")
    world.run("0.$t WRITE /a/b|1\n0.$t WRITE /a/c|1\ncreate 3")
    client.log.clear()
    world.run("0.$t TRANSACTION_END T|\n0 INTRODUCE 3|1|1|\n0 RELEASE 3|")
    assert order(client) == [
        "/a/b", "/a/c", "TRANSACTION_END", "@introduceDomain", "INTRODUCE", "@releaseDomain", "RELEASE",
    ]  # fmt: skip


@pytest.mark.parametrize("who", ["0", "1", "1b"])
def test_order_in_a_long_pipeline(who: str) -> None:
    """Goal: the order is the same however many requests come at once, and whichever turn serves them.
    Method: three turns' worth of requests in one piece: watches, writes below them, reads."""
    world, home = World(), f"/local/domain/{who[0]}/data"
    client = world.client(who)
    client.log.clear()
    parts: list[tuple[int, bytes]] = [(XsType.WATCH, join(home, "t"))]
    expected = ["WATCH", home]
    for number in range(TURN):
        parts += [(XsType.WRITE, join(f"{home}/x{number}")), (XsType.READ, join(home))]
        parts += [(XsType.WATCH, join(home, str(number)))]
        expected += [f"{home}/x{number}"] * (number + 1) + ["WRITE", "READ", "WATCH", home]
    client.send(requests(*parts, first=100))
    world.wait(1)
    assert order(client) == expected


def test_events_of_others_come_in_the_order_of_their_causes() -> None:
    """Goal: a client that only listens hears of changes as they were made.  Method: two writers take turns."""
    world = World().run("0 WATCH /local/domain|t|\n0 events -> /local/domain:t")
    expected = []
    for number in range(3 * TURN):
        who = "12"[number % 2]
        world.ask(who, XsType.WRITE, join(f"data/{number}"))
        expected.append(f"/local/domain/{who}/data/{number}:t")
    world.run(f"0 events -> {' '.join(expected)}")


# --- hostile clients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [XENSTORE_PAYLOAD_MAX + 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("who", ["0b", "1b"])
def test_a_message_that_is_too_long_ends_its_connection(who: str, length: int) -> None:
    """Goal: that connection and no other, with a line in the log.  Method: requests before it, in the same piece, and after
    it; its watches and transactions are gone, the same domain's other connection goes on."""
    world, path = World(), f"/local/domain/{who[0]}/data"
    other = who[0]
    for name in (who, other):
        world.ask(name, XsType.WATCH, join(path, "t"))
    world.ask(who, XsType.TRANSACTION_START)
    client = world.stream(who)
    client.log.clear()
    read = requests((XsType.READ, join(path)))
    client.send(read + SOCKMSG.pack(XsType.READ, 2, 0, length) + read)
    assert client.peer.failed == XENSTORE_ERROR_PROTO and client.peer.connection.closed and not client.peer.wants_input
    assert client.log == [] and not client.peer.out, "what was not sent is dropped"
    client.peer.receive(read)
    assert len(world.lines) == 1 and f"domain {who[0]}" in world.lines[0]
    world.client(other).log.clear()
    world.ask(other, XsType.WRITE, join(path) + b"2")
    assert order(world.client(other)) == [path, "WRITE"] and client.log == []
    assert world.store.open_transactions == 0 and problems(world.store) == []


PATHS = st.sampled_from(
    [
        "/", "/a", "/a/b", "data", "data/x", "data/x/y", "/local/domain/1/data", "/local/domain/2/data/x", "/local/domain/1",
        "@releaseDomain", "@introduceDomain", "@releaseDomain/1", "/tool/xenstored", "//", "a/", "", "x" * 2049,
        "/" + "y" * 3071,
    ]
)  # fmt: skip
NUMBERS = st.sampled_from(["0", "1", "2", "3", "9", "32752", "65535", "-1", "4294967296", "9" * 25, "", "x", " 2", "12"])
WORDS = st.sampled_from(
    [
        "t", "T", "F", "n0", "n1", "r2", "b1", "w65524", "n9", "check", "quota", "set", "quota-soft", "quota-usage", "stats",
        "help", "print", "log", "off", "live-update", "-s", "-F", "-a", "nodes", "watches", "soft-memory", "node-size",
    ]
)  # fmt: skip
PARTS = st.one_of(PATHS, NUMBERS, WORDS, st.text("abc/@\udcff\n", max_size=6)).map(lambda text: join(text)[:-1])
BODIES = st.builds(
    lambda parts, end: b"\0".join(parts)[:XENSTORE_PAYLOAD_MAX] + end,
    st.lists(st.one_of(PARTS, st.binary(max_size=12)), max_size=5),
    st.sampled_from([b"", b"\0", b"\0", b"\0"]),
).map(lambda body: body[:XENSTORE_PAYLOAD_MAX])
REAL = [int(kind) for kind in XsType if kind not in (XsType.WATCH_EVENT, XsType.ERROR)]
KINDS = st.one_of(st.sampled_from(REAL), st.sampled_from(REAL), st.integers(0, 30), st.integers(0, 2**32 - 1))
TXS = st.sampled_from([0, 0, 0, 1, 2, 2**32 - 1])
REQUESTS = st.lists(st.tuples(st.sampled_from(["0", "0b", "1", "1b", "2"]), KINDS, TXS, BODIES), max_size=25)
# Kinds with bodies that mostly make sense, so that the rarer requests are more than refused.
SENSIBLE = st.one_of(
    st.tuples(st.sampled_from([2, 1, 3, 12, 13]), PATHS.map(join)),
    st.tuples(st.just(11), st.builds(lambda path, value: join(path) + value, PATHS, st.binary(max_size=9))),
    st.tuples(st.sampled_from([4, 5]), st.builds(join, PATHS, WORDS)),
    st.tuples(st.just(4), st.builds(join, PATHS, WORDS, NUMBERS)),
    st.tuples(st.just(14), st.builds(join, PATHS, WORDS, WORDS)),
    st.tuples(st.sampled_from([6, 21]), st.just(b"\0")),
    st.tuples(st.just(7), st.sampled_from([b"T\0", b"F\0"])),
    st.tuples(st.sampled_from([9, 10, 17, 18, 23]), NUMBERS.map(join)),
    st.tuples(st.just(8), st.builds(lambda domid: join(domid, "1", "1"), NUMBERS)),
    st.tuples(st.sampled_from([19, 24]), st.builds(join, NUMBERS, NUMBERS)),
    st.tuples(st.sampled_from([0, 25]), st.builds(join, WORDS)),
    st.tuples(st.sampled_from([0, 26]), st.builds(join, WORDS, WORDS, NUMBERS)),
)
MIXED = st.lists(st.tuples(st.sampled_from(["0", "0b", "1", "1b", "2"]), SENSIBLE, TXS), max_size=40)


class Answers:
    """Sends what it is told and looks at what came: one reply to each request, and each message as the header says."""

    def __init__(self) -> None:
        self.world = World()
        self.sent: dict[str, list[tuple[int, int, int]]] = {}

    def send(self, who: str, kind: int, tx: int, body: bytes) -> None:
        client = self.world.client(who)
        if kind == XsType.INTRODUCE:
            self.world.settle()
        self.sent.setdefault(who, []).append((client.post(kind, body, tx), kind, tx))
        if kind == XsType.INTRODUCE:  # what a kernel does whose ring begins anew
            self.world.settle()
            for guest in map(self.world.guest, "12"):
                if not guest["req_prod"] | guest["rsp_prod"]:
                    guest.forget()

    def check(self, who: str, complete: bool) -> None:
        client, sent = self.world.client(who), self.sent.get(who, [])
        first = sent[0][0] if sent else 0
        replies = [m for m in client.log if m.type != XsType.WATCH_EVENT and m.req_id >= first > 0]
        asked = {req_id: (kind, tx) for req_id, kind, tx in sent}
        order = [reply.req_id for reply in replies]
        assert order == sorted(set(order)) and set(order) <= set(asked)
        assert order == list(asked) or not complete, f"{len(sent)} requests, {len(replies)} replies"
        for reply in replies:
            kind, tx = asked[reply.req_id]
            assert reply.tx_id == tx and reply.type in (kind, XsType.ERROR)
            assert reply.type != XsType.ERROR or (reply.body[:1], reply.body[-1:]) == (b"E", b"\0")
        for event in (m for m in client.log if m.type == XsType.WATCH_EVENT):
            assert (event.req_id, event.tx_id) == (0, 0) and event.body.count(b"\0") == 2

    def finish(self) -> None:
        """Guests may have been released, stalled by a quota or without a ring: they have no more replies than requests."""
        self.world.wait(30)
        for who in self.sent:
            self.check(who, complete=who.startswith("0"))
        assert problems(self.world.store) == []
        self.world.store.timers.on_earlier()
        assert self.world.ask("0", XsType.WRITE, join("/still") + b"there").body == b"OK\0"
        self.world.hypervisor.close()


@settings(deadline=None, max_examples=150)
@given(REQUESTS)
def test_any_message_has_one_reply(sent: list[tuple[str, int, int, bytes]]) -> None:
    """Goal: nothing raises, each message of domain 0 is answered once, and the tree stays whole.
    Method: any type, transaction and body, from two connections of domain 0 and three of guests, a settled world each."""
    answers = Answers()
    for who, kind, tx, body in sent:
        answers.send(who, kind, tx, body)
        answers.world.settle()
        assert problems(answers.world.store) == []
    answers.finish()


@settings(deadline=None, max_examples=150)
@given(MIXED, st.booleans())
def test_plausible_messages_have_one_reply(sent: list[tuple[str, tuple[int, bytes], int]], at_once: bool) -> None:
    """Goal: the same where more of it succeeds.  Method: bodies that fit their type; one by one, or all at once."""
    answers = Answers()
    for who, (kind, body), tx in sent:
        answers.send(who, kind, tx, body)
        if not at_once:
            answers.world.settle()
            assert problems(answers.world.store) == []
    answers.finish()


@settings(deadline=None)
@given(st.lists(SENSIBLE, max_size=60), TXS)
def test_every_request_of_a_guest_is_answered(sent: list[tuple[int, bytes]], tx: int) -> None:
    """Goal: under the default quotas a guest that reads gets each reply in the end.  Method: as above, guests only."""
    answers = Answers()
    for number, (kind, body) in enumerate(sent):
        answers.send(("1", "1b", "2")[number % 3], kind, tx if number % 5 == 0 else 0, body)
    answers.world.wait(30)
    for who in answers.sent:
        answers.check(who, complete=True)
    assert problems(answers.world.store) == []


@settings(deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=50), BODIES.map(lambda body: pack(2, 1, 0, body))), max_size=12))
def test_any_bytes_of_a_stream(chunks: list[bytes]) -> None:
    """Goal: bytes that are no messages end their own connection at most.  Method: random pieces, one of two connections."""
    world = World()
    client = world.stream("1b")
    for chunk in chunks:
        client.send(chunk)
        world.settle()
    assert client.peer.failed in (0, XENSTORE_ERROR_PROTO) and bool(client.peer.failed) == client.peer.connection.closed
    assert world.ask("1", XsType.READ, join("data")).type == XsType.READ and problems(world.store) == []
