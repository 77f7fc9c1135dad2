"""interrupt.py: the first signal ends a run through every `finally`, but never between making a thing and noting it.

Called by net.py and whatever starts processes for it. Later signals are ignored: they must not cut the clearing up short.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_holding = 0
_seen = False


def install() -> None:
    """From now on one of SIGNALS is a KeyboardInterrupt in the main thread."""
    for number in SIGNALS:
        signal.signal(number, _handle)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A signal within the block is taken at its end. For blocks that must be done in full and do not last."""
    global _holding
    _holding += 1
    try:
        yield
    finally:
        _holding -= 1
    if _seen and not _holding:
        _interrupt()


def _handle(number: int, frame: FrameType | None) -> None:
    global _seen
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    if _holding:
        _seen = True
    else:
        raise KeyboardInterrupt


def _interrupt() -> None:
    global _seen
    _seen = False
    raise KeyboardInterrupt
