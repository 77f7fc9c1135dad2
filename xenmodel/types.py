"""types.py: the four numbers of Xen that must never be swapped, and who is to blame when something goes wrong.

NewTypes cost nothing at run time; mypy keeps a port from being used as a grant reference.
"""

from __future__ import annotations

from typing import NewType

Domid = NewType("Domid", int)
Port = NewType("Port", int)
Gref = NewType("Gref", int)
Pfn = NewType("Pfn", int)

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT  # ring.h: protocol pages are 4096 bytes whatever the host's page size


class OutOfResources(Exception):
    """A domain has run out of something of its own (frames, grant references): what wanted it fails, nothing else."""


class PeerFault(Exception):
    """The other end broke the protocol: its device is closed with this text in its `error` node, nobody else's."""
