"""Goal: what a program gets wrong with dev/xen/gntdev and gntalloc is an errno and leaves nothing, and so does its end, its
domain's, and whatever else it may pass.
Method: as in test_gntdev_node.py; bad addresses of every kind, limits, and random structures."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from struct import pack, unpack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sysdev.gntdev import REFS_MOST
from tests.sysdev.granting import Ref
from tests.xenfs.evtchnfile import Answer
from tests.xenfs.grantfile import FREEBSD, LINUX, PAGE, SEND, GrantDesk, open_two, segment
from tests.xenfs.machine import Reply
from xenfs.fuse import kernel as k
from xenfs.nodes.gntdev import OPENS_MOST

ENOENT = -errno.ENOENT
KERNEL = 0xFFFF_8000_0000_0000


@pytest.fixture
def desk() -> Iterator[GrantDesk]:
    with GrantDesk() as made:
        yield made


@pytest.fixture(params=["the loop", "threads"])
def far(request: pytest.FixtureRequest) -> int:
    """Who reaches for the caller's memory: threads do for other users."""
    return int(request.param == "threads")


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
    """Goal: when a domain ends, who waits gets an answer, every ioctl after it is ENODEV, and so is open(2); what was held
    is gone at once.  Method: a MAP that waits for a disk worker; stop; everything again, and RELEASE."""
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
    assert not grants.gntdev[1].users and not grants.gntalloc[1].users
    assert not any(run.left for run in grants.arena.places.runs)


def test_release(desk, far):
    """Goal: with the last close what was mapped goes, and what was allocated, unless it is mapped; when nothing is mapped
    any more, pages of holes that were touched are given back.  Method: both kinds, a window that stays, one over a hole."""
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
        assert window.map[:4] == b"mine"
    grants.arena.keep = 0
    desk.domain_calls[1].run(None, grants.gntalloc[1].sweep())
    desk.settle()
    assert grants.gntalloc[1].used == 0 and not grants.arena._slots and not desk.nodes["gntdev1"].files
    assert os.fstat(grants.arena.fd).st_blocks == 0


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
