"""What a DICOM file says of its picture for the manifest: view, windows, spacing and the rest, each with its fallbacks.

Vendors differ, and so each fact is looked for where the standard puts it and then where files have it. A fact that is
absent or nonsense is left empty: it never costs the picture.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydicom.dataset import Dataset

from preprocessing import policy

# ACR codes of CID 4014 (views) and CID 4015 (modifiers), by SNOMED CT and by the older SNOMED RT code.
_VIEWS = {
    "399162004": "CC", "R-10242": "CC", "399368009": "MLO", "R-10226": "MLO", "399260004": "ML", "R-10224": "ML",
    "399352003": "LM", "R-10228": "LM", "399099002": "LMO", "R-10230": "LMO", "399196006": "FB", "R-10244": "FB",
    "399188001": "SIO", "R-102D0": "SIO", "441555000": "ISO", "R-40AAA": "ISO", "399192008": "XCCL", "R-1024A": "XCCL",
    "399101009": "XCCM", "R-1024B": "XCCM", "127457009": "SPECIMEN", "G-8310": "SPECIMEN",
}  # fmt: skip
_AXILLARY_TAIL = {"399011000", "R-102D1"}
_IMPLANT_DISPLACED = {"399209000", "R-102D5"}
_MAGNIFIED = {"399163009", "R-102D6", "399055006", "R-102D7"}
_FUNCTIONS = {"LINEAR", "LINEAR_EXACT", "SIGMOID"}
_TOMOSYNTHESIS = "1.2.840.10008.5.1.4.1.1.13.1.3"  # Breast Tomosynthesis Image Storage
_FOR_PROCESSING = "1.2.840.10008.5.1.4.1.1.1.2.1"  # Digital Mammography X-Ray Image Storage - For Processing
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_SYNTHESISED = {"GENERATED_2D", "TOMO_2D"}
_MAGNIFICATION = "EstimatedRadiographicMagnificationFactor"
_MAGNIFIED_OVER = 1.3  # contact mammography has 1.0 to 1.1
_LONGEST_VIEW = 8
_YEARS = {"D": 365.25, "W": 52.18, "M": 12.0, "Y": 1.0}


@dataclass(frozen=True)
class Header:
    """What the manifest wants to know of a source file; the names are its columns. Defaults are those of a picture
    that has no tags (PNG, JPEG, TIFF)."""

    format: str
    photometric: str
    bits_stored: int
    patient_id: str = ""  # a pseudonym; empty where the file has none
    transfer_syntax: str = ""
    presentation_intent: str = ""
    policy: str = ""  # the file's own marks; view and implant, which a CSV may tell, are added by `policy.describe`
    value_offset: int = 0
    laterality: str = ""
    view: str = ""
    age: float = math.nan
    implant: float = math.nan
    rescale_slope: float = 1.0
    rescale_intercept: float = 0.0
    window_center: list[float] = field(default_factory=list)
    window_width: list[float] = field(default_factory=list)
    window_function: list[str] = field(default_factory=list)
    voi_lut: list[int] = field(default_factory=list)
    voi_lut_first: int = 0
    voi_lut_bits: int = 0
    padding: list[int] = field(default_factory=list)
    pixel_spacing: float = math.nan


def read(
    dataset: Dataset,
    syntax: str,
    photometric: str,
    bits_stored: int,
    signed: bool,
    frame: int | None,
    little_endian: bool = True,
) -> Header:
    """The facts of a data set.

    Args:
        dataset: without its pixel data.
        syntax: transfer syntax UID.
        photometric: MONOCHROME1 or MONOCHROME2.
        bits_stored: of a stored value.
        signed: whether stored values are two's complement.
        frame: taken out of a multi-frame file, else None.
        little_endian: the byte order of the data set, in which OW values lie.
    """
    groups = [*_functional_groups(dataset, frame or 0), dataset]
    view, modifiers = _view(groups)
    implant = {"YES": 1.0, "NO": 0.0}.get(text(dataset, "BreastImplantPresent").upper(), math.nan)
    intent = text(dataset, "PresentationIntentType").upper()
    windows = _windows(groups)
    slope, intercept = _number(groups, "RescaleSlope", 1.0) or 1.0, _number(groups, "RescaleIntercept", 0.0)
    lut = _lut(_first_item(groups, "VOILUTSequence"), signed or intercept < 0, little_endian)
    modality = _lut(_first_item(groups, "ModalityLUTSequence"), signed, little_endian)
    if modality is not None:
        lut = _through(modality, windows, lut)
        windows, slope, intercept = [], 1.0, 0.0
    return Header(
        format="dicom",
        photometric=photometric,
        bits_stored=bits_stored,
        patient_id=_pseudonym(dataset),
        transfer_syntax=syntax,
        presentation_intent=intent if intent in ("FOR PRESENTATION", "FOR PROCESSING") else "",
        policy=_marks(dataset, intent, modifiers, frame),
        value_offset=-(2 ** (bits_stored - 1)) if signed else 0,
        laterality=_laterality(groups),
        view=view,
        age=_age(text(dataset, "PatientAge")),
        implant=implant,
        rescale_slope=slope,
        rescale_intercept=intercept,
        window_center=[center for center, _, _ in windows],
        window_width=[width for _, width, _ in windows],
        window_function=[function for _, _, function in windows],
        voi_lut=lut.values if lut else [],
        voi_lut_first=lut.first if lut else 0,
        voi_lut_bits=lut.bits if lut else 0,
        padding=_padding(dataset, signed),
        pixel_spacing=_spacing(groups),
    )


def text(dataset: Dataset, keyword: str) -> str:
    """A tag's first value as text, empty where it is absent or unreadable."""
    values = _values(dataset, keyword)
    return str(values[0]).strip() if values else ""


def is_tomosynthesis(dataset: Dataset) -> bool:
    """By its SOP class or Image Type (PS3.3 C.8.21.3, and vendors' own)."""
    kinds = [str(value).upper() for value in _values(dataset, "ImageType")]
    return text(dataset, "SOPClassUID") == _TOMOSYNTHESIS or any("TOMO" in kind for kind in kinds[:3])


@dataclass(frozen=True)
class _Lut:
    values: list[int]
    first: int
    bits: int


def _values(dataset: Dataset, keyword: str) -> list[Any]:
    """A tag's values, none where it is absent or unreadable."""
    try:
        value = dataset.get(keyword)
    except Exception:  # noqa: BLE001  pydicom converts values when they are asked for, and a damaged one may raise anything
        return []
    if value is None or isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        return [] if value is None or value in ("", b"") else [value]
    return list(value)


def _first(groups: Sequence[Dataset], keyword: str) -> list[Any]:
    return next((values for dataset in groups if (values := _values(dataset, keyword))), [])


def _first_item(groups: Sequence[Dataset], keyword: str) -> Dataset | None:
    values = _first(groups, keyword)
    return values[0] if values and isinstance(values[0], Dataset) else None


def _numbers(groups: Sequence[Dataset], keyword: str) -> list[float]:
    try:
        return [float(value) for value in _first(groups, keyword)]
    except (ValueError, TypeError, OverflowError):
        return []


def _number(groups: Sequence[Dataset], keyword: str, default: float) -> float:
    values = _numbers(groups, keyword)
    return values[0] if values and math.isfinite(values[0]) else default


def _functional_groups(dataset: Dataset, frame: int) -> list[Dataset]:
    """The macros that hold for a frame, its own before the shared ones (PS3.3 C.7.6.16)."""
    found: list[Dataset] = []
    for keyword, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        groups = _values(dataset, keyword)
        if index < len(groups) and isinstance(groups[index], Dataset):
            names = [element.keyword for element in groups[index] if element.VR == "SQ"]
            found += [item for name in names if (item := _first_item([groups[index]], name)) is not None]
    return found


def _view(groups: Sequence[Dataset]) -> tuple[str, set[str]]:
    """View and the codes of its modifiers: View Code Sequence (0054,0220) before View Position (0018,5101), into which
    some write ML for MLO. The axillary tail is a modifier by the standard and a view by its name."""
    code = _first_item(groups, "ViewCodeSequence")
    modifiers: set[str] = set()
    view = ""
    if code is not None:
        view = _VIEWS.get(text(code, "CodeValue"), "")
        modifiers = {
            text(item, "CodeValue") for item in _values(code, "ViewModifierCodeSequence") if isinstance(item, Dataset)
        }
    position = next((found for dataset in groups if (found := text(dataset, "ViewPosition"))), "").upper()
    position = position if position.isalpha() and len(position) <= _LONGEST_VIEW else ""
    orientation = text(groups[-1], "PatientOrientation").upper()  # where CBIS-DDSM's files have their view
    position = position or (orientation if orientation in _VIEWS.values() else "")
    return ("AT" if modifiers & _AXILLARY_TAIL else view or position), modifiers


def _laterality(groups: Sequence[Dataset]) -> str:
    """Image Laterality (0020,0062), Frame Laterality (0020,9072), Laterality (0020,0060), in this order."""
    for keyword in ("ImageLaterality", "FrameLaterality", "Laterality"):
        values = [side for dataset in groups if (side := text(dataset, keyword).upper()) in ("L", "R")]
        if values:
            return values[0]
    return ""


def _marks(dataset: Dataset, intent: str, modifiers: set[str], frame: int | None) -> str:
    tomosynthesis = is_tomosynthesis(dataset)
    kinds = {str(value).upper() for value in _values(dataset, "ImageType")}
    marks = {
        policy.FOR_PROCESSING: intent == "FOR PROCESSING" or text(dataset, "SOPClassUID") == _FOR_PROCESSING,
        policy.TOMOSYNTHESIS_FRAME: frame is not None and tomosynthesis,
        policy.FRAME: frame is not None and not tomosynthesis,
        policy.SYNTHESISED: frame is None and (tomosynthesis or bool(kinds & _SYNTHESISED)),
        policy.IMPLANT_DISPLACED: bool(modifiers & _IMPLANT_DISPLACED),
        policy.MAGNIFIED: bool(modifiers & _MAGNIFIED) or _number([dataset], _MAGNIFICATION, 1.0) > _MAGNIFIED_OVER,
        policy.SECONDARY: text(dataset, "SOPClassUID").startswith(_SECONDARY_CAPTURE),
    }
    return ";".join(mark for mark, holds in marks.items() if holds)


def _age(value: str) -> float:
    """Patient's Age (0010,1010), `047Y`, in years; 0 and over 120 are nobody's."""
    if len(value) < 2 or value[-1] not in _YEARS or not value[:-1].isdigit():
        return math.nan
    years = int(value[:-1]) / _YEARS[value[-1]]
    return years if 0 < years <= 120 else math.nan


def _spacing(groups: Sequence[Dataset]) -> float:
    """Millimetres a pixel, rows: at the detector where the file says so (0018,1164), else (0028,0030), (0018,2010)."""
    for keyword in ("ImagerPixelSpacing", "PixelSpacing", "NominalScannedPixelSpacing"):
        values = _numbers(groups, keyword)
        if values and math.isfinite(values[0]) and 0 < values[0] < 10:
            return values[0]
    return math.nan


def _windows(groups: Sequence[Dataset]) -> list[tuple[float, float, str]]:
    """Centre, width and function of each window that is possible (PS3.3 C.11.2.1.2); an absent or unknown function is
    LINEAR."""
    named = next((found for dataset in groups if (found := text(dataset, "VOILUTFunction"))), "").upper()
    function = named if named in _FUNCTIONS else "LINEAR"
    least = 1.0 if function == "LINEAR" else np.finfo(np.float32).tiny
    pairs = zip(_numbers(groups, "WindowCenter"), _numbers(groups, "WindowWidth"), strict=False)
    return [(c, w, function) for c, w in pairs if math.isfinite(c) and math.isfinite(w) and w >= least]


def _lut(item: Dataset | None, negative: bool, little_endian: bool) -> _Lut | None:
    """A LUT Sequence's item (PS3.3 C.11.2.1.1): LUT Descriptor (0028,3002) and LUT Data (0028,3006).

    Args:
        item: of the sequence.
        negative: whether its input can be negative, so that a first value over 32767 is a negative one.
        little_endian: the byte order of its data, where that is OW.
    """
    if item is None:
        return None
    try:
        count, first, bits = (int(value) for value in _values(item, "LUTDescriptor"))
        count = count or 65536
        data = item.get("LUTData")
        if isinstance(data, bytes):
            words = "<u2" if little_endian else ">u2"
            values = np.frombuffer(
                data[: count if len(data) < 2 * count else 2 * count], np.uint8 if len(data) < 2 * count else words
            )
        else:
            values = np.asarray(_values(item, "LUTData"), np.int64) & 0xFFFF
    except (ValueError, TypeError, OverflowError):
        return None
    if not 1 <= bits <= 16 or len(values) < count or not count:
        return None
    if negative and first > 32767:
        first -= 65536
    return _Lut([int(value) for value in values[:count]], first, bits)


def _through(modality: _Lut, windows: list[tuple[float, float, str]], voi: _Lut | None) -> _Lut:
    """A Modality LUT (PS3.3 C.11.1) and the VOI transformation after it as one table over stored values, 16 bits."""
    values = np.array(modality.values, np.float64)
    if voi is not None:
        index = np.clip(values - voi.first, 0, len(voi.values) - 1).astype(np.int64)
        shown = np.array(voi.values, np.float64)[index] / (2**voi.bits - 1)
    else:
        center, width, function = (
            windows[0] if windows else (2 ** (modality.bits - 1) - 0.5, 2.0**modality.bits - 1, "LINEAR_EXACT")
        )
        if function == "SIGMOID":
            shown = 1 / (1 + np.exp(-4 * (values - center) / width))
        elif function == "LINEAR_EXACT":
            shown = (values - center) / width + 0.5
        else:
            shown = (values - (center - 0.5)) / max(width - 1, 1e-6) + 0.5
    return _Lut([int(value) for value in np.rint(np.clip(shown, 0, 1) * 65535)], modality.first, 16)


def _padding(dataset: Dataset, signed: bool) -> list[int]:
    """Pixel Padding Value (0028,0120) and Range Limit (0028,0121) as stored values, whatever sign they were written
    with (PS3.3 C.7.5.1.1.2)."""
    values: list[int] = []
    for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        found = _values(dataset, keyword)
        if not found or not isinstance(found[0], int):
            break
        value = int(found[0]) & 0xFFFF
        values.append(value - 65536 if signed and value > 32767 else value)
    return values


def _pseudonym(dataset: Dataset) -> str:
    """The same for all files of a patient, and not the Patient ID (0010,0020); empty where there is none."""
    identifier = text(dataset, "PatientID")
    return "p" + hashlib.sha256(f"mammopipe patient {identifier}".encode()).hexdigest()[:16] if identifier else ""
