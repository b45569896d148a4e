"""From settings to the parts of the loop: model, optimiser, schedule, loss, the loader and the monitor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from timm.layers.norm_act import convert_sync_batchnorm
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from preprocessing.errors import ConfigError
from preprocessing.manifest import Store
from training.config import Config, TrainSettings
from training.cpu import prepare_cpu
from training.device import pick_precision
from training.distributed import World
from training.loop import Parts
from training.losses import aux_targets, build_loss
from training.model import EveryHead, build_model, require_sizes
from training.resizing import training_pipeline
from training.weights import load_pretrained


def build_parts(
    config: Config,
    device: torch.device,
    world: World,
    rows: pd.DataFrame,
    drawn: dict[str, int],
    *,
    batches: int,
    seed: int,
    pretrained: bool = True,
) -> tuple[Parts, str]:
    """Everything that a training step needs.

    Args:
        config: the whole tree.
        device: where training runs.
        world: the processes that train together.
        rows: the training pictures, for the auxiliary heads' classes.
        drawn: samples of each class an epoch, for balanced class weights.
        batches: batches of an epoch, for the schedule.
        seed: of the heads' random weights, and of dropout.
        pretrained: load the first weights; not wanted where a checkpoint follows.

    Returns:
        The parts, and where the backbone's weights came from.

    Raises:
        ConfigError: the backbone cannot take pictures of such a size, or would be frozen with random weights.
    """
    train = config.train
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    else:
        prepare_cpu()
    torch.manual_seed(seed)
    model = build_model(config.model, config.pipeline.channels)
    # DistributedDataParallel hands the first process's weights to the others, so one download is enough.
    weights = load_pretrained(model, config.model, config.pipeline.channels) if pretrained and world.is_main else ""
    if weights.startswith("none") and config.model.freeze_stages:
        raise ConfigError(
            f"model.freeze_stages = {config.model.freeze_stages} would keep random weights, as there are no pretrained "
            "ones (see model.weights); set it to 0."
        )
    if world.size > 1 and device.type == "cuda" and train.sync_batchnorm:
        model.backbone = convert_sync_batchnorm(model.backbone)
    layout = torch.channels_last if config.model.channels_last else torch.contiguous_format
    model = model.to(device).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    require_sizes(model, config.pipeline.channels, _sizes(config))
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = train.cudnn_benchmark  # every batch has one shape
    module: nn.Module = EveryHead(model)
    if config.model.compile:
        # Training pictures have one size, with progressive resizing one after another: each is compiled by itself. For
        # sizes left open, torch's way from the second one on, it was not done after nine minutes of processor time.
        module.compile(
            dynamic=False, mode=None if config.model.compile_mode == "default" else config.model.compile_mode
        )
    if world.size > 1:
        module = DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)
    precision = pick_precision(train.precision, device)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=train.lr,
        weight_decay=train.weight_decay,
        fused=device.type == "cuda",
    )
    parts = Parts(
        model=model,
        module=module,
        loss=build_loss(train, config.model, drawn, aux_targets(rows, config.model.aux, device), world),
        optimizer=optimizer,
        scheduler=build_schedule(optimizer, train, batches),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
        # The warm-up, decay 1 - (1 + step)^(-2/3) at first, lets a short run's average forget the random head.
        ema=MovingAverage(model, decay=train.ema_decay, use_warmup=True) if train.ema_decay else None,
        device=device,
        precision=precision,
        grad_clip=train.grad_clip,
        accumulate=train.accumulate,
        channels_last=config.model.channels_last,
        graphs=config.model.compile_mode != "default",
        seed=config.data.seed,
        rank=world.rank,
        image_ids=rows["image_id"].tolist(),
    )
    return parts, weights


class MovingAverage(ModelEmaV3):
    """timm's moving average of a model, of always the same one, whose tensors it looks up once: to walk through two
    EfficientNet-B3 takes the host 2.5 ms a step, in which it launches nothing, and each step counter a copy."""

    _pairs: list[tuple[list[Tensor], list[Tensor]]] | None = (
        None  # (the average's, the model's): numbers, then counters
    )

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Move every tensor by 1 - decay towards the model's, but integers, which are copied."""
        if self._pairs is None:
            both = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
            kinds = [[pair for pair in both if pair[0].is_floating_point() is kind] for kind in (True, False)]
            self._pairs = [([own for own, _ in pairs], [theirs for _, theirs in pairs]) for pairs in kinds]
        (average, trained), counters = self._pairs
        torch._foreach_lerp_(average, trained, weight=1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        if counters[0]:
            torch._foreach_copy_(*counters)  # pyright: ignore[reportPrivateImportUsage]


def _sizes(config: Config) -> set[tuple[int, int]]:
    """Height and width of every picture that training and validation use."""
    pipelines = [config.pipeline, *(training_pipeline(config, epoch) for epoch in range(config.train.epochs))]
    return {(pipeline.height, pipeline.width) for pipeline in pipelines}


def build_schedule(optimizer: torch.optim.Optimizer, train: TrainSettings, batches: int) -> CosineLRScheduler:
    """Linear warm-up, then cosine annealing (Loshchilov & Hutter 2017, equation 5) to min_lr at the last step."""
    steps = -(-batches // train.accumulate)  # an epoch's
    warmup = min(round(train.warmup_epochs * steps), train.epochs * steps - 1)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(2, train.epochs * steps - warmup),  # timm warns of a cosine of a single step
        lr_min=min(train.min_lr, train.lr),
        warmup_t=warmup,
        warmup_lr_init=train.lr / max(warmup, 1) if warmup else train.lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def open_loader(
    store: Store, rows: pd.DataFrame, config: Config, *, train: bool, device: torch.device, place: World
) -> Any:
    """The Loader of a set of rows, for this process."""
    from dali_pipes.loader import Loader

    return Loader(
        store,
        rows,
        config.pipeline,
        config.data.loader,
        seed=config.data.seed,
        train=train,
        device=str(device),
        rank=place.rank,
        world_size=place.size,
    )


def open_monitor(folder: Path, config: Config, place: World, step: int = 0) -> Any:
    """The monitor of this process; only the first one writes. `step` is where a run goes on, 0 for a new one."""
    from training.monitor import TrainingMonitor
    from training.trackers import open_trackers

    if not place.is_main:
        return TrainingMonitor(None, config.monitor, [])
    return TrainingMonitor(folder, config.monitor, open_trackers(folder, config, step), step=step)
