"""Goal: events that a domain does not read cost nobody anything for long, and who causes events pays until they are read.
Method: scripts on a clock that the test sets; requests with a cause, as peer.py makes one for each."""

from __future__ import annotations

import dataclasses

import pytest

from tests.xenmodel.xenstore import GUESTS, World, run
from xenmodel.types import Domid
from xenmodel.xenstore.domain import Cause
from xenmodel.xenstore.quota import DEFAULT_QUOTA, NO_LIMITS
from xenmodel.xenstore.upkeep import problems
from xenmodel.xenstore.watch import EVENT_BYTES, EVENTS_PER_DOMAIN, EVENTS_PER_WATCH

# --- events that nobody reads --------------------------------------------------------------------------------------------

TIMEOUTS = {
    "an event is lost after 20 s": """
        1 watch data tok
        1 events -> data:tok
        1 write data/x 1
        0 sleep 19.9
        1 write data/x 2
        1 events -> data/x:tok
        1 write data/x 3
        0 sleep 20
        1 events -> none
        1 write data/x 4
        1 events -> data/x:tok
        1 write data/x 5
        0 sleep 20
        1 events -> none
    """,
    "each has its own 20 s": """
        1 watch data tok
        1 events -> data:tok
        1 write data/a 1
        0 sleep 12
        1 write data/b 1
        0 sleep 8
        1 write data/c 1
        1 events -> data/b:tok data/c:tok
        1 write data/d 1
        0 sleep 12
        1 write data/e 1
        0 sleep 12
        1 events -> data/e:tok
        1 write data/f 1
        0 sleep 12
        1 write data/g 1
        0 sleep 8
        0 sleep 12
        1 events -> none
    """,
    "one that is queued again keeps its age": """
        1 watch data tok
        1 events -> data:tok
        1 write data/a 1
        0 sleep 12
        1 write data/a 2
        0 sleep 12
        1 events -> none
    """,
    "the first event of a watch too": """
        1 watch data tok
        0 sleep 20
        1 events -> none
        1 write data/x 1
        1 events -> data/x:tok
    """,
    "who reads in time loses nothing": """
        1 watch data tok
        0 sleep 15
        1 events -> data:tok
        1 write data/a 1
        0 sleep 15
        1 events -> data/a:tok
        0 sleep 15
        1 write data/b 1
        0 sleep 15
        1 events -> data/b:tok
    """,
    "the control domain's wait for ever": """
        0 watch /local tok
        1 watch data tok
        0 events -> /local:tok
        1 events -> data:tok
        1 write data/x 1
        0 sleep 1000000
        1 events -> none
        0 events -> /local/domain/1/data/x:tok
    """,
    "one connection's do not prolong another's": """
        1 watch data tok
        1b watch data tok
        0 sleep 10
        1b events -> data:tok
        1b watch data other
        0 sleep 10
        1 events -> none
        1b events -> data:other
    """,
}


@pytest.mark.parametrize("script", TIMEOUTS.values(), ids=TIMEOUTS.keys())
@pytest.mark.parametrize("quota", [DEFAULT_QUOTA, NO_LIMITS], ids=["default", "no limits"])
def test_timeouts(script: str, quota: object) -> None:
    run(script, quota)  # type: ignore[arg-type]


def test_memory_comes_back_with_the_timeout() -> None:
    world = run("1 watch data tok\n1 events -> data:tok")
    before = world.store.usage(Domid(1)).memory
    world.run("2 write data/x 1\n0 write /local/domain/1/data/abc 1\n0 rm /local/domain/1/data/abc")
    assert world.store.usage(Domid(1)).memory == before + EVENT_BYTES + len("/local/domain/1/data/abc") + len("tok")
    world.run("0 sleep 20")
    assert world.store.usage(Domid(1)).memory == before


def test_timers_are_one_for_a_connection_at_most() -> None:
    """Goal: a domain cannot fill the host's timers by reading and causing events fast.
    Method: a thousand events, each read at once; then the connection ends, and after a while nothing is left."""
    world = run("1 watch data tok\n1b watch data tok\n1 events -> data:tok")
    for number in range(1000):
        world.run(f"1 write data/x {number}\n1 events -> data/x:tok\n0 sleep 0.001")
        assert len(world.store.timers._heap) <= 2
    world.run("1 write data/x 1\n1 close\n1b close")
    world.run("0 sleep 20")
    assert world.store.timers.next is None


def test_a_flood_of_events_is_bounded_and_none_is_lost_for_good() -> None:
    world = run("0 watch /flood tok\n0 watch /calm calm\n0 events -> /flood:tok /calm:calm")
    for number in range(3 * EVENTS_PER_WATCH):
        world.run(f"1 write data/x {number}\n0 write /flood/{number} 1")
    world.run("0 write /calm 1")
    connection = world.connection("0")
    assert connection.pending_events == EVENTS_PER_WATCH + 2
    world.answer(connection, "events", [], 0)
    assert world.delivered[EVENTS_PER_WATCH - 1 :] == [
        f"/flood/{EVENTS_PER_WATCH - 1}:tok",
        "/flood:tok",
        "/calm:calm",
    ]


# --- requests that are outstanding ---------------------------------------------------------------------------------------


def ask(world: World, script: str, reply_is_read: bool = True) -> Cause:
    """One request of domain 1, served as peer.py does."""
    world.store.cause = cause = Cause(world.store.domains.record(Domid(1)))
    try:
        world.run(script)
    finally:
        world.store.cause = None
    if reply_is_read:
        cause.done()
    return cause


def outstanding(world: World, domid: int = 1) -> int:
    return world.store.usage(Domid(domid)).outstanding


WATCHED = """
    0 chmod /local/domain/1/data n1 r2
    2 watch /local/domain/1/data a
    2 watch /local/domain/1/data b
    0 watch /local/domain/1/data c
    2 events -> /local/domain/1/data:a /local/domain/1/data:b
    0 events -> /local/domain/1/data:c
"""
TAKEN = {
    "read": "2 events -> /local/domain/1/data/x:a /local/domain/1/data/x:b",
    "unwatched": "2 unwatch /local/domain/1/data b\n2 unwatch /local/domain/1/data a",
    "reset": "2 reset",
    "closed": "2 close",
    "the reader dies": "0 release 2",
    "lost after 20 s": "0 sleep 20",
}


@pytest.mark.parametrize("taken", TAKEN.values(), ids=TAKEN.keys())
def test_a_request_is_outstanding_until_every_event_of_it_is_taken(taken: str) -> None:
    world = run(WATCHED)
    ask(world, "1 write data/x 1")
    assert outstanding(world) == 1
    world.run(taken)
    assert outstanding(world) == 1, "domain 0 has one still"
    world.run("0 events -> /local/domain/1/data/x:c")
    assert outstanding(world) == 0


def test_the_reply_counts_too() -> None:
    world = run(WATCHED)
    cause = ask(world, "1 write data/x 1", reply_is_read=False)
    world.run("0 reset\n2 reset")
    assert outstanding(world) == 1
    cause.done()
    assert outstanding(world) == 0


def test_requests_are_counted_one_by_one() -> None:
    """Goal: as many as have an event waiting.  Method: ten requests, of which two cause the same event."""
    world = run(WATCHED)
    for number in range(9):
        ask(world, f"1 write data/{number} 1")
    ask(world, "1 write data/0 1")
    assert outstanding(world) == 9, "the tenth one's event was queued already"
    connection = world.connection("2")
    connection.dispatch(2)
    world.run("0 reset")
    assert outstanding(world) == 8, "the first request's two events are read"
    connection.dispatch(15)
    assert outstanding(world) == 1
    connection.dispatch(1)
    assert outstanding(world) == 0


def test_what_is_not_outstanding() -> None:
    """Goal: nobody pays for others, or for what nobody is told.  Method: requests of each kind; look at the counts."""
    world = run(WATCHED)
    ask(world, "1 watch data own")
    assert outstanding(world) == 0, "the first event of a watch is not the request's"
    world.run("1 events -> data:own")
    ask(world, "1 read data -> \"\"")
    ask(world, "1 mkdir data")
    ask(world, "1 start t")
    ask(world, "1.t write data/x 1")
    assert outstanding(world) == 0
    ask(world, "1 commit t")
    assert outstanding(world) == 1, "but those of a commit are"
    world.run("0 write /local/domain/1/data/y 1\n2 reset")
    assert (outstanding(world), outstanding(world, 2), outstanding(world, 0)) == (1, 0, 0)
    world.run("1 events -> data/x:own data/y:own\n0 events -> /local/domain/1/data/x:c /local/domain/1/data/y:c")
    assert outstanding(world) == 0


def test_a_flood_that_is_merged_is_outstanding_only_as_long_as_its_events() -> None:
    """Goal: one event that stands for many is one request's.  Method: more requests than a watch keeps events."""
    world = run("0 watch /local/domain/1/data tok\n0 events -> /local/domain/1/data:tok", NO_LIMITS)
    for number in range(2 * EVENTS_PER_WATCH):
        ask(world, f"1 write data/{number} 1")
    assert outstanding(world) == EVENTS_PER_WATCH + 1
    world.answer(world.connection("0"), "events", [], 0)
    assert len(world.delivered) == EVENTS_PER_WATCH + 1
    assert outstanding(world) == 0


def test_relieved_is_called_once_when_there_are_fewer() -> None:
    """Goal: who had to wait is looked at again, once for each time he waited.  Method: count the calls."""
    world, calls = run(WATCHED), []
    record = world.store.domains.record(Domid(1))
    ask(world, "1 write data/x 1")
    ask(world, "1 write data/y 1")
    record.relieved = lambda: calls.append(record.outstanding)
    world.connection("0").dispatch(1)
    world.connection("2").dispatch(1)
    assert calls == []
    world.connection("2").dispatch(1)
    assert calls == [1] and record.relieved is None
    world.run("2 reset\n0 reset")
    assert calls == [1] and outstanding(world) == 0


def test_the_causes_of_a_dead_domain_are_not_its_successors() -> None:
    """Goal: XSA-483.  Method: domain 1 dies with requests outstanding; another one takes its number; then they are read."""
    world = run(WATCHED)
    ask(world, "1 write data/x 1")
    cause = ask(world, "1 write data/y 1", reply_is_read=False)
    world.run("0 release 1")
    assert outstanding(world) == 0
    world.run(GUESTS + "0 chmod /local/domain/1/data n1 r2\n2 reset\n2 watch /local/domain/1/data a\n2 events -> "
              "/local/domain/1/data:a")  # fmt: skip
    world.connections.pop("1")
    ask(world, "1 write data/x 1")
    assert outstanding(world) == 1
    world.run("0 reset")
    cause.done()
    assert outstanding(world) == 1
    world.run("2 events -> /local/domain/1/data/x:a")
    assert outstanding(world) == 0


def test_a_domain_that_is_limited_may_still_be_told() -> None:
    """Goal: a domain without memory left hears of changes: what waits for it is bounded by its watches, not refused.
    Method: a guest at its limit; events of both its watches."""
    quota = dataclasses.replace(NO_LIMITS, memory=200)
    world = run("1 watch data a\n1 watch data b\n1 events -> data:a data:b", quota)
    used = world.store.usage(Domid(1)).memory
    world.run(f"0 write /local/domain/1/data {'x' * (200 - used)}\n1 watch data c -> ENOMEM\n1 events -> data:a data:b")
    assert world.store.usage(Domid(1)).memory == 200


@pytest.mark.parametrize("deep", [True, False])
def test_one_commit_queues_a_bounded_number_of_events(deep: bool) -> None:
    """Goal: however many nodes and watches meet in one commit, a domain gets few events, and loses none of its watches.
    Method: 900 nodes, below one another or not, and 120 watches above them; all is read, and one more change is told."""
    world = run("0 introduce 1")
    guest = world.connection("1")
    names = ["data/" + ("/".join("a" * (i + 1)) if deep else f"{i // 40}/{i % 40}") for i in range(900)]
    for number in range(120):
        guest.watch(names[number * 7] if deep else "data", f"t{number}")
    while guest.dispatch(100):
        pass
    tx = guest.transaction_start()
    for name in names:
        guest.write(name, b"x", tx)
    guest.transaction_end(tx, True)
    assert guest.pending_events <= EVENTS_PER_DOMAIN + 120
    assert problems(world.store) == []
    world.delivered.clear()
    while guest.dispatch(100):
        pass
    assert {event.partition(":")[2] for event in world.delivered} == {f"t{number}" for number in range(120)}
    guest.write(names[-1], b"y")
    assert guest.pending_events == 120
