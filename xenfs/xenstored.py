"""xenstored.py: the host's side of the store: its socket, the device files of each domain, its clock, what inspect/ says.

host.World makes one; up.py runs its tasks. The store itself, and the rings, are in xenmodel/xenstore.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable

import trio

from xenfs.fuse.tree import Directory, Node, refuse
from xenfs.nodes.text import Text, table
from xenfs.nodes.xenbus import XsDevice
from xenfs.nodes.xs_dev import XsDevFile
from xenfs.nodes.xsd import XenbusBackend, XsdPort
from xenfs.storesocket import StoreSocket
from xenmodel.hypervisor import Hypervisor
from xenmodel.types import Domid
from xenmodel.xenstore.control import quota_rows, statistics
from xenmodel.xenstore.peer import Peer
from xenmodel.xenstore.perms import CONTROL_DOMAIN

OPENS_MOST = 256  # of all device files of a domain together; domain 0 has no such limit


class StoreHost:
    """`kick` delivers what a batch of requests caused. `on_release(domid)` is called from within a request."""

    def __init__(self, hypervisor: Hypervisor, kick: Callable[[], bool]) -> None:
        self.hypervisor = hypervisor
        self.daemon = hypervisor.xenstored
        self.socket = StoreSocket(self.daemon, kick, lambda: hypervisor.idle)
        self._kick = kick
        self._devices: dict[Domid, tuple[XsDevice, ...]] = {}
        self.on_release: Callable[[Domid], None] = lambda domid: None  # its connections have ended
        self.daemon.on_release = self._released

    def device_files(self, domid: Domid, dev: Directory) -> Directory:
        """Fill dev/xen of a domain; the result is its proc."""
        def make_peer(flush: Callable[[], None]) -> Peer:
            if domid not in self.hypervisor.domains:
                raise refuse(errno.ENOENT)  # as Linux says without a store
            if domid != CONTROL_DOMAIN and len(xenbus.files) + len(freebsd.files) >= OPENS_MOST:
                raise refuse(errno.ENFILE)
            return self.daemon.peer(domid, flush)

        xenbus, freebsd = XsDevice(make_peer), XsDevice(make_peer, XsDevFile)
        self._devices[domid] = (xenbus, freebsd)
        nodes: dict[str, Node] = {"xenbus": xenbus, "xenstore": freebsd}
        proc: dict[str, Node] = {"xenbus": xenbus}
        if domid == 0:
            nodes["xenbus_backend"] = XenbusBackend(self._port)
            proc["xsd_port"] = XsdPort(self._port)
        dev.add("xen", Directory(nodes))
        return Directory({"xen": Directory(proc)})

    def _released(self, domid: Domid) -> None:
        """Whoever has a device file of that domain open, and waits, learns that its connection has ended."""
        for device in self._devices.get(domid, ()):
            device.stop()
        if domid not in self.hypervisor.domains:
            self._devices.pop(domid, None)
        self.on_release(domid)

    def inspect(self, domid: Domid) -> Text:
        return Text(lambda: self._limits(domid) + (f"\n{statistics(self.daemon)}" if domid == 0 else ""))

    def _limits(self, domid: Domid) -> str:
        """What the domain uses, of what it may, and what it was refused."""
        rows = quota_rows(self.daemon, self.daemon.domains.record(domid))
        return table(("quota", "used", "limit", "refused", "last"), rows)

    def _port(self) -> int:
        """Domain 0's end of its channel to the store."""
        return self.daemon.own_port

    async def run_timers(self) -> None:
        """The task of the store's clock: credits that come back, events nobody took."""
        timers = self.daemon.store.timers
        sleep = trio.CancelScope()

        def wake_in_time() -> None:
            due = timers.next
            sleep.deadline = math.inf if due is None else trio.current_time() + max(0.0, due - timers.clock())

        timers.on_earlier = wake_in_time
        try:
            while True:
                with sleep:
                    wake_in_time()
                    await trio.sleep_forever()
                sleep = trio.CancelScope()
                timers.run()
                while self._kick():
                    await trio.lowlevel.checkpoint()
        finally:
            timers.on_earlier = lambda: None  # what comes during the shutdown waits for nobody

    def close(self) -> None:
        self.socket.close()
