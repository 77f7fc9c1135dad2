"""event_channel.h: what a port can be, the operations on it, and how many there are.

Used by xenmodel/event_channel.py, by everything that prints the state of a port, and by sysdev/hypercall.py, which
unpacks the arguments of programs: the model's own operations are functions.
Left out: the FIFO ABI beyond its priorities and arguments: the model keeps the 2-level bits of shared_info, see xen.py.
"""

from __future__ import annotations

from struct import Struct

from xenmodel.public.layout import CStruct

CONSTANTS_FROM = "xen/event_channel.h"

EVTCHNOP_bind_interdomain = 0
EVTCHNOP_bind_virq = 1
EVTCHNOP_bind_pirq = 2
EVTCHNOP_close = 3
EVTCHNOP_send = 4
EVTCHNOP_status = 5
EVTCHNOP_alloc_unbound = 6
EVTCHNOP_bind_ipi = 7
EVTCHNOP_bind_vcpu = 8
EVTCHNOP_unmask = 9
EVTCHNOP_reset = 10
EVTCHNOP_init_control = 11
EVTCHNOP_expand_array = 12
EVTCHNOP_set_priority = 13

EVTCHNSTAT_closed = 0
EVTCHNSTAT_unbound = 1
EVTCHNSTAT_interdomain = 2
EVTCHNSTAT_pirq = 3
EVTCHNSTAT_virq = 4
EVTCHNSTAT_ipi = 5

BIND_PIRQ__WILL_SHARE = 1

EVTCHN_2L_NR_CHANNELS = 8 * 8 * 64  # sizeof(xen_ulong_t) squared, times 64: bits of evtchn_pending on x86_64

EVTCHN_FIFO_PRIORITY_MAX = 0
EVTCHN_FIFO_PRIORITY_DEFAULT = 7
EVTCHN_FIFO_PRIORITY_MIN = 15
EVTCHN_FIFO_NR_CHANNELS = 1 << 17

ALLOC_UNBOUND = Struct("<HHI")  # dom, remote_dom, port
BIND_INTERDOMAIN = Struct("<H2xII")  # remote_dom, remote_port, local_port
BIND_VIRQ = Struct("<III")  # virq, vcpu, port
BIND_PIRQ = Struct("<III")  # pirq, flags, port
BIND_IPI = Struct("<II")  # vcpu, port
PORT = Struct("<I")  # EVTCHNOP_close, _send and _unmask
STATUS = Struct("<H2xIII8s")  # dom, port, status, vcpu, u
STATUS_UNBOUND = Struct("<H")  # the members of u: dom
STATUS_INTERDOMAIN = Struct("<H2xI")  # dom, port
STATUS_VIRQ = Struct("<I")
BIND_VCPU = Struct("<II")  # port, vcpu
RESET = Struct("<H")  # dom
INIT_CONTROL = Struct("<QIIB7s")  # control_gfn, offset, vcpu, link_bits, _pad
EXPAND_ARRAY = Struct("<Q")  # array_gfn
SET_PRIORITY = Struct("<II")  # port, priority

STRUCTS = (
    CStruct("struct evtchn_alloc_unbound", 8, {"dom": 0, "remote_dom": 2, "port": 4}, ALLOC_UNBOUND),
    CStruct(
        "struct evtchn_bind_interdomain", 12, {"remote_dom": 0, "remote_port": 4, "local_port": 8}, BIND_INTERDOMAIN
    ),
    CStruct("struct evtchn_bind_virq", 12, {"virq": 0, "vcpu": 4, "port": 8}, BIND_VIRQ),
    CStruct("struct evtchn_bind_pirq", 12, {"pirq": 0, "flags": 4, "port": 8}, BIND_PIRQ),
    CStruct("struct evtchn_bind_ipi", 8, {"vcpu": 0, "port": 4}, BIND_IPI),
    CStruct("struct evtchn_close", 4, {"port": 0}, PORT),
    CStruct("struct evtchn_send", 4, {"port": 0}, PORT),
    CStruct("struct evtchn_status", 24, {"dom": 0, "port": 4, "status": 8, "vcpu": 12, "u": 16}, STATUS),
    CStruct(
        "struct evtchn_status",
        24,
        {"u.unbound.dom": 16, "u.interdomain.dom": 16, "u.interdomain.port": 20, "u.pirq": 16, "u.virq": 16},
    ),
    CStruct("struct evtchn_bind_vcpu", 8, {"port": 0, "vcpu": 4}, BIND_VCPU),
    CStruct("struct evtchn_unmask", 4, {"port": 0}, PORT),
    CStruct("struct evtchn_reset", 2, {"dom": 0}, RESET),
    CStruct(
        "struct evtchn_init_control",
        24,
        {"control_gfn": 0, "offset": 8, "vcpu": 12, "link_bits": 16, "_pad": 17},
        INIT_CONTROL,
    ),
    CStruct("struct evtchn_expand_array", 8, {"array_gfn": 0}, EXPAND_ARRAY),
    CStruct("struct evtchn_set_priority", 8, {"port": 0, "priority": 4}, SET_PRIORITY),
)
