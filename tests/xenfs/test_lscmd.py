"""Goal: `xenfs lsevtchn` and `xenfs lsgrants` find the right mount, show what is there, and say in one line why not.
Method: directories laid out like a mount, mount tables as text, and things that hang: a FIFO nobody writes to."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xenfs import lscmd
from xenfs.cli import main

UID = os.geteuid()
TABLE = "port  state\n1     unbound\n"


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    """What an `xenfs up` would show of domain 0 and of a guest `g`."""
    for domid, name in ((0, "Domain-0"), (1, "g")):
        inspect = tmp_path / f"mnt/domains/{domid}/inspect"
        inspect.mkdir(parents=True)
        (inspect.parent / "name").write_text(f"{name}\n")
        (inspect / "evtchn").write_text(f"{name}\n{TABLE}")
        (inspect / "grants").write_text(f"grants of {name}\n" + "x\n" * 100_000)
    (tmp_path / "mnt/domains/g").symlink_to("1")
    return tmp_path / "mnt"


def test_tables(mount, capsys):
    """Goal: the table of a domain by domid, name and domain 0's own name, whole.  Method: both commands."""
    for domain, name in (("1", "g"), ("g", "g"), ("0", "Domain-0"), ("Domain-0", "Domain-0")):
        assert main(["lsevtchn", "--mount", str(mount), domain]) == 0
        assert capsys.readouterr() == (f"{name}\n{TABLE}", "")
    assert main(["lsgrants", "--mount", str(mount), "g"]) == 0
    assert capsys.readouterr() == ("grants of g\n" + "x\n" * 100_000, "")


def test_control_characters(mount, capsys):
    """Goal: nothing that a terminal obeys, whoever serves the mount.  Method: escapes, bad UTF-8, a letter cut in two."""
    text = b"x" * (lscmd.PIECE_BYTES - 1) + "é\x1b[2J\r\n".encode() + b"\xff\x9b\n"
    (mount / "domains/1/inspect/evtchn").write_bytes(text)
    assert main(["lsevtchn", "--mount", str(mount), "1"]) == 0
    assert capsys.readouterr().out == "x" * (lscmd.PIECE_BYTES - 1) + "é?[2J?\n??\n".replace("??\n", "\ufffd\ufffd\n")


REFUSED = [
    ("7", "{mount}: there is no domain 7"),
    ("h", "{mount}: no domain is called 'h'"),
    ("x" * 300, "{mount}: File name too long"),
    ("..", "'..' is no name of a domain"),
    ("1/inspect/..", "'1/inspect/..' is no name of a domain"),
    ("", "'' is no name of a domain"),
    ("a\n", "{mount}: no domain is called 'a\\n'"),
]


@pytest.mark.parametrize(("domain", "says"), REFUSED, ids=[row[1] for row in REFUSED])
def test_no_such_domain(mount, capsys, domain, says):
    """Goal: a domain that is not there is status 1 and one line; no name leads out of the directory.  Method: names."""
    assert main(["lsgrants", "--mount", str(mount), domain]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"xenfs: {says.format(mount=repr(str(mount)))}\n")


def test_no_mount(mount, tmp_path, capsys):
    """Goal: a directory where no xenfs is.  Method: an empty one, one that is not there, a file."""
    (tmp_path / "file").write_text("")
    for name in ("", "missing", "file"):
        assert main(["lsgrants", "--mount", str(tmp_path / name), "0"]) == 1
        assert capsys.readouterr() == ("", f"xenfs: {str(tmp_path / name)!r}: no xenfs is mounted there\n")


def test_hanging(mount, monkeypatch, capsys):
    """Goal: what does not answer costs a limited time, also in the middle of a table, and leaves no process that can end.
    Method: FIFOs, one that nobody opens and one whose writer falls silent."""
    monkeypatch.setattr(lscmd, "TIMEOUT_S", 0.3)
    path = mount / "domains/1/inspect/evtchn"
    path.unlink()
    os.mkfifo(path)
    for silent in (None, "echo begin; exec sleep 20"):
        writer = silent and subprocess.Popen(["sh", "-c", f"exec > {path}; {silent}"])
        begin = time.monotonic()
        assert main(["lsevtchn", "--mount", str(mount), "1"]) == 1
        assert time.monotonic() - begin < 5
        out, err = capsys.readouterr()
        assert out == ("begin\n" if silent else "") and "no answer within 0.3 s" in err and err.count("\n") == 1
        if writer:
            writer.kill()
            writer.wait(10)
    for _ in range(100):
        try:
            os.waitpid(-1, os.WNOHANG)  # those that were left behind
        except ChildProcessError:
            return
        time.sleep(0.05)
    raise AssertionError("a child is still there")


def test_reader_leaves(mount):
    """Goal: a reader that has enough is no error message.  Method: a pipe that is closed after a line."""
    words = [sys.executable, "-m", "xenfs", "lsgrants", "--mount", str(mount), "g"]
    environ = os.environ | {"PYTHONPATH": str(Path(lscmd.__file__).parents[1])}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"grants of g\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def line(device: str, root: str, path: str, fstype: str = "fuse.xenfs", user: int = UID) -> str:
    optional = "shared:1 " if device.endswith("2") else ""
    return f"30 20 {device} {root} {path} rw,nosuid {optional}- {fstype} xenfs rw,user_id={user},group_id=0\n"


OTHERS = [
    line("0:9", "/", "/sys", "sysfs"), line("0:10", "/domains/1/dev/xen", "/dev/xen"), line("0:11", "/", "/s", "fuse.sshfs"),
    line("0:12", "/", "/home/x/mnt", user=UID + 1000),
]  # fmt: skip
TABLES = [
    ([], []),
    ([line("0:42", "/", "/mnt/a")], ["/mnt/a"]),
    ([line("0:42", "/", r"/mnt/a\040b\134\011")], ["/mnt/a b\\\t"]),
    ([line("0:42", "/", "/mnt/a"), line("0:42", "/", "/mnt/again")], ["/mnt/a"]),
    ([line("0:42", "/", "/mnt/a"), line("0:43", "/", "/mnt/b", user=0)], ["/mnt/a", "/mnt/b"]),
]


@pytest.mark.parametrize(("lines", "expected"), TABLES)
def test_finding(tmp_path, lines, expected):
    """Goal: mounts of this user and root, each once, none that was bound from a part, no other kind.
    Method: tables as proc(5) has them, with strangers around."""
    (tmp_path / "mountinfo").write_text("".join([*OTHERS, *lines, "31 20 0:5 / /proc rw - proc  rw\n"]))
    assert lscmd.find_mounts(str(tmp_path / "mountinfo")) == expected


def test_which(mount, monkeypatch, capsys):
    """Goal: the only mount is taken; none is status 1; of several one must be named, and that is status 2.
    Method: each number of them."""
    found: list[str] = []
    monkeypatch.setattr(lscmd, "find_mounts", lambda: found)
    assert main(["lsevtchn", "0"]) == 1
    assert "--mount" in capsys.readouterr().err
    found.append(str(mount))
    assert main(["lsevtchn", "0"]) == 0
    assert capsys.readouterr().out.startswith("Domain-0\n")
    found.append("/mnt/b")
    with pytest.raises(SystemExit) as ended:
        main(["lsevtchn", "0"])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and f"{str(mount)!r}, '/mnt/b'" in err and err.startswith("usage: xenfs lsevtchn")
