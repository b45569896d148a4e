"""Run folders as training leaves them, with random weights, for tests of what comes after training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from preprocessing.settings import ConvertSettings
from training import run_files, runs
from training.config import load_config
from training.model import build_model

SETTINGS = ConvertSettings(levels=("full", "192", "96"), crop_margin=0.02)
TINY = (
    "model.backbone=test_efficientnet",
    "model.weights=none",
    "pipeline.height=64",
    "pipeline.width=64",
    "pipeline.clahe.enabled=false",
    "data.loader.val_batch_size=4",
    "data.loader.threads=1",
    "train.device=cpu",
)
PRIOR = (3 + 0.5) / (20 + 1)  # of `make_run`: 3 of 20 breasts validated on


def make_run(root: Path, *overrides: str, folds: int = 2, settings: ConvertSettings = SETTINGS, seed: int = 0) -> Path:
    """A run as training leaves it, its weights random, its predictions spread out."""
    config = load_config(None, (*TINY, *overrides))
    for fold in range(folds):
        folder = root / f"fold{fold}"
        runs.begin(folder, config, {"fold": fold, "store_settings": settings.model_dump(mode="json")})
        torch.manual_seed(100 * seed + fold)
        model = build_model(config.model, config.pipeline.channels)
        with torch.no_grad():
            model.head.weight.mul_(300)
        runs.save_best(folder, model, {"fold": fold, "epoch": 0})
        breasts = range(10 * fold, 10 * fold + 10)
        rows = [(f"{b}{v}", b, "L", v, f"{b}_L", int(b in (1, 12, 17))) for b in breasts for v in ("CC", "MLO")]
        names = ["image_id", "patient_id", "laterality", "view", "prediction_id", "cancer"]
        table = pd.DataFrame(rows, columns=names).assign(
            site_id="1",
            machine_id="49",
            age=60.0,
            density="B",
            implant=0.0,
            fold=fold,
            prediction=lambda table: 0.3 + 0.4 * table["cancer"],
        )
        run_files.write_table(folder / runs.VALIDATION, table)
    return root


def spread_ages(run: Path) -> Path:
    """The run with ages that differ: patients with cancer are older."""
    for fold in runs.open_run(run).folds:
        table = fold.validation
        table["age"] = 50 + np.arange(len(table)) // 2 + 10 * table["cancer"]
        run_files.write_table(fold.folder / runs.VALIDATION, table)
    return run
