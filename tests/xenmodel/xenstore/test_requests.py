"""Goal: each request answers as C xenstored 4.17 does, errors by name.
Method: a table of scripts (see the package's docstring), each in a fresh store with two guests."""

from __future__ import annotations

import pytest

from tests.xenmodel.xenstore import run
from xenmodel.types import Domid
from xenmodel.xenstore.errors import XsErrno, XsError
from xenmodel.xenstore.perms import Access, Perm
from xenmodel.xenstore.store import Store

SCRIPTS = {
    "write makes parents with empty values": """
        0 write /a/b/c hello
        0 read /a/b/c -> hello
        0 read /a/b -> ""
        0 read /a -> ""
        0 ls /a -> b
        0 perms /a/b/c -> n0
    """,
    "a new store has what the daemon makes": """
        0 ls / -> tool local
        0 read /tool/xenstored -> ""
        0 perms / -> n0
        0 perms @releaseDomain -> n0
        0 perms @introduceDomain -> n0
    """,
    "children are listed in the order of their creation": """
        0 write /d/zz 1
        0 write /d/aa 1
        0 write /d/mm 1
        0 write /d/zz 2
        0 rm /d/aa
        0 write /d/aa 1
        0 ls /d -> zz mm aa
        0 ls /d/zz -> nothing
    """,
    "mkdir leaves a value alone": """
        0 write /a 1
        0 mkdir /a
        0 read /a -> 1
        0 mkdir /a/b
        0 read /a -> 1
        0 read /a/b -> ""
    """,
    "rm": """
        0 write /a/b/c 1
        0 rm /a/x
        0 rm /a/x/y -> ENOENT
        0 rm / -> EINVAL
        0 rm /a
        0 read /a/b/c -> ENOENT
        0 ls / -> tool local
    """,
    "missing nodes": """
        0 read /no -> ENOENT
        0 ls /no -> ENOENT
        0 perms /no -> ENOENT
        0 chmod /no n0 -> ENOENT
        0 perms @no -> ENOENT
    """,
    "special nodes only have permissions": """
        0 read @releaseDomain -> EINVAL
        0 write @releaseDomain 1 -> EINVAL
        0 ls @releaseDomain -> EINVAL
        0 rm @releaseDomain -> EINVAL
        0 mkdir @x -> EINVAL
        1 perms @releaseDomain -> EACCES
        0 chmod @releaseDomain n0 r1
        1 perms @releaseDomain -> n0 r1
        1 chmod @releaseDomain n0 -> EACCES
    """,
    "relative paths start at home": """
        1 write data/x 7
        0 read /local/domain/1/data/x -> 7
        1 read /local/domain/1/data/x -> 7
        0 write x 1
        0 read /local/domain/0/x -> 1
        1 ls . -> EINVAL
    """,
    "what a guest may not do": """
        0 write /local/domain/0/name Domain-0
        0 write /local/domain/1/name g
        0 write /local/domain/1/memory/target 1
        0 write /local/domain/1/device ""
        1 write /local/domain/0/x 1 -> EACCES
        1 write name evil -> EACCES
        1 write device/new 1 -> EACCES
        1 write memory/target 1 -> EACCES
        1 write new 1 -> EACCES
        1 rm device -> EACCES
        1 ls / -> EACCES
        1 ls /local/domain -> EACCES
        1 rm / -> EACCES
        1 read name -> g
        1 write data/x 1
        2 read /local/domain/1/data/x -> EACCES
        2 read /local/domain/1/data/nothing -> EACCES
        2 read /local/domain/1/nothing -> EACCES
        1 read nothing -> ENOENT
        1 write nothing 1 -> EACCES
        1 rm nothing -> EACCES
    """,
    "a guest owns what it makes, everything else is inherited": """
        0 mkdir /shared
        0 chmod /shared n0 b1 r2
        1 write /shared/x/y 1
        0 perms /shared/x/y -> n1 b1 r2
        0 perms /shared/x -> n1 b1 r2
        2 read /shared/x/y -> 1
        2 write /shared/x/y 2 -> EACCES
        0 write /shared/z 1
        0 perms /shared/z -> n0 b1 r2
        1 write /shared/z 2
        1 chmod /shared/z n0 -> EACCES
        2 write /shared/z 2 -> EACCES
    """,
    "the first entry is everybody else's": """
        0 write /open 1
        0 chmod /open r0
        1 read /open -> 1
        1 write /open 2 -> EACCES
        0 chmod /open b0 n1
        1 read /open -> EACCES
        2 write /open 3
        0 chmod /open w0
        2 write /open 4
        2 read /open -> EACCES
        0 read /open -> 4
    """,
    "the first entry naming a domain decides": """
        0 write /x 1
        0 chmod /x n0 n1 b1
        1 read /x -> EACCES
    """,
    "only the control domain changes the owner": """
        1 write data/x 1
        1 chmod data/x r1
        2 read /local/domain/1/data/x -> 1
        1 chmod data/x n1 r2
        0 perms /local/domain/1/data/x -> n1 r2
        1 chmod data/x n2 -> EPERM
        1 chmod data/x n0 -> EPERM
        0 chmod /local/domain/1/data/x n2
        1 chmod data/x n1 -> EACCES
        0 chmod /x -> EINVAL
        0 chmod /local/domain/1/data/x q2 -> EINVAL
        0 chmod /local/domain/1/data/x n70000 -> EINVAL
    """,
    "privileges end where the node ends": """
        0 write /a/b/c 1
        0 chmod /a/b/c r0
        1 read /a/b/c -> 1
        1 read /a/b -> EACCES
        1 read /a/b/c/d -> ENOENT
        1 read /a/x -> EACCES
    """,
    "an owner may remove what others made below": """
        1 mkdir data/x
        0 write /local/domain/1/data/x/zero 1
        0 perms /local/domain/1/data/x/zero -> n1
        0 chmod /local/domain/1/data/x/zero n0
        1 rm data/x/zero -> EACCES
        1 rm data/x
        0 read /local/domain/1/data/x/zero -> ENOENT
    """,
    "domains": """
        0 introduced 0 -> yes
        0 introduced 1 -> no
        0 introduce 1
        0 introduced 1 -> yes
        1 introduced 1 -> EACCES
        0 introduce 0
        0 introduce 32752 -> EINVAL
        0 release 1
        0 introduced 1 -> no
    """,
    "a closed connection answers EIO": """
        1 start t
        1 watch data tok
        1 close
        1 close
        1 read data -> EIO
        1.t read data -> EIO
        1 commit t -> EIO
        1 start u -> EIO
        1 watch data x -> EIO
        1 unwatch data tok -> EIO
        1 reset -> EIO
        1 events -> none
        0 usage 1 -> 1 0 0
        1b read data -> ""
    """,
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_requests(script: str) -> None:
    run(script)


def test_values_are_any_bytes_that_a_message_can_carry() -> None:
    store = Store()
    control = store.connect(Domid(0))
    for value in (b"", b"\0\xff\n", b"x" * (4096 - len("/v") - 1)):
        control.write("/v", value)
        assert control.read("/v") == value
    with pytest.raises(XsError) as caught:
        control.write("/v", b"x" * (4096 - len("/v")))
    assert caught.value.errno is XsErrno.E2BIG
    assert control.read("/v") == value


def test_directory_part_pages_through_a_list_of_any_length() -> None:
    control = Store().connect(Domid(0))
    names = [f"child-{number}" for number in range(2000)]
    for name in names:
        control.write(f"/d/{name}", b"")
    whole, generations = b"", set()
    while not whole.endswith(b"\0\0"):
        generation, chunk = control.directory_part("/d", len(whole))
        assert 0 < len(str(generation)) + 1 + len(chunk) <= 4096
        assert chunk.endswith(b"\0") and len(chunk) > 1
        whole += chunk
        generations.add(generation)
    assert whole == b"".join(name.encode() + b"\0" for name in names) + b"\0"
    assert len(generations) == 1
    control.write("/d/one-more", b"")
    assert control.directory_part("/d", 0)[0] not in generations


@pytest.mark.parametrize(("offset", "chunk"), [(0, b"a\0bc\0\0"), (1, b"\0bc\0\0"), (2, b"bc\0\0"), (5, b"\0"), (99, b"\0")])
def test_directory_part_offsets(offset: int, chunk: bytes) -> None:
    control = Store().connect(Domid(0))
    control.mkdir("/d/a")
    control.mkdir("/d/bc")
    assert control.directory_part("/d", offset)[1] == chunk


@pytest.mark.parametrize("spare", range(-3, 4))
def test_directory_part_at_the_edge_of_a_message(spare: int) -> None:
    """Goal: whole names, and never a message over 4096 bytes, where list and message end together.
    Method: one name fills the message up to the last few bytes, a second one follows."""
    store = Store()
    control = store.connect(Domid(0))
    while store.tree.generation < 1000:  # generations of equal length from here on
        control.write("/tick", b"")
    first = "a" * 2000
    second = "b" * (4096 - 5 - 2001 - 1 - 1 + spare)
    control.mkdir(f"/d/{first}")
    control.mkdir(f"/d/{second}")
    generation, chunk = control.directory_part("/d", 0)
    assert len(str(generation)) == 4
    whole = f"{first}\0{second}\0\0".encode()
    if spare <= 0:
        assert chunk == whole
    else:
        assert chunk == f"{first}\0".encode()
        assert control.directory_part("/d", len(chunk))[1] == f"{second}\0\0".encode()


def test_negative_offset_is_EINVAL() -> None:
    with pytest.raises(XsError) as caught:
        Store().connect(Domid(0)).directory_part("/", -1)
    assert caught.value.errno is XsErrno.EINVAL


def test_dump_is_the_tree_in_order() -> None:
    world = run("0 write /b/y 1\n0 write /a 2\n0 write /b/x 3\n0 chmod /a r0 b1")
    rows = list(world.store.dump())
    assert [path for path, _, _ in rows] == [
        "/",
        "/tool",
        "/tool/xenstored",
        "/local",
        "/local/domain",
        "/local/domain/1",
        "/local/domain/1/data",
        "/local/domain/2",
        "/local/domain/2/data",
        "/b",
        "/b/y",
        "/b/x",
        "/a",
    ]
    assert rows[-1] == ("/a", b"2", [Perm(Domid(0), Access.READ), Perm(Domid(1), Access.BOTH)])


def test_dump_survives_removals_meanwhile() -> None:
    world = run("0 write /b/y/z 1\n0 write /c 2")
    seen = []
    for path, _, _ in world.store.dump():
        seen.append(path)
        if path == "/b":
            world.run("0 rm /b/y")
    assert seen[-2:] == ["/b", "/c"]


def test_domain_paths() -> None:
    assert Store().connect(Domid(3)).get_domain_path(Domid(12)) == "/local/domain/12"


def test_errors_are_sentences() -> None:
    error = XsError(XsErrno.ENOENT, "/x does not exist")
    assert str(error) == "ENOENT: /x does not exist"
    assert (error.errno.value, error.what) == ("ENOENT", "/x does not exist")
