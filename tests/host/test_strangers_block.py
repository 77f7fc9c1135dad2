"""Goal: disks work with a program at one end or at both: its ring, grants, events and store are dev/xen of a domain.
Method: tests/devxen/blkfront.c against our blkback, our blkfront against tests/devxen/blkback.c, and the two with each
other; data is compared with the image's bytes, programs break the rules and die in the middle, and nothing is left of
them."""

from __future__ import annotations

import itertools
import random
import re
import signal
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.blockends import (
    CLOSED,
    CLOSING,
    LARGEST,
    RING,
    SECTORS,
    SIZE,
    XVDA,
    connected,
    driver_domain,
    guest,
    held,
    moved,
    pattern,
    serve,
    state,
    wait_held,
)  # fmt: skip
from tests.host.devxen import DevXen, needs_libraries
from tests.host.served import MIB, Host
from xenfs.storeclient import StoreClient

pytestmark = [pytest.mark.host, needs_libraries]

ERROR, NOT_SUPPORTED = "ok -1", "ok -2"
MODES = [(), ("--copy",), ("--persistent",)]


# --- our backend, a program's frontend ---------------------------------------------------------------------------------


@pytest.fixture
def ours(host: Host) -> Iterator[DevXen]:
    """Domain 1, whose xvda (a.img) waits for a frontend, and domain 2 with a disk of our drivers."""
    first = guest(host, "s", f"{host.image('a.img', SIZE)},raw,xvda,w")
    other = guest(host, "g", f"{host.image('b.img', SIZE)},raw,xvda,w", drivers="xenfs")
    with DevXen(host, host.up(first, other)) as built:
        yield built


@pytest.mark.parametrize("shape", ["full", "random"])
@pytest.mark.parametrize("way", ["", "persistent"])
def test_frontend(ours, way, shape):
    """Goal: a foreign frontend's data is in the image, byte for byte, and back; when it has closed nothing is left.
    Method: the whole disk with as many requests as the ring holds, in pages and in any segments; flush; image, checksum."""
    before = held(ours, 0, 1)
    front = connected(ours, 1, way)
    front.ok("shape", shape)
    channels, mapped, ports, granted = held(ours, 0, 1)
    assert [len(channels - before[0]), len(mapped - before[1]), len(ports - before[2])] == [1, 1, 1]  # the ring's, so far
    assert len(granted - before[3]) == 1 + RING * LARGEST // 8
    requests, most = moved(front, "write", 0, SECTORS, 3)
    assert most == RING and requests >= SECTORS // LARGEST
    assert front.ask("flush") == "ok 0"
    image = ours.host.root / "a.img"
    assert image.read_bytes() == pattern(0, SECTORS, 3)
    moved(front, "write", 1001, 777, 4)
    assert front.ask("flush") == "ok 0"
    wanted = pattern(0, 1001, 3) + pattern(1001, 777, 4) + pattern(1778, SECTORS - 1778, 3)
    assert image.read_bytes() == wanted
    crc, requests, _ = front.ask("read", 0, SECTORS).split()[1:]
    assert (int(crc, 16), int(requests) >= SECTORS // LARGEST) == (zlib.crc32(wanted), True)
    moved(front, "verify", 1001, 777, 4)
    front.ok("close")
    wait_held(ours, before, 0, 1, parts=3)
    assert front.end() == 0
    wait_held(ours, before, 0, 1)
    ours.served.stop()


def test_frontend_comes_and_goes(ours):
    """Goal: a frontend can close and connect again, in one program and in the next.  Method: both, three times each."""
    before = held(ours, 0, 1)
    for seed in range(3):
        front = connected(ours)
        moved(front, "write", 0, 1000, seed)
        front.ok("close")
        assert front.ask("connect").startswith("ok ")
        moved(front, "verify", 0, 1000, seed)
        front.ok("close")
        assert front.end() == 0
    wait_held(ours, before, 0, 1)
    ours.served.stop()


@pytest.mark.parametrize("way", ["", "abrupt"])
@pytest.mark.parametrize("last", ["kill", "die"])
def test_frontend_dies(ours, last, way):
    """Goal: a frontend that dies with requests under way costs nobody else anything, its requests' memory stays good until
    they are done, and its successor can connect, whether it closes first or starts from the beginning at once.
    Method: another guest's disk is written and checked meanwhile; SIGKILL at a random moment, or right after a push."""
    before = held(ours, 0, 1)
    chance = random.Random(f"{last} {way}")
    other = ours.host.client(
        "fio", "--name=other", f"--filename={ours.served.disk()}", "--bs=16k", "--size=8m", "--direct=1", "--iodepth=8",
        "--ioengine=io_uring", "--rw=randwrite", "--verify=crc32c", "--verify_fatal=1", "--loops=3", "--allow_file_create=0",
    )  # fmt: skip
    for turn in range(4):
        front = connected(ours, 1, way)
        if last == "kill":
            front.ok("flood", turn)
            time.sleep(chance.uniform(0.02, 0.3))
            front.kill()
        else:
            front.send("die", RING)
            assert front.process.wait(10) == -signal.SIGKILL
    done = ours.host.finish(other)
    assert done.returncode == 0, done.stdout
    front = connected(ours, 1, way)
    moved(front, "write", 0, SECTORS, 77)
    moved(front, "verify", 0, SECTORS, 77)
    front.ok("close")
    assert front.end() == 0
    wait_held(ours, before, 0, 1)
    ours.served.stop()
    assert (ours.host.root / "a.img").read_bytes() == pattern(0, SECTORS, 77)


BROKEN = {
    "gref": ERROR, "op": NOT_SUPPORTED, "segments": ERROR, "none": ERROR, "sector": ERROR, "end": ERROR, "order": ERROR,
    "range": ERROR,
}  # fmt: skip


def test_wrong_requests(ours):
    """Goal: a request that is wrong is answered with an error, and costs no other.  Method: each kind, data around it."""
    front = connected(ours)
    for seed, (kind, answer) in enumerate(BROKEN.items()):
        moved(front, "write", 0, 1000, seed)
        assert front.ask("garbage", kind) == answer, kind
        moved(front, "verify", 0, 1000, seed)
    front.ok("events", 2000)
    moved(front, "verify", 0, 1000, len(BROKEN) - 1)
    front.ok("close")
    ours.served.stop()


@pytest.mark.parametrize("kind", ["producer", "header", "badring", "badport"])
def test_broken_ring(ours, kind):
    """Goal: a ring that makes no sense costs the device, with the reason in the store, until its frontend begins anew.
    Method: indices, a reference and a port that are wrong; the other guest's disk; then a proper frontend."""
    before = held(ours, 0, 1)
    front = ours.start(1, "blkfront", XVDA)
    if kind.startswith("bad"):
        assert front.ask("connect", kind).startswith("error refused"), front.said()
    else:
        assert front.ask("connect").startswith("ok ")
        assert front.ask("garbage", kind) in (f"ok {CLOSING}", f"ok {CLOSED}")
    with StoreClient(f"{ours.served.mnt}.xenstored") as client:
        assert client.read(f"/local/domain/0/error/backend/vbd/1/{XVDA}/error").startswith(b"22 ")
    ours.host.check("dd", f"if={ours.served.disk()}", "of=/dev/null", "bs=1M", "iflag=direct")
    assert front.ask("connect").startswith("ok "), front.said()
    moved(front, "write", 0, 1000, 5)
    moved(front, "verify", 0, 1000, 5)
    front.ok("close")
    assert front.end() == 0
    wait_held(ours, before, 0, 1)
    ours.served.stop()


# --- a program's backend in a driver domain ------------------------------------------------------------------------------


@pytest.fixture
def theirs(host: Host) -> Iterator[DevXen]:
    with driver_domain(host, "xenfs") as built:
        yield built


def write_random(xen: DevXen, size: int = SIZE) -> tuple[Path, list[object]]:
    """A file of noise, and the command that writes it to the disk."""
    noise = xen.host.image("noise", size, random.Random(size).randbytes(size))
    return noise, ["dd", f"if={noise}", f"of={xen.served.disk()}", "bs=256k", "conv=notrunc,fsync"]


@pytest.mark.parametrize("mode", MODES)
def test_backend(theirs, mode):
    """Goal: a disk that a program in a driver domain serves is a disk like others, whether it maps each request's pages,
    copies, or keeps them mapped.
    Method: dd with fsync and cmp, fio with checksums and requests of all sizes, the image's bytes; then an orderly end."""
    before = held(theirs, 1, 2)
    back = serve(theirs, *mode)
    noise, command = write_random(theirs)
    theirs.host.check(*command)
    theirs.host.check("cmp", noise, theirs.served.disk())
    assert (theirs.host.root / "a.img").read_bytes() == noise.read_bytes()
    theirs.host.check(
        "fio", "--name=verify", f"--filename={theirs.served.disk()}", "--bsrange=512-256k", "--size=8m", "--direct=1",
        "--iodepth=16", "--ioengine=io_uring", "--rw=randwrite", "--verify=crc32c", "--verify_fatal=1", "--fsync=50",
        "--allow_file_create=0",
    )  # fmt: skip
    back.ok("stop")
    assert back.process.wait(10) == 0
    wait_held(theirs, before, 1, 2, parts=3)
    theirs.served.stop()


def test_backend_dies(theirs):
    """Goal: when the program that serves a disk dies, I/O to the disk waits, and nothing else does; its successor gets all
    that was under way, and nothing is lost.
    Method: it kills itself with requests taken and not answered, again and again, while dd and then cmp go on."""
    before = held(theirs, 1, 2)
    serve(theirs).kill()
    back = serve(theirs, "--max-requests", 20)
    noise, command = write_random(theirs)
    writer = theirs.host.client(*command)
    for requests in (31, 7, 45):
        assert back.process.wait(20) == -signal.SIGKILL, back.said()
        assert writer.poll() is None
        theirs.host.check("cat", theirs.path(2, "inspect/rings"), theirs.path(1, "inspect/grants"))
        back = theirs.start(1, "blkback", "--max-requests", requests)
    assert back.process.wait(20) == -signal.SIGKILL, back.said()
    assert writer.poll() is None
    back = serve(theirs)
    assert theirs.host.finish(writer).returncode == 0
    theirs.host.check("cmp", noise, theirs.served.disk())
    back.ok("stop")
    assert (theirs.host.root / "a.img").read_bytes() == noise.read_bytes()
    wait_held(theirs, before, 1, 2, parts=3)
    theirs.served.stop()


def test_backend_stopped(theirs):
    """Goal: a backend that does not run keeps its disk waiting and nothing else.  Method: SIGSTOP under dd, SIGCONT."""
    back = serve(theirs)
    noise, command = write_random(theirs)
    back.stop()
    writer = theirs.host.client(*command)
    time.sleep(0.3)
    theirs.host.check("cat", theirs.path(2, "inspect/rings"), theirs.path(1, "inspect/grants"))
    assert writer.poll() is None
    back.resume()
    assert theirs.host.finish(writer).returncode == 0
    theirs.host.check("cmp", noise, theirs.served.disk())
    back.ok("stop")
    theirs.served.stop()


def test_server_stops_without_backend(theirs):
    """Goal: requests that a dead backend never answers do not keep xenfs from ending, and their programs get an error.
    Method: a program that waits for a disk whose backend has died; SIGTERM."""
    back = serve(theirs, "--max-requests", 5)
    _, command = write_random(theirs)
    writer = theirs.host.client(*command)
    assert back.process.wait(20) == -signal.SIGKILL
    time.sleep(0.2)
    assert writer.poll() is None
    theirs.served.process.send_signal(signal.SIGTERM)
    assert theirs.served.wait() == 0
    assert re.search(r"g xvda: its backend has gone, [1-9]\d* requests are not answered", theirs.served.stderr())
    assert theirs.host.finish(writer).returncode == 1


# --- programs at both ends -----------------------------------------------------------------------------------------------


@pytest.fixture
def both(host: Host) -> Iterator[DevXen]:
    with driver_domain(host, "none") as built:
        yield built


@pytest.mark.parametrize(("mode", "way"), [*itertools.product(MODES[:2], [""]), (MODES[2], "persistent")])
@pytest.mark.parametrize("shape", ["full", "random"])
def test_both_ends(both, mode, way, shape):
    """Goal: two programs that know nothing of each other have a disk between them; xenfs only carries events and grants.
    Method: the whole disk with a full ring, verified; image; closed from either end; nothing left."""
    before = held(both, 1, 2)
    back = both.start(1, "blkback", *mode)
    front = connected(both, 2, way)
    front.ok("shape", shape)
    assert moved(front, "write", 0, SECTORS, 8)[1] == RING
    moved(front, "verify", 0, SECTORS, 8)
    assert front.ask("flush") == "ok 0"
    assert (both.host.root / "a.img").read_bytes() == pattern(0, SECTORS, 8)
    front.ok("close")
    assert state(back) == CLOSED
    back.ok("stop")
    assert (front.end(), back.process.wait(10)) == (0, 0)
    wait_held(both, before, 1, 2)
    both.served.stop()


def test_both_ends_die(both):
    """Goal: either of two programs can die at any moment and come back; nothing stays behind.
    Method: floods ended by SIGKILL of the frontend, then of the backend, then of both; seeded moments."""
    before, chance = held(both, 1, 2), random.Random(5)
    back = both.start(1, "blkback")
    for turn, victims in enumerate(["front", "back", "both"] * 2):
        front = connected(both, 2)
        front.ok("flood", turn)
        time.sleep(chance.uniform(0.02, 0.2))
        if victims in ("back", "both"):
            back.kill()
            back = both.start(1, "blkback")
        if victims == "back":
            assert front.reply().startswith("error the backend went to state")
            assert front.ask("connect").startswith("ok "), front.said()
            moved(front, "write", 0, 500, turn)
            moved(front, "verify", 0, 500, turn)
        front.kill()
    front = connected(both, 2)
    moved(front, "write", 0, SECTORS, 9)
    moved(front, "verify", 0, SECTORS, 9)
    front.ok("close")
    back.ok("stop")
    assert front.end() == 0
    wait_held(both, before, 1, 2)
    both.served.stop()


@pytest.mark.parametrize("kind", ["gref", "producer", "badring"])
def test_foreign_backend_is_not_fooled(both, kind):
    """Goal: what one program does wrong, the other sees as on Xen: a failed mapping, never a signal.
    Method: over memory, blkfront.c breaks the rules towards blkback.c, which must live; then a proper connection."""
    back = both.start(1, "blkback", "--memory", SIZE // MIB)
    front = both.start(2, "blkfront", XVDA)
    if kind == "badring":
        assert front.ask("connect", kind).startswith("error refused")
    else:
        assert front.ask("connect").startswith("ok ")
        assert front.ask("garbage", kind) in (ERROR, f"ok {CLOSING}", f"ok {CLOSED}")
    assert front.ask("connect").startswith("ok "), front.said()
    moved(front, "write", 0, 1000, 5)
    moved(front, "verify", 0, 1000, 5)
    front.ok("close")
    back.ok("stop")
    both.served.stop()
