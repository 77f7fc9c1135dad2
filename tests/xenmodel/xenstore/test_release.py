"""Goal: a dead domain leaves nothing: no node, no permission, no watch, no count; its number may be used again.
Method: a table of scripts in which domain 1 dies and another one takes its number; then many lives of one number."""

from __future__ import annotations

import pytest

from tests.xenmodel.xenstore import World, run
from xenmodel.types import Domid
from xenmodel.xenstore.errors import XsErrno, XsError
from xenmodel.xenstore.perms import Access, Perm, granted
from xenmodel.xenstore.quota import Quota
from xenmodel.xenstore.store import Store

RELEASES = {
    "its nodes go, with what lies below": """
        1 write data/a/b 1
        0 write /elsewhere/x/y 1
        0 chmod /elsewhere/x n1
        0 watch /elsewhere e
        0 watch /local/domain/1/data/a/b b
        0 events -> /elsewhere:e /local/domain/1/data/a/b:b
        0 release 1
        0 ls /local/domain/1 -> nothing
        0 ls /elsewhere -> nothing
        0 usage 1 -> 0 0 0
        0 events -> /local/domain/1/data/a/b:b /elsewhere/x:e
        1 read data -> EIO
    """,
    "its nodes go in the order of a walk through the tree, each once": """
        0 mkdir /z
        0 write /b/y/deep 1
        0 write /b/a 1
        0 chmod /b/y n1
        0 chmod /b/y/deep n1
        0 chmod /b/a n1
        0 write /a/x 1
        0 chmod /a n1
        0 chmod /z n1
        0 chmod / b1
        0 chmod @releaseDomain r1
        0 watch / tok
        0 watch @releaseDomain out
        0 watch /b/y/deep deep
        0 events -> /:tok @releaseDomain:out /b/y/deep:deep
        0 release 1
        0 events -> /:tok /local/domain/1/data:tok /z:tok /b/y/deep:deep /b/y:tok /b/a:tok /a:tok @releaseDomain:out
        0 ls / -> tool local b
        0 perms / -> n0
    """,
    "permissions do not pass to a new domain of that number": """
        0 write /x 1
        0 chmod /x r0 b1 b2
        0 write /y 1
        0 chmod /y n0 b1
        0 release 1
        0 perms /x -> r0 b2
        0 introduce 1
        1b write /x 1 -> EACCES
        1b read /y -> EACCES
        1b read /x -> 1
        0 write /x 2
        1b write /x 1 -> EACCES
        0 write /x/child 2
        0 perms /x/child -> r0 b2
        0 write /y/child 2
        1b read /y/child -> EACCES
        0 chmod /y n0 b1
        1b write /y 3
    """,
    "nor through a transaction": """
        0 write /x 1
        0 chmod /x n0 b1
        0 start t
        0.t write /y/z 1
        0.t chmod /y n1
        0.t chmod /y/z n0 b1
        0 release 1
        0.t perms /x -> n0
        0 commit t
        0 perms /y -> n0
        0 perms /y/z -> n0
        1b read /y -> EACCES
        0 usage 1 -> 0 0 0
        0 release 1
        0 read /y/z -> 1
    """,
    "nor through special nodes": """
        0 chmod @releaseDomain n0 r1
        0 chmod @introduceDomain n1
        0 release 1
        0 perms @releaseDomain -> n0
        0 perms @introduceDomain -> n0
        1b watch @releaseDomain tok
        1b events -> @releaseDomain:tok
        0 release 2
        1b events -> none
    """,
    "the root stays": """
        0 chmod / b1
        0 release 1
        0 perms / -> n0
        0 read /tool/xenstored -> ""
    """,
    "an open transaction is undone": """
        1 start t
        1.t write data/x 1
        1 watch data tok
        0 release 1
        0 release 1
        0 usage 1 -> 0 0 0
        1 commit t -> EIO
    """,
    "others' transactions see what they looked at to the end": """
        1 write data/x 1
        0 start t
        0.t read /local/domain/1/data/x -> 1
        0 release 1
        0.t read /local/domain/1/data/x -> 1
        0.t read /local/domain/1/data -> ENOENT
        0.t rm /local/domain/1/data/x
        0 commit t -> EAGAIN
    """,
    "the control domain's nodes stay": """
        0 write /x 1
        0 release 0
        0b read /x -> 1
        0b introduced 0 -> yes
    """,
}


@pytest.mark.parametrize("script", RELEASES.values(), ids=RELEASES.keys())
def test_release(script: str) -> None:
    run(script)


@pytest.mark.parametrize("domid", [-1, 0x7FF0, 65535])
def test_numbers_of_no_domain(domid: int) -> None:
    store = Store()
    for request in (store.connect, store.introduce, store.release, store.shutdown):
        with pytest.raises(XsError) as caught:
            request(Domid(domid))
        assert caught.value.errno is XsErrno.EINVAL
    with pytest.raises(XsError):
        store.connect(Domid(0)).set_perms("/", [Perm(Domid(-1), Access.NONE)])


def test_numbers_reused_many_times_start_from_nothing() -> None:
    """Goal: XSA-483: no count survives its domain.
    Method: the same domid lives and dies often, each time up to its limit and with everything left open."""
    world = World(Quota(nodes=2, watches=1, transactions=1))
    control = world.connection("0")
    usages = set()
    for life in range(50):
        control.mkdir("/local/domain/1/data")
        control.set_perms("/local/domain/1/data", [Perm(Domid(1), Access.NONE)])
        world.store.introduce(Domid(1))
        guest = world.store.connect(Domid(1))
        guest.write("data/x", b"%02d" % life)
        guest.watch("data", "t")
        guest.write("data/x", b"", guest.transaction_start())
        usages.add(world.store.usage(Domid(1)))
        world.store.release(Domid(1))
        assert set(world.store.usage(Domid(1))) == {0}
    assert [usage[:5] for usage in usages] == [(2, 1, 1, 1, 0)], "the same, to the byte, in every life"
    assert granted(control.get_perms("/local/domain/1"), Domid(1)) == 0
