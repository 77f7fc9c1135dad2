"""hostile.py: a vif of which one end is scripted, beside one with real drivers that must go on working.

Goal: every test of a hostile peer ends with the same questions: closed with a text, nobody else harmed, nothing left.
Method: one world, two vifs of the same guest, and a footprint taken before the scripted one does anything.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from netdev.netback import Offer
from netdev.netfront import Netfront, Want
from tests.netdev.scripted import FRAME, ScriptedBack, ScriptedFront
from tests.netdev.world import NetWorld, Wrap, same
from xenmodel.public.io.netif import RX_RESPONSE
from xenmodel.testing import Footprint

HUGE = 0xFFFFFFFF
OKAY, ERROR, NULL = 0, -1, 1
EVERYTHING, PLAIN = Offer(), Want()


class Case:
    """A scripted frontend, and a vif of the same guest that works."""

    def __init__(self, offer: Offer = EVERYTHING, host_side: Wrap = same, queues: int = 1, **kwargs: int) -> None:
        self.world = NetWorld()
        self.other = self.world.attach()
        self.vif = self.world.attach(settle=False, offer=offer, host_side=host_side, queues=queues)
        self.front = ScriptedFront(self.world, self.vif, **kwargs)
        self.footprint = Footprint(self.world.hypervisor)

    @property
    def error(self) -> str:
        return self.vif.errors()[1] or ""

    def works(self) -> bool:
        """A good frame still goes through the scripted vif."""
        return self.front.send(self.front.slot(ident=7)) == [(7, OKAY)] and self.arrived() == [FRAME]

    def arrived(self) -> list[bytes]:
        return [frame for _, frame in self.vif.bridge.receive()]

    def check_closed(self, reason: str) -> None:
        """The vif is closed with that text, whatever else is done to it, and the other one works."""
        assert reason in self.error, self.error
        assert self.vif.states()[1] == "6" and self.vif.back.broken
        self.front.tx.put(self.front.slot())
        for _ in range(50):
            self.front.notify()
        self.vif.bridge.send(FRAME)
        self.world.run()
        self.vif.back.tick()
        assert not self.vif.back.queues
        self.check_harmless()

    def check_harmless(self) -> None:
        assert self.other.works() and self.other.connected
        assert self.world.problems() == []

    def check_nothing_left(self) -> None:
        """Pulled, nothing of domain 0 is left behind."""
        self.world.detach(self.vif)
        if self.vif.back_node in self.world.backs.devices:  # it waits for the guest's Closed
            self.front.set("state", 6)
        assert self.vif.back_node not in self.world.backs.devices
        grown = [what for what in self.footprint.grown() if "of domain 0" in what]
        assert grown == []
        self.world.close()


@pytest.fixture(name="case")
def connected_case() -> Iterator[Case]:
    it = Case()
    it.front.connect()
    assert it.vif.states() == ("4", "4"), it.vif.errors()
    it.footprint = Footprint(it.world.hypervisor)
    assert it.works()
    yield it
    it.check_harmless()
    it.check_nothing_left()


class BackCase:
    """A scripted backend, and a vif of the same guest that works."""

    def __init__(self, want: Want = PLAIN, guest_side: Wrap = same, queues: int = 1, trusted: bool = True) -> None:
        self.world = NetWorld()
        self.other = self.world.attach()
        self.footprint = Footprint(self.world.hypervisor)
        self.vif = self.world.attach(settle=False, want=want, guest_side=guest_side, queues=queues, trusted=trusted)
        self.back = ScriptedBack(self.world, self.vif)

    @property
    def front(self) -> Netfront:
        return self.vif.front

    @property
    def error(self) -> str:
        return self.vif.errors()[0] or ""

    def arrived(self) -> list[bytes]:
        return [frame for _, frame in self.vif.kernel.receive()]

    def give(self, *slots: tuple[int, int, int, int] | bytes) -> list[bytes]:
        """Receive responses, (id, offset, flags, status) or raw; what arrives in the guest's kernel."""
        self.back.take_pages()
        self.back.give(slot if isinstance(slot, bytes) else RX_RESPONSE.pack(*slot) for slot in slots)
        return self.arrived()

    def check_closed(self, reason: str) -> None:
        """Given up with that text; no event, poll, announcement or request wakes it again; the other vif works."""
        front = self.front
        assert reason in self.error, self.error
        assert front.broken and not front.connected and not front.link_up and not front.queues
        for _ in range(50):
            self.back.notify()
        self.vif.kernel.send(FRAME)
        self.world.run()
        front.announce([FRAME])
        assert not front.multicast(b"\1\0\x5e\0\0\1", True)
        self.world.run()
        assert self.vif.states()[0] in ("5", "6")
        self.check_harmless()

    def check_harmless(self) -> None:
        assert self.other.works() and self.other.connected
        assert self.world.problems() == []

    def check_nothing_left(self) -> None:
        """The backend lets go and the vif is pulled: the guest holds what it held before."""
        self.back.close()
        self.world.toolstack.detach_vif(self.world.guest.domid, self.vif.devid)
        self.world.settle()
        self.back.set("state", 6)
        assert self.vif.front_node not in self.world.fronts.devices
        assert self.footprint.grown() == []
        self.world.close()
