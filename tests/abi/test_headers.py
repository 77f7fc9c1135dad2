"""Goal: every number, name and byte offset in xenmodel.public is the one in Xen's own C headers.
Method: per module, compile a program against the installed headers (libxen-dev) and compare what it
prints; then feed the comparison modules that are wrong on purpose and expect each mistake to be named.
"""

from __future__ import annotations

import enum
from pathlib import Path
from struct import Struct
from types import ModuleType

import pytest

from tests.abi.headers import AbiError, differences, public_modules, require_tools, run_c
from xenmodel.public import grant_table
from xenmodel.public.io import xs_wire
from xenmodel.public.layout import CStruct

MODULES = public_modules()


@pytest.mark.parametrize("module", MODULES, ids=[module.__name__ for module in MODULES])
def test_module_agrees_with_its_header(module: ModuleType) -> None:
    """Goal: no module differs from its header.
    Method: the generated program's sizes, offsets and values against ours."""
    assert differences(module) == []


def test_the_walk_finds_modules_in_every_package() -> None:
    """Goal: a comparison of nothing cannot pass.
    Method: one known module per package must be among those walked."""
    names = {module.__name__.removeprefix("xenmodel.public.") for module in MODULES}
    assert {"xen", "grant_table", "hvm.params", "io.blkif", "io.ring", "io.xs_wire"} <= names


def test_grant_status_texts_are_those_of_the_header() -> None:
    """Goal: GNTST_TEXTS is GNTTABOP_error_msgs.
    Method: C prints its array, indexed by -status, in full."""
    said = run_c(
        "xen/grant_table.h",
        [
            "static const char *text[] = GNTTABOP_error_msgs;",
            "for (size_t i = 0; i < sizeof(text) / sizeof(text[0]); i++)",
            r'printf("%d\t%s\n", -(int)i, text[i]);',
        ],
    )
    assert {int(status): text for status, text in said.items()} == grant_table.GNTST_TEXTS


def test_xenstore_errors_are_those_of_the_header_in_order() -> None:
    """Goal: XSD_ERRORS is the header's list, in its order.
    Method: C prints xsd_errors[] with this host's errno numbers."""
    said = run_c(
        "xen/io/xs_wire.h",
        [
            "for (size_t i = 0; i < sizeof(xsd_errors) / sizeof(xsd_errors[0]); i++)",
            r'printf("%zu\t%d %s\n", i, xsd_errors[i].errnum, xsd_errors[i].errstring);',
        ],
    )
    assert list(said.values()) == [f"{number} {name}" for number, name in xs_wire.XSD_ERRORS]


class Mistaken(enum.IntEnum):
    """An enum whose second member has a value the header does not give it."""

    CONTROL = 0
    DIRECTORY = 2


Mistaken.__module__ = "mistaken"

OFFSETS = {"type": 0, "req_id": 4, "tx_id": 8, "len": 12}

MISTAKES: dict[str, tuple[dict[str, object], str]] = {
    "size": ({"STRUCTS": (CStruct("struct xsd_sockmsg", 20, OFFSETS),)}, "ours 20, header 16"),
    "offset": (
        {"STRUCTS": (CStruct("struct xsd_sockmsg", 16, OFFSETS | {"len": 8}),)},
        "len): ours 8, header 12",
    ),
    "no such field": ({"STRUCTS": (CStruct("struct xsd_sockmsg", 16, {"length": 12}),)}, "length"),
    "no such structure": ({"STRUCTS": (CStruct("struct xsd_sockmessage", 16, {}),)}, "xsd_sockmessage"),
    "shrunk": ({"STRUCTS": (CStruct("struct xsd_sockmsg", 20, {}, grows=True),)}, "ours 20, header 16"),
    "in a prologue": (
        {"STRUCTS": (CStruct("struct p", 8, {}, prologue="struct p { char a[9]; };"),)},
        "header 9",
    ),
    "under cflags": (
        {
            "STRUCTS": (
                CStruct("struct p", 16, {}, None, ("-fpack-struct",), "struct p { char a; long b; };"),
            )
        },
        "ours 16, header 9",
    ),
    "packer too short": (
        {"STRUCTS": (CStruct("struct xsd_sockmsg", 16, OFFSETS, Struct("<III")),)},
        "spans 12",
    ),
    "packer misplaced": (
        {"STRUCTS": (CStruct("struct xsd_sockmsg", 16, OFFSETS, Struct("<IIHHI")),)},
        "fields at",
    ),
    "constant": ({"XENSTORE_PAYLOAD_MAX": 4095}, "XENSTORE_PAYLOAD_MAX: ours 4095, header 4096"),
    "no such constant": ({"XENSTORE_PAYLOAD_MIN": 1}, "XENSTORE_PAYLOAD_MIN"),
    "constant there after all": (
        {"XENSTORE_RING_SIZE": 512, "NOT_IN_HEADER": frozenset({"XENSTORE_RING_SIZE"})},
        "XENSTORE_RING_SIZE: ours 512, header 1024",
    ),
    "string": ({"XS_TEXT": "x", "C_STRINGS": ("XS_TEXT",)}, "XS_TEXT"),
    "enum member": ({"Mistaken": Mistaken, "C_NAMES": {"Mistaken": "XS_"}}, "XS_DIRECTORY: ours 2, header 1"),
    "enum without C names": ({"Mistaken": Mistaken}, "no prefix for Mistaken"),
    "no header": ({"CONSTANTS_FROM": "xen/io/no_such.h"}, "no_such.h"),
}


def module_of(**names: object) -> ModuleType:
    """A module for xs_wire.h that defines `names` and otherwise nothing wrong."""
    module = ModuleType("mistaken")
    vars(module).update({"CONSTANTS_FROM": "xen/io/xs_wire.h", "STRUCTS": ()} | names)
    return module


@pytest.mark.parametrize(("names", "complaint"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_named(names: dict[str, object], complaint: str) -> None:
    """Goal: the comparison has teeth.
    Method: modules with one mistake each; the report says what and by how much."""
    found = differences(module_of(**names))
    assert complaint in "\n".join(found)


def test_a_correct_module_has_no_differences() -> None:
    """Goal: the mistakes above are reported because they are mistakes.
    Method: the same structure and constant, right; a layout under other flags; and a name of our own."""
    packed = CStruct("struct p", 9, {"b": 1}, None, ("-fpack-struct",), "struct p { char a; long b; };")
    good = module_of(
        STRUCTS=(CStruct("struct xsd_sockmsg", 16, OFFSETS, Struct("<IIII")), packed),
        XENSTORE_PAYLOAD_MAX=4096,
        OURS=1,
        NOT_IN_HEADER=frozenset({"OURS"}),
    )
    assert differences(good) == []


@pytest.mark.parametrize("name", ["CONSTANTS_FROM", "STRUCTS"])
def test_a_module_must_name_its_header_and_structures(name: str) -> None:
    """Goal: no module escapes the comparison by declaring nothing.
    Method: take one of the two declarations away."""
    module = module_of()
    delattr(module, name)
    assert differences(module) == [f"mistaken does not define {name}"]


def test_missing_tools_are_an_error_that_names_the_package(tmp_path: Path) -> None:
    """Goal: without compiler or headers the check fails instead of passing silently.
    Method: look for a compiler that does not exist, and for headers in an empty directory."""
    with pytest.raises(AbiError, match="apt-get install gcc"):
        require_tools(compiler="no-such-compiler")
    with pytest.raises(AbiError, match="apt-get install libxen-dev"):
        require_tools(include=tmp_path)
    assert "apt-get install libxen-dev" in differences(module_of(), include=tmp_path)[0]


def test_a_layout_cannot_be_changed() -> None:
    """Goal: one test cannot bend a layout under another.
    Method: keep and change the dict it was made from; try to assign to it."""
    offsets = {"a": 0}
    struct = CStruct("struct p", 1, offsets)
    offsets["a"] = 1
    assert struct["a"] == 0
    with pytest.raises(TypeError):
        struct.offsets["a"] = 1  # type: ignore[index]
