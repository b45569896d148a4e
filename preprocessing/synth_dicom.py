"""Synthetic mammography machines: how each one stores a picture as DICOM.

Every machine has its own constant habits (transfer syntax, bits, sign, photometric interpretation, windows, padding),
as real ones do. Which machine took a picture says nothing about cancer.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import dcmwrite
from pydicom.pixels.encoders.base import get_encoder
from pydicom.sequence import Sequence

from preprocessing.phantom import generator

UID_ROOT = "1.2.826.0.1.3680043.8.498."  # pydicom's own root


@dataclass(frozen=True)
class Machine:
    """A machine's habits. `windows` are (centre, width) in shares of the range that tissue takes."""

    machine_id: int
    site_id: int
    weight: int  # images it takes, relative to the others
    transfer_syntax: str
    bits: int
    photometric: str = "MONOCHROME2"
    signed: bool = False
    function: str | None = "LINEAR"  # None writes no function, which PS3.3 C.11.2.1.2 reads as LINEAR
    windows: tuple[tuple[float, float], ...] = ((0.5, 1.0),)
    voi_lut: bool = False
    intercept: int = 0
    padding: int | None = None  # stored value around the field
    noise: float = 0.012
    manufacturer: str = "SYNTHETIC"


_THREE = ((0.5, 1.0), (0.55, 0.8), (0.45, 1.25))
MACHINES = (
    Machine(49, 1, 5, uid.JPEGLosslessSV1, 12, windows=_THREE),
    Machine(48, 2, 2, uid.JPEG2000Lossless, 12, function="SIGMOID", windows=_THREE),
    Machine(29, 1, 2, uid.JPEG2000Lossless, 14, photometric="MONOCHROME1", noise=0.010),
    Machine(21, 1, 1, uid.RLELossless, 10, function="LINEAR_EXACT", noise=0.015),
    Machine(93, 1, 1, uid.JPEGLSLossless, 16, function=None),
    Machine(170, 2, 1, uid.ExplicitVRLittleEndian, 13, signed=True, intercept=4096, windows=_THREE[:2]),
    Machine(190, 2, 1, uid.ExplicitVRLittleEndian, 12, windows=(), voi_lut=True),
    Machine(197, 2, 1, uid.RLELossless, 16, signed=True, windows=(), noise=0.010),
    Machine(210, 2, 2, uid.JPEGLosslessSV1, 12, photometric="MONOCHROME1", padding=0),
    Machine(216, 2, 1, uid.JPEG2000Lossless, 12, function="SIGMOID", padding=0),
)
UNSEEN = 216  # takes pictures of test patients only, as some machines of the challenge do
TISSUE = (0.06, 0.86)  # shares of the stored range that 0 and 1 of a picture become


@dataclass(frozen=True)
class Exposure:
    """One picture's facts, as they go into the file's tags."""

    patient_id: str
    image_id: str
    laterality: str
    view: str
    age: float
    implant: bool
    spacing: float  # millimetres a pixel
    seed: int


def stored_values(
    picture: NDArray[np.float32], machine: Machine, margins: tuple[int, int, int, int] | None = None
) -> NDArray[np.integer]:
    """The values that the machine stores for a picture of `phantom.render`.

    Args:
        picture: float [rows, columns], 0 air to 1 dense.
        machine: whose habits are taken.
        margins: rows above and below and columns left and right that take the padding value, where it has one.

    Returns:
        uint16, or int16 where the machine is signed; [rows, columns].
    """
    top = 2**machine.bits - 1
    low, high = TISSUE
    values = np.clip(np.rint((low + (high - low) * picture) * top), 0, top).astype(np.int32)
    if machine.photometric == "MONOCHROME1":
        values = top - values
    if machine.signed:
        values -= 2 ** (machine.bits - 1)
    if machine.padding is not None and margins is not None:
        above, below, left, right = margins
        framed = np.full_like(values, machine.padding)
        inside = np.s_[above : values.shape[0] - below, left : values.shape[1] - right]
        framed[inside] = values[inside]
        values = framed
    return values.astype(np.int16 if machine.signed else np.uint16)


def encode(values: NDArray[np.integer], machine: Machine) -> bytes:
    """One frame as the machine's transfer syntax has it, not yet encapsulated; lossless."""
    syntax = machine.transfer_syntax
    if syntax == uid.JPEGLosslessSV1:
        return bytes(imagecodecs.jpeg8_encode(values, lossless=True, predictor=1, bitspersample=machine.bits))
    if syntax == uid.JPEG2000Lossless:
        codestream = imagecodecs.jpeg2k_encode(
            values, level=0, reversible=True, codecformat="J2K", bitspersample=machine.bits, numthreads=1
        )
        return bytes(codestream)
    if syntax == uid.JPEGLSLossless:
        return bytes(imagecodecs.jpegls_encode(values, out=values.nbytes * 2 + 4096))
    if syntax == uid.RLELossless:
        little = values.astype(values.dtype.newbyteorder("<"))
        return get_encoder(uid.RLELossless).encode(
            little.tobytes(), encoding_plugin="pylibjpeg", number_of_frames=1, **_pixel_tags(values, machine)
        )
    return values.astype(values.dtype.newbyteorder("<")).tobytes()


def write(values: NDArray[np.integer], machine: Machine, exposure: Exposure) -> bytes:
    """A DICOM file (PS3.10) of the values `stored_values` gave; the same arguments give the same bytes."""
    syntax = uid.UID(machine.transfer_syntax)
    dataset = _tags(machine, exposure)
    for keyword, value in _pixel_tags(values, machine).items():
        setattr(dataset, "".join(word.capitalize() for word in keyword.split("_")), value)
    frame = encode(values, machine)
    dataset.PixelData = encapsulate([frame]) if syntax.is_compressed else frame
    dataset["PixelData"].VR = "OB" if syntax.is_compressed else "OW"
    _set_voi(dataset, machine)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = syntax
    meta.ImplementationClassUID = uid.UID(UID_ROOT + "1")
    dataset.file_meta = meta
    out = BytesIO()
    dcmwrite(out, dataset, enforce_file_format=True)
    return out.getvalue()


def _pixel_tags(values: NDArray[np.integer], machine: Machine) -> dict[str, Any]:
    return {
        "rows": values.shape[0],
        "columns": values.shape[1],
        "samples_per_pixel": 1,
        "photometric_interpretation": machine.photometric,
        "bits_allocated": 16,
        "bits_stored": machine.bits,
        "pixel_representation": int(machine.signed),
    }


def _tags(machine: Machine, exposure: Exposure) -> Dataset:
    """Everything but the pixels, after the Digital Mammography X-Ray Image IOD (PS3.3 A.27)."""
    rng = generator(exposure.seed, "tags", exposure.image_id)
    study = f"{UID_ROOT}{exposure.seed % 10**9}.{exposure.patient_id}"
    date = f"{int(rng.integers(2012, 2021))}{int(rng.integers(1, 13)):02d}{int(rng.integers(1, 29)):02d}"
    dataset = Dataset()
    dataset.SOPClassUID = uid.DigitalMammographyXRayImageStorageForPresentation
    dataset.SOPInstanceUID = f"{study}.{exposure.image_id}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, f"{study}.1"
    dataset.FrameOfReferenceUID = f"{study}.2"
    dataset.ContentDate, dataset.ContentTime = date, "120000"
    dataset.Modality, dataset.PresentationIntentType = "MG", "FOR PRESENTATION"
    dataset.ImageType = ["DERIVED", "PRIMARY"]
    dataset.Manufacturer, dataset.ManufacturerModelName = machine.manufacturer, f"MACHINE {machine.machine_id}"
    dataset.PatientID, dataset.PatientName = exposure.patient_id, f"SYNTHETIC^{exposure.patient_id}"
    if np.isfinite(exposure.age):
        dataset.PatientAge = f"{int(exposure.age):03d}Y"
    dataset.PatientSex, dataset.BodyPartExamined = "F", "BREAST"
    dataset.ImageLaterality, dataset.ViewPosition = exposure.laterality, exposure.view
    dataset.BreastImplantPresent = "YES" if exposure.implant else "NO"
    dataset.BurnedInAnnotation = "YES"
    dataset.PatientOrientation = ["A", "L"] if exposure.laterality == "L" else ["P", "R"]
    dataset.ImagerPixelSpacing = [exposure.spacing, exposure.spacing]
    dataset.InstanceNumber = 1
    dataset.HighBit = machine.bits - 1
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = machine.intercept, 1, "US"
    dataset.PixelIntensityRelationship, dataset.PixelIntensityRelationshipSign = "LOG", 1
    dataset.PresentationLUTShape = "INVERSE" if machine.photometric == "MONOCHROME1" else "IDENTITY"
    dataset.LossyImageCompression = "00"
    if machine.padding is not None:
        dataset.add_new("PixelPaddingValue", "SS" if machine.signed else "US", machine.padding)
    return dataset


def _set_voi(dataset: Dataset, machine: Machine) -> None:
    """VOI windows or a VOI LUT over the tissue's range, in modality units (PS3.3 C.11.2)."""
    top = 2**machine.bits - 1
    low, high = (share * top for share in TISSUE)
    if machine.photometric == "MONOCHROME1":
        low, high = top - high, top - low
    offset = machine.intercept - (2 ** (machine.bits - 1) if machine.signed else 0)
    if machine.windows:
        turned = machine.photometric == "MONOCHROME1"
        centers = [low + (1 - c if turned else c) * (high - low) + offset for c, _ in machine.windows]
        dataset.WindowCenter = [round(value) for value in centers]
        dataset.WindowWidth = [round(w * (high - low)) for _, w in machine.windows]
        dataset.WindowCenterWidthExplanation = ["NORMAL", "HARDER", "SOFTER"][: len(machine.windows)]
        if machine.function is not None:
            dataset.VOILUTFunction = machine.function
    if machine.voi_lut:
        entries = np.arange(top + 1)
        curve = np.clip((entries - low) / (high - low), 0, 1) ** 0.9
        item = Dataset()
        item.add_new("LUTDescriptor", "US", [(top + 1) % 65536, 0, 12])
        item.LUTExplanation = "NORMAL"
        item.add_new("LUTData", "OW", np.rint(curve * 4095).astype("<u2").tobytes())
        dataset.VOILUTSequence = Sequence([item])
