"""domain.py: one domain: its memory, grant table, event channels and the state a toolstack sees.

Created and destroyed by Hypervisor. Frame 0 of its memory is the shared_info page.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from xenmodel.event_channel import EventChannels
from xenmodel.grant_table import DEFAULT_MAX_FRAMES, GrantTable, MapTrack
from xenmodel.memory import GuestMemory
from xenmodel.types import Domid, Pfn

if TYPE_CHECKING:
    from xenmodel.hypervisor import Hypervisor

SHARED_INFO_PFN = Pfn(0)


class DomainState(enum.Enum):
    RUNNING = "running"
    SHUTDOWN = "shutdown"
    DYING = "dying"


class Domain:
    """`memory`, `grants` (what it grants), `maptrack` (what it mapped from others), `events`."""

    def __init__(
        self, hypervisor: Hypervisor, domid: Domid, pages: int, name: str, max_grant_frames: int = DEFAULT_MAX_FRAMES
    ) -> None:
        self.hypervisor = hypervisor
        self.domid = domid
        self.name = name
        self.state = DomainState.RUNNING
        self.shutdown_reason: int | None = None
        self.memory = GuestMemory(pages, name)
        shared_info = self.memory.allocate()
        assert shared_info == SHARED_INFO_PFN, f"shared_info is frame {shared_info}, not the first one"
        self.grants = GrantTable(self.memory, max_grant_frames)
        self.maptrack = MapTrack(domid, self.memory, hypervisor.grants_of, clock=hypervisor.store.clock)
        self.events = EventChannels(domid, self.memory.run(shared_info), hypervisor.events_of, hypervisor.queue_upcall)

    def __repr__(self) -> str:
        return f"<Domain {self.domid} {self.name} {self.state.value}>"
