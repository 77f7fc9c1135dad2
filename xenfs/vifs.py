"""vifs.py: the vifs of a host: their drivers with an interface each, plugged in as Xen's scripts do, and their frames.

World owns one of these and puts its makers into the buses' tables. Everything a driver asks of the host's network goes
through Network; everything that moves frames through Frames.
"""

from __future__ import annotations

from collections.abc import Callable

from netdev.link import MOST_MTU, MOST_QUEUES
from netdev.netback import Netback
from netdev.netfront import Netfront, Want
from netdev.tap import Tap
from xenfs.config import GuestConfig
from xenfs.frames import Frames
from xenfs.network import Network
from xenfs.probe import Make
from xenfs.toolstack import HotplugDone, Toolstack
from xenmodel.domain import Domain
from xenmodel.types import PeerFault
from xenmodel.xenstore.client import Client
from xenmodel.xenstore.errors import shown


class Vifs:
    """`announce` says a line to the user."""

    def __init__(self, toolstack: Toolstack, kick: Callable[[], bool], announce: Callable[[str], None]) -> None:
        self.network = Network()
        self.backs: dict[str, Netback] = {}  # by backend directory
        self.frames = Frames(kick, self.backs.values)
        self._mtus: dict[Tap, int] = {}  # as last set, of the guests' interfaces
        self._announcing: set[Tap] = set()  # whose addresses are being asked for
        self.toolstack = toolstack
        self.announce = announce
        toolstack.hotplug_vif = self._plug

    def maker(self, config: GuestConfig) -> Make:
        """What makes the frontends of one guest."""

        def make(domain: Domain, client: Client, node: str, peer: str, domid: int) -> Netfront:
            # what configures the host is believed of domain 0 only: another backend's directory is its guest's to write
            ours = domid == 0 and peer.startswith("/local/domain/0/")
            queues = client.read_int(f"{peer}/xenfs-queues", 1, minimum=1, maximum=MOST_QUEUES) if ours else 1
            want = Want(queues=queues)
            addresses = (client.read(f"{peer}/ip") or "").split() if ours else []
            front = Netfront(domain, client, node, peer, domid, lambda plug: self.network.open_front(config, plug), want)
            tap = _tap(front)

            def ready(result: object) -> None:
                if isinstance(result, Exception) and not front.gone:
                    front.fail(PeerFault(str(result)))

            self._mtus[tap] = front.mtu
            self.network.set_up_front(tap, front.mtu, addresses, ready)
            self._serve(front)
            return front

        return make

    def make_back(self, domain: Domain, client: Client, node: str, peer: str, domid: int) -> Netback:
        back = Netback(domain, client, node, peer, domid, self.network.open_back, self.frames.clock)
        back.on_deadline = self.frames.deadline_changed
        self.backs[node] = back
        self._serve(back)
        return back

    def _serve(self, device: Netfront | Netback) -> None:
        """Move its frames, until its interface is closed: then the descriptors may be other files in a moment."""
        tap = _tap(device)
        self.frames.add(device, [lane.fd for lane in tap.lanes])

        def closing() -> None:
            self.frames.remove(device)
            self.backs.pop(device.node, None)
            self._mtus.pop(tap, None)

        tap.before_close = closing

    def changed(self, guest: str, front: Netfront) -> None:
        """A frontend's link came or went: when it came, say so to the user and to its neighbours."""
        tap = _tap(front)
        if not front.link_up:
            return
        if self._mtus.get(tap) != front.mtu:  # not each time: a user may have set another one since
            self._mtus[tap] = front.mtu
            self.network.set_mtu(tap, front.mtu)
        if tap in self._announcing:  # a backend that flaps costs one job at a time
            return
        where = f" in network namespace {tap.namespace}" if tap.namespace else ""
        bridge = _plain(self.toolstack.client.read(f"{front.peer_node}/bridge"))
        self.announce(f"{guest} {tap.name}: {front.mac.hex(':')}{where}, bridge {bridge}, connected")

        def known(frames: object) -> None:
            self._announcing.discard(tap)
            if isinstance(frames, list):
                front.announce(frames)  # in vain if it was disconnected meanwhile

        self._announcing.add(tap)
        self.network.announcements(tap, known)

    def close(self) -> None:
        """When all drivers are gone."""
        self.network.close()
        self.frames.close()

    def _plug(self, node: str, done: HotplugDone) -> None:
        """The vif script: the backend's interface onto its bridge. In a worker; `done` comes later, from the loop."""
        back, read = self.backs.get(node), self.toolstack.client.read
        if back is None:
            done("the backend is gone")
            return
        try:
            mtu = self.toolstack.client.read_int(f"{node}/mtu", 0, maximum=MOST_MTU) or None
        except PeerFault as fault:
            done(str(fault))
            return

        def plugged(result: object) -> None:
            if isinstance(result, int):
                done(None, result)
            else:
                done(str(result))

        self.network.online(_tap(back), read(f"{node}/bridge") or "", mtu, plugged)


def _plain(text: str | None) -> str:
    """As a user's terminal may get it: what lies in the store may be no text, or do things to a terminal."""
    return text if text is not None and text.isprintable() else shown(text)


def _tap(device: Netfront | Netback) -> Tap:
    assert isinstance(device.port, Tap), f"{device.node} has an interface that is no TAP"
    return device.port
