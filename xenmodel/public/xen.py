"""xen.h: domain ids, virtual interrupts, and the shared_info page (x86_64: arch-x86/xen.h, xen-x86_64.h).

Used by hypervisor.py and event_channel.py (pending and mask bits), by whoever names a special domain, and by
sysdev/hypercall.py (the hypercalls of programs).
Invariant: every domain's shared_info is real bytes in its own memory, at these offsets.
Left out: the numbers of hypercalls that we do not know (the domains' kernels here call Python functions), page tables and
start_info (nothing boots), and writing the clock fields, which nobody in the model reads.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from struct import Struct
from types import MappingProxyType

from xenmodel.public.layout import CStruct

CONSTANTS_FROM = "xen/xen.h"
C_NAMES: Mapping[str, str] = MappingProxyType({"Hypercall": "__HYPERVISOR_"})


class Hypercall(enum.IntEnum):
    """__HYPERVISOR_*: a class, because in one of Python's classes a name with two underscores would become another."""

    memory_op = 12
    multicall = 13
    xen_version = 17
    grant_table_op = 20
    event_channel_op = 32


DOMID_FIRST_RESERVED = 0x7FF0
DOMID_SELF = 0x7FF0
DOMID_IO = 0x7FF1
DOMID_XEN = 0x7FF2
DOMID_COW = 0x7FF3
DOMID_INVALID = 0x7FF4
DOMID_ANY = 0x7FF5
DOMID_IDLE = 0x7FFF
DOMID_MASK = 0x7FFF

VIRQ_TIMER = 0
VIRQ_DEBUG = 1
VIRQ_CONSOLE = 2
VIRQ_DOM_EXC = 3
VIRQ_TBUF = 4
VIRQ_DEBUGGER = 6
VIRQ_XENOPROF = 7
VIRQ_CON_RING = 8
VIRQ_PCPU_STATE = 9
VIRQ_MEM_EVENT = 10
VIRQ_ARGO = 11
VIRQ_ENOMEM = 12
VIRQ_XENPMU = 13
VIRQ_ARCH_0 = 16
VIRQ_ARCH_1 = 17
VIRQ_ARCH_2 = 18
VIRQ_ARCH_3 = 19
VIRQ_ARCH_4 = 20
VIRQ_ARCH_5 = 21
VIRQ_ARCH_6 = 22
VIRQ_ARCH_7 = 23
NR_VIRQS = 24

CONSOLEIO_write = 0
CONSOLEIO_read = 1

XEN_LEGACY_MAX_VCPUS = 32

VCPU_INFO = CStruct(
    "struct vcpu_info",
    64,
    {
        "evtchn_upcall_pending": 0,  # u8
        "evtchn_upcall_mask": 1,  # u8
        "evtchn_pending_sel": 8,  # u64: one bit per word of evtchn_pending
        "arch": 16,
        "time": 32,
    },
)

VCPU_TIME_INFO = CStruct(
    "struct vcpu_time_info",
    32,
    {
        "version": 0,
        "tsc_timestamp": 8,
        "system_time": 16,
        "tsc_to_system_mul": 24,
        "tsc_shift": 28,
        "flags": 29,
    },
)

SHARED_INFO = CStruct(
    "struct shared_info",
    3136,
    {
        "vcpu_info": 0,  # XEN_LEGACY_MAX_VCPUS times VCPU_INFO
        "vcpu_info[1]": 64,
        "evtchn_pending": 2048,  # 64 words of u64: one bit per port
        "evtchn_mask": 2560,
        "wc_version": 3072,
        "wc_sec": 3076,
        "wc_nsec": 3080,
        "wc_sec_hi": 3084,
        "arch": 3088,
    },
)

MULTICALL_ENTRY = Struct("<QQ6Q")  # op, result, args
MULTICALL = CStruct("struct multicall_entry", 64, {"op": 0, "result": 8, "args": 16}, MULTICALL_ENTRY)

STRUCTS = (VCPU_INFO, VCPU_TIME_INFO, SHARED_INFO, MULTICALL)

# Newer than the headers of Xen 4.17; compared as soon as the installed header has it.
NOT_IN_HEADER = frozenset({"DOMID_ANY"})
