"""Decoded levels kept in memory, shared by all loaders of the process that keep theirs in the same place.

What came first stays until the last loader closes: an epoch asks for every picture once, so throwing out the longest
unused one to take in another would lose each just before it is wanted again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

_shared: dict[str, LevelCache] = {}
_shared_lock = threading.Lock()


class LevelCache:
    """Levels by key, up to a number of bytes. Threads may share it.

    Attributes:
        hits, misses: levels found here, and made anew, so far.
        bytes: held now.
        budget: the most that may be held.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.hits = self.misses = self.bytes = 0
        self._levels: dict[Hashable, Any] = {}
        self._lock = threading.Lock()
        self._users = 0

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The level of a key, from `make` where it is not here; it is kept if there is room (`nbytes`)."""
        with self._lock:
            found = self._levels.get(key)
            if found is not None:
                self.hits += 1
                return found
            self.misses += 1
        level = make()
        with self._lock:
            if key not in self._levels and self.bytes + level.nbytes <= self.budget:
                self._levels[key] = level
                self.bytes += level.nbytes
        return level

    def _empty(self) -> None:
        with self._lock:
            self._levels.clear()
            self.bytes = 0

    def __len__(self) -> int:
        return len(self._levels)

    def __str__(self) -> str:
        asked = max(self.hits + self.misses, 1)
        return f"{len(self)} levels, {self.bytes / 2**20:.0f} MiB, {self.hits / asked:.1%} hits"


@contextmanager
def shared_cache(place: str, budget: int) -> Iterator[LevelCache]:
    """The cache of a place ("cpu", "cuda:0"), for as long as the block lasts; emptied when its last user leaves.

    Args:
        place: where the levels lie.
        budget: bytes; the largest budget of those who share it holds.
    """
    with _shared_lock:
        cache = _shared.setdefault(place, LevelCache(budget))
        cache.budget = max(cache.budget, budget)
        cache._users += 1
    try:
        yield cache
    finally:
        with _shared_lock:
            cache._users -= 1
            if not cache._users:
                _shared.pop(place, None)
                cache._empty()
