"""Goal: the layers stay layers: imports point downward, and below the host nothing waits, does I/O or keeps global state.
Method: parse every module (nothing is imported) and compare with the rules below; small bad modules show that each bites.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A layer may import itself and what is listed; the longest prefix of a module's name is its layer.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "xenfs": ("blockdev", "netdev", "sysdev", "xenmodel"),
    "blockdev": ("xenmodel",),
    "netdev": ("xenmodel",),
    "sysdev": ("xenmodel",),
    "xenmodel": (),
    "xenmodel.public": (),
}
EDGES = frozenset({"blockdev.image", "netdev.tap", "netdev.netlink", "sysdev.pty"})


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())



# What only the host and the edges may use: waiting, descriptors, threads, other processes.
HOST_ONLY = _words(
    "trio fuse pytun pyroute2 threading _thread socket select selectors subprocess multiprocessing asyncio signal"
    " concurrent fcntl termios pty tty mmap ctypes io pathlib tempfile shutil"
)
# Order and clock are arguments, also in the edges.
NEVER = _words("random secrets time datetime uuid")
ALLOWED = {
    "xenmodel.memory": _words("mmap ctypes"),  # frames
    "xenmodel.ring": _words("_thread"),  # a lock as a fence
    "blockdev.command": _words("mmap"),  # pages once they are lost
}
# Calls of os that make a descriptor, use one, or wait.
OS_CALLS = _words(
    "open fdopen pipe pipe2 dup dup2 openpty memfd_create eventfd pidfd_open read write pread pwrite preadv pwritev readv"
    " writev sendfile fork forkpty execv system popen posix_spawn kill wait waitpid listdir scandir stat mkdir unlink"
    " urandom getrandom"
)
OS_ALLOWED = {"xenmodel.memory": _words("memfd_create")}


def layer_of(module: str) -> str | None:
    """The layer a module of ours belongs to, or None for others'."""
    fits = [layer for layer in MAY_IMPORT if module == layer or module.startswith(layer + ".")]
    return max(fits, key=len, default=None)


def imports(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, wherever it stands (also under TYPE_CHECKING and in functions)."""
    package = module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            if base in MAY_IMPORT:  # `from xenfs import host`: the names are modules
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, base


def import_problems(tree: ast.AST, module: str) -> Iterator[str]:
    layer = layer_of(module)
    assert layer is not None, f"{module} is in no layer"
    for line, name in imports(tree, module):
        target, top = layer_of(name), name.split(".")[0]
        below = (layer, *MAY_IMPORT[layer])
        if target is not None and not any(target == known or target.startswith(known + ".") for known in below):
            yield f"{module}:{line} imports {name}, which is not below {layer}"
        if layer == "xenfs":
            continue
        if top in NEVER:
            yield f"{module}:{line} imports {name}: order and clock are arguments"
        if top in HOST_ONLY - ALLOWED.get(module, frozenset()) and module not in EDGES:
            yield f"{module}:{line} imports {name}, which belongs to the host and the edges"


def waiting_problems(tree: ast.AST, module: str) -> Iterator[str]:
    """`async def`, `open()` and os calls on descriptors below the host."""
    if layer_of(module) == "xenfs" or module in EDGES:
        return
    allowed = OS_ALLOWED.get(module, frozenset())
    for node in ast.walk(tree):
        line = f"{module}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith):
            yield f"{line} is async: the model never waits"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            if node.attr in OS_CALLS - allowed:
                yield f"{line} uses os.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (f"{line} uses os.{a.name}" for a in node.names if a.name in OS_CALLS - allowed)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("open", "print", "input"):
            yield f"{line} calls {node.func.id}()"


MUTABLE = _words("list dict set bytearray deque defaultdict Counter OrderedDict count cycle SimpleQueue Queue")


def is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp | ast.GeneratorExp):
        return True
    if not isinstance(value, ast.Call):
        return False
    called = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
    return called in MUTABLE


def state_problems(tree: ast.Module, module: str) -> Iterator[str]:
    """Module-level mutable objects that are no constants (ALL_CAPS or Final), and `global`. One test builds two worlds."""
    if layer_of(module) == "xenfs":
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield f"{module}:{node.lineno} says global {', '.join(node.names)}"
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            targets, final = statement.targets, False
        elif isinstance(statement, ast.AnnAssign):
            targets, final = [statement.target], "Final" in ast.unparse(statement.annotation)
        elif isinstance(statement, ast.AugAssign):
            yield f"{module}:{statement.lineno} changes {ast.unparse(statement.target)} at import"
            continue
        else:
            continue
        if not is_mutable(statement.value) or final:
            continue
        for name in [target.id for target in targets if isinstance(target, ast.Name)]:
            if not name.strip("_").isupper() and not (name.startswith("__") and name.endswith("__")):
                yield f"{module}:{statement.lineno} keeps a mutable {name}"


def problems(source: str, module: str) -> list[str]:
    tree = ast.parse(source)
    checks = (import_problems, waiting_problems, state_problems)
    return [problem for check in checks for problem in check(tree, module)]


def modules() -> list[Path]:
    """Every module of ours, as a path below ROOT."""
    tops = sorted({layer.split(".")[0] for layer in MAY_IMPORT})
    return [path.relative_to(ROOT) for top in tops for path in sorted((ROOT / top).rglob("*.py"))]


def name_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", modules(), ids=str)
def test_module_keeps_to_its_layer(path: Path):
    """Goal: this module obeys.  Method: all rules; every problem with its line."""
    assert problems((ROOT / path).read_text(encoding="utf-8"), name_of(path)) == []


def test_every_layer_was_looked_at():
    """Goal: the test above is not empty.  Method: each layer has modules, and known ones are among them."""
    names = {name_of(path) for path in modules()}
    assert {layer_of(name) for name in names} == set(MAY_IMPORT)
    assert {"xenmodel.ring", "xenmodel.public.io.blkif", "blockdev.image", "xenfs.fuse.session"} <= names


def test_exceptions_are_still_needed():
    """Goal: no rule stays loosened for nothing.  Method: each module with an exception needs all of it."""
    for module in sorted({*ALLOWED, *OS_ALLOWED, *EDGES}):
        path = ROOT / (module.replace(".", "/") + ".py")
        if module in EDGES and not path.exists():
            continue  # an edge that is yet to be written
        used = {name.split(".")[0] for _, name in imports(ast.parse(path.read_text(encoding="utf-8")), module)}
        assert used & (HOST_ONLY | {"os"}), f"{module} needs no exception"
        assert ALLOWED.get(module, frozenset()) <= used, f"{module} does not use all of {sorted(ALLOWED[module])}"


BAD: list[tuple[str, str]] = [  # module it would be, source: each line of these breaks a rule
    ("xenmodel.ring", "import blockdev.blkfront"),
    ("xenmodel.ring", "from xenfs import host"),
    ("xenmodel.ring", "from xenfs.host import World"),
    ("xenmodel.ring", "def f():\n    from netdev.netfront import Netfront"),
    ("xenmodel.ring", "if TYPE_CHECKING:\n    from sysdev.console import Console"),
    ("xenmodel.public.io.blkif", "from xenmodel.ring import FrontRing"),
    ("xenmodel.public.io.blkif", "from xenmodel.types import Domid"),
    ("xenmodel.public.io.blkif", "from ...types import Domid"),
    ("xenmodel.public.xen", "from xenmodel import ring"),
    ("blockdev.blkfront", "from netdev.link import Link"),
    ("netdev.netback", "import sysdev.console"),
    ("sysdev.console", "from blockdev import storage"),
    ("sysdev.console", "import xenfs"),
    *[("xenmodel.xenbus", f"import {name}") for name in sorted(HOST_ONLY)],
    *[("blockdev.blkback", f"from {name} import x") for name in sorted(HOST_ONLY | NEVER)],
    *[("blockdev.image", f"import {name}") for name in sorted(NEVER)],  # an edge may do I/O but has no clock either
    ("xenmodel.memory", "import socket"),
    ("netdev.netfront", "import pyroute2.ndb"),
    ("blockdev.blkback", "import os\nfd = os.open('x', 0)"),
    ("xenmodel.grant_table", "import os\nfd = os.memfd_create('x')"),
    ("xenmodel.memory", "import os\nread = os.read"),
    ("sysdev.console", "from os import openpty"),
    ("blockdev.geometry", "def f():\n    return open('x')"),
    ("xenmodel.xenbus", "def f():\n    print('x')"),
    ("blockdev.blkback", "async def f():\n    pass"),
    ("xenmodel.domain", "class Domain:\n    async def run(self):\n        pass"),
    ("xenmodel.domain", "domains = []"),
    ("xenmodel.domain", "domains: dict[int, Domain] = {}"),
    ("xenmodel.domain", "_cache = dict()"),
    ("blockdev.command", "free = collections.deque()"),
    ("blockdev.command", "ids = itertools.count()"),
    ("blockdev.command", "pool = {n: None for n in range(9)}"),
    ("xenmodel.hypervisor", "def f():\n    global current\n    current = 1"),
]


@pytest.mark.parametrize(("module", "source"), BAD, ids=[f"{m}: {s.splitlines()[-1].strip()}" for m, s in BAD])
def test_the_rules_bite(module: str, source: str):
    """Goal: the checker has teeth.  Method: one small module that breaks one rule: exactly one problem, which names it."""
    found = problems(source, module)
    assert len(found) == 1 and found[0].startswith(f"{module}:"), found


GOOD = """
    from __future__ import annotations
    import os, struct
    from collections import deque
    from typing import Final
    from xenmodel.types import Domid
    from xenmodel.public.io.blkif import ABIS
    from . import domain
    TABLE = {1: "one"}
    _OPS = [1, 2]
    names: Final = ["a"]
    __all__ = ["TABLE"]
    limit = 5
    PAIRS = tuple(n for n in range(4))

    class Queue:
        hooks: dict[str, str] = {}

        def f(self) -> deque[int]:
            return deque(os.fsencode(os.path.join("a", "b")))
"""


@pytest.mark.parametrize("module", ["xenmodel.ring", "blockdev.blkback", "netdev.packet", "sysdev.console"])
def test_the_rules_let_good_code_be(module: str):
    """Goal: no false alarms.  Method: a module with everything that is allowed."""
    assert problems(dedent(GOOD).replace("from . import domain", ""), module) == []


def test_the_host_may_do_all_this():
    """Goal: the rules are about what is below the host.  Method: a module of xenfs with tasks, threads, clock and state."""
    source = "import trio, threading, time, random\nfrom blockdev import image\ntasks = []\nasync def f():\n    open('x')\n"
    assert problems(source, "xenfs.host") == []
