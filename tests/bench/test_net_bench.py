"""Goal: the network's benchmark says what iperf3, ping and /proc said, judges targets rightly, and leaves nothing behind.

Method: answers of known content, hand-computed medians, ratios and verdicts, real signals; on a host two short runs against
our own server, one of them interrupted.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import net, netpeers, netreport, nettools
from bench.peers import REPOSITORY, Idle, PeerFailure, mounts
from bench.report import Spread

TCP, FOUR, REVERSED, UDP, ADAPTIVE, PACED = nettools.select(
    ["tcp-guest-host-1", "tcp-guest-host-4", "tcp-host-guest-1", "udp-64", "ping-adaptive", "ping-paced"]
)


def tcp_answer(rate: float) -> str:
    """iperf3 3.12's JSON, cut down: the sender counts more than arrives."""
    return json.dumps({"end": {"sum_sent": {"bits_per_second": rate * 2}, "sum_received": {"bits_per_second": rate}}})


def udp_answer(sent: int, seen: int, lost: int, seconds: float) -> str:
    """`seen` is the highest number that arrived, `lost` the gaps below it."""
    there = {"seconds": seconds, "packets": seen, "lost_packets": lost, "lost_percent": 1}
    return json.dumps({"end": {"sum_sent": {"seconds": 1, "packets": sent, "lost_packets": 0}, "sum_received": there}})


# nettools


@pytest.mark.parametrize(
    ("work", "words", "others"),
    [
        (TCP, {"iperf3", "-c", "1.2.3.4", "-J", "-t", "7", "-P", "1"}, {"-R", "-u"}),
        (FOUR, {"-P", "4"}, {"-R", "-u"}),
        (REVERSED, {"-R"}, {"-u"}),
        (UDP, {"-u", "-b", "0", "-l", "64"}, {"-P"}),
        (ADAPTIVE, {"ping", "-A", "-w", "7"}, {"-c"}),
        (PACED, {"ping", "-c", "700", "-i", "0.01"}, {"-A"}),
    ],
    ids=lambda value: value.name if isinstance(value, nettools.Work) else "",
)
def test_command_asks_for_what_is_reported(work: nettools.Work, words: set[str], others: set[str]) -> None:
    """Goal: streams, direction, sizes and pace of each workload.  Method: look for the words in the command line."""
    argv = nettools.command(work, "1.2.3.4", 7)
    assert words <= set(argv) and not others & set(argv)


def test_every_row_has_one_name_and_a_known_peer_for_each_target() -> None:
    """Goal: samples cannot be mixed up, targets cannot be lost.  Method: over the table of workloads."""
    rows = [row for work in nettools.WORKS for row in [*work.rows, *([work.cpu] if work.cpu else [])]]
    assert len({row.name for row in rows}) == len(rows)
    assert {peer for row in rows for peer, _ in row.targets} <= {peer.name for peer in netpeers.PEERS}
    assert nettools.select([work.name for work in nettools.WORKS]) == nettools.WORKS
    with pytest.raises(ValueError, match="no workload tcp-9; there are: tcp-guest-host-1, "):
        nettools.select(["udp-64", "tcp-9"])


def test_parse_takes_what_the_receiver_counted() -> None:
    """Goal: rates and losses of what arrived.  Method: answers whose sender and receiver differ, worked out by hand."""
    assert nettools.parse(TCP, tcp_answer(7.5e9)) == (7.5,)
    assert nettools.parse(UDP, udp_answer(1000, 900, 400, 2.0)) == (250.0, 50.0)
    assert nettools.parse(UDP, udp_answer(900, 900, 0, 1.5)) == (600.0, 0.0)


def test_parse_pings() -> None:
    """Goal: median and p99 of the times.  Method: 200 lines, 1 to 200 us, last first, among others without a time."""
    lines = [f"64 bytes from 1.2.3.4: icmp_seq={n} ttl=64 time={n / 1000:.3f} ms" for n in range(200, 0, -1)]
    text = "PING 1.2.3.4\n" + "\n".join(lines) + "\n200 packets transmitted, time 20ms\nrtt min/avg = 9/9 ms\n"
    for work in (ADAPTIVE, PACED):
        assert nettools.parse(work, text) == pytest.approx((100.5, 198))
    assert nettools.parse_pings("time=0.071 ms") == pytest.approx((71, 71))


@pytest.mark.parametrize(
    ("work", "text", "complaint"),
    [
        (TCP, "", "not understood"),
        (TCP, '{"error": "unable to connect to server"}', "iperf3: unable to connect"),
        (TCP, '{"end": {}}', "not understood"),
        (TCP, "[]", "not understood"),
        (TCP, tcp_answer(0), "got nothing"),
        (UDP, udp_answer(1000, 0, 0, 1.0), "got nothing"),
        (UDP, udp_answer(1000, 1000, 0, 0.0), "not understood"),
        (UDP, tcp_answer(1), "not understood"),
        (ADAPTIVE, "5 packets transmitted, 0 received, time 4000ms", "no answer"),
    ],
)
def test_an_answer_without_figures_is_an_error(work: nettools.Work, text: str, complaint: str) -> None:
    """Goal: never a figure that was not measured.  Method: broken answers, each with its message."""
    with pytest.raises(nettools.ToolError, match=complaint):
        nettools.parse(work, text)


def test_execute_ends_a_child_in_time_and_tells_its_words() -> None:
    """Goal: a hung tool costs its time limit only, a failed one is quoted.  Method: shells that do so."""
    with pytest.raises(nettools.ToolError, match="did not end"):
        nettools.execute(["sleep", "1000"], 0.05)
    with pytest.raises(nettools.ToolError, match=r"ended with 3: oh"):
        nettools.execute(["sh", "-c", "echo oh >&2; exit 3"], 60)
    with pytest.raises(nettools.ToolError, match="no-such-tool is not installed"):
        nettools.execute(["no-such-tool"], 60)
    assert nettools.execute(["sh", "-c", 'echo "{}"; exit 1'], 60) == "{}\n"  # iperf3's way to say what was wrong


# netreport


def results(*samples: netreport.Sample, peers: tuple[str, ...] = ("xenfs", "vde2", "veth")) -> netreport.Results:
    works = (TCP, UDP, ADAPTIVE)
    return netreport.Results("2024-01-01", {"CPU": "a CPU"}, {"vde2": "2.3"}, {"rounds": 3}, works, peers, [*samples])


def series(row: str, peer: str, *values: float) -> list[netreport.Sample]:
    return [netreport.Sample(row, peer, number, value) for number, value in enumerate(values)]


MEASURED = (
    *series("tcp-guest-host-1", "xenfs", 6, 7, 8),
    *series("tcp-guest-host-1", "vde2", 1, 1, 2),
    *series("tcp-guest-host-1", "veth", 20, 20, 10),
    *series("ping-adaptive-median", "xenfs", 50, 40, 60),
    *series("ping-adaptive-median", "vde2", 50, 40, 45),
    *series("udp-64-loss", "xenfs", 0, 0, 0),
    *series("tcp-guest-host-1-cpu", "xenfs", 130.04, 120, 140),
)


def test_ratio_is_of_medians_with_the_range_by_round() -> None:
    """Goal: ratios, also with gaps and zeroes.  Method: three rounds by hand."""
    assert netreport.ratio(MEASURED, "tcp-guest-host-1", "vde2") == Spread(7.0, 4.0, 7.0)
    assert netreport.ratio(MEASURED, "tcp-guest-host-1", "empty") is None
    only_last = [sample for sample in MEASURED if sample.peer != "vde2" or sample.round == 2]
    assert netreport.ratio(only_last, "tcp-guest-host-1", "vde2") == Spread(3.5, 4.0, 4.0)
    zero = [*series("udp-64", "xenfs", 5), *series("udp-64", "veth", 0)]
    assert netreport.ratio(zero, "udp-64", "veth") is None


@pytest.mark.parametrize(
    ("value", "target", "lower", "words"),
    [
        (6.0, 6.0, False, "target >= 6: reached"),
        (5.999, 6.0, False, "target >= 6: not reached"),
        (1.0, 1.0, True, "target <= 1: reached"),
        (1.001, 1.0, True, "target <= 1: not reached"),
        (None, 0.4, False, "target >= 0.4: not measured"),
    ],
)
def test_verdicts(value: float | None, target: float, lower: bool, words: str) -> None:
    """Goal: a miss is called a miss even where rounding hides it.  Method: at the border and just beyond it."""
    assert netreport.verdict(None if value is None else Spread(value, 0, 9), target, lower) == words


def test_tables_show_figures_verdicts_and_gaps() -> None:
    """Goal: what stands in the tables.  Method: all cells."""
    figures, ratios, cpu = netreport.tables(results(*MEASURED))
    assert figures[1:] == [
        ["TCP guest to host, 1 stream, Gbit/s", "7.00 (6.00-8.00)", "1.00 (1.00-2.00)", "20.00 (10.00-20.00)"],
        ["UDP guest to host, 64 bytes, packets/s", "-", "-", "-"],
        ["UDP guest to host, 64 bytes, lost, %", "0.0 (0.0-0.0)", "-", "-"],
        ["round trip, back to back, median, us", "50 (40-60)", "45 (40-50)", "-"],
        ["round trip, back to back, p99, us", "-", "-", "-"],
    ]
    one, other = "7.00 (4.00-7.00), target >= 6: reached", "0.35 (0.30-0.80), target >= 0.4: not reached"
    assert ratios[1:3] == [
        ["TCP guest to host, 1 stream", one, other],
        ["UDP guest to host, 64 bytes", "-, target >= 1.5: not measured", "-"],
    ]
    lower = "round trip, back to back, median (lower is better)"
    assert ratios[3] == [lower, "1.11 (1.00-1.33), target <= 1: not reached", "-"]
    assert cpu[1] == ["TCP guest to host, 1 stream, ms per Gbit", "130.0 (120.0-140.0)", "-", "-"]
    assert netreport.tables(results()) == []


def test_cost_is_per_amount_of_data() -> None:
    """Goal: CPU per Gbit and per million packets.  Method: by hand."""
    assert net.cost(TCP, 5.0, 1.0, 2.0) == 100.0  # 1 s for 10 Gbit
    assert net.cost(UDP, 50_000, 1.0, 2.0) == 10.0  # 1 s for a tenth of a million


def test_save_writes_what_was_found(tmp_path: Path) -> None:
    """Goal: the files hold samples, summary, facts, notes and failures.  Method: write, then read them back."""
    found = results(*MEASURED)
    found.idle.append(Idle("xenfs", 0.25, 3.0, 40.0, 55.0, 1, 4))
    found.failures.append("veth: gone")
    found.notes.append("a note.")
    lines = netreport.save(found, tmp_path / "new")
    record = json.loads((tmp_path / "new" / "net.json").read_text())
    assert len(record["samples"]) == len(MEASURED) and record["idle"][0]["wakeups_per_s"] == 3.0
    assert record["summary"]["tcp-guest-host-1"]["veth"] == {"median": 20, "xenfs_to_peer": 0.35, "target": 0.4}
    assert record["summary"]["tcp-guest-host-1-cpu"]["xenfs"]["median"] == 130.04
    page = (tmp_path / "new" / "net.md").read_text().splitlines()
    for line in ("- CPU: a CPU", "| vde2 | 2.3 |", "- veth: gone", "a note.", "| xenfs | 0.25 | 3.0 | 40.0 | 1 | 4 |"):
        assert line in page, line
    assert "could not be run" in netreport.text(found)
    drawn = (tmp_path / "new" / "net.png").exists()
    assert drawn == lines[-1].startswith("wrote ") != lines[-1].startswith("no plot: matplotlib")


# netpeers and the run


def test_peers_take_turns_at_being_first() -> None:
    """Goal: the order of peers rotates.  Method: as many rounds as there are peers, and none at all."""
    three = netpeers.select(["veth", "xenfs", "vde2"])
    assert [net.rotated(three, number)[0].name for number in range(4)] == ["veth", "xenfs", "vde2", "veth"]
    assert net.rotated((), 1) == []
    with pytest.raises(ValueError, match="no peer other; there are: xenfs, vde2, veth, empty"):
        netpeers.select(["veth", "other"])


def test_missing_names_the_package() -> None:
    """Goal: what to install is said.  Method: a program nobody has beside one that everybody has."""
    needs = (("no-such", "its-package"), ("sh", "dash"))
    assert netpeers.missing(needs) == "not installed: no-such (Debian package: its-package)"
    assert netpeers.missing((("sh", "dash"),)) == ""


def test_ground_is_cleared_in_reverse_whatever_fails(tmp_path: Path) -> None:
    """Goal: one step that fails leaves no other undone.  Method: three steps, the middle one raises."""
    done = []

    def fail() -> None:
        raise PeerFailure("would not go")

    with netpeers.Ground("x", tmp_path) as ground:
        ground.later(lambda: done.append(1))
        ground.later(fail)
        ground.later(lambda: done.append(3))
        assert done == []
    assert done == [3, 1] and ground.complaints == ["x: would not go"]


HELD = """
import os, signal, sys
from bench import interrupt
interrupt.install()
done = []
try:
    with interrupt.held():
        with interrupt.held():
            os.kill(os.getpid(), signal.{name})
        os.kill(os.getpid(), signal.SIGINT)
        done.append("noted")
    done.append("never")
except KeyboardInterrupt:
    os.kill(os.getpid(), signal.SIGINT)  # must not cut the clearing up short
    done.append("cleared")
print(done)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_waits_until_what_was_made_is_noted(name: str) -> None:
    """Goal: no signal between making and noting, none during clearing up.  Method: a child that signals itself."""
    argv = [sys.executable, "-c", HELD.format(name=name)]
    said = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True).stdout
    assert said == "['noted', 'cleared']\n"


def ours(pid: int) -> list[str]:
    """Network namespaces that a benchmark of this process id made."""
    folder = netpeers.NETNS
    return [path.name for path in folder.iterdir() if f"bench{pid}-" in path.name] if folder.exists() else []


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "scratch"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []
    assert not [mount for mount in mounts() if mount.startswith(f"{folder}/")]


def start(scratch: Path, *argv: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.net", "--quick", "--dir", str(scratch), *argv]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.host
def test_a_short_run_measures_and_cleans_up(scratch: Path, tmp_path: Path) -> None:
    """Goal: a real run ends with figures and leaves nothing.  Method: one workload of each kind on our own server."""
    works = "tcp-guest-host-1-mtu9000,udp-1400,ping-adaptive"
    child = start(scratch, "--peers", "xenfs", "--workloads", works, "--out", str(tmp_path / "out"))
    said, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    record = json.loads((tmp_path / "out" / "net.json").read_text())
    names = [*works.split(",")[:2], "udp-1400-cpu", "ping-adaptive-median", "ping-adaptive-p99"]
    assert all(record["summary"][name]["xenfs"]["median"] > 0 for name in names), record["summary"]
    assert record["idle"][0]["peer"] == "xenfs" and record["idle"][0]["processes"] == 1
    assert "TCP guest to host, 1 stream, MTU 9000" in said
    assert ours(child.pid) == []


@pytest.mark.host
def test_an_interrupted_run_cleans_up(scratch: Path, tmp_path: Path) -> None:
    """Goal: Ctrl-C in the middle leaves nothing.  Method: a SIGINT while iperf3 measures our own server."""
    child = start(scratch, "--peers=xenfs,veth", "--seconds=60", "--workloads=udp-64", f"--out={tmp_path / 'out'}")
    try:
        deadline = time.monotonic() + 60
        while not running("iperf3", child.pid):
            assert child.poll() is None and time.monotonic() < deadline, child.communicate()
            time.sleep(0.02)
        assert len(ours(child.pid)) == 6  # each has a host and two guests
    finally:
        child.send_signal(signal.SIGINT)
        said, errors = child.communicate(timeout=60)
    assert child.returncode == 130 and "everything started was ended" in errors, (said, errors)
    assert ours(child.pid) == [] and not (tmp_path / "out").exists()


def running(name: str, parent: int) -> bool:
    """Has this process two children of that name: iperf3's client and its server?"""
    found = 0
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        try:
            found += Path(f"/proc/{pid}/comm").read_text().strip() == name
        except OSError:
            continue
    return found == 2


def test_options_that_make_no_sense_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Goal: nothing starts on a typing error.  Method: the message of each."""
    for argv, words in (
        (["--peers", "vde3"], "no peer vde3"),
        (["--workloads", "none"], "nothing to do"),
        (["--rounds", "0"], "not a number from 1 to 100"),
    ):
        with pytest.raises(SystemExit) as ended:
            net.parse_options(argv)
        assert ended.value.code == 2 and words in capsys.readouterr().err, argv
