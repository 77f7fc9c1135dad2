"""Goal: where the host cannot map a frame elsewhere, nothing has changed, and what is elsewhere can still come home.
Method: limits that the kernel sets, in processes of their own; what is no file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xenmodel.memory import GuestMemory, OutOfMemory

REPOSITORY = Path(__file__).resolve().parents[2]

CHILD = """
import os, resource, sys
from xenmodel.memory import Frame, GuestMemory, OutOfMemory, vmap
from xenmodel.types import PAGE_SIZE
memory = GuestMemory(2048)
fd = os.memfd_create("elsewhere")
os.ftruncate(fd, 4096 * PAGE_SIZE)
memory.view[:] = bytes(range(256)) * (len(memory.view) // 256)
window = vmap([Frame(memory, 9), Frame(memory, 3)])
memory.move(0, 8, fd, 0)
before = memory.view.tobytes()
def tight(limit):
    for line in open("/proc/self/status"):
        if line.startswith("VmSize"):
            resource.setrlimit(resource.RLIMIT_AS, (int(line.split()[1]) * 1024 + limit, resource.RLIM_INFINITY))
def same():
    assert memory.view == before
    assert window == before[9 * PAGE_SIZE:10 * PAGE_SIZE] + before[3 * PAGE_SIZE:4 * PAGE_SIZE]
    window[0] ^= 1
    assert memory.view[9 * PAGE_SIZE] == window[0] == before[0] ^ 1
    window[0] ^= 1
"""


def child(rest: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CHILD + rest], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_room_to_move():
    """Goal: OutOfMemory with the reason, and nothing changed; the way home is open even then, for who could not move all
    has to undo the rest.  Method: RLIMIT_AS in a process of its own, below what a second mapping takes."""
    out = child("""
tight(2 << 20)
try:
    memory.move(1000, 1024, fd, 1000 * PAGE_SIZE)
except OutOfMemory as error:
    print(error)
assert not any(memory.is_away(pfn) for pfn in range(8, 2048))
same()
memory.move(8, 8, fd, 8 * PAGE_SIZE)  # there is room for that
tight(0)
memory.bring_home(0, 16)
same()
assert os.pread(memory.fd, PAGE_SIZE, 3 * PAGE_SIZE) == before[3 * PAGE_SIZE:4 * PAGE_SIZE]
""")
    assert out == "a guest frame cannot be mapped: Cannot allocate memory\n"


def test_no_more_mappings():
    """Goal: at vm.max_map_count a frame that would cut a mapping in two stays, and those that are away come home.
    Method: as many mappings as the host allows, by protecting every second page of a large one."""
    out = child("""
import ctypes, mmap
most = int(open("/proc/sys/vm/max_map_count").read())
libc = ctypes.CDLL(None, use_errno=True)
filler = mmap.mmap(-1, (most + 100) * PAGE_SIZE)
base = ctypes.addressof(ctypes.c_char.from_buffer(filler))
at = 1
while libc.mprotect(ctypes.c_void_p(base + at * PAGE_SIZE), PAGE_SIZE, 1) == 0:
    at += 2
try:
    memory.move(1000, 1, fd, 1000 * PAGE_SIZE)
except OutOfMemory as error:
    print(error)
assert not memory.is_away(1000)
memory.bring_home(0, 8)
same()
""")
    assert out == "a guest frame cannot be mapped: Cannot allocate memory\n"


def test_a_place_that_is_none():
    """Goal: a bad descriptor is an error like any other.  Method: closed, not to be mapped, at an odd offset."""
    memory, (end, other) = GuestMemory(4), os.pipe()
    memory.view[:] = content = os.urandom(len(memory.view))
    cases = [(end, 0), (10**6, 0), (memory.fd, 100)]
    for fd, offset in cases:
        with pytest.raises(OutOfMemory, match="cannot be mapped"):
            memory.move(2, 2, fd, offset)
    os.close(end)
    os.close(other)
    assert memory.view == content and not memory.is_away(2)
    memory.close()
