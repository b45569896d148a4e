"""Progressive resizing: which epoch sees which size, and what stays as it is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from preprocessing.errors import ConfigError
from tests.training import fakes
from training import fit, runs, session
from training.build import build_parts
from training.config import load_config
from training.distributed import World
from training.loop import Position, train_epoch
from training.resizing import training_pipeline


def _sizes(*overrides):
    config = load_config(None, overrides)
    pipelines = [training_pipeline(config, epoch) for epoch in range(config.train.epochs)]
    return [(pipeline.height, pipeline.width) for pipeline in pipelines]


def test_each_share_has_an_equal_part_of_the_epochs():
    found = _sizes("train.epochs=6", "train.progressive=[0.5,0.75,1]", "pipeline.height=512", "pipeline.width=352")
    # 0.5 and 0.75 of 352 are 176 and 264, which are 5.5 and 8.25 times 32.
    assert found == [(256, 192)] * 2 + [(384, 256)] * 2 + [(512, 352)] * 2


@pytest.mark.parametrize("epochs", [1, 2, 3, 7])
def test_the_last_epochs_are_at_the_last_share(epochs):
    assert _sizes(f"train.epochs={epochs}", "train.progressive=[0.5,0.75,1]")[-1] == (512, 512)


def test_no_share_is_larger_than_the_whole():
    shape = ("pipeline.height=50", "pipeline.width=40")
    assert _sizes("train.epochs=2", "train.progressive=[0.9,1]", *shape)[0] == (32, 32)
    assert _sizes("train.epochs=2", "train.progressive=[0.99,1]", *shape)[0] == (50, 32)


def test_no_share_leaves_nothing():
    assert _sizes("train.epochs=2", "train.progressive=[0.1,1]", "pipeline.height=128")[0] == (32, 64)


def test_a_damaged_tile_counts_once_in_all_sizes(tmp_path, monkeypatch):
    fakes.use_fakes(monkeypatch)
    made = fakes.FakeLoader.__init__

    def damaged(self, *arguments, **more):
        made(self, *arguments, **more)
        self.bad_samples = {1: "torn", 5: "torn"} if self.train else {}

    monkeypatch.setattr(fakes.FakeLoader, "__init__", damaged)
    config = fakes.small_config("train.progressive=[0.5,1]", "pipeline.height=64", "pipeline.width=64")
    fit.fit(config, fakes.make_store(tmp_path / "store"), 0, tmp_path / "run")
    records = runs.open_run(tmp_path / "run").folds[0].records("epoch")
    assert [record["bad_samples"] for record in records] == [2, 2]


def test_epochs_of_small_pictures_use_up_no_patience(tmp_path, monkeypatch):
    fakes.use_fakes(monkeypatch)
    monkeypatch.setattr(session, "_is_better", lambda value, best, metric: math.isnan(best))  # the first epoch's alone
    told = ("train.progressive=[0.5,1]", "train.epochs=6", "train.patience=2")
    config = fakes.small_config(*told, "pipeline.height=64", "pipeline.width=64")
    found = fit.fit(config, fakes.make_store(tmp_path / "store"), 0, tmp_path / "run")
    assert (found.stopped_early, found.epochs) == (True, 5)  # three of 32 pixels, and two without a better one


def test_without_shares_every_epoch_is_at_full_size():
    assert set(_sizes("train.epochs=4", "pipeline.height=500")) == {(500, 512)}


@pytest.mark.parametrize("shares", ["[0]", "[1.5]", "[0.5,-1]"])
def test_a_share_that_is_none_is_refused(shares):
    with pytest.raises(ConfigError, match=r"train\.progressive"):
        load_config(None, (f"train.progressive={shares}",))


def test_training_changes_its_size_and_validation_does_not(tmp_path, monkeypatch):
    fakes.use_fakes(monkeypatch)
    shapes = {True: [], False: []}
    epoch = fakes.FakeLoader.epoch

    def noted(self, number, start_step=0):
        shapes[self.train].append(self.shape[1:])
        return epoch(self, number, start_step)

    monkeypatch.setattr(fakes.FakeLoader, "epoch", noted)
    store = fakes.make_store(tmp_path / "store")
    config = fakes.small_config("train.progressive=[0.5,1]", "pipeline.height=64", "pipeline.width=64")
    fit.fit(config, store, 0, tmp_path / "run")
    assert shapes == {True: [(32, 32), (64, 64)], False: [(64, 64), (64, 64)]}
    assert len(runs.open_run(tmp_path / "run").folds[0].records("epoch")) == 2


@pytest.mark.parametrize(("mode", "passed"), [("default", None), ("reduce-overhead", "reduce-overhead")])
def test_the_compilers_mode_is_passed_on(tmp_path, monkeypatch, mode, passed):
    asked = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: asked.append(how))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: asked.append("step"))
    config = fakes.small_config("model.compile=true", f"model.compile_mode={mode}", "model.weights=none")
    rows = fakes.make_store(tmp_path / "store").manifest
    parts, _ = build_parts(
        config, torch.device("cpu"), World(), rows, {"negative": 1, "positive": 1}, batches=2, seed=0
    )
    assert asked == [{"dynamic": False, "mode": passed}]
    loader = fakes.open_fake_loader(None, rows, config, train=True, device="cpu", place=World())
    at = Position(batches=2, loss_sum=torch.zeros(()))
    train_epoch(parts, list(loader.epoch(0))[:2], at, fakes.FakeMonitor(None), lambda at, guard: None)
    assert asked[1:] == (["step"] * 2 if passed else [])


def test_a_compilers_mode_without_the_compiler_is_refused():
    with pytest.raises(ConfigError, match="compile_mode = 'max-autotune' needs compile = true"):
        fakes.small_config("model.compile_mode=max-autotune")


def test_cuda_graphs_do_not_add_up_gradients():
    with pytest.raises(ConfigError, match=r"compile_mode = 'reduce-overhead' records CUDA graphs.*accumulate = 1"):
        fakes.small_config("model.compile=true", "model.compile_mode=reduce-overhead", "train.accumulate=2")


def test_each_size_is_compiled_by_itself(tmp_path, monkeypatch):
    """By torch's tracer, its code generator left out: by itself torch leaves sizes open from the second one on."""
    sizes = []

    def backend(graph, inputs):
        assert not any(isinstance(given, torch.SymInt) for given in inputs)
        sizes.extend(
            given.shape[2:] for given in inputs if isinstance(given, torch.Tensor) and given.shape[:2] == (4, 1)
        )
        return graph.forward

    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: original(module, backend=backend, **how))
    config = fakes.small_config("model.compile=true", "model.weights=none")
    rows = fakes.make_store(tmp_path / "store").manifest
    drawn = {"negative": 1, "positive": 1}
    parts, _ = build_parts(config, torch.device("cpu"), World(), rows, drawn, batches=2, seed=0)
    for side in (32, 64, 32):
        parts.module(torch.zeros(4, 1, side, side))
    assert sizes == [(32, 32), (64, 64)]
