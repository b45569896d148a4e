"""One frame's bytes out of a DICOM file: native, or gathered from fragments (PS3.5 A.4), and what they are coded as.

The transfer syntax says what to expect; the bytes decide. Where the two differ and the bytes are clear, the bytes win.
"""

from __future__ import annotations

from struct import unpack
from typing import NamedTuple

from pydicom import uid

from preprocessing.codestream import Codestream, Kind, bare_jpeg_2000, inspect, looks_like_rle, sniff
from preprocessing.dicom_header import DicomHeader, PixelElement, Source
from preprocessing.guard import Buffer, Reason, Rejection, read_exactly

SYNTAXES: dict[str, Kind] = {
    uid.ImplicitVRLittleEndian: Kind.NATIVE,
    uid.ExplicitVRLittleEndian: Kind.NATIVE,
    uid.ExplicitVRBigEndian: Kind.NATIVE,
    uid.DeflatedExplicitVRLittleEndian: Kind.NATIVE,
    "1.2.840.10008.1.2.8.1": Kind.DEFLATED,  # Deflated Image Frame Compression
    uid.RLELossless: Kind.RLE,
    uid.JPEGBaseline8Bit: Kind.JPEG_BASELINE,
    uid.JPEGExtended12Bit: Kind.JPEG_EXTENDED,
    uid.JPEGLossless: Kind.JPEG_LOSSLESS,
    uid.JPEGLosslessSV1: Kind.JPEG_LOSSLESS,
    uid.JPEGLSLossless: Kind.JPEG_LS,
    uid.JPEGLSNearLossless: Kind.JPEG_LS,
    uid.JPEG2000Lossless: Kind.JPEG_2000,
    uid.JPEG2000: Kind.JPEG_2000,
    uid.HTJ2KLossless: Kind.HTJ2K,
    uid.HTJ2KLosslessRPCL: Kind.HTJ2K,
    uid.HTJ2K: Kind.HTJ2K,
}
_DCT = {Kind.JPEG_BASELINE, Kind.JPEG_EXTENDED}  # an 8-bit picture may be either, whichever syntax is named
_ITEM, _SEQUENCE_END, _UNDEFINED = 0xFFFEE000, 0xFFFEE0DD, 0xFFFFFFFF


class Frame(NamedTuple):
    """A frame's bytes. `codestream` is None for native, deflated and RLE frames, which do not describe themselves."""

    data: Buffer  # bytes where `kind` is not NATIVE
    kind: Kind
    codestream: Codestream | None
    contradicted: bool  # the transfer syntax says something else


def read_frame(header: DicomHeader, index: int) -> Frame:
    """A frame of a file whose header has been checked.

    Raises:
        Rejection: cut, of another length than the header says, or coded in no known way.
    """
    declared = SYNTAXES.get(header.facts.transfer_syntax)
    if header.pixels.length is None:
        data = _gather(header, index)
        if declared is Kind.DEFLATED:
            return Frame(data, declared, None, False)
        return _coded(data, declared, header.facts.transfer_syntax)
    return _plain(header, index, declared)


def _coded(data: bytes, declared: Kind | None, syntax: str) -> Frame:
    if sniff(data) is not None:
        data = bare_jpeg_2000(data)
        found = inspect(data)
        agrees = declared is found.kind or {declared, found.kind} <= _DCT
        return Frame(data, found.kind, found, not agrees)
    if declared is Kind.RLE or looks_like_rle(data):
        return Frame(data, Kind.RLE, None, declared is not Kind.RLE)
    if declared is None:
        raise Rejection(Reason.UNSUPPORTED_TRANSFER_SYNTAX, syntax if _is_uid(syntax) else "not a UID")
    raise Rejection(Reason.DECODE_FAILED, f"the frame does not begin as {declared} does")


def _plain(header: DicomHeader, index: int, declared: Kind | None) -> Frame:
    """Pixel data with a length: native values, or a codestream that was not put into fragments."""
    pixels, length = header.pixels, header.pixels.length or 0
    row = header.columns * header.bits_allocated // 8
    size = header.rows * row
    fits = size * header.frames <= length < size * header.frames + max(2, row)  # padded, by less than a row
    if not fits and header.frames == 1 and declared is not Kind.NATIVE:
        data = bytes(read_exactly(pixels.source, pixels.offset, length))
        if sniff(data) is not None or looks_like_rle(data):
            frame = _coded(data, declared, header.facts.transfer_syntax)
            return frame._replace(contradicted=True)
    if declared is None:
        syntax = header.facts.transfer_syntax
        raise Rejection(Reason.UNSUPPORTED_TRANSFER_SYNTAX, syntax if _is_uid(syntax) else "not a UID")
    if not fits:
        short = length < size * header.frames
        raise Rejection(
            Reason.TRUNCATED if short else Reason.SIZE_MISMATCH,
            f"{length} bytes of pixel data; Rows × Columns × Bits Allocated × frames make {size * header.frames}",
        )
    return Frame(
        read_exactly(pixels.source, pixels.offset + index * size, size), Kind.NATIVE, None, declared is not Kind.NATIVE
    )


def _gather(header: DicomHeader, index: int) -> bytes:
    """The fragments of one frame, joined."""
    offsets, items = _items(header.pixels)
    if not items:
        raise Rejection(Reason.MISSING_PIXEL_DATA, "Pixel Data (7FE0,0010) has no fragments")
    source = header.pixels.source
    chosen = items if header.frames == 1 else _of_frame(source, header, offsets, items, index)
    return b"".join(read_exactly(source, offset, length) for offset, length in chosen)


def _items(pixels: PixelElement) -> tuple[list[int], list[tuple[int, int]]]:
    """Basic Offset Table, and offset and length of each fragment after it."""
    order = "<" if pixels.little_endian else ">"
    source, position = pixels.source, pixels.offset
    end = source.seek(0, 2)
    items: list[tuple[int, int]] = []
    while True:
        source.seek(position)
        head = source.read(8)
        if len(head) < 8:
            break  # no end of the sequence; whether something is missing, the codestream tells
        group, element, length = unpack(order + "HHI", head)
        tag = group << 16 | element
        if tag == _SEQUENCE_END:
            break
        if tag != _ITEM or length == _UNDEFINED:
            raise Rejection(Reason.BAD_HEADER, "damaged fragments in Pixel Data (7FE0,0010)")
        position += 8
        if position + length > end:
            raise Rejection(Reason.TRUNCATED, f"a fragment of {length} bytes; the file has {end - position} more")
        items.append((position, length))
        position += length
    if not items:
        return [], []
    offset, length = items[0]
    table = bytes(read_exactly(source, offset, length // 4 * 4))
    return list(unpack(f"{order}{length // 4}I", table)), [item for item in items[1:] if item[1]]


def _of_frame(
    source: Source, header: DicomHeader, offsets: list[int], items: list[tuple[int, int]], index: int
) -> list[tuple[int, int]]:
    """A frame's fragments: by the Extended or Basic Offset Table, one each, or by where codestreams begin."""
    frames = header.frames
    table = header.extended_offsets if len(header.extended_offsets) == frames else offsets
    if len(items) == frames:
        starts = list(range(frames))
    elif len(table) == frames:
        first = items[0][0] - 8
        by_offset = {offset - 8 - first: number for number, (offset, _) in enumerate(items)}
        starts = [by_offset.get(offset, -1) for offset in table]
    else:
        starts = [number for number, item in enumerate(items) if _begins(source, item)]
    if len(starts) != frames or starts != sorted(set(starts)) or starts[0] != 0:
        raise Rejection(Reason.BAD_HEADER, f"{len(items)} fragments cannot be told apart into {frames} frames")
    return items[starts[index] : [*starts, len(items)][index + 1]]


def _begins(source: Source, item: tuple[int, int]) -> bool:
    head = bytes(read_exactly(source, item[0], min(item[1], 66)))
    return sniff(head) is not None or looks_like_rle(head, whole=False)


def _is_uid(text: str) -> bool:
    return 0 < len(text) <= 64 and not text.strip("0123456789.")
