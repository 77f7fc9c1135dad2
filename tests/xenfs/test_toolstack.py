"""Goal: disks are plugged and unplugged in the order that libxl, blkback and blkfront of a real Xen write the store.
Method: every write and removal of a whole world is recorded with its author; orders of delivery come from seeds."""

from __future__ import annotations

import pytest

from blockdev.storage import MemoryStorage
from tests.xenfs.machine import Machine
from xenfs.diskspec import parse_disk
from xenfs.vifspec import parse_vif
from xenmodel.types import Domid, PeerFault
from xenmodel.xenstore.errors import XsErrno, XsError

IDENT = 51728
BACK, FRONT, LIBXL = (f"/local/domain/0/backend/vbd/1/{IDENT}", f"/local/domain/1/device/vbd/{IDENT}",
                      f"/libxl/1/device/vbd/{IDENT}")  # fmt: skip
SEEDS = [None, *range(12)]

Written = tuple[int, str, str]  # the author's domid, the path with B, F or L for the directory, the value


class Recorder(Machine):
    """A guest with one disk xvda, up; what happens then is in `log`."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__({"g": {"xvda": MemoryStorage(1024)}}, seed=seed)
        self.storages["/g/xvdb"] = MemoryStorage(32768)
        self.store = self.world.hypervisor.store
        self.log: list[Written] = []
        write, remove = self.store.write, self.store.remove

        def recorded_write(view, domid, path, value):
            write(view, domid, path, value)
            self.log.append((domid, short(path), value.decode()))

        def recorded_remove(view, domid, path):
            remove(view, domid, path)
            self.log.append((domid, short(path), "REMOVED"))

        self.store.write, self.store.remove = recorded_write, recorded_remove  # type: ignore[method-assign]

    def tree(self) -> list[tuple[str, bytes, str]]:
        return [(path, value, ",".join(map(str, perms))) for path, value, perms in self.store.dump()]

    def attach(self, target: str = "/g/xvdb") -> None:
        self.world.toolstack.attach_disk(1, parse_disk(f"{target},raw,xvdb,w"))
        self.world.settle()

    def detach(self) -> bool:
        done: list[bool] = []
        self.world.toolstack.detach_disk(1, IDENT, lambda: done.append(True))
        self.world.settle()
        return done == [True]

    def states(self) -> list[str]:
        """"B=2" and the like, in order."""
        return [f"{path[0]}={value}" for _, path, value in self.log if path in ("B/state", "F/state")]


def short(path: str) -> str:
    for name, directory in (("B", BACK), ("F", FRONT), ("L", LIBXL)):
        if path == directory or path.startswith(f"{directory}/"):
            return name + path.removeprefix(directory)
    return path


def keys(log: list[Written], domid: int, letter: str) -> list[str]:
    return [path[2:] for author, path, _ in log if author == domid and path.startswith(f"{letter}/")]


@pytest.mark.parametrize("seed", SEEDS)
def test_connect(seed):
    """Goal: the order of a hot attach: libxl's transaction, B=2, the script and F=3, B=4, F=4, each after its features.
    Method: the log of one attach against the sequence that was seen on Xen 4.17 (and the older ring scheme's key)."""
    with Recorder(seed) as machine:
        machine.attach()
        log, states = machine.log[:], machine.states()
    libxl = [path for _, path, _ in log][: log.index((0, "L/specification", "xen")) + 1]
    assert [path for i, path in enumerate(libxl) if i == 0 or path[0] != libxl[i - 1][0]] == [
        "L", "F", "B", "L/params",
    ]  # fmt: skip
    assert states == ["F=1", "B=1", "B=2", "F=3", "B=4", "F=4"]
    rest = log[len(libxl) :]
    assert keys(rest, 1, "F") == ["ring-ref", "event-channel", "protocol", "feature-persistent", "state", "state"]
    script = ["physical-device-path", "hotplug-status"]
    assert [key for key in keys(rest, 0, "B") if key in script] == script
    assert [key for key in keys(rest, 0, "B") if key not in script] == [
        "feature-max-indirect-segments", "multi-queue-max-queues", "max-ring-page-order", "max-ring-pages", "state",
        "feature-flush-cache", "discard-granularity", "discard-alignment", "discard-secure", "feature-discard",
        "feature-barrier", "feature-persistent", "sectors", "info", "sector-size", "physical-sector-size", "state",
    ]  # fmt: skip
    paths = [path for _, path, _ in rest]
    assert paths.index("B/physical-device-path") < paths.index("B/sectors"), "blkback needs to know the image first"


@pytest.mark.parametrize("seed", SEEDS)
def test_detach(seed):
    """Goal: online=0 and B=5 by the toolstack, F=6 directly, B=6, then the three directories go; nothing is left.
    Method: attach, detach, attach, detach; the log of the detach, and the tree before and after."""
    with Recorder(seed) as machine:
        before = machine.tree()
        for _ in range(2):
            machine.attach()
            machine.log.clear()
            assert machine.detach()
            assert machine.log == [
                (0, "B/online", "0"), (0, "B/state", "5"), (1, "F/state", "6"), (0, "B/state", "6"),
                (0, "F", "REMOVED"), (0, "L", "REMOVED"), (0, "B", "REMOVED"),
            ]  # fmt: skip
            assert machine.tree() == before
        assert machine.world.toolstack.client.directory("/local/domain/1/device/vbd") == ["51712"]
        assert machine.kernel.names("domains/1/dev") == [".", "..", "xen", "xvda"]
        assert [front.node for _, front in machine.world.fronts()] == ["/local/domain/1/device/vbd/51712"]
        assert len(machine.world.backs()) == 1


def test_detach_of_the_last():
    """Goal: with the last disk the directories above it go too, and come back.  Method: detach the only one, attach."""
    with Recorder() as machine:
        up = machine.tree()
        machine.world.toolstack.detach_disk(1, 51712)
        machine.world.settle()
        paths = [path for path, *_ in machine.tree()]
        assert not [path for path in paths if "vbd" in path or path.startswith("/local/domain/0/backend")]
        machine.world.toolstack.attach_disk(1, parse_disk("/g/xvda,raw,xvda,w"))
        machine.world.settle()
        assert sorted(path for path, *_ in machine.tree()) == sorted(path for path, *_ in up)


@pytest.mark.parametrize("seed", SEEDS)
def test_guest_closes(seed):
    """Goal: when the guest closes a disk it is F=5, B=5, F=6, B=6, and `online` stays 1.  Method: the frontend's close()."""
    with Recorder(seed) as machine:
        machine.attach()
        machine.log.clear()
        machine.front("g", "xvdb").close()
        machine.world.settle()
        assert machine.states() == ["F=5", "B=5", "F=6", "B=6"]
        assert machine.world.toolstack.client.read(f"{BACK}/online") == "1"


@pytest.mark.parametrize("reason", ["image", "guest"])
def test_detach_of_what_is_closed(reason):
    """Goal: a disk whose backend is Closed already can be unplugged: it is not asked to close again.
    Method: an image that cannot be opened; a disk that the guest closed. No state is written, all directories go."""
    with Recorder() as machine:
        before = machine.tree()
        machine.attach("/none" if reason == "image" else "/g/xvdb")
        if reason == "guest":
            machine.front("g", "xvdb").close()
            machine.world.settle()
        assert machine.world.toolstack.client.read(f"{BACK}/state") == "6"
        machine.log.clear()
        assert machine.detach()
        assert machine.states() == []
        after = [entry for entry in machine.tree() if not entry[0].startswith("/local/domain/0/error")]
        assert after == before


def test_image_that_is_missing():
    """Goal: the reason is where xenbus_dev_fatal() writes it, and no other disk suffers.  Method: attach, read, use xvda."""
    with Recorder() as machine:
        machine.attach("/none")
        error = machine.world.toolstack.client.read(f"/local/domain/0/error/backend/vbd/1/{IDENT}/error")
        assert error == "22 cannot open disk image /none: there is none"
        assert set(machine.states()[-2:]) == {"B=6", "F=6"}
        assert machine.kernel.names("domains/1/dev") == [".", "..", "xen", "xvda"]
        assert machine.kernel.read(machine.kernel.handle("domains/1/dev/xvda"), 0, 512).data == bytes(512)


def odd_script(machine: Recorder, path: str, value: str) -> str | None:
    """The block script runs once more, on another value; what `hotplug-status` says after it."""
    client = machine.world.toolstack.client
    machine.attach()
    client.rm(f"{BACK}/hotplug-status")
    client.write(path, value)
    client.write(f"{BACK}/state", 2)
    machine.world.settle()
    return client.read(f"{BACK}/hotplug-status")


@pytest.mark.parametrize(("params", "reason"), [
    ("/x\0y", "params '/x\\x00y': embedded null"),
    ("x" * (4096 - len(f"{BACK}/params") - 1), "E2BIG: 4053 bytes are too many"),
])  # fmt: skip
def test_params_that_are_no_path(params, reason):
    """Goal: the script ends as its function for errors does, with the reason in the store; the other disk goes on, and this
    one can be unplugged.  Method: `params` with a NUL, and one that is too long for physical-device-path."""
    with Recorder() as machine:
        assert odd_script(machine, f"{BACK}/params", params) == "error"
        assert reason in machine.world.toolstack.client.read(f"{BACK}/hotplug-error")
        assert machine.kernel.read(machine.kernel.handle("domains/1/dev/xvda"), 0, 512).data == bytes(512)
        assert machine.detach()


def test_a_callback_that_fails(caplog):
    """Goal: what a watch of the toolstack cannot cope with is one line with the node, and the next event is heard.
    Method: what is called when a disk is gone raises each of the three."""
    with Recorder() as machine:
        for error in (XsError(XsErrno.EINVAL, "one"), PeerFault("two"), ValueError("three")):

            def done(error=error):
                raise error

            machine.attach()
            machine.world.toolstack.detach_disk(1, IDENT, done)
            machine.world.settle()
        assert [record.getMessage() for record in caplog.records if record.name == "xenfs.toolstack"] == [
            f"{BACK}/state: {text}" for text in ("EINVAL: one", "two", "three")
        ]


def test_attached_twice():
    """Goal: a number has one disk.  Method: the same disk again, and once more after it was unplugged."""
    with Recorder() as machine:
        machine.attach()
        with pytest.raises(ValueError, match=f"domain 1 has a disk {IDENT} already"):
            machine.attach()
        assert machine.detach()
        machine.attach()
        assert machine.states()[-1] == "F=4"


@pytest.mark.parametrize("name", ["evil", "-1", "@", "9" * 400, "x" * 2900, f"0{IDENT}"])
def test_names_that_are_no_numbers(name):
    """Goal: what somebody put beside libxl's directories hinders neither a new vif's number nor the domain's end.
    Method: such names of both kinds, and destroy."""
    with Recorder() as machine:
        for kind in ("vbd", "vif"):
            machine.world.toolstack.client.write(f"/libxl/1/device/{kind}/{name}", "")
        machine.attach()
        back = machine.world.toolstack.attach_vif(1, None, parse_vif("mac=00:16:3e:11:22:44"))
        assert back == "/local/domain/0/backend/vif/1/0"
        machine.world.toolstack.client.write("/libxl/1/device/vif/0/x", "")
        machine.world.destroy(1)
        assert machine.world.toolstack.client.directory("/libxl") == []
        assert not [path for path, *_ in machine.tree() if path.startswith("/local/domain/0/backend/")]


@pytest.mark.parametrize("seed", SEEDS)
def test_destroy(seed):
    """Goal: a destroyed domain leaves /vm and /libxl empty and nothing else, as on a real Xen.
    Method: dom0's tree before any guest, two guests, destroy both; memory, grants and ports of dom0 are back too."""
    with Machine({}, seed=seed) as empty:
        before = {path for path, *_ in empty.world.hypervisor.store.dump()}
        ports = set(empty.world.dom0.events.channels)
    guests = {"g": {"xvda": MemoryStorage(64), "xvdb": MemoryStorage(64)}, "h": {"xvda": MemoryStorage(64)}}
    with Machine(guests, seed=seed) as machine:
        for domid in (1, 2):
            machine.world.destroy(domid)
        assert {path for path, *_ in machine.world.hypervisor.store.dump()} == before | {"/vm", "/libxl"}
        assert set(machine.world.hypervisor.domains) == {0}
        assert not machine.world.dom0.maptrack.mappings and set(machine.world.dom0.events.channels) == ports
        assert machine.world.backs() == [] and machine.kernel.names("domains") == [".", "..", "0"]


MAY = [
    ("write", "data/x", True), ("write", "attr/x", True), ("write", "feature/x", True), ("write", "error/x", True),
    ("write", "control/shutdown", True), ("write", "device/vbd/51712/state", True), ("write", "device/vbd/51712/new", True),
    ("write", "/local/domain/0/x", False), ("write", "name", False), ("write", "device/new", False),
    ("write", "memory/target", False), ("write", "/local/domain/0/backend/vbd/1/51712/state", False),
    ("write", "/local/domain/0/backend/vbd/1/51712/params", False), ("write", "/local/domain/2/data/x", False),
    ("read", "/local/domain/0/backend/vbd/1/51712/sectors", True), ("read", "vm", True), ("read", "domid", True),
    ("read", "/local/domain/0/backend/vbd/2/51712/sectors", False), ("read", "/local/domain/2/name", False),
    ("read", "/local/domain/2/device/vbd/51712/ring-ref", False), ("read", "/libxl/1/device/vbd/51712/params", False),
    ("directory", "/", False), ("directory", "/local/domain", False), ("directory", "device/vbd", True),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "path", "allowed"), MAY)
def test_permissions(request_, path, allowed):
    """Goal: a guest may do in the tree what it may on a real Xen, and nothing in another's.
    Method: one request each from the first of two guests."""
    with Machine({"g": {"xvda": MemoryStorage(64)}, "h": {"xvda": MemoryStorage(64)}}) as machine:
        guest = machine.world.hypervisor.store.connect(Domid(1))
        try:
            getattr(guest, request_)(path, *([b"1"] if request_ == "write" else []))
            done = True
        except XsError as error:
            assert error.errno.value == "EACCES"
            done = False
        assert done is allowed
