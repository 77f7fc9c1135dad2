"""Goal: dev/xen/gntdev and gntalloc are to programs what Linux's devices are, and FreeBSD's gntdev; what a program gets wrong
is an errno and leaves nothing.
Method: FUSE requests into a Session over the nodes of four domains; structures are in this process's memory, where threads
or the loop itself reach for them, and what is mapped is mapped here."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from struct import pack, unpack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sysdev.gntcopy import SEGMENT
from sysdev.gntdev import REFS_MOST
from tests.abi.headers import run_c
from tests.sysdev.granting import Ref
from tests.xenfs.evtchnfile import Answer
from tests.xenfs.grantfile import FREEBSD, LINUX, PAGE, SETS, GrantDesk, GrantProgram, Window
from tests.xenfs.machine import Reply
from xenfs.fuse import kernel as k
from xenfs.nodes.evtchn import CALLS
from xenfs.nodes.gntdev import GNTALLOC, GNTDEV, OPENS_MOST, SEGMENTS_MOST

EINVAL, ENOENT, ENOTTY = -errno.EINVAL, -errno.ENOENT, -errno.ENOTTY
FROM, TO, CLEAR, SEND = 1, 2, 1, 2
KERNEL = 0xFFFF_8000_0000_0000


@pytest.fixture
def desk() -> Iterator[GrantDesk]:
    with GrantDesk() as made:
        yield made


@pytest.fixture(params=["the loop", "threads"])
def far(request: pytest.FixtureRequest) -> int:
    """Who reaches for the caller's memory: threads do for other users."""
    return int(request.param == "threads")


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


# --- numbers -------------------------------------------------------------------------------------------------------------

C_FREEBSD = """
#include <sys/ioctl.h>
#include <xen/sys/evtchn.h>
#include <xen/sys/gntalloc.h>
#define BSD(direction, number, type) (unsigned)(direction | (sizeof(type) & 0x1fff) << 16 | 'E' << 8 | number)
#define BSD_IN 0x80000000u
#define BSD_INOUT 0xc0000000u
struct bsd_notify { uint64_t index; uint32_t action, port; };
struct bsd_alloc { uint16_t domid, flags; uint32_t count; uint64_t index; uint32_t *refs; };
struct bsd_range { uint64_t index; uint32_t count; };
struct bsd_map { uint32_t count, pad; uint64_t index; void *refs; };
struct bsd_offset { uint64_t vaddr, offset; uint32_t count; };
"""
C_LINUX = {
    "map": "IOCTL_GNTDEV_MAP_GRANT_REF", "unmap": "IOCTL_GNTDEV_UNMAP_GRANT_REF",
    "offset": "IOCTL_GNTDEV_GET_OFFSET_FOR_VADDR", "max": "IOCTL_GNTDEV_SET_MAX_GRANTS",
    "notify": "IOCTL_GNTDEV_SET_UNMAP_NOTIFY", "copy": "IOCTL_GNTDEV_GRANT_COPY",
    "alloc": "IOCTL_GNTALLOC_ALLOC_GREF", "dealloc": "IOCTL_GNTALLOC_DEALLOC_GREF",
    "notify of gntalloc": "IOCTL_GNTALLOC_SET_UNMAP_NOTIFY",
}  # fmt: skip
C_BSD = {
    "notify": (0, "notify"), "alloc": (1, "alloc"), "dealloc": (2, "range"), "map": (3, "map"), "unmap": (4, "range"),
    "offset": (5, "offset"),
}  # fmt: skip
C_EVTCHN = ("BIND_VIRQ", "BIND_INTERDOMAIN", "BIND_UNBOUND_PORT", "UNBIND", "NOTIFY", "RESET", "RESTRICT_DOMID")


def test_numbers():
    """Goal: the numbers are those of the C headers, and of FreeBSD's definition of _IOW and _IOWR; the nodes know no others.
    Method: a C program prints Linux's, and those of structures declared as FreeBSD's, also by Linux's macros."""
    lines = [f'printf("{name}\\t%u\\n", (unsigned)({macro}));' for name, macro in C_LINUX.items()]
    lines += [f'printf("evtchn {name}\\t%u\\n", (unsigned)IOCTL_EVTCHN_{name});' for name in C_EVTCHN]
    for name, (number, structure) in C_BSD.items():
        inout = name in ("alloc", "map", "offset")
        direction = "BSD_INOUT" if inout else "BSD_IN"
        lines.append(f'printf("bsd {name}\\t%u\\n", BSD({direction}, {number}, struct bsd_{structure}));')
        macro = f"_IOW{'R' if inout else ''}('E', {number}, struct bsd_{structure})"
        lines.append(f'printf("macro {name}\\t%u\\n", (unsigned){macro});')
    said = {name: int(text) for name, text in run_c("xen/sys/gntdev.h", lines, prologue=C_FREEBSD).items()}
    linux = {name: said[name] for name in LINUX}
    assert linux == LINUX and said["notify of gntalloc"] == LINUX["notify"]
    assert {name: said[f"bsd {name}"] for name in C_BSD} == FREEBSD
    assert {name: said[f"macro {name}"] for name in C_BSD} == SETS["freebsd on linux"]
    both = {said[f"{which} {name}"] for which in ("bsd", "macro") for name in C_BSD}
    assert set(GNTDEV) == both | {linux[name] for name in ("map", "unmap", "offset", "max", "notify", "copy")}
    assert set(GNTALLOC) == {linux[name] for name in ("alloc", "dealloc", "notify")}
    assert {said[f"evtchn {name}"] for name in C_EVTCHN} < set(CALLS)


@pytest.mark.parametrize("which", ["gntdev", "gntalloc"])
def test_unknown_ioctl(desk, which):
    """Goal: any other number is ENOTTY, also a number of the other device.  Method: near misses, DMABUF_*, TCGETS."""
    program = desk.open(1, which)
    others = {*GNTDEV, *GNTALLOC} - set(GNTDEV if which == "gntdev" else GNTALLOC)
    wrong = [number ^ bit for number in others for bit in (0, 1 << 16, 1 << 30)]
    for command in {0, 0x5401, 0xFFFFFFFF, 0x00144709, 0x00184704, 0x00044502, *wrong} - set(program.file.node.commands):
        assert program.raw(command, desk.memory.at, bytes(24), 24) == Answer(errno.ENOTTY), hex(command)


# --- all of them ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", SETS.values(), ids=SETS)
def test_map(desk, numbers, far):
    """Goal: MAP, GET_OFFSET_FOR_VADDR, SET_UNMAP_NOTIFY and UNMAP, as the library of either system calls them.
    Method: three pages of two domains, mapped here; a notification; what is held before and after; references that fill more
    than a page; the caller's name."""
    program, _ = open_two(desk, numbers, far)
    grants = desk.grants
    refs = [*grants.grant(2, 1, 2), *grants.grant(3, 1, 1)]
    one, port, other, peer = grants.pair(1, 2)
    before = grants.held()
    index = program.map(*refs)
    assert index > 0 and index % PAGE == 0
    mapping = grants.domains[1].maptrack.mappings[0]
    assert mapping.owner.endswith(f"[{os.getpid()}]") and not mapping.owner.startswith("?")
    with desk.see(index, 3) as window:
        for page, ref in enumerate(refs):
            assert window.map[page * PAGE : page * PAGE + 4] == bytes(grants.page(ref)[:4])
            assert program.offset(window.at + page * PAGE + page) == (index, 3)
        window.map[PAGE + 9 : PAGE + 12] = b"abc"
        assert program.notify(index + PAGE + 10, CLEAR | SEND, port) == 0
        assert grants.page(refs[1])[9:12] == b"abc" and grants.events(other) == []
        assert program.offset(desk.memory.at) == EINVAL and program.offset(0) == EINVAL
        assert program.offset(2**64 - 1) == EINVAL
        assert program.unmap(index, 2) == ENOENT and program.unmap(index, 3) == 0
        assert program.offset(window.at) == EINVAL
    assert grants.page(refs[1])[9:12] == b"a\0c" and grants.events(other) == [peer]
    assert grants.held() == before and one.unbind(port) == 0
    assert program.unmap(index, 3) == program.notify(index, CLEAR) == ENOENT
    many = desk.grants.grant(2, 1, 30) * 20
    assert program.map(*many) == -errno.EBUSY and grants.violations() == []
    assert program.map(*refs, (2, 10**6)) == program.map() == EINVAL


@pytest.mark.parametrize("numbers", SETS.values(), ids=SETS)
def test_alloc(desk, numbers, far):
    """Goal: ALLOC, SET_UNMAP_NOTIFY and DEALLOC, as the library of either system calls them: the pages live while they are
    mapped, and then while a peer maps them.
    Method: pages mapped here and by a program of domain 2; DEALLOC at once, then munmap, a sweep, and the peer's UNMAP."""
    _, program = open_two(desk, numbers, far)
    grants, device = desk.grants, desk.grants.gntalloc[1]
    one, port, other, peer = grants.pair(1, 2)
    grants.domains[1].grants.end_access(grants.domains[1].grants.grant_access(2, 0))
    before = grants.held()
    found = program.alloc(2, 1, 3)
    assert isinstance(found, tuple)
    index, refs = found
    assert [grants.entry((1, ref)).domid for ref in refs] == [2, 2, 2]
    with desk.see(index, 3) as window:
        assert program.notify(index + PAGE + 5, CLEAR | SEND, port) == 0
        assert program.dealloc(index, 2) == 0 and program.dealloc(index + 2 * PAGE, 1) == 0
        assert program.dealloc(index, 1) == EINVAL and program.notify(index, CLEAR) == ENOENT
        window.map[PAGE : PAGE + 10] = b"0123456789"
        reader = desk.open(2)
        mapped = reader.map(*((1, ref) for ref in refs))
        assert mapped == index and device.used == 3 and grants.events(other) == []
        desk.domain_calls[1].run(None, device.sweep())
        desk.settle()
        assert device.used == 3 and len(device.lingering) == 3
    desk.domain_calls[1].run(None, device.sweep())
    desk.settle()
    assert grants.events(other) == [peer] and not device.lingering and device.used == 3
    assert grants.page((1, refs[1]))[:10] == b"01234\x006789"
    assert reader.unmap(mapped, 3) == 0
    assert grants.held() == before and one.unbind(port) == 0
    assert program.alloc(2, 1, 2000) == -errno.ENOSPC and program.alloc(2, 1, 1000) == -errno.ENOMEM
    assert program.alloc(2, 1, 0) == (0, []) and program.dealloc(0, 0) == EINVAL


def test_copy(desk, far):
    """Goal: GRANT_COPY does both directions, with a status for each segment behind it and nothing else changed.
    Method: good and bad segments in our memory; a count of 0, which probes for the ioctl; more than a short cut takes."""
    program, _ = open_two(desk, LINUX, far)
    (ref,) = desk.grants.grant(2, 1, 1)
    memory, page = desk.memory, desk.grants.page(ref)
    data = memory.put(memory.at + 6 * PAGE, bytes(range(256)) * 16)
    segments = [segment(data, (*ref, 100), 50), segment((2, 4000, 0), data, 9), segment((*ref, 100), data + 1000, 20)]
    assert program.copy(*segments) == [0, -3, 0]
    assert page[100:150] == bytes(range(50)) and memory.get(data + 1000, 20) == bytes(range(20))
    back = memory.get(memory.at + PAGE, 24 * 3)
    assert [back[24 * at : 24 * at + 20] for at in range(3)] == [one[:20] for one in segments]
    assert [back[24 * at + 22 : 24 * at + 24] for at in range(3)] == [bytes(2)] * 3
    assert program.copy() == []
    assert program.copy(*segments * 250) == [0, -3, 0] * 250
    assert program.copy(*segments, segment(data, data, 1)) == EINVAL
    assert program.copy(*segments, segment((*ref, 0), memory.edge - 1, 2)) == -errno.EFAULT
    assert program.copy(*segments, segment(data, (*ref, 4096), 1)) == EINVAL
    assert not desk.grants.domains[2].grants.active
    assert program.ioctl("copy", pack("<IIQ", SEGMENTS_MOST + 1, 0, memory.at)) == Answer(errno.EINVAL)


def test_set_max_grants(desk, far):
    """Goal: it is 0 and does nothing, as on today's Linux.  Method: it."""
    program, _ = open_two(desk, LINUX, far)
    assert program.ioctl("max", pack("<I", 3)) == Answer(0, 0)


@pytest.mark.parametrize("which", ["gntdev", "gntalloc"])
def test_both_devices_of_one_open(desk, which):
    """Goal: on Linux each device has its own pages: the other's cannot be told to notify.  Method: both indices at both."""
    (ref,) = desk.grants.grant(2, 1, 1)
    gntdev, gntalloc = desk.open(1), desk.open(1, "gntalloc")
    found = gntalloc.alloc(2, 1, 1)
    assert isinstance(found, tuple)
    index = {"gntdev": gntdev.map(ref), "gntalloc": found[0]}
    for program, name in ((gntdev, "gntdev"), (gntalloc, "gntalloc")):
        assert program.notify(index[which], CLEAR) == (0 if name == which else ENOENT)


# --- which map an address belongs to ---------------------------------------------------------------------------------------


def test_neighbours_in_memory(desk, far):
    """Goal: GET_OFFSET_FOR_VADDR tells maps apart that the kernel may show as one mapping.
    Method: maps one after the other in memory, of places in the file that follow one another and that do not."""
    program, _ = open_two(desk, LINUX, far)
    refs = desk.grants.grant(2, 1, 6)
    other = desk.open(1)
    start = other.map(*refs)
    parts = [(program.map(*refs[:2]), 2), (program.map(refs[2]), 1), (program.map(*refs[3:]), 3)]
    assert [index for index, _ in parts] == [start, start + 2 * PAGE, start + 3 * PAGE]
    parts.append((program.map(*desk.grants.grant(3, 1, 2)), 2))
    for order in (parts, parts[::-1], [parts[1], parts[0], parts[3], parts[2]]):
        with Window(desk.arena.fd, order) as window:
            at = window.at
            for index, count in order:
                for page in range(count):
                    assert program.offset(at + page * PAGE) == (index, count)
                at += count * PAGE
            assert other.offset(window.at) == ((start, 6) if order[0] in parts[:3] else EINVAL)


def test_maps_that_share_an_index(desk, far):
    """Goal: of several maps of the same pages an address belongs to the one that is as long as what is mapped there, so that
    the library, which compares, can unmap each.
    Method: maps of 1, 2, 3 and 7 of the same references, each mapped here, in any order of making and unmapping."""
    program, _ = open_two(desk, LINUX, far)
    refs = desk.grants.grant(2, 1, 7)
    before = desk.grants.held()
    for counts in ((7, 1, 2, 3), (7, 3, 2, 1), (7, 2, 2, 1)):
        (index,) = {program.map(*refs[:count]) for count in counts}
        windows = [(count, desk.see(index, count)) for count in counts]
        for count, window in windows:
            assert program.offset(window.at) == (index, count)
        assert program.offset(windows[0][1].at + 5 * PAGE + 7) == (index, 7)
        for count, window in windows[1:] + windows[:1]:
            assert program.offset(window.at) == (index, count)
            with window:
                pass
            assert program.unmap(index, count) == 0
        assert desk.grants.held() == before


# --- what goes wrong -------------------------------------------------------------------------------------------------------


def pointers(desk: GrantDesk, size: int) -> list[int]:
    """Where a structure of that size cannot be read."""
    edge = desk.memory.edge
    return [0, 8, KERNEL, 2**64 - size, 2**64 - 1, edge, edge - size + 1, edge - 1]


def test_bad_pointers_to_the_structure(desk, far):
    """Goal: a structure that is not there, or not all of it, is EFAULT, and nothing was done.
    Method: every ioctl whose structure is fetched, at bad addresses."""
    programs = [*open_two(desk, LINUX, far), desk.open(1, "gntdev", FREEBSD)]
    (ref,) = desk.grants.grant(2, 1, 1)
    held = desk.grants.held()
    for program, names in (
        (programs[0], ("map", "unmap", "offset", "max", "notify", "copy")),
        (programs[1], ("alloc", "dealloc", "notify")),
        (programs[2], ("notify", "dealloc", "unmap")),
    ):
        for name in names:
            command = program.numbers[name]
            size = 16 if name in ("map", "alloc") else command >> 16 & 0xFF
            for arg in pointers(desk, size):
                program.memory.put(max(program.memory.readonly, program.memory.edge - size), pack("<I", 1))
                out = command >> 16 & 0xFF if command & 1 << 31 else 0
                assert program.raw(command, arg, out_size=out) == Answer(errno.EFAULT), (name, hex(arg))
    assert desk.grants.held() == held and ref
    for pid, code in ((0, errno.ESRCH), (2**22 + 1, errno.ESRCH)):
        assert programs[0].raw(LINUX["unmap"], desk.memory.at, pid=pid) == Answer(code)


def test_bad_pointers_behind_it(desk, far):
    """Goal: references, segments or results that are not there are EFAULT; what had been done for them is undone.
    Method: MAP, ALLOC, GET_OFFSET and COPY whose second part is at the end of memory, in a page that is read only, or
    nowhere."""
    gntdev, gntalloc = open_two(desk, LINUX, far)
    bsd = desk.open(1, "gntdev", FREEBSD)
    bsd.uid = os.geteuid() + far
    refs = desk.grants.grant(2, 1, 3)
    memory, packed = desk.memory, b"".join(pack("<II", *ref) for ref in refs)
    grow = gntalloc.alloc(2, 1, 1)
    assert isinstance(grow, tuple) and gntalloc.dealloc(grow[0], 1) == 0
    held = desk.grants.held()
    efault = Answer(errno.EFAULT)
    for at in (memory.edge - 16, memory.edge - 16 - 23):  # the references are not there
        memory.put(at, pack("<IIQ", 3, 0, 0) + packed[: memory.edge - at - 16])
        assert gntdev.raw(LINUX["map"], at) == efault
    memory.put(memory.readonly, pack("<IIQ", 3, 0, 0) + packed)  # the index cannot be written
    assert gntdev.raw(LINUX["map"], memory.readonly) == efault and desk.grants.held() == held
    for bad in pointers(desk, 24):
        assert bsd.ioctl("map", pack("<IIQQ", 3, 0, 0, bad)) == efault
        assert gntdev.ioctl("copy", pack("<IIQ", 1, 0, bad)) == efault
        assert bsd.ioctl("alloc", pack("<HHIQQ", 2, 1, 6, 0, bad)) == efault
        assert desk.grants.held() == held
    memory.put(memory.readonly, pack("<HHIQ", 2, 1, 2, 0))
    assert gntalloc.raw(LINUX["alloc"], memory.readonly) == efault
    assert bsd.ioctl("alloc", pack("<HHIQQ", 2, 1, 2, 0, memory.readonly)) == efault
    memory.put(memory.edge - 20, pack("<HHIQ", 2, 1, 2, 0))
    assert gntalloc.raw(LINUX["alloc"], memory.edge - 20) == efault, "the second reference does not fit"
    memory.put(memory.edge - 20, pack("<HHIQ", 2, 1, 1, 0))
    assert gntalloc.raw(LINUX["alloc"], memory.edge - 20) == Answer(0), "one does"
    (index,) = unpack("<Q", memory.get(memory.edge - 12, 8))
    assert gntalloc.dealloc(index, 1) == 0 and desk.grants.held() == held
    copying = memory.put(memory.readonly, segment((*refs[0], 0), memory.at + 2 * PAGE, 4))
    assert gntdev.ioctl("copy", pack("<IIQ", 1, 0, copying)) == efault, "the status cannot be written"
    assert memory.get(memory.at + 2 * PAGE, 4) == bytes(desk.grants.page(refs[0])[:4])
    index = gntdev.map(*refs)
    with desk.see(index, 3) as window:
        memory.put(memory.readonly, pack("<QQII", window.at, 0, 0, 0))
        assert gntdev.raw(LINUX["offset"], memory.readonly) == efault
    assert gntdev.unmap(index, 3) == 0 and desk.grants.held() == held


def test_an_index_that_cannot_be_told(desk):
    """Goal: a MAP whose index cannot be written undoes itself, not another map of the same pages.
    Method: a map with a notification, then the same one again with a structure that is read only."""
    program, memory = desk.open(1), desk.memory
    (ref,) = desk.grants.grant(2, 1, 1)
    _, port, other, peer = desk.grants.pair(1, 2)
    index = program.map(ref)
    assert program.notify(index, SEND, port) == 0
    memory.put(memory.readonly, pack("<IIQII", 1, 0, 0, *ref))
    assert program.raw(LINUX["map"], memory.readonly) == Answer(errno.EFAULT)
    assert desk.grants.events(other) == [] and len(program.file.grants.maps) == 1
    assert program.unmap(index, 1) == 0 and desk.grants.events(other) == [peer]


def test_sizes(desk):
    """Goal: counts beyond the limits are EINVAL before anything is read; a FreeBSD structure that is too short, too.
    Method: counts around them; data that the kernel would not bring."""
    linux, bsd, memory = desk.open(1), desk.open(1, numbers=FREEBSD), desk.memory
    for count in (0, REFS_MOST + 1, 2**32 - 1):
        assert linux.ioctl("map", pack("<IIQ", count, 0, 0)) == Answer(errno.EINVAL)
        assert bsd.ioctl("map", pack("<IIQQ", count, 0, 0, 0)) == Answer(errno.EINVAL)
    assert linux.ioctl("map", pack("<IIQ", REFS_MOST, 0, 0)) == Answer(errno.EFAULT), "that many are looked for"
    for name in ("map", "alloc"):
        for size in (0, 8, 23):
            assert bsd.raw(FREEBSD[name], memory.at, bytes(size), 24) == Answer(errno.EINVAL)
    assert bsd.raw(FREEBSD["unmap"], memory.at, bytes(100), 16) == Answer(errno.ENOENT), "longer is fine"


def test_opens_are_limited(desk):
    """Goal: a guest may have so many opens of each device, and again as many when they are closed; domain 0 any number.
    Method: open until ENFILE, close one; then domain 0."""
    opens = [desk.open(1) for _ in range(OPENS_MOST)]
    inos = {domid: desk.walk("gntdev", domid) for domid in (0, 1)}
    assert desk.kernel.open(inos[1], os.O_RDWR) == Reply(errno.ENFILE, b"")
    desk.open(1, "gntalloc"), desk.open(2)
    opens[7].release()
    assert not desk.kernel.open(inos[1], os.O_RDWR).error
    assert [desk.kernel.open(inos[0], os.O_RDWR).error for _ in range(OPENS_MOST + 1)] == [0] * (OPENS_MOST + 1)


def test_what_it_looks_like(desk):
    """Goal: opened for mmap through the arena; not to be read or written; O_TRUNC does no harm.
    Method: FOPEN flags and the backing id; READ, WRITE, SETATTR."""
    for which in ("gntdev", "gntalloc"):
        ino = desk.kernel.walk(f"{which}1")
        fh, flags, backing = k.OPEN_OUT.unpack(desk.kernel.open(ino, os.O_RDWR | os.O_TRUNC).data)
        assert (flags, backing) == (k.FOPEN_DIRECT_IO | k.FOPEN_PASSTHROUGH, 7)
        assert desk.kernel.read(fh, 0, 100) == desk.kernel.write(fh, 0, b"abc") == Reply(errno.EINVAL, b"")
        no_more = k.SETATTR_IN.unpack(bytes(k.SETATTR_IN.size))[4:]
        for valid, size, expected in ((k.FATTR_SIZE, 0, 0), (k.FATTR_SIZE, 1, errno.EPERM), (k.FATTR_MODE, 0, errno.EPERM)):
            for given_fh in (0, k.FATTR_FH):
                body = k.SETATTR_IN.pack(valid | given_fh, 0, fh, size, *no_more)
                assert desk.kernel.call(k.FUSE_SETATTR, ino, body).error == expected


def test_nothing_can_be_mapped(desk):
    """Goal: without passthrough what would be mapped is EOPNOTSUPP, and all else works.  Method: no backing file."""
    desk.arena.backing_id = 0
    gntdev, gntalloc, bsd = desk.open(1), desk.open(1, "gntalloc"), desk.open(1, numbers=FREEBSD)
    ino = desk.kernel.walk("gntdev2")
    assert k.OPEN_OUT.unpack(desk.kernel.open(ino, os.O_RDWR).data)[1:] == (k.FOPEN_DIRECT_IO, 0)
    (ref,) = desk.grants.grant(2, 1, 1)
    held = desk.grants.held()
    assert gntdev.map(ref) == bsd.map(ref) == -errno.EOPNOTSUPP
    assert gntalloc.alloc(2, 1, 1) == bsd.alloc(2, 1, 1) == -errno.EOPNOTSUPP
    assert gntdev.copy(segment((*ref, 0), desk.memory.at, 4)) == [0] and gntdev.unmap(0, 1) == ENOENT
    assert desk.grants.held() == held


@pytest.mark.parametrize("waits", [False, True])
def test_the_domain_ends(desk, waits):
    """Goal: when a domain ends, who waits gets an answer, every ioctl after it is ENODEV, and so is open(2); what was held is
    gone at once.  Method: a MAP that waits for a disk worker; stop; everything again, and RELEASE."""
    gntdev, gntalloc = open_two(desk, LINUX, 0)
    grants, memory = desk.grants, desk.memory
    (ref, other) = grants.grant(2, 1, 2)
    index, found = gntdev.map(ref), gntalloc.alloc(2, 1, 1)
    assert isinstance(found, tuple)
    unique = 0
    if waits:
        grants.filling = [grants.frame(other)]
        memory.put(memory.at, pack("<IIQII", 1, 0, 0, *other))
        unique = gntdev.send(LINUX["map"], memory.at)
        assert unique not in desk.kernel.replies and desk.domain_calls[1].under_way == 1
    for name in ("gntdev1", "gntalloc1"):
        desk.nodes[name].stopped = True
    grants.gntdev[1].stop()
    grants.gntalloc[1].stop()
    assert not grants.domains[1].maptrack.mappings and not grants.arena._slots
    if waits:
        desk.calls.step()
        assert gntdev.answer(unique) == Answer(errno.EIO)
    enodev = Answer(errno.ENODEV)
    for program, names in ((gntdev, ("map", "unmap", "offset", "max", "notify", "copy")), (gntalloc, ("alloc", "dealloc"))):
        for name in names:
            assert program.ioctl(name, pack("<QQQ", index, 1, 0)) == enodev
        assert desk.kernel.open(program.ino, os.O_RDWR) == Reply(errno.ENODEV, b"")
        program.release()
    desk.settle()
    assert not grants.gntdev[1].users and not grants.gntalloc[1].users and not grants.arena._runs


def test_release(desk, far):
    """Goal: with the last close what was mapped goes, and what was allocated, unless it is mapped; pages of holes that were
    touched are given back.  Method: both kinds, a window that stays, and one over a hole beside it."""
    gntdev, gntalloc = open_two(desk, LINUX, far)
    grants = desk.grants
    refs = grants.grant(2, 1, 5)
    index, found = gntdev.map(*refs), gntalloc.alloc(2, 1, 2)
    assert isinstance(found, tuple)
    with desk.see(index + 5 * PAGE, 3) as hole, desk.see(found[0] + PAGE) as window:
        hole.map[: 3 * PAGE] = b"x" * 3 * PAGE
        window.map[:4] = b"mine"
        gntdev.release()
        gntalloc.release()
        desk.settle()
        assert not grants.domains[1].maptrack.mappings and grants.gntalloc[1].used == 1
        assert window.map[:4] == b"mine" and not any(hole.map[: 3 * PAGE])
    desk.domain_calls[1].run(None, grants.gntalloc[1].sweep())
    desk.settle()
    assert grants.gntalloc[1].used == 0 and not grants.arena._slots and not desk.nodes["gntdev1"].files


# --- garbage -------------------------------------------------------------------------------------------------------------

words = st.one_of(st.integers(0, 5), st.sampled_from((2**16 - 1, 2**31, 2**32 - 1)), st.integers(0, 2**32 - 1))


@st.composite
def structures(draw: st.DrawFn, desk: GrantDesk, refs: list[Ref], indices: list[int]) -> bytes:
    """Something like one: words, numbers that mean something, addresses."""
    memory = desk.memory
    likely = [memory.at, memory.at + PAGE, memory.edge - 12, memory.readonly, KERNEL, *indices, *(i + PAGE for i in indices)]
    parts = st.one_of(
        words.map(lambda word: pack("<I", word)),
        st.sampled_from(likely).map(lambda at: pack("<Q", at)),
        st.sampled_from(refs).map(lambda ref: pack("<II", *ref)),
        st.binary(max_size=8),
    )
    return b"".join(draw(st.lists(parts, max_size=12)))


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_garbage(data):
    """Goal: whatever a program passes, every ioctl is answered, no invariant breaks, and closing leaves nothing.
    Method: random structures with likely numbers in them at good and bad addresses, for all ioctls of both devices, with or
    without data from the kernel."""
    with GrantDesk(limit=8) as desk:
        grants = desk.grants
        refs = [*grants.grant(2, 1, 4), *grants.grant(3, 1, 2), (1, 8), (1, 9)]
        grants.domains[1].grants.end_access(grants.domains[1].grants.grant_access(2, 0))
        before = grants.held()
        programs = [desk.open(1), desk.open(1, "gntalloc"), desk.open(1, numbers=FREEBSD)]
        for _ in range(data.draw(st.integers(1, 15))):
            program = data.draw(st.sampled_from(programs))
            program.uid = os.geteuid() + data.draw(st.sampled_from((0, 0, 0, 1)))
            indices = [one.index for one in program.file.grants.maps] + list(program.file.pages.pages)
            structure = data.draw(structures(desk, refs, indices))
            where = data.draw(st.sampled_from((desk.memory.at, desk.memory.at, desk.memory.edge - len(structure), 8)))
            if where != 8:
                desk.memory.put(where, structure)
            brought = structure if data.draw(st.booleans()) else b""
            command = data.draw(st.sampled_from(sorted(program.file.node.commands)))
            answer = program.raw(command, where, brought, data.draw(st.sampled_from((0, 16, 24))))
            assert answer.error in errno.errorcode or not answer.error
            assert grants.violations() == []
        for program in programs:
            program.release()
        desk.settle()
        assert grants.held() == before
