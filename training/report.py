"""One self-contained HTML page about one or more runs: no network, light and dark, readable on paper and by ear."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from preprocessing.errors import StoreError
from preprocessing.manifest import Store, open_store, write_atomically
from training import evaluate, figures, metrics, report_pictures, runs
from training.config import dump
from training.runs import FoldRun, Run

MOST_IN_FULL = 4  # runs shown with all their figures; of further ones there is the table that compares them
RESAMPLES = 500


def write_report(run_folders: list[Path], out: Path | None = None) -> Path:
    """Write the report of runs, finished or not.

    Args:
        run_folders: run folders; `evaluate` need not have been called.
        out: the page; report.html in the first folder by default.

    Raises:
        RunError: a folder is no run.
    """
    opened = [runs.open_run(folder) for folder in run_folders]
    described = [_describe(run, full=index < MOST_IN_FULL) for index, run in enumerate(opened)]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["figure"] = _number
    source = resources.files("training").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        runs=described,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        comparison=_comparison(described),
        compared=_compared(described),
    )
    out = out or opened[0].root / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page.encode())
    return out


def _describe(run: Run, full: bool) -> dict[str, Any]:
    """Everything that the page says of a run."""
    judged = any((fold.folder / runs.VALIDATION).is_file() for fold in run.folds)
    result = _metrics(run) if judged else None
    described: dict[str, Any] = {
        "name": _name(run.root),
        "root": str(run.root),
        "folds": [{"fold": f.fold, "finished": f.finished, "epochs": len(f.records("epoch"))} for f in run.folds],
        "metrics": result,
        "summary": _summary(run, result),
        "full": full,
        "config": dump(run.folds[0].config),
        "environment": json.dumps(run.folds[0].environment, indent=2),
        "backbone": run.folds[0].config.model.backbone,
        "size": f"{run.folds[0].config.pipeline.height} × {run.folds[0].config.pipeline.width}",
        "resources": [s for fold in run.folds for s in fold.records("summary")[-1:]],
        "advice": next((s["advice"] for fold in run.folds for s in fold.records("summary")[-1:]), ""),
    }
    if full:
        frame = evaluate.out_of_fold(run) if judged else None
        breasts = metrics.per_breast(frame, run.folds[0].config.train.aggregate) if frame is not None else None
        store = _store(run)
        described |= {
            "curves": _curves(run),
            "ranking": _ranking(breasts, result["threshold"]["value"]) if breasts is not None and result else [],
            "breasts": breasts,
            "thresholds": _thresholds(breasts) if breasts is not None else [],
            "timelines": _timelines(run),
            "data": _data(store, frame),
            "cases": report_pictures.cases(run, store, frame) if store is not None and frame is not None else [],
        }
    return described


def _metrics(run: Run) -> dict[str, Any]:
    """metrics.json where it is newer than every prediction, else the same figures now."""
    saved = run.root / runs.METRICS
    tables = [fold.folder / runs.VALIDATION for fold in run.folds if (fold.folder / runs.VALIDATION).is_file()]
    if saved.is_file() and all(saved.stat().st_mtime_ns >= table.stat().st_mtime_ns for table in tables):
        return runs.read_json(saved)
    return evaluate.evaluate(run.root, resamples=RESAMPLES)


def _summary(run: Run, result: dict[str, Any] | None) -> str:
    """The run in plain words."""
    config = run.folds[0].config
    finished = sum(fold.finished for fold in run.folds)
    text = (
        f"{config.model.backbone} at {config.pipeline.height} × {config.pipeline.width}, trained on "
        f"{len(run.folds)} fold{'s' if len(run.folds) != 1 else ''} ({finished} finished)."
    )
    if result is None:
        return f"{text} No fold has finished an epoch yet, so there is nothing to judge."
    breast = result["breast"]
    counts = f"{breast['count']:,} breasts that its models had not seen, {breast['positives']:,} of them with cancer"
    text += f" Judged on {counts}."
    if breast["auroc"] is None:
        return f"{text} Without both classes among them, ranking cannot be judged."
    low, high = breast["intervals"].get("auroc") or (None, None)
    interval = f" (95 % interval {low:.3f} to {high:.3f})" if low is not None else ""
    chance = low is not None and low <= 0.5
    text += (
        f" Given one breast with cancer and one without, it ranks the right one higher {breast['auroc']:.0%} of the "
        f"time{interval}{'; that is not distinguishable from chance' if chance else ''}."
    )
    at = breast["at_threshold"]
    if at["sensitivity"] is not None and at["specificity"] is not None:
        text += (
            f" At its best threshold it finds {at['sensitivity']:.0%} of the cancers and calls "
            f"{1 - at['specificity']:.0%} of the healthy breasts suspicious."
        )
    return text


def _curves(run: Run) -> list[str]:
    wanted = (
        ("Training loss", "train_loss", "loss"),
        ("Validation loss", "val_loss", "loss"),
        ("AUROC per breast", "auroc", "AUROC"),
        ("pF1 per breast", "pf1", "pF1"),
        ("Learning rate", "lr", "learning rate"),
        ("Images a second", "images_per_s", "images/s"),
    )
    drawn = []
    for title, key, label in wanted:
        series = {f"fold {fold.fold}": _points(fold, key) for fold in run.folds}
        if any(points[0] for points in series.values()):
            drawn.append(figures.lines(title, series, "epoch", label))
    return drawn


def _points(fold: FoldRun, key: str) -> tuple[list[float], list[float]]:
    records = [record for record in fold.records("epoch") if record.get(key) is not None]
    return [record["epoch"] + 1 for record in records], [record[key] for record in records]


def _name(root: Path) -> str:
    """A run's folder; with its parent where it is called `runs`, as the demo's is."""
    root = root.resolve()
    return f"{root.parent.name}/{root.name}" if root.name == "runs" else root.name


def _ranking(breasts: pd.DataFrame, threshold: float) -> list[str]:
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


def _thresholds(breasts: pd.DataFrame) -> list[dict[str, float]]:
    known = breasts[breasts["cancer"].notna()]
    cuts = np.unique(np.quantile(known["prediction"], [0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98]).round(4))
    return [metrics.confusion(known["cancer"], known["prediction"], float(cut)) for cut in cuts]


def _timelines(run: Run) -> list[str]:
    drawn = []
    samples = {fold.fold: fold.records("resources") for fold in run.folds}
    starts = {fold: records[0]["time"] for fold, records in samples.items() if records}
    keys = [("CPU (100 % is one core)", ("cpu_percent",), "%"), ("Memory of the process", ("rss_mb",), "MiB")]
    if any("gpu0" in record for records in samples.values() for record in records):
        keys += [
            ("GPU utilisation", ("gpu0", "utilisation"), "%"),
            ("GPU memory", ("gpu0", "memory_mb"), "MiB"),
            ("GPU power", ("gpu0", "power_w"), "W"),
        ]
    for title, path, unit in keys:
        series = {}
        for fold, records in samples.items():
            thinned = records[:: max(1, len(records) // 400)]
            x = [(record["time"] - starts[fold]) / 60 for record in thinned]
            series[f"fold {fold}"] = x, [_dig(record, path) for record in thinned]
        if any(np.isfinite(y).any() for _, y in series.values()):
            drawn.append(figures.lines(title, series, "minutes", unit, marker=""))
    return drawn


def _dig(record: Any, path: tuple[str, ...]) -> float:
    for key in path:
        record = record.get(key) if isinstance(record, dict) else None
    return float("nan") if record is None else float(record)


def _store(run: Run) -> Store | None:
    """The store that the run was trained on, where it is still there unchanged."""
    try:
        store = open_store(run.folds[0].environment.get("store", ""))
        return store if store.fingerprint == run.folds[0].environment.get("store_fingerprint") else None
    except (StoreError, OSError):
        return None


def _data(store: Store | None, frame: pd.DataFrame | None) -> dict[str, Any]:
    """Counts, class balance and rejected inputs; from the store, or what the predictions tell without it."""
    rows = store.manifest if store is not None else frame
    if rows is None:
        return {"counts": [], "balance": [], "rejected": [], "samples": []}
    known = rows[rows["cancer"].notna()]
    counts = [
        {"what": "pictures", "number": len(rows)},
        {"what": "patients", "number": int(rows["patient_id"].nunique())},
        {"what": "breasts", "number": int(rows["prediction_id"].nunique())},
        {"what": "pictures with cancer", "number": int((known["cancer"] == 1).sum())},
    ]
    labels = {"fold": "Classes by fold", "site_id": "Classes by site", "machine_id": "Classes by machine"}
    labels |= {"density": "Classes by density", "view": "Classes by view"}
    if frame is not None and "fold" not in known:
        known = known.merge(frame[["image_id", "fold"]], on="image_id", how="left")
    balance = [_balance(known, column, title) for column, title in labels.items() if column in known]
    rejected: list[dict[str, Any]] = []
    if store is not None:
        rejected = [{"reason": k, "number": int(v)} for k, v in store.rejected["reason"].value_counts().items()]
    samples = report_pictures.samples(store, rows) if store is not None else []
    return {"counts": counts, "balance": balance, "rejected": rejected, "samples": samples}


def _balance(rows: pd.DataFrame, column: str, title: str) -> str:
    values = rows[column].fillna("unknown").astype(str).replace({"": "unknown"}).str.removesuffix(".0")
    counts = pd.crosstab(values, rows["cancer"].map({0.0: "without cancer", 1.0: "with cancer"}))
    counts = counts.reindex(columns=["without cancer", "with cancer"], fill_value=0)
    bars = {str(name): {str(k): float(v) for k, v in part.items()} for name, part in counts.iterrows()}
    return figures.stacked_bars(title, dict(list(bars.items())[:24]), "pictures")


def _comparison(described: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for run in described:
        breast = (run["metrics"] or {}).get("breast", {})
        rows.append(
            {
                "run": run["name"],
                "backbone": run["backbone"],
                "size": run["size"],
                "folds": f"{sum(f['finished'] for f in run['folds'])} of {len(run['folds'])} finished",
                **{
                    name: breast.get(name)
                    for name in ("auroc", "average_precision", "pf1", "pf1_best", "log_loss", "ece")
                },
            }
        )
    return rows


def _compared(described: list[dict[str, Any]]) -> list[str]:
    """Figures that lay several runs over one another."""
    if len(described) < 2:
        return []
    drawn = []
    values = {}
    for run in described:
        breast = (run["metrics"] or {}).get("breast", {})
        ends = breast.get("intervals", {}).get("auroc")
        if breast.get("auroc") is not None and ends:
            values[run["name"]] = (breast["auroc"], *ends)
    if values:
        drawn.append(figures.intervals("AUROC per breast, 95 % intervals", values, "AUROC"))
    curves = {}
    for run in described:
        breasts: pd.DataFrame | None = run.get("breasts")
        if breasts is None:
            continue
        known = breasts[breasts["cancer"].notna()]
        if 0 < known["cancer"].sum() < len(known):
            curves[run["name"]] = known["cancer"].to_numpy(float), known["prediction"].to_numpy(float)
    if curves:
        drawn += [figures.roc("ROC of the runs", curves), figures.precision_recall("Precision of the runs", curves)]
    return drawn


def _number(value: Any, digits: int = 3) -> str:
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}" if isinstance(value, float) else str(value)
