"""xlcfg.py: the syntax of xl.cfg(5), from text to settings.

Called by config.py, which knows what the settings mean. The syntax is that of Xen's libxlu_cfg_l.l and libxlu_cfg_y.y; a
later assignment replaces an earlier one, += joins them.

Differences, on purpose: numeric escapes in strings work (xl drops them); a comment may end the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

MAX_LIST_DEPTH = 8
MAX_DOMID_DIGITS = 10  # of a uint32_t


class ConfigError(ValueError):
    """What the author of a file has to change. str() is "FILE:LINE: message"; line 0 is the whole file."""

    def __init__(self, path: str, line: int, message: str) -> None:
        super().__init__(f"{path}:{line}: {message}" if line else f"{path}: {message}")
        self.path, self.line, self.message = path, line, message


class Token(NamedTuple):
    kind: str  # ident, number, string, newline, end, or the mark itself
    text: str
    line: int
    column: int


class Atom(NamedTuple):
    """A string or a number: xl keeps both as text until somebody asks for a number."""

    text: str
    line: int


class List(NamedTuple):
    items: tuple[Value, ...]
    line: int


Value = Atom | List


class Setting(NamedTuple):
    value: Value
    line: int
    added: bool  # by +=, which xl refuses for numbers


_TOKEN = re.compile(
    r"""(?P<blank>[ \t]+)
      | (?P<newline>\n|\#[^\n]*\n?)
      | (?P<ident>[a-z][._0-9a-z]*)
      | (?P<number>[0-9][0-9a-fx]*)
      | (?P<string>'(?:[^'\\\n]|\\.)*+'|"(?:[^"\\\n]|\\.)*+")
      | (?P<mark>\+=|[,\[\]=;])
      | (?P<bad>.)""",
    re.VERBOSE,
)
_NO_TOKEN = {
    '"': "the string is not closed in its line",
    "'": "the string is not closed in its line",
    "\r": "carriage return: lines must end with a newline only",
    "": "unexpected character: strings need quotes, option names are lower case",
}
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|([0-3]?[0-7]{1,2})|([abfnrtv\"'\\]))|(\\)|([^\\]+)")
_ESCAPED = dict(zip("abfnrtv\"'\\", "\a\b\f\n\r\t\v\"'\\", strict=True))


class Parser:
    """Reads one file's text; `path` serves only for messages. ConfigError if it has another syntax."""

    def __init__(self, text: str, path: str) -> None:
        self.path = path
        self.tokens = self._scan(text)
        self.token = next(self.tokens)

    def settings(self) -> dict[str, Setting]:
        settings: dict[str, Setting] = {}
        while self.token.kind != "end":
            if self.token.kind not in ("newline", ";"):
                self._assignment(settings)
                if self.token.kind not in ("newline", ";", "end"):
                    self._fail("a newline or ';' must follow the value")
            self._advance()
        return settings

    def _assignment(self, settings: dict[str, Setting]) -> None:
        name = self.token
        if name.kind != "ident":
            self._fail("an option's name was expected")
        self._advance()
        added = self.token.kind == "+="
        if self.token.kind not in ("=", "+="):
            self._fail(f"'=' was expected after {shown(name.text)}")
        self._advance()
        value = self._value(0)
        old = settings.pop(name.text, None)  # so that the order is that of the last assignments
        if added and old:
            if isinstance(old.value, List) and isinstance(value, List):
                value = List(old.value.items + value.items, value.line)
            elif isinstance(old.value, Atom) and isinstance(value, Atom):
                value = Atom(old.value.text + value.text, value.line)
            else:
                self._fail("+= cannot join a list and a string", name)
        settings[name.text] = Setting(value, name.line, added)

    def _value(self, depth: int) -> Value:
        token = self.token
        if token.kind in ("string", "number"):
            self._advance()
            return Atom(token.text if token.kind == "number" else self._dequoted(token), token.line)
        if token.kind != "[" or depth == MAX_LIST_DEPTH:
            self._fail(f'a value was expected: "string", number or [ list ] (at most {MAX_LIST_DEPTH} deep)')
        self._advance()
        items: list[Value] = []
        while self.token.kind != "]":
            items.append(self._value(depth + 1))
            if self.token.kind == ",":
                self._advance()
            elif self.token.kind != "]":
                self._fail(f"',' or ']' was expected in the list that began in line {token.line}")
        self._advance()
        return List(tuple(items), token.line)

    def _dequoted(self, token: Token) -> str:
        # Through bytes, because "\xc3\xa9" is one letter in a file that is UTF-8.
        raw = bytearray()
        for match in _ESCAPE.finditer(token.text, 1, len(token.text) - 1):
            hexadecimal, octal, letter, stray, plain = match.groups()
            if stray:
                self._fail("unknown escape in a string: write \\\\ for one backslash", token)
            elif plain or letter:
                raw += (plain or _ESCAPED[letter]).encode("utf-8", "surrogatepass")
            else:
                raw.append(int(hexadecimal, 16) if hexadecimal else int(octal, 8))
        if 0 in raw:
            self._fail("a string cannot contain a NUL", token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self._fail("the string is not UTF-8", token)

    def _scan(self, text: str) -> Iterator[Token]:
        line, line_start, open_lists = 1, 0, 0
        for match in _TOKEN.finditer(text):
            kind = match.lastgroup or ""
            token = Token(kind, match[0], line, match.start() - line_start + 1)
            if kind == "newline":
                line, line_start = line + 1, match.end()
            elif kind == "mark":
                token = token._replace(kind=match[0])
                open_lists += {"[": 1, "]": -1}.get(match[0], 0)
            elif kind == "bad":
                self._fail(_NO_TOKEN.get(match[0], _NO_TOKEN[""]), token)
            # Inside a list a newline separates nothing, as blanks never do.
            if kind != "blank" and not (kind == "newline" and open_lists > 0):
                yield token
        yield Token("end", "", line, len(text) - line_start + 1)

    def _advance(self) -> None:
        self.token = next(self.tokens, self.token)

    def _fail(self, message: str, token: Token | None = None) -> NoReturn:
        token = token or self.token
        near = f"the {token.kind}" if token.kind in ("newline", "end") else shown(token.text)
        raise ConfigError(self.path, token.line, f"{message} (column {token.column}, at {near})")


def shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")


def domain(text: str) -> str:
    """What a value names that is a domain's name or number, as libxl__resolve_domid() reads it: digits alone are a domid,
    nothing at all is domain 0. The domid without leading zeros, or the name; whether there is one is not asked here."""
    if text in ("", "Domain-0"):
        return "0"
    number = domid(text)
    return text if number is None else str(number)


def domid(text: str) -> int | None:
    """The number in what domain() returned; None if it is a name."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= MAX_DOMID_DIGITS else None
