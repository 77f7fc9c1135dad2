"""report.py: from samples to medians, ratios, tables, files and a plot.

Called by block.py. Everything down to `summary` is a pure function over Results; `save`, `plot` and `machine`
touch files. A figure is always a median over rounds with its least and greatest; a ratio is that of two
medians, and its range is that of the ratios within each round, whose two figures were taken seconds apart.

Invariants: a figure that could not be measured is shown as "-", never as zero.
Left out: statistics beyond the range, which a handful of rounds on a shared machine would not support.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.fio import Workload
from bench.peers import Idle

OURS = "xenfs"
ABSENT = "-"
Row = list[str]


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of one peer."""

    workload: str
    peer: str
    round: int
    iops: float
    bytes_per_s: float
    p99_us: float


@dataclass(frozen=True, slots=True)
class Share:
    """One disk's rate while fio ran on `disks` disks of one xenfs at the same time."""

    workload: str
    disks: int
    disk: int
    round: int
    iops: float


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the range around it."""

    median: float
    low: float
    high: float


@dataclass(slots=True)
class Results:
    """Everything a run found out; `results.json` holds exactly these fields and a summary."""

    date: str
    machine: dict[str, str]
    versions: dict[str, str]
    options: dict[str, int | str]
    workloads: tuple[Workload, ...]
    peers: tuple[str, ...]
    samples: list[Sample] = field(default_factory=list)
    idle: list[Idle] = field(default_factory=list)
    shares: list[Share] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def spread(values: Sequence[float]) -> Spread | None:
    """None for no values at all."""
    return Spread(median(values), min(values), max(values)) if values else None


def of(
    samples: Sequence[Sample], workload: str, peer: str, value: Callable[[Sample], float]
) -> dict[int, float]:
    """One peer's values for one workload, by round."""
    return {s.round: value(s) for s in samples if s.workload == workload and s.peer == peer}


def ratio(samples: Sequence[Sample], workload: str, peer: str) -> Spread | None:
    """Our IOPS to this peer's: of the medians, with the range of the rounds that both finished."""
    ours = of(samples, workload, OURS, lambda s: s.iops)
    theirs = of(samples, workload, peer, lambda s: s.iops)
    paired = [ours[number] / theirs[number] for number in ours.keys() & theirs.keys()]
    if not paired:
        return None
    return Spread(median(ours.values()) / median(theirs.values()), min(paired), max(paired))


def _count(value: Spread | None) -> str:
    return f"{value.median:,.0f} ({value.low:,.0f}-{value.high:,.0f})" if value else ABSENT


def iops_rows(results: Results) -> list[Row]:
    """Header and one row per workload: IOPS of each peer."""
    rows = [["IOPS, median (min-max)", *results.peers]]
    for w in results.workloads:
        cells = [of(results.samples, w.name, peer, lambda s: s.iops) for peer in results.peers]
        rows.append([w.title, *(_count(spread(list(cell.values()))) for cell in cells)])
    return rows


def p99_rows(results: Results) -> list[Row]:
    """Header and one row per workload: the 99th percentile of the latency of each peer."""
    rows = [["p99 latency in us, median (min-max)", *results.peers]]
    for w in results.workloads:
        cells = [of(results.samples, w.name, peer, lambda s: s.p99_us) for peer in results.peers]
        rows.append([w.title, *(_count(spread(list(cell.values()))) for cell in cells)])
    return rows


def ratio_rows(results: Results) -> list[Row]:
    """Header and one row per workload: our IOPS to each other peer's, beside the target if there is one."""
    others = [peer for peer in results.peers if peer != OURS]
    rows = [[f"{OURS} to peer, of medians (by round)", *others]]
    for w in results.workloads:
        targets = dict(w.targets)
        row = [w.title]
        for peer in others:
            found = ratio(results.samples, w.name, peer)
            cell = f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})" if found else ABSENT
            row.append(f"{cell}, target {targets[peer]:g}" if peer in targets else cell)
        rows.append(row)
    return rows


def idle_rows(results: Results) -> list[Row]:
    """Header and one row per peer."""
    rows = [["idle, after work", "CPU %", "wake-ups/s", "Pss MiB", "Rss MiB", "processes", "threads"]]
    for i in results.idle:
        work = [f"{i.cpu_percent:.2f}", f"{i.wakeups_per_s:.1f}"]
        memory = [f"{i.pss_mib:.1f}", f"{i.rss_mib:.1f}"]
        rows.append([i.peer, *work, *memory, str(i.processes), str(i.threads)])
    return rows


def share_rows(results: Results) -> list[Row]:
    """Header and one row per workload and number of disks: each disk's IOPS and its part of one alone."""
    most = max((share.disks for share in results.shares), default=0)
    rows = [["disks of one xenfs", "in sum", *(f"disk {number + 1}" for number in range(most))]]

    def rate(workload: str, disks: int, disk: int) -> float | None:
        found = [s.iops for s in results.shares if (s.workload, s.disks, s.disk) == (workload, disks, disk)]
        return median(found) if found else None

    for workload in dict.fromkeys(share.workload for share in results.shares):
        alone = rate(workload, 1, 0)
        for disks in range(1, most + 1):
            rates = [rate(workload, disks, disk) for disk in range(disks)]
            known = [value for value in rates if value is not None]
            row = [f"{workload} on {disks}", f"{sum(known):,.0f}" if len(known) == disks else ABSENT]
            for value in rates:
                part = f" ({value / alone:.0%} of one alone)" if value is not None and alone else ""
                row.append(ABSENT if value is None else f"{value:,.0f}{part}")
            rows.append(row + [""] * (most - disks))
    return rows


def tables(results: Results) -> list[list[Row]]:
    """The tables there is something to say in, in the order they are shown."""
    found = []
    if results.samples:
        found += [iops_rows(results), p99_rows(results)]
        if OURS in results.peers and len(results.peers) > 1:
            found.insert(1, ratio_rows(results))
    if results.idle:
        found.append(idle_rows(results))
    if results.shares:
        found.append(share_rows(results))
    return found


def text_table(rows: Sequence[Row]) -> str:
    """Aligned columns, the first to the left, a rule below the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def markdown_table(rows: Sequence[Row]) -> str:
    """The same table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


def text(results: Results) -> str:
    """What is printed at the end of a run."""
    parts = [text_table(rows) for rows in tables(results)]
    if results.failures:
        parts.append("\n".join(["could not be run:", *(f"  {failure}" for failure in results.failures)]))
    return "\n\n".join(parts)


def markdown(results: Results) -> str:
    """The page `results.md`."""
    parts = ["# Block devices under FUSE, side by side"]
    facts = {"date": results.date, **results.machine}
    facts |= {name: str(value) for name, value in results.options.items()}
    parts.append("\n".join(f"- {name}: {value}" for name, value in facts.items()))
    parts.append(markdown_table([["peer", "version"], *([*pair] for pair in results.versions.items())]))
    parts += [markdown_table(rows) for rows in tables(results)]
    if results.failures:
        parts.append("\n".join(["Could not be run:\n", *(f"- {failure}" for failure in results.failures)]))
    return "\n\n".join(parts) + "\n"


def summary(results: Results) -> dict[str, dict[str, dict[str, float | None]]]:
    """By workload and peer: median IOPS and p99, and our ratio to it (None where there is none)."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for w in results.workloads:
        found[w.name] = {}
        for peer in results.peers:
            iops = spread(list(of(results.samples, w.name, peer, lambda s: s.iops).values()))
            p99 = spread(list(of(results.samples, w.name, peer, lambda s: s.p99_us).values()))
            ours = ratio(results.samples, w.name, peer) if peer != OURS else None
            found[w.name][peer] = {
                "iops": iops.median if iops else None,
                "p99_us": p99.median if p99 else None,
                "xenfs_to_peer": ours.median if ours else None,
                "target": dict(w.targets).get(peer),
            }
    return found


def save(results: Results, folder: Path) -> list[str]:
    """Write results.json, results.md and results.png; -> a line for each, or for why it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    record = dataclasses.asdict(results) | {"summary": summary(results)}
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "results.md").write_text(markdown(results))
    return [f"wrote {folder / 'results.json'}", f"wrote {folder / 'results.md'}", plot(results, folder)]


def plot(results: Results, folder: Path) -> str:
    """Write results.png, one panel per workload, bars with their ranges; -> a line on how it went."""
    if not results.samples:
        return "no plot: nothing was measured side by side"
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        return "no plot: matplotlib is not installed (pip install 'xenfs[bench]')"
    matplotlib.use("Agg")  # no display is needed
    pyplot = importlib.import_module("matplotlib.pyplot")
    count = len(results.workloads)
    figure, axes = pyplot.subplots(1, count, figsize=(2.6 * count + 1, 4), squeeze=False)
    for axis, workload in zip(axes[0], results.workloads, strict=True):
        for place, peer in enumerate(results.peers):
            found = spread(list(of(results.samples, workload.name, peer, lambda s: s.iops).values()))
            if found:
                reach = [[found.median - found.low], [found.high - found.median]]
                axis.bar(place, found.median, yerr=reach, color=f"C{place}", capsize=3)
        axis.set_title(workload.title, fontsize=9)
        axis.set_xticks(range(len(results.peers)), results.peers, rotation=60, fontsize=8)
        axis.tick_params(axis="y", labelsize=7)
    axes[0][0].set_ylabel("IOPS, median and range")
    figure.tight_layout()
    figure.savefig(folder / "results.png", dpi=120)
    pyplot.close(figure)
    return f"wrote {folder / 'results.png'}"


def machine() -> dict[str, str]:
    """CPU model, cores, memory and kernel of this machine."""
    info = Path("/proc/cpuinfo").read_text()
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "CPU": models[0] if models else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory_bytes / 2**30:.1f} GiB",
        "kernel": platform.release(),
    }
