"""xenstore.py: `python -m bench.xenstore`, the same requests through libxenstore to our xenstore, Xen's own and oxenstored.

Run by hand, as root. The client is xenstore.c, compiled here. Each server stands once for each size of the tree, which is
written first, and only one is asked at a time: within a round they take turns at each operation, so that figures that are
compared were taken seconds apart, and the order rotates from round to round. Then a xenfs with a disk, a network and the
largest tree: what others have to wait for while its store is flooded.

Invariants: what this starts or creates is gone when it ends, also after an error or a signal; nothing reaches the
machine's own network or xenstore; timing never makes it fail: the exit code is 1 only if something could not be run, and
the rest is still measured.
Left out: pinning to cores and frequency control, which a shared machine does not offer; hence the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench import fio, interrupt, netpeers, nettools, realstore, xenreport
from bench.block import MIB, parse_count, parse_folder, parse_names, say, work_folder
from bench.peers import POLL_S, REPOSITORY, PeerFailure, parse_fields, parse_stat, unmount_below
from bench.report import OURS, machine
from bench.xenreport import ELSEWHERE, HERE, QUIET, Flood, Operation

SOURCE = Path(__file__).with_suffix(".c")
ROUNDS, SECONDS, CONNECTIONS, NODES = 3, 1, (1, 16), (1_000, 100_000)
QUICK_ROUNDS, QUICK_NODES, QUICK_MS = 1, (1_000, 10_000), 250
LEAST_NODES, MOST_NODES, MOST_CONNECTIONS = 1_000, 1_000_000, 47  # each has a directory of 20 to itself
FILL_S, GRACE_S = 300.0, 30.0  # to fill a tree; beyond its time, for the client prepares, and waits for the last answers
FLOOD_MS = 600_000  # it is ended when the measurement ends
DISK_MIB, VICTIM_RAMP_S = 64, 1
MOST_FOLDER = 60  # bytes of its path, of the 107 of a socket's
GUEST = "guest1"
(DISK_WORK,) = fio.select(["4k-randread-qd1"])
NEEDS = (("gcc", "gcc"), ("fio", "fio"), *netpeers.TOOLS)
HEADER = Path("/usr/include/xenstore.h")
TROUBLE = (nettools.ToolError, PeerFailure, fio.FioError, realstore.RealStoreError, OSError)


@dataclass(frozen=True, slots=True)
class Running:
    """A server that listens. `disk` and `network` are ours only: a disk's file, the namespace of a guest."""

    socket: Path
    pid: int
    disk: Path = Path()
    network: str = ""

    def cpu_s(self) -> float:
        return parse_stat(Path(f"/proc/{self.pid}/stat").read_text())[2] / os.sysconf("SC_CLK_TCK")

    def pss_mib(self) -> float:
        return parse_fields(Path(f"/proc/{self.pid}/smaps_rollup").read_text())["Pss"] / 1024


Start = Callable[[Path], contextlib.AbstractContextManager[Running]]


@dataclass(frozen=True, slots=True)
class Server:
    """`start(folder)` is left when the server has ended."""

    name: str
    title: str
    start: Start
    program: str = ""  # of Xen's own


@contextlib.contextmanager
def xenfs(folder: Path, devices: str = "") -> Iterator[Running]:
    """A xenfs with one guest, in a network namespace of its own; PeerFailure, also if it did not end well."""
    with netpeers.Ground(folder.name, folder) as ground:
        ground.namespace("host")
        name = f"bench{os.getpid()}-{folder.name}"
        ground.leave(GUEST, f"xenfs-{name}")
        config, mount, socket = folder / "guest.cfg", folder / "mnt", folder / "store"
        config.write_text(f'name = "{name}"\nmemory = 64\n{devices}')
        mount.mkdir()
        ground.later(lambda: unmount_below(folder))
        bridge = f"{netpeers.BRIDGE}={netpeers.ADDRESSES['host']}/{netpeers.PREFIX_BITS}"
        argv = ("xenfs", "up", "--mount", str(mount), "--xenstored-socket", str(socket), "--bridge", bridge, str(config))
        ground.spawn("host", sys.executable, "-m", *argv, ready=lambda said: b"ready" in said.splitlines())
        yield Running(socket, ground.sessions[0], mount / "domains" / name / "dev" / "xvda", ground.places[GUEST])
    if ground.complaints:
        raise PeerFailure("; ".join(ground.complaints))


@contextlib.contextmanager
def xens_own(kind: type[realstore.RealStore], folder: Path) -> Iterator[Running]:
    """A daemon of Xen's, without a Xen."""
    with kind(folder) as store:
        yield Running(store.socket, store.pid)


SERVERS = (
    Server(OURS, "xenfs", xenfs),
    Server(xenreport.REFERENCE, "C xenstored", partial(xens_own, realstore.RealXenstored), "xenstored"),
    Server("ocaml", "oxenstored", partial(xens_own, realstore.RealOxenstored), "oxenstored"),
)


def parse_numbers(least: int, most: int) -> Callable[[str], tuple[int, ...]]:
    """-> a parser of "1,16": different numbers within these bounds, ascending."""
    one = parse_count(least, most)
    return lambda text: tuple(sorted({one(word) for word in text.split(",")}))


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; ends the process with a message and code 2 if it makes no sense."""
    tables = (SERVERS, xenreport.OPERATIONS, xenreport.FLOODS)
    known, operations, floods = (",".join(each.name for each in table) for table in tables)
    parser = argparse.ArgumentParser("python -m bench.xenstore", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=parse_count(1, 100), help=f"default {ROUNDS}")
    parser.add_argument("--seconds", type=parse_count(1, 600), help=f"of each measurement, default {SECONDS}")
    parser.add_argument("--quick", action="store_true", help="one short round on smaller trees")
    parser.add_argument("--servers", type=parse_names, default=known, help=f"of: {known}")
    parser.add_argument("--operations", type=parse_names, default=operations, help=f"none, or of: {operations}")
    parser.add_argument("--floods", type=parse_names, default=floods, help=f"none, or of: {floods}")
    parser.add_argument("--connections", type=parse_numbers(1, MOST_CONNECTIONS), default=CONNECTIONS, help="default 1,16")
    parser.add_argument("--nodes", type=parse_numbers(LEAST_NODES, MOST_NODES), help="default 1000,100000")
    parser.add_argument("--dir", type=parse_folder, default="/var/tmp", help="for sockets, an image and logs; /var/tmp")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="default bench/results")
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    options.nodes = options.nodes or (QUICK_NODES if options.quick else NODES)
    options.ms = QUICK_MS if options.quick and not options.seconds else 1000 * (options.seconds or SECONDS)
    options.victim_s = math.ceil(options.ms / 1000)
    try:
        options.operations = xenreport.select("operation", xenreport.OPERATIONS, options.operations)
        options.floods = xenreport.select("flood", xenreport.FLOODS, options.floods)
        options.servers = xenreport.select("server", SERVERS, options.servers)
    except ValueError as error:
        parser.error(str(error))
    if len(os.fsencode(options.dir)) > MOST_FOLDER:
        parser.error(f"--dir: sockets' paths are short, and that of a folder for them has at most {MOST_FOLDER} bytes")
    if not options.servers or not (options.operations or options.floods):
        parser.error("without a server, or without an operation or a flood, there is nothing to do")
    if os.geteuid() != 0:
        parser.error("must run as root: it mounts and makes network namespaces")
    if absence := netpeers.missing(NEEDS) or ("" if HEADER.exists() else f"no {HEADER} (Debian package: libxen-dev)"):
        parser.error(absence)
    return options


def build(folder: Path) -> Path:
    """Compile the client."""
    client = folder / "xenstore-bench"
    nettools.execute(("gcc", "-O2", "-Wall", "-Wextra", "-pthread", "-o", str(client), str(SOURCE), "-lxenstore"), GRACE_S)
    return client


Times = tuple[int, float, float, float]  # requests; their median, p99 and longest time in us


class Figures(NamedTuple):
    """What the client says at its end."""

    rate: float
    median_us: float
    p99_us: float
    max_us: float


def parse_client(said: str) -> Figures:
    """The client's last line -> its figures. ToolError if there are none."""
    try:
        answer = json.loads(said.strip().splitlines()[-1])
        figures = Figures(*(float(answer[name]) for name in Figures._fields))
    except (IndexError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise nettools.ToolError(f"the client's answer is not understood: {said.strip()[-300:]!r}") from error
    if figures.rate <= 0:
        raise nettools.ToolError(f"the client did nothing: {answer}")
    return figures


def parse_fio(said: str) -> Times:
    """fio's answer. FioError if there are no times in it."""
    (figures,) = fio.parse(said, DISK_WORK)
    half = json.JSONDecoder().raw_decode(said[said.find("{") :])[0]["jobs"][0][DISK_WORK.direction]
    times = half["clat_ns"]
    return half["total_ios"], times["percentile"]["50.000000"] / 1000, figures.p99_us, times["max"] / 1000


def parse_ping(said: str) -> Times:
    """ping's answer; ToolError."""
    middle, late = nettools.parse_pings(said)
    times = [float(found) * 1000 for found in nettools.PING_TIME.findall(said)]
    return len(times), middle, late, max(times)


def measure(victim: str, running: Running, seconds: int) -> Times:
    """One request at a time to its disk, or from its guest to the host."""
    if victim == "disk":
        argv = fio.command(DISK_WORK, [running.disk], DISK_MIB * MIB, seconds, VICTIM_RAMP_S)
        return parse_fio(nettools.execute(argv, seconds + VICTIM_RAMP_S + GRACE_S))
    argv = nettools.within(running.network, "ping", "-n", "-A", "-w", str(seconds), netpeers.ADDRESSES["host"])
    return parse_ping(nettools.execute(argv, seconds + GRACE_S))


@dataclass(frozen=True, slots=True)
class Store:
    """A server with its tree."""

    server: str
    nodes: int
    running: Running


@dataclass(slots=True)
class Bench:
    """One run: what was asked for, the folder it works in, what stands, and what it found out so far."""

    options: argparse.Namespace
    work: Path
    results: xenreport.Results
    client: Path = Path()
    stores: list[Store] = field(default_factory=list)

    def attempt(self, what: str, step: Callable[[], str]) -> None:
        """Do one step and say how it went; trouble is written down and the rest goes on."""
        try:
            say(f"{what}: {step()}")
        except TROUBLE as trouble:
            self.results.failures.append(f"{' '.join(what.split())}: {trouble}")
            say(f"{what}: FAILED: {trouble}")

    def ask(self, running: Running, mode: str, *numbers: int) -> list[str]:
        """The client's command line: nodes, connections, ms."""
        return ["env", f"XENSTORED_PATH={running.socket}", str(self.client), mode, *map(str, numbers)]

    def start(self, stack: contextlib.ExitStack, server: Server, nodes: int) -> str:
        """Start a server and write its tree."""
        running = self.enter(stack, server.start, self.work / f"{server.name}{nodes}")
        filled = parse_client(nettools.execute(self.ask(running, "fill", nodes, 1, 0), FILL_S))
        pss_mib = running.pss_mib()
        self.results.filled.append(xenreport.Filled(server.name, nodes, filled.rate, pss_mib))
        self.stores.append(Store(server.name, nodes, running))
        return f"{filled.rate:,.0f} nodes/s, {pss_mib:.1f} MiB Pss"

    def enter(self, stack: contextlib.ExitStack, start: Start, folder: Path) -> Running:
        """Start it in this new folder; it is ended with `stack`, and trouble with that is written down."""
        folder.mkdir()
        with contextlib.ExitStack() as own:
            running = own.enter_context(start(folder))
            with interrupt.held():
                stack.callback(self.end, own.pop_all())
        return running

    def end(self, own: contextlib.ExitStack) -> None:
        try:
            own.close()
        except TROUBLE as trouble:
            self.results.failures.append(str(trouble))

    def turn(self, operation: Operation, connections: int, number: int, store: Store) -> str:
        """One measurement of one server."""
        argv = self.ask(store.running, operation.name, store.nodes, connections, self.options.ms)
        cpu_s, start = store.running.cpu_s(), time.monotonic()
        found = parse_client(nettools.execute(argv, self.options.ms / 1000 + GRACE_S))
        busy = (store.running.cpu_s() - cpu_s) / (time.monotonic() - start)
        place = (operation.name, connections, store.nodes, store.server, number)
        self.results.samples.append(xenreport.Sample(*place, *found, 1e6 * busy / found.rate))
        return f"{found.rate:,.0f}/s, p99 {found.p99_us:,.0f} us, longest {found.max_us:,.0f} us"

    @contextlib.contextmanager
    def flooded(self, flood: Flood, store: Store) -> Iterator[list[Figures]]:
        """The flood lasts as long as the block; what it did is then in the list."""
        figures: list[Figures] = []
        argv = self.ask(store.running, flood.mode, store.nodes, flood.connections, FLOOD_MS)
        said = self.work / "flood"
        with contextlib.ExitStack() as undo:
            with interrupt.held(), said.open("wb") as output:
                child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0)
                undo.callback(child.wait)
                undo.callback(child.kill)
            deadline = time.monotonic() + GRACE_S
            while "ready" not in said.read_text():
                if child.poll() is not None or time.monotonic() > deadline:
                    raise nettools.ToolError(f"the flood did not begin: {said.read_text()[-300:]}")
                time.sleep(POLL_S)
            yield figures
            child.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):  # then it has no answer either
                child.wait(GRACE_S)
            figures.append(parse_client(said.read_text()))

    def wait(self, victim: str, number: int, ours: Store, where: str, flood: Flood | None, store: Store | None) -> str:
        """What requests to our disk or network take; meanwhile that store is flooded, if there is one."""
        with contextlib.ExitStack() as stack:
            flooding = stack.enter_context(self.flooded(flood, store)) if flood and store else []
            found = measure(victim, ours.running, self.options.victim_s)
        rate = flooding[0].rate if flooding else 0.0
        self.results.waits.append(xenreport.Wait(victim, flood.name if flood else "", where, number, *found, rate))
        return f"median {found[1]:,.0f} us, p99 {found[2]:,.0f} us, longest {found[3]:,.0f} us; flood {rate:,.0f}/s"

    def run(self) -> None:
        """All rounds of everything asked for."""
        self.client = build(self.work)
        rounds: int = self.options.rounds
        with contextlib.ExitStack() as stack:
            for nodes in self.options.nodes if self.options.operations else self.options.nodes[-1:]:
                for server in self.options.servers:
                    if self.options.operations or server.name != OURS:
                        what = f"{server.name} writes {nodes:,} nodes"
                        self.attempt(what, partial(self.start, stack, server, nodes))
            for number in range(rounds):
                for operation in self.options.operations:
                    for connections in self.options.connections:
                        first = number % len(self.stores) if self.stores else 0  # nobody always follows the same one
                        for store in self.stores[first:] + self.stores[:first]:
                            where = f"{operation.name}-{connections}-{store.nodes} {store.server:<5}"
                            what = f"round {number + 1}/{rounds}  {where:<30}"
                            self.attempt(what, partial(self.turn, operation, connections, number, store))
            if self.options.floods and any(server.name == OURS for server in self.options.servers):
                self.attempt("under load", lambda: self.run_floods(stack))

    def run_floods(self, stack: contextlib.ExitStack) -> str:
        """All rounds of floods, of a xenfs made for it and of another server, if one stands."""
        nodes: int = self.options.nodes[-1]
        image = self.work / "image.raw"
        image.write_bytes(os.urandom(DISK_MIB * MIB))
        vif = f"bridge={netpeers.BRIDGE},ip={netpeers.ADDRESSES[GUEST]}/{netpeers.PREFIX_BITS}"
        devices = f'disk = ["file:{image},xvda,w"]\nvif = ["{vif}"]\n'
        ours = Store(OURS, nodes, self.enter(stack, lambda folder: xenfs(folder, devices), self.work / "devices"))
        nettools.execute(self.ask(ours.running, "fill", nodes, 1, 0), FILL_S)
        others = [store for store in self.stores if store.server != OURS and store.nodes == nodes]
        places = [(ELSEWHERE, store) for store in others[:1]] + [(HERE, ours)]
        for number in range(self.options.rounds):
            for victim in xenreport.VICTIMS:
                cases: list[tuple[str, Flood | None, Store | None]] = [(QUIET, None, None)]
                cases += [(where, flood, store) for flood in self.options.floods for where, store in places]
                for where, flood, store in cases:
                    what = f"{victim}, {flood.name + ' flood ' if flood else ''}{where}"
                    step = partial(self.wait, victim, number, ours, where, flood, store)
                    self.attempt(f"round {number + 1}/{self.options.rounds}  {what:<30}", step)
        return "done"


def version(server: Server) -> str:
    """The program; for our own, the commit and the interpreter."""
    if server.program:
        return f"{server.title}: {realstore.find(server.program)}"
    commit = netpeers.first_line("git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD") or "unknown"
    return f"{server.title}: commit {commit}, Python {sys.version.split()[0]}"


def prepare(options: argparse.Namespace) -> xenreport.Results:
    """What is known before anything runs; of the servers asked for, those that can."""
    load = f"{os.getloadavg()[0]:.2f}"  # figures from a busy machine say little
    facts: dict[str, int | str] = {"rounds": options.rounds, "ms": options.ms, "load before": load}
    package = netpeers.first_line("dpkg-query", "-W", "-f", "${Package} ${Version}\n", "libxenstore4")
    now, asked = datetime.now(UTC), (options.operations, options.connections, options.nodes, options.floods)
    client = {"(client)": package or "libxenstore"}
    results = xenreport.Results(now.isoformat(timespec="seconds"), machine(), client, facts, *asked, servers=())
    for server in options.servers:
        if absence := realstore.missing(server.program) if server.program else "":
            say(f"{server.name} is left out: {absence}")
            results.failures.append(f"{server.name}: {absence}")
        else:
            results.versions[server.name] = version(server)
    options.servers = tuple(server for server in options.servers if server.name in results.versions)
    results.servers = tuple(server.name for server in options.servers)
    return results


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
    print(xenreport.text(results))
    for line in xenreport.save(results, options.out):
        say(line)
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
