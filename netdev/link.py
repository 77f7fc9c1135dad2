"""link.py: the port where a vif meets the world, as netfront and netback see it.

A FramePort is one network interface. It has one or more lanes (the queues of a TAP), and each frame crosses with a
virtio_net header of VNET_SIZE bytes before it (netdev/vnet.py), which says what the frame still lacks: its transport
checksum, or its segmentation. The in-memory forms are in netdev/cable.py, the real one in netdev/tap.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from xenmodel.types import PeerFault

VNET_SIZE = 10  # struct virtio_net_hdr
MOST_QUEUES = 8  # Linux: xen_netif_max_queues, at most one per vCPU
DEFAULT_MTU, LEAST_MTU, MOST_MTU = 1500, 68, 65535  # netif.h "MTU"; RFC 791; libxl
NAME_BYTES = 15  # IFNAMSIZ without the final 0

# what a poll() of a driver's queue came to: nothing waits any more; the batch was full; no room until its peer makes some
IDLE, MORE, BLOCKED = range(3)
BATCH = 64  # frames of one poll(), at most
BATCH_HITS = 4

Buffers = Sequence[memoryview | bytes]


class Batch:
    """How many frames a poll() reads before the host delivers. A read that finds nothing is not cheap, so it is avoided: as
    many as came lately until nothing was left, and twice as many when that was not enough a few times in a row."""

    __slots__ = ("hits", "limit", "run")

    def __init__(self) -> None:
        self.limit, self.hits, self.run = 1, 0, 0

    def took(self, count: int, empty: bool) -> None:
        """`count` frames were read, and then nothing was left (`empty`), or the limit was reached."""
        self.run += count
        if empty:
            self.limit, self.hits, self.run = min(self.run or 1, BATCH), 0, 0
        else:
            self.hits += 1
            if self.hits == BATCH_HITS:
                self.limit, self.hits = min(2 * self.limit, BATCH), 0


class PortError(Exception):
    """The interface cannot be had; the text names it, and says why and what would be right."""


class Takes(NamedTuple):
    """What one end can receive, as it said in its nodes."""

    sg: bool
    gso4: bool
    gso6: bool
    csum4: bool
    csum6: bool
    notify: bool = True  # a frontend's feature-rx-notify


class Plug(NamedTuple):
    """Which interface a driver asks its host for, from the nodes of its device."""

    node: str  # the device's directory
    domid: int  # of the guest
    handle: int
    mac: bytes
    queues: int  # lanes
    name: str | None = None  # vifname


class Lane(Protocol):
    """One queue of an interface. Neither call waits, and neither raises for reasons of I/O."""

    def read(self, buffers: Sequence[memoryview]) -> int:
        """The next frame, header and all, scattered over `buffers`; bytes written, 0 if none waits. What does not fit
        is cut off."""

    def write(self, buffers: Buffers) -> bool:
        """One frame, header first, gathered from `buffers`. False: it was refused; the caller counts it as dropped."""


class FramePort(Protocol):
    @property
    def lanes(self) -> Sequence[Lane]: ...

    def offload(self, csum: bool, tso4: bool, tso6: bool) -> None:
        """What frames read from here may leave undone: checksums; segmentation of TCP over IPv4, over IPv6 (both need
        csum). What was queued before this may still come as it was."""

    def carrier(self, up: bool) -> None:
        """Is there anybody at our end? An interface without carrier accepts no frames from its own side."""

    def close(self) -> None: ...


def check_name(name: str) -> None:
    """ValueError if `name` cannot be an interface's, as the kernel's dev_valid_name, but without its patterns."""
    if not name or name in (".", "..") or any(char in "/:%" or char.isspace() or not char.isprintable() for char in name):
        raise ValueError("an interface's name is not empty, not a dot or two, and has no blank, '/', ':' or '%' in it")
    if (size := len(name.encode(errors="surrogateescape"))) > NAME_BYTES:
        raise ValueError(f"an interface's name has at most {NAME_BYTES} bytes, this one has {size}")


def parse_mac(text: str | None, path: str) -> bytes:
    """Six bytes of "00:16:3e:xx:xx:xx". PeerFault if it is none of a single station."""
    parts = (text or "").split(":")
    if len(parts) == 6 and all(1 <= len(part) <= 2 and all(c in "0123456789abcdefABCDEF" for c in part) for part in parts):
        mac = bytes(int(part, 16) for part in parts)
        if not mac[0] & 1 and any(mac):
            return mac
    raise PeerFault(f"{path} is {text!r}, not the MAC address of a station, like 00:16:3e:12:34:56")
