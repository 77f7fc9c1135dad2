"""version.h, and features.h which it includes: what a guest can ask the hypervisor about itself.

Used by sysdev/hypercall.py and by the files under sys/hypervisor. Bit numbers XENFEAT_* index the words of
XENVER_get_features.
Left out: the variable-length queries (XENVER_extraversion2 and on): what we report fits the fixed ones.
"""

from __future__ import annotations

from struct import Struct

from xenmodel.public.layout import CStruct

CONSTANTS_FROM = "xen/version.h"

XENVER_version = 0
XENVER_extraversion = 1
XENVER_compile_info = 2
XENVER_capabilities = 3
XENVER_changeset = 4
XENVER_platform_parameters = 5
XENVER_get_features = 6
XENVER_pagesize = 7
XENVER_guest_handle = 8
XENVER_commandline = 9
XENVER_build_id = 10

# Sizes in bytes, including the terminating NUL.
XEN_EXTRAVERSION_LEN = 16
XEN_CAPABILITIES_INFO_LEN = 1024
XEN_CHANGESET_INFO_LEN = 64

XENFEAT_writable_page_tables = 0
XENFEAT_writable_descriptor_tables = 1
XENFEAT_auto_translated_physmap = 2
XENFEAT_supervisor_mode_kernel = 3
XENFEAT_pae_pgdir_above_4gb = 4
XENFEAT_mmu_pt_update_preserve_ad = 5
XENFEAT_highmem_assist = 6
XENFEAT_gnttab_map_avail_bits = 7
XENFEAT_hvm_callback_vector = 8
XENFEAT_hvm_safe_pvclock = 9
XENFEAT_hvm_pirqs = 10
XENFEAT_dom0 = 11
XENFEAT_memory_op_vnode_supported = 13
XENFEAT_ARM_SMCCC_supported = 14
XENFEAT_linux_rsdp_unrestricted = 15
XENFEAT_not_direct_mapped = 16
XENFEAT_direct_mapped = 17
XENFEAT_runstate_phys_area = 18
XENFEAT_vcpu_time_phys_area = 19
XENFEAT_dm_msix_all_writes = 20
XENFEAT_NR_SUBMAPS = 1

COMPILE_INFO = Struct("<64s16s32s32s")  # compiler, compile_by, compile_domain, compile_date
FEATURE_INFO = Struct("<II")  # submap_idx, submap
PLATFORM_PARAMETERS = Struct("<Q")  # virt_start
BUILD_ID_LEN = Struct("<I")  # the head of xen_build_id_t; the id follows

DOMAIN_HANDLE = CStruct("xen_domain_handle_t", 16, {})  # bytes: a UUID
COMMANDLINE = CStruct("xen_commandline_t", 1024, {})

STRUCTS = (
    CStruct(
        "xen_compile_info_t",
        144,
        {"compiler": 0, "compile_by": 64, "compile_domain": 80, "compile_date": 112},
        COMPILE_INFO,
    ),
    CStruct("xen_feature_info_t", 8, {"submap_idx": 0, "submap": 4}, FEATURE_INFO),
    CStruct("xen_platform_parameters_t", 8, {"virt_start": 0}, PLATFORM_PARAMETERS),
    CStruct("xen_build_id_t", 4, {"len": 0}, BUILD_ID_LEN),
    DOMAIN_HANDLE,
    COMMANDLINE,
)

# Newer than the headers of Xen 4.17; compared as soon as the installed header has them.
NOT_IN_HEADER = frozenset(
    {"XENFEAT_runstate_phys_area", "XENFEAT_vcpu_time_phys_area", "XENFEAT_dm_msix_all_writes"}
)
