"""Levels: sizes, area averages, exact round trips, files that others can read."""

from __future__ import annotations

import io
import zlib
from itertools import pairwise
from pathlib import Path
from typing import get_args

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from preprocessing import tiles
from preprocessing.settings import Codec

LEVELS = ("full", "2048", "1024", "512")


def picture(rows: int = 700, columns: int = 530, bits: int = 16) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 2**bits, (rows, columns), dtype=np.uint16)


@pytest.mark.parametrize(
    ("height", "width", "level", "size"),
    [
        (3328, 2560, "full", (3328, 2560)),
        (3328, 2560, "2048", (2048, 1576)),  # four times 512 × 394
        (3328, 2560, "512", (512, 394)),
        (2560, 3328, "512", (394, 512)),
        (640, 640, "1024", (640, 640)),
        (5000, 3, "512", (512, 1)),
    ],
)
def test_a_level_is_named_by_its_longest_side_and_never_enlarged(
    height: int, width: int, level: str, size: tuple[int, int]
) -> None:
    assert tiles.level_sizes(LEVELS, height, width)[level] == size


@pytest.mark.parametrize("levels", [LEVELS, ("full", "1500", "700", "350"), ("2000", "64")])
@pytest.mark.parametrize("shape", [(3328, 2560), (2187, 1372), (1999, 41), (700, 530), (3, 900), (1, 5000)])
def test_levels_are_whole_multiples_of_the_next_smaller_one_where_their_names_are(
    levels: tuple[str, ...], shape: tuple[int, int]
) -> None:
    sizes = tiles.level_sizes(levels, *shape)
    assert list(sizes) == list(levels)
    longest, smallest = max(shape), min(shape)
    for level, (rows, columns) in sizes.items():
        assert rows <= shape[0]
        assert columns <= shape[1]
        expected = longest if level == "full" else min(longest, int(level))
        assert max(rows, columns) == expected
        assert abs(min(rows, columns) - smallest * expected / longest) <= max(1, 0.51 * expected / int(levels[-1]))
    for larger, smaller in pairwise(levels):
        if larger != "full" and int(larger) < longest and int(larger) % int(smaller) == 0 and smallest > 40:
            times = int(larger) // int(smaller)
            assert sizes[larger] == (times * sizes[smaller][0], times * sizes[smaller][1])


def test_each_level_pixel_is_the_mean_of_the_source_pixels_that_it_covers() -> None:
    source = picture(2048, 1024)
    built = tiles.build_levels(source, LEVELS)
    for level, factor in (("1024", 2), ("512", 4)):
        rows, columns = source.shape[0] // factor, source.shape[1] // factor
        mean = source.reshape(rows, factor, columns, factor).mean(axis=(1, 3))
        roundings = 0.5 * (1 + (level == "512"))  # its own, and that of 1024, which it is made from
        assert np.abs(built[level] - mean).max() <= roundings + 1e-3


def test_fractional_area_averages_agree_with_exact_box_weights() -> None:
    source = picture(700, 530)
    built = tiles.build_levels(source, ("full", "600", "512"))["512"]  # 600 is no whole multiple, and plays no part

    def weights(target: int, length: int) -> np.ndarray:
        edges = np.linspace(0, length, target + 1)
        pixel = np.arange(length)
        overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
        overlap = np.clip(overlap, 0, None)
        return overlap / overlap.sum(axis=1, keepdims=True)

    expected = weights(built.shape[0], 700) @ source.astype(np.float64) @ weights(built.shape[1], 530).T
    assert np.abs(built - expected).max() <= 1


def test_levels_of_equal_size_are_one_array() -> None:
    built = tiles.build_levels(picture(700, 530), LEVELS)
    assert built["full"] is built["2048"] is built["1024"]
    assert built["512"] is not built["full"]


@pytest.mark.parametrize("codec", get_args(Codec))
@pytest.mark.parametrize("shape", [(700, 530), (256, 256), (1, 1), (3, 900)])
def test_every_codec_gives_every_value_back(codec: Codec, shape: tuple[int, int], tmp_path: Path) -> None:
    level = picture(*shape)
    path = tmp_path / "a" / f"b{tiles.suffix(codec)}"
    written = tiles.write_level(path, level, codec)
    data = path.read_bytes()
    assert written[1:] == (path.stat().st_size, zlib.crc32(path.read_bytes()))
    assert np.array_equal(tiles.read_level(path), level)
    assert tiles.encode_level(level, codec) == data, "the same array must give the same bytes"
    tiles.write_level(path, level + 1, codec)
    assert np.array_equal(tiles.read_level(path), level + 1), "a later write takes the place of an earlier one"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "no temporary file may stay"


def test_tiles_are_tiled_16_bit_tiff_without_metadata_that_other_readers_read() -> None:
    level = picture(700, 530)
    data = tiles.encode_level(level, "deflate", tile=128)
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page = tiff.pages.first
        assert (page.tilewidth, page.tilelength, page.bitspersample) == (128, 128, 16)
        named = {tag.name for tag in page.tags.values()}
    assert not named & {"ImageDescription", "Software", "DateTime", "Artist", "HostComputer", "DocumentName"}
    with Image.open(io.BytesIO(data)) as other:  # libtiff
        assert np.array_equal(np.asarray(other).astype(np.uint16), level)


def test_htj2k_is_a_bare_codestream() -> None:
    level = picture(300, 200, bits=12)
    data = tiles.encode_level(level, "htj2k")
    assert data[:4] == b"\xff\x4f\xff\x51"
    assert np.array_equal(imagecodecs.htj2k_decode(data), level)


def test_an_encoder_that_errs_is_noticed_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = tiles.encode_level

    def wrong(level: np.ndarray, codec: Codec, tile: int) -> bytes:
        return right(level ^ (np.arange(level.size).reshape(level.shape) == 5).astype(np.uint16), codec, tile)

    monkeypatch.setattr(tiles, "encode_level", wrong)
    with pytest.raises(tiles.TileError, match="does not read back equal"):
        tiles.write_level(tmp_path / "a.tif", picture(40, 40))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tif"
    tiles.write_level(path, picture(40, 40))
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tiles.write_level(path, picture(50, 50))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tif"]


@pytest.mark.parametrize("data", [b"", b"II*\0", b"\xff\x4f\xff\x51", b"not a picture at all"])
def test_bytes_that_hold_no_level_are_a_tile_error(data: bytes) -> None:
    with pytest.raises(tiles.TileError):
        tiles.decode_level(data)


def test_a_level_of_another_depth_is_a_tile_error(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "8bit.tif", np.zeros((20, 20), np.uint8))
    with pytest.raises(tiles.TileError, match="expected 16-bit grayscale, found uint8"):
        tiles.read_level(tmp_path / "8bit.tif")
