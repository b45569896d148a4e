"""PNG, JPEG and TIFF pictures: the grey values in them.

Each is checked as a DICOM codestream is, before a decoder sees it: size, bits, and that its end is there.
"""

from __future__ import annotations

from struct import unpack_from
from typing import Any

import cv2
import imagecodecs
import numpy as np
from numpy.typing import NDArray
from tifffile import TiffFile

from preprocessing.codestream import jpeg_segments
from preprocessing.dicom_facts import Header
from preprocessing.dicom_header import Source
from preprocessing.guard import Reason, Rejection, check_size
from preprocessing.settings import ConvertSettings

_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "png",
    b"\xff\xd8\xff": "jpeg",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
    b"II+\0": "tiff",
    b"MM\0+": "tiff",
}
_SOF = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_FROM_RGB = np.array([0.299, 0.587, 0.114], np.float32)  # luminance, ITU-R BT.601


def sniff(head: bytes) -> str | None:
    """`png`, `jpeg`, `tiff`, or None."""
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


def decode(file: Source, kind: str, settings: ConvertSettings) -> tuple[NDArray[np.integer], Header, str]:
    """The picture, [rows, columns] of uint8, uint16 or int16; its facts; and the decoder's name.

    Colour becomes its luminance. 8-bit pictures carry the window 0 … 255, which leaves them as they are.

    Raises:
        Rejection: damaged, cut, too large, or neither 8 nor 16 bits of integers.
    """
    try:
        if kind == "tiff":
            return _decode_tiff(file, settings)
        file.seek(0)
        data = file.read()
        (_check_png if kind == "png" else _check_jpeg)(data, settings.max_pixels)
        values = (imagecodecs.png_decode if kind == "png" else imagecodecs.jpeg8_decode)(data)
    except Rejection:
        raise
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  codecs raise errors of their own
        raise Rejection(Reason.DECODE_FAILED, f"{kind}: {type(error).__name__}") from None
    grey = _grey(np.asarray(values))
    return grey, _facts(kind, grey, "MONOCHROME2"), "imagecodecs"


def _check_png(data: bytes, max_pixels: int) -> None:
    """The size in IHDR is possible, and the chunks run up to IEND (ISO/IEC 15948 5)."""
    if len(data) < 33:
        raise Rejection(Reason.TRUNCATED, f"a PNG of {len(data)} bytes")
    columns, rows = unpack_from(">II", data, 16)
    check_size(rows, columns, max_pixels)
    position = 8
    while position + 12 <= len(data):
        length, name = unpack_from(">I4s", data, position)
        position += 12 + length
        if name == b"IEND" and position <= len(data):
            return
    raise Rejection(Reason.TRUNCATED, "the PNG has no end chunk")


def _check_jpeg(data: bytes, max_pixels: int) -> None:
    """The size in the frame header is possible, and there is an end marker (ISO/IEC 10918-1 B)."""
    for marker, start, _ in jpeg_segments(data):
        if marker in _SOF:
            rows, columns = unpack_from(">HH", data, start + 1)
            check_size(rows, columns, max_pixels)
            if data.rfind(b"\xff\xd9") < start:
                raise Rejection(Reason.TRUNCATED, "the JPEG has no end marker")
            return
    raise Rejection(Reason.TRUNCATED, "the JPEG ends within its header")


def _decode_tiff(file: Source, settings: ConvertSettings) -> tuple[NDArray[np.integer], Header, str]:
    """A page of a TIFF file; reduced copies (NewSubfileType 1) are no pages."""
    file.seek(0)
    with TiffFile(file, name="picture.tif") as tiff:
        every: list[Any] = list(tiff.pages)
        pages = [page for page in every if not page.is_reduced]
        if not pages:
            raise Rejection(Reason.DECODE_FAILED, "a TIFF without a page")
        if len(pages) > 1 and settings.frame is None:
            raise Rejection(Reason.MULTI_FRAME, f"{len(pages)} pages")
        index = settings.frame or 0 if len(pages) > 1 else 0
        if index >= len(pages):
            raise Rejection(Reason.MULTI_FRAME, f"{len(pages)} pages; page {index} asked for (the first is 0)")
        page = pages[index]
        check_size(page.imagelength, page.imagewidth, settings.max_pixels)
        if page.photometric not in (0, 1, 2, 6):  # MINISWHITE, MINISBLACK, RGB, YCBCR
            raise Rejection(Reason.COLOUR, "a palette, CMYK or another TIFF; grey, RGB or YCbCr expected")
        if page.dtype is None or page.dtype not in (np.uint8, np.uint16, np.int16):
            raise Rejection(Reason.UNSUPPORTED_PIXELS, f"{page.dtype} pixels; 8 or 16 bits of integers expected")
        end = file.seek(0, 2)
        if any(o + n > end for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)):
            raise Rejection(Reason.TRUNCATED, "the TIFF ends within its pixel data")
        grey = _grey(np.asarray(page.asarray()))
        inverse = page.photometric == 0  # MINISWHITE
    return grey, _facts("tiff", grey, "MONOCHROME1" if inverse else "MONOCHROME2"), "tifffile"


def _grey(values: NDArray[Any]) -> NDArray[np.integer]:
    """[rows, columns] out of one to four channels: alpha dropped, equal channels as one, colour as its luminance."""
    if values.ndim == 2:
        return values
    if values.ndim != 3 or values.shape[2] > 4:
        raise Rejection(Reason.COLOUR, f"{values.shape} values; rows, columns and up to four channels expected")
    colour = values[..., :3] if values.shape[2] > 2 else values[..., :1]
    if all(np.array_equal(colour[..., 0], colour[..., channel]) for channel in range(1, colour.shape[2])):
        return np.ascontiguousarray(colour[..., 0])
    return (
        np.rint(cv2.transform(colour.astype(np.float32), _FROM_RGB[None, :]))
        .reshape(colour.shape[:2])
        .astype(values.dtype)
    )


def _facts(kind: str, grey: NDArray[np.integer], photometric: str) -> Header:
    bits = 8 * grey.dtype.itemsize
    offset = -(2 ** (bits - 1)) if grey.dtype.kind == "i" else 0
    if bits == 8:
        window: dict[str, Any] = {
            "window_center": [127.5],
            "window_width": [255.0],
            "window_function": ["LINEAR_EXACT"],
        }
    else:
        window = {}
    return Header(format=kind, photometric=photometric, bits_stored=bits, value_offset=offset, **window)
