"""Goal: the benchmark says what fio, /proc and the servers said, and leaves nothing behind.

Method: fio answers and /proc texts of known content, hand-computed medians and ratios, real child processes
as servers; one short run against a real peer where root, FUSE and that peer are at hand.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from bench import block, fio, peers, report

RANDREAD, RANDWRITE = fio.select(["4k-randread-qd16", "4k-randwrite-qd16"])


def fio_job(name: str = "job0", error: int = 0, ios: int = 10, reads: float = 0, writes: float = 0) -> object:
    """One record of fio 3.33's JSON, cut down to the fields that matter and their neighbours."""

    def half(iops: float) -> object:
        percentiles = {"50.000000": 125440, "99.000000": 528384, "99.990000": 2932736}
        return {
            "iops": iops,
            "bw": int(iops * 4),
            "bw_bytes": int(iops * 4096),
            "total_ios": ios if iops else 0,
            "clat_ns": {"mean": 130000.5, "percentile": percentiles},
        }

    return {"jobname": name, "error": error, "read": half(reads), "write": half(writes)}


def fio_answer(*jobs: object) -> str:
    return json.dumps({"fio version": "fio-3.33", "jobs": list(jobs)}, indent=2)


def results(*samples: report.Sample, peer_names: Sequence[str] = ("xenfs", "qsd", "empty")) -> report.Results:
    return report.Results(
        date="2024-01-01T00:00:00+00:00",
        machine={"CPU": "a CPU", "cores": "2"},
        versions={"qsd": "7.2"},
        options={"rounds": 3},
        workloads=(RANDREAD, RANDWRITE),
        peers=tuple(peer_names),
        samples=list(samples),
    )


def sample(peer: str, number: int, iops: float, p99_us: float = 100) -> report.Sample:
    return report.Sample(RANDREAD.name, peer, number, iops, iops * 4096, p99_us)


THREE_ROUNDS = (
    *(sample("xenfs", number, iops) for number, iops in enumerate((50_000, 40_000, 60_000))),
    *(sample("qsd", number, iops, 250) for number, iops in enumerate((20_000, 25_000, 24_000))),
)


# fio


def test_command_asks_for_what_is_reported() -> None:
    """Goal: one job per file, direct, through io_uring. Method: look for the words in the command line."""
    argv = fio.command(RANDREAD, [Path("/a:b"), Path("/c")], 1 << 20, 4, 1)
    assert {"--ioengine=io_uring", "--direct=1", "--rw=randread", "--bs=4k", "--iodepth=16"} <= set(argv)
    assert {"--runtime=4", "--ramp_time=1", "--size=1048576"} <= set(argv)
    assert argv[-4:] == ["--name=job0", "--filename=/a\\:b", "--name=job1", "--filename=/c"]


def test_every_workload_is_named_once_and_has_both_targets() -> None:
    """Goal: names select, and targets exist for both peers. Method: over the table of workloads."""
    names = [workload.name for workload in fio.WORKLOADS]
    assert len(set(names)) == len(names) == 7
    assert fio.select(names) == fio.WORKLOADS
    for workload in fio.WORKLOADS:
        assert set(dict(workload.targets)) == {"qsd", "nbdfuse"}, workload.name


def test_parse_takes_the_half_the_workload_writes_or_reads() -> None:
    """Goal: IOPS, bytes and p99 of each job. Method: an answer with text before and after the JSON."""
    text = "fio: a warning\n" + fio_answer(fio_job(reads=99133.5), fio_job("job1", reads=7)) + "\ntrailing"
    assert fio.parse(text, RANDREAD) == [
        fio.Figures(99133.5, 406050816, 528.384),
        fio.Figures(7, 28672, 528.384),
    ]
    assert fio.parse(fio_answer(fio_job(reads=1, writes=5)), RANDWRITE)[0].iops == 5


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "nothing at all"),
        ("fio: engine io_uring not loadable", "not loadable"),
        ('{"jobs": [', "not understood"),
        ("{}", "not understood"),
        ('{"jobs": [{"error": 0}]}', "not understood"),
        ('{"jobs": [3]}', "not understood"),
        (fio_answer(fio_job(error=5, reads=1)), "job0 failed with errno 5"),
        (fio_answer(fio_job(reads=1, ios=0)), "completed no request"),
        (fio_answer(fio_job(writes=1)), "completed no request"),
    ],
)
def test_an_answer_without_figures_is_an_error(text: str, complaint: str) -> None:
    """Goal: never a figure that was not measured. Method: broken answers, each with its message."""
    with pytest.raises(fio.FioError, match=complaint):
        fio.parse(text, RANDREAD)


def test_capture_gives_up_on_a_child_in_time() -> None:
    """Goal: a hung child costs its time limit only. Method: a child that sleeps far longer."""
    with pytest.raises(subprocess.TimeoutExpired):
        fio.capture(["sleep", "1000"], 0.05)
    assert fio.capture(["sh", "-c", "echo out; echo err >&2; exit 3"], 60) == (3, "out\n", "err\n")


# medians, ratios, tables


def test_spread_and_ratio() -> None:
    """Goal: medians with ranges; ratios of medians with the range by round. Method: three rounds by hand."""
    assert report.spread([]) is None
    assert report.spread([3.0, 1.0, 2.0, 10.0]) == report.Spread(2.5, 1.0, 10.0)
    assert report.ratio(THREE_ROUNDS, RANDREAD.name, "qsd") == report.Spread(50 / 24, 1.6, 2.5)
    assert report.ratio(THREE_ROUNDS, RANDREAD.name, "empty") is None
    assert report.ratio(THREE_ROUNDS, RANDWRITE.name, "qsd") is None


def test_ratio_pairs_only_rounds_that_both_finished() -> None:
    """Goal: a round one peer failed in gives no ratio of its own. Method: rounds that overlap in one."""
    samples = (sample("xenfs", 0, 10), sample("xenfs", 1, 30), sample("qsd", 1, 10), sample("qsd", 2, 40))
    assert report.ratio(samples, RANDREAD.name, "qsd") == report.Spread(20 / 25, 3.0, 3.0)
    assert report.ratio(samples[::3], RANDREAD.name, "qsd") is None


def test_tables_show_figures_targets_and_gaps() -> None:
    """Goal: what stands in the tables. Method: all cells, for one measured workload and one that was not."""
    found = results(*THREE_ROUNDS)
    iops, ratios, p99 = report.tables(found)
    assert iops[1:] == [
        ["4k randread QD16", "50,000 (40,000-60,000)", "24,000 (20,000-25,000)", "-"],
        ["4k randwrite QD16", "-", "-", "-"],
    ]
    assert ratios == [
        ["xenfs to peer, of medians (by round)", "qsd", "empty"],
        ["4k randread QD16", "2.08 (1.60-2.50), target 1.5", "-"],
        ["4k randwrite QD16", "-, target 1.1", "-"],
    ]
    assert p99[1] == ["4k randread QD16", "100 (100-100)", "250 (250-250)", "-"]
    assert report.tables(results(*THREE_ROUNDS, peer_names=["qsd"]))[0][1][1] == "24,000 (20,000-25,000)"
    assert report.tables(results()) == []


def test_share_of_one_alone() -> None:
    """Goal: each disk's part of one disk alone. Method: two rounds on one disk and on two."""
    found = results()
    for number, (alone, first, second) in enumerate([(90, 40, 50), (110, 60, 50)]):
        found.shares += [report.Share("w", 1, 0, number, alone)]
        found.shares += [report.Share("w", 2, 0, number, first), report.Share("w", 2, 1, number, second)]
    (rows,) = report.tables(found)
    assert rows[1:] == [
        ["w on 1", "100", "100 (100% of one alone)", ""],
        ["w on 2", "100", "50 (50% of one alone)", "50 (50% of one alone)"],
    ]
    found.shares = [share for share in found.shares if share.disk == 0]
    assert report.share_rows(found)[2] == ["w on 2", "-", "50 (50% of one alone)", "-"]


def test_text_and_markdown_tables() -> None:
    """Goal: the layout of both kinds of table. Method: compare whole texts."""
    rows = [["name", "a", "bb"], ["long name", "1,000", "2"]]
    assert report.text_table(rows) == "name           a  bb\n--------------------\nlong name  1,000   2"
    assert report.markdown_table(rows) == "| name | a | bb |\n|---|---:|---:|\n| long name | 1,000 | 2 |"


def test_save_writes_what_was_found(tmp_path: Path) -> None:
    """Goal: the files hold samples, summary, facts and failures. Method: write, then read them back."""
    found = results(*THREE_ROUNDS)
    found.idle.append(peers.Idle("xenfs", 0.2, 3.0, 40.0, 55.0, 1, 4))
    found.failures.append("empty: not there")
    lines = report.save(found, tmp_path / "new" / "folder")
    record = json.loads((tmp_path / "new" / "folder" / "results.json").read_text())
    assert [entry["iops"] for entry in record["samples"]] == [s.iops for s in THREE_ROUNDS]
    summary = record["summary"][RANDREAD.name]
    assert summary["qsd"] == {"iops": 24_000, "p99_us": 250, "xenfs_to_peer": 50 / 24, "target": 1.5}
    assert summary["xenfs"]["xenfs_to_peer"] is None
    assert record["failures"] == ["empty: not there"] and record["idle"][0]["threads"] == 4
    page = (tmp_path / "new" / "folder" / "results.md").read_text()
    for line in ("- CPU: a CPU", "- date: 2024-01-01T00:00:00+00:00", "| qsd | 7.2 |", "- empty: not there"):
        assert line in page.splitlines(), line
    assert "| xenfs | 0.20 | 3.0 | 40.0 | 55.0 | 1 | 4 |" in page
    drawn = (tmp_path / "new" / "folder" / "results.png").exists()
    assert drawn == lines[-1].startswith("wrote ") != lines[-1].startswith("no plot: matplotlib")


# processes


@pytest.mark.parametrize("name", ["cat", "a) S 1 (b", "x y"])
def test_parse_stat_whatever_the_name(name: str) -> None:
    """Goal: state, session and ticks are found behind any name. Method: the fields of proc(5)."""
    text = f"77 ({name}) S 4 5 6 7 8 9 10 11 12 13 140 150 16 17 18 19 20\n"
    assert peers.parse_stat(text) == ("S", 6, 290)


def test_parse_fields() -> None:
    """Goal: numbers by name, with or without kB. Method: lines as in status and smaps_rollup."""
    text = "Name:\tx: 1\nPss:      9261 kB\nvoluntary_ctxt_switches:\t12\nShdPnd:\t00ff\nempty:\n"
    assert peers.parse_fields(text) == {"Pss": 9261, "voluntary_ctxt_switches": 12}


def scripted_peer(script: str, exit_codes: tuple[int, ...] = (0,)) -> peers.Peer:
    """A server without a mount: a shell script that offers the image itself."""

    def launch(work: Path, images: Sequence[Path]) -> peers.Launch:
        return peers.Launch(("sh", "-c", script), tuple(images), work / "mnt", says_ready=True)

    return peers.Peer("scripted", "a script", launch, exit_codes=exit_codes)


def kill(server: peers.Server) -> None:
    os.kill(server.pid, signal.SIGKILL)
    while peers.members(server.pid):
        pass


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(8192))
    return path


def test_running_finds_all_processes_and_ends_them(tmp_path: Path, image: Path) -> None:
    """Goal: a server's children count and go with it. Method: a script with a child."""
    peer = scripted_peer("sleep 1000 & trap 'kill $!; exit 0' TERM; echo ready; wait")
    with peers.running(peer, [image], tmp_path / "work") as server:
        assert server.size_bytes == 8192 and server.files == (image,)
        pids = peers.members(server.pid)
        used = peers.usage(server.pid)
        assert server.pid in pids and len(pids) == used.processes == used.threads == 2
        assert used.wakeups > 0 and used.rss_kib >= used.pss_kib > 0
    assert peers.members(server.pid) == []
    with pytest.raises(peers.PeerFailure, match="ended while it was watched"):
        peers.usage(server.pid)


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("echo broken; exit 3", "ended with 3 at its start; its last words: broken"),
        ("trap 'exit 4' TERM; echo ready; while :; do sleep 0.05; done", "ended with 4 after SIGTERM"),
        ("echo ready; exec sleep 1000", "had ended by itself with -9"),
    ],
)
def test_running_says_how_a_server_failed(tmp_path: Path, image: Path, script: str, complaint: str) -> None:
    """Goal: each way to fail has its message. Method: failing scripts."""
    with (
        pytest.raises(peers.PeerFailure, match=complaint),
        peers.running(scripted_peer(script), [image], tmp_path / "work") as server,
    ):
        if "by itself" in complaint:
            kill(server)


def test_a_client_error_tells_the_servers_last_words(tmp_path: Path, image: Path) -> None:
    """Goal: if fio fails because the server died, both are told. Method: end a server, then raise."""
    peer = scripted_peer("echo ready; echo dying; exec sleep 1000")
    with (
        pytest.raises(
            peers.PeerFailure, match=r"no answer; .* by itself with -9; its last words: ready \| dying"
        ),
        peers.running(peer, [image], tmp_path / "work") as server,
    ):
        kill(server)
        raise fio.FioError("no answer")


def test_missing_names_the_package() -> None:
    """Goal: what to install is said. Method: peers that need a program and a module nobody has."""

    def launch(work: Path, images: Sequence[Path]) -> peers.Launch:
        raise AssertionError("not to be started")

    program = peers.Peer("x", "x", launch, needs=(("no-such-program", "its-package"), ("sh", "dash")))
    assert peers.missing(program) == "not installed: no-such-program (Debian package: its-package)"
    for module in ("bench.no_such_module", "no_such_package.no_such_module"):
        assert peers.missing(peers.Peer("x", "x", launch, module=module)).endswith(module)
    assert peers.missing(peers.Peer("x", "x", launch, module="bench.block")) == ""


# options


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (block.parse_size, "1G", 1 << 30),
        (block.parse_size, "16m", 16 << 20),
        (block.parse_size, "15M", None),
        (block.parse_size, "20000K", None),
        (block.parse_size, "-1G", None),
        (block.parse_size, "", None),
        (block.parse_count(1, 9), "9", 9),
        (block.parse_count(1, 9), "0", None),
        (block.parse_count(1, 9), "10", None),
        (block.parse_count(1, 9), "-1", None),
        (block.parse_names, "a,b,a", ("a", "b")),
        (block.parse_names, "none", ()),
        (block.parse_folder, "/usr/../", Path("/")),
        (block.parse_folder, "/no such folder", None),
    ],
)
def test_option_values(parse: Callable[[str], object], text: str, value: object) -> None:
    """Goal: values within their bounds only. Method: texts with the value, or None where they are refused."""
    if value is None:
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)
    else:
        assert parse(text) == value


def test_peers_take_turns_at_being_first() -> None:
    """Goal: the order of peers rotates. Method: as many rounds as there are peers, and none at all."""
    three = block.select_peers(["qsd", "xenfs", "nbdfuse"])
    orders = [block.rotated(three, number) for number in range(4)]
    assert [order[0].name for order in orders] == ["qsd", "xenfs", "nbdfuse", "qsd"]
    assert all(sorted(p.name for p in order) == ["nbdfuse", "qsd", "xenfs"] for order in orders)
    assert block.rotated((), 1) == []
    with pytest.raises(ValueError, match="no peer other; there are: xenfs, qsd"):
        block.select_peers(["qsd", "other"])


@pytest.mark.host
def test_a_short_run_measures_and_cleans_up(tmp_path: Path) -> None:
    """Goal: a real run ends with figures and leaves nothing. Method: one short workload on our own server."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    argv = ["--quick", "--size", "16M", "--peers", "xenfs", "--workloads", "4k-randread-qd1"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.block", *argv, "--dir", scratch, "--out", tmp_path / "out"],
        cwd=peers.REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["samples"][0]["iops"] > 0 and record["idle"][0]["pss_mib"] > 0
    assert "4k randread QD1" in done.stdout
    assert list(scratch.iterdir()) == []
    assert not [mount for mount in peers.mounts() if mount.startswith(f"{scratch}/")]
