"""Goal: xenstore-control of Xen looks after our xenstored: it asks, traces, and updates it while clients go on.
Method: the program of Debian's Xen against a server; what it and the server say. What it prints of Xen's own daemon, too, is
in test_store_tools.py."""

from __future__ import annotations

import pytest

from tests.host.net import wait_until
from tests.host.test_store_tools import WAYS, environment, needs_control, needs_utils
from xenfs.storeclient import StoreClient
from xenmodel.xenstore.errors import XsErrno, XsError

pytestmark = [pytest.mark.host, needs_utils, needs_control]


def test_control_of_ours(host):
    """Goal: help, stats and quota-usage, and what `print` and `log on` say to the administrator.
    Method: the program against a server of its own; its standard error."""
    server = host.disk()
    path = f"{server.mnt}.xenstored"

    def control(*words: str) -> str:
        return host.check(*environment(path), "xenstore-control", *words)

    assert [line.split()[0] for line in control("help").splitlines() if line] == [
        "check", "log", "live-update", "print", "quota", "quota-soft", "quota-usage", "stats", "help",
    ]  # fmt: skip
    assert control("print", "hello there") == control("log", "on") == "OK\n"
    host.check(*environment(path), "xenstore-read", "/local/domain/1/name")
    control("log", "off")
    host.check(*environment(path), "xenstore-read", "/local/domain/0/name")
    said = server.stderr().splitlines()
    assert said[0] == "xenstored: WARNING: control: hello there"
    for line in ("IN domain 0 READ (/local/domain/1/name)", "OUT domain 0 READ (g)"):
        assert f"xenstored: WARNING: {line}" in said
    assert not any("domain/0/name" in line for line in said)
    assert "domains 2" in control("stats").splitlines()
    (nodes,) = [line for line in control("quota-usage", "1").splitlines() if line.startswith("nodes ")]
    used, limit, refused = map(int, nodes.split()[1:4])
    assert 0 < used < limit == 1000 and not refused
    assert host.run(*environment(path), "xenstore-control", "none").returncode == 3
    server.process.terminate()
    assert server.wait() == 0


@pytest.mark.parametrize("way", ["socket", "device"])
def test_live_update(host, way):
    """Goal: a live update loses neither nodes, permissions, watches nor connections. Open transactions are a reason to
    refuse; with -F they end instead.  Method: xenstore-control, while xenstore-watch and clients go on."""
    server = host.disk()
    path, socket = f"{server.mnt}{WAYS[way]}", f"{server.mnt}.xenstored"
    said = host.root / "watched"
    watcher = host.client(*environment(path), "sh", "-c", 'exec xenstore-watch -n 3 /t/a > "$1"', "sh", said)
    wait_until(lambda: said.exists() and said.read_text() == "/t/a\n", "the first event")
    update = [*environment(path), "xenstore-control", "live-update", "-t", "2"]
    with StoreClient(socket) as client:
        client.write("/t/b", b"\0\xff")
        host.check(*environment(path), "xenstore-chmod", "/t/b", "r1", "b0")
        before = host.check(*environment(path), "xenstore-ls", "-fp")
        assert host.check(*update, "/new/xenstored") == ""
        assert host.check(*environment(path), "xenstore-ls", "-fp") == before
        client.write("/t/a", b"1")
        wait_until(lambda: said.read_text() == "/t/a\n/t/a\n", "an event after the update")

        with pytest.raises(XsError, match=r"ENOENT") as raised, client.transaction() as tx:
            client.write("/t/c", b"1", tx)
            refused = host.run(*update, "/new/xenstored")
            assert (refused.returncode, refused.stdout) == (3, "Starting live update failed:\nBUSY\n")
            assert client.read("/t/c", tx) == b"1"
            assert host.check(*update, "-F", "/new/xenstored") == ""
        assert raised.value.errno is XsErrno.ENOENT
        assert client.directory("/t") == ["b", "a"]
        client.write("/t/a/deep", b"1")
        assert host.finish(watcher).returncode == 0
        assert said.read_text() == "/t/a\n/t/a\n/t/a/deep\n"
        assert client.control("check") == "OK"
    assert host.check("dd", f"if={server.disk()}", "bs=4k", "count=1", "status=none") == "\0" * 4096
    server.stop()
