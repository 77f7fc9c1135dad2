"""realstore.py: Debian's own xenstored and oxenstored as references: real daemons, real domains, no Xen and no root.

Used by the differential test and the benchmark. realstore.c, compiled here and preloaded, answers what the daemons ask of
Xen; this side is the hypervisor and the guests: it makes domains' pages, sends events and says who lives. WireClient speaks
to any store the same way, over a Unix socket (as domain 0) or over a domain's ring.

Invariants: a daemon never outlives the thread that started it; its log stays in `directory`, all else is gone when the
store is left; a client's log holds all that arrived, in the order it arrived.
Left out: live update, and Xen 4.21 and newer, whose daemon asks for domains in another way.
"""

from __future__ import annotations

import atexit
import contextlib
import enum
import fcntl
import functools
import mmap
import os
import select
import shutil
import socket
import struct
import subprocess
import tempfile
import termios
import threading
import time
from pathlib import Path
from typing import ClassVar, Protocol, Self

from bench import interrupt
from xenmodel.public.io.xs_wire import SOCKMSG, XENSTORE_DOMAIN_INTERFACE, XENSTORE_RING_SIZE, XsType
from xenmodel.xenstore.wire import Message, Parser, ProtocolError, join

SOURCE = Path(__file__).with_suffix(".c")
CONFIG = Path("/etc/xen/oxenstored.conf")
READY_S, TIMEOUT_S, QUIET_S, POLL_S = 10.0, 5.0, 0.05, 0.001
MASK = (1 << 32) - 1
RSP = XENSTORE_DOMAIN_INTERFACE.offsets["rsp"]
DOMIDS = 0x7FF0
VIRQ_PORT, FIRST_PORT, REASON_SHIFT = 1, 1000, 4  # as in realstore.c
STORE_PORT = 1  # a domain's own number of its channel to the store, as libxl chooses


class State(enum.IntFlag):
    """What Xen would say about a domain, 0 if it is gone; the bits above hold the reason of a shutdown."""

    EXISTS = 1
    SHUTDOWN = 2
    DYING = 4


class RealStoreError(Exception):
    """A daemon did not start or did not do what was asked; the text has its last words."""


def find(program: str) -> Path | None:
    """The newest installed one of Xen's own programs."""
    return max(Path("/usr/lib").glob(f"xen-*/bin/{program}"), default=None)


def missing(program: str = "xenstored") -> str:
    """Why this daemon cannot run here, or ""."""
    header = Path("/usr/include/xenctrl.h")
    there = {f"xen-utils (for {program})": find(program), "gcc": shutil.which("gcc"), "libxen-dev": header.exists()}
    absent = [package for package, found in there.items() if not found]
    return f"not installed: {', '.join(absent)}" if absent else ""


@functools.cache
def library() -> Path:
    """realstore.c as a library. Compiled once in a process, into a folder that goes with it, and not with a forked child."""
    folder, owner = Path(tempfile.mkdtemp(prefix="realstore-")), os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    made = folder / "realstore.so"
    argv = ("gcc", "-shared", "-fPIC", "-O2", "-Wall", "-o", str(made), str(SOURCE))
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RealStoreError(f"gcc: {done.stderr}")
    return made


class _Word:
    """One of the page's 32-bit fields. Each access is one load or store."""

    def __init__(self, field: str) -> None:
        self._at = XENSTORE_DOMAIN_INTERFACE.offsets[field] // 4

    def __get__(self, ring: RealRing, owner: type | None = None) -> int:
        return ring.words[self._at]

    def __set__(self, ring: RealRing, value: int) -> None:
        ring.words[self._at] = value


class RealRing:
    """A domain's side of its ring page: struct xenstore_domain_interface, and its event channel to the daemon."""

    req_cons, req_prod, rsp_cons, rsp_prod = _Word("req_cons"), _Word("req_prod"), _Word("rsp_cons"), _Word("rsp_prod")
    server_features, connection = _Word("server_features"), _Word("connection")
    error = _Word("error")  # XENSTORE_ERROR_*; the daemon sets it without an event

    def __init__(self, folder: Path, domid: int) -> None:
        """Of a domain that a RealStore made in its folder `run`; any process of the same user may hold one."""
        self.domid = domid
        self._fence = threading.Lock()  # taking one orders a store before the loads behind it
        with contextlib.ExitStack() as undo:
            self._kick = os.open(folder / f"kick-{domid}", os.O_RDONLY | os.O_NONBLOCK)
            undo.callback(os.close, self._kick)
            self._events = os.open(folder / "events", os.O_RDWR | os.O_NONBLOCK)
            undo.callback(os.close, self._events)
            with (folder / f"ring-{domid}").open("r+b") as file:
                shared = undo.enter_context(contextlib.closing(mmap.mmap(file.fileno(), mmap.PAGESIZE)))
            self.page = undo.enter_context(memoryview(shared))
            self.words = undo.enter_context(self.page.cast("I"))
            self.close = undo.pop_all().close  # the daemon keeps its own hold on the page

    def kick(self) -> None:
        """An event for the daemon."""
        _send_event(self._events, FIRST_PORT + self.domid)

    def send(self, data: bytes, timeout_s: float = TIMEOUT_S) -> None:
        """Put all of it into the ring, waiting for room. TimeoutError if there is none for so long."""
        deadline = time.monotonic() + timeout_s
        sent = 0
        while sent < len(data):
            at = self.req_prod
            room = XENSTORE_RING_SIZE - _used(at, self.req_cons)
            start = at % XENSTORE_RING_SIZE
            part = data[sent : sent + min(room, XENSTORE_RING_SIZE - start)]
            if part:
                self.page[start : start + len(part)] = part
                self.req_prod = (at + len(part)) & MASK
                sent += len(part)
                self.kick()
            else:
                self._wait(deadline, f"{sent} of {len(data)} bytes were taken")

    def receive(self, timeout_s: float = TIMEOUT_S) -> bytes:
        """What has arrived, at least one byte. TimeoutError; ConnectionError once the daemon has let go of the ring."""
        deadline = time.monotonic() + timeout_s
        while not (data := self._take()):
            self._wait(deadline, "nothing arrived")
        return data

    def _take(self) -> bytes:
        at, end = self.rsp_cons, self.rsp_prod
        count = _used(end, at)
        if not count:
            return b""
        start = at % XENSTORE_RING_SIZE
        first = bytes(self.page[RSP + start : RSP + min(start + count, XENSTORE_RING_SIZE)])
        data = first + bytes(self.page[RSP : RSP + count - len(first)])
        self.rsp_cons = end
        with self._fence:
            pass
        if (self.rsp_prod - at) & MASK >= XENSTORE_RING_SIZE:  # it was full: the daemon may wait for room
            self.kick()
        return data

    def _wait(self, deadline: float, what: str) -> None:
        if not (ready := _poll(self._kick, select.POLLIN, deadline - time.monotonic())):
            raise TimeoutError(f"domain {self.domid}'s ring: {what}")
        if ready & select.POLLIN:
            os.read(self._kick, 1 << 16)
        elif self.rsp_prod == self.rsp_cons:
            raise ConnectionResetError(f"domain {self.domid}'s ring: the daemon has closed its port")


def _used(prod: int, cons: int) -> int:
    """Bytes between two indices, of which one is the daemon's."""
    count = (prod - cons) & MASK
    if count > XENSTORE_RING_SIZE:
        raise ProtocolError(f"a ring with indices {cons} and {prod}")
    return count


def _poll(fd: int, mask: int, timeout_s: float) -> int:
    poll = select.poll()
    poll.register(fd, mask)
    return dict(poll.poll(max(timeout_s, 0) * 1000)).get(fd, 0)


def _send_event(events: int, port: int) -> None:
    """Into the FIFO the daemon reads. One that no longer does ends in a TimeoutError."""
    if not _poll(events, select.POLLOUT, TIMEOUT_S):
        raise TimeoutError("the daemon does not read its events")
    os.write(events, struct.pack("=I", port))


class Stream(Protocol):
    """What carries messages: RealRing, SocketStream. Both calls wait at most so long, then raise TimeoutError."""

    def send(self, data: bytes, timeout_s: float) -> None: ...

    def receive(self, timeout_s: float) -> bytes: ...


class SocketStream:
    """A connection to a store's Unix socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.close = self._socket.close
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(TIMEOUT_S), 0))  # to connect
        if error := self._socket.connect_ex(str(path)):
            self.close()
            raise OSError(error, os.strerror(error), str(path))

    def send(self, data: bytes, timeout_s: float = TIMEOUT_S) -> None:
        self._socket.settimeout(timeout_s)
        self._socket.sendall(data)

    def receive(self, timeout_s: float = TIMEOUT_S) -> bytes:
        self._socket.settimeout(max(timeout_s, 1e-6))  # 0 would be another mode
        if not (data := self._socket.recv(1 << 16)):
            raise ConnectionResetError("the store has closed the connection")
        return data


class WireClient(contextlib.AbstractContextManager["WireClient", None]):
    """A blocking client. `log` holds all messages received, replies and events, in order; who measures may clear it."""

    def __init__(self, stream: Path | Stream, timeout_s: float = TIMEOUT_S) -> None:
        """A Path is that of a socket, and the connection the client's own; any other stream stays the caller's."""
        self.timeout_s = timeout_s
        self.log: list[Message] = []
        undo = contextlib.ExitStack()
        self.stream = undo.enter_context(contextlib.closing(SocketStream(stream))) if isinstance(stream, Path) else stream
        self.close = undo.close
        self._parser = Parser()
        self._last = 0

    def __exit__(self, *_: object) -> None:
        self.close()

    def request(self, kind: int, body: bytes = b"", tx: int = 0) -> Message:
        """Ask and wait for the reply, which may be an ERROR. TimeoutError, ConnectionError or ProtocolError without one."""
        req_id = self.post(kind, body, tx)
        deadline = time.monotonic() + self.timeout_s
        while (message := self.next(deadline)).type == XsType.WATCH_EVENT:
            pass
        if message.req_id != req_id:
            raise ProtocolError(f"reply to request {message.req_id} instead of {req_id}: {message}")
        return message

    def post(self, kind: int, body: bytes = b"", tx: int = 0) -> int:
        """Ask without waiting -> the request's id. The body may be longer than is legal."""
        self._last = self._last % MASK + 1
        self.stream.send(SOCKMSG.pack(kind, self._last, tx, len(body)) + body, self.timeout_s)
        return self._last

    def next(self, deadline: float | None = None) -> Message:
        """The next message of any kind, waiting until time.monotonic() is `deadline`."""
        if deadline is None:
            deadline = time.monotonic() + self.timeout_s
        while not (message := self._parser.next()):
            self._parser.feed(self.stream.receive(max(deadline - time.monotonic(), 0)))
        self.log.append(message)
        return message

    def drain(self, quiet_s: float = QUIET_S) -> list[Message]:
        """What arrives from now on until nothing did for so long or the connection has ended."""
        seen = len(self.log)
        with contextlib.suppress(TimeoutError, ConnectionError):
            while True:
                self.next(time.monotonic() + quiet_s)
        return self.log[seen:]


class RealStore:
    """A daemon, and a hypervisor with domains for it. `options` are the daemon's own."""

    PROGRAM: ClassVar[str]
    ARGUMENTS: ClassVar[tuple[str, ...]]

    def __init__(self, directory: Path, *options: str) -> None:
        """`directory` is made if it is not there. Only one store at a time can be in it."""
        self.log = directory.absolute() / "log"
        self.run = directory.absolute() / "run"
        self.socket = self.run / "socket"
        self.options = options
        self.rings: dict[int, RealRing] = {}  # of the domains there are; 0's is what its kernel would use

    def __enter__(self) -> Self:
        if reason := missing(self.PROGRAM):
            raise RealStoreError(reason)
        with contextlib.ExitStack() as self._undo:
            self._prepare()
            try:
                self._start()
                self.settle()
            except OSError as error:
                words = self.log.read_text(errors="replace")[-500:]
                raise RealStoreError(f"{self.PROGRAM} did not start: {error!r}; it said: {words}") from error
            self._undo = self._undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with interrupt.held():
            self._undo.close()

    def _prepare(self) -> None:
        """The folder that stands for the hypervisor, with domain 0."""
        self.run.mkdir(parents=True)
        self._undo.callback(shutil.rmtree, self.run)
        with (self.run / "domains").open("x+b") as file:
            file.truncate(DOMIDS)
            self._domains = self._undo.enter_context(contextlib.closing(mmap.mmap(file.fileno(), DOMIDS)))
        os.mkfifo(self.run / "events", 0o600)
        self._events = os.open(self.run / "events", os.O_RDWR | os.O_NONBLOCK)
        self._undo.callback(os.close, self._events)
        (self.run / "xsd_port").write_text(str(STORE_PORT))
        installed = CONFIG.read_text() if CONFIG.exists() else ""
        (self.run / "config").write_text(f"{installed}\npid-file = pid\nxenstored-log-file = daemon.log\n")
        self.create_domain(0)

    def _start(self) -> None:
        names = {"XENSTORED_RUNDIR": str(self.run), "XENSTORED_PATH": str(self.socket)}
        environment = os.environ | names | {"LD_PRELOAD": str(library()), "REALSTORE_PARENT": str(os.getpid())}
        argv = (str(find(self.PROGRAM)), *self.ARGUMENTS, *self.options)
        with self.log.open("wb") as log, interrupt.held():
            process = subprocess.Popen(argv, cwd=self.run, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            self._undo.callback(process.wait)
            self._undo.callback(process.kill)
        self.pid = process.pid
        deadline = time.monotonic() + READY_S
        while True:
            try:
                self.control = self._undo.enter_context(WireClient(self.socket))
                return
            except (FileNotFoundError, ConnectionRefusedError):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(POLL_S)

    def settle(self) -> None:
        """Returns when the daemon has dealt with all events sent so far."""
        deadline = time.monotonic() + TIMEOUT_S
        while any(fcntl.ioctl(self._events, termios.FIONREAD, b"\0\0\0\0")):  # each is dealt with as it is read
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.PROGRAM} does not read its events")
            time.sleep(POLL_S)
        self._ask(XsType.GET_DOMAIN_PATH, "0")

    def _ask(self, kind: XsType, *strings: str) -> None:
        reply = self.control.request(kind, join(*strings))
        self.control.log.clear()
        if reply.type != kind:
            raise RealStoreError(f"{self.PROGRAM}: {kind.name} {strings}: {reply.body!r}")

    def create_domain(self, domid: int) -> RealRing:
        """A domain exists from now on, with an empty ring page. Nobody has told the daemon."""
        if not 0 <= domid < DOMIDS or domid in self.rings:
            raise ValueError(f"domain {domid} cannot be made")
        with (self.run / f"ring-{domid}").open("xb") as file:
            file.truncate(mmap.PAGESIZE)
        os.mkfifo(self.run / f"kick-{domid}", 0o600)
        self.rings[domid] = self._undo.enter_context(contextlib.closing(RealRing(self.run, domid)))
        self._domains[domid] = State.EXISTS
        return self.rings[domid]

    def add_domain(self, domid: int) -> RealRing:
        """create_domain, and introduce it as the toolstack does."""
        ring = self.create_domain(domid)
        self._ask(XsType.INTRODUCE, str(domid), "1", str(STORE_PORT))  # both daemons map its page whatever the frame
        return ring

    def shutdown_domain(self, domid: int, reason: int = 0) -> None:
        """It has shut down, for a reason of sched.h, and still exists."""
        self.set_state(domid, State.EXISTS | State.SHUTDOWN | reason << REASON_SHIFT)

    def destroy_domain(self, domid: int) -> None:
        """It is gone, and its domid free. Its ring can still be looked at."""
        self.set_state(domid, 0)
        del self.rings[domid]
        for kind in ("ring", "kick"):
            (self.run / f"{kind}-{domid}").unlink()

    def set_state(self, domid: int, state: int) -> None:
        """Change what is said about a domain and tell the daemon with VIRQ_DOM_EXC. Returns when it has looked."""
        self._domains[domid] = state
        _send_event(self._events, VIRQ_PORT)
        self.settle()


class RealXenstored(RealStore):
    """The C daemon. The options -T FILE give a trace of all it does."""

    PROGRAM = "xenstored"
    ARGUMENTS = ("-N", "-I", "--pid-file", "pid")


class RealOxenstored(RealStore):
    """The OCaml daemon, with the configuration that is installed; its own folder is compiled in and led to ours."""

    PROGRAM = "oxenstored"
    ARGUMENTS = ("--no-fork", "--no-access-log", "--config-file", "config", "--pid-file", "pid")
