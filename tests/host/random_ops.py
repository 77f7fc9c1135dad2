"""A client for test_random_ops: `random_ops DISK SEED COUNT` does the same random operations to a disk and a bytearray.

Buffered and O_DIRECT descriptors and a shared mapping of the same file are used by turns; every read is compared, and the
whole disk at the end. The operations so far are printed if one differs. Like Apple's and LTP's fsx.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import sys
from collections.abc import Callable

KEEP, PUNCH, ZERO = 0x01, 0x02, 0x10
MOST = 200_000
LAST_SHOWN = 25

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Exerciser:
    def __init__(self, path: str, seed: int) -> None:
        self.choose = random.Random(seed)
        self.buffered = os.open(path, os.O_RDWR)
        self.direct = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.size = os.fstat(self.buffered).st_size
        self.mapped = mmap.mmap(self.buffered, self.size)
        self.expected = bytearray(os.pread(self.buffered, self.size, 0))
        self.room = mmap.mmap(-1, 1 << 20)  # aligned, for O_DIRECT
        self.log: list[str] = []

    def range(self, unit: int) -> tuple[int, int]:
        """An offset and a length in units; often small, often at the end, always inside."""
        length = self.choose.choice([unit, 4096, 8192, self.choose.randrange(1, MOST)]) // unit * unit or unit
        offset = min(self.choose.randrange(self.size), self.size - length) // unit * unit
        return offset, length

    def descriptor(self) -> tuple[int, int]:
        """One of the two, and the unit for it: O_DIRECT on FUSE need not be aligned, but often is."""
        return self.choose.choice([(self.buffered, 1), (self.direct, 512), (self.direct, 1)])

    def compare(self, got: bytes, offset: int, what: str) -> None:
        wanted = self.expected[offset : offset + len(got)]
        if got != wanted:
            at = next(i for i, (one, other) in enumerate(zip(got, wanted, strict=True)) if one != other)
            differing = sum(one != other for one, other in zip(got, wanted, strict=True))
            print(*self.log[-LAST_SHOWN:], sep="\n")
            raise SystemExit(f"{what}: {differing} bytes differ, first at {offset + at}, operation {len(self.log)}")

    def write(self) -> None:
        fd, unit = self.descriptor()
        offset, length = self.range(unit)
        data = self.choose.randbytes(length)
        self.log.append(f"write {'direct' if fd == self.direct else 'buffered'} {offset} {length}")
        self.room[:length] = data
        assert os.pwritev(fd, [memoryview(self.room)[:length]], offset) == length
        self.expected[offset : offset + length] = data

    def read(self) -> None:
        fd, unit = self.descriptor()
        offset, length = self.range(unit)
        self.log.append(f"read {'direct' if fd == self.direct else 'buffered'} {offset} {length}")
        assert os.preadv(fd, [memoryview(self.room)[:length]], offset) == length
        self.compare(self.room[:length], offset, "read")

    def write_mapped(self) -> None:
        offset, length = self.range(1)
        self.log.append(f"write mapped {offset} {length}")
        self.mapped[offset : offset + length] = data = self.choose.randbytes(length)
        self.expected[offset : offset + length] = data
        if self.choose.random() < 0.5:
            self.mapped.flush()

    def read_mapped(self) -> None:
        offset, length = self.range(1)
        self.log.append(f"read mapped {offset} {length}")
        self.compare(self.mapped[offset : offset + length], offset, "read mapped")

    def zero(self) -> None:
        offset, length = self.range(self.choose.choice([1, 512, 4096]))
        mode = self.choose.choice([PUNCH | KEEP, ZERO, ZERO | KEEP])
        self.log.append(f"fallocate {mode:#x} {offset} {length}")
        if libc.fallocate(self.buffered, mode, offset, length):
            raise OSError(ctypes.get_errno(), "fallocate")
        self.expected[offset : offset + length] = bytes(length)

    def sync(self) -> None:
        self.log.append("sync")
        self.choose.choice([os.fsync, os.fdatasync])(self.choose.choice([self.buffered, self.direct]))

    def run(self, count: int) -> None:
        operations: list[Callable[[], None]] = [
            self.write, self.write, self.write, self.read, self.read, self.write_mapped, self.read_mapped, self.zero,
            self.sync,
        ]  # fmt: skip
        for _ in range(count):
            self.choose.choice(operations)()
        for fd in (self.buffered, self.direct):
            self.compare(os.pread(fd, self.size, 0), 0, "the end")
        self.mapped.flush()
        os.fsync(self.buffered)


if __name__ == "__main__":
    exerciser = Exerciser(sys.argv[1], int(sys.argv[2]))
    exerciser.run(int(sys.argv[3]))
    sys.stdout.flush()
    os.write(1, b"%d operations\n" % len(exerciser.log))
    with open(sys.argv[4], "wb") as expected:
        expected.write(exerciser.expected)
