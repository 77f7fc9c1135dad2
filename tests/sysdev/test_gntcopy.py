"""Goal: GRANT_COPY moves bytes between grants and a program's memory as Linux's does, segment after segment, and leaves
nothing pinned, however it ends.
Method: real grant tables and pages; the program's memory is a Ram that can fault in the middle of a batch."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from struct import Struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sysdev.gntcopy import SEGMENT, SLICE, copy
from sysdev.steps import Pause, TransferIn, TransferOut
from tests.sysdev.granting import Grants, Ram, Ref, finish
from xenmodel.public.grant_table import (
    GNTCOPY_dest_gref,
    GNTCOPY_source_gref,
    GNTST_bad_domain,
    GNTST_bad_gntref,
    GNTST_general_error,
    GNTST_okay,
)
from xenmodel.public.xen import DOMID_SELF
from xenmodel.types import PAGE_SIZE, Gref

FROM, TO = GNTCOPY_source_gref, GNTCOPY_dest_gref
FOREIGN = Struct("<IHH")
BASE, SIZE = 0x10000, 1 << 16
Side = int | tuple[int, int, int]  # an address, or domid, reference, offset


@pytest.fixture
def grants() -> Iterator[Grants]:
    made = Grants()
    yield made
    assert not any(domain.grants.active for domain in made.domains.values()), "a pin is left"
    made.close()


@pytest.fixture
def ram() -> Ram:
    made = Ram(SIZE, BASE)
    made.data[:] = bytes(at * 7 & 0xFF for at in range(SIZE))
    return made


def side(which: Side) -> int:
    if isinstance(which, int):
        return which
    domid, ref, offset = which
    return int.from_bytes(FOREIGN.pack(ref, offset, domid), "little")


def segment(source: Side, dest: Side, length: int) -> bytes:
    flags = (0 if isinstance(source, int) else FROM) | (0 if isinstance(dest, int) else TO)
    return SEGMENT.pack(side(source), side(dest), length, flags, 77)


def run(grants: Grants, ram: Ram, *segments: bytes) -> list[int]:
    """As a program of domain 1."""
    return finish(copy(grants.domains[1], b"".join(segments)), ram)


def fails(grants: Grants, ram: Ram, *segments: bytes) -> int:
    with pytest.raises(OSError) as caught:
        run(grants, ram, *segments)
    assert not any(domain.grants.active for domain in grants.domains.values())
    return caught.value.errno or 0


def test_directions(grants, ram):
    """Goal: to a grant, from one, from one to another; only the bytes that are asked for move; a part that is not granted
    may cross pages.  Method: one segment of each, at odd offsets, with the page before and after."""
    (one,), (other,) = grants.grant(2, 1, 1), grants.grant(3, 1, 1)
    page, target = grants.page(one), grants.page(other)
    at = BASE + 2 * PAGE_SIZE - 100
    sent = bytes(ram.view(at, 333))
    before = bytearray(page)
    assert run(grants, ram, segment(at, (*one, 17), 333)) == [GNTST_okay]
    before[17:350] = sent
    assert page == before
    assert run(grants, ram, segment((*one, 16), BASE + 1, 335)) == [GNTST_okay]
    assert ram.view(BASE + 1, 335) == before[16:351] and ram.data[336] == 336 * 7 & 0xFF
    expected = bytearray(target)
    expected[4095:] = sent[:1]
    assert run(grants, ram, segment((*one, 17), (*other, 4095), 1)) == [GNTST_okay] and target == expected
    assert run(grants, ram, segment((*one, 0), (*other, 0), PAGE_SIZE)) == [GNTST_okay] and target == page


def test_own_grants(grants, ram):
    """Goal: DOMID_SELF is the caller, whose own grants it may use if it granted to itself.
    Method: both ways, and to another."""
    (own,), (to_other,) = grants.grant(1, 1, 1), grants.grant(1, 2, 1)
    for domid in (1, DOMID_SELF):
        assert run(grants, ram, segment(BASE, (domid, own[1], 0), 10)) == [GNTST_okay]
        assert run(grants, ram, segment((domid, own[1], 0), (domid, own[1], 100), 10)) == [GNTST_okay]
        assert run(grants, ram, segment((domid, to_other[1], 0), BASE, 10)) == [GNTST_general_error]
    assert grants.page(own)[100:110] == ram.view(BASE, 10)


def test_statuses(grants, ram):
    """Goal: each segment has a status of its own; a bad one moves nothing and keeps no other from it.
    Method: every kind of bad grant, each between two good ones, in all three directions."""
    (good,), (readonly,), (foreign,) = grants.grant(2, 1, 1), grants.grant(2, 1, 1, readonly=True), grants.grant(2, 3, 1)
    (ended,) = grants.grant(2, 1, 1)
    grants.domains[2].grants.end_access(Gref(ended[1]))
    bad: list[tuple[Ref, int]] = [
        ((2, 10**6), GNTST_bad_gntref), ((2, 2**32 - 1), GNTST_bad_gntref), ((9, 8), GNTST_bad_domain),
        ((0xFFFF, 8), GNTST_bad_domain), (foreign, GNTST_general_error), (ended, GNTST_general_error),
    ]  # fmt: skip
    for ref, status in [*bad, (readonly, GNTST_okay)]:
        to = GNTST_general_error if ref == readonly else status
        here = bytes(ram.view(BASE + 500, 10))
        assert run(
            grants, ram, segment(BASE, (*good, 0), 8), segment(BASE + 8, (*ref, 8), 8), segment(BASE + 16, (*good, 8), 8)
        ) == [0, to, 0]
        assert grants.page(good)[:16] == bytes(ram.view(BASE, 8)) + bytes(ram.view(BASE + 16, 8))
        grants.page(good)[:16] = bytes(16)
        first = segment((*good, 0), BASE + 400, 8)
        last = segment((*good, 8), BASE + 600, 8)
        assert run(grants, ram, first, segment((*ref, 0), BASE + 500, 10), last) == [0, status, 0]
        assert (ram.view(BASE + 500, 10) == here) == bool(status) and ram.view(BASE + 600, 8) == bytes(8)
        assert run(grants, ram, segment((*ref, 0), (*good, 0), 4)) == [status]
        assert run(grants, ram, segment((*good, 0), (*ref, 0), 4)) == [to]


def test_nothing(grants, ram):
    """Goal: no segments are no work; a length of 0 is OKAY whatever it names, but for what Linux looks at before.
    Method: lengths of 0 at bad places; none at all."""
    (ref,) = grants.grant(2, 1, 1)
    assert run(grants, ram) == []
    nowhere = segment((9, 9, 4096), 8, 0), segment(8, (*ref, 4096), 0), segment((9, 9, 1), (9, 9, 9), 0)
    assert run(grants, ram, *nowhere) == [0, 0, 0]
    assert fails(grants, ram, segment((*ref, 4097), 8, 0)) == errno.EINVAL
    assert fails(grants, ram, segment(BASE, BASE, 0)) == errno.EINVAL


@pytest.mark.parametrize("place", [0, 1, 5, SLICE - 1, SLICE, 2 * SLICE])
def test_errors_in_the_middle(grants, ram, place):
    """Goal: what is wrong with the request is an errno: neither side granted, a granted part that crosses its page, an
    address that is not there; nothing is pinned afterwards, and what came before has been done.
    Method: each of them at several places of a long call, in each direction."""
    refs = grants.grant(2, 1, 4)
    good = [segment(BASE + at, (*refs[at % 4], at), 1) for at in range(2 * SLICE + 1)]
    good[1::3] = [segment((*refs[0], 0), BASE + 9000 + at, 1) for at in range(len(good[1::3]))]
    for bad, expected in (
        (segment(BASE, BASE + 64, 4), errno.EINVAL),
        (segment(BASE, (*refs[0], 4090), 7), errno.EINVAL),
        (segment((*refs[0], 1), BASE, 4096), errno.EINVAL),
        (segment((*refs[0], 4096), (*refs[1], 0), 1), errno.EINVAL),
        (segment((*refs[0], 0), (*refs[1], 65535), 65535), errno.EINVAL),
        (segment(BASE - 1, (*refs[0], 0), 4), errno.EFAULT),
        (segment(BASE + SIZE - 3, (*refs[0], 0), 4), errno.EFAULT),
        (segment((*refs[0], 0), BASE + SIZE - 3, 4), errno.EFAULT),
        (segment((*refs[0], 0), 2**64 - 2, 4), errno.EFAULT),
        (segment(0, (*refs[0], 0), 4), errno.EFAULT),
    ):
        done = bytes(ram.data[:1])
        grants.page(refs[0])[:1] = b"\xee"
        assert fails(grants, ram, *good[:place], bad, *good[place:]) == expected
        assert place < 2 or grants.page(refs[0])[:1] == done, "its first segment"


def test_one_reference_in_many_segments(grants, ram):
    """Goal: Xen's limit of 128 pins of a grant is no limit on segments; with all pins taken by mappings it is a status.
    Method: 3 SLICEs over one page in each direction, with 127 mappings of it, then with one more."""
    (ref,) = grants.grant(2, 1, 1)
    track = grants.domains[1].maptrack
    mappings = [track.map(*ref)[1] for _ in range(127)]
    count = 3 * SLICE
    assert run(grants, ram, *[segment(BASE + at, (*ref, at), 1) for at in range(count)]) == [0] * count
    assert grants.page(ref)[:count] == ram.data[:count]
    assert run(grants, ram, *[segment((*ref, at), BASE + 5000 + at, 1) for at in range(count)]) == [0] * count
    assert ram.data[5000 : 5000 + count] == ram.data[:count]
    mappings.append(track.map(*ref)[1])
    assert run(grants, ram, segment(BASE, (*ref, 0), 1)) == [GNTST_general_error]
    assert run(grants, ram, segment((*ref, 0), BASE, 1)) == [GNTST_okay], "readers are counted apart"
    track.unmap_all()


def test_pinned_only_meanwhile(grants, ram):
    """Goal: a frame is pinned while its data moves and no longer; neighbours in one direction move together; others have
    their turn after each SLICE, with nothing pinned.  Method: the steps of a long copy, with what is pinned at each."""
    refs = grants.grant(2, 1, 3)
    segments = [segment(BASE, (*refs[0], 0), 1)] * SLICE + [segment((*refs[1], 0), BASE, 1)] * 3
    segments += [segment(BASE, (*refs[2], 0), 1)] * 2
    active = grants.domains[2].grants.active
    job = copy(grants.domains[1], b"".join(segments))
    seen = []
    for step in job:
        pieces = len(step.pieces) if isinstance(step, TransferIn | TransferOut) else 0
        seen.append((type(step), pieces, sorted(active)))
    one, two, three = (ref for _, ref in refs)
    assert seen == [
        (TransferIn, SLICE, [one]), (Pause, 0, []), (TransferOut, 3, [two, three]), (TransferIn, 2, [two, three])
    ]  # fmt: skip


def test_given_up_in_the_middle(grants, ram):
    """Goal: a job that is never finished, and a granter that ends while data moves, leave no pin and break nothing.
    Method: close the generator at its first step; destroy the granter there, and finish."""
    (ref,), (other,) = grants.grant(2, 1, 1), grants.grant(3, 1, 1)
    many = b"".join([segment(BASE, (*ref, 0), 4)] * (SLICE + 1) + [segment((*other, 0), BASE + 9, 1)])
    job = copy(grants.domains[1], many)
    next(job)
    job.close()
    assert not grants.domains[2].grants.active
    job = copy(grants.domains[1], many)
    step = next(job)
    table = grants.domains.pop(2).grants
    grants.hypervisor.destroy_domain(2)
    ram.do(step)
    assert finish(job, ram) == [0] * SLICE + [GNTST_bad_domain, 0] and not table.active


PLACES = 5  # of 16 bytes each: in two pages, and in memory
places = st.tuples(st.integers(0, 2), st.integers(0, PLACES - 1))


@given(moves=st.lists(st.tuples(places, places, st.integers(0, 16)), max_size=30))
@settings(max_examples=60)
def test_one_after_the_other(moves):
    """Goal: a later segment reads what an earlier one wrote.
    Method: random copies among a few places that overlap; the oracle does them one by one on bytes."""
    grants, ram = Grants(8), Ram(SIZE, BASE)
    refs = [*grants.grant(2, 1, 1), *grants.grant(3, 1, 1)]
    stores = [grants.page(refs[0]), grants.page(refs[1]), memoryview(ram.data)]
    for number, store in enumerate(stores):
        store[:64] = bytes(number * 64 + at for at in range(64))
    model = [bytearray(store[:100]) for store in stores]

    def at(place: tuple[int, int]) -> Side:
        store, number = place
        return BASE + 8 * number if store == 2 else (*refs[store], 8 * number)

    segments = []
    for source, dest, length in moves:
        if source[0] == dest[0] == 2 or (source[0] == dest[0] and abs(source[1] - dest[1]) < 2):
            continue  # no grant; within a page bytes that overlap have no order
        segments.append(segment(at(source), at(dest), length))
        data = bytes(model[source[0]][8 * source[1] : 8 * source[1] + length])
        model[dest[0]][8 * dest[1] : 8 * dest[1] + length] = data
    assert run(grants, ram, *segments) == [0] * len(segments)
    assert [bytearray(store[:100]) for store in stores] == model
    grants.close()
