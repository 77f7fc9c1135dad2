"""Goal: how many frames a poll reads follows what came lately, within its bounds; a MAC is six bytes of a station, or none.
Method: Batch under arrivals drawn by hypothesis and under three plain loads; a table of texts.
"""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netdev.link import BATCH, BLOCKED, IDLE, MORE, VNET_SIZE, Batch, parse_mac
from netdev.vnet import VNET
from xenmodel.types import PeerFault


def test_constants():
    """Goal: three outcomes that differ; the header of linux/virtio_net.h.  Method: compare."""
    assert len({IDLE, MORE, BLOCKED}) == 3 and VNET.size == VNET_SIZE == 10


def drain(batch: Batch, waiting: int) -> tuple[int, int]:
    """Poll until nothing waits: how many polls, and the most that one of them read."""
    polls = most = 0
    while True:
        count = min(batch.limit, waiting)
        empty = count < batch.limit
        batch.took(count, empty)
        waiting -= count
        polls, most = polls + 1, max(most, count)
        if empty:
            return polls, most


def test_one_by_one_costs_no_read_in_vain():
    batch = Batch()
    for _ in range(10):
        batch.took(1, False)  # there was one, and the limit says not to look for another
        batch.took(0, True)
        assert batch.limit == 1


def test_a_burst_that_comes_again_is_read_at_once():
    """Goal: the second of two equal bursts takes one poll, and one that finds nothing."""
    for size in (1, 2, 5, 30, BATCH):
        batch = Batch()
        drain(batch, size)
        assert batch.limit == size
        assert drain(batch, size) == (2, size)


def test_a_stream_reaches_the_most():
    """Goal: under load batches grow to BATCH within few polls, and shrink again.  Method: 10000 frames, then single ones."""
    batch = Batch()
    polls, most = drain(batch, 10_000)
    assert most == BATCH and polls < 10_000 / BATCH + 40
    drain(batch, 1)
    assert batch.limit == 1


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.integers(0, 5), st.integers(0, 3000)), max_size=30), st.integers(0, 64))
def test_within_bounds(bursts: list[int], blocked_after: int):
    """Goal: never 0, for then nothing would ever move, and never more than BATCH.  Method: any bursts, and polls that end
    early because the ring was full."""
    batch = Batch()
    for burst in bursts:
        batch.took(min(blocked_after, batch.limit), False)
        assert 1 <= batch.limit <= BATCH
        drain(batch, burst)
        assert 1 <= batch.limit <= BATCH


GOOD = {
    "00:16:3e:12:34:56": "00163e123456",
    "00:16:3E:AB:cd:eF": "00163eabcdef",
    "0:16:3e:1:2:3": "00163e010203",
    "02:00:00:00:00:00": "020000000000",
    "fe:ff:ff:ff:ff:ff": "feffffffffff",
}
BAD = [
    None, "", "00:16:3e:12:34", "00:16:3e:12:34:56:78", "00-16-3e-12-34-56", "00163e123456", "00:16:3e:12:34:5g",
    "00:16:3e:12:34:", "00:16:3e:12:34:567", "00:16:3e:12:34:-1", "00:16:3e:12:34:+1", "00:16:3e:12:34: 1",
    "\u0660\u0660:16:3e:12:34:56", "00:00:00:00:00:00", "01:16:3e:12:34:56", "ff:ff:ff:ff:ff:ff",
    "00:16:3e:12:34:56\n", "0_0:16:3e:12:34:56",
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_mac(text: str):
    assert parse_mac(text, "mac").hex() == GOOD[text]


@pytest.mark.parametrize("text", BAD)
def test_no_mac(text: str | None):
    """Goal: the message says where it was, what it was, and what would be right."""
    with pytest.raises(PeerFault, match=r"device/vif/0/mac is .*00:16:3e:12:34:56") as caught:
        parse_mac(text, "device/vif/0/mac")
    assert repr(text) in str(caught.value)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=40), st.binary(min_size=6, max_size=6))
def test_any_text(text: str, address: bytes):
    """Goal: nothing but PeerFault, whatever the store holds; every station's address is read as it is written."""
    with suppress(PeerFault):
        assert len(parse_mac(text, "mac")) == 6
    station = bytes([address[0] & 0xFE | 2]) + address[1:]
    assert parse_mac(station.hex(":"), "mac") == parse_mac(station.hex(":").upper(), "mac") == station
