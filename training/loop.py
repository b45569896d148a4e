"""The loop itself: one epoch of training, one pass of validation. Everything around it is in session.py.

Shapes: B samples of a batch, C channels, H x W pixels.
Nothing between two steps waits for the device: losses are added up there and read where they are written down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from preprocessing.errors import RunError
from training.losses import Loss
from training.model import MammoModel
from training.timing import timed

Batch = dict[str, Tensor]


@dataclass
class Parts:
    """What a step needs. `module` is `model`'s `EveryHead`, compiled and wrapped as the settings say."""

    model: MammoModel
    module: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    device: torch.device
    precision: torch.dtype
    grad_clip: float = 0.0
    accumulate: int = 1
    channels_last: bool = False
    graphs: bool = False  # CUDA graphs of the compiled module
    seed: int = 0
    rank: int = 0
    image_ids: Sequence[str] = ()  # of the training rows, for messages

    @property
    def judged(self) -> MammoModel:
        """The model that is validated, kept and published: the moving average where there is one."""
        return self.ema.module if self.ema is not None else self.model

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, where the settings ask for it."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def to_device(self, batch: Batch) -> Batch:
        """The batch on the training device, its pictures in the model's memory format."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        moved["image"] = moved["image"].contiguous(memory_format=layout)
        return moved


@dataclass
class Position:
    """Where training stands: what a checkpoint must know to go on with the very next batch."""

    epoch: int = 0
    batch: int = 0  # of this epoch, already used
    batches: int = 0  # of every epoch
    step: int = 0  # optimiser steps since the start
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros(()))  # over this epoch's batches, on the device

    def scheduled(self, accumulate: int) -> int:
        """Where the learning rate's schedule stands: the steps that batches of this size would have taken so far. Other
        than `step` it may fall, when a run goes on with larger batches on more processes."""
        return self.epoch * -(-self.batches // accumulate) + -(-self.batch // accumulate)


def train_epoch(
    parts: Parts,
    batches: Iterable[Batch],
    at: Position,
    monitor: Any,
    after_step: Callable[[Position, FiniteGuard], None],
) -> None:
    """Train on the rest of an epoch.

    Args:
        parts: model, loss, optimiser and the rest; changed in place.
        batches: the epoch's batches from `at.batch` on: `image` [B, C, H, W], `label`, `index` and `ok` [B].
        at: moved on in place, batch by batch.
        monitor: times data, transfer and compute.
        after_step: called after each optimiser step: logs, saves (after the guard has been asked), stops.

    Raises:
        RunError: a loss or its gradient was not finite; names the batch.
    """
    parts.module.train()
    guard = FiniteGuard(parts.device, parts.image_ids)
    for batch in timed(batches, monitor, "data"):
        with monitor.time("transfer"):
            batch = parts.to_device(batch)  # noqa: PLW2901 - the host's copy is not wanted any more
        first_of_window = at.batch - at.batch % parts.accumulate
        window = min(parts.accumulate, at.batches - first_of_window)  # the epoch's last window may be shorter
        ends_window = at.batch + 1 == first_of_window + window

        with monitor.time("compute"):
            # Dropout and stochastic depth follow from the position alone, so a resumed run draws what it would have.
            torch.manual_seed(step_seed(parts.seed, at.epoch, at.batch, parts.rank))
            if parts.graphs:
                torch.compiler.cudagraph_mark_step_begin()  # the last batch's outputs are done with
            with _without_exchange(parts.module, unless=ends_window):
                with parts.autocast():
                    outputs = parts.module(batch["image"])
                loss = parts.loss(outputs, batch)
                parts.scaler.scale(loss / window).backward()
            guard.watch(loss, batch["index"], at)
            at.loss_sum += loss.detach()
            at.batch += 1
            if not ends_window:
                continue

            parts.scaler.unscale_(parts.optimizer)
            trained = [parameter for parameter in parts.model.parameters() if parameter.grad is not None]
            norm = nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in trained])
            if not parts.scaler.is_enabled():  # which passes over such steps itself
                guard.watch_gradient(norm)
            if parts.grad_clip:
                nn.utils.clip_grads_with_norm_(trained, parts.grad_clip, norm)
            parts.scaler.step(parts.optimizer)
            parts.scaler.update()
            parts.optimizer.zero_grad(set_to_none=True)
            at.step += 1
            parts.scheduler.step_update(at.scheduled(parts.accumulate))
            if parts.ema is not None:
                parts.ema.update(parts.model, step=at.step)
        if guard.is_due():
            guard.check()
            _require_scale(parts.scaler)
        after_step(at, guard)
    guard.check()
    _require_scale(parts.scaler)


@dataclass
class Validation:
    """Predictions of one process: `index` int64 [n], `prediction` float32 [n], `ok` bool [n]; `loss` summed over n."""

    index: np.ndarray
    prediction: np.ndarray
    ok: np.ndarray
    loss_sum: float
    known: int


@torch.inference_mode()
def validate(parts: Parts, batches: Iterable[Batch], monitor: Any, rows: int) -> Validation:
    """Predict every batch with the judged model, which is left in evaluation mode.

    Args:
        parts: as in training; nothing is changed.
        batches: `image` [B, C, H, W], `label`, `index` and `ok` [B].
        monitor: times data, transfer and compute.
        rows: how many samples the batches have together at most.
    """
    model = parts.judged
    model.eval()
    # Filled in place: kept one by one, small tensors would lie between the batches' freed memory and break it up.
    kinds = torch.int64, torch.float32, torch.bool
    found = [torch.empty(rows, dtype=kind, device=parts.device) for kind in kinds]
    done = 0
    loss_sum, known = torch.zeros((), device=parts.device), torch.zeros((), device=parts.device)
    for batch in timed(batches, monitor, "data"):
        with monitor.time("transfer"):
            batch = parts.to_device(batch)  # noqa: PLW2901
        with monitor.time("compute"):
            with parts.autocast():
                logits = model(batch["image"])
            usable = batch["ok"] & ~torch.isnan(batch["label"])
            losses = parts.loss.per_sample(logits, batch["label"].nan_to_num())
            loss_sum += torch.where(usable, losses, torch.zeros_like(losses)).sum()
            known += usable.sum()
            for column, values in zip(found, (batch["index"], torch.sigmoid(logits), batch["ok"]), strict=True):
                column[done : done + len(values)] = values
            done += len(logits)
    index, prediction, ok = (column[:done].cpu().numpy() for column in found)
    return Validation(index, prediction, ok, float(loss_sum), int(known))


class FiniteGuard:
    """Notices a loss or a gradient that is not finite without waiting for the device at each step.

    The first bad batch is remembered on the device; every `interval` steps, and before anything is saved, it is asked.
    """

    def __init__(self, device: torch.device, image_ids: Sequence[str] = (), interval: int = 20) -> None:
        self._image_ids = image_ids
        self._first = torch.full((), -1, dtype=torch.int64, device=device)
        self._watched: list[tuple[int, int, Tensor]] = []
        self._interval = interval

    def watch(self, loss: Tensor, index: Tensor, at: Position) -> None:
        """Take note of a batch's loss (scalar) and of its samples [B]."""
        self._watched.append((at.epoch, at.batch, index))
        self._note(loss.detach())

    def watch_gradient(self, norm: Tensor) -> None:
        """Take note of the norm (scalar) of a window's gradient, whose last batch was watched last."""
        self._note(norm)

    def _note(self, value: Tensor) -> None:
        here = torch.full_like(self._first, len(self._watched) - 1)
        self._first = torch.where((self._first < 0) & ~torch.isfinite(value), here, self._first)

    def is_due(self) -> bool:
        """Whether `interval` batches have gone by unchecked."""
        return len(self._watched) >= self._interval

    def check(self) -> None:
        """Raise a `RunError` that names the first batch whose loss or gradient was not finite."""
        first = int(self._first)
        if first >= 0:
            epoch, batch, index = self._watched[first]
            rows = [int(row) for row in index]
            names = ", ".join(self._image_ids[row] if self._image_ids else f"row {row}" for row in rows)
            raise RunError(
                f"The loss or its gradient was not finite in epoch {epoch + 1}, batch {batch + 1} (images {names}). "
                "Lower train.lr, set train.precision=fp32, or look at those images; what was saved before is sound."
            )
        self._watched.clear()


def step_seed(seed: int, epoch: int, batch: int, rank: int) -> int:
    """A seed for torch's generators that follows from the position alone."""
    return int(np.random.SeedSequence((seed, epoch, batch, rank)).generate_state(1, np.uint64)[0] >> 1)


def _require_scale(scaler: torch.amp.GradScaler) -> None:
    """Scaling passes over steps whose gradients are not finite and halves its factor each time: see that some are.

    The factor begins at 65536; below 1 it would not be overflow that it mends.
    """
    if scaler.is_enabled() and scaler.get_scale() < 1:
        raise RunError(
            "train.precision = fp16: the gradients of too many steps were not finite, even unscaled ones. "
            "Set train.precision=bf16 or fp32, or lower train.lr; what was saved before is sound."
        )


def _without_exchange(module: nn.Module, unless: bool) -> AbstractContextManager[Any]:
    """Keep gradients to this process while they add up; they are averaged with the last batch of a window."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not unless else nullcontext()
