"""differences.py: the one table of what Debian's store of Xen 4.17 and ours do not do alike, and why; see docs/differences.md.

Each entry has a script (rig.py tells how to read it) that shows the difference, so that the list cannot rot. Where random
sequences of requests could meet it, there is also one of
    excuse   these two replies may differ, for nothing else will differ because of it
    avoided  this request is left out, for the trees would differ from there on, or Debian's daemon would end
    quota    a limit of ours is this much more of theirs
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tests.xenstored.rig import NO_TX, Excuse, Request, Twins
from xenmodel.public.io.xs_wire import XsType
from xenmodel.xenstore.wire import Message, strings

ONE_STRING = (XsType.READ, XsType.DIRECTORY, XsType.GET_PERMS, XsType.MKDIR, XsType.RM)
WITH_PATH = (*ONE_STRING, XsType.WRITE, XsType.SET_PERMS, XsType.WATCH, XsType.DIRECTORY_PART)
NEWER = (XsType.GET_FEATURE, XsType.SET_FEATURE, XsType.GET_QUOTA, XsType.SET_QUOTA)
DOMAIN_0 = ("a", "b", "c", "0")


@dataclass(frozen=True)
class Difference:
    reason: str
    script: str
    excuse: Excuse | None = None
    avoided: Callable[[Twins, Request], bool] | None = None
    quota: tuple[str, int] | None = None


# --- what may differ ----------------------------------------------------------------------------------------------------


def _generations(twins: Twins, request: Request, real: Message, ours: Message) -> bool:
    if not request.kind == real.type == ours.type == XsType.DIRECTORY_PART:
        return False
    there, _, names = real.body.partition(b"\0")
    here, _, others = ours.body.partition(b"\0")
    return names == others and twins.same_generation(request, there, here)


def _transaction_numbers(twins: Twins, request: Request, real: Message, ours: Message) -> bool:
    return real.type == ours.type == XsType.TRANSACTION_START


def _permissions_of_the_dead(twins: Twins, request: Request, real: Message, ours: Message) -> bool:
    """Theirs has more entries after the first, for domids whose bearer has ended."""
    if not real.type == ours.type == XsType.GET_PERMS:
        return False
    there, here = strings(real.body), strings(ours.body)

    def living(perms: list[bytes]) -> list[bytes]:
        return [perm for perm in perms[1:] if int(perm[1:]) not in twins.ended]

    return there[0] == here[0] and living(there) == living(here) and len(there) > len(here)


def _too_many_watches(twins: Twins, request: Request, real: Message, ours: Message) -> bool:
    return request.kind == XsType.WATCH and (real.body, ours.body) == (b"E2BIG\0", b"ENOSPC\0")


# --- what is left out ---------------------------------------------------------------------------------------------------


def _not_one_string(twins: Twins, request: Request) -> bool:
    return request.kind in ONE_STRING and (not request.body or request.body.find(b"\0") != len(request.body) - 1)


def _specials(twins: Twins, request: Request) -> bool:
    return request.kind in (XsType.GET_PERMS, XsType.SET_PERMS) and request.body.startswith(b"@")


def _odd_specials(twins: Twins, request: Request) -> bool:
    return request.kind == XsType.WATCH and re.match(rb"@[^\0]*[^A-Za-z0-9/_@\0-]", request.body) is not None


def _root_given_away(twins: Twins, request: Request) -> bool:
    return request.kind == XsType.SET_PERMS and re.match(rb"/\0[nrwb][1-9]", request.body) is not None


def _nodes_of_transactions(twins: Twins, request: Request) -> bool:
    creates = request.kind in (XsType.WRITE, XsType.MKDIR) and request.tx != NO_TX
    return "nodes" in twins.limits and creates and request.who not in DOMAIN_0


def _long_paths(twins: Twins, request: Request) -> bool:
    if request.kind not in WITH_PATH or (request.who not in DOMAIN_0 and not request.body.startswith(b"@")):
        return False
    path = request.body.partition(b"\0")[0]
    return len(re.sub(rb"^/local/domain/\d+/", b"", path)) > twins.limits.get("path-max", 2048)


def _target_ends(twins: Twins, request: Request) -> bool:
    return request.kind == XsType.RELEASE and twins.is_target(int(request.body[:-1] or 0))


DIFFERENCES: dict[str, Difference] = {
    # What 4.17 does wrong, and later versions do as we do.
    "not one string": Difference(
        "4.17 answers with whatever error its last library call left behind; if there was none it ends: assertion failed",
        """
        a READ /none| -> ENOENT
        a READ /tool -> ENOENT / EINVAL
        a WRITE /x|
        1 READ /x| -> EACCES
        1 DIRECTORY -> EACCES / EINVAL
        """,
        avoided=_not_one_string,
    ),
    "a permission outlives its domain": Difference(
        "4.17 takes an entry for one of the new bearer of the domid if nothing was written in between (compare XSA-322)",
        """
        a WRITE /p|
        a SET_PERMS /p|n0|r2|
        a WRITE /p/c|
        a SET_PERMS /p/c|n2|
        destroy 2
        create 2
        introduce 2
        2 READ /p| -> "" / EACCES
        """,
    ),
    "entries of the dead": Difference(
        "4.17 still lists them, without effect; 4.22 removes them, as we do",
        """
        a WRITE /p|
        a SET_PERMS /p|n0|r2|b1|
        destroy 2
        a GET_PERMS /p| -> n0|r2|b1| / n0|b1|
        """,
        excuse=_permissions_of_the_dead,
    ),
    "special nodes": Difference(
        "nodes like others since 4.18: their permissions can be read, belong to transactions, and a change is told",
        """
        a WATCH @releaseDomain|t|
        a events -> @releaseDomain:t
        a GET_PERMS @releaseDomain| -> EINVAL / n0|
        a TRANSACTION_START | -> $t
        a.$t SET_PERMS @releaseDomain|n0|r1| -> OK|
        a.$t TRANSACTION_END F| -> OK|
        1 WATCH @releaseDomain|t|
        1 events -> @releaseDomain:t
        shutdown 2
        1 events -> @releaseDomain:t / none
        a events -> @releaseDomain:t
        a SET_PERMS @releaseDomain|n0|r1| -> OK|
        a events -> none / @releaseDomain:t
        """,
        avoided=_specials,
    ),
    "special nodes of others": Difference(
        "4.17 refuses with the last error there was, as above, or ends",
        """
        1 READ data/none| -> ENOENT
        1 SET_PERMS @releaseDomain|n1| -> ENOENT / EACCES
        """,
        avoided=_specials,
    ),
    "names of special nodes": Difference(
        "4.17 takes any bytes for the name of a special node that is watched",
        "a WATCH @re lease|t| -> OK| / EINVAL",
        avoided=_odd_specials,
    ),
    "limit on watches": Difference(
        "4.17 allows one more, and says E2BIG",
        """
        quota watches 2
        1 WATCH data|1| -> OK|
        1 WATCH data|2| -> OK|
        1 WATCH data|3| -> OK| / ENOSPC
        1 WATCH data|4| -> E2BIG / ENOSPC
        """,
        excuse=_too_many_watches,
        quota=("watches", 1),
    ),
    "limit on transactions": Difference(
        "4.17 allows one more",
        """
        quota transactions 2
        1 TRANSACTION_START | -> $t
        1 TRANSACTION_START | -> $u
        1 TRANSACTION_START | -> 3| / ENOSPC
        1 TRANSACTION_START | -> ENOSPC
        """,
        quota=("transactions", 1),
    ),
    "limit on a node's size": Difference(
        "4.17 counts the 24 bytes of its record's header, and refuses the size that is the limit",
        """
        quota node-size 50
        1 WRITE data|0123456789012345678901234567890123456789 -> ENOSPC / OK|
        1 WRITE data|01234567890123456 -> OK|
        1 WRITE data|012345678901234567 -> ENOSPC / OK|
        """,
        quota=("node-size", -25),
    ),
    "limit on nodes, in a transaction": Difference(
        "4.17 looks at the end only, and then refuses the number that is the limit",
        """
        quota nodes 3
        1 TRANSACTION_START | -> $t
        1.$t WRITE data/1| -> OK|
        1.$t WRITE data/2| -> OK|
        1.$t TRANSACTION_END T| -> ENOSPC / OK|
        1 TRANSACTION_START | -> $u
        1.$u WRITE data/3| -> OK| / ENOSPC
        1.$u WRITE data/4| -> OK| / ENOSPC
        1.$u TRANSACTION_END T| -> ENOSPC / ENOMEM
        """,
        avoided=_nodes_of_transactions,
    ),
    "limit on paths": Difference(
        "4.17 holds domain 0 to it; later versions do not, and hold special nodes to it",
        """
        quota path-max 20
        a WRITE /a/path/longer/than/that| -> EINVAL / OK|
        a WRITE /local/domain/1/data/name| -> OK|
        1 WRITE data/longer/than/that| -> EINVAL
        quota path-max 12
        1 WATCH @introduceDomain|t| -> OK| / EINVAL
        """,
        avoided=_long_paths,
    ),
    "the root of a guest that dies": Difference(
        "4.17 then removes the whole tree; ours leaves the root to domain 0",
        """
        a SET_PERMS /|n1|
        destroy 1
        a DIRECTORY /| -> EACCES / tool|local|
        """,
        avoided=_root_given_away,
    ),
    "a target that ends": Difference(
        "4.17 keeps a domain that another has as its target until that has ended, too",
        """
        a WATCH @releaseDomain|t|
        a events -> @releaseDomain:t
        a SET_TARGET 2|1|
        a RELEASE 1| -> OK|
        a events -> none / @releaseDomain:t
        a IS_DOMAIN_INTRODUCED 1| -> T| / F|
        """,
        avoided=_target_ends,
    ),
    # What came after 4.17.
    "depth of a watch": Difference("new in 4.22", "a WATCH /a|t|1| -> EINVAL / OK|"),
    "features and quotas": Difference(
        "new in 4.22",
        """
        a GET_FEATURE | -> ENOSYS / 15|
        a SET_FEATURE 1|0| -> ENOSYS / EBUSY
        a GET_QUOTA nodes| -> ENOSYS / 1000|
        a SET_QUOTA nodes|5| -> ENOSYS / OK|
        """,
    ),
    # What we do in another way.
    "domids in permissions": Difference(
        "decimal and of 16 bits with us: nobody else could be meant",
        """
        a SET_PERMS /tool|n0|r0x1| -> OK| / EINVAL
        a SET_PERMS /tool|n0|r-1| -> OK| / EINVAL
        a SET_PERMS /tool|n70000| -> ENOENT / EINVAL
        """,
    ),
    "generation": Difference(
        "its number is of no meaning, but that it is the same as long as the node is",
        """
        a WRITE /x|
        a DIRECTORY_PART /|0| -> 6|tool|local|x|| / 30|tool|local|x||
        """,
        excuse=_generations,
    ),
}
