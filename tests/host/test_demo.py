"""Goal: `xenfs demo` shows what it promises, and leaves nothing behind however it ends.
Method: run it as a user would, with tools of its path replaced by ones that fail, hang or do harm.

Its scratch directory goes where TMPDIR says, so what it left is what is in there, mounted below or running there.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from netdev.netlink import Netlink, NetlinkError, create_namespace, namespaces, remove_namespace

pytestmark = pytest.mark.host

DEMO = [sys.executable, "-m", "xenfs", "demo"]
REPOSITORY = Path(__file__).resolve().parents[2]
TITLES = 18
GUESTS = ("guest1", "guest2")
KEPT = ["disk.img", "fetched", "fs", "guest1.cfg", "guest2.cfg", "http.log", "mnt", "xenfs.log"]
KILL_SERVER = """
for each in /proc/[0-9]*; do
    if [ "$(readlink $each/cwd)" = "$PWD" ] && tr '\\0' ' ' < $each/cmdline | grep -q 'xenfs up'; then
        kill -9 "${each#/proc/}" && exit 9
    fi
done
"""


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "bin").mkdir()
    return (tmp_path / "scratch").resolve()


def environment(scratch: Path, **tools: str) -> dict[str, str]:
    """TMPDIR is `scratch`; each of `tools` is a shell script that comes before the real one."""
    binaries = scratch.parent / "bin"
    for name, script in tools.items():
        (binaries / name).write_text(f"#!/bin/sh\n{script}\n")
        (binaries / name).chmod(0o755)
    changes = {"TMPDIR": str(scratch), "PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    return os.environ | changes | {"LC_ALL": "C"}


def run(scratch: Path, *arguments: str, **tools: str) -> subprocess.CompletedProcess[str]:
    words = [*DEMO, *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment(scratch, **tools))


def left_behind(scratch: Path) -> list[str]:
    """Mounts, loop devices, processes and files below `scratch`, and namespaces; no file system is asked that may hang."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    found = [f"mount {path}" for path in mounts if path.startswith(f"{scratch}/")]
    found += abandoned_namespaces()
    for link in [*Path("/proc").glob("[0-9]*/cwd"), *Path("/sys/block").glob("loop*/loop/backing_file")]:
        try:
            target = os.readlink(link) if link.is_symlink() else link.read_text()
        except OSError:
            continue  # ended or detached since
        if target.startswith(f"{scratch}/"):
            found.append(f"{link}: {target}")
    return found or os.listdir(scratch)


def abandoned_namespaces() -> list[str]:
    """Namespaces of the demo's guests whose maker lives no more: other runs may have guests of these names."""
    found = []
    for name in namespaces():
        if name.startswith(tuple(f"xenfs-{guest}" for guest in GUESTS)):
            with contextlib.suppress(NetlinkError):  # gone since
                maker = re.search(r"process (\d+) ", Netlink(name).link("lo").alias)
                if maker and not Path("/proc", maker[1]).exists():
                    found.append(f"network namespace {name} of process {maker[1]}")
    return found


def running(scratch: Path) -> list[int]:
    """The processes that stand below `scratch`."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # ended since
            if os.readlink(link).startswith(f"{scratch}/"):
                found.append(int(link.parts[2]))
    return found


def test_every_step(scratch):
    """Goal: all steps in order, each with its command, status 0, and the clean-up.  Method: run it; what it shows of the
    pings, the copied file and the rings says that frames have crossed."""
    done = run(scratch)
    assert done.returncode == 0, done.stderr
    said = re.sub(r"guest([12])-\d+", r"guest\1", done.stdout)  # their names if another xenfs has the usual ones
    assert re.findall(r"^(\d+)\. ", said, re.MULTILINE) == [str(i + 1) for i in range(TITLES)]
    for words in (
        "$ mkfs.ext4 -q mnt/domains/guest1/dev/xvda", "$ e2fsck -fn", "state:4", "written through a ring",
        "$ unshare --net xenfs up", "in network namespace xenfs-guest2, bridge xenbr0, connected",
        "$ nsenter --net=/run/netns/xenfs-guest1 ping", "hotplug-status:connected", "feature-gso-tcpv4 1",
        "$ env XENSTORED_PATH=mnt.xenstored xenstore-ls -f", '/local/domain/2/device/vif/0/state = "4"',
        '/libxl/2/type = "pv"', "$ xenfs quota --mount mnt guest1",
    ):  # fmt: skip
        assert words in said
    assert said.count("3 packets transmitted, 3 received") == 4
    sent, received = re.findall(r"^   ([0-9a-f]{64})  \S+$", said, re.MULTILINE)
    assert sent == received
    crossed = re.search(r"^   backend/vif/2/0 +back rx .* bytes=(\d+) dropped=0$", said, re.MULTILINE)
    assert crossed is not None
    assert int(crossed[1]) > 16 << 20  # the file, to the second guest
    for device, least in (("vbd/1/51712", 20), ("vif/1/0", 100), ("vif/2/0", 100)):  # domain 0's ports: before, and after
        rows = [line.split() for line in said.splitlines() if line.endswith(f" kernel: {device}")]
        counts = [int(row[5]) + int(row[6]) for row in rows]
        half = len(counts) // 2
        assert sum(counts[half:]) - sum(counts[:half]) > least, rows
    assert left_behind(scratch) == []


def test_the_real_network_is_not_touched(scratch):
    """Goal: no interface and no address appears outside of the demo's namespaces.  Method: a `ping` that looks, from a
    namespace of the test's own in which the demo runs; that one has nothing but lo, then and in the end."""
    name = f"xenfs-test-{os.getpid()}"
    create_namespace(name)
    try:
        inside = ["nsenter", f"--net=/run/netns/{name}"]
        look = f"{' '.join(inside)} ls /proc/self/net/dev_snmp6 > {scratch.parent}/seen; exit 7"
        words = [*inside, *DEMO]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment(scratch, ping=look))
        assert "ended with 7" in done.stderr, done.stderr
        assert (scratch.parent / "seen").read_text() == "lo\n"
        assert subprocess.run([*inside, "ls", "/proc/self/net/dev_snmp6"], capture_output=True, text=True).stdout == "lo\n"
    finally:
        remove_namespace(name)
    assert left_behind(scratch) == []


def test_taken_names(scratch):
    """Goal: another xenfs whose guest has the same name is not disturbed.  Method: a namespace of that name, unless there
    is one; it is still there, with the same mark, afterwards."""
    taken = f"xenfs-{GUESTS[0]}"
    mine = taken not in namespaces()
    if mine:
        create_namespace(taken)
    try:
        mark = Netlink(taken).link("lo").alias
        done = run(scratch)
        assert done.returncode == 0, done.stderr
        assert re.search(r"domains/guest1-\d+/dev/xvda", done.stdout)
        assert not mine or Netlink(taken).link("lo").alias == mark
    finally:
        if mine:
            remove_namespace(taken)
    assert left_behind(scratch) == []


def test_keep(scratch):
    """Goal: --keep leaves image, configuration and log, and nothing mounted.  Method: look, then fsck the image."""
    done = run(scratch, "--keep")
    assert done.returncode == 0, done.stderr
    (name,) = left_behind(scratch)  # no mount, no process
    folder = scratch / name
    assert sorted(os.listdir(folder)) == KEPT
    assert str(folder) in done.stdout
    assert (folder / "xenfs.log").read_text().endswith(", connected\nready\n")
    assert subprocess.run(["e2fsck", "-fn", folder / "disk.img"], capture_output=True, timeout=30).returncode == 0


FAILURES = [
    ("truncate", "echo no space >&2; exit 1", "`truncate -s 256M disk.img` ended with 1: no space"),
    ("e2fsck", "exit 4", "` ended with 4"),
    ("sync", "exec /bin/false", "`sync -f fs` ended with 1"),
    ("umount", '[ "$1" = -l ] && exec /bin/umount "$@"; exit 32', "`umount fs` ended with 32"),
    ("sync", KILL_SERVER, "`sync -f fs` ended with 9"),
    ("ping", "echo no answer; exit 1", " ping -q -c 3 -i 0.1 10.77.0.12` ended with 1"),
    ("ping", KILL_SERVER, "10.77.0.12` ended with 9"),
    ("sha256sum", "/usr/bin/sha256sum $1; echo 0000 $2", "what arrived is not what was sent"),
    ("debugfs", "echo something else", "the image does not hold what was written"),
]


@pytest.mark.parametrize(("tool", "script", "words"), FAILURES, ids=[row[2] for row in FAILURES])
def test_a_failing_step(scratch, tool, script, words):
    """Goal: a step that fails is named, the status is 1, and all that was started is gone.
    Method: one broken tool per case, at another moment each; one kills the server under a mounted disk."""
    done = run(scratch, **{tool: script})
    assert done.returncode == 1
    assert words in done.stderr, done.stderr
    assert "Done." not in done.stdout
    assert left_behind(scratch) == []


@pytest.mark.parametrize(("number", "tool"), [(signal.SIGINT, "sync"), (signal.SIGTERM, "ping"), (signal.SIGHUP, "python3")])
def test_a_signal(scratch, number, tool):
    """Goal: Ctrl-C in the middle cleans up too.
    Method: a tool tells that it was started, with the disk mounted or in a guest's namespace, and then hangs; the signal
    comes, twice, while it does."""
    fifo = scratch.parent / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    environ = environment(scratch, **{tool: f"echo hanging > {fifo}; exec sleep 100"})
    with subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ) as child:
        hangs, _, _ = select.select([reader], [], [], 60)
        child.send_signal(number)
        child.send_signal(number)
        said, _ = child.communicate(timeout=60)
    os.close(reader)
    assert hangs, said
    assert child.returncode == 130
    assert said.endswith("xenfs: demo: interrupted\n")
    assert left_behind(scratch) == []


def test_killed(scratch):
    """Goal: `kill -9` of the demo leaves no `xenfs up` behind, and with it no mount and no namespace.
    Method: `mkfs.ext4` tells that the disk is there and then hangs; SIGKILL; the server's end is waited for."""
    fifo = scratch.parent / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    environ = environment(scratch, **{"mkfs.ext4": f"echo $$ > {fifo}; exec sleep 100"})
    with subprocess.Popen(DEMO, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environ) as child:
        hangs, _, _ = select.select([reader], [], [], 60)
        assert hangs, "the demo did not come so far"
        tool = int(os.read(reader, 100))
        (server,) = [pid for pid in running(scratch) if b"up" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
        end = os.pidfd_open(server)
        child.kill()
        os.kill(tool, signal.SIGKILL)
    os.close(reader)
    ended, _, _ = select.select([end], [], [], 30)
    os.close(end)
    assert ended, f"process {server} is still there"
    assert not any(found.startswith(("mount ", "network ")) for found in left_behind(scratch))
    assert "\nready\n" in next(scratch.glob("*/xenfs.log")).read_text()


def test_without_root(scratch):
    """Goal: an ordinary user is told why not, before anything is started.  Method: in a user namespace, as nobody."""
    done = subprocess.run(["unshare", "--user", *DEMO], capture_output=True, text=True, timeout=30, env=environment(scratch))
    assert (done.returncode, done.stdout) == (1, "")
    assert "root is needed to mount" in done.stderr
    assert left_behind(scratch) == []
