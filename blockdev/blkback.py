"""blkback.py: the backend half of blkif.h. One Blkback per vbd, one Queue per ring.

Called by xenbus (the handshake) and by events of the frontend (a queue's ring); calls the grant table, and the Storage it
was given. The frontend is hostile: a slot is copied before it is looked at, a request that is wrong in any way is answered
with BLKIF_RSP_ERROR, and indices that make no sense close this device and no other.

Life of a request: copied from the ring, checked, translated to views of guest memory (grants.py), handed to the storage,
answered. A storage that is not done at once answers PENDING; the request then waits in a pooled record.
Left out: BLKIF_OP_RESERVED_1 (packet commands); requests are not merged, the page cache below does that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from blockdev.backqueue import Queue
from blockdev.grants import DEFAULT_CAP, GrantCache
from blockdev.storage import Backing, Storage, StorageError
from xenmodel.domain import Domain
from xenmodel.grant_table import Mapping
from xenmodel.memory import Frame, vmap
from xenmodel.public.grant_table import GNTST_TEXTS, GNTST_okay
from xenmodel.public.io.blkif import ABIS, VDISK_CDROM, VDISK_READONLY, VDISK_REMOVABLE, Abi
from xenmodel.public.io.xenbus import XenbusState
from xenmodel.ring import BackRing
from xenmodel.types import PeerFault
from xenmodel.xenbus import Backend
from xenmodel.xenstore.client import Client
from xenmodel.xenstore.errors import XsError


@dataclass(frozen=True)
class Offer:
    """What this backend offers; tests and users turn features off to see how a frontend copes. None: key absent."""

    max_indirect_segments: int | None = 256
    max_ring_page_order: int | None = 4
    max_queues: int | None = 4
    persistent: bool = True
    flush: bool = True
    barrier: bool = True
    discard: bool = True
    persistent_cap: int = DEFAULT_CAP


class Blkback(Backend):
    """`open_storage` turns the toolstack's nodes into a Storage, or raises StorageError."""

    def __init__(
        self,
        domain: Domain,
        client: Client,
        node: str,
        peer_node: str,
        peer_domid: int,
        open_storage: Callable[[Backing], Storage],
        offer: Offer = Offer(),
    ) -> None:
        super().__init__(domain, client, node, peer_node, peer_domid)
        self.open_storage = open_storage
        self.offered = offer
        self.storage: Storage | None = None
        self.queues: list[Queue] = []
        self.abi: Abi = ABIS["x86_64-abi"]
        self._path_watch: str | None = None
        self.discard_enabled = False
        self.on_removed: Callable[[], None] | None = None

    # --- handshake -------------------------------------------------------------------------------------------------

    def offer(self) -> None:
        offered, client, node = self.offered, self.client, self.node
        self._offer_number("feature-max-indirect-segments", offered.max_indirect_segments)
        self._offer_number("multi-queue-max-queues", offered.max_queues)
        if self._path_watch is None:
            self._path_watch = client.watch(f"{node}/physical-device-path", lambda _path: self._device_there())
        order = offered.max_ring_page_order
        self._offer_number("max-ring-page-order", order)
        self._offer_number("max-ring-pages", None if order is None else 1 << order)

    def _offer_number(self, key: str, value: int | None) -> None:
        """What is not offered must not be there, also if an earlier driver offered it."""
        if value is not None:
            self.client.write(f"{self.node}/{key}", value)
        else:
            self.client.rm(f"{self.node}/{key}")

    def _device_there(self) -> None:
        if self.state is XenbusState.InitWait:
            self.peer_changed()

    def ready(self) -> bool:
        path = self.client.read(f"{self.node}/physical-device-path")
        if path is None:
            return False
        if self.storage is None:
            number = self.client.read_int
            # the xenfs- keys are our toolstack's: libxl has no way to say these
            backing = Backing(
                path=path,
                readonly=self.client.read(f"{self.node}/mode") != "w",
                sector_size=number(f"{self.node}/xenfs-sector-size", 0) or None,
                physical_sector_size=number(f"{self.node}/xenfs-physical-sector-size", 0) or None,
                direct_io=number(f"{self.node}/xenfs-direct-io", 0) != 0,
            )
            try:
                self.storage = self.open_storage(backing)
            except StorageError as error:
                raise PeerFault(str(error)) from error  # the toolstack named an image that cannot be used
        return True

    def connect(self) -> None:
        storage = self.storage
        assert storage is not None, "connect() before ready()"
        number = self.client.read_int
        protocol = self.client.read(f"{self.peer_node}/protocol") or "x86_64-abi"
        if protocol not in ABIS:
            raise PeerFault(f"protocol is {protocol!r}, not one of {', '.join(ABIS)}")
        self.abi = ABIS[protocol]
        persistent = number(f"{self.peer_node}/feature-persistent", 0) == 1 and self.offered.persistent
        count = number(f"{self.peer_node}/multi-queue-num-queues", 1)
        if not 1 <= count <= (self.offered.max_queues or 1):
            raise PeerFault(f"multi-queue-num-queues is {count}; 1..{self.offered.max_queues or 1} were offered")
        pages = self._ring_pages()
        grants = GrantCache(self.domain.maptrack, self.peer_domid, persistent, self.offered.persistent_cap)
        self.undo.callback(grants.close)
        for i in range(count):
            where = self.peer_node if count == 1 else f"{self.peer_node}/queue-{i}"
            self._connect_queue(where, pages, grants, storage)
        self._publish(storage)  # what the frontend asked before we were there is seen soon: a new port is pending

    def _ring_pages(self) -> int:
        """Both schemes: ring-page-order, and the older num-ring-pages. One page has no key at all."""
        most = 1 << (self.offered.max_ring_page_order or 0)
        order = self.client.read(f"{self.peer_node}/ring-page-order")
        if order is not None:
            pages = 1 << self.client.read_int(f"{self.peer_node}/ring-page-order", 0, maximum=16)
        else:
            pages = self.client.read_int(f"{self.peer_node}/num-ring-pages", 1)
        if not 1 <= pages <= most or pages & (pages - 1):
            raise PeerFault(f"a ring of {pages} pages was asked for; powers of two up to {most} are offered")
        return pages

    def _connect_queue(self, where: str, pages: int, grants: GrantCache, storage: Storage) -> None:
        number = self.client.read_int
        single = pages == 1 and self.client.read(f"{where}/ring-ref") is not None
        frames: list[Frame] = []
        for i in range(pages):
            key = f"{where}/ring-ref" if single else f"{where}/ring-ref{i}"
            ref = number(key, -1)
            if ref < 0:
                raise PeerFault(f"{key} is missing")
            frames.append(self._map_ring_page(key, ref).frame)
        port_key = f"{where}/event-channel"
        events = self.domain.events
        remote_port = number(port_key, 0)
        port = events.bind_interdomain(self.peer_domid, remote_port)
        if port < 0:
            raise PeerFault(f"{port_key}: port {remote_port} of domain {self.peer_domid} is not waiting for us ({port})")
        self.undo.callback(events.close, port)
        ring = BackRing(vmap(frames), self.abi.slot_size)
        queue = Queue(self, ring, port, grants, storage)
        self.queues.append(queue)
        events.set_handler(port, queue.on_event)

    def _map_ring_page(self, key: str, ref: int) -> Mapping:
        status, mapping = self.domain.maptrack.map(self.peer_domid, ref)
        if mapping is None:
            assert status != GNTST_okay, "a mapping that succeeded is an object"
            raise PeerFault(f"{key}: grant {ref} of domain {self.peer_domid}: {GNTST_TEXTS[status]}")
        self.undo.callback(self.domain.maptrack.unmap, mapping.handle)
        return mapping

    def _publish(self, storage: Storage) -> None:
        """The device's properties, in the order in which Linux's blkback writes them, in one transaction."""
        offered, client, node = self.offered, self.client, self.node
        discard = offered.discard and storage.discard_granularity > 0 and not storage.readonly
        discard = discard and client.read(f"{node}/discard-enable") != "0"

        def work(tx: int) -> None:
            client.write(f"{node}/feature-flush-cache", int(offered.flush), tx)
            if discard:
                client.write(f"{node}/discard-granularity", storage.discard_granularity, tx)
                client.write(f"{node}/discard-alignment", 0, tx)
                client.write(f"{node}/discard-secure", 0, tx)
                client.write(f"{node}/feature-discard", 1, tx)
            else:
                client.rm(f"{node}/feature-discard", tx)
            client.write(f"{node}/feature-barrier", int(offered.barrier), tx)
            client.write(f"{node}/feature-persistent", int(offered.persistent), tx)
            client.write(f"{node}/sectors", storage.sectors, tx)
            client.write(f"{node}/info", self._info(storage), tx)
            client.write(f"{node}/sector-size", storage.sector_size, tx)
            client.write(f"{node}/physical-sector-size", storage.physical_sector_size, tx)

        client.transact(work)
        self.discard_enabled = discard

    def _info(self, storage: Storage) -> int:
        cdrom = self.client.read(f"{self.node}/device-type") == "cdrom"
        removable = self.client.read(f"{self.node}/removable") == "1" and not cdrom
        return (
            (VDISK_CDROM if cdrom else 0)
            | (VDISK_REMOVABLE if removable else 0)
            | (VDISK_READONLY if storage.readonly else 0)
        )

    def resized(self) -> None:
        """The storage's size changed: rewrite `sectors` and say Connected again, as Linux's xen_vbd_resize() does.

        Not if the toolstack has said Closing meanwhile.
        """
        if self.state is not XenbusState.Connected or self.storage is None:
            return
        sectors, connected = self.storage.sectors, str(int(XenbusState.Connected))

        def work(tx: int) -> None:
            if self.client.read(f"{self.node}/state", tx) == connected:
                self.client.write(f"{self.node}/sectors", sectors, tx)
                self.client.write(f"{self.node}/state", connected, tx)

        try:
            self.client.transact(work)
        except XsError as error:
            self.fail(error)

    # --- closing ---------------------------------------------------------------------------------------------------

    def disconnect(self) -> bool:
        for queue in self.queues:
            queue.stopped = True
        if any(queue.running for queue in self.queues):
            return False
        self.queues.clear()
        self.undo.close()
        if self.storage is not None:
            self.storage.close()
            self.storage = None
        return True

    def stop(self) -> None:
        if self._path_watch is not None:
            self.client.unwatch(self._path_watch)
            self._path_watch = None
        super().stop()

    def removed(self) -> None:
        self.stop()
        if self.on_removed is not None:
            on_removed, self.on_removed = self.on_removed, None
            on_removed()
