"""cable.py: FramePorts in memory: two back to back (Cable), or any number on a learning bridge (Switch).

A MemoryPort behaves as a TAP does. Whoever writes may leave undone what the virtio_net header can say; what the reading end
did not allow with offload() is done in software on the way to it (netdev/checksum.py, netdev/segment.py). The header that
the reader sees then says that nothing is missing.

Invariants: a write never fails because of the reading end, which counts what it drops, by reason (`drops`); a flow never
changes lanes; every queue and table is bounded. VIRTIO_NET_HDR_F_DATA_VALID is not passed on, as in tun: one guest's word
is no evidence to another. Stricter than tun where a header contradicts its frame: GSO only on the TCP that it names, with
NEEDS_CSUM (virtio 1.2, 5.1.6.2), and no frame beyond MAX_FRAME. Left out: VLANs of its own, aging by time (there is no
clock here), spanning tree, multicast snooping.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from netdev.checksum import complete
from netdev.headers import HEAD_BYTES, flow_hash, transport
from netdev.link import VNET_SIZE, Buffers, Lane
from netdev.segment import segment
from netdev.vnet import F_NEEDS_CSUM, GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, VNET, gso

QUEUE_FRAMES = 1000  # of one lane; Linux's default txqueuelen
ADDRESSES = 1024  # that a Switch remembers
ETHERNET_HEADER = 14
MAX_FRAME = ETHERNET_HEADER + 2 * 4 + 65535  # the longest IPv4 packet behind two VLAN tags
COMPLETE = bytes(VNET_SIZE)  # the header that says nothing is missing

_VERSIONS = {GSO_TCPV4: 4, GSO_TCPV6: 6}
_NO_ADDRESS = bytes(6)
_CSUM_START = 6  # its offset in the header; csum_offset is the last field

Waiting = deque[tuple[bytes, bytes | bytearray]]  # header, frame


class Drops:
    """Frames that came to a port and did not get into its queue, by reason."""

    __slots__ = ("carrier", "closed", "full", "malformed")

    def __init__(self) -> None:
        self.carrier = 0  # nobody was at this end
        self.closed = 0
        self.full = 0  # a GSO frame whose last segments found no room counts once
        self.malformed = 0  # had to be segmented and could not be


class Medium(Protocol):
    """What a MemoryPort is plugged into."""

    def carry(self, source: MemoryPort, vnet: bytes, frame: bytes) -> None:
        """Bring a checked frame to whom it concerns."""

    def left(self, port: MemoryPort) -> None:
        """`port` was closed. Called once."""


class MemoryLane(Lane):
    """One queue of a MemoryPort."""

    __slots__ = ("port", "queue")

    def __init__(self, port: MemoryPort) -> None:
        self.port = port
        self.queue: Waiting = deque()

    def read(self, buffers: Sequence[memoryview]) -> int:
        if not self.queue:
            return 0
        vnet, frame = self.queue.popleft()
        if buffers and len(buffers[0]) == VNET_SIZE:  # the usual way: no copy to join the two
            buffers[0][:] = vnet
            return VNET_SIZE + _scatter(frame, buffers[1:])
        return _scatter(vnet + frame, buffers)

    def write(self, buffers: Buffers) -> bool:
        port = self.port
        if port.closed:
            return False
        if buffers and len(buffers[0]) == VNET_SIZE:
            vnet, frame = bytes(buffers[0]), b"".join(buffers[1:])
        else:
            data = b"".join(buffers)
            vnet, frame = data[:VNET_SIZE], data[VNET_SIZE:]
        checked = _checked(vnet, frame)
        if checked is None:
            return False
        port.medium.carry(port, checked, frame)
        return True


class MemoryPort:
    """One end. Carrier is up and all offloads are off until told otherwise, as on a fresh TAP.

    `on_readable` runs inside the write that put a frame into an empty lane: it may mark work, and should not do it.
    """

    def __init__(self, medium: Medium, lanes: int = 1, queue: int = QUEUE_FRAMES) -> None:
        if lanes < 1 or queue < 1:
            raise ValueError(f"a port of {lanes} lanes with room for {queue} frames each; both must be at least 1")
        self.medium = medium
        self.room = queue
        own = [MemoryLane(self) for _ in range(lanes)]
        self.lanes: Sequence[Lane] = own
        self.waiting = [lane.queue for lane in own]
        self.drops = Drops()
        self.on_readable: Callable[[], None] | None = None
        self.csum = self.tso4 = self.tso6 = False
        self.up = True
        self.closed = False

    @property
    def dropped(self) -> int:
        drops = self.drops
        return drops.carrier + drops.closed + drops.full + drops.malformed

    def offload(self, csum: bool, tso4: bool, tso6: bool) -> None:
        self.csum = csum
        self.tso4, self.tso6 = csum and tso4, csum and tso6  # TUNSETOFFLOAD knows no TSO without csum

    def carrier(self, up: bool) -> None:
        self.up = up

    def close(self) -> None:
        """What waits is lost; writes are refused from now on. May be called again."""
        if self.closed:
            return
        self.closed = True
        for queue in self.waiting:
            queue.clear()
        self.medium.left(self)

    def send(self, frame: bytes, vnet: bytes = COMPLETE, lane: int = 0) -> bool:
        """Write one frame towards the other end; for tests."""
        return self.lanes[lane].write([vnet, frame])

    def receive(self, lane: int | None = None) -> list[tuple[bytes, bytes]]:
        """Take all that waits here, on one lane or on each in turn: (virtio_net header, frame); for tests."""
        taken = []
        for queue in self.waiting if lane is None else [self.waiting[lane]]:
            taken += [(vnet, bytes(frame)) for vnet, frame in queue]
            queue.clear()
        return taken

    def arrive(self, vnet: bytes, frame: bytes) -> None:
        """A frame comes from the medium, its header checked: queue it as this end's offload() wants it, or drop it."""
        if self.closed:
            self.drops.closed += 1
            return
        if not self.up:
            self.drops.carrier += 1
            return
        waiting = self.waiting
        queue = waiting[0 if len(waiting) == 1 else flow_hash(frame[:HEAD_BYTES]) % len(waiting)]
        if len(queue) >= self.room:
            self.drops.full += 1
            return
        was_empty = not queue
        if vnet == COMPLETE:
            queue.append((vnet, frame))
        else:
            self._finish(queue, vnet, frame)
        if was_empty and queue and self.on_readable is not None:
            self.on_readable()

    def _finish(self, queue: Waiting, vnet: bytes, frame: bytes) -> None:
        """Queue a frame that lacks something: as it is, completed, or in segments."""
        _, gso_type, _, gso_size, start, offset = VNET.unpack(vnet)
        kind = gso_type & ~GSO_ECN
        if kind == GSO_NONE:
            if self.csum:
                queue.append((vnet, frame))
                return
            whole = bytearray(frame)
            complete(whole, start, offset)
            queue.append((COMPLETE, whole))
        elif self.tso4 if kind == GSO_TCPV4 else self.tso6:
            queue.append((vnet, frame))
        else:
            self._segment(queue, frame, gso_size)

    def _segment(self, queue: Waiting, frame: bytes, gso_size: int) -> None:
        """No segment is made that has no room: a size of 1 asks for 65000 of them."""
        try:
            for part in segment(frame, gso_size):
                if len(queue) >= self.room:
                    self.drops.full += 1
                    return
                queue.append((COMPLETE, part))
        except ValueError:
            self.drops.malformed += 1


class Cable:
    """Two ports: what is written to one can be read from the other."""

    def __init__(self, lanes_a: int = 1, lanes_b: int = 1, queue: int = QUEUE_FRAMES) -> None:
        self.a = MemoryPort(self, lanes_a, queue)
        self.b = MemoryPort(self, lanes_b, queue)

    def carry(self, source: MemoryPort, vnet: bytes, frame: bytes) -> None:
        (self.b if source is self.a else self.a).arrive(vnet, frame)

    def left(self, port: MemoryPort) -> None:
        """The other end stays; what it writes is dropped and counted at the closed one."""


class Switch:
    """A learning bridge. As on any, a guest that fakes many sources makes it forget and flood."""

    def __init__(self, queue: int = QUEUE_FRAMES, addresses: int = ADDRESSES) -> None:
        if addresses < 1:
            raise ValueError(f"a switch that remembers {addresses} addresses; at least 1")
        self.queue = queue
        self.addresses = addresses
        self.ports: list[MemoryPort] = []
        self.table: dict[bytes, MemoryPort] = {}  # the address not heard for longest comes first
        self.moves = 0
        self.flaps: dict[bytes, int] = {}  # moves of each address: 1 is a guest that moved, many are two with the same MAC

    def plug(self, lanes: int = 1) -> MemoryPort:
        port = MemoryPort(self, lanes, self.queue)
        self.ports.append(port)
        return port

    def unplug(self, port: MemoryPort) -> None:
        """The same as closing the port: it and its addresses are forgotten. A port that is not plugged in is let be."""
        if port in self.ports:
            port.close()

    def left(self, port: MemoryPort) -> None:
        self.ports.remove(port)
        for address in [address for address, owner in self.table.items() if owner is port]:
            del self.table[address]

    def carry(self, source: MemoryPort, vnet: bytes, frame: bytes) -> None:
        target, address = frame[:6], frame[6:12]
        if not address[0] & 1 and address != _NO_ADDRESS:
            self._learn(address, source)
        port = self.table.get(target)  # no group is ever in it
        if port is None:
            for other in tuple(self.ports):  # a copy: an on_readable may plug and unplug
                if other is not source and not other.closed:
                    other.arrive(vnet, frame)
        elif port is not source:
            port.arrive(vnet, frame)

    def _learn(self, address: bytes, source: MemoryPort) -> None:
        before = self.table.pop(address, None)
        self.table[address] = source  # at the end again: the newest
        if before is None:
            if len(self.table) > self.addresses:
                del self.table[next(iter(self.table))]
        elif before is not source:
            self.moves += 1
            self.flaps[address] = self.flaps.pop(address, 0) + 1
            if len(self.flaps) > self.addresses:
                del self.flaps[next(iter(self.flaps))]


def _checked(vnet: bytes, frame: bytes) -> bytes | None:
    """The header rebuilt from what may be believed, or None if it is malformed or contradicts the frame."""
    size = len(frame)
    if len(vnet) != VNET_SIZE or not ETHERNET_HEADER <= size <= MAX_FRAME:
        return None
    if vnet == COMPLETE:
        return vnet
    flags, gso_type, hdr_len, gso_size, start, offset = VNET.unpack(vnet)
    if hdr_len > size:
        return None
    if not flags & F_NEEDS_CSUM:
        return COMPLETE if gso_type == GSO_NONE else None
    if start < ETHERNET_HEADER or start + offset + 2 > size:
        return None
    if gso_type == GSO_NONE:
        return VNET.pack(F_NEEDS_CSUM, GSO_NONE, 0, 0, start, offset)
    head = frame[:HEAD_BYTES]
    place = transport(head)
    canonical = None if place is None else gso(place, head, gso_size, _VERSIONS.get(gso_type & ~GSO_ECN, 0))
    if canonical is None or canonical[_CSUM_START:] != vnet[_CSUM_START:]:
        return None
    return canonical[:1] + vnet[1:2] + canonical[2:]  # with the ECN bit


def _scatter(data: bytes | bytearray, buffers: Sequence[memoryview]) -> int:
    """Spread `data` over `buffers`; bytes written."""
    view, at = memoryview(data), 0
    for buffer in buffers:
        piece = view[at : at + len(buffer)]
        buffer[: len(piece)] = piece
        at += len(piece)
    return at
