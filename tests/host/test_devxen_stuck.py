"""Goal: a program whose memory is not there when an ioctl of dev/xen wants it keeps itself waiting, or its own domain, and
nobody else: not when the page is in a file of this very mount, and not when it never comes.
Method: tests/host/stuckclient.py on the devices of domain 1, with its structures, or the data of GRANT_COPY, in a disk or
a text file of the mount, or in a region of a userfaultfd that nobody serves; meanwhile others use everything.

Structures of a client with the server's own uid are left out: they are read in the loop, at once (xenfs/calls.py), and hang
it if they are in such a place. As such a client could as well kill the server, that is not a hole. So short structures are
tested as another user, whom --device-group lets in; and root with the data of GRANT_COPY, which always is a thread's.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.devxen import SETTLE_S, DevXen, Program, needs_libraries, rows, shared
from tests.host.net import LOOK_S
from tests.host.served import MIB, REPOSITORY, Host
from tests.host.stuckclient import LENGTH, content

pytestmark = [pytest.mark.host, needs_libraries]

ROOT, ANOTHER = 0, 54321
SERVED_S = 2.0  # how soon others are
DATA = bytes(range(LENGTH))
BEHIND = "5ec2e7d0" * (LENGTH // 4)
VERSION = 4 << 16 | 17


class Stuck:
    """Two guests with a disk each, and a page that domain 2 has granted to domain 1."""

    def __init__(self, xen: DevXen) -> None:
        self.xen, self.host, self.mnt = xen, xen.host, xen.served.mnt
        self.owner = xen.grants(2)
        self.area, (self.ref,) = shared(self.owner, "rw", 1, 1)
        self.owner.ok("write", self.area, LENGTH, BEHIND)
        self.before = self.held()

    def held(self) -> object:
        """Ports, what programs have mapped, and who uses that page. A disk's grants come and go with its requests."""
        ports = [set(self.xen.ports(domid)) for domid in range(3)]
        texts = [self.host.read(self.xen.path(domid, "inspect/grants")) for domid in range(3)]
        mapped = [row for text in texts if "handle" in text for row in rows(text, "handle") if row["by"] != "kernel"]
        page = [(row["flags"], row["mapped-by"]) for row in rows(texts[2], "ref") if row["ref"] == str(self.ref)]
        return ports, mapped, page

    def wait_held(self) -> None:
        deadline = time.monotonic() + SETTLE_S
        while (now := self.held()) != self.before:
            assert time.monotonic() < deadline, f"held: {now}, not {self.before}"
            time.sleep(LOOK_S)

    def start(self, memory: object, user: int, operation: str) -> Program:
        """A client of domain 1, about to call."""
        errors = self.host.root / f"client-{len(self.xen.programs)}.stderr"
        script = REPOSITORY / "tests/host/stuckclient.py"
        words = [script, memory, user, self.xen.path(1, "dev/xen"), operation, 2, self.ref]
        process = self.host.client("sh", "-c", 'exec 2>>"$0"; exec "$@"', errors, sys.executable, *words)
        program = Program(process, f"{operation} of user {user}", errors)
        self.xen.programs.append(program)
        assert program.reply() == "ready", program.said()
        return program

    def check_served(self) -> None:
        """Somebody who has nothing to do with it."""
        began = time.monotonic()
        assert self.host.check("cat", self.xen.path(2, "name"), timeout_s=10) == "b\n"
        assert time.monotonic() - began < SERVED_S

    def fill_disk(self) -> Path:
        """A disk of domain 1 with what the client wants there."""
        with open(self.host.root / "a.img", "r+b") as image:
            image.write(content(2, self.ref, DATA))
            os.fsync(image.fileno())
        return self.xen.served.disk("a")


@pytest.fixture
def stuck(host: Host) -> Iterator[Stuck]:
    configs = [host.config(name, f"{host.image(f'{name}.img', 4 * MIB)},raw,xvda,w") for name in "ab"]
    group = Path(f"--device-group={ANOTHER}")
    with DevXen(host, host.up(group, *configs)) as xen:
        yield Stuck(xen)
        xen.served.kill()  # if it went wrong, the clients can end only then


EXPECTED = {"privcmd": str(VERSION), "map": "0", "copy": f"0 0 0 {BEHIND[:8]}", "copy-both": f"0 0 0 {BEHIND[:8]}"}
OWN_MOUNT = [(ANOTHER, "privcmd"), (ANOTHER, "evtchn"), (ANOTHER, "map"), (ANOTHER, "copy"), (ANOTHER, "copy-both"),
             (ROOT, "copy-both")]  # fmt: skip


def test_our_own_disk(stuck: Stuck):
    """Goal: structures and data can be in a disk of the mount that serves the ioctl: pages come from the server itself while
    it handles that ioctl.  Method: no page of it is in the page cache before; each call succeeds, with what is there."""
    disk = stuck.fill_disk()
    for user, operation in OWN_MOUNT:
        client = stuck.start(disk, user, operation)
        stuck.check_served()
        said = client.reply()
        if operation == "evtchn":
            assert said.isdecimal() and int(said) > 0, said
        else:
            assert said == EXPECTED[operation], (user, operation)
        if operation.startswith("copy"):
            assert stuck.owner.ask("read", stuck.area, 0, LENGTH) == DATA.hex()
            stuck.owner.ok("write", stuck.area, 0, "00" * LENGTH)
        assert client.end() == 0
    stuck.wait_held()
    stuck.xen.served.stop()


@pytest.mark.parametrize("path", ["domains/0/name", "domains/1/inspect/evtchn", "domains/1/dev/xen/evtchn"])
def test_our_own_text(stuck: Stuck, path: str):
    """Goal: text files and devices, which have no size and so not one page, are bad pointers and nothing else.
    Method: each call, with all its structures there."""
    for user, operation in OWN_MOUNT:
        client = stuck.start(stuck.mnt / path, user, operation)
        stuck.check_served()
        assert client.reply() == "EFAULT", (user, operation)
        assert client.end() == 0
    stuck.wait_held()
    stuck.xen.served.stop()


def check_everything(stuck: Stuck, round_: int) -> None:
    """What domains 0 and 2 have works, and the disk of domain 1: its devices of dev/xen wait, no more."""
    stuck.check_served()
    one, other = stuck.xen.grants(2), stuck.xen.grants(0)
    area, refs = shared(one, "rw", 0, 4)
    mapped = other.number("map", "rw", 2, *refs)
    one.ok("fill", area, 1000 + round_)
    other.ok("check", mapped, 1000 + round_)
    plain = other.number("alloc", 1)
    assert other.ask("copy", f"2:{refs[0]}:0", f"{plain}+0", 64) == "status 0"
    port = one.number("bind-unbound", 0)
    assert other.number("bind-interdomain", 2, port) > 0
    assert [one.end(), other.end()] == [0, 0]
    for name in "ab":
        disk = stuck.xen.served.disk(name)
        words = ["dd", "if=/dev/urandom", f"of={disk}", "bs=64k", "seek=16", "count=4", "conv=notrunc,fsync"]
        stuck.host.check(*words, timeout_s=20)
    assert stuck.host.read(stuck.mnt / "xenstore/local/domain/2/name").strip() == "b"


STUCK = [
    [(ROOT, "copy-in"), (ROOT, "copy-out"), (ROOT, "copy-in"), (ROOT, "copy-out")],
    [(ANOTHER, "privcmd"), (ANOTHER, "evtchn"), (ANOTHER, "map"), (ANOTHER, "copy")],
]


@pytest.mark.parametrize("ends", ["served", "server", "killed"])
@pytest.mark.parametrize("calls", STUCK, ids=["data", "structures"])
def test_memory_that_never_comes(stuck: Stuck, calls: list[tuple[int, str]], ends: str):
    """Goal: as many stuck ioctls of domain 1 as it has threads harm nobody else, and when they get their memory, or are
    killed, all is as before, with nothing granted or bound, and domain 1's devices work again; and the server can end.
    Method: four clients, and a fifth that has to wait for them; everything is used in the meantime."""
    clients = [stuck.start("userfaultfd", *call) for call in calls]
    disk = stuck.fill_disk()  # which must not be open when the server ends
    waiting = stuck.start(stuck.mnt / "domains/0/name" if ends == "server" else disk, ANOTHER, "privcmd")
    for round_ in range(2):
        check_everything(stuck, round_)
        assert all(client.quiet(0.1) for client in [*clients, waiting])
    if ends == "server":
        stuck.xen.served.stop()
        return
    for client in clients:
        if ends == "killed":
            client.kill()
        else:
            client.send("serve")
            client.reply()
            assert client.end() == 0
    assert waiting.reply() == str(VERSION)
    assert waiting.end() == 0
    stuck.wait_held()
    last = stuck.start(stuck.xen.served.disk("a"), ROOT, "copy-both")
    assert last.reply().startswith("0 0 0 ")
    assert last.end() == 0
    stuck.xen.served.stop()
