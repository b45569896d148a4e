"""How far figures can be trusted: bootstrap intervals of a set of predictions, of its subgroups, and of how far one
model is ahead of another.

Whole patients are resampled (Efron & Tibshirani 1993, chapter 13), for a patient's breasts are alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from training import metrics

# Not of pf1_best: each resample would choose its threshold anew, so that it is an interval of nothing that is got.
INTERVALS = ("auroc", "average_precision", "pf1", "threshold")
PATIENTS_FOR_INTERVALS = 5  # of either class; resamples of fewer are too much alike


def subgroups(
    frame: pd.DataFrame, columns: Sequence[str], threshold: float, resamples: int = 1000
) -> list[dict[str, Any]]:
    """`metrics.summarise` for each value of each column that the frame has: group, value, the figures and their
    `intervals`, as `bootstrap` gives them.

    Age is taken in bands. Empty values are called "unknown".
    """
    rows = []
    for column in columns:
        if column not in frame:
            continue
        values = (
            age_bands(frame["age"])
            if column == "age"
            else frame[column].fillna("").astype(str).replace({"": "unknown"})
        )
        for value in sorted(values.unique()):
            rows.append(
                {"group": column, "value": value, **with_intervals(frame[values == value], threshold, resamples)}
            )
    return rows


def with_intervals(frame: pd.DataFrame, threshold: float, resamples: int = 1000) -> dict[str, Any]:
    """`metrics.summarise` of a frame as `bootstrap` takes it, and `intervals`, what that gives."""
    figures = metrics.summarise(frame["cancer"], frame["prediction"], threshold)
    return {**figures, "intervals": bootstrap(frame, resamples)}


def age_bands(age: pd.Series) -> pd.Series:
    """Years as '<50', '50-59', '60-69', '70+' or 'unknown'."""
    bands = pd.cut(
        age.astype(float), [-np.inf, 50, 60, 70, np.inf], right=False, labels=["<50", "50-59", "60-69", "70+"]
    )
    return bands.astype(object).where(bands.notna(), "unknown").astype(str)


def bootstrap(frame: pd.DataFrame, resamples: int = 1000, seed: int = 0, level: float = 0.95) -> dict[str, Any]:
    """Percentile intervals of a frame's figures, resampling whole patients.

    Args:
        frame: `patient_id`, `cancer`, `prediction`; a breast or a picture a row.
        resamples: how many; those without both classes are left out.
        seed: the same seed gives the same intervals.
        level: coverage.

    Returns:
        {"auroc": [low, high], ...} for `INTERVALS` and sensitivity at each specificity, each None where fewer than
        `PATIENTS_FOR_INTERVALS` patients have a row of either class; and `resamples`, the number used.
    """
    frame = frame[frame["cancer"].notna() & frame["prediction"].notna()]
    resamples = resamples if _has_enough(frame) else 0
    draws: dict[str, list[metrics.Floats]] = {}
    used = 0
    for weights in _resample(frame["patient_id"], resamples, seed):
        figures = metrics.ranking(frame["cancer"], frame["prediction"], weights)
        usable = np.isfinite(figures["auroc"])
        used += int(usable.sum())
        for name, values in figures.items():
            draws.setdefault(name, []).append(values[usable])
    tail = 100 * (1 - level) / 2
    names = (*INTERVALS, *(f"sensitivity_at_{specificity:g}" for specificity in metrics.SPECIFICITIES))
    intervals: dict[str, Any] = {"resamples": used, **dict.fromkeys(names)}
    for name in names:
        values = np.concatenate(draws.get(name, [np.zeros(0)]))
        intervals[name] = np.percentile(values, [tail, 100 - tail]).tolist() if len(values) else None
    return intervals


def auroc_lead(one: pd.DataFrame, other: pd.DataFrame, resamples: int = 1000, seed: int = 0) -> dict[str, Any] | None:
    """How much higher one model's AUROC is than another's on the breasts that both judged, with the interval of
    resampling whole patients, both models on the same ones each time: what they share by chance is not in it.

    Args:
        one, other: `prediction_id`, `patient_id`, `cancer` and `prediction`; a breast a row.
        resamples, seed: as in `bootstrap`.

    Returns:
        `breasts` that both judged, `lead`, and its 95 % `interval` (None where `bootstrap` has none); None where those
        are of one class.
    """
    keys = ["prediction_id", "patient_id", "cancer"]  # of another data set an id may be the same, and not the breast
    both = one.merge(other[[*keys, "prediction"]], on=keys, suffixes=("", "_other"))
    both = both[both[["cancer", "prediction", "prediction_other"]].notna().all(axis=1)]
    if both["cancer"].nunique() < 2:
        return None
    names = ("prediction", "prediction_other")

    def lead(weights: metrics.Floats | None = None) -> metrics.Floats:
        first, second = (metrics.ranking(both["cancer"], both[name], weights)["auroc"] for name in names)
        return first - second

    ends = None
    if _has_enough(both):
        drawn = np.concatenate([lead(weights) for weights in _resample(both["patient_id"], resamples, seed)])
        ends = np.nanpercentile(drawn, [2.5, 97.5]).tolist()
    return {"breasts": len(both), "lead": float(lead()[0]), "interval": ends}


def _has_enough(frame: pd.DataFrame) -> bool:
    """Whether there are patients enough of either class for an interval."""
    patients = frame.groupby("cancer")["patient_id"].nunique().reindex([0, 1], fill_value=0)
    return bool(patients.min() >= PATIENTS_FOR_INTERVALS)


def _resample(patients: pd.Series, resamples: int, seed: int, chunk_cells: int = 2_000_000) -> Iterator[metrics.Floats]:
    """How often each row is drawn, [resamples, rows] in chunks: patients drawn with replacement, rows follow them."""
    codes, names = pd.factorize(patients)
    generator = np.random.default_rng(seed)
    share = np.full(len(names), 1 / max(len(names), 1))
    size = max(1, chunk_cells // max(len(codes), 1))
    for start in range(0, resamples if len(names) else 0, size):
        drawn = generator.multinomial(len(names), share, size=min(size, resamples - start))
        yield drawn[:, codes].astype(np.float64)
