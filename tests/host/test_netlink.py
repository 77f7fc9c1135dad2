"""Goal: bridges and addresses become what was asked for, what a killed run left behind is taken over, what is somebody
else's is never touched, and every failure names the interface and the namespace. (Namespaces: test_net_spaces.py.)
Method: real ones, in network namespaces of their own, looked at with ip(8). Nothing has a way to the machine's network."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

import pytest

from netdev import netlink
from netdev.netlink import Netlink, NetlinkError
from netdev.tap import OWN_NETNS, NamespaceError, inside
from tests.descriptors import open_files

pytestmark = pytest.mark.host

ENVIRON = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
PREFIX = f"xenfs-test-{os.getpid()}-"
EXPERIMENTAL = 0x88B5  # an ethertype for experiments: no other traffic has it
WAIT_S = 10.0


def run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60, env=ENVIRON).stdout


class Space:
    """A network namespace made by ip(8), so that ours are not tested with ours."""

    def __init__(self, name: str) -> None:
        self.name = PREFIX + name
        run("ip", "netns", "add", self.name)

    def __enter__(self) -> Space:
        return self

    def __exit__(self, *_: object) -> None:
        run("ip", "netns", "delete", self.name)

    def ip(self, *words: str) -> str:
        return run("ip", "-n", self.name, *words)

    def show(self, name: str) -> dict[str, Any]:
        (row,) = json.loads(self.ip("-j", "-d", "address", "show", name))
        return row

    def names(self) -> set[str]:
        return {row["ifname"] for row in json.loads(self.ip("-j", "link"))}

    def plain(self, name: str) -> None:
        self.ip("tuntap", "add", "dev", name, "mode", "tap")  # there until the namespace goes

    def quiet(self) -> None:
        """No IPv6 on interfaces to come, and so no chatter of it."""
        self.check("sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6")

    def check(self, *words: str) -> str:
        return run("ip", "netns", "exec", self.name, *words)

    def popen(self, program: str, *words: str) -> subprocess.Popen[bytes]:
        line = ["ip", "netns", "exec", self.name, sys.executable, "-c", program, *words]
        return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRON)

    def packets(self, name: str) -> socket.socket:
        with inside(self.name):
            wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # 0: hears nothing until it is bound
        wire.bind((name, EXPERIMENTAL))
        wire.settimeout(WAIT_S)
        return wire


def state() -> tuple[str, set[str], int]:
    """What no call may change: the thread's namespace, the open files, the threads."""
    return os.readlink(OWN_NETNS), open_files(), threading.active_count()


@pytest.fixture
def space() -> Iterator[Space]:
    with Space("links") as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = state()
    yield
    assert state() == before


@pytest.fixture
def name() -> Iterator[str]:
    """Of a namespace that the test makes."""
    yield PREFIX + "claim"
    netlink.remove_namespace(PREFIX + "claim")


@contextlib.contextmanager
def refused(*says: str) -> Iterator[None]:
    with pytest.raises(NetlinkError) as caught:
        yield
    assert [part for part in says if part not in str(caught.value)] == [], str(caught.value)


# ---- bridges ----


def test_bridge(space):
    """Goal: a new bridge forwards at once, is up, has its addresses and says whose it is.  Method: ip -d address."""
    host = Netlink(space.name)
    assert not host.is_bridge("xenbr0")
    assert host.add_bridge("xenbr0", ["10.9.0.1/24", "fd09::1/64"])
    row = space.show("xenbr0")
    data = row["linkinfo"]["info_data"]
    assert (row["linkinfo"]["info_kind"], data["stp_state"], data["forward_delay"]) == ("bridge", 0, 0)
    assert "UP" in row["flags"]
    assert f"made by xenfs, process {os.getpid()} " in row["ifalias"]
    assert {f"{info['local']}/{info['prefixlen']}" for info in row["addr_info"]} >= {"10.9.0.1/24", "fd09::1/64"}
    assert host.is_bridge("xenbr0") and not host.is_bridge("lo") and not host.is_bridge("none")
    host.release_bridge("xenbr0")
    host.release_bridge("xenbr0")
    assert space.names() == {"lo"}


MAKE = "from netdev.netlink import *\nNetlink().add_bridge('xenbr0', ['10.9.0.1/24'])\nprint(1, flush=True)\ninput()"


@pytest.mark.parametrize("reaped", [True, False])
def test_bridge_of_a_killed_run(space, reaped):
    """Goal: its maker alive, a bridge is refused; its maker killed, even if a zombie still, it is taken over as it is, and
    is ours from then on.  Method: a child that makes it; a port and another address, which must stay."""
    host = Netlink(space.name)
    with space.popen(MAKE) as child:
        try:
            assert child.stdout.readline() == b"1\n"
            with refused("'xenbr0'", space.name, f"an xenfs that is running, process {child.pid};"):
                host.add_bridge("xenbr0")
            space.plain("eth0")
            space.ip("link", "set", "eth0", "master", "xenbr0")
            space.ip("address", "add", "10.9.7.1/24", "dev", "xenbr0")
        finally:
            child.kill()
        if reaped:
            child.wait()
        else:
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not host.add_bridge("xenbr0", ["10.9.0.1/24", "10.9.8.1/24"])
    assert host.link("eth0").master == "xenbr0"
    has = {str(address) for address in host.addresses("xenbr0") if address.version == 4}
    assert has == {f"10.9.{net}.1/24" for net in (0, 7, 8)}
    with refused(f"an xenfs that is running, process {os.getpid()};"):
        host.add_bridge("xenbr0")


@pytest.mark.parametrize(
    ("kind", "alias", "says"),
    [
        ("bridge", "", "xenfs has not made it"),
        ("bridge", "made by xenfs, process 1 started 99 perhaps", "xenfs has not made it"),
        ("tun", "", "xenfs has not made it"),
        ("tun", f"made by xenfs, process {os.getpid()} started 1", "kind 'tun'"),
        ("bridge", f"made by xenfs, process {os.getpid()} started 1", None),  # the number was used again
        ("bridge", "made by xenfs, process 4194305 started 1", None),  # above any process number
    ],
)
def test_whose_bridge(space, kind, alias, says):
    """Goal: only what an xenfs made that is no more is taken.  Method: interfaces with such marks; no change if refused."""
    space.plain("xenbr0") if kind == "tun" else space.ip("link", "add", "xenbr0", "type", kind)
    if alias:
        space.ip("link", "set", "xenbr0", "alias", alias)
    before = space.show("xenbr0")
    if says is None:
        assert not Netlink(space.name).add_bridge("xenbr0")
        return
    with refused("cannot make bridge 'xenbr0'", space.name, says):
        Netlink(space.name).add_bridge("xenbr0", ["10.9.0.1/24"])
    assert space.show("xenbr0") == before


def test_half_a_bridge_is_removed(space):
    """Goal: a bridge that cannot get its address is not left behind.  Method: IPv6 is off; a text that is no address."""
    space.quiet()
    for address, says in (("fd09::1/64", "IPv6 is disabled"), ("10.9.0.1", "no address with prefix"), ("x/24", "'x/24' is")):
        with refused("make bridge 'xenbr0'", space.name, says):
            Netlink(space.name).add_bridge("xenbr0", ["10.9.0.1/24", address])
        assert space.names() == {"lo"}


# ---- links ----


def test_set_link(space):
    """Goal: each thing alone and all at once, and nothing else changes.  Method: link() and ip(8) after each step."""
    host = Netlink(space.name)
    space.plain("eth0")
    for bridge in ("xenbr0", "xenbr1"):
        host.add_bridge(bridge)
    old = host.link("eth0")
    now = {"up": old.up, "mtu": old.mtu, "mac": old.mac, "master": old.master, "kind": "tun"}
    assert (now["up"], now["mtu"], now["master"], len(old.mac)) == (False, 1500, "", 6)
    all_of_it = {"up": True, "mtu": 1400, "mac": bytes.fromhex("020000000002"), "bridge": "xenbr1"}
    for change in (
        {}, {"up": True}, {"mtu": 9000}, {"mac": bytes.fromhex("020000000001")}, {"bridge": "xenbr0"}, {"bridge": "xenbr0"},
        {"bridge": ""}, {"bridge": ""}, {"up": False}, all_of_it, {"up": True, "bridge": ""},
    ):  # fmt: skip
        host.set_link("eth0", **change)
        now |= {"master" if what == "bridge" else what: value for what, value in change.items()}
        link, row = host.link("eth0"), space.show("eth0")
        assert {what: getattr(link, what) for what in now} == now
        seen = ("UP" in row["flags"], row["mtu"], row["address"], row.get("master", ""))
        assert seen == (now["up"], now["mtu"], now["mac"].hex(":"), now["master"])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda host: host.set_link("none", up=True), "there is no interface 'none'"),
        (lambda host: host.link(""), "there is no interface ''"),
        (lambda host: host.addresses("none"), "there is no interface 'none'"),
        (lambda host: host.add_address("none", "10.9.0.1/24"), "there is no interface 'none'"),
        (lambda host: host.add_address("lo", "10.9.0.1"), "'10.9.0.1' is no address with prefix, such as"),
        (lambda host: host.add_address("lo", "10.9.0.1/33"), "'10.9.0.1/33' is no address"),
        (lambda host: host.set_link("lo", bridge="none"), "there is no bridge 'none'; `ip link add none type bridge`"),
        (lambda host: host.set_link("lo", bridge="lo"), "'lo' is no bridge, but a plain interface"),
        (lambda host: host.set_link("eth0", bridge="eth1"), "'eth1' is no bridge, but tun"),
        (lambda host: host.set_link("eth0", mtu=-1), "mtu less than device minimum"),
        (lambda host: host.set_link("eth0", mac=b"\1" * 6), "set interface 'eth0'"),
        (lambda host: host.set_link("eth0", mac=b"\2" * 5), "MAC address '02:02:02:02:02' has not 6 bytes"),
        (lambda host: host.add_bridge("a/b"), "make bridge 'a/b'"),
        (lambda host: host.add_bridge("x" * 16), "at most 15 bytes, this one has 16"),
        (lambda host: host.release_bridge("lo"), "remove bridge 'lo'"),
    ],
)
def test_what_cannot_be(space, call, says):
    """Goal: a sentence with the interface and the namespace, and no change.  Method: one impossible call each."""
    for name in ("eth0", "eth1"):
        space.plain(name)
    before = space.ip("-j", "-d", "address")
    with refused("cannot ", space.name, says):
        call(Netlink(space.name))
    assert space.ip("-j", "-d", "address") == before


def test_addresses(space):
    """Goal: addresses can be used at once and may be given twice.  Method: a child binds to each right after."""
    host = Netlink(space.name)
    host.add_bridge("xenbr0")
    for address, family in (("10.9.0.1/24", 2), ("fd09::1/64", 10)):
        host.add_address("xenbr0", address)
        host.add_address("xenbr0", address)
        space.check(sys.executable, "-c", f"import socket; socket.socket({family}).bind(('{address.split('/')[0]}', 9))")
    assert [str(found) for found in host.addresses("xenbr0") if not found.is_link_local] == ["10.9.0.1/24", "fd09::1/64"]
    assert ip_interface("127.0.0.1/8") not in host.addresses("lo")


def test_threads(space):
    """Goal: one Netlink serves threads that come and go, see nothing_left.  Method: 8 at once make and remove bridges."""
    host = Netlink(space.name)

    def work(number: int) -> None:
        for _ in range(3):
            host.add_bridge(f"xenbr{number}", [f"10.9.{number}.1/24"])
            assert host.is_bridge(f"xenbr{number}")
            host.release_bridge(f"xenbr{number}")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [None] * 8
    assert space.names() == {"lo"}


# ---- what is missing, and the way back ----


FAIL = "import sys\nfrom netdev.netlink import *\ntry:\n    {}\nexcept NetlinkError as error:\n    print(error)\n"


@pytest.mark.parametrize(
    ("lacks", "call", "says"),
    [
        ("sys_admin", "create_namespace(sys.argv[1])", "Operation not permitted; be root"),
        ("sys_admin", "Netlink(sys.argv[2])", "cannot enter network namespace"),
        ("net_admin", "Netlink().set_link('lo', up=True)", "set interface 'lo': Operation not permitted; be root"),
    ],
)
def test_without_the_right_to(space, name, lacks, call, says):
    """Goal: a missing capability is named, and nothing half made remains.  Method: children without it."""
    said = space.check("setpriv", f"--bounding-set=-{lacks}", sys.executable, "-c", FAIL.format(call), name, space.name)
    assert says in said
    assert name not in netlink.namespaces()
    assert space.names() == {"lo"}


def test_inside_comes_back(space):
    """Goal: the thread is in the namespace in the block, and back after it, also after a failure.  Method: /proc."""
    home = os.readlink(OWN_NETNS)
    with inside(None):
        assert os.readlink(OWN_NETNS) == home
    with pytest.raises(ZeroDivisionError), inside(space.name):
        assert os.readlink(OWN_NETNS) != home
        raise ZeroDivisionError
    assert os.readlink(OWN_NETNS) == home
    with pytest.raises(NamespaceError, match="no network namespace"), inside(PREFIX + "none"):
        raise AssertionError("not reached")
