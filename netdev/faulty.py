"""faulty.py: wrappers around any FramePort that lose, hold, reorder, double or refuse the frames written through them.

What they do is decided by a function that the caller passes, so a failing run is a seed. They act on writes, on all lanes
alike; reads, offload() and carrier() pass through. For the other direction, wrap the other end. They stack:
Dropping(Delaying(cable.a), lambda n: n % 3 == 0).

`decide(n)` is asked of every frame, n counts them from 0; `pick(n)` chooses one of n held frames, the oldest is 0.
A frame that is held has been copied: its buffers may be a guest's memory. Held frames die with close().
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from netdev.link import Buffers, FramePort, Lane

MOST_HELD = 1000

Decide = Callable[[int], bool]
Pick = Callable[[int], int]


class _WrappedLane(Lane):
    __slots__ = ("inner", "wrapper")

    def __init__(self, wrapper: _Wrapper, inner: Lane) -> None:
        self.wrapper = wrapper
        self.inner = inner

    def read(self, buffers: Sequence[memoryview]) -> int:
        return self.inner.read(buffers)

    def write(self, buffers: Buffers) -> bool:
        return self.wrapper.submit(self.inner, buffers)


class _Wrapper:
    """Passes everything on; a filter overrides `submit`."""

    def __init__(self, inner: FramePort) -> None:
        self.inner = inner
        self.lanes: Sequence[Lane] = [_WrappedLane(self, lane) for lane in inner.lanes]

    def submit(self, lane: Lane, buffers: Buffers) -> bool:
        return lane.write(buffers)

    def offload(self, csum: bool, tso4: bool, tso6: bool) -> None:
        self.inner.offload(csum, tso4, tso6)

    def carrier(self, up: bool) -> None:
        self.inner.carrier(up)

    def close(self) -> None:
        self.inner.close()


class _Deciding(_Wrapper):
    """Does its one thing to the frames that `decide` names; `count` is how many those were."""

    def __init__(self, inner: FramePort, decide: Decide) -> None:
        super().__init__(inner)
        self.decide = decide
        self.seen = 0
        self.count = 0

    def hit(self) -> bool:
        hit = self.decide(self.seen)
        self.seen += 1
        self.count += hit
        return hit


class Dropping(_Deciding):
    """Frames get lost on the way; the writer is not told."""

    def submit(self, lane: Lane, buffers: Buffers) -> bool:
        return self.hit() or lane.write(buffers)


class Refusing(_Deciding):
    """Frames are refused: write() returns False, as on a TAP that is down."""

    def submit(self, lane: Lane, buffers: Buffers) -> bool:
        return not self.hit() and lane.write(buffers)


class Duplicating(_Deciding):
    """Frames come twice."""

    def submit(self, lane: Lane, buffers: Buffers) -> bool:
        if not self.hit():
            return lane.write(buffers)
        copy = [bytes(buffer) for buffer in buffers]  # both are the same frame, whatever the first one sets off
        written = lane.write(copy)
        lane.write(copy)
        return written


class Delaying(_Wrapper):
    """Holds every frame back until release(); refuses frames when `most` are held. `refused`: the inner port's late word."""

    def __init__(self, inner: FramePort, most: int = MOST_HELD) -> None:
        super().__init__(inner)
        self.most = most
        self.held: list[tuple[Lane, list[bytes]]] = []
        self.refused = 0

    def submit(self, lane: Lane, buffers: Buffers) -> bool:
        if len(self.held) >= self.most:
            return False
        self.held.append((lane, [bytes(buffer) for buffer in buffers]))
        return True

    def release(self, pick: Pick = lambda n: 0) -> bool:
        """Let one held frame go, the oldest unless `pick` says otherwise; False if none is held."""
        if not self.held:
            return False
        lane, frame = self.held.pop(pick(len(self.held)))
        if not lane.write(frame):
            self.refused += 1
        return True

    def flush(self) -> None:
        """Let all that is held now go, the oldest first."""
        for _ in range(len(self.held)):
            self.release()

    def close(self) -> None:
        self.held.clear()
        super().close()


class Reordering(Delaying):
    """Keeps up to `depth` frames; each one more makes one go that `pick` chooses. flush() lets the last ones go."""

    def __init__(self, inner: FramePort, depth: int, pick: Pick) -> None:
        super().__init__(inner, depth + 1)
        self.depth = depth
        self.pick = pick

    def submit(self, lane: Lane, buffers: Buffers) -> bool:
        taken = super().submit(lane, buffers)
        if len(self.held) > self.depth:
            self.release(self.pick)
        return taken
