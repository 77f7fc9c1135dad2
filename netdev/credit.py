"""credit.py: how much a guest may transmit: xen-netback's credit_bytes per credit_usec, from the vif node `rate`.

Called by netback for each frame of the guest's tx ring, with the time of its clock. Credit comes in whole intervals, counted
from the start, and is kept up to a burst of at least 131072 bytes, so that the largest frame always fits (Linux: "otherwise
the interface can seize up").
Invariants: what went through since the start is never more than the first credit, plus one credit for each interval that
passed, plus what one frame may exceed the burst by; a frame that has to wait can go at the time that take() says, if no
other was let through meanwhile.
Deliberately not Linux's: intervals in which nobody asked count too, so one wait is enough where Linux's timer fires for
each interval. Left out: the timer, which is the caller's.
"""

from __future__ import annotations

MIN_BURST_BYTES = 131072  # xenvif: a jumbo packet of up to 128 KiB
MAX_RATE_BYTES = (1 << 64) - 1  # what Linux starts from, an unsigned long of all ones: no limit
MAX_INTERVAL_US = (1 << 32) - 1  # libxl: uint32_t rate_interval_usecs


class Credit:
    """`bytes_per_interval` and `interval_us` are at least 1. Times are seconds of a clock that never goes back."""

    __slots__ = ("_at_us", "burst_bytes", "bytes_per_interval", "interval_us", "remaining")

    def __init__(self, bytes_per_interval: int, interval_us: int, now: float) -> None:
        assert bytes_per_interval > 0, f"a rate of {bytes_per_interval} bytes lets nothing through"
        assert interval_us > 0, f"an interval of {interval_us} us never ends"
        self.bytes_per_interval = bytes_per_interval
        self.interval_us = interval_us
        self.burst_bytes = max(MIN_BURST_BYTES, bytes_per_interval)
        self.remaining = bytes_per_interval  # below 0 after a frame that was larger than any burst
        self._at_us = round(now * 1e6)  # where the interval began that the credit was last raised for

    def take(self, size: int, now: float) -> float:
        """0.0 if a frame of `size` bytes may go now, which takes it off; else when it may, in seconds of the same clock.

        A frame larger than the burst goes when the credit is at its maximum, and what it exceeds is owed."""
        interval = self.interval_us
        elapsed = (round(now * 1e6) - self._at_us) // interval
        if elapsed > 0:
            self._at_us += elapsed * interval
            self.remaining = min(self.remaining + elapsed * self.bytes_per_interval, self.burst_bytes)
        missing = min(size, self.burst_bytes) - self.remaining
        if missing <= 0:
            self.remaining -= size
            return 0.0
        intervals = -(-missing // self.bytes_per_interval)
        return (self._at_us + intervals * interval) / 1e6


def parse_rate(text: str) -> tuple[int, int] | None:
    """The node `rate`, "BYTES,USECS" in decimal; None for a rate without limit: an interval of 0, or all ones as bytes.

    ValueError for anything else. Linux takes that for no limit and warns."""
    number, comma, interval = text.partition(",")
    if not comma or not _decimal(number) or not _decimal(interval):
        raise ValueError(f"rate is {_shown(text)}; BYTES,USECS was expected, for example 125000,50000 for 20 Mbit/s")
    size, interval_us = int(number), int(interval)
    if size > MAX_RATE_BYTES or interval_us > MAX_INTERVAL_US:
        raise ValueError(f"rate is {_shown(text)}; at most {MAX_RATE_BYTES} bytes in {MAX_INTERVAL_US} us are possible")
    if interval_us == 0 or size == MAX_RATE_BYTES:
        return None
    if size == 0:
        raise ValueError(f"rate is {_shown(text)}: with 0 bytes in an interval nothing could ever be sent")
    return size, interval_us


def _decimal(text: str) -> bool:
    """Digits as simple_strtoul takes them: no sign, no blank; of a length that int() is quick with."""
    return text.isascii() and text.isdigit() and len(text) <= 40


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")
