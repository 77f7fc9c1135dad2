"""Goal: what a look at an open of /dev/xen/evtchn costs does not depend on how many ports it has bound.
Method: count what is looked at of the shared page and of the ports' records; no clock."""

from __future__ import annotations

from typing import Any

import pytest

from sysdev.evtchn import BoundPort, EvtchnDevice, EvtchnUser
from tests.sysdev.opens import EAGAIN, A, B, Machine, ports, u32
from xenmodel.event_channel import NR_PORTS
from xenmodel.types import Domid

WORDS = NR_PORTS // 64


class Words:
    """The words of a shared page; counts those that are read."""

    def __init__(self, words: Any) -> None:
        self.words = words
        self.count = 0

    def __getitem__(self, index: int) -> int:
        self.count += 1
        return int(self.words[index])

    def __setitem__(self, index: int, value: int) -> None:
        self.words[index] = value


class Looks:
    """Counts what domain B's kernel looks at."""

    def __init__(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.words = Words(machine.domains[B].events.words)
        self.records = 0
        is_ours = EvtchnDevice.is_ours

        def counting(device: EvtchnDevice, bound: BoundPort) -> bool:
            self.records += 1
            return is_ours(device, bound)

        monkeypatch.setattr(machine.domains[B].events, "words", self.words)
        monkeypatch.setattr(EvtchnDevice, "is_ours", counting)

    def take(self) -> tuple[int, int]:
        """Words and records since the last time."""
        found = self.words.count, self.records
        self.words.count = self.records = 0
        return found


def fill(user: EvtchnUser) -> None:
    while user.bind_unbound_port(A) > 0:
        pass


@pytest.mark.parametrize("look", [lambda user: user.read(4) == EAGAIN, lambda user: not user.readable], ids=["read", "poll"])
def test_a_look_that_finds_nothing(monkeypatch, look):
    """Goal: pending and mask bits of each word with ports of this open are looked at, no records; of one port that is one
    word.  Method: a read and a poll of an open with one port, and of one with all that are left."""
    machine = Machine()
    few, many = machine.open(B), machine.open(B)
    few.bind_unbound_port(A)
    fill(many)
    assert len(many.ports) == NR_PORTS - 2
    looks = Looks(machine, monkeypatch)
    for user, most in ((few, 2), (many, 2 * WORDS)):
        assert look(user)
        words, records = looks.take()
        assert words <= most and not records


def test_a_look_that_finds_some(monkeypatch):
    """Goal: events that were not delivered yet are found wherever they are, and cost what they are, not what is bound; those
    of others in the same word are left to them.
    Method: pairs among very many ports, two of them of another open; all notified, none delivered; each looks."""
    machine = Machine()
    a, b, other = machine.open(A), machine.open(B), machine.open(B)
    pairs = [machine.pair(a, user) for user in (b, other, b, other)]
    fill(b)
    for number in (1000, 2000, 4000):
        b.unbind(number)
        pairs.append(machine.pair(a, b))
        assert pairs[-1][1] == number
    for port, _ in pairs:
        assert a.notify(port) == 0
    looks = Looks(machine, monkeypatch)
    theirs = [pairs[1][1], pairs[3][1]]
    assert sorted(ports(b)) == sorted(peer for _, peer in pairs if peer not in theirs)
    words, records = looks.take()
    assert words <= 2 * WORDS + 4 * len(pairs) and records <= 2 * len(pairs)
    assert ports(b) == [] and ports(other) == theirs
    machine.hypervisor.settle()
    assert ports(b) == ports(other) == [], "each was read once"


@pytest.mark.parametrize("how", ["unbound", "closed underneath", "held"])
def test_ports_that_are_no_longer_its_own(how):
    """Goal: an event of a port that has the number of one that was bound here is not taken from whom it is for, and the
    next that is bound here under that number is found.
    Method: leave or lose a port of two; the kernel has its number, is notified and looks before and after us; bind it."""
    machine = Machine()
    a, b = machine.open(A), machine.open(B)
    _, stays = machine.pair(a, b)
    port, lost = machine.pair(a, b)
    events, device = machine.domains[B].events, machine.devices[B]
    if how == "held":
        assert device.get(lost) == 0
    if how == "closed underneath":
        events.close(lost)
    else:
        assert b.unbind(lost) == 0
    if how == "held":
        assert a.notify(port) == 0 and events.unmask(lost) == 0
        assert ports(b) == [] and events.is_pending(lost)
        device.put(lost)
    seen: list[int] = []
    assert events.bind_interdomain(Domid(A), port, seen.append) == lost
    assert ports(b) == [] and not b.readable and events.is_pending(lost)
    machine.hypervisor.settle()
    assert seen == [lost]
    events.close(lost)
    assert b.bind_interdomain(A, port) == lost and ports(b) == [lost]
    b.write(u32(lost))
    assert sorted(b.ports) == sorted((stays, lost))
