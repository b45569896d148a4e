"""How far a long job is, told to whoever draws it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The state of a job that goes through `total` items."""

    done: int
    total: int
    rejected: int = 0
    bytes: int = 0
    current: str = ""


Report = Callable[[Progress], None]
