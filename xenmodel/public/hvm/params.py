"""hvm/params.h: the numbered settings through which an HVM guest finds its console, store and interrupt.

Used by domain.py (parameters by number), the toolstack (which sets them) and xenpci (the callback).
Invariant: HVM_PARAM_CALLBACK_IRQ keeps its type in the top byte and the meaning of the rest depends on it.
Left out: Viridian, altp2m, timer and nested-HVM settings: there is no virtual CPU to apply them to.
"""

from __future__ import annotations

from xenmodel.public.layout import CStruct

CONSTANTS_FROM = "xen/hvm/params.h"

HVM_PARAM_CALLBACK_IRQ = 0
HVM_PARAM_STORE_PFN = 1
HVM_PARAM_STORE_EVTCHN = 2
HVM_PARAM_IOREQ_PFN = 5
HVM_PARAM_BUFIOREQ_PFN = 6
HVM_PARAM_ACPI_S_STATE = 14
HVM_PARAM_CONSOLE_PFN = 17
HVM_PARAM_CONSOLE_EVTCHN = 18
HVM_PARAM_BUFIOREQ_EVTCHN = 26
HVM_PARAM_PAGING_RING_PFN = 27
HVM_PARAM_MONITOR_RING_PFN = 28
HVM_PARAM_SHARING_RING_PFN = 29
HVM_PARAM_TRIPLE_FAULT_REASON = 31
HVM_PARAM_VM_GENERATION_ID_ADDR = 34
HVM_NR_PARAMS = 39

HVM_PARAM_CALLBACK_IRQ_TYPE_MASK = 0xFF00000000000000
HVM_PARAM_CALLBACK_TYPE_GSI = 0
HVM_PARAM_CALLBACK_TYPE_PCI_INTX = 1
HVM_PARAM_CALLBACK_TYPE_VECTOR = 2

STRUCTS: tuple[CStruct, ...] = ()
