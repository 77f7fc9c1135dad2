"""Goal: drivers get text, checked numbers, retried transactions and callbacks, and nothing a peer writes harms them.
Method: a client of guest 1 reading what its peer, domain 0, writes."""

from __future__ import annotations

import pytest

from xenmodel.types import Domid, PeerFault
from xenmodel.xenstore.client import Client
from xenmodel.xenstore.connection import Connection
from xenmodel.xenstore.errors import XsErrno, XsError
from xenmodel.xenstore.perms import Access, Perm
from xenmodel.xenstore.store import Store


class Pair:
    """Domain 0 with a plain connection, domain 1 with a client, and a directory of domain 1's that both may use."""

    def __init__(self) -> None:
        self.store = Store()
        self.peer = self.store.connect(Domid(0))
        self.peer.write("/local/domain/1/d", b"")
        self.peer.set_perms("/local/domain/1", [Perm(Domid(0), Access.NONE), Perm(Domid(1), Access.READ)])
        self.peer.set_perms("/local/domain/1/d", [Perm(Domid(1), Access.NONE)])
        self.client = Client(self.store.connect(Domid(1)))

    def peer_writes(self, value: bytes) -> None:
        self.peer.write("/local/domain/1/d/key", value)

    def deliver(self) -> None:
        while self.client.connection.dispatch():
            pass


@pytest.fixture
def pair() -> Pair:
    return Pair()


@pytest.mark.parametrize("value", [b"", b"plain", "ä€".encode(), b"\xff\x80 latin", b"\0"])
def test_text_survives(pair: Pair, value: bytes) -> None:
    pair.peer_writes(value)
    text = pair.client.read("d/key")
    assert text is not None
    pair.client.write("d/copy", text)
    assert pair.peer.read("/local/domain/1/d/copy") == value


def test_what_is_missing(pair: Pair) -> None:
    client = pair.client
    assert client.read("d/none") is None
    assert client.read_int("d/none", 7, minimum=100) == 7
    assert client.directory("d/none") == []
    assert not client.exists("d/none")
    client.rm("d/none")
    client.rm("d/none/deeper")
    client.write("d/a", 12)
    assert client.exists("d/a") and client.read("d/a") == "12" and client.directory("d") == ["a"]
    client.rm("d/a")
    assert client.directory("d") == []


def test_what_is_forbidden_is_not_taken_for_missing(pair: Pair) -> None:
    client = pair.client
    pair.peer.write("/secret", b"")
    for request in (
        lambda: client.read("/secret"),
        lambda: client.read_int("/secret", 0),
        lambda: client.directory("/secret"),
        lambda: client.exists("/secret"),
        lambda: client.rm("/secret"),
        lambda: client.write("/secret", "x"),
        lambda: client.set_perms("/secret", [Perm(Domid(1), Access.NONE)]),
    ):
        with pytest.raises(XsError) as caught:
            request()
        assert caught.value.errno is XsErrno.EACCES


def test_permissions_can_be_set(pair: Pair) -> None:
    perms = [Perm(Domid(1), Access.NONE), Perm(Domid(2), Access.READ)]
    pair.client.set_perms("d", perms)
    assert pair.peer.get_perms("/local/domain/1/d") == perms


@pytest.mark.parametrize(("value", "number"), [(b"0", 0), (b"4294967295", 2**32 - 1), (b"007", 7), (b"0" * 19 + b"5", 5)])
def test_numbers(pair: Pair, value: bytes, number: int) -> None:
    pair.peer_writes(value)
    assert pair.client.read_int("d/key", -1) == number


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b" 1",
        b"1 ",
        b"1\n",
        b"1\0",
        b"-1",
        b"+1",
        b"0x10",
        b"1_000",
        b"1.0",
        b"ten",
        "٣".encode(),
        "²".encode(),
        b"\xff",
        b"4294967296",
        b"9" * 20,
        b"9" * 21,
        b"9" * 2000,
    ],
)
def test_what_is_not_a_number_is_the_peers_fault(pair: Pair, value: bytes) -> None:
    pair.peer_writes(value)
    with pytest.raises(PeerFault, match=r"^d/key is ") as caught:
        pair.client.read_int("d/key", 0)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("value", "fine"), [(b"1", False), (b"2", True), (b"8", True), (b"9", False)])
def test_numbers_have_a_range(pair: Pair, value: bytes, fine: bool) -> None:
    pair.peer_writes(value)
    if fine:
        assert pair.client.read_int("d/key", 0, minimum=2, maximum=8) == int(value)
    else:
        with pytest.raises(PeerFault, match=r"outside 2\.\.8"):
            pair.client.read_int("d/key", 0, minimum=2, maximum=8)


# --- transactions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conflicts", [0, 1, 15])
def test_a_conflict_is_tried_again(pair: Pair, conflicts: int) -> None:
    pair.peer_writes(b"0")
    runs = 0

    def work(tx: int) -> int:
        nonlocal runs
        runs += 1
        number = pair.client.read_int("d/key", 0, tx)
        if runs <= conflicts:
            pair.peer_writes(str(number + 10).encode())
        pair.client.write("d/key", number + 1, tx)
        return number

    assert pair.client.transact(work) == 10 * conflicts
    assert runs == conflicts + 1
    assert pair.client.read("d/key") == str(10 * conflicts + 1)


def test_but_not_for_ever(pair: Pair) -> None:
    runs = 0

    def work(tx: int) -> None:
        nonlocal runs
        runs += 1
        pair.client.write("d/key", runs, tx)
        pair.peer_writes(b"mine")

    with pytest.raises(XsError, match="conflicts 3 times") as caught:
        pair.client.transact(work, attempts=3)
    assert (caught.value.errno, runs) == (XsErrno.EAGAIN, 3)
    assert pair.client.read("d/key") == "mine"
    assert pair.store.usage(Domid(1)).transactions == 0


class Interrupted(BaseException):
    """Stands for a cancellation."""


@pytest.mark.parametrize("exception", [ValueError("ours"), PeerFault("theirs"), Interrupted()])
@pytest.mark.parametrize("ends_first", [False, True])
def test_an_exception_aborts(pair: Pair, exception: BaseException, ends_first: bool) -> None:
    def work(tx: int) -> None:
        pair.client.write("d/key", "half", tx)
        if ends_first:
            pair.client.connection.reset_watches()
        raise exception

    with pytest.raises(type(exception)) as caught:
        pair.client.transact(work)
    assert caught.value is exception
    assert not pair.client.exists("d/key")
    assert pair.store.usage(Domid(1)).transactions == 0


def test_an_error_of_the_work_is_not_tried_again(pair: Pair) -> None:
    runs = 0

    def work(tx: int) -> None:
        nonlocal runs
        runs += 1
        pair.client.write("/secret", "x", tx)

    with pytest.raises(XsError) as caught:
        pair.client.transact(work)
    assert (caught.value.errno, runs) == (XsErrno.EACCES, 1)


def test_an_error_of_the_commit_other_than_a_conflict_is_not_tried_again(pair: Pair) -> None:
    runs = 0

    def work(tx: int) -> None:
        nonlocal runs
        runs += 1
        with pytest.raises(XsError, match="ENOSPC"):
            pair.client.write("d/key", "x" * 3000, tx)

    with pytest.raises(XsError) as caught:
        pair.client.transact(work)
    assert (caught.value.errno, runs) == (XsErrno.ENOMEM, 1)


# --- watches -------------------------------------------------------------------------------------------------------


def test_callbacks(pair: Pair) -> None:
    first: list[str] = []
    second: list[str] = []
    token = pair.client.watch("d", first.append)
    pair.client.watch("d", second.append)
    assert (first, second) == ([], []), "only dispatch() calls back"
    pair.deliver()
    assert (first, second) == (["d"], ["d"])
    pair.peer_writes(b"1")
    pair.client.unwatch(token)
    pair.deliver()
    assert (first, second) == (["d"], ["d", "d/key"])
    with pytest.raises(XsError) as caught:
        pair.client.unwatch(token)
    assert caught.value.errno is XsErrno.ENOENT


def test_a_callback_may_end_its_watch_and_another(pair: Pair) -> None:
    seen: list[str] = []
    tokens: list[str] = []

    def callback(path: str) -> None:
        seen.append(path)
        for token in tokens:
            pair.client.unwatch(token)
        tokens.clear()

    tokens += [pair.client.watch("d", callback), pair.client.watch("d/key", callback)]
    pair.peer_writes(b"1")
    pair.deliver()
    assert seen == ["d"]


def test_a_refused_watch_leaves_nothing(pair: Pair) -> None:
    with pytest.raises(XsError):
        pair.client.watch("not a path", lambda path: None)
    assert not pair.client.connection.watches


def test_watches_made_beside_the_client_do_not_disturb_it(pair: Pair) -> None:
    seen: list[str] = []
    pair.client.connection.watch("d", "foreign")
    pair.client.watch("d", seen.append)
    pair.deliver()
    assert seen == ["d"]


@pytest.mark.parametrize("how", ["client", "connection", "release"])
def test_everything_can_be_undone_after_the_end(pair: Pair, how: str) -> None:
    seen: list[str] = []
    token = pair.client.watch("d", seen.append)
    match how:
        case "client":
            pair.client.close()
        case "connection":
            pair.client.connection.close()
        case _:
            pair.store.release(Domid(1))
    pair.deliver()
    if how != "client":
        pair.client.unwatch(token)
    pair.client.close()
    assert seen == []
    assert isinstance(pair.client.connection, Connection) and pair.client.connection.closed
    with pytest.raises(XsError) as caught:
        pair.client.read("d")
    assert caught.value.errno is XsErrno.EIO
