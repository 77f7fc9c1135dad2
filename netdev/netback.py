"""netback.py: the backend half of netif.h. One Netback per vif, one pair of rings per queue.

Called by xenbus (the handshake), by its host (poll: the interface on the bridge has frames for the guest) and by events of
the frontend. `open_port` makes the interface; the toolstack's script puts it on a bridge and says so in `hotplug-status`,
and before that this device is not Connected. Keys are offered in the order of Linux's netback.

The frontend is hostile: what no working driver does disables this vif and no other (XSA-39), and no time or memory is
spent without bound on its behalf. Time is an argument (`clock`), asked only where something is limited or stuck; whoever
runs the loop calls tick() when `deadline` is over.
Left out: rx-flip, gso_prefix, XDP headroom (offered for frontends that expect the key), static grants.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from netdev.backrx import BackRx
from netdev.backtx import BackTx
from netdev.credit import Credit, parse_rate
from netdev.ctrl import CtrlBack, HashState
from netdev.link import BLOCKED, MOST_QUEUES, FramePort, Plug, PortError, Takes, parse_mac
from netdev.multicast import MulticastFilter
from xenmodel.domain import Domain
from xenmodel.grant_table import GrantTable
from xenmodel.memory import Frame, vmap
from xenmodel.public.grant_table import GNTST_TEXTS
from xenmodel.public.io.netif import CTRL_SLOT_SIZE, RX_SLOT_SIZE, TX_SLOT_SIZE, XEN_NETIF_EXTRA_TYPE_MCAST_ADD
from xenmodel.public.io.xenbus import XenbusState
from xenmodel.ring import BackRing
from xenmodel.types import OutOfResources, PeerFault, Port
from xenmodel.xenbus import Backend
from xenmodel.xenstore.client import Client
from xenmodel.xenstore.errors import XsError


@dataclass(frozen=True)
class Offer:
    """What this backend offers; tests turn features off (the key is 0 then) to see how a frontend copes."""

    sg: bool = True
    gso4: bool = True
    gso6: bool = True
    csum6: bool = True
    split: bool = True
    max_queues: int | None = None  # None: as many as the interface has lanes
    ctrl: bool = True
    multicast: bool = True
    dynamic_multicast: bool = True


class BackQueue:
    """A pair of rings and their port, or ports."""

    def __init__(self, back: Netback, tx: BackTx, rx: BackRx) -> None:
        self.back = back
        self.tx, self.rx = tx, rx

    def tx_event(self, port: Port) -> None:
        try:
            self.tx.on_event()
        except PeerFault as fault:
            self.back.fail(fault)

    def rx_event(self, port: Port) -> None:
        try:
            self.rx.on_event()
        except PeerFault as fault:
            self.back.fail(fault)

    def event(self, port: Port) -> None:
        self.rx_event(port)
        self.tx_event(port)

    def stop(self) -> None:
        self.tx.stopped = self.rx.stopped = True


class Netback(Backend):
    """`open_port` makes the interface on the host, or raises PortError. `clock` is in seconds and never goes back."""

    def __init__(
        self,
        domain: Domain,
        client: Client,
        node: str,
        peer_node: str,
        peer_domid: int,
        open_port: Callable[[Plug], FramePort],
        clock: Callable[[], float],
        offer: Offer = Offer(),
    ) -> None:
        super().__init__(domain, client, node, peer_node, peer_domid)
        self.clock = clock
        self.offered = offer
        self.handle = client.read_int(f"{node}/handle", 0, maximum=0xFFFF)
        self.mac = parse_mac(client.read(f"{node}/mac"), f"{node}/mac")
        self.queues: list[BackQueue] = []
        self.memory = memoryview(b"")  # the guest's, while connected
        self.credit: Credit | None = None
        self.multicast = MulticastFilter()
        self.hash: HashState | None = None
        self.takes: Takes | None = None
        self.on_room: Callable[[], None] = lambda: None  # poll() answered BLOCKED, and may be tried again
        self.on_deadline: Callable[[], None] = lambda: None  # `deadline` has changed
        self._ctrl: CtrlBack | None = None
        self._hotplug_watch: str | None = None
        name = client.read(f"{node}/vifname") or f"vif{peer_domid}.{self.handle}"
        # our toolstack's, for libxl cannot say this
        lanes = client.read_int(f"{node}/xenfs-queues", 1, minimum=1, maximum=MOST_QUEUES)
        try:
            self.port = open_port(Plug(node, peer_domid, self.handle, self.mac, lanes, name))
        except PortError as error:
            raise PeerFault(str(error)) from error
        self.name = name

    # --- for the host ------------------------------------------------------------------------------------------------

    def poll(self, lane: int) -> int:
        """Frames wait in that lane of the interface: to the guest. IDLE, MORE, or BLOCKED until on_room()."""
        if self.state is not XenbusState.Connected or not self.queues:
            return BLOCKED
        try:
            return self.queues[lane % len(self.queues)].rx.poll(self.port.lanes[lane])
        except PeerFault as fault:
            self.fail(fault)
            return BLOCKED

    def interface_lost(self) -> None:
        """Somebody has deleted the interface."""
        self.fail(PeerFault(f"interface {self.name} was deleted"))

    @property
    def deadline(self) -> float | None:
        """When tick() is due; None while nothing is limited or stuck."""
        times = [time for queue in self.queues for time in (queue.tx.resume_at, queue.rx.deadline) if time is not None]
        return min(times, default=None)

    def tick(self) -> None:
        """The deadline is over: go on where a limit held us up."""
        now = self.clock()
        for queue in self.queues:
            queue.tx.resume(now)
            queue.rx.expire(now)

    # --- for the queues ----------------------------------------------------------------------------------------------

    @property
    def hashing(self) -> int:
        """1 while the guest has asked for hashes: one more extra slot for each frame."""
        return 1 if self.hash is not None and self.hash.flags and self.hash.algorithm else 0

    def steer(self, head: memoryview) -> tuple[int | None, tuple[int, int] | None]:
        return (None, None) if self.hash is None else self.hash.choose(head)

    def peer_grants(self) -> GrantTable:
        table = self.domain.maptrack.lookup(self.peer_domid)
        if table is None:
            raise PeerFault(f"domain {self.peer_domid} is gone")
        return table

    def multicast_change(self, changes: list[tuple[int, bytes]]) -> bool:
        """What a dummy transmit request asks for. False: the list is full."""
        good = True
        for kind, address in changes:
            if kind == XEN_NETIF_EXTRA_TYPE_MCAST_ADD:
                good = self.multicast.add(address) and good
            else:
                self.multicast.delete(address)
        return good

    def stall_changed(self) -> None:
        """A queue has been stuck for too long, or goes on: the carrier follows, on our side and in the store."""
        up = not any(queue.rx.stalled for queue in self.queues)
        self.port.carrier(up)
        with suppress(XsError):
            self.client.write(f"{self.node}/carrier", int(up))

    # --- handshake -------------------------------------------------------------------------------------------------

    def offer(self) -> None:
        offered, client, node = self.offered, self.client, self.node

        def work(tx: int) -> None:
            for key, on in (
                ("feature-sg", offered.sg),
                ("feature-gso-tcpv4", offered.sg and offered.gso4),
                ("feature-gso-tcpv6", offered.sg and offered.gso6),
                ("feature-ipv6-csum-offload", offered.csum6),
                ("feature-rx-copy", True),
                ("feature-xdp-headroom", True),
                ("feature-rx-flip", False),
                ("feature-multicast-control", offered.multicast),
                ("feature-dynamic-multicast-control", offered.multicast and offered.dynamic_multicast),
            ):
                client.write(f"{node}/{key}", int(on), tx)

        client.transact(work)
        client.rm(f"{node}/carrier")
        client.write(f"{node}/feature-split-event-channels", int(offered.split))
        client.write(f"{node}/multi-queue-max-queues", self._most_queues())
        client.write(f"{node}/feature-ctrl-ring", int(offered.ctrl))

    def _most_queues(self) -> int:
        return self.offered.max_queues or len(self.port.lanes)

    def ready(self) -> bool:
        """Has the script put the interface on its bridge? Its answer is watched until it comes."""
        if self.client.read(f"{self.node}/hotplug-status") == "connected":
            if self._hotplug_watch is not None:
                self.client.unwatch(self._hotplug_watch)
                self._hotplug_watch = None
            return True
        if self._hotplug_watch is None:
            self._hotplug_watch = self.client.watch(f"{self.node}/hotplug-status", lambda _path: self.peer_changed())
        return False

    def connect(self) -> None:
        number, peer, offered = self.client.read_int, self.peer_node, self.offered

        def takes(key: str, default: int = 0) -> bool:
            return number(f"{peer}/{key}", default) != 0

        if not takes("request-rx-copy"):
            raise PeerFault(f"{peer}/request-rx-copy is not 1: flipping pages is not offered")
        count = number(f"{peer}/multi-queue-num-queues", 1)
        if not 1 <= count <= self._most_queues():
            raise PeerFault(f"{peer}/multi-queue-num-queues is {count}; 1..{self._most_queues()} are offered")
        table = self.peer_grants()
        self.memory = table.memory.view
        csum4 = not takes("feature-no-csum-offload")
        csum6 = takes("feature-ipv6-csum-offload")
        sg = takes("feature-sg")
        self.takes = Takes(
            sg=sg,
            gso4=sg and csum4 and takes("feature-gso-tcpv4"),
            gso6=sg and csum6 and takes("feature-gso-tcpv6"),
            csum4=csum4,
            csum6=csum6,
            notify=takes("feature-rx-notify"),
        )
        self.multicast.clear()
        self._read_rate()
        self._read_multicast()
        self._follow(f"{self.node}/rate", self._read_rate)
        if offered.multicast and offered.dynamic_multicast:
            self._follow(f"{peer}/request-multicast-control", self._read_multicast)
        self.hash = HashState(count)
        for i in range(count):
            self._connect_queue(peer if count == 1 else f"{peer}/queue-{i}", i, self.takes)
        if offered.ctrl and self.client.exists(f"{peer}/ctrl-ring-ref"):
            self._connect_ctrl()
        self.port.offload(csum4 or csum6, self.takes.gso4, self.takes.gso6)
        self.port.carrier(True)
        self.domain.hypervisor.defer(self.on_room)

    def _follow(self, path: str, changed: Callable[[], None]) -> None:
        """For as long as we are connected; a value that makes no sense costs this device."""

        def event(_path: str) -> None:
            try:
                changed()
            except (PeerFault, XsError) as fault:
                self.fail(fault)

        self.undo.callback(self.client.unwatch, self.client.watch(path, event))

    def _read_rate(self) -> None:
        """xl's rate: what is wrong with it is no reason to stop (Linux: no limit)."""
        text = self.client.read(f"{self.node}/rate")
        rate = None
        if text:
            with suppress(ValueError):
                rate = parse_rate(text)
        self.credit = None if rate is None else Credit(*rate, self.clock())
        for queue in self.queues:
            queue.tx.limit_changed()

    def _read_multicast(self) -> None:
        self.multicast.enabled = self.offered.multicast and bool(
            self.client.read_int(f"{self.peer_node}/request-multicast-control", 0)
        )

    def _connect_queue(self, where: str, number: int, takes: Takes) -> None:
        lanes = self.port.lanes
        tx_ring = self._map_ring(f"{where}/tx-ring-ref", TX_SLOT_SIZE)
        rx_ring = self._map_ring(f"{where}/rx-ring-ref", RX_SLOT_SIZE)
        tx = BackTx(self, tx_ring, lanes[number % len(lanes)])
        queue = BackQueue(self, tx, BackRx(self, rx_ring, takes))
        self.queues.append(queue)
        self.undo.callback(queue.stop)
        if self.client.exists(f"{where}/event-channel-tx"):
            if not self.offered.split:
                raise PeerFault(f"{where}/event-channel-tx is there, but split event channels are not offered")
            tx.port = self._bind(f"{where}/event-channel-tx")
            queue.rx.port = self._bind(f"{where}/event-channel-rx")
            self.domain.events.set_handler(tx.port, queue.tx_event)
            self.domain.events.set_handler(queue.rx.port, queue.rx_event)
        else:
            tx.port = queue.rx.port = self._bind(f"{where}/event-channel")
            self.domain.events.set_handler(tx.port, queue.event)

    def _connect_ctrl(self) -> None:
        ring = self._map_ring(f"{self.peer_node}/ctrl-ring-ref", CTRL_SLOT_SIZE)
        port = self._bind(f"{self.peer_node}/event-channel-ctrl")
        assert self.hash is not None, "the control ring comes after the queues"
        self._ctrl = CtrlBack(self.domain, self.peer_domid, ring, port, self.hash, self.fail)
        self.domain.events.set_handler(port, self._ctrl.on_event)

    def _map_ring(self, key: str, slot_size: int) -> BackRing:
        ref = self.client.read_int(key, -1)
        if ref < 0:
            raise PeerFault(f"{key} is missing")
        status, mapping = self.domain.maptrack.map(self.peer_domid, ref)
        if mapping is None:
            raise PeerFault(f"{key}: grant {ref} of domain {self.peer_domid}: {GNTST_TEXTS[status]}")
        self.undo.callback(self.domain.maptrack.unmap, mapping.handle)
        return BackRing(vmap([Frame(mapping.frame.memory, mapping.frame.pfn)]), slot_size)

    def _bind(self, key: str) -> Port:
        remote = self.client.read_int(key, 0)
        port = self.domain.events.bind_interdomain(self.peer_domid, remote)
        if port < 0:
            raise PeerFault(f"{key}: port {remote} of domain {self.peer_domid} is not waiting for us ({port})")
        self.undo.callback(self.domain.events.close, port)
        return port

    # --- closing ---------------------------------------------------------------------------------------------------

    def fail(self, fault: PeerFault | OutOfResources | XsError) -> None:
        if self.domain.maptrack.lookup(self.peer_domid) is None:  # it died: nobody would take an error node away again
            self.broken = self.broken or str(fault)
            self.finish_closing()
        else:
            super().fail(fault)

    def disconnect(self) -> bool:
        if self._ctrl is not None:
            self._ctrl.stopped = True
            self._ctrl = None
        if self.queues:
            self.port.carrier(False)
        self.undo.close()
        self.queues.clear()
        self.hash = None
        self.memory = memoryview(b"")
        return True

    def stop(self) -> None:
        if self._hotplug_watch is not None:
            self.client.unwatch(self._hotplug_watch)
            self._hotplug_watch = None
        super().stop()
        self.port.close()

    def removed(self) -> None:
        self.client.rm(f"{self.node}/hotplug-status")
        self.stop()
