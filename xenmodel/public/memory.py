"""memory.h: the numbers of memory operations and of the things that can be mapped into a domain.

Used by the balloon (which operation a step stands for) and by whatever names a map space or a resource.
Left out: argument structures (the model's operations are functions), sharing, paging and vNUMA (no host
memory manager to ask), machine-to-phys tables (frames here are the domain's own).
"""

from __future__ import annotations

from xenmodel.public.layout import CStruct

CONSTANTS_FROM = "xen/memory.h"

XENMEM_increase_reservation = 0
XENMEM_decrease_reservation = 1
XENMEM_maximum_ram_page = 2
XENMEM_current_reservation = 3
XENMEM_maximum_reservation = 4
XENMEM_populate_physmap = 6
XENMEM_add_to_physmap = 7
XENMEM_memory_map = 9
XENMEM_exchange = 11
XENMEM_maximum_gpfn = 14
XENMEM_remove_from_physmap = 15
XENMEM_set_pod_target = 16
XENMEM_get_pod_target = 17
XENMEM_add_to_physmap_batch = 23
XENMEM_claim_pages = 24
XENMEM_acquire_resource = 28

XENMEMF_populate_on_demand = 1 << 16
XENMEMF_exact_node_request = 1 << 17
XENMEMF_vnode = 1 << 18

XENMAPSPACE_shared_info = 0
XENMAPSPACE_grant_table = 1
XENMAPSPACE_gmfn = 2
XENMAPSPACE_gmfn_range = 3
XENMAPSPACE_gmfn_foreign = 4
XENMAPSPACE_dev_mmio = 5

XENMAPIDX_grant_table_status = 0x80000000

XENMEM_resource_ioreq_server = 0
XENMEM_resource_grant_table = 1
XENMEM_resource_vmtrace_buf = 2
XENMEM_resource_grant_table_id_shared = 0
XENMEM_resource_grant_table_id_status = 1

STRUCTS: tuple[CStruct, ...] = ()
