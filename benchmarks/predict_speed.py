"""Prediction's speed from DICOM files to a submission, by stage, beside a plain script.

    python benchmarks/predict_speed.py [--model B3] [--size N] [--device cpu|gpu] [--encoding E] [--json FILE]

All take turns, so that other load on the machine meets every one, and medians over the turns are shown:
    mammopipe             `predict` from a folder of DICOM files and a CSV, processes and model loading included
    plain script          pydicom, OpenCV and the same timm model, a file at a time (plain_predict.py)
    the same + workers    with torch's DataLoader decoding in one process a core
    all on the CPU        mammopipe without the GPU
    X alone               one of mammopipe's stages on all cores (the model: on the device), with nothing beside it

"slowest stage alone" is what a machine whose stages do not compete can reach. On a CPU alone they do: decoding and
model share the cores, and the floor is the processor time of all stages, each measured on one core, over the cores.
The pictures are synthetic, 3328 by 2560, half JPEG 2000 and half JPEG Lossless, the encodings of the challenge. With
--device gpu mammopipe decodes on the GPU too, and a quarter of the files is predicted on the CPU alone; an eighth of
the files of each is predicted as well, so that rates can be told without the start of CUDA, which takes longer.
"""

from __future__ import annotations

import platform
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import pandas as pd
import plain_predict
import timm
import torch
from drawn import dicom_files, draw
from kept import Figures, steady_rate
from pydicom import uid
from rich.console import Console
from rich.table import Table

from dali_pipes.loader import Loader
from preprocessing import decode, grayscale, ingest, tiles
from preprocessing.breast import find_breast
from preprocessing.convert import convert
from preprocessing.machine import available_cores
from preprocessing.manifest import Store, open_store
from preprocessing.settings import ConvertSettings
from preprocessing.table import Source, read_table
from training import run_files, runs
from training.config import Config, load_config
from training.inference.assemble import open_ensemble
from training.inference.ensemble import Ensemble
from training.inference.intake import levels_read, stream
from training.inference.predict import predict
from training.inference.submission import Results, asked_by_table, compose, judge
from training.model import build_model

ENCODINGS = {
    "both": (uid.JPEG2000Lossless, uid.JPEGLosslessSV1),
    "jpeg2000": (uid.JPEG2000Lossless,),
    "jpeg-lossless": (uid.JPEGLosslessSV1,),
}
DISTINCT = 8  # pictures drawn; the others are copies
PICTURES_A_BREAST = 2
OURS, PLAIN, WORKERS = "mammopipe", "plain script", "plain script + workers"
ALL_HOST = "mammopipe, all on the CPU"
FEW = ", an eighth of the files"
BESIDE = {"plain_script": PLAIN, "plain_script_workers": WORKERS}
STAGES = ("decode", "crop", "levels", "rest of intake", "pipeline", "model", "tables")


@dataclass(frozen=True)
class Work:
    """What is predicted, and with what."""

    images: Path
    table: Path
    run: Path
    store: Store
    scratch: Path
    pictures: int
    device: str
    cores: int

    @property
    def breasts(self) -> float:
        """Rows of the submission."""
        return self.pictures / PICTURES_A_BREAST

    def first(self, count: int) -> Path:
        """The table of so many of the pictures."""
        path = self.scratch / f"first-{count}.csv"
        pd.read_csv(self.table, dtype=str).head(count).to_csv(path, index=False)
        return path


@dataclass
class Row:
    """A contestant or a stage by itself, and the seconds of its turns for so many pictures."""

    name: str
    run: Callable[[], object]
    pictures: int
    seconds: list[float] = field(default_factory=list)


def prepare(root: Path, pictures: int, config: Config, device: str, encoding: str) -> Work:
    """Draw the pictures, their table, a store of some at the level that is read, and a run with random weights."""
    images, table = root / "images", root / "test.csv"
    distinct, syntaxes = draw(min(pictures, DISTINCT)), ENCODINGS[encoding]
    encoded = [dicom_files(distinct[start :: len(syntaxes)], syntax) for start, syntax in enumerate(syntaxes)]
    files = [encoded[number % len(syntaxes)][number // len(syntaxes)] for number in range(len(distinct))]
    rows = []
    for number in range(pictures):
        patient, side = str(number // 4), "LR"[number // 2 % 2]
        row = {
            "patient_id": patient,
            "image_id": f"{number:06d}",
            "laterality": side,
            "view": ("CC", "MLO")[number % 2],
        }
        rows.append(row | {"prediction_id": f"{patient}_{side}"})
        path = images / patient / f"{number:06d}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[number % len(files)])
    for name, count in (("test", pictures), ("distinct", len(files))):
        pd.DataFrame(rows[:count]).to_csv(root / f"{name}.csv", index=False)
    run = make_run(root / "run", config)
    convert(images, root / "distinct.csv", root / "store", ConvertSettings(codec="none"))
    store, scratch = open_store(root / "store"), root / "scratch"
    scratch.mkdir()
    return Work(images, table, run, store, scratch, pictures, device, available_cores())


def make_run(root: Path, config: Config) -> Path:
    """One fold as training leaves it, its weights random."""
    folder = root / "fold0"
    settings = ConvertSettings().model_dump(mode="json")
    runs.begin(folder, config, {"fold": 0, "store_settings": settings})
    runs.save_best(folder, build_model(config.model, config.pipeline.channels), {"fold": 0})
    run_files.write_json(folder / runs.SUMMARY, {"fold": 0})
    validation = pd.DataFrame({"image_id": ["a", "b"], "patient_id": ["1", "2"], "laterality": "L", "view": "CC"})
    validation = validation.assign(prediction_id=["1_L", "2_L"], cancer=[0, 1], prediction=[0.2, 0.8], machine_id="49")
    run_files.write_table(
        folder / runs.VALIDATION, validation.assign(site_id="1", age=60, density="B", implant=0, fold=0)
    )
    return root


def contestants(work: Work, config: Config, ensemble: Ensemble, plainly: bool, decoders: set[str]) -> list[Row]:
    """All that take turns; `plainly`: the plain script too. `decoders`: who decodes is noted there."""
    side, group = config.pipeline.height, ensemble.groups[0]
    # In a process of its own, for this one's allocator is told things by mammopipe that a script would not tell it.
    apart = ProcessPoolExecutor(1, get_context("spawn"), _plain_model, (config.model.backbone, work.device))
    if plainly:
        apart.submit(int).result()  # starts it
    picture = torch.zeros(group.loader.val_batch_size, 1, side, config.pipeline.width, device=work.device)

    decoding = "cpu" if work.device == "cpu" else "gpu"

    def ours(table: Path, device: str = work.device, decode_on: Any = decoding) -> None:
        out = work.scratch / "ours.csv"
        summary = predict([work.run], out, images=work.images, csv=table, device=device, decode_on=decode_on)
        if summary.exit_code:
            raise click.ClickException(str(summary))

    def script(workers: int) -> None:
        arguments = (work.images, work.table, side, work.scratch / "plain.csv", work.device, workers)
        apart.submit(_plain, work.cores, *arguments).result()

    def intake() -> None:
        settings = ensemble.settings.model_copy(update={"decode_on": decoding})
        levels = levels_read(settings.levels, ensemble.longest_side)
        with stream(work.images, read_table(work.table), True, settings, levels, ensemble.batch) as chunks:
            found = [decoder for chunk in chunks for decoder in chunk.rows["decoder"]]
        assert len(found) == work.pictures
        decoders.update(found)

    def pipeline() -> None:
        manifest = work.store.manifest
        rows = manifest.iloc[np.arange(work.pictures) % len(manifest)]
        with Loader(work.store, rows, group.pipeline, group.loader, train=False, device=work.device) as loader:
            for batch in loader.epoch(0):
                batch["image"].to(work.device)

    def model() -> None:
        member = group.members[0]
        for start in range(0, work.pictures, len(picture)):
            ensemble.probabilities(member, picture[: work.pictures - start]).cpu()

    def ours_of(name: str, count: int, *more: Any) -> list[Row]:
        some = max(count // 8, 1)
        tables = work.first(count), work.first(some)
        return [
            Row(name, lambda: ours(tables[0], *more), count),
            Row(name + FEW, lambda: ours(tables[1], *more), some),
        ]

    count = work.pictures
    slow = [Row(PLAIN, lambda: script(0), count), Row(WORKERS, lambda: script(work.cores), count)] if plainly else []
    if work.device == "cpu":
        whole = [Row(OURS, lambda: ours(work.table), count)]
    else:
        whole = ours_of(OURS, count) + ours_of(ALL_HOST, max(count // 4, 1), "cpu", "cpu")
    return [
        *whole,
        *slow,
        Row("intake alone", intake, count),
        Row("pipeline alone", pipeline, count),
        Row("model alone", model, count),
    ]


_plain_models: list[torch.nn.Module] = []  # of the plain script's process


def _plain_model(backbone: str, device: str) -> None:
    model = timm.create_model(backbone, num_classes=1, in_chans=1, pretrained=False).eval().to(device)
    _plain_models.append(model.to(memory_format=torch.channels_last))  # pyright: ignore[reportCallIssue]


def _plain(cores: int, *arguments: Any) -> None:
    torch.set_num_threads(cores)
    plain_predict.predict(_plain_models[0], *arguments)


def by_stage(work: Work, ensemble: Ensemble) -> dict[str, float]:
    """Milliseconds of processor time a picture on one core; intake is `ingest`, taken apart."""
    spent: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    settings, group = ensemble.settings.model_copy(update={"codec": "none"}), ensemble.groups[0]
    levels = levels_read(settings.levels, ensemble.longest_side)

    def timed(stage: str, call: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = call()
        spent[stage] += time.process_time() - start
        return result

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    paths = sorted(work.images.rglob("*.dcm"))[:DISTINCT]
    store = work.scratch / uuid.uuid4().hex
    ingest.scratch_folder(store).mkdir(parents=True)
    for path in paths:
        found = timed("decode", lambda path=path: decode.decode(path, settings))
        values = grayscale.to_tile_values(found, found.header.photometric == "MONOCHROME1")
        crop = timed("crop", lambda values=values: find_breast(values, settings.crop_margin)).crop
        timed("levels", lambda values=values, crop=crop: tiles.build_levels(values[crop.slices], settings.levels))
        job = ingest.Job(path.parent, store, settings, Source(path.stem, path.name, {"patient_id": "p"}), levels)
        timed("rest of intake", lambda job=job: ingest.settle(ingest.stage(job)))
    spent["rest of intake"] -= spent["decode"] + spent["crop"] + spent["levels"]
    rows = work.store.manifest.head(len(paths))
    loader = group.loader.model_copy(update={"threads": 1})
    with Loader(work.store, rows, group.pipeline, loader, train=False, device=work.device) as opened:
        (batch,) = timed("pipeline", lambda: list(opened.epoch(0)))
    image = batch["image"].to(work.device)
    timed("model", lambda: ensemble.probabilities(group.members[0], image).cpu())
    timed("tables", lambda: tables(work, ensemble, len(paths)))
    torch.set_num_threads(work.cores)
    return {stage: 1000 * seconds / len(paths) for stage, seconds in spent.items()}


def tables(work: Work, ensemble: Ensemble, count: int) -> None:
    """What is done with the probabilities of the first pictures."""
    asked = asked_by_table(read_table(work.table).head(count))
    facts = work.store.manifest.set_index("image_id").loc[asked["image_id"]].reset_index()
    results = Results(facts, np.full((count, 1), 0.5), [])
    written = compose(ensemble, judge(asked, results, False), results)
    for name in ("submission", "pictures", "problems"):
        run_files.write_table(work.scratch / f"{name}.csv", getattr(written, name))


def turn(row: Row, cores: int) -> None:
    """One turn."""
    torch.set_num_threads(cores)
    start = time.perf_counter()
    row.run()
    row.seconds.append(time.perf_counter() - start)


def summary(
    rows: list[Row], stages: list[dict[str, float]], work: Work, config: Config, encoding: str
) -> dict[str, Any]:
    """What goes into the JSON file, of the rows that have had a turn."""
    turns = {row.name: row.seconds for row in rows if row.seconds}
    pictures = {row.name: row.pictures for row in rows}
    seconds = {name: statistics.median(found) for name, found in turns.items()}
    gpu = torch.cuda.get_device_name() if work.device != "cpu" else None
    processor = platform.processor() or platform.machine()
    found: dict[str, Any] = {
        "machine": {"cpu": processor, "cores": work.cores, "gpu": gpu},
        "encoding": encoding,
        "model": config.model.backbone,
        "size": config.pipeline.height,
        "pictures": work.pictures,
        "rows": [
            {
                "name": name,
                "pictures": pictures[name],
                "breasts_per_s": pictures[name] / PICTURES_A_BREAST / seconds[name],
                "seconds": seconds[name],
                "turns": turns[name],
            }
            for name in turns
        ],
        "ratios": {name: seconds[row] / seconds[OURS] for name, row in BESIDE.items() if row in seconds},
    }
    if ALL_HOST + FEW in turns:
        ours, host = (
            steady_rate({pictures[each]: turns[each] for each in (name + FEW, name)}) for name in (OURS, ALL_HOST)
        )
        found |= {"pictures_per_s_once_running": {OURS: ours, ALL_HOST: host}}
        found["ratios"]["gpu_over_cpu_once_running"] = ours / host
    alone = {name: value for name, value in seconds.items() if name.endswith(" alone")}
    if len(alone) == sum(row.name.endswith(" alone") for row in rows):
        found["slowest_stage_alone"] = max(alone, key=lambda name: alone[name])
        found["ratios"]["over_slowest_stage_alone"] = seconds[OURS] / max(alone.values())
    if stages:
        middle = {name: statistics.median(each[name] for each in stages) for name in STAGES}
        floor = sum(middle.values()) / 1000 * work.pictures / work.cores
        found |= {"cpu_ms_by_stage": middle, "cpu_floor_s": floor}
        found["ratios"]["over_cpu_floor"] = seconds[OURS] / floor
    return found


def show(found: dict[str, Any], console: Console) -> None:
    """Two tables and the ratios."""
    cores, pictures = found["machine"]["cores"], found["pictures"]
    table = Table(title=f"{pictures} DICOM files, {found['model']} at {found['size']}, {cores} cores")
    for name in ("", "files", "breasts/s", "seconds"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in found["rows"]:
        table.add_row(row["name"], str(row["pictures"]), f"{row['breasts_per_s']:.2f}", f"{row['seconds']:.2f}")
    console.print(table)
    ratios = found["ratios"]
    lines = [
        f"mammopipe takes {ratios['over_slowest_stage_alone']:.2f} × the time of {found['slowest_stage_alone']}.",
        *(f"{row} takes {ratios[name]:.2f} × mammopipe's time." for name, row in BESIDE.items() if name in ratios),
    ]
    if "cpu_floor_s" in found:
        listed = ", ".join(f"{stage} {ms:.1f}" for stage, ms in found["cpu_ms_by_stage"].items())
        lines += [
            f"Processor time a picture on one core, ms: {listed}",
            f"mammopipe takes {ratios['over_cpu_floor']:.2f} × the floor, all of that over {cores} cores.",
        ]
    if "gpu_over_cpu_once_running" in ratios:
        rates = ", ".join(f"{name} {rate:.1f}" for name, rate in found["pictures_per_s_once_running"].items())
        lines += [f"Pictures/s once running: {rates}, {ratios['gpu_over_cpu_once_running']:.2f} ×."]
    for line in [*lines, f"Decoded by {', '.join(found['decoders'])}."]:
        console.print(line, highlight=False)


@click.command()
@click.option("--model", default="efficientnet_b3", show_default=True, help="timm's name of the backbone.")
@click.option("--size", type=click.IntRange(32), default=512, show_default=True, help="Side of the model's input.")
@click.option("--device", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True)
@click.option("--encoding", type=click.Choice(list(ENCODINGS)), default="both", show_default=True)
@click.option("--plain/--no-plain", default=True, show_default=True, help="Run the plain script too.")
@click.option("--pictures", type=click.IntRange(8), default=32, show_default=True, help="Files to predict.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Turns of each.")
@click.option("--json", "target", type=click.Path(path_type=Path), default=None, help="Write the figures there.")
def main(
    model: str,
    size: int,
    device: str,
    encoding: str,
    plain: bool,
    pictures: int,
    repeats: int,
    target: Path | None,
) -> None:
    """Measure and show."""
    if device == "gpu" and not torch.cuda.is_available():
        raise click.ClickException("--device gpu: torch sees no GPU here.")
    place = "cuda" if device == "gpu" else "cpu"
    config = load_config(
        None,
        (
            f"model.backbone={model}",
            "model.weights=none",
            f"pipeline.height={size}",
            f"pipeline.width={size}",
        ),
    )
    console, kept = Console(), Figures(target)
    folder = Path(tempfile.mkdtemp(prefix="predict-speed-"))
    try:
        with console.status("Drawing full-size pictures"):
            work = prepare(folder, pictures, config, place, encoding)
        ensemble = open_ensemble([work.run], place)
        decoders: set[str] = set()
        rows, stages = contestants(work, config, ensemble, plain, decoders), []
        if place != "cpu":  # what the first use of a GPU costs a process is none of the rate
            with console.status("Warming up"):
                next(row for row in rows if row.name == OURS + FEW).run()
        for repeat in range(repeats):
            for row in rows:
                with console.status(f"{repeat + 1} of {repeats}: {row.name}"):
                    turn(row, work.cores)
                kept.so_far(**summary(rows, stages, work, config, encoding), decoders=sorted(decoders))
            if place == "cpu":
                stages.append(by_stage(work, ensemble))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = summary(rows, stages, work, config, encoding) | {"decoders": sorted(decoders)}
    kept.final(found)
    show(found, console)


if __name__ == "__main__":
    main()
