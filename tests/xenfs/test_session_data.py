"""Goal: the data of WRITE arrives whole and lands only where it may; directories are listed whole at any pace.
Method: raw requests into a Session over nodes whose landing pages stand for two guests' memory."""

from __future__ import annotations

import errno
import random

import pytest

from tests.xenfs.machine import KIB, MIB, Kernel, Reply
from tests.xenfs.test_session import Paper, forget
from xenfs.fuse import kernel as k
from xenfs.fuse.tree import Directory, refuse

SIZES = [0, 1, 511, 4096, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, MIB - 1, MIB]


class Guests:
    """Two disks of two guests, `mine` was written last: its pages are where the next data lands."""

    def __init__(self) -> None:
        self.mine, self.theirs = Paper(pages=True), Paper(pages=True)
        self.kernel = Kernel(Directory({"mine": self.mine, "theirs": self.theirs}))
        self.mine_fh, self.theirs_fh = self.kernel.handle("mine"), self.kernel.handle("theirs")
        assert not self.kernel.write(self.mine_fh, 0, b"").error
        self.kernel.session.buffers()
        assert self.kernel.session.landing is self.mine.pages

    def is_clean(self, paper: Paper) -> bool:
        assert paper.pages is not None
        return not any(bytes(page).strip(b"\0") for page in paper.pages)


@pytest.fixture
def guests() -> Guests:
    return Guests()


@pytest.mark.parametrize("size", SIZES)
def test_written_data(guests, size):
    """Goal: a write of any size reaches its node byte for byte, the right guess and the wrong one.
    Method: random data to the disk that was written last, then to the other, then back."""
    data = random.Random(size).randbytes(size)
    for paper, fh in ((guests.mine, guests.mine_fh), (guests.theirs, guests.theirs_fh), (guests.mine, guests.mine_fh)):
        assert guests.kernel.write(fh, 512, data) == Reply(0, k.WRITE_OUT.pack(size, 0))
        assert paper.written[-1] == (512, data)


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("error", [None, errno.ENOSPC])
def test_anothers_data_is_wiped(guests, size, error):
    """Goal: what was meant for another guest's disk does not stay in this guest's memory, even if it was refused.
    Method: write to the disk that was not written last, look at the pages of the one that was."""
    guests.theirs.error = refuse(error) if error else None
    assert guests.kernel.write(guests.theirs_fh, 0, b"\xee" * size).error == (error or 0)
    assert guests.is_clean(guests.mine)


LONG_BODIES = [
    (k.FUSE_LOOKUP, b"n" * 255 + b"\0"),
    (k.FUSE_SETATTR, b"\xff" * k.SETATTR_IN.size),
    (k.FUSE_BATCH_FORGET, forget(*[(2**64 - 1, 2**64 - 1)] * 5)),
    (k.FUSE_BATCH_FORGET, forget(*[(2**64 - 1, 2**64 - 1)] * 40_000)),
    (k.FUSE_SETXATTR, b"\xff" * (200 * KIB)),
    (4711, b"\xff" * MIB),
]


@pytest.mark.parametrize(("opcode", "body"), LONG_BODIES, ids=lambda value: str(value)[:6])
def test_long_bodies_are_wiped(guests, opcode, body):
    """Goal: requests other than WRITE leave nothing in a guest's pages, and are read whole.
    Method: bodies that run past the header buffer, and past the first 64 KiB, while the pages are in the buffers."""
    guests.kernel.send(opcode, k.FUSE_ROOT_ID, body)
    assert guests.is_clean(guests.mine)


def test_batch_forget_that_lands_in_pages(guests):
    """Goal: a body that went through a guest's pages is still understood.  Method: FORGET 1000 of 1001 lookups."""
    for _ in range(1001):
        ino = guests.kernel.walk("theirs")
    guests.kernel.send(k.FUSE_BATCH_FORGET, 0, forget(*[(ino, 1)] * 1001))  # one was made by open
    assert guests.theirs.links == 1


@pytest.mark.parametrize(("claims", "sent"), [(100, 99), (100, 101), (0, 1), (2**32 - 1, 5)])
def test_length_that_lies(guests, claims, sent):
    """Goal: a WRITE of another length than it says changes nothing.  Method: one byte less, one more, and nonsense."""
    body = k.WRITE_IN.pack(guests.mine_fh, 0, claims, 0, 0, 0, 0)
    before = len(guests.mine.written)
    assert guests.kernel.call(k.FUSE_WRITE, 0, body, bytes(sent)) == Reply(errno.EIO, b"")
    assert len(guests.mine.written) == before


def test_pages_are_let_go(guests):
    """Goal: after the last release of a disk no request lands in its pages.  Method: release, then the buffers."""
    session = guests.kernel.session
    guests.kernel.call(k.FUSE_RELEASE, 0, k.RELEASE_IN.pack(guests.mine_fh, 0, 0, 0))
    session.buffers()
    assert session.landing is not guests.mine.pages and session.landing is not guests.theirs.pages


# --- directories -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3000])
@pytest.mark.parametrize("room", [32, 100, 4096, MIB])
def test_readdir_pages(count, room):
    """Goal: a listing in any number of pieces has every name once, in order.  Method: from one entry a piece to all."""
    names = [f"{i}" for i in range(count)]
    kernel = Kernel(Directory({name: Paper() for name in names}))
    if room == 32 and count > 1:
        names = names[:50]
        kernel = Kernel(Directory({name: Paper() for name in names}))
    assert kernel.names("", room) == [".", "..", *names]


def test_readdir_room_for_none():
    """Goal: an entry that does not fit is not cut.  Method: a room smaller than one entry, then one that fits it."""
    kernel = Kernel(Directory({"n" * 100: Paper()}))
    fh = k.OPEN_OUT.unpack(kernel.call(k.FUSE_OPENDIR, k.FUSE_ROOT_ID, bytes(8)).data)[0]
    need = len(k.pack_dirent(1, 1, 0, b"n" * 100))
    for room, length in ((need - 1, 0), (need, need)):
        assert len(kernel.call(k.FUSE_READDIR, 1, k.READ_IN.pack(fh, 2, room, 0, 0, 0, 0)).data) == length


def test_listing_is_of_one_moment():
    """Goal: offsets stay true while the directory changes.  Method: remove and add between two READDIRs."""
    root = Directory({name: Paper() for name in "abcd"})
    kernel = Kernel(root)
    fh = k.OPEN_OUT.unpack(kernel.call(k.FUSE_OPENDIR, k.FUSE_ROOT_ID, bytes(8)).data)[0]
    first = kernel.call(k.FUSE_READDIR, 1, k.READ_IN.pack(fh, 0, 32 * 3, 0, 0, 0, 0)).data
    root.remove("a")
    root.remove("c")
    root.add("e", Paper())
    rest = kernel.call(k.FUSE_READDIR, 1, k.READ_IN.pack(fh, 3, 4096, 0, 0, 0, 0)).data
    seen = first + rest
    assert [seen[at + k.DIRENT.size :][:1] for at in range(0, len(seen), 32)] == [b".", b".", b"a", b"b", b"c", b"d"]
    assert kernel.names("") == [".", "..", "b", "d", "e"]


def test_entries_have_their_type():
    """Goal: d_type is the node's, and no entry has inode 0, which readers skip.  Method: before and after a LOOKUP."""
    kernel = Kernel(Directory({"d": Directory(), "f": Paper()}))
    for _ in range(2):
        fh = k.OPEN_OUT.unpack(kernel.call(k.FUSE_OPENDIR, k.FUSE_ROOT_ID, bytes(8)).data)[0]
        data = kernel.call(k.FUSE_READDIR, 1, k.READ_IN.pack(fh, 0, 4096, 0, 0, 0, 0)).data
        entries = [k.DIRENT.unpack_from(data, at) for at in range(0, len(data), 32)]
        assert [kind for _, _, _, kind in entries] == [k.DT_DIR, k.DT_DIR, k.DT_DIR, k.DT_REG]
        assert all(ino for ino, *_ in entries)
        kernel.walk("f")
    assert entries[3][0] == kernel.walk("f")


def test_opendir_of_a_file():
    """Goal: only directories are listed.  Method: OPENDIR of a file."""
    kernel = Kernel(Directory({"f": Paper()}))
    assert kernel.call(k.FUSE_OPENDIR, kernel.walk("f"), bytes(8)).error == errno.ENOTDIR
