"""Everything that needs a GPU, in one go: the `gpu` tests, then the benchmarks on the GPU, on data that they make.

    python benchmarks/gpu_check.py [--out benchmarks/results] [--only train_speed ...]

Writes `<gpu>-<date>-<time>.json` with versions, each part's exit status, seconds and figures, and prints a table. A
part that fails or takes too long is recorded as that and does not end the others, and all that it printed is kept in
`<the same>-<part>.log`; the exit status is then 1, and 2 without a GPU.
`--device cpu` tries the course of things on a machine without one; the file is then called cpu-<date>-<time>.json.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from preprocessing.machine import available_cores
from training import run_files
from training.environment import git_commit
from training.gpu import GpuReader

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("torch", "timm", "numpy", "opencv-python-headless", "nvidia-dali-cuda120", "nvidia-dali-cuda130"),
    *("nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13"),
)
TOTAL_S = 460  # of eight minutes; the rest is this program's own start, and the last words of parts that are stopped
_LAST_WORDS_S = 3
_TAIL = 60  # lines


@dataclass(frozen=True)
class Part:
    """One command; with `figures` it writes them to the file that `--json` names."""

    name: str
    command: tuple[str, ...]
    most_s: float
    figures: bool = True
    threads: int | None = None  # of each process, where several run side by side


def parts(device: str, memory: int = 0) -> list[Part]:
    """What is run, in its order; the limits add up to `TOTAL_S`, and what a part leaves of its own, or takes beyond it,
    goes to the next. `memory`: of the GPU, bytes."""
    on = ("--device", device)
    # In batches of 32 the host could not keep an H100 busy. Of each size about as many pictures.
    batch, steps = ("128", "10") if memory >= 60 * 2**30 else ("32", "40")
    b3 = ("--model", "efficientnet_b3", "--size", "512", "--batch-size", batch, "--steps", steps, "--repeats", "2")
    b3 += ("--set", "train.cudnn_benchmark=false")  # the choice took 44 s on an H100, most of what there is
    b3 += ("--set", "data.loader.cache=host")  # as docs/performance.md has it
    b3 += ("--vary", "data.loader.steps_on=cpu,auto")
    tiny = ("--size", "64", "--batch-size", "2", "--steps", "1", "--repeats", "1")
    submission = ("--encoding", "jpeg2000", "--no-plain", "--pictures", "256", "--repeats", "1")
    small = ("--model", "tf_efficientnet_lite0", "--size", "64", "--pictures", "8", "--repeats", "1")
    codecs = ("--pictures", "2" if device == "gpu" else "1", "--repeats", "1", "--seconds", "0.2")
    conversion = ("--pictures", "1", "--repeats", "1")
    # The whole chain, the longest of the tests, comes first, and who is done takes over from the others.
    tests = ("-m", "pytest", "-v", "-n", str(max(available_cores() - 2, 1)), "--dist", "worksteal", "-m", "gpu")
    # A test that hangs in CUDA says where, before its part is over. The whole chain has a limit of its own.
    tests += ("--timeout", "60", "--timeout-method", "thread", "--tb", "short", "--durations", "15", *gpu_tests())
    return [
        Part("gpu tests", tests, 115, False, threads=1),
        Part("train_speed", ("benchmarks/train_speed.py", *on, *(b3 if device == "gpu" else tiny)), 80),
        Part("loader_speed", ("benchmarks/loader_speed.py", *on, "--images", "16", "--repeats", "2"), 85),
        Part("predict_speed", ("benchmarks/predict_speed.py", *on, *(submission if device == "gpu" else small)), 80),
        Part("convert_speed", ("benchmarks/convert_speed.py", *on, *conversion), 50),
        Part("codec_speed", ("benchmarks/codec_speed.py", *on, *codecs), 50),
    ]


def gpu_tests() -> list[str]:
    """The files that hold them: collecting the others too would cost each process a quarter of a minute."""
    files = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda path: (len(path.parts), path))
    return [str(file.relative_to(ROOT)) for file in files if "pytest.mark.gpu" in file.read_text(encoding="utf-8")]


def run_part(part: Part, folder: Path, log: Path) -> dict[str, Any]:
    """Run one, and what came of it: exit status (None: too long), seconds, figures, and the end of its output; all of
    that, where it did not pass, goes to `log`."""
    target = _figures_of(part, folder)
    command = [sys.executable, *part.command, *(("--json", str(target)) if part.figures else ())]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if part.threads is not None:
        environment["OMP_NUM_THREADS"] = str(part.threads)
    began = time.monotonic()
    with _hearing_sigint():
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    with process:
        try:
            output, _ = process.communicate(timeout=part.most_s)
            status = process.returncode
        except subprocess.TimeoutExpired:
            status = None
            process.send_signal(signal.SIGINT)  # pytest then says what failed so far
            try:
                output, _ = process.communicate(timeout=_LAST_WORDS_S)
            except subprocess.TimeoutExpired:
                _kill_group(process.pid)
                output, _ = process.communicate()
        finally:  # what it started must not use the GPU beside the next part
            _kill_group(process.pid)
    if status != 0:
        log.write_text(output, encoding="utf-8")
    return {
        "command": list(part.command),
        "status": status,
        "seconds": round(time.monotonic() - began, 1),
        "limit_s": round(part.most_s, 1),
        "figures": _read(target),
        "output_tail": output.splitlines()[-_TAIL:],
    }


def _figures_of(part: Part, folder: Path) -> Path:
    return folder / f"{part.name}.json"


def _read(figures: Path) -> Any:
    return json.loads(figures.read_text()) if figures.is_file() else None


@contextmanager
def _hearing_sigint() -> Iterator[None]:
    """A shell has what it starts in the background ignore SIGINT, and a process started here would inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def machine(name: str) -> dict[str, Any]:
    """What the figures were taken with."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    reader = GpuReader()
    found = {"device": name, "driver": reader.driver(), "cores": available_cores()}
    found |= {"scratch": tempfile.gettempdir()}
    reader.close()
    found |= {"python": platform.python_version(), "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ")}
    return found | {"git_commit": git_commit(), "packages": versions}


def gpu_name() -> str | None:
    """The first GPU's name, None where torch can use none."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def gpu_memory() -> int:
    """The first GPU's memory in bytes, 0 where torch can use none."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def outcome(result: dict[str, Any]) -> str:
    """In a word."""
    status = result["status"]
    if status is None:
        kept = ", its figures so far kept" if result["figures"] else ""
        return f"stopped after {result['limit_s']:.0f} s{kept}"
    return "passed" if status == 0 else f"failed ({status})"


def check(name: str, out: Path, tell: Callable[[str], object], wanted: Sequence[Part]) -> tuple[Path, bool]:
    """Run some parts and write the file after each, so that no figure is lost, those of a part in which this program is
    ended neither. Gives the file and whether all passed."""
    described = machine(name)
    path = out / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{datetime.now(UTC):%Y-%m-%d-%H%M%S}.json"
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        left = 0.0
        for part in wanted:
            tell(part.name)
            began, most = time.monotonic(), max(part.most_s + left, 1)
            unfinished = {"command": list(part.command), "status": None, "limit_s": most, "output_tail": []}
            try:
                log = path.with_name(f"{path.stem}-{part.name.replace(' ', '-')}.log")
                results[part.name] = run_part(replace(part, most_s=most), Path(folder), log)
            except BaseException:
                spent = {
                    "seconds": round(time.monotonic() - began, 1),
                    "figures": _read(_figures_of(part, Path(folder))),
                }
                results[part.name] = unfinished | spent
                raise
            finally:
                run_files.write_json(path, {"machine": described, "parts": results})
            left = results[part.name]["limit_s"] - results[part.name]["seconds"]
    return path, all(result["status"] == 0 for result in results.values())


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "benchmarks/results", help="Folder to write to.")
@click.option("--device", type=click.Choice(["gpu", "cpu"]), default="gpu", show_default=True)
@click.option("--only", multiple=True, metavar="PART", help="Run this part alone, such as 'gpu tests'; repeatable.")
def main(out: Path, device: str, only: tuple[str, ...]) -> None:
    """Run everything that needs a GPU and keep the figures."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which ends the part that runs, too
    name = gpu_name() if device == "gpu" else "cpu"
    if name is None:
        click.echo("gpu-check: torch can use no NVIDIA GPU here; see: python cli.py doctor", err=True)
        sys.exit(2)
    there = parts(device, gpu_memory())
    if unknown := set(only) - {part.name for part in there}:
        raise click.BadParameter(
            f"no part {sorted(unknown)[0]!r}; they are {', '.join(part.name for part in there)}", param_hint="--only"
        )
    wanted = [part for part in there if part.name in only or not only]
    console = Console()
    path, passed = check(name, out, lambda part: console.print(f"{part} ..."), wanted)
    table = Table(title=f"On {name}")
    for heading in ("part", "outcome", "seconds"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    found = json.loads(path.read_text())["parts"]
    for part, result in found.items():
        table.add_row(part, outcome(result), f"{result['seconds']:.0f}")
    console.print(table)
    for result in found.values():
        for key, value in ((result["figures"] or {}).get("ratios") or {}).items():
            console.print(f"{key}: {math.nan if value is None else value:.2f}", highlight=False)
    for part, result in found.items():
        if result["status"] != 0:
            console.print(f"{part}:", *result["output_tail"], sep="\n  ", markup=False, highlight=False)
    console.print(f"Figures: {path}")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
