"""vdev.py: disk names and the numbers that stand for them in xenstore (xen-vbd-interface(7)).

The configuration gives a name ("xvda", "d0p1", "51712"), `virtual-device` and the directory under
device/vbd hold the number, and whoever shows the disk to a user turns the number back into a name.
Called by the disk specification parser, the toolstack and the exports; calls nothing.

Invariants: vdev_name() answers only for numbers that parse_vdev() can return, every such number has one
name, and parse_vdev(vdev_name(n)) == n. So two disks never claim the same name with different numbers.

Left out: the Linux-specific numbers of SCSI disks beyond 15 and IDE disks beyond 3, which the document calls
deprecated, and the renaming of hda to xvda that current Linux guests do on their own.
"""

from __future__ import annotations

import re
from typing import NamedTuple

XVD_MAJOR = 202
SD_MAJOR = 8
HD_MAJORS = (3, 22)  # the two IDE channels, two disks each
EXTENDED = 1 << 28  # xvd beyond what eight bits under major 202 can say
RESERVED = 2 << 28  # from here on: "reserved for future use"

MAX_EXTENDED_DISKS = 1 << 20
MAX_EXTENDED_PARTITIONS = 256
XVD_DISKS = XVD_PARTITIONS = 16
SD_DISKS = SD_PARTITIONS = 16
HD_DISKS = 4
HD_PARTITIONS = 64

# Lengths are bounded here, so that no later step sees more letters or digits than a legal name can have.
_LETTERED = re.compile(r"(xvd|hd|sd)([a-z]{1,6})([1-9][0-9]{0,3})?")
_NUMBERED = re.compile(r"d([0-9]{1,8})(?:p([0-9]{1,4}))?")
_NUMBER = re.compile(r"0[xX]([0-9a-fA-F]{1,16})|0([0-7]{1,16})|(0|[1-9][0-9]{0,16})")

_LIMITS = {
    "xvd": (MAX_EXTENDED_DISKS, MAX_EXTENDED_PARTITIONS),
    "hd": (HD_DISKS, HD_PARTITIONS),
    "sd": (SD_DISKS, SD_PARTITIONS),
}


class _Place(NamedTuple):
    """What a number means: nominal disk type, disk from 0, partition (0 is the whole disk)."""

    kind: str
    disk: int
    partition: int


def parse_vdev(text: str) -> int:
    """The number of a guest disk named as in xen-vbd-interface(7): "xvda1", "hdc", "sdb3", "d0", "d5p2", or
    the number itself in decimal, hexadecimal or octal. ValueError, with a sentence for the user, otherwise.

    A bare "d5" is in the document but not in libxl; it is the whole disk. A number that encodes no disk is
    refused here, while libxl would pass it on to a guest that then ignores it.
    """
    if match := _LETTERED.fullmatch(text):
        kind, letters, digits = match.groups()
        return _encode(text, _Place(kind, _disk_of_letters(letters), int(digits or "0")))
    if match := _NUMBERED.fullmatch(text):
        return _encode(text, _Place("xvd", int(match[1]), int(match[2] or "0")))
    if match := _NUMBER.fullmatch(text):
        hexadecimal, octal, decimal = match.groups()
        number = int(hexadecimal, 16) if hexadecimal else int(octal, 8) if octal else int(decimal)
        _decode(number)  # refuses what encodes no disk
        return number
    raise ValueError(
        f"{_shown(text)} is not a disk name: write xvda, xvdb1, hda, sda, d0p1 or the device's number"
    )


def vdev_name(number: int) -> str:
    """The name a Linux guest's administrator would write for this number, such as "xvda1", "hdc" or "sdb3".
    ValueError if the number encodes no disk; it may come from a peer's `virtual-device` node."""
    kind, disk, partition = _decode(number)
    return kind + _letters_of_disk(disk) + (str(partition) if partition else "")


def _encode(text: str, place: _Place) -> int:
    kind, disk, partition = place
    disks, partitions = _LIMITS[kind]
    if disk >= disks:
        last = f"{kind}{_letters_of_disk(disks - 1)} (disk {disks - 1})"
        raise ValueError(f"{_shown(text)}: {kind} disks end at {last}")
    if partition >= partitions:
        raise ValueError(f"{_shown(text)}: partitions of an {kind} disk end at {partitions - 1}")
    if kind == "hd":
        return HD_MAJORS[disk // 2] << 8 | disk % 2 << 6 | partition
    if kind == "sd":
        return SD_MAJOR << 8 | disk << 4 | partition
    if disk < XVD_DISKS and partition < XVD_PARTITIONS:
        return XVD_MAJOR << 8 | disk << 4 | partition
    return EXTENDED | disk << 8 | partition


def _decode(number: int) -> _Place:
    if not 0 <= number < RESERVED:
        raise ValueError(f"device number {_shown(str(number))} is outside 0..{RESERVED - 1:#x}")
    if number & EXTENDED:
        place = _Place("xvd", number >> 8 & MAX_EXTENDED_DISKS - 1, number & MAX_EXTENDED_PARTITIONS - 1)
        if place.disk < XVD_DISKS and place.partition < XVD_PARTITIONS:
            # The document: "used only where the 202<<8 format does not have enough bits". Two numbers for
            # one name would let a guest have two disks xvda.
            short = XVD_MAJOR << 8 | place.disk << 4 | place.partition
            raise ValueError(f"device number {number} must be written in its short form, {short}")
        return place
    major, minor = number >> 8, number & 0xFF
    if major == XVD_MAJOR:
        return _Place("xvd", minor >> 4, minor & 0xF)
    if major == SD_MAJOR:
        return _Place("sd", minor >> 4, minor & 0xF)
    if major in HD_MAJORS and minor < 2 * HD_PARTITIONS:
        return _Place("hd", 2 * HD_MAJORS.index(major) + (minor >> 6), minor & HD_PARTITIONS - 1)
    raise ValueError(f"device number {number} is no xvd, sd or hd disk; 51712 would be xvda")


def _disk_of_letters(letters: str) -> int:
    """a -> 0, z -> 25, aa -> 26: base 26 without a zero digit."""
    disk = -1
    for letter in letters:
        disk = (disk + 1) * 26 + ord(letter) - ord("a")
    return disk


def _letters_of_disk(disk: int) -> str:
    letters = ""
    while disk >= 0:
        letters = chr(ord("a") + disk % 26) + letters
        disk = disk // 26 - 1
    return letters


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")
