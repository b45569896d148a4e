"""One self-contained HTML page about one or more runs: no network, light and dark, readable on paper and by ear."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
import pandas as pd

from preprocessing import tiles
from preprocessing.errors import StoreError
from preprocessing.manifest import Store, level_column, open_store, write_atomically
from training import evaluate, figures, metrics, runs
from training.config import dump
from training.runs import FoldRun, Run

MOST_IN_FULL = 4  # runs shown with all their figures; of further ones there is the table that compares them
THUMBNAIL = 260  # longest side of a picture in pixels
CASES = 6
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
        runs=described, made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), comparison=_comparison(described)
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
        "name": run.root.name,
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
            "ranking": _ranking(breasts) if breasts is not None else [],
            "thresholds": _thresholds(breasts) if breasts is not None else [],
            "timelines": _timelines(run),
            "data": _data(store, frame),
            "cases": _cases(store, frame) if store is not None and frame is not None else [],
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


def _ranking(breasts: pd.DataFrame) -> list[str]:
    known = breasts[breasts["cancer"].notna()]
    labels, scores = known["cancer"].to_numpy(np.float64), known["prediction"].to_numpy(np.float64)
    drawn = [figures.histogram("Predictions by class", labels, scores)]
    if 0 < labels.sum() < len(labels):
        everything = {"out of fold": scores}
        drawn += [
            figures.roc("ROC", labels, everything),
            figures.precision_recall("Precision and recall", labels, everything),
            figures.calibration("Calibration", labels, scores),
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
    samples = [_thumbnail(store, row) for _, row in rows.iloc[_spread(len(rows), 8)].iterrows()] if store else []
    return {"counts": counts, "balance": balance, "rejected": rejected, "samples": [s for s in samples if s]}


def _balance(rows: pd.DataFrame, column: str, title: str) -> str:
    values = rows[column].fillna("unknown").astype(str).replace({"": "unknown"}).str.removesuffix(".0")
    counts = pd.crosstab(values, rows["cancer"].map({0.0: "without cancer", 1.0: "with cancer"}))
    bars = {str(name): {str(k): float(v) for k, v in part.items()} for name, part in counts.iterrows()}
    return figures.stacked_bars(title, dict(list(bars.items())[:24]), "pictures")


def _spread(count: int, wanted: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, count - 1, wanted)}) if count else []


def _cases(store: Store, frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The pictures that the models judged best and worst, by their out-of-fold prediction."""
    positives = frame[frame["cancer"] == 1].sort_values("prediction", ascending=False)
    negatives = frame[frame["cancer"] == 0].sort_values("prediction", ascending=False)
    groups = (
        ("Cancers found with the most confidence", positives.head(CASES)),
        ("Cancers missed", positives.tail(CASES)[::-1]),
        ("Healthy pictures called most suspicious", negatives.head(CASES)),
    )
    rows = store.manifest.set_index("image_id", drop=False)
    described = []
    for title, chosen in groups:
        pictures = []
        for _, case in chosen.iterrows():
            if case["image_id"] in rows.index:
                picture = _thumbnail(store, rows.loc[case["image_id"]])
                if picture:
                    picture["caption"] += f", prediction {case['prediction']:.3f}"
                    pictures.append(picture)
        if pictures:
            described.append({"title": title, "pictures": pictures})
    return described


def _thumbnail(store: Store, row: pd.Series) -> dict[str, str] | None:
    """A small picture, windowed over the breast's percentiles, as a data URI; None where its tile cannot be read."""
    level = store.levels[-1]
    try:
        values = tiles.read_level(store.root / row[level_column("path", level)]).astype(np.float32)
    except (OSError, ValueError, tiles.TileError):
        return None
    low, high = float(row["percentile_low"]), float(row["percentile_high"])
    shown = (np.clip((values - low) / max(high - low, 1), 0, 1) * 255).astype(np.uint8)
    scale = THUMBNAIL / max(shown.shape)
    if scale < 1:
        size = (max(1, round(shown.shape[1] * scale)), max(1, round(shown.shape[0] * scale)))
        shown = cv2.resize(shown, size, interpolation=cv2.INTER_AREA)
    encoded = cv2.imencode(".jpg", shown, [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
    label = {0.0: "no cancer", 1.0: "cancer"}.get(float(row["cancer"]), "label unknown")
    caption = " ".join(part for part in (str(row["laterality"]), str(row["view"])) if part)
    return {
        "uri": "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode(),
        "caption": f"{caption or 'view unknown'}, {label}",
        "image": str(row["image_id"]),
    }


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


def _number(value: Any, digits: int = 3) -> str:
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}" if isinstance(value, float) else str(value)
