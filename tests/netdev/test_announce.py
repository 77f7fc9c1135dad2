"""Goal: the two announcements are byte for byte what Linux sends, and carry a right checksum.
Method: frames written out by hand from RFC 826/5227 and RFC 4861; the ICMPv6 sum by the naive algorithm of RFC 1071; and
Linux in a network namespace, which must change its neighbour tables.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netdev.announce import gratuitous_arp, unsolicited_na
from tests.netdev.test_checksum import linux_receives
from tests.netdev.test_headers import rfc1071

MAC = bytes.fromhex("00163e5a1b2c")


def test_gratuitous_arp():
    by_hand = """
        ff ff ff ff ff ff   00 16 3e 5a 1b 2c   08 06
        00 01  08 00  06 04  00 01
        00 16 3e 5a 1b 2c   c0 a8 07 21
        00 00 00 00 00 00   c0 a8 07 21
    """
    assert gratuitous_arp(MAC, IPv4Address("192.168.7.33")) == bytes.fromhex(by_hand)


def test_unsolicited_na():
    by_hand = """
        33 33 00 00 00 01   00 16 3e 5a 1b 2c   86 dd
        60 00 00 00  00 20  3a  ff
        fe 80 00 00 00 00 00 00  02 16 3e ff fe 5a 1b 2c
        ff 02 00 00 00 00 00 00  00 00 00 00 00 00 00 01
        88 00  4a c9  20 00 00 00
        fe 80 00 00 00 00 00 00  02 16 3e ff fe 5a 1b 2c
        02 01  00 16 3e 5a 1b 2c
    """
    assert unsolicited_na(MAC, IPv6Address("fe80::216:3eff:fe5a:1b2c")).hex(" ") == bytes.fromhex(by_hand).hex(" ")


@given(st.binary(min_size=6, max_size=6), st.ip_addresses(v=6))
def test_checksum_of_any_na(mac: bytes, address: IPv6Address):
    frame = unsolicited_na(mac, address)
    pseudo_header = frame[22:54] + bytes((0, 0, 0, 32, 0, 0, 0, 58))
    assert rfc1071(pseudo_header + frame[54:]) == 0xFFFF


@pytest.mark.parametrize("mac", [b"", MAC[:5], MAC + b"\0"])
def test_no_mac(mac: bytes):
    with pytest.raises(ValueError, match=f"6 bytes, not {len(mac)}"):
        gratuitous_arp(mac, IPv4Address("10.0.0.1"))
    with pytest.raises(ValueError, match=f"6 bytes, not {len(mac)}"):
        unsolicited_na(mac, IPv6Address("fe80::1"))


@pytest.mark.host
def test_linux_learns():
    """Goal: neighbours that know an old MAC take the new one.  Method: stale entries first, then our two frames."""
    old = "lladdr 02:99:99:99:99:99 dev judge nud stale"
    frames = [gratuitous_arp(MAC, IPv4Address("10.0.0.9")), unsolicited_na(MAC, IPv6Address("fd00::9"))]
    said = linux_receives(frames, [f"neigh add 10.0.0.9 {old}", f"neigh add fd00::9 {old}"])
    assert said["10.0.0.9"] == said["fd00::9"] == MAC.hex(":")
