"""Fitting a fold: what a run folder holds, when training stops, what is refused; the loop against a plain one."""

from __future__ import annotations

import json
import math
import os
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import log_loss
from torch import nn

from preprocessing.errors import ConfigError, InputError, RunError
from tests.training import fakes
from training import checkpoint, fit, folds, metrics, run_files, runs, session
from training.build import build_parts, build_schedule
from training.config import TrainSettings, load_config
from training.device import pick_device, pick_precision
from training.distributed import World
from training.loop import Position, step_seed, train_epoch, validate
from training.losses import Loss


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def store(tmp_path, monkeypatch):
    fakes.use_fakes(monkeypatch)
    return fakes.make_store(tmp_path / "store")


def _parts(store, *overrides, batches=6):
    config = fakes.small_config(*overrides)
    rows, _ = fit.split(store, config.data, 0)
    parts, _ = build_parts(
        config, torch.device("cpu"), World(), rows, {"negative": 4, "positive": 2}, batches=batches, seed=1
    )
    loader = fakes.open_fake_loader(store, rows, config, train=True, device="cpu", place=World())
    return parts, loader, config


# ---- the loop


def test_the_loop_takes_the_steps_that_a_plain_one_takes(store):
    """Clipping, accumulation, schedule and average included: the weights of both must be bit-equal."""
    overrides = ("train.accumulate=4", "train.grad_clip=0.05", "train.ema_decay=0.9", "train.warmup_epochs=0.5")
    overrides += ("train.weight_decay=0.1",)  # large enough to be seen after two steps
    parts, loader, config = _parts(store, *overrides)
    at = Position(epoch=0, batches=6)
    train_epoch(parts, list(loader.epoch(0))[:6], at, fakes.FakeMonitor(None), lambda at, guard: None)

    other, _, _ = _parts(store, *overrides)
    model, average = other.model, {k: v.clone() for k, v in other.model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = build_schedule(optimizer, config.train, batches=6)
    model.train()
    batches = list(enumerate(loader.epoch(0)))[:6]
    # The last window is short, and its mean is over what it has.
    for step, window in enumerate((batches[:4], batches[4:]), start=1):
        optimizer.zero_grad()
        for number, batch in window:
            torch.manual_seed(step_seed(config.data.seed, 0, number, 0))
            image = batch["image"].contiguous(memory_format=torch.channels_last)
            losses = other.loss.per_sample(model(image), batch["label"])
            (losses.mean() / len(window)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        schedule.step_update(step)
        decay = 0.0 if step == 1 else min(1 - step ** (-2 / 3), 0.9)
        for key, value in model.state_dict().items():
            average[key] = value.clone() if not value.is_floating_point() else average[key].lerp(value, 1 - decay)
    assert at.step == 2
    for key, value in parts.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    for key, value in parts.judged.state_dict().items():
        torch.testing.assert_close(value, average[key])


def test_dropout_follows_from_epoch_and_process(store):
    def loss(epoch, rank):
        parts, loader, _ = _parts(store, "model.dropout=0.5")
        parts.rank, at = rank, Position(epoch=epoch, batches=1)
        train_epoch(parts, list(loader.epoch(0))[:1], at, fakes.FakeMonitor(None), lambda at, guard: None)
        return float(at.loss_sum)

    first = loss(0, 0)
    assert loss(0, 0) == first
    assert loss(1, 0) != first
    assert loss(0, 1) != first


def test_accumulating_two_small_batches_equals_one_large_one(store):
    """Without batch statistics and dropout, whose values depend on how samples are grouped."""
    overrides = ("model.backbone=convnext_atto", "model.dropout=0", "model.drop_path=0", "train.grad_clip=0")
    small, loader, _ = _parts(store, *overrides, "train.accumulate=2")
    large, _, _ = _parts(store, *overrides)
    batches = list(loader.epoch(0))[:2]
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    for parts in (small, large):  # plain steps: Adam's first step is a sign, which hides errors of size
        parts.optimizer = torch.optim.SGD(parts.model.parameters(), lr=0.1)
    train_epoch(small, batches, Position(batches=2), fakes.FakeMonitor(None), lambda at, guard: None)
    train_epoch(large, [joined], Position(batches=1), fakes.FakeMonitor(None), lambda at, guard: None)
    for one, other in zip(small.model.parameters(), large.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_schedule_warms_up_linearly_and_then_is_torchs_cosine():
    settings = TrainSettings(epochs=4, lr=0.1, min_lr=0.001, warmup_epochs=1, accumulate=2)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=settings.lr)
    schedule = build_schedule(optimizer, settings, batches=19)  # 10 steps an epoch
    found = []
    for step in range(41):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(found[:11], np.linspace(0.01, 0.1, 11))
    reference = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=settings.lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=30, eta_min=0.001)
    for step in range(10, 41):
        assert found[step] == pytest.approx(reference.param_groups[0]["lr"], rel=1e-6), step
        reference.step()
        cosine.step()


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 1, "lr": 0.1, "warmup_epochs": 5},  # longer than the run
        {"epochs": 2, "lr": 0.1, "min_lr": 0.2, "warmup_epochs": 0.5},  # min_lr is above lr
        {"epochs": 2, "lr": 0.1, "warmup_epochs": 0},
    ],
)
def test_a_run_reaches_its_learning_rate_and_never_goes_beyond_it(settings):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=settings["lr"])
    schedule = build_schedule(optimizer, TrainSettings(**settings), batches=10)
    found = []
    for step in range(10 * settings["epochs"]):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    assert max(found) == pytest.approx(0.1)


@pytest.mark.parametrize("bad_step", [0, 2, 5])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(store, bad_step):
    parts, loader, _ = _parts(store)
    batches = list(loader.epoch(0))[:6]
    batches[bad_step]["image"][1] = float("nan")
    rows, _ = fit.split(store, fakes.small_config().data, 0)
    names = ", ".join(rows["image_id"].iloc[batches[bad_step]["index"].numpy()])
    with pytest.raises(RunError, match=rf"epoch 4, batch {bad_step + 1} \(images {names}\)"):
        train_epoch(parts, batches, Position(epoch=3, batches=6), fakes.FakeMonitor(None), lambda at, guard: None)


def test_a_gradient_that_is_not_finite_stops_the_run_before_its_weights_are_saved(store, tmp_path, monkeypatch):
    """A finite loss whose slope is not: the square root's at 0."""
    original = Loss.per_sample
    calls = []

    def steep(self, logits, labels):
        calls.append(logits)
        return original(self, logits, labels) + (torch.sqrt(0 * logits) if len(calls) == 3 else 0)

    monkeypatch.setattr(Loss, "per_sample", steep)
    with pytest.raises(RunError, match=r"loss or its gradient was not finite in epoch 1, batch 3 "):
        fit.fit(fakes.small_config("train.checkpoint_steps=1"), store, 0, tmp_path / "run")
    state, described = checkpoint.newest(tmp_path / "run" / "fold0" / "checkpoints")
    assert described["step"] == 2
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_predictions_that_are_not_finite_end_the_run_and_no_model_is_kept_for_them(store, tmp_path, monkeypatch):
    def broken(parts, batches, monitor, rows):
        found = validate(parts, batches, monitor, rows)
        found.prediction[[1, 4]] = np.nan
        return found

    monkeypatch.setattr(session, "validate", broken)
    with pytest.raises(RunError, match=r"After epoch 1 the model gives no finite prediction for 2 of 48 pictures \(0"):
        fit.fit(fakes.small_config(), store, 0, tmp_path / "run")
    assert not (tmp_path / "run" / "fold0" / "validation.csv").exists()


def test_a_run_is_not_put_into_a_file(store, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(InputError, match="run: a file, not a folder"):
        fit.fit(fakes.small_config(), store, 0, tmp_path / "run")


def test_an_epoch_without_a_whole_batch_is_refused_before_anything_is_written(store, tmp_path):
    with pytest.raises(
        InputError, match=r"batch_size = 64 × 1 process\(es\): an epoch of 48 samples has no such batch"
    ):
        fit.fit(fakes.small_config("data.loader.batch_size=64"), store, 0, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_validation_predicts_each_row_once_without_changing_the_model(store):
    parts, _, config = _parts(store, "train.ema_decay=0.9")
    _, held_out = fit.split(store, config.data, 0)
    loader = fakes.open_fake_loader(store, held_out, config, train=False, device="cpu", place=World())
    before = {name: value.clone() for name, value in parts.judged.state_dict().items()}
    found = validate(parts, loader.epoch(0), fakes.FakeMonitor(None), len(held_out))
    assert found.index.tolist() == list(range(len(held_out)))
    assert found.ok.all()
    assert all(torch.equal(value, before[name]) for name, value in parts.judged.state_dict().items())
    batch = next(iter(loader.epoch(0)))
    with torch.inference_mode():
        expected = torch.sigmoid(parts.judged(batch["image"])).numpy()
    np.testing.assert_array_equal(found.prediction[: len(expected)], expected)


def test_gradients_that_stay_infinite_in_fp16_end_the_run(store):
    """Loss scaling passes over each such step, and would do so for ever."""
    parts, loader, _ = _parts(store)
    parts.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    parts.model.head.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(RunError, match=r"train\.precision = fp16: the gradients of too many steps"):
        train_epoch(
            parts, list(loader.epoch(0))[:6], Position(batches=6), fakes.FakeMonitor(None), lambda at, guard: None
        )


@pytest.mark.parametrize(
    ("column", "override"),
    [
        ("density", "model.aux=[density]"),
        ("machine_id", "data.holdout_machines=[29]"),
        ("weight", "data.loader.weight_column=weight"),
    ],
)
def test_a_run_goes_on_only_with_the_values_that_it_was_trained_on(tmp_path, monkeypatch, column, override):
    fakes.use_fakes(monkeypatch)
    rows = fakes.make_rows().assign(weight=1.0)
    store = fakes.make_store(tmp_path / "store", rows)
    sampling = ("data.loader.sampling=weighted",) if column == "weight" else ()
    config = fakes.small_config("train.epochs=1", "train.max_steps=1", *sampling, override)
    fit.fit(config, store, 0, tmp_path / "run")
    assert fit.fit(config, store, 0, tmp_path / "run", resume=True).epochs == 1
    other = 2.0 if column == "weight" else next(value for value in rows[column] if value != rows[column][0])
    changed = fakes.make_store(tmp_path / "store", rows.assign(**{column: [other, *rows[column][1:]]}))
    assert changed.fingerprint == store.fingerprint
    with pytest.raises(RunError, match=rf"begun with something else \({column}: .* has other values there"):
        fit.fit(config, changed, 0, tmp_path / "run", resume=True)
    plain = fakes.small_config("train.epochs=1", "train.max_steps=1")
    fit.fit(plain, store, 0, tmp_path / "plain")
    fit.fit(plain, changed, 0, tmp_path / "plain", resume=True)  # which reads none of them


def test_a_run_goes_on_only_with_the_hard_negatives_that_it_was_trained_on(tmp_path, monkeypatch):
    fakes.use_fakes(monkeypatch)
    store, listed = fakes.make_store(tmp_path / "store"), tmp_path / "hard.csv"
    negative = store.manifest.loc[store.manifest["cancer"] == 0, "image_id"].tolist()
    config = fakes.small_config("train.epochs=1", "train.max_steps=1", f"data.loader.hard_negatives={listed}")
    listed.write_text(f"image_id\n{negative[0]}\n{negative[1]}\n")
    fit.fit(config, store, 0, tmp_path / "run")
    listed.write_text(f"image_id;note\r\n{negative[1]};b\r\n{negative[0]};a\r\n")
    fit.fit(config, store, 0, tmp_path / "run", resume=True)
    listed.write_text(f"image_id\n{negative[0]}\n{negative[2]}\n")
    with pytest.raises(RunError, match=r"\(hard_negatives: .*hard.csv lists other pictures than it did"):
        fit.fit(config, store, 0, tmp_path / "run", resume=True)


@pytest.mark.parametrize("share", [2, 3])
def test_a_run_resumed_on_fewer_processes_past_its_last_step_goes_on_with_validation(
    store, tmp_path, monkeypatch, share
):
    config = fakes.small_config("train.epochs=1", "train.max_steps=4", "train.checkpoint_steps=3")
    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "_end_epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit.fit(config, store, 0, tmp_path / "run")
    folder = tmp_path / "run/fold0/checkpoints"
    state, described = checkpoint.newest(folder)
    state["position"]["global_batch"] *= share
    own = {key: value for key, value in described.items() if key not in ("version", "file", "sha256")}
    checkpoint.save(folder, state, own, keep=1)
    assert fit.fit(config, store, 0, tmp_path / "run", resume=True).epochs == 1


def test_bf16_trains_close_to_float32(store):
    losses = {}
    for precision in ("fp32", "bf16"):
        parts, loader, _ = _parts(store, f"train.precision={precision}")
        at = Position(batches=6)
        train_epoch(parts, list(loader.epoch(0))[:6], at, fakes.FakeMonitor(None), lambda at, guard: None)
        losses[precision] = float(at.loss_sum)
        assert all(p.dtype == torch.float32 for p in parts.model.parameters())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["bf16"] != losses["fp32"]


# ---- a fold


def test_a_run_folder_holds_what_the_architecture_promises(store, tmp_path):
    summary = fit.fit(fakes.small_config("train.metric=log_loss"), store, 0, tmp_path / "run", command="train --fold 0")
    folder = tmp_path / "run" / "fold0"
    run = runs.open_run(tmp_path / "run")
    assert [fold.fold for fold in run.folds] == [0]
    fold = run.folds[0]
    assert fold.finished
    assert fold.config == fakes.small_config("train.metric=log_loss")
    assert fold.environment.store_fingerprint == store.fingerprint
    assert fold.environment.model_extra["command"] == "train --fold 0"
    assert fold.environment.training.model_extra["images"] == len(fit.split(store, fold.config.data, 0)[0])

    records = fold.records("epoch")
    assert [record["epoch"] for record in records] == [0, 1]
    promised = (
        "epoch step train_loss val_loss lr auroc pf1 pf1_best threshold average_precision images_per_s wait_share"
    )
    assert set(f"{promised} seconds drawn best bad_samples".split()) <= set(records[0])
    best = min(records, key=lambda record: record["log_loss"])
    assert summary.best_epoch == best["epoch"]
    assert summary.value == pytest.approx(best["log_loss"])

    held_out = store.manifest[folds.read_folds(store)["fold"] == 0]
    validation = fold.validation
    assert sorted(validation["image_id"]) == sorted(held_out["image_id"])
    breasts = metrics.per_breast(validation)
    assert metrics.log_loss(breasts["cancer"], breasts["prediction"]) == pytest.approx(best["log_loss"], rel=1e-6)
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*.pt")) == [
        f"step-{record['step']:08d}.pt" for record in records
    ]
    published = json.loads((folder / "checkpoints" / "best.json").read_text())
    assert published["epoch"] == best["epoch"]


@pytest.mark.parametrize("average", ["train.ema_decay=0", "train.ema_decay=0.9"])
def test_the_published_model_gives_the_validation_predictions_again(store, tmp_path, average):
    config = fakes.small_config(average)
    fit.fit(config, store, 0, tmp_path / "run")
    fold = runs.open_run(tmp_path / "run").folds[0]
    model, described = runs.load_model(fold)
    assert described["best"] is True
    _, held_out = fit.split(store, config.data, 0)
    loader = fakes.open_fake_loader(store, held_out, config, train=False, device="cpu", place=World())
    with torch.inference_mode():
        found = torch.cat([torch.sigmoid(model(batch["image"])) for batch in loader.epoch(0)]).numpy()
    expected = fold.validation.set_index("image_id").loc[held_out["image_id"], "prediction"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_training_lowers_the_loss_and_finds_the_spot(store, tmp_path):
    fit.fit(fakes.small_config("train.epochs=4", "train.loss=bce", "train.lr=3e-3"), store, 0, tmp_path / "run")
    records = runs.open_run(tmp_path / "run").folds[0].records("epoch")
    assert records[-1]["train_loss"] < 0.7 * records[0]["train_loss"]
    assert records[-1]["auroc"] > 0.9


def test_training_stops_when_nothing_improves(store, tmp_path, monkeypatch):
    values = iter([0.6, 0.7, 0.65, 0.7, 0.9])
    original = metrics.summarise
    monkeypatch.setattr(session.metrics, "summarise", lambda *a, **k: {**original(*a, **k), "auroc": next(values)})
    summary = fit.fit(fakes.small_config("train.epochs=9", "train.patience=2"), store, 0, tmp_path / "run")
    assert (summary.epochs, summary.best_epoch, summary.stopped_early) == (4, 1, True)
    (tmp_path / "run" / "fold0" / runs.SUMMARY).unlink()  # as if killed just then
    again = fit.fit(fakes.small_config("train.epochs=9", "train.patience=2"), store, 0, tmp_path / "run", resume=True)
    assert (again.epochs, again.best_epoch, again.stopped_early) == (4, 1, True)


def test_folds_begin_with_other_weights_and_a_run_that_goes_on_asks_for_none(store, tmp_path, monkeypatch):
    asked, whole = [], session.build_parts

    def noted(*given, **how):
        asked.append((how["seed"], how["pretrained"]))
        return whole(*given, **how)

    monkeypatch.setattr(session, "build_parts", noted)
    config = fakes.small_config("train.epochs=1", "train.max_steps=1", "data.seed=5")
    for fold in (0, 1):
        fit.fit(config, store, fold, tmp_path / "run")
    (tmp_path / "run" / "fold1" / runs.SUMMARY).unlink()
    fit.fit(config, store, 1, tmp_path / "run", resume=True)
    assert asked == [(5, True), (6, True), (6, False)]


def test_an_epochs_share_of_waiting_is_its_own(store, tmp_path, monkeypatch):
    whole = fakes.FakeLoader.epoch

    def slow_at_first(self, epoch, start_step=0):
        self.wait_s += 1000 * (epoch == 0)
        return whole(self, epoch, start_step)

    monkeypatch.setattr(fakes.FakeLoader, "epoch", slow_at_first)
    fit.fit(fakes.small_config("train.epochs=2"), store, 0, tmp_path / "run")
    first, second = runs.open_run(tmp_path / "run").folds[0].records("epoch")
    assert first["wait_share"] > 1
    assert second["wait_share"] == 0


def test_damaged_pictures_count_neither_in_the_validations_loss_nor_in_its_figures(store, tmp_path, monkeypatch):
    whole = fakes.FakeLoader.epoch

    def damaged(self, *where, **start):
        for batch in whole(self, *where, **start):
            ok = batch["ok"] if self.train else batch["index"] % 5 != 3
            yield batch | {"ok": ok, "image": torch.where(ok[:, None, None, None], batch["image"], 0)}

    monkeypatch.setattr(fakes.FakeLoader, "epoch", damaged)
    config = fakes.small_config("train.epochs=1", "train.loss=bce", "train.precision=fp32")
    fit.fit(config, store, 0, tmp_path / "run")
    (fold,) = runs.open_run(tmp_path / "run").folds
    _, held_out = fit.split(store, config.data, 0)
    found, (record,) = fold.validation, fold.records("epoch")
    kept = held_out["image_id"].to_numpy()[np.arange(len(held_out)) % 5 != 3]
    assert sorted(found["image_id"]) == sorted(kept)
    assert record["bad_samples"] == len(held_out) - len(kept)
    assert record["val_loss"] == pytest.approx(log_loss(found["cancer"], found["prediction"]), rel=1e-5)


def test_fewer_steps_an_epoch_where_debug_mode_says_so(store, tmp_path):
    fit.fit(fakes.small_config("train.max_steps=2", "train.accumulate=3"), store, 0, tmp_path / "run")
    records = runs.open_run(tmp_path / "run").folds[0].records("epoch")
    assert [record["step"] for record in records] == [2, 4]
    assert max(step for _, step, _ in fakes.FakeLoader.served) <= 6  # one may be fetched ahead


def test_a_subset_keeps_both_classes(store):
    config = load_config(None, ("data.folds=2", "data.max_images=10"))
    for part in fit.split(store, config.data, 0):
        assert len(part) == 10
        assert 0 < part["cancer"].sum() <= 5
        assert part.index.tolist() == list(range(10))
        assert part["image_id"].is_monotonic_increasing, "the manifest's order"
    training, _ = fit.split(store, load_config(None, ("data.folds=2", "data.max_images=40")).data, 0)
    assert len(training) == 40, "negatives in the place of positives that there are not"


def test_machines_and_sites_can_be_kept_out_of_training_and_are_still_validated(store):
    config = load_config(None, ("data.folds=2", 'data.holdout_machines=["29"]', 'data.holdout_sites=["2"]'))
    training, held_out = fit.split(store, config.data, 0)
    assert "29" not in set(training["machine_id"])
    assert set(training["site_id"]) == {"1"}
    assert set(held_out["site_id"]) == {"1", "2"}


def test_unlabelled_pictures_are_neither_trained_on_nor_validated(tmp_path):
    rows = fakes.make_rows()
    rows.loc[::5, "cancer"] = np.nan
    store = fakes.make_store(tmp_path / "store", rows)
    training, held_out = fit.split(store, load_config(None, ("data.folds=2",)).data, 1)
    assert len(training) + len(held_out) == rows["cancer"].notna().sum()


@pytest.mark.parametrize(("name", "there"), [("machines", "29, 48, 49"), ("sites", "1, 2")])
def test_what_is_to_be_held_out_must_be_there(store, name, there):
    data = load_config(None, ("data.folds=2", f"data.holdout_{name}=[49, 1, Hologic]")).data
    known = {"machines": 49, "sites": 1}[name]
    assert str(known) in getattr(data, f"holdout_{name}")  # numbers need no quotes
    with pytest.raises(InputError, match=rf"data\.holdout_{name}: .* has no '.*'; it has {there}\."):
        fit.split(store, data, 0)


def test_two_trainings_into_one_folder_do_not_mix(store, tmp_path):
    folder = tmp_path / "run" / "fold0"
    with runs.locked(folder):
        with pytest.raises(RunError, match=r"fold0: another training is writing there\."):
            fit.fit(fakes.small_config("train.epochs=1"), store, 0, tmp_path / "run")
        assert sorted(path.name for path in folder.iterdir()) == [".lock"]
    assert not folder.exists()
    fit.fit(fakes.small_config("train.epochs=1"), store, 0, tmp_path / "run")


def test_all_folds_and_resuming_passes_over_finished_ones(store, tmp_path):
    config = fakes.small_config("train.epochs=1")
    first = [fit.fit(config, store, fold, tmp_path / "run") for fold in (0, 1)]
    assert [summary.fold for summary in first] == [0, 1]
    served = len(fakes.FakeLoader.served)
    again = [fit.fit(config, store, fold, tmp_path / "run", resume=True) for fold in (0, 1)]
    assert again == first
    assert len(fakes.FakeLoader.served) == served


# ---- refusals


def test_an_unknown_fold_names_those_there(store, tmp_path):
    with pytest.raises(InputError, match=r"--fold 7: .* has folds 0, 1\."):
        fit.fit(fakes.small_config(), store, 7, tmp_path / "run")


def test_a_covariate_that_is_unknown_is_refused_before_training(store, tmp_path):
    rows = store.manifest.assign(age=np.nan)
    ageless = fakes.make_store(tmp_path / "ageless", rows)
    with pytest.raises(InputError, match=r"train\.covariates: age is unknown for all pictures of .*ageless"):
        fit.fit(fakes.small_config("train.covariates=[age]"), ageless, 0, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_covariates_may_change_for_they_are_fitted_after_training(store, tmp_path):
    done = fit.fit(fakes.small_config(), store, 0, tmp_path / "run")
    assert fit.fit(fakes.small_config("train.covariates=[age]"), store, 0, tmp_path / "run", resume=True) == done


def test_a_fold_without_both_classes_is_refused(store, tmp_path):
    made = folds.make_folds(store, load_config(None, ("data.folds=2",)).data)
    sick = store.manifest.groupby("patient_id")["cancer"].transform("max") == 1
    made.assign(fold=np.where(sick, 0, 1)).to_csv(store.root / "folds.csv", index=False)
    with pytest.raises(InputError, match=r"--fold 0: breasts with and without cancer are needed to train on; found 0"):
        fit.fit(fakes.small_config(), store, 0, tmp_path / "run")


def test_a_fold_whose_only_breast_has_a_picture_of_each_class_is_refused(tmp_path):
    rows = fakes.make_rows()
    rows.loc[rows["image_id"] == "0011", "cancer"] = 1.0  # one of the left breast's two pictures
    rows.loc[rows["image_id"].isin(["0012", "0013"]), "cancer"] = np.nan  # nothing is known of the right one
    mixed = fakes.make_store(tmp_path / "mixed", rows)
    made = folds.make_folds(mixed, load_config(None, ("data.folds=2",)).data)
    made.assign(fold=np.where(rows["patient_id"] == "p001", 0, 1)).to_csv(mixed.root / "folds.csv", index=False)
    with pytest.raises(InputError, match=r"are needed to validate on; found 1 with and 0"):
        fit.fit(fakes.small_config(), mixed, 0, tmp_path / "run")


def test_a_run_that_is_there_is_not_overwritten(store, tmp_path):
    fit.fit(fakes.small_config("train.epochs=1"), store, 0, tmp_path / "run")
    with pytest.raises(RunError, match="--resume"):
        fit.fit(fakes.small_config("train.epochs=1"), store, 0, tmp_path / "run")


def test_another_configuration_is_refused_with_the_difference(store, tmp_path):
    fit.fit(fakes.small_config("train.epochs=1"), store, 0, tmp_path / "run")
    with pytest.raises(RunError, match=r"train\.lr: 0\.001 there, 0\.002 now"):
        fit.fit(fakes.small_config("train.epochs=1", "train.lr=2e-3"), store, 0, tmp_path / "run", resume=True)
    # What does not change the result may differ.
    fit.fit(fakes.small_config("train.epochs=1", "data.loader.threads=1"), store, 0, tmp_path / "run", resume=True)


def test_another_store_is_refused(store, tmp_path):
    config = fakes.small_config("train.epochs=1")
    fit.fit(config, store, 0, tmp_path / "run")
    other = fakes.make_store(tmp_path / "other", fakes.make_rows(seed=9))
    with pytest.raises(RunError, match="store: fingerprint"):
        fit.fit(config, other, 0, tmp_path / "run", resume=True)
    assert not runs.continues(tmp_path / "run" / "fold0", config, other)
    assert runs.continues(tmp_path / "run" / "fold0", config, store)


def test_a_finished_fold_whose_metric_was_no_number_can_be_looked_at_again(store, tmp_path):
    config = fakes.small_config("train.epochs=1")
    done = fit.fit(config, store, 0, tmp_path / "run")
    path = tmp_path / "run" / "fold0" / runs.SUMMARY
    run_files.write_json(path, run_files.read_json(path, "") | {"value": float("nan")})
    again = fit.fit(config, store, 0, tmp_path / "run", resume=True)
    assert "auroc nan" in str(again)
    assert done.epochs == again.epochs


def test_other_folds_are_refused(store, tmp_path):
    config = fakes.small_config("train.epochs=1")
    fit.fit(config, store, 0, tmp_path / "run")
    kept = (store.root / "folds.csv").read_text()
    folds.make_folds(store, config.data.model_copy(update={"seed": 1}))
    assert (store.root / "folds.csv").read_text() != kept
    with pytest.raises(RunError, match=r"folds: fold 0 of .* now holds out different pictures"):
        fit.fit(config, store, 0, tmp_path / "run", resume=True)
    assert not runs.continues(tmp_path / "run" / "fold0", config, store)
    (store.root / "folds.csv").write_text(kept)
    fit.fit(config, store, 0, tmp_path / "run", resume=True)


@pytest.mark.parametrize("damage", ["flip", "cut", "text"])
def test_a_damaged_model_is_refused(store, tmp_path, damage):
    fit.fit(fakes.small_config("train.epochs=1"), store, 0, tmp_path / "run")
    fold = runs.open_run(tmp_path / "run").folds[0]
    data = bytearray(fold.best.read_bytes())
    if damage == "flip":
        data[-1000] ^= 1
    fold.best.write_bytes({"flip": bytes(data), "cut": bytes(data[:-10]), "text": b"hello"}[damage])
    with pytest.raises(RunError, match=r"best\.safetensors: (damaged|not readable)"):
        runs.load_model(fold)


def test_opening_what_is_no_run_says_so(tmp_path):
    with pytest.raises(RunError, match="no run there"):
        runs.open_run(tmp_path / "absent")
    with pytest.raises(RunError, match="no trained fold"):
        runs.open_run(tmp_path)


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch finds 0 NVIDIA GPU"):
        pick_device("cuda:3")
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="fp16"):
        pick_precision("fp16", torch.device("cpu"))


def test_more_processes_than_gpus_are_told_how_many_to_start(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    for name in ("auto", "cuda"):
        with pytest.raises(ConfigError, match=r"process number 2 here.* --nproc-per-node 2 at most"):
            pick_device(name)
    assert len(chosen) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_with_the_shells_status(store, tmp_path, monkeypatch, number):
    original = session.Session._after_step

    def after_step(self, at, guard):
        if at.step == 3:
            os.kill(os.getpid(), number)
        original(self, at, guard)

    monkeypatch.setattr(session.Session, "_after_step", after_step)
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as left:
        fit.fit(fakes.small_config(), store, 0, tmp_path / "run")
    assert left.value.code == 128 + number
    assert signal.getsignal(number) is handler
    described = json.loads((tmp_path / "run/fold0/checkpoints/step-00000003.json").read_text())
    assert (described["epoch"], described["batch"], described["step"]) == (0, 3, 3)


def test_a_signal_in_the_last_validation_lets_the_fold_end_and_is_not_lost(tmp_path, monkeypatch):
    """Or `--fold all` would go on with the next fold."""
    fakes.use_fakes(monkeypatch)
    fakes.make_store(tmp_path / "store")
    original, left = session.Session._validate, []

    def validate(self):
        found = original(self)
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(session.Session, "_validate", validate)
    monkeypatch.setattr(signal, "raise_signal", left.append)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        fit.fit(fakes.small_config("train.epochs=1"), tmp_path / "store", 0, tmp_path / "run")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left == [signal.SIGTERM]
    assert runs.open_run(tmp_path / "run").folds[0].finished


def test_nothing_in_json_is_nan(store, tmp_path):
    run_files.write_json(tmp_path / "x.json", {"a": math.nan, "b": [np.float32(1.5), np.inf], "c": np.int64(3)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [1.5, None], "c": 3}


def test_validation_reads_back_ids_as_text(store, tmp_path):
    fit.fit(fakes.small_config("train.epochs=1"), store, 0, tmp_path / "run")
    validation = runs.open_run(tmp_path / "run").folds[0].validation
    assert all(isinstance(value, str) for value in validation["machine_id"])
    assert validation["image_id"].str.len().eq(4).all()  # leading zeros kept
    assert isinstance(validation, pd.DataFrame)


@pytest.mark.parametrize("name", ["checkpoints/best.safetensors", "validation.csv"])
def test_a_finished_fold_that_lacks_what_it_made_is_named(store, tmp_path, name):
    config = fakes.small_config("train.epochs=1", "train.max_steps=1")
    fit.fit(config, store, 0, tmp_path / "run")
    (tmp_path / "run" / "fold0" / name).unlink()
    with pytest.raises(RunError, match=rf"fold0: finished, but {name} is gone\. Restore it, or train the fold again"):
        fit.fit(config, store, 0, tmp_path / "run", resume=True)


def test_a_fold_with_settings_of_another_version_is_no_fold_to_go_on_with(store, tmp_path):
    config = fakes.small_config("train.epochs=1", "train.max_steps=1")
    fit.fit(config, store, 0, tmp_path / "run")
    assert runs.continues(tmp_path / "run" / "fold0", config, store)
    path = tmp_path / "run" / "fold0" / "config.yaml"
    path.write_text(path.read_text().replace("train:", "train:\n  gone_setting: 1"))
    assert not runs.continues(tmp_path / "run" / "fold0", config, store)
    with pytest.raises(ConfigError, match="gone_setting"):
        fit.fit(config, store, 0, tmp_path / "run", resume=True)
