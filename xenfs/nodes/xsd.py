"""xsd.py: where domain 0's own channel to the store is, for a xenstored that runs in its user space: text files.

Left out: the ioctls of xenbus_backend, and /proc/xen/xsd_kva, the page itself.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from xenfs.fuse.tree import Bytes, Opened, refuse


class XsdPort(Bytes):
    """proc/xen/xsd_port: the port of this domain's store channel, as a xenstored that runs here wants to know it."""

    def __init__(self, port: Callable[[], int]) -> None:
        self.port = port

    def text(self) -> bytes:
        return b"%d" % self.port()


class XenbusBackend(XsdPort):
    """dev/xen/xenbus_backend of the domain that runs the store. Linux's has ioctls for the port; here reading tells it."""

    mode = stat.S_IFREG | 0o600

    def open(self, flags: int) -> Opened:
        return super().open(flags & ~os.O_ACCMODE)  # for its ioctls a xenstored opens it O_RDWR

    def text(self) -> bytes:
        if not self.port():
            raise refuse(errno.ENODEV)
        return b"port %d: the store runs in this domain\n" % self.port()
