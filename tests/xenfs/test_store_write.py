"""Goal: what is written to files below xenstore/ is what the store gets, once, and refusals are the writer's.
Method: the requests that Linux makes of a shell's system calls, into a Session over a World; the store, and a watch, tell.

Directories and permissions are in test_store_directories.py, the commands themselves in tests/host/test_store_mount.py.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from tests.xenfs.machine import Machine
from tests.xenfs.storeshell import WHERE, Shell
from xenfs.fuse import kernel as k
from xenfs.nodes.xenstore import _errnos
from xenmodel.xenstore.errors import XsErrno, XsError


@pytest.fixture
def shell() -> Iterator[Shell]:
    with Machine({"g": {}}) as machine:
        yield Shell(machine)


BYTES = bytes(range(256))
ECHOED = [(b"4\n", b"4"), (b"4", b"4"), (b"\n", b""), (b"a\n\n", b"a\n"), (b"a\nb\n", b"a\nb"), (BYTES, BYTES)]


@pytest.mark.parametrize(("written", "value"), ECHOED, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("exists", [True, False])
def test_echo(shell: Shell, written: bytes, value: bytes, exists: bool) -> None:
    """Goal: `echo 4 > node` is one change, to 4: no watcher ever sees an empty value, and no newline is added or kept.
    Method: a shell's calls (open, dup, close, write) for an old node and a new one; what a watch's owner read each time."""
    if exists:
        shell.store.write(f"{WHERE}/x", b"before")
    shell.watch("x")
    with shell.redirect("x") as file:
        assert shell.store_value("x") == (b"before" if exists else None), "nothing is written yet"
        assert shell.write(file, 0, written) == 0
        assert shell.store_value("x") == value, "at once, not at close"
    assert shell.store_value("x") == value and shell.seen == [value]


def test_several_writes(shell: Shell) -> None:
    """Goal: each write sets the whole value so far; a newline is only dropped where it is the last byte for now.
    Method: `(echo a; echo b; echo; printf c) > x`, with a look at the store after each."""
    with shell.redirect("x") as file:
        position = 0
        for written, value in ((b"a\n", b"a"), (b"b\n", b"a\nb"), (b"\n", b"a\nb\n"), (b"c", b"a\nb\n\nc")):
            assert shell.write(file, position, written) == 0
            assert shell.store_value("x") == value
            position += len(written)
        assert shell.read(file) == b"a\nb\n\nc"


OFFSETS = [
    (b"connected", 0, b"dis", b"disnected"),
    (b"abc", 3, b"d\n", b"abcd"),
    (b"abc", 5, b"f", b"abc\0\0f"),
    (b"abc", 2, b"\n", b"ab"),
    (b"abc\n", 0, b"x", b"xbc\n"),  # that newline was there
    (b"abc\n", 3, b"\n", b"abc"),
    (b"", 0, b"x", b"x"),
]


@pytest.mark.parametrize(("before", "offset", "written", "after"), OFFSETS)
def test_writes_at_an_offset(shell: Shell, before: bytes, offset: int, written: bytes, after: bytes) -> None:
    """Goal: without O_TRUNC a write changes a part, as of any file.  Method: O_RDWR, write at an offset, read it back."""
    shell.store.write(f"{WHERE}/x", before)
    file = shell.open("x", os.O_RDWR)
    assert shell.read(file) == before
    assert shell.write(file, offset, written) == 0
    assert shell.store_value("x") == after
    assert shell.read(file).removesuffix(b"\n") == after.removesuffix(b"\n")


def test_append(shell: Shell) -> None:
    """Goal: O_APPEND adds to the value as it is at that moment, wherever Linux thinks the end is.
    Method: two open files in turn, and the guest between them."""
    shell.store.write(f"{WHERE}/x", b"a")
    one, two = (shell.open("x", os.O_WRONLY | os.O_APPEND) for _ in range(2))
    writes = [(one, b"b\n", b"ab"), (one, b"c\n", b"ab\nc"), (two, b"d\n", b"ab\ncd"), (one, b"e", b"ab\ncde")]
    for file, written, value in writes:
        assert shell.write(file, 1000, written, os.O_APPEND) == 0
        assert shell.store_value("x") == value
    shell.guest.write("data/x", b"")
    assert shell.write(two, 0, b"f\n", os.O_APPEND) == 0
    assert shell.store_value("x") == b"f"


def test_append_to_a_new_file(shell: Shell) -> None:
    """Goal: of several that append to a node that is not there yet none is lost.
    Method: two find it missing, or it is emptied by the first; the second writes before the first does."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    for more in (0, os.O_TRUNC):
        if more:
            shell.store.write(f"{WHERE}/x", b"old")
        one, two = shell.open("x", flags | more), shell.open("x", flags)
        assert shell.write(two, 0, b"2" if not more else b"\0", flags) == 0
        assert shell.write(one, 0, b"1\n", flags) == 0
        assert shell.write(two, 0, b"2\n", flags) == 0
        assert shell.store_value("x") == (b"old\x0012" if more else b"212")
    with shell.redirect("x") as file:
        assert shell.write(file, 0, b"1\n", os.O_APPEND) == 0
    assert shell.store_value("x") == b"1"


def test_truncation_without_a_write(shell: Shell) -> None:
    """Goal: `: > x` empties the node, once, when it is closed; a first close of many does not count, fsync does.
    Method: the redirection alone; then with fsync and a look before the close."""
    shell.watch("x")
    for synced in (False, True):
        shell.store.write(f"{WHERE}/x", b"old")
        shell.kernel.settle()
        shell.seen.clear()
        with shell.redirect("x") as file:
            assert shell.store_value("x") == b"old"
            if synced:
                assert not shell.kernel.fsync(file.fh).error
                assert shell.store_value("x") == b""
        assert shell.store_value("x") == b"" and shell.seen == [b""]


def test_truncation_that_somebody_overtook(shell: Shell) -> None:
    """Goal: what others wrote after our `>` stays: it was later.  Method: a long command that writes nothing."""
    shell.store.write(f"{WHERE}/x", b"old")
    with shell.redirect("x"):
        shell.guest.write("data/x", b"new")
    assert shell.store_value("x") == b"new"


def test_truncation_is_of_the_last_opened(shell: Shell) -> None:
    """Goal: O_TRUNC, which Linux sends without a handle, is not taken for that of a file that was open already.
    Method: an open file that has not written yet, then `echo b > x`, then a write through the first."""
    shell.store.write(f"{WHERE}/x", b"old")
    first = shell.open("x", os.O_RDWR)
    with shell.redirect("x") as file:
        assert shell.write(file, 0, b"12345\n") == 0
    assert shell.write(first, 0, b"x") == 0
    assert shell.store_value("x") == b"x2345"


def test_truncate(shell: Shell) -> None:
    """Goal: truncate(2) and ftruncate(2) make a value shorter, longer or empty; more than a message is EFBIG.
    Method: SETATTR without any open file, and with the handle."""
    for size, value in ((3, b"abc"), (0, b""), (5, b"abcde\n"[:5]), (6, b"abcde\n"), (8, b"abcde\n\0\0")):
        shell.store.write(f"{WHERE}/x", b"abcde\n")
        assert shell.setattr("x", k.FATTR_SIZE, size=size) == 0
        assert shell.store_value("x") == value
        shell.store.write(f"{WHERE}/x", b"abcde\n")
        file = shell.open("x", os.O_RDWR)
        assert shell.setattr("x", k.FATTR_SIZE | k.FATTR_FH, size=size, fh=file.fh) == 0
        shell.close(file)
        assert shell.store_value("x") == value
    for size in (4098, 2**63 - 1):
        assert shell.setattr("x", k.FATTR_SIZE, size=size) == errno.EFBIG
    assert shell.setattr("x", k.FATTR_SIZE, size=4097) == errno.E2BIG
    assert shell.store_value("x") == b"abcde\n\0\0"


ROOM = 4096 - len(f"{WHERE}/x") - 1
LONG = [
    (0, b"v" * ROOM, 0),
    (0, b"v" * ROOM + b"\n", 0),
    (0, b"v" * (ROOM + 1), errno.E2BIG),
    (0, b"v" * 4097, errno.E2BIG),
    (0, b"v" * 4098, errno.EFBIG),
    (0, b"v" * (1 << 20), errno.EFBIG),
    (4096, b"vv", errno.EFBIG),
    (2**63 - 2, b"v", errno.EFBIG),
    (ROOM - 1, b"v", 0),
]


@pytest.mark.parametrize(("offset", "written", "error"), LONG, ids=lambda value: repr(value)[:10])
@pytest.mark.parametrize("exists", [True, False])
def test_too_long(shell: Shell, offset: int, written: bytes, error: int, exists: bool) -> None:
    """Goal: what no message can carry is refused to the writer, leaves the old value alone, and is not kept.
    Method: `> x` and one write around the limit, far beyond it and at absurd offsets."""
    if exists:
        shell.store.write(f"{WHERE}/x", b"old")
    with shell.redirect("x") as file:
        assert shell.write(file, offset, written) == error
        assert len(shell.handle(file).written or b"") <= 4097
    value = shell.store_value("x")
    if error:
        assert value == (b"old" if exists else None)
    else:
        assert value == (bytes(offset) + written).removesuffix(b"\n")
    assert (shell.lookup("x") == 0) == (exists or not error)


def test_a_node_that_was_removed(shell: Shell) -> None:
    """Goal: writing to an open file does not bring back a node, let alone a device, that was removed meanwhile.
    Method: the guest removes it, or all above it, under files that are open to write, truncated, appended and new."""
    for place in ("data/d/x", "data/d"):
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND):
            shell.guest.write("data/d/x", b"1")
            file = shell.open("d/x", flags)
            shell.guest.rm(place)
            assert shell.write(file, 0, b"2", flags) == errno.ENOENT
            shell.close(file)
            assert shell.store_value("d/x") is None
        shell.guest.write("data/d/x", b"1")
        with shell.redirect("d/x"):
            shell.guest.rm(place)
        assert shell.store_value("d/x") is None
    shell.guest.write("data/d/x", b"1")
    with shell.redirect("d/new") as file:
        shell.guest.rm("data/d")
        assert shell.write(file, 0, b"2") == errno.ENOENT
    with pytest.raises(AssertionError, match="No such file"):
        shell.open("d/new", os.O_WRONLY)
    assert shell.store_value("d") is None


def test_a_new_file(shell: Shell) -> None:
    """Goal: a created file is there for everybody at the mount, and not yet in the store; closed without a write it is
    a node without value.  Method: touch, with looks in between: LOOKUP, listing, attributes, reading, O_EXCL."""
    shell.watch("x")
    with shell.redirect("x") as file:
        assert shell.lookup("x") == 0 and shell.names() == [".", "..", "x"]
        assert shell.store_value("x") is None and shell.read(file) == b""
        assert shell.create("x", os.O_WRONLY | os.O_EXCL) == errno.EEXIST
        assert shell.mkdir("x") == errno.EEXIST
        assert shell.read(shell.open("x", os.O_RDONLY)) == b""
    assert shell.store_value("x") == b"" and shell.seen == [b""]
    assert shell.create("x", os.O_WRONLY | os.O_EXCL) == errno.EEXIST
    assert shell.create("x", os.O_WRONLY) == 0, "without O_EXCL an old one is opened"
    assert shell.names() == [".", "..", "x"]


def test_a_new_file_that_was_removed(shell: Shell) -> None:
    """Goal: `rm` of a file that is not in the store yet makes it never be there.  Method: create, unlink, close."""
    with shell.redirect("x") as file:
        assert shell.unlink("x") == 0
        assert shell.lookup("x") == errno.ENOENT and shell.names() == [".", ".."]
        assert shell.write(file, 0, b"1") == errno.ENOENT
    assert shell.store_value("x") is None


def test_a_new_file_that_the_guest_made_too(shell: Shell) -> None:
    """Goal: a guest that is faster keeps its value and its permissions unless we write.  Method: both orders."""
    with shell.redirect("x"):
        shell.guest.write("data/x", b"guest")
        assert shell.names() == [".", "..", "x"]
    assert shell.store_value("x") == b"guest"
    with shell.redirect("y") as file:
        shell.guest.write("data/y", b"guest")
        assert shell.write(file, 0, b"ours\n") == 0
    assert shell.store_value("y") == b"ours"
    assert [str(perm) for perm in shell.store.get_perms(f"{WHERE}/y")] == ["n1"]


def test_nothing_is_kept_of_closed_files(shell: Shell) -> None:
    """Goal: files that were opened, written, refused or abandoned leave nothing behind.  Method: what the tree remembers."""
    for i in range(20):
        for written in (b"", b"1\n", b"v" * 5000):
            with shell.redirect(f"n{i}") as file:
                if written:
                    shell.write(file, 0, written)
        shell.close(shell.open(f"n{i}", os.O_WRONLY))
    assert shell.tree._unborn == {} and shell.kernel.session.handles == {}
    assert all(not getattr(node, "fresh", None) for node in shell.tree._nodes.values())


@pytest.mark.parametrize("error", XsErrno)
def test_errors_keep_their_names(error: XsErrno) -> None:
    """Goal: each error of the store is the errno of its name, not 0 and not EIO.  Method: raise all of them."""
    with pytest.raises(OSError, match="why") as caught, _errnos():
        raise XsError(error, "why")
    assert errno.errorcode[caught.value.errno] == error.value


def test_a_store_that_is_gone(shell: Shell) -> None:
    """Goal: when the world ends under an open file its users get errors, not silence.  Method: close the connection."""
    file = shell.open("x", os.O_WRONLY | os.O_CREAT)
    shell.tree.connection.close()
    assert shell.write(file, 0, b"1") == errno.EIO
    body = k.MKDIR_IN.pack(0o755, 0) + b"d\0"
    assert shell.kernel.call(k.FUSE_MKDIR, shell.here, body).error == errno.EIO
    for opcode in (k.FUSE_UNLINK, k.FUSE_RMDIR):
        assert shell.kernel.call(opcode, shell.here, b"y\0").error == errno.EIO
    assert shell.setxattr("", b"n0") == errno.EIO
    assert shell.kernel.call(k.FUSE_LOOKUP, shell.here, b"y\0").error == errno.ENOENT
    shell.close(file)
