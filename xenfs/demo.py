"""demo.py: `xenfs demo`: a guest with one disk, from mkfs to fsck, each step with its command line.

Called by the command line. The guest is served by another process, `xenfs up`, and every look at its mount is a further
process with a time limit: a program that waits for a mount that it serves itself waits for ever.

Invariants: the status is 0 only if every step succeeded; whatever happens, also Ctrl-C, nothing stays mounted, attached
or running, and the scratch directory goes (unless it was asked for). Nothing is removed below a mount that would not go.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

CONFIG = """\
name = "guest1"
memory = 64
disk = [ "disk.img, raw, xvda, rw" ]
"""
DEV, BACKEND = "mnt/domains/guest1/dev", "mnt/xenstore/local/domain/0/backend/vbd/1/51712"  # 51712 is xvda
TOOLS = ("mkfs.ext4", "mount", "umount", "losetup", "e2fsck", "debugfs")
SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"  # not on everybody's PATH
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STEP_S = 30.0
READY_S = 20.0
END_S = 30.0  # from SIGTERM to the end of the server
POLL_S = 0.02
MOST_LINES, MOST_COLUMNS = 12, 150  # of a command's output

Process = subprocess.Popen[Any]


def _end_with_parent() -> None:
    """In the server, before it starts: SIGTERM when the demo dies in whatever way, so that its mount goes too."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class StepError(Exception):
    """A step did not do what it should; the text says which and how."""


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP came."""


def demo(keep: bool) -> int:
    """Run all steps. 0; 1 if one failed or the demo cannot run here; 130 after a signal."""
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_PATH}"
    if reason := _obstacle():
        print(f"xenfs: demo: {reason}", file=sys.stderr)
        return 1
    folder = Path(tempfile.mkdtemp(prefix="xenfs-demo-")).resolve()
    scene = Scene(folder)
    before = [signal.getsignal(number) for number in SIGNALS]
    status = 1
    try:
        for number in SIGNALS:
            signal.signal(number, scene.interrupt)
        _play(scene)
        status = 0
    except StepError as error:
        print(f"\nxenfs: demo: {error}", file=sys.stderr)
        scene.show_log()
    except Interrupted:
        print("\nxenfs: demo: interrupted", file=sys.stderr)
        status = 130
    finally:
        scene.interrupted = True  # no signal counts from here on
        left = scene.clean(keep)
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
    for line in left:
        print(f"xenfs: demo: {line}", file=sys.stderr)
    if status == 0 and not left:
        print("\nDone." + (f" Everything is still in {folder}" if keep else " Everything was cleaned up."))
    return status or bool(left)


def _obstacle() -> str:
    if os.geteuid() != 0:
        return "root is needed to mount a file system from the guest's disk (mount -o loop); `xenfs up` itself is not"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian's packages e2fsprogs and mount)"
    return "" if os.path.exists("/dev/fuse") else "/dev/fuse is missing: modprobe fuse, or give it to this container"


def _play(scene: Scene) -> None:
    scene.title("An image for the disk: 256 MiB, nothing of it allocated")
    scene.run("truncate", "-s", "256M", "disk.img")

    scene.title("A guest with that disk, in the syntax of xl.cfg(5)")
    (scene.folder / "guest.cfg").write_text(CONFIG)
    scene.run("cat", "guest.cfg")

    scene.title("Start it: blkfront and blkback shake hands through xenstore and share a ring")
    scene.start("up", "--mount", "mnt", "guest.cfg")

    scene.title("The guest's disk is a file now")
    scene.run("ls", "-l", DEV)

    scene.title("Put a file system on it, mount it, write to it")
    scene.run("mkfs.ext4", "-q", f"{DEV}/xvda")
    scene.run("mount", "-o", "loop", f"{DEV}/xvda", "fs")
    scene.run("sh", "-c", 'echo "written through a ring" > fs/hello && head -c 16M /dev/urandom > fs/random')
    scene.run("sync", "-f", "fs")

    scene.title("Both ends of the ring: what the frontend asked, what the backend served")
    scene.run("cat", "mnt/domains/guest1/inspect/rings", "mnt/domains/0/inspect/rings")

    scene.title("The store they met in is a directory; state 4 is Connected")
    scene.run("sh", "-c", f'cd {BACKEND} && grep "" frontend params state sectors feature-flush-cache')

    scene.title("Unmount it, and let e2fsck judge")
    scene.run("umount", "fs")
    scene.run("e2fsck", "-fn", f"{DEV}/xvda")

    scene.title("End it: SIGTERM flushes, closes both ends, unmounts")
    scene.end()

    scene.title("What was written is in the image")
    if scene.run("debugfs", "-R", "cat /hello", "disk.img") != "written through a ring\n":
        raise StepError("the image does not hold what was written")


class Scene:
    """The scratch directory and what was started in it. Commands run in `folder`, so their lines are short."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0
        self.server: Process | None = None
        self.children: list[Process] = []  # not known to have ended; perhaps stuck in a request to the mount
        self.starting = self.interrupted = False
        for name in ("mnt", "fs"):
            (folder / name).mkdir()

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """The signals' handler. Only the first counts: a second Ctrl-C must not cut the clean-up short."""
        before, self.interrupted = self.interrupted, True
        if not (before or self.starting):
            raise Interrupted

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """An exception in the middle of Popen() would leave a child that nobody knows: a signal then is obeyed after it."""
        self.starting = True
        try:
            yield
        finally:
            self.starting = False
        if self.interrupted:
            raise Interrupted

    # --- steps -------------------------------------------------------------------------------------------------------

    def title(self, text: str) -> None:
        self.number += 1
        print(f"\n{self.number}. {text}", flush=True)

    def run(self, *words: str) -> str:
        """Show a command, run it, show what it said, trimmed. Its standard output; StepError if it failed."""
        print(f"   $ {shlex.join(words)}", flush=True)
        with self._undisturbed():
            pipe = subprocess.PIPE
            child = subprocess.Popen(words, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
            self.children.append(child)
        try:
            out, err = child.communicate(timeout=STEP_S)
        except subprocess.TimeoutExpired:
            raise StepError(f"{words[0]} did not end within {STEP_S:g} s") from None
        self.children.remove(child)
        self._show(out)
        if child.returncode:
            raise StepError(f"{words[0]} ended with {child.returncode}: {err.strip()}")
        return out

    def _show(self, text: str) -> None:
        lines = text.splitlines()
        for line in lines[:MOST_LINES]:
            print(f"   {line[:MOST_COLUMNS]}")
        if len(lines) > MOST_LINES:
            print(f"   ... and {len(lines) - MOST_LINES} lines more")
        sys.stdout.flush()

    def start(self, *arguments: str) -> None:
        """Start `xenfs ...` and wait until it is ready. A session of its own keeps a terminal's Ctrl-C from it."""
        print(f"   $ xenfs {shlex.join(arguments)} &", flush=True)
        package = str(Path(__file__).resolve().parents[1])
        paths = filter(None, (package, os.environ.get("PYTHONPATH")))
        with self._log.open("wb") as log, self._undisturbed():
            self.server = subprocess.Popen(
                [sys.executable, "-m", "xenfs", *arguments],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        deadline = time.monotonic() + READY_S
        while "ready\n" not in self._said():
            if self.server.poll() is not None:
                raise StepError(f"xenfs ended with {self.server.returncode} before it was ready")
            if time.monotonic() > deadline:
                raise StepError(f"xenfs was not ready within {READY_S:g} s")
            time.sleep(POLL_S)
        self._show(self._said())

    def end(self) -> None:
        assert self.server is not None, "end() before start()"
        print(f"   $ kill {self.server.pid}; wait {self.server.pid}; echo $?", flush=True)
        status = self._end_server()
        self._show(f"{status}\n")
        if status != 0:
            raise StepError(f"xenfs ended with status {status}")

    @property
    def _log(self) -> Path:
        return self.folder / "xenfs.log"

    def _said(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def show_log(self) -> None:
        if said := self._said():
            print("what xenfs said:", file=sys.stderr)
            print(said, end="", file=sys.stderr)

    # --- afterwards --------------------------------------------------------------------------------------------------

    def clean(self, keep: bool) -> list[str]:
        """Take everything down again, in order. What could not be, as sentences."""
        for unfinished in self.children:
            unfinished.kill()  # not waited for here: a request that nobody answers outlives even SIGKILL
        if self._is_mounted("fs"):
            self._quietly("umount", "fs") or self._quietly("umount", "-l", "fs")
        self._end_server()
        for device in self._loop_devices():
            self._quietly("losetup", "-d", device)
        if self._is_mounted("mnt"):
            self._quietly("umount", "-l", "mnt")
        left = [f"{self.folder}/{name} is still mounted" for name in ("fs", "mnt") if self._is_mounted(name)]
        left += [f"{device} is still attached" for device in self._loop_devices()]
        for child in (*self.children, self.server):  # the server is gone, and with it what the others waited for
            if child is not None and not _ended(child):
                left.append(f"process {child.pid} does not end")
        if not left and not keep:
            shutil.rmtree(self.folder)
        return left

    def _end_server(self) -> int | None:
        """SIGTERM, and SIGKILL if that was not enough. Its exit status."""
        if self.server is None:
            return None
        if self.server.poll() is None:
            self.server.terminate()
        if not _ended(self.server):
            self.server.kill()
            _ended(self.server)
        return self.server.returncode

    def _quietly(self, *words: str) -> bool:
        null = subprocess.DEVNULL  # and a session of its own keeps a terminal's Ctrl-C from it
        child = subprocess.Popen(words, cwd=self.folder, stdout=null, stderr=null, start_new_session=True)
        if not _ended(child):
            child.kill()
            self.children.append(child)
        return child.returncode == 0

    def _is_mounted(self, name: str) -> bool:
        """The mount table asks no file system anything, so looking there cannot hang."""
        wanted = os.fsencode(self.folder / name).replace(b" ", b"\\040")  # as proc(5) writes it
        with open("/proc/self/mountinfo", "rb") as table:
            return any(line.split(b" ")[4] == wanted for line in table)

    def _loop_devices(self) -> Sequence[str]:
        """Loop devices over files of ours, as sysfs names them."""
        found = []
        for file in Path("/sys/block").glob("loop*/loop/backing_file"):
            try:
                backing = file.read_text()
            except OSError:
                continue  # detached meanwhile
            if backing.startswith(f"{self.folder}/"):
                found.append(f"/dev/{file.parts[3]}")
        return found


def _ended(child: Process) -> bool:
    """Wait for it, but not for ever."""
    try:
        child.wait(END_S)
    except subprocess.TimeoutExpired:
        return False
    return True
