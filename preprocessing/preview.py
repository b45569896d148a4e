"""A sheet of source pictures with their crops drawn in, for a person to see whether a breast was cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from preprocessing import decode, grayscale
from preprocessing.errors import InputError, StoreError
from preprocessing.guard import Rejection
from preprocessing.manifest import Store, open_store

_CELL = 240  # pixels of a cell's side
_COLUMNS = 8
_CAPTION = 34
_BOX = (0, 210, 255)  # blue, green, red
_TEXT, _FAINT = (235, 235, 235), (150, 150, 150)


def draw_gallery(store: str | Path, png: str | Path, images: str | Path, count: int = 48) -> Path:
    """Draw a sheet of up to `count` pictures of a store: the smallest and largest crops, and others evenly between.

    Args:
        store: made by `convert`.
        png: the sheet to write.
        images: folder of the source pictures.
        count: pictures on the sheet.

    Returns:
        The sheet's path.

    Raises:
        StoreError: there is no finished store.
        InputError: the source pictures are not there any more, or the sheet cannot be written.
    """
    opened, png, folder = open_store(store), Path(png), Path(images)
    if not folder.is_dir():
        raise InputError(f"{folder}: the folder of source pictures is not there; the gallery is drawn from them.")
    rows = _chosen(opened.manifest, count)
    if rows.empty:
        raise StoreError(f"{store}: holds no pictures to draw.")
    records: Any = rows.to_dict("records")
    cells = [_cell(row, folder, opened) for row in records]
    blank = np.zeros_like(cells[0])
    columns = min(_COLUMNS, len(cells))
    cells += [blank] * (-len(cells) % columns)
    sheet = np.vstack([np.hstack(cells[start : start + columns]) for start in range(0, len(cells), columns)])
    encoded, data = cv2.imencode(".png", sheet)
    try:
        png.parent.mkdir(parents=True, exist_ok=True)
        png.write_bytes(data.tobytes() if encoded else b"")
    except OSError as error:
        raise InputError(f"{png}: cannot be written: {error.strerror}.") from None
    return png


def _chosen(manifest: pd.DataFrame, count: int) -> pd.DataFrame:
    """Rows in order of the share of the picture that the crop keeps: evenly spaced, both ends included."""
    share = manifest["crop_height"] * manifest["crop_width"] / (manifest["source_rows"] * manifest["source_columns"])
    ordered = manifest.assign(share=share).sort_values(["share", "image_id"])
    places = np.unique(np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int))
    return ordered.iloc[places]


def _cell(row: dict[str, Any], folder: Path, store: Store) -> NDArray[np.uint8]:
    """A thumbnail with its crop's box, and under it the image's id, view and the share that is kept."""
    cell = np.zeros((_CELL + _CAPTION, _CELL, 3), np.uint8)
    view = " ".join(part for part in (row["laterality"], row["view"]) if part)
    _write(cell, str(row["image_id"])[:26], _CELL + 13, _TEXT)
    _write(cell, f"{view}  crop {row['share']:.0%}", _CELL + 28, _FAINT)
    try:
        decoded = decode.decode(folder / row["source_path"], store.settings)
    except Rejection:
        _write(cell, "source not there", _CELL // 2, _FAINT)
        return cell
    picture = grayscale.to_tile_values(decoded, bool(row["inverted"]))
    scale = (_CELL - 4) / max(picture.shape)
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    thumb = cv2.resize(picture, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    # From zero, so that a background that is not black is seen; the root lifts the skin out of it.
    shown = (np.clip(thumb / max(row["percentile_high"], 1), 0, 1) ** 0.6 * 255).astype(np.uint8)
    top, left = (_CELL - size[1]) // 2, (_CELL - size[0]) // 2
    cell[top : top + size[1], left : left + size[0]] = shown[..., None]
    first = (left + round(row["crop_left"] * scale), top + round(row["crop_top"] * scale))
    last = (
        left + round((row["crop_left"] + row["crop_width"]) * scale) - 1,
        top + round((row["crop_top"] + row["crop_height"]) * scale) - 1,
    )
    cv2.rectangle(cell, first, last, _BOX, 1)
    return cell


def _write(cell: NDArray[np.uint8], text: str, y: int, colour: tuple[int, int, int]) -> None:
    cv2.putText(cell, text.encode("ascii", "replace").decode(), (6, y), cv2.FONT_HERSHEY_SIMPLEX, 0.38, colour, 1)
