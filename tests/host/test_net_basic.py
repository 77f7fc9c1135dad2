"""Goal: a guest's interface is one: the host and other guests can be reached through it over IPv4 and IPv6, with datagrams
of every size, single, broadcast and multicast, and what is too large is said to be so.
Method: the real command in a network namespace; ping(8), sockets and ip(8) in the namespaces of its guests."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.host.net import HOST4, HOST6, MIB, Net, address4, address6, packets
from tests.host.served import Host, Served

pytestmark = pytest.mark.host

SAY = """
import socket, sys
address, port, count, interface = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
wire = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
wire.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
wire.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
for number in range(count):
    wire.sendto(f"number {number}".encode(), (address, port))
"""


@pytest.fixture
def net(host: Host) -> Iterator[Net]:
    with Net(host) as made:
        yield made


def test_ping(net):
    """Goal: everybody reaches everybody, at once and with datagrams of many fragments; nothing is dropped, and the server
    says what it has connected.  Method: ping each way, of 56 and 60000 bytes; the counters of both drivers."""
    server = net.guests("ab")
    assert [line.split(": ")[0] for line in server.lines] == [f"{net.names[letter]} xn0" for letter in "ab"]
    assert all(f"in network namespace {net.namespace(letter)}, bridge xenbr0, connected" in line
               for letter, line in zip("ab", server.lines, strict=True))  # fmt: skip
    for place, to in (
        ("a", HOST4), ("a", HOST6), ("host", address4("a")), ("host", address6("a")),
        ("a", address4("b")), ("a", address6("b")), ("b", address4("a")), ("b", address6("a")),
    ):  # fmt: skip
        net.ping(place, to)
        net.ping(place, to, "-s", 60000)
        for size in (0, 1, 1472, 1473, 4000):
            net.ping(place, to, "-s", size, count=1)
    for letter in "ab":
        facts = net.inspect(server, letter)
        assert packets(facts["tx-0"]) > 300 and packets(facts["rx-0"]) > 300, "fragments went through the rings"
        assert "dropped=0" in facts["tx-0"] and "dropped=0" in facts["rx-0"]
    net.check_sums("host", "a", "b")
    net.stop(server)


def test_interfaces(net):
    """Goal: the interfaces are as configured: names, addresses, MACs, MTU, carrier, and on the bridge.  Method: ip(8)."""
    server = net.up(net.config("a", "mac=00:16:3e:00:00:0a", "vifname=second,ip=10.88.0.99/24,mtu=1400"))
    first, second = net.link("a", "xn0"), net.link("a", "xn1")
    assert (first["address"], first["mtu"], first["operstate"]) == ("00:16:3e:00:00:0a", 1500, "UP")
    assert (second["mtu"], second["operstate"]) == (1400, "UP")
    assert second["address"].startswith("00:16:3e:") and second["address"] != first["address"]
    for name, mtu in (("vif1.0", 1500), ("second", 1400)):
        row = net.link("host", name)
        assert (row["master"], row["operstate"], row["mtu"], row["address"]) == ("xenbr0", "UP", mtu, "fe:ff:ff:ff:ff:ff")
    assert "10.88.0.99/24" in net.ip("a", "address", "show", "xn1")
    assert "10.88.0.1/24" in net.ip("host", "address", "show", "xenbr0")
    net.ping("a", HOST4, "-I", "xn1")
    net.stop(server)


def test_too_large(net):
    """Goal: a datagram larger than the MTU that may not be fragmented is refused to its sender, who is told the MTU; one
    of just that size goes.  Method: ping -M do at the edge, both IP versions, from both ends."""
    server = net.guests("a")
    for place, to, most in (
        ("a", HOST4, 1472), ("a", HOST6, 1452), ("host", address4("a"), 1472), ("host", address6("a"), 1452),
    ):  # fmt: skip
        net.ping(place, to, "-M", "do", "-s", most)
        done = net.run(place, "ping", "-n", "-c", 1, "-W", 0.3, "-M", "do", "-s", most + 1, to)
        assert done.returncode != 0 and "mtu" in done.stdout.lower(), done.stdout
    net.stop(server)


def test_jumbo(net):
    """Goal: mtu=9000 makes a link of 9000 bytes from end to end, beside one of 1500.
    Method: two guests; ping -M do of exactly that, each way; a TCP transfer."""
    server = net.guests("ab", "mtu=9000")
    assert net.link("host", "xenbr0")["mtu"] == 9000, "the bridge follows its ports"
    for place, to, most in (
        ("a", HOST4, 8972), ("a", HOST6, 8952), ("host", address4("a"), 8972), ("host", address6("a"), 8952),
        ("a", address4("b"), 8972),
    ):  # fmt: skip
        net.ping(place, to, "-M", "do", "-s", most)
        assert net.run(place, "ping", "-c", 1, "-W", 0.3, "-M", "do", "-s", most + 1, to).returncode != 0
    for sender, receiver, to in (("a", "host", HOST4), ("host", "a", address4("a")), ("a", "b", address4("b"))):
        net.transfer(sender, receiver, to, 32 * MIB)
    net.check_sums("host", "a", "b")
    net.stop(server)


def test_jumbo_bridge(net):
    """Goal: a vif without mtu takes that of a bridge which was there before, as Xen's script does.  Method: a bridge of
    9000, made by ip(8); the interface's MTU, and that nothing of the bridge is changed by us."""
    net.ip("host", "link", "add", "mine", "type", "bridge")
    net.ip("host", "link", "set", "mine", "mtu", 9000, "up")
    server = net.up(net.config("a", "bridge=mine"), bridge="")
    assert net.link("host", "vif1.0")["mtu"] == 9000
    assert net.link("host", "vif1.0")["master"] == "mine"
    node = server.mnt / "xenstore/local/domain/1/device/vif/0/mtu"
    assert net.host.read(node) == "9000"
    assert net.link("a", "xn0")["mtu"] == 9000
    server.stop()
    assert net.left() == ["mine"] and net.link("host", "mine")["mtu"] == 9000


@pytest.fixture
def routed(net: Net) -> Served:
    """Guest `a` behind the host, which routes to a place `far` over a link of 1280 bytes."""
    net.space("far")
    net.ip("host", "link", "add", "way", "mtu", 1280, "type", "veth", "peer", "name", "back", "netns", net.namespace("far"))
    net.ip("far", "link", "set", "back", "mtu", 1280)
    for place, name, last in (("host", "way", 1), ("far", "back", 2)):
        net.ip(place, "address", "add", f"10.89.0.{last}/24", "dev", name)
        net.ip(place, "address", "add", f"fd89::{last}/64", "dev", name, "nodad")
        net.ip(place, "link", "set", name, "up")
    net.sysctl("host", "net.ipv4.ip_forward", 1)
    net.sysctl("host", "net.ipv6.conf.all.forwarding", 1)
    server = net.guests("a")
    for place, gateway4, gateway6 in (("a", HOST4, HOST6), ("far", "10.89.0.1", "fd89::1")):
        net.ip(place, "route", "add", "default", "via", gateway4)
        net.ip(place, "-6", "route", "add", "default", "via", gateway6)
    return server


@pytest.mark.parametrize(("far", "near", "room"), [("10.89.0.2", address4("a"), 28), ("fd89::2", address6("a"), 48)])
def test_path_mtu(net, routed, far, near, room):
    """Goal: a router's word on a smaller MTU reaches the guest, and TCP with its large segments gets through all the same.
    Method: ping -M do beyond a link of 1280 bytes says so, and just fits then; 16 MiB each way through it."""
    net.transfer("a", "far", far, 16 * MIB)
    net.transfer("far", "a", near, 16 * MIB)
    net.ip("a", "route", "flush", "cache")
    net.ip("a", "-6", "route", "flush", "cache")
    done = net.run("a", "ping", "-n", "-c", 2, "-i", 0.1, "-W", 0.3, "-M", "do", "-s", 1400, far)
    assert done.returncode != 0 and "mtu=1280" in done.stdout.replace(" ", ""), done.stdout
    net.ping("a", far, "-M", "do", "-s", 1280 - room)
    net.check_sums("a", "host", "far")
    net.ip("host", "link", "delete", "way")
    net.stop(routed)


def test_broadcast(net):
    """Goal: a broadcast reaches the host and each other guest, and not its sender.
    Method: ping -b is answered by three; UDP to 255.255.255.255 and to the subnet's address is heard by all."""
    server = net.guests("abc")
    for place in ("host", "a", "b", "c"):
        net.sysctl(place, "net.ipv4.icmp_echo_ignore_broadcasts", 0)
    done = net.run("a", "ping", "-n", "-b", "-c", 2, "-i", 0.3, "-W", 3, "10.88.0.255")
    for place, address in (("host", HOST4), ("b", address4("b")), ("c", address4("c"))):
        assert f"from {address}:" in done.stdout, (place, done.stdout)
    for address in ("255.255.255.255", "10.88.0.255"):
        ears = [net.hear(place, "any", "0.0.0.0", 30001, 20) for place in ("host", "b", "c")]
        net.python("a", SAY, address, 30001, 20, "xn0")
        for ear in ears:
            assert json.loads(net.host.finish(ear).stdout) == [f"number {i}" for i in range(20)]
    net.stop(server)


@pytest.mark.parametrize(("kind", "group"), [("group4", "239.1.2.3"), ("group6", "ff12::88")])
def test_multicast(net, kind, group):
    """Goal: who joined a group hears what is sent to it, in the guest and on the host, from either.
    Method: UDP to a group of IPv4 and one of IPv6."""
    server = net.guests("abc")
    inside = {"host": "xenbr0", "a": "xn0", "b": "xn0", "c": "xn0"}
    for sender, listeners in (("a", ("host", "b", "c")), ("host", ("a", "b"))):
        ears = [net.hear(place, kind, group, 30002, 20, inside[place]) for place in listeners]
        net.python(sender, SAY, group, 30002, 20, inside[sender])
        for ear in ears:
            assert json.loads(net.host.finish(ear).stdout) == [f"number {i}" for i in range(20)]
    net.stop(server)


def test_all_nodes(net):
    """Goal: all neighbours answer at their link-local addresses.  Method: ping ff02::1 on the guest's interface."""
    server = net.guests("ab")
    net.wait_ipv6("host", "a", "b")
    done = net.run("a", "ping", "-n", "-c", 2, "-i", 0.3, "-W", 3, "-I", "xn0", "ff02::1")
    answers = {line.split()[3].partition("%")[0] for line in done.stdout.splitlines() if " bytes from " in line}
    for place, name in (("b", "xn0"), ("host", "xenbr0")):
        rows = json.loads(net.ip(place, "-j", "-6", "address", "show", name, "scope", "link"))
        (local,) = [info["local"] for row in rows if row for info in row["addr_info"] if "local" in info]
        assert local in answers, (place, done.stdout)
    net.stop(server)


def test_beside_the_host(net):
    """Goal: netns = "host" puts the guest's interface beside the bridge, named after its domain, for the user to do with
    as he likes: it works wherever he moves it.  Method: ip(8) looks at it, moves it to a namespace, gives it an address."""
    server = net.up(net.config("a", more='netns = "host"'), net.config("b"))
    row = net.link("host", "xn1.0")
    assert (row["operstate"], row["mtu"]) == ("UP", 1500) and "master" not in row
    assert f"{address4('a')}/24" in net.ip("host", "address", "show", "xn1.0")
    assert server.lines[0].split(": ")[0] == f"{net.names['a']} xn1.0" and "namespace" not in server.lines[0]
    assert net.namespace("a") not in net.left(), "it needs no namespace of its own"
    net.space("elsewhere")
    net.ip("host", "link", "set", "xn1.0", "netns", net.namespace("elsewhere"))
    net.ip("elsewhere", "address", "add", "10.88.0.77/24", "dev", "xn1.0")
    net.ip("elsewhere", "link", "set", "xn1.0", "up")
    for to in (HOST4, address4("b")):
        net.ping("elsewhere", to)
    net.transfer("elsewhere", "b", address4("b"), 4 * MIB)
    net.stop(server)
    assert net.spaces["elsewhere"].names() == {"lo"}
