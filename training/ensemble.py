"""The models of one or more runs, and what they say together of a set of pictures.

Folds of a run are averaged as probabilities. Runs keep their own pipeline, precision and aggregation, and are averaged
with weights, a breast at a time. Folds and runs that see the same tensors share one loader.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from dali_pipes.settings import LoaderSettings, PipelineSettings
from preprocessing.errors import InputError, RunError, StoreError
from preprocessing.manifest import Store, open_store
from preprocessing.settings import ConvertSettings
from training import calibration, covariates, metrics, runs
from training.allocator import keep_freed_memory
from training.batch_norm import fold_batch_norms
from training.blend import fit_aggregate, fit_weights
from training.calibration import Calibration
from training.covariates import Covariates
from training.device import pick_device, pick_precision
from training.runs import FoldRun
from training.timing import Untimed, timed
from training.windows import through_window, window_counts

Weights = Sequence[float] | Literal["fitted"] | None  # a run each
Aggregate = Literal["run", "mean", "max", "noisy_or", "fitted"]

# Settings of a conversion that change what a model sees; the others only change how tiles are kept.
DECISIVE = ("levels", "crop", "crop_margin", "frame")
# A damaged tile costs its picture alone here, however many there are.
_NO_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Member:
    """One fold's model, from pictures to logits; `run` is its run's position in the ensemble, `sha256` its weights'."""

    run: int
    sha256: str
    model: Callable[[Tensor], Tensor]
    precision: torch.dtype
    channels_last: bool


@dataclass(frozen=True)
class Group:
    """Members that see the same tensors."""

    pipeline: PipelineSettings
    loader: LoaderSettings
    seed: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Ensemble:
    """Models ready to predict.

    Attributes:
        names: one a run.
        groups: the members, by the tensors that they see.
        weights: of each run, float64 [runs], summing to 1.
        aggregates: each run's way from pictures to a breast.
        prior: share of breasts with cancer among those that the runs were validated on.
        threshold: of the best pF1 on the runs' out-of-fold predictions, aggregated and weighted as here; NaN where none
            was chosen for this ensemble.
        settings: the conversion that the runs were trained on.
        device: where the models are.
        calibration: of a breast's probability, fitted out of fold; `threshold` is on its scale.
        own_calibrations: each run's, of its own breasts' probabilities before they are averaged; empty for none.
        covariates: what each run's breasts' probabilities take from the table, before all else; empty for none.
    """

    names: tuple[str, ...]
    groups: tuple[Group, ...]
    weights: NDArray[np.float64]
    aggregates: tuple[str, ...]
    prior: float
    threshold: float
    settings: ConvertSettings
    device: torch.device
    calibration: Calibration = Calibration()  # noqa: RUF009 - frozen
    own_calibrations: tuple[Calibration, ...] = ()
    covariates: tuple[Covariates, ...] = ()

    def describe(self) -> dict[str, Any]:
        """What predictions of this ensemble are made with, for the record."""
        return {
            "runs": [
                {"name": name, "weight": float(weight), "aggregate": aggregate, "models": hashes}
                for name, weight, aggregate, hashes in zip(
                    self.names, self.weights, self.aggregates, self._hashes(), strict=True
                )
            ],
            "calibration": self.calibration.model_dump(mode="json"),
            "own_calibrations": [each.model_dump(mode="json") for each in self.own_calibrations],
            "covariates": [each.model_dump(mode="json") for each in self.covariates],
            "threshold": self.threshold,
            "prior": self.prior,
        }

    def _hashes(self) -> list[list[str]]:
        """SHA-256 of the weights of each run's models."""
        found: list[list[str]] = [[] for _ in self.names]
        for group in self.groups:
            for member in group.members:
                found[member.run].append(member.sha256)
        return found

    @property
    def batch(self) -> int:
        """Rows after which every group's batches are whole: chunks of a multiple of it have the same batches."""
        return math.lcm(*(group.loader.val_batch_size for group in self.groups))

    @property
    def taken(self) -> tuple[str, ...]:
        """Names of the covariates that any of its runs takes into account."""
        return tuple(dict.fromkeys(name for each in self.covariates for name in each.names))

    @property
    def largest_batch(self) -> int:
        """Pictures in a batch of the group that takes most at once."""
        return max(group.loader.val_batch_size for group in self.groups)

    @property
    def longest_side(self) -> int:
        """The longest side of any group's tensors, in pixels."""
        return max(max(group.pipeline.height, group.pipeline.width) for group in self.groups)

    def in_batches(self, size: int) -> Ensemble:
        """The same ensemble with so many pictures a batch, instead of as many as its runs were validated with."""
        groups = (replace(each, loader=each.loader.model_copy(update={"val_batch_size": size})) for each in self.groups)
        return replace(self, groups=tuple(groups))

    def predict(
        self,
        store: Store,
        rows: pd.DataFrame,
        tta: bool = False,
        done: Callable[[int], None] | None = None,
        monitor: Any = None,
        all_windows: bool = False,
    ) -> tuple[NDArray[np.float64], dict[int, str]]:
        """Predict a set of pictures.

        Args:
            store: where the rows' tiles are.
            rows: of a manifest, with a fresh index.
            tta: average each prediction with that of the picture's left-right mirror image.
            done: told the number of rows that all groups have finished since it was last told.
            monitor: times the wait for batches, their transfer and the models.
            all_windows: average each prediction over the file's own windows instead of taking the first.

        Returns:
            Each run's probability, the mean of its folds, float64 [rows, runs], NaN where there is none; and, by the
            row's position, why there is none.
        """
        sums = np.zeros((len(rows), len(self.names)))
        counts = np.zeros(len(self.names))
        faults: dict[int, str] = {}
        passes = []
        for group in self.groups:
            offered = window_counts(rows, group.pipeline) if all_windows else np.ones(len(rows), np.int64)
            passes += [(group, number, offered) for number in range(offered.max(initial=1))]
        for at, (group, number, offered) in enumerate(passes, start=1):
            shown = through_window(rows, number) if number else rows
            for index, found in self._run_group(group, store, shown, tta, faults, monitor or Untimed()):
                for member, probabilities in zip(group.members, found, strict=True):
                    # A row that has no window of that number has shown all that it has.
                    sums[index, member.run] += np.where(number < offered[index], probabilities / offered[index], 0)
                if at == len(passes) and done:
                    done(len(index))
        for group in self.groups:
            for member in group.members:
                counts[member.run] += 1
        means = sums / counts
        finite = np.atleast_1d(np.isfinite(means).all(axis=1))
        for row in np.flatnonzero(~finite).tolist():
            faults.setdefault(row, "the models gave no finite number")
        return np.where(finite[:, None], means, np.nan), faults

    def combine(self, frame: pd.DataFrame, by_run: NDArray[np.float64]) -> pd.Series:
        """One probability a breast.

        Args:
            frame: `prediction_id` of each picture, and the covariates, NaN where unknown.
            by_run: probabilities, float64 [pictures, runs], all finite.

        Returns:
            Probabilities in [0, 1] by `prediction_id`: each run's pictures aggregated its own way, covariates taken in,
            averaged, then calibrated.
        """
        known = frame.groupby("prediction_id", sort=True).first()  # of a breast's pictures those that say something
        breasts = pd.Series(dtype=np.float64)
        for run, aggregate in enumerate(self.aggregates):
            pictures = pd.Series(by_run[:, run], index=frame.index)
            part = metrics.aggregate_predictions(pictures, frame["prediction_id"], aggregate)
            if self.covariates:
                part = pd.Series(self.covariates[run](part.clip(0, 1), known), part.index)
            if self.own_calibrations:
                part = pd.Series(self.own_calibrations[run](part.clip(0, 1)), part.index)
            part = part * self.weights[run]
            breasts = part if run == 0 else breasts + part
        return pd.Series(self.calibration(breasts.clip(0, 1)), breasts.index)

    def _run_group(
        self, group: Group, store: Store, rows: pd.DataFrame, tta: bool, faults: dict[int, str], monitor: Any
    ) -> Iterator[tuple[NDArray[np.int64], list[NDArray[np.float64]]]]:
        """Positions, int64 [B], and each member's probabilities, float64 [B], NaN where damaged; batch by batch."""
        from dali_pipes.loader import Loader

        device = str(self.device)
        loader = Loader(store, rows, group.pipeline, group.loader, seed=group.seed, train=False, device=device)
        with loader:
            for batch in timed(loader.epoch(0), monitor, "data"):
                with monitor.time("transfer"):
                    image = batch["image"].to(self.device, non_blocking=True)
                    ok = batch["ok"].cpu().numpy()
                with monitor.time("compute"):
                    found = [self.probabilities(member, image, tta).cpu().numpy() for member in group.members]
                yield batch["index"].cpu().numpy(), [np.where(ok, each.astype(np.float64), np.nan) for each in found]
            faults |= loader.bad_samples

    @torch.inference_mode()
    def probabilities(self, member: Member, image: Tensor, tta: bool = False) -> Tensor:
        """Probabilities, float32 [B], of pictures [B, C, H, W], as validation computes them, up to the rounding that
        folding batch normalisation changes."""
        layout = torch.channels_last if member.channels_last else torch.contiguous_format
        views = [image, image.flip(3)] if tta else [image]
        enabled = member.precision != torch.float32
        probabilities = []
        for view in views:
            with torch.autocast(self.device.type, member.precision, enabled=enabled):
                logits = member.model(view.contiguous(memory_format=layout))
            probabilities.append(torch.sigmoid(logits))
        return torch.stack(probabilities).mean(dim=0) if tta else probabilities[0]


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
        RunError: a run is missing, unfinished or damaged, covariates cannot be fitted, or the runs were trained on
            stores converted differently.
        InputError: impossible weights, or the same run twice.
        ConfigError: a GPU is asked for that is not there.
    """
    if not folders:
        raise InputError("predict needs at least one run folder; give one with --runs.")
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise InputError("--runs: the same run is named twice; name each once, and weigh them with weights.")
    place = pick_device(device)
    if place.type == "cpu":
        keep_freed_memory()
    by_run = [runs.folds_of(Path(folder)) for folder in folders]
    folds = [(number, fold) for number, found in enumerate(by_run) for fold in found]
    settings = _common_settings([fold for _, fold in folds])
    grouped: dict[str, list[tuple[int, FoldRun]]] = {}
    for number, fold in folds:
        config = fold.config
        pipeline = config.pipeline.model_copy(update={"augment": PipelineSettings().augment})  # never used here
        key = f"{pipeline.model_dump_json()} {config.data.loader.val_batch_size}"
        grouped.setdefault(key, []).append((number, fold))
    pictures = [pd.concat([fold.validation for fold in found], ignore_index=True) for found in by_run]
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
    for name in DECISIVE:
        here, there = getattr(store.settings, name), getattr(ensemble.settings, name)
        if here != there:
            raise StoreError(
                f"{store.root}: converted with {name} = {_plain(here)}, but the runs were trained on a store with "
                f"{name} = {_plain(there)}. Convert these pictures with the same settings into another folder."
            )


def _group(members: Sequence[tuple[int, FoldRun]], device: torch.device) -> Group:
    config = members[0][1].config
    loader = config.data.loader.model_copy(update={"cache": "none", "max_bad_samples": _NO_LIMIT})
    loaded = []
    for number, fold in members:
        model, described = runs.load_model(fold, device)
        fold_batch_norms(model.backbone)
        channels_last = fold.config.model.channels_last
        if channels_last:
            model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        precision = pick_precision(fold.config.train.precision, device)
        loaded.append(Member(number, described["sha256"], model, precision, channels_last))
    return Group(config.pipeline, loader, config.data.seed, tuple(loaded))


def _common_settings(folds: Sequence[FoldRun]) -> ConvertSettings:
    """The conversion behind every fold; folds of differently converted stores cannot share their input."""
    found = [(str(fold.folder), _settings(fold)) for fold in folds]
    _require_same(found)
    return found[0][1]


def _require_same(found: Sequence[tuple[str, ConvertSettings]]) -> None:
    for (one, a), (other, b) in itertools.pairwise(found):
        for name in DECISIVE:
            if getattr(a, name) != getattr(b, name):
                raise RunError(
                    f"{one} was trained on a store with {name} = {_plain(getattr(a, name))}, {other} with {name} = "
                    f"{_plain(getattr(b, name))}. Predict with each alone and average the submissions."
                )


def _settings(fold: FoldRun) -> ConvertSettings:
    """The settings of the store that a fold was trained on, as its run recorded them, else as the store says."""
    recorded = fold.environment.get("store_settings")
    if recorded is not None:
        return ConvertSettings.model_validate(recorded)
    try:
        return open_store(fold.environment.get("store", "")).settings
    except StoreError:
        raise RunError(
            f"{fold.folder / runs.ENVIRONMENT}: does not say how the training pictures were converted, and their store "
            f"{fold.environment.get('store')} is not there. Train the run again."
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
        raise InputError(f"weights: expected {count} numbers of 0 or more, not all 0; found {list(weights or [])}.")
    return given / given.sum()


def _plain(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
