"""Goal: what leaves our interfaces for a wire is as it should be on one: checksums finished and right, no frame too large,
tags in place, nothing sent twice.
Method: a veth whose kernel side may leave nothing undone stands for the wire; tcpdump captures there, tshark judges."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.net import HOST4, MIB, Net, address4, address6, wait_until
from tests.host.served import Host, Served

pytestmark = pytest.mark.host

WIRE4, WIRE6 = "10.88.0.50", "fd88::50"
# One sum in 65,536 comes to 0, which Linux also writes as 0xffff, its equal; tshark takes that for bad anywhere but in UDP.
EITHER_ZERO = "tcp.checksum == 0xffff || icmp.checksum == 0xffff || icmpv6.checksum == 0xffff"
WRONG = " || ".join(f'{protocol}.checksum.status == "Bad"' for protocol in ("ip", "tcp", "udp", "icmp", "icmpv6"))
BAD = f"({WRONG}) && !({EITHER_ZERO})"
CHECKED = [word for name in ("ip", "tcp", "udp") for word in ("-o", f"{name}.check_checksum:TRUE")]
FEW = 20  # a busy machine answers late sometimes, and TCP probes; a segment that is never right would come again and again
WIRE_BYTES, LARGE_BYTES = 2000, 70000  # of a captured frame: whole ones, but no more, for the kernel reserves that for each
SIZES = (1, 2, 3, 17, 100, 101, 1000, 1451, 1452)
DATAGRAMS = """
import socket, sys
kind = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
wire = socket.socket(kind, socket.SOCK_DGRAM)
for size in map(int, sys.argv[3:]):
    wire.sendto(b"x" * size, (sys.argv[1], int(sys.argv[2])))
"""


@pytest.fixture
def net(host: Host) -> Iterator[Net]:
    with Net(host) as made:
        yield made


@pytest.fixture
def wired(net: Net) -> Served:
    """Guest `a`, and the place `far` at the other end of a wire from the bridge; both ends' kernels finish everything."""
    net.space("far")
    server = net.guests("a")
    net.ip("host", "link", "add", "wire", "type", "veth", "peer", "name", "eth0", "netns", net.namespace("far"))
    net.ip("host", "link", "set", "wire", "master", "xenbr0", "up")
    for place, name in (("host", "wire"), ("far", "eth0")):
        net.check(place, "ethtool", "-K", name, "tx", "off", "sg", "off", "tso", "off", "gso", "off", "gro", "off")
    net.ip("far", "address", "add", f"{WIRE4}/24", "dev", "eth0")
    net.ip("far", "address", "add", f"{WIRE6}/64", "dev", "eth0", "nodad")
    net.ip("far", "link", "set", "eth0", "up")
    net.ping("a", WIRE4)
    return server


def seen(net: Net, path: Path, wanted: str) -> list[str]:
    """The packets of a capture that tshark finds to be so."""
    words = ["tshark", "-n", "-r", path, *CHECKED, "-Y", wanted]
    output = net.host.check(*words)
    return [line for line in output.splitlines() if line[:8].strip().partition(" ")[0].isdigit()]


def test_checksums_on_a_wire(net, wired):
    """Goal: sums that were left to us are right on the wire, and segments fit it; so nothing has to be sent twice.
    Method: TCP both ways and UDP of odd and even sizes, both IP versions, ping; tshark checks each checksum."""
    with net.capture("far", "eth0", WIRE_BYTES) as path:
        for sender, receiver, to in (
            ("a", "far", WIRE4), ("far", "a", address4("a")), ("a", "far", WIRE6), ("far", "a", address6("a")),
        ):  # fmt: skip
            net.transfer(sender, receiver, to, 4 * MIB)
        for to in (WIRE4, WIRE6):
            ear = net.hear("far", "plain", to, 30003, len(SIZES))
            net.python("a", DATAGRAMS, to, 30003, *SIZES)
            heard = json.loads(net.host.finish(ear).stdout)
            assert sorted(map(len, heard)) == sorted(SIZES)
            net.ping("a", to, "-s", 3000)
    assert len(seen(net, path, "tcp.len > 0")) > 4 * 4 * MIB / 1460, "the transfers were captured"
    assert len(seen(net, path, "udp.port == 30003")) >= 2 * len(SIZES)
    assert seen(net, path, f"{BAD} && tcp") == [] and seen(net, path, BAD) == []
    assert seen(net, path, "frame.len > 1514") == []
    again = seen(net, path, "tcp.analysis.retransmission && tcp.len > 0")
    assert len(again) < FEW and net.nstat("a")["TcpRetransSegs"] < FEW, again
    net.check_sums("far", "host", "a")
    net.ip("host", "link", "delete", "wire")
    net.stop(wired)


def test_a_bad_checksum_is_seen(net, wired):
    """Goal: the test above can fail.  Method: a capture inside the guest, where sums are yet to be finished, is bad."""
    with net.capture("a", "xn0", LARGE_BYTES, "tcp") as path:
        net.transfer("a", "far", WIRE4, MIB)
    assert seen(net, path, BAD) != [] and seen(net, path, "frame.len > 1514") != []
    net.ip("host", "link", "delete", "wire")
    net.stop(wired)


# One frame of TCP with a tag or two before IP, to be segmented and summed by whoever comes, as a kernel with VLANs sends it.
TAGGED = """
import socket, struct, sys
interface, target, tags, version, size = sys.argv[1], bytes.fromhex(sys.argv[2]), *map(int, sys.argv[3:])
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
wire.setsockopt(263, 15, 1)  # SOL_PACKET, PACKET_VNET_HDR
wire.bind((interface, 0))
source = bytes.fromhex("020000000077")
if version == 4:
    addresses = bytes([10, 97, 0, 1, 10, 97, 0, 3])
    network = struct.pack(">BBHHHBBH", 0x45, 0, 40 + size, 1, 0x4000, 64, 6, 0)
    words = struct.unpack(">10H", network + addresses)
    total = sum(words) % 0xffff
    network = network[:10] + struct.pack(">H", 0xffff - total) + addresses
else:
    addresses = b"\\xfd" + bytes(14) + b"\\1\\xfd" + bytes(14) + b"\\3"
    network = struct.pack(">IHBB", 6 << 28, 20 + size, 6, 64) + addresses
total = sum(struct.unpack(f">{len(addresses) // 2}H", addresses)) + 6 + 20 + size
total = (total & 0xffff) + (total >> 16)
total = (total & 0xffff) + (total >> 16)
tcp = struct.pack(">HHIIBBHHH", 30004, 30005, 1, 1, 0x50, 0x18, 1000, total, 0)
link = target + source + {1: b"\\x81\\0\\0\\7", 2: b"\\x88\\xa8\\0\\x09\\x81\\0\\0\\7"}[tags]
head = link + (b"\\x08\\0" if version == 4 else b"\\x86\\xdd") + network
vnet = struct.pack("<BBHHHH", 1, {4: 1, 6: 4}[version], len(head) + 20, 1380, len(head), 16)
wire.send(vnet + head + tcp + (bytes(range(251)) * 300)[:size])
"""


@pytest.mark.parametrize(("depth", "version"), [(1, 4), (1, 6), (2, 4), (2, 6)])
def test_tagged_frames(net, wired, depth, version):
    """Goal: one large frame with VLAN tags gets through whole, and is segmented and summed behind its tags.
    Method: packet sockets send it from the guest, to the wire, and from the host's side to the guest; captures there."""
    tags = "vlan.id == 7" + (" && ieee8021ad.id == 9" if depth == 2 else "")
    wanted = f"tcp.srcport == 30004 && {tags}"
    target = {place: net.link(place, name)["address"].replace(":", "") for place, name in (("far", "eth0"), ("a", "xn0"))}
    with net.capture("far", "eth0", WIRE_BYTES) as path:
        net.python("a", TAGGED, "xn0", target["far"], depth, version, 40000)
        wait_until(lambda: path.stat().st_size > 40000, "the frame, in the far capture")
    rows = seen(net, path, wanted)
    assert len(rows) == -(-40000 // 1380) and sum(int(row.partition("Len=")[2].split()[0]) for row in rows) == 40000
    assert seen(net, path, BAD) == [] and seen(net, path, f"tcp && !({tags})") == []
    with net.capture("a", "xn0", LARGE_BYTES) as path:
        net.python("host", TAGGED, "xenbr0", target["a"], depth, version, 40000)
        wait_until(lambda: path.stat().st_size > 40000, "the frame, in the guest's capture")
    rows = seen(net, path, wanted)
    assert sum(int(row.partition("Len=")[2].split()[0]) for row in rows) == 40000
    net.ip("host", "link", "delete", "wire")
    net.stop(wired)


def test_announcement(net):
    """Goal: when a vif connects, its neighbours learn where its addresses are.  Method: the guest's first frames, captured
    on a bridge that was there before: a gratuitous ARP and an unsolicited neighbour advertisement."""
    net.ip("host", "link", "add", "xenbr0", "type", "bridge", "forward_delay", 0)
    net.ip("host", "link", "set", "xenbr0", "up")
    with net.capture("host", "xenbr0", WIRE_BYTES) as path:
        server = net.guests("a", bridge="")
        wait_until(lambda: b"\x08\x06" in path.read_bytes(), "ARP")
    (arp,) = seen(net, path, f"arp.isgratuitous == 1 && arp.src.proto_ipv4 == {address4('a')}")
    assert address4("a") in arp
    advertisement = f"icmpv6.type == 136 && icmpv6.nd.na.target_address == {address6('a')} && icmpv6.nd.na.flag.o == 1"
    assert len(seen(net, path, advertisement)) == 1
    server.stop()
    assert net.left() == ["xenbr0"]


def test_same_mac(net):
    """Goal: two interfaces with one MAC on one bridge are the user's choice, but he is told.  Method: the warning, and the
    guests work as well as they can: alone.  On different bridges there is nothing to warn of."""
    mac = "mac=00:16:3e:00:00:55"
    server = net.guests("ab", mac)
    warning = server.stderr()
    assert warning.count("\n") == 1 and "00:16:3e:00:00:55" in warning
    assert f"vif 0 of {net.names['a']}" in warning and f"vif 0 of {net.names['b']}" in warning
    net.ip("b", "link", "set", "xn0", "down")
    net.ping("a", HOST4)
    server.process.terminate()
    assert (server.wait(), server.stderr(), net.left()) == (0, warning, [])
    net.ip("host", "link", "add", "other", "type", "bridge")
    quiet = net.up(net.config("a", mac), net.config("b", f"{mac},bridge=other"))
    quiet.stop()
