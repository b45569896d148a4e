"""DICOM files of every encoding, written by encoders that share no code with the decoders under test's own steps."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom import config, uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.encoders.base import get_encoder

DEFLATED_FRAME = "1.2.840.10008.1.2.8.1"
NATIVE = {
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
}
LOSSLESS = [
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.UID(DEFLATED_FRAME),
    uid.RLELossless,
    uid.JPEGLossless,
    uid.JPEGLosslessSV1,
    uid.JPEGLSLossless,
    uid.JPEGLSNearLossless,
    uid.JPEG2000Lossless,
    uid.JPEG2000,
    uid.HTJ2KLossless,
    uid.HTJ2KLosslessRPCL,
    uid.HTJ2K,
]


def picture(bits: int, signed: bool = False, rows: int = 72, columns: int = 60, seed: int = 0) -> NDArray[np.integer]:
    """A smooth breast-like picture over the whole range, both ends included."""
    y, x = np.mgrid[0:rows, 0:columns]
    shape = np.exp(-(((y - rows / 2) / rows * 2.2) ** 2) - (x / columns * 1.4) ** 2)
    noise = np.random.default_rng(seed).normal(0, 0.01, (rows, columns))
    values = np.clip(np.rint((shape + noise) * (2**bits - 1)), 0, 2**bits - 1).astype(np.int64)
    values[0, 0], values[-1, -1] = 0, 2**bits - 1
    if signed:
        values -= 2 ** (bits - 1)
    width = 1 if bits <= 8 else 2
    return values.astype(f"{'i' if signed else 'u'}{width}")


def encode(cells: NDArray[np.integer], syntax: str, precision: int, **options: Any) -> bytes:
    """A frame of unsigned cells (signed ones for the JPEG 2000 family), not yet encapsulated."""
    if syntax in NATIVE:
        return cells.astype(cells.dtype.newbyteorder(">" if syntax == uid.ExplicitVRBigEndian else "<")).tobytes()
    if syntax in (uid.JPEG2000Lossless, uid.JPEG2000):
        return bytes(
            imagecodecs.jpeg2k_encode(cells, level=0, reversible=True, codecformat="J2K", bitspersample=precision)
        )
    if syntax in (uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K):
        return bytes(imagecodecs.htj2k_encode(cells))  # OpenJPH's progression order is RPCL
    unsigned = cells.view(cells.dtype.str.replace("i", "u"))
    if precision < 8 * unsigned.dtype.itemsize:
        unsigned = unsigned & unsigned.dtype.type(2**precision - 1)
    if syntax in (uid.JPEGLossless, uid.JPEGLosslessSV1):
        predictor = 1 if syntax == uid.JPEGLosslessSV1 else options.get("predictor", 6)
        return bytes(imagecodecs.jpeg8_encode(unsigned, lossless=True, predictor=predictor, bitspersample=precision))
    if syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit):
        return bytes(imagecodecs.jpeg8_encode(unsigned, level=95, bitspersample=precision))
    if syntax in (uid.JPEGLSLossless, uid.JPEGLSNearLossless):
        return bytes(imagecodecs.jpegls_encode(unsigned, out=unsigned.nbytes * 2 + 4096))
    if syntax == uid.RLELossless:
        return get_encoder(uid.RLELossless).encode(
            unsigned.astype(unsigned.dtype.newbyteorder("<")).tobytes(),
            encoding_plugin="pylibjpeg",
            number_of_frames=1,
            rows=cells.shape[0],
            columns=cells.shape[1],
            samples_per_pixel=1,
            photometric_interpretation="MONOCHROME2",
            bits_allocated=8 * cells.dtype.itemsize,
            bits_stored=8 * cells.dtype.itemsize,
            pixel_representation=0,
        )
    if syntax == DEFLATED_FRAME:
        deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        return deflater.compress(unsigned.astype(unsigned.dtype.newbyteorder("<")).tobytes()) + deflater.flush()
    raise ValueError(syntax)


def dataset(
    values: NDArray[np.integer],
    syntax: str = uid.ExplicitVRLittleEndian,
    bits: int | None = None,
    high_bit: int | None = None,
    junk: NDArray[np.integer] | None = None,
    frames: list[bytes] | None = None,
    fragments: int = 1,
    offset_table: bool = True,
    **tags: Any,
) -> Dataset:
    """A data set of these stored values.

    Args:
        values: stored values, [rows, columns]; signed ones give Pixel Representation 1.
        bits: Bits Stored; the whole cell by default.
        high_bit: where they lie in the cell; `bits - 1` by default.
        junk: what the cell's other bits hold.
        frames: encoded frames that take the place of the values'.
        fragments: that each frame is cut into.
        offset_table: whether there is a Basic Offset Table.
        tags: further ones by keyword; None deletes one.
    """
    cell = 8 * values.dtype.itemsize
    bits = bits or cell
    high = bits - 1 if high_bit is None else high_bit
    cells = values
    precision = bits
    if high_bit is not None or junk is not None:
        mask = (2**bits - 1) << (high + 1 - bits)
        raw = (values.astype(np.int64) << (high + 1 - bits)) & mask
        raw |= (0 if junk is None else junk.astype(np.int64)) & ~mask & (2**cell - 1)
        cells, precision = raw.astype(f"u{cell // 8}"), cell
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = uid.UID(syntax)
    meta.MediaStorageSOPClassUID = uid.DigitalMammographyXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = uid.UID("1.2.3")
    made = Dataset()
    made.file_meta = meta
    made.SOPClassUID, made.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.Rows, made.Columns = values.shape
    made.BitsAllocated, made.BitsStored, made.HighBit = cell, bits, high
    made.PixelRepresentation = int(values.dtype.kind == "i")
    coded = frames or [encode(cells, syntax, precision)]
    if len(coded) > 1:
        made.NumberOfFrames = len(coded)
    with config.disable_value_validation():
        for keyword, value in tags.items():
            if value is None:
                if keyword in made:
                    del made[keyword]
            else:
                setattr(made, keyword, value)
    if syntax in NATIVE:
        data = b"".join(coded)
        made.add_new("PixelData", "OW" if cell > 8 else "OB", data + b"\0" * (len(data) % 2))
    else:
        made.add_new("PixelData", "OB", encapsulate(coded, fragments_per_frame=fragments, has_bot=offset_table))
        made["PixelData"].is_undefined_length = True
    return made


def save(path: Path, made: Dataset) -> Path:
    """Write it as a file (PS3.10)."""
    syntax = made.file_meta.TransferSyntaxUID
    if syntax == DEFLATED_FRAME:  # which pydicom does not write
        made.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
    made.save_as(
        path,
        enforce_file_format=True,
        implicit_vr=syntax == uid.ImplicitVRLittleEndian,
        little_endian=syntax != uid.ExplicitVRBigEndian,
    )
    if syntax == DEFLATED_FRAME:
        made.file_meta.TransferSyntaxUID = syntax
        named = f"{DEFLATED_FRAME}\0".encode()
        path.write_bytes(path.read_bytes().replace(uid.JPEGBaseline8Bit.encode(), named, 1))
    return path


def write(path: Path, values: NDArray[np.integer], **options: Any) -> Path:
    """A file of these stored values; see `dataset`."""
    return save(path, dataset(values, **options))


def patched(path: Path, **numbers: int) -> Path:
    """Overwrite US tags in place by hand, which pydicom would not let us get wrong."""
    data = bytearray(path.read_bytes())
    tags = {"Rows": 0x10, "Columns": 0x11, "BitsAllocated": 0x100, "BitsStored": 0x101, "HighBit": 0x102}
    for keyword, number in numbers.items():
        needle = struct.pack("<HH2sH", 0x28, tags[keyword], b"US", 2)
        at = data.index(needle) + 8
        data[at : at + 2] = struct.pack("<H", number)
    path.write_bytes(data)
    return path
