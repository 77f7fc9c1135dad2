"""network.py: the host's network for the guests' vifs: namespaces, interfaces, bridges; and taking all of it away again.

World asks for the two interfaces of a vif when its drivers are made: xn0, xn1, ... (FreeBSD's names) in the guest's network
namespace, vif<domid>.<handle> on a bridge of the host. What Xen's vif-bridge script does is online(). Opening a TAP is
quick and done at once; netlink is slow, and a worker thread's business, whose results reap() hands to the loop.

Invariants: whatever was made here is gone after close(), or, if we are killed, is known by its mark to the next run (see
netdev/netlink.py); an interface that somebody else made is never changed, but for a bridge's list of ports.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from ipaddress import IPv4Interface
from queue import SimpleQueue
from typing import NamedTuple

from netdev.announce import gratuitous_arp, unsolicited_na
from netdev.link import Plug, PortError
from netdev.netlink import Netlink, NetlinkError, NotOursError, claim_namespace, release_namespace
from netdev.tap import Tap, TapError
from xenfs.config import GuestConfig
from xenfs.vifspec import BACKEND_MAC

log = logging.getLogger("xenfs.network")

GSO_MAX_BYTES = 65535 - 18  # netif.h, XEN_NETIF_MAX_TX_SIZE, less an Ethernet header with a VLAN tag
CLOSE_S = 10.0

Job = Callable[[], object]
Done = Callable[[object], None]  # what the job returned or raised


class Bridge(NamedTuple):
    """--bridge NAME[=ADDRESS/PREFIX[,ADDRESS/PREFIX...]]"""

    name: str
    addresses: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Bridge:
        name, given, addresses = text.partition("=")
        return cls(name, tuple(address.strip() for address in addresses.split(",")) if given else ())


class Network:
    """`fd` becomes readable when a job is done; then call reap()."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.host = Netlink()
        self.pending = 0  # jobs that were not reaped yet
        self._jobs: SimpleQueue[tuple[Job, Done] | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[Done, object]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self.left = 0  # things of ours that close() could not remove
        self._namespaces: list[str] = []
        self._bridges: list[str] = []

    # --- the worker ----------------------------------------------------------------------------------------------------

    def submit(self, job: Job, done: Done) -> None:
        """Run `job` in the worker, then done(its result, or the exception) from reap()."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="netlink", daemon=True)
            self._thread.start()
        self.pending += 1
        self._jobs.put((job, done))

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, done = item
            try:
                result = job()
            except Exception as error:
                result = error
            self._done.put((done, result))
            os.eventfd_write(self.fd, 1)  # after it: as many are there as it says

    def reap(self) -> bool:
        """Hand out what the worker has done; True if there was anything."""
        if not self.pending or self._done.empty():
            return False
        try:
            count = os.eventfd_read(self.fd)
        except BlockingIOError:  # the worker is about to write
            return False
        for _ in range(count):
            done, result = self._done.get()
            self.pending -= 1
            done(result)
        return True

    def wait(self, timeout_s: float) -> None:
        """Until some job is done. For start-up and end, when there is no loop."""
        if self.pending:
            poll = select.poll()  # select() knows no descriptor beyond 1023
            poll.register(self.fd, select.POLLIN)
            poll.poll(timeout_s * 1000)

    # --- for the run -----------------------------------------------------------------------------------------------------

    def make_bridges(self, bridges: Sequence[Bridge]) -> None:
        """Those of --bridge, for as long as we live. NetlinkError."""
        for bridge in bridges:
            if bridge.name in self._bridges:
                raise NetlinkError(f"--bridge {bridge.name} is given twice")
            self.host.add_bridge(bridge.name, bridge.addresses)
            self._bridges.append(bridge.name)

    def make_namespace(self, name: str) -> None:
        """A guest's network namespace. NetlinkError."""
        claim_namespace(name)
        self._namespaces.append(name)

    def remove_namespace(self, name: str) -> None:
        """One of ours. What fails is tried once more at the end; if that fails too, close() says so."""
        if name in self._namespaces:
            try:
                release_namespace(name)
                self._namespaces.remove(name)
            except NetlinkError as error:
                log.info("%s; tried again at the end", error)

    def close(self) -> None:
        """Take away what is left. What fails is said and counted, and the rest is still done."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(CLOSE_S)
        for release, names in ((release_namespace, self._namespaces), (self.host.release_bridge, self._bridges)):
            while names:
                try:
                    release(names.pop())
                except NetlinkError as error:
                    log.error("%s", error)
                    self.left += not isinstance(error, NotOursError)
        if self._thread is None or not self._thread.is_alive():
            os.close(self.fd)

    # --- interfaces ----------------------------------------------------------------------------------------------------

    def open_front(self, config: GuestConfig, plug: Plug) -> Tap:
        """The guest's interface, still down. PortError."""
        namespace = config.netns_name
        return self._open(front_name(config, plug), plug, namespace, plug.mac)

    def open_back(self, plug: Plug) -> Tap:
        """The backend's, on no bridge yet. PortError."""
        assert plug.name is not None, "a backend's interface has a name"
        return self._open(plug.name, plug, None, bytes.fromhex(BACKEND_MAC.replace(":", "")))

    def _open(self, name: str, plug: Plug, namespace: str | None, mac: bytes) -> Tap:
        try:
            return Tap(name, plug.queues, namespace, mac)
        except TapError as error:
            raise PortError(str(error)) from error

    def set_up_front(self, tap: Tap, mtu: int, addresses: Sequence[str], done: Done) -> None:
        """What the guest's kernel would do at boot: MTU, up, addresses."""

        def job() -> None:
            if tap.closed:  # another may have its name now
                return
            netlink = Netlink(tap.namespace)
            netlink.set_link(tap.name, mtu=mtu, gso_max=GSO_MAX_BYTES, up=True)
            for address in addresses:
                netlink.add_address(tap.name, address)

        self.submit(job, done)

    def set_mtu(self, tap: Tap, mtu: int) -> None:
        """The bridge's script may have decided on another MTU than the configuration's."""

        def done(result: object) -> None:
            if isinstance(result, Exception) and not tap.closed:
                log.error("%s", result)

        def job() -> None:
            if not tap.closed:
                Netlink(tap.namespace).set_link(tap.name, mtu=mtu)

        self.submit(job, done)

    def online(self, tap: Tap, bridge: str, mtu: int | None, done: Done) -> None:
        """vif-bridge: the backend's interface gets the MTU, goes on the bridge, and up. done(the MTU, or an exception)."""

        def job() -> int:
            if tap.closed:  # another may have its name now
                raise PortError(f"interface {tap.name} is gone")
            if not self.host.is_bridge(bridge):
                with suppress(NetlinkError):
                    kind = self.host.link(bridge).kind or "a plain interface"
                    raise PortError(f"{bridge} is no bridge, but {kind}; name another")
                raise PortError(
                    f"there is no bridge {bridge}; `--bridge {bridge}` makes one for as long as xenfs runs, "
                    f"`ip link add {bridge} type bridge` one that stays"
                )
            size = self.host.link(bridge).mtu if mtu is None else mtu
            self.host.set_link(tap.name, mtu=size, gso_max=GSO_MAX_BYTES)
            self.host.set_link(tap.name, bridge=bridge, up=True)
            return size

        self.submit(job, done)

    def announcements(self, tap: Tap, done: Done) -> None:
        """done(frames): what tells the neighbours where the addresses of a guest's interface are."""

        def job() -> list[bytes]:
            frames = []
            for address in Netlink(tap.namespace).addresses(tap.name):
                if isinstance(address, IPv4Interface):
                    frames.append(gratuitous_arp(tap.mac, address.ip))
                else:
                    frames.append(unsolicited_na(tap.mac, address.ip))
            return frames

        self.submit(job, done)


def front_name(config: GuestConfig, plug: Plug) -> str:
    """xn<handle>; among those of other guests, in the host's own namespace, xn<domid>.<handle>."""
    return f"xn{plug.handle}" if config.netns_name else f"xn{plug.domid}.{plug.handle}"
