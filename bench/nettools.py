"""nettools.py: the network's workloads, the iperf3 or ping command of each, and what these two say.

Called by net.py. Everything but `measure`, `serving` and `execute` is a pure function. iperf3 is believed on what its
receiver counted. `ping -A` sends the next packet when the answer to the last one is there: back to back, each with its time.

Invariants: an answer with an error, or without a single packet received, is a ToolError and never a figure; what a tool
prints goes to a file, so that nobody has to wake up and read while it measures.
Left out: iperf3's jitter (a difference of two clocks' readings) and its retransmissions, for which no target is stated.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench import interrupt

GRACE_S = 15.0  # what a tool may take beyond its measuring time before it counts as hung
LISTEN_S = 5.0
POLL_S = 0.005
PING_INTERVAL_S = 0.01
MTU, JUMBO_MTU = 1500, 9000
PING_TIME = re.compile(r"time=([0-9.]+) ms")
Targets = tuple[tuple[str, float], ...]


class ToolError(Exception):
    """A tool is missing, ended badly, or its answer holds no figure."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table. `targets`: ratios of our figure to a peer's to aim at; at most that if `lower` is better."""

    name: str
    what: str
    unit: str
    digits: int = 0
    lower: bool = False
    targets: Targets = ()

    @property
    def title(self) -> str:
        return f"{self.what}, {self.unit}"


@dataclass(frozen=True, slots=True)
class Work:
    """One measurement: `client` and `server` are places of a Site; its figures are those of `rows`, in that order."""

    name: str
    title: str
    kind: str  # tcp, udp, adaptive, paced
    rows: tuple[Row, ...]
    client: str = "guest1"
    server: str = "host"
    reverse: bool = False  # the server sends
    streams: int = 1
    payload: int = 0
    mtu: int = MTU

    @property
    def cpu(self) -> Row | None:
        """What the server's processes cost, per amount of data; pings carry none."""
        match self.kind:
            case "tcp":
                return Row(f"{self.name}-cpu", self.title, "ms per Gbit", 1, lower=True)
            case "udp":
                return Row(f"{self.name}-cpu", self.title, "s per Mpacket received", 2, lower=True)
        return None


def _tcp(
    short: str, title: str, server: str, streams: int, targets: Targets = (), reverse: bool = False, mtu: int = MTU
) -> Work:
    name = f"tcp-{short}-{streams}" + ("" if mtu == MTU else f"-mtu{mtu}")
    title = f"TCP {title}, {streams} stream{'s' if streams > 1 else ''}" + ("" if mtu == MTU else f", MTU {mtu}")
    rows = (Row(name, title, "Gbit/s", 2, targets=targets),)
    return Work(name, title, "tcp", rows, server=server, streams=streams, reverse=reverse, mtu=mtu)


def _udp(payload: int, targets: Targets = ()) -> Work:
    name, title = f"udp-{payload}", f"UDP guest to host, {payload} bytes"
    rows = (Row(name, title, "packets/s", targets=targets), Row(f"{name}-loss", f"{title}, lost", "%", 1, lower=True))
    return Work(name, title, "udp", rows, payload=payload)


def _ping(kind: str, title: str, targets: Targets = ()) -> Work:
    name = f"ping-{kind}"
    middle = Row(f"{name}-median", f"{title}, median", "us", lower=True, targets=targets)
    return Work(name, title, kind, (middle, Row(f"{name}-p99", f"{title}, p99", "us", lower=True)))


TO_HOST, TO_GUEST = (("vde2", 6.0), ("veth", 0.4)), (("vde2", 4.0),)
WORKS = (
    _tcp("guest-host", "guest to host", "host", 1, TO_HOST),
    _tcp("guest-host", "guest to host", "host", 4, TO_HOST),
    _tcp("host-guest", "host to guest", "host", 1, reverse=True),
    _tcp("host-guest", "host to guest", "host", 4, reverse=True),
    _tcp("guest-guest", "guest to guest", "guest2", 1, TO_GUEST),
    _tcp("guest-guest", "guest to guest", "guest2", 4, TO_GUEST),
    _tcp("guest-host", "guest to host", "host", 1, mtu=JUMBO_MTU),
    _udp(64, (("vde2", 1.5),)),
    _udp(1400),
    _ping("adaptive", "round trip, back to back", (("vde2", 1.0),)),
    _ping("paced", "round trip, every 10 ms"),
)


def select(names: Sequence[str]) -> tuple[Work, ...]:
    """The workloads of these names, in the table's order; ValueError names the ones there are."""
    unknown = sorted(set(names) - {work.name for work in WORKS})
    if unknown:
        raise ValueError(f"no workload {', '.join(unknown)}; there are: {', '.join(work.name for work in WORKS)}")
    return tuple(work for work in WORKS if work.name in names)


CONGESTION = "cubic"


def within(namespace: str, *argv: str) -> list[str]:
    """The command that runs `argv` in a network namespace, as the process that nsenter was."""
    return ["nsenter", f"--net=/run/netns/{namespace}", *argv]


def command(work: Work, address: str, seconds: int) -> list[str]:
    """The client's command line."""
    match work.kind:
        case "tcp":
            # Linux's default everywhere, whatever this machine's is: it decides how many frames are under way
            argv = ["iperf3", "-c", address, "-J", "-t", str(seconds), "-P", str(work.streams), "-C", CONGESTION]
            return [*argv, "-R"] if work.reverse else argv
        case "udp":
            return ["iperf3", "-c", address, "-J", "-t", str(seconds), "-u", "-b", "0", "-l", str(work.payload)]
        case "adaptive":
            return ["ping", "-n", "-A", "-w", str(seconds), address]
    count = max(1, round(seconds / PING_INTERVAL_S))
    return ["ping", "-n", "-c", str(count), "-i", str(PING_INTERVAL_S), address]


def parse(work: Work, text: str) -> tuple[float, ...]:
    """What the client printed -> the figures of work.rows."""
    if work.kind in ("adaptive", "paced"):
        return parse_pings(text)
    try:
        answer = json.loads(text)
        if "error" in answer:
            raise ToolError(f"iperf3: {answer['error']}")
        end = answer["end"]
        return _received(end) if work.kind == "udp" else (_gbit(end),)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ToolError(f"iperf3's answer is not understood: {error!r}") from error


def _gbit(end: dict[str, Any]) -> float:
    rate = float(end["sum_received"]["bits_per_second"])
    if rate <= 0:
        raise ToolError("iperf3's receiver got nothing")
    return rate / 1e9


def _received(end: dict[str, Any]) -> tuple[float, float]:
    """Packets per second that the receiver counted, and the share of what was sent that it did not, in percent."""
    there, sent = end["sum_received"], int(end["sum_sent"]["packets"])
    received = int(there["packets"]) - int(there["lost_packets"])
    if received <= 0:
        raise ToolError("iperf3's receiver got nothing")
    return received / float(there["seconds"]), max(0.0, 100 * (1 - received / sent))


def parse_pings(text: str) -> tuple[float, float]:
    """Median and 99th percentile in us; lost ones have no time and are not in it."""
    times_us = sorted(float(found) * 1000 for found in PING_TIME.findall(text))
    if not times_us:
        raise ToolError("ping got no answer")
    return median(times_us), times_us[math.ceil(0.99 * len(times_us)) - 1]


def measure(work: Work, client: str, server: str, address: str, seconds: int) -> tuple[float, ...]:
    """Run it from the namespace `client` to `address` in `server`; the figures of work.rows. ToolError."""
    argv = within(client, *command(work, address, seconds))
    if work.kind in ("adaptive", "paced"):
        return parse(work, execute(argv, seconds + GRACE_S))
    with serving(server):
        return parse(work, execute(argv, seconds + GRACE_S))


@contextlib.contextmanager
def serving(namespace: str) -> Iterator[None]:
    """An iperf3 that listens there, for this one client: a test that went wrong leaves nothing for the next."""
    argv = within(namespace, "iperf3", "-s", "-1", "--forceflush")
    with tempfile.TemporaryFile() as output, _child(argv, output, output) as server:
        deadline = time.monotonic() + LISTEN_S
        while b"listening" not in _content(output):
            if server.poll() is not None or time.monotonic() > deadline:
                raise ToolError(f"iperf3 does not listen: {_content(output).decode(errors='replace').strip()[-300:]}")
            time.sleep(POLL_S)
        yield


def execute(argv: Sequence[str], timeout_s: float) -> str:
    """Run a tool -> what it printed. ToolError, also when it does not end in time."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        with _child(argv, output, errors) as child:
            try:
                code = child.wait(timeout_s)
            except subprocess.TimeoutExpired as error:
                raise ToolError(f"{' '.join(argv)} did not end within {timeout_s:.0f} s") from error
        text = _content(output).decode(errors="replace")
        if code and not text.startswith("{"):  # iperf3 says in its JSON what was wrong
            said = _content(errors).decode(errors="replace").strip() or text.strip()
            raise ToolError(f"{' '.join(argv)} ended with {code}: {said[-300:]}")
        return text


@contextlib.contextmanager
def _child(argv: Sequence[str], output: Any, errors: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A child that is gone at the end of the block, in a session of its own: a terminal's Ctrl-C is for us alone."""
    child = None
    try:
        with interrupt.held():
            child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True)
        yield child
    except FileNotFoundError as error:
        raise ToolError(f"{argv[0]} is not installed") from error
    finally:
        if child:
            child.kill()
            child.wait()


def _content(file: Any) -> bytes:
    """What a child has written so far. Opened again, for the file's position is the child's too."""
    with open(f"/proc/self/fd/{file.fileno()}", "rb") as again:
        return again.read()
