"""Goal: whatever opens of /dev/xen/evtchn do, in any order, no event is lost, none is read twice or by another, and no port
stays that nobody has.  Method: a hypothesis state machine over three opens in two domains, with holds; the oracle is a list
per open (the ring) and a record per port with its mask and pending bit.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sysdev.evtchn import EvtchnUser
from tests.sysdev.opens import Machine, ports, u32

DOMAIN_OF = (1, 1, 2)  # of each open
End = tuple[int, int]  # domid, port


@dataclass
class Known:
    """A port: which open has it, what it is joined to, how often it is held; and its bits."""

    user: int | None
    peer_domid: int
    peer: End | None = None
    holds: int = 0
    masked: bool = False
    pending: bool = False


users = st.integers(0, 2)
numbers = st.integers(0, 8)


class EvtchnMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine()
        self.users: list[EvtchnUser] = [self.machine.open(domid) for domid in DOMAIN_OF]
        self.known: dict[End, Known] = {}
        self.rings: list[list[int]] = [[], [], []]
        self.wakes = 0

    # --- the oracle -----------------------------------------------------------------------------------------------

    def lowest(self, domid: int) -> int:
        return min(number for number in range(1, len(self.known) + 2) if (domid, number) not in self.known)

    def mine(self, user: int, port: int) -> Known | None:
        known = self.known.get((DOMAIN_OF[user], port))
        return known if known is not None and known.user == user else None

    def settle(self) -> None:
        """What is due is delivered, a domain's in the order of its ports."""
        self.machine.hypervisor.settle()
        for (_, port), known in sorted(self.known.items()):
            if known.pending and not known.masked and known.user is not None:
                known.pending, known.masked = False, True
                self.wakes += not self.rings[known.user]
                self.rings[known.user].append(port)

    def drop(self, end: End) -> None:
        """Closed: the other end waits for this domain again."""
        peer = self.known.pop(end).peer
        if peer is not None and peer in self.known:
            self.known[peer].peer = None

    def leave(self, end: End) -> None:
        known = self.known[end]
        known.user, known.masked = None, True
        if not known.holds:
            self.drop(end)

    # --- what programs do -----------------------------------------------------------------------------------------

    @rule(user=users, peer_domid=st.sampled_from((1, 2)))
    def bind_unbound(self, user: int, peer_domid: int) -> None:
        domid = DOMAIN_OF[user]
        port = self.lowest(domid)
        assert self.users[user].bind_unbound_port(peer_domid) == port
        self.known[domid, port] = Known(user, peer_domid)

    @rule(user=users, remote=st.sampled_from((1, 2)), port=numbers)
    def bind_interdomain(self, user: int, remote: int, port: int) -> None:
        domid, there = DOMAIN_OF[user], self.known.get((remote, port))
        result = self.users[user].bind_interdomain(remote, port)
        if there is None or there.peer is not None or there.peer_domid != domid:
            assert result == -errno.EINVAL
            return
        assert result == self.lowest(domid)
        there.peer = domid, result
        self.known[domid, result] = Known(user, remote, (remote, port), pending=True)
        self.settle()

    @rule(user=users, port=numbers)
    def notify(self, user: int, port: int) -> None:
        known = self.mine(user, port)
        assert self.users[user].notify(port) == (0 if known else -errno.ENOTCONN)
        if known is not None and known.peer is not None:
            self.known[known.peer].pending = True
        self.settle()

    @rule(user=users, size=st.sampled_from((3, 4, 9, 4096)))
    def read(self, user: int, size: int) -> None:
        ring = self.rings[user]
        expected = [ring.pop(0) for _ in range(min(size // 4, len(ring)))]
        assert ports(self.users[user], size) == expected

    @rule(user=users, written=st.lists(numbers, max_size=6))
    def write(self, user: int, written: list[int]) -> None:
        assert self.users[user].write(u32(*written)) == 4 * len(written)
        for port in written:
            known = self.mine(user, port)
            if known is not None:
                known.masked = False
        self.settle()

    @rule(user=users, port=numbers)
    def unbind(self, user: int, port: int) -> None:
        known = self.mine(user, port)
        assert self.users[user].unbind(port) == (0 if known else -errno.ENOTCONN)
        if known is not None:
            self.leave((DOMAIN_OF[user], port))

    @rule(user=users)
    def reset(self, user: int) -> None:
        assert self.users[user].reset() == 0
        self.rings[user].clear()

    @rule(user=users)
    def close(self, user: int) -> None:
        """And open again."""
        self.users[user].close()
        for end in [end for end, known in self.known.items() if known.user == user]:
            self.leave(end)
        self.rings[user].clear()
        self.users[user] = self.machine.open(DOMAIN_OF[user])

    # --- what gntdev does -----------------------------------------------------------------------------------------

    @rule(domid=st.sampled_from((1, 2)), port=numbers)
    def get(self, domid: int, port: int) -> None:
        known = self.known.get((domid, port))
        assert self.machine.devices[domid].get(port) == (0 if known else -errno.ENOENT)
        if known is not None:
            known.holds += 1

    @rule(domid=st.sampled_from((1, 2)), port=numbers)
    def put(self, domid: int, port: int) -> None:
        self.machine.devices[domid].put(port)
        known = self.known.get((domid, port))
        if known is not None and known.holds:
            known.holds -= 1
            if not known.holds and known.user is None:
                self.drop((domid, port))

    @rule(domid=st.sampled_from((1, 2)), port=numbers)
    def send(self, domid: int, port: int) -> None:
        self.machine.devices[domid].send(port)
        known = self.known.get((domid, port))
        if known is not None and known.peer is not None:
            self.known[known.peer].pending = True
        self.settle()

    # --- what must hold -------------------------------------------------------------------------------------------

    @invariant()
    def ports_and_bits_agree(self) -> None:
        for domid in (1, 2):
            events, device = self.machine.domains[domid].events, self.machine.devices[domid]
            mine = {port: known for (owner, port), known in self.known.items() if owner == domid}
            assert events.channels.keys() == device.bound.keys() == mine.keys()
            for port, known in mine.items():
                assert (events.is_masked(port), events.is_pending(port)) == (known.masked, known.pending), (domid, port)
                assert device.bound[port].holds == known.holds
                assert events.channels[port].remote_port == (known.peer[1] if known.peer else 0)
        for user, ring in enumerate(self.rings):
            assert set(self.users[user].ports) == {port for (_, port), known in self.known.items() if known.user == user}
            assert self.users[user].readable == bool(ring)

    @invariant()
    def each_is_woken_when_its_ring_was_empty(self) -> None:
        assert len(self.machine.wakes) == self.wakes

    def teardown(self) -> None:
        for user in self.users:
            user.close()
        for domid, port in [end for end, known in self.known.items() for _ in range(known.holds)]:
            self.machine.devices[domid].put(port)
        assert not any(domain.events.channels for domain in self.machine.domains.values())
        self.machine.hypervisor.close()


EvtchnMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None, derandomize=True)
TestEvtchnMachine = EvtchnMachine.TestCase
