"""Goal: the store can be looked at and changed with nothing but the shell's tools, on a real mount.
Method: `xenfs up` in a child; sh, coreutils and Python as others; xenstored's socket says what the store has."""

from __future__ import annotations

import contextlib
import sys
import textwrap
from pathlib import Path

import pytest

from tests.host.served import Host, Served
from xenfs.storeclient import StoreClient
from xenmodel.xenstore.errors import XsErrno, XsError

pytestmark = pytest.mark.host

HOME = "/local/domain/1"

WATCHER = """if 1:
    import sys
    from xenfs.storeclient import StoreClient
    with StoreClient(sys.argv[1]) as client:
        client.watch(sys.argv[2], "t")
        while (event := client.wait(30)) is not None:
            try:
                value = client.read(event.path).decode()
            except Exception as error:
                value = type(error).__name__
            print(f"<{value}>", flush=True)
            if value == "end":
                break
"""


STEPS: list[tuple[str, list[str]]] = [
    ("echo 1 > w", ["1"]), ("echo 2 > w", ["2"]), ("cat w", []), ("printf 3 > w", ["3"]), (": > w", [""]),
    ("echo 4 | tee w", ["4"]), ("touch w", []), ("rm w", ["XsError"]), ("touch w", [""]), ("echo 5 > other", []),
    ("cp other w", ["5"]), ("rm w", ["XsError"]), ("cp other w", ["5"]),
    ("chmod o+r w", ["5"]), ("chmod o+r w", []), ("rm w", ["XsError"]),
    ("mv other w", ["5"]), ("echo end > w", ["end"]),
]  # fmt: skip


class Tree:
    """A served store with the guest `g`, and a shell in its control/ directory."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.server: Served = host.up(host.config("g"))
        self.socket = Path(f"{self.server.mnt}.xenstored")
        self.here = self.server.mnt / f"xenstore{HOME}/control"

    def sh(self, script: str) -> str:
        """What a script says; what it writes to stderr too."""
        return self.host.run("sh", "-c", f"cd {self.here} || exit\n{textwrap.dedent(script)}").stdout

    def value(self, path: str) -> bytes | None:
        with StoreClient(self.socket) as client:
            try:
                return client.read(f"{HOME}/control/{path}")
            except XsError as error:
                assert error.errno is XsErrno.ENOENT
                return None

    def perms(self, path: str) -> list[str]:
        with StoreClient(self.socket) as client:
            return [str(perm) for perm in client.get_perms(f"{HOME}/control/{path}")]


@pytest.fixture
def tree(host) -> Tree:
    return Tree(host)


def test_values(tree):
    """Goal: what the shell writes is the value, without the newline that echo adds; what it reads is exact.
    Method: echo, printf, cat, tee, dd, touch, `>`, `>>`, truncate and several commands in one redirection."""
    script = """\
        echo 4 > old; echo 5 > old; echo new > n; printf 'a\\n\\n' > keeps; printf '' > p; touch t
        : > empty; echo x > emptied; : > emptied; echo a >> adds; echo b >> adds
        (echo 1; echo 2; sleep 0.1; echo 3) > many; echo teed | tee tee1 tee2 > /dev/null
        echo abcdef > short; truncate -s 3 short
        echo abc > bytes; printf X | dd of=bytes bs=1 seek=1 conv=notrunc status=none
        echo old > noclobber; set -C; echo 2> /dev/null new > noclobber; set +C
        cat old n keeps p t empty emptied adds many tee1 tee2 short bytes noclobber | od -An -c | tr -d ' \\n'
        """
    assert tree.sh(script) == "5newa\\nab1\\n2\\n3teedteedabcaXcold"
    expected = {
        "old": b"5", "n": b"new", "keeps": b"a\n", "p": b"", "t": b"", "empty": b"", "emptied": b"", "adds": b"ab",
        "many": b"1\n2\n3", "tee1": b"teed", "tee2": b"teed", "short": b"abc", "bytes": b"aXc", "noclobber": b"old",
    }  # fmt: skip
    assert {name: tree.value(name) for name in expected} == expected
    tree.server.stop()


def test_a_watcher_sees_whole_values(tree):
    """Goal: each command is one change for who watches: `echo` shows no empty value, a copy no half one, cat none at all.
    Method: a process that watches and reads, while a shell writes old and new nodes in all ways."""
    watcher = tree.host.client(sys.executable, "-c", WATCHER, tree.socket, f"{HOME}/control/w")
    assert watcher.stdout is not None and watcher.stdout.readline() == "<XsError>\n"
    for command, values in STEPS:
        tree.sh(command)
        for value in values:
            assert watcher.stdout.readline() == f"<{value}>\n", command
    assert tree.host.finish(watcher).stdout == "", "nothing but that"
    tree.server.stop()


def test_directories(tree):
    """Goal: trees are made, listed, searched, copied out and in, moved and removed.
    Method: mkdir -p, ls -lR, find, grep -r, cp -r, diff -r, tar, mv, rmdir, rm -r."""
    out = tree.host.root / "out"
    script = f"""\
        mkdir -p d/e/f && touch d/e/f/g && echo 1 > d/e/f/h && echo 2 > d/.value && mkdir d/none
        find d | sort | tr '\\n' ' '; echo; grep -r . d | sort | tr '\\n' ' '; echo
        ls -lAR d | grep -c '^[d-]rw'
        cp -r d {out} && diff -r d {out} && cp -r {out} back && diff -r back {out} && tar cf - d | tar xf - -C {out}
        diff -r d {out}/d && echo same
        mv d/e/f/h d/e/x && mv d moved && find moved -type f -size -2 | sort | tr '\\n' ' '; echo
        rmdir moved; rmdir moved/none && rm -r moved back && ls
        """
    before = tree.sh("ls").split()
    said = tree.sh(script).splitlines()
    assert said == [
        "d d/.value d/e d/e/f d/e/f/g d/e/f/h d/none ",
        "d/.value:2 d/e/f/h:1 ",
        "6",
        "same",
        "moved/.value moved/e/f/g moved/e/x ",
        "rmdir: failed to remove 'moved': Directory not empty",
        *before,
    ]
    assert tree.value("moved") is None and (out / "e/f/h").read_bytes() == b"1"
    tree.server.stop()


ERRORS = {
    "echo 1 > a.b": "cannot create a.b: Invalid argument",
    "mkdir 'a b'": "Invalid argument",
    "mkdir full": "File exists",
    "mkdir file": "File exists",
    "echo 1 > full": "Is a directory",
    "rmdir full": "Directory not empty",
    "rmdir file": "Not a directory",
    "unlink full": "Is a directory",
    "rm nothing": "No such file or directory",
    "echo 1 > no/thing": "Directory nonexistent",
    "mkdir file/x": "Not a directory",
    "ln -s file link": "Operation not permitted",
    "ln file link": "Operation not permitted",
    "mkfifo pipe": "Operation not permitted",
    "chown 4711 file": "Operation not permitted",
    "head -c 4090 /dev/zero > file": "Argument list too long",
    "head -c 9999 /dev/zero | dd of=file bs=9999 iflag=fullblock": "File too large",
    "cat full": "Is a directory",
}


def test_errors(tree):
    """Goal: what cannot be is refused to the command that tried, in words that fit, and changes nothing.
    Method: one command per reason; the tree before and after."""
    tree.sh("mkdir full; echo 1 > full/x; echo 2 > file")
    before = tree.sh("grep -r .")
    for command, words in ERRORS.items():
        said = tree.sh(f"{command}; echo $?")
        assert words in said and said.splitlines()[-1] != "0", f"{command}: {said}"
    assert tree.sh("grep -r .") == before
    tree.server.stop()


def test_permissions(tree):
    """Goal: chmod, and the xattr for all of it, are the node's permissions; cp -p and mv of a node take them along.
    Method: chmod with letters and numbers, os.setxattr in another process, stat; the store's own list."""
    assert tree.sh("echo 1 > f; mkdir d; stat -c %A f d .").split() == ["-rw-------", "drwx-----x", "drwx-----x"]
    modes = {"o+r": "r", "o=rw": "b", "o-r": "w", "600": "n", "664": "r", "u+x,g+w": "r", "o=": "n"}
    for mode, letter in modes.items():
        tree.sh(f"chmod {mode} f d")
        assert tree.perms("f") == tree.perms("d") == [f"{letter}0", "r1"]
    code = """if 1:
        import os, sys
        os.chdir(sys.argv[1])
        os.setxattr("f", "user.xenstore.perms", b"n0,r1,b2")
        print(os.listxattr("f"), os.getxattr("f", "user.xenstore.perms"), os.listxattr("."))
        for name, value in (("user.xenstore.perms", b"nobody"), ("user.other", b"1")):
            try:
                os.setxattr("f", name, value)
            except OSError as error:
                print(error.strerror)
    """
    listed = "['user.xenstore.perms']"
    said = tree.host.python(code, tree.here).splitlines()
    assert said == [f"{listed} b'n0,r1,b2' {listed}", "Invalid argument", "Operation not supported"]
    assert tree.sh("cp -p --preserve=xattr f copied; mv f moved; ls -1 copied moved; touch copied") == "copied\nmoved\n"
    assert tree.perms("copied") == tree.perms("moved") == ["n0", "r1", "b2"]
    tree.server.stop()


def test_writers_at_the_same_time(tree):
    """Goal: each append is added whole, whoever else appends; a directory that is filled and emptied stays in order.
    Method: four shells append to one node, four others make and remove trees side by side."""
    append = "for i in $(seq 50); do printf $0 >> log; done"
    appends = [tree.host.client("sh", "-c", f"cd {tree.here}; {append}", letter) for letter in "abcd"]
    trees = "for i in $(seq 20); do mkdir -p t/x$0/y && echo $0 > t/x$0/y/z && rm -r t/x$0 || exit 1; done"
    makers = [tree.host.client("sh", "-c", f"cd {tree.here}; {trees}", str(i)) for i in range(4)]
    done = [tree.host.finish(process) for process in (*appends, *makers)]
    assert [(each.returncode, each.stdout) for each in done] == [(0, "")] * 8
    assert sorted(tree.value("log") or b"") == sorted(b"abcd" * 50)
    assert tree.sh("ls -A t; rmdir t") == "" and tree.value("t") is None
    tree.server.stop()


MAPPED = """if 1:
    import mmap, os, sys
    first = os.open(sys.argv[1], os.O_RDWR)
    mapped = mmap.mmap(first, 1 << 20)
    mapped[0:4] = b"kept"
    second = os.open(sys.argv[1], os.O_RDWR | os.O_TRUNC)
    assert mapped[8192:8196] == bytes(4)  # SIGBUS if the kernel took the file as empty
    print(mapped[0:4], os.pread(second, 4, 0), os.fstat(second).st_size)
    mapped.flush()
    os.posix_fadvise(first, 0, 0, os.POSIX_FADV_DONTNEED)
    print(os.pread(second, 4, 0))
"""


def test_a_disk_ignores_o_trunc(host):
    """Goal: O_TRUNC, which means something for the store's files, has no effect on a disk, also not on what a program has
    written to it through a mapping and the kernel has not written back.
    Method: map and change the disk, open it with O_TRUNC, look through all of them; then dd, which opens so."""
    server = host.disk()
    assert host.python(MAPPED, server.disk()).splitlines() == [f"b'kept' b'kept' {8 << 20}", "b'kept'"]
    host.check("sh", "-c", f"printf 1234 | dd of={server.disk()} bs=4 seek=0 status=none; cat < {server.disk()} | wc -c")
    assert host.check("head", "-c", "6", server.disk()) == "1234\0\0"
    assert host.check("stat", "-c", "%s", server.disk()) == f"{8 << 20}\n"
    server.stop()


def test_polling(host):
    """Goal: poll, select and epoll of any file below the mount answer at once where nothing is waited for.
    Method: another process polls a disk, a value and a text with no time to wait."""
    server = host.disk()
    code = """if 1:
        import os, select, sys
        for path in sys.argv[1:]:
            fd = os.open(path, os.O_RDONLY)
            poller, epoll = select.poll(), select.epoll()
            poller.register(fd, select.POLLIN | select.POLLOUT)
            epoll.register(fd, select.EPOLLIN)
            print([r for _, r in poller.poll(0)], [r for _, r in epoll.poll(0)], len(select.select([fd], [fd], [], 0)[1]))
    """
    paths = [server.disk(), server.mnt / f"xenstore{HOME}/name", server.mnt / "domains/g/name"]
    assert host.python(code, *paths).splitlines() == ["[5] [1] 1"] * 3
    server.stop()


def test_many_nodes_of_a_guest(tree):
    """Goal: a guest that fills its quota, and goes on changing things, neither stops nor fools a walk over its nodes.
    Method: nodes as domain 1 would make them, some with names no file can have, while find, ls -lR and rm -r run."""
    place = f"{HOME}/control/many"
    with StoreClient(tree.socket) as client:
        for i in range(300):
            client.write(f"{place}/d{i % 7}/n{i}", b"%d" % i)
        client.write(f"{place}/d0/{'n' * 300}/x", b"hidden")
        walker = tree.host.client("sh", "-c", f"cd {tree.here}/many; for i in 1 2 3; do ls -lR . && find . -type f; done")
        for i in range(300):
            with contextlib.suppress(XsError):
                client.rm(f"{place}/d{i % 7}/n{i}")
                client.write(f"{place}/d{i % 7}/n{i}/deeper", b"1")
        tree.host.finish(walker)
    assert tree.sh("rm -r many; ls -d many") == "ls: cannot access 'many': No such file or directory\n"
    assert tree.value("many") is None
    tree.server.stop()
