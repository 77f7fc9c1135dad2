"""world.py: a hypervisor with domain 0, one guest and disks, made the way a toolstack makes them; no host, no files.

Goal: tests say what they want of a disk and nothing else.
Method: the real Toolstack and Probes; a Storage per disk that stays the same when the backend opens it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from blockdev.blkback import Blkback, Offer
from blockdev.blkfront import Blkfront, Want
from blockdev.command import Command
from blockdev.storage import Backing, MemoryStorage, Storage, StorageError
from blockdev.vdev import parse_vdev
from tests.sim.holdings import HeldSince
from xenfs.config import GuestConfig
from xenfs.diskspec import DiskSpec
from xenfs.probe import Probe
from xenfs.toolstack import Toolstack
from xenmodel.domain import Domain
from xenmodel.hypervisor import Hypervisor
from xenmodel.public.io.blkif import BLKIF_OP_DISCARD, BLKIF_OP_READ, BLKIF_OP_WRITE, SECTOR_SIZE
from xenmodel.public.io.xenbus import XenbusState
from xenmodel.testing import check_world
from xenmodel.types import Domid
from xenmodel.xenbus import XenbusDevice
from xenmodel.xenstore.client import Client

KIB = 1024
MIB = 1 << 20
SECTORS = 4096  # 2 MiB
OFFER, WANT = Offer(), Want()


@dataclass
class Plan:
    """What a disk is to be like: by the path of its image."""

    storage: Storage
    offer: Offer
    want: Want


@dataclass
class Disk:
    """One disk as a test holds it. `done` are the commands that completed, in order."""

    world: World
    vdev: str
    number: int
    done: list[Command] = field(default_factory=list)

    @property
    def front_node(self) -> str:
        return f"/local/domain/{self.world.guest.domid}/device/vbd/{self.number}"

    @property
    def back_node(self) -> str:
        return f"/local/domain/0/backend/vbd/{self.world.guest.domid}/{self.number}"

    @property
    def front(self) -> Blkfront:
        device = self.world.fronts.devices[self.front_node]
        assert isinstance(device, Blkfront)
        return device

    @property
    def back(self) -> Blkback:
        device = self.world.backs.devices[self.back_node]
        assert isinstance(device, Blkback)
        return device

    @property
    def connected(self) -> bool:
        return self.states() == ("4", "4")

    def states(self) -> tuple[str | None, str | None]:
        read = self.world.client.read
        return read(f"{self.front_node}/state"), read(f"{self.back_node}/state")

    def errors(self) -> tuple[str | None, str | None]:
        """The `error` nodes of frontend and backend."""
        read, domid = self.world.client.read, self.world.guest.domid
        return (
            read(f"/local/domain/{domid}/error/device/vbd/{self.number}/error"),
            read(f"/local/domain/0/error/backend/vbd/{domid}/{self.number}/error"),
        )

    def start(self, op: int, sector: int, length: int, data: bytes = b"") -> Command:
        """Submit and do not wait."""
        command = self.front.take(length)
        assert command is not None, "no command is free"
        command.view[: len(data)] = data
        self.front.submit(command, op, sector, length)
        return command

    def finish(self, command: Command) -> int:
        """Settle, and give the command back; its status."""
        self.world.settle()
        assert command in self.done, f"{command.op} of sector {command.sector} did not complete"
        self.done.remove(command)
        self.front.give(command)
        return command.status

    def write(self, sector: int, data: bytes) -> int:
        return self.finish(self.start(BLKIF_OP_WRITE, sector, len(data), data))

    def read(self, sector: int, length: int) -> bytes | int:
        """The bytes, or the status of a failure."""
        command = self.start(BLKIF_OP_READ, sector, length)
        self.world.settle()
        data = bytes(command.view[:length])
        return self.finish(command) or data

    def discard(self, sector: int, length: int) -> int:
        return self.finish(self.start(BLKIF_OP_DISCARD, sector, length))

    def flush(self) -> int:
        command = self.front.take(0)
        assert command is not None
        self.front.flush(command)
        return self.finish(command)

    def stop_backend(self) -> None:
        """The backend closes and stays away; what is on the ring is answered first, the rest waits."""
        self.world.write(f"{self.back_node}/state", int(XenbusState.Closing))

    def start_backend(self, offer: Offer | None = None) -> None:
        """It is back, perhaps with another offer, as when its driver is bound again."""
        self.back.offered = offer or self.back.offered
        self.back._offer()
        self.world.settle()

    def restart(self, offer: Offer | None = None) -> None:
        self.stop_backend()
        assert self.states() == ("6", "6"), f"not closed but {self.states()}"
        self.start_backend(offer)

    def works(self) -> bool:
        """Write, read back: the end of every test of what must not have hurt this disk."""
        data = bytes(range(256)) * 32
        return self.write(8, data) == 0 and self.read(8, len(data)) == data


class World:
    """`fronts`/`backs`: whether a Probe makes the drivers of that side; without one a test plays that part itself.

    `for_others` is what domain 0 holds for other domains, `for_devices` without the guest's xenstore ring: ask that one
    while the guest lives."""

    def __init__(
        self,
        *,
        order: Callable[[int], int] | None = None,
        fronts: bool = True,
        backs: bool = True,
        guest_mib: int = 16,
        max_grant_frames: int = 64,
    ) -> None:
        self.hypervisor = Hypervisor(order)
        self.toolstack = Toolstack(self.hypervisor)
        self.client = self.toolstack.client
        self.plans: dict[str, Plan] = {}
        self.disks: dict[str, Disk] = {}
        self.dom0 = self.toolstack.create_dom0(8)
        self.for_others = HeldSince(self.dom0)
        self.backs = Probe(self.dom0, self._kernel(self.dom0), "backend", {"vbd": self._make_back} if backs else {})
        self.backs.start()
        config = GuestConfig("", "guest", "uuid", maxmem_mib=guest_mib, max_grant_frames=max_grant_frames)
        self.guest = self.toolstack.create(config)
        self.for_devices = HeldSince(self.dom0)
        self.guest_client = self._kernel(self.guest)
        self.fronts = Probe(self.guest, self.guest_client, "device", {"vbd": self._make_front} if fronts else {})
        self.fronts.added = self._added
        self.fronts.start()
        self.settle()

    def _kernel(self, domain: Domain) -> Client:
        return Client(self.hypervisor.store.connect(Domid(domain.domid)))

    def _plan(self, back_node: str) -> Plan:
        return self.plans[self.client.read(f"{back_node}/params") or ""]

    def _make_back(self, domain: Domain, client: Client, node: str, peer: str, domid: int) -> Blkback:
        plan = self._plan(node)

        def open_storage(backing: Backing) -> Storage:
            if isinstance(plan.storage, Broken):
                raise StorageError(f"cannot open disk image {backing.path}: it is broken")
            return plan.storage

        return Blkback(domain, client, node, peer, domid, open_storage, plan.offer)

    def _make_front(self, domain: Domain, client: Client, node: str, peer: str, domid: int) -> Blkfront:
        return Blkfront(domain, client, node, peer, domid, self._plan(peer).want)

    def _added(self, device: XenbusDevice) -> None:
        assert isinstance(device, Blkfront)
        device.on_complete = next(d.done.append for d in self.disks.values() if d.front_node == device.node)

    def attach(
        self,
        vdev: str = "xvda",
        storage: Storage | None = None,
        *,
        offer: Offer = OFFER,
        want: Want = WANT,
        settle: bool = True,
        **spec: Any,
    ) -> Disk:
        """Plug a disk in. `spec` are further fields of DiskSpec."""
        path = f"/disk/{vdev}"
        self.plans[path] = Plan(storage or MemoryStorage(SECTORS), offer, want)
        number = parse_vdev(vdev)
        disk = self.disks[vdev] = Disk(self, vdev, number)
        self.toolstack.attach_disk(self.guest.domid, DiskSpec(path, vdev, number, **spec))
        if settle:
            self.settle()
        return disk

    def detach(self, disk: Disk) -> None:
        self.toolstack.detach_disk(self.guest.domid, disk.number)
        self.settle()

    def destroy_guest(self) -> None:
        """Without asking its drivers, as `xl destroy` does."""
        self.fronts.stop()
        self.toolstack.destroy(self.guest.domid)

    def settle(self) -> None:
        """Deliver everything; the model's invariants hold between any two turns."""
        for _ in range(100_000):
            more = self.hypervisor.deliver(turns=1)
            if not more:
                break
        else:
            raise AssertionError("it does not come to rest")
        assert check_world(self.hypervisor) == []

    def write(self, path: str, value: str | int, settle: bool = True) -> None:
        """Poke a node as domain 0's administrator would."""
        self.client.write(path, value)
        if settle:
            self.settle()

    def close(self) -> None:
        self.hypervisor.close()


class Broken(MemoryStorage):
    """An image that cannot be opened."""


def sectors_of(data: bytes) -> int:
    return len(data) // SECTOR_SIZE


CLOSED = str(int(XenbusState.Closed))
