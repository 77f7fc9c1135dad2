"""Goal: dev/xen/gntdev and gntalloc are to programs what Linux's devices are, and FreeBSD's gntdev.
Method: FUSE requests into a Session over the nodes of four domains; structures are in another process's memory, where
threads or the loop itself reach for them, and what is mapped is mapped there."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from struct import pack

import pytest

from tests.abi.headers import run_c
from tests.xenfs.evtchnfile import Answer
from tests.xenfs.grantfile import CLEAR, FREEBSD, LINUX, PAGE, SEND, SETS, GrantDesk, Window, open_two, segment
from xenfs.nodes.evtchn import CALLS
from xenfs.nodes.gntdev import GNTALLOC, GNTDEV, SEGMENTS_MOST

EINVAL, ENOENT = -errno.EINVAL, -errno.ENOENT


@pytest.fixture
def desk() -> Iterator[GrantDesk]:
    with GrantDesk() as made:
        yield made


@pytest.fixture(params=["the loop", "threads"])
def far(request: pytest.FixtureRequest) -> int:
    """Who reaches for the caller's memory: threads do for other users."""
    return int(request.param == "threads")


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
    Method: three pages of two domains, mapped; a notification; what is held before and after; references that fill more
    than a page; the caller's name."""
    program, _ = open_two(desk, numbers, far)
    grants = desk.grants
    refs = [*grants.grant(2, 1, 2), *grants.grant(3, 1, 1)]
    one, port, other, peer = grants.pair(1, 2)
    before = grants.held()
    index = program.map(*refs)
    assert index > 0 and index % PAGE == 0
    mapping = grants.domains[1].maptrack.mappings[0]
    assert mapping.owner.endswith(f"[{desk.memory.pid}]") and not mapping.owner.startswith("?")
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
    Method: pages mapped and by a program of domain 2; DEALLOC at once, then munmap, a sweep, and the peer's UNMAP."""
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
    Method: good and bad segments in its memory; a count of 0, which probes for the ioctl; more than a short cut takes."""
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
        with Window(desk.memory, order) as window:
            at = window.at
            for index, count in order:
                for page in range(count):
                    assert program.offset(at + page * PAGE) == (index, count)
                at += count * PAGE
            assert other.offset(window.at) == ((start, 6) if order[0] in parts[:3] else EINVAL)


def test_maps_that_share_an_index(desk, far):
    """Goal: of several maps of the same pages an address belongs to the one that is as long as what is mapped there, so that
    the library, which compares, can unmap each.
    Method: maps of 1, 2, 3 and 7 of the same references, each mapped, in any order of making and unmapping."""
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
