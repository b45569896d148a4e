"""What a model costs, stage by stage: parameters, floating-point operations, memory of activations, time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from training.config import Config
from training.device import pick_device
from training.model import MammoModel, build_model, require_sizes


@dataclass(frozen=True)
class Stage:
    """One stage's cost for a batch's forward pass: FLOPs, bytes of what it puts out, seconds."""

    name: str
    parameters: int
    flops: int
    output_bytes: int
    seconds: float


def analyse(model: MammoModel, images: Tensor, repeats: int = 3) -> list[Stage]:
    """Cost of each stage on a batch, and of the whole as the last one, "total".

    Stages are the backbone's own parts (stem, blocks or stages, head convolution ...), the pooling and the heads. A
    multiplication and an addition count as two operations, as `torch.utils.flop_counter` has it.

    Args:
        model: taken as it is, in evaluation mode meanwhile.
        images: [B, C, H, W], on the model's device.
        repeats: the fastest counts.
    """
    training = model.training
    model.eval()
    stages = dict(_stages(model))
    counter = FlopCounterMode(display=False)
    with torch.enable_grad(), counter:  # without gradients it fails on some models, such as CaiT
        model(images)
    with torch.inference_mode():
        flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
        best: dict[str, tuple[float, int]] = {}
        for _ in range(repeats):
            for name, (seconds, size) in _time(model, stages, images).items():
                best[name] = min(best.get(name, (seconds, size)), (seconds, size))
    model.train(training)
    whole = type(model).__name__
    found = [
        Stage(name, _parameters(stage), int(flops.get(f"{whole}.{name}", 0)), best[name][1], best[name][0])
        for name, stage in stages.items()
        if name in best
    ]
    seconds, size = best["total"]
    return [*found, Stage("total", _parameters(model), int(flops["Global"]), size, seconds)]


def analyse_config(config: Config, device: str = "auto") -> list[Stage]:
    """`analyse` of the model that a configuration describes, with random weights, on one picture of its size.

    Raises:
        ConfigError: there is no such model, or it cannot take pictures of that size; or a GPU is asked for that is not
            there.
    """
    place = pick_device(device)
    pipeline = config.pipeline
    model = build_model(config.model, pipeline.channels).to(place)
    require_sizes(model, pipeline.channels, {(pipeline.height, pipeline.width)})
    return analyse(model, torch.randn(1, pipeline.channels, pipeline.height, pipeline.width, device=place))


def as_rows(stages: list[Stage]) -> list[dict[str, Any]]:
    """For a table on the screen: millions of parameters, gigaFLOPs, MiB and milliseconds."""
    return [
        {
            "stage": stage.name,
            "parameters, M": round(stage.parameters / 1e6, 3),
            "GFLOPs": round(stage.flops / 1e9, 3),
            "output, MiB": round(stage.output_bytes / 2**20, 2),
            "forward, ms": round(1000 * stage.seconds, 2),
        }
        for stage in stages
    ]


def _stages(model: MammoModel) -> Iterator[tuple[str, nn.Module]]:
    for name, part in model.backbone.named_children():
        if isinstance(part, (nn.Sequential, nn.ModuleList)) and len(part) > 1:
            for number, block in part.named_children():
                yield f"backbone.{name}.{number}", block
        else:
            yield f"backbone.{name}", part
    yield "pool", model.pool
    yield "head", model.head
    for name, head in model.aux.items():
        yield f"aux.{name}", head


def _time(model: MammoModel, stages: dict[str, nn.Module], images: Tensor) -> dict[str, tuple[float, int]]:
    """Seconds and output bytes of each stage that ran, in one forward pass; each one waits for the device."""
    began: dict[str, float] = {}
    found: dict[str, tuple[float, int]] = {}

    def now() -> float:
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter()

    def before(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            began[name] = now()

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name] = (now() - began[name], _bytes(output))

        return hook

    handles = []
    for name, stage in stages.items():
        handles += [stage.register_forward_pre_hook(before(name)), stage.register_forward_hook(after(name))]
    try:
        start = now()
        output = model(images)
        found["total"] = (now() - start, _bytes(output))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _bytes(output: Any) -> int:
    if isinstance(output, Tensor):
        return output.numel() * output.element_size()
    return sum(_bytes(part) for part in output) if isinstance(output, (tuple, list)) else 0


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
