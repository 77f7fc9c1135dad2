"""Goal: a store's text is what xenstore-ls prints, whatever the bytes, and nothing else is taken for it.
Method: lines of a real Xen, hypothesis for the round trip, and a table of lines that are wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenmodel.types import Domid
from xenmodel.xenstore.dump import HEADER, LINE_MAX, DumpError, Entry, format_node, parse
from xenmodel.xenstore.perms import Access, Perm


def perms(text: str) -> tuple[Perm, ...]:
    return tuple(Perm.parse(each) for each in text.split(","))


# Xen 4.17.7: xenstore-ls -fp while a guest with a disk ran.
FROM_XEN = """\
/tool = ""   (n0)
/local/domain/0/name = "Domain-0"   (n0)
/local/domain/0/backend/vbd/1/51712/frontend = "/local/domain/1/device/vbd/51712"   (n0,r1)
/local/domain/0/backend/vbd/1/51712/physical-device = "fe:10"   (n0,r1)
/local/domain/1/control/shutdown = ""   (n1)
/local/domain/1/device/vbd/51712/state = "4"   (n1,r0)
"""


def test_lines_of_a_real_xen():
    """Goal: what xenstore-ls -fp prints is understood, and written the same way.  Method: lines of a real one."""
    entries = list(parse(FROM_XEN.splitlines(keepends=True)))
    assert entries[0] == Entry("/tool", b"", perms("n0"))
    assert entries[2].value == b"/local/domain/1/device/vbd/51712"
    assert [entry.perms for entry in entries[3:]] == [perms("n0,r1"), perms("n1"), perms("n1,r0")]
    assert "".join(f"{format_node(*entry)}\n" for entry in entries) == FROM_XEN


VALUES = {
    "plain": (b"a b~", "a b~"),
    "short escapes": (b"\t\n\r\\", r"\t\n\r\\"),
    "below eight they are octal": (b"\0\1\7", r"\000\001\007"),
    "above they are hexadecimal": (b"\x08\x0b\x1f\x7f\x80\xff", r"\x08\x0b\x1f\x7f\x80\xff"),
    "an escape ends where it ends": (b"\0001\x0bb", r"\0001\x0bb"),
    "quotes are not escaped": (b'"a" = "b"', '"a" = "b"'),
    "the end of a line within a value": (b'x"   (n7)', 'x"   (n7)'),
}


@pytest.mark.parametrize(("value", "text"), VALUES.values(), ids=VALUES)
def test_values(value, text):
    """Goal: each byte is written as xenstore-ls writes it, and read back.  Method: a table."""
    line = f'/a = "{text}"   (n0,r1)'
    assert format_node("/a", value, perms("n0,r1")) == line
    assert list(parse([line])) == [Entry("/a", value, perms("n0,r1"))]


def test_escapes_that_only_people_write():
    """Goal: a byte may be escaped though it need not be, in capitals, too.  Method: three ways to write a letter."""
    assert next(parse([r'/a = "\x4A\x4a\112"   (n0)'])).value == b"JJJ"


NAMES = st.text("abzAZ09-_@", min_size=1, max_size=5)
PATHS = st.one_of(
    st.just("/"),
    st.lists(NAMES, min_size=1, max_size=4).map(lambda names: "/" + "/".join(names)),
)
PERM = st.builds(Perm, st.integers(0, 0xFFFF).map(Domid), st.sampled_from(Access))
PERMS = st.lists(PERM, min_size=1, max_size=6).map(tuple)
NODES = st.builds(Entry, PATHS, st.binary(max_size=300) | st.text('"\\ ()n0,=').map(str.encode), PERMS)
SPECIALS = st.builds(Entry, NAMES.map("@{}".format), st.none(), PERMS)


@given(st.lists(NODES | SPECIALS, unique_by=lambda entry: entry.path), st.booleans())
def test_round_trip(entries, ended):
    """Goal: parse() undoes format_node(), with line ends or without.  Method: any nodes, after the header."""
    end = "\n" if ended else ""
    lines = [f"{line}{end}" for line in (HEADER, "", "# note", *(format_node(*entry) for entry in entries))]
    assert all(line.isascii() and line.rstrip("\n").isprintable() for line in lines)
    assert list(parse(lines)) == entries


def test_every_byte():
    """Goal: no byte is forgotten.  Method: all 256 after one another, and each before each digit."""
    for value in (bytes(range(256)), b"".join(bytes((byte, digit)) for byte in range(256) for digit in b"07fx")):
        assert next(parse([format_node("/a", value, perms("n0"))])).value == value


WRONG = [
    ("tool", "does not begin with an absolute path: a node is a line /PATH ="),
    (' backend = ""   (n0)', "does not begin with an absolute path"),
    ('local/domain = ""   (n0)', "does not begin with an absolute path"),
    ("  (n0)", "does not begin with an absolute path"),
    ("/tool", "has no value: a node is a line"),
    ("/tool:", "not allowed to read it"),
    ('/tool = ""', "permissions such as   (n0,r1): `xenstore-ls -fp`, not -f"),
    ('/tool = "', "closing quote"),
    ('/tool = ""  (n0)', "closing quote"),
    ('/tool = ""   (n0', "has to end in permissions"),
    ('/tool = ""   (n0) ', "has to end in permissions"),
    ('/tool = ""   (n0)\r', "has to end in permissions"),
    ('/tool = ""   ()', "'' is not a permission"),
    ('/tool = ""   (n0,)', "'' is not a permission"),
    ('/tool = ""   (n0, r1)', "' r1' is not a permission"),
    ('/tool = ""   (x0)', "'x0' is not a permission"),
    ('/tool = ""   (n70000)', "'n70000' is not a permission"),
    ('/to ol = ""   (n0)', "'/to ol' is not a path"),
    ('/a//b = ""   (n0)', "a doubled slash"),
    ('/a/ = ""   (n0)', "ends in a slash"),
    ('/a.b = ""   (n0)', "a character outside"),
    (f'/{"a" * 3072} = ""   (n0)', "too long"),
    (r'/a = "\q"   (n0)', r"'\\q' in the value is no escape: there are \t \n \r \\ \xHH \OOO"),
    (r'/a = "x\x1"   (n0)', "no escape"),
    (r'/a = "\400"   (n0)', "no escape"),
    (r'/a = "\08"   (n0)', "no escape"),
    ('/a = "x\\"   (n0)', "no escape"),
    ('/a = "\t"   (n0)', r"'\t' in the value has to be written \t"),
    ('/a = "ä"   (n0)', r"'\xe4' in the value has to be written \xc3\xa4"),
    ('/a = "\udcff"   (n0)', r"'\udcff' in the value has to be written \xff"),
    ('/a = "\0"   (n0)', r"'\x00' in the value has to be written \000"),
    ('@releaseDomain = ""   (n0)', "special node is a line @NAME"),
    ("@releaseDomain", "special node is a line @NAME"),
    ("@release Domain   (n0)", "is not a path"),
    ("@releaseDomain   (r1", "has to end in permissions"),
    ('/a = "' + "x" * LINE_MAX, "as no node needs"),
    ("#" * (LINE_MAX + 1), "as no node needs"),
]


@pytest.mark.parametrize(("line", "says"), WRONG, ids=[repr(line[:30]) for line, _ in WRONG])
def test_wrong_lines(line, says):
    """Goal: an error names the line and what would be right, and does not repeat all of a long one.
    Method: a good line, then the bad one."""
    lines = iter(['/good = ""   (n0)\n', f"{line}\n"])
    entries = parse(lines)
    assert next(entries).path == "/good"
    with pytest.raises(DumpError) as caught:
        next(entries)
    assert caught.value.line == 2
    assert str(caught.value).startswith("line 2: ") and says in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_path_twice():
    """Goal: a node is in a dump once.  Method: the same path with other values; the error names the first line."""
    with pytest.raises(DumpError, match="line 3: /a is in line 1 already"):
        list(parse(['/a = "1"   (n0)', "", '/a = "2"   (n0)']))


def test_versions():
    """Goal: another version of the format is refused, another comment is not.  Method: first lines."""
    for first in (HEADER, f"{HEADER}\n", "# xenfs store dump", "# 2 nodes"):
        assert list(parse([first, '/a = ""   (n0)'])) == [Entry("/a", b"", perms("n0"))]
    with pytest.raises(DumpError, match="line 1: this is version 2 of the format"):
        list(parse(["# xenfs store dump 2", "@"]))
