"""What a checkpoint holds of a fold in training, and how training takes it up again."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from training.loop import Parts, Position

log = logging.getLogger(__name__)


@dataclass
class Best:
    """The best epoch so far, and how many epochs have gone by without a better one."""

    value: float = float("nan")
    epoch: int = -1
    stale: int = 0


def captured(
    parts: Parts, at: Position, best: Best, *, loss_sum: Tensor, global_batch: int, seconds: float
) -> dict[str, Any]:
    """Everything that going on takes.

    Args:
        parts: whose tensors are named, not copied.
        at: where training stands.
        best: the best epoch so far.
        loss_sum: `at.loss_sum` over all processes, in the mean.
        global_batch: samples of a batch, over all processes.
        seconds: of training so far.
    """
    return {
        "model": parts.model.state_dict(),
        "ema": parts.ema.module.state_dict() if parts.ema is not None else None,
        "optimizer": parts.optimizer.state_dict(),
        "scaler": parts.scaler.state_dict(),
        "position": {
            "epoch": at.epoch,
            "batch": at.batch,
            "batches": at.batches,
            "global_batch": global_batch,
            "step": at.step,
            "loss_sum": loss_sum.detach().cpu(),
        },
        "best": asdict(best),
        "seconds": seconds,
    }


def restore(state: dict[str, Any], parts: Parts, at: Position, *, global_batch: int) -> tuple[Best, float]:
    """Take up what `captured` gave: `parts` and `at` are changed in place.

    Returns:
        The best epoch so far, and the seconds of training before.
    """
    position = state["position"]
    parts.model.load_state_dict(state["model"])
    if parts.ema is not None:
        parts.ema.module.load_state_dict(state["ema"])
    parts.optimizer.load_state_dict(state["optimizer"])
    parts.scaler.load_state_dict(state["scaler"])
    at.epoch, at.batch, at.step = position["epoch"], position["batch"], position["step"]
    at.loss_sum.copy_(position["loss_sum"])
    if position["global_batch"] != global_batch:
        _rescale(at, position, global_batch, parts.accumulate)
    # The schedule follows from the position; its own state would bring the length of the old batches along.
    parts.scheduler.step_update(at.scheduled(parts.accumulate))
    return Best(**state["best"]), state["seconds"]


def _rescale(at: Position, position: dict[str, Any], global_batch: int, accumulate: int) -> None:
    """Another number of processes makes another global batch: go on at the same sample."""
    samples = position["batch"] * position["global_batch"]
    at.batch = min(samples // global_batch, at.batches)
    if at.batch < at.batches:
        at.batch -= at.batch % accumulate
    at.loss_sum *= at.batch / max(position["batch"], 1)
    log.warning(
        "The global batch is %d instead of %d: continuing after %d of the epoch's samples.",
        *(global_batch, position["global_batch"], at.batch * global_batch),
    )
