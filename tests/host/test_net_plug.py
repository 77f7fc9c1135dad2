"""Goal: vifs of a running guest come, go and lose their interfaces as the toolstack, the guest and others on the host wish,
each as it was asked for, and nothing happens to the vifs beside them.
Method: tests/host/hotplug.py; ip(8) looks, and deletes interfaces of a real server under its feet; TCP flows meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.net import (
    GIB,
    HOST4,
    HOST6,
    MIB,
    Flow,
    Net,
    Plugged,
    address4,
    address6,
    read_line,
    wait_flowing,
    wait_until,
)
from tests.host.served import Host, Served
from tests.host.test_flush import switches

pytestmark = pytest.mark.host

TICKS_S = os.sysconf("SC_CLK_TCK")


@pytest.fixture
def net(host: Host) -> Iterator[Net]:
    with Net(host) as made:
        yield made


def addresses(net: Net, place: str, name: str) -> set[str]:
    return {word for line in net.ip(place, "-o", "-4", "address", "show", name).splitlines() for word in line.split()[3:4]}


def lanes(net: Net, place: str, name: str) -> int:
    data = net.link(place, name)["linkinfo"]["info_data"]
    return int(data["numqueues"]) if data["multi_queue"] else 1


# ---- attach and detach ----


def test_what_was_asked_for(net):
    """Goal: a vif that is plugged in later has the addresses and queues of its own specification: one that the guest's file
    does not know, and one that follows another under the same number.  Method: each attached; ip(8) in the guest."""
    host = Plugged(net, "a")
    assert host.ask("attach 1 bridge=xenbr0,ip=10.77.0.99/24,queues=4") == "done"
    assert (addresses(net, "a", "xn1"), host.ask("queues 1 1")) == ({"10.77.0.99/24"}, "4")
    assert lanes(net, "a", "xn1") == lanes(net, "host", "vif1.1") == 4
    assert (addresses(net, "a", "xn0"), host.ask("queues 1 0")) == ({f"{address4('a')}/24"}, "1")
    net.ip("host", "address", "add", "10.77.0.1/24", "dev", "xenbr0")
    net.ping("host", "10.77.0.99")

    for number, (queues, ip) in enumerate((("", "10.77.0.55/24"), (",queues=2", "10.77.0.56/24"), (",queues=3", ""))):
        assert host.ask("detach 1 0") == "done"
        assert host.ask(f"attach 1 devid=0{queues}{ip and ',ip=' + ip}") == "done"
        assert addresses(net, "a", "xn0") == {ip} - {""}, "not the old one's"
        assert host.ask("queues 1 0") == str(number + 1) and lanes(net, "a", "xn0") == number + 1
    net.ping("host", "10.77.0.99")
    host.end()


def test_detach_while_traffic_flows(net):
    """Goal: a vif that the toolstack takes away vanishes at both ends, whatever is in its rings, and others go on.
    Method: flows both ways through one guest's interface, detached; a flow of another guest ends well meanwhile."""
    host = Plugged(net, "a", "b")
    cut: list[Flow] = [net.flow("a", "host", HOST4, 100 * GIB), net.flow("host", "a", address4("a"), 100 * GIB)]
    other = net.flow("b", "host", HOST4, 256 * MIB)
    wait_flowing(net, "vif1.0")
    assert host.ask("detach 1 0") == "done"
    assert "xn0" not in net.ip("a", "link") and "vif1.0" not in net.spaces["host"].names()
    other.finish()
    for flow in cut:
        flow.stop()
    assert host.ask(f"attach 1 ip={address4('a')}/24 {address6('a')}/64") == "done"
    for to in (HOST4, HOST6):
        net.ping("a", to)
    net.transfer("a", "b", address4("b"), 16 * MIB)
    host.end()


def test_close_and_open_while_traffic_flows(net):
    """Goal: a guest that closes its device and opens it again keeps its interface, which has no carrier meanwhile, and
    its flows go on.  Method: twice under TCP in both directions."""
    host = Plugged(net, "a")
    flows = [net.flow("a", "host", HOST4, GIB), net.flow("host", "a", address4("a"), GIB)]
    for _ in range(2):
        wait_flowing(net, "vif1.0")
        assert host.ask("close 1 0") == "done"
        assert "NO-CARRIER" in net.link("a", "xn0")["flags"]
        assert all(flow.client.poll() is None for flow in flows), "they are still under way"
        assert host.ask("open 1 0") == "done"
    for flow in flows:
        flow.finish()
    host.end()


def test_many_times(net):
    """Goal: plugging in and out leaks nothing.  Method: 30 times with one to four queues; descriptors, backends and lanes
    are counted, and names in the namespaces."""
    host = Plugged(net, "a")
    host.ask("attach 1 ")
    host.ask("detach 1 1")
    before = host.ask("count")
    for number in range(30):
        assert host.ask(f"attach 1 queues={number % 4 + 1}") == "done"
        assert host.ask("detach 1 1") == "done"
    assert host.ask("count") == before
    assert set(net.spaces["host"].names()) == {"lo", "xenbr0", "vif1.0"}
    net.ping("a", HOST4)
    host.end()


# ---- interfaces that somebody else deletes ----


def busy(server: Served) -> tuple[float, int]:
    """Seconds of processor time so far, and switches of all its threads."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_S, sum(switches(server.process.pid).values())


def store(server: Served, net: Net, path: str) -> str:
    return net.host.read(server.mnt / "xenstore" / path)


def test_deleted(net):
    """Goal: who deletes our interface costs its vif, which the log says once with the device's name, inspect/vif and the
    store with the reason; the other vifs, of the same guest too, go on; no time is spent on what is gone; the end is clean.
    Method: the host's side of one under a flow, and a guest's of another, by ip(8)."""
    server = net.up(net.config("a", "", "ip=10.89.0.11/24"), net.config("b", "queues=2"), net.config("c"))
    flow = net.flow("a", "host", HOST4, 100 * GIB)
    net.ip("host", "link", "delete", "vif1.0")
    net.ip("b", "link", "delete", "xn0")
    back, front = "/local/domain/0/backend/vif/1/0", "/local/domain/2/device/vif/0"
    wait_until(lambda: server.stderr().count("\n") >= 2, "what it says of that")
    says = "xenfs.frames: ERROR: {}: its interface was deleted by somebody else; the device is closed"
    assert sorted(server.stderr().splitlines()) == sorted(says.format(node) for node in (back, front))

    wait_until(lambda: net.inspect(server, "a")["state"] == "Closed", "the frontend to close")
    wait_until(lambda: store(server, net, f"{back[1:]}/state") == "6", "the backend to close")
    assert net.inspect(server, "a")["link"] == "down"
    assert "interface vif1.0 was deleted" in store(server, net, "local/domain/0/error/backend/vif/1/0/error")
    seen = net.inspect(server, "b")
    assert (seen["state"], seen["broken"], seen["link"]) == ("Closed", "its interface was deleted", "down")
    assert "its interface was deleted" in store(server, net, "local/domain/2/error/device/vif/0/error")
    assert "NO-CARRIER" in net.link("a", "xn0")["flags"]

    for letter, name in (("a", "xn1"), ("c", "xn0")):
        assert net.inspect(server, letter, name)["broken"] == "no"
    net.transfer("c", "host", HOST4, 64 * MIB)
    net.ip("host", "address", "add", "10.89.0.1/24", "dev", "xenbr0")
    net.ping("host", "10.89.0.11")
    flow.stop()
    before = busy(server)
    time.sleep(1)
    spent, switched = (now - then for now, then in zip(busy(server), before, strict=True))
    assert spent < 0.2 and switched < 50, "a dead descriptor is always ready"
    said = server.stderr()
    server.process.terminate()
    assert (server.wait(), server.stderr(), net.left()) == (0, said, [])


@pytest.mark.parametrize(("place", "name"), [("host", "vif1.0"), ("a", "xn0")])
def test_plugged_in_again(net, place, name):
    """Goal: a vif whose interface was deleted can be taken away, and another in its place is as good as new.
    Method: ip(8) deletes either side; what the server says of it; detached and attached; nothing is left open."""
    host = Plugged(net, "a")
    before = host.ask("count")
    net.ip(place, "link", "delete", name)
    assert "deleted by somebody else" in read_line(host.process)
    assert host.ask("detach 1 0") == "done"
    assert host.ask(f"attach 1 devid=0,ip={address4('a')}/24") == "done"
    net.ping("a", HOST4)
    assert host.ask("count") == before
    host.end()
