"""What a codestream says of itself, read without decoding: facts, cuts, and numbers that cannot be."""

from __future__ import annotations

import struct

import imagecodecs
import numpy as np
import pytest
from pydicom import uid

from preprocessing.codestream import Codestream, Kind, bare_jpeg_2000, check_rle, inspect
from preprocessing.guard import Reason, Rejection
from tests.preprocessing.dicoms import encode, picture

JPEG = {
    uid.JPEGLosslessSV1: Kind.JPEG_LOSSLESS,
    uid.JPEGLSLossless: Kind.JPEG_LS,
    uid.JPEGExtended12Bit: Kind.JPEG_EXTENDED,
}
JPEG_2000 = {uid.JPEG2000Lossless: Kind.JPEG_2000, uid.HTJ2KLossless: Kind.HTJ2K}
EVERY = JPEG | JPEG_2000
VALUES = picture(12)  # [72, 60]
SIZ = 4  # offset of the image size segment's content in a JPEG 2000 codestream


def reason(data: bytes) -> Reason:
    with pytest.raises(Rejection) as caught:
        inspect(data)
    return caught.value.reason


def put(data: bytes, at: int, layout: str, number: int) -> bytes:
    return data[:at] + struct.pack(layout, number) + data[at + struct.calcsize(layout) :]


@pytest.mark.parametrize("syntax", EVERY)
def test_kind_size_and_precision_are_the_codestreams_own(syntax: str):
    found = inspect(encode(VALUES, syntax, 12))
    assert (found.kind, found.rows, found.columns) == (EVERY[syntax], 72, 60)
    whole_bytes = syntax in (uid.HTJ2KLossless, uid.JPEGLSLossless)  # as these encoders write them here
    assert found.precision == (16 if whole_bytes else 12)
    assert not found.signed


@pytest.mark.parametrize("syntax", EVERY)
def test_a_codestream_that_is_cut_anywhere_is_called_that(syntax: str):
    data = encode(VALUES, syntax, 12)
    assert {reason(data[:length]) for length in range(4, len(data) - 2)} == {Reason.TRUNCATED}


@pytest.mark.parametrize("syntax", JPEG)
def test_zeros_in_place_of_the_rest_hide_no_cut(syntax: str):
    data = encode(VALUES, syntax, 12)
    for length in (len(data) - 2, len(data) - 20, len(data) // 2):
        assert reason(data[:length].ljust(len(data) + 200, b"\0")) == Reason.TRUNCATED


@pytest.mark.parametrize("between", [b"\xff", b"\xff\xff\xff", b"\xff\x01"], ids=["fill", "fills", "bare marker"])
def test_fill_bytes_and_markers_without_a_length_may_stand_between_segments(between: bytes):
    data = encode(VALUES, uid.JPEGLosslessSV1, 12)
    assert inspect(data[:2] + between + data[2:]) == inspect(data)


def test_colour_is_not_taken():
    colour = np.dstack([picture(8)] * 3)
    jpeg = bytes(imagecodecs.jpeg8_encode(colour))
    assert reason(jpeg) == Reason.COLOUR
    assert reason(bytes(imagecodecs.jpeg2k_encode(colour, level=0, codecformat="J2K"))) == Reason.COLOUR


def test_the_image_of_jpeg_2000_begins_at_its_offset_on_the_canvas():
    """ISO/IEC 15444-1 B.2: the size is Xsiz - XOsiz by Ysiz - YOsiz."""
    data = put(put(encode(VALUES, uid.JPEG2000Lossless, 12), SIZ + 12, ">I", 7), SIZ + 16, ">I", 5)
    assert (inspect(data).columns, inspect(data).rows) == (60 - 7, 72 - 5)


@pytest.mark.parametrize(
    ("at", "number"), [(4, 0), (8, 0), (20, 0), (24, 0), (28, 9)], ids=["x", "y", "tile x", "tile y", "tile offset"]
)
def test_sizes_that_cannot_be_are_damage(at: int, number: int):
    assert reason(put(encode(VALUES, uid.JPEG2000Lossless, 12), SIZ + at, ">I", number)) == Reason.DECODE_FAILED


def test_every_tile_must_be_there():
    data = encode(VALUES, uid.JPEG2000Lossless, 12)  # one tile, in one part
    part = data.index(b"\xff\x90\x00\x0a")
    halves = put(data, SIZ + 20, ">I", 30)  # XTsiz: two tiles now, of which the second is not there
    assert reason(halves) == Reason.TRUNCATED
    assert reason(put(data, part + 4, ">H", 1)) == Reason.DECODE_FAILED  # a tile beyond the last
    assert reason(put(data, part + 6, ">I", 5)) == Reason.DECODE_FAILED  # shorter than its own header
    assert reason(put(data, part + 6, ">I", len(data))) == Reason.TRUNCATED
    assert inspect(put(data, part + 6, ">I", 0)) == inspect(data)  # to the end of the codestream
    assert reason(put(data, part + 6, ">I", 0)[:-2]) == Reason.TRUNCATED


def test_the_codestream_is_found_in_a_jp2_files_boxes_of_either_length():
    data = encode(VALUES, uid.JPEG2000Lossless, 12)
    signature = struct.pack(">I4sI", 12, b"jP  ", 0x0D0A870A)
    for box in (
        struct.pack(">I4s", len(data) + 8, b"jp2c") + data,
        struct.pack(">I4sQ", 1, b"jp2c", len(data) + 16) + data,
        struct.pack(">I4s", 0, b"jp2c") + data,
    ):
        assert bare_jpeg_2000(signature + struct.pack(">I4s", 8, b"free") + box) == data
    for boxes, why in (
        (struct.pack(">I4s", len(data) + 9, b"jp2c") + data, Reason.TRUNCATED),
        (struct.pack(">I4s", 8, b"free"), Reason.DECODE_FAILED),
        (struct.pack(">I4s", 4, b"free"), Reason.DECODE_FAILED),
    ):
        with pytest.raises(Rejection) as caught:
            bare_jpeg_2000(signature + boxes)
        assert caught.value.reason == why


def test_an_rle_header_has_a_segment_a_byte():
    """PS3.5 G.5."""
    frame = encode(VALUES, uid.RLELossless, 12)
    check_rle(frame, 2)
    cases = [(frame, 1, Reason.SIZE_MISMATCH), (frame[:64], 2, Reason.TRUNCATED)]
    cases += [(put(frame, 4, "<I", 65), 2, Reason.DECODE_FAILED), (put(frame, 8, "<I", 10**6), 2, Reason.DECODE_FAILED)]
    for data, width, why in cases:
        with pytest.raises(Rejection) as caught:
            check_rle(data, width)
        assert caught.value.reason == why


def test_what_gpus_may_decode_is_told_apart():
    """Reversible JPEG 2000 (ISO/IEC 15444-1 A.6.1) and lossless JPEG of Selection Value 1 (10918-1 H.1.2.1)."""
    lossy = bytes(imagecodecs.jpeg2k_encode(VALUES, level=40, reversible=False, codecformat="J2K"))
    assert not inspect(lossy).reversible
    assert inspect(encode(VALUES, uid.JPEG2000Lossless, 12)).reversible
    assert inspect(encode(VALUES, uid.JPEGLosslessSV1, 12)).reversible
    assert not inspect(encode(VALUES, uid.JPEGLossless, 12, predictor=6)).reversible
    signed = inspect(encode(picture(12, signed=True), uid.JPEG2000Lossless, 12))
    assert signed == Codestream(Kind.JPEG_2000, 72, 60, 12, signed=True, reversible=True)
