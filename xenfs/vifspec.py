"""vifspec.py: one entry of `vif = [ ... ]`, in the grammar of xl-network-configuration(5).

Called by the configuration parser and by whatever attaches an interface to a running guest. The authorities are
parse_nic_config() of xl and xlu_vif_parse_rate() of libxlu: parameters split at commas, names in lower case, no positions,
empty parameters skipped. Where xl takes the last of two and passes over what it does not know, both are errors here: a
misspelt `bridge` would otherwise put a guest on the wrong network. A thing that Xen has and this project does not serve
is a VifError that says so. `model` is accepted and changes nothing, as for every para-virtual guest of xl.

One parameter is ours, not Xen's:
    queues=1..8                   pairs of rings, and queues of the TAP

`ip` lists the guest's addresses, separated by blanks as Xen's scripts have it, each with its prefix. A missing prefix is
/24 for IPv4 and /64 for IPv6: for the scripts it would be a host, and a guest so configured has no neighbours.
Left out: the mtu of the bridge, which Xen's script gives an interface that has none of its own: the script knows it.
"""

from __future__ import annotations

import difflib
import hashlib
import ipaddress
import re
from dataclasses import dataclass, replace

from netdev.link import DEFAULT_MTU, LEAST_MTU, MOST_MTU, MOST_QUEUES, check_name
from xenfs.xlcfg import domain

MAX_SPEC_CHARS = 8192
MAX_ADDRESSES = 32
MAX_DEVID = 65535  # "vif65535.65535" still is a name
RATE_INTERVAL_USEC = 50_000  # libxlu's default
SCRIPT = "/etc/xen/scripts/vif-bridge"
BACKEND_MAC = "fe:ff:ff:ff:ff:ff"  # the host's side of every vif: no station has it, and no bridge takes it for its own
DEFAULT_PREFIX = {4: 24, 6: 64}

_BLANK = " \t\n"
_EVERYBODY = ipaddress.IPv4Address("255.255.255.255")
_UINT32_MAX, _UINT64_MAX = 2**32 - 1, 2**64 - 1
_SERVED = ("backend", "bridge", "devid", "ip", "mac", "model", "mtu", "queues", "rate", "script", "type", "vifname")
_REFUSED = {
    "gatewaydev": "gatewaydev is for vif-route, which is not supported: guests are bridged, with bridge=",
    "netdev": "netdev is an old name of gatewaydev, which is not supported: guests are bridged, with bridge=",
    "accel": "accel is not supported, neither here nor by xl: leave it out",
    "vlan": "vlan is not supported yet: give the bridge of that VLAN as bridge=",
    "forwarddev": "forwarddev: COLO replication is not supported",
}
_FLAGS = {"trusted": True, "untrusted": False}
_PARAMETER_NAME = re.compile(r"[a-z][-_a-z0-9]*")
_MAC = re.compile(r"[0-9a-fA-F]{1,2}(?:([:-])[0-9a-fA-F]{1,2})(?:\1[0-9a-fA-F]{1,2}){4}")
_DECIMAL = re.compile(r"[0-9]{1,10}")
_RATE = re.compile(r"([0-9]+)([GMK]?)([Bb])/s")
_INTERVAL = re.compile(r"([0-9]+)([mu]?)s?")
_SCALE = {"G": 10**9, "M": 10**6, "K": 10**3, "": 1}
_USEC = {"": 10**6, "m": 10**3, "u": 1}


class VifError(ValueError):
    """A vif specification that cannot be understood or cannot be served; the text names the parameter."""


@dataclass(frozen=True)
class VifSpec:
    """One interface. `mac` is in lower case, "" and a `devid` of None until resolved(). `ip` are the guest's addresses with
    prefix; `rate` is (bytes, microseconds) of what the guest may send, or None; `backend` is "0", or the domid or name of
    the guest that serves the interface, on its `bridge`."""

    mac: str = ""
    bridge: str = "xenbr0"
    ip: tuple[str, ...] = ()
    mtu: int = DEFAULT_MTU
    rate: tuple[int, int] | None = None
    vifname: str | None = None
    devid: int | None = None
    type: str = "vif"
    trusted: bool = True
    queues: int = 1
    script: str = SCRIPT
    backend: str = "0"
    model: str | None = None

    def resolved(self, uuid: str, devid: int) -> VifSpec:
        """As this guest's interface `devid`: with that number, and with an address if none was given."""
        return replace(self, devid=devid, mac=self.mac or generated_mac(uuid, devid))


def parse_vif(text: str) -> VifSpec:
    """Parse one vifspec of xl-network-configuration(5); "" is legal. Raises VifError and nothing else."""
    if len(text) > MAX_SPEC_CHARS:
        raise VifError(f"vif specification of {len(text)} characters is longer than {MAX_SPEC_CHARS}")
    given = _split(text)
    _refuse_unserved(given)
    return _meaning(given)


def generated_mac(uuid: str, devid: int) -> str:
    """An address in Xen's range, the same in every run, where libxl draws one. Like libxl's it has 23 bits of its own, so
    two guests seldom but possibly get the same."""
    digest = hashlib.sha256(f"{uuid.lower()} vif {devid}".encode()).digest()
    return f"00:16:3e:{digest[0] & 0x7F:02x}:{digest[1]:02x}:{digest[2]:02x}"


def next_devid(taken: set[int]) -> int:
    """The lowest free number."""
    return next(devid for devid in range(len(taken) + 1) if devid not in taken)


# ---- the grammar: text -> {key: value}, both as written ----


def _split(text: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for parameter in text.split(","):
        parameter = parameter.strip(_BLANK)
        key, equals, value = parameter.partition("=")
        if parameter in _FLAGS:
            key, value = "trusted", parameter
        elif not parameter:
            continue
        elif not equals or key not in _SERVED:
            raise VifError(_stranger(key, equals))
        if key in given:
            raise VifError(f"{key} is given twice: {_shown(given[key])} and {_shown(value)}")
        given[key] = value
    return given


def _stranger(key: str, equals: str) -> str:
    """What to say of a parameter that is not served."""
    if key in _FLAGS:
        return f"{key} takes no value: write {' or '.join(_FLAGS)}"
    if key in _SERVED:
        return f"{key} needs a value: {key}=..."
    if key in _REFUSED:
        return _REFUSED[key]
    if key.startswith("colo_"):
        return f"{_shown(key)}: COLO replication is not supported"
    near = difflib.get_close_matches(key[:40].lower(), (*_SERVED, *_FLAGS), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    if equals and not _PARAMETER_NAME.fullmatch(key):
        return f"{_shown(key)} is no name of a parameter: they are in lower case, without blanks{hint}"
    return f"unknown parameter {_shown(key)}{hint}"


# ---- what is understood but not served ----


def _refuse_unserved(given: dict[str, str]) -> None:
    kind, script = given.get("type", "vif"), given.get("script", SCRIPT)
    if kind == "ioemu":
        raise VifError("type ioemu: no hardware is emulated, nor for any PV guest of Xen; write type=vif or leave it out")
    if kind != "vif":
        raise VifError(f"type {_shown(kind)} is not one of vif, ioemu")
    if script.rpartition("/")[2] != "vif-bridge":
        raise VifError(f"script {_shown(script)} is not supported: only what vif-bridge does is done; leave it out")


# ---- what the values mean ----


def _meaning(given: dict[str, str]) -> VifSpec:
    bridge, vifname = given.get("bridge", "xenbr0"), given.get("vifname")
    _check_interface("bridge", bridge)
    if vifname is not None:
        _check_interface("vifname", vifname)
        if vifname == bridge:
            raise VifError(f"vifname {_shown(vifname)} is the name of the bridge")
    return VifSpec(
        mac=_mac(given["mac"]) if "mac" in given else "",
        bridge=bridge,
        ip=_addresses(given.get("ip", "")),
        mtu=_number(given, "mtu", LEAST_MTU, MOST_MTU) or DEFAULT_MTU,
        rate=parse_rate(given["rate"]) if "rate" in given else None,
        vifname=vifname,
        devid=_number(given, "devid", 0, MAX_DEVID),
        trusted=_FLAGS[given.get("trusted", "trusted")],
        queues=_number(given, "queues", 1, MOST_QUEUES) or 1,
        script=_script(given.get("script", SCRIPT)),
        backend=domain(given.get("backend", "")),
        model=_printable("model", given["model"]) if given.get("model") else None,
    )


def _mac(text: str) -> str:
    if not _MAC.fullmatch(text):
        raise VifError(f"mac {_shown(text)} is not six groups of hexadecimal digits, as in 00:16:3e:74:3d:76")
    octets = [int(octet, 16) for octet in re.split("[:-]", text)]
    if octets[0] & 1:
        raise VifError(f"mac {text} is a group's: the first octet must be even")
    mac = ":".join(f"{octet:02x}" for octet in octets)
    if mac == BACKEND_MAC:
        raise VifError(f"mac {mac} belongs to the host's side of every vif")
    return mac if any(octets) else ""  # libxl draws an address for one of all zeros


def _check_interface(key: str, name: str) -> None:
    try:
        check_name(name)
    except ValueError as error:
        raise VifError(f"{key} {_shown(name)}: {error}") from None


def _addresses(text: str) -> tuple[str, ...]:
    words = text.split()
    if len(words) > MAX_ADDRESSES:
        raise VifError(f"ip lists {len(words)} addresses, more than {MAX_ADDRESSES}")
    found: dict[str, str] = {}
    for word in words:
        address, with_prefix = _address(word)
        if address in found:
            raise VifError(f"ip {address} is given twice")
        found[address] = with_prefix
    return tuple(found.values())


def _address(word: str) -> tuple[str, str]:
    """One address: alone, and with its prefix."""
    text, slash, prefix = word.partition("/")
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise VifError(f"ip {_shown(word)} is not an IPv4 or IPv6 address, with or without /PREFIX") from None
    if "%" in text:
        raise VifError(f"ip {_shown(word)}: an address of a guest has no zone")
    if not slash:
        prefix = str(DEFAULT_PREFIX[address.version])
    if not _DECIMAL.fullmatch(prefix) or not 1 <= int(prefix) <= address.max_prefixlen:
        raise VifError(f"ip {_shown(word)}: the prefix must be in 1..{address.max_prefixlen}")
    interface = ipaddress.ip_interface(f"{address}/{int(prefix)}")
    if address.is_multicast or address.is_unspecified or address.is_loopback or address == _EVERYBODY:
        raise VifError(f"ip {_shown(word)}: no interface can have that address")
    network, hosts = interface.network, address.max_prefixlen - int(prefix)
    if hosts > 1 and address == network.network_address:
        raise VifError(f"ip {_shown(word)} is a network: write the guest's address in it")
    if hosts > 1 and address.version == 4 and address == network.broadcast_address:
        raise VifError(f"ip {_shown(word)} is a broadcast address: write the guest's address in it")
    return str(address), interface.with_prefixlen


def parse_rate(text: str) -> tuple[int, int]:
    """RATE[@INTERVAL] as (bytes, microseconds), computed as libxlu computes it."""
    rate, at, interval = text.partition("@")
    match = _RATE.fullmatch(rate)
    if match is None:
        raise VifError(f"rate {_shown(text)}: write NUMBER, then GB, MB, KB or B (Gb, Mb, Kb, b for bits), then /s: 10MB/s")
    digits, scale, unit = match.groups()
    bytes_per_second = _uint32("rate", digits) * _SCALE[scale] // (8 if unit == "b" else 1)
    usecs = RATE_INTERVAL_USEC
    if at:
        match = _INTERVAL.fullmatch(interval)
        if match is None:
            raise VifError(f"rate {_shown(text)}: after @ write NUMBER, then us, ms or s: 10MB/s@20ms")
        digits, scale = match.groups()
        usecs = _uint32("rate's interval", digits) * _USEC[scale]
    if usecs > _UINT32_MAX or bytes_per_second * usecs > _UINT64_MAX:
        raise VifError(f"rate {_shown(text)} is too large, or its interval too long")
    count = bytes_per_second * usecs // 1_000_000
    if not count:
        raise VifError(f"rate {_shown(text)} is less than one byte per interval: nothing could ever be sent")
    return count, usecs


def _uint32(what: str, digits: str) -> int:
    if digits[0] == "0" and digits.strip("0"):
        raise VifError(f"{what} {_shown(digits)}: xl takes a leading 0 for octal; leave it out")
    if len(digits) > 10 or not 0 < int(digits) <= _UINT32_MAX:
        raise VifError(f"{what} {_shown(digits)} is not in 1..{_UINT32_MAX}")
    return int(digits)


def _script(script: str) -> str:
    """As libxl: a relative one is in Xen's directory of scripts."""
    path = script if script.startswith("/") else f"{SCRIPT.rpartition('/')[0]}/{script}"
    return _printable("script", path)


def _printable(key: str, value: str) -> str:
    """For what only goes into the store: text of a size that fits there."""
    if not (value.isascii() and value.isprintable() and len(value) <= 255):
        raise VifError(f"{key} {_shown(value)} is not printable ASCII of at most 255 characters")
    return value


def _number(given: dict[str, str], key: str, low: int, high: int) -> int | None:
    text = given.get(key)
    if text is None:
        return None
    if not _DECIMAL.fullmatch(text) or not low <= int(text) <= high:
        raise VifError(f"{key} {_shown(text)} is not a number in {low}..{high}")
    return int(text)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")
