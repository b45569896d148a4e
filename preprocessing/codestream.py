"""What a compressed frame says of itself: its kind, size, precision, and whether all of it is there.

Read without decoding, from JPEG's markers (ISO/IEC 10918-1 B), JPEG-LS's (ISO/IEC 14495-1 C), JPEG 2000's and HTJ2K's
(ISO/IEC 15444-1 A, 15444-15) and the RLE header (PS3.5 G.5).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from struct import error as StructError
from struct import unpack_from

from preprocessing.guard import Reason, Rejection


class Kind(StrEnum):
    """How a frame is coded."""

    NATIVE = "native"
    DEFLATED = "deflated frame"
    RLE = "RLE"
    JPEG_BASELINE = "JPEG baseline"
    JPEG_EXTENDED = "JPEG extended"
    JPEG_LOSSLESS = "JPEG lossless"
    JPEG_LS = "JPEG-LS"
    JPEG_2000 = "JPEG 2000"
    HTJ2K = "HTJ2K"


@dataclass(frozen=True)
class Codestream:
    """A frame's own facts. `precision` is in bits; `signed` is told by JPEG 2000 only. `reversible` are JPEG 2000 with
    the 5-3 wavelet (ISO/IEC 15444-1 A.6.1) and lossless JPEG that predicts from the left neighbour (10918-1 H.1.2.1,
    Selection Value 1)."""

    kind: Kind
    rows: int
    columns: int
    precision: int
    signed: bool = False
    reversible: bool = False


_SOF = {0xC0: Kind.JPEG_BASELINE, 0xC1: Kind.JPEG_EXTENDED, 0xC3: Kind.JPEG_LOSSLESS, 0xF7: Kind.JPEG_LS}
_OTHER_SOF = {0xC2, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}  # progressive, hierarchical, arithmetic
_BARE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
_SIZ, _CAP, _COD, _SOT, _EOC = 0xFF51, 0xFF50, 0xFF52, 0xFF90, 0xFFD9
_SOS = 0xDA
_WAVELET = 13  # bytes from the COD marker to its transformation: 0 is 9-7, 1 is 5-3
_END = b"\xff\xd9"  # EOI of JPEG, EOC of JPEG 2000
_END_WITHIN = 64  # bytes at the end, padding with zeros or fill bytes aside, in which the end marker must lie


def sniff(data: bytes) -> Kind | None:
    """The kind that the first bytes tell; None where they tell none (native values, RLE, deflate)."""
    head = data[:4]
    if head.startswith(b"\xff\x4f\xff\x51") or data[:8] == b"\0\0\0\x0cjP  ":
        return Kind.JPEG_2000
    return Kind.JPEG_BASELINE if head.startswith(b"\xff\xd8\xff") else None


def looks_like_rle(data: bytes, whole: bool = True) -> bool:
    """Whether the first 64 bytes are an RLE header (PS3.5 G.5) of one or two segments; those of a whole frame begin
    inside it."""
    if len(data) < 65:
        return False
    count, *offsets = unpack_from("<16I", data)
    used, unused = offsets[:count], offsets[count:]
    if count not in (1, 2) or used[0] != 64 or used != sorted(used) or any(unused):
        return False
    return used[-1] < len(data) or not whole


def inspect(data: bytes) -> Codestream:
    """A JPEG, JPEG-LS, JPEG 2000 or HTJ2K codestream's facts.

    Raises:
        Rejection: damaged, cut, in colour, or coded in a way that DICOM does not know.
    """
    try:
        if sniff(data) is Kind.JPEG_2000:
            return _inspect_jpeg_2000(data)
        return _inspect_jpeg(data)
    except (StructError, IndexError):
        raise Rejection(Reason.TRUNCATED, "the codestream ends within its header") from None


def bare_jpeg_2000(data: bytes) -> bytes:
    """The codestream inside a JP2 file's boxes (ISO/IEC 15444-1 I), which DICOM does not want but some files have."""
    if data[4:8] != b"jP  ":
        return data
    position = 0
    while position + 8 <= len(data):
        length, name = unpack_from(">I4s", data, position)
        header = 8
        if length == 1:
            length, header = unpack_from(">Q", data, position + 8)[0], 16
        if name == b"jp2c":
            end = len(data) if length == 0 else position + length
            if end > len(data):
                raise Rejection(Reason.TRUNCATED, "the JP2 box of the codestream is cut")
            return data[position + header : end]
        if length < header:
            break
        position += length
    raise Rejection(Reason.DECODE_FAILED, "a JP2 file without a codestream")


def check_rle(data: bytes, bytes_per_pixel: int) -> None:
    """An RLE header has one segment a byte of a pixel, in order, inside the frame.

    Raises:
        Rejection: it does not.
    """
    if len(data) < 65:
        raise Rejection(Reason.TRUNCATED, f"an RLE frame of {len(data)} bytes")
    if not looks_like_rle(data):
        raise Rejection(Reason.DECODE_FAILED, "a damaged RLE header")
    (count,) = unpack_from("<I", data)
    if count != bytes_per_pixel:
        raise Rejection(Reason.SIZE_MISMATCH, f"{count} RLE segments; {bytes_per_pixel} expected from Bits Allocated")


def ends_in_background(data: bytes, columns: int) -> bool:
    """Whether a lossless JPEG scan ends in the code of difference 0, over and over, as it must where the last row has
    one value (ISO/IEC 10918-1 H.1.2). A scan that was cut ends in something else, though decoders then repeat a row.
    """
    tables: dict[int, tuple[int, int]] = {}
    table = 0
    for marker, start, length in jpeg_segments(data):
        if marker == 0xC4:
            tables |= _zero_codes(data[start : start + length])
        if marker == 0xDA:
            table = data[start + 2] >> 4
    if table not in tables:
        return True
    code, bits = tables[table]
    end = data.rfind(_END)
    if end < 0:
        return False
    # Up to 7 padding bits and a stuffed zero follow the last code: whole periods before them are compared.
    tail = data[max(0, end - (columns * bits) // 8) : end].replace(b"\xff\x00", b"\xff")[:-2]
    text = "".join(f"{byte:08b}" for byte in tail)
    pattern = f"{code:0{bits}b}"
    wanted = pattern * (len(text) // bits + 2)
    return len(text) < 64 or any(wanted[shift : shift + len(text)] == text for shift in range(bits))


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker code, start and length of each marker segment's content up to the first scan's."""
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            raise Rejection(Reason.DECODE_FAILED, "damaged JPEG markers")
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if marker in _BARE:
            position += 2
            continue
        (length,) = unpack_from(">H", data, position + 2)
        if marker == 0xD9 or length < 2:
            raise Rejection(Reason.DECODE_FAILED, "a JPEG without a scan")
        if position + 2 + length > len(data):
            break
        yield marker, position + 4, length - 2
        if marker == 0xDA:
            return
        position += 2 + length
    raise Rejection(Reason.TRUNCATED, "the JPEG ends within its header")


def _inspect_jpeg(data: bytes) -> Codestream:
    if data[:2] != b"\xff\xd8":
        raise Rejection(Reason.DECODE_FAILED, "the frame begins as no known codestream does")
    found = None
    for marker, start, _ in jpeg_segments(data):
        if marker in _OTHER_SOF:
            raise Rejection(Reason.UNSUPPORTED_TRANSFER_SYNTAX, f"JPEG process SOF{marker - 0xC0}")
        if marker in _SOF:
            precision, rows, columns, components = unpack_from(">BHHB", data, start)
            if components != 1:
                raise Rejection(Reason.COLOUR, f"{components} components in the JPEG")
            found = Codestream(_SOF[marker], rows, columns, precision)
        if marker == _SOS and found is not None and found.kind is Kind.JPEG_LOSSLESS:
            found = replace(found, reversible=data[start + 3] == 1)  # Ss, after one component's selector
    if found is None:
        raise Rejection(Reason.DECODE_FAILED, "a JPEG without a frame header")
    if not _has_end(data):
        raise Rejection(Reason.TRUNCATED, "the JPEG has no end marker")
    return found


def _inspect_jpeg_2000(data: bytes) -> Codestream:
    if unpack_from(">H", data, 2)[0] != _SIZ:
        raise Rejection(Reason.DECODE_FAILED, "the JPEG 2000 size marker is missing")
    siz = unpack_from(">HHIIIIIIIIH", data, 4)
    x1, y1, x0, y0, tile_width, tile_height, tile_x, tile_y, components = siz[2:]
    depth, *steps = unpack_from(">BBB", data, 4 + 38)
    if components != 1:
        raise Rejection(Reason.COLOUR, f"{components} components in the JPEG 2000 codestream")
    if min(x1 - x0, y1 - y0, tile_width, tile_height) < 1 or tile_x > x0 or tile_y > y0 or steps != [1, 1]:
        raise Rejection(Reason.DECODE_FAILED, "an impossible JPEG 2000 size marker")
    tiles = -(-(x1 - tile_x) // tile_width) * -(-(y1 - tile_y) // tile_height)
    if tiles > 65535:
        raise Rejection(Reason.DECODE_FAILED, f"an impossible number of JPEG 2000 tiles, {tiles}")
    position, high_throughput, reversible = 4 + siz[0], False, False
    while (marker := unpack_from(">H", data, position)[0]) != _SOT:
        if marker < 0xFF30 or marker == _EOC:
            raise Rejection(Reason.DECODE_FAILED, "damaged JPEG 2000 markers")
        high_throughput |= marker == _CAP
        if marker == _COD:
            reversible = data[position + _WAVELET] == 1
        position += 2 + max(2, unpack_from(">H", data, position + 2)[0])
    _check_tile_parts(data, position, tiles)
    kind = Kind.HTJ2K if high_throughput else Kind.JPEG_2000
    return Codestream(kind, y1 - y0, x1 - x0, (depth & 0x7F) + 1, bool(depth & 0x80), reversible)


def _check_tile_parts(data: bytes, position: int, tiles: int) -> None:
    """Every tile has its parts, each as long as its header says (ISO/IEC 15444-1 A.4.2)."""
    seen: set[int] = set()
    while data[position : position + 2] == _SOT.to_bytes(2, "big"):
        tile, length = unpack_from(">HI", data, position + 4)
        if tile >= tiles:
            raise Rejection(Reason.DECODE_FAILED, f"JPEG 2000 tile {tile} of {tiles}")
        seen.add(tile)
        if length == 0:  # to the end of the codestream
            if not _has_end(data):
                raise Rejection(Reason.TRUNCATED, "the JPEG 2000 codestream has no end marker")
            break
        if length < 14:
            raise Rejection(Reason.DECODE_FAILED, "damaged JPEG 2000 tile-part")
        position += length
        if position > len(data):
            raise Rejection(Reason.TRUNCATED, f"JPEG 2000 tile {tile} of {tiles} is cut")
    else:
        if position < len(data) and data[position : position + 2] != _END:
            raise Rejection(Reason.DECODE_FAILED, "damaged JPEG 2000 tile-parts")
    if len(seen) < tiles:
        raise Rejection(Reason.TRUNCATED, f"{len(seen)} of {tiles} JPEG 2000 tiles")


def _has_end(data: bytes) -> bool:
    return _END in data.rstrip(b"\0\xff")[-_END_WITHIN:]


def _zero_codes(table: bytes) -> dict[int, tuple[int, int]]:
    """Code and length in bits of difference category 0, by Huffman table id of a DHT segment (10918-1 C.2)."""
    codes: dict[int, tuple[int, int]] = {}
    position = 0
    while position + 17 <= len(table):
        destination, counts = table[position] & 15, table[position + 1 : position + 17]
        symbols = table[position + 17 : position + 17 + sum(counts)]
        code, index = 0, 0
        for bits, count in enumerate(counts, start=1):
            for _ in range(count):
                if index < len(symbols) and symbols[index] == 0:
                    codes[destination] = (code, bits)
                code, index = code + 1, index + 1
            code <<= 1
        position += 17 + sum(counts)
    return codes
