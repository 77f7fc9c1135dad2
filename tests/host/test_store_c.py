"""Goal: C programs on libxenstore, with threads, watches and many processes, work over our socket as over Xen's.
Method: watcher.c and Xen's own test-xenstore; clients that start all at once; a parent with the store open that forks."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from bench import realstore
from tests.host.net import wait_until
from tests.host.served import Host, Served
from tests.host.test_store_tools import needs_utils
from xenfs.storeclient import StoreClient

TEST_XENSTORE = realstore.find("test-xenstore")
pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(not Path("/usr/include/xenstore.h").exists(), reason="libxen-dev is not installed"),
    pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed"),
]
ROUNDS, THREADS = 60, 8


def compiled(source: Path, program: Path) -> Path:
    argv = ["gcc", "-O1", "-Wall", "-Werror", "-o", program, source, "-lxenstore", "-lpthread"]
    subprocess.run(argv, check=True, timeout=60)
    return program


@pytest.fixture(scope="module")
def watcher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(Path(__file__).with_name("watcher.c"), tmp_path_factory.mktemp("watcher") / "watcher")


@pytest.fixture
def server(host: Host) -> Served:
    return host.disk()


def at(server: Served, way: str = ".xenstored") -> list[str]:
    return ["env", f"XENSTORED_PATH={server.mnt}{way}"]


def held(server: Served) -> list[str]:
    """Connections, watches, transactions and what waits, as the server counts them."""
    with StoreClient(f"{server.mnt}.xenstored") as client:
        names = ("connections", "watches", "transactions", "queued-events")
        return [row for row in client.control("stats").splitlines() if row.startswith(names)]


def test_threads_with_watches(host, server, watcher):
    """Goal: every thread sees the last value of what it watches, and never an older one after a newer one.
    Method: watcher.c: eight connections with two watches each, a writer; then nothing of it is left."""
    before = held(server)
    said = host.check(*at(server), watcher, "/t", THREADS, ROUNDS)
    assert said.count(f"own {ROUNDS}, all {ROUNDS}") == said.count(" 0 backwards\n") == THREADS
    wait_until(lambda: held(server) == before, f"{before} again")
    server.stop()


def test_socket_and_devices_at_once(host, server, watcher):
    """Goal: programs over the socket, over domain 0's device and over a guest's do not disturb one another.
    Method: watcher.c on all three at once, in the same nodes for domain 0, while the guest's disk is used."""
    before = held(server)
    ways = {".xenstored": "/t/a", "/domains/0/dev/xen/xenbus": "/t/b", "/domains/g/dev/xen/xenbus": "data/t"}
    programs = [host.client(*at(server, way), watcher, path, THREADS, ROUNDS) for way, path in ways.items()]
    disk = host.client("dd", "if=/dev/urandom", f"of={server.disk()}", "bs=64k", "count=64", "conv=notrunc,fsync")
    for program in programs:
        done = host.finish(program)
        assert (done.returncode, done.stdout.count(f"own {ROUNDS}, all {ROUNDS}")) == (0, THREADS), done.stdout
    assert host.finish(disk).returncode == 0
    wait_until(lambda: held(server) == before, f"{before} again")
    server.stop()


@pytest.mark.skipif(TEST_XENSTORE is None, reason="xen-utils (for test-xenstore) is not installed")
@pytest.mark.parametrize("way", [".xenstored", "/domains/0/dev/xen/xenbus", "/domains/0/dev/xen/xenstore"])
def test_xens_own_test(host, server, way):
    """Goal: Xen's test program for its daemons passes with ours: values, directories, removal, transactions, conflicts.
    Method: test-xenstore: each test, then many in random order in four processes; it leaves nothing behind."""
    said = host.check(*at(server, way), TEST_XENSTORE, "-i", 50)
    assert said.count("avg:") == 12, said
    four = [host.client(*at(server, way), TEST_XENSTORE, "-r", 2) for _ in range(4)]
    for each in four:
        done = host.finish(each)
        assert done.returncode == 0, done.stdout
    with StoreClient(f"{server.mnt}.xenstored") as client:
        assert client.directory("/") == ["tool", "local", "vm", "libxl"] and client.control("check") == "OK"
    server.stop()


AT_ONCE = """
for i in $(seq 20); do
    xenstore-write "$1/$i" "value $i" "$1/common" "$i" &
    writers="$writers $!"
done
for writer in $writers; do wait $writer; done
for i in $(seq 20); do
    xenstore-read "$1/$i" > "read-$i" &
    readers="$readers $!"
done
for reader in $readers; do wait $reader; done
for i in $(seq 20); do cat "read-$i"; done
xenstore-list "$1" | wc -l
"""


@needs_utils
@pytest.mark.parametrize(
    ("way", "top"),
    [(".xenstored", "/t"), ("/domains/0/dev/xen/xenbus", "/t"), ("/domains/g/dev/xen/xenbus", "data/t")],
)
def test_twenty_at_once(host, server, way, top):
    """Goal: twenty processes that start together each have their transaction committed in the end.
    Method: xenstore-write of a node of its own and one of all, in one transaction each; then as many readers.
    A guest may have ten transactions open: the others are told so, as on Xen."""
    before = held(server)
    if top == "/t":
        said = host.check(*at(server, way), "sh", "-ec", AT_ONCE, "sh", top)
        assert said.splitlines() == [*(f"value {i}" for i in range(1, 21)), "21"]
    else:
        script = 'for i in $(seq 20); do (until xenstore-write "$1/$i" 1 "$1/all" $i; do :; done) 2>&1 & done; wait'
        said = host.check(*at(server, way), "sh", "-ec", script, "sh", top)
        assert not said.replace("xenstore-write: ", "").replace("couldn't start transaction", "").strip(), said
        assert set(host.check(*at(server, way), "xenstore-list", top).split()) == {*map(str, range(1, 21)), "all"}
    wait_until(lambda: held(server) == before, f"{before} again")
    server.stop()


FORKS = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include <xenstore.h>

/* A parent with a watch and a transaction runs children that have their own connection; xs_open's is closed on exec. */
int main(int argc, char **argv)
{
    struct xs_handle *xs = xs_open(0);
    xs_transaction_t transaction;
    unsigned int count, events = 0;
    char **event, *value;
    int i, status, failed = 0;

    if (argc != 2 || !xs || !xs_watch(xs, "/t", "token") || !(event = xs_read_watch(xs, &count)))
        return 1;
    free(event);
    transaction = xs_transaction_start(xs);
    if (!xs_write(xs, transaction, "/tool/parent", "1", 1))
        return 2;
    for (i = 0; i < 20; i++) {
        if (!fork()) {
            char path[32];

            snprintf(path, sizeof(path), "/t/%d", i);
            execlp("xenstore-write", "xenstore-write", path, argv[1], NULL);
            _exit(127);
        }
    }
    while (wait(&status) > 0)
        failed |= status;
    for (; events < 20; events++) {
        if (!(event = xs_read_watch(xs, &count)) || strcmp(event[XS_WATCH_TOKEN], "token"))
            return 3;
        value = xs_read(xs, XBT_NULL, event[XS_WATCH_PATH], &count);
        if (!value || strcmp(value, argv[1]))
            return 4;
        free(value);
        free(event);
    }
    if (failed || !xs_transaction_end(xs, transaction, false))
        return 5;
    value = xs_read(xs, XBT_NULL, "/tool/parent", &count);
    if (!value)
        return 6;
    printf("%u events, parent %s\n", events, value);
    free(value);
    xs_close(xs);
    return 0;
}
"""


@needs_utils
@pytest.mark.parametrize("way", [".xenstored", "/domains/0/dev/xen/xenbus"])
def test_fork_and_exec(host, server, way):
    """Goal: children of a program that has the store open neither use nor end what it has there.
    Method: a parent with a watch and an open transaction, twenty children that fork and exec xenstore-write."""
    source = host.root / "forks.c"
    source.write_text(FORKS)
    before = held(server)
    said = host.check(*at(server, way), compiled(source, host.root / "forks"), "a value")
    assert said == "20 events, parent 1\n"
    wait_until(lambda: held(server) == before, f"{before} again")
    server.stop()
