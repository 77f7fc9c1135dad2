"""Goal: @introduceDomain and @releaseDomain are told when they are due, once, and to who may know.
Method: a table of scripts in which domains come, shut down, resume and go."""

from __future__ import annotations

import pytest

from tests.xenmodel.xenstore import run

SCRIPTS = {
    "special nodes": """
        0 watch @introduceDomain in
        0 watch @releaseDomain out
        1 watch @introduceDomain guest
        0 watch @nonsense none
        0 watch / root
        0 events -> @introduceDomain:in @releaseDomain:out @nonsense:none /:root
        1 events -> @introduceDomain:guest
        0 introduce 5
        0 introduce 5
        0 events -> @introduceDomain:in
        1 events -> none
        0 shutdown 5
        0 events -> @releaseDomain:out
        0 release 5
        0 events -> @releaseDomain:out
        0 introduce 5
        0 events -> @introduceDomain:in
        0 chmod @introduceDomain n0 r1
        0 events -> @introduceDomain:in
        1 events -> @introduceDomain:guest
        0 introduce 6
        1 events -> @introduceDomain:guest
    """,
    "special nodes with the domain": """
        0 introduce 6
        0 introduce 7
        0 watch @releaseDomain all 1
        0 watch @releaseDomain none 0
        0 watch @releaseDomain/7 seven
        0 watch @releaseDomain plain
        0 events -> @releaseDomain:all @releaseDomain:none @releaseDomain/7:seven @releaseDomain:plain
        0 release 6
        0 events -> @releaseDomain/6:all @releaseDomain:none @releaseDomain:plain
        0 release 7
        0 events -> @releaseDomain/7:all @releaseDomain:none @releaseDomain:plain @releaseDomain/7:seven
        0 release 7
        0 events -> none
    """,
    "a domain that was never introduced goes unseen": """
        0 watch @releaseDomain out
        0 events -> @releaseDomain:out
        1 write data/x 1
        0 shutdown 1
        0 release 1
        0 release 9
        0 events -> none
        0 usage 1 -> 0 0 0
    """,
    "a shutdown is told once until RESUME, and the end again": """
        0 watch @releaseDomain out
        0 events -> @releaseDomain:out
        0 introduce 1
        0 shutdown 1
        0 events -> @releaseDomain:out
        0 shutdown 1
        0 events -> none
        0 resume 1
        0 events -> none
        0 shutdown 1
        0 events -> @releaseDomain:out
        0 release 1
        0 events -> @releaseDomain:out
        0 shutdown 1
        0 events -> none
        0 introduce 1
        0 shutdown 1
        0 events -> @releaseDomain:out
    """,
    "the nodes of a domain that shut down stay, and go before its end is told": """
        0 introduce 1
        1 write data/x 1
        0 watch @releaseDomain out
        0 watch /local/domain/1/data/x data
        0 events -> @releaseDomain:out /local/domain/1/data/x:data
        0 shutdown 1
        1 read data/x -> 1
        0 events -> @releaseDomain:out
        0 release 1
        0 events -> /local/domain/1/data/x:data @releaseDomain:out
    """,
    "a change of permissions is told like any other": """
        0 watch @releaseDomain out
        1 watch @releaseDomain guest
        0 events -> @releaseDomain:out
        1 events -> @releaseDomain:guest
        0 chmod @releaseDomain n0 r1
        0 start t
        0.t chmod @introduceDomain n0 r1
        0 commit t
        0 perms @introduceDomain -> n0 r1
        0 events -> @releaseDomain:out
        1 events -> @releaseDomain:guest
        0 introduce 2
        0 release 2
        1 events -> @releaseDomain:guest
    """,
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_special_nodes(script: str) -> None:
    run(script)
