"""scene.py: the scratch directory of `xenfs demo`, what was started in it, and how all of it goes away again.

Called by xenfs/demo.py. The guests are served by another process, `xenfs up`, and every look at its mount is a further
process with a time limit: a program that waits for a mount that it serves itself waits for ever.

Invariant: after clean() nothing is mounted, attached or running, no namespace of ours is left, and the scratch directory is
gone (unless it was asked for). Nothing is removed below a mount that would not go.
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
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from netdev.netlink import Netlink, NetlinkError, namespaces, remove_namespace

STEP_S = 30.0
READY_S = 20.0
END_S = 30.0  # from SIGTERM to the end of the server
KILL_S = 2.0  # from SIGKILL to the end of what hangs in nothing
POLL_S = 0.02
MOST_LINES, MOST_COLUMNS = 16, 150  # of a command's output

Process = subprocess.Popen[Any]


def _end_with_parent() -> None:
    """In a child, before it starts: SIGTERM when the demo dies in whatever way, so that the mount goes too."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class StepError(Exception):
    """A step did not do what it should; the text says which and how."""


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP came."""


def _real(words: Sequence[str]) -> list[str]:
    """The word `xenfs` is this program, wherever it is installed."""
    ours = [sys.executable, "-m", "xenfs"]
    return [part for word in words for part in (ours if word == "xenfs" else [word])]


def _environ() -> dict[str, str]:
    package = str(Path(__file__).resolve().parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))}


class Scene:
    """Commands run in `folder`, so their lines are short. `namespaces` are those that the server will make."""

    def __init__(self, folder: Path, namespaces: Sequence[str]) -> None:
        self.folder = folder
        self.namespaces = namespaces
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

    def run(self, *words: str, lines: int = MOST_LINES) -> str:
        """Show a command, run it, show what it said, trimmed. Its standard output; StepError if it failed."""
        print(f"   $ {shlex.join(words)}", flush=True)
        with self._undisturbed():
            pipe = subprocess.PIPE
            child = subprocess.Popen(
                _real(words), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, env=_environ()
            )
            self.children.append(child)
        try:
            out, err = child.communicate(timeout=STEP_S)
        except subprocess.TimeoutExpired:
            raise StepError(f"`{shlex.join(words)}` did not end within {STEP_S:g} s") from None
        self.children.remove(child)
        self._show(out, lines)
        if child.returncode:
            raise StepError(f"`{shlex.join(words)}` ended with {child.returncode}: {err.strip()}")
        return out

    def _show(self, text: str, most: int = MOST_LINES) -> None:
        lines = [line for line in text.splitlines() if line]
        for line in lines[:most]:
            print(f"   {line[:MOST_COLUMNS]}")
        if len(lines) > most:
            print(f"   ... and {len(lines) - most} lines more")
        sys.stdout.flush()

    def start(self, *words: str, log: str, until: str) -> Process:
        """Start a command that goes on, and wait until it says `until`; what it says goes to the file `log`. A session of
        its own keeps a terminal's Ctrl-C from it."""
        print(f"   $ {shlex.join(words)} &", flush=True)
        with (self.folder / log).open("wb") as file, self._undisturbed():
            child = subprocess.Popen(
                _real(words),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=_environ(),
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
            if "xenfs" in words:
                self.server = child
            else:
                self.children.append(child)
        deadline = time.monotonic() + READY_S
        while until not in self._said(log):
            if child.poll() is not None:
                raise StepError(f"`{shlex.join(words)}` ended with {child.returncode} before it was ready")
            if time.monotonic() > deadline:
                raise StepError(f"`{shlex.join(words)}` was not ready within {READY_S:g} s")
            time.sleep(POLL_S)
        self._show(self._said(log))
        return child

    def stop(self, child: Process) -> None:
        """End what start() started, other than the server."""
        print(f"   $ kill {child.pid}; wait {child.pid}", flush=True)
        child.terminate()
        if not _ended(child):
            raise StepError(f"process {child.pid} did not end within {END_S:g} s")
        self.children.remove(child)

    def end(self) -> None:
        assert self.server is not None, "end() before start()"
        print(f"   $ kill {self.server.pid}; wait {self.server.pid}; echo $?", flush=True)
        status = self._end_server()
        self._show(f"{status}\n")
        if status != 0:
            raise StepError(f"xenfs ended with status {status}")

    def _said(self, log: str) -> str:
        path = self.folder / log
        return path.read_text(errors="replace") if path.exists() else ""

    def show_logs(self) -> None:
        for path in sorted(self.folder.glob("*.log")):
            if said := self._said(path.name):
                print(f"{path.name}:\n{said}", end="", file=sys.stderr)

    # --- afterwards --------------------------------------------------------------------------------------------------

    def clean(self, keep: bool) -> list[str]:
        """Take everything down again, in order. What could not be, as sentences."""
        for unfinished in self.children:
            unfinished.kill()  # not waited for long: a request that nobody answers outlives even SIGKILL
        for unfinished in self.children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                unfinished.wait(KILL_S)
        if self._is_mounted("fs"):
            self._quietly("umount", "fs") or self._quietly("umount", "-l", "fs")
        self._end_server()
        for device in self._loop_devices():
            self._quietly("losetup", "-d", device)
        if self._is_mounted("mnt"):
            self._quietly("umount", "-l", "mnt")
        left = [f"{self.folder}/{name} is still mounted" for name in ("fs", "mnt") if self._is_mounted(name)]
        left += [f"{device} is still attached" for device in self._loop_devices()]
        left += self._remove_namespaces()
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

    def _remove_namespaces(self) -> list[str]:
        """What a server that was killed has left; a namespace of that name with another's mark is let be."""
        left = []
        for name in self.namespaces:
            try:
                if self.server and name in namespaces() and f"process {self.server.pid} " in Netlink(name).link("lo").alias:
                    remove_namespace(name)
            except NetlinkError as error:
                left.append(str(error))
        return left

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
