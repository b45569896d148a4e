"""What the settings say of single rows: weights from a column, hard negatives from a list."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dali_pipes.settings import LoaderSettings
from preprocessing.csv_file import read_cells
from preprocessing.errors import InputError

log = logging.getLogger(__name__)


def row_weights(rows: pd.DataFrame, settings: LoaderSettings) -> NDArray[np.float64] | None:
    """Each row's weight, float64 above 0; None where none are asked for.

    Raises:
        InputError: the manifest has no such column, or it holds something else than numbers above 0.
    """
    column = settings.weight_column
    if column is None:
        return None
    if column not in rows:
        raise InputError(
            f"data.loader.weight_column = {column}: the manifest has no such column. Add it to the CSV, convert again."
        )
    weights = pd.to_numeric(rows[column], errors="coerce").to_numpy(np.float64)
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights > 0)))
    if len(bad):
        found = rows[column].tolist()[bad[0]]
        raise InputError(
            f"data.loader.weight_column = {column}: expected numbers above 0, found {found!r} for "
            f"image {rows['image_id'].iloc[bad[0]]}. Mend the CSV of its store and convert "
            "again."
        )
    return weights


def hard_rows(rows: pd.DataFrame, settings: LoaderSettings) -> NDArray[np.bool_] | None:
    """Which rows the list of hard negatives names, bool; None without a list. Others in it are passed over; that all of
    them are, is told.

    Raises:
        InputError: the list cannot be read; see `hard_negatives`.
    """
    if settings.hard_negatives is None:
        return None
    listed = hard_negatives(settings.hard_negatives)
    hard = rows["image_id"].isin(listed).to_numpy()
    if not (hard & (rows["cancer"] != 1).to_numpy()).any():
        log.warning(
            "%s: none of its %d image_ids is of a negative picture that is trained on.",
            *(settings.hard_negatives, len(listed)),
        )
    return hard


def hard_negatives(path: str | Path) -> set[str]:
    """The image_ids that a list of hard negatives holds.

    Raises:
        InputError: there is no such file, it is no CSV (see `read_cells`), or it has no column image_id.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; data.loader.hard_negatives expects a CSV with a column image_id.")
    try:
        listed = read_cells(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
    if "image_id" not in listed:
        raise InputError(f"{path}: expected a column image_id, found {', '.join(map(str, listed.columns))}.")
    return set(listed["image_id"].str.strip())
