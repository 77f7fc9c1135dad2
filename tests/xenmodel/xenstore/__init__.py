"""Tests of xenmodel.xenstore, and the small language their tables are written in.

A script is one request a line, `who request arguments -> answer`:

    0 write /a 1            domain 0; without "-> answer" the answer is "ok"
    1b read /a -> EACCES    a second connection of domain 1; errors by name
    0 start t               a transaction, named t from here on
    0.t read /a -> 1        a request within it
    0 commit t -> EAGAIN
    0 events -> /a:tok      everything queued, delivered: path:token
    0 sleep 20              so many seconds pass, and what is due is done
    0 refused 1 -> nodes:2  what domain 1 was refused, how often
"""

from __future__ import annotations

import re

from xenmodel.types import Domid
from xenmodel.xenstore.connection import Connection
from xenmodel.xenstore.errors import XsError
from xenmodel.xenstore.perms import Perm
from xenmodel.xenstore.quota import Quota
from xenmodel.xenstore.store import Store
from xenmodel.xenstore.upkeep import reload

# What the toolstack makes for a domain before it runs, as far as the rules need it.
GUESTS = """
0 mkdir /local/domain/1
0 chmod /local/domain/1 n0 r1
0 mkdir /local/domain/1/data
0 chmod /local/domain/1/data n1
0 mkdir /local/domain/2
0 chmod /local/domain/2 n0 r2
0 mkdir /local/domain/2/data
0 chmod /local/domain/2/data n2
"""


class World:
    """A store and the connections and transactions that scripts name. Its clock stands still unless somebody sleeps."""

    def __init__(self, quota: Quota | None = None) -> None:
        self.now = 0.0
        self.store = Store(quota or Quota(), clock=lambda: self.now)
        self.connections: dict[str, Connection] = {}
        self.transactions: dict[str, int] = {}
        self.delivered: list[str] = []

    def connection(self, who: str) -> Connection:
        if who not in self.connections:
            connection = self.store.connect(Domid(int(re.match(r"\d+", who)[0])))  # type: ignore[index]
            connection.on_event = lambda path, token: self.delivered.append(f"{path}:{token}")
            self.connections[who] = connection
        return self.connections[who]

    def run(self, script: str) -> World:
        for line in filter(None, map(str.strip, script.splitlines())):
            request, _, expected = (part.strip() for part in line.partition("->"))
            who, operation, *arguments = request.split()
            name, _, transaction = who.partition(".")
            try:
                tx = self.transactions[transaction] if transaction else 0
                answer = self.answer(self.connection(name), operation, arguments, tx)
            except XsError as error:
                answer = error.errno.value
            assert answer == (expected or "ok"), line
        return self

    def answer(self, connection: Connection, operation: str, arguments: list[str], tx: int) -> str:
        """Do one request and say what came of it."""
        path = arguments[0] if arguments else ""
        match operation:
            case "read":
                return connection.read(path, tx).decode() or '""'
            case "ls":
                return " ".join(connection.directory(path, tx)) or "nothing"
            case "perms":
                return " ".join(map(str, connection.get_perms(path, tx)))
            case "write":
                connection.write(path, " ".join(arguments[1:]).encode(), tx)
            case "mkdir":
                connection.mkdir(path, tx)
            case "rm":
                connection.rm(path, tx)
            case "chmod":
                connection.set_perms(path, [Perm.parse(text) for text in arguments[1:]], tx)
            case _:
                return self.answer_other(connection, operation, arguments)
        return "ok"

    def answer_other(self, connection: Connection, operation: str, arguments: list[str]) -> str:
        match operation, arguments:
            case "start", [name]:
                self.transactions[name] = connection.transaction_start()
            case (("commit" | "abort"), [name]):
                connection.transaction_end(self.transactions[name], operation == "commit")
            case "watch", [path, token, *depth]:
                connection.watch(path, token, int(depth[0]) if depth else None)
            case "unwatch", [path, token]:
                connection.unwatch(path, token)
            case "reset", []:
                connection.reset_watches()
            case "close", []:
                connection.close()
            case "events", []:
                self.delivered.clear()
                while connection.dispatch():
                    pass
                return " ".join(self.delivered) or "none"
            case (("introduce" | "release" | "shutdown" | "created"), [domid]):
                getattr(self.store, operation)(Domid(int(domid)))
            case _:
                return self.answer_about(connection, operation, arguments)
        return "ok"

    def answer_about(self, connection: Connection, operation: str, arguments: list[str]) -> str:
        record = self.store.domains.record
        match operation, arguments:
            case "resume", [domid]:
                record(Domid(int(domid))).shutdown = False
            case "target", [domid, target]:
                record(Domid(int(domid))).target = Domid(int(target))
            case "sleep", [seconds]:
                self.now += float(seconds)
                self.store.timers.run()
            case "reload", []:
                reload(self.store)
            case "refused", [domid]:
                refused = record(Domid(int(domid))).refused
                return " ".join(f"{name}:{refusal.times}" for name, refusal in sorted(refused.items())) or "nothing"
            case "introduced", [domid]:
                return "yes" if connection.is_introduced(Domid(int(domid))) else "no"
            case "usage", [domid]:
                usage = self.store.usage(Domid(int(domid)))
                return f"{usage.nodes} {usage.watches} {usage.transactions}"
            case _:
                raise AssertionError(f"no request {operation} {arguments}")
        return "ok"


def run(script: str, quota: Quota | None = None) -> World:
    """A fresh store with two guests, and the script run in it."""
    return World(quota).run(GUESTS + script)
