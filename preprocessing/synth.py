"""An RSNA-layout data set without a download: tables, DICOM files and the truth of their lesions.

`synthesize` writes
    train.csv, test.csv              the challenge's columns; test.csv says nothing of cancer
    train_images/<patient>/<image>.dcm, test_images/...
    lesions.csv                      boxes of the training pictures' lesions, in source pixels
    synth.json                       the settings, from which the same bytes come again

Every patient has one machine, a breast density, and perhaps one breast with cancer, whose lesions are in all its views.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from preprocessing.errors import InputError
from preprocessing.files import write_atomically
from preprocessing.phantom import SIZES, Breast, Density, LesionKind, generator, render
from preprocessing.progress import Progress, Report
from preprocessing.synth_dicom import MACHINES, UNSEEN, Exposure, Machine, stored_values, write

Size = Literal["small", "full"]
Split = Literal["train", "test"]
SYNTH_VERSION = 1
TRAIN_COLUMNS = (
    "site_id", "patient_id", "image_id", "laterality", "view", "age", "cancer", "biopsy", "invasive", "BIRADS",
    "implant", "density", "machine_id", "difficult_negative_case", "prediction_id",
)  # fmt: skip
TEST_COLUMNS = (
    "site_id", "patient_id", "image_id", "laterality", "view", "age", "implant", "machine_id", "prediction_id",
)  # fmt: skip
RARE_VIEWS = ("ML", "LM", "AT", "LMO")
DENSITIES: tuple[Density, ...] = ("A", "B", "C", "D")
CANCERS: tuple[LesionKind, ...] = ("spiculated", "ellipsoid", "calcifications")


@dataclass(frozen=True)
class SynthSummary:
    """What was written."""

    out: Path
    patients: int
    images: int
    positive_images: int
    test_images: int

    def __str__(self) -> str:
        return (
            f"{self.out}: {self.images} training images of {self.patients} patients, {self.positive_images} of them "
            f"with cancer, and {self.test_images} test images."
        )


@dataclass(frozen=True)
class Picture:
    """One image to draw: where it goes, what it shows, how it is stored, and its row of the table."""

    split: Split
    exposure: Exposure
    machine: Machine
    breast: Breast
    size: Size
    contrast: float
    row: dict[str, Any]


def synthesize(
    out: str | Path,
    patients: int = 24,
    seed: int = 0,
    size: Size = "small",
    contrast: float = 1.0,
    *,
    positive_rate: float = 0.5,
    test_patients: int | None = None,
    progress: Report | None = None,
) -> SynthSummary:
    """Write a synthetic data set; the same arguments give the same bytes.

    Args:
        out: folder to write; data that this function wrote there before is replaced, and nothing else.
        patients: training patients, usually of four images.
        seed: of everything.
        size: 'small' is 640 by 512 pixels, 'full' 3328 by 2560.
        contrast: of the lesions; 1 is easy to learn, 0 cannot be learned.
        positive_rate: share of patients with cancer, in one breast.
        test_patients: patients of the test set; without it a quarter of `patients`, two at least.
        progress: called after every image.

    Raises:
        InputError: an impossible argument, or a folder that holds something else.
    """
    out = Path(out)
    if test_patients is None:
        test_patients = max(2, patients // 4)
    _check(out, patients, test_patients, contrast, positive_rate)
    settings = {
        "version": SYNTH_VERSION, "patients": patients, "test_patients": test_patients, "seed": seed, "size": size,
        "contrast": contrast, "positive_rate": positive_rate,
    }  # fmt: skip
    for name in _FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
    for name in _TABLES:
        (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "synth.json", (json.dumps(settings, indent=1) + "\n").encode())

    pictures = list(plan(patients, test_patients, seed, size, contrast, positive_rate))
    lesions = []
    for done, picture in enumerate(pictures, start=1):
        lesions += _draw(picture, out)
        if progress is not None:
            progress(Progress(done, len(pictures)))
    _write_table(out / "lesions.csv", pd.DataFrame(lesions, columns=list(_LESION_COLUMNS)))
    tables = {
        split: pd.DataFrame(
            [picture.row for picture in pictures if picture.split == split], columns=list(TRAIN_COLUMNS)
        )
        for split in ("train", "test")
    }
    _write_table(out / "test.csv", tables["test"][list(TEST_COLUMNS)])
    _write_table(out / "train.csv", tables["train"][list(TRAIN_COLUMNS)])  # last: where it is, everything is
    return SynthSummary(out, patients, len(tables["train"]), int(tables["train"]["cancer"].sum()), len(tables["test"]))


_FOLDERS, _TABLES = ("train_images", "test_images"), ("train.csv", "test.csv", "lesions.csv")
_LESION_COLUMNS = ("patient_id", "image_id", "kind", "malignant", "top", "left", "height", "width")


def _check(out: Path, patients: int, test_patients: int, contrast: float, positive_rate: float) -> None:
    if patients < 1 or test_patients < 0:
        raise InputError(f"synth: expected at least 1 patient, found {patients} and {test_patients} for the test.")
    if not contrast >= 0:
        raise InputError(f"synth: contrast is 0 or more, found {contrast}.")
    if not 0 <= positive_rate <= 1:
        raise InputError(f"synth: the share of positive patients is from 0 to 1, found {positive_rate}.")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: expected a folder to write to, found a file.")
    there = [name for name in (*_FOLDERS, *_TABLES) if (out / name).exists()]
    if there and not (out / "synth.json").exists():
        raise InputError(f"{out}: holds {there[0]}, which synth did not make. Choose another folder with --out.")
    if there and (other := _of_others(out)) is not None:
        raise InputError(f"{out}: holds {other}, which synth did not make. Move it away, or choose another --out.")


def _of_others(out: Path) -> Path | None:
    """A file among the pictures that the settings in synth.json do not give."""
    try:
        made = json.loads((out / "synth.json").read_text(encoding="utf-8"))
        names = ("patients", "test_patients", "seed", "size", "contrast", "positive_rate")
        own = {_place(out, picture) for picture in plan(*(made[name] for name in names))}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{out / 'synth.json'}: not what synth wrote. Remove the folder, or choose another --out."
        ) from None
    files = (path for folder in _FOLDERS for path in sorted((out / folder).rglob("*")) if not path.is_dir())
    return next((path.relative_to(out) for path in files if path not in own), None)


def plan(
    patients: int, test_patients: int, seed: int, size: Size, contrast: float, positive_rate: float
) -> Iterator[Picture]:
    """Every picture of both splits, in the tables' order."""
    rng = generator(seed, "patients")
    ids = np.sort(rng.choice(np.arange(5, 65_000), patients + test_patients, replace=False))
    rng.shuffle(ids)
    splits: tuple[tuple[Split, int], ...] = (("train", patients), ("test", test_patients))
    for split, count in splits:
        seen = [machine for machine in MACHINES if split == "test" or machine.machine_id != UNSEEN]
        mine, ids = np.sort(ids[:count]), ids[count:]
        machines, cancers = _machines_and_cancers(count, seen, positive_rate, generator(seed, split))
        for patient, machine, cancer in zip(mine, machines, cancers, strict=True):
            yield from _patient(split, int(patient), machine, cancer, seed, size, contrast)


def _machines_and_cancers(
    count: int, machines: list[Machine], positive_rate: float, rng: np.random.Generator
) -> tuple[list[Machine], list[bool]]:
    """Deal machines by weight, each once before any comes again, and cancers evenly over machines."""
    ranks = [(turn / machine.weight, i) for i, machine in enumerate(machines) for turn in range(count)]
    dealt = np.array([i for _, i in sorted(ranks)[:count]])
    dealt = rng.permutation(dealt)
    order = np.argsort(dealt, kind="stable")  # patients by machine: every k-th of them has cancer
    wanted = round(count * positive_rate)
    if positive_rate > 0 and count > 0:
        wanted = max(1, wanted)
    cancers = np.zeros(count, bool)
    cancers[order[((np.arange(wanted) + rng.random()) * count / max(wanted, 1)).astype(int) % max(count, 1)]] = True
    return [machines[i] for i in dealt], [bool(each) for each in cancers]


def _patient(
    split: Split,
    patient: int,
    machine: Machine,
    cancer: bool,
    seed: int,
    size: Size,
    contrast: float,
) -> Iterator[Picture]:
    rng = generator(seed, "patient", patient)
    density = DENSITIES[rng.choice(4, p=[0.10, 0.42, 0.38, 0.10])]
    depth, half = rng.uniform(75, 135), rng.uniform(62, 100)
    age = float(np.clip(np.round(rng.normal(58, 10)), 30, 89)) if rng.random() > 0.03 else float("nan")
    implant = rng.random() < 0.05
    affected = rng.choice(["L", "R"]) if cancer else ""
    kinds = [CANCERS[i] for i in rng.permutation(len(CANCERS))[: 1 + int(rng.random() < 0.25)]]
    invasive, difficult = rng.random() < 0.7, rng.random() < 0.15
    for laterality in ("L", "R"):
        has_cancer = laterality == affected
        lesions = tuple(kinds) if has_cancer else ("cyst",) if difficult else ()
        breast = Breast(laterality, density, depth, half, implant, lesions)
        for view in _views(rng):
            image = int(rng.integers(10**6, 2**31 - 1))
            row = {
                "site_id": machine.site_id, "patient_id": patient, "image_id": image, "laterality": laterality,
                "view": view, "age": age, "cancer": int(has_cancer), "biopsy": int(has_cancer or difficult),
                "invasive": int(has_cancer and invasive), "BIRADS": _birads(machine, has_cancer, difficult),
                "implant": int(implant), "density": density if machine.site_id == 1 else "",
                "machine_id": machine.machine_id, "difficult_negative_case": difficult and not has_cancer,
                "prediction_id": f"{patient}_{laterality}",
            }  # fmt: skip
            exposure = Exposure(str(patient), str(image), laterality, view, age, implant, SIZES[size][2], seed)
            yield Picture(split, exposure, machine, breast, size, contrast, row)


def _views(rng: np.random.Generator) -> list[str]:
    """CC and MLO, now and then a repeated or a rare view more."""
    chance = rng.random()
    if chance < 0.06:
        return ["CC", "MLO", str(rng.choice(["CC", "MLO"]))]
    if chance < 0.08:
        return ["CC", "MLO", str(rng.choice(RARE_VIEWS))]
    return ["CC", "MLO"]


def _birads(machine: Machine, cancer: bool, difficult: bool) -> int | str:
    """0 for follow-up, 1 for negative, 2 for benign; only site 1 gives it."""
    if machine.site_id != 1:
        return ""
    return 0 if cancer else 2 if difficult else 1


def _draw(picture: Picture, out: Path) -> list[dict[str, Any]]:
    exposure, machine = picture.exposure, picture.machine
    key = int(generator(exposure.seed, "image", exposure.image_id).integers(2**31))
    phantom = render(picture.breast, exposure.view, key, picture.size, picture.contrast, machine.noise)
    values = stored_values(phantom.picture, machine, _margins(exposure, phantom.picture.shape))
    path = _place(out, picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(write(values, machine, exposure))
    if picture.split == "test":
        return []
    ids = {"patient_id": exposure.patient_id, "image_id": exposure.image_id}
    return [ids | asdict(lesion) | {"malignant": int(lesion.malignant)} for lesion in phantom.lesions]


def _place(out: Path, picture: Picture) -> Path:
    return out / f"{picture.split}_images" / picture.exposure.patient_id / f"{picture.exposure.image_id}.dcm"


def _margins(exposure: Exposure, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Rows above and below and columns left and right outside the collimated field; none at the chest wall."""
    rng = generator(exposure.seed, "margins", exposure.image_id)
    above, below = (int(shape[0] * rng.uniform(0.004, 0.02)) for _ in range(2))
    beside = int(shape[1] * rng.uniform(0.02, 0.08))
    return (above, below, 0, beside) if exposure.laterality == "L" else (above, below, beside, 0)


def _write_table(path: Path, table: pd.DataFrame) -> None:
    write_atomically(path, table.to_csv(index=False, lineterminator="\n").encode())
