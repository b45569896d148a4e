"""The steps of steps.py as DALI operators, for the GPU; they run on DALI's CPU backend too, which tests use.

Written for a pipeline with conditional execution: an `if` on a sample's argument splits the batch, so that a step costs
its probability. Arguments are read on the host (`numbers`), arithmetic takes them where the picture is (`here`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math
from nvidia.dali.pipeline import do_not_convert
from nvidia.dali.types import Constant, DALIDataType, DALIInterpType

from dali_pipes.settings import PipelineSettings
from dali_pipes.source import NUMBERS
from dali_pipes.steps import SHARPEN_SIGMA, noise_bank

_AT = {name: place for place, name in enumerate(NUMBERS)}


def all_steps(
    tile: Any, numbers: Any, matrix: Any, table: Any, grid: Any, holes: Any, settings: PipelineSettings, device: str
) -> Any:
    """Every step, in the order of steps.py.

    Args:
        tile: uint16 HWC on `device`.
        numbers, matrix, table, grid, holes: on the host, as in `source.Sample`.
        settings: of the pipeline.
        device: "gpu", or "cpu" for DALI's own CPU backend.

    Returns:
        float32 CHW on `device`.
    """
    here = numbers.gpu() if device == "gpu" else numbers
    picture = window(tile, numbers, here, table, device)
    if settings.clahe.enabled:
        picture = clahe(picture, settings)
    picture = tone(picture, numbers, here)
    picture = gaussian_if(picture, numbers[_AT["antialias"]])
    picture = warp(picture, numbers, matrix, grid, settings, device)
    picture = gaussian_if(picture, numbers[_AT["blur"]])
    picture = sharpen(picture, numbers, here)
    picture = add_noise(picture, numbers, here, settings, device)
    picture = cut_holes(picture, holes)
    return normalise(picture, settings)


def window(tile: Any, numbers: Any, here: Any, table: Any, device: str) -> Any:
    """Tile values to grey in [0, 1]."""
    values = fn.cast(tile, dtype=DALIDataType.FLOAT)
    u = values * here[_AT["scale"]] + here[_AT["bias"]]
    if numbers[_AT["table"]] > 0:
        placed = table.gpu() if device == "gpu" else table
        grey = in_torch(look_up, values, placed, device=device)
    elif numbers[_AT["sigmoid"]] > 0:
        grey = 1.0 / (1.0 + math.exp(-4.0 * (u - 0.5)))
    else:
        grey = math.clamp(u, 0.0, 1.0)
    return grey


@do_not_convert
def in_torch(function: Callable[..., torch.Tensor], *inputs: Any, device: str) -> Any:
    """A function of tensors, for what DALI has no operator for on both devices. Gives HWC."""

    def run(*columns: Any) -> Any:
        samples = zip(*columns, strict=True)
        results = [function(*map(torch.from_dlpack, sample)).contiguous() for sample in samples]
        if results and results[0].is_cuda:  # DALI goes on in a stream of its own
            torch.cuda.current_stream(results[0].device).synchronize()
        return [result.__dlpack__() for result in results]

    return fn.dl_tensor_python_function(
        *inputs, function=run, batch_processing=True, device=device, output_layouts="HWC"
    )


@do_not_convert
def look_up(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """A table's entries at whole values; its last one above it."""
    return table[values.long().clamp(max=table.shape[0] - 1)]


def clahe(grey: Any, settings: PipelineSettings) -> Any:
    """Contrast-limited adaptive histogram equalisation on 8 bits, back to [0, 1]."""
    side = settings.clahe.grid
    levels = fn.cast(math.floor(grey * 255.0 + 0.5), dtype=DALIDataType.UINT8)
    equalised = fn.clahe(levels, tiles_x=side, tiles_y=side, clip_limit=settings.clahe.clip_limit)
    return fn.cast(equalised, dtype=DALIDataType.FLOAT) * (1 / 255)


def tone(grey: Any, numbers: Any, here: Any) -> Any:
    """contrast (v^gamma - 1/2) + 1/2 + brightness, clipped to [0, 1]."""
    changed = (numbers[_AT["gamma"]] != 1) | (numbers[_AT["contrast"]] != 1) | (numbers[_AT["brightness"]] != 0)
    if changed:
        raised = math.pow(grey, here[_AT["gamma"]])
        toned = here[_AT["contrast"]] * (raised - 0.5) + (0.5 + here[_AT["brightness"]])
        result = math.clamp(toned, 0.0, 1.0)
    else:
        result = grey
    return result


def gaussian_if(picture: Any, sigma: Any) -> Any:
    """A Gaussian where `sigma` is above 0."""
    if sigma > 0:
        result = fn.gaussian_blur(picture, sigma=sigma)
    else:
        result = picture
    return result


def warp(picture: Any, numbers: Any, matrix: Any, grid: Any, settings: PipelineSettings, device: str) -> Any:
    """The one resampling: an affine warp, or a remap where the grid distorts too."""
    size = (settings.height, settings.width)
    if numbers[_AT["grid"]] > 0:
        placed = [node.gpu() if device == "gpu" else node for node in (matrix, grid)]
        result = in_torch(_remapper(*size), picture, *placed, device=device)
    else:
        result = fn.warp_affine(
            picture, matrix=matrix, size=size, fill_value=0.0, interp_type=DALIInterpType.INTERP_LINEAR
        )
    return result


@do_not_convert
def _remapper(height: int, width: int) -> Any:
    def remap(picture: torch.Tensor, matrix: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """[h, w, 1] to [height, width, 1] through grid and affine map, bilinear, black outside."""
        nodes_y = torch.linspace(0, height, grid.shape[0], device=grid.device)
        nodes_x = torch.linspace(0, width, grid.shape[1], device=grid.device)
        nodes = torch.stack([nodes_x.expand(len(nodes_y), -1), nodes_y[:, None].expand(-1, len(nodes_x))], dim=-1)
        looks = (nodes + grid) @ matrix[:, :2].T + matrix[:, 2]
        looks = _interpolated(looks, height, width)
        rows, columns = picture.shape[:2]
        at_x, at_y = looks[..., 0] * (2 / columns) - 1, looks[..., 1] * (2 / rows) - 1
        at = torch.stack([at_x, at_y], dim=-1)[None]
        sampled = torch.nn.functional.grid_sample(picture[None, None, ..., 0], at, align_corners=False)
        return sampled[0, 0, ..., None]

    return remap


@do_not_convert
def _interpolated(table: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[n, n, 2] at evenly spaced nodes to [height, width, 2] at pixel centres, linear between the nodes."""
    weights = []
    for pixels, nodes in ((height, table.shape[0]), (width, table.shape[1])):
        at = (torch.arange(pixels, device=table.device) + 0.5) / pixels * (nodes - 1)
        weights.append((1 - (at[:, None] - torch.arange(nodes, device=table.device)).abs()).clamp(min=0))
    return torch.einsum("hn,nmc,wm->hwc", weights[0], table, weights[1])


def sharpen(picture: Any, numbers: Any, here: Any) -> Any:
    """Unsharp mask, clipped to [0, 1]."""
    if numbers[_AT["sharpen"]] > 0:
        soft = fn.gaussian_blur(picture, sigma=SHARPEN_SIGMA)
        result = math.clamp(picture + here[_AT["sharpen"]] * (picture - soft), 0.0, 1.0)
    else:
        result = picture
    return result


def add_noise(picture: Any, numbers: Any, here: Any, settings: PipelineSettings, device: str) -> Any:
    """A piece of the noise bank times `noise`, clipped to [0, 1]."""
    bank: Any = Constant(_bank(settings), device=device)
    size: Any = Constant([settings.height, settings.width])
    if numbers[_AT["noise"]] > 0:
        anchor = fn.cast(fn.stack(numbers[_AT["noise_y"]], numbers[_AT["noise_x"]]), dtype=DALIDataType.INT32)
        piece = fn.slice(bank, anchor, size, axes=(0, 1))
        result = math.clamp(picture + here[_AT["noise"]] * piece, 0.0, 1.0)
    else:
        result = picture
    return result


@do_not_convert
def _bank(settings: PipelineSettings) -> Any:
    return np.ascontiguousarray(noise_bank(settings.height, settings.width)[..., None])


def cut_holes(picture: Any, holes: Any) -> Any:
    """Rectangles made black."""
    corners, ends = holes[:, :2], holes[:, 2:]
    return fn.erase(
        picture, anchor=fn.reshape(corners, shape=[-1]), shape=fn.reshape(ends - corners, shape=[-1]), axes=(0, 1)
    )


def normalise(picture: Any, settings: PipelineSettings) -> Any:
    """(v - mean) / std, float32 CHW, with as many channels as asked for."""
    scaled = fn.crop_mirror_normalize(
        picture, mean=[settings.mean], std=[settings.std], dtype=DALIDataType.FLOAT, output_layout="CHW"
    )
    return fn.cat(*[scaled] * settings.channels, axis=0) if settings.channels > 1 else scaled
