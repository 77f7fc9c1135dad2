"""storecmd.py: the commands `xenfs store dump`, `xenfs store load`, `xenfs store reload` and `xenfs quota`.

Called by cli.py. They speak to any running xenstored through storeclient.py, and need no xenfs in the same process.
A file is read whole, and has to be right, before anything is changed. What a store says is shown without control
characters: guests choose names and values.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO

from xenfs.config import default_store_socket
from xenfs.storeclient import StoreClient, StoreError
from xenfs.storetree import NODES_MAX, Progress, TreeError, dump, load
from xenmodel.public.io.xs_wire import XsType
from xenmodel.types import Domid
from xenmodel.xenstore import path as paths
from xenmodel.xenstore.dump import LINE_MAX, DumpError, Entry, parse
from xenmodel.xenstore.errors import XsErrno, XsError, shown
from xenmodel.xenstore.wire import join

ENVIRON = "XENSTORED_PATH"  # libxenstore's
RELOAD_TIMEOUT_S = 60.0
PROGRESS_S = 0.2  # between two looks of it

_DOMID = re.compile(r"[0-9]{1,5}")
_ACCOUNT = re.compile(r"([\w-]+)\s*: +(\d+)(?: \(max +\d+\))?(?: .*)?")  # a line of C xenstored's CONTROL quota
_OXENSTORED = re.compile(r"dom\d+ quota: (\d+)/(\d+)")
_UNKNOWN = frozenset({XsErrno.EINVAL, XsErrno.ENOSYS})  # how daemons answer a CONTROL they do not have


class CommandError(Exception):
    """It cannot be done; one line says why."""


# --- quota and reload -------------------------------------------------------------------------------------------------


def find_domain(client: StoreClient, name: str) -> Domid:
    """The domid of a domain by its name, or by its domid, which need not be in the store."""
    if _DOMID.fullmatch(name):
        return Domid(int(name))
    top = "/local/domain"
    domids = [each for each in client.directory(top) if _DOMID.fullmatch(each)]
    answers = client.request([(XsType.READ, join(f"{top}/{domid}/name")) for domid in domids])
    found = [domid for domid, answer in zip(domids, answers, strict=True) if answer == os.fsencode(name)]
    if len(found) != 1:
        many = f"{len(found)} domains are" if found else "no domain is"
        raise CommandError(f"{many} called {shown(name)}; give its domid")
    return Domid(int(found[0]))


def quota(client: StoreClient, domid: Domid) -> list[list[str]]:
    """Rows of a table: quota, used, limit (0: none), times refused, the last refusal. "-" is what nobody counts."""
    answer = _control(client, "quota-usage", domid)
    if answer is None:
        return _foreign_quota(client, domid)
    rows = [[*line.split(None, 4), ""][:5] for line in answer.splitlines() if line.strip()]
    if not rows or any(len(row) < 5 for row in rows):
        raise CommandError(f"the store's answer is no table of quotas: {shown(answer)}")
    return rows


def set_quota(client: StoreClient, domid: Domid, limit: str) -> None:
    """SET_QUOTA, of Xen 4.22 and ours: `limit` is NAME=VALUE."""
    name, _, value = limit.partition("=")
    if not (name and value.isascii() and value.isdigit()):
        raise CommandError(f"{shown(limit)} is not NAME=VALUE with a number; without it the names are shown")
    (answer,) = client.request([(XsType.SET_QUOTA, join(str(domid), name, value))])
    if isinstance(answer, XsError):
        if answer.errno is XsErrno.ENOENT:
            raise CommandError(f"the store knows no domain {domid}")
        if answer.errno in _UNKNOWN:
            raise CommandError(f"the store has no quota {shown(name)} for single domains")
        raise answer


def _foreign_quota(client: StoreClient, domid: Domid) -> list[list[str]]:
    """C xenstored tells in two answers what a domain uses and what each may use; no other store counts refusals."""
    answer = _control(client, "quota", domid)
    if nodes := _OXENSTORED.fullmatch(answer or ""):
        return [["nodes", *nodes.groups(), "-", ""]]
    used = _accounts(answer or "")
    if not used:
        told = f"; it says: {clean(answer)}" if answer else ""
        raise CommandError(f"the store has no table of quotas{told}")
    limits = _accounts(_control(client, "quota") or "")
    return [[name, used.get(name, "-"), limits.get(name, "-"), "-", ""] for name in used | limits]


def _control(client: StoreClient, command: str, domid: Domid | None = None) -> str | None:
    """The answer, or None if the store has no such command: oxenstored says OK to what it does not know."""
    try:
        answer = client.control(command, *([] if domid is None else [str(domid)]))
    except XsError as error:
        if error.errno is XsErrno.ENOENT:
            raise CommandError(f"the store knows no domain {domid}") from None
        if error.errno not in _UNKNOWN:
            raise
        return None
    return None if answer == "OK" else answer


def _accounts(answer: str) -> dict[str, str]:
    matches = (_ACCOUNT.fullmatch(line) for line in answer.splitlines())
    return {match[1]: match[2] for match in matches if match is not None}


# --- the command line -------------------------------------------------------------------------------------------------


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`store` and `quota` for cli.py's parser; run() does what was chosen."""
    where = argparse.ArgumentParser(add_help=False)
    one = where.add_mutually_exclusive_group()
    one.add_argument("--socket", metavar="PATH", help=f"the store's socket or device (default: ${ENVIRON})")
    one.add_argument("--mount", metavar="DIR", help="the store of the `xenfs up` that has mounted at DIR, at DIR.xenstored")
    store = commands.add_parser("store", help="save, restore or reload a xenstore, of xenfs or of Xen")
    actions = store.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = actions.add_parser("dump", parents=[where], help="print a tree with all values and permissions")
    add.add_argument("--output", metavar="FILE", help="write to FILE, not to standard output")
    add.add_argument("path", nargs="?", default=paths.ROOT, metavar="NODE", help="where to start (default: %(default)s)")
    add.set_defaults(do=_dump, parser=add)
    add = actions.add_parser("load", parents=[where], help="make a tree like a dump, changing only what differs")
    add.add_argument("--replace", action="store_true", help="remove what is below the dump's nodes and not in it")
    add.add_argument("--under", metavar="NODE", help="only what is at or below NODE")
    add.add_argument("file", nargs="?", default="-", metavar="FILE", help="the dump (default: standard input)")
    add.set_defaults(do=_load, parser=add)
    add = actions.add_parser("reload", parents=[where], help="let the server start again without losing anything")
    add.add_argument("--force", action="store_true", help="even if transactions are open: they are lost")
    add.set_defaults(do=_reload, parser=add)
    add = commands.add_parser("quota", parents=[where], help="show what a domain uses of its quotas, or change its limits")
    add.add_argument("domain", metavar="DOMAIN", help="its name or domid")
    add.add_argument("limits", nargs="*", metavar="NAME=VALUE", help="limits of its own from now on; 0: none")
    add.set_defaults(do=_quota, parser=add)


def run(options: argparse.Namespace) -> int:
    """The status to exit with; SystemExit(2) for wrong usage."""
    for node in (getattr(options, "path", None), getattr(options, "under", None)):
        if node is not None and not (node.startswith("/") and _is_path(node)):
            options.parser.error(f"{shown(node)} is not the absolute path of a node")
    if options.mount is not None:
        socket = default_store_socket(options.mount)
    else:
        socket = options.socket or os.environ.get(ENVIRON) or ""
        if not socket:
            options.parser.error(f"which store? Give --socket or --mount, or set {ENVIRON}")
    try:
        status: int = options.do(socket, options)
        sys.stdout.flush()
    except BrokenPipeError:  # of standard output: whoever reads it has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"xenfs: {error.filename or 'error'}: {error.strerror}", file=sys.stderr)
        return 1
    except XsError as error:
        hint = "" if error.errno is not XsErrno.EACCES else " (through a guest's device one is that guest)"
        print(f"xenfs: {socket}: {clean(str(error))}{hint}", file=sys.stderr)
        return 1
    except (CommandError, StoreError, TreeError) as error:
        hint = ""
        if options.mount is not None and not os.path.exists(socket):
            hint = "; if its `xenfs up` has --xenstored-socket, give that with --socket"
        print(f"xenfs: {clean(str(error))}{hint}", file=sys.stderr)
        return 1
    return status


def _dump(socket: str, options: argparse.Namespace) -> int:
    with StoreClient(socket) as client, _progress("read") as progress:
        lines = dump(client, options.path, progress)
    if options.output is None:
        _print_lines(lines, sys.stdout)
    else:
        # Values can be secrets (of a VNC server, for one), and the store is root's.
        fd = os.open(options.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="ascii") as file:
            _print_lines(lines, file)
    return 0


def _print_lines(lines: Iterable[str], file: TextIO) -> None:
    file.writelines(f"{line}\n" for line in lines)


def _load(socket: str, options: argparse.Namespace) -> int:
    source = 0 if options.file == "-" else options.file
    try:
        with open(source, encoding="ascii", errors="surrogateescape", newline="\n") as file:
            entries = _read_entries(file)
    except DumpError as error:
        raise CommandError(f"{'standard input' if source == 0 else options.file}: {error}") from None
    with StoreClient(socket) as client, _progress("loaded") as progress:
        counts = load(client, entries, options.replace, options.under, progress)
    print(counts)
    return 0


def _read_entries(file: TextIO) -> list[Entry]:
    lines: Iterator[str] = iter(lambda: file.readline(LINE_MAX + 2), "")
    entries: list[Entry] = []
    for entry in parse(lines):
        if len(entries) == NODES_MAX:
            raise CommandError(f"a dump of more than {NODES_MAX} nodes")
        entries.append(entry)
    return entries


def _quota(socket: str, options: argparse.Namespace) -> int:
    with StoreClient(socket) as client:
        domid = find_domain(client, options.domain)
        for limit in options.limits:
            set_quota(client, domid, limit)
        rows = quota(client, domid)
    print(table([["quota", "used", "limit", "refused", "last"], *rows]))
    return 0


def _reload(socket: str, options: argparse.Namespace) -> int:
    with StoreClient(socket) as client:
        words = ["live-update", "-s", *(["-F"] if options.force else [])]
        try:
            answer = client.control(*words, timeout_s=RELOAD_TIMEOUT_S)
        except XsError as error:
            if error.errno in _UNKNOWN:
                raise CommandError(f"{socket}: this store cannot be reloaded") from None
            raise
    if answer == "BUSY":
        answer = "BUSY: transactions are open; --force ends them"
    if answer != "OK":
        raise CommandError(f"{socket}: not reloaded: {answer}")
    print(answer)
    return 0


def table(rows: list[list[str]]) -> str:
    """Columns as wide as they need to be; numbers to the right, names and texts to the left."""
    rows = [[clean(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = (0, len(widths) - 1)
    aligned = (
        "  ".join(c.ljust(w) if n in left else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in aligned)


def clean(text: str) -> str:
    """As it may be shown on a terminal: a store's texts are whoever wrote them's."""
    return "".join(char if char.isprintable() else " " if char == "\n" else "?" for char in text.strip())


@contextmanager
def _progress(verb: str) -> Iterator[Progress]:
    """A line on standard error that counts, if that is a terminal."""
    last_s = time.monotonic()
    shown_length = 0

    def show(done: int, of: int) -> None:
        nonlocal last_s, shown_length
        if sys.stderr.isatty() and time.monotonic() - last_s >= PROGRESS_S:
            last_s = time.monotonic()
            line = f"{verb} {done} of {of} nodes"
            print(f"\r{line.ljust(shown_length)}", end="", file=sys.stderr, flush=True)
            shown_length = len(line)

    try:
        yield show
    finally:
        if shown_length:
            print(f"\r{' ' * shown_length}\r", end="", file=sys.stderr, flush=True)


def _is_path(text: str) -> bool:
    try:
        return paths.canonical(text, Domid(0)) == text
    except XsError:
        return False
