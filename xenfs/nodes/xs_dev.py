"""xs_dev.py: dev/xen/xenstore as FreeBSD has it, sys/dev/xen/xenstore/xenstore_dev.c: xenstore through a file.

The same stream as Linux's dev/xen/xenbus (xenbus.py, whose XsFile does the work) under other rules: only the requests in
SERVED pass; a transaction that is not this open's, a token that is in use or that nobody uses, and a request that does
not pass, are all an XS_ERROR "EINVAL"; a watch is found by its token alone; the reply to a watch has no transaction; each
request is answered before the next is looked at; poll(2) always says writable; a write beyond the buffer is EINVAL and
leaves what was there.

Unlike FreeBSD: O_NONBLOCK is honoured by reads (there they block all the same), because whoever sets it counts on that,
and by a write that has to wait. A header that promises more than BUFFER_BYTES is EINVAL at once and the buffer is empty
again (there every later write is EINVAL). The mode is 0600, not 0400, which only root's rights make of use. The "OK" of a
watch is the protocol's three bytes (there eight: the size of a pointer). Requests may share a write, and unread replies
are bounded, as described in xenbus.py.
"""

from __future__ import annotations

import errno

from xenfs.nodes.xenbus import WRITABLE, XsDevice, XsFile
from xenmodel.public.io.xs_wire import XsType
from xenmodel.xenstore.wire import Message, join

SERVED = frozenset(
    {
        XsType.TRANSACTION_START, XsType.TRANSACTION_END, XsType.DIRECTORY, XsType.READ, XsType.GET_PERMS,
        XsType.RELEASE, XsType.GET_DOMAIN_PATH, XsType.WRITE, XsType.MKDIR, XsType.RM, XsType.SET_PERMS,
    }
)  # fmt: skip


class XsDevFile(XsFile):
    """An open of FreeBSD's xenstore device."""

    drops_what_overflows = False
    too_long = errno.EINVAL
    always = WRITABLE

    def __init__(self, device: XsDevice) -> None:
        super().__init__(device)
        self.watches: dict[bytes, bytes] = {}  # token -> path

    def ask(self, request: Message) -> None:
        tx_id = request.tx_id
        if request.type in (XsType.WATCH, XsType.UNWATCH):
            self._ask_watch(request._replace(tx_id=0))
        elif request.type not in SERVED or (tx_id and tx_id not in self.peer.connection.transactions):
            self.put_error(request, "EINVAL")
        else:
            self.send(request, self.put)

    def _ask_watch(self, request: Message) -> None:
        watch = self.watch_of(request)
        if watch is None:
            return
        path, token = watch
        if (token in self.watches) is (request.type == XsType.WATCH):
            self.put_error(request, "EINVAL")
        elif request.type == XsType.WATCH:

            def watched(reply: Message) -> None:
                if reply.type != XsType.ERROR:
                    self.watches[token] = path
                self.put(reply)

            self.send(request._replace(body=join(path, token)), watched)
        else:
            body = join(self.watches.pop(token), token)
            self.send(request._replace(body=body), lambda _: self.put(request._replace(body=join("OK"))))
