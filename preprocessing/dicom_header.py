"""The facts of a DICOM file that a manifest row wants, out of its tags; nothing of it names a patient."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from pydicom.dataset import Dataset

from preprocessing.guard import Reason, Rejection

# View codes of CID 4014 (SNOMED CT, and SRT before it) as the challenge spells them.
_VIEW_CODES = {
    "399162004": "CC", "R-10242": "CC", "399368009": "MLO", "R-10226": "MLO", "399260004": "ML", "R-10224": "ML",
    "399352003": "LM", "R-10228": "LM", "399099002": "LMO", "R-10230": "LMO", "399255002": "FB", "R-10244": "FB",
    "399101009": "XCCL", "Y-X1770": "XCCL", "399192003": "XCCM", "Y-X1771": "XCCM",
}  # fmt: skip
_VIEWS = {"CC", "MLO", "ML", "LM", "LMO", "AT", "XCCL", "XCCM", "FB", "SIO"}
USUAL_VIEWS = {"CC", "MLO"}
FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


@dataclass(frozen=True)
class Header:
    """Facts of a picture, named as the manifest's columns; of PNG, JPEG and TIFF most keep their defaults."""

    format: str
    bits_stored: int
    value_offset: int = 0
    transfer_syntax: str = ""
    photometric: str = "MONOCHROME2"
    presentation_intent: str = ""
    policy: str = ""
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
    laterality: str = ""
    view: str = ""
    age: float = math.nan
    implant: float = math.nan


def read_header(dataset: Dataset, transfer_syntax: str) -> Header:
    """The facts of a grayscale DICOM picture.

    Raises:
        Rejection: bad_header or not_grayscale; the detail names the tag.
    """
    photometric = str(dataset.get("PhotometricInterpretation", "")).strip()
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or number(dataset, "SamplesPerPixel", 1) != 1:
        raise Rejection(Reason.NOT_GRAYSCALE, "Photometric Interpretation (0028,0004) or Samples per Pixel (0028,0002)")
    bits = int(number(dataset, "BitsStored", number(dataset, "BitsAllocated", 16)))
    signed = int(number(dataset, "PixelRepresentation", 0)) == 1
    slope = float(number(dataset, "RescaleSlope", 1.0)) or 1.0
    centers, widths, functions = _windows(dataset)
    lut, first, lut_bits = _voi_lut(dataset, signed)
    view = _view(dataset)
    implant = _implant(dataset)
    intent = str(dataset.get("PresentationIntentType", "")).strip().upper()
    return Header(
        format="dicom",
        transfer_syntax=transfer_syntax,
        photometric=photometric,
        presentation_intent=intent if intent in ("FOR PRESENTATION", "FOR PROCESSING") else "",
        policy=policy(intent, view, implant),
        bits_stored=bits,
        value_offset=-(1 << (bits - 1)) if signed else 0,
        rescale_slope=slope,
        rescale_intercept=float(number(dataset, "RescaleIntercept", 0.0)),
        window_center=centers,
        window_width=widths,
        window_function=functions,
        voi_lut=lut,
        voi_lut_first=first,
        voi_lut_bits=lut_bits,
        padding=_padding(dataset, signed),
        pixel_spacing=_spacing(dataset),
        laterality=_laterality(dataset),
        view=view,
        age=_age(dataset),
        implant=implant,
    )


def policy(intent: str, view: str, implant: float) -> str:
    """What is unusual about a picture, as docs/pixels.md says; empty for usual ones. Nothing of it rejects."""
    found = []
    if intent == "FOR PROCESSING":
        found.append("for_processing")
    if view and view not in USUAL_VIEWS:
        found.append("unusual_view")
    if implant == 1:
        found.append("implant")
    return ",".join(found)


def number(dataset: Dataset, keyword: str, default: float) -> float:
    """A numeric tag's (first) value; the default where it is absent, empty or no number."""
    found = numbers(dataset, keyword)
    return found[0] if found else default


def numbers(dataset: Dataset, keyword: str) -> list[float]:
    """All finite values of a numeric tag; what is no number is left out."""
    try:
        value = dataset.get(keyword)
    except Exception:  # noqa: BLE001 - pydicom parses on access and raises as many kinds as there are bad values
        return []
    values = [] if value is None or value == "" else list(value) if _many(value) else [value]
    found = []
    for one in values:
        try:
            found.append(float(one))
        except (TypeError, ValueError):
            continue
    return [one for one in found if math.isfinite(one)]


def _many(value: Any) -> bool:
    return hasattr(value, "__iter__") and not isinstance(value, (str, bytes))


def _text(dataset: Dataset, keyword: str) -> str:
    try:
        value = dataset.get(keyword, "")
    except Exception:  # noqa: BLE001 - as above
        return ""
    return str(value[0] if _many(value) and len(value) else value or "").strip().upper()


def _windows(dataset: Dataset) -> tuple[list[float], list[float], list[str]]:
    """Window centres, widths and the function (0028,1050/1051/1056), which holds for all; absent or empty is LINEAR."""
    pairs = list(zip(numbers(dataset, "WindowCenter"), numbers(dataset, "WindowWidth"), strict=False))
    function = _text(dataset, "VOILUTFunction")
    function = function if function in FUNCTIONS else "LINEAR"
    least = 1.0 if function == "LINEAR" else 0.0  # PS3.3 C.11.2.1.2: at least 1; of the others: above 0
    pairs = [pair for pair in pairs if pair[1] >= least and pair[1] > 0]
    return [c for c, _ in pairs], [w for _, w in pairs], [function] * len(pairs)


def _voi_lut(dataset: Dataset, signed: bool) -> tuple[list[int], int, int]:
    """Data, first mapped value and entry bits of the first VOI LUT (0028,3010); empty where there is none."""
    sequence = dataset.get("VOILUTSequence")
    if not sequence:
        return [], 0, 0
    item = sequence[0]
    descriptor, data = numbers(item, "LUTDescriptor"), item.get("LUTData")
    if len(descriptor) != 3 or data is None:
        return [], 0, 0
    entries, first, bits = (int(value) for value in descriptor)
    if isinstance(data, bytes):
        values = list(memoryview(data[: len(data) // 2 * 2]).cast("H"))
    else:
        values = [int(value) for value in data]
    first = first - 65536 if signed and first >= 32768 else first
    values = values[: entries or 65536]
    return ([v & 0xFFFF for v in values], first, bits) if values and 8 <= bits <= 16 else ([], 0, 0)


def _padding(dataset: Dataset, signed: bool) -> list[int]:
    """PixelPaddingValue and PixelPaddingRangeLimit (0028,0120/0121) as stored values."""
    found = [*numbers(dataset, "PixelPaddingValue")[:1], *numbers(dataset, "PixelPaddingRangeLimit")[:1]]
    return [int(v) - 65536 if signed and v >= 32768 else int(v) for v in found]


def _spacing(dataset: Dataset) -> float:
    """Millimetres a pixel between rows: Imager Pixel Spacing (0018,1164), else Pixel Spacing (0028,0030)."""
    for keyword in ("ImagerPixelSpacing", "PixelSpacing"):
        found = numbers(dataset, keyword)
        if found and found[0] > 0:
            return found[0]
    return math.nan


def _laterality(dataset: Dataset) -> str:
    for keyword in ("ImageLaterality", "Laterality", "FrameLaterality"):
        value = _text(dataset, keyword)
        if value in ("L", "R"):
            return value
    return ""


def _view(dataset: Dataset) -> str:
    """View Code Sequence (0054,0220), else View Position (0018,5101), else a view in Patient Orientation."""
    for item in dataset.get("ViewCodeSequence") or []:
        code = _text(item, "CodeValue")
        if code in _VIEW_CODES:
            return _VIEW_CODES[code]
    for keyword in ("ViewPosition", "PatientOrientation"):  # the latter in CBIS-DDSM
        value = _text(dataset, keyword)
        if value in _VIEWS:
            return value
    return ""


def _age(dataset: Dataset) -> float:
    """Patient's Age (0010,1010) in years (PS3.5 6.2, AS)."""
    match = re.fullmatch(r"(\d{1,3})([DWMY])", _text(dataset, "PatientAge"))
    return int(match[1]) / {"D": 365.25, "W": 52.18, "M": 12, "Y": 1}[match[2]] if match else math.nan


def _implant(dataset: Dataset) -> float:
    return {"YES": 1.0, "NO": 0.0}.get(_text(dataset, "BreastImplantPresent"), math.nan)
