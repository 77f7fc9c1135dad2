"""Goal: a vif does what its nodes allow: rate, multicast, the queue of a hash; and a guest that does not receive is cut off.
Method: real drivers and a clock that the test moves; for the guest that posts no pages, a scripted frontend."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from netdev.backrx import DRAIN_S, STALL_S
from netdev.credit import MIN_BURST_BYTES
from netdev.ctrl import HASH_TYPES
from netdev.multicast import XEN_NETBK_MCAST_MAX
from netdev.netback import Offer
from netdev.netfront import Hash, Want
from netdev.toeplitz import Toeplitz, hash_input
from tests.netdev.scripted import FRAME, ScriptedFront
from tests.netdev.test_headers import TCP, UDP, Frame
from tests.netdev.world import NetWorld, Vif
from xenmodel.public.io.netif import XEN_NETIF_EXTRA_TYPE_MCAST_ADD, XEN_NETIF_EXTRA_TYPE_MCAST_DEL, NETTXF_extra_info

KEY = bytes(range(7, 47))
SIZE = 1000


@pytest.fixture
def world() -> Iterator[NetWorld]:
    world = NetWorld()
    yield world
    assert world.problems() == []
    world.close()


# --- rate --------------------------------------------------------------------------------------------------------------


def sent(vif: Vif, count: int = 900) -> int:
    """Keep the guest's interface full; how many frames reach the bridge until nothing moves."""
    arrived = 0
    for _ in range(20):
        for _ in range(count - len(vif.guest_port.waiting[0])):  # type: ignore[attr-defined]
            vif.kernel.send(bytes(SIZE))
        vif.world.run()
        now = len(vif.bridge.receive())
        arrived += now
        if not now:
            break
    return arrived


def wait(vif: Vif, seconds: float) -> None:
    """Time goes on, and whoever runs the loop calls tick() at each deadline."""
    world, end = vif.world, vif.world.now + seconds
    while (deadline := vif.back.deadline) is not None and deadline <= end:
        world.now = deadline
        vif.back.tick()
        world.run()
    world.now = end
    vif.back.tick()
    world.run()


def test_the_rate_of_a_guest(world: NetWorld) -> None:
    """Goal: not more than the rate and one burst, not much less, over 10 s; the other direction is free.
    Method: 100000 bytes in 50 ms, a guest that always has something to send."""
    vif = world.attach(rate=(100_000, 50_000))
    deadlines = []
    vif.back.on_deadline = lambda: deadlines.append(vif.back.deadline)
    total = sent(vif)
    for _ in range(100):
        wait(vif, 0.1)
        total += sent(vif)
    allowed = 100_000 * 200
    assert 0.95 * allowed <= total * SIZE <= allowed + MIN_BURST_BYTES + 100_000
    assert deadlines and None not in deadlines
    assert len(vif.to_guest(*[FRAME] * 500)) == 500
    assert not vif.back.queues[0].tx.statistics.drops, "nothing is lost, it waits in the guest"


def test_a_rate_that_changes(world: NetWorld) -> None:
    """Goal: the node is followed: what waits for the old rate goes by the new one, at once.
    Method: nearly nothing per hour, then more, then nonsense and no node, which are no limit."""
    vif = world.attach(rate=(1500, 3_600_000_000 // 2))
    few = sent(vif)
    assert few <= 2 and sent(vif) == 0
    wait(vif, 60)
    assert sent(vif) == 0
    world.write(f"{vif.back_node}/rate", "10000,50000")
    world.run()
    some = len(vif.bridge.receive()) + sent(vif)
    assert 8 <= some <= 10
    for value in ("fast", "1,2,3", "", "0,1000", "-5,50000", "5000", "18446744073709551615,1", "10000,0"):
        world.write(f"{vif.back_node}/rate", "1500,1000000000")
        sent(vif)
        assert sent(vif) == 0
        world.write(f"{vif.back_node}/rate", value)
        world.run()
        assert len(vif.bridge.receive()) + sent(vif) >= 900, value
        assert vif.connected and vif.back.deadline is None
    world.client.rm(f"{vif.back_node}/rate")
    world.settle()
    assert sent(vif) > 900


def test_a_limited_vif_can_be_pulled(world: NetWorld) -> None:
    """Goal: frames that wait for the rate hold nothing up.  Method: detach, and another vif, while one is limited."""
    vif = world.attach(rate=(1500, 1_000_000_000))
    other = world.attach()
    sent(vif)
    assert other.works()
    world.detach(vif)
    assert vif.back_node not in world.backs.devices and other.works()


def test_queues_share_one_rate(world: NetWorld) -> None:
    vif = world.attach(rate=(100_000, 50_000), queues=4)
    frames = [Frame(4, UDP, bytes(900), ports=(port, 9)).packed for port in range(200)]
    for i, frame in enumerate(frames * 4):
        vif.kernel.send(frame, lane=i & 3)
    world.run()
    assert sum(len(frame) for _, frame in vif.bridge.receive()) <= 100_000


# --- multicast ---------------------------------------------------------------------------------------------------------


def group(number: int) -> bytes:
    return b"\x01\x00\x5e\x00" + number.to_bytes(2, "big")


def to_group(number: int) -> bytes:
    return group(number) + bytes(58)


def heard(vif: Vif, *numbers: int) -> list[int]:
    got = vif.to_guest(*(to_group(number) for number in numbers))
    return [int.from_bytes(frame[4:6], "big") for _, frame in got]


def test_multicast_that_is_not_filtered(world: NetWorld) -> None:
    """Goal: without request-multicast-control everything passes; the list may be made meanwhile.  Method: frames."""
    vif = world.attach()
    assert heard(vif, 1, 2) == [1, 2]
    assert vif.front.multicast(group(1), True)
    world.run()
    assert heard(vif, 1, 2) == [1, 2] and vif.bridge.receive() == []


def test_dynamic_multicast_control(world: NetWorld) -> None:
    """Goal: the filter goes on and off while connected; additions count; broadcast and our own address always pass.
    Method: the frontend's key and its dummy requests, frames to four groups."""
    vif = world.attach()
    front = vif.front
    for number in (1, 2, 2):
        assert front.multicast(group(number), True)
    front.filter_multicast(True)
    world.run()
    assert heard(vif, 1, 2, 3) == [1, 2]
    front.multicast(group(2), False)
    front.multicast(group(1), False)
    front.multicast(group(3), True)
    world.run()
    assert heard(vif, 1, 2, 3) == [2, 3]
    assert len(vif.to_guest(b"\xff" * 60)) == 1 and vif.works()
    assert vif.back.queues[0].rx.statistics.drops == {"multicast that the guest has not asked for": 2}
    front.filter_multicast(False)
    world.run()
    assert heard(vif, 1, 2, 3) == [1, 2, 3]
    front.filter_multicast(True)
    front.reconnect()
    world.settle()
    assert heard(vif, 1, 2, 3) == [], "the list ends with the connection, the key does not"


def test_static_multicast_control(world: NetWorld) -> None:
    """Goal: a backend without feature-dynamic-multicast-control looks at the key when it connects, and then no more;
    one without feature-multicast-control, never.  Method: the key before and after."""
    for offer, filtered in ((Offer(dynamic_multicast=False), True), (Offer(multicast=False), False)):
        vif = world.attach(offer=offer)
        vif.front.filter_multicast(True)
        world.run()
        assert heard(vif, 5) == [5]
        vif.front.reconnect()
        world.settle()
        assert heard(vif, 5) == ([] if filtered else [5])
        vif.front.filter_multicast(False)
        world.run()
        assert heard(vif, 5) == ([] if filtered else [5])


def test_the_list_is_bounded(world: NetWorld) -> None:
    """Goal: the 65th address is refused with an error, and nothing grows.  Method: slots by hand, 10000 of them."""
    vif = world.attach(settle=False)
    front = ScriptedFront(world, vif).connect()
    first, kind = front.slot(0, NETTXF_extra_info), XEN_NETIF_EXTRA_TYPE_MCAST_ADD
    slots = [[first, front.extra(kind, 0, group(i))] for i in range(100)]
    answers = [front.send(*pair) for pair in slots]
    assert [status for (_, status), _ in answers] == [0] * XEN_NETBK_MCAST_MAX + [-1] * (100 - XEN_NETBK_MCAST_MAX)
    assert {status for _, (_, status) in answers} == {1}
    for i in range(2500):
        front.send(*slots[i % 100])
    assert len(vif.back.multicast.addresses) == XEN_NETBK_MCAST_MAX
    drop = [front.slot(0, NETTXF_extra_info), front.extra(XEN_NETIF_EXTRA_TYPE_MCAST_DEL, 0, group(0))]
    assert front.send(*drop) == [(0, 0), (0, 1)] and front.send(*slots[99])[0] == (0, 0)
    assert vif.states() == ("4", "4") and vif.bridge.receive() == []


# --- steering ----------------------------------------------------------------------------------------------------------


def flows() -> list[bytes]:
    made = []
    for i in range(40):
        for version, protocol in ((4, TCP), (6, TCP), (4, UDP)):
            source = str(ip_address("10.1.0.1" if version == 4 else "fd00::1") + i)
            made.append(Frame(version, protocol, b"payload", source=source, ports=(1000 + i, 80)).packed)
    return made


@pytest.mark.parametrize("mapping", [(), (0, 1, 2, 3), (3,), (1, 1, 2, 0, 3, 3)])
def test_hashes_choose_the_queue(world: NetWorld, mapping: tuple[int, ...]) -> None:
    """Goal: each frame comes in on the queue that its Toeplitz hash and the guest's table say, whole.
    Method: a frontend that sets a hash through the control ring; 120 flows; the counts of each queue, worked out here."""
    vif = world.attach(queues=4, want=Want(hash=Hash(HASH_TYPES, KEY, mapping)))
    assert vif.front.hash_status == 0, "set through the control ring"
    toeplitz, expected = Toeplitz(KEY), [0] * 4
    frames = flows()
    for frame in frames:
        given = hash_input(frame, HASH_TYPES)
        assert given is not None
        value = toeplitz.hash(given[1])
        expected[mapping[value % len(mapping)] if mapping else value % 4] += 1
    got = [frame for _, frame in vif.to_guest(*frames)]
    assert sorted(got) == sorted(frames)
    assert [queue.rx.statistics.packets for queue in vif.front.queues] == expected
    assert vif.works(), "frames without a hash come in all the same"


def test_hashes_after_a_reconnect(world: NetWorld) -> None:
    """Goal: the hash belongs to the connection; a frontend that asks for none any more gets none.  Method: reconnect."""
    vif = world.attach(queues=2, want=Want(hash=Hash(HASH_TYPES, KEY, (1,))))
    vif.front.reconnect()
    world.settle()
    assert vif.front.hash_status == 0 and vif.back.hashing
    vif.to_guest(*flows())
    assert [queue.rx.statistics.packets for queue in vif.front.queues] == [0, 120]
    vif.front.reconnect(Want(queues=2))
    world.settle()
    assert not vif.back.hashing and vif.works()
    assert len(vif.to_guest(*flows())) == 120


@pytest.mark.parametrize(("types", "key", "mapping", "status"), [
    (16, KEY, (), 2), (HASH_TYPES, bytes(41), (), 3), (HASH_TYPES, KEY, (2,), 2), (HASH_TYPES, KEY, (0,) * 129, 2),
])  # fmt: skip
def test_a_hash_that_is_refused(
    world: NetWorld, types: int, key: bytes, mapping: tuple[int, ...], status: int
) -> None:
    """Goal: the frontend is told, and frames flow.  Method: one thing beyond the limits each (XSA-270)."""
    vif = world.attach(queues=2, want=Want(hash=Hash(types, key, mapping)))
    assert vif.connected and vif.front.hash_status == status
    assert len(vif.to_guest(*flows())) == 120


# --- a guest that does not receive -----------------------------------------------------------------------------------------


def offered(vif: Vif, count: int) -> None:
    for _ in range(count):
        vif.bridge.send(FRAME)
    vif.world.run()


def test_a_guest_that_posts_no_pages(world: NetWorld) -> None:
    """Goal: frames wait for DRAIN_S in a bounded queue, then are dropped; after STALL_S there is no carrier; pages bring it
    back (XSA-392). Other vifs do not notice.  Method: a scripted frontend, the clock."""
    other = world.attach()
    vif = world.attach(settle=False)
    front = ScriptedFront(world, vif).connect()
    port = vif.host_port
    offered(vif, 1500)
    queued = len(port.waiting[0])  # type: ignore[attr-defined]
    assert queued == 1000 and vif.back.deadline == world.now + DRAIN_S
    wait(vif, DRAIN_S - 1)
    assert len(port.waiting[0]) == 1000  # type: ignore[attr-defined]
    wait(vif, 1)
    assert not port.waiting[0] and vif.back.deadline is None  # type: ignore[attr-defined]
    assert vif.back.queues[0].rx.statistics.drops == {"the guest posts no pages": 1000}
    assert port.up and world.client.read(f"{vif.back_node}/carrier") is None  # type: ignore[attr-defined]
    wait(vif, STALL_S)
    offered(vif, 1)
    assert not port.up and world.client.read(f"{vif.back_node}/carrier") == "0"  # type: ignore[attr-defined]
    assert other.works()
    front.post(*(front.data_page()[0] for _ in range(60)))
    assert port.up and world.client.read(f"{vif.back_node}/carrier") == "1"  # type: ignore[attr-defined]
    offered(vif, 3)
    assert [status for *_, status in front.received()] == [len(FRAME)] * 3


def test_a_stalled_guest_that_reconnects(world: NetWorld) -> None:
    """Goal: a new connection begins with a carrier and no old word about it.  Method: stall, close, connect anew."""
    vif = world.attach(settle=False)
    front = ScriptedFront(world, vif).connect()
    offered(vif, 1)
    wait(vif, STALL_S + DRAIN_S)
    offered(vif, 1)
    assert world.client.read(f"{vif.back_node}/carrier") == "0"
    for state in (5, 6, 1):
        front.set("state", state)
    assert world.client.read(f"{vif.back_node}/carrier") is None
    again = ScriptedFront(world, vif).connect()
    assert vif.host_port.up and vif.back.deadline is None  # type: ignore[attr-defined]
    again.post(*(again.data_page()[0] for _ in range(60)))
    offered(vif, 1)
    assert again.received() == [(0, 0, 0, len(FRAME))]


def test_a_guest_that_will_not_tell_of_pages(world: NetWorld) -> None:
    """Goal: without feature-rx-notify nothing waits: what has no page now is dropped now.  Method: 0 pages, then 60."""
    vif = world.attach(settle=False)
    front = ScriptedFront(world, vif).connect(feature_rx_notify=0)
    offered(vif, 30)
    assert not vif.host_port.waiting[0]  # type: ignore[attr-defined]
    assert vif.back.queues[0].rx.statistics.drops == {"the guest posts no pages": 30}
    front.post(*(front.data_page()[0] for _ in range(60)))
    offered(vif, 1)
    assert len(front.received()) == 1
