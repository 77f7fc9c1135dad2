"""storetree.py: a tree of a xenstore to the lines of a dump, and back; the work behind `xenfs store dump` and `load`.

Called by storecmd.py with a StoreClient. The text is xenmodel/xenstore/dump.py's.

A dump is one moment of the store: one transaction reads it all. A load is not: it goes through the nodes in pieces, each
a transaction of its own that looks at what is there and changes only what differs, so that watches fire for nothing
else, and once for a node. A node is made before those below it, for the same reason.
What a store tells is kept only up to NODES_MAX nodes and TEXT_MAX characters.
Left out: permissions of special nodes of single domains (`@releaseDomain/1`), which no store lists.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from xenfs.storeclient import ATTEMPTS, Request, StoreClient, StoreError
from xenmodel.public.io.xs_wire import XsType
from xenmodel.xenstore import path as paths
from xenmodel.xenstore.dump import HEADER, Entry, format_node
from xenmodel.xenstore.errors import XsErrno, XsError
from xenmodel.xenstore.perms import Perm
from xenmodel.xenstore.wire import join

BATCH = 64  # nodes asked about at a time
PIECE = 128  # nodes that one transaction of a load looks at
NODES_MAX = 1_000_000
TEXT_MAX = 512 << 20

_LISTED = {f"/{name}": name for name in paths.SPECIALS}  # oxenstored shows them as children of the root

Progress = Callable[[int, int], None]  # nodes done, of how many that are known of


class TreeError(Exception):
    """The tree cannot be dumped or loaded; one line says why."""


class Found(NamedTuple):
    """A node as the store has it."""

    value: bytes
    perms: tuple[Perm, ...]
    names: list[str]


@dataclass
class Counts:
    """What a load did."""

    nodes: int = 0
    created: int = 0
    values: int = 0
    perms: int = 0
    removed: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(mine + its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __str__(self) -> str:
        changed = f"created {self.created}, values changed {self.values}, permissions changed {self.perms}"
        return f"nodes {self.nodes}: {changed}, others removed {self.removed}"


def _no_progress(done: int, of: int) -> None:
    pass


# --- dump -------------------------------------------------------------------------------------------------------------


def dump(client: StoreClient, top: str = paths.ROOT, progress: Progress = _no_progress) -> list[str]:
    """The lines of `top` and all below it, and of the special nodes if it is the root, without line ends."""
    try:
        lines = client.transact(lambda tx: _tree(client, top, tx, progress) + _specials(client, top, tx))
    except XsError as error:
        if error.errno is XsErrno.EAGAIN:
            raise TreeError(f"{top} changed while it was read, {ATTEMPTS} times; try again, or a smaller part") from None
        if error.errno is XsErrno.ENOSPC:
            raise TreeError(f"{top} has more nodes than a transaction may read here; dump smaller parts") from None
        raise
    return [HEADER, *lines]


def _tree(client: StoreClient, top: str, tx: int, progress: Progress) -> list[str]:
    """Depth first, as xenstore-ls does, though nodes are asked for in batches."""
    lines: dict[str, str] = {}
    below: dict[str, list[str]] = {}
    waiting = deque([top])
    size = 0
    while waiting:
        batch = [waiting.popleft() for _ in range(min(BATCH, len(waiting)))]
        for path, node in zip(batch, _look(client, batch, tx), strict=True):
            if node is None:
                if path == top:
                    raise TreeError(f"there is no node {top}")
                raise XsError(XsErrno.EAGAIN, f"{path} has gone since the node above was read")
            lines[path] = format_node(path, node.value, node.perms)
            below[path] = [each for name in node.names if (each := paths.child(path, name)) not in _LISTED]
            waiting.extend(below[path])
            size += len(lines[path])
        if size > TEXT_MAX or len(lines) + len(waiting) > NODES_MAX:
            raise TreeError(f"{top} has more than {NODES_MAX} nodes or {TEXT_MAX} characters; dump smaller parts")
        progress(len(lines), len(lines) + len(waiting))
    ordered = []
    rest = [top]
    while rest:
        path = rest.pop()
        ordered.append(lines[path])
        rest.extend(reversed(below[path]))
    return ordered


def _specials(client: StoreClient, top: str, tx: int) -> list[str]:
    """Left out are those that the store does not have or does not show."""
    wanted = paths.SPECIALS if top == paths.ROOT else ()
    answers = client.request([(XsType.GET_PERMS, join(path)) for path in wanted], tx)
    told = [(path, answer) for path, answer in zip(wanted, answers, strict=True) if not isinstance(answer, XsError)]
    return [format_node(path, None, client.perms(path, answer)) for path, answer in told]


def _look(client: StoreClient, wanted: list[str], tx: int, names: bool = True) -> list[Found | None]:
    """The nodes, with the names of their children if asked; None for one that is not there."""
    kinds = [XsType.READ, XsType.GET_PERMS, *([XsType.DIRECTORY] if names else [])]
    answers = iter(client.request([(kind, join(path)) for path in wanted for kind in kinds], tx))
    found: list[Found | None] = []
    for path in wanted:
        value, perms, *listed = [next(answers) for _ in kinds]
        if isinstance(value, XsError):
            if value.errno is not XsErrno.ENOENT:
                raise value
            found.append(None)
        else:
            children = client.names(path, listed[0], tx) if names else []
            found.append(Found(value, tuple(client.perms(path, perms)), children))
    return found


# --- load -------------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What a load has to look at: `visit` lists paths, parents first; `keep` is set if it also removes."""

    wanted: dict[str, Entry] = field(default_factory=dict)
    specials: dict[str, Entry] = field(default_factory=dict)
    visit: list[str] = field(default_factory=list)
    keep: dict[str, set[str]] | None = None  # path -> names of the children that the file has

    @classmethod
    def make(cls, entries: Iterable[Entry], replace: bool, under: str | None) -> Plan:
        plan = cls()
        for entry in entries:
            special = _LISTED.get(entry.path, entry.path)
            if paths.is_special(special):
                if under in (None, paths.ROOT):
                    plan.specials[special] = Entry(special, None, entry.perms)
            elif under is None or under in paths.lineage(entry.path):
                plan.wanted[entry.path] = entry
        if under is not None and not plan.wanted:
            raise TreeError(f"nothing in it is at or below {under}")
        plan.visit = list(plan.wanted)
        if replace:
            plan.keep = _names_by_parent(plan.wanted)
            dumped = plan.wanted.keys() | ({under} if under is not None else set())
            inner = [path for path in plan.keep if path not in plan.wanted]
            plan.visit += [path for path in inner if not dumped.isdisjoint(paths.lineage(path))]
        plan.visit = _parents_first(plan.visit)
        return plan


def _names_by_parent(wanted: Iterable[str]) -> dict[str, set[str]]:
    """Each path, and each above one, with the names of its children."""
    names: dict[str, set[str]] = {}
    for path in wanted:
        names.setdefault(path, set())
        while path != paths.ROOT:
            name, path = paths.name_of(path), paths.parent(path)
            siblings = names.setdefault(path, set())
            if name in siblings:
                break
            siblings.add(name)
    return names


def _parents_first(wanted: list[str]) -> list[str]:
    """In the order given but for that: a node made for the sake of a child would be told about twice."""
    there = set(wanted)
    ordered: dict[str, None] = {}
    for path in wanted:
        missing = [above for above in paths.lineage(path) if above in there and above not in ordered]
        ordered.update(dict.fromkeys(reversed(missing)))
    return list(ordered)


def load(
    client: StoreClient,
    entries: Iterable[Entry],
    replace: bool = False,
    under: str | None = None,
    progress: Progress = _no_progress,
) -> Counts:
    """Make the store have these nodes; with `replace` no others at or below them (and at or below `under`)."""
    plan = Plan.make(entries, replace, under)
    for entry in (*plan.wanted.values(), *plan.specials.values()):
        bodies = [join(entry.path, *map(str, entry.perms)), join(entry.path) + (entry.value or b"")]
        if max(map(len, bodies)) > client.body_max:
            raise TreeError(f"{entry.path} is too large: no request with its path and value has room")
    counts = Counts()
    try:
        for first in range(0, len(plan.visit), PIECE):
            piece = plan.visit[first : first + PIECE]
            counts += client.transact(partial(_load_piece, client, plan, piece))
            progress(first + len(piece), len(plan.visit))
        for entry in plan.specials.values():
            counts += _load_special(client, entry)
    except (XsError, StoreError) as error:
        why = str(error)
        if isinstance(error, XsError) and error.errno is XsErrno.EAGAIN:
            why = f"others changed the same nodes, {ATTEMPTS} times"
        total = len(plan.wanted) + len(plan.specials)
        raise TreeError(f"{why}; done until then: {counts.nodes} of {total} nodes") from None
    return counts


def _load_piece(client: StoreClient, plan: Plan, piece: list[str], tx: int) -> Counts:
    counts = Counts()
    requests: list[Request] = []
    for path, node in zip(piece, _look(client, piece, tx, names=plan.keep is not None), strict=True):
        if node is not None and plan.keep is not None:
            gone = [paths.child(path, name) for name in node.names if name not in plan.keep[path]]
            gone = [each for each in gone if each not in _LISTED]
            requests += [(XsType.RM, join(each)) for each in gone]
            counts.removed += len(gone)
        entry = plan.wanted.get(path)
        if entry is None or entry.value is None:
            continue
        counts.nodes += 1
        if node is None or node.value != entry.value:
            requests.append((XsType.WRITE, join(path) + entry.value))
            counts.values += node is not None
        if node is None or node.perms != entry.perms:
            requests.append((XsType.SET_PERMS, join(path, *map(str, entry.perms))))
            counts.perms += node is not None
        counts.created += node is None
    for (kind, body), answer in zip(requests, client.request(requests, tx), strict=True):
        if isinstance(answer, XsError):
            if kind is XsType.SET_PERMS and answer.errno is XsErrno.ENOENT:
                raise _no_owner(plan.wanted[body.partition(b"\0")[0].decode("ascii")])
            raise answer
    return counts


def _load_special(client: StoreClient, entry: Entry) -> Counts:
    """Not in a transaction, of which C xenstored's special nodes are no part; nor can older ones be asked what they have."""
    with suppress(XsError):
        if tuple(client.get_perms(entry.path)) == entry.perms:
            return Counts(nodes=1)
    try:
        client.set_perms(entry.path, entry.perms)
    except XsError as error:
        raise _no_owner(entry) if error.errno is XsErrno.ENOENT else error from None
    return Counts(nodes=1, perms=1)


def _no_owner(entry: Entry) -> XsError:
    """How C xenstored refuses to give a node to nobody."""
    return XsError(XsErrno.ENOENT, f"{entry.path} is to belong to domain {entry.perms[0].domid}, which is not there")
