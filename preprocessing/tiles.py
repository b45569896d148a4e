"""Levels of a picture, to and from files: tiled TIFF, or a bare HTJ2K codestream.

A level is named by its longest side. It is made from the full crop by area averaging, so that each of its pixels is
the mean of the source pixels that it covers, rounded to 16 bits.
"""

from __future__ import annotations

import io
import os
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from preprocessing.settings import FULL, Codec

Level = NDArray[np.uint16]

# Zstandard's level 3 with the horizontal predictor: 0.39 of the raw size, and the fastest to decode on a CPU of those
# that compress. Deflate and LZW are what nvTIFF decodes on a GPU, HTJ2K what nvJPEG2000 does.
_TIFF_COMPRESSION: dict[str, dict[str, Any]] = {
    "zstd": {"compression": "zstd", "compressionargs": {"level": 3}, "predictor": True},
    "deflate": {"compression": "zlib", "compressionargs": {"level": 6}, "predictor": True},
    "lzw": {"compression": "lzw", "predictor": True},
    "none": {},
}
_CODESTREAM = b"\xff\x4f\xff\x51"  # SOC and SIZ, ITU-T T.800 A.4.1


class Written(NamedTuple):
    """A level's file as it lies on the disk."""

    bytes: int
    crc32: int


class TileError(Exception):
    """A level did not read back as it was written, or a file holds no level."""


def suffix(codec: Codec) -> str:
    """File name ending of a codec's levels."""
    return ".j2k" if codec == "htj2k" else ".tif"


def level_size(level: str, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a level of a crop of `height` × `width`: never enlarged, aspect ratio kept, at least 1."""
    longest = max(height, width)
    if level == FULL or int(level) >= longest:
        return height, width
    size = int(level)
    return max(1, round(height * size / longest)), max(1, round(width * size / longest))


def build_levels(picture: Level, levels: Sequence[str]) -> dict[str, Level]:
    """Every level of a crop.

    Args:
        picture: the crop, uint16 [height, width].
        levels: names, largest first.

    Returns:
        uint16 arrays by name; levels of equal size are the same object.
    """
    built: dict[str, Level] = {}
    by_size: dict[tuple[int, int], Level] = {picture.shape[:2]: np.ascontiguousarray(picture)}
    for level in levels:
        rows, columns = level_size(level, *picture.shape)
        if (rows, columns) not in by_size:
            resized = cv2.resize(picture, (columns, rows), interpolation=cv2.INTER_AREA)
            by_size[rows, columns] = np.ascontiguousarray(resized, dtype=np.uint16)
        built[level] = by_size[rows, columns]
    return built


def encode_level(level: Level, codec: Codec = "zstd", tile: int = 256) -> bytes:
    """A level, uint16 [rows, columns], as the bytes of a file. The same array gives the same bytes; no metadata."""
    if codec == "htj2k":
        return bytes(imagecodecs.htj2k_encode(np.ascontiguousarray(level), reversible=True))
    file = io.BytesIO()
    tifffile.imwrite(
        file,
        level,
        tile=(tile, tile),
        photometric="minisblack",
        metadata=None,
        software=False,
        maxworkers=1,
        **_TIFF_COMPRESSION[codec],
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


def write_level(
    path: Path, level: Level, codec: Codec = "zstd", tile: int = 256, scratch: Path | None = None
) -> Written:
    """Write a level through a temporary file, read it back, compare, and only then give it its name.

    Args:
        path: where it will lie; its folder is made.
        level: uint16 [rows, columns].
        scratch: folder for the temporary file, on the same file system; the target's own without it.

    Raises:
        TileError: what was read back differs from `level`.
        OSError: the disk is full or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = (scratch or path.parent) / f".{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(encode_level(level, codec, tile))
            file.flush()
            os.fsync(file.fileno())
        data = temporary.read_bytes()
        if not np.array_equal(decode_level(data), level):
            raise TileError("what was written does not read back equal")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return Written(len(data), zlib.crc32(data))
