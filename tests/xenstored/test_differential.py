"""Goal: whatever clients ask, in whatever order, Debian's xenstored and ours answer alike and tell watchers the same.
Method: hypothesis drives both, fresh for every example, through the same requests of domain 0 (two connections over the
socket, its kernel's ring) and of three guests over their rings: small limits, overlapping transactions, bad requests,
domains that end and come back. Replies and events are compared after each step, the whole tree in the end; differences.py
has what may differ. XENFS_DIFFERENTIAL=5000 runs so many examples, others each time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from bench import realstore
from tests.xenstored.differences import EXCUSES, UNORDERED, avoided, set_limit
from tests.xenstored.rig import BAD_TX, NO_TX, Answer, Request, Twins, Tx, number, twins
from xenmodel.public.io.xs_wire import XsType
from xenmodel.xenstore.wire import join

pytestmark = pytest.mark.skipif(bool(reason := realstore.missing()), reason=reason)
EXAMPLES = int(os.environ.get("XENFS_DIFFERENTIAL", "0"))
GUESTS = (1, 2, 3)
DOMAIN_0 = st.sampled_from(["a", "b", "0"])
USERS = st.sampled_from(["a", "b", "0", "1", "2", "3", "1", "2"])
GOOD = ["/a", "/a/b", "/a/b/c", "/a/d", "/g", "/g/x", "/", "/local/domain", "/local/domain/1", "/local/domain/2"]
GOOD += [f"/local/domain/{domid}/data{rest}" for domid in (1, 2) for rest in ("", "/x")] + ["data", "data/x", "data/x/y"]
LONG = ["data/longer-than-most", "data/longer-than-most/x", "/g/longer-than-most-others"]
BAD = ["", "//", "/a/", "/a//b", "a b", "/\xff", "data/", "@x", "@releaseDomain"]
PATHS = st.sampled_from(GOOD * 5 + LONG * 3 + BAD)
MUCH = st.sampled_from(["/", "/local/domain", "@releaseDomain", "@introduceDomain"])
PERM = st.sampled_from(["n0", "r0", "b0", "n1", "r1", "b1", "w1", "n2", "b2", "r2", "r3", "b3", "n3", "b9"])
VALUES = st.sampled_from([b"", b"x", b"x\0y", b"long " * 6, b"longer " * 15])
TOKENS = st.sampled_from(["t", "u", ""])
TX = st.sampled_from([0] * 6 + [1] * 6 + [2, 2, -1])  # 0: none, -1: nobody's, otherwise that connection's n-th, if there
LIMITS = {
    "watches": (2, 5), "transactions": (2, 4), "transaction-nodes": (3, 12), "node-size": (20, 120), "permissions": (1, 4),
    "path-max": (18, 30), "outstanding": (1, 3), "nodes": (2, 8),
}  # fmt: skip
LIMIT = st.sampled_from(sorted(LIMITS)).flatmap(lambda name: st.tuples(st.just(name), st.integers(*LIMITS[name])))
LOOKS = st.sampled_from([XsType.READ, XsType.DIRECTORY, XsType.GET_PERMS])
INSIDE = st.sampled_from([XsType.RM, XsType.READ, XsType.DIRECTORY])
ABOUT_DOMAINS = st.sampled_from(
    [XsType.INTRODUCE, XsType.RELEASE, XsType.RESUME, XsType.IS_DOMAIN_INTRODUCED, XsType.GET_DOMAIN_PATH]
)
DOMIDS = st.sampled_from(["0", "1", "2", "3", "8", "32752", "x", ""])
TAKEN_APART = [
    XsType.WRITE, XsType.WATCH, XsType.UNWATCH, XsType.SET_PERMS, XsType.TRANSACTION_START, XsType.TRANSACTION_END,
    XsType.RESUME, XsType.RELEASE, XsType.SET_TARGET, XsType.INTRODUCE, XsType.DIRECTORY_PART, XsType.CONTROL,
]  # fmt: skip
MALFORMED = st.sampled_from([*map(int, TAKEN_APART), XsType.WATCH_EVENT, XsType.ERROR, 20, 27, 99, 0xFFFF])
BODIES = st.sampled_from([b"", b"\0", b"/a", b"/a\0x", b"x\0x\0x\0x\0", b"\0\0", b"9\0", b"-1\0", b"no\0", b"data\0data\0"])


class BesideDebians(RuleBasedStateMachine):
    """Each rule is one request of one connection, or something that happens to a domain."""

    def __init__(self) -> None:
        super().__init__()
        self.undo = contextlib.ExitStack()
        self.twins: Twins = self.undo.enter_context(twins(excuses=EXCUSES, unordered=UNORDERED))
        self.tx: dict[str, list[Tx]] = {}
        self.sound = False  # no step has failed

    @contextlib.contextmanager
    def step(self) -> Iterator[Twins]:
        sound, self.sound = self.sound, False
        yield self.twins
        self.sound = sound

    @initialize(limit=LIMIT, tight=st.booleans(), open_specials=st.booleans())
    def begin(self, limit: tuple[str, int], tight: bool, open_specials: bool) -> None:
        requests = [(XsType.MKDIR, join("/g")), (XsType.SET_PERMS, join("/g", "b0"))]
        if open_specials:
            requests += [(XsType.SET_PERMS, join(f"@{what}Domain", "n0", "r1", "b2")) for what in ("introduce", "release")]
        for domid in GUESTS:
            self.twins.create(domid)
            self.twins.introduce(domid)
            home = f"/local/domain/{domid}"
            for path, perms in ((home, ["n0", f"r{domid}"]), (f"{home}/data", [f"n{domid}"])):
                requests += [(XsType.MKDIR, join(path)), (XsType.SET_PERMS, join(path, *perms))]
        real, ours = self.twins.both("a", lambda client: [client.request(*request).body for request in requests])
        assert real == ours == [b"OK\0"] * len(requests)
        for name, value in (("watches", 128), ("transactions", 10), ("node-size", 2048)):
            set_limit(self.twins, name, value)
        if tight:
            set_limit(self.twins, *limit)
        self.sound = True

    def ask(self, user: str, kind: int, body: bytes, which: int = 0) -> Answer | None:
        """If that user is there, and the two can be compared."""
        tx = BAD_TX if which < 0 else NO_TX
        if 0 < which <= len(self.tx.get(user, [])):
            tx = self.tx[user][which - 1]
        request = Request(user, kind, body, tx)
        if user not in self.twins.clients or avoided(self.twins, request):
            return None
        with self.step() as pair:
            return pair.ask(request)

    # --- nodes --------------------------------------------------------------------------------------------------------

    @rule(user=USERS, path=PATHS, value=VALUES, which=TX)
    def write(self, user: str, path: str, value: bytes, which: int) -> None:
        self.ask(user, XsType.WRITE, join(path) + value, which)

    @rule(user=USERS, path=PATHS, which=TX)
    def mkdir(self, user: str, path: str, which: int) -> None:
        self.ask(user, XsType.MKDIR, join(path), which)

    @rule(user=USERS, path=PATHS, which=TX)
    def remove(self, user: str, path: str, which: int) -> None:
        self.ask(user, XsType.RM, join(path), which)

    @rule(user=USERS, path=PATHS, which=TX, kind=LOOKS)
    def look(self, user: str, path: str, which: int, kind: int) -> None:
        self.ask(user, kind, join(path), which)

    @rule(user=USERS, path=PATHS, which=TX, offset=st.sampled_from(["0", "2", "99", "-1", "x"]))
    def look_at_part(self, user: str, path: str, which: int, offset: str) -> None:
        self.ask(user, XsType.DIRECTORY_PART, join(path, offset), which)

    @rule(user=USERS, path=PATHS, which=TX, perms=st.lists(PERM, min_size=1, max_size=4))
    def set_perms(self, user: str, path: str, which: int, perms: list[str]) -> None:
        self.ask(user, XsType.SET_PERMS, join(path, *perms), which)

    @rule(user=DOMAIN_0, path=PATHS, which=TX, perms=st.lists(PERM, min_size=1, max_size=3))
    def give(self, user: str, path: str, which: int, perms: list[str]) -> None:
        self.ask(user, XsType.SET_PERMS, join(path, *perms), which)

    # --- watches and transactions -------------------------------------------------------------------------------------

    @rule(user=USERS, path=PATHS, token=TOKENS, which=TX)
    def watch(self, user: str, path: str, token: str, which: int) -> None:
        self.ask(user, XsType.WATCH, join(path, token), which)

    @rule(user=USERS, path=MUCH, token=TOKENS)
    def watch_much(self, user: str, path: str, token: str) -> None:
        self.ask(user, XsType.WATCH, join(path, token))

    @rule(user=USERS, path=PATHS, token=TOKENS)
    def unwatch(self, user: str, path: str, token: str) -> None:
        self.ask(user, XsType.UNWATCH, join(path, token))

    @rule(user=USERS, really=st.integers(0, 5))
    def reset_watches(self, user: str, really: int) -> None:
        if not really and self.ask(user, XsType.RESET_WATCHES, b""):
            self.tx[user] = []

    @rule(user=USERS, which=st.sampled_from([0, 0, 0, 0, 0, 0, 1]))
    def start(self, user: str, which: int) -> None:
        answer = self.ask(user, XsType.TRANSACTION_START, b"\0", which)
        if answer is not None and answer.ok:
            self.tx.setdefault(user, []).append(answer.tx)

    @rule(user=USERS, which=st.sampled_from([1, 1, 2]), how=st.sampled_from([b"T\0"] * 4 + [b"F\0"]))
    def ends_one(self, user: str, which: int, how: bytes) -> None:
        self.end(user, which, how)

    def end(self, user: str, which: int, how: bytes) -> None:
        if len(self.tx.get(user, [])) >= which:
            if self.ask(user, XsType.TRANSACTION_END, how, which) is None:
                self.ask(user, XsType.TRANSACTION_END, b"F\0", which)
            self.twins.torn.discard((user, self.tx[user].pop(which - 1)))

    @rule(user=USERS, paths=st.lists(PATHS, min_size=1, max_size=3), other=USERS, there=PATHS, value=VALUES, kind=INSIDE)
    def transact(self, user: str, paths: list[str], other: str, there: str, value: bytes, kind: int) -> None:
        """A whole transaction, and what somebody else does meanwhile: perhaps a conflict."""
        answer = self.ask(user, XsType.TRANSACTION_START, b"\0")
        if answer is None or not answer.ok:
            return
        self.tx.setdefault(user, []).append(answer.tx)
        which = len(self.tx[user])
        for path in paths:
            self.ask(user, XsType.WRITE, join(path) + value, which)
        self.ask(other, XsType.WRITE, join(there) + value)
        self.ask(user, kind, join(there), which)
        self.end(user, which, b"T\0")

    # --- domains ------------------------------------------------------------------------------------------------------

    @rule(user=USERS, kind=ABOUT_DOMAINS, domid=DOMIDS)
    def domain(self, user: str, kind: int, domid: str) -> None:
        whose = str(number(domid.encode()))
        begins_or_ends = kind in (XsType.INTRODUCE, XsType.RELEASE)
        if begins_or_ends and user == whose:
            return  # it would cut off its own reply
        answer = self.ask(user, kind, join(domid, "1", "1") if kind == XsType.INTRODUCE else join(domid))
        if answer is not None and answer.ok and begins_or_ends:
            self.tx.pop(whose, None)
            self.tick()

    @rule(user=DOMAIN_0, domid=st.sampled_from(["1", "2", "3"]), whom=st.sampled_from(["1", "2", "3", "8"]), value=VALUES)
    def set_target(self, user: str, domid: str, whom: str, value: bytes) -> None:
        if domid != whom:
            self.ask(user, XsType.SET_TARGET, join(domid, whom))
            self.ask(domid, XsType.WRITE, join(f"/local/domain/{whom}/data/x") + value)

    @rule(domid=st.sampled_from(GUESTS), destroy=st.booleans())
    def ends(self, domid: int, destroy: bool) -> None:
        if domid not in self.twins.real.rings or (destroy and self.twins.is_target(domid)):
            return
        with self.step() as pair:
            (pair.destroy if destroy else pair.shutdown)(domid)
        if destroy:
            self.tx.pop(str(domid), None)
            self.tick()

    @rule(domid=st.sampled_from(GUESTS), user=DOMAIN_0)
    def begins(self, domid: int, user: str) -> None:
        if domid not in self.twins.real.rings:
            self.twins.create(domid)
            self.ask(user, XsType.INTRODUCE, join(str(domid), "1", "1"))

    def tick(self) -> None:
        """See "a permission outlives its domain" in differences.py."""
        self.ask("a", XsType.WRITE, join("/tool"))

    @rule(really=st.integers(0, 5))
    def hang_up(self, really: int) -> None:
        if not really:
            with self.step() as pair:
                pair.close("b")
                pair.open("b")
            self.tx.pop("b", None)

    # --- limits, and what is wrong ------------------------------------------------------------------------------------

    @rule(limit=LIMIT)
    def limit(self, limit: tuple[str, int]) -> None:
        if limit[0] != "nodes" or not any(self.tx.get(str(domid)) for domid in GUESTS):
            with self.step() as pair:
                set_limit(pair, *limit)

    @rule(user=USERS, kind=MALFORMED, body=BODIES, which=TX)
    def malformed(self, user: str, kind: int, body: bytes, which: int) -> None:
        answer = self.ask(user, kind, body, which)
        if answer is not None and answer.ok and kind == XsType.TRANSACTION_START:
            self.tx.setdefault(user, []).append(answer.tx)

    # --- the end ------------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        with self.undo:
            if self.sound:
                self.finish()

    def finish(self) -> None:
        for user, open_ in self.tx.items():
            while open_:
                self.ask(user, XsType.TRANSACTION_END, b"F\0", 1)
                del open_[0]
        self.twins.quota("path-max", 2048, 2048)
        for domid in map(str, GUESTS):
            if domid in self.twins.clients:
                self.ask("a", XsType.CONTROL, join("quota", domid))
        self.twins.compare_trees("/")


TestBesideDebians = BesideDebians.TestCase
TestBesideDebians.settings = settings(
    max_examples=EXAMPLES or 300,
    stateful_step_count=50,
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    print_blob=bool(EXAMPLES),
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
