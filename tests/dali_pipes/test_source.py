import cv2
import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_voi_lut
from pydicom.uid import ExplicitVRLittleEndian

from dali_pipes.geometry import level_of, low_pass, output_to_level, output_to_tile
from dali_pipes.plan import Draw
from dali_pipes.settings import PipelineSettings
from dali_pipes.source import NUMBERS, Source, choose_window
from dali_pipes.steps import window_table
from tests.dali_pipes.stores import facts, make_store

TILE = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def shown(row, pipeline=None, draw=None):
    """Grey in [0, 1] of every tile value of 12 bits."""
    table_on, sigmoid, scale, bias, table = choose_window(row, pipeline or PipelineSettings(), draw or Draw())
    numbers = dict.fromkeys(NUMBERS, 0.0) | {"table": table_on, "sigmoid": sigmoid, "scale": scale, "bias": bias}
    return window_table(numbers, table)[:4096]


def by_pydicom(center, width, function, lut=None):
    """What pydicom shows of the same values, scaled to [0, 1]."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.PhotometricInterpretation, dataset.BitsStored, dataset.PixelRepresentation = "MONOCHROME2", 12, 0
    if lut is None:
        dataset.WindowCenter, dataset.WindowWidth, dataset.VOILUTFunction = center, width, function
        return apply_voi_lut(TILE, dataset).ravel() / 4095
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [len(lut), 0, 12], lut
    item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
    dataset.VOILUTSequence = [item]
    return apply_voi_lut(TILE, dataset).ravel() / 4095


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("center", "width"), [(2048, 4096), (1500.5, 801), (300, 2000), (3900, 50)])
def test_windows_are_those_of_pydicom(function, center, width):
    row = facts(0, TILE, window_center=[center], window_width=[width], window_function=[function])
    assert np.abs(shown(row) - by_pydicom(center, width, function)).max() < 1 / 255


def test_a_voi_lut_is_that_of_pydicom():
    lut = (4095 * np.linspace(0, 1, 3000) ** 0.5).astype(int).tolist()
    row = facts(
        0,
        TILE,
        **{f"window_{name}": [] for name in ("center", "width", "function")},
        voi_lut=lut,
        voi_lut_first=0,
        voi_lut_bits=12,
    )
    assert np.abs(shown(row) - by_pydicom(0, 0, "", lut)).max() < 1 / 255


def test_a_file_without_window_is_shown_between_its_percentiles():
    none = {f"window_{name}": [] for name in ("center", "width", "function")}
    row = facts(0, TILE, **none, percentile_low=100, percentile_high=3000)
    expected = np.clip((np.arange(4096) - 100) / 2900, 0, 1)
    assert np.abs(shown(row) - expected).max() < 1e-5


def test_the_percentile_window_ignores_the_files_own():
    row = facts(0, TILE, percentile_low=100, percentile_high=3000)
    expected = np.clip((np.arange(4096) - 100) / 2900, 0, 1)
    assert np.abs(shown(row, PipelineSettings(window="percentile")) - expected).max() < 1e-5


@pytest.mark.parametrize("inverted", [False, True])
def test_a_fixed_window_counts_in_stored_values(inverted):
    row = facts(0, TILE, inverted=inverted, value_offset=-2048)
    grey = shown(row, PipelineSettings(window="fixed", fixed_low=-1000, fixed_high=1000))
    stored = np.arange(4096)[::-1] - 2048 if inverted else np.arange(4096) - 2048
    expected = np.clip((stored + 1000) / 2000, 0, 1)
    assert np.abs(grey - (1 - expected if inverted else expected)).max() < 1e-3


def test_a_voi_lut_comes_before_the_files_windows():
    row = facts(0, TILE, voi_lut=[0, 255], voi_lut_first=0, voi_lut_bits=8)
    assert [choose_window(row, PipelineSettings(), Draw(pick=pick))[0] for pick in (0, 0.49, 0.5, 0.99)] == [1, 1, 0, 0]


def test_choice_among_windows_follows_the_draw():
    row = facts(0, TILE, window_center=[1000, 2000, 3000], window_width=[500] * 3, window_function=["LINEAR"] * 3)
    middles = [int(np.argmin(np.abs(shown(row, draw=Draw(pick=pick)) - 0.5))) for pick in (0, 0.3, 0.34, 0.7, 0.999)]
    assert [round(middle, -3) for middle in middles] == [1000, 1000, 2000, 3000, 3000]


def test_jitter_moves_the_centre_by_widths_and_scales_the_width():
    row = facts(0, TILE, window_center=[2000], window_width=[1000], window_function=["LINEAR_EXACT"])
    grey = shown(row, draw=Draw(window_shift=0.1, window_zoom=1.2))
    assert np.abs(grey - np.clip((np.arange(4096) - 2100) / 1200 + 0.5, 0, 1)).max() < 1e-5


def corners(matrix, height, width):
    """Where the corners of a level lie in the output."""
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    points = np.array([[0, 0, 1], [width, 0, 1], [0, height, 1], [width, height, 1]])
    return (points @ inverse.T)[:, :2]


@pytest.mark.parametrize(("height", "width"), [(200, 100), (100, 200), (50, 20)])
def test_a_level_fits_the_output_with_its_aspect_ratio_and_in_the_middle(height, width):
    found = corners(output_to_level(height, width, 64, 96, Draw(), False), height, width)
    size = found[3] - found[0]
    assert np.isclose(size[0] / size[1], width / height)
    assert np.allclose(found[0] + found[3], [96, 64])
    assert np.isclose(size[0], 96) or np.isclose(size[1], 64)


def test_mirror_and_flips_swap_the_corners():
    plain = corners(output_to_level(64, 96, 64, 96, Draw(), False), 64, 96)
    mirrored = corners(output_to_level(64, 96, 64, 96, Draw(), True), 64, 96)
    assert np.allclose(mirrored, plain[[1, 0, 3, 2]])
    assert np.allclose(corners(output_to_level(64, 96, 64, 96, Draw(hflip=True), True), 64, 96), plain)
    assert np.allclose(corners(output_to_level(64, 96, 64, 96, Draw(vflip=True), False), 64, 96), plain[[2, 3, 0, 1]])


def test_rotation_zoom_and_shift_are_those_of_opencv():
    draw = Draw(angle=20, zoom=1.3, shift_x=0.1, shift_y=-0.2)
    found = corners(output_to_level(64, 96, 64, 96, draw, False), 64, 96)
    forward = cv2.getRotationMatrix2D((48, 32), 20, 1.3)  # counter-clockwise, as seen
    points = np.array([[0, 0, 1], [96, 0, 1], [0, 64, 1], [96, 64, 1]]) @ forward.T + [9.6, -12.8]
    assert np.allclose(found, points)


@pytest.mark.parametrize(
    ("crop", "output", "level"),
    [
        ((2000, 500), (1024, 512), "1024"),  # its height is what fits
        ((2000, 500), (512, 1024), "512"),
        ((500, 2000), (512, 1024), "1024"),
        ((2000, 1000), (1200, 600), "full"),  # nothing smaller does
        ((300, 200), (1024, 1024), "512"),  # all levels are of its own size
    ],
)
def test_the_smallest_level_that_need_not_be_enlarged_is_read(crop, output, level):
    row = {"crop_height": crop[0], "crop_width": crop[1]}
    assert level_of(row, ("full", "1024", "512"), PipelineSettings(height=output[0], width=output[1])) == level


def test_the_low_pass_is_scikit_images_and_absent_where_nothing_shrinks():
    def sigma(size):
        return low_pass(output_to_level(size, size, 64, 64, Draw(), False))

    assert sigma(64) == 0
    assert sigma(32) == 0
    assert np.isclose(sigma(128), 0.5)
    assert np.isclose(sigma(256), 1.5)


def test_all_of_a_draw_reaches_the_steps(tmp_path):
    store = make_store(tmp_path / "store", count=1, sizes=((200, 120),))
    draw = Draw(
        brightness=0.1,
        contrast=1.2,
        gamma=0.9,
        blur_sigma=1.1,
        sharpen=0.4,
        noise_sigma=0.02,
        noise_x=0.5,
        noise_y=0.25,
        grid=np.full((6, 6, 2), 0.2, np.float32),
        holes=np.array([[0, 0.25, 0.5, 1]], np.float32),
    )
    sample, fault = Source(store, store.manifest, PipelineSettings(height=32, width=64)).sample(0, draw)
    assert fault is None
    told = dict(zip(NUMBERS, sample.numbers.tolist(), strict=True))
    expected = {"brightness": 0.1, "contrast": 1.2, "gamma": 0.9, "blur": 1.1, "sharpen": 0.4, "noise": 0.02}
    expected |= {"noise_x": 128, "noise_y": 64, "grid": 1, "antialias": 0.5}  # a level of 64 rows to 32
    assert {name: told[name] for name in expected} == pytest.approx(expected)
    assert sample.holes.tolist() == [[0, 16, 16, 64]]
    assert np.allclose(sample.grid, np.array([0.2 * 64 / 5, 0.2 * 32 / 5]))


@pytest.mark.parametrize(
    ("laterality", "orient", "mirrored"),
    [("R", True, True), ("R", False, False), ("L", True, False), ("", True, False)],
)
def test_right_breasts_alone_are_mirrored_and_only_where_asked_for(laterality, orient, mirrored):
    row = facts(0, TILE, laterality=laterality) | {"height_64": 64, "width_64": 64}
    matrix = output_to_tile(row, "64", PipelineSettings(height=64, width=64, orient=orient), Draw())
    assert (matrix[0, 0] < 0) == mirrored
