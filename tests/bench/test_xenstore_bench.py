"""Goal: the xenstore benchmark says what its client, fio and ping said, judges targets rightly, and leaves nothing behind.

Method: answers of known content, hand-computed medians, ratios and verdicts; the client itself against Xen's own daemon and
against a server that answers wrongly; on a host two short runs, one of them interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import netpeers, nettools, realstore, xenreport, xenstore
from bench.fio import FioError
from bench.peers import REPOSITORY, mounts
from bench.report import Spread
from bench.xenreport import ELSEWHERE, HERE, QUIET
from xenmodel.public.io.xs_wire import SOCKMSG, XsType

READ, WRITE = xenreport.select("operation", xenreport.OPERATIONS, ["read", "write"])
RW, REMOVE = xenreport.select("flood", xenreport.FLOODS, ["rw-1", "remove"])
ANSWER = '{"connections": 1, "count": 4, "rate": 2000.5, "conflicts": 0, "median_us": 50, "p99_us": 90, "max_us": 700}'


def results(*samples: xenreport.Sample, servers: tuple[str, ...] = ("xenfs", "c", "ocaml")) -> xenreport.Results:
    asked = ((READ, WRITE), (1, 16), (1000, 100_000), (RW, REMOVE))
    versions = {"c": "C xenstored: 4.17"}
    return xenreport.Results("2024-01-01", {"CPU": "a CPU"}, versions, {"rounds": 3}, *asked, servers, [*samples])


def series(server: str, connections: int, nodes: int, *rates: float) -> list[xenreport.Sample]:
    """One sample of reads per round; latencies and CPU rise with the round."""
    times = [(50 + number, 90 + number, 700 + number, number + 0.25) for number in range(len(rates))]
    place = ("read", connections, nodes, server)
    return [xenreport.Sample(*place, number, rate, *times[number]) for number, rate in enumerate(rates)]


MEASURED = (
    *series("xenfs", 1, 1000, 7000, 8000, 6000),
    *series("xenfs", 1, 100_000, 6300, 6300, 6900),
    *series("c", 1, 1000, 10_000, 10_000, 9000),
    *series("c", 1, 100_000, 10_000, 5000, 9001),
    *series("xenfs", 16, 1000, 100),
    *series("c", 16, 1000, 1000),
)


def waits(victim: str, where: str, flood: str, *longest_us: float) -> list[xenreport.Wait]:
    rate = 0.0 if where == QUIET else 1234.5
    return [
        xenreport.Wait(victim, flood, where, number, 9, 40 + number, 80 + number, each, rate)
        for number, each in enumerate(longest_us)
    ]


WAITED = (
    *waits("disk", QUIET, "", 400, 900),
    *waits("disk", HERE, "rw-1", 5900, 700),
    *waits("disk", ELSEWHERE, "rw-1", 2000, 600),
    *waits("disk", HERE, "remove", 5901, 700),
    *waits("network", HERE, "rw-1", 100),
)


# what tools say


def test_the_clients_last_line_is_its_answer() -> None:
    """Goal: figures as they were said.  Method: an answer behind "ready", and one alone."""
    for text in (ANSWER, f"ready\n{ANSWER}\n"):
        assert xenstore.parse_client(text) == (2000.5, 50, 90, 700)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not understood"),
        ("ready\n", "not understood"),
        ("[]", "not understood"),
        ('{"rate": 1}', "not understood"),
        (ANSWER.replace("2000.5", '"much"'), "not understood"),
        (ANSWER.replace("2000.5", "0"), "did nothing"),
    ],
)
def test_an_answer_without_figures_is_an_error(text: str, complaint: str) -> None:
    """Goal: never a figure that was not measured.  Method: broken answers, each with its message."""
    with pytest.raises(nettools.ToolError, match=complaint):
        xenstore.parse_client(text)


def fio_answer(ios: int) -> str:
    """fio 3.33's JSON, cut down."""
    times = {"max": 7_654_321, "percentile": {"50.000000": 45_000, "99.000000": 91_000}}
    read = {"iops": 20_000.5, "bw_bytes": 80_000, "total_ios": ios, "clat_ns": times}
    return "fio: a warning\n" + json.dumps({"jobs": [{"jobname": "job0", "error": 0, "read": read}]}) + "\n"


def test_what_the_victims_tools_say() -> None:
    """Goal: requests, median, p99 and the longest of fio and of ping.  Method: answers worked out by hand."""
    assert xenstore.parse_fio(fio_answer(40_000)) == pytest.approx((40_000, 45, 91, 7654.321))
    with pytest.raises(FioError, match="completed no request"):
        xenstore.parse_fio(fio_answer(0))
    lines = [f"64 bytes from 1.2.3.4: icmp_seq={n} ttl=64 time={n / 1000:.3f} ms" for n in range(200, 0, -1)]
    assert xenstore.parse_ping("\n".join(lines)) == pytest.approx((200, 100.5, 198, 200))
    with pytest.raises(nettools.ToolError, match="no answer"):
        xenstore.parse_ping("5 packets transmitted, 0 received")


# xenreport


def test_ratios_and_verdicts() -> None:
    """Goal: ours to each server's, judged on one connection against Xen's own only.  Method: three rounds by hand."""
    head, *lines = xenreport.ratio_rows(results(*MEASURED))
    assert head[1:] == ["c", "ocaml"] and len(lines) == 8
    title = "read; 1 connection, 1,000 nodes"
    assert lines[0] == [title, "0.70 (0.67-0.80), target >= 0.7: reached", "-"]
    assert lines[1][1] == "0.70 (0.63-1.26), target >= 0.7: not reached"  # 6300 to 9001
    assert lines[2] == ["read; 16 connections, 1,000 nodes", "0.10 (0.10-0.10)", "-"]
    assert lines[4] == ["write; 1 connection, 1,000 nodes", "-, target >= 0.7: not measured", "-"]


def test_growth_is_the_large_tree_to_the_small_one() -> None:
    """Goal: does an operation cost more in a large tree?  Method: three rounds by hand, a size without a figure."""
    found = results(*MEASURED)
    assert xenreport.growth(found, "read", 1, "xenfs") == Spread(0.9, 6300 / 8000, 6900 / 6000)
    assert xenreport.growth(found, "read", 16, "xenfs") is None
    lines = xenreport.growth_rows(found)
    assert lines[0] == ["rate with 100,000 nodes to that with 1,000", "xenfs", "c", "ocaml"]
    assert lines[1][1:] == ["0.90 (0.79-1.15), target >= 0.9: reached", "0.90 (0.50-1.00)", "-"]
    assert lines[2] == ["read; 16 connections", "-, target >= 0.9: not measured", "-", "-"]


def test_tables_show_figures_and_gaps() -> None:
    """Goal: rates, latencies and CPU are medians, the longest is the longest.  Method: the cells of one row in each."""
    rates, _ratios, _growth, latency, cpu = xenreport.tables(results(*MEASURED))
    assert rates[1] == ["read; 1 connection, 1,000 nodes", "7,000 (6,000-8,000)", "10,000 (9,000-10,000)", "-"]
    assert latency[1][1:] == ["51 / 91 / 702", "51 / 91 / 702", "-"]
    assert cpu[1][1:] == ["1.2 (0.2-2.2)", "1.2 (0.2-2.2)", "-"]
    assert [row[1:] for row in rates[4:]] == [["-", "-", "-"]] * 5
    assert xenreport.tables(results()) == []
    alone = results(*MEASURED, servers=("c",))
    assert [rows[0][1:] for rows in xenreport.tables(alone)] == [["c"]] * 4  # nobody to compare with


def test_what_a_flood_adds_to_the_longest_wait() -> None:
    """Goal: the longest of all rounds with a flood less that without, judged to the microsecond.  Method: all cells."""
    found = results()
    found.waits.extend(WAITED)
    assert xenreport.added_us(found, "disk", "rw-1") == 5000
    lines = xenreport.wait_rows(found)
    disk = "disk, fio 4k randread QD1; "
    times = ["40 / 80 / 900", "40 / 80 / 2,000", "40 / 80 / 5,900"]
    assert lines[1] == [disk + RW.title, *times, "1,234.5", "5.00, target <= 5: reached"]
    assert lines[2][2:] == ["-", "40 / 80 / 5,901", "1,234.5", "5.00, target <= 5: not reached"]
    assert lines[3][1:] == ["-", "-", "40 / 80 / 100", "1,234.5", "target <= 5: not measured"]


def test_select_keeps_the_order_and_names_what_there_is() -> None:
    """Goal: names select.  Method: in another order; a name nobody has."""
    assert xenreport.select("operation", xenreport.OPERATIONS, ["write", "read"]) == (WRITE, READ)
    with pytest.raises(ValueError, match="no server redis; there are: xenfs, c, ocaml"):
        xenreport.select("server", xenstore.SERVERS, ["c", "redis"])


def test_save_writes_what_was_found(tmp_path: Path) -> None:
    """Goal: the files hold samples, summary, facts, notes and failures.  Method: write, then read them back."""
    found = results(*MEASURED)
    found.waits.extend(WAITED)
    found.filled.append(xenreport.Filled("c", 1000, 20_000.4, 0.84))
    found.failures.append("ocaml: gone")
    lines = xenreport.save(found, tmp_path / "new")
    record = json.loads((tmp_path / "new" / "xenstore.json").read_text())
    assert len(record["samples"]) == len(MEASURED) and len(record["waits"]) == len(WAITED)
    assert record["summary"]["read-1-1000"]["c"] == {"rate": 10_000, "xenfs_to_server": 0.7, "target": 0.7}
    assert record["summary"]["disk"]["rw-1"] == {"added_us": 5000, "target": 5000}
    page = (tmp_path / "new" / "xenstore.md").read_text().splitlines()
    for line in ("- CPU: a CPU", "| c | C xenstored: 4.17 |", "- ocaml: gone", "| c | 1,000 | 20,000 | 0.8 |"):
        assert line in page, line
    assert "could not be run" in xenreport.text(found)
    drawn = (tmp_path / "new" / "xenstore.png").exists()
    assert drawn == lines[-1].startswith("wrote ") != lines[-1].startswith("no plot: matplotlib")


# the client


def built(folder: Path) -> Path:
    if not xenstore.HEADER.exists():
        pytest.skip("needs Debian's libxen-dev")
    return xenstore.build(folder)


def run(client: Path, server: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"XENSTORED_PATH": str(server)}
    return subprocess.run([client, *words], env=environ, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(bool(reason := realstore.missing()), reason=reason)
def test_every_mode_works_on_xens_own_store(tmp_path: Path) -> None:
    """Goal: each mode measures, with one connection and with three.  Method: all of them for a moment on the C daemon."""
    client = built(tmp_path)
    modes = [operation.name for operation in xenreport.OPERATIONS]
    modes += sorted({flood.mode for flood in xenreport.FLOODS})
    with realstore.RealXenstored(tmp_path / "store") as store:
        assert xenstore.parse_client(run(client, store.socket, "fill", "1000", "1", "0").stdout).rate > 0
        for mode in modes:
            for connections in ("1", "3"):
                # the floods are made of long operations: what is measured is at least one of each connection
                done = run(client, store.socket, mode, "1000", connections, "500" if mode.startswith("flood") else "20")
                assert done.returncode == 0, (mode, connections, done.stderr)
                figures = xenstore.parse_client(done.stdout)
                assert 0 < figures.median_us <= figures.p99_us <= figures.max_us, mode


@pytest.mark.skipif(bool(reason := realstore.missing()), reason=reason)
def test_a_flood_lasts_as_long_as_its_block(tmp_path: Path) -> None:
    """Goal: a flood that has begun is under way until the block ends, and is gone then.  Method: the C daemon's own CPU."""
    bench = xenstore.Bench(argparse.Namespace(), tmp_path, results(), built(tmp_path))
    with realstore.RealXenstored(tmp_path / "server") as store:
        running = xenstore.Running(store.socket, store.pid)
        there = xenstore.Store("c", 1000, running)
        assert run(bench.client, store.socket, "fill", "1000", "1", "0").returncode == 0
        with bench.flooded(RW, there) as figures:
            before = running.cpu_s()
            deadline = time.monotonic() + 30
            while running.cpu_s() < before + 0.05:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert figures == []
        assert figures[0].rate > 0
        with pytest.raises(RuntimeError, match="mine"), bench.flooded(RW, there):
            raise RuntimeError("mine")
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        assert [int(pid) for pid in children] == [store.pid]


@contextlib.contextmanager
def wrong_server(folder: Path, answer: bytes) -> Iterator[Path]:
    """A server that answers its only client's first request like that, and then no more."""
    path = folder / "socket"

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(answer)
            while connection.recv(4096):
                pass

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield path
        thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("mode", "kind", "body", "complaint"),
    [
        ("read", XsType.ERROR, b"ENOENT\0", "read /bench/g0000/d0000.*: No such file or directory"),
        ("read", XsType.READ, b"value-1", "read /bench/.*: not what was expected"),
        ("directory", XsType.DIRECTORY, b"n00\0n01\0", "directory /bench/.*, of 2: not what was expected"),
        ("write", XsType.ERROR, b"EQUOTA\0", "write /bench/"),
        ("transaction", XsType.ERROR, b"EBUSY\0", "transaction start: Device or resource busy"),
    ],
)
def test_a_wrong_answer_is_no_operation(tmp_path: Path, mode: str, kind: int, body: bytes, complaint: str) -> None:
    """Goal: a rate is never that of errors.  Method: a server that answers each mode wrongly."""
    client = built(tmp_path)
    with wrong_server(tmp_path, SOCKMSG.pack(kind, 0, 0, len(body)) + body) as path:
        argv = ("env", f"XENSTORED_PATH={path}", str(client), mode, "1000", "1", "500")
        with pytest.raises(nettools.ToolError, match=f"ended with 1: xenstore-bench: {complaint}"):
            nettools.execute(argv, 30)


# options and runs


def test_options_that_make_no_sense_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Goal: nothing starts on a typing error.  Method: the message of each."""
    long = tmp_path / "0123456789012345678901234567890123456789012345678901234567890123456789"
    long.mkdir()
    for argv, words in (
        (["--servers", "redis"], "no server redis"),
        (["--operations", "reed"], "no operation reed"),
        (["--floods", "rain"], "no flood rain"),
        (["--operations", "none", "--floods", "none"], "nothing to do"),
        (["--connections", "1,48"], "not a number from 1 to 47"),
        (["--nodes", "100"], "not a number from 1000 to 1000000"),
        (["--rounds", "0"], "not a number from 1 to 100"),
        (["--dir", str(long)], "at most 60 bytes"),
    ):
        with pytest.raises(SystemExit) as ended:
            xenstore.parse_options(argv)
        assert ended.value.code == 2 and words in capsys.readouterr().err, argv


def ours(pid: int) -> list[str]:
    """Network namespaces that a benchmark of this process id made."""
    folder = netpeers.NETNS
    return [path.name for path in folder.iterdir() if f"bench{pid}-" in path.name] if folder.exists() else []


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:  # a short one: there will be sockets in it
        yield Path(name)
        assert os.listdir(name) == []
        assert not [mount for mount in mounts() if mount.startswith(f"{name}/")]


def start(scratch: Path, *argv: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.xenstore", "--quick", "--nodes=1000", "--dir", str(scratch), *argv]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.host
def test_a_short_run_measures_and_cleans_up(scratch: Path, tmp_path: Path) -> None:
    """Goal: a real run ends with figures and leaves nothing.  Method: two operations and a flood; ours, the C daemon."""
    asked = ("--servers=xenfs,c", "--operations=read,watch-other", "--connections=1", "--floods=rw-1")
    child = start(scratch, *asked, f"--out={tmp_path / 'out'}")
    said, errors = child.communicate(timeout=180)
    assert child.returncode == 0, errors
    record = json.loads((tmp_path / "out" / "xenstore.json").read_text())
    for row in ("read-1-1000", "watch-other-1-1000"):
        assert all(record["summary"][row][server]["rate"] > 0 for server in ("xenfs", "c")), record["summary"]
    assert len(record["filled"]) == 2 and all(found["pss_mib"] > 0 for found in record["filled"])
    assert {(found["victim"], found["where"]) for found in record["waits"]} == {
        (victim, where) for victim in ("disk", "network") for where in (QUIET, ELSEWHERE, HERE)
    }
    assert all(found["flood_rate"] > 0 for found in record["waits"] if found["where"] != QUIET)
    assert "under load, us: median / p99 / longest" in said
    assert ours(child.pid) == []


@pytest.mark.host
def test_an_interrupted_run_cleans_up(scratch: Path, tmp_path: Path) -> None:
    """Goal: Ctrl-C in the middle leaves nothing.  Method: a SIGINT while the client reads."""
    child = start(scratch, "--servers=xenfs,c", "--operations=read", "--seconds=60", f"--out={tmp_path / 'out'}")
    try:
        deadline = time.monotonic() + 60
        while not reading(child.pid):
            assert child.poll() is None and time.monotonic() < deadline, child.communicate()
            time.sleep(0.02)
        assert ours(child.pid)
    finally:
        child.send_signal(signal.SIGINT)
        said, errors = child.communicate(timeout=60)
    assert child.returncode == 130 and "everything started was ended" in errors, (said, errors)
    assert ours(child.pid) == [] and not (tmp_path / "out").exists()


def reading(parent: int) -> bool:
    """Has this process a child that is the client, and reads?"""
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if words[0].endswith("xenstore-bench") and words[1] == "read":
                return True
    return False
