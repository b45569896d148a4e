"""Folds: no patient in two, cancer spread evenly, site and machine as well as can be, and clear errors."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from preprocessing.errors import InputError, StoreError
from preprocessing.manifest import Store
from preprocessing.settings import ConvertSettings
from training import folds
from training.config import DataSettings


def _rows(patients=200, seed=0, sick=0.2):
    """Images of patients with 2 to 5 images each, two sites, machines of very different frequency."""
    generator = np.random.default_rng(seed)
    table = []
    for patient in range(patients):
        has_cancer = generator.random() < sick
        site = "1" if generator.random() < 0.6 else "2"
        machine = generator.choice(["49", "48", "29", "210"], p=[0.55, 0.25, 0.15, 0.05])
        density = generator.choice(["A", "B", "C", "D", ""])
        for image in range(generator.integers(2, 6)):
            side = "LR"[image % 2]
            table.append(
                {
                    "image_id": f"{patient * 10 + image}",
                    "patient_id": f"p{patient}",
                    "laterality": side,
                    "prediction_id": f"p{patient}_{side}",
                    "cancer": float(has_cancer and side == "L"),
                    "site_id": site,
                    "machine_id": machine,
                    "density": density,
                }
            )
    return pd.DataFrame(table)


@pytest.fixture
def store_of(tmp_path):
    def make(rows: pd.DataFrame) -> Store:
        store = Store(tmp_path, ConvertSettings())
        store.__dict__["manifest"] = rows  # the cached property
        return store

    return make


def test_every_image_has_one_fold_and_no_patient_two(store_of):
    rows = _rows()
    made = folds.make_folds(store_of(rows), DataSettings(folds=5))
    assert made["image_id"].tolist() == rows["image_id"].tolist()
    assert set(made["fold"]) == set(range(5))
    assert rows.assign(fold=made["fold"]).groupby("patient_id")["fold"].nunique().max() == 1


def test_saved_folds_are_read_back_in_the_manifests_order(store_of):
    store = store_of(_rows())
    made = folds.make_folds(store, DataSettings(folds=4))
    path = store.root / folds.FOLDS_FILE
    pd.read_csv(path, dtype=str).sample(frac=1, random_state=1).to_csv(path, index=False)
    pd.testing.assert_frame_equal(folds.read_folds(store), made)


def test_cancer_is_spread_evenly_and_sites_and_machines_nearly_so(store_of):
    rows = _rows(patients=400)
    joined = rows.assign(fold=folds.make_folds(store_of(rows), DataSettings(folds=5))["fold"])
    share = joined.groupby("fold")["cancer"].mean()
    assert share.max() - share.min() < 0.02
    for column in ("site_id", "machine_id"):
        shares = pd.crosstab(joined["fold"], joined[column], normalize="index")
        assert (shares.max() - shares.min()).max() < 0.06, column


def _spread(rows, assignment, column):
    shares = pd.crosstab(assignment, rows[column], normalize="index")
    return (shares.max() - shares.min()).max()


def test_exchanging_patients_balances_machines_better_than_cancer_alone_and_keeps_cancer(store_of):
    rows, settings = _rows(patients=150, seed=3), DataSettings(folds=5)
    chosen = folds.make_folds(store_of(rows), settings)["fold"].to_numpy()
    plain = folds._split(rows, settings)
    for column in ("site_id", "machine_id", "density"):
        assert _spread(rows, chosen, column) < 0.6 * _spread(rows, plain, column), column
    assert _spread(rows, chosen, "cancer") <= _spread(rows, plain, "cancer")


def test_patients_with_cancer_are_spread_evenly_where_they_are_few(store_of):
    rows = _rows(patients=400, seed=7, sick=0.05)
    rows["fold"] = folds.make_folds(store_of(rows), DataSettings(folds=5))["fold"]
    sick = rows[rows["cancer"] == 1].groupby("fold")
    assert np.ptp(sick["patient_id"].nunique()) <= 1
    assert np.ptp(sick.size()) <= 1


def test_same_seed_same_folds_and_another_seed_others(store_of):
    store = store_of(_rows())
    first = folds.make_folds(store, DataSettings(seed=1))
    assert first.equals(folds.make_folds(store, DataSettings(seed=1)))
    assert not first.equals(folds.make_folds(store, DataSettings(seed=2)))


def test_unlabelled_images_get_a_fold_too(store_of):
    rows = _rows()
    rows.loc[rows.index % 7 == 0, "cancer"] = np.nan
    assert (folds.make_folds(store_of(rows), DataSettings(folds=3))["fold"] >= 0).all()


@pytest.mark.parametrize("sick", [0.0, 0.03])
def test_too_few_patients_with_cancer_are_named_with_what_to_do(store_of, sick):
    rows = _rows(patients=60, seed=1, sick=sick)
    found = rows.loc[rows["cancer"] == 1, "patient_id"].nunique()
    with pytest.raises(InputError, match=f"{found} of them with a cancer image .* 5 folds"):
        folds.make_folds(store_of(rows), DataSettings(folds=5))


def test_missing_folds_say_how_to_make_them(store_of):
    with pytest.raises(StoreError, match=r"no folds there.*python cli.py folds"):
        folds.read_folds(store_of(_rows()))


def test_missing_folds_are_made_when_asked_for(store_of, caplog):
    store = store_of(_rows())
    with caplog.at_level("INFO"):
        made = folds.read_or_make_folds(store, DataSettings(folds=3))
    assert "no folds yet" in caplog.text
    assert made.equals(folds.read_folds(store))
    # Those there are kept, whatever the settings now say.
    assert "data.folds" not in caplog.text
    assert folds.read_or_make_folds(store, DataSettings(folds=5)).equals(made)
    assert "has 3 folds, and data.folds = 5 is not used. Make others with: python cli.py folds" in caplog.text


def test_images_without_a_fold_are_counted(store_of):
    store = store_of(_rows())
    path = store.root / folds.FOLDS_FILE
    folds.make_folds(store, DataSettings())
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-3]) + "\n")
    with pytest.raises(StoreError, match=r"3 of the store's \d+ images have no fold"):
        folds.read_folds(store)


def test_an_image_that_is_listed_twice_is_refused(store_of):
    store = store_of(_rows())
    path = store.root / folds.FOLDS_FILE
    folds.make_folds(store, DataSettings())
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    with pytest.raises(StoreError, match="an image is listed twice"):
        folds.read_folds(store)


@pytest.mark.parametrize("text", ["", "image,fold\n1,2\n", "image_id,fold\n1,x\n", "image_id,fold\n1,\n"])
def test_a_damaged_file_is_refused(store_of, text):
    store = store_of(_rows())
    (store.root / folds.FOLDS_FILE).write_text(text)
    with pytest.raises(StoreError, match="expected the columns image_id and fold"):
        folds.read_folds(store)


def test_a_patient_in_two_folds_is_named(store_of):
    store = store_of(_rows())
    made = folds.make_folds(store, DataSettings())
    made.loc[0, "fold"] = (made.loc[0, "fold"] + 1) % 5
    made.to_csv(store.root / folds.FOLDS_FILE, index=False)
    with pytest.raises(StoreError, match="patient p0 lies in folds"):
        folds.read_folds(store)


def test_description_adds_up_to_the_store(store_of):
    store = store_of(_rows())
    table = folds.describe_folds(store, folds.make_folds(store, DataSettings(folds=4)))
    assert [row["fold"] for row in table] == ["0", "1", "2", "3"]
    assert sum(int(row["images"].replace(",", "")) for row in table) == len(store.manifest)
    assert sum(int(row["patients"]) for row in table) == store.manifest["patient_id"].nunique()
