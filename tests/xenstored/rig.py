"""rig.py: two stores side by side, Debian's C daemon and ours: each request goes to both, and they must say the same.

A client is a name: `a`, `b` and `c` are connections of domain 0 over the socket, `0` is its kernel, over its ring; `1`, `2`
and so on are guests over theirs. Scripts are written as in tests/xenmodel/xenstore/wireworld.py (`|` is a NUL); without `->`
it does not matter what the two answer, as long as it is the same.

    a WRITE /a|1 -> OK|             both answer so
    a READ /b| -> EINVAL / ""       Debian's answers EINVAL, ours with no bytes: a difference
    a TRANSACTION_START | -> $t     called t from here on
    a.$t READ /a|                   a request within it; also a.77, a number of nobody's
    a events -> /a:t                what a was told since the last time; `none`
    a CONTROL help| -> *            whatever it is, and the two may differ
    create 1, destroy 1, shutdown 1, quota nodes 5, open c, close c

Invariant: after each step both stores are quiet: whatever a request caused has arrived, for the reply to one more request
of each connection comes behind it. What may differ comes from differences.py, as an argument.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from bench.realstore import RealXenstored, State, Stream, WireClient
from tests.xenmodel.xenstore.wireworld import body_of, text_of
from tests.xenstored.ours import OurStore
from xenmodel.public.io.xs_wire import XsType
from xenmodel.xenstore.wire import Message, join, strings

OK = b"OK\0"
BARRIER = b"0\0"  # of GET_DOMAIN_PATH, which changes nothing
REAL, OURS = 0, 1

T = TypeVar("T")
Tx = tuple[int, int]  # a transaction's number there and here
NO_TX = (0, 0)
BAD_TX = (77, 77)


# Two guests, each with a home that it may read and a `data` of its own in it.
HOMES = "".join(
    f"""
    create {domid}
    introduce {domid}
    a MKDIR /local/domain/{domid}|
    a SET_PERMS /local/domain/{domid}|n0|r{domid}|
    a MKDIR /local/domain/{domid}/data|
    a SET_PERMS /local/domain/{domid}/data|n{domid}|
    """
    for domid in (1, 2)
)


class Request(NamedTuple):
    who: str
    kind: int
    body: bytes
    tx: Tx = NO_TX

    def __str__(self) -> str:
        name = XsType(self.kind).name if self.kind in XsType.__members__.values() else f"#{self.kind}"
        return f"{self.who}{'' if self.tx == NO_TX else f'.{self.tx[REAL]}'} {name} {text_of(self.body[:200])}"


class Answer(NamedTuple):
    """The replies to one request."""

    real: Message
    ours: Message

    @property
    def ok(self) -> bool:
        return self.ours.type != XsType.ERROR

    @property
    def tx(self) -> Tx:
        """The numbers of a transaction that was started."""
        return int(self.real.body[:-1]), int(self.ours.body[:-1])


class Mismatch(AssertionError):
    """They do not agree. The text has all that was asked before."""


class Ours(Protocol):
    """Our store, where it runs."""

    @property
    def rings(self) -> Mapping[int, Stream]: ...

    def client(self) -> WireClient: ...

    def create_domain(self, domid: int) -> object: ...

    def shutdown_domain(self, domid: int) -> None: ...

    def destroy_domain(self, domid: int) -> None: ...


Excuse = Callable[["Twins", Request, Message, Message], bool]


class Twins:
    """`excuses` say for two replies to a request that differ whether they may; see differences.py, also for `unordered`."""

    def __init__(
        self, real: RealXenstored, ours: Ours, excuses: Sequence[Excuse] = (), unordered: Collection[int] = ()
    ) -> None:
        self.real, self.ours = real, ours
        self.excuses, self.unordered = excuses, unordered
        self.clients: dict[str, tuple[WireClient, WireClient]] = {}
        self.history: list[str] = []
        self.ended: set[int] = set()  # domids whose first bearer has died or was released
        self.torn: set[tuple[str, Tx]] = set()  # transactions that cannot go on
        self.stale: set[tuple[str, Tx]] = set()  # that give a node to a domain which has ended
        self.limits: dict[str, int] = {}
        self._owners: dict[tuple[str, Tx], set[int]] = {}  # to whom a transaction has given nodes
        self._targets: dict[int, set[int]] = {}  # whose targets they are or were
        self._generations: dict[tuple[bytes, str], dict[bytes, bytes]] = {}
        self.requests = self.events = 0
        self._told: dict[str, tuple[list[str], list[str]]] = {}  # events there and here, until a script asks
        self._lenient = False  # a script says that there is a difference, and which
        self.open("a")
        self.open("b")
        if 0 in ours.rings:
            self.clients["0"] = WireClient(real.rings[0]), WireClient(ours.rings[0])

    def hang_up(self) -> None:
        for clients in self.clients.values():
            for client in clients:
                client.close()

    # --- what a hypervisor and the processes of domain 0 do -------------------------------------------------------------

    def open(self, name: str) -> None:
        self.clients[name] = WireClient(self.real.socket), self.ours.client()

    def close(self, name: str) -> None:
        self.history.append(f"close {name}")
        self._told.pop(name, None)
        for client in self.clients.pop(name):
            client.close()
        self.compare("a")

    def create(self, domid: int) -> None:
        self.history.append(f"create {domid}")
        self.real.create_domain(domid)
        self.ours.create_domain(domid)

    def shutdown(self, domid: int) -> None:
        self.history.append(f"shutdown {domid}")
        self.real.shutdown_domain(domid)
        self.ours.shutdown_domain(domid)
        self.compare("a")

    def destroy(self, domid: int) -> None:
        self.history.append(f"destroy {domid}")
        self.clients.pop(str(domid), None)
        self._ended(domid)
        self.real.destroy_domain(domid)
        self.ours.destroy_domain(domid)
        self.compare("a")

    def both(self, who: str, work: Callable[[WireClient], T]) -> tuple[T, T]:
        """The same with either client of that name, and nobody waits for the others; what came of it."""
        with self._explained():
            real, ours = (work(client) for client in self.clients[who])
        for client in self.clients[who]:
            client.log.clear()
        return real, ours

    def introduce(self, domid: int) -> Answer:
        return self.ask(Request("a", XsType.INTRODUCE, join(str(domid), "1", "1")))

    def quota(self, name: str, real: int, ours: int) -> None:
        self.history.append(f"quota {name} {ours}")
        self.limits[name] = ours
        for client, value in zip(self.clients["a"], (real, ours), strict=True):
            reply = client.request(XsType.CONTROL, join("quota", "set", name, str(value)))
            assert reply.body == OK, reply
            client.log.clear()

    # --- requests ---------------------------------------------------------------------------------------------------------

    def ask(self, request: Request) -> Answer:
        """Send it to both and compare the replies and what all clients were told meanwhile."""
        self.history.append(str(request))
        self.requests += 1
        kind = request.kind
        with self._explained():
            clients = self.clients[request.who]
            ids = [client.post(kind, request.body, tx) for client, tx in zip(clients, request.tx, strict=True)]
            if kind in (XsType.INTRODUCE, XsType.RELEASE):
                for client, req_id in zip(clients, ids, strict=True):
                    _read_until(client, req_id)
                if clients[OURS].log[-1].body == clients[REAL].log[-1].body == OK:
                    self._begin_or_end(kind, number(request.body))
        logs = self.compare(request.who, request)
        answer = Answer(*(next(m for m in log if m.req_id == req_id) for log, req_id in zip(logs, ids, strict=True)))
        if kind == XsType.SET_PERMS and answer.ok and request.tx != NO_TX:
            self._owners.setdefault((request.who, request.tx), set()).add(int(strings(request.body)[1][1:]))
        elif kind == XsType.TRANSACTION_END:
            self._owners.pop((request.who, request.tx), None)
        elif kind == XsType.RESUME and answer.ok:
            self.real.set_state(number(request.body), State.EXISTS)  # the toolstack did that before it asked
        elif kind == XsType.SET_TARGET and answer.ok:
            domid, target, *_ = strings(request.body)
            self._targets.setdefault(number(domid), set()).add(number(target))
        return answer

    def _begin_or_end(self, kind: int, domid: int) -> None:
        """A domain's connection has begun, anew perhaps, or ended."""
        self.clients.pop(str(domid), None)
        if kind == XsType.INTRODUCE:
            self.clients[str(domid)] = WireClient(self.real.rings[domid]), WireClient(self.ours.rings[domid])
        else:
            self._ended(domid)

    def _ended(self, domid: int) -> None:
        self.ended.add(domid)
        self.stale |= {transaction for transaction, owners in self._owners.items() if domid in owners}
        self._targets.pop(domid, None)

    def is_target(self, domid: int) -> bool:
        return any(domid in targets for targets in self._targets.values())

    def same_generation(self, request: Request, real: bytes, ours: bytes) -> bool:
        """Is it with both the one that it was, or with both another one?"""
        seen = self._generations.setdefault((request.body.partition(b"\0")[0], f"{request.who}{request.tx}"), {})
        return seen.setdefault(real, ours) == ours and list(seen.values()).count(ours) == 1

    def compare(self, who: str, request: Request | None = None) -> tuple[list[Message], list[Message]]:
        """Wait until both are quiet; what they said, to each client the same."""
        with self._explained():
            real, ours = self._quiet(REAL, who), self._quiet(OURS, who)
        for name in real:
            for told, log in zip(self._told.setdefault(name, ([], [])), (real[name], ours[name]), strict=True):
                told.extend(shown_events(log))
            self.events += len(shown_events(real[name]))
            if not self._lenient and not self._alike(name, request, real[name], ours[name]):
                self._fail(name, real[name], ours[name])
        return real[who], ours[who]

    def _quiet(self, side: int, who: str) -> dict[str, list[Message]]:
        """What came for each client until all that was asked is done. The one that asked goes first."""
        logs: dict[str, list[Message]] = {}
        for group in ([who], [name for name in self.clients if name != who]):
            posted = [(name, self.clients[name][side]) for name in group]
            ids = [client.post(XsType.GET_DOMAIN_PATH, BARRIER) for _, client in posted]
            for (name, client), req_id in zip(posted, ids, strict=True):
                _read_until(client, req_id)
                logs[name] = client.log[:-1]
                client.log.clear()
        return logs

    def _alike(self, name: str, request: Request | None, real: list[Message], ours: list[Message]) -> bool:
        if request is not None and request.kind in self.unordered:
            real, ours = sorted(real, key=_is_reply), sorted(ours, key=_is_reply)
        if len(real) != len(ours):
            return False
        for there, here in zip(real, ours, strict=True):
            if there._replace(tx_id=0) == here._replace(tx_id=0):
                continue
            if request is None or name != request.who or not (_is_reply(there) and there.req_id == here.req_id):
                return False
            if not any(excuse(self, request, there, here) for excuse in self.excuses):
                return False
        return True

    def _fail(self, name: str, real: list[Message], ours: list[Message]) -> None:
        lines = [f"{who}: {[_shown(message) for message in log]}" for who, log in (("real", real), ("ours", ours))]
        raise Mismatch("\n".join([*self.history, f"    what {name} was told:", *lines]))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """A store that does not answer is a difference, too."""
        try:
            yield
        except (OSError, TimeoutError) as error:
            words = self.real.log.read_text(errors="replace").strip()[-300:]
            raise Mismatch("\n".join([*self.history, f"    {error!r}; the daemon said: {words}"])) from error

    # --- the whole store --------------------------------------------------------------------------------------------------

    def tree(self, side: int, *tops: str) -> dict[str, list[Message]]:
        """Every node with its value, its permissions and the names of its children, in their order."""
        found: dict[str, list[Message]] = {}
        client, waiting = self.clients["a"][side], list(tops)
        while waiting:
            path = waiting.pop()
            kinds = (XsType.READ, XsType.GET_PERMS, XsType.DIRECTORY)
            found[path] = [client.request(kind, join(path))._replace(req_id=0) for kind in kinds]
            listing = found[path][-1]
            names = strings(listing.body) if listing.type == XsType.DIRECTORY else []
            waiting += [f"{path.rstrip('/')}/{name.decode()}" for name in names]
        client.log.clear()
        return found

    def compare_trees(self, *tops: str) -> None:
        with self._explained():
            real, ours = self.tree(REAL, *tops), self.tree(OURS, *tops)
        for path in sorted(real.keys() | ours.keys()):
            there, here = real.get(path, []), ours.get(path, [])
            if not self._alike("a", Request("a", XsType.GET_PERMS, join(path)), there, here):
                self.history.append(f"in the end {path}")
                self._fail("a", there, here)

    # --- scripts ------------------------------------------------------------------------------------------------------

    def run(self, script: str) -> Twins:
        names: dict[str, Tx] = {"": NO_TX}
        for line in filter(None, map(str.strip, script.splitlines())):
            text, arrow, expected = (part.strip() for part in line.partition(" -> "))
            self._lenient = "/ " in expected or expected == "*"
            got = self._deed(text)
            if got is None:
                sender, kind, *rest = text.split(maxsplit=2)
                who, _, transaction = sender.partition(".")
                tx = names[transaction] if transaction in names else (int(transaction), int(transaction))
                code = int(kind[1:]) if kind.startswith("#") else XsType[kind]
                answer = self.ask(Request(who, code, body_of(rest[0] if rest else ""), tx))
                if expected.startswith("$"):
                    names[expected] = answer.tx
                    continue
                got = (_shown(answer.real), _shown(answer.ours))
            if arrow:
                wanted = expected.split(" / ") if " / " in expected else [expected, expected]
                right = all(want in (is_, "*") for is_, want in zip(got, wanted, strict=True))
                assert right, f"{line}\n    Debian's: {got[REAL]}\n    ours:     {got[OURS]}"
        self._lenient = False
        assert all(there == here for there, here in self._told.values()), f"not told in the script: {self._told}"
        return self

    def _deed(self, text: str) -> tuple[str, str] | None:
        """A line that is no request; what it shows."""
        match text.split():
            case [("create" | "destroy" | "shutdown" | "introduce") as what, domid]:
                getattr(self, what)(int(domid))
            case [("open" | "close") as what, name]:
                getattr(self, what)(name)
            case ["quota", name, value]:
                self.quota(name, int(value), int(value))
            case [who, "events"]:
                there, here = self._told.pop(who, ([], []))
                return " ".join(there) or "none", " ".join(here) or "none"
            case _:
                return None
        return "", ""


@contextlib.contextmanager
def twins(*options: str, excuses: Sequence[Excuse] = (), unordered: Collection[int] = ()) -> Iterator[Twins]:
    """Two fresh stores. The options are the daemon's."""
    directory = Path(tempfile.mkdtemp(prefix="twins-"))
    ours = OurStore()
    try:
        with RealXenstored(directory / "real", *options) as real, contextlib.ExitStack() as undo:
            pair = Twins(real, ours, excuses, unordered)
            undo.callback(pair.hang_up)
            yield pair
    finally:
        ours.close()
        shutil.rmtree(directory)


def write(path: str, size: int = 0) -> tuple[int, bytes]:
    """WRITE and its body, for so many bytes."""
    return XsType.WRITE, join(path) + bytes(size)


def number(body: bytes) -> int:
    """The domid a request begins with, as atoi() reads it."""
    found = re.match(rb"\s*([+-]?\d+)", body)
    return int(found[1]) if found else 0


def shown_events(log: Sequence[Message]) -> list[str]:
    return [":".join(map(text_of, strings(message.body))) for message in log if message.type == XsType.WATCH_EVENT]


def _read_until(client: WireClient, req_id: int) -> None:
    while client.next().req_id != req_id:
        pass


def _is_reply(message: Message) -> bool:
    return message.type != XsType.WATCH_EVENT


def _shown(message: Message) -> str:
    if message.type == XsType.WATCH_EVENT:
        return shown_events([message])[0]
    text = text_of(message.body)
    return text.removesuffix("|") if message.type == XsType.ERROR else text or '""'
