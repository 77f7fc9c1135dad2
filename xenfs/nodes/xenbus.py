"""xenbus.py: dev/xen/xenbus and proc/xen/xenbus, drivers/xen/xenbus/xenbus_dev_frontend.c: xenstore through a file.

XsFile is what one open() has in every kernel: a request that is not whole yet, a Peer of the store, replies and events
that nobody has read. XenbusFile adds Linux's rules, xs_dev.py FreeBSD's. The tree makes one XsDevice per domain and rule.

As of Linux: a request is at most BUFFER_BYTES with its header; a transaction that is not this open's is ENOENT; watches
are the kernel's own, so that the same one can be set twice, UNWATCH always answers OK, the depth that newer clients send
is ignored and a WATCH that the store refuses is the errno of the write(2), without a reply. poll(2) never says writable.

Unlike Linux: what follows a whole request in one write(2) is the next request (Linux drops it). Unread replies are at
most QUEUE_MOST bytes: then, and while the store takes nothing from this domain, a write waits, or is EAGAIN with
O_NONBLOCK. They count for the domain's memory quota. A write that is given up half way is short, by whole requests. A lost
stream is EIO once all was read. While WAITING_MOST reads of an open wait, one more is EAGAIN; so are writes. Beyond 256
opens of all device files of a domain but 0 (xenfs/xenstored.py) it is ENFILE.

Invariants: every READ and WRITE gets one answer; a request goes to the peer whole or not at all; at most one is waited
for (`talk`), and nothing follows it until its reply is there; what is in `queue` is in its domain's `unread`.
Left out: what becomes of transactions when the domain migrates.
"""

from __future__ import annotations

import errno
import os
import select
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from xenfs.fuse import kernel as k
from xenfs.fuse.session import Session
from xenfs.fuse.tree import Change, Node, Opened, refuse
from xenmodel.public.io.xs_wire import SOCKMSG, XSD_ERRORS, XsType
from xenmodel.xenstore.peer import Peer
from xenmodel.xenstore.perms import CONTROL_DOMAIN
from xenmodel.xenstore.wire import HEADER_BYTES, Message, join, pack

MakePeer = Callable[[Callable[[], None]], Peer]  # its argument: there may be output, or room for input, now

BUFFER_BYTES = 4096  # of a request with its header; both kernels
QUEUE_MOST = 64 * 1024  # unread bytes of one open beyond which the store's output stays with the peer
QUEUE_MOST_DOM0 = 256 * 1024
WAITING_MOST = 64  # reads of one open that wait, and writes

READABLE = select.POLLIN | select.POLLRDNORM
WRITABLE = select.POLLOUT | select.POLLWRNORM
# PARALLEL_DIRECT_WRITES: nobody waits because another writer does. It needs XsDevice.size.
_FOPEN = k.FOPEN_DIRECT_IO | k.FOPEN_NONSEEKABLE | k.FOPEN_STREAM | k.FOPEN_PARALLEL_DIRECT_WRITES
_ERRNO = {name: number for number, name in XSD_ERRORS}


class Read(NamedTuple):
    """A READ that waits for something to read."""

    session: Session
    size: int


@dataclass(slots=True, eq=False)
class Write:
    """A WRITE until it is answered."""

    session: Session
    unique: int
    size: int
    nonblock: bool
    data: bytes
    kept: int = -1  # bytes of earlier ones before it in the buffer; -1 until it is there itself
    handed: bool = False  # a request that ended in this write is with the peer


class XsFile(Node):
    """One open. A kernel's rules are in ask(), event() and the constants here."""

    drops_what_overflows = True  # EINVAL for a write beyond BUFFER_BYTES, and what was there before is gone too
    too_long = errno.E2BIG  # a header that promises more than BUFFER_BYTES
    always = 0  # what poll(2) says at all times

    def __init__(self, device: XsDevice) -> None:
        self.device = device
        self.closed = False
        self.buffer = bytearray()  # a request that is not whole, or cannot go to the peer yet
        self.queue = bytearray()  # for the reader
        self.reads: dict[int, Read] = {}  # by unique, the one that waits longest first
        self.writes: dict[int, Write] = {}
        self.unanswered = 0  # requests that the peer has
        self.talk: Callable[[Message], None] | None = None  # takes the reply to the last of them
        self.refused = 0  # errno of what the first write asked
        self.poller: tuple[Session, int] | None = None
        self._pumping = self._again = False
        self.peer = device.make_peer(self.pump)
        self._record = self.peer.connection.record
        device.files.add(self)

    # --- what a kernel's rules are made of ----------------------------------------------------------------------------

    def ask(self, request: Message) -> None:
        """A whole request: send() it, or put() an answer."""
        raise NotImplementedError

    def event(self, body: bytes) -> bytes:
        """The body of a WATCH_EVENT as the reader shall see it."""
        return body

    def send(self, request: Message, talk: Callable[[Message], None] | None = None) -> None:
        """To the peer. `talk` takes the reply, otherwise it goes to the reader as it is."""
        assert self.talk is None, "a request after one that is waited for"
        self.unanswered += 1
        self.talk = talk
        self.peer.receive(pack(*request))

    def put(self, reply: Message) -> None:
        """To the reader."""
        data = pack(*reply)
        self.queue += data
        self._record.unread += len(data)

    def put_error(self, request: Message, name: str) -> None:
        self.put(Message(XsType.ERROR, request.req_id, request.tx_id, join(name)))

    def watch_of(self, request: Message) -> tuple[bytes, bytes] | None:
        """Path and token of a WATCH or UNWATCH. None if they are not both there; that is answered."""
        parts = request.body.split(b"\0", 2)  # a depth would be the rest
        if len(parts) < 3:
            self.put_error(request, "EINVAL")
            return None
        return parts[0], parts[1]

    # --- the file -----------------------------------------------------------------------------------------------------

    def read(self, session: Session, unique: int, offset: int, size: int, flags: int) -> None:
        if (flags & os.O_NONBLOCK or len(self.reads) >= WAITING_MOST) and not self.queue and not self.lost:
            raise refuse(errno.EAGAIN)
        self.reads[unique] = Read(session, size)
        self.pump()

    def write(self, session: Session, unique: int, offset: int, size: int, flags: int) -> None:
        nonblock = bool(flags & os.O_NONBLOCK)
        if len(self.writes) >= (1 if nonblock else WAITING_MOST):
            raise refuse(errno.EAGAIN)
        data = bytes(session.landing[0][: min(size, BUFFER_BYTES)])  # more is refused anyway
        self.writes[unique] = Write(session, unique, size, nonblock, data)
        self.pump()

    def poll(self, session: Session, kh: int, schedule: bool) -> int:
        revents = self.always
        if self.queue or self.lost:
            revents |= READABLE | (select.POLLERR if self.lost else 0)
        elif schedule:
            self.poller = session, kh
        return revents

    def interrupt(self, unique: int) -> bool:
        read, write = self.reads.pop(unique, None), self.writes.get(unique)
        if read is not None:
            read.session.send_error(unique, errno.EINTR)
            return True
        if write is None or (self.talk is not None and unique == next(iter(self.writes))):
            return False  # the store answers soon; the kernels do not give this up either
        self._give_up(write, errno.EINTR)
        self.pump()
        return True

    def release(self) -> None:
        self.closed = True
        self.peer.close()
        self._record.unread -= len(self.queue)
        self.queue.clear()
        self.device.files.discard(self)
        self._fail_all()

    @property
    def lost(self) -> bool:
        """Nothing more will come, or be taken."""
        return bool(self.peer.failed) or self.peer.connection.closed

    @property
    def full(self) -> bool:
        return len(self.queue) >= (QUEUE_MOST_DOM0 if self._record.domid == CONTROL_DOMAIN else QUEUE_MOST)

    # --- keeping it moving --------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Do all that can be done now. Called again from inside (by the peer) it makes the outer call look once more."""
        self._again = True
        if self._pumping or self.closed:
            return
        self._pumping = True
        try:
            while self._again:
                self._again = False
                self._take()
                self._hand_over()
                self._take()
                self._answer()
        finally:
            self._pumping = False
        if self.poller is not None and (self.queue or self.lost):
            (session, kh), self.poller = self.poller, None
            session.notify_poll(kh)

    def _take(self) -> None:
        """What the peer has, message by message, as long as the reader's queue has room or a reply is waited for."""
        while self.peer.out and (self.talk is not None or not self.full):
            kind, req_id, tx_id, length = SOCKMSG.unpack_from(self.peer.out)
            message = Message(kind, req_id, tx_id, bytes(self.peer.out[HEADER_BYTES : HEADER_BYTES + length]))
            assert len(message.body) == length, "the peer's output is whole messages"
            self.peer.sent(HEADER_BYTES + length)
            self._taken(message)

    def _taken(self, message: Message) -> None:
        if message.type == XsType.WATCH_EVENT:
            self.put(message._replace(body=self.event(message.body)))
            return
        self.unanswered -= 1
        if self.talk is not None and not self.unanswered:
            talk, self.talk = self.talk, None
            talk(message)
        else:
            self.put(message)

    def _hand_over(self) -> None:
        """Writes, first come first served, until one has to wait."""
        while self.writes and self.talk is None and not self.lost:
            write = next(iter(self.writes.values()))
            if not self.refused:
                self.refused = self._accept(write)
            if self.refused:
                number, self.refused = self.refused, 0
                del self.writes[write.unique]
                write.session.send_error(write.unique, number)
            elif self.talk is not None:
                self._take()  # nearly always the reply is there
            elif not self._has_request():
                del self.writes[write.unique]
                write.session.send_written(write.unique, write.size)
            elif not write.nonblock:
                return
            else:
                self._give_up(write, errno.EAGAIN)

    def _accept(self, write: Write) -> int:
        """Put it into the buffer, and whole requests from there to the peer while that wants them. An errno, or 0."""
        if write.kept < 0:
            if len(self.buffer) + write.size > BUFFER_BYTES:
                if self.drops_what_overflows:
                    self.buffer.clear()
                return errno.EINVAL
            write.kept = len(self.buffer)
            self.buffer += write.data
            write.data = b""
        while self.talk is None and len(self.buffer) >= HEADER_BYTES:
            self._take()  # what we put() ourselves does not overtake it
            kind, req_id, tx_id, length = SOCKMSG.unpack_from(self.buffer)
            end = HEADER_BYTES + length
            if end > BUFFER_BYTES:
                self.buffer.clear()
                return self.too_long
            if end > len(self.buffer) or self.full or not self.peer.wants_input:
                break
            body = bytes(self.buffer[HEADER_BYTES:end])
            del self.buffer[:end]
            write.handed = True
            self.ask(Message(kind, req_id, tx_id, body))
        return 0

    def _has_request(self) -> bool:
        """Is a whole one in the buffer? Then it cannot go to the peer yet."""
        have = len(self.buffer)
        return have >= HEADER_BYTES and have >= HEADER_BYTES + SOCKMSG.unpack_from(self.buffer)[3]

    def _give_up(self, write: Write, number: int) -> None:
        """Answer a write that waits: short if some of it is with the peer, else `number`. The rest never was written."""
        del self.writes[write.unique]
        if write.handed:
            written = write.size - len(self.buffer)
            self.buffer.clear()
            write.session.send_written(write.unique, written)
        else:
            if write.kept >= 0:
                del self.buffer[write.kept :]
            write.session.send_error(write.unique, number)

    def _answer(self) -> None:
        while self.reads and self.queue:
            unique = next(iter(self.reads))
            session, size = self.reads.pop(unique)
            if self.full:
                self._again = True  # there is room now
            data = self.queue[:size]
            del self.queue[:size]
            self._record.unread -= len(data)
            session.send_data(unique, [data])
        if self.lost:
            self._fail_all()  # readers: there is nothing left

    def _fail_all(self) -> None:
        self.talk = None
        waiting: list[tuple[int, Read | Write]] = [*self.reads.items(), *self.writes.items()]
        for unique, one in waiting:
            one.session.send_error(unique, errno.EIO)
        self.reads.clear()
        self.writes.clear()


class XenbusFile(XsFile):
    """An open of Linux's xenbus."""

    def __init__(self, device: XsDevice) -> None:
        super().__init__(device)
        self.watches: dict[tuple[bytes, bytes], list[bytes]] = {}  # path and token as they came -> tokens at the store
        self._watches_made = 0

    def ask(self, request: Message) -> None:
        kind, _, tx_id, body = request
        if kind in (XsType.WATCH, XsType.UNWATCH):
            self._ask_watch(request)
        elif tx_id and kind != XsType.TRANSACTION_START and tx_id not in self.peer.connection.transactions:
            self.put_error(request, "ENOENT")
        elif kind == XsType.TRANSACTION_END and body not in (b"T\0", b"F\0"):
            self.put_error(request, "EINVAL")
        elif kind == XsType.RESET_WATCHES:
            self.send(request, self._watches_reset)
        else:
            self.send(request)

    def event(self, body: bytes) -> bytes:
        """The store knows our token; the reader gets his own back."""
        path, token = body.split(b"\0", 1)
        return path + b"\0" + token.partition(b":")[2]

    def _ask_watch(self, request: Message) -> None:
        watch = self.watch_of(request)
        if watch is None:
            return
        path, token = watch
        ours = self.watches.get(watch)

        if request.type == XsType.WATCH:
            self._watches_made += 1
            name = b"%x:%s" % (self._watches_made, token)

            def watched(reply: Message) -> None:
                if reply.type == XsType.ERROR:
                    self.refused = _ERRNO.get(reply.body.rstrip(b"\0").decode("latin-1"), errno.EINVAL)
                    self.buffer.clear()
                else:
                    self.watches.setdefault(watch, []).append(name)
                    self.put(_ok(request))

            self.send(Message(XsType.WATCH, request.req_id, 0, join(path, name)), watched)
        elif ours:
            name = ours.pop()
            if not ours:
                del self.watches[watch]
            self.send(Message(XsType.UNWATCH, request.req_id, 0, join(path, name)), lambda _: self.put(_ok(request)))
        else:
            self.put(_ok(request))

    def _watches_reset(self, reply: Message) -> None:
        if reply.type != XsType.ERROR:
            self.watches.clear()
        self.put(reply)


def _ok(request: Message) -> Message:
    return request._replace(body=join("OK"))


class XsDevice(Node):
    """What is in dev/xen: each open() makes a `file` with a peer of its own."""

    mode = stat.S_IFREG | 0o600

    def __init__(self, make_peer: MakePeer, file: Callable[[XsDevice], XsFile] = XenbusFile) -> None:
        self.make_peer = make_peer
        self.file = file
        self.files: set[XsFile] = set()

    @property
    def size(self) -> int:
        """As of a file in sysfs. FUSE has writes past the end wait for one another, and one may wait for the store."""
        return BUFFER_BYTES

    def open(self, flags: int) -> Opened:
        return Opened(self.file(self), _FOPEN)

    def setattr(self, change: Change) -> None:
        """Programs open devices with O_TRUNC, and nothing comes of it."""
        if not change.valid & k.FATTR_SIZE or change.valid & (k.FATTR_MODE | k.FATTR_UID | k.FATTR_GID) or change.size:
            raise refuse(errno.EPERM)

    def stop(self) -> None:
        """The domain is gone: its connections are closed, and who waits has to learn of it."""
        for file in list(self.files):
            file.pump()
