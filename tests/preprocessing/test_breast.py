"""The crop keeps the breast under every disturbance, and leaves pictures without a background whole."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.crop_quality import DISTURBANCES, disturbed, hidden, shares
from benchmarks.drawn import breasts
from preprocessing.breast import find_breast
from preprocessing.phantom import Breast, Phantom, render

KEPT = 0.995


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Breast, int, Phantom]]:
    return [(breast, seed, render(breast, view, seed)) for breast, view, seed in list(breasts(40))[2::5]]


@pytest.mark.parametrize("name", DISTURBANCES)
def test_the_breast_is_kept_and_most_of_the_background_dropped(
    name: str, drawn: list[tuple[Breast, int, Phantom]]
) -> None:
    dropped, ideal = [], []
    for breast, seed, phantom in drawn:
        picture = phantom.picture, breast.laterality == "L", seed
        found = shares(disturbed(name, *picture), phantom.breast & ~hidden(name, *picture))
        assert found[0] >= KEPT, f"seed {seed}"
        dropped.append(found[1])
        ideal.append(found[2])
    assert np.mean(dropped) > 0.85 * np.mean(ideal)


def test_a_breast_that_fills_the_picture_is_left_whole(drawn: list[tuple[Breast, int, Phantom]]) -> None:
    for breast, seed, phantom in drawn:
        values = disturbed("none", phantom.picture, True, seed)
        rows, columns = np.flatnonzero(phantom.breast.any(axis=1)), np.flatnonzero(phantom.breast.any(axis=0))
        height, width = len(rows), len(columns)
        near_wall = slice(0, width // 2) if breast.laterality == "L" else slice(values.shape[1] - width // 2, None)
        inner = values[rows[0] + height // 3 : rows[0] + 2 * height // 3, near_wall]
        crop = find_breast(inner).crop
        assert (crop.height, crop.width) == inner.shape, f"seed {seed}"


def _ellipse(shape: tuple[int, int], centre: tuple[int, int], axes: tuple[int, int]) -> np.ndarray:
    """Where an upright ellipse is; centre and half axes as row and column."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    return ((y - centre[0]) / axes[0]) ** 2 + ((x - centre[1]) / axes[1]) ** 2 <= 1


def _covers(picture: np.ndarray, wanted: np.ndarray, spare: int = 8) -> tuple[bool, bool]:
    """Whether the box without margin holds all that is wanted, and little more."""
    crop = find_breast(picture.astype(np.uint16), margin=0.0).crop
    rows, columns = np.flatnonzero(wanted.any(axis=1)), np.flatnonzero(wanted.any(axis=0))
    room = (crop.height - (rows[-1] + 1 - rows[0]), crop.width - (columns[-1] + 1 - columns[0]))
    return wanted[crop.slices].sum() == wanted.sum(), max(room) <= spare


SHAPE = (1024, 1024)
ROUND = _ellipse(SHAPE, (500, 0), (301, 401))


def test_the_box_without_margin_holds_the_whole_breast_and_little_more() -> None:
    assert _covers(2000 * ROUND, ROUND) == (True, True)
    turned = ROUND[::-1, ::-1]
    assert _covers(2000 * turned, turned) == (True, True)


def test_the_box_goes_on_over_a_strip_that_the_breast_reaches() -> None:
    picture = 2000 * ROUND
    picture[:, :12] = 4000
    crop = find_breast(picture.astype(np.uint16), margin=0.0).crop
    assert crop.left == 0


def test_a_label_plate_is_no_breast_and_a_breast_with_straight_edges_no_plate() -> None:
    plate = np.zeros(SHAPE, bool)
    plate[60:160, 800:960] = True
    small = _ellipse(SHAPE, (600, 0), (250, 300))  # a tenth of it is less than the plate
    assert _covers(2000 * (small | plate), small) == (True, True)
    straight = np.zeros(SHAPE, bool)
    straight[200:900, :500] = True  # as of a compression paddle
    marker = _ellipse(SHAPE, (100, 900), (70, 70))
    assert _covers(2000 * (straight | marker), straight) == (True, True)


def test_a_breast_in_two_pieces_is_kept_whole() -> None:
    pieces = ROUND.copy()
    pieces[640:680] = False  # the edge of a paddle
    assert _covers(2000 * pieces, pieces) == (True, True)


@pytest.mark.parametrize("value", [0, 7, 65535])
@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (640, 512)])
def test_a_constant_picture_is_left_whole(value: int, shape: tuple[int, int]) -> None:
    crop = find_breast(np.full(shape, value, np.uint16)).crop
    assert (crop.top, crop.left, crop.height, crop.width) == (0, 0, *shape)


def test_pure_noise_is_left_whole() -> None:
    picture = np.random.default_rng(0).integers(0, 4096, (640, 512), dtype=np.uint16)
    assert find_breast(picture).crop.slices == (slice(0, 640), slice(0, 512))


@pytest.mark.parametrize("shape", [(2, 2), (5, 17), (31, 40), (100, 3)])
def test_tiny_pictures_have_a_box_inside_them(shape: tuple[int, int]) -> None:
    picture = np.zeros(shape, np.uint16)
    picture[:, : max(1, shape[1] // 2)] = 1000
    crop = find_breast(picture).crop
    assert 0 <= crop.top < crop.top + crop.height <= shape[0]
    assert 0 <= crop.left < crop.left + crop.width <= shape[1]
    assert picture[crop.slices].sum() == picture.sum()


def test_a_mirrored_picture_has_the_mirrored_box(drawn: list[tuple[Breast, int, Phantom]]) -> None:
    for _, seed, phantom in drawn[:4]:
        values = disturbed("none", phantom.picture, True, seed)
        crop, other = find_breast(values).crop, find_breast(np.ascontiguousarray(values[:, ::-1])).crop
        assert abs(other.left - (values.shape[1] - crop.left - crop.width)) <= 2
        assert abs(other.width - crop.width) <= 2


def test_the_margin_widens_the_box_on_every_free_side(drawn: list[tuple[Breast, int, Phantom]]) -> None:
    breast, seed, phantom = drawn[0]
    values = disturbed("none", phantom.picture, breast.laterality == "L", seed)
    tight, wide = find_breast(values, margin=0.0).crop, find_breast(values, margin=0.05).crop
    assert wide.width - tight.width in (31, 32, 33)


def test_large_and_small_copies_of_a_picture_have_the_same_box(drawn: list[tuple[Breast, int, Phantom]]) -> None:
    breast, seed, phantom = drawn[1]
    values = disturbed("none", phantom.picture, breast.laterality == "L", seed)
    small = find_breast(values).crop
    large = find_breast(np.repeat(np.repeat(values, 5, axis=0), 5, axis=1)).crop
    for name in ("top", "left", "height", "width"):
        assert abs(getattr(large, name) - 5 * getattr(small, name)) <= 25, name


@pytest.mark.parametrize("frame", [0.4, 1.0])
def test_the_search_never_raises_on_odd_pictures(frame: float) -> None:
    rng = np.random.default_rng(1)
    for _ in range(30):
        shape = tuple(int(side) for side in rng.integers(1, 200, 2))
        picture = (rng.random(shape) ** rng.uniform(0.2, 8) * 65535 * frame).astype(np.uint16)
        picture[: rng.integers(0, shape[0] + 1)] = rng.integers(0, 65536)
        crop = find_breast(picture).crop
        assert 0 <= crop.top <= crop.top + crop.height <= shape[0]
