"""What a checkpoint holds comes back whole, on as many processes or on others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from preprocessing.manifest import Store
from tests.training import fakes
from training import fit
from training.build import build_parts
from training.distributed import World
from training.loop import Parts, Position, train_epoch
from training.state import Best, captured, restore


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    fakes.use_fakes(monkeypatch)
    return fakes.make_store(tmp_path / "store")


def _parts(store: Store, seed: int, accumulate: int = 1) -> Parts:
    config = fakes.small_config("train.ema_decay=0.9", f"train.accumulate={accumulate}")
    rows, _ = fit.split(store, config.data, 0)
    drawn = {"negative": 4, "positive": 2}
    parts, _ = build_parts(config, torch.device("cpu"), World(), rows, drawn, batches=12, seed=seed)
    return replace(parts, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**seed))


def _trained(store: Store, batches: int) -> tuple[Parts, Position]:
    config = fakes.small_config()
    rows, _ = fit.split(store, config.data, 0)
    parts, at = _parts(store, seed=3), Position(epoch=1, batches=12, step=7)
    with fakes.open_fake_loader(store, rows, config, train=True, device="cpu", place=World()) as loader:
        part = [batch for batch, _ in zip(loader.epoch(1), range(batches), strict=False)]
        train_epoch(parts, part, at, fakes.FakeMonitor(None), lambda *_: None)
    return parts, at


def _same(one: object, other: object) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_everything_that_was_captured_comes_back(store):
    parts, at = _trained(store, batches=5)
    best = Best(0.75, 2, 1)
    state = captured(parts, at, best, loss_sum=at.loss_sum, global_batch=4, seconds=60.0)
    other, there = _parts(store, seed=9), Position(batches=12)
    assert restore(state, other, there, global_batch=4) == (best, 60.0)
    assert (there.epoch, there.batch, there.step) == (1, 5, 12)
    assert there.loss_sum == at.loss_sum > 0
    assert _same(other.model.state_dict(), parts.model.state_dict())
    assert _same(other.ema.module.state_dict(), parts.ema.module.state_dict())
    assert not _same(parts.ema.module.state_dict(), parts.model.state_dict())
    assert _same(other.optimizer.state_dict(), parts.optimizer.state_dict())
    assert other.scaler.state_dict() == parts.scaler.state_dict()


@pytest.mark.parametrize(
    ("global_batch", "accumulate", "batches", "expected"),
    [(8, 1, 6, 2), (8, 2, 6, 2), (2, 1, 24, 10), (2, 4, 24, 8), (100, 1, 1, 0), (1, 1, 15, 15), (1, 4, 15, 15)],
)
def test_on_other_processes_it_goes_on_at_the_same_sample_or_the_window_before(
    store, global_batch, accumulate, batches, expected
):
    """Five batches of four samples were used. A window whose gradients are added up is never begun in its midst."""
    parts, at = _trained(store, batches=5)
    state = captured(parts, at, Best(), loss_sum=at.loss_sum, global_batch=4, seconds=0.0)
    there = Position(batches=batches)
    restore(state, _parts(store, seed=1, accumulate=accumulate), there, global_batch=global_batch)
    assert there.batch == expected
    assert float(there.loss_sum) == pytest.approx(float(at.loss_sum) * expected / 5)  # the same mean so far
