"""From plan and manifest to what the graph is fed with: encoded tiles, and every step's arguments, a sample each.

A tile file is read whole and its CRC-32 compared with the manifest's: whatever is missing, cut, flipped or replaced is
found here, before a decoder sees it, and a black placeholder takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dali_pipes.cache import LevelCache
from dali_pipes.decode import Region, decode
from dali_pipes.plan import Draw
from dali_pipes.settings import PipelineSettings
from preprocessing import grayscale
from preprocessing.errors import ConfigError
from preprocessing.manifest import LEVEL_COLUMNS, Store, level_column, pick_level
from preprocessing.tiles import TileError, encode_level

# Numbers a sample that the steps are told, in this order; see `Sample.numbers`.
NUMBERS = (
    "table",  # 1: the window is the table; 0: the window is a ramp or a sigmoid of scale * tile + bias
    "sigmoid",
    "scale",
    "bias",
    "brightness",
    "contrast",
    "gamma",
    "antialias",  # standard deviation of the low-pass before the warp, in level pixels; 0 for none
    "grid",  # 1: distorted
    "blur",
    "sharpen",
    "noise",
    "noise_x",  # whole: where in the noise bank
    "noise_y",
    "top",  # the region of the level that is decoded, where patches are read
    "left",
    "rows",
    "columns",
)
# What a sample needs to know of its row; of a large store's all columns would cost each loader seconds.
_FACTS = (
    *("laterality", "crop_height", "crop_width", "bits_stored", "value_offset", "inverted"),
    *("rescale_slope", "rescale_intercept", "window_center", "window_width", "window_function"),
    *("voi_lut", "voi_lut_first", "voi_lut_bits", "percentile_low", "percentile_high"),
)
_PATCH_MARGIN = 1 / 16  # of a patch's side, read around it
NOISE_PLACES = 256  # along each side of the noise bank
PLACEHOLDER = np.frombuffer(encode_level(np.zeros((16, 16), np.uint16)), np.uint8)


class Sample(NamedTuple):
    """One sample as the graph is fed with it.

    Attributes:
        picture: a decoded level or the region of it that is seen, uint16 [rows, columns, 1], or a tile file as it is,
            uint8 [bytes].
        numbers: float32 [len(NUMBERS)].
        matrix: float32 [2, 3], from output to level coordinates; pixel i covers [i, i + 1).
        table: float32 [n], the VOI LUT over tile values, in [0, 1]; one 0 where there is none.
        grid: float32 [n, n, 2], shifts (x, y) of the distortion grid's nodes in output pixels; zeros where there is
            none.
        holes: float32 [k, 4], top, left, bottom, right in output pixels.
    """

    picture: Any
    numbers: NDArray[np.float32]
    matrix: NDArray[np.float32]
    table: NDArray[np.float32]
    grid: NDArray[np.float32]
    holes: NDArray[np.float32]


class Fault(NamedTuple):
    """Why a row's tile cannot be used."""

    row: int
    reason: str


class Source:
    """Rows of a manifest as samples.

    Args:
        store: where the tiles are.
        rows: of its manifest.
        pipeline: what is made of them.
        cache: keeps decoded levels.
        place: makes of an array what the graph is fed with and the cache holds: it may upload it.
        encoded: samples hold tile files, for a graph that decodes; without it they are decoded here.
        whole: levels, or the regions of them that are seen, are mirrored to whole tiles of CLAHE (`whole_tiles`), for a
            graph that leaves that out.
    """

    def __init__(
        self,
        store: Store,
        rows: pd.DataFrame,
        pipeline: PipelineSettings,
        cache: LevelCache | None = None,
        place: Callable[[NDArray[np.uint16]], Any] | None = None,
        encoded: bool = False,
        whole: bool = False,
    ) -> None:
        self._root, self._levels, self._pipeline = store.root, store.levels, pipeline
        self._cache, self._place, self._encoded = cache, place or _as_it_is, encoded
        self._tiles = pipeline.clahe.grid if whole and pipeline.clahe.enabled else 0
        black = PLACEHOLDER if encoded else self._place(whole_tiles(np.zeros((16, 16, 1), np.uint16), self._tiles))
        self._placeholder = _placeholder(black, pipeline.augment.grid_steps + 1)
        self._windows: dict[int, Sequence[grayscale.TileWindow]] = {}
        wanted = [*_FACTS, *(level_column(name, level) for level in store.levels for name in LEVEL_COLUMNS)]
        self._rows: list[dict[str, Any]] = rows[wanted].to_dict("records")  # type: ignore[assignment]

    def sample(self, row: int, draw: Draw) -> tuple[Sample, Fault | None]:
        """The sample of a row, and what is wrong with its tile, if anything."""
        facts = self._rows[row]
        level = level_of(facts, self._levels, self._pipeline)
        height, width = tile_size(facts, level)
        shown = self._pipeline.height, self._pipeline.width
        matrix, region = output_to_tile(facts, level, self._pipeline, draw), (0, 0, height, width)
        if self._pipeline.patch_level is not None:
            region = seen_region(matrix, height, width, *shown, moved=np.abs(self._grid(draw)).max(axis=(0, 1)))
            matrix[:, 2] -= region[1::-1]
        try:
            picture = self._picture(row, level, region)
        except _UnusableError as error:
            return self._placeholder, Fault(row, str(error))
        table_on, sigmoid, scale, bias, table = choose_window(facts, self._pipeline, draw, self._windows_of(row))
        values = {
            "table": table_on,
            "sigmoid": sigmoid,
            "scale": scale,
            "bias": bias,
            "brightness": draw.brightness,
            "contrast": draw.contrast,
            "gamma": draw.gamma,
            "antialias": low_pass(matrix),
            "grid": draw.grid is not None,
            "blur": draw.blur_sigma,
            "sharpen": draw.sharpen,
            "noise": draw.noise_sigma,
            "noise_x": int(draw.noise_x * NOISE_PLACES),
            "noise_y": int(draw.noise_y * NOISE_PLACES),
            **dict(zip(NUMBERS[-4:], region, strict=True)),
        }
        return (
            Sample(
                picture,
                np.array([values[name] for name in NUMBERS], np.float32),
                matrix.astype(np.float32),
                table,
                self._grid(draw),
                np.round(draw.holes * np.array([*shown, *shown], np.float32)).astype(np.float32),
            ),
            None,
        )

    def _windows_of(self, row: int) -> Sequence[grayscale.TileWindow]:
        """A row's windows, worked out once."""
        found = self._windows.get(row)
        if found is None:
            found = self._windows[row] = grayscale.tile_windows(self._rows[row])
        return found

    def _picture(self, row: int, level: str, region: Region) -> Any:
        """What a sample holds of its picture. Raises `_UnusableError`."""
        if self._encoded:
            return np.frombuffer(self._file(row, level), np.uint8)
        if self._cache is None:
            return self._place(whole_tiles(self._decoded(row, level, region), self._tiles))
        facts, cut = self._rows[row], self._pipeline.patch_level is not None
        kept = 0 if cut else self._tiles  # mirrored once where all of a level is always seen
        key = (str(self._root), facts[level_column("path", level)], facts[level_column("crc32", level)], kept)
        found = self._cache.get(key, lambda: self._place(whole_tiles(self._decoded(row, level), kept)))
        return whole_tiles(_cut(found, region), self._tiles) if cut else found

    def _decoded(self, row: int, level: str, region: Region | None = None) -> NDArray[np.uint16]:
        """A level's file, or a region of it, uint16 [rows, columns, 1]."""
        data = self._file(row, level)
        try:
            return decode(data, tile_size(self._rows[row], level), region)[..., None]
        except TileError as error:
            raise _UnusableError(f"{self._path(row, level)}: {error}") from None

    def _path(self, row: int, level: str) -> Path:
        return self._root / self._rows[row][level_column("path", level)]

    def _file(self, row: int, level: str) -> bytes:
        path = self._path(row, level)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _UnusableError(f"{path}: {error.strerror or type(error).__name__}") from None
        # zlib's value, at several times its speed
        if imagecodecs.deflate_crc32(data) != int(self._rows[row][level_column("crc32", level)]):
            raise _UnusableError(f"{path}: its CRC-32 is not the manifest's")
        return data

    def _grid(self, draw: Draw) -> NDArray[np.float32]:
        nodes = self._pipeline.augment.grid_steps + 1
        if draw.grid is None:
            return np.zeros((nodes, nodes, 2), np.float32)
        size = np.array([self._pipeline.width, self._pipeline.height], np.float32)
        return (draw.grid * (size / np.float32(nodes - 1))).astype(np.float32)


class _UnusableError(Exception):
    """A tile that is missing or damaged."""


def _as_it_is(picture: NDArray[np.uint16]) -> NDArray[np.uint16]:
    return picture


def _placeholder(picture: Any, nodes: int) -> Sample:
    """A black sample in the place of a damaged one."""
    numbers = dict.fromkeys(NUMBERS, 0.0) | {"contrast": 1.0, "gamma": 1.0, "rows": 16.0, "columns": 16.0}
    return Sample(
        picture,
        np.array([numbers[name] for name in NUMBERS], np.float32),
        np.eye(2, 3, dtype=np.float32),
        np.zeros(1, np.float32),
        np.zeros((nodes, nodes, 2), np.float32),
        np.zeros((0, 4), np.float32),
    )


def _cut(picture: Any, region: Region) -> Any:
    """A region of a level, contiguous; an array or a tensor. The whole level is itself."""
    top, left, rows, columns = region
    seen = picture[top : top + rows, left : left + columns]
    return np.ascontiguousarray(seen) if isinstance(seen, np.ndarray) else seen.contiguous()


def whole_tiles(picture: Any, tiles: int) -> Any:
    """A picture mirrored about its last row and column to sides that `tiles` divides, as OpenCV's CLAHE does it itself:
    by a whole `tiles` more along one axis where the other alone is short.

    Args:
        picture: [rows, columns, 1], an array or a tensor; where nothing is to be added it is itself.
        tiles: along each side; 0 for none.
    """
    rows, columns = picture.shape[:2]
    if not tiles or rows % tiles == columns % tiles == 0:
        return picture
    if isinstance(picture, np.ndarray) and min(rows, columns) > 1:
        return np.pad(picture, [(0, tiles - rows % tiles), (0, tiles - columns % tiles), (0, 0)], "reflect")
    down, across = mirrored_places(rows, tiles), mirrored_places(columns, tiles)
    if isinstance(picture, np.ndarray):
        return picture.take(down, 0).take(across, 1)
    return picture[down][:, across].contiguous()


@lru_cache(4096)
def mirrored_places(length: int, tiles: int) -> NDArray[np.int64]:
    """Where each place of a side looks that has been mirrored about its last one to a length that `tiles` divides,
    int64."""
    mode: Any = "reflect" if length > 1 else "edge"
    return np.pad(np.arange(length), (0, tiles - length % tiles), mode)


def require_patch_level(store: Store, pipeline: PipelineSettings) -> None:
    """Raise a `ConfigError` where patches are wanted of a level that the store does not have."""
    if pipeline.patch_level not in (None, *store.levels):
        raise ConfigError(
            f"pipeline.patch_level = {pipeline.patch_level!r}: {store.root} has the levels "
            f"{', '.join(store.levels)}. Name one of them, or convert with --levels."
        )


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


def choose_window(
    facts: dict[str, Any],
    pipeline: PipelineSettings,
    draw: Draw,
    windows: Sequence[grayscale.TileWindow] | None = None,
) -> tuple[bool, bool, float, float, NDArray[np.float32]]:
    """How tile values become grey in [0, 1]: whether by table, whether by sigmoid, scale and bias, and the table.

    With scale and bias, u = scale * tile + bias; grey is u clipped to [0, 1], or 1 / (1 + exp(-4 (u - 1/2))).
    A file with a VOI LUT and windows offers all of them, the LUT first (as pydicom prefers it); jitter leaves a LUT be.
    `windows` are `tile_windows(facts)`, where they are at hand.
    """
    none = np.zeros(1, np.float32)
    sigmoid = False
    if pipeline.window == "fixed":
        low, high = (value - facts["value_offset"] for value in (pipeline.fixed_low, pipeline.fixed_high))
        if facts["inverted"]:
            top = 2 ** int(facts["bits_stored"]) - 1
            low, high = top - high, top - low
    elif pipeline.window == "percentile":
        low, high = float(facts["percentile_low"]), float(facts["percentile_high"])
        high = max(high, low + 1)
    else:
        table = grayscale.tile_voi_lut(facts)
        offered = [*([table] if table is not None else []), *(windows or grayscale.tile_windows(facts))]
        chosen = offered[int(draw.pick * len(offered))]
        if isinstance(chosen, np.ndarray):
            return True, False, 0.0, 0.0, np.ascontiguousarray(chosen, np.float32)
        low, high, sigmoid = chosen
    width = (high - low) * draw.window_zoom
    centre = (low + high) / 2 + draw.window_shift * (high - low)
    return False, bool(sigmoid), 1 / width, 0.5 - centre / width, none
