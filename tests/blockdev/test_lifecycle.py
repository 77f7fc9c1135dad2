"""Goal: a disk can be plugged, resized, closed, restarted and pulled at any moment, and nothing stays behind.
Method: real drivers, storages that hold requests back, footprints before and after; the toolstack's own detach."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from blockdev.blkback import Offer
from blockdev.blkfront import Want
from blockdev.storage import DelayedStorage, MemoryStorage
from tests.blockdev.world import MIB, SECTORS, Disk, World
from xenmodel.public.io.blkif import BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_RSP_ERROR, BLKIF_RSP_OKAY
from xenmodel.testing import Footprint
from xenmodel.xenstore.errors import XsError

READ, WRITE = BLKIF_OP_READ, BLKIF_OP_WRITE


class Opened(MemoryStorage):
    """Counts whether it is open; an image that is not closed keeps its lock."""

    def __init__(self, sectors: int = SECTORS) -> None:
        super().__init__(sectors)
        self.closes = 0

    def close(self) -> None:
        self.closes += 1


def release_all(world: World, storage: DelayedStorage) -> None:
    while storage.release(lambda n: 0):
        world.settle()


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("want", [Want(), Want(ring_page_order=4, queues=4)])
def test_plug_and_pull(world: World, persistent: bool, used: bool, want: Want) -> None:
    """Goal: after a detach both domains and the store hold what they held before, 20 times in a row."""
    footprint, nodes = Footprint(world.hypervisor), [path for path, _, _ in world.hypervisor.store.dump()]
    for _ in range(20):
        storage = Opened()
        disk = world.attach(storage=storage, offer=Offer(persistent=persistent), want=want)
        assert not used or disk.works()
        world.detach(disk)
        assert footprint.grown() == [] and storage.closes == 1
        assert [path for path, _, _ in world.hypervisor.store.dump()] == nodes
    assert world.fronts.devices == world.backs.devices == {}


def test_detach_under_load(world: World) -> None:
    """Goal: a hot-unplug drains: what is on the ring is answered, what waited fails, all once.
    Method: a held storage, more commands than ring slots, the toolstack's detach in the middle."""
    footprint = Footprint(world.hypervisor)
    storage = DelayedStorage(Opened())
    disk = world.attach(storage=storage, offer=Offer(max_indirect_segments=None))
    front = disk.front
    commands = [disk.start(WRITE, i * 8, 4096) for i in range(30)] + [disk.start(READ, 0, MIB)]
    world.settle()
    done: list[int] = []
    world.toolstack.detach_disk(world.guest.domid, disk.number, lambda: done.append(1))
    world.settle()
    assert disk.states() == ("4", "5") and disk.done == [] and not done
    late = disk.start(READ, 0, 4096)
    release_all(world, storage)
    assert [c.status for c in commands] == [BLKIF_RSP_OKAY] * 30 + [BLKIF_RSP_ERROR]
    assert late.status == BLKIF_RSP_ERROR and len(disk.done) == 32 == len(set(map(id, disk.done)))
    assert done == [1] and world.client.directory("/local/domain/0") == ["domid", "name"]
    for command in disk.done:
        front.give(command)
    assert footprint.grown() == []


def test_the_guest_closes_its_device(world: World) -> None:
    """Goal: close() waits for what is under way, and both ends are Closed.  Method: two reads held."""
    storage = DelayedStorage(MemoryStorage(SECTORS))
    disk = world.attach(storage=storage)
    commands = [disk.start(READ, 0, 4096) for _ in range(2)]
    world.settle()
    disk.front.close()
    world.settle()
    assert disk.states() == ("5", "5")
    release_all(world, storage)
    assert disk.states() == ("6", "6") and [c.status for c in commands] == [0, 0] and disk.done == commands
    assert world.for_devices.mappings() == []


@pytest.mark.parametrize("held", [0, 1, 12])
def test_the_backend_goes_away_and_comes_back(world: World, held: int) -> None:
    """Goal: nothing is lost and nothing is completed twice over five restarts.
    Method: writes before, during (they wait) and after each; read everything back at the end."""
    storage = DelayedStorage(MemoryStorage(SECTORS))
    disk = world.attach(storage=storage)
    for round_ in range(5):
        data = bytes([round_ + 1]) * 4096
        commands = [disk.start(WRITE, (round_ * 32 + i) * 8, 4096, data) for i in range(held)]
        world.settle()
        disk.stop_backend()
        assert disk.states() == (("4", "5") if held else ("6", "6"))
        while_away = disk.start(WRITE, (round_ * 32 + 31) * 8, 4096, data)
        release_all(world, storage)
        assert disk.states() == ("6", "6") and disk.done == commands
        disk.start_backend()
        assert disk.connected and disk.done == commands
        release_all(world, storage)
        assert disk.done == [*commands, while_away]
        for command in disk.done:
            assert command.status == BLKIF_RSP_OKAY
            disk.front.give(command)
        disk.done.clear()
    assert isinstance(storage.inner, MemoryStorage)
    for round_ in range(5):
        for i in [*range(held), 31]:
            at = (round_ * 32 + i) * 4096
            assert storage.inner.data[at : at + 4096] == bytes([round_ + 1]) * 4096


def test_another_backend_driver_takes_over(world: World) -> None:
    """Goal: a driver that is made anew finds a frontend that is Closed since before, and connects.
    Method: close, drop the driver object, say Initialising again as a toolstack would."""
    disk = world.attach()
    assert disk.works()
    disk.stop_backend()
    world.backs._drop(disk.back_node)
    waits = disk.start(READ, 0, 4096)
    world.write(f"{disk.back_node}/state", 1)
    assert disk.connected and disk.finish(waits) == BLKIF_RSP_OKAY and disk.works()


def test_restarts_do_not_eat_memory(world: World) -> None:
    """Goal: 30 connections use what one uses (a backend maps our pages until we are Closed).  Method: footprint."""
    disk = world.attach()
    assert disk.works()
    footprint = Footprint(world.hypervisor)
    for _ in range(30):
        disk.restart()
        assert disk.works()
    assert footprint.grown() == [] and disk.front.quarantined == 0


@pytest.mark.parametrize("sectors", [SECTORS * 2, SECTORS + 8, SECTORS - 8, 8])
def test_online_resize(world: World, sectors: int) -> None:
    """Goal: the guest learns the new size without a reconnect, and requests beyond it fail.  Method: a storage that
    grows or shrinks with a read held near the old end."""
    inner = MemoryStorage(SECTORS * 2)
    inner.sectors = SECTORS
    storage = DelayedStorage(inner)
    disk = world.attach(storage=storage)
    seen: list[int] = []
    disk.front.on_change = lambda: seen.append(disk.front.sectors)
    command = disk.start(READ, SECTORS - 8, 4096)
    world.settle()
    inner.sectors = sectors
    disk.back.resized()
    world.settle()
    assert seen == [sectors] and disk.connected
    release_all(world, storage)
    assert disk.finish(command) == BLKIF_RSP_OKAY
    end, past = disk.start(READ, sectors - 8, 4096), disk.start(READ, sectors - 7, 4096)
    world.settle()
    release_all(world, storage)
    assert disk.finish(end) == BLKIF_RSP_OKAY and disk.finish(past) == BLKIF_RSP_ERROR
    disk.back.resized()
    world.settle()
    assert seen == [sectors], "saying the same size again is no change"


GONE: dict[str, Callable[[World, Disk], object]] = {
    "backend directory": lambda w, d: w.client.rm(d.back_node),
    "frontend directory": lambda w, d: w.client.rm(d.front_node),
    "both, backend first": lambda w, d: list(map(w.client.rm, (d.back_node, d.front_node))),
    "both, frontend first": lambda w, d: list(map(w.client.rm, (d.front_node, d.back_node))),
    "backend state": lambda w, d: w.client.rm(f"{d.back_node}/state"),
    "the whole backend tree": lambda w, d: w.client.rm("/local/domain/0/backend"),
    "the whole device tree": lambda w, d: w.client.rm(f"/local/domain/{w.guest.domid}/device"),
}


@pytest.mark.parametrize("name", GONE)
@pytest.mark.parametrize("held", [0, 3])
def test_directories_vanish(world: World, name: str, held: int) -> None:
    """Goal: xenstore-rm on a live device frees domain 0 of everything, closes the image, and harms no other disk.
    Method: the table, with and without requests in the storage."""
    opened = Opened()
    storage = DelayedStorage(opened)
    other = world.attach("xvdb")
    footprint, watches = Footprint(world.hypervisor), world.backs.client.connection.watches
    watched = len(watches)
    disk = world.attach(storage=storage)
    commands = [disk.start(READ, i * 8, 4096) for i in range(held)]
    world.settle()
    GONE[name](world, disk)
    world.settle()
    release_all(world, storage)
    grown = [line for line in footprint.grown() if "of domain 0" in line]
    assert [line for line in grown if "watches" not in line] == [], "the toolstack has a watch of its own"
    assert len(watches) <= watched or name == "backend state"
    assert opened.closes >= 1, "an image that stays open keeps its lock"
    assert len(disk.done) in (0, len(commands))
    if name in ("backend state", "the whole backend tree"):
        return  # this took the other disk's backend, or left the directory
    if name != "the whole device tree":
        assert other.works()


def test_the_same_number_again(world: World) -> None:
    """Goal: a disk with the vdev of one that was pulled is a new disk.  Method: other size, other bytes."""
    disk = world.attach()
    assert disk.works()
    world.detach(disk)
    again = world.attach(storage=Opened(800))
    assert again.connected and again.front.sectors == 800 and again.read(8, 512) == bytes(512) and again.works()


def test_two_hypervisors_in_one_process() -> None:
    """Goal: no state is shared.  Method: the same disk in both, different data, one is closed first."""
    first, second = World(), World()
    one, two = first.attach(), second.attach()
    assert one.write(0, b"1" * 512) == 0 and two.write(0, b"2" * 512) == 0
    assert one.read(0, 512) == b"1" * 512
    first.close()
    assert two.read(0, 512) == b"2" * 512
    second.close()


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("end", ["detach", "close"])
def test_a_guest_scribbles_on_its_grant_table(world: World, persistent: bool, end: str) -> None:
    """Goal: entries that another program of the guest zeroed cost at most this device, and nothing leaks.
    Method: zero every entry that is not mapped at the moment; detach, or close and detach; footprints; another disk."""
    footprint = Footprint(world.hypervisor)
    disk = world.attach(offer=Offer(persistent=persistent))
    assert disk.works()
    entries = world.guest.grants._frames[0]  # the guest's own memory
    zeroed = [entry.ref for entry in world.guest.grants.entries() if not entry.pins and entry.ref < 512]
    for ref in zeroed:
        entries[2 * ref] = entries[2 * ref + 1] = 0
    assert len(zeroed) > 100 and not {entry.ref for entry in world.guest.grants.entries()} & set(zeroed)
    if end == "close":
        disk.front.close()
        world.settle()
        assert disk.states() == ("6", "6")
    world.detach(disk)
    assert footprint.grown() == []
    assert world.attach("xvdb").works()


def test_detach_with_all_transactions_used_up(world: World) -> None:
    """Goal: a guest that may start no transaction can still close its disk: the state is then written by itself.
    Method: use up the guest's quota, the toolstack's hot detach; both ends say Closed; afterwards a disk connects."""
    footprint = Footprint(world.hypervisor)
    disk = world.attach()
    states: list[tuple[str | None, str | None]] = []
    watch = world.client.watch(f"{disk.front_node}/state", lambda _path: states.append(disk.states()))
    greedy = world.hypervisor.store.connect(world.guest.domid)
    for _ in range(world.hypervisor.store.domains.quota.transactions):
        greedy.transaction_start()
    with pytest.raises(XsError, match="transactions open"):
        greedy.transaction_start()
    world.detach(disk)
    assert "6" in {front for front, _ in states}
    assert world.client.read(disk.front_node) is world.client.read(disk.back_node) is None
    assert world.fronts.devices == world.backs.devices == {}
    world.client.unwatch(watch)
    greedy.close()
    assert footprint.grown() == []
    assert world.attach().works()


def test_a_resize_does_not_undo_a_detach(world: World) -> None:
    """Goal: when the toolstack has said Closing, a new size does not say Connected again, or the detach would be lost.
    Method: `state` 5 is in the store and not delivered yet when the storage grows."""
    storage = MemoryStorage(SECTORS)
    disk = world.attach(storage=storage)
    world.write(f"{disk.back_node}/state", 5, settle=False)
    storage.sectors = 2 * SECTORS
    disk.back.resized()
    assert disk.states()[1] == "5"
    world.settle()
    assert disk.states() == ("6", "6")


@pytest.mark.parametrize("grain", [1000, 100])
def test_a_discard_granularity_that_cannot_be(world: World, grain: int) -> None:
    """Goal: granules that are no whole blocks close the device: holes would be cut short.  Method: such a storage."""
    storage = MemoryStorage(SECTORS)
    storage.discard_granularity = grain
    disk = world.attach(storage=storage)
    assert not disk.connected and disk.front.broken is not None and f"discard-granularity {grain}" in disk.front.broken
