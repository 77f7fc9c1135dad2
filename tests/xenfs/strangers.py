"""strangers.py: guests whose devices are driven, or served, by somebody else: drivers that a test makes in a guest's domain,
as a program would that has that guest's store, event channels and grants and nothing else.

`Site` is a world without a mount, from configurations as a user writes them. Programs are told of events when the world is
settled, like the kernels in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from blockdev.blkback import Blkback
from blockdev.blkfront import Blkfront
from blockdev.command import Command
from blockdev.storage import Backing, MemoryStorage, Storage, StorageError
from tests.xenfs.machine import Kernel
from xenfs.config import parse_config
from xenfs.host import Guest, World
from xenmodel.public.io.blkif import BLKIF_OP_READ, BLKIF_OP_WRITE
from xenmodel.testing import check_world
from xenmodel.types import Domid
from xenmodel.xenstore.client import Client

XVDA = 51712
STORAGE = "name='storage'; driver_domain=1"


class Site:
    """A world of these guests, in their order. `storages` are domain 0's images, `said` what a user was told."""

    def __init__(self, *guests: str, storages: Mapping[str, Storage] = {}) -> None:
        self.storages = storages
        self.world = World(self._open)
        self.said: list[str] = []
        self.world.announce = self.said.append
        for text in guests:
            self.create(text)
        self.kernel = Kernel(self.world.root, self.world)

    def _open(self, backing: Backing) -> Storage:
        if backing.path not in self.storages:
            raise StorageError(f"cannot open disk image {backing.path}: there is none")
        return self.storages[backing.path]

    def create(self, text: str) -> Guest:
        guest = self.world.create(parse_config(text, "g.cfg"))
        self.world.settle()
        return guest

    def read(self, path: str) -> str | None:
        return self.world.toolstack.client.read(path)

    def states(self, front: int, back: int, ident: int = XVDA) -> tuple[str | None, str | None]:
        """Of the frontend in one domain and the backend in the other."""
        return (
            self.read(f"/local/domain/{front}/device/vbd/{ident}/state"),
            self.read(f"/local/domain/{back}/backend/vbd/{front}/{ident}/state"),
        )

    def __enter__(self) -> Site:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        problems = check_world(self.world.hypervisor)
        self.world.close()
        if value is None:
            assert problems == []


class BackProgram:
    """Serves disk `ident` of guest `front` from domain `domid`."""

    def __init__(self, site: Site, domid: int, front: int, storage: Storage | None = None, ident: int = XVDA) -> None:
        self.site, self.storage = site, storage or MemoryStorage(2048)
        self.node = f"/local/domain/{domid}/backend/vbd/{front}/{ident}"
        hypervisor = site.world.hypervisor
        self.client = Client(hypervisor.store.connect(Domid(domid)))
        peer = self.client.read(f"{self.node}/frontend")
        assert peer is not None, f"{self.node} is not there, or not for domain {domid}"
        self.asked: list[str] = []
        domain = hypervisor.domains[domid]
        self.back = Blkback(domain, self.client, self.node, peer, front, self._open)
        self.client.write(f"{self.node}/physical-device-path", self.client.read(f"{self.node}/params") or "")
        self.back.start()
        site.world.settle()

    def _open(self, backing: Backing) -> Storage:
        self.asked.append(backing.path)
        return self.storage

    def close(self) -> None:
        """It ends as it should: Closing, Closed."""
        self.client.write(f"{self.node}/state", 5)
        self.site.world.settle()
        self.client.write(f"{self.node}/state", 6)
        self.kill()

    def kill(self) -> None:
        """The process is gone, with its descriptors: nothing is mapped or bound any more, and the store says nothing."""
        self.back.stop()
        self.client.close()
        self.site.world.settle()


class FrontProgram:
    """Drives disk `ident` of guest `domid`, from that guest."""

    def __init__(self, site: Site, domid: int, ident: int = XVDA) -> None:
        self.site = site
        hypervisor = site.world.hypervisor
        self.node = f"/local/domain/{domid}/device/vbd/{ident}"
        self.client = Client(hypervisor.store.connect(Domid(domid)))
        peer, serves = self.client.read(f"{self.node}/backend"), self.client.read_int(f"{self.node}/backend-id", -1)
        assert peer is not None, f"{self.node} is not there"
        self.front = Blkfront(hypervisor.domains[domid], self.client, self.node, peer, serves)
        self.done: list[Command] = []
        self.front.on_complete = self.done.append
        self.front.start()
        site.world.settle()

    def start(self, op: int, sector: int, length: int, data: bytes = b"") -> Command:
        command = self.front.take(length)
        assert command is not None, "no command is free"
        command.view[: len(data)] = data
        self.front.submit(command, op, sector, length)
        self.site.world.settle()
        return command

    def write(self, sector: int, data: bytes) -> int:
        return self._finish(self.start(BLKIF_OP_WRITE, sector, len(data), data))[0]

    def read(self, sector: int, length: int) -> tuple[int, bytes]:
        """The status and the data."""
        return self._finish(self.start(BLKIF_OP_READ, sector, length))

    def _finish(self, command: Command) -> tuple[int, bytes]:
        assert command in self.done, "it did not complete"
        self.done.remove(command)
        result = command.status, bytes(command.view[: command.length])
        self.front.give(command)
        return result

    def kill(self) -> None:
        """The process is gone, with its descriptors."""
        self.front.stop()
        self.client.close()
        self.site.world.settle()
