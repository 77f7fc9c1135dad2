"""Goal: every pair of offer and wish that netif.h allows comes to an agreement, and every kind of frame crosses it whole.
Method: real drivers on both sides; all that one side can turn off against everything of the other, and both at once by
hypothesis. What arrives at a kernel that takes no offload must be what a sender without offload would have sent, worked out
here with netdev/checksum.py and segment.py alone. The keys are compared with those of Linux on a real Xen 4.17, in order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netdev.cable import MemoryPort
from netdev.checksum import complete, pseudo, verify
from netdev.headers import flow_hash, transport
from netdev.netback import Offer
from netdev.netfront import Want
from netdev.segment import segment
from netdev.vnet import F_NEEDS_CSUM, GSO_TCPV4, VNET, gso, partial
from tests.netdev.test_headers import TCP, UDP, Frame
from tests.netdev.world import NetWorld, Vif

Sent = tuple[bytes, bytes]  # virtio_net header, frame
MSS = 1400
BIG = bytes(range(256)) * 250  # 64000
ALL_OFFERS = [dict(zip(("sg", "gso4", "gso6", "csum6", "split"), on, strict=True))
              for on in itertools.product((True, False), repeat=5)]  # fmt: skip
ALL_WANTS = [dict(zip(("sg", "gso4", "gso6", "csum", "csum6", "split"), on, strict=True))
             for on in itertools.product((True, False), repeat=6)]  # fmt: skip


def blank(frame: Frame) -> bytearray:
    """As a kernel leaves it to its interface: the field holds the sum of the pseudo-header."""
    packed = bytearray(frame.packed)
    place = transport(packed)
    assert place is not None
    at = place.start + place.checksum
    packed[at : at + 2] = pseudo(packed, place, len(frame.transport)).to_bytes(2, "big")
    return packed


def unfinished(frame: Frame) -> Sent:
    packed = blank(frame)
    place = transport(packed)
    assert place is not None
    return partial(place), bytes(packed)


def finished(frame: Frame) -> Sent:
    packed = blank(frame)
    place = transport(packed)
    assert place is not None
    complete(packed, place.start, place.checksum)
    return bytes(10), bytes(packed)


def unsegmented(frame: Frame) -> Sent:
    packed = blank(frame)
    place = transport(packed)
    assert place is not None
    header = gso(place, packed, MSS, frame.version)
    assert header is not None
    return header, bytes(packed)


KINDS: dict[str, Sent] = {
    "no IP at all": (bytes(10), bytes(12) + b"\x88\xb5" + bytes(46)),
    "tcp4": finished(Frame(4, TCP, b"whole" * 20)),
    "tcp6": finished(Frame(6, TCP, b"whole" * 20, ports=(1, 2))),
    "tcp4 blank": unfinished(Frame(4, TCP, b"blank" * 200, ports=(3, 4))),
    "tcp6 blank": unfinished(Frame(6, TCP, b"blank" * 200, ports=(5, 6))),
    "udp4 blank": unfinished(Frame(4, UDP, b"blank" * 20, ports=(7, 8))),
    "udp6 blank": unfinished(Frame(6, UDP, b"odd", ports=(9, 10))),
    "vlan tcp4 blank": unfinished(Frame(4, TCP, b"tagged" * 200, (0x8100,), ports=(11, 12))),
    "gso4": unsegmented(Frame(4, TCP, BIG, ports=(13, 14))),
    "gso6": unsegmented(Frame(6, TCP, BIG, ports=(15, 16))),
    "gso4 of two pages": unsegmented(Frame(4, TCP, BIG[:5000], ports=(17, 18))),
    "vlan gso4": unsegmented(Frame(4, TCP, BIG, (0x88A8, 0x8100), ports=(19, 20))),
    "vlan gso6": unsegmented(Frame(6, TCP, BIG[:30000], (0x8100,), ports=(21, 22))),
}
JUMBOS = {
    "a page": finished(Frame(4, UDP, bytes(4096 - 42), ports=(23, 24))),
    "jumbo": finished(Frame(4, UDP, BIG[:9000], ports=(25, 26))),
    "jumbo6 blank": unfinished(Frame(6, TCP, BIG[:8900], ports=(27, 28))),
    "the largest": finished(Frame(4, UDP, bytes(65535 - 14 - 28), ports=(29, 30))),
}


def resolved(sent: Sent) -> list[bytes]:
    """The frames that a sender without any offload would have sent."""
    vnet, frame = sent
    flags, gso_type, _, size, start, offset = VNET.unpack(vnet)
    if gso_type:
        return [bytes(part) for part in segment(frame, size)]
    if flags & F_NEEDS_CSUM:
        whole = bytearray(frame)
        complete(whole, start, offset)
        return [bytes(whole)]
    return [frame]


def by_flow(frames: Iterator[bytes] | list[bytes]) -> dict[int, list[bytes]]:
    flows: dict[int, list[bytes]] = {}
    for frame in frames:
        flows.setdefault(flow_hash(frame[:256]), []).append(frame)
    return flows


def check_crossing(vif: Vif, kinds: dict[str, Sent], offload: bool) -> None:
    """Each kind in each direction: complete, in order within its flow, finished if the receiver takes nothing else."""
    expected = by_flow([part for sent in kinds.values() for part in resolved(sent)])
    for source, sink in ((vif.kernel, vif.bridge), (vif.bridge, vif.kernel)):
        for i, (vnet, frame) in enumerate(kinds.values()):
            assert source.send(frame, vnet, i % vif.lanes)
        vif.world.run()
        got = sink.receive()
        if not offload:
            assert all(vnet == bytes(10) for vnet, _ in got)
            assert all(verify(frame) in (True, None) for _, frame in got)
        assert by_flow([part for sent in got for part in resolved(sent)]) == expected
    assert vif.kernel.dropped + vif.bridge.dropped == 0


def agreement(offer: Offer, want: Want) -> dict[str, int]:
    """netif.h: what may be sent to the backend."""
    sg = offer.sg and want.sg
    csum6 = offer.csum6 and want.csum
    return {
        "queues": min(offer.max_queues or want.queues, want.queues), "sg": sg,
        "gso-tcpv4": sg and offer.gso4 and want.gso4 and want.csum,
        "gso-tcpv6": sg and offer.gso6 and want.gso6 and csum6,
        "ipv6-csum-offload": csum6, "split-event-channels": offer.split and want.split,
    }  # fmt: skip


def check_pair(offer: Offer, want: Want, queues: int = 1, offload: bool = False) -> None:
    world = NetWorld()
    vif = world.attach(offer=offer, want=want, queues=queues, kernel_offload=offload)
    assert vif.connected, vif.errors()
    want = vif.want
    assert vif.front.features == agreement(offer, want)
    takes = vif.back.takes
    assert takes is not None
    csum4, csum6 = want.csum, want.csum6
    assert (takes.sg, takes.csum4, takes.csum6, takes.notify) == (want.sg, csum4, csum6, want.notify)
    assert (takes.gso4, takes.gso6) == (want.sg and want.gso4 and csum4, want.sg and want.gso6 and csum6)
    guest, host = vif.guest_port, vif.host_port
    assert isinstance(guest, MemoryPort) and isinstance(host, MemoryPort)
    gso4, gso6 = vif.front.features["gso-tcpv4"], vif.front.features["gso-tcpv6"]
    assert (guest.csum, guest.tso4, guest.tso6) == (want.csum, gso4, gso6), "what the guest's kernel may leave undone"
    assert (host.csum, host.tso4, host.tso6) == (csum4 or csum6, takes.gso4, takes.gso6)
    assert len(vif.front.queues) == len(vif.back.queues) == vif.front.features["queues"]
    check_crossing(vif, KINDS, offload)
    if vif.front.features["sg"] and takes.sg:
        check_crossing(vif, JUMBOS, offload)
    world.close()


@pytest.mark.parametrize("offer", ALL_OFFERS, ids=lambda on: "-".join(k for k in on if on[k]) or "nothing")
def test_every_offer(offer: dict[str, bool]) -> None:
    """Goal: whatever a backend leaves out.  Method: all combinations, a frontend that wants everything."""
    check_pair(Offer(**offer), Want())


@pytest.mark.parametrize("want", ALL_WANTS, ids=lambda on: "-".join(k for k in on if on[k]) or "nothing")
def test_every_wish(want: dict[str, bool]) -> None:
    """Goal: whatever a frontend turns down.  Method: all combinations, a backend that offers everything."""
    check_pair(Offer(), Want(**want))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(ALL_OFFERS), st.sampled_from(ALL_WANTS), st.sampled_from([1, 4]), st.sampled_from([None, 1, 4]),
       st.booleans())  # fmt: skip
def test_any_pair(offer: dict[str, bool], want: dict[str, bool], queues: int, most: int | None, offload: bool) -> None:
    """Goal: both sides at once, with one queue or four on either, kernels with and without offload.  Method: hypothesis."""
    check_pair(Offer(**offer, max_queues=most), Want(**want), queues, offload)


@pytest.mark.parametrize("queues", [1, 4])
def test_large_frames_are_not_cut(queues: int) -> None:
    """Goal: with everything agreed on, 64 KiB cross in one piece, unfinished.  Method: the very frames, both ways."""
    world = NetWorld()
    vif = world.attach(queues=queues)
    for kind in ("gso4", "gso6", "vlan gso4", "gso4 of two pages", "udp6 blank"):
        vnet, frame = KINDS[kind]
        assert vif.to_bridge(frame, vnet=vnet) == [(vnet, frame)]
        assert vif.to_guest(frame, vnet=vnet) == [(vnet, frame)]
    assert sum(queue.tx.statistics.packets for queue in vif.back.queues) == 5
    world.close()


def test_too_large_for_one_page() -> None:
    """Goal: without feature-sg a frame beyond a page is dropped and counted, in either direction; the next one crosses.
    Method: jumbo frames at a pair without it."""
    world = NetWorld()
    vif = world.attach(want=Want(sg=False))
    for vnet, frame in list(JUMBOS.values())[1:]:
        assert vif.to_bridge(frame, vnet=vnet) == vif.to_guest(frame, vnet=vnet) == []
    assert vif.front.queues[0].tx.statistics.drops == {"too large for this backend": 3}
    assert vif.back.queues[0].rx.statistics.drops == {"too large for a guest without feature-sg": 3}
    assert vif.works()
    world.close()


def test_what_was_queued_before_it_was_turned_down() -> None:
    """Goal: a GSO frame that waits in the interface while the features change is dropped, not sent.
    Method: queued for a frontend with GSO, which reconnects without before it is polled; the same on the bridge."""
    world = NetWorld()
    vif = world.attach()
    vnet, frame = KINDS["gso4"]
    assert VNET.unpack(vnet)[1] == GSO_TCPV4
    vif.kernel.send(frame, vnet)
    vif.bridge.send(frame, vnet)
    vif.front.reconnect(Want(gso4=False))
    world.settle()
    assert vif.connected
    world.run()
    assert vif.kernel.receive() == vif.bridge.receive() == []
    assert vif.front.queues[0].tx.statistics.drops == {"segmentation that this backend does not offer": 1}
    assert vif.back.queues[0].rx.statistics.drops == {"segmentation that the guest does not offer": 1}
    assert vif.works()
    world.close()


def written(world: NetWorld, node: str) -> list[tuple[str, str | None]]:
    """Watch a directory: (key, value) of each event, in order."""
    seen: list[tuple[str, str | None]] = []

    def event(path: str) -> None:
        key = path.removeprefix(node).strip("/")
        if key:
            seen.append((key, world.client.read(path)))

    world.client.watch(node, event)
    world.settle()
    seen.clear()
    return seen


BACK_KEYS = [
    *((f"feature-{key}", "1") for key in ("sg", "gso-tcpv4", "gso-tcpv6", "ipv6-csum-offload", "rx-copy", "xdp-headroom")),
    ("feature-rx-flip", "0"), ("feature-multicast-control", "1"), ("feature-dynamic-multicast-control", "1"),
    ("feature-split-event-channels", "1"), ("multi-queue-max-queues", "1"), ("feature-ctrl-ring", "1"),
]  # fmt: skip
FEATURES = ["request-rx-copy", "feature-rx-notify", "feature-sg", "feature-gso-tcpv4", "feature-gso-tcpv6",
            "feature-ipv6-csum-offload"]  # fmt: skip


def test_what_linux_writes() -> None:
    """Goal: the keys of Linux's drivers under Xen 4.17, their order, and the values that are not references.
    Method: a watch on each directory while one default vif connects."""
    world = NetWorld()
    node = f"/local/domain/{world.guest.domid}/device/vif/0"
    back = f"/local/domain/0/backend/vif/{world.guest.domid}/0"
    seen, offered = written(world, node), written(world, back)
    world.attach()
    keys = [key for key, _ in seen]
    assert keys[keys.index("xdp-headroom") :] == [
        "xdp-headroom", "multi-queue-num-queues", "tx-ring-ref", "rx-ring-ref", "event-channel-tx", "event-channel-rx",
        *FEATURES, "state",
    ]  # fmt: skip
    values = dict(seen)
    assert values["xdp-headroom"] == "0" and values["multi-queue-num-queues"] == "1" and values["state"] == "4"
    assert {values[key] for key in FEATURES} == {"1"} and values["mtu"] == "1500"
    first = [key for key, _ in offered].index("feature-sg")
    assert offered[first : first + len(BACK_KEYS)] == BACK_KEYS
    assert dict(offered)["hotplug-status"] == "connected"
    world.close()


def test_keys_of_several_queues() -> None:
    """Goal: a directory for each of several queues, nothing flat; one queue is flat.  Method: the store."""
    world = NetWorld()
    vif = world.attach(queues=4)
    read = world.client.read
    assert read(f"{vif.front_node}/multi-queue-num-queues") == "4"
    assert read(f"{vif.back_node}/multi-queue-max-queues") == "4"
    names = {"tx-ring-ref", "rx-ring-ref", "event-channel-tx", "event-channel-rx"}
    for i in range(4):
        assert set(world.client.directory(f"{vif.front_node}/queue-{i}")) == names
    assert not names & set(world.client.directory(vif.front_node))
    vif.front.reconnect(Want(queues=1, split=False))
    world.settle()
    left = {name for i in range(4) for name in world.client.directory(f"{vif.front_node}/queue-{i}")}
    assert vif.connected and not left
    assert names & set(world.client.directory(vif.front_node)) == {"tx-ring-ref", "rx-ring-ref"}
    world.close()


@pytest.mark.parametrize(("want", "absent", "present"), [
    (Want(csum=False), (), ("feature-no-csum-offload",)),
    (Want(csum6=False), ("feature-ipv6-csum-offload", "feature-gso-tcpv6"), ("feature-gso-tcpv4",)),
    (Want(sg=False), ("feature-sg", "feature-gso-tcpv4", "feature-gso-tcpv6"), ("feature-ipv6-csum-offload",)),
    (Want(split=False), ("event-channel-tx", "event-channel-rx"), ("event-channel",)),
    (Want(notify=False), ("feature-rx-notify",), ("request-rx-copy",)),
])  # fmt: skip
def test_what_is_turned_down_is_absent(want: Want, absent: tuple[str, ...], present: tuple[str, ...]) -> None:
    """Goal: absent means off to every backend, also one that takes "0" for something.  Method: connect, then again
    with everything and back, and look at the store each time."""
    world = NetWorld()
    vif = world.attach()
    for wish, gone, there in ((want, absent, present), (Want(), ("feature-no-csum-offload",), ()), (want, absent, present)):
        vif.front.reconnect(wish)
        world.settle()
        assert vif.connected, asdict(wish)
        keys = set(world.client.directory(vif.front_node))
        assert not keys & set(gone) and keys >= set(there)
        assert vif.works()
    world.close()


def test_a_frontend_without_rx_notify() -> None:
    """Goal: nothing waits for pages of a guest that would not tell of them, and frames cross.  Method: both kinds."""
    world = NetWorld()
    vif = world.attach(want=Want(notify=False))
    assert vif.works()
    for i in range(600):
        vif.bridge.send(bytes([i & 255]) * 100)
    world.run()
    assert len(vif.kernel.receive()) + sum(vif.back.queues[0].rx.statistics.drops.values()) == 600
    world.close()
