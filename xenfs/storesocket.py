"""storesocket.py (edge): xenstored's Unix socket: a listener, its clients, one epoll, one trio task.

Whoever may open the socket speaks as domain 0, as with Xen's daemon; so only its owner may (0600). A client is a Peer; this
file moves its bytes and nothing else. Requests usually follow one another at once, so after an answer it looks for the next
one for a short while before it goes back to trio (see fuse/serve.py); a turn is short, so that disks and networks never wait
long for a client that floods the store.

Invariant: a client is in epoll for what it can do next: EPOLLIN while its peer wants input, EPOLLOUT while it does not read.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

import trio

from xenmodel.types import Domid
from xenmodel.xenstore.daemon import Xenstored
from xenmodel.xenstore.wire import HEADER_BYTES

log = logging.getLogger("xenfs.store")

RECV_BYTES = 16 * 1024
EVENTS = 64  # clients served before the others of the host have their turn
TURN_S = 0.001
LOOK_S = 50e-6
BACKLOG = 64
CLIENTS_MOST = 4096
RETRY_S = 0.5  # until it looks whether there are descriptors again
SUN_PATH_MAX = 107  # sizeof(sockaddr_un.sun_path), without the NUL


class SocketError(OSError):
    """A sentence for the user."""

    def __str__(self) -> str:
        return str(self.strerror)


class Client:
    """One connection."""

    __slots__ = ("_epoll", "_interest", "_on_close", "fd", "peer", "socket")

    def __init__(
        self, sock: socket.socket, daemon: Xenstored, epoll: select.epoll, on_close: Callable[[Client], None]
    ) -> None:
        self.socket = sock
        self.fd = sock.fileno()
        self.peer = daemon.peer(Domid(0), self.flush)
        self._epoll = epoll
        self._interest = select.EPOLLIN
        self._on_close = on_close
        epoll.register(self.fd, select.EPOLLIN)

    def ready(self, events: int) -> None:
        """epoll says that something can be done."""
        if events & select.EPOLLIN:
            try:
                data = self.socket.recv(RECV_BYTES)
            except BlockingIOError:
                data = None
            except OSError:
                data = b""  # reset: the same as an end for us
            if data:
                self.peer.receive(data)
                if not self.peer.out and self.peer.backlog < HEADER_BYTES + 1 and not self.peer.failed:
                    return  # a header: libxenstore sends the parts of a request one by one
            elif data is not None:
                self.close()
                return
        elif events & (select.EPOLLHUP | select.EPOLLERR):
            self.close()
            return
        self.flush()

    def flush(self) -> None:
        """Send what there is, then wait for what can be done next."""
        peer = self.peer
        if peer.connection.closed and not peer.failed:
            return
        if peer.out:
            try:
                peer.sent(self.socket.send(peer.out))
            except BlockingIOError:
                pass
            except OSError:
                self.close()
                return
        if peer.failed:
            self.close()
            return
        wanted = select.EPOLLIN if peer.wants_input else 0
        if peer.out:
            wanted |= select.EPOLLOUT
        if wanted != self._interest:
            self._interest = wanted
            self._epoll.modify(self.fd, wanted)

    def close(self) -> None:
        if self.socket.fileno() >= 0:
            self._epoll.unregister(self.fd)
            self.socket.close()
            self.peer.close()
            self._on_close(self)


class StoreSocket:
    """`kick` delivers what requests caused, True while there is more; `idle()` says that there is nothing to deliver."""

    def __init__(self, daemon: Xenstored, kick: Callable[[], bool], idle: Callable[[], bool]) -> None:
        self.daemon = daemon
        self.clients: dict[int, Client] = {}
        self.path: Path | None = None
        self._kick, self._idle = kick, idle
        self._epoll = select.epoll()
        self._listener: socket.socket | None = None
        self._made_directory: Path | None = None
        self._file = (0, 0)  # device and inode of the socket
        self._accepting = False
        self._starved = False  # said that there are no descriptors

    def listen(self, path: Path) -> None:
        """SocketError if that cannot be. A socket that nobody listens on any more is replaced, anything else is not."""
        if len(os.fsencode(path)) > SUN_PATH_MAX:
            raise SocketError(errno.ENAMETOOLONG, f"{path}: a Unix socket's path has at most {SUN_PATH_MAX} bytes")
        try:
            if not path.parent.exists():
                path.parent.mkdir(mode=0o755)
                self._made_directory = path.parent
            _remove_stale(path)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            self._listener = listener
            before = os.umask(0o177)
            try:
                listener.bind(os.fspath(path))
            finally:
                os.umask(before)
            status = os.lstat(path)
            self.path, self._file = path, (status.st_dev, status.st_ino)
            listener.listen(BACKLOG)
        except OSError as error:
            self._unlisten()
            if isinstance(error, SocketError):
                raise
            raise SocketError(error.errno, f"cannot listen at {path}: {error.strerror}") from error
        self._accept_again()

    async def run(self) -> None:
        """Serve until cancelled."""
        more = False
        while True:
            if more:
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
            more = self._turn()

    def _turn(self) -> bool:
        """Serve who is ready, look again; until there is nothing for a while, or others want to run. True: more is due."""
        clock, poll, clients = time.perf_counter, self._epoll.poll, self.clients
        now = clock()
        turn_ends, quiet_since, more = now + TURN_S, now, False
        while now < turn_ends:
            ready = poll(0, EVENTS)
            for fd, events in ready:
                client = clients.get(fd)
                if client is not None:
                    client.ready(events)
                else:
                    self._accept()
            if not self._idle():
                more = self._kick()
            now = clock()
            if ready:
                quiet_since = now
            elif not more and now - quiet_since >= LOOK_S:
                return False
        return True

    def _accept(self) -> None:
        if self._listener is None:
            return
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError, InterruptedError):
            return
        except OSError as error:
            # no descriptors are left: those that wait are served when another client goes, or somebody else gives some back
            if not self._starved:
                log.error("a client of the store has to wait: %s", error)
            self._starved = True
            self._stop_accepting()
            timers = self.daemon.store.timers
            timers.add(timers.clock() + RETRY_S, self._accept_again)
            return
        self._starved = False
        sock.setblocking(False)
        self.clients[sock.fileno()] = Client(sock, self.daemon, self._epoll, self._closed)
        if len(self.clients) >= CLIENTS_MOST:
            self._stop_accepting()

    def _stop_accepting(self) -> None:
        if self._accepting and self._listener is not None:
            self._accepting = False
            self._epoll.unregister(self._listener.fileno())

    def _accept_again(self) -> None:
        if not self._accepting and self._listener is not None and len(self.clients) < CLIENTS_MOST:
            self._accepting = True
            self._epoll.register(self._listener.fileno(), select.EPOLLIN)

    def _closed(self, client: Client) -> None:
        self.clients.pop(client.fd, None)
        self._accept_again()

    def close(self) -> None:
        """End all connections and take the socket away, if it is still ours."""
        for client in list(self.clients.values()):
            client.close()
        self._unlisten()
        if not self._epoll.closed:
            self._epoll.close()

    def _unlisten(self) -> None:
        if self._listener is not None:
            self._stop_accepting()
            self._listener.close()
            self._listener = None
        if self.path is not None:
            try:
                status = os.lstat(self.path)
                if (status.st_dev, status.st_ino) == self._file:
                    os.unlink(self.path)
            except OSError as error:
                log.warning("%s: %s", self.path, error.strerror)
            self.path = None
        if self._made_directory is not None:
            try:
                self._made_directory.rmdir()
            except OSError as error:
                log.info("%s stays: %s", self._made_directory, error.strerror)
            self._made_directory = None


def _remove_stale(path: Path) -> None:
    """A socket left by somebody who was killed goes; a live one, or another kind of file, is an error."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketError(errno.EEXIST, f"{path} is there and is no socket: choose another path with --xenstored-socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError:
            pass  # its backlog is full: it lives
    raise SocketError(errno.EADDRINUSE, f"somebody serves a store at {path}: choose another path with --xenstored-socket")
