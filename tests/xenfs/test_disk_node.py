"""Goal: a disk node is what a Linux block device is: every byte range readable and writable, with its errors at the end.
Method: FUSE requests into a node over a real frontend and backend in one process; the storage's bytes are compared."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator

import pytest

from blockdev.storage import FaultyStorage, MemoryStorage
from tests.xenfs.machine import KIB, MIB, Machine, Reply
from xenfs.fuse import kernel as k
from xenmodel.public.io.xenbus import XenbusState

DISK = "domains/1/dev/xvda"
SECTORS = 8192  # 4 MiB


class Pair:
    """One disk of known random content, opened."""

    def __init__(self, machine: Machine, storage: MemoryStorage) -> None:
        self.machine, self.kernel, self.storage = machine, machine.kernel, storage
        self.storage.data[:] = random.Random(1).randbytes(len(storage.data))
        self.size = len(storage.data)
        self.fh = self.kernel.handle(DISK, os.O_RDONLY if storage.readonly else os.O_RDWR)


@pytest.fixture(params=[(512, ""), (4096, ""), (512, ",untrusted"), (4096, ",untrusted")], ids=lambda p: f"{p[0]}{p[1]}")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    sector_size, extra = request.param
    storage = MemoryStorage(SECTORS, sector_size)
    with Machine({"g": {"xvda": storage}}, extra) as machine:
        yield Pair(machine, storage)


def ranges(size: int) -> list[tuple[int, int]]:
    """Offsets and lengths around every border there is: sector, page, small and large command, the end."""
    lengths = [1, 511, 512, 513, 4095, 4096, 4097, 64 * KIB, 64 * KIB + 1, 64 * KIB + 512, MIB - 1, MIB]
    starts = [0, 1, 511, 512, 4096, 4097, 65535]
    return [(start, length) for start in starts for length in lengths] + [(size - n, n) for n in lengths]


def test_reads(pair):
    """Goal: any range reads as what the storage has.  Method: every combination of borders."""
    for offset, length in ranges(pair.size):
        got = pair.kernel.read(pair.fh, offset, length)
        assert got == Reply(0, bytes(pair.storage.data[offset : offset + length])), (offset, length)


def test_writes(pair):
    """Goal: any range is written and nothing beside it.  Method: every combination of borders against a bytearray."""
    expected = bytearray(pair.storage.data)
    for i, (offset, length) in enumerate(ranges(pair.size)):
        data = random.Random(i).randbytes(length)
        expected[offset : offset + length] = data
        assert pair.kernel.write(pair.fh, offset, data) == Reply(0, k.WRITE_OUT.pack(length, 0)), (offset, length)
        assert pair.storage.data == expected, (offset, length)


END = SECTORS * 512
PAST_THE_END = [
    (END - 512, 4096, 512), (END - 1, 2, 1), (END - 100, MIB, 100), (END, 1, 0), (END + 5, 512, 0), (2**62, 8, 0),
]  # fmt: skip


@pytest.mark.parametrize(("offset", "length", "inside"), PAST_THE_END)
def test_the_end(pair, offset, length, inside):
    """Goal: reads past the end are short; writes too, and ENOSPC where nothing is left.  Method: ranges across and after."""
    before = bytes(pair.storage.data)
    assert pair.kernel.read(pair.fh, offset, length) == Reply(0, before[offset : offset + length])
    written = pair.kernel.write(pair.fh, offset, b"w" * length)
    assert written == (Reply(0, k.WRITE_OUT.pack(inside, 0)) if inside else Reply(errno.ENOSPC, b""))
    assert pair.storage.data == before[: END - inside] + b"w" * inside


@pytest.mark.parametrize("offset", [0, 1, END - 1, END, END + 1, END + 512, 2**62])
def test_nothing(pair, offset):
    """Goal: reading or writing no bytes is fine anywhere.  Method: size 0 inside, at and after the end."""
    assert pair.kernel.read(pair.fh, offset, 0) == Reply(0, b"")
    assert pair.kernel.write(pair.fh, offset, b"") == Reply(0, k.WRITE_OUT.pack(0, 0))


def test_whole_blocks_are_one_request(pair):
    """Goal: up to 1 MiB in whole blocks is one blkif request.  Method: the backend's own counts."""
    statistics = pair.machine.world.backs()[0].queues[0].statistics
    for length in (pair.storage.sector_size, 64 * KIB, MIB):
        before = statistics.rd_req, statistics.wr_req
        pair.kernel.read(pair.fh, 0, length)
        pair.kernel.write(pair.fh, 0, bytes(length))
        assert (statistics.rd_req, statistics.wr_req) == (before[0] + 1, before[1] + 1), length


def test_fsync_is_a_flush(pair):
    """Goal: what was written before an fsync is durable when that returns, and not before.  Method: the storage's count."""
    pair.kernel.write(pair.fh, 0, b"x" * 4096)
    assert pair.storage.flushes == 0
    assert pair.kernel.fsync(pair.fh) == Reply(0, b"")
    assert pair.storage.flushes == 1
    assert pair.storage.durable[:4096] == b"x" * 4096


def test_attributes(pair):
    """Goal: the size is the disk's; O_TRUNC and times are accepted and change nothing; growing, mode and owner are refused.
    Method: GETATTR, then SETATTR with each set."""
    ino = pair.kernel.walk(DISK)
    before = pair.kernel.call(k.FUSE_GETATTR, ino, k.GETATTR_IN.pack(0, 0, 0))
    assert k.ATTR_OUT.unpack(before.data)[4] == END
    times = 0x7FF & ~(k.FATTR_MODE | k.FATTR_UID | k.FATTR_GID)
    for valid, size, error in (
        (times, 0, 0),
        (k.FATTR_SIZE, END, 0),
        (k.FATTR_SIZE, END + 1, errno.EINVAL),
        (k.FATTR_MODE, 0, errno.EPERM),
        (k.FATTR_UID, 0, errno.EPERM),
        (k.FATTR_GID, 0, errno.EPERM),
    ):
        reply = pair.kernel.call(k.FUSE_SETATTR, ino, k.SETATTR_IN.pack(valid, 0, 0, size, *[0] * 12))
        assert reply == before if not error else reply.error == error
    assert len(pair.storage.data) == END


def test_two_disks_in_turn():
    """Goal: data lands on its own disk although it is put into the pages of the one that was written last.
    Method: two guests with two disks each, written in a random order with every size class; four bytearrays."""
    disks = [(guest, vdev) for guest in "gh" for vdev in ("xvda", "xvdb")]
    storages = {disk: MemoryStorage(SECTORS) for disk in disks}
    choose = random.Random(7)
    with Machine({guest: {vdev: storages[guest, vdev] for vdev in ("xvda", "xvdb")} for guest in "gh"}) as machine:
        kernel = machine.kernel
        opened = {disk: kernel.handle(f"domains/{'gh'.index(disk[0]) + 1}/dev/{disk[1]}", os.O_RDWR) for disk in disks}
        expected = {disk: bytearray(END) for disk in disks}
        for _ in range(300):
            disk = choose.choice(disks)
            length = choose.choice([512, 4096, 5000, 64 * KIB, 65 * KIB, 128 * KIB, MIB])
            offset = choose.randrange(END - length)
            data = choose.randbytes(length)
            assert not kernel.write(opened[disk], offset, data).error
            expected[disk][offset : offset + length] = data
        for disk in disks:
            assert storages[disk].data == expected[disk], disk


FAULTS = [("read", 0, 512, 0), ("read", 5, 70000, 0), ("write", 0, MIB, 0), ("write", 100, 10, 0), ("flush", 0, 0, 0)]


@pytest.mark.parametrize(("what", "offset", "length", "_"), FAULTS)
def test_storage_errors(what, offset, length, _):
    """Goal: a failing medium is EIO, nothing hangs, and the disk works again when the medium does.
    Method: a storage that fails one kind of operation, twice as often as there are commands."""
    broken = [what]
    storage = FaultyStorage(MemoryStorage(SECTORS), lambda operation: operation in broken)
    with Machine({"g": {"xvda": storage}}) as machine:
        kernel = machine.kernel
        fh = kernel.handle(DISK, os.O_RDWR)

        def ask() -> Reply:
            if what == "read":
                return kernel.read(fh, offset, length)
            return kernel.write(fh, offset, b"d" * length) if what == "write" else kernel.fsync(fh)

        assert [ask() for _ in range(90)] == [Reply(errno.EIO, b"")] * 90
        broken.clear()
        assert not ask().error


def test_a_write_whose_read_fails():
    """Goal: a part of a sector is not written over what could not be read.  Method: reads fail, writes would work."""
    inner = MemoryStorage(SECTORS)
    inner.data[:] = b"o" * END
    storage = FaultyStorage(inner, lambda operation: operation == "read")
    with Machine({"g": {"xvda": storage}}) as machine:
        fh = machine.kernel.handle(DISK, os.O_RDWR)
        assert machine.kernel.write(fh, 100, b"n").error == errno.EIO
        assert machine.kernel.write(fh, 512, b"n" * 512).error == 0
    assert inner.data[:1024] == b"o" * 512 + b"n" * 512


def test_readonly():
    """Goal: a read-only disk reads, and refuses to be opened for writing, written or punched with EROFS.
    Method: a storage that says so; writes through a handle that was opened for reading."""
    storage = MemoryStorage(SECTORS, readonly=True)
    with Machine({"g": {"xvda": storage}}) as machine:
        pair = Pair(machine, storage)
        kernel, ino = pair.kernel, pair.kernel.walk(DISK)
        for flags in (os.O_WRONLY, os.O_RDWR):
            assert kernel.open(ino, flags).error == errno.EROFS
        assert kernel.read(pair.fh, 10, 5000).data == storage.data[10:5010]
        written = [kernel.write(pair.fh, 0, b"x" * 512), kernel.write(pair.fh, 3, b"x")]
        for reply in (*written, kernel.fallocate(pair.fh, 0, 9, 3)):
            assert reply == Reply(errno.EROFS, b"")
        mode = k.ATTR_OUT.unpack(kernel.call(k.FUSE_GETATTR, ino, bytes(16)).data)[12]
        assert mode & 0o777 == 0o400
        assert not kernel.fsync(pair.fh).error


@pytest.mark.parametrize("sectors", [8, 8192, 100_000])
def test_resize(sectors):
    """Goal: a grown or shrunk disk shows its new size, tells Linux, and ends where it now ends.
    Method: change the storage, let the backend say so; GETATTR, a notification, reads and writes at the end."""
    storage = MemoryStorage(1024)
    with Machine({"g": {"xvda": storage}}) as machine:
        kernel = machine.kernel
        fh, ino = kernel.handle(DISK, os.O_RDWR), kernel.walk(DISK)
        kernel.read(fh, 0, 512)
        storage.sectors = sectors
        storage.data[:] = bytes(sectors * 512)
        machine.world.backs()[0].resized()
        machine.world.settle()
        assert kernel.notices == [(k.FUSE_NOTIFY_INVAL_INODE, k.NOTIFY_INVAL_INODE_OUT.pack(ino, -1, 0))]
        assert k.ATTR_OUT.unpack(kernel.call(k.FUSE_GETATTR, ino, bytes(16)).data)[4] == sectors * 512
        assert kernel.write(fh, sectors * 512 - 1, b"last") == Reply(0, k.WRITE_OUT.pack(1, 0))
        assert kernel.read(fh, sectors * 512 - 1, 99) == Reply(0, b"l")
        assert kernel.write(fh, sectors * 512, b"after").error == errno.ENOSPC


def test_untrusted_backend_sees_no_leftovers():
    """Goal: with `untrusted` no page given to the backend has bytes of earlier requests (XSA-403).
    Method: write markers through the commands that are used next, then a little; look at what the storage was given."""
    seen: list[bytes] = []

    class Nosy(MemoryStorage):
        def look(self, views: list[memoryview]) -> None:
            for command in machine.front("g", "xvda").small.commands + machine.front("g", "xvda").large.commands:
                if command.context is not None:
                    pages = -(-command.length // 4096)
                    seen.append(bytes(command.view[: pages * 4096]))

        def read(self, offset, views, length, request):
            self.look(views)
            return super().read(offset, views, length, request)

        def write(self, offset, views, length, request):
            self.look(views)
            return super().write(offset, views, length, request)

    storage = Nosy(SECTORS)
    with Machine({"g": {"xvda": storage}}, ",untrusted") as machine:
        kernel = machine.kernel
        fh = kernel.handle(DISK, os.O_RDWR)
        for size in (64 * KIB, MIB):
            assert not kernel.write(fh, 0, b"M" * size).error
        storage.data[:] = bytes(END)
        seen.clear()
        for offset, size in ((0, 512), (1, 100), (512, 5000), (3, 100_000), (0, MIB)):
            assert kernel.read(fh, offset, size).data == bytes(size)
            assert not kernel.write(fh, offset, b"w" * size).error
            storage.data[:] = bytes(END)
        assert seen and not any(b"M" in pages for pages in seen)


def test_pages_that_moved():
    """Goal: a slow request goes on in the fresh pages that a command gets when a backend keeps the old ones.
    Method: quarantine the pages between the read and the write of a read-modify-write, then scribble on the old ones."""
    storage = MemoryStorage(SECTORS)
    storage.data[:1024] = b"o" * 1024
    with Machine({"g": {"xvda": storage}}) as machine:
        front, kernel = machine.front("g", "xvda"), machine.kernel
        fh = kernel.handle(DISK, os.O_RDWR)
        complete = front.on_complete

        def move(command):
            old = command.view
            assert not command.revoke(front.domain), "our backend keeps its mappings"
            command.quarantine(front.domain)
            command.grant(front.domain, front.peer_domid)
            old[:] = b"?" * len(old)
            front.on_complete = complete
            complete(command)

        front.on_complete = move
        assert not kernel.write(fh, 510, b"new").error
    assert storage.data[:1024] == b"o" * 510 + b"new" + b"o" * 511


def test_gone():
    """Goal: a disk that is unplugged while it is open answers EIO, and leaves the tree.  Method: detach, then ask all."""
    storage = MemoryStorage(SECTORS)
    with Machine({"g": {"xvda": storage}}) as machine:
        kernel = machine.kernel
        fh = kernel.handle(DISK, os.O_RDWR)
        machine.world.toolstack.detach_disk(1, 51712)
        machine.world.settle()
        assert "xvda" not in kernel.names("domains/1/dev")
        for reply in (kernel.read(fh, 0, 512), kernel.read(fh, 1, 2), kernel.write(fh, 0, b"x" * 512), kernel.fsync(fh)):
            assert reply == Reply(errno.EIO, b"")
        assert machine.world.guests[1].probe.devices == {}


def test_going_is_told():
    """Goal: a disk that is gone while its guest goes on is announced, once; what goes with its guest, or at the end, is not.
    Method: one is detached, one loses its directory, one is left for the guest's end, one for that of all."""
    storages = {vdev: MemoryStorage(SECTORS) for vdev in ("xvda", "xvdb", "xvdc")}
    said: list[str] = []

    def told() -> list[str]:
        return [line for line in said if line.endswith(": gone")]

    with Machine({"g": storages, "h": {"xvda": MemoryStorage(SECTORS)}}) as machine:
        machine.world.announce = said.append
        machine.world.toolstack.detach_disk(1, 51712)
        machine.world.settle()
        assert told() == ["g xvda: gone"]
        machine.world.toolstack.client.rm("/local/domain/1/device/vbd/51728")
        machine.world.settle()
        assert told() == ["g xvda: gone", "g xvdb: gone"]
        machine.world.destroy(1)
        machine.world.settle()
        assert machine.kernel.names("domains") == [".", "..", "0", "2", "h"]
    assert told() == ["g xvda: gone", "g xvdb: gone"]


def test_destroyed():
    """Goal: a disk of a domain that is destroyed while the disk is open answers EIO.  Method: destroy, then ask all."""
    with Machine({"g": {"xvda": MemoryStorage(SECTORS)}, "h": {"xvda": MemoryStorage(SECTORS)}}) as machine:
        kernel = machine.kernel
        fh, other = kernel.handle(DISK, os.O_RDWR), kernel.handle("domains/2/dev/xvda", os.O_RDWR)
        assert not kernel.write(fh, 0, b"x" * 512).error
        machine.world.destroy(1)
        for reply in (kernel.read(fh, 0, 512), kernel.read(fh, 1, 2), kernel.write(fh, 0, b"x" * 512), kernel.fsync(fh)):
            assert reply == Reply(errno.EIO, b"")
        assert not kernel.write(other, 0, b"y" * 512).error
        assert kernel.names("domains") == [".", "..", "0", "2", "h"]


def test_geometry_is_the_backends():
    """Goal: the node's facts come through the store.  Method: inspect/vbd of a disk with 4096-byte sectors."""
    with Machine({"g": {"xvda": MemoryStorage(SECTORS, 4096)}}) as machine:
        facts = dict(line.split(" ", 1) for line in machine.kernel.text("domains/1/inspect/vbd/xvda").splitlines())
        assert facts["sectors"] == str(SECTORS) and facts["sector-size"] == "4096" and facts["state"] == "Connected"
        assert machine.front("g", "xvda").state is XenbusState.Connected
