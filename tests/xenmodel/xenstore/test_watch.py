"""Goal: who watches hears of every change he may know of, once, under the right path, and of nothing else.
Method: a table of scripts that look at the queued events after each change."""

from __future__ import annotations

import pytest

from tests.xenmodel.xenstore import GUESTS, World, run
from xenmodel.types import Domid
from xenmodel.xenstore.connection import Connection
from xenmodel.xenstore.errors import XsErrno, XsError
from xenmodel.xenstore.store import Store

SCRIPTS = {
    "fires at once, even for nothing": """
        0 watch /none tok
        0 events -> /none:tok
        0 events -> none
    """,
    "write, mkdir, permissions, removal": """
        0 watch /a tok
        0 events -> /a:tok
        0 write /a/b/c 1
        0 events -> /a/b/c:tok
        0 mkdir /a/d
        0 mkdir /a/d
        0 events -> /a/d:tok
        0 chmod /a r0
        0 events -> /a:tok
        0 read /a/d -> ""
        0 events -> none
        0 rm /a/d
        0 rm /a/d
        0 events -> /a/d:tok
        0 write /ab 1
        0 events -> none
    """,
    "a node made on the way to a deeper one": """
        0 watch /a/b tok
        0 events -> /a/b:tok
        0 write /a/b/c 1
        0 events -> /a/b/c:tok
        0 write /a 1
        0 events -> none
    """,
    "removal of a parent reports the watch's own path": """
        0 write /a/b/c 1
        0 watch /a/b/c deep
        0 watch /a/b mid
        0 watch /a/b/none none
        0 watch / root
        0 events -> /a/b/c:deep /a/b:mid /a/b/none:none /:root
        0 rm /a
        0 events -> /a/b/c:deep /a/b:mid /a:root
    """,
    "relative watches have relative events": """
        1 watch data rel
        1 watch /local/domain/1/data abs
        1 events -> data:rel /local/domain/1/data:abs
        1 write data/x 1
        1 events -> data/x:rel /local/domain/1/data/x:abs
        0 write /local/domain/1/data/y 1
        0 rm /local/domain/1
        1 events -> data/y:rel /local/domain/1/data/y:abs data:rel /local/domain/1/data:abs
        0 watch x dom0
        0 events -> x:dom0
        0 write /local/domain/0/x/y 1
        0 events -> x/y:dom0
    """,
    "the same path and token once, in either spelling": """
        1 watch data tok
        1 watch data tok -> EEXIST
        1 watch /local/domain/1/data tok -> EEXIST
        1b watch data tok
        1 watch data other
        1 unwatch /local/domain/1/data tok
        1 unwatch data tok -> ENOENT
        1 unwatch none tok -> ENOENT
        1 unwatch . tok -> ENOENT
        1 unwatch /a//b tok -> ENOENT
        1 unwatch @x// tok -> ENOENT
        1 events -> data:other
        1b events -> data:tok
    """,
    "events of a removed watch are dropped": """
        0 watch /a one
        0 watch /a two
        0 write /a 1
        0 unwatch /a one
        0 events -> /a:two
        0 watch /a one
        0 reset
        0 events -> none
        0 write /a 1
        0 events -> none
        0 watch /a two
        0 events -> /a:two
    """,
    "a queued event is not queued again": """
        0 watch /a tok
        0 write /a 1
        0 write /a/b 1
        0 write /a 2
        0 write /a/b 2
        0 events -> /a:tok /a/b:tok
        0 write /a 3
        0 events -> /a:tok
    """,
    "the same message for two watches of a connection is one": """
        0 watch /a tok
        0 watch / tok
        0 watch /a/b other
        0b watch /a/b tok
        0 events -> /a:tok /:tok /a/b:other
        0b events -> /a/b:tok
        0 write /a/b 1
        0 events -> /a/b:tok /a/b:other
        0b events -> /a/b:tok
        0 write /a/b 2
        0 unwatch /a tok
        0 events -> /a/b:tok /a/b:other
        0 watch /a tok
        0 events -> /a:tok
        0 write /a/b 3
        0 unwatch / tok
        0 unwatch /a tok
        0 events -> /a/b:other
        1 watch data tok
        1 watch /local/domain/1/data tok2
        1 events -> data:tok /local/domain/1/data:tok2
        1 write data 1
        1 events -> data:tok /local/domain/1/data:tok2
    """,
    "in the order in which they were made, per connection": """
        0 watch /a/b/c last
        0 watch / first
        0 watch /a second
        0b watch /a other
        0 watch /a/b third
        0 events -> /a/b/c:last /:first /a:second /a/b:third
        0b events -> /a:other
        0 write /a/b/c 1
        0 events -> /a/b/c:last /a/b/c:first /a/b/c:second /a/b/c:third
        0b events -> /a/b/c:other
        0 reload
        0 write /a/b/c 2
        0 events -> /a/b/c:last /a/b/c:first /a/b/c:second /a/b/c:third
    """,
    "depth": """
        0 watch /a zero 0
        0 watch /a one 1
        0 watch / root 1
        0 watch /a bad -1 -> EINVAL
        0 events -> /a:zero /a:one /:root
        0 write /a/b/c 1
        0 events -> none
        0 write /a/b 1
        0 events -> /a/b:one
        0 write /a 1
        0 events -> /a:zero /a:one /a:root
    """,
    "filtered by permission to read, also of what is gone": """
        1 watch / tok
        1 events -> /:tok
        0 write /secret 1
        0 events -> none
        0 write /secret 2
        0 rm /secret
        0 write /local/domain/2/secret 2
        2 write data/x 2
        2 rm data/x
        1 events -> none
        0 write /shown 1
        0 chmod /shown n0 r1
        1 events -> /shown:tok
        0 write /shown 2
        1 events -> /shown:tok
        0 rm /shown
        1 events -> /shown:tok
        0 write /shown 1
        1 events -> none
    """,
    "a watcher hears of losing the permission, then nothing": """
        0 write /a 1
        0 chmod /a n0 r1
        1 watch /a tok
        1 events -> /a:tok
        0 chmod /a n0
        1 events -> /a:tok
        0 write /a 2
        1 events -> none
        0 chmod /a n0 r1
        1 events -> /a:tok
        0 start t
        0.t chmod /a n0
        0.t write /a 3
        0 commit t
        1 events -> /a:tok
        0 start t
        0.t write /a 4
        0.t rm /a
        0 commit t
        1 events -> none
    """,
    "the names in a readable directory are known": """
        0 mkdir /dir
        0 chmod /dir n0 r1
        1 watch /dir tok
        1 events -> /dir:tok
        0 write /dir/x 1
        0 chmod /dir/x n0
        1 events -> /dir/x:tok
        0 write /dir/x/y 1
        1 events -> none
        0 chmod /dir/x/y r0
        1 events -> /dir/x/y:tok
        0 rm /dir/x
        1 events -> /dir/x:tok
    """,
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_watches(script: str) -> None:
    run(script)


@pytest.mark.parametrize(
    ("path", "token_length", "errno"),
    [
        ("/a", 4096 - 3 - 1, None),
        ("/a", 4096 - 3, XsErrno.E2BIG),
        ("a", 4096 - 2 - 1, None),  # what is sent is relative
        ("a", 4096 - 2, XsErrno.E2BIG),
    ],
)
def test_an_event_fits_into_a_message(path: str, token_length: int, errno: XsErrno | None) -> None:
    """Goal: XSA-324: no event over 4096 bytes, and a watcher still learns of nodes whose event would be.
    Method: a token that leaves room for the watch's own path and nothing else."""
    connection = Store().connect(Domid(1 if path == "a" else 0))
    token = "t" * token_length
    if errno is not None:
        with pytest.raises(XsError) as caught:
            connection.watch(path, token)
        assert caught.value.errno is errno
        assert not connection.watches and not connection.pending_events
        return
    connection.watch(path, token)
    events: list[tuple[str, str]] = []
    connection.on_event = lambda *event: events.append(event)
    connection.dispatch()
    if path == "/a":
        connection.write("/a/child", b"")
        connection.dispatch()
        assert events == [("/a", token)] * 2
    assert all(len(name) + 1 + len(text) + 1 <= 4096 for name, text in events)


@pytest.mark.parametrize("token", ["", "a b", "ÿ\udc80", "x" * 100])
def test_tokens_are_any_text_without_nul(token: str) -> None:
    connection = Store().connect(Domid(0))
    connection.watch("/a", token)
    with pytest.raises(XsError) as caught:
        connection.watch("/a", token + "\0")
    assert caught.value.errno is XsErrno.EINVAL


def test_dispatch_keeps_to_its_budget_and_says_whether_there_is_more() -> None:
    world = run("0 watch /a 1\n0 watch /b 2\n0 watch /c 3")
    connection = world.connection("0")
    assert connection.pending_events == 3
    assert connection.dispatch(2) is True
    assert world.delivered == ["/a:1", "/b:2"]
    assert connection.dispatch(2) is False
    assert connection.dispatch(2) is False
    assert world.delivered == ["/a:1", "/b:2", "/c:3"]


def test_wake_reports_the_first_event_only() -> None:
    woken: list[Connection] = []
    store = Store(wake=woken.append)
    one, two = store.connect(Domid(0)), store.connect(Domid(0))
    one.on_event = two.on_event = lambda path, token: None
    one.watch("/a", "t")
    one.write("/a", b"1")
    assert woken == [one]
    two.watch("/a", "t")
    assert woken == [one, two]
    while one.dispatch():
        pass
    two.write("/a", b"2")
    assert woken == [one, two, one], "two has one queued still"


def test_a_late_wake_learns_of_what_waits() -> None:
    store = Store()
    connection, idle = store.connect(Domid(0)), store.connect(Domid(0))
    connection.watch("/a", "t")
    woken: list[Connection] = []
    store.wake = woken.append
    assert woken == [connection] and idle not in woken


def test_dispatch_is_not_entered_twice_and_does_not_wake_itself() -> None:
    woken: list[Connection] = []
    store = Store(wake=woken.append)
    connection = store.connect(Domid(0))
    depth, deepest, calls = 0, 0, 0

    def on_event(path: str, token: str) -> None:
        nonlocal depth, deepest, calls
        depth, calls = depth + 1, calls + 1
        deepest = max(deepest, depth)
        if calls < 5:
            connection.write("/a/again", b"")
        assert connection.dispatch() is False
        depth -= 1

    connection.on_event = on_event
    connection.watch("/a", "t")
    while connection.dispatch():
        pass
    assert (deepest, calls, woken) == (1, 5, [connection])


@pytest.mark.parametrize("action", ["unwatch", "reset", "close", "release"])
def test_a_handler_may_end_what_it_is_called_for(action: str) -> None:
    store = Store()
    connection = store.connect(Domid(1))
    seen: list[str] = []

    def on_event(path: str, token: str) -> None:
        seen.append(path)
        match action:
            case "unwatch":
                connection.unwatch("a", "t")
            case "reset":
                connection.reset_watches()
            case "close":
                connection.close()
            case _:
                store.release(Domid(1))

    connection.on_event = on_event
    connection.watch("a", "t")
    store.connect(Domid(0)).write("/local/domain/1/a", b"")
    store.connect(Domid(0)).write("/local/domain/1/a/b", b"")
    assert connection.dispatch(10) is False
    assert seen == ["a"]


def test_a_handler_that_raises_loses_no_other_event() -> None:
    woken: list[Connection] = []
    store = Store(wake=woken.append)
    connection = store.connect(Domid(0))
    seen: list[str] = []

    def on_event(path: str, token: str) -> None:
        seen.append(path)
        if path == "/a":
            raise ValueError("ours")

    connection.on_event = on_event
    connection.watch("/a", "t")
    connection.watch("/b", "t")
    woken.clear()
    with pytest.raises(ValueError, match="ours"):
        connection.dispatch(10)
    assert woken == [connection]
    assert connection.dispatch(10) is False
    assert seen == ["/a", "/b"]


def test_without_a_handler_events_wait() -> None:
    connection = Store().connect(Domid(0))
    connection.watch("/a", "t")
    assert connection.dispatch() is False
    assert connection.pending_events == 1


def test_closing_leaves_no_trace() -> None:
    """Goal: XSA-330: whatever ends a watch takes it out of every index.
    Method: look into the table after each way of ending one."""
    for end in ("1 unwatch data a\n1 unwatch data b", "1 reset", "1 close", "0 release 1"):
        world = World().run(GUESTS + "1 watch data a\n1 watch data b\n1 write data 1\n" + end)
        assert not world.store.watches._by_path, end
        assert world.connection("1").pending_events == 0
