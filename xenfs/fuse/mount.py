"""mount.py: makes /dev/fuse a file system at a directory and takes it away again, through fusepy's libfuse.

Called by up.py; calls libfuse2 (`fuse_mount`), umount2(2) or fusermount, prctl(2). An edge file: it owns
descriptors and forks. Nothing of libfuse stays but the descriptor; session.py speaks the protocol.

Invariants: a look at a directory happens in a forked child with a time limit, because whoever serves a
mount there may hang, or be this very process, which would wait for itself. Only a dead mount (ENOTCONN) is
replaced.

An ordinary user mounts through the set-uid program fusermount, which opens /dev/fuse with the user's own
rights (0666 under udev). `default_permissions` is always on: the kernel enforces the mode bits, no node has
to. Without `allow_other` only the mounting user sees anything, not even root does; root may give it freely,
others need `user_allow_other` in /etc/fuse.conf: it is the caller's choice.
Left out: request sizes. There is no mount option for them: FUSE_INIT's max_write and max_pages decide.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import shutil
import signal
import stat
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

_LOOK_TIMEOUT_MS = 2000  # for a look at a directory; a live server answers in microseconds
_REAP_TIMEOUT_MS = 200  # for a killed child to end; see _reap
_FUSERMOUNT_TIMEOUT_S = 10
_DEAD_LAYERS_MAX = 8  # dead mounts stacked on one directory: one per crash of a careless predecessor
_ANSWER_BYTES_MAX = 8192  # of the child: an errno and a path (PATH_MAX is 4096)
_WORDS_BYTES_MAX = 4096  # of libfuse's complaints

_MNT_DETACH = 2  # <sys/mount.h>
_UMOUNT_NOFOLLOW = 8
_PR_SET_IO_FLUSHER = 57  # <linux/prctl.h>


class MountError(OSError):
    """A sentence for the user; `errno` where one is known, EIO where libfuse gives words only."""

    def __str__(self) -> str:
        return str(self.strerror)


@dataclass(slots=True)
class Mount:
    """A live FUSE mount. `fd` is its connection: non-blocking, close-on-exec, and -1 once unmounted."""

    fd: int
    mountpoint: str
    device: str  # major:minor of the superblock, as /proc/self/mountinfo has it
    detached: bool = False

    def detach(self) -> None:
        """Take the mount out of the name space and go on serving who has something open; then unmount().

        Called from a thread: the kernel may ask the server things meanwhile.
        """
        entry = _top_mount(self.mountpoint)
        if not self.detached and entry is not None and entry.device == self.device:
            self.detached = True
            _detach(self.mountpoint)

    def unmount(self) -> None:
        """End it; again is harmless. The caller has stopped waiting on `fd` and closed its clones before.

        The descriptor goes first: that aborts the connection, so no request can wait for us while the kernel
        takes the mount down. Lazily, because programs may still stand in it; they get ENOTCONN from now on.
        """
        if self.fd == -1:
            return
        ended = _connection_ended(self.fd)
        os.close(self.fd)
        self.fd = -1
        entry = None if self.detached else _top_mount(self.mountpoint)
        if entry is None or entry.device != self.device:
            return  # someone unmounted it, and may have mounted something else there
        if ended and _look(self.mountpoint).error != errno.ENOTCONN:
            return  # ours was unmounted, and its device number lives on in a stranger's mount
        _detach(self.mountpoint)


def mount(
    mountpoint: str,
    *,
    fsname: str,
    subtype: str = "xenfs",
    allow_other: bool = False,
    options: Sequence[str] = (),
) -> Mount:
    """Mount a new FUSE connection on an empty directory; type `fuse.{subtype}`, source `fsname`.

    A dead mount left by a killed process is replaced. `options` are further ones of fuse(8), one each.
    MountError: no libfuse2, no such directory, not empty, something lives there, or not permitted.
    """
    words = [f"fsname={fsname}", f"subtype={subtype}", "default_permissions", *options]
    if allow_other:
        words.append("allow_other")
    for word in words:
        # libfuse makes allow_root allow_other, and leaves the rest to a session of its own
        if not word or word == "allow_root" or set(word) & set(",\\\0\n"):
            raise MountError(errno.EINVAL, f"not a mount option: {word!r}")
    library = _load_libfuse()
    path = free_directory(os.path.abspath(mountpoint))
    fd, unknown = _mount_with_libfuse(library, path, ",".join(words))
    entry = _top_mount(path)
    if entry is None:
        os.close(fd)
        raise MountError(errno.EIO, f"{path} was unmounted as soon as it was mounted")
    made = Mount(fd, path, entry.device)
    if unknown:
        made.unmount()
        raise MountError(errno.EINVAL, f"not a mount option: {unknown!r}")
    os.set_blocking(fd, False)
    return made


def set_io_flusher() -> bool:
    """Tell the kernel that this process serves block I/O: its allocations then never wait for writeback.

    Without it, writeback into a loop device over our own file can end up waiting for itself (prctl(2),
    PR_SET_IO_FLUSHER). False without CAP_SYS_RESOURCE, or before Linux 5.6.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_IO_FLUSHER, *map(ctypes.c_ulong, (1, 0, 0, 0))) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EPERM, errno.EINVAL):
        return False
    raise OSError(error, os.strerror(error))


# -- libfuse ---------------------------------------------------------------------------------------


class _FuseArgs(ctypes.Structure):
    """struct fuse_args of fuse_opt.h."""

    _fields_ = [
        ("argc", ctypes.c_int),
        ("argv", ctypes.POINTER(ctypes.c_char_p)),
        ("allocated", ctypes.c_int),
    ]


def _load_libfuse() -> ctypes.CDLL:
    try:
        import fuse  # here, because fusepy loads libfuse2 when it is imported

        library = fuse._libfuse
    except (ImportError, OSError, AttributeError) as error:  # AttributeError: python3-fuse has the same name
        raise MountError(
            errno.ENOSYS,
            f"cannot load libfuse 2 through fusepy ({error}); "
            "Debian's package is libfuse2, on newer releases libfuse2t64",
        ) from error
    assert isinstance(library, ctypes.CDLL), f"fuse._libfuse is {library!r}"
    return library


def _mount_with_libfuse(library: ctypes.CDLL, path: str, options: str) -> tuple[int, str]:
    """The descriptor, and the options left for the session ("" if none), which libfuse mounts without.

    Prototypes are made anew each time: fusepy's shared function objects stay as it set them.
    """
    address, args_pointer = ctypes.c_void_p, ctypes.POINTER(_FuseArgs)
    fuse_mount = ctypes.CFUNCTYPE(address, ctypes.c_char_p, args_pointer)(("fuse_mount", library))
    fuse_chan_fd = ctypes.CFUNCTYPE(ctypes.c_int, address)(("fuse_chan_fd", library))
    fuse_chan_destroy = ctypes.CFUNCTYPE(None, address)(("fuse_chan_destroy", library))
    fuse_opt_free_args = ctypes.CFUNCTYPE(None, args_pointer)(("fuse_opt_free_args", library))

    argv = (ctypes.c_char_p * 3)(b"xenfs", b"-o", os.fsencode(options))
    args = _FuseArgs(3, argv, 0)
    with _stderr_kept() as said:
        channel = fuse_mount(os.fsencode(path), ctypes.byref(args))
        left = b"".join(args.argv[2 : args.argc]).decode(errors="replace").split(",")  # after argv[0] and -o
        unknown = ",".join(word for word in left if not word.startswith("max_read="))  # that one it also uses
        fuse_opt_free_args(ctypes.byref(args))  # libfuse may have put its own copy there
        if not channel:
            said.seek(0)
            lines = said.read(_WORDS_BYTES_MAX).decode(errors="replace").split("\n")
            said.truncate(0)  # said here, so not again on the terminal
            reason = "; ".join(dict.fromkeys(line.strip() for line in lines if line.strip()))
            # fuse_mount's errno does not survive its own cleaning up
            raise MountError(errno.EIO, f"cannot mount on {path}: {reason or 'libfuse gave no reason'}")
    try:
        return fcntl.fcntl(fuse_chan_fd(channel), fcntl.F_DUPFD_CLOEXEC, 3), unknown
    finally:
        fuse_chan_destroy(channel)  # closes its own descriptor; the duplicate keeps the connection


@contextlib.contextmanager
def _stderr_kept() -> Iterator[BinaryIO]:
    """Collect what C code and its children write to descriptor 2, then pass on what the reader left there.

    libfuse reports failures only there. A file, not a pipe: nobody has to read it for the writer to go on.
    """
    with open(os.memfd_create("libfuse-stderr"), "w+b", buffering=0) as said:
        saved = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 3)
        os.dup2(said.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            said.seek(0)
            rest = said.read(_WORDS_BYTES_MAX)
            if rest:
                os.write(2, rest)


# -- the directory ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Entry:
    """What /proc/self/mountinfo says of one mount; reading it asks no file system anything."""

    device: str
    fstype: str
    source: str
    owner: tuple[int, int] | None  # user_id and group_id of a FUSE mount

    @property
    def is_fuse(self) -> bool:
        return self.fstype == "fuse" or self.fstype.startswith("fuse.")


@dataclass(frozen=True, slots=True)
class _Look:
    error: int  # errno; 0: an empty directory we may read
    path: str  # with symbolic links resolved


def free_directory(path: str) -> str:
    """The resolved path of a directory that mount() will take: dead mounts on it go, anything else is a MountError."""
    for _ in range(_DEAD_LAYERS_MAX):
        entry = _top_mount(path)
        if entry is not None and not entry.is_fuse:
            raise _occupied(path, entry)
        look = _look(path)
        path, entry = look.path, _top_mount(look.path)
        if entry is None:
            _refuse(look)
            return path
        if look.error == errno.EACCES and os.geteuid() == 0 and entry.owner is not None:
            look = _look(path, entry.owner)  # FUSE shows nothing to root either, only to the mounting user
        if look.error == errno.ETIMEDOUT:
            _refuse(look)
        if not entry.is_fuse or look.error != errno.ENOTCONN:
            raise _occupied(path, entry)
        _detach(path)
    raise MountError(errno.EBUSY, f"more than {_DEAD_LAYERS_MAX - 1} dead mounts are stacked on {path}")


def _occupied(path: str, entry: _Entry) -> MountError:
    return MountError(
        errno.EBUSY,
        f"{path} is a mount point already ({entry.fstype} from {entry.source}); unmount it or choose another directory",
    )


def _refuse(look: _Look) -> None:
    sentence = {
        0: "",
        errno.ENOENT: "does not exist",
        errno.ENOTDIR: "is not a directory",
        errno.ENOTEMPTY: "is not empty, and mounting would hide what is in it",
        errno.EACCES: "may not be read by this user",
        errno.ENOTCONN: "lies inside a dead mount (Transport endpoint is not connected)",
        errno.ETIMEDOUT: f"did not answer within {_LOOK_TIMEOUT_MS / 1000:g} s: "
        "whoever serves the mount there hangs, or it is this process itself",
    }.get(look.error, os.strerror(look.error))
    if sentence:
        raise MountError(look.error, f"{look.path} {sentence}")


def _top_mount(path: str) -> _Entry | None:
    """What is mounted exactly at `path`, the topmost; proc(5) describes the fields, some of them optional."""
    top = None
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            fields = line.rstrip(b"\n").split(b" ")  # one by one: the source may be empty
            if _unescaped(fields[4]) != os.fsencode(path):
                continue
            fstype, source, settings = fields[fields.index(b"-", 6) + 1 :][:3]
            ids = dict(word.partition(b"=")[::2] for word in settings.split(b","))
            owner = None
            if b"user_id" in ids and b"group_id" in ids:
                owner = int(ids[b"user_id"]), int(ids[b"group_id"])
            top = _Entry(fields[2].decode(), fstype.decode(), os.fsdecode(_unescaped(source)), owner)
    return top


def _unescaped(field: bytes) -> bytes:
    """proc(5): space, tab, newline and backslash stand as a backslash and three octal digits."""
    head, *rest = field.split(b"\\")
    return head + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in rest)


def _look(path: str, identity: tuple[int, int] | None = None) -> _Look:
    """Ask for `path` in a child (as another user if `identity` is given), no longer than the limit."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns that a fork beside threads may hang the child. This child is made for hanging.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _look_in_child(path, identity, writer)
    os.close(writer)
    waiter = select.poll()
    waiter.register(reader, select.POLLIN)
    in_time = bool(waiter.poll(_LOOK_TIMEOUT_MS))
    answer = os.read(reader, _ANSWER_BYTES_MAX) if in_time else b""
    os.close(reader)
    _reap(child)
    number, separator, resolved = answer.partition(b" ")
    if not separator:
        return _Look(errno.EIO if in_time else errno.ETIMEDOUT, path)
    return _Look(int(number), os.fsdecode(resolved))


def _look_in_child(path: str, identity: tuple[int, int] | None, writer: int) -> NoReturn:
    """Closes what it inherited first: a child that hangs must not keep a FUSE connection alive."""
    try:
        os.dup2(writer, 0)
        os.closerange(1, os.sysconf("SC_OPEN_MAX"))
        error = 0
        resolved = path
        try:
            if identity is not None:
                user, group = identity
                os.setgroups([])
                os.setresgid(group, group, group)
                os.setresuid(user, user, user)
            resolved = os.path.realpath(path)
            if not stat.S_ISDIR(os.stat(resolved).st_mode):
                error = errno.ENOTDIR
            os.statvfs(resolved)  # asks the server, where stat may have answered from the kernel's cache
            if error == 0 and any(os.scandir(resolved)):
                error = errno.ENOTEMPTY
        except OSError as failure:
            error = failure.errno or errno.EIO
        os.write(0, b"%d %s" % (error, os.fsencode(resolved)))
    finally:
        os._exit(0)


def _reap(child: int) -> None:
    """Kill and bury the child; but give up on one whose request a hung server has read: no signal reaches it.
    It ends when that server does."""
    os.kill(child, signal.SIGKILL)
    end = os.pidfd_open(child)
    waiter = select.poll()
    waiter.register(end, select.POLLIN)
    if waiter.poll(_REAP_TIMEOUT_MS):
        os.waitpid(child, 0)
    os.close(end)


# -- unmounting ------------------------------------------------------------------------------------


def _connection_ended(fd: int) -> bool:
    waiter = select.poll()
    waiter.register(fd, 0)
    return any(events & select.POLLERR for _, events in waiter.poll(0))  # fs/fuse/dev.c: unmounted or aborted


def _detach(path: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW) == 0:
        return
    error = ctypes.get_errno()
    if error != errno.EPERM:
        raise MountError(error, f"cannot unmount {path}: {os.strerror(error)}")
    program = shutil.which("fusermount") or shutil.which("fusermount3")
    if program is None:
        raise MountError(errno.EPERM, f"cannot unmount {path}: no fusermount here (Debian's package fuse3)")
    try:
        done = subprocess.run(
            [program, "-u", "-z", "--", path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_FUSERMOUNT_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as late:
        raise MountError(errno.ETIMEDOUT, f"cannot unmount {path}: {program} hangs") from late
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip()
        raise MountError(errno.EPERM, f"cannot unmount {path}: {reason}")
