"""What the tests of block devices between strangers share: programs of tests/devxen at either end, and what they hold."""

from __future__ import annotations

import time
from array import array
from pathlib import Path

from tests.host.devxen import SETTLE_S, DevXen, Program, rows
from tests.host.net import wait_until
from tests.host.served import MIB, Host

XVDA = "51712"
SIZE = 8 * MIB
SECTORS = SIZE // 512
LARGEST = 88  # sectors of a request: 11 segments of a page
RING = 32
CONNECTED, CLOSING, CLOSED = 4, 5, 6


def pattern(sector: int, count: int, seed: int) -> bytes:
    """What blkfront.c writes."""
    first = (seed << 40) + sector * 64
    return array("Q", range(first, first + count * 64)).tobytes()


def guest(host: Host, name: str, *disks: str, drivers: str = "none") -> Path:
    path = host.config(name, *disks)
    path.write_text(f'{path.read_text()}drivers = "{drivers}"\n')
    return path


def connected(xen: DevXen, domid: int = 1, way: str = "") -> Program:
    front = xen.start(domid, "blkfront", XVDA)
    said = front.ask("connect", way).split()
    assert said[:4] == ["ok", str(SECTORS), "512", "0"], (said, front.said())
    return front


def moved(front: Program, *words: object) -> tuple[int, int]:
    """A transfer that must succeed: how many requests it took, and how many were under way at once."""
    said = front.ask(*words).split()
    assert said[0] == "ok", (words, said, front.said())
    return int(said[-2]), int(said[-1])


Held = tuple[set[str], set[str], set[int], set[int]]


def held(xen: DevXen, backend: int, frontend: int) -> Held:
    """What the backend's domain has of the other one: remote ports, references; then that one's own ports, and grants."""
    channels = {row["remote"] for row in xen.ports(backend).values() if row["remote"].startswith(f"{frontend}:")}
    text = xen.host.read(xen.path(backend, "inspect/grants"))
    mapped = {row["ref"] for row in rows(text, "handle") if row["owner"] == str(frontend)} if "handle" in text else set()
    return channels, mapped, set(xen.ports(frontend)), xen.granted(frontend)


def wait_held(xen: DevXen, before: Held, backend: int, frontend: int, parts: int = 4) -> None:
    """RELEASE comes a moment after close(2) or the end of a process, and for pages somebody looks only now and then. Our own
    frontend keeps its pages granted (part 4) until the next backend comes, or it goes."""
    deadline = time.monotonic() + SETTLE_S
    while (now := held(xen, backend, frontend))[:parts] != before[:parts]:
        assert time.monotonic() < deadline, f"held by domains {backend}, {frontend}: {now}, not {before}"
        time.sleep(0.05)


def driver_domain(host: Host, drivers: str) -> DevXen:
    """Domain 1 is to serve a.img as xvda of domain 2, whose frontend is ours or a program's."""
    image = host.image("a.img", SIZE)
    serving = guest(host, "back")
    served = guest(host, "g", f"{image},raw,xvda,w,backend=back", drivers=drivers)
    return DevXen(host, host.up(serving, served))


def state(back: Program) -> int:
    """Of the device, as the backend has it; 0: it has not seen it yet."""
    said = back.ask("status").split()
    assert said[0] == "ok", (said, back.said())
    return next((int(device.partition("=")[2]) for device in said[2:]), 0)


def serve(xen: DevXen, *options: object) -> Program:
    """blkback.c, connected to our frontend: the disk is there."""
    back = xen.start(1, "blkback", *options)
    wait_until(lambda: state(back) == CONNECTED, f"connected; {back.said()}")
    wait_until(lambda: xen.host.run("test", "-s", xen.served.disk()).returncode == 0, "the disk")
    return back
