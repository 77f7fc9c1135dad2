"""Goal: a device that another guest serves is in the store as libxl puts it there, and goes without a trace whoever is left.
Method: two guests without drivers; the tree node for node, with permissions, before and after each way to go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from xenfs.config import GuestConfig
from xenfs.diskspec import parse_disk
from xenfs.toolstack import Toolstack
from xenfs.vifspec import parse_vif
from xenmodel.hypervisor import Hypervisor
from xenmodel.types import Domid
from xenmodel.xenstore.client import Client
from xenmodel.xenstore.errors import XsError

UUIDS = ("17e8ff97-f89e-404d-ad0a-eec3136a3f82", "27e8ff97-f89e-404d-ad0a-eec3136a3f82")
DISK, VIF = "vbd/2/51712", "vif/2/0"
DISK_SPEC = "backend={},vdev=xvda,access=r,target=pool/volume"
VIF_SPEC = "mac=00:16:3e:11:22:44,bridge=br,backend={}"

# Guest 1 serves guest 2. Permissions are those of the directory unless a key has its own.
REAL = {
    DISK: """
/local/domain/2/device/vbd/51712 (n2,r1)
backend=/local/domain/1/backend/vbd/2/51712
backend-id=1
state=1
virtual-device=51712
device-type=disk
trusted=1
protocol=x86_64-abi

/local/domain/1/backend/vbd/2/51712 (n1,r2)
frontend=/local/domain/2/device/vbd/51712
params=pool/volume
script=/etc/xen/scripts/block
frontend-id=2
online=1
removable=0
bootable=1
state=1
dev=xvda
type=phy
mode=r
device-type=disk
discard-enable=0
specification=xen
""",
    VIF: """
/local/domain/2/device/vif/0 (n2,r1)
backend=/local/domain/1/backend/vif/2/0
backend-id=1
state=1
handle=0
mac=00:16:3e:11:22:44
trusted=1
mtu=1500 (n1,r2)

/local/domain/1/backend/vif/2/0 (n1,r2)
frontend=/local/domain/2/device/vif/0
frontend-id=2
online=1
state=1
script=/etc/xen/scripts/vif-bridge
mac=00:16:3e:11:22:44
bridge=br
handle=0
type=vif
hotplug-status=
""",
}
DEVICES = list(REAL)
Entry = tuple[str, str, str]  # path, value, permissions


class Pair:
    """Guest 1, `storage`, and guest 2, whose devices it serves; `back` is the client of whatever does so."""

    def __init__(self) -> None:
        self.hypervisor = Hypervisor()
        self.toolstack = Toolstack(self.hypervisor)
        self.toolstack.create_dom0(8)
        self.toolstack.create(GuestConfig("s.cfg", "storage", UUIDS[0], 8, 8, driver_domain=True))
        self.toolstack.create(GuestConfig("g.cfg", "g", UUIDS[1], 8, 8))
        self.dom0, self.back = (Client(self.hypervisor.store.connect(Domid(domid))) for domid in (0, 1))
        self.hypervisor.settle()

    def attach(self, device: str, backend: str = "storage") -> str:
        """The backend's directory."""
        if device == DISK:
            made = self.toolstack.attach_disk(2, parse_disk(DISK_SPEC.format(backend)))
        else:
            made = self.toolstack.attach_vif(2, None, parse_vif(VIF_SPEC.format(backend)))
        self.hypervisor.settle()
        return made

    def detach(self, device: str, *, force: bool = False) -> list[bool]:
        """Not empty when nothing is left of it; also later."""
        done: list[bool] = []
        if device == DISK:
            self.toolstack.detach_disk(2, 51712, lambda: done.append(True), force=force)
        else:
            self.toolstack.detach_vif(2, 0, lambda: done.append(True), force=force)
        self.hypervisor.settle()
        return done

    def say(self, node: str, state: int) -> None:
        self.back.write(f"{node}/state", state)
        self.hypervisor.settle()

    def tree(self) -> list[Entry]:
        dump = self.hypervisor.store.dump()
        return [(path, value.decode(), ",".join(map(str, perms))) for path, value, perms in dump]

    def traces(self, device: str) -> list[str]:
        """What is left of a device, wherever it is."""
        kind = device.partition("/")[0]
        return [path for path, *_ in self.tree() if f"/{kind}" in path or "backend" in path]


@contextmanager
def pair() -> Iterator[Pair]:
    made = Pair()
    try:
        yield made
    finally:
        made.hypervisor.close()


def real_tree(device: str) -> dict[str, list[Entry]]:
    tree: dict[str, list[Entry]] = {}
    for block in REAL[device].strip().split("\n\n"):
        head, *lines = block.splitlines()
        directory, perms = head.removesuffix(")").split(" (")
        tree[directory] = [(directory, "", perms)]
        for line in lines:
            key, _, rest = line.partition("=")
            value, _, own = rest.partition(" (")
            tree[directory].append((f"{directory}/{key}", value, own.removesuffix(")") or perms))
    front, back = tree
    kind, _, ident = device.split("/")
    copy = f"/libxl/2/device/{kind}/{ident}"
    tree[copy] = [(copy, "", "n0"), (f"{copy}/frontend", front, "n0"), (f"{copy}/backend", back, "n0")]
    tree[copy] += [(copy + path.removeprefix(back), value, "n0") for path, value, _ in tree[back][2:]]
    return tree


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["storage", "1", "01"])
def test_tree(device: str, backend: str) -> None:
    """Goal: every node with its value, owner and place; a target that means something elsewhere is as it was written.
    Method: the three directories; what else is new are their parents, with the permissions of theirs."""
    with pair() as p:
        before = p.tree()
        expected = real_tree(device)
        assert p.attach(device, backend) == list(expected)[1]
        after = p.tree()
    for directory, entries in expected.items():
        assert [entry for entry in after if f"{entry[0]}/".startswith(f"{directory}/")] == entries
    known = {path for path, *_ in before} | {path for entries in expected.values() for path, *_ in entries}
    kind = device.partition("/")[0]
    assert {(path, perms) for path, _, perms in after if path not in known} == {
        (f"/libxl/2/device/{kind}", "n0"), (f"/local/domain/2/device/{kind}", "n0,r2"),
        ("/local/domain/1/backend", "n0,r1"), (f"/local/domain/1/backend/{kind}", "n0,r1"),
        (f"/local/domain/1/backend/{kind}/2", "n0,r1"),
    }  # fmt: skip


def test_driver_domain() -> None:
    """Goal: the two nodes for a libxl in the guest, in their place.  Method: with and without the option."""
    with pair() as p:
        names = {domid: p.dom0.directory(f"/local/domain/{domid}") for domid in (1, 2)}
        assert [name for name in names[1] if name not in names[2]] == ["libxl", "device-model"]
        assert names[1][names[1].index("error") :][:3] == ["error", "libxl", "device-model"]
        assert {("/local/domain/1/libxl", "", "n1"), ("/local/domain/1/device-model", "", "n1")} <= set(p.tree())


@pytest.mark.parametrize(("backend", "says"), [
    ("nobody", "backend 'nobody' is no domain that runs: it must be started first"),
    ("3", "backend '3' is no domain that runs"),
    ("9" * 5000, "backend '9+\\.\\.\\. is no domain that runs"),
    ("g", "backend 'g' is the guest itself"),
    ("2", "backend '2' is the guest itself"),
])  # fmt: skip
@pytest.mark.parametrize("device", DEVICES)
def test_who_cannot_serve(device: str, backend: str, says: str) -> None:
    """Goal: a backend that is not there is refused by its name, and nothing is written.  Method: names and numbers."""
    with pair() as p:
        before = p.tree()
        with pytest.raises(ValueError, match=says):
            p.attach(device, backend)
        assert p.tree() == before


def test_one_number_one_device() -> None:
    """Goal: whoever serves it, a guest has one disk of a number.  Method: domain 0's and the other's, in each order."""
    for first, second in (("0", "storage"), ("storage", "0")):
        with pair() as p:
            p.attach(DISK, first)
            with pytest.raises(ValueError, match="domain 2 has a disk 51712 already"):
                p.attach(DISK, second)


@pytest.mark.parametrize("device", DEVICES)
def test_scripts_are_not_ours(device: str) -> None:
    """Goal: nothing of a script is written for a backend elsewhere, whose it is to run.  Method: InitWait; all keys."""
    with pair() as p:
        runs: list[str] = []
        p.toolstack.hotplug_vif = lambda back, _done: runs.append(back)
        back = p.attach(device)
        keys = p.dom0.directory(back)
        p.say(back, 2)
        assert p.dom0.directory(back) == keys
        assert p.dom0.read(f"{back}/hotplug-status") == (None if device == DISK else "")
        assert runs == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", ["never began", "closes", "removes", "forced", "closed before"])
def test_detach(device: str, how: str) -> None:
    """Goal: asked to close like any backend, unless nobody is there to hear it; then all directories go.
    Method: one that never began, one that obeys, one that removes its directory as libxl in a driver domain does, one that
    says nothing any more, one that was Closed; each twice, with the tree before and after."""
    with pair() as p:
        before = p.tree()
        for _ in range(2):
            back = p.attach(device)
            if how != "never began":
                p.say(back, 2)
                p.say(back, 6 if how == "closed before" else 4)
            done = p.detach(device, force=how == "forced")
            if how in ("closes", "removes"):
                assert done == []
                assert (p.dom0.read(f"{back}/online"), p.dom0.read(f"{back}/state")) == ("0", "5")
                if how == "closes":
                    p.say(back, 6)
                else:
                    p.back.rm(back)
                    p.hypervisor.settle()
            assert done == [True]
            assert p.tree() == before
        assert not p.toolstack.client.connection.watches


@pytest.mark.parametrize("device", DEVICES)
def test_a_backend_that_goes_on(device: str) -> None:
    """Goal: one that says anything but Closed keeps a detach waiting and nothing else; with force it has no say.
    Method: it says Connected again and again, then the detach is forced."""
    with pair() as p:
        before = p.tree()
        back = p.attach(device)
        p.say(back, 4)
        done = p.detach(device)
        for state in (4, 2, 1, 4):
            p.say(back, state)
        assert done == []
        assert p.detach(device, force=True) == [True]
        assert (done, p.tree()) == ([], before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("detached", [False, True])
def test_the_serving_guest_ends(device: str, detached: bool) -> None:
    """Goal: with it go its directories, and the device can be unplugged without them: nothing comes back.
    Method: destroy it; detach, or destroy the other guest; the whole tree."""
    with pair() as p:
        back = p.attach(device)
        p.say(back, 4)
        p.toolstack.destroy(1)
        p.hypervisor.settle()
        assert p.dom0.read(f"/local/domain/2/device/{device.replace('/2/', '/')}/state") == "1"
        if detached:
            assert p.detach(device) == [True]
            assert p.traces(device) == []
        p.toolstack.destroy(2)
        p.hypervisor.settle()
        assert [path for path, *_ in p.tree() if "/1" in path or "/2" in path] == []
        assert not p.toolstack.client.connection.watches


@pytest.mark.parametrize("detached", [False, True])
def test_the_served_guest_ends(detached: bool) -> None:
    """Goal: a guest's end leaves nothing of it with those who served it, nor a watch.  Method: both devices, up; once in the
    middle of a detach."""
    with pair() as p:
        before = [entry for entry in p.tree() if entry[0].startswith("/local/domain/1")]
        for device in DEVICES:
            p.say(p.attach(device), 4)
            assert not detached or p.detach(device) == []
        p.toolstack.destroy(2)
        p.hypervisor.settle()
        assert [entry for entry in p.tree() if entry[0].startswith("/local/domain/1")] == before
        assert [path for path, *_ in p.tree() if path.startswith(("/local/domain/2", "/libxl/2"))] == []
        assert not p.toolstack.client.connection.watches


def test_rights() -> None:
    """Goal: each end may write its own directory and read the other's; neither makes directories beside them, and a third
    guest sees neither.  Method: requests of all three."""
    with pair() as p:
        p.toolstack.create(GuestConfig("t.cfg", "third", "37e8ff97-f89e-404d-ad0a-eec3136a3f82", 8, 8))
        back, front = p.attach(DISK), "/local/domain/2/device/vbd/51712"
        guests = {domid: Client(p.hypervisor.store.connect(Domid(domid))) for domid in (1, 2, 3)}

        def may(domid: int, path: str, *, write: bool = False) -> bool:
            try:
                if write:
                    guests[domid].write(path, "1")
                else:
                    guests[domid].read(path)
            except XsError as error:
                assert error.errno.value == "EACCES"
                return False
            return True

        assert [may(domid, f"{back}/state") for domid in (1, 2, 3)] == [True, True, False]
        assert [may(domid, f"{front}/state") for domid in (1, 2, 3)] == [True, True, False]
        assert [may(domid, f"{back}/state", write=True) for domid in (1, 2, 3)] == [True, False, False]
        assert [may(domid, f"{front}/state", write=True) for domid in (1, 2, 3)] == [False, True, False]
        assert [may(domid, "/local/domain/1/backend/vbd/3/51712", write=True) for domid in (1, 2, 3)] == [False] * 3
        assert guests[1].directory("/local/domain/1/backend/vbd") == ["2"]
