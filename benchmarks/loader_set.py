"""The pictures that loader_speed.py measures on: a store's own, in every form that it compares."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
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
class Stored:
    """A store of one level."""

    name: str
    level: str
    codec: Codec

    def root(self, scratch: Path) -> Path:
        """Its folder."""
        return scratch / self.name.replace(" ", "-")


CODECS: tuple[Codec, ...] = ("zstd", "none", "deflate", "lzw", "htj2k")
STORES = (Stored("1024 zstd", "1024", "zstd"), *(Stored(f"{SIDE} {codec}", str(SIDE), codec) for codec in CODECS))
DETECTORS = {Stored(f"{megapixels} MP", str(SIDE), "zstd"): megapixels for megapixels in (5, 28)}


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
    written: dict[Stored, list[dict[str, Any]]] = defaultdict(list)

    def one(number: int, row: int) -> list[tuple[Stored, dict[str, Any]]]:
        return _write(store, rows.iloc[row], scratch, number, sized=number < max(8, count // 4))

    with ThreadPoolExecutor() as pool:
        for tiles in pool.map(one, range(count), chosen.tolist()):
            for stored, described in tiles:
                written[stored].append(described)
    for stored, described in written.items():
        root = stored.root(scratch)
        write_head(root, ConvertSettings(levels=(stored.level,), codec=stored.codec))
        write_manifest(root, described, (stored.level,), {})
        write_rejected(root, [])
    return reopened(scratch)


def _write(
    store: Store, facts: pd.Series, scratch: Path, number: int, sized: bool
) -> list[tuple[Stored, dict[str, Any]]]:
    """One picture in every form; its rows in the stores' manifests. `sized`: from the two detectors too."""
    picture = _full_size(read_level(store.root / facts[level_column("path", store.levels[0])]), number)
    levels = build_levels(picture, ("1024", str(SIDE)))
    small = levels[str(SIDE)]
    exposure = Exposure(str(number), str(1000 + number), str(facts["laterality"] or "L"), "CC", 60, False, 0.07, 0)
    (scratch / f"{number}.dcm").write_bytes(write(picture, MACHINES[0], exposure))
    cv2.imwrite(str(scratch / f"{number}.png"), windowed(small))
    np.save(scratch / f"{number}.npy", small)
    described = _row(number, facts, picture)
    found = [(stored, _tile(scratch, stored, described, levels[stored.level])) for stored in STORES]
    for stored, megapixels in DETECTORS.items() if sized else ():
        seen = _sized(picture, megapixels)
        level = build_levels(seen, (str(SIDE),))[str(SIDE)]
        found.append((stored, _tile(scratch, stored, _row(number, facts, seen), level)))
    return found


def reopened(scratch: Path) -> Benchmarked:
    """A set that `prepare` wrote, in another process too."""
    dicom, png8, npy16 = (sorted(scratch.glob(f"*.{ending}")) for ending in ("dcm", "png", "npy"))
    stores = {each.name: open_store(each.root(scratch)) for each in (*STORES, *DETECTORS)}
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


def _tile(scratch: Path, stored: Stored, row: dict[str, Any], picture: NDArray[np.uint16]) -> dict[str, Any]:
    path = Path("tiles") / f"{row['image_id']}{suffix(stored.codec)}"
    tile = write_level(stored.root(scratch) / path, picture, stored.codec)
    values = {"path": str(path), "height": picture.shape[0], "width": picture.shape[1], "crc32": tile.crc32}
    return row | {level_column(field, stored.level): values[field] for field in LEVEL_COLUMNS if field in values}
