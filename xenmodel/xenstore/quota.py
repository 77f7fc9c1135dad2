"""quota.py: what one unprivileged domain may use up, the defaults of C xenstored (tools/xenstored/domain.c).

Counts are per domain, however many connections it has (domain.py). The control domain has no quota.
Names on the wire (CONTROL quota, GET_QUOTA, SET_QUOTA) are in NAMES; a soft limit only warns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple


@dataclass(frozen=True)
class Quota:
    """Limits of one domain; 0 switches one off. What is beyond a limit answers ENOSPC (paths: EINVAL, memory: ENOMEM)."""

    nodes: int = 1000  # owned
    watches: int = 128
    transactions: int = 10  # open at the same time
    outstanding: int = 20  # requests whose reply, or whose events, have not gone yet: the next one waits
    transaction_nodes: int = 1024  # read or written within one transaction
    memory: int = 2560 * 1024  # bytes of nodes, watches, events and transactions: beyond it requests wait, too
    node_permissions: int = 5
    path_max: int = 2048  # bytes, without the leading /local/domain/<domid>/
    node_size: int = 2048  # bytes of permissions, value and names of children
    soft_memory: int = 2048 * 1024


DEFAULT_QUOTA = Quota()
NO_LIMITS = Quota(**dict.fromkeys(vars(DEFAULT_QUOTA), 0))  # the control domain's

# Name on the wire -> field and what `xenstore-control quota` says of it, in the daemon's order.
NAMES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "nodes": ("nodes", "Nodes per domain"),
        "watches": ("watches", "Watches per domain"),
        "transactions": ("transactions", "Transactions per domain"),
        "outstanding": ("outstanding", "Outstanding requests per domain"),
        "transaction-nodes": ("transaction_nodes", "Max. number of accessed nodes per transaction"),
        "memory": ("memory", "Total Xenstore memory per domain (error level)"),
        "node-size": ("node_size", "Max. size of a node"),
        "path-max": ("path_max", "Max. length of a node path"),
        "permissions": ("node_permissions", "Max. number of permissions per node"),
    }
)
SOFT_NAMES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"memory": ("soft_memory", "Total Xenstore memory per domain (warning level)")}
)
ALIASES: Mapping[str, str] = MappingProxyType({"node-permissions": "permissions"})  # its name since Xen 4.18
SOFT_PREFIX = "soft-"  # of GET_QUOTA and SET_QUOTA


class Usage(NamedTuple):
    """What a domain uses at the moment."""

    nodes: int
    watches: int
    transactions: int
    connections: int
    outstanding: int = 0
    memory: int = 0


def field_of(name: str) -> str | None:
    """The field that GET_QUOTA and SET_QUOTA mean by a name, or None."""
    names = SOFT_NAMES if name.startswith(SOFT_PREFIX) else NAMES
    name = name.removeprefix(SOFT_PREFIX)
    found = names.get(ALIASES.get(name, name))
    return found[0] if found else None


def exceeds(amount: int, limit: int) -> bool:
    return limit != 0 and amount > limit
