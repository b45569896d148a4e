"""Which decoder decodes what, and why; docs/pixels.md has the measurements.

No decoder is shown a source file. Each gets the codestream that the guard has read and, where it wants a DICOM file, a
minimal one in memory whose tags are the codestream's own facts: what a source file says wrongly cannot mislead it, and
an error text cannot quote a tag.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from struct import pack, unpack

import dicomsdl  # its names come from a compiled module that type checkers cannot see
import imagecodecs
import numpy as np
from libjpeg.utils import decode as libjpeg_decode
from numpy.typing import NDArray
from rle.rle import decode_segment

from preprocessing.codestream import Codestream, Kind

dicomsdl.set_loglevel(dicomsdl.LogLevel.DISABLE)  # pyright: ignore[reportAttributeAccessIssue]  it prints what it raises
Decode = Callable[[bytes, Codestream], NDArray[np.integer]]


@dataclass(frozen=True)
class Codec:
    """A decoder of one kind of codestream.

    Attributes:
        name: for the manifest's column `decoder`.
        decode: bytes and facts to [rows, columns]; any exception is a refusal.
        lossless: whether it gives back what was encoded, unused bits included.
    """

    name: str
    decode: Decode
    lossless: bool = True


def from_dicomsdl(data: bytes, facts: Codestream) -> NDArray[np.integer]:
    """Decode with dicomsdl's `copyFrameData`, which gives stored values without rescaling them."""
    dataset = dicomsdl.open_memory(_minimal_dicom(data, facts))  # pyright: ignore[reportAttributeAccessIssue]
    # Zeros, so that what a decoder leaves out is seen as such and no other picture's memory comes back.
    values = np.zeros((facts.rows, facts.columns), np.uint8 if facts.precision <= 8 else np.uint16)
    dataset.copyFrameData(0, values)
    return values


def from_libjpeg_turbo(data: bytes, facts: Codestream) -> NDArray[np.integer]:
    """Decode lossless JPEG with libjpeg-turbo through imagecodecs."""
    return imagecodecs.jpeg8_decode(data)


def from_libjpeg(data: bytes, facts: Codestream) -> NDArray[np.integer]:
    """Decode with pylibjpeg-libjpeg, the ISO reference code."""
    return libjpeg_decode(data)


def from_openjpeg(data: bytes, facts: Codestream) -> NDArray[np.integer]:
    """Decode HTJ2K with OpenJPEG through imagecodecs."""
    return imagecodecs.jpeg2k_decode(data, numthreads=1)


def from_charls(data: bytes, facts: Codestream) -> NDArray[np.integer]:
    """Decode JPEG-LS with CharLS through imagecodecs."""
    return imagecodecs.jpegls_decode(data)


def from_packbits(data: bytes, facts: Codestream) -> NDArray[np.integer]:
    """Decode RLE (PS3.5 G) with imagecodecs, or where it finds a segment's padding odd, with pylibjpeg-rle. A segment
    of another length than the picture's raises; less than a row too many is padding."""
    width = -(-facts.precision // 8)
    size = facts.rows * facts.columns * width
    try:
        values = imagecodecs.dicomrle_decode(data, f"<u{width}")
    except RuntimeError:  # ImcdError is one
        values = _join_segments(data, width, facts)
    if not size <= len(values) < size + facts.columns * width:
        raise ValueError(f"{len(values)} bytes; {size} expected")
    return np.frombuffer(values, f"<u{width}", facts.rows * facts.columns).reshape(facts.rows, facts.columns)


def from_deflate(data: bytes, facts: Codestream) -> NDArray[np.integer]:
    """Inflate a frame of Deflated Image Frame Compression (PS3.5 A.4.13)."""
    width = -(-facts.precision // 8)
    size = facts.rows * facts.columns * width
    values = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 2)
    if not size <= len(values) <= size + 1:
        raise ValueError(f"{len(values)} bytes or more; {size} expected")
    return np.frombuffer(bytearray(values[:size]), f"<u{width}").reshape(facts.rows, facts.columns)


CODECS: dict[Kind, Codec] = {
    # dicomsdl wherever its result is right once it is shown the codestream's own facts, and nothing as exact is faster.
    # libjpeg-turbo and CharLS give the same values for every reference and 1,500 mutants, in 0.7 and 0.85 of the time;
    # dicomsdl refuses JPEG-LS below 8 bits besides.
    Kind.JPEG_LOSSLESS: Codec("imagecodecs", from_libjpeg_turbo),
    Kind.JPEG_LS: Codec("imagecodecs", from_charls),
    Kind.JPEG_2000: Codec("dicomsdl", from_dicomsdl),
    Kind.JPEG_BASELINE: Codec("dicomsdl", from_dicomsdl, lossless=False),
    # dicomsdl is a grey level off pydicom's values here and there: its inverse cosine transform rounds otherwise.
    Kind.JPEG_EXTENDED: Codec("pylibjpeg", from_libjpeg, lossless=False),
    # dicomsdl has no codec. OpenJPEG and not the faster OpenJPH, whose errors imagecodecs prints and ignores: what it
    # then hands out is unwritten memory.
    Kind.HTJ2K: Codec("imagecodecs", from_openjpeg),
    Kind.DEFLATED: Codec("zlib", from_deflate),
    # dicomsdl writes past its buffer where segments hold more than the picture.
    Kind.RLE: Codec("imagecodecs", from_packbits),
}
_DICOMSDL_SYNTAXES = {
    Kind.JPEG_BASELINE: b"1.2.840.10008.1.2.4.50",
    Kind.JPEG_2000: b"1.2.840.10008.1.2.4.90",
}


def _join_segments(data: bytes, width: int, facts: Codestream) -> bytes:
    """RLE segments, the most significant byte's first, as little-endian values."""
    count, *offsets = unpack("<16I", data[:64])
    ends = [*offsets[1:count], len(data)]
    planes = [decode_segment(data[start:end]) for start, end in zip(offsets[:count], ends, strict=True)]
    pixels = facts.rows * facts.columns
    if count != width or not all(pixels <= len(plane) < pixels + facts.columns for plane in planes):
        raise ValueError(f"{count} segments of {[len(plane) for plane in planes]} bytes; {width} of {pixels} expected")
    return np.stack([np.frombuffer(plane, np.uint8, pixels) for plane in reversed(planes)], axis=1).tobytes()


def _minimal_dicom(data: bytes, facts: Codestream) -> bytes:
    """A DICOM file (PS3.10) of one unsigned frame with no tags but those that a decoder needs."""
    bits = 8 if facts.precision <= 8 else 16
    meta = _element(0x0002, 0x0010, b"UI", _DICOMSDL_SYNTAXES[facts.kind])
    numbers = {
        0x0002: 1,  # Samples per Pixel
        0x0010: facts.rows,
        0x0011: facts.columns,
        0x0100: bits,
        0x0101: facts.precision,
        0x0102: facts.precision - 1,
        0x0103: 0,  # Pixel Representation: the sign is extended by us
    }
    tags = {element: _element(0x0028, element, b"US", pack("<H", number)) for element, number in numbers.items()}
    tags[0x0004] = _element(0x0028, 0x0004, b"CS", b"MONOCHROME2")
    padding = b"\0" * (len(data) % 2)
    return b"".join([
        bytes(128), b"DICM", _element(0x0002, 0x0000, b"UL", pack("<I", len(meta))), meta,
        *(tags[element] for element in sorted(tags)),
        pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF), pack("<HHI", 0xFFFE, 0xE000, 0),
        pack("<HHI", 0xFFFE, 0xE000, len(data) + len(padding)), data, padding, pack("<HHI", 0xFFFE, 0xE0DD, 0),
    ])  # fmt: skip


def _element(group: int, element: int, representation: bytes, value: bytes) -> bytes:
    """An explicit little-endian data element with a short length (PS3.5 7.1.2)."""
    if len(value) % 2:
        value += b"\0" if representation == b"UI" else b" "
    return pack("<HH2sH", group, element, representation, len(value)) + value
