"""What the tests of dev/xen/xenbus and its like share: a program's side of the file, and a peer that obeys the test.

`Desk` is a domain with a device whose opens are peers of a real store, or scripted ones; `File` is one open.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

from tests.xenfs.machine import KIB, Kernel, Reply
from xenfs.fuse import kernel as k
from xenfs.fuse.tree import Directory
from xenfs.nodes.xenbus import XenbusFile, XsDevice, XsFile
from xenmodel.hypervisor import Hypervisor
from xenmodel.public.io.xs_wire import SOCKMSG, XsType
from xenmodel.types import Domid
from xenmodel.xenstore.perms import Access, Perm
from xenmodel.xenstore.store import Store
from xenmodel.xenstore.wire import Message, Parser, join, pack

DOMID = 7
NONBLOCK = os.O_RDWR | os.O_NONBLOCK

REQUEST = pack(XsType.WRITE, 1, 0, b"data\0some value")
READ = pack(XsType.READ, 2, 0, b"data\0")
REPLIES = [Message(XsType.WRITE, 1, 0, b"OK\0"), Message(XsType.READ, 2, 0, b"some value")]


def written(count: int) -> Reply:
    """The reply to a WRITE of which so many bytes were taken."""
    return Reply(0, k.WRITE_OUT.pack(count, 0))


class Script:
    """A peer that answers when the test says so: `received` has the requests, `flush` is what the node gave it."""

    def __init__(self, flush: Callable[[], None]) -> None:
        self.flush = flush
        self.connection = Store().connect(Domid(DOMID))
        self.out = bytearray()
        self.failed = 0
        self.wants_input = True
        self.received: list[Message] = []
        self.parser = Parser()
        self.closes = 0
        self.answers = False  # at once, with `body`
        self.body = b"OK\0"
        self.most: int | None = None  # wants no more than so many requests

    def receive(self, data: bytes) -> None:
        assert self.wants_input, "input that was not wanted"
        self.parser.feed(data)
        while (message := self.parser.next()) is not None:
            self.received.append(message)
            if self.answers:
                self.answer(message, self.body, flush=False)
        assert not self.parser.pending, "a request in pieces"
        if self.most is not None:
            self.most -= 1
            self.wants_input = self.most > 0

    def answer(self, request: Message, body: bytes = b"OK\0", *, error: bool = False, flush: bool = True) -> None:
        self.out += pack(XsType.ERROR if error else request.type, request.req_id, request.tx_id, body)
        if flush:
            self.flush()

    def want(self, most: int | None = None) -> None:
        self.wants_input, self.most = True, most
        self.flush()

    def sent(self, count: int) -> None:
        del self.out[:count]

    def close(self) -> None:
        self.closes += 1


class File:
    """One open of the device, and a program's side of it."""

    def __init__(self, desk: Desk) -> None:
        self.kernel = desk.kernel
        self.fh = self.kernel.handle("xenbus", os.O_RDWR)
        node = self.kernel.session.handles[self.fh]
        assert isinstance(node, XsFile)
        self.node = node
        self.peer: Any = node.peer
        self.parser = Parser()

    def send_read(self, size: int = 64 * KIB, flags: int = os.O_RDWR) -> int:
        return self.kernel.send(k.FUSE_READ, 0, k.READ_IN.pack(self.fh, 0, size, 0, 0, flags, 0))

    def send_write(self, data: bytes, flags: int = os.O_RDWR) -> int:
        return self.kernel.send(k.FUSE_WRITE, 0, k.WRITE_IN.pack(self.fh, 0, len(data), 0, 0, flags, 0), data)

    def read(self, size: int = 64 * KIB, flags: int = NONBLOCK) -> Reply:
        return self.kernel.wait(self.send_read(size, flags))

    def write(self, data: bytes, flags: int = NONBLOCK) -> Reply:
        return self.kernel.wait(self.send_write(data, flags))

    def interrupt(self, unique: int) -> None:
        self.kernel.send(k.FUSE_INTERRUPT, 0, k.INTERRUPT_IN.pack(unique))

    def poll(self, schedule: bool = False) -> int:
        flags = k.FUSE_POLL_SCHEDULE_NOTIFY if schedule else 0
        reply = self.kernel.call(k.FUSE_POLL, 0, k.POLL_IN.pack(self.fh, self.fh + 1000, flags, 0xFFFF))
        assert not reply.error
        return int(k.POLL_OUT.unpack(reply.data)[0])

    def messages(self) -> list[Message]:
        """All that can be read now."""
        while not (reply := self.read()).error:
            self.parser.feed(reply.data)
        assert reply.error == errno.EAGAIN
        found = []
        while (message := self.parser.next()) is not None:
            found.append(message)
        assert not self.parser.pending, "part of a message"
        return found

    def put(self, kind: int, *parts: str | bytes, tx: int = 0, body: bytes | None = None) -> Reply:
        """A request in one write(2)."""
        return self.write(pack(kind, 5, tx, join(*parts) if body is None else body))

    def ask(self, kind: int, *parts: str | bytes, tx: int = 0, body: bytes | None = None) -> bytes:
        """The body of the reply to a request that must be answered, and first; an ERROR's is marked."""
        data = join(*parts) if body is None else body
        assert self.put(kind, tx=tx, body=data) == written(SOCKMSG.size + len(data))
        reply, *self.events = self.messages()
        assert reply.req_id == 5 and all(event.type == XsType.WATCH_EVENT for event in self.events)
        if reply.type == XsType.ERROR:
            return b"error " + reply.body.rstrip(b"\0")
        assert reply.type == kind
        return reply.body

    def start(self) -> int:
        return int(self.ask(XsType.TRANSACTION_START, "").rstrip(b"\0"))

    def seen(self) -> list[tuple[bytes, bytes]]:
        """Path and token of the events that can be read now."""
        return [self.event(message) for message in self.messages()]

    @staticmethod
    def event(message: Message) -> tuple[bytes, bytes]:
        assert message[:3] == (XsType.WATCH_EVENT, 0, 0)
        path, token, end = message.body.split(b"\0")
        assert not end
        return path, token

    def release(self) -> Reply:
        return self.kernel.call(k.FUSE_RELEASE, 0, k.RELEASE_IN.pack(self.fh, 0, 0, 0))


class Desk:
    """The device of one domain with a directory of its own in the store, or with scripted peers."""

    def __init__(self, file: Callable[[XsDevice], XsFile] = XenbusFile, *, scripted: bool = False) -> None:
        self.now = 0.0
        self.hypervisor = Hypervisor(clock=lambda: self.now)
        self.hypervisor.create_domain(4, "g", DOMID)
        self.store = self.hypervisor.store
        self.store.introduce(Domid(DOMID))
        self.toolstack = self.store.connect(Domid(0))
        self.home = f"/local/domain/{DOMID}"
        self.toolstack.mkdir(self.home)
        self.toolstack.set_perms(self.home, [Perm(Domid(DOMID), Access.NONE)])
        make: Any = Script if scripted else lambda flush: self.hypervisor.xenstored.peer(Domid(DOMID), flush)
        self.device = XsDevice(make, file)
        self.kernel = Kernel(Directory({"xenbus": self.device}))
        self.kernel.settle = self.hypervisor.settle  # type: ignore[method-assign]

    def open(self) -> File:
        return File(self)

    def write(self, name: str, value: bytes) -> None:
        """Somebody else writes to a node of the domain."""
        self.toolstack.write(f"{self.home}/{name}", value)
        self.hypervisor.settle()
