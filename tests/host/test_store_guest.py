"""Goal: a guest's device is, for Xen's own tools, the store as that guest sees it on Xen.
Method: transcripts (see test_store_tools.py) over domains/1/dev/xen/xenbus, and a namespace that has it as /dev/xen."""

from __future__ import annotations

import pytest

from tests.host.test_store_tools import needs_tools, replay

pytestmark = [pytest.mark.host, *needs_tools]

GUEST_SAYS = r"""
$ xenstore-read name domid /local/domain/1/name
g
1
g
$ xenstore-write data/x 1 attr/y 2 /local/domain/1/data/z 3
$ xenstore-ls -fp data
data/x = "1"   (n1)
data/z = "3"   (n1)
$ xenstore-watch -n 3 data/x device/vbd /local/domain/1/name
data/x
device/vbd
/local/domain/1/name
$ xenstore-write name other
xenstore-write: could not write path name
[1]
$ xenstore-write data/x 2 device/new 1
xenstore-write: could not write path device/new
[1]
$ xenstore-read data/x
1
$ xenstore-ls /
xenstore-ls: xs_directory (/): Permission denied
[1]
$ xenstore-ls /local/domain
xenstore-ls: xs_directory (/local/domain): Permission denied
[1]
$ xenstore-read /local/domain/0/name
xenstore-read: couldn't read path /local/domain/0/name
[1]
$ xenstore-read /local/domain/0/backend/vbd/1/51712/state
4
$ xenstore-chmod data/x n1 r0
$ xenstore-chmod data/x n0 r1
xenstore-chmod: Error occurred setting permissions on 'data/x': Operation not permitted
[1]
$ xenstore-chmod name n1
xenstore-chmod: Error occurred setting permissions on 'name': Permission denied
[1]
$ xenstore-write data/big "$(printf '%02020d' 1)"
$ xenstore-write data/bigger "$(printf '%02050d' 1)"
xenstore-write: could not write path data/bigger
[1]
$ xenstore-rm data/x data/z data/big attr/y
$ xenstore-list data
$ xenstore-control check
Error 13 when trying to execute command.
[3]
"""


def test_guest(host):
    """Goal: through a guest's device the tools have the guest's rights; its paths are relative.
    Method: a transcript. The refusals are those of a guest on Xen 4.17."""
    server = host.disk()
    assert replay(host, f"{server.mnt}/domains/g/dev/xen/xenbus", GUEST_SAYS) == GUEST_SAYS
    server.stop()


INSIDE = """
mount -t tmpfs none /run
mount -t tmpfs none /dev
mkdir /dev/xen
mount --bind "$1"/dev/xen /dev/xen
xenstore-read name
xenstore-write data/inside 1
xenstore-ls data
xenstore-rm data/inside
"""


def test_as_inside_a_guest(host):
    """Goal: with a domain's dev/xen where a kernel has it, programs need to be told nothing.
    Method: a mount namespace without a daemon's socket; the tools without any environment."""
    server = host.disk()
    namespace = ["unshare", "--mount", "--propagation=private", "sh", "-ec", INSIDE, "sh"]
    assert host.check(*namespace, server.mnt / "domains/g") == 'g\ninside = "1"\n'
    server.stop()
