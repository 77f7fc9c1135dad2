"""Goal: a Tap is an interface as the kernel sees it: frames cross both ways with their headers, what it offers is what the
kernel uses, it is there alone and gone when it is closed, and each refusal says what would be right.
Method: real TAPs in network namespaces of their own, looked at with ip(8); packet sockets and child processes at the other
end. Nothing here has a way to the machine's network."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from netdev.link import VNET_SIZE
from netdev.tap import Tap, TapError, TapLane
from tests.host.test_netlink import EXPERIMENTAL, WAIT_S, Space, state

pytestmark = pytest.mark.host

MAC, PEER = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
VNET = struct.Struct("<BBHHHH")
NO_VNET = bytes(VNET_SIZE)


@pytest.fixture
def spaces() -> Iterator[Callable[[str], Space]]:
    with contextlib.ExitStack() as stack:
        yield lambda name: stack.enter_context(Space(name))


@pytest.fixture
def space(spaces) -> Space:
    made: Space = spaces("tap")
    made.quiet()
    return made


def up(space: Space, tap: Tap) -> None:
    tap.carrier(True)
    space.ip("link", "set", tap.name, "up")


def started(space: Space, tap: Tap) -> socket.socket:
    up(space, tap)
    return space.packets(tap.name)


def next_frame(lanes: list[TapLane], wanted: Callable[[bytes], bool]) -> tuple[int, bytes, bytes]:
    """The next frame that is `wanted`: its lane's number, header, rest."""
    head, rest = memoryview(bytearray(VNET_SIZE)), memoryview(bytearray(1 << 17))
    deadline = time.monotonic() + WAIT_S
    while (left := deadline - time.monotonic()) > 0:
        select.select([lane.fd for lane in lanes], [], [], left)
        for number, lane in enumerate(lanes):
            while length := lane.read([head, rest]):
                frame = bytes(rest[: length - VNET_SIZE])
                if wanted(frame):
                    return number, bytes(head), frame
    raise AssertionError(f"no such frame within {WAIT_S:g} s")


def experimental(content: bytes, to: bytes = MAC, source: bytes = PEER) -> bytes:
    return to + source + EXPERIMENTAL.to_bytes(2, "big") + content


# ---- frames ----


@pytest.mark.parametrize("queues", [1, 2, 4])
def test_frames_cross_both_ways(space, queues):
    """Goal: what we write is what the interface receives, and what is sent through it is what we read, on any lane.
    Method: a packet socket on the interface; frames in pieces."""
    with contextlib.closing(Tap("xn0", queues, space.name, MAC)) as tap, started(space, tap) as wire:
        assert len(tap.lanes) == queues
        for number, lane in enumerate(tap.lanes):
            frame = experimental(bytes([number]) * 1000)
            assert lane.write([NO_VNET, frame[:14], memoryview(frame)[14:500], frame[500:]])
            assert wire.recv(2000) == frame
            back = experimental(b"back" * 100 + bytes([number]), PEER, MAC)
            wire.send(back)
            _, header, got = next_frame(tap.lanes, lambda frame: frame[12:14] == b"\x88\xb5")
            assert (header, got) == (NO_VNET, back)
            assert (lane.read([memoryview(bytearray(2000))]), lane.error) == (0, 0)  # nothing waits: it says so at once


def test_too_long_is_cut_off_and_the_next_is_whole(space):
    """Goal: short buffers lose the end of one frame and no more.  Method: two frames, the first longer than the buffers."""
    with contextlib.closing(Tap("xn0", 1, space.name)) as tap, started(space, tap) as wire:
        first, second = experimental(b"1" * 500), experimental(b"2" * 50)
        wire.send(first)
        wire.send(second)
        buffers = [memoryview(bytearray(VNET_SIZE)), memoryview(bytearray(64)), memoryview(bytearray(36))]
        assert tap.lanes[0].read(buffers) == VNET_SIZE + 100
        assert b"".join(buffers[1:]) == first[:100]
        assert tap.lanes[0].read(buffers) == VNET_SIZE + 64
        assert bytes(buffers[1]) == second


def test_flows_use_all_lanes(space):
    """Goal: two lanes share the load.  Method: UDP from 64 ports; all arrive, some on each lane."""
    with contextlib.closing(Tap("xn0", 2, space.name, MAC)) as tap:
        assert space.show("xn0")["linkinfo"]["info_data"]["numqueues"] == 2
        up(space, tap)
        address(space, "4")
        client = space.popen(
            "import socket\n"
            "for port in range(4000, 4064):\n"
            "    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            "    s.bind(('10.9.0.1', port)); s.sendto(b'x', ('10.9.0.2', 9)); s.close()\n"
        )
        with client:
            seen: dict[int, int] = {}
            while len(seen) < 64:
                lane, _, frame = next_frame(tap.lanes, lambda frame: frame[12:14] == b"\x08\x00" and frame[23] == 17)
                seen[int.from_bytes(frame[34:36], "big")] = lane
        assert set(seen) == set(range(4000, 4064))
        assert set(seen.values()) == {0, 1}


# ---- offloads ----


def address(space: Space, version: str, ours: str = "1", peer: str = "2", device: str = "xn0") -> None:
    """An address, and the peer's as a neighbour, so that nobody needs to ask for it."""
    prefix, length = ("10.9.0.", "24") if version == "4" else ("fd09::", "64")
    nodad = ["nodad"] if version == "6" else []
    space.ip("address", "add", f"{prefix}{ours}/{length}", "dev", device, *nodad)
    mac = f"02:00:00:00:00:0{peer}"
    space.ip("neighbour", "add", f"{prefix}{peer}", "lladdr", mac, "dev", device, "nud", "permanent")


def ones(data: bytes) -> int:
    """The Internet checksum's sum, folded, not complemented."""
    total = sum(int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big") for at in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@pytest.mark.parametrize("csum", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_checksum_is_left_to_us_if_we_offer_it(space, csum, before):
    """Goal: a datagram comes without its checksum, and the header says where it belongs, exactly if offload(csum) is on.
    Method: a datagram of another process; the header's numbers; the sum computed here."""
    with contextlib.closing(Tap("xn0", 1, space.name, MAC)) as tap:
        tap.offload(before, False, False)
        tap.offload(csum, False, False)
        up(space, tap)
        address(space, "4")
        program = "import socket\nsocket.socket(2, 2).sendto(b'datagram!', ('10.9.0.2', 9))"
        with space.popen(program):
            _, header, frame = next_frame(tap.lanes, lambda frame: frame[12:14] == b"\x08\x00" and frame[23] == 17)
        pseudo = frame[26:34] + struct.pack(">HH", 17, len(frame) - 34)
        checksum = int.from_bytes(frame[40:42], "big")
        if csum:
            assert VNET.unpack(header) == (1, 0, 0, 0, 34, 6)
            assert checksum == ones(pseudo)
        else:
            assert header == NO_VNET
            assert ones(pseudo + frame[34:]) == 0xFFFF


SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 9999), 20) as s:
    s.sendall(bytes(range(256)) * 4096)
    s.shutdown(socket.SHUT_WR)
    s.recv(1)
"""
RECEIVE = """
import hashlib, socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.create_server((sys.argv[1], 9999), family=family) as server:
    print("listening", flush=True)
    server.settimeout(20)
    s, _ = server.accept()
    with s:
        s.settimeout(20)
        total = hashlib.sha256()
        while part := s.recv(65536):
            total.update(part)
print(total.hexdigest(), flush=True)
"""


def pump(left: Tap, right: Tap, until: subprocess.Popen[bytes]) -> list[tuple[int, bytes]]:
    """Carry frames between two interfaces, headers and all, until the process ends; length and header of left's frames."""
    seen: list[tuple[int, bytes]] = []
    head, rest = memoryview(bytearray(VNET_SIZE)), memoryview(bytearray(1 << 17))
    deadline = time.monotonic() + 3 * WAIT_S
    while until.poll() is None:
        assert time.monotonic() < deadline, f"the transfer hangs after {len(seen)} frames"
        select.select([left.lanes[0].fd, right.lanes[0].fd], [], [], 0.05)
        for source, target in ((left, right), (right, left)):
            while length := source.lanes[0].read([head, rest]):
                target.lanes[0].write([head, rest[: length - VNET_SIZE]])
                if source is left:
                    seen.append((length - VNET_SIZE, bytes(head)))
    return seen


@pytest.mark.parametrize(
    ("version", "csum", "tso4", "tso6", "kind"),
    [
        ("4", False, False, False, None), ("4", True, False, False, None), ("4", True, False, True, None),
        ("4", True, True, False, 1), ("4", True, True, True, 1),
        ("4", False, True, True, None),  # no segmentation without checksums
        ("6", False, False, False, None), ("6", True, True, False, None), ("6", True, False, True, 4),
    ],
)  # fmt: skip
def test_tcp_comes_unsegmented_if_we_offer_it(spaces, version, csum, tso4, tso6, kind):
    """Goal: frames longer than the MTU come exactly if segmentation of this IP version is on, and say how to cut them; and
    another interface takes them as they are.  Method: 1 MiB over TCP between two namespaces, frames carried by us."""
    left, right = spaces("left"), spaces("right")
    with contextlib.closing(Tap("xn0", 1, left.name, MAC)) as a, contextlib.closing(Tap("xn1", 1, right.name, PEER)) as b:
        a.offload(csum, tso4, tso6)
        up(left, a)
        up(right, b)
        address(left, version)
        address(right, version, "2", "1", "xn1")
        to = "10.9.0.2" if version == "4" else "fd09::2"
        receiver = right.popen(RECEIVE, to)
        with receiver:
            assert receiver.stdout.readline() == b"listening\n"
            with left.popen(SEND, to) as sender:
                seen = pump(a, b, sender)
            assert sender.returncode == 0
            assert receiver.stdout.read().decode().strip() == hashlib.sha256(bytes(range(256)) * 4096).hexdigest()
    long = [VNET.unpack(header) for length, header in seen if length > 1514]
    assert bool(long) == (kind is not None)
    headers = {"4": 34, "6": 54}[version] + 32  # TCP with its timestamps
    for flags, gso, header_bytes, mss, start, offset in long:
        assert (flags & 1, gso & ~0x80, header_bytes, start, offset) == (1, kind, headers, headers - 32, 16)
        assert mss == 1514 - headers


# ---- the interface ----


@pytest.mark.parametrize("queues", [1, 3])
def test_carrier(space, queues):
    """Goal: nobody sees a fresh interface with carrier, and carrier() turns it on and off.  Method: ip(8), interface up."""
    with contextlib.closing(Tap("xn0", queues, space.name)) as tap:
        assert "UP" not in space.show("xn0")["flags"]
        space.ip("link", "set", "xn0", "up")
        assert "NO-CARRIER" in space.show("xn0")["flags"]
        for is_up in (True, True, False, False, True):
            tap.carrier(is_up)
            flags = space.show("xn0")["flags"]
            assert ("LOWER_UP" in flags, "NO-CARRIER" in flags) == (is_up, not is_up)


def test_mac(space):
    """Goal: the MAC address is the given one; without, one that the kernel invented, and `mac` says which."""
    for mac in (MAC, None):
        with contextlib.closing(Tap("xn0", 1, space.name, mac)) as tap:
            assert space.show("xn0")["address"] == tap.mac.hex(":")
            assert mac in (None, tap.mac)


def test_close(space):
    """Goal: closing removes the interface, twice is no error, and a closed Tap takes and gives nothing.
    Method: as said; an innocent file with the same descriptor number must not be written to."""
    tap = Tap("xn0", 2, space.name)
    lanes, fds = list(tap.lanes), [lane.fd for lane in tap.lanes]
    assert "xn0" in space.names()
    tap.close()
    assert "xn0" not in space.names()
    reader, writer = os.pipe()
    try:
        assert {reader, writer} & set(fds)
        tap.close()
        assert [lane.write([b"x" * 70]) for lane in lanes] == [False, False]
        assert [lane.read([memoryview(bytearray(70))]) for lane in lanes] == [0, 0]
        tap.carrier(True)
        tap.offload(True, True, True)
        os.set_blocking(reader, False)
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
    finally:
        os.close(reader)
        os.close(writer)


def test_down_and_deleted(space):
    """Goal: an interface that is down refuses frames (EIO) and recovers; one deleted by somebody is EBADFD ever after, and
    nothing raises.  Method: ip link set down, up, delete."""
    with contextlib.closing(Tap("xn0", 2, space.name)) as tap:
        lane = tap.lanes[1]
        frame = [NO_VNET, experimental(b"?" * 50)]
        assert (lane.write(frame), lane.error) == (False, errno.EIO)
        up(space, tap)
        assert lane.write(frame)
        space.ip("link", "set", "xn0", "down")
        assert (lane.write(frame), lane.error) == (False, errno.EIO)
        space.ip("link", "delete", "xn0")
        for lane in tap.lanes:
            assert (lane.write(frame), lane.error) == (False, errno.EBADFD)
            lane.error = 0
            assert (lane.read([memoryview(bytearray(100))]), lane.error) == (0, errno.EBADFD)
        tap.carrier(True)
        tap.offload(True, True, True)


def test_gone_with_its_process(space):
    """Goal: a killed process leaves no interface.  Method: SIGKILL."""
    with space.popen("from netdev.tap import *\ntap = Tap('xn0', 2)\nprint('made', flush=True)\ninput()") as child:
        assert child.stdout.readline() == b"made\n"
        assert "xn0" in space.names()
        child.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + WAIT_S
    while "xn0" in space.names():
        assert time.monotonic() < deadline, "the interface is still there"


def test_namespace_deleted_under_it():
    """Goal: losing the namespace's name disturbs nobody.  Method: delete it while a Tap is in it; frames; close."""
    with Space("gone") as space:
        tap = Tap("xn0", 1, space.name)
        up(space, tap)
    with contextlib.closing(tap):
        assert tap.lanes[0].write([NO_VNET, experimental(b"?" * 50)])
        tap.carrier(False)


# ---- refusals ----

REFUSED = [
    pytest.param({"name": "lo"}, "interface of that name already; choose another name", id="taken"),
    pytest.param({"name": "x" * 16}, "at most 15 bytes, this one has 16", id="long"),
    pytest.param({"name": "é" * 8}, "at most 15 bytes, this one has 16", id="long-in-bytes"),
    *[
        pytest.param({"name": bad}, "name is not empty, not a dot or two, and has no blank, '/', ':' or '%'", id=ascii(bad))
        for bad in ("", ".", "..", "a/b", "a b", "a\0b", "xn%d", "xn0:1")
    ],
    pytest.param({"queues": 0}, "0 queues: there must be 1 to 256", id="no-queue"),
    pytest.param({"queues": 257}, "257 queues: there must be 1 to 256", id="queues"),
    pytest.param({"mac": b"\2" * 5}, "02:02:02:02:02 is not one of a single station", id="short-mac"),
    pytest.param({"mac": b"\1" * 6}, "01:01:01:01:01:01 is not one of a single station", id="multicast-mac"),
    pytest.param({"mac": bytes(6)}, "00:00:00:00:00:00 is not one of a single station", id="zero-mac"),
    pytest.param({"namespace": "xenfs-test-none"}, "no network namespace 'xenfs-test-none'; `ip netns add`", id="namespace"),
    pytest.param({"namespace": "../xn"}, "'../xn' is not a name of a network namespace", id="path"),
]


@pytest.mark.parametrize(("wrong", "says"), REFUSED)
def test_refusals(space, wrong, says):
    """Goal: what cannot be is refused with the interface, the place and the reason, and leaves nothing behind.
    Method: one wrong argument each; the thread's namespace and the open files before and after."""
    right = {"name": "xn0", "queues": 1, "namespace": space.name, "mac": MAC}
    before = state()
    with pytest.raises(TapError) as caught:
        Tap(**(right | wrong))
    message = str(caught.value)
    assert says in message
    assert repr((right | wrong)["name"]) in message
    assert repr((right | wrong)["namespace"]) in message
    assert state() == before
    assert space.names() == {"lo"}
    Tap(**right).close()


def test_taken_by_a_tap(space):
    """Goal: two never share an interface, with one queue or several.  Method: a second Tap; the first still works."""
    for first, second in ((1, 1), (2, 2), (2, 1), (1, 2)):
        with contextlib.closing(Tap("xn0", first, space.name)) as tap:
            with pytest.raises(TapError, match="of that name already"):
                Tap("xn0", second, space.name)
            up(space, tap)
            assert tap.lanes[0].write([NO_VNET, experimental(b"?" * 50)])


CHILD = "from netdev.tap import *\ntry:\n    Tap('xn0')\n    print('made')\nexcept TapError as error:\n    print(error)"


@pytest.mark.parametrize(
    ("around", "says"),
    [
        (["setpriv", "--bounding-set=-net_admin"], "cannot make TAP 'xn0': CAP_NET_ADMIN is needed"),
        (["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev/net && exec "$@"', "sh"], "tun is missing; `modprobe tun`"),
        (["setpriv", "--bounding-set=-net_admin,-dac_override", "--reuid=65534", "--clear-groups"], "be root"),
        (["env"], "made"),
    ],
    ids=["no-capability", "no-device", "nobody", "with-all"],
)
def test_what_the_machine_lacks(space, around, says):
    """Goal: a missing right or device is named.  Method: children that lack it; the same child with all of it works."""
    assert says in space.check(*around, sys.executable, "-c", CHILD)

