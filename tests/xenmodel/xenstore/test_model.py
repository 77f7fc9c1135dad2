"""Goal: whatever a few domains do to one store, it behaves like the naive store that copies everything.
Method: hypothesis drives the store and a model made of plain dicts through the same requests; answers, errors, the order
of delivered events, usage to the byte and the whole tree must agree after each, and the store finds nothing wrong with
itself."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.xenmodel.xenstore.model import QUOTA, Model, Refused, Trans
from xenmodel.types import Domid
from xenmodel.xenstore.connection import Connection
from xenmodel.xenstore.domain import Cause
from xenmodel.xenstore.errors import XsError
from xenmodel.xenstore.perms import Perm
from xenmodel.xenstore.store import Store
from xenmodel.xenstore.upkeep import problems, reload

PATHS = st.sampled_from(["/a/b", "/g", "/g/x", "/g/y", "/a", "/g/x/y", "/a/b/c", "/"])
USERS = st.sampled_from(["0", "0b", "1", "1b", "2"])
PERMS = st.lists(
    st.sampled_from(["n0", "r0", "b0", "n1", "r1", "b1", "w1", "n2", "b2", "r32757", "b32757"]), min_size=1, max_size=3
)
VALUES = st.sampled_from([b"", b"x", b"yy"])
TOKENS = st.sampled_from(["s", "t"])
TX = st.sampled_from([0, 1, 1, 2])  # 0: none, otherwise the n-th one of that connection, if there is one

Real = Callable[[Connection, str, int], object]
Naive = Callable[[Model, int, str, Trans | None], object]


class StoreAgainstModel(RuleBasedStateMachine):
    """Each rule is one request of one connection, done to both."""

    @initialize()
    def begin(self) -> None:
        self.store = Store(QUOTA)
        self.model = Model()
        self.users: dict[str, Connection] = {}
        self.tx: dict[str, list[tuple[int, Trans]]] = {}
        self.events: dict[str, list[tuple[str, str]]] = {}
        self.requests = 0
        for user in ("0", "0b", "1", "1b", "2"):
            self.connect(user)
        # Room for guests, or they would be refused nearly everything.
        for path, perms in (("/g/x", ["b0"]), ("/g", ["n1", "b2"]), ("/a/b", ["r2", "w1"]), ("/a", ["r0"])):
            self.mkdir("0", path, 0)
            self.chmod("0", path, perms, 0)
        for user, path in (("0", "/"), ("0b", "/g/x"), ("0", "/g"), ("1b", "/g"), ("2", "/"), ("2", "/g/x/y")):
            self.watch(user, path, "s")
        for user in self.users:
            self.dispatch(user, 20)
            self.start(user)

    def connect(self, user: str) -> None:
        connection = self.users[user] = self.store.connect(Domid(int(user[0])))
        events = self.events[user] = []
        connection.on_event = lambda path, token: events.append((path, token))
        self.tx[user], self.model.queues[user] = [], []

    def pick(self, user: str, which: int) -> tuple[int, Trans | None]:
        return self.tx[user][which - 1] if 0 < which <= len(self.tx[user]) else (0, None)

    def change(self, user: str, path: str, which: int, real: Real, naive: Naive) -> None:
        """Do it to both, as one request; the answers, or the names of the errors, must be the same."""
        tx, trans = self.pick(user, which)
        domid, connection = int(user[0]), self.users[user]
        cause = None
        if domid:
            self.requests += 1
            self.model.cause = (domid, self.requests)
            self.store.cause = cause = Cause(connection.record)
        asks: tuple[Callable[[], object], ...] = (
            lambda: real(connection, path, tx),
            lambda: naive(self.model, domid, path, trans),
        )
        answers: list[object] = []
        for ask in asks:
            try:
                answers.append(ask())
            except (XsError, Refused) as error:
                answers.append(error.errno.value if isinstance(error, XsError) else str(error))
        self.store.cause = self.model.cause = None
        if cause is not None:
            cause.done()
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
        trans = Trans()
        self.model.open.append((user, trans))
        self.tx[user].append((tx, trans))

    @rule(user=USERS, which=st.integers(1, 2), commit=st.sampled_from([True, True, True, False]))
    def end(self, user: str, which: int, commit: bool) -> None:
        tx, trans = self.pick(user, which)
        if trans is None:
            return
        self.tx[user].remove((tx, trans))
        self.model.open.remove((user, trans))
        self.change(
            user,
            "/",
            0,
            lambda c, p, t: c.transaction_end(tx, commit),
            lambda m, d, p, t: m.commit(d, trans) if commit else None,
        )
        if not self.tx[user]:
            self.start(user)

    @rule(user=USERS, steps=st.lists(st.tuples(st.sampled_from(["read", "write", "rm", "chmod"]), PATHS, PERMS), max_size=6))
    def transact(self, user: str, steps: list[tuple[str, str, list[str]]]) -> None:
        """A whole transaction that nobody disturbs, and what everybody hears of it."""
        for each in self.users:
            self.dispatch(each, 99)
        self.end(user, 1, False)
        for name, path, perms in steps:
            match name:
                case "read":
                    self.read(user, path, 1)
                case "write":
                    self.write(user, path, perms[0].encode(), 1)
                case "rm":
                    self.rm(user, path, 1)
                case _:
                    self.chmod(user, path, perms, 1)
        self.end(user, 1, True)
        for each in self.users:
            self.dispatch(each, 99)

    @rule(user=USERS, path=PATHS, token=TOKENS)
    def watch(self, user: str, path: str, token: str) -> None:
        self.change(user, path, 0, lambda c, p, t: c.watch(p, token), lambda m, d, p, t: m.watch(user, p, token))

    @rule(user=USERS, path=PATHS, token=TOKENS)
    def unwatch(self, user: str, path: str, token: str) -> None:
        self.change(user, path, 0, lambda c, p, t: c.unwatch(p, token), lambda m, d, p, t: m.unwatch(user, p, token))

    @rule(user=USERS, budget=st.integers(1, 20))
    def dispatch(self, user: str, budget: int) -> None:
        more = self.users[user].dispatch(budget)
        queue = self.model.queues[user]
        assert self.events[user] == [(event.path, event.token) for event in queue[:budget]], "in this order"
        del queue[:budget]
        assert more == bool(queue)
        self.events[user].clear()

    @rule(domid=st.sampled_from(["1", "2"]))
    def release(self, domid: str) -> None:
        users = [user for user in self.users if user[0] == domid]
        self.store.release(Domid(int(domid)))
        self.model.release(int(domid))
        for user in users:
            assert self.users[user].closed
            self.connect(user)
            self.start(user)

    @rule(who=st.sampled_from([1, 2]), whom=st.sampled_from([1, 2]))
    def set_target(self, who: int, whom: int) -> None:
        self.store.domains.record(Domid(who)).target = Domid(whom)
        self.model.targets[who] = whom

    @rule(really=st.sampled_from([False, False, False, True]))
    def live_update(self, really: bool) -> None:
        """Nobody can tell, once his transactions are gone."""
        if really:
            self.model.live_update()
            for user, connection in self.users.items():
                connection.abort_all()
                self.tx[user].clear()
            reload(self.store)
            for user in self.users:
                self.start(user)

    @invariant()
    def agree(self) -> None:
        dumped = {path: (value, tuple(map(str, perms))) for path, value, perms in self.store.dump()}
        assert dumped == {path: (entry.value, entry.perms) for path, entry in self.model.db.items()}
        for domid in (1, 2):
            usage = self.store.usage(Domid(domid))
            counted = (usage.nodes, usage.watches, usage.transactions, usage.outstanding, usage.memory)
            assert counted == self.model.usage(domid)
        for user, connection in self.users.items():
            assert connection.pending_events == len(self.model.queues[user])

    @invariant()
    def nothing_is_wrong_or_kept_for_nobody(self) -> None:
        assert problems(self.store) == []
        assert self.store.open_transactions == len(self.model.open)
        watches = [watch for at in self.store.watches._by_path.values() for watch in at]
        assert len(watches) == len(self.model.watches)
        for domid in (0, 1, 2):
            record = self.store.domains.record(Domid(domid))
            assert set(record.connections) == {self.users[user] for user in self.users if int(user[0]) == domid}


StoreAgainstModel.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestStoreAgainstModel = StoreAgainstModel.TestCase
