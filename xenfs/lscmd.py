"""lscmd.py: the commands `xenfs lsevtchn` and `xenfs lsgrants`: a table of inspect/, of a domain of a running `xenfs up`.

Called by cli.py. The store's socket knows nothing of ports and grants, so they are read below the mount, which is told or
found in /proc/self/mountinfo, where nobody has to be asked.

Invariants: this process never touches a mount itself: whoever serves it may hang, be stopped or be dead, and a program that
waits for a request under way cannot even be killed. A forked child does, and is left behind after TIMEOUT_S without a word.
What is read is shown without control characters: with --mount anybody may have mounted there.
"""

from __future__ import annotations

import argparse
import codecs
import errno
import os
import re
import select
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

from xenfs.storecmd import CommandError
from xenmodel.xenstore.errors import shown

TIMEOUT_S = 5.0  # without any answer; a live server takes microseconds
PIECE_BYTES = 64 * 1024
MOUNT_TYPE = b"fuse.xenfs"
DOMAIN_0 = "Domain-0"  # its name in the store; no link has it

_DOMID = re.compile(r"[0-9]{1,5}")
_NO_MOUNT = 254  # statuses of the child; others are errnos, 0 is success
_FAILED = 255


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`lsevtchn` and `lsgrants` for cli.py's parser; run() does what was chosen."""
    for name, table, things, what in (
        ("lsevtchn", "evtchn", "event channels", "what each port is joined to, its bits and counts, and who has bound it"),
        ("lsgrants", "grants", "grants", "who has which frame mapped and since when, and what it has mapped itself"),
    ):
        short = f"list a domain's {things}"
        add = commands.add_parser(name, help=short, description=f"{short.capitalize()}: {what}.")
        add.add_argument("--mount", metavar="DIR", help="where a `xenfs up` has mounted (default: the only such mount)")
        add.add_argument("domain", metavar="DOMAIN", help="its name or domid")
        add.set_defaults(table=table, parser=add)


def run(options: argparse.Namespace) -> int:
    """The status to exit with; SystemExit(2) for wrong usage."""
    try:
        mounts = find_mounts() if options.mount is None else [options.mount]
        if not mounts:
            raise CommandError("no `xenfs up` of this user or of root has mounted anything here; --mount names a directory")
        if len(mounts) > 1:
            options.parser.error(f"which xenfs? Give --mount with one of {', '.join(map(shown, mounts))}")
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for piece in read_table(mounts[0], options.domain, options.table):
            sys.stdout.write(_clean(decoder.decode(piece)))
        sys.stdout.flush()
    except BrokenPipeError:  # of standard output: whoever reads it has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except CommandError as error:
        print(f"xenfs: {error}", file=sys.stderr)
        return 1
    return 0


def _clean(text: str) -> str:
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)


# --- which mount ------------------------------------------------------------------------------------------------------


def find_mounts(table: str = "/proc/self/mountinfo") -> list[str]:
    """Where an `xenfs up` of this user or of root has mounted, each once; parts of it bound elsewhere do not count."""
    found: dict[bytes, bytes] = {}
    with open(table, "rb") as file:
        for line in file:
            fields = line.rstrip(b"\n").split(b" ")  # proc(5): optional ones, then "-"
            fstype, _, settings = fields[fields.index(b"-", 6) + 1 :][:3]
            owner = dict(word.partition(b"=")[::2] for word in settings.split(b",")).get(b"user_id", b"")
            if fstype == MOUNT_TYPE and fields[3] == b"/" and owner in (b"0", b"%d" % os.geteuid()):
                found.setdefault(fields[2], fields[4])
    return [os.fsdecode(_unescaped(path)) for path in found.values()]


def _unescaped(field: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field)


# --- looking ----------------------------------------------------------------------------------------------------------


def read_table(mount: str, domain: str, table: str) -> Iterator[bytes]:
    """The text of domains/DOMAIN/inspect/TABLE in pieces, as they come. CommandError with the reason if there is none."""
    if domain in ("", ".", "..") or "/" in domain or "\0" in domain + mount:
        raise CommandError(f"{shown(domain)} is no name of a domain")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _child(mount, domain, table, writer)
    os.close(writer)
    status = None
    try:
        while True:
            if not select.select([reader], [], [], TIMEOUT_S)[0]:
                raise CommandError(f"{shown(mount)}: no answer within {TIMEOUT_S:g} s: its xenfs hangs, or is stopped")
            piece = os.read(reader, PIECE_BYTES)
            if not piece:
                break
            yield piece
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])  # it has closed the pipe: nothing is left to wait for
    finally:
        os.close(reader)
        if status is None:  # given up, and perhaps not to be killed: not waited for
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, os.WNOHANG)
    if status:
        raise CommandError(_reason(status, mount, domain))


def _reason(status: int, mount: str, domain: str) -> str:
    place = shown(mount)
    if status == _NO_MOUNT:
        return f"{place}: no xenfs is mounted there"
    if status == errno.ENOENT:
        if _DOMID.fullmatch(domain):
            return f"{place}: there is no domain {domain}"
        return f"{place}: no domain is called {shown(domain)}"
    if status == errno.EACCES:
        return f"{place}: {os.strerror(status)}; only the user of its `xenfs up` may look"
    if status == errno.ENOTCONN:
        return f"{place}: its xenfs has ended without unmounting"
    return f"{place}: {os.strerror(status) if 0 < status < _NO_MOUNT else 'the table could not be read'}"


def _child(mount: str, domain: str, table: str, writer: int) -> NoReturn:
    """Copy the file into the pipe. The status says how it went."""
    status = _FAILED
    try:
        status = _copy(mount, domain, table, writer)
    except OSError as error:
        status = error.errno or _FAILED
    finally:
        os._exit(status)


def _copy(mount: str, domain: str, table: str, writer: int) -> int:
    """The file is closed in here, which asks the server once more: when the pipe ends, nothing can keep the child."""
    try:
        os.stat(os.path.join(mount, "domains/0"))
    except (FileNotFoundError, NotADirectoryError):
        return _NO_MOUNT
    place = "0" if domain == DOMAIN_0 else domain
    with open(os.path.join(mount, "domains", place, "inspect", table), "rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(writer, rest) :]
    return 0
