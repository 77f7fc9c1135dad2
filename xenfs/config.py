"""config.py: the guests to build, read from files in the syntax of xl.cfg(5).

Called by the command line; calls xlcfg for the syntax, diskspec for the entries of `disk`, vifspec for those of `vif`.

Invariants: every option of xl is used, or listed in GuestConfig.unused because it changes nothing here, or
refused by name and line because it asks for a device that would then be missing. Options that xl does not
know are refused, where xl ignores them: mostly they are misspelt. The only errors are ConfigErrors.

Differences, on purpose: a guest without `uuid` gets one derived from its name, the same in every run, where xl draws one,
and so does a vif without `mac`; a name is checked, for it becomes a file name. As in xl, a relative path is relative to the
current directory, not to the file.

Two options are ours, not Xen's:
    netns = "guest" | "host"      where the guest's interfaces appear: in a network namespace of their own, `xenfs-NAME`
                                  (the default, as a guest has its own network), or beside the host's
    drivers = "xenfs" | "none"    who drives the guest's devices: our frontends (the default), or nobody, so that programs
                                  can, as that domain, through its dev/xen
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import uuid
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

from xenfs.diskspec import DiskError, DiskSpec, parse_disk
from xenfs.vifspec import VifError, VifSpec, next_devid, parse_vif
from xenfs.xlcfg import Atom, List, Parser, Setting, shown
from xenfs.xlcfg import ConfigError as ConfigError  # this module raises it, too
from xenfs.xlcfg import domid as domid_in

MAX_CONFIG_BYTES = 1 << 18
NETNS_PREFIX = "xenfs-"
MAX_NAME_BYTES = 255 - len(NETNS_PREFIX)  # NAME_MAX: the name is a link under domains/, and in that of the namespace
MAX_MEMORY_MIB = 1 << 20  # 1 TiB: one sparse file
MAX_GRANT_FRAMES = 4096  # two million grants; Xen's own default is 64
DEFAULT_MEMORY_MIB = 32  # libxl__domain_build_info_setdefault
DEFAULT_GRANT_FRAMES = 64
_NAME = re.compile(r"(?!\.\.?$|Domain-0$|[0-9]+$)[^/]+")  # digits alone are a domid, to xl too
_NUMBER = re.compile(r"[ \t]*([+-]?)(?:0[xX]([0-9a-fA-F]{1,16})|(0[0-7]{0,21})|([1-9][0-9]{0,18}))")
_UUID = re.compile("[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_UUID_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "xenfs:domain")

_USED_NAMES = "name uuid memory maxmem max_grant_frames disk vif netns drivers driver_domain"
USED = frozenset(_USED_NAMES.split())

# They ask for a device, or for access to one, that the guest would then not find. Empty ones ask for nothing.
_DEVICE_NAMES = """
arm_sci channel device_tree dtdev gfx_passthru iomem ioports irqs p9 pci pvcalls rdm usb usbctrl usbdev
usbdevice vdispl vfb vif2 virtio vkb vsnd vtpm vuart"""
DEVICES = frozenset(_DEVICE_NAMES.split())

# No kernel is booted, no processor scheduled and no hardware emulated, so these change nothing.
_INERT_NAMES = """
acpi acpi_firmware acpi_laptop_slate acpi_s3 acpi_s4 altp2m altp2m_count altp2mhvm apic bios
bios_path_override boot bootloader bootloader_args bootloader_restrict bootloader_user builder cap cmdline
cpu_weight cpuid cpus cpus_soft device_model device_model_args device_model_args_hvm device_model_args_pv
device_model_override device_model_stubdomain_override device_model_stubdomain_seclabel device_model_user
device_model_version display dm_restrict e820_host extra extratime firmware firmware_override
gic_version hap hdtype hpet hvm_pirq init_seclabel kernel keymap latency llc_colors localtime
max_event_channels max_grant_version max_maptrack_frames maxvcpus mca_caps mmio_hole ms_vm_genid msr_relaxed
nestedhvm nographic nomigrate nr_spis nx on_crash on_poweroff on_reboot on_soft_reset on_watchdog oos opengl
pae passthrough pci_msitranslate pci_permissive pci_power_mgmt pci_seize period pool pvshim pvshim_cmdline
pvshim_extra pvshim_path ramdisk rdm_mem_boundary root rtc_timeoffset sdl seclabel serial shadow_memory slice
smbios smbios_firmware soundhw spice spice_clipboard_sharing spice_image_compression spice_streaming_video
spiceagent_mouse spicedisable_ticketing spicehost spicepasswd spiceport spicetls_port spiceusbredirection
spicevdagent stdvga stubdomain_cmdline stubdomain_kernel stubdomain_memory stubdomain_ramdisk sve tee
timer_mode trap_unmapped_accesses tsc_mode type usbversion vcpus vendor_device vga videoram viridian
vkb_device vmtrace_buf_kb vnc vncdisplay vnclisten vncpasswd vncunused vncviewer vnuma vpmu vpt_align
xauthority xen_platform_pci xen_platform_pci_bar_uc xend_suspend_evtchn_compat xenstore_feature_mask
xenstore_quota"""
INERT = frozenset(_INERT_NAMES.split())


@dataclass(frozen=True)
class GuestConfig:
    """One guest, defaults applied and limits checked. Each of `vifs` has its number and its address. `unused` are the
    options that change nothing here, with their lines, in the order of the file."""

    path: str
    name: str
    uuid: str
    memory_mib: int = DEFAULT_MEMORY_MIB
    maxmem_mib: int = DEFAULT_MEMORY_MIB
    max_grant_frames: int = DEFAULT_GRANT_FRAMES
    disks: tuple[DiskSpec, ...] = ()
    vifs: tuple[VifSpec, ...] = ()
    netns: str = "guest"
    drivers: str = "xenfs"
    driver_domain: bool = False
    unused: tuple[tuple[str, int], ...] = ()

    @property
    def netns_name(self) -> str | None:
        """The network namespace of the guest's interfaces, a name in /run/netns; None: the host's own."""
        return NETNS_PREFIX + self.name if self.netns == "guest" else None


def default_store_socket(mountpoint: str) -> str:
    """Where the xenstored of a mount listens unless it is told otherwise: beside it."""
    return f"{os.path.abspath(mountpoint)}.xenstored"


def load_configs(paths: Iterable[str]) -> list[GuestConfig]:
    """Read a guest from each file. ConfigError also if two share a name, a uuid, a vifname or a writable image, or if one
    has a device of a guest that is not before it."""
    guests = [load_config(path) for path in paths]
    _check_backends(guests)
    owners: dict[object, str] = {}
    for guest in guests:
        names = (f"name {guest.name}", f"uuid {guest.uuid}")
        claims: dict[object, str] = dict(zip(names, names, strict=True))
        claims |= {_identity(d): f"writable {shown(d.target)}" for d in guest.disks if not d.readonly and _served_here(d)}
        claims |= {("vifname", v.vifname): f"vifname {v.vifname}" for v in guest.vifs if v.vifname and _served_here(v)}
        for key, what in claims.items():
            if key in owners:
                raise ConfigError(guest.path, 0, f"{what} already belongs to the guest of {owners[key]}")
            owners[key] = guest.path
    return guests


def _check_backends(guests: list[GuestConfig]) -> None:
    """As with xl, who serves a device is there when the device is made. Guests have the domids 1, 2, ... in their order."""
    domids = {guest.name: domid for domid, guest in enumerate(guests, 1)}
    for domid, guest in enumerate(guests, 1):
        wanted = [(f"disk {disk.vdev}", disk.backend) for disk in guest.disks]
        wanted += [(f"vif {vif.devid}", vif.backend) for vif in guest.vifs]
        for what, backend in wanted:
            number = domid_in(backend)
            serves = domids.get(backend, len(guests) + 1) if number is None else number
            if serves < domid:
                continue
            why = "is none of the guests"
            if serves == domid:
                why = "is this guest itself"
            elif serves <= len(guests):
                why = f"must be started first: put {guests[serves - 1].path} before this file"
            raise ConfigError(guest.path, 0, f"{what}: backend {shown(backend)} {why}")


def duplicate_macs(guests: Iterable[GuestConfig]) -> list[str]:
    """A sentence for each address that several interfaces on one bridge have. That is legal, in Xen too: some let a standby
    guest take over its twin's address. But while both are up, frames reach one or the other."""
    users: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for guest in guests:
        for vif in guest.vifs:
            if _served_here(vif):
                users[vif.bridge, vif.mac].append(f"vif {vif.devid} of {guest.name}")
    return [
        f"mac {mac} on bridge {bridge} belongs to {' and to '.join(names)}: frames will reach one or the other"
        for (bridge, mac), names in users.items()
        if len(names) > 1
    ]


def load_config(path: str) -> GuestConfig:
    """Read the guest described in a file. ConfigError if the file cannot be read or understood."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise ConfigError(path, 0, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(path, 0, f"is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        return parse_config(data.decode(), path)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(path, line, f"byte {data[error.start]:#04x} is not UTF-8") from None


def parse_config(text: str, path: str) -> GuestConfig:
    """Understand one configuration; `path` serves only for messages. ConfigError and nothing else. Images are
    looked up, not opened, to find two names of one file."""
    settings = Parser(text, path).settings()
    unused = _sort_out(settings, path)
    read = _Reader(settings, path)
    name = read.name()
    ident = read.uuid(name)
    grant_frames = read.number("max_grant_frames", 1, MAX_GRANT_FRAMES) or DEFAULT_GRANT_FRAMES
    return GuestConfig(
        path, name, ident, *read.memory(), grant_frames, read.disks(), read.vifs(ident),
        netns=read.word("netns", ("guest", "host")),
        drivers=read.word("drivers", ("xenfs", "none")),
        driver_domain=read.number("driver_domain", 0, 1) == 1,
        unused=unused,
    )  # fmt: skip


def _sort_out(settings: dict[str, Setting], path: str) -> tuple[tuple[str, int], ...]:
    """Refuse what cannot be had; return what changes nothing."""
    for name, setting in settings.items():
        if name in DEVICES:
            value = setting.value
            if value.items if isinstance(value, List) else value.text not in ("", "0"):
                raise ConfigError(path, setting.line, f"'{name}' is not supported yet; remove it or leave it empty")
        elif name not in USED | INERT:
            near = difflib.get_close_matches(name[:40], USED | DEVICES | INERT, n=1)
            hint = "; did you mean " + near[0] + "?" if near else ""
            raise ConfigError(path, setting.line, f"unknown option {shown(name)}{hint}")
    return tuple((name, setting.line) for name, setting in settings.items() if name in INERT)


@dataclass(frozen=True)
class _Reader:
    """The options in USED, each with its type and its limits."""

    settings: dict[str, Setting]
    path: str

    def name(self) -> str:
        name = self._text("name")
        if name is None:
            raise ConfigError(self.path, 0, "'name' is missing: name = \"guest1\", for example")
        if not _NAME.fullmatch(name) or not name.isprintable() or len(name.encode()) > MAX_NAME_BYTES:
            self._fail("name", f"name {shown(name)} cannot name a guest and its directory")
        return name

    def uuid(self, name: str) -> str:
        text = self._text("uuid")
        if text is None:
            return str(uuid.uuid5(_UUID_NAMESPACE, name))
        if not _UUID.fullmatch(text) or not uuid.UUID(text).int:
            self._fail("uuid", f"uuid {shown(text)} is not a UUID other than domain 0's, which is all zeros")
        return text.lower()

    def memory(self) -> tuple[int, int]:
        """As libxl: each is the other unless given, and 32 MiB if neither is."""
        memory = self.number("memory", 1, MAX_MEMORY_MIB)
        maxmem = self.number("maxmem", 1, MAX_MEMORY_MIB) or memory or DEFAULT_MEMORY_MIB
        if memory is not None and memory > maxmem:
            self._fail("maxmem", f"maxmem {maxmem} is less than memory {memory}")
        return memory or maxmem, maxmem

    def number(self, option: str, low: int, high: int) -> int | None:
        text = self._text(option)
        if text is None:
            return None
        if self.settings[option].added:
            self._fail(option, f"{option} is a number; += is for strings and lists")
        match = _NUMBER.fullmatch(text)
        if match is None:
            self._fail(option, f"{option} {shown(text)} is not a number: decimal, 0x hexadecimal or 0 octal")
        sign, hexadecimal, octal, decimal = match.groups()
        value = int(hexadecimal, 16) if hexadecimal else int(octal, 8) if octal else int(decimal)
        if sign == "-" or not low <= value <= high:
            self._fail(option, f"{option} must be in {low}..{high}, not {sign}{value}")
        return value

    def disks(self) -> tuple[DiskSpec, ...]:
        disks: list[DiskSpec] = []
        seen: dict[object, str] = {}
        for item in self._strings("disk", "'target,format,vdev,access'"):
            disk = self._disk(item)
            claims: dict[object, str] = {disk.vdev_number: f"vdev {disk.vdev}"}
            if not disk.readonly and _served_here(disk):
                claims[_identity(disk)] = f"writable {shown(disk.target)}"
            for key, what in claims.items():
                if key in seen:
                    raise ConfigError(self.path, item.line, f"disk: {what} already belongs to {seen[key]}")
                seen[key] = f"disk {disk.vdev}"
            disks.append(disk)
        return tuple(disks)

    def _disk(self, item: Atom) -> DiskSpec:
        try:
            return parse_disk(item.text)
        except DiskError as error:
            raise ConfigError(self.path, item.line, f"disk {shown(item.text)}: {error}") from None

    def vifs(self, uuid: str) -> tuple[VifSpec, ...]:
        """In the order of the file; who has no number gets the lowest that is free."""
        items = self._strings("vif", "'mac=00:16:3e:00:00:01,bridge=xenbr0'")
        given = [self._vif(item) for item in items]
        taken: set[int] = set()
        names: set[str] = set()
        for item, vif in zip(items, given, strict=True):
            if vif.devid in taken:
                raise ConfigError(self.path, item.line, f"vif: devid {vif.devid} is given twice")
            if vif.vifname in names:
                raise ConfigError(self.path, item.line, f"vif: vifname {vif.vifname} is given twice")
            taken |= set() if vif.devid is None else {vif.devid}
            names |= set() if vif.vifname is None else {vif.vifname}
        vifs: list[VifSpec] = []
        for vif in given:
            devid = next_devid(taken) if vif.devid is None else vif.devid
            taken.add(devid)
            vifs.append(vif.resolved(uuid, devid))
        return tuple(vifs)

    def _vif(self, item: Atom) -> VifSpec:
        try:
            return parse_vif(item.text)
        except VifError as error:
            raise ConfigError(self.path, item.line, f"vif {shown(item.text)}: {error}") from None

    def word(self, option: str, words: tuple[str, ...]) -> str:
        """One of `words`; the first unless given."""
        text = self._text(option)
        if text is not None and text not in words:
            self._fail(option, f"{option} {shown(text)} is not one of {', '.join(words)}")
        return text or words[0]

    def _strings(self, option: str, example: str) -> list[Atom]:
        """The entries of a list of strings."""
        setting = self.settings.get(option)
        if setting is None:
            return []
        if isinstance(setting.value, Atom):
            self._fail(option, f"{option} must be a list: {option} = [ {example}, ... ]")
        strings: list[Atom] = []
        for item in setting.value.items:
            if isinstance(item, List):
                raise ConfigError(self.path, item.line, f"{option}: each entry must be a string, not a list")
            strings.append(item)
        return strings

    def _text(self, option: str) -> str | None:
        setting = self.settings.get(option)
        if setting is None:
            return None
        if isinstance(setting.value, List):
            self._fail(option, f"{option} must be a single value, not a list")
        return setting.value.text

    def _fail(self, option: str, message: str) -> NoReturn:
        raise ConfigError(self.path, self.settings[option].line, message)


def _served_here(spec: DiskSpec | VifSpec) -> bool:
    """By domain 0. What names mean to another guest that serves a device is its own business."""
    return spec.backend == "0"


def _identity(disk: DiskSpec) -> object:
    """What two names of one image have in common; Xen's block script compares the same numbers."""
    try:
        found = os.stat(disk.target)
    except OSError:
        return os.path.realpath(disk.target)
    return ("device", found.st_rdev) if stat.S_ISBLK(found.st_mode) else (found.st_dev, found.st_ino)
