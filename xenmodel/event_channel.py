"""event_channel.py: event_channel.h, the 2-level ABI. Ports, pending bits and who is told.

Pending, mask and selector bits are real bits in the shared_info page of the domain's memory. send() only marks; handlers
run from Hypervisor.deliver(), one at a time, never re-entered, so a driver is never entered half way through something.

Rules (xen/common/event_channel.c): only a 0->1 change of an unmasked pending bit notifies; unmasking a pending port
notifies; sending to an unbound port is dropped; closing one end of a pair leaves the other unbound, waiting for a new peer
of the same domain; bind_interdomain leaves the new local port pending, for an event may have been lost.
Results below 0 are -XEN_E*, as the hypercalls return them; a handler is the guest kernel's interrupt handler.
Left out: FIFO event arrays, vCPU affinity (everything is delivered on vCPU 0), PIRQs.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping

from xenmodel.public.errno import XEN_EEXIST, XEN_EINVAL, XEN_ENOENT, XEN_ENOSPC, XEN_EPERM, XEN_ESRCH
from xenmodel.public.event_channel import (
    EVTCHNSTAT_closed,
    EVTCHNSTAT_interdomain,
    EVTCHNSTAT_ipi,
    EVTCHNSTAT_unbound,
    EVTCHNSTAT_virq,
)
from xenmodel.public.xen import DOMID_SELF, NR_VIRQS, SHARED_INFO, VCPU_INFO
from xenmodel.types import Domid, Port

NR_PORTS = 4096  # EVTCHN_2L_NR_CHANNELS of a 64-bit guest; port 0 is never used
# positions in shared_info: u64 words, and for vCPU 0's upcall flag a byte
_PENDING = SHARED_INFO.offsets["evtchn_pending"] // 8
_MASK = SHARED_INFO.offsets["evtchn_mask"] // 8
_SELECTOR = VCPU_INFO.offsets["evtchn_pending_sel"] // 8
_UPCALL_PENDING = VCPU_INFO.offsets["evtchn_upcall_pending"]

Handler = Callable[[Port], None]


class State(enum.IntEnum):
    """The states of a port; values are those of EVTCHNOP_status."""

    CLOSED = EVTCHNSTAT_closed
    UNBOUND = EVTCHNSTAT_unbound
    INTERDOMAIN = EVTCHNSTAT_interdomain
    VIRQ = EVTCHNSTAT_virq
    IPI = EVTCHNSTAT_ipi


class Channel:
    """Xen's record of one port (struct evtchn), plus the guest's handler, and for inspection counts and who bound it."""

    __slots__ = ("handler", "notified", "owner", "peer", "remote_domid", "remote_port", "sent", "state", "virq")

    def __init__(self, state: State, remote_domid: int = 0, handler: Handler | None = None) -> None:
        self.state = state
        self.remote_domid = remote_domid
        self.remote_port = 0
        self.peer: EventChannels | None = None
        self.virq = 0
        self.handler = handler
        self.owner = ""  # "" is the domain's own kernel
        self.sent = 0
        self.notified = 0


class EventChannels:
    """One domain's ports. `shared_info` is its page; `queue` is called when an upcall becomes due (once until it ran)."""

    def __init__(
        self,
        domid: Domid,
        shared_info: memoryview,
        lookup: Callable[[int], EventChannels | None],
        queue: Callable[[EventChannels], None],
    ) -> None:
        self.domid = domid
        self.words = shared_info.cast("Q")
        self.bytes = shared_info
        self.channels: dict[int, Channel] = {}
        self._lookup = lookup
        self._queue = queue
        self._queued = False
        self._lowest = 1  # no port below it is free; Xen hands out the lowest
        for i in range(NR_PORTS // 64):
            self.words[_MASK + i] = 0xFFFFFFFFFFFFFFFF  # a kernel boots with every port masked

    # --- binding ---------------------------------------------------------------------------------------------------

    def alloc_unbound(self, remote_domid: Domid, handler: Handler | None = None) -> Port:
        """A new port that `remote_domid` may bind to; -XEN_ENOSPC when all 4095 are taken."""
        return self._new(Channel(State.UNBOUND, self._self(remote_domid), handler))

    def bind_interdomain(self, remote_domid: Domid, remote_port: int, handler: Handler | None = None) -> Port:
        """Join an unbound port of `remote_domid` that waits for us; -XEN_ESRCH, -XEN_EINVAL otherwise."""
        peer = self._lookup(self._self(remote_domid))
        if peer is None:
            return Port(-XEN_ESRCH)
        if len(self.channels) >= NR_PORTS - 1:
            return Port(-XEN_ENOSPC)  # before the peer's port is looked at, as in Xen
        remote = peer.channels.get(remote_port)
        if remote is None or remote.state is not State.UNBOUND or remote.remote_domid != self.domid:
            return Port(-XEN_EINVAL)
        local = Channel(State.INTERDOMAIN, peer.domid, handler)
        port = self._new(local)
        local.remote_port, local.peer = remote_port, peer
        remote.state, remote.remote_port, remote.peer = State.INTERDOMAIN, port, self
        self._set_pending(port)  # the peer may have sent before we were there
        return port

    def bind_virq(self, virq: int, handler: Handler | None = None) -> Port:
        """-XEN_EEXIST if bound already, -XEN_EINVAL if there is no such virq."""
        if not 0 <= virq < NR_VIRQS:
            return Port(-XEN_EINVAL)
        if any(c.state is State.VIRQ and c.virq == virq for c in self.channels.values()):
            return Port(-XEN_EEXIST)
        channel = Channel(State.VIRQ, self.domid, handler)
        channel.virq = virq
        return self._new(channel)

    def bind_ipi(self, handler: Handler | None = None) -> Port:
        return self._new(Channel(State.IPI, self.domid, handler))

    def close(self, port: int) -> int:
        """Free a port; a bound peer goes back to unbound and waits for this domain again."""
        channel = self.channels.pop(port, None)
        if channel is None:
            return -XEN_EINVAL
        self._lowest = min(self._lowest, port)
        if channel.state is State.INTERDOMAIN and channel.peer is not None:
            remote = channel.peer.channels[channel.remote_port]
            remote.state, remote.remote_port, remote.peer, remote.remote_domid = State.UNBOUND, 0, None, self.domid
        word, bit = port >> 6, 1 << (port & 63)
        self.words[_PENDING + word] &= ~bit
        self.words[_MASK + word] |= bit
        return 0

    def reset(self) -> int:
        """EVTCHNOP_reset: close every port at once."""
        for port in list(self.channels):
            self.close(port)
        return 0

    def status(self, port: int) -> Channel | int:
        """The record of a port, or -XEN_EINVAL for a number that is no port; a closed port has state CLOSED."""
        if not 0 < port < NR_PORTS:
            return -XEN_EINVAL
        return self.channels.get(port) or Channel(State.CLOSED)

    def _self(self, domid: int) -> int:
        return self.domid if domid == DOMID_SELF else domid

    def _new(self, channel: Channel) -> Port:
        if len(self.channels) >= NR_PORTS - 1:
            return Port(-XEN_ENOSPC)
        while self._lowest in self.channels:
            self._lowest += 1
        port = self._lowest
        self.channels[port] = channel
        if channel.handler is not None:
            self.words[_MASK + (port >> 6)] &= ~(1 << (port & 63))  # bind_*_to_irqhandler unmasks
        return Port(port)

    # --- sending ---------------------------------------------------------------------------------------------------

    def send(self, port: int) -> int:
        """EVTCHNOP_send. Marks the peer's port; nothing runs before deliver()."""
        channel = self.channels.get(port)
        if channel is None:
            return -XEN_EINVAL
        channel.sent += 1
        if channel.state is State.INTERDOMAIN:
            assert channel.peer is not None, f"port {port} is interdomain without a peer"
            channel.peer._set_pending(channel.remote_port)
        elif channel.state is State.IPI:
            self._set_pending(port)
        elif channel.state is not State.UNBOUND:  # an event to an unbound port is silently lost
            return -XEN_EINVAL
        return 0

    def raise_virq(self, virq: int) -> int:
        """What Xen does when a virtual interrupt happens; -XEN_ENOENT when the guest does not listen."""
        for port, channel in self.channels.items():
            if channel.state is State.VIRQ and channel.virq == virq:
                self._set_pending(port)
                return 0
        return -XEN_ENOENT

    def raise_again(self, port: int) -> None:
        """A handler had enough for one turn and wants another: mark its own port."""
        if port in self.channels:
            self._set_pending(port)

    def take(self, bits: Mapping[int, int], is_wanted: Callable[[int], bool]) -> list[int]:
        """Of the ports in `bits`, word by word, that are pending, not masked and wanted, the events are taken without the
        upcall: the caller handles them himself."""
        taken = []
        for word, mine in bits.items():
            due = self.words[_PENDING + word] & ~self.words[_MASK + word] & mine
            while due:
                bit = due & -due
                due ^= bit
                port = (word << 6) + bit.bit_length() - 1
                if is_wanted(port):
                    self.words[_PENDING + word] &= ~bit
                    self.channels[port].notified += 1
                    taken.append(port)
        return taken

    def _set_pending(self, port: int) -> None:
        words, word, bit = self.words, port >> 6, 1 << (port & 63)
        pending = words[_PENDING + word]
        if pending & bit:
            return
        words[_PENDING + word] = pending | bit
        if not words[_MASK + word] & bit:
            self._notify(word)

    def _notify(self, word: int) -> None:
        self.words[_SELECTOR] |= 1 << word
        self.bytes[_UPCALL_PENDING] = 1
        if not self._queued:
            self._queued = True
            self._queue(self)

    # --- masking ---------------------------------------------------------------------------------------------------

    def mask(self, port: int) -> int:
        if not 0 < port < NR_PORTS:
            return -XEN_EINVAL
        self.words[_MASK + (port >> 6)] |= 1 << (port & 63)
        return 0

    def unmask(self, port: int) -> int:
        """EVTCHNOP_unmask: a port that became pending meanwhile is announced now."""
        if not 0 < port < NR_PORTS:
            return -XEN_EINVAL
        word, bit = port >> 6, 1 << (port & 63)
        was_masked = self.words[_MASK + word] & bit
        self.words[_MASK + word] &= ~bit
        if was_masked and self.words[_PENDING + word] & bit:
            self._notify(word)
        return 0

    def is_masked(self, port: int) -> bool:
        return bool(self.words[_MASK + (port >> 6)] >> (port & 63) & 1)

    def is_pending(self, port: int) -> bool:
        return bool(self.words[_PENDING + (port >> 6)] >> (port & 63) & 1)

    def set_handler(self, port: int, handler: Handler) -> int:
        """Bind the guest's handler to a port that was allocated without one, and unmask it."""
        channel = self.channels.get(port)
        if channel is None:
            return -XEN_EINVAL
        if channel.handler is not None:
            return -XEN_EPERM
        channel.handler = handler
        return self.unmask(port)

    # --- delivery --------------------------------------------------------------------------------------------------

    def run_upcalls(self, budget: int, choose: Callable[[int], int] | None = None) -> None:
        """Run the handlers of pending unmasked ports, at most `budget`; what is left over is queued again.

        `choose(n)` picks which of n candidates is next; without it they run in order of port."""
        self._queued = False
        words = self.words
        self.bytes[_UPCALL_PENDING] = 0
        selector, words[_SELECTOR] = words[_SELECTOR] & ((1 << NR_PORTS // 64) - 1), 0
        due: list[int] = []
        while selector:
            word = (selector & -selector).bit_length() - 1
            selector &= selector - 1
            bits = words[_PENDING + word] & ~words[_MASK + word]
            while bits:
                due.append((word << 6) + (bits & -bits).bit_length() - 1)
                bits &= bits - 1
        channels = self.channels
        try:
            while due and budget > 0:
                port = due.pop(choose(len(due)) if choose is not None else 0)
                channel, word, bit = channels.get(port), port >> 6, 1 << (port & 63)
                pending = words[_PENDING + word]
                if not pending & ~words[_MASK + word] & bit:
                    continue  # an earlier handler closed or masked it
                words[_PENDING + word] = pending & ~bit
                if channel is not None and channel.handler is not None:
                    budget -= 1
                    channel.notified += 1
                    channel.handler(Port(port))
        finally:  # also when a handler raised: that is its owner's bug, and the others still get their events
            for port in due:
                self._notify(port >> 6)
