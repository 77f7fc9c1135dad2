"""storage.py: the port where blkback meets the world, its in-memory form, and faults and delays as wrappers.

A Storage answers each operation with a BLKIF_RSP_* status at once, or with PENDING and later, from the loop, with
request.complete(status). It never raises for reasons of I/O. Offsets and lengths are bytes, multiples of 512; the caller
has checked them against `sectors`. The file-backed one is blockdev/image.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from xenmodel.public.io.blkif import BLKIF_RSP_ERROR, BLKIF_RSP_OKAY, SECTOR_SIZE

PENDING = 1  # no BLKIF_RSP_* is positive


class StorageError(Exception):
    """The image cannot be opened; the text names it and why."""


@dataclass(frozen=True)
class Backing:
    """What the toolstack's nodes say about the image: `path`, and how to open it. None: as the image has it."""

    path: str
    readonly: bool = False
    sector_size: int | None = None
    physical_sector_size: int | None = None
    direct_io: bool = False


class Request(Protocol):
    def complete(self, status: int) -> None:
        """The operation that answered PENDING is done. Called once, from the loop."""


class Storage(Protocol):
    @property
    def sectors(self) -> int:
        """Size in units of 512 bytes."""

    sector_size: int
    physical_sector_size: int
    readonly: bool
    discard_granularity: int  # bytes; 0: cannot discard

    def read(self, offset: int, views: list[memoryview], length: int, request: Request) -> int: ...
    def write(self, offset: int, views: list[memoryview], length: int, request: Request) -> int: ...
    def flush(self, request: Request) -> int:
        """What was acknowledged before is on stable storage when this completes."""

    def discard(self, offset: int, length: int, request: Request) -> int: ...
    def close(self) -> None: ...


class MemoryStorage:
    """A disk in a bytearray; `durable` is what a flush has made safe, for tests of what survives."""

    def __init__(self, sectors: int, sector_size: int = SECTOR_SIZE, readonly: bool = False) -> None:
        self.sectors = sectors
        self.sector_size = self.physical_sector_size = sector_size
        self.readonly = readonly
        self.discard_granularity = sector_size
        self.data = bytearray(sectors * SECTOR_SIZE)
        self.durable = bytes(self.data)
        self.flushes = 0

    def read(self, offset: int, views: list[memoryview], length: int, request: Request) -> int:
        for view in views:
            view[:] = self.data[offset : offset + len(view)]
            offset += len(view)
        return BLKIF_RSP_OKAY

    def write(self, offset: int, views: list[memoryview], length: int, request: Request) -> int:
        for view in views:
            self.data[offset : offset + len(view)] = view
            offset += len(view)
        return BLKIF_RSP_OKAY

    def flush(self, request: Request) -> int:
        self.durable = bytes(self.data)
        self.flushes += 1
        return BLKIF_RSP_OKAY

    def discard(self, offset: int, length: int, request: Request) -> int:
        self.data[offset : offset + length] = bytes(length)
        return BLKIF_RSP_OKAY

    def close(self) -> None:
        pass


class _Wrapper:
    """Passes everything on; a filter overrides `_submit`."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.sector_size = inner.sector_size
        self.physical_sector_size = inner.physical_sector_size
        self.readonly = inner.readonly
        self.discard_granularity = inner.discard_granularity

    @property
    def sectors(self) -> int:
        return self.inner.sectors

    def _submit(self, what: str, request: Request, action: Callable[[Request], int]) -> int:
        return action(request)

    def read(self, offset: int, views: list[memoryview], length: int, request: Request) -> int:
        return self._submit("read", request, lambda r: self.inner.read(offset, views, length, r))

    def write(self, offset: int, views: list[memoryview], length: int, request: Request) -> int:
        return self._submit("write", request, lambda r: self.inner.write(offset, views, length, r))

    def flush(self, request: Request) -> int:
        return self._submit("flush", request, self.inner.flush)

    def discard(self, offset: int, length: int, request: Request) -> int:
        return self._submit("discard", request, lambda r: self.inner.discard(offset, length, r))

    def close(self) -> None:
        self.inner.close()


class FaultyStorage(_Wrapper):
    """Fails the operations that `fails(what)` picks, before they touch anything."""

    def __init__(self, inner: Storage, fails: Callable[[str], bool]) -> None:
        super().__init__(inner)
        self.fails = fails

    def _submit(self, what: str, request: Request, action: Callable[[Request], int]) -> int:
        return BLKIF_RSP_ERROR if self.fails(what) else action(request)


class DelayedStorage(_Wrapper):
    """Holds every operation back until `release(choose)`, which performs one of the held, in any order."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.held: list[tuple[Request, Callable[[Request], int]]] = []

    def _submit(self, what: str, request: Request, action: Callable[[Request], int]) -> int:
        self.held.append((request, action))
        return PENDING

    def release(self, choose: Callable[[int], int]) -> bool:
        """Perform one held operation; False if there is none."""
        if not self.held:
            return False
        request, action = self.held.pop(choose(len(self.held)))
        status = action(request)
        if status != PENDING:
            request.complete(status)
        return True
