"""Goal: as many pages of gntalloc as there may be go together, by the slice, and others have their turns meanwhile.
Method: real domains and the real arena; what goes home together is counted, and what is gone when others have a turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from sysdev.gntalloc import SLICE
from sysdev.steps import Pause
from tests.sysdev.granting import Grants, Maps, finish
from xenmodel.memory import Frame

MANY = 4 * SLICE


class Crowd:
    """Domain 1 with very many pages of gntalloc, of one open. `left` says how many went home together, `turns`, when others
    had one, how many were gone then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.grants = Grants(pages=MANY + 64, limit=MANY)
        self.device, self.maps = self.grants.gntalloc[1], Maps()
        self.user = self.device.open(self.maps.look)
        self.index, self.refs = finish(self.user.alloc(2, 1, MANY))
        self.left: list[int] = []
        self.turns: list[int] = []
        leave = self.grants.arena.leave

        def leaving(users: Sequence[tuple[Frame, Callable[[], object]]]) -> None:
            self.left.append(len(users))
            leave(users)

        monkeypatch.setattr(self.grants.arena, "leave", leaving)

    def turn(self, pause: Pause) -> None:
        assert pause is Pause.TURN
        self.turns.append(MANY - self.device.used)

    def go(self, how: str) -> None:
        if how == "stop":
            self.device.stop()
        elif how == "sweep":
            self.device.lingering.update(dict.fromkeys(self.user.pages.values(), self.maps.look))
            self.user.pages = {}
            finish(self.device.sweep(), pause=self.turn)
        else:
            finish(self.user.close() if how == "close" else self.user.dealloc(self.index, MANY), pause=self.turn)


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch) -> Iterator[Crowd]:
    made = Crowd(monkeypatch)
    yield made
    assert made.grants.violations() == []
    made.grants.close()


@pytest.mark.parametrize("how", ["dealloc", "close", "sweep", "stop"])
def test_many_pages_go_together(crowd, how):
    """Goal: pages go home by the slice, with turns for others in between; only the end of the domain takes none.
    Method: as many as the limit allows, each way; what left together, and what was gone when others had their turns."""
    crowd.go(how)
    assert crowd.left == ([MANY] if how == "stop" else [SLICE] * 4)
    assert crowd.turns == ([] if how == "stop" else [0, SLICE, 2 * SLICE, 3 * SLICE]), "the first is the look"
    assert crowd.device.used == 0 and not crowd.grants.arena._slots


@pytest.mark.parametrize("how", ["dealloc", "stop"])
def test_many_pages_some_of_them_mapped(crowd, how):
    """Goal: what a peer has mapped goes when it unmaps it, all else together before.  Method: every hundredth is mapped."""
    maptrack = crowd.grants.domains[2].maptrack
    mappings = [maptrack.map(1, ref)[1] for ref in crowd.refs[::100]]
    crowd.go(how)
    assert sum(crowd.left) == MANY - len(mappings) and crowd.device.used == len(mappings)
    for mapping in mappings:
        assert maptrack.unmap(mapping.handle) == 0
    assert crowd.device.used == 0 and sum(crowd.left) == MANY


@pytest.mark.parametrize("other", ["sweep", "stop", "alloc"])
@pytest.mark.parametrize("at", range(4))
def test_turns_between_many_pages(crowd, at, other):
    """Goal: pages go once, and new ones stay, though others work on the same between two slices.
    Method: after each slice another sweep, the domain's end, or an alloc of more than is free, which needs the rest."""
    made = []

    def turn(pause: Pause) -> None:
        crowd.turn(pause)
        if len(crowd.turns) != at + 1:
            return
        if other == "alloc":
            made.append(finish(crowd.user.alloc(3, 1, MANY)))
        elif other == "stop":
            crowd.device.stop()
        else:
            finish(crowd.device.sweep())
        assert crowd.device.used == MANY * len(made)

    assert finish(crowd.user.dealloc(crowd.index, MANY), pause=turn) == 0
    assert crowd.device.used == MANY * len(made) and sum(crowd.left) == MANY
    assert len(crowd.user.pages) == MANY * len(made) and not crowd.device.lingering
