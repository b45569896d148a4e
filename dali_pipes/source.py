"""From plan and manifest to what the graph is fed with: encoded tiles, and every step's arguments, a sample each.

A tile file is read whole and its CRC-32 compared with the manifest's: whatever is missing, cut, flipped or replaced is
found here, before a decoder sees it, and a black placeholder takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dali_pipes.cache import LevelCache
from dali_pipes.decode import Region, decode
from dali_pipes.geometry import level_of, low_pass, output_to_tile, seen_region, tile_size
from dali_pipes.plan import Draw
from dali_pipes.settings import PipelineSettings
from preprocessing import grayscale
from preprocessing.errors import ConfigError
from preprocessing.manifest import LEVEL_COLUMNS, Store, level_column
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
