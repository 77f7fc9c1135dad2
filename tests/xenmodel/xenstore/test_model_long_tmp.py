"""Goal: whatever a few domains do to one store, it behaves like the naive store that copies everything.
Method: hypothesis drives the store and a model made of plain dicts with whole-tree snapshots through the same
requests; answers, errors, delivered events, usage and the whole tree must agree after each."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from xenmodel.types import Domid
from xenmodel.xenstore.connection import Connection
from xenmodel.xenstore.errors import XsError
from xenmodel.xenstore.perms import Perm
from xenmodel.xenstore.quota import Quota
from xenmodel.xenstore.store import Store

QUOTA = Quota(nodes=5, watches=3, transactions=2, node_permissions=2, transaction_nodes=7)

PATHS = st.sampled_from(["/a/b", "/g", "/g/x", "/g/y", "/a", "/g/x/y", "/a/b/c", "/"])
USERS = st.sampled_from(["0", "0b", "1", "1b", "2"])
PERMS = st.lists(st.sampled_from(["n0", "r0", "b0", "n1", "r1", "b1", "w1", "n2", "b2"]), min_size=1, max_size=3)
VALUES = st.sampled_from([b"", b"x", b"yy"])
TOKENS = st.sampled_from(["s", "t"])
TX = st.sampled_from([0, 1, 1, 2])  # 0: none, otherwise the n-th one of that connection, if there is one


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
        if (
            found
            and may(found.perms, domid, letters[0])
            and (letters != "wo" or owner(found.perms) == domid or not domid)
        ):
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


class StoreAgainstModel(RuleBasedStateMachine):
    """Each rule is one request of one connection, done to both."""

    @initialize()
    def begin(self) -> None:
        self.store = Store(QUOTA)
        self.model = Model()
        self.users: dict[str, Connection] = {}
        self.tx: dict[str, list[tuple[int, Snapshot]]] = {}
        self.events: dict[str, list[tuple[str, str]]] = {}
        for user in ("0", "0b", "1", "1b", "2"):
            self.connect(user)
        # Room for guests, or they would be refused nearly everything.
        for path, perms in (("/g/x", ["b0"]), ("/g", ["n1", "b2"]), ("/a/b", ["r2", "w1"]), ("/a", ["r0"])):
            self.mkdir("0", path, 0)
            self.chmod("0", path, perms, 0)
        for user in self.users:
            self.start(user)

    def connect(self, user: str) -> None:
        connection = self.users[user] = self.store.connect(Domid(int(user[0])))
        events = self.events[user] = []
        connection.on_event = lambda path, token: events.append((path, token))
        self.tx[user] = []

    def pick(self, user: str, which: int) -> tuple[int, Snapshot | None]:
        return self.tx[user][which - 1] if 0 < which <= len(self.tx[user]) else (0, None)

    def change(self, user, path, which, real, naive):  # type: ignore[no-untyped-def]
        """Do it to both; the answers, or the names of the errors, must be the same."""
        tx, snapshot = self.pick(user, which)
        answers = []
        for ask in (
            lambda: real(self.users[user], path, tx),
            lambda: naive(self.model, int(user[0]), path, snapshot),
        ):
            try:
                answers.append(ask())
            except XsError as error:
                answers.append(error.errno.value)
            except Refused as refused:
                answers.append(str(refused))
        assert answers[0] == answers[1]

    @rule(user=USERS, path=PATHS, value=VALUES, which=TX)
    def write(self, user: str, path: str, value: bytes, which: int) -> None:
        self.change(user, path, which, lambda c, p, t: c.write(p, value, t), lambda m, d, p, t: m.write(d, t, p, value))

    @rule(user=USERS, path=PATHS, which=TX)
    def mkdir(self, user: str, path: str, which: int) -> None:
        self.change(user, path, which, lambda c, p, t: c.mkdir(p, t), lambda m, d, p, t: m.write(d, t, p, None))

    @rule(user=USERS, path=PATHS, which=TX)
    def rm(self, user: str, path: str, which: int) -> None:
        self.change(user, path, which, lambda c, p, t: c.rm(p, t), lambda m, d, p, t: m.remove(d, t, p))

    @rule(user=USERS, path=PATHS, perms=PERMS, which=TX)
    def chmod(self, user: str, path: str, perms: list[str], which: int) -> None:
        self.change(
            user,
            path,
            which,
            lambda c, p, t: c.set_perms(p, [Perm.parse(text) for text in perms], t),
            lambda m, d, p, t: m.set_perms(d, t, p, tuple(perms)),
        )

    @rule(user=USERS, path=PATHS, which=TX)
    def read(self, user: str, path: str, which: int) -> None:
        self.change(
            user,
            path,
            which,
            lambda c, p, t: (c.read(p, t), c.directory(p, t), [str(perm) for perm in c.get_perms(p, t)]),
            lambda m, d, p, t: (m.get(d, t, p).value, list(m.get(d, t, p).children), list(m.get(d, t, p).perms)),
        )

    @rule(user=USERS)
    def start(self, user: str) -> None:
        domid = user[0]
        count = sum(len(open_) for each, open_ in self.tx.items() if each[0] == domid)
        try:
            tx = self.users[user].transaction_start()
        except XsError as error:
            assert (error.errno.value, domid != "0", count) == ("ENOSPC", True, QUOTA.transactions)
            return
        assert domid == "0" or count < QUOTA.transactions
        snapshot = Snapshot(self.model.db)
        self.model.open.append(snapshot)
        self.tx[user].append((tx, snapshot))

    @rule(user=USERS, which=st.integers(1, 2), commit=st.sampled_from([True, True, True, False]))
    def end(self, user: str, which: int, commit: bool) -> None:
        tx, snapshot = self.pick(user, which)
        if snapshot is None:
            return
        self.tx[user].remove((tx, snapshot))
        self.model.open.remove(snapshot)
        self.change(
            user,
            "/",
            0,
            lambda c, p, t: c.transaction_end(tx, commit),
            lambda m, d, p, t: m.commit(d, snapshot) if commit else None,
        )
        if not self.tx[user]:
            self.start(user)

    @rule(user=USERS, path=PATHS, token=TOKENS)
    def watch(self, user: str, path: str, token: str) -> None:
        def naive(model: Model, domid: int, path: str, tx: Snapshot | None) -> None:
            if (user, path, token) in model.watches:
                raise Refused("EEXIST")
            if domid and sum(int(each[0][0]) == domid for each in model.watches) >= QUOTA.watches:
                raise Refused("ENOSPC")
            model.watches[user, path, token] = [path]

        self.change(user, path, 0, lambda c, p, t: c.watch(p, token), naive)

    @rule(user=USERS, path=PATHS, token=TOKENS)
    def unwatch(self, user: str, path: str, token: str) -> None:
        def naive(model: Model, domid: int, path: str, tx: Snapshot | None) -> None:
            if model.watches.pop((user, path, token), None) is None:
                raise Refused("ENOENT")

        self.change(user, path, 0, lambda c, p, t: c.unwatch(p, token), naive)

    @rule(user=USERS)
    def dispatch(self, user: str) -> None:
        while self.users[user].dispatch():
            pass
        expected = []
        for (each, _, token), queued in self.model.watches.items():
            if each == user:
                expected += [(path, token) for path in queued]
                queued.clear()
        assert sorted(self.events[user]) == sorted(expected)
        self.events[user].clear()

    @rule(domid=st.sampled_from(["1", "2"]))
    def release(self, domid: str) -> None:
        users = [user for user in self.users if user[0] == domid]
        for user in users:
            for _, snapshot in self.tx[user]:
                self.model.open.remove(snapshot)
        self.model.watches = {key: queued for key, queued in self.model.watches.items() if key[0] not in users}
        self.store.release(Domid(int(domid)))
        self.model.release(int(domid))
        for user in users:
            assert self.users[user].closed
            self.connect(user)
            self.start(user)

    @invariant()
    def agree(self) -> None:
        dumped = {path: (value, tuple(map(str, perms))) for path, value, perms in self.store.dump()}
        assert dumped == {path: (entry.value, entry.perms) for path, entry in self.model.db.items()}
        for domid in (1, 2):
            usage = self.store.usage(Domid(domid))
            assert usage.nodes == self.model.count(self.model.db, domid)
            assert usage.watches == sum(int(user[0]) == domid for user, _, _ in self.model.watches)
        for user, connection in self.users.items():
            queued = sum(len(paths) for (each, _, _), paths in self.model.watches.items() if each == user)
            assert connection.pending_events == queued

    @invariant()
    def nothing_is_kept_for_nobody(self) -> None:
        assert len(self.store.tree._open) == len(self.model.open)
        owned = sum(len(paths) for paths in self.store.tree.owned.values())
        assert owned == len(self.store.tree.nodes)


StoreAgainstModel.TestCase.settings = settings(max_examples=6000, stateful_step_count=80, deadline=None)
TestStoreAgainstModel = StoreAgainstModel.TestCase
