"""text.py: small computed files: name, state, and what inspect/ says of rings and disks, one line per thing."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from blockdev.blkback import Blkback
from blockdev.blkfront import Blkfront
from xenfs.fuse.tree import Bytes
from xenmodel.public.io.ring import REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD


class Text(Bytes):
    """What `say()` returns now."""

    def __init__(self, say: Callable[[], str]) -> None:
        self.say = say

    def text(self) -> bytes:
        return self.say().encode()


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Columns padded to their widest cell."""
    cells = [[str(cell) for cell in row] for row in (tuple(header), *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() + "\n" for row in cells)


Row = tuple[object, ...]


def rings(rows: Iterable[Row]) -> str:
    """Every ring: its end, size, shared indices, and what is under way."""
    header = ("device", "end", "queue", "slots", "req_prod", "req_event", "rsp_prod", "rsp_event", "busy", "waiting")
    return table((*header, "served"), rows)


def front_rings(fronts: Iterable[tuple[str, Blkfront]]) -> Iterable[Row]:
    """Rows for rings(), of the disks' frontends."""
    for name, front in fronts:
        for i, queue in enumerate(front.queues):
            ring, words = queue.ring, queue.ring.words
            shared = (words[REQ_PROD], words[REQ_EVENT], words[RSP_PROD], words[RSP_EVENT])
            yield (name, "front", i, ring.size, *shared, ring.size - ring.free, len(front.waiting), "")


def back_rings(backs: Iterable[tuple[str, Blkback]]) -> Iterable[Row]:
    """And of their backends."""
    for name, back in backs:
        for i, queue in enumerate(back.queues):
            words, count = queue.ring.words, queue.statistics
            shared = (words[REQ_PROD], words[REQ_EVENT], words[RSP_PROD], words[RSP_EVENT])
            served = f"rd={count.rd_req} wr={count.wr_req} f={count.f_req} ds={count.ds_req} errors={count.errors}"
            yield (name, "back", i, queue.ring.size, *shared, queue.running, "", served)


def vbd(front: Blkfront) -> str:
    """What the two ends of a disk agreed on."""
    facts: list[tuple[str, object]] = [
        ("state", front.state.name),
        ("broken", front.broken or "no"),
        ("sectors", front.sectors),
        ("sector-size", front.sector_size),
        ("physical-sector-size", front.physical_sector_size),
        ("info", f"{front.info:#x}"),
        ("queues", len(front.queues)),
        ("segments", front.most_segments),
        ("persistent", int(front.persistent)),
        ("flush", {0: "none", 2: "barrier", 3: "flush-cache"}[front.flush_op]),
        ("discard-granularity", front.discard_granularity),
        ("trusted", int(front.trusted)),
        ("quarantined", front.quarantined),
    ]
    return "".join(f"{key} {value}\n" for key, value in facts)
