"""frontqueue.py: one ring of a Blkfront: commands out, responses in. The frontend's data path.

`shadow[id]` is the command an id stands for while it is out; every response is checked against it. A command longer than
a request may be takes several ids and is complete when all are answered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockdev.command import Command, Where
from blockdev.geometry import split
from xenmodel.memory import Frame, vmap
from xenmodel.public.io.blkif import (
    ABIS,
    BLKIF_MAX_SEGMENTS_PER_REQUEST,
    BLKIF_OP_DISCARD,
    BLKIF_OP_INDIRECT,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    SECTOR_SIZE,
    SEGMENT,
    SEGMENT_SIZE,
)
from xenmodel.ring import FrontRing
from xenmodel.types import PAGE_SHIFT, PAGE_SIZE, Gref, OutOfResources, PeerFault, Pfn, Port

if TYPE_CHECKING:
    from blockdev.blkfront import Blkfront

_NO_GREFS = (0,) * 7  # indirect requests here need one page of descriptors: 256 segments


class FrontQueue:
    """Allocates its ring in the guest's memory, grants it, and makes a port for the backend to bind."""

    def __init__(self, front: Blkfront, pages: int, protocol: str) -> None:
        self.front = front
        self.abi = ABIS[protocol]
        domain = front.domain
        self.events = domain.events
        self.pfn = domain.memory.allocate(pages)
        self.pages = pages
        self.grefs: list[Gref] = []
        try:
            for i in range(pages):
                self.grefs.append(domain.grants.grant_access(front.peer_domid, Pfn(self.pfn + i)))
            self.port = domain.events.alloc_unbound(front.peer_domid, self.on_event)
            if self.port < 0:
                raise PeerFault(f"no event channel is free ({self.port})")
        except (OutOfResources, PeerFault):
            self.release()
            raise
        view = vmap([Frame(domain.memory, self.pfn + i) for i in range(pages)])
        self.ring = FrontRing(view, self.abi.slot_size)
        self.shadow: list[Command | None] = [None] * self.ring.size
        self.shadow_op = [0] * self.ring.size
        self.ids = list(range(self.ring.size - 1, -1, -1))

    # --- requests --------------------------------------------------------------------------------------------------

    def put(self, command: Command) -> bool:
        """Write a command's request(s) on the ring; False if there is no room for all of them now."""
        front, op, length = self.front, command.op, command.length
        if op != BLKIF_OP_READ and op != BLKIF_OP_WRITE:
            return self._put_other(command)
        pages = (length + PAGE_SIZE - 1) >> PAGE_SHIFT
        if pages > front.most_segments:
            return self._put_split(command)
        ids = self.ids
        if not ids:
            return False
        ident = ids.pop()
        at = self.ring.next_request()
        if pages <= BLKIF_MAX_SEGMENTS_PER_REQUEST:
            self._write_direct(at, ident, command, 0, length)
        else:
            self._write_indirect(at, ident, command, length)
        command.where, command.parts = Where.BUSY, 1
        self.shadow[ident] = command
        return True

    def _write_direct(self, at: int, ident: int, command: Command, first: int, length: int) -> None:
        """One request of up to 11 segments over command.view[first : first + length]."""
        view, abi, op = self.ring.view, self.abi, command.op
        page, sector = first >> PAGE_SHIFT, command.sector + first // SECTOR_SIZE
        count = (length + PAGE_SIZE - 1) >> PAGE_SHIFT
        abi.request.pack_into(view, at, op, count, self.front.handle & 0xFFFF, ident, sector)
        at += abi.segments_at
        view[at : at + count * SEGMENT_SIZE] = command.segments[page * SEGMENT_SIZE : (page + count) * SEGMENT_SIZE]
        if rest := length & (PAGE_SIZE - 1):
            last = page + count - 1
            SEGMENT.pack_into(view, at + (count - 1) * SEGMENT_SIZE, command.grefs[last], 0, rest // SECTOR_SIZE - 1)
        self.shadow_op[ident] = op

    def _write_indirect(self, at: int, ident: int, command: Command, length: int) -> None:
        count = (length + PAGE_SIZE - 1) >> PAGE_SHIFT
        if command.described != length:  # else the page says it already
            command.indirect[: count * SEGMENT_SIZE] = command.segments[: count * SEGMENT_SIZE]
            if rest := length & (PAGE_SIZE - 1):
                last = (count - 1) * SEGMENT_SIZE
                SEGMENT.pack_into(command.indirect, last, command.grefs[count - 1], 0, rest // SECTOR_SIZE - 1)
            command.described = length
        handle = self.front.handle & 0xFFFF
        head = (BLKIF_OP_INDIRECT, command.op, count, ident, command.sector, handle)
        self.abi.indirect.pack_into(self.ring.view, at, *head, command.indirect_gref, *_NO_GREFS)
        self.shadow_op[ident] = BLKIF_OP_INDIRECT

    def _put_split(self, command: Command) -> bool:
        """More segments than the backend takes: several direct requests, all or none."""
        pieces = split(command.length, BLKIF_MAX_SEGMENTS_PER_REQUEST)
        if len(pieces) > len(self.ids):
            return False
        for first, length in pieces:
            ident = self.ids.pop()
            self._write_direct(self.ring.next_request(), ident, command, first, length)
            self.shadow[ident] = command
        command.where, command.parts = Where.BUSY, len(pieces)
        return True

    def _put_other(self, command: Command) -> bool:
        """Discard, or a flush in the form this backend understands."""
        if not self.ids:
            return False
        ident = self.ids.pop()
        at, view, handle = self.ring.next_request(), self.ring.view, self.front.handle & 0xFFFF
        if command.op == BLKIF_OP_DISCARD:
            op = BLKIF_OP_DISCARD
            count = command.length // SECTOR_SIZE
            self.abi.discard.pack_into(view, at, op, 0, handle, ident, command.sector, count)
        else:
            op = self.front.flush_op
            self.abi.request.pack_into(view, at, op, 0, handle, ident, 0)
        command.where, command.parts = Where.BUSY, 1
        self.shadow[ident], self.shadow_op[ident] = command, op
        return True

    def push(self) -> None:
        if self.ring.push_requests():
            self.events.send(self.port)

    # --- responses -------------------------------------------------------------------------------------------------

    def on_event(self, port: Port) -> None:
        """Take what the backend answered. Every claim of it is checked; one that is false ends the device."""
        ring, unpack = self.ring, self.abi.response.unpack_from
        shadow, shadow_op, ids, completed = self.shadow, self.shadow_op, self.ids, self.front.completed
        budget = ring.size
        try:
            waiting = ring.final_check_for_responses()
            while waiting:
                if not budget:
                    self.events.raise_again(port)
                    return
                budget -= 1
                ident, op, status = unpack(ring.view, ring.next_response())
                if ident >= len(shadow) or (command := shadow[ident]) is None:
                    raise PeerFault(f"response for id {ident}, which is not out")
                if op != shadow_op[ident]:
                    raise PeerFault(f"response says operation {op} where request {ident} was {shadow_op[ident]}")
                shadow[ident] = None
                ids.append(ident)
                if status:
                    command.status = status if -2 <= status < 0 else -1
                command.parts -= 1
                if not command.parts:
                    completed(command)
                waiting -= 1
                if not waiting:
                    waiting = ring.final_check_for_responses()
        except PeerFault as fault:
            self.front.fail(fault)

    # --- closing ---------------------------------------------------------------------------------------------------

    def stop(self) -> list[Command]:
        """Close the port and listen no more; the commands that were out, each once."""
        self.events.close(self.port)
        inflight = dict.fromkeys(command for command in self.shadow if command is not None)
        self.shadow = [None] * self.ring.size
        return list(inflight)

    def release(self) -> None:
        """Take the ring back; pages that the backend still maps are never used again (XSA-396)."""
        domain = self.front.domain
        ended = [domain.grants.end_access(gref) for gref in self.grefs]
        if all(ended):
            domain.memory.release(self.pfn, self.pages)
