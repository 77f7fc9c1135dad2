"""Goal: a guest's device is, for Xen's own tools, the store as that guest sees it on Xen.
Method: transcripts (see test_store_tools.py) over domains/1/dev/xen/xenbus, and a namespace that has it as /dev/xen."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from bench.realstore import WireClient
from tests.host.served import MIB
from tests.host.test_store_tools import needs_control, needs_utils, replay
from xenfs.storeclient import StoreClient
from xenmodel.public.io.xs_wire import XsType
from xenmodel.xenstore.wire import join

pytestmark = [pytest.mark.host, needs_utils, needs_control]

QUICK_S = 5.0  # less than xenfs waits for what hangs

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


RELEASED = """if 1:
    import os, struct, sys
    fd = os.open(sys.argv[1], os.O_RDWR)
    os.write(fd, struct.pack("<IIII", 4, 1, 0, 11) + b"data\\0token\\0")
    print(os.read(fd, 19), flush=True)
    sys.stdin.readline()
    read = struct.pack("<IIII", 2, 2, 0, 5) + b"name\\0"
    for call in (lambda: os.write(fd, read), lambda: [os.read(fd, 99) for _ in "xx"]):
        try:
            print(call())
        except OSError as error:
            print(os.strerror(error.errno))
"""


def test_released(host):
    """Goal: after RELEASE of a guest whoever watches @releaseDomain hears of it, what the guest's programs had in the store
    is gone, and their open device says EIO.  Method: a guest without devices; a program with a watch; RELEASE; SIGTERM."""
    server = host.up(host.config("g"))
    program = host.client(sys.executable, "-c", RELEASED, f"{server.mnt}/domains/g/dev/xen/xenbus")
    assert program.stdout is not None and "OK" in program.stdout.readline()
    with StoreClient(f"{server.mnt}.xenstored") as client:
        client.watch("@releaseDomain", "token")
        assert client.wait() == ("@releaseDomain", "token")
        assert client.request([(XsType.RELEASE, join("1"))]) == [b"OK\0"]
        assert client.wait() == ("@releaseDomain", "token")
        assert client.request([(XsType.IS_DOMAIN_INTRODUCED, join("1"))]) == [b"F\0"]
        used = dict(row.split(":") for row in client.control("quota", "1").splitlines()[1:])
        assert [int(used[f"{name:<16}"]) for name in ("nodes", "watches", "outstanding", "memory")] == [0, 0, 0, 0]
        assert client.control("check") == "OK"
    assert program.stdin is not None
    program.stdin.write("\n")
    program.stdin.flush()
    assert host.finish(program).stdout == "Input/output error\nInput/output error\n"
    server.stop()


BUSY = """if 1:
    import mmap, os, sys
    fd = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
    page = mmap.mmap(-1, 4096)
    print("begins", flush=True)
    for call in (os.preadv, os.pwritev):
        try:
            while True:
                call(fd, [page], 4096)
                os.pwritev(fd, [page], 0)
        except OSError as error:
            print(os.strerror(error.errno), flush=True)
"""


def test_released_with_a_disk(host):
    """Goal: RELEASE of a guest fails the I/O of its disk instead of keeping it, says that the disk is gone, leaves another
    guest's alone, and the end is clean and quick.
    Method: a program that reads and writes until it gets an error; RELEASE over the socket; SIGTERM."""
    one, two = (host.config(name, f"{host.image(f'{name}.img')},raw,xvda,w") for name in ("one", "two"))
    server = host.up(one, two)
    programs = [host.client(sys.executable, "-c", BUSY, server.disk("one")) for _ in range(2)]
    assert [program.stdout.readline() for program in programs] == ["begins\n"] * 2
    with WireClient(Path(f"{server.mnt}.xenstored")) as client:
        assert client.request(XsType.RELEASE, b"1\0").body == b"OK\0"
    assert server.line() == "one xvda: gone"
    for program in programs:
        assert host.finish(program).stdout == "Input/output error\n" * 2
    assert host.check("ls", server.mnt / "domains/one/dev") == "xen\n"
    assert host.read(server.mnt / "domains/one/name") == "one\n"
    host.check("dd", "if=/dev/zero", f"of={server.disk('two')}", "bs=64k", "count=4", "conv=notrunc,fsync")
    before = time.monotonic()
    server.stop()
    assert time.monotonic() - before < QUICK_S


FRONTEND = "/local/domain/1/device/vbd/51712"
TOOLSTACK = [
    pytest.param(f"xenstore-rm {FRONTEND}", id="frontend removed"),
    pytest.param("xenstore-rm /local/domain/0/backend/vbd/1", id="backend removed"),
    pytest.param("xenstore-rm /local/domain/1", id="domain removed"),
    pytest.param(f"xenstore-chmod {FRONTEND} n0; xenstore-write {FRONTEND} x", id="hidden"),
]


@pytest.mark.parametrize("script", TOOLSTACK)
def test_nodes_go_under_a_running_guest(host, script):
    """Goal: whatever domain 0 does to the nodes of one guest, another one's disk goes on and the end is clean.
    Method: its nodes are removed or hidden; the other's disk is written and read; SIGTERM."""
    one, two = (host.config(name, f"{host.image(f'{name}.img')},raw,xvda,w") for name in ("one", "two"))
    server = host.up(one, two)
    host.check("env", f"XENSTORED_PATH={server.mnt}.xenstored", "sh", "-ec", script)
    host.check("dd", "if=/dev/urandom", f"of={host.root}/data", "bs=1M", "count=2")
    host.check("dd", f"if={host.root}/data", f"of={server.disk('two')}", "bs=64k", "conv=notrunc,fsync")
    host.check("cmp", "-n", 2 * MIB, host.root / "data", server.disk("two"))
    server.stop()
