"""Which level a picture is read from, and the one affine map from the output's pixels to the level's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dali_pipes.plan import Draw
from dali_pipes.settings import PipelineSettings
from preprocessing.manifest import level_column, pick_level

_PATCH_MARGIN = 1 / 16  # of a patch's side, read around it


def level_of(facts: Mapping[str, Any], levels: tuple[str, ...], pipeline: PipelineSettings) -> str:
    """The level that a manifest row is read from: that of the patches, or the smallest that need not be enlarged."""
    if pipeline.patch_level is not None:
        return pipeline.patch_level
    size = int(facts["crop_height"]), int(facts["crop_width"])
    return pick_level(levels, *size, pipeline.height, pipeline.width)


def tile_size(facts: Mapping[str, Any], level: str) -> tuple[int, int]:
    """Rows and columns of a manifest row's tile."""
    return int(facts[level_column("height", level)]), int(facts[level_column("width", level)])


def output_to_tile(facts: Mapping[str, Any], level: str, pipeline: PipelineSettings, draw: Draw) -> NDArray[np.float64]:
    """`output_to_level` or `output_to_patch`, as the pipeline says, for a manifest row's tile."""
    make = output_to_level if pipeline.patch_level is None else output_to_patch
    mirrored = pipeline.orient and facts["laterality"] == "R"
    return make(*tile_size(facts, level), pipeline.height, pipeline.width, draw, mirrored)


def output_to_level(
    height: int, width: int, out_height: int, out_width: int, draw: Draw, mirrored: bool
) -> NDArray[np.float64]:
    """The one affine map of a sample, float64 [2, 3]: from output to level coordinates (pixel i covers [i, i + 1)).

    Seen from the level: mirrored, fitted into the output with its aspect ratio kept and centred, flipped, rotated and
    scaled about the output's centre, shifted.
    """
    fit = min(out_height / height, out_width / width)
    return _affine((height / 2, width / 2), fit, out_height, out_width, draw, mirrored)


def output_to_patch(
    height: int, width: int, out_height: int, out_width: int, draw: Draw, mirrored: bool
) -> NDArray[np.float64]:
    """As `output_to_level`, for a patch in the level's own pixels, which lies where the draw says.

    It stays inside the level along each axis that is long enough, but for what the changes add; a shorter one is in
    the patch's middle.
    """
    free = max(height - out_height, 0), max(width - out_width, 0)
    middle = (
        height / 2 + (draw.patch_y - 0.5) * free[0],
        width / 2 + (draw.patch_x - 0.5) * free[1],
    )
    return _affine(middle, 1.0, out_height, out_width, draw, mirrored)


def seen_region(
    matrix: NDArray[np.float64],
    height: int,
    width: int,
    out_height: int,
    out_width: int,
    moved: NDArray[np.floating] | tuple[float, float] = (0.0, 0.0),
) -> tuple[int, int, int, int]:
    """Top, left, rows and columns of the level's part that an output shows, with a margin for filters; `moved` is how
    far a distortion grid moves a point at most, x and y in output pixels.

    At least one pixel, also where the output looks beside the level.
    """
    x, y = moved
    corners = np.array([[-x, out_width + x, -x, out_width + x], [-y, -y, out_height + y, out_height + y], [1, 1, 1, 1]])
    seen = (matrix @ corners)[::-1]  # y, x
    margin = _PATCH_MARGIN * max(out_height, out_width)
    size = np.array([height, width])
    start = np.clip(np.floor(seen.min(axis=1) - margin), 0, size - 1).astype(int)
    end = np.clip(np.ceil(seen.max(axis=1) + margin), start + 1, size).astype(int)
    rows, columns = (end - start).tolist()
    return int(start[0]), int(start[1]), rows, columns


def _affine(
    middle: tuple[float, float], fit: float, out_height: int, out_width: int, draw: Draw, mirrored: bool
) -> NDArray[np.float64]:
    """The map that brings a point (y, x) of the level to the output's middle, at `fit` output pixels a level pixel."""
    radians = math.radians(draw.angle)
    cos, sin = math.cos(radians) / (draw.zoom * fit), math.sin(radians) / (draw.zoom * fit)
    flip_x = -1.0 if draw.hflip != mirrored else 1.0
    flip_y = -1.0 if draw.vflip else 1.0
    # y points down: a counter-clockwise turn as seen takes (x, y) to (x cos + y sin, -x sin + y cos); this undoes it.
    linear = np.array([[flip_x * cos, -flip_x * sin], [flip_y * sin, flip_y * cos]])
    centre = np.array([(0.5 + draw.shift_x) * out_width, (0.5 + draw.shift_y) * out_height])
    offset = np.array(middle[::-1]) - linear @ centre
    return np.concatenate([linear, offset[:, None]], axis=1)


def low_pass(matrix: NDArray[np.float64]) -> float:
    """Standard deviation, in level pixels, of the Gaussian before a warp that shrinks; 0 where it hardly does.

    (shrink - 1) / 2, as scikit-image's `rescale` takes; below a fifth of a pixel the filter is next to nothing.
    """
    (a, b), (c, d) = matrix[:, :2].tolist()
    shrink = math.sqrt(abs(a * d - b * c))
    sigma = (shrink - 1) / 2
    return sigma if sigma >= 0.2 else 0.0
