"""Goal: streams through a guest's interface arrive whole: no byte lost, changed or moved, in either direction, between any
two parties, however many at once, with no checksum wrong at any kernel; and `rate` and `queues` do what they say.
Method: TCP between processes in namespaces, each byte compared with the pattern it was taken from; the kernels' counters."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.host.net import GIB, HOST4, HOST6, MIB, Net, address4, address6, packets
from tests.host.served import Host

pytestmark = pytest.mark.host


@pytest.fixture
def net(host: Host) -> Iterator[Net]:
    with Net(host) as made:
        yield made


def mean_bytes(counts: str) -> float:
    words = dict(word.split("=") for word in counts.split() if "=" in word)
    return int(words["bytes"]) / int(words["packets"])


def test_a_gigabyte_each_way(net):
    """Goal: a long transfer in each direction; the ring indices wrap often; segmentation is left to whoever does it best,
    so that frames through the ring are large.  Method: 1 GiB each way; the mean size of frames that the driver counted."""
    server = net.guests("a")
    net.transfer("a", "host", HOST4, GIB)
    assert mean_bytes(net.inspect(server, "a")["tx-0"]) > 10_000
    net.transfer("host", "a", address4("a"), GIB)
    assert packets(net.inspect(server, "a")["rx-0"]) < GIB / 5_000, "frames to the guest are large, too"
    net.check_sums("host", "a")
    net.stop(server)


def test_ipv6(net):
    """Goal: the same over IPv6, whose segmentation and checksums are negotiated apart.  Method: 64 MiB each way."""
    server = net.guests("a")
    net.transfer("a", "host", HOST6, 64 * MIB)
    assert mean_bytes(net.inspect(server, "a")["tx-0"]) > 10_000
    net.transfer("host", "a", address6("a"), 64 * MIB)
    net.check_sums("host", "a")
    net.stop(server)


def test_guest_to_guest(net):
    """Goal: unfinished frames of one guest get to another, through two backends and a bridge.
    Method: 256 MiB over IPv4, 64 MiB over IPv6 the other way."""
    server = net.guests("ab")
    net.transfer("a", "b", address4("b"), 256 * MIB)
    net.transfer("b", "a", address6("a"), 64 * MIB)
    net.check_sums("host", "a", "b")
    net.stop(server)


def test_all_at_once(net):
    """Goal: nobody starves: each of many flows ends.  Method: nine flows between three parties, both IP versions."""
    server = net.guests("abc")
    ways = (
        ("a", "host", HOST4), ("host", "a", address4("a")), ("b", "host", HOST6), ("host", "b", address6("b")),
        ("a", "b", address4("b")), ("b", "a", address6("a")), ("c", "a", address4("a")), ("c", "b", address6("b")),
        ("a", "c", address4("c")),
    )  # fmt: skip
    flows = [net.flow(sender, receiver, to, 16 * MIB) for sender, receiver, to in ways]
    for flow in flows:
        flow.finish()
    net.check_sums("host", "a", "b", "c")
    net.stop(server)


def test_without_offloads(net):
    """Goal: a kernel that leaves nothing undone, and wants nothing undone, is served as well; also one that changes its
    mind.  Method: ethtool -K in the guest, on the host's side, on both; 16 MiB each way each time."""
    server = net.guests("a")
    steps = (("a", "xn0", "off"), ("host", "vif1.0", "off"), ("a", "xn0", "on"), ("host", "vif1.0", "on"))
    for place, name, switch in steps:
        net.check(place, "ethtool", "-K", name, "tx", switch, "sg", switch, "tso", switch, "gso", switch, "gro", switch)
        for sender, receiver, to in (("a", "host", HOST4), ("host", "a", address4("a")), ("a", "host", HOST6)):
            net.transfer(sender, receiver, to, 16 * MIB)
    net.check_sums("host", "a")
    net.stop(server)


def test_queues(net):
    """Goal: queues=4 makes four pairs of rings, and flows spread over them.  Method: eight flows each way at once; more
    than one queue has carried packets, in each direction, and none of the flows is hurt by the others."""
    server = net.guests("a", "queues=4")
    before = net.inspect(server, "a")
    assert before["queues"] == "4"
    flows = [net.flow("a", "host", HOST4, 8 * MIB) for _ in range(8)]
    flows += [net.flow("host", "a", address4("a"), 8 * MIB) for _ in range(8)]
    for flow in flows:
        flow.finish()
    after = net.inspect(server, "a")
    for half in ("tx", "rx"):
        used = [packets(after[f"{half}-{i}"]) - packets(before[f"{half}-{i}"]) > 100 for i in range(4)]
        assert sum(used) > 1, after
    net.check_sums("host", "a")
    net.stop(server)


def test_rate(net):
    """Goal: rate= limits what the guest sends, and nothing else: not what it receives, not another guest, and not though
    that one keeps the loop busy.  Method: 4 MB at 2 MB/s, beside a flow of another guest that takes all there is."""
    server = net.up(net.config("a", "rate=2MB/s"), net.config("b"))
    seconds = net.transfer("a", "host", HOST4, 4_000_000)
    assert 4e6 / 2.5e6 < seconds < 4e6 / 1.5e6
    busy = net.flow("b", "host", HOST4, 100 * GIB)
    seconds = net.transfer("a", "host", HOST4, 4_000_000)
    busy.stop()
    assert 4e6 / 2.5e6 < seconds < 4e6 / 1.5e6, "in spite of another's traffic"
    assert net.transfer("host", "a", address4("a"), 8 * MIB) < 2, "only what it sends is limited"
    net.stop(server)
