"""Goal: a store that breaks the protocol, or is not there, costs the blocking client one clear error in bounded time.
Method: scripted servers behind a Unix socket, and paths of all kinds."""

from __future__ import annotations

import contextlib
import os
import socket
import threading

import pytest

from tests.xenfs.storepeers import TIMEOUT_S, Script, event, refuse, reply
from xenfs import storeclient
from xenfs.storeclient import StoreClient, StoreError
from xenmodel.public.io.xs_wire import SOCKMSG, XsType
from xenmodel.xenstore.wire import Message, pack


def close(message: Message) -> bytes:
    raise EOFError


def in_parts(body: bytes) -> Script:
    return lambda m: refuse(m, "E2BIG") if m.type == XsType.DIRECTORY else reply(m, body)


FAULTS: dict[str, tuple[Script, str]] = {
    "closes": (close, "it has closed the connection"),
    "says nothing": (lambda m: b"", "no answer within 0.2 s"),
    "says half": (lambda m: reply(m)[:-1], "no answer within 0.2 s"),
    "talks of other things": (lambda m: event("/a", "t") * 5, "no answer within 0.2 s"),
    "says too much": (lambda m: SOCKMSG.pack(XsType.READ, m.req_id, 0, 4097), "a message of 4097 bytes"),
    "answers another": (lambda m: reply(m._replace(req_id=m.req_id + 1)), "something that was not asked"),
    "answers twice": (lambda m: reply(m) * 2, "something that was not asked"),
    "answers otherwise": (lambda m: reply(m, kind=XsType.RM), "something that was not asked"),
    "event without token": (lambda m: pack(XsType.WATCH_EVENT, 0, 0, b"/a\0"), "an event without a token"),
    "too many events": (lambda m: event("/", "") * 10_001, "10000 events that nobody wants"),
    "name with slash": (lambda m: reply(m, b"a\0b/c\0"), "names of the children of /a"),
    "name of nothing": (lambda m: reply(m, b"a\0\0"), "names of the children of /a"),
    "name with colours": (lambda m: reply(m, b"\x1b[31m\0"), "names of the children of /a"),
    "name twice": (lambda m: reply(m, b"a\0a\0"), "names of the children of /a"),
    "name without end": (lambda m: reply(m, b"a"), "names of the children of /a"),
    "part without end": (in_parts(b"1\0a\0b"), "parts of the children of /a"),
    "part without generation": (in_parts(b"a\0\0"), "parts of the children of /a"),
    "part of nothing": (in_parts(b"1\0"), "parts of the children of /a"),
    "no permissions": (lambda m: reply(m, b""), "/a has no permissions"),
    "bad permission": (lambda m: reply(m, b"x7\0"), "permissions of /a are wrong: 'x7' is not"),
    "transaction zero": (lambda m: reply(m, b"0\0"), "calls a transaction b'0'"),
    "transaction too large": (lambda m: reply(m, b"4294967296\0"), "calls a transaction b'4294967296'"),
    "transaction without number": (lambda m: reply(m, b"-1\0"), "calls a transaction b'-1'"),
}


def provoke(client: StoreClient, name: str) -> None:
    if "permission" in name:
        client.get_perms("/a")
    elif "transaction" in name:
        client.transact(lambda tx: None)
    else:
        client.directory("/a")
        client.directory("/a")  # what came too much may be noticed now


@pytest.mark.parametrize("name", FAULTS)
def test_faults(serve, name):
    """Goal: a server that breaks the protocol is one StoreError with its path, at once or in time, and the connection is
    closed.  Method: a table of what it may do; another request after it."""
    script, says = FAULTS[name]
    server = serve(script)
    patient = 0.2 if "0.2 s" in says else TIMEOUT_S
    with StoreClient(server.path, timeout_s=patient) as client:
        with pytest.raises(StoreError) as caught:
            provoke(client, name)
        assert str(caught.value).startswith(f"{server.path}: ") and says in str(caught.value)
        with pytest.raises(StoreError, match="the connection is closed"):
            client.read("/a")


def test_a_list_that_never_ends(serve, monkeypatch):
    """Goal: a server cannot fill the memory with names.  Method: parts of a list without end, and a lower limit."""
    monkeypatch.setattr(storeclient, "PARTS_MAX", 20)
    server = serve(in_parts(b"1\0" + b"a\0" * 2000))
    with StoreClient(server.path) as client, pytest.raises(StoreError, match="the parts of the children of /a"):
        client.directory("/a")
    assert len(server.asked) == 1 + 21


def test_a_server_that_trickles(tmp_path):
    """Goal: bytes that never make a message do not keep a request or a wait alive.  Method: some bytes of a long one every
    few milliseconds."""
    path, stop = tmp_path / "slow", threading.Event()

    def send_slowly(connection: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            connection.sendall(SOCKMSG.pack(XsType.READ, 1, 0, 4096))
            while not stop.wait(0.005):
                connection.sendall(b"four")

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with StoreClient(path, timeout_s=0.1) as client, listener.accept()[0] as connection:
            thread = threading.Thread(target=send_slowly, args=(connection,))
            thread.start()
            try:
                assert client.wait() is None
                with pytest.raises(StoreError, match=r"no answer within 0\.1 s"):
                    client.read("/a")
            finally:
                stop.set()
                thread.join(TIMEOUT_S)


# --- where the store is -----------------------------------------------------------------------------------------------


def test_nobody_there(tmp_path):
    """Goal: one line says what is wrong with the path, and a file that is no store is left alone.  Method: each kind."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    (tmp_path / "file").write_bytes(b"precious")
    os.mkfifo(tmp_path / "fifo")
    for name, says in {
        "missing": "no store can be reached there: No such file or directory",
        "dead": "nobody listens at this socket",
        "file": "neither a socket nor a device",
        "fifo": "neither a socket nor a device",
        "file/below": "no store can be reached there: Not a directory",
        ".": "no store can be reached there: Is a directory",
    }.items():
        with pytest.raises(StoreError) as caught:
            StoreClient(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name}: {says}" or says in str(caught.value)
    assert (tmp_path / "file").read_bytes() == b"precious"


def test_a_path_too_long_for_a_socket(tmp_path):
    """Goal: sockets have short names; the error says so.  Method: one made by way of its directory."""
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    fd = os.open(deep, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{fd}/s")
        os.close(fd)
        with pytest.raises(StoreError, match="too long"):
            StoreClient(deep / "s")


def test_a_busy_server(tmp_path):
    """Goal: a server that is slow to accept is waited for, but not for ever.  Method: a full queue, then a place in it."""
    path = tmp_path / "s"
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen(0)
        stack.enter_context(StoreClient(path))
        with pytest.raises(StoreError, match="temporarily unavailable"):
            StoreClient(path, timeout_s=0.1)
        thread = threading.Timer(0.1, lambda: stack.enter_context(listener.accept()[0]))
        thread.start()
        StoreClient(path, timeout_s=TIMEOUT_S).close()
        thread.join()
