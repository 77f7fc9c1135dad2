"""Goal: any sequence of grant, map, unmap, end and death agrees with the rules of grant_table.h.
Method: a hypothesis state machine; the oracle is a dict of grants and a list of who mapped what.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xenmodel.grant_table import Mapping
from xenmodel.hypervisor import Hypervisor
from xenmodel.public import grant_table as g
from xenmodel.types import Domid, Gref, Pfn

OWNER, PEERS = 1, (2, 3)
FRAMES = range(4, 10)


@dataclass
class Grant:
    """What the oracle knows of one reference."""

    domid: int
    pfn: int
    readonly: bool


@dataclass
class Held:
    """What the oracle knows of one mapping."""

    mapper: int
    ref: int
    readonly: bool
    pfn: int
    mapping: Mapping


class GrantMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.hypervisor = Hypervisor()
        self.domains = {domid: self.hypervisor.create_domain(16, str(domid), domid) for domid in (OWNER, *PEERS)}
        self.grants: dict[int, Grant] = {}
        self.held: list[Held] = []

    @property
    def table(self):  # type: ignore[no-untyped-def]
        return self.domains[OWNER].grants

    def mappers(self, ref: int) -> list[Held]:
        return [held for held in self.held if held.ref == ref]

    @rule(domid=st.sampled_from(PEERS), pfn=st.sampled_from(FRAMES), readonly=st.booleans())
    def grant(self, domid: int, pfn: int, readonly: bool) -> None:
        ref = self.table.grant_access(Domid(domid), Pfn(pfn), readonly=readonly)
        assert ref >= 8 and ref not in self.grants, "a reference in use was handed out"
        assert not self.mappers(ref), "a reference that is still mapped was handed out"
        self.grants[ref] = Grant(domid, pfn, readonly)

    @precondition(lambda self: self.grants)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        ref = data.draw(st.sampled_from(sorted(self.grants)))
        assert self.table.end_access(Gref(ref)) == (not self.mappers(ref))
        if not self.mappers(ref):
            del self.grants[ref]

    @rule(mapper=st.sampled_from(PEERS), ref=st.integers(6, 20), readonly=st.booleans())
    def map(self, mapper: int, ref: int, readonly: bool) -> None:
        flags = g.GNTMAP_host_map | (g.GNTMAP_readonly if readonly else 0)
        status, mapping = self.domains[mapper].maptrack.map(OWNER, ref, flags)
        grant = self.grants.get(ref)
        if not len(self.table):
            expected = g.GNTST_bad_gntref
        elif grant is None or grant.domid != mapper or (grant.readonly and not readonly):
            expected = g.GNTST_general_error
        else:
            expected = g.GNTST_okay
        assert g.GNTST_TEXTS[status] == g.GNTST_TEXTS[expected]
        assert (mapping is not None) == (status == g.GNTST_okay)
        if mapping is not None and grant is not None:
            same = [held.mapping.handle for held in self.held if held.mapper == mapper]
            assert mapping.handle not in same, "a handle in use was handed out"
            self.held.append(Held(mapper, ref, readonly, grant.pfn, mapping))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def unmap(self, data: st.DataObject) -> None:
        held = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        maptrack = self.domains[held.mapper].maptrack
        assert maptrack.unmap(held.mapping.handle) == g.GNTST_okay
        assert maptrack.unmap(held.mapping.handle) == g.GNTST_bad_handle

    @precondition(lambda self: any(not held.readonly for held in self.held))
    @rule(data=st.data(), value=st.integers(0, 255))
    def write(self, data: st.DataObject, value: int) -> None:
        held = data.draw(st.sampled_from([held for held in self.held if not held.readonly]))
        held.mapping.view[0] = value
        assert all(other.mapping.view[0] == value for other in self.held if other.pfn == held.pfn)
        assert self.domains[OWNER].memory.run(Pfn(held.pfn))[0] == value

    @precondition(lambda self: self.held)
    @rule(mapper=st.sampled_from(PEERS))
    def reboot(self, mapper: int) -> None:
        """The mapper dies and comes back under its number: whatever it held is let go."""
        self.hypervisor.destroy_domain(mapper)
        self.domains[mapper] = self.hypervisor.create_domain(16, str(mapper), mapper)
        self.held = [held for held in self.held if held.mapper != mapper]

    @invariant()
    def entries_say_what_is_granted_and_mapped(self) -> None:
        seen = {entry.ref: entry for entry in self.table.entries()}
        assert seen.keys() == self.grants.keys()
        for ref, grant in self.grants.items():
            mappers = self.mappers(ref)
            flags = g.GTF_permit_access
            flags |= g.GTF_readonly if grant.readonly else 0
            flags |= g.GTF_reading if mappers else 0
            flags |= g.GTF_writing if any(not held.readonly for held in mappers) else 0
            entry = seen[ref]
            assert (entry.flags, entry.domid, entry.pfn, entry.pins) == (flags, grant.domid, grant.pfn, len(mappers))
        assert self.table.active.keys() == {held.ref for held in self.held}

    def teardown(self) -> None:
        for mapper in PEERS:
            self.domains[mapper].maptrack.unmap_all()
        assert all(self.table.end_access(Gref(ref)) for ref in self.grants)
        self.hypervisor.close()


GrantMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None, derandomize=True)
TestGrantMachine = GrantMachine.TestCase
