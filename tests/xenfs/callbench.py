"""What the tests of calls.py share: domains' calls, requests of processes, their answers; memory that nobody hands out."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from typing import Any, cast

from sysdev.steps import Job
from tests.xenfs.programs import Program
from xenfs.calls import Calls, DomainCalls
from xenfs.fuse.session import Session
from xenfs.fuse.tree import Ioctl

STRANGER = 1 << 20  # a user

# A page of a program that is being handed out by userfaultfd(2), and nobody does: its number, then the address.
STUCK = (
    "[keep.append(libc.syscall({'x86_64': 323, 'aarch64': 282}[os.uname().machine], 0o2000000)),"
    " keep.append(__import__('fcntl').ioctl(keep[-1], 0xc018aa3f, __import__('struct').pack('QQQ', 0xaa, 0, 0))),"
    " keep.append(pages({count})),"
    " __import__('fcntl').ioctl(keep[-3], 0xc020aa00, __import__('struct').pack('QQQQ', keep[-1], {count} * PAGE, 1, 0)),"
    " (keep[-3], keep[-1])][-1]"
)


class Desk:
    """`answers` has what each request got, by its number: (errno, result, data)."""

    def __init__(self) -> None:
        self.calls = Calls()
        self.domains = {domid: DomainCalls(self.calls, domid) for domid in (0, 1, 2)}
        self.answers: dict[int, list[tuple[int, int, bytes]]] = {}
        self.programs: list[Program] = []
        self.unique = 0

    # what a Session does with an answer
    def send_ioctl(self, unique: int, result: int = 0, data: bytes = b"") -> None:
        self.answers[unique].append((0, result, data))

    def send_error(self, unique: int, number: int) -> None:
        self.answers[unique].append((number, 0, b""))

    def program(self) -> Program:
        self.programs.append(Program())
        return self.programs[-1]

    def stuck(self, count: int = 1) -> tuple[Program, int, int]:
        """A program, its userfaultfd, and `count` pages that whoever touches them waits for."""
        program = self.program()
        fd, address = program(STUCK.replace("{count}", str(count)))
        return program, fd, address

    def request(self, pid: int = 0, uid: int = STRANGER, out_size: int = 0) -> Ioctl:
        """The next one. The user is a stranger unless told."""
        self.unique += 1
        self.answers[self.unique] = []
        return Ioctl(cast(Session, self), self.unique, pid, uid, 0, 0, b"", out_size)

    def ask(
        self, job: Job[Any], pid: int = 0, domid: int = 1, uid: int = STRANGER, out_size: int = 0, near: bool = True
    ) -> int:
        """Begin a job for a request of a caller who is known; its number."""
        self.domains[domid].run(self.request(pid, uid, out_size), job, near)
        return self.unique

    def until(self, done: Callable[[], object], timeout_s: float = 20) -> None:
        """Do as the host's task does, until something is so."""
        ends = time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < ends, "it does not come"
            if not self.calls.step() and not done():
                self.ready(0.05)

    def answer(self, unique: int) -> tuple[int, int, bytes]:
        """The only one."""
        self.until(lambda: self.answers[unique])
        return self.only(unique)

    def only(self, unique: int) -> tuple[int, int, bytes]:
        (answer,) = self.answers[unique]
        return answer

    def ready(self, timeout_s: float) -> bool:
        """Has a thread said, within that time, that it has finished something?"""
        poll = select.poll()
        poll.register(self.calls.fd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def wait(self) -> None:
        """Until a thread says that it has finished something; look at nothing."""
        assert self.ready(20), "no thread comes back"

    def quiet(self) -> bool:
        """No thread says that it has finished something."""
        return not self.ready(0)

    def close(self) -> None:
        for program in self.programs:
            program.close()
        for domain in self.domains.values():
            if not domain.closed:
                domain.close()
            for thread in domain._threads:
                thread.join(20)
                assert not thread.is_alive(), "a thread outlives whom it waited for"
        if self.calls.fd >= 0:
            self.calls.close()


def do(*steps: Any) -> Job[Any]:
    """Steps one after another; what the last one gave is in the data that comes back."""
    value = None
    for step in steps:
        value = yield step
    return (7, value) if isinstance(value, bytes) else 7


def threads(domid: int) -> int:
    """How many the kernel knows, by their names' owner."""
    return sum(thread.name == f"caller-{domid}" for thread in threading.enumerate())


def waiting_threads() -> int:
    """Threads of ours that wait in process_vm_readv(2) or writev."""
    numbers = {"x86_64": ("310", "311"), "aarch64": ("270", "271")}[os.uname().machine]
    found = 0
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/syscall") as file:
                found += file.read().split()[0] in numbers
        except OSError:
            continue
    return found
