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
from nvidia.dali.pipeline import Pipeline, do_not_convert
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
        picture = clahe(picture, numbers, settings, device)
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
    """A function of tensors, for what DALI has no operator for on both devices. Gives HWC.

    On a GPU it runs in a stream of its own: in torch's default one it would stand behind all that training has queued
    there, and the wait for its end, since DALI goes on in yet another stream, would be one for training's.
    """
    pipeline: Any = Pipeline.current()
    stream = torch.cuda.Stream(pipeline.device_id) if device == "gpu" else None

    def run(*columns: Any) -> Any:
        with torch.cuda.stream(stream):
            samples = zip(*columns, strict=True)
            results = [function(*map(torch.from_dlpack, sample)).contiguous() for sample in samples]
        if stream is not None:
            stream.synchronize()
        return [result.__dlpack__() for result in results]

    return fn.dl_tensor_python_function(
        *inputs, function=run, batch_processing=True, device=device, output_layouts="HWC"
    )


@do_not_convert
def look_up(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """A table's entries at whole values; its last one above it."""
    return table[values.long().clamp(max=table.shape[0] - 1)]


def clahe(grey: Any, numbers: Any, settings: PipelineSettings, device: str) -> Any:
    """Contrast-limited adaptive histogram equalisation on 8 bits, back to [0, 1].

    OpenCV mirrors below and to the right what is missing to whole tiles; DALI's operator for the GPU cuts the last
    tiles short. It is given pictures that are mirrored already, and then gives OpenCV's result.
    """
    side = settings.clahe.grid
    levels = fn.cast(math.floor(grey * 255.0 + 0.5), dtype=DALIDataType.UINT8)
    whole = in_torch(_whole_tiles(side), levels, device=device)
    equalised = fn.clahe(whole, tiles_x=side, tiles_y=side, clip_limit=settings.clahe.clip_limit)
    size = fn.cast(numbers[_AT["rows"] : _AT["columns"] + 1], dtype=DALIDataType.INT32)
    values: Any = fn.cast(fn.slice(equalised, start=[0, 0], shape=size, axes=(0, 1)), dtype=DALIDataType.FLOAT)
    return values * (1 / 255)


@do_not_convert
def _whole_tiles(side: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def mirrored(levels: torch.Tensor) -> torch.Tensor:
        """[h, w, 1] with sides that `side` divides, mirrored about the last row and column, as OpenCV's CLAHE does: by
        a whole `side` more along one axis where the other alone is short."""
        if not any(length % side for length in levels.shape[:2]):
            return levels.clone()  # a result must not lie where DALI's own input does
        for axis in (0, 1):
            length = levels.shape[axis]
            more = side - length % side
            if length > more:
                end = levels.narrow(axis, length - 1 - more, more).flip(axis)
            else:  # mirrored to and fro
                back = np.pad(np.arange(length), (0, more), mode="reflect" if length > 1 else "edge")[length:]
                end = levels.index_select(axis, torch.from_numpy(back).to(levels.device))
            levels = torch.cat([levels, end], axis)
        return levels

    return mirrored


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
    nodes = lookup_nodes(numbers, matrix, grid, settings)
    placed = nodes.gpu() if device == "gpu" else nodes  # here: a copy of no sample, in the branch, has no dimensions
    if numbers[_AT["grid"]] > 0:
        result = in_torch(_sampled, picture, lookup_map(placed, settings), device=device)
    else:
        result = fn.warp_affine(
            picture, matrix=matrix, size=size, fill_value=0.0, interp_type=DALIInterpType.INTERP_LINEAR
        )
    return result


@do_not_convert
def lookup_nodes(numbers: Any, matrix: Any, grid: Any, settings: PipelineSettings) -> Any:
    """Where the distorted grid's nodes look, [n, n, 2] (x, y), with the level's edges at -1 and 1: the affine map of
    their displaced places."""
    n = settings.augment.grid_steps + 1
    at_y, at_x = (np.linspace(0, side, n, dtype=np.float32) for side in (settings.height, settings.width))
    nodes: Any = Constant(np.stack(np.broadcast_arrays(at_x, at_y[:, None]), axis=-1), device="cpu")
    looks: Any = fn.coord_transform(fn.reshape(nodes + grid, shape=[n * n, 2]), MT=matrix)
    size: Any = fn.stack(numbers[_AT["columns"]], numbers[_AT["rows"]])
    return fn.reshape(looks * (2.0 / size) - 1.0, shape=[n, n, 2], layout="HWC")


@do_not_convert
def lookup_map(nodes: Any, settings: PipelineSettings) -> Any:
    """The same of every output pixel, [H, W, 2]: linear interpolation, which a resize from the first node to the last
    one is."""
    last = settings.augment.grid_steps + 0.5
    return fn.resize(
        nodes,
        size=(settings.height, settings.width),
        roi_start=[0.5, 0.5],
        roi_end=[last, last],
        interp_type=DALIInterpType.INTERP_LINEAR,
        antialias=False,
    )


@do_not_convert
def _sampled(picture: torch.Tensor, looks: torch.Tensor) -> torch.Tensor:
    """[h, w, 1] read where `looks` [H, W, 2] says, bilinear, black outside: [H, W, 1]."""
    sampled = torch.nn.functional.grid_sample(picture[None, None, ..., 0], looks[None], align_corners=False)
    return sampled[0, 0, ..., None]


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
