"""io/xs_wire.h: messages between xenstore and its clients, and the page that carries them for a domain.

Used by xenstore/wire.py (bytes <-> messages), xenstore/connection.py (limits) and the xenstore ring.
Invariants: a message is SOCKMSG followed by at most XENSTORE_PAYLOAD_MAX bytes, both ways, and a longer one
ends the connection; indices in the page run freely modulo 2**32 and need not start at 0; errors travel by
name.
Left out: XS_TYPE_COUNT (grows with every release, so no limit to check against) and the legacy
XS_WRITE_* flags, which WRITE no longer takes.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Mapping
from struct import Struct
from types import MappingProxyType

from xenmodel.public.layout import CStruct

CONSTANTS_FROM = "xen/io/xs_wire.h"


class XsType(enum.IntEnum):
    """enum xsd_sockmsg_type. 20 was XS_RESTRICT and must not be used again."""

    CONTROL = 0
    DIRECTORY = 1
    READ = 2
    GET_PERMS = 3
    WATCH = 4
    UNWATCH = 5
    TRANSACTION_START = 6
    TRANSACTION_END = 7
    INTRODUCE = 8
    RELEASE = 9
    GET_DOMAIN_PATH = 10
    WRITE = 11
    MKDIR = 12
    RM = 13
    SET_PERMS = 14
    WATCH_EVENT = 15
    ERROR = 16
    IS_DOMAIN_INTRODUCED = 17
    RESUME = 18
    SET_TARGET = 19
    RESET_WATCHES = 21
    DIRECTORY_PART = 22
    GET_FEATURE = 23
    SET_FEATURE = 24
    GET_QUOTA = 25
    SET_QUOTA = 26
    INVALID = 0xFFFF  # promised never to become a type


C_NAMES: Mapping[str, str] = MappingProxyType({"XsType": "XS_"})

# Header order; clients search it by name, so names are only ever appended.
XSD_ERRORS: tuple[tuple[int, str], ...] = (
    (errno.EINVAL, "EINVAL"),
    (errno.EACCES, "EACCES"),
    (errno.EEXIST, "EEXIST"),
    (errno.EISDIR, "EISDIR"),
    (errno.ENOENT, "ENOENT"),
    (errno.ENOMEM, "ENOMEM"),
    (errno.ENOSPC, "ENOSPC"),
    (errno.EIO, "EIO"),
    (errno.ENOTEMPTY, "ENOTEMPTY"),
    (errno.ENOSYS, "ENOSYS"),
    (errno.EROFS, "EROFS"),
    (errno.EBUSY, "EBUSY"),
    (errno.EAGAIN, "EAGAIN"),
    (errno.EISCONN, "EISCONN"),
    (errno.E2BIG, "E2BIG"),
    (errno.EPERM, "EPERM"),
)

# Parts of a WATCH_EVENT's payload, by index.
XS_WATCH_PATH = 0
XS_WATCH_TOKEN = 1

XENSTORE_PAYLOAD_MAX = 4096
XENSTORE_ABS_PATH_MAX = 3072
XENSTORE_REL_PATH_MAX = 2048

XENSTORE_RING_SIZE = 1024

# Bits of `server_features` in the ring page.
XENSTORE_SERVER_FEATURE_RECONNECTION = 1
XENSTORE_SERVER_FEATURE_ERROR = 2
XENSTORE_SERVER_FEATURE_WATCHDEPTH = 4
XENSTORE_SERVER_FEATURE_DOMID_ANY = 8

# Values of `connection` in the ring page.
XENSTORE_CONNECTED = 0
XENSTORE_RECONNECT = 1

# Values of `error` in the ring page; after one of them the server no longer looks at the ring.
XENSTORE_ERROR_NONE = 0
XENSTORE_ERROR_COMM = 1
XENSTORE_ERROR_RINGIDX = 2
XENSTORE_ERROR_PROTO = 3

SOCKMSG = Struct("<IIII")  # type, req_id, tx_id, len (of what follows)

XENSTORE_DOMAIN_INTERFACE = CStruct(
    "struct xenstore_domain_interface",
    2076,
    {
        "req": 0,
        "rsp": 1024,
        "req_cons": 2048,
        "req_prod": 2052,
        "rsp_cons": 2056,
        "rsp_prod": 2060,
        "server_features": 2064,
        "connection": 2068,
        "error": 2072,
    },
    grows=True,  # Xen 4.22 appends a port for domains that xl did not start
)

STRUCTS = (
    CStruct("struct xsd_sockmsg", 16, {"type": 0, "req_id": 4, "tx_id": 8, "len": 12}, SOCKMSG),
    XENSTORE_DOMAIN_INTERFACE,
)

# Newer than the headers of Xen 4.17. Macros are compared as soon as the installed header has them.
NOT_IN_HEADER = frozenset(
    {
        "XS_GET_FEATURE",
        "XS_SET_FEATURE",
        "XS_GET_QUOTA",
        "XS_SET_QUOTA",
        "XENSTORE_SERVER_FEATURE_WATCHDEPTH",
        "XENSTORE_SERVER_FEATURE_DOMID_ANY",
    }
)
