"""A host whose vifs come and go, for the host tests: as `xenfs up` without a mount, its toolstack on standard input.

    python -m tests.host.hotplug BRIDGE GUEST.cfg...
Says `ready`, then obeys a line at a time, and answers each with a line when it is done:
    attach DOMID VIFSPEC        detach DOMID DEVID        close DOMID DEVID (by the guest)        open DOMID DEVID
    queues DOMID DEVID          how many the two ends have agreed on
    count                       what may grow only if something leaks
    quit
"""

from __future__ import annotations

import os
import sys

import trio

from netdev.netfront import Netfront
from tests.descriptors import open_files
from xenfs.config import load_configs
from xenfs.host import World
from xenfs.network import Bridge
from xenfs.vifspec import parse_vif
from xenmodel.public.io.xenbus import XenbusState

PATIENCE_S = 10.0


def front(world: World, domid: int, devid: int) -> Netfront | None:
    device = world.guests[domid].probe.devices.get(f"/local/domain/{domid}/device/vif/{devid}")
    assert device is None or isinstance(device, Netfront)
    return device


async def until(world: World, domid: int, devid: int, up: bool) -> str:
    """Kicked by its tasks; we only look."""
    with trio.move_on_after(PATIENCE_S):
        while True:
            while world.kick():  # whoever plugs in again at once must not be faster than the host's other end
                await trio.lowlevel.checkpoint()
            device = front(world, domid, devid)
            if (device is not None and device.link_up) if up else device is None:
                return "done"
            await trio.sleep(0.005)
    device = front(world, domid, devid)
    return f"still {device.state.name if device else 'missing'}: {device.broken if device else ''}"


async def obey(world: World, words: list[str]) -> str:
    what, domid = words[0], int(words[1]) if len(words) > 1 else 0
    if what == "attach":
        back = world.toolstack.attach_vif(domid, None, parse_vif(words[2]))
        return await until(world, domid, int(back.rpartition("/")[2]), up=True)
    if what == "detach":
        gone = trio.Event()
        world.toolstack.detach_vif(domid, int(words[2]), gone.set)
        answer = await until(world, domid, int(words[2]), up=False)
        with trio.fail_after(PATIENCE_S):
            await gone.wait()
        return answer
    device = front(world, domid, int(words[2])) if what in ("close", "open", "queues") else None
    if what == "close":
        assert device is not None
        device.close()
        with trio.fail_after(PATIENCE_S):
            while device.state is not XenbusState.Closed:
                world.kick()
                await trio.sleep(0.005)
        return "done"
    if what == "open":
        assert device is not None
        device.switch_state(XenbusState.Initialising)
        return await until(world, domid, int(words[2]), up=True)
    if what == "queues":
        assert device is not None
        return str(len(device.queues))
    assert what == "count", what
    hypervisor, vifs = world.hypervisor, world.vifs
    return f"{len(open_files())} {len(vifs.backs)} {len(vifs.frames.lanes)} {len(hypervisor.domains)}"


async def serve(world: World) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.reap_network)
        nursery.start_soon(world.vifs.frames.run)
        print("ready", flush=True)
        lines = trio.lowlevel.FdStream(os.dup(0))
        rest = b""
        while b"quit\n" not in rest:
            rest += await lines.receive_some(4096) or b"quit\n"
            while not rest.startswith(b"quit\n") and b"\n" in rest:
                line, _, rest = rest.partition(b"\n")
                print(await obey(world, line.decode().split(" ", 2)), flush=True)
        nursery.cancel_scope.cancel()


def main(bridge: str, *paths: str) -> None:
    world = World()
    try:
        world.vifs.network.make_bridges([Bridge.parse(bridge)])
        for config in load_configs(paths):
            world.create(config)
            world.settle()
        world.check_connected()
        trio.run(serve, world)
    finally:
        world.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
