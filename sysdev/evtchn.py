"""evtchn.py: drivers/xen/evtchn.c, event channels for programs: what is behind /dev/xen/evtchn in one domain's kernel.

EvtchnDevice is the driver, EvtchnUser one open of the device (struct per_user_data). xenfs/nodes/evtchn.py makes it a file,
gntdev and gntalloc hold ports for their unmap notifications (get, put). It calls the domain's EventChannels.

As of Linux: an event masks its port and puts it into the open's ring; write() unmasks. The ring has RING_PORTS entries, and
an event that finds it full is lost: all reads are EFBIG until reset(). What was in the ring stays when its port is unbound.
NOTIFY is 0 even where there is nothing to notify. Results below 0 are -errno; Xen's own numbers are the same on Linux.

Unlike Linux: the ring does not grow with the number of ports (FreeBSD's does not); NOTIFY of a number that is no port is
EINVAL; BIND_STATIC is EINVAL for a closed port, EBUSY for one that a driver or another open handles (Linux shares the
interrupt), and EACCES once restricted. After stop() everything is EIO.

Invariants: a port that is in a ring since its last unmask is masked, so an open costs its domain one handler per port and
write(); who has bound a port is in `bound` and in that user's `ports`; a port of the domain's kernel is in neither. What is
here may have been closed underneath (EVTCHNOP_reset): the Channel says so, and what has its number now is not touched.
Left out: SIGIO, the delay that lateeoi adds for a peer that floods.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from struct import Struct

from xenmodel.event_channel import NR_PORTS, Channel, EventChannels, Handler, State
from xenmodel.public.xen import DOMID_FIRST_RESERVED
from xenmodel.types import Domid

RING_PORTS = 1024  # a page of evtchn_port_t
MOST_BYTES = 4 * RING_PORTS  # of one read or write
HOLDS_MOST = 0x7FFF  # of one port; Linux's refcnt is a short
_PORT = Struct("<I")


class BoundPort:
    """A port that an open has bound, or had and somebody still holds (struct user_evtchn, and the count in irq_info)."""

    __slots__ = ("channel", "enabled", "holds", "port", "static", "user")

    def __init__(self, user: EvtchnUser, port: int, channel: Channel, *, static: bool = False) -> None:
        self.user: EvtchnUser | None = user
        self.port = port
        self.channel = channel
        self.static = static  # existed before it was bound, and goes on existing
        self.enabled = True  # not masked by an event that nobody has written back
        self.holds = 0  # get() without put()


class EvtchnDevice:
    """The driver in one domain."""

    def __init__(self, events: EventChannels) -> None:
        self.events = events
        self.users: dict[EvtchnUser, None] = {}  # in order of their opens
        self.bound: dict[int, BoundPort] = {}
        self.stopped = False

    def open(self, owner: str, wake: Callable[[], None]) -> EvtchnUser:
        """`owner` is for tables; `wake` is called from handlers, when there is something to read that was not there."""
        user = EvtchnUser(self, owner, wake)
        self.users[user] = None
        return user

    def stop(self) -> None:
        """The domain ends, or has ended: whatever waits has to learn of it."""
        self.stopped = True
        for bound in list(self.bound.values()):
            bound.holds = 0
            if bound.user is None:
                self._free(bound)
        for user in list(self.users):
            user.unbind_all()
            user.wake()

    # --- for gntdev and gntalloc --------------------------------------------------------------------------------------

    def get(self, port: int) -> int:
        """Keep a port that some open has bound until put(). ENOENT: nobody has; EINVAL: not a program's, or no port."""
        if not 0 <= port < NR_PORTS:
            return -errno.EINVAL
        bound = self.find(port)
        if bound is None:
            return -errno.EINVAL if port in self.events.channels else -errno.ENOENT
        if bound.holds >= HOLDS_MOST:
            return -errno.EINVAL
        bound.holds += 1
        return 0

    def put(self, port: int) -> None:
        """Undo one get(): a port that its open has left meanwhile is closed with the last."""
        bound = self.bound.get(port)
        if bound is None or not bound.holds:
            return
        bound.holds -= 1
        if bound.user is None and not bound.holds:
            self._free(bound)

    def send(self, port: int) -> None:
        """The event that an unmap notification asked for, on a port that is held."""
        if self.find(port) is not None:
            self.events.send(port)

    # --- for EvtchnUser -----------------------------------------------------------------------------------------------

    def find(self, port: int) -> BoundPort | None:
        bound = self.bound.get(port)
        return bound if bound is not None and self.is_ours(bound) else None

    def is_ours(self, bound: BoundPort) -> bool:
        return self.events.channels.get(bound.port) is bound.channel

    def add(self, bound: BoundPort) -> None:
        """Just bound. What had that number before is gone, or the number would not be free."""
        assert bound.user is not None, f"port {bound.port} was bound by nobody"
        before = self.bound.get(bound.port)
        if before is not None and before.user is not None:
            before.user.drop(bound.port)
        self.bound[bound.port] = bound
        bound.user.keep(bound)
        bound.channel.owner = bound.user.owner

    def leave(self, bound: BoundPort) -> None:
        """Its user has no more to do with it."""
        assert bound.user is not None, f"port {bound.port} was left twice"
        bound.user.drop(bound.port)
        bound.user = None
        if self.is_ours(bound):
            bound.channel.handler = None
            self.events.mask(bound.port)
        if not bound.holds:
            self._free(bound)

    def _free(self, bound: BoundPort) -> None:
        del self.bound[bound.port]
        if not self.is_ours(bound):
            return
        if bound.static:
            bound.channel.owner = ""
        else:
            self.events.close(bound.port)


class EvtchnUser:
    """One open. bind_* return the port, or bind_static 0; the others 0; all of them -errno."""

    def __init__(self, device: EvtchnDevice, owner: str, wake: Callable[[], None]) -> None:
        self.device = device
        self.owner = owner
        self.wake = wake
        self.ports: dict[int, BoundPort] = {}  # what is bound
        self.overflow = False
        self.restricted: int | None = None  # the only domain with which it may be connected
        self._ring: deque[int] = deque()
        self._bits: dict[int, int] = {}  # of `ports`, in words of 64 as in shared_info

    # --- ioctls -------------------------------------------------------------------------------------------------------

    def bind_virq(self, virq: int) -> int:
        if self.restricted is not None:
            return -errno.EACCES
        return self._bind(lambda handler: self.device.events.bind_virq(virq, handler))

    def bind_interdomain(self, domid: int, remote_port: int) -> int:
        """The new port is pending, so that it can soon be read."""
        if self.restricted not in (None, domid):
            return -errno.EACCES
        remote = Domid(domid & 0xFFFF)  # domid_t, here and below
        return self._bind(lambda handler: self.device.events.bind_interdomain(remote, remote_port, handler))

    def bind_unbound_port(self, domid: int) -> int:
        if self.restricted is not None:
            return -errno.EACCES
        return self._bind(lambda handler: self.device.events.alloc_unbound(Domid(domid & 0xFFFF), handler))

    def bind_static(self, port: int) -> int:
        """A port that the toolstack made, and that outlives this open. EISCONN if it is bound here already."""
        if self.device.stopped:
            return -errno.EIO
        if self.restricted is not None:
            return -errno.EACCES
        if self._mine(port) is not None:
            return -errno.EISCONN
        channel = self.device.events.status(port)
        if isinstance(channel, int) or channel.state is State.CLOSED:
            return -errno.EINVAL
        if channel.handler is not None or self.device.find(port) is not None:
            return -errno.EBUSY
        bound = BoundPort(self, port, channel, static=True)
        self.device.add(bound)
        return self.device.events.set_handler(port, lambda _port: self._happened(bound))

    def unbind(self, port: int) -> int:
        result = self._check(port)
        if not result:
            self.device.leave(self.ports[port])
        return result

    def notify(self, port: int) -> int:
        result = self._check(port)
        if not result:
            self.device.events.send(port)  # a virq, say, cannot be sent to, and Linux does not ask
        return result

    def reset(self) -> int:
        """Empty the ring. Ports stay bound, and masked if they were: who lost track writes all he has."""
        if self.device.stopped:
            return -errno.EIO
        self._ring.clear()
        self.overflow = False
        return 0

    def restrict(self, domid: int) -> int:
        """From now on nothing can be bound but ports of this domain. There is no way back."""
        if self.device.stopped:
            return -errno.EIO
        if self.restricted is not None:
            return -errno.EACCES
        if not 0 < domid < DOMID_FIRST_RESERVED:
            return -errno.EINVAL
        self.restricted = domid
        return 0

    # --- read, write, poll, close -------------------------------------------------------------------------------------

    @property
    def readable(self) -> bool:
        """There are ports, or an error, to read."""
        if not self._ring:
            self._collect()
        return bool(self._ring) or self.overflow or self.device.stopped

    def read(self, size: int) -> bytes | int:
        """The ports of events since the last read, as u32s, as many as there is room for. EAGAIN if there are none."""
        if self.device.stopped:
            return -errno.EIO
        count = min(size, MOST_BYTES) // _PORT.size
        if not count:
            return b""
        if self.overflow:
            return -errno.EFBIG
        if not self._ring:
            self._collect()
        if not self._ring:
            return -errno.EAGAIN
        ring = self._ring
        return b"".join(_PORT.pack(ring.popleft()) for _ in range(min(count, len(ring))))

    def write(self, data: bytes) -> int:
        """Unmask the ports in `data` that an event here has masked; how many bytes were looked at."""
        if self.device.stopped:
            return -errno.EIO
        count = min(len(data), MOST_BYTES) & -_PORT.size
        for (port,) in _PORT.iter_unpack(data[:count]):
            bound = self._mine(port)
            if bound is not None and not bound.enabled:
                bound.enabled = True
                self.device.events.unmask(port)
        return count

    def close(self) -> None:
        """Unbind what is bound; ports that are held go with their last put()."""
        self.unbind_all()
        self._ring.clear()
        self.device.users.pop(self, None)

    def unbind_all(self) -> None:
        for bound in list(self.ports.values()):
            self.device.leave(bound)

    # --- for EvtchnDevice ---------------------------------------------------------------------------------------------

    def keep(self, bound: BoundPort) -> None:
        word = bound.port >> 6
        self.ports[bound.port] = bound
        self._bits[word] = self._bits.get(word, 0) | 1 << (bound.port & 63)

    def drop(self, port: int) -> None:
        del self.ports[port]
        self._bits[port >> 6] &= ~(1 << (port & 63))

    # --- within -------------------------------------------------------------------------------------------------------

    def _bind(self, bind: Callable[[Handler], int]) -> int:
        if self.device.stopped:
            return -errno.EIO
        port = bind(lambda _port: self._happened(bound))
        if port > 0:
            bound = BoundPort(self, port, self.device.events.channels[port])
            self.device.add(bound)
        return port

    def _mine(self, port: int) -> BoundPort | None:
        bound = self.ports.get(port)
        return bound if bound is not None and self.device.is_ours(bound) else None

    def _check(self, port: int) -> int:
        if self.device.stopped:
            return -errno.EIO
        if not 0 <= port < NR_PORTS:
            return -errno.EINVAL
        return 0 if self._mine(port) is not None else -errno.ENOTCONN

    def _collect(self) -> None:
        """Events that are pending, but not delivered yet: the caller's last ioctl or write may have made them so, and on Xen
        the interrupt would have come before it returned."""
        due = self.device.events.take(self._bits, lambda port: self._mine(port) is not None)
        for port in due:
            self._put(self.ports[port])
        if due:
            self.wake()  # somebody else may have waited longer

    def _happened(self, bound: BoundPort) -> None:
        """evtchn_interrupt."""
        had = bool(self._ring), self.overflow
        self._put(bound)
        if had != (bool(self._ring), self.overflow):
            self.wake()

    def _put(self, bound: BoundPort) -> None:
        self.device.events.mask(bound.port)
        bound.enabled = False
        if len(self._ring) < RING_PORTS:
            self._ring.append(bound.port)
        else:
            self.overflow = True
