"""Goal: inspect/evtchn and inspect/grants say who has bound, granted and mapped what, completely, and without making others
wait.  Method: a World with guests, whose tables are compared with what its drivers and its grant tables hold; and domains
alone, with as many grants and ports as there can be, read as Linux would."""

from __future__ import annotations

import errno
import time

import pytest

from blockdev.storage import MemoryStorage
from netdev.netfront import Hash, Want
from tests.netdev.world import NetWorld
from tests.xenfs.machine import Kernel, Machine
from xenfs.fuse.tree import Directory
from xenfs.nodes import ledger
from xenfs.nodes.ledger import Ledger
from xenmodel.domain import Domain
from xenmodel.hypervisor import Hypervisor
from xenmodel.types import Domid

LONGEST_S = 0.050  # of one READ, on a machine that others use too; it is some 2 ms
SIZES = [4096, 128 * 1024]


def columns(text: str, first: str) -> list[dict[str, str]]:
    """The table whose header begins with `first`. All cells but the last have no blanks."""
    lines = iter(text.splitlines())
    header = next(line.split() for line in lines if line.startswith(first))
    rows = []
    for line in lines:
        if not line:
            break
        cells = line.split(None, len(header) - 1)
        assert len(cells) == len(header), line
        rows.append(dict(zip(header, cells, strict=True)))
    return rows


class Bare:
    """Domains without drivers: 0 and 1, and 2 if asked for; `now` is their clock."""

    def __init__(self, domains: int = 2) -> None:
        self.now = 100.0
        self.hypervisor = Hypervisor(clock=lambda: self.now)
        self.domains: list[Domain] = [self.hypervisor.create_domain(256, f"d{i}") for i in range(domains)]
        self.pfn = self.domains[1].memory.allocate()

    def grants(self, domid: int) -> str:
        return ledger.grants(self.domains[domid])


@pytest.fixture
def bare() -> Bare:
    return Bare()


def test_ports_have_owners():
    """Goal: each port of a running guest and of domain 0 says whose it is, by the device's path.
    Method: two disks, a store ring; the ports in the drivers' own queues, and what the store says of the ring."""
    with Machine({"g": {"xvda": MemoryStorage(2048), "xvdb": MemoryStorage(2048)}}) as machine:
        guest, dom0 = (columns(machine.kernel.text(f"domains/{n}/inspect/evtchn"), "port") for n in (1, 0))
        owners = {int(row["port"]): row["bound-by"] for row in guest}
        for vdev, number in (("xvda", 51712), ("xvdb", 51728)):
            for queue in machine.front("g", vdev).queues:
                assert owners.pop(queue.port) == f"kernel: vbd/{number}"
        assert owners.pop(int(machine.kernel.text("xenstore/local/domain/1/store/port"))) == "kernel: xenstore"
        assert owners == {}
        peers = {row["remote"]: row["bound-by"] for row in dom0 if row["remote"].startswith("1:")}
        told = {f"1:{row['port']}": row["bound-by"] for row in guest}
        assert len(peers) == len(told) == 3
        names = {"kernel: vbd/51712": "kernel: vbd/1/51712", "kernel: vbd/51728": "kernel: vbd/1/51728"}
        assert peers == {remote: names.get(by, "xenstored: domain 1") for remote, by in told.items()}
        own = [row["bound-by"] for row in dom0 if row["remote"].startswith("0:")]
        assert sorted(own) == ["kernel: xenstore", "xenstored: domain 0"]


def test_ports_of_a_vif():
    """Goal: every port of an interface has its device's name, of split queues and of the control ring too.
    Method: two queues and a hash, on both sides; the ports that the frontend has published."""
    world = NetWorld()
    vif = world.attach(queues=2, want=Want(hash=Hash(1, bytes(40), (0, 1))))
    assert vif.front.ctrl is not None
    ports = {vif.front.ctrl.port, *(port for queue in vif.front.queues for port in queue.ports)}
    assert len(ports) == 5
    for domain, name, column in ((world.guest, "vif/0", "port"), (world.dom0, f"vif/{world.guest.domid}/0", "remote")):
        rows = columns(ledger.evtchn(domain), "port")
        named = {int(row[column].rpartition(":")[2]) for row in rows if row["bound-by"] == f"kernel: {name}"}
        assert named == ports
    world.close()


def test_port_states(bare):
    """Goal: each state, the bits, the counts and a program's name.  Method: one port of each kind, events on some."""
    zero, one = bare.domains
    waiting = one.events.alloc_unbound(Domid(0))
    bound = zero.events.bind_interdomain(Domid(1), waiting, lambda port: None)
    zero.events.channels[bound].owner = "a b[77]"
    virq, ipi, lonely = one.events.bind_virq(3), one.events.bind_ipi(), one.events.alloc_unbound(Domid(7))
    bare.hypervisor.settle()
    for _ in range(3):
        one.events.send(waiting)
        bare.hypervisor.settle()
    one.events.send(ipi)
    (far,) = columns(ledger.evtchn(zero), "port")
    assert far == {
        "port": str(bound), "state": "interdomain", "remote": f"1:{waiting}", "pending": "0", "masked": "0", "sent": "0",
        "delivered": "4", "bound-by": "a b[77]",
    }  # fmt: skip
    near = {int(row["port"]): tuple(row.values())[1:] for row in columns(ledger.evtchn(one), "port")}
    assert near == {
        waiting: ("interdomain", f"0:{bound}", "0", "1", "3", "0", "kernel"),
        virq: ("virq", "virq:3", "0", "1", "0", "0", "kernel"),
        ipi: ("ipi", "-", "1", "1", "1", "0", "kernel"),
        lonely: ("unbound", "7:-", "0", "1", "0", "0", "kernel"),
    }


def test_all_ports(bare):
    """Goal: 4095 ports are all in inspect/, and the first of them, and how many more, in the text for a device.
    Method: allocate them; close some between two READs."""
    events = bare.domains[1].events
    for _ in range(4095):
        events.alloc_unbound(Domid(0))
    short = ledger.evtchn(bare.domains[1])
    lines = list(ledger.evtchn_lines(bare.domains[1]))
    assert "".join(lines[: 1 + ledger.MOST_PORTS]) + f"... and {4095 - ledger.MOST_PORTS} ports more\n" == short
    assert [line.split()[0] for line in lines] == ["port", *map(str, range(1, 4096))]
    rest = ledger.evtchn_lines(bare.domains[1])
    assert [next(rest).split()[0] for _ in range(3)] == ["port", "1", "2"]
    for port in range(1, 1000):
        events.close(port)
    assert next(rest).split()[0] == "1000"


def test_grants_of_a_disk():
    """Goal: of a running guest every entry is there, with its user; domain 0's list of mappings is the same facts.
    Method: a write; the entries of the grant table, and the mappings that the backend holds."""
    with Machine({"g": {"xvda": MemoryStorage(2048)}}) as machine:
        fh = machine.kernel.handle("domains/1/dev/xvda", 2)
        assert not machine.kernel.write(fh, 0, bytes(64 * 1024)).error
        guest, dom0 = (machine.world.hypervisor.domains[domid] for domid in (1, 0))
        text = machine.kernel.text("domains/1/inspect/grants")
        rows = columns(text, "ref")
        entries = {entry.ref: entry for entry in guest.grants.entries()}
        assert [int(row["ref"]) for row in rows] == sorted(entries)
        assert text.startswith(f"{len(rows)} of {guest.grants.max_frames * 512} references, {guest.grants.frames} of ")
        used = {int(row["ref"]): row for row in rows if row["mapped-by"] != "-"}
        assert used.keys() == guest.grants.active.keys() and len(used) > 2
        for ref, row in used.items():
            assert (row["owner"], row["granted-to"], row["mapped-by"]) == ("1", "0", "0:kernel")
            assert row["flags"].startswith("rw,reading") and int(row["pfn"], 16) == entries[ref].pfn
        mapped = columns(machine.kernel.text("domains/0/inspect/grants"), "handle")
        assert {int(row["handle"]) for row in mapped} == dom0.maptrack.mappings.keys()
        assert {(row["owner"], int(row["ref"]), row["by"]) for row in mapped} == {("1", ref, "kernel") for ref in used}


def test_shared_grant():
    """Goal: who holds a frame, how and for how long, of one that is mapped several times and by nobody.
    Method: mappings at several times and of several owners, in three domains; then a clock that goes on."""
    bare = Bare(3)
    zero, one, two = bare.domains
    free = one.grants.grant_access(Domid(2), bare.pfn, readonly=True)
    shared = one.grants.grant_access(Domid(2), bare.pfn)
    for number, owner in enumerate(("", "vchan x[12]", "peer[9]")):
        bare.now = 100.0 + number
        _, mapping = two.maptrack.map(1, shared)
        assert mapping is not None
        mapping.owner = owner
    own = two.grants.grant_access(Domid(0), two.memory.allocate())
    zero.maptrack.map(2, own)
    bare.now = 110.04
    text = bare.grants(1)
    assert text.startswith("2 of 32768 references, 1 of 64 frames\n") and "from other domains" not in text
    rows = [tuple(row.values()) for row in columns(text, "ref")]
    (plain,) = [row for row in rows if row[0] == str(free)]
    assert plain == (str(free), "1", "2", "r", f"{bare.pfn:#x}", "-", "-")
    held = {row[5:] for row in rows if row[0] == str(shared)}
    assert held == {("10.0s", "2:kernel"), ("9.0s", "2:vchan x[12]"), ("8.0s", "2:peer[9]")} and len(rows) == 4
    assert all(row[3] == "rw,reading,writing" for row in rows if row[0] == str(shared))
    mine = columns(bare.grants(2), "handle")
    assert [tuple(row.values()) for row in mine] == [
        (str(handle), "1", str(shared), "rw", age, by)
        for handle, age, by in ((0, "10.0s", "kernel"), (1, "9.0s", "vchan x[12]"), (2, "8.0s", "peer[9]"))
    ]
    assert "\n3 mapped from other domains\n" in bare.grants(2)


def test_cleared_entry(bare):
    """Goal: a guest cannot hide an entry that is in use.  Method: write zeroes over it, and over one that is not."""
    zero, one = bare.domains
    used, unused = (one.grants.grant_access(Domid(0), bare.pfn) for _ in range(2))
    zero.maptrack.map(1, used)
    table = one.memory.run(next(pfn for pfn in range(1, 256) if any(one.memory.run(pfn))))
    table[:] = bytes(len(table))
    (row,) = columns(bare.grants(1), "ref")
    assert (row["ref"], row["flags"], row["pfn"], row["mapped-by"]) == (str(used), "cleared", f"{bare.pfn:#x}", "0:kernel")
    assert unused != used


def test_more_sharers_than_fit(bare, monkeypatch):
    """Goal: many mappings of one entry are counted where they are not listed.  Method: 50 mappings, a limit of 10."""
    monkeypatch.setattr(ledger, "MOST_SHARERS", 10)
    zero, one = bare.domains
    ref = one.grants.grant_access(Domid(0), bare.pfn)
    for _ in range(50):
        zero.maptrack.map(1, ref)
    rows = columns(bare.grants(1), "ref")
    assert len(rows) == 12 and rows[-1]["mapped-by"] == "0: 39 times more"
    assert len(columns(bare.grants(0), "handle")) == 50


def full() -> tuple[Bare, Kernel]:
    """32760 grants, all mapped, behind the protocol."""
    bare = Bare()
    zero = bare.domains[0]
    big = bare.hypervisor.create_domain(1024, "big")
    pfn = big.memory.allocate()
    for _ in range(big.grants.available):
        assert zero.maptrack.map(big.domid, big.grants.grant_access(Domid(0), pfn))[1] is not None
    tables = {"granted": Ledger(lambda: ledger.grants_lines(big)), "mapped": Ledger(lambda: ledger.grants_lines(zero))}
    return bare, Kernel(Directory(tables))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["granted", "mapped"])
def test_longest_table(name, size):
    """Goal: the table of a full domain is whole, and no READ keeps the others waiting.
    Method: 32760 grants and mappings, read from start to end as cat and Python do; the longest READ."""
    _, kernel = full()
    fh, text, longest_s = kernel.handle(name), b"", 0.0
    while True:
        begin = time.perf_counter()
        part = kernel.read(fh, len(text), size).data
        longest_s = max(longest_s, time.perf_counter() - begin)
        if not part:
            break
        text += part
    rows = columns(text.decode(), "ref" if name == "granted" else "handle")
    assert len({row["ref"] for row in rows}) == len(rows) == 32760
    assert longest_s < LONGEST_S
    assert kernel.read(fh, 0, 1000).data == text[:1000], "back to the start"
    middle = len(text) // 2
    assert kernel.read(fh, middle, 100).data == text[middle : middle + 100]
    assert kernel.read(fh, len(text) + 10**9, 100).data == b""


def test_a_place_not_read_yet():
    """Goal: nobody can ask for all the work in one READ.  Method: a READ far ahead, then one from where one was."""
    _, kernel = full()
    fh = kernel.handle("granted")
    start = kernel.read(fh, 0, 4096).data
    assert kernel.read(fh, 10**6, 4096).error == errno.EINVAL
    assert len(start) == 4096 and kernel.read(fh, 4096, 4096).data
    assert kernel.open(kernel.walk("granted"), 1).error == errno.EACCES


def test_domain_goes_while_it_is_read():
    """Goal: a table that is half read harms nobody and ends when the domains it is about are gone.
    Method: read a piece, destroy both domains, read on."""
    bare, kernel = full()
    granted, mapped = kernel.handle("granted"), kernel.handle("mapped")
    begun = [kernel.read(fh, 0, 4096).data for fh in (granted, mapped)]
    assert all(len(part) == 4096 for part in begun)
    for domid in sorted(bare.hypervisor.domains, reverse=True):
        bare.hypervisor.destroy_domain(domid)
    for fh in (granted, mapped):
        at = 4096
        while part := kernel.read(fh, at, 128 * 1024).data:
            at += len(part)
        assert at > 4096
