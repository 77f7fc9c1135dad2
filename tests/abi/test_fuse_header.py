"""Goal: xenfs/fuse/kernel.py is /usr/include/linux/fuse.h: every constant, size and offset, none forgotten.
Method: gcc lists the header's constants, a generated C program prints values, sizes and offsets; what the
installed header is too old for is listed here by protocol minor, what kernel.py leaves out by name.

Fails where gcc or linux-libc-dev is missing: an unchecked ABI is not a checked one.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from struct import Struct, calcsize

import pytest

from xenfs.fuse import kernel

HEADER = Path("/usr/include/linux/fuse.h")
PREFIXES = ("FUSE_", "FOPEN_", "FATTR_")
OUR_OWN = {"FUSE_NAME_MAX"}  # from fs/fuse/fuse_i.h, which is not installed

# Constants by the protocol minor that brought them (the header's own changelog).
NEWER = {
    39: "FUSE_STATX FUSE_DIRECT_IO_ALLOW_MMAP"
    " FUSE_EXT_GROUPS FUSE_CREATE_SUPP_GROUP",  # these two came while the number was 38 already
    40: "FUSE_PASSTHROUGH FOPEN_PASSTHROUGH FUSE_NO_EXPORT_SUPPORT FUSE_HAS_RESEND FUSE_NOTIFY_RESEND"
    " FUSE_UNIQUE_RESEND FUSE_DEV_IOC_BACKING_OPEN FUSE_DEV_IOC_BACKING_CLOSE",
    41: "FUSE_ALLOW_IDMAP FUSE_INVALID_UIDGID",
    42: "FUSE_OVER_IO_URING",
    43: "FUSE_REQUEST_TIMEOUT",
    44: "FUSE_NOTIFY_INC_EPOCH",
    45: "FUSE_COPY_FILE_RANGE_64 FUSE_NOTIFY_PRUNE FUSE_DEV_IOC_SYNC_INIT",
}
# Reserved and obsolete names, sizes of old protocols, DAX mapping flags, byte-order traps, io_uring.
LEFT_OUT = {
    *("FUSE_INIT_RESERVED", "FUSE_WRITE_KILL_PRIV", "FUSE_DIRECT_IO_RELAX", "FUSE_NOTIFY_CODE_MAX"),
    *("FUSE_INIT_BSWAP_RESERVED", "FUSE_SETUPMAPPING_FLAG_WRITE", "FUSE_SETUPMAPPING_FLAG_READ"),
    *("FUSE_COMPAT_ENTRY_OUT_SIZE", "FUSE_COMPAT_ATTR_OUT_SIZE", "FUSE_COMPAT_MKNOD_IN_SIZE"),
    *("FUSE_COMPAT_WRITE_IN_SIZE", "FUSE_COMPAT_STATFS_SIZE", "FUSE_COMPAT_INIT_OUT_SIZE"),
    *("FUSE_COMPAT_22_INIT_OUT_SIZE", "FUSE_NAME_OFFSET", "FUSE_NAME_OFFSET_DIRENTPLUS"),
    *("FUSE_REMOVEMAPPING_MAX_ENTRY", "FUSE_URING_IN_OUT_HEADER_SZ", "FUSE_URING_OP_IN_OUT_SZ"),
    *("FUSE_IO_URING_CMD_INVALID", "FUSE_IO_URING_CMD_REGISTER", "FUSE_IO_URING_CMD_COMMIT_AND_FETCH"),
}
STRUCTS_LEFT_OUT = {  # security contexts, supplementary groups, io_uring: never negotiated
    *("secctx", "secctx_header", "supp_groups", "uring_ent_in_out", "uring_req_header", "uring_cmd_req"),
}

_ATTR = """ino size blocks atime mtime ctime
    atimensec mtimensec ctimensec mode nlink uid gid rdev blksize flags"""
_STATX = """mask blksize attributes nlink uid gid mode __spare0 ino size blocks attributes_mask
    atime.tv_sec atime.tv_nsec atime.__reserved btime.tv_sec btime.tv_nsec btime.__reserved
    ctime.tv_sec ctime.tv_nsec ctime.__reserved mtime.tv_sec mtime.tv_nsec mtime.__reserved
    rdev_major rdev_minor dev_major dev_minor"""


def _inside(member: str, fields: str) -> str:
    return " ".join(f"{member}.{field}" for field in fields.split())


_ENTRY = "nodeid generation entry_valid attr_valid entry_valid_nsec attr_valid_nsec " + _inside("attr", _ATTR)
_DIRENT = "ino off namelen type"
_LOCK = "start end type pid"

# C structure without `fuse_`: its fields in the order of our values; `field@40` came with 7.40.
STRUCTS = {
    "attr": _ATTR,
    "kstatfs": "blocks bfree bavail files ffree bsize namelen frsize padding",
    "statfs_out": _inside("st", "blocks bfree bavail files ffree bsize namelen frsize padding"),
    "file_lock": _LOCK,
    "entry_out": _ENTRY,
    "forget_in": "nlookup",
    "forget_one": "nodeid nlookup",
    "batch_forget_in": "count dummy",
    "getattr_in": "getattr_flags dummy fh",
    "attr_out": "attr_valid attr_valid_nsec dummy " + _inside("attr", _ATTR),
    "mknod_in": "mode rdev umask padding",
    "mkdir_in": "mode umask",
    "rename_in": "newdir",
    "rename2_in": "newdir flags padding",
    "link_in": "oldnodeid",
    "setattr_in": "valid padding fh size lock_owner atime mtime ctime"
    " atimensec mtimensec ctimensec mode unused4 uid gid unused5",
    "open_in": "flags open_flags",
    "create_in": "flags mode umask open_flags",
    "open_out": "fh open_flags backing_id@40",
    "release_in": "fh flags release_flags lock_owner",
    "flush_in": "fh unused padding lock_owner",
    "read_in": "fh offset size read_flags lock_owner flags padding",
    "write_in": "fh offset size write_flags lock_owner flags padding",
    "write_out": "size padding",
    "fsync_in": "fh fsync_flags padding",
    "setxattr_in": "size flags setxattr_flags padding",
    "getxattr_in": "size padding",
    "getxattr_out": "size padding",
    "lk_in": "fh owner " + _inside("lk", _LOCK) + " lk_flags padding",
    "lk_out": _inside("lk", _LOCK),
    "access_in": "mask padding",
    "init_in": "major minor max_readahead flags flags2",
    "init_out": "major minor max_readahead flags max_background congestion_threshold max_write time_gran"
    " max_pages map_alignment flags2 max_stack_depth@40 request_timeout@43",
    "interrupt_in": "unique",
    "bmap_in": "block blocksize padding",
    "bmap_out": "block",
    "ioctl_in": "fh flags cmd arg in_size out_size",
    "ioctl_iovec": "base len",
    "ioctl_out": "result flags in_iovs out_iovs",
    "poll_in": "fh kh flags events",
    "poll_out": "revents padding",
    "notify_poll_wakeup_out": "kh",
    "fallocate_in": "fh offset length mode padding",
    "in_header": "len opcode unique nodeid uid gid pid total_extlen@38 padding",
    "out_header": "len error unique",
    "dirent": _DIRENT,
    "direntplus": _inside("entry_out", _ENTRY) + " " + _inside("dirent", _DIRENT),
    "notify_inval_inode_out": "ino off len",
    "notify_inval_entry_out": "parent namelen flags@38",
    "notify_delete_out": "parent child namelen padding",
    "notify_store_out": "nodeid offset size padding",
    "notify_retrieve_out": "notify_unique nodeid offset size padding",
    "notify_retrieve_in": "dummy1 offset size dummy2 dummy3 dummy4",
    "lseek_in": "fh offset whence padding",
    "lseek_out": "offset",
    "copy_file_range_in": "fh_in off_in nodeid_out fh_out off_out len flags",
    "setupmapping_in": "fh foffset len flags moffset",
    "removemapping_in": "count",
    "removemapping_one": "moffset len",
    "syncfs_in": "padding",
    "ext_header": "size type",
}
NEWER_STRUCTS = {
    39: {
        "sx_time": "tv_sec tv_nsec __reserved",
        "statx": _STATX,
        "statx_in": "getattr_flags reserved fh sx_flags sx_mask",
        "statx_out": "attr_valid attr_valid_nsec flags " + _inside("stat", _STATX),
    },
    40: {"backing_map": "fd flags padding"},
    45: {"copy_file_range_out": "bytes_copied", "notify_prune_out": "count padding spare"},
}


def _compiled(directory: Path, body: str) -> list[str]:
    """The lines that a C program with this body prints; gcc's words go to stderr."""
    source = directory / "program.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n#include <linux/fuse.h>\n"
        f"int main(void) {{\n{body}\nreturn 0; }}\n"
    )
    subprocess.run(["gcc", "-Wall", "-o", directory / "program", source], check=True, timeout=60)
    done = subprocess.run([directory / "program"], check=True, capture_output=True, text=True, timeout=10)
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def header_minor() -> int:
    found = re.search(r"^#define FUSE_KERNEL_MINOR_VERSION (\d+)", HEADER.read_text(), re.MULTILINE)
    assert found, HEADER
    return int(found[1])


@pytest.fixture(scope="module")
def header_names() -> set[str]:
    """All constants of the header: object-like macros and enumerators."""
    macros = subprocess.run(["gcc", "-E", "-dM", HEADER], check=True, capture_output=True, text=True, timeout=60).stdout
    names = {line.split()[1] for line in macros.splitlines() if len(line.split()) > 2}
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    for block in re.findall(r"enum \w+ \{(.*?)\}", text, re.DOTALL):
        names |= {item.split("=")[0].strip() for item in block.split(",")}
    return {name for name in names if name.startswith(PREFIXES) and "(" not in name}


def _our_constants() -> dict[str, int]:
    return {
        name: value
        for name, value in vars(kernel).items()
        if name.startswith(PREFIXES) and name not in OUR_OWN and isinstance(value, int)
    }


def _newer_than(minor: int) -> set[str]:
    return {name for since, words in NEWER.items() if since > minor for name in words.split()}


def test_same_names(header_minor, header_names):
    """Goal: nothing of the header is forgotten, nothing is invented.
    Method: both sets of names; what differs must be in the lists above, for exactly this header."""
    ours = set(_our_constants())
    assert ours - header_names <= _newer_than(header_minor)
    if header_minor <= kernel.FUSE_KERNEL_MINOR_VERSION:
        assert header_names - ours - LEFT_OUT == set()


def test_same_values(tmp_path, header_names):
    """Goal: each constant has C's value.
    Method: print all that both know as 64-bit numbers; the version is ours to choose and not compared."""
    ours = {name: value for name, value in _our_constants().items() if name in header_names}
    del ours["FUSE_KERNEL_MINOR_VERSION"]
    assert len(ours) > 130
    body = "\n".join(f'printf("%llu\\n", (unsigned long long)({name}));' for name in ours)
    values = map(int, _compiled(tmp_path, body))
    assert dict(zip(ours, values, strict=True)) == ours


def _our_fields(layout: Struct) -> list[tuple[int, int]]:
    """(offset, size) of each value of a `<` format, which has no padding but what it spells out as x."""
    found, offset = [], 0
    for count, code in re.findall(r"(\d*)(\w)", layout.format[1:]):
        size = calcsize("<" + code)
        for _ in range(int(count or 1)):
            if code != "x":
                found.append((offset, size))
            offset += size
    assert offset == layout.size
    return found


def test_same_layouts(tmp_path, header_minor):
    """Goal: each structure has C's size and each value lies at its field's offset with its size.
    Method: sizeof, and offsetof and sizeof per field, against the offsets computed from our format."""
    structs = dict(STRUCTS)
    for since, more in NEWER_STRUCTS.items():
        structs |= more if since <= header_minor else {}
    lines, ours = [], []
    for name, words in structs.items():
        layout = getattr(kernel, name.upper())
        lines.append(f'printf("{name} %zu\\n", sizeof(struct fuse_{name}));')
        ours.append(f"{name} {layout.size}")
        for word, (offset, size) in zip(words.split(), _our_fields(layout), strict=True):
            field, _, since = word.partition("@")
            if since and int(since) > header_minor:
                continue
            where = f"offsetof(struct fuse_{name}, {field}), sizeof(((struct fuse_{name} *)0)->{field})"
            lines.append(f'printf("{name}.{field} %zu %zu\\n", {where});')
            ours.append(f"{name}.{field} {offset} {size}")
    assert len(ours) > 250
    assert _compiled(tmp_path, "\n".join(lines)) == ours


def test_no_structure_is_forgotten(header_minor):
    """Goal: every structure of the header is in kernel.py or left out by name, and all of ours are compared.
    Method: names in the header's text; names of our Struct objects."""
    in_header = set(re.findall(r"^struct fuse_(\w+) \{", HEADER.read_text(), re.MULTILINE))
    compared = set(STRUCTS).union(*NEWER_STRUCTS.values())
    if header_minor <= kernel.FUSE_KERNEL_MINOR_VERSION:
        assert in_header - compared - STRUCTS_LEFT_OUT == set()
    ours = {name.lower() for name, value in vars(kernel).items() if isinstance(value, Struct)}
    assert ours - compared == {"init_in_short"}


def test_short_init_is_a_prefix():
    """Goal: INIT_IN_SHORT is how INIT_IN began before 7.36.  Method: the same bytes through both."""
    request = bytes(range(64))
    assert kernel.INIT_IN_SHORT.unpack_from(request) == kernel.INIT_IN.unpack(request)[:4]
