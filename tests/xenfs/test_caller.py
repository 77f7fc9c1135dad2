"""Goal: the memory of the process that waits in an ioctl is reached completely or not at all, every failure has a name and a
sentence, and its name harms nobody.
Method: real processes that evaluate what the test asks for: buffers, names, threads; they are killed, too."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.xenfs.programs import PAGE, Program, refused
from xenfs import caller

REPOSITORY = Path(__file__).resolve().parents[2]
NOBODY = 65534


@pytest.fixture
def program() -> Iterator[Program]:
    made = Program()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caller, "_SAID", set())


def everything(pid: int, address: int, size: int) -> list[Callable[[], object]]:
    """Each way to reach memory."""
    return [*reads(pid, address, size), *writes(pid, address, size)]


def reads(pid: int, address: int, size: int) -> list[Callable[[], object]]:
    return [
        lambda: caller.read(pid, address, size),
        lambda: caller.transfer_in(pid, [(address, memoryview(bytearray(size)))]),
    ]


def writes(pid: int, address: int, size: int) -> list[Callable[[], object]]:
    return [
        lambda: caller.write(pid, address, bytes(size)),
        lambda: caller.transfer_out(pid, [(memoryview(bytearray(size)), address)]),
    ]


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 16, PAGE - 1, PAGE, PAGE + 1, 100_000])
def test_round_trip(program, size):
    """Goal: what is written is there, and read again, and its neighbours are untouched.
    Method: sizes around a page at an odd address; the process looks itself."""
    address = program("keep.append(ctypes.create_string_buffer(b'.' * 200_000)) or ctypes.addressof(keep[0])") + 4001
    data = os.urandom(size)
    caller.write(program.pid, address, data)
    assert program(f"ctypes.string_at({address - 1}, {size + 2})") == b"." + data + b"."
    assert caller.read(program.pid, address, size) == data
    program(f"ctypes.memset({address}, 90, {size})")
    assert caller.read(program.pid, address - 1, size + 2) == b"." + b"Z" * size + b"."


def test_many_pieces(program):
    """Goal: bulk transfers take more pieces than one system call does, empty ones, and read-only sources; not read-only
    destinations.  Method: 2500 pieces with gaps, in and out."""
    base, count = program("pages(8)"), 2500
    data = [os.urandom(i % 5) for i in range(count)]
    caller.transfer_out(program.pid, [(memoryview(part), base + 10 * i) for i, part in enumerate(data)])
    whole = program(f"ctypes.string_at({base}, {10 * count})")
    assert whole == b"".join(part.ljust(10, b"\0") for part in data)
    back = [bytearray(len(part)) for part in data]
    caller.transfer_in(program.pid, [(base + 10 * i, memoryview(part)) for i, part in enumerate(back)])
    assert back == data
    caller.transfer_in(program.pid, [])
    words = memoryview(bytearray(16)).cast("I")  # size and count differ
    caller.transfer_in(program.pid, [(base, words)])
    assert words.tobytes() == whole[:16]
    with pytest.raises(TypeError):
        caller.transfer_in(program.pid, [(base, memoryview(bytes(4)))])


def test_of_a_thread(program):
    """Goal: a thread's id is as good as its process's, and its process can be told.  Method: a second thread that waits."""
    program("keep.append(threading.Event())")
    program("keep.append(threading.Thread(target=keep[0].wait, daemon=True)) or keep[1].start()")
    thread = program("keep[1].native_id")
    address = program("pages(1)")
    assert thread != program.pid
    caller.write(thread, address, b"from a thread")
    assert caller.read(thread, address, 13) == b"from a thread" == program(f"ctypes.string_at({address}, 13)")
    assert caller.look(thread).tgid == caller.look(program.pid).tgid == program.pid
    assert caller.look(thread).name.endswith(f"[{program.pid}]")


def test_first_thread_ended(program):
    """Goal: a process whose first thread is over is not taken for one that has no mappings.
    Method: that thread ends alone; another one lives."""
    fd = program("memfd(1)")
    file, base = program(f"identity({fd})"), program(f"shared({fd}, 0, 1)")
    program("keep.append(threading.Thread(target=threading.Event().wait)) or keep[0].start()")
    thread = program("keep[0].native_id")
    program("print(0, flush=True) or libc.syscall({'x86_64': 60, 'aarch64': 93}[os.uname().machine], 0)")  # exit(2)
    while Path(f"/proc/{program.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.001)
    assert refused(lambda: caller.mapped(program.pid, *file)).errno == errno.ESRCH
    assert refused(lambda: caller.mapping_at(program.pid, base, *file)).errno == errno.ESRCH
    assert caller.mapped(thread, *file) == [(base, base + PAGE, 0)]
    assert caller.read(thread, base, 8) == bytes(8) and caller.look(thread).tgid == program.pid


@pytest.mark.parametrize("size", [2, 16, PAGE, PAGE + 1, 3 * PAGE])
def test_second_page_missing(program, size):
    """Goal: a pointer whose first page is good is as bad as any, also deep in a list.  Method: a hole behind a page."""
    base = program("pages(8)")
    program(f"libc.munmap({base + 4 * PAGE}, {4 * PAGE})")
    at = base + 4 * PAGE - size + 1
    for call in everything(program.pid, at, size):
        error = refused(call)
        assert error.errno == errno.EFAULT
        assert error.strerror.startswith(f"{caller.look(program.pid).name}: {size} bytes at {at:#x} cannot be ")
    caller.write(program.pid, at, bytes(size - 1))
    good, bad = (base, memoryview(bytearray(1))), (at, memoryview(bytearray(size)))
    pieces = [*[good] * 1500, bad, good]
    assert refused(lambda: caller.transfer_in(program.pid, pieces)).errno == errno.EFAULT
    outward = [(view, address) for address, view in pieces]
    assert refused(lambda: caller.transfer_out(program.pid, outward)).errno == errno.EFAULT


@pytest.mark.parametrize("address", [0, 8, 1 << 47, 0xFFFF_8000_0000_0000, (1 << 64) - PAGE, (1 << 64) - 8, (1 << 64) + 8])
@pytest.mark.parametrize("size", [8, 16, 2 * PAGE])
def test_wild_pointers(program, address, size):
    """Goal: any number may come as a pointer.  Method: zero, the kernel's half, and the end of the address space."""
    for call in everything(program.pid, address, size):
        assert refused(call).errno == errno.EFAULT


def test_protection(program):
    """Goal: we may do what the process may do.  Method: a page it may only read, and one it may not even read."""
    base = program("pages(2)")
    program(f"ctypes.memmove({base}, b'constant', 8)")
    program(f"libc.mprotect({base}, PAGE, 1), libc.mprotect({base + PAGE}, PAGE, 0)")
    assert caller.read(program.pid, base, 8) == b"constant"
    bad = [*writes(program.pid, base, 8), *everything(program.pid, base + PAGE, 8), *reads(program.pid, base + PAGE - 4, 8)]
    for call in bad:
        assert refused(call).errno == errno.EFAULT
    assert program(f"ctypes.string_at({base}, 8)") == b"constant"


# -- who it is -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reaped", [False, True])
def test_ended(program, reaped):
    """Goal: ESRCH once it has ended, whatever is asked.  Method: SIGKILL; as a zombie, and reaped."""
    fd = program("memfd(1)")
    device, inode = program(f"identity({fd})")
    base = program(f"shared({fd}, 0, 1)")
    assert caller.mapped(program.pid, device, inode) == [(base, base + PAGE, 0)]
    program.process.kill()
    os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
    if reaped:
        program.process.wait()
        assert caller.look(program.pid).name == f"?[{program.pid}]"
    for call in [
        *everything(program.pid, base, 8),
        lambda: caller.mapped(program.pid, device, inode),
        lambda: caller.mapping_at(program.pid, base, device, inode),
    ]:
        error = refused(call)
        assert (error.errno, error.strerror) == (errno.ESRCH, f"{caller.look(program.pid).name} has ended")


def test_unseen(caplog):
    """Goal: a caller in a pid namespace that is not ours is told apart.  Method: pid 0, which is how FUSE shows him."""
    for call in [*everything(0, PAGE, 8), lambda: caller.mapped(0, 1, 1), lambda: caller.mapping_at(0, PAGE, 1, 1)]:
        error = refused(call)
        assert error.errno == errno.ESRCH
        assert error.strerror.startswith("a caller is in a pid namespace that xenfs cannot see: ")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caller.look(0).name == "?[0]" and caller.look(0).tgid == 0


def test_said_once(program, caplog):
    """Goal: a program with a bad pointer cannot fill the log.  Method: many failures of two kinds."""
    caplog.set_level(logging.DEBUG, "xenfs.caller")
    for _ in range(20):
        refused(lambda: caller.read(program.pid, 0, 8))
        refused(lambda: caller.write(program.pid, 0, bytes(8)))
        refused(lambda: caller.read(0, PAGE, 8))
    assert [(record.name, record.levelname) for record in caplog.records] == [
        ("xenfs.caller", "INFO"),
        ("xenfs.caller", "WARNING"),
    ]


@pytest.mark.parametrize(
    "name, shown",
    [
        (b"xenconsoled", "xenconsoled"),
        (b"fifteen-letters-and-more", "fifteen-letters"),
        (b"\x1b[2J\x07\x7f\xff\xc3\xa9 x", "?[2J??????x"),
        (b"a\nTgid:\t1\nb", "a\\nTgid:?1\\nb"),
        (b"Name:\tinit[1]", "Name:?init[1]"),
        (b"\\" * 15, "\\" * 15),
    ],
)
def test_names(program, name, shown):
    """Goal: a process cannot harm a table with its name.  Method: prctl(PR_SET_NAME) with all sorts of bytes."""
    program(f"libc.prctl(15, {name!r})")
    assert caller.look(program.pid).name == f"{shown}[{program.pid}]"


STRANGER = """
import logging, sys
logging.basicConfig(format="%(levelname)s %(name)s %(message)s", stream=sys.stdout)
from xenfs import caller
pid, address = map(int, sys.argv[1:])
for call in (
    lambda: caller.read(pid, address, 8),
    lambda: caller.write(pid, address, b"intruder"),
    lambda: caller.transfer_in(pid, [(address, memoryview(bytearray(8)))]),
    lambda: caller.mapped(pid, 1, 1),
    lambda: caller.mapping_at(pid, address, 1, 1),
):
    try:
        print("done", call())
    except OSError as error:
        print(error.errno, error.strerror)
print(caller.look(pid).name)
"""


@pytest.mark.host
def test_another_user(program):
    """Goal: no right, no access, and a sentence about what to do.  Method: the reader is uid 65534."""
    address = program("pages(1)")
    done = subprocess.run(
        ["/usr/bin/python3", "-c", STRANGER, str(program.pid), str(address)],
        env={"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"},
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=30,
    )
    who = caller.look(program.pid).name
    why = "another user, a user namespace, or kernel.yama.ptrace_scope"
    sentence = f"xenfs may not reach the memory of {who} ({why}): run the program as the user of xenfs, or xenfs as root"
    said, *errors, name = done.stdout.splitlines()
    assert said == f"WARNING xenfs.caller {sentence} (said once)"
    assert errors == [f"{errno.EPERM} {sentence}"] * 5
    assert (name, done.stderr) == (who, "")
    assert program(f"ctypes.string_at({address}, 8)") == bytes(8)


def test_bulk_in_threads(program):
    """Goal: bulk transfers do not disturb one another or the small path.  Method: threads that move different bytes."""
    base, wrong = program("pages(64)"), []

    def move(number: int) -> None:
        data, back = bytearray(os.urandom(8 * PAGE)), bytearray(8 * PAGE)
        for _ in range(100):
            caller.transfer_out(program.pid, [(memoryview(data), base + number * 8 * PAGE)])
            caller.transfer_in(program.pid, [(base + number * 8 * PAGE, memoryview(back))])
            if back != data:
                wrong.append(number)

    threads = [threading.Thread(target=move, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    at = base + 40 * PAGE
    while any(thread.is_alive() for thread in threads):
        caller.write(program.pid, at, word := os.urandom(16))
        assert caller.read(program.pid, at, 16) == word
    assert wrong == []
