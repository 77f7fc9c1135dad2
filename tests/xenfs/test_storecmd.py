"""Goal: `xenfs store` and `xenfs quota` do what they say with every xenstored, or say in one line why not.
Method: the commands against our own store behind a socket, Debian's C xenstored and oxenstored, and scripted servers."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import realstore
from tests.xenfs.storepeers import (
    LINES,
    TIMEOUT_S,
    TREE,
    OurXenstored,
    entries,
    refuse,
    reply,
)
from xenfs import storecmd
from xenfs.storeclient import Event, StoreClient
from xenfs.storetree import dump, load
from xenmodel.xenstore.dump import HEADER, LINE_MAX
from xenmodel.xenstore.errors import XsError
from xenmodel.xenstore.wire import join

ROOT = Path(storecmd.__file__).parents[1]


def main(*words: object) -> int:
    top = argparse.ArgumentParser(prog="xenfs")
    storecmd.add_commands(top.add_subparsers(dest="command", required=True))
    return storecmd.run(top.parse_args(list(map(str, words))))


def test_commands(store, tmp_path, monkeypatch, capsys):
    """Goal: dump and load from file to file and over pipes; files with secrets are nobody else's.  Method: as a user."""
    monkeypatch.setenv("XENSTORED_PATH", str(store.socket))
    (tmp_path / "tree").write_text(TREE)
    assert main("store", "load", tmp_path / "tree") == 0
    assert capsys.readouterr().out.startswith(f"nodes {len(LINES)}: created ")
    assert main("store", "dump", "--output", tmp_path / "out", "/local/domain/1") == 0
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o600
    assert main("store", "dump", "/local/domain/1") == 0
    assert capsys.readouterr() == ((tmp_path / "out").read_text(), "")
    assert main("store", "load", "--replace", "--under", "/local/domain/1/zz", tmp_path / "out") == 0
    assert capsys.readouterr().out == "nodes 2: created 0, values changed 0, permissions changed 0, others removed 0\n"


CHILD = """
import argparse, sys
from xenfs import storecmd
top = argparse.ArgumentParser()
storecmd.add_commands(top.add_subparsers())
sys.exit(storecmd.run(top.parse_args(sys.argv[1:])))
"""


def test_pipes(ours):
    """Goal: dump writes to a pipe, load reads from one; a reader that leaves early is no error message.
    Method: real ones; more lines than a pipe holds."""
    environ = os.environ | {"XENSTORED_PATH": str(ours.socket), "PYTHONPATH": str(ROOT)}

    def start(*words: str, **pipes: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", CHILD, "store", *words], env=environ, stderr=subprocess.PIPE, **pipes)

    text = "".join(f'/many/{number} = "{"x" * 1000}"   (n0)\n' for number in range(200)).encode()
    with start("load", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as loading:
        out, err = loading.communicate(text, TIMEOUT_S)
    assert (loading.returncode, err) == (0, b"") and out.startswith(b"nodes 200: created 200")
    with start("dump", "/many", stdout=subprocess.PIPE) as dumping:
        assert dumping.stdout is not None and dumping.stderr is not None
        assert dumping.stdout.readline() == HEADER.encode() + b"\n"
        dumping.stdout.close()
        assert dumping.stderr.read() == b""
    assert dumping.returncode == 1


BAD_FILES = {
    "wrong line": (b'/good = ""   (n0)\n/bad\n', "line 2: '/bad' has no value"),
    "wrong end": (b'/good = ""   (n0)\r\n', "line 1: the line has to end in"),
    "not text": (b'/good = ""   (n0)\n/bad = "\xff"   (n0)\n', r"line 2: '\udcff' in the value has to be written \xff"),
    "long line": (b'/good = ""   (n0)\n#' + b"x" * 10**6, "line 2: it has more than"),
    "long value": (b'/good = ""   (n0)\n/bad = "' + b"x" * 4092 + b'"   (n0)\n', "/bad is too large"),
    "many permissions": (b'/good = ""   (n0)\n/bad = ""   (n0' + b",r12345" * 700 + b")\n", "/bad is too large"),
    "too many nodes": (b'/a = ""   (n0)\n/b = ""   (n0)\n/c = ""   (n0)\n/d = ""   (n0)\n', "a dump of more than 3 nodes"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(ours, tmp_path, monkeypatch, capsys, name):
    """Goal: a file is right as a whole or nothing of it is loaded; one line says what is wrong.  Method: a table."""
    monkeypatch.setattr(storecmd, "NODES_MAX", 3)
    data, says = BAD_FILES[name]
    (tmp_path / "file").write_bytes(data)
    assert main("store", "load", "--socket", ours.socket, tmp_path / "file") == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("xenfs: ") and says in err and err.count("\n") == 1
    with StoreClient(ours.socket) as client:
        assert client.directory("/") == ["tool"]


def test_largest(ours, tmp_path):
    """Goal: what one request can carry can be dumped and loaded, however it is written.  Method: the longest value, of
    bytes that take four characters each."""
    lines = ['/a = "' + r"\xff" * 4093 + '"   (n0,' + ",".join(f"r{number}" for number in range(100)) + ")"]
    assert len(lines[0]) < LINE_MAX
    (tmp_path / "file").write_text(lines[0])
    assert main("store", "load", "--socket", ours.socket, tmp_path / "file") == 0
    with StoreClient(ours.socket) as client:
        assert dump(client, "/a") == [HEADER, *lines]


def test_where_the_store_is(ours, tmp_path, monkeypatch, capsys):
    """Goal: --socket or --mount, else the environment, as libxenstore's; wrong usage is 2, a store that is not there 1.
    Method: each way, and none."""
    monkeypatch.delenv("XENSTORED_PATH", raising=False)
    (tmp_path / "mnt").mkdir()
    (tmp_path / "mnt.xenstored").symlink_to(ours.socket)
    monkeypatch.chdir(tmp_path)
    for words in (["--socket", ours.socket], ["--mount", "mnt"], ["--mount", tmp_path / "mnt/"]):
        assert main("store", "dump", *words) == 0
        assert capsys.readouterr().out.startswith(HEADER)
    monkeypatch.chdir(tmp_path / "mnt")
    assert main("store", "dump", "--mount", ".") == 0
    assert main("store", "dump", "--mount", "nowhere") == 1
    said = capsys.readouterr().err
    assert "nowhere.xenstored: no store can be reached there: No such file or directory; " in said and "--socket" in said
    monkeypatch.setenv("XENSTORED_PATH", str(ours.socket))
    assert main("store", "dump", "--output", tmp_path / "no/file") == 1
    assert capsys.readouterr().err == f"xenfs: {tmp_path}/no/file: No such file or directory\n"
    assert main("store", "load", "missing") == 1
    assert capsys.readouterr().err == "xenfs: missing: No such file or directory\n"
    assert main("store", "dump", "/a/b") == 1
    assert capsys.readouterr().err == "xenfs: there is no node /a/b\n"


USAGE = [
    ["store"], ["store", "load", "--force"], ["store", "dump", "a/b"], ["store", "dump", "/a/"], ["store", "dump", "@x"],
    ["store", "load", "--under", "a"], ["store", "dump"], ["quota"], ["quota", "1"], ["store", "reload"],
    ["store", "dump", "--socket", "s", "--mount", "m"],
]  # fmt: skip


@pytest.mark.parametrize("words", USAGE, ids=" ".join)
def test_wrong_usage(words, monkeypatch, capsys):
    """Goal: wrong usage is status 2 and shows the usage.  Method: arguments missing and wrong; no store is named."""
    monkeypatch.delenv("XENSTORED_PATH", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(*words)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: xenfs")


def read_some(fd: int) -> bytes:
    with contextlib.suppress(BlockingIOError):
        return os.read(fd, 65536)
    return b""


def test_progress(ours, tmp_path, monkeypatch):
    """Goal: on a terminal long work shows how far it is, and leaves no trace; elsewhere it says nothing.
    Method: a terminal, and a file, as standard error."""
    monkeypatch.setattr(storecmd, "PROGRESS_S", 0)
    text = "".join(f'/n{number} = ""   (n0)\n' for number in range(300))
    (tmp_path / "tree").write_text(text)
    far, near = os.openpty()
    with open(near, "w") as terminal, open(tmp_path / "err", "w+") as file:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert main("store", "load", "--socket", ours.socket, tmp_path / "tree") == 0
        os.set_blocking(far, False)
        shown = b"".join(iter(lambda: read_some(far), b"")).decode()
        monkeypatch.setattr(sys, "stderr", file)
        assert main("store", "dump", "--socket", ours.socket, "--output", tmp_path / "out") == 0
        assert file.tell() == 0
    os.close(far)
    steps = shown.split("\r")
    assert [step.strip() for step in steps] == ["", *(f"loaded {n} of 300 nodes" for n in (128, 256, 300)), "", ""]
    assert len(steps[-2]) == len(steps[-3])


# --- quota and reload -------------------------------------------------------------------------------------------------


def rows_of(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    lines = [line.split(None, 4) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["quota", "used", "limit", "refused", "last"]
    return {name: rest for name, *rest in lines[1:]}


def test_quota(store, capsys):
    """Goal: what a domain uses and may use, by its name and its domid, as far as the store tells.  Method: three stores;
    a domain that owns three nodes."""
    text = '/local/domain/1/name = "guest1"   (n0,r1)\n' + "".join(f'/mine/{n} = ""   (n1)\n' for n in range(3))
    with StoreClient(store.socket) as client:
        load(client, entries(text))
        client.write("/local/domain/x/name", b"guest1")  # not a domain
    for domain in ("guest1", "1"):
        assert main("quota", "--socket", store.socket, domain) == 0
        rows = rows_of(capsys)
        assert rows["nodes"][:3] == ["3", "1000", "0" if isinstance(store, OurXenstored) else "-"]
        if not isinstance(store, realstore.RealOxenstored):
            assert (rows["watches"][:2], rows["path-max"][:2]) == (["0", "128"], ["-", "2048"])
    for domain, says in (("guest7", "no domain is called 'guest7'; give its domid"), ("7", "the store knows no domain 7")):
        status = main("quota", "--socket", store.socket, domain)
        out, err = capsys.readouterr()
        if isinstance(store, realstore.RealOxenstored) and domain == "7":
            says = "the store has no table of quotas; it says: dom7 quota: not set"
        assert (status, out, err) == (1, "", f"xenfs: {says}\n")
    with StoreClient(store.socket) as client:
        client.write("/local/domain/2/name", b"guest1")
    assert main("quota", "--socket", store.socket, "guest1") == 1
    assert "2 domains are called 'guest1'" in capsys.readouterr().err


def test_limits(store, capsys):
    """Goal: a domain gets limits of its own, another one keeps its own, 0 is none; a store without such says that it cannot.
    Method: three stores; two limits at once, by name; one is switched off."""
    store.add_domain(2)
    with StoreClient(store.socket) as client:
        load(client, entries('/local/domain/1/name = "guest1"   (n0,r1)\n'))
    words = ["quota", "--socket", store.socket]
    if not isinstance(store, OurXenstored):
        assert main(*words, "guest1", "nodes=2", "watches=3") == 1
        assert capsys.readouterr() == ("", "xenfs: the store has no quota 'nodes' for single domains\n")
        return
    assert main(*words, "2") == 0
    before = rows_of(capsys)
    assert main(*words, "guest1", "nodes=2", "watches=3") == 0
    limits = {name: limit for name, (_, limit, *_) in before.items()}
    assert {name: limit for name, (_, limit, *_) in rows_of(capsys).items()} == limits | {"nodes": "2", "watches": "3"}
    assert main(*words, "2") == 0
    assert rows_of(capsys) == before
    assert main(*words, "1", "watches=0") == 0
    rows = rows_of(capsys)
    assert (rows["nodes"][1], rows["watches"][1]) == ("2", "-")


BAD_LIMITS = {
    "nodes": "'nodes' is not NAME=VALUE with a number",
    "nodes=": "'nodes=' is not NAME=VALUE with a number",
    "=1": "'=1' is not NAME=VALUE with a number",
    "nodes=-1": "'nodes=-1' is not NAME=VALUE with a number",
    "nodes=1=1": "'nodes=1=1' is not NAME=VALUE with a number",
    "nodes=\u0661": "is not NAME=VALUE with a number",
    "nonsense=1": "the store has no quota 'nonsense' for single domains",
    "\x1b[2J=1": r"the store has no quota '\x1b[2J' for single domains",
}


@pytest.mark.parametrize("limit", BAD_LIMITS)
def test_bad_limits(ours, capsys, limit):
    """Goal: what is no limit is one line and status 1, and nothing is changed.  Method: a table; a domain of nobody's."""
    words = ["quota", "--socket", ours.socket]
    assert main(*words, "1") == 0
    before = rows_of(capsys)
    for domain, says in (("1", BAD_LIMITS[limit]), ("7", "NAME=VALUE" if "NAME" in BAD_LIMITS[limit] else "")):
        assert main(*words, domain, limit) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("xenfs: ") and says in err and err.count("\n") == 1
    assert main(*words, "1") == 0
    assert rows_of(capsys) == before
    assert main(*words, "7", "nodes=1") == 1
    assert capsys.readouterr().err == "xenfs: the store knows no domain 7\n"


def test_refusals(serve, capsys):
    """Goal: how often a limit was in the way, and what was said the last time, without what a terminal obeys.
    Method: a store's answer with a long text and control characters."""
    answer = "nodes 1000 1000 12 domain 1 would own more\x1b[2J than 1000 nodes\nmemory 5 0 0\n"
    server = serve(lambda message: reply(message, answer.encode() + b"\0"))
    assert main("quota", "--socket", server.path, "1") == 0
    assert capsys.readouterr().out == (
        "quota   used  limit  refused  last\n"
        "nodes   1000   1000       12  domain 1 would own more?[2J than 1000 nodes\n"
        "memory     5      0        0\n"
    )
    assert server.asked[0].body == join("quota-usage", "1")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"nodes 1\n\0", "no table of quotas: 'nodes 1"),
        (b"\0", "no table of quotas: ''"),
        (b"nonsense\x1b[2J\0", r"no table of quotas: 'nonsense\x1b[2J'"),
        (b"OK\0", "the store has no table of quotas\n"),
        ("EACCES", "EACCES: CONTROL 'quota-usage' (through a guest's device one is that guest)\n"),
        ("EINVAL", "the store has no table of quotas\n"),
    ],
)
def test_other_answers(serve, capsys, answer, says):
    """Goal: an answer that is no table is an error, and a store without such a command is said to be one.  Method: some."""
    server = serve(lambda m: refuse(m, answer) if isinstance(answer, str) else reply(m, answer))
    assert main("quota", "--socket", server.path, "1") == 1
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1


def test_reload(ours, capsys):
    """Goal: our store starts anew with all it has; not while a transaction is open, unless forced.  Method: each."""
    with StoreClient(ours.socket) as client:
        load(client, entries())
        client.watch("/local", "t")
        before = dump(client)
        words = ["store", "reload", "--socket", ours.socket]
        assert (main(*words), capsys.readouterr().out) == (0, "OK\n")
        with contextlib.suppress(XsError), client.transaction():
            assert main(*words) == 1
            assert capsys.readouterr().err == (
                f"xenfs: {ours.socket}: not reloaded: BUSY: transactions are open; --force ends them\n"
            )
            assert (main(*words, "--force"), capsys.readouterr().out) == (0, "OK\n")
        assert dump(client) == before
        assert client.wait(0) == Event("/local", "t")
        client.write("/local/x", b"")
        assert client.wait(TIMEOUT_S) == Event("/local/x", "t")


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (lambda m: refuse(m, "EINVAL"), "this store cannot be reloaded"),
        (lambda m: refuse(m, "EACCES"), "EACCES: CONTROL 'live-update' (through a guest's device one is that guest)"),
        (lambda m: reply(m, b"Domains with long running transactions:\nDomain 1: 70 s\0"),
         "not reloaded: Domains with long running transactions: Domain 1: 70 s"),
    ],
)  # fmt: skip
def test_no_reload(serve, capsys, script, says):
    """Goal: what the store answers is told, and is status 1.  Method: answers of other daemons."""
    server = serve(script)
    assert main("store", "reload", "--socket", server.path) == 1
    assert capsys.readouterr().err == f"xenfs: {server.path}: {says}\n"
    assert [message.body for message in server.asked] == [join("live-update", "-s")]
