"""gntdev.py: dev/xen/gntdev, the file of sysdev/gntdev.py and gntcopy.py, with the ioctls of Linux's and FreeBSD's headers.

mmap(2) of it goes to the arena, which the kernel does without asking us (FUSE_PASSTHROUGH); index in the structures is an
offset there. FreeBSD's gntdev also does what gntalloc does on Linux, so this open can do both.

Linux's structures lie in the caller's memory; FreeBSD's come and go with the request, but for the arrays they point to.
Left out: reading and writing (EINVAL), DMABUF_*.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable, Mapping, Sequence
from struct import Struct

from sysdev.gntalloc import Gntalloc
from sysdev.gntcopy import SEGMENT, STATUS, STATUS_AT, copy
from sysdev.gntdev import REFS_MOST, Gntdev
from sysdev.steps import Job, MapAt, Maps, Read, Write
from xenfs.arena import Arena
from xenfs.calls import Callers, DomainCalls, Result
from xenfs.fuse import kernel as k
from xenfs.fuse.session import Session
from xenfs.fuse.tree import Change, Ioctl, Node, Opened, refuse
from xenfs.places import SIZE
from xenmodel.types import PAGE_SIZE
from xenmodel.xenstore.perms import CONTROL_DOMAIN

OPENS_MOST = 256  # of a domain; domain 0 has no such limit
PIDS_MOST = 64  # processes of one open that are asked what they map
SEGMENTS_MOST = 64 * 1024  # of one GRANT_COPY
_SIZE_T = 8

_COUNT_INDEX = Struct("<I4xQ")  # MAP: count, index (out); behind it the refs, or with FreeBSD a pointer to them
_INDEX_COUNT = Struct("<QI4x")
_REF = Struct("<II")
_VADDR = Struct("<QQI4x")  # vaddr; offset, count (out)
_NOTIFY = Struct("<QII")  # index action port
_COPY = Struct("<I4xQ")  # count, pointer to the segments
_ALLOC = Struct("<HHIQ")  # domid flags count, index (out); behind it the refs, or with FreeBSD a pointer to where they go
_POINTER = Struct("<Q")


class GrantNode(Node):
    """gntdev or gntalloc of one domain: they differ in the ioctls they have."""

    mode = stat.S_IFREG | 0o600

    def __init__(
        self, gntdev: Gntdev, gntalloc: Gntalloc, arena: Arena, calls: DomainCalls, commands: Mapping[int, Command]
    ) -> None:
        self.gntdev, self.gntalloc = gntdev, gntalloc
        self.arena = arena
        self.calls = calls
        self.stopped = False
        self.files: set[GrantFile] = set()
        self.on_close: Callable[[], None] = lambda: None  # a process may still map something
        self.commands = commands

    @property
    def size(self) -> int:
        """That of what is mapped: some programs (Python's mmap) look, for it is a regular file."""
        return SIZE

    @property
    def blocks(self) -> int:
        return 0

    def open(self, flags: int) -> Opened:
        if self.stopped:
            raise refuse(errno.ENODEV)
        if self.calls.domid != CONTROL_DOMAIN and len(self.files) >= OPENS_MOST:
            raise refuse(errno.ENFILE)
        if not self.arena.backing_id:
            return Opened(GrantFile(self), k.FOPEN_DIRECT_IO)
        return Opened(GrantFile(self), k.FOPEN_DIRECT_IO | k.FOPEN_PASSTHROUGH, self.arena.backing_id)

    def setattr(self, change: Change) -> None:
        """Programs open devices with O_TRUNC, and nothing comes of it."""
        if not change.valid & k.FATTR_SIZE or change.valid & (k.FATTR_MODE | k.FATTR_UID | k.FATTR_GID) or change.size:
            raise refuse(errno.EPERM)


class GrantFile(Node):
    """One open."""

    def __init__(self, node: GrantNode) -> None:
        self.node = node
        self.grants = node.gntdev.open()
        self.pages = node.gntalloc.open(self._look)
        self.pids: set[int] = set()  # who has allocated pages
        self.callers = Callers(node.calls)
        node.files.add(self)

    def interrupt(self, unique: int) -> bool:
        return self.node.calls.interrupt(unique)

    def ioctl(self, request: Ioctl) -> None:
        command = self.node.commands.get(request.command)
        if command is None:
            raise refuse(errno.ENOTTY)
        if self.node.stopped:
            raise refuse(errno.ENODEV)
        self.callers.run(request, command(self, request))

    def write(self, session: Session, unique: int, offset: int, size: int, flags: int) -> None:
        raise refuse(errno.EINVAL)

    def setattr(self, change: Change) -> None:
        self.node.setattr(change)

    def release(self) -> None:
        self.node.files.discard(self)
        self.node.calls.run(None, self._close())

    def _close(self) -> Job[None]:
        yield from self.grants.close()
        yield from self.pages.close()
        self.node.arena.tidy()
        self.node.on_close()

    def _look(self, offsets: Sequence[int]) -> Job[set[int]]:
        found: set[int] = yield Maps(tuple(self.pids), self.node.arena.device, self.node.ino, offsets)
        return found

    def check_mappable(self) -> None:
        if not self.node.arena.backing_id:
            raise OSError(errno.EOPNOTSUPP, "nothing can be mapped: xenfs has no CAP_SYS_ADMIN")


Command = Callable[[GrantFile, Ioctl], Job[Result]]


def _structure(request: Ioctl, layout: Struct) -> Job[bytes]:
    """The caller's structure: what FUSE brought, else from its memory."""
    if len(request.data) >= layout.size:
        return request.data[: layout.size]
    data: bytes = yield Read(request.arg, layout.size)
    return data


def map_grant_ref(file: GrantFile, request: Ioctl) -> Job[Result]:
    count, _ = _COUNT_INDEX.unpack((yield from _structure(request, _COUNT_INDEX)))
    refs = yield from _refs(file, count, request.arg + _COUNT_INDEX.size)
    who = yield from file.callers.who(request.pid)
    index = yield from file.grants.map(refs, who.name)
    if index < 0:
        raise refuse(-index)
    try:
        yield Write(request.arg + 8, _POINTER.pack(index))
    except OSError:
        yield from file.grants.unmap(index, count)
        raise
    return 0


def map_grant_ref_freebsd(file: GrantFile, request: Ioctl) -> Job[Result]:
    if len(request.data) < _COUNT_INDEX.size + _SIZE_T:
        raise refuse(errno.EINVAL)
    count, _ = _COUNT_INDEX.unpack_from(request.data)
    refs = yield from _refs(file, count, _POINTER.unpack_from(request.data, _COUNT_INDEX.size)[0])
    who = yield from file.callers.who(request.pid)
    index = yield from file.grants.map(refs, who.name)
    if index < 0:
        raise refuse(-index)
    return 0, _COUNT_INDEX.pack(count, index) + request.data[_COUNT_INDEX.size :]


def _refs(file: GrantFile, count: int, address: int) -> Job[list[tuple[int, int]]]:
    file.check_mappable()
    if not 0 < count <= REFS_MOST:
        raise refuse(errno.EINVAL)
    return list(_REF.iter_unpack((yield Read(address, count * _REF.size))))


def unmap_grant_ref(file: GrantFile, request: Ioctl) -> Job[Result]:
    index, count = _INDEX_COUNT.unpack((yield from _structure(request, _INDEX_COUNT)))
    return (yield from _status(file.grants.unmap(index, count)))


def get_offset_for_vaddr(file: GrantFile, request: Ioctl) -> Job[Result]:
    vaddr, _, _ = _VADDR.unpack((yield from _structure(request, _VADDR)))
    offset = yield from _mapped_at(file, vaddr)
    found = file.grants.find(offset) if offset is not None else []
    if not found:
        raise refuse(errno.EINVAL)
    begin_here = sorted(one for one in found if one[0] == offset)
    index, count = (yield from _longest(file, vaddr, begin_here)) if begin_here else found[-1]
    reply = _VADDR.pack(vaddr, index, count)
    if request.out_size:
        return 0, reply
    yield Write(request.arg + 8, reply[8:20])
    return 0


def _mapped_at(file: GrantFile, vaddr: int) -> Job[int | None]:
    """The offset of the page that the caller has mapped there."""
    offset: int | None = yield MapAt(vaddr, file.node.arena.device, file.node.ino)
    return None if offset is None else offset & -PAGE_SIZE


def _longest(file: GrantFile, vaddr: int, maps: Sequence[tuple[int, int]]) -> Job[tuple[int, int]]:
    """Which of several maps of the same pages, ascending in count, an address belongs to: the longest that is all there."""
    low, high = 0, len(maps) - 1
    while low < high:
        middle = (low + high + 1) // 2
        index, count = maps[middle]
        last = (count - 1) * PAGE_SIZE
        if maps[low][1] == count or (yield from _mapped_at(file, vaddr + last)) == index + last:
            low = middle
        else:
            high = middle - 1
    return maps[low]


def set_max_grants(file: GrantFile, request: Ioctl) -> Job[Result]:
    """Linux has no such limit of an open any more, and says OK."""
    yield Read(request.arg, 4)
    return 0


def set_unmap_notify(file: GrantFile, request: Ioctl) -> Job[Result]:
    at, action, port = _NOTIFY.unpack((yield from _structure(request, _NOTIFY)))
    status = file.grants.set_unmap_notify(at, action, port)
    if status == -errno.ENOENT:  # with FreeBSD it may be a page of our own
        status = file.pages.set_unmap_notify(at, action, port)
    if status:
        raise refuse(-status)
    return 0


def grant_copy(file: GrantFile, request: Ioctl) -> Job[Result]:
    count, address = _COPY.unpack((yield from _structure(request, _COPY)))
    if count > SEGMENTS_MOST:
        raise refuse(errno.EINVAL)
    segments = bytearray((yield Read(address, count * SEGMENT.size)))
    statuses = yield from copy(file.node.gntdev.domain, bytes(segments))
    for at, status in zip(range(STATUS_AT, len(segments), SEGMENT.size), statuses, strict=True):
        STATUS.pack_into(segments, at, status)
    yield Write(address, bytes(segments))  # the rest of each is as it was
    return 0


def alloc_gref(file: GrantFile, request: Ioctl) -> Job[Result]:
    domid, flags, count, _ = _ALLOC.unpack((yield from _structure(request, _ALLOC)))
    return (yield from _alloc(file, request, (domid, flags, count), request.arg + _ALLOC.size, in_memory=True))


def alloc_gref_freebsd(file: GrantFile, request: Ioctl) -> Job[Result]:
    if len(request.data) < _ALLOC.size + _SIZE_T:
        raise refuse(errno.EINVAL)
    domid, flags, count, _ = _ALLOC.unpack_from(request.data)
    at = _POINTER.unpack_from(request.data, _ALLOC.size)[0]
    return (yield from _alloc(file, request, (domid, flags, count), at, in_memory=False))


def _alloc(file: GrantFile, request: Ioctl, what: tuple[int, int, int], refs_at: int, *, in_memory: bool) -> Job[Result]:
    file.check_mappable()
    if len(file.pids) < PIDS_MOST:
        file.pids.add((yield from file.callers.who(request.pid)).tgid)
    index, refs = yield from file.pages.alloc(*what)
    try:
        yield Write(refs_at, b"".join(ref.to_bytes(4, "little") for ref in refs))
        if in_memory:
            yield Write(request.arg + 8, _POINTER.pack(index))
    except OSError:
        yield from file.pages.dealloc(index, len(refs))
        raise
    return 0, _ALLOC.pack(*what, index) + request.data[_ALLOC.size :]


def dealloc_gref(file: GrantFile, request: Ioctl) -> Job[Result]:
    index, count = _INDEX_COUNT.unpack((yield from _structure(request, _INDEX_COUNT)))
    return (yield from _status(file.pages.dealloc(index, count)))


def _status(job: Job[int]) -> Job[Result]:
    status = yield from job
    if status < 0:
        raise refuse(-status)
    return status


_FREEBSD: dict[int, Command] = {  # _IOW as there, and as Linux's macros would have it
    0xC0184503: map_grant_ref_freebsd,
    0x80104504: unmap_grant_ref,
    0x40104504: unmap_grant_ref,
    0xC0184505: get_offset_for_vaddr,
    0x80104500: set_unmap_notify,
    0x40104500: set_unmap_notify,
    0xC0184501: alloc_gref_freebsd,
    0x80104502: dealloc_gref,
    0x40104502: dealloc_gref,
}
GNTDEV: dict[int, Command] = {
    0x00184700: map_grant_ref,
    0x00104701: unmap_grant_ref,
    0x00184702: get_offset_for_vaddr,
    0x00044703: set_max_grants,
    0x00104707: set_unmap_notify,
    0x00104708: grant_copy,
    **_FREEBSD,
}
GNTALLOC: dict[int, Command] = {
    0x00184705: alloc_gref,
    0x00104706: dealloc_gref,
    0x00104707: set_unmap_notify,
}
