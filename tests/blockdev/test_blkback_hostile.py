"""Goal: whatever a frontend writes into its ring, blkback answers or closes that device; nothing else is harmed.
Method: a scripted frontend with raw slots beside a second disk that must go on working; the table names the slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from blockdev.blkback import Offer
from blockdev.storage import DelayedStorage, MemoryStorage
from tests.blockdev.scripted import ScriptedFront
from tests.blockdev.world import SECTORS, World
from xenmodel.public.io.blkif import BLKIF_RSP_EOPNOTSUPP, BLKIF_RSP_ERROR, BLKIF_RSP_OKAY
from xenmodel.public.io.ring import REQ_PROD
from xenmodel.testing import Footprint, check_world
from xenmodel.types import PAGE_SIZE, Gref, Pfn

READ, WRITE, BARRIER, FLUSH, RESERVED, DISCARD, INDIRECT = range(7)
HUGE = 0xFFFFFFFF


class Case:
    """A scripted frontend on xvda over `storage`, readonly if asked for, with a good and a bad page to point at."""

    def __init__(self, storage: MemoryStorage | DelayedStorage | None = None, offer: Offer | None = None) -> None:
        self.world = World(fronts=False)
        self.storage = storage or MemoryStorage(SECTORS)
        self.disk = self.world.attach("xvda", self.storage, offer=offer or Offer())
        self.front = ScriptedFront(self.world, self.disk)
        self.gref, self.page = self.front.data_page(b"\xaa" * PAGE_SIZE)

    @property
    def last_error(self) -> str:
        return self.disk.back.queues[0].statistics.last_error


@pytest.fixture
def case() -> Iterator[Case]:
    it = Case()
    it.front.connect()
    assert it.disk.states() == ("3", "4")
    yield it
    assert check_world(it.world.hypervisor) == []
    assert it.disk.back.state == 4, "one wrong request does not end a device"
    assert it.front.ask(it.front.slot(READ, [(it.gref, 0, 7)], 99)) == (99, READ, BLKIF_RSP_OKAY)
    it.world.close()


def _others(case: Case) -> Gref:
    """A page of the guest granted to another domain."""
    other = case.world.hypervisor.create_domain(16, "other")
    return case.world.guest.grants.grant_access(other.domid, Pfn(case.world.guest.memory.allocate()))


def _beyond(case: Case) -> Gref:
    """A grant of a frame that the guest does not have."""
    return case.world.guest.grants.grant_access(case.world.dom0.domid, Pfn(case.world.guest.memory.pages))


Make = Callable[[Case], bytes]
BAD: dict[str, tuple[Make, str]] = {
    "gref 0": (lambda c: c.front.slot(READ, [(0, 0, 7)]), "grant 0"),
    "unused gref": (lambda c: c.front.slot(READ, [(400, 0, 7)]), "grant 400"),
    "huge gref": (lambda c: c.front.slot(READ, [(HUGE, 0, 7)]), f"grant {HUGE}"),
    "somebody else's": (lambda c: c.front.slot(READ, [(_others(c), 0, 7)]), "grant"),
    "frame that is not there": (lambda c: c.front.slot(READ, [(_beyond(c), 0, 7)]), "grant"),
    "readonly grant for a read": (lambda c: c.front.slot(READ, [(c.front.data_page(readonly=True)[0], 0, 7)]), "grant"),
    "second segment bad": (lambda c: c.front.slot(READ, [(c.gref, 0, 7), (0, 0, 7)]), "grant 0"),
    "first > last": (lambda c: c.front.slot(READ, [(c.gref, 5, 4)]), "sectors 5..4"),
    "last > 7": (lambda c: c.front.slot(READ, [(c.gref, 0, 8)]), "sectors 0..8"),
    "last 255": (lambda c: c.front.slot(WRITE, [(c.gref, 255, 255)]), "sectors 255..255"),
    "no segments, read": (lambda c: c.front.slot(READ, []), "without segments"),
    "no segments, write": (lambda c: c.front.slot(WRITE, []), "without segments"),
    "12 segments": (lambda c: c.front.slot(READ, [(c.gref, 0, 7)] * 11, count=12), "12 segments"),
    "255 segments": (lambda c: c.front.slot(WRITE, [(c.gref, 0, 7)], count=255), "255 segments"),
    "end of the medium": (lambda c: c.front.slot(READ, [(c.gref, 0, 7)], sector=SECTORS - 7), "of 4096"),
    "sector 2**64 - 1": (lambda c: c.front.slot(READ, [(c.gref, 0, 0)], sector=2**64 - 1), "of 4096"),
    "wraps at 2**64": (lambda c: c.front.slot(WRITE, [(c.gref, 0, 7)], sector=2**64 - 8), "of 4096"),
    "off_t overflow": (lambda c: c.front.slot(WRITE, [(c.gref, 0, 7)], sector=2**55), "of 4096"),
    "barrier out of range": (lambda c: c.front.slot(BARRIER, [(c.gref, 0, 7)], sector=SECTORS), "of 4096"),
    "discard past the end": (lambda c: c.front.discard_slot(SECTORS - 1, 2), "of 4096"),
    "discard wraps": (lambda c: c.front.discard_slot(2**64 - 1, 2), "of 4096"),
    "secure discard past the end": (lambda c: c.front.discard_slot(1, 2**64 - 1, flag=1), "of 4096"),
    "indirect, none": (lambda c: c.front.indirect_slot(READ, [c.gref], 0), "0 indirect segments"),
    "indirect, 257": (lambda c: c.front.indirect_slot(READ, [c.gref], 257), "257 indirect"),
    "indirect, 65535": (lambda c: c.front.indirect_slot(READ, [c.gref] * 8, 65535), "65535 indirect"),
    "indirect of indirect": (lambda c: c.front.indirect_slot(INDIRECT, [c.gref], 1), "indirect operation 6"),
    "indirect flush": (lambda c: c.front.indirect_slot(FLUSH, [c.gref], 1), "indirect operation 3"),
    "indirect page bad": (lambda c: c.front.indirect_slot(WRITE, [0], 1), "grant 0"),
    "indirect page is garbage": (lambda c: c.front.indirect_slot(READ, [c.gref], 256), "sectors 170..170"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_request_is_answered_with_an_error(case: Case, name: str) -> None:
    """Goal: ERROR, a reason, no byte moved, nothing left mapped.  Method: the table, grants not persistent."""
    make, reason = BAD[name]
    slot = make(case)
    before, footprint = bytes(case.page), Footprint(case.world.hypervisor)
    op = slot[0]
    assert case.front.ask(slot) == (1, op, BLKIF_RSP_ERROR)
    assert reason in case.last_error
    assert bytes(case.page) == before
    assert isinstance(case.storage, MemoryStorage) and not any(case.storage.data)
    assert footprint.grown() == []


@pytest.mark.parametrize("name", BAD)
def test_wrong_requests_with_persistent_grants(name: str) -> None:
    """Goal: the same when grants stay mapped; a page that was granted twice over changes nothing.
    Method: the table again, each slot three times, then a good request."""
    case = Case()
    case.front.connect(persistent=True)
    make, reason = BAD[name]
    slot = make(case)
    for _ in range(3):
        assert case.front.ask(slot)[2] == BLKIF_RSP_ERROR
        assert reason in case.last_error
    assert check_world(case.world.hypervisor) == []
    assert case.front.ask(case.front.slot(READ, [(case.gref, 0, 7)], 99)).status == BLKIF_RSP_OKAY
    case.world.close()


@pytest.mark.parametrize("op", [RESERVED, 7, 100, 255])
def test_an_unknown_operation_is_not_supported(case: Case, op: int) -> None:
    assert case.front.ask(case.front.slot(op, [(case.gref, 0, 7)])) == (1, op, BLKIF_RSP_EOPNOTSUPP)


@pytest.mark.parametrize(
    ("offer", "slot_of", "status"),
    [
        (Offer(flush=False), lambda c: c.front.slot(FLUSH, []), BLKIF_RSP_EOPNOTSUPP),
        (Offer(barrier=False), lambda c: c.front.slot(BARRIER, []), BLKIF_RSP_EOPNOTSUPP),
        (Offer(barrier=False), lambda c: c.front.slot(BARRIER, [(c.gref, 0, 7)]), BLKIF_RSP_EOPNOTSUPP),
        (Offer(discard=False), lambda c: c.front.discard_slot(0, 8), BLKIF_RSP_EOPNOTSUPP),
        (Offer(max_indirect_segments=None), lambda c: c.front.indirect_slot(READ, [c.gref], 1), BLKIF_RSP_ERROR),
        (Offer(max_indirect_segments=16), lambda c: c.front.indirect_slot(READ, [c.gref], 17), BLKIF_RSP_ERROR),
        (Offer(max_indirect_segments=4096), lambda c: c.front.indirect_slot(READ, [c.gref] * 8, 4097), BLKIF_RSP_ERROR),
    ],
)
def test_what_was_not_offered_is_refused(offer: Offer, slot_of: Make, status: int) -> None:
    """Goal: a frontend that ignores the offer gets a status and loses nothing.  Method: one slot per offer."""
    case = Case(offer=offer)
    case.front.connect()
    footprint = Footprint(case.world.hypervisor)
    assert case.front.ask(slot_of(case)).status == status
    assert footprint.grown() == []
    case.world.close()


def test_secure_discard_is_a_plain_one(case: Case) -> None:
    """blkif.h: the flag is ignored while discard-secure is 0."""
    assert isinstance(case.storage, MemoryStorage)
    case.storage.data[:8192] = b"x" * 8192
    assert case.front.ask(case.front.discard_slot(0, 8, flag=1)).status == BLKIF_RSP_OKAY
    assert bytes(case.storage.data[:8192]) == bytes(4096) + b"x" * 4096


@pytest.mark.parametrize("op", [WRITE, BARRIER])
def test_writes_to_a_readonly_disk(op: int) -> None:
    case = Case(MemoryStorage(SECTORS, readonly=True))
    case.front.connect()
    assert case.front.ask(case.front.slot(op, [(case.gref, 0, 7)])).status == BLKIF_RSP_ERROR
    assert case.front.ask(case.front.discard_slot(0, 8)).status == BLKIF_RSP_EOPNOTSUPP
    assert case.front.ask(case.front.slot(FLUSH, [])).status == BLKIF_RSP_OKAY
    assert isinstance(case.storage, MemoryStorage) and not any(case.storage.data)
    case.world.close()


def test_duplicate_ids_are_both_answered(case: Case) -> None:
    """Goal: ids are the frontend's own business.  Method: four requests with one id at once."""
    for i in range(4):
        case.front.put(case.front.slot(READ, [(case.gref, 0, 0)], ident=7, sector=i), index=i)
    case.front.push(4)
    assert case.front.answers() == [(7, READ, 0)] * 4


def test_response_padding_is_zero(case: Case) -> None:
    """Goal: no stack or earlier bytes leak through padding (XSA-216).  Method: slots full of ones, raw answers."""
    slot = bytearray(case.front.slot(READ, [(case.gref, 0, 0)], ident=0x1122334455667788))
    slot[4:8] = slot[2:4] * 2
    slot[16 + 16 :] = b"\xff" * (len(slot) - 32)
    case.front.put(bytes(slot))
    case.front.push()
    assert case.front.answers()[0].ident == 0x1122334455667788
    assert case.front.raw_answer(0) == bytes.fromhex("8877665544332211 00 00 0000 00000000")


def test_a_read_into_the_ring_itself() -> None:
    """Goal: a guest that lets its disk overwrite its own ring loses the device and nothing else.
    Method: the ring page as the target of a read of 0xfe; then the indices are what the disk held."""
    storage = MemoryStorage(SECTORS)
    storage.data[:4096] = b"\xfe" * 4096
    case = Case(storage)
    case.front.connect()
    case.front.put(case.front.slot(READ, [(case.front.gref, 0, 7)]))
    case.front.push()
    assert case.disk.states()[1] == "6" and "req_prod" in (case.disk.errors()[1] or "")
    assert case.world.for_devices.mappings() == []
    case.world.close()


@pytest.mark.parametrize("jump", [33, 2**31, 2**31 + 1, HUGE, HUGE - 31])
@pytest.mark.parametrize("in_flight", [0, 5])
def test_a_producer_that_jumps_closes_this_device(jump: int, in_flight: int) -> None:
    """Goal: an index beyond the ring, or behind what was taken, ends the device with a reason and releases everything.
    Method: jumps on an idle ring and on one with requests held by the storage, before and after."""
    storage = DelayedStorage(MemoryStorage(SECTORS))
    case = Case(storage)
    footprint = Footprint(case.world.hypervisor)
    case.front.connect()
    for i in range(in_flight):
        case.front.put(case.front.slot(READ, [(case.gref, 0, 0)], ident=i), index=i)
    case.front.push(in_flight)
    assert len(storage.held) == in_flight
    case.front.words[REQ_PROD] = (case.front.words[REQ_PROD] + jump) & HUGE
    case.front.notify()
    assert "req_prod" in (case.disk.errors()[1] or "")
    while storage.release(lambda n: 0):
        case.world.settle()
    assert case.disk.states()[1] == "6"
    assert [name for name in footprint.grown() if "domain 0" in name and "watches" not in name] == []
    case.world.close()


def test_a_producer_that_jumped_before_the_backend_came() -> None:
    """Goal: a ring that is wrong from the start is not connected and closed in the wrong order.
    Method: the jump is in the page before Initialised is said."""
    case = Case()
    case.front.words[REQ_PROD] = 2**31
    case.front.connect()
    assert case.disk.states()[1] == "6"
    assert case.disk.back.broken is not None and case.disk.back.queues == []
    assert case.world.for_devices.mappings() == []
    case.world.close()
