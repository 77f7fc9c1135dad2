r"""dump.py: a store as text, one line per node, as `xenstore-ls -fp` prints it (tools/xs-clients/xenstore_client.c).

    # xenfs store dump 1
    /local/domain/1/name = "guest1"   (n0,r1)
    @releaseDomain   (n0,r3)

A line is a path, blank, `=`, blank, the value in quotes, three blanks, the permissions. In the value every byte but
0x20..0x7e is escaped, and so is the backslash: \t \n \r \\, three octal digits below 8 (\000), and \x with two hex digits
otherwise; a quote is not. That is unambiguous: no path has a blank, and the permissions are what follows the last
`"   (`. xenstore-ls prints neither the node it starts from nor the special nodes; both are lines here. A special node has
no value. Lines that begin with # and empty lines mean nothing, but a first line that gives another version of the
format is an error.

Used by upkeep.py for a live update and by xenfs/storecmd.py. Pure: the lines come from and go to the caller.
Invariant: parse() undoes format_node() for any canonical path, value and permissions; it yields each path at most once,
and keeps no more than the paths.
Left out: what xenstore-ls prints without -f or without -p, which says less than a node has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from xenmodel.types import Domid
from xenmodel.xenstore import path as paths
from xenmodel.xenstore.errors import XsError, shown
from xenmodel.xenstore.perms import Perm

VERSION = 1
HEADER = f"# xenfs store dump {VERSION}"
LINE_MAX = 32 * 1024  # characters: 3072 of a path, 4096 bytes of a value four each, 4096 of permissions, and some

_HEADER = re.compile(r"# xenfs store dump (\d{1,9})\b")
_FORM = 'a node is a line /PATH = "VALUE"   (PERMISSIONS), as `xenstore-ls -fp` prints it'
_EXAMPLE = "permissions such as   (n0,r1)"

_SHORT = {"\t": "t", "\n": "n", "\r": "r", "\\": "\\"}
_LONG = {short: char for char, short in _SHORT.items()}


def _escape(byte: int) -> str:
    char = chr(byte)
    if char in _SHORT:
        return f"\\{_SHORT[char]}"
    if " " <= char <= "~":
        return char
    return f"\\{byte:03o}" if byte < 8 else f"\\x{byte:02x}"


_ESCAPED = tuple(_escape(byte) for byte in range(256))
_PIECE = re.compile(r"([ -\[\]-~]+)|\\(?:([tnr\\])|x([0-9A-Fa-f]{2})|([0-3][0-7]{2}))")


class DumpError(Exception):
    """A line is not of the format."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(line, what)
        self.line = line
        self.what = what

    def __str__(self) -> str:
        return f"line {self.line}: {self.what}"


class Entry(NamedTuple):
    """One node. `value` is None for a special one, which has permissions only."""

    path: str
    value: bytes | None
    perms: tuple[Perm, ...]


def format_node(path: str, value: bytes | None, perms: Sequence[Perm]) -> str:
    """The node's line, without its end."""
    assert (value is None) == paths.is_special(path), f"{path} with the value {value!r}"
    listed = ",".join(map(str, perms))
    if value is None:
        return f"{path}   ({listed})"
    return f'{path} = "{"".join([_ESCAPED[byte] for byte in value])}"   ({listed})'


def parse(lines: Iterable[str]) -> Iterator[Entry]:
    """The nodes of a dump in the order of its lines. DumpError at the first line that is wrong."""
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.removesuffix("\n")
        try:
            if len(text) > LINE_MAX:
                raise _WrongLine(f"it has more than {LINE_MAX} characters, as no node needs")
            if number == 1:
                _check_version(text)
            if not text or text.startswith("#"):
                continue
            entry = _entry(text)
            if entry.path in seen:
                raise _WrongLine(f"{entry.path} is in line {seen[entry.path]} already")
        except _WrongLine as wrong:
            raise DumpError(number, str(wrong)) from None
        seen[entry.path] = number
        yield entry


class _WrongLine(Exception):
    """What is wrong, before parse() adds where."""


def _check_version(text: str) -> None:
    match = _HEADER.match(text)
    if match is not None and int(match[1]) != VERSION:
        raise _WrongLine(f"this is version {match[1]} of the format, only {VERSION} is known here")


def _entry(text: str) -> Entry:
    if text.startswith("@"):
        path, found, listed = text.partition("   (")
        if not found or " = " in path:
            raise _WrongLine(f"a special node is a line @NAME, then {_EXAMPLE}, without a value")
        return Entry(_path(path), None, _perms(listed))
    path, found, rest = text.partition(' = "')
    if not found or not path.startswith("/"):
        raise _WrongLine(_why_no_node(text))
    quoted, found, listed = rest.rpartition('"   (')
    if not found:
        raise _WrongLine(f"after the value's closing quote there have to be {_EXAMPLE}: `xenstore-ls -fp`, not -f")
    return Entry(_path(path), _value(quoted), _perms(listed))


def _why_no_node(text: str) -> str:
    if text.startswith("/") and text.endswith(":") and " " not in text:
        return f"{shown(text[:-1])} has no value, whoever made this was not allowed to read it: make it as domain 0"
    if not text.startswith("/"):
        return f"{shown(text)} does not begin with an absolute path: {_FORM}"
    return f"{shown(text)} has no value: {_FORM}"


def _path(text: str) -> str:
    try:
        return paths.canonical(text, Domid(0), special=True)
    except XsError as error:
        raise _WrongLine(error.what) from None


def _perms(listed: str) -> tuple[Perm, ...]:
    if not listed.endswith(")"):
        raise _WrongLine(f"the line has to end in {_EXAMPLE}")
    try:
        return tuple(Perm.parse(text) for text in listed[:-1].split(","))
    except XsError as error:
        raise _WrongLine(error.what) from None


def _value(quoted: str) -> bytes:
    if "\\" not in quoted and quoted.isascii() and quoted.isprintable():
        return quoted.encode("ascii")
    value = bytearray()
    at = 0
    while at < len(quoted):
        match = _PIECE.match(quoted, at)
        if match is None:
            raise _WrongLine(_why_no_value(quoted, at))
        plain, short, digits, octal = match.groups()
        if plain:
            value += plain.encode("ascii")
        elif short:
            value += _LONG[short].encode("ascii")
        else:
            value.append(int(digits, 16) if digits else int(octal, 8))
        at = match.end()
    return bytes(value)


def _why_no_value(quoted: str, at: int) -> str:
    if quoted[at] == "\\":
        return rf"{quoted[at : at + 4]!a} in the value is no escape: there are \t \n \r \\ \xHH \OOO"
    written = "".join(_ESCAPED[byte] for byte in quoted[at].encode("utf-8", "surrogateescape"))
    return f"{quoted[at]!a} in the value has to be written {written}"
