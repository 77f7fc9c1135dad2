"""privcmd.py: dev/xen/privcmd, drivers/xen/privcmd.c: hypercalls of a domain's programs, libxencall's and libxenctrl's.

IOCTL_PRIVCMD_HYPERCALL of Linux, and FreeBSD's, whose structure travels with the request and holds the result; the arguments
are addresses in the caller's memory either way, which xenfs/calls.py reaches. What the calls do is in sysdev/hypercall.py.

All other ioctls are ENOTTY: mapping another domain's memory, device-model operations, RESTRICT. libxenforeignmemory and
libxendevicemodel ask for one when they open the file, and put up with that. A file that is still open when its domain is
gone says ENODEV, also to who waits in an ioctl then. Nothing belongs to an open() but what we know of its callers: ports
that a program bound here stay bound when it ends, as on Xen. ENOSYS reaches programs as ENOTTY: Linux does that to whatever
FUSE answers to an ioctl.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Mapping
from struct import Struct
from types import MappingProxyType

from sysdev.hypercall import Hypercalls
from sysdev.steps import Job, Read
from xenfs.calls import Callers, DomainCalls, Result
from xenfs.fuse.kernel import FOPEN_DIRECT_IO
from xenfs.fuse.session import Session
from xenfs.fuse.tree import Ioctl, Node, Opened, refuse
from xenmodel.domain import Domain
from xenmodel.public import errno as xen_errno

IOCTL_PRIVCMD_HYPERCALL = 0x00305000  # Linux: _IOC(_IOC_NONE, 'P', 0, 48)
FREEBSD_IOCTL_PRIVCMD_HYPERCALL = 0xC0384500  # _IOWR('E', 0, 56)
PRIVCMD_HYPERCALL = Struct("<6Q")  # op, arg[5]
FREEBSD_PRIVCMD_HYPERCALL = Struct("<6Qq")  # op, arg[5], retval
_U32 = 2**32 - 1
_INT_MAX = 2**31 - 1
_ERRNO: Mapping[int, int] = MappingProxyType(
    {value: getattr(errno, name[4:]) for name, value in vars(xen_errno).items() if name.startswith("XEN_E")}
)


class Privcmd(Node):
    """The device of one domain. `uuid` is what XENVER_guest_handle says."""

    def __init__(self, domain: Domain, calls: DomainCalls, mode: int = 0o600, uuid: bytes = bytes(16)) -> None:
        self.domain = domain
        self.calls = calls
        self.mode = stat.S_IFREG | mode
        self.uuid = uuid

    def open(self, flags: int) -> Opened:
        self.check_alive()
        return Opened(PrivcmdFile(self), FOPEN_DIRECT_IO)

    def check_alive(self) -> None:
        if self.domain.hypervisor.domains.get(self.domain.domid) is not self.domain:
            raise refuse(errno.ENODEV)


class PrivcmdFile(Node):
    """One open."""

    def __init__(self, node: Privcmd) -> None:
        self.node = node
        self.callers = Callers(node.calls)

    def write(self, session: Session, unique: int, offset: int, size: int, flags: int) -> None:
        raise refuse(errno.EINVAL)

    def interrupt(self, unique: int) -> bool:
        return self.node.calls.interrupt(unique)

    def ioctl(self, request: Ioctl) -> None:
        self.node.check_alive()
        if request.command == IOCTL_PRIVCMD_HYPERCALL:
            self.callers.run(request, self._linux(request))
        elif request.command == FREEBSD_IOCTL_PRIVCMD_HYPERCALL:
            self.callers.run(request, self._freebsd(request))
        else:
            raise refuse(errno.ENOTTY)

    def _linux(self, request: Ioctl) -> Job[Result]:
        data: bytes = yield Read(request.arg, PRIVCMD_HYPERCALL.size)
        return (yield from self._call(request.pid, PRIVCMD_HYPERCALL.unpack(data)))

    def _freebsd(self, request: Ioctl) -> Job[Result]:
        size = FREEBSD_PRIVCMD_HYPERCALL.size
        if len(request.data) != size or request.out_size < size:
            raise refuse(errno.EINVAL)
        words = FREEBSD_PRIVCMD_HYPERCALL.unpack(request.data)[:-1]
        result = yield from self._call(request.pid, words)
        return 0, FREEBSD_PRIVCMD_HYPERCALL.pack(*words, result)

    def _call(self, pid: int, words: tuple[int, ...]) -> Job[int]:
        """The result; a negative one is an OSError."""
        who = yield from self.callers.who(pid)
        self.node.check_alive()
        calls = Hypercalls(self.node.domain, lambda: who.name, self.node.uuid)
        result = yield from calls.call(words[0] & _U32, words[1:])  # the number is an unsigned int to both kernels
        if result < 0:
            self.node.check_alive()
            raise refuse(_ERRNO[-result])
        assert result <= _INT_MAX, f"hypercall {words[0]}: {result} is no int32"
        return result
