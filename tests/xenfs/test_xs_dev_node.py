"""Goal: dev/xen/xenstore behaves to a program as FreeBSD's does, where that differs from Linux's dev/xen/xenbus.
Method: FUSE requests into a Session over the node; behind it peers of a real store, or one that answers when told to."""

from __future__ import annotations

import errno
import os
import select

import pytest

from tests.xenfs.machine import Reply
from tests.xenfs.xsfile import NONBLOCK, READ, REPLIES, REQUEST, Desk, File, written
from xenfs.fuse import kernel as k
from xenfs.nodes.xenbus import BUFFER_BYTES, READABLE
from xenfs.nodes.xs_dev import SERVED, XsDevFile
from xenmodel.public.io.xs_wire import SOCKMSG, XsType
from xenmodel.xenstore.wire import Message, join, pack

WAIT = os.O_RDWR
WATCHES = frozenset({XsType.WATCH, XsType.UNWATCH})


@pytest.fixture
def desk() -> Desk:
    return Desk(XsDevFile)


@pytest.fixture
def file(desk: Desk) -> File:
    return desk.open()


# --- the stream ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(1, len(REQUEST + READ), 5))
def test_requests_in_two_writes(file, at):
    """Goal: a request may come in pieces, and with others in one write.  Method: two requests cut at many places."""
    both = REQUEST + READ
    assert file.write(both[:at]) == written(at)
    assert file.write(both[at:]) == written(len(both) - at)
    assert file.messages() == REPLIES


@pytest.mark.parametrize("before", [0, 1, 20, len(REQUEST) - 1])
def test_more_than_the_buffer(file, before):
    """Goal: a write beyond the buffer is EINVAL and changes nothing: the request goes on where it was.
    Method: part of a request, a write that is one byte too long, the rest."""
    if before:
        assert file.write(REQUEST[:before]) == written(before)
    for size in (BUFFER_BYTES - before + 1, 100_000):
        assert file.write(bytes(size)) == Reply(errno.EINVAL, b"")
    assert file.write(REQUEST[before:] + READ) == written(len(REQUEST + READ) - before)
    assert file.messages() == REPLIES


@pytest.mark.parametrize("length", [BUFFER_BYTES - SOCKMSG.size + 1, 2**32 - 1])
def test_header_that_promises_too_much(file, length):
    """Goal: EINVAL at once, and the open is not lost for ever as it would be there.  Method: such a header, a request."""
    assert file.write(SOCKMSG.pack(XsType.WRITE, 1, 0, length)) == Reply(errno.EINVAL, b"")
    file.write(REQUEST + READ)
    assert file.messages() == REPLIES


def test_the_largest_request(file):
    """Goal: a request may fill the buffer to the last byte.  Method: a SET_PERMS of 4096 bytes, and its answer."""
    body = b"data\0".ljust(BUFFER_BYTES - SOCKMSG.size, b"n")
    assert file.ask(XsType.SET_PERMS, body=body).startswith(b"error E")


# --- requests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*XsType, 20, 99, 2**32 - 1])
def test_what_passes(kind):
    """Goal: requests outside FreeBSD's list are EINVAL and never reach the store; the others do.
    Method: every type of the protocol and some that are none, to a peer that answers all alike."""
    scripted = Desk(XsDevFile, scripted=True).open()
    scripted.peer.answers = True
    reply = scripted.ask(kind, "data", "t")
    if kind in SERVED or kind == XsType.WATCH:
        assert reply == b"OK\0" and scripted.peer.received == [Message(kind, 5, 0, b"data\0t\0")]
    else:
        assert reply == b"error EINVAL" and not scripted.peer.received


def test_unknown_transaction(desk, file):
    """Goal: a transaction that is not this open's is EINVAL, also to START; watches take no notice of it.
    Method: one of another open, and one that is over."""
    others, over = desk.open(), file.start()
    file.ask(XsType.TRANSACTION_END, "F", tx=over)
    theirs = [others.start() for _ in range(3)][-1]
    for tx in (over, theirs, 2**32 - 1):
        for kind in (XsType.READ, XsType.WRITE, XsType.TRANSACTION_START, XsType.TRANSACTION_END):
            assert file.ask(kind, "T", tx=tx) == b"error EINVAL"
    file.write(pack(XsType.WATCH, 3, 99, b"data\0t\0") + pack(XsType.WATCH, 4, 99, b"data\0t\0"))
    file.write(pack(XsType.UNWATCH, 5, 99, b"data\0t\0"))
    numbers = [message[:3] for message in file.messages() if message.type != XsType.WATCH_EVENT]
    assert numbers == [(XsType.WATCH, 3, 0), (XsType.ERROR, 4, 0), (XsType.UNWATCH, 5, 0)], "no transaction"


def test_transaction(file):
    """Goal: a transaction works as anywhere; what END's body is, is the store's to judge.
    Method: write and commit; a nonsense end."""
    tx = file.start()
    assert file.ask(XsType.WRITE, body=b"data\0new", tx=tx) == b"OK\0"
    assert file.ask(XsType.READ, "data") == b"error ENOENT"
    assert file.ask(XsType.TRANSACTION_END, "X", tx=tx) == b"error EINVAL"
    assert tx in file.peer.connection.transactions
    assert file.ask(XsType.TRANSACTION_END, "T", tx=tx) == b"OK\0"
    assert file.ask(XsType.READ, "data") == b"new"


def test_one_at_a_time():
    """Goal: a write is answered when the store has answered its requests, one after the other.
    Method: three requests in one write to a peer that answers when told to; a signal does not end it."""
    file = Desk(XsDevFile, scripted=True).open()
    waits = file.send_write(READ + REQUEST + READ, WAIT)
    for count in range(1, 4):
        assert len(file.peer.received) == count and waits not in file.kernel.replies
        file.interrupt(waits)
        file.peer.answer(file.peer.received[-1])
    assert file.kernel.replies.pop(waits) == written(len(READ + REQUEST + READ))
    assert [message.type for message in file.messages()] == [XsType.READ, XsType.WRITE, XsType.READ]


# --- watches -------------------------------------------------------------------------------------------------------------


def test_watch(desk, file):
    """Goal: the reply OK, then events with the path as it was asked for, and none after UNWATCH; a depth is ignored.
    Method: two watches, one with depth 0; changes; UNWATCH with any path."""
    assert file.ask(XsType.WATCH, "data", "t", "0") == b"OK\0"
    assert [File.event(event) for event in file.events] == [(b"data", b"t")]
    assert file.ask(XsType.WATCH, f"{desk.home}/data", "u") == b"OK\0"
    desk.write("data/below", b"")
    assert file.seen() == [(b"data/below", b"t"), (b"/local/domain/7/data/below", b"u")]
    assert file.ask(XsType.UNWATCH, "any other path", "t") == b"OK\0"
    desk.write("data", b"")
    assert file.seen() == [(b"/local/domain/7/data", b"u")]
    assert file.ask(XsType.UNWATCH, "", "u") == b"OK\0"
    assert not file.peer.connection.watches and not file.node.watches


def test_token_in_use(desk, file):
    """Goal: a token names one watch of this open: again, whatever the path, it is EINVAL; others may have the same.
    Method: the same token twice here, once in another open; UNWATCH twice."""
    other = desk.open()
    for one in (file, other):
        assert one.ask(XsType.WATCH, "data", "t") == b"OK\0"
    assert file.ask(XsType.WATCH, "data", "t") == file.ask(XsType.WATCH, "else", "t") == b"error EINVAL"
    assert file.ask(XsType.UNWATCH, "data", "t") == b"OK\0"
    assert file.ask(XsType.UNWATCH, "data", "t") == b"error EINVAL"
    desk.write("data", b"")
    assert file.seen() == [] and other.seen() == [(b"data", b"t")]
    assert file.ask(XsType.WATCH, "data", "t") == b"OK\0"


@pytest.mark.parametrize("kind", sorted(WATCHES))
@pytest.mark.parametrize("body", [b"", b"data", b"data\0", b"data\0t"])
def test_watch_without_its_strings(file, kind, body):
    """Goal: path and token have to be there with their NULs.  Method: bodies that lack something; nothing is watched."""
    assert file.ask(kind, body=body) == b"error EINVAL"
    assert not file.peer.connection.watches


def test_watch_that_is_refused(file):
    """Goal: the store's error is the reply, the write is taken, and the token is free.
    Method: a bad path, then a good one; 128 watches and one more."""
    assert file.ask(XsType.WATCH, "da ta", "t") == b"error EINVAL"
    assert file.ask(XsType.WATCH, "data", "t") == b"OK\0"
    for i in range(127):
        assert file.ask(XsType.WATCH, "data", str(i)) == b"OK\0"
    assert file.ask(XsType.WATCH, "data", "one more") == b"error ENOSPC"


# --- waiting -------------------------------------------------------------------------------------------------------------


def test_poll(desk, file):
    """Goal: always writable; readable when there is something; who waits for that is woken.
    Method: POLL before and after an event that somebody else causes."""
    always = select.POLLOUT | select.POLLWRNORM
    file.ask(XsType.WATCH, "data", "t")
    assert file.poll(schedule=True) == always
    desk.write("data", b"")
    assert file.kernel.notices == [(k.FUSE_NOTIFY_POLL, k.NOTIFY_POLL_WAKEUP_OUT.pack(file.fh + 1000))]
    assert file.poll() == always | READABLE


def test_reads(desk, file):
    """Goal: a read waits, O_NONBLOCK is EAGAIN (where FreeBSD would wait all the same), a signal ends it.
    Method: all three around an event."""
    assert file.read(flags=NONBLOCK) == Reply(errno.EAGAIN, b"")
    given_up, waits = file.send_read(flags=WAIT), file.send_read(flags=WAIT)
    file.interrupt(given_up)
    assert file.kernel.replies.pop(given_up) == Reply(errno.EINTR, b"")
    file.write(pack(XsType.WATCH, 1, 0, join("data", "t")))
    assert file.kernel.replies.pop(waits).data.startswith(pack(XsType.WATCH, 1, 0, b"OK\0"))
    file.messages()
    waits = file.send_read(flags=WAIT)
    desk.write("data", b"")
    assert file.kernel.replies[waits].data == pack(XsType.WATCH_EVENT, 0, 0, join("data", "t"))


def test_write_waits():
    """Goal: a write that the store does not want yet waits, or is EAGAIN.  Method: a peer that wants nothing, then all."""
    file = Desk(XsDevFile, scripted=True).open()
    file.peer.answers, file.peer.wants_input = True, False
    waits = file.send_write(READ, WAIT)
    assert file.write(READ) == Reply(errno.EAGAIN, b"")
    file.peer.want()
    assert file.kernel.replies == {waits: written(len(READ))}
