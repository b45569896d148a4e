"""The tags of a DICOM file that conversion wants, each checked, and where its pixel data lie.

pydicom reads the tags: it is slower than a C parser by a millisecond and cannot be crashed by them.
"""

from __future__ import annotations

import logging
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from struct import unpack
from typing import Any

from pydicom import config, dcmread
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset, read_preamble
from pydicom.tag import Tag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from preprocessing import dicom_facts
from preprocessing.dicom_facts import Header, is_tomosynthesis, text
from preprocessing.guard import Reason, Rejection

_PIXEL_DATA = 0x7FE00010
_FLOAT_PIXEL_DATA = (0x7FE00008, 0x7FE00009)
_UNDEFINED = 0xFFFFFFFF
_WIDE = (b"OB", b"OW", b"UN", b"OF", b"OD")  # value representations with a length of four bytes

_WANTED: list[Any] = [
    "SOPClassUID",
    "ImageType",
    "PresentationIntentType",
    "PatientID",
    "PatientAge",
    "ViewPosition",
    "PatientOrientation",
    "ViewCodeSequence",
    "Laterality",
    "ImageLaterality",
    "BreastImplantPresent",
    "ImagerPixelSpacing",
    "PixelSpacing",
    "NominalScannedPixelSpacing",
    "EstimatedRadiographicMagnificationFactor",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "VOILUTSequence",
    "RescaleIntercept",
    "RescaleSlope",
    "ModalityLUTSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "ExtendedOffsetTable",
]
_TAGS: list[Any] = [Tag(keyword) for keyword in ["SpecificCharacterSet", *_WANTED]]


Source = BufferedReader | BytesIO


@dataclass(frozen=True)
class PixelElement:
    """Where the pixel data lie: `source` is the file, or the inflated data set. `length` is None for fragments."""

    source: Source
    offset: int
    length: int | None
    little_endian: bool
    words: bool  # VR OW


@dataclass(frozen=True)
class DicomHeader:
    """A DICOM file's checked pixel description, its facts for the manifest, and its pixel data element."""

    facts: Header
    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    frames: int
    pixels: PixelElement
    extended_offsets: list[int]


def read(file: Source, frame: int | None, most_bytes: int) -> DicomHeader:
    """Read and check the tags up to the pixel data.

    Args:
        file: a seekable file.
        frame: taken out of a multi-frame file; its own functional groups count.
        most_bytes: that a deflated data set may inflate to.

    Raises:
        Rejection: no DICOM, damaged, out of range, in colour, without pixel data, or multi-frame and no frame chosen.
    """
    with _quiet(), config.disable_value_validation():
        try:
            dataset, source, syntax, little_endian, implicit = _parse(file, most_bytes)
            return _checked(dataset, source, syntax, little_endian, implicit, frame)
        except (Rejection, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001  pydicom raises whatever a damaged file provokes, also when asked later
            raise Rejection(Reason.BAD_HEADER, f"its tags cannot be read ({type(error).__name__})") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without pydicom's warnings and log lines: they quote values, which may name the patient."""
    logger = logging.getLogger("pydicom")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def _parse(file: Source, most_bytes: int) -> tuple[Dataset, Source, str, bool, bool]:
    """Tags before the pixel data; the source stands at the pixel data element."""
    file.seek(0)
    read_preamble(file, True)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    syntax = str(meta.get("TransferSyntaxUID", "")).strip()
    if syntax == DeflatedExplicitVRLittleEndian:
        source: Source = BytesIO(_inflate(file.read(), most_bytes))
        dataset = read_dataset(source, False, True, stop_when=_at_pixels, specific_tags=_TAGS)
        return dataset, source, syntax, True, False
    file.seek(0)
    dataset = dcmread(file, stop_before_pixels=True, force=True, specific_tags=_WANTED)
    implicit, little_endian = dataset.original_encoding
    syntax = syntax or _plain_syntax(bool(implicit), bool(little_endian))
    return dataset, file, syntax, bool(little_endian), bool(implicit)


def _plain_syntax(implicit: bool, little_endian: bool) -> str:
    """The syntax of a file that names none, by how its tags are written."""
    if implicit:
        return str(ImplicitVRLittleEndian)
    return str(ExplicitVRLittleEndian if little_endian else ExplicitVRBigEndian)


def _checked(
    dataset: Dataset, source: Source, syntax: str, little_endian: bool, implicit: bool, frame: int | None
) -> DicomHeader:
    if "Rows" not in dataset and "BitsAllocated" not in dataset and not _named(source, syntax):
        raise Rejection(Reason.NOT_AN_IMAGE, "none of DICOM, PNG, JPEG and TIFF")
    pixels = _find_pixels(source, little_endian, implicit)
    samples = _whole(dataset, "SamplesPerPixel", 1, 4, default=1)
    photometric = text(dataset, "PhotometricInterpretation").upper()
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        if photometric.startswith(("RGB", "YBR", "PALETTE", "HSV", "ARGB", "CMYK")) or samples != 1:
            raise Rejection(Reason.COLOUR, f"{samples} samples a pixel; MONOCHROME1 or MONOCHROME2 expected")
        raise Rejection(Reason.BAD_HEADER, "Photometric Interpretation is not MONOCHROME1 or MONOCHROME2")
    allocated = _whole(dataset, "BitsAllocated", 1, 64)
    stored = _whole(dataset, "BitsStored", 1, 64, default=allocated)
    if allocated not in (8, 16, 32) or stored > 16 or stored < 2:
        raise Rejection(Reason.UNSUPPORTED_PIXELS, f"Bits Allocated {allocated}, Bits Stored {stored}; 2 to 16 stored")
    high = _whole(dataset, "HighBit", 0, 63, default=stored - 1)
    if not stored <= high + 1 <= allocated:
        raise Rejection(Reason.BAD_HEADER, f"High Bit {high} with Bits Stored {stored}, Bits Allocated {allocated}")
    frames = _whole(dataset, "NumberOfFrames", 1, 100_000, default=1)
    tomosynthesis = is_tomosynthesis(dataset)
    if frames > 1 and frame is None:
        raise Rejection(Reason.MULTI_FRAME, f"{frames} frames{' of tomosynthesis' if tomosynthesis else ''}")
    if frame is not None and frame >= frames > 1:
        raise Rejection(Reason.MULTI_FRAME, f"{frames} frames; frame {frame} asked for (the first is 0)")
    signed = _whole(dataset, "PixelRepresentation", 0, 1, default=0) == 1
    return DicomHeader(
        facts=dicom_facts.read(
            dataset, syntax, photometric, stored, signed, frame if frames > 1 else None, little_endian
        ),
        rows=_whole(dataset, "Rows", 1, 65535),
        columns=_whole(dataset, "Columns", 1, 65535),
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=high,
        signed=signed,
        frames=frames,
        pixels=pixels,
        extended_offsets=_offsets(dataset),
    )


def _find_pixels(source: Source, little_endian: bool, implicit: bool) -> PixelElement:
    """The pixel data element at which the source stands (PS3.5 7.1, A.4)."""
    head = source.read(12)
    order = "<" if little_endian else ">"
    if len(head) < 8:
        raise Rejection(Reason.MISSING_PIXEL_DATA, "no Pixel Data (7FE0,0010)")
    group, element = unpack(order + "HH", head[:4])
    tag = group << 16 | element
    if tag in _FLOAT_PIXEL_DATA:
        raise Rejection(Reason.UNSUPPORTED_PIXELS, "floating-point pixels; stored integers expected")
    if tag != _PIXEL_DATA:
        raise Rejection(Reason.MISSING_PIXEL_DATA, "no Pixel Data (7FE0,0010)")
    wide = head[4:6] in _WIDE and not implicit
    if wide and len(head) < 12:
        raise Rejection(Reason.TRUNCATED, "the file ends within Pixel Data (7FE0,0010)")
    (length,) = unpack(order + "I", head[8:12] if wide else head[4:8])
    offset = source.tell() - len(head) + (12 if wide else 8)
    words = not wide or head[4:6] == b"OW"
    return PixelElement(source, offset, None if length == _UNDEFINED else length, little_endian, words)


def _inflate(data: bytes, most: int) -> bytes:
    """A deflated data set (PS3.5 A.5), at most `most` bytes of it; what comes after a cut is missed later."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = inflater.decompress(data, most)
    if inflater.unconsumed_tail:
        raise Rejection(Reason.TOO_LARGE, f"inflates to more than {most} bytes")
    return inflated


def _named(source: Source, syntax: str) -> bool:
    """Whether a file says that it is DICOM; an inflated data set has said so before."""
    if syntax == DeflatedExplicitVRLittleEndian:
        return True
    position = source.tell()
    source.seek(128)
    magic = source.read(4)
    source.seek(position)
    return magic == b"DICM"


def _at_pixels(tag: int, vr: str | None, length: int) -> bool:
    return tag >= _FLOAT_PIXEL_DATA[0]


def _whole(dataset: Dataset, keyword: str, least: int, most: int, default: int | None = None) -> int:
    """A whole-number tag within its range."""
    try:
        value = dataset.get(keyword)
        if value is None or value == "":
            if default is None:
                raise Rejection(Reason.BAD_HEADER, f"{keyword} is missing")
            return default
        number = int(value)
    except (ValueError, TypeError, OverflowError):
        raise Rejection(Reason.BAD_HEADER, f"{keyword} is no whole number") from None
    if not least <= number <= most:
        raise Rejection(Reason.BAD_HEADER, f"{keyword} is {number}; {least} to {most} expected")
    return number


def _offsets(dataset: Dataset) -> list[int]:
    """The Extended Offset Table (7FE0,0001), empty where there is none."""
    table = dataset.get("ExtendedOffsetTable") or b""
    return list(unpack(f"<{len(table) // 8}Q", table[: len(table) // 8 * 8])) if isinstance(table, bytes) else []
