"""evtchn.py: dev/xen/evtchn, the file of sysdev/evtchn.py, with the ioctls of Linux's xen/evtchn.h and of FreeBSD's.

The tree has one EvtchnNode per domain; each open() is an EvtchnFile. It has two faces: until the first ioctl it reads as
the domain's table of ports, once, and ends, so that `cat` works. From then on it is the device: reads wait for ports (u32),
writes unmask them. The EvtchnUser behind it is made by that ioctl, for only an ioctl has the pid of who it is.

Linux's ioctls return the port; their structure lies in the caller's memory. FreeBSD's have it in theirs, which FUSE brings
along; where a number's direction bits mean the reverse to Linux, it is fetched as well. Both are told apart by number.

Unlike Linux: an unknown ioctl is ENOTTY; a domain that is gone is EIO, also for who waits, and ENODEV for open(2); beyond
OPENS_MOST opens of a domain but 0 it is ENFILE; while READS_MOST reads of an open wait, one more is EAGAIN. For inspection
O_RDONLY is enough.

Invariants: every READ gets one answer; one that waits found nothing to read, so READs are answered in their order. There
is no size: FUSE would have copy_file_range(2) end there. As no write waits, it does not matter that it lets only one in.
"""

from __future__ import annotations

import errno
import os
import select
import stat
from collections.abc import Callable
from struct import Struct
from typing import NamedTuple

from sysdev.evtchn import MOST_BYTES, EvtchnDevice, EvtchnUser
from sysdev.steps import Job, Read
from xenfs.calls import Callers, DomainCalls, Result
from xenfs.fuse import kernel as k
from xenfs.fuse.session import Session
from xenfs.fuse.tree import Change, Ioctl, Node, Opened, refuse
from xenmodel.xenstore.perms import CONTROL_DOMAIN

OPENS_MOST = 256  # of a domain; domain 0 has no such limit
READS_MOST = 64  # of an open, that wait

READABLE = select.POLLIN | select.POLLRDNORM
WRITABLE = select.POLLOUT | select.POLLWRNORM
_FOPEN = k.FOPEN_DIRECT_IO | k.FOPEN_NONSEEKABLE | k.FOPEN_STREAM


class Call(NamedTuple):
    """What an ioctl asks for. `back`: FreeBSD's, the port goes into the structure, behind the arguments."""

    do: Callable[..., int]
    arguments: Struct
    back: bool = False


_NONE, _U16, _U32, _TWO = Struct(""), Struct("<H"), Struct("<I"), Struct("<II")
_BIND_VIRQ, _BIND_INTERDOMAIN = EvtchnUser.bind_virq, EvtchnUser.bind_interdomain
_BIND_UNBOUND, _BIND_STATIC = EvtchnUser.bind_unbound_port, EvtchnUser.bind_static
_UNBIND, _NOTIFY = EvtchnUser.unbind, EvtchnUser.notify
_RESET, _RESTRICT = EvtchnUser.reset, EvtchnUser.restrict

CALLS: dict[int, Call] = {
    # Linux: _IOC(_IOC_NONE, 'E', 0..7, size)
    0x00044500: Call(_BIND_VIRQ, _U32),
    0x00084501: Call(_BIND_INTERDOMAIN, _TWO),
    0x00044502: Call(_BIND_UNBOUND, _U32),
    0x00044503: Call(_UNBIND, _U32),
    0x00044504: Call(_NOTIFY, _U32),
    0x00004505: Call(_RESET, _NONE),
    0x00024506: Call(_RESTRICT, _U16),
    0x00044507: Call(_BIND_STATIC, _U32),
    # FreeBSD: 'E', 4..9
    0xC0084504: Call(_BIND_VIRQ, _U32, True),
    0xC00C4505: Call(_BIND_INTERDOMAIN, _TWO, True),
    0xC0084506: Call(_BIND_UNBOUND, _U32, True),
    0x80044507: Call(_UNBIND, _U32),
    0x80044508: Call(_NOTIFY, _U32),
    0x20004509: Call(_RESET, _NONE),
    # the same header with the macros of Linux, where _IOW and _IO have other bits
    0x40044507: Call(_UNBIND, _U32),
    0x40044508: Call(_NOTIFY, _U32),
    0x00004509: Call(_RESET, _NONE),
}


class Reader(NamedTuple):
    """A READ that waits for something to read."""

    session: Session
    size: int


class EvtchnFile(Node):
    """One open."""

    def __init__(self, node: EvtchnNode) -> None:
        self.node = node
        self.user: EvtchnUser | None = None
        self.callers = Callers(node.calls)
        self.reads: dict[int, Reader] = {}  # by unique, the one that waits longest first
        self.pollers: set[tuple[Session, int]] = set()
        self.table: bytes | None = None  # as it was at the first read
        self.position = 0  # in it; FUSE has none for a stream
        node.files.add(self)

    def read(self, session: Session, unique: int, offset: int, size: int, flags: int) -> None:
        if self.user is None:
            session.send_data(unique, [self._table(size)])
            return
        data = self.user.read(size)
        if isinstance(data, bytes):
            session.send_data(unique, [data])
        elif data == -errno.EAGAIN and not flags & os.O_NONBLOCK and len(self.reads) < READS_MOST:
            self.reads[unique] = Reader(session, size)
        else:
            raise refuse(-data)

    def write(self, session: Session, unique: int, offset: int, size: int, flags: int) -> None:
        data = bytes(session.landing[0][: min(size, MOST_BYTES)])
        count = self.user.write(data) if self.user is not None else len(data) & -_U32.size
        if count < 0:
            raise refuse(-count)
        session.send_written(unique, count)

    def poll(self, session: Session, kh: int, schedule: bool) -> int:
        """A waiter is remembered even if there is something: epoll(7) with EPOLLET asks only when it is told."""
        if schedule:
            self.pollers.add((session, kh))
        user = self.user
        if self.node.device.stopped:
            return READABLE | select.POLLERR
        if user is None:
            return WRITABLE  # nothing is bound: not readable, though a read would not wait
        if user.overflow:
            return select.POLLERR
        return WRITABLE | READABLE if user.readable else WRITABLE

    def ioctl(self, request: Ioctl) -> None:
        """The job's caller may be slow: what the file was before it is looked at again after its structure is there."""
        call = CALLS.get(request.command)
        if call is None:
            raise refuse(errno.ENOTTY)
        self.callers.run(request, self._call(request, call))

    def _call(self, request: Ioctl, call: Call) -> Job[Result]:
        size = call.arguments.size
        data = request.data
        if size and len(data) < size:
            data = yield Read(request.arg, size)
        arguments = call.arguments.unpack_from(data)
        if self.user is None:
            who = yield from self.callers.who(request.pid)
            if self.user is None:  # still
                self.user = self.node.device.open(who.name, self._wake)
                self.table = None
        result = call.do(self.user, *arguments)
        if result < 0:
            raise refuse(-result)
        return (0, call.arguments.pack(*arguments) + _U32.pack(result)) if call.back else result

    def interrupt(self, unique: int) -> bool:
        read = self.reads.pop(unique, None)
        if read is None:
            return self.node.calls.interrupt(unique)
        read.session.send_error(unique, errno.EINTR)
        return True

    def setattr(self, change: Change) -> None:
        self.node.setattr(change)

    def release(self) -> None:
        self.node.files.discard(self)
        self.pollers.clear()
        if self.user is not None:
            self.user.close()
        for unique, read in self.reads.items():
            read.session.send_error(unique, errno.EIO)
        self.reads.clear()

    def _table(self, size: int) -> bytes:
        """The next part of the table; empty at its end, and ever after."""
        if self.table is None:
            if self.node.device.stopped:
                raise refuse(errno.EIO)
            self.table = self.node.describe_table().encode()
        part = self.table[self.position : self.position + size]
        self.position += len(part)
        return part

    def _wake(self) -> None:
        """There is something that was not there. Called from a handler."""
        assert self.user is not None, "woken before there was an open of the device"
        while self.user.readable and self.reads:  # in this order: to look may find an event, and call us for it
            unique = next(iter(self.reads))
            session, size = self.reads.pop(unique)
            data = self.user.read(size)
            if isinstance(data, bytes):
                session.send_data(unique, [data])
            else:
                session.send_error(unique, -data)
        if self.user.readable:
            pollers, self.pollers = self.pollers, set()
            for session, kh in pollers:
                session.notify_poll(kh)


class EvtchnNode(Node):
    """What is in dev/xen. `describe_table` says what is bound in the domain, for who only reads."""

    def __init__(self, device: EvtchnDevice, calls: DomainCalls, mode: int, describe_table: Callable[[], str]) -> None:
        self.device = device
        self.calls = calls
        self.mode = stat.S_IFREG | stat.S_IMODE(mode)
        self.describe_table = describe_table
        self.files: set[EvtchnFile] = set()

    def open(self, flags: int) -> Opened:
        if self.device.stopped:
            raise refuse(errno.ENODEV)
        if self.device.events.domid != CONTROL_DOMAIN and len(self.files) >= OPENS_MOST:
            raise refuse(errno.ENFILE)
        return Opened(EvtchnFile(self), _FOPEN)

    def setattr(self, change: Change) -> None:
        """Programs open devices with O_TRUNC, and nothing comes of it."""
        if not change.valid & k.FATTR_SIZE or change.valid & (k.FATTR_MODE | k.FATTR_UID | k.FATTR_GID) or change.size:
            raise refuse(errno.EPERM)
