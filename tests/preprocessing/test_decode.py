"""Stored values are exact for every grayscale kind, and what cannot be decoded says why."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pandas as pd
import pydicom
import pytest
import tifffile
from pydicom import uid
from pydicom.dataset import Dataset

from preprocessing import manifest
from preprocessing.decode import decode
from preprocessing.dicom_facts import Header
from preprocessing.guard import Reason, Rejection
from preprocessing.settings import ConvertSettings
from tests.preprocessing.dicoms import DEFLATED_FRAME, LOSSLESS, NATIVE, dataset, encode, patched, picture, save, write

SETTINGS = ConvertSettings()


def reason(path: Path, settings: ConvertSettings = SETTINGS) -> Reason:
    with pytest.raises(Rejection) as caught:
        decode(path, settings)
    return caught.value.reason


# What becomes of the 139 real files that index.csv has no reference for, and why each is right.
WITHOUT_REFERENCE = {
    Reason.MULTI_FRAME: {
        "CT0012.fragmented_no_bot_jpeg_baseline.51.dcm",
        "CT0012.fragmented_no_bot_jpeg_lossless.57.dcm",
        "CT0012.fragmented_no_bot_jpeg_lossless.70.dcm",
        "CT0012.fragmented_no_bot_jpeg_ls.80.dcm",
        "CT0012.fragmented_no_bot_jpeg_ls.81.dcm",
        "CT0012.not_fragmented_bot_jpeg_ls.80.dcm",
        "CT0012.not_fragmented_bot_rle.dcm",
        "CT0012.not_fragmented_no_bot_jpeg_ls.80.dcm",
        "CT0012.not_fragmented_no_bot_rle.dcm",
        "explicit_little.dcm",
    },
    # Bitmaps of segmentations: Bits Allocated 1.
    Reason.UNSUPPORTED_PIXELS: {
        "liver_deflate.dcm",
        "liver_j2k.dcm",
        "liver_nonbyte_aligned.dcm",
        "liver_nonbyte_aligned_deflate.dcm",
        "liver_nonbyte_aligned_j2k.dcm",
        "liver_nonbyte_aligned_rle.dcm",
        "liver_rle.dcm",
    },
    # Progressive JPEG of 12 bits, retired from the standard in 2001; pydicom has no decoder either.
    Reason.UNSUPPORTED_TRANSFER_SYNTAX: {
        "CTImage.dcm_JPEGProcess10_12TransferSyntax_1.2.840.10008.1.2.4.55.dcm",
        "CTImage.dcm_JPEGProcess6_8TransferSyntax_1.2.840.10008.1.2.4.53.dcm",
    },
    # Damaged codestreams: OpenJPEG, through pydicom, dicomsdl and OpenCV, refuses both.
    Reason.DECODE_FAILED: {"966.dcm", "JPEG2000-embedded-sequence-delimiter.dcm"},
    # No Rows (0028,0010).
    Reason.BAD_HEADER: {"dwv-test_no-number-rows.dcm"},
}


@pytest.mark.real
def test_all_real_files_give_the_reference_values_or_a_typed_rejection(real_data: Path) -> None:
    index = pd.read_csv(real_data / "dicom" / "index.csv", dtype=str, keep_default_na=False)
    assert len(index) == 139
    expected = {name: kind for kind, names in WITHOUT_REFERENCE.items() for name in names}
    wrong = {}
    for file, reference in zip(index["file"], index["ref_sha256"], strict=True):
        try:
            stored = decode(real_data / "dicom" / file, SETTINGS).stored
            found = hashlib.sha256(stored.astype(stored.dtype.newbyteorder("<")).tobytes()).hexdigest()
        except Rejection as rejection:
            found = rejection.reason
        if found != (reference or expected.pop(Path(file).name)):
            wrong[file] = found
    assert wrong == {}
    assert expected == {}


@pytest.mark.real
def test_every_frame_of_the_real_multi_frame_files_is_pydicoms(real_data: Path) -> None:
    for path in sorted((real_data / "dicom").rglob("*")):
        if path.name not in WITHOUT_REFERENCE[Reason.MULTI_FRAME]:
            continue
        reference = pydicom.dcmread(path).pixel_array
        for frame in (0, len(reference) - 1):
            decoded = decode(path, ConvertSettings(frame=frame))
            np.testing.assert_array_equal(decoded.stored, reference[frame], err_msg=path.name)
            assert decoded.header.policy == "frame"


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: uid.UID(syntax).name[:40])
@pytest.mark.parametrize(("bits", "signed"), [(8, False), (8, True), (10, False), (12, True), (13, False), (16, True)])
@pytest.mark.parametrize("fragments", [1, 3])
def test_lossless_encodings_give_back_the_stored_values(
    tmp_path: Path, syntax: str, bits: int, signed: bool, fragments: int
) -> None:
    values = picture(bits, signed)
    path = write(tmp_path / "a.dcm", values, syntax=syntax, bits=bits, fragments=fragments, offset_table=fragments == 1)
    decoded = decode(path, SETTINGS)
    np.testing.assert_array_equal(decoded.stored, values)
    assert decoded.stored.dtype == values.dtype
    assert decoded.header.transfer_syntax == syntax
    assert decoded.header.policy == ""
    assert decoded.header.value_offset == (-(2 ** (bits - 1)) if signed else 0)


@pytest.mark.parametrize("bits", [2, 4, 7, 9, 11, 14, 15])
@pytest.mark.parametrize("syntax", [uid.JPEGLSLossless, uid.JPEGLosslessSV1, uid.JPEG2000Lossless, uid.RLELossless])
def test_every_depth_is_exact(tmp_path: Path, bits: int, syntax: str) -> None:
    values = picture(bits)
    np.testing.assert_array_equal(
        decode(write(tmp_path / "a.dcm", values, syntax=syntax, bits=bits), SETTINGS).stored, values
    )


@pytest.mark.parametrize("syntax", sorted(set(LOSSLESS) - NATIVE))
@pytest.mark.parametrize("bits", [8, 12])
def test_padding_behind_a_frame_costs_nothing(tmp_path: Path, syntax: str, bits: int) -> None:
    values = picture(bits)
    padded = encode(values, syntax, bits) + bytes(100)
    path = write(tmp_path / "a.dcm", values, syntax=syntax, bits=bits, frames=[padded])
    np.testing.assert_array_equal(decode(path, SETTINGS).stored, values)


@pytest.mark.parametrize("predictor", range(1, 8))
def test_every_predictor_of_lossless_jpeg_is_exact(tmp_path: Path, predictor: int) -> None:
    values = picture(12)
    frame = encode(values, uid.JPEGLossless, 12, predictor=predictor)
    path = write(tmp_path / "a.dcm", values, syntax=uid.JPEGLossless, bits=12, frames=[frame])
    np.testing.assert_array_equal(decode(path, SETTINGS).stored, values)


@pytest.mark.parametrize("syntax", [*sorted(NATIVE), uid.RLELossless, DEFLATED_FRAME, uid.JPEGLosslessSV1])
@pytest.mark.parametrize(("bits", "high"), [(8, 15), (10, 9), (10, 13), (12, 11), (12, 15), (15, 14)])
@pytest.mark.parametrize("signed", [False, True])
def test_overlays_and_junk_around_the_stored_bits_are_cut_off(
    tmp_path: Path, syntax: str, bits: int, high: int, signed: bool
) -> None:
    # PS3.5 8.1.1: the bits from High Bit down are the value; pydicom neither shifts nor masks them.
    values = picture(bits, signed).astype(np.int16 if signed else np.uint16)
    junk = np.random.default_rng(1).integers(0, 65536, values.shape)
    path = write(tmp_path / "a.dcm", values, syntax=syntax, bits=bits, high_bit=high, junk=junk)
    decoded = decode(path, SETTINGS)
    np.testing.assert_array_equal(decoded.stored, values)


def test_extended_jpeg_equals_the_iso_reference_code(tmp_path: Path) -> None:
    values = picture(12, rows=128, columns=96)
    path = write(tmp_path / "a.dcm", values, syntax=uid.JPEGExtended12Bit, bits=12)
    decoded = decode(path, SETTINGS)
    np.testing.assert_array_equal(decoded.stored, pydicom.dcmread(path).pixel_array)
    assert np.abs(decoded.stored.astype(int) - values).max() < 256


def test_baseline_jpeg_equals_libjpeg_turbo(tmp_path: Path) -> None:
    values = picture(8, rows=128, columns=96)
    frame = encode(values, uid.JPEGBaseline8Bit, 8)
    path = write(tmp_path / "a.dcm", values, syntax=uid.JPEGBaseline8Bit, bits=8, frames=[frame])
    stored = decode(path, SETTINGS).stored
    np.testing.assert_array_equal(stored, cv2.imdecode(np.frombuffer(frame, np.uint8), cv2.IMREAD_UNCHANGED))
    assert np.abs(stored.astype(int) - pydicom.dcmread(path).pixel_array).max() <= 1


def test_jpeg_2000_whose_sign_contradicts_pixel_representation_keeps_its_bits(tmp_path: Path) -> None:
    values = picture(13, signed=True)
    unsigned = (values.view(np.uint16) & 0x1FFF).astype(np.uint16)
    frame = encode(unsigned, uid.JPEG2000Lossless, 13)
    path = write(tmp_path / "a.dcm", values, syntax=uid.JPEG2000Lossless, bits=13, frames=[frame])
    np.testing.assert_array_equal(decode(path, SETTINGS).stored, values)


def test_a_jp2_file_in_place_of_a_codestream_is_decoded(tmp_path: Path) -> None:
    values = picture(12)
    frame = bytes(imagecodecs.jpeg2k_encode(values, level=0, reversible=True, codecformat="JP2", bitspersample=12))
    assert frame.startswith(b"\0\0\0\x0cjP")
    path = write(tmp_path / "a.dcm", values, syntax=uid.JPEG2000Lossless, bits=12, frames=[frame])
    np.testing.assert_array_equal(decode(path, SETTINGS).stored, values)


@pytest.mark.parametrize(
    ("named", "real"),
    [
        (uid.JPEGLosslessSV1, uid.JPEG2000Lossless),
        (uid.JPEG2000Lossless, uid.JPEGLosslessSV1),
        (uid.JPEGLSLossless, uid.HTJ2K),
        (uid.RLELossless, uid.JPEGLSLossless),
        (uid.ExplicitVRLittleEndian, uid.RLELossless),
        (uid.JPEG2000, uid.HTJ2KLossless),
        ("1.2.840.10008.1.2.4.64", uid.JPEGLosslessSV1),
        (uid.ExplicitVRLittleEndian, uid.JPEG2000Lossless),
    ],
)
def test_a_transfer_syntax_that_contradicts_the_codestream_is_noticed_and_the_codestream_decoded(
    tmp_path: Path, named: str, real: str
) -> None:
    values = picture(12)
    made = dataset(values, syntax=real, bits=12)
    path = save(tmp_path / "a.dcm", made)
    data = path.read_bytes().replace(
        f"{real}".encode().ljust(len(real) + len(real) % 2, b"\0"), _same_length(named, real)
    )
    path.write_bytes(data)
    assert pydicom.dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID == named
    decoded = decode(path, SETTINGS)
    np.testing.assert_array_equal(decoded.stored, values)
    assert decoded.header.policy == "transfer-syntax-contradicted"
    assert decoded.header.transfer_syntax == named


def _same_length(named: str, real: str) -> bytes:
    width = len(real) + len(real) % 2
    if len(named) > width:
        pytest.fail("the test's UIDs must fit")
    return named.encode().ljust(width, b"\0")


def test_native_values_under_a_compressed_syntax_are_decoded_and_noticed(tmp_path: Path) -> None:
    values = picture(12)
    path = write(tmp_path / "a.dcm", values, bits=12)
    data = path.read_bytes()
    old = struct_ui(uid.ExplicitVRLittleEndian)
    path.write_bytes(data.replace(old, struct_ui("1.2.840.10008.1.2.5")))
    decoded = decode(path, SETTINGS)
    np.testing.assert_array_equal(decoded.stored, values)
    assert decoded.header.policy == "transfer-syntax-contradicted"


def struct_ui(value: str) -> bytes:
    return value.encode().ljust(20, b"\0")


@pytest.mark.parametrize(
    "syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEG2000Lossless, uid.JPEGLSLossless]
)
@pytest.mark.parametrize(("fragments", "offset_table"), [(1, True), (1, False), (2, True), (2, False)])
def test_multi_frame_files_are_rejected_unless_a_frame_is_chosen(
    tmp_path: Path, syntax: str, fragments: int, offset_table: bool
) -> None:
    stack = [picture(12, seed=seed) for seed in range(4)]
    path = write(
        tmp_path / "a.dcm",
        stack[0],
        syntax=syntax,
        bits=12,
        frames=[encode(frame, syntax, 16 if syntax == uid.RLELossless else 12) for frame in stack],
        fragments=fragments,
        offset_table=offset_table,
    )
    assert reason(path) == Reason.MULTI_FRAME
    for number, frame in enumerate(stack):
        np.testing.assert_array_equal(decode(path, ConvertSettings(frame=number)).stored, frame)
    assert reason(path, ConvertSettings(frame=4)) == Reason.MULTI_FRAME


def test_a_single_frame_file_is_decoded_whatever_frame_is_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", picture(12), bits=12, NumberOfFrames=1)
    np.testing.assert_array_equal(decode(path, ConvertSettings(frame=7)).stored, picture(12))


def test_tomosynthesis_is_named_and_a_chosen_frame_marked(tmp_path: Path) -> None:
    stack = [picture(10, seed=seed) for seed in range(3)]
    frames = [encode(frame, uid.JPEG2000Lossless, 10) for frame in stack]
    path = write(
        tmp_path / "a.dcm",
        stack[0],
        syntax=uid.JPEG2000Lossless,
        bits=10,
        frames=frames,
        ImageType=["DERIVED", "PRIMARY", "TOMOSYNTHESIS", "NONE"],
    )
    with pytest.raises(Rejection, match="3 frames of tomosynthesis"):
        decode(path, SETTINGS)
    assert decode(path, ConvertSettings(frame=1)).header.policy == "tomosynthesis-frame"


def test_facts_of_the_chosen_frames_functional_groups_come_first(tmp_path: Path) -> None:
    def window(center: float) -> Dataset:
        voi, group = Dataset(), Dataset()
        voi.WindowCenter, voi.WindowWidth = center, 100
        group.FrameVOILUTSequence = [voi]
        return group

    anatomy, shared = Dataset(), window(1)
    anatomy.FrameLaterality = "R"
    shared.FrameAnatomySequence = [anatomy]
    stack = [picture(10, seed=seed) for seed in range(2)]
    path = write(
        tmp_path / "a.dcm",
        stack[0],
        bits=10,
        frames=[encode(frame, uid.ExplicitVRLittleEndian, 10) for frame in stack],
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=[window(500), window(600)],
        WindowCenter=2,
        WindowWidth=100,
    )
    header = decode(path, ConvertSettings(frame=1)).header
    assert (header.window_center, header.laterality) == ([600], "R")


@pytest.mark.parametrize(("suffix", "bits"), [("png", 8), ("png", 16), ("tif", 8), ("tif", 16), ("jpg", 8)])
def test_raster_pictures_are_exact(tmp_path: Path, suffix: str, bits: int) -> None:
    values = picture(bits)
    path = tmp_path / f"a.{suffix}"
    assert cv2.imwrite(str(path), values, [cv2.IMWRITE_JPEG_QUALITY, 100])
    decoded = decode(path, SETTINGS)
    np.testing.assert_array_equal(decoded.stored, cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
    assert decoded.header.bits_stored == bits
    assert decoded.header.window_center == ([127.5] if bits == 8 else [])
    assert decoded.header.format == {"png": "png", "tif": "tiff", "jpg": "jpeg"}[suffix]


def test_a_jpeg_picture_that_is_cut_anywhere_is_called_that(tmp_path: Path) -> None:
    whole = cv2.imencode(".jpg", picture(8))[1].tobytes()
    path = tmp_path / "a.jpg"
    for length in range(3, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(Rejection) as caught:
            decode(path, SETTINGS)
        assert caught.value.reason is Reason.TRUNCATED, length


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_equal_channels_are_one_and_colour_is_its_luminance(tmp_path: Path, suffix: str) -> None:
    values = picture(8)
    path = tmp_path / f"a.{suffix}"
    assert cv2.imwrite(str(path), np.dstack([values] * 3))
    np.testing.assert_array_equal(decode(path, SETTINGS).stored, values)
    colour = np.dstack([values, values[::-1], values[:, ::-1]])
    assert cv2.imwrite(str(path), colour)
    expected = cv2.cvtColor(colour, cv2.COLOR_BGR2GRAY)
    assert np.abs(decode(path, SETTINGS).stored.astype(int) - expected).max() <= 1


def test_tiff_signed_values_inverse_photometry_and_reduced_copies(tmp_path: Path) -> None:
    values = picture(16, signed=True)
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        writer.write(values, photometric="miniswhite", tile=(16, 16), subifds=1)
        writer.write(values[::2, ::2], subfiletype=1)
    decoded = decode(path, SETTINGS)
    np.testing.assert_array_equal(decoded.stored, values)
    assert (decoded.header.photometric, decoded.header.value_offset) == ("MONOCHROME1", -32768)


def test_a_tiff_of_several_pages_is_multi_frame_and_of_floats_unsupported(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.stack([picture(16), picture(16, seed=1)]), photometric="minisblack")
    assert reason(tmp_path / "a.tif") == Reason.MULTI_FRAME
    np.testing.assert_array_equal(decode(tmp_path / "a.tif", ConvertSettings(frame=1)).stored, picture(16, seed=1))
    assert reason(tmp_path / "a.tif", ConvertSettings(frame=2)) == Reason.MULTI_FRAME
    tifffile.imwrite(tmp_path / "b.tif", picture(8).astype(np.float32))
    assert reason(tmp_path / "b.tif") == Reason.UNSUPPORTED_PIXELS


def test_a_tiff_of_a_palette_or_of_planes_is_colour_and_a_cut_one_called_that(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(8), photometric="palette", colormap=np.zeros((3, 256), np.uint16))
    assert reason(path) == Reason.COLOUR
    tifffile.imwrite(path, np.stack([picture(8)] * 3), photometric="rgb", planarconfig="separate")
    assert reason(path) == Reason.COLOUR
    tifffile.imwrite(path, picture(16))
    path.write_bytes(path.read_bytes()[:-1])
    assert reason(path) == Reason.TRUNCATED


def test_the_header_has_a_field_for_every_manifest_column_that_a_file_can_fill() -> None:
    fields = set(Header.__dataclass_fields__)
    assert fields <= set(manifest.COLUMNS)
    assert {"transfer_syntax", "policy", "voi_lut", "padding", "pixel_spacing", "presentation_intent"} <= fields


def test_facts_come_from_the_tags(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.dcm",
        picture(12),
        bits=12,
        PresentationIntentType="FOR PRESENTATION",
        PatientID="Jane-Doe-1",
        PatientName="DOE^JANE",
        PatientAge="047Y",
        ImageLaterality="R",
        ViewPosition="MLO",
        BreastImplantPresent="YES",
        ImagerPixelSpacing=[0.07, 0.07],
        PixelSpacing=[0.05, 0.05],  # calibrated to the object's plane
        PixelPaddingValue=0,
    )
    decoded = decode(path, SETTINGS)
    header = decoded.header
    assert (header.laterality, header.view, header.age, header.implant) == ("R", "MLO", 47, 1)
    assert (header.presentation_intent, header.pixel_spacing, header.padding) == ("FOR PRESENTATION", 0.07, [0])
    assert header.patient_id.startswith("p")
    assert not any("Doe" in str(value) or "DOE" in str(value) for value in vars(header).values())


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"ViewPosition": "ML", "code": "399368009"}, "MLO"),
        ({"code": "R-10242"}, "CC"),
        ({"code": "R-10226", "modifier": "399011000"}, "AT"),
        ({"PatientOrientation": "CC"}, "CC"),
        ({"ViewPosition": "lm"}, "LM"),
        ({"ViewPosition": "J. Doe 1970"}, ""),
        ({}, ""),
    ],
)
def test_the_view_comes_from_its_code_then_its_position(tmp_path: Path, tags: dict[str, str], expected: str) -> None:
    code = Dataset()
    if "code" in tags:
        code.CodeValue = tags["code"]
    if "modifier" in tags:
        modifier = Dataset()
        modifier.CodeValue = tags["modifier"]
        code.ViewModifierCodeSequence = [modifier]
    rest = {keyword: value for keyword, value in tags.items() if keyword not in ("code", "modifier")}
    path = write(tmp_path / "a.dcm", picture(12), bits=12, ViewCodeSequence=[code] if "code" in tags else None, **rest)
    assert decode(path, SETTINGS).header.view == expected


@pytest.mark.parametrize(
    ("tags", "side"),
    [
        ({"ImageLaterality": "L", "Laterality": "R"}, "L"),
        ({"Laterality": "R"}, "R"),
        ({"ImageLaterality": "B", "Laterality": "R"}, "R"),
        ({"ImageLaterality": "U"}, ""),
    ],
)
def test_laterality_has_its_fallbacks(tmp_path: Path, tags: dict[str, str], side: str) -> None:
    assert decode(write(tmp_path / "a.dcm", picture(12), bits=12, **tags), SETTINGS).header.laterality == side


@pytest.mark.parametrize(
    ("age", "years"),
    [("047Y", 47), ("018M", 1.5), ("120Y", 120), ("121Y", math.nan), ("000Y", math.nan), ("old", math.nan)],
)
def test_ages_are_years(tmp_path: Path, age: str, years: float) -> None:
    found = decode(write(tmp_path / "a.dcm", picture(12), bits=12, PatientAge=age), SETTINGS).header.age
    assert found == years or (math.isnan(found) and math.isnan(years))


def test_without_a_high_bit_the_lowest_bits_are_the_stored_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", picture(12), bits=12, HighBit=None)
    np.testing.assert_array_equal(decode(path, SETTINGS).stored, picture(12))


def test_a_picture_of_one_frame_is_no_chosen_frame(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", picture(12), bits=12)
    assert decode(path, ConvertSettings(frame=1)).header.policy == ""


@pytest.mark.parametrize(("said", "implant"), [("YES", 1), ("no", 0), ("UNKNOWN", math.nan), (None, math.nan)])
def test_no_implant_is_known_and_silence_is_not(tmp_path: Path, said: str | None, implant: float) -> None:
    path = write(tmp_path / "a.dcm", picture(12), bits=12, BreastImplantPresent=said)
    np.testing.assert_equal(decode(path, SETTINGS).header.implant, implant)


def test_padding_of_unsigned_values_stays_as_large_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", picture(16), bits=16, PixelPaddingValue=65000)
    assert decode(path, SETTINGS).header.padding == [65000]


def test_a_slope_of_nothing_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", picture(12), bits=12, RescaleSlope=0, RescaleIntercept=5)
    header = decode(path, SETTINGS).header
    assert (header.rescale_slope, header.rescale_intercept) == (1, 5)


def test_damaged_facts_never_cost_the_picture(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", picture(12), bits=12, WindowCenter=2751, WindowWidth=2000, PatientAge="047Y")
    path.write_bytes(path.read_bytes().replace(b"2751", b"2xx1").replace(b"047Y", b"\xff\xfe?Y"))
    decoded = decode(path, SETTINGS)
    np.testing.assert_array_equal(decoded.stored, picture(12))
    assert decoded.header.window_center == []
    assert math.isnan(decoded.header.age)


@pytest.mark.parametrize(
    ("tags", "mark"),
    [
        ({"PresentationIntentType": "FOR PROCESSING"}, "for-processing"),
        ({"ImageType": ["DERIVED", "PRIMARY", "TOMO", "GENERATED_2D"]}, "synthesised-2d"),
        ({"ImageType": ["DERIVED", "PRIMARY", "TOMOSYNTHESIS", "NONE"]}, "synthesised-2d"),
        ({"EstimatedRadiographicMagnificationFactor": 1.8}, "magnified"),
        ({"EstimatedRadiographicMagnificationFactor": 1.07}, ""),
        ({"SOPClassUID": uid.SecondaryCaptureImageStorage}, "secondary-capture"),
    ],
)
def test_unusual_pictures_are_marked_by_the_policy(tmp_path: Path, tags: dict, mark: str) -> None:
    assert decode(write(tmp_path / "a.dcm", picture(12), bits=12, **tags), SETTINGS).header.policy == mark


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL", "PALETTE COLOR"])
def test_colour_dicom_is_rejected(tmp_path: Path, photometric: str) -> None:
    assert reason(write(tmp_path / "a.dcm", picture(8), PhotometricInterpretation=photometric)) == Reason.COLOUR


@pytest.mark.parametrize(
    "syntax", [uid.JPEGLosslessSV1, uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.RLELossless, uid.HTJ2K]
)
@pytest.mark.parametrize(
    ("keyword", "number"), [("Rows", 71), ("Rows", 73), ("Columns", 59), ("Columns", 61), ("Rows", 700)]
)
def test_a_header_whose_size_disagrees_with_the_codestream_is_rejected(
    tmp_path: Path, syntax: str, keyword: str, number: int
) -> None:
    path = patched(write(tmp_path / "a.dcm", picture(12), syntax=syntax, bits=12), **{keyword: number})
    assert reason(path) in (Reason.SIZE_MISMATCH, Reason.DECODE_FAILED)


def test_values_that_bits_stored_does_not_allow_are_rejected(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", picture(12), syntax=uid.JPEG2000Lossless, bits=12)
    assert reason(patched(path, BitsStored=11, HighBit=10)) == Reason.OUT_OF_RANGE


def test_no_memory_of_another_picture_is_ever_handed_out(tmp_path: Path) -> None:
    # What is cut is rejected; the number of the values that are right is never partial.
    values = picture(12, rows=256, columns=200)
    for syntax in (uid.JPEGLosslessSV1, uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.RLELossless, uid.HTJ2K):
        frame = encode(values, syntax, 16 if syntax == uid.RLELossless else 12)
        for share in (0.02, 0.3, 0.6, 0.9):
            for end in (b"", b"\xff\xd9"):
                cut = frame[: int(len(frame) * share)] + end
                path = write(tmp_path / "a.dcm", values, syntax=syntax, bits=12, frames=[cut])
                with pytest.raises(Rejection):
                    decode(path, SETTINGS)
