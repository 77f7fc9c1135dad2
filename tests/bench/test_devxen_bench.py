"""Goal: the /dev/xen benchmark says what its program said, in the units it names, and leaves nothing behind.

Method: answers of known content, figures, medians and ratios worked out by hand; the program's own refusals; on a host two
short runs, one of them interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import devxen, netpeers, netreport, nettools
from bench.devxen import Domain, Domains, Times, Work
from bench.peers import REPOSITORY, mounts
from bench.xenreport import select

EVENT, COPY, ROUND = select("work", devxen.WORKS, ["event", "copy-from", "vchan-round"])
ONE_PAGE, PAGES = select("work", devxen.WORKS, ["map-kernel-1", "map-program-256"])
TIMES = {"count": 9, "median_us": 50, "p99_us": 80, "bytes_per_s": 1.5e9}


def answer(**change: object) -> str:
    """The program's, with a change in what it says of xenfs."""
    return json.dumps({"xenfs": TIMES | change, "unix": TIMES | {"median_us": 5, "bytes_per_s": 3e9}}) + "\n"


def results(*samples: netreport.Sample) -> netreport.Results:
    versions = {"xenfs": "xenfs: commit abc"}
    works = (EVENT, PAGES, COPY)
    return netreport.Results(
        "2024-01-01", {"CPU": "a CPU"}, versions, {"rounds": 3}, works, ("xenfs", "unix"), [*samples], notes=["a note"]
    )


def series(row: str, peer: str, *values: float) -> list[netreport.Sample]:
    return [netreport.Sample(row, peer, number, value) for number, value in enumerate(values)]


MEASURED = (
    *series("event-median", "xenfs", 50, 60, 90),
    *series("event-median", "unix", 5, 4, 6),
    *series("map-program-256", "xenfs", 512, 256),
    *series("map-program-256-page", "xenfs", 2, 1),
    *series("copy-from", "xenfs", 1.5, 1.0, 2.0),
    *series("copy-from", "unix", 3.0, 4.0, 2.5),
)


@pytest.mark.parametrize(
    ("work", "figures"),
    [
        (EVENT, (25, 40)),  # half a round trip
        (ROUND, (50, 80)),
        (ONE_PAGE, (50,)),
        (PAGES, (50, 50 / 256)),
        (COPY, (1.5,)),
    ],
)
def test_figures_are_those_of_the_rows(work: Work, figures: tuple[float, ...]) -> None:
    """Goal: each row in its unit.  Method: one answer, as each kind of work takes it."""
    assert devxen.figures(work, Times(50, 80, 1.5e9)) == pytest.approx(figures)
    assert devxen.parse(work, answer())["xenfs"] == pytest.approx(figures)
    assert len(figures) == len(work.rows)


def test_both_ways_are_read() -> None:
    """Goal: what was said of one way is not shown as the other's.  Method: an answer in which they differ."""
    assert devxen.parse(ROUND, answer()) == {"xenfs": (50, 80), "unix": (5, 80)}
    assert devxen.parse(COPY, answer()) == {"xenfs": (1.5,), "unix": (3.0,)}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not understood"),
        ("{", "not understood"),  # it ended before its peer had agreed
        ("[]", "not understood"),
        (json.dumps({"xenfs": TIMES}), "not understood"),
        (answer(median_us="much"), "not understood"),
        (answer(median_us=0), "xenfs did nothing"),
    ],
)
def test_an_answer_without_figures_is_an_error(text: str, complaint: str) -> None:
    """Goal: never a figure that was not measured.  Method: broken answers, each with its message."""
    with pytest.raises(nettools.ToolError, match=complaint):
        devxen.parse(EVENT, text)


def test_a_rate_of_nothing_is_an_error() -> None:
    """Goal: no ratio to zero.  Method: a copy that moved no byte."""
    with pytest.raises(nettools.ToolError, match="xenfs did nothing"):
        devxen.parse(COPY, answer(bytes_per_s=0))


def test_every_row_has_a_name_of_its_own() -> None:
    """Goal: no two rows share their samples.  Method: all works; each can be asked for by its name."""
    rows = [row.name for work in devxen.WORKS for row in work.rows]
    assert len(set(rows)) == len(rows)
    assert select("work", devxen.WORKS, [work.name for work in devxen.WORKS]) == devxen.WORKS


def test_tables_and_ratios() -> None:
    """Goal: medians with their range, ratios of medians with those of the rounds, gaps as gaps.  Method: by hand."""
    assert devxen.tables(results()) == []
    found, ratios = devxen.tables(results(*MEASURED))
    assert found[0] == ["median (min-max)", "xenfs", "unix"]
    assert found[1] == ["event, notify to read, median, us", "60.0 (50.0-90.0)", "5.0 (4.0-6.0)"]
    assert found[2][1:] == ["-", "-"]
    assert found[3][1:] == ["384.0 (256.0-512.0)", "-"]
    assert found[4] == ["map and unmap 256 pages of a program's (gntalloc), each page, us", "1.50 (1.00-2.00)", "-"]
    assert ratios[1] == ["event, notify to read, median (lower is better)", "12.00 (10.00-15.00)"]
    assert [row[0] for row in ratios if "each page" in row[0]] == []  # the same as that of the call
    assert ratios[4] == ["grant copy from another program's pages", "0.50 (0.25-0.80)"]


def test_save_writes_what_was_found(tmp_path: Path) -> None:
    """Goal: the files hold samples, summary, facts, notes and failures.  Method: write, then read them back."""
    found = results(*MEASURED)
    found.failures.append("vchan-bulk: gone")
    lines = devxen.save(found, tmp_path / "new")
    record = json.loads((tmp_path / "new" / "devxen.json").read_text())
    assert len(record["samples"]) == len(MEASURED)
    assert record["summary"]["copy-from"]["unix"] == {"median": 3.0, "xenfs_to_peer": 0.5, "target": None}
    page = (tmp_path / "new" / "devxen.md").read_text().splitlines()
    assert page[0] == "# /dev/xen beside what Unix has"
    for line in ("- CPU: a CPU", "| xenfs | xenfs: commit abc |", "- vchan-bulk: gone", "a note"):
        assert line in page, line
    assert "could not be run" in devxen.text(found)
    drawn = (tmp_path / "new" / "devxen.png").exists()
    assert drawn == lines[-1].startswith("wrote ") != lines[-1].startswith("no plot: matplotlib")


def test_who_leads(tmp_path: Path) -> None:
    """Goal: domain 0 maps a kernel's grants, all else is between two programs.  Method: the sides of each kind."""
    zero, one, two, disk = (Domain(tmp_path / str(domid), domid) for domid in range(4))
    domains = Domains(zero, one, two, disk)
    assert domains.sides(ONE_PAGE) == (str(tmp_path / "0"), "0", str(tmp_path / "3"), "3")
    assert {domains.sides(work) for work in (EVENT, PAGES, COPY, ROUND)} == {(*one.words, *two.words)}


def built(folder: Path) -> Path:
    if not devxen.HEADER.exists():
        pytest.skip("needs Debian's libxen-dev")
    return devxen.build(folder)


@pytest.mark.parametrize(
    "words",
    [
        ["event", "1", "10", "0", "one", "1", "two"],
        ["events", "1", "10", "0", "one", "1", "two", "2"],
        ["map-program", "0", "10", "0", "one", "1", "two", "2"],
        ["map-program", "257", "10", "0", "one", "1", "two", "2"],
        ["copy-to", "63", "10", "0", "one", "1", "two", "2"],
    ],
)
def test_the_program_refuses_what_it_cannot_do(tmp_path: Path, words: list[str]) -> None:
    """Goal: no work on pages that were not asked for.  Method: its exit code and message."""
    done = subprocess.run([built(tmp_path), *words], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("usage: devxen-bench"), done


def test_trouble_of_either_process_is_no_answer(tmp_path: Path) -> None:
    """Goal: both end, with a message.  Method: of two folders that become /dev/xen one or the other is missing."""
    program, here, gone = built(tmp_path), tmp_path, tmp_path / "gone"
    for leader, peer in ((here, gone), (gone, here)):
        argv = (str(program), "event", "1", "10", "0", str(leader), "1", str(peer), "2")
        with pytest.raises(nettools.ToolError, match="ended with 1: devxen-bench: "):
            nettools.execute(argv, 30)


def test_options_that_make_no_sense_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Goal: nothing starts on a typing error.  Method: the message of each."""
    for argv, words in (
        (["--works", "evnt"], "no work evnt; there are: event, map-kernel-1"),
        (["--works", "none"], "nothing to do"),
        (["--rounds", "0"], "not a number from 1 to 100"),
        (["--ms", "9"], "not a number from 10 to 60000"),
    ):
        with pytest.raises(SystemExit) as ended:
            devxen.parse_options(argv)
        assert ended.value.code == 2 and words in capsys.readouterr().err, argv


# runs


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:  # a short one: there will be a socket in it
        yield Path(name)
        assert os.listdir(name) == []
        assert not [mount for mount in mounts() if mount.startswith(f"{name}/")]


def namespaces(pid: int) -> list[str]:
    """Network namespaces that a benchmark of this process id made."""
    folder = netpeers.NETNS
    return [path.name for path in folder.iterdir() if f"bench{pid}-" in path.name] if folder.exists() else []


def start(scratch: Path, *argv: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.devxen", "--quick", "--dir", str(scratch), *argv]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.host
def test_a_short_run_measures_and_cleans_up(scratch: Path, tmp_path: Path) -> None:
    """Goal: a real run ends with a figure in each row and leaves nothing.  Method: every work, for a moment, both orders."""
    child = start(scratch, "--ms=20", "--rounds=2", f"--out={tmp_path / 'out'}")
    said, errors = child.communicate(timeout=180)
    assert child.returncode == 0, errors
    record = json.loads((tmp_path / "out" / "devxen.json").read_text())
    rows = [row.name for work in devxen.WORKS for row in work.rows]
    assert list(record["summary"]) == rows
    assert all(record["summary"][row][peer]["median"] > 0 for row in rows for peer in ("xenfs", "unix")), record["summary"]
    assert "event, notify to read, median, us" in said
    assert namespaces(child.pid) == []


@pytest.mark.host
def test_an_interrupted_run_cleans_up(scratch: Path, tmp_path: Path) -> None:
    """Goal: Ctrl-C in the middle leaves nothing.  Method: a SIGINT while events go to and fro."""
    child = start(scratch, "--works=event", "--ms=60000", f"--out={tmp_path / 'out'}")
    try:
        deadline = time.monotonic() + 60
        while not (found := measuring(child.pid)):
            assert child.poll() is None and time.monotonic() < deadline, child.communicate()
            time.sleep(0.02)
    finally:
        child.send_signal(signal.SIGINT)
        said, errors = child.communicate(timeout=60)
    assert child.returncode == 130 and "everything started was ended" in errors, (said, errors)
    assert namespaces(child.pid) == [] and not (tmp_path / "out").exists()
    deadline = time.monotonic() + 10
    while [pid for pid in found if Path(f"/proc/{pid}").exists()]:  # init takes its time over what we are no parent of
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


def measuring(parent: int) -> list[int]:
    """The two processes that measure, if a child of this one and its child do."""
    for pid in children(parent):
        with contextlib.suppress(OSError):  # gcc comes and goes
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if words[0].endswith("devxen-bench") and (others := children(pid)):
                return [pid, *others]
    return []


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
