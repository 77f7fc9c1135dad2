"""Goal: dev/xen/privcmd carries the hypercalls of programs as Linux's and FreeBSD's device do, and a program that goes
for the ports of a kernel's drivers harms nobody.
Method: FUSE requests into a Session; the caller's memory is this process's own, reached by system calls as any other, at
once for a caller who is our user and in a thread for another.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import subprocess
from collections.abc import Iterator
from struct import Struct

import pytest

from blockdev.storage import MemoryStorage
from tests.abi.headers import run_c
from tests.xenfs.machine import KIB, MIB, Kernel, Machine, Reply
from xenfs.calls import JOBS_MOST, Calls, DomainCalls
from xenfs.fuse import kernel as k
from xenfs.fuse.tree import Directory
from xenfs.nodes import privcmd
from xenfs.nodes.privcmd import FREEBSD_PRIVCMD_HYPERCALL, PRIVCMD_HYPERCALL, Privcmd
from xenmodel.domain import Domain
from xenmodel.hypervisor import Hypervisor
from xenmodel.public import event_channel as ec
from xenmodel.public import version as ver
from xenmodel.public.xen import DOMID_SELF, MULTICALL_ENTRY, Hypercall

LINUX, FREEBSD = privcmd.IOCTL_PRIVCMD_HYPERCALL, privcmd.FREEBSD_IOCTL_PRIVCMD_HYPERCALL
UUID = bytes(range(16))
PID = os.getpid()
US, ANOTHER = os.geteuid(), 54321  # users
REPLY_S = 10


class Program:
    """A program in a domain: an open privcmd, and memory."""

    def __init__(self, domain: Domain, calls: Calls, kernel: Kernel | None = None, uid: int = US) -> None:
        self.calls, self.uid = calls, uid
        self.domain_calls = DomainCalls(calls, domain.domid)
        self.node = Privcmd(domain, self.domain_calls, 0o640, UUID)
        self.kernel = kernel or Kernel(Directory())
        root = self.kernel.session.root
        assert isinstance(root, Directory)
        root.add(f"privcmd{domain.domid}", self.node)
        self.fh = self.kernel.handle(f"privcmd{domain.domid}", os.O_RDWR)
        self.memory = ctypes.create_string_buffer(4096)
        self.at = ctypes.addressof(self.memory)
        self.argument = self.at + 1024

    def begin(self, command: int, arg: int = 0, data: bytes = b"", pid: int = PID, out_size: int | None = None) -> int:
        """Its number; until turn() the answer is not there, if the memory has to be asked for by a thread."""
        kernel = self.kernel
        kernel.unique += 2
        body = k.IOCTL_IN.pack(self.fh, 0, command, arg, len(data), len(data) if out_size is None else out_size) + data
        header = k.IN_HEADER.pack(k.IN_HEADER.size + len(body), k.FUSE_IOCTL, kernel.unique, 0, self.uid, 0, pid, 0, 0)
        kernel.put(header + body)
        return kernel.unique

    def turn(self) -> None:
        """Wait until a thread has done something, and go on with that."""
        assert select.select([self.calls.fd], [], [], REPLY_S)[0], "no thread did anything"
        with self.calls._done_lock:  # it says so a moment before
            pass
        self.calls.step()

    def ioctl(self, command: int, arg: int = 0, data: bytes = b"", pid: int = PID, out_size: int | None = None) -> Reply:
        unique = self.begin(command, arg, data, pid, out_size)
        while unique not in self.kernel.replies:
            self.turn()
        assert not self.domain_calls.under_way
        return self.kernel.wait(unique)

    def close(self) -> None:
        if not self.domain_calls.closed:
            self.domain_calls.close()

    def hypercall(self, op: int, *args: int) -> int:
        """The address of its structure."""
        self.memory[: PRIVCMD_HYPERCALL.size] = PRIVCMD_HYPERCALL.pack(op, *(*args, 0, 0, 0, 0, 0)[:5])
        return self.at

    def call(self, op: int, *args: int) -> int:
        """The result of a hypercall, or -errno."""
        reply = self.ioctl(LINUX, self.hypercall(op, *args))
        if reply.error:
            return -reply.error
        result, flags, ins, outs = k.IOCTL_OUT.unpack(reply.data)
        assert (flags, ins, outs) == (0, 0, 0)
        return int(result)

    def put(self, data: bytes) -> int:
        self.memory[1024 : 1024 + len(data)] = data
        return self.argument

    def get(self, layout: Struct) -> tuple[int, ...]:
        return layout.unpack(self.memory[1024 : 1024 + layout.size])

    def event(self, cmd: int, layout: Struct, *fields: int | bytes) -> int:
        return self.call(Hypercall.event_channel_op, cmd, self.put(layout.pack(*fields)))


def guest() -> Domain:
    hypervisor = Hypervisor()
    hypervisor.create_domain(4, "Domain-0")
    return hypervisor.create_domain(4, "guest")


@pytest.fixture
def calls() -> Iterator[Calls]:
    calls = Calls()
    yield calls
    calls.close()


@pytest.fixture(params=[US, ANOTHER], ids=["our user", "another"])
def program(calls: Calls, request: pytest.FixtureRequest) -> Iterator[Program]:
    program = Program(guest(), calls, uid=request.param)
    yield program
    program.close()


@pytest.fixture
def waiting(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """One whose memory is reached by a thread, for which the loop does not wait, not even a moment."""
    monkeypatch.setattr(Calls, "_await", lambda *_: None)
    program = Program(guest(), calls, uid=ANOTHER)
    yield program
    program.close()


# --- the device ------------------------------------------------------------------------------------------------------------


def test_numbers():
    """Goal: numbers and structures are the C headers'.  Method: print them; FreeBSD's structure as it is there."""
    freebsd = "struct freebsd { unsigned long op; unsigned long arg[5]; long retval; };"
    said = run_c(
        "xen/sys/privcmd.h",
        [
            r'printf("linux\t%u %zu\n", IOCTL_PRIVCMD_HYPERCALL, sizeof(privcmd_hypercall_t));',
            r'printf("freebsd\t%u %zu\n", (unsigned)_IOWR(69, 0, struct freebsd), sizeof(struct freebsd));',
            r'printf("unimplemented\t%u\n", IOCTL_PRIVCMD_UNIMPLEMENTED);',
        ],
        prologue="#include <sys/ioctl.h>\n#include <xen/xen.h>\n" + freebsd,
    )
    assert said == {
        "linux": f"{LINUX} {PRIVCMD_HYPERCALL.size}",
        "freebsd": f"{FREEBSD} {FREEBSD_PRIVCMD_HYPERCALL.size}",
        "unimplemented": f"{0x50FF}",
    }


def test_hypercalls(program: Program):
    """Goal: results come back as the ioctl's, and structures in the caller's memory.  Method: one call of each kind."""
    assert program.call(Hypercall.xen_version, ver.XENVER_version) == 4 << 16 | 17
    assert program.call(Hypercall.xen_version | 1 << 32, ver.XENVER_pagesize) == 4096
    assert program.call(Hypercall.xen_version, ver.XENVER_guest_handle, program.argument) == 0
    assert program.memory[1024:1040] == UUID
    assert program.event(ec.EVTCHNOP_alloc_unbound, ec.ALLOC_UNBOUND, DOMID_SELF, 0, 0) == 0
    assert program.get(ec.ALLOC_UNBOUND) == (DOMID_SELF, 0, 1)
    owner = program.node.domain.events.channels[1].owner
    assert owner.endswith(f"[{PID}]") and len(owner) > len(f"[{PID}]")
    entry = MULTICALL_ENTRY.pack(Hypercall.memory_op, 0, *[0] * 6)
    assert program.call(Hypercall.multicall, program.put(entry), 1) == 0
    assert program.get(MULTICALL_ENTRY)[1] == 2**64 - errno.ENOSYS


def test_errors(program: Program):
    """Goal: each negative result is that errno.  Method: a bad pointer, another domain's port, no such call or domain."""
    assert program.call(Hypercall.memory_op, 0, program.argument) == -errno.ENOSYS
    assert program.call(0xFFFF_FFFF_FFFF_FFFF) == -errno.ENOSYS
    assert program.call(Hypercall.xen_version, ver.XENVER_extraversion, 8) == -errno.EFAULT
    assert program.call(Hypercall.xen_version, ver.XENVER_extraversion, 2**64 - 1) == -errno.EFAULT
    assert program.event(ec.EVTCHNOP_status, ec.STATUS, 0, 1, 0, 0, b"") == -errno.EPERM
    assert program.event(ec.EVTCHNOP_status, ec.STATUS, 9, 1, 0, 0, b"") == -errno.ESRCH
    for arg in (0, 8, 2**64 - 8):
        assert program.ioctl(LINUX, arg) == Reply(errno.EFAULT, b"")


def test_freebsd(program: Program):
    """Goal: FreeBSD's ioctl has the result in the structure that travels with it.  Method: result, error, bad size."""
    data = FREEBSD_PRIVCMD_HYPERCALL.pack(Hypercall.xen_version, 0, 0, 0, 0, 0, -1)
    reply = program.ioctl(FREEBSD, program.at, data)
    assert reply == Reply(0, k.IOCTL_OUT.pack(0, 0, 0, 0) + data[:-8] + Struct("<q").pack(4 << 16 | 17))
    data = FREEBSD_PRIVCMD_HYPERCALL.pack(Hypercall.xen_version, ver.XENVER_changeset, program.argument, 0, 0, 0, 0)
    assert not program.ioctl(FREEBSD, program.at, data).error
    assert program.memory[1024:1036] == b"unavailable\0"
    bad = FREEBSD_PRIVCMD_HYPERCALL.pack(Hypercall.xen_version, ver.XENVER_changeset, 8, 0, 0, 0, 0)
    assert program.ioctl(FREEBSD, program.at, bad) == Reply(errno.EFAULT, b"")
    assert program.ioctl(FREEBSD, program.at, data[:-1]) == Reply(errno.EINVAL, b"")
    assert program.ioctl(FREEBSD, program.at, data, out_size=0) == Reply(errno.EINVAL, b"")


OTHERS = [0x50FF, 0x00185002, 0x00205004, 0x00105005, 0x00025006, 0x00285007, 0x00385000, 0, 0x4501]


@pytest.mark.parametrize("command", OTHERS)
def test_other_ioctls(program: Program, command: int):
    """Goal: what libxc probes for is not there, with the errno that it takes for that.
    Method: UNIMPLEMENTED, MMAP, MMAPBATCH_V2, DM_OP, RESTRICT, MMAP_RESOURCE, and numbers that are none."""
    assert program.ioctl(command, program.at) == Reply(errno.ENOTTY, b"")


def test_a_caller_who_is_not_there(program: Program):
    """Goal: no memory is not some other memory.  Method: a pid of a namespace that is not ours, and one that has ended."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    for pid in (0, gone.pid):
        assert program.ioctl(LINUX, program.at, pid=pid) == Reply(errno.ESRCH, b"")


def test_the_file(program: Program):
    """Goal: its mode, and that it has no content.  Method: GETATTR, READ, WRITE."""
    kernel, ino = program.kernel, program.kernel.walk("privcmd1")
    reply = kernel.call(k.FUSE_GETATTR, ino, k.GETATTR_IN.pack(0, 0, 0))
    assert program.node.get_mode() & 0o777 == 0o640 and not reply.error
    assert kernel.read(program.fh, 0, 10) == Reply(errno.EINVAL, b"")
    assert kernel.write(program.fh, 0, b"x") == Reply(errno.EINVAL, b"")


def test_the_domain_is_gone(program: Program):
    """Goal: an open file whose domain is gone, also if another has its number, says so.  Method: destroy, make, ask."""
    hypervisor, domid = program.node.domain.hypervisor, program.node.domain.domid
    hypervisor.destroy_domain(domid)
    for _ in range(2):
        assert program.call(Hypercall.xen_version, ver.XENVER_version) == -errno.ENODEV
        assert program.kernel.open(program.kernel.walk("privcmd1"), os.O_RDWR) == Reply(errno.ENODEV, b"")
        if domid not in hypervisor.domains:
            hypervisor.create_domain(4, "another", domid)


@pytest.mark.parametrize("successor", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_the_domain_goes_meanwhile(waiting: Program, turns: int, successor: bool):
    """Goal: an ioctl that waits for its caller's memory when the domain goes says so, and does nothing for who has its
    number next.  Method: the end while it is asked who calls, and at each of the three copies of one that makes a port."""
    hypervisor, domid = waiting.node.domain.hypervisor, waiting.node.domain.domid
    bind = waiting.put(ec.BIND_IPI.pack(0, 0))
    unique = waiting.begin(LINUX, waiting.hypercall(Hypercall.event_channel_op, ec.EVTCHNOP_bind_ipi, bind))
    for _ in range(turns):
        waiting.turn()
    assert unique not in waiting.kernel.replies and len(waiting.node.domain.events.channels) == (turns == 3)
    hypervisor.destroy_domain(domid)
    if successor:
        hypervisor.create_domain(4, "another", domid)
    waiting.close()
    while unique not in waiting.kernel.replies:
        waiting.turn()
    assert waiting.kernel.replies[unique] == Reply(errno.ENODEV, b"")
    assert not successor or not hypervisor.domains[domid].events.channels


def test_many_at_once(waiting: Program):
    """Goal: several ioctls of one program wait side by side, each gets its own answer, and beyond a number there is none.
    Method: as many as a guest may have and one more, for versions and pages in turn; then one again."""
    cases = [(ver.XENVER_version, 4 << 16 | 17), (ver.XENVER_pagesize, 4096)]
    for i, (cmd, _) in enumerate(cases):
        waiting.memory[i * 64 : i * 64 + 48] = PRIVCMD_HYPERCALL.pack(Hypercall.xen_version, cmd, 0, 0, 0, 0)
    asked = [waiting.begin(LINUX, waiting.at + i % 2 * 64) for i in range(JOBS_MOST + 1)]
    assert waiting.kernel.replies == {asked.pop(): Reply(errno.EAGAIN, b"")}
    while not set(asked) <= waiting.kernel.replies.keys():
        waiting.turn()
    results = [k.IOCTL_OUT.unpack(waiting.kernel.replies[unique].data)[0] for unique in asked]
    assert results == [expected for _, expected in cases] * (JOBS_MOST // 2)
    assert waiting.call(Hypercall.xen_version, ver.XENVER_pagesize) == 4096


# --- ports of drivers ------------------------------------------------------------------------------------------------------


DISK = 4 * MIB


@pytest.fixture
def machine() -> Iterator[Machine]:
    disks = {"a": {"xvda": MemoryStorage(DISK // 512)}, "b": {"xvda": MemoryStorage(DISK // 512)}}
    with Machine(disks) as machine:
        yield machine


def disk(machine: Machine, guest: str) -> int:
    domid = machine.guests[guest].domain.domid
    return machine.kernel.handle(f"domains/{domid}/dev/xvda", os.O_RDWR)


@pytest.mark.parametrize("who", ["a", "dom0"])
def test_programs_cannot_close_ports_of_drivers(machine: Machine, who: str):
    """Goal: no program takes a disk away by closing its driver's port.
    Method: as the guest or as domain 0, with reads under way: close each port that has a handler, then reset all."""
    kernel = machine.kernel
    domain = machine.guests["a"].domain if who == "a" else machine.world.hypervisor.domains[0]
    program, fh = Program(domain, machine.world.devices.calls, kernel), disk(machine, "a")
    asked = [kernel.send_read(fh, i * 64 * KIB, 64 * KIB) for i in range(20)]
    ports = {port for port, channel in domain.events.channels.items() if channel.handler is not None}
    assert ports and {program.event(ec.EVTCHNOP_close, ec.PORT, port) for port in ports} == {-errno.EBUSY}
    assert program.event(ec.EVTCHNOP_reset, ec.RESET, DOMID_SELF) == 0 and set(domain.events.channels) == ports
    kernel.settle()
    assert set(asked) <= kernel.replies.keys()
    assert kernel.write(fh, 0, b"y" * 4 * KIB) == Reply(0, k.WRITE_OUT.pack(4 * KIB, 0))
    assert kernel.read(fh, 0, 4 * KIB).data == b"y" * 4 * KIB
    program.close()


@pytest.mark.parametrize("who", ["a", "dom0"])
@pytest.mark.parametrize("how", ["close", "reset", "garble"])
@pytest.mark.parametrize("when", ["idle", "busy"])
def test_ports_of_running_drivers(machine: Machine, who: str, how: str, when: str):
    """Goal: nothing crashes when the ports of drivers and of the store go away under them, whoever did it, or others get
    their numbers; the other guest's disk goes on if they were not domain 0's; and when the guests are destroyed nobody waits
    any more.  Method: in the guest or in domain 0: close each port, reset all, or bind others in their place; with requests
    under way or not; then more requests and events."""
    world, kernel = machine.world, machine.kernel
    victim = machine.guests["a"].domain
    domain = victim if who == "a" else world.hypervisor.domains[0]
    program = Program(domain, world.devices.calls, kernel)
    fhs = {guest: disk(machine, guest) for guest in "ab"}
    assert kernel.read(fhs["a"], 0, 4 * KIB).data == bytes(4 * KIB)
    if when == "busy":
        for i in range(20):
            kernel.send_read(fhs["a"], i * 64 * KIB, 64 * KIB)
    ports = sorted(domain.events.channels)
    assert len(ports) > 1
    if how == "reset":
        assert domain.events.reset() == 0
    else:
        assert [domain.events.close(port) for port in ports] == [0] * len(ports)
    assert not domain.events.channels
    if how == "garble":
        for _ in ports:
            assert program.event(ec.EVTCHNOP_bind_ipi, ec.BIND_IPI, 0, 0) == 0
        assert sorted(domain.events.channels) == ports
        for port in ports:
            assert program.event(ec.EVTCHNOP_send, ec.PORT, port) == 0
            assert program.event(ec.EVTCHNOP_unmask, ec.PORT, port) == 0
    asked = []
    for i in range(40):
        asked.append(kernel.send_read(fhs["a"], i * 4 * KIB, 4 * KIB))
        asked.append(kernel.send_write(fhs["a"], i * 4 * KIB, b"x" * 4 * KIB))
        kernel.settle()
    if who == "a":
        assert kernel.write(fhs["b"], 0, b"y" * 4 * KIB) == Reply(0, k.WRITE_OUT.pack(4 * KIB, 0))
        assert kernel.read(fhs["b"], 0, 4 * KIB).data == b"y" * 4 * KIB
    assert program.call(Hypercall.xen_version, ver.XENVER_version) == 4 << 16 | 17
    assert not set(asked) <= kernel.replies.keys(), "the driver lost nothing: were these its ports?"
    for guest in list(machine.guests.values()):
        world.destroy(guest.domain.domid)
        kernel.settle()
    assert set(asked) <= kernel.replies.keys()
    program.close()
