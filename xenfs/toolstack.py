"""toolstack.py: what xl and libxl do: build a domain's part of the store, and plug and unplug its devices.

Writes the nodes that libxl of Xen 4.17 writes, in its order and with its permissions; drivers then find everything they
need in the store, so start-up, hot-plug and a test that pokes the store take the same path. The hotplug scripts' part is
here as far as it is in the store: saying where a disk's image is, or that an interface is on its bridge. Putting it there
is the host's, see `Toolstack.hotplug_vif`.

A backend may be in another guest: its directory is below that domain's, and its scripts are that domain's to run.

Invariants: a device has an entry in `_backends` from its attach until its three directories are removed; whatever somebody
with the right to (domain 0's root, a driver) writes in a node costs the device of that node, never the process.
Left out of the tree: nodes of devices that do not exist here yet (console) and libxl's own bookkeeping below /libxl that
nobody but libxl reads.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from typing import Protocol

from netdev.link import DEFAULT_MTU
from xenfs.config import GuestConfig
from xenfs.devnodes import DeviceNodes, disk_nodes, vif_nodes
from xenfs.diskspec import DiskSpec
from xenfs.vifspec import VifSpec, next_devid
from xenfs.xlcfg import domid as domid_in
from xenmodel.domain import Domain
from xenmodel.hypervisor import Hypervisor
from xenmodel.public.grant_table import GNTTAB_RESERVED_XENSTORE
from xenmodel.public.io.xenbus import XenbusState
from xenmodel.types import Domid, Gref, PeerFault
from xenmodel.xenstore.client import Client
from xenmodel.xenstore.errors import XsError, shown
from xenmodel.xenstore.perms import Access, Perm

log = logging.getLogger("xenfs.toolstack")

DOM0 = Domid(0)
KIB_PER_MIB = 1024
PAGES_PER_MIB = 256
GUEST_OWNED = (
    "device/suspend/event-channel", "control/shutdown", "control/feature-poweroff", "control/feature-reboot",
    "control/feature-suspend", "control/sysrq", "data", "drivers", "feature", "attr", "error",
)  # fmt: skip
DRIVER_DOMAIN_OWNED = ("libxl", "device-model")  # for a libxl of its own

MAX_REASON_CHARS = 512  # of a script's error: a write to the store holds 4096 bytes
MAX_IDENT_DIGITS = 10  # of a uint32_t

KINDS = ("vbd", "vif")
INITIALISING, CLOSED = str(int(XenbusState.Initialising)), str(int(XenbusState.Closed))


class HotplugDone(Protocol):
    """What the host calls when an interface is on its bridge (None), or cannot be (why). `mtu` is the interface's, if that
    is not what the guest was promised. May be called late, and is ignored if it is too late."""

    def __call__(self, reason: str | None, mtu: int | None = None) -> None: ...


class Toolstack:
    """Works as domain 0, through a store connection of its own (as xl does)."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self.hypervisor = hypervisor
        self.client = Client(hypervisor.store.connect(DOM0))
        self._uuids: dict[int, str] = {}
        self._backends: dict[tuple[int, str, str], Domid] = {}  # whose device, its kind and number -> who serves it
        self._watches: dict[str, str] = {}  # backend directory -> watch of its state
        self._plugs: dict[str, object] = {}  # backend directory of a vif -> which run of the script; None: it has ended
        # The script vif-bridge: called with a backend's directory when that is in InitWait, again if it starts anew.
        self.hotplug_vif: Callable[[str, HotplugDone], None] = lambda _back, done: done(None)

    def create_dom0(self, memory_mib: int) -> Domain:
        """Domain 0, as xen-init-dom0 leaves it in the store."""
        domain = self.hypervisor.create_domain(memory_mib * PAGES_PER_MIB, "Domain-0", DOM0)
        page, port = domain.memory.allocate(), domain.events.alloc_unbound(DOM0)
        self.hypervisor.xenstored.serve_own_domain(domain.memory.run(page), port)
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
        # what the domain builder leaves behind: a page and a port for the store, granted with the reserved reference
        page, port = domain.memory.allocate(), domain.events.alloc_unbound(DOM0)
        domain.grants.set_entry(Gref(GNTTAB_RESERVED_XENSTORE), DOM0, page)
        self.client.transact(lambda tx: self._write_domain(tx, domid, config))

        def memory(tx: int) -> None:
            home = f"/local/domain/{domid}"
            self.client.write(f"{home}/memory/static-max", config.maxmem_mib * KIB_PER_MIB, tx)
            self.client.write(f"{home}/memory/target", config.memory_mib * KIB_PER_MIB, tx)
            self.client.write(f"{home}/memory/videoram", 0, tx)
            self.client.write(f"{home}/domid", domid, tx)
            self.client.write(f"{home}/store/port", port, tx)
            self.client.write(f"{home}/store/ring-ref", page, tx)
            self.client.write(f"{home}/cpu/0/availability", "online", tx)

        self.client.transact(memory)
        self.hypervisor.xenstored.introduce(domid, page, port)
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
        for name in DRIVER_DOMAIN_OWNED if config.driver_domain else ():
            self._put(f"{home}/{name}", "", [Perm(domid, Access.NONE)], tx)
        self.client.write(f"{vm}/uuid", config.uuid, tx)
        for feature in ("multiprocessor-suspend", "xs_reset_watches"):
            self.client.write(f"{home}/control/platform-feature-{feature}", 1, tx)
        self.client.write(f"{libxl}/type", "pv", tx)

    def backend_domid(self, backend: str, domid: int | None = None) -> Domid:
        """The domain that a specification's `backend` names, for a device of `domid`. ValueError if it cannot serve it."""
        domains, number = self.hypervisor.domains, domid_in(backend)
        named = (domain for domain in domains.values() if domain.name == backend)
        found = next(named, None) if number is None else domains.get(number)
        if found is None:
            raise ValueError(f"backend {shown(backend)} is no domain that runs: it must be started first")
        if found.domid == domid:
            raise ValueError(f"backend {shown(backend)} is the guest itself")
        return found.domid

    def attach_disk(self, domid: int, disk: DiskSpec) -> str:
        """Plug a disk in. The backend's directory."""
        backend_domid, ident = self.backend_domid(disk.backend, domid), disk.vdev_number
        if (domid, "vbd", str(ident)) in self._backends:
            raise ValueError(f"domain {domid} has a disk {ident} already")
        back = self._attach(domid, backend_domid, "vbd", ident, disk_nodes(domid, backend_domid, disk))
        if backend_domid == DOM0:
            self._watches[back] = self._watch(f"{back}/state", lambda _path: self._hotplug_disk(back))
        return back

    def attach_vif(self, domid: int, devid: int | None, vif: VifSpec) -> str:
        """Plug an interface in, under this number, or that of `vif`, or the lowest that is free. The backend's directory."""
        backend_domid = self.backend_domid(vif.backend, domid)
        taken = {int(name) for name in self._idents(domid, "vif")}
        devid = vif.devid if devid is None else devid
        devid = next_devid(taken) if devid is None else devid
        if devid in taken:
            raise ValueError(f"domain {domid} has an interface {devid} already")
        vif = vif.resolved(self._uuids[domid], devid)
        back = self._attach(domid, backend_domid, "vif", devid, vif_nodes(domid, backend_domid, devid, vif))
        if backend_domid == DOM0:
            self._watches[back] = self._watch(f"{back}/state", lambda _path: self._hotplug_vif(back))
        return back

    def _attach(self, domid: int, backend_domid: Domid, kind: str, ident: int, nodes: DeviceNodes) -> str:
        """libxl__device_generic_add(): one transaction with both directories and libxl's copy. The backend's directory."""
        front, libxl = f"/local/domain/{domid}/device/{kind}/{ident}", f"/libxl/{domid}/device/{kind}/{ident}"
        back = f"/local/domain/{backend_domid}/backend/{kind}/{domid}/{ident}"
        guests, backends = _owned(Domid(domid), backend_domid), _owned(backend_domid, Domid(domid))

        def work(tx: int) -> None:
            client = self.client
            client.rm(libxl, tx)
            client.write(f"{libxl}/frontend", front, tx)
            client.write(f"{libxl}/backend", back, tx)
            client.rm(front, tx)
            self._put(front, "", guests, tx)
            client.write(f"{front}/backend", back, tx)
            for key, value in nodes.frontend:
                self._put(f"{front}/{key}", value, guests, tx)
            for key, value in nodes.readonly:
                self._put(f"{front}/{key}", value, backends, tx)
            client.rm(back, tx)
            self._put(back, "", backends, tx)
            client.write(f"{back}/frontend", front, tx)
            for key, value in nodes.backend + nodes.ours:
                client.write(f"{back}/{key}", value, tx)
            for key, value in nodes.backend:
                client.write(f"{libxl}/{key}", value, tx)

        self.client.transact(work)
        self._backends[domid, kind, str(ident)] = backend_domid
        return back

    def _hotplug_disk(self, back: str) -> None:
        """The block script's part, run when blkback has said InitWait: where the image is, and that it is connected."""
        state = self.client.read(f"{back}/state")
        if state != str(int(XenbusState.InitWait)) or self.client.exists(f"{back}/hotplug-status"):
            return
        path = self.client.read(f"{back}/params") or ""
        try:
            self._find_disk(back, path)
        except (XsError, ValueError) as error:  # a NUL in it, or a path that fits `params` and not the longer node
            self._script_failed(back, f"params {shown(path)}: {error}")
        else:
            self.client.write(f"{back}/hotplug-status", "connected")

    def _find_disk(self, back: str, path: str) -> None:
        try:
            status = os.stat(path)
        except OSError:
            status = None  # blkback will say why it cannot open it
        if status is not None and stat.S_ISBLK(status.st_mode):
            device = f"{os.major(status.st_rdev):x}:{os.minor(status.st_rdev):x}"
            self.client.write(f"{back}/physical-device", device)
        self.client.write(f"{back}/physical-device-path", path)

    def _hotplug_vif(self, back: str) -> None:
        """Run the interface's script when netback has said InitWait; once, until netback starts anew."""
        state, status = self.client.read(f"{back}/state"), self.client.read(f"{back}/hotplug-status")
        if state not in (str(int(XenbusState.InitWait)), str(int(XenbusState.Connected))):
            self._plugs.pop(back, None)  # what a script does for the interface that is going is of no use to the next
        # netback removes the status when it is done with an interface, so without one this is another
        if state != str(int(XenbusState.InitWait)) or (back in self._plugs and status is not None):
            return
        if status != "":
            self.client.write(f"{back}/hotplug-status", "")  # netback waits as long as this is here and not "connected"
            self.client.rm(f"{back}/hotplug-error")
        run = self._plugs[back] = object()

        def done(reason: str | None, mtu: int | None = None) -> None:
            if self._plugs.get(back) is run and self.client.exists(f"{back}/hotplug-status"):
                self._plugs[back] = None
                self._hotplugged(back, reason, mtu)

        self.hotplug_vif(back, done)

    def _hotplugged(self, back: str, reason: str | None, mtu: int | None) -> None:
        """What vif-bridge writes at its end."""
        try:
            if reason is None:
                self._promise_mtu(back, mtu)
        except (XsError, ValueError) as error:  # `frontend` is no path, or `mtu` is longer than a node
            reason = str(error)
        if reason is not None:
            self._script_failed(back, reason)
        else:
            self.client.write(f"{back}/hotplug-status", "connected")

    def _promise_mtu(self, back: str, mtu: int | None) -> None:
        front = self.client.read(f"{back}/frontend")
        if self.client.exists(f"{front}/mtu"):  # the guest may have removed its directory, and is not to get it back
            self.client.write(f"{front}/mtu", mtu or self.client.read(f"{back}/mtu") or DEFAULT_MTU)

    def _script_failed(self, back: str, reason: str) -> None:
        """What the function for errors of all scripts writes."""
        self.client.write(f"{back}/hotplug-error", reason[:MAX_REASON_CHARS])
        self.client.write(f"{back}/hotplug-status", "error")

    def detach_disk(self, domid: int, ident: int, done: Callable[[], None] = lambda: None, *, force: bool = False) -> None:
        """Hot-unplug a disk; `done` is called when nothing is left of it. ValueError if there is none.

        With `force`, as with that of xl, a backend that does not answer is not waited for."""
        self._detach(domid, "vbd", ident, done, f"domain {domid} has no disk {ident}", force)

    def detach_vif(self, domid: int, devid: int, done: Callable[[], None] = lambda: None, *, force: bool = False) -> None:
        """The same of an interface."""
        self._detach(domid, "vif", devid, done, f"domain {domid} has no interface {devid}", force)

    def _detach(self, domid: int, kind: str, ident: int, done: Callable[[], None], missing: str, force: bool) -> None:
        """Ask the backend side to close, remove all three directories when it has.

        A backend that is Closed already (it failed, or the guest closed the device) is not asked: it would not answer. Nor
        would one in another domain that never began; one whose domain has ended took its directory along.
        """
        device = (domid, kind, str(ident))
        if device not in self._backends:
            raise ValueError(missing)
        back, foreign = f"{self._backend_tree(*device)}/{kind}/{domid}/{ident}", self._backends[device] != DOM0
        self._plugs.pop(back, None)

        def ask(tx: int) -> None:
            state = self.client.read(f"{back}/state", tx)
            if state is None:
                return
            self.client.write(f"{back}/online", 0, tx)
            if state != CLOSED:
                unheard = force or (foreign and state == INITIALISING)
                self.client.write(f"{back}/state", CLOSED if unheard else int(XenbusState.Closing), tx)

        def closed(_path: str) -> None:
            if force or self.client.read(f"{back}/state") in (None, CLOSED):
                self.client.unwatch(self._watches.pop(back))
                self.client.transact(lambda tx: self._remove(tx, *device))
                del self._backends[device]
                done()

        self._unwatch(back)
        self.client.transact(ask)
        self._watches[back] = self._watch(f"{back}/state", closed)

    def _backend_tree(self, domid: int, kind: str, ident: str) -> str:
        return f"/local/domain/{self._backends.get((domid, kind, ident), DOM0)}/backend"

    def _remove(self, tx: int, domid: int, kind: str, ident: str) -> None:
        """The three directories, and parents that became empty: they would eat the domain's quota."""
        tree = self._backend_tree(domid, kind, ident)
        for root, parent in (
            (f"/local/domain/{domid}/device", kind),
            (f"/libxl/{domid}/device", kind),
            (tree, f"{kind}/{domid}"),
        ):
            self.client.rm(f"{root}/{parent}/{ident}", tx)
            path = f"{root}/{parent}"
            while path != root and not self.client.directory(path, tx):
                self.client.rm(path, tx)
                path = path.rpartition("/")[0]
        if not self.client.directory(tree, tx):
            self.client.rm(tree, tx)

    def destroy(self, domid: int) -> None:
        """Remove a domain and what is left of it in the store; its devices have been closed.

        What it served for others stays theirs, without a backend, until it is detached."""
        devices = [device for device in self._backends if device[0] == domid]
        for device in devices:
            back = f"{self._backend_tree(*device)}/{device[1]}/{domid}/{device[2]}"
            self._unwatch(back)
            self._plugs.pop(back, None)

        def work(tx: int) -> None:
            for kind in KINDS:
                for ident in self._idents(domid, kind, tx):
                    self._remove(tx, domid, kind, ident)
            for path in (f"/vm/{self._uuids.pop(domid)}", f"/local/domain/{domid}", f"/libxl/{domid}"):
                self.client.rm(path, tx)

        self.client.transact(work, attempts=1)
        for device in devices:
            del self._backends[device]
        self.hypervisor.destroy_domain(domid)

    def _unwatch(self, back: str) -> None:
        watch = self._watches.pop(back, None)
        if watch is not None:
            self.client.unwatch(watch)

    def _watch(self, path: str, changed: Callable[[str], None]) -> str:
        """A watch whose callback ends nothing but itself: what lies in the node, and beside it, anybody may have written."""

        def event(at: str) -> None:
            try:
                changed(at)
            except (XsError, PeerFault, ValueError) as error:
                log.error("%s: %s", path, error)

        return self.client.watch(path, event)

    def _idents(self, domid: int, kind: str, tx: int = 0) -> list[str]:
        """The numbers of a domain's devices as libxl keeps them; a name that is none is not ours."""
        names = self.client.directory(f"/libxl/{domid}/device/{kind}", tx)
        return [name for name in names if name.isascii() and name.isdigit() and len(name) <= MAX_IDENT_DIGITS]

    def _put(self, path: str, value: str, perms: list[Perm], tx: int) -> None:
        self.client.write(path, value, tx)
        self.client.set_perms(path, perms, tx)


def _owned(owner: Domid, reader: Domid) -> list[Perm]:
    return [Perm(owner, Access.NONE), Perm(reader, Access.READ)]
