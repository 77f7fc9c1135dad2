"""ledger.py: inspect/evtchn and inspect/grants: who has bound which port, who holds whose frames, and since when.

What lsevtchn and Xen's debug keys e and g show, with what they cannot know: counts, owners and ages. host.py makes the
files; evtchn() is also what dev/xen/evtchn says to `cat`. `bound-by` and `by` are a program, or the domain's kernel and then
the device of whose driver it is, if that has a handler there.

A domain may have 32768 grants, and who reads about them must not keep others waiting: lines are made when they are read, at
most PIECE_LINES for one READ, as procfs does it. So a long table is not of one moment, but each of its lines is.
No cell has blanks but the last of a line, and an empty one is "-", for awk(1) and its like.
Left out: reading at a place that was not read up to yet (EINVAL); lseek(2) back is fine.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from itertools import islice

from xenfs.fuse.kernel import FOPEN_DIRECT_IO
from xenfs.fuse.session import Session
from xenfs.fuse.tree import Node, Opened, refuse
from xenmodel.domain import Domain
from xenmodel.event_channel import Handler, State
from xenmodel.grant_table import ENTRIES_PER_FRAME, RESERVED_REFS, GrantTable, Mapping
from xenmodel.public.grant_table import GTF_reading, GTF_readonly, GTF_writing
from xenmodel.xenbus import XenbusDevice

PIECE_LINES = 512  # per READ: one to two milliseconds
MOST_SHARERS = 1024  # further mappings of entries that have one, by name; the rest is counted
MOST_PORTS = 256  # in the text of dev/xen/evtchn, which any program in the guest may ask for as often as it likes

Lines = Iterator[str]


class Ledger(Node):
    """A text file whose lines `say()` makes one by one. Like a file of procfs it has no size."""

    def __init__(self, say: Callable[[], Lines]) -> None:
        self.say = say

    def open(self, flags: int) -> Opened:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise refuse(errno.EACCES)
        return Opened(_Reading(self.say()), FOPEN_DIRECT_IO)


class _Reading(Node):
    """One open file: the lines to come, and what was read already, for whoever goes back."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self.text = bytearray()
        self.ended = False

    def read(self, session: Session, unique: int, offset: int, size: int, flags: int) -> None:
        """Shorter than asked for where a piece ends; 0 bytes only at the end."""
        if not self.ended and offset + size > len(self.text):
            piece = list(islice(self.lines, PIECE_LINES))
            self.ended = len(piece) < PIECE_LINES
            self.text += "".join(piece).encode(errors="replace")
        if offset > len(self.text) and not self.ended:
            raise refuse(errno.EINVAL)
        session.send_data(unique, [bytes(self.text[offset : offset + size])])


# --- event channels ---------------------------------------------------------------------------------------------------

_PORT = "{:<4}  {:<11}  {:<10}  {:<7}  {:<6}  {:<8}  {:<9}  {}\n".format


def evtchn(domain: Domain) -> str:
    """The table as one text, no longer than MOST_PORTS lines and one that says how many are left out."""
    lines = evtchn_lines(domain)
    text = "".join(islice(lines, 1 + MOST_PORTS))
    left = len(domain.events.channels) - MOST_PORTS
    return text + (f"... and {left} ports more\n" if left > 0 else "")


def evtchn_lines(domain: Domain) -> Lines:
    """Every port: its state, what it is joined to, the bits in shared_info, events sent and delivered, and whose it is."""
    yield _PORT("port", "state", "remote", "pending", "masked", "sent", "delivered", "bound-by")
    events, store = domain.events, _store_ports(domain)
    for port in sorted(events.channels):
        channel = events.channels.get(port)
        if channel is None:  # closed since
            continue
        state = channel.state
        if state is State.INTERDOMAIN:
            remote = f"{channel.remote_domid}:{channel.remote_port}"
        elif state is State.UNBOUND:
            remote = f"{channel.remote_domid}:-"
        else:
            remote = f"virq:{channel.virq}" if state is State.VIRQ else "-"
        pending, masked = int(events.is_pending(port)), int(events.is_masked(port))
        owner = channel.owner or store.get(port) or _driver(channel.handler)
        yield _PORT(port, state.name.lower(), remote, pending, masked, channel.sent, channel.notified, owner)


def _driver(handler: Handler | None) -> str:
    """The kernel, and its device .../device/vbd/51712 or .../backend/vbd/1/51712 if this is the interrupt handler of one: a
    method of the device, or of a part that knows it as `front` or `back`, or at least how to make it `fail`."""
    part = getattr(handler, "__self__", None)
    fail = getattr(part, "fail", None)
    for whole in (part, getattr(part, "front", None), getattr(part, "back", None), getattr(fail, "__self__", None)):
        if isinstance(whole, XenbusDevice):
            return f"kernel: {whole.node.split('/', 5)[5]}"
    return "kernel"


def _store_ports(domain: Domain) -> dict[int, str]:
    """The ports of the xenstore rings: in domain 0 xenstored's, in every domain that of its own ring."""
    daemon, domains = domain.hypervisor.xenstored, domain.hypervisor.domains
    if domain.domid == 0:
        ports = {int(ring.port): f"xenstored: domain {domid}" for domid, ring in daemon.rings.items()}
        return ports | {daemon.own_port: "kernel: xenstore"}
    ring, dom0 = daemon.rings.get(domain.domid), domains.get(0)
    ours = dom0.events.channels.get(ring.port) if ring is not None and dom0 is not None else None
    return {} if ours is None else {ours.remote_port: "kernel: xenstore"}


# --- grants -----------------------------------------------------------------------------------------------------------

_GRANT = "{:<5}  {:<5}  {:<10}  {:<18}  {:<10}  {:<9}  {}\n".format
_MAPPED = "{:<6}  {:<5}  {:<5}  {:<6}  {:<9}  {}\n".format


def grants(domain: Domain) -> str:
    """The whole ledger at once."""
    return "".join(grants_lines(domain))


def grants_lines(domain: Domain) -> Lines:
    """What the domain grants, a line per entry, or per mapping of one that has several; then what it has mapped itself."""
    table, now = domain.grants, domain.hypervisor.store.clock()
    total = table.max_frames * ENTRIES_PER_FRAME
    reserved = sum(entry.ref < RESERVED_REFS for entry in islice(table.entries(), RESERVED_REFS))
    used = max(0, total - RESERVED_REFS - table.available) + reserved
    yield f"{used} of {total} references, {table.frames} of {table.max_frames} frames\n"
    yield _GRANT("ref", "owner", "granted-to", "flags", "pfn", "since", "mapped-by")
    first, others = _mappings_of(domain)
    for ref, to, pfn, pins, flags in _entries(table, first):
        held = [first[ref], *others.get(ref, ())] if ref in first else []
        for mapping in held:
            yield _GRANT(ref, domain.domid, to, flags, pfn, _age(now, mapping), f"{to}:{mapping.owner or 'kernel'}")
        if pins > len(held):
            yield _GRANT(ref, domain.domid, to, flags, pfn, "-", f"{to}: {pins - len(held)} times more")
        elif not held:
            yield _GRANT(ref, domain.domid, to, flags, pfn, "-", "-")
    yield from _mapped_lines(domain, now)


def _entries(table: GrantTable, mapped: dict[int, Mapping]) -> Iterator[tuple[int, int, str, int, str]]:
    """ref, granted to, pfn, how often in use, flags: of the entries as the guest's memory has them, and last of those in
    use that it has cleared, as Xen's own record has them."""
    shown = set()
    for entry in table.entries():
        flags = "r" if entry.flags & GTF_readonly else "rw"
        flags += ",reading" if entry.flags & GTF_reading else ""
        flags += ",writing" if entry.flags & GTF_writing else ""
        shown.add(entry.ref)
        yield entry.ref, entry.domid, f"{entry.pfn:#x}", entry.pins, flags
    for ref in sorted(mapped.keys() - shown):
        if active := table.active.get(ref):
            yield ref, active.domid, f"{active.pfn:#x}", active.readers + active.writers, "cleared"


def _mappings_of(domain: Domain) -> tuple[dict[int, Mapping], dict[int, list[Mapping]]]:
    """By reference, who has it mapped: one mapping of each, and others, which are a few. All are the same domain's."""
    table = domain.grants
    first: dict[int, Mapping] = {}
    found = [o.maptrack.mappings for o in domain.hypervisor.domains.values() if table.active and o.maptrack.mappings]
    for mappings in found:  # thousands: nothing here but what is quick
        first |= {mapping.ref: mapping for mapping in mappings.values() if mapping.table is table}
    others: dict[int, list[Mapping]] = {}
    if sum(active.readers + active.writers for active in table.active.values()) > len(first):
        rest = (m for mappings in found for m in mappings.values() if m.table is table and first[m.ref] is not m)
        for mapping in islice(rest, MOST_SHARERS):
            others.setdefault(mapping.ref, []).append(mapping)
    return first, others


def _mapped_lines(domain: Domain, now: float) -> Lines:
    """Handles, not mappings, are kept while nobody reads on: a mapping keeps the memory of a domain that is gone."""
    mappings = domain.maptrack.mappings
    handles = list(mappings)
    if handles:
        yield f"\n{len(handles)} mapped from other domains\n"
        yield _MAPPED("handle", "owner", "ref", "access", "since", "by")
    for handle in handles:
        if mapping := mappings.get(handle):
            access, by = "r" if mapping.readonly else "rw", mapping.owner or "kernel"
            yield _MAPPED(handle, mapping.domid, mapping.ref, access, _age(now, mapping), by)


def _age(now: float, mapping: Mapping) -> str:
    return f"{max(0.0, now - mapping.since):.1f}s"
