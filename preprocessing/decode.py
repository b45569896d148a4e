"""Stored values out of any file: DICOM of every grayscale kind, PNG, JPEG, TIFF.

file → guard (may it be read?) → header → frame's bytes → codestream's own facts → decoder → bits and sign → checks
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from preprocessing import codecs, dicom_header, frames, gpu_decode, guard, policy, raster
from preprocessing.codestream import Codestream, Kind, check_rle, ends_in_background
from preprocessing.dicom_facts import Header
from preprocessing.dicom_header import DicomHeader
from preprocessing.guard import Reason, Rejection
from preprocessing.settings import ConvertSettings, DecodeOn


@dataclass(frozen=True)
class Decoded:
    """A picture as its file stores it.

    Attributes:
        stored: the exact stored values [rows, columns], uint8, uint16, int8 or int16: unused bits are masked by Bits
            Stored and High Bit, and the sign is extended (PS3.5 8.1.1). All lie in 0 … 2^bits - 1, or in
            -2^(bits-1) … 2^(bits-1) - 1 where `header.value_offset` is negative. It may be read-only.
        header: what the manifest wants to know; its fields are the manifest's columns.
        decoder: what decoded it.
    """

    stored: NDArray[np.integer]
    header: Header
    decoder: str


def decode(path: Path, settings: ConvertSettings) -> Decoded:
    """Decode one picture.

    Args:
        path: DICOM, PNG, JPEG or TIFF; its content tells which, not its name.
        settings: `frame`, `max_pixels` and `decode_on` count.

    Raises:
        Rejection: the file cannot be used; `reason` says why.
    """
    with guard.open_regular(path) as opened:
        return decode_open(opened, settings)


def decode_open(opened: guard.OpenFile, settings: ConvertSettings) -> Decoded:
    """The same for a file that the guard has opened."""
    file = opened.file
    head = file.read(132)
    kind = raster.sniff(head) if head[128:] != b"DICM" else None
    if kind is None:
        decoded = _decode_dicom(file, settings)
    else:
        decoded = Decoded(*raster.decode(file, kind, settings))
    guard.check_values(decoded.stored, decoded.header.bits_stored, decoded.header.padding)
    return decoded


def _decode_dicom(file: dicom_header.Source, settings: ConvertSettings) -> Decoded:
    header = dicom_header.read(file, settings.frame, most_bytes=8 * settings.max_pixels)
    guard.check_size(header.rows, header.columns, settings.max_pixels)
    frame = frames.read_frame(header, settings.frame or 0 if header.frames > 1 else 0)
    facts = header.facts
    if frame.contradicted:
        marks = ";".join(filter(None, [policy.TRANSFER_SYNTAX, facts.policy]))
        facts = replace(facts, policy=marks)
    if frame.kind is Kind.NATIVE:
        return Decoded(_cut_bits(_native(frame.data, header), header), facts, "numpy")
    coded = frame.codestream or _as_the_header_says(frame, header)
    codec = codecs.CODECS[coded.kind]
    raw, decoder = _run(codec, frame, coded, header, settings.decode_on)
    if frame.codestream is None:
        return Decoded(_cut_bits(raw, header), facts, decoder)
    return Decoded(_fit_bits(raw, coded.precision, codec.lossless, header), facts, decoder)


def _as_the_header_says(frame: frames.Frame, header: DicomHeader) -> Codestream:
    """The facts of a frame that does not tell its own: RLE and deflated ones hold whole cells of Bits Allocated."""
    if frame.kind is Kind.RLE:
        check_rle(bytes(frame.data), header.bits_allocated // 8)
    return Codestream(frame.kind, header.rows, header.columns, header.bits_allocated)


def _run(
    codec: codecs.Codec, frame: frames.Frame, facts: Codestream, header: DicomHeader, place: DecodeOn
) -> tuple[NDArray[np.integer], str]:
    """Decode, once the codestream agrees with the header; unsigned values, [rows, columns], and what decoded them."""
    if (facts.rows, facts.columns) != (header.rows, header.columns):
        raise Rejection(
            Reason.SIZE_MISMATCH,
            f"the {facts.kind} codestream has {facts.rows} rows × {facts.columns} columns; "
            f"the header {header.rows} × {header.columns}",
        )
    if not 2 <= facts.precision <= header.bits_allocated:
        raise Rejection(
            Reason.SIZE_MISMATCH,
            f"{facts.precision} bits in the {facts.kind} codestream; Bits Allocated {header.bits_allocated}",
        )
    name, data = codec.name, bytes(frame.data)
    try:
        offered = place != "cpu" and gpu_decode.suits(facts, place == "gpu-all")
        raw = gpu_decode.decode(data, facts) if offered else None
        if raw is not None:
            name = gpu_decode.NAME
        else:
            raw = codec.decode(data, facts)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  each codec raises errors of its own
        raise Rejection(Reason.DECODE_FAILED, f"{codec.name}, {facts.kind}: {type(error).__name__}") from None
    if raw.shape != (header.rows, header.columns):
        raise Rejection(Reason.DECODE_FAILED, f"{codec.name}, {facts.kind}: {raw.shape} values came back")
    if facts.kind is Kind.JPEG_LOSSLESS and _ends_flat(raw) and not ends_in_background(data, header.columns):
        raise Rejection(Reason.HALF_DECODED, "the lossless JPEG scan ends before the picture does")
    return raw.view(raw.dtype.str.replace("i", "u")), name


def _ends_flat(raw: NDArray[np.integer]) -> bool:
    return bool((raw[-2:] == raw[-1, -1]).all())


def _native(data: guard.Buffer, header: DicomHeader) -> NDArray[np.integer]:
    """Native values (PS3.5 8.1.1, 8.2), unsigned, in this machine's byte order; they may share the file's memory."""
    width = header.bits_allocated // 8
    little = header.pixels.little_endian
    if width == 1 and not little and header.pixels.words and len(data) % 2 == 0:
        data = np.frombuffer(data, np.uint16).byteswap().tobytes()  # bytes in big-endian words
    values = np.frombuffer(data, f"{'<' if little else '>'}u{width}")
    return values.reshape(header.rows, header.columns).astype(f"u{width}", copy=False)


def _cut_bits(raw: NDArray[np.integer], header: DicomHeader) -> NDArray[np.integer]:
    """Stored values out of whole cells: Bits Stored up to High Bit, without overlays and junk beside them."""
    shift = header.high_bit + 1 - header.bits_stored
    if shift:
        raw = raw >> shift
    if raw.dtype.itemsize == 4:
        raw = (raw & 0xFFFF).astype(np.uint16)
    return _extend(raw, header.bits_stored, header.signed, clean=shift + header.bits_stored == header.bits_allocated)


def _fit_bits(raw: NDArray[np.integer], precision: int, lossless: bool, header: DicomHeader) -> NDArray[np.integer]:
    """Stored values out of a codestream's, whose precision may not be Bits Stored."""
    if lossless and precision == header.bits_allocated > header.bits_stored:
        return _cut_bits(raw, header)  # whole cells were encoded, unused bits and all
    return _extend(raw, precision, header.signed, clean=False)


def _extend(raw: NDArray[np.integer], bits: int, signed: bool, clean: bool) -> NDArray[np.integer]:
    """Mask to `bits`, and extend the sign where values are two's complement.

    Args:
        raw: unsigned.
        clean: nothing but these bits is set.
    """
    width = 8 * raw.dtype.itemsize
    if not signed:
        clean = clean or bits == width or int(raw.max()) < 2**bits  # looking is cheaper than a copy
        return raw if clean else raw & raw.dtype.type(2**bits - 1)
    values = raw.view(f"i{raw.dtype.itemsize}")
    return values if bits == width else (values << (width - bits)) >> (width - bits)
