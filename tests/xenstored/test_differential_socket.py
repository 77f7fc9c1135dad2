"""Goal: what holds for our store in process holds for it as a server: the same answers and events as Debian's over a socket.
Method: `xenfs up` as a child; three clients of domain 0 on its socket and on that of a fresh daemon of Debian's; random
requests below one directory each, as in test_differential.py."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench import realstore
from bench.realstore import RealRing, RealXenstored, WireClient
from tests.host.served import Host
from tests.xenstored.differences import EXCUSES, UNORDERED, avoided
from tests.xenstored.rig import NO_TX, Request, Twins, Tx
from xenmodel.public.io.xs_wire import XsType
from xenmodel.xenstore.wire import join

pytestmark = [pytest.mark.host, pytest.mark.skipif(bool(reason := realstore.missing()), reason=reason)]
EXAMPLES = int(os.environ.get("XENFS_DIFFERENTIAL", "0"))
TOP, HOME = "/twins", "/local/domain/0/twins"
USERS = st.sampled_from(["a", "b", "c"])
PATHS = st.sampled_from([f"{top}{rest}" for top in (TOP, HOME, "twins") for rest in ("", "/x", "/x/y", "/z", "/z/", "//z")])
PERMS = st.lists(st.sampled_from(["n0", "r0", "b0", "n1", "r1", "b1", "w1"]), min_size=1, max_size=3)
TX = st.sampled_from([0, 0, 0, 1, 1, 2])
STEPS = st.one_of(
    st.tuples(USERS, st.just(XsType.WRITE),
              st.builds(lambda path, value: join(path) + value, PATHS, st.binary(max_size=9)), TX),
    st.tuples(USERS, st.sampled_from([XsType.MKDIR, XsType.RM, XsType.READ, XsType.DIRECTORY, XsType.GET_PERMS]),
              st.builds(join, PATHS), TX),
    st.tuples(USERS, st.just(XsType.DIRECTORY_PART), st.builds(join, PATHS, st.sampled_from(["0", "2"])), TX),
    st.tuples(USERS, st.just(XsType.SET_PERMS), st.builds(lambda path, perms: join(path, *perms), PATHS, PERMS), TX),
    st.tuples(USERS, st.sampled_from([XsType.WATCH, XsType.WATCH, XsType.UNWATCH]),
              st.builds(join, PATHS, st.sampled_from(["t", "u"])), TX),
    st.tuples(USERS, st.just(XsType.TRANSACTION_START), st.just(b"\0"), st.just(0)),
    st.tuples(USERS, st.just(XsType.TRANSACTION_END), st.sampled_from([b"T\0", b"T\0", b"T\0", b"F\0"]), TX),
    st.tuples(USERS, st.just(XsType.RESET_WATCHES), st.just(b""), st.just(0)),
)  # fmt: skip
Step = tuple[str, XsType, bytes, int]


class ServedStore:
    """Ours in another process: connections of domain 0, and nothing that a test may do to domains."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rings: dict[int, RealRing] = {}

    def client(self) -> WireClient:
        return WireClient(self.path)

    def create_domain(self, domid: int) -> None:
        raise NotImplementedError

    shutdown_domain = destroy_domain = create_domain


@pytest.fixture
def served() -> Iterator[ServedStore]:
    root = Path(tempfile.mkdtemp(prefix="xenfs-twins-", dir="/tmp"))
    host = Host(root)
    try:
        host.up(host.config("g"))
        yield ServedStore(root / "mnt.xenstored")
    finally:
        host.close()
        shutil.rmtree(root)


def test_over_the_socket(served: ServedStore) -> None:
    """Goal: see above.  Method: one server for all examples, which cleans up what the last one left."""

    @settings(
        max_examples=EXAMPLES or 300,
        deadline=None,
        derandomize=not EXAMPLES,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(STEPS, min_size=20, max_size=60))
    def compare(steps: list[Step]) -> None:
        with tempfile.TemporaryDirectory(prefix="twins-") as directory, RealXenstored(Path(directory) / "real") as real:
            real.create_domain(1)  # whom permissions may name; there is a guest 1 in ours
            pair = Twins(real, served, EXCUSES, UNORDERED)
            try:
                pair.open("c")
                _run(pair, steps)
            finally:
                pair.hang_up()

    compare()


def _run(pair: Twins, steps: list[Step]) -> None:
    setup = [(kind, join(path)) for path in (TOP, HOME) for kind in (XsType.RM, XsType.MKDIR)]
    pair.both("a", lambda client: [client.request(*request) for request in setup])
    transactions: dict[str, list[Tx]] = {}
    for user, kind, body, which in steps:
        tx = transactions.get(user, [])[which - 1 : which] if which else []
        request = Request(user, kind, body, tx[0] if tx else NO_TX)
        if avoided(pair, request):
            continue
        answer = pair.ask(request)
        if kind == XsType.TRANSACTION_START:
            transactions.setdefault(user, []).append(answer.tx)
        elif kind == XsType.RESET_WATCHES:
            transactions[user] = []
        elif kind == XsType.TRANSACTION_END and tx:
            transactions[user].remove(tx[0])
    pair.compare_trees(TOP, HOME)
