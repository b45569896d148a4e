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


def through_each_window(rows: pd.DataFrame, counts: NDArray[np.int64]) -> pd.DataFrame:
    """Each row as often as it offers transformations, one after the other, each time with another one of them as its
    only one; int64 [rows] of `window_counts` says how many. The index is fresh.

    They follow the loader's order: the VOI LUT, then the windows as the file lists them.
    """
    shown = rows.iloc[np.repeat(np.arange(len(rows)), counts)].reset_index(drop=True)
    numbers = np.arange(len(shown)) - np.repeat(np.cumsum(counts) - counts, counts)
    columns = {name: list(shown[name]) for name in (*_WINDOW, "voi_lut")}
    for at, number in enumerate(numbers.tolist()):
        window = number - (len(columns["voi_lut"][at]) > 0)
        if window < 0 or not len(columns["window_center"][at]):
            continue  # the LUT comes first anyway, or there is nothing to choose from
        for name in _WINDOW:
            columns[name][at] = [columns[name][at][window]]
        columns["voi_lut"][at] = []
    return shown.assign(**{name: pd.Series(cells, shown.index, dtype=object) for name, cells in columns.items()})
