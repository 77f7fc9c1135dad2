"""What the tests of xenstored's wire side share: a hypervisor with domain 0 and guests, their clients, and a small language.

A client is a name: a domid, and a letter for further ones. `1` speaks through its domain's ring page, as a kernel does; `0`,
`0b` and `1b` through a stream without a ring, as over a socket or a device file. A script is one request a line, in the
notation of docs/misc/xenstore.txt: `|` is a NUL, `\\x2a` a byte, and what follows the type up to `->` is the body.

    0 WRITE /a|1                  domain 0; without "-> reply" the reply is OK|
    0 READ /b| -> ""              no bytes at all
    1 READ data -> EINVAL         an error is a reply of type ERROR
    0 TRANSACTION_START | -> $t   any reply that is a number, called t from here on
    0.$t READ /a| -> 1            a request within it; also 0.77, a number of nobody's
    0 #99 body -> ENOSYS          a type by its number
    0 events -> /a:tok            the events that came since the last time, in their order
    shutdown 1                    what the hypervisor does: also destroy, create; `wait 20` lets seconds pass
"""

from __future__ import annotations

import re
from collections.abc import Callable

from xenmodel.domain import Domain
from xenmodel.hypervisor import Hypervisor
from xenmodel.public.io import xs_wire
from xenmodel.public.io.xs_wire import XENSTORE_ERROR_NONE, XENSTORE_RING_SIZE, XsType
from xenmodel.ring import BytePipe
from xenmodel.types import Domid, Gref, Port
from xenmodel.xenstore.quota import Quota
from xenmodel.xenstore.upkeep import problems
from xenmodel.xenstore.wire import Message, Parser, join, pack, strings

STORE_GREF = Gref(1)  # GNTTAB_RESERVED_XENSTORE
WORD = {name: offset // 4 for name, offset in xs_wire.XENSTORE_DOMAIN_INTERFACE.offsets.items()}
TREE = [f"/local/domain/{n}{rest}|{perms}|" for n in (1, 2) for rest, perms in (("", f"n0|r{n}"), ("/data", f"n{n}"))]


def body_of(text: str) -> bytes:
    """The bytes a script's text stands for."""
    return re.sub(rb"\\x([0-9a-f]{2})", lambda m: bytes([int(m[1], 16)]), text.encode().replace(b"|", b"\0"))


def text_of(body: bytes) -> str:
    return "".join("|" if byte == 0 else chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}" for byte in body)


class Client:
    """One end of a connection: `log` has all messages that came, in their order."""

    def __init__(self) -> None:
        self.log: list[Message] = []
        self.waiting = bytearray()  # not yet with the store
        self.parser = Parser()
        self.told = 0  # events that a script has seen
        self.last = 0

    def post(self, kind: int, body: bytes = b"", tx: int = 0) -> int:
        """Send a request; its id. The body may be longer than is legal."""
        self.last += 1
        self.send(xs_wire.SOCKMSG.pack(kind, self.last, tx, len(body)) + body)
        return self.last

    def send(self, data: bytes) -> None:
        self.waiting += data
        self.push()

    def push(self) -> None:
        """Hand over what can be."""
        raise NotImplementedError

    def take(self, data: bytes) -> None:
        self.parser.feed(data)
        while (message := self.parser.next()) is not None:
            self.log.append(message)

    @property
    def events(self) -> list[str]:
        return [":".join(map(text_of, strings(m.body))) for m in self.log if m.type == XsType.WATCH_EVENT]

    def reply(self, req_id: int) -> Message | None:
        found = [m for m in self.log if m.req_id == req_id and m.type != XsType.WATCH_EVENT]
        assert len(found) < 2, f"{len(found)} replies to request {req_id}"
        return found[0] if found else None

    def bodies(self) -> list[str]:
        """All that came, for whoever knows what he asked."""
        return [text_of(message.body) for message in self.log]


class Stream(Client):
    """As over a socket: the carrier has room for everything, and takes from the client only what is wanted."""

    def __init__(self, hypervisor: Hypervisor, domid: Domid) -> None:
        super().__init__()
        self.reading = True
        self.chunk = 4096  # what a carrier reads at once
        self.peer = hypervisor.xenstored.peer(domid, self.flush)

    def push(self) -> None:
        while self.waiting and self.peer.wants_input:
            data = bytes(self.waiting[: self.chunk])
            del self.waiting[: self.chunk]
            self.peer.receive(data)
        self.flush()

    def flush(self) -> None:
        """The peer's: its `out` has grown, or it wants input again."""
        if self.reading and self.peer.out:
            data = bytes(self.peer.out)
            self.take(data)
            self.peer.sent(len(data))
        if self.waiting and self.peer.wants_input:
            self.push()

    def read_on(self, reading: bool = True) -> None:
        self.reading = reading
        self.flush()


class Guest(Client):
    """A guest's kernel: its page, granted with the reserved reference, and its event channel."""

    def __init__(self, hypervisor: Hypervisor, domain: Domain) -> None:
        super().__init__()
        self.hypervisor, self.domain = hypervisor, domain
        self.reading = True
        self.deaf = False  # does not look at its page
        pfn = domain.memory.allocate()
        domain.grants.set_entry(STORE_GREF, Domid(0), pfn)
        self.page = domain.memory.run(pfn)
        self.words = self.page.cast("I")
        size = XENSTORE_RING_SIZE
        self.requests = BytePipe(self.page[:size], self.words, WORD["req_cons"], WORD["req_prod"])
        self.responses = BytePipe(self.page[size : 2 * size], self.words, WORD["rsp_cons"], WORD["rsp_prod"])
        self.notified = 0
        self.port = domain.events.alloc_unbound(Domid(0), self._event)

    def __getitem__(self, name: str) -> int:
        return self.words[WORD[name]]

    def __setitem__(self, name: str, value: int) -> None:
        self.words[WORD[name]] = value

    def start_at(self, index: int) -> None:
        """As if so many bytes had gone both ways; the ring must be empty."""
        for name in ("req_cons", "req_prod", "rsp_cons", "rsp_prod"):
            self[name] = index

    def kick(self) -> None:
        self.domain.events.send(self.port)

    def push(self) -> None:
        count = self.requests.write(self.waiting)
        del self.waiting[:count]
        if count:
            self.kick()

    def read_on(self, reading: bool = True) -> None:
        self.reading = reading
        self._event(self.port)

    def _event(self, _port: Port) -> None:
        self.notified += 1
        if self.deaf or self["error"] != XENSTORE_ERROR_NONE:
            return
        if self.reading and (data := self.responses.read()):
            self.take(data)
            self.kick()  # there is room
        self.push()

    def forget(self) -> None:
        """What a kernel does when it asks for a reconnection: the stream begins anew."""
        self.waiting.clear()
        self.parser = Parser()


class World:
    """Domain 0 and guests 1 and 2, which are introduced and have a home that they may read with a `data` of their own."""

    def __init__(self, quota: Quota | None = None, order: Callable[[int], int] | None = None) -> None:
        self.now = 0.0
        self.hypervisor = Hypervisor(order, quota, lambda: self.now)
        self.daemon, self.store = self.hypervisor.xenstored, self.hypervisor.store
        self.daemon.log = lambda line: self.lines.append(line)
        self.lines: list[str] = []
        self.names: dict[str, int] = {}
        self.clients: dict[str, Client] = {}
        self.dom0 = self.hypervisor.create_domain(4, "Domain-0", 0)
        for line in TREE:
            path = line.partition("|")[0]
            assert self.ask("0", XsType.MKDIR, join(path)).body == b"OK\0"
        for domid in (1, 2):
            self.create(domid)
        for line in TREE:
            assert self.ask("0", XsType.SET_PERMS, body_of(line)).body == b"OK\0"

    # --- domains ------------------------------------------------------------------------------------------------------

    def create(self, domid: int, introduce: bool = True) -> Guest:
        guest = Guest(self.hypervisor, self.hypervisor.create_domain(4, f"guest{domid}", domid))
        self.clients[str(domid)] = guest
        if introduce:
            reply = self.ask("0", XsType.INTRODUCE, join(str(domid), "1", str(guest.port)))
            assert reply.body == b"OK\0", reply
        return guest

    def guest(self, name: str = "1") -> Guest:
        found = self.client(name)
        assert isinstance(found, Guest)
        return found

    def stream(self, name: str = "0") -> Stream:
        found = self.client(name)
        assert isinstance(found, Stream)
        return found

    def client(self, name: str) -> Client:
        if name not in self.clients:
            match = re.match(r"\d+", name)
            assert match is not None, name
            self.clients[name] = Stream(self.hypervisor, Domid(int(match[0])))
        return self.clients[name]

    # --- time and turns -------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        self.hypervisor.settle()

    def wait(self, seconds: float) -> None:
        """Time passes, and what is due by then is done at its time, as the host does it."""
        end, timers = self.now + seconds, self.store.timers
        self.settle()
        while timers.next is not None and timers.next <= end:
            self.now = max(self.now, timers.next)
            timers.run()
            self.settle()
        self.now = end

    # --- requests -------------------------------------------------------------------------------------------------------

    def ask(self, who: str, kind: int, body: bytes = b"", tx: int = 0) -> Message:
        client = self.client(who)
        req_id = client.post(kind, body, tx)
        self.settle()
        reply = client.reply(req_id)
        assert reply is not None, f"no reply to {who}'s {kind} {body!r}"
        assert reply.tx_id == tx and reply.type in (kind, XsType.ERROR), reply
        return reply

    def run(self, script: str) -> World:
        for line in filter(None, map(str.strip, script.splitlines())):
            request, arrow, expected = (part.strip() for part in line.partition("->"))
            if (done := self._event(request)) is None:
                done = self._request(request, expected)
            assert done == (expected if arrow else "OK|"), f"{line}\n    was answered {done}"
        assert problems(self.store) == []
        return self

    def _event(self, line: str) -> str | None:
        """A line that is no request."""
        match line.split():
            case [who, "events"]:
                self.settle()
                client = self.client(who)
                seen, client.told = client.events[client.told :], len(client.events)
                return " ".join(seen) or "none"
            case ["wait", seconds]:
                self.wait(float(seconds))
            case ["create", domid]:
                self.create(int(domid), introduce=False)
            case [("shutdown" | "destroy") as what, domid]:
                getattr(self.hypervisor, f"{what}_domain")(int(domid))
                self.settle()
            case _:
                return None
        return "OK|"

    def _request(self, line: str, expected: str) -> str:
        sender, kind, *rest = line.split(maxsplit=2)
        who, _, transaction = sender.partition(".")
        tx = self.names[transaction[1:]] if transaction.startswith("$") else int(transaction or 0)
        number = int(kind[1:]) if kind.startswith("#") else XsType[kind]
        text = re.sub(r"\$(\w+)", lambda m: str(self.names.get(m[1], m[0])), rest[0] if rest else "")
        reply = self.ask(who, number, body_of(text), tx)
        answer = text_of(reply.body)
        assert (reply.type == XsType.ERROR) == bool(re.fullmatch(r"E[A-Z0-9]+", expected)), f"{line}: {reply}"
        if expected.startswith("$"):
            assert re.fullmatch(r"[1-9]\d*\|", answer), answer
            self.names[expected[1:]] = int(answer[:-1])
            return expected
        return answer.removesuffix("|") if reply.type == XsType.ERROR else answer or '""'


def run(script: str, quota: Quota | None = None) -> World:
    return World(quota).run(script)


def requests(*parts: tuple[int, bytes], first: int = 1) -> bytes:
    """Several requests in one piece."""
    return b"".join(pack(kind, first + number, 0, body) for number, (kind, body) in enumerate(parts))
