"""A breast's probability from what its pictures say and what the table says of the patient, such as age.

A logistic regression of the cancer on the pictures' logit and the covariates, fitted on breasts that no model learnt
from. Age is among the strongest risk factors there are, and a model of pictures alone sees it only in the tissue.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, model_validator
from scipy.special import expit

from preprocessing.errors import InputError, RunError
from training.inference.calibration import logit

# Numbers of the table that a patient to predict has, too: the challenge's test table holds both.
NAMES = ("age", "implant")
_PARTS = 5


class Covariates(BaseModel):
    """The fitted model, as `model.json` keeps it; without names it leaves probabilities alone.

    Attributes:
        names: of the covariates, each one of `NAMES`.
        intercept, slope: of the logit of the pictures' probability.
        weights: of each covariate, in logits a unit (a year of age).
        means: of each covariate over the breasts that it was fitted on; stands in where a value is missing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    names: tuple[str, ...] = ()
    intercept: float = 0.0
    slope: float = 1.0
    weights: tuple[float, ...] = ()
    means: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _whole(self) -> Covariates:
        if not len(self.names) == len(self.weights) == len(self.means) or not set(self.names) <= set(NAMES):
            raise ValueError(f"expected a weight and a mean for each name, of {', '.join(NAMES)}")
        return self

    def __call__(self, probabilities: ArrayLike, table: pd.DataFrame) -> NDArray[np.float64]:
        """Probabilities, float64 [breasts] in [0, 1], of the pictures' own, likewise; NaN stays.

        Args:
            probabilities: in [0, 1], [breasts].
            table: the breasts' covariates, a row each; NaN, or no such column, where unknown.
        """
        given = np.asarray(probabilities, np.float64)
        if not self.names:
            return given
        values = _filled(table, self.names, np.array(self.means)) - np.array(self.means)
        return expit(self.intercept + self.slope * logit(given) + values @ np.array(self.weights))


def parse_names(text: str | None) -> tuple[str, ...] | None:
    """`covariates` from a command line's text: names with commas between them, or 'none'; None stays.

    Raises:
        InputError: an unknown name.
    """
    if text is None:
        return None
    names = tuple(dict.fromkeys(name.strip() for name in text.split(","))) if text != "none" else ()
    for name in names:
        if name not in NAMES:
            raise InputError(f"--covariates {text}: expected 'none' or some of {', '.join(NAMES)}, found '{name}'.")
    return names


def fit(names: Sequence[str], breasts: pd.DataFrame) -> Covariates:
    """The logistic regression of the breasts' cancer; a little ridge keeps it finite where a few breasts are separable.

    Args:
        names: of the covariates; none give a `Covariates` that changes nothing.
        breasts: `cancer` (NaN: left out), `prediction`, from models that did not learn from the breast, and the
            covariates, NaN where unknown.

    Raises:
        RunError: the breasts are all of one class, or a covariate is unknown for all of them.
    """
    if not names:
        return Covariates()
    known = breasts.dropna(subset=["cancer", "prediction"])
    where = f"covariates {', '.join(names)}"
    if known["cancer"].nunique() < 2:
        raise RunError(
            f"{where}: the out-of-fold breasts to fit them on are all of one class. Train on more patients, or leave "
            "them out with --covariates none."
        )
    absent = [name for name in names if name not in known or known[name].isna().all()]
    if absent:
        raise RunError(
            f"{where}: {absent[0]} is unknown for all pictures that the run was validated on. Give it in the table "
            "that is converted and evaluate again, or leave it out with --covariates none."
        )
    from sklearn.linear_model import LogisticRegression

    means = known[list(names)].mean().to_numpy(np.float64)
    inputs = np.column_stack([logit(known["prediction"]), _filled(known, names, means) - means])
    spread = inputs.std(axis=0)
    spread[spread == 0] = 1.0  # says nothing, and gets no weight
    fitted = LogisticRegression().fit(inputs / spread, known["cancer"].to_numpy(np.int64))
    slope, *weights = (fitted.coef_[0] / spread).tolist()
    return Covariates(
        names=tuple(names),
        intercept=float(fitted.intercept_[0]),
        slope=slope,
        weights=tuple(weights),
        means=tuple(means.tolist()),
    )


def cross_fitted(names: Sequence[str], breasts: pd.DataFrame) -> NDArray[np.float64]:
    """What `fit` gives for breasts that it was not fitted on, so that figures over them are honest.

    Each fold is predicted by what was fitted on the others; of a single fold, each fifth of the patients.

    Args:
        names: of the covariates.
        breasts: as `fit` takes them, with `patient_id` and `fold`.

    Returns:
        Probabilities, float64 [breasts].

    Raises:
        RunError: as `fit`, or a single fold with too few patients to be parted.
    """
    found = breasts["prediction"].to_numpy(np.float64).copy()
    if not names:
        return found
    parts = breasts["fold"].to_numpy()
    if len(np.unique(parts)) < 2:
        parts = _patients_parted(names, breasts)
    for part in np.unique(parts):
        own = parts == part
        found[own] = fit(names, breasts[~own])(found[own], breasts[own])
    return found


def _patients_parted(names: Sequence[str], breasts: pd.DataFrame) -> NDArray[np.int64]:
    """A number for each breast, the same for all of a patient's, cancers spread evenly."""
    from sklearn.model_selection import StratifiedGroupKFold

    ill = breasts["cancer"].fillna(0).gt(0).groupby(breasts["patient_id"]).max()
    count = min(_PARTS, int(ill.sum()), int((~ill).sum()))
    if count < 2:
        raise RunError(
            f"covariates {', '.join(names)}: a single fold's figures need at least two patients with and two without "
            "cancer in it. Train more folds, or leave them out: evaluate --covariates none."
        )
    parts = np.zeros(len(breasts), np.int64)
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=0)
    labels = breasts["patient_id"].map(ill).astype(int)
    for number, (_, held_out) in enumerate(splitter.split(parts, labels, breasts["patient_id"])):
        parts[held_out] = number
    return parts


def _filled(table: pd.DataFrame, names: Sequence[str], means: NDArray[np.float64]) -> NDArray[np.float64]:
    """The covariates, float64 [rows, names], means where they are unknown."""
    values = table.reindex(columns=list(names)).to_numpy(np.float64)
    return np.where(np.isnan(values), means, values)
