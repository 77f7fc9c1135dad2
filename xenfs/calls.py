"""calls.py: runs the ioctls that have to reach into their caller's memory, or that take more than one turn.

An ioctl here is a job (sysdev/steps.py). What of the caller's memory it asks for may be anywhere: in a file on a stuck disk,
in a file of this very mount, in memory that another process hands out page by page (userfaultfd). Whoever touches it waits,
perhaps for ever, so the loop does not: threads of that domain do, a few, so that a domain can only keep itself waiting.
There is one short cut: a few bytes of a process with our own user id in our own pid namespace, which could kill us anyway.
Who calls is told by a thread, too, once for each open file (Callers). And as most threads are done at once, the loop waits
for one a moment if nobody else wants anything: a trip through epoll costs more.

Invariants: a request is answered once; a frame that a thread fills is not moved meanwhile (`filling`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Any

from sysdev.steps import Caller, Job, MapAt, Maps, Pause, Read, Step, TransferIn, TransferOut, Who, Write
from xenfs import caller
from xenfs.fuse.tree import Ioctl

log = logging.getLogger("xenfs.calls")

THREADS_MOST = 4  # of a domain
JOBS_MOST = 64  # of a guest, under way at a time: as many processes or threads of it can call at once
CALLERS_MOST = 64  # threads that are remembered for an open file
SHORT_BYTES = caller.SMALL_BYTES  # a short cut takes no more
MOMENT_S = 200e-6  # of one turn of a job
SLOW_S = 0.1  # no moment for a domain that was given one in vain

Result = int | tuple[int, bytes]  # what ioctl(2) returns, and bytes for the structure that FUSE brings back


class Running:
    """A job, and what it answers, if anything."""

    __slots__ = ("answered", "calls", "job", "near", "request", "step")

    def __init__(self, calls: DomainCalls, request: Ioctl | None, job: Job[Any], near: bool) -> None:
        self.calls = calls
        self.request = request
        self.job = job
        self.near = near  # as a Caller's; until it is known: no
        self.step: Step | None = None  # what a thread does for it
        self.answered = False  # its caller was killed and has its answer

    @property
    def key(self) -> int:
        return self.request.unique if self.request is not None else -id(self)

    @property
    def pid(self) -> int:
        return self.request.pid if self.request is not None else 0


class Calls:
    """All of them. `fd` becomes readable when a thread has finished something; then call step()."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.uid = os.geteuid()
        self._next: deque[Running] = deque()  # had a turn, want another
        self._waiting: list[Running] = []  # for anything to happen
        self._done: list[tuple[Running, Any, OSError | None]] = []
        self._done_lock = threading.Lock()
        self._came = threading.Lock()  # free when something has come since the last look
        self.is_quiet: Callable[[], bool] = lambda: True  # nobody else wants anything just now
        self._far: dict[int, Running] = {}  # whose step a thread has; by number of the request, or id() without one
        self._signalled: list[Running] = []  # of those: the caller had a signal, and may be killed by now
        self.on_signalled: Callable[[], None] = lambda: None  # give_up_killed() has to look again, in a while

    def filling(self) -> Iterator[tuple[int, int]]:
        """Where in our memory a thread may be writing just now: addresses of first bytes, and after last ones."""
        for running in self._far.values():
            for _, view in running.step.pieces if isinstance(running.step, TransferIn) else ():
                start = ctypes.addressof(ctypes.c_char.from_buffer(view))
                yield start, start + len(view)

    def step(self) -> bool:
        """Go on with what can go on, each for one turn; True if some want another at once, or if memory is filled now, for
        which others (the arena) may have waited."""
        filled = False
        if self._done:
            with self._done_lock:
                os.eventfd_read(self.fd)
                done, self._done = self._done, []
            for running, value, error in done:
                filled |= self.reaped(running, value)
                if running.answered:  # once: what it does to clean up has its turns
                    value, error = None, OSError(errno.EINTR, "the caller was killed")  # its file may be closed by now
                self.advance(running, value, error)
        for _ in range(len(self._next)):
            self.advance(self._next.popleft())
        waiting, self._waiting = self._waiting, []
        for running in waiting:
            self.advance(running)
        return bool(self._next) or filled

    def finished(self, running: Running, value: Any, error: OSError | None) -> None:
        """In a thread: a step is done."""
        with self._done_lock:
            if not self._done and self.fd >= 0:
                os.eventfd_write(self.fd, 1)
            self._done.append((running, value, error))
            if self._came.locked():
                self._came.release()

    def reaped(self, running: Running, value: Any) -> bool:
        """Its step is done; True if that filled memory of ours."""
        if isinstance(value, Caller):
            running.near = value.near
        running.calls.queued -= 1
        step, running.step = running.step, None
        self._far.pop(running.key, None)
        return isinstance(step, TransferIn)

    def _await(self, running: Running, until: float) -> tuple[Any, OSError | None] | None:
        """The result of its step if a thread has it that soon; else step() will find it."""
        while self._came.acquire(timeout=max(0.0, until - time.perf_counter())):
            with self._done_lock:
                for done in self._done:
                    if done[0] is running:
                        self._done.remove(done)
                        if not self._done:
                            os.eventfd_read(self.fd)
                        self.reaped(running, done[1])
                        return done[1:]
        return None

    def advance(self, running: Running, value: Any = None, error: OSError | None = None) -> None:
        """Let a job go on, with the result of its last step, until it has to wait for something."""
        calls, job = running.calls, running.job
        until = time.perf_counter() + MOMENT_S
        try:
            while True:
                step = job.send(value) if error is None else job.throw(error)
                if isinstance(step, Pause):
                    (self._next if step is Pause.TURN else self._waiting).append(running)
                    return
                if self._is_short(running, step):
                    value, error = _try(_near, running.pid, step)
                    continue
                running.step = step
                self._far[running.key] = running
                calls.put(running, step)
                if calls.queued > 1 or until < calls.slow_until or not self.is_quiet():
                    return
                done = self._await(running, until)
                if done is None:
                    calls.slow_until = until + SLOW_S
                    return
                value, error = done
        except StopIteration as stop:
            calls.under_way -= 1
            if running.request is not None and not running.answered:
                result, data = stop.value if isinstance(stop.value, tuple) else (stop.value, b"")
                running.request.session.send_ioctl(running.request.unique, result, data[: running.request.out_size])
        except OSError as failure:
            calls.under_way -= 1
            assert running.request is not None, f"a job of our own fails: {failure}"
            if not running.answered:
                running.request.session.send_error(running.request.unique, failure.errno or errno.EIO)

    # --- callers that are killed -------------------------------------------------------------------------------------

    def interrupt(self, unique: int) -> bool:
        """A request's caller had a signal. Only one that kills it counts, as in a kernel that waits for a page; but without
        an answer it cannot die, nor its memory go. Linux tells us of the first signal only: give_up_killed() looks again."""
        running = self._far.get(unique)
        if running is None or running.answered:
            return False
        if not self._give_up(running):
            self._signalled.append(running)
            self.on_signalled()
        return True

    def give_up_killed(self) -> None:
        """Look again at those who had a signal."""
        still = [running for running in self._signalled if self._far.get(running.key) is running]
        self._signalled = [running for running in still if not self._give_up(running)]
        if self._signalled:
            self.on_signalled()

    def _give_up(self, running: Running) -> bool:
        """Answer it if its caller is killed. The job learns of it when the thread is back."""
        if not caller.killed(running.pid):
            return False
        assert running.request is not None, "only callers have signals"
        running.answered = True
        running.request.session.send_error(running.request.unique, errno.EINTR)
        return True

    def _is_short(self, running: Running, step: Step) -> bool:
        if not running.near or running.request is None or running.request.uid != self.uid:
            return False
        match step:
            case Read(_, length):
                return length <= SHORT_BYTES
            case Write(_, data):
                return len(data) <= SHORT_BYTES
        return isinstance(step, MapAt)

    def close(self) -> None:
        with self._done_lock:  # a thread that was left behind may come back yet
            os.close(self.fd)
            self.fd = -1


class DomainCalls:
    """Those of one domain."""

    def __init__(self, calls: Calls, domid: int) -> None:
        self.calls = calls
        self.domid = domid
        self.under_way = 0
        self.queued = 0  # steps that are not reaped
        self.slow_until = 0.0
        self.closed = False
        self._threads: list[threading.Thread] = []
        self._queue: SimpleQueue[tuple[Running, Step] | None] = SimpleQueue()

    def run(self, request: Ioctl | None, job: Job[Any], near: bool = False) -> None:
        """Begin a job. Its Result answers `request`, if there is one; a job of our own never fails. `near` as a Caller's.

        OSError EAGAIN if the domain has too many under way."""
        if self.under_way >= JOBS_MOST and self.domid and request is not None:
            raise OSError(errno.EAGAIN, "too many ioctls of this domain are under way")
        self.under_way += 1
        self.calls.advance(Running(self, request, job, near))

    def interrupt(self, unique: int) -> bool:
        """As a Node's."""
        return self.calls.interrupt(unique)

    def put(self, running: Running, step: Step) -> None:
        """Have a thread do it."""
        self.queued += 1
        if self.closed or running.answered:
            self._fail(running, errno.EINTR if running.answered else errno.ENODEV)
            return
        if self.queued > len(self._threads) < THREADS_MOST:
            thread = threading.Thread(target=self._work, name=f"caller-{self.domid}", daemon=True)
            try:
                thread.start()
                self._threads.append(thread)
            except RuntimeError:  # the host has no more
                if not self._threads and running.request is not None:
                    self._fail(running, errno.EAGAIN)
                    return
        self._queue.put((running, step))

    def _fail(self, running: Running, number: int) -> None:
        """A step that will not be done. The job learns of it in its next turn; one of our own, which cannot fail, ends."""
        if running.request is not None:
            self.calls.finished(running, None, OSError(number, os.strerror(number)))
            return
        self.calls.reaped(running, None)
        self.under_way -= 1
        running.job.close()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            running, step = item
            if running.answered:  # while it was in the queue: its number may be another process' by now
                value, error = None, None
            else:
                value, error = _try(_far, running.pid, step)
            self.calls.finished(running, value, error)

    def close(self) -> None:
        """The domain is gone: jobs that ask for another step get ENODEV, also those that were in the queue. A thread that
        waits for its caller's memory is left behind."""
        self.closed = True
        with contextlib.suppress(Empty):
            while True:
                item = self._queue.get_nowait()
                assert item is not None, "closed once"
                self._fail(item[0], errno.ENODEV)
        for _ in self._threads:
            self._queue.put(None)


class Callers:
    """Who calls through one open file. What is known of a thread is kept, for to ask takes a thread of ours; so a file that
    is handed on could show, to who gets the number of a thread that has ended, the name of that one."""

    def __init__(self, calls: DomainCalls) -> None:
        self.calls = calls
        self._known: dict[int, Caller] = {}

    def run(self, request: Ioctl, job: Job[Result]) -> None:
        """As DomainCalls'; before the job begins it is known who calls."""
        known = self._known.get(request.pid)
        if known is not None:
            self.calls.run(request, job, known.near)
        else:
            self.calls.run(request, self._introduced(request.pid, job))

    def who(self, pid: int) -> Job[Caller]:
        known = self._known.get(pid)
        if known is None:
            known = yield Who()
            if len(self._known) >= CALLERS_MOST:
                self._known.clear()
            self._known[pid] = known
        return known

    def _introduced(self, pid: int, job: Job[Result]) -> Job[Result]:
        yield from self.who(pid)
        return (yield from job)


def _try(do: Callable[[int, Step], Any], pid: int, step: Step) -> tuple[Any, OSError | None]:
    """The result of a step, or why there is none."""
    try:
        return do(pid, step), None
    except OSError as error:
        return None, error


def _near(pid: int, step: Step) -> Any:
    """The short cut."""
    match step:
        case Read(address, length):
            return caller.read(pid, address, length)
        case Write(address, data):
            return caller.write(pid, address, data)
        case MapAt(address, device, inode):
            return _map_at(pid, address, device, inode)
    raise AssertionError(f"{step} is not short")


def _map_at(pid: int, address: int, device: int, inode: int) -> int | None:
    at = caller.mapping_at(pid, address, device, inode)
    return None if at is None else at.offset + address - at.start


def _far(pid: int, step: Step) -> Any:
    """In a thread."""
    match step:
        case Who():
            return caller.look(pid)
        case Read(address, length):
            data = bytearray(length)
            caller.transfer_in(pid, [(address, memoryview(data))])
            return bytes(data)
        case Write(address, data):
            caller.transfer_out(pid, [(memoryview(data), address)])
        case TransferIn(pieces):
            caller.transfer_in(pid, pieces)
        case TransferOut(pieces):
            caller.transfer_out(pid, pieces)
        case Maps(pids, device, inode, offsets):
            return caller.pages_mapped(pids, device, inode, offsets)
        case MapAt(address, device, inode):
            return _map_at(pid, address, device, inode)
    return None
