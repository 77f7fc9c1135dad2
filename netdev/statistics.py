"""statistics.py: what one ring of a vif has carried and dropped. Called by both ends' queues; shown under inspect/."""

from __future__ import annotations


class Statistics:
    """`packets` and `bytes` that crossed; `drops` by reason (a bounded set of texts, none of them made from peer data);
    `fixups`: GSO packets whose checksum the guest had finished (Linux: tx_gso_checksum_fixup); `bad_pages`: posted pages
    that were not granted, each answered with an error."""

    __slots__ = ("bad_pages", "bytes", "drops", "fixups", "packets")

    def __init__(self) -> None:
        self.packets = self.bytes = self.fixups = self.bad_pages = 0
        self.drops: dict[str, int] = {}

    def drop(self, reason: str, count: int = 1) -> None:
        self.drops[reason] = self.drops.get(reason, 0) + count

    @property
    def dropped(self) -> int:
        return sum(self.drops.values())
