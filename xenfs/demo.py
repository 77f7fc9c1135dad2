"""demo.py: `xenfs demo`: two guests, a disk and a network, from mkfs to fsck, each step with its command line.

Called by the command line. The host's side of the network is in a network namespace of the server's own, which has no way
out and ends with it; the guests' sides are in theirs, as always.

Invariants: the status is 0 only if every step succeeded; whatever happens, also Ctrl-C, nothing is left behind, which
xenfs/scene.py sees to.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from netdev.netlink import namespaces
from xenfs.config import NETNS_PREFIX
from xenfs.scene import Interrupted, Scene, StepError

CONFIGS = (
    """\
name = "{}"
memory = 64
disk = [ "disk.img, raw, xvda, rw" ]
vif = [ "bridge=xenbr0, ip=10.77.0.11/24 fd77::11/64" ]
""",
    """\
name = "{}"
vif = [ "bridge=xenbr0, ip=10.77.0.12/24 fd77::12/64" ]
""",
)
BRIDGE = "xenbr0=10.77.0.1/24,fd77::1/64"
OTHERS = ("10.77.0.12", "fd77::12", "10.77.0.1", "fd77::1")  # for guest1: guest2 and the host
URL = "http://10.77.0.11:8000/random"
FETCH = f'import urllib.request; urllib.request.urlretrieve("{URL}", "fetched")'
TOOLS = (
    "mkfs.ext4", "mount", "umount", "losetup", "e2fsck", "debugfs", "unshare", "nsenter", "ip", "ping", "python3",
    "xenstore-ls",
)  # fmt: skip
PACKAGES = "e2fsprogs, mount, util-linux, iproute2, iputils-ping, python3 and xenstore-utils"
SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"  # not on everybody's PATH
ALL = 1000  # lines: more than the store of two guests has
EVTCHN = "mnt/dev/xen/evtchn"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def demo(keep: bool) -> int:
    """Run all steps. 0; 1 if one failed or the demo cannot run here; 130 after a signal."""
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_PATH}"
    if reason := _obstacle():
        print(f"xenfs: demo: {reason}", file=sys.stderr)
        return 1
    folder = Path(tempfile.mkdtemp(prefix="xenfs-demo-")).resolve()
    guests = _names()
    scene = Scene(folder, [NETNS_PREFIX + guest for guest in guests])
    before = [signal.getsignal(number) for number in SIGNALS]
    status = 1
    try:
        for number in SIGNALS:
            signal.signal(number, scene.interrupt)
        _play(scene, guests)
        status = 0
    except StepError as error:
        print(f"\nxenfs: demo: {error}", file=sys.stderr)
        scene.show_logs()
    except Interrupted:
        print("\nxenfs: demo: interrupted", file=sys.stderr)
        status = 130
    finally:
        scene.interrupted = True  # no signal counts from here on
        left = scene.clean(keep)
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
    for line in left:
        print(f"xenfs: demo: {line}", file=sys.stderr)
    if status == 0 and not left:
        print("\nDone." + (f" Everything is still in {folder}" if keep else " Everything was cleaned up."))
    return status or bool(left)


def _obstacle() -> str:
    if os.geteuid() != 0:
        return "root is needed to mount a file system from the guest's disk (mount -o loop) and for network namespaces"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian's packages {PACKAGES})"
    for device, module in (("/dev/fuse", "fuse"), ("/dev/net/tun", "tun")):
        if not os.path.exists(device):
            return f"{device} is missing: modprobe {module}, or give it to this container"
    return "" if os.path.exists("/proc/net/if_inet6") else "this kernel has no IPv6, which the guests use"


def _names() -> tuple[str, str]:
    """What the guests are called: others than usual if another xenfs has guests of these names."""
    taken = namespaces()
    if NETNS_PREFIX + "guest1" in taken or NETNS_PREFIX + "guest2" in taken:
        return f"guest1-{os.getpid()}", f"guest2-{os.getpid()}"
    return "guest1", "guest2"


def _play(scene: Scene, guests: tuple[str, str]) -> None:
    _start(scene, guests)
    scene.title("Domain 0's event channels: which backend waits at which port, and nearly nothing sent")
    scene.run("cat", EVTCHN)
    _use_the_disk(scene, guests[0])
    _use_the_network(scene, guests)
    _look_inside(scene, guests[0])

    scene.title("Unmount the disk, and let e2fsck judge")
    scene.run("umount", "fs")
    scene.run("e2fsck", "-fn", f"mnt/domains/{guests[0]}/dev/xvda")

    scene.title("End it: SIGTERM flushes, closes both ends of everything, unmounts, removes the interfaces")
    scene.end()

    scene.title("What was written is in the image")
    if scene.run("debugfs", "-R", "cat /hello", "disk.img") != "written through a ring\n":
        raise StepError("the image does not hold what was written")


def _start(scene: Scene, guests: tuple[str, str]) -> None:
    scene.title("An image for a disk: 256 MiB, nothing of it allocated")
    scene.run("truncate", "-s", "256M", "disk.img")

    scene.title("Two guests on one bridge, the first with that disk, in the syntax of xl.cfg(5)")
    for i, guest in enumerate(guests, 1):
        (scene.folder / f"guest{i}.cfg").write_text(CONFIGS[i - 1].format(guest))
        scene.run("cat", f"guest{i}.cfg")

    scene.title("Start them: frontends and backends shake hands through xenstore and share rings")
    print("   unshare keeps the real network out of this: what is the host's here is in a namespace of its own")
    scene.start(
        "unshare", "--net", "xenfs", "up", "--mount", "mnt", "--bridge", BRIDGE, "guest1.cfg", "guest2.cfg",
        log="xenfs.log", until="ready\n",
    )  # fmt: skip


def _use_the_disk(scene: Scene, guest: str) -> None:
    scene.title("The guest's disk is a file now")
    scene.run("ls", "-l", f"mnt/domains/{guest}/dev")

    scene.title("Put a file system on it, mount it, write to it")
    scene.run("mkfs.ext4", "-q", f"mnt/domains/{guest}/dev/xvda")
    scene.run("mount", "-o", "loop", f"mnt/domains/{guest}/dev/xvda", "fs")
    scene.run("sh", "-c", 'echo "written through a ring" > fs/hello && head -c 16M /dev/urandom > fs/random')
    scene.run("sync", "-f", "fs")


def _use_the_network(scene: Scene, guests: tuple[str, str]) -> None:
    assert scene.server is not None, "there is no network before start()"
    enter = [("nsenter", f"--net=/run/netns/{NETNS_PREFIX}{guest}") for guest in guests]

    scene.title("Each guest's interface is in a network namespace of its own, the backend's end is on the host's bridge")
    scene.run(*enter[0], "ip", "-brief", "address")
    scene.run("nsenter", "-t", str(scene.server.pid), "-n", "ip", "-brief", "link")

    scene.title("The first guest asks the second, and the host, whether they are there: IPv4 and IPv6")
    for address in OTHERS:
        scene.run(*enter[0], "ping", "-q", "-c", "3", "-i", "0.1", address)

    scene.title("A file from the first guest's disk goes through both guests' rings to the second, by HTTP")
    serve = ("python3", "-u", "-m", "http.server", "-d", "fs", "8000")
    server = scene.start(*enter[0], *serve, log="http.log", until="Serving HTTP")
    scene.run(*enter[1], "python3", "-c", FETCH)
    sums = re.findall(r"^[0-9a-f]{64}", scene.run("sha256sum", "fs/random", "fetched"), re.MULTILINE)
    if len(sums) != 2 or sums[0] != sums[1]:
        raise StepError("what arrived is not what was sent")
    scene.stop(server)


def _look_inside(scene: Scene, guest: str) -> None:
    scene.title("The same ports after all that: an event that finds its port pending already is no further call")
    scene.run("cat", EVTCHN)

    scene.title("What the two ends of the interface agreed on, and what has crossed")
    scene.run("cat", f"mnt/domains/{guest}/inspect/vif/xn0")

    scene.title("Both ends of every ring: what the frontends asked, what the backends served")
    scene.run("cat", f"mnt/domains/{guest}/inspect/rings", "mnt/domains/0/inspect/rings")

    scene.title("The store they met in is a directory; state 4 is Connected, 51712 is xvda")
    for device, keys in (
        ("vbd/1/51712", "frontend params state sectors feature-flush-cache"),
        ("vif/1/0", "frontend mac bridge hotplug-status state feature-gso-tcpv4"),
    ):
        scene.run("sh", "-c", f'cd mnt/xenstore/local/domain/0/backend/{device} && grep "" {keys}')

    scene.title("It is also a server: Xen's own tools speak to its socket")
    listing = scene.run("env", "XENSTORED_PATH=mnt.xenstored", "xenstore-ls", "-f", lines=ALL)
    if f'/name = "{guest}"' not in listing:
        raise StepError(f"the store does not list {guest}")

    scene.title("What the first guest uses of the store, and what it may")
    scene.run("xenfs", "quota", "--mount", "mnt", guest)
