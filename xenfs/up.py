"""up.py: `xenfs up`: build the world, mount it, serve until a signal, take everything down again.

Order at the end: unmount first, so that nothing new comes; serve what clients still hold; flush every disk; close the
devices; destroy the domains. Whatever fails on the way, the rest is still done.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

import trio

from xenfs.config import GuestConfig
from xenfs.fuse.mount import Mount, mount, set_io_flusher
from xenfs.fuse.serve import Server, sender
from xenfs.fuse.session import Session
from xenfs.host import World

log = logging.getLogger("xenfs.up")

DRAIN_S = 10.0


def say(line: str) -> None:
    """What a user, or a program that started us, waits for: flushed at once."""
    print(line, flush=True)


def up(configs: Sequence[GuestConfig], mountpoint: str, allow_other: bool | None = None) -> None:
    """Serve `configs` under `mountpoint` until SIGINT or SIGTERM. HostError or MountError if it cannot be done."""
    # 5 ms, the default, is how long a disk worker that has finished may wait for the interpreter
    sys.setswitchinterval(0.0005)
    world = World()
    world.announce = say
    try:
        for config in configs:
            world.create(config)
            world.settle()
        world.check_connected()
        if not set_io_flusher():
            log.info("not permitted to be an IO flusher (see docs/deadlocks.md)")
        mounted = mount(mountpoint, fsname="xenfs", allow_other=os.geteuid() == 0 if allow_other is None else allow_other)
        try:
            trio.run(_serve, world, mounted)
        finally:
            mounted.unmount()
            if mounted.fd >= 0:
                os.close(mounted.fd)
    finally:
        world.close()


async def _serve(world: World, mounted: Mount) -> None:
    session = Session(world.root, sender(mounted.fd), os.geteuid(), os.getegid())
    server = Server(mounted.fd, session, world.kick)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_run_server, server, nursery.cancel_scope)
        nursery.start_soon(world.reap_workers)
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            say("ready")
            async for number in signals:
                if number != signal.SIGHUP:
                    break
                world.refresh_images()
            await _finish(world, mounted)
        nursery.cancel_scope.cancel()


async def _run_server(server: Server, scope: trio.CancelScope) -> None:
    await server.run()
    scope.cancel()  # somebody unmounted us: nothing is left to serve


async def _finish(world: World, mounted: Mount) -> None:
    """Unmount (in a thread: the kernel may ask us something meanwhile), finish what is under way, flush."""
    await trio.to_thread.run_sync(mounted.unmount)
    if not await world.drain(DRAIN_S):
        log.warning("requests were still under way after %g s", DRAIN_S)
    flushed = 0
    for _, front in world.fronts():
        command = front.take(0)
        if command is not None and not front.readonly:
            command.context = front.give
            front.flush(command)
            flushed += 1
    if flushed and not await world.drain(DRAIN_S):
        log.warning("a flush did not finish within %g s", DRAIN_S)
