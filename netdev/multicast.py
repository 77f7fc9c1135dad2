"""multicast.py: the filter of netif.h's feature-multicast-control: which multicast frames a guest wants to receive.

Amended by netback when the guest sends XEN_NETIF_EXTRA_TYPE_MCAST_ADD or _DEL, asked for each frame on its way to the guest.
netif.h: the list may be amended at any time, but is applied only while the frontend's request-multicast-control is set.
As in xen-netback, an address that was added twice must be deleted twice, each addition counts, and broadcast frames pass
(PACKET_BROADCAST is not PACKET_MULTICAST).
"""

from __future__ import annotations

XEN_NETBK_MCAST_MAX = 64
ETH_ALEN = 6
BROADCAST = b"\xff" * ETH_ALEN


class MulticastFilter:
    """`enabled` is the sampled value of request-multicast-control; `addresses` says how often each was added."""

    __slots__ = ("addresses", "count", "enabled")

    def __init__(self, enabled: bool = False) -> None:
        self.enabled = enabled
        self.addresses: dict[bytes, int] = {}
        self.count = 0

    def add(self, address: bytes) -> bool:
        """False, and nothing happens, when the list is full: the guest's request is answered with an error."""
        assert len(address) == ETH_ALEN, f"{address!r} is no Ethernet address"
        if self.count >= XEN_NETBK_MCAST_MAX:
            return False
        self.addresses[address] = self.addresses.get(address, 0) + 1
        self.count += 1
        return True

    def delete(self, address: bytes) -> None:
        """Undo one add(); an address that is not listed is ignored."""
        times = self.addresses.get(address, 0)
        if not times:
            return
        self.count -= 1
        if times > 1:
            self.addresses[address] = times - 1
        else:
            del self.addresses[address]

    def clear(self) -> None:
        self.addresses.clear()
        self.count = 0

    def wants(self, destination: bytes | memoryview) -> bool:
        """Does a frame to this address (its first six bytes) reach the guest? Fewer bytes are no multicast address."""
        if not self.enabled or len(destination) < ETH_ALEN or not destination[0] & 1:
            return True
        address = bytes(destination)
        return address == BROADCAST or address in self.addresses
