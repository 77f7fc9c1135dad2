"""Goal: a domain that writes all the time cannot keep others' transactions from committing (XSA-206), and none starves.
Method: the daemon's arithmetic in whole thousandths and milliseconds beside ours, under any sequence of what domains do;
properties of any load; scripts that look at what a request costs."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.xenmodel.xenstore import run
from xenmodel.types import Domid
from xenmodel.xenstore.credit import DOMAIN_BURST, NEW_DOMAINS, RATE, RESERVE_BURST, WriteCredit
from xenmodel.xenstore.domain import DomainRecord


def transfer(debit: int, floor: int, credit: int, ceiling: int) -> int:
    """How much goes from one account to another that may not fall below, or rise above, a limit."""
    return max(0, min(debit - floor, ceiling - credit))


class InTheDaemon:
    """wrl_*() of domain.c: whole thousandths of a write, whole milliseconds."""

    def __init__(self) -> None:
        self.reserve = 0
        self.credit: dict[int, int] = {}
        self.at: dict[int, int] = {}

    def open(self, domid: int, now: int) -> None:
        self.credit[domid] = transfer(self.reserve, -50_000, 0, 10_000)
        self.at[domid] = now
        self.reserve -= self.credit[domid]

    def close(self, domid: int) -> None:
        self.reserve += transfer(self.credit.pop(domid), 0, self.reserve, 10_000)

    def update(self, domid: int, now: int) -> None:
        credit = self.credit[domid] + (now - self.at[domid]) * 200_000 // (len(self.credit) * 1000)
        loan = transfer(self.reserve, 0, credit, 0)
        credit, self.reserve = credit + loan, self.reserve - loan
        surplus = max(0, credit - 10_000)
        self.reserve += transfer(surplus, 0, self.reserve, 1_000_000)
        self.credit[domid], self.at[domid] = credit - surplus, now

    def debit(self, domid: int, now: int) -> None:
        self.update(domid, now)
        self.credit[domid] -= 1000

    def wait_ms(self, domid: int, now: int) -> int:
        self.update(domid, now)
        return max(0, -self.credit[domid] * 1000 * len(self.credit) // 200_000)


class Bank:
    """Ours: some domains and a clock that the test sets."""

    def __init__(self, domains: int = 0) -> None:
        self.now = 0.0
        self.credit = WriteCredit(lambda: self.now)
        self.domains: dict[int, DomainRecord] = {}
        for domid in range(1, domains + 1):
            self.open(domid)

    def open(self, domid: int) -> None:
        self.domains[domid] = DomainRecord(Domid(domid))
        self.credit.open(self.domains[domid])

    def close(self, domid: int) -> None:
        self.credit.close(self.domains.pop(domid))

    def write(self, domid: int) -> bool:
        """If the domain may."""
        if self.credit.wait_s(self.domains[domid]) > 0:
            return False
        self.credit.debit(self.domains[domid])
        return True


STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["open", "close", "write", "write", "write", "wait"]), st.integers(1, 4)),
        st.tuples(st.just("burst"), st.integers(1, 4)),
        st.tuples(st.just("sleep"), st.sampled_from([0, 1, 3, 5, 10, 70, 1000, 20_000])),
    ),
    max_size=120,
)


@given(steps=STEPS)
@example(steps=[("open", 1), ("open", 2), ("sleep", 1000), ("wait", 1), ("wait", 2), ("close", 1), ("close", 2)])
@example(steps=[("open", n) for n in range(1, 9)] + [("burst", 8), ("sleep", 70), ("wait", 8), ("close", 1), ("wait", 8)])
@settings(max_examples=300, deadline=None)
def test_as_in_the_daemon(steps: list[tuple[str, int]]) -> None:
    """Goal: the same credit, reserve and waiting time.  Method: any sequence in both; the daemon cuts off less than a
    thousandth at each update, so they may differ by as much."""
    ours, theirs, now, cut = Bank(), InTheDaemon(), 0, 0.0
    for what, number in steps:
        there = number in ours.domains
        cut += 0.001 if there else 0
        if what == "sleep":
            now += number
            ours.now = now / 1000
        elif what == "open" and not there:
            ours.open(number)
            theirs.open(number, now)
        elif what == "close" and there:
            ours.close(number)
            theirs.close(number)
        elif what in ("write", "burst") and there:
            for _ in range(1 if what == "write" else 30):
                ours.credit.debit(ours.domains[number])
                theirs.debit(number, now)
        elif what == "wait" and there:
            wait_ms = 1000 * ours.credit.wait_s(ours.domains[number])
            assert abs(wait_ms - theirs.wait_ms(number, now)) <= 1 + cut * 5 * len(ours.domains)
        for domid, record in ours.domains.items():
            assert abs(record.credit - theirs.credit[domid] / 1000) <= cut + 1e-6, (what, number)
        assert abs(ours.credit.reserve - theirs.reserve / 1000) <= cut + 1e-6, (what, number)
        assert ours.credit.domains == len(theirs.credit)


@given(steps=STEPS)
@settings(max_examples=100, deadline=None)
def test_no_account_leaves_its_bounds(steps: list[tuple[str, int]]) -> None:
    """Goal: nobody saves up without limit, nor owes more than a write.  Method: any sequence in which domains write only
    when they may."""
    bank = Bank()
    for what, number in steps:
        there = number in bank.domains
        if what == "sleep":
            bank.now += number / 1000
        elif what == "open" and not there:
            bank.open(number)
        elif what == "close" and there:
            bank.close(number)
        elif there:
            for _ in range(30):
                bank.write(number)
        assert all(-1 <= record.credit <= DOMAIN_BURST for record in bank.domains.values())
        assert -DOMAIN_BURST * NEW_DOMAINS <= bank.credit.reserve <= RESERVE_BURST


@given(domains=st.integers(1, 30), load=st.lists(st.tuples(st.integers(0, 29), st.integers(0, 20)), max_size=300))
@settings(max_examples=100, deadline=None)
def test_all_together_write_no_more_than_the_rate(domains: int, load: list[tuple[int, int]]) -> None:
    """Goal: however many domains write, together they disturb others no more often than one would be allowed to.
    Method: any load on a fixed number of domains; count the writes that were let through."""
    bank, writes = Bank(domains), 0
    for number, pause_ms in load:
        for _ in range(5):
            writes += bank.write(number % domains + 1)
        bank.now += pause_ms / 1000
        total = bank.credit.reserve + sum(record.credit for record in bank.domains.values())
        assert total + writes <= RATE * bank.now + 1e-6
        assert writes <= RATE * bank.now + DOMAIN_BURST * NEW_DOMAINS + domains


@given(domains=st.integers(2, 30), debts=st.integers(1, 40), greedy=st.lists(st.integers(0, 28), max_size=40))
@settings(max_examples=100, deadline=None)
def test_nobody_starves(domains: int, debts: int, greedy: list[int]) -> None:
    """Goal: who has to wait may go on when he was told, whatever the others do meanwhile.
    Method: domain 1 goes into debt and waits; the others write as often as they may; then it is its turn."""
    bank = Bank(domains)
    one = bank.domains[1]
    for _ in range(debts):
        bank.credit.debit(one)
    wait_s = bank.credit.wait_s(one)
    assert 0 <= wait_s <= debts * domains / RATE
    for number in greedy:
        bank.now += wait_s / (len(greedy) + 1)
        for _ in range(20):
            bank.write(number % (domains - 1) + 2)
    bank.now += wait_s / (len(greedy) + 1) + 1e-6
    assert bank.credit.wait_s(one) == 0
    assert bank.write(1)


def test_a_clock_that_goes_back_takes_nothing_away() -> None:
    """Goal: no credit is lost, or won, by a clock.  Method: set it back and forth again."""
    bank = Bank(1)
    bank.now = 10.0
    bank.credit.update(bank.domains[1])
    for _ in range(5):
        bank.write(1)
    saved = bank.domains[1].credit
    bank.now = 9.0
    bank.credit.update(bank.domains[1])
    assert bank.domains[1].credit == saved


def test_new_domains_find_some_credit_and_then_none() -> None:
    """Goal: domains cannot be made to get around the limit.  Method: eight new ones at once, in an empty reserve."""
    bank = Bank(8)
    assert [record.credit for record in bank.domains.values()] == [10.0] * 5 + [0.0] * 3
    assert bank.credit.reserve == -50.0
    for domid in range(1, 9):
        bank.close(domid)
    assert (bank.credit.reserve, bank.credit.domains) == (0.0, 0)


COSTS = {
    "only what can disturb a transaction": (
        """
        1 write data/x 1
        1 rm data/x
        0 start t
        """,
        0,
    ),
    "each kind of change": (
        """
        0 start t
        1 write data/x 1
        1 mkdir data/y
        1 chmod data/x n1 r2
        1 rm data/x
        """,
        2 + 2 + 1 + 2,  # a node made or removed, and the one above it
    ),
    "not what changes nothing": (
        """
        1 write data/x 1
        0 start t
        1 read data/x -> 1
        1 ls data -> x
        1 mkdir data/x
        1 rm data/none
        1 rm data/none/none -> ENOENT
        1 write name evil -> EACCES
        1 chmod data/x n2 -> EPERM
        1 watch data tok
        """,
        0,
    ),
    "one's own transaction too": (
        """
        1 start t
        1 write data/x 1
        """,
        2,
    ),
    "a commit beside another transaction, once": (
        """
        0 start t
        1 start u
        1.u write data/x 1
        1.u write data/y 1
        1.u rm data/x
        1 commit u
        """,
        1,
    ),
    "not a commit that nobody sees": (
        """
        1 start u
        1.u write data/x 1
        1 commit u
        0 start t
        0 commit t
        1 start u
        1 abort u
        """,
        0,
    ),
    "not a commit that fails": (
        """
        0 start t
        1 start u
        1.u read data -> ""
        0 write /local/domain/1/data 1
        1.u write data/x 1
        1 commit u -> EAGAIN
        """,
        0,
    ),
    "transactions that ended otherwise": (
        """
        2 start t
        2 start tt
        2 reset
        1 write data/x 1
        2 start u
        2 close
        1 write data/x 1
        2b start v
        0 release 2
        1 write data/x 1
        """,
        0,
    ),
}


@pytest.mark.parametrize(("script", "cost"), COSTS.values(), ids=COSTS.keys())
def test_what_a_request_costs(script: str, cost: int) -> None:
    world = run("0 introduce 1\n" + script)
    assert world.store.domains.record(Domid(1)).credit == DOMAIN_BURST - cost


def test_who_does_not_pay() -> None:
    """Goal: the control domain is not limited, nor who is not introduced (a socket's client in the daemon).
    Method: many writes of each while a transaction is open."""
    world = run("0 start t")
    for number in range(20):
        world.run(f"0 write /a {number}\n1 write data/x {number}")
    assert [world.store.domains.record(Domid(domid)).credit for domid in (0, 1)] == [10.0, 0.0]


def test_time_pays_and_death_gives_back() -> None:
    """Goal: credit comes back with the store's clock, and with a domain's end.  Method: spend it, sleep, release."""
    world = run("0 introduce 1\n0 introduce 2\n0 start t")
    record, credit = world.store.domains.record(Domid(1)), world.store.domains.credit
    for number in range(12):
        world.run(f"1 write data/x {number}")
    assert (record.credit, credit.reserve) == (-3.0, -30.0), "the first write made the node, in a directory"
    assert credit.wait_s(record) == pytest.approx(3 * 3 / RATE), "domain 0 has its share of the rate"
    world.run("0 sleep 0.06")
    assert credit.wait_s(record) == 0 and record.credit == pytest.approx(1.0)
    world.run("0 release 1\n0 release 1")
    assert credit.reserve == pytest.approx(-29.0) and credit.domains == 2
    world.run("0 introduce 1")
    assert credit.reserve == pytest.approx(-39.0) and credit.domains == 3
    assert world.store.domains.record(Domid(1)).credit == DOMAIN_BURST
