"""Goal: CONTROL, GET_QUOTA and SET_QUOTA answer as programs expect it: xenstore-control, a toolstack, `xenfs quota`.
Method: scripts as in test_wire_requests.py after control.c of the daemon, whose texts programs read; what is beyond it is
compared with what the server did. Live update under clients that are in the middle of something."""

from __future__ import annotations

import logging
import re

import pytest

from tests.xenmodel.xenstore.wireworld import World, run
from xenmodel.public.io.xs_wire import XENSTORE_PAYLOAD_MAX, XsType
from xenmodel.types import Domid
from xenmodel.xenstore.control import COMMANDS
from xenmodel.xenstore.quota import NAMES, SOFT_NAMES, Quota
from xenmodel.xenstore.upkeep import problems
from xenmodel.xenstore.wire import join

SCRIPTS = {
    "what is no command": """
        0 CONTROL -> EINVAL
        0 CONTROL check -> EINVAL
        0 CONTROL | -> EINVAL
        0 CONTROL nonsense| -> EINVAL
        0 CONTROL CHECK| -> EINVAL
        0 CONTROL \\xff\\xfe| -> EINVAL
        0 CONTROL logfile|/nonexistent/log| -> EINVAL
        0 CONTROL memreport|/nonexistent/log| -> EINVAL
        1 CONTROL check| -> EACCES
        1 CONTROL -> EACCES
        0.77 CONTROL check| -> ENOENT
    """,
    "check": """
        0 CONTROL check| -> OK|
        0 CONTROL check|what follows is nothing -> OK|
        0 CONTROL check|x| -> EINVAL
        0 CONTROL check|| -> EINVAL
    """,
    "log and print": """
        0 CONTROL log|on| -> OK|
        0 READ /tool| -> ""
        0 CONTROL log|off| -> OK|
        0 CONTROL log| -> EINVAL
        0 CONTROL log|ON| -> EINVAL
        0 CONTROL log|on|off| -> EINVAL
        0 CONTROL print|a word| -> OK|
        0 CONTROL print| -> EINVAL
        0 CONTROL print|a|b| -> EINVAL
    """,
    "quota": """
        0 CONTROL quota|set| -> EINVAL
        0 CONTROL quota|set|nodes| -> EINVAL
        0 CONTROL quota|set|nodes|1|2| -> EINVAL
        0 CONTROL quota|set|nodes|0| -> EINVAL
        0 CONTROL quota|set|nodes|-1| -> EINVAL
        0 CONTROL quota|set|nodes|x| -> EINVAL
        0 CONTROL quota|set|nodes|| -> EINVAL
        0 CONTROL quota|set|nodes|2147483648| -> EINVAL
        0 CONTROL quota|set|nodes|000000000001| -> EINVAL
        0 CONTROL quota|set|nonsense|5| -> EINVAL
        0 CONTROL quota|set|soft-memory|5| -> EINVAL
        0 CONTROL quota|get|nodes|5| -> EINVAL
        0 CONTROL quota|nonsense| -> EINVAL
        0 CONTROL quota|9| -> ENOENT
        0 CONTROL quota|1|2| -> EINVAL
        0 CONTROL quota|set|nodes|2| -> OK|
        0 GET_QUOTA nodes| -> 2|
        1 WRITE data/a|1
        1 WRITE data/b|1 -> ENOSPC
        0 CONTROL quota|set|nodes|2147483647| -> OK|
        1 WRITE data/b|1
    """,
    "quota-soft": """
        0 CONTROL quota-soft|set|memory|1000| -> OK|
        0 GET_QUOTA soft-memory| -> 1000|
        0 CONTROL quota-soft|set|nodes|1| -> EINVAL
        0 CONTROL quota-soft|set|memory|0| -> EINVAL
        0 CONTROL quota-soft|1| -> EINVAL
    """,
    "quota-usage": """
        0 CONTROL quota-usage| -> EINVAL
        0 CONTROL quota-usage|1|2| -> EINVAL
        0 CONTROL quota-usage|x| -> EINVAL
        0 CONTROL quota-usage|9| -> ENOENT
    """,
    "live update": """
        0 CONTROL live-update| -> EINVAL
        0 CONTROL live-update|-x| -> EINVAL
        0 CONTROL live-update|-f|/usr/sbin/xenstored| -> OK|
        0 CONTROL live-update|-c|--verbose| -> OK|
        0 CONTROL live-update|-a| -> OK|
        0 CONTROL live-update|-s|-t|60| -> OK|
        1 TRANSACTION_START | -> $t
        0 CONTROL live-update|-s| -> BUSY|
        1.$t READ data| -> ""
        0 CONTROL live-update|-s|-F| -> OK|
        1.$t READ data| -> ENOENT
        0 CONTROL live-update|-s| -> OK|
        0 TRANSACTION_START | -> $own
        0.$own CONTROL live-update|-s| -> BUSY|
        0.$own CONTROL live-update|-s|-F| -> OK|
        0.$own TRANSACTION_END T| -> ENOENT
    """,
    "GET_QUOTA": """
        0 GET_QUOTA nodes| -> 1000|
        0 GET_QUOTA watches| -> 128|
        0 GET_QUOTA transactions| -> 10|
        0 GET_QUOTA outstanding| -> 20|
        0 GET_QUOTA transaction-nodes| -> 1024|
        0 GET_QUOTA memory| -> 2621440|
        0 GET_QUOTA soft-memory| -> 2097152|
        0 GET_QUOTA node-size| -> 2048|
        0 GET_QUOTA path-max| -> 2048|
        0 GET_QUOTA permissions| -> 5|
        0 GET_QUOTA node-permissions| -> 5|
        0 GET_QUOTA nonsense| -> EINVAL
        0 GET_QUOTA soft-nodes| -> EINVAL
        0 GET_QUOTA | -> EINVAL
        0 GET_QUOTA 1| -> EINVAL
        0 GET_QUOTA 1|nodes| -> 1000|
        0 GET_QUOTA 0|nodes| -> 1000|
        0 GET_QUOTA 9|nodes| -> ENOENT
        0 GET_QUOTA x|nodes| -> EINVAL
        0 GET_QUOTA -1|nodes| -> EINVAL
        0 GET_QUOTA 1|nonsense| -> EINVAL
        0 GET_QUOTA 1|nodes|2| -> EINVAL
        create 3
        0 GET_QUOTA 3|nodes| -> 1000|
    """,
    "SET_QUOTA": """
        0 SET_QUOTA -> EINVAL
        0 SET_QUOTA nodes| -> EINVAL
        0 SET_QUOTA nodes|5 -> EINVAL
        0 SET_QUOTA 1|nodes|5|6| -> EINVAL
        0 SET_QUOTA nonsense|5| -> EINVAL
        0 SET_QUOTA nodes|-1| -> EINVAL
        0 SET_QUOTA nodes|x| -> EINVAL
        0 SET_QUOTA 9|nodes|5| -> ENOENT
        0 SET_QUOTA 1|nodes|2|
        0 GET_QUOTA 1|nodes| -> 2|
        0 GET_QUOTA 1|watches| -> 128|
        0 GET_QUOTA 2|nodes| -> 1000|
        0 GET_QUOTA nodes| -> 1000|
        1 WRITE data/a|1
        1 WRITE data/b|1 -> ENOSPC
        2 WRITE data/a/b/c|1
        0 SET_QUOTA nodes|4|
        2 WRITE data/d|1 -> ENOSPC
        0 GET_QUOTA 1|nodes| -> 2|
        0 SET_QUOTA 1|nodes|0|
        1 WRITE data/b/c/d/e/f|1
        0 SET_QUOTA soft-memory|7|
        0 GET_QUOTA soft-memory| -> 7|
        0 SET_QUOTA 2|node-permissions|1|
        2 SET_PERMS data|n2|r1| -> ENOSPC
        destroy 1
        create 1
        0 GET_QUOTA 1|nodes| -> 4|
    """,
    "limits that are lowered below what is used": """
        1 WATCH data|a|
        1 WATCH data|b|
        1 WRITE data/a|1
        1 TRANSACTION_START | -> $t
        0 SET_QUOTA 1|watches|1|
        0 SET_QUOTA 1|nodes|1|
        0 SET_QUOTA 1|transactions|1|
        1 WATCH data|c| -> ENOSPC
        1 WRITE data/b|1 -> ENOSPC
        1 WRITE data/a|2
        1 TRANSACTION_START | -> ENOSPC
        1.$t READ data/a| -> 2
        1.$t TRANSACTION_END T|
        1 TRANSACTION_START | -> $u
        1 UNWATCH data|a|
        1 WATCH data|c| -> ENOSPC
        1 UNWATCH data|b|
        1 WATCH data|c|
    """,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_control(name: str) -> None:
    run(SCRIPTS[name])


def control(world: World, *words: str) -> str:
    reply = world.ask("0", XsType.CONTROL, join(*words))
    assert reply.type == XsType.CONTROL and reply.body.endswith(b"\0") and reply.body.count(b"\0") == 1
    return reply.body[:-1].decode()


def test_what_xenstore_control_prints() -> None:
    """Goal: the daemon's tables, byte for byte where it has the same rows.  Method: their formats, and the numbers."""
    world = World().run("1 WATCH data|t|\n1 WRITE data/x|1\n1 TRANSACTION_START | -> $t")
    lines = control(world, "quota").splitlines()
    assert lines[0] == "Quota settings:" and lines[1] == "nodes            :     1000 Nodes per domain"
    assert all(re.fullmatch(r"[a-z-]+ *: +\d+ \S.*", line) and line.index(":") == 17 for line in lines[1:])
    assert [line[:17].rstrip() for line in lines[1:]] == list(NAMES)
    soft = "memory           :  2097152 Total Xenstore memory per domain (warning level)"
    assert control(world, "quota-soft").splitlines() == ["Quota settings:", soft]
    lines = control(world, "quota", "1").splitlines()
    assert lines[:3] == ["Domain 1:", "nodes           :        2", "watches         :        1"]
    assert [line.split()[0] for line in lines[1:]] == ["nodes", "watches", "transactions", "outstanding", "memory"]
    assert {line.split()[0] for line in control(world, "help").splitlines()} == set(COMMANDS)
    names = world.ask("0", XsType.GET_QUOTA).body
    assert names.endswith(b"\0") and names[:-1].decode().split(" ") == [*NAMES, *(f"soft-{name}" for name in SOFT_NAMES)]
    for name in names[:-1].decode().split(" "):
        assert world.ask("0", XsType.GET_QUOTA, join(name)).body[:-1].isdigit()


def test_what_a_domain_was_refused() -> None:
    """Goal: `quota-usage` says for each limit what is used, the limit, how often it was in the way and what it last said.
    Method: run into each limit that can be run into at once, so often as it is big."""
    quota = Quota(nodes=3, watches=2, transactions=1, transaction_nodes=4, node_permissions=2, node_size=100, path_max=40)
    world = World(quota)
    world.run(f"""
        1 WRITE data/a|1
        1 WRITE data/b|1
        1 WRITE data/c|1 -> ENOSPC
        1 MKDIR data/d| -> ENOSPC
        1 WATCH data|a|
        1 WATCH data|b|
        1 WATCH data|c| -> ENOSPC
        1 TRANSACTION_START | -> $t
        1 TRANSACTION_START | -> ENOSPC
        1.$t READ data/a| -> 1
        1.$t READ data/a/b/c/d/e/f| -> ENOSPC
        1 SET_PERMS data|n1|r2|r0| -> ENOSPC
        1 WRITE data/a|{"x" * 100} -> ENOSPC
        1 READ {"x" * 50}| -> EINVAL
    """)
    lines = [line.split(" ", 4) for line in control(world, "quota-usage", "1").splitlines()]
    assert [line[0] for line in lines] == [*NAMES, "write-rate"] and all(len(line) >= 4 for line in lines)
    table = {name: (used, limit, times) for name, used, limit, times, *_ in lines}
    assert table["nodes"] == ("3", "3", "2") and table["watches"] == ("2", "2", "1")
    assert table["transactions"] == ("1", "1", "1") and table["permissions"] == ("-", "2", "1")
    assert table["node-size"] == ("-", "100", "1") and table["transaction-nodes"][2] == "1"
    assert table["memory"][1:] == (str(Quota().memory), "0") and int(table["memory"][0]) > 100
    assert table["outstanding"] == ("0", "20", "0") and table["write-rate"] == ("-", "200/s", "0")
    assert "more than 3" in next(line for line in lines if line[0] == "nodes")[4]
    assert all("\n" not in line[4] for line in lines if len(line) > 4)
    other = [line.split() for line in control(world, "quota-usage", "2").splitlines()]
    assert all(line[3:] == ["0"] for line in other)


def test_quotas_of_one_domain_only() -> None:
    """Goal: limits that are changed take effect at once, for whom they are meant.  Method: SET_QUOTA while one waits."""
    world = World(Quota(outstanding=2))
    for who in ("1", "2"):
        guest = world.guest(who)
        guest.read_on(False)
        guest.log.clear()
        for _ in range(100):
            guest.post(XsType.READ, join("data"))
    world.wait(1)
    assert [world.store.usage(Domid(domid)).outstanding for domid in (1, 2)] == [2, 2]
    world.run("0 SET_QUOTA 1|outstanding|5|\n0 GET_QUOTA 1|outstanding| -> 5|\n0 GET_QUOTA 2|outstanding| -> 2|")
    world.guest("1").kick()
    world.wait(1)
    assert [world.store.usage(Domid(domid)).outstanding for domid in (1, 2)] == [5, 2]
    for who in ("1", "2"):
        world.guest(who).read_on()
    world.wait(1)
    assert [len(world.guest(who).log) for who in ("1", "2")] == [100, 100]


def test_statistics_count_what_was_done() -> None:
    """Goal: `stats` tells what the server holds and has done; a client cannot make it long.
    Method: what changes with a few requests; types that do not exist."""
    world = World()

    def stats() -> dict[str, int]:
        return {name: int(value) for name, value in (line.split() for line in control(world, "stats").splitlines())}

    before = stats()
    world.run("1 WATCH data|t|\n1 TRANSACTION_START | -> $t\n1 READ data| -> \"\"\n1 READ x| -> ENOENT\n2 WRITE data/x|1")
    for kind in range(100, 200):
        world.ask("1", kind, b"")
    after = stats()
    changed = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    assert changed.pop("generation") > 0 and changed.pop("memory") > 0
    assert changed == {
        "nodes": 1, "watches": 1, "transactions": 1, "requests-control": 1, "requests-watch": 1,
        "requests-transaction_start": 1, "requests-read": 2, "requests-write": 1,
    }  # fmt: skip
    assert after["domains"] == 3 and after["connections"] == 3


def test_answers_stay_within_a_message() -> None:
    """Goal: whatever the store is like, an answer fits.  Method: broken bookkeeping at many nodes, long refusals."""
    world = World()
    for number in range(200):
        world.run(f"0 WRITE /some/path/or/other/{number}|1")
    for node in world.store.tree.nodes.values():
        node.children_bytes += 1
    assert len(control(world, "check")) <= XENSTORE_PAYLOAD_MAX and len(problems(world.store)) > 200
    record = world.daemon.domains.record(Domid(1))
    for name in [*NAMES, "write-rate"]:
        record.refuse(name, "x" * 10_000)
    assert control(world, "quota-usage", "1").count("\n") == len(NAMES) + 1


def test_log_on_shows_requests_and_replies(caplog: pytest.LogCaptureFixture) -> None:
    """Goal: with `log on` each message both ways is a line, whatever bytes it has; off again, none.
    Method: requests with unprintable bytes, unknown types, and words that look like lines of the log."""
    world = World()
    caplog.set_level(logging.WARNING, "xenstored")
    control(world, "log", "on")
    caplog.clear()
    world.run("1 WATCH data|\\x0afake line|\n1 WRITE data/x|\\xff\\x1b[0m\n1 #99 x -> ENOSYS\n1 READ data| -> \"\"")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4 * 2 + 2 and not any("\n" in line or "\x1b" in line for line in lines)
    assert [line.split()[0] for line in lines] == ["IN", "OUT", "OUT", "IN", "OUT", "OUT", "IN", "OUT", "IN", "OUT"]
    assert all(line.split()[1:3] == ["domain", "1"] for line in lines)
    control(world, "log", "off")
    caplog.clear()
    world.run("1 READ data| -> \"\"")
    assert not caplog.records
    control(world, "print", "hello")
    assert world.lines == ["control: hello"]


def test_live_update_moves_everybody() -> None:
    """Goal: clients notice nothing: values, permissions, watches in their order, queued events, generations that never go
    back, quotas.  Method: a tree with odd values and owners; before and after, over streams and rings; requests and a half
    message on their way."""
    world = World().run("""
        0 WRITE /odd|\\x00\\xff"   (n0)\\x0a
        0 SET_PERMS /odd|b2|r1|w65524|
        0 SET_PERMS @releaseDomain|n0|r1|
        0 WRITE /d/zz|1
        0 WRITE /d/aa|1
        1 WRITE data/x|1
        0 SET_QUOTA 1|nodes|3|
        0b WATCH /|all|
        0b WATCH /d|b|
        0b WATCH /d|a|1|
        1 WATCH @releaseDomain|t|
        0b events -> /:all /d:b /d:a
        1 events -> @releaseDomain:t
    """)
    before = list(world.store.dump())
    generation = world.ask("0", XsType.DIRECTORY_PART, join("/d", "0")).body.partition(b"\0")[0]
    world.stream("0b").read_on(False)
    world.run("0 WRITE /d/zz|2")
    world.guest("1").send(b"\x02\0\0\0")
    control(world, "live-update", "-s")
    expected = [(path, b"2" if path == "/d/zz" else value, perms) for path, value, perms in before]
    assert list(world.store.dump()) == expected
    assert problems(world.store) == []
    world.guest("1").send(b"\1\0\0\0\0\0\0\0\7\0\0\0data/x\0")
    world.settle()
    assert world.guest("1").log[-1].body == b"1"
    world.stream("0b").read_on()
    world.run("""
        0 READ /odd| -> |\\xff"   (n0)\\x0a
        0 GET_PERMS /odd| -> b2|r1|w65524|
        0 DIRECTORY /d| -> zz|aa|
        0 GET_PERMS @releaseDomain| -> n0|r1|
        0b WATCH /d|b| -> EEXIST
        0 WRITE /d/aa/x|1
        0b events -> /d/zz:all /d/zz:b /d/zz:a /d/aa/x:all /d/aa/x:b
        1 WRITE data/y|1
        1 WRITE data/z|1 -> ENOSPC
        2 WRITE /odd|mine
        1 WRITE /odd|mine -> EACCES
        destroy 2
        1 events -> @releaseDomain:t
        0 READ /odd| -> ENOENT
    """)
    after = world.ask("0", XsType.DIRECTORY_PART, join("/d", "0")).body.partition(b"\0")[0]
    assert int(after) > int(generation)
