"""blkif.h: the block device protocol. Operations, statuses, slot layouts per ABI and the names of the xenstore nodes.

`sectors`, `sector_number`, `first_sect` and `last_sect` count 512-byte sectors whatever `sector-size` says (blkif.h as of
Xen 4.20; the older text said otherwise and the drivers did not agree). A 32-bit x86 guest aligns u64 to 4 bytes, so its
slots are 108 bytes where ours are 112: ABIS holds both layouts under their `protocol` strings.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from xenmodel.public.layout import CStruct

CONSTANTS_FROM = "xen/io/blkif.h"

BLKIF_OP_READ = 0
BLKIF_OP_WRITE = 1
BLKIF_OP_WRITE_BARRIER = 2
BLKIF_OP_FLUSH_DISKCACHE = 3
BLKIF_OP_DISCARD = 5
BLKIF_OP_INDIRECT = 6

BLKIF_RSP_OKAY = 0
BLKIF_RSP_ERROR = -1
BLKIF_RSP_EOPNOTSUPP = -2

BLKIF_DISCARD_SECURE = 1
BLKIF_MAX_SEGMENTS_PER_REQUEST = 11
BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST = 8

VDISK_CDROM = 0x1
VDISK_REMOVABLE = 0x2
VDISK_READONLY = 0x4

SECTOR_SIZE = 512
SECTORS_PER_PAGE = 8
SEGMENTS_PER_INDIRECT_PAGE = 512
SEGMENT_SIZE = 8
NOT_IN_HEADER = frozenset({"SECTOR_SIZE", "SECTORS_PER_PAGE", "SEGMENTS_PER_INDIRECT_PAGE", "SEGMENT_SIZE"})

SEGMENT = Struct("<IBBxx")  # gref, first_sect, last_sect


class Abi(NamedTuple):
    """One guest architecture's slot layout (struct blkif_request and its overlays)."""

    slot_size: int
    request: Struct  # operation, nr_segments, handle, id, sector_number
    segments_at: int
    discard: Struct  # operation, flag, handle, id, sector_number, nr_sectors
    indirect: Struct  # operation, indirect_op, nr_segments, id, sector_number, handle, indirect_grefs[8]
    response: Struct  # id, operation, status; padding written as zero (XSA-216)


ABI_X86_64 = Abi(
    112, Struct("<BBHxxxxQQ"), 24, Struct("<BBHxxxxQQQ"), Struct("<BBHxxxxQQHxx8I"), Struct("<QBxhxxxx")
)
ABI_X86_32 = Abi(108, Struct("<BBHQQ"), 20, Struct("<BBHQQQ"), Struct("<BBHQQHxx8I"), Struct("<QBxh"))
ABIS = {"x86_64-abi": ABI_X86_64, "x86_32-abi": ABI_X86_32, "arm-abi": ABI_X86_64}

# the i386 layouts, checked by declaring the header's structures with 4-byte alignment of u64
_PACK4 = "#define __i386__ 1\n#pragma pack(4)\n"


def _layouts(abi: Abi, prefix: str, prologue: str, u64_at: int) -> tuple[CStruct, ...]:
    sector, after = u64_at + 8, u64_at + 16
    return (
        CStruct(
            f"{prefix}_request_t",
            abi.slot_size,
            {"operation": 0, "nr_segments": 1, "handle": 2, "id": u64_at, "sector_number": sector, "seg": after},
            prologue=prologue,
        ),
        CStruct(
            f"{prefix}_request_discard_t",
            abi.discard.size,
            {"operation": 0, "flag": 1, "handle": 2, "id": u64_at, "sector_number": sector, "nr_sectors": after},
            prologue=prologue,
        ),
        CStruct(
            f"{prefix}_request_indirect_t",
            # the header ends the i386 structure with 8 bytes of padding that no one reads
            abi.indirect.size + (8 if abi is ABI_X86_32 else 4 if abi.indirect.size % 8 else 0),
            {"indirect_op": 1, "nr_segments": 2, "id": u64_at, "handle": after, "indirect_grefs": after + 4},
            prologue=prologue,
        ),
        CStruct(f"{prefix}_response_t", abi.response.size, {"id": 0, "operation": 8, "status": 10}, prologue=prologue),
    )


STRUCTS = (
    CStruct("struct blkif_request_segment", SEGMENT_SIZE, {"gref": 0, "first_sect": 4, "last_sect": 5}),
    *_layouts(ABI_X86_64, "blkif", "", 8),
    *_layouts(ABI_X86_32, "blkif", _PACK4, 4),
)
