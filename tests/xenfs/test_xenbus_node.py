"""Goal: dev/xen/xenbus behaves to a program as Linux's does, whatever the program writes and whenever it reads.
Method: FUSE requests into a Session over the node; behind it peers of a real store, or one that answers when told to."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from tests.xenfs.machine import KIB, Kernel, Reply
from tests.xenfs.xsfile import DOMID, READ, REPLIES, REQUEST, Desk, File, written
from xenfs.fuse import kernel as k
from xenfs.fuse.tree import Directory
from xenfs.nodes.xenbus import BUFFER_BYTES
from xenfs.nodes.xsd import XenbusBackend, XsdPort
from xenmodel.public.io.xs_wire import SOCKMSG, XsType
from xenmodel.types import Domid
from xenmodel.xenstore.perms import Access, Perm
from xenmodel.xenstore.wire import join, pack


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
def file(desk: Desk) -> File:
    return desk.open()


# --- the stream ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(1, len(REQUEST + READ)))
def test_requests_in_two_writes(file, at):
    """Goal: a request may come in pieces, and with others in one write.  Method: two requests cut at every place."""
    both = REQUEST + READ
    assert file.write(both[:at]) == written(at)
    assert file.write(both[at:]) == written(len(both) - at)
    assert file.messages() == REPLIES


def test_as_libxenstore_writes(file):
    """Goal: header, path and value of a request are separate writes; the reply is read as 16 bytes, then the body.
    Method: exactly that."""
    for part in (REQUEST[:16], b"data\0", b"some value", READ[:16], b"data\0"):
        assert file.write(part) == written(len(part))
    assert file.read(16).data == SOCKMSG.pack(XsType.WRITE, 1, 0, 3)
    assert file.read(3).data == b"OK\0"
    assert file.read(16).data == SOCKMSG.pack(XsType.READ, 2, 0, 10)
    assert file.read(10).data == b"some value"


@pytest.mark.parametrize("size", [1, 7, 16, 1000])
def test_reads_of_any_size(file, size):
    """Goal: a read returns what fits: part of a message, or several.  Method: three replies in pieces of one size."""
    file.write(REQUEST + READ + READ)
    whole = b"".join(pack(*reply) for reply in (*REPLIES, REPLIES[1]))
    pieces = []
    while not (reply := file.read(size)).error:
        pieces.append(reply.data)
    assert [len(piece) for piece in pieces[:-1]] == [size] * (len(pieces) - 1)
    assert b"".join(pieces) == whole and reply.error == errno.EAGAIN


def test_the_largest_request(file):
    """Goal: a request fills the buffer to the last byte; one more is E2BIG and the buffer is empty again.
    Method: values that make 4096 and 4097 bytes, the latter in two writes; then a small one."""
    most = BUFFER_BYTES - SOCKMSG.size
    assert file.ask(XsType.WRITE, body=b"data\0".ljust(most, b"v"))[:5] != b"OK\0", "larger than a node may be"
    assert file.write(SOCKMSG.pack(XsType.WRITE, 1, 0, most + 1)) == Reply(errno.E2BIG, b"")
    assert file.write(SOCKMSG.pack(XsType.WRITE, 1, 0, 2**32 - 1)) == Reply(errno.E2BIG, b"")
    assert file.write(REQUEST[:9]) == written(9)
    assert file.write(REQUEST[9:12] + b"\xff\xff\0\0") == Reply(errno.E2BIG, b"")
    file.write(REQUEST + READ)
    assert file.messages() == REPLIES


@pytest.mark.parametrize("before", [0, 1, 20])
def test_more_than_the_buffer(file, before):
    """Goal: a write beyond the buffer is EINVAL, whatever is in it, and what was there before is gone.
    Method: part of a request, then what fills the buffer and one byte more; then a whole request."""
    if before:
        assert not file.write(REQUEST[:before]).error
    assert file.write(bytes(BUFFER_BYTES - before + 1)) == Reply(errno.EINVAL, b"")
    assert file.write(bytes(100 * KIB)) == Reply(errno.EINVAL, b"")
    assert file.messages() == []
    file.write(REQUEST + READ)
    assert file.messages() == REPLIES


def test_an_empty_write(file):
    """Goal: an empty write is nothing.  Method: between the pieces of a request."""
    file.write(REQUEST[:20])
    assert file.write(b"", os.O_RDWR) == written(0)
    file.write(REQUEST[20:] + READ)
    assert file.messages() == REPLIES


def test_a_bad_request_after_a_good_one(file):
    """Goal: of several requests in one write those before a bad one are done.  Method: a header too long behind one."""
    assert file.write(REQUEST + SOCKMSG.pack(0, 0, 0, 5000)).error == errno.E2BIG
    file.write(READ)
    assert file.messages() == REPLIES


# --- transactions ----------------------------------------------------------------------------------------------------------


def test_unknown_transaction(desk, file):
    """Goal: a transaction that is not this open's is ENOENT whatever the request, but for START and the watches.
    Method: requests with a number that nobody has, one of another open, and one that is over."""
    over = file.start()
    assert file.ask(XsType.TRANSACTION_END, "F", tx=over) == b"OK\0"
    others = desk.open()
    for _ in range(3):
        theirs = others.start()
    for tx in (over, theirs, 2**32 - 1):
        for kind in (XsType.READ, XsType.WRITE, XsType.GET_DOMAIN_PATH, XsType.RESET_WATCHES, XsType.TRANSACTION_END):
            assert file.ask(kind, "T", tx=tx) == b"error ENOENT"
        assert file.ask(XsType.WATCH, "data", str(tx), tx=tx) == b"OK\0"
        assert file.ask(XsType.UNWATCH, "data", str(tx), tx=tx) == b"OK\0"
    assert others.ask(XsType.TRANSACTION_END, "T", tx=theirs) == b"OK\0"


def test_start_within_a_transaction():
    """Goal: what START's own transaction number means is the store's to say.  Method: a number that nobody has."""
    file = Desk(scripted=True).open()
    file.put(XsType.TRANSACTION_START, "", tx=99)
    assert file.peer.received == [(XsType.TRANSACTION_START, 5, 99, b"\0")]


ENDS = [(b"T\0", b"OK\0"), (b"F\0", b"OK\0")] + [
    (body, b"error EINVAL") for body in (b"", b"T", b"F", b"t\0", b"T\0\0", b"TF\0", b"\0", b"\0T", b"T\0" + bytes(1000))
]


@pytest.mark.parametrize(("body", "reply"), ENDS, ids=lambda value: repr(value)[:12])
def test_end_of_a_transaction(file, body, reply):
    """Goal: TRANSACTION_END is T or F with its NUL, exactly; anything else is EINVAL and the transaction goes on.
    Method: a write in a transaction, one of the ends; what the node has then, and whether the transaction is there."""
    tx = file.start()
    assert file.ask(XsType.WRITE, body=b"data\0new", tx=tx) == b"OK\0"
    assert file.ask(XsType.TRANSACTION_END, body=body, tx=tx) == reply
    assert file.ask(XsType.READ, "data") == (b"new" if body == b"T\0" else b"error ENOENT")
    assert (tx in file.peer.connection.transactions) is (reply != b"OK\0")


def test_reply_has_the_caller_s_numbers(file):
    """Goal: request and transaction numbers come back as they were sent, also in replies that the node makes itself.
    Method: any numbers in requests of each kind."""
    file.write(pack(XsType.READ, 77, 99, b"data\0") + pack(XsType.UNWATCH, 78, 98, b"data\0t\0"))
    file.write(pack(XsType.WATCH, 79, 97, b"data\0t\0") + pack(XsType.WATCH, 80, 96, b"data"))
    numbers = [message[:3] for message in file.messages() if message.type != XsType.WATCH_EVENT]
    assert numbers == [(XsType.ERROR, 77, 99), (XsType.UNWATCH, 78, 98), (XsType.WATCH, 79, 97), (XsType.ERROR, 80, 96)]


# --- watches -----------------------------------------------------------------------------------------------------------


TOKENS = [b"t", b"", b":", b"1:1", b"a b", b"\xff\xfe", "\u00e9".encode(), b"x" * 1000]


@pytest.mark.parametrize("token", TOKENS, ids=lambda token: repr(token)[:10])
@pytest.mark.parametrize("path", [b"data", b"/local/domain/7/data", b"@releaseDomain"])
def test_token_comes_back(desk, file, path, token):
    """Goal: an event has the path as it was asked for and the token byte by byte.  Method: tokens of all kinds."""
    desk.toolstack.set_perms("@releaseDomain", [Perm(Domid(0), Access.NONE), Perm(Domid(DOMID), Access.READ)])
    assert file.ask(XsType.WATCH, path, token) == b"OK\0"
    assert [File.event(event) for event in file.events] == [(path, token)]
    desk.write("data/below", b"")
    assert file.seen() == ([] if path.startswith(b"@") else [(path + b"/below", token)])


def test_same_watch_twice(desk, file):
    """Goal: the kernel's watches may be the same: each has its events, each UNWATCH ends one, one more is OK too.
    Method: two alike and one with another token; a change after each step."""
    for token in (b"t", b"t", b"u"):
        assert file.ask(XsType.WATCH, b"data", token) == b"OK\0" and len(file.events) == 1
    for left in ([b"t", b"t", b"u"], [b"t", b"u"], [b"u"], [b"u"]):
        desk.write("data", b"")
        assert sorted(file.seen()) == [(b"data", token) for token in left]
        assert file.ask(XsType.UNWATCH, b"data", b"t") == b"OK\0"
    assert len(file.peer.connection.watches) == 1 and len(file.node.watches) == 1


def test_unwatch_of_what_is_not_watched(desk, file):
    """Goal: it answers OK and ends nothing; a watch is found by path and token as they were given.
    Method: other tokens, other and other forms of the path, another open's watch."""
    other = desk.open()
    for one in (file, other):
        one.ask(XsType.WATCH, b"data", b"t")
    for path, token in ((b"data", b"u"), (b"date", b"t"), (b"/local/domain/7/data", b"t"), (b"", b""), (b"//", b"t")):
        assert file.ask(XsType.UNWATCH, path, token) == b"OK\0"
    assert desk.open().ask(XsType.UNWATCH, b"data", b"t") == b"OK\0"
    desk.write("data", b"")
    assert file.seen() == other.seen() == [(b"data", b"t")]


@pytest.mark.parametrize("kind", [XsType.WATCH, XsType.UNWATCH])
@pytest.mark.parametrize("body", [b"", b"data", b"data\0", b"data\0t", b"\0"])
def test_watch_without_its_strings(file, kind, body):
    """Goal: path and token have to be there with their NULs.  Method: bodies that lack something; nothing is watched."""
    assert file.ask(kind, body=body) == b"error EINVAL"
    assert not file.peer.connection.watches


def test_depth_is_ignored(desk, file):
    """Goal: the depth of newer clients does not reach the store, as through Linux.  Method: depth 0; a node below."""
    assert file.ask(XsType.WATCH, "data", "t", "0") == b"OK\0"
    desk.write("data/below", b"")
    assert file.seen() == [(b"data/below", b"t")]


REFUSED = [(b"da ta", errno.EINVAL), (b"", errno.EINVAL), (b"data/", errno.EINVAL), (b"x" * 2049, errno.EINVAL)]


@pytest.mark.parametrize(("path", "error"), REFUSED, ids=lambda value: repr(value)[:12])
def test_watch_that_is_refused(file, path, error):
    """Goal: the errno of the write, no reply, the rest of the write is dropped, the next request is served.
    Method: paths that the store refuses, with part of another request behind them."""
    assert file.write(pack(XsType.WATCH, 1, 0, join(path, "t")) + READ[:20]) == Reply(error, b"")
    assert file.messages() == [] and not file.peer.connection.watches and not file.node.watches
    file.write(REQUEST + READ)
    assert file.messages() == REPLIES


def test_too_many_watches(desk, file):
    """Goal: the domain's quota holds for all opens together: ENOSPC from write, until one closes.
    Method: watches in two opens up to 128; one more; the first is released."""
    other = desk.open()
    for i in range(128):
        assert (file, other)[i % 2].ask(XsType.WATCH, "data", str(i)) == b"OK\0"
    assert file.put(XsType.WATCH, "data", "one more") == Reply(errno.ENOSPC, b"")
    assert other.release() == Reply(0, b"")
    assert file.ask(XsType.WATCH, "data", "one more") == b"OK\0"
    assert len(file.peer.connection.watches) == 65


def test_reset_watches(desk, file):
    """Goal: RESET_WATCHES ends this open's watches and transactions and no other's; all goes on afterwards.
    Method: two opens; reset one; changes, UNWATCH, the same watch again."""
    other, tx = desk.open(), file.start()
    for one in (file, other):
        one.ask(XsType.WATCH, "data", "t")
    assert file.ask(XsType.RESET_WATCHES, "") == b"OK\0" and not file.node.watches
    desk.write("data", b"")
    assert file.seen() == [] and other.seen() == [(b"data", b"t")]
    assert file.ask(XsType.READ, "data", tx=tx) == b"error ENOENT"
    assert file.ask(XsType.UNWATCH, "data", "t") == b"OK\0"
    assert file.ask(XsType.WATCH, "data", "t") == b"OK\0"
    desk.write("data", b"")
    assert file.seen() == [(b"data", b"t")]


def test_release(desk, file):
    """Goal: transactions and watches go with the last close, and with them what they cost.
    Method: some of both; RELEASE; what the store counts for the domain; a change."""
    file.start()
    file.ask(XsType.WATCH, "data", "t")
    before = desk.store.usage(Domid(DOMID))
    assert (before.watches, before.transactions, before.connections) == (1, 1, 1)
    assert file.release() == Reply(0, b"")
    after = desk.store.usage(Domid(DOMID))
    assert (after.watches, after.transactions, after.connections, after.outstanding) == (0, 0, 0, 0)
    assert not desk.device.files
    desk.write("data", b"")


# --- the nodes -----------------------------------------------------------------------------------------------------------


def test_what_it_looks_like(desk):
    """Goal: a file for its owner that is no place to seek in, and lets several write at a time (which FUSE allows only
    within the size); each open is another.  Method: attributes, FOPEN flags, two opens."""
    attributes = k.ENTRY_OUT.unpack(desk.kernel.lookup(k.FUSE_ROOT_ID, "xenbus").data)[6:]
    assert attributes[1] >= BUFFER_BYTES and attributes[9] == stat.S_IFREG | 0o600
    flags = k.OPEN_OUT.unpack(desk.kernel.open(desk.kernel.walk("xenbus"), os.O_RDWR).data)[1]
    assert flags == k.FOPEN_DIRECT_IO | k.FOPEN_NONSEEKABLE | k.FOPEN_STREAM | k.FOPEN_PARALLEL_DIRECT_WRITES
    one, other = desk.open(), desk.open()
    one.write(READ)
    assert other.messages() == [] and len(one.messages()) == 1


def test_port_of_the_store():
    """Goal: xsd_port is the number and nothing else, xenbus_backend a line that says it; without a store there is none.
    Method: ports as they change."""
    port = 3
    kernel = Kernel(Directory({"xsd_port": XsdPort(lambda: port), "xenbus_backend": XenbusBackend(lambda: port)}))
    assert (kernel.text("xsd_port"), kernel.text("xenbus_backend")) == ("3", "port 3: the store runs in this domain\n")
    assert not kernel.open(kernel.walk("xenbus_backend"), os.O_RDWR).error
    assert kernel.open(kernel.walk("xsd_port"), os.O_RDWR).error == errno.EACCES
    port = 0
    assert kernel.open(kernel.walk("xenbus_backend"), os.O_RDWR).error == errno.ENODEV
