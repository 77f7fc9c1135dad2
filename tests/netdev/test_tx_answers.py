"""Goal: netif.h promises no order of responses, so whatever order a backend answers in, the guest goes on sending.
Method: a real FrontTx, a backend played by hand that holds one answer back for long, and by hypothesis any order in any
number of pieces; at the end every page and slot is free."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netdev.link import BLOCKED, IDLE
from tests.netdev.halves import STARTS, TxFront, needs_gso, numbered, unfinished
from tests.netdev.test_headers import Frame

SMALL, LARGE = 60, 65535
GSO = Frame(payload=bytes(range(256)) * 30)
ORDERS = {
    "as asked": lambda ids, _: ids,
    "backwards": lambda ids, _: ids[::-1],
    "the oldest last": lambda ids, _: ids[1:] + ids[:1],
    "the newest first": lambda ids, _: ids[-1:] + ids[:-1],
    "any": lambda ids, seed: Random(seed).sample(ids, len(ids)),
}


@contextmanager
def front_end(start: int) -> Iterator[TxFront]:
    front = TxFront(start=start)
    try:
        yield front
    finally:
        front.close()


def check_all_free(front: TxFront) -> None:
    """Nothing is out, and the largest frame can be sent at once."""
    tx = front.tx
    assert (tx.out.count(1), tx.head - tx.tail, tx.ring.free) == (0, 0, tx.size)
    assert front.send(numbered(LARGE)) == IDLE and not tx.blocked
    assert front.frames() == [numbered(LARGE)]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("held", [0, 1, 17, 239])
def test_one_answer_is_long_in_coming(start: int, held: int):
    """Goal: what was answered before its turn is free once the one before it is back, also if that answer is all there is
    to see.  Method: 240 small frames, one of which is answered after all others and after a frame of 16 pages."""
    with front_end(start) as front:
        front.send(*[numbered(SMALL, i) for i in range(240)])
        ids = [packet.slots[0][3] for packet in front.take()]
        last = ids.pop(held)
        front.answer(ids)
        front.nudge()
        front.send(numbered(LARGE))
        (large,) = front.take()
        front.answer_all([large])
        front.nudge()
        front.answer([last])
        front.nudge()
        check_all_free(front)


@pytest.mark.parametrize("order", ORDERS)
def test_a_full_ring_goes_on(order: str):
    """Goal: a kernel that waits for room is told when there is some.  Method: rounds of a full ring, the answers to each in
    that order; no event but those that were asked for."""
    with front_end(0) as front:
        frames = [numbered(SMALL if i % 3 else 9000, i) for i in range(900)]
        front.send(*frames)
        got: list[bytes] = []
        while sent := front.take():
            got += [packet.frame for packet in sent]
            front.answer(ORDERS[order]([slot[3] for packet in sent for slot in packet.slots], len(got)))
            front.send()
        assert got == frames
        front.nudge()
        check_all_free(front)


ROUND = st.tuples(
    st.lists(st.tuples(st.integers(1, 120), st.sampled_from([SMALL, 4097, LARGE, None])), min_size=1, max_size=3),
    st.sampled_from(sorted(ORDERS)),
    st.integers(0, 999),  # seed of "any"
    st.integers(0, 100),  # per cent of what is out that is answered now
    st.lists(st.integers(0, 100), max_size=4),  # where the answers are cut into pieces, in per cent
    st.booleans(),  # events?
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.sampled_from(STARTS), st.lists(ROUND, min_size=1, max_size=5))
def test_any_order_in_any_number_of_pieces(start: int, rounds: list[Any]) -> None:
    """Goal: nothing is lost, doubled or stuck.  Method: rounds of frames of any kind (None: with GSO, whose extra slot has
    an answer of its own), after each of which some of what is out is answered; then the rest."""
    with front_end(start) as front:
        sent: list[bytes] = []
        got: list[bytes] = []
        out: list[int | None] = []

        def go_on() -> int:
            outcome = front.send()
            for packet in front.take():
                got.append(packet.frame)
                out.extend(slot[3] for slot in packet.slots)
                out.extend([None] * packet.extras)
            return outcome

        for kinds, order, seed, share, cuts, tell in rounds:
            for count, size in kinds:
                for i in range(count):
                    frame = numbered(size, len(sent) + i) if size else unfinished(GSO)
                    front.lane.push(frame, bytes(10) if size else needs_gso(GSO))
                    sent.append(frame)
            go_on()
            answers = ORDERS[order](list(out), seed)[: len(out) * share // 100]
            ends = sorted({len(answers) * cut // 100 for cut in cuts} | {0, len(answers)})
            for begin, end in itertools.pairwise(ends):
                front.answer(answers[begin:end], tell=tell)
                for ident in answers[begin:end]:
                    out.remove(ident)
                go_on()
        while out or front.lane.waiting:
            assert out, f"{len(front.lane.waiting)} frames wait, and nothing is out"
            answers = Random(len(sent)).sample(out, len(out))
            out.clear()
            front.answer(answers)
            front.nudge()
            assert go_on() != BLOCKED or out
        assert got == sent
        check_all_free(front)
