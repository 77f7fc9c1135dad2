"""Goal: a transaction sees a node as it was when it first looked at it, and commits whole or not at all.
Method: a table of scripts in which domains interfere with each other's transactions."""

from __future__ import annotations

import gc

import pytest

from tests.xenmodel.xenstore import World, run
from xenmodel.types import Domid
from xenmodel.xenstore.transaction import Node

SCRIPTS = {
    "nobody sees it before the commit": """
        0 write /a 1
        0 start t
        0.t write /a 2
        0.t write /b/c 3
        0.t read /a -> 2
        0.t ls / -> tool local a b
        0 read /a -> 1
        0b read /b -> ENOENT
        0 commit t
        0b read /a -> 2
        0b read /b/c -> 3
        0 ls / -> tool local a b
    """,
    "an aborted one leaves nothing": """
        0 write /a 1
        0 start t
        0.t rm /a
        0.t write /b 1
        0 abort t
        0 read /a -> 1
        0 read /b -> ENOENT
        0.t read /a -> ENOENT
        0 commit t -> ENOENT
    """,
    "it sees a node as it was at the first look, whatever happened since": """
        0 write /a/x 1
        0 write /a/y 1
        0 start t
        0 write /a/x 2
        0.t read /a/x -> 2
        0.t ls /a -> x y
        0 write /a/x 3
        0 rm /a/y
        0 write /a/z 1
        0 chmod /a r0
        0.t read /a/x -> 2
        0.t ls /a -> x y
        0.t perms /a -> n0
        0.t read /a/y -> ENOENT
        0.t read /a/z -> 1
        0 commit t -> EAGAIN
    """,
    "what happened before the first look is no conflict": """
        0 write /a 1
        0 start t
        0 write /a 2
        0 rm /a
        0 write /a 3
        0.t read /a -> 3
        0.t write /a 4
        0 commit t
        0 read /a -> 4
    """,
    "each has its own first look": """
        0 write /a 1
        0 start t
        0 start u
        0 start v
        0 start w
        0.t read /a -> 1
        0 write /a 2
        0.u read /a -> 2
        0 rm /a
        0.v read /a -> ENOENT
        0 write /a 4
        0.w read /a -> 4
        0 write /a 5
        0.t read /a -> 1
        0.u read /a -> 2
        0.v read /a -> ENOENT
        0.w read /a -> 4
        0 abort v
        0 abort u
        0 write /a 6
        0.t read /a -> 1
        0.w read /a -> 4
        0 read /a -> 6
        0 commit t -> EAGAIN
        0 commit w -> EAGAIN
    """,
    "a node that its parent does not list yet": """
        1 start t
        1.t ls data -> nothing
        1b write data/x 1
        1.t read data/x -> 1
        1.t rm data/x
        1.t read data/x -> ENOENT
        1.t ls data -> nothing
        1 commit t -> EAGAIN
        1 ls data -> x
    """,
    "a node that its parent still lists": """
        1 write data/x/y 1
        1 start t
        1.t ls data -> x
        1b rm data/x
        1.t read data/x -> ENOENT
        1.t write data/x 2
        1.t write data/z 2
        1.t ls data -> x z
        1.t rm data/x
        1.t ls data -> z
        1 commit t -> EAGAIN
        1 start t
        1.t ls data -> nothing
        1 commit t
    """,
    "a subtree of which a part has gone meanwhile": """
        0 write /d/x/y 1
        0 start t
        0.t ls /d/x -> y
        0b rm /d/x
        0.t rm /d
        0.t read /d -> ENOENT
        0 commit t -> EAGAIN
        0 ls /d -> nothing
    """,
    "a node without a parent": """
        0 start t
        0.t read /d -> ENOENT
        0b write /d/x 1
        0.t read /d/x -> 1
        0.t rm /d/x
        0.t read /d -> ENOENT
        0.t write /d/x 2
        0.t ls /d -> x
        0 commit t -> EAGAIN
        0 read /d/x -> 1
    """,
    "two readers never conflict": """
        0 write /a 1
        0 start t
        0 start u
        0.t read /a -> 1
        0.u read /a -> 1
        0 commit t
        0 commit u
    """,
    "only nodes looked at conflict": """
        0 write /a/x 1
        0 write /b/x 1
        0 start t
        0.t write /a/x 2
        0 write /b/x 3
        0 write /b/new 3
        0 write /a/x/below 3
    """
    # A child below the node changes its list of children, as in the daemon.
    + """
        0 commit t -> EAGAIN
        0 start t
        0.t write /a/x 2
        0 write /b/x 4
        0 rm /b/new
        0 commit t
        0 read /a/x -> 2
    """,
    "what was read and then changed by somebody else conflicts": """
        0 write /a 1
        0 start t
        0.t read /a -> 1
        0.t write /b 1
        0 write /a 1
        0 commit t -> EAGAIN
        0 read /b -> ENOENT
    """,
    "what was missing and then made conflicts": """
        0 mkdir /d
        0 start t
        0.t read /d/a -> ENOENT
        0 write /d/a 1
        0 commit t -> EAGAIN
    """,
    "made and removed again since the start is as it was, but its directory is not": """
        0 mkdir /d
        0 start t
        0.t read /d/a/b -> ENOENT
        0 write /d/a/b 1
        0 rm /d/a
        0 commit t -> EAGAIN
    """,
    "removed and made again is not the same node": """
        0 write /d/a 1
        0 start t
        0.t read /d/a -> 1
        0 rm /d/a
        0 write /d/a 1
        0.t read /d/a -> 1
        0 commit t -> EAGAIN
    """,
    "removing a subtree somebody adds to conflicts": """
        0 write /d/a/b 1
        0 start t
        0.t rm /d
        0 write /d/a/b/c 1
        0.t read /d/a/b -> ENOENT
        0 commit t -> EAGAIN
        0 read /d/a/b/c -> 1
    """,
    "the first of two wins, the other may try again": """
        0 write /n 0
        0 start t
        0b start u
        0.t read /n -> 0
        0b.u read /n -> 0
        0.t write /n 1
        0b.u write /n 1
        0 commit t
        0b commit u -> EAGAIN
        0b start u
        0b.u read /n -> 1
        0b.u write /n 2
        0b commit u
        0 read /n -> 2
    """,
    "disjoint ones commute": """
        0 write /a/x 1
        0 write /b/x 1
        0 start t
        0 start u
        0.t write /a/x 2
        0.u write /b/x 3
        0.t write /a/y 2
        0.u write /b/y 3
        0 commit u
        0 commit t
        0 ls /a -> x y
        0 ls /b -> x y
    """,
    "a transaction belongs to its connection": """
        0 start t
        0.t write /a 1
        0b.t write /a 2 -> ENOENT
        0b commit t -> ENOENT
        0 commit t
        0 read /a -> 1
    """,
    "directories shared between versions stay apart": """
        0 write /d/a 1
        0 start t
        0.t ls /d -> a
        0 write /d value
        0 start u
        0.u write /d other
        0 write /d/b 1
        0.t ls /d -> a
        0.u ls /d -> a
        0.u write /d/c 1
        0.u ls /d -> a c
        0.t ls /d -> a
        0 ls /d -> a b
        0.u rm /d/a
        0.u ls /d -> c
        0 rm /d/a
        0 ls /d -> b
        0.t ls /d -> a
        0 commit u -> EAGAIN
        0 start v
        0.v write /d again
        0 start w
        0.w ls /d -> b
        0 commit v
        0 write /d/e 1
        0.w ls /d -> b
        0.t ls /d -> a
        0.t read /d -> ""
        0 read /d -> again
        0 ls /d -> b e
    """,
    "a directory stays shared however often it is written": """
        0 write /d/a 1
        0 start t
        0.t ls /d -> a
        0 write /d one
        0 write /d two
        0 write /d/b 1
        0.t ls /d -> a
        0.t read /d -> ""
        0.t write /d/c 1
        0.t write /d three
        0.t write /d/e 1
        0.t ls /d -> a c e
        0 ls /d -> a b
        0 abort t
        0 write /d/f 1
        0 ls /d -> a b f
    """,
    "rules hold inside": """
        1 start t
        1.t write name evil -> EACCES
        1.t write data/x 1
        1.t chmod data/x n2 -> EPERM
        1.t rm data/none/none -> ENOENT
        1.t read . -> EINVAL
        1 commit t
        1 read data/x -> 1
    """,
    "permissions as they were at the first look": """
        0 write /a 1
        0 chmod /a r0
        1 start t
        1 start u
        1.t read /a -> 1
        0 chmod /a n0
        1.t read /a -> 1
        1 read /a -> EACCES
        1.u read /a -> EACCES
        1 commit t -> EAGAIN
        1 commit u
    """,
    "reset drops them, twice is fine": """
        1 start t
        1.t write data/x 1
        1 reset
        1 reset
        1.t write data/x 1 -> ENOENT
        1 commit t -> ENOENT
        0 usage 1 -> 1 0 0
    """,
    "close drops them": """
        1 start t
        1.t write data/x 1
        1 close
        0 read /local/domain/1/data/x -> ENOENT
        0 usage 1 -> 1 0 0
    """,
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_transactions(script: str) -> None:
    run(script)


def versions() -> int:
    gc.collect()
    return sum(isinstance(each, Node) for each in gc.get_objects())


def test_nothing_is_kept_that_nobody_looked_at() -> None:
    """Goal: a domain that keeps transactions open cannot make others' writes pile up.
    Method: count the versions of nodes that are alive while one node is written a thousand times, and what an open
    transaction counts for."""
    world = run("0 write /a 0\n1 start t\n1 start u\n1.t read /a -> EACCES")
    before, used = versions(), world.store.usage(Domid(1)).memory
    for number in range(1000):
        world.run(f"0 write /a {number}\n0 write /new-{number} 1\n0 rm /new-{number}\n1 start v\n1 abort v")
    looked, idle = world.connection("1").transactions.values()
    assert (list(looked.seen), list(idle.seen)) == (["/a", "/"], [])
    assert versions() - before == 2, "one old version of each of the two"
    assert world.store.usage(Domid(1)).memory == used
    assert looked.memory == used - world.store.tree.memory[Domid(1)] > 0
    world.run("1 abort t\n1 abort u")
    del looked, idle
    assert versions() == before
    assert world.store.usage(Domid(1)).memory == world.store.tree.memory[Domid(1)]


def test_numbers_are_not_those_of_open_transactions() -> None:
    connection = World().connection("0")
    kept = connection.transaction_start()
    connection._next_tx = 0xFFFFFFFF  # four billion transactions later
    numbers = [connection.transaction_start() for _ in range(3)]
    assert kept == 1 and numbers == [0xFFFFFFFF, 2, 3]
