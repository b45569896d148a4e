"""What the learning benchmark does to a store before it trains, and how it judges a run."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from benchmarks import learning
from preprocessing.convert import convert
from preprocessing.manifest import open_store
from preprocessing.settings import ConvertSettings
from preprocessing.synth import synthesize
from tests.training import fakes
from tests.training.untrained import make_run
from training import metrics, run_files, runs
from training.inference.assemble import open_ensemble


def test_labels_are_dealt_out_anew_over_whole_patients(tmp_path):
    store = fakes.make_store(tmp_path / "store")
    (store.root / "tiles").mkdir()
    (store.root / "tiles" / "x").write_text("tile")
    other = learning.shuffled(store, tmp_path / "other", seed=1)
    before, after = store.manifest, other.manifest
    assert after.groupby("patient_id")["cancer"].nunique().max() == 1
    sick = before.groupby("patient_id")["cancer"].max()
    assert after.groupby("patient_id")["cancer"].max().sum() == sick.sum()
    assert (after.groupby("patient_id")["cancer"].max() != sick).any()
    assert (other.root / "tiles" / "x").read_text() == "tile"
    assert open_store(other.root).fingerprint != store.fingerprint


def test_each_fold_is_judged_by_its_own_model_with_mirror_images(tmp_path):
    synthesize(tmp_path, patients=4, test_patients=0, seed=5)
    convert(
        tmp_path / "train_images",
        tmp_path / "train.csv",
        tmp_path / "store",
        ConvertSettings(levels=("full", "128")),
        workers=1,
    )
    store = open_store(tmp_path / "store")
    run = runs.open_run(make_run(tmp_path / "run"))
    patients = sorted(store.manifest["patient_id"].unique())
    for fold in run.folds:
        mine = store.manifest[store.manifest["patient_id"].isin(patients[fold.fold :: 2])]
        cancer = (mine["laterality"] == "L").astype(float)
        table = mine.assign(fold=fold.fold, prediction=0.5, cancer=cancer).sample(frac=1, random_state=2)
        run_files.write_table(fold.folder / runs.VALIDATION, table[list(run_files.VALIDATION_COLUMNS)])
        (fold.folder / runs.RECORDS).write_text('{"kind": "epoch", "epoch": 0, "step": 1, "auroc": 0.25}\n')
    run = runs.open_run(run.root)
    found = learning.mirrored(run, store).set_index("image_id")
    for fold in run.folds:
        rows = store.manifest[store.manifest["patient_id"].isin(patients[fold.fold :: 2])].reset_index(drop=True)
        wanted, _ = open_ensemble([fold.folder]).predict(store, rows, tta=True)
        np.testing.assert_allclose(found.loc[rows["image_id"], "prediction"], wanted[:, 0], atol=1e-9)
        assert (found.loc[rows["image_id"], "fold"] == fold.fold).all()
    judged = learning.judge(run, found.reset_index(), {})
    breasts = metrics.per_breast(found.reset_index())
    of_folds = [metrics.summarise(part["cancer"], part["prediction"])["auroc"] for _, part in breasts.groupby("fold")]
    assert judged["mean_auroc"] == pytest.approx(np.mean(of_folds))
    assert judged["mean_last_epoch_auroc"] == 0.25
    assert pd.DataFrame(judged["folds"])["pictures_alone"].tolist() == pytest.approx(of_folds)
