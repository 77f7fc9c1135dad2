"""Goal: Debian's xenstored and ours agree where random requests do not get to: limits at their defaults, the order of events, rings
that go wrong, readers that do not read; and every difference in differences.py is still there.
Method: tables of scripts and of requests that are repeated until they are refused, done to both."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest

from bench import realstore
from bench.realstore import RealRing, WireClient
from tests.xenstored import differences
from tests.xenstored.differences import DIFFERENCES, EXCUSES, UNORDERED
from tests.xenstored.ours import OurRing
from tests.xenstored.rig import OURS, REAL, Request, Twins, shown_events, twins
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
from xenmodel.xenstore.wire import Message, join

pytestmark = pytest.mark.skipif(bool(reason := realstore.missing()), reason=reason)
T = TypeVar("T")
DOCS = Path(__file__).resolve().parents[2] / "docs" / "differences.md"
SHORT_S = 0.1  # to see that nothing comes
HOMES = "".join(
    f"""
    create {domid}
    introduce {domid}
    a MKDIR /local/domain/{domid}|
    a SET_PERMS /local/domain/{domid}|n0|r{domid}|
    a MKDIR /local/domain/{domid}/data|
    a SET_PERMS /local/domain/{domid}/data|n{domid}|
    """
    for domid in (1, 2)
)


@pytest.fixture
def pair() -> Iterator[Twins]:
    """With two guests that have a home and a `data` of their own in it."""
    with twins(excuses=EXCUSES, unordered=UNORDERED) as pair:
        yield pair.run(HOMES)


def both(pair: Twins, who: str, work: Callable[[WireClient], T]) -> tuple[T, T]:
    """The same with either client of that name; what came of it."""
    real, ours = pair.clients[who]
    return work(real), work(ours)


# --- what differs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, each in DIFFERENCES.items() if each.script])
def test_a_difference_is_still_there(name: str) -> None:
    """Goal: the list does not rot.  Method: each script, without what excuses its difference elsewhere; one that meets none
    of a difference would not need to be here."""
    script = DIFFERENCES[name].script
    assert re.search(r" / |\*", script), "its script shows no difference"
    with twins() as pair:
        pair.run(HOMES).run(script)


def test_the_list_is_the_documents() -> None:
    """Goal: docs/differences.md says what differs, and no more.  Method: its table's rows are those of the list; what has
    no script has a test here."""
    section = DOCS.read_text().partition("\n## xenstored\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert rows == [each.row for each in DIFFERENCES.values()]
    for each in DIFFERENCES.values():
        assert each.script or each.test in globals(), each


# --- what does not --------------------------------------------------------------------------------------------------------

SAME = {
    "a commit is told in the order in which the transaction met the nodes": """
        a WATCH /|root|
        a events -> /:root
        a TRANSACTION_START | -> $t
        a.$t WRITE /t/z|1
        a.$t WRITE /t/a|1
        a.$t READ /t/m| -> ENOENT
        a.$t WRITE /t/b|1
        a.$t WRITE /t/m|1
        a.$t WRITE /t/z|2
        a.$t RM /t/b|
        a events -> none
        a.$t TRANSACTION_END T| -> OK|
        a events -> /t/z:root /t/a:root /t/m:root
        a DIRECTORY /t| -> z|a|m|
    """,
    "a removal is told for the topmost node, and to watches of those below, children first": """
        a WRITE /r/x/1|
        a WRITE /r/x/2|
        a WRITE /r/y|
        a WATCH /r/x/1|one|
        a WATCH /r/y|y|
        a WATCH /r/x|x|
        a WATCH /r|r|
        a WATCH /|root|
        a events -> /r/x/1:one /r/y:y /r/x:x /r:r /:root
        a RM /r| -> OK|
        a events -> /r/x/1:one /r/x:x /r/y:y /r:r /r:root
        a RM /r| -> OK|
        a RM /r/x| -> ENOENT
        a events -> none
    """,
    "a guest that dies: in the order of the tree, then that it is gone": """
        a WRITE /z|
        a WRITE /b|
        a SET_PERMS /b|n1|
        a SET_PERMS /z|n1|
        a WRITE /b/below|
        a WATCH /|root|
        a WATCH @releaseDomain|gone|
        a WATCH /b/below|below|
        a events -> /:root @releaseDomain:gone /b/below:below
        destroy 1
        a events -> /local/domain/1/data:root /z:root /b/below:below /b:root @releaseDomain:gone
    """,
    "one event for the watches of one connection with the same token": """
        1 WATCH data|t|
        1 WATCH data/x|t|
        1 WATCH /local/domain/1/data|t| -> EEXIST
        1 WATCH /local/domain/1|t|
        1 WATCH data|u|
        b WATCH /local/domain/1|t|
        b WATCH /local|t|
        1 events -> data:t data/x:t /local/domain/1:t data:u
        b events -> /local/domain/1:t /local:t
        a WRITE /local/domain/1/data/x|
        1 events -> data/x:t /local/domain/1/data/x:t data/x:u
        b events -> /local/domain/1/data/x:t
        1 UNWATCH data|t| -> OK|
        a WRITE /local/domain/1/data/x|
        1 events -> data/x:t /local/domain/1/data/x:t data/x:u
    """,
    "the first event of a watch comes behind the reply, an event for the writer before": """
        1 WATCH data|t| -> OK|
        1 WATCH data|t| -> EEXIST
        1 WRITE data|x -> OK|
        1 events -> data:t data:t
        1 RESET_WATCHES
        1 UNWATCH data|t| -> ENOENT
    """,
    "what a guest may not know it is not told": """
        a WRITE /s/secret|
        a SET_PERMS /s|n0|r2|
        a SET_PERMS /s/secret|n0|
        1 WATCH /s|t|
        2 WATCH /s|t|
        1 events -> /s:t
        2 events -> /s:t
        a WRITE /s/secret|x
        1 events -> none
        2 events -> /s/secret:t
        a SET_PERMS /s/secret|n0|r1|
        1 events -> /s/secret:t
        2 events -> /s/secret:t
        a SET_PERMS /s|n0|
        2 events -> /s:t
        a SET_PERMS /s/secret|n0|
        1 events -> /s/secret:t
        2 events -> none
        a TRANSACTION_START | -> $t
        a.$t SET_PERMS /s/secret|n0|r2|
        a.$t RM /s/secret|
        a.$t TRANSACTION_END T|
        2 events -> none
    """,
    "@introduceDomain and @releaseDomain": """
        b WATCH @introduceDomain|in|
        b WATCH @releaseDomain|out|
        1 WATCH @releaseDomain|out|
        b events -> @introduceDomain:in @releaseDomain:out
        1 events -> @releaseDomain:out
        create 3
        b events -> none
        introduce 3
        introduce 3
        b events -> @introduceDomain:in
        shutdown 3
        shutdown 3
        b events -> @releaseDomain:out
        a RESUME 3| -> OK|
        shutdown 3
        b events -> @releaseDomain:out
        destroy 3
        b events -> @releaseDomain:out
        1 events -> none
        create 3
        destroy 3
        b events -> none
    """,
    "permissions of special nodes": """
        a SET_PERMS @releaseDomain|n0|r1|
        1 WATCH @releaseDomain|out|
        2 WATCH @releaseDomain|out|
        1 events -> @releaseDomain:out
        2 events -> @releaseDomain:out
        shutdown 2
        1 events -> @releaseDomain:out
        2 events -> none
        a SET_PERMS @introduceDomain|b2|
        2 WATCH @introduceDomain|in|
        1 WATCH @introduceDomain|in|
        1 events -> @introduceDomain:in
        2 events -> @introduceDomain:in
        create 3
        introduce 3
        1 events -> @introduceDomain:in
        2 events -> @introduceDomain:in
    """,
    "a second INTRODUCE begins anew": """
        1 WATCH data|t|
        1 events -> data:t
        1 TRANSACTION_START | -> $t
        introduce 1
        a WRITE /local/domain/1/data|x
        1 events -> none
        1.$t READ data| -> ENOENT
        0 WATCH /k|t|
        0 events -> /k:t
        a INTRODUCE 0|1|1| -> OK|
        a WRITE /k|
        0 events -> none
        0 READ /k| -> ""
    """,
    "what a connection had goes with it": """
        open c
        c WATCH /c|t|
        c TRANSACTION_START | -> $t
        c.$t WRITE /c|
        close c
        a READ /c| -> ENOENT
        open c
        c.$t READ /| -> ENOENT
        a WRITE /c|
        c events -> none
    """,
    "numbers of domains are read as atoi() reads them": """
        a GET_DOMAIN_PATH -1| -> /local/domain/4294967295|
        a GET_DOMAIN_PATH 99999999999| -> /local/domain/1215752191|
        a GET_DOMAIN_PATH 99999999999999999999| -> /local/domain/4294967295|
        a GET_DOMAIN_PATH \\x0a +7x| -> /local/domain/7|
        a GET_DOMAIN_PATH 1
        a GET_DOMAIN_PATH |
        a IS_DOMAIN_INTRODUCED 0| -> T|
        a IS_DOMAIN_INTRODUCED 32752| -> T|
        a IS_DOMAIN_INTRODUCED 9| -> F|
        a RELEASE 32752|
        a RELEASE 0|
        a RELEASE 9|
        a RESUME 9|
        a SET_TARGET 1|9|
        a SET_TARGET 1|
        a SET_TARGET 1|2|more| -> OK|
        a INTRODUCE 9|1|1| -> EINVAL
        a INTRODUCE 1|1|0| -> EINVAL
        a INTRODUCE 1|1| -> EINVAL
        1 IS_DOMAIN_INTRODUCED 1| -> EACCES
        1 RELEASE 2| -> EACCES
    """,
    "commands": """
        a CONTROL quota| -> *
        a CONTROL quota-soft| -> *
        a CONTROL quota|1|
        a CONTROL quota|9| -> ENOENT
        a CONTROL quota|set|nodes|0| -> EINVAL
        a CONTROL quota|set|nothing|5| -> EINVAL
        a CONTROL quota|set|nodes|
        a CONTROL quota-soft|set|memory|5000| -> OK|
        a CONTROL quota-soft|set|nodes|5000| -> EINVAL
        a CONTROL print|x| -> OK|
        a CONTROL print| -> EINVAL
        a CONTROL check| -> OK|
        a CONTROL log|x| -> EINVAL
        a CONTROL nothing| -> EINVAL
        a CONTROL -> EINVAL
        1 CONTROL check| -> EACCES
    """,
}


@pytest.mark.parametrize("name", SAME)
def test_the_same(name: str, pair: Twins) -> None:
    """Goal: no difference, and what it is.  Method: scripts."""
    pair.run(SAME[name])


@pytest.mark.parametrize("command", ["quota", "quota-soft"])
def test_the_table_of_quotas(command: str, pair: Twins) -> None:
    """Goal: `xenstore-control quota` shows the same.  Method: both tables, as they are at first."""
    real, ours = both(pair, "a", lambda client: client.request(XsType.CONTROL, join(command)).body)
    assert real == ours and b"memory" in real


# --- limits -----------------------------------------------------------------------------------------------------------------


class Limit(NamedTuple):
    """`request(n)` is repeated until it is refused: after so many, with that error, there and here."""

    request: Callable[[int], tuple[int, bytes]]
    real: tuple[int, str]
    ours: tuple[int, str]


def _write(path: str, size: int = 0) -> tuple[int, bytes]:
    return XsType.WRITE, join(path) + bytes(size)


LIMITS = {
    # 998 beside data and the one that has them; more names would not fit into one directory
    "nodes": Limit(lambda n: _write(f"data/{n % 2}{'/x' * (n // 2)}"), (999, "ENOSPC"), (999, "ENOSPC")),
    "watches": Limit(lambda n: (XsType.WATCH, join("data", str(n))), (129, "E2BIG"), (128, "ENOSPC")),
    "transactions": Limit(lambda n: (XsType.TRANSACTION_START, join("")), (11, "ENOSPC"), (10, "ENOSPC")),
    "bytes of a value": Limit(lambda n: _write("data", n), (2048 - 24 - 8, "ENOSPC"), (2048 - 8 + 1, "ENOSPC")),
    "names": Limit(lambda n: _write(f"data/{n:09}"), (201, "ENOSPC"), (204, "ENOSPC")),
    "permissions": Limit(lambda n: (XsType.SET_PERMS, join("data", "n1", *["r2"] * n)), (5, "ENOSPC"), (5, "ENOSPC")),
    "a path": Limit(lambda n: (XsType.WATCH, join("data/" + "x" * (n + 2000), "")), (44, "EINVAL"), (44, "EINVAL")),
    "an absolute path": Limit(lambda n: (XsType.WATCH, join("/" + "x" * (n + 2000), "")), (48, "EINVAL"), (48, "EINVAL")),
    "a path of a home": Limit(
        lambda n: (XsType.WATCH, join("/local/domain/2/" + "x" * (n + 2000), "")), (49, "EINVAL"), (49, "EINVAL")
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name: str, pair: Twins) -> None:
    """Goal: the defaults are the same numbers.  Method: a guest does it until it may not."""
    limit = LIMITS[name]

    def until_refused(client: WireClient) -> tuple[int, str]:
        for count in range(3000):
            reply = client.request(*limit.request(count))
            if reply.type == XsType.ERROR:
                return count, reply.body[:-1].decode()
        raise AssertionError("never refused")

    assert both(pair, "1", until_refused) == (limit.real, limit.ours)


def test_nodes_of_a_transaction(pair: Twins) -> None:
    """Goal: a guest's transaction may look at 1024 nodes, and then not commit; domain 0's at any number.
    Method: nodes that all may read."""

    def work(client: WireClient) -> list[object]:
        tx = int(client.request(XsType.TRANSACTION_START, join("")).body[:-1])
        replies = [client.request(XsType.READ, join(f"/n/{n}"), tx) for n in range(1030)]
        refused = [n for n, reply in enumerate(replies) if reply.body == b"ENOSPC\0"]
        return [refused, client.request(XsType.TRANSACTION_END, b"T\0", tx).body]

    both(pair, "a", lambda client: [client.request(XsType.SET_PERMS, join("/", "r0")), client.request(*_write("/n"))])
    both(pair, "a", lambda client: [client.request(*_write(f"/n/{n}")) for n in range(1030)])
    real, ours = both(pair, "1", work)
    assert real == ours == [list(range(1024, 1030)), b"ENOMEM\0"]
    real, ours = both(pair, "a", work)
    assert real == ours == [[], b"OK\0"]


@pytest.mark.parametrize("who", ["a", "1"])
def test_the_longest_message(who: str, pair: Twins) -> None:
    """Goal: 4096 bytes of body, and 4096 of reply; beyond it the connection ends.  Method: values and directories around it."""
    pair.run("a MKDIR /d|\na SET_PERMS /d|r0|")
    both(pair, "a", lambda client: [client.request(*_write(f"/d/{n:0255}")) for n in range(16)])
    assert len(set(both(pair, who, lambda client: client.request(XsType.DIRECTORY, join("/d")).body))) == 1
    pair.ask(Request("a", XsType.WRITE, join("/d/x")))
    assert pair.ask(Request(who, XsType.DIRECTORY, join("/d"))).ours.body == b"E2BIG\0"
    for offset in (0, 1, 256, 4000, 4096, 4097, 4098, 5000):
        pair.ask(Request(who, XsType.DIRECTORY_PART, join("/d", str(offset))))
    pair.ask(Request(who, XsType.WRITE, join("data") + bytes(XENSTORE_PAYLOAD_MAX - 5)))
    pair.ask(Request(who, XsType.READ, join("data")))

    def too_long(client: WireClient) -> str:
        client.timeout_s = SHORT_S
        try:
            client.post(XsType.READ, bytes(XENSTORE_PAYLOAD_MAX + 1))
            return str(client.next())
        except (ConnectionError, TimeoutError) as error:
            return "ended" if isinstance(error, ConnectionError) else "silent"

    assert both(pair, who, too_long) == (("ended",) * 2 if who == "a" else ("silent",) * 2)


def test_memory(pair: Twins) -> None:
    """Goal: the same memory is counted for nodes, permissions, watches and transactions, and refused at the same size.
    Method: CONTROL quota after each; a small quota."""
    used = re.compile(rb"memory *: *(\d+)")

    def memory() -> list[int]:
        replies = both(pair, "a", lambda client: client.request(XsType.CONTROL, join("quota", "1")).body)
        return [int(match[1]) for match in map(used.search, replies) if match]

    for line in (
        "1 WRITE data/a|0123456789", "1 WRITE data/b/c|", "1 SET_PERMS data/a|n1|r2|", "1 WATCH data|token|",
        "1 WRITE data/a|0", "1 RM data/b|", "a SET_PERMS /local/domain/1|n1|r2|r0|",
    ):  # fmt: skip
        pair.run(line)
        there, here = memory()
        assert there == here, line
    pair.run(f"quota memory {here + 1000}\n1 WRITE data/big|{'x' * 900} -> OK|")
    pair.run(f"1 WRITE data/more|{'x' * 100} -> EIO / ENOMEM\n1 WATCH data|{'x' * 100}| -> ENOMEM")
    pair.run(f"1 READ data/big| -> ENOMEM / {'x' * 900}\n1 RM data/big| -> OK|")
    pair.run("1 TRANSACTION_START | -> $t\n1.$t WRITE data/a|")
    there, here = memory()
    assert 0 < there - here < 30, "the names of the copies of data and data/a"


# --- streams ------------------------------------------------------------------------------------------------------------------


def _rings(pair: Twins, who: str = "1") -> tuple[RealRing, OurRing]:
    real, ours = (client.stream for client in pair.clients[who])
    assert isinstance(real, RealRing) and isinstance(ours, OurRing)
    return real, ours


def _words(pair: Twins, field: str) -> tuple[int, int]:
    """That field of both pages, once neither changes any more."""
    time.sleep(SHORT_S)
    real, ours = _rings(pair)
    return getattr(real, field), ours.word(field)


def _again(pair: Twins) -> None:
    """What a guest's kernel does when its connection begins anew."""
    real, ours = _rings(pair)
    pair.clients["1"] = WireClient(real), WireClient(ours)


def _is_served(pair: Twins) -> tuple[bool, bool]:
    def asked(client: WireClient) -> bool:
        client.timeout_s = SHORT_S
        try:
            return client.request(XsType.GET_DOMAIN_PATH, join("1")).type == XsType.GET_DOMAIN_PATH
        except TimeoutError:
            return False

    return both(pair, "1", asked)


@pytest.mark.parametrize("fault", ["length", "request index", "response index"])
def test_a_faulty_ring(fault: str, pair: Twins) -> None:
    """Goal: the page says what was wrong; what the guest had is gone, and only it.  Method: a length and indices beyond what
    can be; then all that could bring it back."""
    assert _words(pair, "server_features") == (0, 15)
    pair.run("1 WATCH data|t|\n1 TRANSACTION_START | -> $t")
    real, ours = _rings(pair)
    if fault == "length":
        both(pair, "1", lambda client: client.stream.send(SOCKMSG.pack(XsType.READ, 1, 0, XENSTORE_PAYLOAD_MAX + 1), SHORT_S))
    elif fault == "request index":
        real.req_prod = real.req_cons + XENSTORE_RING_SIZE + 1
        ours.set_word("req_prod", ours.word("req_cons") + XENSTORE_RING_SIZE + 1)
    else:
        both(pair, "1", lambda client: client.stream.send(SOCKMSG.pack(XsType.READ, 1, 0, 5) + b"dat", SHORT_S))
        real.rsp_cons += 1
        ours.set_word("rsp_cons", ours.word("rsp_cons") + 1)
        real.page[real.req_prod % XENSTORE_RING_SIZE :][:2] = ours.page[ours.word("req_prod") % XENSTORE_RING_SIZE :][:2] = b"a\0"
        real.req_prod += 2
        ours.set_word("req_prod", ours.word("req_prod") + 2)
    real.kick()
    ours.kick()
    expected = XENSTORE_ERROR_PROTO if fault == "length" else XENSTORE_ERROR_RINGIDX
    assert _words(pair, "error") == (expected, expected)
    del pair.clients["1"]
    pair.run("a CONTROL quota|1|\na READ /| -> \"\"")
    pair.clients["1"] = WireClient(real), WireClient(ours)
    both(pair, "a", lambda client: client.request(XsType.INTRODUCE, join("1", "1", "1")))
    _again(pair)
    assert _words(pair, "error") == (expected, XENSTORE_ERROR_NONE) and _is_served(pair) == (False, True)
    both(pair, "a", lambda client: client.request(XsType.RELEASE, join("1")))
    both(pair, "a", lambda client: client.request(XsType.INTRODUCE, join("1", "1", "1")))
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
    assert both(pair, "b", lambda client: release(client, "1")) == ([answered, told], [told, answered])
    assert both(pair, "a", lambda client: release(client, "2"))[OURS][-2:] == [told, answered]


# --- who does not read ----------------------------------------------------------------------------------------------------


def _write_until_stalled(client: WireClient) -> int:
    """Nodes below /g until there is no answer; how many there were before."""
    client.timeout_s = SHORT_S
    for count in range(1000):
        try:
            assert client.request(*_write(f"/g/{count:04}")).body == b"OK\0"
        except TimeoutError:
            return count
    raise AssertionError("never stalled")


def _read_all(client: WireClient) -> list[Message]:
    return [message for message in client.drain(SHORT_S) if message.type == XsType.WATCH_EVENT]


EVENT_BYTES = SOCKMSG.size + len("/g/0000|t|")


def test_who_does_not_read(pair: Twins) -> None:
    """Goal: a guest whose requests cause events that another does not read is stalled at 20 of them, and goes on without a
    loss when the other reads; what waits is merged.  Method: a guest writes, another watches and sleeps."""
    pair.run("a MKDIR /g|\na SET_PERMS /g|b0|\n2 WATCH /g|t|")
    there, here = both(pair, "1", _write_until_stalled)
    assert there == XENSTORE_RING_SIZE // EVENT_BYTES + 20
    assert there < here <= there + 4096 // EVENT_BYTES + 1
    for reply in both(pair, "a", lambda client: client.request(XsType.CONTROL, join("quota", "1")).body):
        assert b"outstanding     :       20" in reply
    both(pair, "a", lambda client: [client.request(*_write("/g/0000")) for _ in range(3)])
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
        counts = both(pair, "1", _write_until_stalled)
        time.sleep(1 + SHORT_S)
        both(pair, "a", lambda client: client.request(XsType.READ, join("/")))  # or the daemon sleeps on
        for side, count in enumerate(counts):
            writer, sleeper = (pair.clients[who][side] for who in ("1", "2"))
            assert writer.next(time.monotonic() + 21).type == XsType.WRITE
            events = _read_all(sleeper)
            assert len(events) < count and shown_events(events)[-1] == f"/g/{count:04}:t"


def test_events_of_a_removed_watch(pair: Twins) -> None:
    """Goal: with us they are gone as far as they wait; there they still come.  Method: domain 0 writes more than fits while
    a guest sleeps, who then gives up its watch."""
    pair.run("a MKDIR /g|\na SET_PERMS /g|b0|\n2 WATCH /g|t|")
    both(pair, "a", lambda client: [client.request(*_write(f"/g/{n:04}")) for n in range(400)])

    def unwatch(client: WireClient) -> tuple[int, int]:
        assert client.request(XsType.UNWATCH, join("/g", "t")).type == XsType.UNWATCH
        return len(client.log) - 1, len(_read_all(client))

    real, ours = both(pair, "2", unwatch)
    assert real == (400, 0) and XENSTORE_RING_SIZE // EVENT_BYTES < ours[0] < 400 and ours[1] == 0
