"""ctrl.py: the control ring of netif.h: the guest says how frames to it are hashed and steered to its queues.

CtrlBack answers requests for netback and keeps what was set in a HashState, which netback asks for each frame; CtrlFront
sends requests for netfront, which starts and stops it. Both are entered by events.
Invariants: every request taken from the ring is answered exactly once; a slot and a granted page are copied once and only
the copy is believed; key and mapping are replaced as a whole, after all of it was found valid (XSA-270); a callback of
CtrlFront runs exactly once.
Statuses are those of netif.h's text. xen-netback has INVALID_PARAMETER in place of BUFFER_OVERFLOW (more than the backend
supports), and for SET_HASH_FLAGS without an algorithm. Key, types and mapping outlive the algorithm, as there.
Left out: static grants (GREF_MAPPING requests: NOT_SUPPORTED); in CtrlFront, mappings of more than one page.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from struct import Struct

from netdev.pages import Pages
from netdev.toeplitz import Toeplitz, hash_input
from xenmodel.domain import Domain
from xenmodel.public.grant_table import GNTMAP_host_map, GNTMAP_readonly
from xenmodel.public.io.netif import (
    CTRL_REQUEST,
    CTRL_RESPONSE,
    CTRL_SLOT_SIZE,
    XEN_NETIF_CTRL_HASH_ALGORITHM_NONE,
    XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ,
    XEN_NETIF_CTRL_HASH_TYPE_IPV4,
    XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP,
    XEN_NETIF_CTRL_HASH_TYPE_IPV6,
    XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP,
    XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW,
    XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER,
    XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED,
    XEN_NETIF_CTRL_STATUS_SUCCESS,
    XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS,
    XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE,
    XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM,
    XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS,
    XEN_NETIF_CTRL_TYPE_SET_HASH_KEY,
    XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING,
    XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE,
)
from xenmodel.ring import BackRing, FrontRing
from xenmodel.types import PAGE_SIZE, Domid, OutOfResources, PeerFault, Port

MAX_HASH_KEY_BYTES = 40  # XEN_NETBK_MAX_HASH_KEY_SIZE: what IPv6 with ports needs
MAX_HASH_MAPPING_ENTRIES = 128  # XEN_NETBK_MAX_HASH_MAPPING_SIZE
HASH_TYPES = (
    XEN_NETIF_CTRL_HASH_TYPE_IPV4
    | XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP
    | XEN_NETIF_CTRL_HASH_TYPE_IPV6
    | XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP
)
MAX_WAITING = 256  # requests of a frontend for which the ring has no room yet
NO_ANSWER = -1  # given to a callback instead of a status, which is a u32: the ring was closed first
_ENTRY = Struct("<I")
_ENTRIES_PER_PAGE = PAGE_SIZE // _ENTRY.size

Fail = Callable[[PeerFault], None]
Done = Callable[[int, int], None]  # status, data
ReadPage = Callable[[int], bytes | None]  # the first so many bytes of the page a request names; None: it is not granted


class HashState:
    """How frames find their queue among the `queues` of one connection. The setters return a XEN_NETIF_CTRL_STATUS_*."""

    __slots__ = ("_toeplitz", "algorithm", "flags", "key", "mapping", "queues")

    def __init__(self, queues: int) -> None:
        assert queues > 0, f"a device with {queues} queues receives nothing"
        self.queues = queues
        self.algorithm = XEN_NETIF_CTRL_HASH_ALGORITHM_NONE
        self.flags = 0
        self.key = bytes(MAX_HASH_KEY_BYTES)
        self.mapping: tuple[int, ...] = ()
        self._toeplitz = Toeplitz(self.key)

    def choose(self, head: bytes | memoryview) -> tuple[int | None, tuple[int, int] | None]:
        """For a frame that begins with `head`: its queue and (number of the hash type's bit, hash), the latter for
        XEN_NETIF_EXTRA_TYPE_HASH. Both None when hashing is off or no type applies: steer it as you like."""
        if self.algorithm == XEN_NETIF_CTRL_HASH_ALGORITHM_NONE:
            return None, None
        given = hash_input(head, self.flags)
        if given is None:
            return None, None
        kind, data = given
        value = self._toeplitz.hash(data)
        mapping = self.mapping
        return mapping[value % len(mapping)] if mapping else value % self.queues, (kind, value)

    def set_algorithm(self, algorithm: int) -> int:
        if algorithm not in (XEN_NETIF_CTRL_HASH_ALGORITHM_NONE, XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ):
            return XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER
        self.algorithm = algorithm
        return XEN_NETIF_CTRL_STATUS_SUCCESS

    def get_flags(self) -> tuple[int, int]:
        """Status, and the types that can be had."""
        if self.algorithm == XEN_NETIF_CTRL_HASH_ALGORITHM_NONE:
            return XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED, 0
        return XEN_NETIF_CTRL_STATUS_SUCCESS, HASH_TYPES

    def set_flags(self, flags: int) -> int:
        if self.algorithm == XEN_NETIF_CTRL_HASH_ALGORITHM_NONE:
            return XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED
        if flags & ~HASH_TYPES:
            return XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER
        self.flags = flags
        return XEN_NETIF_CTRL_STATUS_SUCCESS

    def set_key(self, length: int, read: ReadPage) -> int:
        """Octets that are not given are 0, so no key at all makes every hash 0."""
        if length > MAX_HASH_KEY_BYTES:
            return XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW
        key = read(length) if length else b""
        if key is None:
            return XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER
        self.key = key.ljust(MAX_HASH_KEY_BYTES, b"\0")
        self._toeplitz = Toeplitz(self.key)
        return XEN_NETIF_CTRL_STATUS_SUCCESS

    def set_mapping_size(self, entries: int) -> int:
        """A new table, all queue 0; with no entries, the hash is taken modulo the number of queues."""
        if entries > MAX_HASH_MAPPING_ENTRIES:
            return XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER
        self.mapping = (0,) * entries
        return XEN_NETIF_CTRL_STATUS_SUCCESS

    def set_mapping(self, offset: int, entries: int, read: ReadPage) -> int:
        """Replace a part of the table, which lies within the size that was set and names queues that exist."""
        old = self.mapping
        if offset + entries > MAX_HASH_MAPPING_ENTRIES:  # nothing wraps around here (XSA-270)
            return XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW
        if offset + entries > len(old):
            return XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER
        data = read(entries * _ENTRY.size) if entries else b""
        if data is None:
            return XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER
        new = tuple(queue for (queue,) in _ENTRY.iter_unpack(data))
        if any(queue >= self.queues for queue in new):
            return XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER
        self.mapping = old[:offset] + new + old[offset + entries :]
        return XEN_NETIF_CTRL_STATUS_SUCCESS


class CtrlBack:
    """The backend's end, on a ring that its owner has mapped and a port that it has bound (set_handler: on_event)."""

    def __init__(
        self, domain: Domain, peer_domid: Domid, ring: BackRing, port: Port, state: HashState, fail: Fail
    ) -> None:
        assert ring.slot_size == CTRL_SLOT_SIZE, f"slots of {ring.slot_size} bytes; netif.h has {CTRL_SLOT_SIZE}"
        self.domain = domain
        self.peer_domid = peer_domid
        self.ring = ring
        self.port = port
        self.state = state
        self.fail = fail
        self.stopped = False

    def on_event(self, port: Port) -> None:
        """Answer what is on the ring. A frontend that keeps producing gets a bounded turn, then an event of its own."""
        if self.stopped:
            return
        ring, events = self.ring, self.domain.events
        budget = 2 * ring.size
        fault: PeerFault | None = None
        try:
            waiting = ring.final_check_for_requests()
            while waiting and budget:
                budget -= 1
                at = ring.next_request()
                self._take(bytes(ring.view[at : at + CTRL_SLOT_SIZE]))
                waiting = waiting - 1 or ring.final_check_for_requests()
            if waiting:
                events.raise_again(port)
        except PeerFault as found:
            fault = found
        if ring.push_responses():
            events.send(self.port)
        if fault is not None:
            self.stopped = True
            self.fail(fault)

    def _take(self, slot: bytes) -> None:
        ident, kind, d0, d1, d2 = CTRL_REQUEST.unpack(slot)
        status, data = self._perform(kind, d0, d1, d2)
        CTRL_RESPONSE.pack_into(self.ring.view, self.ring.next_response(), ident, kind, status, data)

    def _perform(self, kind: int, d0: int, d1: int, d2: int) -> tuple[int, int]:
        """Status and data of the answer to one request."""
        state = self.state
        if kind == XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM:
            return state.set_algorithm(d0), 0
        if kind == XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS:
            return state.get_flags()
        if kind == XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS:
            return state.set_flags(d0), 0
        if kind == XEN_NETIF_CTRL_TYPE_SET_HASH_KEY:
            return state.set_key(d1, lambda length: self._page(d0, length)), 0
        if kind == XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE:
            return XEN_NETIF_CTRL_STATUS_SUCCESS, MAX_HASH_MAPPING_ENTRIES
        if kind == XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE:
            return state.set_mapping_size(d0), 0
        if kind == XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING:
            return state.set_mapping(d2, d1, lambda length: self._page(d0, length)), 0
        return XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED, 0

    def _page(self, gref: int, length: int) -> bytes | None:
        """A copy of the first `length` bytes of a page the guest granted; netif.h: it may be read-only."""
        maptrack = self.domain.maptrack
        _, mapping = maptrack.map(self.peer_domid, gref, GNTMAP_host_map | GNTMAP_readonly)
        if mapping is None:
            return None
        data = bytes(mapping.view[:length])
        maptrack.unmap(mapping.handle)
        return data


class CtrlFront:
    """The frontend's end: allocates its ring in the guest's memory, grants it, and makes a port for the backend to bind.

    OutOfResources, and nothing is left behind, when the guest is short of one of these. `gref` and `port` are what netfront
    publishes as ctrl-ring-ref and event-channel-ctrl."""

    def __init__(self, domain: Domain, peer_domid: Domid, fail: Fail) -> None:
        self.domain = domain
        self.peer_domid = peer_domid
        self.fail = fail
        self.stopped = False
        self.setting: _HashSetting | None = None  # the set_hash() that is under way
        self.page = Pages(domain, peer_domid)
        self.gref = self.page.grefs[0]
        self.port = domain.events.alloc_unbound(peer_domid, self.on_event)
        if self.port < 0:
            self.page.release()
            raise OutOfResources(f"no event channel is free for the control ring ({self.port})")
        self.ring = FrontRing(self.page.view, CTRL_SLOT_SIZE)
        self.out: list[tuple[int, Done] | None] = [None] * self.ring.size  # by id: type, and whom to tell
        self.ids = list(range(self.ring.size - 1, -1, -1))
        self.waiting: deque[tuple[int, int, int, int, Done]] = deque()

    # --- requests --------------------------------------------------------------------------------------------------

    def request(self, kind: int, d0: int, d1: int, d2: int, done: Done) -> bool:
        """Send a XEN_NETIF_CTRL_TYPE_* with its three u32; done(status, data) is called once, never from in here.

        False, and `done` is never called, if the ring was stopped or MAX_WAITING requests wait for room on it."""
        if self.stopped or len(self.waiting) >= MAX_WAITING:
            return False
        if self.ids:  # then none waits
            self._put(kind, d0, d1, d2, done)
            self._push()
        else:
            self.waiting.append((kind, d0, d1, d2, done))
        return True

    def set_hash(self, types: int, key: bytes, mapping: Sequence[int], done: Done) -> bool:
        """Toeplitz over `types` (XEN_NETIF_CTRL_HASH_TYPE_*) with `key`, steered by `mapping` to queues; without types,
        hashing is turned off. A sequence of requests: the first that is refused ends it with its status, and what
        was set until then stays.

        False, and `done` is never called: it cannot be sent (as in request), or another is under way. OutOfResources: the
        guest has no page or grant for key or mapping. ValueError: they do not fit into a page."""
        if len(key) > PAGE_SIZE or len(mapping) > _ENTRIES_PER_PAGE:
            raise ValueError(f"a key of {len(key)} octets, a mapping of {len(mapping)} entries: more than a page")
        if self.setting is not None:
            return False
        setting = _HashSetting(self, types, key, b"".join(map(_ENTRY.pack, mapping)), done)
        if not setting.next():
            setting.let_go()
            return False
        self.setting = setting
        return True

    def _put(self, kind: int, d0: int, d1: int, d2: int, done: Done) -> None:
        ident = self.ids.pop()
        self.out[ident] = kind, done
        CTRL_REQUEST.pack_into(self.ring.view, self.ring.next_request(), ident, kind, d0, d1, d2)

    def _push(self) -> None:
        if self.ring.push_requests():
            self.domain.events.send(self.port)

    # --- responses -------------------------------------------------------------------------------------------------

    def on_event(self, port: Port) -> None:
        """Take what the backend answered. Every claim of it is checked; one that is false ends the device."""
        ring, budget = self.ring, self.ring.size
        try:
            while not self.stopped and ring.final_check_for_responses():
                if not budget:
                    self.domain.events.raise_again(port)
                    return
                budget -= 1
                self._answered(*CTRL_RESPONSE.unpack_from(ring.view, ring.next_response()))
        except PeerFault as fault:
            if not self.stopped:  # a callback may have done that already
                self.stop()
                self.fail(fault)

    def _answered(self, ident: int, kind: int, status: int, data: int) -> None:
        entry = self.out[ident] if ident < len(self.out) else None
        if entry is None:
            raise PeerFault(f"control response for id {ident}, which is not out")
        if kind != entry[0]:
            raise PeerFault(f"control response says type {kind} where request {ident} was {entry[0]}")
        self.out[ident] = None
        self.ids.append(ident)
        if self.waiting:  # before the callback, which may want to send something itself
            self._put(*self.waiting.popleft())
            self._push()
        entry[1](status, data)

    # --- closing ---------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Close the port and listen no more; what was not answered gets NO_ANSWER."""
        if self.stopped:
            return
        self.stopped = True
        self.domain.events.close(self.port)
        unanswered = [entry[1] for entry in self.out if entry is not None]
        unanswered += [entry[4] for entry in self.waiting]
        self.out = [None] * self.ring.size
        self.waiting.clear()
        for done in unanswered:
            done(NO_ANSWER, 0)

    def release(self) -> None:
        """Take the ring back; a page that the backend still maps is never used again (XSA-396)."""
        self.page.release()


class _HashSetting:
    """One set_hash() under way: the steps that are left, and the pages they name, which stay until it is over."""

    __slots__ = ("done", "front", "pages", "steps")

    def __init__(self, front: CtrlFront, types: int, key: bytes, mapping: bytes, done: Done) -> None:
        self.front = front
        self.done = done
        self.pages: list[Pages] = []
        self.steps = deque([(XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM, XEN_NETIF_CTRL_HASH_ALGORITHM_NONE, 0)])
        if not types:
            return
        try:
            key_gref, mapping_gref = self._grant(key), self._grant(mapping)
        except OutOfResources:
            self.let_go()
            raise
        entries = len(mapping) // _ENTRY.size
        self.steps[0] = XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM, XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ, 0
        self.steps.append((XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS, types, 0))
        self.steps.append((XEN_NETIF_CTRL_TYPE_SET_HASH_KEY, key_gref, len(key)))
        self.steps.append((XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE, entries, 0))
        if entries:
            self.steps.append((XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING, mapping_gref, entries))

    def _grant(self, content: bytes) -> int:
        """A reference to a page of `content`; what is empty needs none."""
        if not content:
            return 0
        page = Pages(self.front.domain, self.front.peer_domid, readonly=True)
        page.view[: len(content)] = content
        self.pages.append(page)
        return page.grefs[0]

    def next(self) -> bool:
        """Send the next step; False if it cannot be sent."""
        kind, d0, d1 = self.steps.popleft()
        return self.front.request(kind, d0, d1, 0, self._answered)

    def _answered(self, status: int, data: int) -> None:
        if status == XEN_NETIF_CTRL_STATUS_SUCCESS and self.steps:
            if self.next():
                return
            status = NO_ANSWER
        self.front.setting = None
        revoked = self.let_go()
        self.done(status, data)
        if not revoked and status != NO_ANSWER:
            raise PeerFault("a page of a control request is still mapped after the response")

    def let_go(self) -> bool:
        """Take the pages back; False if the backend keeps one."""
        kept = [page for page in self.pages if not page.release()]
        return not kept
