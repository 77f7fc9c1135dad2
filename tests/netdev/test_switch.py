"""Goal: a Switch brings frames to whom they are meant for, never back, and remembers no more than it may.
Method: small scenes by hand, then a hypothesis state machine against an oracle that searches the whole history."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from netdev.cable import COMPLETE, MemoryPort, Switch
from netdev.vnet import VNET
from tests.netdev.test_cable import FIELD, TCP, TRANSPORT, packet, right

BROADCAST = b"\xff" * 6
GROUP = bytes.fromhex("01005e000001")


def mac(number: int) -> bytes:
    return b"\x00\x16\x3e" + number.to_bytes(3, "big")


def frame(target: bytes, source: bytes, text: bytes = b"") -> bytes:
    return target + source + b"\x88\xb5" + text


def heard(ports: list[MemoryPort]) -> list[int]:
    """How many frames each port got."""
    return [len(port.receive()) for port in ports]


def make(count: int, **options: int) -> tuple[Switch, list[MemoryPort]]:
    switch = Switch(**options)
    return switch, [switch.plug() for _ in range(count)]


@pytest.mark.parametrize("target", [BROADCAST, GROUP, mac(9)], ids=["broadcast", "multicast", "unknown"])
def test_floods(target: bytes) -> None:
    """Goal: everybody else hears it, once.  Method: four ports."""
    _, ports = make(4)
    assert ports[1].send(frame(target, mac(1)))
    assert heard(ports) == [1, 0, 1, 1]


def test_learns() -> None:
    """Goal: once heard, an address gets its frames alone, and not back to its own port.  Method: ask, answer, repeat."""
    switch, ports = make(3)
    assert ports[0].send(frame(mac(1), mac(0))) and heard(ports) == [0, 1, 1]
    assert ports[1].send(frame(mac(0), mac(1))) and heard(ports) == [1, 0, 0]
    assert ports[0].send(frame(mac(1), mac(0))) and heard(ports) == [0, 1, 0]
    assert ports[1].send(frame(mac(1), mac(2))) and heard(ports) == [0, 0, 0], "behind the port it came from"
    assert switch.moves == 0 and not switch.flaps


@pytest.mark.parametrize("source", [BROADCAST, GROUP, bytes(6)], ids=["broadcast", "multicast", "zero"])
def test_an_address_that_is_nobodys_is_not_learnt(source: bytes) -> None:
    """Goal: such a source cannot make group traffic go to one port.  Method: claim it, then send to it."""
    switch, ports = make(3)
    assert ports[0].send(frame(mac(1), source)) and heard(ports) == [0, 1, 1]
    assert not switch.table
    assert ports[1].send(frame(source, mac(1))) and heard(ports) == [1, 0, 1]


def test_an_address_that_moves() -> None:
    """Goal: frames follow it; one move is no alarm, two guests with one address are.  Method: move once, then fight."""
    switch, ports = make(3)
    for port in (0, 1):
        assert ports[port].send(frame(BROADCAST, mac(7)))
    heard(ports)
    assert ports[2].send(frame(mac(7), mac(2))) and heard(ports) == [0, 1, 0]
    assert (switch.moves, switch.flaps) == (1, {mac(7): 1})
    for turn in range(10):
        assert ports[turn % 2].send(frame(BROADCAST, mac(7)))
    assert (switch.moves, switch.flaps) == (11, {mac(7): 11})


def test_the_table_is_bounded() -> None:
    """Goal: the address not heard for longest is forgotten.  Method: room for 3; keep the first one talking."""
    switch, ports = make(3, addresses=3)
    for number in (1, 2, 3, 1, 4):
        assert ports[0].send(frame(BROADCAST, mac(number)))
    assert list(switch.table) == [mac(3), mac(1), mac(4)]
    heard(ports)
    assert ports[1].send(frame(mac(2), mac(3)))
    assert heard(ports) == [1, 0, 1], "forgotten, so it is unknown"


def test_what_is_kept_of_moves_is_bounded() -> None:
    """Goal: a guest that steals address after address does not fill our memory.  Method: 100 moves with room for 5."""
    switch, ports = make(2, addresses=5)
    for number in range(100):
        for port in ports:
            assert port.send(frame(BROADCAST, mac(number)))
    assert switch.moves == 100 and list(switch.flaps) == [mac(n) for n in range(95, 100)]
    for number in (99, 95, 100):  # of those, what moved again is the last to go
        for port in ports:
            assert port.send(frame(BROADCAST, mac(number)))
    assert switch.flaps[mac(95)] > 1 and mac(96) not in switch.flaps


@pytest.mark.parametrize("close", [False, True])
def test_unplug(close: bool) -> None:
    """Goal: a port that left gets and gives nothing, its addresses are unknown again, to come back elsewhere is no move.
    Method: both ways to leave, twice; a port of another switch is let be."""
    switch, ports = make(3)
    for number, port in enumerate(ports):
        assert port.send(frame(BROADCAST, mac(number)))
    heard(ports)
    for _ in range(2):
        if close:
            ports[2].close()
        else:
            switch.unplug(ports[2])
    assert mac(2) not in switch.table and switch.ports == ports[:2]
    assert ports[0].send(frame(mac(2), mac(0))) and heard(ports) == [0, 1, 0]
    assert ports[2].send(frame(BROADCAST, mac(2))) is False and heard(ports) == [0, 0, 0]
    new = switch.plug()
    assert new.send(frame(BROADCAST, mac(2))) and switch.moves == 0
    other = Switch()
    stranger = other.plug()
    switch.unplug(stranger)
    assert stranger.send(frame(BROADCAST, mac(1))) and other.ports == [stranger]


def test_each_reader_gets_what_it_can_take() -> None:
    """Goal: offloads are undone for each reader on its own, a full or absent one costs no other anything.
    Method: a GSO frame flooded to five ports: takes all, csum only, nothing, no carrier, full."""
    switch, ports = make(6, queue=3)
    source, takes_all, csum, nothing, absent, full = ports
    takes_all.offload(True, True, True)
    csum.offload(True, False, False)
    absent.carrier(False)
    for _ in range(3):
        assert source.send(frame(mac(5), mac(0), b"fill"))
    for port in (takes_all, csum, nothing):
        port.receive()
    vnet = VNET.pack(1, 1, 54, 1000, TRANSPORT[4], FIELD[TCP])
    sent = packet(4, TCP, bytes(2500))
    assert source.send(sent, vnet)
    assert takes_all.receive() == [(vnet, sent)]
    for port in (csum, nothing):
        got = port.receive()
        assert [head for head, _ in got] == [COMPLETE] * 3 and all(right(whole) for _, whole in got)
    assert (absent.drops.carrier, absent.dropped) == (4, 4)
    assert (full.drops.full, full.dropped) == (1, 1)
    assert [port.dropped for port in (takes_all, csum, nothing)] == [0, 0, 0]
    assert switch.moves == 0


def test_a_reader_may_unplug_others_while_it_is_told() -> None:
    """Goal: on_readable may change the switch in the middle of a flood.  Method: the first to hear unplugs the second and
    plugs in a new port."""
    switch, ports = make(4)
    plugged: list[MemoryPort] = []

    def meanwhile() -> None:
        ports[1].receive()
        switch.unplug(ports[2])
        plugged.append(switch.plug())

    ports[1].on_readable = meanwhile
    assert ports[0].send(frame(BROADCAST, mac(0)))
    assert len(plugged) == 1 and heard([*ports, *plugged]) == [0, 0, 0, 1, 0]
    assert ports[2].dropped == 0, "nothing was sent to it"


def test_a_switch_remembers_something() -> None:
    """Goal: a clear error.  Method: a table of no addresses."""
    with pytest.raises(ValueError, match="remembers 0 addresses"):
        Switch(addresses=0)


class SwitchMachine(RuleBasedStateMachine):
    """The oracle is the list of all (address, port) ever heard; who has an address is found by searching it backward."""

    ADDRESSES = 3

    def __init__(self) -> None:
        super().__init__()
        self.switch = Switch(addresses=self.ADDRESSES)
        self.ports: dict[int, MemoryPort] = {}
        self.history: list[tuple[bytes, int]] = []
        self.moves = 0
        self.next = 0

    def known(self) -> dict[bytes, int]:
        """Newest first. `history` holds only what is not forgotten, so a search from its end finds all."""
        found: dict[bytes, int] = {}
        for address, port in reversed(self.history):
            found.setdefault(address, port)
        return found

    @rule()
    def plug(self) -> None:
        if len(self.ports) < 5:
            self.ports[self.next] = self.switch.plug()
            self.next += 1

    @rule(which=st.integers(0, 4))
    def unplug(self, which: int) -> None:
        if self.ports:
            number = list(self.ports)[which % len(self.ports)]
            self.switch.unplug(self.ports.pop(number))
            gone = {address for address, port in self.known().items() if port == number}
            self.history = [entry for entry in self.history if entry[0] not in gone]

    @rule(which=st.integers(0, 4), up=st.booleans())
    def carrier(self, which: int, up: bool) -> None:
        if self.ports:
            list(self.ports.values())[which % len(self.ports)].carrier(up)

    @rule(which=st.integers(0, 4), source=st.integers(0, 5), to=st.integers(-1, 5))
    def send(self, which: int, source: int, to: int) -> None:
        if not self.ports:
            return
        number = list(self.ports)[which % len(self.ports)]
        address = mac(source)
        before = self.known().get(address)
        self.moves += before is not None and before != number
        self.history.append((address, number))
        kept = list(self.known())[: self.ADDRESSES]
        self.history = [entry for entry in self.history if entry[0] in kept]
        target = BROADCAST if to < 0 else mac(to)
        assert self.ports[number].send(frame(target, address))
        owner = self.known().get(target)
        meant = set(self.ports) - {number} if owner is None else {owner} - {number}
        for other, port in self.ports.items():
            assert len(port.receive()) == (other in meant and port.up)

    @invariant()
    def agrees(self) -> None:
        assert list(self.switch.table) == list(self.known())[::-1]
        assert {a: self.ports[n] for a, n in self.known().items()} == self.switch.table
        assert self.switch.moves == self.moves >= sum(self.switch.flaps.values())
        assert self.switch.ports == list(self.ports.values())


TestSwitchMachine = SwitchMachine.TestCase
TestSwitchMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
