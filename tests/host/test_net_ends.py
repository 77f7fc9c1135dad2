"""Goal: the end of a server takes away all that is its own, whatever stands in the way of a part of it, and nothing of
anybody else's; and of two servers that want what a killed one has left, one gets it.
Method: the real command; its namespaces and bridge replaced by ip(8) or mounted upon while it runs; two started at once."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.host.net import HOST4, Net, address4
from tests.host.served import Host

pytestmark = pytest.mark.host

TOGETHER = 5  # tries


@pytest.fixture
def net(host: Host) -> Iterator[Net]:
    with Net(host) as made:
        yield made


def told(what: str, name: str) -> str:
    """What is said of something that is not ours any more."""
    reason = "it is not ours any more: somebody has made another one of that name"
    return f"xenfs.network: ERROR: cannot remove {what} {name!r}: {reason}"


@pytest.mark.parametrize(("letter", "layers"), [("a", 1), ("a", 2), ("b", 2), ("c", 2)])
def test_a_namespace_that_cannot_be_removed(net, letter, layers):
    """Goal: it costs nobody else anything: the other guests' namespaces, the bridge and the domains go, and one line says
    what stays and why; another try at the end may do.
    Method: the namespace of the first, second or last guest is mounted upon itself, once more than a try takes away or as
    often, by somebody in the server's mount namespace, which nobody else sees."""
    configs = [net.config(each) for each in "abc"]
    server = net.serve(*configs, prefix=["unshare", "--mount"]).wait_ready()
    stuck = f"/run/netns/{net.namespace(letter)}"
    for how in ["--make-private", *["--bind"] * layers]:  # private: or the mounts would be copied onto each other
        where = [stuck, stuck] if how == "--bind" else [stuck]
        net.host.check("nsenter", "-t", server.process.pid, "--mount", "mount", how, *where)
    server.process.terminate()
    assert server.wait() == (0 if layers == 1 else 1), server.stderr()
    if layers == 1:
        assert (server.stderr(), net.left()) == ("", [])
        return
    line, last = server.stderr().splitlines()
    assert last == "xenfs: not all of it could be taken away from the host's network"
    assert line.startswith(f"xenfs.network: ERROR: cannot remove network namespace {net.namespace(letter)!r}: "), line
    assert f"something else is mounted on {stuck}, `umount` it" in line, line
    assert net.left() == [net.namespace(letter)]


def test_what_somebody_else_made_stays(net):
    """Goal: what has the name of ours, but was made by somebody else since, is there after the end, and the log says why;
    what is ours goes.  Method: the bridge, and one of two guests' namespaces, deleted and made anew by ip(8)."""
    server = net.guests("ab")
    guest = net.namespace("a")
    net.ip("host", "link", "delete", "xenbr0")
    net.ip("host", "link", "add", "xenbr0", "type", "bridge")
    for what in ("delete", "add"):
        net.host.check("ip", "netns", what, guest)
    bridge, inode = net.link("host", "xenbr0")["ifindex"], os.stat(f"/run/netns/{guest}").st_ino
    server.process.terminate()
    assert server.wait() == 0, server.stderr()
    assert sorted(server.stderr().splitlines()) == [told("bridge", "xenbr0"), told("network namespace", guest)]
    assert net.left() == [guest, "xenbr0"]
    assert (net.link("host", "xenbr0")["ifindex"], os.stat(f"/run/netns/{guest}").st_ino) == (bridge, inode)


def test_two_after_a_killed_one(net):
    """Goal: of two that start together, one takes over the namespace that a killed one has left; the other is told who has
    it, and harms nothing.  Method: both at once, in spaces of their own; the winner's guest answers; several times."""
    net.space("other")
    config = net.config("a")
    guest = net.namespace("a")
    last = net.up(config)
    for number in range(TOGETHER):
        last.close()
        assert guest in net.left()
        places = {place: net.serve(config, place=place, mnt=f"{place}{number}") for place in ("host", "other")}
        ended = {place: server for place, server in places.items() if server.line() is None}
        ((place, loser),) = ended.items()
        assert loser.wait() == 1
        (said,) = loser.stderr().splitlines()
        last = places["other" if place == "host" else "host"].wait_ready()
        running = f"it exists; it belongs to an xenfs that is running, process {last.process.pid}; choose another name"
        assert said == f"xenfs: cannot claim network namespace {guest!r}: {running}"
        net.ping("a", HOST4)
        net.ping("other" if place == "host" else "host", address4("a"))
        assert last.process.poll() is None and last.stderr() == ""
    last.stop()
    assert guest not in net.left()
