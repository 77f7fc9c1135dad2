"""Goal: who waits for memory that nobody hands out waits alone, and not longer than its domain lives.
Method: real processes with a userfaultfd that they do not serve, until it is closed; real threads, looked at in /proc."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from sysdev.steps import Job, Maps, Pause, Read, TransferIn, TransferOut, Write
from tests.descriptors import open_files
from tests.filling import touched
from tests.xenfs.callbench import Desk, do, threads, waiting_threads
from tests.xenfs.programs import PAGE, Program
from xenfs.calls import THREADS_MOST


@pytest.fixture
def desk() -> Iterator[Desk]:
    it = Desk()
    yield it
    it.close()


# --- who is stuck --------------------------------------------------------------------------------------------------------


@pytest.mark.host
def test_who_is_stuck_is_stuck_alone(desk: Desk):
    """Goal: a domain whose processes' memory is not handed out keeps THREADS_MOST threads waiting, no more; its other
    requests wait behind, another domain's and the loop do not.  Method: userfaultfd; then it is closed, and all goes on."""
    program, fd, stuck = desk.stuck()
    good = program("pages(1)")
    asked = [desk.ask(do(Read(stuck, 8)), program.pid, out_size=8) for _ in range(THREADS_MOST)]
    desk.until(lambda: waiting_threads() == THREADS_MOST)
    asked += [desk.ask(do(Read(good, 8)), program.pid, out_size=8) for _ in range(3)]
    for domid in 2, 0:
        assert desk.answer(desk.ask(do(Read(good, 8)), program.pid, domid, out_size=8)) == (0, 7, bytes(8))
    assert desk.answer(desk.ask(do(Read(good, 8)), program.pid, uid=os.geteuid()))[0] == 0, "the short cut is open"
    desk.calls.step()
    assert not any(desk.answers[one] for one in asked) and threads(1) == THREADS_MOST
    program(f"os.close({fd})")
    assert {desk.answer(one) for one in asked} == {(0, 7, bytes(8))}
    assert desk.domains[1].under_way == desk.domains[1].queued == 0


@pytest.mark.host
def test_one_stuck_leaves_threads_for_others(desk: Desk):
    """Goal: until all threads of a domain are stuck its other requests are served, also after many.
    Method: hundreds of requests, then three stuck ones, one by one, and good ones after each."""
    program, _, stuck = desk.stuck(4)
    good = program("pages(1)")
    for _ in range(300):
        desk.answer(desk.ask(do(Read(good, 8)), program.pid))
    for i in range(THREADS_MOST - 1):
        desk.ask(do(Read(stuck + i * PAGE, 8)), program.pid)
        desk.until(lambda expected=i + 1: waiting_threads() == expected)  # type: ignore[misc]
        for _ in range(20):
            assert desk.answer(desk.ask(do(Read(good, 8)), program.pid))[0] == 0
    program.process.kill()
    desk.until(lambda: all(desk.answers.values()))


@pytest.mark.host
def test_fills(desk: Desk):
    """Goal: memory of ours may not be moved from before a thread may write to it until it is known to be done: exactly for
    TransferIn, exactly its bytes.  Method: one of two pieces is stuck; ranges around; TransferOut and Read beside it."""
    program, fd, stuck = desk.stuck()
    good = program("pages(1)")
    view, fills = memoryview(bytearray(4 * PAGE)), partial(touched, desk.calls.filling)
    base = ctypes.addressof(ctypes.c_char.from_buffer(view))
    assert not fills([range(base, base + 4 * PAGE)])
    asked = [
        desk.ask(do(TransferIn([(good, view[100:200]), (stuck, view[PAGE : PAGE + 8])])), program.pid),
        desk.ask(do(TransferOut([(view[2 * PAGE : 3 * PAGE], stuck)])), program.pid),
        desk.ask(do(Read(stuck, 8)), program.pid),
    ]
    for inside in range(base, base + PAGE), range(base + 199, base + 300), range(base, base + 101):
        assert fills([inside]) and fills([range(5, 9), inside])
    assert fills([range(base + PAGE + 7, base + 2 * PAGE)])
    outside = [range(base, base + 100), range(base + 200, base + PAGE), range(base + PAGE + 8, base + 4 * PAGE)]
    assert not fills(outside) and not fills([])
    desk.until(lambda: waiting_threads() == 3)
    program(f"os.close({fd})")
    while waiting_threads():
        time.sleep(0.001)
    desk.wait()
    assert fills([range(base, base + PAGE)]), "until step() has seen it"
    again = []
    while not all(desk.answers[one] for one in asked):
        desk.wait()
        again.append(desk.calls.step())
    assert not fills([range(base, base + 4 * PAGE)])
    assert any(again), "who waited for that memory has to be asked again"


@pytest.mark.host
def test_fills_until_an_error(desk: Desk):
    """Goal: a TransferIn that fails is over, too.  Method: behind the stuck page is a bad pointer."""
    program, fd, stuck = desk.stuck()
    view = memoryview(bytearray(16))
    asked = desk.ask(do(TransferIn([(stuck, view[:8]), (8, view[8:])])), program.pid)
    where = ctypes.addressof(ctypes.c_char.from_buffer(view))
    desk.until(lambda: waiting_threads() == 1)
    assert touched(desk.calls.filling, [range(where, where + 16)])
    program(f"os.close({fd})")
    assert desk.answer(asked) == (errno.EFAULT, 0, b"")
    assert not touched(desk.calls.filling, [range(where, where + 16)])


# --- who is killed -------------------------------------------------------------------------------------------------------


def held(program: Program, fd: int) -> int:
    """That userfaultfd as ours, so that it outlives the program."""
    pidfd = os.pidfd_open(program.pid)
    ours: int = ctypes.CDLL(None).syscall(438, pidfd, fd, 0)  # pidfd_getfd(2)
    os.close(pidfd)
    assert ours >= 0
    return ours


@pytest.mark.host
def test_a_caller_that_is_killed(desk: Desk):
    """Goal: it has its answer while the thread still waits for its memory, and no second one; its job learns of it once, and
    has all the turns that it needs to clean up, but reaches for no memory any more.  Method: a signal that does not kill,
    one that does; then the memory is handed out."""
    program, fd, stuck = desk.stuck()
    ours, notes, signalled = held(program, fd), [], []
    desk.calls.on_signalled = lambda: signalled.append(1)

    def job() -> Job[int]:
        try:
            yield Read(stuck, 8)
        except OSError as error:
            notes.append(error.errno)
            for _ in range(3):
                yield Pause.TURN
                notes.append("a turn")
            try:
                yield Write(stuck, b"x")
            except OSError as gone:
                notes.append(gone.errno)
            raise
        return 0

    asked = desk.ask(job(), program.pid)
    desk.until(lambda: waiting_threads() == 1)
    assert desk.calls.interrupt(asked) and not desk.answers[asked] and signalled == [1]
    assert not desk.calls.interrupt(asked + 1)
    program.process.kill()
    program.process.wait()
    desk.calls.give_up_killed()
    assert desk.only(asked) == (errno.EINTR, 0, b"") and waiting_threads() == 1 and not notes
    assert not desk.calls.interrupt(asked)
    os.close(ours)
    desk.until(lambda: desk.domains[1].under_way == 0)
    assert desk.only(asked) == (errno.EINTR, 0, b"") and signalled == [1]
    assert notes == [errno.EINTR, "a turn", "a turn", "a turn", errno.EINTR]
    assert not desk.calls._far and desk.domains[1].queued == 0


@pytest.mark.host
def test_what_a_killed_caller_had_in_the_queue(desk: Desk):
    """Goal: its number may be another's by the time a thread comes to it: nobody is written to.  Method: a step behind stuck
    ones, given up; the "other" with the number is the program itself, which lives on."""
    program, fd, stuck = desk.stuck()
    good = program("pages(1)")
    for _ in range(THREADS_MOST):
        desk.ask(do(Read(stuck, 8)), program.pid)
    desk.until(lambda: waiting_threads() == THREADS_MOST)
    asked = desk.ask(do(Write(good, b"to whom?")), program.pid)
    (running,) = [one for one in desk.calls._far.values() if one.request is not None and one.request.unique == asked]
    running.answered = True
    program(f"os.close({fd})")
    desk.until(lambda: desk.domains[1].under_way == 0)
    assert program(f"ctypes.string_at({good}, 8)") == bytes(8) and not desk.answers[asked]


# --- the end -------------------------------------------------------------------------------------------------------------


@pytest.mark.host
def test_a_domain_ends_while_its_callers_wait(desk: Desk):
    """Goal: nobody waits for ever in an ioctl of a domain that is gone: what is in the queue, and what asks for another
    step, is ENODEV, also if all threads are stuck; a job of our own just ends.  Method: stuck ones, queued ones,
    one between two steps, one whose step is done but not seen; then the memory is handed out after all."""
    program, fd, stuck = desk.stuck()
    good = program("pages(1)")
    ended: list[str] = []

    def own() -> Job[None]:
        try:
            yield Maps((program.pid,), 1, 1, [])
        finally:
            ended.append("own")

    held = [desk.ask(do(Read(stuck, 8)), program.pid) for _ in range(THREADS_MOST - 2)]
    two_steps = desk.ask(do(Read(stuck, 8), Write(good, b"never")), program.pid)
    desk.until(lambda: waiting_threads() == THREADS_MOST - 1)
    done = desk.ask(do(Read(good, 8), Write(good, b"never")), program.pid)
    desk.wait()  # its first step is done, and not seen
    between = desk.ask(do(Pause.EVENT, Read(good, 8)), program.pid)
    held.append(desk.ask(do(Read(stuck, 8)), program.pid))
    while waiting_threads() < THREADS_MOST:
        time.sleep(0.001)
    queued = [desk.ask(do(Read(good, 8)), program.pid) for _ in range(5)]
    desk.domains[1].run(None, own())
    desk.domains[1].close()
    for one in (*queued, between, done):
        assert desk.answer(one) == (errno.ENODEV, 0, b"")
    assert ended == ["own"] and len(desk.calls._far) == THREADS_MOST
    assert not desk.answers[two_steps] and not any(desk.answers[one] for one in held)
    program(f"os.close({fd})")
    assert {desk.answer(one)[0] for one in held} == {0}
    assert desk.answer(two_steps) == (errno.ENODEV, 0, b"")
    assert program(f"ctypes.string_at({good}, 5)") == bytes(5)
    assert desk.domains[1].under_way == desk.domains[1].queued == 0
    desk.until(lambda: threads(1) == 0)


def test_after_the_end(desk: Desk):
    """Goal: a job that comes after the domain has gone, as the closing of a file does, may still run, and asks nobody.
    Method: one of our own with turns, and one with a step that would need a thread; a request's step is ENODEV."""
    program = desk.program()
    at = program("pages(1)")
    desk.domains[1].close()
    notes: list[str] = []

    def own() -> Job[None]:
        yield Pause.TURN
        notes.append("a turn")
        yield Maps((program.pid,), 1, 1, [])
        notes.append("never")

    desk.domains[1].run(None, own())
    asked = desk.ask(do(Read(at, 8)), program.pid)
    assert desk.answer(asked) == (errno.ENODEV, 0, b"")
    desk.until(lambda: desk.domains[1].under_way == 0)
    assert notes == ["a turn"] and threads(1) == 0 and desk.domains[1].queued == 0


@pytest.mark.host
def test_close_with_a_stuck_thread():
    """Goal: the server ends although a thread waits, which later writes to nobody's descriptor.  Method: close all, use the
    eventfd's number for a pipe, then let the thread come back."""
    desk, before = Desk(), open_files()
    program, fd, stuck = desk.stuck()
    desk.ask(do(Read(stuck, 8)), program.pid)
    desk.until(lambda: waiting_threads() == 1)
    number, (end, other) = desk.calls.fd, os.pipe()
    desk.domains[1].close()
    desk.calls.close()
    assert desk.calls.fd == -1
    os.dup2(other, number)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "caller-1"]
    program(f"os.close({fd})")
    thread.join(20)
    assert not thread.is_alive()
    os.set_blocking(end, False)
    with pytest.raises(BlockingIOError):
        os.read(end, 8)
    for one in end, other, number:
        os.close(one)
    desk.close()
    assert not {file for file in open_files() - before if "eventfd" in file}
