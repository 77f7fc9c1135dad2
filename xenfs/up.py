"""up.py: `xenfs up`: build the world, mount it, serve until a signal, take everything down again.

Order at the end: write back what is still mounted on a disk (sync); detach the mount, so that nothing new comes; finish
what clients have under way; flush every disk; close the devices; destroy the domains. Whatever fails on the way, the rest
is still done.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import trio

from blockdev.blkfront import Blkfront
from blockdev.command import Command
from xenfs.config import GuestConfig, default_store_socket, duplicate_macs
from xenfs.fuse.mount import Mount, MountError, free_directory, mount, set_io_flusher
from xenfs.fuse.serve import Server, sender
from xenfs.fuse.session import Session
from xenfs.host import HostError, World
from xenfs.network import Bridge
from xenfs.nodes.disk import Disk
from xenfs.storesocket import SocketError

log = logging.getLogger("xenfs.up")

DRAIN_S = 10.0
RELEASE_S = 0.3  # from close(2), or the end of a loop device, to FUSE's RELEASE
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def say(line: str) -> None:
    """What a user, or a program that started us, waits for: flushed at once. Nobody listening is no reason to stop."""
    try:
        print(line, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for as long as we live)


class Settings(NamedTuple):
    """Who may see the mount (None: all, if we are root); bridges that are made for as long as it lasts; where xenstored
    listens (None: beside the mount); a group that may use dev/xen."""

    allow_other: bool | None = None
    bridges: Sequence[Bridge] = ()
    store_socket: str | None = None
    device_group: int | None = None


def up(configs: Sequence[GuestConfig], mountpoint: str, settings: Settings) -> None:
    """Serve `configs` under `mountpoint` until SIGINT or SIGTERM. HostError, MountError, SocketError or NetlinkError if it
    cannot be done."""
    # 5 ms, the default, is how long a disk worker that has finished may wait for the interpreter
    sys.setswitchinterval(0.0005)
    # signals wait until the loop listens: between making a mount and serving it there is no good moment for one.
    # The workers, made later, inherit this, so that the main thread is the one that is told.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    if not set_io_flusher():
        log.info("not permitted to be an IO flusher (see docs/deadlocks.md)")
    free_directory(os.path.abspath(mountpoint))
    world = World(device_gid=settings.device_group)
    world.announce = say
    for warning in duplicate_macs(configs):
        log.warning("%s", warning)
    try:
        world.vifs.network.make_bridges(settings.bridges)
        for config in configs:
            world.create(config)
            world.settle()
        world.check_connected()
        _listen(world, mountpoint, settings.store_socket)
        everyone = os.geteuid() == 0 if settings.allow_other is None else settings.allow_other
        mounted = mount(mountpoint, fsname="xenfs", allow_other=everyone)
        try:
            failure = trio.run(_serve, world, mounted)
        except Exception:
            log.critical("a bug of ours ends this", exc_info=True)  # before what follows can fail because of it
            raise
        finally:
            mounted.unmount()
    finally:
        finished = world.close()
    if failure is not None:
        raise failure
    if not finished:
        raise HostError("a disk operation has not finished: its outcome is not known")
    if world.vifs.network.left:
        raise HostError("not all of it could be taken away from the host's network")


def _listen(world: World, mountpoint: str, path: str | None) -> None:
    """Xenstored's socket where it was asked for, or beside the mount if we may write there."""
    try:
        world.store.socket.listen(Path(path or default_store_socket(mountpoint)))
    except SocketError as error:
        if path is not None or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG):
            raise
        log.warning("no socket of xenstored: %s; choose a path with --xenstored-socket", error)


async def _serve(world: World, mounted: Mount) -> HostError | None:
    """Until a signal, or until somebody unmounts us; what went wrong at the end, if anything."""
    failure: HostError | None = None
    session = Session(world.root, sender(mounted.fd), os.geteuid(), os.getegid())
    session.on_passthrough = lambda: world.devices.mounted(mounted.fd, mounted.device)
    requests = select.poll()
    requests.register(mounted.fd, select.POLLIN)
    world.devices.calls.is_quiet = lambda: not requests.poll(0)
    server = Server(mounted.fd, session, world.kick)
    stop = trio.Event()
    with trio.open_signal_receiver(*SIGNALS) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve_until_unmounted, server, stop)
            nursery.start_soon(world.reap_workers)
            nursery.start_soon(world.reap_network)
            nursery.start_soon(world.vifs.frames.run)
            nursery.start_soon(world.store.socket.run)
            nursery.start_soon(world.store.run_timers)
            nursery.start_soon(world.devices.run)
            nursery.start_soon(world.devices.run_aside)
            nursery.start_soon(world.devices.do_chores)
            nursery.start_soon(_obey, signals, world, stop)
            say("ready")
            await stop.wait()
            try:
                await _finish(world, session, mounted)
            except HostError as error:
                failure = error
            session.send = lambda _reply: None  # closing devices still notify; the descriptor may be reused
            nursery.cancel_scope.cancel()
    return failure


async def _serve_until_unmounted(server: Server, stop: trio.Event) -> None:
    await server.run()
    stop.set()  # somebody unmounted us: nothing is left to serve, but there is something to flush


async def _obey(signals: AsyncIterator[int], world: World, stop: trio.Event) -> None:
    async for number in signals:
        if number == signal.SIGHUP:
            world.refresh_images()
        else:
            stop.set()


async def _finish(world: World, session: Session, mounted: Mount) -> None:
    """Take the mount away (in a thread: the kernel may ask us something), finish what is under way, flush."""
    with trio.move_on_after(RELEASE_S):  # who closed it need not have waited until we heard of it
        while session.has_open(Disk):  # noqa: ASYNC110  (a RELEASE; nobody waits for it but here)
            await trio.sleep(0.01)
    if session.has_open(Disk):
        # a file system may be mounted on a disk through a loop device: what it has not written yet is written now
        log.warning("a disk is still open: syncing, then its users are cut off")
        with trio.move_on_after(DRAIN_S):
            await trio.to_thread.run_sync(os.sync, abandon_on_cancel=True)
    try:
        await trio.to_thread.run_sync(mounted.detach)
    except MountError as error:
        log.error("%s", error)  # the disks are more important
    if not await world.drain(DRAIN_S):
        raise HostError(f"requests were still under way after {DRAIN_S:g} s")
    statuses: dict[str, int | None] = {}
    for guest, front in world.fronts():
        command = front.take(0) if front.connected and not front.readonly else None
        if command is not None:
            name = f"{guest.config.name} {guest.exports[front.node].name}"
            statuses[name] = None
            command.context = _flushed(front, statuses, name)
            front.flush(command)
    await world.drain(DRAIN_S)
    if bad := [name for name, status in statuses.items() if status != 0]:
        raise HostError(f"the last flush failed or did not finish: {', '.join(bad)}")


def _flushed(front: Blkfront, statuses: dict[str, int | None], name: str) -> Callable[[Command], None]:
    def done(command: Command) -> None:
        statuses[name] = command.status
        front.give(command)

    return done
