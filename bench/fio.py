"""fio.py: the workloads, the fio command line for one of them, and what its JSON answer says.

Called by block.py. Everything but `run` and `capture` is a pure function. fio is asked for io_uring and
direct=1, so that the page cache above FUSE takes no part and every request reaches the measured server.

Invariants: a workload's requests fit the file, so fio never extends it; an answer with an error, or without a
single request done, is a FioError and never a figure.
Left out: latencies other than p99 and the mixed read/write patterns, because no target is stated for them.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RAMP_S = 1  # the first second fills the queues and is not counted
# What fio may take beyond ramp and run (start, layout checks, last requests) before it counts as hung.
GRACE_S = 60
REAP_S = 1.0


class FioError(Exception):
    """fio is missing, ended badly, or its answer holds no figure."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One row of the table: `rw` is fio's word, `targets` the ratios of our IOPS to a peer's to aim at."""

    name: str
    title: str
    rw: str
    block: str
    depth: int
    targets: tuple[tuple[str, float], ...]

    @property
    def direction(self) -> str:
        """The half of fio's job record that holds the figures."""
        return "write" if "write" in self.rw else "read"


@dataclass(frozen=True, slots=True)
class Figures:
    """What one fio job did: requests per second, bytes per second, and the 99th percentile of its latency."""

    iops: float
    bytes_per_s: float
    p99_us: float


def _workload(rw: str, block: str, depth: int, qsd: float, nbdfuse: float) -> Workload:
    name = f"{block}-{rw}-qd{depth}"
    return Workload(name, f"{block} {rw} QD{depth}", rw, block, depth, (("qsd", qsd), ("nbdfuse", nbdfuse)))


WORKLOADS = (
    _workload("randread", "4k", 16, 1.5, 2.5),
    _workload("randwrite", "4k", 16, 1.1, 1.5),
    _workload("randread", "64k", 8, 1.4, 2.5),
    _workload("read", "1m", 4, 3.0, 2.5),
    _workload("write", "1m", 4, 0.9, 1.4),
    _workload("randread", "4k", 1, 0.95, 1.0),
    _workload("randwrite", "4k", 1, 0.95, 1.0),
)


def select(names: Sequence[str]) -> tuple[Workload, ...]:
    """The workloads of these names, in the table's order; ValueError names the ones there are."""
    unknown = sorted(set(names) - {workload.name for workload in WORKLOADS})
    if unknown:
        known = ", ".join(workload.name for workload in WORKLOADS)
        raise ValueError(f"no workload {', '.join(unknown)}; there are: {known}")
    return tuple(workload for workload in WORKLOADS if workload.name in names)


def command(
    workload: Workload, files: Sequence[Path], size_bytes: int, seconds: int, ramp_s: int
) -> list[str]:
    """The fio command line: one job for each file, all at the same time, each with its own figures."""
    argv = [
        "fio",
        "--output-format=json",
        "--thread",  # one process: killing it leaves no job behind
        "--ioengine=io_uring",
        "--direct=1",
        "--time_based",
        f"--rw={workload.rw}",
        f"--bs={workload.block}",
        f"--iodepth={workload.depth}",
        f"--size={size_bytes}",
        f"--runtime={seconds}",
        f"--ramp_time={ramp_s}",
    ]
    for number, file in enumerate(files):
        # fio splits a file name at ':'.
        argv += [f"--name=job{number}", "--filename=" + str(file).replace(":", "\\:")]
    return argv


def parse(text: str, workload: Workload) -> list[Figures]:
    """fio's JSON answer -> one Figures per job. fio may print warnings before the JSON; they are skipped."""
    start = text.find("{")
    if start < 0:
        raise FioError(f"fio printed no JSON: {text.strip()[-300:] or 'nothing at all'}")
    try:
        answer = json.JSONDecoder().raw_decode(text[start:])[0]
        return [_figures(job, workload) for job in answer["jobs"]]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise FioError(f"fio's answer is not understood: {error!r}") from error


def _figures(job: dict[str, Any], workload: Workload) -> Figures:
    if job["error"]:
        raise FioError(f"fio's job {job['jobname']} failed with errno {job['error']}")
    half = job[workload.direction]
    if not half["total_ios"]:
        raise FioError(f"fio's job {job['jobname']} completed no request")
    p99_ns = half["clat_ns"]["percentile"]["99.000000"]
    return Figures(float(half["iops"]), float(half["bw_bytes"]), float(p99_ns) / 1000)


def run(
    workload: Workload, files: Sequence[Path], size_bytes: int, seconds: int, ramp_s: int = RAMP_S
) -> list[Figures]:
    """Measure; one Figures per file. Raises FioError, also when fio hangs because the server does."""
    argv = command(workload, files, size_bytes, seconds, ramp_s)
    try:
        code, output, errors = capture(argv, seconds + ramp_s + GRACE_S)
    except FileNotFoundError as error:
        raise FioError("fio is not installed (Debian package: fio)") from error
    except subprocess.TimeoutExpired as error:
        raise FioError(f"fio did not end within {error.timeout:.0f} s") from error
    if code:
        raise FioError(f"fio ended with {code}: {(errors or output).strip()[-300:]}")
    figures = parse(output, workload)
    if len(figures) != len(files):
        raise FioError(f"fio answered for {len(figures)} jobs, not {len(files)}")
    return figures


def capture(argv: Sequence[str], timeout_s: float) -> tuple[int, str, str]:
    """Run a program that touches a server's mount -> (exit code, stdout, stderr).

    Unlike subprocess.run, this waits only REAP_S for a child it had to kill: a request that a hung server
    has already read cannot be interrupted, so such a child goes when the server does. Raises OSError and
    TimeoutExpired.
    """
    child = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, errors = child.communicate(timeout=timeout_s)
    except BaseException:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(REAP_S)
        for pipe in (child.stdout, child.stderr):
            if pipe:
                pipe.close()
        raise
    return child.returncode, output, errors
