"""Goal: a check finds whatever is wrong with the tree, and a live update is something that no client can tell.
Method: damage each thing that the check looks at; compare all that can be asked for before and after a reload."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.xenmodel.xenstore import World, run
from xenmodel.types import Domid
from xenmodel.xenstore.perms import Access, Perm
from xenmodel.xenstore.store import Store
from xenmodel.xenstore.transaction import Tree
from xenmodel.xenstore.upkeep import problems, reload

# --- check ---------------------------------------------------------------------------------------------------------------


def lose_a_node(tree: Tree) -> None:
    """Its parent still lists it."""
    tree.replace("/local/domain/1/data", None)


def lose_a_name(tree: Tree) -> None:
    node = tree.nodes["/local/domain"]
    del node.children["1"]
    node.children_bytes -= 2
    node.listing = None


def lose_a_parent(tree: Tree) -> None:
    tree.replace("/local/domain/1", None)
    lose_a_name(tree)


def wrong_size_of_names(tree: Tree) -> None:
    """And so of the memory, which counts it."""
    tree.nodes["/local"].children_bytes += 1


def wrong_owner(tree: Tree) -> None:
    tree.nodes["/local/domain/1"].perms = (Perm(Domid(2), Access.NONE),)


def not_counted(tree: Tree) -> None:
    del tree.owned[Domid(1)]["/local/domain/1/data"]


def counted_twice(tree: Tree) -> None:
    tree.owned[Domid(2)]["/local/domain/1/none"] = None


def wrong_memory(tree: Tree) -> None:
    tree.memory[Domid(1)] += 1


DAMAGE: dict[str, tuple[Callable[[Tree], None], list[str]]] = {
    "a node is lost": (lose_a_node, ["/local/domain/1 has a child data that is not there"]),
    "a name is lost": (lose_a_name, ["/local/domain/1 is not among the children of the node above it",
                                     "what the domains own is not what is there"]),
    "a parent is lost": (lose_a_parent, ["/local/domain/1/data is not among the children of the node above it",
                                         "what the domains own is not what is there"]),
    "names have another size": (wrong_size_of_names, ["/local counts 8 bytes of names and has 7",
                                                      "what the domains own is not what is there"]),
    "a node has another owner": (wrong_owner, ["/local/domain/1 belongs to domain 2 and is counted for 0",
                                               "what the domains own is not what is there"]),
    "a node is not counted": (not_counted, ["/local/domain/1/data belongs to domain 1 and is counted for None",
                                            "what the domains own is not what is there"]),
    "a node is counted that is not there": (counted_twice, ["what the domains own is not what is there"]),
    "bytes are not counted": (wrong_memory, ["what the domains own is not what is there"]),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "sentences"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_check_finds_what_is_wrong(damage: Callable[[Tree], None], sentences: list[str]) -> None:
    world = run("")
    assert problems(world.store) == []
    damage(world.store.tree)
    assert problems(world.store) == sentences


def test_nothing_is_wrong_with_what_clients_can_do() -> None:
    world = run("""
        1 write data/a/b/c 1
        0 chmod @releaseDomain n1 r2
        0 chmod / r0 b1
        0 chmod /local/domain/1/data n32757
        1 start t
        1.t rm data/a
        1.t write data/a/b 1
        1 commit t
        1 start t
        1.t rm data/a
        0 release 2
        0 created 2
        0 write /local/domain/2/data 1
    """)
    assert problems(world.store) == []
    world.run("0 release 1")
    assert problems(world.store) == []


# --- reload --------------------------------------------------------------------------------------------------------------


def snapshot(world: World) -> object:
    """What the control domain can ask for, and the usage of the domains."""
    control = world.connection("0")
    nodes = {path: (value, perms, control.directory(path)) for path, value, perms in world.store.dump()}
    special = [control.get_perms(path) for path in ("@introduceDomain", "@releaseDomain")]
    usages = [(world.store.usage(Domid(domid)), world.store.is_introduced(Domid(domid))) for domid in range(4)]
    return list(nodes.items()), special, usages


def test_everything_is_as_before() -> None:
    """Goal: nodes, permissions, order, counts, watches and their events, connections.
    Method: a store with some of each; ask before and after, then use it."""
    world = run("""
        0 introduce 1
        1 write data/zz 1
        1 write data/aa value
        1 write data/mm/deep/er ""
        0 chmod /local/domain/1/data/mm r1 b2 r32757
        0 chmod @releaseDomain n0 r1
        0 chmod / b0
        0 write / root
        1 watch data/zz two
        1 watch data one
        0 watch @releaseDomain out
        1 events -> data/zz:two data:one
        0 events -> @releaseDomain:out
        1 write data/aa value
        1 write data/zz 1
    """)
    world.connection("0").write("/bytes", bytes(range(256)))
    before = snapshot(world)
    old = world.store.tree
    reload(world.store)
    assert world.store.tree is not old
    assert snapshot(world) == before
    assert problems(world.store) == []
    world.run("""
        1 events -> data/aa:one data/zz:two data/zz:one
        0 events -> none
        1 write data/zz 2
        1 events -> data/zz:two data/zz:one
        1 watch data one -> EEXIST
        1 unwatch data one
        1 write data/aa 2
        1 events -> none
        0 shutdown 1
        0 events -> @releaseDomain:out
        1 ls data -> zz aa mm
        1 start t
        1.t rm data/mm
        1 commit t
        1 ls data -> zz aa
        0 release 1
        0 ls /local/domain/1 -> nothing
        0 usage 1 -> 0 0 0
    """)
    assert problems(world.store) == []


def test_numbers_of_versions_go_on() -> None:
    """Goal: who reads a long directory in parts learns that it may have changed, and no old number comes back.
    Method: the generations of all nodes before and after, twice."""
    world = run("0 write /d/a 1")
    control = world.connection("0")
    for _ in range(2):
        newest = max(node.generation for node in world.store.tree.nodes.values())
        part = control.directory_part("/d", 0)
        reload(world.store)
        assert min(node.generation for node in world.store.tree.nodes.values()) > newest
        assert control.directory_part("/d", 0)[0] > part[0] and control.directory_part("/d", 0)[1] == part[1]


def test_the_dead_stay_dead() -> None:
    """Goal: no permission of a domain that is gone comes back.  Method: reload between its death and its successor."""
    run("""
        0 write /x 1
        0 chmod /x n0 b1 r2
        0 chmod @releaseDomain n0 r1
        0 release 1
        0 reload
        0 perms /x -> n0 r2
        0 perms @releaseDomain -> n0
        0 created 1
        1 write /x 1 -> EACCES
        2 read /x -> 1
        0 chmod /x n0 b1
        0 reload
        1 write /x 2
        0 release 1
        0 perms /x -> n0
    """)


def test_no_event_is_caused() -> None:
    world = run("0 watch / tok\n0 watch @introduceDomain in\n0 events -> /:tok @introduceDomain:in")
    world.run("0 reload\n0 events -> none")


def test_a_deep_tree_and_a_wide_one() -> None:
    """Goal: neither depth nor width is a limit.  Method: as deep as a path may be, and two thousand children."""
    world = World()
    control = world.connection("0")
    control.write("/d" * 1500, b"bottom")
    for number in range(2000):
        control.mkdir(f"/wide/{number}")
    before = snapshot(world)
    reload(world.store)
    assert snapshot(world) == before and problems(world.store) == []


NAMES = st.lists(st.sampled_from(["a", "b", "local", "@x", "_-9"]), min_size=1, max_size=4)
PERMS = st.lists(
    st.tuples(st.sampled_from([0, 1, 2, 32757, 65535]).map(Domid), st.sampled_from(list(Access))), min_size=1, max_size=4
).map(lambda pairs: [Perm(*pair) for pair in pairs])


@given(nodes=st.lists(st.tuples(NAMES, st.binary(max_size=20), PERMS), max_size=12))
def test_any_tree(nodes: list[tuple[list[str], bytes, list[Perm]]]) -> None:
    """Goal: whatever bytes and permissions.  Method: random trees, compared as they are dumped."""
    store = Store()
    control = store.connect(Domid(0))
    for names, value, perms in nodes:
        path = "/" + "/".join(names)
        control.write(path, value)
        control.set_perms(path, perms)
    before = list(store.dump())
    reload(store)
    assert list(store.dump()) == before and problems(store) == []
    assert list(store.domains.tree.nodes) == list(store.tree.nodes)
