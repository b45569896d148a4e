"""Every tile of a store read again, and compared with what the manifest says of it."""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from preprocessing.machine import available_cores
from preprocessing.manifest import Store, level_column
from preprocessing.progress import Progress, Report


@dataclass(frozen=True)
class Problem:
    """A tile that is not what the manifest says."""

    image_id: str
    path: str
    found: str

    def __str__(self) -> str:
        return f"{self.path}: {self.found} (image {self.image_id})"


def verify(store: Store, progress: Report | None = None) -> list[Problem]:
    """Read every tile again and compare it with the manifest's CRC-32; what differs, in the manifest's order."""
    problems: list[Problem] = []
    fields = [level_column(name, level) for level in store.levels for name in ("path", "crc32")]
    cells = store.manifest[["image_id", *fields]]
    check = partial(_check_tiles, store.root)
    with ThreadPoolExecutor(available_cores()) as pool:
        done = 0
        for start in range(0, len(cells), 256):
            for found in pool.map(check, cells[start : start + 256].itertuples(index=False, name=None)):
                problems += found
                done += 1
                if progress:
                    progress(Progress(done, len(cells), len(problems)))
    return problems


def _check_tiles(root: Path, cells: tuple[Any, ...]) -> list[Problem]:
    image_id, *pairs = cells
    problems = []
    expected = {path: int(crc32) for path, crc32 in zip(pairs[::2], pairs[1::2], strict=True)}
    for path, crc32 in expected.items():
        try:
            found = zlib.crc32((root / path).read_bytes())
        except OSError as error:
            problems.append(Problem(image_id, path, error.strerror or "unreadable"))
            continue
        if found != crc32:
            problems.append(Problem(image_id, path, f"CRC-32 {found:08x}, the manifest has {crc32:08x}"))
    return problems
