"""Goal: INTERRUPT reaches the open file whose request waits, and costs nobody else anything.
Method: FUSE requests into a Session over nodes that answer when the test says so, or not at all."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from tests.xenfs.machine import Kernel
from xenfs.fuse import kernel as k
from xenfs.fuse.session import Session
from xenfs.fuse.tree import Directory, Ioctl, Node, Opened, refuse

OPENS = 50


class Sleeper(Node):
    """Answers nothing, and remembers what it was asked to give up; `error` makes it refuse everything."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.error = 0

    def open(self, flags: int) -> Opened:
        sleeper = Sleeper()
        sleeper.error = self.error
        return Opened(sleeper, 0)

    def _sleep(self) -> None:
        if self.error:
            raise refuse(self.error)

    def read(self, session: Session, unique: int, offset: int, size: int, flags: int) -> None:
        self._sleep()

    def write(self, session: Session, unique: int, offset: int, size: int, flags: int) -> None:
        self._sleep()

    def fsync(self, session: Session, unique: int) -> None:
        self._sleep()

    def flush(self, session: Session, unique: int) -> None:
        self._sleep()

    def fallocate(self, session: Session, unique: int, offset: int, length: int, mode: int) -> None:
        self._sleep()

    def ioctl(self, request: Ioctl) -> None:
        self._sleep()

    def interrupt(self, unique: int) -> bool:
        self.asked.append(unique)
        return True


SEND: dict[str, Callable[[Kernel, int], int]] = {
    "read": lambda kernel, fh: kernel.send_read(fh, 0, 8),
    "write": lambda kernel, fh: kernel.send_write(fh, 0, b"x"),
    "fsync": lambda kernel, fh: kernel.send_fsync(fh),
    "flush": lambda kernel, fh: kernel.send(k.FUSE_FLUSH, 0, k.FLUSH_IN.pack(fh, 0, 0, 0)),
    "fallocate": lambda kernel, fh: kernel.send_fallocate(fh, 0, 1, 0),
    "ioctl": lambda kernel, fh: kernel.send(k.FUSE_IOCTL, 0, k.IOCTL_IN.pack(fh, 0, 1, 0, 0, 0)),
}
ANSWER: dict[str, Callable[[Session, int], None]] = {
    "data": lambda session, unique: session.send_data(unique, [b"data"]),
    "written": lambda session, unique: session.send_written(unique, 1),
    "ok": lambda session, unique: session.send_ok(unique),
    "ioctl": lambda session, unique: session.send_ioctl(unique, 1),
    "error": lambda session, unique: session.send_error(unique, errno.EINTR),
}


@pytest.fixture
def kernel() -> Kernel:
    return Kernel(Directory({"sleeper": Sleeper(), "refuser": Sleeper()}))


def interrupt(kernel: Kernel, unique: int) -> None:
    kernel.send(k.FUSE_INTERRUPT, 0, k.INTERRUPT_IN.pack(unique))


def asked(kernel: Kernel) -> list[list[int]]:
    """What each open was asked to give up, in the order of the opens."""
    return [node.asked for node in kernel.session.handles.values() if isinstance(node, Sleeper)]


@pytest.mark.parametrize("send", SEND.values(), ids=SEND)
def test_one_is_asked(kernel, send):
    """Goal: INTERRUPT names a request: the open file that was asked for it is asked to give it up, and no other, however
    many there are; nobody if there is no such request. It has no answer of its own.
    Method: many opens, a request to each; INTERRUPT of one of them, twice, and of numbers that nobody has."""
    opened = [kernel.handle("sleeper") for _ in range(OPENS)]
    uniques = [send(kernel, fh) for fh in opened]
    kernel.order.clear()
    for unique in (uniques[7], 1, uniques[7], uniques[-1] + 100):
        interrupt(kernel, unique)
    assert asked(kernel) == [[uniques[7]] * 2 if i == 7 else [] for i in range(OPENS)]
    assert kernel.order == []


@pytest.mark.parametrize("answer", ANSWER.values(), ids=ANSWER)
def test_nobody_is_asked_after_the_answer(kernel, answer):
    """Goal: what is answered is forgotten, whatever the answer.  Method: each of them, to one of two; INTERRUPT both."""
    fh = kernel.handle("sleeper")
    answered, waits = kernel.send_read(fh, 0, 8), kernel.send_read(fh, 0, 8)
    answer(kernel.session, answered)
    interrupt(kernel, answered)
    interrupt(kernel, waits)
    assert asked(kernel) == [[waits]] and list(kernel.session.waiting) == [waits]


@pytest.mark.parametrize("send", SEND.values(), ids=SEND)
def test_nothing_is_left_of_what_is_refused(kernel, send):
    """Goal: a request that a node refuses, or that is for no open file, leaves nothing.  Method: both."""
    kernel.session.node(kernel.walk("refuser")).error = errno.ENOSPC
    fh = kernel.handle("refuser")
    assert [kernel.wait(send(kernel, number)).error for number in (fh, fh + 1)] == [errno.ENOSPC, errno.EBADF]
    assert not kernel.session.waiting
