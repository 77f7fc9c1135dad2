"""What the host tests share: `xenfs up` as a child, its clients as others, loop devices and mounts over its files.

Whatever happens, Host.close() leaves no process, mount or loop device: if a client hangs the server is killed first, for
that ends every request, and then nothing can hang any more. This process never touches the mount itself.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE, STDOUT, CompletedProcess, Popen

REPOSITORY = Path(__file__).resolve().parents[2]
MIB = 1 << 20
START_S = 20.0
STOP_S = 30.0
CLIENT_S = 60.0


def mounts_at(path: Path) -> list[str]:
    """The types of what is mounted there."""
    with open("/proc/self/mountinfo") as table:
        rows = [line.split(" - ") for line in table]
    return [right.split()[0] for left, right in rows if left.split()[4] == str(path)]


class Served:
    """One `xenfs up`. `lines` is what it said before `ready`."""

    def __init__(self, host: Host, mountpoint: Path, words: Sequence[str]) -> None:
        self.mnt = mountpoint
        self.errors = host.root / f"stderr-{len(host.servers)}"
        environ = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        with open(self.errors, "wb") as errors:
            self.process = Popen(words, stdout=PIPE, stderr=errors, env=environ, cwd=host.root)
        host.servers.append(self)
        self.lines: list[str] = []
        self._rest = b""

    def line(self, timeout_s: float = START_S) -> str | None:
        """The next line of its output, None at the end."""
        assert self.process.stdout is not None
        fd, deadline = self.process.stdout.fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            waiter = select.poll()  # select() takes no descriptor beyond 1023
            waiter.register(fd, select.POLLIN)
            left_ms = 1000 * max(0, deadline - time.monotonic())
            assert waiter.poll(left_ms), f"no line within {timeout_s:g} s; {self.stderr()}"
            part = os.read(fd, 4096)
            if not part:
                return None
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def wait_ready(self) -> Served:
        while (line := self.line()) != "ready":
            assert line is not None, f"ended with {self.process.wait(10)}: {self.stderr()}"
            self.lines.append(line)
        return self

    def stderr(self) -> str:
        return self.errors.read_text()

    def disk(self, guest: str = "g", vdev: str = "xvda") -> Path:
        return self.mnt / "domains" / guest / "dev" / vdev

    def wait(self) -> int:
        return self.process.wait(STOP_S)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it as a user would; it must be clean."""
        self.process.send_signal(number)
        assert (self.wait(), self.stderr()) == (0, "")
        assert mounts_at(self.mnt) == []

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        """Nothing is left, however it went."""
        if self.process.poll() is None:
            self.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()
        for _ in mounts_at(self.mnt):
            subprocess.run(["umount", "-l", str(self.mnt)], capture_output=True, timeout=10)


class Host:
    """A directory with images and configurations, and everything that a test has running."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.servers: list[Served] = []
        self.clients: list[Popen[str]] = []
        self.loops: list[str] = []
        self.mounts: list[Path] = []

    # --- what to serve -------------------------------------------------------------------------------------------------

    def image(self, name: str, size: int = 8 * MIB, data: bytes = b"") -> Path:
        path = self.root / name
        with open(path, "wb") as file:
            file.write(data)
            file.truncate(size)
        return path

    def config(self, name: str, *disks: str, memory: int = 64) -> Path:
        path = self.root / f"{name}.cfg"
        listed = ", ".join(f"'{disk}'" for disk in disks)
        path.write_text(f'name = "{name}"\nmemory = {memory}\ndisk = [ {listed} ]\n')
        return path

    def start(self, *configs: Path, mnt: str = "mnt", prefix: Sequence[str] = (), make: bool = True) -> Served:
        """`xenfs up`, not waited for."""
        mountpoint = self.root / mnt
        if make and not mounts_at(mountpoint):
            mountpoint.mkdir(exist_ok=True)
        xenfs = [sys.executable, "-m", "xenfs", "up", "--mount", str(mountpoint), *map(str, configs)]
        return Served(self, mountpoint, ["setpriv", "--pdeathsig", "KILL", *prefix, *xenfs])

    def up(self, *configs: Path, mnt: str = "mnt") -> Served:
        return self.start(*configs, mnt=mnt).wait_ready()

    def disk(self, size: int = 8 * MIB, options: str = "w") -> Served:
        """One guest `g` with one disk `xvda` over a.img."""
        image = self.image("a.img", size)
        return self.up(self.config("g", f"{image},raw,xvda,{options}"))

    # --- clients -------------------------------------------------------------------------------------------------------

    def client(self, *words: object) -> Popen[str]:
        """A client in the background; its stdin stays open until finish()."""
        environ = os.environ | {"LC_ALL": "C", "PYTHONPATH": str(REPOSITORY)}
        command = [str(word) for word in words]
        process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=STDOUT, text=True, env=environ, cwd=self.root)
        self.clients.append(process)
        return process

    def finish(self, process: Popen[str], timeout_s: float = CLIENT_S) -> CompletedProcess[str]:
        """Its end. A client that hangs is a failure, and takes the servers with it so that it can end."""
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            for server in self.servers:
                server.kill()
            process.kill()
            output, _ = process.communicate(timeout=20)
            raise AssertionError(f"{process.args} took more than {timeout_s:g} s: {output}") from None
        return CompletedProcess(process.args, process.returncode, output)

    def run(self, *words: object, timeout_s: float = CLIENT_S) -> CompletedProcess[str]:
        return self.finish(self.client(*words), timeout_s)

    def check(self, *words: object, timeout_s: float = CLIENT_S) -> str:
        """Run a client that must succeed; its output."""
        done = self.run(*words, timeout_s=timeout_s)
        assert done.returncode == 0, f"{' '.join(map(str, words))}: {done.returncode}: {done.stdout}"
        return done.stdout

    def read(self, path: Path) -> str:
        return self.check("cat", path)

    def python(self, code: str, *arguments: object, timeout_s: float = CLIENT_S) -> str:
        return self.check(sys.executable, "-c", code, *arguments, timeout_s=timeout_s)

    # --- file systems --------------------------------------------------------------------------------------------------

    def loop(self, path: Path, *options: str) -> str:
        device = self.check("losetup", "--find", "--show", *options, path).strip()
        self.loops.append(device)
        return device

    def mount(self, device: str, name: str = "fs") -> Path:
        place = self.root / name
        place.mkdir(exist_ok=True)
        self.check("mount", device, place)
        self.mounts.append(place)
        return place

    def unmount(self, place: Path) -> None:
        self.check("umount", place)
        self.mounts.remove(place)

    def detach(self, device: str) -> None:
        self.check("losetup", "-d", device)
        self.loops.remove(device)

    def close(self) -> None:
        """Nicely first (a mounted file system wants to write through us), then by force."""
        for place in reversed(self.mounts):
            with contextlib.suppress(AssertionError):
                self.run("umount", place, timeout_s=20)
        for process in self.clients:
            if process.poll() is None:
                process.kill()
        for server in self.servers:
            server.close()
        for place in reversed(self.mounts):
            if mounts_at(place):
                subprocess.run(["umount", "-l", str(place)], capture_output=True, timeout=20)
        for device in self.loops:
            subprocess.run(["losetup", "-d", device], capture_output=True, timeout=20)
        for process in self.clients:
            process.communicate(timeout=20)
