"""ring.py: the page through which a domain speaks to xenstored, struct xenstore_domain_interface (xenstore-ring.txt).

The server's end, made by daemon.py at INTRODUCE. Everything in the page may be changed by the guest at any time: each index
is read once and checked; what is wrong sets `error` and ends this connection, nobody else's, until the guest asks for a
reconnection (`connection` = XENSTORE_RECONNECT), which empties both directions and drops watches and transactions.
What the server may not read yet (peer.py, wants_input) stays in the ring; that is all the back-pressure there is.
"""

from __future__ import annotations

from collections.abc import Callable

from xenmodel.public.io import xs_wire
from xenmodel.ring import BytePipe
from xenmodel.types import Domid, PeerFault
from xenmodel.xenstore.peer import Peer

_OFFSETS = xs_wire.XENSTORE_DOMAIN_INTERFACE.offsets
_WORD = {name: offset // 4 for name, offset in _OFFSETS.items()}
ROUNDS = 4  # how often a guest may fill the ring anew before others have their turn


class StoreRing:
    """`page` is the shared page, `notify` sends the guest an event, `make_peer(flush)` begins a connection of its domain."""

    def __init__(
        self, domid: Domid, page: memoryview, notify: Callable[[], None], make_peer: Callable[[Callable[[], None]], Peer]
    ) -> None:
        self.domid = domid
        self.words = page.cast("I")
        size = xs_wire.XENSTORE_RING_SIZE
        self.requests = BytePipe(page[:size], self.words, _WORD["req_cons"], _WORD["req_prod"])
        self.responses = BytePipe(page[size : 2 * size], self.words, _WORD["rsp_cons"], _WORD["rsp_prod"])
        self.notify = notify
        self._make_peer = make_peer
        self._given_back = False
        self.peer = make_peer(self.pump)

    def introduce(self) -> None:
        """INTRODUCE: what the page has to say; a guest that waits for us is told. Also a second time, after a restore."""
        self.words[_WORD["server_features"]] = self.peer.connection.record.features
        self.reset()

    def reset(self) -> None:
        """A new connection on an empty ring."""
        self.peer.close()
        self.peer = self._make_peer(self.pump)
        self.requests.reset()
        self.responses.reset()
        self.words[_WORD["error"]] = xs_wire.XENSTORE_ERROR_NONE
        self.words[_WORD["connection"]] = xs_wire.XENSTORE_CONNECTED
        self.notify()

    def kicked(self) -> None:
        """The guest has sent an event."""
        offered = self.peer.connection.record.features & xs_wire.XENSTORE_SERVER_FEATURE_RECONNECTION
        if offered and self.words[_WORD["connection"]] == xs_wire.XENSTORE_RECONNECT:
            self.reset()
        else:
            self.pump()

    def pump(self) -> None:
        """Move what can be moved, both ways."""
        if self._given_back:
            return  # a turn that was still due
        peer = self.peer
        moved = not peer.failed and self._move(peer)
        if peer.failed and self.words[_WORD["error"]] != peer.failed:
            self.words[_WORD["error"]] = peer.failed
            moved = True
        if moved:
            self.notify()

    def _move(self, peer: Peer) -> bool:
        """Did anything move?"""
        moved = False
        try:
            for _ in range(ROUNDS):
                moved |= self._drain(peer)
                if not (self.requests.waiting() and peer.wants_input):
                    break
                peer.receive(self.requests.read())
                moved = True
            else:
                peer.store.notify(peer.connection)  # more in another turn
            moved |= self._drain(peer)
        except PeerFault as fault:
            peer.daemon.complain(self.domid, f"its xenstore ring: {fault}")
            peer.fail(xs_wire.XENSTORE_ERROR_RINGIDX)
        return moved

    def _drain(self, peer: Peer) -> bool:
        """Answers into the ring, as far as there is room."""
        count = 0
        while peer.out and (written := self.responses.write(peer.out)):
            peer.sent(written)
            count += written
        return count > 0

    def close(self) -> None:
        """The page is not ours any more: it is not looked at again."""
        self._given_back = True
        self.peer.close()
