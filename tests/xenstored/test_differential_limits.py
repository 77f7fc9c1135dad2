"""Goal: limits are the same numbers with Debian's xenstored and with ours, also at their defaults, which random requests do
not reach.
Method: a guest, or domain 0, does something more and more until it is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest

from bench.realstore import WireClient
from tests.xenstored.rig import Request, Twins, write
from xenmodel.public.io.xs_wire import XENSTORE_PAYLOAD_MAX, XsType
from xenmodel.xenstore.wire import join

SHORT_S = 0.1  # to see that nothing comes


class Limit(NamedTuple):
    """`request(n)` is repeated until it is refused: after so many, with that error, there and here."""

    request: Callable[[int], tuple[int, bytes]]
    real: tuple[int, str]
    ours: tuple[int, str]


LIMITS = {
    # data is the thousandth; two deep chains, for so many names would not fit into one directory
    "nodes": Limit(lambda n: write(f"data/{n % 2}{'/x' * (n // 2)}"), (999, "ENOSPC"), (999, "ENOSPC")),
    "watches": Limit(lambda n: (XsType.WATCH, join("data", str(n))), (129, "E2BIG"), (128, "ENOSPC")),
    "transactions": Limit(lambda n: (XsType.TRANSACTION_START, join("")), (11, "ENOSPC"), (10, "ENOSPC")),
    "bytes of a value": Limit(lambda n: write("data", n), (2048 - 24 - 8, "ENOSPC"), (2048 - 8 + 1, "ENOSPC")),
    "names": Limit(lambda n: write(f"data/{n:09}"), (201, "ENOSPC"), (204, "ENOSPC")),
    "permissions": Limit(lambda n: (XsType.SET_PERMS, join("data", "n1", *["r2"] * n)), (5, "ENOSPC"), (5, "ENOSPC")),
    "a path": Limit(lambda n: (XsType.WATCH, join("data/" + "x" * (n + 2000), "")), (44, "EINVAL"), (44, "EINVAL")),
    "an absolute path": Limit(lambda n: (XsType.WATCH, join("/" + "x" * (n + 2000), "")), (48, "EINVAL"), (48, "EINVAL")),
    "a path of a home": Limit(
        lambda n: (XsType.WATCH, join("/local/domain/2/" + "x" * (n + 2000), "")), (49, "EINVAL"), (49, "EINVAL")
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name: str, pair: Twins) -> None:
    """Goal: the defaults are the same numbers.  Method: a guest does it until it may not."""
    limit = LIMITS[name]

    def until_refused(client: WireClient) -> tuple[int, str]:
        for count in range(3000):
            reply = client.request(*limit.request(count))
            if reply.type == XsType.ERROR:
                return count, reply.body[:-1].decode()
        raise AssertionError("never refused")

    assert pair.both("1", until_refused) == (limit.real, limit.ours)


def test_nodes_of_a_transaction(pair: Twins) -> None:
    """Goal: a guest's transaction may look at 1024 nodes, and then not commit; domain 0's at any number.
    Method: nodes that all may read."""

    def work(client: WireClient) -> list[object]:
        tx = int(client.request(XsType.TRANSACTION_START, join("")).body[:-1])
        replies = [client.request(XsType.READ, join(f"/n/{n}"), tx) for n in range(1030)]
        refused = [n for n, reply in enumerate(replies) if reply.body == b"ENOSPC\0"]
        return [refused, client.request(XsType.TRANSACTION_END, b"T\0", tx).body]

    pair.both("a", lambda client: [client.request(XsType.SET_PERMS, join("/", "r0")), client.request(*write("/n"))])
    pair.both("a", lambda client: [client.request(*write(f"/n/{n}")) for n in range(1030)])
    real, ours = pair.both("1", work)
    assert real == ours == [list(range(1024, 1030)), b"ENOMEM\0"]
    real, ours = pair.both("a", work)
    assert real == ours == [[], b"OK\0"]


@pytest.mark.parametrize("who", ["a", "1"])
def test_the_longest_message(who: str, pair: Twins) -> None:
    """Goal: 4096 bytes of body, and 4096 of reply; beyond it the connection ends.  Method: values and directories."""
    pair.run("a MKDIR /d|\na SET_PERMS /d|r0|")
    pair.both("a", lambda client: [client.request(*write(f"/d/{n:0255}")) for n in range(16)])
    assert len(set(pair.both(who, lambda client: client.request(XsType.DIRECTORY, join("/d")).body))) == 1
    pair.ask(Request("a", XsType.WRITE, join("/d/x")))
    assert pair.ask(Request(who, XsType.DIRECTORY, join("/d"))).ours.body == b"E2BIG\0"
    for offset in (0, 1, 256, 4000, 4096, 4097, 4098, 5000):
        pair.ask(Request(who, XsType.DIRECTORY_PART, join("/d", str(offset))))
    pair.ask(Request(who, XsType.WRITE, join("data") + bytes(XENSTORE_PAYLOAD_MAX - 5)))
    pair.ask(Request(who, XsType.READ, join("data")))

    def too_long(client: WireClient) -> str:
        client.timeout_s = SHORT_S
        try:
            client.post(XsType.READ, bytes(XENSTORE_PAYLOAD_MAX + 1))
            return str(client.next())
        except (ConnectionError, TimeoutError) as error:
            return "ended" if isinstance(error, ConnectionError) else "silent"

    assert pair.both(who, too_long) == (("ended",) * 2 if who == "a" else ("silent",) * 2)


def test_memory(pair: Twins) -> None:
    """Goal: the same memory is counted for nodes, permissions, watches and transactions, and refused at the same size.
    Method: CONTROL quota after each; a small quota."""
    used = re.compile(rb"memory *: *(\d+)")

    def memory() -> list[int]:
        replies = pair.both("a", lambda client: client.request(XsType.CONTROL, join("quota", "1")).body)
        return [int(match[1]) for match in map(used.search, replies) if match]

    for line in (
        "1 WRITE data/a|0123456789", "1 WRITE data/b/c|", "1 SET_PERMS data/a|n1|r2|", "1 WATCH data|token|",
        "1 WRITE data/a|0", "1 RM data/b|", "a SET_PERMS /local/domain/1|n1|r2|r0|",
    ):  # fmt: skip
        pair.run(line)
        there, here = memory()
        assert there == here, line
    pair.run(f"quota memory {here + 1000}\n1 WRITE data/big|{'x' * 900} -> OK|")
    pair.run(f"1 WRITE data/more|{'x' * 100} -> EIO / ENOMEM\n1 WATCH data|{'x' * 100}| -> ENOMEM")
    pair.run(f"1 READ data/big| -> ENOMEM / {'x' * 900}\n1 RM data/big| -> OK|")
    pair.run("1 TRANSACTION_START | -> $t\n1.$t WRITE data/a|")
    there, here = memory()
    assert 0 < there - here < 30, "the names of the copies of data and data/a"
