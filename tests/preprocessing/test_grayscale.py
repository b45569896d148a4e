"""Tile values and windows against pydicom's Modality LUT and VOI transformations of the same files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing

from preprocessing import decode, grayscale
from preprocessing.settings import ConvertSettings
from tests.preprocessing.dicoms import picture, write

SETTINGS = ConvertSettings()


def through_the_tile(path: Path, turned: bool = False) -> tuple[np.ndarray, dict[str, Any]]:
    """Tile values of a file and the manifest row that goes with them."""
    decoded = decode.decode(path, SETTINGS)
    header = decoded.header
    inverted = grayscale.is_inverted(header.photometric, header.rescale_slope) or turned
    return grayscale.to_tile_values(decoded, inverted), asdict(header) | {"inverted": inverted}


def shown(tile: np.ndarray, window: grayscale.TileWindow) -> np.ndarray:
    """The contract of docs/architecture.md."""
    u = (tile.astype(np.float64) - window.low) / (window.high - window.low)
    return 1 / (1 + np.exp(-4 * (u - 0.5))) if window.sigmoid else np.clip(u, 0, 1)


def by_pydicom(path: Path, index: int = 0, lut: bool = False) -> np.ndarray:
    """What pydicom shows, in [0, 1]."""
    source = pydicom.dcmread(path)
    modality = apply_modality_lut(source.pixel_array, source)
    if lut:
        grey = apply_voi_lut(modality.astype(np.int64), source) / (2 ** source.VOILUTSequence[0].LUTDescriptor[2] - 1)
    else:
        grey = apply_windowing(modality, source, index=index)
        bits, slope = source.BitsStored, float(source.get("RescaleSlope", 1))
        ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if source.PixelRepresentation else (0, 2**bits - 1)
        low, high = (end * slope + float(source.get("RescaleIntercept", 0)) for end in ends)
        grey = (grey - low) / (high - low)
    return 1 - grey if source.PhotometricInterpretation == "MONOCHROME1" else grey


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("bits", "signed"), [(8, False), (12, False), (12, True), (16, False), (16, True)])
@pytest.mark.parametrize("rescale", [None, (2.5, -700.0), (0.25, 31.0)])
def test_every_window_shows_what_pydicom_shows(
    tmp_path: Path, function: str | None, photometric: str, bits: int, signed: bool, rescale: tuple | None
) -> None:
    slope, intercept = rescale or (1.0, 0.0)
    middle = (2.0 ** (bits - 1) - (2 ** (bits - 1) if signed else 0)) * slope + intercept
    widths = [2.0**bits * slope * share for share in (0.6, 0.05, 1.5)]
    path = write(
        tmp_path / "a.dcm",
        picture(bits, signed),
        bits=bits,
        PhotometricInterpretation=photometric,
        WindowCenter=[middle, middle * 0.9, middle + 3.5],
        WindowWidth=[max(2.0, round(width, 2)) for width in widths],
        VOILUTFunction=function,
        RescaleSlope=rescale and slope,
        RescaleIntercept=rescale and intercept,
    )
    tile, row = through_the_tile(path)
    windows = grayscale.tile_windows(pd.Series(row))
    assert [window.sigmoid for window in windows] == [function == "SIGMOID"] * 3
    for index, window in enumerate(windows):
        assert window.high > window.low
        # pydicom's integer pixels minus a half-integer centre: float64 throughout on both sides
        np.testing.assert_allclose(shown(tile, window), by_pydicom(path, index), atol=1e-6)


@pytest.mark.parametrize(("syntax", "order"), [(uid.ExplicitVRLittleEndian, "<u2"), (uid.ExplicitVRBigEndian, ">u2")])
def test_a_voi_lut_of_words_is_read_in_the_files_byte_order(tmp_path: Path, syntax: str, order: str) -> None:
    entries = np.rint(np.linspace(0, 1, 4096) ** 0.6 * 65535).astype(np.uint16)
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [4096, 0, 16])
    item.add_new("LUTData", "OW", entries.astype(order).tobytes())
    path = write(tmp_path / "a.dcm", picture(12), bits=12, syntax=syntax, VOILUTSequence=[item])
    table = grayscale.tile_voi_lut(through_the_tile(path)[1])
    assert table is not None
    np.testing.assert_allclose(table, entries / 65535, atol=1e-6)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("first", "count", "signed"), [(0, 4096, False), (300, 1000, False), (-2048, 4096, True)])
@pytest.mark.parametrize("depth", [10, 16])
def test_a_voi_lut_shows_what_pydicom_shows(
    tmp_path: Path, photometric: str, first: int, count: int, signed: bool, depth: int
) -> None:
    entries = np.rint(np.linspace(0, 1, count) ** 0.6 * (2**depth - 1)).astype(np.uint16)
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if signed else "US", [count, first, depth])
    item.add_new("LUTData", "US", [int(value) for value in entries])
    path = write(
        tmp_path / "a.dcm", picture(12, signed), bits=12, PhotometricInterpretation=photometric, VOILUTSequence=[item]
    )
    tile, row = through_the_tile(path)
    table = grayscale.tile_voi_lut(row)
    assert table is not None
    assert (table.dtype, table.shape) == (np.float32, (4096,))
    np.testing.assert_allclose(table[tile], by_pydicom(path, lut=True), atol=1e-6)
    assert grayscale.tile_windows(row) == []


def test_a_voi_lut_after_a_rescale_maps_modality_values(tmp_path: Path) -> None:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS", [8192, -1024, 16])
    item.add_new("LUTData", "US", [value * 8 for value in range(8192)])
    path = write(
        tmp_path / "a.dcm", picture(12), bits=12, VOILUTSequence=[item], RescaleSlope=1.5, RescaleIntercept=-1024
    )
    tile, row = through_the_tile(path)
    table = grayscale.tile_voi_lut(row)
    assert table is not None
    stored = pydicom.dcmread(path).pixel_array.astype(float)
    expected = np.floor(stored * 1.5) * 8 / 65535
    np.testing.assert_allclose(table[tile], expected, atol=1e-6)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_voi_lut_after_a_negative_slope_shows_what_pydicom_shows(tmp_path: Path, photometric: str) -> None:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [4096, 0, 16])
    item.add_new("LUTData", "US", np.rint(np.linspace(0, 1, 4096) ** 2 * 65535).astype(int).tolist())
    rescale = {"RescaleSlope": -1, "RescaleIntercept": 4095, "PhotometricInterpretation": photometric}
    path = write(tmp_path / "a.dcm", picture(12), bits=12, VOILUTSequence=[item], **rescale)
    tile, row = through_the_tile(path)
    assert row["inverted"] == (photometric == "MONOCHROME2")
    table = grayscale.tile_voi_lut(row)
    assert table is not None
    np.testing.assert_allclose(table[tile], by_pydicom(path, lut=True), atol=1e-6)


def test_a_lut_of_as_many_entries_as_its_descriptor_cannot_say_has_65536(tmp_path: Path) -> None:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [0, 0, 16])  # PS3.3 C.11.2.1.1
    item.add_new("LUTData", "OW", np.arange(65536, dtype="<u2")[::-1].tobytes())
    path = write(tmp_path / "a.dcm", picture(16), bits=16, VOILUTSequence=[item])
    table = grayscale.tile_voi_lut(through_the_tile(path)[1])
    assert table is not None
    np.testing.assert_allclose(table, np.linspace(1, 0, 65536), atol=1e-6)


@pytest.mark.parametrize(("intercept", "first"), [(-1024, -1024), (0, 64512)])
def test_a_luts_first_value_written_without_a_sign_is_negative_where_its_input_can_be(
    tmp_path: Path, intercept: int, first: int
) -> None:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [4, 64512, 16])  # 64512 is -1024 in 16 bits
    item.add_new("LUTData", "US", [0, 1, 2, 3])
    path = write(tmp_path / "a.dcm", picture(12), bits=12, VOILUTSequence=[item], RescaleIntercept=intercept)
    assert through_the_tile(path)[1]["voi_lut_first"] == first


def test_a_modality_lut_and_the_window_after_it_become_one_table(tmp_path: Path) -> None:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [4096, 0, 16])
    item.add_new("LUTData", "US", [int(65535 * (value / 4095) ** 2) for value in range(4096)])
    item.add_new("ModalityLUTType", "LO", "US")
    path = write(
        tmp_path / "a.dcm",
        picture(12),
        bits=12,
        ModalityLUTSequence=[item],
        WindowCenter=20000,
        WindowWidth=30000,
        RescaleSlope=2,  # which has no say beside a LUT
        RescaleIntercept=-3,
    )
    tile, row = through_the_tile(path)
    table = grayscale.tile_voi_lut(row)
    assert table is not None
    assert (row["rescale_slope"], row["rescale_intercept"]) == (1, 0)
    source = pydicom.dcmread(path)
    modality = apply_modality_lut(source.pixel_array, source).astype(float)
    expected = np.clip((modality - 19999.5) / 29999 + 0.5, 0, 1)
    np.testing.assert_allclose(table[tile], expected, atol=1 / 65535)


@pytest.mark.parametrize("after", [None, "LINEAR_EXACT", "SIGMOID", "LUT"])
def test_whatever_comes_after_a_modality_lut_is_in_the_table(tmp_path: Path, after: str | None) -> None:
    """PS3.3 C.11.2.1.1 and C.11.2.1.3; without anything, all of the LUT's range."""
    item, voi = Dataset(), Dataset()
    item.add_new("LUTDescriptor", "US", [4096, 0, 16])
    modality = (65535 * (np.arange(4096) / 4095) ** 2).astype(int)
    item.add_new("LUTData", "US", modality.tolist())
    item.add_new("ModalityLUTType", "LO", "US")
    voi.add_new("LUTDescriptor", "US", [4096, 1000, 12])
    voi.add_new("LUTData", "US", list(range(4095, -1, -1)))
    window = {"WindowCenter": 20000, "WindowWidth": 30000, "VOILUTFunction": after}
    more = {"VOILUTSequence": [voi]} if after == "LUT" else window if after else {}
    path = write(tmp_path / "a.dcm", picture(12), bits=12, ModalityLUTSequence=[item], **more)
    table = grayscale.tile_voi_lut(through_the_tile(path)[1])
    expected = {
        None: modality / 65535,
        "LINEAR_EXACT": np.clip((modality - 20000) / 30000 + 0.5, 0, 1),
        "SIGMOID": 1 / (1 + np.exp(-4 * (modality - 20000) / 30000)),
        "LUT": (4095 - np.clip(modality - 1000, 0, 4095)) / 4095,
    }[after]
    assert table is not None
    np.testing.assert_allclose(table, expected, atol=1 / 65535)


@pytest.mark.parametrize(("bits", "signed"), [(8, False), (10, True), (12, False), (13, True), (16, False), (16, True)])
@pytest.mark.parametrize("inverted", [False, True])
def test_tile_values_are_unsigned_and_turned_within_the_stored_range(
    tmp_path: Path, bits: int, signed: bool, inverted: bool
) -> None:
    values = picture(bits, signed)
    photometric = "MONOCHROME1" if inverted else "MONOCHROME2"
    path = write(tmp_path / "a.dcm", values, bits=bits, PhotometricInterpretation=photometric)
    tile, _ = through_the_tile(path)
    expected = values.astype(np.int64) + (2 ** (bits - 1) if signed else 0)
    assert tile.dtype == np.uint16
    np.testing.assert_array_equal(tile, 2**bits - 1 - expected if inverted else expected)


@pytest.mark.parametrize("ends", [(-2000, -1990), (-1990, -2000)])
@pytest.mark.parametrize("inverted", [False, True])
def test_padding_is_zero_in_tiles_whether_turned_or_not(tmp_path: Path, inverted: bool, ends: tuple[int, int]) -> None:
    values = picture(12, signed=True)
    values[:, 50:] = -2000
    values[:, 55:] = -1990
    path = write(
        tmp_path / "a.dcm",
        values,
        bits=12,
        PhotometricInterpretation="MONOCHROME1" if inverted else "MONOCHROME2",
        PixelPaddingValue=ends[0],
        PixelPaddingRangeLimit=ends[1],
    )
    tile, row = through_the_tile(path)
    assert row["padding"] == list(ends)
    padded = (values >= -2000) & (values <= -1990)
    assert (tile[padded] == 0).all()
    assert (tile[~padded] > 0).mean() > 0.9


def test_a_negative_slope_is_turned_and_shown_as_pydicom_shows_it(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.dcm",
        picture(12),
        bits=12,
        RescaleSlope=-1,
        RescaleIntercept=4095,
        WindowCenter=2000,
        WindowWidth=3000,
    )
    tile, row = through_the_tile(path)
    assert row["inverted"]
    source = pydicom.dcmread(path)
    modality = 4095.0 - source.pixel_array
    np.testing.assert_allclose(
        shown(tile, grayscale.tile_windows(row)[0]), np.clip((modality - 1999.5) / 2999 + 0.5, 0, 1), atol=1e-9
    )


def test_a_picture_that_its_csv_calls_a_negative_is_shown_as_its_opposite(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", picture(12), bits=12, WindowCenter=1500, WindowWidth=2000)
    tile, row = through_the_tile(path, turned=True)
    np.testing.assert_allclose(shown(tile, grayscale.tile_windows(row)[0]), 1 - by_pydicom(path), atol=1e-9)


def test_a_linear_window_of_width_one_is_a_step(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", picture(12), bits=12, WindowCenter=1500, WindowWidth=1)
    tile, row = through_the_tile(path)
    grey = shown(tile, grayscale.tile_windows(row)[0])
    np.testing.assert_array_equal(grey, (tile > 1499.5).astype(float))


def test_impossible_windows_are_left_out(tmp_path: Path) -> None:
    windows = {"WindowCenter": [100, 200, 250, 300], "WindowWidth": [0, -5, 0.5, 900]}
    path = write(tmp_path / "a.dcm", picture(12), bits=12, **windows)
    _, row = through_the_tile(path)
    assert (row["window_center"], row["window_width"]) == ([300], [900])
    path = write(tmp_path / "b.dcm", picture(12), bits=12, VOILUTFunction="SIGMOID", **windows)
    _, row = through_the_tile(path)
    assert (row["window_center"], row["window_width"]) == ([250, 300], [0.5, 900]), "below 1 in LINEAR alone"


def test_a_picture_without_window_gets_one_ramp_over_its_percentiles() -> None:
    row = {"window_center": [], "window_width": [], "window_function": [], "voi_lut": []}
    ramp = grayscale.tile_windows(row | {"percentile_low": 12.0, "percentile_high": 3000.0})
    assert ramp == [grayscale.TileWindow(12.0, 3000.0, False)]
    flat = grayscale.tile_windows(row | {"percentile_low": 12.0, "percentile_high": 12.0})
    assert flat[0].high > flat[0].low


def test_eight_bit_pictures_are_left_alone_by_their_window(tmp_path: Path) -> None:
    import cv2

    values = picture(8).astype(np.uint8)
    path = tmp_path / "a.png"
    assert cv2.imwrite(str(path), values)
    tile, row = through_the_tile(path)
    window = grayscale.tile_windows(row)[0]
    np.testing.assert_allclose(shown(tile, window), values / 255, atol=1e-12)
