"""Stored values out of any file: DICOM through dicomsdl, or what decodes a kind better; PNG, JPEG, TIFF.

A file's kind is told by its content, not its name.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import dicomsdl
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels.utils import pixel_array

from preprocessing import grayscale, guard
from preprocessing.dicom_header import Header, number, read_header
from preprocessing.guard import Reason, Rejection
from preprocessing.settings import ConvertSettings

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # rejections say it better
logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its warnings quote values out of the file

# Who decodes what, from measurements against reference arrays. dicomsdl wherever it is right; pydicom (with pylibjpeg)
# where dicomsdl has no codec (HTJ2K) or rounds the inverse cosine transform otherwise (extended JPEG).
DECODERS: dict[str, str] = {
    uid.ImplicitVRLittleEndian: "dicomsdl",
    uid.ExplicitVRLittleEndian: "dicomsdl",
    uid.DeflatedExplicitVRLittleEndian: "dicomsdl",
    uid.ExplicitVRBigEndian: "dicomsdl",
    uid.RLELossless: "dicomsdl",
    uid.JPEGBaseline8Bit: "dicomsdl",
    uid.JPEGExtended12Bit: "pydicom",
    uid.JPEGLossless: "dicomsdl",
    uid.JPEGLosslessSV1: "dicomsdl",
    uid.JPEGLSLossless: "dicomsdl",
    uid.JPEGLSNearLossless: "dicomsdl",
    uid.JPEG2000Lossless: "dicomsdl",
    uid.JPEG2000: "dicomsdl",
    uid.HTJ2KLossless: "pydicom",
    uid.HTJ2KLosslessRPCL: "pydicom",
    uid.HTJ2K: "pydicom",
}
_NATIVE = {
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
}
# What the codestream of each encapsulated transfer syntax must be.
_CODESTREAMS: dict[str, set[str]] = {
    uid.JPEGBaseline8Bit: {"jpeg"},
    uid.JPEGExtended12Bit: {"jpeg"},
    uid.JPEGLossless: {"jpeg_lossless"},
    uid.JPEGLosslessSV1: {"jpeg_lossless"},
    uid.JPEGLSLossless: {"jpeg_ls"},
    uid.JPEGLSNearLossless: {"jpeg_ls"},
    uid.JPEG2000Lossless: {"jpeg2000"},
    uid.JPEG2000: {"jpeg2000"},
    uid.HTJ2KLossless: {"htj2k"},
    uid.HTJ2KLosslessRPCL: {"htj2k"},
    uid.HTJ2K: {"htj2k"},
}
_MAGIC = ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpeg"), (b"II*\0", "tiff"), (b"MM\0*", "tiff"))


@dataclass(frozen=True)
class Decoded:
    """A picture's stored values and facts.

    Attributes:
        stored: uint16 or int16 [rows, columns], the exact stored values (PS3.5 8.1.1).
        header: facts named as the manifest's columns.
        decoder: what decoded it.
    """

    stored: NDArray[np.uint16] | NDArray[np.int16]
    header: Header
    decoder: str


def decode(path: Path, settings: ConvertSettings) -> Decoded:
    """Stored values of a DICOM, PNG, JPEG or TIFF file.

    Raises:
        Rejection: the file cannot be used; `reason` says why.
    """
    guard.check_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Rejection(Reason.UNREADABLE, error.strerror or "cannot be read") from None
    for magic, kind in _MAGIC:
        if data.startswith(magic) and data[128:132] != b"DICM":  # a preamble may hold a TIFF header (PS3.10 7.1)
            return _decode_picture(data, kind, settings)
    return _decode_dicom(path, data, settings)


def _decode_picture(data: bytes, kind: str, settings: ConvertSettings) -> Decoded:
    """PNG, JPEG or TIFF of 8 or 16 bits; colour becomes luminance."""
    try:
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_ANYDEPTH | cv2.IMREAD_GRAYSCALE)
    except cv2.error:
        values = None
    if values is None or values.ndim != 2 or values.dtype not in (np.uint8, np.uint16):
        raise Rejection(Reason.DECODE_FAILED, f"not readable as {kind.upper()} of 8 or 16 bits")
    guard.check_size(values.shape[0], values.shape[1], settings.max_pixels)
    bits = 8 * values.dtype.itemsize
    if int(values.min()) == int(values.max()):
        raise Rejection(Reason.BLANK, f"every pixel is {int(values.min())}")
    header = Header(format=kind, bits_stored=bits)
    if bits == 8:  # made for the eye already: a window that leaves it alone
        header = replace(header, window_center=[127.5], window_width=[255.0], window_function=["LINEAR_EXACT"])
    return Decoded(values.astype(np.uint16), header, "opencv")


def _decode_dicom(path: Path, data: bytes, settings: ConvertSettings) -> Decoded:
    dataset = _parse(data)
    syntax = str(dataset.file_meta.get("TransferSyntaxUID", "")) or _guess_syntax(dataset)
    if "PixelData" not in dataset:
        kind = Reason.NO_PIXELS if "Rows" in dataset or "SOPClassUID" in dataset else Reason.NOT_A_PICTURE
        raise Rejection(kind, "Pixel Data (7FE0,0010) is missing")
    if syntax not in DECODERS:
        raise Rejection(Reason.UNSUPPORTED, f"Transfer Syntax UID (0002,0010) is {syntax or 'missing'}")
    rows, columns = int(number(dataset, "Rows", 0)), int(number(dataset, "Columns", 0))
    guard.check_size(rows, columns, settings.max_pixels)
    frames = max(1, int(number(dataset, "NumberOfFrames", 1)))
    if frames > 1 and settings.frame is None:
        raise Rejection(Reason.MULTI_FRAME, f"{frames} frames (tomosynthesis?); --frame N takes one")
    index = settings.frame or 0
    if index >= frames:
        raise Rejection(Reason.MULTI_FRAME, f"{frames} frames, frame {index} is asked for")
    header = read_header(dataset, syntax)
    allocated = int(number(dataset, "BitsAllocated", 16))
    high_bit = int(number(dataset, "HighBit", header.bits_stored - 1))
    if (
        allocated not in (8, 16)
        or not 1 <= header.bits_stored <= allocated
        or not (header.bits_stored - 1 <= high_bit < allocated)
    ):
        raise Rejection(
            Reason.BAD_HEADER, f"BitsAllocated {allocated}, BitsStored {header.bits_stored}, HighBit {high_bit}"
        )
    if syntax in _NATIVE:
        _check_native(dataset, rows, columns, frames, allocated)
    else:
        _check_encapsulated(dataset, syntax, rows, columns, frames, index, header, allocated)
    raw, decoder = _read_pixels(path, data, dataset, syntax, (rows, columns), frames, index, allocated)
    signed = header.value_offset < 0
    stored = grayscale.to_stored_values(raw, header.bits_stored, high_bit, signed)
    guard.check_values(stored, header.bits_stored, signed)
    return Decoded(stored, header, decoder)


def _parse(data: bytes) -> pydicom.FileDataset:
    force = data[128:132] != b"DICM"
    if force and not _looks_like_tags(data):
        raise Rejection(Reason.NOT_A_PICTURE, "no DICOM, PNG, JPEG or TIFF")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(io.BytesIO(data), force=force)
            len(list(dataset.keys()))
            return dataset
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - pydicom raises as many kinds as there are ways to be broken
        raise Rejection(Reason.BAD_HEADER, f"not parseable as DICOM ({type(error).__name__})") from None


def _looks_like_tags(data: bytes) -> bool:
    """A data set without preamble begins with a tag of group 2 or 8."""
    return len(data) > 8 and data[:2] in (b"\x02\x00", b"\x08\x00") and data[3] in (0, 1)


def _guess_syntax(dataset: Dataset) -> str:
    implicit = getattr(dataset, "original_encoding", (None, None))[0]
    return str(uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian)


def _check_native(dataset: Dataset, rows: int, columns: int, frames: int, allocated: int) -> None:
    wanted, found = rows * columns * frames * allocated // 8, len(dataset.PixelData)
    if found < wanted:
        raise Rejection(Reason.TRUNCATED, f"Pixel Data holds {found} bytes, {wanted} are needed")
    if found >= wanted + max(2, columns * allocated // 8):  # less than a row too much is only careless padding
        raise Rejection(
            Reason.MISMATCH, f"Pixel Data holds {found} bytes, Rows × Columns × BitsAllocated give {wanted}"
        )


def _check_encapsulated(
    dataset: Dataset, syntax: str, rows: int, columns: int, frames: int, index: int, header: Header, allocated: int
) -> None:
    frame = _frame(dataset, frames, index)
    if syntax == uid.RLELossless:
        _check_rle(frame, allocated)
        return
    found = guard.read_codestream(frame)
    if found is None:
        raise Rejection(Reason.MISMATCH, "the frame is no codestream that its transfer syntax allows")
    if found.kind not in _CODESTREAMS[syntax]:
        raise Rejection(
            Reason.MISMATCH, f"Transfer Syntax UID says {uid.UID(syntax).name}, the codestream is {found.kind}"
        )
    if (found.rows, found.columns) != (rows, columns) or found.components != 1:
        raise Rejection(
            Reason.MISMATCH,
            f"Rows × Columns {rows} × {columns}, the codestream is {found.rows} × {found.columns} × {found.components}",
        )
    if found.precision > allocated:
        raise Rejection(Reason.MISMATCH, f"BitsAllocated {allocated}, the codestream has {found.precision} bits")
    if not found.ended:
        raise Rejection(Reason.TRUNCATED, "the codestream has no end marker")


def _check_rle(frame: bytes, allocated: int) -> None:
    """The RLE header's segments lie inside the frame (PS3.5 G.5)."""
    if len(frame) < 64:
        raise Rejection(Reason.TRUNCATED, f"an RLE frame of {len(frame)} bytes")
    fields = np.frombuffer(frame[:64], "<u4")
    count, offsets = int(fields[0]), fields[1 : 1 + min(int(fields[0]), 15)].astype(np.int64)
    if count != allocated // 8:
        raise Rejection(Reason.MISMATCH, f"{count} RLE segments, BitsAllocated {allocated} needs {allocated // 8}")
    if offsets[0] != 64 or (np.diff(offsets) <= 0).any() or int(offsets[-1]) >= len(frame):
        raise Rejection(Reason.TRUNCATED, "an RLE segment lies outside its frame")


def _frame(dataset: Dataset, frames: int, index: int) -> bytes:
    try:
        found = generate_frames(dataset.PixelData, number_of_frames=frames)
        return next(frame for position, frame in enumerate(found) if position == index)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - as in _parse
        raise Rejection(Reason.TRUNCATED, f"its fragments do not make up a frame ({type(error).__name__})") from None


def _read_pixels(
    path: Path,
    data: bytes,
    dataset: pydicom.FileDataset,
    syntax: str,
    shape: tuple[int, int],
    frames: int,
    index: int,
    allocated: int,
) -> tuple[NDArray[np.integer], str]:
    """Raw cells as unsigned integers, and who decoded them."""
    # dicomsdl needs the offset table of several frames, and a file that begins with a preamble.
    preferred = DECODERS[syntax] if frames == 1 and data[128:132] == b"DICM" else "pydicom"
    readers: dict[str, Callable[[], NDArray[np.integer]]] = {
        "dicomsdl": lambda: _with_dicomsdl(path, shape, allocated),
        "pydicom": lambda: _with_pydicom(dataset, index),
    }
    order = [preferred, *(name for name in readers if name == "pydicom" and name != preferred)]
    problem = ""
    for name in order:
        try:
            raw = readers[name]()
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - decoders raise whatever their C++ does
            problem = f"{name} fails ({type(error).__name__})"
            continue
        if raw.shape != shape:
            problem = f"{name} gives {raw.shape}, Rows × Columns are {shape}"
            continue
        return raw.view(np.dtype(f"u{raw.dtype.itemsize}")), name
    raise Rejection(Reason.DECODE_FAILED, problem)


def _with_dicomsdl(path: Path, shape: tuple[int, int], allocated: int) -> NDArray[np.integer]:
    file = dicomsdl.open_file(str(path))  # pyright: ignore[reportAttributeAccessIssue] - a compiled module
    try:
        raw = np.zeros(shape, np.uint8 if allocated == 8 else np.uint16)
        file.copyFrameData(0, raw)
        return raw
    finally:
        file.close()


def _with_pydicom(dataset: pydicom.FileDataset, index: int) -> NDArray[np.integer]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.ascontiguousarray(pixel_array(dataset, index=index, raw=True))
