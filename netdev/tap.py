"""tap.py (edge): a TAP interface as a FramePort, made with python-pytun; and the way into a network namespace and back.

Called by whoever attaches a vif, and by the loop that waits for `lanes[i].fd`. One lane is one queue of /dev/net/tun. Each
frame crosses with the ten bytes of struct virtio_net_hdr, little-endian, so that checksums and segmentation can be left to
whoever does them best.

The interface is ours alone: made exclusively, without carrier, and gone when its last descriptor is closed, however that
comes about. It stays down, with the kernel's MTU and no address: that is netdev/netlink.py's business. While it is down
the kernel refuses our frames (EIO); once somebody has deleted it every call says EBADFD. Both are remembered in
`lane.error` and nothing is raised; a descriptor whose interface was deleted is always ready, so waiting for it is no use.

Left out: TUN (there is no Ethernet in it, and a vif is Ethernet), persistent interfaces, TUNSETTXFILTER.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator, Sequence

from pytun import IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, TunTapDevice

from netdev.link import VNET_SIZE, Buffers, check_name

MOST_QUEUES = 256  # MAX_TAP_QUEUES of the kernel's tun.c
MAC_BYTES = 6
DEVICE = "/dev/net/tun"
NETNS_DIR = "/run/netns"  # where ip-netns(8) has its names
OWN_NETNS = "/proc/thread-self/ns/net"

# linux/if_tun.h. pytun knows IFF_TUN_EXCL only since 2.4.2; kernels before 6.3 do not look at IFF_NO_CARRIER.
IFF_TUN_EXCL, IFF_NO_CARRIER = 0x8000, 0x0040
TUNSETOFFLOAD, TUNSETVNETHDRSZ, TUNSETVNETLE, TUNSETCARRIER = 0x400454D0, 0x400454D8, 0x400454DC, 0x400454E2
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN = 1, 2, 4, 8

CLONE_NEWNET = 0x40000000

_readv, _writev = os.readv, os.writev  # looked up once, for they are needed by every frame
_libc = ctypes.CDLL(None, use_errno=True)
_libc.setns.argtypes = [ctypes.c_int, ctypes.c_int]


class TapError(Exception):
    """An interface that cannot be made or set; the text names it, its namespace and what would be right."""


class TapLane:
    """One queue. `fd` does not block and is -1 once closed; `error` is the last errno of a read or write, 0 if none."""

    __slots__ = ("error", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.error = 0

    def read(self, buffers: Sequence[memoryview]) -> int:
        """As Lane.read. The kernel does not say what it cut off: a frame that fills the buffers may have been longer."""
        try:
            return _readv(self.fd, buffers)
        except BlockingIOError:
            return 0
        except OSError as error:
            self.error = error.errno or errno.EIO
            return 0

    def write(self, buffers: Buffers) -> bool:
        try:
            _writev(self.fd, buffers)
            return True
        except OSError as error:
            self.error = error.errno or errno.EIO
            return False


class Tap:
    """The interface `name` with `queues` lanes, in the network namespace `namespace` (a name of ip-netns(8); None: the
    calling thread's), with `mac` (None: the kernel invents one). Raises TapError, and then nothing is left behind."""

    def __init__(self, name: str, queues: int = 1, namespace: str | None = None, mac: bytes | None = None) -> None:
        self.name = name
        self.namespace = namespace
        self.lanes: list[TapLane] = []
        self._devices: list[TunTapDevice] = []
        self.before_close: Callable[[], None] = lambda: None  # for who waits for the descriptors
        self._check(queues, mac)
        try:
            with inside(namespace):
                self._open(queues)
                self.mac = self._set_mac(mac)
            self._configure()
        except NamespaceError as error:
            self.close()
            raise TapError(f"cannot make TAP {self._where()}: {error}") from error
        except BaseException:
            self.close()
            raise

    def offload(self, csum: bool, tso4: bool, tso6: bool) -> None:
        """As FramePort.offload. Segmentation without checksums does not exist and is taken as neither."""
        tso = (TUN_F_TSO4 if tso4 else 0) | (TUN_F_TSO6 if tso6 else 0)
        value = TUN_F_CSUM | tso | (TUN_F_TSO_ECN if tso else 0) if csum else 0
        self._set(TUNSETOFFLOAD, value, "its offloads (TUNSETOFFLOAD)")

    def carrier(self, up: bool) -> None:
        self._set(TUNSETCARRIER, struct.pack("=i", up), "its carrier (TUNSETCARRIER, which needs Linux 4.20)")

    @property
    def closed(self) -> bool:
        return not self._devices

    def close(self) -> None:
        """Give up the descriptors, and with them the interface; before that, before_close(). Again: nothing."""
        self.before_close()
        for lane in self.lanes:
            lane.fd = -1  # its number may belong to another file in a moment
        for device in self._devices:
            device.close()
        self._devices.clear()

    def _where(self) -> str:
        return f"{self.name!r} in network namespace {self.namespace!r}" if self.namespace else repr(self.name)

    def _check(self, queues: int, mac: bytes | None) -> None:
        """What the kernel would refuse without a word, or take as a pattern ("tap%d")."""
        wrong = None
        try:
            check_name(self.name)
        except ValueError as error:
            wrong = str(error)
        if not 1 <= queues <= MOST_QUEUES:
            wrong = f"{queues} queues: there must be 1 to {MOST_QUEUES}"
        if mac is not None and (len(mac) != MAC_BYTES or mac[0] & 1 or not any(mac)):
            wrong = f"MAC address {mac.hex(':')} is not one of a single station: six bytes, the first one even, not all 0"
        if wrong:
            raise TapError(f"cannot make TAP {self._where()}: {wrong}")

    def _open(self, queues: int) -> None:
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_NO_CARRIER | (IFF_MULTI_QUEUE if queues > 1 else 0)
        for i in range(queues):
            try:
                device = TunTapDevice(name=self.name, flags=flags | (0 if i else IFF_TUN_EXCL), dev=DEVICE)
            except OSError as error:
                raise TapError(f"cannot make TAP {self._where()}: {self._reason(error, i)}") from error
            self._devices.append(device)
            fd = device.fileno()
            os.set_inheritable(fd, False)
            os.set_blocking(fd, False)
            self.lanes.append(TapLane(fd))

    def _reason(self, error: OSError, made: int) -> str:
        match error.errno:
            case errno.EBUSY if not made:
                return "there is an interface of that name already; choose another name, or `ip link delete` that one"
            case errno.ENOENT | errno.ENODEV | errno.ENXIO:
                return f"{DEVICE} is missing; `modprobe tun`, and in a container give it that device"
            case errno.EACCES:
                return f"{DEVICE} may not be opened by this user; be root or change its permissions"
            case errno.EPERM:
                return "CAP_NET_ADMIN is needed; be root, or use a namespace of your own"
            case errno.E2BIG:
                return f"the kernel allows no more than {made} queues; ask for fewer"
            case _:
                return f"{DEVICE}: {error.strerror or error}"

    def _set_mac(self, mac: bytes | None) -> bytes:
        """pytun asks through a socket of its own, so this works in the interface's namespace only."""
        device = self._devices[0]
        try:
            if mac is not None:
                device.hwaddr = mac
            return bytes(device.hwaddr)
        except OSError as error:
            raise TapError(f"cannot give TAP {self._where()} its MAC address: {error.strerror or error}") from error

    def _configure(self) -> None:
        """All of these belong to the interface, not to a queue. Carrier last: attaching a queue may turn it on."""
        self._set(TUNSETVNETHDRSZ, struct.pack("=i", VNET_SIZE), "its header size (TUNSETVNETHDRSZ)")
        self._set(TUNSETVNETLE, struct.pack("=i", 1), "its byte order (TUNSETVNETLE)")
        self.offload(csum=False, tso4=False, tso6=False)
        self.carrier(False)

    def _set(self, request: int, value: int | bytes, what: str) -> None:
        if not self._devices:
            return
        try:
            fcntl.ioctl(self.lanes[0].fd, request, value)
        except OSError as error:
            if error.errno == errno.EBADFD:  # the interface was deleted: whoever reads or writes finds out
                self.lanes[0].error = errno.EBADFD
                return
            raise TapError(f"cannot set {what} for TAP {self._where()}: {error.strerror}") from error


# ---- network namespaces ----


class NamespaceError(Exception):
    """A network namespace that is not there or may not be entered; the text says which and why."""


def namespace_path(name: str) -> str:
    """Where ip-netns(8) keeps the namespace `name`."""
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise NamespaceError(f"{name!r} is not a name of a network namespace: it is a file's name below {NETNS_DIR}")
    return f"{NETNS_DIR}/{name}"


@contextlib.contextmanager
def inside(namespace: str | None) -> Iterator[None]:
    """The calling thread is in that network namespace until the end of the block, however it ends; None changes nothing.
    What is opened inside stays there. Nothing in the block may hand over to another thread or task."""
    if namespace is None:
        yield
        return
    path = namespace_path(namespace)
    home = _open(OWN_NETNS, "the calling thread's own network namespace cannot be kept")
    try:
        there = _open(path, f"no network namespace {namespace!r}; `ip netns add` makes one")
        try:
            _setns(there)
        except OSError as error:
            reason = "it is none, but a file; `ip netns delete` it" if error.errno == errno.EINVAL else error.strerror
            raise NamespaceError(f"cannot enter network namespace {namespace!r}: {reason}") from error
        finally:
            os.close(there)
        try:
            yield
        finally:
            _setns(home)
    finally:
        os.close(home)


def _open(path: str, otherwise: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NamespaceError(f"{otherwise} ({path}: {error.strerror})") from error


def _setns(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
