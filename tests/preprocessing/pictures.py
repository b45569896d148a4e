"""Small PNG pictures with a breast in them, and the digest of a store, for the tests of conversion."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np

HEADER = "site_id,patient_id,image_id,laterality,view,age,cancer,biopsy,implant,density,machine_id,BIRADS"


def picture(seed: int, rows: int = 180, columns: int = 140) -> np.ndarray:
    """uint16 [rows, columns]: a textured half disc at the left edge on a dark background."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:rows, 0:columns]
    radius = rows * rng.uniform(0.25, 0.42)
    breast = (y - rows / 2) ** 2 + x**2 < radius**2
    return np.where(breast, rng.integers(900, 3500, (rows, columns)), rng.integers(0, 12, (rows, columns))).astype(
        np.uint16
    )


def write_png(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture(seed))


def data_set(root: Path, count: int = 12) -> tuple[Path, Path]:
    """`count` pictures of `count` / 4 patients with their table; returns images folder and CSV."""
    images, lines = root / "train_images", [HEADER]
    for number in range(count):
        patient, image = 500 - number // 4, 1000 + number
        write_png(images / str(patient) / f"{image}.png", number)
        side, view = "LR"[number // 2 % 2], ("CC", "MLO")[number % 2]
        lines.append(f"1,{patient},{image},{side},{view},{50 + number}.0,{number % 2},0,0,B,29,{number % 3}")
    csv = root / "train.csv"
    csv.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return images, csv


def digest(store: Path) -> dict[str, str]:
    """SHA-256 of every file of a store that its content decides: all but the journal and notes."""
    return {
        path.relative_to(store).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name not in {"journal.jsonl", ".lock"}
    }
