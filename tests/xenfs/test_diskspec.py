"""Goal: the disk grammar of xl-disk-configuration(5) is read as xl reads it; the rest is refused by name.

Method: the manual's and check-xl-disk-parse's strings as tables, properties for order and for arbitrary text.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenfs.diskspec import MAX_SPEC_CHARS, MAX_TARGET_BYTES, DiskError, DiskSpec, parse_disk

VOLUME = DiskSpec(target="/dev/vg/guest-volume", vdev="hda", vdev_number=768)
ISO = DiskSpec(
    target="/root/image.iso",
    vdev="hdc",
    vdev_number=5632,
    readonly=True,
    cdrom=True,
    removable=True,
    discard=False,
)

# Groups of strings that the manual calls equivalent, or that xl's own test expects to be.
SAME = [
    (
        VOLUME,
        [
            "/dev/vg/guest-volume,,hda",
            "/dev/vg/guest-volume,raw,hda,rw",
            "format=raw, vdev=hda, access=rw, target=/dev/vg/guest-volume",
            "raw:/dev/vg/guest-volume,hda,w",
            "phy:/dev/vg/guest-volume,hda,w",
            "tap:aio:/dev/vg/guest-volume,hda,w",
            "tap2:tapdisk:ioemu:file:raw:/dev/vg/guest-volume,hda",
            "  /dev/vg/guest-volume,\traw,\n hda, w, ",
            "/dev/vg/guest-volume,,hda,,discard,trusted,no-colo",
            "format=,/dev/vg/guest-volume,hda,w",
            "vdev=hda,/dev/vg/guest-volume",
            "access=w,vdev=hda,/dev/vg/guest-volume,raw",
            "/dev/vg/guest-volume,,,,vdev=hda",
            ",,hda,w,target=/dev/vg/guest-volume",
            "raw:/dev/vg/guest-volume,format=raw,hda:disk",
            "backend=0,specification=xen,/dev/vg/guest-volume,,hda",
            "backend=Domain-0,devtype=disk,script=,transport=,/dev/vg/guest-volume,,hda",
        ],
    ),
    (
        ISO,
        [
            "/root/image.iso,,hdc,cdrom",
            "/root/image.iso,,hdc,,cdrom",
            "/root/image.iso,raw,hdc,devtype=cdrom",
            "format=raw, vdev=hdc, access=ro, devtype=cdrom, target=/root/image.iso",
            "raw:/root/image.iso,hdc:cdrom,ro",
            "cdrom,devtype=cdrom,/root/image.iso,,hdc:cdrom,w",  # libxlu: always read-only
        ],
    ),
]

# Text, and what differs from a writable raw disk /img as xvda.
PARTICULAR: list[tuple[str, dict[str, Any]]] = [
    ("/img,,xvda,r", {"readonly": True, "discard": False}),
    ("/img,,xvda,ro,discard", {"readonly": True}),
    ("/img,,xvda,no-discard", {"discard": False}),
    ("/img,,xvda,untrusted", {"trusted": False}),
    ("/img,,xvda,direct-io-safe", {"direct_io_safe": True}),
    ("/img,,xvda,direct-io", {"direct_io": True}),
    ("/img,,xvda,backendtype=qdisk", {"backendtype": "qdisk"}),
    ("/img,,xvda,script=block", {"script": "block"}),
    ("/img,,xvda,backend=storage", {"backend": "storage"}),
    ("backend=0,/img,,xvda", {}),
    ("backend=,/img,,xvda", {}),
    ("/img,,xvda,backend=007", {"backend": "7"}),
    ("/img,,xvda,backend=" + "0" * 11, {"backend": "0" * 11}),  # no domid any more, and there is no such name
    ("/img,,xvda,backend=domain-0", {"backend": "domain-0"}),
    ("backend=s,vdev=xvda,target=pool/volume with, commas", {"backend": "s", "target": "pool/volume with, commas"}),
    ("/img,,d16p3", {"vdev": "d16p3", "vdev_number": 1 << 28 | 16 << 8 | 3}),
    ("/img,,51712", {"vdev": "51712"}),
    ("sector-size=4096,/img,,xvda", {"sector_size": 4096}),
    (
        "/img,,xvda,sector-size=512,physical-sector-size=4096",
        {"sector_size": 512, "physical_sector_size": 4096},
    ),
    ("/img,,xvda,physical-sector-size=65536", {"physical_sector_size": 65536}),
    ("vdev=xvda,target=/a,b,rw=x :y", {"target": "/a,b,rw=x :y"}),
    ("vdev=xvda,target= /a ", {"target": " /a "}),
    ("vdev=xvda,target=/a,,", {"target": "/a,"}),
    ("vdev=xvda,target=target=x", {"target": "target=x"}),
    ("host:name,,xvda", {"target": "host:name"}),  # a colon before a letter is no prefix
    ("disk.img,,xvda", {"target": "disk.img"}),
    ("/ü/磁盘,,xvda", {"target": "/ü/磁盘"}),
]

REFUSED = [
    ("", "no target"),
    ("foo", "no vdev"),
    ("/img,,", "no vdev"),
    ("vdev=xvda", "no target"),
    ("vdev=xvda,backend=storage", "no target"),
    ("/img,,xvda,backend=a,backend=b", "backend is given twice"),
    ("/img,qcow2,xvda,backend=storage", "format qcow2 is not supported yet"),
    (",,xvda", "no target"),
    ("/img,xvda,w", "format 'xvda' is not one of raw.*positions are target, format"),
    ("/img,raw ,xvda", "format 'raw ' is not"),
    ("/img,,xvda,readonly", "access 'readonly' is not one of r, ro, w, rw"),
    ("/img,,xvda,dicsard", "did you mean discard"),
    ("/img,,xvda,w,extra", "too many parameters, at 'extra'"),
    ("/img,,xvda0", "vdev 'xvda0' is not a disk name"),
    ("/img,,sdz", "sd disks end at sdp"),
    ("/img,,xvda:floppy", "devtype 'floppy' is not one of cdrom, disk"),
    ("/img,,xvda:", "devtype"),
    ("/img,,xvda,devtype=tape", "devtype 'tape'"),
    ("/img,,xvda,cdrom,devtype=disk", "devtype is given twice"),
    ("/img,,xvda,vdev=xvda", "vdev is given twice"),
    ("/img,,xvda,target=/img", "target is given twice"),
    ("/img,raw,xvda,format=empty", "format is given twice"),
    ("/img,,xvda,w,access=r", "access is given twice"),
    ("/img,,xvda,discard,no-discard", "discard is given twice"),
    ("/img,,xvda,trusted,untrusted", "trusted is given twice"),
    ("raw:qcow2:/img,xvda", "format is given twice"),
    ("/img,,xvda,trusted=0", "trusted takes no value: write trusted or untrusted"),
    ("/img,,xvda,direct-io=1", "direct-io takes no value: write direct-io alone"),
    ("/img,,xvda,acess=r", "unknown parameter 'acess'; did you mean access"),
    ("/img,,xvda,qqqqqqq=r", "unknown parameter 'qqqqqqq'$"),
    ("/dev/a=b,,xvda", "must be written last, as target="),
    ("dmy:/img,xvda,w", "unknown disk prefix 'dmy:'"),
    ("/img,qcow2,xvda", "format qcow2 is not supported yet.*qemu-img"),
    ("vhd:/img,xvda,w", "format vhd is not supported yet"),
    ("/img,qed,xvda", "format qed is not supported yet"),
    ("/img,qcow,xvda", "format qcow is not supported yet"),
    ("nbd:server,xvda,w", "script 'block-nbd' is not supported yet"),
    ("iscsi:iqn.2001-05.com:0-8a-host,xvda,w", "script 'block-iscsi'"),
    ("drbd:app01,hda,w", "script 'block-drbd'"),
    ("script=block-x,vdev=xvda,target=t", "script 'block-x'"),
    ("/img,,xvda,colo,colo-host=h", "colo: COLO replication is not supported"),
    ("/img,,xvda,colo-port=7", "colo-port: COLO"),
    ("/img,,xvda,hidden-disk=/h", "hidden-disk: COLO"),
    ("/img,,xvda,specification=virtio", "specification virtio is not supported"),
    ("/img,,xvda,specification=scsi", "specification 'scsi' is not one of xen, virtio"),
    ("/img,,xvda,transport=mmio", "transport belongs to specification virtio"),
    ("/img,,xvda,grant_usage=1", "grant_usage belongs to specification virtio"),
    ("/img,,xvda,backendtype=standalone", "backendtype standalone serves only virtio"),
    ("/img,,xvda,backendtype=tap", "backendtype tap needs blktap"),
    ("/img,,xvda,backendtype=file", "backendtype 'file' is not one of phy"),
    ("/img,empty,xvda", "format empty contradicts the target"),
    ("/img,,xvda,sector-size=1024", "sector-size '1024' is not one of 512, 4096"),
    ("/img,,xvda,sector-size=4096,physical-sector-size=512", "power of two in 4096..65536"),
    ("/img,,xvda,physical-sector-size=" + "9" * 5000, "physical-sector-size"),
    ("/i\0mg,,xvda", "NUL"),
    ("vdev=xvda,target=\ud800", "not valid Unicode"),
    ("vdev=xvda,target=" + "é" * (MAX_TARGET_BYTES // 2 + 1), "longer than"),
    ("x" * (MAX_SPEC_CHARS + 1), "longer than"),
]

# xl's own test accepts all of these as an empty drive.
EMPTY_DRIVES = [
    "devtype=cdrom,,,hdc",
    ",,hdc:cdrom,r",
    ",hdc:cdrom,r",
    ",empty,hdc:cdrom,r",
    "vdev=hdc,access=r,devtype=cdrom,target=",
    "vdev=hdc,access=r,devtype=cdrom,format=empty",
    "vdev=hdc,access=r,devtype=cdrom",
]


@pytest.mark.parametrize(("text", "expected"), [(text, spec) for spec, texts in SAME for text in texts])
def test_equivalent_strings(text: str, expected: DiskSpec) -> None:
    assert parse_disk(text) == expected


@pytest.mark.parametrize(("text", "difference"), PARTICULAR)
def test_one_parameter_at_a_time(text: str, difference: dict[str, Any]) -> None:
    plain: dict[str, Any] = {"target": "/img", "vdev": "xvda", "vdev_number": 51712}
    assert parse_disk(text) == DiskSpec(**(plain | difference))


@pytest.mark.parametrize(("text", "says"), REFUSED)
def test_refused(text: str, says: str) -> None:
    with pytest.raises(DiskError, match=says) as caught:
        parse_disk(text)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", EMPTY_DRIVES)
def test_empty_drives_are_understood_and_refused(text: str) -> None:
    with pytest.raises(DiskError, match="empty CD-ROM drive is not supported yet"):
        parse_disk(text)


@given(st.permutations(["format=raw", "vdev=hda", "access=rw", "discard", "trusted", "backendtype=phy"]))
def test_named_parameters_commute(parameters: list[str]) -> None:
    """Goal: named parameters and flags stand in any order.  Method: permutations before target=."""
    spec = parse_disk(", ".join([*parameters, "target=/a,b, c"]))
    assert spec == DiskSpec(target="/a,b, c", vdev="hda", vdev_number=768, backendtype="phy")


@given(st.integers(0, 4), st.sampled_from(["no-discard", "backendtype=phy", "untrusted", "sector-size=4096"]))
def test_named_parameters_take_no_position(index: int, named: str) -> None:
    """Goal: a named parameter or flag between positional ones moves none of them.  Method: each place."""
    positional = ["/img", "raw", "xvdb", "w"]
    moved = parse_disk(",".join([*positional[:index], named, *positional[index:]]))
    assert moved == parse_disk(",".join([*positional, named]))
    assert (moved.target, moved.vdev, moved.readonly) == ("/img", "xvdb", False)


WORDS = [
    "/img",
    "xvda",
    "raw",
    "w",
    "cdrom",
    "hdc:cdrom",
    "phy:",
    "target=",
    "vdev=",
    "format=",
    "=",
    ",",
    ", ",
    ":",
]


@given(st.text(st.characters(), max_size=60) | st.lists(st.sampled_from(WORDS), max_size=12).map("".join))
def test_arbitrary_text(text: str) -> None:
    """Goal: nothing but DiskError escapes, and what is accepted can be served.  Method: any text."""
    try:
        spec = parse_disk(text)
    except DiskError:
        return
    assert spec.target
    assert spec.format == "raw"
    assert spec.vdev_number > 0
    assert spec.readonly or not spec.cdrom
