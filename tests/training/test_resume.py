"""The real parts together: a store, the Loader and the monitor; stopped in mid-epoch and resumed to the same bits."""

from __future__ import annotations

import json
import os
import signal

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from dali_pipes.loader import Loader
from preprocessing.convert import convert
from preprocessing.manifest import open_store
from preprocessing.settings import ConvertSettings
from tests.training import fakes
from training import checkpoint, fit, runs, session
from training.evaluation import evaluate

OVERRIDES = (
    "pipeline.height=64",
    "pipeline.width=48",
    "train.ema_decay=0.9",
    "train.epochs=2",
    "data.loader.cache=host",
    "train.progressive=[0.5,1]",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Forty small PNG pictures of ten patients, converted as any others are."""
    root = tmp_path_factory.mktemp("real")
    images, rows = root / "images", []
    images.mkdir()
    generator = np.random.default_rng(0)
    for number in range(40):
        patient, side = number // 4, "LR"[number % 4 // 2]
        picture = np.zeros((96, 72), np.uint16)
        picture[8:88, :50] = generator.integers(500, 3000, (80, 50))
        cv2.imwrite(str(images / f"{number}.png"), picture[:, ::-1] if side == "R" else picture)
        rows.append(
            {
                "image_id": str(number),
                "patient_id": f"p{patient}",
                "laterality": side,
                "view": ("CC", "MLO")[number % 2],
                "cancer": int(patient % 2 == 0 and side == "L"),
                "age": 50 + patient,
                "site_id": 1,
                "machine_id": 49,
                "implant": 0,
                "density": "B",
                "file": f"{number}.png",
            }
        )
    pd.DataFrame(rows).to_csv(root / "train.csv", index=False)
    convert(images, root / "train.csv", root / "store", ConvertSettings(levels=("full",), crop=False), workers=1)
    return open_store(root / "store")


@pytest.mark.parametrize("step", [3, 5, 7], ids=["of-small-pictures", "before-validation", "of-whole-pictures"])
def test_a_run_on_the_real_loader_is_written_resumed_and_evaluated(store, tmp_path, monkeypatch, step):
    torch.set_num_threads(1)
    config = fakes.small_config(*OVERRIDES)
    fit.fit(config, store, 0, tmp_path / "whole")
    original = session.Session._after_step

    def stop(self, at, guard):
        if at.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, at, guard)

    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "_after_step", stop)
        with pytest.raises(SystemExit):
            fit.fit(config, store, 0, tmp_path / "half")
    fit.fit(config, store, 0, tmp_path / "half", resume=True)

    whole, half = (runs.open_run(tmp_path / name).folds[0] for name in ("whole", "half"))
    states = [checkpoint.newest(fold.folder / "checkpoints")[0] for fold in (whole, half)]
    for part in ("model", "ema"):
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name]), name
    assert (whole.folder / "validation.csv").read_bytes() == (half.folder / "validation.csv").read_bytes()
    assert whole.best.read_bytes()[-4096:] == half.best.read_bytes()[-4096:]
    assert [record["step"] for record in half.records("epoch")] == [5, 10]
    assert [record["images_per_s"] is None for record in half.records("epoch")] == [step == 5, False]
    assert len(evaluate.evaluate(tmp_path / "half", store, resamples=20)["folds"]) == 1
    json.loads((tmp_path / "half" / "metrics.json").read_text())


def test_the_published_model_predicts_what_validation_did(store, tmp_path):
    config = fakes.small_config(*OVERRIDES, "train.epochs=1")
    fit.fit(config, store, 1, tmp_path / "run")
    fold = runs.open_run(tmp_path / "run").folds[0]
    model, _ = runs.load_model(fold)
    _, held_out = fit.split(store, config.data, 1)
    with (
        Loader(store, held_out, config.pipeline, config.data.loader, train=False, device="cpu") as loader,
        torch.inference_mode(),
    ):
        found = torch.cat([torch.sigmoid(model(batch["image"])) for batch in loader.epoch(0)]).numpy()
    expected = fold.validation.set_index("image_id").loc[held_out["image_id"], "prediction"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
