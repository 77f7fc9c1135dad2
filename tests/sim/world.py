"""world.py: random traffic through one disk in a world whose every choice comes from one seed, compared with a bytearray.

Goal: a failing run is a number.  Method: the seed decides what both ends offer, what is asked, when handlers run and in
which order, when the storage answers and what it refuses. `check()` holds after every step:

- both ends' ring indices are legal; ids in flight are unique and none is lost;
- every command is in exactly one place: free, waiting, on a ring, or with the consumer; it completes once;
- reads return what the oracle holds; what a completed flush promised is durable;
- pins match mappings, ports match ports.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from blockdev.blkback import Offer
from blockdev.blkfront import Want
from blockdev.command import LARGE_BYTES, Command, Where
from blockdev.storage import DelayedStorage, FaultyStorage, MemoryStorage
from tests.blockdev.world import KIB, World
from xenmodel.public.io.blkif import (
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    SECTOR_SIZE,
)
from xenmodel.testing import Footprint, SeededOrder, check_rings, check_world

READ, WRITE, FLUSH, DISCARD = BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_DISCARD
SECTORS = 4096
STEPS_BETWEEN_SCANS = 16  # the whole grant table is looked at that often


class Out(NamedTuple):
    """A command that is out: sectors start..end, and for a flush what it promises: the disk, except these sectors."""

    op: int
    start: int
    end: int
    data: bytes
    excluded: set[int]


class Traffic:
    """`step()` does one random thing; `finish()` brings everything to rest and compares."""

    def __init__(self, seed: int, failures: float = 0.0) -> None:
        self.random = random.Random(seed)
        self.world = World(order=SeededOrder(self.random.randrange))
        self.memory = MemoryStorage(SECTORS)
        self.failing = failures
        faulty = FaultyStorage(self.memory, lambda what: self.random.random() < self.failing)
        self.storage = DelayedStorage(faulty)
        self.footprint = Footprint(self.world.hypervisor)
        self.oracle = bytearray(SECTORS * SECTOR_SIZE)
        self.out: dict[int, Out] = {}
        self.completed = self.steps = self.failed = 0
        self.disk = self.world.attach(storage=self.storage, offer=self._offer(), want=self._want())
        self.front = self.disk.front
        self.front.on_complete = self._complete
        assert self.disk.connected

    def _offer(self) -> Offer:
        pick, some = self.random.choice, self.random.random
        return Offer(
            max_indirect_segments=pick([None, 8, 32, 256]),
            max_ring_page_order=pick([None, 0, 1, 4]),
            max_queues=pick([None, 1, 2, 4]),
            persistent=some() < 0.6,
            flush=some() < 0.6,
            barrier=some() < 0.5,
            discard=some() < 0.8,
            persistent_cap=pick([0, 1, 20, 300, 4096]),
        )

    def _want(self) -> Want:
        pick = self.random.choice
        protocol = pick(["x86_64-abi", "x86_32-abi"])
        return Want(ring_page_order=pick([0, 0, 1, 2]), queues=pick([1, 1, 2, 4]), protocol=protocol)

    # --- one step ----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        self.steps += 1
        what = self.random.random()
        if what < 0.45:
            self.submit()
        elif what < 0.75:
            self.world.hypervisor.deliver(turns=self.random.randrange(1, 4))
        else:
            for _ in range(self.random.randrange(4)):
                self.storage.release(self.random.randrange)
        self.check()

    def submit(self) -> None:
        op = self.random.choices([READ, WRITE, FLUSH, DISCARD], [45, 40, 8, 7])[0]
        limit = 8 if self.random.random() < 0.6 else 300 if self.random.random() < 0.95 else LARGE_BYTES // SECTOR_SIZE
        count = 0 if op == FLUSH else self.random.randrange(1, limit + 1)
        start = self.random.randrange(SECTORS - count + 1)
        if op == DISCARD and not self.front.discard_granularity:
            return
        if self._in_use(op, start, start + count):
            return
        command = self.front.take(0 if op in (FLUSH, DISCARD) else count * SECTOR_SIZE)
        if command is None:
            return
        data, excluded = b"", set[int]()
        if op == WRITE:
            data = self.random.randbytes(16) * (count * SECTOR_SIZE // 16)
            command.view[: len(data)] = data
        elif op == DISCARD:
            data = bytes(count * SECTOR_SIZE)
        elif op == FLUSH:
            data = bytes(self.oracle)
            excluded = {s for o in self.out.values() if o.op in (WRITE, DISCARD) for s in range(o.start, o.end)}
        if op in (WRITE, DISCARD):
            for other in self.out.values():
                other.excluded.update(range(start, start + count))
        assert id(command) not in self.out, "a command was taken twice"
        self.out[id(command)] = Out(op, start, start + count, data, excluded)
        self.front.submit(command, op, start, count * SECTOR_SIZE)

    def _in_use(self, op: int, start: int, end: int) -> bool:
        """As any consumer of a disk: nothing overlaps a change that is under way."""
        return any(
            o.start < end and start < o.end and (op != READ or o.op != READ) for o in self.out.values() if o.op != FLUSH
        )

    def _complete(self, command: Command) -> None:
        out = self.out.pop(id(command), None)
        assert out is not None, f"{command.op} of sector {command.sector} completed, and it was not out"
        self.completed += 1
        where = slice(out.start * SECTOR_SIZE, out.end * SECTOR_SIZE)
        if command.status:
            self.failed += 1
            if out.op in (WRITE, DISCARD):
                self._half_done(out)
        elif out.op == READ:
            assert command.view[: command.length] == self.oracle[where], f"read of {out.start}..{out.end}"
        elif out.op == FLUSH:
            self._promised(out)
        else:
            self.oracle[where] = out.data
        self.front.give(command)

    def _half_done(self, out: Out) -> None:
        """A change that failed was made in no, some or all of its sectors: then the disk says which."""
        for sector in range(out.start, out.end):
            where = slice(sector * SECTOR_SIZE, (sector + 1) * SECTOR_SIZE)
            at = (sector - out.start) * SECTOR_SIZE
            now = self.memory.data[where]
            assert now in (self.oracle[where], out.data[at : at + SECTOR_SIZE]), f"sector {sector} is neither old nor new"
            self.oracle[where] = now

    def _promised(self, out: Out) -> None:
        if self.front.flush_op == 0:
            return  # the backend has no cache that it knows of
        for sector in set(range(SECTORS)) - out.excluded:
            where = slice(sector * SECTOR_SIZE, (sector + 1) * SECTOR_SIZE)
            assert self.memory.durable[where] == out.data[where], f"sector {sector} was acknowledged, flushed and lost"

    # --- the backend, the size -----------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Say Closing, let traffic go on, and be back (with another offer) once both ends are Closed."""
        self.world.write(f"{self.disk.back_node}/state", 5, settle=False)
        for _ in range(400):
            if self.disk.states() == ("6", "6"):
                break
            self.step()
            self.storage.release(self.random.randrange)
            self.world.hypervisor.deliver(turns=2)
        else:
            raise AssertionError(f"does not close: {self.disk.states()}")
        for _ in range(self.random.randrange(10)):
            self.step()
        self.disk.back.offered = self._offer()
        self._return()

    def _return(self) -> None:
        for _ in range(100):
            if self.disk.states()[1] == "6":  # it may have seen our old Closed once more
                self.disk.back._offer()
            self.step()
            self.world.hypervisor.deliver(turns=2)
            if self.disk.connected:
                return
        raise AssertionError(f"does not come back: {self.disk.states()} {self.disk.errors()}")

    def resize(self) -> None:
        """Grow and shrink back; the traffic stays within what is there all the time."""
        self.memory.sectors = SECTORS + 8 * self.random.randrange(100)
        self.memory.data.extend(bytes(max(0, self.memory.sectors * SECTOR_SIZE - len(self.memory.data))))
        self.disk.back.resized()

    # --- rest --------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        front = self.front
        self._check_places()
        for mine, theirs in zip(front.queues, self.disk.back.queues, strict=False):
            assert check_rings(mine.ring, theirs.ring) == []
            assert len(theirs.free) + theirs.running == theirs.ring.size
        if self.steps % STEPS_BETWEEN_SCANS == 0:
            assert check_world(self.world.hypervisor) == []

    def _check_places(self) -> None:
        front = self.front
        on_rings: set[int] = set()
        for queue in front.queues:
            out = [ident for ident, command in enumerate(queue.shadow) if command is not None]
            assert sorted(out + queue.ids) == list(range(queue.ring.size)), "an id is lost or used twice"
            on_rings.update(id(command) for command in queue.shadow if command is not None)
        waiting = [id(command) for command in front.waiting]
        free = [id(command) for pool in (front.small, front.large) for command in pool.free]
        assert len(set(waiting)) == len(waiting) and len(set(free)) == len(free)
        assert not on_rings & set(waiting) and not set(free) & (on_rings | set(waiting))
        assert on_rings | set(waiting) == set(self.out), "a command is nowhere, or on a queue and not out"
        for pool in (front.small, front.large):
            for command in pool.commands:
                expected = Where.BUSY if id(command) in on_rings else Where.FREE if id(command) in free else Where.READY
                assert command.where is expected, f"{command.where}, not {expected}"

    def drain(self) -> None:
        """Everything is answered."""
        self.world.settle()
        while self.storage.release(self.random.randrange):
            self.world.settle()

    def finish(self) -> None:
        """Drain, compare every byte twice, pull the disk, and look for what stayed behind."""
        self.failing = 0.0
        self.drain()
        self.check()
        assert not self.out, f"{len(self.out)} requests were never answered"
        assert self.memory.data[: len(self.oracle)] == self.oracle
        read = bytearray()
        while len(read) < len(self.oracle):
            command = self.front.take(64 * KIB)
            assert command is not None
            self.out[id(command)] = Out(READ, len(read) // SECTOR_SIZE, len(read) // SECTOR_SIZE + 128, b"", set())
            self.front.submit(command, READ, len(read) // SECTOR_SIZE, 64 * KIB)
            self.drain()
            read += command.view[: 64 * KIB]
        assert read == self.oracle
        self.pull()

    def pull(self) -> None:
        self.world.toolstack.detach_disk(self.world.guest.domid, self.disk.number)
        self.drain()
        assert not self.out and self.footprint.grown() == []
        self.world.close()
