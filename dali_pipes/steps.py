"""Each step of the pipeline on one sample, on the CPU with OpenCV; operators.py has the same steps for a GPU.

The order, and why:
    window    tile values to grey in [0, 1]
    CLAHE     on the level as it was cropped, before the warp: its tiles then cover the same tissue whatever the size,
              the padding or the rotation of the output, and it works on no more pixels than the picture has; of a
              patch, on the region that is read for it, whose tiles lie elsewhere in each draw
    tone      brightness, contrast, gamma: pointwise, so on the host a table, and before the warp pads with black
    low-pass  where the warp shrinks
    warp      mirror, fit, flips, rotation, scale, shift and grid distortion in one resampling; outside is black
    blur, sharpen, noise, holes   in output pixels
What is left, normalisation and channels, DALI does on both devices (operators.py).

Pictures are 2-D arrays. `numbers` maps the names of `source.NUMBERS` to floats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dali_pipes.settings import ClaheSettings, PipelineSettings
from dali_pipes.source import NOISE_PLACES, NUMBERS

Grey = NDArray[Any]  # float32 [height, width] in [0, 1]
Numbers = Mapping[Any, float]

_VALUES = 1 << 16
_BYTES = np.arange(256, dtype=np.float32) / 255
SHARPEN_SIGMA = 1.0  # of the unsharp mask, in output pixels


class HostSteps:
    """All steps on the host: from a decoded tile and its arguments to a finished picture.

    Args:
        settings: of the pipeline.
    """

    def __init__(self, settings: PipelineSettings) -> None:
        self._settings = settings

    @cached_property
    def _bank(self) -> Grey:
        return noise_bank(self._settings.height, self._settings.width)

    def __call__(
        self,
        tile: NDArray[np.uint16],
        numbers: NDArray[np.float32],
        matrix: NDArray[np.float32],
        table: Grey,
        grid: NDArray[np.float32],
        holes: NDArray[np.float32],
    ) -> Grey:
        """One sample, arguments as in `source.Sample`; tile [rows, columns, 1]. Gives float32 [H, W, 1] in [0, 1]."""
        settings = self._settings
        named = dict(zip(NUMBERS, numbers.tolist(), strict=True))
        values = tile.reshape(tile.shape[:2])
        grey = window_table(named, table, int(values.max()) + 1)
        if settings.clahe.enabled:
            equalised = clahe(look_up(values, to_bytes(grey)), settings.clahe)
            picture = cv2.LUT(equalised, tone(_BYTES, named))
        else:
            picture = look_up(values, tone(grey, named))
        picture = warp(blur(picture, named["antialias"]), matrix, settings.height, settings.width, grid, named)
        picture = sharpen(blur(picture, named["blur"]), named["sharpen"])
        return cut_holes(add_noise(picture, self._bank, named), holes)[..., None]


def window_table(numbers: Numbers, table: Grey, length: int = _VALUES) -> Grey:
    """Grey in [0, 1] of the tile values below `length`, float32: LINEAR, LINEAR_EXACT, SIGMOID (PS3.3 C.11.2.1) or a
    VOI LUT (PS3.3 C.11.1), whose last entry holds for all values above it."""
    if numbers["table"]:
        return np.concatenate([table[:length], np.full(max(0, length - len(table)), table[-1], np.float32)])
    u = np.arange(length, dtype=np.float32)
    u *= np.float32(numbers["scale"])
    u += np.float32(numbers["bias"])
    if numbers["sigmoid"]:
        with np.errstate(over="ignore"):  # exp overflows to infinity, and grey to 0, as it should
            return 1 / (1 + np.exp(-4 * (u - np.float32(0.5))))
    return np.clip(u, 0, 1, out=u)


def look_up(values: NDArray[np.uint16], table: NDArray[Any]) -> NDArray[Any]:
    """The table's entries at the values, all of which it covers; OpenCV wants one for each 16-bit value there could be,
    and working out those alone that occur takes a tenth of the time for 12-bit pictures."""
    whole = np.zeros(_VALUES, table.dtype)
    whole[: len(table)] = table
    return cv2.LUT(values, whole)


def to_bytes(grey: Grey) -> NDArray[Any]:
    """Grey in [0, 1] as 8 bits, rounded."""
    return (grey * np.float32(255) + np.float32(0.5)).astype(np.uint8)


def clahe(picture: NDArray[Any], settings: ClaheSettings) -> NDArray[Any]:
    """Contrast-limited adaptive histogram equalisation (Zuiderveld 1994), uint8 to uint8.

    8 bits are the only form, by measurement on 512-pixel levels, one thread, all in turns. The same tables read between
    their 256 entries (grey not rounded before) give 41,000 levels instead of 247, but values that differ by 0.54 / 255
    in the mean and 2.3 / 255 at most, for 20 times the time (12 ms against 0.6), more than all steps of a sample
    together. OpenCV on uint16 takes 25 times the time and is another operation: a tile has fewer pixels than the 65536
    bins that the limit is spread over, so that limits of 0.5 to 20 give equal pictures
    (5.2 / 255 in the mean, 49 at most).
    """
    return cv2.createCLAHE(settings.clip_limit, (settings.grid, settings.grid)).apply(picture)


def tone(grey: Grey, numbers: Numbers) -> Grey:
    """contrast (v^gamma - 1/2) + 1/2 + brightness, clipped to [0, 1]."""
    gamma, contrast, brightness = numbers["gamma"], numbers["contrast"], numbers["brightness"]
    if (gamma, contrast, brightness) == (1, 1, 0):
        return grey
    raised = np.power(grey, np.float32(gamma)) if gamma != 1 else grey
    return np.clip(raised * np.float32(contrast) + np.float32(0.5 - 0.5 * contrast + brightness), 0, 1)


def warp(
    picture: Grey, matrix: NDArray[np.float32], height: int, width: int, grid: NDArray[np.float32], numbers: Numbers
) -> Grey:
    """The one resampling, bilinear: float32 [height, width]. Without distortion an affine map alone.

    Args:
        matrix: [2, 3], from output to level coordinates; pixel i covers [i, i + 1).
        grid: [n, n, 2], shifts (x, y) of the grid's nodes in output pixels, interpolated linearly between them. They
            displace where an output pixel looks before the affine map takes it to the level.
    """
    inverse = matrix.astype(np.float64)
    # OpenCV counts from pixel centres.
    inverse[:, 2] += inverse[:, :2].sum(axis=1) * 0.5 - 0.5
    moved = float(np.abs(grid).max()) if numbers["grid"] else 0.0
    top, left, bottom, right = covered_part(inverse, picture.shape, height, width, moved)
    warped = np.zeros((height, width), np.float32)
    part = warped[top:bottom, left:right]
    if not part.size:
        return warped
    inverse[:, 2] += inverse[:, :2] @ (left, top)
    if not numbers["grid"]:
        size, how = (right - left, bottom - top), cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        cv2.warpAffine(picture, inverse, size, dst=part, flags=how, borderValue=0.0)
    else:
        x, y = lookup_maps(inverse, grid, height, width, (top, left, bottom, right))
        cv2.remap(picture, x, y, cv2.INTER_LINEAR, dst=part, borderValue=0.0)
    return warped


def covered_part(
    matrix: NDArray[np.float64], shape: tuple[int, ...], height: int, width: int, moved: float
) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of the output's part outside which nothing of the level lies.

    A breast's crop is narrow: working out that part alone takes a third off the warp's time.

    Args:
        matrix: [2, 3], from output to level in OpenCV's coordinates.
        shape: rows and columns of the level.
        moved: most output pixels that a distortion displaces by.
    """
    rows, columns = shape
    x = np.array([-1, columns, -1, columns], np.float64) - matrix[0, 2]
    y = np.array([-1, -1, rows, rows], np.float64) - matrix[1, 2]
    (a, b), (c, d) = matrix[:, :2].tolist()
    scale = 1 / (a * d - b * c)
    across, down = (d * x - b * y) * scale, (a * y - c * x) * scale
    margin = moved + 1
    ends = [
        (max(math.floor(at.min() - margin), 0), min(math.ceil(at.max() + margin) + 1, side))
        for at, side in ((down, height), (across, width))
    ]
    (top, bottom), (left, right) = ends
    return top, left, bottom, right


def lookup_maps(
    matrix: NDArray[np.float64],
    grid: NDArray[np.float32],
    height: int,
    width: int,
    part: tuple[int, int, int, int],
) -> tuple[Grey, Grey]:
    """Where each output pixel of a part (top, left, bottom, right) looks, x and y in OpenCV's coordinates, float32 each
    of the part's size.

    The affine map is worked out at the grid's displaced nodes alone: linear interpolation between them gives it
    everywhere, since it is linear itself.
    """
    top, left, bottom, right = part
    rows, columns = grid.shape[:2]
    y, x = np.meshgrid(np.linspace(0, height, rows) - 0.5, np.linspace(0, width, columns) - 0.5, indexing="ij")
    looks = (np.stack([x - left, y - top], axis=-1) + grid) @ matrix[:, :2].T + matrix[:, 2]
    across = _between(width, columns)[left:right]
    found = [_down((looks[..., axis] @ across.T).astype(np.float32), height, top, bottom) for axis in (0, 1)]
    return found[0], found[1]


def blur(picture: Grey, sigma: float) -> Grey:
    """A Gaussian of `sigma` pixels, 0 for none."""
    return _gaussian(picture, sigma) if sigma > 0 else picture


def sharpen(picture: Grey, amount: float) -> Grey:
    """Unsharp mask: v + amount (v - Gaussian(v)), clipped to [0, 1]."""
    if amount <= 0:
        return picture
    sharpened = cv2.addWeighted(picture, 1 + amount, _gaussian(picture, SHARPEN_SIGMA), -amount, 0)
    return np.clip(sharpened, 0, 1, out=sharpened)


def add_noise(picture: Grey, bank: Grey, numbers: Numbers) -> Grey:
    """Gaussian noise of standard deviation `noise`, a piece of the bank, clipped to [0, 1]."""
    sigma = numbers["noise"]
    if sigma <= 0:
        return picture
    height, width = picture.shape
    top, left = (int(numbers[name]) for name in ("noise_y", "noise_x"))
    noisy = cv2.scaleAdd(bank[top : top + height, left : left + width], sigma, picture)
    return np.clip(noisy, 0, 1, out=noisy)


def cut_holes(picture: Grey, holes: NDArray[np.float32]) -> Grey:
    """Rectangles (top, left, bottom, right in output pixels) made black, in place."""
    for top, left, bottom, right in holes.astype(int).tolist():
        picture[top:bottom, left:right] = 0
    return picture


def noise_bank(height: int, width: int) -> Grey:
    """Standard normal numbers, the same always, larger than a picture: a sample's noise is a piece of them, which
    costs a tenth of drawing it anew."""
    rng = np.random.Generator(np.random.Philox(key=[0x6D616D6D, 0]))
    return rng.standard_normal((height + NOISE_PLACES, width + NOISE_PLACES), np.float32)


def _gaussian(picture: Grey, sigma: float) -> Any:
    taps = 2 * math.ceil(3 * sigma) + 1  # three standard deviations to either side, as DALI takes
    return cv2.GaussianBlur(picture, (taps, taps), sigma, borderType=cv2.BORDER_REFLECT_101)


def _down(nodes: Grey, height: int, top: int, bottom: int) -> Grey:
    """Rows `top` to `bottom` of `height`, linear between evenly spaced ones: float32 [n, w] to [rows, w].

    Cell by cell and not as one matrix product, for which BLAS wakes a thread on every core that then spins for a while.
    """
    cells = len(nodes) - 1
    at = (np.arange(top, bottom, dtype=np.float32) + np.float32(0.5)) * np.float32(cells / height)
    ends = np.searchsorted(at, np.arange(cells + 1))
    result = np.empty((bottom - top, nodes.shape[1]), np.float32)
    for cell in range(cells):
        rows = slice(ends[cell], ends[cell + 1])
        np.multiply((at[rows] - np.float32(cell))[:, None], nodes[cell + 1] - nodes[cell], out=result[rows])
        result[rows] += nodes[cell]
    return result


@lru_cache(16)
def _between(pixels: int, nodes: int) -> NDArray[np.float32]:
    """Weights of linear interpolation from evenly spaced nodes to pixel centres, float32 [pixels, nodes]."""
    at = (np.arange(pixels) + 0.5) / pixels * (nodes - 1)
    return np.clip(1 - np.abs(at[:, None] - np.arange(nodes)), 0, None).astype(np.float32)
