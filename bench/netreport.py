"""netreport.py: the network's samples to medians, ratios with verdicts, tables, files and a plot.

Called by net.py. Everything down to `summary` is a pure function over Results. As in report.py a figure is a median over
rounds with its least and greatest, and a ratio is that of two medians with the range of the ratios within each round.

Invariants: what could not be measured is shown as "-", never as zero; a target is reached by the ratio as it is, not as it
is rounded for the table.
Left out: anything about the spread but the range.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.nettools import Row, Work
from bench.peers import Idle
from bench.report import ABSENT, OURS, Spread, markdown_table, spread, text_table

NAME = "net"
PANELS = 4  # of the plot, side by side
Cells = list[str]


@dataclass(frozen=True, slots=True)
class Sample:
    """One figure of one peer; `row` names it."""

    row: str
    peer: str
    round: int
    value: float


@dataclass(slots=True)
class Results:
    """Everything a run found out; `net.json` holds exactly these fields and a summary."""

    date: str
    machine: dict[str, str]
    versions: dict[str, str]
    options: dict[str, int | str]
    works: tuple[Work, ...]
    peers: tuple[str, ...]
    samples: list[Sample] = field(default_factory=list)
    idle: list[Idle] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        return [row for work in self.works for row in work.rows]

    @property
    def cpu_rows(self) -> list[Row]:
        return [work.cpu for work in self.works if work.cpu]


def of(samples: Iterable[Sample], row: str, peer: str) -> dict[int, float]:
    """One peer's values of one row, by round."""
    return {sample.round: sample.value for sample in samples if sample.row == row and sample.peer == peer}


def ratio(samples: Sequence[Sample], row: str, peer: str) -> Spread | None:
    """Our figure to this peer's: of the medians, with the range of the rounds that both finished."""
    ours, theirs = of(samples, row, OURS), of(samples, row, peer)
    paired = [ours[number] / theirs[number] for number in ours.keys() & theirs.keys() if theirs[number]]
    if not paired or not median(theirs.values()):
        return None
    return Spread(median(ours.values()) / median(theirs.values()), min(paired), max(paired))


def verdict(found: Spread | None, target: float, lower: bool) -> str:
    """A target beside what came of it."""
    wanted = f"target {'<=' if lower else '>='} {target:g}"
    if found is None:
        return f"{wanted}: not measured"
    reached = found.median <= target if lower else found.median >= target
    return f"{wanted}: {'reached' if reached else 'not reached'}"


def figure_rows(results: Results, title: str, rows: Sequence[Row]) -> list[Cells]:
    """Header and one line per row: each peer's figure."""
    table = [[title, *results.peers]]
    for row in rows:
        cells = [row.title]
        for peer in results.peers:
            found = spread(list(of(results.samples, row.name, peer).values()))
            cells.append(_figure(found, row.digits) if found else ABSENT)
        table.append(cells)
    return table


def _figure(found: Spread, digits: int) -> str:
    return f"{found.median:,.{digits}f} ({found.low:,.{digits}f}-{found.high:,.{digits}f})"


def ratio_rows(results: Results) -> list[Cells]:
    """Header and one line per row that has ratios: ours to each other peer's, with the target and whether it is reached."""
    others = [peer for peer in results.peers if peer != OURS]
    table = [[f"{OURS} to peer, of medians (by round)", *others]]
    for row in results.rows:
        if row.name.endswith("-loss"):
            continue  # what a ratio of losses would mean is anybody's guess
        targets = dict(row.targets)
        cells = [row.what + (" (lower is better)" if row.lower else "")]
        for peer in others:
            found = ratio(results.samples, row.name, peer)
            cell = f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})" if found else ABSENT
            cells.append(f"{cell}, {verdict(found, targets[peer], row.lower)}" if peer in targets else cell)
        table.append(cells)
    return table


def idle_rows(results: Results) -> list[Cells]:
    """Header and one line per peer that has processes."""
    table = [["idle, two guests connected, after work", "CPU %", "wake-ups/s", "Pss MiB", "processes", "threads"]]
    for i in results.idle:
        cost = [f"{i.cpu_percent:.2f}", f"{i.wakeups_per_s:.1f}", f"{i.pss_mib:.1f}"]
        table.append([i.peer, *cost, str(i.processes), str(i.threads)])
    return table


def tables(results: Results) -> list[list[Cells]]:
    """The tables there is something to say in, in the order they are shown."""
    found = []
    if results.samples:
        found.append(figure_rows(results, "median (min-max)", results.rows))
        if OURS in results.peers and len(results.peers) > 1:
            found.append(ratio_rows(results))
        if results.cpu_rows:
            found.append(figure_rows(results, "CPU of the server's processes, median (min-max)", results.cpu_rows))
    if results.idle:
        found.append(idle_rows(results))
    return found


def text(results: Results) -> str:
    """What is printed at the end of a run."""
    parts = [text_table(rows) for rows in tables(results)]
    parts += results.notes
    if results.failures:
        parts.append("\n".join(["could not be run:", *(f"  {failure}" for failure in results.failures)]))
    return "\n\n".join(parts)


def markdown(results: Results) -> str:
    """The page `net.md`."""
    facts = {"date": results.date, **results.machine} | {name: str(value) for name, value in results.options.items()}
    parts = ["# Virtual networks, side by side", "\n".join(f"- {name}: {value}" for name, value in facts.items())]
    parts.append(markdown_table([["peer", "version"], *([*pair] for pair in results.versions.items())]))
    parts += [markdown_table(rows) for rows in tables(results)]
    parts += results.notes
    if results.failures:
        parts.append("\n".join(["Could not be run:\n", *(f"- {failure}" for failure in results.failures)]))
    return "\n\n".join(parts) + "\n"


def summary(results: Results) -> dict[str, dict[str, dict[str, float | None]]]:
    """By row and peer: the median, our ratio to it and the target (None where there is none)."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for row in [*results.rows, *results.cpu_rows]:
        found[row.name] = {}
        for peer in results.peers:
            value = spread(list(of(results.samples, row.name, peer).values()))
            ours = ratio(results.samples, row.name, peer) if peer != OURS else None
            found[row.name][peer] = {
                "median": value.median if value else None,
                "xenfs_to_peer": ours.median if ours else None,
                "target": dict(row.targets).get(peer),
            }
    return found


def save(results: Results, folder: Path) -> list[str]:
    """Write net.json, net.md and net.png; -> a line for each, or for why it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    record = dataclasses.asdict(results) | {"summary": summary(results)}
    (folder / f"{NAME}.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / f"{NAME}.md").write_text(markdown(results))
    return [f"wrote {folder / f'{NAME}.json'}", f"wrote {folder / f'{NAME}.md'}", plot(results, folder / f"{NAME}.png")]


def plot(results: Results, file: Path) -> str:
    """One panel per row, bars with their ranges; -> a line on how it went."""
    if not results.samples:
        return "no plot: nothing was measured"
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        return "no plot: matplotlib is not installed (pip install 'xenfs[bench]')"
    matplotlib.use("Agg")  # no display is needed
    pyplot = importlib.import_module("matplotlib.pyplot")
    lines = -(-len(results.rows) // PANELS)
    figure, axes = pyplot.subplots(lines, PANELS, figsize=(3 * PANELS, 2.9 * lines), squeeze=False)
    for axis in axes.flat[len(results.rows) :]:
        axis.set_axis_off()
    for axis, row in zip(axes.flat, results.rows, strict=False):
        for place, peer in enumerate(results.peers):
            if found := spread(list(of(results.samples, row.name, peer).values())):
                reach = [[found.median - found.low], [found.high - found.median]]
                axis.bar(place, found.median, yerr=reach, color=f"C{place}", capsize=3)
        axis.set_title(row.what, fontsize=8)
        axis.set_ylabel(row.unit + (", lower is better" if row.lower else ""), fontsize=7)
        axis.set_xticks(range(len(results.peers)), results.peers, fontsize=8)
        axis.tick_params(axis="y", labelsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return f"wrote {file}"
