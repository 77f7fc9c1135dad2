"""What the network's host tests share: `xenfs up` in a network namespace of its own, and programs in its guests'.

`host` is where the server runs, its bridge is made and programs on the host's side run; nothing there leads to the machine's
network. Guests are `a`, `b`, ... with 10.88.0.11 and fd88::11, 10.88.0.12 and so on. Whatever happens, close() leaves no
process and no namespace.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from subprocess import Popen
from typing import Any

from netdev.netlink import namespaces, remove_namespace
from tests.host.served import REPOSITORY, START_S, Host, Served, mounts_at
from tests.host.test_netlink import Space

BRIDGE = "xenbr0=10.88.0.1/24,fd88::1/64"
HOST4, HOST6 = "10.88.0.1", "fd88::1"
TRANSFER = REPOSITORY / "tests/host/transfer.py"
LETTERS = "abcdefgh"
MIB, GIB = 1 << 20, 1 << 30
LOOK_S = 0.02
# What no transfer may ever count, anywhere: a checksum that was left unfinished, or finished wrongly.
BAD_SUMS = ("TcpInCsumErrors", "UdpInCsumErrors", "Udp6InCsumErrors", "IcmpInCsumErrors", "Icmp6InCsumErrors")


def wait_until(reached: Callable[[], object], what: str, timeout_s: float = 10.0) -> None:
    ends = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < ends, f"not within {timeout_s:g} s: {what}"
        time.sleep(LOOK_S)


def address4(letter: str) -> str:
    return f"10.88.0.{11 + LETTERS.index(letter)}"


def address6(letter: str) -> str:
    return f"fd88::{11 + LETTERS.index(letter)}"


class Flow:
    """A transfer under way; finish() says how long it took, and fails if a byte was not the right one."""

    def __init__(self, net: Net, client: Popen[str], server: Popen[str]) -> None:
        self.net, self.client, self.server = net, client, server

    def finish(self, timeout_s: float = 60.0) -> float:
        done = self.net.host.finish(self.client, timeout_s)
        assert done.returncode == 0, done.stdout
        served = self.net.host.finish(self.server, 20.0)
        assert served.returncode == 0, served.stdout
        return float(done.stdout)

    def stop(self) -> None:
        for process in (self.client, self.server):
            process.kill()
            self.net.host.finish(process, 20.0)


class Net:
    """Places are "host", a guest's letter, or the name of a Space that space() made."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.names = {letter: f"net{os.getpid()}{letter}" for letter in LETTERS}
        self.spaces: dict[str, Space] = {}
        self._port = 20000
        self.space("host")

    def __enter__(self) -> Net:
        return self

    def __exit__(self, *_: object) -> None:
        """Processes first, for they keep namespaces alive."""
        for process in self.host.clients:
            if process.poll() is None:
                process.kill()
        for server in self.host.servers:
            server.close()
        for letter in LETTERS:
            remove_namespace(self.namespace(letter))
        for space in self.spaces.values():
            space.__exit__()

    # --- places ------------------------------------------------------------------------------------------------------

    def space(self, name: str) -> Space:
        made = self.spaces[name] = Space(f"net-{name}")
        self.ip(name, "link", "set", "lo", "up")
        return made

    def namespace(self, place: str) -> str:
        return self.spaces[place].name if place in self.spaces else f"xenfs-{self.names[place]}"

    def enter(self, place: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.namespace(place)}"]

    def left(self) -> list[str]:
        """Of guests' namespaces, and of interfaces on the host's side."""
        guests = {self.namespace(letter) for letter in LETTERS}
        return sorted(guests & set(namespaces())) + sorted(self.spaces["host"].names() - {"lo"})

    # --- programs ----------------------------------------------------------------------------------------------------

    def start(self, place: str, *words: object) -> Popen[str]:
        return self.host.client(*self.enter(place), *words)

    def run(self, place: str, *words: object, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        return self.host.run(*self.enter(place), *words, timeout_s=timeout_s)

    def check(self, place: str, *words: object, timeout_s: float = 60.0) -> str:
        return self.host.check(*self.enter(place), *words, timeout_s=timeout_s)

    def python(self, place: str, code: str, *arguments: object) -> str:
        return self.check(place, sys.executable, "-c", code, *arguments)

    def ip(self, place: str, *words: object) -> str:
        return self.check(place, "ip", *words)

    def link(self, place: str, name: str) -> dict[str, Any]:
        (row,) = json.loads(self.ip(place, "-j", "-d", "-s", "link", "show", name))
        return dict(row)

    def sysctl(self, place: str, key: str, value: object) -> None:
        self.check(place, "sysctl", "-q", "-w", f"{key}={value}")

    def ping(self, place: str, to: str, *options: object, count: int = 2) -> None:
        """All of them must be answered."""
        output = self.check(place, "ping", "-n", "-c", count, "-i", 0.02, "-W", 5, *options, to)
        assert f" {count} received" in output, output

    def nstat(self, place: str) -> dict[str, int]:
        """Counters of the kernel there, since its namespace was made."""
        rows = [line.split() for line in self.check(place, "nstat", "-asz").splitlines() if not line.startswith("#")]
        return {row[0]: int(row[1]) for row in rows}

    def check_sums(self, *places: str) -> None:
        for place in places:
            counted = self.nstat(place)
            assert {key: counted.get(key, 0) for key in BAD_SUMS} == dict.fromkeys(BAD_SUMS, 0), place

    # --- servers -----------------------------------------------------------------------------------------------------

    def config(self, letter: str, *vifs: str, more: str = "") -> Path:
        """A guest; an empty vif gets the guest's addresses, and so does one that has options but no `ip`."""
        listed = []
        for number, vif in enumerate(vifs or ("",)):
            ip = f"ip={address4(letter)}/24 {address6(letter)}/64" if not number and "ip=" not in vif else ""
            listed.append(",".join(filter(None, (vif, ip))))
        path = self.host.root / f"{letter}.cfg"
        text = ", ".join(f"'{vif}'" for vif in listed)
        path.write_text(f'name = "{self.names[letter]}"\nmemory = 64\nvif = [ {text} ]\n{more}\n')
        return path

    def serve(
        self, *configs: Path, bridge: str = BRIDGE, mnt: str = "mnt", place: str = "host", prefix: Sequence[str] = ()
    ) -> Served:
        """`xenfs up` on the host's side (or in another space), not waited for; `prefix` is a command that starts it."""
        mountpoint = self.host.root / mnt
        mountpoint.mkdir(exist_ok=True)
        options = ["--bridge", bridge] if bridge else []
        xenfs = [sys.executable, "-m", "xenfs", "up", "--mount", str(mountpoint), *options, *map(str, configs)]
        return Served(self.host, mountpoint, ["setpriv", "--pdeathsig", "KILL", *self.enter(place), *prefix, *xenfs])

    def up(self, *configs: Path, bridge: str = BRIDGE) -> Served:
        return self.serve(*configs, bridge=bridge).wait_ready()

    def wait_ipv6(self, *places: str) -> None:
        """Until link-local addresses may be used: the kernel looks for duplicates first."""
        for place in places:
            wait_until(lambda: "tentative" not in self.ip(place, "-6", "address"), f"IPv6 in {place}")  # noqa: B023

    def guests(self, letters: str = "a", vif: str = "", bridge: str = BRIDGE) -> Served:
        return self.up(*(self.config(letter, vif) for letter in letters), bridge=bridge)

    def refused(self, *configs: Path, bridge: str = BRIDGE, mnt: str = "refused") -> str:
        """The one line that a start is refused with."""
        server = self.serve(*configs, bridge=bridge, mnt=mnt)
        assert server.wait() == 1, "it was not refused"
        assert mounts_at(server.mnt) == []
        (line,) = server.stderr().splitlines()
        return line

    def stop(self, server: Served) -> None:
        """SIGTERM; nothing may be left of it."""
        server.stop()
        assert self.left() == []

    # --- transfers ---------------------------------------------------------------------------------------------------

    def flow(self, sender: str, receiver: str, to: str, size: int) -> Flow:
        """TCP: `size` bytes from `sender` to `receiver`, who listens at the address `to`."""
        self._port += 1
        server = self.start(receiver, sys.executable, TRANSFER, "take", to, self._port, size)
        assert read_line(server) == "listening"
        return Flow(self, self.start(sender, sys.executable, TRANSFER, "send", to, self._port, size), server)

    def transfer(self, sender: str, receiver: str, to: str, size: int) -> float:
        """The same, to its end; seconds."""
        return self.flow(sender, receiver, to, size).finish()

    def hear(self, place: str, what: str, *arguments: object) -> Popen[str]:
        """A receiver of datagrams, which is listening when this returns."""
        process = self.start(place, sys.executable, TRANSFER, "hear", what, *arguments)
        assert read_line(process) == "listening"
        return process

    @contextlib.contextmanager
    def capture(self, place: str, interface: str, most_bytes: int, *rest: str) -> Iterator[Path]:
        """What crosses an interface, in a file that is whole after the block; `most_bytes` are kept of a frame."""
        path = self.host.root / f"{interface}.pcap"
        how = ["--immediate-mode", "-U", "-B", 65536, "-s", most_bytes]
        process = self.start(place, "tcpdump", "-i", interface, *how, "-w", path, *rest)
        wait_until(lambda: path.exists() and path.stat().st_size, "tcpdump to begin")
        yield path
        size, before = path.stat().st_size, -1
        while size != before:  # nothing else tells that it has seen all
            time.sleep(0.3)
            size, before = path.stat().st_size, size
        process.terminate()
        done = self.host.finish(process)
        assert "0 packets dropped by kernel" in done.stdout, done.stdout

    def inspect(self, server: Served, letter: str, name: str = "xn0") -> dict[str, str]:
        """inspect/vif/NAME, by the first word of each line."""
        text = self.host.read(server.mnt / "domains" / self.names[letter] / "inspect/vif" / name)
        return dict(line.split(" ", 1) for line in text.splitlines())


class Plugged:
    """tests/host/hotplug.py on the host's side."""

    def __init__(self, net: Net, *letters: str) -> None:
        configs = [net.config(letter) for letter in letters]
        words = [sys.executable, "-m", "tests.host.hotplug", BRIDGE, *configs]
        self.process: Popen[str] = net.start("host", "setpriv", "--pdeathsig", "KILL", *words)
        self.net = net
        assert read_line(self.process) == "ready"

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return read_line(self.process)

    def end(self) -> None:
        done = self.net.host.finish(self.process)  # which closes its input
        assert (done.returncode, done.stdout) == (0, "")
        assert self.net.left() == []


def crossed(net: Net, place: str, name: str, half: str = "rx") -> int:
    return int(net.link(place, name)["stats64"][half]["bytes"])


def wait_flowing(net: Net, name: str, half: str = "rx") -> None:
    """Until more than a handshake has gone through the interface on the host's side."""
    before = crossed(net, "host", name, half)
    wait_until(lambda: crossed(net, "host", name, half) > before + 10 * MIB, f"{name} to move 10 MiB")


def packets(counts: str) -> int:
    """Of a line `tx-0 packets=...` of inspect/vif."""
    return int(re.findall(r"packets=(\d+)", counts)[0])


def read_line(process: Popen[str], timeout_s: float = START_S) -> str:
    """A line that a program says in time. Only for programs that say one line at a time and wait."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], timeout_s)
    assert ready, f"{process.args} has said nothing for {timeout_s:g} s"
    return process.stdout.readline().strip()
