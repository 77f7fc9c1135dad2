"""What the tests of dev/xen share: C programs of tests/devxen, compiled once, run as programs of a domain.

DevXen.start() gives a program a mount namespace of its own in which MNT/domains/N/dev/xen is /dev/xen: the libraries need
no change. Program speaks the protocol of tests/devxen/lines.h: one line, one reply. `rows` reads the tables of inspect/ by
the names in their headers. Whatever happens, no program is left, and no /dev/xen that was not there before.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from tests.host.net import LOOK_S, wait_until
from tests.host.served import REPOSITORY, Host, Served

SOURCES = REPOSITORY / "tests/devxen"
HEADERS = ("xenevtchn.h", "xengnttab.h", "libxenvchan.h", "xenstore.h")
LIBRARIES = ("-lxenvchan", "-lxengnttab", "-lxenevtchn", "-lxenstore")
DEV_XEN = Path("/dev/xen")
REPLY_S = 20.0
QUIET_S = 0.3  # what has not come by then waits
SETTLE_S = 10.0
PAGE = 4096

needs_libraries = pytest.mark.skipif(
    not shutil.which("gcc") or not all(Path("/usr/include", name).exists() for name in HEADERS),
    reason="gcc or libxen-dev is not installed",
)


@functools.cache
def _directory() -> Path:
    path = Path(tempfile.mkdtemp(prefix="xenfs-devxen-", dir="/tmp"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    path.chmod(0o755)
    return path


@functools.cache
def compiled(name: str) -> Path:
    """tests/devxen/NAME.c as a program."""
    program = _directory() / name
    argv = ["gcc", "-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-o", str(program), f"{SOURCES}/{name}.c"]
    done = subprocess.run([*argv, "-Wl,--as-needed", *LIBRARIES], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{name}.c does not compile:\n{done.stderr}"
    return program


def rows(text: str, column: str) -> list[dict[str, str]]:
    """The rows of the table that has this column; keys are the names in its header, which stand above their cells."""
    found: list[dict[str, str]] = []
    header: list[tuple[str, int, int | None]] = []
    for line in text.splitlines():
        names = list(re.finditer(r"\S+(?: \S+)*", line))
        if not header and column in (name.group() for name in names):
            ends = [name.start() for name in names[1:]]
            header = [(name.group(), name.start(), end) for name, end in zip(names, [*ends, None], strict=True)]
        elif header and not names:
            break
        elif header:
            found.append({name: line[start:end].strip() for name, start, end in header})
    assert header, f"no table with a column {column}:\n{text}"
    return found


class Program:
    """A program that runs as one of a domain."""

    def __init__(self, process: Popen[str], name: str, errors: Path) -> None:
        self.process, self.name, self.errors = process, name, errors
        self._rest = b""

    def said(self) -> str:
        """What it and its libraries complained about, for messages of failure."""
        return f"{self.name}: {self.errors.read_text()}"

    def send(self, *words: object) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(" ".join(map(str, words)) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise AssertionError(f"ended with {self.process.wait(10)}, {self.said()}") from None

    def line(self, timeout_s: float = REPLY_S) -> str | None:
        """The next line, None if none came in time."""
        assert self.process.stdout is not None
        fd, deadline = self.process.stdout.fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            waiter = select.poll()
            waiter.register(fd, select.POLLIN)
            if not waiter.poll(1000 * max(0.0, deadline - time.monotonic())):
                return None
            part = os.read(fd, 65536)
            assert part, f"ended with {self.process.wait(10)}, {self.said()}"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def reply(self, timeout_s: float = REPLY_S) -> str:
        line = self.line(timeout_s)
        assert line is not None, f"no reply within {timeout_s:g} s, {self.said()}"
        return line

    def quiet(self, time_s: float = QUIET_S) -> bool:
        """Whether it says nothing for that long."""
        line = self.line(time_s)
        assert line is None, f"said {line!r}"
        return True

    def ask(self, *words: object, timeout_s: float = REPLY_S) -> str:
        self.send(*words)
        return self.reply(timeout_s)

    def ok(self, *words: object, timeout_s: float = REPLY_S) -> None:
        said = self.ask(*words, timeout_s=timeout_s)
        assert said == "ok", f"{words[0]}: {said}, {self.said()}"

    def numbers(self, *words: object) -> list[int]:
        said = self.ask(*words)
        assert re.fullmatch(r"\d+( \d+)*", said), f"{words[0]}: {said}, {self.said()}"
        return list(map(int, said.split()))

    def number(self, *words: object) -> int:
        (number,) = self.numbers(*words)
        return number

    def json(self, timeout_s: float = REPLY_S) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.reply(timeout_s))
        return found

    def stop(self) -> None:
        """SIGSTOP, and it has arrived."""
        self.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: self._state() == "T", f"{self.name} stopped")

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def _state(self) -> str:
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        assert self.process.wait(10) == -number, self.said()

    def end(self) -> int:
        """No more commands; its exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.stdin = None  # for communicate()
        return self.process.wait(10)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)


class DevXen:
    """One server's domains, and the programs that run in them. A context: at its end no program is left."""

    def __init__(self, host: Host, served: Served) -> None:
        self.host, self.served = host, served
        self.programs: list[Program] = []
        self._lock = -1
        self._made = False

    def __enter__(self) -> DevXen:
        while True:  # another run's /dev/xen may go away while we open it
            try:
                DEV_XEN.mkdir()
                self._made = True
            except FileExistsError:
                self._made = False
            try:
                self._lock = os.open(DEV_XEN, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue
            fcntl.flock(self._lock, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._lock), os.stat(DEV_XEN)):
                    return self
            os.close(self._lock)

    def __exit__(self, *_: object) -> None:
        for program in self.programs:
            program.close()
        if self._made:
            with contextlib.suppress(BlockingIOError, FileNotFoundError):  # others have it, too; or have removed it
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                DEV_XEN.rmdir()
        os.close(self._lock)

    # --- programs ----------------------------------------------------------------------------------------------------

    def path(self, domid: int, name: str) -> Path:
        return self.served.mnt / "domains" / str(domid) / name

    def start(self, domid: int, name: str, *words: object) -> Program:
        """tests/devxen/NAME.c as a program of that domain. Its stdin stays open until end()."""
        errors = self.host.root / f"{name}-{domid}-{len(self.programs)}.stderr"
        errors.touch()
        script = 'mount --bind "$1" /dev/xen; exec 2>>"$2"; shift 2; exec "$@"'
        inside = ["unshare", "--mount", "sh", "-ec", script, "sh", self.path(domid, "dev/xen"), errors]
        process = self.host.client("env", "XENSTORED_PATH=/dev/xen/xenbus", *inside, compiled(name), *words)
        program = Program(process, f"{name} of domain {domid}", errors)
        self.programs.append(program)
        return program

    def events(self, domid: int) -> Program:
        return self.start(domid, "events")

    def grants(self, domid: int) -> Program:
        return self.start(domid, "grants")

    # --- what xenfs says of a domain -----------------------------------------------------------------------------------

    def ports(self, domid: int) -> dict[int, dict[str, str]]:
        """The ports of a domain, by number."""
        text = self.host.read(self.path(domid, "inspect/evtchn"))
        return {int(row["port"]): row for row in rows(text, "port")}

    def granted(self, domid: int) -> set[int]:
        """The references that a domain has granted."""
        text = self.host.read(self.path(domid, "inspect/grants"))
        return {int(row["ref"]) for row in rows(text, "ref") if row["ref"]}

    def mapped(self, domid: int) -> set[int]:
        """The handles of what a domain has mapped of others."""
        text = self.host.read(self.path(domid, "inspect/grants"))
        return {int(row["handle"]) for row in rows(text, "handle") if row["handle"]} if "handle" in text else set()

    def mapped_by(self, domid: int, program: Program) -> set[int]:
        """Those of one program. Drivers in xenfs map and unmap as they need."""
        text, name = self.host.read(self.path(domid, "inspect/grants")), f"[{program.process.pid}]"
        found = rows(text, "handle") if "handle" in text else []
        return {int(row["handle"]) for row in found if any(name in cell for cell in row.values())}

    def held(self, *domids: int) -> list[tuple[set[int], set[int], set[int]]]:
        """All of it, to be compared with what it was before."""
        return [(set(self.ports(domid)), self.granted(domid), self.mapped(domid)) for domid in domids]

    def wait_held(self, before: list[tuple[set[int], set[int], set[int]]], *domids: int) -> None:
        """RELEASE comes a moment after close(2) or the end of a process."""
        deadline = time.monotonic() + SETTLE_S
        while (now := self.held(*domids)) != before:
            assert time.monotonic() < deadline, f"held by domains {domids}: {now}, not {before}"
            time.sleep(LOOK_S)

    def wait_port(self, domid: int, port: int, **wanted: str) -> None:
        """Until the row of a port says so; a port that is not there has the state "closed"."""
        deadline = time.monotonic() + SETTLE_S
        while (row := self.ports(domid).get(port, {"state": "closed"})) | wanted != row:
            assert time.monotonic() < deadline, f"port {port} of domain {domid}: {row}, not {wanted}"
            time.sleep(LOOK_S)


def shared(program: Program, access: str, domid: int, pages: int) -> tuple[int, list[int]]:
    """What grants.c gave `domid`: its area and the references."""
    area, *refs = program.numbers("share", access, domid, pages)
    assert len(set(refs)) == pages
    return area, refs


def coherent(*ends: tuple[Program, int]) -> None:
    """What one of grants.c writes to its area the others see in theirs, whoever it is."""
    for seed, (writer, area) in enumerate(ends, 1000):
        writer.ok("fill", area, seed)
        for reader, its_area in ends:
            reader.ok("check", its_area, seed)


def guests(host: Host, count: int) -> list[Path]:
    """Configurations of guests without devices: domains 1, 2 and so on."""
    return [host.config(f"g{i}") for i in range(1, count + 1)]


@contextlib.contextmanager
def served(host: Host, count: int = 2) -> Iterator[DevXen]:
    """So many guests. At the end the server must go as if nothing had happened, whatever programs are still there."""
    with DevXen(host, host.up(*guests(host, count))) as xen:
        yield xen
        if xen.served.process.poll() is None:
            xen.served.stop()
