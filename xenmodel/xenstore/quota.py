"""quota.py: what one unprivileged domain may use up, the defaults of C xenstored (tools/xenstored/domain.c).

Counts are per domain, however many connections it has, and are derived from what exists rather than kept
beside it: a domid that is used again starts from nothing. The control domain has no quota.
Left out: the byte quota on a domain's memory (bounded by the counts here), write credits (there is no clock
here).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Quota:
    """Limits of one domain; 0 switches a limit off. What is beyond a limit answers ENOSPC (paths: EINVAL)."""

    nodes: int = 1000  # owned
    watches: int = 128
    transactions: int = 10  # open at the same time
    transaction_nodes: int = 1024  # read or written within one transaction
    node_permissions: int = 5
    node_size: int = 2048  # bytes of permissions, value and names of children
    path_max: int = 2048  # bytes, without the leading /local/domain/<domid>/
    outstanding: int = 20  # requests not yet answered; kept by whoever carries the messages


DEFAULT_QUOTA = Quota()


class Usage(NamedTuple):
    """What a domain uses at the moment."""

    nodes: int
    watches: int
    transactions: int
    connections: int


def exceeds(amount: int, limit: int) -> bool:
    return limit != 0 and amount > limit
