"""requests.py: what each message of the protocol asks for; docs/misc/xenstore.txt, wire_funcs[] of tools/xenstored/core.c.

A handler takes the sender, its transaction (0: none) and the body, and returns the reply's body or raises XsError. It
takes bodies apart as the daemon does, which is not always what the specification says: trailing strings are ignored where
the daemon ignores them, numbers are read as atoi() reads them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from xenmodel.public.io.xs_wire import XENSTORE_SERVER_FEATURE_WATCHDEPTH, XsType
from xenmodel.public.xen import DOMID_SELF
from xenmodel.types import Domid
from xenmodel.xenstore import control
from xenmodel.xenstore.errors import XsErrno, XsError, shown
from xenmodel.xenstore.perms import CONTROL_DOMAIN, Perm
from xenmodel.xenstore.wire import strings

if TYPE_CHECKING:
    from xenmodel.xenstore.peer import Peer

Handler = Callable[["Peer", int, bytes], bytes]
OK = b"OK\0"
_NUMBER = re.compile(rb"[ \t\n\v\f\r]*([+-]?[0-9]+)")
_LONG = 1 << 63


def text(data: bytes) -> str:
    """Names and tokens, whatever bytes they have."""
    return data.decode("utf-8", "surrogateescape")


def one(body: bytes) -> str:
    """The one string a body consists of."""
    if body.find(b"\0") != len(body) - 1 or not body:
        raise XsError(XsErrno.EINVAL, f"{shown(body)} is not one string with its NUL")
    return text(body[:-1])


def several(body: bytes, least: int, most: int = 10**6) -> list[bytes]:
    """The strings of a body, from `least` to `most` of them."""
    parts = strings(body)
    if not least <= len(parts) <= most:
        raise XsError(XsErrno.EINVAL, f"{shown(body)} has {len(parts)} strings, not {least} or more")
    return parts


def number(data: str | bytes) -> int:
    """atoi(): what there is of a number at the beginning, or 0; a long that is made an int."""
    match = _NUMBER.match(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data)
    value = min(max(int(match[1]), -_LONG), _LONG - 1) if match else 0
    return ((value + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)


def domain_id(data: str | bytes) -> Domid:
    return Domid(number(data) & 0xFFFFFFFF)


# --- nodes ----------------------------------------------------------------------------------------------------------


def _read(peer: Peer, tx: int, body: bytes) -> bytes:
    return peer.connection.read(one(body), tx)


def _write(peer: Peer, tx: int, body: bytes) -> bytes:
    end = body.find(b"\0")
    if end < 0:
        raise XsError(XsErrno.EINVAL, f"{shown(body)} has no path with its NUL")
    peer.connection.write(text(body[:end]), body[end + 1 :], tx)
    return OK


def _mkdir(peer: Peer, tx: int, body: bytes) -> bytes:
    peer.connection.mkdir(one(body), tx)
    return OK


def _rm(peer: Peer, tx: int, body: bytes) -> bytes:
    peer.connection.rm(one(body), tx)
    return OK


def _directory(peer: Peer, tx: int, body: bytes) -> bytes:
    return peer.connection.names(one(body), tx)


def _directory_part(peer: Peer, tx: int, body: bytes) -> bytes:
    path, offset = several(body, 2, 2)
    generation, names = peer.connection.directory_part(text(path), number(offset) & 0xFFFFFFFF, tx)
    return b"%d\0" % generation + names


def _get_perms(peer: Peer, tx: int, body: bytes) -> bytes:
    return b"".join(b"%s\0" % str(perm).encode() for perm in peer.connection.get_perms(one(body), tx))


def _set_perms(peer: Peer, tx: int, body: bytes) -> bytes:
    path, *perms = several(body, 2)
    peer.store.check_permissions(peer.connection.domid, len(perms))
    peer.connection.set_perms(text(path), [Perm.parse(text(perm)) for perm in perms], tx)
    return OK


# --- watches and transactions -----------------------------------------------------------------------------------------


def _watch(peer: Peer, tx: int, body: bytes) -> bytes:
    offered = peer.connection.record.features & XENSTORE_SERVER_FEATURE_WATCHDEPTH
    path, token, *depth = several(body, 2, 3 if offered else 2)
    peer.connection.watch(text(path), text(token), number(depth[0]) if depth else None)
    return OK


def _unwatch(peer: Peer, tx: int, body: bytes) -> bytes:
    path, token = several(body, 2, 2)
    peer.connection.unwatch(text(path), text(token))
    return OK


def _reset_watches(peer: Peer, tx: int, body: bytes) -> bytes:
    peer.connection.reset_watches()
    return OK


def _transaction_start(peer: Peer, tx: int, body: bytes) -> bytes:
    if tx:
        raise XsError(XsErrno.EBUSY, "there are no transactions within transactions")
    return b"%d\0" % peer.connection.transaction_start()


def _transaction_end(peer: Peer, tx: int, body: bytes) -> bytes:
    how = {b"T\0": True, b"F\0": False}.get(body)
    if how is None:
        raise XsError(XsErrno.EINVAL, f"a transaction ends with T or F, not {shown(body)}")
    peer.connection.transaction_end(tx, how)
    return OK


# --- domains --------------------------------------------------------------------------------------------------------


def _introduce(peer: Peer, tx: int, body: bytes) -> bytes:
    domid, gfn, port, *_ = several(body, 3)
    peer.daemon.introduce(domain_id(domid), number(gfn), number(port) & 0xFFFFFFFF)
    return OK


def _domain(peer: Peer, body: bytes) -> Domid:
    """A domain other than the first, which is introduced."""
    domid = domain_id(one(body))
    if domid == CONTROL_DOMAIN:
        raise XsError(XsErrno.EINVAL, f"{shown(body)} is not a domain that can be released or resumed")
    peer.daemon.introduced(domid)
    return domid


def _release(peer: Peer, tx: int, body: bytes) -> bytes:
    peer.daemon.release(_domain(peer, body))
    return OK


def _resume(peer: Peer, tx: int, body: bytes) -> bytes:
    peer.daemon.introduced(_domain(peer, body)).shutdown = False
    return OK


def _set_target(peer: Peer, tx: int, body: bytes) -> bytes:
    domid, target, *_ = several(body, 2)
    record = peer.daemon.introduced(domain_id(domid))
    record.target = peer.daemon.introduced(domain_id(target)).domid
    return OK


def _get_domain_path(peer: Peer, tx: int, body: bytes) -> bytes:
    return peer.connection.get_domain_path(domain_id(one(body))).encode() + b"\0"


def _is_domain_introduced(peer: Peer, tx: int, body: bytes) -> bytes:
    domid = domain_id(one(body))
    return b"T\0" if domid == DOMID_SELF or peer.store.is_introduced(domid) else b"F\0"


def _get_feature(peer: Peer, tx: int, body: bytes) -> bytes:
    if b"\0" in body and peer.connection.domid != CONTROL_DOMAIN:
        raise XsError(XsErrno.EACCES, f"domain {peer.connection.domid} may not ask about others")
    parts = several(body, 0, 1)
    record = peer.daemon.existing(domain_id(parts[0])) if parts else peer.connection.record
    return b"%d\0" % record.features


def _set_feature(peer: Peer, tx: int, body: bytes) -> bytes:
    domid, features = several(body, 2, 2)
    peer.daemon.set_features(domain_id(domid), number(features))
    return OK


def _get_quota(peer: Peer, tx: int, body: bytes) -> bytes:
    return control.get_quota(peer.daemon, [text(part) for part in several(body, 0, 2)]).encode() + b"\0"


def _set_quota(peer: Peer, tx: int, body: bytes) -> bytes:
    control.set_quota(peer.daemon, [text(part) for part in several(body, 2, 3)])
    return OK


def _control(peer: Peer, tx: int, body: bytes) -> bytes:
    words = [text(part) for part in several(body, 1)]
    return control.run(peer.daemon, words).encode("utf-8", "surrogateescape") + b"\0"


HANDLERS: Mapping[int, Handler] = MappingProxyType(
    {
        XsType.CONTROL: _control,
        XsType.DIRECTORY: _directory,
        XsType.READ: _read,
        XsType.GET_PERMS: _get_perms,
        XsType.WATCH: _watch,
        XsType.UNWATCH: _unwatch,
        XsType.TRANSACTION_START: _transaction_start,
        XsType.TRANSACTION_END: _transaction_end,
        XsType.INTRODUCE: _introduce,
        XsType.RELEASE: _release,
        XsType.GET_DOMAIN_PATH: _get_domain_path,
        XsType.WRITE: _write,
        XsType.MKDIR: _mkdir,
        XsType.RM: _rm,
        XsType.SET_PERMS: _set_perms,
        XsType.IS_DOMAIN_INTRODUCED: _is_domain_introduced,
        XsType.RESUME: _resume,
        XsType.SET_TARGET: _set_target,
        XsType.RESET_WATCHES: _reset_watches,
        XsType.DIRECTORY_PART: _directory_part,
        XsType.GET_FEATURE: _get_feature,
        XsType.SET_FEATURE: _set_feature,
        XsType.GET_QUOTA: _get_quota,
        XsType.SET_QUOTA: _set_quota,
    }
)
# Whose tx_id is ignored.
NO_TRANSACTION = frozenset({XsType.WATCH, XsType.UNWATCH})
# What only the control domain may ask.
PRIVILEGED = frozenset(
    {
        XsType.CONTROL, XsType.INTRODUCE, XsType.RELEASE, XsType.IS_DOMAIN_INTRODUCED, XsType.RESUME, XsType.SET_TARGET,
        XsType.SET_FEATURE, XsType.GET_QUOTA, XsType.SET_QUOTA,
    }
)  # fmt: skip
