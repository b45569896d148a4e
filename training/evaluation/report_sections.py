"""The report's sections about one run: its figures as SVG and its tables as rows.

A row may carry `_class`, which says how the table marks it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from training import metrics
from training.evaluation import figures
from training.runs import FoldRun, Run

FEW = 10  # breasts with cancer below which a subgroup's figures say little
_THROUGHPUT = (
    ("Images a second", "images_per_s", "images/s"),
    ("Share of the time waiting for data", "wait_share", ""),
)
_PHASES = {"data": "waiting for data", "transfer": "in transfer", "compute": "in compute"}


def curves(run: Run) -> list[str]:
    """Losses, ranking and learning rate by epoch, as SVG; empty before the first epoch has ended."""
    heads = ", auxiliary heads included" if run.folds[0].config.model.aux else ""
    wanted = (
        (f"Training loss{heads}", "train_loss", "loss"),
        ("Validation loss", "val_loss", "loss"),
        ("AUROC per breast", "auroc", "AUROC"),
        ("pF1 per breast", "pf1", "pF1"),
        ("Average precision per breast", "average_precision", "average precision"),
        ("Learning rate", "lr", "learning rate"),
    )
    return _by_epoch(run, wanted)


def _by_epoch(run: Run, wanted: Sequence[tuple[str, str, str]]) -> list[str]:
    """A figure for each (title, key of the epoch records, label) that any fold has, a line a fold."""
    drawn = []
    for title, key, label in wanted:
        series = {f"fold {fold.fold}": _points(fold, key) for fold in run.folds}
        if any(points[0] for points in series.values()):
            drawn.append(figures.lines(title, series, "epoch", label))
    return drawn


def _points(fold: FoldRun, key: str) -> tuple[list[float], list[float]]:
    records = [record for record in fold.records("epoch") if record.get(key) is not None]
    return [record["epoch"] + 1 for record in records], [record[key] for record in records]


def ranking(breasts: pd.DataFrame, threshold: float) -> list[str]:
    """How well out-of-fold predictions rank, as SVG; only their spread where a class is missing.

    Args:
        breasts: what `metrics.per_breast` gives.
        threshold: where the confusion is counted.
    """
    known = breasts[breasts["cancer"].notna()]
    labels, scores = known["cancer"].to_numpy(np.float64), known["prediction"].to_numpy(np.float64)
    at = metrics.confusion(labels, scores, threshold)
    counts = [[at["true_negatives"], at["false_positives"]], [at["false_negatives"], at["true_positives"]]]
    drawn = [figures.histogram("Predictions by class", labels, scores)]
    if 0 < labels.sum() < len(labels):
        curves = {"out of fold": (labels, scores)}
        of_roc, of_precision = figures.bands(labels, scores, known["patient_id"].to_numpy(str))
        cuts = np.unique(np.quantile(scores, np.linspace(0, 1, 80)))
        at_cuts = [metrics.confusion(labels, scores, cut) for cut in cuts]
        names = {"sensitivity": "sensitivity", "specificity": "specificity", "pf1": "pF1"}
        by_cut = {label: (cuts.tolist(), [row[key] for row in at_cuts]) for key, label in names.items()}
        drawn = [
            figures.roc("ROC", curves, of_roc),
            figures.precision_recall("Precision and recall", curves, of_precision),
            figures.confusion("Confusion at the chosen threshold", np.array(counts, dtype=int)),
            figures.calibration("Calibration", labels, scores),
            drawn[0],
            figures.lines("What a threshold gives", by_cut, "threshold", "", marker="", width=4.2, height=3.8),
        ]
    return drawn


def thresholds(breasts: pd.DataFrame, chosen: float) -> list[dict[str, Any]]:
    """What thresholds over the whole range give; the chosen one is marked."""
    known = breasts[breasts["cancer"].notna()]
    cuts = np.quantile(known["prediction"], [0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98]).round(4)
    cuts = np.unique([*cuts, *([chosen] if np.isfinite(chosen) else [])])
    rows = ((cut, metrics.confusion(known["cancer"], known["prediction"], float(cut))) for cut in cuts)
    return [{**row, "_class": "chosen" if cut == chosen else ""} for cut, row in rows]


def subgroups(result: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The subgroups' figures as the table shows them; those of few cancers are marked."""
    rows = []
    for part in (result or {}).get("subgroups", []):
        value = str(part["value"])
        if part["group"] == "implant":
            value = {"0.0": "no", "1.0": "yes", "0": "no", "1": "yes"}.get(value, value)
        rows.append(
            {
                "group": part["group"].removesuffix("_id"),
                "value": value,
                "count": part["count"],
                "with cancer": part["positives"],
                "auroc": part["auroc"],
                "95 %": "{:.3f} to {:.3f}".format(*ends) if (ends := part.get("intervals", {}).get("auroc")) else "",
                **{name: part[name] for name in ("average_precision", "pf1", "log_loss")},
                "_class": "few" if part["positives"] < FEW else "",
            }
        )
    places = list(dict.fromkeys(row["group"] for row in rows))
    return sorted(rows, key=lambda row: (places.index(row["group"]), *_natural(row["value"])))


def _natural(value: str) -> tuple[int, float, str]:
    """Numbers in their order, `<50` before 50, then texts, and what is unknown last."""
    if value == "unknown":
        return 2, 0.0, ""
    number = re.match(r"[<>]?(\d+(?:\.\d+)?)", value)
    return (0, float(number[1]) - value.startswith("<"), value) if number else (1, 0.0, value)


def timelines(run: Run) -> list[str]:
    """Throughput by epoch and resources by minute, as SVG."""
    drawn = _by_epoch(run, _THROUGHPUT)
    samples = {fold.fold: fold.records("resources") for fold in run.folds}
    starts = {fold: records[0]["time"] for fold, records in samples.items() if records}
    keys = [
        ("CPU (100 % is one core)", ("cpu_percent",), "%"),
        ("Memory of the process", ("rss_mb",), "MiB"),
        ("Read from disk", ("disk_read_mb_s",), "MiB/s"),
        ("Written to disk", ("disk_write_mb_s",), "MiB/s"),
    ]
    gpus = sorted({name for records in samples.values() for record in records for name in record if _is_gpu(name)})
    for name in gpus:
        label = name.upper() if len(gpus) > 1 else "GPU"
        keys += [
            (f"{label} utilisation", (name, "utilisation"), "%"),
            (f"{label} memory", (name, "memory_mb"), "MiB"),
            (f"{label} power", (name, "power_w"), "W"),
        ]
    for title, path, unit in keys:
        series = {}
        for fold, records in samples.items():
            thinned = records[:: max(1, len(records) // 300)]
            x = [(record["time"] - starts[fold]) / 60 for record in thinned]
            series[f"fold {fold}"] = x, [_dig(record, path) for record in thinned]
        if any(np.isfinite(y).any() for _, y in series.values()):
            drawn.append(figures.lines(title, series, "minutes", unit, marker=""))
    return drawn


def _is_gpu(name: str) -> bool:
    return re.fullmatch(r"gpu\d+", name) is not None


def used(run: Run) -> list[dict[str, Any]]:
    """What each fold used, a row of the table each; none for a fold of which nothing was sampled."""
    rows = [_used(fold, summaries) for fold in run.folds if (summaries := fold.records("summary"))]
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def _used(fold: FoldRun, summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A fold's row, from the summary of each call that trained it: means of all samples, peaks, and energy in all."""

    def each(key: str) -> list[tuple[float, int]]:
        return [(s[key], s.get("samples", 1)) for s in summaries if s.get(key) is not None]

    def mean(key: str) -> float | None:
        found = each(key)
        return sum(v * n for v, n in found) / sum(n for _, n in found) if found else None

    def peak(key: str) -> float | None:
        return max((value for value, _ in each(key)), default=None)

    summaries = [{**s, **(dict.fromkeys(_PHASES, 0.0) | s["shares"] if s.get("shares") else {})} for s in summaries]
    row: dict[str, Any] = {"fold": str(fold.fold)}
    row |= {f"% {name}": f"{100 * (mean(phase) or 0.0):.1f}" for phase, name in _PHASES.items()}
    row |= {"CPU %, mean": mean("cpu_percent_mean"), "RAM MiB, peak": peak("rss_mb_peak")}
    for name in sorted({key.split(".")[0] for s in summaries for key in s if _is_gpu(key.split(".")[0])}):
        row |= {
            f"{name.upper()} %, mean": mean(f"{name}.utilisation_mean"),
            f"{name.upper()} MiB, peak": peak(f"{name}.memory_mb_peak"),
        }
        if energy := each(f"{name}.energy_j_peak"):
            row[f"{name.upper()} kJ"] = sum(joules for joules, _ in energy) / 1000
    return {key: round(value) if isinstance(value, float) else value for key, value in row.items()}


def _dig(record: Any, path: tuple[str, ...]) -> float:
    for key in path:
        record = record.get(key) if isinstance(record, dict) else None
    return float("nan") if record is None else float(record)
