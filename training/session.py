"""One fold in training: the parts, where it stands, and the files that it writes."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch

from dali_pipes.settings import PipelineSettings
from preprocessing.errors import InputError, RunError
from preprocessing.manifest import Store
from preprocessing.progress import Progress
from training import checkpoint, metrics, run_files, runs
from training.build import build_parts, open_loader, open_monitor
from training.config import Config
from training.console import clock
from training.distributed import World
from training.environment import describe
from training.loop import Batch, FiniteGuard, Position, train_epoch, validate
from training.resizing import training_pipeline
from training.signals import StopSignal
from training.state import Best, captured, restore

log = logging.getLogger(__name__)

LOG_EVERY = 20  # optimiser steps between two "step" records


@dataclass(frozen=True)
class FitSummary:
    """What training a fold came to."""

    fold: int
    folder: str
    epochs: int
    best_epoch: int
    metric: str
    value: float
    seconds: float
    stopped_early: bool

    def __str__(self) -> str:
        early = ", stopped early" if self.stopped_early else ""
        return (
            f"Fold {self.fold}: best {self.metric} {self.value:.4f} in epoch {self.best_epoch + 1} of {self.epochs}"
            f"{early}; {self.seconds:.0f} s. Run: {self.folder}"
        )


class Session:
    """One fold in training: the parts, where it stands, and the files that it writes."""

    def __init__(
        self,
        config: Config,
        store: Store,
        fold: int,
        folder: Path,
        command: str,
        console: Any,
        place: World,
        device: torch.device,
        training: pd.DataFrame,
        held_out: pd.DataFrame,
    ) -> None:
        self.config, self.store, self.fold, self.folder = config, store, fold, folder
        self.command, self.console, self.place, self.device = command, console, place, device
        self.training, self.held_out = training, held_out
        self.at, self.best = Position(), Best()
        self.spent = 0.0  # seconds of training before this process
        self.loader: Any = None
        self.damaged: set[int] = set()  # training rows whose tile loaders of earlier sizes could not use
        self._last_epoch: dict[str, Any] = {}  # the record of the epoch that this process trained last

    def __enter__(self) -> Session:
        self._resources = contextlib.ExitStack()
        with self._resources as stack:
            config, device = self.config, self.device
            self.stop = stack.enter_context(StopSignal())
            saved = checkpoint.newest(self.folder / runs.CHECKPOINTS)
            self.place.barrier()  # all have read before anything is written
            validation = open_loader(self.store, self.held_out, config, train=False, device=device, place=self.place)
            self.validation = stack.enter_context(validation)
            self._loaders = stack.enter_context(contextlib.ExitStack())
            self._open_loader(config.pipeline)
            limit = config.train.max_steps
            batches = self.loader.steps_per_epoch
            if not batches:
                raise InputError(
                    f"data.loader.batch_size = {config.data.loader.batch_size} × {self.place.size} process(es): an "
                    f"epoch of {config.data.loader.epoch_samples or len(self.training)} samples has no such batch. "
                    "Lower it, or raise data.loader.epoch_samples."
                )
            self.at.batches = min(batches, limit * config.train.accumulate) if limit else batches
            self.parts, weights = build_parts(
                config,
                device,
                self.place,
                self.training,
                dict(self.loader.drawn(0, self.at.batches)),
                batches=self.at.batches,
                seed=config.data.seed + self.fold,
                pretrained=saved is None,
            )
            self.at.loss_sum = torch.zeros((), device=device)
            if self.place.is_main:
                stack.enter_context(runs.locked(self.folder))
            # Before anything is written: a tracker that is not installed says so.
            monitor = open_monitor(self.folder, config, self.place, saved[1]["step"] if saved else 0)
            self._begin(saved, weights)
            self.monitor = stack.enter_context(monitor)
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._resources.__exit__(*error)

    def run(self) -> FitSummary:
        """The epochs."""
        self.started = self.saved_at = time.monotonic()
        settings = self.config.train
        stopped_early = self.best.stale >= settings.patience
        while self.at.epoch < settings.epochs and not stopped_early:
            self._open_loader(training_pipeline(self.config, self.at.epoch))
            began, waited = time.monotonic(), self.loader.wait_s
            first = self.at.batch
            self._epoch_from = began, waited
            with self._progress(self._figures) as self._advance:
                train_epoch(self.parts, self._batches(), self.at, self.monitor, self._after_step)
            seconds = time.monotonic() - began if first < self.at.batches else float("nan")  # validation alone was left
            record = {
                "images_per_s": (self.at.batches - first) * self._global_batch() / seconds,
                "wait_share": (self.loader.wait_s - waited) / seconds,
            }
            self._end_epoch(record, began)
            stopped_early = self.best.stale >= settings.patience
        return self._finish(stopped_early)

    def _open_loader(self, pipeline: PipelineSettings) -> None:
        """Have training pictures as the pipeline makes them; progressive resizing changes it between epochs."""
        if self.loader is not None:
            if pipeline == self._pipeline:
                return
            self.damaged |= set(self.loader.bad_samples)
            self._loaders.close()
            log.info("Training pictures are now of %d × %d pixels.", pipeline.height, pipeline.width)
        config = self.config.model_copy(update={"pipeline": pipeline})
        loader = open_loader(self.store, self.training, config, train=True, device=self.device, place=self.place)
        self.loader, self._pipeline = self._loaders.enter_context(loader), pipeline

    def _progress(
        self, figures: Callable[[], str], doing: str = ""
    ) -> AbstractContextManager[Callable[[Progress], None]]:
        """A bar over an epoch's images, on the first process's screen."""
        if self.console is None or not self.place.is_main:
            return contextlib.nullcontext(lambda state: None)
        label = f"Epoch {self.at.epoch + 1} of {self.config.train.epochs}{doing}"
        return self.console.progress(label, unit="images", figures=figures)

    def _figures(self) -> str:
        """How the epoch goes, for the screen. Reading the loss waits for the device: the screen asks once a second."""
        at, (began, waited), now = self.at, self._epoch_from, time.monotonic()
        words = [f"step {at.step}", f"loss {float(at.loss_sum) / max(at.batch, 1):.4f}"]
        if self._last_epoch:
            words.append(f"AUROC {self._last_epoch['auroc']:.3f}")
        if self.best.epoch >= 0:
            metric = self.config.train.metric.replace("auroc", "AUROC")
            words.append(f"best {metric} {self.best.value:.3f} (epoch {self.best.epoch + 1})")
        words.append(f"{100 * (self.loader.wait_s - waited) / max(now - began, 1e-9):.0f} % waiting for data")
        words.append(self.monitor.line())
        if self._last_epoch:
            left = self._last_epoch["seconds"] * (self.config.train.epochs - at.epoch) - (now - began)
            words.append(f"run {clock(max(left, 0))} left")
        return ", ".join(word for word in words if word)

    def _batches(self) -> Iterator[Batch]:
        batches = self.loader.epoch(self.at.epoch, start_step=self.at.batch)
        return itertools.islice(batches, self.at.batches - self.at.batch)

    def _global_batch(self) -> int:
        return self.config.data.loader.batch_size * self.place.size

    def _after_step(self, at: Position, guard: FiniteGuard) -> None:
        """Between two steps: a record now and then, a checkpoint when it is due, and the way out."""
        settings = self.config.train
        self._advance(Progress(at.batch * self._global_batch(), at.batches * self._global_batch()))
        if at.step % LOG_EVERY == 0:
            guard.check()
            self.monitor.log(
                "step",
                {"epoch": at.epoch, "step": at.step, "loss": float(at.loss_sum) / at.batch, "lr": self._lr()},
            )
        due = time.monotonic() - self.saved_at > 60 * settings.checkpoint_minutes
        due |= bool(settings.checkpoint_steps) and at.step % (settings.checkpoint_steps or 1) == 0
        stop, due = self.stop.agreed(self.place, due and at.batch < at.batches)
        if due:  # _end_epoch saves after the last, with its validation
            guard.check()
            self._save()
        if stop:
            guard.check()
            self._leave()

    def _end_epoch(self, record: dict[str, Any], began: float) -> None:
        """Validate, log, keep the best model, save, and move on to the next epoch."""
        at, settings = self.at, self.config.train
        predictions, loss, bad = self._validate()
        damaged = set().union(*self.place.gather(self.damaged | set(self.loader.bad_samples)))
        breasts = metrics.per_breast(predictions, settings.aggregate)
        figures = metrics.summarise(breasts["cancer"], breasts["prediction"])
        value = figures[settings.metric]
        is_best = _is_better(value, self.best.value, settings.metric)
        record = {
            "epoch": at.epoch,
            "step": at.step,
            "train_loss": float(self.place.sum(at.loss_sum)) / self.place.size / at.batches,
            "val_loss": loss,
            "lr": self._lr(),
            **{name: figures[name] for name in ("auroc", "pf1", "pf1_best", "threshold", "average_precision")},
            "log_loss": figures["log_loss"],
            **record,
            "seconds": time.monotonic() - began,
            "drawn": dict(self.loader.drawn(at.epoch, at.batches)),
            "best": is_best,
            "memory_mb": round(_peak_memory(self.device) / 2**20, 1),
            "bad_samples": bad + len(damaged),
        }
        self._last_epoch = record
        # Epochs of smaller pictures use up no patience: the whole ones are still to come.
        stale = self.best.stale + (self._pipeline == training_pipeline(self.config, settings.epochs - 1))
        self.best = Best(value, at.epoch, 0) if is_best else Best(self.best.value, self.best.epoch, stale)
        if self.place.is_main:
            if is_best:
                self._keep_best(predictions, record)
            self.monitor.log("epoch", record)
            other = "" if settings.metric == "auroc" else f", {settings.metric} {value:.4f}"
            log.info(
                "Epoch %d of %d: loss %.4f, validation %.4f, AUROC %.4f%s%s; %.1f images/s, %.1f %% of it waiting",
                *(at.epoch + 1, settings.epochs, record["train_loss"], loss, figures["auroc"], other),
                *(" (best)" if is_best else "", record["images_per_s"], 100 * record["wait_share"]),
            )
        gc.collect()  # here, where nothing waits for it
        at.epoch, at.batch = at.epoch + 1, 0
        at.loss_sum.zero_()
        self._save()
        if self.stop.agreed(self.place)[0] and at.epoch < settings.epochs:
            self._leave()

    def _validate(self) -> tuple[pd.DataFrame, float, int]:
        """The held-out pictures with their predictions, the mean loss, and how many tiles were damaged."""
        self.place.share_buffers(self.parts.judged)
        with self._progress(self.monitor.line, ", validation") as advance:
            batches = self._told(self.validation.epoch(0), advance)
            found = self.place.gather(validate(self.parts, batches, self.monitor, len(self.held_out)))
        index = np.concatenate([part.index for part in found])
        rows = self.held_out.iloc[index].assign(prediction=np.concatenate([part.prediction for part in found]))
        ok = np.concatenate([part.ok for part in found])
        wrong = rows[ok & ~np.isfinite(rows["prediction"].to_numpy(np.float64))]
        if len(wrong):
            raise RunError(
                f"After epoch {self.at.epoch + 1} the model gives no finite prediction for {len(wrong)} of {len(rows)} "
                f"pictures ({', '.join(wrong['image_id'].head(3))}{' ...' if len(wrong) > 3 else ''}). Lower train.lr, "
                "or set train.precision=fp32; what was saved before is sound."
            )
        known = sum(part.known for part in found)
        loss = sum(part.loss_sum for part in found) / known if known else float("nan")
        return rows[ok].sort_values(["patient_id", "image_id"]), loss, int((~ok).sum())

    def _told(self, batches: Iterable[Batch], advance: Callable[[Progress], None]) -> Iterator[Batch]:
        """The batches of a validation, each told to the screen when the next one is asked for; the way out is here too,
        for a run that is resumed with all of an epoch's batches used begins with its validation."""
        done, total = 0, len(self.held_out)
        of_all = total // self.place.size // self.config.data.loader.val_batch_size  # batches that every process has
        for number, batch in enumerate(batches):
            if number < of_all and self.stop.agreed(self.place)[0]:
                self._leave()
            yield batch
            done = min(done + len(batch["index"]) * self.place.size, total)
            advance(Progress(done, total))

    def _keep_best(self, predictions: pd.DataFrame, record: dict[str, Any]) -> None:
        table = predictions[[column for column in run_files.VALIDATION_COLUMNS if column in predictions]]
        run_files.write_table(self.folder / runs.VALIDATION, table)
        runs.save_best(self.folder, self.parts.judged, {"fold": self.fold, **record})

    def _begin(self, saved: tuple[dict[str, Any], dict[str, Any]] | None, weights: str) -> None:
        """Take up a checkpoint, or make the folder."""
        if saved is not None:
            state, described = saved
            self.best, self.spent = restore(state, self.parts, self.at, global_batch=self._global_batch())
            log.info("Continuing %s at epoch %d, batch %d.", self.folder, self.at.epoch + 1, self.at.batch)
            if self.place.is_main:
                run_files.drop_records_after(self.folder / runs.RECORDS, described["epoch"], described["step"])
        elif self.place.is_main:
            of_run = self.config, self.store, self.fold, self.training
            environment = describe(*of_run, self.device, self.place, self.command, weights)
            (self.folder / runs.RECORDS).unlink(missing_ok=True)
            runs.begin(self.folder, self.config, environment)
        self.place.barrier()

    def _save(self) -> None:
        """Write a checkpoint; every process calls it, and the first one writes."""
        self.saved_at = time.monotonic()
        at = self.at
        loss_sum = self.place.sum(at.loss_sum) / self.place.size
        if not self.place.is_main:
            return
        seconds = self.spent + time.monotonic() - self.started
        state = captured(
            self.parts, at, self.best, loss_sum=loss_sum, global_batch=self._global_batch(), seconds=seconds
        )
        described = {
            "epoch": at.epoch,
            "batch": at.batch,
            "step": at.step,
            "store_fingerprint": self.store.fingerprint,
            "best": run_files.plain(asdict(self.best)),
            "config": self.config.model_dump(mode="json"),
        }
        checkpoint.save(self.folder / runs.CHECKPOINTS, state, described, self.config.train.keep_checkpoints)

    def _leave(self) -> None:
        self._save()
        self.place.barrier()  # torchrun ends every process as soon as one has gone
        if self.place.is_main:
            log.warning(
                "Stopped by %s; everything is saved. `train` goes on with --resume, `run` as it is.", self.stop.name
            )
        raise SystemExit(self.stop.status)

    def _finish(self, stopped_early: bool) -> FitSummary:
        summary = FitSummary(
            fold=self.fold,
            folder=str(self.folder),
            epochs=self.at.epoch,
            best_epoch=self.best.epoch,
            metric=self.config.train.metric,
            value=self.best.value,
            seconds=self.spent + time.monotonic() - self.started,
            stopped_early=stopped_early and self.at.epoch < self.config.train.epochs,
        )
        if self.place.is_main:
            run_files.write_json(self.folder / runs.SUMMARY, asdict(summary))
            log.info(self.monitor.outcome())
        return summary

    def _lr(self) -> float:
        return float(self.parts.optimizer.param_groups[0]["lr"])


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU so far, or what this process now has in RAM."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def _is_better(value: float, best: float, metric: str) -> bool:
    """Whether a metric's value beats the best so far; any number beats none, so that a first epoch is always kept."""
    if np.isnan(best):
        return True
    return value < best if metric in metrics.LOWER_IS_BETTER else value > best
