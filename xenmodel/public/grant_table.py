"""grant_table.h: the entries a domain shares with Xen, the flags in them, and the status of each operation.

Used by xenmodel/grant_table.py, which keeps version 1 entries as real bytes in the owner's memory.
Invariants: an entry becomes valid by its flags, so they are written last; Xen alone sets reading and writing.
Left out: the argument structures of most GNTTABOP_* (the model's operations are functions; sysdev/hypercall.py
serves two of them to programs), GNTTABOP_cache_flush's flags (ARM), and guest_avail bits of a mapping (page
tables). Version 2 entries are laid out here although the model serves version 1, so that tools can decode both.
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct
from types import MappingProxyType

from xenmodel.public.layout import CStruct

CONSTANTS_FROM = "xen/grant_table.h"

# The first entries belong to the toolstack: it grants console and xenstore pages before the guest runs.
GNTTAB_NR_RESERVED_ENTRIES = 8
GNTTAB_RESERVED_CONSOLE = 0
GNTTAB_RESERVED_XENSTORE = 1

GTF_invalid = 0
GTF_permit_access = 1
GTF_accept_transfer = 2
GTF_transitive = 3
GTF_type_mask = 3
GTF_readonly = 1 << 2
GTF_reading = 1 << 3
GTF_writing = 1 << 4
GTF_PWT = 1 << 5
GTF_PCD = 1 << 6
GTF_PAT = 1 << 7
GTF_sub_page = 1 << 8
GTF_transfer_committed = 1 << 2
GTF_transfer_completed = 1 << 3

GNTTABOP_map_grant_ref = 0
GNTTABOP_unmap_grant_ref = 1
GNTTABOP_setup_table = 2
GNTTABOP_dump_table = 3
GNTTABOP_transfer = 4
GNTTABOP_copy = 5
GNTTABOP_query_size = 6
GNTTABOP_unmap_and_replace = 7
GNTTABOP_set_version = 8
GNTTABOP_get_status_frames = 9
GNTTABOP_get_version = 10
GNTTABOP_swap_grant_ref = 11
GNTTABOP_cache_flush = 12

GNTCOPY_source_gref = 1 << 0
GNTCOPY_dest_gref = 1 << 1

GNTMAP_device_map = 1 << 0
GNTMAP_host_map = 1 << 1
GNTMAP_readonly = 1 << 2
GNTMAP_application_map = 1 << 3
GNTMAP_contains_pte = 1 << 4

GNTST_okay = 0
GNTST_general_error = -1
GNTST_bad_domain = -2
GNTST_bad_gntref = -3
GNTST_bad_handle = -4
GNTST_bad_virt_addr = -5
GNTST_bad_dev_addr = -6
GNTST_no_device_space = -7
GNTST_permission_denied = -8
GNTST_bad_page = -9
GNTST_bad_copy_arg = -10
GNTST_address_too_big = -11
GNTST_eagain = -12
GNTST_no_space = -13

# GNTTABOP_error_msgs, which C indexes by -status.
GNTST_TEXTS: Mapping[int, str] = MappingProxyType(
    {
        GNTST_okay: "okay",
        GNTST_general_error: "undefined error",
        GNTST_bad_domain: "unrecognised domain id",
        GNTST_bad_gntref: "invalid grant reference",
        GNTST_bad_handle: "invalid mapping handle",
        GNTST_bad_virt_addr: "invalid virtual address",
        GNTST_bad_dev_addr: "invalid device address",
        GNTST_no_device_space: "no spare translation slot in the I/O MMU",
        GNTST_permission_denied: "permission denied",
        GNTST_bad_page: "bad page",
        GNTST_bad_copy_arg: "copy arguments cross page boundary",
        GNTST_address_too_big: "page address size too large",
        GNTST_eagain: "operation not done; try again",
        GNTST_no_space: "out of space",
    }
)

GRANT_ENTRY_V1 = Struct("<HHI")  # flags, domid, frame
GRANT_ENTRY_V2_FULL_PAGE = Struct("<HH4xQ")  # flags, domid, frame
GRANT_ENTRY_V2_SUB_PAGE = Struct("<HHHHQ")  # flags, domid, page_off, length, frame
GRANT_ENTRY_V2_TRANSITIVE = Struct("<HHH2xI4x")  # flags, domid, trans_domid, gref

QUERY_SIZE = Struct("<H2xIIh2x")  # dom, nr_frames, max_nr_frames, status
GET_VERSION = Struct("<HHI")  # dom, pad, version

STRUCTS = (
    CStruct("grant_entry_v1_t", 8, {"flags": 0, "domid": 2, "frame": 4}, GRANT_ENTRY_V1),
    CStruct("grant_entry_header_t", 4, {"flags": 0, "domid": 2}),
    CStruct(
        "grant_entry_v2_t",
        16,
        {"full_page.hdr.flags": 0, "full_page.hdr.domid": 2, "full_page.frame": 8},
        GRANT_ENTRY_V2_FULL_PAGE,
    ),
    CStruct(
        "grant_entry_v2_t",
        16,
        {
            "sub_page.hdr.flags": 0,
            "sub_page.hdr.domid": 2,
            "sub_page.page_off": 4,
            "sub_page.length": 6,
            "sub_page.frame": 8,
        },
        GRANT_ENTRY_V2_SUB_PAGE,
    ),
    CStruct(
        "grant_entry_v2_t",
        16,
        {
            "transitive.hdr.flags": 0,
            "transitive.hdr.domid": 2,
            "transitive.trans_domid": 4,
            "transitive.gref": 8,
        },
        GRANT_ENTRY_V2_TRANSITIVE,
    ),
    CStruct("gnttab_query_size_t", 16, {"dom": 0, "nr_frames": 4, "max_nr_frames": 8, "status": 12}, QUERY_SIZE),
    CStruct("gnttab_get_version_t", 8, {"dom": 0, "pad": 2, "version": 4}, GET_VERSION),
)
