"""Goal: who drives a guest's devices and who serves them, as its file says it; a backend that cannot be there is refused.
Method: tables of values and of orders of files; files in a temporary directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.xenfs.test_config import guest, written
from xenfs.config import ConfigError, duplicate_macs, load_configs


def test_drivers() -> None:
    """Goal: who drives a guest's devices, and whether it may serve others'.  Method: the values, and the defaults."""
    assert (guest("name='g'").drivers, guest("name='g'").driver_domain) == ("xenfs", False)
    assert guest("name='g'; drivers='xenfs'").drivers == "xenfs"
    told = guest("name='g'; drivers='none'; driver_domain=1; vif=['']")
    assert (told.drivers, told.driver_domain, told.unused) == ("none", True, ())
    assert not guest("name='g'; driver_domain='0'").driver_domain


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("drivers = 'linux'", "drivers 'linux' is not one of xenfs, none"),
        ("drivers = ''", "drivers '' is not one of"),
        ("drivers = ['none']", "drivers must be a single value"),
        ("driver_domain = 2", "driver_domain must be in 0..1"),
        ("driver_domain = 'yes'", "driver_domain 'yes' is not a number"),
    ],
)
def test_what_they_may_not_be(setting: str, says: str) -> None:
    """Goal: other values are refused with their line.  Method: one each."""
    with pytest.raises(ConfigError, match=f"^g.cfg:2: {says}"):
        guest(f"name = 'g'\n{setting}")


def test_macs_in_another_guest() -> None:
    """Goal: nothing is said of addresses on a bridge that another guest has.  Method: one twice there, once here."""
    vifs = "'mac=00:16:3e:0:0:1,backend=net', 'mac=00:16:3e:0:0:1,backend=net', 'mac=00:16:3e:0:0:1'"
    assert duplicate_macs([guest(f"name='g'; vif=[{vifs}]")]) == []


@pytest.mark.parametrize("device", ["disk=['/a,,xvda,backend={}']", "vif=['', 'backend={}']"])
@pytest.mark.parametrize(
    ("backend", "why"),
    [
        ("first", None),
        ("1", None),
        ("Domain-0", None),
        ("0", None),
        ("second", "is this guest itself"),
        ("2", "is this guest itself"),
        ("third", "must be started first: put {}/3.cfg before this file"),
        ("3", "must be started first: put {}/3.cfg before this file"),
        ("fourth", "is none of the guests"),
        ("4", "is none of the guests"),
        ("9" * 5000, "is none of the guests"),
    ],
)
def test_backends(tmp_path: Path, device: str, backend: str, why: str | None) -> None:
    """Goal: who serves a device is there before it; otherwise the message says which file comes too late.
    Method: the second of three guests with a device of each other one, by name and by number."""
    paths = [
        written(tmp_path, "1.cfg", "name='first'; driver_domain=1"),
        written(tmp_path, "2.cfg", f"name='second'; {device.format(backend)}"),
        written(tmp_path, "3.cfg", "name='third'"),
    ]
    if why is None:
        assert len(load_configs(paths)) == 3
        return
    what = "disk xvda" if device.startswith("disk") else "vif 1"
    with pytest.raises(ConfigError, match=why.format(tmp_path)) as caught:
        load_configs(paths)
    assert str(caught.value).startswith(f"{paths[1]}: {what}: backend ")
    assert len(str(caught.value)) < 500


def test_names_in_another_guest(tmp_path: Path) -> None:
    """Goal: images and interfaces that another guest serves are in its world: one name may be used there and here.
    Method: the same target, writable, and the same vifname, twice there and once here."""
    there = "disk=['/img,,xvda,backend=s', '/img,,xvdb,backend=s'];vif=['backend=s,vifname=up0']"
    paths = [
        written(tmp_path, "1.cfg", "name='s'; disk=['/img,,xvda']; vif=['vifname=up0']"),
        written(tmp_path, "2.cfg", f"name='one'; {there}"),
        written(tmp_path, "3.cfg", f"name='two'; {there}"),
    ]
    assert [len(found.disks) for found in load_configs(paths)] == [1, 2, 2]
