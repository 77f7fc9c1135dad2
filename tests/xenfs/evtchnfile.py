"""What the tests of dev/xen/evtchn share: a program's side of the file, with ioctls as the kernel passes them on.

`Desk` has domains with a device node each, all in one mount; `Program` is one open, by this very process: its structures
are in our memory, where the node has to fetch them.
"""

from __future__ import annotations

import ctypes
import os
import select
import stat
from struct import iter_unpack, pack, unpack
from typing import NamedTuple

from sysdev.evtchn import EvtchnDevice, EvtchnUser
from tests.xenfs.machine import Kernel, Reply
from xenfs.calls import Calls, DomainCalls
from xenfs.fuse import kernel as k
from xenfs.fuse.tree import Directory
from xenfs.nodes.evtchn import EvtchnFile, EvtchnNode
from xenmodel.hypervisor import Hypervisor

HANGS_MS = 10_000
WAIT, NONBLOCK = os.O_RDWR, os.O_RDWR | os.O_NONBLOCK

# numbers as the headers make them
LINUX = {
    "virq": 0x00044500, "interdomain": 0x00084501, "unbound": 0x00044502, "unbind": 0x00044503, "notify": 0x00044504,
    "reset": 0x00004505, "restrict": 0x00024506, "static": 0x00044507,
}  # fmt: skip
FREEBSD = {
    "virq": 0xC0084504, "interdomain": 0xC00C4505, "unbound": 0xC0084506, "unbind": 0x80044507, "notify": 0x80044508,
    "reset": 0x20004509,
}  # fmt: skip
FREEBSD_ON_LINUX = FREEBSD | {"unbind": 0x40044507, "notify": 0x40044508, "reset": 0x00004509}
SETS = {"linux": LINUX, "freebsd": FREEBSD, "freebsd on linux": FREEBSD_ON_LINUX}


class Answer(NamedTuple):
    """Of an ioctl: the errno or 0, what ioctl(2) returns, and the bytes that come back."""

    error: int
    result: int = 0
    data: bytes = b""


def u32(*numbers: int) -> bytes:
    return pack(f"<{len(numbers)}I", *numbers)


def written(count: int) -> Reply:
    return Reply(0, k.WRITE_OUT.pack(count, 0))


class Program:
    """One open of a domain's device. `bind`, `notify`: with the numbers of one of SETS."""

    def __init__(self, desk: Desk, domid: int, numbers: dict[str, int] = LINUX, flags: int = os.O_RDWR) -> None:
        self.kernel, self.numbers = desk.kernel, numbers
        self.fh = self.kernel.handle(f"evtchn{domid}", flags)
        node = self.kernel.session.handles[self.fh]
        assert isinstance(node, EvtchnFile)
        self.node = node

    # --- ioctls ---------------------------------------------------------------------------------------------------

    def raw(self, command: int, arg: int, data: bytes = b"", out_size: int = 0, pid: int | None = None) -> Answer:
        """What FUSE sends; `arg` is the pointer."""
        kernel = self.kernel
        kernel.unique += 2
        body = k.IOCTL_IN.pack(self.fh, 0, command, arg, len(data), out_size) + data
        length = k.IN_HEADER.size + len(body)
        caller = os.getpid() if pid is None else pid
        kernel.put(k.IN_HEADER.pack(length, k.FUSE_IOCTL, kernel.unique, 0, os.geteuid(), 0, caller, 0, 0) + body)
        reply = kernel.wait(kernel.unique)
        if reply.error:
            return Answer(reply.error)
        result, flags, ins, outs = k.IOCTL_OUT.unpack_from(reply.data)
        back = reply.data[k.IOCTL_OUT.size :]
        assert (flags, ins, outs) == (0, 0, 0) and len(back) <= out_size
        return Answer(0, result, back)

    def ioctl(self, command: int, structure: bytes) -> Answer:
        """What ioctl(2) makes of it: Linux copies in and out as the two upper bits say."""
        buffer = ctypes.create_string_buffer(structure, max(1, len(structure)))
        size = command >> 16 & 0x3FFF
        data = structure if command & 0x40000000 else b""
        return self.raw(command, ctypes.addressof(buffer), data, size if command & 0x80000000 else 0)

    def call(self, name: str, *arguments: int) -> int:
        """An ioctl as the library of that system makes it: the port, 0, or -errno."""
        command, structure = self.numbers[name], u32(*arguments)
        if name == "restrict":
            structure = pack("<H", *arguments)
        back = self.numbers is not LINUX and name in ("virq", "interdomain", "unbound")
        answer = self.ioctl(command, structure + (b"\xaa" * 4 if back else b""))
        if answer.error:
            return -answer.error
        if back:
            assert answer.result == 0 and answer.data[:-4] == structure
            return int(unpack("<I", answer.data[-4:])[0])
        assert answer.data == b""
        return answer.result

    # --- the rest -------------------------------------------------------------------------------------------------

    def send_read(self, size: int = 4096, flags: int = WAIT) -> int:
        return self.kernel.send(k.FUSE_READ, 0, k.READ_IN.pack(self.fh, 0, size, 0, 0, flags, 0))

    def read(self, size: int = 4096, flags: int = NONBLOCK) -> Reply:
        return self.kernel.wait(self.send_read(size, flags))

    def ports(self) -> list[int]:
        """What a read finds, that must find something."""
        reply = self.read()
        assert not reply.error, os.strerror(reply.error)
        return [number for (number,) in iter_unpack("<I", reply.data)]

    def write(self, data: bytes) -> Reply:
        body = k.WRITE_IN.pack(self.fh, 0, len(data), 0, 0, WAIT, 0)
        return self.kernel.wait(self.kernel.send(k.FUSE_WRITE, 0, body, data))

    def poll(self, kh: int | None = None) -> int:
        """With `kh`: somebody waits, and shall be told."""
        flags = 0 if kh is None else k.FUSE_POLL_SCHEDULE_NOTIFY
        reply = self.kernel.call(k.FUSE_POLL, 0, k.POLL_IN.pack(self.fh, kh or 0, flags, 0xFFFF))
        assert not reply.error
        return int(k.POLL_OUT.unpack(reply.data)[0])

    def interrupt(self, unique: int) -> None:
        self.kernel.send(k.FUSE_INTERRUPT, 0, k.INTERRUPT_IN.pack(unique))

    def release(self) -> None:
        assert self.kernel.call(k.FUSE_RELEASE, 0, k.RELEASE_IN.pack(self.fh, 0, 0, 0)) == Reply(0, b"")


class Desk:
    """Domains 0, 1 and 2, each with its device, as evtchn0, evtchn1 and evtchn2. `table` is what the tables say."""

    def __init__(self) -> None:
        self.hypervisor = Hypervisor()
        self.domains = {domid: self.hypervisor.create_domain(4, str(domid), domid) for domid in range(3)}
        self.table = "port\n"
        self.devices = {domid: EvtchnDevice(domain.events) for domid, domain in self.domains.items()}
        self.calls = Calls()
        self.domain_calls = {domid: DomainCalls(self.calls, domid) for domid in self.domains}
        self.nodes = {
            d: EvtchnNode(device, self.domain_calls[d], stat.S_IFREG | 0o600, lambda: self.table)
            for d, device in self.devices.items()
        }
        self.kernel = Kernel(Directory({f"evtchn{domid}": node for domid, node in self.nodes.items()}))
        self.kernel.settle = self.settle  # type: ignore[method-assign]

    def settle(self) -> None:
        """Until no job is under way: who calls first is looked at by a thread."""
        done = select.poll()
        done.register(self.calls.fd, select.POLLIN)
        while any(calls.under_way for calls in self.domain_calls.values()):
            if not self.calls.step() and any(calls.under_way for calls in self.domain_calls.values()):
                assert done.poll(HANGS_MS), "an ioctl hangs"
        self.hypervisor.settle()

    def close(self) -> None:
        for calls in self.domain_calls.values():
            calls.close()
        self.calls.close()

    def open(self, domid: int, numbers: dict[str, int] = LINUX, flags: int = os.O_RDWR) -> Program:
        return Program(self, domid, numbers, flags)

    def user(self, domid: int) -> EvtchnUser:
        """Behind the first open of a domain that made an ioctl: what it does is not delivered at once."""
        return next(iter(self.devices[domid].users))

    def pair(self, a: Program, b: Program, domid_a: int = 1, domid_b: int = 2) -> tuple[int, int]:
        """A bound pair of ports, at rest."""
        port = a.call("unbound", domid_b)
        peer = b.call("interdomain", domid_a, port)
        assert port > 0 and peer > 0, (port, peer)
        assert b.ports() == [peer] and b.write(u32(peer)) == written(4)
        return port, peer

    def told(self) -> list[int]:
        """The kh of the polls that were told since the last time."""
        assert all(code == k.FUSE_NOTIFY_POLL for code, _ in self.kernel.notices)
        found = sorted(k.NOTIFY_POLL_WAKEUP_OUT.unpack(body)[0] for _, body in self.kernel.notices)
        self.kernel.notices.clear()
        return found
