"""image.py (edge): a raw file or block device as a Storage. preadv/pwritev straight into and out of guest pages.

Called by blkback; owns the image's descriptor and, with its fellows, a few worker threads. What the page cache can answer
is answered at once (RWF_NOWAIT says so); what would wait for the medium goes to a worker, and the loop reaps it.

Small writes go into the page cache from the loop while the host takes them quickly; one that took long (dirty throttling,
a journal commit) sends the following ones to the workers until they are quick again. Large writes always go to a worker,
which copies while the loop already reads the next request.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import logging
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

from blockdev.storage import PENDING, Backing, Request, StorageError
from xenmodel.public.io.blkif import BLKIF_RSP_EOPNOTSUPP, BLKIF_RSP_ERROR, BLKIF_RSP_OKAY, SECTOR_SIZE

log = logging.getLogger("xenfs.image")

WORKERS = 4
MOST_JOBS = 16  # of one image with the workers at a time
INLINE_WRITE_BYTES = 64 * 1024
SLOW_WRITE_S = 0.002
IOV_MAX = os.sysconf("SC_IOV_MAX")
BLKSSZGET, BLKPBSZGET = 0x1268, 0x127B
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
DISCARD_GRANULARITY = 4096  # what a file system's hole punching works in

_preadv, _NOWAIT = os.preadv, os.RWF_NOWAIT  # looked up once, for they are needed by every read
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

Job = tuple["Image", str, Any, Any, Request]


class Workers:
    """A fixed number of threads for what may wait. `fd` becomes readable when something is done; then call reap()."""

    def __init__(self, count: int = WORKERS) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._filling: dict[int, tuple[Job, list[tuple[int, int]]]] = {}  # reads not reaped yet, by id()
        # `fd` is readable exactly while something is in `_done`: else the loop would spin, or sleep too long
        self._done: list[tuple[Job, int]] = []
        self._done_lock = threading.Lock()
        self._threads = [threading.Thread(target=self._work, name=f"disk-{i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def put(self, job: Job) -> None:
        if job[1] == "preadv":
            self._filling[id(job)] = job, []
        self._jobs.put(job)

    def filling(self) -> Iterator[tuple[int, int]]:
        """Where in our memory a worker may be writing just now: addresses of first bytes, and after last ones."""
        for (_, _, views, _, _), places in self._filling.values():
            if not places:
                for view in views:
                    start = ctypes.addressof(ctypes.c_char.from_buffer(view))
                    places.append((start, start + len(view)))
            yield from places

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            image, what, first, second, _ = job
            status = image.perform(what, first, second)
            with self._done_lock:
                if not self._done:  # one wake-up for all that is done before the loop looks
                    os.eventfd_write(self.fd, 1)
                self._done.append((job, status))

    def reap(self) -> bool:
        """Complete what is done; True if there was anything. Called from the loop."""
        if not self._done:
            return False
        with self._done_lock:
            os.eventfd_read(self.fd)
            done, self._done = self._done, []
        for job, status in done:
            self._filling.pop(id(job), None)
            image, what, _, _, request = job
            image.job_done(what)
            request.complete(status)
        return True

    def close(self, timeout_s: float = 10.0) -> bool:
        """End the threads; False if one is still waiting for its medium after that time, and is left behind."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(timeout_s / len(self._threads))
        if any(thread.is_alive() for thread in self._threads):
            log.error("a disk operation has not finished within %g s: its outcome is not known", timeout_s)
            return False
        os.close(self.fd)
        return True


class Image:
    """`clock` gives seconds (time.perf_counter). Opens and locks at once; StorageError names the path and the reason."""

    def __init__(self, backing: Backing, workers: Workers, clock: Callable[[], float]) -> None:
        self.path = backing.path
        self.readonly = backing.readonly
        self.workers = workers
        self.clock = clock
        self.outstanding = self.writes_outstanding = 0
        self.direct = backing.direct_io
        self._nowait_reads = not backing.direct_io  # O_DIRECT waits whatever the flag says
        self._slow_writes = False
        self._parked: deque[Job] = deque()
        self._failed: set[str] = set()  # operations that were logged already
        flags = (os.O_RDONLY if self.readonly else os.O_RDWR) | os.O_CLOEXEC | (os.O_DIRECT if self.direct else 0)
        try:
            if not self.readonly and stat.S_ISBLK(os.stat(self.path).st_mode):
                flags |= os.O_EXCL  # EBUSY if it is mounted or otherwise claimed
            self.fd = os.open(self.path, flags | os.O_NONBLOCK)  # a pipe would make us wait for its writer
            os.set_blocking(self.fd, True)
        except OSError as error:
            raise StorageError(f"cannot open disk image {self.path}: {error.strerror}") from error
        except ValueError as error:  # a NUL in it
            raise StorageError(f"cannot open disk image {self.path!r}: {error}") from error
        try:
            self._check(backing)
        except OSError as error:
            os.close(self.fd)
            raise StorageError(f"cannot use disk image {self.path}: {error.strerror}") from error
        except StorageError:
            os.close(self.fd)
            raise

    def _check(self, backing: Backing) -> None:
        mode = os.fstat(self.fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise StorageError(f"disk image {self.path} is neither a regular file nor a block device")
        logical, physical = SECTOR_SIZE, SECTOR_SIZE
        if stat.S_ISBLK(mode):
            logical, physical = _ioctl_u32(self.fd, BLKSSZGET), _ioctl_u32(self.fd, BLKPBSZGET)
        self.sector_size = backing.sector_size or logical
        self.physical_sector_size = backing.physical_sector_size or max(physical, self.sector_size)
        try:
            fcntl.flock(self.fd, (fcntl.LOCK_SH if self.readonly else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(f"disk image {self.path} is in use by another writer") from error
        loop = _loop_device_of(self.path) if stat.S_ISREG(mode) and not self.readonly else None
        if loop is not None:
            raise StorageError(f"disk image {self.path} is in use: {loop} is set up on it")
        self.discard_granularity = 0 if self.readonly else DISCARD_GRANULARITY
        self.sectors = self._size()
        if not self.sectors:
            raise StorageError(f"disk image {self.path} is smaller than one block of {self.sector_size} bytes")

    def _size(self) -> int:
        size = os.lseek(self.fd, 0, os.SEEK_END)
        return size // self.sector_size * (self.sector_size // SECTOR_SIZE)

    def refresh(self) -> bool:
        """Look at the size again; True if it changed (blkback then says so)."""
        try:
            sectors = self._size()
        except OSError as error:
            log.error("disk image %s: its size cannot be read: %s", self.path, error.strerror)
            return False
        changed, self.sectors = sectors != self.sectors, sectors
        return changed

    # --- Storage ---------------------------------------------------------------------------------------------------

    def read(self, offset: int, views: list[memoryview], length: int, request: Request) -> int:
        if self._nowait_reads:
            try:
                if _preadv(self.fd, views, offset, _NOWAIT) == length:
                    return BLKIF_RSP_OKAY
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP:
                    self._nowait_reads = False
                elif len(views) <= IOV_MAX:
                    return self._error("read", error)
        return self._later("preadv", views, offset, request)

    def write(self, offset: int, views: list[memoryview], length: int, request: Request) -> int:
        if length > INLINE_WRITE_BYTES or self.direct or self._slow_writes:
            self.writes_outstanding += 1
            return self._later("pwritev", views, offset, request)
        started = self.clock()
        status = self._transfer("pwritev", views, offset)
        self._slow_writes = self.clock() - started > SLOW_WRITE_S
        if self._slow_writes:
            log.debug("%s: a write of %d bytes took long; writing from workers", self.path, length)
        return status

    def flush(self, request: Request) -> int:
        return BLKIF_RSP_OKAY if self.readonly else self._later("flush", 0, 0, request)

    def discard(self, offset: int, length: int, request: Request) -> int:
        return self._later("discard", offset, length, request) if length else BLKIF_RSP_OKAY

    def close(self) -> None:
        """The caller has waited for everything it asked for."""
        assert not self.outstanding, f"{self.path} closed with {self.outstanding} operations under way"
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # --- in a worker, or here when it will not wait -------------------------------------------------------------------

    def _later(self, what: str, first: Any, second: Any, request: Request) -> int:
        """To a worker; a guest that asks for much waits here, not in front of the others."""
        self.outstanding += 1
        if self.outstanding > MOST_JOBS:
            self._parked.append((self, what, first, second, request))
        else:
            self.workers.put((self, what, first, second, request))
        return PENDING

    def job_done(self, what: str) -> None:
        """A worker has finished one of ours. When all writes are done, the loop tries again whether the host is quick."""
        self.outstanding -= 1
        if self._parked:
            self.workers.put(self._parked.popleft())
        if what == "pwritev":
            self.writes_outstanding -= 1
            if not self.writes_outstanding:
                self._slow_writes = False

    def perform(self, what: str, first: Any, second: Any) -> int:
        if what == "flush":
            return self._flush()
        if what == "discard":
            return self._discard(first, second)
        return self._transfer(what, first, second)

    def _transfer(self, what: str, views: list[memoryview], offset: int) -> int:
        """preadv or pwritev until everything is moved; a short read is an image that was cut."""
        move = os.preadv if what == "preadv" else os.pwritev
        try:
            done = move(self.fd, views[:IOV_MAX], offset)
            while (left := sum(map(len, views)) - done) > 0:
                if done == 0:
                    raise OSError(errno.EIO, f"the image ends {left} bytes early")
                views, offset = _rest(views, done), offset + done
                done = move(self.fd, views[:IOV_MAX], offset)
        except OSError as error:
            return self._error(what, error)
        return BLKIF_RSP_OKAY

    def _flush(self) -> int:
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            return self._error("fdatasync", error)
        return BLKIF_RSP_OKAY

    def _discard(self, offset: int, length: int) -> int:
        if _libc.fallocate(self.fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, offset, length) == 0:
            return BLKIF_RSP_OKAY
        number = ctypes.get_errno()
        if number == errno.EOPNOTSUPP:
            return BLKIF_RSP_EOPNOTSUPP
        return self._error("discard", OSError(number, os.strerror(number)))

    def _error(self, what: str, error: OSError) -> int:
        if what not in self._failed:  # a bad disk must not flood the log
            self._failed.add(what)
            log.error("disk image %s: %s failed: %s (further ones are not logged)", self.path, what, error.strerror)
        return BLKIF_RSP_ERROR


def _ioctl_u32(fd: int, number: int) -> int:
    return int.from_bytes(fcntl.ioctl(fd, number, bytes(4)), "little")


def _loop_device_of(image: str) -> str | None:
    """The loop device that is set up on this file, if any: a loop device takes no lock.

    By name alone: to look at the file behind a loop device may mean to ask ourselves, and to wait for ever.
    """
    name = os.path.realpath(image)
    for path in glob.glob("/sys/block/loop*/loop/backing_file"):
        with contextlib.suppress(OSError), open(path, errors="surrogateescape") as file:  # gone meanwhile
            if file.read().rstrip("\n") == name:
                return "/dev/" + path.split("/")[3]
    return None


def _rest(views: list[memoryview], done: int) -> list[memoryview]:
    """What is left of `views` after `done` bytes."""
    for i, view in enumerate(views):
        if done < len(view):
            return [view[done:], *views[i + 1 :]]
        done -= len(view)
    return []
