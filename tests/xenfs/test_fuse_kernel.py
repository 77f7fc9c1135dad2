"""Goal: what session.py takes from kernel.py means what the kernel means by it.
Method: a request recorded from Linux 6.18, entries parsed back as fs/fuse/readdir.c walks them, cases.

The numbers and layouts themselves are compared with the C header in tests/abi/test_fuse_header.py.
"""

from __future__ import annotations

import errno
import os
import stat
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenfs.fuse import kernel

INIT_REQUEST = bytes.fromhex(  # the first thing /dev/fuse gave after a mount on Linux 6.18
    "68000000 1a000000 0200000000000000 0000000000000000 00000000 00000000 00000000 0000 0000"
    "07000000 2d000000 00000200 fbffff73 fd050000" + 11 * "00000000"
)

SIZES = [(b"a", 32), (b"1234567", 32), (b"12345678", 32), (b"123456789", 40), (b"x" * 1024, 1048)]

names = st.binary(min_size=1, max_size=kernel.FUSE_NAME_MAX).filter(lambda name: not set(name) & set(b"/\0"))


def test_recorded_init_request():
    """Goal: a real FUSE_INIT decodes to what that kernel can do.
    Method: the recorded bytes, header and body one after the other, to the last byte."""
    header = kernel.IN_HEADER.unpack_from(INIT_REQUEST)
    assert header == (len(INIT_REQUEST), kernel.FUSE_INIT, 2, 0, 0, 0, 0, 0, 0)
    major, minor, max_readahead, low, high = kernel.INIT_IN.unpack_from(INIT_REQUEST, kernel.IN_HEADER.size)
    assert (major, minor, max_readahead) == (7, 45, 128 * 1024)
    assert kernel.IN_HEADER.size + kernel.INIT_IN.size == len(INIT_REQUEST)
    flags = kernel.join_init_flags(low, high)
    for name in ("ASYNC_DIO", "MAX_PAGES", "INIT_EXT", "DIRECT_IO_ALLOW_MMAP", "PASSTHROUGH"):
        assert flags & getattr(kernel, f"FUSE_{name}"), name
    assert not flags & kernel.FUSE_OVER_IO_URING  # fuse.enable_uring was off
    assert kernel.split_init_flags(flags) == (low, high)


@pytest.mark.parametrize(
    ("low", "high", "flags"),
    [
        (0, 0, 0),
        (kernel.FUSE_ASYNC_READ, 0, kernel.FUSE_ASYNC_READ),
        (kernel.FUSE_INIT_EXT, 1 << 5, kernel.FUSE_INIT_EXT | kernel.FUSE_PASSTHROUGH),
        (kernel.FUSE_ASYNC_READ, 0xFFFFFFFF, kernel.FUSE_ASYNC_READ),  # no INIT_EXT: flags2 is noise
    ],
)
def test_join_init_flags(low, high, flags):
    """Goal: the high half counts only when the sender says so.  Method: cases."""
    assert kernel.join_init_flags(low, high) == flags


def test_opcode_names():
    """Goal: every opcode has a name for messages, and nothing else has.
    Method: the values are the header's enumeration, which has two holes."""
    assert set(kernel.OPCODE_NAMES) == set(range(1, 54)) - {7, 19}
    for opcode, name in kernel.OPCODE_NAMES.items():
        assert getattr(kernel, f"FUSE_{name}") == opcode
    with pytest.raises(TypeError):
        kernel.OPCODE_NAMES[1] = "changed"


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_dirent_sizes(name, size):
    """Goal: a record is padded to the next 8 bytes, not further.  Method: lengths around the boundary."""
    assert len(kernel.pack_dirent(1, 1, kernel.DT_REG, name)) == size


u64 = st.integers(0, 2**64 - 1)


@given(st.lists(st.tuples(u64, u64, st.integers(0, 15), names), max_size=9))
def test_dirents_parse_back(entries):
    """Goal: the kernel finds every entry of a listing.
    Method: walk the joined records as parse_dirfile does: header, name, next multiple of 8."""
    listing = b"".join(kernel.pack_dirent(*entry) for entry in entries)
    found, position = [], 0
    while position + kernel.DIRENT.size <= len(listing):
        ino, offset, length, kind = kernel.DIRENT.unpack_from(listing, position)
        start = position + kernel.DIRENT.size
        found.append((ino, offset, kind, listing[start : start + length]))
        position = (start + length + 7) // 8 * 8
    assert found == entries
    assert position == len(listing)


@given(name=names, nodeid=u64)
def test_direntplus_is_an_entry_and_a_dirent(name, nodeid):
    """Goal: READDIRPLUS carries the lookup's answer before the entry.  Method: unpack as one structure."""
    entry = kernel.ENTRY_OUT.pack(nodeid, 3, 1, 1, 0, 0, *range(16))
    record = kernel.pack_direntplus(entry, 5, 6, kernel.DT_DIR, name)
    fields = kernel.DIRENTPLUS.unpack_from(record)
    assert fields == (nodeid, 3, 1, 1, 0, 0, *range(16), 5, 6, len(name), kernel.DT_DIR)
    assert record[kernel.DIRENTPLUS.size :].rstrip(b"\0") == name.rstrip(b"\0")
    assert len(record) % 8 == 0 and len(record) - kernel.DIRENTPLUS.size - len(name) < 8


@pytest.mark.parametrize("name", [b"", b"a/b", b"/", b"a\0b", b"x" * 1025], ids=repr)
def test_names_that_would_spoil_a_listing(name):
    """Goal: one bad name is an error here, not EIO for everybody who lists.  Method: each reason once."""
    with pytest.raises(ValueError, match="not a file name"):
        kernel.pack_dirent(1, 1, kernel.DT_REG, name)
    with pytest.raises(ValueError, match="not a file name"):
        kernel.pack_direntplus(bytes(kernel.ENTRY_OUT.size), 1, 1, kernel.DT_REG, name)


@pytest.mark.parametrize("kind", ["CHR", "DIR", "BLK", "REG", "LNK", "SOCK"])
def test_directory_types_are_mode_bits(kind):
    """Goal: `st_mode >> 12` is a valid entry type.  Method: Python's own S_IF constants."""
    assert getattr(kernel, f"DT_{kind}") == getattr(stat, f"S_IF{kind}") >> 12


def test_structures_keep_64_bit_alignment():
    """Goal: no structure lost a field: fuse.h pads each for 32-bit servers.
    Method: sizes; the one exception is the header's own."""
    odd = {name for name, value in vars(kernel).items() if isinstance(value, struct.Struct) and value.size % 8}
    assert odd == {"REMOVEMAPPING_IN"}
    assert all(value.format[0] == "<" for value in vars(kernel).values() if isinstance(value, struct.Struct))


def test_out_header_carries_a_negative_errno():
    """Goal: an error goes out with its sign.  Method: the bytes as a C program would read them."""
    reply = kernel.OUT_HEADER.pack(kernel.OUT_HEADER.size, -errno.ENOSYS, 2**63 + 7)
    assert struct.unpack("=IiQ", reply) == (16, -errno.ENOSYS, 2**63 + 7)
    assert os.strerror(-struct.unpack_from("=i", reply, 4)[0]) == "Function not implemented"
