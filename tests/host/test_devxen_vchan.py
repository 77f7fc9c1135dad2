"""Goal: unmodified programs on libxenvchan speak to one another across domains, and learn when the other is gone.
Method: tests/devxen/vchan.c as server and client in guests and domain 0; nothing of it is left in xenfs."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from tests.host.devxen import DevXen, Program, needs_libraries, served
from tests.host.served import MIB, Host

pytestmark = [pytest.mark.host, needs_libraries]

IN_PAGE, SOME_PAGES, LARGEST = 1024, 16384, MIB  # how large the rings are
LEARN_S = 5.0  # how soon an end must know that the other is gone
PAIRS = [(1, 2), (2, 1), (1, 0), (0, 1), (0, 0)]


@pytest.fixture
def xen(host: Host) -> Iterator[DevXen]:
    with served(host) as built:
        yield built


class Channel:
    """A server and its client. `work` is what each of them does."""

    def __init__(self, xen: DevXen, domid: int, peer_domid: int, ring: int = SOME_PAGES, name: str = "v") -> None:
        self.xen, self.domid, self.peer_domid, self.ring = xen, domid, peer_domid, ring
        self.path = f"/local/domain/{domid}/data/{name}" if domid else f"/tool/{name}"

    def server(self, *work: object) -> Program:
        return self.xen.start(self.domid, "vchan", "server", self.peer_domid, self.path, self.ring, *work)

    def client(self, *work: object) -> Program:
        return self.xen.start(self.peer_domid, "vchan", "client", self.domid, self.path, self.ring, *work)

    def both(self, server: tuple[object, ...], client: tuple[object, ...]) -> tuple[Program, Program]:
        """Both, and connected."""
        ends = self.server(*server), self.client(*client)
        assert [end.reply() for end in ends] == ["connected"] * 2
        return ends

    def nodes(self) -> bool:
        """Whether the server's nodes are in the store."""
        code = self.xen.host.run("test", "-e", f"{self.xen.served.mnt}/xenstore{self.path}/ring-ref").returncode
        assert code in (0, 1)
        return code == 0


@pytest.mark.parametrize("ring", [IN_PAGE, SOME_PAGES, LARGEST])
@pytest.mark.parametrize(("domid", "peer_domid"), PAIRS[1:4])
def test_echo(xen, domid, peer_domid, ring):
    """Goal: every byte comes back as it was, with rings within the page and of their own, in both roles.
    Method: pieces of random sizes to a server that echoes; the client closes, the server sees it and tidies up."""
    before = xen.held(0, 1, 2)
    channel = Channel(xen, domid, peer_domid, ring)
    server, client = channel.both(("echo",), ("ask", 300_000, 7))
    asked, echoed = client.json(60), server.json()
    assert (asked["finished"], asked["sent"], asked["received"], asked["wrong"]) == (True, 300_000, 300_000, 0)
    assert (echoed["received"], echoed["sent"], echoed["peer"]) == (300_000, 300_000, 0)
    assert (client.end(), server.end()) == (0, 0)
    assert not channel.nodes()
    xen.wait_held(before, 0, 1, 2)


@pytest.mark.parametrize("server_sends", [False, True])
def test_throughput(xen, server_sends):
    """Goal: a stream arrives whole and in order, whoever sends.  Method: 32 MiB with a pattern, checked by who reads."""
    channel = Channel(xen, 1, 2, LARGEST)
    source, sink = ("source", 32 * MIB, 3), ("sink", 0, 3)
    ends = channel.both(source, sink) if server_sends else channel.both(sink, source)
    sender, receiver = ends if server_sends else ends[::-1]
    sent, got = sender.json(60), receiver.json()
    assert (sent["finished"], sent["sent"]) == (True, 32 * MIB)
    assert (got["received"], got["wrong"], got["peer"]) == (32 * MIB, 0, 0)


def test_round_trips(xen):
    """Goal: no event is lost: each byte is answered at once.  Method: a thousand times one byte; none is slow."""
    server, client = Channel(xen, 1, 0, IN_PAGE).both(("echo",), ("rounds", 1000, 5))
    seen = client.json(60)
    assert (seen["finished"], seen["wrong"], seen["received"]) == (True, 0, 1000)
    assert seen["slowest"] < 5.0
    assert server.json()["received"] == 1000


@pytest.mark.parametrize("victim", ["server", "client"])
@pytest.mark.parametrize("work", [("wait", "wait"), ("echo", "ask"), ("sink", "source")])
def test_killed(xen, victim, work):
    """Goal: when one end is killed the other knows at once, idle or busy, and nothing of either is left.
    Method: SIGKILL; what the other says of its peer. Then a new pair connects at the same place."""
    before = xen.held(0, 1, 2)
    channel = Channel(xen, 1, 2)
    server, client = channel.both((work[0],), (work[1], 1 << 40))
    assert server.quiet()
    dies, stays = (server, client) if victim == "server" else (client, server)
    dies.kill()
    began = time.monotonic()
    seen = stays.json(LEARN_S)
    assert time.monotonic() - began < LEARN_S
    assert (seen["finished"], seen["peer"], seen["wrong"]) == (False, 0, 0)
    assert stays.end() == 0
    xen.wait_held(before, 0, 1, 2)
    assert channel.nodes() == (victim == "server")
    server = channel.server("echo")
    assert server.reply() == "connected"
    client = channel.client("ask", 10_000)
    assert client.reply() == "connected"
    assert client.json()["wrong"] == 0 == server.json()["peer"]


@pytest.mark.parametrize("first", ["server", "client"])
def test_killed_both(xen, first):
    """Goal: nothing is left when both ends are killed, whichever is the first.  Method: SIGKILL to one, then the other."""
    before = xen.held(0, 1, 2)
    server, client = Channel(xen, 1, 2, LARGEST).both(("echo",), ("ask", 1 << 40))
    assert client.quiet()
    ends = (server, client) if first == "server" else (client, server)
    for program in ends:
        program.process.send_signal(signal.SIGKILL)
    assert ends[0].process.wait(10) == -signal.SIGKILL
    ends[1].process.wait(10)  # it may have seen that, and ended by itself
    xen.wait_held(before, 0, 1, 2)


def test_client_that_waits_for_a_server(xen):
    """Goal: a client may be there first.  Method: the server starts while the client tries; the client before it fails."""
    channel = Channel(xen, 1, 2)
    client = channel.client("ask", 10_000)
    assert client.quiet()
    server = channel.server("echo")
    assert client.reply() == server.reply() == "connected"
    assert client.json()["wrong"] == 0


def test_several_at_once(xen):
    """Goal: channels do not disturb one another.  Method: two of each pair of domains at once, all bytes checked."""
    before = xen.held(0, 1, 2)
    channels = [Channel(xen, *pair, ring, f"v{ring}{i}") for i, pair in enumerate(PAIRS) for ring in (IN_PAGE, SOME_PAGES)]
    servers = [channel.server("echo") for channel in channels]
    assert {server.reply() for server in servers} == {"connected"}
    clients = [channel.client("ask", 100_000, i) for i, channel in enumerate(channels)]
    assert {client.reply() for client in clients} == {"connected"}
    assert {(seen["received"], seen["wrong"]) for seen in (client.json(60) for client in clients)} == {(100_000, 0)}
    assert {server.json()["received"] for server in servers} == {100_000}
    for program in (*clients, *servers):
        assert program.end() == 0
    xen.wait_held(before, 0, 1, 2)


def test_stopped_server(xen):
    """Goal: a server that does not run keeps its own client waiting and nobody else.
    Method: SIGSTOP in the middle of a stream; another channel of the same domains; SIGCONT, and the rest comes."""
    server, client = Channel(xen, 1, 2).both(("echo",), ("ask", 2 * MIB))
    server.stop()
    for i in range(2):
        _, other = Channel(xen, 1, 2, name=f"w{i}").both(("echo",), ("ask", 100_000, i))
        assert (other.json()["wrong"], client.process.poll()) == (0, None)
    server.resume()
    seen = client.json(60)
    assert (seen["received"], seen["wrong"]) == (2 * MIB, 0)


def test_server_ends(xen):
    """Goal: channels do not keep xenfs from ending, and their programs do not hang when it is gone.
    Method: an idle pair and a busy one; SIGTERM to xenfs, which must be clean; all four end."""
    programs = [
        *Channel(xen, 1, 2, name="a").both(("wait",), ("wait",)),
        *Channel(xen, 1, 2, name="b").both(("echo",), ("ask", 1 << 40)),
    ]
    xen.served.stop()
    for program in programs:
        assert program.process.wait(20) is not None
