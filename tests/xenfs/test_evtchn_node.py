"""Goal: dev/xen/evtchn is to a program what Linux's device is, and FreeBSD's, and to `cat` a table.
Method: FUSE requests into a Session over the nodes of three domains; the ioctls' structures are in a process's memory."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import pytest

from sysdev.evtchn import RING_PORTS
from tests.xenfs.evtchnfile import LINUX, NONBLOCK, SETS, WAIT, Answer, Desk, Program, u32, written
from tests.xenfs.machine import KIB, Reply
from xenfs.fuse import kernel as k
from xenfs.nodes.evtchn import CALLS, OPENS_MOST, READABLE, READS_MOST, WRITABLE
from xenmodel.event_channel import State
from xenmodel.public.xen import VIRQ_CONSOLE
from xenmodel.types import Domid

EAGAIN = Reply(errno.EAGAIN, b"")


@pytest.fixture
def desk() -> Iterator[Desk]:
    it = Desk()
    yield it
    it.close()


@pytest.fixture
def a(desk: Desk) -> Program:
    return desk.open(1)


@pytest.fixture
def b(desk: Desk) -> Program:
    return desk.open(2)


# --- ioctls --------------------------------------------------------------------------------------------------------------


def test_numbers():
    """Goal: the node knows the numbers of both headers and no other.  Method: make them as <sys/ioccom.h> and
    <asm/ioctl.h> do, from group, number, direction and size."""
    def number(direction: int, nr: int, size: int) -> int:
        return direction | size << 16 | ord("E") << 8 | nr

    linux = [number(0, nr, size) for nr, size in enumerate([4, 8, 4, 4, 4, 0, 2, 4])]
    void, out, in_, inout = 0x20000000, 0x40000000, 0x80000000, 0xC0000000  # FreeBSD's
    freebsd = [number(inout, 4, 8), number(inout, 5, 12), number(inout, 6, 8), number(in_, 7, 4), number(in_, 8, 4)]
    others = [number(out, 7, 4), number(out, 8, 4), number(0, 9, 0)]  # Linux's _IOW and _IO
    assert sorted(CALLS) == sorted([*linux, *freebsd, number(void, 9, 0), *others])


@pytest.mark.parametrize("numbers", SETS.values(), ids=SETS)
def test_the_ioctls_of_both(desk, numbers):
    """Goal: the calls of either system do the same; a new end is pending at once, events arrive, masks are kept.
    Method: everything the library does, in the order of a connection's life."""
    a, b = desk.open(1, numbers), desk.open(2, numbers)
    assert a.call("virq", VIRQ_CONSOLE) == 1
    assert a.call("unbound", 2) == 2
    assert b.call("interdomain", 1, 2) == 1
    assert b.ports() == [1] and b.read() == EAGAIN
    assert a.call("notify", 2) == 0
    assert b.read() == EAGAIN, "masked"
    assert b.write(u32(1)) == written(4) and b.ports() == [1]
    assert b.call("notify", 1) == 0 and a.ports() == [2]
    assert a.call("notify", 1) == 0 and desk.domains[1].events.raise_virq(VIRQ_CONSOLE) == 0
    desk.hypervisor.settle()
    assert a.call("reset") == 0 and a.read() == EAGAIN
    assert a.call("unbind", 2) == 0 and a.call("unbind", 2) == -errno.ENOTCONN
    assert desk.domains[2].events.channels[1].state is State.UNBOUND
    assert a.call("virq", VIRQ_CONSOLE) == -errno.EEXIST
    assert a.call("interdomain", 2, 1) == 2


def test_restrict_and_static(desk, a):
    """Goal: Linux's two newer ioctls; a u16 is a u16.  Method: a static port, then a restriction."""
    port = desk.domains[1].events.alloc_unbound(Domid(2))
    assert a.call("static", port) == 0 and a.call("static", port) == -errno.EISCONN
    assert a.call("restrict", 2) == 0 and a.call("restrict", 2) == -errno.EACCES
    assert a.call("unbound", 2) == -errno.EACCES
    ported = desk.open(2)
    ported.call("unbound", 1)
    assert a.call("interdomain", 2, 1) == 2 and a.call("interdomain", 0, 1) == -errno.EACCES


def test_owner(desk, a):
    """Goal: what is bound has the name and number of its process.  Method: ours."""
    port = a.call("unbound", 2)
    owner = desk.domains[1].events.channels[port].owner
    assert owner.endswith(f"[{os.getpid()}]") and not owner.startswith("?")


@pytest.mark.parametrize("command", [0, 0x00044508, 0x000450FF, 0x00305000, 0x40044500, 0xC0084500, 0x5401, 0xFFFFFFFF])
def test_unknown_ioctl(a, command):
    """Goal: any other number is ENOTTY, and changes no face.  Method: near misses, others' numbers, TCGETS."""
    assert a.ioctl(command, bytes(16)) == Answer(errno.ENOTTY)
    assert a.read().data == b"port\n"


def test_bad_pointers(desk, a):
    """Goal: a structure that cannot be read whole is EFAULT, a caller whom we cannot see ESRCH; nothing was done.
    Method: no address, a kernel's, one whose second half is not mapped; pid 0, and one that is no more."""
    page = mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    with closing(mmap.mmap(-1, 2 * page)) as pages:
        view = ctypes.c_char.from_buffer(pages)
        edge = ctypes.addressof(view) + page
        assert libc.mprotect(ctypes.c_void_p(edge), page, 0) == 0
        for arg in (0, 8, 2**64 - 4, 0xFFFF_8000_0000_0000, edge, edge - 4):
            assert a.raw(LINUX["interdomain"], arg) == Answer(errno.EFAULT), hex(arg)
        assert a.raw(0x80044507, edge - 2, out_size=4) == Answer(errno.EFAULT), "FreeBSD's UNBIND brings nothing along"
        pages[page - 4 : page] = u32(2)
        assert a.raw(LINUX["unbound"], edge - 4) == Answer(0, 1), "it ends where the page does"
        assert libc.mprotect(ctypes.c_void_p(edge), page, mmap.PROT_READ | mmap.PROT_WRITE) == 0
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        for pid in (0, gone.pid):
            assert a.raw(LINUX["unbound"], edge - 4, pid=pid) == Answer(errno.ESRCH)
        del view
    assert list(desk.domains[1].events.channels) == [1]
    assert a.raw(LINUX["reset"], 8, pid=0) == Answer(0), "has no structure"


def test_the_caller_s_memory(desk, a):
    """Goal: the structure is that of the process which calls.  Method: another process, that says where it has one."""
    code = (
        "import ctypes, struct, sys; b = ctypes.create_string_buffer(struct.pack('<I', 77));"
        "print(ctypes.addressof(b), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None and other.stdout is not None
        address = int(other.stdout.readline())
        port = a.raw(LINUX["unbound"], address, pid=other.pid).result
        other.stdin.close()
    channel = desk.domains[1].events.channels[port]
    assert channel.remote_domid == 77 and channel.owner.endswith(f"[{other.pid}]")


# --- two faces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 7, 64 * KIB])
def test_table(desk, a, size):
    """Goal: without an ioctl the file is a table of one moment, read in any pieces, and ends; it is made when it is read.
    Method: reads at offset 0, as a stream has them, while the table changes."""
    desk.table = "port  state\n1     unbound\n"
    parts = [a.read(size).data]
    desk.table = "another"
    while parts[-1]:
        parts.append(a.read(size, WAIT).data)
    assert b"".join(parts) == b"port  state\n1     unbound\n" and max(map(len, parts)) <= size
    assert a.read(size) == Reply(0, b"")
    assert desk.open(1, flags=os.O_RDONLY).read().data == b"another"


def test_from_table_to_device(desk, a):
    """Goal: with the first ioctl a file that was half read becomes the device, for reads, and stays it without a port; what
    is written before unmasks nothing.  Method: read a part, write; an ioctl that fails, one that binds, unbind."""
    assert a.read(2).data == b"po"
    assert a.write(u32(1) + b"x") == written(4) and a.write(b"xyz") == written(0)
    assert a.write(bytes(5000)) == written(4096)
    assert a.poll() == WRITABLE
    assert a.call("notify", 1) == -errno.ENOTCONN
    assert a.read() == EAGAIN
    assert a.call("unbound", 2) == 1 and a.call("unbind", 1) == 0
    waits = a.send_read()
    assert waits not in a.kernel.replies


# --- reads, writes -------------------------------------------------------------------------------------------------------


def test_readers_wait_in_turn(desk, a, b):
    """Goal: readers wait for events and are served in their order, one event each; what fits in one read is one read.
    Method: three readers; events one by one and two at once; sizes in bytes that are no whole ports."""
    pairs = [desk.pair(a, b) for _ in range(4)]
    first, second, third = b.send_read(), b.send_read(7), b.send_read()
    a.call("notify", pairs[0][0])
    assert b.kernel.replies == {first: Reply(0, u32(pairs[0][1]))}
    for port, _ in pairs[1:3]:
        desk.user(1).notify(port)
    desk.hypervisor.settle()
    assert b.kernel.order[-2:] == [second, third]
    assert [b.kernel.replies[unique].data for unique in (second, third)] == [u32(pairs[1][1]), u32(pairs[2][1])]
    for port, peer in pairs:
        b.write(u32(peer))
        a.call("notify", port)
    assert [len(b.read(size).data) for size in (0, 3, 5, 11, 4096)] == [0, 0, 4, 8, 4]
    assert b.read(3, WAIT) == Reply(0, b""), "Linux: no whole port is no wait"


def test_more_events_than_room(desk, a, b):
    """Goal: events that a reader has no room for go to the next one, and what is left stays for later.
    Method: two readers with room for one port, and one write that unmasks three pending ones."""
    pairs = [desk.pair(a, b) for _ in range(3)]
    peers = [peer for _, peer in pairs]
    for _ in range(2):
        for port, _ in pairs:
            a.call("notify", port)
        if b.read() == EAGAIN:
            break
    readers = [b.send_read(4), b.send_read(4)]
    assert not b.kernel.replies
    b.write(u32(*peers))
    assert [b.kernel.replies[reader] for reader in readers] == [Reply(0, u32(peer)) for peer in peers[:2]]
    assert b.ports() == peers[2:]


def test_nonblocking_and_interrupted(desk, a, b):
    """Goal: O_NONBLOCK is what the file has at this read; a signal ends a read that waits and takes no event with it.
    Method: both ways at once; INTERRUPT one of two, twice, then an event; INTERRUPT what was answered."""
    port, peer = desk.pair(a, b)
    first, second = b.send_read(), b.send_read()
    assert b.read(flags=NONBLOCK) == EAGAIN
    b.interrupt(first)
    b.interrupt(first)
    assert b.kernel.replies.pop(first) == Reply(errno.EINTR, b"")
    a.call("notify", port)
    assert b.kernel.replies.pop(second) == Reply(0, u32(peer))
    b.interrupt(second)
    assert b.read() == EAGAIN


def test_many_readers(desk, a, b):
    """Goal: of one open so many reads wait, one more is EAGAIN, and another open has as many; who gives up makes room, and
    the others are still served in their turn.
    Method: reads until one is refused; INTERRUPT every other one, the last first; as many again; an event for each."""
    port, peer = desk.pair(a, b)
    other = desk.open(2)
    desk.pair(a, other)
    waiting = [b.send_read() for _ in range(READS_MOST)]
    assert not b.kernel.replies and b.read(flags=WAIT) == EAGAIN and len(b.node.reads) == READS_MOST
    assert (elsewhere := other.send_read()) not in b.kernel.replies
    for unique in reversed(waiting[::2]):
        b.interrupt(unique)
        assert b.kernel.replies.pop(unique) == Reply(errno.EINTR, b"")
    waiting = waiting[1::2] + [b.send_read() for _ in range(READS_MOST // 2)]
    assert b.read(flags=WAIT) == EAGAIN
    b.kernel.order.clear()
    for unique in waiting:
        a.call("notify", port)
        assert b.kernel.replies.pop(unique) == Reply(0, u32(peer))
        b.write(u32(peer))
    assert elsewhere not in b.kernel.replies and not b.node.reads
    assert [unique for unique in b.kernel.order if unique in waiting] == waiting


def test_written_counts(desk, a, b):
    """Goal: a write counts whole ports, a page at most, and answers at once.  Method: sizes, also beyond the landing."""
    desk.pair(a, b)
    for size, count in ((0, 0), (3, 0), (4, 4), (7, 4), (4096, 4096), (4097, 4096), (100 * KIB, 4096)):
        assert b.write(bytes(size)) == written(count)


# --- poll ----------------------------------------------------------------------------------------------------------------


def test_poll(desk, a, b):
    """Goal: always writable, readable with an event; all who wait are told, once, also who asked while there was something
    (EPOLLET asks no more) and before the first ioctl.  Method: POLL with several kh around binds, events and reads."""
    assert READABLE == select.POLLIN | select.POLLRDNORM and WRITABLE == select.POLLOUT | select.POLLWRNORM
    assert b.poll(1) == WRITABLE
    port = a.call("unbound", 2)
    peer = b.call("interdomain", 1, port)
    assert desk.told() == [1] and b.poll() == WRITABLE | READABLE
    assert b.poll(2) == b.poll(2) == b.poll(3) == WRITABLE | READABLE and desk.told() == []
    assert b.ports() == [peer] and b.poll() == WRITABLE and desk.told() == []
    b.write(u32(peer))
    a.call("notify", port)
    assert desk.told() == [2, 3]
    b.ports(), b.write(u32(peer))
    a.call("notify", port)
    assert desk.told() == []
    b.ports(), b.write(u32(peer))
    assert b.poll(4) == WRITABLE
    reader = b.send_read()
    a.call("notify", port)
    assert reader in b.kernel.replies and desk.told() == [], "the reader took it"
    b.write(u32(peer))
    a.call("notify", port)
    assert desk.told() == [4]


def test_overflow(desk, a, b):
    """Goal: a ring that overflowed is POLLERR for poll and EFBIG for every read, until RESET.  Method: a port too many."""
    pairs = [desk.pair(a, b) for _ in range(RING_PORTS + 1)]
    for port, _ in pairs[:-1]:
        desk.user(1).notify(port)
    desk.hypervisor.settle()
    assert b.poll(5) == WRITABLE | READABLE and desk.told() == []
    a.call("notify", pairs[-1][0])
    assert desk.told() == [5] and b.poll() == select.POLLERR
    assert b.read() == b.read(flags=WAIT) == Reply(errno.EFBIG, b"")
    assert b.call("reset") == 0 and b.read() == EAGAIN and b.poll() == WRITABLE


# --- opens, the node -----------------------------------------------------------------------------------------------------


def test_what_it_looks_like(desk):
    """Goal: a file for its owner without a size, that is no place to seek in; O_TRUNC does no harm, nothing else is taken.
    Method: attributes, FOPEN flags, SETATTR of the node and of an open file."""
    attributes = k.ENTRY_OUT.unpack(desk.kernel.lookup(k.FUSE_ROOT_ID, "evtchn1").data)[6:]
    assert attributes[1] == 0 and attributes[9] == stat.S_IFREG | 0o600
    ino = desk.kernel.walk("evtchn1")
    fh, flags, _ = k.OPEN_OUT.unpack(desk.kernel.open(ino, os.O_RDWR | os.O_TRUNC).data)
    assert flags == k.FOPEN_DIRECT_IO | k.FOPEN_NONSEEKABLE | k.FOPEN_STREAM
    no_more = k.SETATTR_IN.unpack(bytes(k.SETATTR_IN.size))[4:]
    for valid, size, expected in (
        (k.FATTR_SIZE, 0, 0), (k.FATTR_SIZE, 1, errno.EPERM), (k.FATTR_MODE, 0, errno.EPERM),
        (k.FATTR_SIZE | k.FATTR_MODE, 0, errno.EPERM), (k.FATTR_UID, 0, errno.EPERM),
    ):  # fmt: skip
        for given in (0, k.FATTR_FH):
            body = k.SETATTR_IN.pack(valid | given, 0, fh, size, *no_more)
            assert desk.kernel.call(k.FUSE_SETATTR, ino, body).error == expected, (valid, size)


def test_opens_are_limited(desk):
    """Goal: a guest may have so many opens, and again as many when they are closed; domain 0 any number; each is its own.
    Method: open until ENFILE, close one; then domain 0."""
    opens = [desk.open(1) for _ in range(OPENS_MOST)]
    inos = {domid: desk.kernel.walk(f"evtchn{domid}") for domid in (0, 1)}
    assert desk.kernel.open(inos[1], os.O_RDWR) == Reply(errno.ENFILE, b"")
    assert desk.open(2).call("unbound", 1) == 1
    opens[7].release()
    assert not desk.kernel.open(inos[1], os.O_RDWR).error
    assert [desk.kernel.open(inos[0], os.O_RDWR).error for _ in range(OPENS_MOST + 1)] == [0] * (OPENS_MOST + 1)
    assert opens[0].call("unbound", 2) == 1 and opens[1].call("notify", 1) == -errno.ENOTCONN


def test_release(desk, a, b):
    """Goal: the last close unbinds what this open has; nobody is told of anything any more.
    Method: ports, a poll that waits, an event on its way; RELEASE of one that did nothing, too."""
    port, _ = desk.pair(a, b)
    b.poll(9)
    desk.user(1).notify(port)
    b.kernel.settle = lambda: None
    b.release()
    desk.hypervisor.settle()
    assert desk.told() == [] and not desk.domains[2].events.channels and not desk.nodes[2].files
    assert desk.domains[1].events.channels[port].state is State.UNBOUND
    desk.open(2).release()
    assert not desk.nodes[2].files and not desk.devices[2].users


@pytest.mark.parametrize("destroyed_first", [False, True])
def test_the_domain_ends(desk, a, b, destroyed_first):
    """Goal: who waits for a domain that ends learns of it: EIO; open files can do nothing any more, and no more are opened.
    Method: readers, pollers and a table reader; stop() before or after the domain's end; everything again."""
    _, peer = desk.pair(a, b)
    plain, idle = desk.open(2), desk.open(2)
    assert plain.read(2).data == b"po" and b.poll(8) == WRITABLE
    readers = [b.send_read(), b.send_read()]
    if destroyed_first:
        desk.hypervisor.destroy_domain(2)
    desk.devices[2].stop()
    if not destroyed_first:
        desk.hypervisor.destroy_domain(2)
    assert [b.kernel.replies.pop(unique) for unique in readers] == [Reply(errno.EIO, b"")] * 2
    assert desk.told() == [8] and b.poll() == idle.poll() == READABLE | select.POLLERR
    assert b.read() == b.read(flags=WAIT) == b.write(u32(peer)) == Reply(errno.EIO, b"")
    assert [b.call(name, 1) for name in ("notify", "unbind", "unbound", "virq")] == [-errno.EIO] * 4
    assert plain.read().data == b"rt\n" and idle.read() == Reply(errno.EIO, b"")
    assert desk.kernel.open(desk.kernel.walk("evtchn2"), os.O_RDWR) == Reply(errno.ENODEV, b"")
    for program in (b, plain, idle):
        program.release()
    assert a.poll() == WRITABLE and a.call("unbound", 2) > 0
