"""Every figure over a run's out-of-fold predictions: each picture is judged by the model that never saw its patient."""

from __future__ import annotations

import hashlib
import io
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from preprocessing.errors import RunError
from preprocessing.manifest import Store
from training import metrics, run_files, runs
from training.evaluation import intervals
from training.inference import covariates
from training.runs import Run

log = logging.getLogger(__name__)

FORMAT = 2  # of metrics.json; others are made anew
BREAST_GROUPS = ("site_id", "machine_id", "density", "age", "implant")
PICTURE_GROUPS = ("view",)
# A threshold is called unstable where moving it to an end of its interval costs more than this share of pF1.
UNSTABLE_LOSS = 0.1
_FLAT = ("count", "positives", "auroc", "average_precision", "pf1", "pf1_best", "threshold", "log_loss", "ece")
_WITH_ENDS = ("auroc", "average_precision")


def evaluate(
    run: str | Path, store: Store | None = None, resamples: int = 1000, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Judge a run and write metrics.json, metrics.csv and out_of_fold.csv into its folder.

    Args:
        run: the run's folder; all folds in it that have predictions are taken together.
        store: where given, it must be the one that the run was trained on; what its table says of the pictures now
            (`runs.FACTS`) replaces what it said then.
        resamples: bootstrap resamples of patients.
        names: of the covariates that a breast's probability takes into account; None for the run's own.

    Returns:
        What metrics.json holds, and `judge` gives.

    Raises:
        RunError: no predictions there, the store is another, or the covariates cannot be fitted.
    """
    opened = runs.open_run(run)
    if store is not None:
        _check_store(opened, store)
        take_facts(opened, store)
    result, breasts = judge(opened, out_of_fold(opened), resamples, names)
    run_files.write_json(opened.root / runs.METRICS, result)
    run_files.write_table(opened.root / "metrics.csv", as_table(result))
    run_files.write_table(opened.root / "out_of_fold.csv", breasts)
    return result


def judge(
    run: Run, frame: pd.DataFrame, resamples: int = 1000, names: Sequence[str] | None = None
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Every figure of a run's predictions.

    Args:
        run: where its settings, and what was trained on, are recorded.
        frame: a row a picture, as `out_of_fold` gives it.
        resamples, names: as in `evaluate`.

    Returns:
        The breasts, what `with_covariates` gives; and, before them, a dict as JSON can hold it (no NaN but None):
        `format`; `run`, its folder; `folds` (a dict each: what `judged_from` gives, and `breast`); `picture`, `breast`
        and `patient`, each what `metrics.summarise` gives, the last two with `intervals`; `mean_of_folds`, of the
        ranking figures per breast; `threshold`, what `choose_threshold` gives; `subgroups`, what `intervals.subgroups`
        gives; `unseen`, what `unseen` gives; `aggregate`; `covariates`, their names; `pictures_alone`, the breasts'
        `auroc` and its `mean_of_folds` without them, or None where there are none; `warnings`, sentences.

    Raises:
        RunError: the covariates cannot be fitted.
    """
    settings = run.folds[0].config.train
    aggregate, taken = settings.aggregate, settings.covariates if names is None else names
    alone = metrics.per_breast(frame, aggregate)
    breasts = with_covariates(alone, taken)
    patients = metrics.per_patient(breasts)
    threshold = choose_threshold(breasts, resamples)
    value = threshold["value"]
    result = {
        "format": FORMAT,
        "run": str(run.root),
        "aggregate": aggregate,
        "folds": [{**of, "breast": _of_fold(breasts, of["fold"], value)} for of in judged_from(run)],
        "picture": metrics.summarise(frame["cancer"], frame["prediction"], value),
        "breast": intervals.with_intervals(breasts, value, resamples),
        "mean_of_folds": _mean_of_folds(breasts),
        "patient": intervals.with_intervals(patients, value, resamples),
        "threshold": threshold,
        "subgroups": [
            *intervals.subgroups(breasts, BREAST_GROUPS, value, resamples),
            *intervals.subgroups(frame, PICTURE_GROUPS, value, resamples),
        ],
        "unseen": unseen(run, frame, breasts, value, resamples),
        "covariates": list(taken),
        "pictures_alone": _pictures_alone(alone) if taken else None,
    }
    result["warnings"] = _warnings(run, result)
    return run_files.plain(result), breasts


def judged_from(run: Run) -> list[dict[str, Any]]:
    """What figures of a run are taken from: a dict each fold, its number `fold`, whether it has `finished`, and
    `validation`, the SHA-256 of its predictions (None where there are none)."""
    tables = [fold.folder / runs.VALIDATION for fold in run.folds]
    digests = [hashlib.sha256(table.read_bytes()).hexdigest() if table.is_file() else None for table in tables]
    return [
        {"fold": fold.fold, "finished": fold.finished, "validation": digest}
        for fold, digest in zip(run.folds, digests, strict=True)
    ]


def out_of_fold(run: Run) -> pd.DataFrame:
    """Validation predictions of all folds, a row a picture.

    Raises:
        RunError: none there, or a picture in two folds.
    """
    judged = [fold for fold in run.folds if fold.finished or (fold.folder / runs.VALIDATION).is_file()]
    if not judged:
        raise RunError(f"{run.root}: no fold has finished its first epoch; train with --resume first.")
    return runs.held_out(judged, run.root)


def with_covariates(breasts: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The breasts, what `metrics.per_breast` gives, with covariates taken into their prediction; what each was before,
    from its pictures alone, is then in the column `pictures`.

    Raises:
        RunError: the covariates cannot be fitted.
    """
    if not names:
        return breasts
    return breasts.assign(prediction=covariates.cross_fitted(names, breasts), pictures=breasts["prediction"])


def choose_threshold(breasts: pd.DataFrame, resamples: int) -> dict[str, Any]:
    """The threshold of the best pF1 over all out-of-fold predictions, and how far it can be trusted.

    Returns:
        `value`; `interval` over bootstrap resamples of patients; `pf1_out_of_fold`, where each fold is cut at the
        threshold that is best on the others, NaN with a single fold, and `pf1_interval`, or None; `unstable`: moving it
        within its interval costs over a tenth of pF1.
    """
    breasts = breasts[breasts["cancer"].notna()]
    labels, predictions = breasts["cancer"], breasts["prediction"]
    best, value = metrics.pf1_best(labels, predictions)
    interval = intervals.bootstrap(breasts, resamples)["threshold"]
    ends = [metrics.pf1_at(labels, predictions, end) for end in interval or []]
    called = _cross_thresholded(breasts)
    return {
        "value": value,
        "interval": interval,
        "pf1_out_of_fold": math.nan if called is None else metrics.pf1(labels, called["prediction"]),
        "pf1_interval": None if called is None else intervals.bootstrap(called, resamples)["pf1"],
        "unstable": interval is None or min(ends) < (1 - UNSTABLE_LOSS) * best,
    }


def unseen(
    run: Run, frame: pd.DataFrame, breasts: pd.DataFrame, threshold: float, resamples: int
) -> dict[str, Any] | None:
    """Figures of breasts with pictures of machines or sites that their fold's model never saw, beside the others.

    Args:
        run: where the machines and sites of training are recorded.
        frame: a row a picture.
        breasts: a row a breast.
        threshold: where the confusion is counted.
        resamples: of patients, for the intervals.

    Returns:
        `machines`, `sites` (those unseen somewhere), `unseen` and `seen` (what `intervals.with_intervals` gives), or
        None.
    """
    new = pd.Series(False, index=frame.index)
    machines, sites = set(), set()
    for fold in run.folds:
        trained = fold.environment.training  # of which runs of earlier versions say nothing
        own = frame["fold"] == fold.fold
        strange_machine = own & ~frame["machine_id"].isin(trained.machines or frame["machine_id"].unique())
        strange_site = own & ~frame["site_id"].isin(trained.sites or frame["site_id"].unique())
        machines |= set(frame.loc[strange_machine, "machine_id"])
        sites |= set(frame.loc[strange_site, "site_id"])
        new |= strange_machine | strange_site
    if not new.any():
        return None
    strange = breasts["prediction_id"].isin(frame.loc[new, "prediction_id"])
    return {
        "machines": sorted(machines),
        "sites": sorted(sites),
        **{
            name: intervals.with_intervals(part, threshold, resamples)
            for name, part in (("unseen", breasts[strange]), ("seen", breasts[~strange]))
        },
    }


def headline(result: dict[str, Any]) -> list[dict[str, str]]:
    """The figures to print, a row each: figure, value, 95 % interval."""
    breast = result["breast"]
    names = {
        "auroc": "AUROC",
        "average_precision": "average precision",
        "pf1": "pF1",
        "pf1_best": "pF1 at the threshold that is best here",
        "threshold": "threshold",
    }
    rows = [
        {
            "figure": f"{label} (per breast)",
            "value": _number(breast[name]),
            "95 % interval": _interval(breast["intervals"].get(name)),
        }
        for name, label in names.items()
    ]
    if (honest := result["threshold"]["pf1_out_of_fold"]) is not None:
        figure = "pF1, each fold at the others' best threshold (per breast)"
        interval = _interval(result["threshold"]["pf1_interval"])
        rows.insert(-1, {"figure": figure, "value": _number(honest), "95 % interval": interval})
    if len(result["folds"]) > 1:
        mean = _number(result["mean_of_folds"]["auroc"])
        rows.insert(1, {"figure": "AUROC (mean of folds)", "value": mean, "95 % interval": ""})
    if (alone := result.get("pictures_alone")) is not None:
        text = f"with {', '.join(result['covariates'])}; pictures alone {_number(alone['auroc'])}"
        if len(result["folds"]) > 1:
            text += f", mean of folds {_number(alone['mean_of_folds'])}"
        rows.append({"figure": "judged by", "value": text, "95 % interval": ""})
    counts = f"{breast['count']:,} breasts, {breast['positives']:,} with cancer, {len(result['folds'])} fold(s)"
    rows.append({"figure": "judged", "value": counts, "95 % interval": ""})
    rows += [{"figure": "warning", "value": text, "95 % interval": ""} for text in result["warnings"]]
    return rows


def as_table(result: dict[str, Any]) -> pd.DataFrame:
    """All figures as one table: level (picture, breast, patient), group, value, a column a figure, and the ends of the
    95 % intervals of AUROC and average precision where they were asked for."""
    rows = [
        {"level": level, "group": "all", "value": "", **result[level]} for level in ("picture", "breast", "patient")
    ]
    rows += [{"level": "breast", "group": "fold", "value": part["fold"], **part["breast"]} for part in result["folds"]]
    for part in result["subgroups"]:
        rows.append({"level": "picture" if part["group"] in PICTURE_GROUPS else "breast", **part})
    if result["unseen"]:
        rows += [
            {"level": "breast", "group": "machines", "value": n, **result["unseen"][n]} for n in ("seen", "unseen")
        ]
    for row in rows:
        for name in _WITH_ENDS:
            row[f"{name}_low"], row[f"{name}_high"] = row.get("intervals", {}).get(name) or (None, None)
    ends = [f"{name}_{end}" for name in _WITH_ENDS for end in ("low", "high")]
    return pd.DataFrame(rows)[["level", "group", "value", *_FLAT, *ends]]


def _pictures_alone(breasts: pd.DataFrame) -> dict[str, float]:
    figures = metrics.summarise(breasts["cancer"], breasts["prediction"])
    return {"auroc": figures["auroc"], "mean_of_folds": _mean_of_folds(breasts)["auroc"]}


def _cross_thresholded(breasts: pd.DataFrame) -> pd.DataFrame | None:
    """The breasts with 0 or 1 for their prediction, each fold's cut at the threshold that is best on the others; None
    with a single fold."""
    numbers = breasts["fold"].unique()
    if len(numbers) < 2:
        return None
    called = pd.Series(0.0, index=breasts.index)
    for number in numbers:
        others, own = breasts[breasts["fold"] != number], breasts["fold"] == number
        _, threshold = metrics.pf1_best(others["cancer"], others["prediction"])
        called[own] = (breasts.loc[own, "prediction"] >= threshold).astype(float)
    return breasts.assign(prediction=called)


def _of_fold(breasts: pd.DataFrame, fold: int, threshold: float) -> dict[str, Any]:
    own = breasts[breasts["fold"] == fold]
    return metrics.summarise(own["cancer"], own["prediction"], threshold)


def _mean_of_folds(breasts: pd.DataFrame) -> dict[str, float]:
    """Ranking figures averaged over the folds: models of different folds need not share a scale."""
    parts = [metrics.summarise(part["cancer"], part["prediction"]) for _, part in breasts.groupby("fold")]
    return {name: float(np.mean([part[name] for part in parts])) for name in ("auroc", "average_precision", "pf1_best")}


def take_facts(run: Run, store: Store) -> None:
    """Bring what the run's predictions say of their pictures up to date with the store that they are of: a table may be
    corrected after training."""
    rows = store.manifest.set_index("image_id")
    for fold in run.folds:
        path = fold.folder / runs.VALIDATION
        if not path.is_file():
            continue
        as_text = {"dtype": str, "keep_default_na": False}  # so that no number changes in being read and written
        names = [name for name in runs.FACTS if name in fold.validation and name in rows]
        said = pd.read_csv(path, **as_text)
        there = said.index[said["image_id"].isin(rows.index)]
        if there.empty or not names:
            continue
        written = rows.loc[said.loc[there, "image_id"], names].to_csv(index=False)
        facts = said[names].copy()
        facts.loc[there] = pd.read_csv(io.StringIO(written), skip_blank_lines=False, **as_text).to_numpy()
        changed = (facts != said[names]).any(axis=1)
        if changed.any():
            with runs.locked(fold.folder):
                log.info("%s: what the store's table says of %d pictures is taken anew.", fold.folder, changed.sum())
                run_files.write_table(path, said.assign(**{name: facts[name] for name in names}))
            fold.__dict__.pop("validation")


def _check_store(run: Run, store: Store) -> None:
    for fold in run.folds:
        trained_on = fold.environment.store_fingerprint
        if not store.is_known_as(trained_on):
            raise RunError(
                f"{fold.folder}: it was trained on another store ({fold.environment.store}, fingerprint "
                f"{str(trained_on)[:12]}) than {store.root} ({store.fingerprint[:12]}); give that one with --store."
            )


def _warnings(run: Run, result: dict[str, Any]) -> list[str]:
    found = []
    unfinished = [str(fold.fold) for fold in run.folds if not fold.finished]
    if unfinished:
        found.append(
            f"Training has not finished in fold(s) {', '.join(unfinished)}; figures are of the best epoch so far."
        )
    if result["threshold"]["interval"] is None:
        found.append("Too few patients with or without cancer for any interval, or to rely on the threshold.")
    elif result["threshold"]["unstable"]:
        found.append(
            "The threshold is unstable: within its interval pF1 falls by more than a tenth. Do not rely on it."
        )
    positives = result["breast"]["positives"]
    if positives < 30:
        wide = ": every interval is wide" if result["threshold"]["interval"] is not None else ""
        found.append(f"Only {positives} breasts with cancer{wide}.")
    return found


def _number(value: float | None) -> str:
    return "n/a" if value is None or np.isnan(value) else f"{value:.4f}"


def _interval(ends: list[float] | None) -> str:
    return f"{ends[0]:.4f} to {ends[1]:.4f}" if ends else ""
