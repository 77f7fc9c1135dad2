"""Goal: unmodified programs on libxencall make hypercalls as the domain whose dev/xen they have.
Method: libxencall itself, called from Python, in a mount namespace of a guest and of domain 0; inspect/evtchn."""

from __future__ import annotations

import ctypes.util
import sys
from collections.abc import Iterator

import pytest

from tests.host.devxen import DevXen, served
from tests.host.served import Host

pytestmark = [pytest.mark.host, pytest.mark.skipif(not ctypes.util.find_library("xencall"), reason="no libxencall")]

# Says the result, or the errno's name, of each call of its arguments: OP,COMMAND[,HEX of a structure,or a bare address]
CODE = """
import ctypes, errno, sys
lib = ctypes.CDLL("libxencall.so.1", use_errno=True)
lib.xencall_open.restype = lib.xencall_alloc_buffer.restype = ctypes.c_void_p
lib.xencall_open.argtypes = [ctypes.c_void_p, ctypes.c_uint]
lib.xencall_alloc_buffer.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
lib.xencall2.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint64, ctypes.c_uint64]
handle = lib.xencall_open(None, 0)
assert handle
buffer = lib.xencall_alloc_buffer(handle, 4096)
for word in sys.argv[1:]:
    op, command, argument = word.split(",")
    at, structure = buffer, b""
    if argument.startswith("@"):
        at = int(argument[1:], 0)
    else:
        structure = bytes.fromhex(argument)
        ctypes.memmove(buffer, structure, len(structure))
    result = lib.xencall2(handle, int(op), int(command), at)
    said = errno.errorcode[ctypes.get_errno()] if result < 0 else str(result)
    print(said, ctypes.string_at(buffer, len(structure)).hex())
"""


@pytest.fixture
def xen(host: Host) -> Iterator[DevXen]:
    with served(host, 1) as built:
        yield built


def calls(xen: DevXen, domid: int, *words: str) -> list[str]:
    script = 'mount --bind "$1" /dev/xen; shift; exec "$@"'
    inside = ["unshare", "--mount", "sh", "-ec", script, "sh", xen.path(domid, "dev/xen")]
    return xen.host.check(*inside, sys.executable, "-c", CODE, *words).splitlines()


VERSION, ALLOC_UNBOUND, CLOSE = "17,0", "32,6", "32,3"


@pytest.mark.parametrize("domid", [0, 1])
def test_results(xen, domid):
    """Goal: results, structures and errnos arrive, but for ENOSYS, of which Linux makes ENOTTY when it comes from FUSE.
    Method: a version; a port made, which outlives the program; no such calls; bad pointers; closed by the next program."""
    before = set(xen.ports(domid))
    said = calls(xen, domid, f"{VERSION},@0", f"{ALLOC_UNBOUND},f07f000000000000", "12,0,00", "32,99,00", f"{CLOSE},@8",
                 "17,4,@0")  # fmt: skip
    (port,) = set(xen.ports(domid)) - before
    structure = (b"\xf0\x7f\0\0" + port.to_bytes(4, "little")).hex()
    assert said == [f"{4 << 16 | 17} ", f"0 {structure}", "ENOTTY 00", "ENOTTY 00", "EFAULT ", "EFAULT "]
    port_hex = port.to_bytes(4, "little").hex()
    assert calls(xen, domid, f"{CLOSE},{port_hex}", f"{CLOSE},{port_hex}") == [f"0 {port_hex}", f"EINVAL {port_hex}"]
    assert set(xen.ports(domid)) == before
