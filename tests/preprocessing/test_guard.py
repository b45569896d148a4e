"""Hostile and damaged files each end as one typed rejection, and good ones among them come out as ever."""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import zlib
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from pydicom import uid

from preprocessing import guard
from preprocessing.decode import decode
from preprocessing.guard import Reason, Rejection
from preprocessing.settings import ConvertSettings
from preprocessing.workers import Limits, run_local
from tests.preprocessing.dicoms import DEFLATED_FRAME, dataset, encode, patched, picture, save, write

SETTINGS = ConvertSettings()
CODED = [uid.RLELossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEG2000Lossless, uid.HTJ2K]


def reason(path: Path, settings: ConvertSettings = SETTINGS) -> Reason:
    with pytest.raises(Rejection) as caught:
        decode(path, settings)
    return caught.value.reason


def test_what_is_no_regular_file_is_never_opened(tmp_path: Path) -> None:
    fifo, loop, server = tmp_path / "fifo.dcm", tmp_path / "loop.dcm", tmp_path / "s"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(server))
        for path in (fifo, loop, server, tmp_path, Path("/dev/zero"), Path("a\0b"), Path("x" * 300), fifo / "below"):
            assert reason(path) == Reason.NOT_A_FILE, path
    assert reason(tmp_path / "none.dcm") == Reason.ABSENT


def test_an_unreadable_file_is_named_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", picture(12))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads any file")
    assert reason(path) == Reason.UNREADABLE


@pytest.mark.parametrize(
    "content", [b"patient_id,image_id\n1,2\n" * 50, b"\0" * 5000, b"GIF89a" + b"x" * 500, b"\xff" * 400]
)
def test_other_files_renamed_are_no_images(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(content)
    assert reason(path) in (Reason.NOT_AN_IMAGE, Reason.BAD_HEADER)


def test_an_empty_and_a_huge_file(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    path.touch()
    assert reason(path) == Reason.EMPTY
    with path.open("wb") as file:
        file.truncate(guard.LARGEST_FILE + 1)  # sparse
    assert reason(path) == Reason.TOO_LARGE


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"BitsAllocated": 0}, Reason.BAD_HEADER),
        ({"BitsAllocated": 1}, Reason.UNSUPPORTED_PIXELS),
        ({"BitsAllocated": 12}, Reason.UNSUPPORTED_PIXELS),
        ({"BitsAllocated": 32}, Reason.TRUNCATED),
        ({"BitsAllocated": 8}, Reason.BAD_HEADER),
        ({"BitsStored": 0}, Reason.BAD_HEADER),
        ({"BitsStored": 17, "HighBit": 16}, Reason.UNSUPPORTED_PIXELS),
        ({"HighBit": 3}, Reason.BAD_HEADER),
        ({"Rows": 0}, Reason.BAD_HEADER),
        ({"Rows": 1, "Columns": 1}, Reason.BAD_HEADER),
        ({"Rows": 73}, Reason.TRUNCATED),
        ({"Rows": 71}, Reason.SIZE_MISMATCH),
        ({"Columns": 59}, Reason.SIZE_MISMATCH),
        ({"Rows": 65535, "Columns": 65535}, Reason.TOO_LARGE),
    ],
)
def test_native_files_whose_tags_lie(tmp_path: Path, numbers: dict[str, int], expected: Reason) -> None:
    assert reason(patched(write(tmp_path / "a.dcm", picture(12), bits=12), **numbers)) == expected


@pytest.mark.parametrize("keyword", ["Rows", "Columns", "BitsAllocated", "PhotometricInterpretation"])
def test_a_tag_that_must_be_there_is_named(tmp_path: Path, keyword: str) -> None:
    with pytest.raises(Rejection, match=f"(?i){keyword[:4]}") as caught:
        decode(write(tmp_path / "a.dcm", picture(12), **{keyword: None}), SETTINGS)
    assert caught.value.reason == Reason.BAD_HEADER


def test_a_dicom_file_without_pixel_data(tmp_path: Path) -> None:
    made = dataset(picture(12))
    del made.PixelData
    assert reason(save(tmp_path / "a.dcm", made)) == Reason.MISSING_PIXEL_DATA


@pytest.mark.parametrize(
    "syntax", [uid.ExplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian, DEFLATED_FRAME, *CODED]
)
def test_a_file_cut_anywhere_is_rejected(tmp_path: Path, syntax: str) -> None:
    data = write(tmp_path / "a.dcm", picture(12), syntax=syntax, bits=12).read_bytes()
    path = tmp_path / "cut.dcm"
    for length in (1, 100, 128, 132, 140, 300, len(data) // 2, len(data) * 9 // 10, len(data) - 40):
        path.write_bytes(data[:length])
        assert isinstance(reason(path), Reason), length


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_a_cut_picture_is_rejected(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    assert cv2.imwrite(str(path), picture(8))
    data = path.read_bytes()
    for length in (8, 20, len(data) // 4, len(data) // 2, len(data) - 30):
        path.write_bytes(data[:length])
        assert isinstance(reason(path), Reason), length


def test_bombs_are_defused_before_they_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    assert cv2.imwrite(str(path), picture(8))
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    assert reason(path) == Reason.TOO_LARGE
    small = ConvertSettings(max_pixels=10_000)
    values = np.zeros((100, 100), np.uint16)
    values[50:] = 5
    bomb = write(
        tmp_path / "b.dcm", values, syntax=uid.DeflatedExplicitVRLittleEndian, EncapsulatedDocument=bytes(10**6)
    )
    assert reason(bomb, small) == Reason.TOO_LARGE
    assert reason(write(tmp_path / "c.dcm", np.tile(values, (2, 1))), small) == Reason.TOO_LARGE


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, *CODED])
@pytest.mark.parametrize("value", [0, 7, 4095])
def test_one_value_everywhere_is_blank(tmp_path: Path, syntax: str, value: int) -> None:
    path = write(tmp_path / "a.dcm", np.full((72, 60), value, np.uint16), syntax=syntax, bits=12)
    assert reason(path) == Reason.BLANK


def test_one_value_inside_its_padding_is_blank(tmp_path: Path) -> None:
    values = np.full((72, 60), 900, np.uint16)
    values[:, 40:] = 0
    assert reason(write(tmp_path / "a.dcm", values, PixelPaddingValue=0)) == Reason.BLANK


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.JPEG2000Lossless])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_picture_whose_rest_is_filler_is_half_decoded(tmp_path: Path, syntax: str, share: float) -> None:
    values = picture(12, rows=256, columns=200)
    values.reshape(-1)[int(values.size * share) :] = 0
    assert reason(write(tmp_path / "a.dcm", values, syntax=syntax, bits=12)) == Reason.HALF_DECODED


def test_breasts_and_collimated_fields_that_end_early_are_whole() -> None:
    y, x = np.mgrid[0:400, 0:300]
    breast = np.where((y - 150) ** 2 + x**2 < 140**2, 2000 + (x * y) % 97, 0).astype(np.uint16)
    guard.check_values(breast, 12, [])
    field = np.zeros((400, 300), np.uint16)
    field[110:280] = 1000 + np.random.default_rng(0).integers(0, 99, (170, 300))
    guard.check_values(field, 12, [])


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_lossless_jpeg_scan_that_ends_early_is_found_behind_a_forged_end(
    tmp_path: Path, bits: int, share: float
) -> None:
    values = picture(bits, rows=256, columns=200)
    frame = encode(values, uid.JPEGLosslessSV1, bits)
    cut = frame[: int(len(frame) * share)] + b"\xff\xd9"
    path = write(tmp_path / "a.dcm", values, syntax=uid.JPEGLosslessSV1, bits=bits, frames=[cut])
    assert reason(path) in (Reason.HALF_DECODED, Reason.DECODE_FAILED)
    values[100:] = 3  # and one that truly ends in background is whole
    path = write(tmp_path / "b.dcm", values[:120], syntax=uid.JPEGLosslessSV1, bits=bits)
    np.testing.assert_array_equal(decode(path, SETTINGS).stored, values[:120])


def test_fragments_that_lie_about_their_length(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", picture(12), syntax=uid.JPEGLSLossless, bits=12)
    data = path.read_bytes()
    at = data.rindex(b"\xfe\xff\x00\xe0") + 4
    for length in (0, 3, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFFFFFE):
        path.write_bytes(data[:at] + struct.pack("<I", length) + data[at + 4 :])
        assert isinstance(reason(path), Reason)


def test_nothing_told_says_who_the_patient_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    who = {"PatientName": "CANARY^JANE", "PatientID": "CANARY-77", "StudyDate": "19570131", "PatientAge": "CANARY"}
    path = tmp_path / "a.dcm"
    data = write(path, picture(12), syntax=uid.JPEGLosslessSV1, bits=12, **who, ViewPosition="CANARY").read_bytes()
    rng = np.random.default_rng(3)
    told = set()
    for _ in range(150):
        path.write_bytes(mutate(data, rng))
        try:
            told.add(str(vars(decode(path, SETTINGS).header)))
        except Rejection as rejection:
            told.add(f"{rejection} {rejection.__cause__} {rejection.args}")
    assert len(told) > 5
    told |= {*capfd.readouterr(), caplog.text}
    assert not [text for text in told if "CANARY" in text.replace("'view': 'CANARY'", "") or "19570131" in text]


def test_a_rejection_survives_the_way_between_processes() -> None:
    import pickle

    sent = pickle.loads(pickle.dumps(Rejection(Reason.TRUNCATED, "3 bytes")))
    assert (sent.reason, sent.detail, str(sent)) == (Reason.TRUNCATED, "3 bytes", "truncated: 3 bytes")


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One of eight kinds of damage; half of it in the header."""
    changed = bytearray(data)
    where = int(rng.integers(0, min(len(data), 700))) if rng.random() < 0.5 else int(rng.integers(0, len(data)))
    kind = int(rng.integers(0, 8))
    if kind == 0:
        return bytes(changed[:where])
    if kind == 1:
        changed[where] ^= 1 << int(rng.integers(0, 8))
    elif kind == 2:
        changed[where] = int(rng.integers(0, 256))
    elif kind == 3:
        changed[where : where + 16] = bytes(min(16, len(changed) - where))
    elif kind == 4:
        del changed[where : where + int(rng.integers(1, 64))]
    elif kind == 5:
        changed[where:where] = bytes(rng.integers(0, 256, int(rng.integers(1, 64)), dtype=np.uint8))
    elif kind == 6:
        changed[where : where + 4] = struct.pack("<I", int(rng.choice([0, 1, 0xFFFFFFFF, 0x7FFFFFFF, 65535])))[
            : len(changed) - where
        ]
    else:
        changed[where:] = changed[where:][::-1]
    return bytes(changed)


def replay(path: Path) -> str:
    """What a worker makes of a file: its values' digest, or the reason."""
    try:
        stored = decode(path, SETTINGS).stored
    except Rejection as rejection:
        return f"rejected: {rejection.reason}"
    assert min(stored.shape) > 1
    return hashlib.sha256(stored.tobytes()).hexdigest()


@pytest.mark.slow
def test_two_thousand_mutants_of_ten_encodings_all_end_in_typed_outcomes(tmp_path: Path) -> None:
    syntaxes = [
        *CODED,
        uid.ExplicitVRLittleEndian,
        uid.ImplicitVRLittleEndian,
        uid.DeflatedExplicitVRLittleEndian,
        uid.JPEGExtended12Bit,
        uid.JPEGBaseline8Bit,
    ]
    rng = np.random.default_rng(20)
    tasks: list[Path] = []
    clean: dict[Path, str] = {}
    for number, syntax in enumerate(syntaxes):
        bits = 8 if syntax == uid.JPEGBaseline8Bit else 12
        good = write(tmp_path / f"good-{number}.dcm", picture(bits), syntax=syntax, bits=bits, PatientName="A^B")
        data = good.read_bytes()
        for mutant in range(210):
            tasks.append(tmp_path / f"{number}-{mutant}.dcm")
            tasks[-1].write_bytes(mutate(data, rng))
            if mutant % 10 == 0:
                tasks.append(tmp_path / f"good-{number}-{mutant}.dcm")
                tasks[-1].write_bytes(data)
                clean[tasks[-1]] = replay(good)
    limits = Limits(timeout_s=20, memory_mb=2048, files_per_process=300)
    outcomes = {}
    for outcome in run_local(replay, tasks, 1, limits):
        outcomes[outcome.task] = f"failed: {outcome.failure.reason}" if outcome.failure else outcome.result
    assert set(outcomes) == set(tasks)
    assert {path: outcomes[path] for path in clean} == clean
    mutants = Counter(
        outcome if outcome.startswith(("rejected", "failed")) else "decoded"
        for path, outcome in outcomes.items()
        if path not in clean
    )
    assert sum(mutants.values()) == 2100
    known = {f"rejected: {kind}" for kind in Reason} | {"failed: crash", "failed: timeout", "failed: memory", "decoded"}
    assert set(mutants) <= known
    assert mutants["rejected: internal"] == 0
    assert mutants["failed: crash"] <= 10  # none when this was written; the process pool is there for those to come
