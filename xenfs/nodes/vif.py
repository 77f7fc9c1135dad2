"""vif.py: what inspect/ shows of a vif: what its frontend agreed on with the backend, the rings of both, and what crossed
or was dropped."""

from __future__ import annotations

from collections.abc import Iterable

from netdev.netback import Netback
from netdev.netfront import Netfront
from netdev.statistics import Statistics
from xenmodel.public.io.ring import REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD
from xenmodel.ring import U32, BackRing, FrontRing

Row = tuple[object, ...]


def vif(front: Netfront) -> str:
    """The frontend: one fact per line, then one line per ring."""
    facts: list[tuple[str, object]] = [
        ("state", front.state.name),
        ("broken", front.broken or "no"),
        ("mac", front.mac.hex(":")),
        ("mtu", front.mtu),
        ("link", "up" if front.link_up else "down"),
        *((f"feature-{key}" if key != "queues" else key, int(value)) for key, value in front.features.items()),
        ("trusted", int(front.trusted)),
        ("quarantined", front.quarantined),
    ]
    for queue in front.queues:
        facts += [(f"tx-{queue.number}", counts(queue.tx.statistics)), (f"rx-{queue.number}", counts(queue.rx.statistics))]
    return "".join(f"{key} {value}\n" for key, value in facts)


def counts(statistics: Statistics) -> str:
    """packets=, bytes=, dropped=, and each reason for a drop."""
    text = f"packets={statistics.packets} bytes={statistics.bytes} dropped={statistics.dropped}"
    if statistics.fixups:
        text += f" fixups={statistics.fixups}"
    if statistics.bad_pages:
        text += f" bad_pages={statistics.bad_pages}"
    return text + "".join(f" ({reason}: {count})" for reason, count in sorted(statistics.drops.items()))


def front_rings(fronts: Iterable[tuple[str, Netfront]]) -> Iterable[Row]:
    """Rows for inspect/rings, of the frontends."""
    for name, front in fronts:
        for queue in front.queues:
            for half in (queue.tx, queue.rx):
                kind = "tx" if half is queue.tx else "rx"
                answered = (half.ring.words[RSP_PROD] - half.ring.rsp_cons) & U32  # and not collected yet
                out = max(0, half.ring.size - half.ring.free - answered)
                yield (name, f"front {kind}", queue.number, *_indices(half.ring), out, "", counts(half.statistics))


def back_rings(backs: Iterable[tuple[str, Netback]]) -> Iterable[Row]:
    """And of the backends."""
    for name, back in backs:
        for number, queue in enumerate(back.queues):
            for half in (queue.tx, queue.rx):
                kind = "tx" if half is queue.tx else "rx"
                yield (name, f"back {kind}", number, *_indices(half.ring), "", "", counts(half.statistics))


def _indices(ring: FrontRing | BackRing) -> Row:
    words = ring.words
    return (ring.size, words[REQ_PROD], words[REQ_EVENT], words[RSP_PROD], words[RSP_EVENT])
