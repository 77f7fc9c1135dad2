"""diskspec.py: one entry of `disk = [ ... ]`, in the grammar of xl-disk-configuration(5).

Called by the configuration parser and by whatever attaches a disk to a running guest; calls
blockdev.vdev. First comes the grammar (libxlu_disk_l.l of Xen is its authority: parameters split at
commas, named ones and flags anywhere, the rest into the next free position), then what can be served,
then what the values mean. A thing that Xen has and this project does not serve yet is a DiskError that
says so: it is never accepted and then ignored.

Three parameters are ours, not Xen's:
    sector-size=512|4096          what the guest is told; without it, what the image or device has
    physical-sector-size=BYTES    a power of two, at least the sector size
    direct-io                     open the image O_DIRECT (Xen's direct-io-safe is about a qemu workaround)

Left out: `target` is kept as written. The manual prepends /dev to a relative one, but libxl and its block
script stat it in the current directory first; so a relative target is relative to the current directory.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from blockdev.vdev import parse_vdev
from xenfs.xlcfg import domain

MAX_SPEC_CHARS = 8192
MAX_TARGET_BYTES = 4096 - 64  # one xenstore write holds 4096: the path of `params` (under 64) and this
SECTOR_SIZES = ("512", "4096")
MAX_PHYSICAL_SECTOR_BYTES = 65536

_BLANK = " \t\n"
_POSITIONS = "target, format, vdev, access"
_FORMATS = ("raw", "qcow", "qcow2", "vhd", "qed", "empty")
_KEYS = (
    "access",
    "backend",
    "backendtype",
    "devtype",
    "format",
    "grant_usage",
    "physical-sector-size",
    "script",
    "sector-size",
    "specification",
    "target",
    "transport",
    "vdev",
)
# A flag is a key with a fixed value, so that a flag and its opposite meet in one place.
_FLAGS = {
    "cdrom": ("devtype", "cdrom"),
    "discard": ("discard", "1"),
    "no-discard": ("discard", "0"),
    "direct-io-safe": ("direct-io-safe", "1"),
    "direct-io": ("direct-io", "1"),
    "trusted": ("trusted", "1"),
    "untrusted": ("trusted", "0"),
    "no-colo": ("colo", "0"),
}
_COLO = ("colo", "colo-host", "colo-port", "colo-export", "active-disk", "hidden-disk")
# libxl tolerates that these are said twice if they say the same; a repeated string is an error even then.
_REPEATABLE = frozenset(
    {"access", "backendtype", "format", "specification"} | {key for key, _ in _FLAGS.values()}
)

_PREFIX = re.compile(r"(raw|qcow2?|vhd|iscsi|e?nbd|drbd|tapdisk|tap2?|aio|ioemu|file|phy):")
_UNKNOWN_PREFIX = re.compile(r"[a-z][a-z0-9]*:(?![a-z0-9])")
_PARAMETER_NAME = re.compile(r"[a-z][-_a-z0-9]*")


class DiskError(ValueError):
    """A disk specification that cannot be understood or cannot be served; the text names the parameter."""


@dataclass(frozen=True)
class DiskSpec:
    """One disk, all defaults applied. `readonly` is forced for a cdrom and `discard` defaults to "writable",
    both as in libxl. Sector sizes are in bytes; None means those of the image or device. `backend` is "0", or the domid
    or name of the guest that serves the disk: what `target` means is then known there, and so are the sector sizes."""

    target: str
    vdev: str
    vdev_number: int
    format: str = "raw"
    readonly: bool = False
    cdrom: bool = False
    removable: bool = False
    backend: str = "0"
    backendtype: str | None = None
    script: str | None = None
    direct_io_safe: bool = False
    discard: bool = True
    trusted: bool = True
    sector_size: int | None = None
    physical_sector_size: int | None = None
    direct_io: bool = False


def parse_disk(text: str) -> DiskSpec:
    """Parse one DISKSPEC of xl-disk-configuration(5). Raises DiskError and nothing else."""
    if len(text) > MAX_SPEC_CHARS:
        raise DiskError(f"disk specification of {len(text)} characters is longer than {MAX_SPEC_CHARS}")
    given = _split(text)
    _refuse_unserved(given)
    return _meaning(given)


# ---- the grammar: text -> {key: value}, both as written ----


def _split(text: str) -> dict[str, str]:
    given: dict[str, str] = {}
    had_prefix = False  # in "phy:/dev/vdb,xvda,w" the format's position does not exist
    at = 0
    while True:
        at = len(text) - len(text[at:].lstrip(_BLANK))
        if at == len(text):
            return given
        if text.startswith("target=", at):
            # The rest of the line, commas and all; libxlu drops one comma at the very end.
            _set(given, "target", text[at + len("target=") :].removesuffix(","))
            return given
        if "target" not in given:
            if prefix := _PREFIX.match(text, at):
                _set_prefix(given, prefix[1])
                had_prefix = True
                at = prefix.end()
                continue
            if unknown := _UNKNOWN_PREFIX.match(text, at):
                raise DiskError(
                    f"unknown disk prefix {_shown(unknown[0])}: leave it out, or write target=... at the end"
                )
        parameter, _, _ = text[at:].partition(",")
        at = min(at + len(parameter) + 1, len(text))
        if parameter in _FLAGS:
            _set(given, *_FLAGS[parameter])
        elif "=" in parameter or parameter in _COLO:
            _set_named(given, parameter)
        else:
            _set_position(given, parameter, had_prefix)


def _set(given: dict[str, str], key: str, value: str) -> None:
    old = given.get(key, "")
    if old and not (old == value and key in _REPEATABLE):
        raise DiskError(f"{key} is given twice: {_shown(old)} and {_shown(value)}")
    given[key] = value


def _set_prefix(given: dict[str, str], prefix: str) -> None:
    """The deprecated prefixes: some are a format, some a script, the others mean nothing any more."""
    if prefix in _FORMATS:
        _set(given, "format", prefix)
    elif prefix in ("iscsi", "nbd", "enbd", "drbd"):
        _set(given, "script", f"block-{prefix}")


def _set_named(given: dict[str, str], parameter: str) -> None:
    key, _, value = parameter.partition("=")
    if key in _COLO:
        raise DiskError(f"{key}: COLO replication is not supported")
    if key in _KEYS:
        # An empty format is raw at once, so that a later positional parameter is not taken for the format.
        _set(given, key, value or "raw" if key == "format" else value)
        return
    if key in _FLAGS:
        raise DiskError(f"{key} takes no value: write {_opposite(key)}")
    if _PARAMETER_NAME.fullmatch(key):
        raise DiskError(f"unknown parameter {_shown(key)}{_suggest(key)}")
    raise DiskError(f"{_shown(parameter)}: a target that contains '=' must be written last, as target=...")


def _set_position(given: dict[str, str], parameter: str, had_prefix: bool) -> None:
    if "target" not in given:
        _set(given, "target", parameter)
    elif not had_prefix and "format" not in given:
        # xend's empty drive is ",hdc:cdrom,r": no target and no position for the format.
        if not given["target"] and ":" in parameter:
            _set(given, "format", "empty")
            _set_vdev(given, parameter)
        else:
            _set(given, "format", parameter or "raw")
    elif "vdev" not in given:
        _set_vdev(given, parameter)
    elif "access" not in given:
        _set(given, "access", parameter)
    else:
        raise DiskError(
            f"too many parameters, at {_shown(parameter)}: positions are {_POSITIONS}{_suggest(parameter)}"
        )


def _set_vdev(given: dict[str, str], parameter: str) -> None:
    """VDEV or the deprecated VDEV:DEVTYPE."""
    vdev, colon, devtype = parameter.rpartition(":")
    if not colon:
        _set(given, "vdev", parameter)
        return
    _set(given, "vdev", vdev)
    _set(given, "devtype", devtype or "(empty)")


# ---- what is understood but not served ----


def _refuse_unserved(given: dict[str, str]) -> None:
    _one_of(given, "format", ("", *_FORMATS))
    _one_of(given, "access", ("", "r", "ro", "w", "rw"))
    _one_of(given, "devtype", ("", "cdrom", "disk"))
    _one_of(given, "backendtype", ("", "phy", "qdisk", "tap", "standalone"))
    _one_of(given, "specification", ("", "xen", "virtio"))
    _one_of(given, "grant_usage", ("", "0", "1"))
    _one_of(given, "transport", ("", "mmio", "pci"))
    kind = given.get("format", "")
    if kind in ("qcow", "qcow2", "vhd", "qed"):
        raise DiskError(f"format {kind} is not supported yet: convert the image with qemu-img to format raw")
    if given.get("specification") == "virtio":
        raise DiskError("specification virtio is not supported: write specification=xen")
    for key in ("transport", "grant_usage"):
        if given.get(key):
            raise DiskError(f"{key} belongs to specification virtio, which is not supported: leave it out")
    if given.get("script", "") not in ("", "block"):
        raise DiskError(f"script {_shown(given['script'])} is not supported yet: give the device as target=")
    if given.get("backendtype") == "standalone":
        raise DiskError("backendtype standalone serves only virtio disks: write backendtype=phy")
    if given.get("backendtype") == "tap":
        raise DiskError("backendtype tap needs blktap, which is not supported: write backendtype=phy")
    _refuse_empty_drive(given)


def _refuse_empty_drive(given: dict[str, str]) -> None:
    cdrom = given.get("devtype") == "cdrom"
    if given.get("target") and given.get("format") == "empty":
        raise DiskError(f"format empty contradicts the target {_shown(given['target'])}")
    if given.get("target"):
        return
    if not cdrom:
        raise DiskError("no target: the path of an image or device must come first, or last as target=...")
    raise DiskError("an empty CD-ROM drive is not supported yet: give an image as target=")


def _one_of(given: dict[str, str], key: str, values: tuple[str, ...]) -> None:
    value = given.get(key, "")
    if value not in values:
        known = ", ".join(filter(None, values))
        order = f"; positions are {_POSITIONS}{_suggest(value)}" if key in ("format", "access") else ""
        raise DiskError(f"{key} {_shown(value)} is not one of {known}{order}")


# ---- what the values mean ----


def _meaning(given: dict[str, str]) -> DiskSpec:
    vdev = given.get("vdev", "")
    if not vdev:
        raise DiskError("no vdev: say how the guest sees the disk, for example vdev=xvda")
    try:
        vdev_number = parse_vdev(vdev)
    except ValueError as error:
        raise DiskError(f"vdev {error}") from None
    cdrom = given.get("devtype") == "cdrom"
    readonly = cdrom or given.get("access") in ("r", "ro")
    sector_size = _sector_size(given)
    return DiskSpec(
        target=_checked_target(given["target"]),
        vdev=vdev,
        vdev_number=vdev_number,
        readonly=readonly,
        cdrom=cdrom,
        removable=cdrom,
        backend=domain(given.get("backend", "")),
        backendtype=given.get("backendtype") or None,
        script=given.get("script") or None,
        direct_io_safe=given.get("direct-io-safe") == "1",
        discard=given["discard"] == "1" if "discard" in given else not readonly,
        trusted=given.get("trusted", "1") == "1",
        sector_size=sector_size,
        physical_sector_size=_physical_sector_size(given, sector_size),
        direct_io=given.get("direct-io") == "1",
    )


def _checked_target(target: str) -> str:
    if "\0" in target:
        raise DiskError("target contains a NUL byte, which no path can")
    try:
        size = len(target.encode())
    except UnicodeEncodeError:
        raise DiskError(f"target {_shown(target)} is not valid Unicode") from None
    if size > MAX_TARGET_BYTES:
        raise DiskError(f"target of {size} bytes is longer than {MAX_TARGET_BYTES}")
    return target


def _sector_size(given: dict[str, str]) -> int | None:
    value = given.get("sector-size")
    if not value:
        return None
    if value not in SECTOR_SIZES:
        raise DiskError(f"sector-size {_shown(value)} is not one of {', '.join(SECTOR_SIZES)}")
    return int(value)


def _physical_sector_size(given: dict[str, str], sector_size: int | None) -> int | None:
    """blkif.h: a multiple of sector-size; block layers expect a power of two."""
    value = given.get("physical-sector-size")
    if not value:
        return None
    least = sector_size or int(SECTOR_SIZES[0])
    allowed = [1 << bit for bit in range(MAX_PHYSICAL_SECTOR_BYTES.bit_length()) if 1 << bit >= least]
    if value not in map(str, allowed):
        raise DiskError(
            f"physical-sector-size {_shown(value)} is not a power of two in {least}..{allowed[-1]}"
        )
    return int(value)


def _suggest(word: str) -> str:
    """Named parameters and flags share one space, so a bad word of either kind is compared with both."""
    near = difflib.get_close_matches(word[:40], (*_KEYS, *_FLAGS), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _opposite(flag: str) -> str:
    key, _ = _FLAGS[flag]
    both = [name for name, (other, _) in _FLAGS.items() if other == key]
    return " or ".join(both) if len(both) > 1 else f"{both[0]} alone"


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")
