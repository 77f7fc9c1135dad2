"""exports.py: one table: device kind -> how Linux gets to see the guest's end of it.

An export is made when a frontend appears, told when it changes, and taken down when the device is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from blockdev.blkfront import Blkfront
from blockdev.vdev import vdev_name
from xenfs.fuse.tree import Directory
from xenfs.nodes.disk import Disk
from xenfs.nodes.text import Text, vbd
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
        kind = inspect.children.get(b"vbd") or inspect.add("vbd", Directory())
        assert isinstance(kind, Directory), "inspect/vbd is a directory"
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


def _export_vbd(device: XenbusDevice, dev: Directory, inspect: Directory) -> Export:
    assert isinstance(device, Blkfront), f"{device.node} is not a Blkfront"
    return DiskExport(device, dev, inspect)


EXPORTS: Mapping[str, Callable[[XenbusDevice, Directory, Directory], Export]] = {"vbd": _export_vbd}

