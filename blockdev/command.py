"""command.py: the frontend's requests in flight, pooled records that own the guest pages their data travels through.

A Command has a run of contiguous frames, granted to the backend once for as long as the connection lasts; its segments
are therefore packed once. There are many small ones and a few large ones; each pool is a LIFO, so that the pages and
grants in use stay few. Where a command is (`Where`) is asserted when it is taken
and given back.
"""

from __future__ import annotations

import enum
import mmap
from typing import Any

from blockdev.geometry import pack_segments
from xenmodel.domain import Domain
from xenmodel.grant_table import GrantTableFull
from xenmodel.memory import OutOfMemory
from xenmodel.types import PAGE_SHIFT, PAGE_SIZE, Domid, Gref, Pfn

SMALL_BYTES = 64 * 1024
LARGE_BYTES = 1024 * 1024  # 256 segments, FUSE's largest request
SMALL_COMMANDS = 32
LARGE_COMMANDS = 8
MEMORY_SHARE = 4  # a pool takes at most a quarter of a small guest's memory
NOWHERE = Pfn(-1)


class Where(enum.Enum):
    """The queue a command is on."""

    FREE = "free"
    READY = "ready"  # taken by the consumer, or waiting for a place on the ring
    BUSY = "busy"  # on the ring
    GONE = "gone"  # dropped: there were no grant references for it


class Command:
    """One request. The consumer (a disk node) keeps what it needs to answer its client in `unique` and `context`."""

    __slots__ = (
        "capacity", "context", "described", "grefs", "indirect", "indirect_gref", "length", "offset", "op", "parts", "pfn",
        "sector", "segments", "size", "status", "tail", "unique", "view", "where",
    )  # fmt: skip

    def __init__(self, domain: Domain, capacity: int) -> None:
        self.capacity = capacity
        self._allocate(domain)
        self.grefs: list[Gref] = []
        self.indirect_gref = Gref(0)
        self.segments = b""
        self.described = 0  # length that the indirect page describes now
        self.where = Where.FREE
        self.op = self.sector = self.length = self.status = self.parts = 0
        self.unique = self.offset = self.size = 0
        self.context: Any = None

    def _allocate(self, domain: Domain) -> None:
        pages = self.capacity >> PAGE_SHIFT
        # the page behind the data holds the indirect descriptors of a request over the whole buffer
        self.pfn = domain.memory.allocate(pages + 1)
        self.view = domain.memory.run(self.pfn, pages)
        self.tail = self.view[SMALL_BYTES:]  # what follows the first 64 KiB of a large request
        self.indirect = domain.memory.run(Pfn(self.pfn + pages))

    def grant(self, domain: Domain, peer: Domid) -> None:
        """Grant every page to the backend. GrantTableFull (nothing granted) when the table is exhausted."""
        pages = self.capacity >> PAGE_SHIFT
        grant = domain.grants.grant_access
        if domain.grants.available < pages + 1:
            raise GrantTableFull(f"{pages + 1} grant references are needed, {domain.grants.available} are free")
        self.grefs = [grant(peer, Pfn(self.pfn + i)) for i in range(pages)]
        self.indirect_gref = grant(peer, Pfn(self.pfn + pages), readonly=False)
        self.segments = pack_segments(self.grefs, self.capacity)
        self.described = 0

    def revoke(self, domain: Domain) -> bool:
        """End the backend's access; False if it still maps any page, which then must never be used again (XSA-396)."""
        ended = [domain.grants.end_access(gref) for gref in (*self.grefs, self.indirect_gref) if gref]
        self.grefs, self.indirect_gref = [], Gref(0)
        return all(ended)

    def quarantine(self, domain: Domain) -> None:
        """Leave the pages to the backend that does not let go of them, and go on with fresh ones. OutOfMemory."""
        old, self.pfn = self.view, NOWHERE  # lost, also if there are no others
        self._allocate(domain)
        self.view[:] = old

    def release(self, domain: Domain, *, reuse: bool = True) -> None:
        """Give the pages back to the guest, unless somebody may still use them. What stays is ordinary memory, so that
        the consumer of a device that is gone can go on asking (and be told of the failure)."""
        if self.pfn == NOWHERE:
            return
        if reuse:
            domain.memory.release(self.pfn, (self.capacity >> PAGE_SHIFT) + 1)
        self.pfn = NOWHERE
        self.view = memoryview(mmap.mmap(-1, self.capacity))  # untouched, it costs nothing
        self.tail = self.view[SMALL_BYTES:]


class Pool:
    """The free commands of one size."""

    def __init__(self, domain: Domain, capacity: int, count: int) -> None:
        pages = capacity // PAGE_SIZE + 1
        count = max(1, min(count, domain.memory.pages // MEMORY_SHARE // pages))
        self.domain = domain
        self.capacity = capacity
        self.commands: list[Command] = []
        self.free: list[Command] = []
        self.closed = False
        for _ in range(count):
            try:
                self._add()
            except OutOfMemory:
                if not self.commands:
                    raise
                break  # a small guest gets fewer requests in flight

    def _add(self) -> Command:
        command = Command(self.domain, self.capacity)
        self.commands.append(command)
        self.free.append(command)
        return command

    def take(self) -> Command:
        """The most recently used free command; the caller has seen that `free` is not empty."""
        command = self.free.pop()
        assert command.where is Where.FREE, f"a free command is {command.where}"
        command.where = Where.READY
        return command

    def give(self, command: Command) -> None:
        assert command.where is Where.READY, f"a command that is given back is {command.where}"
        command.where = Where.FREE
        self.free.append(command)
        if self.closed:
            command.release(self.domain)

    def close(self) -> None:
        """The device is gone: the guest gets its frames back, those of commands in use when they are given."""
        self.closed = True
        for command in self.free:
            command.release(self.domain)
