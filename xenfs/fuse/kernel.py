"""kernel.py: Linux's include/uapi/linux/fuse.h, protocol 7.45: opcodes, flags, the layout of every structure.

Called by session.py and serve.py; calls nothing. Constants keep their C names. `struct fuse_read_in` is
`READ_IN`: one value per C field in C order, padding included, so that fuse.h is its documentation; only
reserved arrays (`unused[]`, `spare[]`) are pad bytes. tests/abi/test_fuse_header.py compares it with the
installed header.

Invariants: a structure is a multiple of 8 bytes (fuse.h pads for 32-bit servers), except REMOVEMAPPING_IN,
as in C; nothing here depends on the running kernel.
Left out: CUSE, security contexts and the io_uring transport, because xenfs negotiates none of them.
The protocol is in the host's byte order: `<` means that this works on little-endian hosts only.
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct
from types import MappingProxyType

# enum fuse_opcode. Keep this block first: OPCODE_NAMES below is made from the names seen so far.
FUSE_LOOKUP = 1
FUSE_FORGET = 2  # no reply
FUSE_GETATTR = 3
FUSE_SETATTR = 4
FUSE_READLINK = 5
FUSE_SYMLINK = 6
FUSE_MKNOD = 8
FUSE_MKDIR = 9
FUSE_UNLINK = 10
FUSE_RMDIR = 11
FUSE_RENAME = 12
FUSE_LINK = 13
FUSE_OPEN = 14
FUSE_READ = 15
FUSE_WRITE = 16
FUSE_STATFS = 17
FUSE_RELEASE = 18
FUSE_FSYNC = 20
FUSE_SETXATTR = 21
FUSE_GETXATTR = 22
FUSE_LISTXATTR = 23
FUSE_REMOVEXATTR = 24
FUSE_FLUSH = 25
FUSE_INIT = 26
FUSE_OPENDIR = 27
FUSE_READDIR = 28
FUSE_RELEASEDIR = 29
FUSE_FSYNCDIR = 30
FUSE_GETLK = 31
FUSE_SETLK = 32
FUSE_SETLKW = 33
FUSE_ACCESS = 34
FUSE_CREATE = 35
FUSE_INTERRUPT = 36
FUSE_BMAP = 37
FUSE_DESTROY = 38
FUSE_IOCTL = 39
FUSE_POLL = 40
FUSE_NOTIFY_REPLY = 41
FUSE_BATCH_FORGET = 42  # no reply
FUSE_FALLOCATE = 43
FUSE_READDIRPLUS = 44
FUSE_RENAME2 = 45
FUSE_LSEEK = 46
FUSE_COPY_FILE_RANGE = 47
FUSE_SETUPMAPPING = 48
FUSE_REMOVEMAPPING = 49
FUSE_SYNCFS = 50
FUSE_TMPFILE = 51
FUSE_STATX = 52
FUSE_COPY_FILE_RANGE_64 = 53

OPCODE_NAMES: Mapping[int, str] = MappingProxyType(
    {value: name.removeprefix("FUSE_") for name, value in list(globals().items()) if name.startswith("FUSE_")}
)

FUSE_KERNEL_VERSION = 7
FUSE_KERNEL_MINOR_VERSION = 45  # the newest this file knows; both sides then speak the smaller minor
FUSE_ROOT_ID = 1

# The kernel answers EINVAL to a read of /dev/fuse with less room than this, or than
# IN_HEADER + WRITE_IN + max_write if that is more (fs/fuse/dev.c).
FUSE_MIN_READ_BUFFER = 8192
# fs/fuse/fuse_i.h: one longer name in a directory fails the whole listing with EIO.
FUSE_NAME_MAX = 1024
# A request whose `unique` has this bit was sent before and comes again (only after FUSE_NOTIFY_RESEND).
FUSE_UNIQUE_RESEND = 1 << 63
FUSE_INVALID_UIDGID = 0xFFFFFFFF

# INIT flags, 64 bits wide: `flags` carries the low half, `flags2` the high one (see split_init_flags).
FUSE_ASYNC_READ = 1 << 0
FUSE_POSIX_LOCKS = 1 << 1
FUSE_FILE_OPS = 1 << 2
FUSE_ATOMIC_O_TRUNC = 1 << 3
FUSE_EXPORT_SUPPORT = 1 << 4
FUSE_BIG_WRITES = 1 << 5
FUSE_DONT_MASK = 1 << 6
FUSE_SPLICE_WRITE = 1 << 7
FUSE_SPLICE_MOVE = 1 << 8
FUSE_SPLICE_READ = 1 << 9
FUSE_FLOCK_LOCKS = 1 << 10
FUSE_HAS_IOCTL_DIR = 1 << 11
FUSE_AUTO_INVAL_DATA = 1 << 12
FUSE_DO_READDIRPLUS = 1 << 13
FUSE_READDIRPLUS_AUTO = 1 << 14
FUSE_ASYNC_DIO = 1 << 15
FUSE_WRITEBACK_CACHE = 1 << 16
FUSE_NO_OPEN_SUPPORT = 1 << 17
FUSE_PARALLEL_DIROPS = 1 << 18
FUSE_HANDLE_KILLPRIV = 1 << 19
FUSE_POSIX_ACL = 1 << 20
FUSE_ABORT_ERROR = 1 << 21
FUSE_MAX_PAGES = 1 << 22
FUSE_CACHE_SYMLINKS = 1 << 23
FUSE_NO_OPENDIR_SUPPORT = 1 << 24
FUSE_EXPLICIT_INVAL_DATA = 1 << 25
FUSE_MAP_ALIGNMENT = 1 << 26
FUSE_SUBMOUNTS = 1 << 27
FUSE_HANDLE_KILLPRIV_V2 = 1 << 28
FUSE_SETXATTR_EXT = 1 << 29
FUSE_INIT_EXT = 1 << 30  # without it in the reply the kernel ignores flags2
FUSE_SECURITY_CTX = 1 << 32
FUSE_HAS_INODE_DAX = 1 << 33
FUSE_CREATE_SUPP_GROUP = 1 << 34
FUSE_HAS_EXPIRE_ONLY = 1 << 35
FUSE_DIRECT_IO_ALLOW_MMAP = 1 << 36
FUSE_PASSTHROUGH = 1 << 37
FUSE_NO_EXPORT_SUPPORT = 1 << 38
FUSE_HAS_RESEND = 1 << 39
FUSE_ALLOW_IDMAP = 1 << 40
FUSE_OVER_IO_URING = 1 << 41
FUSE_REQUEST_TIMEOUT = 1 << 42

# open_flags of OPEN_OUT
FOPEN_DIRECT_IO = 1 << 0
FOPEN_KEEP_CACHE = 1 << 1
FOPEN_NONSEEKABLE = 1 << 2
FOPEN_CACHE_DIR = 1 << 3
FOPEN_STREAM = 1 << 4
FOPEN_NOFLUSH = 1 << 5
FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6
FOPEN_PASSTHROUGH = 1 << 7

# `valid` of SETATTR_IN
FATTR_MODE = 1 << 0
FATTR_UID = 1 << 1
FATTR_GID = 1 << 2
FATTR_SIZE = 1 << 3
FATTR_ATIME = 1 << 4
FATTR_MTIME = 1 << 5
FATTR_FH = 1 << 6
FATTR_ATIME_NOW = 1 << 7
FATTR_MTIME_NOW = 1 << 8
FATTR_LOCKOWNER = 1 << 9
FATTR_CTIME = 1 << 10
FATTR_KILL_SUIDGID = 1 << 11

# The flag words of single requests, named after the request
FUSE_GETATTR_FH = 1 << 0
FUSE_RELEASE_FLUSH = 1 << 0
FUSE_RELEASE_FLOCK_UNLOCK = 1 << 1
FUSE_LK_FLOCK = 1 << 0
FUSE_WRITE_CACHE = 1 << 0  # written back from the page cache: the handle is guessed
FUSE_WRITE_LOCKOWNER = 1 << 1
FUSE_WRITE_KILL_SUIDGID = 1 << 2
FUSE_READ_LOCKOWNER = 1 << 1
FUSE_IOCTL_COMPAT = 1 << 0
FUSE_IOCTL_UNRESTRICTED = 1 << 1  # CUSE only: a FUSE file never gets it
FUSE_IOCTL_RETRY = 1 << 2
FUSE_IOCTL_32BIT = 1 << 3
FUSE_IOCTL_DIR = 1 << 4
FUSE_IOCTL_COMPAT_X32 = 1 << 5
FUSE_IOCTL_MAX_IOV = 256
FUSE_POLL_SCHEDULE_NOTIFY = 1 << 0
FUSE_FSYNC_FDATASYNC = 1 << 0
FUSE_ATTR_SUBMOUNT = 1 << 0
FUSE_ATTR_DAX = 1 << 1
FUSE_OPEN_KILL_SUIDGID = 1 << 0
FUSE_SETXATTR_ACL_KILL_SGID = 1 << 0
FUSE_EXPIRE_ONLY = 1 << 0
FUSE_MAX_NR_SECCTX = 31  # enum fuse_ext_type
FUSE_EXT_GROUPS = 32

# enum fuse_notify_code: OUT_HEADER with unique 0 and the code as a positive `error`
FUSE_NOTIFY_POLL = 1
FUSE_NOTIFY_INVAL_INODE = 2
FUSE_NOTIFY_INVAL_ENTRY = 3
FUSE_NOTIFY_STORE = 4
FUSE_NOTIFY_RETRIEVE = 5
FUSE_NOTIFY_DELETE = 6
FUSE_NOTIFY_RESEND = 7
FUSE_NOTIFY_INC_EPOCH = 8
FUSE_NOTIFY_PRUNE = 9

# ioctls on /dev/fuse itself, as <asm-generic/ioctl.h> makes them:
# direction << 30 | size of the argument << 16 | magic << 8 | number
FUSE_DEV_IOC_MAGIC = 229
FUSE_DEV_IOC_CLONE = 2 << 30 | 4 << 16 | FUSE_DEV_IOC_MAGIC << 8 | 0
FUSE_DEV_IOC_BACKING_OPEN = 1 << 30 | 16 << 16 | FUSE_DEV_IOC_MAGIC << 8 | 1
FUSE_DEV_IOC_BACKING_CLOSE = 1 << 30 | 4 << 16 | FUSE_DEV_IOC_MAGIC << 8 | 2
FUSE_DEV_IOC_SYNC_INIT = FUSE_DEV_IOC_MAGIC << 8 | 3

# `type` of a directory entry, <dirent.h>: the file type bits of st_mode, shifted right by 12
DT_FIFO = 1
DT_CHR = 2
DT_DIR = 4
DT_BLK = 6
DT_REG = 8
DT_LNK = 10
DT_SOCK = 12

# Headers: len opcode unique nodeid uid gid pid total_extlen (in 8 bytes) padding
IN_HEADER = Struct("<IIQQIIIHH")
OUT_HEADER = Struct("<IiQ")  # len, error (0 or a negative errno), unique

# Attributes: ino size blocks atime mtime ctime;
# atimensec mtimensec ctimensec mode nlink uid gid rdev blksize flags
_ATTR_FORMAT = "6Q10I"
# nodeid generation entry_valid attr_valid; entry_valid_nsec attr_valid_nsec; then an ATTR
_ENTRY_OUT_FORMAT = "4Q2I" + _ATTR_FORMAT
_DIRENT_FORMAT = "QQII"  # ino off namelen type, then the name
_FILE_LOCK_FORMAT = "QQII"  # start end type pid

ATTR = Struct("<" + _ATTR_FORMAT)
ATTR_OUT = Struct("<QII" + _ATTR_FORMAT)  # attr_valid attr_valid_nsec dummy, then an ATTR
ENTRY_OUT = Struct("<" + _ENTRY_OUT_FORMAT)
DIRENT = Struct("<" + _DIRENT_FORMAT)
DIRENTPLUS = Struct("<" + _ENTRY_OUT_FORMAT + _DIRENT_FORMAT)
GETATTR_IN = Struct("<IIQ")  # getattr_flags dummy fh
# valid padding fh size lock_owner atime mtime ctime;
# atimensec mtimensec ctimensec mode unused4 uid gid unused5
SETATTR_IN = Struct("<II6Q8I")
SX_TIME = Struct("<qIi")  # tv_sec tv_nsec __reserved
# mask blksize attributes nlink uid gid mode __spare0; ino size blocks attributes_mask;
# atime btime ctime mtime as SX_TIME each; rdev_major rdev_minor dev_major dev_minor __spare2[14]
_STATX_FORMAT = "IIQIIIHHQQQQ" + 4 * "qIi" + "4I112x"
STATX = Struct("<" + _STATX_FORMAT)
STATX_IN = Struct("<IIQII")  # getattr_flags reserved fh sx_flags sx_mask
STATX_OUT = Struct("<QII16x" + _STATX_FORMAT)  # attr_valid attr_valid_nsec flags spare[2], then a STATX

# Session: major minor max_readahead flags [flags2 unused[11]]
INIT_IN = Struct("<5I44x")
INIT_IN_SHORT = Struct("<4I")  # all that kernels before 7.36 send
# major minor max_readahead flags; max_background congestion_threshold; max_write time_gran;
# max_pages map_alignment; flags2 max_stack_depth; request_timeout unused[11]
INIT_OUT = Struct("<4IHHIIHHIIH22x")
FORGET_IN = Struct("<Q")  # nlookup
BATCH_FORGET_IN = Struct("<II")  # count dummy, then `count` times FORGET_ONE
FORGET_ONE = Struct("<QQ")  # nodeid nlookup
INTERRUPT_IN = Struct("<Q")  # unique of the request to give up
KSTATFS = Struct("<5Q4I24x")  # blocks bfree bavail files ffree bsize namelen frsize padding spare[6]
STATFS_OUT = KSTATFS
SYNCFS_IN = Struct("<Q")  # padding

# Names; the names themselves follow as bytes that end in NUL
MKNOD_IN = Struct("<IIII")  # mode rdev umask padding
MKDIR_IN = Struct("<II")  # mode umask
RENAME_IN = Struct("<Q")  # newdir
RENAME2_IN = Struct("<QII")  # newdir flags padding
LINK_IN = Struct("<Q")  # oldnodeid
CREATE_IN = Struct("<IIII")  # flags mode umask open_flags
ACCESS_IN = Struct("<II")  # mask padding
SETXATTR_IN = Struct("<IIII")  # size flags setxattr_flags padding
FUSE_COMPAT_SETXATTR_IN_SIZE = 8  # all that comes unless FUSE_SETXATTR_EXT was negotiated
GETXATTR_IN = Struct("<II")  # size padding; LISTXATTR too
GETXATTR_OUT = Struct("<II")  # size padding: the answer to size 0

# Files
OPEN_IN = Struct("<II")  # flags open_flags
OPEN_OUT = Struct("<QIi")  # fh open_flags backing_id
RELEASE_IN = Struct("<QIIQ")  # fh flags release_flags lock_owner
FLUSH_IN = Struct("<QIIQ")  # fh unused padding lock_owner
READ_IN = Struct("<QQIIQII")  # fh offset size read_flags lock_owner flags padding
WRITE_IN = Struct("<QQIIQII")  # fh offset size write_flags lock_owner flags padding, then the data
WRITE_OUT = Struct("<II")  # size padding
FSYNC_IN = Struct("<QII")  # fh fsync_flags padding
FALLOCATE_IN = Struct("<QQQII")  # fh offset length mode padding
LSEEK_IN = Struct("<QQII")  # fh offset whence padding
LSEEK_OUT = Struct("<Q")  # offset
COPY_FILE_RANGE_IN = Struct("<7Q")  # fh_in off_in nodeid_out fh_out off_out len flags
COPY_FILE_RANGE_OUT = Struct("<Q")  # bytes_copied
FILE_LOCK = Struct("<" + _FILE_LOCK_FORMAT)
LK_IN = Struct("<QQ" + _FILE_LOCK_FORMAT + "II")  # fh owner, a FILE_LOCK, lk_flags padding
LK_OUT = FILE_LOCK
BMAP_IN = Struct("<QII")  # block blocksize padding
BMAP_OUT = Struct("<Q")  # block
IOCTL_IN = Struct("<QIIQII")  # fh flags cmd arg in_size out_size, then in_size bytes
IOCTL_IOVEC = Struct("<QQ")  # base len
IOCTL_OUT = Struct("<iIII")  # result flags in_iovs out_iovs, then the bytes for the caller
POLL_IN = Struct("<QQII")  # fh kh flags events
POLL_OUT = Struct("<II")  # revents padding
SETUPMAPPING_IN = Struct("<5Q")  # fh foffset len flags moffset
REMOVEMAPPING_IN = Struct("<I")  # count
REMOVEMAPPING_ONE = Struct("<QQ")  # moffset len
EXT_HEADER = Struct("<II")  # size type
BACKING_MAP = Struct("<iIQ")  # fd flags padding: the argument of FUSE_DEV_IOC_BACKING_OPEN

# Notifications
NOTIFY_POLL_WAKEUP_OUT = Struct("<Q")  # kh
NOTIFY_INVAL_INODE_OUT = Struct("<Qqq")  # ino off len
NOTIFY_INVAL_ENTRY_OUT = Struct("<QII")  # parent namelen flags, then the name and a NUL
NOTIFY_DELETE_OUT = Struct("<QQII")  # parent child namelen padding, then the name and a NUL
NOTIFY_STORE_OUT = Struct("<QQII")  # nodeid offset size padding, then the data
NOTIFY_RETRIEVE_OUT = Struct("<QQQII")  # notify_unique nodeid offset size padding
NOTIFY_RETRIEVE_IN = Struct("<QQIIQQ")  # dummy1 offset size dummy2 dummy3 dummy4
NOTIFY_PRUNE_OUT = Struct("<IIQ")  # count padding spare, then `count` nodeids


def split_init_flags(flags: int) -> tuple[int, int]:
    """64 bits of INIT flags -> (flags, flags2) as INIT_IN and INIT_OUT carry them."""
    return flags & 0xFFFFFFFF, flags >> 32


def join_init_flags(flags: int, flags2: int) -> int:
    """The inverse. flags2 is noise unless the sender set FUSE_INIT_EXT (fuse.h 7.36)."""
    return flags | flags2 << 32 if flags & FUSE_INIT_EXT else flags


def pack_dirent(ino: int, offset: int, type: int, name: bytes) -> bytes:
    """One entry of a READDIR reply. `offset` is what the next READDIR sends to go on after this entry.

    ValueError for a name the kernel would answer with EIO for the whole listing (fs/fuse/readdir.c).
    """
    _check_name(name)
    return _padded(DIRENT.pack(ino, offset, len(name), type) + name)


def pack_direntplus(entry_out: bytes, ino: int, offset: int, type: int, name: bytes) -> bytes:
    """One entry of a READDIRPLUS reply; `entry_out` is a packed ENTRY_OUT (nodeid 0 counts no lookup)."""
    _check_name(name)
    assert len(entry_out) == ENTRY_OUT.size, f"{len(entry_out)} bytes of entry_out, not {ENTRY_OUT.size}"
    return _padded(entry_out + DIRENT.pack(ino, offset, len(name), type) + name)


def _check_name(name: bytes) -> None:
    if not 0 < len(name) <= FUSE_NAME_MAX or b"/" in name or b"\0" in name:
        raise ValueError(f"not a file name: {name[:64]!r} ({len(name)} bytes)")


def _padded(record: bytes) -> bytes:
    return record + bytes(-len(record) % 8)  # FUSE_REC_ALIGN
