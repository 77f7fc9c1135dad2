"""What the tests of the store's client and commands talk to: scripted servers, our own store, Debian's two daemons."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench import realstore
from xenmodel.hypervisor import Hypervisor
from xenmodel.public.io.xs_wire import XsType
from xenmodel.types import Domid
from xenmodel.xenstore.dump import Entry, parse
from xenmodel.xenstore.peer import Peer
from xenmodel.xenstore.wire import Message, Parser, join, pack

Script = Callable[[Message], bytes]  # what to send for a request
TIMEOUT_S = 20.0  # for what should take no time


class Server:
    """Notes what is asked and sends what the script says; one that raises EOFError closes the connection."""

    def __init__(self, path: Path, script: Script) -> None:
        self.path = path
        self.asked: list[Message] = []
        self._script = script
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(TIMEOUT_S)
        self._listener.close()
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # of accept(), once the listener is shut down
            while True:
                connection, _ = self._listener.accept()
                with connection, contextlib.suppress(EOFError, ConnectionError):
                    talk(connection.recv, connection.sendall, self.asked, self._script)


def talk(receive: Callable[[int], bytes], send: Callable[[bytes], object], asked: list[Message], script: Script) -> None:
    parser = Parser()
    while data := receive(65536):
        parser.feed(data)
        while (message := parser.next()) is not None:
            asked.append(message)
            send(script(message))


def reply(message: Message, body: bytes = b"OK\0", kind: int | None = None) -> bytes:
    return pack(message.type if kind is None else kind, message.req_id, message.tx_id, body)


def refuse(message: Message, name: str) -> bytes:
    return reply(message, join(name), XsType.ERROR)


def event(path: str, token: str) -> bytes:
    return pack(XsType.WATCH_EVENT, 0, 0, join(path, token))


Serve = Callable[[Script], Server]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts servers; the test's own connections are closed before they end."""
    servers: list[Server] = []

    def start(script: Script) -> Server:
        servers.append(Server(tmp_path / f"socket{len(servers)}", script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


class OurXenstored:
    """Our store behind a socket as simple as can be: a thread that reads, lets the hypervisor run, and writes."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "socket"
        self.hypervisor = Hypervisor()
        self.hypervisor.create_domain(4, "Domain-0", 0)
        self._peers: dict[socket.socket, Peer] = {}
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.socket))
        self._listener.listen()
        self._bell, self._rope = socket.socketpair()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> OurXenstored:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._rope.close()
        self._thread.join(TIMEOUT_S)
        for each in (self._listener, self._bell, self._selector, *self._peers):
            each.close()
        assert not self._thread.is_alive()
        self.hypervisor.close()

    def add_domain(self, domid: int) -> None:
        """Before anybody is connected, for the thread is in the hypervisor then."""
        self.hypervisor.create_domain(4, f"guest{domid}", domid)

    def _run(self) -> None:
        while True:
            ready = [key.fileobj for key, _ in self._selector.select()]
            if self._bell in ready:
                return
            for connection in ready:
                self._serve(connection)
            self.hypervisor.settle()
            for connection, peer in self._peers.items():
                with contextlib.suppress(ConnectionError):
                    connection.sendall(peer.out)
                peer.sent(len(peer.out))

    def _serve(self, connection: object) -> None:
        assert isinstance(connection, socket.socket)
        if connection is self._listener:
            accepted, _ = self._listener.accept()
            self._peers[accepted] = self.hypervisor.xenstored.peer(Domid(0), lambda: None)
            self._selector.register(accepted, selectors.EVENT_READ)
        elif data := connection.recv(65536):
            self._peers[connection].receive(data)
        else:
            self._selector.unregister(connection)
            self._peers.pop(connection).close()
            connection.close()


Store = OurXenstored | realstore.RealStore
STORES: dict[str, Callable[[Path], Store]] = {
    "ours": OurXenstored,
    "xenstored": realstore.RealXenstored,
    "oxenstored": realstore.RealOxenstored,
}


@contextlib.contextmanager
def running(kind: str, directory: Path) -> Iterator[Store]:
    if kind != "ours" and (lacks := realstore.missing(kind)):
        pytest.skip(lacks)
    directory.mkdir()
    with STORES[kind](directory) as store:
        store.add_domain(1)
        yield store


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store that knows domains 0 and 1."""
    with running(request.param, tmp_path / "store") as made:
        yield made


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[OurXenstored]:
    with running("ours", tmp_path / "ours") as made:
        assert isinstance(made, OurXenstored)
        yield made


# A tree with all kinds of values and permissions, as a dump shows it.
TREE = r"""
# a guest
/local = ""   (n0)
/local/domain = ""   (n0)
/local/domain/1 = ""   (n0,r1)
/local/domain/1/name = "guest1"   (n0,r1)
/local/domain/1/zz = ""   (n1)
/local/domain/1/zz/value = "say \"it\"\t\000\x1b[31m\xff \\ "   (n1,r0)
/local/domain/1/aa = "second, though it sorts first"   (b1,r0)
/local/domain/0 = ""   (r0)
/local/domain/0/name = "Domain-0"   (n0)
"""[1:].replace(r"\"", '"')
LINES = TREE.splitlines()[1:]


def entries(text: str = TREE) -> list[Entry]:
    return list(parse(text.splitlines()))
