"""steps.py: what an ioctl that cannot be done in one go asks of whoever runs it.

Ioctls are generators here. A step that is yielded says what has to happen before it can go on; xenfs/calls.py does it and
sends the result back, or throws OSError. So nothing below waits: not for the caller's memory, which may be a file on a
stuck disk, and not for a job that is long.
"""

from __future__ import annotations

import enum
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, TypeVar


class Pause(enum.Enum):
    """Go on later."""

    TURN = 0  # others have their turn first
    EVENT = 1  # only when something else has happened: there is nothing to do before


class Who(NamedTuple):
    """Whom this is done for. The result: a Caller."""


class Caller(NamedTuple):
    """A thread that is in an ioctl. `near`: in our own pid namespace, where a process of our own user could kill us."""

    tgid: int
    name: str  # comm[tgid], for tables: the thread's name, printable and at most 15 characters
    near: bool


class Read(NamedTuple):
    """Some bytes of the caller's memory. The result: bytes."""

    address: int
    length: int


class Write(NamedTuple):
    """Put bytes into the caller's memory."""

    address: int
    data: bytes


class TransferIn(NamedTuple):
    """Fill views from the caller's memory. Nobody moves what the views show until that is done."""

    pieces: Sequence[tuple[int, memoryview]]


class TransferOut(NamedTuple):
    """Put what views show into the caller's memory."""

    pieces: Sequence[tuple[memoryview, int]]


class Maps(NamedTuple):
    """Which of some pages of a file these processes map. The result: the set of those offsets."""

    pids: tuple[int, ...]
    device: int
    inode: int
    offsets: Sequence[int]  # ascending


class MapAt(NamedTuple):
    """What of a file the caller maps at an address. The result: the offset there, or None."""

    address: int
    device: int
    inode: int


Step = Pause | Who | Read | Write | TransferIn | TransferOut | Maps | MapAt
T = TypeVar("T")
Job = Generator[Step, Any, T]
