r"""Goal: Xen's own tools, xenstore-ls and its kin and xenstore-control, say of our store what they say of Xen's.
Method: transcripts of their commands, replayed over the socket, the device files of domain 0, and Debian's C daemon, which
runs without Xen. In a transcript `$ ` is a command, `[1]` a status other than 0."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench import realstore
from tests.host.net import wait_until
from tests.host.served import Host, Served

CONTROL = realstore.find("xenstore-control")
needs_utils = pytest.mark.skipif(not shutil.which("xenstore-ls"), reason="xenstore-utils is not installed")
needs_control = pytest.mark.skipif(CONTROL is None, reason="xen-utils (for xenstore-control) is not installed")
pytestmark = [pytest.mark.host, needs_utils, needs_control]
GUEST = 1
REAL = pytest.param(
    "C xenstored", marks=pytest.mark.skipif(bool(why := realstore.missing("xenstored")), reason=why or "it can run")
)

NODES = r"""
$ xenstore-write /t/a 1
$ xenstore-write /t/b/x "two words" /t/b/y "" /t/c 3
$ xenstore-read /t/a /t/b/x /t/b/y
1
two words

$ xenstore-read -p /t/a /t/b/x
/t/a: 1
/t/b/x: two words
$ xenstore-read /t/a /t/none
xenstore-read: couldn't read path /t/none
1
[1]
$ xenstore-exists /t/a /t/b
$ xenstore-exists /t/a /t/none
[1]
$ xenstore-list /t
a
b
c
$ xenstore-list -p /t /t/b
/t/a
/t/b
/t/c
/t/b/x
/t/b/y
$ xenstore-list /t/a
$ xenstore-list /t/none
xenstore-list: could not list path /t/none
[1]
$ xenstore-ls /t
a = "1"
b = ""
 x = "two words"
 y = ""
c = "3"
$ xenstore-ls -p /t/b
x = "two words"  . . . . . . . . . . . . . . . . . . . . . .  (n0)
y = "" . . . . . . . . . . . . . . . . . . . . . . . . . . .  (n0)
$ xenstore ls -fp /t
/t/a = "1"   (n0)
/t/b = ""   (n0)
/t/b/x = "two words"   (n0)
/t/b/y = ""   (n0)
/t/c = "3"   (n0)
$ xenstore-ls /t/none
xenstore-ls: xs_directory (/t/none): No such file or directory
[1]
"""

BAD_PATHS = r"""
$ xenstore-write /t/a 1
$ xenstore-write /t/a 2 /t//b 2
xenstore-write: could not write path /t//b
[1]
$ xenstore-write /t/a 3 '/t/b c' 3 /t/d 3
xenstore-write: could not write path /t/b c
[1]
$ xenstore-write /t/a/ 4
xenstore-write: could not write path /t/a/
[1]
$ xenstore-ls -f /t
/t/a = "1"
$ xenstore-write @releaseDomain 1
xenstore-write: could not write path @releaseDomain
[1]
$ xenstore-read @releaseDomain
xenstore-read: couldn't read path @releaseDomain
[1]
$ xenstore-ls @releaseDomain
xenstore-ls: xs_directory (@releaseDomain): Invalid argument
[1]
"""

VALUES = r"""
$ xenstore-write /t/q '\x00\x01\n\t\\"end'
$ xenstore-read /t/q
\000\001\n\t\\"end
$ xenstore-read -R /t/q | od -An -c
  \0 001  \n  \t   \   "   e   n   d
$ xenstore-write -R /t/q '\x00\n'
$ xenstore-read -R /t/q; echo .
\x00\n.
$ xenstore-ls -f /t
/t/q = "\\x00\\n"
$ xenstore-write /t/q "$(printf '%0100d' 7)"
$ xenstore-ls /t
q = "00000000000000000000000000000000000000000000000000000000000000000000000\..."
$ xenstore-write /t/q "$(printf '%04073d' 7)"
$ xenstore-read /t/q | wc -c
4074
$ xenstore-write /t/q "$(printf '%04097d' 7)"
xenstore-write: could not write path /t/q
[1]
$ xenstore-read /t/q | wc -c
4074
"""

REMOVAL = r"""
$ xenstore-write /t/a/b/c/d 1 /t/e/f 2 /t/g 3 /t/h 4
$ xenstore-rm /t/none
$ xenstore-rm /t/none/none
xenstore-rm: could not remove path /t/none/none
[1]
$ xenstore-rm /t/a/b/c
$ xenstore-list /t/a/b
$ xenstore-rm -t /t/a/b
$ xenstore-list /t
e
g
h
$ xenstore-rm /t/g /t/none/none
xenstore-rm: could not remove path /t/none/none
[1]
$ xenstore-list /t
e
g
h
$ xenstore-rm /t/g /t/e
$ xenstore-ls -f /t
/t/h = "4"
$ xenstore-rm /
xenstore-rm: could not remove path /
[1]
"""

PERMISSIONS = r"""
$ xenstore-write /t/p/q/r 1 /t/p/q/s 2
$ xenstore-chmod /t/p n0 r1
$ xenstore-write /t/p/inherits 3
$ xenstore-ls -fp /t
/t/p = ""   (n0,r1)
/t/p/q = ""   (n0)
/t/p/q/r = "1"   (n0)
/t/p/q/s = "2"   (n0)
/t/p/inherits = "3"   (n0,r1)
$ xenstore-chmod -r /t/p/q b1 n0
$ xenstore-chmod -u /t/p/q/r w0
$ xenstore-ls -fp /t
/t/p = ""   (w0)
/t/p/q = ""   (w0)
/t/p/q/r = "1"   (w0)
/t/p/q/s = "2"   (b1,n0)
/t/p/inherits = "3"   (n0,r1)
$ xenstore-chmod -u -r /t/p/q n0 r1 w1 b1
$ xenstore-ls -fp /t
/t/p = ""   (n0,r1,w1,b1)
/t/p/q = ""   (n0,r1,w1,b1)
/t/p/q/r = "1"   (n0,r1,w1,b1)
/t/p/q/s = "2"   (n0,r1,w1,b1)
/t/p/inherits = "3"   (n0,r1)
$ xenstore-chmod /t/p n77
xenstore-chmod: Error occurred setting permissions on '/t/p': No such file or directory
[1]
$ xenstore-chmod /t/none r0
xenstore-chmod: Error occurred setting permissions on '/t/none': No such file or directory
[1]
$ xenstore-chmod /t/p
xenstore-chmod: Error occurred setting permissions on '/t/p': Invalid argument
[1]
$ xenstore-chmod -u t n0
xenstore-chmod: Error occurred setting permissions on 't': No such file or directory
[1]
$ xenstore-chmod @releaseDomain n0 r1
$ xenstore-chmod @releaseDomain n0
$ xenstore-ls -fp /t/p/q
/t/p/q/r = "1"   (n0,r1,w1,b1)
/t/p/q/s = "2"   (n0,r1,w1,b1)
"""

FIRST_EVENTS = r"""
$ xenstore-watch -n 2 /t/none /t/none/below
/t/none
/t/none/below
$ xenstore-watch -n 2 @releaseDomain @introduceDomain
@releaseDomain
@introduceDomain
$ xenstore-watch -n 1 /t//a
xenstore-watch: Unable to add watch on /t//a

[1]
"""

MANY = r"""
$ xenstore-write $(for i in $(seq 300); do echo /t/a-child-with-a-long-name-$i $i; done)
$ xenstore-list /t | wc -lc
    300    8592
$ xenstore-list /t | md5sum
08296017fe25b121abd590fff5b764e5  -
$ xenstore-ls -fp /t | wc -l
300
$ for i in $(seq 40); do xenstore-write /t/at-once-$i $i & done; wait; xenstore-list /t | wc -l
340
$ xenstore-rm $(for i in $(seq 300); do echo /t/a-child-with-a-long-name-$i; done)
$ xenstore-list /t | sort -V | tail -n 1
at-once-40
"""

CONTROLS = r"""
$ xenstore-control check
OK
$ xenstore-control quota
Quota settings:
nodes            :     1000 Nodes per domain
watches          :      128 Watches per domain
transactions     :       10 Transactions per domain
outstanding      :       20 Outstanding requests per domain
transaction-nodes:     1024 Max. number of accessed nodes per transaction
memory           :  2621440 Total Xenstore memory per domain (error level)
node-size        :     2048 Max. size of a node
path-max         :     2048 Max. length of a node path
permissions      :        5 Max. number of permissions per node

$ xenstore-control quota set nodes 2000
OK
$ xenstore-control quota set nodes 0 2>&1 | head -n 1
Command not supported. Valid commands are:
$ xenstore-control quota set none 5 2>&1 | head -n 1
Command not supported. Valid commands are:
$ xenstore-control quota | head -n 2
Quota settings:
nodes            :     2000 Nodes per domain
$ xenstore-control quota set nodes 1000
OK
$ xenstore-control quota-soft
Quota settings:
memory           :  2097152 Total Xenstore memory per domain (warning level)

$ xenstore-control quota 0 | cut -c 1-17
Domain 0:
nodes           :
watches         :
transactions    :
outstanding     :
memory          :

$ xenstore-control quota 77
Error 2 when trying to execute command.
[3]
$ xenstore-control print hello world 2>&1 | head -n 1
Command not supported. Valid commands are:
$ xenstore-control print hello
OK
$ xenstore-control log on
OK
$ xenstore-control log off
OK
$ xenstore-control live-update
Missing binary specification
[2]
"""

TRANSCRIPTS = {
    "nodes": NODES, "bad paths": BAD_PATHS, "values": VALUES, "removal": REMOVAL, "permissions": PERMISSIONS,
    "first events": FIRST_EVENTS, "many": MANY, "control": CONTROLS,
}  # fmt: skip
# FreeBSD's device does not pass CONTROL, nor DIRECTORY_PART, without which long lists cannot be read.
OF_FREEBSD = set(TRANSCRIPTS) - {"many", "control"}
WAYS = {"socket": ".xenstored", "device": "/domains/0/dev/xen/xenbus", "FreeBSD's": "/domains/0/dev/xen/xenstore"}
EVERY_WAY = [(way, name) for way in WAYS for name in TRANSCRIPTS if way != "FreeBSD's" or name in OF_FREEBSD]
EVERY_WAY += [pytest.param(*REAL.values, name, marks=REAL.marks) for name in TRANSCRIPTS]


class Stores:
    """A server with one guest, for as long as this file takes, and the C daemon, which knows such a guest too."""

    def __init__(self, host: Host, undo: ExitStack) -> None:
        self.host, self._undo = host, undo
        self.server: Served = host.disk()
        self._real = ""

    def path(self, way: str) -> str:
        if way in WAYS:
            return f"{self.server.mnt}{WAYS[way]}"
        if not self._real:
            daemon = self._undo.enter_context(realstore.RealXenstored(self.host.root / "real"))
            daemon.add_domain(GUEST)
            self._real = str(daemon.socket)
        return self._real


@pytest.fixture(scope="module")
def stores() -> Iterator[Stores]:
    with ExitStack() as undo:
        host = Host(Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="xenfs-host-"))))
        undo.callback(host.close)
        yield (built := Stores(host, undo))
        built.server.process.terminate()
        assert built.server.wait() == 0


def environment(path: object) -> list[str]:
    return ["env", f"XENSTORED_PATH={path}", f"PATH={Path(str(CONTROL)).parent}:{os.environ['PATH']}"]


def replay(host: Host, path: object, transcript: str) -> str:
    """The transcript as this store makes it."""
    said = [""]
    for line in transcript.splitlines():
        if line.startswith("$ "):
            done = host.run(*environment(path), "sh", "-c", line[2:])
            said += [line, *done.stdout.splitlines(), *([f"[{done.returncode}]"] if done.returncode else [])]
    return "\n".join(said) + "\n"


@pytest.mark.parametrize(("way", "name"), EVERY_WAY)
def test_transcript(stores, way, name):
    """Goal: the tools' output and status are the same, whatever carries the requests, as with Xen's daemon.
    Method: one transcript; it begins without /t and is exact to the byte."""
    path = stores.path(way)
    stores.host.check(*environment(path), "xenstore-rm", "/t")
    assert replay(stores.host, path, TRANSCRIPTS[name]) == TRANSCRIPTS[name]


@pytest.mark.parametrize("way", [*WAYS, REAL])
def test_watch(stores, way):
    """Goal: xenstore-watch prints each change below its paths, in order, and ends after as many as it was told.
    Method: one in the background; writes, a transaction, chmod and rm by others, each after the last was seen."""
    path, host = stores.path(way), stores.host
    host.check(*environment(path), "xenstore-rm", "/t")
    said = host.root / f"watched by {way}"
    said.touch()
    script = 'exec xenstore-watch -n 8 /t/a /t/b/c > "$1"'
    watcher = host.client(*environment(path), "sh", "-c", script, "sh", said)
    expected = ""

    def sees(*lines: str) -> None:
        nonlocal expected
        expected += "".join(f"{line}\n" for line in lines)
        wait_until(lambda: said.read_text() == expected, f"{lines} after {said.read_text()!r}")

    def do(*words: str) -> None:
        host.check(*environment(path), *words)

    sees("/t/a", "/t/b/c")
    do("xenstore-write", "/t/a/x/y", "1")
    sees("/t/a/x/y")
    do("xenstore-write", "/t/b/d", "1", "/t/a", "1", "/t/b/c", "1")
    sees("/t/a", "/t/b/c")
    do("xenstore-chmod", "/t/a/x", "r0")
    sees("/t/a/x")
    do("xenstore-rm", "/t/b")
    sees("/t/b/c")
    do("xenstore-rm", "/t/a/x")
    sees("/t/a/x")  # the tool removes in a transaction, which says nothing of what it has not looked at
    assert host.finish(watcher).returncode == 0
