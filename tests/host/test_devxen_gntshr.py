"""Goal: pages that programs share and map, and their notifications, go when the programs go, however they do.
Method: tests/devxen/grants.c in two guests and domain 0, ended in all ways; what is left of them in inspect/."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import pytest

from tests.host.devxen import DevXen, coherent, needs_libraries, served, shared
from tests.host.net import wait_until
from tests.host.served import Host

pytestmark = [pytest.mark.host, needs_libraries]

LIMIT = 1024  # pages that the programs of a domain may share


@pytest.fixture
def xen(host: Host) -> Iterator[DevXen]:
    with served(host) as built:
        yield built


@pytest.mark.parametrize(
    ("how", "what"), [("unmap", "byte"), ("leave", "event"), *((how, "both") for how in ("unmap", "close", "leave", "kill"))]
)
def test_unmap_notification(xen, how, what):
    """Goal: whichever way a mapping goes, the owner finds the byte cleared and gets the event.
    Method: a mapping with notification, undone by unmap, close, exit and SIGKILL; events.c holds the owner's port."""
    one, ear, other = xen.grants(1), xen.events(1), xen.grants(2)
    before = xen.held(2)
    area, (ref,) = shared(one, "rw", 2, 1)
    port = ear.number("bind-unbound", 2)
    peer_port = other.number("bind-interdomain", 1, port)
    one.ok("write", area, 100, "010203")
    mapped = other.number("map-notify", "rw", 1, ref, -1 if what == "event" else 101, -1 if what == "byte" else peer_port)
    other.ok("write", mapped, 200, "aa")
    assert (ear.ask("poll", 0), one.ask("read", area, 100, 3)) == ("timeout", "010203")
    leave = {
        "unmap": partial(other.ok, "unmap", mapped),
        "close": partial(other.ok, "close-tab"),
        "leave": partial(other.send, "leave"),
        "kill": other.kill,
    }
    if how == "close":
        other.ok("close-events")
        assert ear.ask("poll", 200) == "timeout"  # the port is held for the notification
    leave[how]()
    if what != "byte":
        assert ear.number("pending") == port
    if how != "unmap":
        xen.wait_held(before, 2)
    assert one.ask("read", area, 100, 3) == ("010203" if what == "event" else "010003")
    assert one.ask("read", area, 200, 1) == "aa"


@pytest.mark.parametrize("how", ["unshare", "leave", "kill"])
def test_unshare_notification(xen, how):
    """Goal: whichever way the owner of a shared page goes, who has it mapped finds the byte cleared and gets the event.
    Method: as for unmapping; the page stays as it is while it is mapped, and nothing is left when it no longer is."""
    before = xen.held(1, 2)
    one, other, ear = xen.grants(1), xen.grants(2), xen.events(2)
    port = one.number("bind-unbound", 2)
    ear_port = ear.number("bind-interdomain", 1, port)
    assert ear.number("pending") == ear_port
    ear.ok("unmask", ear_port)
    area, ref = one.numbers("share-notify", "rw", 2, 7, port)
    mapped = other.number("map", "rw", 1, ref)
    one.ok("fill", area, 5)
    other.ok("check", mapped, 5)
    assert ear.ask("poll", 0) == "timeout"
    other.ok("write", mapped, 6, "010101")
    if how == "kill":
        one.kill()
    elif how == "leave":
        one.send("leave")
    else:
        one.ok("unshare", area)
    assert ear.number("pending") == ear_port
    assert other.ask("read", mapped, 6, 3) == "010001"
    other.ok("fill", mapped, 6)
    other.ok("check", mapped, 6)
    other.ok("unmap", mapped)
    for program in (one, other, ear):
        program.close()
    xen.wait_held(before, 1, 2)


def test_bad_notifications(xen):
    """Goal: a notification to a port that is not there is refused, with nothing left mapped or shared.
    Method: ports that nobody bound, and the kernel's own; mapped and shared."""
    one, other = xen.grants(1), xen.grants(2)
    _, (ref,) = shared(one, "rw", 2, 1)
    kernels = min(xen.ports(2))
    before = xen.held(1, 2)
    for port in (kernels, 3000, 70_000):
        assert other.ask("map-notify", "rw", 1, ref, 0, port).startswith("error E")
        assert other.ask("share-notify", "rw", 1, 0, port).startswith("error E")
    xen.wait_held(before, 1, 2)


def test_limit(xen):
    """Goal: a domain's programs share so many pages and no more; what one gives back another can have.
    Method: up to the limit with two programs, one too many, another domain, then room again."""
    one, other, foreign = xen.grants(1), xen.grants(1), xen.grants(2)
    areas = [shared(one, "rw", 2, 256)[0] for _ in range(LIMIT // 256 - 1)]
    shared(other, "rw", 2, 255)
    assert one.ask("share", "rw", 2, 2) == "error ENOSPC"
    shared(other, "rw", 2, 1)
    assert [program.ask("share", "rw", 2, 1) for program in (one, other)] == ["error ENOSPC"] * 2
    shared(foreign, "rw", 1, 1)
    one.ok("unshare", areas.pop())
    area, refs = shared(other, "rw", 2, 256)
    mapped = foreign.number("map", "rw", 1, *refs)
    coherent((other, area), (foreign, mapped))
    one.kill()
    wait_until(lambda: not other.ask("share", "rw", 2, 256).startswith("error"), "room")


def test_closed_files(xen):
    """Goal: pages that are shared outlive the descriptor through which they were; what is mapped goes with its own.
    Method: both ends close their files; the owner shares anew, which is not seen through what was mapped; both exit."""
    before = xen.held(1, 2)
    one, other, third = xen.grants(1), xen.grants(2), xen.grants(2)
    area, refs = shared(one, "rw", 2, 4)
    mapped, thirds = other.number("map", "rw", 1, *refs), third.number("map", "rw", 1, *refs)
    one.ok("close-shr")
    coherent((one, area), (other, mapped), (third, thirds))
    assert xen.granted(1) >= set(refs)
    other.ok("close-tab")
    coherent((one, area), (third, thirds))
    third.ok("unmap", thirds)
    one.end()
    other.end()
    third.end()
    xen.wait_held(before, 1, 2)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random(xen, seed):
    """Goal: a program killed at any moment leaves no grant, mapping or port, and spoils nobody's pages.
    Method: programs that map, share, bind and undo it as fast as they can, each killed after a random time."""
    draw = random.Random(seed)
    one, other = xen.grants(1), xen.grants(2)
    area, refs = shared(one, "rw", 2, 4)
    mapped = other.number("map", "rw", 1, *refs)
    _, victims_refs = shared(one, "rw", 2, 24)
    _, zeros_refs = shared(one, "rw", 0, 24)
    before = xen.held(0, 1, 2)
    victims = [xen.grants(i) for i in (0, 2, 2, 0)]
    for i, victim in enumerate(victims):
        victim.send("churn", draw.randrange(1 << 30), 1, *(victims_refs if i in (1, 2) else zeros_refs))
    for victim in draw.sample(victims, len(victims)):
        assert victim.quiet(draw.uniform(0.0, 0.3))
        coherent((one, area), (other, mapped))
        victim.kill()
    xen.wait_held(before, 0, 1, 2)
    coherent((one, area), (other, mapped))


def test_many_programs(xen):
    """Goal: programs that share and map all the time do not disturb one another, nor xenfs when it looks which pages are
    still in use.  Method: eight of a domain that has nearly reached its limit; all are killed at once."""
    one, holder = xen.grants(1), xen.grants(2)
    _, refs = shared(one, "rw", 2, 16)
    area, _ = shared(holder, "rw", 1, LIMIT - 40)
    holder.ok("fill", area, 1)
    before = xen.held(0, 1, 2)
    programs = [xen.grants(2) for _ in range(8)]
    for i, program in enumerate(programs):
        program.send("churn", i, 1, *refs)
    for program in programs:
        assert program.quiet(0.5)
    for program in programs:
        program.process.kill()
    xen.wait_held(before, 0, 1, 2)
    holder.ok("check", area, 1)


def test_stopped_program(xen):
    """Goal: a program that does not run keeps its own pages and costs others nothing; the page's owner need not wait.
    Method: SIGSTOP to one with a mapping; others map and share meanwhile; the owner goes; SIGCONT."""
    one, other, third, fourth = xen.grants(1), xen.grants(2), xen.grants(1), xen.grants(2)
    area, refs = shared(one, "rw", 2, 4)
    mapped = other.number("map", "rw", 1, *refs)
    one.ok("fill", area, 1)
    other.stop()
    for _ in range(10):
        third_area, third_refs = shared(third, "rw", 2, 16)
        fourth_area = fourth.number("map", "rw", 1, *third_refs)
        coherent((third, third_area), (fourth, fourth_area))
        fourth.ok("unmap", fourth_area)
        third.ok("unshare", third_area)
    one.ok("unshare", area)
    one.kill()
    other.resume()
    other.ok("check", mapped, 1)
    other.ok("unmap", mapped)


def test_server_ends(xen):
    """Goal: programs with pages mapped do not keep xenfs from ending; their memory does not take them down.
    Method: SIGTERM to the server, which must be clean; both ends still answer."""
    one, other = xen.grants(1), xen.grants(2)
    area, refs = shared(one, "rw", 2, 4)
    mapped = other.number("map", "rw", 1, *refs)
    xen.served.stop()
    for program, its_area in ((one, area), (other, mapped)):
        assert program.ask("write", its_area, 0, "01") in {"ok", "fault"}
    assert other.ask("map", "rw", 1, *refs).startswith("error E")
