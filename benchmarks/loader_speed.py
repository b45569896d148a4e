"""The loader's speed beside the conventional stack and the floor, on the same pictures with the same augmentations.

    python benchmarks/loader_speed.py [--store STORE] [--device cpu|gpu] [--json FILE]

All take turns, so that other load on the machine meets every one, and medians over the turns are shown. Worker
processes are stopped while others have their turn, and batches that were prepared before it are thrown away. Without a
store a synthetic one is made; see loader_set.py for what is done to the pictures.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import torch
from conventional import batches as conventional
from kept import Figures
from loader_set import SIDE, Benchmarked, prepare, reopened, source_store
from rich.console import Console
from rich.table import Table

from dali_pipes.loader import Loader
from dali_pipes.settings import LoaderSettings, PipelineSettings
from preprocessing.machine import available_cores
from preprocessing.manifest import Store
from preprocessing.tiles import decode_level
from training.config import MonitorSettings
from training.monitor import TrainingMonitor

BATCH = 8
GPU_BATCH = 32  # of the loader on a GPU, as training takes there
WATCH = MonitorSettings(interval_s=0.25)  # seldom enough to cost a turn nothing that can be seen
PROBED = ("512 zstd, host cache", "512 zstd", "conventional npy16")
RATIOS = {
    "conventional_dicom_sv1": "conventional DICOM SV1",
    "conventional_png8": "conventional PNG8",
    "conventional_npy16": "conventional npy16",
}
OURS = (
    *("512 zstd, host cache", "512 zstd, device cache", "512 zstd, host cache and steps"),
    *("512 zstd", "512 none", "512 lzw", "512 deflate", "512 htj2k"),
)


@dataclass
class Row:
    """One contestant: `start` begins its endless stream of batches, `drop` are thrown away before the clock starts."""

    name: str
    start: Callable[[], Iterator[Any]]
    drop: int
    batch: int = BATCH
    rates: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    gpu: list[float] = field(default_factory=list)
    stream: Iterator[Any] | None = None
    workers: list[psutil.Process] = field(default_factory=list)
    failed: str = ""  # where and why; it has no more turns

    def resume(self) -> None:
        """Begin or go on, up to the first batch that counts."""
        if self.stream is None:
            before = set(psutil.Process().children(recursive=True))
            self.stream = self.start()
            next(self.stream)
            self.workers = [each for each in psutil.Process().children(recursive=True) if each not in before]
        for worker in self.workers:
            worker.resume()
        for _ in range(self.drop):
            next(self.stream)

    def pause(self) -> None:
        """Stop the workers, which would go on preparing batches while another has its turn."""
        for worker in self.workers:
            worker.suspend()

    def end(self) -> None:
        """Let the workers go."""
        for worker in self.workers:
            worker.resume()
        self.stream = None


def contestants(data: Benchmarked, device: str, threads: int) -> list[Row]:
    """Everything that is compared."""
    pipeline = PipelineSettings(height=SIDE, width=SIDE)

    def plain(form: Any, files: list[Path], batch: int = BATCH) -> Callable[[], Iterator[Any]]:
        return lambda: conventional(files, form, pipeline, batch, threads)

    def ours(name: str, **told: Any) -> Callable[[], Iterator[Any]]:
        return lambda: stream(data.stores[name], pipeline, device, threads=threads, batch_size=batch, **told)

    waiting = 2 * threads  # DataLoader's own prefetching
    batch = BATCH if device == "cpu" else GPU_BATCH
    rows = [
        # Half a second a picture: in small batches, for as many are thrown away as the workers may have ready.
        Row("conventional DICOM SV1", plain("dicom", data.dicom, 2), waiting, 2),
        Row("conventional PNG8", plain("png8", data.png8), waiting),
        Row("conventional npy16", plain("npy16", data.npy16), waiting),
        *(Row(name, ours(name), 4, batch) for name in data.stores),
        Row("512 zstd, host cache", ours("512 zstd", cache="host"), 4, batch),
    ]
    if device != "cpu":
        rows.append(Row("512 zstd, device cache", ours("512 zstd", cache="device"), 4, batch))
        rows.append(Row("512 zstd, host cache and steps", ours("512 zstd", cache="host", steps_on="cpu"), 4, batch))
    return [
        *rows,
        Row("floor: decode 512 zstd", lambda: decode_alone(data.stores["512 zstd"]), 0),
        Row("floor: copy", copy_alone, 0),
    ]


def stream(store: Store, pipeline: PipelineSettings, device: str, **told: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Our batches, epoch after epoch, from a loader told so."""
    settings = LoaderSettings(sampling="natural", epoch_samples=1 << 16, **told)
    with Loader(store, store.manifest, pipeline, settings, device=device) as loader:
        epoch = 0
        while True:
            yield from loader.epoch(epoch)
            epoch += 1


def decode_alone(store: Store) -> Iterator[int]:
    """Decoding on one core and nothing else."""
    tiles = [(store.root / path).read_bytes() for path in store.manifest["path_512"]]
    while True:
        for start in range(0, len(tiles) - BATCH + 1, BATCH):
            for tile in tiles[start : start + BATCH]:
                decode_level(tile)
            yield start


def copy_alone() -> Iterator[torch.Tensor]:
    """Copying finished batches and nothing else."""
    ready = torch.zeros(BATCH, 1, SIDE, SIDE)
    while True:
        yield ready.clone()


def turn(row: Row, seconds: float, device: str) -> None:
    """Let one contestant run for a while."""
    row.resume()
    assert row.stream is not None
    _settle(device)
    with TrainingMonitor(None, WATCH) as monitor:
        began, cpu, count = time.perf_counter(), _cpu_seconds(), 0
        # Workers that began together end together, in bursts: of each two batches at the least.
        least = 2 * row.batch * max(len(row.workers), 1)
        while count < least or time.perf_counter() - began < seconds:
            next(row.stream)
            count += row.batch
        _settle(device)
        spent = time.perf_counter() - began
    row.rates.append(count / spent)
    row.cpu_ms.append((_cpu_seconds() - cpu) / count * 1e3)
    row.gpu.append(monitor.summary().get("gpu0.utilisation_mean", float("nan")) if device != "cpu" else float("nan"))
    row.pause()
    _idle()


def attempt(row: Row, seconds: float, device: str) -> None:
    """`turn`, which does not cost the others their figures where it fails."""
    try:
        turn(row, seconds, device)
    except Exception:  # noqa: BLE001  whatever it is, it is this contestant's
        row.failed = traceback.format_exc()
        click.echo(f"{row.name}: {row.failed}", err=True)
        row.rates.clear()
        row.end()


def _settle(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _idle(most_s: float = 2.0) -> None:
    """Wait until what prefetches in threads has filled its queues."""
    ends, before = time.perf_counter() + most_s, _cpu_seconds()
    while time.perf_counter() < ends:
        time.sleep(0.05)
        now = _cpu_seconds()
        if now - before < 0.01:
            return
        before = now


def _cpu_seconds() -> float:
    """Processor time of this process and its workers."""
    own = psutil.Process()
    total = 0.0
    for process in [own, *own.children(recursive=True)]:
        try:
            used = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += used.user + used.system
    return total


def probe(data: Benchmarked, name: str, threads: int) -> dict[str, float]:
    """Run in a process of its own: seconds to the first batch (imports not counted), and peak memory in MiB."""
    (row,) = (row for row in contestants(data, "cpu", threads) if row.name == name)
    began = time.perf_counter()
    batches = row.start()
    next(batches)
    first = time.perf_counter() - began
    peak = 0.0
    for _ in range(16):
        next(batches)
        own = psutil.Process()
        peak = max(peak, sum(p.memory_full_info().pss for p in [own, *own.children(recursive=True)]) / 2**20)
    return {"first_batch_s": first, "peak_memory_mb": peak}


def probe_apart(scratch: Path, name: str, threads: int) -> dict[str, float]:
    """`probe` in a fresh process, on the set that lies in `scratch`."""
    arguments = ["--probe", name, "--scratch", str(scratch), "--threads", str(threads)]
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def summary(rows: list[Row], probes: dict[str, dict[str, float]], device: str, threads: int) -> dict[str, Any]:
    """What goes into the JSON file."""
    described = []
    for row in rows:
        if not row.rates:
            continue
        entry = {
            "name": row.name,
            "batch_size": row.batch,
            "images_per_s": statistics.median(row.rates),
            "cpu_ms": statistics.median(row.cpu_ms),
            "rates": row.rates,
            **probes.get(row.name, {}),
        }
        if not np.isnan(row.gpu[0]):
            entry["gpu_utilisation"] = statistics.fmean(row.gpu)
        described.append(entry)
    rate = {entry["name"]: entry["images_per_s"] for entry in described}
    best = max((name for name in OURS if name in rate), key=lambda name: rate[name], default=OURS[0])
    over = {key: name for key, name in RATIOS.items() if name in rate}
    gpu = torch.cuda.get_device_name() if device != "cpu" else None
    return {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": threads, "gpu": gpu, "size": SIDE},
        "rows": described,
        "best": best,
        "ratios": {key: rate.get(best, math.nan) / rate[name] for key, name in over.items()},
        "ratios_uncached_512": {key: rate.get("512 zstd", math.nan) / rate[name] for key, name in over.items()},
        "detector_28_over_5_megapixels": rate.get("5 MP", math.nan) / rate.get("28 MP", math.nan),
        "failed": {row.name: row.failed for row in rows if row.failed},
    }


def show(found: dict[str, Any], console: Console) -> None:
    """The table, its plot, and the ratios."""
    table = Table(title=f"Loader, {SIDE}×{SIDE}, {found['machine']['cores']} cores")
    table.add_column("", no_wrap=True)
    for name in ("img/s", "CPU ms", "first s", "MiB"):
        table.add_column(name, justify="right")
    table.add_column("", no_wrap=True)  # the plot
    rates = [row["images_per_s"] for row in found["rows"] if not row["name"].startswith("floor")]
    most = max(rates, default=1.0)  # none where all of them failed, as is said then
    for row in found["rows"]:
        first, memory = row.get("first_batch_s"), row.get("peak_memory_mb")
        table.add_row(
            row["name"],
            f"{row['images_per_s']:.0f}",
            f"{row['cpu_ms']:.2f}",
            "" if first is None else f"{first:.2f}",
            "" if memory is None else f"{memory:.0f}",
            "█" * max(1, round(20 * min(1, row["images_per_s"] / most))),
        )
    console.print(table)
    for title, ratios in ((found["best"], found["ratios"]), ("512 zstd", found["ratios_uncached_512"])):
        listed = ", ".join(f"{ratio:.2f} × {RATIOS[name]}" for name, ratio in ratios.items())
        console.print(f"{title}: {listed}", highlight=False)
    console.print(f"An image of 28 megapixels costs {found['detector_28_over_5_megapixels']:.2f} × one of 5.")


@click.command()
@click.option("--store", default="store", show_default=True, help="Store whose pictures are taken.")
@click.option("--device", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True)
@click.option("--images", type=click.IntRange(8), default=16, show_default=True, help="Pictures in the set.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Turns of each contestant.")
@click.option("--seconds", type=float, default=0.7, show_default=True, help="Length of a turn.")
@click.option("--threads", type=int, default=0, help="Threads, and workers of the conventional stack; 0 for all cores.")
@click.option("--json", "target", type=click.Path(path_type=Path), default=None, help="Write the figures there.")
@click.option("--probe", "probed", default=None, hidden=True)
@click.option("--scratch", type=click.Path(path_type=Path), default=None, hidden=True)
def main(
    store: str,
    device: str,
    images: int,
    repeats: int,
    seconds: float,
    threads: int,
    target: Path | None,
    probed: str | None,
    scratch: Path | None,
) -> None:
    """Measure and show."""
    threads = threads or available_cores()
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # the one inside DALI warns of each codestream without colours
    place = "cuda" if device == "gpu" else "cpu"
    if device == "gpu" and not torch.cuda.is_available():
        raise click.ClickException("--device gpu: torch sees no GPU here.")
    console, kept = Console(), Figures(target)
    if probed and scratch:
        print(json.dumps(probe(reopened(scratch), probed, threads)))
        return
    with tempfile.TemporaryDirectory(prefix="loader-speed-") as folder:
        with console.status("Preparing pictures"):
            data = prepare(source_store(Path(store), Path(folder)), Path(folder) / "set", images)
        rows = contestants(data, place, threads)
        for repeat in range(repeats):
            for row in rows:
                if not row.failed:
                    with console.status(f"{repeat + 1} of {repeats}: {row.name}"):
                        attempt(row, seconds, place)
                whole = summary(rows, {}, place, threads) if all(row.rates or row.failed for row in rows) else {}
                kept.so_far(images_per_s={row.name: row.rates for row in rows if row.rates}, **whole)
        for row in rows:
            row.end()
        probes = {}
        if device == "cpu":  # on a GPU the first batch would be CUDA's start
            with console.status("Memory and first batch"):
                probes = {name: probe_apart(Path(folder) / "set", name, threads) for name in PROBED}
    found = summary(rows, probes, place, threads)
    kept.final(found)
    show(found, console)
    if found["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
