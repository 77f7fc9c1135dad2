"""Goal: hashes are those of netif.h's xen_netif_toeplitz_hash, over what netif.h says is hashed.
Method: netif.h's own C function over keys and data of all lengths; the published RSS verification suite, as frames; and a
table of which type applies to which frame. Without a compiler or the headers the first fails; it never skips.
"""

from __future__ import annotations

from ipaddress import ip_address
from random import Random

import pytest

from netdev.toeplitz import Toeplitz, hash_input
from tests.abi.headers import run_c
from tests.netdev.test_headers import EXTENSIONS, OPTIONS, TAGS, TCP, UDP, Frame

V4, V4_TCP, V6, V6_TCP = 1, 2, 4, 8
ALL = V4 | V4_TCP | V6 | V6_TCP

# "Verifying the RSS Hash Calculation", Windows driver documentation; also in data sheets of NICs.
KEY = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")
SUITE = [
    ("161.142.100.80", 1766, "66.9.149.187", 2794, 0x323E8FC2, 0x51CCC178),
    ("65.69.140.83", 4739, "199.92.111.2", 14230, 0xD718262A, 0xC626B0EA),
    ("12.22.207.184", 38024, "24.19.198.95", 12898, 0xD2D0A5DE, 0x5C2B394A),
    ("209.142.163.6", 2217, "38.27.205.30", 48228, 0x82989176, 0xAFC7327F),
    ("202.188.127.2", 1303, "153.39.163.191", 44251, 0x5D1809C5, 0x10E828A2),
    ("3ffe:2501:200:3::1", 1766, "3ffe:2501:200:1fff::7", 2794, 0x2CC18CD5, 0x40207D3D),
    ("ff02::1", 4739, "3ffe:501:8::260:97ff:fe40:efab", 14230, 0x0F0C461C, 0xDDE51BBF),
    ("fe80::200:f8ff:fe21:67cf", 38024, "3ffe:1900:4545:3:200:f8ff:fe21:67cf", 44251, 0x4B61E985, 0x02D1FEEF),
]

KEY_SIZES = [0, 1, 3, 4, 5, 7, 8, 9, 36, 39, 40, 41, 64]
DATA_SIZES = [0, 1, 4, 5, 8, 12, 32, 36, 40, 41, 70]


def test_as_the_c_function():
    random = Random(1)
    cases = [(random.randbytes(key), random.randbytes(data)) for key in KEY_SIZES for data in DATA_SIZES]
    body = []
    for n, (key, data) in enumerate(cases):
        arrays = [",".join(map(str, octets)) or "0" for octets in (key, data)]
        body.append(f"{{ static const uint8_t key[] = {{{arrays[0]}}}, data[] = {{{arrays[1]}}};")
        body.append(f'printf("{n}\\t%u\\n", xen_netif_toeplitz_hash(key, {len(key)}, data, {len(data)})); }}')
    said = run_c("xen/io/netif.h", body, prologue="#define XEN_NETIF_DEFINE_TOEPLITZ 1")
    theirs = [int(said[str(n)]) for n in range(len(cases))]
    assert [Toeplitz(key).hash(data) for key, data in cases] == theirs
    assert len(set(theirs)) > len(cases) // 2, "the cases do not tell anything apart"


def test_one_object_for_any_order_of_sizes():
    """Goal: tables made for short data serve long data and the reverse.  Method: one object against a new one each time."""
    one, data = Toeplitz(KEY), Random(2).randbytes(70)
    for size in (12, 36, 0, 70, 8, 41, 36):
        assert one.hash(memoryview(data)[:size]) == Toeplitz(KEY).hash(data[:size])


@pytest.mark.parametrize("row", SUITE, ids=[row[2] for row in SUITE])
@pytest.mark.parametrize("kind", [bytes, memoryview])
def test_verification_suite(row: tuple[str, int, str, int, int, int], kind: type):
    target, target_port, source, source_port, alone, with_ports = row
    frame = Frame(ip_address(source).version, source=source, target=target, ports=(source_port, target_port))
    hasher = Toeplitz(KEY)
    for types, expected in ((ALL, with_ports), (V4 | V6, alone)):
        found = hash_input(kind(frame.packed), types)
        assert found is not None
        assert hasher.hash(found[1]) == expected


WHICH = [
    (Frame(4, TCP), {V4: 0, V4_TCP: 1, V4 | V4_TCP: 1, V6 | V6_TCP: None, ALL: 1, 0: None}),
    (Frame(4, UDP), {V4: 0, V4_TCP: None, V4 | V4_TCP: 0, ALL: 0}),
    (Frame(4, 1, bytes(40)), {V4: 0, V4_TCP: None, ALL: 0}),
    (Frame(4, TCP, bytes(40), fragment=0x2000), {V4: 0, V4_TCP: None, ALL: 0}),
    (Frame(6, TCP), {V6: 2, V6_TCP: 3, V6 | V6_TCP: 3, V4 | V4_TCP: None, ALL: 3, 0: None}),
    (Frame(6, UDP), {V6: 2, V6_TCP: None, V6 | V6_TCP: 2, ALL: 2}),
    (Frame(6, TCP, extensions=EXTENSIONS[-1]), {V6: 2, ALL: 3}),
    (Frame(6, TCP, bytes(40), extensions=((44, bytes(7)),)), {V6_TCP: None, ALL: 2}),
]


@pytest.mark.parametrize(("frame", "answers"), WHICH)
def test_which_type(frame: Frame, answers: dict[int, int | None]):
    ports = b"\x04\x01\x00\x50"
    for types, number in answers.items():
        expected = None if number is None else (number, frame.addresses + ports * (number in (1, 3)))
        assert hash_input(frame.packed, types) == expected, types


def test_where_the_headers_are():
    """Goal: tags and options do not shift what is hashed.  Method: all of them, one expectation."""
    for tags in TAGS:
        for options in OPTIONS:
            frame = Frame(4, TCP, tags=tags, options=options)
            assert hash_input(frame.packed, ALL) == (1, frame.addresses + b"\x04\x01\x00\x50")


def test_not_ip():
    for head in (b"", bytes(13), bytes(60), Frame().packed[:33], Frame(6).packed[:53]):
        assert hash_input(head, ALL) is None
    cut = Frame().packed[:50]
    assert hash_input(cut, ALL) == (0, Frame().addresses), "the TCP header is cut short, the addresses are there"
