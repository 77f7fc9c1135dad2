"""Goal: xenmodel.ring computes what the macros of Xen's own io/ring.h compute.
Method: one C program does every case of some tables with the macros, indices around 0, 2**31 and 2**32; compare.
Without a compiler or the headers these tests fail; they never skip.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tests.abi.headers import run_c
from xenmodel.public.io.ring import REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD
from xenmodel.ring import U32, BackRing, FrontRing
from xenmodel.types import PAGE_SIZE, PeerFault

SLOT_SIZE, SIZE = 112, 32
BASES = [(edge + d) & U32 for edge in (0, 2**31, 2**32) for d in (-33, -32, -31, -2, -1, 0, 1, 2)]
JUMPS = [-(2**31), -33, -32, -2, -1, 0, 1, 2, 7, 31, 32, 33, 2**31 - 1]
COUNTS = [0, 1, 2, 31, 32]

PROLOGUE = """
#define xen_mb() ((void)0)
#define xen_rmb() ((void)0)
#define xen_wmb() ((void)0)
#include <xen/io/ring.h>
struct probe_req { unsigned char bytes[112]; };
struct probe_rsp { unsigned char bytes[16]; };
DEFINE_RING_TYPES(probe, struct probe_req, struct probe_rsp);
static union { probe_sring_t sring; unsigned char page[4096]; } u;
"""

Case = tuple[int, int, int]
CASES: list[Case] = [(base, count, jump & U32) for base in BASES for count in COUNTS for jump in JUMPS]


def ask_c(statements: str) -> list[str]:
    """Run `statements` for every case (base, count, jump) in C; they print one word per result."""
    table = ",".join(f"{{{base}u,{count}u,{jump}u}}" for base, count, jump in CASES)
    body = [
        f"static const unsigned cases[][3] = {{{table}}};",
        f"for (unsigned n = 0; n < {len(CASES)}; n++) {{",
        "unsigned base = cases[n][0], count = cases[n][1], jump = cases[n][2]; int r = 0;",
        "probe_sring_t *sring = &u.sring; probe_front_ring_t front; probe_back_ring_t back;",
        "SHARED_RING_INIT(sring); FRONT_RING_INIT(&front, sring, 4096); BACK_RING_INIT(&back, sring, 4096);",
        'printf("%u\\t", n);',
        statements,
        'printf("\\n"); }',
    ]
    said = run_c("xen/io/ring.h", body, prologue=PROLOGUE)
    return [said[str(n)].strip() for n in range(len(CASES))]


def compare(ours: Iterable[str], theirs: list[str]) -> None:
    differences = [
        f"base {case[0]:#x} count {case[1]} jump {case[2]:#x}: ours {our}, C {their}"
        for case, our, their in zip(CASES, ours, theirs, strict=True)
        if our != their
    ]
    assert not differences, "\n".join(differences[:10])
    assert len(set(theirs)) > 1, "the cases do not tell anything apart"


def rings() -> tuple[FrontRing, BackRing]:
    view = memoryview(bytearray(PAGE_SIZE))
    return FrontRing(view, SLOT_SIZE), BackRing(view, SLOT_SIZE)


def test_push_and_notify():
    """Goal: RING_PUSH_*_AND_CHECK_NOTIFY.  Method: old producer = base, new = base + count, event = base + jump."""
    theirs = ask_c("""
        sring->req_prod = base; front.req_prod_pvt = base + count; sring->req_event = base + jump;
        RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(&front, r); printf("%d %u ", r, sring->req_prod);
        sring->rsp_prod = base; back.rsp_prod_pvt = base + count; sring->rsp_event = base + jump;
        RING_PUSH_RESPONSES_AND_CHECK_NOTIFY(&back, r); printf("%d %u", r, sring->rsp_prod);""")
    front, back = rings()
    ours = []
    for base, count, jump in CASES:
        front.words[REQ_PROD], front.words[REQ_EVENT] = base, (base + jump) & U32
        back.words[RSP_PROD], back.words[RSP_EVENT] = base, (base + jump) & U32
        front.req_prod_pvt = back.rsp_prod_pvt = (base + count) & U32
        told = front.push_requests(), back.push_responses()
        ours.append(f"{told[0]:d} {front.words[REQ_PROD]} {told[1]:d} {back.words[RSP_PROD]}")
    compare(ours, theirs)


def test_requests_waiting_and_overflow():
    """Goal: RING_REQUEST_PROD_OVERFLOW and the number of requests.  Method: answered = base, taken = base + count, the
    peer's producer = base + jump. The macro does not mind a producer behind what was taken; there we are stricter."""
    theirs = ask_c("""
        back.rsp_prod_pvt = base; back.req_cons = base + count; sring->req_prod = base + jump;
        if (RING_REQUEST_PROD_OVERFLOW(&back, sring->req_prod)) printf("overflow");
        else if (jump < count) printf("behind");
        else printf("%u", (unsigned)XEN_RING_NR_UNCONSUMED_REQUESTS(&back));""")
    _, back = rings()
    ours = []
    for base, count, jump in CASES:
        back.rsp_prod_pvt, back.req_cons, back.words[REQ_PROD] = base, (base + count) & U32, (base + jump) & U32
        try:
            ours.append(str(back.requests()))
        except PeerFault:
            ours.append("behind" if jump < count else "overflow")
    compare(ours, theirs)


def test_responses_waiting_and_overflow():
    """Goal: RING_RESPONSE_PROD_OVERFLOW and free slots.  Method: consumed = base, asked = base + count, the peer's producer
    = base + jump. The macro allows a whole ring of responses; we allow as many as were asked for."""
    theirs = ask_c("""
        front.rsp_cons = base; front.req_prod_pvt = base + count; sring->rsp_prod = base + jump;
        printf("%u ", RING_FREE_REQUESTS(&front));
        if (RING_RESPONSE_PROD_OVERFLOW(&front, sring->rsp_prod)) printf("overflow");
        else if (jump > count) printf("unasked");
        else printf("%u", (unsigned)XEN_RING_NR_UNCONSUMED_RESPONSES(&front));""")
    front, _ = rings()
    ours = []
    for base, count, jump in CASES:
        front.rsp_cons, front.req_prod_pvt = base, (base + count) & U32
        front.words[RSP_PROD] = (base + jump) & U32
        try:
            waiting = str(front.responses())
        except PeerFault:
            waiting = "overflow" if jump > SIZE else "unasked"
        ours.append(f"{front.free} {waiting}")
    compare(ours, theirs)


@pytest.mark.parametrize("side", ["front", "back"])
def test_final_check(side: str):
    """Goal: RING_FINAL_CHECK_FOR_*: what it returns and the event it leaves.  Method: only indices that are legal."""
    requests = """
        back.rsp_prod_pvt = base; back.req_cons = base; sring->req_prod = base + count; sring->req_event = base + jump;
        RING_FINAL_CHECK_FOR_REQUESTS(&back, r); printf("%d %u", r, sring->req_event);"""
    responses = """
        front.rsp_cons = base; front.req_prod_pvt = base + 32; sring->rsp_prod = base + count;
        sring->rsp_event = base + jump; RING_FINAL_CHECK_FOR_RESPONSES(&front, r); printf("%d %u", r, sring->rsp_event);"""
    theirs = ask_c(responses if side == "front" else requests)
    front, back = rings()
    ours = []
    for base, count, jump in CASES:
        event, produced = (base + jump) & U32, (base + count) & U32
        if side == "front":
            front.rsp_cons, front.req_prod_pvt = base, (base + SIZE) & U32
            front.words[RSP_PROD], front.words[RSP_EVENT] = produced, event
            ours.append(f"{front.final_check_for_responses()} {front.words[RSP_EVENT]}")
        else:
            back.rsp_prod_pvt = back.req_cons = base
            back.words[REQ_PROD], back.words[REQ_EVENT] = produced, event
            ours.append(f"{back.final_check_for_requests()} {back.words[REQ_EVENT]}")
    compare(ours, theirs)


def test_where_the_slots_are():
    """Goal: RING_GET_REQUEST and RING_SIZE.  Method: the address of slot base + jump, less that of the page."""
    theirs = ask_c("""
        printf("%u %ld", RING_SIZE(&back), (long)((char *)RING_GET_REQUEST(&back, base + jump) - (char *)sring));""")
    front, back = rings()
    compare([f"{back.size} {back.offset((base + jump) & U32)}" for base, _, jump in CASES], theirs)
    front.req_prod_pvt = back.req_cons = back.rsp_prod_pvt = front.rsp_cons = U32
    expected = front.offset(U32)
    assert [front.next_request(), back.next_request(), back.next_response(), front.next_response()] == [expected] * 4
