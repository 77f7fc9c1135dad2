"""headers.py: asks a C compiler what Xen's own headers say, and lists where a Python module says otherwise.

Used by test_headers.py only. One small C program per module of xenmodel.public (and one more per extra
prologue or set of compiler flags) prints sizeof, offsetof and constant values; what the compiler cannot find
is a difference too.

What a module declares: `CONSTANTS_FROM` (its header), `STRUCTS`, and where needed
- `C_NAMES`: "XsType" -> prefix of its members' C names, "XsType.READ" or "NAME" -> one exact C name;
- `C_STRINGS`: names of strings that the header defines; other strings are not looked at;
- `NOT_IN_HEADER`: C names that are ours, or newer than the oldest headers we build with; they are compared
  only if they are macros that the header has after all.
Left out: types of fields, and a 32-bit compiler: a prologue declares other layouts to the native one.
"""

from __future__ import annotations

import enum
import importlib
import pkgutil
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from struct import Struct, calcsize
from types import ModuleType
from typing import TypeGuard

import xenmodel.public
from xenmodel.public.layout import CStruct

COMPILER = "gcc"
INCLUDE = Path("/usr/include")
NO_HEADER = frozenset({"xenmodel.public.layout"})
TIMEOUT_S = 60

# __XEN_TOOLS__ selects the latest interface version. The Xen headers here are those that all others build on;
# a prologue comes after them, so it changes only the module's own header.
PREAMBLE = """\
#define _GNU_SOURCE 1
#define __XEN_TOOLS__ 1
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <xen/xen.h>
#include <xen/grant_table.h>
#include <xen/event_channel.h>
#include <xen/io/ring.h>
"""


class AbiError(Exception):
    """The comparison cannot be made: no compiler, no headers, or a program that does not compile."""


def require_tools(compiler: str = COMPILER, include: Path = INCLUDE) -> None:
    """Raise AbiError, naming the Debian package, unless there is a compiler and there are headers."""
    if shutil.which(compiler) is None:
        raise AbiError(f"{compiler} is not installed: apt-get install gcc")
    if not (include / "xen/xen.h").is_file():
        raise AbiError(f"no Xen headers in {include}/xen: apt-get install libxen-dev")


def public_modules() -> list[ModuleType]:
    """Every module of xenmodel.public that stands for a header."""
    found = pkgutil.walk_packages(xenmodel.public.__path__, "xenmodel.public.")
    names = [info.name for info in found if not info.ispkg and info.name not in NO_HEADER]
    return [importlib.import_module(name) for name in names]


def differences(module: ModuleType, include: Path = INCLUDE) -> list[str]:
    """Where `module` and its header disagree, one sentence each; empty if nowhere."""
    missing = [name for name in ("CONSTANTS_FROM", "STRUCTS") if not hasattr(module, name)]
    if missing:
        return [f"{module.__name__} does not define {name}" for name in missing]
    structs: tuple[CStruct, ...] = module.STRUCTS
    found = [text for struct in structs for text in packer_differences(struct)]
    numbers, unnamed = constants(module)
    found += unnamed
    groups: dict[tuple[tuple[str, ...], str], list[CStruct]] = {((), ""): []}
    for struct in structs:
        groups.setdefault((struct.cflags, struct.prologue), []).append(struct)
    for (cflags, prologue), members in groups.items():
        plain = (cflags, prologue) == ((), "")
        body = _struct_lines(members)
        if plain:
            body += _constant_lines(numbers, getattr(module, "NOT_IN_HEADER", frozenset()))
            body += _string_lines(getattr(module, "C_STRINGS", ()))
        try:
            said = run_c(module.CONSTANTS_FROM, body, cflags, prologue, include)
        except AbiError as error:
            found.append(str(error))
            continue
        found += _struct_differences(members, said)
        if plain:
            found += _constant_differences(module, numbers, said)
    return found


def constants(module: ModuleType) -> tuple[dict[str, int], list[str]]:
    """C name -> our value, for every public int and IntEnum member; and complaints about unnamed enums."""
    c_names: Mapping[str, str] = getattr(module, "C_NAMES", {})
    numbers: dict[str, int] = {}
    unnamed: list[str] = []
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if type(value) is int:
            numbers[c_names.get(name, name)] = value
        elif _is_own_enum(value, module):
            if name not in c_names:
                unnamed.append(f"{module.__name__}.C_NAMES has no prefix for {name}")
                continue
            for member in value.__members__.values():
                exact = c_names.get(f"{name}.{member.name}", c_names[name] + member.name)
                numbers[exact] = int(member)
    return numbers, unnamed


def packer_differences(struct: CStruct) -> list[str]:
    """Where a structure's packer does not fit its own layout: total size, or where a field starts."""
    if struct.packer is None:
        return []
    found = []
    what = f"{struct.c_name}: packer {struct.packer.format!r}"
    if struct.packer.size != struct.size:
        found.append(f"{what} spans {struct.packer.size}, not {struct.size}")
    starts, listed = _field_starts(struct.packer), sorted(struct.offsets.values())
    if starts != listed:
        found.append(f"{what} has fields at {starts}, not at {listed}")
    return found


def run_c(
    header: str,
    body: Iterable[str],
    cflags: tuple[str, ...] = (),
    prologue: str = "",
    include: Path = INCLUDE,
) -> dict[str, str]:
    """Compile and run `body` as main() after `header`; its output, "key<TAB>value" lines, as a dict."""
    require_tools(COMPILER, include)
    source = "\n".join(
        [PREAMBLE, prologue, f"#include <{header}>", "int main(void) {", *body, "return 0; }", ""]
    )
    with tempfile.TemporaryDirectory(prefix="xenfs-abi-") as scratch:
        program = Path(scratch, "probe")
        command = [COMPILER, "-std=gnu11", "-w", f"-I{include}", *cflags, "-x", "c", "-", "-o", str(program)]
        built = subprocess.run(command, input=source, capture_output=True, text=True, timeout=TIMEOUT_S)
        if built.returncode != 0:
            errors = [line for line in built.stderr.splitlines() if "error:" in line] or [built.stderr]
            raise AbiError(f"<{header}> does not compile with our names: " + "; ".join(errors))
        ran = subprocess.run([str(program)], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    return dict(line.split("\t", 1) for line in ran.stdout.splitlines())


def _is_own_enum(value: object, module: ModuleType) -> TypeGuard[type[enum.IntEnum]]:
    return isinstance(value, type) and issubclass(value, enum.IntEnum) and value.__module__ == module.__name__


def _struct_lines(structs: Iterable[CStruct]) -> list[str]:
    lines = []
    for struct in structs:
        lines.append(_print_number(f"sizeof {struct.c_name}", f"sizeof({struct.c_name})"))
        for field in struct.offsets:
            lines.append(_print_number(f"{struct.c_name}.{field}", f"offsetof({struct.c_name}, {field})"))
    return lines


def _constant_lines(numbers: Mapping[str, int], not_in_header: frozenset[str]) -> list[str]:
    lines = []
    for name in numbers:
        line = _print_number(name, name)
        lines.append(f"#ifdef {name}\n{line}\n#endif" if name in not_in_header else line)
    return lines


def _string_lines(names: Iterable[str]) -> list[str]:
    return [f'printf("%s\\t%s\\n", "{name}", {name});' for name in names]


def _print_number(key: str, expression: str) -> str:
    return f'printf("%s\\t%lld\\n", "{key}", (long long)({expression}));'


def _struct_differences(structs: Iterable[CStruct], said: Mapping[str, str]) -> list[str]:
    found = []
    for struct in structs:
        size = int(said[f"sizeof {struct.c_name}"])
        if not (size == struct.size or (struct.grows and size > struct.size)):
            found.append(f"sizeof({struct.c_name}): ours {struct.size}, header {size}")
        for field, offset in struct.offsets.items():
            theirs = int(said[f"{struct.c_name}.{field}"])
            if theirs != offset:
                found.append(f"offsetof({struct.c_name}, {field}): ours {offset}, header {theirs}")
    return found


def _constant_differences(
    module: ModuleType, numbers: Mapping[str, int], said: Mapping[str, str]
) -> list[str]:
    found = []
    for name, value in numbers.items():
        # Modulo 2**64: the program prints long long, and some masks are unsigned.
        if name in said and (int(said[name]) - value) % 2**64 != 0:
            found.append(f"{name}: ours {value}, header {said[name]}")
    for name in getattr(module, "C_STRINGS", ()):
        if said[name] != getattr(module, name):
            found.append(f"{name}: ours {getattr(module, name)!r}, header {said[name]!r}")
    return found


def _field_starts(packer: Struct) -> list[int]:
    """Offsets of the fields of a "<..." format; a repeat count makes an array, which is one field."""
    order, codes = packer.format[:1], re.findall(r"\d*[a-zA-Z?]", packer.format[1:])
    if order != "<":
        raise AbiError(f"packer {packer.format!r} does not start with '<': its layout would be the host's")
    starts, at = [], 0
    for code in codes:
        if not code.endswith("x"):
            starts.append(at)
        at += calcsize(order + code)
    return starts
