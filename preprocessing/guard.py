"""May this file be decoded at all? Typed rejections, and checks that keep decoders from crashing or inventing pixels.

Decoders trust headers: a native picture shorter than Rows × Columns, a codestream of another size, or an odd
BitsAllocated makes them crash or hand back memory that nobody wrote. Each check here stands for one of those.
"""

from __future__ import annotations

import os
import stat
import struct
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 2 * 2**30  # DICOM's defined lengths end at 4 GiB; no mammogram comes near 2
MAX_SIDE = 65535


class Reason(StrEnum):
    """Why an input was not converted. The text is what rejected.csv says."""

    ABSENT = "absent"
    NOT_A_FILE = "not_a_file"
    UNREADABLE = "unreadable"
    EMPTY = "empty"
    TOO_LARGE = "too_large"
    NOT_A_PICTURE = "not_a_picture"
    BAD_HEADER = "bad_header"
    NO_PIXELS = "no_pixels"
    NOT_GRAYSCALE = "not_grayscale"
    MULTI_FRAME = "multi_frame"
    UNSUPPORTED = "unsupported_transfer_syntax"
    MISMATCH = "codestream_mismatch"
    TRUNCATED = "truncated"
    DECODE_FAILED = "decode_failed"
    OUT_OF_RANGE = "out_of_range"
    BLANK = "blank"
    HALF_DECODED = "half_decoded"
    TIMEOUT = "timeout"
    CRASH = "crash"
    MEMORY = "memory"
    INTERNAL = "internal"


class Rejection(Exception):  # noqa: N818 - an outcome of the file, not a fault of the program
    """An input that cannot be used. `detail` holds tag names and numbers, never text out of the file."""

    def __init__(self, reason: Reason | str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = Reason(reason)
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class Codestream(NamedTuple):
    """What a compressed frame says of itself."""

    kind: str  # jpeg (baseline, extended), jpeg_lossless, jpeg_ls, jpeg2000, htj2k
    rows: int
    columns: int
    components: int
    precision: int
    signed: bool
    ended: bool  # the end marker is there


def check_file(path: Path) -> int:
    """Size in bytes of a regular file that is neither empty nor absurdly large; nothing is opened.

    Raises:
        Rejection: absent, not_a_file (a folder, FIFO, device, or a loop of links), empty, too_large, unreadable.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise Rejection(Reason.ABSENT, "no such file") from None
    except (OSError, ValueError) as error:
        kind = Reason.NOT_A_FILE if getattr(error, "errno", 0) == 40 else Reason.UNREADABLE
        raise Rejection(kind, getattr(error, "strerror", None) or "not a usable path") from None
    if not stat.S_ISREG(status.st_mode):
        raise Rejection(Reason.NOT_A_FILE, f"{_kind(status.st_mode)}, expected a regular file")
    if not status.st_size:
        raise Rejection(Reason.EMPTY, "0 bytes")
    if status.st_size > MAX_BYTES:
        raise Rejection(Reason.TOO_LARGE, f"{status.st_size} bytes, at most {MAX_BYTES} are taken")
    return status.st_size


def check_size(rows: int, columns: int, max_pixels: int) -> None:
    """Rows and Columns are possible and not absurd.

    Raises:
        Rejection: bad_header or too_large.
    """
    if not (0 < rows <= MAX_SIDE and 0 < columns <= MAX_SIDE):
        raise Rejection(Reason.BAD_HEADER, f"Rows {rows}, Columns {columns}")
    if rows * columns > max_pixels:
        raise Rejection(Reason.TOO_LARGE, f"{rows} × {columns} pixels, at most {max_pixels} are taken")


def read_codestream(frame: bytes) -> Codestream | None:
    """What a compressed frame's own header says, or None where it is none that is known (RLE, native).

    JPEG, JPEG Lossless: ITU-T T.81 B.2.2. JPEG-LS: ITU-T T.87 C.2.2. JPEG 2000: ITU-T T.800 A.5.1, HTJ2K: T.814.
    """
    if frame[:12] == b"\x00\x00\x00\x0cjP  \r\n\x87\n":  # a JP2 file instead of the bare codestream
        start = frame.find(b"\xff\x4f\xff\x51")
        return _jpeg2000(frame[start:]) if start >= 0 else None
    if frame[:4] == b"\xff\x4f\xff\x51":
        return _jpeg2000(frame)
    return _jpeg(frame) if frame[:2] == b"\xff\xd8" else None


def check_values(values: NDArray[np.integer], bits_stored: int, signed: bool) -> None:
    """The decoded picture is one: in range, not constant, and not broken off.

    Raises:
        Rejection: out_of_range, blank, half_decoded.
    """
    low, high = int(values.min()), int(values.max())
    least, most = (-(2 ** (bits_stored - 1)), 2 ** (bits_stored - 1) - 1) if signed else (0, 2**bits_stored - 1)
    if low < least or high > most:
        raise Rejection(
            Reason.OUT_OF_RANGE, f"values {low} to {high}, BitsStored {bits_stored} allows {least} to {most}"
        )
    if low == high:
        raise Rejection(Reason.BLANK, f"every pixel is {low}")
    _check_half_decoded(values)


def _check_half_decoded(values: NDArray[np.integer]) -> None:
    """A decoder that stops in mid-picture leaves the rest at one value, flush to the last row, and cuts tissue off.

    The picture is broken off where a constant block reaches the bottom and the last row above it holds a sharp step
    over a good part of its width, as no air around a breast does.
    """
    rows = values.shape[0]
    last = values[-1]
    if (last != last[0]).any():
        return
    constant = (values == last[0]).all(axis=1)
    first = rows - int(np.argmin(constant[::-1])) if not constant.all() else 0
    if rows < 128 or rows - first < 0.2 * rows or first < 2:  # too small to tell, or air below the breast
        return
    above = values[first - 1].astype(np.int64)
    spread = int(values[:first].max()) - int(values[:first].min())
    share = float((np.abs(above - int(last[0])) > 0.25 * max(spread, 1)).mean())
    if share > 0.15:
        raise Rejection(Reason.HALF_DECODED, f"rows {first} to {rows - 1} hold one value below {share:.0%} of tissue")


def _jpeg2000(frame: bytes) -> Codestream | None:
    if len(frame) < 49:
        return None
    capabilities, x1, y1, x0, y0 = struct.unpack(">HIIII", frame[6:24])
    components = struct.unpack(">H", frame[40:42])[0]
    kind = "htj2k" if capabilities & 0x4000 else "jpeg2000"  # Rsiz bit 14: T.814's part 15
    ended = b"\xff\xd9" in frame[-64:]
    return Codestream(kind, y1 - y0, x1 - x0, components, (frame[42] & 0x7F) + 1, bool(frame[42] & 0x80), ended)


def _jpeg(frame: bytes) -> Codestream | None:
    kinds = {0xC0: "jpeg", 0xC1: "jpeg", 0xC2: "jpeg", 0xC3: "jpeg_lossless", 0xF7: "jpeg_ls"}
    at = 2
    while at + 4 <= len(frame):
        if frame[at] != 0xFF:
            return None
        marker = frame[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in kinds and at + 10 <= len(frame):
            precision, rows, columns, components = struct.unpack(">BHHB", frame[at + 4 : at + 10])
            ended = b"\xff\xd9" in frame[-64:]
            return Codestream(kinds[marker], rows, columns, components, precision, False, ended)
        if marker in (0xD8, 0x01) or 0xD0 <= marker <= 0xD7:
            at += 2
            continue
        at += 2 + struct.unpack(">H", frame[at + 2 : at + 4])[0]
    return None


def _kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if test(mode):
            return name
    return "no regular file"
