"""Goal: a store's text and its state are the same thing for every xenstored: dumped, loaded, told about.
Method: dump() and load() with our own store behind a socket, Debian's C xenstored and oxenstored, and scripted servers."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable

import pytest

from bench import realstore
from tests.xenfs.storepeers import (
    LINES,
    TIMEOUT_S,
    TREE,
    Store,
    entries,
    refuse,
    reply,
    running,
)
from xenfs import storetree
from xenfs.storeclient import ATTEMPTS, Event, Request, StoreClient
from xenfs.storetree import Counts, TreeError, dump, load
from xenmodel.public.io.xs_wire import XsType
from xenmodel.xenstore.dump import HEADER, parse
from xenmodel.xenstore.wire import Message, join


def nodes_of(lines: list[str]) -> list[str]:
    """Without what every store has by itself, and sorted, for oxenstored sorts children."""
    return sorted(line for line in lines if line.startswith("/local") and "/domain/0 " not in line)


def test_round_trip(store):
    """Goal: what was loaded is what is dumped, and loading it again changes nothing.  Method: a tree with all kinds of
    values and permissions; twice."""
    with StoreClient(store.socket) as client:
        counts = load(client, entries())
        assert counts.nodes == len(LINES) and counts.removed == 0
        lines = dump(client)
        assert lines[:2] == [HEADER, '/ = ""   (n0)']
        assert nodes_of(lines) == nodes_of(LINES)
        assert set(LINES) < set(lines)
        assert load(client, parse(lines), replace=True) == Counts(nodes=len(lines) - 1)
        assert dump(client) == lines
        # a part begins with its node
        part = [line for line in lines if line.startswith("/local/domain/1")]
        assert dump(client, "/local/domain/1") == [HEADER, *part]


def test_as_xenstore_ls_prints_it(store):
    """Goal: the lines are those of xenstore-ls -fp, in its order.  Method: run it; it leaves out the root and specials."""
    if shutil.which("xenstore-ls") is None:
        pytest.skip("xenstore-ls is not installed (xenstore-utils)")
    with StoreClient(store.socket) as client:
        load(client, entries())
        client.write("/all-bytes", bytes(range(256)) * 4)
        dumped = [line for line in dump(client) if line.startswith("/") and not line.startswith("/ =")]
    environ = os.environ | {"XENSTORED_PATH": str(store.socket)}
    words = ["xenstore-ls", "-fp"]
    printed = subprocess.run(words, env=environ, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    lines = [line for line in printed.stdout.splitlines() if not line.startswith("/@")]  # as oxenstored shows specials
    assert dumped == lines
    with StoreClient(store.socket) as client:
        assert load(client, parse(printed.stdout.splitlines())).values == 0


@pytest.mark.parametrize("kind", ["xenstored", "oxenstored"])
def test_from_one_store_to_another(kind, ours, tmp_path):
    """Goal: the store of a real Xen can be had here, with its special nodes.  Method: dump one, load the other, compare."""
    with running(kind, tmp_path / "real") as real, StoreClient(real.socket) as client:
        load(client, entries())
        load(client, entries("@releaseDomain   (n0,r1)"))
        lines = dump(client)
    with StoreClient(ours.socket) as client:
        load(client, parse(lines), replace=True)
        assert nodes_of(dump(client)) == nodes_of(lines)
        told = ["n0", "r1"] if kind == "oxenstored" else ["n0"]
        assert list(map(str, client.get_perms("@releaseDomain"))) == told


def test_special_nodes(store):
    """Goal: special nodes have permissions to load, also in a store that cannot be asked for them, as older ones of the C
    daemon; and they are not removed for not being in a file.  Method: load them, replacing all."""
    text = '/ = ""   (n0)\n@releaseDomain   (n0,r1)'
    with StoreClient(store.socket) as client:
        assert load(client, entries(text), replace=True).perms == 1
        lines = dump(client)
        assert ("@releaseDomain   (n0,r1)" in lines) != isinstance(store, realstore.RealXenstored)
        assert load(client, parse(lines), replace=True).perms == 0


def watched(store: Store, change: Callable[[StoreClient], object]) -> list[str]:
    """The paths of all events that a change causes."""
    with StoreClient(store.socket) as client, StoreClient(store.socket) as watcher:
        watcher.watch("/", "t")
        assert watcher.wait() == Event("/", "t")
        change(client)
        client.write("/end", b"")
        paths = []
        while (event := watcher.wait(TIMEOUT_S)) != Event("/end", "t"):
            assert event is not None
            paths.append(event.path)
        return paths


def test_only_what_differs_is_told(store):
    """Goal: a watch fires once for each node that is different, and for no other.  Method: a file with another value,
    other permissions, both, and a new node below a new one; the counts and the events."""
    with StoreClient(store.socket) as client:
        load(client, entries())
    changed = [
        '/local/domain/1/name = "new"   (n0,r1)',
        '/local/domain/1/zz = ""   (n0)',
        '/local/domain/0/name = "zero"   (n0,w1)',
        '/local/domain/1/new/below = "x"   (n1)',
    ]
    paths = [line.split()[0] for line in changed]
    same = [line for line in LINES if line.split()[0] not in paths]
    counts = []
    told = watched(store, lambda client: counts.append(load(client, parse([*same, *changed]))))
    assert counts == [Counts(len(same) + 4, created=1, values=2, perms=2)]
    assert set(told) == set(paths)
    assert len(told) == 4 or isinstance(store, realstore.RealOxenstored)  # which tells of permissions once more


def test_replace(store):
    """Goal: --replace removes what is below the dump's nodes and not in it, one event for each, and nothing beside them.
    Method: nodes at several depths, known and unknown."""
    with StoreClient(store.socket) as client:
        load(client, entries())
        for path in ("/other/x", "/local/other", "/local/domain/1/gone/a/b", "/local/domain/1/zz/value/gone"):
            client.write(path, b"")
    below = [line for line in LINES if line.startswith("/local/domain/1")]
    counts = []
    told = watched(store, lambda client: counts.append(load(client, parse(below), replace=True)))
    assert sorted(told) == ["/local/domain/1/gone", "/local/domain/1/zz/value/gone"]
    assert counts == [Counts(nodes=len(below), removed=2)]
    with StoreClient(store.socket) as client:
        assert client.directory("/local") == ["domain", "other"] and client.directory("/other") == ["x"]
        # a dump of xenstore-ls has no root: --under says that it is whole
        assert load(client, entries(), replace=True).removed == 1
        client.write("/local/other", b"")
        counts = [load(client, entries(), replace=True, under="/local")]
        assert counts[0].removed == 1
        kept = set(client.directory("/"))
        assert {"other", "end", "tool", "local"} <= kept
        client.mkdir("/tool/mine")
        counts = [load(client, [*entries(), *entries('/tool/xenstored = ""   (n0)')], replace=True, under="/")]
        assert counts[0].removed == len(kept - {"tool", "local"} - {each for each in kept if each.startswith("@")}) + 1
        assert {each for each in client.directory("/") if not each.startswith("@")} == {"tool", "local"}
        assert client.directory("/tool") == ["xenstored"]


def test_under(store):
    """Goal: --under loads a part.  Method: a subtree, a name that only begins like it, and one that is not in the file."""
    with StoreClient(store.socket) as client:
        more = entries(f'{TREE}/local/domain/10 = ""   (n0)\n@releaseDomain   (n0)')
        assert load(client, more, under="/local/domain/1").nodes == sum(line.startswith("/local/domain/1") for line in LINES)
        assert client.directory("/local/domain") == ["1"]
        for replace in (False, True):
            with pytest.raises(TreeError, match="nothing in it is at or below /local/domain/7"):
                load(client, entries(), under="/local/domain/7", replace=replace)
        assert client.directory("/local/domain") == ["1"]


def test_many_nodes(store):
    """Goal: a large tree goes through in pieces, parents first, whatever the order of the file, each node told once.
    Method: some pieces of nodes, their children before them; a directory too long for one answer."""
    text = [f'/many/node-{number:04}/child = "{number}"   (n0,r1)' for number in range(2 * storetree.PIECE)]
    text += [f'/many/node-{number:04} = ""   (n0,r1)' for number in range(2 * storetree.PIECE)]
    text += ['/many = "all"   (n0)']
    if not isinstance(store, realstore.RealOxenstored):  # which lets a socket's reply be longer than a message may be
        text += [f'/long/a-name-of-some-length-{number} = ""   (n0)' for number in range(200)]
    told = watched(store, lambda client: load(client, parse(text)))
    paths = [entry.path for entry in parse(text)]
    assert sorted(set(told)) == sorted(paths)
    assert len(told) == len(paths) or isinstance(store, realstore.RealOxenstored)
    with StoreClient(store.socket) as client:
        lines = dump(client, "/many") + (dump(client, "/long")[2:] if "/long" in text[-1] else [])
        assert sorted(lines[1:]) == sorted(text)
        assert load(client, parse(text), replace=True) == Counts(nodes=len(text))


def test_a_domain_that_is_not_there(tmp_path):
    """Goal: C xenstored gives no node to nobody; the error says which and whose, and how far the load came.
    Method: a node of domain 7 in the second piece."""
    first = [f'/n{number} = ""   (n0)' for number in range(storetree.PIECE)]
    with running("xenstored", tmp_path / "real") as real, StoreClient(real.socket) as client:
        for late, done in (('/x = ""   (n7)', storetree.PIECE), ("@releaseDomain   (n7)", storetree.PIECE)):
            says = f"to belong to domain 7, which is not there; done until then: {done} of {done + 1} nodes"
            with pytest.raises(TreeError, match=says):
                load(client, parse([*first, late]))
            assert client.directory("/")[-1] == first[-1].split()[0][1:]


# --- others use the store meanwhile -----------------------------------------------------------------------------------


class Meddled(StoreClient):
    """After the first answers of a transaction somebody else writes, as often as `times` says."""

    meddler: StoreClient
    times = 0

    def request(self, requests: list[Request], tx: int = 0) -> list[bytes | object]:
        answers = super().request(requests, tx)
        if tx and requests and self.times > 0:
            self.times -= 1
            self.meddler.write("/local/domain/1/name", b"times %d" % self.times)
        return answers


@pytest.mark.parametrize("kind", ["ours", "xenstored"])
def test_meanwhile(kind, tmp_path):
    """Goal: dumps and loads that meet another writer begin again, and say so if that does not help.
    Method: one who writes a node they have read, once or each time."""
    with (
        running(kind, tmp_path / "store") as store,
        Meddled(store.socket) as client,
        StoreClient(store.socket) as client.meddler,
    ):
        load(client, entries())
        client.times = 2
        assert '/local/domain/1/name = "times 0"   (n0,r1)' in dump(client)
        client.times = 3
        assert load(client, entries()) == Counts(nodes=len(LINES), values=1)
        client.times = 10**6
        with pytest.raises(TreeError, match=f"/local changed while it was read, {ATTEMPTS} times"):
            dump(client, "/local")
        says = f"others changed the same nodes, {ATTEMPTS} times; done until then: 0 of {len(LINES)} nodes"
        with pytest.raises(TreeError, match=says):
            load(client, entries())
        client.times = 0
        with pytest.raises(TreeError, match="there is no node /local/7"):
            dump(client, "/local/7")


def test_a_node_that_goes_while_it_is_read(ours):
    """Goal: a tree that shrinks while it is dumped is read again.  Method: remove a child after its parent was listed."""

    class Removed(Meddled):
        def request(self, requests: list[Request], tx: int = 0) -> list[bytes | object]:
            answers = StoreClient.request(self, requests, tx)
            if (XsType.READ, join("/local/domain")) in requests and self.times:
                self.times = 0
                self.meddler.rm("/local/domain/1")
            return answers

    with Removed(ours.socket) as client, StoreClient(ours.socket) as client.meddler:
        load(client, entries())
        client.times = 1
        assert nodes_of(dump(client)) == nodes_of([line for line in LINES if not line.startswith("/local/domain/1")])


# --- stores that are not to be trusted --------------------------------------------------------------------------------


def endless(message: Message) -> bytes:
    if message.type == XsType.TRANSACTION_START:
        return reply(message, join("1"))
    return reply(message, {XsType.DIRECTORY: join("a", "b"), XsType.GET_PERMS: join("n0")}.get(message.type, b"OK\0"))


def test_endless_tree(serve, monkeypatch):
    """Goal: a store cannot make a dump grow without end.  Method: one in which each node has children; a lower limit."""
    monkeypatch.setattr(storetree, "NODES_MAX", 1000)
    server = serve(endless)
    with StoreClient(server.path) as client, pytest.raises(TreeError, match="/ has more than 1000 nodes"):
        dump(client)
    assert server.asked[-1].body == b"F\0"
    monkeypatch.setattr(storetree, "NODES_MAX", 10**6)
    monkeypatch.setattr(storetree, "TEXT_MAX", 100_000)
    with StoreClient(server.path) as client, pytest.raises(TreeError, match="or 100000 characters"):
        dump(client)


def test_a_transaction_that_takes_no_more(serve):
    """Goal: a tree that is more than a transaction may read is said to be so.  Method: a store that answers ENOSPC."""
    server = serve(lambda m: refuse(m, "ENOSPC") if m.type in (XsType.READ, XsType.DIRECTORY) else endless(m))
    with StoreClient(server.path) as client, pytest.raises(TreeError, match="/ has more nodes than a transaction may read"):
        dump(client)
