"""storeclient.py: a blocking client of any xenstored, over its Unix socket or a device file (docs/misc/xenstore.txt).

For commands and tests: storecmd.py. Nothing in a running xenfs uses it, for it waits; drivers and the toolstack have
xenmodel/xenstore/client.py.

An error reply is an XsError, as of a connection within the process. Everything else that goes wrong is a StoreError:
nobody listens, no answer in time, or an answer that the protocol does not allow; then the connection is closed, since
nobody knows what its next bytes belong to. The server is not trusted: names, permissions and numbers are checked
before anybody sees them, an answer has a deadline, and the number of events and of names kept is limited.

Up to WINDOW requests are on their way at a time (request()); their answers may come in any order. A device takes one
whole message per write(2) and may say nothing about being writable, so there a write is tried again instead.
Left out: watches with a depth, INTRODUCE and its kin, threads.
"""

from __future__ import annotations

import os
import re
import select
import socket
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, NoReturn, TypeVar

from xenmodel.public.io.xs_wire import XENSTORE_PAYLOAD_MAX, XsType
from xenmodel.xenstore.errors import XsErrno, XsError, shown
from xenmodel.xenstore.perms import Perm
from xenmodel.xenstore.wire import HEADER_BYTES, Message, Parser, ProtocolError, join, pack, strings

T = TypeVar("T")

TIMEOUT_S = 10.0  # for one answer, whatever else arrives meanwhile
WINDOW = 32  # requests under way: they and their answers fit into a socket's buffers
EVENTS_MAX = 10_000  # nobody asked for yet
PARTS_MAX = 8192  # of one node's list of children
ATTEMPTS = 16  # of a transaction that meets conflicts, and of a list of children that changes while it is read

_READ_BYTES = 64 * 1024
_RETRY_S = 0.02  # between tries to write to a device that is busy
_NAME = re.compile(r"[A-Za-z0-9_@-]+")
_NUMBER = re.compile(rb"[0-9]{1,20}")

Request = tuple[XsType, bytes]
Answer = bytes | XsError


class StoreError(Exception):
    """The store cannot be reached, or what it says is not the protocol. One line, with the path."""


class Event(NamedTuple):
    path: str
    token: str


class StoreClient:
    """One connection. As a context manager it closes itself, which ends its watches and transactions."""

    def __init__(self, path: str | os.PathLike[str], timeout_s: float = TIMEOUT_S) -> None:
        self.path = os.fspath(path)
        self.timeout_s = timeout_s
        self._fd, self._is_device = _open(self.path, timeout_s)
        # Devices take 4096 bytes with the header.
        self.body_max = XENSTORE_PAYLOAD_MAX - (HEADER_BYTES if self._is_device else 0)
        self._parser = Parser()
        self._events: deque[Event] = deque()
        self._last_id = 0

    def __enter__(self) -> StoreClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closing twice is fine."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    # --- nodes ----------------------------------------------------------------------------------------------

    def read(self, path: str, tx: int = 0) -> bytes:
        return self._ask(XsType.READ, join(path), tx)

    def write(self, path: str, value: bytes, tx: int = 0) -> None:
        self._ask(XsType.WRITE, join(path) + value, tx)

    def mkdir(self, path: str, tx: int = 0) -> None:
        self._ask(XsType.MKDIR, join(path), tx)

    def rm(self, path: str, tx: int = 0) -> None:
        self._ask(XsType.RM, join(path), tx)

    def directory(self, path: str, tx: int = 0) -> list[str]:
        """Names of the children, also if they do not fit into one answer."""
        return self.names(path, self.request([(XsType.DIRECTORY, join(path))], tx)[0], tx)

    def get_perms(self, path: str, tx: int = 0) -> list[Perm]:
        return self.perms(path, self._ask(XsType.GET_PERMS, join(path), tx))

    def set_perms(self, path: str, perms: Sequence[Perm], tx: int = 0) -> None:
        self._ask(XsType.SET_PERMS, join(path, *map(str, perms)), tx)

    # --- transactions ---------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[int]:
        """Yields its number; commits at the end, XsError EAGAIN if somebody interfered. An exception aborts it."""
        answer = self._ask(XsType.TRANSACTION_START, join(""), 0).removesuffix(b"\0")
        tx = int(answer) if _NUMBER.fullmatch(answer) else 0
        if not 0 < tx < 1 << 32:
            self._lost(f"it calls a transaction {shown(answer)}")
        try:
            yield tx
        except BaseException:
            with suppress(XsError, StoreError):  # the exception on its way out is the one to see
                self._ask(XsType.TRANSACTION_END, join("F"), tx)
            raise
        self._ask(XsType.TRANSACTION_END, join("T"), tx)

    def transact(self, work: Callable[[int], T], attempts: int = ATTEMPTS) -> T:
        """Commit what `work(tx)` did; all of it again if somebody interfered, XsError EAGAIN after the last attempt."""
        for left in reversed(range(attempts)):
            try:
                with self.transaction() as tx:
                    return work(tx)
            except XsError as error:
                if error.errno is not XsErrno.EAGAIN or not left:
                    raise
        raise AssertionError(f"{attempts} attempts")

    # --- the daemon itself ----------------------------------------------------------------------------------

    def control(self, *words: str, timeout_s: float | None = None) -> str:
        """CONTROL: what the daemon answers, which is text of its own making."""
        usual = self.timeout_s
        try:
            self.timeout_s = usual if timeout_s is None else timeout_s
            answer = self._ask(XsType.CONTROL, join(*words), 0)
        finally:
            self.timeout_s = usual
        return answer.removesuffix(b"\0").decode("utf-8", "surrogateescape")

    # --- watches --------------------------------------------------------------------------------------------

    def watch(self, path: str, token: str) -> None:
        self._ask(XsType.WATCH, join(path, token), 0)

    def unwatch(self, path: str, token: str) -> None:
        self._ask(XsType.UNWATCH, join(path, token), 0)

    def wait(self, timeout_s: float | None = None) -> Event | None:
        """The next event, or None if none comes in time. The first one of a watch comes with the watch."""
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        while not self._events:
            self._receive({}, {})
            left_s = deadline - time.monotonic()
            if not self._events and (left_s <= 0 or not self._poll(select.POLLIN, left_s)):
                return None
        return self._events.popleft()

    # --- many requests at a time ----------------------------------------------------------------------------

    def request(self, requests: Sequence[Request], tx: int = 0) -> list[Answer]:
        """Send all and return each one's answer: the body, or the error."""
        answers: list[Answer] = []
        for first in range(0, len(requests), WINDOW):
            answers += self._exchange(requests[first : first + WINDOW], tx)
        return answers

    def names(self, path: str, answer: Answer, tx: int = 0) -> list[str]:
        """What a DIRECTORY of `path` was answered with; asks for the parts if that was E2BIG."""
        if isinstance(answer, XsError):
            if answer.errno is not XsErrno.E2BIG:
                raise answer
            answer = self._list_in_parts(path, tx)
        names = [name.decode("ascii", "replace") for name in strings(answer)]
        whole = not answer or answer.endswith(b"\0")
        if not whole or not all(map(_NAME.fullmatch, names)) or len(set(names)) < len(names):
            self._lost(f"the names of the children of {path} are wrong")
        return names

    def perms(self, path: str, answer: Answer) -> list[Perm]:
        """What a GET_PERMS of `path` was answered with."""
        if isinstance(answer, XsError):
            raise answer
        try:
            perms = [Perm.parse(text.decode("ascii", "replace")) for text in strings(answer)]
        except XsError as error:
            self._lost(f"the permissions of {path} are wrong: {error.what}")
        if not perms:
            self._lost(f"{path} has no permissions")
        return perms

    # --- helpers --------------------------------------------------------------------------------------------

    def _ask(self, kind: XsType, body: bytes, tx: int) -> bytes:
        answer = self._exchange([(kind, body)], tx)[0]
        if isinstance(answer, XsError):
            raise answer
        return answer

    def _exchange(self, requests: Sequence[Request], tx: int) -> list[Answer]:
        waiting: dict[int, Request] = {}
        for kind, body in requests:
            if len(body) > self.body_max:
                raise _refused(XsErrno.E2BIG, (kind, body))
            self._last_id = self._last_id % 0xFFFF_FFFF + 1
            waiting[self._last_id] = (kind, body)
        order = list(waiting)
        out = deque(pack(kind, ident, tx, body) for ident, (kind, body) in waiting.items())
        if not self._is_device:
            out = deque([b"".join(out)])
        answers: dict[int, Answer] = {}
        deadline = time.monotonic() + self.timeout_s
        while waiting:
            blocked = self._send(out)
            if self._receive(waiting, answers):
                deadline = time.monotonic() + self.timeout_s
            elif waiting:
                self._wait_for_answer(blocked, deadline)
        return [answers[ident] for ident in order]

    def _wait_for_answer(self, blocked: bool, deadline: float) -> None:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            self._lost(f"no answer within {self.timeout_s:g} s")
        if blocked and self._is_device:
            self._poll(select.POLLIN, min(left_s, _RETRY_S))
        else:
            self._poll(select.POLLIN | (select.POLLOUT if blocked else 0), left_s)

    def _poll(self, wanted: int, timeout_s: float) -> bool:
        self._check_open()
        poll = select.poll()
        poll.register(self._fd, wanted)
        return bool(poll.poll(max(timeout_s, 0) * 1000))

    def _send(self, out: deque[bytes]) -> bool:
        """Write as much as goes; True if something is left."""
        self._check_open()
        try:
            while out:
                written = os.write(self._fd, out[0])
                if written < len(out[0]):
                    out[0] = out[0][written:]
                else:
                    out.popleft()
        except BlockingIOError:
            return True
        except OSError as error:
            self._lost(f"cannot be written to: {error.strerror}")
        return False

    def _receive(self, waiting: dict[int, Request], answers: dict[int, Answer]) -> int:
        """Take what is there: events are kept, answers move their request from `waiting`. How many of these."""
        self._check_open()
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._lost(f"cannot be read: {error.strerror}")
        if not data:
            self._lost("it has closed the connection")
        self._parser.feed(data)
        count = 0
        try:
            while (message := self._parser.next()) is not None:
                count += self._take(message, waiting, answers)
        except ProtocolError as error:
            self._lost(str(error))
        return count

    def _take(self, message: Message, waiting: dict[int, Request], answers: dict[int, Answer]) -> int:
        if message.type == XsType.WATCH_EVENT:
            parts = [part.decode("utf-8", "surrogateescape") for part in strings(message.body)]
            if len(parts) < 2 or len(self._events) >= EVENTS_MAX:
                self._lost("an event without a token" if len(parts) < 2 else f"{EVENTS_MAX} events that nobody wants")
            self._events.append(Event(parts[0], parts[1]))
            return 0
        request = waiting.pop(message.req_id, None)
        if request is None or message.type not in (request[0], XsType.ERROR):
            self._lost("an answer to something that was not asked")
        if message.type == XsType.ERROR:
            answers[message.req_id] = _error(message.body, request)
        else:
            answers[message.req_id] = message.body
        return 1

    def _list_in_parts(self, path: str, tx: int) -> bytes:
        """DIRECTORY_PART until the end of the list; from its start if the node has another generation by then."""
        for _ in range(ATTEMPTS):
            parts: list[bytes] = []
            size, first = 0, b""
            while True:
                answer = self._ask(XsType.DIRECTORY_PART, join(path, str(size)), tx)
                generation, _, part = answer.partition(b"\0")
                if not _NUMBER.fullmatch(generation) or not part.endswith(b"\0") or len(parts) >= PARTS_MAX:
                    self._lost(f"the parts of the children of {path} are wrong")
                if generation != (first or generation):
                    break
                first = generation
                parts.append(part)
                size += len(part)
                if part == b"\0" or part.endswith(b"\0\0"):
                    return b"".join(parts)[:-1]
        raise XsError(XsErrno.EAGAIN, f"the children of {path} change faster than they can be listed")

    def _check_open(self) -> None:
        if self._fd < 0:
            raise StoreError(f"{self.path}: the connection is closed")

    def _lost(self, why: str) -> NoReturn:
        self.close()
        raise StoreError(f"{self.path}: {why}")


def _open(path: str, timeout_s: float) -> tuple[int, bool]:
    """A descriptor that does not block, and whether it is a device's; as libxenstore, what is no socket is a device."""
    try:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            return _connect(path, timeout_s), False
        return _open_device(path), True
    except ConnectionRefusedError:
        raise StoreError(f"{path}: nobody listens at this socket") from None
    except OSError as error:
        raise StoreError(f"{path}: no store can be reached there: {error.strerror or error}") from None


def _connect(path: str, timeout_s: float) -> int:
    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as unix:
        unix.setblocking(False)
        while True:
            try:
                unix.connect(path)
                return unix.detach()
            except BlockingIOError:  # so many want to connect that the server is behind
                if time.monotonic() > deadline:
                    raise
            time.sleep(_RETRY_S)


def _open_device(path: str) -> int:
    """Below a mount of xenfs a device is a regular file, but one without a position; a file is not written to."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(fd).st_mode
    if stat.S_ISCHR(mode) or (stat.S_ISREG(mode) and not _has_position(fd)):
        return fd
    os.close(fd)
    raise StoreError(f"{path}: this is neither a socket nor a device of a store")


def _has_position(fd: int) -> bool:
    try:
        os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:
        return False
    return True


def _refused(errno: XsErrno, request: Request, why: str = "") -> XsError:
    kind, body = request
    about = body.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return XsError(errno, f"{kind.name} {shown(about)}{why}")


def _error(body: bytes, request: Request) -> XsError:
    """An error this side has no name for is EINVAL, as in libxenstore, but is told."""
    name = body.removesuffix(b"\0").decode("ascii", "replace")
    if name in XsErrno.__members__:
        return _refused(XsErrno[name], request)
    return _refused(XsErrno.EINVAL, request, f": the store says {shown(name)}")
