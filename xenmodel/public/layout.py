"""layout.py: how a C structure lies in memory, written down so that a compiler can contradict it.

Every module of this package lists the structures it packs in `STRUCTS`. Drivers take field offsets from them
(`SHARED_INFO["evtchn_mask"]`); tests/abi compiles each one against Xen's own headers and compares.

Invariants: immutable; offsets are bytes from the start of the structure, in x86_64 layout unless `prologue`
declares another one. Left out: field types and widths, which the `struct.Struct` beside each layout spells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from struct import Struct
from types import MappingProxyType


@dataclass(frozen=True)
class CStruct:
    """One structure: C spelling ("struct xsd_sockmsg", "grant_entry_v1_t"), sizeof, and offsetof by field.

    Field names are C member designators, so "u.rw.handle" and "vcpu_info[1]" are fine.
    """

    c_name: str
    size: int
    offsets: Mapping[str, int]
    # If given: spans the whole structure and has a field exactly at each offset.
    packer: Struct | None = None
    # Extra compiler flags under which this layout holds.
    cflags: tuple[str, ...] = ()
    # C text before the module's header: another alignment, or declarations that the header leaves out.
    prologue: str = ""
    # Newer headers append fields: sizeof may be larger than `size`, never smaller.
    grows: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", MappingProxyType(dict(self.offsets)))

    def __getitem__(self, field: str) -> int:
        """The byte offset of `field`; KeyError if this layout does not list it."""
        return self.offsets[field]
