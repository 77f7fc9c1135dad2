"""io/xenbus.h: the states through which both ends of a split device walk, as written in their `state` nodes.

Used by xenmodel/xenbus.py, which owns the handshake. The node holds the number in decimal.
Invariant: an unreadable or absent `state` counts as Unknown.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType

from xenmodel.public.layout import CStruct

CONSTANTS_FROM = "xen/io/xenbus.h"


class XenbusState(enum.IntEnum):
    Unknown = 0
    Initialising = 1
    InitWait = 2  # finished early initialisation, waiting for the peer or for hotplug scripts
    Initialised = 3  # initialised, waiting for the peer to connect
    Connected = 4
    Closing = 5  # stopped by an error, by unplug, or because the peer is closing
    Closed = 6
    Reconfiguring = 7  # a reconfiguration of an existing device is in progress
    Reconfigured = 8


C_NAMES: Mapping[str, str] = MappingProxyType({"XenbusState": "XenbusState"})

STRUCTS: tuple[CStruct, ...] = ()
