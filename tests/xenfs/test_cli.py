"""Goal: the command says in one line what is wrong, and leaves with the right status.
Method: `python -m xenfs` as a child process with wrong arguments, configurations and images; nothing is ever mounted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import xenfs
from xenfs.cli import main, parser
from xenfs.network import Bridge

IMAGE = 1 << 20


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(xenfs.__file__).parents[1])
    environ = os.environ | {"PYTHONPATH": root, "FUSE_LIBRARY_PATH": "/no/libfuse.so.2"}
    words = [sys.executable, "-m", "xenfs", *arguments]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=30, env=environ)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a mount point, an image, and configurations good and bad."""
    (tmp_path / "mnt").mkdir()
    (tmp_path / "a.img").write_bytes(bytes(IMAGE))
    (tmp_path / "empty.img").write_bytes(b"")
    for name, disks in {
        "good": "'a.img,raw,xvda,w'",
        "missing": "'no.img,raw,xvda,w'",
        "directory": "'mnt,raw,xvda,w'",
        "empty": "'empty.img,raw,xvda,w'",
        "twice": "'a.img,raw,xvda,w', 'a.img,raw,xvdb,w'",
    }.items():
        (tmp_path / f"{name}.cfg").write_text(f'name = "{name}"\ndisk = [ {disks} ]\n')
    (tmp_path / "wrong.cfg").write_text('name = "wrong"\n\nmemory = "much"\n')
    (tmp_path / "vif.cfg").write_text('name = "vif"\nvif = [ "", "bridg=xenbr0" ]\n')
    return tmp_path


def test_version_and_help(place):
    """Goal: --version and --help need no libfuse and end with 0.  Method: both, and the help of each command."""
    assert run("--version", cwd=place).stdout == f"xenfs {xenfs.__version__}\n"
    for words in (["--help"], ["up", "--help"], ["demo", "--help"]):
        done = run(*words, cwd=place)
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: xenfs")


USAGE = [
    [], ["down"], ["up"], ["up", "--mount"], ["up", "good.cfg"], ["--log-level", "loud", "up", "--mount", "m", "c"],
]  # fmt: skip


@pytest.mark.parametrize("words", USAGE, ids=" ".join)
def test_wrong_usage(words, capsys):
    """Goal: wrong usage is status 2 and shows the usage.  Method: main() with arguments missing and wrong."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: xenfs")


REFUSED = [
    ("nothing.cfg", "xenfs: nothing.cfg: cannot be read: No such file or directory"),
    ("wrong.cfg", "xenfs: wrong.cfg:3: "),
    ("vif.cfg", "xenfs: vif.cfg:2: vif 'bridg=xenbr0': unknown parameter 'bridg'; did you mean bridge?"),
    ("missing.cfg", "xenfs: missing: xvda: cannot open disk image {place}/no.img: No such file or directory"),
    ("directory.cfg", "xenfs: directory: xvda: cannot open disk image {place}/mnt: Is a directory"),
    ("empty.cfg", "xenfs: empty: xvda: disk image {place}/empty.img is smaller than one block of 512 bytes"),
    ("twice.cfg", "xenfs: twice.cfg:2: "),
    ("good.cfg", "xenfs: "),  # there is no libfuse
]


@pytest.mark.parametrize(("config", "says"), REFUSED)
def test_refused(place, config, says):
    """Goal: what cannot be done is status 1 and one line that names the file and the reason, without a traceback.
    Method: a configuration per reason; the last one fails only at the mount."""
    done = run("up", "--mount", "mnt", config, cwd=place)
    assert done.returncode == 1
    *_, line = done.stderr.splitlines()
    assert line.startswith(says.format(place=place)) and len(line) > len("xenfs: ")
    assert "Traceback" not in done.stderr and "ready" not in done.stdout


def test_two_guests_one_image(place):
    """Goal: a writable image belongs to one guest.  Method: two configurations that share it."""
    (place / "other.cfg").write_text('name = "other"\ndisk = [ "a.img,raw,xvda,w" ]\n')
    done = run("up", "--mount", "mnt", "good.cfg", "other.cfg", cwd=place)
    assert done.returncode == 1
    assert "other.cfg" in done.stderr and "a.img" in done.stderr and "good.cfg" in done.stderr


def test_options():
    """Goal: --allow-other has three states: as the user's rights suggest, yes, no.  Method: the parser."""
    for words, expected in (([], None), (["--allow-other"], True), (["--no-allow-other"], False)):
        options = parser().parse_args(["up", "--mount", "m", *words, "a.cfg", "b.cfg"])
        assert (options.allow_other, options.configs, options.mount) == (expected, ["a.cfg", "b.cfg"], "m")
        assert options.bridge == []
    assert parser().parse_args(["up", "--mount", "m"]).configs == []


def test_device_group(capsys):
    """Goal: --device-group takes a name or a number, and says which name it does not know.  Method: the parser."""
    for word in ("root", "0"):
        assert parser().parse_args(["up", "--mount", "m", "--device-group", word]).device_group == 0
    with pytest.raises(SystemExit):
        parser().parse_args(["up", "--mount", "m", "--device-group", "no such group"])
    assert "there is no group 'no such group'" in capsys.readouterr().err


def test_bridges(monkeypatch, tmp_path):
    """Goal: each --bridge is a name with its addresses, in the order given, and reaches the server with the guests.
    Method: main() up to the call that would serve; a vif without any parameter is a legal one."""
    served = []
    monkeypatch.setattr("xenfs.up.up", lambda *arguments: served.append(arguments))
    (tmp_path / "a.cfg").write_text('name = "a"\nvif = [ "" ]\n')
    words = ["--bridge", "xenbr0=10.0.0.1/24,fd00::1/64", "--bridge=other"]
    assert main(["up", "--mount", "m", *words, str(tmp_path / "a.cfg")]) == 0
    ((guests, mountpoint, settings),) = served
    assert ([guest.name for guest in guests], mountpoint, settings.allow_other) == (["a"], "m", None)
    assert [(vif.devid, vif.bridge, vif.ip, vif.mtu) for vif in guests[0].vifs] == [(0, "xenbr0", (), 1500)]
    assert settings.store_socket is None, "the default depends on the mount"
    assert settings.device_group is None, "only root may use dev/xen"
    assert settings.bridges == [Bridge("xenbr0", ("10.0.0.1/24", "fd00::1/64")), Bridge("other")]
