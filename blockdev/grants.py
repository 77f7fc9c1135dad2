"""grants.py: the frontend's pages as blkback sees them: mapped once and kept (feature-persistent), or per request.

A Translation is what the segments of one request come to: views of guest memory ready for preadv/pwritev. While grants
stay mapped, the same segment bytes mean the same memory, so translations are remembered by those bytes and a repeated
request costs one dictionary look-up. Unmapping any grant forgets every translation.

Invariants: at most `cap` grants are kept; a grant that a running request uses is never unmapped; close() unmaps all.
Deliberately not Linux's numbers: the default cap is larger than RING_SIZE * 11, so that 1 MiB requests stay persistent too.
"""

from __future__ import annotations

from blockdev.geometry import join_runs, parse_segments
from xenmodel.grant_table import Mapping, MapTrack
from xenmodel.public.grant_table import GNTST_TEXTS, GNTMAP_host_map, GNTMAP_readonly, GNTST_okay

DEFAULT_CAP = 4096
EVICT_SHARE = 20  # one twentieth goes at a time, as Linux's purge does (5 %)
MOST_REMEMBERED_SEGMENTS = 64 * 1024  # of all translations together: a guest could ask for ever new pieces of a page


class Translation:
    """Where a request's data lives. `mappings` are undone after use unless they are kept by the cache."""

    __slots__ = ("busy", "grefs", "mappings", "sectors", "tick", "views")

    def __init__(self, views: list[memoryview], sectors: int, grefs: list[int], mappings: list[Mapping]) -> None:
        self.views = views
        self.sectors = sectors
        self.grefs = grefs
        self.mappings = mappings
        self.busy = 0
        self.tick = 0


class GrantCache:
    """The mappings of one device. `persistent` is what both ends agreed on."""

    def __init__(self, maptrack: MapTrack, domid: int, persistent: bool, cap: int = DEFAULT_CAP) -> None:
        self.maptrack = maptrack
        self.domid = domid
        self.persistent = persistent
        self.cap = cap
        self.kept: dict[int, Mapping] = {}
        self.translations: dict[bytes, Translation] = {}
        self.running: set[Translation] = set()  # those of requests that are not answered yet
        self.tick = 0  # counts requests
        self.used: dict[int, int] = {}  # when a kept grant was last used; its translations may know better
        self.searches = 0  # for something to evict
        self._remembered = 0  # segments of `translations`
        self._all_busy = False  # this request has found nothing to evict already

    def translate(self, data: bytes, guest_is_written: bool) -> Translation:
        """Segments (the caller's copy) to views. ValueError if they are malformed or not granted."""
        segments = parse_segments(data)
        grefs = [gref for gref, _, _ in segments]
        once: list[Mapping] = []
        parts = []
        sectors = 0
        self._all_busy = False
        try:
            for gref, first, last in segments:
                mapping = self._map(gref, not guest_is_written, grefs, once)
                parts.append((mapping.frame, first, last))
                sectors += last - first + 1
        except ValueError:
            self._unmap(once)
            raise
        translation = Translation(join_runs(parts), sectors, grefs, once)
        if not once:
            self._remembered += len(grefs)
            if self._remembered > MOST_REMEMBERED_SEGMENTS:
                self._forget()
                self._remembered = len(grefs)
            self.translations[data] = translation
        return translation

    def page(self, gref: int, length: int) -> bytes:
        """A copy of the first `length` bytes of a granted page (an indirect descriptor page)."""
        once: list[Mapping] = []
        self._all_busy = False
        data = bytes(self._map(gref, True, [], once).view[:length])
        self._unmap(once)
        return data

    def done(self, translation: Translation) -> None:
        """The request is answered: let go of what is not kept."""
        if translation.mappings:
            self._unmap(translation.mappings)

    def close(self) -> None:
        """Unmap everything. No request may be running."""
        assert not self.running, f"{len(self.running)} requests still use their pages"
        self._forget()
        self._unmap(list(self.kept.values()))
        self.kept.clear()
        self.used.clear()

    def _map(self, gref: int, readonly: bool, using: list[int], once: list[Mapping]) -> Mapping:
        kept = self.kept.get(gref)
        if kept is not None:
            self.used[gref] = self.tick
            return kept
        keep = self.persistent and (len(self.kept) < self.cap or self._evict(using))
        flags = GNTMAP_host_map | (GNTMAP_readonly if readonly and not keep else 0)
        status, mapping = self.maptrack.map(self.domid, gref, flags)
        if mapping is None:
            assert status != GNTST_okay, "a mapping that succeeded is an object"
            raise ValueError(f"grant {gref} of domain {self.domid}: {GNTST_TEXTS[status]}")
        if keep:
            self.kept[gref] = mapping
            self.used[gref] = self.tick
        else:
            once.append(mapping)
        return mapping

    def _evict(self, using: list[int]) -> bool:
        """Unmap the least recently used grants; False if all are in use, and the newcomer is mapped for once."""
        if self._all_busy:
            return False
        self.searches += 1
        self._note_use()
        busy = set(using).union(*(t.grefs for t in self.running))
        idle = sorted((gref for gref in self.kept if gref not in busy), key=self.used.__getitem__)
        victims = idle[: max(1, self.cap // EVICT_SHARE)]
        self._all_busy = not victims
        if victims:
            self._forget()
            self._unmap([self.kept.pop(gref) for gref in victims])
            for gref in victims:
                del self.used[gref]
        return bool(victims)

    def _note_use(self) -> None:
        """A request whose translation was remembered has touched only that: pass it on to the grants."""
        for translation in self.translations.values():
            for gref in translation.grefs:
                self.used[gref] = max(self.used[gref], translation.tick)

    def _forget(self) -> None:
        self._note_use()
        self.translations.clear()
        self._remembered = 0

    def _unmap(self, mappings: list[Mapping]) -> None:
        for mapping in mappings:
            self.maptrack.unmap(mapping.handle)
