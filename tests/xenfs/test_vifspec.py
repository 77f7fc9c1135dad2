"""Goal: the grammar of xl-network-configuration(5) is read as xl reads it; the rest is refused by name.

Method: the manual's strings as tables; rates against a transcription of xlu_vif_parse_rate(); properties for order, for
what is normalised and for arbitrary text.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenfs.vifspec import MAX_SPEC_CHARS, VifError, VifSpec, generated_mac, next_devid, parse_rate, parse_vif

# Text, and what differs from VifSpec().
PARTICULAR: list[tuple[str, dict[str, Any]]] = [
    ("", {}),
    (" , ,,", {}),
    ("mac=00:16:3E:74:3d:76,model=rtl8139,bridge=xenbr0", {"mac": "00:16:3e:74:3d:76", "model": "rtl8139"}),
    ("mac=00:16:3E:74:34:32", {"mac": "00:16:3e:74:34:32"}),
    ("mac=0:16:3e:0:a:FF", {"mac": "00:16:3e:00:0a:ff"}),
    ("\nmac=00:16:3e:74:3d:76\n", {"mac": "00:16:3e:74:3d:76"}),
    ("mac=02-00-00-00-00-01", {"mac": "02:00:00:00:00:01"}),
    ("mac=00:00:00:00:00:00", {}),  # libxl's mark of an address that is to be drawn
    (" bridge=br0 ,\tmtu=9000 ", {"bridge": "br0", "mtu": 9000}),
    ("bridge=" + "b" * 15, {"bridge": "b" * 15}),
    ("type=vif,backend=0,script=vif-bridge", {}),
    ("backend=Domain-0,script=/etc/xen/scripts/vif-bridge", {}),
    ("backend=", {}),
    ("backend=00", {}),
    ("backend=net", {"backend": "net"}),
    ("backend=012,bridge=b", {"backend": "12", "bridge": "b"}),
    ("backend=٣", {"backend": "٣"}),  # not a digit that xl knows
    ("script=/usr/local/etc/xen/scripts/vif-bridge", {"script": "/usr/local/etc/xen/scripts/vif-bridge"}),
    ("model=,ip=", {}),
    ("mtu=68", {"mtu": 68}),
    ("mtu=65535", {"mtu": 65535}),
    ("devid=0", {"devid": 0}),
    ("devid=65535,queues=8", {"devid": 65535, "queues": 8}),
    ("queues=1", {}),
    ("trusted", {}),
    ("untrusted", {"trusted": False}),
    ("vifname=web-0.1_a", {"vifname": "web-0.1_a"}),
    ("vifname=" + "ü" * 7 + "1", {"vifname": "ü" * 7 + "1"}),  # the kernel counts bytes
    ("ip=10.0.0.5", {"ip": ("10.0.0.5/24",)}),
    ("ip=10.0.0.5/16", {"ip": ("10.0.0.5/16",)}),
    ("ip=2001:DB8:0:0::5", {"ip": ("2001:db8::5/64",)}),
    ("ip= 10.0.0.5/8  fe80::1/10\t192.0.2.1", {"ip": ("10.0.0.5/8", "fe80::1/10", "192.0.2.1/24")}),
    ("ip=10.0.0.0/31 10.0.0.3/32 2001:db8::/127", {"ip": ("10.0.0.0/31", "10.0.0.3/32", "2001:db8::/127")}),
    ("ip=2001:db8::ffff/112", {"ip": ("2001:db8::ffff/112",)}),  # IPv6 has no broadcast
    ("ip=10.0.0.5/024", {"ip": ("10.0.0.5/24",)}),
    ("rate=1MB/s@20ms", {"rate": (20000, 20000)}),
]

REFUSED = [
    ("brigde=b", "unknown parameter 'brigde'; did you mean bridge"),
    ("qqqqqqq=1", "unknown parameter 'qqqqqqq'$"),
    ("xenbr0", "unknown parameter 'xenbr0'"),
    ("MAC=00:16:3e:0:0:1", "'MAC' is no name of a parameter.*lower case.*did you mean mac"),
    ("bridge =b", "'bridge ' is no name of a parameter.*did you mean bridge"),
    ("bridge", "bridge needs a value"),
    ("trusted=1", "trusted takes no value: write trusted or untrusted"),
    ("trusted,untrusted", "trusted is given twice: 'trusted' and 'untrusted'"),
    ("bridge=a,bridge=a", "bridge is given twice"),
    ("bridge=", "bridge '': an interface's name is not empty"),
    ("bridge=" + "b" * 16, "bridge 'b+': an interface's name has at most 15 bytes, this one has 16"),
    ("vifname=a b", "vifname 'a b': an interface's name .* no blank"),
    ("vifname=a/b", "an interface's name .* '/'"),
    ("vifname=a:b", "an interface's name .* ':'"),
    ("vifname=vif%d", "an interface's name .* '%'"),
    ("vifname=.", "not a dot or two"),
    ("vifname=..", "not a dot or two"),
    ("vifname=" + "ü" * 8, "at most 15 bytes, this one has 16"),
    ("vifname=a\xa0b", "no blank"),
    ("vifname=a\x07b", "an interface's name"),
    ("vifname=", "an interface's name is not empty"),
    ("vifname=xenbr0", "is the name of the bridge"),
    ("mac=", "six groups of hexadecimal"),
    ("mac=00:16:3e:74:3d", "six groups"),
    ("mac=00:16:3e:74:3d:76:1", "six groups"),
    ("mac=00:16:3e:74:3d:100", "six groups"),
    ("mac=00:16-3e:74:3d:76", "six groups"),
    ("mac=00163e743d76", "six groups"),
    ("mac=01:00:5e:00:00:01", "is a group's: the first octet must be even"),
    ("mac=ff:ff:ff:ff:ff:ff", "is a group's"),
    ("mac=FE:FF:FF:FF:FF:FF", "belongs to the host's side of every vif"),
    ("type=ioemu", "type ioemu: no hardware is emulated"),
    ("type=netfront", "type 'netfront' is not one of vif, ioemu"),
    ("script=vif-route", "script 'vif-route' is not supported"),
    ("script=/tmp/my-vif-bridge", "script '/tmp/my-vif-bridge'"),
    ("script=", "script ''"),
    ("script=/\x01/vif-bridge", "printable ASCII"),
    ("script=/" + "x" * 300 + "/vif-bridge", "at most 255"),
    ("model=é", "model 'é' is not printable ASCII"),
    ("backend", "backend needs a value"),
    ("backend=net,backend=net", "backend is given twice"),
    ("backend=net,script=vif-route", "script 'vif-route' is not supported"),
    ("gatewaydev=eth0", "gatewaydev is for vif-route"),
    ("netdev=eth0", "netdev is an old name of gatewaydev"),
    ("accel=x", "accel is not supported, neither here nor by xl"),
    ("vlan=10", "vlan is not supported yet"),
    ("forwarddev=eth1", "COLO"),
    ("colo_sock_mirror_id=m", "'colo_sock_mirror_id': COLO replication"),
    ("mtu=67", "mtu '67' is not a number in 68..65535"),
    ("mtu=65536", "68..65535"),
    ("mtu=0", "68..65535"),
    ("mtu=", "68..65535"),
    ("mtu=1e3", "68..65535"),
    ("mtu=+1500", "68..65535"),
    ("mtu=" + "9" * 5000, "68..65535"),
    ("mtu=٣٠٠", "68..65535"),
    ("devid=-1", "devid '-1' is not a number in 0..65535"),
    ("devid=65536", "0..65535"),
    ("queues=0", "queues '0' is not a number in 1..8"),
    ("queues=9", "1..8"),
    ("ip=10.0.0.256", "is not an IPv4 or IPv6 address"),
    ("ip=10.0.0", "is not an IPv4 or IPv6 address"),
    ("ip=dhcp", "is not an IPv4 or IPv6 address"),
    ("ip=10.0.0.5/33", "the prefix must be in 1..32"),
    ("ip=10.0.0.5/0", "the prefix must be in 1..32"),
    ("ip=10.0.0.5/", "the prefix must be in"),
    ("ip=10.0.0.5/255.255.255.0", "the prefix must be in"),
    ("ip=2001:db8::1/129", "the prefix must be in 1..128"),
    ("ip=fe80::1%eth0", "has no zone"),
    ("ip=10.0.0.0/24", "is a network: write the guest's address in it"),
    ("ip=2001:db8::/64", "is a network"),
    ("ip=10.0.0.255", "is a broadcast address"),
    ("ip=255.255.255.255/32", "no interface can have that address"),
    ("ip=0.0.0.0/32", "no interface can have"),
    ("ip=127.0.0.1", "no interface can have"),
    ("ip=224.0.0.1", "no interface can have"),
    ("ip=ff02::1", "no interface can have"),
    ("ip=::1", "no interface can have"),
    ("ip=10.0.0.5 10.0.0.5/16", "ip 10.0.0.5 is given twice"),
    ("ip=" + " ".join(f"10.0.0.{n}" for n in range(1, 34)), "33 addresses, more than 32"),
    ("rate=", "rate '': write NUMBER"),
    ("rate=@20ms", "write NUMBER"),
    ("rate=10MB", "write NUMBER"),
    ("rate=10mB/s", "write NUMBER"),
    ("rate=10 MB/s", "write NUMBER"),
    ("rate=1.5MB/s", "write NUMBER"),
    ("rate=-1MB/s", "write NUMBER"),
    ("rate=10TB/s", "write NUMBER"),
    ("rate=10MB/s@", "after @ write NUMBER"),
    ("rate=10MB/s@20ns", "after @ write NUMBER"),
    ("rate=10MB/s@20ms@20ms", "after @ write NUMBER"),
    ("rate=0MB/s", "rate '0' is not in 1..4294967295"),
    ("rate=4294967296B/s", "is not in 1..4294967295"),
    ("rate=" + "9" * 5000 + "B/s", "is not in 1..4294967295"),
    ("rate=10MB/s@0ms", "rate's interval '0' is not in"),
    ("rate=10MB/s@4295s", "too large, or its interval too long"),
    ("rate=368935GB/s", "too large, or its interval too long"),
    ("rate=4294967295GB/s@4294967295us", "too large, or its interval too long"),
    ("rate=010MB/s", "a leading 0 for octal"),
    ("rate=10MB/s@020ms", "a leading 0 for octal"),
    ("rate=1b/s@1s", "less than one byte per interval"),
    ("rate=19B/s", "less than one byte per interval"),
    ("\ud800=1", "no name of a parameter"),
    ("x" * (MAX_SPEC_CHARS + 1), "longer than"),
]

RATES = [
    ("10Mb/s", 62_500, 50_000),
    ("250KB/s", 12_500, 50_000),
    ("1MB/s@20ms", 20_000, 20_000),
    ("1GB/s", 50_000_000, 50_000),
    ("1Gb/s", 6_250_000, 50_000),
    ("1000B/s", 50, 50_000),
    ("8000b/s", 50, 50_000),
    ("20B/s", 1, 50_000),
    ("10MB/s@20us", 200, 20),
    ("10MB/s@20m", 200_000, 20_000),
    ("10MB/s@20u", 200, 20),
    ("10MB/s@2s", 20_000_000, 2_000_000),
    ("10MB/s@2", 20_000_000, 2_000_000),  # the manual says microseconds, libxlu computes seconds
    ("10MB/s@4294s", 42_940_000_000, 4_294_000_000),
    ("368934GB/s", 18_446_700_000_000, 50_000),
]


@pytest.mark.parametrize(("text", "difference"), PARTICULAR)
def test_one_parameter_at_a_time(text: str, difference: dict[str, Any]) -> None:
    assert parse_vif(text) == VifSpec(**difference)


@pytest.mark.parametrize(("text", "says"), REFUSED)
def test_refused(text: str, says: str) -> None:
    with pytest.raises(VifError, match=says) as caught:
        parse_vif(text)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(("text", "count", "usecs"), RATES)
def test_rates(text: str, count: int, usecs: int) -> None:
    assert parse_rate(text) == (count, usecs)


def libxlu(rate: str) -> tuple[int, int] | None:
    """xlu_vif_parse_rate(), statement by statement, for numbers without a leading 0; None where it fails."""
    bytes_text, at, interval_text = rate.partition("@")
    if not re.fullmatch("[0-9]+[GMK]?[Bb]/s", bytes_text):
        return None
    digits = re.match("[0-9]*", bytes_text)
    assert digits is not None
    p = bytes_text[digits.end() :]
    tmp = int(digits[0])
    if tmp == 0 or tmp > 0xFFFFFFFF:
        return None
    if p[0] == "G":
        tmp *= 1000 * 1000 * 1000
    elif p[0] == "M":
        tmp *= 1000 * 1000
    elif p[0] == "K":
        tmp *= 1000
    if p[0] == "b" or p[1] == "b":
        tmp //= 8
    usecs = 50000
    if at:
        if not re.fullmatch("[0-9]+[mu]?s?", interval_text):
            return None
        digits = re.match("[0-9]*", interval_text)
        assert digits is not None
        usecs, p = int(digits[0]), interval_text[digits.end() :]
        if usecs == 0 or usecs > 0xFFFFFFFF:
            return None
        if p[:1] in ("s", ""):
            usecs *= 1000 * 1000
        elif p[0] == "m":
            usecs *= 1000
        if usecs > 0xFFFFFFFF:
            return None
    if tmp > 0xFFFFFFFFFFFFFFFF // usecs:
        return None
    return tmp * usecs // 1000000, usecs


NUMBERS = st.integers(0, 10000) | st.integers(0, 2**33)


@given(
    NUMBERS, st.sampled_from(["", "K", "M", "G", "T"]), st.sampled_from("Bb"), NUMBERS | st.none(),
    st.sampled_from(["", "s", "ms", "us", "m", "u", "ns"]),
)  # fmt: skip
def test_rates_are_libxlus(number: int, scale: str, unit: str, interval: int | None, interval_unit: str) -> None:
    """Goal: the pair that libxl would write.  Method: any rate; only what comes to no byte at all is refused beyond that."""
    text = f"{number}{scale}{unit}/s" + ("" if interval is None else f"@{interval}{interval_unit}")
    expected = libxlu(text)
    if expected is None or expected[0] == 0:
        with pytest.raises(VifError, match="rate"):
            parse_rate(text)
    else:
        assert parse_rate(text) == expected


@given(
    st.permutations(["mac=00:16:3e:0:0:1", "bridge=b", "ip=10.0.0.5", "untrusted", "rate=1MB/s", "queues=2", "vifname=v"])
)
def test_parameters_commute(parameters: list[str]) -> None:
    """Goal: parameters stand in any order.  Method: permutations."""
    assert parse_vif(",".join(parameters)) == VifSpec(
        mac="00:16:3e:00:00:01", bridge="b", ip=("10.0.0.5/24",), trusted=False, rate=(50000, 50000), queues=2, vifname="v"
    )


@given(st.ip_addresses(), st.none() | st.integers(1, 128))
def test_addresses(address: ipaddress.IPv4Address | ipaddress.IPv6Address, prefix: int | None) -> None:
    """Goal: an accepted address is one that an interface can have, and reading it again changes nothing.  Method: any."""
    text = f"ip={address.exploded}" + ("" if prefix is None else f"/{prefix}")
    try:
        spec = parse_vif(text)
    except VifError:
        return
    (found,) = spec.ip
    interface = ipaddress.ip_interface(found)
    assert interface.ip == address
    assert interface.network.prefixlen == (prefix or {4: 24, 6: 64}[address.version])
    assert not address.is_multicast and not address.is_unspecified
    assert parse_vif(f"ip={found}") == spec


def test_generated_macs() -> None:
    """Goal: unicast, in Xen's range, the same in every run, another for each guest and number.  Method: many."""
    uuid = "17e8ff97-f89e-404d-ad0a-eec3136a3f82"
    assert generated_mac(uuid, 0) == generated_mac(uuid.upper(), 0) == "00:16:3e:3b:2e:45"
    made = {generated_mac(uuid[:-2] + f"{guest:02x}", devid) for guest in range(16) for devid in range(8)}
    assert len(made) == 128
    assert all(re.fullmatch("00:16:3e:[0-7][0-9a-f](:[0-9a-f]{2}){2}", mac) for mac in made)
    assert all(parse_vif(f"mac={mac}").mac == mac for mac in made)


def test_resolved() -> None:
    """Goal: a given address stays, a missing one is made; the number is set.  Method: both."""
    assert parse_vif("mac=02:0:0:0:0:1").resolved("u", 3) == VifSpec(mac="02:00:00:00:00:01", devid=3)
    assert parse_vif("").resolved("u", 3) == VifSpec(mac=generated_mac("u", 3), devid=3)


@given(st.sets(st.integers(0, 12) | st.integers(0, 65535), max_size=12))
def test_next_devid(taken: set[int]) -> None:
    found = next_devid(taken)
    assert found not in taken
    assert set(range(found)) <= taken


WORDS = [
    "mac=", "00:16:3e:00:00:01", "bridge=", "br0", "ip=", "10.0.0.5", "/", "24", " ", ",", "=", "rate=", "1MB/s", "@",
    "20ms", "devid=", "mtu=", "9", "untrusted", "trusted", "vifname=", "queues=", "script=", "type=", "vif",
    "model=", "::1", "\n",
]  # fmt: skip


@given(st.text(st.characters(), max_size=60) | st.lists(st.sampled_from(WORDS), max_size=12).map("".join))
def test_arbitrary_text(text: str) -> None:
    """Goal: nothing but VifError escapes, and what is accepted can be served and written to the store.  Method: any text."""
    try:
        spec = parse_vif(text)
    except VifError:
        return
    assert re.fullmatch("|([0-9a-f]{2}:){5}[0-9a-f]{2}", spec.mac)
    names = (spec.bridge, "v" if spec.vifname is None else spec.vifname)
    assert all(1 <= len(name.encode()) <= 15 and name.isprintable() for name in names)
    assert 68 <= spec.mtu <= 65535 and 1 <= spec.queues <= 8
    assert (spec.type, spec.backend) == ("vif", "0")
    assert spec.devid is None or 0 <= spec.devid <= 65535
    texts = (spec.script, spec.model or "", *spec.ip)
    assert all(value.isascii() and value.isprintable() for value in texts)
