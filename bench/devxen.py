"""devxen.py: `python -m bench.devxen`, Xen's own libraries on our /dev/xen, beside what Unix gives two processes.

Run by hand, as root. The program is devxen.c, compiled here: two processes, each in a domain of one xenfs that serves all of
the run, or one of them in domain 0 and the other domain a guest whose drivers run in xenfs. They do one work through xenfs
and through a socketpair (a mapping: through a memfd), one right after the other; which comes first changes with the round.
A figure is the median over the rounds, a ratio that of two medians; netreport.py makes the tables.

Invariants: what this starts or creates is gone when it ends, also after an error or a signal; timing never makes it fail:
the exit code is 1 only if something could not be run, and the rest is still measured.
Left out: targets. A kernel's pipe is no peer of a server in Python; what the ratios say is what a use of /dev/xen costs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench import interrupt, netpeers, netreport, nettools
from bench.block import MIB, parse_count, parse_folder, parse_names, say, work_folder
from bench.netreport import Results, Sample
from bench.nettools import Row, ToolError
from bench.peers import REPOSITORY, PeerFailure, unmount_below
from bench.report import OURS, machine, markdown_table, text_table
from bench.xenreport import select

SOURCE = Path(__file__).with_suffix(".c")
NAME, UNIX = "devxen", "unix"
PAGE = "-page"  # ends the names of rows that share a call out among its pages
ROUNDS, MS, QUICK_ROUNDS, QUICK_MS = 3, 1000, 1, 100
GRACE_S, TOOL_S = 30.0, 10.0
DISK_MIB = 4
COPY_PAGES = 64  # of one grant copy, as in devxen.c
NEEDS = (("gcc", "gcc"), ("nsenter", "util-linux"), ("ip", "iproute2"), ("readlink", "coreutils"))
HEADER = Path("/usr/include/libxenvchan.h")
LIBRARIES = ("xenevtchn", "xengnttab", "xenvchan")
TROUBLE = (ToolError, PeerFailure, OSError)
NOTES = (
    "unix is a socketpair between the same two processes; for a mapping, a memfd that is mapped, looked at and unmapped. "
    "An event takes half of a round trip, in which each side notifies, reads and unmasks; a socketpair carries one byte. Of "
    "each mapped page one byte is read. A grant copy has 64 segments of 4096 bytes, a vchan two rings of 256 KiB.",
)


@dataclass(frozen=True, slots=True)
class Work(nettools.Work):
    """One call of the program: `kind` is its work, on that many pages."""

    pages: int = 1


class Times(NamedTuple):
    """What the program says of one way."""

    median_us: float
    p99_us: float
    bytes_per_s: float


def _pair(name: str, title: str, kind: str) -> Work:
    middle = Row(f"{name}-median", f"{title}, median", "us", 1, lower=True)
    return Work(name, title, kind, (middle, Row(f"{name}-p99", f"{title}, p99", "us", 1, lower=True)))


def _map(whose: str, title: str, pages: int) -> Work:
    name = f"map-{whose}-{pages}"
    title = f"map and unmap {pages} page{'s' if pages > 1 else ''} of {title}"
    rows = [Row(name, title, "us", 1, lower=True)]
    if pages > 1:
        rows.append(Row(f"{name}{PAGE}", f"{title}, each page", "us", 2, lower=True))
    return Work(name, title, f"map-{whose}", tuple(rows), pages=pages)


def _bulk(name: str, title: str, pages: int = 1) -> Work:
    return Work(name, title, name, (Row(name, title, "GB/s", 2),), pages=pages)


PAGES = (1, 16, 256)
WORKS = (
    _pair("event", "event, notify to read", "event"),
    *(_map("kernel", "a kernel's, in xenfs", pages) for pages in PAGES),
    *(_map("program", "a program's (gntalloc)", pages) for pages in PAGES),
    _bulk("copy-from", "grant copy from another program's pages", COPY_PAGES),
    _bulk("copy-to", "grant copy to another program's pages", COPY_PAGES),
    _bulk("vchan-bulk", "vchan, 1 MiB writes"),
    _pair("vchan-round", "vchan, round trip of 1 byte", "vchan-round"),
)


def figures(work: Work, times: Times) -> tuple[float, ...]:
    """What the program said -> the figures of work.rows."""
    if work.kind == "event":
        return times.median_us / 2, times.p99_us / 2
    if work.kind == "vchan-round":
        return times.median_us, times.p99_us
    if work.kind.startswith("map-"):
        return (times.median_us, times.median_us / work.pages)[: len(work.rows)]
    return (times.bytes_per_s / 1e9,)


def parse(work: Work, said: str) -> dict[str, tuple[float, ...]]:
    """The program's answer -> the figures of work.rows, by way. ToolError if there are none."""
    try:
        answer = json.loads(said)
        found = {way: Times(*(float(answer[way][name]) for name in Times._fields)) for way in (OURS, UNIX)}
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ToolError(f"the program's answer is not understood: {said.strip()[-300:]!r}") from error
    numbers = {way: figures(work, times) for way, times in found.items()}
    for way, row in numbers.items():
        if min(row) <= 0:
            raise ToolError(f"{way} did nothing: {said.strip()}")
    return numbers


def build(folder: Path) -> Path:
    """Compile the program."""
    program = folder / "devxen-bench"
    libraries = (f"-l{name}" for name in LIBRARIES)
    nettools.execute(("gcc", "-O2", "-Wall", "-Wextra", "-o", str(program), str(SOURCE), *libraries), GRACE_S)
    return program


@dataclass(frozen=True, slots=True)
class Domain:
    """How a process becomes one of its programs."""

    dev_xen: Path
    domid: int

    @property
    def words(self) -> tuple[str, str]:
        return str(self.dev_xen), str(self.domid)


@dataclass(frozen=True, slots=True)
class Domains:
    """Of one xenfs: two guests for programs, and one with a disk, whose driver's pages are granted to domain 0."""

    zero: Domain
    one: Domain
    two: Domain
    disk: Domain

    def sides(self, work: Work) -> tuple[str, ...]:
        """Of the process that measures, then of the other one, or of the kernel whose grants are mapped."""
        leader, peer = (self.zero, self.disk) if work.kind == "map-kernel" else (self.one, self.two)
        return leader.words + peer.words


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Domains]:
    """A xenfs with three guests, in a network namespace of its own; PeerFailure, also if it did not end well."""
    image, mount = folder / "image.raw", folder / "mnt"
    image.write_bytes(bytes(DISK_MIB * MIB))
    mount.mkdir()
    with netpeers.Ground("devxen", folder) as ground:
        ground.namespace("host")
        names, configs = [], []
        for guest, devices in (("one", ""), ("two", ""), ("disk", f'disk = ["file:{image},xvda,w"]\n')):
            names.append(f"bench{os.getpid()}-{guest}")
            config = folder / f"{guest}.cfg"
            config.write_text(f'name = "{names[-1]}"\nmemory = 64\n{devices}')
            configs.append(str(config))
        ground.later(lambda: unmount_below(folder))
        argv = ("xenfs", "up", "--mount", str(mount), "--xenstored-socket", str(folder / "store"), *configs)
        ground.spawn("host", sys.executable, "-m", *argv, ready=lambda said: b"ready" in said.splitlines())
        found = [Domain(mount / "domains/0/dev/xen", 0)]
        for name in names:  # in a child with a time limit: a hung server must not hang us
            domid = nettools.execute(("readlink", str(mount / "domains" / name)), TOOL_S).strip()
            found.append(Domain(mount / "domains" / domid / "dev/xen", int(domid)))
        yield Domains(*found)
    if ground.complaints:
        raise PeerFailure("; ".join(ground.complaints))


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; ends the process with a message and code 2 if it makes no sense."""
    every = ",".join(work.name for work in WORKS)
    parser = argparse.ArgumentParser("python -m bench.devxen", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=parse_count(1, 100), help=f"default {ROUNDS}")
    parser.add_argument("--ms", type=parse_count(10, 60_000), help=f"of each measurement, default {MS}")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--works", type=parse_names, default=every, help=f"of: {every}")
    parser.add_argument("--dir", type=parse_folder, default="/var/tmp", help="for mounts, an image and logs; /var/tmp")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="default bench/results")
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    options.ms = options.ms or (QUICK_MS if options.quick else MS)
    try:
        options.works = select("work", WORKS, options.works)
    except ValueError as error:
        parser.error(str(error))
    if not options.works:
        parser.error("without a work there is nothing to do")
    if os.geteuid() != 0:
        parser.error("must run as root: it mounts and makes namespaces")
    if absence := netpeers.missing(NEEDS) or ("" if HEADER.exists() else f"no {HEADER} (Debian package: libxen-dev)"):
        parser.error(absence)
    return options


@dataclass(slots=True)
class Bench:
    """One run: what was asked for, the folder it works in, and what it found out so far."""

    options: argparse.Namespace
    work: Path
    results: Results

    def attempt(self, what: str, step: Callable[[], str]) -> None:
        """Do one step and say how it went; trouble is written down and the rest goes on."""
        try:
            say(f"{what}: {step()}")
        except TROUBLE as trouble:
            self.results.failures.append(f"{' '.join(what.split())}: {trouble}")
            say(f"{what}: FAILED: {trouble}")

    def turn(self, program: Path, domains: Domains, work: Work, number: int) -> str:
        """One measurement, both ways."""
        first = number % 2  # neither always follows the other
        argv = (str(program), work.kind, str(work.pages), str(self.options.ms), str(first), *domains.sides(work))
        found = parse(work, nettools.execute(argv, 2 * self.options.ms / 1000 + GRACE_S))
        for way, numbers in found.items():
            samples = (Sample(row.name, way, number, figure) for row, figure in zip(work.rows, numbers, strict=True))
            self.results.samples.extend(samples)
        (row, *_), ours, theirs = work.rows, found[OURS][0], found[UNIX][0]
        return f"{ours:,.{row.digits}f} {row.unit}, {UNIX} {theirs:,.{row.digits}f}"

    def run(self) -> None:
        """All rounds of everything asked for."""
        program = build(self.work)
        folder = self.work / "xenfs"
        folder.mkdir()
        with served(folder) as domains:
            for number in range(self.options.rounds):
                for work in self.options.works:
                    what = f"round {number + 1}/{self.options.rounds}  {work.name:<16}"
                    self.attempt(what, partial(self.turn, program, domains, work, number))


def prepare(options: argparse.Namespace) -> Results:
    """What is known before anything runs."""
    load = f"{os.getloadavg()[0]:.2f}"  # figures from a busy machine say little
    facts: dict[str, int | str] = {"rounds": options.rounds, "ms": options.ms, "load before": load}
    commit = netpeers.first_line("git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD") or "unknown"
    package = netpeers.first_line("dpkg-query", "-W", "-f", "${Package} ${Version}\n", "libxengnttab1")
    versions = {
        "(libraries)": package or "libxengnttab",
        OURS: f"xenfs: commit {commit}, Python {sys.version.split()[0]}",
        UNIX: f"socketpair and memfd: Linux {os.uname().release}",
    }
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Results(now, machine(), versions, facts, options.works, (OURS, UNIX), notes=[*NOTES])


def tables(results: Results) -> list[list[netreport.Cells]]:
    """Figures, then ratios; what a page costs has that of its call."""
    if not results.samples:
        return []
    works = tuple(replace(w, rows=tuple(row for row in w.rows if not row.name.endswith(PAGE))) for w in results.works)
    measured = netreport.figure_rows(results, "median (min-max)", results.rows)
    return [measured, netreport.ratio_rows(replace(results, works=works))]


def text(results: Results) -> str:
    """What is printed at the end of a run."""
    parts = [*(text_table(rows) for rows in tables(results)), *results.notes]
    if results.failures:
        parts.append("\n".join(["could not be run:", *(f"  {failure}" for failure in results.failures)]))
    return "\n\n".join(parts)


def markdown(results: Results) -> str:
    """The page `devxen.md`."""
    facts = {"date": results.date, **results.machine} | {name: str(value) for name, value in results.options.items()}
    parts = ["# /dev/xen beside what Unix has", "\n".join(f"- {name}: {value}" for name, value in facts.items())]
    parts.append(markdown_table([["way", "version"], *([*pair] for pair in results.versions.items())]))
    parts += [*(markdown_table(rows) for rows in tables(results)), *results.notes]
    if results.failures:
        parts.append("\n".join(["Could not be run:\n", *(f"- {failure}" for failure in results.failures)]))
    return "\n\n".join(parts) + "\n"


def save(results: Results, folder: Path) -> list[str]:
    """Write devxen.json, .md and .png; -> a line for each, or for why it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    record = dataclasses.asdict(results) | {"summary": netreport.summary(results)}
    page, data, drawn = (folder / f"{NAME}.{kind}" for kind in ("md", "json", "png"))
    data.write_text(json.dumps(record, indent=1) + "\n")
    page.write_text(markdown(results))
    return [f"wrote {data}", f"wrote {page}", netreport.plot(results, drawn)]


def main(argv: Sequence[str]) -> int:
    """-> 0; 1 if something asked for could not be run; 130 after a signal."""
    options = parse_options(argv)
    interrupt.install()
    try:
        results = prepare(options)
        try:
            with work_folder(options.dir) as work:
                Bench(options, work, results).run()
        except TROUBLE as trouble:
            results.failures.append(str(trouble))
    except KeyboardInterrupt:
        say("interrupted; everything started was ended and removed")
        return 130
    print(text(results))
    for line in save(results, options.out):
        say(line)
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
