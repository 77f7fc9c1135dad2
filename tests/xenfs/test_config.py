"""Goal: files in xl.cfg(5) syntax become guests; every mistake is reported with its file and line.

Method: tables of values, of mistakes and of limits; files in a temporary directory; arbitrary text.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenfs.config import (
    DEVICES,
    INERT,
    MAX_CONFIG_BYTES,
    MAX_NAME_BYTES,
    USED,
    ConfigError,
    GuestConfig,
    duplicate_macs,
    load_config,
    load_configs,
    parse_config,
)

# What a real Xen 4.17 booted.
REAL = """\
name = "truth"
type = "pv"
kernel = "/truth/vmlinux"
ramdisk = "/truth/domu.cpio.gz"
extra = "console=hvc0 loglevel=7 panic=5"
memory = 256
maxmem = 384
vcpus = 1
maxvcpus = 2
disk = [ 'phy:/dev/vdb,xvda,w', 'phy:/dev/vdc,xvdd:cdrom,r' ]
vif = [ 'mac=00:16:3e:11:22:33,bridge=xenbr0' ]
on_poweroff = "destroy"
on_reboot = "restart"
on_crash = "preserve"
"""


def guest(text: str) -> GuestConfig:
    return parse_config(text, "g.cfg")


def names_of(text: str) -> str:
    """The value of `name`, for the tests of syntax: the one option that may hold nearly any string."""
    return guest(text).name


def test_a_real_file() -> None:
    """Goal: a file that Xen boots is understood.  Method: read it; its devices, and what changes nothing."""
    truth = guest(REAL)
    assert (truth.path, truth.name, truth.memory_mib, truth.maxmem_mib) == ("g.cfg", "truth", 256, 384)
    disk, cdrom = truth.disks
    assert (disk.target, disk.vdev_number, disk.readonly, disk.discard) == ("/dev/vdb", 51712, False, True)
    assert (cdrom.target, cdrom.vdev_number, cdrom.readonly, cdrom.removable) == (
        "/dev/vdc",
        51760,
        True,
        True,
    )
    (vif,) = truth.vifs
    assert (vif.mac, vif.bridge, vif.devid, truth.netns_name) == ("00:16:3e:11:22:33", "xenbr0", 0, "xenfs-truth")
    assert truth.unused == (
        ("type", 2), ("kernel", 3), ("ramdisk", 4), ("extra", 5), ("vcpus", 8), ("maxvcpus", 9), ("on_poweroff", 12),
        ("on_reboot", 13), ("on_crash", 14),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('name="g"', "g"),
        ("name = 'g'", "g"),
        ("\tname\t=\t'g'\t", "g"),
        ("\n\n;; ;\nname='g';memory=1;", "g"),
        ("# comment\nname='g' # another", "g"),
        ("name='#;,[]='", "#;,[]="),
        ("name='a\"b'", 'a"b'),
        (r"name='\'\"\\'", "'\"\\"),
        (r"name='\x41\102\x7e'", "AB~"),
        (r"name='\xc3\xa9é'", "éé"),
        ("name='g'\nname='h'", "h"),
        ("name='g'\nname+='h'\nname += '-1'", "gh-1"),
        ("name+='g'", "g"),
        ("name='g'\ncpus=0x1f\ncpuid=[[1, ['a']], 2,]", "g"),
        ("name = 0x1f", "0x1f"),  # numbers are text until asked for
    ],
)
def test_strings_and_statements(text: str, name: str) -> None:
    assert names_of(text) == name


@pytest.mark.parametrize(
    "disks",
    [
        "['/a,,xvda','/b,,xvdb']",
        "[\n '/a,,xvda', # first\n\n '/b,,xvdb',\n]",
        "[ '/a,,xvda'\n,\n'/b,,xvdb'\n,\n]",
        "[]\ndisk += ['/a,,xvda']\ndisk += ['/b,,xvdb']",
        "['/x,,xvda']\ndisk = ['/a,,xvda', '/b,,xvdb']",
    ],
)
def test_lists(disks: str) -> None:
    found = guest(f"name='g'\ndisk = {disks}\n").disks
    assert [(disk.target, disk.vdev) for disk in found] == [("/a", "xvda"), ("/b", "xvdb")]


@pytest.mark.parametrize(
    ("lines", "memory", "maxmem"),
    [
        ("", 32, 32),
        ("memory=256", 256, 256),
        ("maxmem=256", 256, 256),
        ("memory=0x100;maxmem=01000", 256, 512),
        ("memory=' 256'", 256, 256),
        ("memory='+1048576'", 1048576, 1048576),
    ],
)
def test_memory(lines: str, memory: int, maxmem: int) -> None:
    found = guest(f"name='g'\n{lines}\n")
    assert (found.memory_mib, found.maxmem_mib) == (memory, maxmem)


def test_grant_frames() -> None:
    assert guest("name='g'").max_grant_frames == 64
    assert guest("name='g'; max_grant_frames=128").max_grant_frames == 128


VIFS = [
    ("[]", []),
    ("['']", [(0, "xenbr0")]),
    ("['bridge=b', '', 'bridge=c']", [(0, "b"), (1, "xenbr0"), (2, "c")]),
    ("['bridge=b', 'devid=0', 'devid=2,bridge=c', 'bridge=d']", [(1, "b"), (0, "xenbr0"), (2, "c"), (3, "d")]),
    ("['devid=65535', '']", [(65535, "xenbr0"), (0, "xenbr0")]),
    ("['bridge=b'];vif += ['bridge=c']", [(0, "b"), (1, "c")]),
]


@pytest.mark.parametrize(("vifs", "expected"), VIFS)
def test_vifs(vifs: str, expected: list[tuple[int, str]]) -> None:
    """Goal: interfaces in the order of the file, numbers that are not given from the lowest that is free.  Method: lists."""
    found = guest(f"name='g'\nvif = {vifs}").vifs
    assert [(vif.devid, vif.bridge) for vif in found] == expected
    assert len({vif.mac for vif in found}) == len(found)


def test_macs_are_derived() -> None:
    """Goal: an address in Xen's range that hangs on uuid and number alone.  Method: compare runs, guests and places."""
    here = guest("name='g'; vif=['', 'bridge=b', 'mac=00:16:3E:1:2:3']").vifs
    again = guest("memory=64; name='g'; vif=['devid=1', 'devid=0']").vifs
    assert [vif.mac for vif in again] == [here[1].mac, here[0].mac]
    assert here[2].mac == "00:16:3e:01:02:03"
    other = guest("name='h'; vif=['']").vifs
    assert other[0].mac != here[0].mac
    assert all(vif.mac.startswith("00:16:3e:") and len(vif.mac) == 17 for vif in (*here, *other))


def test_netns() -> None:
    """Goal: where interfaces appear, and that every name of a guest gives a name of a file.  Method: values; the longest."""
    assert guest("name='g'").netns_name == "xenfs-g"
    assert guest("name='g'; netns='guest'").netns == "guest"
    assert guest("name='g'; netns='host'").netns_name is None
    longest = guest(f"name='{'ü' * (MAX_NAME_BYTES // 2)}'").netns_name
    assert longest is not None
    assert 254 <= len(longest.encode()) <= 255


def test_duplicate_macs() -> None:
    """Goal: one address twice on a bridge is legal and told.  Method: in one guest, in two, on other bridges, derived."""
    one = guest("name='one'; vif=['mac=00:16:3e:0:0:1', 'mac=00:16:3E:00:00:01', 'mac=00:16:3e:0:0:2', '']")
    two = guest("name='two'; vif=['mac=00:16:3e:0:0:1,bridge=b', 'mac=00:16:3e:0:0:2', '']")
    tail = ": frames will reach one or the other"
    assert duplicate_macs([one]) == [
        f"mac 00:16:3e:00:00:01 on bridge xenbr0 belongs to vif 0 of one and to vif 1 of one{tail}"
    ]
    assert duplicate_macs([two]) == []
    assert duplicate_macs([one, two])[1:] == [
        f"mac 00:16:3e:00:00:02 on bridge xenbr0 belongs to vif 2 of one and to vif 1 of two{tail}"
    ]


def test_uuid() -> None:
    """Goal: a uuid is kept, or derived from the name alone.  Method: compare runs, names and letter case."""
    given_uuid = "17E8FF97-f89e-404d-ad0a-eec3136a3f82"
    assert guest(f"name='g'; uuid='{given_uuid}'").uuid == given_uuid.lower()
    derived = guest("name='g'").uuid
    assert derived == guest("name='g'; memory=64").uuid == str(uuid.UUID(derived))
    assert derived != guest("name='h'").uuid


MISTAKES = [
    (1, "name", "'=' was expected after 'name'"),
    (1, "name = ", "a value was expected"),
    (1, "name = pv", "column 8, at 'pv'"),
    (1, "name = -1", "unexpected character.*column 8"),
    (1, "name = True", "strings need quotes"),
    (1, "Name = 'g'", "option names are lower case"),
    (1, "name = str(1)", "a value was expected"),
    (1, "name = 'g", "not closed in its line"),
    (1, 'name = "g\n"', "not closed in its line"),
    (1, "name = 'g'\r\n", "carriage return"),
    (1, "name = 'g' memory = 1", "a newline or ';' must follow"),
    (2, "name = 'g'\n= 3", "an option's name was expected"),
    (2, "name = 'g'\ndisk = [ 'a' 'b' ]", "',' or ']' was expected in the list that began in line 2"),
    (2, "name = 'g'\ndisk = [,]", "a value was expected"),
    (4, "name = 'g'\ndisk = [\n'a',\n", "a value was expected"),
    (3, "name = 'g'\ndisk = [ 'a'\nmemory = 3", "the list that began in line 2"),
    (2, "name = 'g'\ncpuid = " + "[" * 9 + "]" * 9, "at most 8 deep"),
    (2, "name = 'g'\ncpuid = " + "[" * 9999, "at most 8 deep"),
    (2, "name = 'g'\ndisk = 'a'\n", "disk must be a list"),
    (2, "name = 'g'\nname += ['h']", "cannot join a list and a string"),
    (2, "name = 'g'\nmemory += 1", r"\+= is for strings and lists"),
    (1, r"name = '\q'", "unknown escape"),
    (1, r"name = '\x4'", "unknown escape"),
    (1, r"name = '\x00'", "NUL"),
    (1, r"name = '\xff'", "not UTF-8"),
    (1, "name = ['g']", "name must be a single value"),
    (1, "name = ''", "cannot name a guest"),
    (1, "name = 'a/b'", "cannot name a guest"),
    (1, "name = '..'", "cannot name a guest"),
    (1, "name = 'Domain-0'", "cannot name a guest"),
    (1, "name = '17'", "cannot name a guest"),
    (1, r"name = 'a\nb'", "cannot name a guest"),
    (1, f"name = '{'x' * 250}'", "cannot name a guest"),
    (0, "memory = 3", "'name' is missing"),
    (0, "", "'name' is missing"),
    (2, "name = 'g'\nuuid = '17e8ff97'", "is not a UUID"),
    (2, f"name = 'g'\nuuid = '{uuid.UUID(int=0)}'", "is not a UUID other than domain 0's"),
    (2, "name = 'g'\nmemory = 0", "memory must be in 1..1048576, not 0"),
    (2, "name = 'g'\nmemory = '-5'", "not -5"),
    (2, "name = 'g'\nmemory = 1048577", "memory must be in"),
    (2, "name = 'g'\nmemory = " + "9" * 5000, "is not a number"),
    (2, "name = 'g'\nmemory = 089", "is not a number"),
    (2, "name = 'g'\nmemory = 1f", "is not a number"),
    (2, "name = 'g'\nmemory = 256M", "unexpected character.*column 13, at 'M'"),
    (3, "name = 'g'\nmemory = 64\nmaxmem = 32", "maxmem 32 is less than memory 64"),
    (2, "name = 'g'\nmax_grant_frames = 0", "max_grant_frames must be in 1..4096"),
    (2, "name = 'g'\nmemmory = 3", "unknown option 'memmory'; did you mean memory"),
    (2, "name = 'g'\nzzzzzz = 3", "unknown option 'zzzzzz'$"),
    (2, f"name = 'g'\n{'z' * 9999} = 3", "unknown option"),
    (2, "name = 'g'\nvfb = ['vnc=1']", "'vfb' is not supported yet"),
    (2, "name = 'g'\nrdm = 'strategy=host'", "'rdm' is not supported yet"),
    (2, "name = 'g'\nusb = 1", "'usb' is not supported yet"),
    (4, "name = 'g'\ndisk = [\n'/a,,xvda',\n'/b,xvdb,w']", "disk '/b,xvdb,w': format 'xvdb' is not one of"),
    (3, "name = 'g'\ndisk = [\n['/a,,xvda']]", "must be a string, not a list"),
    (3, "name = 'g'\ndisk = ['/a,,xvda',\n'/b,,51712']", "vdev 51712 already belongs to disk xvda"),
    (2, "name = 'g'\nvif = 'bridge=b'", "vif must be a list: vif = "),
    (2, "name = 'g'\nvif2 = ['bridge=b']", "'vif2' is not supported yet"),
    (3, "name = 'g'\nvif = ['',\n'brigde=b']", "vif 'brigde=b': unknown parameter 'brigde'; did you mean bridge"),
    (3, "name = 'g'\nvif = [\n['bridge=b']]", "vif: each entry must be a string, not a list"),
    (3, "name = 'g'\nvif = ['devid=1',\n'devid=1']", "vif: devid 1 is given twice"),
    (3, "name = 'g'\nvif = ['vifname=v',\n'vifname=v']", "vif: vifname v is given twice"),
    (2, "name = 'g'\nnetns = 'other'", "netns 'other' is not one of guest, host"),
    (2, "name = 'g'\nnetns = ''", "netns '' is not one of"),
    (2, "name = 'g'\nnetns = ['host']", "netns must be a single value"),
    (3, "name = 'g'\ndisk = ['/a,,xvda']\ndisk += ['/a/../a,,xvdb']", "writable '/a/../a' already belongs"),
]


@pytest.mark.parametrize(("line", "text", "says"), MISTAKES)
def test_mistakes(line: int, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        guest(text)
    assert caught.value.line == line
    assert str(caught.value) == (f"g.cfg:{line}: " if line else "g.cfg: ") + caught.value.message
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("option", sorted(DEVICES))
def test_devices_are_refused_unless_empty(option: str) -> None:
    for empty in ("[]", "''", "0"):
        assert guest(f"name='g'\n{option}={empty}\n").unused == ()
    with pytest.raises(ConfigError, match=f"^g.cfg:2: '{option}' is not supported yet"):
        guest(f"name='g'\n{option}=['x']\n")


def test_every_option_has_one_fate() -> None:
    """Goal: no option is in two tables, and inert ones are reported.  Method: sets; all in a file."""
    assert not USED & INERT
    assert not USED & DEVICES
    assert not INERT & DEVICES
    ordered = sorted(INERT)
    text = "name='g'\n" + "".join(f"{option}=1\n" for option in ordered)
    assert guest(text).unused == tuple((option, line) for line, option in enumerate(ordered, 2))


def test_shared_images(tmp_path: Path) -> None:
    """Goal: one image is written by one disk.  Method: the same file under three names, writable and not."""
    image = tmp_path / "image"
    image.touch()
    (tmp_path / "symbolic").symlink_to(image)
    os.link(image, tmp_path / "hard")
    for other in ("image", "symbolic", "hard"):
        with pytest.raises(ConfigError, match="writable"):
            guest(f"name='g'\ndisk=['{image},,xvda', '{tmp_path / other},,xvdb']")
        assert len(guest(f"name='g'\ndisk=['{image},,xvda', '{tmp_path / other},,xvdb,r']").disks) == 2


def written(directory: Path, name: str, text: str) -> str:
    path = directory / name
    path.write_text(text)
    return str(path)


def test_load_configs(tmp_path: Path) -> None:
    one = written(tmp_path, "1.cfg", "name='one'; disk=['/img,,xvda']")
    two = written(tmp_path, "2.cfg", "name='two'; disk=['/img,,xvda,r', '/img2,,xvdb']")
    assert [found.name for found in load_configs([two, one])] == ["two", "one"]
    assert load_configs([]) == []
    assert load_config(one).path == one


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ("name='one'", "name one already belongs"),
        ("name='two'; uuid='17e8ff97-f89e-404d-ad0a-eec3136a3f82'", "uuid 17e8ff97.* already belongs"),
        ("name='two'; disk=['/../img,,xvdz']", "writable '/../img' already belongs"),
        ("name='two'; vif=['', 'vifname=up0']", "vifname up0 already belongs"),
    ],
)
def test_guests_that_collide(tmp_path: Path, second: str, says: str) -> None:
    first = written(
        tmp_path, "1.cfg", "name='one'; uuid='17e8ff97-f89e-404d-ad0a-eec3136a3f82'; disk=['/img,,xvda'];vif=['vifname=up0']"
    )
    other = written(tmp_path, "2.cfg", second)
    with pytest.raises(ConfigError, match=says) as caught:
        load_configs([first, other])
    assert str(caught.value).startswith(f"{other}: ")
    assert str(caught.value).endswith(first)


def test_the_same_file_twice(tmp_path: Path) -> None:
    path = written(tmp_path, "1.cfg", "name='one'")
    with pytest.raises(ConfigError, match="name one already belongs"):
        load_configs([path, path])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Goal: a file's own faults are ConfigErrors.  Method: missing, a directory, too large, not UTF-8."""
    large = written(tmp_path, "large", "#" * (MAX_CONFIG_BYTES + 1))
    binary = tmp_path / "binary"
    binary.write_bytes(b"name='g'\nextra='\xff'\n")
    cases = [
        (str(tmp_path / "missing"), "cannot be read: .*No such file"),
        (str(tmp_path), "cannot be read: .*directory"),
        ("a\0b", "cannot be read"),
        (large, "is larger than"),
        (str(binary), "binary:2: byte 0xff is not UTF-8"),
    ]
    for path, says in cases:
        with pytest.raises(ConfigError, match=says):
            load_config(path)


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40))
def test_quoted_text_comes_back(text: str) -> None:
    """Goal: any printable text survives quoting.  Method: as the target of a disk."""
    quoted = ("vdev=xvda,target=/" + text + "/").replace("\\", "\\\\").replace("'", "\\'")
    assert guest(f"name='g'\ndisk=['{quoted}']").disks[0].target == "/" + text + "/"


WORDS = [
    "name", "=", "+=", "'g'", '"', "'", "[", "]", ",", "\n", ";", "#", " ", "\\", "memory", "1", "disk", "'/a,,xvda'", "vif",
    "'bridge=b'",
]  # fmt: skip


@given(st.text(st.characters(), max_size=80) | st.lists(st.sampled_from(WORDS), max_size=30).map("".join))
def test_arbitrary_text(text: str) -> None:
    """Goal: nothing but ConfigError escapes.  Method: any text, alone and after a legal line."""
    for prefix in ("", "name='g'\n"):
        try:
            found = guest(prefix + text)
        except ConfigError as error:
            assert 0 <= error.line <= (prefix + text).count("\n") + 1
        else:
            assert found.name
            assert 1 <= found.memory_mib <= found.maxmem_mib
            assert all(vif.mac and vif.devid is not None for vif in found.vifs)


@given(st.binary(max_size=80))
def test_arbitrary_files(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """Goal: nothing but ConfigError escapes for a file of any bytes.  Method: write them, load them."""
    path = tmp_path_factory.getbasetemp() / "arbitrary.cfg"
    path.write_bytes(b"name='g'\n" + data)
    try:
        assert load_config(str(path)).name
    except ConfigError as error:
        assert str(path) in str(error)
