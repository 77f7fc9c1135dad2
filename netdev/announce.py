"""announce.py: the two frames which tell a network where an address now lives: gratuitous ARP, unsolicited NA.

Netfront sends them once it is connected (Linux: the NETDEV_NOTIFY_PEERS event), so that switches and neighbours learn
the new port without waiting for a frame of the guest's own.
Left out: the router flag, and who owns which address, which the caller knows.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from struct import Struct

from netdev.checksum import MODULUS, WORD, ones_sum
from netdev.headers import ETH_P_IPV6, ETHERNET

ETH_P_ARP = 0x0806
MAC_SIZE = 6
BROADCAST = b"\xff" * MAC_SIZE
ALL_NODES = IPv6Address("ff02::1")
ALL_NODES_MAC = b"\x33\x33" + ALL_NODES.packed[-4:]  # RFC 2464, section 7

_ETHERNET = Struct(">6s6sH")  # to, from, protocol
_ARP = Struct(">HHBBH6s4s6s4s")  # hardware, protocol, their address sizes, operation, sender, target
_IPV6 = Struct(">IHBB16s16s")  # version and flow, payload length, next header, hop limit, from, to
_ADVERT = Struct(">BBHI16sBB6s")  # type, code, checksum, flags, target; option: type, units of 8 bytes, MAC

_ARP_REQUEST = 1
_ICMPV6 = 58
_NEIGHBOR_ADVERTISEMENT = 136
_OVERRIDE = 1 << 29  # neither router nor solicited, and better than what you knew
_TARGET_MAC = 2


def gratuitous_arp(mac: bytes, address: IPv4Address) -> bytes:
    """An ARP announcement (RFC 5227, section 3): a broadcast request for our own address. 42 bytes, not padded."""
    _check(mac)
    packed = address.packed
    return _ETHERNET.pack(BROADCAST, mac, ETH_P_ARP) + _ARP.pack(
        1, 0x0800, MAC_SIZE, 4, _ARP_REQUEST, mac, packed, bytes(MAC_SIZE), packed
    )


def unsolicited_na(mac: bytes, address: IPv6Address) -> bytes:
    """An unsolicited neighbour advertisement (RFC 4861, section 7.2.6) to all nodes of the link. 86 bytes."""
    _check(mac)
    size = _ADVERT.size
    advert = bytearray(_ADVERT.pack(_NEIGHBOR_ADVERTISEMENT, 0, 0, _OVERRIDE, address.packed, _TARGET_MAC, 1, mac))
    covered = address.packed + ALL_NODES.packed + size.to_bytes(4, "big") + _ICMPV6.to_bytes(4, "big") + advert
    WORD.pack_into(advert, 2, MODULUS - ones_sum(covered))
    # RFC 4861, section 7.1.2: a hop limit of 255 proves that no router has passed it on.
    header = _ETHERNET.pack(ALL_NODES_MAC, mac, ETH_P_IPV6) + _IPV6.pack(
        6 << 28, size, _ICMPV6, 255, address.packed, ALL_NODES.packed
    )
    assert len(header) == ETHERNET + 40, len(header)
    return header + bytes(advert)


def _check(mac: bytes) -> None:
    if len(mac) != MAC_SIZE:
        raise ValueError(f"a MAC address has {MAC_SIZE} bytes, not {len(mac)}")
