"""Where the time of a job goes, phase by phase."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

Item = TypeVar("Item")


def timed(items: Iterable[Item], monitor: Any, phase: str) -> Iterator[Item]:
    """The items (batches, say), the wait for each one timed."""
    iterator = iter(items)
    while True:
        with monitor.time(phase):
            item = next(iterator, None)
        if item is None:
            return
        yield item


class Untimed:
    """A monitor for those who have none."""

    def time(self, phase: str) -> AbstractContextManager[None]:
        """Times nothing."""
        return nullcontext()
