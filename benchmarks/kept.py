"""A benchmark's figures in a file, from the first one on: what is stopped half way has not measured for nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


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
        if self._target is None:
            return
        beside = self._target.with_name(f".{self._target.name}.tmp")
        beside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        beside.replace(self._target)
