"""Goal: the tree under the mount shows the store and the domains as they are at that moment.
Method: LOOKUP, READDIR and READ of a world's whole tree through a Session, while the store and the domains change."""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator

import pytest

import xenfs.nodes.xenstore
from blockdev.storage import MemoryStorage
from tests.xenfs.machine import Kernel, Machine
from xenfs.fuse import kernel as k
from xenfs.nodes.xenstore import StoreTree
from xenmodel.types import Domid

GUEST = "xenstore/local/domain/1"


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine({"g": {"xvda": MemoryStorage(64)}, "h": {"xvda": MemoryStorage(64, readonly=True)}}) as built:
        yield built


def mode(kernel: Kernel, ino: int) -> int:
    return int(k.ATTR_OUT.unpack(kernel.call(k.FUSE_GETATTR, ino, bytes(16)).data)[12])


def size(kernel: Kernel, ino: int) -> int:
    return int(k.ATTR_OUT.unpack(kernel.call(k.FUSE_GETATTR, ino, bytes(16)).data)[4])


def walk_all(kernel: Kernel, path: str = "") -> dict[str, bytes]:
    """Every file below `path`, as find and cat see it, without the devices."""
    found: dict[str, bytes] = {}
    for name in kernel.names(path)[2:]:
        child = f"{path}/{name}".lstrip("/")
        kind = stat.S_IFMT(mode(kernel, kernel.walk(child)))
        if kind == stat.S_IFDIR:
            found |= walk_all(kernel, child)
        elif kind == stat.S_IFLNK:
            found[child] = kernel.call(k.FUSE_READLINK, kernel.walk(child)).data
        elif "/dev/" not in child and not child.endswith("/xen/xenbus"):
            found[child] = kernel.text(child).encode()
    return found


def test_the_store_is_all_there(machine):
    """Goal: every node of the store is a file or a directory with its value.  Method: its dump against the whole tree."""
    found = walk_all(machine.kernel, "xenstore")
    dump = {path: value for path, value, _ in machine.world.hypervisor.store.dump()}
    parents = {path.rpartition("/")[0] or "/" for path in dump if path != "/"}
    expected = {}
    for path, value in dump.items():
        if path not in parents:
            expected[f"xenstore{path}"] = value
        elif value:
            expected[f"xenstore{path}/.value".replace("//", "/")] = value
    assert found == expected


def test_the_rest_of_the_tree(machine):
    """Goal: each domain has its directory, a link by name, its devices and what there is to look at.
    Method: all names; the texts that are known."""
    kernel = machine.kernel
    assert kernel.names("domains") == [".", "..", "0", "1", "g", "2", "h"]
    assert kernel.call(k.FUSE_READLINK, kernel.walk("domains/h")).data == b"2"
    found = walk_all(kernel, "domains")
    for domid, name in ((0, "Domain-0"), (1, "g"), (2, "h")):
        assert found[f"domains/{domid}/name"] == f"{name}\n".encode()
        assert found[f"domains/{domid}/state"] == b"running\n"
        for text in ("evtchn", "grants", "rings"):
            assert found[f"domains/{domid}/inspect/{text}"].endswith(b"\n")
    assert kernel.names("domains/2/dev") == [".", "..", "xen", "xvda"]
    assert mode(kernel, kernel.walk("domains/1/dev/xvda")) == stat.S_IFREG | 0o600
    assert mode(kernel, kernel.walk("domains/2/dev/xvda")) == stat.S_IFREG | 0o400


def test_inspect_tells_the_truth(machine):
    """Goal: rings count the requests, evtchn shows both ends, grants their users.  Method: two reads, a write, a flush."""
    kernel = machine.kernel
    fh = kernel.handle("domains/1/dev/xvda", 2)
    for _ in range(2):
        kernel.read(fh, 0, 512)
    kernel.write(fh, 0, bytes(512))
    kernel.fsync(fh)
    lines = kernel.text("domains/0/inspect/rings").splitlines()
    (back,) = [line.split() for line in lines if line.startswith("backend/vbd/1/51712") or "vbd/1/51712" in line]
    assert back[-5:] == ["rd=2", "wr=1", "f=1", "ds=0", "errors=0"]
    (front,) = [line.split() for line in kernel.text("domains/1/inspect/rings").splitlines() if "51712" in line]
    columns = lines[0].split()
    assert front[columns.index("req_prod")] == front[columns.index("rsp_prod")] == "4"
    port = kernel.text(f"{GUEST}/device/vbd/51712/event-channel")
    (channel,) = [line.split() for line in kernel.text("domains/1/inspect/evtchn").splitlines() if line.split()[0] == port]
    assert channel[1] == "interdomain" and channel[2].startswith("0:")
    assert f"1:{port}" in kernel.text("domains/0/inspect/evtchn")
    grants = kernel.text("domains/1/inspect/grants").splitlines()
    assert int(grants[0].split()[0]) == len({line.split()[0] for line in grants[2:]})
    header = grants[1].split()
    ring = kernel.text(f"{GUEST}/device/vbd/51712/ring-ref")
    (entry,) = [line.split() for line in grants[2:] if line.split()[0] == ring]
    assert (entry[header.index("granted-to")], entry[header.index("mapped-by")]) == ("0", "0:kernel")


def test_change_is_seen(machine):
    """Goal: a value, a new node and a removal are seen at once, also through inodes that were looked up before.
    Method: the store is changed between requests."""
    kernel, write = machine.kernel, machine.world.toolstack.client.write
    write("/local/domain/1/data/x", "1")
    write("/local/domain/1/data/y", "stays")
    ino = kernel.walk(f"{GUEST}/data/x")
    assert kernel.text(f"{GUEST}/data/x") == "1"
    write("/local/domain/1/data/x", "two")
    assert size(kernel, ino) == 3
    assert kernel.text(f"{GUEST}/data/x") == "two"
    assert kernel.walk(f"{GUEST}/data/x") == ino, "the inode is stable while the kind is"
    assert kernel.names(f"{GUEST}/data") == [".", "..", "x", "y"]
    fh = kernel.handle(f"{GUEST}/data/x")
    machine.world.toolstack.client.rm("/local/domain/1/data/x")
    assert kernel.lookup(kernel.walk(f"{GUEST}/data"), "x").error == errno.ENOENT
    assert kernel.names(f"{GUEST}/data") == [".", "..", "y"]
    assert kernel.read(fh, 0, 9).data == b"two", "what is open is of the moment when it was opened"


def test_value_of_a_directory(machine):
    """Goal: a node with children and a value has both; the file `.value` is there only if there is a value.
    Method: give a directory a value and take it away; a leaf becomes a directory and a leaf again."""
    kernel, client = machine.kernel, machine.world.toolstack.client
    client.write("/local/domain/1/data/a/b", "leaf")
    assert kernel.names(f"{GUEST}/data/a") == [".", "..", "b"]
    assert kernel.lookup(kernel.walk(f"{GUEST}/data/a"), ".value").error == errno.ENOENT
    client.write("/local/domain/1/data/a", "both")
    assert kernel.names(f"{GUEST}/data/a") == [".", "..", ".value", "b"]
    assert kernel.text(f"{GUEST}/data/a/.value") == "both"
    as_directory = kernel.walk(f"{GUEST}/data/a")
    client.rm("/local/domain/1/data/a/b")
    as_file = kernel.walk(f"{GUEST}/data/a")
    assert as_file != as_directory and stat.S_ISREG(mode(kernel, as_file)) and kernel.text(f"{GUEST}/data/a") == "both"


def test_what_was_removed(machine):
    """Goal: directories and values that vanish under a client's feet are empty or absent; nothing breaks.
    Method: look everything up, unplug the disk, then ask the old inodes."""
    kernel = machine.kernel
    place = f"{GUEST}/device/vbd/51712"
    directory, value = kernel.walk(place), kernel.walk(f"{place}/state")
    machine.world.toolstack.detach_disk(1, 51712)
    machine.world.settle()
    for name in (".value", "state", "new"):
        assert kernel.lookup(directory, name).error == errno.ENOENT
    fh = k.OPEN_OUT.unpack(kernel.call(k.FUSE_OPENDIR, directory, bytes(8)).data)[0]
    listing = kernel.call(k.FUSE_READDIR, directory, k.READ_IN.pack(fh, 0, 4096, 0, 0, 0, 0)).data
    assert len(listing) == 2 * 32, "only . and .."
    fh = k.OPEN_OUT.unpack(kernel.open(value).data)[0]
    assert kernel.read(fh, 0, 100).data == b""


ODD_NAMES = ["a b", "ü", "@releaseDomain", "x" * 255, "%2f", ".hidden", "a.b", "\x01"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names(machine, name):
    """Goal: names the store cannot have are not found, without a fuss.  Method: LOOKUP in a deep and the top directory."""
    for place in ("xenstore", GUEST):
        assert machine.kernel.lookup(machine.kernel.walk(place), name).error == errno.ENOENT


def test_odd_values(machine):
    """Goal: values are bytes and pass unchanged.  Method: all bytes, and the longest value a domain may write."""
    for value in (bytes(range(256)), b"x" * 2000, b"\n", b"\xff\xfe"):
        machine.world.hypervisor.store.connect(machine.world.dom0.domid).write("/local/domain/1/data/v", value)
        fh = machine.kernel.handle(f"{GUEST}/data/v")
        assert machine.kernel.read(fh, 0, 4096).data == value


def test_forgotten_nodes(monkeypatch):
    """Goal: looking at ever new nodes does not keep them all, but the inodes Linux still knows stay.
    Method: a small limit, many nodes that are looked up, forgotten and removed."""
    monkeypatch.setattr(xenfs.nodes.xenstore, "_FORGOTTEN_AT", 50)
    with Machine({"g": {"xvda": MemoryStorage(64)}}) as machine:
        kernel, client = machine.kernel, machine.world.toolstack.client
        client.write("/local/domain/1/data/stays", "here")
        stays = kernel.walk(f"{GUEST}/data/stays")
        data = kernel.walk(f"{GUEST}/data")
        for i in range(500):
            client.write(f"/local/domain/1/data/n{i}", i)
            ino = k.ENTRY_OUT.unpack(kernel.lookup(data, f"n{i}").data)[0]
            kernel.send(k.FUSE_FORGET, ino, k.FORGET_IN.pack(1))
            client.rm(f"/local/domain/1/data/n{i}")
        directory = machine.world.root.children[b"xenstore"]
        assert len(directory.tree._nodes) <= 60  # type: ignore[attr-defined]
        assert kernel.walk(f"{GUEST}/data/stays") == stays


def test_remembering_many_costs_little_each():
    """Goal: nodes that Linux still knows are not gone through again for every new one; once forgotten they do go.
    Method: 64 Ki nodes that are all known: how often the dictionary is made anew; then forget them, and 64 Ki more."""
    with Machine({}) as machine:
        tree = StoreTree(machine.world.hypervisor.store.connect(Domid(0)))
        rebuilds, many = 0, 1 << 16
        for i in range(2 * many):
            before = tree._nodes
            tree.remember(f"/n{i}", False).links = 1 if i < many else 0
            rebuilds += tree._nodes is not before
            if i == many - 1:
                assert len(tree._nodes) == many and 1 <= rebuilds <= 5, f"{rebuilds} rebuilds"
                for node in tree._nodes.values():
                    node.links = 0
        assert rebuilds <= 5 + 1 + many // 4096
        assert len(tree._nodes) <= 2 * 4096


@pytest.mark.parametrize("name", ["evtchn", "grants", "rings"])
def test_asking_for_attributes_is_cheap(machine, name):
    """Goal: `ls -l` and stat make no text: it can be long, and anybody may ask.
    Method: count how often the text is made, over LOOKUP, GETATTR and READDIR, then an OPEN."""
    kernel, path = machine.kernel, f"domains/1/inspect/{name}"
    text = machine.guests["g"].directory.children[b"inspect"].children[name.encode()]
    said, say = [], text.say
    text.say = lambda: said.append(name) or say()
    ino = kernel.walk(path)
    assert size(kernel, ino) == 0
    assert kernel.names("domains/1/inspect") == [".", "..", "evtchn", "grants", "rings", "xenstore", "vbd"]
    assert said == []
    shown, again = kernel.text(path), "".join(say())  # a moment later: ages differ
    assert said == [name]
    assert [line.split()[:5] for line in shown.splitlines()] == [line.split()[:5] for line in again.splitlines()]


PRIVATE = [("domains/0/inspect", 0o500), ("domains/1/inspect", 0o500), ("domains/2/inspect", 0o500), ("xenstore", 0o700)]


@pytest.mark.parametrize(("path", "bits"), PRIVATE)
def test_private_directories(machine, path, bits):
    """Goal: what a domain does, and every domain's store nodes, are for who serves the mount.  Method: the mode."""
    assert mode(machine.kernel, machine.kernel.walk(path)) == stat.S_IFDIR | bits
    assert mode(machine.kernel, machine.kernel.walk("domains/1")) == stat.S_IFDIR | 0o555


@pytest.mark.parametrize(("length", "shown"), [(254, True), (255, True), (256, False), (1500, False)])
def test_names_too_long_for_a_file(machine, length, shown):
    """Goal: a guest's node whose name no file can have is left out, and its directory goes on working.
    Method: the guest makes one beside a short one; OPENDIR, READDIR and LOOKUP."""
    kernel, name = machine.kernel, "n" * length
    guest = machine.world.hypervisor.store.connect(Domid(1))
    for each in (name, "short"):
        guest.write(f"data/{each}", each.encode())
    assert kernel.names(f"{GUEST}/data") == [".", "..", *([name] if shown else []), "short"]
    reply = kernel.lookup(kernel.walk(f"{GUEST}/data"), name)
    assert reply.error == (0 if shown else errno.ENAMETOOLONG)
    assert kernel.text(f"{GUEST}/data/short") == "short"
