"""probe.py: what a kernel's xenbus does: find a domain's devices in the store, and make and drop their drivers.

One Probe watches one tree: `device` (this domain's frontends, device/KIND/ID) or `backend` (its backends,
backend/KIND/DOMID/ID). A directory that a toolstack made becomes a driver; one that vanishes loses it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from xenmodel.domain import Domain
from xenmodel.public.io.xenbus import XenbusState
from xenmodel.public.xen import DOMID_FIRST_RESERVED
from xenmodel.types import OutOfResources, PeerFault
from xenmodel.xenbus import XenbusDevice, report_error
from xenmodel.xenstore.client import Client
from xenmodel.xenstore.errors import XsError

Make = Callable[[Domain, Client, str, str, int], XenbusDevice]
MOST_DEVICES = 1024  # of one tree; a store that lists more is not believed


class Probe:
    """`makers` has a driver per kind; others are left alone, as by a kernel without that module."""

    def __init__(self, domain: Domain, client: Client, tree: str, makers: Mapping[str, Make]) -> None:
        self.domain = domain
        self.client = client
        self.tree = f"/local/domain/{domain.domid}/{tree}"
        self.peer_key = "backend" if tree == "device" else "frontend"
        self.depth = 2 if tree == "device" else 3
        self.makers = makers
        self.devices: dict[str, XenbusDevice] = {}
        self.failures: dict[str, str] = {}  # why a device has no driver; the store may have refused to hold the reason
        self.added: Callable[[XenbusDevice], None] = lambda _device: None
        self.dropped: Callable[[XenbusDevice], None] = lambda _device: None
        self._watch: str | None = None

    def start(self) -> None:
        self._watch = self.client.watch(self.tree, self._changed)

    def _changed(self, path: str) -> None:
        """Something below the tree changed; only the directory it is in matters."""
        names = path.removeprefix(self.tree).strip("/").split("/")
        if len(names) >= self.depth:
            self._look(f"{self.tree}/{'/'.join(names[: self.depth])}", names[0])
            return
        for node in list(self.devices):
            if self._read(node) is None:
                self._drop(node)
        self._scan(self.tree, 0)

    def _read(self, path: str) -> str | None:
        """The value; None also for what a domain may not look at: whether it is there nobody tells it."""
        try:
            return self.client.read(path)
        except XsError:
            return None

    def _scan(self, path: str, depth: int) -> None:
        try:
            names = self.client.directory(path)[:MOST_DEVICES]
        except XsError:
            return
        for name in names:
            if depth + 1 < self.depth:
                self._scan(f"{path}/{name}", depth + 1)
            else:
                node = f"{path}/{name}"
                self._look(node, node.removeprefix(self.tree).split("/")[1])

    def _look(self, node: str, kind: str) -> None:
        make = self.makers.get(kind)
        if make is None:
            return
        if self._read(node) is None:
            self._drop(node)
            self.failures.pop(node, None)
            return
        device = self.devices.get(node)
        if device is not None and device.stopped and self._read(f"{node}/state") == str(int(XenbusState.Initialising)):
            self._drop(node)  # it has ended, and before we were told the toolstack made another one in its place
        if node not in self.devices and len(self.devices) < MOST_DEVICES:
            peer = self._read(f"{node}/{self.peer_key}")
            if peer is None or self._read(f"{node}/state") is None:
                return  # not whole yet: it will change again
            self._make(make, node, peer)

    def _make(self, make: Make, node: str, peer: str) -> None:
        """A driver for `node`. Whatever is wrong with its nodes, or short in its domain, costs this device only."""
        try:
            peer_domid = self.client.read_int(f"{node}/{self.peer_key}-id", 0, maximum=DOMID_FIRST_RESERVED - 1)
            device = self.devices[node] = make(self.domain, self.client, node, peer, peer_domid)
            self.added(device)
            device.start()
            self.failures.pop(node, None)
        except (PeerFault, OutOfResources, XsError) as fault:
            self._drop(node)
            self.failures[node] = str(fault)
            report_error(self.client, self.domain.domid, node, fault)

    def _drop(self, node: str) -> None:
        device = self.devices.pop(node, None)
        if device is not None:
            device.stop()
            self.dropped(device)

    def stop(self) -> None:
        """All drivers go, without a word in the store, which may have closed our connection. Idempotent."""
        if self._watch is not None:
            self.client.unwatch(self._watch)
            self._watch = None
        for node in list(self.devices):
            self._drop(node)
