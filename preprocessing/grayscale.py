"""The standard's grayscale maths: stored values to tile values, and a manifest row's windows in tile units.

DICOM shows a stored value s through the Modality LUT x = slope·s + intercept (PS3.3 C.11.1), a VOI transformation of x
(C.11.2), and for MONOCHROME1 the inversion of the result (C.7.6.3.1.2). A tile keeps t = s - offset, turned where
`inverted`; since every step up to the window's own curve is linear, a window in x is a window in t with other ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from preprocessing.decode import Decoded

Row = Mapping[str, Any] | pd.Series
_NARROWEST = (
    1e-3  # tile units: a LINEAR window of width 1 is a step, and a ramp this steep between whole numbers is one
)


class TileWindow(NamedTuple):
    """A VOI window over tile values: with u = (t - low) / (high - low), grey is u clipped to [0, 1], or
    1 / (1 + exp(-4 (u - 1/2))) where `sigmoid`. high > low."""

    low: float
    high: float
    sigmoid: bool = False


def to_tile_values(decoded: Decoded, inverted: bool) -> NDArray[np.uint16]:
    """Tile values, uint16 [rows, columns] in 0 … 2^bits_stored - 1: unsigned, bright is dense, padding is 0.

    They are the decoded array itself where nothing is to be changed.

    Args:
        decoded: a picture.
        inverted: turn it: `is_inverted` says so, or its CSV says that it is a negative.
    """
    header = decoded.header
    stored = decoded.stored
    values = stored.astype(np.uint16, copy=False)  # two's complement wraps, and the offset wraps back
    if header.value_offset:
        values = values - np.uint16(header.value_offset & 0xFFFF)
    if inverted:
        values = np.uint16(2**header.bits_stored - 1) - values
    if header.padding:
        low, high = min(header.padding), max(header.padding)
        values = np.where((stored >= low) & (stored <= high), np.uint16(0), values)
    return values


def is_inverted(photometric: str, rescale_slope: float) -> bool:
    """Whether larger stored values are darker: MONOCHROME1, or a negative slope, but not both."""
    return (photometric == "MONOCHROME1") != (rescale_slope < 0)


def tile_windows(row: Row) -> list[TileWindow]:
    """A manifest row's VOI windows in tile units, in the file's order.

    One ramp over the breast's percentiles where the file has neither windows nor a VOI LUT; none where it has only a
    VOI LUT (`tile_voi_lut`).
    """
    windows = [
        _window(row, float(center), float(width), str(function))
        for center, width, function in zip(
            row["window_center"], row["window_width"], row["window_function"], strict=True
        )
    ]
    if windows or len(row["voi_lut"]):
        return windows
    low = float(row["percentile_low"])
    return [TileWindow(low, max(float(row["percentile_high"]), low + 1))]


def tile_voi_lut(row: Row) -> NDArray[np.float32] | None:
    """A manifest row's VOI LUT (PS3.3 C.11.2.1.1) as grey in [0, 1] over tile values, float32 [2^bits_stored]; None
    where the file has none. Values outside its input range take its first or last entry."""
    lut = np.asarray(row["voi_lut"], np.float32)
    if not lut.size:
        return None
    top = 2 ** int(row["bits_stored"]) - 1
    tile = np.arange(top + 1)
    stored = (top - tile if row["inverted"] else tile) + int(row["value_offset"])
    modality = stored * float(row["rescale_slope"]) + float(row["rescale_intercept"])
    index = np.clip(np.floor(modality - float(row["voi_lut_first"])), 0, lut.size - 1).astype(np.int64)
    grey = np.clip(lut[index] / np.float32(2 ** int(row["voi_lut_bits"]) - 1), 0, 1)
    # A tile that is turned for its negative slope alone is shown by the LUT as it is.
    return 1 - grey if bool(row["inverted"]) != (float(row["rescale_slope"]) < 0) else grey


def _window(row: Row, center: float, width: float, function: str) -> TileWindow:
    """One window: its ends in modality units, in stored values, in tile values."""
    if function == "LINEAR":  # C.11.2.1.2.1: between c - 0.5 ± (w - 1) / 2
        center, width = center - 0.5, width - 1
    # C.11.2.1.3.1 SIGMOID and C.11.2.1.3.2 LINEAR_EXACT: between c ± w / 2
    slope, intercept = float(row["rescale_slope"]), float(row["rescale_intercept"])
    ends = sorted((end - intercept) / slope for end in (center - width / 2, center + width / 2))
    low, high = (end - int(row["value_offset"]) for end in ends)
    if row["inverted"]:
        top = 2 ** int(row["bits_stored"]) - 1
        low, high = top - high, top - low
    return TileWindow(low, max(high, low + _NARROWEST), function == "SIGMOID")
