"""Goal: no name that xenstored refuses gets in, and what gets in has one canonical form.
Method: tables of names as domain 5 would send them."""

from __future__ import annotations

import pytest

from xenmodel.types import Domid
from xenmodel.xenstore import path as paths
from xenmodel.xenstore.errors import XsErrno, XsError

ME = Domid(5)
HOME = "/local/domain/5"


@pytest.mark.parametrize(
    ("sent", "means"),
    [
        ("/", "/"),
        ("/a-B_9@/x", "/a-B_9@/x"),
        ("device/vbd", f"{HOME}/device/vbd"),
        ("@releaseDomain", "@releaseDomain"),
        ("@anything/7", "@anything/7"),
        ("/" + "a" * 3071, "/" + "a" * 3071),
        ("a" * 2048, f"{HOME}/{'a' * 2048}"),
    ],
)
def test_good_names(sent: str, means: str) -> None:
    assert paths.canonical(sent, ME, special=True) == means


@pytest.mark.parametrize(
    "sent",
    [
        "",
        ".",
        "..",
        "a.b",
        "a b",
        "/a\0",
        "/a\n",
        "/ä",
        "/\udc80",
        "//",
        "/a//b",
        "/a/",
        "a/",
        "@x/",
        "@x//y",
        "/local/domain/",
        "/" + "a" * 3072,
        "a" * 2049,
        "@releaseDomain",
        "@x",
    ],
)
def test_bad_names_are_EINVAL(sent: str) -> None:
    with pytest.raises(XsError, match="is not a path") as caught:
        paths.canonical(sent, ME)
    assert caught.value.errno is XsErrno.EINVAL
    assert len(str(caught.value)) < 200, "a message must not repeat all a hostile caller sent"


@pytest.mark.parametrize(
    ("sent", "fits"),
    [
        ("/local/domain/7/" + "a" * 10, True),
        ("/local/domain/7/" + "a" * 11, False),
        ("a" * 10, True),
        ("a" * 11, False),
        ("/" + "a" * 9, True),
        ("/" + "a" * 10, False),
        ("/local/domain/123456/a", False),
    ],
)
def test_the_quota_does_not_count_a_domains_own_prefix(sent: str, fits: bool) -> None:
    if fits:
        assert paths.canonical(sent, ME, path_max=10).endswith(sent)
    else:
        with pytest.raises(XsError, match="too long"):
            paths.canonical(sent, ME, path_max=10)


@pytest.mark.parametrize(
    ("path", "above", "name", "line"),
    [
        ("/a/b", "/a", "b", ["/a/b", "/a", "/"]),
        ("/a", "/", "a", ["/a", "/"]),
        ("/", "/", "", ["/"]),
        ("@x", "/", "@x", ["@x"]),
        ("@x/5", "@x", "5", ["@x/5"]),
    ],
)
def test_parts_of_a_path(path: str, above: str, name: str, line: list[str]) -> None:
    assert (paths.parent(path), paths.name_of(path), list(paths.lineage(path))) == (above, name, line)
    if path not in ("/", "@x", "@x/5"):
        assert paths.child(above, name) == path
