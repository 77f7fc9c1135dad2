"""operations.py: what a Session does for each FUSE request but READ and WRITE: decode the body, ask the node, reply.

Called by session.py through OPCODES, with the unique, the node's number and what follows fuse_in_header. A body that is too
short raises StructError, which the session makes EINVAL; OSErrors of the nodes are the caller's.

Invariant: a handler answers a request once or raises, and does nothing that matters after it answered.
Left out: SYMLINK and LINK (the store has neither), locks (the kernel keeps them itself), LSEEK, BMAP, COPY_FILE_RANGE,
READDIRPLUS and STATX, for all of which it has other ways.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable
from struct import Struct
from typing import TYPE_CHECKING

from xenfs.fuse import kernel as k
from xenfs.fuse.tree import NAME_MAX, Change, Ioctl, Node

if TYPE_CHECKING:
    from xenfs.fuse.session import Session

MAX_WRITE = 1 << 20
READDIR_MOST = 8 * 1024  # some 250 names: of each its kind is looked up
# HANDLE_KILLPRIV_V2: no file here has set-id bits or capabilities to lose. Without it the kernel sends a GETXATTR of
# security.capability before every single write, since GETXATTR is answered.
# Not ATOMIC_O_TRUNC: the kernel would take a file as empty once it was opened with O_TRUNC, whatever we say, and throw away
# what others wrote to a disk through a mapping. So O_TRUNC is a SETATTR of the size, after OPEN and without the handle.
WANTED = (
    k.FUSE_ASYNC_READ | k.FUSE_BIG_WRITES | k.FUSE_ASYNC_DIO | k.FUSE_MAX_PAGES | k.FUSE_PARALLEL_DIROPS
    | k.FUSE_HANDLE_KILLPRIV_V2 | k.FUSE_INIT_EXT | k.FUSE_PASSTHROUGH
)  # fmt: skip
_SETXATTR_IN = Struct("<II")  # size flags: all that comes without FUSE_SETXATTR_EXT


def _name(body: bytes, start: int = 0) -> bytes:
    """The name that starts there and ends in NUL, or with the body."""
    name = body[start:].partition(b"\0")[0]
    if len(name) > NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, "name too long")
    return name


# --- the session itself ----------------------------------------------------------------------------------------------------


def init(session: Session, unique: int, ino: int, body: bytes) -> None:
    major, minor, readahead, flags = k.INIT_IN_SHORT.unpack_from(body)
    if major < 7:
        raise OSError(errno.EPROTO, "FUSE older than 7")
    if flags & k.FUSE_INIT_EXT and len(body) >= k.INIT_IN.size:
        flags |= k.INIT_IN.unpack_from(body)[4] << 32
    passthrough = bool(flags & k.FUSE_PASSTHROUGH)
    low, high = k.split_init_flags(flags & WANTED)
    reply = k.INIT_OUT.pack(
        7, min(minor, k.FUSE_KERNEL_MINOR_VERSION), readahead, low,
        128, 96,  # max_background, congestion_threshold: asynchronous direct I/O counts as background
        MAX_WRITE, 1, MAX_WRITE // 4096, 0, high, int(passthrough), 0,  # max_stack_depth: nothing stacked is behind it
    )  # fmt: skip
    session.send_data(unique, [reply])
    if passthrough:
        session.on_passthrough()  # the kernel takes backing files once it has the reply


def destroy(session: Session, unique: int, ino: int, body: bytes) -> None:
    session.send_ok(unique)


def statfs(session: Session, unique: int, ino: int, body: bytes) -> None:
    session.send_data(unique, [k.KSTATFS.pack(0, 0, 0, 0, 0, 4096, NAME_MAX, 4096, 0)])


def interrupt(session: Session, unique: int, ino: int, body: bytes) -> None:
    """Disk I/O on its way is not given up, as on any Linux block device; what only waits may be. No reply."""
    target = k.INTERRUPT_IN.unpack_from(body)[0]
    node = session.waiting.get(target)
    if node is not None:
        node.interrupt(target)


# --- names -----------------------------------------------------------------------------------------------------------------


def lookup(session: Session, unique: int, ino: int, body: bytes) -> None:
    child = session.node(ino).lookup(_name(body))
    if child is None:
        raise OSError(errno.ENOENT, "no such node")
    session.send_data(unique, [session.entry(child)])


def forget(session: Session, unique: int, ino: int, body: bytes) -> None:
    session.forget(ino, k.FORGET_IN.unpack_from(body)[0])


def batch_forget(session: Session, unique: int, ino: int, body: bytes) -> None:
    count, _ = k.BATCH_FORGET_IN.unpack_from(body)
    data = body[k.BATCH_FORGET_IN.size : k.BATCH_FORGET_IN.size + count * k.FORGET_ONE.size]
    for one, times in k.FORGET_ONE.iter_unpack(data):
        session.forget(one, times)


def create(session: Session, unique: int, ino: int, body: bytes) -> None:
    flags, mode, _, _ = k.CREATE_IN.unpack_from(body)
    child, opened = session.node(ino).create(_name(body, k.CREATE_IN.size), mode, flags)
    session.send_data(unique, [session.entry(child), session.opened(opened)])


def mknod(session: Session, unique: int, ino: int, body: bytes) -> None:
    """mknod(2) of a regular file: made and closed."""
    mode, *_ = k.MKNOD_IN.unpack_from(body)
    if not stat.S_ISREG(mode):
        raise OSError(errno.EPERM, "no device nodes, pipes and sockets")
    child, opened = session.node(ino).create(_name(body, k.MKNOD_IN.size), mode, os.O_WRONLY | os.O_EXCL)
    opened.handle.release()
    session.send_data(unique, [session.entry(child)])


def mkdir(session: Session, unique: int, ino: int, body: bytes) -> None:
    mode, _ = k.MKDIR_IN.unpack_from(body)
    child = session.node(ino).mkdir(_name(body, k.MKDIR_IN.size), mode)
    session.send_data(unique, [session.entry(child)])


def unlink(session: Session, unique: int, ino: int, body: bytes) -> None:
    session.node(ino).unlink(_name(body))
    session.send_ok(unique)


def rmdir(session: Session, unique: int, ino: int, body: bytes) -> None:
    session.node(ino).rmdir(_name(body))
    session.send_ok(unique)


def rename(session: Session, unique: int, ino: int, body: bytes) -> None:
    _rename(session, unique, ino, k.RENAME_IN.unpack_from(body)[0], body[k.RENAME_IN.size :])


def rename2(session: Session, unique: int, ino: int, body: bytes) -> None:
    """With RENAME_NOREPLACE or RENAME_EXCHANGE, which mv(1) asks for first."""
    _rename(session, unique, ino, k.RENAME2_IN.unpack_from(body)[0], body[k.RENAME2_IN.size :])


def _rename(session: Session, unique: int, ino: int, target: int, names: bytes) -> None:
    old = _name(names)
    session.node(ino).rename(old, session.node(target), _name(names, len(old) + 1))
    session.send_ok(unique)


def change_tree(session: Session, unique: int, ino: int, body: bytes) -> None:
    raise OSError(errno.EPERM, "no links are made by request")


# --- attributes ------------------------------------------------------------------------------------------------------------


def get_attributes(session: Session, unique: int, ino: int, body: bytes) -> None:
    node = session.node(ino)
    session.send_data(unique, [k.ATTR_OUT.pack(node.attr_timeout_s, 0, 0, *session.attributes(node))])


def set_attributes(session: Session, unique: int, ino: int, body: bytes) -> None:
    valid, _, fh, size, *_, mode, _, uid, gid, _ = k.SETATTR_IN.unpack_from(body)
    same = (not valid & k.FATTR_UID or uid == session.uid) and (not valid & k.FATTR_GID or gid == session.gid)
    node = session.node(ino)
    if valid & k.FATTR_FH:  # ftruncate(2): the open file has a say
        node = session.handles.get(fh, node)
    node.setattr(Change(valid, size, mode, same))
    get_attributes(session, unique, ino, body)


def readlink(session: Session, unique: int, ino: int, body: bytes) -> None:
    session.send_data(unique, [session.node(ino).readlink()])


def getxattr(session: Session, unique: int, ino: int, body: bytes) -> None:
    room, _ = k.GETXATTR_IN.unpack_from(body)
    _send_xattr(session, unique, room, session.node(ino).getxattr(_name(body, k.GETXATTR_IN.size)))


def listxattr(session: Session, unique: int, ino: int, body: bytes) -> None:
    room, _ = k.GETXATTR_IN.unpack_from(body)
    _send_xattr(session, unique, room, b"".join(name + b"\0" for name in session.node(ino).listxattr()))


def _send_xattr(session: Session, unique: int, room: int, value: bytes) -> None:
    if not room:
        session.send_data(unique, [k.GETXATTR_OUT.pack(len(value), 0)])
    elif len(value) > room:
        raise OSError(errno.ERANGE, "more than was asked for")
    else:
        session.send_data(unique, [value])


def setxattr(session: Session, unique: int, ino: int, body: bytes) -> None:
    size, flags = _SETXATTR_IN.unpack_from(body)
    name = _name(body, _SETXATTR_IN.size)
    start = _SETXATTR_IN.size + len(name) + 1
    if len(body) != start + size:
        raise OSError(errno.EINVAL, "a value of another length than it says")
    session.node(ino).setxattr(name, body[start:], flags)
    session.send_ok(unique)


def removexattr(session: Session, unique: int, ino: int, body: bytes) -> None:
    session.node(ino).removexattr(_name(body))
    session.send_ok(unique)


# --- open files ------------------------------------------------------------------------------------------------------------


def open_file(session: Session, unique: int, ino: int, body: bytes) -> None:
    flags, _ = k.OPEN_IN.unpack_from(body)
    session.send_data(unique, [session.opened(session.node(ino).open(flags))])


def release(session: Session, unique: int, ino: int, body: bytes) -> None:
    session.released(k.RELEASE_IN.unpack_from(body)[0])
    session.send_ok(unique)


def flush(session: Session, unique: int, ino: int, body: bytes) -> None:
    session.asked(unique, k.FLUSH_IN.unpack_from(body)[0]).flush(session, unique)


def fsync(session: Session, unique: int, ino: int, body: bytes) -> None:
    session.asked(unique, k.FSYNC_IN.unpack_from(body)[0]).fsync(session, unique)


def fallocate(session: Session, unique: int, ino: int, body: bytes) -> None:
    fh, offset, length, mode, _ = k.FALLOCATE_IN.unpack_from(body)
    session.asked(unique, fh).fallocate(session, unique, offset, length, mode)


def poll(session: Session, unique: int, ino: int, body: bytes) -> None:
    fh, kh, flags, _ = k.POLL_IN.unpack_from(body)
    revents = session.handles[fh].poll(session, kh, bool(flags & k.FUSE_POLL_SCHEDULE_NOTIFY))
    session.send_data(unique, [k.POLL_OUT.pack(revents, 0)])


def ioctl(session: Session, unique: int, ino: int, body: bytes) -> None:
    fh, flags, command, arg, in_size, out_size = k.IOCTL_IN.unpack_from(body)
    data = body[k.IOCTL_IN.size :]
    if flags & k.FUSE_IOCTL_DIR:
        raise OSError(errno.ENOTTY, "no ioctls of directories")
    if len(data) != in_size:
        raise OSError(errno.EINVAL, "an ioctl of another length than it says")
    _, _, _, _, uid, _, pid, _, _ = k.IN_HEADER.unpack_from(session.header)
    session.asked(unique, fh).ioctl(Ioctl(session, unique, pid, uid, command, arg, data, out_size))


# --- open directories ------------------------------------------------------------------------------------------------------


class Listing:
    """A directory as it was when it was opened, so that a reader sees one moment and offsets stay true.

    Entries are made when they are asked for: a directory may have many, and others are waiting.
    """

    def __init__(self, ino: int, entries: Iterable[tuple[bytes, Node]]) -> None:
        self._packed: list[bytes] = []
        self._rest = iter(entries)
        for name in (b".", b".."):
            self._add(ino, stat.S_IFDIR, name)

    def _add(self, ino: int, mode: int, name: bytes) -> None:
        self._packed.append(k.pack_dirent(ino, len(self._packed) + 1, mode >> 12, name))

    def read(self, offset: int, room: int) -> bytes:
        """Entries from the one at `offset`, as many as there is room for."""
        part: list[bytes] = []
        while True:
            while len(self._packed) <= offset:
                entry = next(self._rest, None)
                if entry is None:
                    return b"".join(part)
                name, child = entry
                # a child's number is only known once it was looked up; readdir may show any that is not 0
                self._add(child.ino or 0xFFFFFFFF, child.mode, name)
            room -= len(self._packed[offset])
            if room < 0:
                return b"".join(part)
            part.append(self._packed[offset])
            offset += 1


def opendir(session: Session, unique: int, ino: int, body: bytes) -> None:
    session.send_data(unique, [session.opened_directory(Listing(ino, session.node(ino).entries()))])


def readdir(session: Session, unique: int, ino: int, body: bytes) -> None:
    fh, offset, size, *_ = k.READ_IN.unpack_from(body)
    session.send_data(unique, [session.directories[fh].read(offset, min(size, READDIR_MOST))])


def releasedir(session: Session, unique: int, ino: int, body: bytes) -> None:
    session.directories.pop(k.RELEASE_IN.unpack_from(body)[0], None)
    session.send_ok(unique)


OPCODES: dict[int, Callable[[Session, int, int, bytes], None]] = {
    k.FUSE_LOOKUP: lookup,
    k.FUSE_FORGET: forget,
    k.FUSE_GETATTR: get_attributes,
    k.FUSE_SETATTR: set_attributes,
    k.FUSE_READLINK: readlink,
    k.FUSE_SYMLINK: change_tree,
    k.FUSE_MKNOD: mknod,
    k.FUSE_MKDIR: mkdir,
    k.FUSE_UNLINK: unlink,
    k.FUSE_RMDIR: rmdir,
    k.FUSE_RENAME: rename,
    k.FUSE_LINK: change_tree,
    k.FUSE_OPEN: open_file,
    k.FUSE_STATFS: statfs,
    k.FUSE_RELEASE: release,
    k.FUSE_FSYNC: fsync,
    k.FUSE_SETXATTR: setxattr,
    k.FUSE_GETXATTR: getxattr,
    k.FUSE_LISTXATTR: listxattr,
    k.FUSE_REMOVEXATTR: removexattr,
    k.FUSE_FLUSH: flush,
    k.FUSE_INIT: init,
    k.FUSE_OPENDIR: opendir,
    k.FUSE_READDIR: readdir,
    k.FUSE_RELEASEDIR: releasedir,
    k.FUSE_CREATE: create,
    k.FUSE_INTERRUPT: interrupt,
    k.FUSE_DESTROY: destroy,
    k.FUSE_IOCTL: ioctl,
    k.FUSE_POLL: poll,
    k.FUSE_BATCH_FORGET: batch_forget,
    k.FUSE_FALLOCATE: fallocate,
    k.FUSE_RENAME2: rename2,
}
