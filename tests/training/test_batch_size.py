"""The batch that fits, what is said where it did not, and what a model costs."""

from __future__ import annotations

import pytest
import torch

from preprocessing.errors import RunError
from preprocessing.machine import Memory
from tests.training import fakes
from training import batch_size, fit, runs
from training.analysis import analyse, as_rows
from training.config import ModelSettings
from training.device import held_by_others
from training.model import build_model

CPU = torch.device("cpu")


def _with_memory(monkeypatch, available):
    memory = Memory(total=2 * available, free=available)
    monkeypatch.setattr(batch_size, "available_memory", lambda: memory)


def test_more_memory_gives_larger_batches_in_powers_of_two(monkeypatch):
    config, found = fakes.small_config("pipeline.height=64", "pipeline.width=64"), []
    for available in (2**28, 2**29, 2**30):
        _with_memory(monkeypatch, available)
        found.append(batch_size.find_batch_size(config, CPU, samples=10**6))
    assert found[0] < found[1] < found[2]
    assert all(size & (size - 1) == 0 for size in found)


def test_larger_pictures_give_smaller_batches(monkeypatch):
    _with_memory(monkeypatch, 2**29)
    sizes = [
        batch_size.find_batch_size(fakes.small_config(f"pipeline.height={s}", f"pipeline.width={s}"), CPU, 10**6)
        for s in (64, 128)
    ]
    assert sizes[1] <= sizes[0] / 4


def test_an_epoch_keeps_at_least_eight_steps(monkeypatch):
    _with_memory(monkeypatch, 2**40)
    assert batch_size.find_batch_size(fakes.small_config(), CPU, samples=100) == 8


def test_where_nothing_fits_it_says_what_to_lower(monkeypatch):
    _with_memory(monkeypatch, 2**20)
    with pytest.raises(RunError, match=r"Not even one 32 x 32 picture fits.*gradient_checkpointing"):
        batch_size.find_batch_size(fakes.small_config(), CPU, samples=100)


@pytest.mark.parametrize(("free", "own", "held"), [(65, 0, 15), (79.5, 0, 0), (65, 5, 0)])
def test_who_else_has_the_gpu_is_told_before_this_process_uses_it(monkeypatch, free, own, held):
    """A simulated GPU of 80 GiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * 2**30), 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: own * 2**30)
    assert held_by_others(torch.device("cuda", 0)) == held * 2**30


def test_the_size_found_is_kept_with_the_run_and_for_its_resumption(tmp_path, monkeypatch):
    fakes.use_fakes(monkeypatch)
    store = fakes.make_store(tmp_path / "store")
    config = fakes.small_config("train.auto_batch=true", "train.epochs=1", "data.loader.batch_size=1")
    monkeypatch.setattr(fit, "find_batch_size", lambda *a: 6)
    fit.fit(config, store, 0, tmp_path / "run")
    assert runs.open_run(tmp_path / "run").folds[0].config.data.loader.batch_size == 6
    monkeypatch.setattr(fit, "find_batch_size", lambda *a: pytest.fail("it was found already"))
    assert runs.continues(tmp_path / "run" / "fold0", config, store)
    fit.fit(config, store, 0, tmp_path / "run", resume=True)


# ---- what a model costs


def test_parameters_and_flops_add_up_to_the_models():
    model = build_model(ModelSettings(backbone="resnet10t", weights="none", aux=("density",)), 1)
    stages = analyse(model, torch.randn(2, 1, 64, 64), repeats=1)
    total = stages[-1]
    assert total.name == "total"
    assert sum(stage.parameters for stage in stages[:-1]) == total.parameters
    assert total.parameters == sum(p.numel() for p in model.parameters())
    assert sum(stage.flops for stage in stages[:-1]) == pytest.approx(total.flops)
    assert model.training


def test_flops_of_a_convolution_are_those_of_the_closed_form():
    model = build_model(ModelSettings(backbone="resnet18", weights="none"), 1)
    stages = {stage.name: stage for stage in analyse(model, torch.randn(3, 1, 64, 64), repeats=1)}
    # The 7 x 7 convolution at stride 2, 1 channel to 64: 2 operations for each weight at each place.
    assert stages["backbone.conv1"].flops == 2 * 3 * 32 * 32 * 64 * 49
    assert stages["backbone.conv1"].output_bytes == 4 * 3 * 64 * 32 * 32
    assert stages["head"].flops == 2 * 3 * 512
    assert [row["stage"] for row in as_rows(list(stages.values()))] == list(stages)
