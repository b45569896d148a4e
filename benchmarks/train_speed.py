"""Training's speed with the real loader against tensors that already lie on the device.

    python benchmarks/train_speed.py [--store STORE] [--model A,B] [--size N,M] [--precision fp32,bf16] [--json FILE]
    python benchmarks/train_speed.py --vary data.loader.batch_size=32,128 --vary train.cudnn_benchmark=true,false

Both run through the training loop itself, in turns (so that other load on the machine meets both), and medians are
shown. "share" is the loader's rate over the tensors': 1 means that training never waits. Without a store, a synthetic
one is made.
"""

from __future__ import annotations

import itertools
import math
import platform
import re
import statistics
import sys
import tempfile
import time
import traceback
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
from preprocessing.machine import available_cores
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
    varied: tuple[str, ...]  # `a.b=c` each

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return " ".join([self.model, str(self.size), self.precision, *map(_short, self.varied)])

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
                f"data.loader.batch_size={batch}",
                "data.loader.epoch_samples=65536",  # nothing is prepared across the end of an epoch
                f"train.device={device}",
                *more,
                *self.varied,
            ),
        )


def measure(
    store: Store, case: Case, config: Config, steps: int, repeats: int, kept: Callable[..., None]
) -> dict[str, Any]:
    """One row: images/s from tensors and from the loader, the share of one over the other, waiting, the GPU's
    utilisation with both, peak memory.

    `kept` is told the seconds of each repeat.
    """
    device = pick_device(config.train.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # of this case alone
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
        kept = partial(kept, first_steps_s=first_steps)
        tensors, loaded, waited, busy, busy_alone = [], [], [], [], []
        ready = 2 * config.data.loader.prefetch  # batches, of which the last may not end in the middle of a step
        for _ in range(repeats):
            seconds, used = _watched(parts, itertools.repeat(fixed, steps), steps, monitor)
            tensors.append(seconds)
            busy_alone.append(used)
            # What was prepared during the turn from tensors.
            _timed(parts, itertools.islice(stream, ready), ready, monitor)
            before = loader.wait_s
            seconds, used = _watched(parts, itertools.islice(stream, steps), steps, monitor)
            loaded.append(seconds)
            busy.append(used)
            waited.append((loader.wait_s - before) / loaded[-1])
            utilisation = {"gpu_utilisation": busy, "gpu_utilisation_tensors": busy_alone}
            kept(images=steps * batch_size, tensors_s=tensors, loader_s=loaded, **utilisation)
        advice = monitor.summary()["advice"]
    tensor_rate, loader_rate = (steps * batch_size / statistics.median(seconds) for seconds in (tensors, loaded))
    return {
        "name": case.name,
        "images_per_s": loader_rate,
        "tensor_images_per_s": tensor_rate,
        "share": statistics.median(t / s for t, s in zip(tensors, loaded, strict=True)),
        "wait_share": statistics.median(waited),
        "gpu_utilisation": statistics.median(busy),
        "gpu_utilisation_tensors": statistics.median(busy_alone),
        "peak_memory_mb": _peak(device) / 2**20,
        "batch_size": batch_size,
        "first_steps_s": first_steps,
        "advice": advice,
    }


def _watched(parts: Parts, batches: Iterable[Batch], steps: int, monitor: Any) -> tuple[float, float]:
    """Seconds, and the GPU's utilisation meanwhile in per cent, NaN without one."""
    with TrainingMonitor(None, WATCH) as watch:
        seconds = _timed(parts, batches, steps, monitor)
    return seconds, watch.summary().get("gpu0.utilisation_mean", math.nan)


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
        "cores": available_cores(),
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
    """Parts between commas, those inside brackets apart."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


@click.command()
@click.option("--store", type=click.Path(path_type=Path), default=None, help="A store; without it one is made.")
@click.option("--model", "models", default="tf_efficientnet_lite0", show_default=True, help="Models, with commas.")
@click.option("--size", "sizes", default="320", show_default=True, help="Sizes in pixels, with commas.")
@click.option("--precision", default="auto", show_default=True, help="fp32, bf16, fp16 or auto, with commas.")
@click.option(
    "--vary",
    "varied",
    multiple=True,
    metavar="A.B=C,D",
    help="Measure each value of a setting, such as model.compile=false,true; repeatable, for all combinations.",
)
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
    varied: tuple[str, ...],
    batch_size: int,
    steps: int,
    repeats: int,
    device: str,
    more: tuple[str, ...],
    out: Path | None,
) -> None:
    """Measure and print a table."""
    ways = [[f"{name}={value}" for value in _split(values)] for name, _, values in (v.partition("=") for v in varied)]
    for name, given in (("--model", models), ("--size", sizes), ("--precision", precision)):
        if not _split(given):
            raise click.BadParameter("expected at least one", param_hint=name)
    if not all(ways):
        raise click.BadParameter("expected A.B=C,D, such as model.compile=false,true", param_hint="--vary")
    cases = [
        Case(model, int(size), kind, settings)
        for model, size, kind in itertools.product(_split(models), _split(sizes), _split(precision))
        for settings in itertools.product(*ways)
    ]
    if device == "gpu":
        if not torch.cuda.is_available():
            raise click.ClickException("--device gpu: torch sees no GPU here.")
        device = "cuda"
    where = {"machine": machine(pick_device(device))}
    where |= {"settings": list(more), "batch_size": batch_size, "steps": steps, "repeats": repeats}
    rows, kept = [], Figures(out)
    with tempfile.TemporaryDirectory() as folder, Console(quiet=True) as console:
        opened = open_store(store) if store else make_store(Path(folder), 12, max(512, *map(int, _split(sizes))))
        for case in cases:
            so_far = partial(kept.so_far, **where, rows=rows)
            try:
                config = case.config(batch_size, device, more)
                with training_advice(config):
                    rows.append(measure(opened, case, config, steps, repeats, partial(so_far, case=case.name)))
            except Exception as error:  # what the other cases come to is not lost with one that fails
                if len(cases) == 1:
                    raise
                told = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
                rows.append({"name": case.name, **told})
            so_far()
            torch.compiler.reset()
        # What all cases share is said once.
        words = [row["name"].split() for row in rows]
        shared = [word for word in words[0] if len(rows) > 1 and all(word in each for each in words)]
        names = [" ".join(word for word in each if word not in shared) for each in words]
        console.table(
            " ".join(["Training speed", *shared]),
            [_shown(row) | {"case": name} for row, name in zip(rows, names, strict=True) if "share" in row],
        )
    for row in rows:
        if "error" in row:
            click.echo(f"{row['name']}: {row['error']}", err=True)
    ratios = {f"loader_over_tensors {row['name']}": row["share"] for row in rows if "share" in row}
    kept.final({**where, "rows": rows, "ratios": ratios})
    if len(ratios) < len(rows):
        sys.exit(1)


def _short(setting: str) -> str:
    """`a.b=c` without its sections."""
    name, _, value = setting.partition("=")
    return f"{name.rpartition('.')[2]}={value}"


def _shown(row: dict[str, Any]) -> dict[str, str]:
    busy = {"GPU busy": row["gpu_utilisation"], "alone": row["gpu_utilisation_tensors"]}
    return {
        "case": row["name"],
        "images/s": f"{row['images_per_s']:.1f}",
        "from tensors": f"{row['tensor_images_per_s']:.1f}",
        "share": f"{row['share']:.1%}",
        "waiting": f"{row['wait_share']:.1%}",
        "first steps, s": f"{sum(row['first_steps_s']):.1f}",
        **{name: f"{percent:.0f} %" for name, percent in busy.items() if not math.isnan(percent)},
        "MiB": f"{row['peak_memory_mb']:.0f}",
    }


if __name__ == "__main__":
    main()
