"""errors.py: the errors of the xenstore protocol, io/xs_wire.h (xsd_errors).

Raised by every request; the wire layer sends the name, an edge turns it into the errno of the same name.
EQUOTA is not a protocol name: a quota that is used up answers ENOSPC.
"""

from __future__ import annotations

import enum


class XsErrno(enum.Enum):
    """Names that may travel in an XS_ERROR, in header order."""

    EINVAL = "EINVAL"
    EACCES = "EACCES"
    EEXIST = "EEXIST"
    EISDIR = "EISDIR"
    ENOENT = "ENOENT"
    ENOMEM = "ENOMEM"
    ENOSPC = "ENOSPC"
    EIO = "EIO"
    ENOTEMPTY = "ENOTEMPTY"
    ENOSYS = "ENOSYS"
    EROFS = "EROFS"
    EBUSY = "EBUSY"
    EAGAIN = "EAGAIN"
    EISCONN = "EISCONN"
    E2BIG = "E2BIG"
    EPERM = "EPERM"


class XsError(Exception):
    """A request was refused: `errno` for the caller's program, `what` for the person who reads the log.

    `quota` names the limit that was in the way, if one was.
    """

    def __init__(self, errno: XsErrno, what: str, quota: str = "") -> None:
        super().__init__(errno, what)
        self.errno = errno
        self.what = what
        self.quota = quota

    def __str__(self) -> str:
        return f"{self.errno.value}: {self.what}"


def shown(text: object, limit: int = 80) -> str:
    """`text` as it may stand in a message: quoted, and cut, because a hostile caller chose it."""
    quoted = repr(text)
    return quoted if len(quoted) <= limit else f"{quoted[:limit]}..."
