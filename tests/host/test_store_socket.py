"""Goal: xenstored's socket is where it is expected, is nobody else's, and no client costs another one anything.
Method: `xenfs up` as a child; Xen's tools, StoreClient and bare sockets as clients; what the server says of itself."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.host.net import wait_until
from tests.host.served import Host, Served, mounts_at
from tests.host.test_store_tools import needs_utils
from xenfs.storeclient import StoreClient, StoreError
from xenmodel.public.io.xs_wire import SOCKMSG, XENSTORE_PAYLOAD_MAX, XsType
from xenmodel.xenstore.wire import join, pack

pytestmark = pytest.mark.host
MIB_KIB = 1024
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


def start(host: Host, *options: object, mnt: str = "mnt", prefix: Sequence[str] = ()) -> Served:
    """`xenfs up` with a guest and a disk and these options, not waited for."""
    config = host.config(f"of-{mnt}", f"{host.image(f'{mnt}.img')},raw,xvda,w")
    return host.start(config, *map(Path, map(str, options)), mnt=mnt, prefix=prefix)


def socket_of(server: Served) -> Path:
    return Path(f"{server.mnt}.xenstored")


@pytest.fixture
def server(host: Host) -> Served:
    return start(host).wait_ready()


# --- where it is --------------------------------------------------------------------------------------------------------


def test_beside_the_mount(host, server):
    """Goal: without an option it is DIR.xenstored, for its owner only, and goes with the server.
    Method: stat; a request as root and as somebody else; SIGTERM."""
    path = socket_of(server)
    status = path.lstat()
    assert stat.S_ISSOCK(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o600 and status.st_uid == os.geteuid()
    code = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    host.python(code, path)
    refused = host.run(*NOBODY, "/usr/bin/python3", "-c", code, path)
    assert refused.returncode == 1 and "PermissionError" in refused.stdout
    server.stop()
    assert not path.exists()


@needs_utils
@pytest.mark.parametrize("exists", [True, False])
def test_another_place(host, exists):
    """Goal: --xenstored-socket puts it elsewhere; a directory that was missing is made, and goes too, if it is empty.
    Method: xenstore-read with XENSTORED_PATH, and with XENSTORED_RUNDIR; what is left after SIGTERM."""
    place = host.root / "run" / "socket"
    if exists:
        place.parent.mkdir()
    server = start(host, "--xenstored-socket", place).wait_ready()
    assert not socket_of(server).exists()
    for variable in (f"XENSTORED_PATH={place}", f"XENSTORED_RUNDIR={place.parent}"):
        assert host.check("env", variable, "xenstore-read", "/local/domain/1/name") == "of-mnt\n"
    server.stop()
    assert not place.exists() and place.parent.exists() is exists


@needs_utils
def test_the_built_in_place(host):
    """Goal: at /run/xenstored/socket programs find it without being told.
    Method: a namespace with an empty /run; xenstore-ls without any environment."""
    script = 'mount -t tmpfs none /run && exec "$@"'
    prefix = ["unshare", "--mount", "--propagation=private", "sh", "-ec", script, "sh", "setpriv", "--pdeathsig", "KILL"]
    server = start(host, "--xenstored-socket", "/run/xenstored/socket", prefix=prefix).wait_ready()
    enter = ["nsenter", "--mount", "--target", str(server.process.pid), "--"]
    assert host.check(*enter, "xenstore-read", "/local/domain/1/name") == "of-mnt\n"
    server.stop()


def test_without_guests(host):
    """Goal: `xenfs up` without a guest serves the store alone, over the socket and domain 0's device.
    Method: what it says; the domains that there are; a write here, a read there; SIGTERM."""
    server = host.start().wait_ready()
    assert server.lines == [] and mounts_at(server.mnt) != []
    with StoreClient(socket_of(server)) as client:
        assert client.directory("/local/domain") == ["0"]
        client.write("/tool/x", b"1")
    assert host.check("ls", server.mnt / "domains").split() == ["0"]
    code = "import sys; from xenfs.storeclient import StoreClient; print(StoreClient(sys.argv[1]).read('/tool/x'))"
    assert host.python(code, server.mnt / "domains" / "0" / "dev" / "xen" / "xenbus") == "b'1'\n"
    server.stop()


def live(path: Path) -> socket.socket:
    """Somebody who listens there."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def stale(path: Path) -> None:
    live(path).close()


REFUSED = {
    "too long": ("x" * 108, lambda path: None, "at most 107 bytes"),
    "no directory": ("a/b/socket", lambda path: None, "No such file or directory"),
    "below a file": ("file/socket", lambda path: path.parent.touch(), "Not a directory"),
    "a file": ("socket", Path.touch, "is there and is no socket"),
    "a directory": ("socket", Path.mkdir, "is there and is no socket"),
    "a link": ("socket", lambda path: path.symlink_to("elsewhere"), "is there and is no socket"),
    "somebody listens": ("socket", live, "somebody serves a store at"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(host, reason):
    """Goal: status 1, one line with the reason, nothing mounted, and what was there stays.  Method: one case per reason."""
    name, prepare, why = REFUSED[reason]
    place = host.root / name
    kept = prepare(place)
    before = sorted(host.root.rglob("*"))
    server = start(host, "--xenstored-socket", place)
    assert server.wait() == 1
    (line,) = server.stderr().splitlines()
    assert line.startswith("xenfs: ") and why in line and str(place) in line
    assert mounts_at(server.mnt) == []
    assert set(before) <= set(host.root.rglob("*"))
    if kept is not None:
        kept.close()


def test_two_servers(host, server):
    """Goal: the second one is told that the place is taken, and the first one goes on.  Method: the same path, and
    then another."""
    place = socket_of(server)
    second = start(host, "--xenstored-socket", place, mnt="second")
    assert second.wait() == 1 and f"somebody serves a store at {place}" in second.stderr()
    third = start(host, mnt="third").wait_ready()
    for each, name in ((server, "of-mnt"), (third, "of-third")):
        with StoreClient(socket_of(each)) as client:
            assert client.read("/local/domain/1/name") == name.encode()
    third.stop()
    server.stop()


def test_no_place_beside_the_mount(host):
    """Goal: where nobody asked for a socket and it cannot be made, disks are served all the same, and one line says so.
    Method: a directory whose path is too long for a socket's."""
    mnt = "m" * (107 - len(str(host.root)))
    server = start(host, mnt=mnt).wait_ready()
    assert host.check("head", "-c", "2", server.disk(f"of-{mnt}")) == "\0\0"
    server.process.terminate()
    assert server.wait() == 0
    (line,) = server.stderr().splitlines()
    assert "WARNING" in line and "at most 107 bytes" in line and "--xenstored-socket" in line


@pytest.mark.parametrize("how", ["killed", "stale"])
def test_a_stale_socket_is_replaced(host, how):
    """Goal: what a killed server, or anybody, left is in nobody's way.  Method: SIGKILL; a socket without a listener."""
    place = host.root / "mnt.xenstored"
    if how == "killed":
        start(host).wait_ready().kill()
    else:
        stale(place)
    assert place.exists()
    server = start(host).wait_ready()
    with StoreClient(place) as client:
        assert client.read("/local/domain/0/name") == b"Domain-0"
    server.stop()
    assert not place.exists()


@pytest.mark.parametrize("by", ["a socket", "a file", "nothing"])
def test_replaced_by_somebody(host, server, by):
    """Goal: at the end the server removes its own socket and nothing else.  Method: another file is put in its place."""
    place = socket_of(server)
    with StoreClient(place) as client:
        place.unlink()
        kept = live(place) if by == "a socket" else place.touch() if by == "a file" else None
        assert client.read("/local/domain/0/name") == b"Domain-0"
    server.process.terminate()
    assert server.wait() == 0
    assert place.exists() is (by != "nothing")
    if kept is not None:
        kept.close()


# --- clients ------------------------------------------------------------------------------------------------------------


def stats(server: Served) -> dict[str, int]:
    """What the server holds, without the client that asks."""
    with StoreClient(socket_of(server)) as client:
        found = {name: int(count) for name, count in (row.split() for row in client.control("stats").splitlines())}
    return found | {"connections": found["connections"] - 1}


def at_rest(server: Served) -> bool:
    """Does nobody get anything but who asks this?"""
    with StoreClient(socket_of(server)) as client:
        looks = [client.control("stats").splitlines() for _ in range(10)]
    counts = [sum(int(row.split()[1]) for row in rows if row.startswith("requests-")) for rows in looks]
    return counts == list(range(counts[0], counts[0] + 10))


@contextlib.contextmanager
def leaves_nothing(server: Served) -> Iterator[None]:
    """Afterwards the server has as many connections, watches, transactions and events as before, and is in order."""
    held = ("connections", "watches", "transactions", "queued-events", "domains")
    before = {name: stats(server)[name] for name in held}
    yield
    wait_until(lambda: {name: stats(server)[name] for name in held} == before, f"{before} again")
    with StoreClient(socket_of(server)) as client:
        assert client.control("check") == "OK"


def bare(server: Served) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(socket_of(server)))
    connection.settimeout(20)
    return connection


READ = pack(XsType.READ, 7, 0, b"/local/domain/0/name\0")
NAME = pack(XsType.READ, 7, 0, b"Domain-0")
TOO_LONG = [XENSTORE_PAYLOAD_MAX + 1, 1 << 31, (1 << 32) - 1]


@pytest.mark.parametrize("cut", [1, SOCKMSG.size - 1, SOCKMSG.size, SOCKMSG.size + 1, len(READ) - 1])
def test_ends_within_a_message(host, server, cut):
    """Goal: half a header, a header alone or half a body harms nobody, before and after the client is gone.
    Method: so many bytes, then another client; then the rest, or the end."""
    with leaves_nothing(server), bare(server) as slow, bare(server) as gone:
        for each in (slow, gone):
            each.sendall(READ[:cut])
        gone.close()
        with StoreClient(socket_of(server)) as client:
            assert client.read("/local/domain/0/name") == b"Domain-0"
        slow.sendall(READ[cut:])
        assert slow.recv(4096) == NAME
    server.stop()


@pytest.mark.parametrize("length", TOO_LONG)
def test_too_long(host, server, length):
    """Goal: a message longer than the protocol allows ends its connection, and no other; what was asked before is served.
    Method: a write, the header and some of the body; a client beside it with a watch and a transaction."""
    with leaves_nothing(server), bare(server) as bad, StoreClient(socket_of(server)) as client:
        client.watch("/t", "token")
        assert client.wait() == ("/t", "token")
        with client.transaction() as tx:
            client.write("/tool/u", b"1", tx)
            bad.sendall(pack(XsType.WRITE, 1, 0, b"/t\0value") + struct.pack("<IIII", XsType.READ, 2, 0, length) + b"x" * 99)
            with contextlib.suppress(ConnectionResetError):
                while bad.recv(4096):
                    pass
            assert client.read("/tool/u", tx) == b"1"
        assert client.wait() == ("/t", "token")
        assert (client.read("/t"), client.read("/tool/u")) == (b"value", b"1")
        client.unwatch("/t", "token")
    assert f"a message of {length} bytes" in server.stderr()
    server.process.terminate()
    assert server.wait() == 0


def test_killed_client(host, server):
    """Goal: what a client had is gone with it, and its transaction is not committed.
    Method: watches, open transactions, half a message; SIGKILL; another client."""
    code = """if 1:
        import signal, sys
        from xenfs.storeclient import StoreClient
        from xenmodel.xenstore.wire import join
        client = StoreClient(sys.argv[1])
        for i in range(300):
            client.watch("/t", f"token {i}")
        for i in range(20):
            tx = int(client.request([(6, join(""))])[0].rstrip(b"\\0"))
            client.write("/t/killed", b"1", tx)
        import os
        os.write(client._fd, b"half a header"[:9])
        print("go", flush=True)
        signal.pause()
    """
    with leaves_nothing(server):
        victim = host.client(sys.executable, "-c", code, socket_of(server))
        assert victim.stdout is not None and victim.stdout.readline() == "go\n"
        held = stats(server)
        assert held["watches"] >= 300 and held["transactions"] == 20
        victim.send_signal(signal.SIGKILL)
        victim.wait(20)
    with StoreClient(socket_of(server)) as client:
        assert "t" not in client.directory("/")
    server.stop()


def test_many_clients(host, server):
    """Goal: 300 clients are served at the same time, each with its own watch, and each is told of a change.
    Method: connections in this process; one write; every event; then all go at once."""
    with leaves_nothing(server), contextlib.ExitStack() as all_of_them:
        clients = [all_of_them.enter_context(StoreClient(socket_of(server))) for _ in range(300)]
        for i, client in enumerate(clients):
            client.watch("/t", f"{i}")
            assert client.wait() == ("/t", f"{i}")
        clients[0].write("/t/x", b"1")
        for i, client in enumerate(clients):
            assert client.wait() == ("/t/x", f"{i}")
            assert client.read("/t/x") == b"1"
        assert stats(server)["connections"] >= 300
    server.stop()


def test_no_descriptors_left(host):
    """Goal: a client that there is no descriptor for waits and is served when there is one again; others, and the disk,
    notice nothing; one line says so.  Method: the server's limit is taken down to what it has, and up again."""
    server = start(host).wait_ready()
    process = server.process.pid
    with StoreClient(socket_of(server)) as first:
        assert first.read("/local/domain/0/name") == b"Domain-0"
        free = min(set(range(4096)) - set(map(int, os.listdir(f"/proc/{process}/fd"))))
        host.check("prlimit", "--pid", process, f"--nofile={free}:4096")
        with bare(server) as late:
            late.sendall(READ)
            wait_until(server.stderr, "a word about it")
            assert first.read("/local/domain/0/name") == b"Domain-0"
            assert host.check("head", "-c", "2", server.disk("of-mnt")) == "\0\0"
            host.check("prlimit", "--pid", process, "--nofile=4096:4096")
            assert late.recv(4096) == NAME
    server.process.terminate()
    assert server.wait() == 0
    (line,) = server.stderr().splitlines()
    assert "has to wait" in line


def resident_kib(server: Served) -> int:
    with open(f"/proc/{server.process.pid}/status") as status:
        return next(int(row.split()[1]) for row in status if row.startswith("VmRSS:"))


def test_a_client_that_never_reads(host, server):
    """Goal: who writes and watches but never reads is stopped, costs the server little, and nobody else anything.
    Method: requests until the socket is full; another client changes what it watches, and sees its own events."""
    with leaves_nothing(server), bare(server) as deaf, StoreClient(socket_of(server)) as client:
        before = resident_kib(server)
        deaf.settimeout(1)
        requests = b"".join(
            pack(XsType.WATCH, i, 0, join(f"/t/{i}", "t" * 900)) + pack(XsType.WRITE, i, 0, join(f"/t/{i}") + b"v" * 900)
            for i in range(10_000)
        )
        with pytest.raises(TimeoutError):
            deaf.sendall(requests)
        wait_until(lambda: at_rest(server), "the server to read no more of it")
        blocked = stats(server)
        assert 0 < blocked["watches"] < 5000
        client.watch("/t", "mine")
        assert client.wait() == ("/t", "mine")
        for round_ in range(20):
            for i in range(100):
                client.write(f"/t/{i}", b"%d" % round_)
                assert client.wait() == (f"/t/{i}", "mine")
        assert stats(server)["watches"] == blocked["watches"] + 1
        assert resident_kib(server) - before < 32 * MIB_KIB
        client.unwatch("/t", "mine")
        client.rm("/t")
    server.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_with_clients(host, server, number):
    """Goal: clients do not keep the server, and learn that it is gone.
    Method: one idle, one within a message, one with much to read, one with a transaction; a signal; all see the end."""
    with bare(server) as idle, bare(server) as within, bare(server) as full, StoreClient(socket_of(server)) as client:
        within.sendall(READ[:9])
        full.sendall(pack(XsType.WRITE, 1, 0, b"/t\0" + b"v" * 3000) + pack(XsType.READ, 2, 0, b"/t\0") * 100)
        client.watch("/t", "token")
        tx = client.request([(XsType.TRANSACTION_START, join(""))])[0]
        assert isinstance(tx, bytes)
        server.stop(number)
        assert idle.recv(1) == b""
        with contextlib.suppress(ConnectionResetError):  # something of ours was not read
            while full.recv(65536):
                pass
        with contextlib.suppress(ConnectionResetError):
            assert within.recv(1) == b""
        with pytest.raises(StoreError):
            client.read("/t")
    assert not socket_of(server).exists()
