"""Goal: a transaction sees the tree as it was at its start and commits whole or not at all.
Method: a table of scripts in which domains interfere with each other's transactions."""

from __future__ import annotations

import pytest

from tests.xenmodel.xenstore import World, run

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
    "it sees the start, whatever happened since": """
        0 write /a/x 1
        0 write /a/y 1
        0 start t
        0 write /a/x 2
        0 rm /a/y
        0 write /a/z 1
        0 chmod /a r0
        0.t read /a/x -> 1
        0.t read /a/y -> 1
        0.t read /a/z -> ENOENT
        0.t ls /a -> x y
        0.t perms /a -> n0
        0 commit t -> EAGAIN
    """,
    "each sees its own start": """
        0 write /a 1
        0 start t
        0 write /a 2
        0 start u
        0 rm /a
        0 start v
        0 write /a 4
        0 start w
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
        0 commit v
        0 write /d/e 1
        0.w ls /d -> b
        0.t ls /d -> a
        0.t read /d -> ""
        0 read /d -> again
    """,
    "a directory stays shared however often it is written": """
        0 write /d/a 1
        0 start t
        0 write /d one
        0 write /d two
        0 write /d/b 1
        0.t ls /d -> a
        0.t read /d -> ""
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
    "permissions as they were": """
        0 write /a 1
        0 chmod /a r0
        1 start t
        0 chmod /a n0
        1.t read /a -> 1
        1 read /a -> EACCES
        1 commit t -> EAGAIN
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
    "events of a commit": """
        0 write /a/x 1
        0 watch / tok
        0 events -> /:tok
        0 start t
        0.t write /a/x 2
        0.t write /b/c 1
        0.t write /gone 1
        0.t rm /gone
        0.t write /a/x 3
        0.t read /a -> ""
        0 events -> none
        0 commit t
        0 events -> /a/x:tok /b/c:tok
        0 start t
        0.t write /a/x 4
        0 abort t
        0 events -> none
        0 start t
        0.t write /a/x 5
        0b write /a/x 6
        0 commit t -> EAGAIN
        0 events -> /a/x:tok
    """,
    "a node written and then removed with its parent is told under both": """
        0 write /a/x 1
        0 write /a/y 1
        0 watch /a tok
        0 events -> /a:tok
        0 start t
        0.t write /a/x 2
        0.t rm /a
        0 commit t
        0 events -> /a/x:tok /a:tok
    """,
    "events of a removal in a commit": """
        0 write /a/x/y 1
        0 watch /a/x x
        0 watch / root
        0 watch /a/x/none none
        0 events -> /a/x:x /:root /a/x/none:none
        0 start t
        0.t rm /a
        0 commit t
        0 events -> /a/x:x /a:root
    """,
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_transactions(script: str) -> None:
    run(script)


def test_nothing_is_kept_once_nobody_looks() -> None:
    """Goal: a domain that keeps transactions open cannot make others' writes pile up.
    Method: count what open transactions hold while one node is written a thousand times."""
    world = run("0 write /a 0\n1 start t\n1 start u")
    transactions = list(world.connection("1").transactions.values())
    for number in range(1000):
        world.run(f"0 write /a {number}\n0 write /new-{number} 1\n0 rm /new-{number}\n1 start v\n1 abort v")
    for transaction in transactions:
        assert sorted(transaction.saved) == ["/", "/a"], "one old version each, none of nodes it cannot see"
    world.run("1.t read /a -> EACCES\n1 abort t\n1 abort u")
    assert not world.store.tree._open


def test_numbers_are_not_those_of_open_transactions() -> None:
    connection = World().connection("0")
    kept = connection.transaction_start()
    connection._next_tx = 0xFFFFFFFF  # four billion transactions later
    numbers = [connection.transaction_start() for _ in range(3)]
    assert kept == 1 and numbers == [0xFFFFFFFF, 2, 3]
