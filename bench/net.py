"""net.py: `python -m bench.net`, the same iperf3 and ping runs over our vifs and over other virtual networks.

Run by hand, as root. All peers stand side by side, each in network namespaces of its own, and only one carries anything at
a time: within a round they take turns at each workload, so that figures that are compared were taken seconds apart, and
the order rotates from round to round.

Invariants: what this starts or creates is gone when it ends, also after an error or a signal; nothing reaches the
machine's own network; timing never makes it fail: the exit code is 1 only if something could not be run, and the rest is
still measured.
Left out: pinning to cores and frequency control, which a shared machine does not offer; hence the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from bench import interrupt, netpeers, netreport, nettools
from bench.block import parse_count, parse_folder, parse_names, say, work_folder
from bench.peers import SETTLE_S, Idle, PeerFailure
from bench.report import machine

ROUNDS, SECONDS, IDLE_S = 3, 2, 5
QUICK_ROUNDS, QUICK_SECONDS, QUICK_IDLE_S = 1, 1, 2
TROUBLE = (nettools.ToolError, PeerFailure, OSError)


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; ends the process with a message and code 2 if it makes no sense."""
    known = ",".join(peer.name for peer in netpeers.PEERS)
    parser = argparse.ArgumentParser("python -m bench.net", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=parse_count(1, 100), help=f"default {ROUNDS}")
    parser.add_argument("--seconds", type=parse_count(1, 600), help=f"of each measurement, default {SECONDS}")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--peers", type=parse_names, default=known, help=f"of: {known}")
    parser.add_argument("--workloads", type=parse_names, help="names as in net.json")
    parser.add_argument("--dir", type=parse_folder, default="/var/tmp", help="for sockets and logs; /var/tmp")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="default bench/results")
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    options.seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    options.idle = QUICK_IDLE_S if options.quick else IDLE_S
    every = tuple(work.name for work in nettools.WORKS)
    try:
        options.workloads = nettools.select(every if options.workloads is None else options.workloads)
        options.peers = netpeers.select(options.peers)
    except ValueError as error:
        parser.error(str(error))
    if not options.workloads or not options.peers:
        parser.error("without a workload or without a peer there is nothing to do")
    if os.geteuid() != 0:
        parser.error("must run as root: it makes network namespaces")
    if absence := netpeers.missing(netpeers.TOOLS):
        parser.error(absence)
    return options


def rotated(items: Sequence[netpeers.Peer], by: int) -> list[netpeers.Peer]:
    """The same items, starting `by` places further on: nobody always comes after the same neighbour."""
    start = by % len(items) if items else 0
    return [*items[start:], *items[:start]]


def cost(work: nettools.Work, figure: float, cpu_s: float, seconds: float) -> float:
    """CPU of the server: ms per Gbit carried, or s per million packets received."""
    return cpu_s * 1e3 / (figure * seconds) if work.kind == "tcp" else cpu_s * 1e6 / (figure * seconds)


@contextlib.contextmanager
def jumbo(ground: netpeers.Ground, mtu: int) -> Iterator[None]:
    """Every interface has that MTU within the block."""
    if mtu == nettools.MTU:
        yield
        return
    try:
        ground.set_mtu(mtu)
        yield
    finally:
        ground.set_mtu(nettools.MTU)


@dataclass(slots=True)
class Bench:
    """One run: what was asked for, the folder it works in, what stands, and what it found out so far."""

    options: argparse.Namespace
    work: Path
    results: netreport.Results
    grounds: dict[str, netpeers.Ground] = field(default_factory=dict)

    def attempt(self, what: str, step: Callable[[], str]) -> None:
        """Do one step and say how it went; trouble is written down and the rest goes on."""
        try:
            say(f"{what}: {step()}")
        except TROUBLE as trouble:
            self.results.failures.append(f"{' '.join(what.split())}: {trouble}")
            say(f"{what}: FAILED: {trouble}")

    def build(self, stack: contextlib.ExitStack, peer: netpeers.Peer) -> str:
        """Set one peer up, and see that everybody reaches everybody."""
        folder = self.work / peer.name
        folder.mkdir()
        ground = netpeers.Ground(peer.name, folder)
        with contextlib.ExitStack() as own:
            own.enter_context(ground)
            peer.build(ground)
            ground.check()
            with interrupt.held():
                stack.callback(lambda: self.results.failures.extend(ground.complaints))
                stack.push(own.pop_all())
        self.grounds[peer.name] = ground
        return "stands"

    def turn(self, work: nettools.Work, number: int, peer: netpeers.Peer) -> str:
        """One measurement of one peer."""
        ground = self.grounds[peer.name]
        seconds: int = self.options.seconds
        with jumbo(ground, work.mtu):
            before = ground.usage().cpu_s
            client, server = ground.places[work.client], ground.places[work.server]
            figures = nettools.measure(work, client, server, netpeers.ADDRESSES[work.server], seconds)
            cpu_s = ground.usage().cpu_s - before
        for row, figure in zip(work.rows, figures, strict=True):
            self.results.samples.append(netreport.Sample(row.name, peer.name, number, figure))
        if work.cpu and ground.sessions:
            spent = cost(work, figures[0], cpu_s, seconds)
            self.results.samples.append(netreport.Sample(work.cpu.name, peer.name, number, spent))
        pairs = zip(figures, work.rows, strict=True)
        return ", ".join(f"{figure:,.{row.digits}f} {row.unit}" for figure, row in pairs)

    def rest(self) -> str:
        """Nobody carries anything: CPU and wake-ups of all servers over the same seconds."""
        time.sleep(SETTLE_S)
        watched = [ground for ground in self.grounds.values() if ground.sessions]
        start = time.monotonic()
        before = [ground.usage() for ground in watched]
        time.sleep(self.options.idle)
        after = [ground.usage() for ground in watched]
        passed_s = time.monotonic() - start
        for ground, old, new in zip(watched, before, after, strict=True):
            percent = 100 * (new.cpu_s - old.cpu_s) / passed_s
            wakeups = max(0, new.wakeups - old.wakeups) / passed_s
            memory = (new.pss_kib / 1024, new.rss_kib / 1024)
            self.results.idle.append(Idle(ground.name, percent, wakeups, *memory, new.processes, new.threads))
        return ", ".join(f"{i.peer} {i.cpu_percent:.2f} % CPU {i.wakeups_per_s:.1f} wake-ups/s" for i in self.results.idle)

    def run(self, present: Sequence[netpeers.Peer]) -> None:
        """All rounds of everything asked for."""
        rounds: int = self.options.rounds
        with contextlib.ExitStack() as stack:
            for peer in present:
                self.attempt(f"set up {peer.name:<6}", partial(self.build, stack, peer))
            standing = [peer for peer in present if peer.name in self.grounds]
            for number in range(rounds):
                for work in self.options.workloads:
                    for peer in rotated(standing, number):
                        if work.mtu == nettools.MTU or not peer.no_jumbo:
                            what = f"round {number + 1}/{rounds}  {work.title:<37} {peer.name:<6}"
                            self.attempt(what, partial(self.turn, work, number, peer))
            self.attempt("idle", self.rest)


def prepare(options: argparse.Namespace) -> tuple[netreport.Results, list[netpeers.Peer]]:
    """What is known before anything runs, and the peers that can."""
    facts = {"rounds": options.rounds, "seconds": options.seconds, "TCP": nettools.CONGESTION}
    facts["load before"] = f"{os.getloadavg()[0]:.2f}"  # figures from a busy machine say little
    results = netreport.Results(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(),
        versions={"(client)": netpeers.first_line("iperf3", "--version")},
        options=facts,
        works=options.workloads,
        peers=(),
    )
    present = []
    for peer in options.peers:
        if absence := netpeers.missing(peer.needs):
            say(f"{peer.name} is left out: {absence}")
            results.failures.append(f"{peer.name}: {absence}")
            continue
        present.append(peer)
        results.versions[peer.name] = f"{peer.title}: {netpeers.version(peer)}"
        if peer.no_jumbo and any(work.mtu > nettools.MTU for work in options.workloads):
            results.notes.append(f"{peer.name} is not measured with MTU {nettools.JUMBO_MTU}: {peer.no_jumbo}.")
    results.peers = tuple(peer.name for peer in present)
    return results, present


def main(argv: Sequence[str]) -> int:
    """-> 0; 1 if something asked for could not be run; 130 after a signal."""
    options = parse_options(argv)
    interrupt.install()
    try:
        results, present = prepare(options)
        try:
            with work_folder(options.dir) as work:
                Bench(options, work, results).run(present)
        except OSError as error:
            results.failures.append(str(error))
    except KeyboardInterrupt:
        say("interrupted; everything started was ended and removed")
        return 130
    print(netreport.text(results))
    for line in netreport.save(results, options.out):
        say(line)
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
