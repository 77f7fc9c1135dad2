"""Goal: RELEASE of a guest that runs ends what its kernel had under way; nothing waits for ever, and others go on.
Method: a whole world; RELEASE as a client of domain 0 sends it; disks with requests that are held back, vifs, the end."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator

import pytest

from blockdev.storage import DelayedStorage, MemoryStorage
from tests.xenfs.machine import Kernel, Machine, Reply
from tests.xenfs.test_vifs import NAME, Site, inside_guest, site
from xenfs.diskspec import parse_disk
from xenfs.host import World
from xenmodel.public.io.xs_wire import XsType
from xenmodel.types import Domid
from xenmodel.xenstore.wire import Parser, join, pack

__all__ = ["site"]  # a fixture

EIO = Reply(errno.EIO, b"")
HOME = "/local/domain/1"


def ask(world: World, kind: XsType, *words: str) -> bytes:
    """The reply to a request of domain 0's, before anything that it caused."""
    peer = world.store.daemon.peer(Domid(0), lambda: None)
    peer.receive(pack(kind, 1, 0, join(*words)))
    parser = Parser()
    parser.feed(bytes(peer.out))
    peer.close()
    message = parser.next()
    assert message is not None
    return message.body


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Two guests; `g` has a storage that waits for the test."""
    with Machine({"g": {"xvda": DelayedStorage(MemoryStorage(64))}, "h": {"xvda": MemoryStorage(64)}}) as built:
        yield built


def works(kernel: Kernel, path: str) -> bool:
    fh = kernel.handle(path, os.O_RDWR)
    return not kernel.write(fh, 512, b"d" * 512).error and kernel.read(fh, 512, 512).data == b"d" * 512


def test_disk(machine):
    """Goal: who waits for the disk gets EIO, also if the backend is busy with it; it is announced as gone, the directory of
    the domain stays, other guests and a second RELEASE notice nothing, destroy() works.
    Method: more requests than commands, one step; RELEASE; new requests; the storage goes on; the end of the domain."""
    world, kernel, said = machine.world, machine.kernel, []
    world.announce = said.append
    fh = kernel.handle("domains/1/dev/xvda", os.O_RDWR)
    asked = [kernel.send_write(fh, i * 512, b"d" * 512) for i in range(60)] + [kernel.send_read(fh, 3, 7)]
    world.kick()
    assert machine.storages["/g/xvda"].held and not set(asked) & kernel.replies.keys()
    assert ask(world, XsType.RELEASE, "1") == b"OK\0"
    assert machine.guests["g"].probe.devices, "not from within the request"
    kernel.settle()
    assert [kernel.replies.pop(unique) for unique in asked] == [EIO] * len(asked)
    for reply in (kernel.read(fh, 0, 512), kernel.read(fh, 1, 2), kernel.write(fh, 0, b"x" * 512), kernel.fsync(fh)):
        assert reply == EIO
    assert said == ["g xvda: gone"] and machine.guests["g"].probe.devices == machine.guests["g"].exports == {}
    assert kernel.names("domains/1/dev") == [".", "..", "xen"] and kernel.names("domains/1/inspect/vbd") == [".", ".."]
    assert kernel.text("domains/1/name") == "g\n" and kernel.text("domains/1/state") == "running\n"
    assert works(kernel, "domains/2/dev/xvda")
    while machine.storages["/g/xvda"].release(random.Random(1).randrange):
        kernel.settle()
    assert not any(back.peer_domid == 1 for back in world.backs() if back.state.name == "Connected")
    assert ask(world, XsType.RELEASE, "1") == b"ENOENT\0", "it is not introduced any more"
    kernel.settle()
    world.destroy(1)
    world.settle()
    assert kernel.names("domains") == [".", "..", "0", "2", "h"] and works(kernel, "domains/2/dev/xvda")
    assert said == ["g xvda: gone"]


def test_destroyed_in_the_same_batch(machine):
    """Goal: the devices end once.  Method: RELEASE and destroy() before anything is delivered; RELEASE of who is gone."""
    ask(machine.world, XsType.RELEASE, "1")
    machine.world.destroy(1)
    machine.kernel.settle()
    assert 1 not in machine.world.hypervisor.domains and works(machine.kernel, "domains/2/dev/xvda")
    ask(machine.world, XsType.RELEASE, "1")
    ask(machine.world, XsType.RELEASE, "0")
    machine.kernel.settle()
    assert works(machine.kernel, "domains/2/dev/xvda") and list(machine.guests["h"].probe.devices)


def test_introduced_again(machine):
    """Goal: the kernel is not there for a new INTRODUCE, nor for a device, and neither harms anybody; a world with such a
    guest ends cleanly.  Method: RELEASE, the page and port of before, a new disk, detached; the rest is the fixture's."""
    world = machine.world
    page, port = (world.toolstack.client.read(f"{HOME}/store/{key}") for key in ("ring-ref", "port"))
    ask(world, XsType.RELEASE, "1")
    machine.kernel.settle()
    ask(world, XsType.INTRODUCE, "1", str(page), str(port))
    machine.storages["/g/xvdb"] = MemoryStorage(64)
    world.toolstack.attach_disk(1, parse_disk("/g/xvdb,raw,xvdb,w"))
    machine.kernel.settle()
    assert machine.guests["g"].probe.devices == {} and machine.kernel.names("domains/1/dev") == [".", "..", "xen"]
    gone: list[bool] = []
    world.toolstack.detach_disk(1, 51712, lambda: gone.append(True))
    machine.kernel.settle()
    assert gone == [True]
    assert works(machine.kernel, "domains/2/dev/xvda")


@pytest.mark.host
def test_vif(site: Site):
    """Goal: a vif goes likewise, with its interfaces at both ends.  Method: two; RELEASE; ip(8); the end of the world."""
    site.create("", "queues=2")
    site.settle()
    assert "xn1" in inside_guest("link")
    site.said.clear()
    ask(site.world, XsType.RELEASE, "1")
    site.settle()
    assert sorted(site.said) == [f"{NAME} xn0: gone", f"{NAME} xn1: gone"]
    vifs = site.world.vifs
    assert "xn" not in inside_guest("link") and site.world.guests[1].probe.devices == {}
    assert not any(back.connected for back in vifs.backs.values())
