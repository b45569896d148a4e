"""Does the time of a patch follow the patch? Milliseconds to decode squares of one full-size level, beside the whole.

    python benchmarks/region_speed.py [--repeats N] [--json FILE]

Squares lie at random and take turns; medians. The level is synthetic, 3328 by 2560 and 12 bits deep. What does not
follow the region, reading the file and its CRC-32, is shown by itself.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import cv2
import imagecodecs
import numpy as np
from drawn import draw
from rich.console import Console
from rich.table import Table

from dali_pipes.decode import decode
from preprocessing.settings import Codec
from preprocessing.tiles import encode_level
from training import run_files

SIDES = (256, 512, 1024, 2048)
CODECS: tuple[Codec, ...] = ("zstd", "deflate", "lzw", "none")


def measure(codec: Codec, repeats: int) -> list[dict[str, Any]]:
    """A row a side: side in pixels (None: the whole level), share of its pixels, and milliseconds."""
    level = draw(1)[0].stored
    size = (int(level.shape[0]), int(level.shape[1]))
    data = encode_level(level, codec)
    generator = np.random.default_rng(0)
    spent: dict[int | None, list[float]] = defaultdict(list)
    checked = []
    for _ in range(repeats):
        for side in (*SIDES, None):
            rows, columns = (side, side) if side else size
            top, left = (int(generator.integers(0, most + 1)) for most in (size[0] - rows, size[1] - columns))
            start = time.perf_counter()
            found = decode(data, size, (top, left, rows, columns))
            spent[side].append(time.perf_counter() - start)
            assert np.array_equal(found, level[top : top + rows, left : left + columns])
        start = time.perf_counter()
        imagecodecs.deflate_crc32(data)
        checked.append(time.perf_counter() - start)
    return [
        {
            "codec": codec,
            "side": side,
            "share_of_pixels": side**2 / level.size if side else 1.0,
            "ms": 1e3 * statistics.median(times),
            "crc_ms": 1e3 * statistics.median(checked),
        }
        for side, times in spent.items()
    ]


@click.command()
@click.option("--repeats", type=click.IntRange(1), default=15, show_default=True)
@click.option("--json", "target", type=click.Path(path_type=Path), default=None, help="Write the figures there.")
def main(repeats: int, target: Path | None) -> None:
    """Measure and show."""
    cv2.setNumThreads(1)
    rows = [row for codec in CODECS for row in measure(codec, repeats)]
    shown = Table(title="Decoding a square of a level of 3328 × 2560, ms")
    for name in ("codec", "side", "pixels", "ms", "of the whole", "CRC-32 of the file, ms"):
        shown.add_column(name, justify="left" if name == "codec" else "right")
    whole = {row["codec"]: row["ms"] for row in rows if row["side"] is None}
    for row in rows:
        share = f"{row['ms'] / whole[row['codec']]:.0%}"
        side = str(row["side"] or "whole")
        shown.add_row(
            row["codec"], side, f"{row['share_of_pixels']:.1%}", f"{row['ms']:.2f}", share, f"{row['crc_ms']:.2f}"
        )
    Console().print(shown)
    if target:
        run_files.write_json(target, {"rows": rows})


if __name__ == "__main__":
    main()
