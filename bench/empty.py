"""empty.py: the ceiling: our own FUSE session and loop with nothing behind it.

`python -m bench.empty DIR` mounts a file `empty` (1 GiB) whose reads answer zeroes from one buffer and whose writes are
thrown away. What a disk costs beyond this is the rings, grants, events and the image.
"""

from __future__ import annotations

import signal
import stat
import sys

import trio

from xenfs.fuse.mount import Mount, mount
from xenfs.fuse.operations import MAX_WRITE
from xenfs.fuse.serve import Server, sender
from xenfs.fuse.session import Session
from xenfs.fuse.tree import Change, Directory, Node

SIZE = 1 << 30


class Empty(Node):
    """Answers at once."""

    mode = stat.S_IFREG | 0o600
    attr_timeout_s = 1
    zeroes = memoryview(bytes(MAX_WRITE))

    @property
    def size(self) -> int:
        return SIZE

    def setattr(self, change: Change) -> None:
        pass

    def read(self, session: Session, unique: int, offset: int, size: int, flags: int) -> None:
        session.send_data(unique, [self.zeroes[:size]])

    def write(self, session: Session, unique: int, offset: int, size: int, flags: int) -> None:
        session.send_written(unique, size)


async def _serve(mounted: Mount) -> None:
    server = Server(mounted.fd, Session(Directory({"empty": Empty()}), sender(mounted.fd)), lambda: False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run)
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            print("ready", flush=True)
            async for _ in signals:
                break
            await trio.to_thread.run_sync(mounted.detach)
        nursery.cancel_scope.cancel()


def main() -> None:
    mounted = mount(sys.argv[1], fsname="empty")
    try:
        trio.run(_serve, mounted)
    finally:
        mounted.unmount()


if __name__ == "__main__":
    main()
