"""Goal: disk names and numbers are those of xen-vbd-interface(7), one name a number; nonsense is refused.

Method: the document's examples and formulas as tables, then round trips and arbitrary text from hypothesis.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockdev.vdev import parse_vdev, vdev_name

# name, number, the name the number has (None: the same)
KNOWN = [
    ("xvda", 51712, None),
    ("xvda1", 51713, None),
    ("xvdb", 51728, None),
    ("xvdd", 51760, None),  # the cdrom that a real Xen 4.17 showed as 51760
    ("xvdp15", 202 << 8 | 255, None),
    ("xvdq", 1 << 28 | 16 << 8, None),
    ("xvda16", 1 << 28 | 16, None),
    ("xvdz", 1 << 28 | 25 << 8, None),
    ("xvdaa", 1 << 28 | 26 << 8, None),
    ("xvdtq37", 1 << 28 | 536 << 8 | 37, None),
    ("xvdbgqcv", 1 << 28 | 0xFFFFF << 8, None),
    ("xvdbgqcv255", 0x1FFFFFFF, None),
    ("d0", 51712, "xvda"),
    ("d0p0", 51712, "xvda"),
    ("d1p2", 51730, "xvdb2"),
    ("d5p2", 51794, "xvdf2"),
    ("d536p37", 1 << 28 | 536 << 8 | 37, "xvdtq37"),
    ("hda", 768, None),
    ("hda63", 768 + 63, None),
    ("hdb", 3 << 8 | 64, None),
    ("hdc", 22 << 8, None),
    ("hdc2", 22 << 8 | 2, None),
    ("hdd", 22 << 8 | 64, None),
    ("sda", 2048, None),
    ("sdb3", 8 << 8 | 1 << 4 | 3, None),
    ("sdp15", 8 << 8 | 255, None),
    ("51712", 51712, "xvda"),
    ("0xca00", 51712, "xvda"),
    ("0XCA01", 51713, "xvda1"),
    ("0145000", 51712, "xvda"),
    ("768", 768, "hda"),
    ("268439552", 1 << 28 | 16 << 8, "xvdq"),
]

REFUSED = [
    ("", "not a disk name"),
    ("xvd", "not a disk name"),
    ("xvd1", "not a disk name"),
    ("XVDA", "not a disk name"),
    ("/dev/xvda", "not a disk name"),
    ("xvda ", "not a disk name"),
    ("xvda\n", "not a disk name"),
    ("xvda0", "not a disk name"),  # libxl: no leading zero in a partition number
    ("xvda01", "not a disk name"),
    ("xvda١", "not a disk name"),  # a digit, but not an ASCII one
    ("d-1p0", "not a disk name"),
    ("d0p", "not a disk name"),
    ("089", "not a disk name"),  # octal with a 9
    ("-1", "not a disk name"),
    ("9" * 5000, "not a disk name"),
    ("xvda256", "end at 255"),
    ("xvdbgqcw", "xvdbgqcv"),
    ("d1048576", "end at xvdbgqcv"),
    ("d0p256", "end at 255"),
    ("hde", "end at hdd"),
    ("hda64", "end at 63"),
    ("sdq", "end at sdp"),
    ("sda16", "end at 15"),
    ("0", "no xvd, sd or hd disk"),
    ("5888", "no xvd, sd or hd disk"),  # major 23
    ("896", "no xvd, sd or hd disk"),  # major 3, but a third disk on the channel
    ("536870912", "outside"),
    ("0xffffffffffffffff", "outside"),
    ("268435456", "short form, 51712"),
]


@pytest.mark.parametrize(("name", "number", "canonical"), KNOWN)
def test_known_names(name: str, number: int, canonical: str | None) -> None:
    assert parse_vdev(name) == number
    assert vdev_name(number) == (canonical or name)


@pytest.mark.parametrize(("text", "says"), REFUSED)
def test_refused_names(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        parse_vdev(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "number", [-1, -51712, 0, 1, 0xCB00, 2 << 28, 1 << 64, 1 << 28, 1 << 28 | 15 << 8 | 15]
)
def test_refused_numbers(number: int) -> None:
    with pytest.raises(ValueError, match="device number"):
        vdev_name(number)


@given(st.integers(0, (1 << 20) - 1), st.integers(0, 255))
def test_xvd_follows_the_formula(disk: int, partition: int) -> None:
    """Goal: d<disk>p<partition> is encoded as documented.  Method: its two formulas, and back by name."""
    small = disk < 16 and partition < 16
    expected = 202 << 8 | disk << 4 | partition if small else 1 << 28 | disk << 8 | partition
    assert parse_vdev(f"d{disk}p{partition}") == expected
    assert parse_vdev(vdev_name(expected)) == expected


@given(st.one_of(st.integers(0, 0xFFFF), st.integers(0, 0x1FFFFFFF), st.integers()))
def test_one_name_per_number(number: int) -> None:
    """Goal: every number either has a name that leads back to it, or is refused both as number and as text.
    Method: any integer."""
    try:
        name = vdev_name(number)
    except ValueError:
        with pytest.raises(ValueError):
            parse_vdev(str(number))
        return
    assert parse_vdev(name) == number
    assert parse_vdev(str(number)) == number
    assert parse_vdev(hex(number)) == number


def test_every_short_number() -> None:
    """Goal: exactly the documented part of the old 16-bit space is accepted.  Method: all of it, counted."""
    named = []
    for number in range(1 << 16):
        try:
            named.append(vdev_name(number))
        except ValueError:
            continue
    assert len(named) == len(set(named)) == 256 + 256 + 4 * 64


@given(st.text(st.characters(), max_size=12) | st.from_regex(r"(xvd|sd|hd|d)[a-z0-9p]{0,9}", fullmatch=True))
def test_arbitrary_text(text: str) -> None:
    """Goal: nothing but ValueError escapes, and what is accepted has a name.  Method: any text."""
    try:
        number = parse_vdev(text)
    except ValueError:
        return
    assert parse_vdev(vdev_name(number)) == number
