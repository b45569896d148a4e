"""A sheet of pictures as training sees them: each row an image as it is, then augmented again and again."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from dali_pipes.plan import Draw, Plan
from dali_pipes.settings import LoaderSettings, PipelineSettings
from dali_pipes.source import Source, require_patch_level
from dali_pipes.steps import HostSteps, to_bytes
from preprocessing.errors import StoreError
from preprocessing.manifest import Store

_CAPTION = 18  # pixels under each picture
_GAP = 6
_CELL = 320  # longest side of a picture on the sheet


def draw_sheet(
    store: Store,
    out: Path,
    pipeline: PipelineSettings | None = None,
    images: int = 5,
    variants: int = 6,
    seed: int = 42,
) -> Path:
    """Write the sheet as PNG.

    Args:
        store: where the pictures come from; those with cancer and those without in turn, from all over it.
        out: the PNG.
        pipeline: whose augmentation is shown.
        images: rows of the sheet.
        variants: augmented pictures beside each original, with what was done to them.
        seed: of the plan.

    Raises:
        StoreError: the store has no pictures, or the ones chosen are damaged.
        ConfigError: the store lacks the level that patches are read of.
    """
    pipeline = pipeline or PipelineSettings()
    require_patch_level(store, pipeline)
    rows = store.manifest
    if rows.empty:
        raise StoreError(f"{store.root}: the store holds no pictures to show. Convert some first.")
    cancer = (rows["cancer"] == 1).to_numpy()
    parts = [part for part in map(np.flatnonzero, (cancer, ~cancer)) if len(part)]
    each = -(-images // len(parts))
    chosen = dict.fromkeys(  # none twice, however few there are
        int(part[len(part) * (number // len(parts)) // each])
        for number in range(images)
        for part in [parts[number % len(parts)]]
    )
    source, steps = Source(store, rows, pipeline), HostSteps(pipeline)
    plan = Plan(rows["cancer"].to_numpy(), LoaderSettings(), seed, True, pipeline.augment)
    lines = []
    for row in chosen:
        draws = [Draw(), *(plan.sample(0, 1000 * row + variant) for variant in range(variants))]
        original = f"{rows['laterality'].iloc[row]} {rows['view'].iloc[row]}" + (" cancer" if cancer[row] else "")
        captions = [original, *map(_described, draws[1:])]
        cells = [
            _cell(_picture(source, steps, row, draw), caption) for draw, caption in zip(draws, captions, strict=True)
        ]
        lines.append(np.concatenate(cells, axis=1))
    sheet = np.concatenate(lines, axis=0)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(cv2.imencode(".png", sheet)[1].tobytes())
    return out


def _picture(source: Source, steps: HostSteps, row: int, draw: Draw) -> NDArray[np.uint8]:
    sample, fault = source.sample(row, draw)
    if fault is not None:
        raise StoreError(
            f"{fault.reason}. Mend the store with convert --repair, and the --images and --csv that it was made from."
        )
    return to_bytes(steps(*sample)[..., 0])


def _cell(picture: NDArray[np.uint8], caption: str) -> NDArray[np.uint8]:
    scale = _CELL / max(picture.shape)
    size = round(picture.shape[1] * scale), round(picture.shape[0] * scale)
    shown = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    cell = np.full((shown.shape[0] + _CAPTION + _GAP, shown.shape[1] + _GAP), 255, np.uint8)
    cell[: shown.shape[0], : shown.shape[1]] = shown
    where = (2, shown.shape[0] + _CAPTION - 5)
    cv2.putText(cell, caption, where, cv2.FONT_HERSHEY_SIMPLEX, 0.36, 0, 1, cv2.LINE_AA)
    return cell


def _described(draw: Draw) -> str:
    """What a draw does, in a few words."""
    words = [
        ("flip", draw.hflip),
        ("upside down", draw.vflip),
        (f"{draw.angle:+.0f} deg x{draw.zoom:.2f}", draw.angle or draw.zoom != 1),
        ("window", draw.window_shift or draw.window_zoom != 1),
        ("tone", draw.contrast != 1 or draw.gamma != 1),
        ("blur", draw.blur_sigma),
        ("sharpen", draw.sharpen),
        ("noise", draw.noise_sigma),
        ("grid", draw.grid is not None),
        ("holes", len(draw.holes)),
    ]
    return ", ".join(word for word, there in words if there) or "unchanged"
