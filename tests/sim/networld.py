"""networld.py: random traffic through one vif in a world whose every choice comes from one seed, with every frame numbered.

Goal: a failing run is a number.  Method: the seed decides what both ends offer, what is sent, which interface is polled
when, in which order handlers run, and what the networks at both ends do to frames. `check()` holds after every step:

- both ends' ring indices are legal; pins match mappings, ports match ports;
- a frame arrives as it was sent; those of a flow in order (unless the network was told to reorder or double them);
- a flow never changes its queue;
- an interface that was told BLOCKED is not looked at before on_room(): a wake-up that gets lost leaves frames behind.

At the end every frame is accounted for: received, or dropped by somebody who counted it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from netdev.cable import MemoryPort
from netdev.faulty import Delaying, Dropping, Duplicating, Refusing, Reordering
from netdev.headers import transport
from netdev.link import BLOCKED, Buffers, FramePort, Lane
from netdev.netback import Offer
from netdev.netfront import Want
from netdev.vnet import gso
from tests.netdev.test_headers import TCP, UDP, Frame
from tests.netdev.world import NetWorld
from xenmodel.testing import Footprint, SeededOrder, check_rings

FLOWS = 8
STEPS_BETWEEN_SCANS = 24  # the whole grant table is looked at that often
REFUSED = "refused by the backend"  # counts slots, of frames that were sent
FAULTS = ("none", "drop", "refuse", "delay", "reorder", "double")


def number(frame: bytes) -> tuple[int, int]:
    """(flow, sequence number) of a frame of ours."""
    place = transport(frame)
    assert place is not None, frame[:64].hex()
    flow = int.from_bytes(frame[place.start : place.start + 2], "big")
    at = place.start + (20 if place.protocol == TCP else 8)
    return flow, int.from_bytes(frame[at : at + 4], "big")


class Network(Dropping):
    """The network behind an interface: one fault, and which lane each flow came by."""

    def __init__(self, inner: MemoryPort, fault: str, rng: random.Random) -> None:
        self.cable = inner

        def some(_n: int) -> bool:
            return rng.random() < 0.2

        def never(_n: int) -> bool:
            return False

        port: FramePort = inner
        self.delaying: Delaying | None = None
        self.drops = Dropping(port, some if fault == "drop" else never)
        self.refuses = Refusing(self.drops, some if fault == "refuse" else never)
        self.doubles = Duplicating(self.refuses, some if fault == "double" else never)
        port = self.doubles
        if fault == "delay":
            port = self.delaying = Delaying(port)
        elif fault == "reorder":
            port = self.delaying = Reordering(port, 5, rng.randrange)
        super().__init__(port, never)
        self.lane_of: dict[int, Lane] = {}

    def submit(self, lane: Lane, buffers: Buffers) -> bool:
        flow, _ = number(b"".join(buffers)[10:])
        assert self.lane_of.setdefault(flow, lane) is lane, f"flow {flow} has changed its queue"
        return super().submit(lane, buffers)

    @property
    def lost(self) -> int:
        """Frames that the driver got rid of, less what arrived: what this network dropped, or (below 0) doubled."""
        late = self.delaying.refused if self.delaying is not None else 0
        return self.drops.count + late - self.doubles.count


class NetTraffic:
    """`step()` does one random thing; `finish()` brings everything to rest and counts."""

    def __init__(self, seed: int, fault: str = "none", queues: int | None = None) -> None:
        self.random = random.Random(seed)
        self.fault = fault
        self.world = NetWorld(order=SeededOrder(self.random.randrange))
        self.footprint = Footprint(self.world.hypervisor)
        self.lanes = queues or self.random.choice([1, 1, 2, 4])
        self.networks: list[Network] = []
        self.vif = self.world.attach(
            offer=self._offer(), want=self._want(), queues=self.lanes, guest_side=self._wrap, host_side=self._wrap
        )
        assert self.vif.connected, self.vif.errors()
        self.armed: set[tuple[int, int]] = set()
        for end, device in enumerate((self.vif.front, self.vif.back)):
            device.on_room = lambda end=end: self.arm(end)  # type: ignore[misc]
            self.arm(end)
        self.steps = 0
        self.sent: list[list[dict[int, bytes]]] = [[{} for _ in range(FLOWS)] for _ in range(2)]
        self.last = [[-1] * FLOWS for _ in range(2)]
        self.received = [0, 0]
        self.accepted = [0, 0]
        self.lossy = False  # a restart may have lost what was on the rings

    def _wrap(self, port: MemoryPort) -> FramePort:
        self.networks.append(Network(port, self.fault, self.random))
        return self.networks[-1]

    def _offer(self) -> Offer:
        some = self.random.random
        return Offer(sg=some() < 0.8, gso4=some() < 0.7, gso6=some() < 0.7, csum6=some() < 0.7, split=some() < 0.6,
                     max_queues=self.random.choice([None, None, 1, 2]))  # fmt: skip

    def _want(self) -> Want:
        some = self.random.random
        return Want(sg=some() < 0.8, gso4=some() < 0.7, gso6=some() < 0.7, csum=some() < 0.8, csum6=some() < 0.7,
                    split=some() < 0.6)  # fmt: skip

    # --- one step ----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        self.steps += 1
        what = self.random.random()
        if what < 0.4:
            for _ in range(self.random.choice([1, 1, 3, 40])):
                self.send(self.random.randrange(2))
        elif what < 0.6:
            self.poll()
        elif what < 0.9:
            self.world.hypervisor.deliver(turns=self.random.randrange(1, 4))
        else:
            self.release(self.random.randrange(4))
        self.check()

    def send(self, way: int) -> None:
        """One frame of a random flow: way 0 from the guest's kernel, 1 from the bridge."""
        flow = self.random.randrange(FLOWS)
        version, protocol = (4, 6)[flow & 1], (TCP, UDP)[flow >> 1 & 1]
        sequence = len(self.sent[way][flow])
        size = self.random.choice([4, 60, 1400, 4000, 5000, 9000, 20000, 60000]) if self.large(way) else 900
        payload = sequence.to_bytes(4, "big") + bytes([sequence & 255]) * size
        frame = Frame(version, protocol, payload, ports=(flow, 80)).packed
        vnet = bytes(10)
        if protocol == TCP and self.random.random() < 0.5 and self.segmented(way, version):
            place = transport(frame)
            assert place is not None
            vnet = gso(place, frame, 1400, version) or vnet
        self.sent[way][flow][sequence] = frame
        self.accepted[way] += (self.vif.kernel, self.vif.bridge)[way].send(frame, vnet)

    def large(self, way: int) -> bool:
        takes = self.vif.back.takes
        return bool(self.vif.front.features["sg"]) if way == 0 else takes is not None and takes.sg

    def segmented(self, way: int, version: int) -> bool:
        """May frames of more than an MTU go through in one piece? Otherwise the cable cuts them, and counts change."""
        takes, features = self.vif.back.takes, self.vif.front.features
        if way == 0 or takes is None:
            return bool(features[f"gso-tcpv{version}"])
        return takes.gso4 if version == 4 else takes.gso6

    def arm(self, end: int) -> None:
        self.armed |= {(end, lane) for lane in range(self.lanes)}

    def poll(self) -> bool:
        """What the host's loop does: one of the interfaces that have something and were not told BLOCKED. False: none."""
        ready = [(end, lane) for end, lane in sorted(self.armed) if self.networks[end].cable.waiting[lane]]
        if not ready:
            return False
        end, lane = ready[self.random.randrange(len(ready))]
        if (self.vif.front, self.vif.back)[end].poll(lane) == BLOCKED:
            self.armed.discard((end, lane))
        return True

    def run(self) -> None:
        """Poll and deliver until nothing moves."""
        for _ in range(20_000):
            polled = self.poll()
            delivered = not self.world.hypervisor.idle
            self.world.settle()
            if not polled and not delivered:
                return
        raise AssertionError("it does not come to rest")

    def release(self, most: int = 1 << 30) -> bool:
        """The network lets go of frames that it holds."""
        moved = False
        for network in self.networks:
            for _ in range(most):
                if network.delaying is None or not network.delaying.release(self.pick):
                    break
                moved = True
        return moved

    def pick(self, n: int) -> int:
        return self.random.randrange(n) if self.fault == "reorder" else 0

    # --- what holds ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        for way, sink in enumerate((self.vif.bridge, self.vif.kernel)):
            for _, frame in sink.receive():
                self.arrived(way, frame)
        if self.steps % STEPS_BETWEEN_SCANS == 0:
            assert self.world.problems() == []
        elif self.vif.front_node in self.world.fronts.devices and self.vif.back_node in self.world.backs.devices:
            for ours, theirs in zip(self.vif.front.queues, self.vif.back.queues, strict=False):
                assert check_rings(ours.tx.ring, theirs.tx.ring) + check_rings(ours.rx.ring, theirs.rx.ring) == []

    def arrived(self, way: int, frame: bytes) -> None:
        flow, sequence = number(frame)
        assert frame == self.sent[way][flow][sequence], f"frame {sequence} of flow {flow} is not what was sent"
        if self.fault not in ("reorder", "double"):
            assert sequence > self.last[way][flow], f"frame {sequence} of flow {flow} after {self.last[way][flow]}"
        self.last[way][flow] = max(sequence, self.last[way][flow])
        self.received[way] += 1

    # --- restarts ----------------------------------------------------------------------------------------------------

    def until(self, what: str, done: Callable[[], bool]) -> None:
        for _ in range(600):
            if done():
                return
            self.step()
            self.world.hypervisor.deliver(turns=2)
        raise AssertionError(f"not {what}: {self.vif.states()} {self.vif.errors()}")

    def reconnect(self) -> None:
        """The guest closes its interface and opens it with other features, while frames come and go."""
        self.lossy = True
        front = self.vif.front
        front.reconnect(replace(self._want(), queues=self.lanes))
        self.until("closed", lambda: not front.queues)
        self.forget_lanes()
        self.until("connected", lambda: self.vif.connected)

    def restart(self) -> None:
        """The backend closes, and is back with another offer."""
        self.lossy = True
        back = self.vif.back
        self.world.write(f"{self.vif.back_node}/state", 5, settle=False)
        self.until("closed", lambda: self.vif.states() == ("6", "6") and not back.queues)
        self.world.settle()
        self.forget_lanes()
        back.offered = self._offer()
        back._offer()
        self.until("connected", lambda: self.vif.connected)

    def forget_lanes(self) -> None:
        """Another number of queues: each flow may get another one."""
        for network in self.networks:
            network.lane_of.clear()

    # --- rest --------------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        self.run()
        while self.release():
            self.run()
        self.check()
        left = [len(queue) for network in self.networks for queue in network.cable.waiting]
        assert not any(left) and self.vif.connected, f"frames are left in the interfaces: {left}"

    def finish(self) -> None:
        """Everything at rest, every frame accounted for, then nothing left behind."""
        self.drain()
        if not self.lossy:
            self.account()
        self.pull()

    def account(self) -> None:
        front, back = self.vif.front.queues, self.vif.back.queues
        guest, host = self.networks
        for way, senders, receivers, source, network in (
            (0, [q.tx.statistics for q in front], [q.tx.statistics for q in back], guest, host),
            (1, [q.rx.statistics for q in back], [q.rx.statistics for q in front], host, guest),
        ):
            into_ring = sum(one.packets for one in senders)
            refused = sum(count for one in senders for reason, count in one.drops.items() if reason != REFUSED)
            assert self.accepted[way] == source.cable.dropped + into_ring + refused
            out_of_ring = sum(one.packets for one in receivers)
            dropped = sum(one.dropped for one in receivers)
            assert into_ring == out_of_ring + dropped
            sink = (self.vif.bridge, self.vif.kernel)[way]
            assert out_of_ring == self.received[way] + network.lost + sink.dropped
            assert {reason for one in receivers for reason in one.drops} <= {"refused by the interface"}

    def pull(self) -> None:
        self.world.toolstack.detach_vif(self.world.guest.domid, self.vif.devid)
        self.world.run()
        assert not self.world.fronts.devices and not self.world.backs.devices
        assert self.footprint.grown() == [] and self.world.problems() == []
        self.world.close()
