"""domain.py: what xenstored keeps of each domain: its limits, what it uses, what it was refused; domain.c of the daemon.

store.py owns the records; connection.py and peer.py count here. A record goes with its domain, so a domid that is used
again starts from nothing (XSA-272, XSA-483). The control domain has no limits.
Back-pressure: a request of an unprivileged domain is outstanding until its reply and every watch event it caused have
gone to their readers. Who has too many is not read from; that is how a domain pays for the queues it fills.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xenmodel.public.io.xs_wire import (
    XENSTORE_SERVER_FEATURE_DOMID_ANY,
    XENSTORE_SERVER_FEATURE_ERROR,
    XENSTORE_SERVER_FEATURE_RECONNECTION,
    XENSTORE_SERVER_FEATURE_WATCHDEPTH,
)
from xenmodel.public.xen import DOMID_FIRST_RESERVED
from xenmodel.types import Domid
from xenmodel.xenstore.credit import WriteCredit
from xenmodel.xenstore.errors import XsErrno, XsError
from xenmodel.xenstore.perms import CONTROL_DOMAIN, Perm, granted
from xenmodel.xenstore.quota import NO_LIMITS, Quota, Usage, exceeds

if TYPE_CHECKING:
    from xenmodel.xenstore.connection import Connection
    from xenmodel.xenstore.transaction import Tree

log = logging.getLogger("xenstored")
WARN_PAUSE_S = 30.0  # between two lines in the log about one domain's memory

# What a ring page says of the server, until SET_FEATURE takes something away.
FEATURES = (
    XENSTORE_SERVER_FEATURE_RECONNECTION
    | XENSTORE_SERVER_FEATURE_ERROR
    | XENSTORE_SERVER_FEATURE_WATCHDEPTH
    | XENSTORE_SERVER_FEATURE_DOMID_ANY
)


@dataclass(slots=True)
class Refusal:
    """How often one limit was in a domain's way, and what it said the last time."""

    times: int = 0
    last: str = ""


@dataclass(slots=True, eq=False)
class DomainRecord:
    """One domain, introduced or only named in a request so far."""

    domid: Domid
    connections: dict[Connection, None] = field(default_factory=dict)
    introduced: bool = False
    shutdown: bool = False  # @releaseDomain was told; RESUME takes it back
    features: int = FEATURES
    target: Domid | None = None
    quota: Quota | None = None  # its own limits; None: those of all
    watches: int = 0  # of all its connections, as are the next two
    transactions: int = 0
    memory: int = 0  # bytes of its watches, queued events and transactions; those of its nodes are the tree's to count
    events: int = 0  # queued
    unread: int = 0  # bytes of replies and events that wait for readers of its device files; the carrier's to count
    expiring: bool = False  # a timer looks after its events
    outstanding: int = 0  # requests
    relieved: Callable[[], None] | None = None  # called once when there are fewer
    credit: float = 0.0  # writes; below 0 it has to wait
    credit_at: float = 0.0  # when `credit` was right, seconds
    soft_warned: bool = False
    warned_at: float = -math.inf
    complained_at: float = -math.inf
    refused: dict[str, Refusal] = field(default_factory=dict)  # by the quota's name

    def refuse(self, quota: str, what: str) -> None:
        refusal = self.refused.setdefault(quota, Refusal())
        refusal.times += 1
        refusal.last = what


class Cause:
    """One request of an unprivileged domain, outstanding until done() was called for its reply and for each event."""

    __slots__ = ("record", "waiting")

    def __init__(self, record: DomainRecord) -> None:
        self.record = record
        self.waiting = 1
        record.outstanding += 1

    def done(self) -> None:
        self.waiting -= 1
        if not self.waiting:
            self.record.outstanding -= 1
            relieved, self.record.relieved = self.record.relieved, None
            if relieved is not None:
                relieved()


class Domains:
    """The records, and what follows from them and the tree."""

    def __init__(self, tree: Tree, quota: Quota, clock: Callable[[], float]) -> None:
        self.quota = quota  # of every domain without limits of its own
        self.credit = WriteCredit(clock)
        self.tree = tree
        self._records: dict[Domid, DomainRecord] = {}

    def record(self, domid: Domid) -> DomainRecord:
        """What is kept of a domain; begun when it is first asked for. EINVAL for a number that no domain can have."""
        record = self._records.get(domid)
        if record is None:
            if not 0 <= domid < DOMID_FIRST_RESERVED:
                raise XsError(XsErrno.EINVAL, f"{domid} is not the domid of a domain")
            record = self._records[domid] = DomainRecord(domid)
        return record

    def find(self, domid: Domid) -> DomainRecord | None:
        return self._records.get(domid)

    def all(self) -> list[DomainRecord]:
        return sorted(self._records.values(), key=lambda record: record.domid)

    def forget(self, record: DomainRecord) -> None:
        """The domain is gone."""
        for other in self._records.values():
            if other.target == record.domid:
                other.target = None
        if record.introduced:
            self.credit.close(record)
        self._records.pop(record.domid, None)

    def usage(self, domid: Domid) -> Usage:
        """What a domain holds now, all its connections together."""
        record = self._records.get(domid) or DomainRecord(domid)
        return Usage(
            nodes=len(self.tree.owned.get(domid, ())),
            watches=record.watches,
            transactions=record.transactions,
            connections=len(record.connections),
            outstanding=record.outstanding,
            memory=self.memory(record),
        )

    def memory(self, record: DomainRecord) -> int:
        """Bytes, by the daemon's way of counting."""
        return self.tree.memory.get(record.domid, 0) + record.memory + record.unread

    def limits(self, domid: Domid) -> Quota:
        if domid == CONTROL_DOMAIN:
            return NO_LIMITS
        record = self._records.get(domid)
        return (record.quota if record is not None else None) or self.quota

    def granted(self, perms: Sequence[Perm], domid: Domid) -> int:
        """MAY_READ, MAY_WRITE, OWNS: what a domain may by these permissions."""
        record = self._records.get(domid)
        return granted(perms, domid, None if record is None else record.target)

    def check_memory(self, domid: Domid, grown: int, what: str) -> None:
        """ENOMEM if `grown` more bytes are too many for a domain; a warning in the log if they are near to that."""
        limits = self.limits(domid)
        if not (limits.memory or limits.soft_memory) or domid >= DOMID_FIRST_RESERVED:  # DOMID_ANY may own nodes
            return
        record = self.record(domid)
        total = self.memory(record) + grown
        if exceeds(total, limits.memory):
            text = f"domain {domid} would use {total} bytes with {what}, more than {limits.memory}"
            record.refuse("memory", text)
            raise XsError(XsErrno.ENOMEM, text, "memory")
        now = self.credit.clock()
        if exceeds(total, limits.soft_memory) != record.soft_warned and now - record.warned_at >= WARN_PAUSE_S:
            record.soft_warned, record.warned_at = not record.soft_warned, now
            over = "exceeds" if record.soft_warned else "is below"
            log.warning("domain %d %s its soft memory quota of %d bytes", domid, over, limits.soft_memory)

    def charge(self, domid: Domid, nodes: int) -> None:
        """Take a credit for each node written or removed in a way that may make somebody's transaction fail."""
        record = self._records.get(domid)
        if domid != CONTROL_DOMAIN and record is not None and record.introduced:
            self.credit.debit(record, nodes)
