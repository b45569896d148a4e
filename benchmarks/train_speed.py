"""Training's speed with the real loader against tensors that already lie on the device.

    python benchmarks/train_speed.py [--store STORE] [--model A,B] [--size N,M] [--precision fp32,bf16] [--json FILE]

Both run through the training loop itself, in turns (so that other load on the machine meets both), and medians are
shown. "share" is the loader's rate over the tensors': 1 means that training never waits. Without a store, a synthetic
one is made.
"""

from __future__ import annotations

import itertools
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import psutil
import torch
from kept import Figures

from dali_pipes.loader import Loader
from preprocessing.convert import convert
from preprocessing.manifest import Store, open_store
from preprocessing.settings import ConvertSettings
from preprocessing.synth import synthesize
from training.build import build_parts
from training.config import Config, MonitorSettings, load_config
from training.console import Console
from training.device import pick_device
from training.distributed import World
from training.failures import training_advice
from training.loop import Batch, Parts, Position, train_epoch
from training.monitor import TrainingMonitor

WATCH = MonitorSettings(interval_s=0.25)


@dataclass(frozen=True)
class Case:
    """One setting to measure."""

    model: str
    size: int
    precision: str
    compile: bool
    channels_last: bool

    def config(self, batch: int, device: str, more: tuple[str, ...]) -> Config:
        """The whole tree with this case's values."""
        return load_config(
            None,
            (
                f"model.backbone={self.model}",
                "model.weights=none",
                f"pipeline.height={self.size}",
                f"pipeline.width={self.size}",
                f"train.precision={self.precision}",
                f"model.compile={self.compile}",
                f"model.channels_last={self.channels_last}",
                f"data.loader.batch_size={batch}",
                "data.loader.epoch_samples=65536",  # nothing is prepared across the end of an epoch
                f"train.device={device}",
                *more,
            ),
        )


def measure(
    store: Store, case: Case, config: Config, steps: int, repeats: int, kept: Callable[..., None]
) -> dict[str, Any]:
    """One row: images/s from tensors and from the loader, the share of one over the other, waiting, peak memory.

    `kept` is told the seconds of each repeat.
    """
    device = pick_device(config.train.device)
    rows = store.manifest[store.manifest["cancer"].notna()].reset_index(drop=True)
    batch_size = config.data.loader.batch_size
    parts, _ = build_parts(
        config, device, World(), rows, {"negative": 1, "positive": 1}, batches=steps, seed=0, pretrained=False
    )
    with (
        Loader(store, rows, config.pipeline, config.data.loader, seed=0, train=True, device=str(device)) as loader,
        TrainingMonitor(None, MonitorSettings()) as monitor,
    ):
        stream = _endless(loader)
        fixed = {name: tensor.clone() for name, tensor in next(stream).items()}
        sources = itertools.repeat(fixed), stream  # compile, choose kernels, fill caches
        first_steps = [_timed(parts, itertools.islice(source, 2), 2, monitor) for source in sources]
        kept(first_steps_s=first_steps)
        tensors, loaded, waited, busy = [], [], [], []
        for _ in range(repeats):
            tensors.append(_timed(parts, itertools.repeat(fixed, steps), steps, monitor))
            before = loader.wait_s
            with TrainingMonitor(None, WATCH) as watch:
                loaded.append(_timed(parts, itertools.islice(stream, steps), steps, monitor))
            busy.append(watch.summary().get("gpu0.utilisation_mean", math.nan))
            waited.append((loader.wait_s - before) / loaded[-1])
            kept(images=steps * batch_size, tensors_s=tensors, loader_s=loaded, gpu_utilisation=busy)
        advice = monitor.summary()["advice"]
    tensor_rate, loader_rate = (steps * batch_size / statistics.median(seconds) for seconds in (tensors, loaded))
    return {
        "name": f"{case.model} {case.size} {case.precision}"
        + (" compiled" if case.compile else "")
        + ("" if case.channels_last else " channels-first"),
        "images_per_s": loader_rate,
        "tensor_images_per_s": tensor_rate,
        "share": statistics.median(t / s for t, s in zip(tensors, loaded, strict=True)),
        "wait_share": statistics.median(waited),
        "gpu_utilisation": statistics.median(busy),
        "peak_memory_mb": _peak(device) / 2**20,
        "batch_size": batch_size,
        "first_steps_s": first_steps,
        "advice": advice,
    }


def _timed(parts: Parts, batches: Iterable[Batch], steps: int, monitor: Any) -> float:
    at = Position(batches=steps, loss_sum=torch.zeros((), device=parts.device))
    start = time.perf_counter()
    train_epoch(parts, batches, at, monitor, lambda at, guard: None)
    float(at.loss_sum)  # waits for the device
    return time.perf_counter() - start


def _endless(loader: Loader) -> Iterator[Batch]:
    for epoch in itertools.count():
        yield from loader.epoch(epoch)


def _peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def machine(device: torch.device) -> dict[str, Any]:
    """Where it was measured."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def make_store(folder: Path, patients: int, level: int) -> Store:
    """A synthetic store with one small level and the full one."""
    synthesize(folder / "data", patients=patients)
    convert(
        folder / "data" / "train_images",
        folder / "data" / "train.csv",
        folder / "store",
        ConvertSettings(levels=("full", str(level))),
    )
    return open_store(folder / "store")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


@click.command()
@click.option("--store", type=click.Path(path_type=Path), default=None, help="A store; without it one is made.")
@click.option("--model", "models", default="tf_efficientnet_lite0", show_default=True, help="Models, with commas.")
@click.option("--size", "sizes", default="320", show_default=True, help="Sizes in pixels, with commas.")
@click.option("--precision", default="auto", show_default=True, help="fp32, bf16, fp16 or auto, with commas.")
@click.option("--compile", "compiled", is_flag=True, help="Measure torch.compile too.")
@click.option("--channels-first", is_flag=True, help="Measure the channels-first layout too.")
@click.option("--batch-size", type=int, default=8, show_default=True)
@click.option("--steps", type=int, default=6, show_default=True, help="Steps a repeat.")
@click.option("--repeats", type=int, default=3, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--set", "more", multiple=True, metavar="A.B=C", help="Override one setting; repeatable.")
@click.option("--json", "out", type=click.Path(path_type=Path), default=None, help="Write everything to this file.")
def main(
    store: Path | None,
    models: str,
    sizes: str,
    precision: str,
    compiled: bool,
    channels_first: bool,
    batch_size: int,
    steps: int,
    repeats: int,
    device: str,
    more: tuple[str, ...],
    out: Path | None,
) -> None:
    """Measure and print a table."""
    cases = [
        Case(model, int(size), kind, use_compile, layout)
        for model, size, kind in itertools.product(_split(models), _split(sizes), _split(precision))
        for use_compile in ([False, True] if compiled else [False])
        for layout in ([True, False] if channels_first else [True])
    ]
    device = "auto" if device == "gpu" else device
    rows, kept = [], Figures(out)
    with tempfile.TemporaryDirectory() as folder, Console(quiet=True) as console:
        opened = open_store(store) if store else make_store(Path(folder), 12, max(512, *map(int, _split(sizes))))
        for case in cases:
            config = case.config(batch_size, device, more)
            with training_advice(config):
                so_far = partial(kept.so_far, rows=rows, case=str(case))
                rows.append(measure(opened, case, config, steps, repeats, so_far))
        console.table("Training speed", [_shown(row) for row in rows])
    where = machine(pick_device(device))
    ratios = {f"loader_over_tensors {row['name']}": row["share"] for row in rows}
    kept.final({"machine": where, "rows": rows, "ratios": ratios})


def _shown(row: dict[str, Any]) -> dict[str, str]:
    return {
        "case": row["name"],
        "images/s": f"{row['images_per_s']:.1f}",
        "from tensors": f"{row['tensor_images_per_s']:.1f}",
        "share": f"{row['share']:.1%}",
        "waiting": f"{row['wait_share']:.1%}",
        "first steps, s": f"{sum(row['first_steps_s']):.1f}",
        "GPU busy": "" if math.isnan(row["gpu_utilisation"]) else f"{row['gpu_utilisation']:.0f} %",
        "memory, MiB": f"{row['peak_memory_mb']:.0f}",
    }


if __name__ == "__main__":
    main()
