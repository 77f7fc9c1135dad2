"""block.py: `python -m bench.block`, the same fio workloads on our disk and on those of other FUSE servers.

Run by hand, as root. All peers serve one raw image, written in full and kept in the page cache, one at a
time: within a round they take turns at each workload, so that figures that are compared were taken seconds
apart, and the order rotates from round to round. Before each turn the image is synced and read once.

Invariants: what this starts, mounts or creates is gone when it ends, also after an error or a signal; timing
never makes it fail: the exit code is 1 only if something could not be run, and the rest is still measured.
Left out: pinning to cores and frequency control, which a shared machine does not offer; hence the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType

from bench import fio, peers, report

MIB = 1 << 20
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
SIZE_BYTES, ROUNDS, SECONDS, IDLE_S = 1 << 30, 3, 4, 5
QUICK_SIZE_BYTES, QUICK_ROUNDS, QUICK_SECONDS, QUICK_IDLE_S = 256 * MIB, 1, 1, 2
WORK_S = 1  # of each workload, before idling is measured
MOST_DISKS = 16
# What has a meaning in the option strings of qemu and fio, in xl.cfg or in /proc/mounts is refused.
PLAIN_PATH = re.compile(r"/[A-Za-z0-9._/+-]*")
DISK_WORKLOADS = ("4k-randread-qd16", "1m-read-qd4")
SKIPPABLE = "empty"  # in the default list though a checkout may not have it
TROUBLE = (fio.FioError, peers.PeerFailure, OSError)


def parse_size(text: str) -> int:
    """ "1G" -> bytes. Whole MiB and at least 16, so that the requests of every workload fit."""
    match = re.fullmatch(r"([0-9]{1,12})([KMG]?)", text.upper())
    size_bytes = int(match[1]) * UNITS[match[2]] if match else 0
    if size_bytes < 16 * MIB or size_bytes % MIB:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 512M or 1G: whole MiB, at least 16M")
    return size_bytes


def parse_count(least: int, most: int) -> Callable[[str], int]:
    """-> a parser of numbers within these bounds."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} to {most}")
        return int(text)

    return parse


def parse_names(text: str) -> tuple[str, ...]:
    """ "a,b" -> its names; "none" -> no name."""
    return () if text == "none" else tuple(dict.fromkeys(text.split(",")))


def parse_folder(text: str) -> Path:
    """An existing folder whose real path needs no quoting anywhere."""
    path = Path(text).resolve()
    if not path.is_dir() or not PLAIN_PATH.fullmatch(str(path)):
        raise argparse.ArgumentTypeError(f"{text!r} is no folder, or its path holds more than A-Za-z0-9._/+-")
    return path


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; ends the process with a message and code 2 if it makes no sense."""
    known = ", ".join(peer.name for peer in peers.PEERS)
    parser = argparse.ArgumentParser("python -m bench.block", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=parse_count(1, 100), help=f"default {ROUNDS}")
    parser.add_argument("--seconds", type=parse_count(1, 600), help=f"of each measurement, default {SECONDS}")
    parser.add_argument("--size", type=parse_size, help="of the image, default 1G")
    parser.add_argument("--quick", action="store_true", help="one short round on a small image")
    parser.add_argument("--peers", type=parse_names, default="xenfs,qsd,nbdfuse,empty", help=f"of: {known}")
    parser.add_argument("--workloads", type=parse_names, help="names as in results.json, or none")
    parser.add_argument("--disks", type=parse_count(2, MOST_DISKS), help="also xenfs on 1 to this many disks")
    parser.add_argument("--dir", type=parse_folder, default="/var/tmp", help="for the image; /var/tmp")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="default bench/results")
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    options.seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    options.size = options.size or (QUICK_SIZE_BYTES if options.quick else SIZE_BYTES)
    options.idle = QUICK_IDLE_S if options.quick else IDLE_S
    every = tuple(workload.name for workload in fio.WORKLOADS)
    try:
        chosen = fio.select(DISK_WORKLOADS if options.workloads is None else options.workloads)
        options.disk_workloads = chosen or fio.select(DISK_WORKLOADS)
        options.workloads = fio.select(every if options.workloads is None else options.workloads)
        options.peers = select_peers(options.peers)
    except ValueError as error:
        parser.error(str(error))
    if not options.workloads and not options.disks:
        parser.error("--workloads none without --disks leaves nothing to do")
    if os.geteuid() != 0:
        parser.error("must run as root: it mounts, and other servers' files under FUSE are root's")
    if not shutil.which("fio"):
        parser.error("fio is not installed (Debian package: fio)")
    return options


def select_peers(names: Sequence[str]) -> tuple[peers.Peer, ...]:
    """The peers of these names, in this order; ValueError names the ones there are."""
    known = {peer.name: peer for peer in peers.PEERS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no peer {', '.join(unknown)}; there are: {', '.join(known)}")
    return tuple(known[name] for name in names)


def rotated(items: Sequence[peers.Peer], by: int) -> list[peers.Peer]:
    """The same items, starting `by` places further on: nobody always comes after the same neighbour."""
    start = by % len(items) if items else 0
    return [*items[start:], *items[:start]]


def say(text: str) -> None:
    """Progress goes to stderr, so that stdout holds the tables only."""
    print(text, file=sys.stderr, flush=True)


@dataclass(slots=True)
class Bench:
    """One run: what was asked for, the folder it works in, and what it found out so far."""

    options: argparse.Namespace
    work: Path
    results: report.Results
    images: list[Path] = field(default_factory=list)
    started: int = 0

    def create_images(self, count: int) -> None:
        """Write images in full, with bytes no file system can leave out: allocated and in the page cache."""
        size_bytes: int = self.options.size
        need = (count - len(self.images)) * size_bytes
        if shutil.disk_usage(self.work).free < need + need // 10:
            raise OSError(f"{self.work} has not enough space for {need // MIB} MiB and a tenth more")
        while len(self.images) < count:
            image = self.work / f"image{len(self.images)}.raw"
            say(f"writing {image}, {size_bytes // MIB} MiB")
            with image.open("xb") as file:
                for _ in range(size_bytes // MIB):
                    file.write(os.urandom(MIB))
                file.flush()
                os.fsync(file.fileno())
            self.images.append(image)

    def level(self, images: Sequence[Path]) -> None:
        """The same start for everybody: nothing left to write back, everything in the page cache."""
        buffer = bytearray(MIB)
        for image in images:
            with image.open("rb", buffering=0) as file:
                os.fsync(file.fileno())
                while file.readinto(buffer):
                    pass

    @contextlib.contextmanager
    def server(self, peer: peers.Peer, images: Sequence[Path]) -> Iterator[peers.Server]:
        """A peer started freshly on these images."""
        self.level(images)
        self.started += 1
        with peers.running(peer, images, self.work / f"{self.started}-{peer.name}") as server:
            yield server

    def attempt(self, what: str, step: Callable[[], str]) -> None:
        """Do one step and say how it went; trouble is written down and the rest goes on."""
        try:
            say(f"{what}: {step()}")
        except TROUBLE as trouble:
            self.results.failures.append(f"{' '.join(what.split())}: {trouble}")
            say(f"{what}: FAILED: {trouble}")

    def turn(self, workload: fio.Workload, number: int, peer: peers.Peer) -> str:
        """One measurement of one peer."""
        with self.server(peer, self.images[:1]) as server:
            figures = fio.run(workload, server.files, server.size_bytes, self.options.seconds)[0]
            self.results.samples.append(
                report.Sample(
                    workload.name, peer.name, number, figures.iops, figures.bytes_per_s, figures.p99_us
                )
            )
        return f"{figures.iops:,.0f} IOPS, p99 {figures.p99_us:,.0f} us"

    def rest(self, peer: peers.Peer) -> str:
        """A little of every workload, then nothing: CPU and wake-ups while idle, and memory."""
        with self.server(peer, self.images[:1]) as server:
            for workload in self.options.workloads:
                fio.run(workload, server.files, server.size_bytes, WORK_S, ramp_s=0)
            idle = peers.idle(server, self.options.idle)
            self.results.idle.append(idle)
        used = f"{idle.cpu_percent:.2f} % CPU, {idle.wakeups_per_s:.1f} wake-ups/s"
        return f"{used}, {idle.pss_mib:.1f} MiB Pss"

    def share(self, workload: fio.Workload, number: int, disks: int) -> str:
        """fio on the first `disks` disks of a xenfs that has all of them."""
        (ours,) = select_peers([report.OURS])
        with self.server(ours, self.images) as server:
            found = fio.run(workload, server.files[:disks], server.size_bytes, self.options.seconds)
            for disk, figures in enumerate(found):
                self.results.shares.append(report.Share(workload.title, disks, disk, number, figures.iops))
        return " + ".join(f"{figures.iops:,.0f}" for figures in found) + " IOPS"

    def run(self, present: Sequence[peers.Peer]) -> None:
        """All rounds of everything asked for."""
        rounds: int = self.options.rounds
        self.create_images(1)
        for number in range(rounds):
            for workload in self.options.workloads:
                for peer in rotated(present, number):
                    what = f"round {number + 1}/{rounds}  {workload.title:<18} {peer.name:<9}"
                    self.attempt(what, partial(self.turn, workload, number, peer))
        for peer in present if self.options.workloads else ():
            self.attempt(f"idle {peer.name:<9}", partial(self.rest, peer))
        if self.options.disks and any(peer.name == report.OURS for peer in present):
            self.run_disks(rounds)

    def run_disks(self, rounds: int) -> None:
        """How the disks of one xenfs share it."""
        self.create_images(self.options.disks)
        for number in range(rounds):
            for workload in self.options.disk_workloads:
                for disks in range(1, self.options.disks + 1):
                    what = f"round {number + 1}/{rounds}  {workload.title:<18} disks: {disks}"
                    self.attempt(what, partial(self.share, workload, number, disks))


@contextlib.contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    """A new folder, removed at the end - but only once nothing is mounted below it any more."""
    work = Path(tempfile.mkdtemp(prefix="xenfs-bench-", dir=parent))
    try:
        yield work
    finally:
        peers.unmount_below(work)
        shutil.rmtree(work)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """The first signal ends the run through every `finally`; later ones must not cut those short."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: Sequence[str]) -> int:
    """-> 0; 1 if something asked for could not be run; 130 after a signal."""
    options = parse_options(argv)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    results = report.Results(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=report.machine(),
        versions={},
        options={"rounds": options.rounds, "seconds": options.seconds, "image MiB": options.size // MIB},
        workloads=options.workloads,
        peers=(),
    )
    present = []
    for peer in options.peers:
        absence = peers.missing(peer)
        if not absence:
            present.append(peer)
            results.versions[peer.name] = f"{peer.title}: {peers.version(peer)}"
            continue
        say(f"{peer.name} is left out: {absence}")
        if peer.name != SKIPPABLE:
            results.failures.append(f"{peer.name}: {absence}")
    results.peers = tuple(peer.name for peer in present)
    if options.disks and report.OURS not in results.peers:
        results.failures.append(f"--disks: needs {report.OURS} among the peers")
    try:
        with work_folder(options.dir) as work:
            Bench(options, work, results).run(present)
    except KeyboardInterrupt:
        say("interrupted; everything started was ended and removed")
        return 130
    except OSError as error:
        results.failures.append(str(error))
    print(report.text(results))
    for line in report.save(results, options.out):
        say(line)
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
