"""Goal: unmodified programs on libxengnttab map and copy the pages of other domains as through Linux's gntdev.
Method: tests/devxen/grants.c in two guests and domain 0; what xenfs says of them in inspect/grants."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.host.devxen import PAGE, DevXen, coherent, needs_libraries, served, shared
from tests.host.net import wait_until
from tests.host.served import MIB, Host

pytestmark = [pytest.mark.host, needs_libraries]

OKAY, BAD_DOMAIN, BAD_GNTREF = 0, -2, -3  # GNTST_*


@pytest.fixture
def xen(host: Host) -> Iterator[DevXen]:
    with served(host) as built:
        yield built


@pytest.mark.parametrize("pages", [1, 256])
@pytest.mark.parametrize(("domid", "peer_domid"), [(1, 2), (1, 0), (0, 1)])
def test_shared(xen, pages, domid, peer_domid):
    """Goal: pages that a program shares and another maps are the same memory, and nothing is left of them afterwards.
    Method: a pattern of its own for each page, from both sides; unmap and unshare; again."""
    before = xen.held(0, 1, 2)
    one, other = xen.grants(domid), xen.grants(peer_domid)
    for _ in range(2):
        area, refs = shared(one, "rw", peer_domid, pages)
        assert xen.granted(domid) >= set(refs)
        mapped = other.number("map", "rw", domid, *refs)
        assert len(xen.mapped(peer_domid)) == len(before[peer_domid][2]) + pages
        coherent((one, area), (other, mapped))
        other.ok("unmap", mapped)
        one.ok("unshare", area)
        xen.wait_held(before, 0, 1, 2)


def test_two_domains(host):
    """Goal: one mapping can have pages of several domains, in any order.
    Method: what two guests' disks have granted to domain 0, shuffled, mapped at once. Each page is its owner's: the disks
    are written with bytes of their own, before and while the pages are mapped, and of the other's there is none."""
    images = [host.image(f"{name}.img", MIB) for name in "ab"]
    configs = [host.config(name, f"{image},raw,xvda,w") for name, image in zip("ab", images, strict=True)]
    with DevXen(host, host.up(*configs)) as xen:
        zero, disks = xen.grants(0), [xen.served.disk(name) for name in "ab"]

        def write(*bytes_: int) -> None:
            for disk, byte in zip(disks, bytes_, strict=True):
                source = host.root / "source"
                source.write_bytes(bytes([byte]) * MIB)
                host.check("dd", f"if={source}", f"of={disk}", "bs=64k", "conv=notrunc,fsync")

        write(0xA1, 0xB1)
        pages = [(domid, ref) for domid in (1, 2) for ref in sorted(xen.granted(domid))]
        pages = random.Random(1).sample(pages, 1000)
        mapped = zero.number("map-mixed", "ro", *(f"{domid}:{ref}" for domid, ref in pages))
        assert len(xen.mapped_by(0, zero)) == len(pages)
        seen: set[tuple[int, str]] = set()
        for now in ((0xA1, 0xB1), (0xA2, 0xB2), (0xA3, 0xB3)):
            write(*now)
            for place, (domid, _) in enumerate(pages):
                found = zero.ask("read", mapped, place * PAGE, PAGE)
                seen |= {(domid, found[:2]) for byte in range(0xA0, 0xC0) if found == f"{byte:02x}" * PAGE}
        assert {(1, "a1"), (1, "a2"), (1, "a3"), (2, "b1"), (2, "b2"), (2, "b3")} == seen
        zero.ok("unmap", mapped)
        assert xen.mapped_by(0, zero) == set()
        for disk, byte in zip(disks, (0xA3, 0xB3), strict=True):
            source = host.root / "source"
            source.write_bytes(bytes([byte]) * MIB)
            host.check("cmp", source, disk)
        xen.served.stop()


def test_one_page_in_many_places(xen):
    """Goal: however often a page is mapped, by one program or several, it is one page, and stays it when one lets go.
    Method: a page shared in one domain, mapped by two programs of another, by one of them twice; unmapped one by one."""
    before = xen.held(0, 1, 2)
    one, first, second = xen.grants(1), xen.grants(2), xen.grants(2)
    area, refs = shared(one, "rw", 2, 3)
    ends = [(one, area)]
    for program in (first, second, first):
        ends.append((program, program.number("map", "rw", 1, *refs)))
        coherent(*ends)
    part = second.number("map", "rw", 1, refs[1])
    assert second.ask("read", part, 0, 64) == one.ask("read", area, PAGE, 64)
    while len(ends) > 1:
        program, mapped = ends.pop(1)
        program.ok("unmap", mapped)
        coherent(*ends)
    one.ok("write", area, PAGE, "abcd")
    assert second.ask("read", part, 0, 2) == "abcd"
    second.kill()
    coherent((one, area))
    first.kill()
    one.kill()
    xen.wait_held(before, 0, 1, 2)


def test_order(xen):
    """Goal: pages that programs have in their memory already are mapped as they lie there: all, some, or one of them. In
    another order, or from two shares at once, they cannot be, which is said (and which Xen could do).
    Method: parts of a share, in order; shuffled; of two shares; what was refused leaves nothing."""
    one, other = xen.grants(1), xen.grants(2)
    area, refs = shared(one, "rw", 2, 8)
    _, more = shared(one, "rw", 2, 2)
    before = xen.held(1, 2)
    for first, last in ((0, 8), (0, 1), (3, 6), (7, 8)):
        mapped = other.number("map", "rw", 1, *refs[first:last])
        for i in range(first, last):
            one.ok("write", area, i * PAGE, f"{i:02x}{first:02x}")
            assert other.ask("read", mapped, (i - first) * PAGE, 2) == f"{i:02x}{first:02x}"
        other.ok("unmap", mapped)
    for words in (refs[::-1], refs[::2], [refs[0], refs[0]], [*refs, *more], [more[0], refs[0]]):
        assert other.ask("map", "rw", 1, *words) == "error EBUSY"
    xen.wait_held(before, 1, 2)


def test_neighbours_and_overlaps(xen):
    """Goal: mappings of a program that lie side by side, or show the same pages, are each their own.
    Method: parts of a share that are adjacent in the file and in memory, which the kernel merges into one; parts of parts;
    unmapped in an order that is not that of mapping, and what is left is looked at."""
    one, other = xen.grants(1), xen.grants(2)
    area, refs = shared(one, "rw", 2, 12)
    before = xen.held(1, 2)
    parts = [(8, 12), (4, 8), (0, 4), (0, 12), (0, 4), (2, 4), (2, 3), (0, 1), (6, 10)]
    mapped = {}
    for first, last in parts:
        mapped[other.number("map", "rw", 1, *refs[first:last])] = first, last
    left = list(mapped)
    random.Random(1).shuffle(left)
    for number, gone in enumerate(left, 1):
        other.ok("unmap", gone)
        for i in range(12):
            one.ok("write", area, i * PAGE + 8, f"{number:02x}{i:02x}")
        for still in left[number:]:
            first, last = mapped[still]
            for i in range(first, last):
                assert other.ask("read", still, (i - first) * PAGE + 8, 2) == f"{number:02x}{i:02x}"
    xen.wait_held(before, 1, 2)


def test_refused(xen):
    """Goal: what is not granted cannot be mapped, not even in part; the program gets NULL and an errno, and goes on.
    Method: references that are free, for another domain, beyond the table; of domains that are not there."""
    one, other, zero = xen.grants(1), xen.grants(2), xen.grants(0)
    _, refs = shared(one, "rw", 2, 4)
    _, not_ours = shared(one, "rw", 0, 1)
    before = xen.held(0, 1, 2)
    cases = [
        (other, ("rw", 1, 5000)),
        (other, ("rw", 1, *not_ours)),
        (other, ("rw", 1, *refs[:3], 5000)),
        (other, ("rw", 1, *refs[:3], *not_ours)),
        (other, ("rw", 1, -1)),
        (other, ("rw", 77, refs[0])),
        (other, ("rw", 0x7FF0, refs[0])),
        (other, ("rw", 1 << 20, refs[0])),
        (zero, ("rw", 1, *refs)),
    ]
    assert [program.ask("map", *words) for program, words in cases] == ["error EINVAL"] * len(cases)
    assert xen.held(0, 1, 2) == before
    mapped = other.number("map", "rw", 1, *refs)
    assert other.ask("unmap", mapped, 2) == "error EINVAL"  # a part of it
    other.ok("fill", mapped, 1)
    other.ok("unmap", mapped)
    assert [one.ask("ioctl", device, number, 1) for device in ("tab", "shr") for number in (0x00184700, 0x00184705)] == [
        "error EFAULT",
        "error ENOTTY",
        "error ENOTTY",
        "error EFAULT",
    ]


def test_mapped_to_read(xen):
    """Goal: who maps to read cannot write, and sees what the owner writes later.  Method: a store to the mapping."""
    one, other = xen.grants(1), xen.grants(2)
    for granted in ("ro", "rw"):
        area, refs = shared(one, granted, 2, 2)
        one.ok("fill", area, 1)
        mapped = other.number("map", "ro", 1, *refs)
        other.ok("check", mapped, 1)
        assert other.ask("write", mapped, PAGE, "ff") == "fault"
        one.ok("check", area, 1)
        one.ok("fill", area, 2)
        other.ok("check", mapped, 2)
        other.ok("unmap", mapped)


READ_ONLY = """
import fcntl, mmap, os, struct, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
structure = bytearray(struct.pack("<IIQII", 1, 0, 0, 1, int(sys.argv[2])))
fcntl.ioctl(fd, 0x184700, structure)  # MAP_GRANT_REF
(index,) = struct.unpack_from("<Q", structure, 8)
seen = mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ, offset=index)
print(seen[:3].hex())
try:
    mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=index)
except PermissionError:
    print("refused")
"""


def test_how_far_reading_only_goes(xen):
    """Goal: as docs/devxen.md has it: who opened the device to read cannot map anything to write, whatever was granted; who
    opened it to write can, also a page that was granted to be read.  Method: both, and what the owner then sees."""
    one, other = xen.grants(1), xen.grants(2)
    area, refs = shared(one, "rw", 2, 1)
    one.ok("write", area, 0, "5ec2e7")
    said = xen.host.python(READ_ONLY, xen.path(2, "dev/xen/gntdev"), refs[0])
    assert said == "5ec2e7\nrefused\n"
    area, refs = shared(one, "ro", 2, 1)
    mapped = other.number("map", "ro", 1, *refs)
    other.ok("protect", mapped, "rw")
    other.ok("write", mapped, 0, "ff")
    assert one.ask("read", area, 0, 1) == "ff"


def test_nothing_else(xen):
    """Goal: through the devices a program reaches what it has mapped and not a byte more.
    Method: mmap of offsets that nobody gave it, on its own open files, while others have pages mapped there."""
    one, other, third = xen.grants(1), xen.grants(2), xen.grants(2)
    area, refs = shared(one, "rw", 2, 4)
    one.ok("write", area, 0, "5ec2e75ec2e7")
    mapped = other.number("map", "rw", 1, *refs)
    for device in ("tab", "shr"):
        for page in (0, 1, 16, 1 << 20):
            said = third.ask("mmap", device, page * PAGE, 4)
            if said.startswith("error"):
                continue
            found = [third.ask("read", said, i * PAGE, 6) for i in range(4)]
            assert set(found) <= {"fault", "00" * 6}, (device, page, found)
    assert other.ask("read", mapped, 0, 6) == "5ec2e75ec2e7"
    beyond = other.ask("mmap", "tab", 4 * PAGE, 4)
    if not beyond.startswith("error"):
        assert {other.ask("read", beyond, i * PAGE, 6) for i in range(4)} <= {"fault", "00" * 6}


def test_unmapped_is_gone(xen):
    """Goal: when a page has been unmapped, or was never mapped, the page that the owner shares next is not seen through it.
    Method: a mapping that the program keeps (mmap of the same place) over the ioctl that undoes it; then a new share."""
    one, other = xen.grants(1), xen.grants(2)
    area, refs = shared(one, "rw", 2, 1)
    mapped = other.number("map", "rw", 1, *refs)
    kept = other.ask("mmap", "tab", 0, 1)
    other.ok("unmap", mapped)
    one.ok("unshare", area)
    area, refs = shared(one, "rw", 0, 1)  # for somebody else, and perhaps the same frame
    one.ok("write", area, 0, "5ec2e7")
    if not kept.startswith("error"):
        assert other.ask("read", kept, 0, 3) != "5ec2e7"


def test_copy(xen):
    """Goal: grant copies move bytes both ways and between grants, and say how each of them went.
    Method: segments of all kinds in one call, good ones between bad ones; what must not change did not."""
    one, other = xen.grants(1), xen.grants(2)
    area, (first, second) = shared(one, "rw", 2, 2)
    readonly_area, (readonly,) = shared(one, "ro", 2, 1)
    _, (foreign,) = shared(one, "rw", 0, 1)
    one.ok("fill", area, 1)
    one.ok("fill", readonly_area, 2)
    local = other.number("alloc", 3)
    said = other.ask(
        *("copy", f"1:{first}:0", f"{local}+0", PAGE),
        *(f"1:{readonly}:16", f"{local}+{PAGE}", 100),
        *("1:5000:0", f"{local}+{2 * PAGE}", 16),
        *(f"{local}+0", f"1:{second}:1000", 64),
        *(f"1:{first}:8", f"1:{second}:2000", 32),
        *(f"1:{first}:0", f"{local}+{2 * PAGE - 10}", 20),  # over a boundary of ours
        *(f"77:{first}:0", f"{local}+{2 * PAGE}", 16),
        *(f"1:{foreign}:0", f"{local}+{2 * PAGE}", 16),
        *(f"{local}+0", f"1:{readonly}:0", 16),
    )
    statuses = list(map(int, said.split()[1:]))
    assert statuses[:7] == [OKAY, OKAY, BAD_GNTREF, OKAY, OKAY, OKAY, BAD_DOMAIN] and statuses[7] < 0 > statuses[8]
    page, second_page = one.ask("read", area, 0, PAGE), one.ask("read", area, PAGE, PAGE)
    assert other.ask("read", local, 0, PAGE) == page
    assert other.ask("read", local, PAGE, 100) == one.ask("read", readonly_area, 16, 100)
    assert (second_page[2000:2128], second_page[4000:4064]) == (page[:128], page[16:80])
    assert other.ask("read", local, 2 * PAGE - 10, 20) == page[:40]
    assert other.ask("read", local, 2 * PAGE + 10, 6) == "00" * 6
    one.ok("check", readonly_area, 2)
    refused = [(f"1:{first}:4000", f"{local}+0", 100), (f"1:{first}:0", f"{local}+{1 << 30}", 16)]
    assert [other.ask("copy", *words) for words in refused] == ["error EINVAL", "error EFAULT"]
    assert other.ask("copy") == "status"  # how libraries find out whether there is such an ioctl


def test_ring_of_a_disk(host):
    """Goal: a program in domain 0 can look into a page that the drivers in xenfs use, and they do not notice.
    Method: the ring of a guest's disk, mapped before and while the disk is read and written; the producer's index moves."""
    image = host.image("a.img", 8 * MIB)
    with DevXen(host, host.up(host.config("g", f"{image},raw,xvda,w"))) as xen:
        disk = xen.served.disk()
        ref = int(host.check("cat", xen.served.mnt / "xenstore/local/domain/1/device/vbd/51712/ring-ref"))
        zero = xen.grants(0)
        copy = host.root / "random"
        copy.write_bytes(random.Random(1).randbytes(4 * MIB))
        for _ in range(2):
            mapped = zero.number("map", "ro", 1, ref)
            seen = [zero.ask("read", mapped, 0, 4)]
            for _ in range(3):
                host.check("dd", f"if={copy}", f"of={disk}", "bs=64k", "conv=notrunc,fsync")
                host.check("cmp", "-n", 4 * MIB, copy, disk)
                seen.append(zero.ask("read", mapped, 0, 4))
            assert len(set(seen)) == 4, seen
            zero.ok("unmap", mapped)
            host.check("dd", f"if={disk}", "of=/dev/null", "bs=64k", "iflag=direct")
        mapped = zero.number("map", "rw", 1, ref)
        zero.kill()
        host.check("cmp", "-n", 4 * MIB, copy, disk)
        wait_until(lambda: not xen.mapped_by(0, zero), "the ring unmapped")
        xen.served.stop()
