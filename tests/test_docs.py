"""Goal: what the documents say about files, options and tests is so, and CI cannot pass by leaving things out.
Method: read them, and look; run pytest on a test that skips itself.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from xenfs.cli import parser

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("xenmodel", "blockdev", "netdev", "sysdev", "xenfs", "bench")
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"`((?:" + "|".join((*PACKAGES, "tests", "docs", r"\.ci")) + r")/[\w/.-]*\.\w+)`")


def modules() -> set[str]:
    """Every module of ours but the package files."""
    found = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {str(path.relative_to(ROOT)) for path in found if path.name != "__init__.py"}


def links(page: Path) -> list[str]:
    """Relative links, without those in examples."""
    targets = LINK.findall(FENCE.sub("", page.read_text()))
    return [target.partition("#")[0] for target in targets if ":" not in target and not target.startswith("#")]


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_links_lead_somewhere(page: Path) -> None:
    """Goal: no dead relative link.  Method: resolve each from its page."""
    assert [target for target in links(page) if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_named_files_exist(page: Path) -> None:
    """Goal: a page names no file that was renamed or removed.  Method: everything in backquotes that looks like one."""
    assert [name for name in FILE.findall(page.read_text()) if not (ROOT / name).exists()] == []


def test_the_map_is_complete() -> None:
    """Goal: the map has every module, once.  Method: compare the first column of its tables with the packages."""
    named = re.findall(r"^\| `([\w/.]+\.py)` \|", (ROOT / "docs/map.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(modules())


def test_every_page_can_be_found() -> None:
    """Goal: no page that nobody links to.  Method: follow the links from the README."""
    seen: set[Path] = set()
    todo = [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page not in seen and page.exists():
            seen.add(page)
            todo += [(page.parent / target).resolve() for target in links(page) if target.endswith(".md")]
    assert set(PAGES) - seen == set()


def test_every_invariant_has_a_keeper_and_a_test() -> None:
    """Goal: each row says who keeps it and what would notice.  Method: the last two columns name files."""
    text = (ROOT / "docs/invariants.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    headings = [row for row in rows if row == ["what holds", "kept by", "checked by"]]
    assert len(headings) == text.count("|---|---|---|\n") > 0
    for row in [row for row in rows if row not in headings]:
        assert len(row) == 3, row
        assert FILE.search(row[1]), f"no file keeps: {row[0]}"
        assert FILE.search(row[2]), f"no test checks: {row[0]}"


def options(top: argparse.ArgumentParser) -> Iterator[str]:
    """Each option string, command and positional of a parser and the parsers below it."""
    for action in top._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield name
                yield from options(below)
        else:
            yield from map(str, action.choices or ())
            if not action.option_strings:
                yield str(action.metavar)


def manual() -> str:
    """The manual page's text without the markup that stands between an option's dashes and its name."""
    source = (ROOT / "docs/xenfs.1").read_text()
    return re.sub(r"\bFl (-?[a-z])", r"-\1", source)


def test_the_manual_has_every_option() -> None:
    """Goal: the manual page knows each option and command, and knows none that is gone.  Method: ask the parser."""
    known = set(options(parser()))
    assert {"--mount", "--no-allow-other", "up", "demo", "GUEST.cfg", "warning"} <= known
    said = manual()
    missing = {word for word in known if not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", said)}
    assert missing == set()
    shown = re.findall(r"\bFl (-?[a-z][a-z-]*)", (ROOT / "docs/xenfs.1").read_text())
    assert {f"-{name}" for name in shown} - known == set()


SKIPS = {
    "mark": "import pytest\n@pytest.mark.skip(reason='no tool')\ndef test_it(): pass\n",
    "call": "import pytest\ndef test_it(): pytest.skip('no tool')\n",
    "module": "import pytest\npytest.importorskip('no_such_module', reason='no tool')\ndef test_it(): pass\n",
}


def test_a_skip_fails_under_ci(tmp_path: Path) -> None:
    """Goal: in CI what cannot run has failed.  Method: each way to skip, without the Makefile's plugin and with it."""
    for kind, text in SKIPS.items():
        (tmp_path / f"test_{kind}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--continue-on-collection-errors", "-rN"]
    environ = os.environ | {"PYTHONPATH": str(ROOT / ".ci")}
    usual = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environ)
    assert (usual.returncode, usual.stdout.count("no tool")) == (0, 0), usual.stdout
    command += ["-p", "no_skips"]
    strict = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environ)
    assert strict.returncode != 0
    assert "1 failed, 2 errors" in strict.stdout  # a mark skips before the test begins
    assert strict.stdout.count("not run, which is a failure here: ") == len(SKIPS)


def test_ci_runs_everything() -> None:
    """Goal: .ci/run is `make test` with CI set, and that makes the plugin part of it.  Method: what make would run."""
    script = (ROOT / ".ci/run").read_text()
    assert re.search(r"^export CI=true$", script, re.MULTILINE)
    assert script.endswith("exec make test\n")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")} | {"CI": "true"}
    plan = subprocess.run(["make", "-n", "test"], capture_output=True, text=True, timeout=60, cwd=ROOT, env=environ)
    assert plan.returncode == 0, plan.stderr
    assert plan.stdout.count("-p no_skips") == 2
    assert "-m 'not host'" in plan.stdout and "-m host" in plan.stdout, "both halves"
