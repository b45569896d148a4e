"""What a set of predictions is worth: the challenge's probabilistic F1 and the usual figures.

Predictions are probabilities in [0, 1]. All ranking figures come from one cumulative count over the sorted predictions,
in weighted form, so that a bootstrap resample is a row of weights and a thousand of them are one array operation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

SPECIFICITIES = (0.8, 0.9, 0.95)
LOWER_IS_BETTER = frozenset({"log_loss", "ece"})
_BREAST_COLUMNS = ("patient_id", "laterality", "site_id", "machine_id", "age", "density", "implant", "fold")

Floats = NDArray[np.float64]


def pf1(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Probabilistic F1 as the RSNA 2022 challenge scores it.

    With pTP and pFP the sums of the predictions over positives and negatives and P the number of positives, precision
    is pTP / (pTP + pFP), recall pTP / P, and pF1 their harmonic mean, which is 2 pTP / (pTP + pFP + P). Predictions are
    clipped to [0, 1]; it is 0 where precision or recall is, or where there are no positives. Unknown labels (NaN) are
    left out.
    """
    y, p = _known(labels, predictions)
    p = np.clip(p, 0, 1)
    true, total, positives = float((p * y).sum()), float(p.sum()), float(y.sum())
    return 2 * true / (total + positives) if true > 0 and positives > 0 else 0.0


def pf1_at(labels: ArrayLike, predictions: ArrayLike, threshold: float) -> float:
    """pF1 of the predictions made 1 at or above the threshold and 0 below it: ordinary F1."""
    return confusion(labels, predictions, threshold)["pf1"]


def pf1_best(labels: ArrayLike, predictions: ArrayLike) -> tuple[float, float]:
    """The largest `pf1_at` and the threshold that gives it, midway between the two predictions that it parts."""
    figures = ranking(*_known(labels, predictions))
    return float(figures["pf1_best"][0]), float(figures["threshold"][0])


def log_loss(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Mean negative log-likelihood in nats; predictions are kept 1e-7 away from 0 and 1."""
    y = np.asarray(labels, dtype=np.float64)
    p = np.clip(np.asarray(predictions, dtype=np.float64), 1e-7, 1 - 1e-7)
    return float(-(y * np.log(p) + (1 - y) * np.log1p(-p)).mean()) if len(y) else float("nan")


def ece(labels: ArrayLike, predictions: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3) over bins of equal width."""
    y = np.asarray(labels, dtype=np.float64)
    p = np.asarray(predictions, dtype=np.float64)
    if not len(y):
        return float("nan")
    which = np.clip(np.ceil(p * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(which, weights=y - p, minlength=bins)
    return float(np.abs(gaps).sum() / len(y))


def summarise(labels: ArrayLike, predictions: ArrayLike, threshold: float | None = None) -> dict[str, Any]:
    """Every figure of one set of predictions; NaN where a figure does not exist, as AUROC without positives.

    Args:
        labels: 0 or 1, NaN where unknown: those are left out.
        predictions: probabilities.
        threshold: where `at_threshold` is taken; without it at the best one.

    Returns:
        count, positives, auroc, average_precision, pf1, pf1_best, threshold, log_loss, ece,
        sensitivity_at_specificity ({"0.9": ...}), and at_threshold (what `confusion` gives).
    """
    y, p = _known(labels, predictions)
    ranked = {name: float(values[0]) for name, values in ranking(y, p).items()}
    chosen = ranked["threshold"] if threshold is None else threshold
    return {
        "count": len(y),
        "positives": int(y.sum()),
        "auroc": ranked["auroc"],
        "average_precision": ranked["average_precision"],
        "pf1": pf1(y, p),
        "pf1_best": ranked["pf1_best"],
        "threshold": ranked["threshold"],
        "log_loss": log_loss(y, p),
        "ece": ece(y, p),
        "sensitivity_at_specificity": {f"{s:g}": ranked[f"sensitivity_at_{s:g}"] for s in SPECIFICITIES},
        "at_threshold": confusion(y, p, chosen),
    }


def confusion(labels: ArrayLike, predictions: ArrayLike, threshold: float) -> dict[str, float]:
    """Counts and rates of the predictions cut at a threshold; rates without a denominator are NaN."""
    y, p = _known(labels, predictions)
    called = p >= threshold
    tp, fp = int((called & (y == 1)).sum()), int((called & (y == 0)).sum())
    fn, tn = int((~called & (y == 1)).sum()), int((~called & (y == 0)).sum())
    return {
        "threshold": float(threshold),
        "pf1": pf1(y, called),
        "sensitivity": tp / (tp + fn) if tp + fn else float("nan"),
        "specificity": tn / (tn + fp) if tn + fp else float("nan"),
        "precision": tp / (tp + fp) if tp + fp else float("nan"),
        "true_positives": tp,
        "false_positives": fp,
        "false_negatives": fn,
        "true_negatives": tn,
    }


def aggregate_predictions(predictions: pd.Series, groups: pd.Series, aggregate: str) -> pd.Series:
    """One prediction a group: `mean`, `max`, `noisy_or` (1 - product of 1 - p: any picture can raise alarm), or
    `power:P`, the generalised mean of exponent P: 1 is the mean, and the larger, the nearer it is to the maximum."""
    if aggregate.startswith("power:"):
        exponent = float(aggregate.removeprefix("power:"))
        highest = predictions.groupby(groups).transform("max").clip(lower=1e-12)  # so that no power is too small
        powers = ((predictions / highest) ** exponent).groupby(groups, sort=True).mean()
        return powers ** (1 / exponent) * highest.groupby(groups, sort=True).first()
    grouped = predictions.groupby(groups, sort=True)
    if aggregate == "noisy_or":
        kept = pd.Series(np.log1p(-predictions.to_numpy(np.float64).clip(0, 1 - 1e-12)), index=predictions.index)
        return 1 - pd.Series(np.exp(kept.groupby(groups, sort=True).sum(min_count=1)))
    return grouped.max() if aggregate == "max" else grouped.mean()


def per_breast(frame: pd.DataFrame, aggregate: str = "mean") -> pd.DataFrame:
    """One row a breast (`prediction_id`) of a frame with one row a picture.

    Returns:
        `prediction_id`, `cancer` (1 where any picture is positive, NaN where none is known), `prediction`, `images`,
        and those of patient_id, laterality, site_id, machine_id, age, density, implant and fold that the frame has.
    """
    return _grouped(frame, "prediction_id", aggregate)


def per_patient(breasts: pd.DataFrame) -> pd.DataFrame:
    """One row a patient, as `per_breast` gives one a breast: the highest of the breasts' predictions."""
    return _grouped(breasts, "patient_id", "max")


def ranking(labels: ArrayLike, predictions: ArrayLike, weights: Floats | None = None) -> dict[str, Floats]:
    """Figures that depend on the order of the predictions (and pF1), one value a row of weights.

    Args:
        labels: 0 or 1, [n].
        predictions: [n].
        weights: how often each row counts, [rows, n]; without it once, in one row.
    """
    y, p = np.asarray(labels, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
    w = np.ones((1, len(y))) if weights is None else weights
    order = np.argsort(-p, kind="stable")
    y, p, w = y[order], p[order], w[:, order]
    last = np.flatnonzero(np.r_[p[1:] != p[:-1], True]) if len(p) else np.zeros(0, dtype=int)  # ends of ties
    tp, fp = (w * y).cumsum(axis=1)[:, last], (w * (1 - y)).cumsum(axis=1)[:, last]
    positives, negatives = (w * y).sum(axis=1), (w * (1 - y)).sum(axis=1)
    both = (positives > 0) & (negatives > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        figures = _curve_figures(tp, fp, positives[:, None], negatives[:, None])
        clipped = np.clip(p, 0, 1)
        true = (w * y) @ clipped
        figures["pf1"] = np.where(true > 0, 2 * true / (w @ clipped + positives), 0.0)
    for name in ("auroc", *(f"sensitivity_at_{specificity:g}" for specificity in SPECIFICITIES)):
        figures[name] = np.where(both, figures[name], np.nan)
    figures["average_precision"] = np.where(positives > 0, figures["average_precision"], np.nan)
    figures["pf1_best"] = np.where(positives > 0, figures["pf1_best"], 0.0)
    cut = p[last]
    middles = (cut + np.r_[cut[1:], 0.0]) / 2 if len(cut) else np.array([0.5])
    best = figures.pop("best_index").astype(int)
    figures["threshold"] = np.where(positives > 0, middles[best], 0.5)
    return figures


def _known(labels: ArrayLike, predictions: ArrayLike) -> tuple[Floats, Floats]:
    y, p = np.asarray(labels, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
    known = np.isfinite(y) & np.isfinite(p)
    return y[known], p[known]


def _grouped(frame: pd.DataFrame, key: str, aggregate: str) -> pd.DataFrame:
    groups = frame[key]
    labels = frame["cancer"].groupby(groups, sort=True).max()
    table = pd.DataFrame(
        {
            "cancer": labels,
            "prediction": aggregate_predictions(frame["prediction"], groups, aggregate),
            "images": groups.groupby(groups, sort=True).size(),
        }
    )
    kept = [column for column in _BREAST_COLUMNS if column in frame and column != key]
    table[kept] = frame[kept].groupby(groups, sort=True).first()
    return table.reset_index(names=key)


def _curve_figures(tp: Floats, fp: Floats, positives: Floats, negatives: Floats) -> dict[str, Floats]:
    """Figures from counts of true and false positives at falling thresholds, [rows, thresholds]."""
    zero = np.zeros((len(tp), 1))
    tpr, fpr = np.hstack([zero, tp / positives]), np.hstack([zero, fp / negatives])
    steps = np.diff(tpr, axis=1)
    called = tp + fp
    f1 = 2 * tp / (called + positives)
    f1 = np.where(np.isfinite(f1), f1, 0.0) if f1.shape[1] else np.zeros((len(tp), 1))
    figures = {
        "auroc": (np.diff(fpr, axis=1) * (tpr[:, 1:] + tpr[:, :-1])).sum(axis=1) / 2,
        "average_precision": (steps * np.where(called > 0, tp / called, 0.0)).sum(axis=1),
        "pf1_best": f1.max(axis=1),
        "best_index": f1.argmax(axis=1).astype(np.float64),
    }
    for specificity in SPECIFICITIES:
        allowed = fpr <= 1 - specificity + 1e-12
        figures[f"sensitivity_at_{specificity:g}"] = np.where(allowed, tpr, 0.0).max(axis=1)
    return figures
