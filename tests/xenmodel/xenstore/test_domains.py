"""Goal: what the store keeps of a domain is true: its limits, its bytes, what it was refused; and it dies with the domain.
Method: tables of scripts under small quotas; bytes counted by hand; two lives of one number."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from tests.xenmodel.xenstore import GUESTS, World, run
from xenmodel.public.xen import DOMID_ANY
from xenmodel.types import Domid
from xenmodel.xenstore.domain import WARN_PAUSE_S, DomainRecord
from xenmodel.xenstore.errors import XsErrno, XsError
from xenmodel.xenstore.quota import ALIASES, DEFAULT_QUOTA, NAMES, NO_LIMITS, SOFT_NAMES, Quota, field_of
from xenmodel.xenstore.store import Store
from xenmodel.xenstore.upkeep import problems

ONE = Domid(1)

# --- limits --------------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_daemon() -> None:
    """Goal: a guest finds the limits it knows.  Method: the numbers of domain.c and core.c, in its order."""
    limits = [getattr(DEFAULT_QUOTA, field) for field, _ in (*NAMES.values(), *SOFT_NAMES.values())]
    assert limits == [1000, 128, 10, 20, 1024, 2560 * 1024, 2048, 2048, 5, 2048 * 1024]
    assert set(dataclasses.asdict(DEFAULT_QUOTA)) == {field for field, _ in (*NAMES.values(), *SOFT_NAMES.values())}
    assert set(dataclasses.asdict(NO_LIMITS).values()) == {0}


@pytest.mark.parametrize(
    ("name", "field"),
    [*((name, field) for name, (field, _) in NAMES.items()), ("soft-memory", "soft_memory"),
     ("node-permissions", "node_permissions"), ("soft-nodes", None), ("node_size", None), ("", None), ("soft-", None),
     ("soft-soft-memory", None)],
)  # fmt: skip
def test_names_of_quotas(name: str, field: str | None) -> None:
    assert field_of(name) == field
    assert set(ALIASES.values()) <= set(NAMES)


def test_a_domain_may_have_limits_of_its_own() -> None:
    """Goal: the administrator can give one domain more, or less.  Method: one limit of each kind for domain 1; then a new
    general one, which it does not follow."""
    world = run("")
    domains = world.store.domains
    assert domains.limits(ONE) is domains.limits(Domid(2)) is domains.limits(Domid(77)) is domains.quota
    assert domains.limits(Domid(0)) is NO_LIMITS is world.connection("0").limits
    domains.record(ONE).quota = dataclasses.replace(DEFAULT_QUOTA, nodes=2, watches=1, transactions=1, path_max=9)
    domains.record(Domid(2)).quota = NO_LIMITS
    domains.quota = dataclasses.replace(DEFAULT_QUOTA, nodes=1, watches=0)
    world.run("""
        1 write data/x 1
        1 write data/y 1 -> ENOSPC
        1 write data/longer 1 -> EINVAL
        1 watch data a
        1 watch data b -> ENOSPC
        1 start t
        1 start u -> ENOSPC
        2 write data/x 1
        2 write data/a/b/c/longer 1
        0 mkdir /local/domain/3/data
        0 chmod /local/domain/3/data n3
        3 write data/x 1 -> ENOSPC
        3 watch data a
    """)


# --- refusals ------------------------------------------------------------------------------------------------------------

# quota -> script in which domain 1 meets that limit once.
REFUSALS: dict[str, tuple[Quota, str]] = {
    "nodes": (Quota(nodes=1), "1 write data/x 1 -> ENOSPC"),
    "watches": (Quota(watches=1), "1 watch data a\n1 watch data b -> ENOSPC"),
    "transactions": (Quota(transactions=1), "1 start t\n1 start u -> ENOSPC"),
    "transaction-nodes": (Quota(transaction_nodes=1), "1 start t\n1.t read data -> \"\"\n1.t read data/x -> ENOSPC"),
    "node-size": (Quota(node_size=16), "1 write data 123456789 -> ENOSPC"),
    "permissions": (Quota(node_permissions=1), "1 chmod data n1 r2 -> ENOSPC"),
    "memory": (Quota(memory=100), f"1 write data {'x' * 60} -> ENOMEM"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_counted_by_the_name_of_the_limit(name: str) -> None:
    quota, script = REFUSALS[name]
    world = run(script + f"\n0 refused 1 -> {name}:1\n0 refused 2 -> nothing\n" + script.splitlines()[-1], quota)
    refusal = world.store.domains.record(ONE).refused[name]
    assert refusal.times == 2
    assert refusal.last and "\n" not in refusal.last
    assert name in NAMES


def test_the_error_names_the_limit() -> None:
    """Goal: the log says which limit.  Method: one that is met; one error that is no limit's."""
    world = run("", Quota(nodes=1))
    guest = world.connection("1")
    with pytest.raises(XsError) as caught:
        guest.write("data/x", b"")
    assert (caught.value.quota, caught.value.what) == ("nodes", "domain 1 would own 2 nodes, more than 1")
    with pytest.raises(XsError) as caught:
        guest.write("name", b"")
    assert caught.value.quota == ""


def test_refusals_within_a_transaction_spoil_it_and_count() -> None:
    run(
        """
        1 start t
        1.t write data/x 1
        1.t write data/y 1 -> ENOSPC
        1 commit t -> ENOMEM
        1 start t
        1.t write data 12345678901234567890 -> ENOSPC
        1 commit t -> ENOMEM
        1 ls data -> nothing
        0 refused 1 -> node-size:1 nodes:1
        """,
        Quota(nodes=2, node_size=20),
    )


# --- memory --------------------------------------------------------------------------------------------------------------

DATA = 24 + len("/local/domain/1/data") + 8  # what GUESTS leaves domain 1 with: one node with one permission


def memory(world: World, domid: int = 1) -> int:
    return world.store.usage(Domid(domid)).memory


BYTES = {
    "a node": ("", DATA),
    "a value": ("1 write data 12345", DATA + 5),
    "a shorter value": ("1 write data 12345\n1 write data 1", DATA + 1),
    "permissions": ("1 chmod data n1 r2 r3", DATA + 16),
    "a child and its name": ("1 write data/abc 12", DATA + 4 + DATA + 4 + 2),
    "a removed child": ("1 write data/abc 12\n1 rm data/abc", DATA),
    "a watch and its event": ("1 watch data token", DATA + 25 + 16 + 25),
    "a watch whose event was read": ("1 watch data token\n1 events -> data:token", DATA + 25),
    "a removed watch": ("1 watch data token\n1 unwatch data token", DATA),
    "a transaction that has seen nothing": ("1 start t", DATA),
    "one that has looked at a node": ("1 start t\n1.t read data -> \"\"", 2 * DATA),
    "one that has looked at nothing": ("1 start t\n1.t read data/x -> ENOENT", 2 * DATA + 24 + 22),
    "one that has written": ("1 start t\n1.t write data 123", 2 * DATA + 3),
    "one that has made a node": ("1 start t\n1.t write data/abc 12", 3 * DATA + 4 + 4 + 2 + 24 + 24),
    "one that has removed what it made": ("1 start t\n1.t write data/abc 12\n1.t rm data/abc", 2 * DATA + 24 + 24),
    "one that was committed": ("1 start t\n1.t write data 123\n1 commit t", DATA + 3),
    "one that was aborted": ("1 start t\n1.t write data 123\n1 abort t", DATA),
    "two connections": ("1 watch data t\n1b watch data t\n1 events -> data:t\n1b events -> data:t", DATA + 2 * 21),
    "one that closed": ("1b watch data t\n1b start t\n1b.t read data -> \"\"\n1b close", DATA),
    "a node that another domain made longer": ("0 write /local/domain/1/data 12345", DATA + 5),
    "a node given away": ("0 chmod /local/domain/1/data n2", 0),
}


@pytest.mark.parametrize(("script", "expected"), BYTES.values(), ids=BYTES.keys())
def test_bytes_that_count(script: str, expected: int) -> None:
    world = run(script)
    assert memory(world) == expected
    assert problems(world.store) == []
    world.run("0 release 1")
    assert memory(world) == 0


@pytest.mark.parametrize("within", [False, True], ids=["direct", "in a transaction"])
@pytest.mark.parametrize("spare", [0, 1, -1])
def test_the_limit_is_exact(spare: int, within: bool) -> None:
    """Goal: ENOMEM for what does not fit, to the byte, and nothing has changed.  Method: values that fit and do not."""
    world = run("", dataclasses.replace(NO_LIMITS, memory=3 * DATA))
    guest = world.connection("1")
    tx = guest.transaction_start() if within else 0
    guest.read("data", tx)  # which is in memory twice then
    value = b"x" * (3 * DATA - memory(world) + spare)
    if spare <= 0:
        guest.write("data", value, tx)
        assert memory(world) == 3 * DATA + spare
    else:
        with pytest.raises(XsError) as caught:
            guest.write("data", value, tx)
        assert (caught.value.errno, caught.value.quota) == (XsErrno.ENOMEM, "memory")
        assert guest.read("data", tx) == b""
    if within and spare > 0:
        with pytest.raises(XsError, match="refused for want of quota"):
            guest.transaction_end(tx, True)


MEMORY = {
    "each kind of request": (
        3 * DATA,
        f"""
        1 write data/x {"x" * DATA} -> ENOMEM
        1 chmod data {"n1 " * 20} -> ENOMEM
        1 watch data {"t" * 3 * DATA} -> ENOMEM
        1 mkdir data/{"x" * 3 * DATA} -> ENOMEM
        0 usage 1 -> 1 0 0
        0 refused 1 -> memory:4
        1 write data/x 1
        1 rm data/x
        """,
    ),
    "what takes no more is never refused": (
        2 * DATA,
        f"""
        0 write /local/domain/1/data {"x" * (DATA - 1)}
        1 start t
        1.t read data -> {"x" * (DATA - 1)}
        1.t write data y
        1 abort t
        1 write data {"y" * (DATA - 1)}
        1 write data y
        1 rm data
        """,
    ),
    "the owner's bytes, whoever writes": (
        2 * DATA,
        f"""
        0 write /local/domain/1/data {"x" * (DATA + 1)} -> ENOMEM
        0 chmod /local/domain/1/data b1
        2 write /local/domain/1/data {"x" * (DATA + 1)} -> ENOMEM
        2 write /local/domain/1/data {"x" * DATA}
        0 write /free {"x" * 3000}
        0 refused 1 -> memory:2
        0 refused 2 -> nothing
        """,
    ),
    "there is room again when something goes": (
        3 * DATA,
        f"""
        1 write data/x {"x" * 30}
        1 write data/y 1 -> ENOMEM
        1 rm data/x
        1 write data/y 1
        1 start t
        1.t read data/y -> 1
        1 watch data token -> ENOMEM
        1 abort t
        1 watch data token
        """,
    ),
    "nobody's bytes": (
        DATA,
        f"""
        0 write /any 1
        0 chmod /any n32757
        1 write /any {"x" * 1000}
        0 write /any/below {"x" * 1000}
        0 refused 1 -> nothing
        """,
    ),
}


@pytest.mark.parametrize(("limit", "script"), MEMORY.values(), ids=MEMORY.keys())
def test_the_limit_on_memory(limit: int, script: str) -> None:
    world = run(script, dataclasses.replace(NO_LIMITS, memory=limit))
    assert problems(world.store) == []
    assert world.store.domains.find(Domid(DOMID_ANY)) is None


def test_the_soft_limit_only_warns_and_not_often(caplog: pytest.LogCaptureFixture) -> None:
    """Goal: the administrator learns of it, and a domain cannot fill the log.
    Method: cross the limit up and down, within the pause and after it."""
    caplog.set_level(logging.INFO, "xenstored")
    world = run("", dataclasses.replace(NO_LIMITS, soft_memory=2 * DATA))

    def cross() -> None:
        """Over the limit and back."""
        world.run(f"1 write data {'x' * (DATA + 1)}\n1 write data x\n1 write data xy")

    world.run(f"1 write data {'x' * DATA}")
    assert caplog.messages == []
    for _ in range(100):
        cross()
    assert caplog.messages == [f"domain 1 exceeds its soft memory quota of {2 * DATA} bytes"]
    world.run(f"0 sleep {WARN_PAUSE_S}")
    for _ in range(100):
        cross()
    assert caplog.messages[1:] == [f"domain 1 is below its soft memory quota of {2 * DATA} bytes"]
    world.run(f"0 sleep {WARN_PAUSE_S}\n2 write data {'x' * (DATA + 1)}\n1 write data xyz")
    assert [message.split()[1] for message in caplog.messages[2:]] == ["2"]
    assert world.store.domains.record(ONE).refused == {}


# --- records -------------------------------------------------------------------------------------------------------------


def test_records_are_made_when_needed_and_sorted() -> None:
    """Goal: one record for a domain, in the order of their numbers.  Method: ask for some; for numbers of none."""
    domains = Store().domains
    assert domains.find(Domid(7)) is None
    seven = domains.record(Domid(7))
    assert domains.find(Domid(7)) is domains.record(Domid(7)) is seven
    domains.record(Domid(3))
    assert [record.domid for record in domains.all()] == [0, 3, 7]
    for number in (-1, 0x7FF0, DOMID_ANY, 2**32):
        with pytest.raises(XsError) as caught:
            domains.record(Domid(number))
        assert caught.value.errno is XsErrno.EINVAL and domains.find(Domid(number)) is None


def test_usage_is_that_of_all_connections() -> None:
    world = run("""
        1 watch data a
        1b watch data b
        1b watch data c
        1c start t
        1 start u
        0 usage 1 -> 1 3 2
        1b close
        0 usage 1 -> 1 1 2
    """)
    assert world.store.usage(ONE).connections == 2
    assert set(world.store.usage(Domid(9))) == {0} and world.store.domains.find(Domid(9)) is None


def test_a_number_that_is_used_again_starts_from_nothing() -> None:
    """Goal: XSA-272, XSA-483: limits, refusals, debts, warnings, features and targets are the dead one's.
    Method: a domain that uses, breaks and changes all it can; then the record of the next one, field by field."""
    quota = Quota(nodes=3, watches=2, transactions=1, soft_memory=60)
    world = run("0 introduce 1\n0 introduce 2\n0 target 1 2\n0 target 2 1", quota)
    record = world.store.domains.record(ONE)
    record.quota = dataclasses.replace(quota, nodes=2)
    record.features = 1
    world.run("""
        1 watch data a
        1 watch data b
        1 watch data c -> ENOSPC
        1 start t
        1 start u -> ENOSPC
        1 write data/x 1
        1 write data/y 1 -> ENOSPC
        0 shutdown 1
    """)
    assert record.refused and record.credit < 10 and record.soft_warned and record.shutdown and record.target == 2
    world.run("0 release 1\n0 created 1")
    assert world.store.domains.record(Domid(2)).target is None

    world.run(GUESTS)
    new, fresh = world.store.domains.record(ONE), DomainRecord(ONE)
    assert new is not record
    for field in dataclasses.fields(DomainRecord):
        assert getattr(new, field.name) == getattr(fresh, field.name), field.name
    assert memory(world) == DATA
    world.run("""
        0 usage 1 -> 1 0 0
        1 read data -> EIO
        1b write data/x 1
        1b write data/y 1
        1b write data/z 1 -> ENOSPC
        0 introduced 1 -> no
        0 refused 1 -> nodes:1
    """)
