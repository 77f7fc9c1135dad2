"""Goal: rings that go wrong, and readers that do not read, fare alike with Debian's xenstored and with ours, but for what
differences.py tells.
Method: pages and streams of both, touched where a client would; waiting in real time there, by a clock that jumps here."""

from __future__ import annotations

import time

import pytest

from bench import realstore
from bench.realstore import RealRing, WireClient
from tests.xenstored.ours import OurRing
from tests.xenstored.rig import HOMES, OURS, REAL, Request, Twins, shown_events, twins, write
from xenmodel.public.io.xs_wire import (
    SOCKMSG,
    XENSTORE_CONNECTED,
    XENSTORE_ERROR_NONE,
    XENSTORE_ERROR_PROTO,
    XENSTORE_ERROR_RINGIDX,
    XENSTORE_PAYLOAD_MAX,
    XENSTORE_RECONNECT,
    XENSTORE_RING_SIZE,
    XsType,
)
from xenmodel.xenstore.watch import EVENTS_PER_WATCH
from xenmodel.xenstore.wire import Message, join

QUIET_S = 0.5  # to see that nothing comes, also on a busy machine

# --- rings ----------------------------------------------------------------------------------------------------------------


def _rings(pair: Twins, who: str = "1") -> tuple[RealRing, OurRing]:
    real, ours = (client.stream for client in pair.clients[who])
    assert isinstance(real, RealRing) and isinstance(ours, OurRing)
    return real, ours


def _words(pair: Twins, field: str) -> tuple[int, int]:
    """That field of both pages, when all events have been dealt with."""
    pair.real.settle()
    real, ours = _rings(pair)
    return getattr(real, field), ours.word(field)


def _again(pair: Twins) -> None:
    """What a guest's kernel does when its connection begins anew."""
    real, ours = _rings(pair)
    pair.clients["1"] = WireClient(real), WireClient(ours)


def _is_served(pair: Twins) -> tuple[bool, bool]:
    def asked(client: WireClient) -> bool:
        client.timeout_s = QUIET_S
        try:
            return client.request(XsType.GET_DOMAIN_PATH, join("1")).type == XsType.GET_DOMAIN_PATH
        except TimeoutError:
            return False

    return pair.both("1", asked)


@pytest.mark.parametrize("fault", ["length", "request index", "response index"])
def test_a_faulty_ring(fault: str, pair: Twins) -> None:
    """Goal: the page says what was wrong; what the guest had is gone, and only it.  Method: a length and indices beyond what
    can be; then all that could bring it back."""
    assert _words(pair, "server_features") == (0, 15)
    pair.run("1 WATCH data|t|\n1 TRANSACTION_START | -> $t")
    real, ours = _rings(pair)
    if fault == "length":
        pair.both("1", lambda client: client.stream.send(SOCKMSG.pack(XsType.READ, 1, 0, XENSTORE_PAYLOAD_MAX + 1), QUIET_S))
    elif fault == "request index":
        real.req_prod = real.req_cons + XENSTORE_RING_SIZE + 1
        ours.set_word("req_prod", ours.word("req_cons") + XENSTORE_RING_SIZE + 1)
    else:
        pair.both("1", lambda client: client.stream.send(SOCKMSG.pack(XsType.READ, 1, 0, 5) + b"dat", QUIET_S))
        real.rsp_cons += 1
        ours.set_word("rsp_cons", ours.word("rsp_cons") + 1)
        at = real.req_prod
        assert at == ours.word("req_prod")
        real.page[at : at + 2] = ours.page[at : at + 2] = b"a\0"
        real.req_prod = at + 2
        ours.set_word("req_prod", at + 2)
    real.kick()
    ours.kick()
    expected = XENSTORE_ERROR_PROTO if fault == "length" else XENSTORE_ERROR_RINGIDX
    assert _words(pair, "error") == (expected, expected)
    del pair.clients["1"]
    pair.run("a CONTROL quota|1|\na READ /| -> \"\"")
    pair.clients["1"] = WireClient(real), WireClient(ours)
    pair.both("a", lambda client: client.request(XsType.INTRODUCE, join("1", "1", "1")))
    _again(pair)
    assert _words(pair, "error") == (expected, XENSTORE_ERROR_NONE) and _is_served(pair) == (False, True)
    pair.both("a", lambda client: client.request(XsType.RELEASE, join("1")))
    pair.both("a", lambda client: client.request(XsType.INTRODUCE, join("1", "1", "1")))
    _again(pair)
    assert _words(pair, "error") == (expected, XENSTORE_ERROR_NONE) and _is_served(pair) == (True, True)
    real.connection = XENSTORE_RECONNECT
    ours.set_word("connection", XENSTORE_RECONNECT)
    real.kick()
    ours.kick()
    assert _words(pair, "connection") == (XENSTORE_RECONNECT, XENSTORE_CONNECTED)


def test_introduce_tells_who_waits(pair: Twins) -> None:
    """Goal: a page made before its domain is introduced says XENSTORE_RECONNECT until then, and may begin anywhere.
    Method: such a page."""
    pair.create(3)
    real, ours = pair.real.rings[3], pair.ours.rings[3]
    assert isinstance(ours, OurRing)
    for name in ("req_prod", "req_cons", "rsp_prod", "rsp_cons"):
        setattr(real, name, 0xFFFFFFF0)
        ours.set_word(name, 0xFFFFFFF0)
    real.connection = XENSTORE_RECONNECT
    ours.set_word("connection", XENSTORE_RECONNECT)
    pair.introduce(3)
    assert real.connection == ours.word("connection") == XENSTORE_CONNECTED
    assert pair.ask(Request("3", XsType.GET_DOMAIN_PATH, join("3"))).ok


def test_release_is_answered_last(pair: Twins) -> None:
    """Goal: with us watchers always hear first, as in most cases there.  Method: whoever connected just before the domain,
    and somebody else, release it and are watchers themselves."""
    pair.run("a WATCH @releaseDomain|t|\nb WATCH @releaseDomain|t|\nb events -> @releaseDomain:t")

    def release(client: WireClient, domid: str) -> list[int]:
        client.log.clear()
        client.request(XsType.RELEASE, join(domid))
        client.request(XsType.GET_DOMAIN_PATH, join("0"))
        return [message.type for message in client.log[:-1]]

    told, answered = XsType.WATCH_EVENT, XsType.RELEASE
    assert pair.both("b", lambda client: release(client, "1")) == ([answered, told], [told, answered])
    assert pair.both("a", lambda client: release(client, "2"))[OURS][-2:] == [told, answered]


# --- who does not read ----------------------------------------------------------------------------------------------------


def _write_until_stalled(client: WireClient) -> int:
    """Nodes below /g until there is no answer; how many there were before."""
    client.timeout_s = QUIET_S
    for count in range(1000):
        try:
            assert client.request(*write(f"/g/{count:04}")).body == b"OK\0"
        except TimeoutError:
            return count
    raise AssertionError("never stalled")


def _read_all(client: WireClient) -> list[Message]:
    return [message for message in client.drain(QUIET_S) if message.type == XsType.WATCH_EVENT]


EVENT_BYTES = SOCKMSG.size + len("/g/0000|t|")


def test_who_does_not_read(pair: Twins) -> None:
    """Goal: a guest whose requests cause events that another does not read is stalled at 20 of them, and goes on without a
    loss when the other reads; what waits is merged.  Method: a guest writes, another watches and sleeps."""
    pair.run("a MKDIR /g|\na SET_PERMS /g|b0|\n2 WATCH /g|t|")
    there, here = pair.both("1", _write_until_stalled)
    assert there == XENSTORE_RING_SIZE // EVENT_BYTES + 20
    assert there < here <= there + 4096 // EVENT_BYTES + 1
    for reply in pair.both("a", lambda client: client.request(XsType.CONTROL, join("quota", "1")).body):
        assert b"outstanding     :       20" in reply
    pair.both("a", lambda client: [client.request(*write("/g/0000")) for _ in range(3)])
    for side, count in ((REAL, there), (OURS, here)):
        events = shown_events(_read_all(pair.clients["2"][side]))
        # the ring has what the sleeper was told before; the three writes of domain 0 are one event
        assert events == [*(f"/g/{n:04}:t" for n in range(count)), "/g/0000:t", f"/g/{count:04}:t"]
        assert pair.clients["1"][side].next().type == XsType.WRITE


def test_events_nobody_takes_expire() -> None:
    """Goal: whoever sleeps for long loses events, and stalls nobody for ever.  Method: 20 s of our clock, and the daemon's
    option that makes it one."""
    with twins("-w", "watch-event=1") as pair:
        pair.run(HOMES).run("a MKDIR /g|\na SET_PERMS /g|b0|\n2 WATCH /g|t|")
        counts = pair.both("1", _write_until_stalled)
        time.sleep(1 + QUIET_S)
        pair.both("a", lambda client: client.request(XsType.READ, join("/")))  # or the daemon sleeps on
        for side, count in enumerate(counts):
            writer, sleeper = (pair.clients[who][side] for who in ("1", "2"))
            assert writer.next(time.monotonic() + 21).type == XsType.WRITE
            events = _read_all(sleeper)
            assert len(events) < count and shown_events(events)[-1] == f"/g/{count:04}:t"


def test_events_of_a_removed_watch(pair: Twins) -> None:
    """Goal: with us they are gone as far as they wait; there they still come.  Method: domain 0 writes more than fits while
    a guest sleeps, who then gives up its watch."""
    pair.run("a MKDIR /g|\na SET_PERMS /g|b0|\n2 WATCH /g|t|")
    pair.both("a", lambda client: [client.request(*write(f"/g/{n:04}")) for n in range(400)])

    def unwatch(client: WireClient) -> tuple[int, int]:
        assert client.request(XsType.UNWATCH, join("/g", "t")).type == XsType.UNWATCH
        return len(client.log) - 1, len(_read_all(client))

    real, ours = pair.both("2", unwatch)
    assert real == (400, 0) and XENSTORE_RING_SIZE // EVENT_BYTES < ours[0] < 400 and ours[1] == 0


def test_many_events_at_once(pair: Twins) -> None:
    """Goal: however many nodes a commit changes, a client's queue is bounded; there it is not.  Method: 200 at once."""
    pair.run("b WATCH /g|t|\nb events -> /g:t")

    def commit(client: WireClient) -> None:
        tx = int(client.request(XsType.TRANSACTION_START, join("")).body[:-1])
        for number in range(200):
            client.request(*write(f"/g/{number:04}"), tx)
        assert client.request(XsType.TRANSACTION_END, b"T\0", tx).type == XsType.TRANSACTION_END

    pair.both("a", commit)
    real, ours = (shown_events(log) for log in pair.both("b", _read_all))
    assert real == [f"/g/{number:04}:t" for number in range(200)]
    assert ours == [*real[:EVENTS_PER_WATCH], "/g:t"]


def test_events_of_special_nodes(pair: Twins) -> None:
    """Goal: those that wait are merged with us.  Method: a domain shuts down and is resumed 200 times, another sleeps."""
    pair.run("a SET_PERMS @releaseDomain|r0|\ncreate 3\nintroduce 3\n2 WATCH @releaseDomain|t|")
    for _ in range(200):
        pair.real.shutdown_domain(3)
        pair.ours.shutdown_domain(3)
        pair.both("a", lambda client: client.request(XsType.RESUME, join("3")))
        pair.real.set_state(3, realstore.State.EXISTS)
    real, ours = (len(_read_all(client)) for client in pair.clients["2"])
    assert real == 200 and XENSTORE_RING_SIZE // (SOCKMSG.size + len("@releaseDomain|t|")) < ours < 200
