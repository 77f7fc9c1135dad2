"""scripted.py: a frontend and a backend that do exactly what a test tells them, also what no driver would do.

Goal: the real driver on the other side meets every slot, index and node that a hostile peer could make.
Method: raw bytes in a granted ring page and plain writes to the store; nothing here checks anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tests.blockdev.world import Disk, World
from xenmodel.grant_table import Mapping
from xenmodel.memory import Frame, vmap
from xenmodel.public.io.blkif import ABIS, BLKIF_OP_INDIRECT, SEGMENT
from xenmodel.public.io.ring import REQ_PROD, RSP_PROD, SRING_HEADER_SIZE
from xenmodel.ring import BackRing
from xenmodel.types import PAGE_SIZE, Gref, Pfn

Segments = Sequence[tuple[int, int, int]]


class Response(NamedTuple):
    ident: int
    op: int
    status: int


class ScriptedFront:
    """A guest's ring of one page, written by hand. `respond()` reads what the backend answered since the last time."""

    def __init__(self, world: World, disk: Disk, protocol: str = "x86_64-abi") -> None:
        self.world, self.disk, self.domain = world, disk, world.guest
        self.abi = ABIS[protocol]
        self.protocol = protocol
        self.pfn = self.domain.memory.allocate()
        self.page = self.domain.memory.run(self.pfn)
        self.page[:] = bytes(PAGE_SIZE)
        self.words = self.page[:SRING_HEADER_SIZE].cast("I")
        self.words[1] = self.words[3] = 1
        self.gref = self.grant(self.pfn)
        self.port = self.domain.events.alloc_unbound(world.dom0.domid)
        self.size = 32
        self.seen = 0

    def grant(self, pfn: Pfn, readonly: bool = False) -> Gref:
        return self.domain.grants.grant_access(self.world.dom0.domid, pfn, readonly=readonly)

    def data_page(self, data: bytes = b"", readonly: bool = False) -> tuple[Gref, memoryview]:
        """A fresh granted page."""
        pfn = self.domain.memory.allocate()
        view = self.domain.memory.run(pfn)
        view[: len(data)] = data
        return self.grant(pfn, readonly), view

    # --- the store -------------------------------------------------------------------------------------------------

    def set(self, key: str, value: str | int, settle: bool = True) -> None:
        self.world.guest_client.write(f"{self.disk.front_node}/{key}", value)
        if settle:
            self.world.settle()

    def connect(self, *, persistent: bool = False, state: int = 3) -> ScriptedFront:
        """Initialised with one ring page; state 4 skips Initialised, as netfront does."""
        for key, value in (
            ("ring-ref", self.gref),
            ("event-channel", self.port),
            ("protocol", self.protocol),
            ("feature-persistent", int(persistent)),
            ("state", state),
        ):
            self.set(key, value)
        return self

    # --- slots -----------------------------------------------------------------------------------------------------

    def put(self, slot: bytes, index: int | None = None) -> None:
        """Raw bytes into the next slot (or a given one) without publishing."""
        at = SRING_HEADER_SIZE + ((self.words[REQ_PROD] if index is None else index) % self.size) * self.abi.slot_size
        self.page[at : at + len(slot)] = slot

    def push(self, count: int = 1, settle: bool = True) -> None:
        self.words[REQ_PROD] = (self.words[REQ_PROD] + count) & 0xFFFFFFFF
        self.notify(settle)

    def notify(self, settle: bool = True) -> None:
        self.domain.events.send(self.port)
        if settle:
            self.world.settle()

    def slot(self, op: int, segments: Segments, ident: int = 1, sector: int = 0, count: int | None = None) -> bytes:
        """A direct request; `count` is what it claims to have."""
        n = len(segments) if count is None else count
        slot = bytearray(self.abi.slot_size)
        self.abi.request.pack_into(slot, 0, op, n, 0, ident, sector)
        data = b"".join(SEGMENT.pack(*segment) for segment in segments)
        slot[self.abi.segments_at : self.abi.segments_at + len(data)] = data
        return bytes(slot[: self.abi.slot_size])

    def indirect_slot(
        self, op: int, grefs: Sequence[int], count: int, ident: int = 1, sector: int = 0
    ) -> bytes:
        slot = bytearray(self.abi.slot_size)
        eight = (*grefs, *[0] * (8 - len(grefs)))
        self.abi.indirect.pack_into(slot, 0, BLKIF_OP_INDIRECT, op, count, ident, sector, 0, *eight)
        return bytes(slot)

    def discard_slot(self, sector: int, count: int, ident: int = 1, flag: int = 0) -> bytes:
        slot = bytearray(self.abi.slot_size)
        self.abi.discard.pack_into(slot, 0, 5, flag, 0, ident, sector, count)
        return bytes(slot)

    def ask(self, slot: bytes) -> Response:
        """One request and its answer."""
        self.put(slot)
        self.push()
        answers = self.answers()
        assert len(answers) == 1, f"{len(answers)} answers to one request"
        return answers[0]

    def answers(self) -> list[Response]:
        found = []
        while self.seen != self.words[RSP_PROD]:
            found.append(Response(*self.abi.response.unpack_from(self.raw_answer(self.seen))))
            self.seen = (self.seen + 1) & 0xFFFFFFFF
        return found

    def raw_answer(self, index: int) -> bytes:
        at = SRING_HEADER_SIZE + (index % self.size) * self.abi.slot_size
        return bytes(self.page[at : at + self.abi.response.size])


class ScriptedBack:
    """A backend's side by hand: nodes, ring and answers. Attach the disk first; then connect()."""

    def __init__(self, world: World, disk: Disk) -> None:
        self.world, self.disk, self.domain = world, disk, world.dom0
        self.ring: BackRing
        self.port = 0
        self.abi = ABIS["x86_64-abi"]
        self.mappings: list[Mapping] = []

    def set(self, key: str, value: str | int, settle: bool = True) -> None:
        self.world.client.write(f"{self.disk.back_node}/{key}", value)
        if settle:
            self.world.settle()

    def connect(self, **nodes: str | int) -> ScriptedBack:
        """InitWait, map the ring, then Connected with these nodes (`_` stands for `-`)."""
        self.set("state", 2)
        self.map_ring()
        for key, value in ({"sectors": 4096, "info": 0, "sector_size": 512} | nodes).items():
            self.set(key.replace("_", "-"), value, settle=False)
        self.set("state", 4)
        return self

    def map_ring(self) -> None:
        read = self.world.client.read_int
        mapping = self.map(read(f"{self.disk.front_node}/ring-ref", -1))
        self.ring = BackRing(vmap([Frame(mapping.frame.memory, mapping.frame.pfn)]), self.abi.slot_size)
        remote = read(f"{self.disk.front_node}/event-channel", 0)
        self.port = self.domain.events.bind_interdomain(self.world.guest.domid, remote)
        assert self.port > 0, f"cannot bind port {remote}: {self.port}"

    def map(self, gref: int) -> Mapping:
        status, mapping = self.domain.maptrack.map(self.world.guest.domid, gref)
        assert mapping is not None, f"cannot map grant {gref}: {status}"
        self.mappings.append(mapping)
        return mapping

    def close(self) -> None:
        """Unmap and close as a good backend does when the frontend is Closed."""
        for mapping in self.mappings:
            self.domain.maptrack.unmap(mapping.handle)
        self.mappings.clear()
        self.domain.events.close(self.port)

    def take(self) -> list[tuple[int, int, int, int, bytes]]:
        """(op, count, id, sector, slot) of every request that waits."""
        taken = []
        for _ in range(self.ring.requests()):
            at = self.ring.next_request()
            slot = bytes(self.ring.view[at : at + self.abi.slot_size])
            op, count, _, ident, sector = self.abi.request.unpack_from(slot)
            taken.append((op, count, ident, sector, slot))
        return taken

    def answer(self, ident: int, op: int, status: int = 0, settle: bool = True) -> None:
        self.abi.response.pack_into(self.ring.view, self.ring.next_response(), ident, op, status)
        self.ring.push_responses()
        self.domain.events.send(self.port)
        if settle:
            self.world.settle()
