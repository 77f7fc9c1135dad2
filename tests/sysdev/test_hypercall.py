"""Goal: the hypercalls of programs do and answer what Xen 4.17 does: versions, grant tables, lists; anything at all.
Method: tables of calls with the bytes of their arguments before and after, in a memory with holes and a read-only part.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysdev import hypercall
from sysdev.hypercall import MULTICALL_MOST
from tests.sysdev.hypercaller import AT, NOBODY, NOWHERE, READONLY, SIZE, U64, UUID, Caller, World, make_world
from xenmodel.public import event_channel as ec
from xenmodel.public import grant_table as gt
from xenmodel.public import version as ver
from xenmodel.public.errno import XEN_E2BIG, XEN_EFAULT, XEN_EINVAL, XEN_ENODATA, XEN_ENOSYS, XEN_EPERM, XEN_ESRCH
from xenmodel.public.xen import DOMID_SELF, MULTICALL_ENTRY, Hypercall
from xenmodel.types import Domid, Pfn


@pytest.fixture
def world() -> Iterator[World]:
    made = make_world()
    yield made
    made.hypervisor.close()


# --- xen_version ---------------------------------------------------------------------------------------------------------


def text(said: bytes, size: int) -> bytes:
    return said.ljust(size, b"\0")


VERSIONS = [  # command, what is at the address afterwards
    (ver.XENVER_extraversion, text(hypercall.EXTRAVERSION, 16)),
    (ver.XENVER_compile_info, text(b"Python", 64) + text(b"xenfs", 16) + bytes(64)),
    (ver.XENVER_capabilities, text(b"xen-3.0-x86_64 hvm-3.0-x86_64", 1024)),
    (ver.XENVER_changeset, text(b"unavailable", 64)),
    (ver.XENVER_platform_parameters, bytes([0, 0, 0, 0, 0, 0x80, 0xFF, 0xFF])),
    (ver.XENVER_guest_handle, UUID),
]


@pytest.mark.parametrize(("cmd", "expected"), VERSIONS)
def test_version_texts(world: World, cmd: int, expected: bytes):
    """Goal: what each XENVER_* writes, to the last byte and not one more.  Method: what is behind it stays."""
    assert world.a.call(Hypercall.xen_version, cmd, AT) == 0
    assert world.a.ram.read(AT, len(expected) + 1) == expected + b"\xee"
    for bad in (0, NOWHERE, READONLY, AT + SIZE - len(expected) + 1, U64):
        assert world.a.call(Hypercall.xen_version, cmd, bad) == -XEN_EFAULT


VERSION_RESULTS = [  # who, command, address, result
    ("a", ver.XENVER_version, 0, 4 << 16 | 17),
    ("a", ver.XENVER_version, NOWHERE, 4 << 16 | 17),
    ("a", ver.XENVER_version | 1 << 40, 0, 4 << 16 | 17),
    ("a", ver.XENVER_pagesize, 0, 4096),
    ("a", ver.XENVER_pagesize, AT, -XEN_EINVAL),
    ("a", ver.XENVER_build_id, 0, -XEN_EPERM),
    ("dom0", ver.XENVER_build_id, 0, -XEN_ENODATA),
    ("dom0", ver.XENVER_build_id, AT, -XEN_ENODATA),
    ("dom0", ver.XENVER_build_id, READONLY, -XEN_EINVAL),
    ("dom0", ver.XENVER_build_id, NOWHERE, -XEN_EFAULT),
    ("a", ver.XENVER_get_features, AT, -XEN_EINVAL),
    ("a", ver.XENVER_get_features, NOWHERE, -XEN_EFAULT),
    ("a", ver.XENVER_get_features, READONLY, -XEN_EFAULT),
    ("dom0", 11, AT, -XEN_ENOSYS),
    ("dom0", 2**32 - 1, AT, -XEN_ENOSYS),
]


@pytest.mark.parametrize(("who", "cmd", "address", "expected"), VERSION_RESULTS)
def test_version_results(world: World, who: str, cmd: int, address: int, expected: int):
    """Goal: results and errors of XENVER_*.  Method: a table; AT holds 0xee everywhere, READONLY zeroes."""
    assert getattr(world, who).call(Hypercall.xen_version, cmd, address) == expected


def test_features_and_command_line(world: World):
    """Goal: a guest and domain 0 are told apart: a feature bit, and a command line that is not a guest's business.
    Method: ask as both."""
    features = []
    for caller in (world.a, world.dom0):
        caller.ram.fill(ver.FEATURE_INFO.pack(0, 0))
        assert caller.call(Hypercall.xen_version, ver.XENVER_get_features, AT) == 0
        features.append(caller.out(ver.FEATURE_INFO)[1])
    assert features[0] >> ver.XENFEAT_auto_translated_physmap & 1
    assert features[1] == features[0] | 1 << ver.XENFEAT_dom0 != features[0]
    for caller, said in ((world.a, b"<denied>\0\xee"), (world.dom0, bytes(1024) + b"\xee")):
        caller.ram.fill(b"\xee" * 2048)
        assert caller.call(Hypercall.xen_version, ver.XENVER_commandline, AT) == 0
        assert caller.ram.read(AT, len(said)) == said


# --- grant_table_op --------------------------------------------------------------------------------------------------------


def test_query_size(world: World):
    """Goal: the size of a grant table, of one's own or by domain 0 of any; the error is in the structure.
    Method: a table with one frame; each kind of domid."""
    world.a.domain.grants.grant_access(Domid(0), Pfn(2))
    most = world.a.domain.grants.max_frames
    cases = [
        (world.a, DOMID_SELF, (1, most, gt.GNTST_okay)),
        (world.a, 1, (1, most, gt.GNTST_okay)),
        (world.dom0, 1, (1, most, gt.GNTST_okay)),
        (world.a, 2, (7, 7, gt.GNTST_permission_denied)),
        (world.a, NOBODY, (7, 7, gt.GNTST_bad_domain)),
    ]
    for caller, domid, expected in cases:
        assert caller.grant(gt.GNTTABOP_query_size, gt.QUERY_SIZE, domid, 7, 7, 7) == 0
        assert caller.out(gt.QUERY_SIZE) == (domid, *expected)


GRANT_RESULTS = [  # command, domid, count, address, result
    (gt.GNTTABOP_query_size, DOMID_SELF, 0, AT, -XEN_EINVAL),
    (gt.GNTTABOP_query_size, DOMID_SELF, 2, AT, -XEN_EINVAL),
    (gt.GNTTABOP_query_size, DOMID_SELF, 2**31, AT, -XEN_EINVAL),
    (gt.GNTTABOP_query_size, DOMID_SELF, 2**32 + 1, AT, 0),
    (gt.GNTTABOP_query_size, DOMID_SELF, 1, READONLY, -XEN_EFAULT),
    (gt.GNTTABOP_get_version, DOMID_SELF, 1, AT, 0),
    (gt.GNTTABOP_get_version, DOMID_SELF, 5, AT, 0),
    (gt.GNTTABOP_get_version, DOMID_SELF, 2**31, AT, -XEN_EINVAL),
    (gt.GNTTABOP_get_version, DOMID_SELF, 1, READONLY, -XEN_EFAULT),
    (gt.GNTTABOP_get_version, 2, 1, AT, -XEN_EPERM),
    (gt.GNTTABOP_get_version, NOBODY, 1, AT, -XEN_ESRCH),
    (gt.GNTTABOP_get_version | 0x1000, DOMID_SELF, 1, AT, -XEN_EINVAL),
    *[(cmd, DOMID_SELF, 1, AT, -XEN_ENOSYS) for cmd in (0, 1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 4095)],
]


@pytest.mark.parametrize(("cmd", "domid", "count", "address", "expected"), GRANT_RESULTS)
def test_grant_results(world: World, cmd: int, domid: int, count: int, address: int, expected: int):
    """Goal: results of grant_table_op.  Method: a table; a version that is told is 1."""
    layout, others = (gt.QUERY_SIZE, (0, 0, 0)) if cmd == gt.GNTTABOP_query_size else (gt.GET_VERSION, (0, 0))
    assert world.a.grant(cmd, layout, domid, *others, count=count, at=address) == expected
    if cmd == gt.GNTTABOP_get_version and expected == 0:
        assert world.a.out(gt.GET_VERSION) == (DOMID_SELF, 0, 1)


# --- multicall -------------------------------------------------------------------------------------------------------------


def entries(*calls: tuple[int, ...]) -> bytes:
    return b"".join(MULTICALL_ENTRY.pack(op, 0x55, *(*args, 0, 0, 0, 0, 0, 0)[:6]) for op, *args in calls)


def results(caller: Caller, count: int) -> list[int]:
    """Signed, as libxc reads them."""
    return [Struct("<q").unpack(caller.ram.read(AT + 64 * i + 8, 8))[0] for i in range(count)]


def test_multicall(world: World):
    """Goal: each entry has its own result and only that is written; an error of one does not stop the next.
    Method: a list as libxc makes it for memory_op, with others; the arguments of one are behind the list."""
    a, behind = world.a, AT + 0x1000
    a.ram.fill(ec.BIND_IPI.pack(0, 0), behind)
    calls = entries(
        (Hypercall.xen_version, ver.XENVER_version),
        (Hypercall.memory_op, 2, 0),
        (Hypercall.event_channel_op, ec.EVTCHNOP_bind_ipi, behind),
        (Hypercall.event_channel_op, ec.EVTCHNOP_close, 0),
        (Hypercall.multicall, AT, 1),
        (2**63, 0),
        (Hypercall.xen_version, ver.XENVER_pagesize),
    )
    a.ram.fill(calls)
    assert a.call(Hypercall.multicall, AT, 7) == 0
    expected = [hypercall.VERSION, -XEN_ENOSYS, 0, -XEN_EFAULT, -XEN_EINVAL, -XEN_ENOSYS, 4096]
    assert results(a, 7) == expected
    assert list(a.domain.events.channels) == [1]
    kept = a.ram.read(AT, len(calls))
    for i, result in enumerate(expected):
        calls = calls[: 64 * i + 8] + Struct("<q").pack(result) + calls[64 * i + 16 :]
    assert kept == calls, "nothing but the results"


def test_multicall_limits(world: World):
    """Goal: a list that is too long, or not all there, is refused or ends where it ends.
    Method: no entry; the most and one more; a list over the end of the memory; one that cannot be written."""
    a = world.a
    version = entries((Hypercall.xen_version, ver.XENVER_version))
    assert a.call(Hypercall.multicall, 0, 0) == 0
    a.ram.fill(version * (MULTICALL_MOST + 1))
    assert a.call(Hypercall.multicall, AT, MULTICALL_MOST + 1) == -XEN_E2BIG
    assert a.call(Hypercall.multicall, AT, 2**32 - 1) == -XEN_E2BIG
    assert results(a, MULTICALL_MOST) == [0x55] * MULTICALL_MOST
    assert a.call(Hypercall.multicall, AT, MULTICALL_MOST | 1 << 32) == 0
    assert results(a, MULTICALL_MOST + 1) == [hypercall.VERSION] * MULTICALL_MOST + [0x55]
    end = AT + SIZE - 2 * 64
    a.ram.fill(entries((Hypercall.event_channel_op, ec.EVTCHNOP_bind_ipi, AT)) * 2, end)
    a.ram.fill(ec.BIND_IPI.pack(0, 0))
    assert a.call(Hypercall.multicall, end, 3) == -XEN_EFAULT
    assert len(a.domain.events.channels) == 2
    a.ram.fill(version, READONLY)
    assert a.call(Hypercall.multicall, READONLY, 1) == -XEN_EFAULT
    assert a.call(Hypercall.multicall, U64 - 63, 2) == -XEN_EFAULT


# --- anything --------------------------------------------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(0, 40), st.sampled_from([AT, AT + 64, READONLY, NOWHERE, DOMID_SELF, U64, 2**31, 2**32]), st.integers(0, U64)
)
CALLS = st.tuples(st.sampled_from([*Hypercall, 0, 34, 36, 2**32 - 1]), numbers, numbers, numbers, numbers, numbers)


@given(st.lists(st.tuples(st.binary(max_size=400), CALLS, st.sampled_from(["dom0", "a", "b"])), min_size=1, max_size=8))
def test_garbage(calls: list[tuple[bytes, tuple[int, ...], str]]):
    """Goal: whatever is asked, there is a result, in bounded work, and the ports still fit together.
    Method: random calls, also as random bytes in a multicall; each interdomain port's peer says the same of it."""
    world = make_world()
    for memory, (op, *args), who in calls:
        caller: Caller = getattr(world, who)
        caller.ram.fill(memory)
        caller.ram.fill(memory, READONLY)
        before = caller.ram.transfers
        result = caller.call(op, *args)
        assert -4095 <= result < 2**31
        assert caller.ram.transfers - before <= 4 * MULTICALL_MOST
        world.hypervisor.settle()
    for one in world[1:]:
        events = one.domain.events
        for port, channel in events.channels.items():
            if channel.peer is not None:
                there = channel.peer.channels[channel.remote_port]
                assert (there.peer, there.remote_port, channel.peer.domid) == (events, port, channel.remote_domid)


def test_unknown_hypercalls(world: World):
    """Goal: ENOSYS for all hypercalls that are not here, memory_op, sysctl and domctl among them.  Method: all numbers."""
    known = {Hypercall.multicall, Hypercall.xen_version, Hypercall.grant_table_op, Hypercall.event_channel_op}
    for op in {*range(64), 2**32, U64} - known:
        assert world.dom0.call(op, AT, AT, AT) == -XEN_ENOSYS
    assert world.dom0.ram.transfers == 0
