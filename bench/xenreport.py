"""xenreport.py: xenstore servers' samples to medians, ratios with verdicts, tables, files and a plot.

Called by xenstore.py. Everything down to `summary` is a pure function over Results. As in netreport.py a figure is a median
over rounds with its least and greatest, and a ratio is that of two medians with the range of the ratios within each round;
only the longest that anybody had to wait is the longest of all rounds.

Invariants: what could not be measured is shown as "-", never as zero, and a target that was not measured is not reached.
Left out: anything about the spread but the range.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol, TypeVar

from bench import netreport
from bench.report import ABSENT, OURS, Spread, markdown_table, spread, text_table

NAME = "xenstore"
REFERENCE = "c"
LEAST_TO_REFERENCE = 0.7  # of its operations per second, on one connection
LEAST_GROWN = 0.9  # of the operations per second with the smallest tree: what "does not depend on its size" means here
MOST_ADDED_US = 5000.0  # to the longest wait of a disk or a network
PANELS = 4  # of the plot, side by side
QUIET, HERE, ELSEWHERE = "quiet", "here", "elsewhere"
NOTES = (
    "Every connection is an xs_open() of its own in a thread of its own, all of one process. With several connections, a "
    "write and another's event need two each: 16 are 8 pairs.",
    "The longest wait is that of all rounds. A flood elsewhere is the same one, of another server on this machine: what it "
    "costs by taking processors away. A step of a flood is a write and a read, a listing, or a removal.",
)
Cells = list[str]


class Named(Protocol):
    @property
    def name(self) -> str: ...


Known = TypeVar("Known", bound=Named)


@dataclass(frozen=True, slots=True)
class Operation:
    """One mode of bench/xenstore.c."""

    name: str
    title: str


OPERATIONS = (
    Operation("read", "read"),
    Operation("write", "write"),
    Operation("directory", "directory of 20"),
    Operation("transaction", "transaction: start, read, write, end"),
    Operation("watch-own", "write and its event"),
    Operation("watch-other", "write and another's event"),
    Operation("watch-stream", "events, 32 under way"),
)


@dataclass(frozen=True, slots=True)
class Flood:
    """What hammers a store while its neighbours' latency is measured: a mode of bench/xenstore.c."""

    name: str
    title: str
    mode: str
    connections: int = 1


FLOODS = (
    Flood("rw-1", "writes and reads, 1 connection", "flood-rw"),
    Flood("rw-16", "writes and reads, 16 connections", "flood-rw", 16),
    Flood("list", "a directory of 10,000 listed", "flood-list"),
    Flood("remove", "subtrees of 1,000 nodes written and removed", "flood-remove"),
)
VICTIMS = {"disk": "disk, fio 4k randread QD1", "network": "network, ping back to back"}


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of one server. `cpu_us` is what the server's process spent on one operation."""

    operation: str
    connections: int
    nodes: int
    server: str
    round: int
    rate: float
    median_us: float
    p99_us: float
    max_us: float
    cpu_us: float

    @property
    def row(self) -> str:
        return row(self.operation, self.connections, self.nodes)


@dataclass(frozen=True, slots=True)
class Filled:
    """How a server took its tree: nodes written per second, and its memory afterwards."""

    server: str
    nodes: int
    rate: float
    pss_mib: float


@dataclass(frozen=True, slots=True)
class Wait:
    """What requests to a disk or a network of ours took. `where` the flood was: QUIET (none), HERE or ELSEWHERE."""

    victim: str
    flood: str
    where: str
    round: int
    count: int
    median_us: float
    p99_us: float
    max_us: float
    flood_rate: float = 0.0


@dataclass(slots=True)
class Results:
    """Everything a run found out; `xenstore.json` holds exactly these fields and a summary."""

    date: str
    machine: dict[str, str]
    versions: dict[str, str]
    options: dict[str, int | str]
    operations: tuple[Operation, ...]
    connections: tuple[int, ...]
    nodes: tuple[int, ...]
    floods: tuple[Flood, ...]
    servers: tuple[str, ...]
    samples: list[Sample] = field(default_factory=list)
    filled: list[Filled] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    notes: list[str] = field(default_factory=lambda: [*NOTES])
    failures: list[str] = field(default_factory=list)

    def rows(self) -> list[tuple[Operation, int, int]]:
        """Every operation with each number of connections and each size of the tree."""
        return [(o, c, n) for o in self.operations for c in self.connections for n in self.nodes]


def row(operation: str, connections: int, nodes: int) -> str:
    return f"{operation}-{connections}-{nodes}"


def select(what: str, known: Sequence[Known], names: Sequence[str]) -> tuple[Known, ...]:
    """Those of these names, in this order; ValueError says which there are."""
    table = {each.name: each for each in known}
    if unknown := [name for name in names if name not in table]:
        raise ValueError(f"no {what} {', '.join(unknown)}; there are: {', '.join(table)}")
    return tuple(table[name] for name in names)


def rates(results: Results) -> list[netreport.Sample]:
    """As the network's report knows them."""
    return [netreport.Sample(s.row, s.server, s.round, s.rate) for s in results.samples]


def growth(results: Results, operation: str, connections: int, server: str) -> Spread | None:
    """A server's operations per second with the largest tree to those with the smallest."""
    small, large = (
        netreport.of(rates(results), row(operation, connections, nodes), server)
        for nodes in (min(results.nodes), max(results.nodes))
    )
    paired = [large[number] / small[number] for number in small.keys() & large.keys()]
    if not paired:
        return None
    return Spread(median(large.values()) / median(small.values()), min(paired), max(paired))


def longest_us(results: Results, victim: str, where: str, flood: str = "") -> float | None:
    """The longest wait of all rounds."""
    found = [w.max_us for w in results.waits if (w.victim, w.where, w.flood) == (victim, where, flood)]
    return max(found, default=None)


def added_us(results: Results, victim: str, flood: str) -> float | None:
    """By how much the longest wait became longer through a flood of the same xenfs; below 0 if it became shorter."""
    without, within = longest_us(results, victim, QUIET), longest_us(results, victim, HERE, flood)
    return None if without is None or within is None else within - without


def title(operation: Operation, connections: int, nodes: int | None = None) -> str:
    size = "" if nodes is None else f", {nodes:,} nodes"
    return f"{operation.title}; {connections} connection{'s' if connections > 1 else ''}{size}"


def table(results: Results, head: str, cell: Callable[[list[Sample]], str]) -> list[Cells]:
    """Header and one line per row, with a cell of each server's samples."""
    lines = [[head, *results.servers]]
    for each in results.rows():
        cells = [title(*each)]
        for server in results.servers:
            found = [s for s in results.samples if s.row == row(each[0].name, *each[1:]) and s.server == server]
            cells.append(cell(found) if found else ABSENT)
        lines.append(cells)
    return lines


def ratio_rows(results: Results) -> list[Cells]:
    """Ours to each other server's; the target is of one connection."""
    others = [server for server in results.servers if server != OURS]
    lines = [[f"{OURS} to server, of median rates (by round)", *others]]
    for operation, connections, nodes in results.rows():
        cells = [title(operation, connections, nodes)]
        for server in others:
            found = netreport.ratio(rates(results), row(operation.name, connections, nodes), server)
            aimed = connections == 1 and server == REFERENCE
            cells.append(_spread(found, 2) + (f", {netreport.verdict(found, LEAST_TO_REFERENCE, False)}" if aimed else ""))
        lines.append(cells)
    return lines


def growth_rows(results: Results) -> list[Cells]:
    """Of each server: does an operation cost more in a large tree?"""
    head = f"rate with {max(results.nodes):,} nodes to that with {min(results.nodes):,}"
    lines = [[head, *results.servers]]
    for operation in results.operations:
        for connections in results.connections:
            cells = [title(operation, connections)]
            for server in results.servers:
                found = growth(results, operation.name, connections, server)
                aimed = f", {netreport.verdict(found, LEAST_GROWN, False)}" if server == OURS else ""
                cells.append(_spread(found, 2) + aimed)
            lines.append(cells)
    return lines


def filled_rows(results: Results) -> list[Cells]:
    lines = [["the tree", "nodes", "written, nodes/s", "then Pss, MiB"]]
    return lines + [[f.server, f"{f.nodes:,}", f"{f.rate:,.0f}", f"{f.pss_mib:.1f}"] for f in results.filled]


def wait_rows(results: Results) -> list[Cells]:
    """Header and one line per victim and flood."""
    head = "under load, us: median / p99 / longest"
    lines = [[head, "no flood", "flood elsewhere", "flood here", "flood, steps/s", "added to the longest, ms"]]
    for victim, name in VICTIMS.items():
        for flood in results.floods:
            cells = [f"{name}; {flood.title}"]
            rate = ABSENT
            for where, of_flood in ((QUIET, ""), (ELSEWHERE, flood.name), (HERE, flood.name)):
                found = [w for w in results.waits if (w.victim, w.where, w.flood) == (victim, where, of_flood)]
                cells.append(_latency(found) if found else ABSENT)
                rate = f"{median(w.flood_rate for w in found):,.1f}" if found else ABSENT
            added = added_us(results, victim, flood.name)
            in_ms = None if added is None else Spread(added / 1000, 0, 0)
            shown = f"{added / 1000:.2f}, " if added is not None else ""
            lines.append([*cells, rate, shown + netreport.verdict(in_ms, MOST_ADDED_US / 1000, True)])
    return lines


def _spread(found: Spread | None, digits: int) -> str:
    return f"{found.median:,.{digits}f} ({found.low:,.{digits}f}-{found.high:,.{digits}f})" if found else ABSENT


def _latency(found: Sequence[Sample] | Sequence[Wait]) -> str:
    middle, late = median(f.median_us for f in found), median(f.p99_us for f in found)
    return f"{middle:,.0f} / {late:,.0f} / {max(f.max_us for f in found):,.0f}"


def tables(results: Results) -> list[list[Cells]]:
    """The tables there is something to say in, in the order they are shown."""
    found = []
    if results.samples:
        found.append(table(results, "operations/s, median (min-max)", lambda f: _spread(spread([s.rate for s in f]), 0)))
        if OURS in results.servers and len(results.servers) > 1:
            found.append(ratio_rows(results))
        if len(results.nodes) > 1:
            found.append(growth_rows(results))
        found.append(table(results, "latency in us: median / p99 / longest", _latency))
        found.append(table(results, "the server's CPU for one, us", lambda f: _spread(spread([s.cpu_us for s in f]), 1)))
    if results.filled:
        found.append(filled_rows(results))
    if results.waits:
        found.append(wait_rows(results))
    return found


def text(results: Results) -> str:
    """What is printed at the end of a run."""
    parts = [*(text_table(rows) for rows in tables(results)), *results.notes]
    if results.failures:
        parts.append("\n".join(["could not be run:", *(f"  {failure}" for failure in results.failures)]))
    return "\n\n".join(parts)


def markdown(results: Results) -> str:
    """The page `xenstore.md`."""
    facts = {"date": results.date, **results.machine} | {name: str(value) for name, value in results.options.items()}
    parts = ["# Xenstore servers, side by side", "\n".join(f"- {name}: {value}" for name, value in facts.items())]
    parts.append(markdown_table([["server", "version"], *([*pair] for pair in results.versions.items())]))
    parts += [markdown_table(rows) for rows in tables(results)]
    parts += results.notes
    if results.failures:
        parts.append("\n".join(["Could not be run:\n", *(f"- {failure}" for failure in results.failures)]))
    return "\n\n".join(parts) + "\n"


def summary(results: Results) -> dict[str, dict[str, dict[str, float | None]]]:
    """By row and server: median rate, our ratio to it and the target; by victim and flood: what it added to the longest."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for operation, connections, nodes in results.rows():
        key = row(operation.name, connections, nodes)
        found[key] = {}
        for server in results.servers:
            value = spread([*netreport.of(rates(results), key, server).values()])
            ours = netreport.ratio(rates(results), key, server) if server != OURS else None
            found[key][server] = {
                "rate": value.median if value else None,
                "xenfs_to_server": ours.median if ours else None,
                "target": LEAST_TO_REFERENCE if connections == 1 and server == REFERENCE else None,
            }
    for victim in VICTIMS if results.waits else ():
        found[victim] = {
            flood.name: {"added_us": added_us(results, victim, flood.name), "target": MOST_ADDED_US}
            for flood in results.floods
        }
    return found


def save(results: Results, folder: Path) -> list[str]:
    """Write xenstore.json, .md and .png; -> a line for each, or for why it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    record = dataclasses.asdict(results) | {"summary": summary(results)}
    (folder / f"{NAME}.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / f"{NAME}.md").write_text(markdown(results))
    return [f"wrote {folder / f'{NAME}.json'}", f"wrote {folder / f'{NAME}.md'}", plot(results, folder / f"{NAME}.png")]


def plot(results: Results, file: Path) -> str:
    """One panel per operation: rates with their ranges, for each number of connections and size; one for each victim."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        return "no plot: matplotlib is not installed (pip install 'xenfs[bench]')"
    panels = [*results.operations] if results.samples else []
    victims = [*VICTIMS] if results.waits else []
    if not panels and not victims:
        return "no plot: nothing was measured"
    matplotlib.use("Agg")  # no display is needed
    pyplot = importlib.import_module("matplotlib.pyplot")
    lines = -(-(len(panels) + len(victims)) // PANELS)
    figure, axes = pyplot.subplots(lines, PANELS, figsize=(4 * PANELS, 3.2 * lines), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, operation in zip(axes.flat, panels, strict=False):
        _plot_rates(axis, results, operation)
    for axis, victim in zip(list(axes.flat)[len(panels) :], victims, strict=False):
        _plot_waits(axis, results, victim)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return f"wrote {file}"


def _plot_rates(axis: Any, results: Results, operation: Operation) -> None:
    axis.set_axis_on()
    groups = [(connections, nodes) for connections in results.connections for nodes in results.nodes]
    width = 0.8 / len(results.servers)
    for place, server in enumerate(results.servers):
        for group, (connections, nodes) in enumerate(groups):
            values = netreport.of(rates(results), row(operation.name, connections, nodes), server)
            if found := spread([*values.values()]):
                reach = [[found.median - found.low], [found.high - found.median]]
                axis.bar(group + place * width, found.median, width, yerr=reach, color=f"C{place}", capsize=2)
        axis.bar(place * width, 0, width, color=f"C{place}", label=server)
    middle = 0.4 - width / 2
    axis.set_xticks([group + middle for group in range(len(groups))], [f"{c} conn.\n{n:,}" for c, n in groups], fontsize=7)
    axis.set_title(operation.title + ", operations/s", fontsize=8)
    axis.tick_params(axis="y", labelsize=7)
    axis.legend(fontsize=6)


def _plot_waits(axis: Any, results: Results, victim: str) -> None:
    axis.set_axis_on()
    for place, where in enumerate((QUIET, ELSEWHERE, HERE)):
        for group, flood in enumerate(results.floods):
            if longest := longest_us(results, victim, where, "" if where == QUIET else flood.name):
                axis.bar(group + 0.25 * place, longest / 1000, 0.25, color=f"C{place}")
        axis.bar(0, 0, 0.25, color=f"C{place}", label={QUIET: "no flood", HERE: "flood here"}.get(where, "flood elsewhere"))
    axis.set_xticks([group + 0.25 for group in range(len(results.floods))], [f.name for f in results.floods], fontsize=7)
    axis.set_title(f"{victim}: longest wait under load, ms", fontsize=8)
    axis.tick_params(axis="y", labelsize=7)
    axis.legend(fontsize=6)
