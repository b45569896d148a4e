"""The models of one or more runs, and what they say together of a set of pictures.

Folds of a run are averaged as probabilities. Runs keep their own pipeline, precision and aggregation, and are averaged
with weights, a breast at a time. Folds and runs that see the same tensors share one loader.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from dali_pipes.settings import LoaderSettings, PipelineSettings
from preprocessing.manifest import Store
from preprocessing.settings import ConvertSettings
from training import metrics
from training.inference.calibration import Calibration
from training.inference.covariates import Covariates
from training.inference.windows import through_each_window, window_counts
from training.timing import Untimed, timed

_Outputs = TypeVar("_Outputs")


@dataclass(frozen=True)
class Member:
    """One fold's model, from pictures to logits; `run` is its run's position in the ensemble, `sha256` its weights'."""

    run: int
    sha256: str
    model: Callable[[Tensor], Tensor]
    precision: torch.dtype
    channels_last: bool

    def apply(self, function: Callable[[Tensor], _Outputs], image: Tensor) -> _Outputs:
        """A function of the model, of pictures [B, C, H, W], in the layout and precision that it was validated in."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        with torch.autocast(image.device.type, self.precision, enabled=self.precision != torch.float32):
            return function(image.contiguous(memory_format=layout))


@dataclass(frozen=True)
class Group:
    """Members that see the same tensors."""

    pipeline: PipelineSettings
    loader: LoaderSettings
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
        faults: dict[int, str] = {}
        for group in self.groups:
            counts = window_counts(rows, group.pipeline) if all_windows else np.ones(len(rows), np.int64)
            shown = through_each_window(rows, counts) if all_windows else rows
            position = np.repeat(np.arange(len(rows)), counts)
            last = np.cumsum(counts) - 1  # of each row's in `shown`
            damaged: dict[int, str] = {}
            for index, found in self._run_group(group, store, shown, tta, damaged, monitor or Untimed()):
                at = position[index]
                for member, probabilities in zip(group.members, found, strict=True):
                    np.add.at(sums[:, member.run], at, probabilities / counts[at])
                if group is self.groups[-1] and done:
                    done(int(np.isin(index, last).sum()))
            faults |= {int(position[index]): why for index, why in damaged.items()}
        means = sums / [len(hashes) for hashes in self._hashes()]
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
        loader = Loader(store, rows, group.pipeline, group.loader, train=False, device=device)
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
        views = [image, image.flip(3)] if tta else [image]
        probabilities = [torch.sigmoid(member.apply(member.model, view)) for view in views]
        return torch.stack(probabilities).mean(dim=0) if tta else probabilities[0]
