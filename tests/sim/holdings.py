"""holdings.py: what a domain maps and binds beyond what it did at some earlier moment.

Used by the worlds of tests/blockdev and tests/netdev for domain 0, where xenstored holds a page and a port of every guest
(and a pair of ports for domain 0 itself) before there is a device. Records are compared, not handles and ports, which are
used again: whoever unmaps or closes what belongs to another is noticed, also if something else has taken the number since.
Left out: the other things that a domain holds, see Footprint of xenmodel/testing.py.
"""

from __future__ import annotations

from xenmodel.domain import Domain
from xenmodel.grant_table import Mapping


class HeldSince:
    """Made at that moment. Asked later, it insists that all of then is still there."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self._mappings = dict(domain.maptrack.mappings)
        self._channels = dict(domain.events.channels)

    def mappings(self) -> list[Mapping]:
        now = self.domain.maptrack.mappings
        lost = [handle for handle, mapping in self._mappings.items() if now.get(handle) is not mapping]
        assert not lost, f"mappings {lost} were others' and are gone"
        return [mapping for handle, mapping in now.items() if handle not in self._mappings]

    def ports(self) -> list[int]:
        now = self.domain.events.channels
        lost = [port for port, channel in self._channels.items() if now.get(port) is not channel]
        assert not lost, f"ports {lost} were others' and are gone"
        return [port for port in now if port not in self._channels]
