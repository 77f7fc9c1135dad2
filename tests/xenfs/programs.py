"""Processes whose memory and mappings the tests of caller.py look at."""

from __future__ import annotations

import ast
import mmap
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

PAGE = mmap.PAGESIZE

PROGRAM = """
import ctypes, os, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
RW, SHARED, PRIVATE, FIXED, ANON = 3, 1, 2, 16, 32
PAGE = os.sysconf("SC_PAGE_SIZE")
def pages(count): return libc.mmap(None, count * PAGE, RW, PRIVATE | ANON, -1, 0)
def shared(fd, offset, count, at=None):
    return libc.mmap(at, count * PAGE, RW, SHARED | (FIXED if at else 0), fd, offset * PAGE)
def memfd(count):
    fd = os.memfd_create("shared")
    os.truncate(fd, count * PAGE)
    return fd
def identity(fd): return os.fstat(fd).st_dev, os.fstat(fd).st_ino
keep = []
for line in sys.stdin:
    print(repr(eval(line)), flush=True)
"""


class Program:
    """A process that evaluates expressions; SIGKILL at the end."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=-1, stdout=-1, text=True)
        self.pid = self.process.pid

    def __call__(self, expression: str) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(expression, file=self.process.stdin, flush=True)
        return ast.literal_eval(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def refused(call: Callable[[], object]) -> OSError:
    with pytest.raises(OSError) as caught:
        call()
    return caught.value
