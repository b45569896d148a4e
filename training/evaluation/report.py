"""One self-contained HTML page about one or more runs: no network, light and dark, readable on paper and by ear."""

from __future__ import annotations

import logging
from contextlib import suppress
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from preprocessing.errors import RunError, StoreError
from preprocessing.files import write_atomically
from preprocessing.manifest import Store, open_store
from training import metrics, run_files, runs
from training.config import dump
from training.evaluation import evaluate, figures, intervals, report_pictures
from training.evaluation import report_sections as sections
from training.runs import Run

log = logging.getLogger(__name__)

_MOST_BARS = 24
MOST_IN_FULL = 4  # runs shown with all their figures; of further ones there is the table that compares them


def write_report(run_folders: list[Path], out: Path | None = None) -> Path:
    """Write the report of runs, finished or not.

    Args:
        run_folders: run folders; `evaluate` need not have been called.
        out: the page; report.html in the first folder by default.

    Raises:
        RunError: a folder is no run.
    """
    opened = [runs.open_run(folder) for folder in {folder.resolve(): folder for folder in run_folders}.values()]
    names = _names([run.root.resolve() for run in opened])
    described = [
        _describe(run, name, full=index < MOST_IN_FULL)
        for index, (run, name) in enumerate(zip(opened, names, strict=True))
    ]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["figure"] = _number
    source = resources.files("training.evaluation").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        runs=described,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        comparison=_comparison(described),
        compared=_compared(described),
        few=sections.FEW,
    )
    out = out or opened[0].root / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page.encode())
    return out


def _names(roots: list[Path]) -> list[str]:
    """Runs' folders, each with as many of its parents as tell them all apart."""
    depth = 1
    while len(names := [str(Path(*root.parts[-depth:])) for root in roots]) > len(set(names)):
        depth += 1
    return names


def _describe(run: Run, name: str, full: bool) -> dict[str, Any]:
    """Everything that the page says of a run."""
    judged = any((fold.folder / runs.VALIDATION).is_file() for fold in run.folds)
    result = _metrics(run) if judged else None
    described: dict[str, Any] = {
        "name": name,
        "root": str(run.root),
        "folds": [{"fold": f.fold, "finished": f.finished, "epochs": len(f.records("epoch"))} for f in run.folds],
        "metrics": result,
        "summary": _summary(run, result),
        "full": full,
        "config": dump(run.folds[0].config),
        "environment": run.folds[0].environment.model_dump_json(indent=2, exclude_unset=True),
        "backbone": run.folds[0].config.model.backbone,
        "size": f"{run.folds[0].config.pipeline.height} × {run.folds[0].config.pipeline.width}",
        "advice": list(dict.fromkeys(s["advice"] for fold in run.folds for s in fold.records("summary")[-1:])),
    }
    frame = evaluate.out_of_fold(run) if judged else None
    breasts = _breasts(run, frame, result) if frame is not None and result is not None else None
    described["breasts"] = breasts
    if full:
        threshold = result["threshold"]["value"] if result is not None else float("nan")
        store = _store(run)
        described |= {
            "curves": sections.curves(run),
            "ranking": sections.ranking(breasts, threshold) if breasts is not None else [],
            "thresholds": sections.thresholds(breasts, threshold) if breasts is not None else [],
            "subgroups": sections.subgroups(result),
            "timelines": sections.timelines(run),
            "used": sections.used(run),
            "data": _data(store, frame),
            "cases": report_pictures.cases(run, store, frame, breasts, threshold)
            if store is not None and frame is not None and breasts is not None
            else [],
        }
    return described


def _breasts(run: Run, frame: pd.DataFrame, result: dict[str, Any]) -> pd.DataFrame:
    """The breasts as `result`, what `evaluate` gave, judged them."""
    breasts = metrics.per_breast(frame, run.folds[0].config.train.aggregate)
    return evaluate.with_covariates(breasts, result.get("covariates") or ())


def _metrics(run: Run) -> dict[str, Any]:
    """metrics.json where it was made from these folds and predictions by this version, else the same figures now."""
    path = run.root / runs.METRICS
    saved: dict[str, Any] = {}
    if path.is_file():
        with suppress(RunError):  # it is made of what is there
            saved = run_files.read_json(path, "It is made anew.")
    now, folds = evaluate.judged_from(run), saved.get("folds")
    there = [of for of in folds if isinstance(of, dict)] if isinstance(folds, list) else []
    if saved.get("format") == evaluate.FORMAT and [{key: of.get(key) for key in now[0]} for of in there] == now:
        return saved
    return evaluate.judge(run, evaluate.out_of_fold(run), names=saved.get("covariates"))[0]


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
    ends = breast["intervals"].get("auroc")
    interval = f" (95 % interval {_percent(ends[0])} to {_percent(ends[1])})" if ends else ""
    unclear = ""
    if ends and ends[0] <= 0.5:
        unclear = "; that is not distinguishable from chance"
        if ends[1] < 0.5:
            unclear = "; that is worse than chance, as if the labels were the wrong way round"
    text += (
        " Given one breast with cancer and one without, it ranks the right one higher "
        f"{_percent(breast['auroc'])} of the time{interval}{unclear}."
    )
    if (alone := result.get("pictures_alone")) and alone["auroc"] is not None:
        text += (
            f" That takes the patient's {' and '.join(result['covariates'])} into account; from the pictures alone it "
            f"is {_percent(alone['auroc'])}."
        )
    at = breast["at_threshold"]
    if at["sensitivity"] is not None and at["specificity"] is not None:
        text += (
            f" At its best threshold it finds {_percent(at['sensitivity'])} of the cancers and calls "
            f"{_percent(1 - at['specificity'])} of the healthy breasts suspicious."
        )
    return text


def _store(run: Run) -> Store | None:
    """The store that the run was trained on, where it is still there unchanged."""
    environment = run.folds[0].environment
    try:
        store = open_store(environment.store)
        if store.is_known_as(environment.store_fingerprint):
            return store
        problem = "it has changed since"
    except (StoreError, OSError) as error:
        problem = str(error)
    log.warning("%s: without pictures, for they are in the store that it was trained on: %s", run.root, problem)
    return None


def _data(store: Store | None, frame: pd.DataFrame | None) -> dict[str, Any]:
    """Counts, class balance and rejected inputs; from the store, or what the predictions tell without it."""
    rows = store.manifest if store is not None else frame
    if rows is None:
        return {"store": False, "counts": [], "balance": [], "rejected": [], "samples": []}
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
    return {
        "store": store is not None,
        "counts": counts,
        "balance": balance,
        "rejected": rejected,
        "samples": samples,
    }


def _balance(rows: pd.DataFrame, column: str, title: str) -> str:
    values = rows[column].fillna("unknown").astype(str).replace({"": "unknown"}).str.removesuffix(".0")
    counts = pd.crosstab(values, rows["cancer"].map({0.0: "without cancer", 1.0: "with cancer"}))
    counts = counts.reindex(columns=["without cancer", "with cancer"], fill_value=0)
    if len(counts) > _MOST_BARS:
        title += f", the {_MOST_BARS} largest of {len(counts)}"
        counts = counts.loc[counts.sum(axis=1).nlargest(_MOST_BARS).index.sort_values()]
    bars = {str(name): {str(k): float(v) for k, v in part.items()} for name, part in counts.iterrows()}
    return figures.stacked_bars(title, bars, "pictures")


def _comparison(described: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a run, the best first and those that cannot be judged last."""
    rows = []
    ranked = sorted(described, key=_auroc, reverse=True)
    for run in ranked:
        breast = (run["metrics"] or {}).get("breast", {})
        rows.append(
            {
                "run": run["name"],
                "backbone": run["backbone"],
                "size": run["size"],
                "folds": f"{sum(f['finished'] for f in run['folds'])} of {len(run['folds'])} finished",
                "auroc": breast.get("auroc"),
                "behind the first": "" if run is ranked[0] else _behind(ranked[0]["breasts"], run["breasts"]),
                **{name: breast.get(name) for name in ("average_precision", "pf1", "log_loss", "ece")},
            }
        )
    return rows


def _auroc(run: dict[str, Any]) -> float:
    """-1 where there is none."""
    found = (run["metrics"] or {}).get("breast", {}).get("auroc")
    return -1.0 if found is None else found


def _behind(best: pd.DataFrame | None, breasts: pd.DataFrame | None) -> str:
    """By how much, on the breasts that both runs judged, with its 95 % interval."""
    if best is None or breasts is None or (found := intervals.auroc_lead(best, breasts)) is None:
        return ""
    ends = "" if found["interval"] is None else " ({:.3f} to {:.3f})".format(*found["interval"])
    counts = {len(each.dropna(subset=["cancer", "prediction"])) for each in (best, breasts)}
    shared = "" if counts == {found["breasts"]} else f", on {found['breasts']:,} breasts of both"
    return f"{found['lead']:.3f}{ends}{shared}"


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
        ordered = dict(sorted(values.items(), key=lambda item: -item[1][0]))
        drawn.append(figures.intervals("AUROC per breast, 95 % intervals", ordered, "AUROC"))
    curves = {}
    for run in described:
        breasts: pd.DataFrame | None = run["breasts"]
        if breasts is None or not run["full"]:
            continue
        known = breasts[breasts["cancer"].notna()]
        if 0 < known["cancer"].sum() < len(known):
            curves[run["name"]] = known["cancer"].to_numpy(float), known["prediction"].to_numpy(float)
    if curves:
        drawn += [figures.roc("ROC of the runs", curves), figures.precision_recall("Precision of the runs", curves)]
    return drawn


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _number(value: Any, digits: int = 3) -> str:
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}" if isinstance(value, float) else str(value)
