"""differences.py: the one table of what Debian's xenstored of Xen 4.17 and ours do not do alike, and why.

Its rows are those of docs/differences.md, word for word. Each has a script (rig.py tells how to read it), or names a test
beside this file, that fails when the difference is there no more. Where random requests could meet it (excuses.py):
    excuse     these two replies may differ, for nothing else will differ because of it
    avoided    this request is left out
    quota      a limit that means this much more with us
    unordered  a request whose reply and events may come in any order
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.xenstored import excuses
from tests.xenstored.rig import Excuse, Request, Twins
from xenmodel.public.io.xs_wire import XsType


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
        avoided=excuses.not_one_string,
    ),
    "special nodes of others": Difference(
        "SET_PERMS of a special node by a guest that may not do that: the same",
        "EACCES",
        MISTAKE,
        """
        1 READ data/none| -> ENOENT
        1 SET_PERMS @releaseDomain|n1| -> ENOENT / EACCES
        """,
        avoided=excuses.specials,
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
        avoided=excuses.specials,
    ),
    "names of special nodes": Difference(
        "any bytes may be the name of a special node to watch",
        "those of paths",
        "as in 4.22",
        """
        a WATCH @re lease|t| -> OK| / EINVAL
        a events -> @re lease:t / none
        """,
        avoided=excuses.odd_specials,
    ),
    "entries of the dead": Difference(
        "GET_PERMS lists entries for domains that have died, which have no effect any more, but count in size and memory",
        "it does not; the next write to the node removes them",
        "as in 4.22",
        """
        a WRITE /p|
        a SET_PERMS /p|n0|r2|b1|
        destroy 2
        a GET_PERMS /p| -> n0|r2|b1| / n0|b1|
        """,
        excuse=excuses.the_dead,
        avoided=excuses.size_with_the_dead,
    ),
    "a permission outlives its domain": Difference(
        "a domid that is used again finds the permissions of its last bearer if nothing was written in between",
        "never",
        "what XSA-322 was about; 4.22 removes the entries when a domain dies",
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
    "a gift for the last bearer": Difference(
        "a node that a transaction gives to a domain which ends before the commit belongs to the next one of that number",
        "to domain 0",
        "as above",
        """
        a WRITE /p|
        a TRANSACTION_START | -> $t
        a.$t SET_PERMS /p|n2|
        destroy 2
        create 2
        a.$t TRANSACTION_END T| -> OK|
        introduce 2
        2 READ /p| -> "" / EACCES
        """,
        avoided=excuses.stale,
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
        avoided=excuses.root_given_away,
    ),
    "a target that ends": Difference(
        "a domain that is the target of another (SET_TARGET) stays introduced, with its nodes, until that has ended, too; "
        "INTRODUCE of a new one with its number ends the daemon",
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
        avoided=excuses.target_ends,
    ),
    "torn": Difference(
        "a transaction that looked at a directory and at a node in it, one before and the other after somebody removed the "
        "node: RM of either says EIO, having the whole store checked, or EINVAL",
        "OK, and EAGAIN in the end, as there",
        "nothing is wrong with the store",
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
        excuse=excuses.torn,
        avoided=excuses.in_torn,
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
        excuse=excuses.too_many_watches,
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
        avoided=excuses.nodes_of_transactions,
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
        avoided=excuses.long_paths,
    ),
    "limit on memory": Difference(
        "a write beyond the quota on memory says EIO, or with domain 0 as the writer what is left of an earlier error, and "
        "the daemon may end; replies and the names of a transaction's copies count",
        "ENOMEM; they do not count",
        "the error that says what is wrong; replies wait in a buffer of limited size, whoever asks",
        test="test_memory",
    ),
    "unread events": Difference(
        "an event waits until all of it is in the ring or with the kernel; those of special nodes are never merged",
        "up to 4 KiB of events do not count as waiting; of the others identical ones are merged, whatever their node",
        "they are written in one piece; whoever waits for an end looks at all domains",
        test="test_who_does_not_read",
    ),
    "many events": Difference(
        "as many events wait as the quota on memory allows",
        "128 of a watch, 1024 of a domain; then one with the watch's own path stands for all further ones",
        "bounded, and whoever watches has to understand such an event anyway",
        test="test_many_events_at_once",
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
        excuse=excuses.transaction_numbers,
    ),
    "generations": Difference(
        "the generation in DIRECTORY_PART's reply is that of the daemon",
        "another number that changes when it does",
        "it has no meaning of its own",
        "a DIRECTORY_PART /|0| -> *",
        excuse=excuses.generations,
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
