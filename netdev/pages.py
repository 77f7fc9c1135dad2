"""pages.py: frames that a frontend grants to its backend for as long as they are connected: a ring, or its buffers.

Called by netfront's queues and its control ring. Invariant: a frame goes back to the domain only after its grant has ended;
what the backend still has mapped is never used again (XSA-396).
"""

from __future__ import annotations

from xenmodel.domain import Domain
from xenmodel.memory import Frame, vmap
from xenmodel.types import Domid, Gref, OutOfResources, Pfn


class Pages:
    """`count` contiguous frames, granted to `peer`. `view` is all of them, and then the first `overlap` once more, so that
    what wraps around is one piece. OutOfResources, and nothing taken, if the domain has not so many."""

    def __init__(self, domain: Domain, peer: Domid, count: int = 1, *, readonly: bool = False, overlap: int = 0) -> None:
        self.domain = domain
        self.count = count
        self.pfn = domain.memory.allocate(count)
        self.grefs: list[Gref] = []
        try:
            for i in range(count):
                self.grefs.append(domain.grants.grant_access(peer, Pfn(self.pfn + i), readonly=readonly))
            domain.memory.populate(self.pfn, count)
            order = (*range(count), *range(overlap))
            self.view = vmap([Frame(domain.memory, self.pfn + i) for i in order])
        except OutOfResources:
            self.release()
            raise

    def release(self) -> bool:
        """End the grants and give the frames back. False: the backend holds on to some, and no frame is given back."""
        end_access = self.domain.grants.end_access
        self.grefs = [gref for gref in self.grefs if not end_access(gref)]
        if self.grefs:
            return False
        if self.count:
            self.domain.memory.release(self.pfn, self.count)
            self.count = 0
        return True
