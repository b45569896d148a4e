"""How much each run of an ensemble counts, and how its pictures become a breast: fitted on breasts that no model learnt
from."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from preprocessing.errors import RunError
from training import metrics
from training.inference import calibration
from training.inference.calibration import logit

_PEAKED = 50.0  # an exponent that is as good as the maximum
_MARGIN = 1e-7  # mixtures are kept this far from 0 and 1, where the loss is infinite
_STEEPEST = 100.0  # of a recalibration: runs that part the classes without a mistake would want infinity
_TIE = 1e-4  # of each run's own loss: of mixtures that are as good, that of the better runs


def fit_weights(labels: ArrayLike, predictions: ArrayLike) -> NDArray[np.float64]:
    """The convex mixture of the runs (linear opinion pool, Stone 1961) with the least mean log loss after a logistic
    recalibration (Platt 1999): what is fitted is how runs are weighed against each other, not how sure they are, for
    runs whose epochs were balanced otherwise differ in that alone.

    Args:
        labels: 0 or 1 of each breast, [breasts].
        predictions: probabilities, [breasts, runs], each from models that did not learn from the breast.

    Returns:
        float64 [runs], 0 or more, summing to 1.

    Raises:
        RunError: no breast was held out by every run, or those are all of one class.
    """
    cancer, given = np.asarray(labels, np.float64), np.asarray(predictions, np.float64)
    if len(np.unique(cancer)) < 2:
        raise RunError(
            f"--weights fitted: {len(cancer)} breasts were held out by every run, and it takes some with and some "
            "without cancer. Give the runs folds of the same patients, or numbers such as --weights 2,1."
        )
    count = given.shape[1]
    if count == 1:
        return np.ones(1)
    from scipy.optimize import minimize

    alone = np.array([_recalibrated(cancer, column)[0] for column in given.T])

    def loss(found: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights, slope, bias = found[:count], found[count], found[count + 1]
        mixed = np.clip(given @ weights, _MARGIN, 1 - _MARGIN)
        logits = logit(mixed)
        z = slope * logits + bias
        error = (expit(z) - cancer) / len(cancer)
        by_weight = given.T @ (error * slope / (mixed * (1 - mixed)))
        value = float(np.mean(np.logaddexp(0, z) - cancer * z)) + _TIE * float(weights @ alone)
        return value, np.r_[by_weight + _TIE * alone, error @ logits, error.sum()]

    # Not convex: from the middle and from each run alone, each recalibrated; and the best of these and of what they
    # come to, for SLSQP may end where it should not.
    starts = [
        np.r_[each, _recalibrated(cancer, given @ each)[1:]] for each in (np.full(count, 1 / count), *np.eye(count))
    ]
    ends = [
        minimize(
            loss,
            start,
            jac=True,
            method="SLSQP",
            bounds=[*[(0.0, 1.0)] * count, (0.0, _STEEPEST), (-_STEEPEST, _STEEPEST)],
            constraints={
                "type": "eq",
                "fun": lambda found: found[:count].sum() - 1,
                "jac": lambda found: np.r_[np.ones(count), 0.0, 0.0],
            },
            options={"maxiter": 500, "ftol": 1e-10},
        ).x
        for start in starts
    ]

    def weighed(found: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """The loss of weights that sum to 1, recalibrated as well as can be, and these."""
        # However small: beside a run whose probabilities are tiny, another one's small weight may be what counts.
        weights = np.clip(found[:count], 0, 1)
        weights /= weights.sum()
        return _recalibrated(cancer, given @ weights)[0] + _TIE * float(weights @ alone), weights

    return min(map(weighed, [*starts, *(end for end in ends if np.isfinite(end).all())]), key=lambda each: each[0])[1]


def _recalibrated(labels: NDArray[np.float64], predictions: ArrayLike) -> tuple[float, float, float]:
    """Log loss of predictions after the logistic recalibration that makes it least, and its slope and bias."""
    fitted = calibration.fit("platt", labels, predictions)
    return metrics.log_loss(labels, fitted(predictions)), 1 / fitted.temperature, fitted.bias


def fit_aggregate(pictures: pd.DataFrame) -> str:
    """The generalised mean that tells breasts with cancer best from those without, as `metrics` names it.

    Its exponent has the least log loss after a logistic recalibration (Platt 1999): what is fitted is how pictures are
    weighed against each other, not how sure the outcome is.

    Args:
        pictures: `prediction_id`, `cancer` and `prediction` of each, from models that did not learn from it.

    Raises:
        RunError: the breasts are all of one class.
    """
    from scipy.optimize import minimize_scalar

    known = pictures.dropna(subset=["cancer", "prediction"])
    labels = known.groupby("prediction_id")["cancer"].max().to_numpy(np.float64)
    if len(np.unique(labels)) < 2:
        raise RunError(
            "--aggregate fitted: the run's out-of-fold breasts are all of one class, so nothing can be fitted on them. "
            "Train on more patients, or choose mean, max or noisy_or."
        )

    def loss(log_exponent: float) -> float:
        breasts = metrics.aggregate_predictions(
            known["prediction"], known["prediction_id"], f"power:{np.exp(log_exponent)}"
        )
        return _recalibrated(labels, breasts)[0]

    found = minimize_scalar(loss, bounds=(0.0, float(np.log(_PEAKED))), method="bounded")
    return f"power:{np.exp(found.x):.3f}"  # pyright: ignore[reportAttributeAccessIssue]
