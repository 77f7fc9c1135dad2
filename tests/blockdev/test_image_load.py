"""Goal: one image that is asked for much does not hold up another, and one that cannot be used is refused and closed.
Method: workers without threads, whose queue the test counts and works off; descriptors whose system calls really fail."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev.image import MOST_JOBS, Image, Workers
from blockdev.storage import PENDING, Backing, StorageError
from tests.descriptors import open_files
from xenmodel.public.io.blkif import BLKIF_RSP_OKAY

MIB = 1 << 20


class ByHand(Workers):
    """No threads: `work()` does what is in the queue now, in this thread."""

    def __init__(self) -> None:
        super().__init__(0)

    @property
    def queued(self) -> int:
        return self._jobs.qsize()

    def work(self) -> None:
        self._jobs.put(None)  # where a worker ends
        self._work()
        self.reap()


class Done:
    """A request that notes its completion in a list shared by all."""

    def __init__(self, name: str, log: list[tuple[str, int]]) -> None:
        self.name, self.log = name, log

    def complete(self, status: int) -> None:
        self.log.append((self.name, status))


@pytest.fixture
def workers() -> Iterator[ByHand]:
    by_hand = ByHand()
    yield by_hand
    by_hand.close()


def open_image(path: Path, workers: Workers) -> Image:
    with path.open("wb") as file:
        file.truncate(MIB)
    return Image(Backing(str(path)), workers, lambda: 0.0)


def ask(image: Image, what: str, request: Done) -> int:
    if what == "flush":
        return image.flush(request)
    if what == "discard":
        return image.discard(0, 4096, request)
    return image.write(0, [memoryview(bytes(MIB))], MIB, request)


@pytest.mark.parametrize("what", ["flush", "discard", "write"])
def test_one_image_cannot_fill_the_queue(tmp_path: Path, workers: ByHand, what: str) -> None:
    """Goal: however much one image is asked, another's request waits behind at most MOST_JOBS; all complete once, in order.
    Method: many times MOST_JOBS for one, one for another; rounds of work."""
    log: list[tuple[str, int]] = []
    busy, other = open_image(tmp_path / "busy", workers), open_image(tmp_path / "other", workers)
    many = 5 * MOST_JOBS + 3
    for i in range(many):
        assert ask(busy, what, Done(f"busy{i}", log)) == PENDING
    assert workers.queued == MOST_JOBS and busy.outstanding == many
    assert ask(other, what, Done("other", log)) == PENDING
    assert workers.queued == MOST_JOBS + 1
    workers.work()
    assert ("other", BLKIF_RSP_OKAY) in log and other.outstanding == 0
    while busy.outstanding:
        assert 0 < workers.queued <= MOST_JOBS
        workers.work()
    log.remove(("other", BLKIF_RSP_OKAY))
    assert log == [(f"busy{i}", BLKIF_RSP_OKAY) for i in range(many)]
    assert workers.queued == 0 and busy.writes_outstanding == 0
    for image in (busy, other):
        image.close()


def test_more_while_some_are_parked(tmp_path: Path, workers: ByHand) -> None:
    """Goal: a completion that asks for more (as a guest does) neither overtakes what is parked nor lets the queue grow.
    Method: every completion asks again, until there were enough."""
    log: list[tuple[str, int]] = []
    image = open_image(tmp_path / "busy", workers)
    asked = 2 * MOST_JOBS

    class Again(Done):
        def complete(self, status: int) -> None:
            nonlocal asked
            super().complete(status)
            if asked < 10 * MOST_JOBS:
                asked += 1
                image.flush(Again(str(asked - 1), log))

    for i in range(asked):
        image.flush(Again(str(i), log))
    while image.outstanding:
        assert 0 < workers.queued <= MOST_JOBS
        workers.work()
    assert [name for name, _ in log] == [str(i) for i in range(10 * MOST_JOBS)]
    image.close()


def test_an_image_that_cannot_be_used(workers: ByHand) -> None:
    """Goal: an error after open() is a StorageError with path and reason too, and the descriptor is closed.
    Method: /proc/self/mem, a regular file whose end lseek(2) refuses to look for."""
    before = open_files()
    with pytest.raises(StorageError, match="cannot use disk image /proc/self/mem: Invalid argument"):
        Image(Backing("/proc/self/mem", readonly=True), workers, lambda: 0.0)
    assert open_files() == before


def test_a_size_that_cannot_be_read(tmp_path: Path, workers: ByHand, caplog: pytest.LogCaptureFixture) -> None:
    """Goal: SIGHUP over a medium that went away changes nothing and is logged.
    Method: a pipe takes the place of the open file, so that lseek(2) fails; then a file again."""
    image = open_image(tmp_path / "disk.img", workers)
    file = os.dup(image.fd)
    reader, writer = os.pipe()
    os.dup2(reader, image.fd)
    with caplog.at_level(logging.ERROR, "xenfs.image"):
        assert image.refresh() is False and image.sectors == MIB // 512
    assert str(tmp_path / "disk.img") in caplog.text and "Illegal seek" in caplog.text
    os.dup2(file, image.fd)
    os.truncate(file, 2 * MIB)
    assert image.refresh() is True and image.sectors == 2 * MIB // 512
    for fd in (file, reader, writer):
        os.close(fd)
    image.close()


def test_a_worker_that_hangs_does_not_keep_the_end() -> None:
    """Goal: a medium that never answers cannot keep the process: close() says so after its time.
    Method: a job that waits for an event; afterwards the event, so that the thread ends."""
    workers, release = Workers(1), threading.Event()

    class Stuck:
        def perform(self, what: str, first: object, second: object) -> int:
            release.wait(30)
            return BLKIF_RSP_OKAY

    workers.put((Stuck(), "flush", 0, 0, None))  # type: ignore[arg-type]
    assert workers.close(timeout_s=0.2) is False
    release.set()
    for thread in workers._threads:
        thread.join(30)
    os.close(workers.fd)
