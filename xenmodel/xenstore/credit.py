"""credit.py: the write rate limit of XSA-206, after wrl_*() of tools/xenstored/domain.c.

A domain that writes while somebody has a transaction open may make that transaction fail. That costs a credit for each node
written, and one for a commit beside other transactions; credit comes back at a rate that all domains share, and who has
less than none waits before its next request is served. So a domain that writes all the time cannot keep others from ever
committing. Writes that can disturb nobody are free.
The clock is an argument. Amounts are writes, as floats, where the daemon counts thousandths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

RATE = 200.0  # writes a second, all domains together
DOMAIN_BURST = 10.0  # a domain saves up so much
RESERVE_BURST = 1000.0  # what they leave is saved up here, for whoever is in debt
NEW_DOMAINS = 5  # so many new domains get their burst on credit


class Account(Protocol):
    """A domain's record."""

    credit: float  # writes; below 0 it has to wait
    credit_at: float  # when `credit` was right, seconds


class WriteCredit:
    """The reserve, and every domain's account (in its record)."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.reserve = 0.0
        self.domains = 0

    def open(self, record: Account) -> None:
        """A domain was introduced: it gets up to its burst from the reserve, which may go into debt for some."""
        self.domains += 1
        record.credit_at = self.clock()
        record.credit = max(0.0, min(self.reserve + DOMAIN_BURST * NEW_DOMAINS, DOMAIN_BURST))
        self.reserve -= record.credit

    def close(self, record: Account) -> None:
        self.domains -= 1
        self.reserve += max(0.0, min(record.credit, DOMAIN_BURST - self.reserve))

    def update(self, record: Account) -> None:
        """Pay in what has come since the last time; the surplus over the burst goes to the reserve."""
        now = self.clock()
        record.credit += max(0.0, now - record.credit_at) * RATE / max(1, self.domains)
        record.credit_at = now
        if record.credit < 0 < self.reserve:
            loan = min(self.reserve, -record.credit)
            record.credit += loan
            self.reserve -= loan
        surplus = record.credit - DOMAIN_BURST
        if surplus > 0:
            record.credit = DOMAIN_BURST
            self.reserve += max(0.0, min(surplus, RESERVE_BURST - self.reserve))

    def debit(self, record: Account, nodes: int = 1) -> None:
        """Nodes were written that somebody may have looked at; a commit counts as one."""
        self.update(record)
        record.credit -= nodes

    def wait_s(self, record: Account) -> float:
        """0 if the domain may go on now, or how long until it may."""
        self.update(record)
        if record.credit >= 0:
            return 0.0
        return -record.credit * max(1, self.domains) / RATE
