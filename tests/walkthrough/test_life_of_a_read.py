"""Goal: docs/life-of-a-read.md tells what the code does.
Method: perform one read, from the bytes of a FUSE_READ on a descriptor to the bytes of its reply, record every function
that is entered (sys.setprofile), and look for the document's numbered steps in that order."""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from xenfs.config import parse_config
from xenfs.fuse import kernel as k
from xenfs.fuse.serve import Server, sender
from xenfs.fuse.session import Session
from xenfs.host import World
from xenfs.nodes.disk import Disk

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "life-of-a-read.md"
STEP = re.compile(r"^(\d+)\. `([\w/]+\.py)` `(\w+)`", re.MULTILINE)


def steps(text: str) -> list[tuple[str, str]]:
    """(file, function) of the numbered steps, whose numbers must count up from 1."""
    found = STEP.findall(text)
    assert [int(number) for number, _, _ in found] == list(range(1, len(found) + 1)), "steps are numbered in order"
    return [(file, function) for _, file, function in found]


def record_one_read(tmp_path: Path) -> tuple[list[tuple[str, str]], bytes, bytes]:
    """The calls of one 4 KiB read through a socket that stands for /dev/fuse, the reply, and what was to be read."""
    image = tmp_path / "disk.img"
    content = os.urandom(64 * 1024)
    image.write_bytes(content)
    world = World()
    ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    calls: list[tuple[str, str]] = []

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT):
                calls.append((str(path.relative_to(ROOT)), frame.f_code.co_name))

    try:
        world.create(parse_config(f'name = "guest1"\ndisk = [ "file:{image},xvda,w" ]', "guest.cfg"))
        world.settle()
        ours.setblocking(False)
        session = Session(world.root, sender(ours.fileno()))
        disk = next(iter(world.guests.values())).directory.children[b"dev"].lookup(b"xvda")
        assert isinstance(disk, Disk)
        session.handles[1] = disk
        server = Server(ours.fileno(), session, world.kick)
        header = k.IN_HEADER.pack(80, k.FUSE_READ, 7, 2, 0, 0, 0, 0, 0)
        kernels.send(header + k.READ_IN.pack(1, 8192, 4096, 0, 0, 0, 0))
        sys.setprofile(profile)
        server._turn()
        sys.setprofile(None)
        reply = kernels.recv(1 << 16)
    finally:
        sys.setprofile(None)
        ours.close()
        kernels.close()
        world.close()
    return calls, reply, content[8192 : 8192 + 4096]


def missing(told: list[tuple[str, str]], calls: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The steps that do not follow one another in `calls`."""
    rest = iter(calls)
    return [step for step in told if step not in rest]


def test_the_steps_are_what_happens(tmp_path: Path) -> None:
    """Goal: every step is really taken, in this order.  Method: the recorded calls contain the steps as a subsequence."""
    calls, reply, expected = record_one_read(tmp_path)
    length, error, unique = k.OUT_HEADER.unpack_from(reply)
    assert (length, error, unique) == (16 + 4096, 0, 7)
    assert reply[16:] == expected
    assert missing(steps(DOCUMENT.read_text()), calls) == []


@pytest.mark.parametrize("change", ["swap", "invent"])
def test_a_wrong_document_is_noticed(tmp_path: Path, change: str) -> None:
    """Goal: the comparison has teeth.  Method: two steps exchanged, or one that does not exist, are reported."""
    calls, _, _ = record_one_read(tmp_path)
    told = steps(DOCUMENT.read_text())
    if change == "swap":
        told[2], told[17] = told[17], told[2]
    else:
        told.insert(5, ("blockdev/blkback.py", "no_such_step"))
    assert missing(told, calls)
