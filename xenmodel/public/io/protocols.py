"""io/protocols.h: the names of slot layouts, as a frontend writes them to its `protocol` node.

Used by backends, which choose a layout by it, and by frontends, which announce theirs.
Invariant: an absent node means the backend's own layout (XEN_IO_PROTO_ABI_NATIVE).
"""

from __future__ import annotations

from xenmodel.public.layout import CStruct

CONSTANTS_FROM = "xen/io/protocols.h"

XEN_IO_PROTO_ABI_X86_32 = "x86_32-abi"
XEN_IO_PROTO_ABI_X86_64 = "x86_64-abi"
XEN_IO_PROTO_ABI_ARM = "arm-abi"
XEN_IO_PROTO_ABI_NATIVE = XEN_IO_PROTO_ABI_X86_64  # the model's structures are x86_64's on every host

# Strings of the header, by name; other strings of a module are its own.
C_STRINGS = (
    "XEN_IO_PROTO_ABI_X86_32",
    "XEN_IO_PROTO_ABI_X86_64",
    "XEN_IO_PROTO_ABI_ARM",
    "XEN_IO_PROTO_ABI_NATIVE",
)

STRUCTS: tuple[CStruct, ...] = ()
