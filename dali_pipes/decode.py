"""Levels decoded on the host, whole or a region alone.

The tiled TIFF that `preprocessing.tiles` writes has one small directory, which is read here without tifffile: opening a
file with that takes 0.2 ms of Python for each sample, a third of what decoding a 512-pixel level costs, and keeps every
other thread waiting. imagecodecs lets go of the interpreter's lock, so that tiles of several samples decode side by
side. Whatever has another layout goes through `preprocessing.tiles.decode_level`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from preprocessing.tiles import TileError, decode_level

Level = NDArray[np.uint16]
Region = tuple[int, int, int, int]  # top, left, rows, columns

_LITTLE_ENDIAN = b"II*\0"  # classic TIFF, TIFF 6.0 section 2
_FIELD_BYTES = {3: 2, 4: 4}  # SHORT and LONG
_WIDTH, _LENGTH, _BITS, _COMPRESSION, _SAMPLES, _PREDICTOR = 256, 257, 258, 259, 277, 317
_TILE_WIDTH, _TILE_LENGTH, _OFFSETS, _BYTE_COUNTS = 322, 323, 324, 325
_HORIZONTAL = 2

_DECODERS: dict[int, Callable[..., Any]] = {
    1: lambda data, out: data,
    5: imagecodecs.lzw_decode,
    8: imagecodecs.deflate_decode,
    50000: imagecodecs.zstd_decode,
}


class _Directory(NamedTuple):
    """Where the tiles of a file are, and how they are stored."""

    rows: int
    columns: int
    tile: tuple[int, int]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    decoder: Callable[..., Any]
    predicted: bool


def decode(data: bytes, size: tuple[int, int], region: Region | None = None) -> Level:
    """The level in a file's bytes, uint16 [rows, columns].

    Args:
        data: the file.
        size: rows and columns of the level.
        region: of the level, inside it, where not all is wanted; only the tiles that it touches are decoded.

    Raises:
        TileError: the bytes hold no 16-bit grayscale picture of that size.
    """
    top, left, rows, columns = region or (0, 0, *size)
    found = _directory(data)
    if found is None:
        level = decode_level(data)
        _check_size(level.shape, size)
        return np.ascontiguousarray(level[top : top + rows, left : left + columns])
    _check_size((found.rows, found.columns), size)
    level = np.empty((rows, columns), np.uint16)
    height, width = found.tile
    across = -(-found.columns // width)
    scratch = np.empty((height, width), np.uint16)
    for down in range(top // height, -(-(top + rows) // height)):
        for right in range(left // width, -(-(left + columns) // width)):
            number = down * across + right
            # The part of the tile that is wanted: rows from `first` on, columns up to `end`, the first `skip` unseen.
            first, last = max(top - down * height, 0), min(top + rows - down * height, height)
            skip, end = max(left - right * width, 0), min(left + columns - right * width, width)
            tile = _tile(data, found, number, scratch)[first:last, :end]
            y, x = down * height + first - top, right * width + skip - left
            place = level[y : y + last - first, x : x + end - skip]
            if found.predicted and not skip:
                imagecodecs.delta_decode(tile, axis=1, out=place)
            else:
                place[:] = (imagecodecs.delta_decode(tile, axis=1) if found.predicted else tile)[:, skip:]
    return level


def _tile(data: bytes, found: _Directory, number: int, scratch: Level) -> Level:
    """A tile as it was before compression."""
    start, size = found.offsets[number], found.sizes[number]
    try:
        values = found.decoder(memoryview(data)[start : start + size], out=scratch.view(np.uint8).reshape(-1))
    except Exception as error:  # noqa: BLE001  damaged bytes raise whatever the codec likes
        raise TileError(f"tile {number} is not readable ({type(error).__name__})") from None
    if len(values) != scratch.nbytes:
        raise TileError(f"tile {number}: expected {scratch.nbytes} bytes, found {len(values)}")
    return np.frombuffer(values, "<u2").reshape(scratch.shape)


def _directory(data: bytes) -> _Directory | None:
    """The first directory of a file as `preprocessing.tiles` writes it; None where anything is otherwise."""
    try:
        if data[:4] != _LITTLE_ENDIAN:
            return None
        (start,) = struct.unpack_from("<I", data, 4)
        (count,) = struct.unpack_from("<H", data, start)
        fields = {
            tag: _values(data, start + 2 + 12 * place, kind, number)
            for place in range(count)
            for tag, kind, number in [struct.unpack_from("<HHI", data, start + 2 + 12 * place)]
            if kind in _FIELD_BYTES
        }
        (bits,), (samples,), (compression,) = fields[_BITS], fields[_SAMPLES], fields[_COMPRESSION]
        (predictor,) = fields.get(_PREDICTOR, (1,))
        (rows,), (columns,) = fields[_LENGTH], fields[_WIDTH]
        (height,), (width,) = fields[_TILE_LENGTH], fields[_TILE_WIDTH]
        offsets, sizes = fields[_OFFSETS], fields[_BYTE_COUNTS]
        known = (bits, samples) == (16, 1) and compression in _DECODERS and predictor in (1, _HORIZONTAL)
        tiles = -(-rows // height) * -(-columns // width)
        if not known or min(rows, columns) < 1 or not len(offsets) == len(sizes) == tiles:
            return None
    except (KeyError, ValueError, ZeroDivisionError, struct.error):
        return None
    decoder = _DECODERS[compression]
    return _Directory(rows, columns, (height, width), offsets, sizes, decoder, predictor == _HORIZONTAL)


def _values(data: bytes, entry: int, kind: int, number: int) -> tuple[int, ...]:
    """A field's numbers: in the entry itself where they fit, else where it says."""
    inside = number * _FIELD_BYTES[kind] <= 4
    at = entry + 8 if inside else struct.unpack_from("<I", data, entry + 8)[0]
    return struct.unpack_from(f"<{number}{'H' if kind == 3 else 'I'}", data, at)


def _check_size(found: tuple[int, ...], expected: tuple[int, int]) -> None:
    if found != expected:
        raise TileError(f"expected {expected[0]} × {expected[1]} pixels, found {found[0]} × {found[1]}")
