"""event_channel.h: what a port can be, the operations on it, and how many there are.

Used by xenmodel/event_channel.py and by everything that prints the state of a port.
Left out: the argument structures of EVTCHNOP_* (the model's operations are functions), and the FIFO ABI
beyond its priorities: the model keeps the 2-level bits of shared_info, see xen.py.
"""

from __future__ import annotations

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

STRUCTS: tuple[CStruct, ...] = ()
