"""Goal: network namespaces are made, claimed and removed as ip-netns(8) does it; what a killed run has left is taken by one
of those that want it; what is somebody else's stays.
Method: real ones, looked at, replaced and marked with ip(8); processes that claim, are killed, or all come at once."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from netdev import netlink
from netdev.netlink import Netlink
from netdev.tap import OWN_NETNS
from tests.host.test_netlink import ENVIRON, PREFIX, Space, refused, run, state

pytestmark = pytest.mark.host


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = state()
    yield
    assert state() == before


@pytest.fixture
def space() -> Iterator[Space]:
    with Space("spaces") as made:
        yield made


@pytest.fixture
def name() -> Iterator[str]:
    """Of a namespace that the test makes."""
    yield PREFIX + "claim"
    netlink.remove_namespace(PREFIX + "claim")


def test_namespace(name):
    """Goal: as `ip netns add`, with lo up; there is one of each; removed twice is no error; the caller stays where it is.
    Method: ip(8); nothing_left."""
    netlink.create_namespace(name)
    assert name in netlink.namespaces()
    assert name in run("ip", "netns", "list").split()
    assert run("ip", "netns", "exec", name, "readlink", "/proc/self/ns/net").strip() != os.readlink(OWN_NETNS)
    (lo,) = json.loads(run("ip", "-n", name, "-j", "link"))
    assert {"UP", "LOOPBACK"} <= set(lo["flags"])
    with refused(f"create network namespace '{name}'", "it exists"):
        netlink.create_namespace(name)
    host = Netlink(name)
    assert host.link("lo").up
    netlink.remove_namespace(name)
    netlink.remove_namespace(name)
    assert name not in netlink.namespaces()
    with refused(f"cannot make bridge 'xenbr0': no network namespace '{name}'; `ip netns add` makes one"):
        host.add_bridge("xenbr0")
    Path("/run/netns", name).touch()  # as a killed run may leave it
    with refused(f"cannot enter network namespace '{name}': it is none, but a file"):
        netlink.claim_namespace(name)
    netlink.remove_namespace(name)
    assert name not in netlink.namespaces()


def test_release(name, space):
    """Goal: only what is ours is released: of a name that somebody else has now, neither bridge nor namespace goes; what is
    gone already is no error.  Method: ip(8) makes them anew; marks of others."""
    host = Netlink(space.name)
    for mark in ("", "made by xenfs, process 4194305 started 1", "made by xenfs, process 1 started 1"):
        netlink.create_namespace(name)
        host.add_bridge("xenbr0")
        run("ip", "netns", "delete", name)
        space.ip("link", "delete", "xenbr0")
        netlink.release_namespace(name)
        host.release_bridge("xenbr0")
        run("ip", "netns", "add", name)
        space.ip("link", "add", "xenbr0", "type", "bridge")
        if mark:
            run("ip", "-n", name, "link", "set", "lo", "alias", mark)
            space.ip("link", "set", "xenbr0", "alias", mark)
        inode, index = os.stat(f"/run/netns/{name}").st_ino, space.show("xenbr0")["ifindex"]
        with refused(f"cannot remove network namespace '{name}'", "it is not ours any more"):
            netlink.release_namespace(name)
        with refused("cannot remove bridge 'xenbr0'", space.name, "it is not ours any more"):
            host.release_bridge("xenbr0")
        assert (os.stat(f"/run/netns/{name}").st_ino, space.show("xenbr0")["ifindex"]) == (inode, index)
        run("ip", "netns", "delete", name)
        space.ip("link", "delete", "xenbr0")
    netlink.create_namespace(name)
    netlink.release_namespace(name)
    netlink.release_namespace(name)
    assert name not in netlink.namespaces()


@pytest.mark.parametrize("bad", ["", ".", "..", "a/b", "../a", "a\0b"])
def test_names_of_namespaces(bad):
    """Goal: nothing outside /run/netns is ever made, entered or removed.  Method: such names, in every function."""
    for call in (Netlink, netlink.create_namespace, netlink.remove_namespace, netlink.claim_namespace):
        with refused(f"{bad!r} is not a name of a network namespace"):
            call(bad)


CLAIM = "import sys\nfrom netdev.netlink import *\nclaim_namespace(sys.argv[1])\nprint(1, flush=True)\ninput()"


def test_claim(name, space):
    """Goal: a namespace is claimed if there is none, or one whose maker is dead; not if its maker lives, be it another or
    we, nor if a guest's interface is in it, nor if it is not xenfs's.  Method: a child that claims first and is killed."""
    # not by `ip netns exec`, for what is mounted in there is not seen outside
    line = [sys.executable, "-c", CLAIM, name]
    with Popen(line, stdin=PIPE, stdout=PIPE, env=ENVIRON) as child:
        try:
            assert child.stdout.readline() == b"1\n"
            with refused(f"'{name}'", f"an xenfs that is running, process {child.pid};"):
                netlink.claim_namespace(name)
        finally:
            child.kill()
    run("ip", "-n", name, "tuntap", "add", "dev", "xn7", "mode", "tap")
    with refused(f"'{name}'", "in use: xn7 is in it"):
        netlink.claim_namespace(name)
    run("ip", "-n", name, "link", "set", "xn7", "name", "eth0")
    netlink.claim_namespace(name)
    assert [row["ifname"] for row in json.loads(run("ip", "-n", name, "-j", "link"))] == ["lo"]
    with refused(f"an xenfs that is running, process {os.getpid()};"):
        netlink.claim_namespace(name)
    with refused(f"'{space.name}'", "xenfs has not made it"):
        netlink.claim_namespace(space.name)
    assert space.names() == {"lo"}


RACE = """if True:
    import sys
    from netdev.netlink import *
    print("ready", flush=True)
    while sys.stdin.readline():
        try:
            claim_namespace(sys.argv[1])
            print("mine", flush=True)
        except NetlinkError as error:
            print(error, flush=True)
"""


def test_claimed_by_many_at_once(name):
    """Goal: of several that claim what a dead one has left, exactly one gets it, the others are told who did, and what the
    winner has is not taken away again.  Method: processes that are let go at once, many times; its mark afterwards."""
    line = [sys.executable, "-c", RACE, name]
    with contextlib.ExitStack() as stack:
        racers = [stack.enter_context(Popen(line, text=True, stdin=PIPE, stdout=PIPE, env=ENVIRON)) for _ in range(4)]
        assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 4
        for _ in range(15):
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "alias", "made by xenfs, process 4194305 started 1")
            for racer in racers:
                racer.stdin.write("\n")
                racer.stdin.flush()
            said = [racer.stdout.readline() for racer in racers]
            (winner,) = [racer.pid for racer, words in zip(racers, said, strict=True) if words == "mine\n"]
            reason = f"'{name}': it exists; it belongs to an xenfs that is running, process {winner};"
            assert len([words for words in said if reason in words]) == 3, said
            assert f"process {winner} " in Netlink(name).link("lo").alias
            run("ip", "netns", "delete", name)
        for racer in racers:
            racer.stdin.close()  # it ends
