"""Goal: xenstored's view of domains: INTRODUCE to RELEASE, features and targets, and nothing kept of who is gone.
Method: scripts as in test_wire_requests.py (domain.c of the daemon says what is expected), and lives of real domains whose
grants, mappings and event channels are counted."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from tests.xenmodel.xenstore.wireworld import STORE_GREF, Guest, World, run
from xenmodel.event_channel import State
from xenmodel.public.io.xs_wire import XENSTORE_SERVER_FEATURE_RECONNECTION, XsType
from xenmodel.types import Domid, Pfn
from xenmodel.xenstore.domain import FEATURES
from xenmodel.xenstore.upkeep import problems
from xenmodel.xenstore.wire import join

SCRIPTS = {
    "INTRODUCE": """
        0 WATCH @introduceDomain|t|
        0 events -> @introduceDomain:t
        0 INTRODUCE -> EINVAL
        0 INTRODUCE 3|1| -> EINVAL
        0 INTRODUCE 3|1|1 -> EINVAL
        0 INTRODUCE 3|1|0| -> EINVAL
        0 INTRODUCE 3|1|port| -> EINVAL
        0 INTRODUCE 3|1|1| -> EINVAL
        0 INTRODUCE 32752|1|1| -> EINVAL
        0 INTRODUCE 65535|1|1| -> EINVAL
        0 INTRODUCE -1|1|1| -> EINVAL
        create 3
        0 INTRODUCE 3|1|99| -> EINVAL
        0 INTRODUCE 3|1|999999999| -> EINVAL
        0 IS_DOMAIN_INTRODUCED 3| -> F|
        0 events -> none
        0 INTRODUCE 3|-1|1|more|
        0 IS_DOMAIN_INTRODUCED 3| -> T|
        0 events -> @introduceDomain:t
        3 GET_DOMAIN_PATH 3| -> /local/domain/3|
        0 INTRODUCE 3|1|1|
        0 events -> none
        3 GET_DOMAIN_PATH 3| -> /local/domain/3|
    """,
    "RELEASE": """
        0 WATCH @releaseDomain|t|
        0 events -> @releaseDomain:t
        0 RELEASE -> EINVAL
        0 RELEASE 1 -> EINVAL
        0 RELEASE 1|2| -> EINVAL
        0 RELEASE 0| -> EINVAL
        0 RELEASE | -> EINVAL
        0 RELEASE nobody| -> EINVAL
        0 RELEASE 9| -> ENOENT
        create 3
        0 RELEASE 3| -> ENOENT
        1 WRITE data/x|1
        0 events -> none
        0 RELEASE 1|
        0 events -> @releaseDomain:t
        0 RELEASE 1| -> ENOENT
        0 READ /local/domain/1/data/x| -> ENOENT
        0 READ /local/domain/1| -> ""
        0 GET_PERMS /local/domain/1| -> n0|
        0 IS_DOMAIN_INTRODUCED 1| -> F|
        2 READ data| -> ""
        0 INTRODUCE 1|1|1|
        1 READ data| -> EACCES
        destroy 1
        0 events -> @releaseDomain:t
        destroy 3
        0 events -> none
    """,
    "RESUME": """
        0 WATCH @releaseDomain|t|
        0 events -> @releaseDomain:t
        0 RESUME -> EINVAL
        0 RESUME 1 -> EINVAL
        0 RESUME 1|1| -> EINVAL
        0 RESUME 0| -> EINVAL
        0 RESUME 9| -> ENOENT
        0 RESUME 1|
        0 events -> none
        shutdown 1
        0 events -> @releaseDomain:t
        shutdown 1
        0 events -> none
        0 IS_DOMAIN_INTRODUCED 1| -> T|
        0 RESUME 1|
        0 events -> none
        shutdown 1
        0 events -> @releaseDomain:t
        destroy 1
        0 events -> @releaseDomain:t
    """,
    "SET_TARGET": """
        0 SET_TARGET -> EINVAL
        0 SET_TARGET 2| -> EINVAL
        0 SET_TARGET 2|1 -> EINVAL
        0 SET_TARGET 9|1| -> ENOENT
        0 SET_TARGET 1|9| -> ENOENT
        create 3
        0 SET_TARGET 1|3| -> ENOENT
        0 SET_TARGET 3|1| -> ENOENT
        2 READ /local/domain/1/data| -> EACCES
        2 READ /local/domain/1| -> EACCES
        0 SET_TARGET 2|1|
        2 WRITE /local/domain/1/data/x|1
        2 READ /local/domain/1| -> ""
        2 WRITE /local/domain/1/y|1 -> EACCES
        1 READ /local/domain/2/data| -> EACCES
        0 GET_PERMS /local/domain/1/data/x| -> n2|
        0 SET_TARGET 2|2|more|
        2 READ /local/domain/1| -> EACCES
    """,
    "a target that died is nobody's": """
        0 SET_TARGET 2|1|
        2 READ /local/domain/1/data| -> ""
        destroy 1
        create 1
        0 INTRODUCE 1|1|1|
        0 MKDIR /local/domain/1/data|
        0 SET_PERMS /local/domain/1/data|n1|
        2 READ /local/domain/1/data| -> EACCES
    """,
    "GET_FEATURE": """
        0 GET_FEATURE -> 15|
        1 GET_FEATURE -> 15|
        1 GET_FEATURE without a NUL -> 15|
        0 GET_FEATURE 1| -> 15|
        0 GET_FEATURE 0| -> 15|
        0 GET_FEATURE 9| -> ENOENT
        0 GET_FEATURE 1|2| -> EINVAL
        1 GET_FEATURE 1| -> EACCES
        1 GET_FEATURE 1|2| -> EACCES
    """,
    "SET_FEATURE": """
        create 3
        0 SET_FEATURE -> EINVAL
        0 SET_FEATURE 3| -> EINVAL
        0 SET_FEATURE 3|1 -> EINVAL
        0 SET_FEATURE 3|1|1| -> EINVAL
        0 SET_FEATURE 9|1| -> ENOENT
        0 SET_FEATURE 1|1| -> EBUSY
        0 SET_FEATURE 1|255| -> EBUSY
        0 SET_FEATURE 0|1| -> EBUSY
        0 SET_FEATURE 3|16| -> EINVAL
        0 SET_FEATURE 3|-1| -> EINVAL
        0 GET_FEATURE 3| -> 15|
        0 SET_FEATURE 3|2|
        0 GET_FEATURE 3| -> 2|
        0 INTRODUCE 3|1|1|
        0 SET_FEATURE 3|15| -> EBUSY
        3 GET_FEATURE -> 2|
        3 WATCH x|t|0| -> EINVAL
        3 WATCH x|t|
        0 GET_FEATURE 2| -> 15|
        destroy 3
        create 3
        0 GET_FEATURE 3| -> 15|
    """,
    "depth only where it was offered": """
        create 3
        0 SET_FEATURE 3|11|
        0 INTRODUCE 3|1|1|
        3 WATCH x|t|0| -> EINVAL
        3 WATCH x|t|
        3b WATCH x|t|0| -> EINVAL
        1 WATCH x|t|0|
    """,
    "special nodes, with the domain for who wants to know": """
        0 WATCH @introduceDomain|plain|
        0 WATCH @introduceDomain|deep|1|
        0 events -> @introduceDomain:plain @introduceDomain:deep
        0 WATCH @releaseDomain|plain|
        0 WATCH @releaseDomain|deep|1|
        0 WATCH @releaseDomain/3|three|
        0 WATCH @releaseDomain/4|four|
        0 events -> @releaseDomain:plain @releaseDomain:deep @releaseDomain/3:three @releaseDomain/4:four
        1 WATCH @releaseDomain|not mine|
        1 events -> @releaseDomain:not mine
        0 SET_PERMS @releaseDomain|n0|r2|
        0 events -> @releaseDomain:plain @releaseDomain:deep
        2 WATCH @releaseDomain|mine|
        2 events -> @releaseDomain:mine
        create 3
        0 INTRODUCE 3|1|1|
        0 events -> @introduceDomain:plain @introduceDomain/3:deep
        shutdown 3
        0 events -> @releaseDomain:plain @releaseDomain/3:deep @releaseDomain/3:three
        1 events -> none
        2 events -> @releaseDomain:mine
    """,
    "a domain's number is not the domain": """
        1 WRITE data/secret|1
        1 SET_PERMS data/secret|n1|r2|
        0 SET_PERMS /local/domain/2|n0|r2|r1|
        1 WATCH data|t|
        1 TRANSACTION_START | -> $t
        destroy 1
        create 1
        0 INTRODUCE 1|1|1|
        1.$t READ data| -> ENOENT
        1 UNWATCH data|t| -> ENOENT
        1 READ /local/domain/2| -> EACCES
        0 DIRECTORY /local/domain/1| -> ""
        1 READ data/secret| -> EACCES
    """,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_domains(name: str) -> None:
    run(SCRIPTS[name])


def held(world: World) -> tuple[int, int, int]:
    """What domain 0 has of others: mappings, ports; and records that are kept."""
    return len(world.dom0.maptrack.mappings), len(world.dom0.events.channels), len(world.daemon.domains.all())


def die(world: World, guest: Guest) -> None:
    world.hypervisor.destroy_domain(guest.domain.domid)


def released(world: World, guest: Guest) -> None:
    assert world.ask("0", XsType.RELEASE, join(str(guest.domain.domid))).body == b"OK\0"
    assert guest.domain.grants.end_access(STORE_GREF), "the page is the guest's again"
    assert guest.domain.events.channels[guest.port].state is State.UNBOUND
    world.hypervisor.destroy_domain(guest.domain.domid)


def shut_down(world: World, guest: Guest) -> None:
    world.hypervisor.shutdown_domain(guest.domain.domid)
    world.hypervisor.destroy_domain(guest.domain.domid)


@pytest.mark.parametrize("end", [die, released, shut_down])
@pytest.mark.parametrize("state", ["idle", "full ring", "corrupt", "in the middle", "closed its port", "not introduced"])
def test_nothing_is_kept_of_who_is_gone(state: str, end: Callable[[World, Guest], None]) -> None:
    """Goal: page, channel, record, watches, transactions and nodes of a domain end with it.
    Method: 20 lives of one domid that end in each state; count what domain 0 holds, and that the others are served."""
    world = World()
    before, waiting, nodes = held(world), len(world.daemon._stalled), len(world.store.tree.nodes)
    for _ in range(20):
        guest = world.create(3, introduce=state != "not introduced")
        if state != "not introduced":
            world.run("""
                3 WATCH @releaseDomain|t|
                3 WATCH x|t|
                3 TRANSACTION_START | -> $t
                0 MKDIR /local/domain/3|
                0 SET_PERMS /local/domain/3|n3|
                3 WRITE x/y|1
            """)
        if state == "full ring":
            world.wait(1)  # the writes under a transaction have cost credit
            guest.read_on(False)
            for _ in range(100):
                guest.post(XsType.READ, bytes(400))
            world.settle()
            assert guest["rsp_prod"] - guest["rsp_cons"] == 1024 and guest.waiting
        elif state == "corrupt":
            guest["req_prod"] = guest["req_cons"] + 2000
            guest.kick()
            world.settle()
            assert guest["error"]
        elif state == "in the middle":
            guest.send(b"\x02\0\0\0")
            world.ask("0", XsType.WRITE, join("/local/domain/3/x"))
        elif state == "closed its port":
            guest.domain.events.close(guest.port)
        if end is released and state in ("not introduced", "closed its port"):
            die(world, guest)
        else:
            end(world, guest)
        world.settle()
        assert held(world) == before and len(world.daemon._stalled) == waiting
        world.ask("0", XsType.RM, join("/local/domain/3"))
        assert len(world.store.tree.nodes) == nodes and world.store.open_transactions == 0
    assert problems(world.store) == []
    world.run("2 WRITE data/x|1\n1 READ data| -> \"\"")


def no_grant(guest: Guest) -> None:
    guest.domain.grants.end_access(STORE_GREF)


def for_another(guest: Guest) -> None:
    guest.domain.grants.set_entry(STORE_GREF, Domid(2), Pfn(1))


def read_only(guest: Guest) -> None:
    guest.domain.grants.set_entry(STORE_GREF, Domid(0), Pfn(1), readonly=True)


def no_such_page(guest: Guest) -> None:
    guest.domain.grants.set_entry(STORE_GREF, Domid(0), Pfn(1 << 30))


def port_for_another(guest: Guest) -> None:
    guest.domain.events.close(guest.port)
    assert guest.domain.events.alloc_unbound(Domid(2)) == guest.port


@pytest.mark.parametrize("spoil", [no_grant, for_another, read_only, no_such_page, port_for_another])
def test_a_guest_that_cannot_be_introduced(spoil: Callable[[Guest], None]) -> None:
    """Goal: EINVAL, and nothing half done.  Method: spoil the grant or the port; nobody is told, nothing is held."""
    world = World().run("0 WATCH @introduceDomain|t|\n0 events -> @introduceDomain:t")
    guest = world.create(3, introduce=False)
    before = held(world)
    spoil(guest)
    for _ in range(3):
        world.run("0 INTRODUCE 3|1|1| -> EINVAL\n0 IS_DOMAIN_INTRODUCED 3| -> F|\n0 events -> none")
    assert held(world) == before and not guest.notified and not guest.domain.grants.active


def test_introduce_again_brings_a_new_channel() -> None:
    """Goal: what xl does after a restore: a new port, an empty ring and connection.  Method: the old port is free, requests
    and events go through the new one; a port that cannot be bound leaves a mute ring, as in the daemon, until the next."""
    world = World()
    guest, before = world.guest("1"), held(world)
    world.run("1 WATCH data|t|\n1 events -> data:t\n1 TRANSACTION_START | -> $t")
    guest.start_at(5000)
    guest.send(b"half a header")
    old, guest.port = guest.port, guest.domain.events.alloc_unbound(Domid(0), guest._event)
    assert guest.port != old
    guest.forget()
    world.run(f"0 INTRODUCE 1|1|{guest.port}|")
    assert guest.domain.events.channels[old].state is State.UNBOUND
    assert [guest[name] for name in ("req_cons", "req_prod", "rsp_cons", "rsp_prod")] == [0] * 4
    world.run("""
        1.$t READ data| -> ENOENT
        1 UNWATCH data|t| -> ENOENT
        1 WATCH data|t|
        1 WRITE data/x|1
        1 events -> data:t data/x:t
    """)
    assert held(world) == before
    world.run("0 INTRODUCE 1|1|99|")
    assert held(world)[1] == before[1] - 1
    guest.post(XsType.READ, join("data"))
    world.settle()
    assert guest["req_prod"] != guest["req_cons"], "nobody listens"
    guest.forget()
    world.run(f"0 INTRODUCE 1|1|{guest.port}|\n1 READ data| -> \"\"")
    assert held(world) == before


def test_what_a_page_says() -> None:
    """Goal: features are those of SET_FEATURE; the rest of a new page is 0.  Method: a dirty page before INTRODUCE."""
    world = World()
    guest = world.create(3, introduce=False)
    guest.page[2048:2076] = b"\xff" * 28
    guest.page[2076:2080] = b"mine"
    without = FEATURES & ~XENSTORE_SERVER_FEATURE_RECONNECTION
    world.run(f"0 SET_FEATURE 3|{without}|\n0 INTRODUCE 3|1|1|")
    assert guest.words[2048 // 4 : 2076 // 4].tolist() == [0, 0, 0, 0, without, 0, 0]
    assert bytes(guest.page[2076:2080]) == b"mine" and guest.notified
    assert world.guest("1")["server_features"] == FEATURES


def test_nothing_is_written_into_a_page_that_was_given_back() -> None:
    """Goal: after RELEASE the page is the guest's.  Method: an event, replies or the ring's end are on their way just then;
    the guest has put something else into the page, which would be indices, or wrong ones."""
    for spoil, content in itertools.product((False, True), (bytes(4096), b"\xff" * 4096, bytes(range(256)) * 16)):
        world = World()
        guest = world.guest("1")
        world.run("1 WATCH data|t|\n1 events -> data:t")
        guest.read_on(False)
        for _ in range(100):
            guest.post(XsType.READ, b"")
        world.settle()
        if spoil:
            guest["req_prod"] = guest["req_cons"] - 1
            guest.kick()
            world.settle()
        world.store.connect(Domid(0)).write("/local/domain/1/data", b"2")
        world.store.notify(world.daemon.rings[Domid(1)].ring.peer.connection)
        world.hypervisor.deliver(turns=1)
        assert spoil or not world.hypervisor.idle, "something is to be done after the turn"
        world.daemon.release(Domid(1))
        guest.page[:] = content
        world.settle()
        assert bytes(guest.page) == content


@pytest.mark.parametrize("first", [0, 1])
def test_the_end_of_everything(first: int) -> None:
    """Goal: hypervisors end in any order of domains.  Method: domain 0 or a guest goes first, with work on its way."""
    world = World()
    world.guest("1").post(XsType.WATCH, join("data", "t"))
    world.stream("0").post(XsType.WRITE, join("/local/domain/1/data"))
    world.hypervisor.destroy_domain(first)
    world.settle()
    world.guest("2").post(XsType.READ, join("data"))
    world.hypervisor.close()
    assert world.hypervisor.idle and world.daemon.rings == {}
