"""Goal: whatever clients ask, in whatever order, Debian's xenstored and ours answer alike and tell watchers the same.
Method: hypothesis drives both, fresh for every example, through the same requests of domain 0 (two connections over the socket,
its kernel's ring) and of three guests over their rings, with small limits, transactions that overlap, bad requests, and
domains that end and come back; replies and events are compared after each step, the whole tree in the end. What may differ is
in differences.py. XENFS_DIFFERENTIAL=5000 runs so many examples, others each time."""

from __future__ import annotations

import contextlib
import os

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from bench import realstore
from tests.xenstored.differences import EXCUSES, UNORDERED, avoided, set_limit
from tests.xenstored.rig import BAD_TX, NO_TX, Answer, Request, Twins, Tx, number, twins
from xenmodel.public.io.xs_wire import XsType
from xenmodel.xenstore.wire import join

EXAMPLES = int(os.environ.get("XENFS_DIFFERENTIAL", "0"))
GUESTS = (1, 2, 3)
USERS = st.sampled_from(["a", "b", "0", "1", "2", "3", "1", "2"])
GOOD = ["/a", "/a/b", "/a/b/c", "/a/d", "/g", "/g/x", "/", "/local/domain", "/local/domain/1", "/local/domain/2"]
GOOD += [f"/local/domain/{domid}/data{rest}" for domid in (1, 2) for rest in ("", "/x")] + ["data", "data/x", "data/x/y"]
LONG = ["data/longer-than-most", "data/longer-than-most/x", "/g/longer-than-most-others"]
BAD = ["", "//", "/a/", "/a//b", "a b", "/\xff", "data/", "@x", "@releaseDomain"]
PATHS = st.sampled_from(GOOD * 3 + LONG * 2 + BAD)
PERM = st.sampled_from(["n0", "r0", "b0", "n1", "r1", "b1", "w1", "n2", "b2", "r2", "r3", "b3", "n3", "b9"])
VALUES = st.sampled_from([b"", b"x", b"x\0y", b"long " * 6, b"longer " * 15])
TOKENS = st.sampled_from(["t", "u", ""])
TX = st.sampled_from([0, 0, 0, 1, 1, 1, 2, -1])  # 0: none, -1: nobody's, otherwise the n-th one of that connection, if there
LIMITS = {"watches": (2, 5), "transactions": (2, 4), "transaction-nodes": (3, 12), "node-size": (20, 120)}
LIMITS |= {"permissions": (1, 4), "path-max": (18, 30), "outstanding": (1, 3), "nodes": (2, 8)}
LIMIT = st.sampled_from(sorted(LIMITS)).flatmap(lambda name: st.tuples(st.just(name), st.integers(*LIMITS[name])))
LOOKS = st.sampled_from([XsType.READ, XsType.DIRECTORY, XsType.GET_PERMS])
DOMAINS = (XsType.INTRODUCE, XsType.RELEASE, XsType.RESUME, XsType.IS_DOMAIN_INTRODUCED, XsType.GET_DOMAIN_PATH)
ODD = (XsType.WATCH_EVENT, XsType.ERROR, 20, 27, 99, 0xFFFF)
MALFORMED = (XsType.WRITE, XsType.WATCH, XsType.UNWATCH, XsType.SET_PERMS, XsType.TRANSACTION_START, XsType.TRANSACTION_END)
MALFORMED += (XsType.RESUME, XsType.RELEASE, XsType.SET_TARGET, XsType.INTRODUCE, XsType.DIRECTORY_PART, XsType.CONTROL, *ODD)
BODIES = st.sampled_from([b"", b"\0", b"/a", b"/a\0x", b"x\0x\0x\0x\0", b"\0\0", b"9\0", b"-1\0", b"no\0", b"1\0", b"data\0" * 2])


class BesideDebians(RuleBasedStateMachine):
    """Each rule is one request of one connection, or something that happens to a domain."""

    def __init__(self) -> None:
        super().__init__()
        self.undo = contextlib.ExitStack()
        self.twins: Twins = self.undo.enter_context(twins(excuses=EXCUSES, unordered=UNORDERED))
        self.tx: dict[str, list[Tx]] = {}
        self.sound = False

    @initialize(limit=LIMIT, tight=st.booleans(), open_specials=st.booleans())
    def begin(self, limit: tuple[str, int], tight: bool, open_specials: bool) -> None:
        for domid in GUESTS:
            self.twins.create(domid)
            self.twins.introduce(domid)
            for path, perms in ((f"/local/domain/{domid}", ["n0", f"r{domid}"]), (f"/local/domain/{domid}/data", [f"n{domid}"])):
                self.ask("a", XsType.MKDIR, join(path))
                self.ask("a", XsType.SET_PERMS, join(path, *perms))
        self.ask("a", XsType.MKDIR, join("/g"))
        self.ask("a", XsType.SET_PERMS, join("/g", "b0"))
        if open_specials:
            for name in ("@introduceDomain", "@releaseDomain"):
                self.twins.ask(Request("a", XsType.SET_PERMS, join(name, "n0", "r1", "b2")))
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
        return self.step(lambda: self.twins.ask(request))

    def step(self, work):
        self.sound, sound = False, self.sound
        result = work()
        self.sound = sound
        return result

    # --- nodes ----------------------------------------------------------------------------------------------------------

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

    @rule(user=st.sampled_from(["a", "b", "0"]), path=PATHS, which=TX, perms=st.lists(PERM, min_size=1, max_size=3))
    def give(self, user: str, path: str, which: int, perms: list[str]) -> None:
        self.ask(user, XsType.SET_PERMS, join(path, *perms), which)

    # --- watches and transactions -----------------------------------------------------------------------------------------

    @rule(user=USERS, path=PATHS, token=TOKENS, which=TX)
    def watch(self, user: str, path: str, token: str, which: int) -> None:
        self.ask(user, XsType.WATCH, join(path, token), which)

    @rule(user=USERS, path=st.sampled_from(["/", "/local/domain", "@releaseDomain", "@introduceDomain"]), token=TOKENS)
    def watch_much(self, user: str, path: str, token: str) -> None:
        self.ask(user, XsType.WATCH, join(path, token))

    @rule(user=USERS, path=PATHS, token=TOKENS)
    def unwatch(self, user: str, path: str, token: str) -> None:
        self.ask(user, XsType.UNWATCH, join(path, token))

    @rule(user=USERS, really=st.integers(0, 7))
    def reset_watches(self, user: str, really: int) -> None:
        if not really and self.ask(user, XsType.RESET_WATCHES, b""):
            self.tx[user] = []

    @rule(user=USERS, which=st.sampled_from([0, 0, 0, 0, 1]))
    def start(self, user: str, which: int) -> None:
        answer = self.ask(user, XsType.TRANSACTION_START, b"\0", which)
        if answer is not None and answer.ok:
            self.tx.setdefault(user, []).append(answer.tx)

    @rule(user=USERS, which=st.sampled_from([1, 1, 1, 2]), how=st.sampled_from([b"T\0", b"T\0", b"T\0", b"F\0"]))
    def end(self, user: str, which: int, how: bytes) -> None:
        if len(self.tx.get(user, [])) >= which:
            self.ask(user, XsType.TRANSACTION_END, how, which)
            self.twins.torn.discard((user, self.tx[user][which - 1]))
            del self.tx[user][which - 1]

    # --- domains ------------------------------------------------------------------------------------------------------------

    @rule(user=USERS, kind=st.sampled_from(DOMAINS), domid=st.sampled_from(["0", "1", "2", "3", "8", "32752", "x", ""]))
    def domain(self, user: str, kind: int, domid: str) -> None:
        ends_a_ring = kind in (XsType.INTRODUCE, XsType.RELEASE)
        if ends_a_ring and user == str(number(domid.encode())):
            return  # would cut off its own reply
        answer = self.ask(user, kind, join(domid, "1", "1") if kind == XsType.INTRODUCE else join(domid))
        if answer is not None and answer.ok and ends_a_ring:
            self.tx.pop(str(number(domid.encode())), None)
            self.tick()

    @rule(user=USERS, domid=st.sampled_from(["1", "2", "3"]), whom=st.sampled_from(["1", "2", "3", "8"]))
    def set_target(self, user: str, domid: str, whom: str) -> None:
        if domid != whom:
            self.ask(user, XsType.SET_TARGET, join(domid, whom))

    @rule(domid=st.sampled_from(GUESTS), destroy=st.booleans())
    def ends(self, domid: int, destroy: bool) -> None:
        if domid not in self.twins.real.rings or (destroy and self.twins.is_target(domid)):
            return
        if destroy:
            self.step(lambda: self.twins.destroy(domid))
            self.tx.pop(str(domid), None)
            self.tick()
        else:
            self.step(lambda: self.twins.shutdown(domid))

    @rule(domid=st.sampled_from(GUESTS), user=st.sampled_from(["a", "b", "0"]))
    def begins(self, domid: int, user: str) -> None:
        if domid not in self.twins.real.rings:
            self.twins.create(domid)
            self.ask(user, XsType.INTRODUCE, join(str(domid), "1", "1"))

    def tick(self) -> None:
        """See "a permission outlives its domain"."""
        self.ask("a", XsType.WRITE, join("/tool"))

    @rule(really=st.integers(0, 7))
    def hang_up(self, really: int) -> None:
        if not really:
            self.step(lambda: self.twins.close("b"))
            self.twins.open("b")
            self.tx.pop("b", None)

    # --- limits, and what is wrong ----------------------------------------------------------------------------------------

    @rule(limit=LIMIT)
    def limit(self, limit: tuple[str, int]) -> None:
        name, value = limit
        if name == "nodes" and any(self.tx.get(str(domid)) for domid in GUESTS):
            return
        self.step(lambda: set_limit(self.twins, name, value))

    @rule(user=USERS, kind=st.sampled_from(MALFORMED), body=BODIES, which=TX)
    def malformed(self, user: str, kind: int, body: bytes, which: int) -> None:
        if kind in (XsType.RELEASE, XsType.INTRODUCE, XsType.RESUME) and body == b"1\0":
            return
        answer = self.ask(user, kind, body, which)
        if answer is not None and answer.ok and kind == XsType.TRANSACTION_START:
            self.tx.setdefault(user, []).append(answer.tx)

    def teardown(self) -> None:
        try:
            if self.sound:
                self.finish()
        finally:
            self.undo.close()

    def finish(self) -> None:
        for user, open_ in self.tx.items():
            while open_:
                self.ask(user, XsType.TRANSACTION_END, b"F\0", 1)
                del open_[0]
        self.twins.quota("path-max", 2048, 2048)
        for domid in map(str, GUESTS):
            if domid in self.twins.clients:
                self.ask("a", XsType.CONTROL, join("quota", domid))
        self.twins.compare_trees()


RANDOM = settings(
    max_examples=EXAMPLES or int(os.environ.get("NEX","300")),
    stateful_step_count=40,
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    print_blob=bool(EXAMPLES),
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate] if os.environ.get("NOSHRINK") else list(Phase),
    report_multiple_bugs=False,
)
BesideDebians.TestCase.settings = RANDOM


@pytest.mark.skipif(bool(reason := realstore.missing()), reason=reason)
class TestBesideDebians(BesideDebians.TestCase):
    pass
