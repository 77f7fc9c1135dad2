"""What the tests of the grant devices share: domains with the devices of gntdev.py and gntalloc.py over one real arena, a
program's memory, and whoever runs its jobs. `violations` and `held` look at everything and change nothing."""

from __future__ import annotations

import errno
import mmap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from sysdev.evtchn import EvtchnDevice, EvtchnUser
from sysdev.gntalloc import Gntalloc
from sysdev.gntdev import Gntdev, GntdevUser, GrantMap
from sysdev.steps import Job, Pause, Read, TransferIn, TransferOut, Write
from tests.sysdev.opens import ports
from xenfs.arena import Arena
from xenmodel.domain import Domain
from xenmodel.hypervisor import Hypervisor
from xenmodel.memory import Frame
from xenmodel.testing import check_grants
from xenmodel.types import PAGE_SIZE, Domid, Pfn

T = TypeVar("T")
Ref = tuple[int, int]  # domid, reference


class Ram:
    """A program's memory: `size` bytes at `base`; everything else is EFAULT, in the middle of a list of pieces, too."""

    def __init__(self, size: int = 1 << 16, base: int = 0x10000) -> None:
        self.base = base
        self.data = bytearray(size)

    def view(self, address: int, length: int) -> memoryview:
        at = address - self.base
        if at < 0 or at + length > len(self.data):
            raise OSError(errno.EFAULT, "a bad address")
        return memoryview(self.data)[at : at + length]

    def do(self, step: object) -> object:
        match step:
            case Read(address, length):
                return bytes(self.view(address, length))
            case Write(address, data):
                self.view(address, len(data))[:] = data
            case TransferIn(pieces):
                for address, view in pieces:
                    view[:] = self.view(address, len(view))
            case TransferOut(pieces):
                for view, address in pieces:
                    self.view(address, len(view))[:] = view
            case _:
                raise AssertionError(f"nobody told us how to do {step}")
        return None


def finish(job: Job[T], ram: Ram | None = None, pause: Callable[[Pause], object] = lambda _pause: None) -> T:
    """Run a job to its end; `pause` is called at each pause."""
    try:
        step = next(job)
        while True:
            if isinstance(step, Pause):
                pause(step)
                step = job.send(None)
                continue
            assert ram is not None, f"{step} without a memory"
            try:
                value = ram.do(step)
            except OSError as error:
                step = job.throw(error)
            else:
                step = job.send(value)
    except StopIteration as stop:
        result: T = stop.value
        return result


class Maps:
    """What a program maps, for gntalloc to look at: a Look. Each one takes a turn; `looks` are what was asked."""

    def __init__(self) -> None:
        self.mapped: set[int] = set()
        self.looks: list[Sequence[int]] = []

    def look(self, indices: Sequence[int]) -> Job[set[int]]:
        assert list(indices) == sorted(set(indices)) and len(indices) > 0
        self.looks.append(indices)
        yield Pause.TURN
        return self.mapped & set(indices)


class Grants:
    """Domains 0 to 3 with their devices. Leave it by close()."""

    def __init__(self, pages: int = 64, limit: int = 1024, max_grant_frames: int = 64) -> None:
        self.hypervisor = Hypervisor()
        self.domains = {
            domid: self.hypervisor.create_domain(pages, str(domid), domid, max_grant_frames) for domid in range(4)
        }
        self.filling: list[Frame] = []  # what a disk worker writes to
        self.arena = Arena(self.places)
        self.evtchn = {domid: EvtchnDevice(domain.events) for domid, domain in self.domains.items()}
        self.gntdev = {d: Gntdev(domain, self.evtchn[d], self.arena) for d, domain in self.domains.items()}
        self.gntalloc = {d: Gntalloc(domain, self.evtchn[d], self.arena, limit) for d, domain in self.domains.items()}

    def places(self) -> list[tuple[int, int]]:
        """Where that is."""
        return [(at, at + PAGE_SIZE) for at in (frame.memory.address(frame.pfn) for frame in self.filling)]

    def close(self) -> None:
        self.hypervisor.close()
        self.arena.close()

    # --- what domains and programs do ------------------------------------------------------------------------------

    def grant(self, owner: int, to: int, count: int, *, readonly: bool = False) -> list[Ref]:
        """Pages of a domain that it grants to another; each begins with its own number."""
        domain = self.domains[owner]
        first = domain.memory.allocate(count)
        for pfn in range(first, first + count):
            domain.memory.run(Pfn(pfn))[:4] = pfn.to_bytes(4, "little")
        pfns = range(first, first + count)
        return [(owner, domain.grants.grant_access(Domid(to), Pfn(pfn), readonly=readonly)) for pfn in pfns]

    def page(self, ref: Ref) -> memoryview:
        """The page behind a grant, as its owner sees it."""
        return self.domains[ref[0]].memory.run(Pfn(self.entry(ref).pfn))

    def frame(self, ref: Ref) -> Frame:
        return Frame(self.domains[ref[0]].memory, self.entry(ref).pfn)

    def entry(self, ref: Ref):  # type: ignore[no-untyped-def]
        return next(entry for entry in self.domains[ref[0]].grants.entries() if entry.ref == ref[1])

    def see(self, index: int, count: int = 1) -> mmap.mmap:
        """What a process has that maps the file there."""
        return mmap.mmap(self.arena.fd, count * PAGE_SIZE, offset=index)

    def map(self, user: GntdevUser, refs: Sequence[Ref]) -> int:
        return finish(user.map(refs, "prog[1]"), pause=self._go_on)

    def _go_on(self, pause: Pause) -> None:
        assert pause is Pause.TURN, "nothing writes to these frames"

    def pair(self, a: int, b: int) -> tuple[EvtchnUser, int, EvtchnUser, int]:
        """Two programs with a channel between them, at rest."""
        one, other = (self.evtchn[domid].open("prog[1]", lambda: None) for domid in (a, b))
        port = one.bind_unbound_port(b)
        peer = other.bind_interdomain(a, port)
        self.hypervisor.settle()
        assert ports(other) == [peer]
        other.write(peer.to_bytes(4, "little"))
        return one, port, other, peer

    def events(self, user: EvtchnUser) -> list[int]:
        """What has been sent to a program since the last time."""
        self.hypervisor.settle()
        found = ports(user)
        for port in found:
            user.write(port.to_bytes(4, "little"))
        return found

    # --- looking ---------------------------------------------------------------------------------------------------

    def held(self) -> dict[str, object]:
        """How much there is of everything."""
        runs = sum(run.left > 0 for run in self.arena.places.runs)
        counts: dict[str, object] = {"slots": len(self.arena._slots), "runs": runs}
        counts["pieces"] = sum(self.arena._pieces.values())
        for domid, domain in self.domains.items():
            active = {ref: (pins.readers, pins.writers) for ref, pins in domain.grants.active.items()}
            counts |= {
                f"{domid} pins": active,
                f"{domid} mappings": len(domain.maptrack.mappings),
                f"{domid} entries": len(list(domain.grants.entries())),
                f"{domid} frames": domain.memory.free_pages + domain.grants.frames,
                f"{domid} ports": {port: bound.holds for port, bound in self.evtchn[domid].bound.items()},
                f"{domid} gntalloc": self.gntalloc[domid].used,
            }
        return counts

    def all_maps(self, domid: int) -> Iterator[GrantMap]:
        for user in self.gntdev[domid].users:
            yield from user.maps
            yield from user._changing

    def violations(self) -> list[str]:
        """Where the invariants of the devices do not hold; jobs may be under way, but nothing waits to go home."""
        problems = check_grants(self.domains.values())
        users: Counter[Frame] = Counter()
        for domid, domain in self.domains.items():
            handles = Counter(mapping.handle for grant_map in self.all_maps(domid) for mapping in grant_map.mappings)
            mapped = [handle for handle, mapping in domain.maptrack.mappings.items() if mapping.owner]
            if handles != Counter(mapped):
                problems.append(f"domain {domid} has {mapped} mapped for programs, but they have {handles}")
            for grant_map in self.all_maps(domid):
                users.update(mapping.frame for mapping in grant_map.mappings[: grant_map.shown])
            problems += self._of_gntalloc(domid, domain, users)
        slots = {frame: slot.users for frame, slot in self.arena._slots.items()}
        if slots != users:
            problems.append(f"slots have {sorted(slots.values())} users, not {sorted(users.values())}")
        return problems

    def _of_gntalloc(self, domid: int, domain: Domain, users: Counter[Frame]) -> Iterator[str]:
        device = self.gntalloc[domid]
        pages = [page for user in device.users for page in user.pages.values()] + list(device.lingering)
        ending = [entry.pfn for entry in domain.grants.entries() if entry.ref in domain.grants._ending]
        frames = Counter([*(page.pfn for page in pages), *ending])
        if sum(frames.values()) != device.used or any(count > 1 for count in frames.values()):
            yield f"domain {domid} has {device.used} pages of gntalloc, not {frames}"
        users.update(Frame(domain.memory, pfn) for pfn in frames)
