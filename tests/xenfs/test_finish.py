"""Goal: the end of `xenfs up` loses nothing in silence: a flush that fails is said; a mount that stays does not prevent it.
Method: _finish() over a world with in-memory disks; the mount is an object whose detach() succeeds or refuses."""

from __future__ import annotations

import errno

import pytest
import trio

from blockdev.storage import FaultyStorage, MemoryStorage
from tests.xenfs.machine import Machine
from xenfs.fuse.mount import MountError
from xenfs.fuse.session import Session
from xenfs.host import HostError
from xenfs.up import _finish


class Mounted:
    """Only what _finish() asks of a mount."""

    def __init__(self, refuses: bool) -> None:
        self.refuses = refuses

    def detach(self) -> None:
        if self.refuses:
            raise MountError(errno.EPERM, "cannot unmount")


@pytest.mark.parametrize("refuses", [False, True])
def test_everything_is_flushed(refuses: bool) -> None:
    """Goal: each disk is flushed once, also when the mount cannot be taken away.  Method: count flushes."""
    storage = MemoryStorage(64)
    with Machine({"g": {"xvda": storage}}) as machine:
        trio.run(_finish, machine.world, Session(machine.world.root, lambda _reply: None), Mounted(refuses))
        assert storage.flushes == 1


def test_a_flush_that_fails_is_said() -> None:
    """Goal: the name of the disk, in the error that ends `xenfs up` with 1.  Method: a storage whose flush fails."""
    good, bad = MemoryStorage(64), FaultyStorage(MemoryStorage(64), lambda what: what == "flush")
    with Machine({"g": {"xvda": good, "xvdb": bad}}) as machine:
        session = Session(machine.world.root, lambda _reply: None)
        with pytest.raises(HostError, match=r"last flush.*: g xvdb$"):
            trio.run(_finish, machine.world, session, Mounted(False))
        assert good.flushes == 1
