"""devnodes.py: the nodes that libxl of Xen 4.17 writes for a disk and for an interface, as lists in its order.

Called by the toolstack, which puts them into the store. Pure: the same specification gives the same nodes.

Rule: `params` is what the specification says, as libxl has it, where another domain serves the disk: what it names there
is not ours to look up. For our own backend it becomes absolute, for that may be in another directory than the user.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from netdev.link import DEFAULT_MTU
from xenfs.diskspec import DiskSpec
from xenfs.vifspec import VifSpec

DOM0 = 0
Node = tuple[str, str]


class DeviceNodes(NamedTuple):
    """What goes into the two directories, but for their links to each other. `readonly` are nodes in the frontend's that the
    guest does not own, `ours` nodes in the backend's that a real Xen lacks."""

    frontend: list[Node]
    readonly: list[Node]
    backend: list[Node]
    ours: list[Node]


def disk_nodes(domid: int, backend_domid: int, disk: DiskSpec) -> DeviceNodes:
    """device_disk_add(): a disk of `domid` that `backend_domid` serves."""
    kind = "cdrom" if disk.cdrom else "disk"
    frontend = [
        ("backend-id", str(backend_domid)), ("state", "1"), ("virtual-device", str(disk.vdev_number)),
        ("device-type", kind), ("trusted", str(int(disk.trusted))), ("protocol", "x86_64-abi"),
    ]  # fmt: skip
    backend = [
        ("params", os.path.abspath(disk.target) if backend_domid == DOM0 else disk.target),
        ("script", "/etc/xen/scripts/block"), ("frontend-id", str(domid)), ("online", "1"),
        ("removable", str(int(disk.removable))), ("bootable", "1"), ("state", "1"), ("dev", disk.vdev), ("type", "phy"),
        ("mode", "r" if disk.readonly else "w"), ("device-type", kind), ("discard-enable", str(int(disk.discard))),
        ("specification", "xen"),
    ]  # fmt: skip
    ours = {
        "xenfs-sector-size": disk.sector_size,
        "xenfs-physical-sector-size": disk.physical_sector_size,
        "xenfs-direct-io": int(disk.direct_io) or None,
    }
    return DeviceNodes(frontend, [], backend, _given(ours))


def vif_nodes(domid: int, backend_domid: int, devid: int, vif: VifSpec) -> DeviceNodes:
    """libxl__set_xenstore_nic(): the interface `devid` of `domid` that `backend_domid` serves."""
    frontend = [
        ("backend-id", str(backend_domid)), ("state", "1"), ("handle", str(devid)), ("mac", vif.mac),
        ("trusted", str(int(vif.trusted))),
    ]  # fmt: skip
    backend = [
        ("frontend-id", str(domid)), ("online", "1"), ("state", "1"), ("script", vif.script),
        ("vifname", vif.vifname or ""), ("mac", vif.mac), ("ip", " ".join(vif.ip)),
        ("rate", ",".join(map(str, vif.rate or ()))), ("mtu", "" if vif.mtu == DEFAULT_MTU else str(vif.mtu)),
        ("bridge", vif.bridge), ("handle", str(devid)), ("type", vif.type),
    ]  # fmt: skip
    backend = [node for node in backend if node[1]]  # libxl leaves out what was not given
    backend.append(("hotplug-status", ""))  # netback waits until a script has written it: whose, its domain knows
    return DeviceNodes(
        frontend, [("mtu", str(vif.mtu))], backend, _given({"xenfs-queues": vif.queues if vif.queues > 1 else None})
    )


def _given(numbers: dict[str, int | None]) -> list[Node]:
    return [(key, str(number)) for key, number in numbers.items() if number is not None]
