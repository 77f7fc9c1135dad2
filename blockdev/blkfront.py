"""blkfront.py: the frontend half of blkif.h, from the guest's side. One Blkfront per vbd.

Called by xenbus (the handshake), by its consumer (take, submit, give: in xenfs a disk node) and by events (responses).
The consumer fills a Command's pages or wants them filled, says submit(), and is told by `on_complete(command)`.

Requests are collected and published once per batch. A backend that offers nothing gets what blkif.h allows everyone: one
ring page, 11 segments a request, no flush. A backend that goes away and comes back finds everything that was under way
submitted again; nothing is lost and nothing is completed twice. A backend that lies (an id that is not out, another
operation, an index beyond what was asked) loses this device and harms no other (XSA-391).

Grants are persistent from this side always: the pages are this driver's own, so they are bounce pages by nature. With
`trusted` = 0 they are also wiped before each use (XSA-403).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from blockdev.command import LARGE_BYTES, LARGE_COMMANDS, SMALL_BYTES, SMALL_COMMANDS, Command, Pool, Where
from blockdev.frontqueue import FrontQueue
from xenmodel.domain import Domain
from xenmodel.grant_table import GrantTableFull
from xenmodel.public.io.blkif import (
    BLKIF_MAX_SEGMENTS_PER_REQUEST,
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
    BLKIF_RSP_EOPNOTSUPP,
    BLKIF_RSP_ERROR,
    BLKIF_RSP_OKAY,
    SECTOR_SIZE,
    VDISK_READONLY,
)
from xenmodel.public.io.xenbus import XenbusState
from xenmodel.types import PAGE_SIZE, PeerFault
from xenmodel.xenbus import Frontend
from xenmodel.xenstore.client import Client

MOST_SECTORS = 2**63 // SECTOR_SIZE - 1  # an off_t must be able to hold the size
MOST_SEGMENTS = LARGE_BYTES // 4096


@dataclass(frozen=True)
class Want:
    """What this frontend asks for if the backend offers it; tests and users turn it down."""

    max_indirect_segments: int = MOST_SEGMENTS
    ring_page_order: int = 0
    queues: int = 1
    persistent: bool = True
    both_ring_schemes: bool = True  # write num-ring-pages beside ring-page-order, as FreeBSD does
    protocol: str = "x86_64-abi"


class Blkfront(Frontend):
    """A virtual block device. After Connected: `sectors` (of 512 bytes), `sector_size`, `info` and the features."""

    def __init__(
        self, domain: Domain, client: Client, node: str, peer_node: str, peer_domid: int, want: Want = Want()
    ) -> None:
        super().__init__(domain, client, node, peer_node, peer_domid)
        self.want = want
        self.handle = client.read_int(f"{node}/virtual-device", 0)
        self.trusted = client.read_int(f"{node}/trusted", 1) != 0
        self.small = Pool(domain, SMALL_BYTES, SMALL_COMMANDS)
        self.large = Pool(domain, LARGE_BYTES, LARGE_COMMANDS)
        self.queues: list[FrontQueue] = []
        self.waiting: deque[Command] = deque()  # submitted, and not on a ring yet
        self.sectors = self.info = 0
        self.sector_size = self.physical_sector_size = SECTOR_SIZE
        self.discard_granularity = 0  # bytes; 0: the backend does not offer discard
        self.discard_alignment = 0  # where the first granule begins
        self.flush_op = 0  # BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_WRITE_BARRIER, or 0: nothing to flush with
        self.most_segments = BLKIF_MAX_SEGMENTS_PER_REQUEST
        self.persistent = False
        self.quarantined = 0  # commands whose pages a backend never gave back
        self.gone = False
        self.on_complete: Callable[[Command], None] = lambda _command: None
        self.on_change: Callable[[], None] = lambda: None  # connected, resized, or gone
        self._old_queues: list[FrontQueue] = []  # of a connection that ended; the backend may still map them
        self._published: tuple[str, ...] = ()  # what we wrote in the store
        self._turn = 0
        self._deferred = False
        self._draining = False  # closing, once the backend has answered what it has

    # --- for the consumer --------------------------------------------------------------------------------------------

    @property
    def readonly(self) -> bool:
        return bool(self.info & VDISK_READONLY)

    @property
    def busy(self) -> bool:
        """Are requests on a ring?"""
        return any(queue.ring.free < queue.ring.size for queue in self.queues)

    def take(self, length: int) -> Command | None:
        """A command with room for `length` bytes (at most LARGE_BYTES), or None: come back after a completion."""
        if length <= SMALL_BYTES and self.small.free:
            return self.small.take()
        if self.large.free:
            return self.large.take()
        return None

    def give(self, command: Command) -> None:
        """The consumer has done with a completed command."""
        (self.small if command.capacity == SMALL_BYTES else self.large).give(command)

    def submit(self, command: Command, op: int, sector: int, length: int) -> None:
        """READ, WRITE, FLUSH_DISKCACHE or DISCARD of `length` bytes at `sector`. `on_complete` follows, never at once."""
        command.op, command.sector, command.length = op, sector, length
        command.status = BLKIF_RSP_OKAY
        if not self.trusted:
            _wipe(command)
        self.waiting.append(command)
        if not self._deferred:
            self._deferred = True
            self.domain.hypervisor.defer(self._publish)

    def flush(self, command: Command) -> None:
        """Everything acknowledged so far is on stable storage when this command completes."""
        self.submit(command, BLKIF_OP_FLUSH_DISKCACHE, 0, 0)

    def cancel(self, command: Command) -> bool:
        """Give up a command that is on no ring yet; its consumer has it back. False: too late."""
        if command not in self.waiting:
            return False
        self.waiting.remove(command)
        return True

    @property
    def connected(self) -> bool:
        return self.state is XenbusState.Connected and not self.broken

    def _publish(self) -> None:
        """Put what waits on the rings, and tell the backend once."""
        self._deferred = False
        if self.gone or self.broken:
            self._fail_waiting()
            return
        if self.state is not XenbusState.Connected or self._draining:
            return
        waiting = self.waiting
        while waiting:
            command = waiting[0]
            if command.op == BLKIF_OP_FLUSH_DISKCACHE and not self.flush_op:
                self._completed(waiting.popleft())  # nothing is cached below us: blkif.h's default
                continue
            queue = self.queues[self._turn]
            if not queue.put(command):
                break
            waiting.popleft()
            self._turn = (self._turn + 1) % len(self.queues)
        for queue in self.queues:
            queue.push()

    def completed(self, command: Command) -> None:
        """A queue has the last response of a command."""
        command.where = Where.READY
        if command.status == BLKIF_RSP_EOPNOTSUPP:
            self._feature_lost(command)
        self._completed(command)

    def _completed(self, command: Command) -> None:
        self.on_complete(command)
        if self._draining and not self.busy:
            self.domain.hypervisor.defer(self.drained)
        if self.waiting and not self._deferred:
            self._deferred = True
            self.domain.hypervisor.defer(self._publish)

    def _feature_lost(self, command: Command) -> None:
        """EOPNOTSUPP: the backend cannot do it after all. A flush it cannot do is one nobody needs (as Linux reads it)."""
        if command.op in (BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_WRITE_BARRIER):
            self.flush_op = 0
            command.status = BLKIF_RSP_OKAY
        elif command.op == BLKIF_OP_DISCARD:
            self.discard_granularity = 0

    def _fail_waiting(self) -> None:
        while self.waiting:
            command = self.waiting.popleft()
            command.status = BLKIF_RSP_ERROR
            self.on_complete(command)

    # --- handshake -------------------------------------------------------------------------------------------------

    def negotiate(self) -> None:
        number = self.client.read_int
        order = number(f"{self.peer_node}/max-ring-page-order", 0)
        pages = number(f"{self.peer_node}/max-ring-pages", 1)
        order = min(self.want.ring_page_order, max(order, pages.bit_length() - 1))
        count = max(1, min(self.want.queues, number(f"{self.peer_node}/multi-queue-max-queues", 1)))
        self._take_back()
        self._grant_pages()
        for _ in range(count):
            self.queues.append(FrontQueue(self, 1 << order, self.want.protocol))
        self.client.transact(lambda tx: self._publish_rings(tx, order))

    def _grant_pages(self) -> None:
        """All the pages data will travel through. When references are short, there are fewer commands, but never none."""
        for pool in (self.small, self.large):
            kept: list[Command] = []
            short: GrantTableFull | None = None
            for command in sorted(pool.commands, key=lambda c: c.where is Where.FREE):  # those in use come first
                try:
                    command.grant(self.domain, self.peer_domid)
                except GrantTableFull as full:
                    if command.where is Where.FREE and kept:
                        command.where = Where.GONE
                        command.release(self.domain)
                        continue
                    short = full
                kept.append(command)
            pool.commands = kept
            pool.free = [c for c in kept if c.where is Where.FREE]
            if short is not None:
                raise PeerFault(f"{short}: raise max_grant_frames")

    def _publish_rings(self, tx: int, order: int) -> None:
        node = self.node
        keys: dict[str, int | str] = {}
        if order:
            keys[f"{node}/ring-page-order"] = order
            if self.want.both_ring_schemes:
                keys[f"{node}/num-ring-pages"] = 1 << order
        many = len(self.queues) > 1
        if many:
            keys[f"{node}/multi-queue-num-queues"] = len(self.queues)
        for i, queue in enumerate(self.queues):
            where = f"{node}/queue-{i}" if many else node
            for k, gref in enumerate(queue.grefs):
                keys[f"{where}/ring-ref{k if order else ''}"] = gref
            keys[f"{where}/event-channel"] = queue.port
        keys[f"{node}/protocol"] = self.want.protocol
        keys[f"{node}/feature-persistent"] = int(self.want.persistent)
        for path in self._published:  # another backend may offer less: it must not find what the last one was told
            if path not in keys:
                self.client.rm(path, tx)
        for path, value in keys.items():
            self.client.write(path, value, tx)
        self._published = tuple(keys)

    def connect(self) -> None:
        number, peer = self.client.read_int, self.peer_node
        self._read_geometry()
        self.info = number(f"{peer}/info", 0)
        most = min(number(f"{peer}/feature-max-indirect-segments", 0), self.want.max_indirect_segments, MOST_SEGMENTS)
        self.most_segments = max(most, BLKIF_MAX_SEGMENTS_PER_REQUEST)
        self.persistent = self.want.persistent and number(f"{peer}/feature-persistent", 0) == 1
        self.flush_op = 0
        if number(f"{peer}/feature-barrier", 0):
            self.flush_op = BLKIF_OP_WRITE_BARRIER
        if number(f"{peer}/feature-flush-cache", 0):
            self.flush_op = BLKIF_OP_FLUSH_DISKCACHE
        self.discard_granularity = 0
        if number(f"{peer}/feature-discard", 0):
            self._read_discard()
        self.domain.hypervisor.defer(self._went_live)

    def _went_live(self) -> None:
        self.on_change()
        self._publish()

    def _read_geometry(self) -> None:
        """The sizes, checked: a backend that lies about them must not lead us outside our buffers (XSA: `sectors`)."""
        number, peer = self.client.read_int, self.peer_node
        sectors = number(f"{peer}/sectors", 0, maximum=MOST_SECTORS)
        size = number(f"{peer}/sector-size", SECTOR_SIZE)
        physical = number(f"{peer}/physical-sector-size", size)
        if size < SECTOR_SIZE or size & (size - 1) or size > 4096:
            raise PeerFault(f"sector-size is {size}; a power of two from 512 to 4096 is possible")
        if sectors * SECTOR_SIZE % size:
            raise PeerFault(f"sectors is {sectors} (of 512 bytes), which is no whole number of blocks of {size} bytes")
        if physical < size or physical % size:
            raise PeerFault(f"physical-sector-size is {physical}, not a multiple of sector-size {size}")
        self.sectors, self.sector_size, self.physical_sector_size = sectors, size, physical

    def _read_discard(self) -> None:
        number, peer = self.client.read_int, self.peer_node
        grain = number(f"{peer}/discard-granularity", self.sector_size) or self.sector_size
        start = number(f"{peer}/discard-alignment", 0)
        if grain % self.sector_size or start % self.sector_size:
            raise PeerFault(f"discard-granularity {grain}, discard-alignment {start}: no multiples of {self.sector_size}")
        self.discard_granularity, self.discard_alignment = grain, start

    def reconfigured(self) -> None:
        before = self.sectors
        self._read_geometry()
        if self.sectors != before:
            self.on_change()

    # --- closing ---------------------------------------------------------------------------------------------------

    def disconnect(self) -> bool:
        """Stop using the rings; what was on them waits again, before what waited already.

        A backend that is only Closing still answers: let it, unless it broke the rules. It lets go of our pages only after
        we said Closed, so they are taken back later: before it is talked to again, or at the end.
        """
        if not self.broken and self.busy and self.peer_state() is XenbusState.Closing:
            self._draining = True
            return False
        self._draining = False
        inflight: list[Command] = []
        for queue in self.queues:
            inflight += queue.stop()
        self._old_queues += self.queues
        self.queues.clear()
        self._turn = 0
        for command in inflight:
            command.where, command.status, command.parts = Where.READY, BLKIF_RSP_OKAY, 0
        self.waiting.extendleft(reversed(inflight))
        self.undo.close()
        if self.gone or self.broken:
            self._fail_waiting()
        return True

    def _take_back(self) -> None:
        """End the old backend's access to rings and pages. What it still maps stays quarantined (XSA-396)."""
        for queue in self._old_queues:
            queue.release()
        self._old_queues.clear()
        for pool in (self.small, self.large):
            for command in pool.commands:
                if not command.revoke(self.domain):
                    self.quarantined += 1
                    if self.gone:
                        command.release(self.domain, reuse=False)
                    else:
                        command.quarantine(self.domain)

    def removed(self) -> None:
        if not self.gone:
            self.gone = True
            self._fail_waiting()
            self.on_change()

    def stop(self) -> None:
        self.broken = self.broken or "the device was removed"
        super().stop()
        self.removed()
        self._take_back()
        self.small.close()
        self.large.close()


def _wipe(command: Command) -> None:
    """Zero what the backend could see of earlier requests: all pages of a read, the end of a write's last page."""
    start = command.length if command.op == BLKIF_OP_WRITE else 0
    end = (command.length + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)
    if command.op in (BLKIF_OP_READ, BLKIF_OP_WRITE):
        command.view[start:end] = bytes(end - start)
