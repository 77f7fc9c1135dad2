"""toeplitz.py: the receive-side-scaling hash of netif.h (xen_netif_toeplitz_hash), and what of a frame it is made of.

Netback hashes frames towards the guest so, once the guest chose key and types over the control ring, to pick a queue
and to fill in a HASH extra. The hash is linear: the value is the sum (xor) of one 32-bit window of the key per bit of
the data that is 1. For each position a table holds the sums of all 256 bytes, made when data first reaches that far.
"""

from __future__ import annotations

from netdev.headers import IPV4_HEADER, IPV6_HEADER, TCP, Octets, network, transport
from xenmodel.public.io.netif import (
    XEN_NETIF_CTRL_HASH_TYPE_IPV4,
    XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP,
    XEN_NETIF_CTRL_HASH_TYPE_IPV6,
    XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP,
)

U32 = 0xFFFFFFFF


class Toeplitz:
    """The hash with one key of any length, which continues with zeros."""

    __slots__ = ("_bits", "_key", "_tables")

    def __init__(self, key: bytes) -> None:
        # Windows at the key's last bytes reach over its end; positions behind it add nothing and have no table.
        self._key = int.from_bytes(key, "big") << 32
        self._bits = 8 * len(key)
        self._tables: list[list[int]] = []

    def hash(self, data: Octets) -> int:
        """32 bits. A few microseconds for the 36 bytes of TCP over IPv6."""
        tables = self._tables
        if len(data) > len(tables):
            self._extend(len(data))
        value = 0
        for table, byte in zip(tables, data, strict=False):
            value ^= table[byte]
        return value

    def _extend(self, positions: int) -> None:
        """Have tables for so many bytes of data, or for as many as the key has."""
        for position in range(len(self._tables), min(positions, self._bits // 8)):
            table = [0]
            for bit in range(7, -1, -1):  # the most significant bit comes first: bit 0 is 0x80
                window = self._key >> (self._bits - 8 * position - bit) & U32
                table += [window ^ value for value in table]
            self._tables.append(table)


def hash_input(head: Octets, types: int) -> tuple[int, bytes] | None:
    """(number of the hash type's bit, the bytes to hash) for a frame's beginning: with the ports if it is TCP and `types`
    (a mask of XEN_NETIF_CTRL_HASH_TYPE_*) has that, else of the addresses; None if no type in `types` applies."""
    found = network(head)
    if found is None:
        return None
    version, at = found
    if version == 4:
        with_ports, alone = XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP, XEN_NETIF_CTRL_HASH_TYPE_IPV4
        addresses = bytes(head[at + 12 : at + IPV4_HEADER])
    else:
        with_ports, alone = XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP, XEN_NETIF_CTRL_HASH_TYPE_IPV6
        addresses = bytes(head[at + 8 : at + IPV6_HEADER])
    if types & with_ports:
        place = transport(head)
        if place is not None and place.protocol == TCP:
            return with_ports.bit_length() - 1, addresses + bytes(head[place.start : place.start + 4])
    if types & alone:
        return alone.bit_length() - 1, addresses
    return None
