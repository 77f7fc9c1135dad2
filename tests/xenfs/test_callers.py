"""Goal: who calls is looked up by a thread, once for each open file and thread that calls, and who is not able to kill us
anyway has nothing done for him in the loop.
Method: real processes, also in a pid namespace below ours; which files of /proc are opened by whom, and which steps
threads are given."""

from __future__ import annotations

import builtins
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sysdev.steps import Job, Pause, Read, Step, Who
from tests.xenfs import evtchnfile, grantfile, test_privcmd_node
from tests.xenfs.callbench import STRANGER, Desk, do
from tests.xenfs.programs import PROGRAM, Program
from xenfs import caller
from xenfs.calls import CALLERS_MOST, JOBS_MOST, Callers, Calls, DomainCalls, Running
from xenmodel.public import version as ver
from xenmodel.public.event_channel import BIND_IPI, EVTCHNOP_bind_ipi
from xenmodel.public.xen import Hypercall

US = os.geteuid()


class Below(Program):
    """A program in a pid namespace below ours."""

    def __init__(self) -> None:
        command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", PROGRAM]
        self.process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
        assert self("os.getpid()") == 1
        self.pid = int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text())


@pytest.fixture(autouse=True)
def nobody_stays() -> Iterator[None]:
    """Threads end with their domain."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("caller-"):
            thread.join(20)
            assert not thread.is_alive(), f"{thread.name} stays"


@pytest.fixture
def desk() -> Iterator[Desk]:
    it = Desk()
    yield it
    it.close()


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The steps that threads are given."""
    steps: list[Step] = []
    put = DomainCalls.put

    def noted(calls: DomainCalls, running: Running, step: Step) -> None:
        steps.append(step)
        put(calls, running, step)

    monkeypatch.setattr(DomainCalls, "put", noted)
    return steps


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The files of /proc that are opened: the name, and whether by the loop."""
    files: list[tuple[str, bool]] = []

    def noted(path: str, *args: Any, **kwargs: Any) -> Any:
        files.append((path.rpartition("/")[2], threading.current_thread() is threading.main_thread()))
        return builtins.open(path, *args, **kwargs)

    monkeypatch.setattr(caller, "open", noted, raising=False)
    return files


def ask(desk: Desk, callers: Callers, job: Job[Any], pid: int, uid: int = US) -> tuple[int, int, bytes]:
    callers.run(desk.request(pid, uid, 8), job)
    return desk.answer(desk.unique)


# --- who is near -----------------------------------------------------------------------------------------------------------


def test_first_and_next(desk: Desk, far: list[Step]):
    """Goal: the first ioctl of a thread on an open file takes one trip to a thread, the next none; another open file knows
    nothing of it; another user's take one for each structure.  Method: the same process as two users, two files."""
    program = desk.program()
    read = Read(program("pages(1)"), 8)
    callers = Callers(desk.domains[1])
    for _ in range(3):
        assert ask(desk, callers, do(read, read), program.pid) == (0, 7, bytes(8))
    assert far == [Who()]
    assert ask(desk, callers, do(read), program.pid, STRANGER) == (0, 7, bytes(8))
    assert far == [Who(), read]
    ask(desk, Callers(desk.domains[1]), do(read), program.pid)
    assert far == [Who(), read, Who()]


@pytest.mark.host
def test_a_pid_namespace_below_ours(desk: Desk, far: list[Step]):
    """Goal: our user in a pid namespace below ours could not kill us, so the loop does not touch his memory.
    Method: a process in one, beside one of ours that uses the same open file."""
    desk.programs.append(below := Below())
    program = desk.program()
    callers = Callers(desk.domains[1])
    reads = [Read(one("pages(1)"), 8) for one in (program, below)]
    for _ in range(2):
        for one, read in zip((program, below), reads, strict=True):
            assert ask(desk, callers, do(read), one.pid) == (0, 7, bytes(8))
    assert far == [Who(), Who(), reads[1], reads[1]]
    assert [caller.look(one.pid).near for one in (program, below)] == [True, False]
    assert caller.look(below.pid).tgid == below.pid


def test_who_is_gone(desk: Desk):
    """Goal: who has ended, or is in a pid namespace that we cannot see, is not near.  Method: such a pid, and 0."""
    ended = desk.program()
    ended.close()
    for pid in ended.pid, 0:
        assert caller.look(pid) == (pid, f"?[{pid}]", False)
        assert ask(desk, Callers(desk.domains[1]), do(Read(8, 8)), pid) == (errno.ESRCH, 0, b"")


# --- limits ----------------------------------------------------------------------------------------------------------------


def test_many_threads(desk: Desk, far: list[Step]):
    """Goal: an open file remembers so many threads, not more, and a job that is under way finds its caller though he was
    forgotten.  Method: pids one after another; a job that lets others in before it asks."""
    callers = Callers(desk.domains[1])

    def job() -> Job[tuple[int, bytes]]:
        for pid in range(1 << 22, (1 << 22) + 3 * CALLERS_MOST):
            yield from callers.who(pid)
            assert len(callers._known) <= CALLERS_MOST
        who = yield from callers.who(os.getpid())
        return 0, str(who.tgid).encode()[:8]

    assert ask(desk, callers, job(), os.getpid()) == (0, 0, str(os.getpid()).encode()[:8])
    assert far == [Who()] * (2 + 3 * CALLERS_MOST)


def test_too_many_jobs(desk: Desk, far: list[Step]):
    """Goal: who calls is looked up only for ioctls that may be under way, and not any more when the domain has ended.
    Method: as many jobs as may be that wait, and one more; another domain that is closed."""
    for _ in range(JOBS_MOST):
        desk.ask(do(Pause.EVENT))
    with pytest.raises(OSError) as caught:
        Callers(desk.domains[1]).run(desk.request(os.getpid()), do(Read(8, 8)))
    assert caught.value.errno == errno.EAGAIN and not far
    desk.domains[2].close()
    callers = Callers(desk.domains[2])
    callers.run(desk.request(os.getpid()), do(Read(8, 8)))
    assert desk.answer(desk.unique) == (errno.ENODEV, 0, b"") and not callers._known


# --- the files -------------------------------------------------------------------------------------------------------------


def looks(opened: list[tuple[str, bool]]) -> int:
    """How often /proc/PID/status was read; never by the loop."""
    assert ("status", True) not in opened
    return opened.count(("status", False))


def test_evtchn(opened: list[tuple[str, bool]]):
    """Goal: evtchn's loop reads no /proc/PID/status, also for a bad pointer, and a thread does once for each open.
    Method: two opens, each with several ioctls; the table names who called."""
    desk = evtchnfile.Desk()
    for expected in 1, 2:
        program = desk.open(1)
        assert [program.call("unbound", 2), program.raw(0x00044502, 8).error] == [3 * expected - 2, errno.EFAULT]
        assert program.call("unbound", 2) == 3 * expected - 1 and program.call("unbound", 2) == 3 * expected
        assert looks(opened) == expected
    assert {one.owner for one in desk.domains[1].events.channels.values()} == {caller.look(os.getpid()).name}
    desk.close()


def test_gntdev(opened: list[tuple[str, bool]]):
    """Goal: the same of gntdev and gntalloc, which keep their callers' names and processes.
    Method: allocate, map, and bad pointers, by our user and another; the second open is looked at anew."""
    with grantfile.GrantDesk() as desk:
        for expected, uid in (1, US), (2, STRANGER):
            gntalloc = desk.open(1, "gntalloc")
            gntalloc.uid = uid
            for _ in range(3):
                allocated = gntalloc.alloc(2, 0, 1)
                assert isinstance(allocated, tuple) and gntalloc.dealloc(allocated[0], 1) == 0
                assert gntalloc.raw(grantfile.LINUX["dealloc"], 8).error == errno.EFAULT
            assert looks(opened) == expected and gntalloc.file.pids == {desk.memory.pid}


def test_privcmd(opened: list[tuple[str, bool]]):
    """Goal: the same of privcmd: each open is looked at for itself.  Method: two opens; ports have an owner."""
    calls = Calls()
    program = test_privcmd_node.Program(test_privcmd_node.guest(), calls)
    for expected in 1, 2:
        for _ in range(3):
            assert program.event(EVTCHNOP_bind_ipi, BIND_IPI, 0, 0) == 0
            assert program.call(Hypercall.xen_version, ver.XENVER_extraversion, 8) == -errno.EFAULT
        assert looks(opened) == expected
        program.fh = program.kernel.handle("privcmd1", os.O_RDWR)
    owners = {one.owner for one in program.node.domain.events.channels.values()}
    assert owners == {caller.look(os.getpid()).name}
    program.close()
    calls.close()
