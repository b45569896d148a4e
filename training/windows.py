"""A picture through each of its file's own windows: test-time augmentation that a reader at a workstation does, too."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dali_pipes.settings import PipelineSettings

_WINDOW = ("window_center", "window_width", "window_function")


def window_counts(rows: pd.DataFrame, pipeline: PipelineSettings) -> NDArray[np.int64]:
    """How many VOI transformations (PS3.3 C.11.2) each row of a manifest offers, int64 [rows], at least 1.

    A VOI LUT counts as one. Where the pipeline takes a window of its own there is just that.
    """
    if pipeline.window != "manifest":
        return np.ones(len(rows), np.int64)
    tables = rows["voi_lut"].map(len).to_numpy(np.int64) > 0
    return np.maximum(rows["window_center"].map(len).to_numpy(np.int64) + tables, 1)


def through_window(rows: pd.DataFrame, number: int) -> pd.DataFrame:
    """The rows with their transformation of that number, from 0, as the only one; the last where a row has fewer.

    Numbers follow the loader's order: the VOI LUT, then the windows as the file lists them.
    """
    columns = {name: list(rows[name]) for name in (*_WINDOW, "voi_lut")}
    for at, (table, centers) in enumerate(zip(columns["voi_lut"], columns["window_center"], strict=True)):
        has_table = len(table) > 0
        wanted = min(number, has_table + len(centers) - 1) - has_table  # of the windows; -1 is the LUT
        if wanted < 0:
            continue  # the LUT comes first anyway, or there is nothing to choose from
        for name in _WINDOW:
            columns[name][at] = [columns[name][at][wanted]]
        columns["voi_lut"][at] = []
    return rows.assign(**{name: pd.Series(cells, rows.index, dtype=object) for name, cells in columns.items()})
