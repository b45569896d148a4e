"""The steps of steps.py as DALI operators, for the GPU; they run on DALI's CPU backend too, which tests use.

Each operator costs the host about as long as the GPU, so there are few of them: what is arithmetic on arguments has
been done in feed.py, and a step is applied to every sample where one that changes nothing costs no more than telling
the samples apart. Where it does, an `if` on a sample's argument splits the batch (conditional execution).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math
from nvidia.dali.pipeline import Pipeline, do_not_convert
from nvidia.dali.types import Constant, DALIDataType, DALIInterpType

from dali_pipes.feed import Uses, to_bytes
from dali_pipes.settings import PipelineSettings
from dali_pipes.source import mirrored_places
from dali_pipes.steps import SHARPEN_SIGMA, noise_bank

Fed = Mapping[str, Any]  # the graph's inputs by the names of `feed.columns`, on the host


def all_steps(tile: Any, fed: Fed, uses: Uses, settings: PipelineSettings, device: str) -> Any:
    """Every step, in the order of steps.py.

    Args:
        tile: uint16 HWC on `device`.
        fed: the samples' arguments.
        uses: steps that no sample takes are left out.
        settings: of the pipeline.
        device: "gpu", or "cpu" for DALI's own CPU backend.

    Returns:
        float32 CHW on `device`.
    """
    values = fn.cast(tile, dtype=DALIDataType.FLOAT)
    if to_bytes(uses, settings):
        picture = ramp(values, fed, DALIDataType.UINT8)
    elif uses.tables:
        picture = by_table(values, fed, fed["by_table"], uses, settings, device)
    else:
        picture = by_curve(values, fed, uses, settings)
    if settings.clahe.enabled:
        picture = clahe(picture, fed, settings, device, uses.mirroring)
    if uses.tone:
        picture = tone(picture, fed, device)
    picture = fn.gaussian_blur(picture, sigma=fed["antialias"], window_size=fed["antialias_window"])
    if uses.grid:
        # Copied here: a copy of no sample, inside the branch, would have no dimensions.
        picture = warp(picture, fed["distorted"], fed["matrix"], placed(fed["nodes"], device), settings, device)
    else:
        picture = affine(picture, fed["matrix"], settings)
    if uses.blur:
        picture = fn.gaussian_blur(picture, sigma=fed["blur"], window_size=fed["blur_window"])
    if uses.sharpen:
        picture = sharpen(picture, fed, device)
    if uses.noise:
        picture = add_noise(picture, fed, settings, device)
    if uses.holes:
        picture = fn.erase(picture, anchor=fed["hole_at"], shape=fed["hole_size"], axes=(0, 1))
    return normalise(picture, settings)


@do_not_convert
def ramp(values: Any, fed: Fed, dtype: DALIDataType) -> Any:
    """scale * value + bias as float32; as bytes, where the scale is 255 times as large, rounded and clipped."""
    return fn.brightness_contrast(
        values, contrast=fed["scale"], contrast_center=0.0, brightness_shift=fed["bias"], dtype=dtype
    )


def by_table(values: Any, fed: Fed, chosen: Any, uses: Uses, settings: PipelineSettings, device: str) -> Any:
    """Tile values to grey in [0, 1], in bytes where CLAHE follows, where some samples have a table."""
    if chosen > 0:
        grey = clipped(in_torch(look_up, values, placed(fed["table"], device), device=device), settings)
    else:
        grey = by_curve(values, fed, uses, settings)
    return grey


def by_curve(values: Any, fed: Fed, uses: Uses, settings: PipelineSettings) -> Any:
    """The same of ramps, and of sigmoids where some samples have them."""
    u = ramp(values, fed, DALIDataType.FLOAT)
    return bent(u, fed["sigmoid"], settings) if uses.sigmoids else clipped(u, settings)


def bent(u: Any, sigmoid: Any, settings: PipelineSettings) -> Any:
    """The same of ramps and sigmoids, for which `feed` has made `u` the hyperbolic tangent's argument."""
    if sigmoid > 0:
        grey = fn.brightness_contrast(math.tanh(u), brightness_shift=0.5, **_bytes(0.5, settings))
    else:
        grey = clipped(u, settings)
    return grey


@do_not_convert
def clipped(grey: Any, settings: PipelineSettings) -> Any:
    """Clipped to [0, 1]; in bytes, rounded, where CLAHE follows."""
    return (
        fn.brightness_contrast(grey, **_bytes(1.0, settings)) if settings.clahe.enabled else math.clamp(grey, 0.0, 1.0)
    )


def _bytes(contrast: float, settings: PipelineSettings) -> dict[str, Any]:
    """Arguments of an operator that multiplies, and gives bytes where CLAHE follows."""
    if settings.clahe.enabled:
        return {"contrast": 255 * contrast, "contrast_center": 0.0, "dtype": DALIDataType.UINT8}
    return {"contrast": contrast, "contrast_center": 0.0, "dtype": DALIDataType.FLOAT}


@do_not_convert
def in_torch(function: Callable[..., torch.Tensor], *inputs: Any, device: str) -> Any:
    """A function of tensors, for what DALI has no operator for on both devices. Gives HWC.

    On a GPU it runs in a stream of its own: in torch's default one it would stand behind all that training has queued
    there, and the wait for its end, since DALI goes on in yet another stream, would be one for training's.
    """
    pipeline: Any = Pipeline.current()
    stream = torch.cuda.Stream(pipeline.device_id) if device == "gpu" else None
    # DALI copies the results in a stream of its own, which it has waited for before the next call.
    results: list[torch.Tensor] = []

    def run(*columns: Any) -> Any:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            results.clear()
            samples = zip(*columns, strict=True)
            results.extend(function(*map(torch.from_dlpack, sample)).contiguous() for sample in samples)
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


@do_not_convert
def clahe(levels: Any, fed: Fed, settings: PipelineSettings, device: str, mirroring: bool) -> Any:
    """Contrast-limited adaptive histogram equalisation of bytes, to [0, 1].

    OpenCV mirrors below and to the right what is missing to whole tiles; DALI's operator for the GPU cuts the last
    tiles short. It is given pictures that are mirrored already, here (`mirroring`) or by the source, and then gives
    OpenCV's result.
    """
    side = settings.clahe.grid
    whole = in_torch(_whole_tiles(side), levels, device=device) if mirroring else levels
    equalised = fn.clahe(whole, tiles_x=side, tiles_y=side, clip_limit=settings.clahe.clip_limit)
    cut: Any = fn.slice(equalised, start=[0, 0], shape=fed["size"], axes=(0, 1))
    return cut * (1 / 255)


@do_not_convert
def _whole_tiles(side: int) -> Callable[[torch.Tensor], torch.Tensor]:
    @cache
    def places(length: int, device: torch.device) -> torch.Tensor:
        return torch.from_numpy(mirrored_places(length, side)).to(device)

    def mirrored(levels: torch.Tensor) -> torch.Tensor:
        """`source.whole_tiles`, by kernels that wait for nothing."""
        height, width, _ = levels.shape
        if height % side == width % side == 0:
            return levels.clone()  # a result must not lie where DALI's own input does
        down, across = places(height, levels.device), places(width, levels.device)
        return levels.index_select(0, down).index_select(1, across)

    return mirrored


@do_not_convert
def tone(grey: Any, fed: Fed, device: str) -> Any:
    """contrast (v^gamma - 1/2) + 1/2 + brightness, clipped to [0, 1]."""
    raised = math.pow(grey, placed(fed["gamma"], device))
    toned = fn.brightness_contrast(
        raised, contrast=fed["contrast"], contrast_center=0.5, brightness_shift=fed["brightness"]
    )
    return math.clamp(toned, 0.0, 1.0)


@do_not_convert
def placed(value: Any, device: str) -> Any:
    """An argument where the pictures are, for arithmetic with them."""
    return value.gpu() if device == "gpu" else value


@do_not_convert
def affine(picture: Any, matrix: Any, settings: PipelineSettings) -> Any:
    """The one resampling, black outside."""
    size = (settings.height, settings.width)
    return fn.warp_affine(picture, matrix=matrix, size=size, fill_value=0.0, interp_type=DALIInterpType.INTERP_LINEAR)


def warp(picture: Any, distorted: Any, matrix: Any, nodes: Any, settings: PipelineSettings, device: str) -> Any:
    """The same where the grid distorts some samples too."""
    if distorted > 0:
        result = in_torch(_sampled, picture, lookup_map(nodes, settings), device=device)
    else:
        result = affine(picture, matrix, settings)
    return result


@do_not_convert
def lookup_map(nodes: Any, settings: PipelineSettings) -> Any:
    """From where the nodes look, [n, n, 2], to every output pixel, [H, W, 2]: linear interpolation, which a resize from
    the first node to the last one is."""
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


@do_not_convert
def sharpen(picture: Any, fed: Fed, device: str) -> Any:
    """Unsharp mask, clipped to [0, 1]."""
    soft = fn.gaussian_blur(picture, sigma=SHARPEN_SIGMA)
    return math.clamp(picture + placed(fed["sharpen"], device) * (picture - soft), 0.0, 1.0)


@do_not_convert
def add_noise(picture: Any, fed: Fed, settings: PipelineSettings, device: str) -> Any:
    """A piece of the noise bank times `noise`, clipped to [0, 1]."""
    bank: Any = Constant(_bank(settings), device=device)
    size: Any = Constant([settings.height, settings.width])
    piece = fn.slice(bank, fed["noise_at"], size, axes=(0, 1))
    return math.clamp(picture + placed(fed["noise"], device) * piece, 0.0, 1.0)


@do_not_convert
def _bank(settings: PipelineSettings) -> Any:
    return np.ascontiguousarray(noise_bank(settings.height, settings.width)[..., None])


def normalise(picture: Any, settings: PipelineSettings) -> Any:
    """(v - mean) / std, float32 CHW, with as many channels as asked for."""
    scaled = fn.crop_mirror_normalize(
        picture, mean=[settings.mean], std=[settings.std], dtype=DALIDataType.FLOAT, output_layout="CHW"
    )
    return fn.cat(*[scaled] * settings.channels, axis=0) if settings.channels > 1 else scaled
