"""netfront.py: the frontend half of netif.h, from the guest's side. One Netfront per vif.

Called by xenbus (the handshake), by its host (poll: the guest's interface has frames) and by events. The interface is a
FramePort: a TAP in the guest's network namespace, or an end of a cable in memory. Linux's netfront goes to Connected
straight from Initialising, and so does this one; frames flow once the backend is Connected too, and the interface has a
carrier for so long as it is and does not say otherwise (`carrier`).

A backend that goes away and comes back finds the same interface behind new rings; only the carrier was gone. A backend
that lies (an id that is not out, a fragment that leaves its page, an index beyond what was asked) loses this device and
harms no other (XSA-376, XSA-391). Pages it will not let go of are never used again (XSA-396), and with `trusted` = 0 it
sees nothing in them but what is meant for it (XSA-403).
Left out: xdp-headroom (written as 0 like Linux without XDP), smart-poll, static grants, gso_prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from netdev.ctrl import CtrlFront
from netdev.frontrx import FrontRx
from netdev.fronttx import FrontTx
from netdev.link import (
    BLOCKED,
    DEFAULT_MTU,
    LEAST_MTU,
    MOST_MTU,
    MOST_QUEUES,
    FramePort,
    Plug,
    PortError,
    Takes,
    parse_mac,
)
from xenmodel.domain import Domain
from xenmodel.public.io.netif import (
    EXTRA,
    TX_SLOT_SIZE,
    XEN_NETIF_EXTRA_TYPE_MCAST_ADD,
    XEN_NETIF_EXTRA_TYPE_MCAST_DEL,
)
from xenmodel.public.io.xenbus import XenbusState
from xenmodel.types import OutOfResources, PeerFault, Port
from xenmodel.xenbus import Frontend
from xenmodel.xenstore.client import Client
from xenmodel.xenstore.errors import XsError


class Hash(NamedTuple):
    """What to ask the backend for through the control ring: types of XEN_NETIF_CTRL_HASH_TYPE_*, key, queue per entry."""

    types: int
    key: bytes
    mapping: tuple[int, ...] = ()


@dataclass(frozen=True)
class Want:
    """What this frontend asks for if the backend offers it; tests turn it down."""

    sg: bool = True
    gso4: bool = True
    gso6: bool = True
    csum: bool = True
    csum6: bool = True
    split: bool = True
    queues: int = 1
    notify: bool = True  # feature-rx-notify
    hash: Hash | None = None


class FrontQueue:
    """A pair of rings and their port, or ports."""

    def __init__(self, front: Netfront, number: int, tx: FrontTx, rx: FrontRx, split: bool) -> None:
        self.front = front
        self.number = number
        self.tx, self.rx = tx, rx
        self.split = split
        self.ports: list[Port] = []

    def bind(self) -> None:
        """PeerFault if no event channel is free."""
        events, peer = self.front.domain.events, self.front.peer_domid
        for handler in (self._tx_event, self._rx_event) if self.split else (self._event,):
            port = events.alloc_unbound(peer, handler)
            if port < 0:
                raise PeerFault(f"no event channel is free ({port})")
            self.ports.append(port)
        self.tx.port, self.rx.port = self.ports[0], self.ports[-1]

    def _tx_event(self, port: Port) -> None:
        try:
            self.tx.on_event()
        except PeerFault as fault:
            self.front.fail(fault)

    def _rx_event(self, port: Port) -> None:
        try:
            self.rx.on_event()
        except PeerFault as fault:
            self.front.fail(fault)

    def _event(self, port: Port) -> None:
        self._tx_event(port)
        if self.ports:  # still open?
            self._rx_event(port)

    def stop(self) -> None:
        """Listen no more."""
        for port in self.ports:
            self.front.domain.events.close(port)
        self.ports.clear()

    def release(self) -> bool:
        """False: the backend holds on to some of our pages."""
        tx = self.tx.release()
        return self.rx.release() and tx


class Netfront(Frontend):
    """A network interface. `open_port` makes the guest's side of it, or raises PortError."""

    negotiated = XenbusState.Connected

    def __init__(
        self,
        domain: Domain,
        client: Client,
        node: str,
        peer_node: str,
        peer_domid: int,
        open_port: Callable[[Plug], FramePort],
        want: Want = Want(),
    ) -> None:
        super().__init__(domain, client, node, peer_node, peer_domid)
        self.want = want
        self.handle = client.read_int(f"{node}/handle", 0, maximum=0xFFFF)
        self.trusted = client.read_int(f"{node}/trusted", 1) != 0
        self.mac = parse_mac(client.read(f"{node}/mac"), f"{node}/mac")
        self.mtu = self._read_mtu()
        self.queues: list[FrontQueue] = []
        self.ctrl: CtrlFront | None = None
        self.features: dict[str, int] = {}  # what was agreed on, for inspection
        self.hash_status: int | None = None  # what the backend said to want.hash
        self.quarantined = 0  # queues whose pages a backend never gave back
        self.gone = False
        self.link_up = False
        self.on_change: Callable[[], None] = lambda: None  # connected, carrier, or gone
        self.on_room: Callable[[], None] = lambda: None  # poll() answered BLOCKED, and may be tried again
        self._old: list[FrontQueue] = []
        self._carrier_watch: str | None = None
        self._published: tuple[str, ...] = ()
        self._reconnecting = False
        try:
            self.port = open_port(Plug(node, domain.domid, self.handle, self.mac, want.queues))
        except PortError as error:
            raise PeerFault(str(error)) from error

    # --- for the host ------------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        return self.state is XenbusState.Connected and self.broken is None

    def poll(self, lane: int) -> int:
        """Frames wait in that lane of the interface: send them. IDLE, MORE, or BLOCKED until on_room()."""
        if not self.queues or not self.link_up:
            return BLOCKED
        try:
            return self.queues[lane % len(self.queues)].tx.poll(self.port.lanes[lane])
        except PeerFault as fault:
            self.fail(fault)
            return BLOCKED

    def interface_lost(self) -> None:
        """Somebody has deleted the guest's interface."""
        self.fail(PeerFault("its interface was deleted"))

    def announce(self, frames: list[bytes]) -> None:
        """Tell the neighbours where we are (gratuitous ARP, unsolicited NA): our interface is behind another port now."""
        if self.queues:
            for frame in frames:
                self.queues[0].tx.transmit(frame)

    def multicast(self, address: bytes, join: bool) -> bool:
        """Ask the backend for frames to a multicast address, or for no more. False: not connected, or no room now."""
        if not self.queues:
            return False
        kind = XEN_NETIF_EXTRA_TYPE_MCAST_ADD if join else XEN_NETIF_EXTRA_TYPE_MCAST_DEL
        return self.queues[0].tx.transmit(b"", EXTRA.pack(kind, 0, address).ljust(TX_SLOT_SIZE, b"\0"))

    def filter_multicast(self, on: bool) -> None:
        """request-multicast-control: only what multicast() asked for. A backend may look at it only when we connect."""
        self.client.write(f"{self.node}/request-multicast-control", int(on))

    def reconnect(self, want: Want | None = None) -> None:
        """Close and connect anew, perhaps with other features; the interface stays (FreeBSD: xn_reset). Also opens what was
        closed, or given up because of its backend."""
        if self.gone:
            return
        if want is not None:
            self.want = want
        self._reconnecting = True
        self.close()
        self.peer_changed()

    # --- handshake -------------------------------------------------------------------------------------------------

    def negotiate(self) -> None:
        self._take_back()
        number, peer, want = self.client.read_int, self.peer_node, self.want
        if not number(f"{peer}/feature-rx-copy", 0):
            raise PeerFault(f"{peer}/feature-rx-copy is not 1: a backend that flips pages is not supported")
        offers = {key: bool(number(f"{peer}/feature-{key}", 0)) for key in (
            "sg", "gso-tcpv4", "gso-tcpv6", "ipv6-csum-offload", "split-event-channels", "ctrl-ring", "xdp-headroom",
        )}  # fmt: skip
        most = number(f"{peer}/multi-queue-max-queues", 1)
        count = max(1, min(want.queues, most, MOST_QUEUES))
        sg = offers["sg"] and want.sg
        csum6 = offers["ipv6-csum-offload"] and want.csum
        gso4 = offers["gso-tcpv4"] and want.gso4 and sg and want.csum
        gso6 = offers["gso-tcpv6"] and want.gso6 and sg and csum6
        split = offers["split-event-channels"] and want.split
        takes = Takes(sg, gso4, gso6, True, csum6)
        self.features = {"queues": count, "sg": sg, "gso-tcpv4": gso4, "gso-tcpv6": gso6, "ipv6-csum-offload": csum6,
                         "split-event-channels": split}  # fmt: skip
        try:
            for i in range(count):
                self._make_queue(i, takes, split)
            if want.hash is not None and offers["ctrl-ring"]:
                self.ctrl = CtrlFront(self.domain, self.peer_domid, self.fail)
        except (OutOfResources, PeerFault):
            self.disconnect()
            self._take_back()
            raise
        if offers["xdp-headroom"]:
            self.client.write(f"{self.node}/xdp-headroom", 0)
        has_queues = self.client.exists(f"{peer}/multi-queue-max-queues")
        self.client.transact(lambda tx: self._publish(tx, has_queues))
        self.port.offload(want.csum, gso4, gso6)
        if self._carrier_watch is None:
            self._carrier_watch = self.client.watch(f"{peer}/carrier", lambda _path: self._carrier_changed())

    def _make_queue(self, number: int, takes: Takes, split: bool) -> None:
        lanes = self.port.lanes
        tx = FrontTx(self.domain, self.peer_domid, takes, not self.trusted)
        try:
            rx = FrontRx(self.domain, self.peer_domid, lanes[number % len(lanes)], not self.trusted)
        except OutOfResources:
            tx.release()
            raise
        tx.on_room = lambda: self.on_room()
        queue = FrontQueue(self, number, tx, rx, split)
        self.queues.append(queue)
        queue.bind()

    def _publish(self, tx: int, has_queues: bool) -> None:
        """What Linux writes, in its order; a feature that is turned down is absent, which every backend takes for 0."""
        node, want = self.node, self.want
        keys: dict[str, int] = {}
        many = len(self.queues) > 1
        if has_queues:
            keys["multi-queue-num-queues"] = len(self.queues)
        for queue in self.queues:
            where = f"queue-{queue.number}/" if many else ""
            keys[f"{where}tx-ring-ref"] = queue.tx.ring_page.grefs[0]
            keys[f"{where}rx-ring-ref"] = queue.rx.ring_page.grefs[0]
            if queue.split:
                keys[f"{where}event-channel-tx"], keys[f"{where}event-channel-rx"] = queue.ports
            else:
                keys[f"{where}event-channel"] = queue.ports[0]
        if self.ctrl is not None:
            keys["ctrl-ring-ref"] = self.ctrl.gref
            keys["event-channel-ctrl"] = self.ctrl.port
        keys["request-rx-copy"] = 1
        keys |= {f"feature-{key}": 1 for key, on in (
            ("rx-notify", want.notify), ("sg", want.sg), ("gso-tcpv4", want.gso4 and want.sg),
            ("gso-tcpv6", want.gso6 and want.sg and want.csum6), ("ipv6-csum-offload", want.csum6),
            ("no-csum-offload", not want.csum),
        ) if on}  # fmt: skip
        for key in self._published:  # another backend may offer less: it must not find what the last one was told
            if key not in keys:
                self.client.rm(f"{node}/{key}", tx)
        for key, value in keys.items():
            self.client.write(f"{node}/{key}", value, tx)
        self._published = tuple(keys)

    def reconfigured(self) -> None:
        """The backend is Connected: frames may flow. Its script may have given us the bridge's MTU by now."""
        self.mtu = self._read_mtu()
        if self.want.hash is not None and self.ctrl is not None and self.hash_status is None:
            types, key, mapping = self.want.hash
            self.ctrl.set_hash(types, key, mapping, self._hash_set)
        self._carrier_changed()

    def _read_mtu(self) -> int:
        return self.client.read_int(f"{self.node}/mtu", DEFAULT_MTU, minimum=LEAST_MTU, maximum=MOST_MTU)

    def _hash_set(self, status: int, _data: int) -> None:
        self.hash_status = status

    def _carrier_changed(self) -> None:
        """The link is up while both ends are Connected, unless the backend says that it is not (netif.h, "Link state")."""
        up = self.connected and bool(self.queues) and self._said_carrier()
        if up == self.link_up:
            return
        self.link_up = up
        self.port.carrier(up)
        self.on_room()
        self.on_change()

    def _said_carrier(self) -> bool:
        """A watch's callback comes here too, and what the backend wrote may make no sense."""
        try:
            connected = self.peer_state() is XenbusState.Connected
            return connected and self.client.read_int(f"{self.peer_node}/carrier", 1) != 0
        except (PeerFault, XsError):
            return False

    # --- closing ---------------------------------------------------------------------------------------------------

    def peer_changed(self) -> None:
        """Reopen when both ends are Closed: a backend that is still Connected has our old rings."""
        super().peer_changed()
        if self._reconnecting and self.state is XenbusState.Closed and self._has_let_go() and not self._going_away():
            self._reconnecting = False
            self.broken = None
            self.switch_state(XenbusState.Initialising)  # the backend goes back to InitWait
            super().peer_changed()  # it may be there already

    def _has_let_go(self) -> bool:
        with suppress(PeerFault):
            return self.peer_state() in (XenbusState.Closed, XenbusState.InitWait)
        return False

    def disconnect(self) -> bool:
        """Stop using the rings. The backend lets go of them only after we said Closed, so they are taken back later."""
        for queue in self.queues:
            queue.stop()
        self._old += self.queues
        self.queues = []
        if self.ctrl is not None:
            self.ctrl.stop()
        self.hash_status = None
        if self.link_up:
            self.link_up = False
            self.port.carrier(False)
            self.on_change()
        self.undo.close()
        return True

    def _take_back(self) -> None:
        """End the old backend's access. What it still maps stays quarantined (XSA-396)."""
        self.quarantined += sum(not queue.release() for queue in self._old)
        self._old.clear()
        if self.ctrl is not None:
            self.ctrl.release()
            self.ctrl = None

    def removed(self) -> None:
        if not self.gone:
            self.gone = True
            self.on_change()

    def stop(self) -> None:
        self.broken = self.broken or "the device was removed"
        if self._carrier_watch is not None:
            with suppress(XsError):
                self.client.unwatch(self._carrier_watch)
            self._carrier_watch = None
        super().stop()
        self.removed()
        self._take_back()
        self.port.close()
