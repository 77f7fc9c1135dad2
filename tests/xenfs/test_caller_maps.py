"""Goal: the mappings of a file in another process are found, all of them and no others, whatever that process does with its
memory map and the names in it.
Method: real processes that map memfds and files where the test asks for it."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.xenfs.programs import PAGE, Program, refused
from xenfs import caller
from xenfs.caller import Vma

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def program() -> Iterator[Program]:
    made = Program()
    yield made
    made.close()


@pytest.fixture
def programs() -> Iterator[Callable[[int], list[Program]]]:
    made: list[Program] = []

    def make(count: int) -> list[Program]:
        made.extend(Program() for _ in range(count))
        return made

    yield make
    for one in made:
        one.close()


def test_several_mappings(program):
    """Goal: all mappings of a file and no others, with their offsets, though it has no name any more.
    Method: a memfd mapped three times, another one between; addresses in, at the edges of and beside them."""
    fd, other = program("memfd(8)"), program("memfd(8)")
    file, stranger = program(f"identity({fd})"), program(f"identity({other})")
    base = program("pages(16)")
    for at, offset, count in [(1, 0, 2), (5, 4, 1), (8, 4, 3)]:
        program(f"shared({fd}, {offset}, {count}, {base + at * PAGE})")
    program(f"shared({other}, 0, 2, {base + 6 * PAGE})")
    expected = [
        Vma(base + at * PAGE, base + end * PAGE, offset * PAGE) for at, end, offset in [(1, 3, 0), (5, 6, 4), (8, 11, 4)]
    ]
    assert caller.mapped(program.pid, *file) == expected
    for page in range(16):
        for va in (base + page * PAGE, base + page * PAGE + 1234, base + (page + 1) * PAGE - 1):
            (covering, *_) = [vma for vma in expected if vma.start <= va < vma.end] or [None]
            assert caller.mapping_at(program.pid, va, *file) == covering
    assert caller.mapping_at(program.pid, base + 6 * PAGE, *stranger) == (base + 6 * PAGE, base + 8 * PAGE, 0)
    for va in (0, 1 << 47, (1 << 64) - 1):
        assert caller.mapping_at(program.pid, va, *file) is None
    assert caller.mapped(program.pid, file[0], file[1] + stranger[1]) == []
    assert caller.mapped(program.pid, file[0] + 1, file[1]) == []
    program(f"libc.munmap({base}, 16 * PAGE)")
    assert caller.mapped(program.pid, *file) == []


def test_merged(program):
    """Goal: what the kernel merges is one mapping, as documented; what it cannot merge is not.
    Method: pages side by side with following offsets, and with others."""
    fd = program("memfd(8)")
    file, base = program(f"identity({fd})"), program("pages(4)")
    for page, offset in enumerate([2, 3, 6, 4]):
        program(f"shared({fd}, {offset}, 1, {base + page * PAGE})")
    merged = Vma(base, base + 2 * PAGE, 2 * PAGE)
    assert caller.mapped(program.pid, *file) == [
        merged,
        Vma(base + 2 * PAGE, base + 3 * PAGE, 6 * PAGE),
        Vma(base + 3 * PAGE, base + 4 * PAGE, 4 * PAGE),
    ]
    assert caller.mapping_at(program.pid, base + PAGE, *file) == merged


def test_names_of_files(program, tmp_path):
    """Goal: a file's name cannot pass for a mapping of another file, nor hide one.
    Method: mapped files whose names look like lines of the map; one is deleted."""
    fd = program("memfd(1)")
    device, inode = program(f"identity({fd})")
    base = program(f"shared({fd}, 0, 1)")
    line = f"7f0000000000-7f0000001000 rw-s 00000000 {os.major(device):02x}:{os.minor(device):02x} {inode} "
    for name in (line, f"a\r{line}", f"a\n{line}", f"{line}\n", f" (deleted)\v\f\x1c\x85{line}"):
        path = tmp_path / name
        path.write_bytes(bytes(PAGE))
        its = program(f"os.open({str(path)!r}, os.O_RDWR)")
        at = program(f"shared({its}, 0, 1)")
        assert caller.mapped(program.pid, *program(f"identity({its})")) == [(at, at + PAGE, 0)]
        path.unlink()
        assert caller.mapped(program.pid, *program(f"identity({its})")) == [(at, at + PAGE, 0)]
    assert caller.mapped(program.pid, device, inode) == [(base, base + PAGE, 0)]


def test_very_many_mappings(program, monkeypatch):
    """Goal: a long memory map is read to its end, and no further than the limit.
    Method: 20000 mappings that do not merge; then a limit below the length of their list."""
    fd = program("memfd(2)")
    file, base = program(f"identity({fd})"), program("pages(20_000)")
    program(f"[shared({fd}, 0, 1, {base} + i * PAGE) for i in range(20_000)].clear()")
    assert caller.mapped(program.pid, *file) == [(base + i * PAGE, base + (i + 1) * PAGE, 0) for i in range(20_000)]
    assert caller.mapping_at(program.pid, base + 19_999 * PAGE + 5, *file) == (base + 19_999 * PAGE, base + 20_000 * PAGE, 0)
    monkeypatch.setattr(caller, "MAPS_PIECE_BYTES", 1001)  # lines come in parts
    assert len(caller.mapped(program.pid, *file)) == 20_000
    monkeypatch.setattr(caller, "MAPS_BYTES_MAX", 1 << 20)
    error = refused(lambda: caller.mapped(program.pid, *file))
    assert error.errno == errno.EFBIG and "memory map cannot be read: File too large" in error.strerror


def test_one_look_at_many_processes(program, programs, monkeypatch):
    """Goal: what many processes map is found; if their maps are too long together, each page may be mapped, and no more is
    read; a process that is gone maps nothing and costs nothing.
    Method: one that maps pages in many places, three with many other mappings; limits about the length of all their maps;
    what is read is counted."""
    ended, *others = programs(4)
    ended.close()
    fd = program("memfd(8)")
    file, base = program(f"identity({fd})"), program("pages(600)")
    program(f"[shared({fd}, 1 + i % 3, 3, {base} + 3 * i * PAGE) for i in range(200)].clear()")
    for other in others:
        at = other("pages(1000)")
        other(f"[libc.mprotect({at} + i * PAGE, PAGE, 1) for i in range(0, 1000, 2)].clear()")
    pids = (ended.pid, *(other.pid for other in others), program.pid)
    lengths = [len(Path(f"/proc/{pid}/maps").read_bytes()) for pid in pids[1:]]
    offsets = [page * PAGE for page in (0, 1, 2, 3, 5, 6, 7)]
    count, read = 0, os.read

    def counted(fd: int, size: int) -> bytes:
        nonlocal count
        data = read(fd, size)
        count += len(data)
        return data

    monkeypatch.setattr(os, "read", counted)
    assert caller.pages_mapped(pids, *file, offsets) == set(offsets[1:5]) and count == sum(lengths)
    assert caller.pages_mapped(pids[:-1], *file, offsets) == caller.pages_mapped(pids, *file, offsets[:1]) == set()
    monkeypatch.setattr(caller, "LOOK_BYTES_MAX", sum(lengths))
    assert caller.pages_mapped(pids, *file, offsets) == set(offsets[1:5])
    for most in (sum(lengths) - 1, lengths[0] + lengths[1] // 2, 0):
        monkeypatch.setattr(caller, "LOOK_BYTES_MAX", most)
        count = 0
        assert caller.pages_mapped(pids, *file, offsets) == set(offsets)
        assert most < count <= most + caller.MAPS_PIECE_BYTES


OLDER = """
import ast, ctypes, fcntl, os, platform, struct, sys
from xenfs import caller
# seccomp(2): ioctl(PROCMAP_QUERY) answers ENOTTY, as before Linux 6.11; all else is allowed
number = {"x86_64": 16, "aarch64": 29}[platform.machine()]
code = [(0x20, 0, 0, 0), (0x15, 0, 3, number), (0x20, 0, 0, 24), (0x15, 0, 1, caller.PROCMAP_QUERY),
        (0x06, 0, 0, 0x00050000 | 25), (0x06, 0, 0, 0x7FFF0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
header = ctypes.create_string_buffer(struct.pack("@HP", len(code), ctypes.addressof(program)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, header, 0, 0) == 0, os.strerror(ctypes.get_errno())
try:
    fcntl.ioctl(os.open("/proc/self/maps", os.O_RDONLY), caller.PROCMAP_QUERY, bytes(104))
except OSError as error:
    print(error.errno)
pid, addresses, device, inode = ast.literal_eval(sys.argv[1])
print([found and tuple(found) for found in (caller.mapping_at(pid, va, device, inode) for va in addresses)])
"""


def test_older_kernel(program):
    """Goal: without PROCMAP_QUERY the answers are the same.  Method: a reader whose seccomp filter denies it that ioctl."""
    fd, other = program("memfd(8)"), program("memfd(8)")
    file, base = program(f"identity({fd})"), program("pages(12)")
    for at, offset, which in [(1, 0, fd), (2, 1, fd), (4, 1, other), (5, 1, fd), (8, 7, fd)]:
        program(f"shared({which}, {offset}, 1, {base + at * PAGE})")
    for hole in (7, 9):
        program(f"libc.munmap({base + hole * PAGE}, PAGE)")
    edges = [base + page * PAGE + more for page in range(13) for more in (-1, 0, 1)]
    addresses = [0, *edges, 1 << 47, (1 << 64) - 1]
    expected = [caller.mapping_at(program.pid, va, *file) for va in addresses]
    assert len(set(expected)) == 4  # three, and None
    done = subprocess.run(
        [sys.executable, "-c", OLDER, repr((program.pid, addresses, *file))],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stderr == ""
    denied, found = done.stdout.splitlines()
    assert int(denied) == errno.ENOTTY
    assert ast.literal_eval(found) == expected
