"""netlink.py (edge): bridges, addresses and network namespaces of the host, through pyroute2.

Called from a worker thread, for every call waits for the kernel (1 to 2 ms). Each call opens a socket of its own in the
namespace it is about and closes it: pyroute2 binds sockets and event loops to the thread that made them, and worker threads
come and go. pyroute2's own way into a namespace (NetNS, netns.create) forks, which a process with threads had better not;
so we enter it ourselves, see netdev/tap.py.

What we make carries our mark in its alias (a namespace: the alias of its `lo`): process id and start time of the maker.
By it a later run knows what a killed one left behind, and may replace, from what is somebody else's and never touched.
Every failure is a NetlinkError which names the interface and the namespace.

Left out: routes, VLANs, traffic shaping, Open vSwitch.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from typing import Any

from pyroute2 import IPRoute  # type: ignore[import-untyped]
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted  # type: ignore[import-untyped]
from pyroute2.netlink.exceptions import NetlinkError as Refused

from netdev.link import check_name
from netdev.tap import CLONE_NEWNET, MAC_BYTES, NETNS_DIR, OWN_NETNS, NamespaceError, inside, namespace_path

DUMP_TRIES = 5  # a dump is interrupted when the table changes meanwhile
OUR_PREFIX = "xn"  # of the interfaces of our guests
IFF_UP, IFA_F_NODAD, LOOPBACK_INDEX = 1, 2, 1
NO_SUCH = (errno.ENODEV, errno.ERANGE)  # the latter: nothing can have a name so long
MS_BIND, MS_REC, MS_SHARED, MNT_DETACH = 0x1000, 0x4000, 0x100000, 2

_MARK = re.compile(r"made by xenfs, process (\d+) started (\d+)")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.unshare.argtypes = [ctypes.c_int]

Address = IPv4Interface | IPv6Interface
Message = dict[str, Any]  # pyroute2's nlmsg: fields by [], attributes by get()


class NetlinkError(Exception):
    """Something the host's network would not do; the text says what, to which interface, where and why."""


class NotOursError(NetlinkError):
    def __init__(self, what: str) -> None:
        super().__init__(f"cannot {what}: it is not ours any more: somebody has made another one of that name")


@dataclass(frozen=True)
class Link:
    """An interface. `kind` is "" for hardware and lo, `master` is the name of its bridge or "", `mac` may be empty."""

    name: str
    index: int
    kind: str
    up: bool
    carrier: bool
    mtu: int
    mac: bytes
    master: str
    alias: str


class Netlink:
    """The interfaces of one network namespace (a name of ip-netns(8); None: the calling thread's)."""

    def __init__(self, namespace: str | None = None) -> None:
        self.namespace = namespace
        with self._ask("reach the network"):  # a namespace that is missing is better said now
            pass

    # ---- bridges and links ----

    def add_bridge(self, name: str, addresses: Sequence[str] = ()) -> bool:
        """A bridge that forwards at once (no STP), is up and has `addresses` ("10.0.0.1/24"). True if it is new, False if
        it is one that an xenfs which no longer lives has left: that one keeps its ports and whatever addresses it has."""
        what = f"make bridge {name!r}"
        wanted = [self._parse(what, text) for text in addresses]
        with self._ask(what) as ip:
            check_name(name)
            if (found := self._find(ip, name)) is not None:
                self._check_leftover(what, self._link(ip, found))
            else:
                ip.link("add", ifname=name, kind="bridge", br_stp_state=0, br_forward_delay=0)
            try:
                index = (found or self._found(ip, name, what))["index"]
                ip.link("set", index=index, ifalias=_mark(), state="up")
                for address in wanted:
                    self._add_address(ip, index, address)
            except BaseException:
                if found is None:
                    with contextlib.suppress(Refused):
                        ip.link("del", ifname=name)
                raise
            return found is None

    def release_bridge(self, name: str) -> None:
        """Delete a bridge of ours; if it is gone already, so much the better. NetlinkError if another has its name now."""
        with self._ask(what := f"remove bridge {name!r}") as ip:
            found = self._find(ip, name)
            if found is None:
                return
            if found.get("ifalias") != _mark():
                raise NotOursError(what + self._where())
            ip.link("del", index=found["index"])

    def is_bridge(self, name: str) -> bool:
        with self._ask(f"look for bridge {name!r}") as ip:
            return _kind(self._find(ip, name)) == "bridge"

    def link(self, name: str) -> Link:
        with self._ask(what := f"look at interface {name!r}") as ip:
            return self._link(ip, self._found(ip, name, what))

    def set_link(
        self, name: str, *, up: bool | None = None, mtu: int | None = None,
        mac: bytes | None = None, bridge: str | None = None, gso_max: int | None = None,
    ) -> None:  # fmt: skip
        """Change what is not None, in one request. `bridge` enslaves; "" releases. `gso_max`: of an unsegmented packet."""
        what = f"set interface {name!r}"
        change: dict[str, Any] = {}
        if up is not None:
            change["state"] = "up" if up else "down"
        if mtu is not None:
            change["mtu"] = min(max(mtu, 0), 0xFFFFFFFF)  # these are wrong too, and the kernel says so
        if gso_max is not None:
            change["gso_max_size"] = gso_max
        if mac is not None:
            if len(mac) != MAC_BYTES:
                raise self._error(what, f"MAC address {mac.hex(':')!r} has not {MAC_BYTES} bytes")
            change["address"] = mac.hex(":")
        with self._ask(what) as ip:
            index = self._found(ip, name, what)["index"]
            if bridge is not None:
                change["master"] = self._bridge(ip, bridge, what)["index"] if bridge else 0
            if change:
                ip.link("set", index=index, **change)

    # ---- addresses ----

    def add_address(self, name: str, address: str) -> None:
        """`address` as "10.0.0.1/24" or "fd00::1/64". If it is there already, it stays. No duplicate address detection, so
        that an IPv6 address can be used at once."""
        what = f"give interface {name!r} the address {address}"
        wanted = self._parse(what, address)
        with self._ask(what) as ip:
            self._add_address(ip, self._found(ip, name, what)["index"], wanted)

    def addresses(self, name: str) -> list[Address]:
        with self._ask(what := f"read the addresses of interface {name!r}") as ip:
            index = self._found(ip, name, what)["index"]
            rows = _dump(ip.addr, index=index)
            return [ip_interface(f"{row.get('local') or row.get('address')}/{row['prefixlen']}") for row in rows]

    # ---- inside ----

    @contextlib.contextmanager
    def _ask(self, what: str) -> Iterator[Any]:
        """A socket in our namespace; what goes wrong with it becomes a NetlinkError that begins with `what`."""
        with _failing(what, self._where()):
            with inside(self.namespace):
                socket = IPRoute(ext_ack=True)
            with socket:
                yield socket

    def _error(self, what: str, reason: str) -> NetlinkError:
        return NetlinkError(f"cannot {what}{self._where()}: {reason}")

    def _where(self) -> str:
        return f" in network namespace {self.namespace!r}" if self.namespace else ""

    def _find(self, ip: Any, name: str) -> Message | None:
        try:
            return next(iter(ip.link("get", ifname=name)), None)
        except Refused as error:
            if error.code not in NO_SUCH:
                raise
            return None

    def _found(self, ip: Any, name: str, what: str) -> Message:
        if (found := self._find(ip, name)) is None:
            raise self._error(what, f"there is no interface {name!r}; `ip link` shows which there are")
        return found

    def _bridge(self, ip: Any, name: str, what: str) -> Message:
        if (found := self._find(ip, name)) is None:
            raise self._error(what, f"there is no bridge {name!r}; `ip link add {name} type bridge` makes one")
        if _kind(found) != "bridge":
            raise self._error(what, f"{name!r} is no bridge, but {_kind(found) or 'a plain interface'}; name another")
        return found

    def _link(self, ip: Any, found: Message) -> Link:
        master = ""
        if (index := found.get("master")) is not None:
            master = next((str(row.get("ifname")) for row in ip.link("get", index=index)), "")
        return Link(
            name=str(found.get("ifname")), index=found["index"], kind=_kind(found), up=bool(found["flags"] & IFF_UP),
            carrier=bool(found.get("carrier")), mtu=found.get("mtu") or 0, mac=_mac(found.get("address")), master=master,
            alias=found.get("ifalias") or "",
        )  # fmt: skip

    def _check_leftover(self, what: str, link: Link) -> None:
        if reason := _kept(link.alias):
            raise self._error(what, f"there is an interface of that name; {reason}; choose another name")
        if link.kind != "bridge":
            raise self._error(what, f"an xenfs has left an interface of that name and kind {link.kind!r}; delete it")

    def _parse(self, what: str, text: str) -> Address:
        with contextlib.suppress(ValueError):
            return ip_interface(text if "/" in text else "")  # without a prefix, Python would take /32
        raise self._error(what, f"{text!r} is no address with prefix, such as 10.0.0.1/24 or fd00::1/64")

    def _add_address(self, ip: Any, index: int, address: Address) -> None:
        flags = {"flags": IFA_F_NODAD} if address.version == 6 else {}
        ip.addr("replace", index=index, address=str(address.ip), prefixlen=address.network.prefixlen, **flags)


@contextlib.contextmanager
def _failing(what: str, where: str = "") -> Iterator[None]:
    try:
        yield
    except NamespaceError as error:  # which names it
        raise NetlinkError(f"cannot {what}: {error}") from error
    except (Refused, OSError, ValueError) as error:
        denied = getattr(error, "code", None) or getattr(error, "errno", None)
        reason = getattr(error, "strerror", None) or str(error.args[-1])
        raise NetlinkError(f"cannot {what}{where}: {reason}{'; be root' if denied == errno.EPERM else ''}") from error


def _dump(table: Callable[..., Any], **only: Any) -> list[Message]:
    for _ in range(DUMP_TRIES - 1):
        with contextlib.suppress(NetlinkDumpInterrupted):
            return list(table("dump", **only))
    return list(table("dump", **only))


def _kind(found: Message | None) -> str:
    info = found.get("linkinfo") if found is not None else None
    return str(info.get("kind") or "") if info else ""


def _mac(text: str | None) -> bytes:
    return bytes.fromhex((text or "").replace(":", ""))


# ---- whose is it? ----


def _mark() -> str:
    return f"made by xenfs, process {os.getpid()} started {_started(os.getpid())}"


def _kept(alias: str) -> str:
    """Why we must leave alone what has that alias; "" if its maker was an xenfs and lives no more."""
    maker = _MARK.fullmatch(alias)
    if maker is None:
        return "xenfs has not made it"
    return f"it belongs to an xenfs that is running, process {maker[1]}" if _started(int(maker[1])) == maker[2] else ""


def _started(pid: int) -> str | None:
    """When process `pid` was started, in ticks since boot; None if it is no more (proc_pid_stat(5), field 22)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, *fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in (b"Z", b"X") else fields[18].decode()


# ---- network namespaces, as ip-netns(8) makes them: one bind mount each in /run/netns ----


def create_namespace(name: str) -> None:
    """A new network namespace with our mark, its lo up. The calling thread stays where it is."""
    with _locked(f"create network namespace {name!r}") as what:
        _create(name, what)


def _create(name: str, what: str) -> None:
    path = namespace_path(name)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0))
    except FileExistsError as error:
        raise NetlinkError(f"cannot {what}: it exists; choose another name, or `ip netns delete {name}`") from error
    try:
        _mount_new_namespace(path)
        with Netlink(name)._ask(what) as ip:
            ip.link("set", index=LOOPBACK_INDEX, ifalias=_mark(), state="up")
    except BaseException:
        _take_away(path)
        raise


def remove_namespace(name: str) -> None:
    """Take the name away. The namespace ends with its last process and descriptor. If there is none of it: nothing."""
    with _locked(f"remove network namespace {name!r}"):
        _take_away(namespace_path(name))


def release_namespace(name: str) -> None:
    """remove_namespace() for one of ours. NetlinkError if another has its name now."""
    with _locked(f"remove network namespace {name!r}") as what:
        if name in namespaces():
            if _contents(name, what)[0] != _mark():
                raise NotOursError(what)
            _take_away(namespace_path(name))


def claim_namespace(name: str) -> None:
    """create_namespace(), but one that an xenfs which no longer lives has left is removed first. NetlinkError if it is
    in use (its maker lives, or a guest's interface is in it) or was made by somebody else."""
    with _locked(f"claim network namespace {name!r}") as what:
        if name in namespaces():
            alias, links = _contents(name, what)
            if reason := _kept(alias):
                raise NetlinkError(f"cannot {what}: it exists; {reason}; choose another name")
            if taken := sorted(link for link in links if link.startswith(OUR_PREFIX)):
                raise NetlinkError(f"cannot {what}: in use: {', '.join(taken)} is in it; choose another name")
            _take_away(namespace_path(name))
        _create(name, what)


def namespaces() -> list[str]:
    return sorted(os.listdir(NETNS_DIR)) if os.path.isdir(NETNS_DIR) else []


def _contents(name: str, what: str) -> tuple[str, list[str]]:
    """The mark of a namespace (the alias of its lo), and the names of its interfaces."""
    with Netlink(name)._ask(what) as ip:
        rows = _dump(ip.link)
    alias = next((row.get("ifalias") or "" for row in rows if row["index"] == LOOPBACK_INDEX), "")
    return alias, [str(row.get("ifname")) for row in rows]


def _take_away(path: str) -> None:
    _libc.umount2(os.fsencode(path), MNT_DETACH)  # no mount: then it is only a file
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        more = f"; something else is mounted on {path}, `umount` it" if error.errno == errno.EBUSY else ""
        raise OSError(error.errno, f"{error.strerror}{more}") from error


@contextlib.contextmanager
def _locked(what: str) -> Iterator[str]:
    """Nobody else changes the directory meanwhile: ip-netns(8) and other xenfs take the same lock. It is a shared mount, as
    ip makes it, so that what changes here does so in every mount namespace."""
    with _failing(what):
        os.makedirs(directory := os.fsencode(NETNS_DIR), mode=0o755, exist_ok=True)
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _libc.mount(b"", directory, b"none", MS_SHARED | MS_REC, None):
                _mount(directory, directory, MS_BIND | MS_REC)
                _mount(b"", directory, MS_SHARED | MS_REC)
            yield what
        finally:
            os.close(lock)


def _mount_new_namespace(path: str) -> None:
    """In a thread of its own, which ends with the new namespace: so no failure can leave the caller in the wrong one."""
    failed: list[OSError] = []

    def make() -> None:
        try:
            _check(_libc.unshare(CLONE_NEWNET))
            _mount(os.fsencode(OWN_NETNS), os.fsencode(path), MS_BIND)
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=make, name="new-netns")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def _mount(source: bytes, target: bytes, flags: int) -> None:
    _check(_libc.mount(source, target, b"none", flags, None))


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
