"""Goal: disks whose backend or frontend is a program in another guest work, come and go with it, and keep nobody waiting.
Method: a World as `xenfs up` makes it; the program is a driver that the test runs in that guest's domain, and kills."""

from __future__ import annotations

import errno
import logging
import time

import pytest
import trio

from blockdev.storage import DelayedStorage, MemoryStorage
from tests.xenfs.strangers import STORAGE, XVDA, BackProgram, FrontProgram, Site
from tests.xenfs.test_finish import Mounted
from xenfs.config import parse_config
from xenfs.diskspec import parse_disk
from xenfs.fuse.session import Session
from xenfs.host import HostError
from xenfs.up import _finish
from xenmodel.public.io.blkif import BLKIF_OP_READ
from xenmodel.public.io.xenbus import XenbusState
from xenmodel.testing import Footprint

SERVED = "name='g'; disk=['backend=storage,vdev=xvda,target=pool/g']"
ALONE = "name='g'; drivers='none'; disk=['/img,,xvda']"
DATA = bytes(range(256)) * 16
QUICK_S = 5.0  # less than what the end of a world waits for drivers of its own


def served(**storages) -> Site:
    return Site(STORAGE, SERVED, storages={f"/{name}": storage for name, storage in storages.items()})


# --- a backend in another guest ----------------------------------------------------------------------------------------


def test_a_backend_that_comes_later() -> None:
    """Goal: `up` goes on without it; the disk appears, and is announced, when it comes; domain 0 has no part in it.
    Method: settle and check as `up` does, then the program; write and read through the file."""
    with served() as site:
        site.world.check_connected()
        assert site.states(2, 1) == ("1", "1")
        assert (site.said, site.kernel.names("domains/2/dev")) == ([], [".", "..", "xen"])
        before = Footprint(site.world.hypervisor)
        program = BackProgram(site, 1, 2)
        assert site.states(2, 1) == ("4", "4")
        assert program.asked == ["pool/g"]
        assert site.said == ["g xvda: 1 MiB, read-write, connected"]
        fh = site.kernel.handle("domains/2/dev/xvda", 2)
        assert site.kernel.write(fh, 4096, DATA).error == 0
        assert site.kernel.read(fh, 4096, 4096).data == DATA
        assert program.storage.data[4096:8192] == DATA
        assert site.world.backs() == []
        assert [line for line in before.grown() if "domain 0" in line] == []


def test_nothing_of_others_lands_with_a_program() -> None:
    """Goal: the guess where the next write goes never puts somebody else's data into pages that a program has mapped.
    Method: a write to such a disk, and to one of domain 0's, which makes the guess; where the next data would go."""
    text = "name='g'; disk=['backend=storage,vdev=xvda,target=x', '/img,,xvdb']"
    with Site(STORAGE, text, storages={"/img": MemoryStorage(2048)}) as site:
        BackProgram(site, 1, 2)
        session, scratch = site.kernel.session, site.kernel.session.landing
        for name, lands_there in (("xvda", False), ("xvdb", True)):
            fh = site.kernel.handle(f"domains/2/dev/{name}", 2)
            assert site.kernel.write(fh, 0, DATA).error == 0
            assert session.writer is session.handles[fh]
            session.buffers()
            assert (session.landing is not scratch) is lands_there


def test_the_other_devices_are_still_checked() -> None:
    """Goal: a disk that domain 0 should serve and cannot is as fatal as ever, beside another's.  Method: both."""
    both = "name='g'; disk=['backend=storage,vdev=xvda,target=x', '/none,,xvdb']"
    with Site(STORAGE, both) as site, pytest.raises(HostError, match=r"^g: xvdb: cannot open disk image /none"):
        site.world.check_connected()


@pytest.mark.parametrize("backend", ["nobody", "g", "1", "2"])
def test_a_backend_that_is_no_guest(backend: str) -> None:
    """Goal: refused with the device and the reason, before anything is made.  Method: names and numbers; the whole store."""
    with Site() as site:
        before = list(site.world.hypervisor.store.dump())
        for device, name in ((f"disk=['backend={backend},/x,,xvda']", "xvda"), (f"vif=['backend={backend}']", "vif 0")):
            with pytest.raises(HostError, match=f"^g: {name}: backend '{backend}' is no domain that runs"):
                site.world.create(parse_config(f"name='g'; {device}", "g.cfg"))
        assert list(site.world.hypervisor.store.dump()) == before
        assert set(site.world.hypervisor.domains) == {0}


@pytest.mark.parametrize("end", ["closes", "is killed"])
def test_a_program_that_starts_anew(end: str) -> None:
    """Goal: what was asked while nobody served is answered by the next program, and what was written before is there.
    Method: a read between the two programs; one that said Closed, one that could not, whose heir says it."""
    with served() as site:
        program = BackProgram(site, 1, 2)
        fh = site.kernel.handle("domains/2/dev/xvda", 2)
        assert site.kernel.write(fh, 0, DATA).error == 0
        getattr(program, "close" if end == "closes" else "kill")()
        read = site.kernel.send_read(fh, 0, 4096)
        site.kernel.settle()
        assert read not in site.kernel.replies
        if end == "is killed":
            site.world.toolstack.client.write(f"{program.node}/state", 6)
            site.world.settle()
        heir = BackProgram(site, 1, 2, program.storage)
        assert site.kernel.wait(read).data == DATA
        assert site.states(2, 1) == ("4", "4")
        assert heir.asked == ["pool/g"]


def test_the_serving_guest_ends_and_another_comes() -> None:
    """Goal: what is under way fails, nothing else does; unplugged and plugged in again with a new guest, the disk is back.
    Method: destroy with a request in the program's hands; a second disk in domain 0; the new guest has the old name."""
    held = DelayedStorage(MemoryStorage(2048))
    text = "name='g'; disk=['backend=storage,vdev=xvda,target=x', '/img,,xvdb']"
    with Site(STORAGE, text, storages={"/img": MemoryStorage(64)}) as site:
        BackProgram(site, 1, 2, held)
        fh, other = (site.kernel.handle(f"domains/2/dev/{name}", 2) for name in ("xvda", "xvdb"))
        read = site.kernel.send_read(fh, 0, 4096)
        site.kernel.settle()
        assert held.held
        site.world.destroy(1)
        assert site.kernel.wait(read).error == errno.EIO
        assert site.kernel.read(fh, 0, 512).error
        assert site.kernel.write(other, 0, DATA).error == 0
        gone: list[bool] = []
        site.world.toolstack.detach_disk(2, XVDA, lambda: gone.append(True))
        site.world.settle()
        assert gone == [True]
        assert site.kernel.names("domains/2/dev") == [".", "..", "xen", "xvdb"]
        site.create(STORAGE)
        site.world.toolstack.attach_disk(2, parse_disk("backend=storage,vdev=xvda,target=x"))
        site.world.settle()
        BackProgram(site, 3, 2, MemoryStorage(64))
        assert site.states(2, 3) == ("4", "4")
        assert site.kernel.read(site.kernel.handle("domains/2/dev/xvda"), 0, 512).data == bytes(512)
        assert site.kernel.write(other, 0, DATA).error == 0


def test_unplugged_under_a_program() -> None:
    """Goal: a program is asked, obeys, and has nothing of the guest any more.  Method: detach; what its domain holds."""
    with served() as site:
        before = Footprint(site.world.hypervisor)
        program = BackProgram(site, 1, 2)
        gone: list[bool] = []
        site.world.toolstack.detach_disk(2, XVDA, lambda: gone.append(True))
        site.world.settle()
        assert gone == [True]
        assert (program.client.read("/local/domain/1/backend"), site.read("/local/domain/2/device/vbd")) == (None, None)
        assert before.grown() == []


# --- the end ---------------------------------------------------------------------------------------------------------


def silent(site: Site) -> None:
    """A program that has connected and does nothing more, not even if it is asked."""
    program = BackProgram(site, 1, 2, DelayedStorage(MemoryStorage(64)))
    program.back.stop = lambda: None  # type: ignore[method-assign]
    program.back.peer_changed = lambda: None  # type: ignore[method-assign]


@pytest.mark.parametrize("back", ["never came", "silent", "killed", "its domain is gone"])
def test_the_end_of_the_world(back: str) -> None:
    """Goal: it does not wait for who never answers, and our own drivers still close in order.
    Method: each kind of backend, with a request under way, beside a disk of domain 0; the time it takes."""
    mine = MemoryStorage(64)
    text = "name='g'; disk=['backend=storage,vdev=xvda,target=x', '/img,,xvdb']"
    site = Site(STORAGE, text, storages={"/img": mine})
    if back == "silent":
        silent(site)
    elif back != "never came":
        program = BackProgram(site, 1, 2, DelayedStorage(MemoryStorage(64)))
    if back != "never came":
        site.kernel.send_read(site.kernel.handle("domains/2/dev/xvda"), 0, 512)
        site.kernel.settle()
    if back == "killed":
        program.client.close()
        site.world.hypervisor.domains[1].events.reset()
    if back == "its domain is gone":
        site.world.destroy(1)
    log: list[str] = []
    write = site.world.hypervisor.store.write

    def recorded(view, domid, path, value):
        write(view, domid, path, value)
        log.append(f"{path}={value.decode()}")

    site.world.hypervisor.store.write = recorded  # type: ignore[method-assign]
    start = time.monotonic()
    assert site.world.close()
    assert time.monotonic() - start < QUICK_S
    device = "51728/state=6"
    assert [line.rpartition("/vbd/")[2] for line in log if line.endswith(device)] == [device, f"2/{device}"]


def finish(site: Site) -> None:
    trio.run(_finish, site.world, Session(site.world.root, lambda _reply: None), Mounted(False))


def test_an_end_after_the_program_s(caplog: pytest.LogCaptureFixture) -> None:
    """Goal: a program that ended first costs its disk what was under way, which is said, and no other disk its flush.
    Method: kill it with a read under way, then what `up` does at its end."""
    mine = MemoryStorage(64)
    text = "name='g'; disk=['backend=storage,vdev=xvda,target=x', '/img,,xvdb']"
    with Site(STORAGE, text, storages={"/img": mine}) as site, caplog.at_level(logging.WARNING):
        program = BackProgram(site, 1, 2)
        program.kill()
        site.kernel.send_read(site.kernel.handle("domains/2/dev/xvda"), 0, 512)
        site.kernel.settle()
        start = time.monotonic()
        finish(site)
        assert time.monotonic() - start < QUICK_S
        assert mine.flushes == 1
        assert [r.getMessage() for r in caplog.records] == ["g xvda: its backend has gone, 1 requests are not answered"]


def test_an_end_before_the_program_s() -> None:
    """Goal: a program that serves is asked to flush like any backend.  Method: count."""
    with served() as site:
        program = BackProgram(site, 1, 2)
        finish(site)
        assert isinstance(program.storage, MemoryStorage)
        assert program.storage.flushes == 1


def test_a_program_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: one that lives and does not answer is given its time, and then the others are flushed all the same; it is named.
    Method: a short time, a request in its hands."""
    monkeypatch.setattr("xenfs.up.DRAIN_S", 0.1)
    mine = MemoryStorage(64)
    text = "name='g'; disk=['backend=storage,vdev=xvda,target=x', '/img,,xvdb']"
    with Site(STORAGE, text, storages={"/img": mine}) as site:
        silent(site)
        site.kernel.send_read(site.kernel.handle("domains/2/dev/xvda"), 0, 512)
        site.kernel.settle()
        with pytest.raises(HostError, match=r"did not finish: g xvda$"):
            finish(site)
        assert mine.flushes == 1


# --- a frontend that is a program --------------------------------------------------------------------------------------


def test_a_frontend_that_is_a_program() -> None:
    """Goal: with drivers = "none" nothing of ours is in the guest; domain 0 serves whoever comes, also the next one.
    Method: what `up` checks; a program that writes, dies without a word and is followed by another; what domain 0 holds."""
    image = MemoryStorage(2048)
    with Site(ALONE, storages={"/img": image}) as site:
        site.world.check_connected()
        assert list(site.world.fronts()) == []
        assert site.states(1, 0) == ("1", "2")
        assert (site.said, site.kernel.names("domains/1/dev")) == ([], [".", "..", "xen"])
        before = Footprint(site.world.hypervisor)
        program = FrontProgram(site, 1)
        assert site.states(1, 0) == ("4", "4")
        assert program.write(8, DATA) == 0
        assert image.data[4096:8192] == DATA
        program.kill()
        site.world.toolstack.client.write("/local/domain/1/device/vbd/51712/state", 1)
        site.world.settle()
        heir = FrontProgram(site, 1)
        assert heir.read(8, 4096) == (0, DATA)
        heir.front.close()
        site.world.settle()
        heir.kill()
        assert site.states(1, 0) == ("6", "6")
        assert [line for line in before.grown() if "domain 0" in line] == []


@pytest.mark.parametrize("busy", [False, True])
def test_a_guest_of_programs_that_ends(busy: bool) -> None:
    """Goal: its nodes go and domain 0 lets go of its pages and ports, also if a request is still with the storage.
    Method: destroy under a connected program; the disk of another guest works on."""
    held = DelayedStorage(MemoryStorage(2048))
    other = "name='h'; disk=['/other,,xvda']"
    with Site(other, storages={"/img": held, "/other": MemoryStorage(64)}) as site:
        before = Footprint(site.world.hypervisor)
        site.create(ALONE)
        program = FrontProgram(site, 2)
        if busy:
            program.start(BLKIF_OP_READ, 0, 4096)
            assert held.held
        site.world.destroy(2)
        while held.release(lambda _count: 0):
            site.world.settle()
        site.world.settle()
        assert before.grown() == []
        paths = [path for path, *_ in site.world.hypervisor.store.dump()]
        assert [path for path in paths if "/2" in path] == []
        assert len(site.world.backs()) == 1
        assert site.kernel.read(site.kernel.handle("domains/1/dev/xvda"), 0, 512).data == bytes(512)


def test_the_end_with_a_program_in_front() -> None:
    """Goal: the end of the world does not wait for it either.  Method: connected, with a request under way."""
    held = DelayedStorage(MemoryStorage(2048))
    site = Site(ALONE, storages={"/img": held})
    FrontProgram(site, 1).start(BLKIF_OP_READ, 0, 4096)
    while held.release(lambda _count: 0):
        pass  # done, and not answered yet
    start = time.monotonic()
    assert site.world.close()
    assert time.monotonic() - start < QUICK_S


def test_programs_at_both_ends() -> None:
    """Goal: two guests of programs meet without domain 0, and either may end.  Method: data from one to the other."""
    with Site(STORAGE + "; drivers='none'", SERVED + "; drivers='none'") as site:
        site.world.check_connected()
        before = Footprint(site.world.hypervisor)
        front = FrontProgram(site, 2)
        back = BackProgram(site, 1, 2)
        assert site.states(2, 1) == ("4", "4")
        assert front.write(0, DATA) == 0
        assert back.storage.data[:4096] == DATA
        assert front.read(0, 4096) == (0, DATA)
        assert [line for line in before.grown() if "domain 0" in line] == []
        back.close()
        assert front.front.state is XenbusState.Closed
        front.kill()
        assert before.grown() == []


def test_interfaces_of_programs() -> None:
    """Goal: neither a namespace nor an interface is made for a guest whose netfront would be a program, and no script waits
    for a netback elsewhere.  Method: such a vif; `up`'s check, what the network was asked for, and the end."""
    with Site(STORAGE, "name='g'; drivers='none'; vif=['backend=storage,mtu=9000']") as site:
        site.world.check_connected()
        assert not site.world.vifs.network.pending
        assert not site.world.vifs.network._namespaces
        assert site.read("/local/domain/1/backend/vif/2/0/hotplug-status") == ""
        assert list(site.world.netfronts()) == site.world.netbacks() == []
        site.world.destroy(2)
        assert site.read("/local/domain/1/backend") is None
