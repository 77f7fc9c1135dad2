"""Goal: Debian's daemons run as references: as domain 0 over their socket, as guests over rings, and nothing of them stays.

Method: both daemons for real, each in a folder of its own, with real ring pages; the C daemon's own ways are asked of it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench import realstore
from bench.peers import REPOSITORY
from bench.realstore import RealOxenstored, RealRing, RealStore, RealStoreError, RealXenstored, WireClient
from tests.descriptors import open_files
from xenmodel.public.io import xs_wire
from xenmodel.public.io.xs_wire import XENSTORE_PAYLOAD_MAX, XENSTORE_RING_SIZE, XsType
from xenmodel.xenstore.wire import Message, join, strings

OK = b"OK\0"
GUEST = 5
HOME = f"/local/domain/{GUEST}"

DAEMONS = [
    pytest.param(daemon, marks=pytest.mark.skipif(bool(reason := realstore.missing(daemon.PROGRAM)), reason=reason))
    for daemon in (RealXenstored, RealOxenstored)
]

# What the OCaml daemon does in another way, or not at all.
c_only = pytest.mark.parametrize("store", DAEMONS[:1], indirect=True)


@pytest.fixture(params=DAEMONS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RealStore]:
    with request.param(tmp_path) as running:
        yield running


@pytest.fixture
def dom0(store: RealStore) -> Iterator[WireClient]:
    with WireClient(store.socket) as client:
        yield client


@pytest.fixture
def guest(store: RealStore, dom0: WireClient) -> WireClient:
    """A domain with a home of its own, as a toolstack leaves it."""
    ring = store.add_domain(GUEST)
    assert dom0.request(XsType.MKDIR, join(HOME)).body == OK
    assert dom0.request(XsType.SET_PERMS, join(HOME, f"n{GUEST}")).body == OK
    return WireClient(ring)


def ring_of(client: WireClient) -> RealRing:
    assert isinstance(client.stream, RealRing)
    return client.stream


def write(client: WireClient, path: str, value: bytes) -> Message:
    return client.request(XsType.WRITE, join(path) + value)


def read(client: WireClient, path: str) -> bytes:
    return client.request(XsType.READ, join(path)).body


def told(client: WireClient) -> list[list[bytes]]:
    """The events since its last request: what was done by then is told before the reply to one that changes nothing."""
    seen = len(client.log)
    client.request(XsType.GET_DOMAIN_PATH, join("0"))
    return [strings(message.body) for message in client.log[seen:] if message.type == XsType.WATCH_EVENT]


def eventually(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + realstore.TIMEOUT_S
    while not true() and time.monotonic() < deadline:
        time.sleep(0.005)
    return true()


def gone(pid: int) -> bool:
    """Ended, perhaps with nobody having asked for its end yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_domain_0_over_the_socket(store: RealStore, dom0: WireClient) -> None:
    """Goal: the daemon serves its socket.  Method: write, read, list, an error, and two clients with a watch."""
    assert not gone(store.pid) and store.socket.is_socket()
    assert write(dom0, "/a/b", b"v\0w") == Message(XsType.WRITE, 1, 0, OK)
    assert read(dom0, "/a/b") == b"v\0w"
    assert b"a" in strings(dom0.request(XsType.DIRECTORY, join("/")).body)
    assert dom0.request(XsType.READ, join("/a/c")) == Message(XsType.ERROR, 4, 0, b"ENOENT\0")
    with WireClient(store.socket) as other:
        assert other.request(XsType.WATCH, join("/a", "token")).body == OK
        assert told(other) == [[b"/a", b"token"]]
        write(dom0, "/a/b", b"")
        assert told(other) == [[b"/a/b", b"token"]]
        kinds = [message.type for message in other.log if message.type != XsType.GET_DOMAIN_PATH]
        assert kinds == [XsType.WATCH, XsType.WATCH_EVENT, XsType.WATCH_EVENT]
        assert other.drain() == []


def test_domain_0_over_its_ring(store: RealStore, dom0: WireClient) -> None:
    """Goal: domain 0's kernel has a ring too, from the start.  Method: write there, read over the socket."""
    assert write(WireClient(store.rings[0]), "/from/the/kernel", b"x").body == OK
    assert read(dom0, "/from/the/kernel") == b"x"


def test_a_guest_is_a_guest(dom0: WireClient, guest: WireClient) -> None:
    """Goal: over its ring a domain has its own tree and no more.  Method: relative paths, a watch, what it may not."""
    assert write(guest, "data/x", b"1").body == OK
    assert read(dom0, f"{HOME}/data/x") == read(guest, "data/x") == b"1"
    assert guest.request(XsType.WATCH, join("data", "token")).body == OK
    assert told(guest) == [[b"data", b"token"]]
    write(dom0, f"{HOME}/data/y", b"2")
    assert told(guest) == [[b"data/y", b"token"]]
    write(dom0, "/secret", b"3")
    for kind, body in (
        (XsType.READ, join("/secret")),
        (XsType.WRITE, join("/local/domain/0/x")),
        (XsType.RM, join("/secret")),
        (XsType.INTRODUCE, join("6", "1", "1")),
    ):
        assert guest.request(kind, body) == Message(XsType.ERROR, guest._last, 0, b"EACCES\0"), kind
    assert read(dom0, "/secret") == b"3" and ring_of(guest).error == xs_wire.XENSTORE_ERROR_NONE


def test_shutdown_and_death(store: RealStore, dom0: WireClient, guest: WireClient) -> None:
    """Goal: the daemon learns who shut down and who died.  Method: a watch on @releaseDomain; the guest's nodes, its ring,
    and a second domain of the same number, which inherits nothing."""
    write(guest, "data", b"old")
    guest.request(XsType.WATCH, join(HOME, "old"))
    dom0.request(XsType.WATCH, join("@releaseDomain", "r"))
    assert told(dom0) in ([], [[b"@releaseDomain", b"r"]])  # newer daemons tell of a special watch at once
    store.shutdown_domain(GUEST)
    assert told(dom0) == [[b"@releaseDomain", b"r"]]
    assert read(guest, "data") == b"old"
    store.destroy_domain(GUEST)
    assert told(dom0) == [[b"@releaseDomain", b"r"]]
    assert read(dom0, f"{HOME}/data") == b"ENOENT\0" and read(dom0, HOME) == b"ENOENT\0"
    assert dom0.request(XsType.IS_DOMAIN_INTRODUCED, join(str(GUEST))).body == b"F\0"
    with pytest.raises(ConnectionResetError):
        guest.request(XsType.READ, join("data"))
    second = WireClient(store.add_domain(GUEST))
    write(dom0, f"{HOME}/data", b"new")
    assert read(second, "data") == b"EACCES\0"
    assert second.drain() == []


def test_long_messages_cross_a_short_ring(guest: WireClient) -> None:
    """Goal: messages longer than the ring arrive whole, wherever they begin.  Method: values of growing length there and
    back, over many turns of the ring, one request at a time and many at once."""
    for number in range(40):
        value = bytes((number + at) % 256 for at in range(50 * number))
        assert write(guest, "data", value).body == OK
        assert read(guest, "data") == value
    assert ring_of(guest).req_prod > 39 * XENSTORE_RING_SIZE
    value = read(guest, "data")
    ids = [guest.post(XsType.READ, join("data")) for _ in range(15)]
    assert [guest.next() for _ in ids] == [Message(XsType.READ, req_id, 0, value) for req_id in ids]


def test_waits_end(store: RealStore, guest: WireClient) -> None:
    """Goal: nobody waits for ever.  Method: half a message; more than a stopped daemon takes, and its answer."""
    ring = ring_of(guest)
    with pytest.raises(TimeoutError):
        ring.receive(0.01)
    os.kill(store.pid, signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError, match="1024 of 2000"):
            ring.send(bytes(2000), 0.01)
        guest.timeout_s = 0.01
        with WireClient(store.socket, 0.01) as client, pytest.raises(TimeoutError):
            client.request(XsType.READ, join("/"))
    finally:
        os.kill(store.pid, signal.SIGCONT)


@c_only
@pytest.mark.parametrize("fault", ["length", "index"])
def test_a_faulty_guest_is_cut_off(fault: str, store: RealStore, dom0: WireClient, guest: WireClient) -> None:
    """Goal: the page tells what the daemon made of a fault, and nobody else notices.  Method: a length beyond the limit and
    an index beyond the ring."""
    ring = ring_of(guest)
    assert ring.server_features == 0 and ring.connection == xs_wire.XENSTORE_CONNECTED
    if fault == "length":
        guest.post(XsType.READ, bytes(XENSTORE_PAYLOAD_MAX + 1)[:100])  # legal: the control
        assert guest.next().type == XsType.ERROR and ring.error == xs_wire.XENSTORE_ERROR_NONE
        ring.send(xs_wire.SOCKMSG.pack(XsType.READ, 1, 0, XENSTORE_PAYLOAD_MAX + 1))
        expected = xs_wire.XENSTORE_ERROR_PROTO
    else:
        ring.req_prod = ring.req_cons + XENSTORE_RING_SIZE + 1
        ring.kick()
        expected = xs_wire.XENSTORE_ERROR_RINGIDX
    assert eventually(lambda: ring.error == expected)
    assert write(dom0, "/still", b"here").body == OK
    ring.req_prod = ring.req_cons
    with pytest.raises(TimeoutError):
        guest.timeout_s = 0.05
        guest.request(XsType.READ, join("data"))


@c_only
def test_an_over_long_message_ends_a_socket(store: RealStore, dom0: WireClient) -> None:
    """Goal: as over the ring; the client sees the end.  Method: a body of one byte too many, beside one that fits."""
    path = join("/a")
    for length, whole in ((XENSTORE_PAYLOAD_MAX, True), (XENSTORE_PAYLOAD_MAX + 1, False)):
        with WireClient(store.socket) as client:
            body = path + bytes(length - len(path))
            if whole:
                assert client.request(XsType.WRITE, body).type in (XsType.WRITE, XsType.ERROR)
            else:
                with pytest.raises(ConnectionError):
                    client.request(XsType.WRITE, body)
                assert client.drain() == []
    assert dom0.request(XsType.DIRECTORY, join("/")).type == XsType.DIRECTORY


@c_only
def test_domains_before_and_without_the_daemon(store: RealStore, dom0: WireClient) -> None:
    """Goal: what Xen says decides.  Method: INTRODUCE of a domain that does not exist, of one that does, and RECONNECT."""
    absent = dom0.request(XsType.INTRODUCE, join("9", "1", "1"))
    assert (absent.type, absent.body) == (XsType.ERROR, b"EINVAL\0")
    ring = store.create_domain(9)
    ring.connection = xs_wire.XENSTORE_RECONNECT
    ring.req_prod = ring.req_cons = ring.rsp_prod = ring.rsp_cons = 0xFFFFFFF0
    assert dom0.request(XsType.INTRODUCE, join("9", "1", "1")).body == OK
    assert ring.connection == xs_wire.XENSTORE_CONNECTED
    assert WireClient(ring).request(XsType.GET_DOMAIN_PATH, join("9")).body == b"/local/domain/9\0"
    with pytest.raises(ValueError, match="domain 9 cannot be made"):
        store.create_domain(9)


def test_options_reach_the_daemon(tmp_path: Path) -> None:
    """Goal: quotas and traces can be chosen.  Method: a limit of two nodes per domain, and the trace of the third."""
    if reason := realstore.missing():
        pytest.skip(reason)
    with RealXenstored(tmp_path, "-E", "2", "-T", str(tmp_path / "trace")) as store:
        guest = WireClient(store.add_domain(GUEST))
        store.control.request(XsType.MKDIR, join(HOME))
        store.control.request(XsType.SET_PERMS, join(HOME, f"n{GUEST}"))
        assert write(guest, "one", b"").body == OK
        assert write(guest, "two", b"").body == b"ENOSPC\0"
        store.settle()  # it answers first, then it writes the trace
    assert "ENOSPC" in (tmp_path / "trace").read_text()


@pytest.mark.parametrize("daemon", DAEMONS)
def test_nothing_stays(daemon: type[RealStore], tmp_path: Path) -> None:
    """Goal: no process, file or descriptor outlives the store, also after a fault of its user.  Method: count before and
    after a block that raises."""
    before = open_files()
    with pytest.raises(ZeroDivisionError), daemon(tmp_path) as store:
        WireClient(store.add_domain(GUEST)).request(XsType.READ, join("x"))
        with pytest.raises(FileExistsError), daemon(tmp_path):
            pass
        assert not gone(store.pid) and store.run.is_dir()
        raise ZeroDivisionError
    assert not Path(f"/proc/{store.pid}").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["log"]
    assert open_files() == before


def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    """Goal: the daemon's words are in the error, and nothing stays.  Method: an argument it cannot use; no such daemon."""
    if reason := realstore.missing():
        pytest.skip(reason)
    with pytest.raises(RealStoreError, match="No arguments desired"), RealXenstored(tmp_path, "superfluous"):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["log"]
    assert realstore.missing("no-such") == "not installed: xen-utils (for no-such)"


@pytest.mark.parametrize("daemon", DAEMONS)
def test_the_daemon_dies_with_its_user(daemon: type[RealStore], tmp_path: Path) -> None:
    """Goal: not even SIGKILL leaves a daemon behind.  Method: a process that starts one, says its pid and is killed."""
    code = (
        "import sys, time; from pathlib import Path; from bench import realstore\n"
        f"with realstore.{daemon.__name__}(Path(sys.argv[1])) as store: print(store.pid, flush=True); time.sleep(60)"
    )
    argv = [sys.executable, "-c", code, str(tmp_path)]
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # for the library it cannot remove
    with subprocess.Popen(argv, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout
        pid = int(user.stdout.readline())
        assert not gone(pid)
        user.kill()
    assert eventually(lambda: gone(pid))
