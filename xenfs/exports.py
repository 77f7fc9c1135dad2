"""exports.py: one table: device kind -> how Linux gets to see the guest's end of it.

An export is made when a frontend appears, told when it changes, and taken down when the device is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from blockdev.blkfront import Blkfront
from blockdev.vdev import vdev_name
from netdev.netfront import Netfront
from xenfs.fuse.tree import Directory
from xenfs.nodes.disk import Disk
from xenfs.nodes.text import Text, vbd
from xenfs.nodes.vif import vif
from xenmodel.types import PeerFault
from xenmodel.xenbus import XenbusDevice


class Export(Protocol):
    name: str  # under dev/

    def refresh(self) -> None:
        """The device connected, changed size, or failed."""

    def remove(self) -> None: ...


class DiskExport:
    """dev/xvda: there once the device is Connected; inspect/vbd/xvda: there from the start."""

    def __init__(self, front: Blkfront, dev: Directory, inspect: Directory) -> None:
        kind = _directory(inspect, "vbd")
        self.front = front
        try:
            self.name = vdev_name(front.handle)
        except ValueError as error:
            raise PeerFault(f"{front.node}/virtual-device: {error}") from error
        if self.name.encode() in kind.children:
            raise PeerFault(f"{front.node}/virtual-device: there is another {self.name}")
        self.dev = dev
        self.disk: Disk | None = None
        self.inspect = kind
        kind.add(self.name, Text(lambda: vbd(front)))

    def refresh(self) -> None:
        if self.disk is None and self.front.sectors:
            self.disk = Disk(self.front)
            self.dev.add(self.name, self.disk)
        elif self.disk is not None:
            self.disk.refresh()

    def remove(self) -> None:
        self.dev.remove(self.name)
        self.inspect.remove(self.name)


class VifExport:
    """xn0 in the guest's network namespace (the driver has it); inspect/vif/xn0: what both ends agreed on and have done."""

    def __init__(self, front: Netfront, inspect: Directory) -> None:
        self.name = f"xn{front.handle}"
        self.inspect = _directory(inspect, "vif")
        if self.name.encode() in self.inspect.children:
            raise PeerFault(f"{front.node}/handle: there is another {self.name}")
        self.inspect.add(self.name, Text(lambda: vif(front)))

    def refresh(self) -> None: ...

    def remove(self) -> None:
        self.inspect.remove(self.name)


def _directory(inspect: Directory, kind: str) -> Directory:
    directory = inspect.children.get(kind.encode()) or inspect.add(kind, Directory())
    assert isinstance(directory, Directory), f"inspect/{kind} is a directory"
    return directory


def _export_vbd(device: XenbusDevice, dev: Directory, inspect: Directory) -> Export:
    assert isinstance(device, Blkfront), f"{device.node} is not a Blkfront"
    return DiskExport(device, dev, inspect)


def _export_vif(device: XenbusDevice, dev: Directory, inspect: Directory) -> Export:
    assert isinstance(device, Netfront), f"{device.node} is not a Netfront"
    return VifExport(device, inspect)


EXPORTS: Mapping[str, Callable[[XenbusDevice, Directory, Directory], Export]] = {"vbd": _export_vbd, "vif": _export_vif}
