"""Feature extraction: the vectors are the model's own, whatever the batch; damaged pictures are left out by name."""

from __future__ import annotations

import gc
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from dali_pipes.loader import Loader
from preprocessing.convert import convert
from preprocessing.errors import RunError, StoreError
from preprocessing.manifest import open_store
from preprocessing.progress import Progress
from preprocessing.synth import synthesize
from tests.training.untrained import SETTINGS, make_run
from training import run_files, runs
from training.inference import features
from training.inference.features import extract
from training.inference.predict import predict


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("features")
    synthesize(root / "rsna", patients=4, seed=5)
    convert(root / "rsna" / "train_images", root / "rsna" / "train.csv", root / "store", SETTINGS)
    return root / "store"


def test_vectors_are_the_models_own_and_do_not_depend_on_the_batch(store: Path, tmp_path: Path):
    run = make_run(tmp_path / "run")
    opened = open_store(store)
    first = opened.manifest["image_id"].iloc[:2].tolist()
    held_out = runs.open_run(run).folds[1].validation
    held_out.loc[[0, 1], "image_id"] = first
    run_files.write_table(run / "fold1" / runs.VALIDATION, held_out)
    done = []
    summary = extract(run, store, tmp_path / "out", device="cpu", progress=lambda state: done.append(state.done))
    assert [path.name for path in summary.paths] == ["fold0.parquet", "fold1.parquet"]
    assert done[-1] == 2 * len(opened.manifest)
    found = pd.read_parquet(tmp_path / "out" / "fold1.parquet")
    assert found["image_id"].tolist() == opened.manifest["image_id"].tolist()
    assert found.loc[found["held_out"], "image_id"].tolist() == first
    assert found["cancer"].tolist() == opened.manifest["cancer"].tolist()
    assert pq.read_schema(tmp_path / "out" / "fold1.parquet").field("embedding").type.list_size == summary.length

    fold = runs.open_run(run).folds[1]
    model, _ = runs.load_model(fold)
    settings = fold.config.data.loader.model_copy(update={"val_batch_size": 3})
    with Loader(opened, opened.manifest, fold.config.pipeline, settings, train=False) as loader, torch.inference_mode():
        outputs = [model.outputs(batch["image"]) for batch in loader.epoch(0)]
    vectors = torch.cat([each["embedding"] for each in outputs]).numpy()
    np.testing.assert_allclose(np.stack(found["embedding"].tolist()), vectors, rtol=1e-3, atol=1e-5)
    assert np.ptp(vectors, axis=0).max() > 0
    wanted = torch.sigmoid(torch.cat([each["cancer"] for each in outputs])).numpy()
    np.testing.assert_allclose(found["prediction"], wanted, atol=1e-4)
    single = extract(run / "fold1", store, tmp_path / "single", device="cpu", batch_size=1)
    again = pd.read_parquet(single.paths[0])
    np.testing.assert_allclose(np.stack(again["embedding"].tolist()), vectors, rtol=1e-3, atol=1e-5)

    predict([run / "fold1"], tmp_path / "s.csv", store=store, device="cpu")
    pictures = pd.read_csv(tmp_path / "predictions_images.csv", dtype={"image_id": str}).set_index("image_id")
    by_picture = pictures.loc[found["image_id"], "prediction"]
    np.testing.assert_allclose(found["prediction"], by_picture, atol=1e-5)


def test_a_damaged_picture_is_left_out_and_named(store: Path, tmp_path: Path):
    copy = shutil.copytree(store, tmp_path / "store")
    row = open_store(copy).manifest.iloc[3]
    for tile in (copy / "tiles").rglob(f"{row['image_id']}.*"):
        tile.write_bytes(b"no tile")
    summary = extract(make_run(tmp_path / "run", folds=1), copy, tmp_path / "out", device="cpu")
    found = pd.read_parquet(summary.paths[0])
    assert len(found) == summary.pictures == len(open_store(copy).manifest) - 1
    assert row["image_id"] not in set(found["image_id"])
    assert "1 pictures are left out" in str(summary)
    assert row["image_id"] in str(summary)


def test_what_does_not_fit_is_refused_before_anything_is_written(store: Path, tmp_path: Path):
    other = SETTINGS.model_copy(update={"crop_margin": 0.1})
    with pytest.raises(StoreError, match="converted with crop_margin"):
        extract(make_run(tmp_path / "run", settings=other), store, tmp_path / "out", device="cpu")
    with pytest.raises(RunError, match="no run there"):
        extract(tmp_path / "none", store, tmp_path / "out", device="cpu")
    half = make_run(tmp_path / "half")
    (half / "fold1" / runs.VALIDATION).unlink()
    with pytest.raises(RunError, match="not there yet"):
        extract(half, store, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_rows_are_written_in_groups(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(tmp_path / "run", folds=1)
    (whole,) = extract(run, store, tmp_path / "whole", device="cpu", batch_size=4).paths
    monkeypatch.setattr(features, "_ROW_GROUP", 6)
    (grouped,) = extract(run, store, tmp_path / "grouped", device="cpu", batch_size=4).paths
    assert pq.read_table(grouped).equals(pq.read_table(whole))
    assert pq.read_metadata(grouped).num_row_groups == -(-len(open_store(store).manifest) // 6)
    assert pq.read_metadata(whole).num_row_groups == 1


def test_an_extraction_that_is_left_leaves_nothing(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A writer that was left open would write to its closed file when it is collected, and say so."""
    unraised = []
    monkeypatch.setattr(sys, "unraisablehook", unraised.append)
    monkeypatch.setattr(features, "_ROW_GROUP", 4)

    def left(state: Progress) -> None:
        if state.done > 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(make_run(tmp_path / "run"), store, tmp_path / "out", device="cpu", batch_size=4, progress=left)
    gc.collect()
    assert unraised == []
    assert list((tmp_path / "out").iterdir()) == []


def test_a_store_of_damaged_pictures_gives_a_table_without_rows(store: Path, tmp_path: Path):
    copy = shutil.copytree(store, tmp_path / "store")
    for tile in (copy / "tiles").rglob("*.tif"):
        tile.write_bytes(b"no tile")
    summary = extract(make_run(tmp_path / "run", folds=1), copy, tmp_path / "out", device="cpu")
    assert summary.pictures == 0
    assert pq.read_schema(summary.paths[0]).field("embedding").type.list_size == summary.length
