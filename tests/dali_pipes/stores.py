"""A tiny store made by hand, with smooth pictures whose every fact is known."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

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
from preprocessing.settings import ConvertSettings
from preprocessing.tiles import build_levels, suffix, write_level

LEVELS = ("full", "128", "64")


def smooth(height, width, seed, top=4095):
    """A smooth picture with a bright left side, uint16 in [0, top]."""
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.standard_normal((height, width)).astype(np.float32), (0, 0), 3)
    ramp = np.linspace(1, 0, width, dtype=np.float32)[None] + noise / np.abs(noise).max() / 2
    return np.clip(ramp * top * 0.7 + 100, 0, top).astype(np.uint16)


def facts(image, picture, **changed):
    """A manifest row without its levels."""
    height, width = picture.shape
    row = dict.fromkeys(COLUMNS) | {
        "image_id": f"i{image:03d}",
        "patient_id": f"p{image // 4:03d}",
        "laterality": "LR"[image % 2],
        "view": ("CC", "MLO")[image // 2 % 2],
        "prediction_id": f"p{image // 4:03d}_{'LR'[image % 2]}",
        "cancer": float(image % 5 == 0),
        "site_id": "1",
        "machine_id": "49",
        "source_path": f"i{image:03d}.dcm",
        "format": "dicom",
        "photometric": "MONOCHROME2",
        "policy": "",
        "bits_stored": 12,
        "value_offset": 0,
        "inverted": False,
        "rescale_slope": 1.0,
        "rescale_intercept": 0.0,
        "window_center": [2048.0],
        "window_width": [4096.0],
        "window_function": ["LINEAR"],
        "voi_lut": [],
        "padding": [],
        "percentile_low": float(np.percentile(picture, 0.5)),
        "percentile_high": float(np.percentile(picture, 99.5)),
        "source_rows": height,
        "source_columns": width,
        "crop_top": 0,
        "crop_left": 0,
        "crop_height": height,
        "crop_width": width,
        "pixel_spacing": 0.1,
    }
    return row | changed


def make_store(root: Path, count=20, codec="zstd", sizes=((200, 120), (160, 100), (240, 150)), change=None) -> Store:
    """A finished store; `change(image)` gives columns to set differently."""
    settings = ConvertSettings(levels=LEVELS, codec=codec, tile=64)
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for image in range(count):
        picture = smooth(*sizes[image % len(sizes)], seed=image)
        row = facts(image, picture, **(change(image) if change else {}))
        for level, array in build_levels(picture, LEVELS).items():
            path = Path("tiles") / level / row["patient_id"] / f"{row['image_id']}{suffix(codec)}"
            written = write_level(root / path, array, codec, settings.tile)
            values = {"path": str(path), "height": array.shape[0], "width": array.shape[1], "crc32": written.crc32}
            row |= {level_column(name, level): values[name] for name in LEVEL_COLUMNS if name in values}
        rows.append(row)
    write_head(root, settings)
    write_manifest(root, rows, LEVELS, {})
    write_rejected(root, [])
    return open_store(root)


def flipped(path: Path, bit: int):
    """Flip a bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))
