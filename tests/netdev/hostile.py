"""hostile.py: a vif whose frontend is scripted, beside one with real drivers that must go on working.

Goal: every test of a hostile frontend ends with the same questions: closed with a text, nobody else harmed, nothing left.
Method: one world, two vifs of the same guest, and a footprint taken before the scripted one does anything.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from netdev.netback import Offer
from tests.netdev.scripted import FRAME, ScriptedFront
from tests.netdev.world import NetWorld, Wrap, same
from xenmodel.testing import Footprint

HUGE = 0xFFFFFFFF
OKAY, ERROR, NULL = 0, -1, 1
EVERYTHING = Offer()


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
