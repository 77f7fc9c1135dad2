"""control.py: CONTROL and the quota requests: what `xenstore-control` and a toolstack ask; tools/xenstored/control.c.

Texts are the daemon's where programs may read them. Beyond it: `stats` (what the server does) and `quota-usage DOMID` (each
limit with what is used of it, how often it was in the way, and what it said the last time).
Left out: logfile and memreport (the log is the program's own; stats has the memory), the switches of `log`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from xenmodel.public.io.xs_wire import XsType
from xenmodel.types import Domid
from xenmodel.xenstore.credit import RATE
from xenmodel.xenstore.domain import DomainRecord, Refusal
from xenmodel.xenstore.errors import XsErrno, XsError, shown
from xenmodel.xenstore.quota import NAMES, SOFT_NAMES, SOFT_PREFIX, field_of
from xenmodel.xenstore.upkeep import problems

if TYPE_CHECKING:
    from xenmodel.xenstore.daemon import Xenstored

RATE_TEXT = f"{RATE:g}/s"
_VALUE_MAX = 0x7FFFFFFF  # an int of the daemon


def _wrong(words: Sequence[str], right: str) -> XsError:
    return XsError(XsErrno.EINVAL, f"{shown(' '.join(words))} is not {right}")


def _value(word: str, least: int) -> int:
    if not (word.isascii() and word.isdigit() and len(word) <= 10 and least <= int(word) <= _VALUE_MAX):
        raise _wrong([word], f"a number from {least} to {_VALUE_MAX}")
    return int(word)


def _domid(word: str) -> Domid:
    return Domid(_value(word, 0))


# --- GET_QUOTA, SET_QUOTA -------------------------------------------------------------------------------------------


def get_quota(daemon: Xenstored, words: Sequence[str]) -> str:
    """[[domid] name]: the value, or with no words the names."""
    if not words:
        return " ".join([*NAMES, *(SOFT_PREFIX + name for name in SOFT_NAMES)])
    quota = daemon.domains.quota
    if len(words) == 2:
        quota = daemon.existing(_domid(words[0])).quota or quota
    field = field_of(words[-1])
    if field is None:
        raise _wrong(words[-1:], "the name of a quota")
    value: int = getattr(quota, field)
    return str(value)


def set_quota(daemon: Xenstored, words: Sequence[str]) -> None:
    """[domid] name value; without a domid for all that have no limits of their own."""
    field, value = field_of(words[-2]), _value(words[-1], 0)
    if field is None:
        raise _wrong(words[-2:-1], "the name of a quota")
    if len(words) == 3:
        record = daemon.existing(_domid(words[0]))
        record.quota = replace(record.quota or daemon.domains.quota, **{field: value})
    else:
        daemon.domains.quota = replace(daemon.domains.quota, **{field: value})
    daemon.limits_changed()


# --- CONTROL --------------------------------------------------------------------------------------------------------


def run(daemon: Xenstored, words: Sequence[str]) -> str:
    """The answer to `xenstore-control WORDS`; EINVAL for what is no command."""
    command = COMMANDS.get(words[0])
    if command is None:
        raise _wrong(words[:1], "a command; `help` lists them")
    return command[0](daemon, words[1:])


def _check(daemon: Xenstored, words: Sequence[str]) -> str:
    if words:
        raise _wrong(words, "an argument of check")
    return "\n".join(problems(daemon.store))[:4000] or "OK"


def _help(daemon: Xenstored, words: Sequence[str]) -> str:
    if words:
        raise _wrong(words, "an argument of help")
    return "".join(f"{name:<15} {usage}\n" for name, (_, usage) in COMMANDS.items())


def _log(daemon: Xenstored, words: Sequence[str]) -> str:
    if list(words) not in (["on"], ["off"]):
        raise _wrong(words, "on or off")
    daemon.tracing = words[0] == "on"
    return "OK"


def _print(daemon: Xenstored, words: Sequence[str]) -> str:
    if len(words) != 1:
        raise _wrong(words, "one string to print")
    daemon.log(f"control: {words[0]}")
    return "OK"


def _quota(daemon: Xenstored, words: Sequence[str]) -> str:
    if len(words) == 1:
        return _domain_quota(daemon, _domid(words[0]))
    return _quotas(daemon, words, NAMES)


def _soft_quota(daemon: Xenstored, words: Sequence[str]) -> str:
    return _quotas(daemon, words, SOFT_NAMES)


def _quotas(daemon: Xenstored, words: Sequence[str], names: Mapping[str, tuple[str, str]]) -> str:
    if not words:
        quota = daemon.domains.quota
        rows = [f"{name:<17}: {getattr(quota, field):8d} {what}\n" for name, (field, what) in names.items()]
        return "Quota settings:\n" + "".join(rows)
    if len(words) != 3 or words[0] != "set" or words[1] not in names:
        raise _wrong(words, "`set NAME VALUE` with the name of a quota")
    daemon.domains.quota = replace(daemon.domains.quota, **{names[words[1]][0]: _value(words[2], 1)})
    daemon.limits_changed()
    return "OK"


def _domain_quota(daemon: Xenstored, domid: Domid) -> str:
    usage = daemon.store.usage(daemon.existing(domid).domid)
    names = ("nodes", "watches", "transactions", "outstanding", "memory")
    return f"Domain {domid}:\n" + "".join(f"{name:<16}: {getattr(usage, name):8d}\n" for name in names)


def _quota_usage(daemon: Xenstored, words: Sequence[str]) -> str:
    """A line for each limit: its name, what is used of it (- if that is not counted), the limit, refusals, the last one."""
    if len(words) != 1:
        raise _wrong(words, "the domid of a domain")
    rows = quota_rows(daemon, daemon.existing(_domid(words[0])))
    return "".join(f"{' '.join(row)}".rstrip() + "\n" for row in rows)


def quota_rows(daemon: Xenstored, record: DomainRecord) -> list[tuple[str, str, str, str, str]]:
    """Name, used, limit, refusals and the last one, of each limit of a domain; "-" is not counted, or no limit."""
    usage, limits = daemon.store.usage(record.domid), daemon.domains.limits(record.domid)
    rows = []
    for name, (field, _) in (*NAMES.items(), ("write-rate", ("", ""))):
        refusal = record.refused.get(name, Refusal())
        limit = getattr(limits, field, RATE_TEXT if record.domid else "-") or "-"
        rows.append((name, str(getattr(usage, field, "-")), str(limit), str(refusal.times), refusal.last[:200]))
    return rows


def _stats(daemon: Xenstored, words: Sequence[str]) -> str:
    if words:
        raise _wrong(words, "an argument of stats")
    return statistics(daemon)[:4000]


def statistics(daemon: Xenstored) -> str:
    """What the server holds and has done, one thing a line."""
    store, records = daemon.store, daemon.domains.all()
    usage = [store.usage(record.domid) for record in records]
    lines = [
        f"nodes {len(store.tree.nodes)}",
        f"generation {store.tree.generation}",
        f"domains {sum(record.introduced for record in records)}",
        f"connections {sum(each.connections for each in usage)}",
        f"watches {sum(each.watches for each in usage)}",
        f"transactions {store.open_transactions}",
        f"queued-events {sum(c.pending_events for record in records for c in record.connections)}",
        f"memory {sum(store.tree.memory.values()) + sum(record.memory + record.unread for record in records)}",
        f"refused {sum(refusal.times for record in records for refusal in record.refused.values())}",
    ]
    lines += [f"requests-{XsType(kind).name.lower()} {count}" for kind, count in sorted(daemon.counts.items())]
    return "\n".join(lines) + "\n"


def _live_update(daemon: Xenstored, words: Sequence[str]) -> str:
    """The steps of `xenstore-control live-update`. The program and the command line it names are not used: see reload()."""
    if words[:1] in (["-f"], ["-c"], ["-a"]):
        return "OK"
    if words[:1] != ["-s"]:
        raise _wrong(words, "a step of a live update: -s starts it")
    return daemon.reload(force="-F" in words)


Command = Callable[["Xenstored", Sequence[str]], str]
COMMANDS: Mapping[str, tuple[Command, str]] = MappingProxyType(
    {
        "check": (_check, ""),
        "log": (_log, "on|off"),
        "live-update": (_live_update, "[-c <cmdline>] [-F] [-t <timeout>] <file>"),
        "print": (_print, "<string>"),
        "quota": (_quota, "[set <name> <val>|<domid>]"),
        "quota-soft": (_soft_quota, "[set <name> <val>]"),
        "quota-usage": (_quota_usage, "<domid>"),
        "stats": (_stats, ""),
        "help": (_help, ""),
    }
)
