"""perms.py: who may do what with a node; docs/misc/xenstore.txt, perm_for_conn() of tools/xenstored/core.c.

The first entry names the owner, who may do everything, and what every domain without an entry of its own
may do. The control domain may do everything everywhere. An entry for DOMID_ANY is one for everybody (Xen 4.22). A domain
with a target (SET_TARGET: a stub domain) may do what its target may.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from typing import NamedTuple

from xenmodel.public.xen import DOMID_ANY
from xenmodel.types import Domid
from xenmodel.xenstore.errors import XsErrno, XsError, shown

CONTROL_DOMAIN = Domid(0)

MAY_READ = 1
MAY_WRITE = 2
OWNS = 4
_ALL = MAY_READ | MAY_WRITE | OWNS

_TEXT = re.compile(r"([nrwb])([0-9]{1,5})")
_DOMID_MAX = 0xFFFF  # domid_t is 16 bits


class Access(enum.Enum):
    """The letter in a permission's text."""

    NONE = "n"
    READ = "r"
    WRITE = "w"
    BOTH = "b"

    bits: int

    def __init__(self, letter: str) -> None:
        self.bits = (MAY_READ if letter in "rb" else 0) | (MAY_WRITE if letter in "wb" else 0)


class Perm(NamedTuple):
    """One entry of a node's list; its text is a letter and a domid, "r5"."""

    domid: Domid
    access: Access

    @classmethod
    def parse(cls, text: str) -> Perm:
        match = _TEXT.fullmatch(text)
        if match is None or int(match[2]) > _DOMID_MAX:
            raise XsError(XsErrno.EINVAL, f"{shown(text)} is not a permission such as r5")
        return cls(Domid(int(match[2])), Access(match[1]))

    def __str__(self) -> str:
        return f"{self.access.value}{self.domid}"


def check_perms(perms: Sequence[Perm]) -> tuple[Perm, ...]:
    """A list a caller wants to set: never empty, for its first entry is the owner."""
    if not perms:
        raise XsError(XsErrno.EINVAL, "a node needs at least the permission of its owner")
    for perm in perms:
        if not 0 <= perm.domid <= _DOMID_MAX:
            raise XsError(XsErrno.EINVAL, f"{perm.domid} is not a domid")
    return tuple(perms)


def granted(perms: Sequence[Perm], domid: Domid, target: Domid | None = None) -> int:
    """The MAY_READ, MAY_WRITE and OWNS bits of a domain. The first entry that names it, or its target, decides."""
    if domid == CONTROL_DOMAIN:
        return _ALL
    owner = perms[0].domid
    if owner in (domid, DOMID_ANY) or (owner == target and target is not None):
        return _ALL
    for perm in perms[1:]:
        if perm.domid in (domid, DOMID_ANY) or (perm.domid == target and target is not None):
            return perm.access.bits
    return perms[0].access.bits
