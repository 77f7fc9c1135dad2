"""Goal: a guest transmits at its rate, never faster than burst and rate allow, and nothing waits for ever.
Method: a Credit with a clock that the test moves; tables for single cases, hypothesis for what holds for every sender."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netdev.credit import MAX_INTERVAL_US, MAX_RATE_BYTES, MIN_BURST_BYTES, Credit, parse_rate

BURST = MIN_BURST_BYTES
SLOW = (1000, 10_000)  # 1000 bytes in 10 ms
CASES: dict[str, tuple[tuple[int, int], list[tuple[int, float, float]]]] = {
    # rate, then for each frame: size, when, and when to come again (0: it went)
    "the first credit is there at once": (SLOW, [(1000, 0, 0), (1, 0, 0.01)]),
    "one wait for all the intervals it takes": (SLOW, [(1000, 0, 0), (1500, 0, 0.02), (1500, 0.02, 0), (501, 0.02, 0.03)]),
    "not before the interval ends": (SLOW, [(1000, 0, 0), (1, 0.005, 0.01), (1, 0.009999, 0.01), (1, 0.01, 0)]),
    "being late does not move the intervals": (SLOW, [(1000, 0, 0), (1000, 0.018, 0), (1, 0.018, 0.02)]),
    "what was not used is kept": (SLOW, [(600, 0, 0), (600, 0.01, 0), (800, 0.01, 0), (1, 0.01, 0.02)]),
    "nothing costs nothing": (SLOW, [(0, 0, 0), (1000, 0, 0), (0, 0, 0)]),
    "a jump fills the burst and no more": (SLOW, [(BURST, 3600, 0), (1, 3600, 3600.01)]),
    "a clock that goes back": (SLOW, [(1000, 0, 0), (1000, 0.01, 0), (1, 0.002, 0.02), (1, 0.02, 0)]),
    "a clock that goes far back": (SLOW, [(0, 3600, 0), (BURST, 0, 0), (1, 0, 3600.01)]),
    "larger than any burst": (
        (100_000, 10_000),
        [(BURST + 5, 0, 0.01), (BURST + 5, 0.01, 0), (1, 0.01, 0.02), (99_995, 0.02, 0), (1, 0.02, 0.03)],
    ),
    "a byte each microsecond": ((1, 1), [(65535, 0, 0.065534), (65535, 0.065534, 0), (1, 0.065534, 0.065535)]),
    "credit beyond the least burst": ((500_000, 1_000_000), [(500_000, 0, 0), (250_000, 9, 0), (250_000, 9, 0), (1, 9, 10)]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("start", [0.0, 1000.0, 1e9 / 3])
def test_when_a_frame_goes(name: str, start: float) -> None:
    rate, frames = CASES[name]
    credit = Credit(*rate, start)
    for size, at, again in frames:
        answer = credit.take(size, start + at)
        assert answer == 0.0 if not again else answer == pytest.approx(start + again, abs=1e-6), (size, at)


rates = st.tuples(st.integers(1, 1_000_000) | st.integers(1, 2000), st.integers(1, 10_000_000) | st.integers(1, 100))


@given(
    rates,
    st.floats(0, 1e8),
    st.lists(st.tuples(st.integers(0, 200_000), st.sampled_from([0.0, 0.0, 1e-6, 0.003, 5.0])), max_size=60),
)
def test_every_sender(rate: tuple[int, int], start: float, frames: list[tuple[int, float]]) -> None:
    """Goal: after one wait, exactly as long as it was told, a frame goes; all together never exceed credit and burst.
    Method: each frame comes some time after the last went, and comes again when it was told to."""
    size_per_interval, interval_us = rate
    credit, now, passed = Credit(size_per_interval, interval_us, start), start, 0
    for size, pause in frames:
        now += pause
        again = credit.take(size, now)
        if again:
            assert again > now
            now = again
            assert credit.take(size, now) == 0.0, "it waited as long as it was told"
        passed += size
        earned = size_per_interval * (1 + (round(now * 1e6) - round(start * 1e6)) // interval_us)
        assert passed <= earned + max(0, size - credit.burst_bytes)
        assert credit.remaining <= credit.burst_bytes


@given(st.integers(1, BURST // 2), st.integers(1, 10_000_000), st.integers(1, BURST // 2))
def test_a_greedy_sender_gets_its_rate(size_per_interval: int, interval_us: int, size: int) -> None:
    """Goal: where no burst overflows, no byte of the rate is lost to waiting.
    Method: 200 frames as early as they may go; what was earned until then is what passed and what is left."""
    credit, now, passed = Credit(size_per_interval, interval_us, 0.0), 0.0, 0
    for _ in range(200):
        if again := credit.take(size, now):
            now = again
            assert credit.take(size, now) == 0.0
        passed += size
    earned = size_per_interval * (1 + round(now * 1e6) // interval_us)
    assert earned - passed == credit.remaining
    assert 0 <= credit.remaining < max(size, size_per_interval)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("125000,50000", (125000, 50000)),
        ("1,1", (1, 1)),
        ("007,010", (7, 10)),
        (f"{MAX_RATE_BYTES - 1},{MAX_INTERVAL_US}", (MAX_RATE_BYTES - 1, MAX_INTERVAL_US)),
        (f"{MAX_RATE_BYTES},50000", None),
        ("1000,0", None),
        ("0,0", None),
    ],
)
def test_rates(text: str, rate: tuple[int, int] | None) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "BYTES,USECS"),
        ("1000", "BYTES,USECS"),
        ("1000,", "BYTES,USECS"),
        (",50000", "BYTES,USECS"),
        ("1000,50000,", "BYTES,USECS"),
        ("1000, 50000", "BYTES,USECS"),
        (" 1000,50000", "BYTES,USECS"),
        ("-1,50000", "BYTES,USECS"),
        ("+1,50000", "BYTES,USECS"),
        ("1_000,50000", "BYTES,USECS"),
        ("0x10,50000", "BYTES,USECS"),
        ("1.5,50000", "BYTES,USECS"),
        ("10MB/s,50000", "BYTES,USECS"),
        ("٣,50000", "BYTES,USECS"),
        ("9" * 5000 + ",1", "BYTES,USECS"),
        (f"{MAX_RATE_BYTES + 1},1", "at most"),
        (f"1,{MAX_INTERVAL_US + 1}", "at most"),
        ("0,50000", "0 bytes"),
    ],
)
def test_bad_rates(text: str, reason: str) -> None:
    """Goal: what is no rate is refused with a sentence that shows it, and what would be right; a long one is cut short."""
    with pytest.raises(ValueError, match=reason) as caught:
        parse_rate(text)
    assert text[:20] in str(caught.value) and len(str(caught.value)) < 250


@given(st.text(st.sampled_from("0123456789,, -x"), max_size=12))
def test_any_rate(text: str) -> None:
    """Goal: a rate that is accepted is one that a Credit can work with."""
    try:
        rate = parse_rate(text)
    except ValueError:
        return
    if rate is not None:
        assert Credit(*rate, 0.0).take(1, 0.0) == 0.0
