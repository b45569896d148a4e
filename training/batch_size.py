"""How many samples fit in memory, found before training."""

from __future__ import annotations

import gc
import logging

import torch
from torch.autograd.graph import saved_tensors_hooks

from preprocessing.errors import RunError
from preprocessing.machine import available_memory, processes_here
from training.config import Config
from training.device import pick_precision
from training.distributed import World
from training.model import EveryHead, MammoModel, build_model, require_sizes

log = logging.getLogger(__name__)

# Shares of the memory that a batch may take: on a GPU fragmentation and the loader's pool need the rest, on a CPU the
# loader, the page cache and other programs.
GPU_SHARE, CPU_SHARE = 0.85, 0.5
LARGEST = 512


def find_batch_size(config: Config, device: torch.device, samples: int, world: World | None = None) -> int:
    """The largest power of two that fits as a training batch of one process.

    On a GPU, steps on made-up pictures of doubling batches are really taken, until one runs out of memory or of its
    share. On a CPU, where running out ends the process, the activations of a sample are counted instead.

    Args:
        config: model, size, precision and checkpointing matter.
        device: where training will run.
        samples: training pictures of this process; at least eight steps an epoch are left.
        world: all processes take the smallest one's answer.

    Raises:
        RunError: not even one sample fits.
        ConfigError: the backbone does not take pictures of that size.
    """
    ceiling = max(1, min(LARGEST, samples // 8))
    found = _try_on_gpu(config, device, ceiling) if device.type == "cuda" else _count_on_cpu(config, ceiling)
    found = min((world or World()).gather(found))
    if found < 1:
        raise RunError(
            f"Not even one {config.pipeline.height} x {config.pipeline.width} picture fits in memory with "
            f"{config.model.backbone}; lower pipeline.height and width, or set model.gradient_checkpointing=true."
        )
    log.info("Batches of %d samples fit (train.auto_batch).", found)
    return found


def _model(config: Config, device: torch.device) -> MammoModel:
    model = build_model(config.model, config.pipeline.channels).to(device)
    require_sizes(model, config.pipeline.channels, [(config.pipeline.height, config.pipeline.width)])
    return model


def _step(module: torch.nn.Module, config: Config, device: torch.device, batch: int) -> None:
    module.train(batch > 1)  # batch statistics of a single value do not exist
    precision = pick_precision(config.train.precision, device)
    size = (batch, config.pipeline.channels, config.pipeline.height, config.pipeline.width)
    layout = torch.channels_last if config.model.channels_last else torch.contiguous_format
    images = torch.randn(size, device=device).contiguous(memory_format=layout)
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        outputs = module(images)
    heads = [outputs["cancer"].sum(), *(outputs[name].sum() for name in config.model.aux)]
    torch.stack(heads).sum().backward()


def _try_on_gpu(config: Config, device: torch.device, ceiling: int) -> int:
    try:
        module = EveryHead(_model(config, device))
    except torch.OutOfMemoryError:
        return 0
    # AdamW keeps two values a parameter; the moving average one more.
    extra = (3 if config.train.ema_decay else 2) * sum(p.numel() * p.element_size() for p in module.parameters())
    free, _ = torch.cuda.mem_get_info(device)
    limit = GPU_SHARE * (free + torch.cuda.memory_reserved(device)) - extra
    found, batch = 0, 1
    try:
        while batch <= ceiling:
            torch.cuda.reset_peak_memory_stats(device)
            _step(module, config, device, batch)
            if torch.cuda.max_memory_reserved(device) > limit:
                break
            found, batch = batch, 2 * batch
            module.zero_grad(set_to_none=True)
    except torch.OutOfMemoryError:
        pass
    finally:
        del module
        gc.collect()
        torch.cuda.empty_cache()
    return found


def _count_on_cpu(config: Config, ceiling: int) -> int:
    module = EveryHead(_model(config, torch.device("cpu")))
    parameters = sum(p.numel() * p.element_size() for p in module.parameters())
    owned = {p.untyped_storage().data_ptr() for p in module.parameters()}
    seen: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:  # the weights are kept anyway
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        _step(module, config, torch.device("cpu"), 2)
    # Of two samples, and twice over: gradients of activations live beside them on the way back.
    per_sample = sum(seen.values())
    budget = CPU_SHARE * available_memory().free / processes_here() - 5 * parameters
    fitting = int(min(ceiling, budget // per_sample))
    return 1 << (fitting.bit_length() - 1) if fitting > 0 else 0
