"""The standard's grayscale maths: stored values to tile values, and VOI windows and LUTs in tile units.

PS3.3 C.7.6.3 (stored values), C.11.1 (Modality LUT), C.11.2 (VOI LUT), C.7.6.3.1.2 (photometric interpretation).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

    from preprocessing.decode import Decoded

    Row = Mapping[str, Any] | pd.Series


class TileWindow(NamedTuple):
    """A VOI window on tile values t: u = (t - low) / (high - low), then clip(u, 0, 1) or a sigmoid of it."""

    low: float
    high: float
    sigmoid: bool

    def apply(self, tile: NDArray[np.number]) -> NDArray[np.float32]:
        """The windowed picture, float32 in [0, 1]."""
        u = (tile.astype(np.float32) - self.low) / (self.high - self.low)
        shown = 1 / (1 + np.exp(-4 * (u - 0.5))) if self.sigmoid else np.clip(u, 0, 1)
        return shown.astype(np.float32)


def to_stored_values(
    raw: NDArray[np.integer], bits_stored: int, high_bit: int, signed: bool
) -> NDArray[np.uint16] | NDArray[np.int16]:
    """Values out of their cells: bits outside BitsStored dropped, the sign extended (PS3.5 8.1.1).

    Args:
        raw: cells of 8 or 16 bits as unsigned integers.
        bits_stored: 1 to 16 (0028,0101).
        high_bit: the most significant bit's place in the cell (0028,0102).
        signed: PixelRepresentation is 1 (0028,0103).
    """
    mask = (1 << bits_stored) - 1
    values = (raw.astype(np.uint16, copy=False) >> np.uint16(high_bit + 1 - bits_stored)) & np.uint16(mask)
    if not signed:
        return values
    shift = np.uint16(16 - bits_stored)
    return (values << shift).view(np.int16) >> shift.astype(np.int16)


def is_inverted(photometric: str, rescale_slope: float) -> bool:
    """Whether dark is dense in the stored values: MONOCHROME1 (PS3.3 C.7.6.3.1.2), or a slope that turns them."""
    return (photometric == "MONOCHROME1") != (rescale_slope < 0)


def to_tile_values(decoded: Decoded, inverted: bool) -> NDArray[np.uint16]:
    """Tile values: unsigned, bright is dense, padding 0.

    Args:
        decoded: a picture's stored values and facts.
        inverted: turn it, as MONOCHROME1 asks: 2^bits_stored - 1 - (stored - value_offset).

    Returns:
        uint16 [rows, columns], 0 to 2^bits_stored - 1.
    """
    header = decoded.header
    tile = (decoded.stored.astype(np.int32) - header.value_offset).astype(np.uint16)
    if inverted:
        tile = np.uint16((1 << header.bits_stored) - 1) - tile
    if header.padding:
        low, high = min(header.padding), max(header.padding)
        tile[(decoded.stored >= low) & (decoded.stored <= high)] = 0
    return tile


def tile_windows(row: Row) -> list[TileWindow]:
    """The row's VOI windows in tile units, in the file's order.

    A picture without window or VOI LUT has one ramp over the breast's percentiles; one with a VOI LUT alone has none.
    """
    centers, widths, functions = (_list(row[f"window_{name}"]) for name in ("center", "width", "function"))
    windows = [_window(row, float(c), float(w), str(f)) for c, w, f in zip(centers, widths, functions, strict=True)]
    if not windows and not len(_list(row["voi_lut"])):
        low, high = float(row["percentile_low"]), float(row["percentile_high"])
        windows = [TileWindow(low, max(high, low + 1), False)]
    return windows


def tile_voi_lut(row: Row) -> NDArray[np.float32] | None:
    """The VOI LUT as a table over tile values (PS3.3 C.11.2.1.1): float32 [2^bits_stored] in [0, 1], or None."""
    data = np.asarray(_list(row["voi_lut"]), dtype=np.float64)
    if not data.size:
        return None
    position = np.rint(_modality_values(row)).astype(np.int64) - int(row["voi_lut_first"])
    shown = data[np.clip(position, 0, data.size - 1)] / (2.0 ** int(row["voi_lut_bits"]) - 1)
    turned = bool(row["inverted"]) != (float(row["rescale_slope"]) < 0)  # a negative slope turned the values already
    return (1 - shown if turned else shown).clip(0, 1).astype(np.float32)


def _modality_values(row: Row) -> NDArray[np.float64]:
    """The modality value of each tile value (PS3.3 C.11.1.1.2)."""
    tile = np.arange(1 << int(row["bits_stored"]), dtype=np.float64)
    stored = (tile[::-1] if bool(row["inverted"]) else tile) + int(row["value_offset"])
    return stored * float(row["rescale_slope"]) + float(row["rescale_intercept"])


def _window(row: Row, center: float, width: float, function: str) -> TileWindow:
    """Where the window begins and ends (PS3.3 C.11.2.1.2.1 LINEAR, C.11.2.1.3.1 SIGMOID, C.11.2.1.3.2 LINEAR_EXACT)."""
    if function == "LINEAR":
        # (x - (c - 0.5)) / (w - 1) + 0.5; a width of 1 is a step, which no ramp can be: as narrow as a float tells.
        half, middle = max(width - 1, 1e-3) / 2, center - 0.5
    else:
        half, middle = max(width, 1e-3) / 2, center
    slope, intercept = float(row["rescale_slope"]), float(row["rescale_intercept"])
    ends = [(edge - intercept) / slope - int(row["value_offset"]) for edge in (middle - half, middle + half)]
    if bool(row["inverted"]):
        top = (1 << int(row["bits_stored"])) - 1
        ends = [top - ends[1], top - ends[0]]
    return TileWindow(min(ends), max(ends), function == "SIGMOID")


def _list(value: Any) -> Any:
    return [] if value is None or (isinstance(value, float) and np.isnan(value)) else value
