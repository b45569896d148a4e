import cv2
import numpy as np
import pytest

from dali_pipes import steps
from dali_pipes.geometry import output_to_level
from dali_pipes.plan import Draw
from dali_pipes.settings import ClaheSettings
from dali_pipes.source import NUMBERS
from tests.dali_pipes.stores import smooth

GREY = (smooth(80, 60, 1) / 4095).astype(np.float32)
NO_GRID = np.zeros((2, 2, 2), np.float32)


def numbers(**changed):
    return dict.fromkeys(NUMBERS, 0.0) | {"contrast": 1.0, "gamma": 1.0} | changed


def sample_at(picture, x, y):
    """Bilinear interpolation at continuous coordinates (pixel i covers [i, i + 1)), black outside, in plain NumPy."""
    padded = np.pad(picture.astype(np.float64), 1)
    x, y = np.clip(x + 0.5, 0, padded.shape[1] - 1.001), np.clip(y + 0.5, 0, padded.shape[0] - 1.001)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    fx, fy = x - left, y - top
    upper = padded[top, left] * (1 - fx) + padded[top, left + 1] * fx
    lower = padded[top + 1, left] * (1 - fx) + padded[top + 1, left + 1] * fx
    return upper * (1 - fy) + lower * fy


def test_values_above_a_voi_luts_last_entry_are_as_bright_as_that():
    """PS3.3 C.11.2.1.1: it holds for all values after the range of the table."""
    table = np.array([0, 0.25, 1, 0.5], np.float32)
    found = steps.window_table(numbers(table=1.0), table, 7)
    assert found.tolist() == [0, 0.25, 1, 0.5, 0.5, 0.5, 0.5]
    assert steps.window_table(numbers(table=1.0), table, 2).tolist() == [0, 0.25]


def test_8_bit_clahe_is_opencvs():
    bytes_ = steps.to_bytes(GREY)
    expected = cv2.createCLAHE(clipLimit=3.0, tileGridSize=(4, 4)).apply(bytes_)
    assert np.array_equal(steps.clahe(bytes_, ClaheSettings(clip_limit=3, grid=4)), expected)
    assert np.abs(expected.astype(int) - bytes_).max() > 20


@pytest.mark.parametrize(
    ("gamma", "contrast", "brightness"), [(1.2, 1.0, 0.0), (1.0, 0.9, 0.0), (1.0, 1.0, 0.1), (0.8, 1.1, -0.1)]
)
def test_tone_is_its_closed_form(gamma, contrast, brightness):
    found = steps.tone(GREY, numbers(gamma=gamma, contrast=contrast, brightness=brightness))
    assert np.abs(found - np.clip(contrast * (GREY**gamma - 0.5) + 0.5 + brightness, 0, 1)).max() < 1e-6


@pytest.mark.parametrize("draw", [Draw(), Draw(angle=12, zoom=1.1, shift_x=0.05, shift_y=-0.03, hflip=True)])
def test_the_warp_is_bilinear_interpolation_of_the_affine_map(draw):
    matrix = output_to_level(80, 60, 70, 90, draw, False)
    found = steps.warp(GREY, matrix.astype(np.float32), 70, 90, NO_GRID, numbers())
    y, x = np.mgrid[0:70, 0:90] + 0.5
    expected = sample_at(GREY, *(matrix[:, :2] @ np.stack([x.ravel(), y.ravel()]) + matrix[:, 2:]))
    difference = np.abs(found - expected.reshape(70, 90))
    assert difference.mean() < 1e-4
    assert difference.max() < 1 / 64  # at the picture's edge, where OpenCV counts in 1/32 pixel


def test_mirrored_pictures_are_mirrored_exactly():
    matrix = output_to_level(80, 60, 80, 60, Draw(), True).astype(np.float32)
    assert np.array_equal(steps.warp(GREY, matrix, 80, 60, NO_GRID, numbers()), GREY[:, ::-1])


def test_a_grid_that_moves_nothing_changes_nothing():
    matrix = output_to_level(80, 60, 70, 90, Draw(angle=12), False).astype(np.float32)
    plain = steps.warp(GREY, matrix, 70, 90, NO_GRID, numbers())
    still = steps.warp(GREY, matrix, 70, 90, np.zeros((6, 6, 2), np.float32), numbers(grid=1.0))
    assert np.abs(plain - still).max() < 1 / 255


def test_grid_distortion_looks_where_the_nodes_say():
    rng = np.random.default_rng(0)
    grid = rng.uniform(-4, 4, (6, 5, 2)).astype(np.float32)
    matrix = output_to_level(80, 60, 80, 60, Draw(), False)
    found = steps.warp(GREY, matrix.astype(np.float32), 80, 60, grid, numbers(grid=1.0))
    y, x = np.mgrid[0:80, 0:60] + 0.5
    moved = []
    for axis in (0, 1):  # linear between nodes: bilinear interpolation of the node table itself
        table = np.pad(grid[..., axis].astype(np.float64), ((0, 1), (0, 1)), mode="edge")
        row, column = y / 80 * 5, x / 60 * 4
        i, j = row.astype(int), column.astype(int)
        fi, fj = row - i, column - j
        moved.append(
            (table[i, j] * (1 - fj) + table[i, j + 1] * fj) * (1 - fi)
            + (table[i + 1, j] * (1 - fj) + table[i + 1, j + 1] * fj) * fi
        )
    expected = sample_at(GREY, x + moved[0], y + moved[1])
    assert np.abs(found - expected).mean() < 1e-3
    assert np.abs(found - GREY).mean() > 0.01


@pytest.mark.parametrize("distorted", [False, True])
def test_the_part_worked_out_holds_all_that_is_seen_of_the_level(distorted):
    """Against the whole output through OpenCV, a white level: nothing outside the part may be brighter than black."""
    rng = np.random.default_rng(1)
    white = np.ones((80, 30), np.float32)
    for _ in range(60):
        draw = Draw(
            angle=rng.uniform(-180, 180), zoom=rng.uniform(0.5, 2), shift_x=rng.uniform(-0.6, 0.6),
            shift_y=rng.uniform(-0.6, 0.6), hflip=bool(rng.random() < 0.5), vflip=bool(rng.random() < 0.5),
        )  # fmt: skip
        matrix = output_to_level(80, 30, 64, 96, draw, False)
        grid = rng.uniform(-5, 5, (4, 6, 2)).astype(np.float32) if distorted else NO_GRID
        found = steps.warp(white, matrix.astype(np.float32), 64, 96, grid, numbers(grid=float(distorted)))
        centred = matrix.copy()
        centred[:, 2] += centred[:, :2].sum(axis=1) / 2 - 0.5
        maps = steps.lookup_maps(centred, grid, 64, 96, (0, 0, 64, 96))
        expected = cv2.remap(white, *maps, cv2.INTER_LINEAR, borderValue=0.0)
        assert np.abs(found - expected).max() < 1 / 16  # both count in parts of a pixel at the level's edge
        assert (found == 0).any()


def test_a_level_shifted_out_of_the_output_leaves_it_black():
    matrix = output_to_level(80, 60, 80, 60, Draw(shift_x=3.0), False).astype(np.float32)
    assert not steps.warp(GREY, matrix, 80, 60, NO_GRID, numbers()).any()


def test_a_warp_that_shrinks_does_not_alias():
    stripes = np.tile(np.array([0, 1], np.float32), (256, 128))  # the finest there are: nothing of them may be left
    matrix = output_to_level(256, 256, 64, 64, Draw(angle=3), False).astype(np.float32)
    filtered = steps.warp(steps.blur(stripes, 1.5), matrix, 64, 64, NO_GRID, numbers())[8:-8, 8:-8]
    bare = steps.warp(stripes, matrix, 64, 64, NO_GRID, numbers())[8:-8, 8:-8]
    assert np.abs(filtered - 0.5).max() < 0.02
    assert np.abs(bare - 0.5).max() > 0.2


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.3])
def test_blur_is_a_gaussian(sigma):
    impulse = np.zeros((41, 41), np.float32)
    impulse[20, 20] = 1
    distance = np.arange(-20, 21)
    kernel = np.exp(-(distance**2) / (2 * sigma**2))
    kernel[np.abs(distance) > np.ceil(3 * sigma)] = 0
    kernel /= kernel.sum()
    assert np.abs(steps.blur(impulse, sigma) - np.outer(kernel, kernel)).max() < 1e-4


def test_sharpening_is_the_unsharp_mask():
    soft = cv2.GaussianBlur(GREY, (7, 7), 1.0)
    expected = np.clip(GREY + 0.7 * (GREY - soft), 0, 1)
    assert np.abs(steps.sharpen(GREY, 0.7) - expected).max() < 1e-5


def test_noise_has_the_standard_deviation_asked_for_and_differs_by_place():
    bank = steps.noise_bank(300, 300)
    half = np.full((300, 300), 0.5, np.float32)
    one = steps.add_noise(half, bank, numbers(noise=0.05, noise_x=3, noise_y=200)) - 0.5
    other = steps.add_noise(half, bank, numbers(noise=0.05, noise_x=4, noise_y=200)) - 0.5
    assert abs(one.std() - 0.05) < 0.001
    assert abs(one.mean()) < 0.001
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02
    assert np.array_equal(one[:, 1:], other[:, :-1])


def test_holes_are_black_and_nothing_else_is():
    holes = np.array([[0, 0, 5, 7], [70, 50, 80, 60]], np.float32)
    found = steps.cut_holes(np.ones((80, 60), np.float32), holes)
    assert found[:5, :7].sum() == found[70:, 50:].sum() == 0
    assert found.sum() == 80 * 60 - 35 - 100
