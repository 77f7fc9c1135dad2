"""emptytap.py: the ceiling: our own TAPs and loop with nothing between them.

`python -m bench.emptytap NAMESPACE/NAME NAMESPACE/NAME ...` makes TAPs, joins each two neighbours of the list, prints
`ready` and carries frames until SIGINT or SIGTERM. As with a vif, each frame crosses with its virtio_net header, and
checksums and segmentation are left undone. What a vif costs beyond this is netfront, rings, grants, events and netback.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence

import trio

from netdev.link import IDLE, MORE
from netdev.tap import Tap
from xenfs.frames import Frames

FRAME_BYTES = 1 << 17  # more than any frame with its header
BATCH = 64  # frames of one poll(); 1 where they came singly lately: a second read would be in vain


class Wire:
    """Joins two TAPs; a Driver of Frames. Lane 0 is what the first one has to read."""

    def __init__(self, first: Tap, second: Tap) -> None:
        self.node = f"{first.name} and {second.name}"
        self.on_room: Callable[[], None] = lambda: None
        self.descriptors = (first.lanes[0].fd, second.lanes[0].fd)
        self._batches = [1, 1]
        self._buffer = memoryview(bytearray(FRAME_BYTES))

    def poll(self, lane: int) -> int:
        source, sink = self.descriptors[lane], self.descriptors[1 - lane]
        buffer = self._buffer
        buffers = [buffer]
        for _ in range(self._batches[lane]):
            try:
                size = os.readv(source, buffers)
            except BlockingIOError:
                self._batches[lane] = 1
                return IDLE
            try:
                os.writev(sink, [buffer[:size]])
            except OSError:
                continue  # the other side is down: lost, as on a cable
        self._batches[lane] = BATCH
        return MORE

    def interface_lost(self) -> None:
        raise SystemExit(f"{self.node}: one of them was deleted")


async def _serve(wires: Sequence[Wire]) -> None:
    frames = Frames(lambda: False, lambda: ())
    for wire in wires:
        frames.add(wire, wire.descriptors)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(frames.run)
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            print("ready", flush=True)
            async for _ in signals:
                break
        nursery.cancel_scope.cancel()
    frames.close()


def main() -> None:
    taps = []
    for text in sys.argv[1:]:
        namespace, _, name = text.partition("/")
        tap = Tap(name, namespace=namespace)
        tap.offload(csum=True, tso4=True, tso6=True)
        tap.carrier(True)
        taps.append(tap)
    trio.run(_serve, [Wire(*pair) for pair in zip(taps[::2], taps[1::2], strict=True)])


if __name__ == "__main__":
    main()
