"""Synthetic data: reproducible files, the challenge's tables, right pixels in every encoding, a truth that holds."""

from __future__ import annotations

import hashlib
import io
import itertools
from dataclasses import replace
from pathlib import Path

import dicomsdl
import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.pixels.processing import apply_voi_lut

from preprocessing.errors import InputError
from preprocessing.phantom import GLAND_SHARE, Breast, render
from preprocessing.progress import Progress
from preprocessing.synth import DENSITIES, TEST_COLUMNS, TRAIN_COLUMNS, plan, synthesize
from preprocessing.synth_dicom import MACHINES, UNSEEN, Exposure, stored_values, write

EXPOSURE = Exposure("123", "456789", "R", "MLO", 61.0, False, 0.364, 7)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth")
    synthesize(out, patients=10, seed=3)
    return out


def _hashes(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_pictures(data: Path, tmp_path: Path):
    synthesize(tmp_path / "again", patients=10, seed=3)
    synthesize(tmp_path / "other", patients=10, seed=4)
    first, again, other = _hashes(data), _hashes(tmp_path / "again"), _hashes(tmp_path / "other")
    assert first == again
    assert not {v for k, v in first.items() if k.endswith(".dcm")} & set(other.values())


def test_tables_have_the_challenges_columns_and_name_every_file(data: Path):
    for split, columns in (("train", TRAIN_COLUMNS), ("test", TEST_COLUMNS)):
        table = pd.read_csv(data / f"{split}.csv")
        assert tuple(table.columns) == columns
        files = {f"{row.patient_id}/{row.image_id}.dcm" for row in table.itertuples()}
        found = {str(path.relative_to(data / f"{split}_images")) for path in data.glob(f"{split}_images/*/*.dcm")}
        assert files == found
        assert len(files) == len(table)
        assert (table["prediction_id"] == table["patient_id"].astype(str) + "_" + table["laterality"]).all()
    assert not {"cancer", "biopsy", "invasive", "BIRADS", "density"} & set(TEST_COLUMNS)


def _rows(patients: int, test_patients: int, seed: int, positive_rate: float) -> dict[str, pd.DataFrame]:
    pictures = list(plan(patients, test_patients, seed, "small", 1.0, positive_rate))
    return {split: pd.DataFrame([each.row for each in pictures if each.split == split]) for split in ("train", "test")}


def test_no_patient_is_in_both_sets_and_one_machine_only_in_the_test_set():
    tables = _rows(12, 10, seed=1, positive_rate=0.3)
    train, test = tables["train"], tables["test"]
    assert not set(train["patient_id"]) & set(test["patient_id"])
    assert UNSEEN in set(test["machine_id"]) - set(train["machine_id"])
    assert set(train["machine_id"]) == {machine.machine_id for machine in MACHINES} - {UNSEEN}


@pytest.mark.parametrize("positive_rate", [0.1, 0.5, 1.0])
def test_cancer_is_in_one_breast_and_evenly_over_machines(positive_rate):
    table = _rows(80, 0, seed=2, positive_rate=positive_rate)["train"]
    by_side = table.groupby(["patient_id", "laterality"])["cancer"].agg(["min", "max"])
    assert (by_side["min"] == by_side["max"]).all()
    by_patient = by_side["max"].groupby("patient_id").sum()
    assert by_patient.max() == 1
    assert by_patient.sum() == round(80 * positive_rate)
    patients = table.groupby("patient_id").agg({"machine_id": "first", "cancer": "max"})
    shares = patients.groupby("machine_id")["cancer"].agg(["sum", "count"])
    assert ((shares["sum"] - shares["count"] * positive_rate).abs() <= 1).all()


def test_lesions_are_listed_for_the_training_pictures_that_have_cancer_and_for_no_test_picture(data: Path):
    table, lesions = pd.read_csv(data / "train.csv"), pd.read_csv(data / "lesions.csv")
    malignant = set(lesions.loc[lesions["malignant"] == 1, "image_id"])
    assert malignant == set(table.loc[table["cancer"] == 1, "image_id"]) != set()
    assert set(lesions["image_id"]) <= set(table["image_id"])


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: str(machine.machine_id))
def test_every_encoding_gives_the_stored_values_back_in_two_independent_decoders(machine, tmp_path: Path):
    phantom = render(Breast("R", "C", 110, 85, lesions=("spiculated",)), "MLO", seed=5)
    values = stored_values(phantom.picture, machine, margins=(4, 6, 20, 0))
    path = tmp_path / "one.dcm"
    path.write_bytes(write(values, machine, EXPOSURE))
    dataset = pydicom.dcmread(path)
    np.testing.assert_array_equal(dataset.pixel_array, values)
    np.testing.assert_array_equal(dicomsdl.open(str(path)).pixelData(storedvalue=True), values)
    assert dataset.file_meta.TransferSyntaxUID == machine.transfer_syntax
    assert (dataset.BitsStored, dataset.PixelRepresentation) == (machine.bits, int(machine.signed))
    span = 2**machine.bits
    low = -span // 2 if machine.signed else 0
    assert low <= values.min()
    assert values.max() < low + span


@pytest.mark.parametrize("machine", [m for m in MACHINES if m.windows or m.voi_lut], ids=lambda m: str(m.machine_id))
def test_the_files_own_window_shows_tissue_between_black_and_white(machine):
    phantom = render(Breast("L", "C", 110, 85), "CC", seed=8)
    dataset = pydicom.dcmread(io.BytesIO(write(stored_values(phantom.picture, machine), machine, EXPOSURE)))
    values = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    shown = apply_voi_lut(values.astype(np.int32 if machine.voi_lut else np.float64), dataset).astype(float)
    top = 4095 if machine.voi_lut else 2**machine.bits - 1
    offset = machine.intercept - (2 ** (machine.bits - 1) if machine.signed else 0)
    shown = (shown - (0 if machine.voi_lut else offset)) / top
    if machine.photometric == "MONOCHROME1":
        shown = 1 - shown
    tissue = shown[phantom.breast]
    assert 0.2 < np.median(tissue) < 0.7
    assert np.mean((tissue > 0.02) & (tissue < 0.98)) > 0.97
    assert np.corrcoef(tissue, phantom.picture[phantom.breast])[0, 1] > 0.95


def test_all_kinds_of_storage_are_there():
    assert len({machine.transfer_syntax for machine in MACHINES}) == 5
    assert {machine.photometric for machine in MACHINES} == {"MONOCHROME1", "MONOCHROME2"}
    assert {10, 12, 14, 16} <= {machine.bits for machine in MACHINES}
    assert {None, "LINEAR", "LINEAR_EXACT", "SIGMOID"} == {machine.function for machine in MACHINES}
    for facts in ("signed", "voi_lut"):
        assert {getattr(machine, facts) for machine in MACHINES} == {True, False}
    assert {0, 1, 3} <= {len(machine.windows) for machine in MACHINES}
    assert any(machine.padding is not None for machine in MACHINES)
    assert {machine.site_id for machine in MACHINES} == {1, 2}


@pytest.mark.parametrize("view", ["CC", "MLO"])
@pytest.mark.parametrize("laterality", ["L", "R"])
def test_the_breast_lies_at_its_chest_wall_and_is_brighter_than_air(laterality, view):
    phantom = render(Breast(laterality, "B", 105, 80), view, seed=11)
    wall, opposite = (0, -1) if laterality == "L" else (-1, 0)
    assert phantom.breast[:, wall].mean() > 0.5
    assert not phantom.breast[:, opposite].any()
    columns = np.arange(phantom.breast.shape[1])
    for row in phantom.breast:  # from the wall to the skin without a gap
        assert np.all(np.diff(columns[row]) == 1)
    air = ~phantom.breast
    assert np.median(phantom.picture[phantom.breast]) > 0.2
    assert np.mean(np.abs(phantom.picture[air]) < 0.03) > 0.95
    assert phantom.picture[air].max() > 0.8  # the burnt-in label
    corner = phantom.picture[:40, :30] if laterality == "L" else phantom.picture[:40, -30:]
    assert (corner.mean() > 0.5) == (view == "MLO")  # the pectoral muscle


def test_density_grows_from_a_to_d():
    bright = [render(Breast("L", density, 110, 85), "CC", seed=21) for density in DENSITIES]
    shares = [float((each.picture[each.breast] > 0.42).mean()) for each in bright]
    assert shares == sorted(shares)
    assert shares[3] > 3 * shares[0]
    assert tuple(GLAND_SHARE) == DENSITIES


def test_tissue_is_one_over_f_noise():
    phantom = render(Breast("L", "C", 135, 100), "CC", seed=13, noise=0.0)
    patch = phantom.picture[224:352, 40:168]
    window = np.outer(np.hanning(128), np.hanning(128))
    power = np.abs(np.fft.fft2((patch - patch.mean()) * window)) ** 2
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128)))
    bins = np.geomspace(0.03, 0.3, 9)
    level = [power[(frequency >= a) & (frequency < b)].mean() for a, b in itertools.pairwise(bins)]
    slope = np.polyfit(np.log(np.sqrt(bins[:-1] * bins[1:])), np.log(level), 1)[0]
    assert -4.5 < slope < -2.0  # Burgess (1999): about -3


@pytest.mark.parametrize("kind", ["spiculated", "ellipsoid", "calcifications", "cyst"])
def test_a_lesion_is_in_its_box_inside_the_breast_and_scales_with_contrast(kind):
    without, faint, plain = (
        render(Breast("R", "B", 115, 90, lesions=(kind,)), "MLO", seed=17, contrast=contrast)
        for contrast in (0.0, 0.5, 1.0)
    )
    (lesion,) = plain.lesions
    box = np.s_[lesion.top : lesion.top + lesion.height, lesion.left : lesion.left + lesion.width]
    added = plain.picture - without.picture
    outside = added.copy()
    outside[box] = 0
    assert added[box].sum() > 0.9 * np.abs(added).sum()
    assert np.abs(outside).max() < 1e-6
    assert added[box].max() > (0.05 if kind == "cyst" else 0.2)
    np.testing.assert_allclose((faint.picture - without.picture).sum(), added.sum() / 2, rtol=0.05)
    inside = plain.breast[box]  # a spicule's tip may lie beyond the skin, its core never
    assert inside[lesion.height // 4 : -lesion.height // 4, lesion.width // 4 : -lesion.width // 4].all()
    assert added[~plain.breast].max() < 0.02
    assert lesion.malignant == (kind != "cyst")


def test_full_size_shows_the_same_breast_at_detector_resolution():
    breast = Breast("L", "C", 110, 85, lesions=("spiculated",))
    full, small = render(breast, "CC", seed=2, size="full"), render(breast, "CC", seed=2)
    assert full.picture.shape == (3328, 2560)
    ratio = small.spacing / full.spacing
    (big,), (little,) = full.lesions, small.lesions
    assert big.top == pytest.approx(little.top * ratio, abs=2 * ratio)
    assert big.width == pytest.approx(little.width * ratio, rel=0.06)
    area = full.breast.sum() * full.spacing**2, small.breast.sum() * small.spacing**2
    assert area[0] == pytest.approx(area[1], rel=0.01)


def test_an_implant_is_nearly_saturated():
    breast = Breast("L", "B", 115, 90)
    plain, implant = render(breast, "CC", seed=4), render(replace(breast, implant=True), "CC", seed=4)
    assert (implant.picture[implant.breast] > 0.8).mean() > 0.15 > (plain.picture[plain.breast] > 0.8).mean()


def test_progress_is_told_and_the_summary_counts(tmp_path: Path):
    seen: list[Progress] = []
    summary = synthesize(tmp_path, patients=2, test_patients=1, progress=seen.append)
    assert [each.done for each in seen] == list(range(1, seen[-1].total + 1))
    assert seen[-1].total == summary.images + summary.test_images
    assert summary.images == len(pd.read_csv(tmp_path / "train.csv"))
    assert str(tmp_path) in str(summary)


def test_files_that_others_put_among_the_pictures_are_not_removed(tmp_path: Path):
    synthesize(tmp_path, patients=2, test_patients=1)
    synthesize(tmp_path, patients=1, test_patients=1, seed=3)  # its own pictures it replaces
    precious = tmp_path / "train_images" / "1" / "precious.dcm"
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("precious\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"holds train_images/1/precious\.dcm, which synth did not make"):
        synthesize(tmp_path, patients=1, test_patients=1)
    precious.unlink()
    (tmp_path / "synth.json").write_text("{")
    with pytest.raises(InputError, match=r"synth\.json: not what synth wrote"):
        synthesize(tmp_path, patients=1, test_patients=1)
    (tmp_path / "synth.json").write_text("{}")
    assert sorted(tmp_path.rglob("*")) == [each for each in before if each != precious]


@pytest.mark.parametrize("name", ["train.csv", "test.csv", "train_images/1/2.dcm", "test_images/1/2.dcm"])
def test_a_data_set_of_somebody_else_is_not_overwritten(name: str, tmp_path: Path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("precious\n")
    with pytest.raises(InputError, match="did not make"):
        synthesize(tmp_path, patients=1)
    assert (tmp_path / name).read_text() == "precious\n"


@pytest.mark.parametrize("wrong", [{"patients": 0}, {"contrast": -1.0}, {"positive_rate": 1.5}])
def test_impossible_arguments_are_named(wrong, tmp_path: Path):
    with pytest.raises(InputError, match=str(next(iter(wrong.values())))):
        synthesize(tmp_path, **wrong)
