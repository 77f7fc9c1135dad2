"""What the tests of dev/xen/evtchn's driver share: three domains with a driver each, and a program's view of an open."""

from __future__ import annotations

import errno
from struct import pack, unpack

from sysdev.evtchn import MOST_BYTES, EvtchnDevice, EvtchnUser
from xenmodel.hypervisor import Hypervisor

A, B, C, NOBODY = 1, 2, 3, 9
EIO, EAGAIN, EFBIG, EINVAL, ENOTCONN, EACCES = (
    -errno.EIO, -errno.EAGAIN, -errno.EFBIG, -errno.EINVAL, -errno.ENOTCONN, -errno.EACCES
)  # fmt: skip


class Machine:
    """Three domains with their drivers; `open` makes an open that counts how often it was woken."""

    def __init__(self) -> None:
        self.hypervisor = Hypervisor()
        self.domains = {domid: self.hypervisor.create_domain(4, str(domid), domid) for domid in (A, B, C)}
        self.devices = {domid: EvtchnDevice(domain.events) for domid, domain in self.domains.items()}
        self.wakes: list[str] = []

    def open(self, domid: int, owner: str = "prog[1]") -> EvtchnUser:
        return self.devices[domid].open(owner, lambda: self.wakes.append(owner))

    def pair(self, a: EvtchnUser, b: EvtchnUser) -> tuple[int, int]:
        """A bound pair of ports of two opens, at rest."""
        port = a.bind_unbound_port(b.device.events.domid)
        peer = b.bind_interdomain(a.device.events.domid, port)
        assert port > 0 and peer > 0, (port, peer)
        self.hypervisor.settle()
        assert ports(b) == [peer] and b.write(u32(peer)) == 4
        self.wakes.clear()
        return port, peer

    def notify(self, user: EvtchnUser, port: int) -> None:
        assert user.notify(port) == 0
        self.hypervisor.settle()


def u32(*numbers: int) -> bytes:
    return pack(f"<{len(numbers)}I", *numbers)


def ports(user: EvtchnUser, size: int = MOST_BYTES) -> list[int]:
    """What a read finds; none where it would wait."""
    data = user.read(size)
    if data == EAGAIN:
        return []
    assert isinstance(data, bytes), data
    return list(unpack(f"<{len(data) // 4}I", data))
