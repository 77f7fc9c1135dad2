"""config.py: the guests to build, read from files in the syntax of xl.cfg(5).

Called by the command line; calls diskspec for the entries of `disk`. The syntax is that of Xen's
libxlu_cfg_l.l and libxlu_cfg_y.y; a later assignment replaces an earlier one.

Invariants: every option of xl is used, or listed in GuestConfig.unused because it changes nothing here, or
refused by name and line because it asks for a device that would then be missing. Options that xl does not
know are refused, where xl ignores them: mostly they are misspelt. The only errors are ConfigErrors.

Differences, on purpose: a guest without `uuid` gets one derived from its name, the same in every run, where
xl draws one; numeric escapes in strings work (xl drops them); a comment may end the file; a name is checked,
for it becomes a file name. As in xl, a relative path is relative to the current directory, not to the file.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from xenfs.diskspec import DiskError, DiskSpec, parse_disk

MAX_CONFIG_BYTES = 1 << 18
MAX_LIST_DEPTH = 8
MAX_NAME_BYTES = 255  # NAME_MAX: the name is a link under domains/
MAX_MEMORY_MIB = 1 << 20  # 1 TiB: one sparse file
MAX_GRANT_FRAMES = 4096  # two million grants; Xen's own default is 64
DEFAULT_MEMORY_MIB = 32  # libxl__domain_build_info_setdefault
DEFAULT_GRANT_FRAMES = 64
_NAME = re.compile(r"(?!\.\.?$|Domain-0$|[0-9]+$)[^/]+")  # digits alone are a domid, to xl too
_UUID = re.compile("[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_UUID_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "xenfs:domain")

USED = frozenset({"name", "uuid", "memory", "maxmem", "max_grant_frames", "disk"})

# They ask for a device, or for access to one, that the guest would then not find. Empty ones ask for nothing.
_DEVICE_NAMES = """
arm_sci channel device_tree dtdev gfx_passthru iomem ioports irqs p9 pci pvcalls rdm usb usbctrl usbdev
usbdevice vdispl vfb vif vif2 virtio vkb vsnd vtpm vuart"""
DEVICES = frozenset(_DEVICE_NAMES.split())

# No kernel is booted, no processor scheduled and no hardware emulated, so these change nothing.
_INERT_NAMES = """
acpi acpi_firmware acpi_laptop_slate acpi_s3 acpi_s4 altp2m altp2m_count altp2mhvm apic bios
bios_path_override boot bootloader bootloader_args bootloader_restrict bootloader_user builder cap cmdline
cpu_weight cpuid cpus cpus_soft device_model device_model_args device_model_args_hvm device_model_args_pv
device_model_override device_model_stubdomain_override device_model_stubdomain_seclabel device_model_user
device_model_version display dm_restrict driver_domain e820_host extra extratime firmware firmware_override
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


class ConfigError(ValueError):
    """What the author of a file has to change. str() is "FILE:LINE: message"; line 0 is the whole file."""

    def __init__(self, path: str, line: int, message: str) -> None:
        super().__init__(f"{path}:{line}: {message}" if line else f"{path}: {message}")
        self.path, self.line, self.message = path, line, message


@dataclass(frozen=True)
class GuestConfig:
    """One guest, defaults applied and limits checked. `unused` are the options that change nothing here, with
    their lines, in the order of the file."""

    path: str
    name: str
    uuid: str
    memory_mib: int = DEFAULT_MEMORY_MIB
    maxmem_mib: int = DEFAULT_MEMORY_MIB
    max_grant_frames: int = DEFAULT_GRANT_FRAMES
    disks: tuple[DiskSpec, ...] = ()
    unused: tuple[tuple[str, int], ...] = ()


def load_configs(paths: Iterable[str]) -> list[GuestConfig]:
    """Read a guest from each file. ConfigError also if two share a name, a uuid or a writable image."""
    guests = [load_config(path) for path in paths]
    owners: dict[object, str] = {}
    for guest in guests:
        names = (f"name {guest.name}", f"uuid {guest.uuid}")
        claims: dict[object, str] = dict(zip(names, names, strict=True))
        claims |= {_identity(d): f"writable {_shown(d.target)}" for d in guest.disks if not d.readonly}
        for key, what in claims.items():
            if key in owners:
                raise ConfigError(guest.path, 0, f"{what} already belongs to the guest of {owners[key]}")
            owners[key] = guest.path
    return guests


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
    settings = _Parser(text, path).settings()
    unused = _sort_out(settings, path)
    read = _Reader(settings, path)
    name = read.name()
    grant_frames = read.number("max_grant_frames", 1, MAX_GRANT_FRAMES) or DEFAULT_GRANT_FRAMES
    return GuestConfig(path, name, read.uuid(name), *read.memory(), grant_frames, read.disks(), unused)


# ---- syntax: text -> settings ----


class _Token(NamedTuple):
    kind: str  # ident, number, string, newline, end, or the mark itself
    text: str
    line: int
    column: int


class _Atom(NamedTuple):
    """A string or a number: xl keeps both as text until somebody asks for a number."""

    text: str
    line: int


class _List(NamedTuple):
    items: tuple[_Value, ...]
    line: int


_Value = _Atom | _List


class _Setting(NamedTuple):
    value: _Value
    line: int
    added: bool  # by +=, which xl refuses for numbers


_TOKEN = re.compile(
    r"""(?P<blank>[ \t]+)
      | (?P<newline>\n|\#[^\n]*\n?)
      | (?P<ident>[a-z][._0-9a-z]*)
      | (?P<number>[0-9][0-9a-fx]*)
      | (?P<string>'(?:[^'\\\n]|\\.)*+'|"(?:[^"\\\n]|\\.)*+")
      | (?P<mark>\+=|[,\[\]=;])
      | (?P<bad>.)""",
    re.VERBOSE,
)
_NO_TOKEN = {
    '"': "the string is not closed in its line",
    "'": "the string is not closed in its line",
    "\r": "carriage return: lines must end with a newline only",
    "": "unexpected character: strings need quotes, option names are lower case",
}
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|([0-3]?[0-7]{1,2})|([abfnrtv\"'\\]))|(\\)|([^\\]+)")
_ESCAPED = dict(zip("abfnrtv\"'\\", "\a\b\f\n\r\t\v\"'\\", strict=True))
_NUMBER = re.compile(r"[ \t]*([+-]?)(?:0[xX]([0-9a-fA-F]{1,16})|(0[0-7]{0,21})|([1-9][0-9]{0,18}))")


class _Parser:
    def __init__(self, text: str, path: str) -> None:
        self.path = path
        self.tokens = self._scan(text)
        self.token = next(self.tokens)

    def settings(self) -> dict[str, _Setting]:
        settings: dict[str, _Setting] = {}
        while self.token.kind != "end":
            if self.token.kind not in ("newline", ";"):
                self._assignment(settings)
                if self.token.kind not in ("newline", ";", "end"):
                    self._fail("a newline or ';' must follow the value")
            self._advance()
        return settings

    def _assignment(self, settings: dict[str, _Setting]) -> None:
        name = self.token
        if name.kind != "ident":
            self._fail("an option's name was expected")
        self._advance()
        added = self.token.kind == "+="
        if self.token.kind not in ("=", "+="):
            self._fail(f"'=' was expected after {_shown(name.text)}")
        self._advance()
        value = self._value(0)
        old = settings.pop(name.text, None)  # so that the order is that of the last assignments
        if added and old:
            if isinstance(old.value, _List) and isinstance(value, _List):
                value = _List(old.value.items + value.items, value.line)
            elif isinstance(old.value, _Atom) and isinstance(value, _Atom):
                value = _Atom(old.value.text + value.text, value.line)
            else:
                self._fail("+= cannot join a list and a string", name)
        settings[name.text] = _Setting(value, name.line, added)

    def _value(self, depth: int) -> _Value:
        token = self.token
        if token.kind in ("string", "number"):
            self._advance()
            return _Atom(token.text if token.kind == "number" else self._dequoted(token), token.line)
        if token.kind != "[" or depth == MAX_LIST_DEPTH:
            self._fail(f'a value was expected: "string", number or [ list ] (at most {MAX_LIST_DEPTH} deep)')
        self._advance()
        items: list[_Value] = []
        while self.token.kind != "]":
            items.append(self._value(depth + 1))
            if self.token.kind == ",":
                self._advance()
            elif self.token.kind != "]":
                self._fail(f"',' or ']' was expected in the list that began in line {token.line}")
        self._advance()
        return _List(tuple(items), token.line)

    def _dequoted(self, token: _Token) -> str:
        # Through bytes, because "\xc3\xa9" is one letter in a file that is UTF-8.
        raw = bytearray()
        for match in _ESCAPE.finditer(token.text, 1, len(token.text) - 1):
            hexadecimal, octal, letter, stray, plain = match.groups()
            if stray:
                self._fail("unknown escape in a string: write \\\\ for one backslash", token)
            elif plain or letter:
                raw += (plain or _ESCAPED[letter]).encode("utf-8", "surrogatepass")
            else:
                raw.append(int(hexadecimal, 16) if hexadecimal else int(octal, 8))
        if 0 in raw:
            self._fail("a string cannot contain a NUL", token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self._fail("the string is not UTF-8", token)

    def _scan(self, text: str) -> Iterator[_Token]:
        line, line_start, open_lists = 1, 0, 0
        for match in _TOKEN.finditer(text):
            kind = match.lastgroup or ""
            token = _Token(kind, match[0], line, match.start() - line_start + 1)
            if kind == "newline":
                line, line_start = line + 1, match.end()
            elif kind == "mark":
                token = token._replace(kind=match[0])
                open_lists += {"[": 1, "]": -1}.get(match[0], 0)
            elif kind == "bad":
                self._fail(_NO_TOKEN.get(match[0], _NO_TOKEN[""]), token)
            # Inside a list a newline separates nothing, as blanks never do.
            if kind != "blank" and not (kind == "newline" and open_lists > 0):
                yield token
        yield _Token("end", "", line, len(text) - line_start + 1)

    def _advance(self) -> None:
        self.token = next(self.tokens, self.token)

    def _fail(self, message: str, token: _Token | None = None) -> NoReturn:
        token = token or self.token
        near = f"the {token.kind}" if token.kind in ("newline", "end") else _shown(token.text)
        raise ConfigError(self.path, token.line, f"{message} (column {token.column}, at {near})")


# ---- meaning: settings -> guest ----


def _sort_out(settings: dict[str, _Setting], path: str) -> tuple[tuple[str, int], ...]:
    """Refuse what cannot be had; return what changes nothing."""
    for name, setting in settings.items():
        if name in DEVICES:
            value = setting.value
            if value.items if isinstance(value, _List) else value.text not in ("", "0"):
                raise ConfigError(
                    path, setting.line, f"'{name}' is not supported yet; remove it or leave it empty"
                )
        elif name not in USED | INERT:
            near = difflib.get_close_matches(name[:40], USED | DEVICES | INERT, n=1)
            hint = "; did you mean " + near[0] + "?" if near else ""
            raise ConfigError(path, setting.line, f"unknown option {_shown(name)}{hint}")
    return tuple((name, setting.line) for name, setting in settings.items() if name in INERT)


@dataclass(frozen=True)
class _Reader:
    """The options in USED, each with its type and its limits."""

    settings: dict[str, _Setting]
    path: str

    def name(self) -> str:
        name = self._text("name")
        if name is None:
            raise ConfigError(self.path, 0, "'name' is missing: name = \"guest1\", for example")
        if not _NAME.fullmatch(name) or not name.isprintable() or len(name.encode()) > MAX_NAME_BYTES:
            self._fail("name", f"name {_shown(name)} cannot name a guest and its directory")
        return name

    def uuid(self, name: str) -> str:
        text = self._text("uuid")
        if text is None:
            return str(uuid.uuid5(_UUID_NAMESPACE, name))
        if not _UUID.fullmatch(text) or not uuid.UUID(text).int:
            self._fail("uuid", f"uuid {_shown(text)} is not a UUID other than domain 0's, which is all zeros")
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
            self._fail(option, f"{option} {_shown(text)} is not a number: decimal, 0x hexadecimal or 0 octal")
        sign, hexadecimal, octal, decimal = match.groups()
        value = int(hexadecimal, 16) if hexadecimal else int(octal, 8) if octal else int(decimal)
        if sign == "-" or not low <= value <= high:
            self._fail(option, f"{option} must be in {low}..{high}, not {sign}{value}")
        return value

    def disks(self) -> tuple[DiskSpec, ...]:
        setting = self.settings.get("disk")
        if setting is None:
            return ()
        if isinstance(setting.value, _Atom):
            self._fail("disk", "disk must be a list: disk = [ 'target,format,vdev,access', ... ]")
        disks: list[DiskSpec] = []
        seen: dict[object, str] = {}
        for item in setting.value.items:
            disk = self._disk(item)
            claims: dict[object, str] = {disk.vdev_number: f"vdev {disk.vdev}"}
            claims |= {} if disk.readonly else {_identity(disk): f"writable {_shown(disk.target)}"}
            for key, what in claims.items():
                if key in seen:
                    raise ConfigError(self.path, item.line, f"disk: {what} already belongs to {seen[key]}")
                seen[key] = f"disk {disk.vdev}"
            disks.append(disk)
        return tuple(disks)

    def _disk(self, item: _Value) -> DiskSpec:
        if isinstance(item, _List):
            raise ConfigError(self.path, item.line, "disk: each entry must be a string, not a list")
        try:
            return parse_disk(item.text)
        except DiskError as error:
            raise ConfigError(self.path, item.line, f"disk {_shown(item.text)}: {error}") from None

    def _text(self, option: str) -> str | None:
        setting = self.settings.get(option)
        if setting is None:
            return None
        if isinstance(setting.value, _List):
            self._fail(option, f"{option} must be a single value, not a list")
        return setting.value.text

    def _fail(self, option: str, message: str) -> NoReturn:
        raise ConfigError(self.path, self.settings[option].line, message)


def _identity(disk: DiskSpec) -> object:
    """What two names of one image have in common; Xen's block script compares the same numbers."""
    try:
        found = os.stat(disk.target)
    except OSError:
        return os.path.realpath(disk.target)
    return ("device", found.st_rdev) if stat.S_ISBLK(found.st_mode) else (found.st_dev, found.st_ino)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")
