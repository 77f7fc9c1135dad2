"""Goal: a commit tells of what it changed, in the order in which the transaction first looked at it, and only of that.
Method: a table of scripts that look at the queued events after each end of a transaction."""

from __future__ import annotations

import pytest

from tests.xenmodel.xenstore import run

SCRIPTS = {
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
        0 events -> /a:root /a/x:x
    """,
    "events of a commit come in the order of the first look": """
        0 watch / tok
        0 events -> /:tok
        0 start t
        0.t read /b -> ENOENT
        0.t write /a 1
        0.t write /b 1
        0.t write /c/d/e 1
        0.t write /c/d 1
        0.t write /c 1
        0.t write /a 2
        0 events -> none
        0 commit t
        0 events -> /b:tok /a:tok /c/d/e:tok /c/d:tok /c:tok
    """,
    "a removal comes top first in a commit, and children first outside": """
        0 write /d/x/y 1
        0 write /d/z 1
        0 watch /d d
        0 watch /d/x x
        0 watch /d/x/y y
        0 watch /d/z z
        0 events -> /d:d /d/x:x /d/x/y:y /d/z:z
        0 rm /d
        0 events -> /d/x/y:y /d/x:x /d/z:z /d:d
        0 write /d/x/y 1
        0 write /d/z 1
        0 events -> /d/x/y:d /d/x/y:x /d/x/y:y /d/z:d /d/z:z
        0 start t
        0.t rm /d
        0 commit t
        0 events -> /d:d /d/x:x /d/x/y:y /d/z:z
        0 write /d/x/y 1
        0 events -> /d/x/y:d /d/x/y:x /d/x/y:y
        0 start t
        0.t read /d/x/y -> 1
        0.t rm /d
        0 commit t
        0 events -> /d/x/y:y /d:d /d/x:x
    """,
    "what was changed often, or came and went, is told once or not at all": """
        0 write /d/x 1
        0 watch /d d
        0 events -> /d:d
        0 start t
        0.t rm /d/x
        0.t write /d/x 1
        0.t write /d/new 1
        0.t rm /d/new
        0.t write /d/x 2
        0 commit t
        0 events -> /d/x:d
    """,
    "a node removed in a commit is told to who could read it, not to who could list its parent": """
        0 mkdir /dir
        0 chmod /dir n0 r1
        0 write /dir/listed 1
        0 write /dir/other 1
        0 write /dir/shown 1
        0 chmod /dir/listed n0
        0 chmod /dir/other n0
        1 watch /dir tok
        1 events -> /dir:tok
        0 start t
        0.t rm /dir/listed
        0.t rm /dir/shown
        0 commit t
        1 events -> /dir/shown:tok
        0 rm /dir/other
        1 events -> /dir/other:tok
    """,
    "a node made in a commit is told to who may list its parent": """
        0 mkdir /dir
        0 chmod /dir n0 r1
        1 watch /dir tok
        1 events -> /dir:tok
        0 start t
        0.t write /dir/x 1
        0.t chmod /dir/x n0
        0 commit t
        1 events -> /dir/x:tok
    """,
    "a node that becomes readable, or stops being so, in a commit": """
        0 write /a 1
        0 write /b 1
        0 chmod /b n0 r1
        0 write /c 1
        1 watch / tok
        1 events -> /:tok
        0 start t
        0.t chmod /c n0 r1
        0.t chmod /b n0
        0.t write /a 2
        0 commit t
        1 events -> /c:tok /b:tok
    """,
    "watches hear of a commit in the order in which they were made": """
        0 watch /a/b one
        0 watch / two
        0 watch /a three
        0b watch / other
        0 watch /a/b four
        0 events -> /a/b:one /:two /a:three /a/b:four
        0b events -> /:other
        0 start t
        0.t write /a/b 1
        0.t write /a 1
        0 commit t
        0 events -> /a/b:one /a/b:two /a/b:three /a/b:four /a:two /a:three
        0b events -> /a/b:other /a:other
        0 unwatch /a/b one
        0 watch /a/b one
        0 events -> /a/b:one
        0 write /a/b 2
        0 events -> /a/b:two /a/b:three /a/b:four /a/b:one
    """,
    "an event that waits keeps its place": """
        0 watch / tok
        0 events -> /:tok
        0 write /a 1
        0 write /b 1
        0 start t
        0.t write /b 2
        0.t write /c 1
        0.t write /a 2
        0 commit t
        0 events -> /a:tok /b:tok /c:tok
    """,
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_events_of_transactions(script: str) -> None:
    run(script)
