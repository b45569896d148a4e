"""Levels of a picture, to and from files: tiled TIFF, or a bare HTJ2K codestream.

A level is named by its longest side. Each of its pixels is the mean of the source pixels that it covers, rounded to 16
bits. Where a level is a whole number of times smaller than the next larger one, which the usual ones are, it is the
mean of that one's blocks: the same up to the larger one's rounding, and twenty times as fast.
"""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from preprocessing.settings import FULL, Codec

Level = NDArray[np.uint16]


class _TileCodec(NamedTuple):
    """How the values of a TIFF's tile are coded."""

    encode: Callable[[Any], bytes | bytearray]
    decode: Callable[[Any], Any]
    options: dict[str, Any]  # of tifffile's writer; where "predictor" is set, each value is coded less its left one


# Zstandard's level 3 with the horizontal predictor: 0.39 of the raw size, and the fastest to decode on a CPU of those
# that compress. Deflate and LZW are what nvTIFF decodes on a GPU, HTJ2K what nvJPEG2000 does.
_TILE_CODECS: dict[str, _TileCodec] = {
    "zstd": _TileCodec(
        lambda values: imagecodecs.zstd_encode(values, level=3),
        imagecodecs.zstd_decode,
        {"compression": "zstd", "predictor": True},
    ),
    "deflate": _TileCodec(
        lambda values: imagecodecs.deflate_encode(values, level=6),
        imagecodecs.deflate_decode,
        {"compression": "zlib", "predictor": True},
    ),
    "lzw": _TileCodec(imagecodecs.lzw_encode, imagecodecs.lzw_decode, {"compression": "lzw", "predictor": True}),
    "none": _TileCodec(bytes, bytes, {}),
}
_CODESTREAM = b"\xff\x4f\xff\x51"  # SOC and SIZ, ITU-T T.800 A.4.1


class Staged(NamedTuple):
    """A level's file that is written and compared, but not yet sure to outlast a power cut: see `settle`."""

    temporary: Path
    bytes: int
    crc32: int


class TileError(Exception):
    """A level did not read back as it was written, or a file holds no level."""


def suffix(codec: Codec) -> str:
    """File name ending of a codec's levels."""
    return ".j2k" if codec == "htj2k" else ".tif"


def level_sizes(levels: Sequence[str], height: int, width: int) -> dict[str, tuple[int, int]]:
    """Rows and columns of each level of a crop of `height` × `width`: never enlarged, at least 1.

    The aspect ratio is kept to half a pixel of the smallest level. A level whose longest side is a whole multiple of
    the next smaller one's is that multiple of it in both directions.

    Args:
        levels: names, largest first.
    """
    longest = max(height, width)
    sizes: dict[str, tuple[int, int]] = {}
    smaller, rows, columns = 0, 0, 0
    for level in reversed(levels):
        if level == FULL or int(level) >= longest:
            sizes[level] = height, width
            continue
        size = int(level)
        times = size // smaller if smaller and size % smaller == 0 else 0
        if times and times * rows <= height and times * columns <= width:
            rows, columns = times * rows, times * columns
        else:
            rows, columns = max(1, round(height * size / longest)), max(1, round(width * size / longest))
        smaller, sizes[level] = size, (rows, columns)
    return {level: sizes[level] for level in levels}


def build_levels(picture: Level, levels: Sequence[str]) -> dict[str, Level]:
    """Every level of a crop.

    Args:
        picture: the crop, uint16 [height, width].
        levels: names, largest first.

    Returns:
        uint16 arrays by name; levels of equal size are the same object.
    """
    built: dict[str, Level] = {}
    source = larger = np.ascontiguousarray(picture)
    for level, (rows, columns) in level_sizes(levels, *picture.shape).items():
        if (rows, columns) != larger.shape:
            times = larger.shape[0] // rows
            blocks = larger.shape == (times * rows, times * columns)
            resized = cv2.resize(larger if blocks else source, (columns, rows), interpolation=cv2.INTER_AREA)
            larger = np.ascontiguousarray(resized, dtype=np.uint16)
        built[level] = larger
    return built


def encode_level(level: Level, codec: Codec = "zstd", tile: int = 256) -> bytes:
    """A level, uint16 [rows, columns], as the bytes of a file. The same array gives the same bytes; no metadata."""
    if codec == "htj2k":
        return bytes(imagecodecs.htj2k_encode(np.ascontiguousarray(level), reversible=True))
    encode, _, options = _TILE_CODECS[codec]
    file = io.BytesIO()
    encoded: Any = (encode(values.data) for values in _tiles(level, tile, "predictor" in options))
    tifffile.imwrite(
        file,
        encoded,
        shape=level.shape,
        dtype=np.uint16,
        tile=(tile, tile),
        photometric="minisblack",
        metadata=None,
        software=False,
        **options,
    )
    return file.getvalue()


def decode_level(data: bytes) -> Level:
    """The level in a file's bytes: uint16 [rows, columns].

    Raises:
        TileError: the bytes hold no 16-bit grayscale picture.
    """
    try:
        if data[:4] == _CODESTREAM:
            level = imagecodecs.htj2k_decode(data)
        else:
            with tifffile.TiffFile(io.BytesIO(data)) as tiff:
                level = tiff.pages.first.asarray(maxworkers=1)
    except Exception as error:  # noqa: BLE001  damaged bytes raise whatever the codec likes
        raise TileError(f"not readable as a level ({type(error).__name__})") from None
    if level.dtype != np.uint16 or level.ndim != 2:
        raise TileError(f"expected 16-bit grayscale, found {level.dtype} of shape {level.shape}")
    return level


def read_level(path: Path) -> Level:
    """A level's file as uint16 [rows, columns].

    Raises:
        TileError: the file holds no level.
        OSError: it cannot be read.
    """
    return decode_level(path.read_bytes())


def stage_level(level: Level, folder: Path, codec: Codec = "zstd", tile: int = 256) -> Staged:
    """Write a level to a temporary file, read it back and compare. It counts once `settle` has named it.

    Args:
        level: uint16 [rows, columns].
        folder: for the temporary file, on the file system on which the level will lie.

    Raises:
        TileError: what was read back differs from `level`.
        OSError: the disk is full or cannot be written.
    """
    temporary = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        temporary.write_bytes(encode_level(level, codec, tile))
        data = temporary.read_bytes()
        if not _holds(data, level, codec, tile):
            raise TileError("what was written does not read back equal")
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return Staged(temporary, len(data), imagecodecs.deflate_crc32(data))  # zlib's value, at seven times its speed


def settle(staged: Path, path: Path, durable: bool = True) -> None:
    """Wait until a staged file is on the disk, unless it need not be `durable`, then give it its name; the folder is
    made.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if durable:
            with staged.open("rb+") as file:
                os.fsync(file.fileno())
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def write_level(path: Path, level: Level, codec: Codec = "zstd", tile: int = 256) -> Staged:
    """Write a level through a temporary file beside it, read it back, compare, and only then give it its name.

    Raises:
        TileError: what was read back differs from `level`.
        OSError: the disk is full or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = stage_level(level, path.parent, codec, tile)
    settle(staged.temporary, path)
    return staged


def _tiles(level: Level, side: int, differences: bool) -> Iterator[Level]:
    """A level's tiles in a TIFF's order, filled up with zeros, as they are coded; each overwrites the one before."""
    rows, columns = level.shape
    coded = np.empty((side, side), np.uint16)
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            values = level[top : top + side, left : left + side]
            if values.shape != (side, side):
                missing = ((0, side - values.shape[0]), (0, side - values.shape[1]))
                values = np.pad(values, missing)
            if differences:
                imagecodecs.delta_encode(values, axis=-1, out=coded)
            else:
                coded[...] = values
            yield coded


def _holds(data: bytes, level: Level, codec: Codec, tile: int) -> bool:
    """Whether a file's bytes hold this level. Tiles are compared as they are coded: their differences need no sum."""
    if codec == "htj2k":
        return np.array_equal(decode_level(data), level)
    _, decode, options = _TILE_CODECS[codec]
    view = memoryview(data)
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as tiff:
            page = tiff.pages.first
            ours = (page.shape, page.dtype, page.tile) == (level.shape, np.uint16, (tile, tile))
            spans = list(zip(page.dataoffsets, page.databytecounts, strict=True))
        tiles = _tiles(level, tile, "predictor" in options)
        return ours and all(
            decode(view[start : start + count]) == values.tobytes()
            for (start, count), values in zip(spans, tiles, strict=True)
        )
    except (RuntimeError, ValueError, tifffile.TiffFileError):  # what codecs and tifffile raise
        return False
