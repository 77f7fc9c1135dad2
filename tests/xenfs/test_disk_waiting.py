"""Goal: requests that have to wait (no command free, sectors being modified) are all served, and no byte is lost.
Method: FUSE requests at once into a node over a storage that holds every operation until the test lets one go."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockdev.command import LARGE_COMMANDS, SMALL_COMMANDS
from blockdev.storage import DelayedStorage, MemoryStorage
from tests.xenfs.machine import KIB, MIB, Machine, Reply
from xenfs.fuse import kernel as k

DISK = "domains/1/dev/xvda"
SECTORS = 32768  # 16 MiB
WRITTEN = k.WRITE_OUT.pack
ZERO_RANGE = 0x10


class Held:
    """One disk whose storage holds everything back; `release` lets one operation go, the oldest or a chosen one."""

    def __init__(self, sector_size: int = 512, seed: int | None = None) -> None:
        self.memory = MemoryStorage(SECTORS, sector_size)
        self.storage = DelayedStorage(self.memory)
        self.machine = Machine({"g": {"xvda": self.storage}}, seed=seed)
        self.kernel = self.machine.kernel
        self.fh = self.kernel.handle(DISK, os.O_RDWR)

    def release(self, index: int = 0) -> bool:
        self.kernel.settle()
        done = self.storage.release(lambda count: index % count)
        self.kernel.settle()
        return done

    def drain(self, choose: random.Random) -> None:
        while self.release(choose.randrange(1 << 16)):
            pass

    def waiting(self) -> int:
        disk = self.kernel.session.handles[self.fh]
        return len(disk.backlog)  # type: ignore[attr-defined]


@pytest.fixture
def held() -> Iterator[Held]:
    disk = Held()
    with disk.machine:
        yield disk


@pytest.mark.parametrize("order", ["oldest", "newest", "random"])
@pytest.mark.parametrize(("count", "size"), [(200, 4096), (200, 100), (15, MIB), (60, 70_000)])
def test_more_requests_than_commands(held, order, count, size):
    """Goal: when the commands run out requests wait their turn, and each is answered once with its own data.
    Method: reads and writes by turns, all at once, to disjoint places; storage answers in three orders."""
    choose, expected, asked = random.Random(count), bytearray(held.memory.data), {}
    expected[:] = held.memory.data[:] = choose.randbytes(len(expected))
    step = len(expected) // count
    for i in range(count):
        offset = i * step // 512 * 512
        if i % 2:
            asked[held.kernel.send_read(held.fh, offset, size)] = Reply(0, bytes(expected[offset : offset + size]))
        else:
            data = choose.randbytes(size)
            asked[held.kernel.send_write(held.fh, offset, data)] = Reply(0, WRITTEN(size, 0))
            expected[offset : offset + size] = data
    held.kernel.settle()
    commands = SMALL_COMMANDS + LARGE_COMMANDS if size <= 64 * KIB else LARGE_COMMANDS
    assert held.waiting() == max(0, count - commands)
    while held.storage.held:
        held.release({"oldest": 0, "newest": -1, "random": choose.randrange(99)}[order])
    assert held.kernel.replies == asked
    assert held.memory.data == expected and held.waiting() == 0


def test_written_data_is_kept_while_it_waits(held):
    """Goal: the data of a write that has to wait is what it was when it was sent, though it landed in shared buffers.
    Method: fill all commands with reads, then writes of different bytes to different places."""
    for _ in range(SMALL_COMMANDS + LARGE_COMMANDS):
        held.kernel.send_read(held.fh, 0, 512)
    for i in range(50):
        held.kernel.send_write(held.fh, i * 4096, bytes([i + 1]) * 4096)
    held.drain(random.Random(3))
    assert held.memory.data[: 50 * 4096] == b"".join(bytes([i + 1]) * 4096 for i in range(50))


def test_modify_waits_for_a_write_under_way(held):
    """Goal: changing part of a sector does not undo a write to it that is on its way, nor wait for ever.
    Method: a whole sector, then 10 bytes in it; the storage would do the read first."""
    whole = held.kernel.send_write(held.fh, 0, b"w" * 512)
    held.kernel.settle()
    part = held.kernel.send_write(held.fh, 100, b"p" * 10)
    assert len(held.storage.held) == 1
    while held.release(-1):
        pass
    assert held.kernel.replies == {whole: Reply(0, WRITTEN(512, 0)), part: Reply(0, WRITTEN(10, 0))}
    assert held.memory.data[:512] == b"w" * 100 + b"p" * 10 + b"w" * 402


def test_write_waits_for_a_modify_under_way(held):
    """Goal: the other way round: a whole sector is not undone by a modify that read it before.
    Method: 10 bytes, let the read go, then the whole sector; the storage would do the newer one first."""
    held.kernel.send_write(held.fh, 100, b"p" * 10)
    held.release()
    held.kernel.send_write(held.fh, 0, b"w" * 512)
    other = held.kernel.send_write(held.fh, 512, b"n" * 512)
    held.kernel.settle()
    assert len(held.storage.held) == 2, "the neighbour sector need not wait"
    held.release(-1)
    assert other in held.kernel.replies
    held.drain(random.Random(0))
    assert held.memory.data[:1024] == b"w" * 512 + b"n" * 512


def pieces(choose: random.Random, end: int, count: int) -> list[tuple[int, int]]:
    """0..end cut into `count` disjoint ranges."""
    cuts = sorted(choose.sample(range(1, end), count - 1))
    return list(zip([0, *cuts], [*cuts, end], strict=True))


@pytest.mark.parametrize("sector_size", [512, 4096])
@pytest.mark.parametrize("seed", range(25))
def test_no_byte_is_lost(sector_size, seed):
    """Goal: requests at once that share sectors but no bytes all take effect: each byte is its writer's.
    Method: cut a few sectors into random pieces, write or zero each by a request of its own, deliver and complete in
    any order while reads look on; the result is known."""
    choose = random.Random(seed)
    disk = Held(sector_size, seed)
    with disk.machine:
        end = sector_size * choose.choice([1, 2, 5])
        disk.memory.data[: 2 * end] = b"\xff" * (2 * end)
        expected = bytearray(b"\xff" * (2 * end))
        todo = pieces(choose, end, choose.randrange(2, 80))
        choose.shuffle(todo)
        for first, last in todo:
            if choose.random() < 0.2:
                disk.kernel.send_fallocate(disk.fh, first, last - first, choose.choice([0x03, 0x10, 0x11]))
                expected[first:last] = bytes(last - first)
            else:
                data = choose.randbytes(last - first)
                disk.kernel.send_write(disk.fh, first, data)
                expected[first:last] = data
            if choose.random() < 0.3:
                disk.kernel.send_read(disk.fh, choose.randrange(end), choose.randrange(1, end))
            for _ in range(choose.randrange(3)):
                disk.release(choose.randrange(99))
        disk.drain(choose)
        assert disk.memory.data[: 2 * end] == expected
        assert not any(reply.error for reply in disk.kernel.replies.values())
        assert len(disk.kernel.order) >= len(todo) and disk.waiting() == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 4095), st.integers(1, 1500), st.integers(0, 40)), min_size=1, max_size=25))
def test_overlapping_writes_leave_one_of_them(requests):
    """Goal: of writes at once to the same bytes one wins; a byte nobody wrote, or of no writer, never appears.
    Method: hypothesis chooses overlapping ranges and the order of completion; each writer has its own byte."""
    disk = Held()
    with disk.machine:
        writers: list[set[int]] = [{0} for _ in range(8192)]
        for i, (offset, length, index) in enumerate(requests, 1):
            disk.kernel.send_write(disk.fh, offset, bytes([i]) * length)
            for at in range(offset, offset + length):
                writers[at] = writers[at] - {0} | {i}
            if index < 20:
                disk.release(index)
        disk.drain(random.Random(len(requests)))
        assert all(byte in writers[at] for at, byte in enumerate(disk.memory.data[:8192]))


def test_modify_of_more_than_a_command(held):
    """Goal: an unaligned MiB, which is longer than any command, keeps its edges.  Method: offset 1, all at once twice."""
    held.memory.data[:] = b"o" * len(held.memory.data)
    held.kernel.send_write(held.fh, 1, b"a" * MIB)
    held.kernel.send_write(held.fh, MIB + 1, b"b" * MIB)
    held.drain(random.Random(5))
    assert held.memory.data[: 2 * MIB + 2] == b"o" + b"a" * MIB + b"b" * MIB + b"o"


def test_fsync_covers_what_was_answered(held):
    """Goal: an fsync is answered only after the storage flushed, also when no command is free for it.
    Method: fill all commands, ask for a flush, let operations go one by one."""
    for i in range(60):
        held.kernel.send_write(held.fh, i * 4096, b"d" * 4096)
    flush = held.kernel.send_fsync(held.fh)
    while flush not in held.kernel.replies:
        answered = len(held.kernel.order)
        assert held.memory.flushes == 0
        assert held.release(), f"nothing is under way, {answered} answers"
    assert held.memory.flushes == 1
    assert len(held.kernel.order) > 20


def test_interrupt_of_what_waits(held):
    """Goal: a request that waits for a command or for the ring can be given up (EINTR, once); one under way cannot, and
    completes.  Method: INTERRUPT all three, then one that was answered already."""
    started = [held.kernel.send_write(held.fh, 0, b"s" * 512) for _ in range(SMALL_COMMANDS + LARGE_COMMANDS)]
    waits = held.kernel.send_write(held.fh, 4096, b"w" * 512)
    after = held.kernel.send_write(held.fh, 8192, b"a" * 512)
    held.kernel.settle()
    for unique in (started[0], started[-1], waits, waits):  # the ring has 32 slots
        held.kernel.send(k.FUSE_INTERRUPT, 0, k.INTERRUPT_IN.pack(unique))
    assert held.kernel.replies == {waits: Reply(errno.EINTR, b""), started[-1]: Reply(errno.EINTR, b"")}
    held.drain(random.Random(1))
    assert held.kernel.replies[started[0]] == held.kernel.replies[after] == Reply(0, WRITTEN(512, 0))
    assert held.memory.data[4096] == 0 and held.memory.data[8192] == ord("a")


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_interrupt_of_zeroing(held, steps):
    """Goal: zeroing a large range ends with EINTR after the step that is under way; its range is free again.
    Method: INTERRUPT after some steps; what was zeroed; a write that waited for the range, and the whole range again."""
    end = SECTORS * 512
    held.memory.data[:] = b"o" * end
    zeroing = held.kernel.send_fallocate(held.fh, 0, end, ZERO_RANGE)
    for _ in range(steps):
        assert held.release()
    write = held.kernel.send_write(held.fh, end - 4096, b"w" * 4096)
    held.kernel.settle()
    for _ in range(2):
        held.kernel.send(k.FUSE_INTERRUPT, 0, k.INTERRUPT_IN.pack(zeroing))
    assert held.kernel.order[-1] != zeroing and held.waiting() == 1, "the step under way is not given up"
    assert held.release()
    assert held.kernel.replies[zeroing] == Reply(errno.EINTR, b"")
    held.drain(random.Random(3))
    assert held.kernel.replies[write] == Reply(0, WRITTEN(4096, 0))
    done = (steps + 1) * MIB
    assert held.memory.data == bytes(done) + b"o" * (end - done - 4096) + b"w" * 4096
    again = held.kernel.send_fallocate(held.fh, 0, end, ZERO_RANGE)
    held.drain(random.Random(4))
    assert held.kernel.replies[again] == Reply(0, b"") and not any(held.memory.data)
    disk = held.kernel.session.handles[held.fh]
    assert not disk.locked and not disk.stepping


def test_interrupt_of_a_modify_on_no_ring_yet(held):
    """Goal: a request of several steps can be given up while its first waits for the ring, or for a backend that is away.
    Method: INTERRUPT an unaligned write before anything was delivered; its range is free and the data untouched."""
    write = held.kernel.send_write(held.fh, 10, b"x" * 5)
    held.kernel.send(k.FUSE_INTERRUPT, 0, k.INTERRUPT_IN.pack(write))
    assert held.kernel.replies[write] == Reply(errno.EINTR, b"")
    held.drain(random.Random(5))
    disk = held.kernel.session.handles[held.fh]
    assert not disk.locked and not disk.stepping and not any(held.memory.data)


def test_unplugged_while_requests_wait(held):
    """Goal: unplugging a busy disk lets what the backend has finish, and fails the rest with EIO: nothing hangs.
    Method: twice as many writes as commands, a detach in the middle, then the storage goes on."""
    asked = [held.kernel.send_write(held.fh, i * 512, b"d" * 512) for i in range(80)]
    held.release()
    held.machine.world.toolstack.detach_disk(1, 51712)
    held.drain(random.Random(2))
    assert sorted(held.kernel.replies) == asked
    assert {reply.error for reply in held.kernel.replies.values()} == {0, errno.EIO}
    for i, unique in enumerate(asked):
        done = held.memory.data[i * 512] == ord("d")
        assert done or held.kernel.replies[unique].error == errno.EIO, "an acknowledged write is not there"
