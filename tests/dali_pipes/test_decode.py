"""Levels decoded on the host: against what was encoded, and against tifffile."""

import contextlib
import io
import struct

import numpy as np
import pytest
import tifffile

from dali_pipes.decode import decode
from preprocessing.tiles import TileError, encode_level
from tests.dali_pipes.stores import smooth

CODECS = ("zstd", "deflate", "lzw", "none", "htj2k")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [(512, 289), (300, 700), (256, 256), (16, 16), (1, 5)])
def test_a_level_comes_back_as_it_was(codec, size):
    level = np.random.default_rng(0).integers(0, 65536, size).astype(np.uint16)
    assert np.array_equal(decode(encode_level(level, codec), size), level)


@pytest.mark.parametrize("codec", CODECS)
def test_a_region_is_cut_out_of_the_level(codec):
    level = smooth(300, 700, 0)
    data = encode_level(level, codec, tile=64)
    rng = np.random.default_rng(0)
    for _ in range(30):
        (top, bottom), (left, right) = (sorted(rng.choice(side + 1, 2, replace=False)) for side in level.shape)
        found = decode(data, level.shape, (int(top), int(left), int(bottom - top), int(right - left)))
        assert np.array_equal(found, level[top:bottom, left:right])


@pytest.mark.parametrize("codec", ["zstd", "deflate", "lzw"])
def test_the_tiles_that_a_region_touches_are_decoded_and_no_others(codec):
    """Every other tile is overwritten: whoever decodes one fails, or gives another picture."""
    level = smooth(1024, 1024, 0)
    data = bytearray(encode_level(level, codec))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as tiff:
        page = tiff.pages.first
        for tile, (offset, count) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
            if tile not in (5, 6):  # of four in a row: those of columns 256 to 767 in rows 256 to 511
                data[offset : offset + count] = b"\xff" * count
    found = decode(bytes(data), level.shape, (260, 300, 240, 400))
    assert np.array_equal(found, level[260:500, 300:700])
    with pytest.raises(TileError, match="tile 0"):
        decode(bytes(data), level.shape)


@pytest.mark.parametrize("options", [{"byteorder": ">"}, {"bigtiff": True}, {"tile": None}, {"compression": "lzma"}])
def test_tiff_of_another_layout_is_read_too(options):
    level, file = smooth(100, 80, 0), io.BytesIO()
    tifffile.imwrite(file, level, **{"tile": (32, 32), "photometric": "minisblack", "metadata": None} | options)
    assert np.array_equal(decode(file.getvalue(), level.shape), level)
    assert np.array_equal(decode(file.getvalue(), level.shape, (10, 20, 30, 40)), level[10:40, 20:60])


@pytest.mark.parametrize("codec", CODECS)
def test_a_level_of_another_size_is_named(codec):
    with pytest.raises(TileError, match="expected 64 × 49 pixels, found 64 × 48"):
        decode(encode_level(smooth(64, 48, 0), codec), (64, 49))


def test_pictures_of_8_bits_are_no_levels():
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((64, 48), np.uint8), tile=(16, 16), metadata=None)
    with pytest.raises(TileError, match="16-bit"):
        decode(file.getvalue(), (64, 48))


@pytest.mark.parametrize("codec", ["zstd", "deflate", "lzw", "none"])
def test_damage_to_a_tiff_is_an_error_or_other_values_and_never_a_crash(codec):
    """The CRC-32 finds all damage before; the decoder must stand it even so. (OpenJPH does not: of damaged HTJ2K
    codestreams some keep it busy for ever.)"""
    level = smooth(80, 70, 0)
    data = encode_level(level, codec, tile=64)
    rng = np.random.default_rng(0)
    mutants = [data[:length] for length in rng.integers(0, len(data), 30)]
    for _ in range(150):
        changed = bytearray(data)
        changed[rng.integers(0, len(data) if rng.random() < 0.5 else min(len(data), 240))] = rng.integers(0, 256)
        mutants.append(bytes(changed))
    mutants.append(data[:4] + struct.pack("<I", len(data) + 9) + data[8:])
    for mutant in mutants:
        with contextlib.suppress(TileError):
            assert decode(mutant, level.shape).shape == level.shape
