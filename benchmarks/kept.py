"""What benchmarks share: their figures in a file, from the first one on, and a rate without the start of processes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training import run_files


def steady_rate(seconds: Mapping[int, Sequence[float]]) -> float:
    """Files a second between the smallest and the largest number of files that were timed, by their medians: what each
    more costs, when all has started. NaN where the larger number took no longer."""
    few, many = min(seconds), max(seconds)
    longer = statistics.median(seconds[many]) - statistics.median(seconds[few])
    return (many - few) / longer if longer > 0 else math.nan


class Figures:
    """The file that `--json` names; without one nothing is kept. What is stopped half way has not measured for
    nothing."""

    def __init__(self, target: Path | None) -> None:
        self._target = target

    def so_far(self, **found: Any) -> None:
        """Replace the file by these figures, marked as unfinished."""
        self._write({"unfinished": True, **found})

    def final(self, found: dict[str, Any]) -> None:
        """Replace the file by the figures that the benchmark came to."""
        self._write(found)

    def _write(self, found: dict[str, Any]) -> None:
        if self._target is not None:
            run_files.write_json(self._target, found)
