"""Where the breast is in a picture.

The search runs on a copy of at most 512 pixels a side and errs on the side of keeping: a crop that keeps some
background costs a little resolution, one that cuts the breast costs a cancer.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

_SIDE = 512  # longest side of the copy that is searched
_SMALLEST_SHARE = 0.02  # a mask below this share of the picture is no breast
_PART_SHARE = 0.08  # pieces above this share of the largest one belong to the breast too


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
    mask: NDArray[np.bool_]


def find_breast(picture: NDArray[np.uint16], margin: float = 0.01) -> Breast:
    """The box around the breast.

    Args:
        picture: tile values, uint16 [rows, columns], bright is dense.
        margin: added on each side, as a share of the picture's longest side.

    Returns:
        The box and the mask that it was taken from. Where no breast stands out from the background, the box is the
        whole picture.
    """
    rows, columns = picture.shape
    scale = min(1.0, _SIDE / max(rows, columns))
    size = (max(1, round(columns * scale)), max(1, round(rows * scale)))
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    mask = _largest_parts(_opened(small > _threshold(small)))
    if mask.mean() < _SMALLEST_SHARE:
        return Breast(Crop(0, 0, rows, columns), np.ones_like(mask))
    return Breast(_box(mask, rows, columns, margin), mask)


def _threshold(small: NDArray[np.float32]) -> float:
    """A value between the background and the skin.

    Otsu's threshold parts background from tissue; the background's own level and noise are taken from what lies
    below it, and the threshold goes as low as that noise allows, for skin is far darker than parenchyma.
    """
    low, high = np.percentile(small, (0.5, 99.5))
    if high <= low:
        return float(high)
    scaled = np.clip((small - low) / (high - low) * 255, 0, 255).astype(np.uint8)
    otsu, _ = cv2.threshold(scaled, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    background = small[scaled <= otsu]
    level = float(np.median(background))
    noise = 1.4826 * float(np.median(np.abs(background - level)))
    split = low + (otsu + 1) / 255 * (high - low)
    return min(float(split), level + max(4 * noise, 0.03 * (high - low)))


def _opened(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Without text, thin frames and specks; what remains keeps its full outline."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7))
    # Replicated borders: the chest wall touches the picture's edge and must not be eroded from there.
    core = cv2.erode(mask.astype(np.uint8), kernel, borderType=cv2.BORDER_REPLICATE)
    grown = cv2.dilate(core, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (15, 15)))
    return (grown > 0) & mask


def _largest_parts(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if count <= 1:
        return np.zeros_like(mask)
    areas = stats[1:, cv2.CC_STAT_AREA]
    wanted = 1 + np.flatnonzero(areas >= _PART_SHARE * areas.max())
    return np.isin(labels, wanted)


def _box(mask: NDArray[np.bool_], rows: int, columns: int, margin: float) -> Crop:
    extra = margin * max(rows, columns)
    top, bottom = _span(np.flatnonzero(mask.any(axis=1)), rows / mask.shape[0], rows, extra)
    left, right = _span(np.flatnonzero(mask.any(axis=0)), columns / mask.shape[1], columns, extra)
    return Crop(top, left, bottom - top, right - left)


def _span(where: NDArray[np.intp], scale: float, length: int, extra: float) -> tuple[int, int]:
    """First and one past the last source pixel of an axis, margin included."""
    first = int(np.floor(where[0] * scale - extra))
    last = int(np.ceil((where[-1] + 1) * scale + extra))
    return max(0, first), min(length, last)
