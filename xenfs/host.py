"""host.py: the host: one hypervisor, its kernels' buses, the tree, and what keeps them moving.

World is everything without a descriptor of the mount: it can be built, settled and looked at in a test. up.py adds the
mount and the trio tasks: one for the FUSE descriptor, one for the disk workers' eventfd. kick() is what every edge calls
when it has handed in a batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import trio

from blockdev.blkback import Blkback
from blockdev.blkfront import Blkfront
from blockdev.image import Image, Workers
from blockdev.storage import Backing, Storage
from netdev.netback import Netback
from netdev.netfront import Netfront
from xenfs.config import GuestConfig
from xenfs.devxen import XenDevices
from xenfs.exports import EXPORTS, Export
from xenfs.fuse.tree import Directory, Link, Node
from xenfs.nodes import ledger, text, vif
from xenfs.nodes.ledger import Ledger
from xenfs.nodes.text import Text
from xenfs.nodes.xenstore import StoreDirectory, StoreTree
from xenfs.probe import Probe
from xenfs.toolstack import Toolstack
from xenfs.vifs import Vifs
from xenfs.xenstored import StoreHost
from xenmodel.domain import Domain
from xenmodel.hypervisor import Hypervisor
from xenmodel.public.io.xenbus import XenbusState
from xenmodel.types import Domid
from xenmodel.xenbus import XenbusDevice
from xenmodel.xenstore.client import Client

log = logging.getLogger("xenfs.host")

DOM0_MEMORY_MIB = 64
DOM0 = Domid(0)
NETWORK_S = 20.0  # what one change of the host's network may take


class HostError(Exception):
    """The user asked for something that cannot be had; the text says what and why."""


class Guest(NamedTuple):
    """One domain as the host shows it."""

    domain: Domain
    config: GuestConfig
    probe: Probe
    directory: Directory
    exports: dict[str, Export]  # by frontend directory


class World:
    """Domain 0 with its backends, and a guest per configuration."""

    def __init__(
        self, open_storage: Callable[[Backing], Storage] | None = None, device_gid: int | None = None
    ) -> None:
        self.workers = Workers()
        self.open_storage = open_storage or (lambda backing: Image(backing, self.workers, time.perf_counter))
        self.hypervisor = Hypervisor(clock=time.monotonic)
        self.store = StoreHost(self.hypervisor, self.kick)
        self.store.on_release = self._released
        self.devices = XenDevices(self.workers.filling, self.kick, ledger.evtchn)
        self.devices.gid = device_gid
        self.toolstack = Toolstack(self.hypervisor)
        self.vifs = Vifs(self.toolstack, self.kick, lambda line: self.announce(line))
        self.dom0 = self.toolstack.create_dom0(DOM0_MEMORY_MIB)
        self.guests: dict[int, Guest] = {}
        store = StoreTree(self.hypervisor.store.connect(Domid(0)))
        self.domains = Directory()
        self.root = Directory(
            {"domains": self.domains, "xenstore": StoreDirectory(store, "/"), "dev": Link("domains/0/dev")}
        )
        self.backends = Probe(self.dom0, self._kernel(Domid(0)), "backend", {
            "vbd": self._make_blkback, "vif": self.vifs.make_back,
        })  # fmt: skip
        self.backends.start()
        self.domains.add("0", self._directory(self.dom0, Directory()))
        self.announce: Callable[[str], None] = log.info

    def _kernel(self, domid: Domid) -> Client:
        """A domain's kernel has one store connection for all its drivers."""
        return Client(self.hypervisor.store.connect(domid))

    # --- guests ------------------------------------------------------------------------------------------------------

    def create(self, config: GuestConfig) -> Guest:
        """What `xl create` does: the domain, its kernel's bus, then its devices. NetlinkError: it can have no namespace.
        HostError: a device's backend is in no domain that runs.

        With drivers = "none" the bus is not looked at: the nodes are for programs that use the domain's dev/xen."""
        self._check_backends(config)
        driven = config.drivers == "xenfs"
        if driven and config.vifs and config.netns_name:
            self.vifs.network.make_namespace(config.netns_name)
        domain = self.toolstack.create(config)
        dev = Directory()
        directory = self._directory(domain, dev)

        makers = {"vbd": _make_blkfront, "vif": self.vifs.maker(config)}
        probe = Probe(domain, self._kernel(domain.domid), "device", makers)
        guest = Guest(domain, config, probe, directory, {})
        inspect = directory.children[b"inspect"]
        assert isinstance(inspect, Directory), "inspect is a directory"
        probe.added = lambda device: self._added(guest, device, dev, inspect)
        probe.dropped = lambda device: self._dropped(guest, device)
        self.guests[domain.domid] = guest
        self.domains.add(str(domain.domid), directory)
        self.domains.add(config.name, Link(str(domain.domid)))
        if driven:
            probe.start()
        for disk in config.disks:
            self.toolstack.attach_disk(domain.domid, disk)
        for spec in config.vifs:
            self.toolstack.attach_vif(domain.domid, spec.devid, spec)
        return guest

    def _check_backends(self, config: GuestConfig) -> None:
        wanted = [(disk.vdev, disk.backend) for disk in config.disks]
        wanted += [(f"vif {spec.devid}", spec.backend) for spec in config.vifs]
        for name, backend in wanted:
            try:
                self.toolstack.backend_domid(backend)
            except ValueError as error:
                raise HostError(f"{config.name}: {name}: {error}") from None

    def destroy(self, domid: int) -> None:
        guest = self.guests.pop(domid)
        guest.probe.stop()
        self.devices.remove(domid)
        self.toolstack.destroy(domid)
        self.domains.remove(str(domid))
        self.domains.remove(guest.config.name)
        self.hypervisor.settle()
        if guest.config.netns_name:
            self.vifs.network.remove_namespace(guest.config.netns_name)

    def _released(self, domid: Domid) -> None:
        """RELEASE of a domain that runs: the store knows its kernel no more, whose devices would wait for ever. So they go.

        Its directory stays until destroy(). A kernel does not start anew, so an INTRODUCE later brings none of them back.
        """
        guest = self.guests.get(domid)
        if guest is not None:  # else it is being destroyed
            self.hypervisor.defer(guest.probe.stop)  # we are in the middle of a request

    def _directory(self, domain: Domain, dev: Directory) -> Directory:
        inspect = Directory(
            {
                "evtchn": Ledger(lambda: ledger.evtchn_lines(domain)),
                "grants": Ledger(lambda: ledger.grants_lines(domain)),
                "rings": Text(lambda: self._rings(domain)),
                "xenstore": self.store.inspect(domain.domid),
            },
            private=True,
        )
        proc = self.store.device_files(domain.domid, dev)
        xen = dev.children[b"xen"]
        assert isinstance(xen, Directory), "dev/xen is a directory"
        self.devices.add(domain, xen)
        children: dict[str, Node] = {
            "dev": dev,
            "proc": proc,
            "name": Text(lambda: f"{domain.name}\n"),
            "state": Text(lambda: f"{domain.state.value}\n"),
            "inspect": inspect,
        }
        return Directory(children)

    def _added(self, guest: Guest, device: XenbusDevice, dev: Directory, inspect: Directory) -> None:
        if isinstance(device, Netfront):
            export = EXPORTS["vif"](device, dev, inspect)
            device.on_change = lambda: self.vifs.changed(guest.config.name, device)
        else:
            assert isinstance(device, Blkfront), f"{device.node} is no frontend we made"
            export = EXPORTS["vbd"](device, dev, inspect)
            device.on_change = lambda: self._disk_changed(guest, device, export)
        guest.exports[device.node] = export

    def _disk_changed(self, guest: Guest, front: Blkfront, export: Export) -> None:
        export.refresh()
        size = f"{front.sectors / 2048:g} MiB" if front.sectors >= 2048 else f"{front.sectors * 512} bytes"
        if front.connected:
            mode = "read-only" if front.readonly else "read-write"
            self.announce(f"{guest.config.name} {export.name}: {size}, {mode}, connected")

    def _dropped(self, guest: Guest, device: XenbusDevice) -> None:
        export = guest.exports.pop(device.node, None)
        if export is not None:
            export.remove()
            if guest.domain.domid in self.guests:  # else all of it goes
                self.announce(f"{guest.config.name} {export.name}: gone")

    def fronts(self) -> Iterable[tuple[Guest, Blkfront]]:
        for guest in self.guests.values():
            for device in guest.probe.devices.values():
                if isinstance(device, Blkfront):
                    yield guest, device

    def backs(self) -> list[Blkback]:
        return [device for device in self.backends.devices.values() if isinstance(device, Blkback)]

    def netfronts(self) -> Iterable[tuple[Guest, Netfront]]:
        for guest in self.guests.values():
            for device in guest.probe.devices.values():
                if isinstance(device, Netfront):
                    yield guest, device

    def netbacks(self) -> list[Netback]:
        return list(self.vifs.backs.values())

    def _rings(self, domain: Domain) -> str:
        """Rows of the frontends in `domain`, then of the backends."""

        def of(devices: Iterable[Any]) -> list[tuple[str, Any]]:
            return [(device.node.split("/", 4)[4], device) for device in devices if device.domain is domain]

        return text.rings(
            [
                *text.front_rings(of(front for _, front in self.fronts())),
                *vif.front_rings(of(front for _, front in self.netfronts())),
                *text.back_rings(of(self.backs())),
                *vif.back_rings(of(self.netbacks())),
            ]
        )

    def _make_blkback(self, domain: Domain, client: Client, node: str, peer: str, domid: int) -> Blkback:
        return Blkback(domain, client, node, peer, domid, self.open_storage)

    # --- keeping it moving ---------------------------------------------------------------------------------------------

    def kick(self) -> bool:
        """Deliver what a batch caused; True if there is more to do."""
        self.workers.reap()
        self.vifs.network.reap()
        more = self.devices.step()
        return self.hypervisor.deliver() or more

    def settle(self) -> None:
        """Bring the control plane to rest (start-up; no client is connected yet)."""
        self.hypervisor.settle()
        network = self.vifs.network
        while network.pending:
            network.wait(NETWORK_S)
            if not network.reap():
                raise HostError(f"the kernel has not configured an interface within {NETWORK_S:g} s")
            self.hypervisor.settle()

    def check_connected(self) -> None:
        """HostError with the reason if a device that was asked for is not there, and both its ends are ours: a program may
        come for the other one when it likes."""
        for guest in self.guests.values():
            if guest.config.drivers != "xenfs":
                continue
            wanted = [(f"vbd/{disk.vdev_number}", disk.vdev) for disk in guest.config.disks if disk.backend == "0"]
            wanted += [(f"vif/{spec.devid}", f"vif {spec.devid}") for spec in guest.config.vifs if spec.backend == "0"]
            for device, name in wanted:
                front = guest.probe.devices.get(f"/local/domain/{guest.domain.domid}/device/{device}")
                up = front is not None and front.state is XenbusState.Connected
                if not up or (isinstance(front, Netfront) and not front.link_up):
                    raise HostError(f"{guest.config.name}: {name}: {self._why(guest, device)}")

    def _why(self, guest: Guest, device: str) -> str:
        domid, read = guest.domain.domid, self.toolstack.client.read
        kind, ident = device.split("/")
        paths = (
            f"/local/domain/0/error/backend/{kind}/{domid}/{ident}/error",
            f"/local/domain/{domid}/error/device/{device}/error",
        )
        reasons = [reason for path in paths if (reason := read(path))]
        # the number in front is for programs that read the node
        if reasons:
            return "; ".join(reason.partition(" ")[2] for reason in reasons)
        if hotplug := read(f"/local/domain/0/backend/{kind}/{domid}/{ident}/hotplug-error"):
            return hotplug
        node = f"/local/domain/{domid}/device/{device}"
        front = guest.probe.devices.get(node)
        return guest.probe.failures.get(node) or (front and front.broken) or "did not connect"

    def refresh_images(self) -> None:
        """Look at the size of every image again (SIGHUP): a resize is announced to its guest."""
        for back in self.backs():
            if isinstance(back.storage, Image) and back.storage.refresh():
                back.resized()
        self.kick()

    # --- tasks -------------------------------------------------------------------------------------------------------

    async def reap_workers(self) -> None:
        """The task of the disk workers' eventfd."""
        while True:
            await trio.lowlevel.wait_readable(self.workers.fd)
            while self.kick():
                await trio.lowlevel.checkpoint()

    async def reap_network(self) -> None:
        """The task of the netlink worker's eventfd."""
        while True:
            await trio.lowlevel.wait_readable(self.vifs.network.fd)
            while self.kick():
                await trio.lowlevel.checkpoint()

    async def drain(self, timeout_s: float) -> bool:
        """Wait until no request is under way; False if the time was not enough for our own backends. Another one may take
        as long, unless it is seen to be gone."""
        self._leave_abandoned()
        with trio.move_on_after(timeout_s):
            while self._under_way():
                self.kick()
                await trio.sleep(0.005)
        return not any(front.peer_domid == DOM0 for front in self._under_way())

    def _under_way(self) -> list[Blkfront]:
        return [front for _, front in self.fronts() if front.connected and (front.waiting or front.busy)]

    def _leave_abandoned(self) -> None:
        """Close the disks whose backend was a program that has ended without a word: with it went its event channels."""
        for guest, front in list(self.fronts()):
            channels = [front.domain.events.channels.get(queue.port) for queue in front.queues]
            if front.peer_domid == DOM0 or any(channel is not None and channel.peer for channel in channels):
                continue
            if front.connected:
                lost = len(front.waiting) + sum(queue.ring.size - queue.ring.free for queue in front.queues)
                name = guest.exports[front.node].name
                unanswered = f", {lost} requests are not answered" if lost else ""
                log.warning("%s %s: its backend has gone%s", guest.config.name, name, unanswered)
                front.close()

    def close(self) -> bool:
        """Close every device in order (guest first), destroy the domains, stop the workers. False: something hangs."""
        devices: list[Blkfront | Netfront] = [*(f for _, f in self.fronts()), *(f for _, f in self.netfronts())]
        for front in devices:
            front.close()
        deadline = time.monotonic() + 10
        served = [front for front in devices if front.peer_node in self.backends.devices]  # nobody answers the others
        while any(front.state is not XenbusState.Closed for front in served) and time.monotonic() < deadline:
            self.kick()
            time.sleep(0.001)
        finished = []
        with ExitStack() as rest:  # in reverse; and whatever fails, the rest is still done
            rest.callback(self.hypervisor.close)
            rest.callback(self.devices.close)
            rest.callback(lambda: finished.append(self.workers.close()))
            rest.callback(self.vifs.close)
            rest.callback(self.store.close)
            rest.callback(self.hypervisor.settle)
            rest.callback(self.backends.stop)
            for domid in list(self.guests):
                rest.callback(self.destroy, domid)
        return finished == [True]


def _make_blkfront(domain: Domain, client: Client, node: str, peer: str, domid: int) -> Blkfront:
    return Blkfront(domain, client, node, peer, domid)
