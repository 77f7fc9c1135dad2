"""ring.h: the header of a shared ring and the number of slots behind it.

The header is 64 bytes: four free-running u32 indices, private bytes and padding. Slots follow; their number is rounded
down to a power of two. The index arithmetic itself is in xenmodel/ring.py.
"""

from __future__ import annotations

from xenmodel.public.layout import CStruct

CONSTANTS_FROM = "xen/io/ring.h"

# positions of the u32 indices in the header, in units of u32
REQ_PROD, REQ_EVENT, RSP_PROD, RSP_EVENT = range(4)
SRING_HEADER_SIZE = 64
NOT_IN_HEADER = frozenset({"REQ_PROD", "REQ_EVENT", "RSP_PROD", "RSP_EVENT", "SRING_HEADER_SIZE"})


def ring_entries(ring_bytes: int, slot_bytes: int) -> int:
    """__RING_SIZE: how many slots of `slot_bytes` fit behind the header, rounded down to a power of two."""
    fit = (ring_bytes - SRING_HEADER_SIZE) // slot_bytes
    return 1 << (fit.bit_length() - 1) if fit > 0 else 0


STRUCTS = (
    CStruct(
        "struct probe_sring",
        SRING_HEADER_SIZE + 16,
        {"req_prod": 0, "req_event": 4, "rsp_prod": 8, "rsp_event": 12, "ring": SRING_HEADER_SIZE},
        prologue=(
            "struct probe_req { unsigned int a[4]; }; struct probe_rsp { unsigned int a[2]; };\n"
            "DEFINE_RING_TYPES(probe, struct probe_req, struct probe_rsp);\n"
        ),
    ),
)
