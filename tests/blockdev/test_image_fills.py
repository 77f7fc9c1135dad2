"""Goal: memory that a disk worker may be writing to is known, from before it could until it cannot any more.
Method: workers by hand, stopped at each point of a job's life; and a real one that stands in the middle of a read, for the
page it reads into is not handed out (userfaultfd)."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from blockdev.image import MOST_JOBS, Image, Workers
from blockdev.storage import PENDING, Backing
from tests.blockdev.test_image import Bench, Done, bench
from tests.blockdev.test_image_load import ByHand
from tests.filling import touched
from xenfs.arena import Arena
from xenmodel.memory import Frame, GuestMemory
from xenmodel.public.io.blkif import BLKIF_RSP_ERROR, BLKIF_RSP_OKAY
from xenmodel.types import PAGE_SIZE, Pfn

__all__ = ["bench"]
MIB = 1 << 20


class Rig:
    """An image whose reads all go to workers by hand, and a domain's memory."""

    def __init__(self, path: Path) -> None:
        self.workers, self.memory = ByHand(), GuestMemory(64)
        path.write_bytes(bytes(range(256)) * 4096)
        self.image = Image(Backing(str(path), direct_io=True), self.workers, lambda: 0.0)

    def frames(self, pfn: int, count: int = 1) -> memoryview:
        return self.memory.run(Pfn(pfn), count)

    def filled(self) -> list[int]:
        """Which frames, each asked for alone."""
        return [pfn for pfn in range(self.memory.pages) if touched(self.workers.filling, [frames_at(self.memory, pfn)])]


def frames_at(memory: GuestMemory, pfn: int, count: int = 1) -> range:
    start = memory.address(pfn)
    return range(start, start + count * PAGE_SIZE)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    it = Rig(tmp_path / "disk.img")
    yield it
    while it.image.outstanding:
        it.workers.work()
    it.image.close()
    it.workers.close()
    it.memory.close()


def test_from_the_queue_until_it_is_reaped(rig: Rig):
    """Goal: a read counts while it waits for a worker, and when it is done but nobody has looked.  Method: each of them."""
    assert rig.filled() == []
    request = Done()
    assert rig.image.read(0, [rig.frames(3, 2), rig.frames(9)], 3 * PAGE_SIZE, request) == PENDING
    assert rig.filled() == [3, 4, 9]
    rig.workers._jobs.put(None)
    rig.workers._work()
    assert not request.statuses and rig.filled() == [3, 4, 9]
    rig.workers.reap()
    assert request.statuses == [BLKIF_RSP_OKAY] and rig.filled() == []


def test_exactly_its_bytes(rig: Rig):
    """Goal: what only touches the memory is not filled.  Method: part of a frame; ranges before and behind."""
    start = rig.memory.address(5)
    rig.image.read(0, [rig.frames(5)[512:1024]], 512, Done())
    fills = partial(touched, rig.workers.filling)
    assert fills([range(start, start + 513)]) and fills([range(start + 1023, start + PAGE_SIZE)])
    assert fills([frames_at(rig.memory, 1), frames_at(rig.memory, 4, 3), frames_at(rig.memory, 20)])
    assert not fills([range(start, start + 512), range(start + 1024, start + PAGE_SIZE)]) and not fills([])


@pytest.mark.parametrize("what", ["write", "flush", "discard"])
def test_only_reads_of_the_disk_fill(rig: Rig, what: str):
    """Goal: memory that goes to the disk is not written to.  Method: each other kind of job on the same frames."""
    request = Done()
    if what == "write":
        assert rig.image.write(0, [rig.frames(3)], PAGE_SIZE, request) == PENDING
    elif what == "flush":
        assert rig.image.flush(request) == PENDING
    else:
        assert rig.image.discard(0, PAGE_SIZE, request) == PENDING
    assert rig.workers.queued == 1 and rig.filled() == []


def test_what_waits_for_its_turn_goes_where_the_frame_is_then(rig: Rig):
    """Goal: reads beyond MOST_JOBS of an image do not hold up a move, and reach the frame wherever it is by then.
    Method: the frame is moved while its read is parked; the bytes are seen there."""
    requests = [Done() for _ in range(MOST_JOBS + 1)]
    for pfn, request in enumerate(requests):
        rig.image.read(pfn * PAGE_SIZE, [rig.frames(pfn)], PAGE_SIZE, request)
    assert rig.filled() == list(range(MOST_JOBS))
    arena = Arena(rig.workers.filling)
    with closing(arena):
        frames = [Frame(rig.memory, MOST_JOBS), Frame(rig.memory, 0)]
        run = arena.reserve(2, 1, 1)
        assert not arena.show(frames[1:], run, 1) and arena.show(frames[:1], run, 0)
        rig.workers.work()
        assert rig.filled() == [MOST_JOBS]
        assert arena.show(frames[1:], run, 1)
        arena.leave([(frames[0], lambda: None)])
        assert rig.memory.is_away(MOST_JOBS)
        rig.workers.work()
        with mmap.mmap(arena.fd, PAGE_SIZE, offset=run.offset) as window:
            assert window[:] == bytes(range(256)) * 16
        arena.step()
        assert rig.frames(MOST_JOBS) == bytes(range(256)) * 16 and not rig.memory.is_away(MOST_JOBS)
        arena.leave([(frames[1], lambda: None)])
    assert all(request.statuses == [BLKIF_RSP_OKAY] for request in requests)


def test_a_read_that_fails(rig: Rig, caplog: pytest.LogCaptureFixture):
    """Goal: an error ends it as well.  Method: behind the end of an image that was cut."""
    os.truncate(rig.image.path, PAGE_SIZE)
    request = Done()
    rig.image.read(8 * PAGE_SIZE, [rig.frames(3)], PAGE_SIZE, request)
    assert rig.filled() == [3]
    rig.workers.work()
    assert request.statuses == [BLKIF_RSP_ERROR] and rig.filled() == [] and "ends" in caplog.text


def unserved(memory: GuestMemory, pfn: int) -> int:
    """A userfaultfd: whoever touches that frame (a hole as yet) waits until it is closed."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall({"x86_64": 323, "aarch64": 282}[os.uname().machine], os.O_CLOEXEC)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    fcntl.ioctl(fd, 0xC018AA3F, struct.pack("QQQ", 0xAA, 0, 0))  # UFFDIO_API
    fcntl.ioctl(fd, 0xC020AA00, struct.pack("QQQQ", memory.address(pfn), PAGE_SIZE, 1, 0))  # UFFDIO_REGISTER, missing pages
    return fd


@pytest.mark.host
@pytest.mark.parametrize("pages", [1, 3])
def test_in_the_middle_of_a_read(bench: Bench, pages: int):
    """Goal: a frame that a worker is reading into right now stays where it is, and moves when it is read, with its bytes.
    Method: a worker that waits inside preadv(2); the arena asks as the host does, also for a frame it showed before."""
    path, memory = bench.file(), bench.memory
    Path(path).write_bytes(os.urandom(MIB))
    image = bench.open(path, direct_io=True)
    arena, done = Arena(bench.workers.filling), Done()
    frames = [Frame(memory, 100 + i) for i in range(pages)]
    run = arena.reserve(pages, 1, 1)
    fd = unserved(memory, 100)
    assert image.read(0, [memory.run(Pfn(100), pages)], pages * PAGE_SIZE, done) == PENDING
    ends = time.monotonic() + 20
    while not any_in_preadv(bench.workers):
        assert time.monotonic() < ends, "it does not wait"
    for pfn in range(98, 105):
        assert touched(bench.workers.filling, [frames_at(memory, pfn)]) == (100 <= pfn < 100 + pages)
    for _ in range(3):
        assert not arena.show(frames, run, 0)
        assert not bench.workers.reap() and not memory.is_away(100)
    os.close(fd)
    bench.wait(image)
    assert done.statuses == [BLKIF_RSP_OKAY] and arena.show(frames, run, 0)
    with mmap.mmap(arena.fd, pages * PAGE_SIZE, offset=run.offset) as window:
        assert window[:] == Path(path).read_bytes()[: pages * PAGE_SIZE]
    arena.leave([(frame, lambda: None) for frame in frames])
    assert memory.run(Pfn(100), pages) == Path(path).read_bytes()[: pages * PAGE_SIZE]
    arena.close()


def any_in_preadv(workers: Workers) -> bool:
    """Is a worker in that system call, or preadv2(2), as which Python makes it?"""
    numbers = {"x86_64": ("295", "327"), "aarch64": ("69", "286")}[os.uname().machine]
    files = [Path(f"/proc/self/task/{thread.native_id}/syscall") for thread in workers._threads]
    return any(file.read_text().split()[0] in numbers for file in files)
