"""excuses.py: for differences.py: which replies of the two stores may differ, and which requests are left out.

An excuse is true of two replies to a request that may differ because of one difference; what is avoided would make the trees
differ from there on, or end Debian's daemon.
"""

from __future__ import annotations

import re

from tests.xenstored.rig import NO_TX, Request, Twins, number
from xenmodel.public.io.xs_wire import XsType
from xenmodel.xenstore.wire import Message, strings

ONE_STRING = (XsType.READ, XsType.DIRECTORY, XsType.GET_PERMS, XsType.MKDIR, XsType.RM)
WITH_PATH = (*ONE_STRING, XsType.WRITE, XsType.SET_PERMS, XsType.WATCH, XsType.DIRECTORY_PART)
DOMAIN_0 = ("a", "b", "c", "0")

# --- what may differ ----------------------------------------------------------------------------------------------------


def generations(twins: Twins, request: Request, real: Message, ours: Message) -> bool:
    if not request.kind == real.type == ours.type == XsType.DIRECTORY_PART:
        return False
    there, _, names = real.body.partition(b"\0")
    here, _, others = ours.body.partition(b"\0")
    return names == others and twins.same_generation(request, there, here)


def transaction_numbers(twins: Twins, request: Request, real: Message, ours: Message) -> bool:
    return real.type == ours.type == XsType.TRANSACTION_START


def permissions_of_the_dead(twins: Twins, request: Request, real: Message, ours: Message) -> bool:
    """Entries after the first for domids whose bearer has ended; a transaction may still see such an owner."""
    if not real.type == ours.type == XsType.GET_PERMS:
        return False
    there, here = strings(real.body), strings(ours.body)

    def living(perms: list[bytes]) -> list[bytes]:
        return [perm for perm in perms[1:] if int(perm[1:]) not in twins.ended]

    owner = there[0] == here[0] or (request.tx != NO_TX and int(there[0][1:]) in twins.ended and here[0][1:] == b"0")
    return owner and living(there) == living(here) and len(there) >= len(here)


def memory_of_the_dead(twins: Twins, request: Request, real: Message, ours: Message) -> bool:
    """8 bytes for each of their entries."""
    if not (twins.ended and request.kind == real.type == ours.type == XsType.CONTROL):
        return False
    there, _, more = real.body[:-2].rpartition(b":")
    here, _, less = ours.body[:-2].rpartition(b":")
    return there == here and int(more) >= int(less) and (int(more) - int(less)) % 8 == 0


def doomed(twins: Twins, request: Request, real: Message, ours: Message) -> bool:
    """A transaction with nodes of a domain that has died cannot commit, whichever error says so."""
    errors = (real.body, ours.body) == (b"ENOMEM\0", b"EAGAIN\0")
    return bool(twins.ended) and request.kind == XsType.TRANSACTION_END and errors


def stale(twins: Twins, request: Request) -> bool:
    return request.kind == XsType.TRANSACTION_END and request.body == b"T\0" and (request.who, request.tx) in twins.stale


def the_dead(twins: Twins, request: Request, real: Message, ours: Message) -> bool:
    return any(excuse(twins, request, real, ours) for excuse in (permissions_of_the_dead, memory_of_the_dead, doomed))


def too_many_watches(twins: Twins, request: Request, real: Message, ours: Message) -> bool:
    return request.kind == XsType.WATCH and (real.body, ours.body) == (b"E2BIG\0", b"ENOSPC\0")


def torn(twins: Twins, request: Request, real: Message, ours: Message) -> bool:
    if request.kind == XsType.RM and request.tx != NO_TX and real.body in (b"EIO\0", b"EINVAL\0"):
        twins.torn.add((request.who, request.tx))
        return True
    return False


# --- what is left out ---------------------------------------------------------------------------------------------------


def not_one_string(twins: Twins, request: Request) -> bool:
    return request.kind in ONE_STRING and (not request.body or request.body.find(b"\0") != len(request.body) - 1)


def specials(twins: Twins, request: Request) -> bool:
    return request.kind in (XsType.GET_PERMS, XsType.SET_PERMS) and request.body.startswith(b"@")


def size_with_the_dead(twins: Twins, request: Request) -> bool:
    grows = request.kind in (XsType.WRITE, XsType.MKDIR, XsType.SET_PERMS)
    return bool(twins.ended) and grows and request.who not in DOMAIN_0 and twins.limits.get("node-size", 2048) < 2048


def odd_specials(twins: Twins, request: Request) -> bool:
    return request.kind == XsType.WATCH and re.match(rb"@[^\0]*[^A-Za-z0-9/_@\0-]", request.body) is not None


def root_given_away(twins: Twins, request: Request) -> bool:
    return request.kind == XsType.SET_PERMS and re.match(rb"/\0[nrwb][1-9]", request.body) is not None


def nodes_of_transactions(twins: Twins, request: Request) -> bool:
    creates = request.kind in (XsType.WRITE, XsType.MKDIR) and request.tx != NO_TX
    return "nodes" in twins.limits and creates and request.who not in DOMAIN_0


def long_paths(twins: Twins, request: Request) -> bool:
    if request.kind not in WITH_PATH or (request.who not in DOMAIN_0 and not request.body.startswith(b"@")):
        return False
    path = re.sub(rb"^/local/domain/\d+/", b"", request.body.partition(b"\0")[0])
    return len(path) > twins.limits.get("path-max", 2048)


def in_torn(twins: Twins, request: Request) -> bool:
    return (request.who, request.tx) in twins.torn and request.kind != XsType.TRANSACTION_END


def target_ends(twins: Twins, request: Request) -> bool:
    return request.kind == XsType.RELEASE and twins.is_target(number(request.body))
