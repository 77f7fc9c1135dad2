"""Goal: clients that flood the store slow down others, but stop nobody: disks, other clients, and the end of the server.
Method: floods from processes of their own while fio with checksums and dd use a guest's disk; nothing here measures time, a
hang is a client that does not end."""

from __future__ import annotations

import sys
from subprocess import Popen

import pytest

from tests.host.net import wait_until
from tests.host.served import MIB, Host, Served
from tests.host.test_store_socket import at_rest
from xenfs.storeclient import StoreClient

pytestmark = pytest.mark.host

# argv: the socket or device, the node below which it may write. Each says `go` when it has begun, and ends with the server.
HEAD = """if 1:
    import os, socket, stat, struct, sys
    READ, DIRECTORY, WATCH, START, END, WRITE, RM, CONTROL = 2, 1, 4, 6, 7, 11, 13, 0
    path, top = sys.argv[1], sys.argv[2].encode()
    if stat.S_ISSOCK(os.stat(path).st_mode):
        link = socket.socket(socket.AF_UNIX)
        link.connect(path)
        fd = link.fileno()
    else:
        fd = os.open(path, os.O_RDWR)
    def request(kind, body, tx=0):
        return struct.pack("<IIII", kind, 1, tx, len(body)) + body
    def send(data):
        while data:
            data = data[os.write(fd, data):]
    def exchange(requests):
        # as many replies as requests; events are dropped
        for each in requests:
            send(each)
        missing, got = len(requests), b""
        while missing:
            part = os.read(fd, 65536)
            if not part:
                sys.exit(0)
            got += part
            while len(got) >= 16:
                kind, _, _, length = struct.unpack_from("<IIII", got)
                if len(got) < 16 + length:
                    break
                got = got[16 + length:]
                missing -= kind != 15
    def flood(requests):
        exchange(requests)
        print("go", flush=True)
        while True:
            exchange(requests)
"""
FLOODS = {
    # reads and writes as fast as the answers come, each write an event for itself
    "requests": """
    exchange([request(WATCH, top + b"\\0token")])
    flood([request(WRITE, top + b"/%d\\0" % i + b"v" * 1000) for i in range(40)] + [request(READ, top + b"/1\\0")] * 40)
    """,
    # every request concerns many: dozens of watches on what is written, whole trees that come and go
    "events": """
    exchange([request(WATCH, top + b"\\0token %d" % i + b"\\0") for i in range(40)])
    flood([request(WRITE, top + b"/a/b/c/%d\\0x" % i) for i in range(20)] + [request(RM, top + b"/a\\0")])
    """,
    # never reads: requests until nobody takes them any more
    "deaf": """
    os.set_blocking(fd, False)
    for i in range(10**6):
        data = request(WATCH, top + b"/%d\\0t\\0" % i) + request(WRITE, top + b"/%d\\0x" % (i % 9))
        while data:
            try:
                data = data[os.write(fd, data):]
            except BlockingIOError:
                print("go", flush=True)
                os.set_blocking(fd, True)
    """,
    # questions that cost the server much
    "dear": """
    exchange([request(WRITE, top + b"/many/%d\\0x" % i) for i in range(900)])
    flood([request(DIRECTORY, top + b"/many\\0"), request(CONTROL, b"check\\0"), request(CONTROL, b"live-update\\0-s\\0")])
    """,
}


def flooder(host: Host, server: Served, flood: str, way: str = ".xenstored", top: str = "/flood") -> Popen[str]:
    client = host.client(sys.executable, "-c", HEAD + FLOODS[flood], f"{server.mnt}{way}", top)
    assert client.stdout is not None and client.stdout.readline() == "go\n"
    return client


def served(server: Served) -> int:
    """Requests so far."""
    with StoreClient(f"{server.mnt}.xenstored") as client:
        return sum(int(row.split()[1]) for row in client.control("stats").splitlines() if row.startswith("requests-"))


def use_the_disk(host: Host, server: Served) -> None:
    """Write and check a disk in two ways; each has to end."""
    host.check(
        "fio", "--name=all", f"--filename={server.disk()}", "--bsrange=4k-128k", "--size=8m", "--rw=randwrite", "--direct=1",
        "--ioengine=io_uring", "--iodepth=8", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--end_fsync=1",
        "--allow_file_create=0", timeout_s=120,
    )  # fmt: skip
    data = host.root / "data"
    host.check("dd", "if=/dev/urandom", f"of={data}", "bs=64k", "count=64")
    host.check("dd", f"if={data}", f"of={server.disk()}", "bs=4k", "conv=notrunc,fsync", timeout_s=120)
    host.check("cmp", "-n", 4 * MIB, data, server.disk(), timeout_s=120)


@pytest.mark.parametrize("flood", FLOODS)
def test_a_disk_goes_on(host, flood):
    """Goal: while two clients flood the store a disk is written and checked, a third client is answered and gets its events,
    and SIGTERM ends it all as ever.  Method: two processes with the same flood in different nodes; fio, dd, cmp."""
    server = host.disk()
    floods = [flooder(host, server, flood, top=f"/flood/{i}") for i in range(2)]
    if flood == "deaf":
        wait_until(lambda: at_rest(server), "the server to read them no more", 60)
    before = served(server)
    use_the_disk(host, server)
    with StoreClient(f"{server.mnt}.xenstored", timeout_s=60) as client:
        client.watch("/t", "token")
        assert client.wait() == ("/t", "token")
        for i in range(20):
            client.write("/t", b"%d" % i)
            assert client.wait() == ("/t", "token")
        assert client.read("/t") == b"19"
        assert [each.poll() for each in floods] == [None, None]
        if flood == "deaf":
            assert served(server) < before + 100  # the server has stopped reading them
        else:
            assert served(server) > before + 100  # nor has somebody stopped them
    server.stop()
    for each in floods:
        host.finish(each)


def test_a_flood_over_the_devices(host):
    """Goal: the same over device files, by a guest and by domain 0 at once.  Method: three floods; fio, dd, cmp; both
    go away, and with them what they held."""
    server = host.disk()
    with StoreClient(f"{server.mnt}.xenstored", timeout_s=60) as client:
        held = [client.control("quota", domid).splitlines()[2:5] for domid in "01"]
        floods = [
            flooder(host, server, "requests", "/domains/g/dev/xen/xenbus", "data/one"),
            flooder(host, server, "events", "/domains/g/dev/xen/xenstore", "data/two"),
            flooder(host, server, "requests", "/domains/0/dev/xen/xenbus", "/flood"),
        ]
        use_the_disk(host, server)
        assert client.read("/local/domain/0/name") == b"Domain-0"
        assert [each.poll() for each in floods] == [None] * 3
        for each in floods:
            each.kill()
            host.finish(each)
        wait_until(lambda: [client.control("quota", domid).splitlines()[2:5] for domid in "01"] == held, f"{held} again")
        assert client.control("check") == "OK"
    server.stop()


def test_a_flood_of_connections(host):
    """Goal: clients that come and go all the time, some of them within a message, disturb no disk and leave nothing.
    Method: two processes that connect, ask, watch, begin a transaction and are gone; fio, dd, cmp."""
    server = host.disk()
    code = """if 1:
        import socket, struct, sys
        def request(kind, body, tx=0):
            return struct.pack("<IIII", kind, 1, tx, len(body)) + body
        data = request(4, b"/t\\0token\\0") + request(6, b"\\0") + request(11, b"/t\\0x") + request(2, b"/t\\0")
        print("go", flush=True)
        for count in range(10**9):
            with socket.socket(socket.AF_UNIX) as link:
                link.connect(sys.argv[1])
                link.sendall(data[: 1 + count % len(data)])
    """
    with StoreClient(f"{server.mnt}.xenstored", timeout_s=60) as client:

        def held() -> list[str]:
            names = ("connections", "watches", "transactions", "queued-events")
            return [row for row in client.control("stats").splitlines() if row.startswith(names)]

        before = held()
        floods = [host.client(sys.executable, "-c", code, f"{server.mnt}.xenstored") for _ in range(2)]
        for each in floods:
            assert each.stdout is not None and each.stdout.readline() == "go\n"
        use_the_disk(host, server)
        client.transact(lambda tx: client.write("/tool/t", b"1", tx))
        assert client.read("/tool/t") == b"1"
        assert [each.poll() for each in floods] == [None] * 2
        for each in floods:
            each.kill()
            host.finish(each)
        wait_until(lambda: held() == before, f"{before} again")
        assert client.control("check") == "OK"
    server.stop()
