"""Goal: a domain may do what a node's permissions say, for itself, as one of all, or in the name of its target; no more.
Method: tables of permissions and of scripts."""

from __future__ import annotations

import pytest

from tests.xenmodel.xenstore import run
from xenmodel.types import Domid
from xenmodel.xenstore.errors import XsErrno, XsError
from xenmodel.xenstore.perms import Access, Perm, check_perms, granted
from xenmodel.xenstore.store import Store

ANY = 32757  # DOMID_ANY, 0x7ff5


@pytest.mark.parametrize(
    ("perms", "domid", "bits"),
    [
        ("n1", 0, 7),
        ("n1", 1, 7),
        ("n1", 2, 0),
        ("r1", 2, 1),
        ("w1", 2, 2),
        ("b1", 2, 3),
        ("b1 n2", 2, 0),
        ("n1 w2 b3", 3, 3),
        ("n1 n1 b2", 2, 3),
        (f"n1 r{ANY}", 2, 1),
        (f"n1 r{ANY} b2", 2, 1),
        (f"n1 b2 r{ANY}", 2, 3),
        (f"b1 n{ANY}", 2, 0),
        (f"n{ANY}", 2, 7),
        (f"n0 b{ANY}", ANY, 3),
    ],
)
def test_granted(perms: str, domid: int, bits: int) -> None:
    assert granted([Perm.parse(text) for text in perms.split()], Domid(domid)) == bits


@pytest.mark.parametrize(
    ("perms", "target", "bits"),
    [
        ("n1", 1, 7),
        ("n0 r1", 1, 1),
        ("n0 r1 b2", 1, 1),
        ("n0 b2 r1", 1, 3),
        ("r0 n2 b1", 1, 0),
        ("n2", 1, 7),
        ("n0 r3", 1, 0),
        ("n0", 0, 7),
        ("n1", None, 0),
    ],
)
def test_granted_to_a_domain_with_a_target(perms: str, target: int | None, bits: int) -> None:
    """Goal: a stub domain may do what its target may.  Method: domain 2, whose target is `target`."""
    assert granted([Perm.parse(text) for text in perms.split()], Domid(2), None if target is None else Domid(target)) == bits


SCRIPTS = {
    "a node for everybody": f"""
        0 write /x 1
        0 chmod /x n0 b{ANY}
        1 write /x 2
        2 read /x -> 2
        1 write /x/mine 1
        0 perms /x/mine -> n1 b{ANY}
        2 write /x/mine 2
        2 rm /x/mine
        1 chmod /x n1 -> EACCES
    """,
    "a node that is everybody's": f"""
        0 write /x 1
        0 chmod /x n{ANY}
        0 write /x longer-than-before
        0 write /x/below 1
        0 perms /x/below -> n{ANY}
        1 write /x even-longer-than-before-that
        1 chmod /x n1 -> EPERM
        1 chmod /x b{ANY} n2
        0 usage 1 -> 1 0 0
        1 write /x/mine 1
        0 perms /x/mine -> b1 n2
        0 usage 1 -> 2 0 0
    """,
    "a target's nodes, until it or the domain is gone": """
        0 target 2 1
        2 write /local/domain/1/data/x 1
        0 perms /local/domain/1/data/x -> n2
        0 usage 2 -> 2 0 0
        2 chmod /local/domain/1/data r1
        2 read /local/domain/1 -> ""
        1 read /local/domain/2 -> EACCES
        2 write x 1 -> EACCES
        2 watch /local/domain/1/data tok
        2 events -> /local/domain/1/data:tok
        1 write data/y 1
        2 events -> /local/domain/1/data/y:tok
        0 release 1
        2 events -> /local/domain/1/data:tok
        0 write /local/domain/1/data/x 1
        0 chmod /local/domain/1/data n1
        2 read /local/domain/1/data -> EACCES
        1b write /local/domain/1/data/z 1
        2 events -> none
    """,
    "a new domain of that number has no target": """
        0 target 2 1
        2 read /local/domain/1/data -> ""
        0 release 2
        2b read /local/domain/1/data -> EACCES
    """,
    "what a number was permitted before its domain began": """
        0 write /x 1
        0 chmod /x r0 n1 w2
        0 created 1
        1 read /x -> 1
        0 perms /x -> r0 w2
        0 chmod /x r0 n1
        1 read /x -> EACCES
    """,
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_permissions(script: str) -> None:
    run(script)


@pytest.mark.parametrize("domid", [0, 3, ANY, 4, 32752, 65535])
@pytest.mark.parametrize("path", ["/x", "@releaseDomain"])
def test_an_owner_has_to_exist(path: str, domid: int) -> None:
    """Goal: no node is given to a number that a later domain will have.  Method: a store that knows domains 0 and 3."""
    store = Store(exists=lambda domid: domid in (0, 3))
    control = store.connect(Domid(0))
    control.write("/x", b"1")
    tx = control.transaction_start()
    before = control.get_perms(path)
    wanted = [Perm(Domid(domid), Access.NONE), Perm(Domid(4), Access.READ)]  # others need not exist yet
    for each in (0, tx):
        if domid in (0, 3, ANY):
            control.set_perms(path, wanted, each)
            assert control.get_perms(path, each) == wanted
            control.set_perms(path, before, each)
        else:
            with pytest.raises(XsError) as caught:
                control.set_perms(path, wanted, each)
            assert caught.value.errno is XsErrno.ENOENT
            assert control.get_perms(path, each) == before


@pytest.mark.parametrize("dead", [3, 4, 5])
def test_a_commit_needs_the_owners_alive(dead: int) -> None:
    """Goal: no commit gives a node to a number without a domain.  Method: a transaction gives one to 3, takes one of 4;
    one of the domains dies before the commit: 5 has nothing to do with it."""
    alive = {0, 3, 4, 5}
    store = Store(exists=alive.__contains__)
    control = store.connect(Domid(0))
    for path, owner in (("/x", 4), ("/y", 0), ("/z", 5)):
        control.write(path, b"")
        control.set_perms(path, [Perm(Domid(owner), Access.NONE)])
    tx = control.transaction_start()
    control.set_perms("/y", [Perm(Domid(3), Access.NONE)], tx)
    control.rm("/x", tx)
    alive.remove(dead)
    if dead == 5:
        control.transaction_end(tx, True)
        assert control.get_perms("/y") == [Perm(Domid(3), Access.NONE)] and control.directory("/") == ["tool", "y", "z"]
        return
    with pytest.raises(XsError, match="has died") as caught:
        control.transaction_end(tx, True)
    assert caught.value.errno is XsErrno.ENOMEM
    assert control.get_perms("/y") == [Perm(Domid(0), Access.NONE)] and store.open_transactions == 0


@pytest.mark.parametrize("text", ["n0", "r1", "w65535", "b32751"])
def test_permission_text_goes_both_ways(text: str) -> None:
    assert str(Perm.parse(text)) == text


@pytest.mark.parametrize("text", ["", "n", "0", "N0", "x1", "n-1", "n 1", "n1 ", "n65536", "n٣", "nn1", "n123456"])
def test_bad_permission_text_is_EINVAL(text: str) -> None:
    with pytest.raises(XsError) as caught:
        Perm.parse(text)
    assert caught.value.errno is XsErrno.EINVAL


@pytest.mark.parametrize("domids", [[], [-1], [0, 65536], [0, 1, -1]])
def test_bad_lists_are_EINVAL(domids: list[int]) -> None:
    with pytest.raises(XsError) as caught:
        check_perms([Perm(Domid(domid), Access.READ) for domid in domids])
    assert caught.value.errno is XsErrno.EINVAL
