"""Goal: an ioctl that reaches into its caller's memory gets its answer, one, and others have their turns.
Method: real threads, and real processes whose memory is good, bad or gone."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sysdev.steps import Job, MapAt, Maps, Pause, Read, TransferIn, TransferOut, Write
from tests.xenfs.callbench import STRANGER, Desk, do, threads
from tests.xenfs.programs import PAGE
from xenfs.calls import JOBS_MOST, SHORT_BYTES, THREADS_MOST, DomainCalls

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def desk() -> Iterator[Desk]:
    it = Desk()
    yield it
    it.close()


# --- results and errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uid", [os.geteuid(), STRANGER])
@pytest.mark.parametrize("size", [0, 8, SHORT_BYTES, SHORT_BYTES + 1, 300_000])
def test_read_and_write(desk: Desk, uid: int, size: int):
    """Goal: bytes arrive either way, by the short cut and by a thread.  Method: write, read back; the process looks, too."""
    program = desk.program()
    at = program("pages(100)")
    data = os.urandom(size)
    assert desk.answer(desk.ask(do(Write(at, data), Read(at, size)), program.pid, uid=uid, out_size=size)) == (0, 7, data)
    assert program(f"ctypes.string_at({at}, {size + 1})") == data + b"\0"


def test_transfers(desk: Desk):
    """Goal: bulk goes straight into views and out of them.  Method: two pieces each way, one of them read-only."""
    program = desk.program()
    at = program("pages(2)")
    into = bytearray(8)
    out = TransferOut([(memoryview(b"behind"), at + PAGE), (memoryview(bytearray(b"before")), at)])
    back = TransferIn([(at + PAGE, memoryview(into)[:4]), (at, memoryview(into)[4:])])
    assert desk.answer(desk.ask(do(out, back), program.pid)) == (0, 7, b"")
    assert into == b"behibefo"


def test_data_that_comes_back_is_cut(desk: Desk):
    """Goal: no more bytes come back than the ioctl's number says.  Method: a job with ten, room for four, and for none."""
    program = desk.program()
    at = program("pages(1)")
    for room in 4, 0:
        assert desk.answer(desk.ask(do(Read(at, 10)), program.pid, out_size=room)) == (0, 7, bytes(room))


@pytest.mark.parametrize("uid", [os.geteuid(), STRANGER])
def test_errors_reach_the_job(desk: Desk, uid: int):
    """Goal: EFAULT and ESRCH are thrown into the job where it waits; it may go on, or let them be its answer.
    Method: bad pointers for each step, a process that has ended, pid 0; a job that writes down what it caught."""
    program, ended = desk.program(), desk.program()
    at = program("pages(2)")
    program(f"libc.munmap({at + PAGE}, PAGE)")
    ended.close()
    view = memoryview(bytearray(8))
    steps = [Read(8, 8), Write(8, b"x"), Read(at + PAGE - 4, SHORT_BYTES * 2), Write(8, bytes(SHORT_BYTES * 2))]
    steps += [TransferIn([(8, view)]), TransferOut([(view, 8)])]
    caught: list[int | None] = []

    def careful() -> Job[int]:
        for step in steps:
            try:
                yield step
            except OSError as error:
                caught.append(error.errno)
        return 3

    assert desk.answer(desk.ask(careful(), program.pid, uid=uid)) == (0, 3, b"")
    assert caught == [errno.EFAULT] * len(steps)
    for step in steps:
        for pid, expected in (program.pid, errno.EFAULT), (ended.pid, errno.ESRCH), (0, errno.ESRCH):
            assert desk.answer(desk.ask(do(step), pid, uid=uid)) == (expected, 0, b"")
    assert desk.answer(desk.ask(do(MapAt(at, 1, 1)), ended.pid)) == (errno.ESRCH, 0, b"")
    assert all(domain.under_way == domain.queued == 0 for domain in desk.domains.values())


def test_an_error_without_a_number(desk: Desk):
    """Goal: whatever OSError a job raises is an answer.  Method: one that has no errno."""

    def bad() -> Job[int]:
        yield Pause.TURN
        raise OSError

    assert desk.answer(desk.ask(bad())) == (errno.EIO, 0, b"")


def test_what_processes_map(desk: Desk):
    """Goal: Maps tells which offsets of a file any of some processes maps, MapAt what is at an address; processes that are
    gone map nothing.  Method: parts of a memfd in two processes; asked for by a request, and by a job of our own."""
    one, other, ended = desk.program(), desk.program(), desk.program()
    fd = os.memfd_create("maps")
    os.ftruncate(fd, 100 * PAGE)
    path, (device, inode) = f"/proc/{os.getpid()}/fd/{fd}", (os.fstat(fd).st_dev, os.fstat(fd).st_ino)
    at = one(f"shared(os.open('{path}', os.O_RDWR), 10, 3)")
    other(f"shared(os.open('{path}', os.O_RDWR), 12, 1)"), other(f"shared(os.open('{path}', os.O_RDWR), 50, 2)")
    ended.close()
    offsets = [page * PAGE for page in (0, 9, 10, 12, 13, 50, 51, 52)]
    found: list[Any] = []

    def look(*pids: int) -> Job[int]:
        found.append((yield Maps(pids, device, inode, offsets)))
        found.append((yield Maps((*pids, 1 << 22), device, inode, offsets[:3])))
        return 0

    desk.domains[1].run(None, look(one.pid, ended.pid, other.pid))
    desk.until(lambda: len(found) == 2)
    assert found == [{page * PAGE for page in (10, 12, 50, 51)}, {10 * PAGE}]

    def what_is_at() -> Job[int]:
        for address in at, at + 2 * PAGE + 5, at + 3 * PAGE, 8:
            found.append((yield MapAt(address, device, inode)))
        return 0

    desk.answer(desk.ask(what_is_at(), one.pid))
    assert found[2:] == [10 * PAGE, 12 * PAGE + 5, None, None]
    desk.until(lambda: desk.domains[1].under_way == 0)
    os.close(fd)


# --- turns ---------------------------------------------------------------------------------------------------------------


def test_turns(desk: Desk):
    """Goal: a job that gives others their turn gets its own again once per step(), in order; step() says whether there is
    more.  Method: three jobs that note their turns."""
    turns: list[str] = []

    def job(name: str) -> Job[int]:
        for i in range(3):
            turns.append(f"{name}{i}")
            yield Pause.TURN
        return 0

    asked = [desk.ask(job(name), domid=domid) for name, domid in (("a", 1), ("b", 1), ("c", 2))]
    assert turns == ["a0", "b0", "c0"]
    assert desk.calls.step() and turns[3:] == ["a1", "b1", "c1"]
    assert desk.calls.step() and turns[6:] == ["a2", "b2", "c2"]
    assert not any(desk.answers[one] for one in asked)
    assert not desk.calls.step()
    assert [desk.only(one) for one in asked] == [(0, 0, b"")] * 3


def test_events(desk: Desk):
    """Goal: a job that waits for anything to happen is tried at each step(), and does not ask for one.
    Method: count its turns; a second one beside it that has turns of its own."""
    turns: list[str] = []

    def waits() -> Job[int]:
        while len(turns) < 5:
            turns.append("tried")
            yield Pause.EVENT
        return 4

    asked = desk.ask(waits())
    for i in range(1, 5):
        assert len(turns) == i and not desk.calls.step()
    assert turns == ["tried"] * 5 and not desk.answers[asked]
    assert desk.quiet(), "nothing wakes the loop for it"
    desk.calls.step()
    assert desk.only(asked) == (0, 4, b"")


def test_many_at_once(desk: Desk):
    """Goal: each of many requests has exactly one answer, its own, whatever the threads do.  Method: 60 jobs of three
    domains with turns, threads and short cuts in between; each reads back its number."""
    program = desk.program()
    at = program("pages(1)")

    def job(number: int) -> Job[Any]:
        word = number.to_bytes(8, "little")
        yield Write(at + 8 * number, word)
        yield Pause.TURN
        into = bytearray(8)
        yield TransferIn([(at + 8 * number, memoryview(into))])
        yield Pause.EVENT
        assert into == word
        return number, (yield Read(at + 8 * number, 8))

    uids = os.geteuid(), STRANGER
    asked = {desk.ask(job(i), program.pid, i % 3, uids[i & 1], 8): i for i in range(60)}
    desk.until(lambda: all(desk.answers.values()))
    assert {one: desk.only(one) for one in asked} == {one: (0, i, i.to_bytes(8, "little")) for one, i in asked.items()}
    desk.calls.step()
    assert desk.quiet() and not desk.calls._far
    assert all(domain.under_way == domain.queued == 0 for domain in desk.domains.values())
    assert all(threads(domid) <= THREADS_MOST for domid in desk.domains)


# --- limits --------------------------------------------------------------------------------------------------------------


def test_jobs_of_a_guest(desk: Desk):
    """Goal: a guest's processes can have JOBS_MOST ioctls under way, more are EAGAIN; domain 0's, another guest's and our
    own jobs are not counted against it.  Method: jobs that wait; one ends, and there is room for one."""
    go: list[bool] = []

    def waits() -> Job[int]:
        while not go:
            yield Pause.EVENT
        go.pop()
        return 0

    asked = [desk.ask(waits()) for _ in range(JOBS_MOST)]
    for _ in range(3):
        with pytest.raises(OSError) as caught:
            desk.ask(waits())
        assert caught.value.errno == errno.EAGAIN and not desk.answers.pop(desk.unique)
    desk.domains[1].run(None, waits())
    asked += [desk.ask(waits(), domid=2)] + [desk.ask(waits(), domid=0) for _ in range(2 * JOBS_MOST)]
    go += [True, True]
    desk.calls.step()
    assert desk.domains[1].under_way == JOBS_MOST - 1
    asked.append(desk.ask(waits()))
    go += [True] * len(asked)
    desk.calls.step()
    assert all(desk.only(one) == (0, 0, b"") for one in asked)


def test_the_short_cut_is_for_us_alone(desk: Desk):
    """Goal: the loop itself touches only memory of processes that could kill us, and little.  Method: which steps are done
    without a thread, by user, pid namespace, length and kind; a domain for each, whose threads are counted."""
    program = desk.program()
    at, us = program("pages(4)"), os.geteuid()
    view = memoryview(bytearray(8))
    cases = [
        (Read(at, 8), us, 0),
        (Read(at, SHORT_BYTES), us, 0),
        (Write(at, bytes(SHORT_BYTES)), us, 0),
        (Read(at, SHORT_BYTES + 1), us, 1),
        (Write(at, bytes(SHORT_BYTES + 1)), us, 1),
        (TransferIn([(at, view)]), us, 1),
        (TransferOut([(view, at)]), us, 1),
        (Maps((program.pid,), 1, 1, []), us, 1),
        (Read(at, 8), STRANGER, 1),
        (Write(at, b"x"), STRANGER, 1),
        (MapAt(at, 1, 1), STRANGER, 1),
        (Read(at, 8), us + 1, 1),
    ]
    for domid, (step, uid, expected) in enumerate(cases, 10):
        desk.domains[domid] = DomainCalls(desk.calls, domid)
        assert desk.answer(desk.ask(do(step), program.pid, domid, uid))[:2] == (0, 7)
        assert threads(domid) == expected, f"{step} of user {uid}"
    for domid, step in enumerate((Read(at, 8), Write(at, b"x"), MapAt(at, 1, 1)), 50):
        desk.domains[domid] = DomainCalls(desk.calls, domid)
        assert desk.answer(desk.ask(do(step), program.pid, domid, us, near=False))[:2] == (0, 7)
        assert threads(domid) == 1, f"{step} of another pid namespace"


def test_no_more_threads_to_be_had():
    """Goal: where the host has no thread for us, a request is EAGAIN and nothing breaks; a job of our own waits for the next
    chance.  Method: RLIMIT_AS in a process of its own, too low for a thread's stack; then it is lifted."""
    code = """
import os, resource
from sysdev.steps import Maps, Read
from tests.xenfs.callbench import Desk
desk, looked = Desk(), []
def look():
    looked.append((yield Maps((), 1, 1, [])))
def read():
    return 0, (yield Read(id(desk), 8))
for line in open("/proc/self/status"):
    if line.startswith("VmSize"):
        limit = int(line.split()[1]) * 1024 + (4 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
desk.domains[1].run(None, look())
for _ in range(2):
    print(desk.answer(desk.ask(read(), os.getpid(), out_size=1))[0], looked, desk.domains[1].under_way)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
print(desk.answer(desk.ask(read(), os.getpid(), out_size=1))[0], looked, desk.domains[1].under_way)
desk.close()
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, f"{errno.EAGAIN} [] 1\n" * 2 + "0 [set()] 0\n"), done.stderr
