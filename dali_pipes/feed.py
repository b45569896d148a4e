"""A batch of samples as the columns that the graph of operators is fed with.

An operator costs the host microseconds a sample, whatever it does: so all that is arithmetic on arguments is done
here, for a whole batch at once, and the graph is built without the steps that no sample of its loader takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from nvidia.dali.types import DALIDataType

from dali_pipes.settings import AugmentSettings, PipelineSettings
from dali_pipes.source import NUMBERS, Sample

_AT = {name: place for place, name in enumerate(NUMBERS)}


class Column(NamedTuple):
    """One of the graph's inputs: its name, element type and dimensions."""

    name: str
    dtype: DALIDataType
    dimensions: int


@dataclass(frozen=True)
class Uses:
    """Which steps a loader's samples take at all.

    Attributes:
        tables: some are windowed by a VOI LUT.
        sigmoids: some are windowed by a sigmoid.
        regions: the graph decodes the part of a level that a patch shows.
        mirroring: CLAHE's tiles are made whole by the graph, which decodes; else the source has made them so.
        tone, grid, blur, sharpen, noise, holes: some are changed by them.
    """

    tables: bool = True
    sigmoids: bool = True
    regions: bool = False
    mirroring: bool = True
    tone: bool = True
    grid: bool = True
    blur: bool = True
    sharpen: bool = True
    noise: bool = True
    holes: bool = True

    @classmethod
    def of(
        cls,
        rows: Iterable[Mapping[Any, Any]],
        pipeline: PipelineSettings,
        augment: AugmentSettings | None,
        encoded: bool,
    ) -> Uses:
        """Those of manifest rows under settings; `augment` is None where nothing is augmented, `encoded` says that the
        graph decodes."""
        tables = sigmoids = False
        if pipeline.window == "manifest":
            for row in rows:
                tables |= len(row["voi_lut"]) > 0
                sigmoids |= "SIGMOID" in row["window_function"]
        regions = encoded and pipeline.patch_level is not None
        if augment is None:
            return cls(tables, sigmoids, regions, encoded, *[False] * 6)
        return cls(
            tables,
            sigmoids,
            regions,
            encoded,
            tone=augment.tone > 0,
            grid=augment.grid > 0,
            blur=augment.blur > 0,
            sharpen=augment.sharpen > 0,
            noise=augment.noise > 0,
            holes=augment.dropout > 0 or augment.grid_dropout > 0,
        )


def columns(uses: Uses, pipeline: PipelineSettings) -> list[Column]:
    """The graph's inputs beside the picture, in the order in which `feed` gives them."""
    real, whole = DALIDataType.FLOAT, DALIDataType.INT32
    found = [Column("scale", real, 0), Column("bias", real, 0), Column("matrix", real, 2)]
    found += [Column("antialias", real, 0), Column("antialias_window", whole, 0)]
    if uses.tables:
        found += [Column("by_table", real, 0), Column("table", real, 1)]
    if uses.sigmoids:
        found += [Column("sigmoid", real, 0)]
    if pipeline.clahe.enabled:
        found += [Column("size", whole, 1)]
    if uses.regions:
        found += [Column("region", whole, 1)]
    if uses.tone:
        found += [Column(name, real, 0) for name in ("gamma", "contrast", "brightness")]
    if uses.grid:
        found += [Column("distorted", real, 0), Column("nodes", real, 3)]
    if uses.blur:
        found += [Column("blur", real, 0), Column("blur_window", whole, 0)]
    if uses.sharpen:
        found += [Column("sharpen", real, 0)]
    if uses.noise:
        found += [Column("noise", real, 0), Column("noise_at", whole, 1)]
    if uses.holes:
        found += [Column("hole_at", real, 1), Column("hole_size", real, 1)]
    return found


def feed(samples: Sequence[Sample], uses: Uses, pipeline: PipelineSettings) -> list[Any]:
    """The pictures, a list, and after them the values of `columns`, arrays [B, ...]; the tables are a list.

    `scale` and `bias` take a tile's values to [0, 1], or straight to CLAHE's bytes where `to_bytes` says so, or to the
    hyperbolic tangent's argument where `sigmoid` is 1, as 1 / (1 + exp(-4 (u - 1/2))) is (1 + tanh(2 u - 1)) / 2;
    windows of a Gaussian are 1 where it does nothing; `nodes` [B, n, n, 2] is where the distorted grid's nodes look
    (x, y), the level's edges at -1 and 1; holes of no size fill up those of samples with fewer.
    """
    numbers = np.ascontiguousarray(np.stack([sample.numbers for sample in samples]).T)
    matrix = np.stack([sample.matrix for sample in samples])
    found: dict[str, Any] = {name: numbers[place] for name, place in _AT.items()}
    found |= {"matrix": matrix, "by_table": found["table"], "table": [sample.table for sample in samples]}
    if to_bytes(uses, pipeline):
        found["scale"] = found["scale"] * np.float32(255)
    if uses.sigmoids:
        found["scale"] = found["scale"] * (1 + found["sigmoid"])
        found["bias"] = found["bias"] * (1 + found["sigmoid"]) - found["sigmoid"]
    for name in ("antialias", "blur"):
        found[f"{name}_window"] = gaussian_window(found[name])
        found[name] = np.maximum(found[name], np.float32(0.1))  # of no matter where the window is 1
    region = numbers[[_AT[name] for name in ("top", "left", "rows", "columns")]].T
    found |= {"region": _whole(region), "size": _whole(region[:, 2:])}
    found["noise_at"] = _whole(np.stack([found["noise_y"], found["noise_x"]], axis=1))
    if uses.grid:
        grid = np.stack([sample.grid for sample in samples])
        found |= {"distorted": found["grid"], "nodes": looked_at(grid, matrix, region[:, 2:], pipeline)}
    if uses.holes:
        found["hole_at"], found["hole_size"] = _holes([sample.holes for sample in samples])
    return [[sample.picture for sample in samples], *(found[column.name] for column in columns(uses, pipeline))]


def to_bytes(uses: Uses, pipeline: PipelineSettings) -> bool:
    """Whether every window is a ramp that CLAHE follows: one operator then gives its bytes."""
    return pipeline.clahe.enabled and not (uses.tables or uses.sigmoids)


def gaussian_window(sigma: NDArray[np.float32]) -> NDArray[np.int32]:
    """DALI's own choice of a Gaussian's window, and 1, which changes nothing, for no standard deviation."""
    return np.where(sigma > 0, 2 * np.ceil(3 * sigma) + 1, 1).astype(np.int32)


def looked_at(
    grid: NDArray[np.float32], matrix: NDArray[np.float32], size: NDArray[np.float32], pipeline: PipelineSettings
) -> NDArray[np.float32]:
    """Where the distorted grid's nodes look in the level: the affine map of their displaced places.

    Args:
        grid: [B, n, n, 2], shifts (x, y) in output pixels.
        matrix: [B, 2, 3], from output to level coordinates.
        size: [B, 2], rows and columns of the level.
        pipeline: for the output's size.

    Returns:
        [B, n, n, 2] (x, y), with the level's edges at -1 and 1.
    """
    n = grid.shape[1]
    at_y, at_x = (np.linspace(0, side, n, dtype=np.float32) for side in (pipeline.height, pipeline.width))
    places = grid + np.stack(np.broadcast_arrays(at_x, at_y[:, None]), axis=-1)
    levels = np.einsum("bij,byxj->byxi", matrix[:, :, :2], places) + matrix[:, None, None, :, 2]
    return (levels * (2 / size[:, None, None, ::-1]) - 1).astype(np.float32)


def _whole(values: NDArray[np.float32]) -> NDArray[np.int32]:
    return np.ascontiguousarray(values.astype(np.int32))


def _holes(each: Sequence[NDArray[np.float32]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Corners and sizes, [B, 2 k] each: (y, x) of one hole after the other."""
    corners, sizes = np.zeros((2, len(each), max(1, *map(len, each)), 2), np.float32)
    for place, holes in enumerate(each):
        corners[place, : len(holes)] = holes[:, :2]
        sizes[place, : len(holes)] = holes[:, 2:] - holes[:, :2]
    return corners.reshape(len(each), -1), sizes.reshape(len(each), -1)
