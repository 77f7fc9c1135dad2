"""Goal: pyxs, the Python client of xenstore, works with our xenstored as with Xen's.
Method: pyxs in processes of its own, over the socket and the device files; what it says line by line; Xen's C daemon, which
runs without Xen, has to agree."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import realstore
from tests.host.net import wait_until
from tests.host.served import Host, Served
from xenfs.storeclient import StoreClient

pytest.importorskip("pyxs")
pytestmark = pytest.mark.host

# argv: "socket" or "device", its path, the node below which it may write
HEAD = """if 1:
    import errno, sys
    import pyxs
    def connect():
        way, path, top = sys.argv[1:4]
        return pyxs.Client(unix_socket_path=path) if way == "socket" else pyxs.Client(xen_bus_path=path)
    top = sys.argv[3].encode()
    def refused(call, *arguments):
        try:
            print("not refused:", call(*arguments))
        except pyxs.PyXSError as error:
            print(errno.errorcode[error.args[0]])
"""

NODES = """
    with connect() as c:
        c.write(top + b"/a", b"1")
        c[top + b"/b/c"] = b"two words"
        c.mkdir(top + b"/d")
        print(c.read(top + b"/a"), c[top + b"/b/c"], c.read(top + b"/d"))
        print(c.list(top), c.list(top + b"/a"), c.exists(top + b"/b"), c.exists(top + b"/none"))
        print(sorted(name[len(top):] for name, _, _ in c.walk(top)))
        print(c.read(top + b"/none", b"default"))
        refused(c.read, top + b"/none")
        refused(c.delete, top + b"/none/none")
        c.delete(top + b"/a")
        del c[top + b"/b"]
        print(c.list(top))
        c.write(top + b"/d", b"v" * 2000)
        print(len(c.read(top + b"/d")), c.get_domain_path(1))
        c.delete(top)
"""
NODES_SAID = """\
b'1' b'two words' b''
[b'a', b'b', b'd'] [] True False
[b'', b'/a', b'/b', b'/b/c', b'/d']
b'default'
ENOENT
ENOENT
[b'd']
2000 b'/local/domain/1'
"""

PERMISSIONS = """
    with connect() as c:
        c.write(top + b"/a", b"1")
        owner = c.get_perms(top + b"/a")[0][1:]
        print(owner == sys.argv[4].encode())
        c.set_perms(top + b"/a", [b"b" + owner, b"r0", b"w1", b"n0"])
        print(c.get_perms(top + b"/a") == [b"b" + owner, b"r0", b"w1", b"n0"])
        refused(c.set_perms, top + b"/none", [b"n" + owner])
        c.delete(top)
"""
PERMISSIONS_SAID = "True\nTrue\nENOENT\n"

TRANSACTIONS = """
    with connect() as c, connect() as other:
        c.write(top + b"/a", b"1")
        c.transaction()
        c.write(top + b"/a", b"2")
        print(c.read(top + b"/a"), other.read(top + b"/a"), c.commit(), other.read(top + b"/a"))
        c.transaction()
        c.write(top + b"/a", b"3")
        c.rollback()
        print(c.read(top + b"/a"))
        c.transaction()
        c.write(top + b"/a", b"4")
        other.write(top + b"/a", b"5")
        print(c.commit(), c.read(top + b"/a"))
        c.delete(top)
"""
TRANSACTIONS_SAID = "b'2' b'1' True b'2'\nb'2'\nFalse b'5'\n"

MONITOR = """
    with connect() as c, connect() as other, c.monitor() as m:
        m.watch(top, b"all")
        m.watch(top + b"/a", b"one")
        events = m.wait()
        def see(count):
            print(sorted((event.path[len(top):], event.token) for event in (next(events) for _ in range(count))))
        see(2)
        other.write(top + b"/a", b"1")
        see(2)
        c.write(top + b"/b", b"1")
        see(1)
        m.unwatch(top, b"all")
        other.write(top + b"/b", b"2")
        other.write(top + b"/a", b"2")
        see(1)
        other.delete(top)
        see(1)
"""
MONITOR_SAID = """\
[(b'', b'all'), (b'/a', b'one')]
[(b'/a', b'all'), (b'/a', b'one')]
[(b'/b', b'all')]
[(b'/a', b'one')]
[(b'/a', b'one')]
"""

THREADS = """
    import threading
    with connect() as shared:
        def work(number):
            path = top + b"/%d" % number
            for i in range(50):
                shared.write(path, b"%d" % i)
                assert shared.read(path) == b"%d" % i
        threads = [threading.Thread(target=work, args=[i]) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print([shared.read(top + b"/%d" % i) for i in range(8)] == [b"49"] * 8)
        shared.delete(top)
"""

PROGRAMS = {
    "nodes": (NODES, NODES_SAID),
    "permissions": (PERMISSIONS, PERMISSIONS_SAID),
    "transactions": (TRANSACTIONS, TRANSACTIONS_SAID),
    "monitor": (MONITOR, MONITOR_SAID),
    "threads": (THREADS, "True\n"),
}
# (way, below the mount, where it may write, its domid)
WAYS = {
    "socket": ("socket", ".xenstored", "/t", 0),
    "device": ("device", "/domains/0/dev/xen/xenbus", "/t", 0),
    "guest's device": ("device", "/domains/g/dev/xen/xenbus", "data/t", 1),
    "guest's FreeBSD device": ("device", "/domains/g/dev/xen/xenstore", "data/t", 1),
}


def run(host: Host, code: str, *arguments: object) -> str:
    return host.python(HEAD + code, *arguments)


@pytest.mark.parametrize("way", WAYS)
def test_pyxs(host, way):
    """Goal: all that a pyxs Client does, alone and with threads, and its monitors, which it has for sockets only.
    Method: one program per group of calls; afterwards nothing of them is left."""
    kind, suffix, top, domid = WAYS[way]
    server: Served = host.disk()
    with StoreClient(f"{server.mnt}.xenstored") as client:
        before = client.control("quota", str(domid)).splitlines()[1:4]
        for name, (code, said) in PROGRAMS.items():
            if name != "monitor" or kind == "socket":
                assert run(host, code, kind, f"{server.mnt}{suffix}", top, domid) == said, name
        # a device's RELEASE comes a moment after the end of its process
        wait_until(lambda: client.control("quota", str(domid)).splitlines()[1:4] == before, f"{before} again")
    server.stop()


@pytest.fixture
def real(tmp_path: Path) -> Iterator[realstore.RealXenstored]:
    if why := realstore.missing("xenstored"):
        pytest.skip(why)
    with realstore.RealXenstored(tmp_path / "real") as store:
        store.add_domain(1)
        yield store


@pytest.mark.parametrize("name", PROGRAMS)
def test_with_the_real_daemon(host, real, name):
    """Goal: what is expected of ours is what Xen's daemon does.  Method: the same programs."""
    code, said = PROGRAMS[name]
    assert run(host, code, "socket", real.socket, "/t", 0) == said


def test_a_guest_is_refused(host):
    """Goal: pyxs has the errno of what a guest may not.  Method: foreign nodes; a value that is too large; CONTROL."""
    server = host.disk()
    code = """
    with connect() as c:
        print(c.read(b"name"))
        refused(c.read, b"/local/domain/0/name")
        refused(c.write, b"name", b"other")
        refused(c.list, b"/")
        refused(c.set_perms, b"data", [b"n0"])
        refused(c.write, b"data/big", b"v" * 3000)
        refused(c.execute_command, 0, b"check\\0")
    """
    said = run(host, code, "device", server.mnt / "domains/g/dev/xen/xenbus", "data")
    assert said.split() == ["b'g'", "EACCES", "EACCES", "EACCES", "EPERM", "ENOSPC", "EACCES"]
    server.stop()


def test_the_environment(host):
    """Goal: a pyxs that is told nothing finds the socket as Xen's tools do.  Method: XENSTORED_PATH and XENSTORED_RUNDIR."""
    config = host.config("g", f"{host.image('a.img')},raw,xvda,w")
    server = host.start(config, Path("--xenstored-socket"), host.root / "run/socket").wait_ready()
    code = "import pyxs\nwith pyxs.Client() as c: print(c.read(b'/local/domain/1/name'))"
    for variable in (f"XENSTORED_PATH={host.root}/run/socket", f"XENSTORED_RUNDIR={host.root}/run"):
        assert host.check("env", variable, sys.executable, "-c", code) == "b'g'\n"
    server.stop()
