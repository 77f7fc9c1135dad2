"""Goal: a host's vifs get their interfaces, are served and plugged in as long as they are there and no longer, and what the
network will not do costs the one vif that needs it, with the reason where a user looks.
Method: a World in a network namespace of its own, whose worker the test can hold up; ip(8) does what users do."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

import pytest

from netdev.netlink import remove_namespace
from netdev.tap import inside
from tests.descriptors import open_files
from tests.host.test_netlink import Space
from xenfs.config import GuestConfig, parse_config
from xenfs.host import HostError, World
from xenfs.network import Bridge
from xenfs.vifspec import parse_vif
from xenmodel.public.io.xenbus import XenbusState

pytestmark = pytest.mark.host

NAME = f"vifs{os.getpid()}"
GUEST = f"xenfs-{NAME}"
WAIT_S = 10.0


class Site:
    """`world` in the namespace `host`; guests are called NAME."""

    def __init__(self, host: Space) -> None:
        self.host = host
        self.world = World()
        self.said: list[str] = []
        self.world.announce = self.said.append
        self.world.vifs.network.make_bridges([Bridge("xenbr0", ("10.88.0.1/24",))])

    def create(self, *vifs: str, more: str = "") -> None:
        self.world.create(config(*vifs, more=more))

    def settle(self) -> None:
        self.world.settle()

    def read(self, path: str) -> str | None:
        return self.world.toolstack.client.read(path)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The worker does nothing until the end of the block."""
        go = threading.Event()
        self.world.vifs.network.submit(lambda: go.wait(WAIT_S), lambda _result: None)
        try:
            yield
        finally:
            go.set()

    def turn(self) -> None:
        """As the loop would, for what needs no worker."""
        while self.world.hypervisor.deliver():
            pass


def config(*vifs: str, more: str = "") -> GuestConfig:
    listed = ", ".join(f"'{vif}'" for vif in vifs)
    return parse_config(f"name = '{NAME}'\nmemory = 16\nvif = [ {listed} ]\n{more}\n", "g.cfg")


@pytest.fixture
def site() -> Iterator[Site]:
    files = files_of_vifs()
    with Space("vifs") as host, inside(host.name):
        made = Site(host)
        try:
            yield made
        finally:
            made.world.close()
            remove_namespace(GUEST)
        assert host.names() == {"lo"}
    assert files_of_vifs() == files


def files_of_vifs() -> set[str]:
    """But for the memory of domains, which is there as long as somebody refers to them."""
    return {each for each in open_files() if " /memfd:" not in each}


def inside_guest(*words: str) -> str:
    space = Space.__new__(Space)
    space.name = GUEST
    return space.ip(*words)


def test_connected(site):
    """Goal: after settling a vif is connected, served on each lane, and announced in one line.  Method: two vifs."""
    site.create("mac=00:16:3e:00:00:01", "queues=3,mtu=1400")
    site.settle()
    site.world.check_connected()
    vifs = site.world.vifs
    assert len(vifs.backs) == 2 and len(vifs.frames.lanes) == 2 * (1 + 3)
    assert site.said[0] == f"{NAME} xn0: 00:16:3e:00:00:01 in network namespace {GUEST}, bridge xenbr0, connected"
    assert len(site.said) == 2 and site.said[1].startswith(f"{NAME} xn1: ")
    assert "mtu 1400" in inside_guest("link", "show", "xn1") and "mtu 1500" in inside_guest("link", "show", "xn0")
    assert site.host.names() == {"lo", "xenbr0", "vif1.0", "vif1.1"}


def test_gone(site):
    """Goal: a vif that is detached is not served, and its interfaces are gone; the other's are there.  Method: two."""
    site.create("", "queues=2")
    site.settle()
    gone = []
    site.world.toolstack.detach_vif(1, 1, lambda: gone.append(True))
    site.settle()
    vifs = site.world.vifs
    assert gone == [True] and len(vifs.backs) == 1 and len(vifs.frames.lanes) == 2
    assert site.host.names() == {"lo", "xenbr0", "vif1.0"}
    assert "xn1" not in inside_guest("link") and "xn0" in inside_guest("link")


def test_attached_later(site):
    """Goal: a vif that the configuration does not know has the addresses and queues of its own specification; so has one
    that comes after another under the same number.  Method: attach_vif(); detached, and attached anew."""
    site.create("ip=10.88.0.11/24")
    site.settle()
    toolstack, devices = site.world.toolstack, site.world.guests[1].probe.devices
    toolstack.attach_vif(1, None, parse_vif("queues=2,ip=10.88.0.99/24"))
    site.settle()
    later = devices["/local/domain/1/device/vif/1"]
    assert len(site.said) == 2 and later.link_up and len(later.queues) == 2
    assert "10.88.0.99/24" in inside_guest("address", "show", "xn1")
    for spec, queues in (("queues=3,ip=10.88.0.55/24", 3), ("", 1)):
        toolstack.detach_vif(1, 0)
        site.settle()
        toolstack.attach_vif(1, 0, parse_vif(spec))
        site.settle()
        assert len(devices["/local/domain/1/device/vif/0"].queues) == queues
        shown = inside_guest("address", "show", "xn0")
        assert "10.88.0.11/" not in shown and ("10.88.0.55/24" in shown) == bool(spec)


def test_no_bridge(site):
    """Goal: a script that fails leaves hotplug-status and hotplug-error as Xen's do, and that is what the user is told; the
    vif beside it works.  Method: the bridge is missing."""
    site.create("", "bridge=nothere")
    site.settle()
    back = "/local/domain/0/backend/vif/1/1"
    assert site.read(f"{back}/hotplug-status") == "error"
    assert (site.read(f"{back}/hotplug-error") or "").startswith("there is no bridge nothere; `--bridge nothere` makes one")
    assert site.read(f"{back}/state") == str(int(XenbusState.InitWait))
    with pytest.raises(HostError, match=f"{NAME}: vif 1: there is no bridge nothere"):
        site.world.check_connected()
    assert len(site.said) == 1


def test_guests_interface_cannot_be_set_up(site):
    """Goal: if the guest's side will not take what it should have, that vif has failed with the kernel's reason.
    Method: its interface is deleted before the worker gets there."""
    with site.held():
        site.create("ip=10.88.0.11/24", "ip=10.88.0.12/24")
        site.turn()
        inside_guest("link", "delete", "xn0")
    site.settle()
    error = site.read("/local/domain/1/error/device/vif/0/error") or ""
    assert "xn0" in error and GUEST in error
    with pytest.raises(HostError, match=f"{NAME}: vif 0: .*xn0"):
        site.world.check_connected()
    devices = site.world.guests[1].probe.devices
    assert devices["/local/domain/1/device/vif/1"].link_up and not devices["/local/domain/1/device/vif/0"].link_up


def test_detached_before_it_was_set_up(site):
    """Goal: results that come when their vif is gone are forgotten: no error appears in the store, nothing is plugged.
    Method: attached and detached while the worker is held up, once; and then again under the same number."""
    site.create("")
    site.settle()
    with site.held():
        site.world.toolstack.attach_vif(1, 1, parse_vif("ip=10.88.0.99"))
        site.turn()
        site.world.toolstack.detach_vif(1, 1)
        site.turn()
        assert "/local/domain/1/device/vif/1" not in site.world.guests[1].probe.devices
        site.world.toolstack.attach_vif(1, 1, parse_vif("bridge=xenbr0"))
        site.turn()
    site.settle()
    assert site.world.guests[1].probe.devices["/local/domain/1/device/vif/1"].link_up
    assert site.read("/local/domain/1/error/device/vif/1/error") is None
    assert "10.88.0.99" not in inside_guest("address"), "that was the other's"
    with site.held():
        site.world.toolstack.detach_vif(1, 1)
        site.world.toolstack.attach_vif(1, 2, parse_vif(""))
        site.turn()
        site.world.toolstack.detach_vif(1, 2)
        site.turn()
    site.settle()
    for node in ("/local/domain/1/error", "/local/domain/0/error"):
        assert site.world.toolstack.client.directory(node) == [], node
    assert site.host.names() == {"lo", "xenbr0", "vif1.0"} and len(site.world.vifs.backs) == 1


def test_domain_destroyed_while_the_worker_is_busy(site):
    """Goal: as above, for a whole guest.  Method: destroy() while the worker is held up."""
    with site.held():
        site.create("ip=10.88.0.11/24", "queues=2")
        site.turn()
        site.world.destroy(1)
    site.settle()
    assert site.world.vifs.frames.lanes == {} and site.world.vifs.backs == {}
    assert site.host.names() == {"lo", "xenbr0"} and not os.path.exists(f"/run/netns/{GUEST}")


def test_name_taken(site):
    """Goal: the backend's interface cannot be made: the vif says so, and the other works.  Method: ip(8) was first."""
    site.host.plain("vif1.0")
    site.create("", "")
    site.settle()
    with pytest.raises(HostError, match=f"{NAME}: vif 0: cannot make TAP 'vif1.0': there is an interface of that name"):
        site.world.check_connected()
    assert len(site.world.vifs.backs) == 1
    site.host.ip("link", "delete", "vif1.0")


def test_beside_the_host(site):
    """Goal: netns = "host" makes no namespace.  Method: names."""
    site.create("ip=10.88.0.11/24", more='netns = "host"')
    site.settle()
    assert site.host.names() == {"lo", "xenbr0", "vif1.0", "xn1.0"} and not os.path.exists(f"/run/netns/{GUEST}")
    assert site.said[0].endswith(", bridge xenbr0, connected") and "namespace" not in site.said[0]


def test_settle_takes_no_longer_than_the_network(site):
    """Goal: start-up is quick: settling sleeps until the worker has something.  Method: four vifs within two seconds."""
    began = time.monotonic()
    site.create("", "", "", "")
    site.settle()
    site.world.check_connected()
    assert time.monotonic() - began < 2
