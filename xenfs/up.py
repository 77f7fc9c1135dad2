"""up.py: `xenfs up`: build the world, mount it, serve until a signal, take everything down again.

Order at the end: write back what is still mounted on a disk (sync); detach the mount, so that nothing new comes; finish
what clients have under way; flush every disk; close the devices; destroy the domains. Whatever fails on the way, the rest
is still done.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence

import trio

from xenfs.config import GuestConfig
from xenfs.fuse.mount import Mount, check_mountpoint, mount, set_io_flusher
from xenfs.fuse.serve import Server, sender
from xenfs.fuse.session import Session
from xenfs.host import World
from xenfs.nodes.disk import Disk

log = logging.getLogger("xenfs.up")

DRAIN_S = 10.0


def say(line: str) -> None:
    """What a user, or a program that started us, waits for: flushed at once. Nobody listening is no reason to stop."""
    try:
        print(line, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for as long as we live)


def up(configs: Sequence[GuestConfig], mountpoint: str, allow_other: bool | None = None) -> None:
    """Serve `configs` under `mountpoint` until SIGINT or SIGTERM. HostError or MountError if it cannot be done."""
    # 5 ms, the default, is how long a disk worker that has finished may wait for the interpreter
    sys.setswitchinterval(0.0005)
    # until the loop listens for it, SIGTERM unwinds as Ctrl-C does: nothing is left behind
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not set_io_flusher():
        log.info("not permitted to be an IO flusher (see docs/deadlocks.md)")
    check_mountpoint(mountpoint)
    world = World()
    world.announce = say
    try:
        for config in configs:
            world.create(config)
            world.settle()
        world.check_connected()
        everyone = os.geteuid() == 0 if allow_other is None else allow_other
        mounted = mount(mountpoint, fsname="xenfs", allow_other=everyone)
        try:
            trio.run(_serve, world, mounted)
        finally:
            mounted.unmount()
    finally:
        world.close()


async def _serve(world: World, mounted: Mount) -> None:
    session = Session(world.root, sender(mounted.fd), os.geteuid(), os.getegid())
    server = Server(mounted.fd, session, world.kick)
    stop = trio.Event()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve_until_unmounted, server, stop)
            nursery.start_soon(world.reap_workers)
            nursery.start_soon(_obey, signals, world, stop)
            say("ready")
            await stop.wait()
            await _finish(world, session, mounted)
            session.send = lambda _reply: None  # closing devices still notify; the descriptor may be reused
            nursery.cancel_scope.cancel()


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
    if session.has_open(Disk):
        # a file system may be mounted on a disk through a loop device: what it has not written yet is written now
        log.warning("a disk is still open: syncing, then its users are cut off")
        with trio.move_on_after(DRAIN_S):
            await trio.to_thread.run_sync(os.sync, abandon_on_cancel=True)
    await trio.to_thread.run_sync(mounted.detach)
    if not await world.drain(DRAIN_S):
        log.warning("requests were still under way after %g s", DRAIN_S)
    for _, front in world.fronts():
        command = None if front.readonly else front.take(0)
        if command is not None:
            command.context = front.give
            front.flush(command)
    if not await world.drain(DRAIN_S):
        log.warning("a flush did not finish within %g s", DRAIN_S)
