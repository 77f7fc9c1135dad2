"""Goal: a guest receives the multicast frames it asked for and no others, and loses neither unicast nor broadcast.
Method: a table of addresses; hypothesis compares a long run of requests with a plain list, as xen-netback keeps one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netdev.multicast import XEN_NETBK_MCAST_MAX, MulticastFilter

MDNS, ALL_NODES = bytes.fromhex("01005e0000fb"), bytes.fromhex("333300000001")


@pytest.mark.parametrize(
    ("destination", "before", "after"),
    [
        (MDNS, False, True),
        (memoryview(bytearray(MDNS)), False, True),
        (ALL_NODES, False, False),
        (bytes.fromhex("01005e0000fc"), False, False),
        (b"\xff" * 6, True, True),
        (bytes.fromhex("00163e000001"), True, True),
        (bytes.fromhex("fe163e000001"), True, True),
        (b"\xff" * 5, True, True),
        (b"", True, True),
    ],
)
def test_what_passes(destination: bytes | memoryview, before: bool, after: bool) -> None:
    """Goal: with MDNS added or not; and everything passes while the filter is not asked for, but the list is remembered."""
    wanted = MulticastFilter(enabled=True)
    assert wanted.wants(destination) is before
    assert wanted.add(MDNS)
    assert wanted.wants(destination) is after
    wanted.enabled = False
    assert wanted.wants(destination)
    wanted.enabled = True
    assert wanted.wants(destination) is after
    wanted.clear()
    assert wanted.wants(destination) is before


def test_a_full_list() -> None:
    """Goal: the 65th address is refused, and so is one that is there already; a deletion makes room for one."""
    full = MulticastFilter(enabled=True)
    addresses = [b"\x01\0\x5e\0\0" + bytes([i]) for i in range(XEN_NETBK_MCAST_MAX + 1)]
    assert [full.add(address) for address in addresses] == [True] * XEN_NETBK_MCAST_MAX + [False]
    assert not full.wants(addresses[-1])
    assert not full.add(addresses[0]) and full.wants(addresses[0])
    full.delete(addresses[0])
    assert full.add(addresses[-1]) and full.wants(addresses[-1]) and not full.wants(addresses[0])
    full.clear()
    assert full.add(addresses[0])


few = st.sampled_from([b"\x01\0\x5e\0\0" + bytes([i]) for i in range(4)])


@given(st.lists(st.tuples(st.sampled_from(["add", "add", "delete"]), few), max_size=200))
def test_as_a_list_would(requests: list[tuple[str, bytes]]) -> None:
    """Goal: additions count, deletions undo one each, the bound holds."""
    tested, model = MulticastFilter(enabled=True), list[bytes]()
    for what, address in requests:
        if what == "add":
            room = len(model) < XEN_NETBK_MCAST_MAX
            assert tested.add(address) is room
            model += [address] * room
        else:
            tested.delete(address)
            if address in model:
                model.remove(address)
        assert tested.count == len(model) <= XEN_NETBK_MCAST_MAX
        assert tested.wants(address) is (address in model)
