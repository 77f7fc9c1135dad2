"""Goal: docs/life-of-a-frame.md tells what the code does.
Method: move one frame of 64 KiB each way between two sockets that stand for the TAPs of a vif, through the loop that serves
them, record every function that is entered (sys.setprofile), and look for the document's numbered steps in that order."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path
from struct import Struct
from types import FrameType
from typing import Any

import pytest

from netdev.checksum import pseudo
from netdev.headers import transport
from netdev.link import VNET_SIZE
from netdev.tap import TapLane
from netdev.vnet import F_NEEDS_CSUM, GSO_TCPV4, VNET
from tests.netdev.world import NetWorld
from tests.walkthrough.test_life_of_a_read import ROOT, missing, steps
from xenfs.frames import Frames

DOCUMENT = ROOT / "docs" / "life-of-a-frame.md"
IPV4 = Struct(">BBHHHBBH4s4s")
Call = tuple[str, str]


class SocketTap:
    """A FramePort whose lane is that of a TAP, on a socket that keeps frames apart as /dev/net/tun does."""

    def __init__(self) -> None:
        ours, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self.kernel.setblocking(False)
        self.ours = ours
        self.lanes = [TapLane(ours.fileno())]

    def offload(self, csum: bool, tso4: bool, tso6: bool) -> None: ...

    def carrier(self, up: bool) -> None: ...

    def close(self) -> None:
        self.ours.close()
        self.kernel.close()


def large_frame() -> bytes:
    """What a kernel that may leave segmentation to others sends: virtio_net header, TCP over IPv4, about 64 KiB."""
    payload = os.urandom(64 * 1024 - 1000)
    addresses = IPv4Address("10.77.0.11").packed, IPv4Address("10.77.0.1").packed
    network = IPV4.pack(0x45, 0, 40 + len(payload), 1, 0x4000, 64, 6, 0, *addresses)
    segment = Struct(">HHIIBBHHH").pack(1024, 80, 1, 1, 0x50, 0x10, 500, 0, 0)
    frame = bytearray(bytes(12) + b"\x08\x00" + network + segment + payload)
    place = transport(frame)
    assert place is not None
    frame[50:52] = pseudo(frame, place, len(segment) + len(payload)).to_bytes(2, "big")
    return VNET.pack(F_NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16) + frame


def record(work: Callable[[], object]) -> list[Call]:
    """The calls into our packages while `work` runs."""
    calls: list[Call] = []

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT):
                calls.append((str(path.relative_to(ROOT)), frame.f_code.co_name))

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


@pytest.fixture(scope="module")
def life() -> tuple[list[Call], list[Call]]:
    """The calls for one frame from the guest, and for one to it after another like it; each arrived as it was sent."""
    world = NetWorld()
    guest, host = SocketTap(), SocketTap()
    world.attach(guest_side=lambda _port: guest, host_side=lambda _port: host)
    frames = Frames(world.hypervisor.deliver, list)
    try:
        (vif,) = world.vifs.values()
        assert vif.connected
        frames.add(vif.front, [guest.ours.fileno()])
        frames.add(vif.back, [host.ours.fileno()])

        def turns() -> None:
            while frames._turn():
                pass

        def move(source: SocketTap, target: SocketTap) -> list[Call]:
            frame = large_frame()
            source.kernel.send(frame)
            calls = record(turns)
            arrived = target.kernel.recv(1 << 17)
            assert arrived[VNET_SIZE:] == frame[VNET_SIZE:]
            assert VNET.unpack_from(arrived)[:2] == (F_NEEDS_CSUM, GSO_TCPV4)
            return calls

        out = move(guest, host)
        move(host, guest)  # the first large one is copied
        return out, move(host, guest)
    finally:
        frames.close()
        world.close()
        guest.close()
        host.close()


def parts() -> tuple[list[Call], list[Call]]:
    """The document's steps, those of the way back to the guest apart."""
    text = DOCUMENT.read_text()
    told = steps(text)
    there = len(steps(text.partition("\n## The other way")[0]))
    assert 0 < there < len(told)
    return told[:there], told[there:]


def test_the_steps_are_what_happens(life: tuple[list[Call], list[Call]]) -> None:
    """Goal: every step is really taken, in this order.  Method: the recorded calls contain the steps as a subsequence."""
    for told, calls in zip(parts(), life, strict=True):
        assert missing(told, calls) == []


@pytest.mark.parametrize("change", ["swap", "invent"])
def test_a_wrong_document_is_noticed(life: tuple[list[Call], list[Call]], change: str) -> None:
    """Goal: the comparison has teeth.  Method: two steps exchanged, or one that does not exist, are reported."""
    for told, calls in zip(parts(), life, strict=True):
        if change == "swap":
            told[1], told[-2] = told[-2], told[1]
        else:
            told.insert(3, ("netdev/netback.py", "no_such_step"))
        assert missing(told, calls)
