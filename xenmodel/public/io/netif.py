"""netif.h: the network device protocol. Flags, extras, statuses and slot layouts of the tx, rx and control rings.

TX and RX are always the frontend's. The two rings announce sizes differently: the first TX slot of a frame carries the
size of the whole frame, later ones that of their fragment; every RX response carries the size of its own fragment.
An extra slot follows the first slot of a frame, has no id, and is answered with NETIF_RSP_NULL.
"""

from __future__ import annotations

from struct import Struct

from xenmodel.public.layout import CStruct

CONSTANTS_FROM = "xen/io/netif.h"

XEN_NETIF_NR_SLOTS_MIN = 18
XEN_NETIF_MAX_TX_SIZE = 0xFFFF

NETTXF_csum_blank = 1
NETTXF_data_validated = 2
NETTXF_more_data = 4
NETTXF_extra_info = 8

NETRXF_data_validated = 1
NETRXF_csum_blank = 2
NETRXF_more_data = 4
NETRXF_extra_info = 8
NETRXF_gso_prefix = 16

XEN_NETIF_EXTRA_TYPE_NONE = 0
XEN_NETIF_EXTRA_TYPE_GSO = 1
XEN_NETIF_EXTRA_TYPE_MCAST_ADD = 2
XEN_NETIF_EXTRA_TYPE_MCAST_DEL = 3
XEN_NETIF_EXTRA_TYPE_HASH = 4
XEN_NETIF_EXTRA_TYPE_MAX = 5
XEN_NETIF_EXTRA_FLAG_MORE = 1

XEN_NETIF_GSO_TYPE_NONE = 0
XEN_NETIF_GSO_TYPE_TCPV4 = 1
XEN_NETIF_GSO_TYPE_TCPV6 = 2

NETIF_RSP_DROPPED = -2
NETIF_RSP_ERROR = -1
NETIF_RSP_OKAY = 0
NETIF_RSP_NULL = 1

XEN_NETIF_CTRL_HASH_TYPE_IPV4 = 1
XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP = 2
XEN_NETIF_CTRL_HASH_TYPE_IPV6 = 4
XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP = 8
XEN_NETIF_CTRL_HASH_ALGORITHM_NONE = 0
XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ = 1

XEN_NETIF_CTRL_TYPE_INVALID = 0
XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS = 1
XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS = 2
XEN_NETIF_CTRL_TYPE_SET_HASH_KEY = 3
XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE = 4
XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE = 5
XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING = 6
XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM = 7
XEN_NETIF_CTRL_TYPE_GET_GREF_MAPPING_SIZE = 8
XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING = 9
XEN_NETIF_CTRL_TYPE_DEL_GREF_MAPPING = 10

XEN_NETIF_CTRL_STATUS_SUCCESS = 0
XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED = 1
XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER = 2
XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW = 3

TX_SLOT_SIZE = 12
RX_SLOT_SIZE = 8
CTRL_SLOT_SIZE = 16
NOT_IN_HEADER = frozenset({"TX_SLOT_SIZE", "RX_SLOT_SIZE", "CTRL_SLOT_SIZE"})

TX_REQUEST = Struct("<IHHHH")  # gref, offset, flags, id, size
TX_RESPONSE = Struct("<Hh")  # id, status; the rest of the slot is unused
RX_REQUEST = Struct("<HxxI")  # id, gref
RX_RESPONSE = Struct("<HHHh")  # id, offset, flags, status (the size of the fragment, or an error)
EXTRA = Struct("<BB6s")  # type, flags, and what the type makes of the rest
EXTRA_GSO = Struct("<BBHBxH")  # type, flags, segment size, GSO type, features
EXTRA_HASH = Struct("<BBBB4s")  # type, flags, number of the hash type's bit, algorithm, value (LSB first)
CTRL_REQUEST = Struct("<HHIII")  # id, type, data[3]
CTRL_RESPONSE = Struct("<HHII")  # id, type, status, data

STRUCTS = (
    CStruct("netif_tx_request_t", 12, {"gref": 0, "offset": 4, "flags": 6, "id": 8, "size": 10}, TX_REQUEST),
    CStruct("netif_tx_response_t", 4, {"id": 0, "status": 2}, TX_RESPONSE),
    CStruct("netif_rx_request_t", 8, {"id": 0, "gref": 4}, RX_REQUEST),
    CStruct("netif_rx_response_t", 8, {"id": 0, "offset": 2, "flags": 4, "status": 6}, RX_RESPONSE),
    CStruct("netif_extra_info_t", 8, {"type": 0, "flags": 1, "u.mcast.addr": 2}, EXTRA),
    CStruct(
        "netif_extra_info_t",
        8,
        {"type": 0, "flags": 1, "u.gso.size": 2, "u.gso.type": 4, "u.gso.features": 6},
        EXTRA_GSO,
    ),
    CStruct(
        "netif_extra_info_t",
        8,
        {"type": 0, "flags": 1, "u.hash.type": 2, "u.hash.algorithm": 3, "u.hash.value": 4},
        EXTRA_HASH,
    ),
    CStruct(
        "struct xen_netif_ctrl_request", 16, {"id": 0, "type": 2, "data[0]": 4, "data[1]": 8, "data[2]": 12}, CTRL_REQUEST
    ),
    CStruct("struct xen_netif_ctrl_response", 12, {"id": 0, "type": 2, "status": 4, "data": 8}, CTRL_RESPONSE),
)
