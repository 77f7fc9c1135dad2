"""model.py: the naive xenstore that test_model.py compares ours with: plain dicts, whole copies, linear searches.

Its rules are written from docs/misc/xenstore.txt and the C daemon's behaviour, not from our code, and it shares nothing
with it but the quota. It knows canonical paths only, no special nodes, and one quota for all. Bytes are counted as
domain.py says: 24 for a node, 8 for each of its permissions, 16 for an event, and all names, values and tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from xenmodel.xenstore.quota import Quota

QUOTA = Quota(nodes=5, watches=3, transactions=2, node_permissions=2, transaction_nodes=7, memory=0, soft_memory=0)
ANYBODY = 0x7FF5


class Entry(NamedTuple):
    value: bytes
    perms: tuple[str, ...]
    children: tuple[str, ...]
    stamp: int
    counted: int  # permissions when it was written: those of a domain that died since cost what they cost

    def cost(self, path: str) -> int:
        return 24 + len(path) + 8 * self.counted + len(self.value) + sum(len(name) + 1 for name in self.children)


class Event(NamedTuple):
    path: str
    token: str
    watched: frozenset[str]  # by watches of one connection with the same token
    cause: tuple[int, int] | None  # domain and number of the request


Db = dict[str, Entry]


class Refused(Exception):
    """The model's XsError."""


def above(path: str) -> str:
    return path.rsplit("/", 1)[0] or "/"


def below(path: str, name: str) -> str:
    return f"{path.rstrip('/')}/{name}"


def owner(perms: tuple[str, ...]) -> int:
    return int(perms[0][1:])


class Trans:
    """A transaction: every node it looked at, as it was at the first look and as the transaction has it now."""

    def __init__(self) -> None:
        self.seen: dict[str, Entry | None] = {}
        self.now: dict[str, Entry | None] = {}
        self.events: dict[str, bool] = {}
        self.failed = False

    def nodes(self, which: dict[str, Entry | None]) -> Db:
        return {path: entry for path, entry in which.items() if entry is not None}

    def growth(self, domid: int) -> int:
        return count(self.nodes(self.now), domid) - count(self.nodes(self.seen), domid)

    def memory(self) -> int:
        missed = sum(24 + len(path) for path, entry in self.seen.items() if entry is None)  # looked for in vain
        return missed + sum(entry.cost(path) for path, entry in self.nodes(self.now).items())


def count(db: Db, domid: int) -> int:
    return sum(owner(entry.perms) == domid for entry in db.values())


class Model:
    """Plain dicts, whole copies, linear searches."""

    def __init__(self) -> None:
        self.stamp = 0
        self.db: Db = {"/": self.entry(b"", ("n0",))}
        self.open: list[tuple[str, Trans]] = []
        self.watches: list[tuple[str, str, str]] = []  # user, path, token
        self.queues: dict[str, list[Event]] = {}
        self.targets: dict[int, int] = {}
        self.cause: tuple[int, int] | None = None  # of the request being served
        for path in ("/tool", "/tool/xenstored"):
            self.add(None, path, b"", ("n0",))

    def entry(self, value: bytes, perms: tuple[str, ...], children: tuple[str, ...] = ()) -> Entry:
        self.stamp += 1
        return Entry(value, perms, children, self.stamp, len(perms))

    # --- looking and putting -----------------------------------------------------------------------------------------

    def look(self, domid: int, tx: Trans | None, path: str) -> Entry | None:
        if tx is None:
            return self.db.get(path)
        if path not in tx.now:
            if domid and len(tx.seen) >= QUOTA.transaction_nodes:
                self.spoil(tx)
            tx.seen[path] = tx.now[path] = self.db.get(path)
        return tx.now[path]

    def put(self, tx: Trans | None, path: str, entry: Entry | None) -> None:
        if tx is not None:
            assert path in tx.seen
            tx.now[path] = entry
        elif entry is None:
            del self.db[path]
        else:
            self.db[path] = entry

    def add(self, tx: Trans | None, path: str, value: bytes, perms: tuple[str, ...]) -> None:
        parent = self.look(0, tx, above(path))
        assert parent is not None
        name = path.rsplit("/", 1)[1]
        children = parent.children if name in parent.children else (*parent.children, name)
        self.put(tx, above(path), self.entry(parent.value, parent.perms, children))
        self.put(tx, path, self.entry(value, perms))

    def subtree(self, domid: int, tx: Trans | None, path: str) -> list[str]:
        """Children before their parents."""
        entry, found = self.look(domid, tx, path), []
        for name in entry.children if entry else ():
            found += self.subtree(domid, tx, below(path, name))
        return [*found, path]

    def cut(self, tx: Trans | None, path: str, doomed: list[str]) -> None:
        for each in doomed:
            self.put(tx, each, None)
        parent = self.look(0, tx, above(path))
        if parent is not None:
            name = path.rsplit("/", 1)[1]
            children = tuple(child for child in parent.children if child != name)
            self.put(tx, above(path), self.entry(parent.value, parent.perms, children))

    # --- permissions -------------------------------------------------------------------------------------------------

    def rights(self, perms: tuple[str, ...], domid: int) -> str:
        """What a domain may, of r, w and o (owns)."""
        me = (domid, ANYBODY, self.targets.get(domid))
        if domid == 0 or owner(perms) in me:
            return "rwo"
        mine = [perm[0] for perm in perms[1:] if int(perm[1:]) in me] + [perms[0][0]]
        return {"n": "", "r": "r", "w": "w", "b": "rw"}[mine[0]]

    def find(self, domid: int, tx: Trans | None, path: str, letters: str) -> Entry | None:
        found = self.look(domid, tx, path)
        if found and set(letters) <= set(self.rights(found.perms, domid)):
            return found
        closest, at = None, path
        while closest is None and at != "/":
            at = above(at)
            closest = self.look(domid, tx, at)
        if found or closest is None or not set(letters) & set(self.rights(closest.perms, domid)):
            raise Refused("EACCES")
        return None

    def spoil(self, tx: Trans | None) -> None:
        if tx is not None:
            tx.failed = True
        raise Refused("ENOSPC")

    # --- requests ----------------------------------------------------------------------------------------------------

    def get(self, domid: int, tx: Trans | None, path: str) -> Entry:
        found = self.find(domid, tx, path, "r")
        if found is None:
            raise Refused("ENOENT")
        return found

    def write(self, domid: int, tx: Trans | None, path: str, value: bytes | None) -> None:
        """WRITE, or MKDIR if there is no value."""
        found, before = self.find(domid, tx, path, "w"), dict(self.db)
        if found is None:
            missing = [path]
            while (closest := self.look(domid, tx, above(missing[-1]))) is None:
                missing.append(above(missing[-1]))
            grown = tx.growth(domid) if tx else 0
            if domid and count(self.db, domid) + grown + len(missing) > QUOTA.nodes:
                self.spoil(tx)
            perms = (f"{closest.perms[0][0]}{domid}", *closest.perms[1:]) if domid else closest.perms
            for each in reversed(missing):
                self.add(tx, each, (value or b"") if each == path else b"", perms)
        elif value is not None:
            self.put(tx, path, self.entry(value, found.perms, found.children))
        if found is None or value is not None:
            self.happened(tx, before, {path: False})

    def remove(self, domid: int, tx: Trans | None, path: str) -> None:
        if self.find(domid, tx, path, "w") is None:
            if self.look(domid, tx, above(path)) is None:
                raise Refused("ENOENT")
            return
        if path == "/":
            raise Refused("EINVAL")
        self.look(domid, tx, above(path))
        doomed, before = self.subtree(domid, tx, path), dict(self.db)
        self.cut(tx, path, doomed)
        self.happened(tx, before, {each: each != path for each in doomed})

    def set_perms(self, domid: int, tx: Trans | None, path: str, perms: tuple[str, ...]) -> None:
        if domid and len(perms) > QUOTA.node_permissions:
            self.spoil(None)
        found = self.find(domid, tx, path, "wo")
        if found is None:
            raise Refused("ENOENT")
        if domid and owner(perms) != owner(found.perms):
            raise Refused("EPERM")
        before = dict(self.db)
        self.put(tx, path, self.entry(found.value, perms, found.children))
        self.happened(tx, before, {path: False})

    def commit(self, domid: int, tx: Trans) -> None:
        if tx.failed:
            raise Refused("ENOMEM")
        growth = tx.growth(domid)
        if domid and growth > 0 and count(self.db, domid) + growth > QUOTA.nodes:
            raise Refused("ENOSPC")
        for path, then in tx.seen.items():
            now = self.db.get(path)
            if (then and then.stamp) != (now and now.stamp):
                raise Refused("EAGAIN")
        for path, then in tx.seen.items():
            now = tx.now[path]
            if now is None:
                self.db.pop(path, None)
            elif then is None or then.stamp != now.stamp:
                self.db[path] = self.entry(now.value, now.perms, now.children)
            if path in tx.events:  # told before what comes behind it is there
                self.tell(path, tx.events[path], tx.nodes(tx.seen), ())

    def release(self, domid: int) -> None:
        users = {user for user in self.queues if int(user[0]) == domid}
        self.open = [(user, tx) for user, tx in self.open if user not in users]
        self.watches = [watch for watch in self.watches if watch[0] not in users]
        for user in users:
            self.queues[user].clear()
        before, events = dict(self.db), {}
        for path in self.topmost(domid, "/"):
            if path == "/":
                self.db["/"] = self.entry(self.db["/"].value, ("n0",), self.db["/"].children)
                events[path] = False
            else:
                doomed = self.subtree(0, None, path)
                events |= {each: each != path for each in doomed}
                self.cut(None, path, doomed)
        self.happened(None, before, events)
        self.targets = {who: whom for who, whom in self.targets.items() if domid not in (who, whom)}
        self.forget(self.db, domid)
        for _, tx in self.open:
            self.forget(tx.seen, domid)
            self.forget(tx.now, domid)
        for queue in self.queues.values():  # what the dead one's requests caused is nobody's
            queue[:] = [event._replace(cause=None) if event.cause and event.cause[0] == domid else event for event in queue]

    def topmost(self, domid: int, path: str) -> list[str]:
        """What a domain owns, without what is below it, in the order of a walk. The root stays, with what is there."""
        mine = owner(self.db[path].perms) == domid
        found = [path] if mine else []
        for name in self.db[path].children if path == "/" or not mine else ():
            found += self.topmost(domid, below(path, name))
        return found

    def live_update(self) -> None:
        """What is written down and read again has no permissions of the dead any more."""
        self.open.clear()
        self.db = {path: entry._replace(counted=len(entry.perms)) for path, entry in self.db.items()}

    def forget(self, entries: Db | dict[str, Entry | None], domid: int) -> None:
        """No permission outlives its domain."""
        for path, entry in entries.items():
            if entry is not None:
                first, *others = entry.perms
                first = f"{first[0]}0" if int(first[1:]) == domid else first
                kept = (first, *(perm for perm in others if int(perm[1:]) != domid))
                entries[path] = entry._replace(perms=kept)

    # --- watches -----------------------------------------------------------------------------------------------------

    def watch(self, user: str, path: str, token: str) -> None:
        if (user, path, token) in self.watches:
            raise Refused("EEXIST")
        domid = int(user[0])
        if domid and sum(int(watch[0][0]) == domid for watch in self.watches) >= QUOTA.watches:
            raise Refused("ENOSPC")
        self.watches.append((user, path, token))
        self.queue(user, Event(path, token, frozenset((path,)), None))

    def unwatch(self, user: str, path: str, token: str) -> None:
        if (user, path, token) not in self.watches:
            raise Refused("ENOENT")
        self.watches.remove((user, path, token))
        left = [e._replace(watched=e.watched - {path}) if e.token == token else e for e in self.queues[user]]
        self.queues[user] = [event for event in left if event.watched]

    def happened(self, tx: Trans | None, before: Db, events: dict[str, bool]) -> None:
        """Path -> only for watches of exactly this path. Within a transaction it happens at the commit."""
        for path, exact in events.items():
            if tx is not None:
                tx.events[path] = exact and tx.events.get(path, True)
            else:
                self.tell(path, exact, before, (above(path),))

    def tell(self, path: str, exact: bool, before: Db, parents: tuple[str, ...]) -> None:
        """Queue the event for who could read the node or one of `parents` before, or can read it or the one above now."""
        for user, watched, token in self.watches:
            inside = path == watched or (not exact and (watched == "/" or path.startswith(watched + "/")))
            domid = int(user[0])
            knew, knows = self.reads(before, domid, path, *parents), self.reads(self.db, domid, path, above(path))
            if inside and (knew or knows):
                self.queue(user, Event(path, token, frozenset((watched,)), self.cause))

    def queue(self, user: str, event: Event) -> None:
        """One that is queued already, for whichever watch, is not queued again."""
        queue = self.queues[user]
        for at, queued in enumerate(queue):
            if (queued.path, queued.token) == (event.path, event.token):
                queue[at] = queued._replace(watched=queued.watched | event.watched)
                return
        queue.append(event)

    def reads(self, db: Db, domid: int, path: str, *parents: str) -> bool:
        """Is the node there, and may the domain read it or one of its parents?"""
        return path in db and any("r" in self.rights(db[each].perms, domid) for each in (path, *parents) if each in db)

    # --- what is used ------------------------------------------------------------------------------------------------

    def usage(self, domid: int) -> tuple[int, int, int, int, int]:
        """Nodes, watches, transactions, requests with events that wait, bytes."""
        users = [user for user in self.queues if int(user[0]) == domid]
        transactions = [tx for user, tx in self.open if user in users]
        watches = [watch for watch in self.watches if watch[0] in users]
        waiting = [event for queue in self.queues.values() for event in queue]
        memory = sum(entry.cost(path) for path, entry in self.db.items() if owner(entry.perms) == domid)
        memory += sum(tx.memory() for tx in transactions)
        memory += sum(len(path) + len(token) for _, path, token in watches)
        memory += sum(16 + len(event.path) + len(event.token) for user in users for event in self.queues[user])
        causes = {event.cause for event in waiting if event.cause and event.cause[0] == domid}
        return count(self.db, domid), len(watches), len(transactions), len(causes), memory
