"""peers.py: the servers that are compared - how each is started, known to be ready, watched and ended.

Called by block.py. Each peer offers the same raw images, through the host's page cache, as files under FUSE.
qemu-storage-daemon runs with its default aio, a pool of threads; `qsd-uring` is the same with aio=io_uring.
nbdfuse starts nbdkit as its manual advises, by socket activation, which lets it use several connections.

Invariants: a server runs in a session of its own, so all its processes are found and only they are signalled;
whatever happens, `running` ends them and takes their mount away before it returns. Nothing here touches a
path under a server's mount but a child process with a time limit: a hung server must not hang the benchmark.
Left out: what the kernel does for a server in kworkers (its io_uring workers are threads of it and counted).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.fio import FioError, capture

REPOSITORY = Path(__file__).resolve().parent.parent
READY_S = 30.0  # from start to all disks offered
STOP_S = 15.0  # from SIGTERM to the end of the last process
STAT_S = 5.0
POLL_S = 0.02
SETTLE_S = 1.0  # before idling is measured: let the last request's work end


class PeerFailure(Exception):
    """A server did not start, or did not do what was asked; the text says which and shows its last words."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a server: the files it will offer, its mount, and whether it prints `ready`."""

    argv: tuple[str, ...]
    files: tuple[Path, ...]
    mountpoint: Path
    says_ready: bool
    same_size: bool = True  # the file offered is as long as the image


@dataclass(frozen=True, slots=True)
class Peer:
    """`needs` are (program, Debian package); `module` is ours; `launch(work, images)` may fill work."""

    name: str
    title: str
    launch: Callable[[Path, Sequence[Path]], Launch]
    needs: tuple[tuple[str, str], ...] = ()
    module: str = ""
    exit_codes: tuple[int, ...] = (0,)  # after SIGTERM


@dataclass(frozen=True, slots=True)
class Server:
    """A running peer."""

    peer: Peer
    pid: int
    files: tuple[Path, ...]
    size_bytes: int  # of the shortest file


@dataclass(frozen=True, slots=True)
class Usage:
    """All processes of a server, in sum, at one moment."""

    cpu_s: float
    wakeups: int
    pss_kib: int
    rss_kib: int
    processes: int
    threads: int


@dataclass(frozen=True, slots=True)
class Idle:
    """What a server costs while nobody uses it, and the memory it kept from the work before."""

    peer: str
    cpu_percent: float  # of one core
    wakeups_per_s: float
    pss_mib: float
    rss_mib: float
    processes: int
    threads: int


def _launch_xenfs(work: Path, images: Sequence[Path]) -> Launch:
    disks = [f"xvd{chr(ord('a') + number)}" for number in range(len(images))]
    listed = ", ".join(f"'file:{image},{disk},w'" for image, disk in zip(images, disks, strict=True))
    config = work / "bench.cfg"
    config.write_text(f'name="bench"\nmemory=256\ndisk=[{listed}]\n')
    mount = work / "mnt"
    mount.mkdir()
    files = tuple(mount / "domains" / "bench" / "dev" / disk for disk in disks)
    argv = (sys.executable, "-m", "xenfs", "up", "--mount", str(mount), str(config))
    return Launch(argv, files, mount, says_ready=True)


def _launch_empty(work: Path, images: Sequence[Path]) -> Launch:
    mount = work / "mnt"
    mount.mkdir()
    argv = (sys.executable, "-m", "bench.empty", str(mount))
    return Launch(argv, (mount / "empty",), mount, says_ready=True, same_size=False)


def _launch_qsd(work: Path, images: Sequence[Path], aio: str = "threads") -> Launch:
    (image,) = images
    file = work / "disk"
    file.touch()
    argv = (
        "qemu-storage-daemon",
        "--blockdev",
        f"driver=file,node-name=file,filename={image},cache.direct=off,aio={aio}",
        "--blockdev",
        "driver=raw,node-name=disk,file=file",
        "--export",
        f"type=fuse,id=export,node-name=disk,mountpoint={file},writable=on,growable=off",
    )
    return Launch(argv, (file,), file, says_ready=False)


def _launch_qsd_uring(work: Path, images: Sequence[Path]) -> Launch:
    return _launch_qsd(work, images, aio="io_uring")


def _launch_nbdfuse(work: Path, images: Sequence[Path]) -> Launch:
    (image,) = images
    file = work / "disk"
    file.touch()
    argv = ("nbdfuse", str(file), "[", "nbdkit", "--exit-with-parent", "file", str(image), "]")
    return Launch(argv, (file,), file, says_ready=False)


PEERS = (
    Peer("xenfs", "xenfs", _launch_xenfs, module="xenfs.__main__"),
    Peer(
        "qsd",
        "qemu-storage-daemon FUSE export",
        _launch_qsd,
        needs=(("qemu-storage-daemon", "qemu-system-common"),),
    ),
    Peer(
        "qsd-uring",
        "qemu-storage-daemon FUSE export, aio=io_uring",
        _launch_qsd_uring,
        needs=(("qemu-storage-daemon", "qemu-system-common"),),
    ),
    Peer(
        "nbdfuse",
        "nbdfuse + nbdkit file",
        _launch_nbdfuse,
        needs=(("nbdfuse", "libnbd-bin"), ("nbdkit", "nbdkit")),
        exit_codes=(0, 1),  # it calls an end by signal a failure
    ),
    Peer("empty", "empty server on our FUSE session", _launch_empty, module="bench.empty"),
)


def missing(peer: Peer) -> str:
    """Why this peer cannot run here, or ""."""
    absent = [need for need in peer.needs if not shutil.which(need[0])]
    if absent:
        return "not installed: " + ", ".join(f"{need} (Debian package: {name})" for need, name in absent)
    if peer.module:
        with contextlib.suppress(ModuleNotFoundError):  # of the package above it
            if importlib.util.find_spec(peer.module):
                return ""
        return f"this checkout has no {peer.module}"
    return ""


def version(peer: Peer) -> str:
    """One line, from the programs themselves; for our own, the commit and the interpreter."""
    if peer.module:
        commit = _output("git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD") or "unknown"
        return f"commit {commit}, Python {sys.version.split()[0]}"
    return ", ".join(_output(program, "--version") for program, _ in peer.needs)


def _output(*argv: str) -> str:
    try:
        code, output, _ = capture(argv, STAT_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return output.strip().split("\n")[0] if code == 0 else ""


@contextlib.contextmanager
def running(peer: Peer, images: Sequence[Path], work: Path) -> Iterator[Server]:
    """Start `peer` on `images` with its files in the new folder `work`; end it and unmount on the way out."""
    work.mkdir()
    launch = peer.launch(work, images)
    log = work / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            launch.argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            start_new_session=True,
        )
    complaint = ""
    try:
        try:
            size_bytes = _wait_ready(peer, process, launch, log, images)
            yield Server(peer, process.pid, launch.files, size_bytes)
        finally:
            complaint = _stop(peer, process)
            unmount_below(work)
    except FioError as error:  # the client saw it first; why is in the server's words
        if complaint:
            raise PeerFailure(f"{error}; {complaint}; {_last_words(log)}") from error
        raise
    if complaint:
        raise PeerFailure(f"{complaint}; {_last_words(log)}")


def _wait_ready(
    peer: Peer, process: subprocess.Popen[bytes], launch: Launch, log: Path, images: Sequence[Path]
) -> int:
    """-> size in bytes of the shortest file offered."""
    deadline = time.monotonic() + READY_S
    wanted = min(image.stat().st_size for image in images)
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise PeerFailure(f"{peer.name} ended with {process.returncode} at its start; {_last_words(log)}")
        if launch.says_ready:
            ready = b"ready" in log.read_bytes().splitlines()
        else:
            ready = str(launch.mountpoint) in mounts()
        if ready:
            size_bytes = min(_size(peer, file) for file in launch.files)
            if launch.same_size and size_bytes != wanted:
                raise PeerFailure(f"{peer.name} offers {size_bytes} bytes of an image of {wanted}")
            return size_bytes
        time.sleep(POLL_S)
    raise PeerFailure(f"{peer.name} was not ready within {READY_S:.0f} s; {_last_words(log)}")


def _size(peer: Peer, file: Path) -> int:
    text = _output("stat", "--dereference", "--format=%s", str(file))
    if not text:
        raise PeerFailure(f"{peer.name} is ready but {file} cannot be reached")
    return int(text)


def _stop(peer: Peer, process: subprocess.Popen[bytes]) -> str:
    """End all processes of the server; -> what was wrong with how it ended, or ""."""
    complaint = ""
    if process.poll() is None:
        process.terminate()
    else:
        complaint = f"{peer.name} had ended by itself with {process.returncode}"
    deadline = time.monotonic() + STOP_S
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
        while members(process.pid) and time.monotonic() < deadline:
            time.sleep(POLL_S)
    if members(process.pid):
        complaint = f"{peer.name} did not end within {STOP_S:.0f} s of SIGTERM and was killed"
        os.killpg(process.pid, signal.SIGKILL)  # the group is ours while a member lives
        process.wait()
    if not complaint and process.returncode not in peer.exit_codes:
        complaint = f"{peer.name} ended with {process.returncode} after SIGTERM"
    return complaint


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()[-5:]
    return "its last words: " + (" | ".join(lines) or "none")


def mounts() -> list[str]:
    """All mount points of this mount namespace. Octal escapes stay: block.py refuses names that need them."""
    return [line.split(" ")[1] for line in Path("/proc/self/mounts").read_text().splitlines()]


def unmount_below(work: Path) -> None:
    """Detach what is still mounted under `work` (deepest first), so that its files can be removed safely."""
    for mount in sorted(mounts(), key=len, reverse=True):
        if mount.startswith(f"{work}/"):
            subprocess.run(["umount", "--lazy", mount], check=True, stdin=subprocess.DEVNULL)


def members(session: int) -> list[int]:
    """The living processes of a session; zombies, which some other parent has to reap, do not count."""
    pids = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                state, owner, _ = parse_stat((folder / "stat").read_text())
                if owner == session and state not in "ZX":
                    pids.append(int(folder.name))
    return sorted(pids)


def parse_stat(text: str) -> tuple[str, int, int]:
    """/proc/PID/stat -> (state, session, utime + stime in ticks). The name may hold anything, also ") "."""
    fields = text.rpartition(")")[2].split()  # fields[0] is field 3 of proc(5)
    return fields[0], int(fields[3]), int(fields[11]) + int(fields[12])


def parse_fields(text: str) -> dict[str, int]:
    """Lines of "Name: number [kB]" as in status and smaps_rollup -> numbers; other lines are skipped."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if words and words[0].isdigit():
            found[name] = int(words[0])
    return found


def usage(session: int) -> Usage:
    """Add up a server's processes. A wake-up is a voluntary context switch: a thread had gone to sleep."""
    ticks = wakeups = pss = rss = threads = 0
    pids = members(session)
    if not pids:
        raise PeerFailure("the server ended while it was watched")
    for pid in pids:
        folder = Path("/proc") / str(pid)
        ticks += parse_stat((folder / "stat").read_text())[2]
        memory = parse_fields((folder / "smaps_rollup").read_text())
        pss += memory["Pss"]
        rss += memory["Rss"]
        for task in (folder / "task").iterdir():
            with contextlib.suppress(OSError):  # a thread of a pool may end any time
                wakeups += parse_fields((task / "status").read_text())["voluntary_ctxt_switches"]
                threads += 1
    return Usage(ticks / os.sysconf("SC_CLK_TCK"), wakeups, pss, rss, len(pids), threads)


def idle(server: Server, seconds: float) -> Idle:
    """Watch a server that nobody uses. A thread that ends meanwhile takes its count along: never below 0."""
    time.sleep(SETTLE_S)
    start = time.monotonic()
    before = usage(server.pid)
    time.sleep(seconds)
    after = usage(server.pid)
    passed_s = time.monotonic() - start
    return Idle(
        server.peer.name,
        100 * (after.cpu_s - before.cpu_s) / passed_s,
        max(0, after.wakeups - before.wakeups) / passed_s,
        after.pss_kib / 1024,
        after.rss_kib / 1024,
        after.processes,
        after.threads,
    )
