"""Goal: directories below xenstore/ are made, filled and removed, and permissions changed, as in any file system.
Method: the requests that Linux makes for mkdir, rm, chmod and setxattr, into a Session over a World; a guest interferes."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

import pytest

import xenfs.nodes.xenstore
from tests.xenfs.machine import Machine
from tests.xenfs.storeshell import WHERE, Shell
from xenfs.fuse import kernel as k
from xenmodel.xenstore.errors import XsError


@pytest.fixture
def shell() -> Iterator[Shell]:
    with Machine({"g": {}}) as machine:
        yield Shell(machine)


def test_directories_are_made_and_removed(shell):
    """Goal: mkdir -p, touch and rm -r work: what mkdir made stays a directory while it is empty, also once Linux forgot it.
    Method: nest, forget, fill, empty and remove."""
    assert shell.mkdir("a") == shell.mkdir("a/b") == shell.mkdir("a/b/c") == 0
    for ino in [ino for ino in shell.kernel.session.nodes if ino != k.FUSE_ROOT_ID]:
        shell.kernel.send(k.FUSE_FORGET, ino, k.FORGET_IN.pack(1000))
    shell.here = shell.find("")
    assert shell.is_directory("a/b/c") and shell.store_value("a/b/c") == b""
    assert shell.put("a/b/c/x", b"1\n") == 0 and shell.store_value("a/b/c/x") == b"1"
    assert shell.rmdir("a/b/c") == errno.ENOTEMPTY
    assert shell.unlink("a/b/c/x") == 0 and shell.is_directory("a/b/c")
    assert shell.rmdir("a/b/c") == shell.rmdir("a/b") == shell.rmdir("a") == 0
    assert shell.store_value("a") is None and shell.names() == [".", ".."]


def test_a_directory_that_was_emptied(shell):
    """Goal: a directory in use does not turn into a file when its last child goes, so that rm -r can finish; nobody made
    it here.  Method: the guest makes it, we unlink the child; forgotten by Linux, it is a file again."""
    shell.guest.write("data/a/x", b"1")
    ino = shell.find("a")
    assert shell.unlink("a/x") == 0
    assert shell.is_directory("a") and shell.find("a") == ino and shell.names("a") == [".", ".."]
    shell.kernel.send(k.FUSE_FORGET, ino, k.FORGET_IN.pack(1000))
    assert not shell.is_directory("a")
    assert shell.unlink("a") == 0


def test_a_directory_made_anew(shell):
    """Goal: a removed directory's name can be a file's, although somebody still sits in the old one, who gets ENOENT.
    Method: mkdir, rmdir, touch; then requests in the inode of the directory that was."""
    assert shell.mkdir("a") == 0
    old = shell.find("a")
    assert shell.rmdir("a") == 0 and shell.put("a", b"") == 0
    assert not shell.is_directory("a")
    assert shell.unlink("a") == 0
    for opcode, body in ((k.FUSE_MKDIR, k.MKDIR_IN.pack(0, 0)), (k.FUSE_CREATE, k.CREATE_IN.pack(1, 0, 0, 0))):
        assert shell.kernel.call(opcode, old, body + b"x\0").error == errno.ENOENT
    assert shell.store_value("a") is None


NAME_ERRORS = [
    ("mkdir", "file", errno.EEXIST), ("mkdir", "dir", errno.EEXIST), ("mkdir", "a.b", errno.EINVAL),
    ("mkdir", ".value", errno.EINVAL), ("mkdir", "ü", errno.EINVAL), ("mkdir", "n" * 256, errno.ENAMETOOLONG),
    ("unlink", "dir", errno.EISDIR), ("unlink", "nothing", errno.ENOENT), ("unlink", "a.b", errno.EINVAL),
    ("rmdir", "file", errno.ENOTDIR), ("rmdir", "nothing", errno.ENOENT), ("rmdir", "dir", errno.ENOTEMPTY),
    ("create", "dir", errno.EISDIR), ("create", "a b", errno.EINVAL), ("create", "n" * 256, errno.ENAMETOOLONG),
]  # fmt: skip


@pytest.mark.parametrize(("what", "name", "error"), NAME_ERRORS)
def test_errors_of_names(shell, what, name, error):
    """Goal: each refusal has the errno of any file system, or of the store for names it cannot have; nothing changes.
    Method: every kind of node and name, also where Linux would not have asked."""
    shell.guest.write("data/file", b"1")
    shell.guest.write("data/dir/x", b"1")
    before = list(shell.store.directory(WHERE))
    assert (shell.create(name, 1) if what == "create" else getattr(shell, what)(name)) == error
    assert shell.store.directory(WHERE) == before and shell.store_value("file") == shell.store_value("dir/x") == b"1"


def test_links_and_renames(shell):
    """Goal: mv copies (EXDEV), links are not permitted.  Method: their requests."""
    shell.guest.write("data/x", b"1")
    here = shell.here
    for opcode, start in ((k.FUSE_RENAME, k.RENAME_IN.pack(here)), (k.FUSE_RENAME2, k.RENAME2_IN.pack(here, 1, 0))):
        assert shell.kernel.call(opcode, here, start + b"x\0y\0").error == errno.EXDEV
    assert shell.kernel.call(k.FUSE_SYMLINK, shell.here, b"y\0x\0").error == errno.EPERM
    assert shell.names() == [".", "..", "x"]


def test_the_value_of_a_directory_is_written(shell):
    """Goal: `.value` is created, written and removed as a file is; the node and its children stay.
    Method: in a directory with a child, and in one that mkdir made (cp -r writes `.value` first)."""
    assert shell.mkdir("made") == 0
    shell.guest.write("data/full/x", b"1")
    for name in ("made", "full"):
        assert shell.put(f"{name}/.value", b"v\n") == 0
        assert shell.store_value(name) == b"v" and shell.names(name)[2] == ".value"
        assert shell.create(f"{name}/.value", os.O_EXCL | 1) == errno.EEXIST
        assert shell.put(f"{name}/.value", b"w\n") == 0 and shell.store_value(name) == b"w"
        assert shell.put(f"{name}/y", b"1") == 0 and shell.is_directory(name)
        assert shell.unlink(f"{name}/.value") == shell.unlink(f"{name}/y") == 0
        assert shell.store_value(name) == b"" and shell.lookup(f"{name}/.value") == errno.ENOENT
    assert shell.names("made") == [".", ".."] and shell.names("full") == [".", "..", "x"]


@pytest.mark.parametrize("hidden", ["n" * 256, "n" * 1500])
def test_a_guest_cannot_keep_a_directory(shell, hidden):
    """Goal: names that no file can have do not stand in the way of `rm -r`.  Method: a directory that lists as empty."""
    shell.guest.write(f"data/d/{hidden}/below", b"1")
    shell.guest.write("data/d/x", b"1")
    assert shell.rmdir("d") == errno.ENOTEMPTY
    assert shell.unlink("d/x") == 0 and shell.names("d") == [".", ".."]
    assert shell.rmdir("d") == 0 and shell.store_value("d") is None


MODES = [("n", 0), ("r", 4), ("w", 2), ("b", 6)]


@pytest.mark.parametrize(("letter", "bits"), MODES)
def test_modes(shell, letter, bits):
    """Goal: the bits of others are the default access, of files and directories; chmod sets it and nothing else.
    Method: each letter both ways, beside another domain's entry; the same again tells no watcher."""
    shell.guest.write("data/f", b"1")
    shell.guest.write("data/d/x", b"1")
    for name, kind in (("f", stat.S_IFREG | 0o600), ("d", stat.S_IFDIR | 0o701)):
        assert shell.setxattr(name, f"{letter}1,r0,b5".encode()) == 0
        assert shell.mode(name) == kind | bits
        assert shell.setxattr(name, b"n1,r0,b5") == shell.setxattr(name, b"r1,r0,b5") == 0
        assert shell.chmod(name, 0o7770 | bits) == 0, "what cannot be had is not missed"
        assert shell.getxattr(name) == f"{letter}1,r0,b5".encode() and shell.mode(name) == kind | bits
        shell.watch(name)
        assert shell.chmod(name, 0o700 | bits) == 0
        assert shell.seen == []


def test_attributes_that_are_taken_and_ignored(shell):
    """Goal: touch, cp -p and chown to who owns it anyway succeed; giving it away does not.  Method: SETATTR."""
    shell.guest.write("data/f", b"1")
    shell.watch("f")
    times = k.FATTR_ATIME | k.FATTR_MTIME | k.FATTR_ATIME_NOW | k.FATTR_MTIME_NOW
    assert shell.setattr("f", times) == shell.setattr("f", k.FATTR_UID | k.FATTR_GID | times) == 0
    assert shell.setattr("f", k.FATTR_UID, uid=1) == errno.EPERM
    assert shell.seen == [] and shell.store_value("f") == b"1"


BAD_PERMS = [b"", b"x1", b"n1,", b"n1 r2", b"n99999", b"n1\0", b"\xff", b"n" * 4000]


def test_permissions(shell):
    """Goal: user.xenstore.perms is the exact list, of files, directories and new files; a list that is none is EINVAL.
    Method: get, set, list, remove; what the guest may then do."""
    shell.guest.write("data/f", b"1")
    assert shell.getxattr("f") == b"n1"
    assert shell.setxattr("f", b"r0,b1") == 0 and [str(p) for p in shell.store.get_perms(f"{WHERE}/f")] == ["r0", "b1"]
    shell.guest.write("data/f", b"2")
    assert shell.setxattr("f", b"n0") == 0
    with pytest.raises(XsError, match="EACCES"):
        shell.guest.read("data/f")
    for value in BAD_PERMS:
        assert shell.setxattr("f", value) == errno.EINVAL
    for value in (b"n0" + b",n1" * 1400, b"n" * 65536):
        assert shell.setxattr("f", value) == errno.E2BIG, "no message could say so"
    assert shell.setxattr("f", b"n0", flags=os.XATTR_CREATE) == errno.EEXIST
    assert shell.setxattr("f", b"n0", flags=os.XATTR_REPLACE) == 0
    assert shell.setxattr("f", b"n0", b"user.other") == errno.EOPNOTSUPP
    assert shell.getxattr("f", b"security.capability") == errno.ENODATA
    ino = shell.find("f")
    listed = shell.kernel.call(k.FUSE_LISTXATTR, ino, k.GETXATTR_IN.pack(100, 0))
    assert listed.data == b"user.xenstore.perms\0" and shell.getxattr("f") == b"n0"
    for name, error in ((b"user.xenstore.perms\0", errno.EPERM), (b"user.other\0", errno.ENODATA)):
        assert shell.kernel.call(k.FUSE_REMOVEXATTR, ino, name).error == error


def test_permissions_of_new_nodes(shell):
    """Goal: new nodes inherit, whatever mode Linux asks for; a file that is created and not written yet tells what it will
    have, and is in the store as soon as they are changed.  Method: below a directory with a list; look before and after."""
    assert shell.setxattr("", b"r1,b0") == 0
    assert shell.mkdir("d") == 0 and shell.put("d/f", b"1") == 0
    assert shell.getxattr("d") == shell.getxattr("d/f") == b"r1,b0"
    for change in (lambda: shell.setxattr("d/new", b"n1"), lambda: shell.chmod("d/new", 0o600)):
        shell.watch("d/new")
        with shell.redirect("d/new") as file:
            assert shell.getxattr("d/new") == b"r1,b0" and shell.mode("d/new") & 7 == 4
            assert shell.chmod("d/new", 0o604) == 0 and shell.store_value("d/new") is None
            assert change() == 0 and shell.store_value("d/new") == b""
            assert shell.write(file, 0, b"1\n") == 0
        assert shell.store_value("d/new") == b"1" and shell.getxattr("d/new") in (b"n1", b"n1,b0")
        assert shell.unlink("d/new") == 0


def test_what_is_remembered_of_made_directories(monkeypatch):
    """Goal: directories that were made and are gone again are not remembered for ever; those that are there stay so.
    Method: a small limit; the guest removes what we make, again and again."""
    monkeypatch.setattr(xenfs.nodes.xenstore, "_FORGOTTEN_AT", 50)
    with Machine({"g": {}}) as machine:
        shell = Shell(machine)
        assert shell.mkdir("stays") == 0
        for i in range(500):
            assert shell.mkdir(f"n{i}") == 0
            shell.guest.rm(f"data/n{i}")
            shell.kernel.send(k.FUSE_FORGET, shell.kernel.session._next_ino - 1, k.FORGET_IN.pack(9))
        assert len(shell.tree._made) <= 60 and len(shell.tree._nodes) <= 120
        assert shell.is_directory("stays")
