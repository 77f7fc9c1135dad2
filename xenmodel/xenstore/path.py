"""path.py: names of nodes, docs/misc/xenstore.txt and canonicalize() of tools/xenstored/core.c.

Called by connection.py with what a peer sent; everything behind it sees only canonical paths: absolute,
without trailing or doubled slash, or a special one ("@releaseDomain"). Paths are ASCII, so characters are
bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from xenmodel.public.io.xs_wire import XENSTORE_ABS_PATH_MAX, XENSTORE_REL_PATH_MAX
from xenmodel.types import Domid
from xenmodel.xenstore.errors import XsErrno, XsError, shown

ROOT = "/"
INTRODUCE_DOMAIN = "@introduceDomain"
RELEASE_DOMAIN = "@releaseDomain"
SPECIALS = (INTRODUCE_DOMAIN, RELEASE_DOMAIN)

_VALID = re.compile(r"[A-Za-z0-9/_@-]+")
_DOMAIN_PREFIX = re.compile(r"/local/domain/[0-9]{1,5}/")


def home(domid: Domid) -> str:
    """Where the relative paths of a domain start."""
    return f"/local/domain/{domid}"


def is_special(path: str) -> bool:
    return path.startswith("@")


def is_relative(path: str) -> bool:
    return not path.startswith(("/", "@"))


def canonical(path: str, domid: Domid, path_max: int = 0, special: bool = False) -> str:
    """The absolute form of what `domid` named, or EINVAL. Specials pass only where the request allows them.

    `path_max` is the quota (0: none); as in the daemon the domain's own "/local/domain/<n>/" does not count.
    All lengths are checked on the absolute form too: prepending the home is what makes a short path long.
    """
    relative = is_relative(path)
    if len(path) > (XENSTORE_REL_PATH_MAX if relative else XENSTORE_ABS_PATH_MAX):
        raise _invalid(path, "it is too long")
    if not _VALID.fullmatch(path):
        raise _invalid(path, "it is empty" if not path else "it has a character outside A-Za-z0-9-/_@")
    if is_special(path) and not special:
        raise _invalid(path, "special nodes can only be watched and have permissions")
    name = f"{home(domid)}/{path}" if relative else path
    if name != ROOT and name.endswith("/"):
        raise _invalid(path, "it ends in a slash")
    if "//" in name:
        raise _invalid(path, "it has a doubled slash")
    prefix = _DOMAIN_PREFIX.match(name)
    counted = len(name) - (prefix.end() if prefix else 0)
    if len(name) > XENSTORE_ABS_PATH_MAX or (path_max and counted > path_max):
        raise _invalid(path, "it is too long")
    return name


def parent(path: str) -> str:
    """The node above. Of a special node it is the root, which decides who may know that it is missing."""
    return path[: path.rfind("/")] if path.rfind("/") > 0 else ROOT


def name_of(path: str) -> str:
    return path[path.rfind("/") + 1 :]


def child(path: str, name: str) -> str:
    return f"/{name}" if path == ROOT else f"{path}/{name}"


def lineage(path: str) -> Iterator[str]:
    """The path itself, then every node above it up to the root; a special node has none above it."""
    yield path
    if is_special(path):
        return
    while path != ROOT:
        path = parent(path)
        yield path


def children_first(preorder: Iterable[str]) -> Iterator[str]:
    """A subtree whose nodes come before their children, in the order in which the daemon removes it."""
    entered: list[str] = []
    for path in preorder:
        while entered and not path.startswith(f"{entered[-1]}/"):
            yield entered.pop()
        entered.append(path)
    yield from reversed(entered)


def _invalid(path: str, why: str) -> XsError:
    return XsError(XsErrno.EINVAL, f"{shown(path)} is not a path: {why}")
