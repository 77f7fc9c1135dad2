"""Goal: what the programs of one guest keep open, waiting and unread in its device files is bounded, and costs that guest
only.  Method: opens, reads and writes without end; the domain's record after each thing that a reader can do."""

from __future__ import annotations

import errno
import os

import pytest

from tests.xenfs.machine import KIB, Kernel, Reply
from tests.xenfs.xsfile import DOMID, READ, REPLIES, REQUEST, Desk, File, written
from xenfs.fuse import kernel as k
from xenfs.fuse.tree import Directory
from xenfs.nodes.xenbus import BUFFER_BYTES, QUEUE_MOST, QUEUE_MOST_DOM0, WAITING_MOST, XenbusFile
from xenfs.nodes.xs_dev import XsDevFile
from xenfs.xenstored import OPENS_MOST, StoreHost
from xenmodel.hypervisor import Hypervisor
from xenmodel.public.io.xs_wire import XsType
from xenmodel.types import Domid
from xenmodel.xenstore.domain import DomainRecord
from xenmodel.xenstore.quota import DEFAULT_QUOTA
from xenmodel.xenstore.wire import Message, pack

WAIT = os.O_RDWR
BODY = 2000  # bytes of a value


class Files:
    """The device files of domains 0, 1 and 2, as a host has them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.hypervisor = Hypervisor(clock=lambda: self.now)
        self.host = StoreHost(self.hypervisor, self.hypervisor.deliver)
        devs = {domid: Directory() for domid in range(3)}
        for domid, dev in devs.items():
            self.hypervisor.create_domain(4, f"d{domid}", domid)
            self.host.device_files(Domid(domid), dev)
        self.kernel = Kernel(Directory({str(domid): dev for domid, dev in devs.items()}))

    def open(self, domid: int, name: str = "xenbus") -> Reply:
        return self.kernel.open(self.kernel.walk(f"{domid}/xen/{name}"), os.O_RDWR)

    def close(self, opened: Reply) -> None:
        fh = k.OPEN_OUT.unpack(opened.data)[0]
        assert self.kernel.call(k.FUSE_RELEASE, 0, k.RELEASE_IN.pack(fh, 0, 0, 0)) == Reply(0, b"")


def record(desk: Desk) -> DomainRecord:
    return desk.store.domains.record(Domid(DOMID))


def fill(file: File) -> Reply:
    """Ask for one value again and again until a write would wait; nothing is read."""
    for _ in range(QUEUE_MOST_DOM0 // BODY):
        if (reply := file.write(READ)).error:
            return reply
    raise AssertionError("never full")


# --- opens -----------------------------------------------------------------------------------------------------------------


def test_opens():
    """Goal: a guest has so many opens of both its files, then ENFILE; another guest and domain 0 have theirs; who closes
    one may open one, of either file.  Method: opens until it is refused, in turn of both; the others' then."""
    files = Files()
    opened = [files.open(1, ("xenbus", "xenstore")[i % 2]) for i in range(OPENS_MOST)]
    assert not any(reply.error for reply in opened)
    for name in ("xenbus", "xenstore"):
        assert files.open(1, name) == Reply(errno.ENFILE, b"")
        assert not files.open(2, name).error
    assert not any(files.open(0).error for _ in range(OPENS_MOST + 10))
    connections = files.hypervisor.store.usage(Domid(1)).connections
    assert connections == OPENS_MOST, "who is refused leaves nothing"
    files.close(opened[0])
    assert not files.open(1, "xenstore").error
    assert files.open(1) == Reply(errno.ENFILE, b"")


def test_opens_of_a_domain_that_is_gone():
    """Goal: it is as if there were no such file; what is closed later harms nobody.  Method: all opens; destroy; close."""
    files = Files()
    opened = [files.open(1) for _ in range(OPENS_MOST)]
    files.hypervisor.destroy_domain(1)
    assert files.open(1) == Reply(errno.ENOENT, b"")
    for reply in opened:
        files.close(reply)
    assert not files.open(2).error and files.hypervisor.store.domains.find(Domid(1)) is None


# --- reads and writes that wait ------------------------------------------------------------------------------------------


def test_many_writers_wait():
    """Goal: what waits is bounded per writer, also if it is no request at all, and in number: one more is EAGAIN. All are
    answered, and another open has as many.
    Method: 200 writers with 1 MiB each behind one that waits; one of another open; then the peers take it."""
    desk = Desk(scripted=True)
    scripted, other = desk.open(), desk.open()
    scripted.peer.wants_input = other.peer.wants_input = False
    first = scripted.send_write(REQUEST, WAIT)
    asked = [scripted.send_write(bytes(KIB * KIB), WAIT) for _ in range(200)]
    waiting, refused = asked[: WAITING_MOST - 1], asked[WAITING_MOST - 1 :]
    assert {scripted.kernel.replies.pop(unique) for unique in refused} == {Reply(errno.EAGAIN, b"")}
    assert not scripted.kernel.replies
    assert sum(len(write.data) for write in scripted.node.writes.values()) <= WAITING_MOST * BUFFER_BYTES
    assert other.send_write(REQUEST, WAIT) not in other.kernel.replies
    scripted.peer.want()
    assert scripted.kernel.replies.pop(first) == written(len(REQUEST))
    assert {scripted.kernel.replies.pop(unique) for unique in waiting} == {Reply(errno.EINVAL, b"")}
    assert not scripted.kernel.replies and not scripted.node.writes


def test_many_readers_wait(desk):
    """Goal: so many reads of one open wait, one more is EAGAIN; who gives up makes room; they are served in their turn.
    Method: reads until one is refused; INTERRUPT every other one, the last first; as many again; a reply for each."""
    file = desk.open()
    waiting = [file.send_read() for _ in range(WAITING_MOST)]
    assert not file.kernel.replies and file.read(flags=WAIT) == Reply(errno.EAGAIN, b"")
    for unique in reversed(waiting[::2]):
        file.interrupt(unique)
        assert file.kernel.replies.pop(unique) == Reply(errno.EINTR, b"")
    waiting = waiting[1::2] + [file.send_read() for _ in range(WAITING_MOST // 2)]
    assert file.read(flags=WAIT) == Reply(errno.EAGAIN, b"")
    for unique in waiting:
        assert file.write(REQUEST) == written(len(REQUEST))
        assert file.kernel.replies.pop(unique) == Reply(0, pack(*REPLIES[0]))
    assert not file.kernel.replies and not file.node.reads


# --- bytes that nobody has read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [XenbusFile, XsDevFile])
def test_unread(rules):
    """Goal: a domain uses, as memory, what its files hold for readers, to the byte, and none of it after the last.
    Method: replies and events in two files; they are read in pieces, or closed unread while somebody waits."""
    desk = Desk(rules)
    one, two = desk.open(), desk.open()
    one.put(XsType.WRITE, body=b"data\0" + b"v" * BODY)
    one.put(XsType.WATCH, "data", "token")
    desk.write("data", b"v" * BODY)
    for _ in range(5):
        two.write(READ)
    held = [len(file.node.queue) for file in (one, two)]
    before = desk.store.usage(Domid(DOMID)).memory
    assert record(desk).unread == sum(held) and held[1] == 5 * (16 + BODY)
    assert len(one.read(5).data) == 5 and len(two.read(3000).data) == 3000
    assert record(desk).unread == sum(held) - 3005
    assert desk.store.usage(Domid(DOMID)).memory == before - 3005
    waits = two.send_write(pack(XsType.WATCH, 1, 0, b"x\0y\0"), WAIT)
    assert two.release() == Reply(0, b"") and waits in two.kernel.replies
    assert record(desk).unread == len(one.node.queue) == held[0] - 5
    assert one.release() == Reply(0, b"") and record(desk).unread == 0
    last = desk.open()
    assert fill(last) == Reply(errno.EAGAIN, b"") and record(desk).unread > 0
    last.messages()
    assert record(desk).unread == 0


def test_killed_while_it_waits(desk):
    """Goal: nothing stays counted of a program that is killed.  Method: one with a full file, whose write waits (it gets
    INTERRUPT, then its file is closed), and one whose read waits."""
    full, idle = desk.open(), desk.open()
    full.put(XsType.WRITE, body=b"data\0" + b"v" * BODY)
    fill(full)
    writes, reads = full.send_write(READ, WAIT), idle.send_read()
    for file, unique in ((full, writes), (idle, reads)):
        file.interrupt(unique)
        assert file.kernel.replies.pop(unique) == Reply(errno.EINTR, b"")
        assert file.release() == Reply(0, b"")
    assert record(desk).unread == 0 and not desk.device.files


def test_released_with_unread_replies(desk):
    """Goal: the record of a domain that is introduced again starts from nothing, whatever is still open of the old one.
    Method: RELEASE with a file that is full; a new open beside it; both are read or closed."""
    old = desk.open()
    old.put(XsType.WRITE, body=b"data\0" + b"v" * BODY)
    fill(old)
    desk.hypervisor.xenstored.release(Domid(DOMID))
    desk.device.stop()
    desk.store.introduce(Domid(DOMID))
    assert record(desk).unread == 0
    new = desk.open()
    new.put(XsType.GET_DOMAIN_PATH, "1")
    held = len(new.node.queue)
    assert record(desk).unread == held > 0
    assert old.read(BODY).data and record(desk).unread == held
    assert old.release() == Reply(0, b"") and record(desk).unread == held


def test_queue_of_domain_0():
    """Goal: domain 0 may leave more unread, and has no quota.  Method: a file of each; the same request until it waits."""
    desk = Desk()
    desk.toolstack.write(f"{desk.home}/data", b"v" * BODY)
    guest = desk.open()
    desk.device.make_peer = lambda flush: desk.hypervisor.xenstored.peer(Domid(0), flush)
    own = desk.open()
    path = f"{desk.home}/data"
    for file, most in ((guest, QUEUE_MOST), (own, QUEUE_MOST_DOM0)):
        while not (reply := file.put(XsType.READ, path)).error:
            assert len(file.node.queue) < most + 4 * KIB
        assert reply == Reply(errno.EAGAIN, b"") and most <= len(file.node.queue) < most + 4 * KIB


def test_quota(desk):
    """Goal: a domain whose programs read nothing is stopped by its memory quota, long before its opens are full; another
    domain is served meanwhile; when one of them reads all go on.
    Method: opens that ask until they would wait; what the domain uses; a peer of another domain; one file is closed."""
    desk.open().put(XsType.WRITE, body=b"data\0" + b"v" * BODY)
    files = [desk.open() for _ in range(60)]  # 60 * 64 KiB would be 3.75 MiB
    for file in files:
        assert fill(file) == Reply(errno.EAGAIN, b"")
    limit, used = DEFAULT_QUOTA.memory, desk.store.usage(Domid(DOMID)).memory
    assert limit <= used < limit + 4 * KIB
    assert record(desk).unread == sum(len(node.queue) for node in desk.device.files)
    assert not files[-1].node.queue, "the last ones were not served at all"
    assert record(desk).refused["memory"].times >= 1
    other = desk.hypervisor.create_domain(4, "other", 8)
    peer = desk.hypervisor.xenstored.peer(other.domid, lambda: None)
    assert peer.wants_input
    waits = files[-1].send_write(READ, WAIT)
    assert waits not in files[-1].kernel.replies
    files[0].messages()
    desk.now += 1.0
    desk.store.timers.run()
    desk.hypervisor.settle()
    assert files[-1].kernel.replies.pop(waits) == written(len(READ))
    assert files[-1].messages() == [Message(XsType.READ, 2, 0, b"v" * BODY)]
    for file in files:
        file.release()
    assert desk.store.usage(Domid(DOMID)).memory < 8 * KIB


@pytest.fixture
def desk() -> Desk:
    return Desk()
