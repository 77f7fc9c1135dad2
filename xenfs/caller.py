"""caller.py (edge): the memory of the process that waits in an ioctl of ours.

Used by the nodes of /dev/xen: Linux declares Xen's ioctls _IOC_NONE, so FUSE hands over the number, the pointer and the
caller's thread id, and the struct has to be fetched with process_vm_readv(2). `pid` is that thread id everywhere here.

Invariants: all bytes or an error, never a short transfer. Every failure is an OSError with a sentence: EFAULT for a bad
pointer, also a partly bad one (what lies before the bad page may have been transferred, as with copy_to_user); EPERM if
the host does not let us; ESRCH for a pid namespace that is not ours (pid 0) and for a process that has ended. Each kind is
logged once. Cost is bounded by the lengths, which the nodes bound, and for memory maps by MAPS_BYTES_MAX
and LOOK_BYTES_MAX.

Hazard: a page that is not in memory is fetched by whoever serves it, and meanwhile we wait. In a mapping of one of our own
files (a disk; not the pages of gntdev, which are a memfd's) that is ourselves, for ever. So what a program may point to
anywhere is fetched in a thread (calls.py): all here may be called there but read() and write(), which share one buffer.
Left out: pidfds. The system calls know numbers only: a killed caller is confused with who gets his number at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import signal
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from sysdev.steps import Caller

log = logging.getLogger("xenfs.caller")

IOV_MAX = os.sysconf("SC_IOV_MAX")
SMALL_BYTES = 4096  # what goes through the buffer that is there already
MAPS_BYTES_MAX = 32 << 20  # 65530 mappings (vm.max_map_count) with names of 400 bytes
LOOK_BYTES_MAX = 8 << 20  # of all the maps that one look at many processes reads
MAPS_PIECE_BYTES = 65536
STATUS_BYTES = 1024  # of /proc/PID/status: Name (at most 64 characters, escaped) and Tgid are among the first lines
_STAT_SIGNAL = 31 - 3  # of /proc/PID/task/PID/stat: what is pending for the thread, counted from after its name
COMM_MAX = 15  # TASK_COMM_LEN without its NUL

PROCMAP_QUERY = 0xC0686611  # <linux/fs.h>: _IOWR('f', 17, struct procmap_query), Linux 6.11
# struct procmap_query: size flags address; then out: start end flags page_size offset inode major minor; four that stay 0
_QUERY = struct.Struct("=9Q4I2Q")


class Vma(NamedTuple):
    """A mapping of a file: addresses from `start` to `end`, and the file's offset at `start`, in bytes."""

    start: int
    end: int
    offset: int


_libc = ctypes.CDLL(None, use_errno=True)
_Call = Callable[..., int]
_readv: _Call = _libc.process_vm_readv
_writev: _Call = _libc.process_vm_writev
for _call in (_libc.process_vm_readv, _libc.process_vm_writev):
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]

# The small path makes no objects. An iovec is two words, address and length; ctypes cuts what is larger than a word.
_BUFFER = ctypes.create_string_buffer(SMALL_BYTES)
_small = memoryview(_BUFFER).cast("B")
_LOCAL, _REMOTE = (ctypes.c_size_t * 2)(ctypes.addressof(_BUFFER), 0), (ctypes.c_size_t * 2)(0, 0)
_LOCAL_AT, _REMOTE_AT = ctypes.addressof(_LOCAL), ctypes.addressof(_REMOTE)
_SAID: set[str] = set()  # kinds of failures that were logged


# -- memory ----------------------------------------------------------------------------------------


def read(pid: int, address: int, length: int) -> bytes:
    """`length` bytes at `address`; nothing is looked at for 0."""
    if length > SMALL_BYTES:
        data = bytearray(length)
        transfer_in(pid, [(address, memoryview(data))])
        return bytes(data)
    _REMOTE[0] = address
    _REMOTE[1] = _LOCAL[1] = length
    if length and (done := _readv(pid, _LOCAL_AT, 1, _REMOTE_AT, 1, 0)) != length:
        raise _failure(pid, _errno_of(done), f"{length} bytes at {address:#x} cannot be read")
    return _small[:length].tobytes()


def write(pid: int, address: int, data: bytes) -> None:
    """Put `data` at `address`."""
    length = len(data)
    if length > SMALL_BYTES:
        transfer_out(pid, [(memoryview(data), address)])
        return
    _small[:length] = data
    _REMOTE[0] = address
    _REMOTE[1] = _LOCAL[1] = length
    if length and (done := _writev(pid, _LOCAL_AT, 1, _REMOTE_AT, 1, 0)) != length:
        raise _failure(pid, _errno_of(done), f"{length} bytes at {address:#x} cannot be written")


def transfer_in(pid: int, pieces: Sequence[tuple[int, memoryview]]) -> None:
    """Fill each (writable, contiguous) view from the caller's address. At EFAULT some of them may have been filled."""
    _transfer(_readv, "read", pid, pieces)


def transfer_out(pid: int, pieces: Sequence[tuple[memoryview, int]]) -> None:
    """Put what each (contiguous) view holds at the caller's address. At EFAULT some of it may be there."""
    # ctypes tells no address of what is read-only: copy that
    _transfer(_writev, "written", pid, [(at, memoryview(bytearray(v)) if v.readonly else v) for v, at in pieces])


def _transfer(call: _Call, done_to: str, pid: int, pieces: Sequence[tuple[int, memoryview]]) -> None:
    for first in range(0, len(pieces), IOV_MAX):
        local: list[int] = []
        remote: list[int] = []
        for address, view in pieces[first : first + IOV_MAX]:
            if size := view.nbytes:
                local += ctypes.addressof(ctypes.c_char.from_buffer(view)), size  # stays there: `pieces` has the view
                remote += address, size
        words, count, total = ctypes.c_size_t * len(local), len(local) // 2, sum(local[1::2])
        if total and (done := call(pid, words(*local), count, words(*remote), count, 0)) != total:
            where = f"in {count} pieces, first at {remote[0]:#x}," if count > 1 else f"at {remote[0]:#x}"
            raise _failure(pid, _errno_of(done), f"{total} bytes {where} cannot be {done_to}")


def _errno_of(done: int) -> int:
    return ctypes.get_errno() if done < 0 else errno.EFAULT  # short: the kernel stopped in front of a bad page


# -- names -----------------------------------------------------------------------------------------


def look(pid: int) -> Caller:
    """Who a thread is; ?[pid] if it is gone. Takes a while if the process likes: /proc/PID/status has its 65536 groups."""
    try:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as file:
            lines = file.read(STATUS_BYTES).split(b"\n")  # the kernel writes a newline in a name as \n
    except OSError:
        return Caller(pid, f"?[{pid}]", False)
    fields = dict(line.split(b":\t", 1) for line in lines if b":\t" in line)
    tgid = int(fields[b"Tgid"])
    return Caller(tgid, f"{_printable(fields[b'Name'])}[{tgid}]", _is_near(pid))


def _is_near(pid: int) -> bool:
    """Is it in our pid namespace? A process stays in its own for life."""
    try:
        return os.path.samestat(os.stat(f"/proc/{pid}/ns/pid"), os.stat("/proc/self/ns/pid"))
    except OSError:  # gone, or not ours to look at
        return False


def killed(pid: int) -> bool:
    """Has the thread a SIGKILL that it has not died of yet, or is it gone?"""
    try:
        with open(f"/proc/{pid}/task/{pid}/stat", "rb", buffering=0) as file:
            fields = file.read(STATUS_BYTES).rpartition(b")")[2].split()
    except OSError:
        return True
    return len(fields) <= _STAT_SIGNAL or bool(int(fields[_STAT_SIGNAL]) >> (signal.SIGKILL - 1) & 1)


def _comm(pid: int) -> str:
    """comm[pid] for messages: what can be told of a thread at no cost."""
    try:
        with open(f"/proc/{pid}/comm", "rb", buffering=0) as file:
            return f"{_printable(file.read(STATUS_BYTES)[:-1])}[{pid}]"
    except OSError:
        return f"?[{pid}]"


def _printable(name: bytes) -> str:
    return "".join(chr(byte) if 0x20 < byte < 0x7F else "?" for byte in name[:COMM_MAX])


# -- mappings --------------------------------------------------------------------------------------


class Budget:
    """How many bytes of memory maps may still be read."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left


def pages_mapped(pids: Iterable[int], device: int, inode: int, offsets: Sequence[int]) -> set[int]:
    """Which of some pages of a file (offsets, ascending) these processes map. Those that are gone, or not ours to look at,
    map nothing; if their maps are longer together than LOOK_BYTES_MAX, any page may be mapped."""
    found: set[int] = set()
    budget = Budget(LOOK_BYTES_MAX)
    for pid in pids:
        try:
            vmas = mapped(pid, device, inode, budget)
        except OSError as error:
            if error.errno == errno.EFBIG:
                return set(offsets)
            continue
        done = 0  # a process may map the same pages very often
        for start, end, offset in sorted(vmas, key=lambda vma: vma.offset):
            behind = offset + end - start
            found.update(offsets[bisect_left(offsets, max(offset, done)) : bisect_left(offsets, behind)])
            done = max(behind, done)
    return found


def mapped(pid: int, device: int, inode: int, budget: Budget | None = None) -> list[Vma]:
    """Where a file (st_dev and st_ino) is mapped, ascending. The kernel may have merged mappings that lie side by side.

    ESRCH, not an empty list, when the thread has ended, a process's first one, too: others may live, and the mappings with
    them. EFBIG: there are too many."""
    wanted, found = _identity(device, inode), []
    with _maps(pid) as fd:
        for lines in _pieces(fd, budget):
            for line in lines.split(b"\n") if wanted in lines else ():  # (in a name, too: the fields decide)
                vma, identity = _parsed(line)
                if identity == wanted:
                    found.append(vma)
    return found


def mapping_at(pid: int, va: int, device: int, inode: int) -> Vma | None:
    """The mapping of that file that covers `va`; None if there is none, or another file's."""
    with _maps(pid) as fd:
        try:
            query = bytearray(_QUERY.size)
            _QUERY.pack_into(query, 0, _QUERY.size, 0, va, *[0] * 12)
            fcntl.ioctl(fd, PROCMAP_QUERY, query)
        except OSError as error:
            if error.errno == errno.ENOTTY:  # Linux before 6.11
                return _mapping_in_text(fd, va, device, inode)
            if error.errno == errno.ENOENT:
                return None
            raise
    start, end, _, _, offset, its_inode, major, minor = _QUERY.unpack(query)[3:11]
    if (major, minor, its_inode) != (os.major(device), os.minor(device), inode):
        return None
    return Vma(start, end, offset)


def _mapping_in_text(fd: int, va: int, device: int, inode: int) -> Vma | None:
    for lines in _pieces(fd):
        for line in lines.split(b"\n"):
            vma, identity = _parsed(line)
            if va < vma.end:
                return vma if va >= vma.start and identity == _identity(device, inode) else None
    return None


def _identity(device: int, inode: int) -> bytes:
    return b"%02x:%02x %d" % (os.major(device), os.minor(device), inode)


def _parsed(line: bytes) -> tuple[Vma, bytes]:
    """proc_pid_maps(5): addresses, permissions, offset, and then the file: device, inode, perhaps a name."""
    addresses, _, offset, device, inode = line.split(None, 5)[:5]
    start, _, end = addresses.partition(b"-")
    return Vma(int(start, 16), int(end, 16), int(offset, 16)), b"%b %b" % (device, inode)


def _pieces(fd: int, budget: Budget | None = None) -> Iterator[bytes]:
    """Whole lines of a memory map. Split at b"\\n" only: the names of files are the caller's, and may hold a b"\\r"."""
    rest, zombie = b"", True
    budget = budget or Budget(MAPS_BYTES_MAX)
    while piece := os.read(fd, MAPS_PIECE_BYTES):
        zombie = False
        budget.left -= len(piece)
        if budget.left < 0:  # mappings can also be made faster than we read
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        lines, newline, rest = (rest + piece).rpartition(b"\n")
        if newline:
            yield lines
    if zombie:  # nothing at all. Its other threads may live
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))


@contextlib.contextmanager
def _maps(pid: int) -> Iterator[int]:
    try:
        with open(f"/proc/{pid}/maps", "rb", buffering=0) as file:
            yield file.fileno()
    except OSError as error:
        known = {errno.ENOENT: errno.ESRCH, errno.EACCES: errno.EPERM}
        code = known.get(error.errno or 0, error.errno or errno.EIO)
        raise _failure(pid, code, f"its memory map cannot be read: {os.strerror(code)}") from error


# -- failures --------------------------------------------------------------------------------------


def _failure(pid: int, code: int, what: str) -> OSError:
    """The error to raise, logged if it is the first of its kind. A warning is for what the user has to change."""
    who, level, kind = _comm(pid), logging.INFO, errno.errorcode.get(code, str(code))
    text = f"{who}: {what}"
    if code == errno.EPERM:
        level = logging.WARNING
        why = "another user, a user namespace, or kernel.yama.ptrace_scope"
        text = f"xenfs may not reach the memory of {who} ({why}): run the program as the user of xenfs, or xenfs as root"
    elif code == errno.ESRCH and pid == 0:
        level, kind = logging.WARNING, "unseen"
        text = "a caller is in a pid namespace that xenfs cannot see: run xenfs outside, or the program in xenfs's own"
    elif code == errno.ESRCH:
        text = f"{who} has ended"
    if kind not in _SAID:
        _SAID.add(kind)
        log.log(level, "%s (said once)", text)
    return OSError(code, text)
