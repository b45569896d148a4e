"""Which codec decodes where: bit-exactly or not, a region alone or not, and how fast.

    python benchmarks/codec_speed.py [--device cpu|gpu] [--json FILE]

Tiles: each codec that a store can have, at its smallest level and at full size, decoded by DALI on the device
(`mixed`) beside threads on all cores that decode with imagecodecs and upload. Sources: JPEG 2000, HTJ2K and lossless
JPEG codestreams of DICOM files at full size, decoded by nvImageCodec one at a time, as batches, and as `convert` has it
do ("served"), beside processes on all cores. Every output is compared with the values that went in. Medians over turns;
the pictures are synthetic, 3328 by 2560, 12 bits. Without a GPU the host's columns alone are filled.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click
import imagecodecs
import numpy as np
import torch
from codec_work import gpu_count, host_count, host_decode
from drawn import draw
from kept import Figures
from numpy.typing import NDArray
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType
from rich.console import Console
from rich.table import Table

from dali_pipes.decode import decode as decode_on_host
from dali_pipes.pipelines import decode, decode_region
from preprocessing import gpu_decode
from preprocessing.machine import available_cores
from preprocessing.settings import Codec
from preprocessing.tiles import build_levels, encode_level
from preprocessing.workers import worker_context

TILE_CODECS: tuple[Codec, ...] = ("zstd", "none", "lzw", "deflate", "htj2k")
LEVELS = ("512", "full")
BATCH = {"512": 64, "full": 8}
REGION = 512  # rows and columns of a region of the full level
Pictures = list[NDArray[np.uint16]]


def timed(call: Callable[[], Any], seconds: float, turns: int) -> float:
    """Median seconds of a call, after one that does not count; each turn calls until `seconds` have passed."""
    call()
    found = []
    for _ in range(turns):
        began, calls = time.perf_counter(), 0
        while not calls or time.perf_counter() - began < seconds:
            call()
            calls += 1
        found.append((time.perf_counter() - began) / calls)
    return statistics.median(found)


def attempt(call: Callable[[], Any]) -> Any:
    """A call's result, or in a few words why there is none."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001  what a decoder cannot do is a finding
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error).strip() else ''}"


class Mixed:
    """DALI's decoder over one batch of files, whole or a region.

    Args:
        files: encoded levels.
        region: top, left, rows, columns, or None for the whole.
        device: "mixed", or "cpu" for DALI's host decoders.
        threads: of DALI.
    """

    def __init__(self, files: Sequence[bytes], region: Sequence[int] | None, device: str, threads: int) -> None:
        fed = [np.frombuffer(data, np.uint8) for data in files]
        self._pipeline = Pipeline(len(files), threads, device_id=None if device == "cpu" else 0, exec_dynamic=True)
        with self._pipeline:
            tiles = fn.external_source(source=lambda: fed, batch=True, dtype=DALIDataType.UINT8, ndim=1)
            if region is None:
                self._pipeline.set_outputs(decode(tiles, device))
            else:
                where = [np.array(region, np.int32)] * len(files)
                cut = fn.external_source(source=lambda: where, batch=True, dtype=DALIDataType.INT32, ndim=1)
                self._pipeline.set_outputs(decode_region(tiles, cut, device))
        self._pipeline.build()

    def __call__(self) -> Any:
        """A decoded batch."""
        (output,) = self._pipeline.run()
        return output

    def arrays(self) -> list[NDArray[Any]]:
        """The same on the host, [rows, columns] each."""
        output = self().as_cpu()
        return [np.array(output.at(place))[..., 0] for place in range(len(output))]


def on_host(pool: ThreadPoolExecutor, files: Sequence[bytes], sizes: Sequence[tuple[int, int]], device: str) -> Any:
    """The batch decoded in threads and, with a GPU, uploaded."""
    levels = pool.map(decode_on_host, files, sizes)
    if device == "cpu":
        return list(levels)
    uploaded = [torch.from_numpy(level.view(np.int16)).cuda(non_blocking=True) for level in levels]
    torch.cuda.synchronize()
    return uploaded


def equal(found: Sequence[Any], expected: Pictures) -> bool:
    """Whether every picture is what went in."""
    return len(found) == len(expected) and all(map(np.array_equal, found, expected))


def tile_rows(pictures: Pictures, device: str, cores: int, seconds: float, turns: int) -> Iterator[dict[str, Any]]:
    """Each codec at each level."""
    place = "mixed" if device == "gpu" else "cpu"
    with ThreadPoolExecutor(cores) as pool:
        for level in LEVELS:
            made = [build_levels(picture, (level,))[level] for picture in pictures]
            expected = [made[i % len(made)] for i in range(BATCH[level])]
            region = (REGION, REGION // 2, REGION, REGION)
            cut = [each[REGION : 2 * REGION, REGION // 2 : REGION // 2 + REGION] for each in expected]
            for codec in TILE_CODECS:
                once = list(pool.map(partial(encode_level, codec=codec), made))
                files = [once[i % len(once)] for i in range(BATCH[level])]
                row: dict[str, Any] = {"codec": codec, "level": level, "bytes_share": _share(files, expected)}
                sizes = [each.shape for each in expected]
                host = partial(on_host, pool, files, sizes, device)
                row["host_images_per_s"] = len(files) / timed(host, seconds, turns)
                row |= attempt_dali(files, expected, None, place, cores, seconds, turns, "dali")
                if level == "full":
                    row |= attempt_dali(files, cut, region, place, cores, seconds, turns, "dali_region")
                yield row


def attempt_dali(
    files: Sequence[bytes],
    expected: Pictures,
    region: Sequence[int] | None,
    place: str,
    threads: int,
    seconds: float,
    turns: int,
    name: str,
) -> dict[str, Any]:
    """Whether DALI's decoder gives the values, and its rate; or why it does not decode."""

    def measure() -> dict[str, Any]:
        batch = Mixed(files, region, place, threads)
        exact = equal(batch.arrays(), expected)
        return {f"{name}_exact": exact, f"{name}_images_per_s": len(files) / timed(batch, seconds, turns)}

    found = attempt(measure)
    return found if isinstance(found, dict) else {f"{name}_error": found}


def codestreams(pictures: Pictures) -> dict[str, list[bytes]]:
    """The pictures as DICOM files hold them."""
    encoders: dict[str, Callable[[Any], bytes | bytearray]] = {
        "JPEG 2000": lambda a: imagecodecs.jpeg2k_encode(a, level=0, codecformat="j2k", bitspersample=12),
        "HTJ2K": lambda a: imagecodecs.htj2k_encode(a, reversible=True),
        "JPEG Lossless SV1": lambda a: imagecodecs.jpeg8_encode(a, lossless=True, predictor=1, bitspersample=12),
    }
    with ThreadPoolExecutor() as pool:
        return {name: [bytes(data) for data in pool.map(encode, pictures)] for name, encode in encoders.items()}


def source_rows(pictures: Pictures, device: str, cores: int, turns: int) -> Iterator[dict[str, Any]]:
    """Each codestream, on the host's cores and on the GPU."""
    context, served = worker_context(), None
    with ProcessPoolExecutor(cores, mp_context=context) as host, ExitStack() as serving:
        for name, files in codestreams(pictures).items():
            row: dict[str, Any] = {"codestream": name}
            row["host_exact"] = equal([host_decode(data) for data in files[:1]], pictures[:1])
            began = time.perf_counter()
            host_decode(files[0])
            row["host_core_ms"] = 1000 * (time.perf_counter() - began)
            row["host_images_per_s"] = across(host, host_count, files, cores, turns)
            if device == "gpu":
                row |= attempt_gpu(files, pictures, turns)
                if served is None:
                    address = serving.enter_context(gpu_decode.serving(context))
                    connected = {"initializer": gpu_decode.connect, "initargs": (address,)}
                    served = serving.enter_context(ProcessPoolExecutor(cores, mp_context=context, **connected))
                rate = attempt(partial(across, served, gpu_count, files, cores, turns))
                row["gpu_served_images_per_s"] = rate
                if isinstance(rate, str):  # what broke them on one codestream is no finding on the next
                    serving.close()
                    served = None
            yield row


def across(
    pool: ProcessPoolExecutor, work: Callable[..., int], files: Sequence[bytes], cores: int, turns: int
) -> float:
    """Images/s of all processes together, each with a share of the files."""
    each = [(list(files) * 2)[:2]] * cores
    seconds = []
    for _ in range(1 + turns):  # the first one starts the processes
        began = time.perf_counter()
        done = sum(pool.map(work, each))
        seconds.append(time.perf_counter() - began)
        if done < 2 * cores:
            raise RuntimeError(f"{done} of {2 * cores} decoded")
    return 2 * cores / statistics.median(seconds[1:])


def attempt_gpu(files: Sequence[bytes], pictures: Pictures, turns: int) -> dict[str, Any]:
    """nvImageCodec in this process: one at a time, and as one batch."""

    def measure() -> dict[str, Any]:
        one, batched = gpu_decode.open_decoder(1), gpu_decode.open_decoder()
        some = (list(files) * 8)[:16]
        return {
            "gpu_exact": equal(one(files), pictures),
            "gpu_images_per_s": 1 / timed(partial(one, files[:1]), 0.3, turns),
            "gpu_batch_images_per_s": len(some) / timed(partial(batched, some), 0.3, turns),
        }

    result = attempt(measure)
    return result if isinstance(result, dict) else {"gpu_error": result}


def _share(files: Sequence[bytes], pictures: Pictures) -> float:
    return sum(map(len, files)) / sum(picture.nbytes for picture in pictures)


def show(found: dict[str, Any], console: Console) -> None:
    """The two tables."""
    for key, title in (("tiles", "Levels of a store"), ("sources", "Codestreams of DICOM files")):
        names = list(dict.fromkeys(name for row in found[key] for name in row))
        table = Table(title=title)
        for name in names:
            table.add_column(name.replace("_", " "), justify="left" if name in ("codec", "level") else "right")
        for row in found[key]:
            table.add_row(*(_cell(row.get(name, "")) for name in names))
        console.print(table)


def _cell(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 10
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


@click.command()
@click.option("--device", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True)
@click.option("--pictures", type=click.IntRange(1), default=8, show_default=True, help="Pictures drawn.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Turns of each.")
@click.option("--seconds", type=float, default=0.4, show_default=True, help="Length of a turn.")
@click.option("--json", "target", type=click.Path(path_type=Path), default=None, help="Write the figures there.")
def main(device: str, pictures: int, repeats: int, seconds: float, target: Path | None) -> None:
    """Measure and show."""
    if device == "gpu" and not torch.cuda.is_available():
        raise click.ClickException("--device gpu: torch sees no GPU here.")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # the one inside DALI warns of each codestream without colours
    console, cores, kept = Console(), available_cores(), Figures(target)
    drawn = [picture.stored for picture in draw(pictures)]
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": cores,
        "gpu": torch.cuda.get_device_name() if device == "gpu" else None,
    }
    found: dict[str, Any] = {"machine": machine, "sources": [], "tiles": []}
    for name, rows in (
        ("sources", source_rows(drawn, device, cores, repeats)),
        ("tiles", tile_rows(drawn, device, cores, seconds, repeats)),
    ):
        for row in rows:
            found[name].append(row)
            kept.so_far(**found)
    kept.final(found)
    show(found, console)


if __name__ == "__main__":
    main()
