"""Training on a GPU: precision, resuming, the batch that fits, running out of memory. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from preprocessing.errors import RunError
from tests.training import fakes
from training import fit, runs
from training.batch_size import find_batch_size
from training.build import build_parts
from training.device import pick_device, pick_precision
from training.distributed import World
from training.loop import Position, train_epoch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU here"),
]


@pytest.fixture
def store(tmp_path, monkeypatch):
    fakes.use_fakes(monkeypatch)
    return fakes.make_store(tmp_path / "store")


def _epoch(store, *overrides):
    config = fakes.small_config("train.device=auto", "train.lr=1e-4", *overrides)
    device = pick_device(config.train.device)
    rows, _ = fit.split(store, config.data, 0)
    parts, _ = build_parts(config, device, World(), rows, {"negative": 1, "positive": 1}, batches=12, seed=1)
    loader = fakes.open_fake_loader(store, rows, config, train=True, device="cpu", place=World())
    at = Position(batches=12, loss_sum=torch.zeros((), device=device))
    train_epoch(parts, loader.epoch(0), at, fakes.FakeMonitor(None), lambda at, guard: None)
    return float(at.loss_sum) / 12, parts


def test_auto_is_the_gpu_in_half_precision():
    device = pick_device("auto")
    assert device.type == "cuda"
    assert pick_precision("auto", device) in (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("more", [(), ("model.channels_last=false",), ("train.ema_decay=0.9", "train.accumulate=2")])
def test_mixed_precision_trains_close_to_float32(store, precision, more):
    full, _ = _epoch(store, "train.precision=fp32", *more)
    mixed, parts = _epoch(store, f"train.precision={precision}", *more)
    assert mixed == pytest.approx(full, rel=0.05)
    assert all(torch.isfinite(parameter).all() for parameter in parts.model.parameters())


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_a_step_waits_for_nothing_on_the_gpu(store):
    """Torch raises on any synchronising call inside; reading the loss comes afterwards."""
    _, parts = _epoch(store)
    config = fakes.small_config()
    rows, _ = fit.split(store, config.data, 0)
    loader = fakes.open_fake_loader(store, rows, config, train=True, device="cpu", place=World())
    batches = [{name: tensor.cuda() for name, tensor in batch.items()} for batch in loader.epoch(1)][:6]
    at = Position(batches=12, loss_sum=torch.zeros((), device="cuda"))

    def stop_before_the_guard_asks(at, guard):
        if at.batch == 6:
            torch.cuda.set_sync_debug_mode("default")

    try:
        torch.cuda.set_sync_debug_mode("error")
        train_epoch(parts, batches, at, fakes.FakeMonitor(None), stop_before_the_guard_asks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert at.step == 6


def test_a_run_on_the_gpu_resumes(store, tmp_path):
    config = fakes.small_config("train.device=auto", "train.epochs=1", "train.ema_decay=0.9")
    fit.fit(config, store, 0, tmp_path / "run")
    fold = runs.open_run(tmp_path / "run").folds[0]
    assert fold.environment.model_extra["device"].startswith("cuda")
    (fold.folder / runs.SUMMARY).unlink()
    assert fit.fit(config, store, 0, tmp_path / "run", resume=True).epochs == 1
    model, _ = runs.load_model(fold, "cuda")
    assert model(torch.zeros(1, 1, 32, 32, device="cuda")).isfinite().all()


def test_the_batch_that_fits_shrinks_with_the_picture():
    device = pick_device("auto")
    torch.cuda.set_per_process_memory_fraction(0.1)  # other tests run on the same GPU meanwhile
    try:
        sizes = [
            find_batch_size(fakes.small_config(f"pipeline.height={side}", f"pipeline.width={side}"), device, 10**6)
            for side in (64, 2048)
        ]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert sizes[0] >= sizes[1] >= 1


def test_running_out_of_memory_says_what_to_lower(store, tmp_path, monkeypatch):
    def exhausted(self, x):
        return torch.empty(2**46, device="cuda")

    monkeypatch.setattr("training.model.MammoModel.outputs", exhausted)
    with pytest.raises(RunError, match="Out of memory with batches of 4"):
        fit.fit(fakes.small_config("train.device=auto"), store, 0, tmp_path / "run")
