"""Ensembles from run folders: their models loaded; aggregation, covariates, weights, calibration and threshold fitted
on the breasts that no model learnt from."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from dali_pipes.settings import PipelineSettings
from preprocessing.errors import InputError, RunError, StoreError
from preprocessing.manifest import Store, open_store
from preprocessing.settings import ConvertSettings
from training import metrics, runs
from training.cpu import prepare_cpu
from training.device import pick_device, pick_precision
from training.inference import calibration, covariates
from training.inference.batch_norm import fold_batch_norms
from training.inference.blend import fit_aggregate, fit_weights
from training.inference.ensemble import Ensemble, Group, Member
from training.runs import FoldRun

log = logging.getLogger(__name__)

Weights = Sequence[float] | Literal["fitted"] | None  # a run each
Aggregate = Literal["run", "mean", "max", "noisy_or", "fitted"]

# A damaged tile costs its picture alone here, however many there are.
_NO_LIMIT = 2**31 - 1


def open_ensemble(
    folders: Sequence[Path],
    device: str = "auto",
    weights: Weights = None,
    calibrate: calibration.Method = "none",
    aggregate: Aggregate = "run",
    names: Sequence[str] | None = None,
) -> Ensemble:
    """Load the best model of every fold of every run.

    Args:
        folders: run folders (`runs/NAME`, all its folds) or single folds of them (`runs/NAME/fold0`).
        device: 'auto', 'cpu', 'cuda' or 'cuda:N'.
        weights: one a run, not negative; 'fitted' for those of the least log loss on the breasts that every run held
            out; equal ones without it.
        calibrate: how the breasts' probabilities are calibrated on the runs' out-of-fold predictions.
        aggregate: from pictures to a breast: each run's own way, another one for all, or 'fitted': the generalised mean
            of the least log loss on each run's out-of-fold predictions.
        names: of the covariates that a breast's probability takes into account, fitted on each run's out-of-fold
            predictions; None for each run's own.

    Raises:
        RunError: a run is missing, has a fold that has not finished its first epoch, or is damaged, covariates cannot
            be fitted, or the runs were trained on stores converted differently.
        InputError: impossible weights, or the same run twice.
        ConfigError: a GPU is asked for that is not there.
    """
    if not folders:
        raise InputError("predict needs at least one run folder; give one with --runs.")
    place = pick_device(device)
    if place.type == "cpu":
        prepare_cpu()
    by_run = [runs.folds_of(Path(folder)) for folder in folders]
    folds = [(number, fold) for number, found in enumerate(by_run) for fold in found]
    named = [fold.folder.resolve() for _, fold in folds]
    if twice := next((folder for folder in named if named.count(folder) > 1), None):
        raise InputError(f"--runs: {twice} is named twice, or beside its own run; name it once.")
    late = [str(fold.folder) for _, fold in folds if not fold.finished]
    if late:
        log.warning("Training has not finished in %s: the best epoch so far is taken.", ", ".join(late))
    settings = _common_settings([fold for _, fold in folds])
    grouped: dict[str, list[tuple[int, FoldRun]]] = {}
    for number, fold in folds:
        config = fold.config
        pipeline = config.pipeline.model_copy(update={"augment": PipelineSettings().augment})  # never used here
        key = f"{pipeline.model_dump_json()} {config.data.loader.val_batch_size}"
        grouped.setdefault(key, []).append((number, fold))
    pictures = [runs.held_out(found, folder) for found, folder in zip(by_run, folders, strict=True)]
    aggregates = [_aggregate(aggregate, found, each) for found, each in zip(by_run, pictures, strict=True)]
    held_out = [metrics.per_breast(each, way) for each, way in zip(pictures, aggregates, strict=True)]
    taken = [
        covariates.fit(found[0].config.train.covariates if names is None else names, each)
        for found, each in zip(by_run, held_out, strict=True)
    ]
    judged = _out_of_fold(
        [each.assign(prediction=fit(each["prediction"], each)) for each, fit in zip(held_out, taken, strict=True)]
    )
    shares = _weights(weights, judged)
    breasts = _mixed(judged, shares)
    fitted = calibration.fit(calibrate, breasts["cancer"], breasts["prediction"])
    return Ensemble(
        names=tuple(str(folder) for folder in folders),
        groups=tuple(_group(members, place) for members in grouped.values()),
        weights=shares,
        aggregates=tuple(aggregates),
        # Half a breast is added to either class, so that it is never 0 or 1 (Krichevsky & Trofimov 1981).
        prior=(float(breasts["cancer"].sum()) + 0.5) / (len(breasts) + 1),
        threshold=metrics.pf1_best(breasts["cancer"], fitted(breasts["prediction"]))[1],
        settings=settings,
        device=place,
        calibration=fitted,
        covariates=tuple(taken),
    )


def require_same_conversion(ensemble: Ensemble, store: Store) -> None:
    """Refuse a store whose pictures were prepared otherwise than those that the models learnt from.

    Raises:
        StoreError: names the first setting that differs.
    """
    if difference := store.settings.difference(ensemble.settings):
        name, here, there = difference
        raise StoreError(
            f"{store.root}: converted with {name} = {here}, but the runs were trained on a store with {name} = "
            f"{there}. Convert these pictures with the same settings into another folder."
        )


def _group(members: Sequence[tuple[int, FoldRun]], device: torch.device) -> Group:
    config = members[0][1].config
    # What served training does not serve here: the cores have files to decode, and a picture is seen once.
    here = {"steps_on": "auto", "cache": "none", "max_bad_samples": _NO_LIMIT}
    loader = config.data.loader.model_copy(update=here)
    loaded = []
    for number, fold in members:
        model, described = runs.load_model(fold, device)
        fold_batch_norms(model.backbone)
        channels_last = fold.config.model.channels_last
        if channels_last:
            model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        trained = fold.config.train.precision
        # The weights are float32; a CPU's convolutions have no float16 to autocast to.
        precision = pick_precision("fp32" if trained == "fp16" and device.type == "cpu" else trained, device)
        loaded.append(Member(number, described["sha256"], model, precision, channels_last))
    return Group(config.pipeline, loader, tuple(loaded))


def _common_settings(folds: Sequence[FoldRun]) -> ConvertSettings:
    """The conversion behind every fold; folds of differently converted stores cannot share their input."""
    found = [(str(fold.folder), _settings(fold)) for fold in folds]
    _require_same(found)
    return found[0][1]


def _require_same(found: Sequence[tuple[str, ConvertSettings]]) -> None:
    for (one, a), (other, b) in itertools.pairwise(found):
        if difference := a.difference(b):
            name, here, there = difference
            raise RunError(
                f"{one} was trained on a store with {name} = {here}, {other} with {name} = {there}. Predict with each "
                "alone and average the submissions."
            )


def _settings(fold: FoldRun) -> ConvertSettings:
    """The settings of the store that a fold was trained on, as its run recorded them, else as the store says."""
    recorded = fold.environment.store_settings
    if recorded is not None:
        return recorded
    try:
        return open_store(fold.environment.store).settings
    except StoreError:
        raise RunError(
            f"{fold.folder / runs.ENVIRONMENT}: does not say how the training pictures were converted, and their store "
            f"{fold.environment.store} is not there. Train the run again."
        ) from None


def _aggregate(aggregate: Aggregate, folds: Sequence[FoldRun], pictures: pd.DataFrame) -> str:
    if aggregate == "fitted":
        return fit_aggregate(pictures)
    return folds[0].config.train.aggregate if aggregate == "run" else aggregate


def _out_of_fold(held_out: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Every breast that was held out, by prediction_id: `cancer`, and a column a run (0, 1, ...) with what the run
    predicted, NaN where it did not hold the breast out."""
    columns, cancer = [], []
    for each in held_out:
        breasts = each.dropna(subset=["cancer"]).set_index("prediction_id")
        columns.append(breasts["prediction"])
        cancer.append(breasts["cancer"])
    labels = pd.concat(cancer).groupby(level=0).max()
    return pd.concat([labels, *columns], axis=1, keys=["cancer", *range(len(columns))]).sort_index()


def _mixed(judged: pd.DataFrame, weights: NDArray[np.float64]) -> pd.DataFrame:
    """`cancer` and `prediction` of every breast: the mean of the runs that held it out, weighted."""
    by_run = judged.drop(columns="cancer").to_numpy(np.float64)
    held_out = np.isfinite(by_run) * weights
    with np.errstate(invalid="ignore"):
        mixed = np.nansum(by_run * weights, axis=1) / held_out.sum(axis=1)
    return judged[["cancer"]].assign(prediction=mixed).dropna()


def average(ensembles: Sequence[Ensemble], weights: Sequence[float] | None = None) -> Ensemble:
    """Ensembles of one run each as one. Each keeps its calibration; no threshold was ever chosen for their mean.

    Args:
        ensembles: on one device.
        weights: one each, not negative; equal ones without it.

    Raises:
        RunError: they want pictures that were converted differently.
        InputError: impossible weights.
    """
    first = ensembles[0]
    _require_same([(ensemble.names[0], ensemble.settings) for ensemble in ensembles])
    groups: dict[str, Group] = {}
    for run, ensemble in enumerate(ensembles):
        (group,) = ensemble.groups
        key = f"{group.pipeline.model_dump_json()} {group.loader.val_batch_size}"
        members = tuple(replace(member, run=run) for member in group.members)
        groups[key] = replace(group, members=(*(groups[key].members if key in groups else ()), *members))
    return Ensemble(
        names=tuple(ensemble.names[0] for ensemble in ensembles),
        groups=tuple(groups.values()),
        weights=given_weights(weights, len(ensembles)),
        aggregates=tuple(ensemble.aggregates[0] for ensemble in ensembles),
        prior=float(np.mean([ensemble.prior for ensemble in ensembles])),
        threshold=math.nan,
        settings=first.settings,
        device=first.device,
        own_calibrations=tuple(ensemble.calibration for ensemble in ensembles),
        covariates=tuple(ensemble.covariates[0] for ensemble in ensembles),
    )


def _weights(weights: Weights, judged: pd.DataFrame) -> NDArray[np.float64]:
    if isinstance(weights, str):
        shared = judged.dropna()
        return fit_weights(shared["cancer"], shared.drop(columns="cancer"))
    return given_weights(weights, judged.shape[1] - 1)


def given_weights(weights: Sequence[float] | None, count: int) -> NDArray[np.float64]:
    """Weights as numbers that sum to 1; equal ones for None.

    Raises:
        InputError: not as many as there are runs, or negative, or all 0.
    """
    given = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    if len(given) != count or not np.isfinite(given).all() or (given < 0).any() or given.sum() <= 0:
        raise InputError(
            f"weights: expected {count} number(s) of 0 or more, one a run, not all 0; found {list(weights or [])}."
        )
    return given / given.sum()
