"""What the tests of dev/xen/gntdev and gntalloc share: a program's side of the files, with ioctls as the kernel
passes them on.

`GrantDesk` has the nodes of domains 0 to 3 in one mount, and a process that calls: structures are in its memory, where the
nodes have to fetch them, and what it maps is the arena's file, which here stands for the node's own (as FUSE_PASSTHROUGH
would have it). `GrantProgram` is one open.
"""

from __future__ import annotations

import mmap
import os
import select
import subprocess
import sys
from struct import pack, unpack
from types import TracebackType

from sysdev.gntcopy import SEGMENT
from tests.sysdev.granting import Grants, Ref
from tests.xenfs.evtchnfile import Answer
from tests.xenfs.machine import Kernel, Reply
from tests.xenfs.programs import PAGE, PROGRAM, Program
from xenfs.calls import Calls, DomainCalls
from xenfs.fuse import kernel as k
from xenfs.fuse.tree import Directory
from xenfs.nodes.gntdev import GNTALLOC, GNTDEV, GrantFile, GrantNode

LINUX = {
    "map": 0x00184700, "unmap": 0x00104701, "offset": 0x00184702, "max": 0x00044703, "notify": 0x00104707,
    "copy": 0x00104708, "alloc": 0x00184705, "dealloc": 0x00104706,
}  # fmt: skip
FREEBSD = {
    "notify": 0x80104500, "alloc": 0xC0184501, "dealloc": 0x80104502, "map": 0xC0184503, "unmap": 0x80104504,
    "offset": 0xC0184505,
}  # fmt: skip
FREEBSD_ON_LINUX = FREEBSD | {"notify": 0x40104500, "dealloc": 0x40104502, "unmap": 0x40104504}
SETS = {"linux": LINUX, "freebsd": FREEBSD, "freebsd on linux": FREEBSD_ON_LINUX}

HANGS_MS = 10_000
FROM, TO, CLEAR, SEND = 1, 2, 1, 2  # flags of a segment, actions of a notification


class Caller(Program):
    """The process. Of its memory `at` to `edge` is writable, from `edge` on is nothing; the page at `readonly` is what it
    says. We write there through a file of our own."""

    def __init__(self, arena_fd: int, pages: int = 8) -> None:
        self.arena_fd = arena_fd
        memory_fd = os.memfd_create("memory")
        os.ftruncate(memory_fd, (pages + 1) * PAGE)
        self.map = mmap.mmap(memory_fd, (pages + 1) * PAGE)
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", PROGRAM], stdin=-1, stdout=-1, text=True, pass_fds=(arena_fd, memory_fd)
        )
        self.pid = self.process.pid
        self.readonly = int(self(f"pages({pages + 2})"))
        self.at, self.edge = self.readonly + PAGE, self.readonly + (pages + 1) * PAGE
        self(f"shared({memory_fd}, 0, {pages + 1}, {self.readonly})")
        self(f"libc.mprotect({self.readonly}, PAGE, 1)")
        self(f"libc.munmap({self.edge}, PAGE)")
        os.close(memory_fd)

    def put(self, address: int, data: bytes) -> int:
        self.map[address - self.readonly : address - self.readonly + len(data)] = data
        return address

    def get(self, address: int, length: int) -> bytes:
        return self.map[address - self.readonly : address - self.readonly + length]

    def close(self) -> None:
        super().close()
        self.map.close()


class Window:
    """Pages of the file that the process maps side by side: (index, count)s. We see the first of these in `map`. Use it in
    `with`."""

    def __init__(self, process: Caller, parts: list[tuple[int, int]]) -> None:
        self.process = process
        self.size = sum(count for _, count in parts) * PAGE
        self.at = address = int(process(f"pages({self.size // PAGE})"))
        for index, count in parts:
            process(f"shared({process.arena_fd}, {index // PAGE}, {count}, {address})")
            address += count * PAGE
        index, count = parts[0]
        self.map = mmap.mmap(process.arena_fd, count * PAGE, offset=index)

    def __enter__(self) -> Window:
        return self

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        self.process(f"libc.munmap({self.at}, {self.size})")
        self.map.close()


class GrantProgram:
    """One open of a domain's device, `which` is gntdev or gntalloc; `uid` decides whether threads reach for its memory."""

    def __init__(self, desk: GrantDesk, domid: int, which: str = "gntdev", numbers: dict[str, int] = LINUX) -> None:
        self.desk, self.kernel, self.memory, self.numbers = desk, desk.kernel, desk.memory, numbers
        self.uid = os.geteuid()
        self.ino = desk.walk(which, domid)
        self.fh = self.kernel.handle(f"{which}{domid}", os.O_RDWR)
        node = self.kernel.session.handles[self.fh]
        assert isinstance(node, GrantFile)
        self.file = node

    def send(self, command: int, arg: int, data: bytes = b"", out_size: int = 0, pid: int | None = None) -> int:
        kernel = self.kernel
        kernel.unique += 2
        body = k.IOCTL_IN.pack(self.fh, 0, command, arg, len(data), out_size) + data
        caller = self.memory.pid if pid is None else pid
        length = k.IN_HEADER.size + len(body)
        kernel.put(k.IN_HEADER.pack(length, k.FUSE_IOCTL, kernel.unique, 0, self.uid, 0, caller, 0, 0) + body)
        return kernel.unique

    def answer(self, unique: int, out_size: int = 0) -> Answer:
        reply = self.kernel.wait(unique)
        if reply.error:
            return Answer(reply.error)
        result, flags, ins, outs = k.IOCTL_OUT.unpack_from(reply.data)
        back = reply.data[k.IOCTL_OUT.size :]
        assert (flags, ins, outs) == (0, 0, 0) and len(back) <= out_size
        return Answer(0, result, back)

    def raw(self, command: int, arg: int, data: bytes = b"", out_size: int = 0, pid: int | None = None) -> Answer:
        return self.answer(self.send(command, arg, data, out_size, pid), out_size)

    def ioctl(self, name: str, structure: bytes, at: int | None = None) -> Answer:
        """What ioctl(2) makes of it: Linux copies in and out as the two upper bits say. The structure is at `at`."""
        command, arg = self.numbers[name], self.memory.at if at is None else at
        size = command >> 16 & 0x3FFF
        self.memory.put(arg, structure)
        answer = self.raw(command, arg, structure[:size] if command & 1 << 30 else b"", size if command & 1 << 31 else 0)
        if answer.data:
            self.memory.put(arg, answer.data)
        return answer

    # --- as the libraries call them: what comes out, or -errno ----------------------------------------------------------

    @property
    def is_linux(self) -> bool:
        return self.numbers is LINUX

    def map(self, *refs: Ref) -> int:
        packed = b"".join(pack("<II", *ref) for ref in refs)
        behind = packed if self.is_linux else pack("<Q", self.memory.put(self.memory.at + PAGE, packed))
        answer = self.ioctl("map", pack("<IIQ", len(refs), 0xAAAAAAAA, 0) + behind)
        return -answer.error or int(unpack("<Q", self.memory.get(self.memory.at + 8, 8))[0])

    def unmap(self, index: int, count: int) -> int:
        answer = self.ioctl("unmap", pack("<QII", index, count, 0xAAAAAAAA))
        return -answer.error or answer.result

    def offset(self, vaddr: int) -> tuple[int, int] | int:
        answer = self.ioctl("offset", pack("<QQII", vaddr, 0, 0, 0))
        index, count = unpack("<QI", self.memory.get(self.memory.at + 8, 12))
        return -answer.error or (index, count)

    def notify(self, index: int, action: int, port: int = 0) -> int:
        answer = self.ioctl("notify", pack("<QII", index, action, port))
        return -answer.error or answer.result

    def copy(self, *segments: bytes) -> list[int] | int:
        """The segments' statuses."""
        where = self.memory.put(self.memory.at + PAGE, b"".join(segments))
        answer = self.ioctl("copy", pack("<IIQ", len(segments), 0xAAAAAAAA, where))
        statuses = [unpack("<h", self.memory.get(where + 24 * at + 20, 2))[0] for at in range(len(segments))]
        return -answer.error or statuses

    def alloc(self, domid: int, flags: int, count: int) -> tuple[int, list[int]] | int:
        refs_at = self.memory.at + (16 if self.is_linux else PAGE)
        behind = b"" if self.is_linux else pack("<Q", refs_at)
        answer = self.ioctl("alloc", pack("<HHIQ", domid, flags, count, 0) + behind)
        if answer.error:
            return -answer.error
        (index,) = unpack("<Q", self.memory.get(self.memory.at + 8, 8))
        return index, list(unpack(f"<{count}I", self.memory.get(refs_at, 4 * count)))

    def dealloc(self, index: int, count: int) -> int:
        answer = self.ioctl("dealloc", pack("<QII", index, count, 0xAAAAAAAA))
        return -answer.error or answer.result

    def release(self) -> None:
        assert self.kernel.call(k.FUSE_RELEASE, 0, k.RELEASE_IN.pack(self.fh, 0, 0, 0)) == Reply(0, b"")


class GrantDesk:
    """Leave it by `with`: nothing may be left over that violates the devices' invariants."""

    def __init__(self, limit: int = 1024) -> None:
        self.grants = grants = Grants(limit=limit)
        self.calls = Calls()
        self.arena = grants.arena
        self.memory = Caller(self.arena.fd)
        self.arena.filling = lambda: [*grants.places(), *self.calls.filling()]
        self.arena.backing_id = 7
        status = os.fstat(self.arena.fd)
        self.arena.device, self.ino = status.st_dev, status.st_ino
        self.domain_calls = {domid: DomainCalls(self.calls, domid) for domid in grants.domains}
        self.nodes = {
            f"{name}{domid}": GrantNode(
                grants.gntdev[domid], grants.gntalloc[domid], self.arena, self.domain_calls[domid], commands
            )
            for domid in grants.domains
            for name, commands in (("gntdev", GNTDEV), ("gntalloc", GNTALLOC))
        }
        self.kernel = Kernel(Directory(dict(self.nodes)))
        self.kernel.settle = self.settle  # type: ignore[method-assign]

    def settle(self) -> None:
        """Until no job is under way."""
        done = select.poll()
        done.register(self.calls.fd, select.POLLIN)
        while any(calls.under_way for calls in self.domain_calls.values()):
            if not self.calls.step():
                busy = any(calls.under_way for calls in self.domain_calls.values())
                assert not busy or done.poll(HANGS_MS), "an ioctl hangs"
        self.grants.hypervisor.settle()

    def walk(self, which: str, domid: int) -> int:
        """The node's inode; from now on the arena's file passes for the node's."""
        ino = self.kernel.walk(f"{which}{domid}")
        self.nodes[f"{which}{domid}"].ino = self.ino
        return ino

    def open(self, domid: int, which: str = "gntdev", numbers: dict[str, int] = LINUX) -> GrantProgram:
        return GrantProgram(self, domid, which, numbers)

    def see(self, index: int, count: int = 1) -> Window:
        return Window(self.memory, [(index, count)])

    def __enter__(self) -> GrantDesk:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            assert kind is not None or self.grants.violations() == []
        finally:
            for calls in self.domain_calls.values():
                calls.close()
            self.grants.close()
            self.calls.close()
            self.memory.close()


def open_two(desk: GrantDesk, numbers: dict[str, int], far: int) -> tuple[GrantProgram, GrantProgram]:
    """gntdev and gntalloc of domain 1; FreeBSD has only one of them."""
    gntdev = desk.open(1, "gntdev", numbers)
    gntalloc = desk.open(1, "gntalloc", numbers) if numbers is LINUX else gntdev
    for program in (gntdev, gntalloc):
        program.uid = os.geteuid() + far
    return gntdev, gntalloc


def segment(source: int | tuple[int, int, int], dest: int | tuple[int, int, int], length: int) -> bytes:
    """A side is an address, or domid, reference, offset."""
    flags, sides = 0, []
    for side, flag in ((source, FROM), (dest, TO)):
        if isinstance(side, int):
            sides.append(side)
        else:
            flags |= flag
            sides.append(int.from_bytes(pack("<IHH", side[1], side[2], side[0]), "little"))
    return SEGMENT.pack(*sides, length, flags, 77)
