"""Goal: what a request costs does not depend on how large the store is, how many watch it, or how deep it is.
Method: count look-ups of nodes and of watches while the same requests run in a small and in a large store, and see
which directories were copied; no clock."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pytest

from xenmodel.types import Domid
from xenmodel.xenstore.connection import Connection
from xenmodel.xenstore.perms import Access, Perm
from xenmodel.xenstore.store import Store
from xenmodel.xenstore.watch import WatchTable

WIDE, LEAVES = 100, 1000  # 100 directories of 1000 nodes each


class Counting(dict[Any, Any]):
    """A dict that counts look-ups, and one for each item when it is walked through."""

    def __init__(self, content: dict[Any, Any]) -> None:
        super().__init__(content)
        self.count = 0

    def get(self, key: Hashable, default: Any = None) -> Any:
        self.count += 1
        return super().get(key, default)

    def __getitem__(self, key: Hashable) -> Any:
        self.count += 1
        return super().__getitem__(key)

    def pop(self, key: Hashable, *default: Any) -> Any:
        self.count += 1
        return super().pop(key, *default)

    def __iter__(self) -> Any:
        self.count += len(self)
        return super().__iter__()


def populated(directories: int) -> Store:
    store = Store()
    control = store.connect(Domid(0))
    for directory in range(directories):
        for leaf in range(LEAVES):
            control.write(f"/big/{directory}/{leaf}", b"")
    control.write("/local/domain/1/data", b"")
    control.set_perms("/local/domain/1/data", [Perm(Domid(1), Access.NONE)])
    return store


def start_and_commit(control: Connection, store: Store) -> None:
    tx = control.transaction_start()
    control.write("/big/0/x", b"1", tx)
    control.rm("/big/0/7", tx)
    control.transaction_end(tx, True)


def live_and_die(control: Connection, store: Store) -> None:
    guest = store.connect(Domid(1))
    guest.write("data/a/b", b"1")
    store.release(Domid(1))


REQUESTS: dict[str, Callable[[Connection, Store], object]] = {
    "read": lambda control, store: control.read("/big/0/5"),
    "write": lambda control, store: control.write("/big/0/5", b"2"),
    "create": lambda control, store: control.write("/big/0/new/er", b"2"),
    "create in the widest": lambda control, store: control.mkdir("/big/new"),
    "set_perms": lambda control, store: control.set_perms("/big/0", [Perm(Domid(0), Access.READ)]),
    "rm": lambda control, store: control.rm("/big/0/6"),
    "rm of a subtree": lambda control, store: control.rm("/big/0"),
    "missing": lambda control, store: control.rm("/big/none"),
    "transaction_start": lambda control, store: control.transaction_start(),
    "a transaction": start_and_commit,
    "release": live_and_die,
}


@pytest.fixture(scope="module")
def counts() -> list[dict[str, int]]:
    """Look-ups of nodes for each request, in a store of 1000 nodes and in one of 100 000."""
    result = []
    for directories in (1, WIDE):
        store = populated(directories)
        control = store.connect(Domid(0))
        control.watch("/", "everything")
        store.tree.nodes = nodes = Counting(store.tree.nodes)
        row = {}
        for name, request in REQUESTS.items():
            nodes.count = 0
            request(control, store)
            row[name] = nodes.count
        assert len(nodes) > (directories - 1) * LEAVES
        result.append(row)
    return result


@pytest.mark.parametrize("name", REQUESTS)
def test_look_ups_do_not_grow_with_the_tree(counts: list[dict[str, int]], name: str) -> None:
    small, large = counts[0][name], counts[1][name]
    assert small == large
    assert large <= (10 * LEAVES if name == "rm of a subtree" else 60)


def test_starting_a_transaction_looks_at_nothing(counts: list[dict[str, int]]) -> None:
    assert counts[1]["transaction_start"] == 0


def test_only_directories_that_somebody_still_sees_are_copied_and_once() -> None:
    store = populated(2)
    control = store.connect(Domid(0))
    nodes = store.tree.nodes

    def children(path: str) -> int:
        return id(nodes[path].children)

    before = children("/big"), children("/big/0"), children("/big/1")
    control.write("/big/0/a", b"")
    assert (children("/big"), children("/big/0"), children("/big/1")) == before, "nobody sees an older one"
    seen_by = control.transaction_start()
    control.write("/big/0/after", b"")
    assert children("/big/0") == before[1], "nor does a transaction that has not looked"
    assert control.directory("/big/0", seen_by)[-1] == "after"
    old = nodes["/big/0"].children  # kept, or its number might be given to the copy
    control.write("/big/0/b", b"")
    copied = children("/big/0")
    assert copied != before[1] and list(old)[-1] == "after"
    control.write("/big/0/c", b"")
    control.rm("/big/0/a")
    assert (children("/big"), children("/big/0"), children("/big/1")) == (before[0], copied, before[2])
    assert control.directory("/big/0", seen_by)[-2:] == ["a", "after"]


def test_watches_elsewhere_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    store = populated(1)
    control, watcher = store.connect(Domid(0)), store.connect(Domid(0))

    def look_ups() -> int:
        table = Counting(store.watches._by_path)
        monkeypatch.setattr(store.watches, "_by_path", table)
        control.write("/big/0/1", b"3")
        control.rm("/big/0/2")
        monkeypatch.undo()
        return table.count

    assert isinstance(store.watches, WatchTable)
    watcher.watch("/nowhere", "t")
    alone = look_ups()
    for number in range(10_000):
        watcher.watch(f"/elsewhere/{number}", "t")
        watcher.watch(f"/big/0/{number}/below", "t")
    control.mkdir("/big/0/2")
    assert look_ups() == alone <= 8


@pytest.mark.parametrize("name", ["a", "deep-name"])
def test_the_deepest_paths(name: str) -> None:
    """Goal: depth costs no stack (XSA-418). Method: as deep as 3072 bytes allow, well beyond Python's own limit
    of 1000 nested calls for the short name; each request, also removal from the top and death of the owner."""
    depth = 3072 // (len(name) + 1)
    top, bottom = f"/{name}", f"/{name}" * depth
    store = Store()
    control = store.connect(Domid(0))
    control.watch(top, "t")
    control.watch(bottom, "t")
    control.write(bottom, b"x")
    assert control.read(bottom) == b"x"
    assert sum(path.startswith(top) for path, _, _ in store.dump()) == depth
    tx = control.transaction_start()
    control.rm(top, tx)
    control.transaction_end(tx, True)
    assert control.pending_events == 2  # top and bottom, and that once: both watches have the same token
    control.write(bottom, b"x", tx := control.transaction_start())
    control.transaction_end(tx, True)
    control.set_perms(top, [Perm(Domid(1), Access.NONE)])
    assert store.usage(Domid(1)).nodes == 1
    store.release(Domid(1))
    assert control.directory("/") == ["tool"]
