"""Goal: unmodified programs on libxenevtchn have event channels as Linux's driver gives them.
Method: tests/devxen/events.c in two guests and domain 0; what xenfs says of their ports in inspect/evtchn."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from functools import partial

import pytest

from tests.host.devxen import DevXen, Program, needs_libraries, rows, served
from tests.host.served import Host

pytestmark = [pytest.mark.host, needs_libraries]

RING = 1024  # ports that an open may have unread
VIRQ_DEBUG = 1
UNBIND, MADE_UP = 0x00044503, 0x000445FF  # ioctls


@pytest.fixture
def xen(host: Host) -> Iterator[DevXen]:
    with served(host) as built:
        yield built


def joined(xen: DevXen, domid: int = 1, peer_domid: int = 2) -> tuple[Program, int, Program, int]:
    """Two programs with a channel between them, and nothing unread."""
    one, other = xen.events(domid), xen.events(peer_domid)
    return (one, *join(one, domid, other, peer_domid))


def join(one: Program, domid: int, other: Program, peer_domid: int) -> tuple[int, Program, int]:
    port = one.number("bind-unbound", peer_domid)
    peer_port = other.number("bind-interdomain", domid, port)
    assert other.number("pending") == peer_port
    other.ok("unmask", peer_port)
    return port, other, peer_port


@pytest.mark.parametrize(("domid", "peer_domid"), [(1, 2), (2, 0), (0, 1), (0, 0)])
def test_both_ways(xen, domid, peer_domid):
    """Goal: each end's event arrives at the other, between guests, with domain 0 and within it.
    Method: one event each way with the table looked at, then many round trips."""
    one, other = xen.events(domid), xen.events(peer_domid)
    port = one.number("bind-unbound", peer_domid)
    assert (xen.ports(domid)[port]["state"], xen.ports(domid)[port]["remote"]) == ("unbound", f"{peer_domid}:-")
    peer_port = other.number("bind-interdomain", domid, port)
    row, peer_row = xen.ports(domid)[port], xen.ports(peer_domid)[peer_port]
    assert (row["state"], row["remote"]) == ("interdomain", f"{peer_domid}:{peer_port}")
    assert (peer_row["state"], peer_row["remote"]) == ("interdomain", f"{domid}:{port}")
    assert f"events[{one.process.pid}]" in row.values() and f"events[{other.process.pid}]" in peer_row.values()
    assert other.number("pending") == peer_port  # for one may have been lost before
    other.ok("unmask", peer_port)
    other.ok("notify", peer_port)
    assert one.number("pending") == port
    one.ok("unmask", port)
    one.ok("notify", port)
    assert other.number("pending") == peer_port
    other.ok("unmask", peer_port)
    one.send("return", port, 300)
    other.ok("rally", peer_port, 300)
    assert one.reply() == "ok"


@pytest.mark.parametrize("how", ["poll", "select", "epoll"])
def test_waiting(xen, how):
    """Goal: poll, select and epoll wake when an event comes and not before; such a descriptor can always be written to.
    Method: each without an event, with one that comes later, with one that is there, and after it was read."""
    one, port, other, peer_port = joined(xen)
    for _ in range(2):
        assert one.ask(how, 50) == "timeout"
        one.send(how, 10_000)
        assert one.quiet()
        other.ok("notify", peer_port)
        assert (one.reply(), one.ask(how, 10_000)) == ("in", "in")
        assert one.number("pending") == port
        assert one.ask(how, 0) == "timeout"
        one.ok("unmask", port)
    assert one.ask("writable") == "out"


def test_reading(xen):
    """Goal: read(2) waits unless it must not, and takes as many ports as there are and fit.
    Method: a blocking read with the event later, O_NONBLOCK on and off, several ports at once, odd sizes."""
    one, port, other, peer_port = joined(xen)
    one.send("pending")
    assert one.quiet()
    other.ok("notify", peer_port)
    assert one.reply() == str(port)
    one.ok("unmask", port)
    one.ok("nonblock", "on")
    assert (one.ask("pending"), one.ask("read", 4096)) == ("error EAGAIN",) * 2
    pairs = {port: peer_port}
    for _ in range(4):
        port, _, peer_port = join(one, 1, other, 2)
        pairs[port] = peer_port
    for peer_port in pairs.values():
        other.ok("notify", peer_port)
    assert one.ask("read", 3) == "0"
    first, *two = one.numbers("read", 11)  # room for two
    assert (first, len(two)) == (8, 2)
    size, *rest = one.numbers("read", 4096)
    assert size == 12 and {*two, *rest} == set(pairs)
    assert one.ask("pending") == "error EAGAIN"
    one.ok("nonblock", "off")
    one.send("pending")
    assert one.quiet()
    one.process.kill()


def test_masked_until_unmasked(xen):
    """Goal: an event is read once; more of them wait, as one, until the port is written back.
    Method: many events before the read, one after it, with reads that do not wait in between."""
    one, port, other, peer_port = joined(xen)
    one.ok("nonblock", "on")
    other.ok("notify", peer_port, 5)
    assert one.number("pending") == port
    assert one.ask("pending") == "error EAGAIN" and xen.ports(1)[port]["masked"] == "1"
    other.ok("notify", peer_port, 5)
    assert one.ask("pending") == "error EAGAIN" and xen.ports(1)[port]["pending"] == "1"
    one.ok("unmask", port)
    assert one.number("pending") == port
    one.ok("unmask", port)
    assert one.ask("pending") == "error EAGAIN"
    row = xen.ports(1)[port]
    assert (row["masked"], row["pending"]) == ("0", "0")


def test_errors(xen):
    """Goal: what cannot be done is refused with Linux's errno and changes nothing.
    Method: a table of commands and answers; the program's own channel works afterwards."""
    one, port, other, peer_port = joined(xen)
    waiting = other.number("bind-unbound", 0)
    foreign = xen.events(1).number("bind-unbound", 2)  # of the same domain, but of another open
    kernels = next(number for number, row in xen.ports(1).items() if number < min(port, foreign))
    one.number("bind-virq", VIRQ_DEBUG)
    before = xen.held(1, 2)
    cases = [
        (("notify", 3000), "ENOTCONN"),
        (("unbind", 3000), "ENOTCONN"),
        (("notify", foreign), "ENOTCONN"),
        (("unbind", foreign), "ENOTCONN"),
        (("notify", kernels), "ENOTCONN"),
        (("unbind", kernels), "ENOTCONN"),
        (("notify", 5000), "EINVAL"),
        (("unbind", -1), "EINVAL"),
        (("bind-interdomain", 2, waiting), "EINVAL"),  # waits for another domain
        (("bind-interdomain", 2, peer_port), "EINVAL"),  # does not wait
        (("bind-interdomain", 2, 70_000), "EINVAL"),
        (("bind-interdomain", 77, 1), "ESRCH"),
        (("bind-virq", 99), "EINVAL"),
        (("bind-virq", VIRQ_DEBUG), "EEXIST"),
        (("ioctl", UNBIND, 1), "EFAULT"),
        (("ioctl", UNBIND, 1 << 63), "EFAULT"),
        (("ioctl", MADE_UP, 0), "ENOTTY"),
    ]
    assert [one.ask(*words) for words, _ in cases] == [f"error {name}" for _, name in cases]
    one.ok("unmask", foreign, kernels, 3000, 5000)  # not its own: as if not written
    assert xen.held(1, 2) == before
    one.send("return", port, 3)
    other.ok("rally", peer_port, 3)
    assert one.reply() == "ok"


def test_restricted(xen):
    """Goal: a program that restricted its descriptor to a domain can reach no other, ever.
    Method: before and after IOCTL_EVTCHN_RESTRICT_DOMID; ports for it wait in both guests."""
    one, other, zero = xen.events(1), xen.events(2), xen.events(0)
    ports = other.number("bind-unbound", 1), zero.number("bind-unbound", 1)
    assert one.ask("restrict", 0x7FF0) == "error EINVAL"
    one.ok("restrict", 2)
    refused = [("restrict", 2), ("bind-interdomain", 0, ports[1]), ("bind-unbound", 2), ("bind-virq", VIRQ_DEBUG)]
    assert [one.ask(*words) for words in refused] == ["error EACCES"] * 4
    port = one.number("bind-interdomain", 2, ports[0])
    assert one.number("pending") == port


@pytest.mark.parametrize("how", ["unbind", "close", "end", "kill", "kill while it waits"])
def test_the_other_end_goes(xen, how):
    """Goal: whichever way a program leaves its port, the peer's is unbound, waits for that domain, and can be bound again.
    Method: unbind, close, exit, SIGKILL; the table; then another program of the same domain takes the place."""
    before = xen.held(1)
    one, port, other, peer_port = joined(xen)
    leave = {
        "unbind": partial(one.ok, "unbind", port),
        "close": partial(one.ok, "close"),
        "end": one.end,
        "kill": one.kill,
        "kill while it waits": one.kill,
    }
    if "waits" in how:
        one.send("pending")
        assert one.quiet()
    leave[how]()
    xen.wait_port(2, peer_port, state="unbound", remote="1:-")
    xen.wait_held(before, 1)
    other.ok("notify", peer_port)  # to nobody
    third = xen.events(1)
    third_port = third.number("bind-interdomain", 2, peer_port)
    assert third.number("pending") == third_port
    third.ok("unmask", third_port)
    third.send("return", third_port, 3)
    other.ok("rally", peer_port, 3)
    assert third.reply() == "ok"


def test_signals(xen):
    """Goal: a program that waits for an event is interrupted by a signal and goes on as before; others end it.
    Method: SIGALRM with a handler, in read and poll; then an event; SIGTERM while it waits."""
    one, port, other, peer_port = joined(xen)
    for waits in (("pending",), ("poll", 20_000)):
        one.ok("alarm", 200)
        assert one.ask(*waits) == "error EINTR"
    one.send("return", port, 3)
    other.ok("rally", peer_port, 3)
    assert one.reply() == "ok"
    one.send("pending")
    assert one.quiet()
    one.kill(signal.SIGTERM)
    xen.wait_port(2, peer_port, state="unbound")


def test_cat(xen):
    """Goal: `cat` on the device shows the domain's ports and ends, before and while programs use it.
    Method: the same rows as in inspect/evtchn, in each domain; the short way in the mount."""
    for _ in range(2):
        for domid in (0, 1, 2):
            shown = rows(xen.host.read(xen.path(domid, "dev/xen/evtchn")), "port")
            assert {int(row["port"]) for row in shown} == set(xen.ports(domid))
        shown = rows(xen.host.read(xen.served.mnt / "dev/xen/evtchn"), "port")
        assert {int(row["port"]) for row in shown} == set(xen.ports(0))
        joined(xen)


def test_overflow(xen):
    """Goal: who reads nothing for more ports than the ring holds is told, once for all, until he resets it.
    Method: more ports than that, each pending from the start; read, poll, reset, then all of them unmasked."""
    one, other = xen.events(1), xen.events(2)
    ports = [one.number("bind-unbound", 2) for _ in range(RING + 10)]
    peers = [other.number("bind-interdomain", 1, port) for port in ports]
    other.ok("nonblock", "on")
    assert [other.ask("read", 4096) for _ in range(2)] == ["error EFBIG"] * 2
    assert other.ask("poll", 0) == "error"
    other.ok("reset")
    assert (other.ask("poll", 0), other.ask("pending")) == ("timeout", "error EAGAIN")
    other.ok("unmask", *peers)
    one.ok("notify", ports[-1])
    assert other.number("pending") == peers[-1]
    size, *unread = one.numbers("read", 4) if one.ask("poll", 0) == "in" else (0,)
    assert (size, unread) == (0, [])
    one.ok("unbind", *ports)
    assert {row["state"] for port, row in xen.ports(2).items() if port in peers} == {"unbound"}


def test_many_ports(xen):
    """Goal: an open with hundreds of ports gets each event of each of them.
    Method: all of them sent to, read in pieces, written back, in three rounds."""
    one, other = xen.events(1), xen.events(2)
    pairs = {}
    for _ in range(300):
        port, _, peer_port = join(one, 1, other, 2)
        pairs[port] = peer_port
    for _ in range(3):
        for peer_port in pairs.values():
            other.ok("notify", peer_port)
        seen: list[int] = []
        while len(seen) < len(pairs):
            seen += one.numbers("read", 256)[1:]
        assert sorted(seen) == sorted(pairs)
        one.ok("unmask", *seen)
        one.ok("nonblock", "on")
        assert one.ask("read", 4096) == "error EAGAIN"
        one.ok("nonblock", "off")


@pytest.mark.parametrize("reads", [False, True])
def test_stopped_program(xen, reads):
    """Goal: a program that does not run costs others nothing, and misses nothing for which it was sent an event.
    Method: SIGSTOP, also in the middle of a read (which then is EINTR, where Xen's goes on: the kernel restarts no call of
    FUSE's); a flood to it; another pair's round trips; then SIGCONT."""
    one, port, other, peer_port = joined(xen)
    third, third_port, fourth, fourth_port = joined(xen)
    if reads:
        one.send("pending")
        assert one.quiet()
    one.stop()
    other.send("notify", peer_port, 3000)
    third.send("return", third_port, 300)
    began = time.monotonic()
    fourth.ok("rally", fourth_port, 300)
    assert time.monotonic() - began < 10 and third.reply() == other.reply() == "ok"
    assert one.quiet()
    one.resume()
    assert not reads or one.reply() == "error EINTR"
    assert one.number("pending") == port
    one.ok("unmask", port)
    assert one.number("pending") == port  # those after the first
    one.ok("unmask", port)
    one.ok("nonblock", "on")
    assert one.ask("pending") == "error EAGAIN"


def test_many_programs(xen):
    """Goal: pairs of programs do not disturb one another.  Method: eight pairs in three domains, all at once."""
    pairs = [joined(xen, i % 3, (i + 1) % 3) for i in range(8)]
    for one, port, other, peer_port in pairs:
        one.send("return", port, 150)
        other.send("rally", peer_port, 150)
    assert {program.reply(60) for one, _, other, _ in pairs for program in (one, other)} == {"ok"}


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random(xen, seed):
    """Goal: a program killed at any moment leaves no port, and its peers work.
    Method: six that bind, send and unbind as fast as they can, each killed after a random time; a pair goes on meanwhile."""
    draw = random.Random(seed)
    one, port, other, peer_port = joined(xen)
    before = xen.held(0, 1, 2)
    victims = [xen.events(i % 3) for i in range(6)]
    for i, victim in enumerate(victims):
        victim.send("churn", draw.randrange(1 << 30), (i + 1) % 3)
    for victim in draw.sample(victims, len(victims)):
        assert victim.quiet(draw.uniform(0.0, 0.1))
        victim.kill()
        one.send("return", port, 5)
        other.ok("rally", peer_port, 5)
        assert one.reply() == "ok"
    xen.wait_held(before, 0, 1, 2)


def test_server_ends(xen):
    """Goal: programs that wait do not keep xenfs from ending, and learn of its end.
    Method: one reads, one polls; SIGTERM to the server, which must be clean."""
    one, _, other, _ = joined(xen)
    one.send("pending")
    other.send("poll", 20_000)
    assert one.quiet() and other.quiet()
    xen.served.stop()
    assert one.reply() in {"error ECONNABORTED", "error ENOTCONN", "error EIO"}
    assert other.reply() in {"in", "error"}
