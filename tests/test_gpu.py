"""The whole chain on a GPU, as a user calls it. Skipped where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from preprocessing.manifest import open_store
from training import runs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),  # gpu-check's own limit is for tests of one thing
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU here"),
]
ROOT = Path(__file__).resolve().parents[1]
HOLD = "import torch; held = torch.empty(3 << 30, dtype=torch.uint8, device='cuda'); print('held', flush=True); input()"
TINY = [
    "--set=model.backbone=test_efficientnet",
    "--set=model.weights=none",
    "--set=pipeline.height=96",
    "--set=pipeline.width=64",
    "--set=data.folds=2",
    "--set=data.loader.batch_size=4",
    "--set=data.loader.val_batch_size=4",
    "--set=train.epochs=1",
]


def call(*arguments: str | Path) -> str:
    """A command in a process of its own, which has not used the GPU before; its output."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_dicom_to_submission_beside_another_program_on_the_gpu(tmp_path: Path):
    data, store, run = tmp_path / "rsna", tmp_path / "store", tmp_path / "runs"
    call("synth", "--out", data, "--patients", 8, "--seed", 3, "-q")
    train = ("--images", data / "train_images", "--csv", data / "train.csv")
    call("convert", *train, "--out", store, "--codec", "htj2k", "--decode-on", "gpu-all", "-q")
    assert open_store(store).manifest["decoder"].str.contains("nvimgcodec").any()
    call("folds", "--store", store, *TINY, "-q")
    holder = [sys.executable, "-c", HOLD]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        told = call("train", "--store", store, "--fold", "0", "--out", run, *TINY)
        other.communicate("\n")
    assert "GiB of cuda:0 and will slow training down" in " ".join(told.split())
    (fold,) = runs.open_run(run).folds
    assert fold.environment.model_extra["device"].startswith("cuda")
    out = tmp_path / "submission.csv"
    test = ("--images", data / "test_images", "--csv", data / "test.csv")
    call("predict", "--runs", run, *test, "--out", out, "--decode-on", "gpu", "-q")
    asked = pd.read_csv(data / "test.csv", dtype=str)["prediction_id"].drop_duplicates().tolist()
    submission = pd.read_csv(out)
    assert submission["prediction_id"].tolist() == asked
    assert submission["cancer"].between(0, 1).all()
