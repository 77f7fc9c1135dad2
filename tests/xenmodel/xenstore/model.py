"""model.py: the naive xenstore that test_model.py compares ours with: plain dicts, whole copies, linear searches.

Its rules are written from docs/misc/xenstore.txt and the C daemon's behaviour, not from our code, and it shares nothing
with it but the quota. It knows canonical paths only, no special nodes, and one quota for all.
"""

from __future__ import annotations

from typing import NamedTuple

from xenmodel.xenstore.quota import Quota

QUOTA = Quota(nodes=5, watches=3, transactions=2, node_permissions=2, transaction_nodes=7)


class Entry(NamedTuple):
    value: bytes
    perms: tuple[str, ...]
    children: tuple[str, ...]
    stamp: int


Db = dict[str, Entry]


class Refused(Exception):
    """The model's XsError."""


def above(path: str) -> str:
    return path.rsplit("/", 1)[0] or "/"


def owner(perms: tuple[str, ...]) -> int:
    return int(perms[0][1:])


def may(perms: tuple[str, ...], domid: int, letters: str) -> bool:
    """Has the domain any of the rights in `letters` (o: owns)?"""
    if domid in (0, owner(perms)):
        return True
    own = [perm[0] for perm in perms[1:] if int(perm[1:]) == domid] + [perms[0][0]]
    return any(letter in {"n": "", "r": "r", "w": "w", "b": "rw"}[own[0]] for letter in letters)


class Snapshot:
    """A transaction of the model: two copies of everything."""

    def __init__(self, db: Db) -> None:
        self.base = dict(db)
        self.db = dict(db)
        self.touched: set[str] = set()
        self.events: dict[str, bool] = {}
        self.failed = False


class Model:
    """Plain dicts, whole copies, linear searches."""

    def __init__(self) -> None:
        self.stamp = 0
        self.db: Db = {"/": self.entry(b"", ("n0",))}
        self.open: list[Snapshot] = []
        self.watches: dict[tuple[str, str, str], list[str]] = {}  # user, path, token -> queued paths
        for path in ("/tool", "/tool/xenstored"):
            self.add(self.db, path, b"", ("n0",))

    def entry(self, value: bytes, perms: tuple[str, ...], children: tuple[str, ...] = ()) -> Entry:
        self.stamp += 1
        return Entry(value, perms, children, self.stamp)

    def add(self, db: Db, path: str, value: bytes, perms: tuple[str, ...]) -> None:
        parent = db[above(path)]
        name = path.rsplit("/", 1)[1]
        db[above(path)] = self.entry(parent.value, parent.perms, (*parent.children, name))
        db[path] = self.entry(value, perms)

    def look(self, domid: int, tx: Snapshot | None, path: str) -> Entry | None:
        if tx is None:
            return self.db.get(path)
        tx.touched.add(path)
        if domid and len(tx.touched) > QUOTA.transaction_nodes:
            tx.touched.discard(path)
            self.spoil(tx)
        return tx.db.get(path)

    def find(self, domid: int, tx: Snapshot | None, path: str, letters: str) -> Entry | None:
        found = self.look(domid, tx, path)
        if found and may(found.perms, domid, letters[0]) and (letters != "wo" or owner(found.perms) == domid or not domid):
            return found
        closest, at = None, path
        while closest is None and at != "/":
            at = above(at)
            closest = self.look(domid, tx, at)
        if found or closest is None or not may(closest.perms, domid, letters):
            raise Refused("EACCES")
        return None

    def spoil(self, tx: Snapshot | None) -> None:
        if tx is not None:
            tx.failed = True
        raise Refused("ENOSPC")

    def count(self, db: Db, domid: int) -> int:
        return sum(owner(entry.perms) == domid for entry in db.values())

    def growth(self, tx: Snapshot, domid: int) -> int:
        return self.count(tx.db, domid) - self.count(tx.base, domid)

    # --- requests --------------------------------------------------------------------------------------------------

    def get(self, domid: int, tx: Snapshot | None, path: str) -> Entry:
        found = self.find(domid, tx, path, "r")
        if found is None:
            raise Refused("ENOENT")
        return found

    def write(self, domid: int, tx: Snapshot | None, path: str, value: bytes | None) -> None:
        """WRITE, or MKDIR if there is no value."""
        found = self.find(domid, tx, path, "w")
        db = self.db if tx is None else tx.db
        events: dict[str, bool] = {path: False}
        before = dict(db)
        if found is None:
            missing = [path]
            while self.look(domid, tx, above(missing[-1])) is None:
                missing.append(above(missing[-1]))
            grown = self.growth(tx, domid) if tx else 0
            if domid and self.count(self.db, domid) + grown + len(missing) > QUOTA.nodes:
                self.spoil(tx)
            perms = db[above(missing[-1])].perms
            perms = (f"{perms[0][0]}{domid}", *perms[1:]) if domid else perms
            for each in reversed(missing):
                self.add(db, each, (value or b"") if each == path else b"", perms)
        elif value is not None:
            db[path] = self.entry(value, found.perms, found.children)
        else:
            events = {}
        self.tell(tx, before, events)

    def remove(self, domid: int, tx: Snapshot | None, path: str) -> None:
        if self.find(domid, tx, path, "w") is None:
            if self.look(domid, tx, above(path)) is None:
                raise Refused("ENOENT")
            return
        if path == "/":
            raise Refused("EINVAL")
        db = self.db if tx is None else tx.db
        self.look(domid, tx, above(path))
        doomed = [each for each in db if each == path or each.startswith(path + "/")]
        for each in doomed:
            self.look(domid, tx, each)
        before = dict(db)
        self.cut(db, path)
        self.tell(tx, before, {each: each != path for each in doomed})

    def cut(self, db: Db, path: str) -> None:
        for each in [each for each in db if each == path or each.startswith(path + "/")]:
            del db[each]
        parent = db[above(path)]
        name = path.rsplit("/", 1)[1]
        children = tuple(child for child in parent.children if child != name)
        db[above(path)] = self.entry(parent.value, parent.perms, children)

    def set_perms(self, domid: int, tx: Snapshot | None, path: str, perms: tuple[str, ...]) -> None:
        if domid and len(perms) > QUOTA.node_permissions:
            self.spoil(tx)
        found = self.find(domid, tx, path, "wo")
        if found is None:
            raise Refused("ENOENT")
        if domid and owner(perms) != domid:
            raise Refused("EPERM")
        db = self.db if tx is None else tx.db
        before = dict(db)
        db[path] = self.entry(found.value, perms, found.children)
        self.tell(tx, before, {path: False})

    def commit(self, domid: int, tx: Snapshot) -> None:
        if tx.failed:
            raise Refused("ENOMEM")
        for path in tx.touched:
            then, now = tx.base.get(path), self.db.get(path)
            if (then and then.stamp) != (now and now.stamp):
                raise Refused("EAGAIN")
        growth = self.growth(tx, domid)
        if domid and growth > 0 and self.count(self.db, domid) + growth > QUOTA.nodes:
            raise Refused("ENOSPC")
        before = dict(self.db)
        for path in tx.touched:
            then, now = tx.base.get(path), tx.db.get(path)
            if now is None:
                self.db.pop(path, None)
            elif then is None or then.stamp != now.stamp:
                self.db[path] = self.entry(now.value, now.perms, now.children)
        self.tell(None, before, tx.events)

    def release(self, domid: int) -> None:
        before, events = dict(self.db), {}
        for path in sorted(self.db):
            if path in self.db and owner(self.db[path].perms) == domid:
                if path == "/":
                    self.db["/"] = self.entry(self.db["/"].value, ("n0",), self.db["/"].children)
                    events[path] = False
                    continue
                for each in self.db:
                    if each == path or each.startswith(path + "/"):
                        events[each] = each != path
                self.cut(self.db, path)
        self.tell(None, before, events)
        for db in [self.db, *(copy for tx in self.open for copy in (tx.base, tx.db))]:
            for path, entry in db.items():
                first, *others = entry.perms
                first = f"{first[0]}0" if int(first[1:]) == domid else first
                kept = (first, *(perm for perm in others if int(perm[1:]) != domid))
                db[path] = entry._replace(perms=kept)

    # --- events ----------------------------------------------------------------------------------------------------

    def tell(self, tx: Snapshot | None, before: Db, events: dict[str, bool]) -> None:
        if tx is not None:
            for path, exact in events.items():
                tx.events[path] = exact and tx.events.get(path, True)
            return
        for path, exact in events.items():
            for (user, watched, _), queued in self.watches.items():
                inside = path == watched or watched == "/" or path.startswith(watched + "/")
                known = any(self.knows(db, int(user[0]), path) for db in (before, self.db))
                if (path == watched if exact else inside) and known and path not in queued:
                    queued.append(path)

    def knows(self, db: Db, domid: int, path: str) -> bool:
        return path in db and any(may(db[each].perms, domid, "r") for each in (path, above(path)))
