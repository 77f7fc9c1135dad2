"""world.py: domain 0, guests and vifs, made the way a toolstack makes them; interfaces are ends of cables in memory.

Goal: tests say what they want of a vif and nothing else.
Method: the real Toolstack and Probes. Each vif has two cables: `kernel` is the guest kernel's end of the frontend's
interface, `bridge` the far end of the backend's. run() does what the host's loop does: poll what has frames, deliver.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from netdev.cable import Cable, MemoryPort
from netdev.link import MORE, FramePort, Plug, PortError
from netdev.netback import Netback, Offer
from netdev.netfront import Netfront, Want
from tests.sim.holdings import HeldSince
from xenfs.config import GuestConfig
from xenfs.probe import Probe
from xenfs.toolstack import Toolstack
from xenfs.vifspec import VifSpec
from xenmodel.domain import Domain
from xenmodel.hypervisor import Hypervisor
from xenmodel.testing import check_grants, check_ports, check_rings
from xenmodel.types import Domid
from xenmodel.xenstore.client import Client

OFFER, WANT = Offer(), Want()
MAC = "00:16:3e:00:00:{:02x}"
Wrap = Callable[[MemoryPort], FramePort]


def same(port: MemoryPort) -> FramePort:
    return port


@dataclass
class Vif:
    """One vif as a test holds it."""

    world: NetWorld
    devid: int
    offer: Offer
    want: Want
    lanes: int
    kernel: MemoryPort  # where the guest's kernel sends and receives
    guest_port: FramePort  # netfront's end of that cable
    bridge: MemoryPort  # where the rest of the network is
    host_port: FramePort  # netback's end of that cable

    @property
    def front_node(self) -> str:
        return f"/local/domain/{self.world.guest.domid}/device/vif/{self.devid}"

    @property
    def back_node(self) -> str:
        return f"/local/domain/0/backend/vif/{self.world.guest.domid}/{self.devid}"

    @property
    def front(self) -> Netfront:
        device = self.world.fronts.devices[self.front_node]
        assert isinstance(device, Netfront)
        return device

    @property
    def back(self) -> Netback:
        device = self.world.backs.devices[self.back_node]
        assert isinstance(device, Netback)
        return device

    def states(self) -> tuple[str | None, str | None]:
        read = self.world.client.read
        return read(f"{self.front_node}/state"), read(f"{self.back_node}/state")

    @property
    def connected(self) -> bool:
        return self.states() == ("4", "4") and self.front.link_up

    def errors(self) -> tuple[str | None, str | None]:
        """The `error` nodes of frontend and backend."""
        read, domid = self.world.client.read, self.world.guest.domid
        return (
            read(f"/local/domain/{domid}/error/device/vif/{self.devid}/error"),
            read(f"/local/domain/0/error/backend/vif/{domid}/{self.devid}/error"),
        )

    def to_bridge(self, *frames: bytes, vnet: bytes = bytes(10)) -> list[tuple[bytes, bytes]]:
        """The guest's kernel sends; what arrives on the bridge as (virtio_net header, frame)."""
        for frame in frames:
            assert self.kernel.send(frame, vnet), "refused by the cable"
        self.world.run()
        return self.bridge.receive()

    def to_guest(self, *frames: bytes, vnet: bytes = bytes(10)) -> list[tuple[bytes, bytes]]:
        """The bridge sends; what arrives in the guest's kernel."""
        for frame in frames:
            assert self.bridge.send(frame, vnet), "refused by the cable"
        self.world.run()
        return self.kernel.receive()

    def works(self) -> bool:
        """Frames cross, both ways: the end of every test of what must not have hurt this vif."""
        frame = bytes(range(256)) * 4
        return self.to_bridge(frame) == [(bytes(10), frame)] and self.to_guest(frame) == [(bytes(10), frame)]


class NetWorld:
    """`fronts`/`backs`: whether a Probe makes the drivers of that side; without one a test plays that part itself.

    `for_others` is what domain 0 holds for other domains, `for_devices` without the guest's xenstore ring: ask that one
    while the guest lives."""

    def __init__(
        self,
        *,
        order: Callable[[int], int] | None = None,
        fronts: bool = True,
        backs: bool = True,
        guest_mib: int = 64,
        hotplug: bool = True,
    ) -> None:
        self.hypervisor = Hypervisor(order)
        self.toolstack = Toolstack(self.hypervisor)
        self.hotplugs: list[tuple[str, Any]] = []
        if not hotplug:
            self.toolstack.hotplug_vif = lambda back, done: self.hotplugs.append((back, done))
        self.client = self.toolstack.client
        self.now = 1000.0
        self.vifs: dict[str, Vif] = {}
        self.dom0 = self.toolstack.create_dom0(8)
        self.for_others = HeldSince(self.dom0)
        self.backs = Probe(self.dom0, self._kernel(self.dom0), "backend", {"vif": self._make_back} if backs else {})
        self.backs.start()
        self.guest = self.toolstack.create(GuestConfig("", "guest", "uuid", maxmem_mib=guest_mib))
        self.for_devices = HeldSince(self.dom0)
        self.guest_client = self._kernel(self.guest)
        self.fronts = Probe(self.guest, self.guest_client, "device", {"vif": self._make_front} if fronts else {})
        self.fronts.start()
        self.settle()

    def _kernel(self, domain: Domain) -> Client:
        return Client(self.hypervisor.store.connect(Domid(domain.domid)))

    def _make_back(self, domain: Domain, client: Client, node: str, peer: str, domid: int) -> Netback:
        vif = self.vifs[node]

        def open_port(plug: Plug) -> FramePort:
            if plug.name == "broken":
                raise PortError("interface broken cannot be made")
            return vif.host_port

        return Netback(domain, client, node, peer, domid, open_port, lambda: self.now, vif.offer)

    def _make_front(self, domain: Domain, client: Client, node: str, peer: str, domid: int) -> Netfront:
        vif = self.vifs[peer]
        return Netfront(domain, client, node, peer, domid, lambda _plug: vif.guest_port, vif.want)

    def attach(
        self,
        *,
        offer: Offer = OFFER,
        want: Want = WANT,
        queues: int = 1,
        guest_side: Wrap = same,
        host_side: Wrap = same,
        kernel_offload: bool = True,
        settle: bool = True,
        **spec: Any,
    ) -> Vif:
        """Plug a vif in. `kernel_offload`: the guest's kernel and the bridge take unfinished frames, as Linux does."""
        devid = len(self.vifs)
        guest_cable, host_cable = Cable(queues, queues), Cable(queues, queues)
        vif = Vif(
            self, devid, offer, replace(want, queues=queues), queues, guest_cable.a, guest_side(guest_cable.b),
            host_cable.a, host_side(host_cable.b),
        )  # fmt: skip
        for port in (vif.kernel, vif.bridge):
            port.offload(kernel_offload, kernel_offload, kernel_offload)
        self.vifs[vif.back_node] = vif
        vifspec = VifSpec(mac=MAC.format(devid + 1), queues=queues, **spec)
        self.toolstack.attach_vif(self.guest.domid, devid, vifspec)
        if settle:
            self.settle()
        return vif

    def detach(self, vif: Vif) -> None:
        self.toolstack.detach_vif(self.guest.domid, vif.devid)
        self.settle()

    def destroy_guest(self) -> None:
        """Without asking its drivers, as `xl destroy` does."""
        self.fronts.stop()
        self.toolstack.destroy(self.guest.domid)

    def poll(self) -> bool:
        """Each interface once; True if one wants more."""
        more = False
        for vif in self.vifs.values():
            for probe, node in ((self.fronts, vif.front_node), (self.backs, vif.back_node)):
                device = probe.devices.get(node)
                if isinstance(device, Netfront | Netback):
                    for lane in range(vif.lanes):
                        more |= device.poll(lane) == MORE
        return more

    def run(self) -> None:
        """Poll and deliver until nothing moves."""
        for _ in range(10_000):
            more = self.poll()
            before = self.hypervisor.idle
            self.settle()
            if not more and before:
                return
        raise AssertionError("it does not come to rest")

    def settle(self) -> None:
        """Deliver everything; the model's invariants hold between any two turns."""
        for _ in range(100_000):
            if not self.hypervisor.deliver(turns=1):
                break
        else:
            raise AssertionError("it does not come to rest")
        assert self.problems() == []

    def problems(self) -> list[str]:
        found = check_grants(self.hypervisor.domains.values()) + check_ports(self.hypervisor)
        for vif in self.vifs.values():
            front, back = self.fronts.devices.get(vif.front_node), self.backs.devices.get(vif.back_node)
            if isinstance(front, Netfront) and isinstance(back, Netback) and not (front.broken or back.broken):
                for ours, theirs in zip(front.queues, back.queues, strict=False):
                    found += check_rings(ours.tx.ring, theirs.tx.ring) + check_rings(ours.rx.ring, theirs.rx.ring)
        return found

    def write(self, path: str, value: str | int, settle: bool = True) -> None:
        """Poke a node as domain 0's administrator would."""
        self.client.write(path, value)
        if settle:
            self.settle()

    def close(self) -> None:
        self.hypervisor.close()
