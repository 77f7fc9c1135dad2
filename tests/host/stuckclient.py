"""A client of dev/xen whose memory is not there until somebody else provides it, and that never touches it itself before.

    stuckclient.py MEMORY USER DEVICES OPERATION DOMID REF

MEMORY is a file, of which a page is fetched by whoever serves it, or `userfaultfd`: then nobody does until a line comes on
stdin. USER is the uid and gid that it becomes, after it has mapped the file. DEVICES is a domain's dev/xen; REF a page that
DOMID has granted to it. Says `ready` when it is about to call ioctl(2), in a thread, and then what that returned, an errno's
name or a number, and what GRANT_COPY has left: statuses and data.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
import threading

PAGE = 4096
AT, PAGES = 0x7_0000_0000, 16  # where its memory is
# What is in it, each in a page of its own. In a file these are at the same places.
HYPERCALL, EVTCHN, MAP, COPY, SEGMENTS, SOURCE, TARGET = (AT + i * PAGE for i in range(7))
LENGTH = 64  # of what is copied
DEVICE = {"privcmd": "privcmd", "evtchn": "evtchn"}  # the others: gntdev
CALLS = {
    "privcmd": (0x00305000, HYPERCALL),
    "evtchn": (0x00044502, EVTCHN),
    "map": (0x00184700, MAP),
    "copy": (0x00104708, COPY),
}
_MMAP = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_RW, _PRIVATE, _ANONYMOUS, _FIXED_NOREPLACE, _RANDOM = 3, 2, 0x20, 0x100000, 1
_USERFAULTFD, _API, _REGISTER, _ZEROPAGE = 323, 0xC018AA3F, 0xC020AA00, 0xC020AA04
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes, _libc.mmap.restype = _MMAP, ctypes.c_void_p
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


def segments(domid: int, ref: int, which: str = "both") -> bytes:
    """LENGTH bytes of ours to the beginning of the granted page, and what is behind them there to us."""
    first, second = (struct.pack("<IHH", ref, offset, domid) for offset in (0, LENGTH))
    into = struct.pack("<Q8sHHhxx", SOURCE, first, LENGTH, 2, 99)
    out = struct.pack("<8sQHHhxx", second, TARGET, LENGTH, 1, 99)
    return {"both": into + out, "in": into, "out": out}[which]


def content(domid: int, ref: int, data: bytes) -> bytes:
    """The file: structures for all calls that succeed. `ref` is what `domid` has granted."""
    pages = [
        struct.pack("<6Q", 17, 0, 0, 0, 0, 0),  # xen_version
        struct.pack("<I", 0),  # a port for domain 0
        struct.pack("<I4xQII", 1, 0, domid, ref),
        struct.pack("<I4xQ", 2, SEGMENTS),
        segments(domid, ref),
        data,
    ]
    return b"".join(page.ljust(PAGE, b"\0") for page in pages).ljust(PAGES * PAGE, b"\0")


def _checked(result: int) -> int:
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _map(fd: int) -> None:
    flags = _PRIVATE | _FIXED_NOREPLACE | (_ANONYMOUS if fd < 0 else 0)
    assert _libc.mmap(AT, PAGES * PAGE, _RW, flags, fd, 0) == AT, os.strerror(ctypes.get_errno())


def map_file(path: str) -> None:
    """None of it may be in the page cache, nor come there before somebody touches it."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    _map(fd)
    _checked(_libc.madvise(AT, PAGES * PAGE, _RANDOM))
    present = ctypes.create_string_buffer(PAGES)
    _checked(_libc.mincore(AT, PAGES * PAGE, present))
    assert not any(present.raw[:PAGES]), f"pages of {path} are there already: {present.raw.hex()}"


def register() -> int:
    """The userfaultfd of the memory."""
    _map(-1)
    fd = _checked(_libc.syscall(_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK))
    _checked(_libc.ioctl(fd, _API, struct.pack("<3Q", 0xAA, 0, 0)))
    _checked(_libc.ioctl(fd, _REGISTER, struct.pack("<4Q", AT, PAGES * PAGE, 1, 0)))
    return fd


def become(user: int) -> None:
    if user != os.getuid():
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)


def call(devices: str, operation: str, domid: int, ref: int) -> None:
    """`copy-in`, `copy-out` and `copy-both`: only the data is in that memory, the structures are in our own."""
    number, address = CALLS[operation.partition("-")[0]]
    table = ctypes.create_string_buffer(segments(domid, ref, operation[5:]) if operation.startswith("copy-") else b"")
    count = len(table.raw) // 24
    own = ctypes.create_string_buffer(struct.pack("<I4xQ", count, ctypes.addressof(table)))
    fd = os.open(f"{devices}/{DEVICE.get(operation, 'gntdev')}", os.O_RDWR)
    print("ready", flush=True)
    result = _libc.ioctl(fd, number, ctypes.addressof(own) if count else address)
    said = errno.errorcode[ctypes.get_errno()] if result < 0 else str(result)
    if result >= 0 and operation.startswith("copy"):
        raw = table.raw if count else ctypes.string_at(SEGMENTS, 48)
        said += "".join(f" {fields[4]}" for fields in struct.iter_unpack("<QQHHhxx", raw[: len(raw) // 24 * 24]))
        said += f" {ctypes.string_at(TARGET, 4).hex()}"
    print(said, flush=True)


def main(memory: str, user: str, devices: str, operation: str, domid: str, ref: str) -> None:
    fd = -1
    if memory == "userfaultfd":
        fd = register()
    else:
        map_file(memory)
    become(int(user))
    caller = threading.Thread(target=call, args=(devices, operation, int(domid), int(ref)))
    caller.start()
    if sys.stdin.readline() and fd >= 0:
        _checked(_libc.ioctl(fd, _ZEROPAGE, struct.pack("<4Qq", AT, PAGES * PAGE, 0, 0, 0)[:32]))
    caller.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
