"""Goal: no guest uses up more than its share, and counts stay true whatever happens.
Method: tables of scripts under small quotas, at and beyond each limit."""

from __future__ import annotations

import dataclasses

import pytest

from tests.xenmodel.xenstore import GUESTS, World, run
from xenmodel.types import Domid
from xenmodel.xenstore.errors import XsErrno, XsError
from xenmodel.xenstore.quota import Quota

NONE = Quota(**dict.fromkeys((field.name for field in dataclasses.fields(Quota)), 0))

# name -> quota, script. "data" of a guest counts: it owns that one.
SCRIPTS = {
    "nodes": (
        dataclasses.replace(NONE, nodes=3),
        """
        1 write data/a 1
        1 write data/b 1
        1 write data/c 1 -> ENOSPC
        1 mkdir data/a/b -> ENOSPC
        1 ls data -> a b
        1 write data/a 2
        1 rm data/a
        1 write data/c/d 1 -> ENOSPC
        1 ls data -> b
        1 write data/c 1
        0 usage 1 -> 3 0 0
        0 write /local/domain/1/data/for-you 1
        0 usage 1 -> 4 0 0
        2 write data/a 1
        1b write data/d 1 -> ENOSPC
        """,
    ),
    "nodes in transactions": (
        dataclasses.replace(NONE, nodes=3),
        """
        1 start t
        1.t write data/a 1
        1.t rm data/a
        1.t write data/b/c 1
        0 usage 1 -> 1 0 1
        1 commit t
        0 usage 1 -> 3 0 0
        1 start t
        1.t rm data/b
        1.t write data/x/y 1
        1 commit t
        1 ls data -> x
        0 usage 1 -> 3 0 0
        1 start t
        1.t write data/z 1 -> ENOSPC
        1 commit t -> ENOMEM
        1 start t
        1.t rm data/x
        1 abort t
        0 usage 1 -> 3 0 0
        """,
    ),
    "two transactions that only fit one by one": (
        dataclasses.replace(NONE, nodes=3),
        """
        1 mkdir data/p
        0 mkdir /local/domain/1/data/p/q
        0 chmod /local/domain/1/data/p/q n0 b1
        1 start t
        1 start u
        1.t write data/p/a 1
        1.u write data/p/q/b 1
        1 commit u
        1 commit t -> ENOSPC
        0 usage 1 -> 3 0 0
        1 ls data/p -> q
        """,
    ),
    "changes of owner": (
        dataclasses.replace(NONE, nodes=2),
        """
        0 write /x/y 1
        0 chmod /x n1
        0 chmod /x/y n1
        0 usage 1 -> 3 0 0
        1 write data/a 1 -> ENOSPC
        0 chmod /x n2
        0 chmod /x/y n2
        0 usage 1 -> 1 0 0
        0 usage 2 -> 3 0 0
        1 write data/a 1
        0 start t
        0.t chmod /x n1
        0.t rm /x/y
        0 abort t
        0 usage 2 -> 3 0 0
        0 start t
        0.t chmod /x n1
        0.t rm /x/y
        0.t chmod /x n0
        0 commit t
        0 usage 1 -> 2 0 0
        0 usage 2 -> 1 0 0
        """,
    ),
    "watches": (
        dataclasses.replace(NONE, watches=2),
        """
        1 watch data a
        1b watch data a
        1 watch data b -> ENOSPC
        1b watch data b -> ENOSPC
        1 watch data a -> EEXIST
        2 watch data b
        1 unwatch data a
        1b watch data b
        0 usage 1 -> 1 2 0
        1b close
        0 usage 1 -> 1 0 0
        1 watch data a
        1 watch data b
        1 reset
        0 usage 1 -> 1 0 0
        0 watch / a
        0 watch / b
        0 watch / c
        """,
    ),
    "transactions": (
        dataclasses.replace(NONE, transactions=2),
        """
        1 start t
        1b start u
        1 start v -> ENOSPC
        2 start v
        1 abort t
        1 start v
        1b start w -> ENOSPC
        0 usage 1 -> 1 0 2
        1 close
        1b start w
        0 start t
        0 start u
        0 start v
        """,
    ),
    "nodes in one transaction": (
        dataclasses.replace(NONE, transaction_nodes=2),
        """
        1 start t
        1.t read . -> EINVAL
        1.t write data/a 1
        1.t read data/a -> 1
        1.t ls data -> a
        1 commit t
        1 start t
        1.t write data/a 1
        1.t write data/b 1 -> ENOSPC
        1 commit t -> ENOMEM
        1 ls data -> a
        0 start t
        0.t write /a/b/c/d/e 1
        0 commit t
        """,
    ),
    "permissions": (
        dataclasses.replace(NONE, node_permissions=2),
        """
        1 chmod data n1 r2
        1 chmod data n1 r2 r3 -> ENOSPC
        1 perms data -> n1 r2
        0 chmod /local/domain/1/data n1 r2 r3
        1 write data/x 1
        1 perms data/x -> n1 r2 r3
        1 chmod data/x n1 r2 r3 -> ENOSPC
        1 start t
        1.t chmod data/x n1 r2 r3 -> ENOSPC
        1.t chmod data/x n1 r2
        1 commit t
        1 perms data/x -> n1 r2
        """,
    ),
    "paths": (
        dataclasses.replace(NONE, path_max=6),
        """
        1 write data/x 1
        1 write data/xy 1 -> EINVAL
        1 read data/xy -> EINVAL
        1 watch data/xy tok -> EINVAL
        1 watch @releaseDomain tok -> EINVAL
        0 write /local/domain/1/data/xy 1
        """,
    ),
    "everything switched off": (
        NONE,
        """
        1 start t
        1.t write data/a/b/c/d/e/f/g 1
        1 chmod data n1 n2 n3 n4 n5 n6 n7 n8
        1 abort t
        """,
    ),
}


@pytest.mark.parametrize(("quota", "script"), SCRIPTS.values(), ids=SCRIPTS.keys())
def test_quotas(quota: Quota, script: str) -> None:
    run(script, quota)


@pytest.mark.parametrize(
    ("before", "change", "fits"),
    [
        # The list has one permission: 8 bytes. A child counts its name and a NUL.
        ([], ("data/v", 92), True),
        ([], ("data/v", 93), False),
        ([("data/v", 92)], ("data/v", 93), False),
        ([("data/v", 92)], ("data/v", 10), True),
        ([("data/v", 90)], ("data/v/a", 0), True),
        ([("data/v", 91)], ("data/v/a", 0), False),
        ([("data/v", 80), ("data/v/a", 0)], ("data/v", 90), True),
        ([("data/v", 80), ("data/v/a", 0)], ("data/v", 91), False),
        ([], ("data/" + "n" * 83, 0), True),  # data holds "old" too
        ([], ("data/" + "n" * 88, 0), False),
        ([], ("data/m/" + "n" * 91, 0), True),
        ([], ("data/m/" + "n" * 92, 0), False),
    ],
)
@pytest.mark.parametrize("within", [False, True])
def test_node_size(before: list[tuple[str, int]], change: tuple[str, int], fits: bool, within: bool) -> None:
    world = World(dataclasses.replace(NONE, node_size=100)).run(GUESTS + "1 mkdir data/old")
    connection = world.connection("1")
    for path, length in before:
        connection.write(path, b"x" * length)
    content = list(world.store.dump())
    tx = connection.transaction_start() if within else 0
    path, length = change
    if fits:
        connection.write(path, b"x" * length, tx)
    else:
        with pytest.raises(XsError) as caught:
            connection.write(path, b"x" * length, tx)
        assert caught.value.errno is XsErrno.ENOSPC
    if within:
        try:
            connection.transaction_end(tx, True)
        except XsError as error:
            assert not fits and error.errno is XsErrno.ENOMEM
    assert (list(world.store.dump()) == content) is not fits, "a refused request changes nothing"


def test_default_limits_are_exact() -> None:
    """Goal: the numbers of C xenstored: 1000 nodes, 128 watches, 10 transactions.
    Method: use each up; the next one is refused."""
    world = run("")
    guest = world.connection("1")
    for number in range(999):
        guest.write(f"data/{number % 7}" if number < 7 else f"data/{number % 7}/{number}", b"")
    for number in range(128):
        guest.watch("data", str(number))
    for _ in range(10):
        guest.transaction_start()
    assert world.store.usage(Domid(1))[:5] == (1000, 128, 10, 1, 0)
    for refused in (
        lambda: guest.write("data/one-more", b""),
        lambda: guest.watch("data", "one more"),
        guest.transaction_start,
    ):
        with pytest.raises(XsError) as caught:
            refused()
        assert caught.value.errno is XsErrno.ENOSPC
