"""One file: what is prepared is what a store holds, ids become safe names, faults say where and not what."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocessing import ingest, tiles
from preprocessing.breast import Breast, Crop, find_breast
from preprocessing.convert import convert
from preprocessing.guard import Rejection
from preprocessing.manifest import COLUMNS, level_column, open_store
from preprocessing.settings import ConvertSettings
from preprocessing.synth import synthesize
from preprocessing.table import Source, stem, text
from tests.preprocessing.pictures import data_set, picture, write_png

SETTINGS = ConvertSettings(levels=("full", "256", "128"), timeout_s=30)


def prepared(path, row, settings=SETTINGS):
    levels, facts = ingest._levels_and_facts(path, row, settings)
    return levels, ingest.manifest_row(row, facts, text(row, "image_id") or stem(path.name))


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic")
    synthesize(out, patients=2, test_patients=0, seed=5)
    return out


def test_what_prepare_gives_is_what_a_store_of_the_same_settings_holds(synthetic: Path, tmp_path: Path) -> None:
    convert(synthetic / "train_images", synthetic / "train.csv", tmp_path / "store", SETTINGS, workers=2)
    store = open_store(tmp_path / "store")
    table = pd.read_csv(synthetic / "train.csv").set_index("image_id", drop=False)  # numbers, as a caller may have them
    assert len(store.manifest) >= 6
    for kept in store.manifest.to_dict("records"):
        source = synthetic / "train_images" / kept["source_path"]
        levels, row = prepared(source, table.loc[int(kept["image_id"])].to_dict(), SETTINGS)
        for name, level in levels.items():
            assert np.array_equal(level, tiles.read_level(store.root / kept[level_column("path", name)]))
        for column in set(COLUMNS) - {"source_path"}:
            ours, theirs = row[column], kept[column]
            if isinstance(ours, (list, tuple)):
                assert list(ours) == list(theirs), column
            elif isinstance(ours, float) and math.isnan(ours):
                assert math.isnan(theirs), column
            elif isinstance(ours, float):
                assert ours == pytest.approx(theirs, rel=1e-6), column
            else:
                assert ours == theirs, column


def test_without_a_row_the_tags_and_the_name_speak(synthetic: Path) -> None:
    table = pd.read_csv(synthetic / "train.csv", dtype=str)
    for line in table.to_dict("records"):
        path = synthetic / "train_images" / line["patient_id"] / f"{line['image_id']}.dcm"
        row = prepared(path, {})[1]
        assert (row["image_id"], row["laterality"], row["view"]) == (
            line["image_id"], line["laterality"], line["view"],
        )  # fmt: skip
        assert row["patient_id"] != line["patient_id"]
        assert row["prediction_id"] == f"{row['patient_id']}_{row['laterality']}"
        assert math.isnan(row["cancer"])


def test_the_csv_wins_over_the_tags(synthetic: Path) -> None:
    path = next((synthetic / "train_images").rglob("*.dcm"))
    for side in ("left", "right"):
        row = prepared(path, {"patient_id": 7, "laterality": side, "view": "at", "age": 33})[1]
        assert (row["patient_id"], row["laterality"], row["view"], row["age"]) == ("7", side[0].upper(), "AT", 33)


def test_the_percentiles_are_those_of_the_breast(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", 3)
    row = prepared(tmp_path / "a.png", {})[1]
    source = picture(3)
    breast = source[source >= 900]
    mask = find_breast(source).mask
    assert mask.shape == source.shape
    assert row["percentile_high"] == pytest.approx(np.percentile(breast, 99.5), abs=30)
    assert row["percentile_low"] < row["percentile_high"]
    assert row["percentile_low"] <= np.percentile(breast, 5)


def test_padding_inside_the_breasts_outline_is_no_part_of_its_percentiles() -> None:
    values = np.random.default_rng(0).integers(1000, 3000, (400, 300), dtype=np.uint16)
    padded = values.copy()
    padded[:, 270:] = 0
    found = Breast(Crop(0, 0, 400, 300), np.ones((400, 300), bool))
    assert ingest._percentiles(padded, found) == pytest.approx(np.percentile(values[:, :270], (0.5, 99.5)), abs=2)


def test_a_crop_that_is_not_wanted_is_not_made(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", 3)
    levels, row = prepared(tmp_path / "a.png", {}, SETTINGS.model_copy(update={"crop": False}))
    assert np.array_equal(levels["full"], picture(3))
    assert (row["crop_top"], row["crop_left"]) == (0, 0)
    assert (row["crop_height"], row["crop_width"]) == picture(3).shape
    assert (row["source_rows"], row["source_columns"]) == picture(3).shape


def test_prepare_rejects_what_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(b"")
    with pytest.raises(Rejection) as caught:
        prepared(tmp_path / "a.dcm", {}, SETTINGS)
    assert caught.value.reason == "empty"


def test_a_fault_of_ours_costs_one_file_and_quotes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("DOE^JANE")

    images, _ = data_set(tmp_path, 4)
    monkeypatch.setattr(ingest, "find_breast", broken)
    entry = ingest.settle(ingest.stage(ingest.Job(images, tmp_path, SETTINGS, Source("1000", "500/1000.png"))))
    reason, detail = entry["rejected"]
    assert reason == "internal"
    assert "KeyError in test_ingest.py" in detail
    assert "DOE" not in detail


def test_a_file_done_again_reads_as_its_first_try_though_its_age_is_unknown(tmp_path: Path) -> None:
    store = tmp_path / "store"
    ingest.scratch_folder(store).mkdir(parents=True)
    write_png(tmp_path / "a.png", 8)
    job = ingest.Job(tmp_path, store, SETTINGS, Source("a", "a.png", {"patient_id": "p"}))
    first, again = (pickle.loads(pickle.dumps(ingest.stage(job))) for _ in range(2))  # as from a worker process
    assert math.isnan(first.entry["facts"]["age"])
    assert first.files.keys() == again.files.keys() != {}
    assert list(first.files.values()) != list(again.files.values())
    assert repr(first) == repr(again)
    write_png(tmp_path / "a.png", 9)
    assert repr(first) != repr(ingest.stage(job))


def test_two_pictures_of_a_patient_share_a_pseudonym_that_is_not_the_id(synthetic: Path) -> None:
    by_patient: dict[str, set[str]] = {}
    for path in (synthetic / "train_images").rglob("*.dcm"):
        by_patient.setdefault(path.parent.name, set()).add(prepared(path, {})[1]["patient_id"])
    assert all(len(names) == 1 for names in by_patient.values())
    assert len({name for names in by_patient.values() for name in names}) == len(by_patient)
    assert not {name for names in by_patient.values() for name in names} & set(by_patient)


ids = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


@given(ids)
def test_every_id_becomes_one_plain_file_name(identifier: str) -> None:
    name = ingest.safe_name(identifier)
    assert 0 < len(name.encode()) <= 120
    assert name not in {".", ".."}
    assert not name.startswith(".")
    assert not set(name) & set("/\\\0\n ")


@given(ids, ids)
def test_different_ids_have_different_file_names(first: str, second: str) -> None:
    assert (ingest.safe_name(first) == ingest.safe_name(second)) == (first == second)


def test_usual_ids_are_their_own_file_names() -> None:
    for identifier in ("462822612", "cbis-malign-1-132", "1.2.840.113_x"):
        assert ingest.safe_name(identifier) == identifier
