"""Goal: fallocate on a disk is what blkdev_fallocate() does: holes and zeroes to the byte, never beside them.
Method: FUSE FALLOCATE requests into a node over a storage that counts what it is asked; bytes are compared."""

from __future__ import annotations

import errno
import os
import random

import pytest

from blockdev.storage import DelayedStorage, FaultyStorage, MemoryStorage
from tests.xenfs.machine import MIB, Machine, Reply
from xenmodel.public.io.blkif import BLKIF_RSP_EOPNOTSUPP

DISK = "domains/1/dev/xvda"
SECTORS = 8192
END = SECTORS * 512
KEEP, PUNCH, ZERO = 0x01, 0x02, 0x10
HOLE = PUNCH | KEEP


class Counting(MemoryStorage):
    """Remembers discards, whose granularity is the file system's: coarser than a sector."""

    def __init__(self, sector_size: int = 512, granularity: int = 4096) -> None:
        super().__init__(SECTORS, sector_size)
        self.discard_granularity = granularity
        self.discards: list[tuple[int, int]] = []

    def discard(self, offset, length, request):
        self.discards.append((offset, length))
        return super().discard(offset, length, request)


# offset, length, what of it the storage is asked to discard (granules of 4096)
RANGES = [
    (0, 4096, (0, 4096)),
    (0, END, (0, END)),
    (4096, MIB, (4096, MIB)),
    (1, 4095, None),
    (0, 4095, None),
    (1, 8191, (4096, 4096)),
    (4095, 4098, (4096, 4096)),
    (100, 3 * MIB, (4096, 3 * MIB - 4096)),
    (512, 512, None),
    (700, 1, None),
    (511, 2, None),
    (END - 4097, 4097, (END - 4096, 4096)),
    (END - 1, 1, None),
]


@pytest.mark.parametrize("sector_size", [512, 4096])
@pytest.mark.parametrize("mode", [HOLE, ZERO, ZERO | KEEP])
@pytest.mark.parametrize(("offset", "length", "discarded"), RANGES)
def test_zeroes_to_the_byte(sector_size, mode, offset, length, discarded):
    """Goal: exactly the range reads as zeroes; of a hole the whole granules are discarded, of a zero range none.
    Method: random content, one request with even or ragged ends, everything compared."""
    storage = Counting(sector_size)
    storage.data[:] = random.Random(offset).randbytes(END).replace(b"\0", b"\1")
    expected = bytearray(storage.data)
    expected[offset : offset + length] = bytes(length)
    with Machine({"g": {"xvda": storage}}) as machine:
        fh = machine.kernel.handle(DISK, os.O_RDWR)
        assert machine.kernel.fallocate(fh, offset, length, mode) == Reply(0, b"")
        assert storage.data == expected
        assert machine.kernel.read(fh, max(0, offset - 1), 3).data == expected[max(0, offset - 1) :][:3]
    assert storage.discards == ([discarded] if discarded and mode == HOLE else [])


REFUSED = [
    (0, 4096, 0, errno.EOPNOTSUPP),
    (0, 4096, KEEP, errno.EOPNOTSUPP),
    (0, 4096, 0x08, errno.EOPNOTSUPP),  # collapse
    (0, 4096, 0x20 | KEEP, errno.EOPNOTSUPP),  # insert
    (0, 4096, PUNCH, errno.EOPNOTSUPP),  # Linux refuses it without KEEP_SIZE before we see it
    (END, 4096, HOLE, errno.EINVAL),
    (END, 4096, ZERO, errno.EINVAL),
    (END - 4096, 8192, ZERO, errno.EINVAL),
    (2**63, 1, HOLE, errno.EINVAL),
]


@pytest.mark.parametrize(("offset", "length", "mode", "error"), REFUSED)
def test_refused(offset, length, mode, error):
    """Goal: other modes are not supported; ranges outside the disk are invalid.  Method: one case each."""
    storage = Counting()
    storage.data[:] = b"o" * END
    with Machine({"g": {"xvda": storage}}) as machine:
        fh = machine.kernel.handle(DISK, os.O_RDWR)
        assert machine.kernel.fallocate(fh, offset, length, mode) == Reply(error, b"")
    assert storage.data == b"o" * END


@pytest.mark.parametrize("mode", [HOLE, ZERO | KEEP])
def test_cut_at_the_end(mode):
    """Goal: with KEEP_SIZE a range may reach past the end, and means what is inside.  Method: one that does."""
    storage = Counting()
    storage.data[:] = b"o" * END
    with Machine({"g": {"xvda": storage}}) as machine:
        fh = machine.kernel.handle(DISK, os.O_RDWR)
        assert not machine.kernel.fallocate(fh, END - 5000, 2**40, mode).error
    assert storage.data == b"o" * (END - 5000) + bytes(5000)


@pytest.mark.parametrize(("extra", "granularity"), [(",no-discard", 4096), ("", 0)])
def test_no_discard(extra, granularity):
    """Goal: a disk without discard has no holes but can be zeroed.  Method: by configuration, and by its storage."""
    storage = Counting(granularity=granularity)
    storage.data[:] = b"o" * END
    with Machine({"g": {"xvda": storage}}, extra) as machine:
        fh = machine.kernel.handle(DISK, os.O_RDWR)
        assert machine.kernel.fallocate(fh, 0, 8192, HOLE).error == errno.EOPNOTSUPP
        assert storage.data == b"o" * END
        assert not machine.kernel.fallocate(fh, 0, 8192, ZERO).error
    assert storage.data[:8193] == bytes(8192) + b"o"


def test_discard_that_turns_out_impossible():
    """Goal: the medium's EOPNOTSUPP reaches the caller, who then knows; the disk goes on.
    Method: a storage that offers discard and then refuses it."""

    class Liar(Counting):
        def discard(self, offset, length, request):
            return BLKIF_RSP_EOPNOTSUPP

    storage = Liar()
    with Machine({"g": {"xvda": storage}}) as machine:
        fh = machine.kernel.handle(DISK, os.O_RDWR)
        for _ in range(50):
            assert machine.kernel.fallocate(fh, 0, 8192, HOLE).error == errno.EOPNOTSUPP
        assert not machine.kernel.write(fh, 0, b"on").error


@pytest.mark.parametrize("broken", ["read", "write", "discard"])
def test_errors_on_the_way(broken):
    """Goal: whichever step of a ragged hole fails, the caller gets EIO and the range is free again.
    Method: fail reads, writes or discards; then punch once more without."""
    failing = [broken]
    storage = FaultyStorage(Counting(), lambda operation: operation in failing)
    with Machine({"g": {"xvda": storage}}) as machine:
        fh = machine.kernel.handle(DISK, os.O_RDWR)
        assert machine.kernel.fallocate(fh, 100, 20_000, HOLE) == Reply(errno.EIO, b"")
        failing.clear()
        assert machine.kernel.fallocate(fh, 100, 20_000, HOLE) == Reply(0, b"")


def test_writes_wait_for_a_hole():
    """Goal: a write into a range that is being punched is not lost.  Method: the storage would do the write first."""
    memory = Counting()
    storage = DelayedStorage(memory)
    with Machine({"g": {"xvda": storage}}) as machine:
        kernel = machine.kernel
        fh = kernel.handle(DISK, os.O_RDWR)
        hole = kernel.send_fallocate(fh, 0, MIB, HOLE)
        kernel.settle()
        write = kernel.send_write(fh, 8192, b"w" * 4096)
        while storage.held:
            storage.release(lambda count: count - 1)
            kernel.settle()
        assert kernel.order[-2:] == [hole, write]
    assert memory.data[8192 : 8192 + 4097] == b"w" * 4096 + b"\0"
