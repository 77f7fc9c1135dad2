"""What the tests of hypercalls share: three domains, and programs in them whose memory has holes and a read-only part."""

from __future__ import annotations

import errno
from struct import Struct
from typing import NamedTuple

from sysdev.hypercall import Hypercalls
from sysdev.steps import Job, Read, Step, Write
from xenmodel.domain import Domain
from xenmodel.hypervisor import Hypervisor
from xenmodel.public import event_channel as ec
from xenmodel.public.xen import Hypercall

AT = 0x10000  # where arguments are
READONLY = 0x20000
SIZE = 0x2000
NOWHERE = 0x7000_0000
UUID = bytes(range(16))
NOBODY = 99
U64 = 2**64 - 1


class Ram:
    """A caller's memory: SIZE bytes at AT, and as many at READONLY that cannot be written. `transfers` counts."""

    def __init__(self) -> None:
        self.parts = {AT: bytearray(b"\xee" * SIZE), READONLY: bytearray(SIZE)}
        self.transfers = 0

    def _part(self, address: int, length: int) -> tuple[int, int]:
        self.transfers += 1
        for base in self.parts:
            if base <= address and address + length <= base + SIZE:
                return base, address - base
        raise OSError(errno.EFAULT, "a bad address")

    def read(self, address: int, length: int) -> bytes:
        base, at = self._part(address, length)
        return bytes(self.parts[base][at : at + length])

    def write(self, address: int, data: bytes) -> None:
        base, at = self._part(address, len(data))
        if base == READONLY:
            raise OSError(errno.EFAULT, "a read-only address")
        self.parts[base][at : at + len(data)] = data

    def do(self, step: Step) -> bytes | None:
        if isinstance(step, Read):
            return self.read(step.address, step.length)
        assert isinstance(step, Write), f"a hypercall asks for {step}"
        self.write(step.address, step.data)
        return None

    def fill(self, data: bytes, address: int = AT) -> None:
        base, at = self._part(address, len(data))
        self.parts[base][at : at + len(data)] = data


def run(job: Job[int], ram: Ram) -> int:
    """What xenfs/calls.py does, at once: the job's steps in that memory; its result."""
    try:
        step = next(job)
        while True:
            try:
                result = ram.do(step)
            except OSError as error:
                step = job.throw(error)
            else:
                step = job.send(result)
    except StopIteration as stop:
        return int(stop.value)


class Caller:
    """A program in a domain."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.ram = Ram()
        self.calls = Hypercalls(domain, lambda: "prog[7]", UUID)

    def call(self, op: int, *args: int) -> int:
        return run(self.begin(op, *args), self.ram)

    def begin(self, op: int, *args: int) -> Job[int]:
        """A call that has not got anywhere yet."""
        return self.calls.call(op, (*args, 0, 0, 0, 0, 0)[:5])

    def event(self, cmd: int, layout: Struct, *fields: int | bytes, at: int = AT) -> int:
        self.ram.fill(layout.pack(*fields), at)
        return self.call(Hypercall.event_channel_op, cmd, at)

    def out(self, layout: Struct) -> tuple[int, ...]:
        return layout.unpack(self.ram.read(AT, layout.size))

    def grant(self, cmd: int, layout: Struct, *fields: int, count: int = 1, at: int = AT) -> int:
        self.ram.fill(layout.pack(*fields), at)
        return self.call(Hypercall.grant_table_op, cmd, at, count)

    def status(self, domid: int, port: int, u: bytes = b"12345678") -> tuple[int, ...]:
        """Result, status, vcpu; and u."""
        result = self.event(ec.EVTCHNOP_status, ec.STATUS, domid, port, 7, 7, u)
        return result, *self.out(ec.STATUS)[2:]


class World(NamedTuple):
    hypervisor: Hypervisor
    dom0: Caller
    a: Caller  # domain 1
    b: Caller  # domain 2


def make_world() -> World:
    hypervisor = Hypervisor()
    return World(hypervisor, *(Caller(hypervisor.create_domain(4, str(domid), domid)) for domid in range(3)))
