"""peer.py: one client of the store behind a stream of bytes, whatever carries them: a socket, a ring page, a device file.

The carrier calls receive() with what came and takes what is in `out`; requests.py has what each message means. Replies and
events leave in the daemon's order: the events that a request caused for its own sender come before its reply, but the
first event of a watch comes after WATCH's.

Hostile clients: a message that is too long ends the stream, and nothing else (`failed`). Who does not read his replies is
not read from, nor is a domain that has too many requests outstanding, too much memory or no write credit (`wants_input`);
what it sent stays with the carrier. Events wait in the connection's queue, where they are few, until there is room.
Invariant: `out` is bounded: one reply or a few events beyond OUT_MOST.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from xenmodel.public.io.xs_wire import XENSTORE_ERROR_PROTO, XENSTORE_PAYLOAD_MAX, XsType
from xenmodel.types import Domid
from xenmodel.xenstore.domain import Cause
from xenmodel.xenstore.errors import XsErrno, XsError
from xenmodel.xenstore.perms import CONTROL_DOMAIN
from xenmodel.xenstore.requests import HANDLERS, NO_TRANSACTION, PRIVILEGED
from xenmodel.xenstore.wire import MESSAGE_MAX, Message, Parser, ProtocolError, join, pack

if TYPE_CHECKING:
    from xenmodel.xenstore.daemon import Xenstored

OUT_MOST = 64 * 1024  # bytes of replies to a client that does not read them
EVENTS_MOST = 4 * 1024  # bytes waiting before events wait in their queue, where they can be merged
TURN = 32  # requests before others have their turn
TURN_S = 0.0005  # or so much time
MEMORY_RETRY_S = 0.1  # how soon to look again whether a domain's memory has become less
NO_TIME_S = 1e-6  # sums of floats are hardly ever 0, and a clock that stands still has no later moment


class Peer:
    """`flush()` is the carrier's: called when `out` has grown, or input is wanted again, outside of receive()."""

    def __init__(self, daemon: Xenstored, domid: Domid, flush: Callable[[], None]) -> None:
        self.daemon = daemon
        self.store = daemon.store
        self.connection = self.store.connect(domid)
        self.flush = flush
        self.out = bytearray()
        self.failed = 0  # XENSTORE_ERROR_*
        self._record = self.connection.record
        self._parser = Parser()
        self._busy = self._dirty = False
        self._room = 0  # events go on into `out` while it is shorter
        self._held = ""  # the quota that is in the way
        self._timed = False  # a timer will look whether it still is
        self._replies: deque[tuple[int, Cause]] = deque()  # where in the stream each ends
        self._sent = self._made = 0  # bytes of the stream
        self.connection.on_turn = self._turn

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """More of the stream. What it asks for is answered into `out` as far as `wants_input` allows, the rest later."""
        if not self.failed:
            self._parser.feed(data)
            self._run()

    @property
    def wants_input(self) -> bool:
        """Should the carrier read more of the stream? Not before what it has brought is nearly served."""
        return self._parser.pending < MESSAGE_MAX and self._may_serve()

    @property
    def backlog(self) -> int:
        """Bytes that were received and not looked at yet."""
        return self._parser.pending

    def sent(self, count: int) -> None:
        """The carrier has taken the first `count` bytes of `out`."""
        del self.out[:count]
        self._sent += count
        while self._replies and self._replies[0][0] <= self._sent:
            self._replies.popleft()[1].done()
        if not self.failed and (self._parser.pending or (self.connection.pending_events and len(self.out) < EVENTS_MOST)):
            self.store.notify(self.connection)

    def fail(self, error: int) -> None:
        """The stream is lost. Nothing of it is served any more, and what it held is given back."""
        self.failed = error
        self.close()

    def close(self) -> None:
        """The connection ends. Nothing more goes to the carrier: its page may be somebody else's by now."""
        self.connection.close()
        self.out.clear()
        while self._replies:
            self._replies.popleft()[1].done()

    # --- requests ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Serve whole messages, but no more than a turn's."""
        if self._busy:
            return
        self._busy = True
        clock = self.store.clock
        until = clock() + TURN_S
        try:
            for _ in range(TURN):
                if not self._parser.pending or not self._may_serve():
                    return
                message = self._parser.next()
                if message is None:
                    return
                self._serve(message)
                if clock() > until:
                    break
            if self._parser.pending:
                self.store.notify(self.connection)  # the rest in another turn
        except ProtocolError as error:
            self.daemon.complain(self.connection.domid, f"{error}; the connection is closed")
            self.fail(XENSTORE_ERROR_PROTO)
        finally:
            self._busy = False

    def _serve(self, message: Message) -> None:
        kind, req_id, tx_id, body = message
        cause = None
        self.daemon.counts[kind] += 1
        if self.daemon.tracing:
            self.daemon.trace("IN", self, kind, body)
        if self.connection.domid != CONTROL_DOMAIN:
            self.store.cause = cause = Cause(self._record)
        try:
            reply = self._answer(kind, tx_id, body)
        except XsError as error:
            kind, reply = XsType.ERROR, error.errno.value.encode() + b"\0"
        finally:
            self.store.cause = None
        if kind != XsType.WATCH:
            self._tell_events(self.connection.pending_events, OUT_MOST)
        self._send(kind, req_id, tx_id, reply)
        if cause is not None:
            self._replies.append((self._made, cause))
        if kind == XsType.WATCH:
            self._tell_events(self.connection.pending_events, OUT_MOST)

    def _answer(self, kind: int, tx_id: int, body: bytes) -> bytes:
        handler = HANDLERS.get(kind)
        if handler is None:
            del self.daemon.counts[kind]  # or a client could fill it
            raise XsError(XsErrno.ENOSYS, f"there is no request {kind}")
        if kind in PRIVILEGED and self.connection.domid != CONTROL_DOMAIN:
            raise XsError(XsErrno.EACCES, f"domain {self.connection.domid} may not send {XsType(kind).name}")
        if kind in NO_TRANSACTION:
            tx_id = 0
        elif tx_id and tx_id not in self.connection.transactions:
            raise XsError(XsErrno.ENOENT, f"there is no transaction {tx_id}")
        reply = handler(self, tx_id, body)
        if len(reply) > XENSTORE_PAYLOAD_MAX:
            raise XsError(XsErrno.E2BIG, f"a reply of {len(reply)} bytes")
        return reply

    def _may_serve(self) -> bool:
        if self.failed or self.connection.closed or len(self.out) >= OUT_MOST:
            return False
        return self.connection.domid == CONTROL_DOMAIN or self._may_go_on()

    def _may_go_on(self) -> bool:
        """Is this domain to be served? If not, it gets a turn when that may have changed."""
        record, limits = self._record, self.connection.limits
        if limits.outstanding and record.outstanding >= limits.outstanding:
            self.daemon.stall(self)
            return self._hold("outstanding", f"{record.outstanding} requests are outstanding")
        if record.credit < 0 and (wait_s := self.store.domains.credit.wait_s(record)) > NO_TIME_S:
            self._look_again_in(wait_s)
            return self._hold("write-rate", f"waits {wait_s:.3f} s for the next write")
        if limits.memory and self.store.domains.memory(record) >= limits.memory:
            self._look_again_in(MEMORY_RETRY_S)
            return self._hold("memory", f"not read from while it uses {limits.memory} bytes or more")
        self._held = ""
        return True

    def _hold(self, quota: str, why: str) -> bool:
        """False; counted once however often one asks meanwhile."""
        if self._held != quota:
            self._held = quota
            self._record.refuse(quota, why)
        return False

    def _look_again_in(self, seconds: float) -> None:
        """One timer at a time: each brings a turn, and a turn asks again."""
        if not self._timed:
            self._timed = True
            self.store.timers.add(self.store.clock() + seconds, self._look_again)

    def _look_again(self) -> None:
        self._timed = False
        self.store.notify(self.connection)

    # --- events -----------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """The hypervisor's loop has come to us: go on with what had to wait, but when dispatch() is over.

        It cannot be entered again, and so the own events of a request that is served in it would come after the reply.
        """
        if not self._busy:
            self.daemon.turned(self)
            if not self._dirty and not self.connection.closed:
                self._dirty = True
                self.daemon.defer(self._go_on)

    def _go_on(self) -> None:
        self._dirty = False
        self._tell_events(TURN, EVENTS_MOST)
        self._run()
        self.flush()

    def _tell_events(self, most: int, room: int) -> None:
        """Put events into `out`, at most so many, as long as it has less than `room` bytes."""
        connection, busy = self.connection, self._busy
        if connection.pending_events and len(self.out) < room:
            self._busy, self._room, connection.on_event = True, room, self._event
            connection.dispatch(most)
            self._busy, connection.on_event = busy, None
            if connection.pending_events and len(self.out) < EVENTS_MOST:
                self.store.notify(connection)  # the rest in another turn

    def _event(self, path: str, token: str) -> None:
        self._send(XsType.WATCH_EVENT, 0, 0, join(path, token))
        if len(self.out) >= self._room:
            self.connection.on_event = None

    def _send(self, kind: int, req_id: int, tx_id: int, body: bytes) -> None:
        if self.daemon.tracing:
            self.daemon.trace("OUT", self, kind, body)
        self.out += pack(kind, req_id, tx_id, body)
        self._made += 16 + len(body)
