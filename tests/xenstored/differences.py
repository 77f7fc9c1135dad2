"""differences.py: the one table of what Debian's xenstored of Xen 4.17 and ours do not do alike, and why.

Its rows are those of docs/differences.md, word for word. Each has a script (rig.py tells how to read it), or names a test in
test_differential_tables.py, that fails when the difference is there no more. Where random requests could meet it:
    excuse     these two replies may differ, for nothing else will differ because of it
    avoided    this request is left out, for the trees would differ from there on, or Debian's daemon would end
    quota      a limit that means this much more with us
    unordered  a request whose reply and events may come in any order
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tests.xenstored.rig import NO_TX, Excuse, Request, Twins, number
from xenmodel.public.io.xs_wire import XsType
from xenmodel.xenstore.wire import Message, strings

ONE_STRING = (XsType.READ, XsType.DIRECTORY, XsType.GET_PERMS, XsType.MKDIR, XsType.RM)
WITH_PATH = (*ONE_STRING, XsType.WRITE, XsType.SET_PERMS, XsType.WATCH, XsType.DIRECTORY_PART)
DOMAIN_0 = ("a", "b", "c", "0")


@dataclass(frozen=True)
class Difference:
    real: str
    ours: str
    why: str
    script: str = ""
    test: str = ""
    excuse: Excuse | None = None
    avoided: Callable[[Twins, Request], bool] | None = None
    quota: tuple[str, int] | None = None
    unordered: XsType | None = None

    @property
    def row(self) -> str:
        return f"| {self.real} | {self.ours} | {self.why} |"


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
    """Entries after the first for domids whose bearer has ended; a transaction may still see such an owner."""
    if not real.type == ours.type == XsType.GET_PERMS:
        return False
    there, here = strings(real.body), strings(ours.body)

    def living(perms: list[bytes]) -> list[bytes]:
        return [perm for perm in perms[1:] if int(perm[1:]) not in twins.ended]

    owner = there[0] == here[0] or (request.tx != NO_TX and int(there[0][1:]) in twins.ended and here[0][1:] == b"0")
    return owner and living(there) == living(here) and len(there) >= len(here)


def _memory_of_the_dead(twins: Twins, request: Request, real: Message, ours: Message) -> bool:
    """8 bytes for each of their entries."""
    if not (twins.ended and request.kind == real.type == ours.type == XsType.CONTROL):
        return False
    there, _, more = real.body[:-2].rpartition(b":")
    here, _, less = ours.body[:-2].rpartition(b":")
    return there == here and int(more) >= int(less) and (int(more) - int(less)) % 8 == 0


def _the_dead(twins: Twins, request: Request, real: Message, ours: Message) -> bool:
    return any(excuse(twins, request, real, ours) for excuse in (_permissions_of_the_dead, _memory_of_the_dead))


def _too_many_watches(twins: Twins, request: Request, real: Message, ours: Message) -> bool:
    return request.kind == XsType.WATCH and (real.body, ours.body) == (b"E2BIG\0", b"ENOSPC\0")


def _torn(twins: Twins, request: Request, real: Message, ours: Message) -> bool:
    if request.kind == XsType.RM and request.tx != NO_TX and real.body in (b"EIO\0", b"EINVAL\0"):
        twins.torn.add((request.who, request.tx))
        return True
    return False


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
    path = re.sub(rb"^/local/domain/\d+/", b"", request.body.partition(b"\0")[0])
    return len(path) > twins.limits.get("path-max", 2048)


def _in_torn(twins: Twins, request: Request) -> bool:
    return (request.who, request.tx) in twins.torn and request.kind != XsType.TRANSACTION_END


def _target_ends(twins: Twins, request: Request) -> bool:
    return request.kind == XsType.RELEASE and twins.is_target(number(request.body))


MISTAKE = "a mistake of 4.17 that 4.22 does not make"
NEW = "new in 4.22"

DIFFERENCES = {
    "not one string": Difference(
        "READ, DIRECTORY, GET_PERMS, MKDIR or RM with a body that is not one string is answered with the error that an "
        "earlier call left behind; if there was none, the daemon ends",
        "EINVAL",
        MISTAKE,
        """
        a READ /none| -> ENOENT
        a READ /tool -> ENOENT / EINVAL
        1 READ /none| -> EACCES
        1 DIRECTORY -> EACCES / EINVAL
        """,
        avoided=_not_one_string,
    ),
    "special nodes of others": Difference(
        "SET_PERMS of a special node by a guest that may not do that: the same",
        "EACCES",
        MISTAKE,
        """
        1 READ data/none| -> ENOENT
        1 SET_PERMS @releaseDomain|n1| -> ENOENT / EACCES
        """,
        avoided=_specials,
    ),
    "special nodes": Difference(
        "special nodes have permissions that nobody can read and nobody hears of, and that no transaction undoes",
        "they are nodes like others",
        "as in 4.22",
        """
        a WATCH @releaseDomain|t|
        a events -> @releaseDomain:t
        a GET_PERMS @releaseDomain| -> EINVAL / n0|
        a SET_PERMS @releaseDomain|n0|r2| -> OK| / OK|
        a events -> none / @releaseDomain:t
        a SET_PERMS @introduceDomain|n0|r1| -> OK|
        a GET_PERMS @introduceDomain| -> EINVAL / n0|r1|
        a TRANSACTION_START | -> $t
        a.$t SET_PERMS @introduceDomain|n0| -> OK|
        a.$t TRANSACTION_END F|
        a GET_PERMS @introduceDomain| -> EINVAL / n0|r1|
        """,
        avoided=_specials,
    ),
    "names of special nodes": Difference(
        "any bytes may be the name of a special node to watch",
        "those of paths",
        "as in 4.22",
        """
        a WATCH @re lease|t| -> OK| / EINVAL
        a events -> @re lease:t / none
        """,
        avoided=_odd_specials,
    ),
    "entries of the dead": Difference(
        "GET_PERMS lists entries for domains that have died, which have no effect any more, and they go on costing memory",
        "it does not; the next write to the node removes them",
        "as in 4.22",
        """
        a WRITE /p|
        a SET_PERMS /p|n0|r2|b1|
        destroy 2
        a GET_PERMS /p| -> n0|r2|b1| / n0|b1|
        """,
        excuse=_the_dead,
    ),
    "a permission outlives its domain": Difference(
        "a domid that is used again finds the permissions of its last bearer if nothing was written in between",
        "never",
        "XSA-322",
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
    "the root of a guest that dies": Difference(
        "a guest that owns the root and dies takes the whole tree along",
        "the root goes back to domain 0",
        "nobody wants that",
        """
        a SET_PERMS /|n1|
        destroy 1
        a DIRECTORY /| -> EACCES / tool|local|
        """,
        avoided=_root_given_away,
    ),
    "a target that ends": Difference(
        "a domain that is the target of another (SET_TARGET) stays introduced, with its nodes, until that has ended, too",
        "it goes at once",
        "what is destroyed should be gone; its number may be used again",
        """
        a WATCH @releaseDomain|t|
        a SET_TARGET 2|1|
        a IS_DOMAIN_INTRODUCED 1| -> T|
        a events -> @releaseDomain:t
        destroy 1 -> *
        a events -> none / @releaseDomain:t
        a IS_DOMAIN_INTRODUCED 1| -> T| / F|
        a DIRECTORY /local/domain/1| -> data| / ""
        """,
        avoided=_target_ends,
    ),
    "torn": Difference(
        "a transaction that looked at a directory and at a node in it, one before and the other after somebody removed the "
        "node: RM of either says EIO, having the whole store checked, or EINVAL",
        "OK, and EAGAIN in the end, as there",
        MISTAKE,
        """
        a WRITE /d/1|
        a TRANSACTION_START | -> $t
        a.$t DIRECTORY /d| -> 1|
        a RM /d/1|
        a.$t READ /d/1| -> ENOENT
        a.$t RM /d| -> EIO / OK|
        a.$t TRANSACTION_END T| -> EAGAIN
        a WRITE /e/1|
        a TRANSACTION_START | -> $u
        a.$u READ /e/1| -> ""
        a RM /e|
        a.$u READ /e| -> ENOENT
        a.$u RM /e/1| -> EINVAL / OK|
        a.$u TRANSACTION_END T| -> EAGAIN
        """,
        excuse=_torn,
        avoided=_in_torn,
    ),
    "order of RELEASE": Difference(
        "RELEASE may be answered before watchers are told: it depends on who connected when",
        "after",
        "as for all other requests",
        test="test_release_is_answered_last",
        unordered=XsType.RELEASE,
    ),
    "limit on watches": Difference(
        "one watch more than the quota says, then E2BIG",
        "as many as it says, then ENOSPC",
        "as in 4.22",
        """
        quota watches 2
        1 WATCH data|1| -> OK|
        1 WATCH data|2| -> OK|
        1 WATCH data|3| -> OK| / ENOSPC
        1 WATCH data|4| -> E2BIG / ENOSPC
        1 events -> data:1 data:2 data:3 / data:1 data:2
        """,
        excuse=_too_many_watches,
        quota=("watches", 1),
    ),
    "limit on transactions": Difference(
        "one transaction more than the quota says",
        "as many as it says",
        "as in 4.22",
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
        "the size of a node includes the 24 bytes of a header, and the limit itself is too much",
        "what is in the node counts; the limit is allowed",
        "as the quota is described",
        """
        quota node-size 50
        1 WRITE data|01234567890123456 -> OK|
        1 WRITE data|012345678901234567 -> ENOSPC / OK|
        1 WRITE data|012345678901234567890123456789012345678901 -> ENOSPC / OK|
        1 WRITE data|0123456789012345678901234567890123456789012 -> ENOSPC
        """,
        quota=("node-size", -25),
    ),
    "limit on nodes, in a transaction": Difference(
        "what a transaction creates is not counted before its end, which then refuses the last node that is allowed",
        "counted at once, and it is allowed",
        "as in 4.22",
        """
        quota nodes 3
        1 TRANSACTION_START | -> $t
        1.$t WRITE data/1| -> OK|
        1.$t WRITE data/2| -> OK|
        1.$t TRANSACTION_END T| -> ENOSPC / OK|
        1 TRANSACTION_START | -> $u
        1.$u WRITE data/3| -> OK| / ENOSPC
        1.$u WRITE data/4| -> OK| / ENOSPC
        1.$u WRITE data/5| -> OK| / ENOSPC
        1.$u TRANSACTION_END T| -> ENOSPC / ENOMEM
        """,
        avoided=_nodes_of_transactions,
    ),
    "limit on paths": Difference(
        "`path-max` holds for domain 0, and not for special nodes",
        "not for domain 0, but for special nodes",
        "as in 4.22",
        """
        quota path-max 20
        a WRITE /a/path/longer/than/that| -> EINVAL / OK|
        a WRITE /local/domain/1/data/name| -> OK|
        1 WRITE data/longer/than/that| -> EINVAL
        quota path-max 12
        1 WATCH @introduceDomain|t| -> OK| / EINVAL
        1 events -> @introduceDomain:t / none
        """,
        avoided=_long_paths,
    ),
    "limit on memory": Difference(
        "a write beyond the quota on memory says EIO, or with domain 0 as the writer what is left of an earlier error, and "
        "the daemon may end; replies and the names of a transaction's copies count",
        "ENOMEM; they do not count",
        "ENOMEM is what the log says there, too; a reply is in a buffer of limited size, whoever asks",
        test="test_memory",
    ),
    "unread events": Difference(
        "an event counts as read when all of it is in the ring, or with the kernel",
        "up to 4 KiB of events before that",
        "they are written in one piece; only what waits longer is merged, dropped after 20 s, or outstanding",
        test="test_who_does_not_read",
    ),
    "events of a removed watch": Difference(
        "events that wait are told although their watch was removed",
        "they are dropped",
        "nobody expects them any more",
        test="test_events_of_a_removed_watch",
    ),
    "ring": Difference(
        "a ring says that the server has no features, and once `error` is set it stays and only RELEASE helps",
        "features 15; a second INTRODUCE or the guest's own XENSTORE_RECONNECT begins anew",
        "xenstore-ring.txt offers it",
        test="test_a_faulty_ring",
    ),
    "depth of a watch": Difference(
        "WATCH has two strings",
        "a third is the depth",
        NEW,
        """
        a WATCH /a|t|1| -> EINVAL / OK|
        a events -> none / /a:t
        """,
    ),
    "features and quotas": Difference(
        "no GET_FEATURE, SET_FEATURE, GET_QUOTA, SET_QUOTA",
        "all of them",
        NEW,
        """
        a GET_FEATURE -> ENOSYS / 15|
        a SET_FEATURE 1|0| -> ENOSYS / EBUSY
        a GET_QUOTA nodes| -> ENOSYS / 1000|
        a SET_QUOTA nodes|5| -> ENOSYS / OK|
        """,
    ),
    "commands": Difference(
        "CONTROL logfile, memreport; live-update with the steps of a session",
        "CONTROL stats, quota-usage; live-update at once",
        "the log is that of xenfs; no program is exchanged",
        """
        a CONTROL stats| -> EINVAL / *
        a CONTROL quota-usage|1| -> EINVAL / *
        a CONTROL help| -> *
        a CONTROL live-update|-a| -> No live-update session active.| / OK|
        """,
    ),
    "numbers of commands": Difference(
        "a number that CONTROL quota is given may have anything behind it",
        "EINVAL",
        "misspelt",
        """
        a CONTROL quota|set|nodes|5x| -> OK| / EINVAL
        a CONTROL quota|x| -> * / EINVAL
        """,
    ),
    "quota of who is not introduced": Difference(
        "CONTROL quota does not know a domain that was never introduced or named in a permission",
        "it does if it exists",
        "nobody has to know what was named before",
        """
        create 3
        a CONTROL quota|3| -> ENOENT / *
        """,
    ),
    "domids in permissions": Difference(
        "the domid in a permission may be hexadecimal, octal, signed, and of 32 bits",
        "decimal and of 16 bits, otherwise EINVAL",
        "no domain has another",
        """
        a SET_PERMS /tool|n0|r0x1| -> OK| / EINVAL
        a SET_PERMS /tool|n0|r-1| -> OK| / EINVAL
        a SET_PERMS /tool|n70000| -> ENOENT / EINVAL
        """,
    ),
    "numbers of transactions": Difference(
        "transactions after a second INTRODUCE go on counting",
        "from 1",
        "it is a new connection",
        """
        1 TRANSACTION_START | -> $t
        introduce 1
        1 TRANSACTION_START | -> 2| / 1|
        """,
        excuse=_transaction_numbers,
    ),
    "generations": Difference(
        "the generation in DIRECTORY_PART's reply is that of the daemon",
        "another number that changes when it does",
        "it has no meaning of its own",
        "a DIRECTORY_PART /|0| -> *",
        excuse=_generations,
    ),
}

EXCUSES = [each.excuse for each in DIFFERENCES.values() if each.excuse]
UNORDERED = frozenset(each.unordered for each in DIFFERENCES.values() if each.unordered is not None)


def avoided(twins: Twins, request: Request) -> bool:
    return any(each.avoided(twins, request) for each in DIFFERENCES.values() if each.avoided)


def set_limit(twins: Twins, name: str, value: int) -> None:
    """A limit that means the same with both."""
    more = sum(each.quota[1] for each in DIFFERENCES.values() if each.quota and each.quota[0] == name)
    twins.quota(name, value - more, value)
