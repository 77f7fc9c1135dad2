"""toolstack.py: what xl and libxl do: build a domain's part of the store, and plug and unplug its devices.

Writes the nodes that libxl of Xen 4.17 writes, in its order and with its permissions; drivers then find everything they
need in the store, so start-up, hot-plug and a test that pokes the store take the same path. The hotplug script's part
(saying where the image is, once blkback is there) is hotplug() here.

Left out of the tree: nodes of devices that do not exist here yet (console, vif), `store/` (the store has no ring yet) and
libxl's own bookkeeping below /libxl that nobody but libxl reads.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from xenfs.config import GuestConfig
from xenfs.diskspec import DiskSpec
from xenmodel.domain import Domain
from xenmodel.hypervisor import Hypervisor
from xenmodel.public.io.xenbus import XenbusState
from xenmodel.types import Domid
from xenmodel.xenstore.client import Client
from xenmodel.xenstore.perms import Access, Perm

DOM0 = Domid(0)
KIB_PER_MIB = 1024
PAGES_PER_MIB = 256
GUEST_OWNED = (
    "device/suspend/event-channel", "control/shutdown", "control/feature-poweroff", "control/feature-reboot",
    "control/feature-suspend", "control/sysrq", "data", "drivers", "feature", "attr", "error",
)  # fmt: skip

Node = tuple[str, str]


class Toolstack:
    """Works as domain 0, through a store connection of its own (as xl does)."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self.hypervisor = hypervisor
        self.client = Client(hypervisor.store.connect(DOM0))
        self._uuids: dict[int, str] = {}
        self._watches: dict[str, str] = {}  # backend directory -> watch of its state

    def create_dom0(self, memory_mib: int) -> Domain:
        """Domain 0, as xen-init-dom0 leaves it in the store."""
        domain = self.hypervisor.create_domain(memory_mib * PAGES_PER_MIB, "Domain-0", DOM0)
        self.client.write("/tool/xenstored", "")
        self.client.write("/local/domain/0/domid", 0)
        self.client.write("/local/domain/0/name", "Domain-0")
        return domain

    def create(self, config: GuestConfig) -> Domain:
        """A domain and its tree, without devices. Then introduce it."""
        domain = self.hypervisor.create_domain(
            config.maxmem_mib * PAGES_PER_MIB, config.name, max_grant_frames=config.max_grant_frames
        )
        domid = domain.domid
        self._uuids[domid] = config.uuid
        self.client.transact(lambda tx: self._write_domain(tx, domid, config))

        def memory(tx: int) -> None:
            home = f"/local/domain/{domid}"
            self.client.write(f"{home}/memory/static-max", config.maxmem_mib * KIB_PER_MIB, tx)
            self.client.write(f"{home}/memory/target", config.memory_mib * KIB_PER_MIB, tx)
            self.client.write(f"{home}/memory/videoram", 0, tx)
            self.client.write(f"{home}/domid", domid, tx)
            self.client.write(f"{home}/cpu/0/availability", "online", tx)

        self.client.transact(memory)
        self.hypervisor.store.introduce(domid)
        return domain

    def _write_domain(self, tx: int, domid: Domid, config: GuestConfig) -> None:
        home, vm, libxl = f"/local/domain/{domid}", f"/vm/{config.uuid}", f"/libxl/{domid}"
        private, shared = [Perm(DOM0, Access.NONE)], _owned(DOM0, domid)
        for path, perms in ((home, shared), (vm, shared), (libxl, private), (f"{libxl}/device", private)):
            self.client.rm(path, tx)
            self._put(path, "", perms, tx)
        self.client.write(f"{home}/vm", vm, tx)
        self.client.write(f"{home}/name", config.name, tx)
        self.client.write(f"{vm}/name", config.name, tx)
        for name in ("cpu", "memory", "device", "control"):
            self._put(f"{home}/{name}", "", shared, tx)
        for name in GUEST_OWNED:
            self._put(f"{home}/{name}", "", [Perm(domid, Access.NONE)], tx)
        self.client.write(f"{vm}/uuid", config.uuid, tx)
        for feature in ("multiprocessor-suspend", "xs_reset_watches"):
            self.client.write(f"{home}/control/platform-feature-{feature}", 1, tx)
        self.client.write(f"{libxl}/type", "pv", tx)

    def attach_disk(self, domid: int, disk: DiskSpec) -> str:
        """Plug a disk in: one transaction with both directories and libxl's copy. The backend's directory."""
        ident = disk.vdev_number
        front, back = f"/local/domain/{domid}/device/vbd/{ident}", f"/local/domain/0/backend/vbd/{domid}/{ident}"
        libxl = f"/libxl/{domid}/device/vbd/{ident}"
        frontend: list[Node] = [
            ("backend-id", "0"), ("state", "1"), ("virtual-device", str(ident)),
            ("device-type", "cdrom" if disk.cdrom else "disk"), ("trusted", str(int(disk.trusted))),
            ("protocol", "x86_64-abi"),
        ]  # fmt: skip
        backend: list[Node] = [
            ("params", os.path.abspath(disk.target)), ("script", "/etc/xen/scripts/block"), ("frontend-id", str(domid)),
            ("online", "1"), ("removable", str(int(disk.removable))), ("bootable", "1"), ("state", "1"),
            ("dev", disk.vdev), ("type", "phy"), ("mode", "r" if disk.readonly else "w"),
            ("device-type", "cdrom" if disk.cdrom else "disk"), ("discard-enable", str(int(disk.discard))),
            ("specification", "xen"),
        ]  # fmt: skip
        ours = {
            "xenfs-sector-size": disk.sector_size,
            "xenfs-physical-sector-size": disk.physical_sector_size,
            "xenfs-direct-io": int(disk.direct_io) or None,
        }

        def work(tx: int) -> None:
            client, guest = self.client, Domid(domid)
            client.rm(libxl, tx)
            client.write(f"{libxl}/frontend", front, tx)
            client.write(f"{libxl}/backend", back, tx)
            client.rm(front, tx)
            perms = _owned(guest, DOM0)
            self._put(front, "", perms, tx)
            client.write(f"{front}/backend", back, tx)
            for key, value in frontend:
                self._put(f"{front}/{key}", value, perms, tx)
            client.rm(back, tx)
            self._put(back, "", _owned(DOM0, guest), tx)
            client.write(f"{back}/frontend", front, tx)
            for key, value in backend:
                client.write(f"{back}/{key}", value, tx)
            for key, number in ours.items():
                if number is not None:
                    client.write(f"{back}/{key}", number, tx)
            for key, value in backend:
                client.write(f"{libxl}/{key}", value, tx)

        self.client.transact(work)
        self._watches[back] = self.client.watch(f"{back}/state", lambda _path: self._hotplug(back))
        return back

    def _hotplug(self, back: str) -> None:
        """The block script's part, run when blkback has said InitWait: where the image is, and that it is connected."""
        state = self.client.read(f"{back}/state")
        if state != str(int(XenbusState.InitWait)) or self.client.exists(f"{back}/hotplug-status"):
            return
        path = self.client.read(f"{back}/params") or ""
        try:
            status = os.stat(path)
        except OSError:
            status = None  # blkback will say why it cannot open it
        if status is not None and stat.S_ISBLK(status.st_mode):
            device = f"{os.major(status.st_rdev):x}:{os.minor(status.st_rdev):x}"
            self.client.write(f"{back}/physical-device", device)
        self.client.write(f"{back}/physical-device-path", path)
        self.client.write(f"{back}/hotplug-status", "connected")

    def detach_disk(self, domid: int, ident: int, done: Callable[[], None] = lambda: None) -> None:
        """Hot-unplug: ask the backend side to close, remove all three directories when it has.

        A backend that is Closed already (it failed, or the guest closed the device) is not asked: it would not answer.
        """
        back = f"/local/domain/0/backend/vbd/{domid}/{ident}"
        if back not in self._watches:
            raise ValueError(f"domain {domid} has no disk {ident}")

        def ask(tx: int) -> None:
            self.client.write(f"{back}/online", 0, tx)
            if self.client.read(f"{back}/state", tx) not in (None, str(int(XenbusState.Closed))):
                self.client.write(f"{back}/state", int(XenbusState.Closing), tx)

        def closed(_path: str) -> None:
            if self.client.read(f"{back}/state") in (None, str(int(XenbusState.Closed))):
                self.client.unwatch(self._watches.pop(back))
                self.client.transact(lambda tx: self._remove_disk(tx, domid, ident))
                done()

        self.client.unwatch(self._watches.pop(back))
        self.client.transact(ask)
        self._watches[back] = self.client.watch(f"{back}/state", closed)

    def _remove_disk(self, tx: int, domid: int, ident: int) -> None:
        """The three directories, and parents that became empty: they would eat the domain's quota."""
        for root, kind in (
            (f"/local/domain/{domid}/device", "vbd"),
            (f"/libxl/{domid}/device", "vbd"),
            ("/local/domain/0/backend", f"vbd/{domid}"),
        ):
            self.client.rm(f"{root}/{kind}/{ident}", tx)
            path = f"{root}/{kind}"
            while path != root and not self.client.directory(path, tx):
                self.client.rm(path, tx)
                path = path.rpartition("/")[0]
        if not self.client.directory("/local/domain/0/backend", tx):
            self.client.rm("/local/domain/0/backend", tx)

    def destroy(self, domid: int) -> None:
        """Remove a domain and what is left of it in the store; its devices have been closed."""
        for back, watch in list(self._watches.items()):
            if back.split("/")[6] == str(domid):
                self.client.unwatch(watch)
                del self._watches[back]

        def work(tx: int) -> None:
            for ident in self.client.directory(f"/libxl/{domid}/device/vbd", tx):
                self._remove_disk(tx, domid, int(ident))
            for path in (f"/vm/{self._uuids.pop(domid)}", f"/local/domain/{domid}", f"/libxl/{domid}"):
                self.client.rm(path, tx)

        self.client.transact(work, attempts=1)
        self.hypervisor.destroy_domain(domid)

    def _put(self, path: str, value: str, perms: list[Perm], tx: int) -> None:
        self.client.write(path, value, tx)
        self.client.set_perms(path, perms, tx)


def _owned(owner: Domid, reader: Domid) -> list[Perm]:
    return [Perm(owner, Access.NONE), Perm(reader, Access.READ)]
