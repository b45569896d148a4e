"""A benchmark's figures in a file, from the first one on: what is stopped half way has not measured for nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training import runs


class Figures:
    """The file that `--json` names; without one nothing is kept."""

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
            runs.write_json(self._target, found)
