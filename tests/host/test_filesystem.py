"""Goal: a file system on a disk keeps every byte of a real directory tree, and is clean afterwards.
Method: mkfs, mount through a loop device, cp, diff, umount and fsck, all of them Linux's own tools."""

from __future__ import annotations

import os
import re
import sysconfig

import pytest

from tests.host.served import MIB

pytestmark = pytest.mark.host

TREE = sysconfig.get_path("stdlib")  # about 50 MB in 2000 files


@pytest.mark.parametrize(("direct", "options"), [("on", "w"), ("off", "w"), ("on", "w,sector-size=4096")])
def test_copy_of_a_tree(host, direct, options):
    """Goal: what was copied in is what is read back, before and after everything was started anew.
    Method: loop device with direct I/O on and off, and with sectors of 4096; cp -r, diff -r, e2fsck -f."""
    server = host.disk(192 * MIB, options)
    sector_size = "4096" if "4096" in options else "512"
    device = host.loop(server.disk(), f"--direct-io={direct}", "--sector-size", sector_size)
    assert host.check("losetup", "--list", "--noheadings", "-O", "DIO", device).strip() == str(int(direct == "on"))
    host.check("mkfs.ext4", "-q", device)
    place = host.mount(device)
    host.check("cp", "-r", "--", TREE, place / "tree", timeout_s=120)
    host.unmount(place)
    host.check("e2fsck", "-fn", device, timeout_s=120)
    place = host.mount(device)
    host.check("sh", "-c", "echo 3 > /proc/sys/vm/drop_caches")
    host.check("diff", "-r", "--no-dereference", TREE, place / "tree", timeout_s=120)
    host.unmount(place)
    host.detach(device)
    server.stop()
    host.check("e2fsck", "-fn", host.root / "a.img", timeout_s=120)
    device = host.loop(host.root / "a.img", "--sector-size", sector_size)
    place = host.mount(device)
    host.check("diff", "-r", "--no-dereference", TREE, place / "tree", timeout_s=120)


def test_without_a_loop_device(host):
    """Goal: tools that work on image files work on the disk itself.
    Method: mkfs.ext4 and debugfs write to dev/xvda; debugfs, dumpe2fs and e2fsck read it back, and then the image."""
    server = host.disk(32 * MIB)
    data = os.urandom(3 * MIB + 5)
    (host.root / "data").write_bytes(data)
    host.check("mkfs.ext4", "-q", "-F", server.disk())
    host.check("debugfs", "-w", "-R", f"write {host.root}/data stored", server.disk())
    host.check("e2fsck", "-fn", server.disk())
    facts = dict(re.findall(r"^(Block count|Block size): +(\d+)$", host.check("dumpe2fs", "-h", server.disk()), re.M))
    assert int(facts["Block count"]) * int(facts["Block size"]) == 32 * MIB
    host.check("debugfs", "-R", f"dump stored {host.root}/back", server.disk())
    assert (host.root / "back").read_bytes() == data
    server.stop()
    host.check("e2fsck", "-fn", host.root / "a.img")
    host.check("debugfs", "-R", f"dump stored {host.root}/again", host.root / "a.img")
    assert (host.root / "again").read_bytes() == data


def test_discard_reaches_the_image(host):
    """Goal: blocks that a file system gives up are holes in the image, and the file system stays whole.
    Method: fill, delete and fstrim through a loop device; the image's blocks, its content and fsck."""
    server = host.disk(96 * MIB)
    image = host.root / "a.img"
    device = host.loop(server.disk(), "--direct-io=on")
    host.check("mkfs.ext4", "-q", device)
    place = host.mount(device)
    (host.root / "keep").write_bytes(os.urandom(MIB))
    host.check("cp", host.root / "keep", place / "keep")
    host.check("dd", "if=/dev/urandom", f"of={place}/fill", "bs=1M", "count=40", "conv=fsync")
    full = image.stat().st_blocks * 512
    host.check("rm", place / "fill")
    host.check("sync", "-f", place)
    host.check("fstrim", place)
    assert image.stat().st_blocks * 512 < full - 39 * MIB
    host.unmount(place)
    host.check("e2fsck", "-fn", device)
    place = host.mount(device)
    host.check("cmp", host.root / "keep", place / "keep")
