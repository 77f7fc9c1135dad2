"""Goal: who waits for xenstore through dev/xen/xenbus waits for what he should, and no longer; nothing grows without bound.
Method: readers, writers, pollers and signals around a store that works, and a scripted peer that holds answers back."""

from __future__ import annotations

import errno
import os
import random
import select

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.xenfs.machine import KIB, Reply
from tests.xenfs.xsfile import DOMID, NONBLOCK, READ, REPLIES, REQUEST, Desk, File, written
from xenfs.fuse import kernel as k
from xenfs.nodes.xenbus import BUFFER_BYTES, QUEUE_MOST, READABLE, XenbusFile
from xenfs.nodes.xs_dev import XsDevFile
from xenmodel.public.io.xs_wire import SOCKMSG, XsType
from xenmodel.types import Domid
from xenmodel.xenstore.wire import Message, join, pack


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
def file(desk: Desk) -> File:
    return desk.open()


@pytest.fixture
def scripted() -> File:
    return Desk(scripted=True).open()


WAIT = os.O_RDWR
OK = b"OK\0"


# --- readers and pollers ---------------------------------------------------------------------------------------------------


def test_read_waits(desk, file):
    """Goal: a read without O_NONBLOCK waits for a reply or an event, and readers are served in turn.
    Method: two reads, then requests one by one; a third, then a change by somebody else."""
    first, second = file.send_read(), file.send_read()
    file.write(REQUEST)
    assert file.kernel.replies == {first: Reply(0, pack(*REPLIES[0]))}
    file.write(READ)
    assert file.kernel.replies.pop(second) == Reply(0, pack(*REPLIES[1]))
    assert file.ask(XsType.WATCH, "data", "t") == b"OK\0"
    third = file.send_read()
    desk.write("other", b"")
    assert third not in file.kernel.replies
    desk.write("data", b"")
    assert file.kernel.replies[third].data == pack(XsType.WATCH_EVENT, 0, 0, b"data\0t\0")


def test_nonblocking_read(file):
    """Goal: O_NONBLOCK is what the file has at this read, as fcntl(2) sets it.  Method: the same file, both ways."""
    assert file.read(flags=NONBLOCK) == Reply(errno.EAGAIN, b"")
    waits = file.send_read(flags=os.O_RDWR)
    assert file.read(flags=NONBLOCK) == Reply(errno.EAGAIN, b"")
    file.write(REQUEST)
    assert file.kernel.replies[waits].data == pack(*REPLIES[0])


def test_interrupted_read(file):
    """Goal: a signal ends a read that waits, and takes nothing with it.  Method: INTERRUPT one of two, twice; a reply."""
    first, second = file.send_read(), file.send_read()
    file.interrupt(first)
    file.interrupt(first)
    assert file.kernel.replies.pop(first) == Reply(errno.EINTR, b"")
    file.write(REQUEST)
    assert file.kernel.replies[second].data == pack(*REPLIES[0])
    file.interrupt(second)


def test_poll(desk, file):
    """Goal: poll says readable when there is something to read and never anything else; who waits is woken, once.
    Method: POLL without and with a waiter around events that somebody else causes."""
    assert file.poll(schedule=True) == 0
    file.put(XsType.WATCH, "data", "t")
    assert file.kernel.notices == [(k.FUSE_NOTIFY_POLL, k.NOTIFY_POLL_WAKEUP_OUT.pack(file.fh + 1000))]
    assert file.poll(schedule=True) == READABLE == select.POLLIN | select.POLLRDNORM
    file.messages()
    file.kernel.notices.clear()
    assert file.poll() == 0
    desk.write("data", b"1")
    assert file.kernel.notices == [], "nobody waits"
    assert file.poll() == READABLE
    file.messages()
    assert file.poll(schedule=True) == 0
    desk.write("data", b"2")
    desk.write("data", b"3")
    assert len(file.kernel.notices) == 1
    assert file.seen() == [(b"data", b"t")] * 2


# --- writers that the store keeps waiting -------------------------------------------------------------------------------


def test_write_waits(scripted):
    """Goal: while the store takes nothing a write waits, in its turn; parts of a request are taken all the same.
    Method: a peer that wants no input; writers with pieces; then it wants one request, then all."""
    peer = scripted.peer
    peer.wants_input = False
    assert scripted.write(REQUEST[:20]) == written(20)
    first, second = scripted.send_write(REQUEST[20:], WAIT), scripted.send_write(READ, WAIT)
    third = scripted.send_write(REQUEST + READ[:5], WAIT)
    assert not scripted.kernel.replies and not peer.received
    peer.want(1)
    assert scripted.kernel.replies == {first: written(len(REQUEST) - 20)}
    peer.want()
    assert scripted.kernel.order[-3:] == [first, second, third]
    assert [message.type for message in peer.received] == [XsType.WRITE, XsType.READ, XsType.WRITE]
    assert scripted.write(READ[5:]) == written(len(READ) - 5)
    assert peer.received[-1] == Message(XsType.READ, 2, 0, b"data\0")


def test_nonblocking_write(scripted):
    """Goal: with O_NONBLOCK it is EAGAIN, nothing of it was taken, and it can be written again; short by whole requests
    if some were.  Method: a peer that wants nothing, then one request; a request begun before."""
    scripted.peer.wants_input = False
    assert scripted.write(REQUEST[:30]) == written(30)
    for _ in range(3):
        assert scripted.write(REQUEST[30:]) == Reply(errno.EAGAIN, b"")
    scripted.peer.want(1)
    assert scripted.write(REQUEST[30:] + READ + READ) == written(len(REQUEST) - 30)
    assert scripted.write(READ) == Reply(errno.EAGAIN, b"")
    scripted.peer.want(2)
    assert scripted.write(READ + READ + READ[:7]) == written(2 * len(READ) + 7)
    assert scripted.write(READ[7:]) == Reply(errno.EAGAIN, b"")
    scripted.peer.want()
    assert scripted.write(READ[7:]) == written(len(READ) - 7)
    assert [message.body for message in scripted.peer.received] == [REQUEST[16:], *[READ[16:]] * 3]


def test_nonblocking_write_behind_one_that_waits(scripted):
    """Goal: it does not overtake and does not wait.  Method: EAGAIN; then what waited goes alone."""
    scripted.peer.wants_input = False
    waits = scripted.send_write(REQUEST, WAIT)
    assert scripted.write(READ, NONBLOCK) == Reply(errno.EAGAIN, b"")
    scripted.peer.want()
    assert scripted.kernel.replies == {waits: written(len(REQUEST))}
    assert [message.type for message in scripted.peer.received] == [XsType.WRITE]


def test_interrupted_write(scripted):
    """Goal: a signal ends a write that waits: EINTR and nothing of it was taken, or short if some requests were. Those
    behind it go on.  Method: INTERRUPT the second, then the first of three; then one half way through."""
    peer, kernel = scripted.peer, scripted.kernel
    peer.wants_input = False
    scripted.write(REQUEST[:20])
    first, second, third = (scripted.send_write(data, WAIT) for data in (REQUEST[20:], READ, REQUEST[20:]))
    for unique in (second, first):
        scripted.interrupt(unique)
        scripted.interrupt(unique)
        assert kernel.replies.pop(unique) == Reply(errno.EINTR, b"")
    peer.want(1)
    assert kernel.replies.pop(third) == written(len(REQUEST) - 20)
    peer.want(2)
    half = scripted.send_write(READ * 3, WAIT)
    scripted.interrupt(half)
    assert kernel.replies.pop(half) == written(2 * len(READ))
    peer.want()
    assert scripted.write(READ) == written(len(READ))
    assert [message.type for message in peer.received] == [XsType.WRITE] + [XsType.READ] * 3


def test_writer_behind_one_that_gave_up(scripted):
    """Goal: who waited only for his turn goes on at once.  Method: part of a request behind one that is interrupted."""
    scripted.peer.wants_input = False
    first, second = scripted.send_write(REQUEST, WAIT), scripted.send_write(READ[:9], WAIT)
    scripted.interrupt(first)
    assert scripted.kernel.replies == {first: Reply(errno.EINTR, b""), second: written(9)}


def test_watch_waits_for_its_answer(scripted):
    """Goal: WATCH is answered to the writer when the store has answered it, after the replies before; a signal does not
    end it, and no other request goes to the store meanwhile.  Method: a peer that answers late, OK, then an error."""
    peer, kernel = scripted.peer, scripted.kernel
    assert scripted.write(READ) == written(len(READ))
    watch = pack(XsType.WATCH, 3, 9, b"data\0t\0")
    waits, behind = scripted.send_write(watch, WAIT), scripted.send_write(REQUEST, WAIT)
    scripted.interrupt(waits)
    peer.answer(peer.received[0], b"value")
    peer.out += pack(XsType.WATCH_EVENT, 0, 0, b"data\0" + b"1:t\0")
    assert not kernel.replies and len(peer.received) == 2
    peer.answer(peer.received[1])
    assert kernel.replies == {waits: written(len(watch)), behind: written(len(REQUEST))}
    peer.answer(peer.received[2])
    assert [message[:3] for message in scripted.messages()] == [
        (XsType.READ, 2, 0), (XsType.WATCH_EVENT, 0, 0), (XsType.WATCH, 3, 9), (XsType.WRITE, 1, 0),
    ]  # fmt: skip
    refused = scripted.send_write(watch, NONBLOCK)
    peer.answer(peer.received[3], b"ENOMEM\0", error=True)
    assert kernel.replies[refused] == Reply(errno.ENOMEM, b"")


def test_unread_replies_are_bounded(scripted):
    """Goal: who reads nothing is not served without end, and is as soon as he reads; no reply is lost.
    Method: READs of 4 KiB values, ten times as many as the queue has room for, written while it is possible."""
    scripted.peer.answers = True
    scripted.peer.body = bytes(4096)
    asked = 0
    while not (reply := scripted.write(READ)).error:
        asked += 1
        assert asked < 10 * QUEUE_MOST // 4096, "never full"
    assert reply.error == errno.EAGAIN and len(scripted.node.queue) <= QUEUE_MOST + 4112
    assert asked >= QUEUE_MOST // 4112
    waits = scripted.send_write(READ, WAIT)
    assert waits not in scripted.kernel.replies
    assert scripted.read(4112).data[16:] == bytes(4096)
    assert scripted.kernel.replies.pop(waits) == written(len(READ))
    assert len(scripted.messages()) == asked


def test_events_of_who_never_reads(desk, file):
    """Goal: events that nobody reads cost a bounded amount, and none of the nodes is forgotten.
    Method: 100,000 changes below a watch; what the open holds; all is read."""
    file.put(XsType.WATCH, "data", "t")
    for i in range(100_000):
        desk.toolstack.write(f"{desk.home}/data/{i % 50}", b"")
        if not i % 10:
            desk.hypervisor.deliver()
    held = len(file.node.queue) + len(file.peer.out)
    assert QUEUE_MOST <= held < QUEUE_MOST + 100 * KIB
    seen = {File.event(event)[0] for event in file.messages()[1:] if event.type == XsType.WATCH_EVENT}
    assert seen >= {b"data/%d" % i for i in range(50)} | {b"data"}


def test_watch_beside_a_full_queue(scripted):
    """Goal: a WATCH waits for its own answer only, not for a reader who may be the same thread.
    Method: more events before the answer than the queue has room for."""
    event = pack(XsType.WATCH_EVENT, 0, 0, b"data\0" + b"1:" + b"x" * 4000 + b"\0")
    watch = pack(XsType.WATCH, 3, 0, b"data\0t\0")
    waits = scripted.send_write(watch, WAIT)
    scripted.peer.out += event * (QUEUE_MOST // len(event) + 5)
    scripted.peer.answer(scripted.peer.received[0])
    assert scripted.kernel.replies.pop(waits) == written(len(watch))
    assert scripted.write(READ) == Reply(errno.EAGAIN, b"") and len(scripted.node.queue) > QUEUE_MOST
    assert scripted.messages()[-1] == Message(XsType.WATCH, 3, 0, OK)
    assert scripted.write(READ) == written(len(READ))


def test_write_rate(desk, file):
    """Goal: a domain without write credit waits in write(2) and goes on when it has some.
    Method: a transaction is open at somebody else's; WRITEs until one waits; the clock goes on."""
    desk.toolstack.transaction_start()
    count = 0
    while not (reply := file.write(REQUEST)).error:
        count += 1
        file.messages()
        assert count < 1000
    waits = file.send_write(REQUEST, WAIT)
    assert reply.error == errno.EAGAIN and count >= 10
    desk.now += 1.0
    desk.store.timers.run()
    desk.hypervisor.settle()
    assert file.kernel.replies.pop(waits) == written(len(REQUEST))
    assert [message.type for message in file.messages()] == [XsType.WRITE]


# --- the end -------------------------------------------------------------------------------------------------------------


def test_lost_stream(scripted):
    """Goal: what was answered can still be read; then reads are EIO, as writes are at once; pollers wake.
    Method: a reply, a writer and a poller that wait; the peer fails."""
    peer, kernel = scripted.peer, scripted.kernel
    scripted.write(READ)
    peer.answer(peer.received[0], b"value")
    scripted.poll(schedule=True)
    peer.wants_input = False
    waits = scripted.send_write(READ, WAIT)
    peer.failed = 3
    peer.flush()
    assert kernel.replies.pop(waits) == Reply(errno.EIO, b"")
    assert scripted.poll() == READABLE | select.POLLERR
    assert scripted.read().data == pack(XsType.READ, 2, 0, b"value")
    for flags in (NONBLOCK, WAIT):
        assert scripted.read(flags=flags) == scripted.write(READ, flags) == Reply(errno.EIO, b"")
    assert len(peer.received) == 1


def test_domain_goes(desk):
    """Goal: when the domain is destroyed who waits for its store gets EIO, and nothing is left of him in the store.
    Method: a reader, a poller, a transaction in two opens; destroy; a request; RELEASE."""
    files = [desk.open(), desk.open()]
    reader = files[0].send_read()
    files[1].start()
    files[1].poll(schedule=True)
    desk.hypervisor.destroy_domain(DOMID)
    desk.device.stop()
    assert files[0].kernel.replies.pop(reader) == Reply(errno.EIO, b"")
    assert files[0].kernel.notices and files[1].write(READ) == Reply(errno.EIO, b"")
    for file in files:
        assert file.release() == Reply(0, b"")
    assert desk.store.domains.find(Domid(DOMID)) is None and not desk.device.files


def test_release_while_something_comes(scripted):
    """Goal: what the peer still has to say after the last close reaches nobody.  Method: RELEASE, then flush()."""
    reader = scripted.send_read()
    assert scripted.release() == Reply(0, b"")
    assert scripted.kernel.replies[reader] == Reply(errno.EIO, b"") and scripted.peer.closes == 1
    scripted.peer.out += pack(XsType.WATCH_EVENT, 0, 0, b"data\0" + b"1:t\0")
    scripted.peer.flush()
    assert not scripted.node.queue


# --- anything ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [XenbusFile, XsDevFile])
@pytest.mark.parametrize("seed", range(20))
def test_any_cutting_of_the_stream(rules, seed):
    """Goal: however a program cuts what it writes and reads, and whatever the order of requests, replies are the same.
    Method: random requests written whole, and in random pieces, each to a file of its own world; replies compared."""
    choose = random.Random(seed)
    requests = []
    for number in range(60):
        kind = choose.choice([XsType.READ, XsType.WRITE, XsType.WATCH, XsType.UNWATCH, XsType.RM, XsType.DIRECTORY, 99])
        path, more = f"data/{choose.randrange(3)}", f"t{choose.randrange(3)}"
        body = join(path, more) if kind in (XsType.WATCH, XsType.UNWATCH) else join(path)
        tx = choose.choice([0, 0, 0, 0, 5])
        requests.append(pack(kind, number, tx, body[:-1] if kind == XsType.WRITE else body))
    whole, cut = Desk(rules).open(), Desk(rules).open()
    for request in requests:
        assert whole.write(request) == written(len(request))
    stream = b"".join(requests)
    while stream:
        size = choose.choice([1, 3, 16, 40, 700])
        reply = cut.write(stream[:size])
        assert not reply.error
        (count, _) = k.WRITE_OUT.unpack(reply.data)
        stream = stream[count:]
        if choose.random() < 0.3:
            cut.parser.feed(cut.read(choose.randrange(1, 100)).data)
    assert [m for m in cut.messages() if m.type != 15] == [m for m in whole.messages() if m.type != 15]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from([XenbusFile, XsDevFile]),
    st.lists(
        st.tuples(
            st.integers(0, 30) | st.integers(0, 2**32 - 1), st.integers(0, 3), st.binary(max_size=40),
            st.integers(-3, 3) | st.just(5000), st.sampled_from("wrripf"), st.booleans(),
        ),
        max_size=60,
    ),
)  # fmt: skip
def test_hostile_program(rules, actions):
    """Goal: nothing a program writes breaks the node: each request gets one answer, memory stays bounded.
    Method: hypothesis makes messages with lies about their length, reads, interrupts and polls; the scripted Kernel
    refuses second replies; in the end all is released."""
    desk = Desk(rules)
    file = desk.open()
    asked = []
    for kind, tx, body, lie, action, blocks in actions:
        flags = WAIT if blocks else NONBLOCK
        if action == "w":
            data = SOCKMSG.pack(kind, 1, tx, max(0, len(body) + lie)) + body
            asked.append(file.send_write(data, flags))
        elif action == "r":
            asked.append(file.send_read(len(body) + 1, flags))
        elif action == "i" and asked:
            file.interrupt(asked[kind % len(asked)])
        elif action == "p":
            file.poll(schedule=blocks)
        desk.hypervisor.settle()
    assert len(file.node.buffer) <= BUFFER_BYTES and len(file.node.queue) <= QUEUE_MOST
    file.release()
    assert all(unique in file.kernel.replies for unique in asked)
    usage = desk.store.usage(Domid(DOMID))
    assert (usage.watches, usage.transactions, usage.connections, usage.outstanding) == (0, 0, 0, 0)
