"""Goal: both systems' ioctls work through the kernel: their structures get to us and back by the ways that FUSE has for it.
Method: a Python client with nothing but ioctl(2), read(2), write(2) and mmap(2), once with the numbers and structures of
Linux's headers and once with FreeBSD's; its process is two domains at once."""

from __future__ import annotations

import pytest

from tests.host.devxen import served
from tests.host.served import Host

COMMON = """
import ctypes, errno, fcntl, mmap, os, struct, sys
PAGE, COUNT = 4096, 3
def device(domid, name):
    return os.open(f"{sys.argv[1]}/domains/{domid}/dev/xen/{name}", os.O_RDWR)
def ioctl(fd, number, layout, *values):
    "What it returns, and the structure as it is then."
    structure = bytearray(struct.pack("<" + layout, *values))
    return fcntl.ioctl(fd, number, structure), struct.unpack("<" + layout, structure)
def refused(*arguments):
    try:
        ioctl(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
"""
LINUX = """
def bind_unbound(fd, domid):
    return ioctl(fd, 0x44502, "I", domid)[0]
def bind_interdomain(fd, domid, port):
    return ioctl(fd, 0x84501, "II", domid, port)[0]
UNBIND, NOTIFY, UNMAP, SET_NOTIFY = 0x44503, 0x44504, 0x104701, 0x104707
def share(domid):
    fd = device(1, "gntalloc")
    _, (*_, index, a, b, c) = ioctl(fd, 0x184705, "HHIQIII", domid, 1, COUNT, 0, 0, 0, 0)
    return fd, index, [a, b, c]
def grant_map(fd, refs):
    return ioctl(fd, 0x184700, "IIQ6I", COUNT, 0, 0, *(word for ref in refs for word in (1, ref)))[1][2]
def where(fd, address):
    return ioctl(fd, 0x184702, "QQII", address, 0, 0, 0)[1][1:3]
"""
FREEBSD = """
def bind_unbound(fd, domid):
    return ioctl(fd, 0xC0084506, "II", domid, 0)[1][1]
def bind_interdomain(fd, domid, port):
    return ioctl(fd, 0xC00C4505, "III", domid, port, 0)[1][2]
UNBIND, NOTIFY, UNMAP, SET_NOTIFY = 0x80044507, 0x80044508, 0x80104504, 0x80104500
def share(domid):
    fd, refs = device(1, "gntdev"), (ctypes.c_uint32 * COUNT)()
    _, (*_, index, _) = ioctl(fd, 0xC0184501, "HHIQQ", domid, 1, COUNT, 0, ctypes.addressof(refs))
    return fd, index, list(refs)
def grant_map(fd, refs):
    words = (ctypes.c_uint32 * (2 * COUNT))(*(word for ref in refs for word in (1, ref)))
    return ioctl(fd, 0xC0184503, "IIQQ", COUNT, 0, 0, ctypes.addressof(words))[1][2]
def where(fd, address):
    return ioctl(fd, 0xC0184505, "QQII", address, 0, 0, 0)[1][1:3]
"""
LIFE = """
a, b = device(1, "evtchn"), device(2, "evtchn")
port = bind_unbound(a, 2)
peer = bind_interdomain(b, 1, port)
for _ in range(2):
    assert os.read(b, 64) == struct.pack("I", peer)
    assert os.write(b, struct.pack("I", peer)) == 4
    ioctl(a, NOTIFY, "I", port)
assert refused(a, NOTIFY, "I", 4000) == "ENOTCONN" and refused(a, NOTIFY, "I", 4096) == "EINVAL"

shared, index, refs = share(2)
ours = mmap.mmap(shared, COUNT * PAGE, offset=index)
gntdev = device(2, "gntdev")
mapped = grant_map(gntdev, refs)
theirs = mmap.mmap(gntdev, COUNT * PAGE, offset=mapped)
for page in range(COUNT):
    ours[page * PAGE + 7] = page + 1
    assert theirs[page * PAGE + 7] == page + 1
theirs[:] = b"x" * len(theirs)
assert ours[:] == b"x" * len(ours)
view = ctypes.c_char.from_buffer(theirs)
assert where(gntdev, ctypes.addressof(view) + PAGE) == (mapped, COUNT)
del view
theirs.close()
os.read(b, 64)
ioctl(gntdev, SET_NOTIFY, "QII", mapped + PAGE + 9, 3, peer)  # clear the byte, send the event
assert refused(gntdev, UNMAP, "QII", mapped, COUNT - 1, 0) == "ENOENT"
ioctl(gntdev, UNMAP, "QII", mapped, COUNT, 0)
assert ours[PAGE + 8 : PAGE + 11] == b"x\\0x" and os.read(a, 64) == struct.pack("I", port)
assert refused(gntdev, 0x12345678, "I", 0) == "ENOTTY"
ioctl(a, UNBIND, "I", port)
print("done")
"""


@pytest.mark.parametrize("system", [LINUX, FREEBSD], ids=["linux", "freebsd"])
def test_raw_ioctls(host: Host, system: str):
    """Goal: events, shared pages, notifications and errors, from the first open to the last.
    Method: one client; when it has ended, nothing of it is left."""
    with served(host) as xen:
        before = xen.held(1, 2)
        assert host.python(COMMON + system + LIFE, xen.served.mnt) == "done\n"
        xen.wait_held(before, 1, 2)
