"""Goal: a raw file is a faithful Storage: every byte, every refusal with its reason, every failure a status.
Method: real temporary files and real worker threads; completions are waited for on the workers' eventfd, never slept for."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdev.image import INLINE_WRITE_BYTES, SLOW_WRITE_S, Image, Workers
from blockdev.storage import PENDING, Backing, StorageError
from tests.descriptors import open_files
from xenmodel.memory import GuestMemory
from xenmodel.public.io.blkif import BLKIF_RSP_ERROR, BLKIF_RSP_OKAY

KIB, MIB = 1024, 1 << 20


class Done:
    """A request that notes its completion."""

    def __init__(self) -> None:
        self.statuses: list[int] = []

    def complete(self, status: int) -> None:
        self.statuses.append(status)


class Bench:
    """A directory, workers, a clock that stands still, and what is needed to run one operation to its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.workers = Workers(2)
        self.now = 0.0
        self.images: list[Image] = []
        self.memory = GuestMemory(1024)

    def file(self, size: int = MIB, name: str = "disk.img") -> str:
        path = self.path / name
        with path.open("wb") as file:
            file.truncate(size)
        return str(path)

    def open(self, path: str, clock: Callable[[], float] | None = None, **options: bool | int) -> Image:
        image = Image(Backing(path, **options), self.workers, clock or (lambda: self.now))  # type: ignore[arg-type]
        self.images.append(image)
        return image

    def wait(self, image: Image) -> None:
        while image.outstanding:
            assert select.select([self.workers.fd], [], [], 30)[0], "a worker does not come back"
            self.workers.reap()

    def run(self, image: Image, what: str, *arguments: object) -> int:
        """One operation; whether it was answered at once or later, its status."""
        request = Done()
        status: int = getattr(image, what)(*arguments, request)
        if status != PENDING:
            assert not request.statuses
            return status
        self.wait(image)
        assert len(request.statuses) == 1
        return request.statuses[0]

    def buffer(self, length: int, data: bytes = b"", at: int = 0) -> memoryview:
        view = self.memory.view[at : at + length]
        view[: len(data)] = data
        return view


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    it = Bench(tmp_path)
    yield it
    for image in it.images:
        it.wait(image)
        image.close()
    it.workers.close()
    it.memory.close()


@pytest.mark.parametrize("length", [512, 4096, INLINE_WRITE_BYTES, INLINE_WRITE_BYTES + 512, MIB])
@pytest.mark.parametrize("direct", [False, True])
def test_write_and_read(bench: Bench, length: int, direct: bool) -> None:
    """Goal: scattered views go to one place and come back.  Method: two views in the wrong order, then a flush, the file."""
    path = bench.file(2 * MIB)
    image = bench.open(path, direct_io=direct)
    data = bytes(i % 255 for i in range(512)) * (length // 512)
    half = length // 1024 * 512
    bench.buffer(length, data)
    views = [view for view in (bench.memory.view[:half], bench.memory.view[half:length]) if len(view)]
    assert bench.run(image, "write", 4096, views, length) == BLKIF_RSP_OKAY
    assert bench.run(image, "flush") == BLKIF_RSP_OKAY
    assert Path(path).read_bytes()[4096 : 4096 + length] == data
    target = bench.buffer(length, bytes(length), at=2 * MIB)
    assert bench.run(image, "read", 4096, [target], length) == BLKIF_RSP_OKAY
    assert bytes(target) == data


def test_what_waits_and_what_does_not(bench: Bench) -> None:
    """Goal: small cached work is answered at once, the rest by a worker.  Method: PENDING or not, for each operation."""
    image = bench.open(bench.file(4 * MIB))
    small, large = [bench.buffer(4096)], [bench.buffer(INLINE_WRITE_BYTES + 512)]
    request = Done()
    assert image.write(0, small, 4096, request) == BLKIF_RSP_OKAY
    assert image.read(0, small, 4096, request) == BLKIF_RSP_OKAY
    assert image.write(0, large, INLINE_WRITE_BYTES + 512, request) == PENDING
    bench.wait(image)
    assert image.flush(request) == PENDING
    bench.wait(image)
    assert image.discard(0, 4096, request) == PENDING
    bench.wait(image)
    assert image.discard(0, 0, request) == BLKIF_RSP_OKAY
    assert request.statuses == [BLKIF_RSP_OKAY] * 3


def test_direct_io_always_waits(bench: Bench) -> None:
    image = bench.open(bench.file(), direct_io=True)
    assert fcntl.fcntl(image.fd, fcntl.F_GETFL) & os.O_DIRECT
    request = Done()
    assert image.read(0, [bench.buffer(4096)], 4096, request) == PENDING
    assert image.write(0, [bench.buffer(4096, at=8192)], 4096, request) == PENDING
    bench.wait(image)
    assert request.statuses == [BLKIF_RSP_OKAY] * 2


def test_discard_punches_a_hole(bench: Bench) -> None:
    """Goal: the host gets the blocks back, the size stays, the bytes read as zeroes.  Method: st_blocks before and after."""
    path = bench.file()
    image = bench.open(path)
    Path(path).write_bytes(b"x" * MIB)
    os.sync()
    before = os.stat(path).st_blocks
    assert bench.run(image, "discard", 256 * KIB, 512 * KIB) == BLKIF_RSP_OKAY
    assert os.stat(path).st_blocks <= before - 512 * KIB // 512
    assert os.stat(path).st_size == MIB
    target = bench.buffer(4096, b"y" * 4096)
    assert bench.run(image, "read", 256 * KIB, [target], 4096) == BLKIF_RSP_OKAY and not any(target)
    assert Path(path).read_bytes() == b"x" * 256 * KIB + bytes(512 * KIB) + b"x" * 256 * KIB


@pytest.mark.parametrize("length", [4096, MIB])
def test_an_image_cut_beneath_its_guest(bench: Bench, length: int, caplog: pytest.LogCaptureFixture) -> None:
    """Goal: reads past the new end are errors, logged once with the path; refresh() learns the size.
    Method: truncate the open file."""
    path = bench.file(4 * MIB)
    image = bench.open(path)
    os.truncate(path, MIB + 512)
    with caplog.at_level(logging.ERROR, "xenfs.image"):
        for _ in range(3):
            assert bench.run(image, "read", MIB, [bench.buffer(length)], length) == BLKIF_RSP_ERROR
    assert len(caplog.records) == 1 and path in caplog.text and "ends" in caplog.text
    assert image.sectors == 8192 and image.refresh() and image.sectors == 2049 and not image.refresh()
    assert bench.run(image, "read", MIB, [bench.buffer(512)], 512) == BLKIF_RSP_OKAY


def test_an_image_that_grows(bench: Bench) -> None:
    path = bench.file(MIB)
    image = bench.open(path, sector_size=4096)
    os.truncate(path, MIB + 4095)
    assert not image.refresh(), "part of a block is none"
    os.truncate(path, MIB + 4096)
    assert image.refresh() and image.sectors == 2048 + 8


def test_a_write_the_host_refuses(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Goal: OSError becomes a status.  Method: a file larger than the process may write (RLIMIT_FSIZE is the kernel's)."""
    image = bench.open(bench.file(4 * MIB))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, limits[1]))
    try:
        with caplog.at_level(logging.ERROR, "xenfs.image"):
            assert bench.run(image, "write", 2 * MIB, [bench.buffer(4096)], 4096) == BLKIF_RSP_ERROR
            assert bench.run(image, "write", MIB - 4096, [bench.buffer(8192)], 8192) == BLKIF_RSP_ERROR
            assert bench.run(image, "write", 2 * MIB, [bench.buffer(MIB)], MIB) == BLKIF_RSP_ERROR
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caplog.text.count(os.strerror(errno.EFBIG)) == 1
    assert bench.run(image, "write", 2 * MIB, [bench.buffer(4096)], 4096) == BLKIF_RSP_OKAY


def test_more_views_than_one_system_call_takes(bench: Bench) -> None:
    """Goal: a request of 4096 scattered segments works (IOV_MAX is 1024).  Method: every second sector of memory."""
    image = bench.open(bench.file(4 * MIB))
    views = [bench.memory.view[i * 1024 : i * 1024 + 512] for i in range(4000)]
    for i, view in enumerate(views):
        view[:] = bytes([i % 251]) * 512
    length = 512 * len(views)
    assert bench.run(image, "write", 0, views, length) == BLKIF_RSP_OKAY
    for view in views:
        view[:] = bytes(512)
    assert bench.run(image, "read", 0, views, length) == BLKIF_RSP_OKAY
    assert all(view[0] == i % 251 for i, view in enumerate(views))
    assert bench.run(image, "write", 0, [bench.buffer(512)], 512) == BLKIF_RSP_OKAY
    assert image.read(0, [bench.buffer(512)], 512, Done()) == BLKIF_RSP_OKAY, "RWF_NOWAIT is still used"


def test_locks(bench: Bench) -> None:
    """Goal: one writer, or any number of readers.  Method: every pair in one process."""
    path = bench.file()
    first, second = bench.open(path, readonly=True), bench.open(path, readonly=True)
    with pytest.raises(StorageError, match=r"disk\.img is in use by another"):
        bench.open(path)
    first.close()
    second.close()
    writer = bench.open(path)
    for readonly in (True, False):
        with pytest.raises(StorageError, match=r"disk\.img is in use by another"):
            bench.open(path, readonly=readonly)
    before = open_files()
    with pytest.raises(StorageError):
        bench.open(path)
    assert open_files() == before, "a refused image is closed"
    writer.close()
    bench.open(path)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing there": (lambda p: None, "No such file"),
    "a directory": (lambda p: p.mkdir(), "neither a regular file nor a block device"),
    "a pipe": (lambda p: os.mkfifo(p), "neither a regular file nor a block device"),
    "empty": (lambda p: p.write_bytes(b""), "smaller than one block of 512 bytes"),
    "half a sector": (lambda p: p.write_bytes(b"x" * 511), "smaller than one block of 512 bytes"),
    "a loop of links": (lambda p: p.symlink_to(p), "Too many levels of symbolic links"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image(bench: Bench, name: str) -> None:
    """Goal: a StorageError with path and reason, at once (a pipe must not be waited for), no descriptor left."""
    make, reason = REFUSED[name]
    path = bench.path / "thing"
    make(path)
    before = open_files()
    with pytest.raises(StorageError) as caught:
        bench.open(str(path), readonly=True)
    assert reason in str(caught.value) and str(path) in str(caught.value)
    assert open_files() == before


@pytest.mark.parametrize("readonly", [True, False])
def test_a_path_that_is_none(bench: Bench, readonly: bool) -> None:
    """Goal: a NUL in the path is a StorageError like any other, and shown as what it is.  Method: one in the middle."""
    with pytest.raises(StorageError, match=r"cannot open disk image '/x\\x00y': embedded null byte"):
        bench.open("/x\0y", readonly=readonly)


def test_readonly(bench: Bench) -> None:
    image = bench.open(bench.file(), readonly=True)
    assert image.discard_granularity == 0 and image.readonly
    assert bench.run(image, "flush") == BLKIF_RSP_OKAY
    assert fcntl.fcntl(image.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def test_slow_writes_move_to_the_workers(bench: Bench) -> None:
    """Goal: after a write that took long small writes do not hold up the loop, until those sent to workers are done.
    Method: a clock that jumps during the first write; then a clock that stands still."""
    image = bench.open(bench.file(4 * MIB), clock=lambda: bench.now)
    ticks = iter([0.0, 2 * SLOW_WRITE_S])
    image.clock = lambda: next(ticks, 1.0)
    small, request = [bench.buffer(4096)], Done()
    assert image.write(0, small, 4096, request) == BLKIF_RSP_OKAY
    assert image.write(4096, small, 4096, request) == PENDING
    assert image.write(8192, small, 4096, request) == PENDING
    bench.wait(image)
    assert image.write(0, small, 4096, request) == BLKIF_RSP_OKAY
    assert image.write(0, small, 4096, request) == BLKIF_RSP_OKAY and request.statuses == [BLKIF_RSP_OKAY] * 2


def test_many_jobs_and_no_stale_wakeup(bench: Bench) -> None:
    """Goal: every job completes once, and when all are reaped the eventfd is quiet (or the loop would spin).
    Method: rounds of jobs reaped as fast as possible, without waiting for the descriptor; then a poll of it."""
    image = bench.open(bench.file())
    request = Done()
    for round_ in range(100):
        for _ in range(4):
            assert image.flush(request) == PENDING if round_ % 30 == 0 else image.discard(0, 4096, request) == PENDING
        while image.outstanding:
            bench.workers.reap()
        bench.workers.reap()
        assert select.select([bench.workers.fd], [], [], 0)[0] == [], f"round {round_}"
    assert request.statuses == [BLKIF_RSP_OKAY] * 400
