"""Goal: the blocking client speaks the protocol with any store.
Method: a scripted server in a thread, behind a Unix socket or, as a device, a terminal; and Debian's C xenstored."""

from __future__ import annotations

import os
import select
import threading
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench import realstore
from tests.xenfs.storepeers import TIMEOUT_S, event, refuse, reply, talk
from xenfs.storeclient import ATTEMPTS, WINDOW, Event, StoreClient
from xenmodel.public.io.xs_wire import XENSTORE_PAYLOAD_MAX, XsType
from xenmodel.xenstore.errors import XsErrno, XsError
from xenmodel.xenstore.perms import Perm
from xenmodel.xenstore.wire import Message, join


@pytest.fixture
def real(tmp_path: Path) -> Iterator[realstore.RealXenstored]:
    if lacks := realstore.missing():
        pytest.skip(lacks)
    with realstore.RealXenstored(tmp_path) as store:
        yield store


# --- requests ---------------------------------------------------------------------------------------------------------

REQUESTS: dict[str, tuple[Callable[[StoreClient], object], XsType, bytes, bytes, object]] = {
    "read": (lambda c: c.read("/a"), XsType.READ, b"/a\0", b"x\0y\0", b"x\0y\0"),
    "write": (lambda c: c.write("/a", b"x\0"), XsType.WRITE, b"/a\0x\0", b"OK\0", None),
    "mkdir": (lambda c: c.mkdir("/a"), XsType.MKDIR, b"/a\0", b"OK\0", None),
    "rm": (lambda c: c.rm("/a"), XsType.RM, b"/a\0", b"OK\0", None),
    "directory": (lambda c: c.directory("/a"), XsType.DIRECTORY, b"/a\0", b"b\0c-1\0", ["b", "c-1"]),
    "empty directory": (lambda c: c.directory("/a"), XsType.DIRECTORY, b"/a\0", b"", []),
    "get_perms": (lambda c: list(map(str, c.get_perms("/a"))), XsType.GET_PERMS, b"/a\0", b"n0\0r1\0", ["n0", "r1"]),
    "set_perms": (lambda c: c.set_perms("/a", [Perm.parse("b7")]), XsType.SET_PERMS, b"/a\0b7\0", b"OK\0", None),
    "watch": (lambda c: c.watch("/a", "t"), XsType.WATCH, b"/a\0t\0", b"OK\0", None),
    "unwatch": (lambda c: c.unwatch("/a", "t"), XsType.UNWATCH, b"/a\0t\0", b"OK\0", None),
    "control": (lambda c: c.control("quota", "7"), XsType.CONTROL, b"quota\x007\0", b"a\nb\xff\0", "a\nb\udcff"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests(serve, name):
    """Goal: each method sends its request and returns what the answer means.  Method: a table; the server notes."""
    call, kind, body, answer, expected = REQUESTS[name]
    server = serve(lambda message: reply(message, answer))
    with StoreClient(server.path) as client:
        assert call(client) == expected
    ((asked_kind, _, tx, asked_body),) = server.asked
    assert (asked_kind, asked_body, tx) == (kind, body, 0)


def test_errors(serve):
    """Goal: an error reply is an XsError with what was asked, and the connection lives on; an unknown one is EINVAL.
    Method: two errors and an answer."""
    answers = iter(["EACCES", "EWHATEVER", None])

    def script(message: Message) -> bytes:
        name = next(answers)
        return refuse(message, name) if name else reply(message, b"value")

    with StoreClient(serve(script).path) as client:
        with pytest.raises(XsError, match=r"^EACCES: READ '/a'$"):
            client.read("/a")
        with pytest.raises(XsError, match=r"^EINVAL: RM '/a': the store says 'EWHATEVER'$"):
            client.rm("/a")
        assert client.read("/a") == b"value"


def test_too_long(serve):
    """Goal: a request that no message holds is E2BIG and is not sent.  Method: one byte more than fits, and just that."""
    server = serve(reply)
    with StoreClient(server.path) as client:
        with pytest.raises(XsError) as caught:
            client.write("/a", bytes(XENSTORE_PAYLOAD_MAX - 2))
        assert caught.value.errno is XsErrno.E2BIG
        client.write("/a", bytes(XENSTORE_PAYLOAD_MAX - 3))
    assert [len(message.body) for message in server.asked] == [XENSTORE_PAYLOAD_MAX]


def test_many_at_a_time(serve):
    """Goal: many requests are answered in their own order, errors among them, and at most WINDOW are under way.
    Method: a server that collects what comes, and answers backwards once it has a window full."""
    wanted = [(XsType.READ, join(f"/{number}")) for number in range(2 * WINDOW)]
    held: list[Message] = []

    def script(message: Message) -> bytes:
        held.append(message)
        if len(held) < WINDOW:
            return b""
        backwards = list(reversed(held))
        held.clear()
        return b"".join(refuse(m, "ENOENT") if m.body == b"/5\0" else reply(m, m.body.upper()) for m in backwards)

    with StoreClient(serve(script).path) as client:
        answers = client.request(wanted)
    assert isinstance(answers[5], XsError) and answers[5].errno is XsErrno.ENOENT
    del answers[5], wanted[5]
    assert answers == [body for _, body in wanted]


def test_large_both_ways(serve):
    """Goal: no deadlock when neither side's socket takes more.  Method: requests and answers as large as they can be."""
    big = bytes(XENSTORE_PAYLOAD_MAX - 3)
    server = serve(lambda message: reply(message, big) + event("/a", "x" * 4000))
    with StoreClient(server.path) as client:
        assert client.request([(XsType.WRITE, b"/a\0" + big)] * 500) == [big] * 500
        assert client.wait(TIMEOUT_S) == Event("/a", "x" * 4000)


# --- long directories, transactions, watches --------------------------------------------------------------------------

NAMES = [f"child-{number}" for number in range(1000)]


def parts_of(message: Message, generation: int) -> bytes:
    """As send_directory_part() of the daemon, with 100 bytes at most so that there are many."""
    _, offset, _ = message.body.split(b"\0")
    rest = join(*NAMES)[int(offset) :]
    part = rest if len(rest) <= 100 else rest[: rest.rindex(b"\0", 0, 100) + 1]
    return reply(message, join(str(generation)) + part + (b"\0" if part == rest else b""))


def test_long_directory(serve):
    """Goal: children that do not fit into one answer are all there.  Method: E2BIG, then parts."""
    server = serve(lambda m: refuse(m, "E2BIG") if m.type == XsType.DIRECTORY else parts_of(m, 7))
    with StoreClient(server.path) as client:
        assert client.directory("/a", tx=3) == NAMES
    assert {message.tx_id for message in server.asked} == {3}


@pytest.mark.parametrize("changes", [1, 10**6], ids=["once", "for ever"])
def test_directory_that_changes(serve, changes):
    """Goal: parts of two generations are never put together, and a node that never rests is EAGAIN.
    Method: the generation changes at the second part, that often."""
    left = [changes]

    def script(message: Message) -> bytes:
        if message.type == XsType.DIRECTORY:
            return refuse(message, "E2BIG")
        if not message.body.endswith(b"\x000\0") and left[0]:
            left[0] -= 1
        return parts_of(message, left[0])

    server = serve(script)
    with StoreClient(server.path) as client:
        if changes == 1:
            assert client.directory("/a") == NAMES
        else:
            with pytest.raises(XsError, match="EAGAIN: the children of /a change faster"):
                client.directory("/a")
            assert len(server.asked) == 1 + 2 * ATTEMPTS


class Transactions:
    """A server's transactions: numbers from 7 on, and how often their end is a conflict."""

    def __init__(self, conflicts: int = 0) -> None:
        self.conflicts = conflicts
        self.ended: list[bytes] = []
        self._last = 6

    def __call__(self, message: Message) -> bytes:
        if message.type == XsType.TRANSACTION_START:
            self._last += 1
            return reply(message, join(str(self._last)))
        if message.type == XsType.TRANSACTION_END:
            assert message.tx_id == self._last
            self.ended.append(message.body)
            if message.body == b"T\0" and len(self.ended) <= self.conflicts:
                return refuse(message, "EAGAIN")
        return reply(message)


def test_transaction(serve):
    """Goal: what is asked within belongs to it, the end commits, an exception aborts and is seen.  Method: both."""
    server = serve(script := Transactions())
    with StoreClient(server.path) as client:
        with client.transaction() as tx:
            client.write("/a", b"1", tx)
        assert (tx, server.asked[1].tx_id) == (7, 7)
        with pytest.raises(LookupError), client.transaction() as tx:
            raise LookupError
    assert (tx, script.ended) == (8, [b"T\0", b"F\0"])


@pytest.mark.parametrize("conflicts", [3, ATTEMPTS])
def test_transact(serve, conflicts):
    """Goal: after a conflict all is done again, but not for ever.  Method: a server that has that many conflicts."""
    server = serve(script := Transactions(conflicts))
    seen: list[int] = []
    with StoreClient(server.path) as client:
        if conflicts < ATTEMPTS:
            assert client.transact(lambda tx: seen.append(tx) or "done") == "done"
        else:
            with pytest.raises(XsError, match="EAGAIN"):
                client.transact(seen.append)
    assert seen == list(range(7, 7 + min(conflicts + 1, ATTEMPTS)))
    assert script.ended == [b"T\0"] * len(seen)


def test_events(serve):
    """Goal: events are kept in order wherever they come between answers, and waiting ends.  Method: some with a reply."""
    server = serve(lambda message: event("/a", "1") + reply(message) + event("/b", "2"))
    with StoreClient(server.path) as client:
        client.watch("/a", "1")
        assert [client.wait(TIMEOUT_S), client.wait(TIMEOUT_S)] == [Event("/a", "1"), Event("/b", "2")]
        begun = time.monotonic()
        assert client.wait(0.05) is None
        assert time.monotonic() - begun >= 0.05
        client.rm("/a")
        assert client.wait(0) == Event("/a", "1")


# --- devices, daemons --------------------------------------------------------------------------------------------------


def test_a_device(tmp_path):
    """Goal: a device works as a socket does, message by message, though it is never said to be writable and takes
    little at a time.  Method: a raw terminal, whose other end reads nothing for a while."""
    server, device = os.openpty()
    tty.setraw(device)
    asked: list[Message] = []
    full: list[bool] = []
    wanted = [(XsType.WRITE, join("/a") + bytes([number]) * 2000) for number in range(WINDOW)]

    def receive(size: int) -> bytes:
        if len(asked) == len(wanted) or not select.select([server], [], [], TIMEOUT_S)[0]:
            return b""
        return os.read(server, size)

    def serve() -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while select.select([], [device], [], 0)[1] and time.monotonic() < deadline:
            time.sleep(0.001)  # until the terminal is full
        full.append(time.monotonic() < deadline)
        talk(receive, lambda data: os.write(server, data), asked, lambda m: reply(m, m.body[-1:]))

    with StoreClient(os.ttyname(device)) as client:
        with pytest.raises(XsError, match="E2BIG"):
            client.write("/a", bytes(XENSTORE_PAYLOAD_MAX - 10))
        thread = threading.Thread(target=serve)
        thread.start()
        assert client.request(wanted) == [bytes([number]) for number in range(WINDOW)]
    thread.join(TIMEOUT_S)
    assert full == [True]
    assert [message.body for message in asked] == [body for _, body in wanted]
    os.close(server)
    os.close(device)


def test_c_xenstored(real):
    """Goal: all of it with a real daemon.  Method: values of all bytes, 1500 children, a conflict, a watch, CONTROL."""
    with StoreClient(real.socket) as client, StoreClient(real.socket) as other:
        value = bytes(range(256))
        client.write("/a/b", value)
        assert (client.read("/a/b"), client.directory("/a"), client.read("/a")) == (value, ["b"], b"")
        client.set_perms("/a", [Perm.parse("n0"), Perm.parse("r0")])
        assert list(map(str, client.get_perms("/a"))) == ["n0", "r0"]
        names = [f"child-{number}" for number in range(1500)]
        assert set(client.request([(XsType.MKDIR, join(f"/many/{name}")) for name in names])) == {b"OK\0"}
        assert client.directory("/many") == names
        other.watch("/a", "token")
        assert other.wait() == Event("/a", "token")
        with pytest.raises(XsError, match="EAGAIN"), client.transaction() as tx:
            client.write("/a/b", client.read("/a/b", tx) + b"!", tx)
            other.write("/a/b", b"2")
        assert (client.read("/a/b"), other.wait(), other.wait(0.1)) == (b"2", Event("/a/b", "token"), None)
        tries = []

        def work(tx: int) -> None:
            tries.append(client.read("/a/b", tx))
            if len(tries) == 1:
                other.write("/a/b", b"3")
            client.write("/a/b", b"4", tx)

        client.transact(work)
        assert (tries, client.read("/a/b")) == ([b"2", b"3"], b"4")
        assert "Quota settings:" in client.control("quota")
        with pytest.raises(XsError, match="EINVAL: CONTROL 'nonsense'"):
            client.control("nonsense")
        client.rm("/a")
        with pytest.raises(XsError, match="ENOENT"):
            client.read("/a/b")
