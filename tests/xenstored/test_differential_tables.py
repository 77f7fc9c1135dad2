"""Goal: every difference in differences.py is still there, and nothing else differs that a script can tell: the order of
events, who is told, special nodes, what goes with a connection, commands.
Method: tables of scripts, done to Debian's xenstored and to ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import realstore
from tests.xenstored.differences import DIFFERENCES
from tests.xenstored.rig import HOMES, Twins, twins
from xenmodel.public.io.xs_wire import XsType
from xenmodel.xenstore.wire import join

pytestmark = pytest.mark.skipif(bool(reason := realstore.missing()), reason=reason)
HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "differences.md"

# --- what differs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, each in DIFFERENCES.items() if each.script])
def test_a_difference_is_still_there(name: str) -> None:
    """Goal: the list does not rot.  Method: each script, without what excuses its difference elsewhere; one that meets none
    of a difference would not need to be here."""
    script = DIFFERENCES[name].script
    assert re.search(r" / |\*", script), "its script shows no difference"
    with twins() as pair:
        pair.run(HOMES).run(script)


def test_the_list_is_the_documents() -> None:
    """Goal: docs/differences.md says what differs, and no more.  Method: its table's rows are those of the list; what has
    no script has a test in this folder."""
    section = DOCS.read_text().partition("\n## xenstored\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert rows == [each.row for each in DIFFERENCES.values()]
    tests = "".join(file.read_text() for file in HERE.glob("test_*.py"))
    assert [name for name, each in DIFFERENCES.items() if not each.script and f"def {each.test}(" not in tests] == []


# --- what does not --------------------------------------------------------------------------------------------------------

SAME = {
    "a commit is told in the order in which the transaction met the nodes": """
        a WATCH /|root|
        a events -> /:root
        a TRANSACTION_START | -> $t
        a.$t WRITE /t/z|1
        a.$t WRITE /t/a|1
        a.$t READ /t/m| -> ENOENT
        a.$t WRITE /t/b|1
        a.$t WRITE /t/m|1
        a.$t WRITE /t/z|2
        a.$t RM /t/b|
        a events -> none
        a.$t TRANSACTION_END T| -> OK|
        a events -> /t/z:root /t/a:root /t/m:root
        a DIRECTORY /t| -> z|a|m|
    """,
    "a removal is told for the topmost node, and to watches of those below, children first": """
        a WRITE /r/x/1|
        a WRITE /r/x/2|
        a WRITE /r/y|
        a WATCH /r/x/1|one|
        a WATCH /r/y|y|
        a WATCH /r/x|x|
        a WATCH /r|r|
        a WATCH /|root|
        a events -> /r/x/1:one /r/y:y /r/x:x /r:r /:root
        a RM /r| -> OK|
        a events -> /r/x/1:one /r/x:x /r/y:y /r:r /r:root
        a RM /r| -> OK|
        a RM /r/x| -> ENOENT
        a events -> none
    """,
    "a guest that dies: in the order of the tree, then that it is gone": """
        a WRITE /z|
        a WRITE /b|
        a SET_PERMS /b|n1|
        a SET_PERMS /z|n1|
        a WRITE /b/below|
        a WATCH /|root|
        a WATCH @releaseDomain|gone|
        a WATCH /b/below|below|
        a events -> /:root @releaseDomain:gone /b/below:below
        destroy 1
        a events -> /local/domain/1/data:root /z:root /b/below:below /b:root @releaseDomain:gone
    """,
    "one event for the watches of one connection with the same token": """
        1 WATCH data|t|
        1 WATCH data/x|t|
        1 WATCH /local/domain/1/data|t| -> EEXIST
        1 WATCH /local/domain/1|t|
        1 WATCH data|u|
        b WATCH /local/domain/1|t|
        b WATCH /local|t|
        1 events -> data:t data/x:t /local/domain/1:t data:u
        b events -> /local/domain/1:t /local:t
        a WRITE /local/domain/1/data/x|
        1 events -> data/x:t /local/domain/1/data/x:t data/x:u
        b events -> /local/domain/1/data/x:t
        1 UNWATCH data|t| -> OK|
        a WRITE /local/domain/1/data/x|
        1 events -> data/x:t /local/domain/1/data/x:t data/x:u
    """,
    "the first event of a watch comes behind the reply, an event for the writer before": """
        1 WATCH data|t| -> OK|
        1 WATCH data|t| -> EEXIST
        1 WRITE data|x -> OK|
        1 events -> data:t data:t
        1 RESET_WATCHES
        1 UNWATCH data|t| -> ENOENT
    """,
    "what a guest may not know it is not told": """
        a WRITE /s/secret|
        a SET_PERMS /s|n0|r2|
        a SET_PERMS /s/secret|n0|
        1 WATCH /s|t|
        2 WATCH /s|t|
        1 events -> /s:t
        2 events -> /s:t
        a WRITE /s/secret|x
        1 events -> none
        2 events -> /s/secret:t
        a SET_PERMS /s/secret|n0|r1|
        1 events -> /s/secret:t
        2 events -> /s/secret:t
        a SET_PERMS /s|n0|
        2 events -> /s:t
        a SET_PERMS /s/secret|n0|
        1 events -> /s/secret:t
        2 events -> none
        a TRANSACTION_START | -> $t
        a.$t SET_PERMS /s/secret|n0|r2|
        a.$t RM /s/secret|
        a.$t TRANSACTION_END T|
        2 events -> none
    """,
    "@introduceDomain and @releaseDomain": """
        b WATCH @introduceDomain|in|
        b WATCH @releaseDomain|out|
        1 WATCH @releaseDomain|out|
        b events -> @introduceDomain:in @releaseDomain:out
        1 events -> @releaseDomain:out
        create 3
        b events -> none
        introduce 3
        introduce 3
        b events -> @introduceDomain:in
        shutdown 3
        shutdown 3
        b events -> @releaseDomain:out
        a RESUME 3| -> OK|
        shutdown 3
        b events -> @releaseDomain:out
        destroy 3
        b events -> @releaseDomain:out
        1 events -> none
        create 3
        destroy 3
        b events -> none
    """,
    "permissions of special nodes": """
        a SET_PERMS @releaseDomain|n0|r1|
        1 WATCH @releaseDomain|out|
        2 WATCH @releaseDomain|out|
        1 events -> @releaseDomain:out
        2 events -> @releaseDomain:out
        shutdown 2
        1 events -> @releaseDomain:out
        2 events -> none
        a SET_PERMS @introduceDomain|b2|
        2 WATCH @introduceDomain|in|
        1 WATCH @introduceDomain|in|
        1 events -> @introduceDomain:in
        2 events -> @introduceDomain:in
        create 3
        introduce 3
        1 events -> @introduceDomain:in
        2 events -> @introduceDomain:in
    """,
    "a second INTRODUCE begins anew": """
        1 WATCH data|t|
        1 events -> data:t
        1 TRANSACTION_START | -> $t
        introduce 1
        a WRITE /local/domain/1/data|x
        1 events -> none
        1.$t READ data| -> ENOENT
        0 WATCH /k|t|
        0 events -> /k:t
        a INTRODUCE 0|1|1| -> OK|
        a WRITE /k|
        0 events -> none
        0 READ /k| -> ""
    """,
    "what a connection had goes with it": """
        open c
        c WATCH /c|t|
        c TRANSACTION_START | -> $t
        c.$t WRITE /c|
        close c
        a READ /c| -> ENOENT
        open c
        c.$t READ /| -> ENOENT
        a WRITE /c|
        c events -> none
    """,
    "numbers of domains are read as atoi() reads them": """
        a GET_DOMAIN_PATH -1| -> /local/domain/4294967295|
        a GET_DOMAIN_PATH 99999999999| -> /local/domain/1215752191|
        a GET_DOMAIN_PATH 99999999999999999999| -> /local/domain/4294967295|
        a GET_DOMAIN_PATH \\x0a +7x| -> /local/domain/7|
        a GET_DOMAIN_PATH 1
        a GET_DOMAIN_PATH |
        a IS_DOMAIN_INTRODUCED 0| -> T|
        a IS_DOMAIN_INTRODUCED 32752| -> T|
        a IS_DOMAIN_INTRODUCED 9| -> F|
        a RELEASE 32752|
        a RELEASE 0|
        a RELEASE 9|
        a RESUME 9|
        a SET_TARGET 1|9|
        a SET_TARGET 1|
        a SET_TARGET 1|2|more| -> OK|
        a INTRODUCE 9|1|1| -> EINVAL
        a INTRODUCE 1|1|0| -> EINVAL
        a INTRODUCE 1|1| -> EINVAL
        1 IS_DOMAIN_INTRODUCED 1| -> EACCES
        1 RELEASE 2| -> EACCES
    """,
    "commands": """
        a CONTROL quota| -> *
        a CONTROL quota-soft| -> *
        a CONTROL quota|1|
        a CONTROL quota|9| -> ENOENT
        a CONTROL quota|set|nodes|0| -> EINVAL
        a CONTROL quota|set|nothing|5| -> EINVAL
        a CONTROL quota|set|nodes|
        a CONTROL quota-soft|set|memory|5000| -> OK|
        a CONTROL quota-soft|set|nodes|5000| -> EINVAL
        a CONTROL print|x| -> OK|
        a CONTROL print| -> EINVAL
        a CONTROL check| -> OK|
        a CONTROL log|x| -> EINVAL
        a CONTROL nothing| -> EINVAL
        a CONTROL -> EINVAL
        1 CONTROL check| -> EACCES
    """,
}


@pytest.mark.parametrize("name", SAME)
def test_the_same(name: str, pair: Twins) -> None:
    """Goal: no difference, and what it is.  Method: scripts."""
    pair.run(SAME[name])


@pytest.mark.parametrize("command", ["quota", "quota-soft"])
def test_the_table_of_quotas(command: str, pair: Twins) -> None:
    """Goal: `xenstore-control quota` shows the same.  Method: both tables, as they are at first."""
    real, ours = pair.both("a", lambda client: client.request(XsType.CONTROL, join(command)).body)
    assert real == ours and b"memory" in real
