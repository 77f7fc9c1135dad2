"""Goal: unmodified programs speak to xenstore through dev/xen/xenbus and dev/xen/xenstore as through a kernel's devices.
Method: xenstore-utils, a C program on libxenstore and small clients of the file's own rules, on a served mount."""

from __future__ import annotations

import errno
import signal
import subprocess
import time
from pathlib import Path
from subprocess import Popen

import pytest

from tests.host.served import Host, Served

pytestmark = pytest.mark.host

# (the domain, its device, where it may write)
DEVICES = [
    ("0", "dev/xen/xenbus", "/tool/test"),
    ("0", "dev/xen/xenstore", "/tool/test"),
    ("g", "dev/xen/xenbus", "data/test"),
    ("g", "dev/xen/xenstore", "data/test"),
    ("g", "proc/xen/xenbus", "data/test"),
]
BOTH_RULES = ["dev/xen/xenbus", "dev/xen/xenstore"]

# Requests on the bare file; the client's code follows.
CLIENT = """
import fcntl, os, select, signal, struct, sys, time
WATCH, READ, START, WRITE = 4, 2, 6, 11
def request(kind, body, tx=0):
    return struct.pack("<IIII", kind, 1, tx, len(body)) + body
def message(fd):
    kind, _, _, length = struct.unpack("<IIII", os.read(fd, 16))
    body = b""
    while len(body) < length:
        body += os.read(fd, length - len(body))
    return kind, body
fd = os.open(sys.argv[1], os.O_RDWR)
"""


class Guest:
    """One server with one guest, and its programs' view of the store."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.server: Served = host.disk()

    def device(self, domain: str, name: str) -> Path:
        return self.server.mnt / "domains" / domain / name

    def tool(self, device: Path, *words: object) -> str:
        return self.host.check("env", f"XENSTORED_PATH={device}", *words)

    def client(self, device: Path, code: str, *arguments: object) -> Popen[str]:
        return self.host.client("python3", "-u", "-c", CLIENT + code, device, *arguments)

    def usage(self, quota: str) -> int:
        """What the guest uses, as inspect/xenstore says."""
        text = self.host.read(self.device("g", "inspect/xenstore"))
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{quota} "))

    def wait_usage(self, quota: str, wanted: int) -> None:
        """RELEASE comes a moment after close(2) or the end of a process."""
        deadline = time.monotonic() + 10
        while (used := self.usage(quota)) != wanted:
            assert time.monotonic() < deadline, f"{quota}: {used}, not {wanted}"
            time.sleep(0.02)


def line(process: Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


@pytest.fixture
def guest(host: Host) -> Guest:
    return Guest(host)


@pytest.fixture(scope="module")
def watcher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """watcher.c, built where every user may run it."""
    program = tmp_path_factory.mktemp("watcher") / "watcher"
    source = Path(__file__).with_name("watcher.c")
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", program, source, "-lxenstore", "-lpthread"], check=True, timeout=60)
    return program


TOOLS = """
set -eu
xenstore-write "$1/a" 1 "$1/b/c" "two words"
xenstore-read "$1/a" "$1/b/c"
xenstore-list "$1"
xenstore-exists "$1/b" && ! xenstore-exists "$1/none"
xenstore-ls "$1"
xenstore-chmod "$1/a" n"$2" r2
xenstore-ls -fp "$1" | head -n 1
xenstore-rm "$1/a" "$1/b"
xenstore-list "$1"
! xenstore-read "$1/a" 2>&1
"""
SAID = """1
two words
a
b
a = "1"
b = ""
 c = "two words"
{1}/a = "1"   (n{0},r2)
xenstore-read: couldn't read path {1}/a
"""


@pytest.mark.parametrize(("domain", "name", "prefix"), DEVICES)
def test_tools(guest, domain, name, prefix):
    """Goal: the tools of Xen's distribution work through each device.  Method: all that read and change nodes."""
    domid = "1" if domain == "g" else "0"
    said = guest.tool(guest.device(domain, name), "sh", "-c", TOOLS, "sh", prefix, domid)
    assert said == SAID.format(domid, prefix)


@pytest.mark.parametrize(("domain", "name", "prefix"), DEVICES)
def test_threads_with_watches(guest, watcher, domain, name, prefix):
    """Goal: libxenstore's threads, one reading while others write, miss no last value and end.
    Method: watcher.c with 8 connections; afterwards nothing is left."""
    before = guest.usage("watches")
    said = guest.tool(guest.device(domain, name), watcher, prefix, 8, 50)
    assert said.count("own 50, all 50") == 8
    guest.wait_usage("watches", before)


def test_everybody_at_once(guest, watcher):
    """Goal: domains, and both devices of one, do not disturb one another.  Method: watcher.c on four at once."""
    before = guest.usage("watches")
    programs = [
        guest.host.client("env", f"XENSTORED_PATH={guest.device(domain, name)}", watcher, f"{prefix}{i}", 6, 40)
        for i, (domain, name, prefix) in enumerate(DEVICES[:4])
    ]
    for program in programs:
        done = guest.host.finish(program)
        assert (done.returncode, done.stdout.count("own 40, all 40")) == (0, 6), done.stdout
    guest.wait_usage("watches", before)


def test_guest_is_a_guest(guest):
    """Goal: through its device a program has its domain's rights, paths and limits.
    Method: relative and foreign paths; watches up to the quota, then one more."""
    device = guest.device("g", "dev/xen/xenbus")
    assert guest.tool(device, "xenstore-read", "name", "domid") == "g\n1\n"
    refused = guest.host.run("env", f"XENSTORED_PATH={device}", "xenstore-write", "/local/domain/0/x", "1")
    assert refused.returncode == 1 and "could not write path /local/domain/0/x" in refused.stdout
    code = """
for i in range(200):
    try:
        os.write(fd, request(WATCH, b"data\\0%d\\0" % i))
    except OSError as error:
        print(error.errno)
        break
"""
    assert guest.host.finish(guest.client(device, code)).stdout == f"{errno.ENOSPC}\n"
    guest.wait_usage("transactions", 0)
    assert guest.usage("watches") < 10


WAIT_FOR = {
    "poll": "p = select.poll(); p.register(fd, select.POLLIN); print(p.poll(20000) == [(fd, select.POLLIN)])",
    "select": "print(select.select([fd], [], [], 20) == ([fd], [], []))",
    "epoll": "p = select.epoll(); p.register(fd, select.EPOLLIN); print(p.poll(20) == [(fd, select.EPOLLIN)])",
}


@pytest.mark.parametrize("name", BOTH_RULES)
@pytest.mark.parametrize("how", WAIT_FOR)
def test_poll(guest, name, how):
    """Goal: poll, select and epoll wake when an event comes, not before; O_NONBLOCK that fcntl sets is honoured.
    Method: a client that waits for a change which another process makes, three times."""
    device = guest.device("g", name)
    code = f"""
os.write(fd, request(WATCH, b"data/x\\0t\\0"))
print(message(fd), message(fd))
fcntl.fcntl(fd, fcntl.F_SETFL, os.O_RDWR | os.O_NONBLOCK)
for _ in range(3):
    began = time.monotonic()  # before the other process can know that we wait
    try:
        os.read(fd, 16)
    except BlockingIOError:
        print("nothing")
    {WAIT_FOR[how]}
    print(message(fd), time.monotonic() - began > 0.1)
"""
    client = guest.client(device, code)
    assert line(client) == r"(4, b'OK\x00') (15, b'data/x\x00t\x00')"
    for _ in range(3):
        assert line(client) == "nothing"
        time.sleep(0.3)  # long enough to be waiting, and for the client to see that it had to
        guest.tool(device, "xenstore-write", "data/x", "1")
        assert (line(client), line(client)) == ("True", r"(15, b'data/x\x00t\x00') True")
    assert guest.host.finish(client).returncode == 0


@pytest.mark.parametrize("name", BOTH_RULES)
def test_signals(guest, name):
    """Goal: a read that waits ends with a signal that is handled, and a program that waits can be killed.
    Method: SIGALRM with a handler that raises, then a reply can be read; cat and SIGTERM, SIGKILL."""
    device = guest.device("g", name)
    code = """
def handle(number, frame):
    raise TimeoutError
signal.signal(signal.SIGALRM, handle)
try:
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    os.read(fd, 16)
except TimeoutError:
    print("interrupted")
os.write(fd, request(READ, b"name\\0"))
print(message(fd))
"""
    done = guest.host.finish(guest.client(device, code))
    assert done.stdout == "interrupted\n(2, b'g')\n"
    for number in (signal.SIGTERM, signal.SIGKILL):
        client = guest.client(device, "print('open')\nos.read(fd, 16)")
        assert line(client) == "open"
        time.sleep(0.1)
        client.send_signal(number)
        assert guest.host.finish(client, 10).returncode == -number


@pytest.mark.parametrize("name", BOTH_RULES)
def test_killed_program(guest, name):
    """Goal: what a program had of the store goes with it, and not before: fork's copy of the descriptor keeps it.
    Method: transactions and watches; a child that has the file too; SIGKILL to the parent, then to the child."""
    before = guest.usage("watches")
    code = """
for i in range(5):
    os.write(fd, request(START, b"\\0") + request(WATCH, b"data\\0%d\\0" % i))
child = os.fork()
if not child:
    time.sleep(60)
print(child)
time.sleep(60)
"""
    client = guest.client(guest.device("g", name), code)
    child = int(line(client))
    assert (guest.usage("transactions"), guest.usage("watches")) == (5, before + 5)
    client.kill()
    client.wait(10)
    assert (guest.usage("transactions"), guest.usage("watches")) == (5, before + 5)
    guest.host.check("kill", "-KILL", child)
    guest.host.finish(client)
    guest.wait_usage("transactions", 0)
    guest.wait_usage("watches", before)


@pytest.mark.parametrize("name", BOTH_RULES)
def test_writer_that_waits(guest, name):
    """Goal: who never reads waits in write(2) in the end, he alone, and can be killed there.
    Method: requests until EAGAIN, then a blocking one; meanwhile others use the same device."""
    device = guest.device("g", name)
    code = """
os.write(fd, request(WRITE, b"data/large\\0" + bytes(1900)))
fcntl.fcntl(fd, fcntl.F_SETFL, os.O_RDWR | os.O_NONBLOCK)
asked = 0
while True:
    try:
        os.write(fd, request(READ, b"data/large\\0"))
        asked += 1
    except BlockingIOError:
        break
print(asked)
fcntl.fcntl(fd, fcntl.F_SETFL, os.O_RDWR)
os.write(fd, request(READ, b"data/large\\0"))
print("not reached")
"""
    client = guest.client(device, code)
    assert 30 < int(line(client)) < 100
    time.sleep(0.2)
    for _ in range(3):
        assert guest.tool(device, "timeout", "10", "xenstore-read", "name") == "g\n"
        guest.tool(device, "timeout", "10", "xenstore-write", "data/other", "1")
    client.kill()
    done = guest.host.finish(client, 10)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")
    guest.wait_usage("outstanding", 0)


def test_stop_while_programs_wait(guest):
    """Goal: readers and pollers do not keep the server from ending, and learn of its end.
    Method: three that wait; SIGTERM to the server, which must be clean."""
    device = guest.device("g", "dev/xen/xenbus")
    waits = """
print('open')
try:
    os.read(fd, 16)
except OSError as error:
    print(error.errno)
"""
    poll = "p = select.poll(); p.register(fd, select.POLLIN); print('open'); print(p.poll(20000) != [])"
    clients = [guest.client(device, code) for code in (waits, waits, poll)]
    assert [line(client) for client in clients] == ["open"] * 3
    time.sleep(0.2)
    guest.server.stop()
    said = [guest.host.finish(client, 30).stdout for client in clients]
    assert said[2] == "True\n" and all(int(text) in (errno.ECONNABORTED, errno.ENOTCONN) for text in said[:2])
