"""hypercall.py: the hypercalls that a domain's programs make through its privcmd device, xen/common/{kernel,event_channel,
grant_table,multicall}.c: what Xen does with numbers and pointers of a caller who may have made them up.

Called by xenfs/nodes/privcmd.py, as jobs of steps.py; calls the domain's EventChannels and looks at its GrantTable.
Results are the hypercall's: 0 or more, or -XEN_E*. Arguments are u64, as the caller's registers; Xen looks at the low half
of commands and counts only.

Invariants: an argument is copied in, whole, before it is looked at, and what is found goes out in one copy; all that an
operation changes changes between those two, when nobody else has a turn; a fault in that last copy undoes nothing (the
port is bound, as in Xen); when a copy is done the domain may be gone (ESRCH), and nothing is done any more; a domain acts
for itself, domain 0 for all; a call costs at most MULTICALL_MOST operations of at most NR_PORTS steps. Unlike
in Xen, what a driver of ours uses cannot be closed (EBUSY), and a reset spares it: on Xen only the kernel makes hypercalls
for its own ports, and its users would wait for ever. The ports of programs are closed whoever uses them.

Left out, as -XEN_ENOSYS: the grant operations that change something (gntdev and gntalloc do that), the FIFO ABI, and all
other hypercalls, memory_op and those of toolstacks among them. Every domain has vCPU 0 only, and no PIRQs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from struct import Struct
from types import MappingProxyType
from typing import Any

from sysdev.steps import Job, Read, Write
from xenmodel.domain import Domain
from xenmodel.event_channel import NR_PORTS, Channel, State
from xenmodel.public import event_channel as ec
from xenmodel.public import grant_table as gt
from xenmodel.public import version as ver
from xenmodel.public.errno import (
    XEN_E2BIG,
    XEN_EBUSY,
    XEN_EFAULT,
    XEN_EINVAL,
    XEN_ENODATA,
    XEN_ENOENT,
    XEN_ENOSYS,
    XEN_EOPNOTSUPP,
    XEN_EPERM,
    XEN_ESRCH,
)
from xenmodel.public.xen import (
    DOMID_SELF,
    MULTICALL,
    MULTICALL_ENTRY,
    VIRQ_DEBUG,
    VIRQ_TIMER,
    VIRQ_XENOPROF,
    VIRQ_XENPMU,
    Hypercall,
)
from xenmodel.types import PAGE_SIZE, Domid

MULTICALL_MOST = 64  # calls in one list; libxc's longest is four, Xen takes any number and pauses in between
_U32, _U64 = 2**32 - 1, 2**64 - 1
_RESULT = Struct("<Q")
_GNTTABOP_CMD_MASK = 0xFFF  # the rest is for Xen's own use when it goes on with a long operation
_PER_VCPU_VIRQS = frozenset({VIRQ_TIMER, VIRQ_DEBUG, VIRQ_XENOPROF, VIRQ_XENPMU})  # on x86 all others are global

# What XENVER_* say. The interface is that of Xen 4.17; who made it and how is what we are.
VERSION = 4 << 16 | 17
EXTRAVERSION = b".0-xenfs"
COMPILER, COMPILE_BY, COMPILE_DOMAIN, COMPILE_DATE = b"Python", b"xenfs", b"", b""
CAPABILITIES = b"xen-3.0-x86_64 hvm-3.0-x86_64"
CHANGESET = b"unavailable"
VIRT_START = 0xFFFF_8000_0000_0000  # HYPERVISOR_VIRT_START of x86_64, part of the ABI
GRANT_VERSION = 1
_DENIED = b"<denied>\0"
# A guest names frames by its own numbers, not the machine's.
FEATURES = (
    1 << ver.XENFEAT_writable_page_tables | 1 << ver.XENFEAT_auto_translated_physmap | 1 << ver.XENFEAT_not_direct_mapped
)

Fields = tuple[int | bytes, ...]  # of an argument structure


class _Refused(Exception):
    """The hypercall ends here with -`number`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Hypercalls:
    """What one caller asks of Xen as `domain`. `owner()` names him for the tables of ports; `uuid` is the domain's."""

    def __init__(self, domain: Domain, owner: Callable[[], str] = lambda: "", uuid: bytes = bytes(16)) -> None:
        assert len(uuid) == ver.DOMAIN_HANDLE.size, f"a uuid of {len(uuid)} bytes"
        self.domain = domain
        self.owner = owner
        self.uuid = uuid

    def call(self, op: int, args: tuple[int, ...]) -> Job[int]:
        """The result of __HYPERVISOR_`op`, or -XEN_E*. `args` are at least five."""
        handler = _HYPERCALLS.get(op)
        if handler is None:
            return -XEN_ENOSYS
        try:
            return (yield from handler(self, args))
        except _Refused as refused:
            return -refused.number

    def multicall(self, args: tuple[int, ...]) -> Job[int]:
        """A list of calls, each with its result beside it. It ends early only where an entry cannot be copied."""
        address, count = args[0], args[1] & _U32
        if count > MULTICALL_MOST:
            return -XEN_E2BIG
        for at in range(address, address + count * MULTICALL.size, MULTICALL.size):
            op, _, *inner = MULTICALL_ENTRY.unpack((yield from self._copy_in(at, MULTICALL.size)))
            result = -XEN_EINVAL if op == Hypercall.multicall else (yield from self.call(op, tuple(inner)))
            yield from self._copy_out(at + MULTICALL["result"], _RESULT.pack(result & _U64))
        return 0

    def xen_version(self, args: tuple[int, ...]) -> Job[int]:
        cmd, address = args[0] & _U32, args[1]
        if cmd == ver.XENVER_version:
            return VERSION
        if cmd == ver.XENVER_pagesize:
            return PAGE_SIZE if not address else -XEN_EINVAL
        if cmd == ver.XENVER_build_id:
            return (yield from self._build_id(address))
        if cmd == ver.XENVER_get_features:
            submap_idx, _ = ver.FEATURE_INFO.unpack((yield from self._copy_in(address, ver.FEATURE_INFO.size)))
            if submap_idx >= ver.XENFEAT_NR_SUBMAPS:
                return -XEN_EINVAL
            yield from self._copy_out(address, ver.FEATURE_INFO.pack(submap_idx, self._features()))
            return 0
        text = self._text(cmd)
        if text is None:
            return -XEN_ENOSYS
        yield from self._copy_out(address, text)
        return 0

    def event_channel_op(self, args: tuple[int, ...]) -> Job[int]:
        cmd, address = args[0] & _U32, args[1]
        if cmd not in _EVENT_OPS:
            return -XEN_ENOSYS
        layout, operation = _EVENT_OPS[cmd]
        out = operation(self, *layout.unpack((yield from self._copy_in(address, layout.size))))
        if out is not None:
            yield from self._copy_out(address, layout.pack(*out))
        return 0

    def grant_table_op(self, args: tuple[int, ...]) -> Job[int]:
        cmd, address, count = args[0] & _U32, args[1], args[2] & _U32
        if count >> 31 or cmd & ~_GNTTABOP_CMD_MASK:
            return -XEN_EINVAL
        if cmd == gt.GNTTABOP_query_size:
            return (yield from self._query_size(address, count))
        if cmd == gt.GNTTABOP_get_version:  # one, whatever `count` says
            domid, pad, _ = gt.GET_VERSION.unpack((yield from self._copy_in(address, gt.GET_VERSION.size)))
            self._subject(domid)
            yield from self._copy_out(address, gt.GET_VERSION.pack(domid, pad, GRANT_VERSION))
            return 0
        return -XEN_ENOSYS

    # --- the caller's memory, and whom he may ask about --------------------------------------------------------------------

    def _copy_in(self, address: int, length: int) -> Job[bytes]:
        data: bytes = yield from self._copy(Read(address, length), length)
        return data

    def _copy_out(self, address: int, data: bytes) -> Job[None]:
        yield from self._copy(Write(address, data), len(data))

    def _copy(self, step: Read | Write, length: int) -> Job[Any]:
        """One copy, before and after which the domain has to be there: it can take any time."""
        if step.address + length > _U64:
            raise _Refused(XEN_EFAULT)
        self._check_there()
        try:
            result = yield step
        except OSError:
            raise _Refused(XEN_EFAULT) from None
        self._check_there()
        return result

    def _check_there(self) -> None:
        """Another domain may have its number by now."""
        if self._find(self.domain.domid) is not self.domain:
            raise _Refused(XEN_ESRCH)

    def _find(self, domid: int) -> Domain | None:
        return self.domain if domid == DOMID_SELF else self.domain.hypervisor.domains.get(domid)

    def _privileged(self) -> bool:
        return self.domain.domid == 0

    def _may(self, subject: Domain) -> bool:
        """xsm_default_action(XSM_TARGET)."""
        return subject is self.domain or self._privileged()

    def _subject(self, domid: int) -> Domain:
        """The domain that is meant, if it is there (ESRCH) and the caller may act for it (EPERM)."""
        subject = self._find(domid)
        if subject is None:
            raise _Refused(XEN_ESRCH)
        if not self._may(subject):
            raise _Refused(XEN_EPERM)
        return subject

    # --- xen_version -------------------------------------------------------------------------------------------------------

    def _text(self, cmd: int) -> bytes | None:
        """What goes out for a command that only tells; None if there is no such command."""
        if cmd == ver.XENVER_extraversion:
            return EXTRAVERSION.ljust(ver.XEN_EXTRAVERSION_LEN, b"\0")
        if cmd == ver.XENVER_compile_info:
            return ver.COMPILE_INFO.pack(COMPILER, COMPILE_BY, COMPILE_DOMAIN, COMPILE_DATE)
        if cmd == ver.XENVER_capabilities:
            return CAPABILITIES.ljust(ver.XEN_CAPABILITIES_INFO_LEN, b"\0")
        if cmd == ver.XENVER_changeset:
            return CHANGESET.ljust(ver.XEN_CHANGESET_INFO_LEN, b"\0")
        if cmd == ver.XENVER_platform_parameters:
            return ver.PLATFORM_PARAMETERS.pack(VIRT_START)
        if cmd == ver.XENVER_guest_handle:
            return self.uuid
        if cmd == ver.XENVER_commandline:
            return bytes(ver.COMMANDLINE.size) if self._privileged() else _DENIED
        return None

    def _features(self) -> int:
        return FEATURES | (1 << ver.XENFEAT_dom0 if self._privileged() else 0)

    def _build_id(self, address: int) -> Job[int]:
        """There is none; a caller who wants it, and not only its size, has to ask properly all the same."""
        if not self._privileged():
            return -XEN_EPERM
        if address:
            (length,) = ver.BUILD_ID_LEN.unpack((yield from self._copy_in(address, ver.BUILD_ID_LEN.size)))
            if not length:
                return -XEN_EINVAL
        return -XEN_ENODATA

    # --- grant_table_op ----------------------------------------------------------------------------------------------------

    def _query_size(self, address: int, count: int) -> Job[int]:
        if count != 1:
            return -XEN_EINVAL
        domid, frames, most, _ = gt.QUERY_SIZE.unpack((yield from self._copy_in(address, gt.QUERY_SIZE.size)))
        subject = self._find(domid)
        if subject is None:
            status = gt.GNTST_bad_domain
        elif not self._may(subject):
            status = gt.GNTST_permission_denied
        else:
            status, frames, most = gt.GNTST_okay, subject.grants.frames, subject.grants.max_frames
        yield from self._copy_out(address, gt.QUERY_SIZE.pack(domid, frames, most, status))
        return 0

    # --- event_channel_op: each takes the fields of its structure and returns them if they are to be copied out ------------

    def _made(self, subject: Domain, port: int) -> int:
        """A new port, with its owner's name."""
        if port < 0:
            raise _Refused(-port)
        subject.events.channels[port].owner = self.owner()
        return port

    def _channel(self, subject: Domain, port: int) -> Channel:
        """Its record, closed or not. Port 0 exists and is closed; with it lists of ports begin."""
        if port >= NR_PORTS:
            raise _Refused(XEN_EINVAL)
        return subject.events.channels.get(port) or Channel(State.CLOSED)

    def _alloc_unbound(self, domid: int, remote_domid: int, _port: int) -> Fields:
        subject = self._subject(domid)
        remote = self.domain.domid if remote_domid == DOMID_SELF else Domid(remote_domid)
        return domid, remote_domid, self._made(subject, subject.events.alloc_unbound(remote))

    def _bind_interdomain(self, remote_domid: int, remote_port: int, _local_port: int) -> Fields:
        port = self.domain.events.bind_interdomain(Domid(remote_domid), remote_port)
        return remote_domid, remote_port, self._made(self.domain, port)

    def _bind_virq(self, virq: int, vcpu: int, _port: int) -> Fields:
        if vcpu:
            raise _Refused(XEN_ENOENT if virq in _PER_VCPU_VIRQS else XEN_EINVAL)
        return virq, vcpu, self._made(self.domain, self.domain.events.bind_virq(virq))

    def _bind_pirq(self, _pirq: int, _flags: int, _port: int) -> Fields:
        raise _Refused(XEN_EINVAL)

    def _bind_ipi(self, vcpu: int, _port: int) -> Fields:
        if vcpu:
            raise _Refused(XEN_ENOENT)
        return vcpu, self._made(self.domain, self.domain.events.bind_ipi())

    def _close(self, port: int) -> None:
        if _is_drivers(self._channel(self.domain, port)):
            raise _Refused(XEN_EBUSY)
        self._done(self.domain.events.close(port))

    def _send(self, port: int) -> None:
        self._done(self.domain.events.send(port))

    def _status(self, domid: int, port: int, _status: int, _vcpu: int, u: bytes) -> Fields:
        subject = self._find(domid)
        if subject is None:
            raise _Refused(XEN_ESRCH)
        channel = self._channel(subject, port)
        if not self._may(subject):
            raise _Refused(XEN_EPERM)
        told = b""
        if channel.state is State.UNBOUND:
            told = ec.STATUS_UNBOUND.pack(channel.remote_domid)
        elif channel.state is State.INTERDOMAIN:
            told = ec.STATUS_INTERDOMAIN.pack(channel.remote_domid, channel.remote_port)
        elif channel.state is State.VIRQ:
            told = ec.STATUS_VIRQ.pack(channel.virq)
        return domid, port, int(channel.state), 0, told + u[len(told) :]

    def _bind_vcpu(self, port: int, vcpu: int) -> None:
        """To where it is anyway. A virq of each vCPU, an IPI and a closed port cannot be moved."""
        if vcpu:
            raise _Refused(XEN_ENOENT)
        channel = self._channel(self.domain, port)
        if channel.state in (State.CLOSED, State.IPI) or (channel.state is State.VIRQ and channel.virq in _PER_VCPU_VIRQS):
            raise _Refused(XEN_EINVAL)

    def _unmask(self, port: int) -> None:
        if self._channel(self.domain, port).state is not State.CLOSED:
            self._done(self.domain.events.unmask(port))

    def _reset(self, domid: int) -> None:
        subject = self._subject(domid)
        if subject is not self.domain:
            raise _Refused(XEN_EINVAL)  # only while a toolstack has it paused, and none of ours does
        for port, channel in list(subject.events.channels.items()):
            if not _is_drivers(channel):
                self._done(subject.events.close(port))

    def _init_control(self, _gfn: int, _offset: int, _vcpu: int, _link_bits: int, _pad: bytes) -> None:
        """Where a guest asks for the FIFO ABI: as in a Xen before 4.4, which has none. It then takes the 2-level one."""
        raise _Refused(XEN_ENOSYS)

    def _expand_array(self, _gfn: int) -> None:
        raise _Refused(XEN_EOPNOTSUPP)

    def _set_priority(self, port: int, _priority: int) -> None:
        self._channel(self.domain, port)
        raise _Refused(XEN_ENOSYS)

    def _done(self, result: int) -> None:
        if result < 0:
            raise _Refused(-result)


def _is_drivers(channel: Channel) -> bool:
    """Does a driver in the domain's kernel, which is us, use this port?"""
    return channel.handler is not None and not channel.owner


_HYPERCALLS: Mapping[int, Callable[[Hypercalls, tuple[int, ...]], Job[int]]] = MappingProxyType(
    {
        Hypercall.multicall: Hypercalls.multicall,
        Hypercall.xen_version: Hypercalls.xen_version,
        Hypercall.grant_table_op: Hypercalls.grant_table_op,
        Hypercall.event_channel_op: Hypercalls.event_channel_op,
    }
)
_EVENT_OPS: Mapping[int, tuple[Struct, Callable[..., Fields | None]]] = MappingProxyType(
    {
        ec.EVTCHNOP_bind_interdomain: (ec.BIND_INTERDOMAIN, Hypercalls._bind_interdomain),
        ec.EVTCHNOP_bind_virq: (ec.BIND_VIRQ, Hypercalls._bind_virq),
        ec.EVTCHNOP_bind_pirq: (ec.BIND_PIRQ, Hypercalls._bind_pirq),
        ec.EVTCHNOP_close: (ec.PORT, Hypercalls._close),
        ec.EVTCHNOP_send: (ec.PORT, Hypercalls._send),
        ec.EVTCHNOP_status: (ec.STATUS, Hypercalls._status),
        ec.EVTCHNOP_alloc_unbound: (ec.ALLOC_UNBOUND, Hypercalls._alloc_unbound),
        ec.EVTCHNOP_bind_ipi: (ec.BIND_IPI, Hypercalls._bind_ipi),
        ec.EVTCHNOP_bind_vcpu: (ec.BIND_VCPU, Hypercalls._bind_vcpu),
        ec.EVTCHNOP_unmask: (ec.PORT, Hypercalls._unmask),
        ec.EVTCHNOP_reset: (ec.RESET, Hypercalls._reset),
        ec.EVTCHNOP_init_control: (ec.INIT_CONTROL, Hypercalls._init_control),
        ec.EVTCHNOP_expand_array: (ec.EXPAND_ARRAY, Hypercalls._expand_array),
        ec.EVTCHNOP_set_priority: (ec.SET_PRIORITY, Hypercalls._set_priority),
    }
)
