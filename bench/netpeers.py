"""netpeers.py: the networks that are compared - how each is built, watched and taken away again.

Called by net.py. Each peer joins the same three places, network namespaces of its own: a host and two guests. With xenfs,
veth and the empty forwarder the host has its address on a bridge, and each guest's link ends there; vde_switch is the
bridge itself, so with VDE2 all three have a vde_plug2tap. IPv6 is off: its own chatter would keep nobody idle.

Invariants: a server runs in a session of its own and only its processes are signalled; what is made is noted before it is
made, and Ground takes it away whatever happens; no interface and no packet leaves the namespaces made here.
Left out: what the kernel does for a server outside its processes, so a veth costs no CPU in these tables.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bench import interrupt
from bench.nettools import ToolError, execute, within
from bench.peers import POLL_S, READY_S, REPOSITORY, STOP_S, PeerFailure, Usage, members, unmount_below, usage

PREFIX_BITS = 24
ADDRESSES = {"host": "10.77.0.1", "guest1": "10.77.0.11", "guest2": "10.77.0.12"}
GUESTS = ("guest1", "guest2")
NETNS = Path("/run/netns")
TOOL_S = 10.0
BRIDGE = "xenbr0"


class Ground:
    """What one peer stands on. `complaints`: what went wrong while it was taken away."""

    def __init__(self, name: str, work: Path) -> None:
        self.name = name
        self.work = work
        self.places: dict[str, str] = {}  # the namespaces of host, guest1, guest2
        self.sessions: list[int] = []
        self.complaints: list[str] = []
        self._undo = contextlib.ExitStack()
        self._started = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with interrupt.held():  # bounded: every step has its time limit
            self._undo.close()

    def later(self, step: Callable[[], None]) -> None:
        """Do this at the end, in reverse order. What fails is noted and the rest is still done."""

        def attempt() -> None:
            try:
                step()
            except (PeerFailure, ToolError, OSError, subprocess.SubprocessError) as trouble:
                self.complaints.append(f"{self.name}: {trouble}")

        self._undo.callback(attempt)

    def namespace(self, place: str) -> None:
        """A new network namespace for this place."""
        name = f"xenfs-bench{os.getpid()}-{self.name}-{place}"
        self.leave(place, name)
        execute(["ip", "netns", "add", name], TOOL_S)
        self.ip(place, "link", "set", "lo", "up")
        self.silence(place)

    def leave(self, place: str, name: str) -> None:
        """That place is the namespace `name`; if it is there at the end, it is deleted."""
        self.places[place] = name
        self.later(lambda: _delete_namespace(name))

    def silence(self, place: str) -> None:
        """No IPv6 on any interface there, now or later, and no netfilter on its bridges: what a host's firewall does with
        a frame is not what is measured."""
        ipv6 = [f"/proc/sys/net/ipv6/conf/{which}/disable_ipv6" for which in ("all", "default")]
        bridge = [f"/proc/sys/net/bridge/bridge-nf-call-{which}tables" for which in ("ip", "ip6", "arp")]
        script = 'value=$1; shift; for file in "$@"; do test ! -e "$file" || echo $value > "$file"; done'
        for value, files in (("1", ipv6), ("0", bridge)):
            execute(within(self.places[place], "sh", "-c", script, "sh", value, *files), TOOL_S)

    def ip(self, place: str, *words: str) -> str:
        return execute(["ip", "-n", self.places[place], *words], TOOL_S)

    def address(self, place: str, link: str) -> None:
        self.ip(place, "addr", "add", f"{ADDRESSES[place]}/{PREFIX_BITS}", "dev", link)
        self.ip(place, "link", "set", link, "up")

    def spawn(self, place: str, *argv: str, ready: Callable[[bytes], bool], exit_codes: Sequence[int] = (0,)) -> None:
        """Start a server there and wait until `ready(what it printed)`. Its stdin stays open: vde_switch ends with it."""
        self._started += 1
        log = self.work / f"{self.name}{self._started}.log"
        with interrupt.held(), log.open("wb") as output:
            process = subprocess.Popen(
                within(self.places[place], *argv),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                start_new_session=True,
            )
            self.later(lambda: self._end(process, log, exit_codes))
        self.sessions.append(process.pid)
        deadline = time.monotonic() + READY_S
        while not ready(log.read_bytes()):
            if process.poll() is not None:
                raise PeerFailure(f"{argv[0]} ended with {process.returncode} at its start; {_words(log)}")
            if time.monotonic() > deadline:
                raise PeerFailure(f"{argv[0]} was not ready within {READY_S:.0f} s; {_words(log)}")
            time.sleep(POLL_S)

    def _end(self, process: subprocess.Popen[bytes], log: Path, exit_codes: Sequence[int]) -> None:
        died = process.poll() is not None
        process.terminate()
        deadline = time.monotonic() + STOP_S
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
            while members(process.pid) and time.monotonic() < deadline:
                time.sleep(POLL_S)
        if killed := bool(members(process.pid)):
            os.killpg(process.pid, signal.SIGKILL)  # the group is ours while a member lives
        process.wait()
        if process.stdin:
            process.stdin.close()
        if died:
            raise PeerFailure(f"{self.name} had ended by itself with {process.returncode}; {_words(log)}")
        if killed:
            raise PeerFailure(f"{self.name} did not end within {STOP_S:.0f} s of SIGTERM and was killed; {_words(log)}")
        if process.returncode not in exit_codes:
            raise PeerFailure(f"{self.name} ended with {process.returncode} after SIGTERM; {_words(log)}")

    def links(self, place: str) -> list[str]:
        """The interfaces there, but for lo."""
        return [found["ifname"] for found in json.loads(self.ip(place, "-j", "link", "show")) if found["ifname"] != "lo"]

    def set_mtu(self, mtu: int) -> None:
        """Of every interface of this peer."""
        for place in self.places:
            for link in self.links(place):
                self.ip(place, "link", "set", link, "mtu", str(mtu))

    def usage(self) -> Usage:
        """All server processes, in sum."""
        found = [usage(session) for session in self.sessions]
        return Usage(
            sum(each.cpu_s for each in found),
            sum(each.wakeups for each in found),
            sum(each.pss_kib for each in found),
            sum(each.rss_kib for each in found),
            sum(each.processes for each in found),
            sum(each.threads for each in found),
        )

    def check(self) -> None:
        """Everybody reaches everybody; PeerFailure if not."""
        for client, server in (("guest1", "host"), ("guest1", "guest2"), ("host", "guest2")):
            argv = ["ping", "-n", "-q", "-c", "1", "-w", str(round(TOOL_S)), ADDRESSES[server]]
            try:
                execute(within(self.places[client], *argv), TOOL_S + 1)
            except ToolError as error:
                raise PeerFailure(f"{client} does not reach {server}: {error}") from error


@dataclass(frozen=True, slots=True)
class Peer:
    """`needs` are (program, Debian package); `build(ground)` returns once frames can cross."""

    name: str
    title: str
    build: Callable[[Ground], None]
    needs: tuple[tuple[str, str], ...] = ()
    ours: bool = False
    no_jumbo: str = ""  # why frames of 9000 bytes do not cross


def _build_xenfs(ground: Ground) -> None:
    ground.namespace("host")
    configs = []
    for number, place in enumerate(GUESTS, 1):
        name = f"bench{os.getpid()}-{place}"
        ground.leave(place, f"xenfs-{name}")
        config = ground.work / f"{place}.cfg"
        vif = f"mac=00:16:3e:00:00:{number:02x},bridge={BRIDGE},ip={ADDRESSES[place]}/{PREFIX_BITS}"
        config.write_text(f'name = "{name}"\nmemory = 64\nvif = ["{vif}"]\n')
        configs.append(str(config))
    mount = ground.work / "mnt"
    mount.mkdir()
    ground.later(lambda: unmount_below(ground.work))
    bridge = f"{BRIDGE}={ADDRESSES['host']}/{PREFIX_BITS}"
    argv = (sys.executable, "-m", "xenfs", "up", "--mount", str(mount), "--bridge", bridge, *configs)
    ground.spawn("host", *argv, ready=_says_ready)
    for place in GUESTS:
        ground.silence(place)


def _build_vde(ground: Ground) -> None:
    switch = ground.work / "switch"
    for place in ADDRESSES:
        ground.namespace(place)
    ground.spawn("host", "vde_switch", "-s", str(switch), ready=lambda _: (switch / "ctl").exists())
    for place in ADDRESSES:
        ground.spawn(place, "vde_plug2tap", "-s", str(switch), "eth0", ready=lambda _, at=place: "eth0" in ground.links(at))  # type: ignore[misc]
        ground.address(place, "eth0")


def _build_veth(ground: Ground) -> None:
    _build_bridge(ground)
    for number, place in enumerate(GUESTS, 1):
        far = ("peer", "name", "eth0", "netns", ground.places[place])
        ground.ip("host", "link", "add", f"vif{number}", "type", "veth", *far)
        _plug(ground, place, f"vif{number}")


def _build_empty(ground: Ground) -> None:
    _build_bridge(ground)
    taps = []
    for number, place in enumerate(GUESTS, 1):
        taps += [f"{ground.places[place]}/eth0", f"{ground.places['host']}/vif{number}"]
    ground.spawn("host", sys.executable, "-m", "bench.emptytap", *taps, ready=_says_ready)
    for number, place in enumerate(GUESTS, 1):
        _plug(ground, place, f"vif{number}")


def _build_bridge(ground: Ground) -> None:
    for place in ADDRESSES:
        ground.namespace(place)
    ground.ip("host", "link", "add", BRIDGE, "type", "bridge")
    ground.address("host", BRIDGE)


def _plug(ground: Ground, place: str, port: str) -> None:
    ground.ip("host", "link", "set", port, "master", BRIDGE, "up")
    ground.address(place, "eth0")


def _says_ready(printed: bytes) -> bool:
    return b"ready" in printed.splitlines()


VDE = (("vde_switch", "vde-switch"), ("vde_plug2tap", "vde2"))
PEERS = (
    Peer("xenfs", "xenfs", _build_xenfs, ours=True),
    Peer("vde2", "vde_switch and vde_plug2tap", _build_vde, VDE, no_jumbo="VDE2's frames hold at most 1504 bytes"),
    Peer("veth", "the kernel's veth on a bridge", _build_veth),
    Peer("empty", "empty forwarder on our TAPs and loop", _build_empty, ours=True),
)
TOOLS = (("iperf3", "iperf3"), ("ping", "iputils-ping"), ("nsenter", "util-linux"), ("ip", "iproute2"))


def select(names: Sequence[str]) -> tuple[Peer, ...]:
    """The peers of these names, in this order; ValueError names the ones there are."""
    known = {peer.name: peer for peer in PEERS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no peer {', '.join(unknown)}; there are: {', '.join(known)}")
    return tuple(known[name] for name in names)


def missing(needs: Sequence[tuple[str, str]]) -> str:
    """Which of these programs are not there, or ""."""
    absent = [f"{program} (Debian package: {package})" for program, package in needs if not shutil.which(program)]
    return f"not installed: {', '.join(absent)}" if absent else ""


def version(peer: Peer) -> str:
    """One line, from the program itself; for our own, the commit and the interpreter; for veth, the kernel."""
    if peer.ours:
        commit = first_line("git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD") or "unknown"
        return f"commit {commit}, Python {sys.version.split()[0]}"
    return first_line(peer.needs[0][0], "--version") if peer.needs else f"Linux {os.uname().release}"


def first_line(*argv: str) -> str:
    """Of what a program says; "" if it cannot be run."""
    try:
        return execute(argv, TOOL_S).strip().split("\n")[0]
    except ToolError:
        return ""


def _delete_namespace(name: str) -> None:
    if (NETNS / name).exists():
        execute(["ip", "netns", "delete", name], TOOL_S)


def _words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()[-5:]
    return "its last words: " + (" | ".join(lines) or "none")
