"""Conversion of full-size pictures: milliseconds a picture and a core, by transfer syntax and stage.

    python benchmarks/convert_speed.py [--pictures N] [--repeats N] [--device cpu|gpu] [--json FILE]

Beside it, in the same run and interleaved: the bare codecs (the fastest decoder found, and imagecodecs' predictor and
Zstandard on the tiles of the levels written, with neither checks nor files), and a plain script (pydicom, OpenCV's Otsu
crop and area resize, the same levels as 16-bit PNG). Medians over pictures and repeats. The pictures are synthetic,
3328 by 2560, and are made first. With --device gpu the whole `convert` alone is measured, of JPEG 2000 and lossless
JPEG, on all cores, decoding on them and on the GPU.
"""

from __future__ import annotations

import platform
import shutil
import statistics
import sys
import tempfile
import time
import uuid
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import cv2
import dicomsdl
import imagecodecs
import numpy as np
import pandas as pd
import pydicom
from drawn import dicom_files, draw
from kept import Figures, steady_rate
from numpy.typing import NDArray
from pydicom import uid
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder
from rich.console import Console
from rich.table import Table

from preprocessing import decode, grayscale, ingest, tiles
from preprocessing.breast import find_breast
from preprocessing.convert import convert
from preprocessing.gpu_decode import gpu_answers
from preprocessing.machine import available_cores
from preprocessing.manifest import open_store
from preprocessing.settings import ConvertSettings
from preprocessing.table import Source

SYNTAXES = {
    "native": uid.ExplicitVRLittleEndian,
    "RLE": uid.RLELossless,
    "JPEG Lossless SV1": uid.JPEGLosslessSV1,
    "JPEG-LS": uid.JPEGLSLossless,
    "JPEG 2000": uid.JPEG2000Lossless,
}
ON_GPU = ("JPEG 2000", "JPEG Lossless SV1")
RATIOS = ("total / bare", "plain / total")
STAGES = ("decode", "crop", "levels", "encode", "write")
SETTINGS = ConvertSettings()
Seconds = dict[str, float]


@dataclass(frozen=True)
class Picture:
    """A DICOM file in one transfer syntax."""

    syntax: str
    path: Path

    @property
    def source(self) -> Source:
        """As the conversion gets it."""
        return Source(self.path.stem, self.path.name, {"patient_id": "p", "image_id": self.path.stem})


def write_pictures(folder: Path, count: int, syntaxes: Iterable[str]) -> list[Picture]:
    """`count` 12-bit pictures of full size, each in every one of the transfer syntaxes."""
    drawn, made = draw(count), []
    for name in syntaxes:
        for number, data in enumerate(dicom_files(drawn, SYNTAXES[name])):
            path = folder / f"{name.replace(' ', '-')}-{number}.dcm"
            path.write_bytes(data)
            made.append(Picture(name, path))
    return made


def by_stage(picture: Picture, store: Path) -> Seconds:
    """The stages of a worker's part, each by itself; "write" holds the files, their comparison and the source's hash.

    "disk" is what comes after, while the worker is at the next picture: the wait until the files would outlast a power
    cut. It takes no core, so "total" is without it; the whole `convert`, measured apart, has it.
    """
    spent: Seconds = {}

    def timed(stage: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        spent[stage] = spent.get(stage, 0.0) + time.perf_counter() - start
        return result

    def decoded() -> NDArray[np.uint16]:
        found = decode.decode(picture.path, SETTINGS)
        return grayscale.to_tile_values(found, found.header.photometric == "MONOCHROME1")

    values = timed("decode", decoded)
    found = timed("crop", lambda: find_breast(values, SETTINGS.crop_margin))
    levels = timed("levels", lambda: tiles.build_levels(values[found.crop.slices], SETTINGS.levels))
    for level in {id(level): level for level in levels.values()}.values():
        timed("encode", lambda level=level: tiles.encode_level(level))
    job = ingest.Job(picture.path.parent, store, SETTINGS, picture.source)
    staged = timed("total", lambda: ingest.stage(job))
    timed("disk", lambda: ingest.settle(staged))
    spent["write"] = spent["total"] - sum(spent[stage] for stage in STAGES if stage != "write")
    return spent


def bare_decoders(picture: Picture) -> dict[str, Callable[[], Any]]:
    """Decoders of the frame with nothing around them."""
    dataset = pydicom.dcmread(picture.path)
    rows, columns, pixels = dataset.Rows, dataset.Columns, dataset.PixelData
    opened = dicomsdl.open_file(str(picture.path))  # pyright: ignore[reportAttributeAccessIssue]
    into = np.empty((rows, columns), np.uint16)
    candidates: dict[str, Callable[[], Any]] = {"dicomsdl": lambda: opened.copyFrameData(0, into)}
    if picture.syntax == "native":
        candidates["numpy"] = lambda: np.frombuffer(pixels, "<u2").reshape(rows, columns).copy()
        return candidates
    frame = next(generate_frames(pixels, number_of_frames=1))
    codec = {
        "JPEG Lossless SV1": imagecodecs.jpeg8_decode,
        "JPEG-LS": imagecodecs.jpegls_decode,
        "JPEG 2000": lambda data: imagecodecs.jpeg2k_decode(data, numthreads=1),
    }.get(picture.syntax)
    if codec is not None:
        candidates["imagecodecs"] = lambda: codec(frame)
    decoder = get_decoder(dataset.file_meta.TransferSyntaxUID)
    plugin = next((name for name in decoder.available_plugins if name == "pylibjpeg"), "")
    if plugin:
        candidates["pylibjpeg"] = lambda: decoder.as_array(dataset, decoding_plugin=plugin, raw=True)
    return candidates


def bare_encode(levels: list[tiles.Level]) -> None:
    """Horizontal differences and Zstandard level 3 of each tile, in memory."""
    side = SETTINGS.tile
    for level in levels:
        for top in range(0, level.shape[0], side):
            for left in range(0, level.shape[1], side):
                tile = np.zeros((side, side), np.uint16)
                part = level[top : top + side, left : left + side]
                tile[: part.shape[0], : part.shape[1]] = part
                imagecodecs.zstd_encode(imagecodecs.delta_encode(tile, axis=-1).data, level=3)  # pyright: ignore[reportArgumentType]


def plain_script(picture: Picture, out: Path) -> None:
    """What a script of a few lines does: no guard, no comparison, no checksums."""
    values = pydicom.dcmread(picture.path).pixel_array
    scaled = cv2.normalize(values, np.empty(0), 0, 255, cv2.NORM_MINMAX, cv2.CV_8U)
    _, mask = cv2.threshold(scaled, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    contours = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[-2]
    left, top, width, height = cv2.boundingRect(max(contours, key=cv2.contourArea))
    crop = values[top : top + height, left : left + width]
    for level, (rows, columns) in tiles.level_sizes(SETTINGS.levels, *crop.shape).items():
        cv2.imwrite(str(out / f"{level}.png"), cv2.resize(crop, (columns, rows), interpolation=cv2.INTER_AREA))


def measure_once(picture: Picture, work: Path) -> Seconds:
    """Every contestant on one picture."""
    store = work / uuid.uuid4().hex
    ingest.scratch_folder(store).mkdir(parents=True)
    spent = by_stage(picture, store)
    for name, decoder in bare_decoders(picture).items():
        start = time.perf_counter()
        decoder()
        spent[f"bare {name}"] = time.perf_counter() - start
    written = [tiles.read_level(path) for path in store.rglob("*.tif")]
    start = time.perf_counter()
    bare_encode(written)
    spent["bare encode"] = time.perf_counter() - start
    start = time.perf_counter()
    plain_script(picture, work)
    spent["plain script"] = time.perf_counter() - start
    start = time.perf_counter()
    for path in store.rglob("*.tif"):  # what reading back costs at the least
        data = path.read_bytes()
        zlib.crc32(data)
        tiles.decode_level(data)
    spent["read back"] = time.perf_counter() - start
    return spent


def summarise(measured: dict[str, list[Seconds]]) -> list[dict[str, Any]]:
    """One row a transfer syntax, in milliseconds, with the ratios that matter."""
    rows = []
    for syntax, runs in measured.items():
        middle = {name: 1000 * statistics.median(run[name] for run in runs) for name in runs[0]}
        bare = {n: v for n, v in middle.items() if n.startswith("bare ") and n != "bare encode"}
        fastest = min(bare, key=lambda name: bare[name])
        floor = bare[fastest] + middle["bare encode"]
        rows.append(
            {"syntax": syntax}
            | {name: round(middle[name], 1) for name in (*STAGES, "total", "disk", "read back")}
            | {"fastest decoder": fastest.removeprefix("bare "), "bare decode": round(bare[fastest], 1)}
            | {name: round(middle[name], 1) for name in ("bare encode", "plain script")}
            | {"total / bare": round(middle["total"] / floor, 2)}
            | {"plain / total": round(middle["plain script"] / middle["total"], 2)}
        )
    return rows


def scaling(pictures: list[Picture], work: Path, copies: int) -> dict[str, Any]:
    """Pictures a second of the whole `convert`, on one process and on one a core."""
    counts = sorted({1, available_cores()})
    spent = {count: converted(pictures, work, copies, SETTINGS, workers=count)[0] for count in counts}
    rates = {count: copies * len(pictures) / seconds for count, seconds in spent.items()}
    cores = max(rates)
    return {"cores": cores, "pictures_per_s": rates, "efficiency": round(rates[cores] / rates[1] / cores, 2)}


def on_gpu(pictures: list[Picture], work: Path, copies: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Pictures a second of the whole `convert` on all cores, decoding on them and on the GPU, by transfer syntax.

    Conversions of few and of many files are measured: the rate is that of the files more, which the start of the
    processes, and of CUDA, is not part of. The GPU gets four times as many as the cores.
    """
    for syntax in dict.fromkeys(picture.syntax for picture in pictures):
        files = [picture for picture in pictures if picture.syntax == syntax]
        seconds: dict[str, dict[int, list[float]]] = {"cpu": defaultdict(list), "gpu-all": defaultdict(list)}
        decoders: set[str] = set()
        for _ in range(repeats):
            for place, found in seconds.items():
                for count in (copies // 8, copies // 2 if place == "cpu" else 2 * copies):
                    spent, used = converted(files, work, count, SETTINGS.model_copy(update={"decode_on": place}))
                    found[count * len(files)].append(spent)
                    decoders |= used if place != "cpu" else set()
        rates = {place: steady_rate(found) for place, found in seconds.items()}
        yield {
            "syntax": syntax,
            "pictures_per_s": rates,
            "seconds": seconds,
            "gpu / cpu": rates["gpu-all"] / rates["cpu"],
            "decoders": sorted(decoders),
        }


def converted(
    files: list[Picture], work: Path, copies: int, settings: ConvertSettings, workers: int = 0
) -> tuple[float, set[str]]:
    """Seconds of a conversion of so many copies of each file, and who decoded them."""
    table, out = work / f"{uuid.uuid4().hex}.csv", work / uuid.uuid4().hex
    lines = [
        {"patient_id": "p", "image_id": f"{file.path.stem}-{copy}", "file": file.path.name}
        for file in files
        for copy in range(copies)
    ]
    pd.DataFrame(lines).to_csv(table, index=False)
    start = time.perf_counter()
    convert(files[0].path.parent, table, out, settings, workers=workers)
    spent = time.perf_counter() - start
    used = set(open_store(out).manifest["decoder"])
    shutil.rmtree(out)
    return spent, used


@click.command()
@click.option("--device", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True)
@click.option("--pictures", type=click.IntRange(1), default=2, show_default=True, help="Pictures a transfer syntax.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Rounds over all of them.")
@click.option("--json", "out", type=click.Path(path_type=Path), default=None, help="Write the figures to this file.")
def main(device: str, pictures: int, repeats: int, out: Path | None) -> None:
    """Measure conversion by transfer syntax and stage, beside bare codecs and a plain script."""
    if device == "gpu" and not gpu_answers():
        raise click.ClickException("--device gpu: no NVIDIA GPU answers here.")
    cv2.setNumThreads(1)
    screen, kept = Console(width=None if sys.stdout.isatty() else 140), Figures(out)
    machine = {"processor": platform.processor() or platform.machine(), "cores": available_cores()}
    with tempfile.TemporaryDirectory(prefix="convert-speed-") as folder:
        images, work = Path(folder) / "images", Path(folder) / "work"
        images.mkdir()
        work.mkdir()
        with screen.status("Drawing full-size pictures ..."):
            drawn = write_pictures(images, pictures, ON_GPU if device == "gpu" else SYNTAXES)
        if device == "gpu":
            found, ratios = [], {}
            for row in on_gpu(drawn, work, copies=64, repeats=repeats):
                found.append(row)
                ratios = {f"gpu_over_cpu {each['syntax']}": each["gpu / cpu"] for each in found}
                kept.so_far(machine=machine, rows=found, ratios=ratios)
                rates = row["pictures_per_s"]
                screen.print(
                    f"convert, {row['syntax']}, once it runs: {rates['gpu-all']:.1f} pictures/s with the GPU, "
                    f"{rates['cpu']:.1f} without; decoded by {', '.join(row['decoders'])}"
                )
            kept.final({"machine": machine, "rows": found, "ratios": ratios})
            return
        measured: dict[str, list[Seconds]] = defaultdict(list)
        with screen.status("Measuring ..."):
            for turn in range(repeats + 1):
                for picture in drawn:
                    spent = measure_once(picture, work)
                    if turn:  # the first round warms caches up
                        measured[picture.syntax].append(spent)
        with screen.status("Converting on one core and on all ..."):
            scaled = scaling(drawn, work, copies=3)
    rows = summarise(measured)
    screen.print("Milliseconds a picture on one core: 3328 × 2560, 12 bits, levels full to 512, zstd.")
    for title, names in (
        ("By stage", (*STAGES, "total", "disk")),
        ("Beside others", ("total", "fastest decoder", "bare decode", "bare encode", "plain script", *RATIOS)),
    ):
        shown = Table(title=title, title_justify="left")
        for name in ("syntax", *names):
            shown.add_column(name, justify="left" if name in ("syntax", "fastest decoder") else "right")
        for row in rows:
            shown.add_row(*(str(row[name]) for name in ("syntax", *names)))
        screen.print(shown)
    rates = ", ".join(f"{rate:.2f} pictures/s on {count}" for count, rate in scaled["pictures_per_s"].items())
    screen.print(f"convert: {rates} core(s), start of the processes included; efficiency {scaled['efficiency']}.")
    kept.final({"machine": machine, "rows": rows, "scaling": scaled})


if __name__ == "__main__":
    main()
