"""Goal: links go down without harm to anything else; every start that cannot be says so in one line; and nothing is left on
the host, however it ends.
Method: the real command, killed, stopped and refused at all stages; links taken down under TCP flows."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator

import pytest

from netdev.netlink import namespaces
from tests.host.net import BRIDGE, GIB, HOST4, MIB, Net, address4, address6, packets, read_line, wait_flowing, wait_until
from tests.host.served import Host, Served, mounts_at
from tests.host.test_flush import switches

pytestmark = pytest.mark.host

SLEEP = "import socket, sys; keep = socket.socket(); print('here', flush=True); sys.stdin.read()"


@pytest.fixture
def net(host: Host) -> Iterator[Net]:
    with Net(host) as made:
        yield made


# ---- links ----


@pytest.mark.parametrize(("place", "name"), [("host", "vif1.0"), ("a", "xn0"), ("host", "xenbr0")])
def test_down_and_up(net, place, name):
    """Goal: an interface that is taken down and up again, at either end, costs time and nothing else: the flows go on, and
    the other guest does not notice.  Method: three times while TCP flows in both directions; another guest's flow."""
    server = net.guests("ab")
    flows = [net.flow("a", "host", HOST4, GIB), net.flow("host", "a", address4("a"), GIB)]
    wait_flowing(net, "vif1.0", "tx")  # while the bridge is down nobody on the host could connect
    for _ in range(3):
        wait_flowing(net, "vif1.0")
        net.ip(place, "link", "set", name, "down")
        if name != "xenbr0":
            net.transfer("b", "host", HOST4, 8 * MIB)
        assert all(flow.client.poll() is None for flow in flows), "they are still under way"
        net.ip(place, "link", "set", name, "up")
    for flow in flows:
        flow.finish()
    net.ping("a", HOST4)
    net.check_sums("host", "a", "b")
    net.stop(server)


# ---- starts that cannot be ----


def test_no_bridge(net):
    """Goal: a vif on a bridge that is not there is refused with what would help, and a name that is no bridge too; guests
    that were there already are gone again.  Method: as only, and as second guest."""
    line = net.refused(net.config("a"), bridge="")
    assert line.startswith(f"xenfs: {net.names['a']}: vif 0: there is no bridge xenbr0; `--bridge xenbr0` makes one")
    assert net.left() == []
    line = net.refused(net.config("a"), net.config("b", "bridge=nothere"))
    assert line.startswith(f"xenfs: {net.names['b']}: vif 0: there is no bridge nothere; ")
    assert net.left() == []
    net.spaces["host"].plain("plain")
    assert "plain is no bridge, but tun" in net.refused(net.config("a", "bridge=plain"), bridge="")
    assert net.left() == ["plain"]


def test_names_taken(net):
    """Goal: an interface or bridge of somebody else is not touched: the start is refused with the name.
    Method: interfaces made by ip(8) have the names that the vif, a vifname and --bridge would need."""
    cases = [("vif1.0", "", BRIDGE), ("mine", "vifname=mine", BRIDGE), ("xenbr0", "", BRIDGE)]
    for name, vif, bridge in cases:
        net.spaces["host"].plain(name)
        before = net.link("host", name)
        line = net.refused(net.config("a", vif), bridge=bridge)
        assert line.startswith("xenfs: ") and f"{name!r}" in line and "another name" in line, line
        assert net.left() == [name] and net.link("host", name) == before
        net.ip("host", "link", "delete", name)


@pytest.mark.parametrize(
    "bridge", ["=10.1.1.1/24", "xenbr0=10.1.1.1", "xenbr0=x/24", "xenbr0=10.1.1.1/24,,", "a/b", "x" * 16]
)
def test_bad_bridge(net, bridge):
    """Goal: a --bridge that makes no sense is refused, and nothing of it stays.  Method: names and addresses."""
    line = net.refused(net.config("a"), bridge=bridge)
    assert line.startswith("xenfs: cannot make bridge ") and repr(bridge.partition("=")[0]) in line, line
    assert net.left() == []


def test_namespace_in_use(net):
    """Goal: a guest's namespace belongs to one server: a second one with that guest is refused, with the reason, and
    harms nothing; also if the namespace is somebody else's.  Method: two servers; a namespace made by ip(8)."""
    first = net.guests("a")
    line = net.refused(net.config("a", "bridge=other"), bridge="other")
    assert repr(net.namespace("a")) in line and f"process {first.process.pid}" in line, line
    net.ping("a", HOST4)
    net.stop(first)
    net.host.check("ip", "netns", "add", net.namespace("a"))
    line = net.refused(net.config("a"))
    assert repr(net.namespace("a")) in line and "xenfs has not made it" in line, line
    assert net.left() == [net.namespace("a")]


# ---- ends ----


def test_killed(net):
    """Goal: what a killed server leaves is known as its own and taken over by the next, which is as good as the first.
    Method: SIGKILL with two guests and traffic; what is left; the same again, up to a clean end."""
    for _ in range(2):
        server = net.guests("ab")
        flow = net.flow("a", "b", address4("b"), 100 * GIB)
        wait_flowing(net, "vif1.0")
        server.close()
        flow.stop()
        wait_until(lambda: net.left() == [net.namespace("a"), net.namespace("b"), "xenbr0"], "the interfaces to go")
    server = net.guests("ab")
    for place, to in (("a", HOST4), ("a", address6("b")), ("host", address6("a"))):
        net.ping(place, to)
    net.stop(server)


def test_killed_with_clients(net):
    """Goal: a process that stays in the namespace of a killed server's guest does not keep the next from starting.
    Method: SIGKILL, the same guest again; the old process sees no new interface, the new namespace works."""
    server = net.guests("a")
    old = net.start("a", sys.executable, "-c", SLEEP)
    assert read_line(old) == "here"
    server.close()
    again = net.guests("a")
    net.ping("a", HOST4)
    net.stop(again)
    assert net.host.finish(old).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_clients_at_the_end(net, number):
    """Goal: programs in a guest's namespace do not keep the server from its end, nor its interfaces from going.
    Method: a process with a socket, and TCP under way in both directions; a signal; then the namespace has no name, and
    the process sees only `lo`."""
    server = net.guests("a")
    stays = net.start("a", sys.executable, "-c", SLEEP)
    assert read_line(stays) == "here"
    flows = [net.flow("a", "host", HOST4, 100 * GIB), net.flow("host", "a", address4("a"), 100 * GIB)]
    wait_flowing(net, "vif1.0")
    server.stop(number)
    assert net.left() == []
    links = net.host.check("nsenter", "-t", stays.pid, "--net", "ip", "-br", "link")
    assert [line.split()[0] for line in links.splitlines()] == ["lo"]
    for flow in flows:
        flow.stop()
    assert net.host.finish(stays).returncode == 0


def test_stopped_while_it_starts(net):
    """Goal: a signal at any moment of the start leaves nothing.  Method: delays in steps of 40 ms, from the start of the
    process to beyond `ready`."""
    configs = [net.config("a", "", "", ""), net.config("b")]
    for step in range(14):
        server = net.serve(*configs)
        time.sleep(step * 0.04)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() in (0, 130, -signal.SIGTERM), server.stderr()
        assert "Traceback" not in server.stderr()
        assert (net.left(), mounts_at(server.mnt)) == ([], []), f"after {step * 40} ms"


def test_no_mount(net):
    """Goal: a failure after the guests are connected takes the network down again.  Method: a mount point in use."""
    first = net.guests("a")
    server = net.serve(net.config("b", "bridge=other"), bridge="other")
    assert server.wait() == 1 and "Traceback" not in server.stderr()
    assert net.left() == [net.namespace("a"), "vif1.0", "xenbr0"]
    net.stop(first)
    assert net.namespace("b") not in namespaces()


def test_idle(net):
    """Goal: a network that has nothing to say wakes nobody, whatever it did before.
    Method: transfers and pings; IPv6, whose kernel side keeps on talking, is turned off; two seconds of all switches."""
    server = net.guests("ab", "queues=2")
    for sender, receiver, to in (("a", "host", HOST4), ("host", "b", address4("b")), ("a", "b", address4("b"))):
        net.transfer(sender, receiver, to, 16 * MIB)
    for place in ("host", "a", "b"):
        net.sysctl(place, "net.ipv6.conf.all.disable_ipv6", 1)
    net.ping("a", HOST4)
    quiet(server)
    net.ping("a", HOST4)
    assert packets(net.inspect(server, "a")["tx-0"]) > 0
    net.stop(server)


def quiet(server: Served) -> None:
    deadline = time.monotonic() + 30
    before = switches(server.process.pid)
    while time.monotonic() < deadline:  # ARP entries may still be confirmed
        time.sleep(2)
        now, before = before, switches(server.process.pid)
        if now == before:
            break
    assert now == before
