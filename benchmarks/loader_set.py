"""The pictures that loader_speed.py measures on: a store's own, in every form that it compares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from preprocessing.convert import convert
from preprocessing.manifest import (
    COLUMNS,
    LEVEL_COLUMNS,
    Store,
    level_column,
    open_store,
    write_head,
    write_manifest,
    write_rejected,
)
from preprocessing.settings import Codec, ConvertSettings
from preprocessing.synth import synthesize
from preprocessing.synth_dicom import MACHINES, Exposure, write
from preprocessing.tiles import build_levels, read_level, suffix, write_level

SIDE = 512
BITS = 12
DETECTOR = 3328  # longest side of an 8.5 megapixel detector
WINDOW = (0.46 * 4095, 0.80 * 4095)  # centre and width of the synthetic machine's tissue


@dataclass(frozen=True)
class Benchmarked:
    """A set of pictures on disk.

    Attributes:
        dicom, png8, npy16: files for the conventional stack: full size; windowed at 512; 16-bit at 512.
        stores: by name of level and codec.
    """

    dicom: list[Path]
    png8: list[Path]
    npy16: list[Path]
    stores: dict[str, Store]


def source_store(path: Path | None, scratch: Path) -> Store:
    """The store asked for, or a small synthetic one where there is none."""
    if path is not None and (path / "manifest.parquet").is_file():
        return open_store(path)
    synthesize(scratch / "rsna", patients=6, test_patients=2)
    convert(scratch / "rsna" / "train_images", scratch / "rsna" / "train.csv", scratch / "synthetic")
    return open_store(scratch / "synthetic")


def prepare(store: Store, scratch: Path, count: int) -> Benchmarked:
    """Write the set.

    Each picture's largest level is enlarged to the same full detector size where it is smaller (fine noise makes up for
    the detail that enlarging cannot give, so that codecs have as much to do), and stored in 12 bits. Everything else is
    made from that.

    Args:
        store: where the pictures come from.
        scratch: folder to write to.
        count: pictures; a store with fewer gives some twice, as files of their own.
    """
    rows = store.manifest
    chosen = np.linspace(0, len(rows), count, endpoint=False).astype(int)
    scratch.mkdir(parents=True)
    found = Benchmarked([], [], [], {})
    written: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(chosen):
        facts = rows.iloc[int(row)]
        picture = _full_size(read_level(store.root / facts[level_column("path", store.levels[0])]), number)
        levels = build_levels(picture, ("1024", str(SIDE)))
        small = levels[str(SIDE)]
        exposure = Exposure(str(number), str(1000 + number), str(facts["laterality"] or "L"), "CC", 60, False, 0.07, 0)
        found.dicom.append(scratch / f"{number}.dcm")
        found.dicom[-1].write_bytes(write(picture, MACHINES[0], exposure))
        found.png8.append(scratch / f"{number}.png")
        cv2.imwrite(str(found.png8[-1]), windowed(small))
        found.npy16.append(scratch / f"{number}.npy")
        np.save(found.npy16[-1], small)
        described = _row(number, facts, picture)
        for name in ("1024", "512"):
            _add(scratch, written, f"{name} zstd", name, "zstd", described, levels[name])
        for codec in ("none", "deflate", "lzw", "htj2k"):
            _add(scratch, written, f"512 {codec}", "512", codec, described, small)
        if number < max(8, count // 4):
            for megapixels in (5, 28):
                sized = _sized(picture, megapixels)
                level = build_levels(sized, (str(SIDE),))[str(SIDE)]
                _add(scratch, written, f"{megapixels} MP", "512", "zstd", _row(number, facts, sized), level)
    for name, described in written.items():
        root = scratch / name.replace(" ", "-")
        level, codec = described[0].pop("_level"), described[0].pop("_codec")
        for row in described[1:]:
            del row["_level"], row["_codec"]
        write_head(root, ConvertSettings(levels=(level,), codec=codec))
        write_manifest(root, described, (level,), {})
        write_rejected(root, [])
        found.stores[name] = open_store(root)
    return found


def reopened(scratch: Path) -> Benchmarked:
    """A set that `prepare` wrote, from another process."""
    dicom, png8, npy16 = (sorted(scratch.glob(f"*.{ending}")) for ending in ("dcm", "png", "npy"))
    stores = {path.parent.name.replace("-", " "): open_store(path.parent) for path in scratch.glob("*/store.json")}
    return Benchmarked(dicom, png8, npy16, stores)


def windowed(picture: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """The picture through its window (PS3.3 C.11.2.1.2.1), 8 bits."""
    center, width = WINDOW
    shown = (picture.astype(np.float32) - (center - 0.5)) / (width - 1) + 0.5
    return (np.clip(shown, 0, 1) * 255 + 0.5).astype(np.uint8)


def _full_size(picture: NDArray[np.uint16], seed: int) -> NDArray[np.uint16]:
    top = 2**BITS - 1
    if picture.max() > top:
        picture = (picture >> (int(picture.max()).bit_length() - BITS)).astype(np.uint16)
    if max(picture.shape) >= DETECTOR:
        return picture
    enlarged = _resized(picture, DETECTOR / max(picture.shape))
    noise = np.random.default_rng(seed).normal(0, top * 0.006, enlarged.shape).astype(np.float32)
    return np.clip(enlarged + noise + 0.5, 0, top).astype(np.uint16)


def _resized(picture: NDArray[np.uint16], scale: float) -> NDArray[Any]:
    size = round(picture.shape[1] * scale), round(picture.shape[0] * scale)
    return np.asarray(cv2.resize(picture.astype(np.float32), size, interpolation=cv2.INTER_LINEAR))


def _sized(picture: NDArray[np.uint16], megapixels: float) -> NDArray[np.uint16]:
    return np.clip(_resized(picture, (megapixels * 1e6 / picture.size) ** 0.5), 0, 2**BITS - 1).astype(np.uint16)


def _row(number: int, facts: pd.Series, picture: NDArray[np.uint16]) -> dict[str, Any]:
    row = {name: facts.get(name) for name in COLUMNS}
    height, width = picture.shape
    return row | {
        "image_id": f"i{number}",
        "patient_id": f"p{number}",
        "cancer": float(number % 2),
        "bits_stored": BITS,
        "value_offset": 0,
        "inverted": False,
        "rescale_slope": 1.0,
        "rescale_intercept": 0.0,
        "window_center": [WINDOW[0]],
        "window_width": [WINDOW[1]],
        "window_function": ["LINEAR"],
        "voi_lut": [],
        "padding": [],
        "crop_height": height,
        "crop_width": width,
    }


def _add(
    scratch: Path,
    written: dict[str, list[dict[str, Any]]],
    name: str,
    level: str,
    codec: Codec,
    row: dict[str, Any],
    picture: NDArray[np.uint16],
) -> None:
    path = Path("tiles") / f"{row['image_id']}{suffix(codec)}"
    tile = write_level(scratch / name.replace(" ", "-") / path, picture, codec)
    values = {"path": str(path), "height": picture.shape[0], "width": picture.shape[1], "crc32": tile.crc32}
    described = row | {level_column(field, level): values[field] for field in LEVEL_COLUMNS if field in values}
    written.setdefault(name, []).append(described | {"_level": level, "_codec": codec})
