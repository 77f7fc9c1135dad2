"""serve.py (edge): the descriptor loop of a mounted session.

Reads requests until there are none (a bounded batch), lets the host deliver what they caused, and looks again before it
goes back to trio: a client that waits for one answer usually asks again at once, and a trip through epoll costs more than
a short look (QEMU's AioContext polls for the same reason, 32 us by default). An idle mount never wakes.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable

import trio

from xenfs.fuse.session import Buffers, Session

log = logging.getLogger("xenfs.fuse")

BATCH = 32  # requests before the host delivers
BATCH_WRITTEN_BYTES = 512 * 1024  # or so much written data: workers begin with it while the next request is read
TURN_S = 0.002  # how long other tasks may have to wait for us
LOOK_S = 50e-6  # how long to look for the next request after the last one


def sender(fd: int) -> Callable[[Buffers], None]:
    """What a Session sends replies with."""
    writev = os.writev

    def send(buffers: Buffers) -> None:
        try:
            writev(fd, buffers)
        except OSError as error:
            # ENOENT: the client gave up waiting (a signal, an abort). Nobody is there to be told.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                log.error("a reply was refused by the kernel: %s", error)

    return send


class Server:
    """`kick` delivers what the requests caused; it returns True while there is more to deliver."""

    def __init__(self, fd: int, session: Session, kick: Callable[[], bool]) -> None:
        self.fd = fd
        self.session = session
        self.kick = kick
        self.unmounted = False

    async def run(self) -> None:
        """Serve until the file system is unmounted."""
        more = False
        while not self.unmounted:
            if more:
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.wait_readable(self.fd)
            more = self._turn()

    def _turn(self) -> bool:
        """Read, deliver, look again; until there is nothing for a while, or others want to run. True: more is due."""
        clock = time.perf_counter
        now = clock()
        turn_ends = now + TURN_S
        quiet_since = now
        more = False
        while now < turn_ends and not self.unmounted:
            got = self._batch()
            more = self.kick()
            now = clock()
            if got:
                quiet_since = now
            elif not more and now - quiet_since >= LOOK_S:
                break
        return more

    def _batch(self) -> int:
        """Up to BATCH requests; how many there were."""
        fd, session, readv = self.fd, self.session, os.readv
        count = 0
        session.batch_written = 0
        try:
            while count < BATCH and session.batch_written < BATCH_WRITTEN_BYTES:
                session.receive(readv(fd, session.buffers()))
                count += 1
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno == errno.ENODEV:
                self.unmounted = True
            elif error.errno not in (errno.ENOENT, errno.EINTR):  # a request that was taken back while we read it
                raise
        return count
