"""A split device that does nothing but hold what real ones hold, and the toolstack's part for it.

Used by the tests of xenmodel.xenbus. Front grants a page, waits on a port and watches a key; Back maps the page and binds
the port. Both record their hooks in the bus's trace as "F.negotiate", "B.connect", ... and can be told to be busy.
"""

from __future__ import annotations

from collections.abc import Callable

from xenmodel.domain import Domain
from xenmodel.hypervisor import Hypervisor
from xenmodel.public.grant_table import GNTST_okay
from xenmodel.public.io.xenbus import XenbusState
from xenmodel.types import Domid, Gref, PeerFault, Pfn
from xenmodel.xenbus import Backend, Frontend, XenbusDevice
from xenmodel.xenstore.client import Client
from xenmodel.xenstore.perms import Access, Perm
from xenmodel.xenstore.quota import Quota

S = XenbusState


class Front(Frontend):
    """A frontend that publishes one page and one port."""

    def __init__(self, bus: Bus, ident: int) -> None:
        super().__init__(bus.guest, bus.guest_client, bus.front_node(ident), bus.back_node(ident), bus.backend.domid)
        self.bus, self.busy = bus, False

    def negotiate(self) -> None:
        self.bus.trace.append("F.negotiate")
        memory, grants, events = self.domain.memory, self.domain.grants, self.domain.events
        pfn = memory.allocate()
        gref = grants.grant_access(self.peer_domid, pfn)
        self.undo.callback(self.bus.give_back, gref, pfn)
        port = events.alloc_unbound(self.peer_domid, lambda _: None)
        self.undo.callback(events.close, port)
        self.undo.callback(self.client.unwatch, self.client.watch(f"{self.peer_node}/feature", lambda _: None))

        def publish(tx: int) -> None:
            self.client.write(f"{self.node}/ring-ref", gref, tx)
            self.client.write(f"{self.node}/event-channel", port, tx)

        self.client.transact(publish)

    def connect(self) -> None:
        self.bus.trace.append("F.connect")

    def reconfigured(self) -> None:
        self.bus.trace.append("F.reconfigured")

    def disconnect(self) -> bool:
        self.bus.trace.append("F.disconnect")
        if not self.busy:
            self.undo.close()
        return not self.busy

    def removed(self) -> None:
        self.bus.trace.append("F.removed")


class Back(Backend):
    """A backend that maps one page and binds one port."""

    def __init__(self, bus: Bus, ident: int) -> None:
        super().__init__(bus.backend, bus.back_client, bus.back_node(ident), bus.front_node(ident), bus.guest.domid)
        self.bus, self.busy, self.there = bus, False, True

    def offer(self) -> None:
        self.bus.trace.append("B.offer")
        self.client.write(f"{self.node}/feature", 1)

    def ready(self) -> bool:
        return self.there

    def connect(self) -> None:
        self.bus.trace.append("B.connect")
        maptrack, events = self.domain.maptrack, self.domain.events
        status, mapping = maptrack.map(self.peer_domid, self.client.read_int(f"{self.peer_node}/ring-ref", 0))
        if status != GNTST_okay or mapping is None:
            raise PeerFault(f"ring-ref cannot be mapped: {status}")
        self.undo.callback(maptrack.unmap, mapping.handle)
        port = events.bind_interdomain(self.peer_domid, self.client.read_int(f"{self.peer_node}/event-channel", 0))
        if port < 0:
            raise PeerFault(f"event-channel cannot be bound: {port}")
        self.undo.callback(events.close, port)

    def disconnect(self) -> bool:
        self.bus.trace.append("B.disconnect")
        if not self.busy:
            self.undo.close()
        return not self.busy

    def removed(self) -> None:
        self.bus.trace.append("B.removed")


class Bus:
    """Domain 0 (or `backend_domid`) with backends, domain 7 with frontends, and a toolstack."""

    def __init__(
        self, order: Callable[[int], int] | None = None, backend_domid: int = 0, quota: Quota | None = None
    ) -> None:
        self.trace: list[str] = []
        self.deferred: list[tuple[Gref, Pfn]] = []
        self.hypervisor = Hypervisor(order, quota)
        self.toolstack = Client(self.hypervisor.store.connect(Domid(0)))
        dom0 = self.create(0)
        self.backend = dom0 if backend_domid == 0 else self.create(backend_domid)
        self.guest = self.create(7)
        self.guest_client = Client(self.hypervisor.store.connect(self.guest.domid))
        self.back_client = Client(self.hypervisor.store.connect(self.backend.domid))

    def create(self, domid: int) -> Domain:
        domain = self.hypervisor.create_domain(64, f"domain {domid}", domid)
        home = f"/local/domain/{domid}"
        self.put(home, "", Domid(0), Domid(domid))
        self.put(f"{home}/error", "", Domid(domid))
        return domain

    def front_node(self, ident: int) -> str:
        return f"/local/domain/{self.guest.domid}/device/test/{ident}"

    def back_node(self, ident: int) -> str:
        return f"/local/domain/{self.backend.domid}/backend/test/{self.guest.domid}/{ident}"

    def put(self, path: str, value: str, owner: Domid, reader: Domid | None = None) -> None:
        self.toolstack.write(path, value)
        readers = [] if reader is None else [Perm(reader, Access.READ)]
        self.toolstack.set_perms(path, [Perm(owner, Access.NONE), *readers])

    def attach(self, ident: int = 0) -> None:
        """The toolstack's directories, both at Initialising."""
        guest, backend = self.guest.domid, self.backend.domid
        self.put(self.front_node(ident), "", guest, backend)
        self.put(f"{self.front_node(ident)}/state", "1", guest, backend)
        self.put(self.back_node(ident), "", backend, guest)
        self.put(f"{self.back_node(ident)}/state", "1", backend, guest)
        self.put(f"{self.back_node(ident)}/online", "1", backend, guest)

    def ask_to_close(self, ident: int = 0, *, online: bool = True) -> None:
        """What libxl writes to have a device closed: nothing if the backend is Closed already."""
        back = self.back_node(ident)
        if self.toolstack.read(f"{back}/state") != str(int(S.Closed)):
            self.toolstack.write(f"{back}/online", int(online))
            self.toolstack.write(f"{back}/state", int(S.Closing))

    def pair(self, ident: int = 0) -> tuple[Front, Back]:
        """A device with both drivers started; nothing delivered yet."""
        self.attach(ident)
        front, back = Front(self, ident), Back(self, ident)
        front.start()
        back.start()
        return front, back

    def connected(self, ident: int = 0) -> tuple[Front, Back]:
        front, back = self.pair(ident)
        self.settle()
        assert self.states(front, back) == (S.Connected, S.Connected)
        self.trace.clear()
        return front, back

    def settle(self) -> None:
        self.hypervisor.settle()

    def say(self, device: XenbusDevice, state: object) -> None:
        """What the other end of `device` says; delivered."""
        self.toolstack.write(f"{device.peer_node}/state", str(state))
        self.settle()

    def states(self, *devices: XenbusDevice) -> tuple[XenbusState, ...]:
        """The states of devices, which must be what their nodes say."""
        for device in devices:
            node = self.toolstack.read(f"{device.node}/state")
            assert node in (None, str(int(device.state))), f"{device.node} says {node}, not {device.state!r}"
        return tuple(device.state for device in devices)

    def give_back(self, gref: Gref, pfn: Pfn) -> None:
        """A page and its grant; later if the backend, which is told to close after the frontend, still maps it."""
        if self.guest.grants.end_access(gref):
            self.guest.memory.release(pfn)
        else:
            self.deferred.append((gref, pfn))

    def held(self) -> dict[str, int]:
        """What both domains hold: all 0 when no device is connected. Watches are those beside the devices' own."""
        deferred, self.deferred = self.deferred, []
        for gref, pfn in deferred:
            self.give_back(gref, pfn)
        mappings = len(self.backend.maptrack.mappings)
        ports = len(self.guest.events.channels) + len(self.backend.events.channels)
        grants = sum(1 for _ in self.guest.grants.entries())
        watches = sum(path.endswith("/feature") for path, _ in self.guest_client.connection.watches)
        return {"mappings": mappings, "ports": ports, "grants": grants, "watches": watches}
