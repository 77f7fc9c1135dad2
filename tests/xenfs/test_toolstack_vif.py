"""Goal: interfaces are plugged and unplugged in the store as libxl and its scripts do it on a real Xen, node for node.
Method: the tree against `xenstore-ls -fp` of Xen 4.17.7, the order against its trace; both ends of the device are played by
hand, and so is the host. Orders of delivery come from seeds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from xenfs.config import GuestConfig
from xenfs.toolstack import HotplugDone, Toolstack
from xenfs.vifspec import generated_mac, parse_vif
from xenmodel.hypervisor import Hypervisor
from xenmodel.types import Domid
from xenmodel.xenstore.client import Client

UUID = "17e8ff97-f89e-404d-ad0a-eec3136a3f82"
SPEC = "mac=00:16:3e:11:22:44,bridge=xenbr0"
SEEDS = [None, *range(12)]

# What was there of vif 1 after `xl network-attach`, before either driver: permissions and values, in order.
REAL = """
/local/domain/1/device/vif/1 (n1,r0)
backend=/local/domain/0/backend/vif/1/1
backend-id=0
state=1
handle=1
mac=00:16:3e:11:22:44
trusted=1
mtu=1500 (n0,r1)

/local/domain/0/backend/vif/1/1 (n0,r1)
frontend=/local/domain/1/device/vif/1
frontend-id=1
online=1
state=1
script=/etc/xen/scripts/vif-bridge
mac=00:16:3e:11:22:44
bridge=xenbr0
handle=1
type=vif
hotplug-status=
"""
FRONT, BACK = (block.split(" ", 1)[0] for block in REAL.strip().split("\n\n"))
LIBXL = "/libxl/1/device/vif/1"  # (n0); `frontend`, `backend`, then the rest of BACK as it was at first

# The order of the requests of that attach that changed something.
ORDER = [
    "L REMOVED", "L/frontend", "L/backend", "F REMOVED", "F", "F/backend", "F/backend-id", "F/state", "F/handle", "F/mac",
    "F/trusted", "F/mtu", "B REMOVED", "B", "B/frontend", "B/frontend-id", "B/online", "B/state", "B/script", "B/mac",
    "B/bridge", "B/handle", "B/type", "B/hotplug-status", "L/frontend-id", "L/online", "L/state", "L/script", "L/mac",
    "L/bridge", "L/handle", "L/type", "L/hotplug-status",
]  # fmt: skip

Entry = tuple[str, str, str]  # path, value, permissions


def short(path: str) -> str:
    for letter, directory in (("B", BACK), ("F", FRONT), ("L", LIBXL)):
        if path == directory or path.startswith(f"{directory}/"):
            return letter + path.removeprefix(directory)
    return path


class Plant:
    """A guest without drivers, a toolstack, and a dom0 kernel in which netback is played by `back`. `log` has what the
    store was asked to change; `runs` the calls of the host's script."""

    def __init__(self, seed: int | None) -> None:
        self.hypervisor = Hypervisor(None if seed is None else random.Random(seed).randrange)
        self.toolstack = Toolstack(self.hypervisor)
        self.toolstack.create_dom0(8)
        self.domid = self.toolstack.create(GuestConfig("g.cfg", "g", UUID, 8, 8)).domid
        self.dom0, self.guest = (Client(self.hypervisor.store.connect(Domid(domid))) for domid in (0, self.domid))
        self.runs: list[tuple[str, HotplugDone]] = []
        self.log: list[str] = []
        store = self.hypervisor.store
        write, remove = store.write, store.remove

        def recorded_write(view, domid, path, value):
            write(view, domid, path, value)
            self.log.append(f"{short(path)}={value.decode()}")

        def recorded_remove(view, domid, path):
            self.log.append(f"{short(path)} REMOVED")  # before it is tried: libxl removes what is not there, too
            remove(view, domid, path)

        store.write, store.remove = recorded_write, recorded_remove  # type: ignore[method-assign]

    def host(self) -> None:
        """From now on the script takes its time: `runs` collects it."""
        self.toolstack.hotplug_vif = lambda back, done: self.runs.append((back, done))

    def attach(self, spec: str = SPEC, devid: int | None = 1) -> str:
        return self.toolstack.attach_vif(self.domid, devid, parse_vif(spec))

    def back(self, state: int) -> None:
        self.dom0.write(f"{BACK}/state", state)
        self.hypervisor.settle()

    def close(self, *, seen: bool = True, clean: bool = True) -> None:
        """netback at its end: it says Closing, even if it was told so, then Closed, and removes the status."""
        self.dom0.write(f"{BACK}/state", 5)
        self.dom0.write(f"{BACK}/state", 6)
        if clean:
            self.dom0.rm(f"{BACK}/hotplug-status")
        if seen:
            self.hypervisor.settle()

    def tree(self) -> list[Entry]:
        dump = self.hypervisor.store.dump()
        return [(path, value.decode(), ",".join(map(str, perms))) for path, value, perms in dump]

    def read(self, path: str) -> str | None:
        return self.dom0.read(path)


@contextmanager
def plant(seed: int | None = None) -> Iterator[Plant]:
    made = Plant(seed)
    try:
        yield made
    finally:
        made.hypervisor.close()


def real_tree() -> dict[str, list[Entry]]:
    tree: dict[str, list[Entry]] = {}
    for block in REAL.strip().split("\n\n"):
        head, *lines = block.splitlines()
        directory, perms = head.removesuffix(")").split(" (")
        tree[directory] = [(directory, "", perms)]
        for line in lines:
            key, _, rest = line.partition("=")
            value, _, own = rest.partition(" (")
            tree[directory].append((f"{directory}/{key}", value, own.removesuffix(")") or perms))
    copies = [("", ""), ("/frontend", FRONT), ("/backend", BACK)]
    copies += [(path.removeprefix(BACK), value) for path, value, _ in tree[BACK][2:]]
    tree[LIBXL] = [(LIBXL + key, value, "n0") for key, value in copies]
    return tree


def test_tree():
    """Goal: every node with its value, permissions and place.  Method: the three directories; nothing else is new but their
    parents, which have the permissions of theirs."""
    with plant() as p:
        before = p.tree()
        assert p.attach() == BACK
        after = p.tree()
    expected = real_tree()
    for directory, entries in expected.items():
        assert [entry for entry in after if f"{entry[0]}/".startswith(f"{directory}/")] == entries
    known = {path for path, *_ in before} | {path for entries in expected.values() for path, *_ in entries}
    assert {(path, perms) for path, _, perms in after if path not in known} == {
        ("/libxl/1/device/vif", "n0"), ("/local/domain/1/device/vif", "n0,r1"), ("/local/domain/0/backend", "n0"),
        ("/local/domain/0/backend/vif", "n0"), ("/local/domain/0/backend/vif/1", "n0"),
    }  # fmt: skip


def test_order():
    """Goal: libxl's transaction, request for request.  Method: the log of an attach."""
    with plant() as p:
        p.log.clear()
        p.attach()
        assert [line.partition("=")[0] for line in p.log] == ORDER


OPTIONS: list[tuple[str, list[tuple[str, str]], dict[str, str]]] = [
    # option, what is added to the backend before which key, and what differs in the frontend
    ("vifname=web0", [("vifname", "mac")], {}),
    ("ip=10.0.0.5 2001:db8::5/48", [("ip", "bridge")], {}),
    ("rate=1MB/s@20ms", [("rate", "bridge")], {}),
    ("mtu=9000", [("mtu", "bridge")], {"mtu": "9000"}),
    ("mtu=1500", [], {}),
    ("untrusted", [], {"trusted": "0"}),
    ("model=e1000,type=vif,backend=Domain-0,queues=1", [], {}),
    ("mtu=68,rate=10Mb/s,ip=10.0.0.5,vifname=v", [("vifname", "mac"), ("ip", "rate"), ("rate", "mtu"), ("mtu", "bridge")],
     {"mtu": "68"}),
]  # fmt: skip
VALUES = {
    "vifname": ("web0", "v"),
    "ip": ("10.0.0.5/24 2001:db8::5/48", "10.0.0.5/24"),
    "rate": ("20000,20000", "62500,50000"),
    "mtu": ("9000", "68"),
}


@pytest.mark.parametrize(("option", "added", "frontend"), OPTIONS)
def test_options(option, added, frontend):
    """Goal: what a vif specification says is where libxl puts it, in the backend's directory and in libxl's copy.
    Method: one option at a time, then all; keys in order, with values."""
    with plant() as p:
        p.attach(f"{SPEC},{option}")
        plain = ["online", "state", "script", "mac", "bridge", "handle", "type", "hotplug-status"]
        for key, follower in reversed(added):
            plain.insert(plain.index(follower), key)
        for directory, head in ((BACK, ["frontend", "frontend-id"]), (LIBXL, ["frontend", "backend", "frontend-id"])):
            assert p.dom0.directory(directory) == head + plain
            assert all(p.read(f"{directory}/{key}") in VALUES[key] for key, _ in added)
        usual = {"trusted": "1", "mtu": "1500"}
        assert {key: p.read(f"{FRONT}/{key}") for key in usual} == usual | frontend


def test_queues():
    """Goal: our own key is in the backend's directory alone, and only if it says something.  Method: two queues."""
    with plant() as p:
        p.attach(f"{SPEC},queues=2")
        assert p.dom0.directory(BACK)[-2:] == ["hotplug-status", "xenfs-queues"]
        assert p.read(f"{BACK}/xenfs-queues") == "2"
        assert "xenfs-queues" not in p.dom0.directory(LIBXL)


def test_numbers():
    """Goal: the number is the one asked for, else that of the specification, else the lowest free; an address is made.
    Method: several interfaces, one leaves, one comes."""
    with plant() as p:
        numbers = [p.attach("", devid).rpartition("/")[2] for devid in (None, 2, None, None)]
        assert numbers == ["0", "2", "1", "3"]
        assert p.attach("devid=7", None).endswith("/7")
        for taken in (7, 0):
            with pytest.raises(ValueError, match=f"domain 1 has an interface {taken} already"):
                p.attach("", taken)
        p.hypervisor.settle()
        for number in (1, 7):
            p.toolstack.detach_vif(1, number)
            p.dom0.write(f"/local/domain/0/backend/vif/1/{number}/state", 6)
            p.hypervisor.settle()
        assert p.attach("", None).endswith("/1")
        assert p.read(f"{FRONT}/mac") == p.read(f"{BACK}/mac") == generated_mac(UUID, 1)
        with pytest.raises(ValueError, match="domain 1 has no interface 9"):
            p.toolstack.detach_vif(1, 9)


@pytest.mark.parametrize("seed", SEEDS)
def test_script(seed):
    """Goal: the script runs once netback is there, and ends with the guest's mtu, then `connected`, as vif-bridge does.
    Method: the states one by one, each said twice; the log of what follows."""
    with plant(seed) as p:
        p.host()
        p.attach(f"{SPEC},mtu=9000")
        p.hypervisor.settle()
        assert p.runs == []
        p.back(2)
        p.back(2)
        ((directory, done),) = p.runs
        assert directory == BACK
        p.log.clear()
        done(None)
        assert p.log == ["F/mtu=9000", "B/hotplug-status=connected"]
        assert (f"{FRONT}/mtu", "9000", "n0,r1") in p.tree()
        done("too late to fail")
        p.back(4)
        p.back(2)
        assert len(p.runs) == 1
        assert p.log[2:] == ["B/state=4", "B/state=2"]


@pytest.mark.parametrize(("mtu", "promised"), [(None, "1500"), (1400, "1400")])
def test_script_at_once(mtu, promised):
    """Goal: without a host every interface is connected at once; an mtu that only the script knows reaches the guest.
    Method: what a new toolstack has; a done() that is called before the script returns."""
    with plant() as p:
        if mtu is not None:
            p.toolstack.hotplug_vif = lambda _back, done: done(None, mtu)
        p.attach()
        p.back(2)
        assert p.read(f"{BACK}/hotplug-status") == "connected"
        assert (p.read(f"{FRONT}/mtu"), p.read(f"{BACK}/mtu")) == (promised, None)


@pytest.mark.parametrize("reason", ["bridge xenbr0 does not exist", "ü" * 5000])
def test_script_that_fails(reason):
    """Goal: a script's error is where Xen's scripts write it, in their order, cut to what fits; it is not run again.
    Method: fail; InitWait once more."""
    with plant() as p:
        p.host()
        p.attach()
        p.back(2)
        p.log.clear()
        p.runs[0][1](reason)
        assert p.log == [f"B/hotplug-error={reason[:512]}", "B/hotplug-status=error"]
        p.back(2)
        assert len(p.runs) == 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("at", ["running", "connected", "error"])
@pytest.mark.parametrize("end", [{}, {"clean": False}, {"seen": False}], ids=["usual", "status stays", "unseen"])
def test_backend_that_restarts(seed, at, end):
    """Goal: the script runs again for a netback that starts anew, and what was left of the first run counts for nothing.
    Method: close and start while it runs, after it has succeeded and after it has failed; a netback that leaves the status,
    and one so quick that the toolstack sees nothing but the end."""
    with plant(seed) as p:
        p.host()
        p.attach()
        p.back(2)
        first = p.runs[0][1]
        if at != "running":
            first(None if at == "connected" else "no bridge")
        p.close(**end)
        p.back(2)
        assert len(p.runs) == 2
        assert (p.read(f"{BACK}/hotplug-status"), p.read(f"{BACK}/hotplug-error")) == ("", None)
        first(None)
        assert p.read(f"{BACK}/hotplug-status") == ""
        p.runs[1][1](None)
        assert p.read(f"{BACK}/hotplug-status") == "connected"


LEAVE: dict[str, Callable[[Plant], None]] = {
    "detach began": lambda p: p.toolstack.detach_vif(1, 1),
    "detached": lambda p: (p.toolstack.detach_vif(1, 1), p.close())[0],
    "closed": lambda p: p.close(),
    "closed, not told yet": lambda p: p.close(seen=False),
    "destroyed": lambda p: p.toolstack.destroy(1),
}


@pytest.mark.parametrize("how", LEAVE)
def test_script_that_is_late(how):
    """Goal: a script that ends after its interface writes nothing.  Method: each way to go, then done()."""
    with plant() as p:
        p.host()
        p.attach()
        p.back(2)
        LEAVE[how](p)
        p.log.clear()
        p.runs[0][1](None)
        p.runs[0][1]("failed")
        assert p.log == []


def test_guest_that_removed_its_directory():
    """Goal: a guest that destroys its own nodes does not get them back.  Method: remove, then done()."""
    with plant() as p:
        p.host()
        p.attach()
        p.back(2)
        p.guest.rm(FRONT)
        p.runs[0][1](None)
        assert p.read(FRONT) is None
        assert p.read(f"{BACK}/hotplug-status") == "connected"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("others", [(), (0,), (2,)])
def test_detach(seed, others):
    """Goal: online=0 and B=5, then, after netback's B=5 and B=6, the three directories go, and nothing is left.
    Method: attach and detach twice, beside other interfaces; the log, and the whole tree before and after."""
    with plant(seed) as p:
        for other in others:
            p.attach("", other)
        p.hypervisor.settle()
        before = p.tree()
        for _ in range(2):
            ended: list[bool] = []
            p.attach()
            p.back(2)
            p.back(4)
            p.log.clear()
            p.toolstack.detach_vif(1, 1, lambda ended=ended: ended.append(True))
            p.hypervisor.settle()
            assert ended == []
            p.close()
            assert ended == [True]
            gone = ["F REMOVED", "L REMOVED", "B REMOVED"]
            told = ["B/online=0", "B/state=5", "B/state=5", "B/state=6", "B/hotplug-status REMOVED"]
            assert [line for line in p.log if line in (*told, *gone)] == told + gone
            assert p.tree() == before


def test_detach_of_what_is_closed():
    """Goal: a netback that is Closed already is not asked to close.  Method: it fails, then the detach's log."""
    with plant() as p:
        before = p.tree()
        p.attach()
        p.back(6)
        p.log.clear()
        p.toolstack.detach_vif(1, 1)
        p.hypervisor.settle()
        assert [line for line in p.log if "state" in line] == []
        assert p.tree() == before


def test_destroy():
    """Goal: a destroyed domain leaves nothing of its interfaces, and no watch.  Method: three, one being detached."""
    with plant() as p:
        for devid in range(3):
            p.attach("", devid)
        p.hypervisor.settle()
        p.toolstack.detach_vif(1, 2)
        p.toolstack.destroy(1)
        p.hypervisor.settle()
        paths = [path for path, *_ in p.tree()]
        assert [path for path in paths if "vif" in path or "backend" in path or path.startswith("/local/domain/1")] == []
        assert not p.toolstack.client.connection.watches
