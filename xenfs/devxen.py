"""devxen.py: the host's side of dev/xen: each domain's devices and their files, and what they share.

host.World has one XenDevices; up.py registers its arena with the mount and runs its tasks. What a device does is in sysdev/,
what its file does in nodes/.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from queue import SimpleQueue

import trio

from sysdev.evtchn import EvtchnDevice
from sysdev.gntalloc import Gntalloc
from sysdev.gntdev import Gntdev
from sysdev.steps import Job
from xenfs.arena import Arena, Filling
from xenfs.calls import Calls, DomainCalls
from xenfs.fuse.tree import Directory, Node
from xenfs.nodes.evtchn import EvtchnNode
from xenfs.nodes.gntdev import GNTALLOC, GNTDEV, GrantNode
from xenfs.nodes.privcmd import Privcmd
from xenmodel.domain import Domain

CHORES_S = 1.0  # how long a page of gntalloc may outlive its last mapping


class Aside:
    """What takes long, in a thread of its own. `fd` becomes readable when something is done; then call reap()."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._done: SimpleQueue[tuple[threading.Thread, Callable[[], None]]] = SimpleQueue()
        self._threads: list[threading.Thread] = []  # of what is not reaped

    def put(self, work: Callable[[], None], then: Callable[[], None]) -> None:
        """Do `work` in a thread, then `then` in reap()."""

        def run() -> None:
            work()
            self._done.put((thread, then))
            os.eventfd_write(self.fd, 1)

        thread = threading.Thread(target=run, name="aside")
        self._threads.append(thread)
        thread.start()

    def reap(self) -> None:
        if self._threads:
            with suppress(BlockingIOError):  # none is done
                for _ in range(os.eventfd_read(self.fd)):
                    thread, then = self._done.get()
                    self._threads.remove(thread)
                    then()

    def close(self) -> None:
        for thread in self._threads:
            thread.join()
        os.close(self.fd)


class XenDevices:
    """All of them. `filling` as the Arena's; `kick` delivers what a batch caused; `table(domain)` is the text of evtchn."""

    def __init__(self, filling: Filling, kick: Callable[[], bool], table: Callable[[Domain], str]) -> None:
        self.calls = Calls()
        self._aside = Aside()
        self.arena = Arena(lambda: chain(filling(), self.calls.filling()), self._aside.put)
        self.gid: int | None = None  # a group that may use the files, too
        self._kick = kick
        self._table = table
        self.domains: dict[int, DomainDevices] = {}
        self._chores = trio.Event()
        self.calls.on_signalled = lambda: self._chores.set()

    def add(self, domain: Domain, directory: Directory) -> None:
        """Put the files of a domain into its dev/xen."""
        devices = DomainDevices(domain, self.arena, self.calls, lambda: self._table(domain))
        devices.gntalloc.on_linger = lambda: self._chores.set()
        for grant_node in devices.grant_nodes:
            grant_node.on_close = lambda: self._chores.set()
        self.domains[domain.domid] = devices
        for name, node in devices.nodes.items():
            directory.add(name, node)
        for node in directory.children.values():
            if self.gid is not None:
                node.gid, node.mode = self.gid, node.mode | (node.mode & 0o600) >> 3

    def remove(self, domid: int) -> None:
        """A domain ends: whatever programs hold of it, and it of others."""
        if (devices := self.domains.pop(domid, None)) is not None:
            devices.stop()

    def mounted(self, fuse_fd: int, device: str) -> None:
        """The kernel takes backing files now. `device`: major:minor of the mount."""
        self.arena.register(fuse_fd)
        self.arena.device = os.makedev(*map(int, device.split(":")))

    def step(self) -> bool:
        """What was waiting; True if there is more that can be done at once."""
        self._aside.reap()
        self.arena.step()
        return self.calls.step()

    async def run(self) -> None:
        """The task of the threads that reach into callers' memory."""
        while True:
            await trio.lowlevel.wait_readable(self.calls.fd)
            while self._kick():
                await trio.lowlevel.checkpoint()

    async def run_aside(self) -> None:
        """The task of what takes long."""
        while True:
            await trio.lowlevel.wait_readable(self._aside.fd)
            while self._kick():
                await trio.lowlevel.checkpoint()

    async def do_chores(self) -> None:
        """The task that looks, now and then, which pages of gntalloc no process maps any more, whether a caller that had a
        signal was killed, and what processes have left in the arena. It sleeps while there is nothing to look at."""
        while True:
            await self._chores.wait()
            self._chores = trio.Event()
            await trio.sleep(CHORES_S)
            self.calls.give_up_killed()
            self.arena.tidy()
            for devices in self.domains.values():
                if devices.gntalloc.lingering and not devices.sweeping:  # it says when there is more
                    devices.calls.run(None, devices.sweep())
            while self._kick():
                await trio.lowlevel.checkpoint()

    def close(self) -> None:
        for domid in list(self.domains):
            self.remove(domid)
        self._aside.close()
        self.arena.close()
        self.calls.close()


class DomainDevices:
    """What is in one domain's dev/xen of it."""

    def __init__(self, domain: Domain, arena: Arena, calls: Calls, table: Callable[[], str]) -> None:
        self.calls = DomainCalls(calls, domain.domid)
        self.sweeping = False
        self.evtchn = EvtchnDevice(domain.events)
        self.gntdev = Gntdev(domain, self.evtchn, arena)
        self.gntalloc = Gntalloc(domain, self.evtchn, arena)
        self.grant_nodes = [GrantNode(self.gntdev, self.gntalloc, arena, self.calls, what) for what in (GNTDEV, GNTALLOC)]
        self.nodes: dict[str, Node] = {
            "evtchn": EvtchnNode(self.evtchn, self.calls, 0o600, table),
            "gntdev": self.grant_nodes[0],
            "gntalloc": self.grant_nodes[1],
            "privcmd": Privcmd(domain, self.calls),
        }

    def sweep(self) -> Job[None]:
        """Of gntalloc, one at a time: threads may be stuck."""
        self.sweeping = True
        try:
            yield from self.gntalloc.sweep()
        finally:
            self.sweeping = False

    def stop(self) -> None:
        for node in self.grant_nodes:
            node.stopped = True
        self.gntdev.stop()
        self.gntalloc.stop()
        self.evtchn.stop()
        self.calls.close()
