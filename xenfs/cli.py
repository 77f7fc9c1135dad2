"""cli.py: the `xenfs` command.

Exit codes: 0 done, 1 it could not be done (one line says why), 2 wrong usage, 130 interrupted before it was ready.
"""

from __future__ import annotations

import argparse
import grp
import logging
import sys
from collections.abc import Sequence

from xenfs import __version__, lscmd, storecmd
from xenfs.config import ConfigError, load_configs


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="xenfs",
        description="Xen's para-virtual devices without Xen: guests' disks appear as files under a mount point, their "
        "network interfaces in network namespaces.",
    )
    top.add_argument("--version", action="version", version=f"xenfs {__version__}")
    top.add_argument(
        "--log-level",
        default="warning",
        choices=["debug", "info", "warning", "error"],
        help="how much to say on standard error (default: %(default)s)",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_up(commands)
    demo = commands.add_parser(
        "demo",
        help="show two guests with a disk and a network, step by step",
        description="Start two guests with a scratch image and a bridge, and show each step with its command "
        "line: mkfs, mount, ping, a file by HTTP, unmount, fsck. Needs root; cleans up after itself.",
    )
    demo.add_argument("--keep", action="store_true", help="leave the scratch directory behind")
    storecmd.add_commands(commands)
    lscmd.add_commands(commands)
    return top


def _add_up(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    up = commands.add_parser(
        "up",
        help="start guests and mount their devices",
        description="Start the guests described by xl.cfg(5) files and mount their devices at DIR. Stays in the "
        "foreground; prints `ready` when all devices are connected. SIGINT or SIGTERM flushes, closes, unmounts and "
        "ends it with status 0; SIGHUP looks at the size of the images again.",
    )
    up.add_argument("--mount", required=True, metavar="DIR", help="an empty directory to mount at")
    up.add_argument(
        "--allow-other",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="let other users see the mount (default: yes for root, no for others)",
    )
    up.add_argument(
        "--bridge",
        action="append",
        default=[],
        metavar="NAME[=ADDRESS/PREFIX[,...]]",
        help="make this bridge for the guests' vifs, with these addresses of the host, for as long as it runs; may be "
        "given several times. Guests with vifs need root",
    )
    up.add_argument(
        "--device-group",
        type=group_id,
        metavar="GROUP",
        help="let this group, a name or number, use each domain's dev/xen, too (default: only the user of xenfs)",
    )
    up.add_argument(
        "--xenstored-socket",
        metavar="PATH",
        help="where xenstored listens, for XENSTORED_PATH (default: DIR.xenstored); a program that knows only the built-in "
        "path finds it at /run/xenstored/socket",
    )
    up.add_argument(
        "configs", nargs="*", metavar="GUEST.cfg", help="a guest's configuration, xl.cfg(5) syntax; none: the store alone"
    )


def group_id(text: str) -> int:
    """A group by name or number; for argparse."""
    try:
        return int(text) if text.isdecimal() else grp.getgrnam(text).gr_gid
    except KeyError:
        raise argparse.ArgumentTypeError(f"there is no group {text!r}") from None


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return 130  # interrupted before there was anything to serve; what there was is undone


def _run(argv: Sequence[str] | None) -> int:
    options = parser().parse_args(argv)
    logging.basicConfig(
        level=options.log_level.upper(), format="%(name)s: %(levelname)s: %(message)s", stream=sys.stderr
    )
    if options.command in ("store", "quota"):
        return storecmd.run(options)
    if options.command in ("lsevtchn", "lsgrants"):
        return lscmd.run(options)
    # these need libfuse, which --help and a wrong configuration should not
    from blockdev.storage import StorageError
    from netdev.netlink import NetlinkError
    from xenfs.fuse.mount import MountError
    from xenfs.host import HostError
    from xenfs.storesocket import SocketError

    try:
        if options.command == "up":
            from xenfs.network import Bridge
            from xenfs.up import Settings, up

            bridges = [Bridge.parse(text) for text in options.bridge]
            settings = Settings(options.allow_other, bridges, options.xenstored_socket, options.device_group)
            up(load_configs(options.configs), options.mount, settings)
        else:
            from xenfs.demo import demo

            return demo(options.keep)
    except (ConfigError, HostError, MountError, NetlinkError, SocketError, StorageError) as error:
        print(f"xenfs: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"xenfs: {error.filename or 'error'}: {error.strerror}", file=sys.stderr)
        return 1
    return 0
