"""Where the breast is in a picture.

The search runs on a copy of at most 512 pixels a side and errs on the side of keeping: a crop that keeps some
background costs a little resolution, one that cuts the breast costs a cancer. Its steps:
1. Strips along the picture's edges (collimator, padding, noise) are set aside, where a whole line jumps at once.
2. The background is a plane that much of the picture lies on, with all else on one side of it: the bright side, or the
   dark one in a negative that does not say so. Where there is none, the breast fills the picture and nothing is cut.
3. What stands out of that plane by more than its noise is breast or label. Opening takes off text and lines; the
   largest piece is the breast, with others of its size; rectangles are label plates.
4. Where the breast reaches a strip, the box goes on to the picture's edge.
docs/crop.md has what it keeps and drops.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]

_SIDE = 512  # longest side of the copy that is searched
_STRIP_SHARE = 0.10  # of a side, that a strip along an edge takes at most
_LINE_SHARE = 0.6  # of a line's pixels, that jump together where a strip ends
_SMALLEST_SHARE = 0.01  # a mask below this share of the picture is no breast
_PART_SHARE = 0.08  # pieces above this share of the largest one may belong to the breast too
_PLATE_FILL = 0.93  # share of its bounding box that a label plate fills
_TOLERANCE = 0.02  # distance from the background's plane, as a share of the picture's range
_PROPOSALS = 400  # planes that are tried
_LOOKED_AT = 2000  # pixels that each is tried on
_SMALLEST_BACKGROUND = 0.02  # share of the picture
_FAINT_REACH = 25  # pixels of the copy that the mask grows into what is fainter


@dataclass(frozen=True)
class Crop:
    """A box in source pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of the box in a picture."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


@dataclass(frozen=True)
class Breast:
    """What `find_breast` found.

    Attributes:
        crop: the box around the breast, with its margin, in source pixels.
        mask: where the breast is, bool, on a copy of the picture of at most 512 pixels a side.
    """

    crop: Crop
    mask: Mask


def find_breast(picture: NDArray[np.uint16], margin: float = 0.01) -> Breast:
    """The box around the breast.

    Args:
        picture: tile values, uint16 [rows, columns], bright is dense.
        margin: added on each side, as a share of the picture's longest side.

    Returns:
        The box and the mask that it was taken from. Where no breast stands out from a background, both are the whole
        picture.
    """
    rows, columns = picture.shape
    small = _small(picture)
    field = _field(small)
    inside = _tissue(small[field])
    mask = np.ones(small.shape, bool)
    if inside is not None and inside.mean() >= _SMALLEST_SHARE:
        mask[...] = False
        mask[field] = inside
        mask = _reach_over_strips(mask, field)
    return Breast(_box(mask, rows, columns, margin), mask)


def _small(picture: NDArray[np.uint16]) -> Image:
    """The copy that is searched. Halving first is ten times as fast as one reduction by a fraction; a last odd row or
    column is left out."""
    rows, columns = picture.shape
    scale = min(1.0, _SIDE / max(rows, columns))
    size = (max(1, round(columns * scale)), max(1, round(rows * scale)))
    while min(picture.shape) > 1 and max(picture.shape) >= 2 * _SIDE:
        half = picture.shape[0] // 2, picture.shape[1] // 2
        even = picture[: 2 * half[0], : 2 * half[1]]
        picture = np.asarray(cv2.resize(even, half[::-1], interpolation=cv2.INTER_AREA), np.uint16)
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA).astype(np.float32)


def _field(small: Image) -> tuple[slice, slice]:
    """The picture without the strips along its edges."""
    spread = _spread(small)
    top, bottom = _strip(small, spread), _strip(small[::-1], spread)
    left, right = _strip(small.T, spread), _strip(small.T[::-1], spread)
    return slice(top, small.shape[0] - bottom), slice(left, small.shape[1] - right)


def _spread(values: Image) -> float:
    """The range of values without their extremes."""
    return float(np.subtract(*np.percentile(values[::2, ::2], (99.5, 0.5))))


def _strip(lines: Image, spread: float) -> int:
    """How many of the first lines are a strip: up to the last place where most of a line jumps at once.

    Anatomy has no edge that is straight, parallel to the picture's and as long as it; the skin crosses a line at few
    places, the chest wall lies beyond the picture. Where lines are noise, they jump everywhere: the place where that
    stops ends the strip.
    """
    count = int(len(lines) * _STRIP_SHARE)
    if count < 1 or spread <= 0:
        return 0
    steps = np.abs(np.diff(lines[: count + 2], axis=0))
    jumps = np.flatnonzero((steps > 0.04 * spread).mean(axis=1) > _LINE_SHARE)
    return int(jumps[-1]) + 1 if len(jumps) and jumps[-1] < count else 0


def _tissue(field: Image) -> Mask | None:
    """What stands out of the background and is no label, or None where there is no background."""
    spread = _spread(field)
    found = _background(field, spread) if spread > 0 else None
    if found is None:
        return None
    background, turned = found
    above = background - field if turned else field - background
    sample = above[::2, ::2]
    level = sample[np.abs(sample) < _TOLERANCE * spread]
    noise = 1.4826 * float(np.median(np.abs(level))) if level.size else 0.0
    reach = float(np.percentile(sample, 99.5))
    seed = above > max(4 * noise, 0.03 * reach)
    edge = above > max(3 * noise, 0.004 * reach)  # a nipple on film can be as faint
    return _pieces(_opened(seed), edge)


def _background(field: Image, spread: float) -> tuple[Image, bool] | None:
    """The plane that most of the picture lies on, with little on its other side; whether tissue is below it.

    Random triples of pixels of the rim propose planes (RANSAC, Fischler and Bolles 1981). Fat and implants can be as
    even as a background, but there is something darker and something brighter than they are: each share on the lesser
    side counts ten times against a plane.
    """
    rows, columns = field.shape
    rng = np.random.Generator(np.random.Philox(0))
    rim = _rim(rows, columns)
    corners = rim[rng.integers(len(rim), size=(_PROPOSALS, 3))]
    terms = np.insert(corners / (rows, columns), 0, 1, axis=2)
    terms = terms[np.abs(np.linalg.det(terms)) > 0.02]
    heights = field[tuple((terms[..., 1:] * (rows, columns) + 0.5).astype(int).transpose(2, 0, 1))]
    tilted = np.linalg.solve(terms, heights[..., None].astype(np.float64))[..., 0]
    level = field[tuple(rim[rng.integers(len(rim), size=_PROPOSALS // 4)].T)]  # most backgrounds are
    planes = np.concatenate([tilted, np.pad(level[:, None].astype(np.float64), ((0, 0), (0, 2)))])
    step = max(1, int(np.sqrt(rows * columns / _LOOKED_AT)))
    y, x = (grid.ravel() for grid in np.mgrid[0:rows:step, 0:columns:step])
    places = np.stack([np.ones(len(y)), y / rows, x / columns], axis=1)
    values = field[y, x]
    rest = values - planes.astype(np.float32) @ places.T.astype(np.float32)
    tolerance = _TOLERANCE * spread
    count = np.float64(len(values))
    brighter = np.count_nonzero(rest > tolerance, axis=1) / count
    darker = np.count_nonzero(rest < -tolerance, axis=1) / count
    scores = 1 - brighter - darker - 10 * np.minimum(brighter, darker)
    best = int(np.argmax(scores))
    if scores[best] < _SMALLEST_BACKGROUND:
        return None
    plane = planes[best]
    for _ in range(2):
        near = np.abs(values - places @ plane) < tolerance
        if near.sum() < 64:
            break
        plane = np.linalg.lstsq(places[near], values[near].astype(np.float64), rcond=None)[0]
    height = plane[0] + plane[1] * np.arange(rows)[:, None] / rows + plane[2] * np.arange(columns) / columns
    return height.astype(np.float32), bool(darker[best] > brighter[best])


def _rim(rows: int, columns: int) -> NDArray[np.intp]:
    """Row and column of every pixel near the edges, [N, 2]."""
    depth = max(1, min(rows, columns) // 50)
    rim = np.ones((rows, columns), bool)
    rim[depth:-depth, depth:-depth] = False
    return np.argwhere(rim)


def _opened(mask: Mask) -> Mask:
    """Without text, thin lines and specks; what remains keeps its full outline."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7))
    # Replicated borders: the chest wall touches the picture's edge and must not be eroded from there.
    core = cv2.erode(mask.astype(np.uint8), kernel, borderType=cv2.BORDER_REPLICATE)
    grown = cv2.dilate(core, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (11, 11)))
    return (grown > 0) & mask


def _pieces(mask: Mask, edge: Mask) -> Mask:
    """The largest piece, others of its size that are no plates, and around them what of `edge` is connected."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if count <= 1:
        return np.zeros_like(mask)
    areas = stats[1:, cv2.CC_STAT_AREA]
    fill = areas / (stats[1:, cv2.CC_STAT_WIDTH] * stats[1:, cv2.CC_STAT_HEIGHT])
    plates = (fill > _PLATE_FILL) & (areas < 0.1 * mask.size)
    tissue = ~plates if not plates.all() else plates
    largest = areas[tissue].max()
    wanted = 1 + np.flatnonzero(tissue & (areas >= _PART_SHARE * largest))
    found = np.isin(labels, wanted)
    near = cv2.distanceTransform((~found).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5) <= _FAINT_REACH
    clean = cv2.morphologyEx(edge.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    around = np.asarray(clean, bool) & near
    _, labels = cv2.connectedComponents((around | found).astype(np.uint8))
    return np.isin(labels, labels[found])


def _reach_over_strips(mask: Mask, field: tuple[slice, slice]) -> Mask:
    """The breast's outermost line in the field repeated over each strip."""
    (top, bottom), (left, right) = ((part.start, part.stop) for part in field)
    mask[:top], mask[bottom:] = mask[top], mask[bottom - 1]
    mask[:, :left], mask[:, right:] = mask[:, left : left + 1], mask[:, right - 1 : right]
    return mask


def _box(mask: Mask, rows: int, columns: int, margin: float) -> Crop:
    extra = margin * max(rows, columns)
    top, bottom = _span(np.flatnonzero(mask.any(axis=1)), rows / mask.shape[0], rows, extra)
    left, right = _span(np.flatnonzero(mask.any(axis=0)), columns / mask.shape[1], columns, extra)
    return Crop(top, left, bottom - top, right - left)


def _span(where: NDArray[np.intp], scale: float, length: int, extra: float) -> tuple[int, int]:
    """First and one past the last source pixel of an axis, margin included."""
    first = int(np.floor(where[0] * scale - extra))
    last = int(np.ceil((where[-1] + 1) * scale + extra))
    return max(0, first), min(length, last)
