"""May this file be decoded at all? The typed reasons for which it may not, and the checks before any codec sees it.

Decoders written in C trust what they are told: short PixelData, zero bits, a FIFO or a picture larger than its header
says end or hang the process, or hand out unwritten memory. Nothing reaches them that has not passed here.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from io import BufferedReader, BytesIO, FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Buffer = bytes | bytearray | memoryview

_ALWAYS_READ = 2**20  # bytes
_HELD_MOST = 256 * 2**20  # bytes of a file that is read at once; a picture of full size has up to 40 MB
_FEWEST_ROWS = 64  # below them no row tells anything
LARGEST_FILE = 4 * 2**30  # bytes; a tomosynthesis file of 100 frames at full size has about 1.7 GB
SMALLEST_SIDE = 2  # rows or columns


class Reason(StrEnum):
    """Why an input did not make it into the store: the column `reason` of rejected.csv."""

    ABSENT = "absent"  # named in the CSV, no file there
    NOT_A_FILE = "not_a_file"  # directory, FIFO, device, socket, symlink loop
    UNREADABLE = "unreadable"  # permission, I/O error
    EMPTY = "empty"  # no bytes
    TOO_LARGE = "too_large"  # bytes or pixels over the limit
    NOT_AN_IMAGE = "not_an_image"  # none of DICOM, PNG, JPEG and TIFF
    BAD_HEADER = "bad_header"  # a tag that must be there is absent, damaged or out of range
    UNSUPPORTED_TRANSFER_SYNTAX = "unsupported_transfer_syntax"  # no codec, or not a still picture
    UNSUPPORTED_PIXELS = "unsupported_pixels"  # 1-bit, over 16 bits, floating point
    MISSING_PIXEL_DATA = "missing_pixel_data"  # a DICOM object without a picture
    MULTI_FRAME = "multi_frame"  # tomosynthesis and other stacks, or a frame that is not there
    COLOUR = "colour"  # more than one sample a pixel
    SIZE_MISMATCH = "size_mismatch"  # header and pixel data disagree on rows, columns or bits
    TRUNCATED = "truncated"  # the pixel data end too early
    DECODE_FAILED = "decode_failed"  # the codec refused it
    OUT_OF_RANGE = "out_of_range"  # values that Bits Stored does not allow
    BLANK = "blank"  # one value everywhere
    HALF_DECODED = "half_decoded"  # the rest of the picture is filler
    TIMEOUT = "timeout"  # not decoded within the time limit
    CRASH = "crash"  # its process died
    MEMORY = "memory"  # it needs more memory than a worker may take
    INTERNAL = "internal"  # a fault of this program


class Rejection(Exception):  # noqa: N818  it is an outcome, not a fault
    """A source file that cannot be used.

    Attributes:
        reason: the kind.
        detail: what was found and expected. Tag names and numbers only: never a value that may identify a patient.
    """

    def __init__(self, reason: Reason | str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = Reason(reason)
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else str(self.reason)


class BoundedReader(BufferedReader):
    """A file whose `read` takes no memory for bytes that are not there, whatever length a damaged header names."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As `BufferedReader.read`."""
        if size is not None and size > _ALWAYS_READ:
            size = min(size, max(0, os.fstat(self.fileno()).st_size - self.tell()))
        return super().read(size)


class HeldFile(BytesIO):
    """A file that was read at once. `view` shares its memory."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.view = memoryview(data)


@dataclass(frozen=True)
class OpenFile:
    """A regular file, open for reading. Use as a context manager."""

    file: HeldFile | BoundedReader
    bytes: int
    mtime_ns: int

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def sha256(self) -> str:
        """SHA-256 of the bytes that were, or will be, decoded."""
        if isinstance(self.file, HeldFile):
            return hashlib.sha256(self.file.view).hexdigest()
        self.file.seek(0)
        return hashlib.file_digest(self.file, "sha256").hexdigest()


def open_regular(path: Path) -> OpenFile:
    """Open a regular file; never hangs on a FIFO and never touches a device. All but very large files are read at once.

    Raises:
        Rejection: absent, not a regular file, unreadable, empty or larger than `LARGEST_FILE`.
    """
    try:
        _check_regular(os.stat(path))
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise Rejection(Reason.ABSENT, "no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        loop = isinstance(error, OSError) and error.errno in _NO_FILE_ERRORS
        reason = Reason.NOT_A_FILE if loop or isinstance(error, ValueError) else Reason.UNREADABLE
        raise Rejection(reason, getattr(error, "strerror", None) or "impossible path") from None
    file = BoundedReader(FileIO(descriptor))
    try:
        status = os.fstat(descriptor)  # what was opened, should it have been exchanged since
        _check_regular(status)
        if status.st_size == 0:
            raise Rejection(Reason.EMPTY, "0 bytes")
        if status.st_size > LARGEST_FILE:
            raise Rejection(Reason.TOO_LARGE, f"{status.st_size} bytes; at most {LARGEST_FILE}")
        if status.st_size > _HELD_MOST:
            return OpenFile(file, status.st_size, status.st_mtime_ns)
        with file:
            return OpenFile(HeldFile(file.read()), status.st_size, status.st_mtime_ns)
    except OSError as error:
        file.close()
        raise Rejection(Reason.UNREADABLE, error.strerror or "read error") from None
    except BaseException:
        file.close()
        raise


def read_exactly(file: BufferedReader | BytesIO, offset: int, count: int) -> Buffer:
    """`count` bytes from `offset`; of a held file no copy.

    Raises:
        Rejection: the file ends before.
    """
    left = file.seek(0, os.SEEK_END) - offset
    if count > left:
        raise Rejection(Reason.TRUNCATED, f"{max(0, left)} bytes of pixel data; {count} expected")
    if isinstance(file, HeldFile):
        return file.view[offset : offset + count]
    data = bytearray(count)
    file.seek(offset)
    got = file.readinto(data)
    if got < count:  # cut while it is read
        raise Rejection(Reason.TRUNCATED, f"{got} bytes of pixel data; {count} expected")
    return data


def check_size(rows: int, columns: int, max_pixels: int) -> None:
    """A picture's size is possible and within the limit.

    Raises:
        Rejection: it is not.
    """
    if rows < SMALLEST_SIDE or columns < SMALLEST_SIDE:
        raise Rejection(Reason.BAD_HEADER, f"a picture of {rows} rows and {columns} columns")
    if rows * columns > max_pixels:
        raise Rejection(Reason.TOO_LARGE, f"{rows} rows × {columns} columns; at most {max_pixels} pixels")


def check_values(stored: NDArray[np.integer], bits: int, padding: Sequence[int]) -> None:
    """Decoded values are within their range, more than one, and reach the end of the picture.

    Args:
        stored: [rows, columns], signed or unsigned.
        bits: Bits Stored.
        padding: values that are no picture: Pixel Padding Value and, where there is one, Range Limit.

    Raises:
        Rejection: they are not.
    """
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if stored.dtype.kind == "i" else (0, 2**bits - 1)
    least, most = int(stored.min()), int(stored.max())
    if least < low or most > high:
        raise Rejection(Reason.OUT_OF_RANGE, f"values {least} to {most}; {bits} bits allow {low} to {high}")
    if least == most:
        raise Rejection(Reason.BLANK, f"every pixel is {least}")
    if padding:
        inside = stored[(stored < min(padding)) | (stored > max(padding))]
        if not inside.size or inside.min() == inside.max():
            raise Rejection(Reason.BLANK, "every pixel that is no padding has the same value")
    if filler := filler_rows(stored):
        raise Rejection(Reason.HALF_DECODED, f"the last {filler} of {stored.shape[0]} rows are filler")


def filler_rows(stored: NDArray[np.integer]) -> int:
    """Rows at the end that were never written, 0 where there are none: at least a quarter of the picture, all of one
    value, that end a row full of other values. A breast ends in its skin line, row by row; a collimated field has the
    like at its top.
    """
    rows, columns = stored.shape
    value = stored[-1, -1]
    if rows < _FEWEST_ROWS or not (stored[-1] == value).all():
        return 0
    flat = (stored[:, :: max(1, columns // 64)] == value).all(axis=1)
    flat[flat] = (stored[flat] == value).all(axis=1)
    others = np.flatnonzero(~flat)
    filler, above = rows - 1 - int(others[-1]), int(others[0])
    if filler * 4 < rows or above * 2 >= filler:
        return 0
    last = stored[max(0, int(others[-1]) - 1)]  # the row above the last one, which may itself be cut
    return filler if np.count_nonzero(last != value) * 4 > columns else 0


_NO_FILE_ERRORS = {errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "FIFO", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
        raise Rejection(Reason.NOT_A_FILE, f"a {kinds.get(stat.S_IFMT(status.st_mode), 'socket')}")
