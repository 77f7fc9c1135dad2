"""xenbus.py: io/xenbus.h. The handshake of every split device, as two tables.

Rule: this file decides state changes; drivers only fill in the hooks.
Rule: nothing here knows whether the device is a disk or a network card.

A device is two directories in the store, each with a `state` that only its owner writes and the other end watches.
Tolerated, for drivers in the field do it: states that are skipped, a frontend that walks Closing, Closed before it ever
connected (Windows xenvif), Closing and Closed in either order, Connected said again (a resize), a directory that vanishes.
The order of writes is that of Linux and libxl on Xen 4.17: every switch is one transaction that reads `state`, writes it
if it differs, and leaves a directory alone that the toolstack has removed.

Whatever a device acquires (grants, ports, watches, mappings) goes on its undo stack, so that closing leaves nothing.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress

from xenmodel.domain import Domain
from xenmodel.public.errno import XEN_EINVAL
from xenmodel.public.io.xenbus import XenbusState
from xenmodel.types import Domid, OutOfResources, PeerFault
from xenmodel.xenstore.client import Client
from xenmodel.xenstore.errors import XsError

S = XenbusState


def report_error(client: Client, domid: int, node: str, fault: Exception) -> None:
    """What xenbus_dev_fatal() writes: `error/NODE/error` in the domain's home. The store may refuse it (quota)."""
    relative = node.removeprefix(f"/local/domain/{domid}/")
    with suppress(XsError):
        client.write(f"/local/domain/{domid}/error/{relative}/error", f"{XEN_EINVAL} {fault}")


class XenbusDevice:
    """One end. `node` is its directory, `peer_node` the other end's, both absolute; `client` is its domain's store.

    `when_peer_is` maps the peer's state to the method that answers it; a state that is not listed asks nothing of us.
    """

    when_peer_is: dict[XenbusState, str] = {}

    def __init__(self, domain: Domain, client: Client, node: str, peer_node: str, peer_domid: int) -> None:
        self.domain = domain
        self.client = client
        self.node = node
        self.peer_node = peer_node
        self.peer_domid = Domid(peer_domid)
        self.state = S.Initialising
        self.broken: str | None = None  # why the device was given up
        self.stopped = False  # its directory may be another device's by now: nothing is written there, or answered
        self.undo = ExitStack()
        self._watch: str | None = None

    # --- hooks -----------------------------------------------------------------------------------------------------

    def disconnect(self) -> bool:
        """Stop using the ring and start to let go. False: still busy, `drained()` will be called. Idempotent."""
        return True

    def removed(self) -> None:
        """The device is gone for good (directory removed, or closed with `online` 0)."""

    # --- what drivers call -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Watch the other end; the watch fires at once, so this also takes the first step."""
        self._watch = self.client.watch(f"{self.peer_node}/state", lambda _path: self.peer_changed())

    def stop(self) -> None:
        """Forget the device without another word in the store, now or later (its domain is being destroyed)."""
        self.stopped = True
        if self._watch is not None:
            self.client.unwatch(self._watch)
            self._watch = None
        self.disconnect()

    def fail(self, fault: PeerFault | OutOfResources | XsError) -> None:
        """The peer broke the rules, or we cannot go on: say so in `error`, close this device, and nothing else."""
        if self.broken is None:
            self.broken = str(fault)
            if not self.stopped:
                report_error(self.client, self.domain.domid, self.node, fault)
            self.switch_state(S.Closing)
        self.finish_closing()

    def drained(self) -> None:
        """A busy disconnect() has finished: close, and see whether the device went away meanwhile."""
        if self.stopped or self.state is S.Closing:
            self.finish_closing()
        self.peer_changed()

    def finish_closing(self) -> None:
        """Let go of everything, then say Closed; later, by way of drained(), if I/O is still under way."""
        if self.disconnect():
            self.switch_state(S.Closed)

    def switch_state(self, state: XenbusState) -> None:
        """One transaction: read `state`, write it if it differs; nothing if the directory is gone, or no longer ours."""
        self.state = state
        if self.stopped:
            return

        def work(tx: int) -> None:
            if self.client.read(f"{self.node}/state", tx) not in (None, str(int(state))):
                self.client.write(f"{self.node}/state", int(state), tx)

        try:
            try:
                self.client.transact(work)
            except XsError:  # a guest short of transactions can still say its state
                work(0)
        except XsError as error:
            self.broken = self.broken or f"the store refused: {error}"

    # --- the table -------------------------------------------------------------------------------------------------

    def peer_state(self) -> XenbusState:
        """The other end's state; Unknown if it has none (any more). PeerFault if it is not a state."""
        try:
            return S(self.client.read_int(f"{self.peer_node}/state", int(S.Unknown), maximum=int(S.Reconfigured)))
        except XsError:
            return S.Unknown  # a guest may not even ask below a directory that is gone (EACCES)

    def peer_changed(self) -> None:
        """The other end said something: look at what it says now (events may have been merged) and answer."""
        if self.stopped:
            return
        try:
            action = self.when_peer_is.get(self.peer_state())
            if action is not None:
                getattr(self, action)()
        except (PeerFault, OutOfResources, XsError) as fault:
            self.fail(fault)


class Frontend(XenbusDevice):
    """A frontend's side of the handshake. Hooks: negotiate(), connect(), reconfigured(), disconnect(), removed()."""

    when_peer_is = {
        S.Unknown: "_backend_gone",
        S.InitWait: "_talk_to_backend",
        S.Initialised: "_talk_to_backend",  # the backend skipped InitWait: same work
        S.Connected: "_go_live",
        S.Closing: "_backend_closed",
        S.Closed: "_backend_closed",
    }

    negotiated = S.Initialised  # what negotiate() leads to; netfront goes straight to Connected

    def negotiate(self) -> None:
        """Read what the backend offers, publish rings and ports. Then we are Initialised."""

    def connect(self) -> None:
        """The backend is Connected: read the device's properties and go live. Then we are Connected."""

    def reconfigured(self) -> None:
        """The backend said Connected when we were already: its properties may have changed (a resize)."""

    def close(self) -> None:
        """The guest closes the device: Closing, and Closed when the backend has followed or is gone."""
        if self.state in (S.Closing, S.Closed):
            return
        self.switch_state(S.Closing)
        self.peer_changed()

    def _talk_to_backend(self) -> None:
        if self.broken or self.state not in (S.Initialising, S.Closed):
            return
        if self.state is S.Closed:  # the backend went away and is back
            self.switch_state(S.Initialising)
        self.negotiate()
        self.switch_state(self.negotiated)

    def _go_live(self) -> None:
        if self.state is not S.Connected:
            self._talk_to_backend()
        if self.state is S.Connected:
            self.reconfigured()
            return
        if self.state is S.Initialised and not self.broken:
            self.connect()
            self.switch_state(S.Connected)

    def _backend_closed(self) -> None:
        going_away = self._going_away()
        if self.state in (S.Initialising, S.Closed) and not going_away:
            return  # not there yet, or not there any more: it may come (back)
        self.finish_closing()
        if self.state is S.Closed and going_away:
            self.removed()

    def _backend_gone(self) -> None:
        if self.state is not S.Initialising or not self.client.exists(self.node):  # otherwise its directory is still to come
            self._backend_closed()

    def _going_away(self) -> bool:
        """The toolstack takes the device away: `online` is 0, or our own directory is no longer there."""
        try:
            return self.client.read(f"{self.peer_node}/online") == "0" or not self.client.exists(self.node)
        except XsError:
            return True  # the backend's directory is gone: a guest may not even ask (EACCES)


class Backend(XenbusDevice):
    """A backend's side of the handshake. Hooks: offer(), ready(), connect(), disconnect(), removed()."""

    when_peer_is = {
        S.Unknown: "_frontend_gone",
        S.Initialising: "_offer",
        S.Initialised: "_connect",
        S.Connected: "_connect",  # the frontend skipped Initialised, as netfront does
        S.Closing: "_frontend_closing",
        S.Closed: "_frontend_closed",
    }

    _left_closed = False  # has the frontend been Closed ever since start()?

    def offer(self) -> None:
        """Publish the features that do not depend on the backing device. Then we are InitWait."""

    def ready(self) -> bool:
        """Is the backing device there? If not, call peer_changed() when it is."""
        return True

    def connect(self) -> None:
        """Map the frontend's rings, publish the device's properties. Then we are Connected."""

    def _offer(self) -> None:
        if self.state in (S.Connected, S.Closing):  # the frontend closed and began again before we looked
            self.finish_closing()
        if self.state is S.Closed:
            self._begin()

    def _begin(self) -> None:
        self.broken = None
        self.offer()
        self.switch_state(S.InitWait)

    def start(self) -> None:
        """The toolstack made the directories, or we are back: offer features, and watch the frontend.

        The watch comes first, though it fires later: it is refused if `frontend` is no path, and then nothing must have been
        written to our directory, or whoever looks for devices there would see a change and try again, for ever.
        """
        super().start()
        self._begin()
        with suppress(PeerFault):  # the watch will find it too
            self._left_closed = self.peer_state() is S.Closed

    def peer_state(self) -> XenbusState:
        state = super().peer_state()
        self._left_closed = self._left_closed and state is S.Closed
        return state

    def _connect(self) -> None:
        if self.state is S.InitWait and not self.broken and self.ready():
            self.connect()
            self.switch_state(S.Connected)

    def _frontend_closing(self) -> None:
        if self.state is not S.Closed:
            self.switch_state(S.Closing)

    def _frontend_closed(self) -> None:
        online = self.client.read(f"{self.node}/online") == "1"
        if self._left_closed and self.state is S.InitWait and online:
            return  # closed by our predecessor, it is yet to see that we are here
        self.finish_closing()
        if self.state is S.Closed and not online:
            self.removed()

    def _frontend_gone(self) -> None:
        self.finish_closing()
        if self.state is S.Closed:
            self.removed()
