"""Goal: `xenfs up` survives who started it, can be stopped at any moment, and takes no disk that somebody else uses.
Method: the real command; its pipe is closed, signals come while it starts, its images are mounted or have loop devices."""

from __future__ import annotations

import os
import select
import signal
import time
from pathlib import Path

import pytest

from tests.host.served import MIB, Host, Served, mounts_at

pytestmark = pytest.mark.host

LOOK_S = 0.002
STOPS = [signal.SIGINT, signal.SIGTERM]


def test_nobody_listens(host):
    """Goal: a closed standard output ends nothing: a resize that cannot be announced happens, and the end is clean.
    Method: the pipe's reader goes after `ready`; SIGHUP with a larger image, twice; SIGTERM."""
    server = host.disk()
    server.process.stdout.close()
    for size in (12 * MIB, 16 * MIB):
        os.truncate(host.root / "a.img", size)
        server.process.send_signal(signal.SIGHUP)
        wait_for_size(host, server, size)
    server.stop()


def wait_for_size(host: Host, server: Served, size: int) -> None:
    code = (
        "import os, sys, time\nends = time.monotonic() + 20\n"
        "while os.stat(sys.argv[1]).st_size != int(sys.argv[2]):\n"
        "    assert time.monotonic() < ends, os.stat(sys.argv[1]).st_size\n    time.sleep(0.01)\n"
    )
    host.python(code, server.disk(), size)


def starting(host: Host) -> tuple[Served, int]:
    """`xenfs up` that waits for its configuration, which is a pipe; so it is past the start of the interpreter."""
    fifo = host.root / "slow.cfg"
    if not fifo.exists():
        host.image("a.img")
        os.mkfifo(fifo)
    server = host.start(fifo)
    ends = time.monotonic() + 20
    while True:
        try:
            return server, os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # ENXIO: nobody reads yet
            assert server.process.poll() is None and time.monotonic() < ends, server.stderr()
            time.sleep(LOOK_S)


def go_on(host: Host, writer: int) -> None:
    os.write(writer, f"name = 'g'\nmemory = 64\ndisk = [ '{host.root}/a.img,raw,xvda,w' ]\n".encode())
    os.close(writer)


def check_stopped(server: Served, number: int, when: object) -> None:
    """Ended at once by the signal's default action is fine, too: while there is nothing to undo."""
    status = server.wait()
    assert status in (0, 130) or (number == signal.SIGTERM and status == -number), (when, status, server.stderr())
    assert server.stderr() == "", when
    assert mounts_at(server.mnt) == [], when


@pytest.mark.parametrize("number", STOPS)
def test_stop_while_it_starts(host, number):
    """Goal: a signal at any moment of the start leaves no traceback and no mount, dead or alive.
    Method: delays from the moment when the configuration is read, in steps of 8 ms, beyond the one it is ready at."""
    for step in range(15):
        server, writer = starting(host)
        go_on(host, writer)
        select.select([], [], [], step * 0.008)  # which moment it meets differs: all must be fine
        server.process.send_signal(number)
        check_stopped(server, number, f"after {step * 8} ms")


@pytest.mark.parametrize("number", STOPS)
def test_stop_before_there_is_anything(host, number):
    """Goal: as above, while it reads its configuration.  Method: the pipe stays empty."""
    server, writer = starting(host)
    server.process.send_signal(number)
    check_stopped(server, number, "reading")
    os.close(writer)


@pytest.mark.parametrize("number", STOPS)
def test_stop_as_it_is_mounted(host, number):
    """Goal: as above, in the moment when the mount has just been made.  Method: the mount table is watched closely."""
    for _ in range(4):
        server, writer = starting(host)
        go_on(host, writer)
        ends = time.monotonic() + 20
        while not mounts_at(server.mnt):
            assert time.monotonic() < ends, server.stderr()
        server.process.send_signal(number)
        check_stopped(server, number, "mounted")


def refused(host: Host, target: str | Path, options: str = "w") -> str:
    """What the one line says that a guest with that disk is refused with."""
    server = host.start(host.config("r", f"{target},raw,xvda,{options}"), mnt="refused")
    assert server.wait() == 1, "it was not refused"
    (line,) = server.stderr().splitlines()
    assert mounts_at(server.mnt) == []
    return line


def test_a_mounted_block_device(host):
    """Goal: a block device that the host has mounted is not written to behind its back; to read it is the user's choice.
    Method: a loop device with ext4, before it is mounted, while, and after."""
    image = host.image("fs.img")
    host.check("mkfs.ext4", "-q", image)
    device = host.loop(image)
    place = host.mount(device)
    assert refused(host, device) == f"xenfs: r: xvda: cannot open disk image {device}: Device or resource busy"
    reader = host.up(host.config("g", f"{device},raw,xvda,r"))
    reader.stop()
    host.unmount(place)
    writer = host.up(host.config("g", f"{device},raw,xvda,w"))
    writer.stop()
    host.detach(device)


@pytest.mark.parametrize("name", ["fs.img", "link.img", "x/../fs.img"])
def test_an_image_with_a_loop_device(host, name):
    """Goal: an image that a loop device is set up on has a writer that takes no lock: it is refused, with the device's
    name; without the loop device it is served.  Method: under its name, through a link, and by a detour."""
    image = host.image("fs.img")
    (host.root / "link.img").symlink_to(image)
    (host.root / "x").mkdir()
    device = host.loop(image)
    path = host.root / name
    assert refused(host, path) == f"xenfs: r: xvda: disk image {os.path.abspath(path)} is in use: {device} is set up on it"
    host.detach(device)
    host.up(host.config("g", f"{path},raw,xvda,w")).stop()
